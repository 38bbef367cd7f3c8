"""Raw rows as shares of their mass: checks, normalisation, the heaviest entries.

Rows come as flat arrays in the manner of CSR: the entries of row ``t`` stand at
``indptr[t]:indptr[t + 1]``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from captum_cage._checks import complaint, finite_vector

__all__ = [
    "Normalization",
    "check_entries",
    "checked_weights",
    "heaviest",
    "masses",
    "shares",
]

Normalization = Literal["positive", "absolute", "signed"]
"""How a raw row becomes a row of the graph; see `AttributionGraph`."""


def masses(
    values: NDArray[np.float64], indptr: NDArray[Any], normalization: Normalization
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mass of each raw entry, and the sum of each row.

    The mass is ``max(r, 0)`` in ``positive``, else ``|r|``. Each row is scaled by a
    power of two of its own, which is exact and keeps the sums of huge and of tiny
    entries within range.

    Args:
        values: raw entries, finite, shape ``(nnz,)``.
        indptr: where each row begins, and the end, shape ``(G + 1,)``.
        normalization: ``"positive"``, ``"absolute"`` or ``"signed"``.

    Returns:
        The masses, shape ``(nnz,)``, in [0, 1), and their sums, shape ``(G,)``: 0
        where a row has no mass, else 0.5 or more. Both float64.

    Example:
        >>> values, indptr = np.array([3.0, -2.0, -1.0]), np.array([0, 2, 3])
        >>> mass, total = masses(values, indptr, "positive")
        >>> mass.tolist(), total.tolist()
        ([0.75, 0.0, 0.0], [0.75, 0.0])
    """
    counts = np.diff(indptr)
    mass = np.maximum(values, 0.0) if normalization == "positive" else np.abs(values)
    total = np.zeros(counts.size)
    filled = np.flatnonzero(counts)
    if filled.size:
        starts = indptr[filled]
        exponent = np.frexp(np.maximum.reduceat(mass, starts))[1]
        mass = np.ldexp(mass, -np.repeat(exponent, counts[filled]))
        total[filled] = np.add.reduceat(mass, starts)
    return mass, total


def shares(
    values: NDArray[np.float64], indptr: NDArray[Any], normalization: Normalization
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The normalised entries of raw rows, and which of the rows have mass.

    Args:
        values: raw entries, finite, shape ``(nnz,)``.
        indptr: where each row begins, and the end, shape ``(G + 1,)``.
        normalization: ``"positive"``, ``"absolute"`` or ``"signed"``.

    Returns:
        The shares, shape ``(nnz,)``, float64, in [-1, 1]: their absolute values sum to
        one over a row with mass and are zero elsewhere. The mask, shape ``(G,)``.

    Example:
        >>> values, indptr = np.array([3.0, -1.0]), np.array([0, 2, 2])
        >>> part, filled = shares(values, indptr, "signed")
        >>> part.tolist(), filled.tolist()
        ([0.75, -0.25], [True, False])
    """
    mass, total = masses(values, indptr, normalization)
    filled = total > 0.0
    part = mass / np.repeat(np.where(filled, total, 1.0), np.diff(indptr))
    return np.copysign(part, values) if normalization == "signed" else part, filled


def heaviest(
    mass: NDArray[np.float64], share: float
) -> tuple[NDArray[np.bool_], float]:
    """The fewest entries that hold a share of a row's mass, and what they hold.

    Of equal entries the earlier ones are taken. ``share=1`` takes all that have mass.

    Args:
        mass: mass of each entry, not negative, shape ``(n,)``.
        share: in (0, 1].

    Returns:
        A mask of shape ``(n,)`` and the share of the mass that it holds: ``share`` or
        more, and exactly 1 where nothing is left out or the row has no mass.

    Example:
        >>> chosen, held = heaviest(np.array([1.0, 4.0, 1.0, 2.0]), 0.8)
        >>> chosen.tolist(), held
        ([True, True, False, True], 0.875)
    """
    if share == 1.0 or not mass.any():
        return mass > 0.0, 1.0
    # Sorting the values alone is several times faster than sorting their places.
    falling = np.sort(mass)[::-1]
    held = np.cumsum(falling)
    last = int(np.argmax(held >= share * held[-1]))
    chosen: NDArray[np.bool_] = mass > falling[last]
    equal = np.flatnonzero(mass == falling[last])
    chosen[equal[: last + 1 - np.count_nonzero(chosen)]] = True
    return chosen, float(held[last] / held[-1])


def check_entries(
    row_of: NDArray[Any],
    columns: NDArray[Any],
    values: NDArray[np.float64],
    own_unit: NDArray[Any],
    where: str = "rows",
) -> None:
    """Raise if an entry is not finite or stands at or after its row's own unit.

    Args:
        row_of: row of each entry, shape ``(nnz,)``.
        columns: unit of each entry, shape ``(nnz,)``.
        values: the raw entries, shape ``(nnz,)``.
        own_unit: unit of each entry's row, shape ``(nnz,)``.
        where: the argument, as the user wrote it.

    Raises:
        ValueError: if there is such an entry.

    Example:
        >>> one = np.array([0])
        >>> check_entries(one, one, np.array([1.0]), np.array([2]))
    """

    def place(entry: np.intp) -> tuple[str, str]:
        return (
            f"row {row_of[entry]} (unit {own_unit[entry]})",
            f"unit {columns[entry]}",
        )

    for entry in np.flatnonzero(~np.isfinite(values))[:1]:
        row, unit = place(entry)
        came = "a NaN" if np.isnan(values[entry]) else values[entry]
        raise ValueError(
            complaint(
                where,
                "every entry must be finite",
                f"{row} has {came} at {unit}",
                "Find out why the base method gave it, or pass 0 there.",
            )
        )
    for entry in np.flatnonzero(columns >= own_unit)[:1]:
        row, unit = place(entry)
        raise ValueError(
            complaint(
                where,
                "must be causal: zero for every unit at or after the row's own",
                f"{row} has {values[entry]} at {unit}",
                "Check the order of the units and the mask of sources, or set these "
                "entries to 0.",
            )
        )


def checked_weights(
    weights: Any, n_generated: int, normalization: Normalization
) -> NDArray[np.float64]:
    """The weights of the generated units, if they are weights of such a graph.

    Args:
        weights: anything that NumPy turns into an array of real numbers.
        n_generated: ``G``.
        normalization: ``"signed"`` allows negative weights.

    Returns:
        A vector of its own, shape ``(G,)``, float64.

    Raises:
        TypeError: if the weights are not real numbers.
        ValueError: if their number differs from ``G``, or one is not finite, or one is
            negative where it must not be.

    Example:
        >>> checked_weights([0, 1], 2, "positive").tolist()
        [0.0, 1.0]
    """
    return finite_vector(
        "weights",
        weights,
        n_generated,
        entry="generated unit",
        negative=None
        if normalization == "signed"
        else 'Subtract two explanations instead, or use normalization="signed".',
    )
