"""Scores against known truth and against each other, by counting pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import kendalltau

from captum_cage.metrics import (
    COVERAGE,
    agreement,
    auroc,
    average_precision,
    coverage,
    recovery_at,
)

few = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        arrays(float, n, elements=st.integers(-2, 2)),
        st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1),
    )
)


@given(few)
def test_auroc_counts_pairs(case):
    """Won pairs, and half of the ties."""
    scores, gold = case
    rest = [i for i in range(len(scores)) if i not in gold]
    pairs = [(scores[g], scores[r]) for g in gold for r in rest]
    won = sum((a > b) + (a == b) / 2 for a, b in pairs)
    assert auroc(scores, list(gold)) == pytest.approx(won / len(pairs))


@given(few)
def test_average_precision_is_the_step_sum(case):
    """Precision times the gain of recall at each threshold."""
    scores, gold = case
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [i for i in range(len(scores)) if scores[i] >= threshold]
        hits = len(gold.intersection(taken))
        recall = hits / len(gold)
        total += (recall - before) * hits / len(taken)
        before = recall
    assert average_precision(scores, list(gold)) == pytest.approx(total)


@given(few, st.integers(1, 8))
def test_recovery_is_the_mean_over_orders_of_ties(case, k):
    """Every order of equal scores is as good as another."""
    scores, gold = case
    units = range(len(scores))
    shares = [
        len(gold.intersection(order[:k])) / len(gold)
        for order in itertools.permutations(units)
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    assert recovery_at(scores, list(gold), k) == pytest.approx(np.mean(shares))


def test_agreement_is_what_scipy_and_counting_say():
    """By ranks, by pairs, by the highest."""
    one, other = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 9.0]
    assert agreement(one, one) == 1.0
    assert agreement(one, np.negative(one)) == -1.0
    expected = kendalltau(one, other).statistic
    assert agreement(one, other, "kendall") == pytest.approx(expected)
    assert agreement(one, other, "overlap", k=2) == 0.5
    assert math.isnan(agreement(one, [1.0] * 4))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: auroc([1.0, 2.0], [0, 1]), "must leave a unit that does not matter"),
        (lambda: auroc([1.0, 2.0], []), "gold: must name a unit that matters"),
        (lambda: auroc([1.0, 2.0], [5]), "gold: must be at least 0 and less than 2"),
        (lambda: auroc([1.0, np.nan], [0]), "scores: must be one finite number"),
        (lambda: recovery_at([1.0, 2.0], [0], 0), "k: must be 1 or more"),
        (lambda: agreement([1.0], [1.0, 2.0]), "other: must have the shape"),
        (lambda: agreement([1.0], [1.0], "pearson"), "measure: must be one of"),
    ],
)
def test_bad_input_is_refused(call, match):
    """By name."""
    with pytest.raises(ValueError, match=match):
        call()


class TestCoverage:
    """Share of the gold units that have about their part."""

    def test_the_variants(self):
        """Between a half and three halves of an equal share; above; above it all."""
        attr, gold = [0.3, 0.62, 0.08], [0, 1, 2]
        found = {
            name: coverage(attr, gold, bounds) for name, bounds in COVERAGE.items()
        }
        assert found["coverage"] == pytest.approx(1 / 3)
        assert found["coverage, above half"] == pytest.approx(2 / 3)
        assert found["coverage, above share"] == pytest.approx(1 / 3)

    @pytest.mark.parametrize(
        ("attr", "gold", "expected"),
        [
            ([0.5, 0.5, 0.0], [0, 1], [1, 1, 0]),
            ([0.25, 0.25, 0.5], [0, 1], [0, 0, 0]),
            ([0.75, 0.0, 0.25], [0, 1], [0, 0.5, 0.5]),
            ([-0.5, 0.7, 0.3], [0, 1], [1, 1, 0]),
        ],
    )
    def test_bounds_and_signs_do_not_count(self, attr, gold, expected):
        """As in the authors' code."""
        found = [coverage(attr, gold, bounds) for bounds in COVERAGE.values()]
        assert found == expected

    def test_what_goes_elsewhere_counts(self):
        """Gold units share what they have with all others."""
        assert coverage([1.0, 1.0, 8.0], [0, 1]) == 0.0
        assert coverage([0.0, 0.0], [0]) == 0.0

    def test_no_gold_is_refused(self):
        """There would be nothing to cover."""
        with pytest.raises(ValueError, match="gold: must name a unit that matters"):
            coverage([1.0], [])

    @pytest.mark.parametrize("gold", [[5], [-1]])
    def test_what_is_no_position_is_refused(self, gold):
        """By number."""
        with pytest.raises(ValueError, match="gold: "):
            coverage([1.0, 2.0], gold)

    def test_what_is_not_finite_is_refused(self):
        """It would count as nothing."""
        with pytest.raises(ValueError, match="scores: must be one finite number"):
            coverage([1.0, np.nan], [0])


def test_results_may_be_compared_as_they_are():
    """By their scores, ours and Captum's alike."""

    class Result:
        seq_attr = np.array([1.0, 3.0, 2.0])

    other = [2.0, 5.0, 9.0]
    expected = agreement(Result.seq_attr, other)
    assert expected == pytest.approx(0.5)
    assert agreement(Result(), other) == agreement(other, Result()) == expected
    assert agreement(Result(), Result()) == 1.0
