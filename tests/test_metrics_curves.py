"""Curves and what is made of them, against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from captum_cage.metrics import (
    area,
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
        # 0 / 0 is no number, and no number is no new minimum.
        value = (score - scores[-1]) / scale if scale else float(score >= scores[-1])
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
        """As in the authors' code: whole until a height lies below the ends."""
        assert rise([-1.0, -1.0, -1.0, -1.0]) == 1.0
        assert rise([-1.0, 5.0, -1.0, -1.0]) == 1.0
        assert rise([1.0, 0.0, 1.0, 1.0]) == pytest.approx(1 / 6)


class TestMas:
    """RISE with a penalty for the wrong magnitude."""

    @given(curves, st.data())
    def test_it_is_the_formula(self, scores, data):
        """One deletion at a time."""
        n = len(scores) - 1
        attr = data.draw(arrays(float, n, elements=st.floats(-1, 5)))
        assume(attr.sum() == 0 or abs(attr.sum()) > 1e-3)
        order = np.argsort(-attr, kind="stable").tolist()
        left = [1.0]
        for unit in order:
            with np.errstate(all="ignore"):
                left.append(left[-1] - attr[unit] / attr.sum())
        heights = by_the_paper(scores)
        raw = [
            min(max(h + abs(h - d), 0), 1) for h, d in zip(heights, left, strict=True)
        ]
        low, high = min(raw), max(raw)
        expected = 0.5
        if high > low and attr.sum() != 0:
            scaled = [(r - low) / (high - low) for r in raw]
            expected = (sum(scaled) - scaled[0] / 2 - scaled[-1] / 2) / n
        if abs(high - low) > 1e-6 or high == low:
            assert mas(scores, attr, order) == pytest.approx(expected, abs=1e-6)
        if attr.sum() != 0:
            np.testing.assert_allclose(remaining(attr, order), left, atol=1e-9)
        else:
            assert np.isnan(remaining(attr, order)).all()

    def test_without_shares_it_is_one_half(self):
        """As in the authors' code; and where all heights are alike."""
        assert mas([0.0, -1.0, -2.0], [0.0, 0.0], [0, 1]) == 0.5
        assert mas([1.0, 1.0, 1.0, 1.0], [3.0, 2.0, 1.0], [0, 1, 2]) == 0.5

    def test_the_right_magnitude_costs_nothing(self):
        """Where a unit's share is what its deletion takes, it is RISE."""
        scores, attr = [0.0, -7.0, -9.0, -10.0], [0.7, 0.2, 0.1]
        assert mas(scores, attr, [0, 1, 2]) == pytest.approx(rise(scores))
        assert mas(scores, [0.4, 0.3, 0.3], [0, 1, 2]) > rise(scores)
