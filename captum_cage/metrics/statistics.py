"""Means with intervals, paired differences, and many comparisons at once, by SciPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from captum_cage._checks import complaint, real_array, whole_number

# Share of the differences that their spread has where they are all alike.
_ROUNDING = 1e-9

__all__ = ["Comparison", "Estimate", "compare", "compare_all", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """A mean and how sure it is.

    Attributes:
        mean (float): over the examples.
        low (float): lower end of the bootstrap interval.
        high (float): upper end.
        standard_error (float): of the mean; NaN for one example.
        examples (int): number of examples.
        level (float): coverage of the interval.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    examples: int
    level: float = 0.95

    def __str__(self) -> str:
        # Rounded first, so that nothing is not minus nothing.
        shown = [round(one, 3) + 0.0 for one in (self.mean, self.low, self.high)]
        return "{:.3f} ({:.3f} to {:.3f})".format(*shown)


@dataclass(frozen=True)
class Comparison:
    """One way against another on the same examples.

    Attributes:
        difference (Estimate): of the pairs, first less second.
        wins (int): examples on which the first is better.
        losses (int): examples on which it is worse.
        ties (int): examples on which both are alike.
        effect (float): mean difference in its own standard deviations (Cohen's d of
            paired samples); NaN where all differences are alike.
        p (float): of Wilcoxon's signed-rank test, two-sided; 1 where all are ties.
        p_corrected (float): the same, corrected for the number of comparisons.
    """

    difference: Estimate
    wins: int
    losses: int
    ties: int
    effect: float
    p: float
    p_corrected: float

    @property
    def is_better(self) -> bool:
        """Whether more is won than lost and the interval excludes zero."""
        low, high = self.difference.low, self.difference.high
        return self.wins > self.losses and bool(low > 0.0 or high < 0.0)


def estimate(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Estimate:
    """Mean of one number per example, with a bootstrap interval (BCa).

    Args:
        values: one per example, shape ``(n,)``, finite.
        level: coverage of the interval, in (0, 1).
        resamples: number of resamples.
        seed: of the resampling.

    Raises:
        ValueError: if there is no example, or one is not finite.

    Source: Efron (1987), :cite:p:`efron1987intervals`.

    Example:
        >>> estimate([1.0, 2.0, 3.0]).mean
        2.0
    """
    numbers = real_array("values", values)
    if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(
            complaint(
                "values",
                "must be one finite number for each example, at least one",
                f"{numbers.size} came, {np.count_nonzero(~np.isfinite(numbers))} of "
                "them not finite",
                "Leave examples out that could not be scored, and say how many.",
            )
        )
    if not 0.0 < level < 1.0:
        raise ValueError(
            complaint("level", "must be in (0, 1)", f"{level} came", "Pass 0.95, say.")
        )
    remedy = "Pass the number of resamples, for example 9999."
    count = whole_number("resamples", resamples, minimum=1, remedy=remedy)
    mean = float(numbers.mean())
    if numbers.size == 1:
        return Estimate(mean, mean, mean, float("nan"), 1, level)
    error = float(numbers.std(ddof=1) / np.sqrt(numbers.size))
    if np.ptp(numbers) == 0.0:
        return Estimate(mean, mean, mean, 0.0, numbers.size, level)
    found = scipy.stats.bootstrap(
        (numbers,),
        np.mean,
        confidence_level=level,
        n_resamples=count,
        random_state=np.random.default_rng(seed),
        vectorized=True,
    ).confidence_interval
    return Estimate(
        mean, float(found.low), float(found.high), error, numbers.size, level
    )


def compare(
    first: ArrayLike,
    second: ArrayLike,
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Comparison:
    """Two ways on the same examples, pair by pair.

    Args:
        first: one number per example, shape ``(n,)``.
        second: the same examples in the same order.
        higher_is_better: which sign of a difference is a win.
        level: coverage of the interval.
        resamples: number of resamples.
        seed: of the resampling.

    Raises:
        ValueError: if the two have other shapes or a number is not finite.

    Source: Wilcoxon (1945), :cite:p:`wilcoxon1945ranking`.

    Example:
        >>> compare([1.0, 2.0, 3.0], [0.0, 2.0, 1.0]).wins
        2
    """
    one, other = real_array("first", first), real_array("second", second)
    if one.shape != other.shape:
        raise ValueError(
            complaint(
                "second",
                f"must have one number for each of the {one.shape} examples",
                f"{other.shape} came",
                "Score both on the same examples.",
            )
        )
    difference = one - other
    # What differs by rounding alone is alike.
    difference[np.abs(difference) <= _ROUNDING * np.maximum(abs(one), abs(other))] = 0.0
    found = estimate(difference, level=level, resamples=resamples, seed=seed)
    sign = difference if higher_is_better else -difference
    spread = difference.std(ddof=1) if difference.size > 1 else 0.0
    if spread <= _ROUNDING * np.abs(difference).max():
        spread = 0.0
    p = 1.0 if not difference.any() else float(scipy.stats.wilcoxon(difference).pvalue)
    return Comparison(
        found,
        int((sign > 0).sum()),
        int((sign < 0).sum()),
        int((sign == 0).sum()),
        float(difference.mean() / spread) if spread > 0 else float("nan"),
        p,
        p,
    )


def compare_all(
    first: ArrayLike,
    others: Mapping[str, ArrayLike],
    *,
    higher_is_better: bool = True,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> dict[str, Comparison]:
    """One way against several, corrected for their number.

    The p-values are adjusted so that the expected share of false discoveries among
    those below a bound is at most that bound.

    Source: Benjamini and Hochberg (1995), :cite:p:`benjamini1995fdr`.

    Example:
        >>> found = compare_all([1.0, 2.0, 3.0], {"zero": [0.0] * 3, "one": [1.0] * 3})
        >>> found["zero"].wins, found["one"].ties
        (3, 1)
    """
    names = list(others)
    found = [
        compare(
            first,
            others[name],
            higher_is_better=higher_is_better,
            level=level,
            resamples=resamples,
            seed=seed,
        )
        for name in names
    ]
    corrected: Sequence[float] = (
        scipy.stats.false_discovery_control([one.p for one in found]).tolist()
        if found
        else []
    )
    return {
        name: Comparison(
            one.difference, one.wins, one.losses, one.ties, one.effect, one.p, p
        )
        for name, one, p in zip(names, found, corrected, strict=True)
    }
