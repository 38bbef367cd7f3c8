"""Verified paths, against the same made slowly, by one plain pass at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import random
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    RemoteLLMAttribution,
    TextTemplateInput,
)

from captum_cage import (
    ChatTokenInput,
    ChatTraceInput,
    GraphAttributionResult,
    GraphContextAttribution,
    TokenIdsInput,
    TraceIdsInput,
)
from captum_cage.demo import load_demo, sample_problems
from captum_cage.demo.planted import PlantedCase, planted_cases, planted_model
from captum_cage.interventions import PathCheck
from captum_cage.methods.catalogue import llm_attribution
from tiny import ForwardOnly, LocalProvider, image_input, tiny_model

N = 20
KINDS = ("chain", "trace", "override")
END = "<|end|>"
every_kind = pytest.mark.parametrize("kind", KINDS)


# --- the same, slowly ----------------------------------------------------------------


@lru_cache(maxsize=10_000)
def logits_after(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """What a pass over ids says of the next one; each is made once."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
    return found


def log_prob(model: Any, before: Sequence[int], target: Sequence[int]) -> float:
    """Log-probability of ids after others, by a pass for each."""
    total = 0.0
    for place, token in enumerate(target):
        logits = logits_after(model, (*before, *target[:place])).double()
        total += float(logits.log_softmax(-1)[token])
    return total


class Slow(NamedTuple):
    """A text as ids, and the range of each unit of a path in it."""

    model: Any
    ids: list[int]
    way: list[tuple[int, int]]  # from the explained one to the source
    stop: int  # the token that ends a step
    special: int  # the token before which one ends
    spare: int | None = 8  # tokens beyond twice the old ones; None for as many

    def written(self, before: Sequence[int], old: int) -> list[int]:
        """A new step, token by token, always the likeliest."""
        new: list[int] = []
        most = old if self.spare is None else 2 * old + self.spare
        while len(new) < most:
            token = int(logits_after(self.model, (*before, *new)).argmax())
            if self.spare is not None and token == self.special:
                break
            new.append(token)
            if self.spare is not None and token == self.stop:
                break
        return new

    def run(
        self, without: Any, target: list[int] | None = None
    ) -> tuple[list[list[int]], list[int], float]:
        """The new steps, the new answer, and how likely the old one is then."""
        explained, *steps, source = self.way
        changed, new = self.ids, []
        context = without(self.ids, source)
        for number, (start, stop) in enumerate(reversed(steps)):
            if number == 0:
                at = start - len(self.ids) + len(context)  # the source stands before
                before = context[:at]
            else:
                before = changed[: start - len(self.ids) + len(changed)]
            new.append(self.written(before, stop - start))
            changed = [*self.ids[:start], *new[-1], *self.ids[stop:]]
        if not steps:
            changed = context
        shift = len(changed) - len(self.ids)
        start, stop = explained
        before = changed[: start + shift]
        scored = self.ids[start:stop] if target is None else target
        answer = self.written(before, stop - start)
        return new, answer, log_prob(self.model, before, scored)


def absent(ids: list[int], span: tuple[int, int]) -> list[int]:
    """Ids with a stretch replaced by the unknown token."""
    return [0 if span[0] <= place < span[1] else i for place, i in enumerate(ids)]


def deleted(ids: list[int], span: tuple[int, int]) -> list[int]:
    """Ids without a stretch."""
    return [*ids[: span[0]], *ids[span[1] :]]


def kept(ids: list[int], _: tuple[int, int]) -> list[int]:
    """Ids as they are."""
    return ids


# --- planted models ------------------------------------------------------------------


@cache
def planted(kind: str) -> Any:
    """The model of a kind and its tokenizer, made once."""
    return planted_model(kind)


@cache
def cases(kind: str) -> tuple[PlantedCase, ...]:
    """Conversations of a kind."""
    return planted_cases(N, 5, kind)


def case_input(case: PlantedCase, messages: Any = None) -> Any:
    """What stands before the last turn, role tokens fixed."""
    tokenizer = planted(case.kind)[1]
    before = case.before if messages is None else messages
    if any(message["role"] == "assistant" for message in before):
        return ChatTraceInput(before, tokenizer)
    return ChatTokenInput(before, tokenizer, features="all")


def explained(
    case: PlantedCase,
    method: str = "ablation",
    normalization: Any = "positive",
    target: str | None = None,
    units: Any = "sentence",
    **arguments: Any,
) -> GraphAttributionResult:
    """The last sentence of a case explained."""
    model, tokenizer = planted(case.kind)
    cage = GraphContextAttribution(
        llm_attribution(method, model, tokenizer), normalization=normalization
    )
    if "foil" not in arguments:
        arguments.setdefault("explain", -1)
    return cage.attribute(
        case_input(case),
        case.completion if target is None else target,
        units=units,
        **arguments,
    )


@cache
def of_case(kind: str, number: int) -> GraphAttributionResult:
    """The last sentence of a case explained, once."""
    return explained(cases(kind)[number])


def units_of(case: PlantedCase, result: GraphAttributionResult) -> list[int]:
    """The unit of each sentence of a case."""
    first = int(result.graph.generated_units[0])
    cut = len(result.source_text)
    places = {}
    for number, unit in enumerate(result.units):
        assert unit.span is not None
        shift = 0 if number < first else cut
        places[unit.span[0] + shift, unit.span[1] + shift] = number
    return [places[case.span(number)] for number in range(len(case.sentences))]


def token_ranges(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> Any:
    """Ids of a text, and the range of tokens of each range of characters."""
    read = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ends = np.array(read["offset_mapping"])[:, 1]
    found = []
    for start, stop in spans:
        inside = np.flatnonzero((ends > start) & (ends <= stop))
        found.append((int(inside[0]), int(inside[-1]) + 1))
    return read["input_ids"], found


def slowly(case: PlantedCase, path: Sequence[int]) -> Slow:
    """A path of a case, to be made slowly."""
    model, tokenizer = planted(case.kind)
    ids, way = token_ranges(tokenizer, case.text, [case.span(place) for place in path])
    stop = tokenizer.convert_tokens_to_ids(".")
    return Slow(model, ids, way, stop, tokenizer.convert_tokens_to_ids(END))


def assert_same(check: PathCheck, slow: Slow, tokenizer: Any, without: Any) -> None:
    """What was measured is what plain passes give."""
    _, answer, plain = slow.run(kept)
    new, other, changed = slow.run(without)
    assert check.measured == pytest.approx(plain - changed, abs=1e-4)
    assert check.steps == (tuple(tokenizer.decode(step) for step in new),)
    assert check.answers == (tokenizer.decode(other),)
    assert check.changed == float(answer != other)


@every_kind
def test_real_paths_hold_and_false_ones_do_not(kind):
    """Of each conversation, all real paths and a false one, direct or by a step."""
    rng = random.Random(0)
    lengths = set()
    for number, case in enumerate(cases(kind)):
        result = of_case(kind, number)
        units = units_of(case, result)
        for path in case.real_paths:
            check = result.verify_path([units[place] for place in path])
            assert check.holds, (case.text, check)
            assert check.changed == 1.0
        false = rng.choice([p for p in case.false_paths if (len(p) > 2) == number % 2])
        lengths.add(len(false))
        check = result.verify_path([units[place] for place in false])
        assert not check.holds, (case.text, check)
        assert check.changed == 0.0
    assert lengths == {2, 3}


@every_kind
def test_what_is_measured_is_what_plain_passes_give(kind):
    """Steps are written again, put in their place, and the answer is scored."""
    tokenizer = planted(kind)[1]
    kinds = set()
    for number, case in list(enumerate(cases(kind)))[:4]:
        result = of_case(kind, number)
        units = units_of(case, result)
        false = [case.false_paths[0], max(case.false_paths, key=len)]
        for path in [*case.real_paths, *false]:
            check = result.verify_path([units[place] for place in path])
            assert_same(check, slowly(case, path), tokenizer, absent)
            is_direct = len(path) == 2
            assert check.kind == ("direct" if is_direct else "through generated text")
            kinds.add(check.kind)
    assert kinds == {"direct", "through generated text"}


@pytest.mark.parametrize("kind", ["chain", "override"])
def test_a_source_may_be_deleted(kind):
    """Its tokens are then not there at all, when the step next to it is written."""
    tokenizer = planted(kind)[1]
    result, case = of_case(kind, 0), cases(kind)[0]
    units = units_of(case, result)
    for path in (*case.real_paths, case.false_paths[0]):
        way = [units[place] for place in path]
        check = result.verify_path(way, removal="delete")
        assert check.removal == "delete"
        assert_same(check, slowly(case, path), tokenizer, deleted)
        assert check.holds == (path in case.real_paths)
        assert check.predicted == result.verify_path(way).predicted


def test_two_steps_are_written_one_after_the_other():
    """Only the first is written without the source, and only the last one stays."""
    model, tokenizer = load_demo()
    problem = sample_problems(1, 0, "two_questions")[0]
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    ids = tokenizer.encode(problem.completion, add_special_tokens=False)
    inp = TokenIdsInput(tokenizer.encode(problem.prompt), tokenizer)
    result = cage.attribute(inp, ids, units="sentence", explain=-1)
    text = problem.prompt + problem.completion
    cut = len(problem.prompt)
    answer = problem.answers[1]
    second = problem.steps[answer.steps[0]]
    first = problem.steps[second.steps[0]]
    generated = [answer.span, second.span, first.span]
    places = {(unit.generated, unit.span): i for i, unit in enumerate(result.units)}
    ends = (tokenizer.convert_tokens_to_ids("."), tokenizer.eos_token_id)
    for fact in (
        first.facts[0],
        next(f for f in problem.facts if f not in first.facts),
    ):
        way = [*(places[True, span] for span in generated), places[False, fact]]
        spans = [*((a + cut, b + cut) for a, b in generated), fact]
        whole, ranges = token_ranges(tokenizer, text, spans)
        check = result.verify_path(way)
        assert len(check.steps[0]) == 2
        assert_same(check, Slow(model, whole, ranges, *ends), tokenizer, absent)


class TestPrediction:
    """The prediction is linear propagation, made by hand."""

    @staticmethod
    def rows(case: PlantedCase) -> Any:
        """Raw rows of ablation by plain passes, over the sentences of a case."""
        count = len(case.sentences)
        slow = slowly(case, range(count))
        rows = np.zeros((count, count))
        for place, sentence in enumerate(case.sentences):
            if sentence.generated:
                start, stop = slow.way[place]
                target = slow.ids[start:stop]
                plain = log_prob(slow.model, slow.ids[:start], target)
                for other in range(place):
                    changed = absent(slow.ids, slow.way[other])[:start]
                    score = log_prob(slow.model, changed, target)
                    rows[place, other] = plain - score
        return rows

    @pytest.mark.parametrize("normalization", ["positive", "absolute", "signed"])
    def test_it_is_the_row_times_the_shares_behind_it(self, normalization):
        """First the raw attribution of the step, then the step's normalised row."""
        case = cases("chain")[1]
        result = explained(case, normalization=normalization)
        units = units_of(case, result)
        rows = self.rows(case)
        for path in (*case.real_paths, *case.false_paths[:3], *case.false_paths[-3:]):
            first, *rest = path
            row = rows[first].clip(0) if normalization == "positive" else rows[first]
            expected = row[rest[0]]
            for step, before in pairwise(rest):
                row = rows[step]
                if normalization == "positive":
                    row = row.clip(0)
                expected *= row[before] / np.abs(row).sum()
            check = result.verify_path([units[place] for place in path])
            assert check.predicted == pytest.approx(expected, abs=2e-5)

    def test_a_direct_path_of_ablation_is_predicted_as_it_is_measured(self):
        """Both are what the row is made of."""
        case = cases("override")[0]
        result = of_case("override", 0)
        units = units_of(case, result)
        for path in (*case.real_paths, case.false_paths[0]):
            check = result.verify_path([units[place] for place in path])
            expected = max(check.measured, 0.0)
            assert check.predicted == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("ifr", {}),
            ("attention-suppression", {}),
            ("attnlrp", {}),
            ("c-lime", {"scalarizer": "mean"}),
        ],
    )
    def test_other_measures_are_shares_of_what_all_units_change(self, method, options):
        """Where rows are no log-probabilities, they say what part of it is due."""
        case = cases("chain")[0]
        result = explained(case, method, **options)
        units = units_of(case, result)
        slow = slowly(case, range(len(case.sentences)))
        start, stop = slow.way[-1]
        changed = slow.ids
        for span in slow.way[:-1]:
            changed = absent(changed, span)
        target = slow.ids[start:stop]
        whole = log_prob(slow.model, slow.ids[:start], target)
        whole -= log_prob(slow.model, changed[:start], target)
        for path in case.real_paths:
            share = math.prod(
                float(result.graph.matrix[units[a], units[b]])
                for a, b in pairwise(path)
            )
            check = result.verify_path([units[place] for place in path])
            assert check.predicted == pytest.approx(share * whole, abs=1e-4)
            assert check.holds

    def test_a_row_that_was_cut_keeps_its_shares(self):
        """What was dropped of a row does not make the rest of it heavier."""
        case = cases("chain")[0]
        whole, cut = (explained(case, "ifr", sparsify=part) for part in (None, 0.9))
        way = [units_of(case, whole)[place] for place in case.real_paths[0]]
        assert cut.graph.kept[-1] < 1.0
        expected = whole.verify_path(way).predicted
        assert cut.verify_path(way).predicted == pytest.approx(expected, rel=1e-6)

    def test_probabilities_are_no_log_probabilities(self):
        """Rows of probabilities give shares, as those of other measures do."""
        case = cases("chain")[0]
        model, tokenizer = planted("chain")
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer, attr_target="prob")
        result = GraphContextAttribution(llm_attr).attribute(
            case_input(case), case.completion, units="sentence", explain=-1
        )
        way = [units_of(case, result)[place] for place in case.real_paths[0]]
        check = result.verify_path(way)
        assert float(result.graph.rows[-1].max()) <= 1.0
        assert check.predicted > 2.0
        assert check.holds

    @pytest.mark.parametrize(
        ("normalization", "holds"),
        [("positive", False), ("absolute", True), ("signed", True)],
    )
    def test_a_path_may_argue_against_the_answer(self, normalization, holds):
        """The sign is predicted, unless the graph leaves such paths out."""
        case = cases("chain")[0]
        wrong = " ".join([*case.completion.split()[:-1], "missing."])
        result = explained(case, normalization=normalization, target=wrong)
        first = int(result.graph.generated_units[0])
        fact = units_of_text(result, case.sentences[case.real_paths[0][-1]].text)
        check = result.verify_path([first + 2, first, fact])
        assert check.measured < -1.0
        assert check.holds == holds
        if holds:
            assert check.predicted < -0.01
        else:
            assert check.predicted == 0.0

    def test_the_sign_of_a_later_edge_counts_where_shares_are_absolute(self):
        """A step that was written in spite of the source is less likely by it."""
        case = cases("chain")[0]
        words = case.completion.split()
        other = case.sentences[-2].text.split()[-1]
        words[4], words[-1] = other, other  # neither step nor answer follows the fact
        found = {}
        for normalization in ("absolute", "signed"):
            result = explained(
                case, normalization=normalization, target=" ".join(words)
            )
            first = int(result.graph.generated_units[0])
            fact = units_of_text(result, case.sentences[case.real_paths[0][-1]].text)
            path = [first + 2, first, fact]
            found[normalization] = result.verify_path(path).predicted
        assert found["signed"] < -0.01
        assert found["absolute"] == pytest.approx(found["signed"], rel=1e-9)


def units_of_text(result: GraphAttributionResult, text: str) -> int:
    """The first unit of a text."""
    return next(i for i, unit in enumerate(result.units) if unit.text == text)


class TestFoils:
    """A path of a contrastive question changes the log-odds."""

    def test_the_change_is_one_of_the_log_odds(self):
        """The score is that of what was written less that of the foil."""
        case = cases("chain")[0]
        tokenizer = planted("chain")[1]
        colour = case.completion.split()[-1].removesuffix(".")
        other = case.sentences[-2].text.split()[-1].removesuffix(".")
        result = explained(case, foil={f"safe is {colour}": f"safe is {other}"})
        units = units_of(case, result)
        (path,) = case.real_paths
        check = result.verify_path([units[place] for place in path])
        slow = slowly(case, path)
        start, stop = slow.way[0]
        assert slow.ids[stop - 2] == tokenizer.convert_tokens_to_ids(f" {colour}")
        slow.way[0] = (stop - 2, stop - 1)  # the part in which the two differ
        foil = [tokenizer.convert_tokens_to_ids(f" {other}")]
        odds = []
        for without in (kept, absent):
            *_, written = slow.run(without)
            *_, instead = slow.run(without, foil)
            odds.append(written - instead)
        assert check.measured == pytest.approx(odds[0] - odds[1], abs=1e-4)
        row = result.graph.rows[-1]
        shares = result.graph.matrix[units[path[1]], units[path[2]]]
        expected = float(row[units[path[1]]]) * float(shares)
        assert check.predicted == pytest.approx(expected, rel=1e-9)
        assert check.holds
        # The answer is the whole sentence, as it is without a foil.
        slow.way[0] = (start, stop)
        assert check.answers == (tokenizer.decode(slow.run(absent)[1]),)

    def test_the_direct_row_of_a_foil_is_what_is_measured(self):
        """The row of ablation is the change of the log-odds itself."""
        case = cases("override")[0]
        colour = case.completion.split()[-1].removesuffix(".")
        result = explained(case, foil={colour: "pink" if colour != "pink" else "red"})
        units = units_of(case, result)
        (path,) = case.real_paths
        check = result.verify_path([units[place] for place in path])
        assert check.kind == "direct"
        assert check.measured > 8.0
        assert check.predicted == pytest.approx(check.measured, abs=1e-5)
        assert check.contrastive
        assert "change of the log-odds" in str(check)

    def test_other_measures_are_shares_of_all_that_the_log_odds_lose(self):
        """Not of what the log-probability loses."""
        case = cases("chain")[0]
        colour = case.completion.split()[-1].removesuffix(".")
        other = case.sentences[-2].text.split()[-1].removesuffix(".")
        result = explained(case, "attnlrp", foil={colour: other})
        units = units_of(case, result)
        (path,) = case.real_paths
        check = result.verify_path([units[place] for place in path])
        tokenizer = planted("chain")[1]
        slow = slowly(case, range(len(case.sentences)))
        start = slow.way[-1][1] - 2
        changed = slow.ids
        for span in slow.way[:-1]:
            changed = absent(changed, span)
        lost = []
        for word in (colour, other):
            ids = [tokenizer.convert_tokens_to_ids(f" {word}")]
            before = log_prob(slow.model, slow.ids[:start], ids)
            lost.append(before - log_prob(slow.model, changed[:start], ids))
        row = result.graph.rows[-1].clip(0)
        share = row[units[path[1]]] / row.sum()
        share *= result.graph.matrix[units[path[1]], units[path[2]]]
        expected = float(share) * (lost[0] - lost[1])
        assert check.predicted == pytest.approx(expected, abs=1e-4)
        assert check.holds

    def test_a_unit_without_a_foil_keeps_its_log_probability(self):
        """Foils of other units do not count."""
        case = cases("chain")[0]
        gate = case.sentences[-2].text.split()[-1].removesuffix(".")
        other = "pink" if gate != "pink" else "red"
        result = explained(case, foil={f"gate is {gate}": f"gate is {other}"})
        both = result.explaining(slice(1, 3))
        assert both.foils
        units = units_of(case, both)
        (path,) = case.real_paths
        way = [units[place] for place in path]
        expected = of_case("chain", 0).verify_path(way)
        check = both.verify_path(way)
        assert not check.contrastive
        assert "change of the log-probability" in str(check)
        assert check.measured == pytest.approx(expected.measured, abs=1e-5)
        assert check.predicted == pytest.approx(expected.predicted, abs=1e-5)


# --- what a new step is --------------------------------------------------------------


class TestSteps:
    """A new step begins where the old one did and ends where one of its kind does."""

    @staticmethod
    def asked(
        target: str, way: Sequence[int | str], units: Any = "sentence"
    ) -> tuple[PathCheck, Slow, Any]:
        """A path by texts, in a case with another completion."""
        case = cases("chain")[0]
        model, tokenizer = planted("chain")
        result = explained(case, target=target, units=units)
        first = int(result.graph.generated_units[0])
        path = [
            first + unit if isinstance(unit, int) else units_of_text(result, unit)
            for unit in way
        ]
        cut = len(case.prompt)
        spans = []
        for unit in path:
            start, stop = result.units[unit].span
            shift = cut if unit >= first else 0
            spans.append((start + shift, stop + shift))
        ids, ranges = token_ranges(tokenizer, case.prompt + target, spans)
        ends = tokenizer.convert_tokens_to_ids([".", END])
        return result.verify_path(path), Slow(model, ids, ranges, *ends), tokenizer

    @staticmethod
    def fact() -> str:
        """The fact about the code."""
        case = cases("chain")[0]
        return case.sentences[case.real_paths[0][-1]].text

    @staticmethod
    def sentences() -> list[str]:
        """The three sentences that are generated."""
        return [s.text for s in cases("chain")[0].sentences if s.generated]

    def test_it_may_be_longer_than_the_old_one(self):
        """All that follows moves."""
        _, gate, safe = self.sentences()
        check, *slow = self.asked(f"So the. {gate} {safe}", [2, 0, self.fact()])
        assert len(slow[0].run(kept)[0][0]) > slow[0].way[1][1] - slow[0].way[1][0]
        assert_same(check, *slow, absent)

    def test_it_may_be_empty(self):
        """Where the model would have stopped, nothing takes its place."""
        key, gate, safe = self.sentences()
        check, *slow = self.asked(
            f"{key} {gate} {safe} {key} {safe}", [4, 3, self.fact()]
        )
        assert slow[0].run(kept)[0] == [[]]
        assert check.steps == (("",),)
        assert_same(check, *slow, absent)
        assert not check.holds

    def test_what_the_model_writes_by_itself_is_compared_with(self):
        """Writing again alone changes a text that is not the model's own."""
        key, gate, safe = self.sentences()
        wrong = " ".join([*key.split()[:-1], gate.split()[-1]])
        others = [
            s.text
            for s in cases("chain")[0].sentences
            if not s.generated and s.text != self.fact()
        ]
        target = f"{wrong} {gate} {safe}"
        real, *slow = self.asked(target, [2, 0, self.fact()])
        assert_same(real, *slow, absent)
        assert real.measured > 4.0
        false, *slow = self.asked(target, [2, 0, others[0]])
        assert_same(false, *slow, absent)
        assert false.measured == pytest.approx(0.0, abs=0.01)

    def test_it_ends_as_those_of_its_side_do(self):
        """Units may be named for each side."""
        _, gate, safe = self.sentences()
        target = f"So the. {gate} {safe}"
        units = {"source": "message", "generated": "sentence"}
        check, *slow = self.asked(
            target, [2, 0, cases("chain")[0].before[0]["content"]], units
        )
        assert_same(check, *slow, absent)
        assert check.steps == (("So the key is missing.",),)

    def test_it_is_one_of_those_that_most_steps_are(self):
        """A sentence of one word is a sentence among others, and so is a whole turn."""
        _, gate, safe = self.sentences()
        units = {"source": "message", "generated": "sentence"}
        message = cases("chain")[0].before[0]["content"]
        check, *slow = self.asked(f"So. {gate} {safe}", [2, 0, message], units)
        assert_same(check, *slow, absent)
        assert check.steps == (("So the key is missing.",),)

        model, tokenizer = planted("chain")
        messages = [
            {"role": "user", "content": "The code is red. The lamp is blue."},
            {"role": "assistant", "content": "So the key is red."},
            {"role": "user", "content": "The bell is gold."},
        ]
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        result = cage.attribute(
            ChatTraceInput(messages, tokenizer),
            f"{gate} {safe}",
            units=units,
            explain=-1,
        )
        assert [unit.generated for unit in result.units] == [0, 1, 0, 1, 1]
        check = result.verify_path([4, 1, 0])
        assert check.steps == (("So the key is missing.",),)

    def test_own_units_have_as_many_tokens_as_before(self):
        """Nothing else is known of where one would end."""
        key, gate, safe = self.sentences()
        target = f"{key} {gate} {safe}"
        # So the key is X. Also | the gate is Y. Thus | the safe is X.
        cuts = [target.index(" the gate"), target.index(" the safe"), len(target)]
        ranges = [
            (0, cuts[0]),
            (cuts[0] + 1, cuts[1]),
            (cuts[1] + 1, cuts[2]),
        ]
        units = {"source": "sentence", "generated": ranges}
        check, slow, tokenizer = self.asked(target, [2, 0, self.fact()], units)
        assert_same(check, slow._replace(spare=None), tokenizer, absent)
        assert check.holds

    def test_a_token_is_one_token(self):
        """Of which the model has many."""
        key, gate, safe = self.sentences()
        target = f"{key} {gate} {safe}"
        colour = f" {key.split()[-1].removesuffix('.')}"
        fact = self.fact()
        case = cases("chain")[0]
        result = explained(case, units="token", explain=-2)
        assert result.output_tokens[-2] == result.output_tokens[4] == colour
        first = int(result.graph.generated_units[0])
        place = case.prompt.index(fact) + len(fact) - 1
        source = next(
            i
            for i, unit in enumerate(result.units)
            if not unit.generated and unit.span is not None and unit.span[1] == place
        )
        assert result.units[source].text == colour
        check = result.verify_path([first + 16, first + 4, source])
        model, tokenizer = planted("chain")
        ids = tokenizer.encode(case.prompt + target, add_special_tokens=False)
        cut = len(ids) - 18
        at = next(i for i in range(cut) if ids[i] == ids[cut + 4])
        way = [(cut + 16, cut + 17), (cut + 4, cut + 5), (at, at + 1)]
        slow = Slow(model, ids, way, -1, -1, spare=None)
        assert_same(check, slow, tokenizer, absent)
        assert check.holds

    def test_a_refined_graph_is_verified_like_the_one_before(self):
        """Steps that were left whole end as they did, those that were split finer."""
        case = cases("chain")[0]
        (path,) = case.real_paths
        coarse = of_case("chain", 0)
        finer = coarse.refine(1, "word")
        first = int(finer.graph.generated_units[0])
        colour = next(
            i
            for i, unit in enumerate(finer.units)
            if unit.text == self.fact().split()[-1]
        )
        check = finer.verify_path([first + 2, first, colour])
        units = units_of(case, coarse)
        expected = coarse.verify_path([units[place] for place in path])
        assert check.steps == expected.steps
        assert check.measured == pytest.approx(expected.measured, abs=0.05)
        finest = coarse.refine(2, "word", side="generated")  # the answer and the key
        last = int(finest.graph.generated_units[-1])
        key = units_of_text(finest, self.sentences()[0].split()[-1])
        check = finest.verify_path([last, key, units[path[-1]]])
        assert check.steps[0][0].endswith(".")
        assert len(check.steps[0][0].split()) == 1
        assert check.holds

    def test_a_special_token_is_one_token(self):
        """It is no empty text, neither where it is explained nor on the way."""
        case = cases("trace")[0]
        model, tokenizer = planted("trace")
        ids = tokenizer.encode(case.text, add_special_tokens=False)
        marks = {
            name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            for name in ("assistant", "end")
        }
        generated, inside = [], False
        for i in ids:
            generated.append(inside)
            inside = i == marks["assistant"] or (inside and i != marks["end"])
        assert ids[-1] == marks["end"]
        assert generated[-1]
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TraceIdsInput(ids, tokenizer, generated)
        result = cage.attribute(inp, units="sentence", explain=-1)
        assert result.output_tokens.count(END) == 2
        last = len(result.units) - 1
        check = result.verify_path([last, 1])
        assert check.answer == END
        assert check.answers == (END,)
        assert check.changed == 0.0
        end = [unit.text for unit in result.units].index(
            END, result.graph.n_sources // 2
        )
        steps = [
            int(unit)
            for unit in result.graph.generated_units
            if result.units[unit].text == END
        ]
        assert end < last
        check = result.verify_path([last, steps[0], 1])
        assert check.steps == ((END,),)
        assert check.measured == pytest.approx(0.0, abs=1e-4)

    def test_white_space_between_special_tokens_is_as_many_tokens(
        self, tokenizer, model
    ):
        """It is no sentence, and no sentence takes its place."""
        target = tokenizer.encode(" So.<|end|>\n<|end|> She.", add_special_tokens=False)
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TokenIdsInput(tokenizer.encode("Ana has 3."), tokenizer)
        result = cage.attribute(inp, target, units="sentence", explain=-1)
        assert result.output_tokens[1:4] == ["<|end|>", "\n", "<|end|>"]
        check = result.verify_path([5, 3, 0])
        place = target.index(tokenizer.encode("\n")[0])
        ids = [0] * len(tokenizer.encode("Ana has 3.")) + target[:place]
        with torch.no_grad():
            likeliest = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        assert check.steps == ((tokenizer.decode(likeliest),),)

    @staticmethod
    def endless(kind: str, **settings: Any) -> tuple[Any, GraphAttributionResult]:
        """Two sentences explained, of a model that never ends one, and their ids."""
        tokenizer = planted("chain")[1]
        model = tiny_model(kind, vocab_size=len(tokenizer), **settings)
        ends = [tokenizer.convert_tokens_to_ids("."), *tokenizer.all_special_ids]
        model.get_output_embeddings().weight.data[ends] = 0.0
        text = "The lamp is red. The key is blue. So the key is red. Also the."
        ids = tokenizer.encode(text)
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TokenIdsInput(ids[:10], tokenizer)
        result = cage.attribute(inp, ids[10:], units="sentence", explain=-1)
        assert [len(unit.text.split()) for unit in result.units] == [4, 4, 5, 2]
        ends = tokenizer.convert_tokens_to_ids([".", END])
        way = [(16, 19), (10, 16), (0, 5)]
        return Slow(model, ids, way, *ends), result

    def test_one_that_does_not_end_is_cut(self):
        """At twice the tokens of the old one, and eight."""
        slow, result = self.endless("llama")
        check = result.verify_path([3, 2, 0])
        assert_same(check, slow, planted("chain")[1], absent)
        assert len(slow.run(absent)[0][0]) == 2 * 6 + 8

    @pytest.mark.parametrize("room", [0, 5])
    def test_it_ends_where_the_rest_would_not_fit_the_model(self, room):
        """A context that the text fills has no place for a longer one."""
        slow, result = self.endless("gpt2", max_position_embeddings=19 + room)
        slow = slow._replace(spare=room - 6)
        check = result.verify_path([3, 2, 0])
        scores, tokenizer = [], planted("chain")[1]
        for ids in (slow.ids, absent(slow.ids, (0, 5))):
            new = slow.written(ids[:10], 6)
            assert len(new) == 6 + room
            scores.append(log_prob(slow.model, [*slow.ids[:10], *new], slow.ids[16:]))
        assert check.steps == ((tokenizer.decode(new),),)
        assert check.measured == pytest.approx(scores[0] - scores[1], abs=1e-4)
        assert result.verify_path([3, 0]).kind == "direct"


def test_a_turn_from_outside_between_stays_as_it_was():
    """A new call stands before the old answer of the tool."""
    tokenizer = planted("trace")[1]
    model = tiny_model("llama", vocab_size=len(tokenizer), seed=3)
    parts = ["The lamp is red.", " So the key", " is blue. The bell is", " gold. So"]
    pieces = [tokenizer.encode(part, add_special_tokens=False) for part in parts]
    ids = [i for piece in pieces for i in piece]
    generated = [n in (1, 3) for n, piece in enumerate(pieces) for _ in piece]
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    inp = TraceIdsInput(ids, tokenizer, generated)
    result = cage.attribute(inp, explain=-1)
    last = len(ids) - 1
    assert not result.units[10].generated
    # Across the turn from outside, through both generated ones, and from that turn.
    for way in ([last, 6, 3], [last, 14, 5, 3], [last, 15, 14, 10]):
        check = result.verify_path(way)
        ranges = [(unit, unit + 1) for unit in way]
        slow = Slow(model, ids, ranges, -1, -1, spare=None)
        assert_same(check, slow, tokenizer, absent)
        assert abs(check.measured) > 0.01


# --- several samples -----------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled(tokenizer, model):
    """Words of a text that a random model reads; the second one is the baseline."""
    ids = tokenizer.encode("Ana has 3 pens. Mia has 4 more.")
    ids[3] = 0
    cage = GraphContextAttribution(
        LLMAttribution(FeatureAblation(model), tokenizer), normalization="absolute"
    )
    target = tokenizer.encode(" So she has 7 pens", add_special_tokens=False)
    return cage.attribute(TokenIdsInput(ids, tokenizer), target, explain=-1)


class TestSamples:
    """Steps may be written several times."""

    @staticmethod
    def way(result: GraphAttributionResult, source: int = 4) -> list[int]:
        """A path through the last generated unit but one."""
        return [len(result.units) - 1, len(result.units) - 2, source]

    def test_the_same_seed_gives_the_same(self, sampled):
        """And another one another; each sample has its own."""
        way = self.way(sampled)
        one, again, other = (
            sampled.verify_path(way, samples=6, seed=seed) for seed in (0, 0, 6)
        )
        assert one == again
        assert len(one.changes) == len(one.steps) == len(one.answers) == 6
        assert len(set(one.steps)) > 1
        assert other.steps != one.steps
        both = sampled.verify_path(way, samples=12, seed=0)
        assert both.steps == one.steps + other.steps
        assert both.changes == one.changes + other.changes

    def test_its_mean_and_its_error_are_those_of_the_samples(self, sampled):
        """The standard error is that of a mean; there is none of one sample."""
        check = sampled.verify_path(self.way(sampled), samples=5)
        changes = np.array(check.changes)
        assert check.measured == pytest.approx(changes.mean())
        error = changes.std(ddof=1) / np.sqrt(5)
        assert check.standard_error == pytest.approx(error)
        assert error > 0
        assert f"standard error {error:.3g}" in str(check)
        single = sampled.verify_path(self.way(sampled))
        assert math.isnan(single.standard_error)
        assert "standard error" not in str(single)

    def test_one_is_written_greedily_unless_a_temperature_is_given(self, sampled):
        """A temperature near zero is greedy, a high one is not."""
        way = self.way(sampled)
        greedy = sampled.verify_path(way)
        assert greedy == sampled.verify_path(way, seed=5)
        cold = sampled.verify_path(way, temperature=1e-4, samples=2)
        assert greedy.measured != 0.0
        assert cold.changes == pytest.approx([greedy.measured] * 2)
        hot = {
            sampled.verify_path(way, temperature=3.0, seed=s).steps for s in range(5)
        }
        assert len(hot) > 1

    def test_both_texts_are_drawn_with_the_same_numbers(self, sampled):
        """A source that is the baseline already changes nothing in any sample."""
        check = sampled.verify_path(self.way(sampled, 3), samples=6)
        assert len(set(check.steps)) > 1
        assert check.changes == (0.0,) * 6
        assert check.changed == 0.0
        assert not check.holds

    def test_other_sampling_options_of_the_model_do_not_count(self, tokenizer, sampled):
        """A model whose settings keep few tokens is sampled from all of them."""
        model = tiny_model("llama", vocab_size=len(tokenizer))
        model.generation_config.update(do_sample=True, top_k=1, top_p=0.1)
        before = model.generation_config.to_dict()
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer), normalization="absolute"
        )
        ids = sampled.inp.inp_tensor[0].tolist()
        target = tokenizer.encode(" So she has 7 pens", add_special_tokens=False)
        result = cage.attribute(TokenIdsInput(ids, tokenizer), target, explain=-1)
        way = self.way(sampled)
        expected = sampled.verify_path(way, samples=4)
        assert result.verify_path(way, samples=4).steps == expected.steps
        assert result.verify_path(way).steps == sampled.verify_path(way).steps
        assert model.generation_config.to_dict() == before

    def test_real_paths_hold_and_false_ones_do_not(self):
        """Sampled as well as greedily."""
        case, result = cases("chain")[0], of_case("chain", 0)
        units = units_of(case, result)
        for path in (*case.real_paths, case.false_paths[0], case.false_paths[-1]):
            way = [units[place] for place in path]
            check = result.verify_path(way, samples=4)
            assert check.holds == (path in case.real_paths)

    def test_everything_is_left_as_it_was(self, tokenizer):
        """Random numbers, training mode, hooks, parameters and settings."""
        model = tiny_model("gpt2", vocab_size=len(tokenizer))
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TokenIdsInput(tokenizer.encode("Ana has 3 pens."), tokenizer)
        target = tokenizer.encode(" So she has", add_special_tokens=False)
        result = cage.attribute(inp, target, explain=-1)
        way = [len(result.units) - 1, 6, 0]
        one = result.verify_path(way, samples=3)
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
        assert result.verify_path(way, samples=3) == one
        assert state() == before
        torch.manual_seed(99)
        assert result.verify_path(way, samples=3) == one


# --- other inputs, refusals ----------------------------------------------------------


class TestInputs:
    """Sources need not be tokens."""

    def test_segments_of_a_template_are_taken_away(self, tokenizer, model):
        """What is measured directly is the row of ablation; deleting is refused."""
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer), normalization="signed"
        )
        target = tokenizer.encode(" So she has", add_special_tokens=False)
        result = cage.attribute(inp, target, explain=-1)
        last = len(result.units) - 1
        check = result.verify_path([last, 1])
        row = float(result.graph.rows[-1][1])
        assert check.measured == pytest.approx(row, abs=1e-5)
        assert check.predicted == pytest.approx(row, abs=1e-9)
        through = result.verify_path([last, 2, 1])
        plain = tokenizer.encode("Ana has 3 pens.")
        without = tokenizer.encode("Ana has 3 .")
        new = []
        for before in (plain, without):
            slow = Slow(model, [*before, *target], [], -1, -1, spare=None)
            new.append(slow.written(before, 1))
        scores = [
            log_prob(model, [*plain, *one, *target[1:-1]], target[-1:]) for one in new
        ]
        assert through.steps == ((tokenizer.decode(new[1]),),)
        assert through.measured == pytest.approx(scores[0] - scores[1], abs=1e-5)
        match = "removal: 'delete' needs a source that is made of tokens.*TextTemplate"
        with pytest.raises(ValueError, match=match):
            result.verify_path([last, 1], removal="delete")

    def test_parts_of_an_image_are_taken_away(self, tokenizer, vision_model):
        """The rest of the image and the question stay."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(vision_model), tokenizer),
            normalization="signed",
        )
        target = tokenizer.encode(" So she has", add_special_tokens=False)
        result = cage.attribute(image_input(tokenizer), target, explain=-1)
        last = len(result.units) - 1
        check = result.verify_path([last, 0])
        row = float(result.graph.rows[-1][0])
        assert check.measured == pytest.approx(row, abs=1e-5)
        through = result.verify_path([last, 2, 0])
        assert through.kind == "through generated text"
        assert np.isfinite([through.predicted, through.measured]).all()
        match = "removal: 'delete' needs a source that is made of tokens.*ImageMask"
        with pytest.raises(ValueError, match=match):
            result.verify_path([last, 0], removal="delete")

    def test_something_must_be_left(self, tokenizer, model):
        """A prompt of one unit cannot be deleted."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        inp = TokenIdsInput(tokenizer.encode("Ana"), tokenizer)
        target = tokenizer.encode(" has 3", add_special_tokens=False)
        result = cage.attribute(inp, target, units="message", explain=-1)
        match = "removal: 'delete' must leave a token before the step"
        with pytest.raises(ValueError, match=match):
            result.verify_path([1, 0], removal="delete")
        assert result.verify_path([1, 0]).kind == "direct"

    def test_a_remote_model_is_refused(self, tokenizer, model):
        """It can only be sent text."""
        remote = RemoteLLMAttribution(
            FeatureAblation(RemoteLLMAttribution.placeholder_model),
            tokenizer,
            LocalProvider(model, tokenizer),
        )
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        result = GraphContextAttribution(remote).attribute(
            inp, " So she has", units={"generated": "message"}
        )
        with pytest.raises(TypeError, match="verify_path: needs the model itself"):
            result.verify_path([2, 0])

    def test_a_model_that_cannot_generate_is_refused(self, tokenizer, model):
        """It scores texts, and writes none."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(ForwardOnly(model)), tokenizer)
        )
        inp = TokenIdsInput(tokenizer.encode("Ana has 3."), tokenizer)
        target = tokenizer.encode(" So she has", add_special_tokens=False)
        result = cage.attribute(inp, target, explain=-1)
        with pytest.raises(TypeError, match="ForwardOnly came, which has no generate"):
            result.verify_path([len(result.units) - 1, 0])

    def test_a_result_without_its_model_is_refused(self, tmp_path, sampled):
        """Loaded from a file, or copied to another process."""
        sampled.save(tmp_path / "result.npz")
        loaded = GraphAttributionResult.load(tmp_path / "result.npz")
        copied = pickle.loads(pickle.dumps(sampled))
        for result in (loaded, copied):
            with pytest.raises(ValueError, match="verify_path: must ask the model"):
                result.verify_path(TestSamples.way(sampled))


class TestArguments:
    """What is no path, or no option, is refused by name."""

    @pytest.mark.parametrize("path", ["ab", 3, None, {0, 1}])
    def test_something_else_is_no_path(self, path, sampled):
        """A path is one of the result's, or a sequence of units."""
        match = "path: must be a path of the result, or its units"
        with pytest.raises(TypeError, match=match):
            sampled.verify_path(path)

    @pytest.mark.parametrize("units", [[1.0, 0], [True, 0], ["a", 0]])
    def test_units_are_whole_numbers(self, units, sampled):
        """Nothing is rounded."""
        with pytest.raises(TypeError, match="path: must be a whole number"):
            sampled.verify_path(units)

    @pytest.mark.parametrize("unit", [-1, 10_000])
    def test_units_are_those_of_the_graph(self, unit, sampled):
        """The number of units is told."""
        last = len(sampled.units) - 1
        with pytest.raises(
            ValueError, match=rf"path: .*The graph has {last + 1} units"
        ):
            sampled.verify_path([last, unit])

    @pytest.mark.parametrize(
        "way",
        [
            [],
            [-1],
            [-2, 0],  # is not explained
            [-1, -2],  # ends in generated text
            [-1, 1, 0],  # leads through a source
            [-1, -3, -2, 0],  # turns back
            [-1, -2, -2, 0],  # stands still
            [0, -1],
        ],
    )
    def test_a_path_leads_from_an_explained_unit_to_a_source(self, way, sampled):
        """Through earlier and earlier generated ones."""
        count = len(sampled.units)
        units = [unit + count if unit < 0 else unit for unit in way]
        match = "path: must lead from an explained unit"
        with pytest.raises(ValueError, match=match):
            sampled.verify_path(units)

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"samples": 0}, ValueError, "samples: must be 1 or more"),
            ({"samples": 1.5}, TypeError, "samples: must be a whole number"),
            ({"seed": -1}, ValueError, "seed: must be 0 or more"),
            ({"seed": None}, TypeError, "seed: must be a whole number"),
            ({"temperature": 0.0}, ValueError, "temperature: must be a number above 0"),
            ({"temperature": "hot"}, ValueError, "temperature: must be a number"),
            ({"temperature": True}, ValueError, "temperature: must be a number"),
            ({"temperature": math.nan}, ValueError, "temperature: must be a number"),
            ({"removal": "drop"}, ValueError, "removal: must be one of"),
            ({"least": 0.0}, ValueError, "least: must be a number above 0"),
            ({"least": 1.5}, ValueError, "least: must be .* at most 1"),
            ({"sample": 3}, TypeError, "unexpected keyword argument 'sample'"),
        ],
    )
    def test_options_are_checked(self, options, error, match, sampled):
        """Before any model call."""
        with pytest.raises(error, match=match):
            sampled.verify_path(TestSamples.way(sampled), **options)

    def test_a_path_of_the_result_is_its_units(self):
        """What `paths` gives can be passed on."""
        result = of_case("chain", 0)
        path = result.paths(1)[0]
        check = result.verify_path(path)
        assert check == result.verify_path(list(path.units))
        assert check.units == path.units
        assert check.texts == path.texts
        assert check.answer.strip() == path.texts[0]


# --- the verdict ---------------------------------------------------------------------


def check_of(predicted: float, *changes: float, least: float = 0.5) -> PathCheck:
    """A check with some numbers."""
    return PathCheck(
        units=(2, 1, 0),
        texts=("c", "b", "a"),
        kind="through generated text",
        removal="baseline",
        predicted=predicted,
        changes=changes,
        steps=(("x",),) * len(changes),
        answers=("y",) * len(changes),
        answer="c",
        changed=1.0,
        least=least,
    )


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (check_of(1.0, 1.0), True),
        (check_of(1.0, 20.0), True),
        (check_of(1.0, 0.5), True),
        (check_of(1.0, 0.49), False),
        (check_of(1.0, 0.49, least=0.4), True),
        (check_of(1.0, -1.0), False),
        (check_of(-1.0, -1.0), True),
        (check_of(-1.0, 1.0), False),
        (check_of(0.001, 0.009), False),
        (check_of(0.001, 0.011), True),
        (check_of(0.0, 5.0), False),
        (check_of(1.0, 0.4, 0.7), True),
        (check_of(1.0, 0.4, 0.5), False),
        (check_of(1.0, 0.0, 20.0), False),
        (check_of(1.0, 0.0, 0.0, 0.0, 20.0), False),
        (check_of(1.0, 0.0, 0.0, 20.0, 20.0), True),
        (check_of(-1.0, 0.0, -20.0, -20.0, -20.0), True),
    ],
)
def test_a_path_holds_if_enough_of_what_it_claims_is_measured(check, holds):
    """With the same sign, more than nothing and, of several samples, than chance."""
    assert check.holds == holds
    assert ("does not hold" in str(check)) != holds


def test_a_check_is_told_whole():
    """As a text, and as JSON with everything in it."""
    result = of_case("chain", 0)
    check = result.verify_path(result.paths(1)[0], samples=2)
    told = json.loads(json.dumps(check.to_dict(), allow_nan=False))
    for field in dataclasses.fields(check):
        value = getattr(check, field.name)
        expected = json.loads(json.dumps(value))
        assert told[field.name] == expected, field.name
    assert told["holds"] is check.holds
    assert told["measured"] == check.measured
    assert told["standard_error"] == check.standard_error
    assert result.verify_path(check.units).to_dict()["standard_error"] is None
    text = str(check)
    assert all(repr(part.strip()) in text for part in check.texts)
    assert f"{check.predicted:.3g}" in text
    assert "through generated text" in text
    assert "another answer in 100% of 2 samples" in text
