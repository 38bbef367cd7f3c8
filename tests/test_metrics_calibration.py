"""Metrics held to a known truth: which of them it wins under, and which it does not."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from scipy.stats import rankdata

from captum_cage import (
    ChatTokenInput,
    GraphAttributionResult,
    GraphContextAttribution,
)
from captum_cage.demo import examples as demo_examples
from captum_cage.demo import load_demo
from captum_cage.demo.planted import planted_cases, planted_model
from captum_cage.metrics import (
    METRICS,
    Calibration,
    Metric,
    Score,
    calibrate_metric,
    calibration,
    compare_all,
    estimate,
)
from captum_cage.metrics.calibration import untrusted
from captum_cage.metrics.datasets import Example

DELETION, RESPONSE = "regenerated: deletion", "response: rise"
OTHERS = ("random", "sequence", "nearest")
# Fast, and nothing else is changed in the texts.
OPTIONS: dict[str, Any] = {
    "removal": "baseline",
    "resamples": 999,
    "random_orders": 3,
    "masks": 4,
}


@cache
def chain() -> Any:
    """A model whose answer copies a step that copies one of the facts."""
    return planted_model("chain")


@cache
def cases() -> tuple[Any, ...]:
    """Conversations with it, the code neither first nor last of the facts."""
    found = planted_cases(20, 5, "chain")
    return tuple(
        case
        for case in found
        if 0 < case.origins(case.explained)[0] < len(case.sources) - 1
    )[:6]


def examples(number: int = 6) -> list[Example]:
    """Conversations whose last sentence depends on one fact."""
    return [
        Example(
            case.prompt,
            case.completion,
            case.sentences[-1].text,
            tuple(case.span(place) for place in case.origins(case.explained)),
            tuple(case.span(place) for place in case.sources),
            kind="chain",
        )
        for case in cases()[:number]
    ]


def cage() -> GraphContextAttribution:
    """Ablation of the model."""
    model, tokenizer = chain()
    return GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))


@cache
def calibrated() -> Calibration:
    """Two metrics, one of which is known to prefer the sources of all that is said."""
    return calibrate_metric(cage(), examples(), [DELETION, RESPONSE], **OPTIONS)


@cache
def by_hand() -> dict[str, dict[str, list[float]]]:
    """The same, an example and an order at a time."""
    found: dict[str, dict[str, list[float]]] = {DELETION: {}, RESPONSE: {}}
    for number, (case, example) in enumerate(zip(cases(), examples(), strict=True)):
        _, tokenizer = chain()
        inp = TextTokenInput(example.prompt, tokenizer)
        result = cage().attribute(
            inp, example.completion, units="sentence", explain=example.explain
        )
        texts = [unit.text for unit in result.units if not unit.generated]
        facts = [texts.index(case.sentences[place].text) for place in case.sources]
        (origin,) = case.origins(case.explained)
        truth = [float(text == case.sentences[origin].text) for text in texts]
        orders = {
            "truth": truth,
            "sequence": result.sequence.seq_attr,
            "nearest": range(len(texts)),
        }
        tested = result.evaluator(
            sources=facts, removal="baseline", seed=number, random_orders=3
        )
        scores = tested.evaluate(orders, [DELETION, RESPONSE]).scores
        for metric, own in found.items():
            for order, score in scores.items():
                own.setdefault(order, []).append(score[metric].value)
    return found


class TestKnownTruth:
    """On models whose weights are written down."""

    def test_the_truth_wins_when_texts_are_written_again(self):
        """Against random orders, the whole response, and what is nearest."""
        found = calibrated()
        assert found.lost(DELETION) == ()
        assert found.verdict(DELETION) == ""
        means = found.means[DELETION]
        assert all(means["truth"].mean < means[other].mean for other in OTHERS)

    def test_the_score_of_the_whole_response_prefers_the_whole_response(self):
        """As it says all that was written, not what is explained."""
        found = calibrated()
        assert "sequence" in found.lost(RESPONSE)
        assert "random" not in found.lost(RESPONSE)
        assert (
            found.means[RESPONSE]["sequence"].mean < found.means[RESPONSE]["truth"].mean
        )

    def test_means_and_differences_are_those_of_the_examples(self):
        """Pair by pair, with a seed for each example."""
        found = calibrated()
        for metric, orders in by_hand().items():
            assert set(found.means[metric]) == {"truth", *OTHERS}
            for order, values in orders.items():
                expected = estimate(values, resamples=999)
                assert found.means[metric][order] == expected
            others = {name: orders[name] for name in OTHERS}
            assert found.comparisons[metric] == compare_all(
                orders["truth"], others, higher_is_better=False, resamples=999
            )
        assert found.removal == "baseline"
        assert found.examples == 6
        assert found.kinds == ("chain",)

    def test_a_metric_that_prefers_the_nearest_source_is_marked(self, monkeypatch):
        """The truth loses under it, by name, and only there."""

        def nearness(probe):
            places = range(len(probe.scores))
            return Score(float(np.corrcoef(rankdata(probe.scores), places)[0, 1]))

        metric = Metric("nearness", True, "what is near", "nobody", nearness)
        monkeypatch.setitem(METRICS, "nearness", metric)
        name = "regenerated: nearness"
        found = calibrate_metric(cage(), examples(), [name, DELETION], **OPTIONS)
        assert "nearest" in found.lost(name)
        assert found.lost(DELETION) == ()
        assert found.means[name]["nearest"].mean == pytest.approx(1.0)
        verdict = found.verdict(name)
        assert verdict.startswith(
            "on 6 examples of known truth (chain), the truth does not win against "
        )
        assert f"nearest ({found.comparisons[name]['nearest'].difference})" in verdict
        (row,) = (line for line in str(found).splitlines() if name in line)
        assert "nearest" in row
        assert "†" in row
        assert found.to_dict()["metrics"][name]["untrusted"] == verdict

    def test_the_direction_of_the_metric_counts(self, monkeypatch):
        """Under the same metric turned round, the truth loses to everything."""
        plain = METRICS["deletion"]
        turned = Metric("deletion", True, plain.summary, plain.source, plain.function)
        monkeypatch.setitem(METRICS, "deletion", turned)
        found = calibrate_metric(cage(), examples(), DELETION, **OPTIONS)
        assert found.lost(DELETION) == OTHERS

    def test_inputs_may_be_made_of_examples(self):
        """As chats, for example, whose text holds the prompt."""
        _, tokenizer = chain()
        made = []

        def chat(example: Example) -> ChatTokenInput:
            made.append(example)
            messages = [{"role": "user", "content": example.prompt}]
            return ChatTokenInput(messages, tokenizer, features="all")

        plain = []
        for case, example in zip(cases()[:2], examples(2), strict=True):
            content = case.messages[0]["content"]
            shift = case.prompt.index(content)
            spans = [
                tuple((a - shift, b - shift) for a, b in ranges)
                for ranges in (example.gold, example.sources)
            ]
            plain.append(
                Example(
                    content, example.completion, example.explain, *spans, kind="chat"
                )
            )
        found = calibrate_metric(cage(), plain, DELETION, as_input=chat, **OPTIONS)
        assert made == plain
        expected = by_hand()[DELETION]["truth"][:2]
        assert found.means[DELETION]["truth"].mean == pytest.approx(np.mean(expected))
        assert found.kinds == ("chat",)

    def test_what_is_explained_and_must_come_out_is_that_of_the_example(self):
        """Its statement, and the last sentence where it names none."""
        (example, other) = examples(2)
        lamp = cases()[0].sentences[-2].text
        place = next(
            i
            for i, s in enumerate(cases()[0].sentences)
            if s.text.startswith("The lamp")
        )
        changed = Example(
            example.prompt,
            example.completion,
            None,
            (cases()[0].span(place),),
            example.sources,
            statement=lamp,
            kind="lamp",
        )
        found = calibrate_metric(cage(), [changed, other], DELETION, **OPTIONS)
        # Without the lamp first of all, its sentence does not come out again.
        sizes = [len(one.sources) for one in (changed, other)]
        expected = np.mean([0.5 / size for size in sizes])
        assert found.means[DELETION]["truth"].mean == pytest.approx(expected)
        assert found.kinds == ("lamp", "chain")


def test_texts_are_written_where_none_is_given(monkeypatch):
    """As long as they are told to be, here and again; so are other arguments passed."""
    model, tokenizer = load_demo()
    wrapped = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    given = demo_examples(2, seed=1)[::2]
    open_ended = [replace(example, completion=None) for example in given]
    passed = []
    for owner, name in (
        (GraphContextAttribution, "attribute"),
        (GraphAttributionResult, "evaluator"),
    ):
        monkeypatch.setattr(owner, name, recorded(getattr(owner, name), passed))
    options = {"random_orders": 1, "gen_args": {"max_new_tokens": 90}}
    found = calibrate_metric(
        wrapped, open_ended, DELETION, attribute_args={"batch_size": 4}, **options
    )
    assert [one["gen_args"] for one in passed] == [options["gen_args"]] * 4
    assert [one.get("batch_size") for one in passed] == [4, None, 4, None]
    expected = calibrate_metric(wrapped, given, DELETION, **options)
    assert found.means[DELETION] == expected.means[DELETION]
    assert found.means[DELETION]["truth"].mean < 0.3


def recorded(function, passed):
    """The same function; its keywords are put down."""

    def recording(*args: Any, **kwargs: Any) -> Any:
        passed.append(kwargs)
        return function(*args, **kwargs)

    return recording


class TestVerdicts:
    """What counts as a win, on numbers that are given."""

    @staticmethod
    def of(truth: list[float], other: list[float]) -> Calibration:
        """A calibration of one metric and one other order."""
        others = {"random": other}
        return Calibration(
            {"m": {"truth": estimate(truth), "random": estimate(other)}},
            {"m": compare_all(truth, others)},
            {"m": True},
            "delete",
            len(truth),
            ("kind", "other kind"),
        )

    @pytest.mark.parametrize(
        ("truth", "wins"),
        [
            ([2.0, 3.0, 4.0, 3.0], True),
            ([1.0, 1.0, 1.0, 1.0], False),  # ties
            ([0.0, 0.0, 0.5, 0.0], False),
            ([0.0, 9.0, 0.0, 9.0], False),  # as often as not
            ([9.0, 1.0, 1.0, 0.0], False),  # by luck
        ],
    )
    def test_the_truth_must_win_more_often_and_surely(self, truth, wins):
        """More wins than losses, and an interval without zero."""
        found = self.of(truth, [1.0, 1.0, 1.0, 1.0])
        assert found.lost("m") == (() if wins else ("random",))
        assert bool(found.verdict("m")) is not wins
        if not wins:
            assert "4 examples of known truth (kind, other kind)" in found.verdict("m")

    def test_the_table_has_all_means(self):
        """A row for each metric, with the verdict in words."""
        found = calibrated()
        head, rule, *rows = found.to_markdown().splitlines()
        names = list(found.means[DELETION])
        assert head == f"| metric | {' | '.join(names)} | does the truth win? |"
        assert rule.count("|") == head.count("|")
        for row, (metric, means) in zip(rows, found.means.items(), strict=True):
            cells = row.strip("| ").split(" | ")
            assert cells[:-1] == [metric, *map(str, means.values())]
        assert rows[0].endswith("| yes |")
        lost = ", ".join(found.lost(RESPONSE))
        assert rows[1].endswith(f"| no: not against {lost} † |")
        assert str(found) == found.to_markdown()

    def test_everything_is_json(self):
        """Means and differences with their intervals."""
        found = calibrated()
        told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert told["removal"] == "baseline"
        assert told["examples"] == 6
        assert told["kinds"] == ["chain"]
        for metric, own in told["metrics"].items():
            for order, mean in found.means[metric].items():
                assert own["means"][order] == [mean.mean, mean.low, mean.high]
            for other, comparison in found.comparisons[metric].items():
                mean = comparison.difference
                assert own["differences"][other] == [mean.mean, mean.low, mean.high]
            assert own["untrusted"] == found.verdict(metric)


class TestMarks:
    """What was measured shows wherever a metric is used."""

    @pytest.fixture
    def shipped(self, monkeypatch, tmp_path):
        """The verdicts of a calibration, as the package ships them."""
        path = tmp_path / "calibration.json"
        path.write_text(json.dumps([calibrated().to_dict()]), encoding="utf-8")
        monkeypatch.setattr(calibration, "files", lambda _: tmp_path)
        calibration._shipped.cache_clear()
        yield
        calibration._shipped.cache_clear()

    @staticmethod
    def evaluated(removal: str, **options: Any) -> Any:
        """An evaluation by both metrics."""
        (example,) = examples(1)
        inp = TextTokenInput(example.prompt, chain()[1])
        result = cage().attribute(inp, example.completion, units="sentence", explain=-1)
        options = {"removal": removal, "random_orders": 1, **options}
        return result.evaluate([DELETION, RESPONSE], **options)

    @pytest.mark.usefixtures("shipped")
    def test_tables_mark_a_metric_that_is_not_to_be_trusted(self):
        """In the head of the table, the notes and the JSON."""
        found = self.evaluated("baseline")
        verdict = f"with the demo model, {calibrated().verdict(RESPONSE)}"
        assert untrusted(RESPONSE, "baseline") == verdict
        assert found.metrics[RESPONSE].untrusted == verdict
        assert found.metrics[DELETION].untrusted == ""
        head = found.to_markdown().splitlines()[0]
        assert head == f"| order | {DELETION} ↓ | {RESPONSE} ↓ † |"
        assert found.notes[-1] == f"{RESPONSE}: {verdict}"
        assert found.to_dict()["metrics"][RESPONSE]["untrusted"] == verdict

    def test_a_calibration_of_one_s_own_takes_its_place(self):
        """Measured with another model, or another way of taking away."""
        found = self.evaluated("delete", calibration=calibrated())
        assert found.metrics[RESPONSE].untrusted == calibrated().verdict(RESPONSE)
        assert found.metrics[DELETION].untrusted == ""
        with pytest.raises(TypeError, match="calibration: must be what calibrate_metr"):
            self.evaluated("delete", calibration={})

    @pytest.mark.usefixtures("shipped")
    def test_a_verdict_is_of_a_way_of_taking_away(self):
        """Another way was not tried, and is not marked."""
        assert untrusted(RESPONSE, "delete") == ""
        assert "†" not in self.evaluated("delete").to_markdown()

    def test_nothing_is_marked_where_nothing_was_measured(self, monkeypatch, tmp_path):
        """No file, no verdicts."""
        monkeypatch.setattr(calibration, "files", lambda _: tmp_path)
        calibration._shipped.cache_clear()
        try:
            assert untrusted(RESPONSE, "baseline") == ""
        finally:
            calibration._shipped.cache_clear()


class TestRefusals:
    """What cannot be calibrated is refused before the model is asked."""

    @pytest.mark.parametrize(
        ("given", "options", "error", "match"),
        [
            (0, {}, ValueError, "examples: must be several, .* 0 came"),
            (1, {}, ValueError, "examples: must be several, .* 1 came"),
            (2, {"seed": -1}, ValueError, "seed: must be 0 or more"),
            (2, {"seed": 0.5}, TypeError, "seed: must be a whole number"),
        ],
    )
    def test_arguments_are_checked(self, given, options, error, match):
        """By name."""
        with pytest.raises(error, match=match):
            calibrate_metric(None, examples(given), **options)

    def test_what_explains_must_be_ours(self):
        """Captum's object alone has no graph."""
        with pytest.raises(TypeError, match="cage: must be a GraphContextAttribution"):
            calibrate_metric(cage().llm_attr, examples(2))

    def test_the_truth_must_be_known(self):
        """Of every example."""
        first, *_ = examples(1)
        unknown = Example(first.prompt, first.completion)
        with pytest.raises(ValueError, match=r"examples\[1\]: must say which sources"):
            calibrate_metric(None, [first, unknown])

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"metrics": "regenerated: truth"}, "metrics: must be one of"),
            ({"removal": "drop"}, "removal: must be one of"),
        ],
    )
    def test_options_of_the_evaluation_are_checked(self, options, match):
        """As `evaluate` does."""
        with pytest.raises(ValueError, match=match):
            calibrate_metric(cage(), examples(2), **options)
