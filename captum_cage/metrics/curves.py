"""Curves of deletion and insertion, and the areas and scores made of them.

Pure functions of arrays: they know neither models nor texts. The formulas are those of
the papers named, and of the code of Walker and Ewetz (2025) where the paper leaves them
open.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike
from scipy.integrate import trapezoid

from captum_cage._checks import complaint, finite_vector, real_array

__all__ = [
    "area",
    "fractions",
    "mas",
    "monotone",
    "remaining",
    "rise",
]

Array = npt.NDArray[np.float64]


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

    Source: Monteiro Paes et al. (2024), :cite:p:`paes2024mexgen`.

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

    ``n_i`` is the running minimum of ``clip((s_i - s_n) / |s_0 - s_n|, 0, 1)``. Where
    the ends are equal there is no scale: as in the authors' code, the minimum stays at
    one until a height lies below the last, and is zero from there.

    Args:
        scores: ``s_i`` after ``i`` deletions, shape ``(n + 1,)``.

    Example:
        >>> monotone([-1.0, -4.0, -3.0, -5.0]).tolist()
        [1.0, 0.25, 0.25, 0.0]
    """
    heights = _curve("scores", scores)
    scale = abs(heights[0] - heights[-1])
    above = heights - heights[-1]
    if scale == 0.0:
        scaled = np.where(above < 0.0, 0.0, 1.0)
    else:
        with np.errstate(over="ignore"):  # a scale of next to nothing: clipped
            scaled = np.clip(above / scale, 0.0, 1.0)
    found: Array = np.minimum.accumulate(scaled)
    return found


def rise(scores: ArrayLike) -> float:
    """RISE: area under the monotone deletion curve, in [0, 1]; lower is better.

    Args:
        scores: ``s_i`` after ``i`` deletions in the order of decreasing attribution,
            shape ``(n + 1,)``.

    Source: Petsiuk et al. (2018), :cite:p:`petsiuk2018rise`; Walker and Ewetz (2025),
    :cite:p:`walker2025cage`.

    Example:
        >>> rise([-1.0, -4.0, -3.0, -5.0])
        0.3333333333333333
    """
    return area(monotone(scores))


def remaining(attributions: ArrayLike, order: Sequence[int]) -> Array:
    """Share of the attribution that is not deleted yet, after each unit of an order.

    Shares are those of the signed sum, as in the code of Walker and Ewetz (2025), so
    that with negative attributions it may leave [0, 1] in between. Without a sum there
    are no shares: all are NaN.

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
    gone = np.concatenate([[0.0], np.cumsum(given[list(order)])])
    if gone[-1] == 0.0:
        return np.full(gone.size, np.nan)
    left: Array = 1.0 - gone / gone[-1]
    return left


def mas(scores: ArrayLike, attributions: ArrayLike, order: Sequence[int]) -> float:
    """MAS: RISE with a penalty for attributions of the wrong size; lower is better.

    With ``n_i`` of :func:`monotone` and ``d_i`` of :func:`remaining`, the area under
    ``minmax(clip(n + |n - d|, 0, 1))``; one half where that is not defined, since its
    ends are equal or nothing is attributed, as in the authors' code.

    Args:
        scores: ``s_i`` after ``i`` deletions, shape ``(n + 1,)``.
        attributions: of each unit, shape ``(n,)``.
        order: positions of all units, in the order in which they go.

    Source: Walker, Simon, Chen and Ewetz (2024), Attribution quality metrics with
    magnitude alignment, :cite:p:`walker2024mas`; as the code of Walker and Ewetz
    (2025), :cite:p:`walker2025cage`, has it for texts.

    Example:
        >>> mas([-1.0, -2.0, -5.0], [1.0, 3.0], [1, 0])
        0.75
    """
    heights = monotone(scores)
    left = remaining(attributions, order)
    penalised = np.clip(heights + np.abs(heights - left), 0.0, 1.0)
    low, high = penalised.min(), penalised.max()
    if not high > low:
        return 0.5
    return area((penalised - low) / (high - low))


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
