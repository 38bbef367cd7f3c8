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

from captum_cage.metrics import agreement, auroc, average_precision, recovery_at

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
