"""Scores of attributions of toy games, against their papers written out slowly."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import captum.metrics
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from captum_cage.metrics import METRICS, Score, by_position, ranked
from captum_cage.metrics.scores import Probe, shuffled

Game = Callable[[frozenset[int], int], float]
ORDERED = ("deletion", "insertion", "rise", "mas")
HIGHEST = ("comprehensiveness", "eraser-sufficiency", "necessity", "sufficiency")
every_metric = pytest.mark.parametrize("name", list(METRICS))


def probe_of(
    game: Game, scores: Sequence[float], samples: int = 1, **options
) -> tuple[Probe, list[frozenset[int]]]:
    """An attribution under test, and the sets of kept sources as it asks for them."""
    asked: list[frozenset[int]] = []

    def values(kept):
        sets = [frozenset(np.flatnonzero(row).tolist()) for row in kept]
        asked.extend(sets)
        return np.array(
            [[game(one, number) for number in range(samples)] for one in sets]
        )

    options = {"sizes": np.ones(len(scores)), "is_log": False, **options}
    return Probe(np.array(scores, dtype=float), samples=values, **options), asked


@st.composite
def games(draw, samples=1):
    """A game with interactions and a value of its own for each sample, and scores."""
    size = draw(st.integers(2, 7))
    number = st.integers(-8, 8)
    alone = draw(st.lists(number, min_size=size, max_size=size))
    pairs = draw(
        st.dictionaries(
            st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)),
            number,
            max_size=4,
        )
    )
    noise = draw(st.lists(number, min_size=samples, max_size=samples))
    scores = draw(st.lists(st.integers(-3, 5), min_size=size, max_size=size))

    def game(kept, sample):
        value = sum(alone[i] for i in kept)
        value += sum(size for (i, j), size in pairs.items() if {i, j} <= kept)
        return (value + noise[sample] * len(kept) % 5) / 16 - 6

    return game, scores


# --- the papers ----------------------------------------------------------------------


def first_to_last(scores, seed=0):
    """Highest first, ties by a permutation of the seed."""
    tie = np.random.default_rng(seed).permutation(len(scores)).tolist()
    return sorted(range(len(scores)), key=lambda i: (-scores[i], tie[i]))


def deleted(game, scores, sample=0, seed=0):
    """Values as the highest go one by one, as a list."""
    left, found = set(range(len(scores))), []
    found.append(game(frozenset(left), sample))
    for source in first_to_last(scores, seed):
        left.remove(source)
        found.append(game(frozenset(left), sample))
    return found


def inserted(game, scores, sample=0, seed=0):
    """Values as the highest come one by one, as a list."""
    there, found = set(), [game(frozenset(), sample)]
    for source in first_to_last(scores, seed):
        there.add(source)
        found.append(game(frozenset(there), sample))
    return found


def auc(values):
    """The formula of the authors' code."""
    steps = len(values) - 1
    return (sum(values) - values[0] / 2 - values[-1] / 2) / steps


def scaled(curve):
    """``n_i``: scaled by the ends, clipped, a running minimum."""
    span = abs(curve[0] - curve[-1])
    if span == 0:  # 0 / 0 is no new minimum, less than nothing is
        steep = [float(one >= curve[-1]) for one in curve]
    else:
        steep = [min(max((one - curve[-1]) / span, 0.0), 1.0) for one in curve]
    return [min(steep[: i + 1]) for i in range(len(steep))]


def aligned(curve, scores):
    """MAS of a curve."""
    whole = sum(scores)
    if whole == 0:
        return 0.5
    left, share = 1.0, [1.0]
    for source in first_to_last(scores):
        left -= scores[source] / whole
        share.append(left)
    heights = scaled(curve)
    total = [
        min(max(n + abs(n - d), 0.0), 1.0) for n, d in zip(heights, share, strict=True)
    ]
    low, high = min(total), max(total)
    if high == low:
        return 0.5
    return auc([(one - low) / (high - low) for one in total])


def shares_of(scores):
    """ERASER's numbers of highest sources."""
    shares = [Fraction(1, 100), Fraction(5, 100), Fraction(1, 10), Fraction(2, 10)]
    return [math.ceil(one * len(scores)) for one in (*shares, Fraction(1, 2))]


def comprehensive(game, scores, remains):
    """Mean loss of what remains, a value at a time."""
    order, whole = first_to_last(scores), game(frozenset(range(len(scores))), 0)
    lost = []
    for count in shares_of(scores):
        top, rest = frozenset(order[:count]), frozenset(order[count:])
        lost.append(whole - game(rest if remains == "rest" else top, 0))
    return sum(lost) / len(lost)


# --- ties ----------------------------------------------------------------------------


class TestRanked:
    """The highest first."""

    @given(st.lists(st.integers(-2, 2), max_size=9), st.integers(0, 99))
    def test_ties_are_broken_by_a_permutation_of_the_seed(self, scores, seed):
        """The same for all attributions of as many sources."""
        assert ranked(scores, seed).tolist() == first_to_last(scores, seed)

    def test_no_position_is_favoured(self):
        """Of equal scores each is as often first, and as often last."""
        orders = [ranked([0.5, 2.0, 0.5, 0.5], seed).tolist() for seed in range(1500)]
        assert {order[0] for order in orders} == {1}
        for place in (1, 2, 3):
            for source in (0, 2, 3):
                count = sum(order[place] == source for order in orders)
                assert 430 < count < 570, (place, source)  # within four deviations

    def test_nothing_and_minus_nothing_are_equal(self):
        """The sign of a zero is no order."""
        assert ranked([0.0, -0.0, 0.0]).tolist() == ranked([-0.0, 0.0, 0.0]).tolist()

    def test_a_constant_shift_changes_nothing(self):
        """Only the order of scores counts."""
        scores = [3.0, 1.0, 3.0, 2.0]
        assert ranked(np.array(scores) - 7).tolist() == ranked(scores).tolist()


# --- each metric ---------------------------------------------------------------------


class TestPapers:
    """Each metric is that of its paper."""

    @given(games())
    def test_areas_are_those_of_the_curves(self, case):
        """Deletion and insertion, without any scaling."""
        probe, _ = probe_of(*case)
        game, scores = case
        found = METRICS["deletion"].function(probe)
        assert found.value == pytest.approx(auc(deleted(game, scores)))
        assert math.isnan(found.standard_error)
        found = METRICS["insertion"].function(probe)
        assert found.value == pytest.approx(auc(inserted(game, scores)))

    @given(games())
    def test_rise_and_mas_are_as_the_code_of_cage_scores_them(self, case):
        """From the deletion curve, whichever way it runs."""
        probe, _ = probe_of(*case)
        game, scores = case
        curve = deleted(game, scores)
        found = METRICS["rise"].function(probe).value
        assert found == pytest.approx(auc(scaled(curve)))
        found = METRICS["mas"].function(probe).value
        assert found == pytest.approx(aligned(curve, scores), abs=1e-9)

    @pytest.mark.parametrize("is_log", [False, True])
    @given(case=games())
    def test_eraser_takes_five_shares_of_the_probability(self, is_log, case):
        """Values that are logarithms are made probabilities first."""
        game, scores = case
        probe, _ = probe_of(game, scores, is_log=is_log)

        def share(kept, sample):
            value = game(kept, sample)
            return math.exp(value) if is_log else value

        found = METRICS["comprehensiveness"].function(probe).value
        assert found == pytest.approx(comprehensive(share, scores, "rest"))
        found = METRICS["eraser-sufficiency"].function(probe).value
        assert found == pytest.approx(comprehensive(share, scores, "top"))

    @pytest.mark.parametrize("size", [1, 2, 7, 10, 19, 20, 40, 100])
    def test_eraser_rounds_up(self, size):
        """At least one source is taken, and no more than the share."""
        probe, asked = probe_of(lambda kept, _: len(kept), list(range(size, 0, -1)))
        METRICS["comprehensiveness"].function(probe)
        expected = [size, *(size - count for count in shares_of(range(size)))]
        assert [len(one) for one in asked] == expected

    @given(games(), st.integers(1, 2))
    def test_necessity_and_sufficiency_take_the_highest(self, case, top):
        """What is lost without them, and what is held with them alone."""
        game, scores = case
        probe, _ = probe_of(game, scores, top=top)
        order, whole = first_to_last(scores), game(frozenset(range(len(scores))), 0)
        found = METRICS["necessity"].function(probe).value
        assert found == pytest.approx(whole - game(frozenset(order[top:]), 0))
        found = METRICS["sufficiency"].function(probe).value
        assert found == pytest.approx(game(frozenset(order[:top]), 0) - whole)

    @given(games())
    def test_lds_is_a_rank_correlation_over_random_sets(self, case):
        """Of values with sums of scores; 0 where one of them is constant."""
        game, scores = case
        probe, asked = probe_of(game, scores, masks=16)
        found = METRICS["lds"].function(probe).value
        assert len(asked) == 16
        sums = [sum(scores[i] for i in kept) for kept in asked]
        values = [game(kept, 0) for kept in asked]
        expected = 0.0
        if len(set(sums)) > 1 and len(set(values)) > 1:
            expected = spearmanr(sums, values).statistic
        assert found == pytest.approx(expected, abs=1e-9)

    @given(games())
    def test_infidelity_is_that_of_captum(self, case):
        """With the same random sets, scores scaled to fit."""
        game, scores = case
        probe, asked = probe_of(game, scores, masks=16)
        found = METRICS["infidelity"].function(probe)
        sets = [kept for kept in asked if len(kept) < len(scores)]
        sets += [frozenset(range(len(scores)))] * (16 - len(sets))
        there = torch.tensor(
            [[float(i in kept) for i in range(len(scores))] for kept in sets],
            dtype=torch.float64,
        )

        def values(rows):
            sets = [frozenset(row.nonzero().flatten().tolist()) for row in rows]
            return torch.tensor([game(one, 0) for one in sets], dtype=torch.float64)

        expected = captum.metrics.infidelity(
            values,
            lambda rows: (rows - there, there),
            torch.ones((1, len(scores)), dtype=torch.float64),
            torch.tensor([scores], dtype=torch.float64),
            n_perturb_samples=16,
            normalize=True,
        )
        assert found.value == pytest.approx(float(expected), abs=1e-9)

    def test_random_sets_toss_a_coin_for_each_source(self):
        """The same for all attributions with one seed, others with another."""
        drawn = []
        for scores, seed in (([1, 2, 3], 0), ([3, 1, 2], 0), ([1, 2, 3], 1)):
            probe, asked = probe_of(
                lambda kept, _: len(kept), scores, masks=2000, seed=seed
            )
            METRICS["lds"].function(probe)
            drawn.append(asked)
        assert drawn[0] == drawn[1]
        assert drawn[0] != drawn[2]
        every = [
            frozenset(c) for n in range(4) for c in itertools.combinations(range(3), n)
        ]
        for kept in every:
            assert 190 < drawn[0].count(kept) < 310  # an eighth, four deviations


# --- errors --------------------------------------------------------------------------


class TestErrors:
    """Standard errors are jackknifed, by hand here."""

    @pytest.mark.parametrize("name", [*ORDERED, *HIGHEST])
    @given(case=games(samples=3))
    def test_over_samples(self, name, case):
        """The statistic of the mean curve, with a sample left out at a time."""
        game, scores = case
        probe, _ = probe_of(game, scores, samples=3)
        found = METRICS[name].function(probe)

        def of_samples(*chosen):
            alone, _ = probe_of(
                lambda kept, _: sum(game(kept, one) for one in chosen) / len(chosen),
                scores,
            )
            return METRICS[name].function(alone).value

        assert found.value == pytest.approx(of_samples(0, 1, 2), abs=1e-9)
        left = [of_samples(1, 2), of_samples(0, 2), of_samples(0, 1)]
        middle = sum(left) / 3
        error = math.sqrt(2 / 3 * sum((one - middle) ** 2 for one in left))
        assert found.standard_error == pytest.approx(error, abs=1e-7)

    @given(games(samples=2))
    def test_over_random_sets(self, case):
        """Of the rank correlation, with a set left out at a time."""
        game, scores = case
        probe, asked = probe_of(game, scores, samples=2, masks=6)
        found = METRICS["lds"].function(probe)
        sums = [sum(scores[i] for i in kept) for kept in asked]
        values = [(game(kept, 0) + game(kept, 1)) / 2 for kept in asked]
        left = []
        for out in range(6):
            one = [x for i, x in enumerate(sums) if i != out]
            other = [x for i, x in enumerate(values) if i != out]
            constant = len(set(one)) == 1 or len(set(other)) == 1
            left.append(0.0 if constant else spearmanr(one, other).statistic)
        middle = sum(left) / 6
        error = math.sqrt(5 / 6 * sum((one - middle) ** 2 for one in left))
        assert found.standard_error == pytest.approx(error, abs=1e-7)

    def test_of_infidelity(self):
        """The standard error of a mean of squares."""
        game: Game = lambda kept, _: len(kept) ** 2  # noqa: E731
        scores = [1, 2, 0, 1]
        probe, asked = probe_of(game, scores, masks=9)
        found = METRICS["infidelity"].function(probe)
        gone = [sum(s for i, s in enumerate(scores) if i not in k) for k in asked[:9]]
        lost = [16 - len(kept) ** 2 for kept in asked[:9]]
        beta = sum(g * x for g, x in zip(gone, lost, strict=True))
        beta /= sum(g * g for g in gone)
        errors = [(beta * g - x) ** 2 for g, x in zip(gone, lost, strict=True)]
        mean = sum(errors) / 9
        spread = math.sqrt(sum((one - mean) ** 2 for one in errors) / 8 / 9)
        assert found.value == pytest.approx(mean)
        assert found.standard_error == pytest.approx(spread)


# --- games whose truth is known ------------------------------------------------------

WORTH = [1.0, 8.0, 4.0, 0.0, 2.0, 0.0]


def additive(kept, _):
    """Each source adds what it is worth."""
    return sum(WORTH[i] for i in kept) - 15


class TestAdditiveGames:
    """Where every source has a worth, that is the truth."""

    @given(
        st.lists(st.integers(-8, 8), min_size=2, max_size=7).filter(
            lambda worth: len(set(worth)) > 1
        ),
        st.sampled_from([1.0, 0.25, 64.0]),
        st.integers(0, 9),
    )
    def test_the_true_scores_predict_all(self, worth, scale, seed):
        """Whatever their unit: lds is 1 and infidelity 0."""
        probe, asked = probe_of(
            lambda kept, _: sum(worth[i] for i in kept),
            [scale * one for one in worth],
            seed=seed,
            masks=64,
        )
        found = METRICS["lds"].function(probe)
        assert len({sum(worth[i] for i in kept) for kept in asked}) > 1
        assert found.value == pytest.approx(1.0)
        assert found.standard_error == pytest.approx(0.0, abs=1e-6)
        assert METRICS["infidelity"].function(probe).value == pytest.approx(0, abs=1e-9)

    @every_metric
    def test_the_truth_beats_its_reverse_and_all_that_is_in_between(self, name):
        """By the direction that each metric says is better."""
        metric = METRICS[name]
        sign = 1 if metric.higher_is_better else -1
        found = []
        for scores in (WORTH, [2, 8, 1, 0, 4, 0], [7 - one for one in WORTH]):
            probe, _ = probe_of(additive, scores, is_log=name in HIGHEST[:2], top=2)
            found.append(sign * metric.function(probe).value)
        assert found == sorted(found, reverse=True)
        assert found[0] > found[2]

    def test_scores_of_nothing_predict_nothing(self):
        """Constant ones neither correlate nor fit, and raise no warning."""
        probe, _ = probe_of(additive, [0.0] * 6)
        assert METRICS["lds"].function(probe) == Score(0.0, 0.0)
        kept, values = probe.random_sets
        assert len(kept) == 32
        expected = float(np.square(values[:, 0]).mean())
        assert METRICS["infidelity"].function(probe).value == pytest.approx(expected)

    def test_areas_may_run_over_tokens(self):
        """A long unit takes more room then; RISE and MAS stay as CAGE has them."""
        scores, sizes = [0, 3, 2, 0, 1, 0], np.array([1.0, 9, 1, 1, 4, 4])
        plain, _ = probe_of(additive, scores, sizes=sizes)
        long, _ = probe_of(additive, scores, sizes=sizes, by_tokens=True)
        at = [0.0]
        for source in first_to_last(scores):
            at.append(at[-1] + sizes[source] / 20)
        heights = deleted(additive, scores)
        expected = sum(
            (at[i + 1] - at[i]) * (heights[i] + heights[i + 1]) / 2 for i in range(6)
        )
        assert METRICS["deletion"].function(long).value == pytest.approx(expected)
        assert METRICS["deletion"].function(plain).value == pytest.approx(auc(heights))
        for name in ("rise", "mas"):
            one, other = (METRICS[name].function(probe) for probe in (plain, long))
            assert one.value == other.value


# --- what is told --------------------------------------------------------------------


@every_metric
def test_a_metric_says_what_it_is(name):
    """Its name, what it is, and the paper that it comes from."""
    metric = METRICS[name]
    assert metric.name == name
    assert metric.summary
    assert any(mark in metric.source for mark in ("arXiv:", "IJCAI"))
    assert inspect.getdoc(metric.function)


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (Score(0.12345), "0.123"),
        (Score(-0.00001), "0.000"),
        (Score(-1.5, 0.25), "-1.500 ± 0.250"),
        (Score(1.0, 0.0), "1.000 ± 0.000"),
    ],
)
def test_a_score_is_told_with_its_error(score, text):
    """Where it has one; nothing is not minus nothing."""
    assert str(score) == text


class TestOrders:
    """Orders that know nothing, with the sizes of an attribution."""

    scores = st.lists(st.integers(-3, 3), min_size=1, max_size=8)

    @given(scores)
    def test_by_position_the_last_has_the_highest(self, scores):
        """The same numbers, rising strictly, equal ones by next to nothing."""
        found = by_position(scores)
        np.testing.assert_allclose(found, sorted(scores), rtol=0, atol=1e-10)
        assert (np.diff(found) > 0).all()
        assert ranked(found).tolist() == list(range(len(scores)))[::-1]

    @given(scores, scores)
    def test_a_random_order_is_that_of_the_seed(self, scores, others):
        """Whatever the numbers are, which stay the same."""
        size = min(len(scores), len(others))
        found, other = (
            shuffled(some[:size], np.random.default_rng(7)) for some in (scores, others)
        )
        np.testing.assert_allclose(
            np.sort(found), sorted(scores[:size]), rtol=0, atol=1e-10
        )
        assert ranked(found).tolist() == ranked(other).tolist()

    def test_every_order_is_as_likely(self):
        """Of three sources all six come."""
        rng = np.random.default_rng(0)
        found = [tuple(ranked(shuffled([1, 0, 0], rng))) for _ in range(600)]
        counts = [found.count(order) for order in set(found)]
        assert len(counts) == 6
        assert min(counts) > 60
