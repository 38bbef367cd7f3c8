"""Curves and what is made of them, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from captum_cage.metrics import (
    COVERAGE,
    area,
    coverage,
    fractions,
    mas,
    monotone,
    remaining,
    rise,
)

numbers = st.floats(-50, 0, allow_nan=False)
curves = st.integers(2, 12).flatmap(
    lambda n: arrays(float, n, elements=numbers, fill=st.nothing())
)


def by_the_paper(scores):
    """The monotone curve, one deletion at a time."""
    found, least = [], 1.0
    scores = np.asarray(scores).tolist()
    for score in scores:
        scale = abs(scores[0] - scores[-1])
        value = 0.0 if scale == 0 else (score - scores[-1]) / scale
        least = min(least, min(max(value, 0.0), 1.0))
        found.append(least)
    return found


class TestArea:
    """Trapezia over an axis of length one."""

    @given(curves)
    def test_equal_steps_are_the_sum_less_half_the_ends(self, values):
        """The formula of the authors' code."""
        n = len(values) - 1
        expected = (values.sum() - values[0] / 2 - values[-1] / 2) / n
        assert area(values) == pytest.approx(expected, abs=1e-9)

    def test_places_weigh_the_steps(self):
        """A long unit takes as much of the axis as it has tokens."""
        at = fractions([1, 0, 2], [1, 7, 2])
        assert at.tolist() == [0.0, 0.7, 0.8, 1.0]
        assert area([1.0, 1.0, 0.0, 0.0], at) == pytest.approx(0.75)

    @pytest.mark.parametrize(
        ("values", "places", "match"),
        [
            ([1.0], None, "values: must be a curve of at least two"),
            ([1.0, np.nan], None, "values: must be a curve of at least two finite"),
            ([1.0, 0.0], [0.0, 0.5, 1.0], "places: must rise and have shape"),
            ([1.0, 0.0], [1.0, 0.0], "places: must rise"),
        ],
    )
    def test_what_is_no_curve_is_refused(self, values, places, match):
        """By name."""
        with pytest.raises(ValueError, match=match):
            area(values, places)


class TestRise:
    """Area under the monotone curve."""

    @given(curves)
    @example([-2e-311, -1.0, 0.0])
    def test_the_curve_is_that_of_the_paper(self, scores):
        """Scaled by its ends, clipped, a running minimum."""
        np.testing.assert_allclose(monotone(scores), by_the_paper(scores), atol=1e-12)
        assert 0.0 <= rise(scores) <= 1.0

    def test_an_early_loss_is_better(self):
        """The unit that matters goes first."""
        assert rise([0.0, -9.0, -10.0]) < rise([0.0, -1.0, -10.0])

    def test_equal_ends_have_no_scale(self):
        """Nothing was lost: the curve is zero."""
        assert rise([-1.0, -5.0, -1.0]) == 0.0


class TestMas:
    """RISE with a penalty for the wrong magnitude."""

    @given(curves, st.data())
    def test_it_is_the_formula(self, scores, data):
        """One deletion at a time."""
        n = len(scores) - 1
        attr = data.draw(arrays(float, n, elements=st.floats(-1, 5)))
        order = np.argsort(-attr, kind="stable").tolist()
        mass = np.clip(attr, 0, None)
        left = [
            1 - sum(mass[order[:i]]) / mass.sum() if mass.sum() else 1 - i / n
            for i in range(n + 1)
        ]
        heights = by_the_paper(scores)
        raw = [
            min(max(h + abs(h - d), 0), 1) for h, d in zip(heights, left, strict=True)
        ]
        low, high = min(raw), max(raw)
        scaled = [(r - low) / (high - low) if high > low else 0.0 for r in raw]
        expected = (sum(scaled) - scaled[0] / 2 - scaled[-1] / 2) / n
        assert mas(scores, attr, order) == pytest.approx(expected, abs=1e-9)
        np.testing.assert_allclose(remaining(attr, order), left, atol=1e-9)

    def test_the_right_magnitude_costs_nothing(self):
        """Where a unit's share is what its deletion takes, it is RISE."""
        scores, attr = [0.0, -7.0, -9.0, -10.0], [0.7, 0.2, 0.1]
        assert mas(scores, attr, [0, 1, 2]) == pytest.approx(rise(scores))
        assert mas(scores, [0.4, 0.3, 0.3], [0, 1, 2]) > rise(scores)


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

    def test_what_goes_elsewhere_counts(self):
        """Gold units share what they have with all others."""
        assert coverage([1.0, 1.0, 8.0], [0, 1]) == 0.0
        assert coverage([0.0, 0.0], [0]) == 0.0

    def test_no_gold_is_refused(self):
        """There would be nothing to cover."""
        with pytest.raises(ValueError, match="gold: must name a unit that matters"):
            coverage([1.0], [])
