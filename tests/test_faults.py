"""Faults: memory that runs out, Ctrl-C and other threads never make a number wrong."""

import functools
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

from captum_cage import GraphContextAttribution
from captum_cage.methods.catalogue import llm_attribution
from captum_cage.metrics.sanity import randomized
from captum_cage.scoring import held
from captum_cage.testing import tiny_causal_lm, tiny_tokenizer
from captum_cage.testing._faults import (
    Events,
    events_of_memory,
    events_of_operations,
    events_of_signals,
)
from captum_cage.testing.watch import (
    changes,
    model_snapshot,
    random_snapshot,
    settings_snapshot,
    tokenizer_snapshot,
)

# One of each family of engines, and what of the model it touches.
METHODS = {
    "ablation": {},
    "integrated-gradients": {"n_steps": 2},  # hooks, requires_grad
    "attnlrp": {},  # hooks of every layer, attention
    "attention-suppression": {},  # attention
    "ifr": {},  # hooks, attention
    "clp": {},
}
SAMPLES = 2  # faults per case; benchmarks/faults.py puts one in at every place


@functools.cache
def world(name):
    """A model in training mode, part of it not and frozen; and a method for it."""
    tokenizer = tiny_tokenizer("char")
    model = tiny_causal_lm(num_hidden_layers=1).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    return model, tokenizer, llm_attribution(name, model, tokenizer)


def explained(cage, name, strategy="fused", target=" ha"):
    """Raw rows of a small text."""
    inp = TextTokenInput("Ana", cage.llm_attr.tokenizer)
    found = cage.attribute(
        inp, target, strategy=strategy, batch_size=3, **METHODS[name]
    )
    return found.graph.rows


@functools.cache
def undisturbed(name, strategy, events):
    """The rows, and the number of events in a call."""
    cage = GraphContextAttribution(world(name)[2])
    explained(cage, name, strategy)  # what is found out once is known from here on
    seen = Events()
    with events(seen):
        rows = explained(cage, name, strategy)
    return rows, seen.seen


def snapshot(model, tokenizer):
    """All that is to be as before."""
    return {
        **model_snapshot(model),
        **tokenizer_snapshot(tokenizer),
        **settings_snapshot(),
        **random_snapshot(),
        "attentions": sorted(transformers.AttentionInterface._global_mapping),
    }


def places(count, seed):
    """Some of the events, other ones for each case."""
    return np.random.default_rng(seed).choice(count, min(SAMPLES, count), replace=False)


def assert_harmless(name, strategy, events, error, seed):
    """With a fault at some places: right or refused, all as before, right again."""
    model, tokenizer, llm_attr = world(name)
    rows, count = undisturbed(name, strategy, events)
    size = np.abs(rows).max()
    for place in places(count, seed).tolist():
        before = snapshot(model, tokenizer)
        cage = GraphContextAttribution(llm_attr)
        fault = Events(place, error)
        expected = KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError
        try:
            with events(fault):
                found = explained(cage, name, strategy)
        except expected as raised:
            told = str(raised)
            is_clear = error is KeyboardInterrupt or "memory" in told
        else:
            is_clear = True
            assert np.abs(found - rows).max() <= 1e-5 * size, fault.where
        assert fault.where
        assert is_clear, told
        assert changes(before, snapshot(model, tokenizer)) == [], fault.where
        # The same object, which goes on from what was finished.
        again = explained(cage, name, strategy)
        assert np.abs(again - rows).max() <= 1e-5 * size, fault.where


@pytest.mark.parametrize("name", METHODS)
def test_memory_that_runs_out_anywhere_makes_no_number_wrong(name):
    """The rows, or an error that says so; and the same call works afterwards."""
    assert_harmless(name, "fused", events_of_memory, torch.OutOfMemoryError, 0)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [*((name, "fused") for name in METHODS), ("ifr", "loop"), ("ablation", "loop")],
)
def test_an_interrupt_in_any_operation_leaves_the_model_as_it_was(name, strategy):
    """Modes, hooks, flags, attention, random states; the same call works afterwards."""
    assert_harmless(name, strategy, events_of_operations, KeyboardInterrupt, 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupt_between_operations_leaves_the_model_as_it_was(name):
    """Also between setting a hook and what takes it away."""
    assert_harmless(name, "fused", events_of_signals, KeyboardInterrupt, 2)


@pytest.mark.parametrize("what", ["held", "randomized"])
def test_an_interrupt_on_the_way_back_is_no_excuse(what):
    """Places all over a context manager, where it undoes what it did too."""
    model, tokenizer, llm_attr = world("ablation")

    def manager():
        return held(llm_attr) if what == "held" else randomized(model)

    seen = Events()
    with events_of_signals(seen), manager():
        pass
    before = snapshot(model, tokenizer)
    for place in range(0, seen.seen, max(1, seen.seen // 30)):
        try:
            with events_of_signals(Events(place)), manager():
                pass
        except KeyboardInterrupt:
            pass
        assert changes(before, snapshot(model, tokenizer)) == [], place


def test_an_interrupt_while_the_model_writes_leaves_it_as_it_was():
    """Where target is None."""
    model, tokenizer, llm_attr = world("ablation")
    inp = TextTokenInput("Ana", tokenizer)
    gen_args = {"max_new_tokens": 2, "do_sample": False}

    def call():
        cage = GraphContextAttribution(llm_attr)
        return cage.attribute(inp, gen_args=gen_args).graph.rows

    rows = call()
    seen = Events()
    with events_of_operations(seen):
        call()
    before = snapshot(model, tokenizer)
    for place in places(seen.seen // 2, 3).tolist():
        with (
            pytest.raises(KeyboardInterrupt),
            events_of_operations(Events(place)),
        ):
            call()
        assert changes(before, snapshot(model, tokenizer)) == []
    assert (call() == rows).all()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("attnlrp", "ablation"),
        ("ifr", "integrated-gradients"),
        ("attention-suppression", "writing"),
    ],
)
def test_threads_that_explain_with_one_model_do_not_mix(one, other):
    """Two objects over one model: the second waits, whatever either changes."""
    tokenizer = tiny_tokenizer("char")
    model = tiny_causal_lm(num_hidden_layers=1).train()

    def explain(name):
        if name == "writing":
            cage = GraphContextAttribution(
                llm_attribution("ablation", model, tokenizer)
            )
            arguments = {"max_new_tokens": 3, "do_sample": False}
            inp = TextTokenInput("Ana", tokenizer)
            return cage.attribute(inp, gen_args=arguments).graph.rows
        cage = GraphContextAttribution(llm_attribution(name, model, tokenizer))
        return explained(cage, name)

    expected = {name: explain(name) for name in (one, other)}
    before = snapshot(model, tokenizer)
    found, failed = [], []
    barrier = threading.Barrier(4)

    def run(name):
        try:
            barrier.wait()
            found.append((name, explain(name)))
        except BaseException as error:  # noqa: BLE001  # told below
            failed.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in (one, other) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(found) == 4
    assert all((rows == expected[name]).all() for name, rows in found)
    after = snapshot(model, tokenizer)
    assert changes(before, after) == []


def test_a_second_thread_waits_for_the_first():
    """And a call within a call does not."""
    tokenizer = tiny_tokenizer("char")
    model = tiny_causal_lm(num_hidden_layers=1).train()
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    order = []

    def second():
        with held(llm_attr):
            order.append("second")

    with held(llm_attr):
        thread = threading.Thread(target=second)
        thread.start()
        with held(llm_attr), nullcontext():
            order.append("inner")
        assert not model.training
        thread.join(timeout=0.1)
        assert thread.is_alive()
        order.append("first")
    thread.join()
    assert order == ["inner", "first", "second"]
    assert model.training
