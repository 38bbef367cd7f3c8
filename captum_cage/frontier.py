"""Which rows to compute next, so that little mass sits on rows that were not computed.

The push method: compute the row on which the most mass sits, push its mass on along
the row, and stop when what sits on all other rows is small. That rest is exactly what
the graph of the computed rows leaves open; `AttributionGraph.unresolved` says why it
bounds the error.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg.blas import dtpmv, dtpsv

from captum_cage._checks import complaint, one_of, real_array, shown, whole_number
from captum_cage._shares import Normalization, check_entries, checked_weights, shares

__all__ = ["DENSE_ROWS", "Frontier"]

DENSE_ROWS = 10_000
"""Largest ``G`` for which the triangle of ``L`` is stored densely (0.4 GB)."""


class Frontier:
    """The rows that were computed, and the mass that waits on the others.

    There are ``P`` source units, then ``G`` generated units, as in `AttributionGraph`.
    The caller computes the rows that are wanted and adds them, in any order:

        while (steps := frontier.wanted(8)).size:
            for step in steps:
                frontier.add(step, row_of(step))

    Args:
        n_sources: ``P``; the sources are the first units.
        weights: weight of each generated unit that is explained, shape ``(G,)``; not
            negative, except in ``signed``.
        normalization: ``"positive"``, ``"absolute"`` or ``"signed"``.
        tolerance: share of the explained mass that may stay unresolved, in [0, 1];
            with 0, each row that any mass reaches is wanted.
        hops: number of passes through generated units after which the series is cut,
            0 or more; ``None`` where it is not cut. Each row then costs as many
            products with ``L``.

    Raises:
        TypeError: if an argument is not a number of its kind.
        ValueError: if one is out of range, the weights do not fit, or the
            normalisation is unknown.

    Source:
        The push method of Andersen, Chung and Lang (2006), "Local graph partitioning
        using PageRank vectors", :cite:p:`andersen2006pagerank`, on an acyclic graph.

    Example:
        A chain: all of the last row leads to the second, and all of that to the source.

        >>> frontier = Frontier(1, [0, 0, 1], "positive", 0.01)
        >>> frontier.wanted(8).tolist(), frontier.unresolved
        ([2], 1.0)
        >>> frontier.add(2, [0, 0, 1, 0])
        >>> frontier.wanted(8).tolist(), frontier.pending.tolist()
        ([1], [0.0, 1.0, 0.0])
        >>> frontier.add(1, [1, 0, 0, 0])
        >>> frontier.wanted(8).tolist(), frontier.computed.tolist()
        ([], [False, True, True])
    """

    def __init__(
        self,
        n_sources: int,
        weights: ArrayLike,
        normalization: Normalization,
        tolerance: float,
        hops: int | None = None,
    ) -> None:
        one_of("normalization", normalization, get_args(Normalization))
        self._normalization = normalization
        self._n_sources = whole_number(
            "n_sources", n_sources, remedy="Pass the number of sources."
        )
        given = real_array("weights", weights)
        started = checked_weights(given, given.size, normalization)
        self._limit = _tolerated(tolerance) * float(np.abs(started).sum())
        last = max(started.size - 1, 0)
        self._hops = None
        if hops is not None:
            remedy = "Pass the number of passes; 0 takes the direct rows."
            number = whole_number("hops", hops, remedy=remedy)
            # A path passes through at most G - 1 units below the first.
            self._hops = number if number < last else None
        # Mass by number of passes, one row for each; a single row where all count.
        self._mass = np.zeros(((self._hops or 0) + 1, started.size))
        self._mass[0] = started
        self._computed = np.zeros(started.size, dtype=np.bool_)
        self._rows: _Rows = (
            _PackedRows(started.size)
            if started.size <= DENSE_ROWS
            else _SparseRows(started.size)
        )

    @property
    def computed(self) -> NDArray[np.bool_]:
        """Which rows were added, shape ``(G,)``: what the graph takes as ``kept``."""
        return self._computed.copy()

    @property
    def pending(self) -> NDArray[np.float64]:
        """Absolute mass that sits on each row that was not computed, shape ``(G,)``.

        0 for computed rows; float64, not negative. It is ``|y|`` of the throughput
        ``y`` in the graph of the computed rows, cut at ``hops``.
        """
        waiting: NDArray[np.float64] = np.abs(self._mass.sum(axis=0))
        waiting[self._computed] = 0.0
        return waiting

    @property
    def unresolved(self) -> float:
        """Sum of `pending`.

        With ``hops`` the graph's ``unresolved`` is larger: it also counts the mass
        beyond the cut, which no row within it can resolve.
        """
        return float(self.pending.sum())

    def wanted(self, most: int) -> NDArray[np.int64]:
        """The rows to compute next: those on which the most mass sits.

        Args:
            most: largest number of rows, 1 or more.

        Returns:
            Row indices in ``0 .. G - 1``, int64, the one with the most pending mass
            first and of equal ones the later. At most ``most``; no row without mass,
            and no more than it takes to leave at most ``tolerance`` of the explained
            mass on the others. Empty when no row is needed any more.

        Raises:
            TypeError: if ``most`` is not a whole number.
            ValueError: if it is less than 1.

        Example:
            >>> Frontier(1, [1, 4, 2], "positive", 0.2).wanted(8).tolist()
            [1, 2]
        """
        remedy = "Pass the number of rows that are computed at once."
        number = whole_number("most", most, minimum=1, remedy=remedy)
        waiting = self.pending
        if waiting.sum() <= self._limit:
            return np.zeros(0, dtype=np.int64)
        rising = np.argsort(waiting, kind="stable")
        # What is left when the last, the last two, ... of them are not listed.
        left = np.cumsum(waiting[rising])
        unlisted = int(np.searchsorted(left, self._limit, side="right"))
        # By another order of summing, all might be left.
        unlisted = min(unlisted, waiting.size - 1)
        return rising[unlisted:][::-1][:number].astype(np.int64)

    def add(self, step: int, row: ArrayLike) -> None:
        """Take in a raw row and push the mass that sits on it on along it.

        Args:
            step: which row, in ``0 .. G - 1``.
            row: the raw row, shape ``(N,)``; zero from the row's own unit on.

        Raises:
            TypeError: if the step or the row are not numbers of their kind.
            ValueError: if the step is out of range or was added before, or if the row
                has another shape, an entry that is not finite, or one at or after its
                own unit.
        """
        size = self._computed.size
        remedy = "Pass the index of a generated unit."
        number = whole_number("step", step, stop=size, remedy=remedy)
        if self._computed[number]:
            raise ValueError(
                complaint(
                    "step",
                    "each row is added once",
                    f"row {number} came again",
                    "Ask wanted() which rows are needed.",
                )
            )
        raw = real_array("row", row)
        if raw.shape != (self._n_sources + size,):
            raise ValueError(
                complaint(
                    "row",
                    f"must have shape ({self._n_sources + size},), one entry per unit",
                    f"shape {raw.shape} came",
                    "Pass the whole raw row of one generated unit.",
                )
            )
        filled = np.flatnonzero(raw)
        own = self._n_sources + number
        check_entries(
            np.full(filled.size, number),
            filled,
            raw[filled],
            np.full(filled.size, own),
            "row",
        )
        ends = np.array([0, filled.size])
        raw[filled], _ = shares(raw[filled], ends, self._normalization)
        part = raw[self._n_sources : own]  # to the generated units before this one
        self._push(number, part)
        self._rows.store(number, part)
        self._computed[number] = True

    def _push(self, step: int, part: NDArray[np.float64]) -> None:
        """Let the mass on a row go on along it, and along the computed rows below."""
        below = self._mass[:, :step]
        if self._hops is None:
            below[0] += self._rows.spread(part * self._mass[0, step])
            return
        arriving = np.zeros(step)
        for passed in range(self._hops):
            arriving = self._rows.passed(arriving) + part * self._mass[passed, step]
            below[passed + 1] += arriving


class _Rows(Protocol):
    """The computed rows' shares of the generated units: ``L``, other rows being zero.

    Masses are vectors of any size ``n``; only the first ``n`` rows are looked at.
    """

    def store(self, step: int, part: NDArray[np.float64]) -> None:
        """Take in a row, shape ``(step,)``."""

    def passed(self, mass: NDArray[np.float64]) -> NDArray[np.float64]:
        """``L^T mass``: where a mass is after one pass."""

    def spread(self, mass: NDArray[np.float64]) -> NDArray[np.float64]:
        """``(I - L^T)^-1 mass``: what passes through each unit in the end."""


class _PackedRows:
    """``L`` as BLAS packs a triangle: its leading blocks are prefixes of one vector."""

    def __init__(self, size: int) -> None:
        # Columns of the upper triangle (I - L)^T. The diagonal stays zero: dtpsv takes
        # ones for it, and dtpmv then multiplies with -L^T alone.
        self._packed = np.zeros(size * (size + 1) // 2)

    def store(self, step: int, part: NDArray[np.float64]) -> None:
        start = step * (step + 1) // 2
        np.negative(part, out=self._packed[start : start + step])

    def passed(self, mass: NDArray[np.float64]) -> NDArray[np.float64]:
        if not mass.any():
            return mass
        product: NDArray[np.float64] = -dtpmv(mass.size, self._block(mass), mass)
        return product

    def spread(self, mass: NDArray[np.float64]) -> NDArray[np.float64]:
        if not mass.any():
            return mass
        solved: NDArray[np.float64] = dtpsv(mass.size, self._block(mass), mass, diag=1)
        return solved

    def _block(self, mass: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._packed[: mass.size * (mass.size + 1) // 2]


class _SparseRows:
    """``L`` row by row, for graphs whose triangle is too large to be stored."""

    def __init__(self, size: int) -> None:
        self._stored = np.zeros(size, dtype=np.bool_)
        self._row: dict[int, tuple[NDArray[np.intp], NDArray[np.float64]]] = {}

    def store(self, step: int, part: NDArray[np.float64]) -> None:
        columns = np.flatnonzero(part)
        self._row[step] = (columns, part[columns])
        self._stored[step] = True

    def passed(self, mass: NDArray[np.float64]) -> NDArray[np.float64]:
        arrived = np.zeros_like(mass)
        for step in np.flatnonzero(self._stored[: mass.size] & (mass != 0.0)).tolist():
            columns, part = self._row[step]
            arrived[columns] += mass[step] * part
        return arrived

    def spread(self, mass: NDArray[np.float64]) -> NDArray[np.float64]:
        through = mass.copy()
        for step in np.flatnonzero(self._stored[: mass.size])[::-1].tolist():
            if through[step] != 0.0:
                columns, part = self._row[step]
                through[columns] += through[step] * part
        return through


def _tolerated(tolerance: Any) -> float:
    """The tolerance, if it is a share."""
    must = "must be at least 0 and at most 1"
    remedy = "Pass the share of the explained mass that may stay unresolved, or 0."
    if not isinstance(tolerance, Real) or isinstance(tolerance, bool):
        came = f"{shown(tolerance)} came"
        raise TypeError(complaint("tolerance", must, came, remedy))
    share = float(tolerance)
    if not 0.0 <= share <= 1.0:
        raise ValueError(complaint("tolerance", must, f"{share} came", remedy))
    return share
