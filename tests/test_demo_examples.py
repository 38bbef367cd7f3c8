"""The demo model's problems, whose truth must win when texts are written again."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

from captum_cage import GraphAttributionResult, GraphContextAttribution
from captum_cage.demo import examples, load_demo, sample_problems
from captum_cage.demo.problems import KINDS
from captum_cage.metrics import Evaluation
from captum_cage.metrics.datasets import Example

VALUES = ("regenerated: deletion", "regenerated: insertion")


@cache
def demo() -> Any:
    """The demo model and its tokenizer, loaded once."""
    return load_demo()


@cache
def chosen() -> tuple[Example, ...]:
    """Both answers of some problems, of which the model guesses none without facts."""
    return examples(2, seed=1)


def explained(example: Example) -> GraphAttributionResult:
    """The answer, over sentences."""
    model, tokenizer = demo()
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    return cage.attribute(
        TextTokenInput(example.prompt, tokenizer),
        example.completion,
        units="sentence",
        explain=example.explain,
    )


@cache
def measured() -> tuple[Evaluation, ...]:
    """Each example: its truth and what is always measured."""
    found = []
    for number, example in enumerate(chosen()):
        result = explained(example)
        gold = example.gold_in(result)
        truth = np.isin(np.arange(result.graph.n_sources), gold).astype(float)
        found.append(
            result.evaluate(
                [*VALUES, "span: deletion", "auroc"],
                gold=gold,
                others={"truth": truth},
                sources=example.sources_in(result),
                statement=example.statement,
                removal="baseline",
                random_orders=2,
                seed=number,
            )
        )
    return tuple(found)


def mean(order: str, metric: str) -> float:
    """Over the examples."""
    return float(np.mean([one.scores[order][metric].value for one in measured()]))


# --- what they are -------------------------------------------------------------------


@pytest.mark.parametrize("split", ["held_out", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_is_one_for_each_answer(kind, split):
    """With the facts that it depends on, of the facts that there are."""
    problems = sample_problems(20, 3, kind, split=split)
    pairs = [(problem, answer) for problem in problems for answer in problem.answers]
    found = examples(20, 3, kind, split=split)
    assert len(found) == len(pairs)
    for example, (problem, answer) in zip(found, pairs, strict=True):
        assert example.prompt == problem.prompt
        assert example.completion == problem.completion
        assert example.explain == example.answer == answer.text
        assert example.completion.count(example.explain) == 1
        assert example.gold == answer.facts
        assert example.sources == problem.facts
        assert set(example.gold) < set(example.sources)
        assert example.kind == problem.kind
        for start, stop in example.sources:
            assert example.prompt[start:stop].endswith(".")


def test_two_questions_are_the_default():
    """Of problems that the model was never trained on; the seed says which."""
    assert examples(3) == examples(3, 0, "two_questions", split="held_out")
    assert len(examples(3)) == 6
    assert examples(3)[:2] == examples(1)
    assert examples(3) != examples(3, 1)
    assert examples(0) == ()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((-1,), "n: the number of problems"),
        ((1, 0, "three_questions"), "kind: must be one of"),
    ],
)
def test_bad_arguments_are_refused(arguments, match):
    """As the problems do."""
    with pytest.raises(ValueError, match=match):
        examples(*arguments)


# --- that they are true --------------------------------------------------------------


def test_the_model_writes_what_the_examples_say():
    """So that the statement is reached with all facts, and without them is not."""
    model, tokenizer = demo()
    for example, found in zip(chosen(), measured(), strict=True):
        ids = tokenizer(example.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            new = model.generate(ids, do_sample=False, max_new_tokens=80)
        text = tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
        assert text == example.completion
        assert (found.reached, found.reached_without) == (1.0, 0.0)
        assert found.statement == repr(example.explain)


def test_positions_of_the_facts_are_found():
    """Of gold and sources, in the result."""
    example = chosen()[0]
    result = explained(example)
    texts = [unit.text for unit in result.units]
    facts = [example.prompt[slice(*span)] for span in example.sources]
    gold = [example.prompt[slice(*span)] for span in example.gold]
    assert [texts[place] for place in example.sources_in(result)] == facts
    assert [texts[place] for place in example.gold_in(result)] == gold


@pytest.mark.parametrize("metric", VALUES)
def test_the_truth_wins_when_texts_are_written_again(metric):
    """Against a random order, the direct row, the whole response and the nearest."""
    sign = 1 if "insertion" in metric else -1
    for other in ("random", "direct", "sequence", "nearest"):
        assert sign * mean("truth", metric) > sign * mean(other, metric), other
    beaten = sum(one.beats(metric, order="truth") for one in measured())
    assert beaten >= len(measured()) - 1


@pytest.mark.parametrize("metric", [*VALUES, "auroc"])
def test_the_graph_beats_a_random_order(metric):
    """And the explained row alone, which sees no further than the last step."""
    sign = -1 if "deletion" in metric else 1
    for other in ("random", "direct"):
        assert sign * mean("result", metric) > sign * mean(other, metric), other


def test_with_the_text_held_fixed_the_truth_is_hidden():
    """An answer that is copied from a step does not need the facts any more."""
    lost = [
        one.curves["truth", "span"][0] - one.curves["truth", "span"][-1]
        for one in measured()
    ]
    assert max(lost) < 0.5
    assert min(one.reached - one.reached_without for one in measured()) == 1.0
