"""Questions to rows that are read one after another, from the last one backwards.

Pure NumPy: no row is held longer than it takes to push the mass that sits on it on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from captum_cage._checks import one_of, whole_number
from captum_cage._shares import Normalization, check_entries, checked_weights, shares
from captum_cage.graph import Hops

__all__ = ["RawRow", "StreamedAnswer", "StreamedGraph"]


class RawRow(NamedTuple):
    """The entries of a raw row, and what they hold of it.

    Attributes:
        units: unit of each entry, rising, shape ``(n,)``, integers.
        values: the raw entries, shape ``(n,)``, float64.
        kept: share of the row's mass that they hold, in [0, 1].
    """

    units: NDArray[Any]
    values: NDArray[np.float64]
    kept: float


RowReader: TypeAlias = Callable[[int], RawRow | None]
"""The raw row of a generated unit; None for one that was not computed."""


class StreamedAnswer(NamedTuple):
    """What one pass over all rows gives.

    Attributes:
        attr: mass at each source, shape ``(P,)``, float64: `AttributionGraph.explain`.
        throughput: mass through each generated unit, shape ``(G,)``, float64.
        leaked: mass that ends in rows without mass.
        unresolved: mass that is left open; the certificate.
    """

    attr: NDArray[np.float64]
    throughput: NDArray[np.float64]
    leaked: float
    unresolved: float


class StreamedGraph:
    """An attribution graph whose rows are read anew for each question.

    It answers what `AttributionGraph` answers about a span, to rounding, and holds a
    few numbers per unit and the row that is being read. ``(I - L)^T y = w`` is solved
    as the authors of CAGE sum backwards: from the last row to the first, the mass on a
    row goes on along it. A pass reads each row once at most, and none on which no mass
    sits.

    Args:
        read (Callable): gives the raw row of a generated unit, by its position in ``0
            .. G - 1``; None for one that was not computed.
        sources (ArrayLike): whether a unit is a source, shape ``(N,)``, bool.
        normalization (str): ``"positive"``, ``"absolute"`` or ``"signed"``.
        starts (Mapping, optional): by position, rows by which an explanation starts
            where mass passes by another one. Default: none

    Raises:
        ValueError: if the normalisation is unknown.

    Source: Walker and Ewetz (2025), :cite:p:`walker2025cage`, section 4.

    Example:
        >>> rows = [RawRow(np.array([0, 1]), np.array([1.0, 1.0]), 1.0),
        ...         RawRow(np.array([1, 2]), np.array([1.0, 3.0]), 1.0)]
        >>> graph = StreamedGraph(rows.__getitem__, [True, True, False, False])
        >>> graph.explain([0, 1]).tolist(), graph.unresolved([0, 1])
        ([0.375, 0.625], 0.0)
    """

    def __init__(
        self,
        read: RowReader,
        sources: ArrayLike,
        normalization: Normalization = "positive",
        *,
        starts: Mapping[int, RawRow] | None = None,
    ) -> None:
        one_of("normalization", normalization, get_args(Normalization))
        self._read = read
        self._starts = {} if starts is None else dict(starts)
        self.normalization: Normalization = normalization
        self.sources = np.array(sources, dtype=np.bool_)
        self.generated_units = np.flatnonzero(~self.sources)
        # Place of each unit among the sources or among the generated units.
        self._place = np.empty(self.sources.size, dtype=np.int64)
        self._place[self.sources] = np.arange(self.n_sources)
        self._place[~self.sources] = np.arange(self.n_generated)

    @property
    def n_sources(self) -> int:
        """Number of source units, ``P``."""
        return int(self.sources.sum())

    @property
    def n_generated(self) -> int:
        """Number of generated units, ``G``."""
        return int(self.generated_units.size)

    def answer(self, weights: ArrayLike, *, hops: int | None = None) -> StreamedAnswer:
        """All that one pass over the rows gives.

        Args:
            weights: weight of each generated unit, shape ``(G,)``, finite; not
                negative, except in ``signed``.
            hops: count only paths with at most this many passes through generated
                units; ``None`` for all. It takes ``hops + 2`` numbers per generated
                unit.

        Returns:
            Scores, throughput, leak and certificate.

        Raises:
            TypeError: if the weights are not real numbers, or ``hops`` is not whole.
            ValueError: if weights do not fit, ``hops`` is negative, or a row has an
                entry that is not finite or stands at or after its own unit.
        """
        G = self.n_generated
        given = checked_weights(weights, G, self.normalization)
        if hops is not None:
            remedy = "Pass the number of passes; 0 gives the direct rows."
            hops = whole_number("hops", hops, remedy=remedy)
            hops = hops if hops < G - 1 else None
        # Mass by number of passes, and what is behind the last; one row where all
        # paths count, whose mass goes on in itself.
        mass = np.zeros((1 if hops is None else hops + 2, G))
        mass[0] = given
        attr = np.zeros(self.n_sources)
        leaked = open_mass = 0.0
        for step in range(G - 1, -1, -1):
            waiting = mass[: None if hops is None else -1, step]
            if not waiting.any():
                continue
            first = 0.0
            if step in self._starts and given[step] != 0.0:
                first = given[step]
                waiting = waiting.copy()
                waiting[0] -= first
                alone = np.zeros_like(waiting)
                alone[0] = first
                leak, lacks = self._push(step, self._starts[step], alone, mass, attr)
                leaked += leak
                open_mass += lacks
                if not waiting.any():
                    continue
            leak, lacks = self._push(step, self._read(step), waiting, mass, attr)
            leaked += leak
            open_mass += lacks
        if hops is None:
            return StreamedAnswer(attr, mass[0], leaked, open_mass)
        through, left = mass[:-1].sum(axis=0), mass[-1]
        return StreamedAnswer(attr, through, leaked, open_mass + np.abs(left).sum())

    def _push(
        self,
        step: int,
        row: RawRow | None,
        waiting: NDArray[np.float64],
        mass: NDArray[np.float64],
        attr: NDArray[np.float64],
    ) -> tuple[float, float]:
        """Let mass go on along a row; what of it leaks, and what is left open."""
        total = float(waiting.sum())
        if row is None:
            return 0.0, abs(total)
        units, values, kept = row
        own = self.generated_units[step]
        numbers = np.broadcast_to([[step], [own]], (2, units.size))
        check_entries(numbers[0], units, values, numbers[1])
        part, filled = shares(values, np.array([0, units.size]), self.normalization)
        if not filled[0]:
            return (total, 0.0) if kept == 1.0 else (0.0, abs(total) * (1.0 - kept))
        part = part * kept
        is_source, place = self.sources[units], self._place[units]
        attr[place[is_source]] += total * part[is_source]
        below, onward = place[~is_source], part[~is_source]
        if len(mass) == 1:
            mass[0, below] += waiting[0] * onward
        else:
            for passed in np.flatnonzero(waiting):
                mass[passed + 1, below] += waiting[passed] * onward
        return 0.0, abs(total) * (1.0 - kept)

    def explain(self, weights: ArrayLike) -> NDArray[np.float64]:
        """Mass of all paths to each source, `AttributionGraph.explain`; ``(P,)``."""
        return self.answer(weights).attr

    def throughput(
        self, weights: ArrayLike, *, hops: int | None = None
    ) -> NDArray[np.float64]:
        """Mass that passes through each generated unit, shape ``(G,)``."""
        return self.answer(weights, hops=hops).throughput

    def leaked(self, weights: ArrayLike, *, hops: int | None = None) -> float:
        """Mass that ends in rows without mass, `AttributionGraph.leaked`."""
        return self.answer(weights, hops=hops).leaked

    def unresolved(self, weights: ArrayLike, *, hops: int | None = None) -> float:
        """Mass that is left open, `AttributionGraph.unresolved`."""
        return self.answer(weights, hops=hops).unresolved

    def hops(self, weights: ArrayLike, k: int) -> Hops:
        """Mass of the paths with at most ``k`` passes, `AttributionGraph.hops`."""
        found = self.answer(weights, hops=k)
        return Hops(found.attr, found.unresolved)
