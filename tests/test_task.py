"""What raw rows depend on, read from a prompt and a generated text."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    TextTemplateInput,
    TextTokenInput,
)

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.engines import register_engine
from captum_cage.engines.registry import _engines
from conftest import PROMPT, TARGET
from tiny import image_input


class Seen(FeatureAblation):
    """A method whose engine keeps its task."""


@pytest.fixture
def task_of(model, tokenizer, monkeypatch):
    """A function that gives the task of a question."""
    monkeypatch.setitem(_engines, Seen, None)
    tasks = []

    @register_engine(Seen)
    def rows(task, steps):
        tasks.append(task)
        return [np.zeros(task.width) for _ in steps]

    def ask(inp, target=TARGET, *, of=model, baseline="auto", **arguments):
        llm_attr = LLMAttribution(Seen(of), tokenizer)
        cage = GraphContextAttribution(llm_attr, generated_baseline=baseline)
        cage.attribute(inp, target, **arguments)
        return tasks[-1]

    return ask


@pytest.fixture
def inp(tokenizer):
    """A prompt of two sentences."""
    return TextTokenInput(PROMPT, tokenizer, skip_tokens=tokenizer.encode("."))


@pytest.mark.parametrize("units", ["token", "word", "sentence"])
def test_ranges_of_units_tile_the_generated_text(task_of, inp, units):
    """Without a gap, from the first token to the last."""
    task = task_of(inp, units=units)
    ranges = [task.range_of(step) for step in range(len(task.steps))]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == len(task.generated)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert task.width == len(task.sources) + len(ranges)


def test_units_of_tokens_count_sources_first(task_of, inp, tokenizer):
    """Skipped tokens have none; generated ones follow."""
    task = task_of(inp, units="sentence")
    units = task.unit_of_token()
    ids = [*task.prompt.ids, *task.generated]
    assert len(units) == len(ids)
    prompt = len(task.prompt.ids)
    skipped = [i for i in range(prompt) if ids[i] in tokenizer.encode(".")]
    assert skipped
    assert np.flatnonzero(units < 0).tolist() == skipped
    assert set(units[:prompt][units[:prompt] >= 0]) == set(range(len(task.sources)))
    assert units[prompt:].min() == len(task.sources)
    assert units[prompt:].max() == task.width - 1


def test_units_of_tokens_of_ids_in_groups(task_of, tokenizer):
    """The input's own groups are the sources."""
    ids = tokenizer.encode(PROMPT)
    groups = [i // 4 - 1 for i in range(len(ids))]
    task = task_of(TokenIdsInput(ids, tokenizer, feature_mask=groups), units="word")
    assert task.unit_of_token()[: len(ids)].tolist() == groups


def test_absent_tokens_have_the_ids_of_their_side(task_of, tokenizer):
    """The prompt's from its input, the generated text's from the wrapper."""
    inp = TextTokenInput("Ana has", tokenizer, baselines=5)
    assert task_of(inp, [7, 8, 9]).baseline_ids() == [5] * 5
    task = task_of(inp, [7, 8, 9], baseline=4)
    assert task.baseline == 4
    assert task.baseline_ids() == [5, 5, 4, 4, 4]
    ids = TokenIdsInput(tokenizer.encode("Ana has"), tokenizer, baselines=6)
    assert task_of(ids, [7, 8], baseline=4).baseline_ids() == [6, 6, 4, 4]


@pytest.mark.parametrize(
    ("kind", "reads_tokens", "by_token"),
    [("tokens", True, False), ("ids", True, False), ("template", False, False)],
)
def test_what_an_input_allows(task_of, tokenizer, inp, kind, reads_tokens, by_token):
    """Gradients need tokens."""
    inputs = {
        "tokens": inp,
        "ids": TokenIdsInput(tokenizer.encode(PROMPT), tokenizer),
        "template": TextTemplateInput("{} has 3.", ["Ana"]),
    }
    task = task_of(inputs[kind])
    assert (task.reads_tokens, task.by_token) == (reads_tokens, by_token)


def test_a_picture_is_scored_token_by_token(task_of, vision_model, tokenizer):
    """As its model's input is more than ids."""
    task = task_of(image_input(tokenizer), of=vision_model)
    assert task.by_token
    assert not task.reads_tokens


def test_the_input_of_a_row_has_the_units_before_it(task_of, inp):
    """All of them, or those before a step; the others are present for good."""
    task = task_of(inp, units="word")
    stop = task.range_of(3)[1]
    whole = task.prefixed_input(stop)
    before = task.prefixed_input(stop, step=2)
    assert whole.n_itp_features == len(task.sources) + 4
    assert before.n_itp_features == len(task.sources) + 2
    for made in (whole, before):
        ids = made.to_model_input()[0].tolist()
        assert ids == [*task.prompt.ids, *task.generated[:stop]]


def test_what_the_caller_asked_for_is_in_it(task_of, inp):
    """Batch size, progress and the method's own arguments."""
    task = task_of(inp, batch_size=3, show_progress=True, num_trials=2)
    assert (task.batch_size, task.show_progress) == (3, True)
    assert task.kwargs == {"num_trials": 2}
    plain = task_of(inp)
    assert (plain.batch_size, plain.show_progress, plain.kwargs) == (None, False, {})


def test_a_task_is_frozen_and_each_has_a_store_of_its_own(task_of, inp):
    """What one call kept is not another's."""
    one, other = task_of(inp), task_of(inp)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.batch_size = 4
    one.kept["mine"] = 1
    assert "mine" not in other.kept
