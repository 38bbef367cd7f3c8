"""C-LIME, L-SHAP and ContextCite, against plain passes and fits written out."""

from __future__ import annotations

import math
import sys
from collections import Counter
from functools import cache
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from captum.attr import LLMAttribution, RemoteLLMAttribution, TextTokenInput
from sklearn.linear_model import Lasso
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.engines.sequences import SequenceScorer
from captum_cage.methods.subsets import CLime, ContextCite, LShap
from captum_cage.testing import check_engine
from conftest import PROMPT
from tiny import (
    ARCHITECTURES,
    UNITS_AND_ARCHITECTURES,
    LocalProvider,
    image_input,
    inputs_of_each_kind,
    tiny_model,
    tiny_tokenizer,
)

METHODS = (CLime, LShap, ContextCite)
SHORT = "Ana has 3 pens."
every = pytest.mark.parametrize("method", METHODS)


def answers(model, ids, targets, baseline=0):
    """Log-probability of targets after a text, as a function of absent tokens."""

    @cache
    def scored(absent):
        read = [baseline if i in absent else token for i, token in enumerate(ids)]
        with torch.no_grad():
            logits = model(torch.tensor([[*read, *targets]])).logits[0].double()
        logs = logits.log_softmax(dim=-1)
        return sum(
            float(logs[len(ids) - 1 + place, token])
            for place, token in enumerate(targets)
        )

    return lambda absent: scored(frozenset(absent))


SCALARS = {
    "sum": lambda value, _: value,
    "mean": lambda value, tokens: value / tokens,
    "geometric_mean": lambda value, tokens: math.exp(value / tokens),
    "product": lambda value, _: math.exp(value),
}


def fitted(units, absent, values):
    """Least squares with an intercept, where each size of a set weighs the same."""
    sizes = Counter(len(one) for one in absent)
    lines, right = [], []
    for one, value in zip(absent, values, strict=True):
        weight = math.sqrt(1 / sizes[len(one)])
        line = [1.0, *(float(unit not in one) for unit in range(units))]
        lines.append([weight * entry for entry in line])
        right.append(weight * value)
    return np.linalg.lstsq(np.array(lines), np.array(right), rcond=None)[0][1:]


def neighbours(unit, units, reach):
    """Units at most so far from one."""
    return [i for i in range(units) if i != unit and abs(i - unit) <= reach]


def local_shapley(answer, units, reach):
    """Average over all orders in which a unit and its neighbours go."""
    found = []
    for unit in range(units):
        lost = []
        for order in permutations([unit, *neighbours(unit, units, reach)]):
            gone = frozenset(order[: order.index(unit)])
            lost.append(answer(gone) - answer(gone | {unit}))
        found.append(np.mean(lost))
    return np.array(found)


def of_the_authors(answer, units, reach, most):
    """Marginal effects over binomial coefficients and sizes, as MExGen's code does."""
    found = np.zeros(units)
    for unit in range(units):
        near = neighbours(unit, units, reach)
        for size in range(min(most, len(near)) + 1):
            for gone in combinations(near, size):
                lost = answer(frozenset(gone)) - answer(frozenset(gone) | {unit})
                found[unit] += lost / math.comb(len(near), size) / (most + 1)
    return found


def attributed(method, tokenizer, inp, target, **options):
    """What Captum's object gives without the graph."""
    llm_attr = LLMAttribution(method, tokenizer)
    found = llm_attr.attribute(
        inp,
        target=torch.tensor(target),
        use_cached_outputs=False,
        forward_in_tokens=False,
        **options,
    )
    assert found.token_attr is None
    return found.seq_attr.numpy()


@pytest.fixture(scope="module")
def target(tokenizer):
    """Ids of a generated text."""
    return tokenizer.encode(" Mia has 7. So")


@pytest.fixture
def double(tokenizer):
    """A Llama in float64."""
    return tiny_model("llama", vocab_size=len(tokenizer), dtype=torch.float64)


class TestCLime:
    """A weighted linear fit to texts with few units absent."""

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("scalarizer", SCALARS)
    def test_it_is_the_weighted_fit(self, tokenizer, target, arch, scalarizer):
        """Over the whole text and all sets of one and of two units."""
        model = tiny_model(arch, vocab_size=len(tokenizer))
        ids = tokenizer.encode(SHORT)
        inp = TextTokenInput(SHORT, tokenizer)
        found = attributed(CLime(model), tokenizer, inp, target, scalarizer=scalarizer)
        answer = answers(model, ids, target)
        units = range(len(ids))
        absent = [one for size in range(3) for one in combinations(units, size)]
        scalar = SCALARS[scalarizer]
        values = [scalar(answer(one), len(target)) for one in absent]
        expected = fitted(len(ids), absent, values)
        np.testing.assert_allclose(found, expected, atol=2e-5 * abs(expected).max())

    @pytest.mark.parametrize("most", [1, 3])
    def test_more_or_fewer_units_may_be_absent(self, double, tokenizer, target, most):
        """Alone, or three at a time."""
        ids = tokenizer.encode(SHORT)
        inp = TextTokenInput(SHORT, tokenizer)
        found = attributed(
            CLime(double), tokenizer, inp, target, max_units_replaced=most
        )
        answer = answers(double, ids, target)
        units = range(len(ids))
        absent = [one for size in range(most + 1) for one in combinations(units, size)]
        expected = fitted(len(ids), absent, [answer(one) for one in absent])
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        if most == 1:
            lost = [answer(()) - answer((unit,)) for unit in units]
            np.testing.assert_allclose(found, lost, rtol=1e-5)

    @pytest.mark.parametrize(
        ("units", "oversampling", "most", "expected"),
        [
            (4, 10, 2, [1, 4, 6]),
            (19, 10, 2, [1, 19, 171]),
            (20, 10, 2, [1, 20, 180]),
            (100, 10, 2, [1, 100, 900]),
            (100, 10, 3, [1, 100, 450, 450]),
            (7, 1, 2, [1, 4, 3]),
            (7, 0.5, 2, [1, 2, 2]),
            (8, 2.5, 3, [1, 7, 6, 7]),
            (1, 10, 2, [1, 1]),
        ],
    )
    def test_samples_are_shared_out_as_in_the_authors_code(
        self, model, units, oversampling, most, expected
    ):
        """To each size its part of what is left, from small sizes to large ones."""
        options = {"oversampling": oversampling, "max_units_replaced": most}
        plan = CLime(model).plan(options)
        sets, (numbers,) = plan.absent_sets([units])
        chosen = [sets[number] for number in numbers]
        assert len(set(chosen)) == len(chosen) == len(sets)
        assert all(one == tuple(sorted(set(one))) for one in chosen)
        assert all(unit in range(units) for one in chosen for unit in one)
        sizes = Counter(map(len, chosen))
        assert [sizes[size] for size in sorted(sizes)] == expected

    def test_few_samples_give_the_smallest_coefficients(self, double, tokenizer):
        """Where they do not determine them; a unit that stays in all of them gets 0."""
        inp = TokenIdsInput(list(range(20, 27)), tokenizer)
        plan = CLime(double).plan({"oversampling": 0.5})
        torch.manual_seed(0)
        sets, (numbers,) = plan.absent_sets([7])
        absent = [sets[number] for number in numbers]
        torch.manual_seed(0)
        found = attributed(CLime(double), tokenizer, inp, [9], oversampling=0.5)
        answer = answers(double, list(range(20, 27)), [9])
        values = np.array([answer(one) for one in absent])
        sizes = np.bincount([len(one) for one in absent])
        weights = np.sqrt([1 / sizes[len(one)] for one in absent])
        present = np.array([[i not in one for i in range(7)] for one in absent], float)
        centred = present - np.average(present, axis=0, weights=weights**2)
        right = values - np.average(values, weights=weights**2)
        expected = np.linalg.lstsq(
            weights[:, None] * centred, weights * right, rcond=1e-10
        )[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        never = [i for i in range(7) if not any(i in one for one in absent)]
        assert never
        assert (found[never] == 0).all()

    def test_sets_are_drawn_uniformly(self, model):
        """Each pair as often as any other, in the longest row and in shorter ones."""
        plan = CLime(model).plan({"oversampling": 2})
        counts = {8: Counter(), 6: Counter()}
        repeats = 400
        torch.manual_seed(0)
        for _ in range(repeats):
            sets, rows = plan.absent_sets([8, 6])
            for units, numbers in zip(counts, rows, strict=True):
                pairs = [sets[i] for i in numbers if len(sets[i]) == 2]
                counts[units].update(pairs)
                assert len(pairs) == units
        for units, counted in counts.items():
            total = math.comb(units, 2)
            expected = repeats * units / total
            assert len(counted) == total
            error = math.sqrt(expected * (1 - units / total))
            assert all(abs(c - expected) < 5 * error for c in counted.values())

    def test_rows_share_their_sets(self, model):
        """All rows together need half as many again as the longest alone."""
        plan = CLime(model).plan({})
        sets, rows = plan.absent_sets(range(60, 121))
        assert len(rows[-1]) == 1 + 10 * 120
        assert len(sets) == len(set(sets)) < 1.6 * len(rows[-1])
        for units, numbers in zip(range(60, 121), rows, strict=True):
            assert len(set(numbers.tolist())) == 1 + 10 * units

    def test_too_many_sets_are_refused(self, model):
        """Before memory runs out."""
        plan = CLime(model).plan({"max_units_replaced": 5})
        with pytest.raises(ValueError, match="max_units_replaced: must leave at most"):
            plan.absent_sets([1000])


class TestLShap:
    """Shapley values among neighbours."""

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("scalarizer", SCALARS)
    def test_it_is_what_the_authors_code_computes(
        self, tokenizer, target, arch, scalarizer
    ):
        """With at most two of four neighbours absent."""
        model = tiny_model(arch, vocab_size=len(tokenizer))
        ids = tokenizer.encode(SHORT)
        inp = TextTokenInput(SHORT, tokenizer)
        found = attributed(LShap(model), tokenizer, inp, target, scalarizer=scalarizer)
        answer, scalar = answers(model, ids, target), SCALARS[scalarizer]
        expected = of_the_authors(
            lambda gone: scalar(answer(gone), len(target)), len(ids), 2, 2
        )
        np.testing.assert_allclose(found, expected, atol=2e-5 * abs(expected).max())

    @pytest.mark.parametrize("reach", [0, 1, 2])
    def test_all_sets_give_exact_shapley_values(self, double, tokenizer, target, reach):
        """Of the game of a unit and its neighbours, in all orders."""
        ids = tokenizer.encode(SHORT)
        inp = TextTokenInput(SHORT, tokenizer)
        expected = local_shapley(answers(double, ids, target), len(ids), reach)
        for most in (None, 2 * reach, 2 * reach + 3):
            options = {"neighbors": reach, "max_units_replaced": most}
            found = attributed(LShap(double), tokenizer, inp, target, **options)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    def test_one_unit_gets_all_that_is_lost(self, double, tokenizer):
        """Not a third of it, as in the authors' code."""
        inp = TokenIdsInput([9], tokenizer)
        answer = answers(double, [9], [5])
        (found,) = attributed(LShap(double), tokenizer, inp, [5])
        assert found == pytest.approx(answer(()) - answer((0,)), rel=1e-5)

    def test_each_set_is_scored_once_for_all_rows(
        self, model, tokenizer, target, monkeypatch
    ):
        """As many as there are sets of two neighbours, with and without a unit."""
        asked = spied(monkeypatch)
        cage = GraphContextAttribution(LLMAttribution(LShap(model), tokenizer))
        result = cage.attribute(TextTokenInput(SHORT, tokenizer), target)
        units = len(result.units) - 1
        games = {
            frozenset(gone) | own
            for unit in range(units)
            for size in range(3)
            for gone in combinations(neighbours(unit, units, 2), size)
            for own in (set(), {unit})
        }
        assert len(asked) == len(games) < 9 * units


class TestContextCite:
    """A Lasso on the logit of a response's probability."""

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    @pytest.mark.parametrize("alpha", [0.01, 0.002])
    def test_it_is_the_authors_pipeline(self, tokenizer, target, arch, alpha):
        """Standardised, divided by the number of tokens, and scaled back."""
        model = tiny_model(arch, vocab_size=len(tokenizer))
        ids = tokenizer.encode(SHORT)
        inp = TextTokenInput(SHORT, tokenizer)
        options = {"n_samples": 40, "alpha": alpha}
        torch.manual_seed(3)
        sets, _ = ContextCite(model).plan(options).absent_sets([len(ids)])
        torch.manual_seed(3)
        found = attributed(ContextCite(model), tokenizer, inp, target, **options)
        present = np.array([[i not in one for i in range(len(ids))] for one in sets])
        answer = answers(model, ids, target)
        p = np.exp([answer(one) for one in sets])
        scaler, lasso = StandardScaler(), Lasso(alpha=alpha)
        logits = (np.log(p) - np.log(1 - p)) / len(target)
        make_pipeline(scaler, lasso).fit(present, logits)
        expected = lasso.coef_ / scaler.scale_ * len(target)
        assert (expected != 0).any()
        np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max())

    def test_units_are_absent_by_a_fair_coin(self, model):
        """Each by its own; rows see the same coins."""
        torch.manual_seed(0)
        plan = ContextCite(model).plan({"n_samples": 2000})
        sets, rows = plan.absent_sets([3, 5])
        assert [len(numbers) for numbers in rows] == [2000, 2000]
        absent = np.array([[i in one for i in range(5)] for one in sets], dtype=float)
        assert abs(absent.mean(axis=0) - 0.5).max() < 0.05
        correlations = np.corrcoef(absent.T) - np.eye(5)
        assert abs(correlations).max() < 0.1

    def test_a_certain_response_has_a_finite_logit(
        self, fresh_model, tokenizer, monkeypatch
    ):
        """Probability 1 counts as the largest below it; its row is 0."""
        head = fresh_model.get_output_embeddings()
        forward = type(head).forward

        def certain(self, states):
            logits = forward(self, states)
            logits[..., 9] += 1e4
            return logits

        monkeypatch.setattr(type(head), "forward", certain)
        inp = TextTokenInput(SHORT, tokenizer)
        found = attributed(ContextCite(fresh_model), tokenizer, inp, [9])
        assert (found == 0).all()

    @pytest.mark.parametrize("p", [1e-30, 0.3, 0.5, 0.7, 0.999999])
    def test_logits_are_stable(self, model, p):
        """For probabilities next to 0 and next to 1; one unit, present or absent."""
        plan = ContextCite(model).plan({"alpha": 1e-9})
        logs = np.array([math.log(p), math.log(0.5)])
        (found,) = plan.fit(1, [(), (0,)], logs, 1)
        assert found == pytest.approx(math.log(p) - math.log1p(-p), rel=1e-4)

    def test_scikit_learn_is_asked_for(self, model, tokenizer, monkeypatch):
        """The error says how it is installed."""
        monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
        inp = TextTokenInput(SHORT, tokenizer)
        with pytest.raises(ImportError, match=r"pip install captum-cage\[sklearn\]"):
            attributed(ContextCite(model), tokenizer, inp, [9])

    @pytest.mark.parametrize("strategy", ["loop", "auto"])
    def test_probabilities_are_refused(self, model, tokenizer, strategy):
        """It makes logits of log-probabilities."""
        llm_attr = LLMAttribution(ContextCite(model), tokenizer, attr_target="prob")
        cage = GraphContextAttribution(llm_attr)
        inp = TextTokenInput(SHORT, tokenizer)
        with pytest.raises(ValueError, match="attr_target: must be 'log_prob'"):
            cage.attribute(inp, [5, 7], strategy=strategy)

    def test_log_probabilities_that_are_none_are_named(self, fresh_model, tokenizer):
        """A model with NaN weights is at fault, not the method."""
        next(fresh_model.parameters()).data.fill_(torch.nan)
        inp = TextTokenInput(SHORT, tokenizer)
        with pytest.raises(ValueError, match="needs finite log-probabilities"):
            attributed(ContextCite(fresh_model), tokenizer, inp, [9])


class TestEveryMethod:
    """What the three share."""

    @every
    def test_units_that_are_never_absent_are_no_features(
        self, double, tokenizer, target, method
    ):
        """They get 0, and the others what they get beside a fixed token."""
        ids = tokenizer.encode(SHORT)
        mask = [i not in (1, 3) for i in range(len(ids))]
        torch.manual_seed(0)
        fixed = TokenIdsInput(ids, tokenizer, feature_mask=mask)
        expected = attributed(method(double), tokenizer, fixed, target)
        torch.manual_seed(0)
        inp = TokenIdsInput(ids, tokenizer)
        # Beyond the row nothing is meant.
        found = attributed(
            method(double), tokenizer, inp, target, never_perturb={3, 1, 99}
        )
        assert (found[[1, 3]] == 0).all()
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(found[mask], expected, rtol=1e-6)

    @every
    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    def test_no_text_lacks_a_unit_that_is_never_absent(
        self, model, tokenizer, target, method, strategy, monkeypatch
    ):
        """Source units count first, then generated ones."""
        read = []
        to_model_input = TextTokenInput.to_model_input
        prompt = tokenizer.encode(SHORT)

        forward = type(model).forward

        def recorded(self, *args, **kwargs):
            read.extend(kwargs["input_ids"].tolist())
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", recorded)
        llm_attr = LLMAttribution(method(model), tokenizer)
        cage = GraphContextAttribution(llm_attr, generated_baseline=1)
        fixed = [2, len(prompt) + 1]
        result = cage.attribute(
            TextTokenInput(SHORT, tokenizer, baselines=0),
            target,
            strategy=strategy,
            batch_size=1,
            never_perturb=fixed,
        )
        assert (result.graph.rows[:, fixed] == 0).all()
        assert TextTokenInput.to_model_input is to_model_input
        whole = [*prompt, *target]
        for unit in fixed:
            texts = [text for text in read if len(text) > unit]
            lacking = [text for text in texts if text[unit] in (0, 1)]
            # A pass that starts behind the unit reads other tokens at its place.
            lacking = [text for text in lacking if text[0] == whole[0]]
            assert not lacking

    @every
    def test_nothing_is_left_where_all_units_stay(
        self, model, tokenizer, target, method
    ):
        """All rows are zero; no error."""
        cage = GraphContextAttribution(LLMAttribution(method(model), tokenizer))
        inp = TextTokenInput(SHORT, tokenizer)
        for strategy in ("loop", "fused"):
            result = cage.attribute(
                inp, target, strategy=strategy, never_perturb=range(99)
            )
            assert (result.graph.rows == 0).all()

    @every
    def test_where_nothing_changes_nothing_is_attributed(
        self, model, tokenizer, method
    ):
        """Exactly 0, and not rounding that normalisation would blow up."""
        cage = GraphContextAttribution(
            LLMAttribution(method(model), tokenizer), generated_baseline=20
        )
        inp = TokenIdsInput([20] * 5, tokenizer, baselines=20)
        for strategy in ("loop", "fused"):
            result = cage.attribute(inp, [20] * 4, strategy=strategy)
            assert (result.graph.rows == 0).all()

    @every
    def test_one_source_unit_is_enough(self, model, tokenizer, target, method):
        """By the loop and by the engine, though Captum's Lime needs two."""
        cage = GraphContextAttribution(LLMAttribution(method(model), tokenizer))
        inp = TextTokenInput(SHORT, tokenizer)
        for strategy in ("loop", "fused"):
            result = cage.attribute(inp, target, units="sentence", strategy=strategy)
            assert result.graph.rows[0, 0] != 0

    @every
    def test_the_user_seeds_it(self, model, tokenizer, target, method):
        """By torch's generator; what draws nothing leaves it as it was."""
        inp = TextTokenInput(PROMPT, tokenizer)
        cage = GraphContextAttribution(LLMAttribution(method(model), tokenizer))
        options = {"oversampling": 2} if method is CLime else {}
        rows = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            result = cage.attribute(inp, target, strategy="fused", **options)
            rows.append(result.graph.rows)
            drew = not torch.equal(before, torch.get_rng_state())
            assert drew == (method is not LShap)
        assert (rows[0] == rows[1]).all()
        assert (rows[0] == rows[2]).all() == (method is LShap)

    @every
    @pytest.mark.parametrize("kind", inputs_of_each_kind(tiny_tokenizer(), SHORT))
    def test_of_every_input(self, model, tokenizer, target, method, kind):
        """Templates too; the engine takes them all."""
        inp = inputs_of_each_kind(tokenizer, SHORT)[kind]
        llm_attr = LLMAttribution(method(model), tokenizer)
        repeats = 1 if method is LShap else 8
        more = {"n_samples": 10} if method is ContextCite else {}
        if method is CLime and inp.n_itp_features < 8:
            repeats = 1
        check_engine(llm_attr, inp, target[:3], repeats=repeats, units="word", **more)

    @pytest.mark.parametrize("method", [CLime, LShap])
    def test_images(self, vision_model, tokenizer, method):
        """Units are explained whole, or token by token where that adds up."""
        llm_attr = LLMAttribution(method(vision_model), tokenizer)
        inp = image_input(tokenizer)
        target = tokenizer.encode("Ana has.")
        check_engine(llm_attr, inp, target, units="word")
        check_engine(llm_attr, inp, target, scalarizer="product")
        result = GraphContextAttribution(llm_attr).attribute(
            inp, target, units="sentence", scalarizer="product"
        )
        assert result.meta["strategy"] == "loop"

    @every
    def test_a_remote_model_is_asked_text_by_text(self, model, tokenizer, method):
        """By the loop."""
        provider = LocalProvider(model, tokenizer)
        remote = RemoteLLMAttribution(method(model), tokenizer, provider)
        result = GraphContextAttribution(remote).attribute(
            TextTokenInput(SHORT, tokenizer), " Mia has", units="word"
        )
        assert result.meta["strategy"] == "loop"
        assert result.graph.rows[0].any()
        assert len(provider.prompts) > 5

    @every
    def test_a_repeated_call_goes_on_from_what_was_finished(
        self, model, tokenizer, target, method, monkeypatch
    ):
        """After an interrupt, few passes are made twice, of the same draws."""
        passes = []
        stop = [None]
        forward = type(model).forward

        def recorded(self, *args, **kwargs):
            passes.append(kwargs["input_ids"].shape)
            if len(passes) == stop[0]:
                raise KeyboardInterrupt
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", recorded)
        inp = TextTokenInput(SHORT, tokenizer)
        cage = GraphContextAttribution(LLMAttribution(method(model), tokenizer))
        arguments = {"strategy": "fused", "batch_size": 1}
        torch.manual_seed(0)
        expected = cage.attribute(inp, target, **arguments).graph.rows
        whole = len(passes)
        passes.clear()
        stop[0] = whole * 2 // 3
        torch.manual_seed(0)
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, target, **arguments)
        stop[0] = None
        found = cage.attribute(inp, target, **arguments).graph.rows
        assert len(passes) <= whole + 4
        np.testing.assert_allclose(found, expected, atol=1e-4)

    @every
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"never_perturb": [-1]}, ValueError, "never_perturb: must be 0 or more"),
            ({"never_perturb": [1.5]}, TypeError, "never_perturb: must be a whole"),
            ({"never_perturb": 3}, TypeError, "never_perturb: must be numbers of"),
            ({"never_perturb": "12"}, TypeError, "never_perturb: must be numbers of"),
        ],
    )
    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    def test_units_are_given_by_number(
        self, model, tokenizer, method, options, error, message, strategy
    ):
        """Anything else is refused."""
        cage = GraphContextAttribution(LLMAttribution(method(model), tokenizer))
        with pytest.raises(error, match=message):
            cage.attribute(
                TextTokenInput(SHORT, tokenizer), [5], strategy=strategy, **options
            )

    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            (CLime, {"scalarizer": "max"}, "scalarizer: must be one of 'sum'"),
            (LShap, {"scalarizer": None}, "scalarizer: must be one of 'sum'"),
            (CLime, {"oversampling": 0}, "oversampling: must be a number of samples"),
            (CLime, {"oversampling": "10"}, "oversampling: must be a number"),
            (CLime, {"oversampling": True}, "oversampling: must be a number"),
            (CLime, {"max_units_replaced": 0}, "max_units_replaced: must be 1 or"),
            (CLime, {"max_units_replaced": None}, "max_units_replaced: must be a wh"),
            (LShap, {"max_units_replaced": -1}, "max_units_replaced: must be 0 or"),
            (LShap, {"neighbors": -1}, "neighbors: must be 0 or more"),
            (LShap, {"neighbors": 1.5}, "neighbors: must be a whole number"),
            (ContextCite, {"n_samples": 0}, "n_samples: must be 1 or more"),
            (ContextCite, {"alpha": 0}, "alpha: must be the weight"),
            (ContextCite, {"alpha": None}, "alpha: must be the weight"),
        ],
    )
    def test_arguments_are_checked(self, model, tokenizer, method, options, message):
        """Each has its own error."""
        inp = TextTokenInput(SHORT, tokenizer)
        with pytest.raises((TypeError, ValueError), match=message):
            attributed(method(model), tokenizer, inp, [5], **options)


class TestProbabilities:
    """Where Captum attributes probabilities."""

    @pytest.mark.parametrize("method", [CLime, LShap])
    @pytest.mark.parametrize("units", ["token", "sentence"])
    def test_they_are_what_products_of_probabilities_are(
        self, double, tokenizer, target, method, units
    ):
        """The same rows, by the loop and by the engine."""
        inp = TextTokenInput(SHORT, tokenizer)
        of_logs = LLMAttribution(method(double), tokenizer)
        of_probs = LLMAttribution(method(double), tokenizer, attr_target="prob")
        check_engine(of_probs, inp, target, units=units)
        rows = [
            GraphContextAttribution(of_logs)
            .attribute(inp, target, units=units, scalarizer="product")
            .graph.rows,
            GraphContextAttribution(of_probs)
            .attribute(inp, target, units=units)
            .graph.rows,
        ]
        np.testing.assert_allclose(*rows, rtol=1e-8)

    @pytest.mark.parametrize("method", [CLime, LShap])
    @pytest.mark.parametrize("strategy", ["loop", "auto"])
    def test_nothing_else_is_made_of_them(self, model, tokenizer, method, strategy):
        """A mean of log-probabilities needs log-probabilities."""
        llm_attr = LLMAttribution(method(model), tokenizer, attr_target="prob")
        cage = GraphContextAttribution(llm_attr)
        with pytest.raises(ValueError, match="scalarizer: must be 'sum'"):
            cage.attribute(
                TextTokenInput(SHORT, tokenizer),
                [5],
                strategy=strategy,
                scalarizer="mean",
            )


class TestEngine:
    """All rows at once are the loop's."""

    @pytest.mark.parametrize(
        ("units", "arch", "dtype"),
        [
            *((*both, torch.float64) for both in UNITS_AND_ARCHITECTURES),
            ("token", "llama", torch.float32),
            ("sentence", "gemma3", torch.float32),
        ],
    )
    @pytest.mark.parametrize("method", [CLime, LShap])
    def test_rows_are_the_loop_s(self, tokenizer, target, method, arch, units, dtype):
        """To 1e-5 of the largest entry in float32, to 1e-10 in float64."""
        model = tiny_model(arch, vocab_size=len(tokenizer), dtype=dtype)
        llm_attr = LLMAttribution(method(model), tokenizer)
        text = SHORT + (" Mia has 4." if units == "sentence" else "")
        check_engine(llm_attr, TextTokenInput(text, tokenizer), target[:5], units=units)

    @pytest.mark.parametrize("scalarizer", SCALARS)
    @pytest.mark.parametrize("method", [CLime, LShap])
    def test_of_each_scalarizer(self, double, tokenizer, target, method, scalarizer):
        """A unit's number of tokens is its own."""
        llm_attr = LLMAttribution(method(double), tokenizer)
        inp = TextTokenInput(SHORT, tokenizer)
        options = {"scalarizer": scalarizer, "never_perturb": [0, 2, 4]}
        check_engine(llm_attr, inp, target, units="word", **options)

    @pytest.mark.parametrize("units", ["token", "word", "sentence"])
    def test_sampled_fits_have_the_same_distribution(self, model, tokenizer, units):
        """Of sets that are drawn for all rows at once."""
        llm_attr = LLMAttribution(CLime(model), tokenizer)
        inp = TextTokenInput(SHORT, tokenizer)
        # A sentence is one row, so it may be longer.
        target = tokenizer.encode(" Mia has" + " 7" * (units == "sentence"))
        options = {"oversampling": 2, "repeats": 16, "units": units}
        check_engine(llm_attr, inp, target, **options)

    @pytest.mark.parametrize("units", ["token", "word", "sentence"])
    def test_sparse_fits_have_the_same_distribution(self, model, tokenizer, units):
        """Units of several tokens are present in their own rows."""
        llm_attr = LLMAttribution(ContextCite(model), tokenizer)
        inp = TextTokenInput(SHORT, tokenizer)
        # A sentence is one row, so it may be longer.
        target = tokenizer.encode(" Mia has" + " 7" * (units == "sentence"))
        options = {"n_samples": 16, "repeats": 16, "units": units}
        check_engine(llm_attr, inp, target, **options)

    def test_rows_of_the_same_ablations_are_the_loop_s(
        self, double, tokenizer, target, monkeypatch
    ):
        """With the same coins for each row there is no other difference."""
        coins = torch.randint(
            0, 2, (32, 40), generator=torch.Generator().manual_seed(0)
        )
        monkeypatch.setattr(torch, "randint", lambda *_: coins[:, : _[2][1]])
        llm_attr = LLMAttribution(ContextCite(double), tokenizer)
        inp = TextTokenInput(SHORT, tokenizer)
        for units in ("token", "word", "sentence"):
            options = {"n_samples": 32, "units": units, "tolerance": 1e-4}
            check_engine(llm_attr, inp, target, **options)

    @every
    def test_trials_are_averaged(self, model, tokenizer, target, method):
        """Each has draws of its own."""
        llm_attr = LLMAttribution(method(model), tokenizer)
        inp = TextTokenInput(SHORT, tokenizer)
        if method is LShap:
            check_engine(llm_attr, inp, target[:4], num_trials=3)
            return
        options = {"oversampling": 2} if method is CLime else {"n_samples": 16}
        cage = GraphContextAttribution(llm_attr)
        torch.manual_seed(0)
        many = cage.attribute(inp, target, num_trials=3, **options).graph.rows
        torch.manual_seed(0)
        each = [cage.attribute(inp, target, **options).graph.rows for _ in range(3)]
        np.testing.assert_allclose(many, np.mean(each, axis=0), atol=1e-4)

    @every
    def test_some_rows_are_those_of_all_rows(self, model, tokenizer, target, method):
        """Where a tolerance leaves the last ones out."""
        llm_attr = LLMAttribution(method(model), tokenizer)
        inp = TextTokenInput(SHORT, tokenizer)
        cage = GraphContextAttribution(llm_attr)
        some = cage.attribute(inp, target, explain=2, tolerance=0.01).graph.rows
        assert some[:3].any(axis=1).all()
        assert not some[3:].any()

    @every
    def test_what_it_cannot_do_is_left_to_the_loop(self, model, tokenizer, method):
        """Another class, whose rows may be others."""

        class Mine(method):
            pass

        llm_attr = LLMAttribution(Mine(model), tokenizer)
        cage = GraphContextAttribution(llm_attr)
        with pytest.raises(ValueError, match="Mine has no engine"):
            cage.attribute(TextTokenInput(SHORT, tokenizer), [5], strategy="fused")


def spied(monkeypatch):
    """The perturbations that a scorer is asked for."""
    asked = []
    scores = SequenceScorer.scores

    def recorded(self, perturbations):
        some = list(perturbations)
        asked.extend(some)
        return scores(self, some)

    monkeypatch.setattr(SequenceScorer, "scores", recorded)
    return asked
