"""Many examples: each is explained once, whatever happens, and equal to one alone."""

import errno
import os
import random
import re
import signal
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    ShapleyValueSampling,
    TextTokenInput,
)
from tqdm import tqdm

from captum_cage import GraphAttributionResult, GraphContextAttribution, batch
from captum_cage.batch.directory import Directory
from captum_cage.batch.examples import given
from captum_cage.batch.local import ThisProcess
from tiny import tiny_cage

RECORDS = [
    {"prompt": f"Ana has {n} pens. Mia has {n + 1}.", "target": " 7 pens.", "id": n}
    for n in range(8)
]
BAD = {"prompt": "Ana", "target": " 7", "explain": "nothing", "id": "bad"}


@pytest.fixture(scope="module")
def cage():
    """Ablation of a small model."""
    return tiny_cage()


@pytest.fixture
def random_cage(model, tokenizer):
    """A method whose rows depend on what was drawn before."""
    llm_attr = LLMAttribution(ShapleyValueSampling(model), tokenizer)
    return GraphContextAttribution(llm_attr)


@pytest.fixture
def calls(monkeypatch):
    """The prompts that are explained, in their order."""
    made = []
    real = GraphContextAttribution.attribute

    def attribute(self, inp, target=None, **kwargs):
        made.append("".join(inp.values))
        return real(self, inp, target, **kwargs)

    monkeypatch.setattr(GraphContextAttribution, "attribute", attribute)
    return made


def arrays(out):
    """The arrays of all results, by file."""
    found = {}
    for path in sorted(Path(out).glob("results/*.npz")):
        with np.load(path) as archive:
            found[path.name] = {name: archive[name].tobytes() for name in archive}
    return found


class TestRun:
    """One process, one model."""

    def test_results_are_those_of_the_wrapper_in_the_order_of_the_input(
        self, cage, tokenizer, tmp_path
    ):
        """Table and files say what attribute says."""
        report = batch.run(cage, RECORDS[:3], tmp_path, units="word")
        assert (report.done, report.skipped, report.failed) == (3, 0, 0)
        table = report.table().to_pandas()
        for record, found in zip(RECORDS, report.results(), strict=False):
            inp = TextTokenInput(record["prompt"], tokenizer)
            alone = cage.attribute(inp, record["target"], units="word")
            assert found.load().seq_attr.equal(alone.seq_attr)
            rows = table[table["key"] == found.key]
            assert rows["score"].tolist() == alone.seq_attr.tolist()
            assert rows["text"].tolist() == alone.input_tokens
            assert found.id == str(record["id"])
        assert table["position"].drop_duplicates().tolist() == [0, 1, 2]

    def test_a_second_start_does_what_is_new(self, cage, tmp_path, calls):
        """What is finished is left alone, what changed is another example."""
        batch.run(cage, RECORDS[:2], tmp_path)
        changed = [RECORDS[0], {**RECORDS[1], "explain": "7"}, RECORDS[2]]
        report = batch.run(cage, changed, tmp_path)
        assert (report.done, report.skipped) == (2, 1)
        assert len(calls) == 4
        assert len(list(batch.results(tmp_path))) == 4

    def test_where_examples_stand_is_what_the_last_whole_run_found(
        self, cage, tmp_path
    ):
        """So that an input that was put in order has no rows twice."""
        batch.run(cage, RECORDS[:3], tmp_path)
        table = batch.run(cage, RECORDS[2:0:-1], tmp_path).table().to_pandas()
        assert not table.duplicated(["key", "unit"]).any()
        found = table.groupby("id")["position"].first().to_dict()
        assert found == {"0": 0, "1": 1, "2": 0}

    def test_names_that_are_no_utf8_do_not_spoil_the_table(self, cage, tmp_path):
        """Half a surrogate pair is written out."""
        records = [{**RECORDS[0], "id": "\ud800", "x\udfff": 1}, {"id": "\ud801"}]
        report = batch.run(cage, records, tmp_path)
        assert (report.done, report.errors[0].id) == (1, "\\ud801")
        assert set(report.table()["id"].to_pylist()) == {"\\ud800"}
        assert set(report.table()["meta.x\\udfff"].to_pylist()) == {1}

    def test_a_result_that_was_cut_short_is_made_again(self, cage, tmp_path):
        """By no kill of ours, but by a copy that did not end."""
        batch.run(cage, RECORDS[:2], tmp_path)
        expected = arrays(tmp_path)
        one, other = (tmp_path / "results").iterdir()
        one.write_bytes(one.read_bytes()[:-30])
        other.write_bytes(b"")
        assert list(batch.results(tmp_path)) == []
        assert batch.run(cage, RECORDS[:2], tmp_path).done == 2
        assert arrays(tmp_path) == expected

    def test_what_a_kill_left_of_finished_examples_goes(self, cage, tmp_path):
        """Between the result and the end of its rows; what others do stays."""
        batch.run(cage, RECORDS[:1], tmp_path)
        directory = Directory(tmp_path)
        (key,) = (path.stem for path in (tmp_path / "results").iterdir())
        other = "f" * 32
        for name in (key, other):
            directory.spool(name).mkdir()
            (tmp_path / "saving" / name).mkdir()
        directory.error_file(key).write_text("{}")
        batch.run(cage, RECORDS[:1], tmp_path)
        assert list((tmp_path / "rows").iterdir()) == [directory.spool(other)]
        assert [one.name for one in (tmp_path / "saving").iterdir()] == [other]
        assert list((tmp_path / "errors").iterdir()) == []

    def test_a_result_says_how_large_it_may_be(self, cage, tmp_path):
        """As a saved one does."""
        (one,) = batch.run(cage, RECORDS[:1], tmp_path).results()
        with pytest.raises(ValueError, match="at most 100 bytes"):
            one.load(limit=100)

    def test_an_example_that_comes_again_is_explained_once(self, cage, tmp_path, calls):
        """It has its rows at each place; a failed one fails at each."""
        again = {**RECORDS[0], "id": "again"}
        report = batch.run(cage, [RECORDS[0], BAD, again, BAD], tmp_path)
        assert (report.done, report.skipped, report.failed) == (1, 1, 2)
        assert len(calls) == 2
        assert [one.id for one in report.results()] == ["0", "again"]
        ids = report.table()["id"].to_pylist()
        assert ids[: len(ids) // 2] + ids[len(ids) // 2 :] == sorted(ids)

    def test_bad_examples_are_recorded_and_skipped(self, cage, tmp_path, calls):
        """With the line; they are not tried again unless asked."""
        path = tmp_path / "examples.jsonl"
        lines = ['{"prompt": ', '{"id": "none"}', '{"prompt": "a", "target": " 7"}']
        path.write_text("\n".join(lines), encoding="utf-8")
        out = tmp_path / "out"
        for start in range(2):
            report = batch.run(cage, path, out)
            assert (report.done, report.failed) == (start == 0, 2)
            assert [one.line for one in report.errors] == [1, 2]
            assert [one.type for one in report.errors] == ["ValueError"] * 2
            assert report.errors[1].id == "none"
        assert len(calls) == 1
        assert len(list((out / "errors").iterdir())) == 2
        assert "1 skipped, 2 failed" in str(report)

    def test_failed_examples_are_tried_again_when_asked(
        self, cage, tmp_path, monkeypatch
    ):
        """And their error goes with their success."""

        def fail(*_, **__):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(GraphContextAttribution, "attribute", fail)
            report = batch.run(cage, RECORDS[:2], tmp_path)
        assert [one.type for one in report.errors] == ["RuntimeError"] * 2
        assert batch.run(cage, RECORDS[:2], tmp_path).failed == 2
        report = batch.run(cage, RECORDS[:2], tmp_path, retry_failed=True)
        assert (report.done, report.failed) == (2, 0)
        assert list((tmp_path / "errors").iterdir()) == []
        statuses = {
            one.status for one in Directory(tmp_path).manifest().inputs.values()
        }
        assert statuses == {"done"}

    @pytest.mark.parametrize("bad", [BAD, {"id": "bad"}])
    def test_strict_stops_at_the_first_bad_example(self, cage, tmp_path, calls, bad):
        """What is before it is kept; the error names it."""
        records = [RECORDS[0], bad, RECORDS[1]]
        match = re.escape("example 1, id 'bad': must be explained, since strict is set")
        for _ in range(2):
            with pytest.raises(ValueError, match=match):
                batch.run(cage, records, tmp_path, strict=True)
        assert RECORDS[1]["prompt"] not in "".join(calls)
        assert len(arrays(tmp_path)) == 1

    def test_changed_settings_are_refused(self, cage, tmp_path):
        """What differs is named, and nothing is changed."""
        batch.run(cage, RECORDS[:1], tmp_path, units="word")
        before = arrays(tmp_path)
        with pytest.raises(ValueError, match=r"options\.units was 'word' and is"):
            batch.run(cage, RECORDS[:1], tmp_path, units="token")
        other = tiny_cage(normalization="absolute")
        with pytest.raises(ValueError, match="normalization was 'positive' and is"):
            batch.run(other, RECORDS[:1], tmp_path, units="word")
        assert arrays(tmp_path) == before

    def test_other_versions_are_told(self, cage, tmp_path, monkeypatch):
        """The results of before stay as they are."""
        batch.run(cage, RECORDS[:1], tmp_path)
        module = sys.modules["captum_cage.batch.run"]  # the function has its name
        now = {**module.versions(), "torch": "99"}
        monkeypatch.setattr(module, "versions", lambda: now)
        with pytest.warns(UserWarning, match="torch was .* and is 99"):
            assert batch.run(cage, RECORDS[:1], tmp_path).skipped == 1

    def test_order_resume_and_the_users_seed_change_nothing(
        self, random_cage, tmp_path
    ):
        """Not a byte of what a random method draws."""
        options = {"units": "word", "n_samples": 2}
        first, second, other = (tmp_path / name for name in "abc")
        state = random.getstate()
        batch.run(random_cage, RECORDS[:4], first, **options)
        assert random.getstate() == state
        batch.run(random_cage, RECORDS[3:1:-1], second, **options)
        random.seed(5)
        batch.run(random_cage, iter(RECORDS[3::-1]), second, **options)
        assert arrays(first) == arrays(second)
        batch.run(random_cage, RECORDS[:4], other, **options, seed=1)
        assert arrays(first) != arrays(other)

    def test_progress_tells_rate_failures_and_the_end(self, cage, tmp_path, capsys):
        """The total where it is known."""
        batch.run(cage, [*RECORDS[:2], BAD], tmp_path, show_progress=True)
        shown = capsys.readouterr().err
        assert "3/3" in shown
        assert "failed=1" in shown
        batch.run(cage, iter(RECORDS[:2]), tmp_path, show_progress=True)
        assert "2example" in capsys.readouterr().err

    def test_lost_parts_of_the_table_are_made_again(self, cage, tmp_path, monkeypatch):
        """From the results, however large they are."""
        expected = batch.run(cage, RECORDS[:2], tmp_path).table()
        one, other = (tmp_path / "scores").iterdir()
        one.unlink()
        other.write_bytes(b"PAR1")
        defaults = GraphAttributionResult.load.__func__.__kwdefaults__
        monkeypatch.setitem(defaults, "limit", 1)  # byte
        assert batch.run(cage, RECORDS[:2], tmp_path).table().equals(expected)

    def test_scalars_of_an_example_are_columns(self, cage, tmp_path):
        """Of the type that holds all of them."""
        metas = [{"n": 1, "mixed": 1}, {"n": 2.5, "mixed": "a"}, {"none": None}]
        records = [{**RECORDS[i], **meta} for i, meta in enumerate(metas)]
        table = batch.run(cage, records, tmp_path).table()
        assert set(table["meta.n"].to_pylist()) == {1.0, 2.5, None}
        assert set(table["meta.mixed"].to_pylist()) == {"1", "a", None}
        assert set(table["meta.none"].to_pylist()) == {None}

    @pytest.mark.parametrize(
        ("wrong", "error", "match"),
        [
            ({"backend": "cloud"}, ValueError, "backend: must be one of"),
            ({"workers": 0}, ValueError, "workers: must be 1 or more"),
            ({"seed": 1.5}, TypeError, "seed: must be a whole number"),
            ({"examples": 3}, TypeError, "examples: must be a path"),
            ({"cage": 3}, TypeError, "cage: must be a GraphContextAttribution"),
            ({"unit": "word"}, TypeError, "unit: neither"),
        ],
    )
    def test_wrong_arguments_are_named(self, cage, tmp_path, wrong, error, match):
        """Before any example."""
        arguments = {"cage": cage, "examples": RECORDS, "out": tmp_path, **wrong}
        with pytest.raises(error, match=match):
            batch.run(**arguments)

    def test_a_directory_of_nothing_has_no_results(self, tmp_path):
        """It says so."""
        with pytest.raises(FileNotFoundError, match="has no manifest"):
            batch.results(tmp_path)


class TestFaults:
    """What ends a run, and what is there afterwards."""

    def test_nothing_is_asked_of_the_model_where_nothing_can_be_written(
        self, tmp_path, monkeypatch
    ):
        """The disk is tried, and the manifest read, before the model is made."""

        def never():
            pytest.fail("the model was made")

        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            batch.run(never, RECORDS, tmp_path / "file" / "out")
        out = tmp_path / "damaged"
        out.mkdir()
        (out / "manifest.json").write_text("{")
        with pytest.raises(ValueError, match="or it is damaged"):
            batch.run(never, RECORDS, out)

        def read_only(*_):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(Path, "write_bytes", read_only)
        with pytest.raises(OSError, match="Read-only"):
            batch.run(never, RECORDS, tmp_path / "out")

    def test_a_full_disk_ends_the_run_and_the_next_one_goes_on(
        self, cage, tmp_path, calls
    ):
        """With a limit on the size of files, as the kernel enforces it."""
        resource = pytest.importorskip("resource")
        long = {"prompt": " ".join(one["prompt"] for one in RECORDS), "target": " 7"}
        records = [RECORDS[0], {**long, "target": " 7 pens." * 9}, *RECORDS[1:]]
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                batch.run(cage, records, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(arrays(tmp_path)) == 1
        assert list((tmp_path / "saving").iterdir()) == []
        assert batch.run(cage, records, tmp_path).done == len(records) - 1
        assert len(calls) == len(records) + 1  # one was computed and not kept

    def test_an_interrupt_is_no_failure(self, cage, tmp_path, monkeypatch):
        """It ends the run; the manifest knows what is done."""
        real = GraphContextAttribution.attribute

        def interrupted(self, inp, target=None, **kwargs):
            if "3" in "".join(inp.values):
                raise KeyboardInterrupt
            return real(self, inp, target, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(GraphContextAttribution, "attribute", interrupted)
            with pytest.raises(KeyboardInterrupt):
                batch.run(cage, RECORDS, tmp_path)
        found = [one.status for one in Directory(tmp_path).manifest().inputs.values()]
        assert found == ["done", "done", "open"]
        assert batch.run(cage, RECORDS, tmp_path).done == len(RECORDS) - 2

    def test_rows_of_the_example_under_way_are_not_computed_again(
        self, cage, tmp_path, monkeypatch
    ):
        """They lie on the disk, not in memory, until the example is finished."""
        rows = []
        real = FeatureAblation.attribute

        def attribute(self, inputs, *args, **kwargs):
            rows.append(inputs)
            if len(rows) == 4:
                raise KeyboardInterrupt
            return real(self, inputs, *args, **kwargs)

        record = {"prompt": "Ana has 3 pens.", "target": [20, 21, 22, 23, 24, 25]}
        monkeypatch.setattr(FeatureAblation, "attribute", attribute)
        with pytest.raises(KeyboardInterrupt):
            batch.run(cage, [record], tmp_path / "a", strategy="loop")
        assert len(list((tmp_path / "a" / "rows").iterdir())) == 1
        batch.run(cage, [record], tmp_path / "a", strategy="loop")
        assert len(rows) == 6 + 1
        batch.run(cage, [record], tmp_path / "b", strategy="loop")
        assert arrays(tmp_path / "a") == arrays(tmp_path / "b")
        assert list((tmp_path / "a" / "rows").iterdir()) == []

    def test_rows_of_an_example_that_failed_are_not_computed_again(
        self, cage, tmp_path, monkeypatch
    ):
        """They stay for the next trial."""
        rows = []
        real = FeatureAblation.attribute

        def attribute(self, inputs, *args, **kwargs):
            rows.append(inputs)
            if len(rows) == 4:
                raise ConnectionError("no answer")
            return real(self, inputs, *args, **kwargs)

        record = {"prompt": "Ana has 3 pens.", "target": [20, 21, 22, 23, 24, 25]}
        monkeypatch.setattr(FeatureAblation, "attribute", attribute)
        for status in ({"failed": 1}, {"done": 1}):
            report = batch.run(
                cage, [record], tmp_path, strategy="loop", retry_failed=True
            )
            assert vars(report).items() >= status.items()
        assert len(rows) == 6 + 1
        assert list((tmp_path / "rows").iterdir()) == []

    def test_workers_that_hold_claims_do_not_wait_for_themselves(self, cage, tmp_path):
        """The error of what cannot be read is kept at the end."""

        class Holding(ThisProcess):
            def map(self, tasks):
                """What it does while it has the claim of the line."""
                with Directory(tmp_path).claim(bad.key) as ours:
                    assert ours
                    yield from super().map(tasks)

        (bad,) = given([{"id": "bad"}])
        report = batch.run(
            cage,
            [RECORDS[0], {"id": "bad"}, RECORDS[1]],
            tmp_path,
            backend=lambda job, _: Holding(job),
        )
        assert (report.done, report.failed) == (2, 1)
        assert Directory(tmp_path).failure(bad.key) == report.errors[0]

    def test_an_input_that_breaks_is_the_users(self, cage, tmp_path):
        """Its error comes through, and what was finished stays."""

        def broken():
            yield RECORDS[0]
            raise LookupError("no more")

        with pytest.raises(LookupError, match="no more"):
            batch.run(cage, broken(), tmp_path)
        assert len(arrays(tmp_path)) == 1
        assert len(Directory(tmp_path).manifest().inputs) == 1


class Logged(GraphContextAttribution):
    """Leaves a line for each example that it finished."""

    log: Path

    def attribute(self, inp, target=None, **kwargs):
        """What the wrapper says, a little later."""
        time.sleep(0.01)
        found = super().attribute(inp, target, **kwargs)
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {''.join(inp.values)}\n")
        return found


def logged(log):
    """A wrapper with a log."""
    cage = Logged(tiny_cage().llm_attr)
    cage.log = log
    return cage


def run_apart(*arguments):
    """What a process does that may be killed."""
    # Else it shares the lock of progress bars with this one, and may die with it.
    tqdm.set_lock(threading.RLock())
    batch.run(*arguments)


class TestProcesses:
    """Several at once, and kills."""

    def test_two_processes_share_the_work_and_do_each_example_once(
        self, cage, tmp_path
    ):
        """Table, manifest and results are those of one alone."""
        made = logged(tmp_path / "log")
        out = tmp_path / "out"
        context = get_context("fork")
        processes = [
            context.Process(target=run_apart, args=(made, RECORDS * 2, out))
            for _ in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        lines = [line.split(" ", 1) for line in (tmp_path / "log").open()]
        assert len({prompt for _, prompt in lines}) == len(lines) == len(RECORDS)
        assert len({process for process, _ in lines}) == 2
        alone = batch.run(cage, RECORDS * 2, tmp_path / "alone")
        assert arrays(out) == arrays(tmp_path / "alone")
        report = batch.run(made, RECORDS * 2, out)
        assert report.table().equals(alone.table())
        assert report.done == 0

    def test_kills_at_any_moment_lose_nothing_that_was_finished(self, cage, tmp_path):
        """Each file is whole, each result stays, and the end is that of one run."""
        made = logged(tmp_path / "log")
        out = tmp_path / "out"
        context = get_context("fork")
        draw = random.Random(0)
        finished = {}
        for _ in range(6):
            process = context.Process(target=run_apart, args=(made, RECORDS, out))
            process.start()
            process.join(draw.uniform(0.02, 0.2))
            process.kill()
            process.join()
            found = arrays(out)  # which reads them all
            assert finished.items() <= found.items()
            finished = found
        report = batch.run(made, RECORDS, out)
        alone = batch.run(cage, RECORDS, tmp_path / "alone")
        assert report.failed == 0
        assert arrays(out) == arrays(tmp_path / "alone")
        assert report.table().equals(alone.table())
        assert list((out / "saving").iterdir()) == []
        # Done again is at most what was under way at each kill.
        lines = (tmp_path / "log").read_text().splitlines()
        assert len(lines) <= len(RECORDS) + 6

    def test_workers_give_what_one_gives(self, tmp_path):
        """In processes of their own, each with a model that it made."""
        report = batch.run(tiny_cage, [*RECORDS, BAD], tmp_path / "a", workers=2)
        assert (report.done, report.failed) == (len(RECORDS), 1)
        batch.run(tiny_cage, RECORDS, tmp_path / "b")
        assert arrays(tmp_path / "a") == arrays(tmp_path / "b")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
