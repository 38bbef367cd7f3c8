"""Shares of raw rows, against loops over rows and over subsets of entries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from captum_cage._shares import check_entries, checked_weights, heaviest, masses, shares

EXACT = 1e-12
TINIEST = 5e-324
NORMALIZATIONS = ("positive", "absolute", "signed")
ROWS = st.lists(st.lists(st.floats(-100, 100, allow_subnormal=False), max_size=5))


def flat(rows):
    """Rows of any length as values and row ends."""
    values = [value for row in rows for value in row]
    return np.array(values, dtype=float), np.cumsum([0, *map(len, rows)])


@settings(deadline=None)
@given(ROWS, st.sampled_from(NORMALIZATIONS))
def test_shares_are_entries_by_the_mass_of_their_row(rows, normalization):
    """Row by row: clamp or take absolute values, and divide by the sum."""
    part, filled = shares(*flat(rows), normalization)
    expected = []
    for row, has_mass in zip(rows, filled.tolist(), strict=True):
        clamped = [max(v, 0) if normalization == "positive" else v for v in row]
        total = math.fsum(map(abs, clamped))
        assert has_mass == (total > 0)
        sign = 1 if normalization == "signed" else 0
        expected += [(v if sign else abs(v)) / (total or 1) for v in clamped]
    assert_allclose(part, expected, rtol=0, atol=EXACT)


@settings(deadline=None)
@example([[64.0, 4.0389609868203705e-308]], "positive")
@given(ROWS, st.sampled_from(NORMALIZATIONS))
def test_masses_are_the_entries_by_a_power_of_two(rows, normalization):
    """One power for each row, so that a row's masses keep their ratios to the bit."""
    mass, total = masses(*flat(rows), normalization)
    start = 0
    for row, row_total in zip(rows, total.tolist(), strict=True):
        found = mass[start : start + len(row)]
        start += len(row)
        wanted = np.array(
            [max(v, 0) if normalization == "positive" else abs(v) for v in row]
        )
        assert row_total == pytest.approx(found.sum(), abs=EXACT)
        if row_total:
            scale = wanted.max() / found.max()
            assert math.frexp(scale)[0] == 0.5
            assert 0.5 <= found.max() < 1
            # An entry that is scaled below the normal numbers loses its last bits.
            assert_allclose(found * scale, wanted, rtol=1e-15, atol=scale * TINIEST)
        else:
            assert not wanted.any()


@pytest.mark.parametrize("value", [1e308, 5e-324])
def test_masses_stay_in_range_at_the_ends_of_the_float_range(value):
    """The sum of huge entries is finite, and tiny entries keep their mass."""
    mass, total = masses(np.array([value] * 3), np.array([0, 3]), "positive")
    assert 0.5 <= mass[0] < 1
    assert total.tolist() == [pytest.approx(3 * mass[0])]


# Whole numbers and dyadic shares: sums and products are exact.
WHOLE = st.lists(st.integers(0, 5), max_size=7)
DYADIC = st.integers(1, 16).map(lambda n: n / 16)


@settings(deadline=None, max_examples=100)
@given(WHOLE, DYADIC)
def test_heaviest_is_the_smallest_set_that_holds_the_share(mass, share):
    """Of all sets that hold enough: the smallest, the heaviest, the earliest."""
    chosen, held = heaviest(np.array(mass, dtype=float), share)
    if share == 1 or sum(mass) == 0:
        assert chosen.tolist() == [m > 0 for m in mass]
        assert held == 1.0
        return
    places = range(len(mass))
    enough = [
        (size, -sum(mass[i] for i in some), some)
        for size in range(len(mass) + 1)
        for some in itertools.combinations(places, size)
        if sum(mass[i] for i in some) >= share * sum(mass)
    ]
    best = min(enough)[2]
    assert np.flatnonzero(chosen).tolist() == list(best)
    assert held == pytest.approx(sum(mass[i] for i in best) / sum(mass), abs=EXACT)


def test_share_one_keeps_entries_below_rounding():
    """An entry that no sum shows is still an entry; less than all may drop it."""
    mass = np.array([1e-30, 1.0, 0.0])
    assert heaviest(mass, 1.0)[0].tolist() == [True, True, False]
    assert heaviest(mass, 0.999)[0].tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (2, np.nan, r"^row: .*finite, but row 4 \(unit 6\) has a NaN at unit 2\."),
        (2, np.inf, r"finite, but row 4 \(unit 6\) has inf at unit 2\."),
        (6, 1.0, r"causal.*row 4 \(unit 6\) has 1\.0 at unit 6\."),
        (7, -2.0, r"causal.*row 4 \(unit 6\) has -2\.0 at unit 7\."),
    ],
)
def test_a_bad_entry_is_named(column, value, message):
    """By row, unit and value."""
    rows, own = np.array([4, 4]), np.array([6, 6])
    check_entries(rows, np.array([0, 5]), np.array([1.0, 2.0]), own, "row")
    with pytest.raises(ValueError, match=message):
        check_entries(rows, np.array([0, column]), np.array([1.0, value]), own, "row")


def test_weights_are_checked_by_normalization():
    """Negative weights are for signed graphs."""
    assert checked_weights([-1, 2], 2, "signed").tolist() == [-1.0, 2.0]
    with pytest.raises(ValueError, match=r"weights: no entry may be negative"):
        checked_weights([-1, 2], 2, "positive")
    with pytest.raises(ValueError, match=r"weights: must have shape \(3,\)"):
        checked_weights([1, 2], 3, "signed")
