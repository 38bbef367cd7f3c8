"""Intervals and comparisons over examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import wilcoxon

from captum_cage.metrics import compare, compare_all, estimate


class TestEstimate:
    """A mean and how sure it is."""

    def test_the_interval_holds_the_truth_as_often_as_it_says(self):
        """Of 200 samples of 40 skewed numbers, about 95 in 100."""
        rng = np.random.default_rng(0)
        held = 0
        for number in range(200):
            found = estimate(rng.exponential(size=40), resamples=500, seed=number)
            held += found.low <= 1.0 <= found.high
        assert 0.88 <= held / 200 <= 0.99

    def test_it_is_the_mean_and_its_error(self):
        """As anybody would compute them."""
        values = [1.0, 2.0, 4.0]
        found = estimate(values)
        assert found.mean == pytest.approx(7 / 3)
        assert found.standard_error == pytest.approx(np.std(values, ddof=1) / 3**0.5)
        assert found.examples == 3
        assert estimate(values) == found  # the same seed
        assert str(found).startswith("2.333 (")

    def test_one_example_and_equal_ones_have_no_width(self):
        """There is nothing to resample."""
        assert math.isnan(estimate([2.0]).standard_error)
        assert (estimate([2.0] * 4).low, estimate([2.0] * 4).high) == (2.0, 2.0)

    @pytest.mark.parametrize("values", [[], [np.nan, 1.0], [[1.0]]])
    def test_what_is_no_sample_is_refused(self, values):
        """By name."""
        with pytest.raises(ValueError, match="values: must be one finite number for"):
            estimate(values)

    def test_a_level_must_be_a_share(self):
        """Not a number of percent."""
        with pytest.raises(ValueError, match="level: must be in"):
            estimate([1.0, 2.0], level=95)


class TestCompare:
    """Pairs of the same examples."""

    def test_pairs_are_counted(self):
        """Won, lost, alike; and the other way where lower is better."""
        first, second = [1.0, 5.0, 2.0, 2.0], [0.0, 1.0, 3.0, 2.0]
        found = compare(first, second)
        assert (found.wins, found.losses, found.ties) == (2, 1, 1)
        lower = compare(first, second, higher_is_better=False)
        assert (lower.wins, lower.losses, lower.ties) == (1, 2, 1)
        difference = np.subtract(first, second)
        assert found.effect == pytest.approx(difference.mean() / difference.std(ddof=1))
        assert found.p == pytest.approx(wilcoxon(difference).pvalue)

    def test_better_means_beyond_chance(self):
        """The interval of the difference excludes zero."""
        rng = np.random.default_rng(0)
        noise = rng.normal(size=50)
        assert compare(noise + 1.0, noise * 0.9).is_better
        assert not compare(noise, rng.permutation(noise)).is_better
        assert not compare(noise, noise).is_better
        assert compare(noise, noise).p == 1.0

    def test_many_comparisons_are_corrected(self):
        """By the share of false discoveries."""
        rng = np.random.default_rng(1)
        first = rng.normal(size=30) + 0.4
        others = {str(i): rng.normal(size=30) for i in range(6)}
        found = compare_all(first, others, resamples=50)
        raw = sorted(one.p for one in found.values())
        adjusted = sorted(one.p_corrected for one in found.values())
        expected = [min(raw[j] * 6 / (j + 1) for j in range(i, 6)) for i in range(6)]
        np.testing.assert_allclose(adjusted, np.minimum(expected, 1.0))
        assert compare_all(first, {}) == {}

    def test_other_examples_are_refused(self):
        """They would be no pairs."""
        with pytest.raises(ValueError, match="second: must have one number for each"):
            compare([1.0], [1.0, 2.0])
