"""A batch on a Ray cluster of two workers, some of which die."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from captum.attr import FeatureAblation, LLMAttribution

from captum_cage import GraphContextAttribution, batch
from captum_cage.batch import RayCluster, on_ray
from tiny import tiny_model, tiny_tokenizer

ray = pytest.importorskip("ray")

CLUSTER = Path(__file__).parents[1] / "docs/how-to/cluster"
TARGET = " Mia has 7."
TEXTS = [f"Ana has {number} pens." for number in range(5)]
DEADLY = "Ana has 8 pens."
# Workers import the tests' own modules, too.
PATHS = os.pathsep.join([str(Path(__file__).parent), *sys.path])
ASKED = {"units": "word", "explain": -1}


class Mortal(FeatureAblation):
    """Ablation whose process dies of some texts, of others once."""

    grave: Path

    def attribute(self, *args, **kwargs):
        """Attributions, or a signal that cannot be caught."""
        inp = kwargs["additional_forward_args"][0]
        text = tiny_tokenizer().decode(inp.to_model_input()[0])
        once = self.grave / "once"
        if "8" in text or ("4" in text and not once.exists()):
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().attribute(*args, **kwargs)


def made(grave=None):
    """An explainer of a small model; what its workers are."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    method = FeatureAblation(model) if grave is None else Mortal(model)
    method.grave = grave
    return GraphContextAttribution(LLMAttribution(method, tokenizer))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two workers' room on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """The results of the same examples by this process."""
    folder = tmp_path_factory.mktemp("local")
    examples = [{"prompt": text, "target": TARGET} for text in TEXTS]
    batch.run(made(), examples, folder, strategy="loop", **ASKED)
    return folder


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A run in which workers die: its report, and how far the input was read."""
    folder, grave = tmp_path_factory.mktemp("ray"), tmp_path_factory.mktemp("grave")
    read = []

    def examples():
        for number, text in enumerate([DEADLY, *TEXTS]):
            finished = len(list((folder / "results").iterdir()))
            read.append(number - finished)
            yield {"prompt": text, "target": TARGET, "id": str(number)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_ray, "ATTEMPTS", 2)
        report = batch.run(
            lambda: made(grave),
            examples(),
            folder,
            backend="ray",
            workers=2,
            strategy="loop",
            **ASKED,
        )
    return report, max(read)


def arrays(folder):
    """The arrays of all results, by key."""
    found = {}
    for one in batch.results(folder):
        with np.load(one.path, allow_pickle=False) as file:
            found[one.key] = {
                name: file[name].tobytes() for name in file if name != "header"
            }
    return found


class TestDeaths:
    """Workers that are killed in mid-run."""

    def test_what_they_had_is_done_by_others(self, course):
        """All examples have a result, but the one that workers die of."""
        report, _ = course
        assert (report.done, report.skipped, report.failed) == (5, 0, 1)
        assert not list((report.path / "saving").iterdir())
        assert not list((report.path / "rows").iterdir())

    def test_an_example_that_workers_die_of_is_an_error(self, course):
        """After some trials, and the others go on."""
        report, _ = course
        (failure,) = report.errors
        assert failure.type == "ChildProcessError"
        assert failure.id == "0"
        assert "2 workers died of this example" in failure.message

    def test_results_are_those_of_one_process(self, course, alike):
        """Array by array, byte by byte."""
        report, _ = course
        found, expected = arrays(report.path), arrays(alike)
        assert len(expected) == 5
        assert all(found[key] == expected[key] for key in expected)

    def test_the_input_is_read_as_it_is_needed(self, course):
        """One example for each worker, and the one that failed."""
        _, ahead = course
        assert ahead <= 3

    def test_ray_that_was_there_stays(self, course):
        """With no worker left in it."""
        assert ray.is_initialized()
        assert course


def test_a_killed_driver_is_followed_by_another(cluster, tmp_path, capsys):
    """The program of the docs does nothing twice, and prints what it did alone."""
    examples, out = tmp_path / "examples.jsonl", tmp_path / "explained"
    lines = [
        {"prompt": f"Ana has {n} pens. How many are they?", "target": f"Ana has {n}."}
        for n in range(40)
    ]
    examples.write_text("\n".join(map(json.dumps, lines)))
    program = str(CLUSTER / "run.py")
    arguments = [str(examples), str(out), "--workers", "1", "--address", cluster]
    driver = subprocess.Popen(
        [sys.executable, program, *arguments],
        env={**os.environ, "PYTHONPATH": PATHS},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(list(out.glob("results/*.npz"))) >= 2, driver)
    finally:
        driver.kill()
        driver.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("results/*.npz")}
    assert len(before) < 40
    runpy.run_path(program)["main"](arguments)
    assert re.fullmatch(
        rf"{40 - len(before)} explained, {len(before)} skipped, 0 failed in "
        rf"\d+\.\d s: {re.escape(str(out))}\n",
        capsys.readouterr().out,
    )
    assert len(list(batch.results(out))) == 40
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def wait_for(condition, process):
    """Until it holds; a process that ends before is a failure."""
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None
        time.sleep(0.05)
    pytest.fail("nothing happened in a minute")


def test_ray_takes_the_cluster_of_the_docs():
    """By its own check, and the shell takes the script for SLURM."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    pytest.importorskip("jsonschema")
    config = yaml.safe_load((CLUSTER / "cluster.yaml").read_text(encoding="utf-8"))
    util.validate_config(util.prepare_config(config))
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)


class TestRefusals:
    """What cannot run says so."""

    def test_without_ray(self, tmp_path, monkeypatch):
        """With the command that installs it."""
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ImportError, match=r"pip install captum-cage\[scale\]"):
            batch.run(made, [], tmp_path, backend="ray")

    def test_what_cannot_be_sent(self, tmp_path):
        """With what to pass instead."""
        lock = __import__("threading").Lock()
        with pytest.raises(ValueError, match="cage: must be something that can be sen"):
            batch.run(lambda: lock, [], tmp_path, backend="ray")
        assert not list((tmp_path / "saving").iterdir())

    @pytest.mark.parametrize("number", [-1, 1.5, float("nan"), float("inf")])
    def test_a_share_of_a_device_is_a_number(self, number):
        """Below one, or whole."""
        with pytest.raises(ValueError, match="num_gpus: must be a number of 0 or more"):
            RayCluster(num_gpus=number)

    @pytest.mark.parametrize("number", ["1", None, True])
    def test_numbers_are_numbers(self, number):
        """Not texts of them."""
        with pytest.raises(TypeError, match="num_cpus: must be a number of 0 or more"):
            RayCluster(num_cpus=number)
