"""A worker of a batch: what it explains, what it keeps, what stops it."""

import errno
import os
import random

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
)
from filelock import FileLock

from captum_cage import GraphContextAttribution
from captum_cage.batch import worker as batch_worker
from captum_cage.batch.directory import Directory, Failure
from captum_cage.batch.examples import given
from captum_cage.batch.worker import Job, Worker, seeded, settings_of
from captum_cage.methods import CLime
from captum_cage.spool import OtherRows
from tiny import tiny_cage, tiny_model

ONE = {"prompt": "Ana has 3 pens.", "target": " Mia has 7.", "explain": "7"}


def first(record):
    """What is read of one record."""
    return next(given([record]))


@pytest.fixture(scope="module")
def cage():
    """Ablation of a small model."""
    return tiny_cage()


@pytest.fixture
def worker(cage, tmp_path):
    """A worker with a directory of its own."""
    return Worker(Job(cage, Directory(tmp_path).make().path, {"units": "word"}))


class TestWorker:
    """One example after the other."""

    def test_the_result_is_that_of_the_wrapper(self, worker, cage, tokenizer):
        """The options for all, and what the example says."""
        found = worker.attribute(first({**ONE, "units": "token"}), None)
        inp = TextTokenInput(ONE["prompt"], tokenizer)
        direct = cage.attribute(inp, ONE["target"], explain="7", units="token")
        assert found.seq_attr.equal(direct.seq_attr)
        assert worker.attribute(first(ONE), None).meta["units"] == "word"

    def test_what_an_example_causes_is_its_failure(self, worker, monkeypatch):
        """Whatever is raised, out of memory too; it is not tried again unasked."""
        failed = worker.explain(first({**ONE, "explain": "nothing", "id": "a"}))
        assert failed.status == "failed"
        assert failed.failure.type == "ValueError"
        assert "does not occur" in failed.failure.message
        assert failed.failure.id == "a"
        assert "Traceback" in failed.failure.traceback

        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(GraphContextAttribution, "attribute", full)
        assert worker.explain(first(ONE)).failure.type == "OutOfMemoryError"
        monkeypatch.undo()
        assert worker.explain(first(ONE)).status == "failed"
        again = Worker(Job(worker.cage, worker.job.out, retry_failed=True))
        assert again.explain(first(ONE)).status == "done"
        assert again.explain(first(ONE)).status == "skipped"

    def test_an_example_that_fails_again_is_not_tried_for_ever(
        self, worker, monkeypatch
    ):
        """Once in a run, though it was to be tried again."""
        bad = first({**ONE, "explain": "nothing"})
        worker.explain(bad)
        file = worker.directory.error_file(bad.key)
        os.utime(file, (0, 0))
        again = Worker(Job(worker.cage, worker.job.out, retry_failed=True))
        calls = []
        real = Worker.attribute

        def attribute(self, given, spool):
            calls.append(given)
            return real(self, given, spool)

        monkeypatch.setattr(Worker, "attribute", attribute)
        assert [again.explain(bad).status for _ in range(2)] == ["failed"] * 2
        assert len(calls) == 1

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            ImportError("needs a package"),
            KeyboardInterrupt(),
        ],
    )
    def test_what_no_example_causes_stops(self, worker, monkeypatch, error):
        """A full disk, a package that is missing, an interrupt."""

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(GraphContextAttribution, "attribute", fail)
        with pytest.raises(type(error)):
            worker.explain(first(ONE))
        monkeypatch.undo()
        assert worker.explain(first(ONE)).status == "done"

    def test_a_device_that_is_lost_stops_at_an_example_once(self, worker, monkeypatch):
        """It is a failure of the example, too, so that the next run gets past it."""

        class Lost(RuntimeError):
            pass

        def fail(*_, **__):
            raise Lost("device-side assert triggered")

        monkeypatch.setattr(batch_worker, "LOST_DEVICE", (Lost,))
        monkeypatch.setattr(GraphContextAttribution, "attribute", fail)
        with pytest.raises(Lost):
            worker.explain(first(ONE))
        monkeypatch.undo()
        assert worker.explain(first(ONE)).failure.type == "Lost"

    def test_a_connection_that_fails_is_a_failure(self, worker, monkeypatch):
        """An OSError, too, but none of the disk."""

        def fail(*_, **__):
            raise ConnectionError("no answer")

        monkeypatch.setattr(GraphContextAttribution, "attribute", fail)
        assert isinstance(worker.attribute(first(ONE), None), Failure)

    def test_an_example_of_another_process_is_left_to_it(self, worker):
        """Until that is done with it."""
        one = first(ONE)
        with worker.directory.claim(one.key):
            assert worker.explain(one).status == "busy"
        assert worker.explain(one, wait=True).status == "done"

    def test_the_users_wrapper_is_not_changed(self, cage, tmp_path, monkeypatch):
        """An example that failed leaves no rows in it, as an interrupt would."""
        job = Job(cage, Directory(tmp_path).make().path, {"strategy": "loop"})
        before = dict(vars(cage))
        calls = []
        real = FeatureAblation.attribute

        def attribute(self, inputs, *args, **kwargs):
            calls.append(inputs)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            return real(self, inputs, *args, **kwargs)

        monkeypatch.setattr(FeatureAblation, "attribute", attribute)
        failed = Worker(job).explain(first({**ONE, "explain": None}))
        assert failed.failure.type == "RuntimeError"
        assert vars(cage) == before


class TestSpool:
    """Rows that are kept while an example is under way."""

    @pytest.fixture
    def calls(self, monkeypatch):
        """The folders that the wrapper is given."""
        made = []
        real = GraphContextAttribution.attribute

        def attribute(self, inp, target=None, *, spool=None, **kwargs):
            made.append(spool)
            if spool is not None:
                if (spool / "damaged").exists():
                    raise OtherRows("other rows")
                spool.mkdir()
            return real(self, inp, target, **kwargs)

        monkeypatch.setattr(GraphContextAttribution, "attribute", attribute)
        return made

    def test_it_is_the_examples_own_and_goes_with_its_end(self, worker, calls):
        """Its name is the hash; afterwards it is gone."""
        one = first(ONE)
        assert worker.explain(one).status == "done"
        assert calls == [worker.directory.spool(one.key)]
        assert not calls[0].exists()

    def test_rows_that_cannot_be_used_are_thrown_away(self, worker, calls):
        """The example starts anew."""
        one = first(ONE)
        spool = worker.directory.spool(one.key)
        spool.mkdir()
        (spool / "damaged").touch()
        assert worker.explain(one).status == "done"
        assert calls == [spool, spool]

    def test_rows_that_another_one_still_writes_are_left_to_it(self, worker):
        """It may be of a driver that was killed; the example is no failure."""
        one = first(ONE)
        spool = worker.directory.spool(one.key)
        spool.mkdir()
        with FileLock(spool / "lock"):
            assert worker.explain(one).status == "done"

    def test_rows_of_methods_that_draw_are_not_kept(
        self, model, tokenizer, tmp_path, calls
    ):
        """Else those after a kill would be drawn as those before it."""
        cage = GraphContextAttribution(LLMAttribution(CLime(model), tokenizer))
        worker = Worker(Job(cage, Directory(tmp_path).make().path))
        assert worker.explain(first(ONE)).status == "done"
        assert calls == [None]


class TestSettings:
    """What every result of a directory shares."""

    def test_they_are_json_and_know_model_method_and_options(self, cage, tokenizer):
        """Each of these changes them; what changes no result does not."""

        def of(model, options, seed=0, **init):
            llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
            return settings_of(GraphContextAttribution(llm_attr, **init), options, seed)

        size = len(tokenizer)
        network = tiny_model("llama", vocab_size=size)
        base = of(network, {})
        assert base == settings_of(cage, {"batch_size": 3}, 0)
        others = [
            of(tiny_model("llama", vocab_size=size, seed=1), {}),
            of(tiny_model("llama", vocab_size=size, dtype=torch.float64), {}),
            of(tiny_model("qwen3", vocab_size=size), {}),
            of(network, {"units": "word"}),
            of(network, {"units": [(0, 1)]}),
            of(network, {"units": str.split}),
            of(network, {}, 1),
            of(network, {}, normalization="absolute"),
        ]
        assert all(one != base for one in others)

    def test_what_is_attributed_counts(self, model, tokenizer):
        """Probabilities or their logarithms, gradients or their products."""
        method = FeatureAblation(model)
        found = [
            LLMAttribution(method, tokenizer, attr_target=name)
            for name in ("log_prob", "prob")
        ]
        layer = model.get_input_embeddings()
        found += [
            LLMGradientAttribution(
                LayerIntegratedGradients(model, layer, multiply_by_inputs=multiplies),
                tokenizer,
            )
            for multiplies in (True, False)
        ]
        said = [settings_of(GraphContextAttribution(one), {}, 0) for one in found]
        assert said[0] != said[1]
        assert said[2] != said[3]

    def test_layers_and_second_models_of_a_method_count(self, model, tokenizer):
        """A layer by its name, another model by its weights."""

        def of(layer):
            method = LayerIntegratedGradients(model, layer)
            llm_attr = LLMGradientAttribution(method, tokenizer)
            found = settings_of(GraphContextAttribution(llm_attr), {}, 0)
            return found["method_settings"]["layer"]

        layers = model.model.layers
        assert of(model.get_input_embeddings()) == "model.embed_tokens"
        with pytest.warns(UserWarning, match="Multiple layers"):
            assert of([layers[0], layers[1]]) == ["model.layers.0", "model.layers.1"]
        others = [torch.nn.Linear(2, 2) for _ in range(2)]
        assert of(others[0]) == of(others[0]) != of(others[1])

    def test_options_that_cannot_be_are_refused_at_once(self, cage, tmp_path):
        """Not once for each example."""
        for options, error, match in [
            ({"unit": "word"}, TypeError, "unit: neither"),
            ({"units": "words"}, ValueError, "units"),
            ({"strategy": "fast"}, ValueError, "strategy"),
            ({"target": "x"}, TypeError, "target: is not an option of a batch"),
        ]:
            with pytest.raises(error, match=match):
                Worker(Job(cage, tmp_path, options))

    @pytest.mark.parametrize("wrong", [3, lambda: 3])
    def test_something_else_than_a_wrapper_is_refused(self, tmp_path, wrong):
        """Given, or made."""
        with pytest.raises(TypeError, match="cage: must be a GraphContextAttribution"):
            Worker(Job(wrong, tmp_path))


def test_random_states_are_the_users_afterwards():
    """Those of Torch, NumPy and Python; inside they follow from seed and key."""

    def numbers():
        return torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    expected = [numbers(), numbers()]
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    found = [numbers()]
    inside = []
    for seed, key in [(0, "a"), (0, "a"), (1, "a"), (0, "b")]:
        with seeded(seed, key):
            inside.append(numbers())
    found.append(numbers())
    assert found == expected
    assert inside[0] == inside[1]
    assert len({one for draw in inside for one in draw}) == 9
