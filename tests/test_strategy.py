"""Which way rows are computed, and what may be left out within a certificate."""

from __future__ import annotations

import functools
import itertools
import logging
import math

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    RemoteLLMAttribution,
    TextTokenInput,
)
from captum.attr._core.llm_attr import _PlaceholderModel

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.demo import load_demo, sample_problems
from captum_cage.engines import Engine, register_engine
from captum_cage.engines.registry import _engines, engine_names
from captum_cage.strategy import Approximation, RowStore, Strategy
from conftest import PROMPT, TARGET
from tiny import LocalProvider, tiny_model

EXACT = 1e-9


class Own(FeatureAblation):
    """A method without an engine: ablation under another name."""


def wrapped(method, model, tokenizer, **settings):
    """The method in Captum's wrapper, in ours."""
    if issubclass(method, FeatureAblation):
        llm_attr = LLMAttribution(method(model), tokenizer)
    else:
        layer = model.get_input_embeddings()
        llm_attr = LLMGradientAttribution(method(model, layer), tokenizer)
    return GraphContextAttribution(llm_attr, **settings)


@pytest.fixture
def inp(tokenizer):
    """A prompt of two sentences."""
    return TextTokenInput(PROMPT, tokenizer)


@pytest.fixture
def calls(model, monkeypatch):
    """Shape of the ids of every forward pass; the pass after `stop` is interrupted."""

    class Calls(list):
        stop = None

    seen = Calls()
    forward = type(model).forward

    @functools.wraps(forward)
    def record(self, *args, **kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if len(seen) == seen.stop:
            raise KeyboardInterrupt
        seen.append(tuple(ids.shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", record)
    return seen


class TestWhichWay:
    """Loop, engine, or whichever there is."""

    @pytest.mark.parametrize(
        ("method", "auto"),
        [
            (FeatureAblation, "fused"),
            (LayerGradientXActivation, "fused"),
            (Own, "loop"),
        ],
    )
    def test_auto_takes_an_engine_where_there_is_one(
        self, model, tokenizer, inp, method, auto
    ):
        """What was done is in the result, and the rows are the same."""
        cage = wrapped(method, model, tokenizer)
        results = {
            name: cage.attribute(inp, TARGET, units="sentence", strategy=name)
            for name in ("auto", "loop")
        }
        assert results["auto"].meta["strategy"] == auto
        assert results["loop"].meta["strategy"] == "loop"
        assert cage.attribute(inp, TARGET, units="word").meta["strategy"] == auto
        assert results["auto"].graph.rows == pytest.approx(
            results["loop"].graph.rows, abs=1e-4
        )

    def test_the_loop_asks_the_wrapped_object_once_per_unit(
        self, model, tokenizer, inp, monkeypatch
    ):
        """An engine never asks it."""
        asked = []
        attribute = FeatureAblation.attribute

        def count(self, *args, **kwargs):
            asked.append(1)
            return attribute(self, *args, **kwargs)

        monkeypatch.setattr(
            FeatureAblation, "attribute", functools.wraps(attribute)(count)
        )
        cage = wrapped(FeatureAblation, model, tokenizer)
        cage.attribute(inp, TARGET, strategy="fused", units="sentence")
        assert asked == []
        cage.attribute(inp, TARGET, strategy="loop", units="sentence")
        assert len(asked) == 2

    @pytest.mark.parametrize("why", ["method", "remote", "argument"])
    def test_fused_names_the_methods_that_have_engines(
        self, model, tokenizer, inp, why, calls
    ):
        """Before any model call, with what is in the way and the remedy."""
        kwargs = {}
        cage = wrapped(FeatureAblation, model, tokenizer)
        reason = "argument 'baselines' is Captum's own matter"
        if why == "method":
            cage, reason = wrapped(Own, model, tokenizer), "Own has no engine"
        elif why == "remote":
            provider = LocalProvider(model, tokenizer)
            remote = RemoteLLMAttribution(
                FeatureAblation(_PlaceholderModel()), tokenizer, provider
            )
            cage = GraphContextAttribution(remote)
            reason = "remote model is sent one text at a time"
        else:
            kwargs["baselines"] = torch.zeros((1, inp.n_itp_features), dtype=torch.long)
        with pytest.raises(ValueError, match=f"'fused' needs an engine.*{reason}") as e:
            cage.attribute(inp, TARGET, strategy="fused", units="sentence", **kwargs)
        for name in engine_names():
            assert name in str(e.value)
        assert "strategy='auto'" in str(e.value)
        assert calls == []

    def test_auto_takes_the_loop_for_a_remote_model(self, model, tokenizer, inp):
        """Which is asked by text."""
        provider = LocalProvider(model, tokenizer)
        remote = RemoteLLMAttribution(
            FeatureAblation(_PlaceholderModel()), tokenizer, provider
        )
        result = GraphContextAttribution(remote).attribute(
            inp, TARGET, units="sentence"
        )
        assert result.meta["strategy"] == "loop"
        assert provider.prompts

    def test_a_reason_for_the_loop_is_logged_once_per_object(
        self, model, tokenizer, inp, caplog
    ):
        """However often it is used; another object says it again."""
        cage = wrapped(Own, model, tokenizer)
        with caplog.at_level(logging.WARNING, "captum_cage"):
            for target in (TARGET, TARGET[:20], TARGET):
                cage.attribute(inp, target, units="sentence")
            assert caplog.text.count("Own has no engine") == 1
            wrapped(Own, model, tokenizer).attribute(inp, TARGET, units="sentence")
        assert caplog.text.count("Own has no engine") == 2
        assert "computed by the loop" in caplog.text

    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    def test_what_was_asked_for_is_not_commented(
        self, model, tokenizer, inp, strategy, caplog
    ):
        """Nor is an engine."""
        cage = wrapped(FeatureAblation, model, tokenizer)
        with caplog.at_level(logging.INFO, "captum_cage"):
            cage.attribute(inp, TARGET, units="sentence", strategy=strategy)
        assert caplog.text == ""

    def test_a_row_that_is_none_is_named_whoever_made_it(
        self, model, tokenizer, inp, monkeypatch
    ):
        """The loop's rows are checked as an engine's are."""

        class Broken(FeatureAblation):
            def attribute(self, *args, **kwargs):
                return super().attribute(*args, **kwargs) * math.nan

        with pytest.raises(ValueError, match=r"Broken: must give finite.*nan came for"):
            wrapped(Broken, model, tokenizer).attribute(inp, TARGET, units="sentence")
        engine = Engine(lambda task, steps: [[math.nan] * task.width for _ in steps])
        monkeypatch.setitem(_engines, Own, engine)
        with pytest.raises(ValueError, match=r"Own: must give finite.*nan came for"):
            wrapped(Own, model, tokenizer).attribute(inp, TARGET, units="sentence")


# --- certificates ------------------------------------------------------------------


def error_of(approximate, exact):
    """How much of the exact answer the approximate one leaves open, by source."""
    return exact.seq_attr.double().numpy() - approximate.seq_attr.double().numpy()


def assert_certified(approximate, exact, *, signed=False):
    """The exact answer lies within the mass that is unresolved."""
    error = error_of(approximate, exact)
    slack = 1e-5 * max(1.0, float(exact.seq_attr.abs().sum()))
    assert np.abs(error).sum() <= approximate.unresolved + slack
    if not signed:
        assert error.min() >= -slack
        assert error.sum() + exact.leaked - approximate.leaked == pytest.approx(
            approximate.unresolved, abs=slack
        )


TOLERANT = {
    "loop": (FeatureAblation, {"strategy": "loop"}),
    "gradient": (LayerGradientXActivation, {"strategy": "fused"}),
    "integrated": (LayerIntegratedGradients, {"strategy": "fused", "n_steps": 2}),
}


@pytest.fixture(scope="module")
def long_text(tokenizer):
    """A prompt of 6 and a text of 18 random ids."""
    ids = torch.randint(7, 300, (24,), generator=torch.manual_seed(3)).tolist()
    return TokenIdsInput(ids[:6], tokenizer), ids[6:]


@pytest.mark.parametrize("way", TOLERANT)
class TestTolerance:
    """Rows on which little mass sits are not computed."""

    @pytest.mark.parametrize("normalization", ["positive", "absolute"])
    def test_fewer_rows_within_the_certificate(
        self, model, tokenizer, long_text, way, normalization
    ):
        """The unresolved mass is at most the tolerated share, and bounds the error."""
        method, kwargs = TOLERANT[way]
        cage = wrapped(method, model, tokenizer, normalization=normalization)
        inp, target = long_text
        exact = cage.attribute(inp, target, explain=-1, **kwargs)
        assert exact.unresolved == pytest.approx(0, abs=EXACT)
        for tolerance in (0.02, 0.2, 0.6):
            found = cage.attribute(
                inp, target, explain=-1, tolerance=tolerance, **kwargs
            )
            assert found.unresolved <= tolerance * 1 + EXACT
            assert_certified(found, exact)
            if tolerance >= 0.2:
                assert found.rows_computed < exact.rows_computed == len(target)
            assert found.meta["tolerance"] == tolerance
            computed = np.flatnonzero(np.abs(found.graph.rows).sum(axis=1))
            assert found.graph.rows[computed] == pytest.approx(
                exact.graph.rows[computed], rel=1e-3, abs=1e-4
            )

    def test_units_that_are_not_explained_cost_nothing(
        self, model, tokenizer, long_text, way
    ):
        """No row after the last explained one is computed."""
        method, kwargs = TOLERANT[way]
        inp, target = long_text
        result = wrapped(method, model, tokenizer).attribute(
            inp, target, explain=2, tolerance=0.001, **kwargs
        )
        assert 1 <= result.rows_computed <= 3
        assert not result.graph.rows[3:].any()

    def test_another_span_has_an_unresolved_mass_of_its_own(
        self, model, tokenizer, long_text, way
    ):
        """It may be large, and says so."""
        method, kwargs = TOLERANT[way]
        inp, target = long_text
        cage = wrapped(method, model, tokenizer)
        exact = cage.attribute(inp, target, **kwargs)
        found = cage.attribute(inp, target, explain=4, tolerance=0.1, **kwargs)
        assert found.unresolved <= 0.1 + EXACT
        other = found.explaining(15)
        assert other.unresolved == pytest.approx(1.0)
        assert_certified(other, exact.explaining(15))
        for step in (0, 4, 10):
            assert_certified(found.explaining(step), exact.explaining(step))

    def test_an_interrupted_call_goes_on(self, model, tokenizer, long_text, way, calls):
        """Finished rows are not asked for again."""
        method, kwargs = TOLERANT[way]
        inp, target = long_text
        arguments = {"explain": -1, "tolerance": 0.05, **kwargs}
        expected = wrapped(method, model, tokenizer).attribute(inp, target, **arguments)
        whole = sum(math.prod(shape) for shape in calls)
        cage = wrapped(method, model, tokenizer)
        assert len(calls) > 8
        stop = len(calls) * 3 // 4
        del calls[:]
        calls.stop = stop
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, target, **arguments)
        calls.stop = None
        del calls[:]
        found = cage.attribute(inp, target, **arguments)
        assert sum(math.prod(shape) for shape in calls) < whole
        assert found.rows_computed == expected.rows_computed
        assert found.unresolved == pytest.approx(expected.unresolved, abs=1e-6)
        assert found.seq_attr.numpy() == pytest.approx(
            expected.seq_attr.numpy(), abs=1e-5
        )

    def test_hops_and_tolerance_go_together(self, model, tokenizer, long_text, way):
        """What is cut and what is not computed are in one certificate."""
        method, kwargs = TOLERANT[way]
        inp, target = long_text
        cage = wrapped(method, model, tokenizer)
        exact = cage.attribute(inp, target, explain=-1, **kwargs)
        for hops in (0, 1, 4):
            found = cage.attribute(
                inp, target, explain=-1, hops=hops, tolerance=0.1, **kwargs
            )
            assert_certified(found, exact)
            if hops == 0:
                assert found.rows_computed == 1


class TestAblationByColumn:
    """An engine whose rows come all together leaves out rows after the span alone."""

    def test_all_rows_up_to_the_span(self, model, tokenizer, long_text):
        """The answer is exact."""
        inp, target = long_text
        cage = wrapped(FeatureAblation, model, tokenizer)
        exact = cage.attribute(inp, target, explain=7)
        found = cage.attribute(inp, target, explain=7, tolerance=0.3)
        assert found.rows_computed == 8
        assert found.unresolved == pytest.approx(0, abs=EXACT)
        assert error_of(found, exact) == pytest.approx(0, abs=1e-5)
        assert found.explaining(9).unresolved == pytest.approx(1.0)


class TestHopsAndSparsify:
    """The series cut short, and rows without their small entries."""

    @pytest.mark.parametrize("normalization", ["positive", "absolute", "signed"])
    def test_hops(self, model, tokenizer, long_text, normalization):
        """0 gives the direct rows; the more, the less is open."""
        inp, target = long_text
        cage = wrapped(FeatureAblation, model, tokenizer, normalization=normalization)
        exact = cage.attribute(inp, target, explain=-1)
        signed = normalization == "signed"
        left = []
        for hops in range(8):
            found = cage.attribute(inp, target, explain=-1, hops=hops)
            assert_certified(found, exact, signed=signed)
            left.append(found.unresolved)
        if not signed:
            assert all(a >= b - EXACT for a, b in itertools.pairwise(left))
        assert left[0] > 0.1
        direct = cage.attribute(inp, target, explain=-1, hops=0).seq_attr
        row = exact.graph.matrix.toarray()[-1, : exact.graph.n_sources]
        assert direct.numpy() == pytest.approx(row, abs=1e-6)
        rest = cage.attribute(inp, target, explain=-1, hops=len(target)).unresolved
        assert rest == pytest.approx(0, abs=EXACT)

    @pytest.mark.parametrize("share", [0.3, 0.8, 0.99, 1.0])
    @pytest.mark.parametrize("normalization", ["positive", "absolute", "signed"])
    @pytest.mark.parametrize("method", [FeatureAblation, LayerGradientXActivation])
    def test_sparsify(self, model, tokenizer, long_text, share, normalization, method):
        """Fewer entries; what is dropped is unresolved."""
        inp, target = long_text
        cage = wrapped(method, model, tokenizer, normalization=normalization)
        exact = cage.attribute(inp, target, explain=(14, 18))
        found = cage.attribute(inp, target, explain=(14, 18), sparsify=share)
        assert_certified(found, exact, signed=normalization == "signed")
        assert found.meta["sparsify"] == share
        if share < 1.0:
            stored = found.graph.matrix.nnz
            assert stored < exact.graph.matrix.nnz
            assert found.unresolved > 0
        else:
            assert found.unresolved == pytest.approx(0, abs=1e-6)

    def test_each_row_keeps_the_fewest_entries_that_hold_the_share(
        self, model, tokenizer, long_text
    ):
        """By hand: the heaviest first."""
        inp, target = long_text
        cage = wrapped(FeatureAblation, model, tokenizer)
        exact = cage.attribute(inp, target).graph
        found = cage.attribute(inp, target, sparsify=0.7).graph
        raw = np.clip(exact.rows, 0, None)
        kept = found.matrix.toarray()[exact.n_sources :] > 0
        assert found.matrix.toarray()[exact.n_sources :].shape == raw.shape
        for row, chosen in zip(raw, kept, strict=True):
            if not row.sum():
                continue
            heaviest = np.sort(row)[::-1]
            count = int(np.searchsorted(heaviest.cumsum(), 0.7 * row.sum())) + 1
            assert chosen.sum() == count
            assert row[chosen].min() >= row[~chosen].max() - 1e-6

    def test_all_three_together(self, model, tokenizer, long_text):
        """One certificate for all that is left out."""
        inp, target = long_text
        cage = wrapped(LayerGradientXActivation, model, tokenizer)
        exact = cage.attribute(inp, target, explain=-1)
        found = cage.attribute(
            inp, target, explain=-1, tolerance=0.1, hops=3, sparsify=0.95
        )
        assert_certified(found, exact)

    def test_an_interrupted_sparse_call_goes_on(
        self, model, tokenizer, long_text, calls
    ):
        """Rows that were cut serve a call that cuts the same."""
        inp, target = long_text
        cage = wrapped(FeatureAblation, model, tokenizer)
        expected = cage.attribute(inp, target, sparsify=0.8, strategy="loop")
        whole = len(calls)
        del calls[:]
        calls.stop = whole // 2
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, target, sparsify=0.8, strategy="loop")
        calls.stop = None
        del calls[:]
        found = cage.attribute(inp, target, sparsify=0.8, strategy="loop")
        assert len(calls) < 0.8 * whole
        assert (found.graph.matrix != expected.graph.matrix).nnz == 0
        calls.stop = len(calls) // 2
        del calls[:]
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, target, sparsify=0.8, strategy="loop")
        calls.stop = None
        full = cage.attribute(inp, target, strategy="loop")
        assert full.unresolved == pytest.approx(0, abs=EXACT)
        assert full.graph.matrix.nnz > found.graph.matrix.nnz


@pytest.mark.parametrize("strategy", ["auto", "loop", "fused"])
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("tolerance", -0.1, ValueError, "tolerance: must be a share"),
        ("tolerance", 1.0, ValueError, "0 or more and less than 1"),
        ("tolerance", math.nan, ValueError, "tolerance: must be a share"),
        ("tolerance", "0.1", ValueError, "tolerance: must be a share"),
        ("tolerance", True, ValueError, "tolerance: must be a share"),
        ("tolerance", None, ValueError, "tolerance: must be a share"),
        ("hops", -1, ValueError, "hops: "),
        ("hops", 1.5, TypeError, "hops: "),
        ("hops", True, TypeError, "hops: "),
        ("sparsify", 0.0, ValueError, "sparsify: must be a share"),
        ("sparsify", 1.01, ValueError, "more than 0 and at most 1"),
        ("sparsify", math.nan, ValueError, "sparsify: must be a share"),
        ("sparsify", "all", ValueError, "sparsify: must be a share"),
        ("batch_size", 0, ValueError, "batch_size: "),
        ("batch_size", -3, ValueError, "batch_size: "),
        ("batch_size", 2.0, TypeError, "batch_size: "),
        ("batch_size", "2", TypeError, "batch_size: "),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    model, tokenizer, inp, calls, strategy, argument, value, error, message
):
    """Before any model call, with the argument and what it must be."""
    cage = wrapped(FeatureAblation, model, tokenizer)
    with pytest.raises(error, match=message):
        cage.attribute(inp, TARGET, strategy=strategy, **{argument: value})
    assert calls == []


class TestEnginesRows:
    """How a strategy asks an engine of a user's own."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """Steps of every call of an engine that is registered for `Own`."""
        monkeypatch.setitem(_engines, Own, None)
        found = []

        def rows(task, steps):
            found.append(list(steps))
            P = len(task.sources)
            for step in steps:
                row = np.zeros(task.width)
                row[: P + step] = np.arange(1, P + step + 1)
                yield row

        register_engine(Own, Engine(rows, by_row=True))
        return found

    def test_all_rows_are_asked_for_once_in_order(
        self, model, tokenizer, long_text, asked
    ):
        """In one call."""
        inp, target = long_text
        wrapped(Own, model, tokenizer).attribute(inp, target)
        assert asked == [list(range(len(target)))]

    def test_with_a_tolerance_each_row_is_asked_for_at_most_once(
        self, model, tokenizer, long_text, asked
    ):
        """Ascending within a call, from the explained ones backwards."""
        inp, target = long_text
        result = wrapped(Own, model, tokenizer).attribute(
            inp, target, explain=-1, tolerance=0.3
        )
        steps = [step for some in asked for step in some]
        assert all(some == sorted(some) for some in asked)
        assert asked[0] == [len(target) - 1]
        assert len(steps) == len(set(steps)) == result.rows_computed < len(target)

    def test_an_engine_that_works_by_column_is_asked_once(
        self, model, tokenizer, long_text, asked
    ):
        """For all rows up to the last explained one."""
        inp, target = long_text
        rows = _engines[Own].rows
        register_engine(Own, Engine(rows, by_row=False))
        wrapped(Own, model, tokenizer).attribute(inp, target, explain=3, tolerance=0.3)
        assert asked == [[0, 1, 2, 3]]

    def test_rows_before_an_error_are_kept(
        self, model, tokenizer, long_text, asked, caplog
    ):
        """The next call asks for the rest."""
        inp, target = long_text
        rows = _engines[Own].rows

        def failing(task, steps):
            for step, row in zip(steps, rows(task, steps), strict=True):
                if step == 5:
                    raise OSError("no luck")
                yield row

        register_engine(Own, failing)
        cage = wrapped(Own, model, tokenizer)
        with (
            caplog.at_level(logging.WARNING, "captum_cage"),
            pytest.raises(OSError, match="no luck"),
        ):
            cage.attribute(inp, target)
        assert f"stopped after 5 of {len(target)} rows" in caplog.text
        asked.clear()
        register_engine(Own, rows)
        cage.attribute(inp, target)
        assert asked == [list(range(5, len(target)))]


class TestParts:
    """What the module offers to the rest of the package."""

    def test_a_strategy_without_a_name_of_an_engine_is_the_loop(
        self, model, tokenizer, long_text, monkeypatch
    ):
        """It can leave out rows; an ablation engine cannot."""
        inp, target = long_text
        tasks = []
        monkeypatch.setattr(
            RowStore,
            "add",
            lambda self, step, row: tasks.append((self.task, step, row)),
        )
        monkeypatch.setattr(RowStore, "graph", lambda _: None)
        cage = wrapped(FeatureAblation, model, tokenizer)
        with pytest.raises(AttributeError):
            cage.attribute(inp, target)
        task = tasks[0][0]
        assert [step for _, step, _ in tasks] == list(range(len(target)))
        loop = Strategy(task, "loop", set())
        fused = Strategy(task, "fused", set())
        assert (loop.name, loop.by_row) == ("loop", True)
        assert (fused.name, fused.by_row) == ("fused", False)
        found = dict(fused.rows([3, 1]))
        assert list(found) == [1, 3]
        for step, row in loop.rows([1, 3]):
            assert found[step] == pytest.approx(row, abs=1e-4)

    def test_an_approximation_leaves_out_nothing_by_default(self):
        """Exact unless asked otherwise."""
        assert Approximation() == Approximation(0.0, None, None)


# --- the demo model ----------------------------------------------------------------


@pytest.fixture(scope="module")
def question():
    """A model, a problem, and the exact answer by two methods."""
    model, tokenizer = load_demo()
    problem = sample_problems(1, seed=5)[0]
    inp = TextTokenInput(problem.prompt, tokenizer)
    found = {}
    for method in (FeatureAblation, LayerGradientXActivation):
        cage = wrapped(method, model, tokenizer)
        arguments = {
            "target": problem.completion,
            "explain": problem.answers[0].text,
            "units": {"source": "sentence", "generated": "sentence"},
        }
        exact = cage.attribute(inp, **arguments)
        found[method] = (cage, inp, arguments, exact)
    return found


class TestDemo:
    """A trained model on problems with known dependencies."""

    @pytest.mark.parametrize("method", [FeatureAblation, LayerGradientXActivation])
    @pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.5])
    @pytest.mark.parametrize("sparsify", [None, 0.9])
    @pytest.mark.parametrize("hops", [None, 1])
    def test_the_certificate_holds(self, question, method, tolerance, sparsify, hops):
        """Whatever is left out."""
        cage, inp, arguments, exact = question[method]
        way = "loop" if method is FeatureAblation and tolerance == 0.1 else "auto"
        found = cage.attribute(
            inp,
            tolerance=tolerance,
            sparsify=sparsify,
            hops=hops,
            strategy=way,
            **arguments,
        )
        assert_certified(found, exact)
        if sparsify is None and hops is None:
            mass = len(found.explained)
            assert found.unresolved <= tolerance * mass + EXACT

    def test_tokens_of_the_answer_need_few_rows(self, question):
        """A trained model's mass is where it looks."""
        cage, inp, arguments, _ = question[LayerGradientXActivation]
        arguments = {**arguments, "units": "token"}
        exact = cage.attribute(inp, **arguments)
        found = cage.attribute(inp, tolerance=0.2, **arguments)
        assert found.rows_computed < exact.rows_computed
        assert_certified(found, exact)


def test_a_longer_context_costs_the_loop_no_more_rows(tokenizer):
    """A tolerance saves Captum's calls themselves."""
    model = tiny_model(vocab_size=len(tokenizer))
    cage = wrapped(LayerGradientXActivation, model, tokenizer)
    ids = torch.randint(7, 300, (40,), generator=torch.manual_seed(1)).tolist()
    inp = TokenIdsInput(ids[:10], tokenizer)
    found = cage.attribute(
        inp, ids[10:], explain=-1, hops=0, tolerance=0.5, strategy="loop"
    )
    assert found.rows_computed == 1
