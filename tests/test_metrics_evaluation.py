"""Evaluations of results whose truth is known, against that truth and plain passes."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    RemoteLLMAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from torch import nn

from captum_cage import (
    ChatTokenInput,
    ChatTraceInput,
    GraphAttributionResult,
    GraphContextAttribution,
    TokenIdsInput,
)
from captum_cage.demo import load_demo
from captum_cage.demo.planted import PlantedCase, planted_cases, planted_model
from captum_cage.metrics import (
    COVERAGE,
    METRICS,
    Evaluation,
    Score,
    auroc,
    average_precision,
    coverage,
    metric_names,
    orders_of,
    recovery_at,
)
from captum_cage.metrics.scores import Probe
from tiny import ForwardOnly, LocalProvider, tiny_model, tiny_tokenizer

ORDERS = ("result", "direct", "sequence", "one hop", "nearest")
REGENERATED = [f"regenerated: {name}" for name in METRICS]


@pytest.fixture(autouse=True)
def unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No metric is marked; which ones are with the demo model is another matter."""
    monkeypatch.setattr("captum_cage.metrics.evaluation.untrusted", lambda *_: "")


@cache
def planted(kind: str) -> Any:
    """The model of a kind and its tokenizer, made once."""
    return planted_model(kind)


def case_of(kind: str, number: int = 0) -> PlantedCase:
    """A conversation of a kind."""
    return planted_cases(number + 1, 5, kind)[number]


@cache
def result_of(kind: str, number: int = 0) -> GraphAttributionResult:
    """The last sentence of a conversation, explained once."""
    model, tokenizer = planted(kind)
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    case = case_of(kind, number)
    inp = (
        ChatTokenInput(case.before, tokenizer, features="all")
        if kind == "chain"
        else ChatTraceInput(case.before, tokenizer)
    )
    return cage.attribute(inp, case.completion, units="sentence", explain=-1)


def truth_of(kind: str, number: int = 0) -> list[int]:
    """The sources that the explained sentence depends on, on any path."""
    case = case_of(kind, number)
    origins = case.origins(case.explained)
    return [case.sources.index(origin) for origin in origins]


def indicator(places: list[int], size: int) -> Any:
    """One at some places, nothing elsewhere."""
    return np.isin(np.arange(size), places).astype(float)


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """The texts that a model continues, and those that it is given."""
    found: dict[str, list[tuple[int, ...]]] = {"written": [], "passed": []}
    plain = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        if "output_logits" not in kwargs:  # a trial of the batches, no text of its own
            rows = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
            found["written"] += [tuple(ids[mask > 0].tolist()) for ids, mask in rows]
        handle.remove()
        try:
            return plain(*args, **kwargs)
        finally:
            listen()

    def note(_: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        found["passed"] += [tuple(row) for row in ids.tolist()]

    def listen() -> None:
        nonlocal handle
        handle = model.model.register_forward_pre_hook(note, with_kwargs=True)

    handle = None
    listen()
    model.generate = generate
    try:
        yield found
    finally:
        handle.remove()
        del model.generate


def sets_of(scores: Any, kinds: tuple[str, ...] = ("deletion",)) -> set[frozenset[int]]:
    """The sets of kept sources along a curve, one source at a time."""
    tie = np.random.default_rng(0).permutation(len(scores)).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], tie[i]))
    found = set()
    for count in range(len(order) + 1):
        if "deletion" in kinds:
            found.add(frozenset(order[count:]))
        if "insertion" in kinds:
            found.add(frozenset(order[:count]))
    return found


# --- what is true --------------------------------------------------------------------


class TestTruth:
    """On models whose weights are written down, what is measured is known."""

    @pytest.mark.parametrize("number", range(3))
    def test_the_table_is_that_of_the_known_game(self, number):
        """The answer comes out again if and only if the code is there."""
        result, (code,) = result_of("chain", number), truth_of("chain", number)
        size = result.graph.n_sources
        found = result.evaluate("regenerated", top=2, seed=3, removal="baseline")
        expected = {
            "result": result.seq_attr.numpy(),
            "direct": result.direct.seq_attr.numpy(),
            "sequence": result.sequence.seq_attr.numpy(),
            "one hop": np.asarray(result.graph.hops(result.weights, 1).attr),
            "nearest": np.sort(result.seq_attr.numpy()) + 1e-12 * np.arange(size),
        }
        assert list(found.scores) == [*expected, "random"]
        assert list(found.metrics) == REGENERATED
        for order, scores in expected.items():
            probe = Probe(
                np.array(scores, dtype=float),
                np.ones(size),
                lambda kept: kept[:, code : code + 1].astype(float),
                is_log=False,
                top=2,
                seed=3,
            )
            for name, metric in METRICS.items():
                score = found.scores[order][f"regenerated: {name}"]
                assert str(score) == str(metric.function(probe)), (order, name)
            curve = found.curves[order, "regenerated"]
            assert curve.tolist() == probe.deletion[:, 0].tolist()
        assert (found.reached, found.reached_without) == (1.0, 0.0)

    @pytest.mark.parametrize(
        ("kind", "removal"),
        [
            *((kind, "baseline") for kind in ("chain", "trace", "override")),
            ("chain", "suppress"),
            ("trace", "delete"),
        ],
    )
    def test_the_truth_and_the_graph_beat_random_orders(self, kind, removal):
        """When texts are written again, by every metric and removal."""
        result = result_of(kind, 1)
        truth = indicator(truth_of(kind, 1), result.graph.n_sources)
        found = result.evaluate(
            "regenerated",
            others={"truth": truth},
            top=1,
            masks=16,
            random_orders=3,
            removal=removal,
            seed=1,
        )
        assert found.removal == removal
        for name in REGENERATED:
            assert found.beats(name, order="truth"), name
            assert found.beats(name), name
            if name not in ("regenerated: mas", "regenerated: infidelity"):  # of size
                own = found.scores["result"][name].value
                assert own == pytest.approx(found.scores["truth"][name].value), name

    def test_the_steps_hide_the_truth_from_the_direct_row(self):
        """The answer copies a step: with the text held fixed, no source matters."""
        result, truth = result_of("chain"), truth_of("chain")
        others = {"truth": indicator(truth, result.graph.n_sources)}
        found = result.evaluate(
            ["regenerated: deletion", "span: necessity", "response: necessity"],
            others=others,
            top=1,
        )
        assert found.beats("regenerated: deletion", "direct", order="truth")
        assert found.scores["truth"]["span: necessity"].value < 0.1
        assert found.scores["truth"]["response: necessity"].value > 4.0


class TestFixedText:
    """With the text held fixed, curves are those of plain passes."""

    @staticmethod
    def score(ids: list[int], first: int, places: range) -> float:
        """Log-probability of some tokens of a text, counted from its completion."""
        model, _ = planted("chain")
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(
            float(logs[first + place - 1, ids[first + place]]) for place in places
        )

    def test_the_explained_text_or_all_of_it_is_scored(self):
        """Without its sources, one more each time."""
        result, case = result_of("chain"), case_of("chain")
        _, tokenizer = planted("chain")
        found = result.evaluate(["span: rise", "response: rise"])
        read = tokenizer(case.text, return_offsets_mapping=True)
        ids, offsets = read["input_ids"][:-1], read["offset_mapping"]
        written = range(18)
        tie = np.random.default_rng(0).permutation(result.graph.n_sources).tolist()
        scores = result.seq_attr.tolist()
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], tie[i]))
        gone: set[int] = set()
        for count in range(len(order) + 1):
            left = [one for place, one in enumerate(ids) if place not in gone]
            first = len(left) - len(written)
            span = self.score(left, first, written[-6:])
            whole = self.score(left, first, written)
            assert found.curves["result", "span"][count] == pytest.approx(
                span, abs=1e-4
            )
            assert found.curves["result", "response"][count] == pytest.approx(
                whole, abs=1e-4
            )
            if count < len(order):
                start, stop = case.span(case.sources[order[count]])
                gone |= {
                    place
                    for place, (a, b) in enumerate(offsets)
                    if start < b <= stop and a < stop
                }

    def test_the_statement_is_not_asked_for(self):
        """One that no text of the model holds does no harm where none is written."""
        found = result_of("chain").evaluate("span: rise")
        assert found.statement == ""
        assert math.isnan(found.reached)
        assert math.isnan(found.reached_without)
        assert "come out" not in str(found)


# --- what it costs -------------------------------------------------------------------


class TestCost:
    """The model is asked once for each set of sources."""

    def test_each_set_is_written_once(self):
        """However many attributions and metrics need it."""
        result, (model, _) = result_of("chain"), planted("chain")
        tested = result.evaluator(random_orders=1)
        orders = orders_of(result)
        assert tuple(orders) == ORDERS
        names = [f"regenerated: {name}" for name in ("deletion", "insertion", "rise")]
        kinds = ("deletion", "insertion")
        sure = set.union(*(sets_of(scores, kinds) for scores in orders.values()))
        with counting(model) as asked:
            found = tested.evaluate(result, names)
        written = asked["written"]
        assert len(set(written)) == len(written)
        # One random order brings no more than its own sets.
        assert len(sure) <= len(written) <= len(sure) + 2 * 7
        assert found.sequences == tested.sequences == len(written)
        assert not asked["passed"]
        with counting(model) as asked:
            again = tested.evaluate(result, [*names, "regenerated: mas"])
            assert again.scores["result"][names[0]] == found.scores["result"][names[0]]
            tested.evaluate({"other": [3, 1, 6, 2, 5, 4]}, names)
        extra = sets_of([3, 1, 6, 2, 5, 4], kinds) - sure
        assert 0 < len(asked["written"]) <= len(extra)
        assert not set(asked["written"]) & set(written)

    def test_each_set_is_scored_once_for_two_values(self):
        """The explained text and all of it are read off the same pass."""
        result, (model, _) = result_of("chain", 1), planted("chain")
        tested = result.evaluator(random_orders=2)
        with counting(model) as asked:
            found = tested.evaluate(result, ["span: rise", "response: mas"])
        passed = [ids for ids in asked["passed"] if any(ids)]
        assert not asked["written"]
        assert found.sequences == len(passed)
        assert len({tuple(i for i in ids if i) for ids in passed}) == len(passed)
        sure = set.union(*map(sets_of, orders_of(result).values()))
        assert len(sure) <= len(passed) <= len(sure) + 2 * 5

    def test_samples_are_written_for_each_set(self):
        """As many as asked for, and no set twice."""
        result, (model, _) = result_of("chain"), planted("chain")
        with counting(model) as asked:
            found = result.evaluate("regenerated: deletion", samples=3, random_orders=1)
        texts = asked["written"]
        assert all(texts.count(text) == 3 for text in texts)
        assert found.sequences == len(texts)

    def test_all_orders_are_asked_together(self):
        """Texts of one length are one batch, of any attribution."""
        result, (model, _) = result_of("chain"), planted("chain")
        calls = []
        plain = model.generate
        model.generate = lambda **given: (
            calls.append(given["input_ids"].shape) or plain(**given)
        )
        try:
            result.evaluate("regenerated: deletion", removal="baseline")
            assert len(calls) == 1
            result.evaluate("regenerated: deletion", removal="baseline", batch_size=4)
        finally:
            del model.generate
        assert {shape[0] for shape in calls[1:-1]} == {4}
        assert sum(shape[0] for shape in calls[1:]) == calls[0][0]


# --- what may be asked ---------------------------------------------------------------


class TestSources:
    """Only some may be taken away."""

    def test_the_others_always_stay(self):
        """In every text that the model gets."""
        result, (model, tokenizer) = result_of("chain"), planted("chain")
        chosen = [4, 1, 2]
        tested = result.evaluator(sources=chosen)
        with counting(model) as asked:
            found = tested.evaluate(result, "regenerated: deletion")
        texts = [tokenizer.decode(ids) for ids in asked["written"]]
        assert len(texts) == 2**3  # all sets
        for place, unit in enumerate(result.units[:6]):
            there = [unit.text in text for text in texts]
            assert all(there) == (place not in chosen)
        assert len(found.curves["result", "regenerated"]) == 4

    def test_scores_may_be_of_all_or_of_those(self):
        """In the order of their positions."""
        result = result_of("chain")
        tested = result.evaluator(sources=[4, 1, 2])
        scores = {"all": [9, 5, 3, 9, 4, 9], "those": [5, 3, 4]}
        found = tested.evaluate(scores, "regenerated")
        assert found.scores["all"] == found.scores["those"]
        assert found.curves["all", "regenerated"].tolist() == [1, 0, 0, 0]


class TestOthers:
    """Scores from elsewhere are measured beside the result's own."""

    def test_they_are_rows_of_the_table(self):
        """As tensors, arrays or lists."""
        result = result_of("override")
        given = result.seq_attr
        others = {"tensor": given, "array": given.numpy(), "list": given.tolist()}
        found = result.evaluate("regenerated: mas", others=others)
        assert list(found.scores) == [*ORDERS, *others, "random"]
        for name in others:
            assert found.scores[name] == found.scores["result"]

    @pytest.mark.parametrize("name", ["result", "nearest", "random"])
    def test_names_are_taken_once(self, name):
        """No attribution hides another."""
        with pytest.raises(ValueError, match=f"orders: must have names.*'{name}' came"):
            result_of("chain").evaluate(others={name: range(6)})

    def test_random_is_a_name_of_its_own(self):
        """Also where no result is tested."""
        tested = result_of("chain").evaluator()
        with pytest.raises(ValueError, match=r"orders: .*'random' came"):
            tested.evaluate({"random": range(6)})


class TestGold:
    """Sources that are known to matter."""

    def test_metrics_of_known_truth_are_added(self):
        """To the default ones, and each is the function of its name."""
        result = result_of("chain")
        plain = result.evaluate()
        found = result.evaluate(gold=[1, np.int64(3)], random_orders=1)
        functions = {
            "auroc": auroc,
            "average precision": average_precision,
            "recovery": recovery_at,
        }
        truth = [*functions, *COVERAGE]
        assert list(found.metrics) == [*plain.metrics, *truth]
        for order, scores in orders_of(result).items():
            for name, function in functions.items():
                score = found.scores[order][name]
                assert score.value == function(scores, [1, 3])
                assert math.isnan(score.standard_error)
            for name, bounds in COVERAGE.items():
                score = found.scores[order][name]
                assert score.value == coverage(scores, [1, 3], bounds)

    def test_they_need_no_model(self):
        """If nothing else is asked for."""
        result, (model, _) = result_of("chain"), planted("chain")
        with counting(model) as asked:
            found = result.evaluate(["auroc"], gold=truth_of("chain"))
        assert not asked["written"]
        assert not asked["passed"]
        assert found.scores["result"]["auroc"].value == 1.0
        assert found.sequences == 0

    def test_ranges_of_characters_are_positions(self):
        """All sources that they touch, in the source text."""
        result = result_of("chain")
        spans = [unit.span for unit in result.units[:6]]
        (start, stop), (after, _) = spans[1], spans[2]
        truth = ["auroc", "recovery"]
        by_place = result.evaluate(truth, gold=[1, 2, 5]).scores
        for ranges in (
            [spans[1], spans[2], spans[5]],
            [(stop - 1, after + 1), (spans[5][0], 10_000)],
            [(start, after + 3), 5],
        ):
            assert result.evaluate(truth, gold=ranges).scores == by_place

    def test_ranges_are_of_the_source_text_alone(self):
        """Not of what a tool said after it, which has a text of its own."""
        result = result_of("override")
        tool = result.units[9]
        assert not tool.generated
        at = result.source_text.find(tool.text)
        assert at < 0
        inside = [
            place
            for place, unit in enumerate(result.units[:8])
            if unit.span[0] < tool.span[1] and tool.span[0] < unit.span[1]
        ]
        assert inside
        by_range = result.evaluate(["auroc", "recovery"], gold=[tool.span])
        by_place = result.evaluate(["auroc", "recovery"], gold=inside)
        assert by_range.scores == by_place.scores

    def test_positions_are_among_all_sources(self):
        """Also where only some may be taken away."""
        result = result_of("chain")
        scores = {"mine": [0.0, 5.0, 1.0, 0.0, 2.0, 0.0]}
        tested = result.evaluator(sources=[1, 2, 4])
        found = tested.evaluate(scores, ["auroc", "recovery"], gold=[4, 1])
        assert found.scores["mine"]["auroc"].value == auroc([5, 1, 2], [0, 2]) == 1.0
        assert found.scores["mine"]["recovery"].value == 1.0


class TestStatements:
    """What must come out again."""

    @pytest.mark.parametrize(
        ("statement", "about", "told"),
        [
            (None, "code", "'Thus the safe is teal.'"),
            ("safe is teal", "code", "'safe is teal'"),
            ("the gate is blue", "lamp", "'the gate is blue'"),
            (re.compile(r"gate is (\w+)"), "lamp", r"the pattern /gate is (\w+)/"),
            (lambda text: "gate is blue" in text, "lamp", "the function <lambda>"),
            (lambda text: text.split()[4:5], "code", "the function <lambda>"),
        ],
    )
    def test_it_may_be_a_text_a_pattern_or_a_function(self, statement, about, told):
        """The sources of what it says are those that matter."""
        result = result_of("chain")
        texts = [unit.text for unit in result.units[:6]]
        (place,) = (i for i, text in enumerate(texts) if about in text)
        others = {"truth": indicator([place], 6)}
        found = result.evaluate(
            "regenerated: deletion", others=others, statement=statement
        )
        assert found.statement == told
        curve = found.curves["truth", "regenerated"].tolist()
        assert curve == [1.0] + [0.0] * 6
        assert result.evaluator(statement=statement).statement == told

    def test_a_share_counts_as_it_is(self):
        """A function may say how much of it is there."""
        result = result_of("chain")

        def half(text: str) -> float:
            return ("is teal" in text) / 2 + ("is blue" in text) / 4

        found = result.evaluate(
            "regenerated: deletion",
            others={"truth": [0, 2, 1, 0, 0, 0]},
            statement=half,
        )
        assert found.reached == 0.75
        curve = found.curves["truth", "regenerated"].tolist()
        assert curve == [0.75, 0.25] + [0.0] * 5

    def test_what_always_comes_out_tells_nothing(self):
        """That is warned of, and noted."""
        with pytest.warns(UserWarning, match="says nothing here"):
            found = result_of("chain").evaluate(
                "regenerated: deletion",
                statement="Also the gate is",
                removal="baseline",
            )
        assert (found.reached, found.reached_without) == (1.0, 1.0)
        assert found.notes[0] == (
            "With all sources the model comes to 'Also the gate is' in 100% of its "
            "texts, without them in 100%: what is written again says nothing here."
        )


class TestOptions:
    """Samples, seeds, axes and features."""

    def test_the_seed_gives_the_same_numbers(self):
        """Samples, random sets, random orders and ties; another gives others."""
        result = result_of("chain")
        names = ["regenerated: deletion", "regenerated: lds", "regenerated: infidelity"]
        one, same, other = (
            result.evaluate(names, samples=4, seed=seed, masks=8).to_dict()
            for seed in (2, 2, 3)
        )
        assert one == same
        assert one["seed"] == 2
        assert other["scores"]["random"] != one["scores"]["random"]
        assert other["scores"]["result"] != one["scores"]["result"]

    def test_errors_come_of_samples_and_of_random_orders(self):
        """There are none where there is but one."""
        result = result_of("chain")
        name = "regenerated: deletion"
        one = result.evaluate(name, random_orders=1)
        assert math.isnan(one.scores["result"][name].standard_error)
        assert math.isnan(one.scores["random"][name].standard_error)
        many = result.evaluate(name, samples=8, random_orders=4, seed=2)
        assert many.scores["result"][name].standard_error > 0.0
        assert many.scores["random"][name].standard_error > 0.0
        assert 0.0 < many.reached < 1.0

    def test_random_is_the_mean_of_several_orders(self):
        """Over all orders, the truth is first as often as last."""
        result = result_of("chain")
        size = result.graph.n_sources
        found = result.evaluate(
            "regenerated: deletion", random_orders=400, removal="baseline"
        )
        score = found.scores["random"]["regenerated: deletion"]
        # The code goes as number 1 to P, and as many points are above the curve.
        areas = [(number - 0.5) / size for number in range(1, size + 1)]
        error = np.std(areas) / math.sqrt(400)
        assert score.standard_error == pytest.approx(error, rel=0.1)
        assert abs(score.value - 0.5) < 4 * error

    def test_other_seeds_draw_other_random_orders(self):
        """The same one the same, where nothing else is drawn."""
        name = "regenerated: deletion"
        first, second, *others = (
            result_of("chain")
            .evaluate(name, random_orders=1, removal="baseline", seed=seed)
            .scores["random"][name]
            .value
            for seed in (0, 0, 1, 2, 3, 4)
        )
        assert first == second
        assert len({first, *others}) > 1

    def test_curves_may_run_over_tokens(self):
        """Then a long source takes as much room as it has tokens."""
        model, tokenizer = load_demo()
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TextTokenInput("Ana has 3 pens. Mia has 4 more pens than Ana.", tokenizer)
        result = cage.attribute(inp, " Mia has 7 pens.", units="sentence")
        scores = {"last": [1, 2]}
        for axis, middle in (("units", 0.5), ("tokens", 8 / 13)):
            found = result.evaluator(axis=axis).evaluate(scores, "span: deletion")
            assert found.places["last"] == pytest.approx([0.0, middle, 1.0])
            heights = found.curves["last", "span"]
            expected = middle * (heights[0] + heights[1]) / 2
            expected += (1 - middle) * (heights[1] + heights[2]) / 2
            score = found.scores["last"]["span: deletion"]
            assert score.value == pytest.approx(expected)

    def test_features_that_are_no_tokens_are_replaced(self, model, tokenizer):
        """By their baselines, as no other way applies to them."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        ids = model.generate(
            torch.tensor([tokenizer.encode("Ana has 3 pens.")]),
            max_new_tokens=4,
            do_sample=False,
        )[0, -4:].tolist()
        result = cage.attribute(inp, ids, explain=-1)
        with counting(model) as asked:
            found = result.evaluate("span: rise")
        assert found.removal == "baseline"
        assert sorted(found.curves) == [(name, "span") for name in sorted(ORDERS)]
        texts = {tokenizer.decode(list(ids)) for ids in asked["passed"]}
        assert any(text.startswith("Ana has 3 .") for text in texts)
        assert any(text.startswith(" has 3 pens.") for text in texts)

    def test_options_of_generate_are_passed_on(self):
        """Such as the number of new tokens."""
        found = result_of("chain").evaluate(
            "regenerated: deletion",
            statement="So the key is teal.",
            gen_args={"max_new_tokens": 6},
        )
        assert found.reached == 1.0
        with pytest.warns(UserWarning, match="in 0% of its texts"):
            result_of("chain").evaluate(
                "regenerated: deletion", gen_args={"max_new_tokens": 6}
            )


# --- what is told --------------------------------------------------------------------


@cache
def evaluated() -> Evaluation:
    """An evaluation with a bit of everything."""
    names = ["regenerated: deletion", "regenerated: lds", "span: rise", "auroc"]
    return result_of("chain").evaluate(names, gold=truth_of("chain"))


def test_names_are_values_with_metrics_and_truths():
    """Each once."""
    names = metric_names()
    assert len(set(names)) == len(names) == 4 * len(METRICS) + 6
    assert set(REGENERATED) < set(names)
    assert {"auroc", "average precision", "recovery", *COVERAGE} < set(names)


class TestTold:
    """Tables, notes, and JSON."""

    def test_the_table_has_every_score_once(self):
        """A row for each attribution, with arrows that say which way is better."""
        head, rule, *rows = evaluated().to_markdown().splitlines()
        assert head == (
            "| order | regenerated: deletion ↓ | regenerated: lds ↑ | span: rise ↓ "
            "| auroc ↑ |"
        )
        assert rule == "|---|---:|---:|---:|---:|"
        assert len(rows) == 6
        for row, (order, scores) in zip(rows, evaluated().scores.items(), strict=True):
            cells = [cell.strip() for cell in row.strip("|").split(" | ")]
            assert cells == [order, *map(str, scores.values())]

    def test_the_text_says_how_and_what(self):
        """Removal, statement, table and notes."""
        text = str(evaluated())
        assert text.startswith(
            "Sources were taken away by 'delete'. What had to come out again: "
            "'Thus the safe is teal.'.\n\n| order |"
        )
        assert evaluated().to_markdown() in text
        assert text.endswith("\n".join(evaluated().notes))

    def test_notes_say_what_does_not_beat_random(self):
        """Of each attribution but random and the nearest, with all the metrics."""
        found = evaluated()
        expected = []
        for order in ORDERS[:-1]:
            lost = []
            for name, info in found.metrics.items():
                own = found.scores[order][name].value
                random = found.scores["random"][name].value
                if own == random or (own > random) != info.higher_is_better:
                    lost.append(name)
            if lost:
                names = ", ".join(lost)
                expected.append(f"{order!r} does not beat a random order by {names}.")
        assert list(found.notes) == expected
        assert any(note.startswith("'direct'") for note in expected)
        assert not any(note.startswith("'result'") for note in expected)

    @pytest.mark.parametrize(
        ("own", "other", "higher", "beats"),
        [
            (2.0, 1.0, True, True),
            (2.0, 1.0, False, False),
            (1.0, 2.0, False, True),
            (1.0, 1.0, True, False),
            (1.0, 1.0, False, False),
            (0.1 + 0.2, 0.3, True, False),  # they differ by rounding
            (math.nan, 1.0, True, False),
        ],
    )
    def test_a_tie_beats_nothing(self, own, other, higher, beats):
        """Better is strictly better, whichever way that is."""
        name = "regenerated: lds" if higher else "span: rise"
        found = evaluated()
        found = Evaluation(
            {"result": {name: Score(own)}, "random": {name: Score(other)}},
            {name: found.metrics[name]},
            *(found.statement, found.removal, 1.0, 0.0, {}, {}, {}, 0, 0),
        )
        assert found.beats(name) is beats
        assert bool(found.notes) is not beats

    def test_curves_of_four_kinds_are_two_of_them(self):
        """What is lost, and what is held, are measured from all sources."""
        found = result_of("chain", 0).evaluate(
            ["regenerated: deletion", "regenerated: insertion"], removal="baseline"
        )
        key = ("result", "regenerated")
        going, coming = found.curves[key], found.insertions[key]
        assert found.curve("deletion").tolist() == going.tolist()
        assert found.curve("insertion").tolist() == coming.tolist()
        assert found.curve("necessity").tolist() == (1.0 - going).tolist()
        assert found.curve("sufficiency").tolist() == (coming - 1.0).tolist()
        assert (going[0], going[-1], coming[0], coming[-1]) == (1, 0, 0, 1)
        with pytest.raises(ValueError, match=r"curve: .* Evaluate 'span: insertion'"):
            found.curve("sufficiency", "span")
        with pytest.raises(ValueError, match="kind: must be one of"):
            found.curve("area")

    def test_everything_is_json(self):
        """Without numbers that JSON does not have."""
        found = evaluated()
        told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        for name in ("statement", "removal", "reached", "sequences", "seed"):
            assert told[name] == getattr(found, name)
        for order, scores in found.scores.items():
            for name, score in scores.items():
                value, error = told["scores"][order][name]
                assert value == score.value
                assert error == (
                    None if math.isnan(score.standard_error) else score.standard_error
                )
        curves = {(one["order"], one["value"]): one["values"] for one in told["curves"]}
        assert curves == {key: curve.tolist() for key, curve in found.curves.items()}
        assert told["places"] == {key: at.tolist() for key, at in found.places.items()}
        assert told["notes"] == list(found.notes)
        for name, info in found.metrics.items():
            assert told["metrics"][name]["higher_is_better"] is info.higher_is_better
            assert told["metrics"][name]["shows"] == info.shows
        fixed = result_of("chain").evaluate("span: rise").to_dict()
        assert fixed["reached"] is None
        json.dumps(fixed, allow_nan=False)

    def test_each_metric_says_what_it_shows(self):
        """Where the value does, and where the truth is known."""
        for name, info in evaluated().metrics.items():
            assert info.name == name
            assert info.summary
            assert info.shows
            assert info.source
        assert "total effect" in evaluated().metrics["regenerated: lds"].shows
        assert "direct effect" in evaluated().metrics["span: rise"].shows


# --- refusals ------------------------------------------------------------------------


class TestRefusals:
    """What cannot be measured is refused by name, before any model call."""

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"metrics": "deletion"}, ValueError, "metrics: must be one of 'regen"),
            ({"metrics": ["span: rice"]}, ValueError, "metrics: must be one of"),
            ({"metrics": []}, ValueError, "metrics: must name a metric"),
            ({"metrics": "auroc"}, ValueError, "metrics: 'auroc' needs known truth"),
            ({"gold": []}, ValueError, "gold: must be sources .* none came"),
            ({"gold": [6]}, ValueError, "gold: must be .* less than 6"),
            ({"gold": [True]}, TypeError, "gold: must be a whole number"),
            ({"gold": [1.0]}, TypeError, "gold: must be a whole number"),
            ({"gold": range(6)}, ValueError, "gold: must leave a unit"),
            ({"gold": [(0, 1)]}, ValueError, "gold: a range must hold a source"),
            ({"gold": [(0, 5, 9)]}, ValueError, "gold: a range must be a pair"),
            ({"gold": [(0.5, 9)]}, TypeError, "gold: must be a whole number"),
            (
                {"gold": [1], "sources": [2, 3]},
                ValueError,
                r"gold: must be .* sources \[1\] are not among them",
            ),
            ({"others": {"x": [1, 2]}}, ValueError, r"orders\['x'\]: must have shape"),
            ({"others": {"x": "abc"}}, TypeError, r"orders\['x'\]: must be real"),
            ({"others": {"x": [[1], [1, 2]]}}, TypeError, r"orders\['x'\]: must be"),
            (
                {"others": {"x": [0, 0, math.nan, 0, 0, 0]}},
                ValueError,
                r"orders\['x'\]: every entry must be finite",
            ),
            ({"sources": []}, ValueError, "sources: must name at least one"),
            ({"sources": [1, 1]}, ValueError, "sources: must .* each once"),
            ({"sources": [6]}, ValueError, "sources: must be at least 0"),
            ({"statement": 7}, TypeError, "statement: must be a text"),
            ({"statement": "it is red"}, ValueError, "statement: must hold of"),
            ({"removal": "drop"}, ValueError, "removal: must be one of 'delete'"),
            ({"removal": 1}, TypeError, "removal: must be a name"),
            ({"samples": 0}, ValueError, "samples: must be 1 or more"),
            ({"samples": 1.5}, TypeError, "samples: must be a whole number"),
            ({"seed": -1}, ValueError, "seed: must be 0 or more"),
            ({"temperature": 0.0}, ValueError, "temperature: must be a finite"),
            ({"temperature": "hot"}, ValueError, "temperature: must be a finite"),
            ({"axis": "words"}, ValueError, "axis: must be one of 'units'"),
            ({"top": 0}, ValueError, "top: must be at least 1"),
            ({"top": 7}, ValueError, "top: must be .* less than 7"),
            ({"top": 3, "sources": [0, 1]}, ValueError, "top: must be .* less than 3"),
            ({"masks": 2}, ValueError, "masks: must be 3 or more"),
            ({"random_orders": 0}, ValueError, "random_orders: must be 1 or more"),
            ({"batch_size": 0}, ValueError, "batch_size: must be 1 or more"),
            (
                {
                    "metrics": ["span: rise", "regenerated: rise"],
                    "gen_args": {"top_k": 1},
                },
                ValueError,
                "gen_args: must leave .* top_k came",
            ),
            ({"samlpes": 2}, TypeError, "unexpected keyword argument 'samlpes'"),
        ],
    )
    def test_arguments_are_checked(self, options, error, match):
        """Each by its name."""
        result, (model, _) = result_of("chain"), planted("chain")
        with counting(model) as asked, pytest.raises(error, match=match):
            result.evaluate(**options)
        assert not asked["written"]
        assert not asked["passed"]

    def test_a_statement_is_checked_before_texts_are_scored(self, model, tokenizer):
        """An explained text of nothing but white space can not come out again."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TokenIdsInput(tokenizer.encode("Ana has 3 pens."), tokenizer)
        target = tokenizer.encode(" So  ", add_special_tokens=False)
        result = cage.attribute(inp, target, units="token", explain=-1)
        with (
            counting(model) as asked,
            pytest.raises(
                ValueError, match="what is explained is white space or special tokens"
            ),
        ):
            result.evaluate(["span: rise", "regenerated: rise"])
        assert not asked["passed"]

    def test_a_result_without_its_model_is_refused(self, tmp_path):
        """Loaded from a file, or copied to another process."""
        result = result_of("chain")
        result.save(tmp_path / "result.npz")
        loaded = GraphAttributionResult.load(tmp_path / "result.npz")
        for one in (loaded, pickle.loads(pickle.dumps(result))):
            for ask in ("evaluate", "evaluator"):
                with pytest.raises(ValueError, match="evaluate: must ask the model"):
                    getattr(one, ask)()

    def test_a_model_that_cannot_generate_is_refused(self, model, tokenizer):
        """Unless the text stays as it is."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(ForwardOnly(model)), tokenizer)
        )
        inp = TokenIdsInput(tokenizer.encode("Ana has 3."), tokenizer)
        target = tokenizer.encode(" So she", add_special_tokens=False)
        result = cage.attribute(inp, target, explain=-1)
        with (
            counting(model) as asked,
            pytest.raises(TypeError, match="ForwardOnly came, which has no generate"),
        ):
            result.evaluate(["span: rise", "regenerated: rise"])
        assert not asked["passed"]
        assert result.evaluate("span: rise").sequences > 0

    def test_a_remote_model_has_no_probability(self, model, tokenizer):
        """It can only be asked for texts and for scores of texts."""
        provider = LocalProvider(model, tokenizer)
        remote = RemoteLLMAttribution(
            FeatureAblation(RemoteLLMAttribution.placeholder_model),
            tokenizer,
            provider,
        )
        result = GraphContextAttribution(remote).attribute(
            TextTokenInput("Ana has 3.", tokenizer), " So she has", units="word"
        )
        before = len(provider.prompts)
        with pytest.raises(TypeError, match="'probability' needs the model itself"):
            result.evaluate(["span: rise", "probability: rise"])
        assert len(provider.prompts) == before


def test_everything_is_left_as_it_was(tokenizer):
    """Random numbers, training mode, hooks, parameters and settings."""
    model = tiny_model("gpt2", vocab_size=len(tokenizer))
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    inp = TokenIdsInput(tokenizer.encode("Ana has 3 pens."), tokenizer)
    ids = model.generate(inp.inp_tensor, max_new_tokens=3, do_sample=False)[0, -3:]
    result = cage.attribute(inp, ids.tolist(), explain=-1)
    names = ["regenerated: deletion", "probability: rise", "span: lds"]
    options: dict[str, Any] = {"statement": lambda _: True}
    model.train()  # with dropout
    model.transformer.h[0].eval()

    def state() -> Any:
        return (
            [module.training for module in model.modules()],
            [len(module._forward_pre_hooks) for module in model.modules()],
            [len(module._forward_hooks) for module in model.modules()],
            [(p.requires_grad, p.grad, p._version) for p in model.parameters()],
            model.generation_config.to_dict(),
            model.config.to_dict(),
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            random.getstate(),
            result.to_dict(),
        )

    torch.manual_seed(1)
    before = state()
    with pytest.warns(UserWarning, match="says nothing here"):
        one = result.evaluate(names, samples=2, **options).to_dict()
    assert state() == before
    torch.manual_seed(99)
    with pytest.warns(UserWarning, match="says nothing here"):
        assert result.evaluate(names, samples=2, **options).to_dict() == one


class TestTexts:
    """What is taken away and what must come out again, by the text itself."""

    def test_special_tokens_stay(self):
        """A text without its first token is another kind of text to the model."""
        tokenizer = tiny_tokenizer("sentencepiece")
        model = tiny_model(vocab_size=len(tokenizer))
        inp = TextTokenInput("Ana has 3 pens. Mia has 4.", tokenizer)
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        result = cage.attribute(inp, "Ana has 3.", units="sentence")
        assert [unit.special for unit in result.units[:3]] == [True, False, False]
        with counting(model) as asked:
            result.evaluate("span: deletion")
        assert {ids[0] for ids in asked["passed"]} == {tokenizer.bos_token_id}
        with counting(model) as asked:
            result.evaluate("span: deletion", sources=[0, 1])
        assert {ids[0] for ids in asked["passed"]} > {tokenizer.bos_token_id}

    def test_a_part_of_a_character_is_looked_for_as_the_whole(self):
        """What a token alone decodes to is no text."""
        tokenizer = tiny_tokenizer()
        model = tiny_model(vocab_size=len(tokenizer))
        inp = TextTokenInput("Ana has 3 pens.", tokenizer)
        ids = tokenizer.encode("So 日.", add_special_tokens=False)
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        result = cage.attribute(inp, ids, units="token")
        texts = [tokenizer.decode([token]) for token in ids]
        broken = [place for place, text in enumerate(texts) if "\ufffd" in text]
        assert len(broken) > 1
        for place in broken:
            assert result.explaining(place).evaluator().statement == "'日'"

    def test_another_text_is_refused(self):
        """Its scores would be of other sources."""
        tested = result_of("chain", 0).evaluator(removal="baseline")
        with pytest.raises(ValueError, match="tested: must explain the text"):
            tested.evaluate(result_of("chain", 1), "span: deletion")

    @pytest.mark.parametrize("name", ["gold", "sources"])
    @pytest.mark.parametrize("value", [3, "03"])
    def test_positions_are_a_list(self, name, value):
        """Not a number, and no text."""
        with pytest.raises(TypeError, match=f"{name}: must be positions of sources"):
            result_of("chain", 0).evaluate(**{name: value})
