"""The proof that an engine equals the loop: it passes and fails where it should."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)

from captum_cage import GraphContextAttribution
from captum_cage.engines import Engine, register_engine
from captum_cage.engines.registry import _engines
from captum_cage.rows import loop_row
from captum_cage.testing import EngineReport, check_engine
from tiny import tiny_model

TEXT = " Mia has 7."


class Mine(FeatureAblation):
    """A downstream method."""


class MyDice(ShapleyValueSampling):
    """A downstream method that draws."""


@pytest.fixture
def registered(monkeypatch):
    """A function that registers an engine for a downstream method, for one test."""
    for method in (Mine, MyDice):
        monkeypatch.setitem(_engines, method, None)
    return register_engine


@pytest.fixture
def inp(tokenizer):
    """A prompt of five tokens."""
    return TextTokenInput("Ana has 3 pens.", tokenizer)


def changed_rows(change, step=2):
    """The loop's rows, one of which is changed."""

    def rows(task, steps):
        for number in steps:
            row = loop_row(task, number)
            yield change(row) if number == step else row

    return rows


@pytest.mark.parametrize(
    ("method", "kwargs"),
    [
        (FeatureAblation, {}),
        (LayerIntegratedGradients, {"n_steps": 3}),
        (LayerGradientXActivation, {}),
    ],
)
@pytest.mark.parametrize("units", ["token", "sentence"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_built_in_engines_pass(tokenizer, inp, method, kwargs, units, dtype):
    """By the precision of the model."""
    model = tiny_model(vocab_size=len(tokenizer), dtype=dtype)
    if method is FeatureAblation:
        llm_attr = LLMAttribution(method(model), tokenizer)
    else:
        layer = model.get_input_embeddings()
        llm_attr = LLMGradientAttribution(method(model, layer), tokenizer)
    allowed = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    report = check_engine(llm_attr, inp, TEXT, units=units, batch_size=3, **kwargs)
    assert report.allowed == allowed
    assert 0 <= report.difference <= allowed
    assert dataclasses.astuple(report) == (
        report.difference,
        allowed,
        report.row,
        report.unit,
    )


def test_the_report_says_where_the_largest_difference_is(
    registered, model, tokenizer, inp
):
    """In shares of the loop's largest entry."""

    def change(row):
        row[3] += 0.25 * largest[0]
        return row

    llm_attr = LLMAttribution(Mine(model), tokenizer)
    loop = GraphContextAttribution(llm_attr).attribute(inp, TEXT, strategy="loop")
    largest = [np.abs(loop.graph.rows).max()]
    registered(Mine, changed_rows(change))
    report = check_engine(llm_attr, inp, TEXT, tolerance=0.5)
    assert report == EngineReport(pytest.approx(0.25, abs=1e-6), 0.5, 2, 3)


def test_an_engine_that_is_wrong_is_named_with_the_place(
    registered, model, tokenizer, inp
):
    """Row and unit, both numbers, and by how much."""

    def change(row):
        row[1] += 1e-3
        return row

    registered(Mine, changed_rows(change))
    llm_attr = LLMAttribution(Mine(model), tokenizer)
    with pytest.raises(
        AssertionError,
        match=r"engine of Mine does not give .* row 2, unit 1, .* is not .* differ by "
        r"\S+ of the largest entry, and 1e-05 is allowed",
    ):
        check_engine(llm_attr, inp, TEXT)


def test_zeros_are_no_proof(registered, model, tokenizer, inp):
    """An engine that gives nothing where the loop gives something fails."""
    registered(Mine, lambda task, steps: [np.zeros(task.width) for _ in steps])
    with pytest.raises(AssertionError, match="engine of Mine does not give"):
        check_engine(LLMAttribution(Mine(model), tokenizer), inp, TEXT)


def test_rows_in_another_order_fail(registered, model, tokenizer, inp):
    """The rows of a text are not alike."""

    def rows(task, steps):
        found = [loop_row(task, step) for step in steps]
        found[2][: len(task.sources)] = found[1][: len(task.sources)]
        return found

    registered(Mine, rows)
    with pytest.raises(AssertionError, match="in row 2, unit"):
        check_engine(LLMAttribution(Mine(model), tokenizer), inp, TEXT)


def test_a_method_without_an_engine_proves_nothing(model, tokenizer, inp):
    """It is an error, not a pass."""

    class Other(FeatureAblation):
        pass

    with pytest.raises(ValueError, match="Other has no engine"):
        check_engine(LLMAttribution(Other(model), tokenizer), inp, TEXT)


@pytest.mark.parametrize(
    ("method", "kwargs"),
    [(ShapleyValueSampling, {"n_samples": 3}), (KernelShap, {"n_samples": 12})],
)
def test_means_of_random_rows_are_compared(model, tokenizer, method, kwargs):
    """In standard errors, over runs of different seeds."""
    inp = TextTemplateInput("{} has {}.", ["Ana", "3 pens"])
    llm_attr = LLMAttribution(method(model), tokenizer)
    report = check_engine(llm_attr, inp, " Mia has", units="word", repeats=12, **kwargs)
    assert report.allowed == 6.0
    assert 0 < report.difference < 6.0


def test_a_random_engine_with_another_mean_fails(registered, model, tokenizer):
    """However noisy its rows are."""
    sampled = _engines[ShapleyValueSampling].rows

    def rows(task, steps):
        for row in sampled(task, steps):
            row = np.array(row)
            row[0] *= 2
            yield row

    inp = TextTokenInput("Ana has", tokenizer)
    llm_attr = LLMAttribution(MyDice(model), tokenizer)
    registered(MyDice, Engine(sampled, by_row=False))
    arguments = {"repeats": 16, "n_samples": 8}
    check_engine(llm_attr, inp, " Mia has", **arguments)
    registered(MyDice, Engine(rows, by_row=False))
    with pytest.raises(
        AssertionError, match=r"unit 0, .* standard errors over 16 runs"
    ):
        check_engine(llm_attr, inp, " Mia has", **arguments)


def test_a_random_engine_needs_repeats(model, tokenizer):
    """Two single draws differ."""
    inp = TextTokenInput("Ana has", tokenizer)
    llm_attr = LLMAttribution(ShapleyValueSampling(model), tokenizer)
    with pytest.raises(AssertionError, match="of the largest entry"):
        check_engine(llm_attr, inp, " Mia has 7", n_samples=1)


@pytest.mark.parametrize("fails", [False, True])
def test_generators_are_left_as_they_were(registered, model, tokenizer, inp, fails):
    """Torch's and NumPy's, after success and failure."""
    before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    if fails:
        registered(Mine, lambda task, steps: [np.zeros(task.width) for _ in steps])
        with pytest.raises(AssertionError, match="engine of Mine"):
            check_engine(LLMAttribution(Mine(model), tokenizer), inp, TEXT)
    else:
        prompt = TextTokenInput("Ana has", tokenizer)
        llm_attr = LLMAttribution(ShapleyValueSampling(model), tokenizer)
        check_engine(llm_attr, prompt, " Mia", repeats=3, n_samples=2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002


def test_the_same_seed_gives_the_same_report(model, tokenizer):
    """Whatever was drawn before."""
    inp = TextTokenInput("Ana has", tokenizer)
    llm_attr = LLMAttribution(ShapleyValueSampling(model), tokenizer)
    arguments = {"repeats": 4, "n_samples": 2}
    reports = []
    for seed in (0, 0, 7):
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        reports.append(check_engine(llm_attr, inp, " Mia has", seed=seed, **arguments))
    assert reports[0] == reports[1] != reports[2]


def test_random_ways_do_not_agree_by_drawing_the_same(registered, model, tokenizer):
    """No run of the loop has a seed that a run of the engine has."""
    sampled = _engines[ShapleyValueSampling].rows
    seeds = {"fused": [], "loop": []}

    class Told(MyDice):
        @functools.wraps(MyDice.attribute)
        def attribute(self, *args, **kwargs):
            seeds["loop"].append(torch.initial_seed())
            return super().attribute(*args, **kwargs)

    def rows(task, steps):
        seeds["fused"].append(torch.initial_seed())
        return sampled(task, steps)

    registered(Told, rows)
    try:
        llm_attr = LLMAttribution(Told(model), tokenizer)
        inp = TextTokenInput("Ana has", tokenizer)
        check_engine(llm_attr, inp, " Mia", repeats=3, n_samples=2, seed=4)
    finally:
        del _engines[Told]
    assert sorted(set(seeds["fused"])) == [4, 5, 6]
    assert len(set(seeds["loop"])) == 3
    assert not set(seeds["loop"]) & set(seeds["fused"])


@pytest.mark.parametrize(
    ("repeats", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)]
)
def test_a_number_of_runs_is_one_or_more(model, tokenizer, inp, repeats, error):
    """With the remedy."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(error, match="repeats: "):
        check_engine(llm_attr, inp, TEXT, repeats=repeats)
