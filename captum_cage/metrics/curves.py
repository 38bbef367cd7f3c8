"""Curves of deletion and insertion, and the areas and scores made of them.

Pure functions of arrays: they know neither models nor texts. The formulas are those of
the papers named, and of the code of Walker and Ewetz (2025) where the paper leaves them
open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike
from scipy.integrate import trapezoid

from captum_cage._checks import complaint, finite_vector, real_array

__all__ = [
    "COVERAGE",
    "area",
    "coverage",
    "fractions",
    "mas",
    "monotone",
    "remaining",
    "rise",
]

Array = npt.NDArray[np.float64]

COVERAGE: dict[str, tuple[float, float]] = {
    "coverage": (0.5, 1.5),
    "coverage, above half": (0.5, np.inf),
    "coverage, above share": (1.0, np.inf),
}
"""Bounds of a covered gold unit's share, in parts of ``1 / number of gold units``."""


def area(values: ArrayLike, places: ArrayLike | None = None) -> float:
    """Area under a curve by trapezia, over an axis of length one.

    With equal steps, ``(sum(values) - values[0] / 2 - values[-1] / 2) / n`` for
    ``n + 1`` values, as the code of Walker and Ewetz (2025) has it.

    Args:
        values: height at each place, shape ``(n + 1,)``, at least two.
        places: where they stand on the axis, rising from 0 to 1, shape ``(n + 1,)``.
            Equal steps unless given.

    Raises:
        ValueError: if there are fewer than two values or the places do not fit.

    Example:
        >>> area([1.0, 0.5, 0.0])
        0.5
        >>> area([1.0, 0.5, 0.0], [0.0, 0.25, 1.0])
        0.375
    """
    heights = _curve("values", values)
    at = np.linspace(0.0, 1.0, heights.size)
    if places is not None:
        at = real_array("places", places)
        if at.shape != heights.shape or (np.diff(at) < 0).any():
            raise ValueError(
                complaint(
                    "places",
                    f"must rise and have shape ({heights.size},)",
                    f"shape {at.shape} came",
                    "Pass one place for each value, from 0 to 1.",
                )
            )
    return float(trapezoid(heights, at))


def fractions(order: Sequence[int], sizes: ArrayLike) -> Array:
    """Part of all tokens that are gone after each unit of an order.

    On this axis a long unit takes as much room as the tokens that it has, so that an
    order is not rewarded for long units.

    Args:
        order: positions of all units, in the order in which they go.
        sizes: number of tokens of each unit, shape ``(n,)``.

    Returns:
        Shape ``(n + 1,)``, from 0 to 1.

    Source: Paes et al. (2024), arXiv:2403.14459.

    Example:
        >>> fractions([1, 0], [1, 3]).tolist()
        [0.0, 0.75, 1.0]
    """
    tokens = finite_vector("sizes", sizes, len(order), entry="unit")
    gone: Array = np.concatenate([[0.0], np.cumsum(tokens[list(order)])])
    whole: float = float(gone[-1])
    return gone / whole


def monotone(scores: ArrayLike) -> Array:
    """A deletion curve as RISE and MAS count it: scaled, clipped, never rising.

    ``n_i`` is the running minimum of ``clip((s_i - s_n) / |s_0 - s_n|, 0, 1)``. A curve
    whose ends are equal has no scale and is all zeros.

    Args:
        scores: ``s_i`` after ``i`` deletions, shape ``(n + 1,)``.

    Example:
        >>> monotone([-1.0, -4.0, -3.0, -5.0]).tolist()
        [1.0, 0.25, 0.25, 0.0]
    """
    heights = _curve("scores", scores)
    scale = abs(heights[0] - heights[-1])
    if scale == 0.0:
        return np.zeros(heights.size)
    with np.errstate(over="ignore"):  # a scale of next to nothing: clipped
        scaled = np.clip((heights - heights[-1]) / scale, 0.0, 1.0)
    found: Array = np.minimum.accumulate(scaled)
    return found


def rise(scores: ArrayLike) -> float:
    """RISE: area under the monotone deletion curve, in [0, 1]; lower is better.

    Args:
        scores: ``s_i`` after ``i`` deletions in the order of decreasing attribution,
            shape ``(n + 1,)``.

    Source: Petsiuk et al. (2018), arXiv:1806.07421; Walker and Ewetz (2025),
    arXiv:2512.15663.

    Example:
        >>> rise([-1.0, -4.0, -3.0, -5.0])
        0.3333333333333333
    """
    return area(monotone(scores))


def remaining(attributions: ArrayLike, order: Sequence[int]) -> Array:
    """Share of the attribution that is not deleted yet, after each unit of an order.

    Negative attributions count as none. Where there is no attribution at all, what is
    left falls in equal steps.

    Args:
        attributions: of each unit, shape ``(n,)``.
        order: positions of all units, in the order in which they go.

    Returns:
        Shape ``(n + 1,)``, from 1 to 0.

    Example:
        >>> remaining([1.0, 3.0], [1, 0]).tolist()
        [1.0, 0.25, 0.0]
    """
    given = finite_vector("attributions", attributions, len(order), entry="unit")
    mass = np.clip(given, 0.0, None)[list(order)]
    if mass.sum() == 0.0:
        return np.linspace(1.0, 0.0, len(order) + 1)
    left: Array = 1.0 - np.concatenate([[0.0], np.cumsum(mass)]) / mass.sum()
    return np.clip(left, 0.0, 1.0)


def mas(scores: ArrayLike, attributions: ArrayLike, order: Sequence[int]) -> float:
    """MAS: RISE with a penalty for attributions of the wrong size; lower is better.

    With ``n_i`` of :func:`monotone` and ``d_i`` of :func:`remaining`, the area under
    ``minmax(clip(n + |n - d|, 0, 1))``.

    Args:
        scores: ``s_i`` after ``i`` deletions, shape ``(n + 1,)``.
        attributions: of each unit, shape ``(n,)``.
        order: positions of all units, in the order in which they go.

    Source: Walker, Simon, Chen and Ewetz (2024), Attribution quality metrics with
    magnitude alignment, IJCAI; as the code of Walker and Ewetz (2025),
    arXiv:2512.15663, has it for texts.

    Example:
        >>> mas([-1.0, -2.0, -5.0], [1.0, 3.0], [1, 0])
        0.75
    """
    heights = monotone(scores)
    left = remaining(attributions, order)
    penalised = np.clip(heights + np.abs(heights - left), 0.0, 1.0)
    low, high = penalised.min(), penalised.max()
    if high == low:
        return 0.0
    return area((penalised - low) / (high - low))


def coverage(
    attributions: ArrayLike,
    gold: Sequence[int],
    bounds: tuple[float, float] = COVERAGE["coverage"],
) -> float:
    """Share of the gold units that have about their part of the attribution.

    A gold unit is covered if its share of the whole attribution lies within ``bounds``
    times ``1 / number of gold units``. Higher is better.

    Args:
        attributions: of each unit, shape ``(n,)``; negative ones count as none.
        gold: positions of the units that are known to matter, at least one.
        bounds: least and most, in parts of an equal share.

    Raises:
        ValueError: if there is no gold unit.

    Source: Walker and Ewetz (2025), arXiv:2512.15663.

    Example:
        >>> coverage([4.0, 5.0, 1.0], [0, 1])
        1.0
    """
    given: Any = real_array("attributions", attributions)
    chosen = sorted({int(unit) for unit in gold})
    if not chosen:
        raise ValueError(
            "gold: must name a unit that matters, but it is empty. Pass the positions "
            "of the units that are known to matter."
        )
    mass = np.clip(given, 0.0, None)
    if mass.sum() == 0.0:
        return 0.0
    share = mass[chosen] / mass.sum() * len(chosen)
    return float(((share >= bounds[0]) & (share <= bounds[1])).mean())


def _curve(where: str, values: ArrayLike) -> Array:
    heights = real_array(where, values)
    if heights.ndim != 1 or heights.size < 2 or not np.isfinite(heights).all():
        raise ValueError(
            complaint(
                where,
                "must be a curve of at least two finite numbers",
                f"shape {heights.shape} came",
                "Pass one number before and one after each deletion.",
            )
        )
    return heights
