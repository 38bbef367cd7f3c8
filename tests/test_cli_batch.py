"""``captum-cage batch``: a file of examples to a directory of results."""

import json

import pytest
from typer.testing import CliRunner

from captum_cage import cli, cli_batch
from captum_cage.attribution import GraphContextAttribution
from captum_cage.batch import results

pytest.importorskip("pyarrow")

GOOD = [
    {"prompt": "Ana has 3 pens.", "target": " Ana has 3 pens.", "id": "a", "level": 1},
    {"prompt": "Mia has 4 cups.", "target": " Mia has 4. So it is 4.", "id": "b"},
]
BAD = {"prompt": "Ana has 3 pens.", "target": " 3", "explain": "nowhere", "id": "c"}


def run(*arguments):
    """What the program does when it is called with these arguments."""
    return CliRunner().invoke(cli.app, ["batch", *(str(a) for a in arguments)])


@pytest.fixture
def folder(tmp_path):
    """A folder with examples, some of which are bad."""
    lines = [json.dumps(one) for one in GOOD]
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    lines += ["{", json.dumps(BAD)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    return tmp_path


def of_demo(folder, name, *options):
    """The command with the model in the package."""
    return run(
        folder / name,
        "--out",
        folder / "out",
        "--model",
        "demo",
        "--json",
        "-",
        *options,
    )


class TestRun:
    """What is done, what is told, and how the program ends."""

    def test_each_example_gets_a_result(self, folder):
        """Once: the same command again finds them done."""
        done = of_demo(folder, "good.jsonl")
        assert done.exit_code == 0
        found = json.loads(done.stdout)
        assert (found["done"], found["skipped"], found["failed"]) == (2, 0, 0)
        kept = list(results(folder / "out"))
        assert [(one.id, one.line) for one in kept] == [("a", 1), ("b", 2)]
        result = kept[0].load()
        assert [unit.text for unit in result.units if not unit.generated] == [
            "Ana has 3 pens."
        ]
        again = json.loads(of_demo(folder, "good.jsonl").stdout)
        assert (again["done"], again["skipped"]) == (0, 2)

    def test_some_that_fail_are_exit_code_3(self, folder):
        """With the line and the reason."""
        done = run(folder / "mixed.jsonl", "--out", folder / "out", "--model", "demo")
        assert done.exit_code == cli_batch.SOME_FAILED == 3
        assert "line 3" in done.stdout
        assert "line 4, c" in done.stdout
        assert "does not occur" in done.stdout

    def test_strict_stops_at_the_first_that_fails(self, folder):
        """As wrong input."""
        done = of_demo(folder, "mixed.jsonl", "--strict")
        assert (done.exit_code, done.stdout) == (2, "")
        assert "line 3: must be explained, since strict is set" in done.stderr

    def test_other_settings_need_another_directory(self, folder):
        """The results of one directory are alike."""
        of_demo(folder, "good.jsonl")
        done = of_demo(folder, "good.jsonl", "--units", "token")
        assert done.exit_code == 2
        assert "must be a folder of the same settings" in done.stderr

    def test_another_baseline_is_another_example(self, folder):
        """Its hash knows how it is read."""
        keys = {
            one.key
            for baseline in (None, ".")
            for one in cli_batch._File(folder / "good.jsonl", False, baseline)
        }
        assert len(keys) == 4

    def test_a_worker_of_ray_asks_for_the_gpu_that_it_uses(self):
        """Ray hides those that nobody asked for."""
        assert cli_batch._backend(cli_batch.Backend.ray, "cuda").num_gpus == 1
        assert cli_batch._backend(cli_batch.Backend.ray, "cpu") == "ray"
        assert cli_batch._backend(cli_batch.Backend.local, "cuda") == "local"

    def test_an_interrupt_says_how_to_go_on(self, folder, monkeypatch):
        """Exit code 130."""

        def interrupted(*_args, **_kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(GraphContextAttribution, "answer", interrupted)
        done = of_demo(folder, "good.jsonl")
        assert done.exit_code == 130
        assert "the same command goes on from there" in done.stderr

    def test_a_file_that_is_not_there(self, folder):
        """Is told before a model is loaded."""
        done = of_demo(folder, "none.jsonl")
        assert done.exit_code == 2
        assert "loading" not in done.stderr
        assert "No such file" in done.stderr


class TestDryRun:
    """What a run would do."""

    def test_examples_are_counted_and_some_estimated(self, folder, monkeypatch):
        """None is explained, and no directory made."""
        monkeypatch.delattr(GraphContextAttribution, "answer")
        found = json.loads(of_demo(folder, "mixed.jsonl", "--dry-run").stdout)
        assert (found["examples"], found["left"], found["unreadable"]) == (4, 3, 1)
        assert (found["refused"], found["estimated"]) == (1, 2)
        assert found["sequences"] > 4
        assert not (folder / "out").exists()

    def test_what_is_done_is_left_out(self, folder):
        """And what failed, unless it is tried again."""
        of_demo(folder, "mixed.jsonl")
        found = json.loads(of_demo(folder, "mixed.jsonl", "--dry-run").stdout)
        assert (found["done"], found["failed"], found["left"]) == (2, 1, 0)
        options = ("--dry-run", "--retry-failed")
        found = json.loads(of_demo(folder, "mixed.jsonl", *options).stdout)
        assert (found["failed"], found["left"]) == (0, 1)

    def test_what_is_repeated_is_not_called_done(self, folder):
        """It is explained once."""
        line = json.dumps(GOOD[0]) + "\n"
        (folder / "twice.jsonl").write_text(line * 2)
        found = json.loads(of_demo(folder, "twice.jsonl", "--dry-run").stdout)
        assert (found["repeated"], found["done"], found["left"]) == (1, 0, 1)

    def test_examples_of_one_length_are_all_told(self, folder):
        """The cost is their mean, not that of the last one."""
        same = [{**GOOD[0], "prompt": f"Ana has {n} pens."} for n in (3, 4, 5)]
        (folder / "same.jsonl").write_text("\n".join(map(json.dumps, same)))
        found = json.loads(of_demo(folder, "same.jsonl", "--dry-run").stdout)
        assert (found["left"], found["estimated"]) == (3, 3)

    def test_other_settings_need_another_directory(self, folder):
        """As in the run itself, and nothing is written."""
        of_demo(folder, "good.jsonl")
        before = (folder / "out" / "manifest.json").read_bytes()
        done = of_demo(folder, "good.jsonl", "--units", "token", "--dry-run")
        assert done.exit_code == 2
        assert "must be a folder of the same settings" in done.stderr
        assert (folder / "out" / "manifest.json").read_bytes() == before

    def test_a_cost_that_is_not_known_is_not_zero(self, folder):
        """The reason is told."""
        (folder / "wrong.jsonl").write_text(json.dumps(BAD))
        found = json.loads(of_demo(folder, "wrong.jsonl", "--dry-run").stdout)
        assert (found["refused"], found["estimated"]) == (1, 0)
        assert found["seconds"] is found["memory"] is found["sequences"] is None
        options = ("--out", folder / "out", "--model", "demo", "--dry-run")
        done = run(folder / "wrong.jsonl", *options)
        assert done.exit_code == 0
        assert "unknown" in done.stdout
        assert "does not occur" in done.stdout

    def test_an_error_of_any_kind_is_counted(self, folder, monkeypatch):
        """As a run would record it."""

        def fail(*_args, **_kwargs):
            raise RuntimeError("no memory")

        monkeypatch.setattr(GraphContextAttribution, "estimate", fail)
        found = json.loads(of_demo(folder, "good.jsonl", "--dry-run").stdout)
        assert found["reason"] == "RuntimeError: no memory"

    def test_the_table(self, folder):
        """For people."""
        options = ("--out", folder / "out", "--model", "demo", "--dry-run")
        done = run(folder / "good.jsonl", *options, "--workers", 2)
        assert done.exit_code == 0
        assert "of work for 2 workers" in done.stdout
