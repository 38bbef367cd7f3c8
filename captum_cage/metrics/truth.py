"""How well scores find the units that are known to matter, and how two scores agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import scipy
from numpy.typing import ArrayLike

from captum_cage._checks import complaint, one_of, real_array, whole_number

__all__ = [
    "COVERAGE",
    "agreement",
    "auroc",
    "average_precision",
    "coverage",
    "recovery_at",
]

Array = npt.NDArray[np.float64]

MEASURES = ("spearman", "kendall", "overlap")

COVERAGE: dict[str, tuple[float, float]] = {
    "coverage": (0.5, 1.5),
    "coverage, above half": (0.5, np.inf),
    "coverage, above share": (1.0, np.inf),
}
"""Bounds of a covered gold unit's share, in parts of ``1 / number of gold units``."""


@runtime_checkable
class Result(Protocol):
    """An attribution result of Captum's or ours."""

    seq_attr: Any


def auroc(scores: ArrayLike, gold: Sequence[int]) -> float:
    """Chance that a unit that matters scores above one that does not; ties count half.

    Args:
        scores: of each unit, shape ``(n,)``.
        gold: positions of the units that matter: at least one, and not all.

    Returns:
        In [0, 1]; 0.5 for scores that tell nothing.

    Source: Hanley and McNeil (1982), :cite:p:`hanley1982roc`.

    Example:
        >>> auroc([3.0, 1.0, 2.0], [0])
        1.0
    """
    values, chosen = _checked(scores, gold)
    ranks = scipy.stats.rankdata(values)
    count = len(chosen)
    if count == values.size:
        raise ValueError(
            complaint(
                "gold",
                "must leave a unit that does not matter",
                f"all {count} came",
                "Score a text with units that are known not to matter, too.",
            )
        )
    above = ranks[chosen].sum() - count * (count + 1) / 2
    return float(above / (count * (values.size - count)))


def average_precision(scores: ArrayLike, gold: Sequence[int]) -> float:
    """Mean precision at each unit that matters, in the order of decreasing scores.

    Of equal scores, the expectation over their random orders is not taken: they count
    with the precision at the end of their tie, as in scikit-learn.

    Args:
        scores: of each unit, shape ``(n,)``.
        gold: positions of the units that matter, at least one.

    Returns:
        In (0, 1].

    Example:
        >>> round(average_precision([3.0, 1.0, 2.0], [0, 1]), 3)
        0.833
    """
    values, chosen = _checked(scores, gold)
    matters = np.zeros(values.size, dtype=bool)
    matters[chosen] = True
    found = 0.0
    for value in values[chosen]:
        above = values >= value
        found += matters[above].mean()
    return float(found / len(chosen))


def recovery_at(scores: ArrayLike, gold: Sequence[int], k: int | None = None) -> float:
    """Share of the units that matter among the ``k`` that score highest.

    Where equal scores straddle the cut, their expectation over random orders counts.

    Args:
        scores: of each unit, shape ``(n,)``.
        gold: positions of the units that matter, at least one.
        k: how many to take; as many as matter unless given.

    Returns:
        In [0, 1].

    Source: the Recovery@k of FlashTrace, :cite:p:`pan2026flashtrace`.

    Example:
        >>> recovery_at([3.0, 1.0, 2.0], [0, 1])
        0.5
    """
    values, chosen = _checked(scores, gold)
    remedy = "Pass how many of the highest scores to take."
    top = len(chosen) if k is None else whole_number("k", k, minimum=1, remedy=remedy)
    top = min(top, values.size)
    cut = np.sort(values)[::-1][top - 1]
    above, level = values > cut, values == cut
    room = (top - above.sum()) / level.sum()
    matters = np.zeros(values.size, dtype=bool)
    matters[chosen] = True
    hits = (above & matters).sum() + room * (level & matters).sum()
    return float(hits / len(chosen))


def coverage(
    scores: ArrayLike,
    gold: Sequence[int],
    bounds: tuple[float, float] = COVERAGE["coverage"],
) -> float:
    """Share of the gold units that have about their part of the attribution.

    A gold unit is covered if its share of the whole attribution, both without their
    signs, lies between ``bounds`` times ``1 / number of gold units``, ends excluded.
    Higher is better; zero where nothing is attributed.

    Args:
        scores: of each unit, shape ``(n,)``, finite.
        gold: positions of the units that are known to matter, at least one.
        bounds: least and most, in parts of an equal share.

    Raises:
        ValueError: if there is no gold unit, one is no position, or a score is not
            finite.

    Source: Walker and Ewetz (2025), :cite:p:`walker2025cage`.

    Example:
        >>> coverage([4.0, 5.0, 1.0], [0, 1])
        1.0
    """
    given, chosen = _checked(scores, gold)
    mass = np.abs(given)
    if mass.sum() == 0.0:
        return 0.0
    share = mass[chosen] / mass.sum() * len(chosen)
    return float(((share > bounds[0]) & (share < bounds[1])).mean())


def agreement(
    one: ArrayLike | Result,
    other: ArrayLike | Result,
    measure: str = "spearman",
    k: int = 5,
) -> float:
    """How alike two results rank the same units.

    Args:
        one: scores of each unit, shape ``(n,)``, or a result: its ``seq_attr``.
        other: of the same units.
        measure: ``"spearman"``, ``"kendall"`` (tau-b), or ``"overlap"``: the share of
            the ``k`` highest that both have.
        k: for ``"overlap"``.

    Returns:
        In [-1, 1], for ``"overlap"`` in [0, 1]; NaN where one of them is constant.

    Raises:
        ValueError: if the shapes differ or the measure is unknown.

    Example:
        >>> agreement([1.0, 2.0, 3.0], [2.0, 4.0, 9.0])
        1.0
    """
    one_of("measure", measure, MEASURES)
    first, second = (
        real_array(name, given.seq_attr if isinstance(given, Result) else given)
        for name, given in (("one", one), ("other", other))
    )
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            complaint(
                "other",
                f"must have the shape of the first, {first.shape}",
                f"{second.shape} came",
                "Compare scores of the same units.",
            )
        )
    if measure == "overlap":
        remedy = "Pass how many of the highest to compare."
        top = min(whole_number("k", k, minimum=1, remedy=remedy), first.size)
        best = [
            set(np.argsort(-scores, kind="stable")[:top].tolist())
            for scores in (first, second)
        ]
        return len(best[0] & best[1]) / top
    if np.ptp(first) == 0.0 or np.ptp(second) == 0.0:
        return float("nan")
    spearman = measure == "spearman"
    test = scipy.stats.spearmanr if spearman else scipy.stats.kendalltau
    return float(test(first, second).statistic)


def _checked(
    scores: ArrayLike, gold: Sequence[int]
) -> tuple[Array, npt.NDArray[np.int64]]:
    values = real_array("scores", scores)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(
            complaint(
                "scores",
                "must be one finite number for each unit",
                f"shape {values.shape} came",
                "Pass result.seq_attr, for example.",
            )
        )
    remedy = f"There are {values.size} units."
    chosen = sorted(
        {whole_number("gold", unit, stop=values.size, remedy=remedy) for unit in gold}
    )
    if not chosen:
        raise ValueError(
            "gold: must name a unit that matters, but it is empty. Pass the positions "
            "of the units that are known to matter."
        )
    return values, np.array(chosen, dtype=np.int64)
