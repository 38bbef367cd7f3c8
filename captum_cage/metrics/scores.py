"""Scores of an attribution, by what is left without its highest or lowest sources.

Each takes a function from sets of kept sources to numbers, so that it means the same of
texts written again and of texts that stay fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import scipy

from captum_cage._checks import real_array
from captum_cage.metrics.curves import area, fractions, mas, rise

__all__ = [
    "METRICS",
    "Metric",
    "Probe",
    "Score",
    "by_position",
    "ranked",
    "shuffled",
]

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Shares of the sources that ERASER takes, of which it averages.
ERASER_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Score:
    """What a metric gives for one attribution.

    Attributes:
        value (float): the score.
        standard_error (float): over samples, masks or random orders; NaN where the
            score does not come of any.
    """

    value: float
    standard_error: float = float("nan")

    def __str__(self) -> str:
        value = round(self.value, 3) + 0.0  # not minus nothing
        if np.isnan(self.standard_error):
            return f"{value:.3f}"
        return f"{value:.3f} ± {self.standard_error:.3f}"


class Samples(Protocol):
    """Asks for the value of each sample of sets of kept sources."""

    def __call__(self, kept: Bools) -> Array:
        """Shape ``(n, samples)``, for ``kept`` of shape ``(n, P)``."""


def by_position(scores: npt.ArrayLike) -> Array:
    """The same scores, but the highest for the last source, and so on.

    What looks at sizes, as MAS or infidelity do, sees no difference to the scores but
    their order. Equal scores are told apart by a part in 10^12 of the largest.

    Args:
        scores: of each source, shape ``(n,)``.

    Example:
        >>> by_position([0.5, 0.2, 0.3]).round(6).tolist()
        [0.2, 0.3, 0.5]
    """
    values: Array = np.sort(real_array("scores", scores))
    return values + _speck(values) * np.arange(values.size)


def shuffled(scores: npt.ArrayLike, rng: np.random.Generator) -> Array:
    """The same scores in a random order, which does not depend on the scores.

    Args:
        scores: of each source, shape ``(n,)``.
        rng: what draws the order.
    """
    values = by_position(scores)
    return values[rng.permutation(values.size)]


def _speck(scores: Array) -> float:
    """What tells equal scores apart and is too little to count."""
    return 1e-12 * (float(np.abs(scores).max(initial=0.0)) or 1.0)


def ranked(scores: npt.ArrayLike, seed: int = 0) -> npt.NDArray[np.int64]:
    """Positions in the order of decreasing scores; ties in a random order of their own.

    The order among equal scores is that of a permutation drawn with the seed, the same
    for all attributions of as many sources, so that no position is favoured.

    Args:
        scores: shape ``(P,)``.
        seed (int, optional): of the permutation. Default: ``0``

    Example:
        >>> ranked([0.1, 0.7, 0.2]).tolist()
        [1, 2, 0]
    """
    values = np.asarray(scores, dtype=np.float64)
    tie = np.random.default_rng(seed).permutation(values.size)
    order: npt.NDArray[np.int64] = np.lexsort((tie, -values))
    return order


@dataclass(frozen=True)
class Probe:
    """One attribution under test, with what it is tested by.

    Attributes:
        scores (numpy.ndarray): of each source, shape ``(P,)``.
        sizes (numpy.ndarray): number of tokens of each, shape ``(P,)``.
        samples (Samples): value of sets of kept sources, by sample.
        is_log (bool): whether values are log-probabilities.
        by_tokens (bool): whether curves run over the fraction of tokens that are gone,
            not of sources.
        masks (int): number of random sets, for metrics that take them.
        top (int): number of sources, for metrics of the highest ones.
        seed (int): of ties and of random sets.
    """

    scores: Array
    sizes: Array
    samples: Samples
    is_log: bool
    by_tokens: bool = False
    masks: int = 32
    top: int = 1
    seed: int = 0

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """Sources from the highest score to the lowest."""
        return ranked(self.scores, self.seed)

    @cached_property
    def places(self) -> Array:
        """Where the points of a curve stand, from 0 to 1. Shape ``(P + 1,)``."""
        if self.by_tokens:
            return fractions(self.order.tolist(), self.sizes)
        return np.linspace(0.0, 1.0, len(self.scores) + 1)

    def without_top(self, count: int) -> Bools:
        """Which sources stay when the highest ones go, shape ``(P,)``."""
        kept = np.ones(len(self.scores), dtype=bool)
        kept[self.order[:count]] = False
        return kept

    @cached_property
    def deletion(self) -> Array:
        """Values as the highest sources go, one by one; ``(P + 1, samples)``."""
        counts = range(len(self.scores) + 1)
        return self.samples(np.stack([self.without_top(count) for count in counts]))

    @cached_property
    def insertion(self) -> Array:
        """Values as the highest sources come, one by one; ``(P + 1, samples)``."""
        counts = range(len(self.scores) + 1)
        return self.samples(np.stack([~self.without_top(count) for count in counts]))

    @cached_property
    def random_sets(self) -> tuple[Bools, Array]:
        """Random sets of kept sources, each there by the toss of a coin, and values.

        They are drawn apart from any that a base method may have drawn.
        """
        rng = np.random.default_rng([self.seed, 0xC0FFEE])
        kept = rng.random((self.masks, len(self.scores))) < 0.5
        return kept, self.samples(kept)

    def probabilities(self, values: Array) -> Array:
        """Values as probabilities."""
        return np.exp(values) if self.is_log else values


@dataclass(frozen=True)
class Metric:
    """A score of an attribution.

    Attributes:
        name (str): its name.
        higher_is_better (bool): which way is better.
        summary (str): what it is, in a few words.
        source (str): the paper.
        function (Callable): the score of a :class:`~captum_cage.metrics.scores.Probe`.
    """

    name: str
    higher_is_better: bool
    summary: str
    source: str
    function: Callable[[Probe], Score]


def _over_samples(values: Array, statistic: Callable[[Array], float]) -> Score:
    """A statistic of the mean over samples, with its jackknife error.

    Args:
        values: shape ``(n, samples)``.
        statistic: of the means, shape ``(n,)``.
    """
    count = values.shape[1]
    found = statistic(values.mean(axis=1))
    if count < 2:
        return Score(float(found))
    left = np.array(
        [statistic(np.delete(values, i, axis=1).mean(axis=1)) for i in range(count)]
    )
    spread = (count - 1) / count * np.square(left - left.mean()).sum()
    return Score(float(found), float(np.sqrt(spread)))


def deletion(probe: Probe) -> Score:
    """Area under the values as the highest sources go."""
    return _over_samples(probe.deletion, lambda curve: area(curve, probe.places))


def insertion(probe: Probe) -> Score:
    """Area under the values as the highest sources come."""
    return _over_samples(probe.insertion, lambda curve: area(curve, probe.places))


def monotone_area(probe: Probe) -> Score:
    """RISE of the deletion curve, as the code of Walker and Ewetz (2025) has it."""
    return _over_samples(probe.deletion, rise)


def magnitude_aligned(probe: Probe) -> Score:
    """MAS of the deletion curve, as the code of Walker and Ewetz (2025) has it."""
    order = probe.order.tolist()
    return _over_samples(probe.deletion, lambda curve: mas(curve, probe.scores, order))


def _counts(probe: Probe) -> list[int]:
    size = len(probe.scores)
    return [max(1, int(np.ceil(share * size))) for share in ERASER_SHARES]


def comprehensiveness(probe: Probe) -> Score:
    """Mean loss of probability without the highest 1, 5, 10, 20 and 50 percent."""
    sets = [probe.without_top(0), *(probe.without_top(n) for n in _counts(probe))]
    values = probe.probabilities(probe.samples(np.stack(sets)))
    return _over_samples(values, lambda found: float((found[0] - found[1:]).mean()))


def eraser_sufficiency(probe: Probe) -> Score:
    """Mean loss of probability with nothing but the highest 1 to 50 percent."""
    sets = [probe.without_top(0), *(~probe.without_top(n) for n in _counts(probe))]
    values = probe.probabilities(probe.samples(np.stack(sets)))
    return _over_samples(values, lambda found: float((found[0] - found[1:]).mean()))


def necessity(probe: Probe) -> Score:
    """What is lost without the highest sources."""
    sets = np.stack([probe.without_top(0), probe.without_top(probe.top)])
    return _over_samples(probe.samples(sets), lambda found: float(found[0] - found[1]))


def sufficiency(probe: Probe) -> Score:
    """What is held with the highest sources alone: their value less that of all."""
    sets = np.stack([probe.without_top(0), ~probe.without_top(probe.top)])
    return _over_samples(probe.samples(sets), lambda found: float(found[1] - found[0]))


def linear_datamodeling_score(probe: Probe) -> Score:
    """Rank correlation of values of random sets with the sums of their scores."""
    kept, values = probe.random_sets
    sums, means = kept @ probe.scores, values.mean(axis=1)
    found = _rank_correlation(sums, means)
    count = len(kept)
    left = np.array(
        [
            _rank_correlation(np.delete(sums, i), np.delete(means, i))
            for i in range(count)
        ]
    )
    spread = (count - 1) / count * np.square(left - left.mean()).sum()
    return Score(found, float(np.sqrt(spread)))


def _rank_correlation(one: Array, other: Array) -> float:
    """Spearman's, 0 where one side is constant and says nothing."""
    if np.ptp(one) == 0.0 or np.ptp(other) == 0.0:
        return 0.0
    ranks = scipy.stats.rankdata([one, other], axis=1)
    return float(np.corrcoef(ranks)[0, 1])


def infidelity(probe: Probe) -> Score:
    """Squared error of the loss that scores predict for random removals.

    Scores are shares, values have a unit of their own: the scores are scaled to fit
    best, as ``captum.metrics.infidelity(normalize=True)`` does.
    """
    kept, values = probe.random_sets
    whole = probe.samples(np.ones((1, len(probe.scores)), dtype=bool)).mean()
    lost = whole - values.mean(axis=1)
    predicted = (~kept) @ probe.scores
    power = float(np.square(predicted).mean())
    scale = float((predicted * lost).mean()) / power if power > 0.0 else 0.0
    errors = np.square(scale * predicted - lost)
    return Score(float(errors.mean()), float(errors.std(ddof=1) / np.sqrt(len(errors))))


def _by_name(metrics: Sequence[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS = _by_name(
    [
        Metric(
            "deletion",
            False,
            "area under the value as the highest sources go",
            "Petsiuk et al. (2018), arXiv:1806.07421",
            deletion,
        ),
        Metric(
            "insertion",
            True,
            "area under the value as the highest sources come",
            "Petsiuk et al. (2018), arXiv:1806.07421",
            insertion,
        ),
        Metric(
            "rise",
            False,
            "area under the deletion curve, scaled to its ends and never rising",
            "Petsiuk et al. (2018), arXiv:1806.07421; Walker and Ewetz (2025), "
            "arXiv:2512.15663",
            monotone_area,
        ),
        Metric(
            "mas",
            False,
            "rise with a penalty for scores of the wrong size",
            "Walker, Simon, Chen and Ewetz (2024), IJCAI",
            magnitude_aligned,
        ),
        Metric(
            "comprehensiveness",
            True,
            "mean loss of probability without the highest 1 to 50 percent",
            "DeYoung et al. (2020), ERASER, arXiv:1911.03429",
            comprehensiveness,
        ),
        Metric(
            "eraser-sufficiency",
            False,
            "mean loss of probability with nothing but the highest 1 to 50 percent",
            "DeYoung et al. (2020), ERASER, arXiv:1911.03429",
            eraser_sufficiency,
        ),
        Metric(
            "necessity",
            True,
            "what is lost without the highest k sources: the top-k drop",
            "Cohen-Wang et al. (2024), ContextCite, arXiv:2409.00729; Chuang et al. "
            "(2025), SelfCite, arXiv:2502.09604",
            necessity,
        ),
        Metric(
            "sufficiency",
            True,
            "what is held with the highest k sources alone",
            "Chuang et al. (2025), SelfCite, arXiv:2502.09604",
            sufficiency,
        ),
        Metric(
            "lds",
            True,
            "rank correlation of values of random sets with sums of scores",
            "Park et al. (2023), arXiv:2303.14186; Cohen-Wang et al. (2024), "
            "arXiv:2409.00729",
            linear_datamodeling_score,
        ),
        Metric(
            "infidelity",
            False,
            "squared error of the loss that scores predict for random removals",
            "Yeh et al. (2019), arXiv:1901.09392",
            infidelity,
        ),
    ]
)
"""All scores of an order, by name."""
