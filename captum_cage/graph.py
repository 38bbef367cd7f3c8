"""The attribution graph: which unit depends on which, and what follows from it.

Pure NumPy and SciPy: it knows nothing of Captum, of tokens or of language.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain, count, pairwise, repeat
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, issparse

from captum_cage import solve
from captum_cage._checks import (
    complaint,
    finite_vector,
    one_of,
    real_array,
    shown,
    whole_number,
)
from captum_cage._shares import (
    Normalization,
    check_entries,
    checked_weights,
    heaviest,
    masses,
    shares,
)
from captum_cage.solve import Hops, Path

__all__ = ["AttributionGraph", "Hops", "Normalization", "Path"]


@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph:
    """Units and the share that each generated unit owes to every unit before it.

    There are ``P`` source units and ``G`` generated units, ``N = P + G`` in all, in
    the order in which they stand in the text. A raw row ``r`` becomes

    - ``positive``: ``max(r, 0) / sum(max(r, 0))``,
    - ``absolute``: ``|r| / sum(|r|)``,
    - ``signed``: ``r / sum(|r|)``.

    A row without mass stays zero: what reaches it leaks. A graph never changes, and
    its arrays are read-only.

    A graph may be an approximation: rows that were not computed, and rows of which the
    light entries were dropped. Such a row is multiplied by the share of its mass that
    it kept, so what is missing is missing from its sum, and `unresolved` certifies how
    much an answer can lack. In absolute values, each row's sum, its ``leak`` and its
    ``left_out`` make one.

    Make one with `from_rows`. The raw rows, the sources, the normalisation and what
    the rows kept are all there is to save: the rest follows from them.

    Attributes:
        rows: the raw rows, shape ``(G, N)``, float64; an array where an array was
            given, else a CSR array.
        sources: whether a unit is a source, shape ``(N,)``, bool.
        normalization: ``"positive"``, ``"absolute"`` or ``"signed"``.
        kept: share of each generated unit's mass that the entries of its row hold,
            shape ``(G,)``, float64, in [0, 1]: 1 for a complete row, 0 for one that
            was not computed. Default: all ones.
        matrix: the graph, CSR array of shape ``(N, N)``, float64, lower triangular.
            Rows of sources are unit vectors, rows of generated units are normalised,
            multiplied by ``kept`` and stand strictly below the diagonal.
        leak: share of each generated unit's mass that goes nowhere, shape ``(G,)``,
            float64: exactly 1 where its complete row has no mass, else exactly 0.
        left_out: ``1 - kept``, share of each generated unit's mass that may go
            anywhere, shape ``(G,)``, float64, in [0, 1].
        source_units: unit indices of the sources, shape ``(P,)``, int64.
        generated_units: unit indices of the generated units, shape ``(G,)``, int64.

    Source:
        Walker and Ewetz (2025), arXiv:2512.15663, sections 3 and 4.

    Example:
        Two sources and two generated units. The second generated unit owes a quarter
        to the last source and the rest to the first generated unit.

        >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
        >>> graph
        AttributionGraph(n_sources=2, n_generated=2, normalization='positive')
        >>> graph.explain([0, 1]).tolist()
        [0.375, 0.625]
    """

    rows: Any
    sources: NDArray[np.bool_]
    normalization: Normalization = "positive"
    kept: NDArray[np.float64] = None  # type: ignore[assignment]
    matrix: csr_array = field(init=False)
    leak: NDArray[np.float64] = field(init=False)
    left_out: NDArray[np.float64] = field(init=False)
    source_units: NDArray[np.int64] = field(init=False)
    generated_units: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        one_of("normalization", self.normalization, get_args(Normalization))
        raw = _raw_rows(self.rows)
        sources = _source_mask(self.sources, *raw.shape)
        generated_units = np.flatnonzero(~sources).astype(np.int64)
        kept = _kept_shares(self.kept, generated_units.size)
        entries = _canonical(csr_array(raw))
        row_of = _row_of(entries)
        check_entries(row_of, entries.indices, entries.data, generated_units[row_of])
        part, filled = shares(entries.data, entries.indptr, self.normalization)
        _check_kept(kept, filled, np.diff(entries.indptr), generated_units)
        normalised = csr_array(
            (part * kept[row_of], entries.indices, entries.indptr),
            shape=entries.shape,
            copy=True,
        )
        # A frozen dataclass sets its own fields this way.
        for name, value in {
            "rows": entries if issparse(raw) else raw,
            "sources": sources,
            "kept": kept,
            "matrix": _with_source_rows(_canonical(normalised), sources),
            "leak": (~filled & (kept == 1.0)).astype(np.float64),
            "left_out": 1.0 - kept,
            "source_units": np.flatnonzero(sources).astype(np.int64),
            "generated_units": generated_units,
        }.items():
            object.__setattr__(self, name, _locked(value))

    @classmethod
    def from_rows(
        cls,
        rows: ArrayLike | csr_array | Iterable[ArrayLike | None],
        sources: int | ArrayLike,
        normalization: Normalization = "positive",
        *,
        kept: ArrayLike | None = None,
        sparsify: float | None = None,
    ) -> AttributionGraph:
        """The graph of raw attribution rows.

        Args:
            rows: raw, signed rows of the generated units in their order, shape
                ``(G, N)``; array-like or any SciPy sparse matrix. Zero for every unit
                at or after the row's own. They are copied and never changed. Or an
                iterator of rows of shape ``(N,)``, which is consumed one row at a time
                and stored sparsely; ``None`` stands for a row that was not computed,
                there and in a list or tuple of rows.
            sources: the number ``P`` of sources if these are the first ``P`` units,
                or a boolean mask of shape ``(N,)``, ``True`` for a source, if sources
                also stand after generated text.
            normalization: ``"positive"``, ``"absolute"`` or ``"signed"``.
            kept: share of each row's mass that its entries hold, shape ``(G,)``, in
                [0, 1]; 0 for a row that was not computed. By default 1 for every row
                but those that are ``None``.
            sparsify: share of each row's mass to keep, as in `sparsified`; rows of an
                iterator are cut as they come. ``None`` keeps every entry.

        Returns:
            The graph.

        Raises:
            TypeError: if rows, sources or shares are not numbers or booleans of this
                kind.
            ValueError: if shapes do not fit, an entry is not finite, a row has an
                entry at or after its own unit, the normalisation is unknown, a share
                is out of range, a row of which nothing is kept has entries, or one of
                which a part is kept has no mass.

        Example:
            A source, a generated unit, a tool result, a generated unit:

            >>> rows = [[2, 0, 0, 0], [1, 1, 2, 0]]
            >>> graph = AttributionGraph.from_rows(rows, [True, False, True, False])
            >>> graph.matrix.toarray().tolist()[3]
            [0.25, 0.25, 0.5, 0.0]
            >>> graph.marginals().tolist()
            [[1.0, 0.0], [0.5, 0.5]]

            Only the last row is known:

            >>> graph = AttributionGraph.from_rows([None, [0, 1, 3, 0]], 2)
            >>> graph.explain([0, 1]).tolist(), graph.unresolved([0, 1])
            ([0.0, 0.25], 0.75)
        """
        # Whatever came: the constructor checks it.
        raw: Any = rows
        mask: Any = sources
        parts: Any = kept
        share = None if sparsify is None else _cut_share("sparsify", sparsify)
        listed = isinstance(raw, (list, tuple)) and any(row is None for row in raw)
        if listed or isinstance(raw, Iterator):
            one_of("normalization", normalization, get_args(Normalization))
            raw, parts = _collected(raw, mask, normalization, parts, share)
            share = None
        graph = cls(raw, mask, normalization, parts)
        return graph if share is None else graph.sparsified(share)

    @property
    def n_units(self) -> int:
        """Number of units, ``N``.

        Example:
            >>> AttributionGraph.from_rows([[1, 1, 0]], 2).n_units
            3
        """
        return int(self.sources.size)

    @property
    def n_sources(self) -> int:
        """Number of source units, ``P``.

        Example:
            >>> AttributionGraph.from_rows([[1, 1, 0]], 2).n_sources
            2
        """
        return int(self.source_units.size)

    @property
    def n_generated(self) -> int:
        """Number of generated units, ``G``.

        Example:
            >>> AttributionGraph.from_rows([[1, 1, 0]], 2).n_generated
            1
        """
        return int(self.generated_units.size)

    def blocks(self) -> tuple[csr_array, csr_array]:
        """The rows of the generated units, cut into two blocks.

        Returns:
            ``A``, shape ``(G, P)``: shares of the sources. ``L``, shape ``(G, G)``,
            strictly lower triangular: shares of the generated units. Both CSR,
            float64 and read-only.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> to_sources, to_generated = graph.blocks()
            >>> to_sources.toarray().tolist(), to_generated.toarray().tolist()
            ([[0.5, 0.5], [0.0, 0.25]], [[0.0, 0.0], [0.75, 0.0]])
        """
        return self._blocks

    @cached_property
    def _blocks(self) -> tuple[csr_array, csr_array]:
        generated = csr_array(self.matrix[self.generated_units])  # (G, N)
        to_sources = _canonical(csr_array(generated[:, self.source_units]))
        to_generated = _canonical(csr_array(generated[:, self.generated_units]))
        return _locked(to_sources), _locked(to_generated)

    def marginals(self, *, hops: int | None = None) -> NDArray[np.float64]:
        """Mass of all paths from each generated unit to each source unit.

        Solves ``(I - L) X = A``. To explain one span, `explain` is far cheaper.

        Args:
            hops: count only paths with at most this many passes through generated
                units: ``X = sum_i L^i A`` for ``i <= hops``. ``None`` for all.

        Returns:
            ``X``, shape ``(G, P)``, float64. In ``positive`` and ``absolute`` its
            entries are in [0, 1] and its rows sum to one less what leaks on the way
            and what is unresolved.

        Raises:
            TypeError: if ``hops`` is not a whole number.
            ValueError: if ``hops`` is negative.

        Source:
            Walker and Ewetz (2025), arXiv:2512.15663, section 4.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> graph.marginals().tolist()
            [[0.5, 0.5], [0.375, 0.625]]
            >>> graph.marginals(hops=0).tolist()
            [[0.5, 0.5], [0.0, 0.25]]
        """
        if hops is None:
            return solve.marginals(*self.blocks())
        return solve.truncated_marginals(*self.blocks(), _passes("hops", hops))

    def explain(self, weights: ArrayLike) -> NDArray[np.float64]:
        """Mass of all paths from the weighted generated units to each source unit.

        Equals ``weights @ marginals()``, at the cost of one solve with a vector.
        In ``positive`` and ``absolute``,
        ``explain(w).sum() + leaked(w) + unresolved(w) == w.sum()``.

        Args:
            weights: weight of each generated unit, shape ``(G,)``, finite; not
                negative, except in a ``signed`` graph.

        Returns:
            Shape ``(P,)``, float64.

        Raises:
            TypeError: if the weights are not real numbers.
            ValueError: if their number differs from ``G``, or one is not finite, or
                one is negative where it must not be.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> graph.explain([0.5, 0.5]).tolist()
            [0.4375, 0.5625]
        """
        to_sources, _ = self.blocks()
        attr: NDArray[np.float64] = to_sources.T @ self.throughput(weights)
        return attr

    def throughput(
        self, weights: ArrayLike, *, hops: int | None = None
    ) -> NDArray[np.float64]:
        """Mass that passes through each generated unit when some are explained.

        Solves ``(I - L)^T y = w``. A unit's own weight counts as passing through it.

        Args:
            weights: as for `explain`.
            hops: count only paths with at most this many passes through generated
                units below the first: ``y = sum_i (L^T)^i w`` for ``i <= hops``.
                ``None`` for all.

        Returns:
            ``y``, shape ``(G,)``, float64.

        Raises:
            TypeError: as for `explain`, or if ``hops`` is not a whole number.
            ValueError: as for `explain`, or if ``hops`` is negative.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> graph.throughput([0, 1]).tolist()
            [0.75, 1.0]
            >>> graph.throughput([0, 1], hops=0).tolist()
            [0.0, 1.0]
        """
        through, _ = self._followed("hops", weights, hops)
        return through

    def leaked(self, weights: ArrayLike, *, hops: int | None = None) -> float:
        """Mass that ends in rows without mass when some units are explained.

        Args:
            weights: as for `explain`.
            hops: count only what leaks within this many passes through generated
                units, as in `hops`; ``None`` for all.

        Returns:
            The sum of ``throughput(weights, hops=hops) * leak``.

        Raises:
            TypeError: as for `explain`, or if ``hops`` is not a whole number.
            ValueError: as for `explain`, or if ``hops`` is negative.

        Example:
            >>> graph = AttributionGraph.from_rows([[-1, 0, 0], [1, 3, 0]], 1)
            >>> graph.leak.tolist(), graph.leaked([0, 1])
            ([1.0, 0.0], 0.75)
            >>> graph.explain([0, 1]).tolist(), graph.leaked([0, 1], hops=0)
            ([0.25], 0.0)
        """
        return float(self.throughput(weights, hops=hops) @ self.leak)

    def unresolved(self, weights: ArrayLike, *, hops: int | None = None) -> float:
        """Mass that the graph leaves open when some units are explained.

        A certificate. Let ``x`` be this graph's answer, `explain` or that of `hops`,
        and ``x*`` the answer along all paths of the complete graph, in which each row
        has all of its mass. In ``positive`` and ``absolute``, ``0 <= x* - x`` for each
        source, ``(x* - x).sum() <= unresolved``, and
        ``x.sum() + leaked + unresolved == w.sum()``. In ``signed``, the sum of
        ``|x* - x|`` is at most ``unresolved``.

        It holds because ``x* - x`` is what the left out mass ``y[t] * left_out[t]``
        (and the mass ``left`` at which the series was cut) would still bring, and no
        mass grows on its way.

        Args:
            weights: as for `explain`.
            hops: number of passes after which the series is cut, as in `hops`;
                ``None`` where it is not cut.

        Returns:
            The sum of ``|throughput(weights, hops=hops)| * left_out``, plus the sum of
            ``|left|``. Not negative; exactly 0 where nothing is left out or cut.

        Raises:
            TypeError: as for `explain`, or if ``hops`` is not a whole number.
            ValueError: as for `explain`, or if ``hops`` is negative.

        Example:
            Only the last row was computed, and three quarters of it lead to the first.

            >>> rows = [[0, 0, 0, 0], [0, 1, 3, 0]]
            >>> graph = AttributionGraph.from_rows(rows, 2, kept=[0, 1])
            >>> graph.explain([0, 1]).tolist(), graph.unresolved([0, 1])
            ([0.0, 0.25], 0.75)
        """
        return self._open_mass(*self._followed("hops", weights, hops))

    def hops(self, weights: ArrayLike, k: int) -> Hops:
        """Mass of the paths with at most ``k`` passes through generated units.

        ``k=0`` takes the direct rows; from ``k = G - 1`` on it is `explain`. In
        ``positive`` and ``absolute``,
        ``attr.sum() + leaked(w, hops=k) + unresolved == w.sum()``, and the full answer
        is at least ``attr`` for each source and at most ``unresolved`` above it in sum.

        Args:
            weights: as for `explain`.
            k: number of passes, 0 or more.

        Returns:
            ``attr``, shape ``(P,)``, float64, and ``unresolved(w, hops=k)``: the mass
            that still sits on generated units or was left out of their rows.

        Raises:
            TypeError: as for `explain`, or if ``k`` is not a whole number.
            ValueError: as for `explain`, or if ``k`` is negative.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> attr, unresolved = graph.hops([0, 1], 0)
            >>> attr.tolist(), unresolved
            ([0.0, 0.25], 0.75)
        """
        number = _passes("k", k)
        through, left = self._followed("k", weights, number)
        to_sources, _ = self.blocks()
        return Hops(to_sources.T @ through, self._open_mass(through, left))

    def _followed(
        self, where: str, weights: ArrayLike, hops: int | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mass through each generated unit, and mass that was not followed further."""
        _, to_generated = self.blocks()
        checked = checked_weights(weights, self.n_generated, self.normalization)
        if hops is None:
            return solve.throughput(to_generated, checked), np.zeros(self.n_generated)
        number = _passes(where, hops)
        return solve.truncated_throughput(to_generated, checked, number)

    def _open_mass(
        self, through: NDArray[np.float64], left: NDArray[np.float64]
    ) -> float:
        return float(np.abs(through) @ self.left_out + np.abs(left).sum())

    def sparsified(self, share: float) -> AttributionGraph:
        """The graph with the fewest entries that hold a share of each row's mass.

        A row's mass is counted as its normalisation does: entries above zero in
        ``positive``, absolute values otherwise; entries without mass are dropped. Of
        equal entries the earlier units stay. What a row loses is not given to the
        others: its ``kept`` is multiplied by the share that stayed, and `unresolved`
        says what an answer lacks.

        Args:
            share: part of each row's mass that stays, in (0, 1]; with 1, every entry
                that has mass.

        Returns:
            The sparse graph; its raw rows are a CSR array.

        Raises:
            TypeError: if the share is not a real number.
            ValueError: if it is not above 0 and at most 1.

        Example:
            >>> rows = [[1, 1, 0, 0], [1, 2, 5, 0]]
            >>> graph = AttributionGraph.from_rows(rows, 2).sparsified(0.6)
            >>> graph.rows.toarray().tolist(), graph.kept.tolist()
            ([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0]], [1.0, 0.625])
            >>> graph.explain([0, 1]).tolist(), graph.unresolved([0, 1])
            ([0.3125, 0.3125], 0.375)
        """
        part = _cut_share("share", share)
        entries = csr_array(self.rows)  # canonical, as every graph's rows are
        mass, _ = masses(entries.data, entries.indptr, self.normalization)
        chosen = np.zeros(mass.size, dtype=np.bool_)
        held = np.ones(self.n_generated)
        for row, (start, stop) in enumerate(pairwise(entries.indptr.tolist())):
            chosen[start:stop], held[row] = heaviest(mass[start:stop], part)
        ends = np.concatenate([[0], np.cumsum(chosen)])[entries.indptr]
        rows = csr_array(
            (entries.data[chosen], entries.indices[chosen], ends), shape=entries.shape
        )
        return AttributionGraph(
            rows, self.sources, self.normalization, self.kept * held
        )

    def best_paths(self, weights: ArrayLike, source: int | None, k: int) -> list[Path]:
        """The ``k`` heaviest paths from the weighted units to a source, exactly.

        A path's weight is its first unit's weight times the product of its edges. In
        ``signed`` it keeps its sign, and paths are ranked by absolute weight. Of equal
        paths the shorter comes first, then the lexicographically smaller. Paths of
        weight zero are left out; a product below the smallest float is zero.

        Args:
            weights: as for `explain`.
            source: which of the ``P`` sources the paths end in; ``None`` for any.
            k: number of paths, 0 or more.

        Returns:
            At most ``k`` paths, the heaviest first.

        Raises:
            TypeError: as for `explain`, or if a number is not whole.
            ValueError: as for `explain`, or if ``source`` or ``k`` is out of range.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> for path in graph.best_paths([0, 1], None, 2):
            ...     print(path)
            Path(units=(3, 2, 0), weight=0.375)
            Path(units=(3, 2, 1), weight=0.375)
        """
        number = whole_number("k", k, remedy="Pass the number of paths wanted.")
        targets = self.sources
        if source is not None:
            chosen = whole_number(
                "source",
                source,
                stop=self.n_sources,
                remedy="Pass the index of a source among the sources, or None for any.",
            )
            targets = np.zeros(self.n_units, dtype=np.bool_)
            targets[self.source_units[chosen]] = True
        starts = np.zeros(self.n_units)
        starts[self.generated_units] = checked_weights(
            weights, self.n_generated, self.normalization
        )
        return solve.best_paths(self.matrix, starts, targets, number)

    def coarsen(
        self, groups: Sequence[int] | Sequence[Sequence[int]]
    ) -> AttributionGraph:
        """The graph between groups of units.

        Raw rows are summed over the rows and columns of each group, attribution inside
        a group is dropped, and so is attribution of a generated group to a group that
        does not stand before it; then rows are normalised again. A coarse unit stands
        where its first member stands.

        Args:
            groups: the group of each unit, as ``N`` whole numbers of any value, or the
                groups themselves, as lists of unit indices that hold each unit once.
                A group holds sources only or generated units only, and no two groups
                of generated units interleave.

        Returns:
            The graph between groups, with the same normalisation; its raw rows are
            sparse where this graph's are.

        Raises:
            TypeError: if the groups are neither whole numbers nor lists of them.
            ValueError: if a unit is missing, named twice or does not exist, if a group
                is empty or mixes sources and generated units, if groups of generated
                units interleave, if a sum is too large for float64, or if a row is
                not complete.

        Example:
            >>> rows = [[1, 1, 0, 0, 0], [0, 2, 9, 0, 0], [0, 1, 1, 2, 0]]
            >>> fine = AttributionGraph.from_rows(rows, 2)
            >>> coarse = fine.coarsen([[0, 1], [2, 3], [4]])
            >>> coarse.rows.tolist()
            [[4.0, 0.0, 0.0], [1.0, 3.0, 0.0]]
            >>> coarse.rows.tolist() == fine.coarsen([7, 7, 8, 8, 9]).rows.tolist()
            True
        """
        for row in np.flatnonzero(self.left_out)[:1]:
            raise ValueError(
                complaint(
                    "coarsen",
                    "every row must be complete",
                    f"row {row} (unit {self.generated_units[row]}) lacks "
                    f"{self.left_out[row]:.3g} of its mass",
                    "Coarsen the graph of the complete rows and sparsify the result: "
                    "dropping mass does not commute with grouping and normalisation.",
                )
            )
        group_of = _group_of_units(groups, self.n_units)
        sources = _coarse_sources(group_of, self.sources)
        coarse_units = np.flatnonzero(~sources)
        # Groups of generated units do not interleave, so their rows keep their order.
        row_group = np.searchsorted(coarse_units, group_of[self.generated_units])
        sum_rows = _membership(row_group, coarse_units.size)  # (G', G)
        sum_columns = _membership(group_of, sources.size)  # (N', N)
        with np.errstate(over="ignore", invalid="ignore"):
            rows = (sum_columns @ (sum_rows @ self.rows).T).T  # (G', N')
        if issparse(rows):
            rows = rows.tocoo()
            before = rows.col < coarse_units[rows.row]
            rows = csr_array(
                (rows.data[before], (rows.row[before], rows.col[before])),
                shape=rows.shape,
            )
            finite = np.isfinite(rows.data).all()
        else:
            rows = np.where(np.arange(sources.size) < coarse_units[:, None], rows, 0.0)
            finite = np.isfinite(rows).all()
        if not finite:
            raise ValueError(
                complaint(
                    "coarsen",
                    "the sums over groups must be finite",
                    "a sum of raw rows is too large for float64",
                    "Divide all rows by one constant first; the graph stays the same.",
                )
            )
        return AttributionGraph(rows, sources, self.normalization)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy from another process is checked and read-only too.
        given = tuple(getattr(self, part.name) for part in fields(self) if part.init)
        return AttributionGraph, given

    def __repr__(self) -> str:
        lacks = f", left_out={self.left_out.sum():.3g}" if self.left_out.any() else ""
        return (
            f"AttributionGraph(n_sources={self.n_sources}, "
            f"n_generated={self.n_generated}, normalization={self.normalization!r}"
            f"{lacks})"
        )


def _locked(value: Any) -> Any:
    """The same array, read-only from here on."""
    parts = (value.data, value.indices, value.indptr) if issparse(value) else (value,)
    for part in parts:
        part.flags.writeable = False
    return value


def _canonical(entries: csr_array) -> csr_array:
    """The CSR array, changed in place: sorted, without duplicates and zeros."""
    entries.sum_duplicates()
    entries.eliminate_zeros()
    entries.sort_indices()
    # SuperLU takes 32-bit indices; SciPy keeps 64-bit ones where they came.
    if max(entries.nnz, *entries.shape) <= np.iinfo(np.int32).max:
        entries.indices = entries.indices.astype(np.int32, copy=False)
        entries.indptr = entries.indptr.astype(np.int32, copy=False)
    return entries


def _raw_rows(rows: Any) -> Any:
    """A copy of the rows as float64: an array, or a CSR array if they are sparse."""
    remedy = "Pass one row per generated unit and one column per unit."
    if issparse(rows):
        if rows.dtype.kind not in "biuf":
            raise TypeError(
                complaint(
                    "rows",
                    "must be real numbers",
                    f"values of type {rows.dtype} came",
                    "Convert them to float first.",
                )
            )
        raw = rows
    else:
        raw = real_array("rows", rows)
    if raw.ndim != 2:
        raise ValueError(
            complaint("rows", "must have shape (G, N)", f"{raw.shape} came", remedy)
        )
    return csr_array(raw, dtype=np.float64, copy=True) if issparse(raw) else raw


def _source_mask(sources: Any, n_generated: int, n_units: int) -> NDArray[np.bool_]:
    """Which of the units are sources, shape ``(N,)``."""
    mask: NDArray[np.bool_]
    if isinstance(sources, Integral) and not isinstance(sources, bool):
        n_sources = _first_sources(sources)
        if n_sources + n_generated != n_units:
            raise ValueError(
                complaint(
                    "sources",
                    f"the {n_generated} rows of {n_units} columns leave "
                    f"{n_units - n_generated} sources",
                    f"{n_sources} came",
                    "Every unit is a source or has a row: pass rows of shape "
                    "(G, P + G) and sources=P.",
                )
            )
        mask = np.arange(n_units) < n_sources
        return mask
    mask = _mask(sources)
    if mask.shape != (n_units,):
        raise ValueError(
            complaint(
                "sources",
                f"a mask must have shape ({n_units},), one entry per column of rows",
                f"shape {mask.shape} came",
                _SOURCES,
            )
        )
    n_false = n_units - int(mask.sum())
    if n_false != n_generated:
        raise ValueError(
            complaint(
                "sources",
                f"the mask must be False for {n_generated} units, as many as rows",
                f"it is False for {n_false}",
                _SOURCES,
            )
        )
    return mask


_SOURCES = (
    "Pass the number of sources if they come first, or one boolean per unit, True for "
    "a source."
)


def _first_sources(sources: Any) -> int:
    """The number of sources that stand before all rows."""
    remedy = "Pass the number of sources, or a boolean mask."
    return whole_number("sources", sources, remedy=remedy)


def _mask(sources: Any) -> NDArray[np.bool_]:
    """A boolean array of its own, if such a mask came."""
    if issparse(sources) or isinstance(sources, (bool, str)) or sources is None:
        given = None
    else:
        try:
            given = np.array(sources)
        except (TypeError, ValueError, RuntimeError):
            given = None
    if given is None or (given.dtype != np.bool_ and given.size > 0):
        raise TypeError(
            complaint(
                "sources",
                "must be a whole number or a boolean mask",
                f"{shown(sources)} came",
                _SOURCES,
            )
        )
    return given.astype(np.bool_)


def _row_of(entries: csr_array) -> NDArray[np.intp]:
    """The row of each entry, shape ``(nnz,)``."""
    return np.repeat(np.arange(entries.shape[0]), np.diff(entries.indptr))


def _passes(where: str, value: Any) -> int:
    """A number of passes through generated units."""
    remedy = "Pass the number of passes; 0 gives the direct rows."
    return whole_number(where, value, remedy=remedy)


def _cut_share(where: str, value: Any) -> float:
    """A share of a row's mass that is to stay."""
    must, remedy = "must be above 0 and at most 1", "Pass 0.99 to keep 99% of each row."
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(complaint(where, must, f"{shown(value)} came", remedy))
    share = float(value)
    if not 0.0 < share <= 1.0:
        raise ValueError(complaint(where, must, f"{share} came", remedy))
    return share


_KEPT = (
    "Pass the share of each row's mass that its entries hold: 1 for a complete row, 0 "
    "for one that was not computed."
)


def _kept_shares(kept: Any, n_generated: int) -> NDArray[np.float64]:
    """The share of its mass that each row kept, shape ``(G,)``."""
    if kept is None:
        return np.ones(n_generated)
    checked = finite_vector("kept", kept, n_generated, entry="generated unit")
    for row in np.flatnonzero((checked < 0.0) | (checked > 1.0))[:1]:
        raise ValueError(
            complaint(
                "kept",
                "every share must be at least 0 and at most 1",
                f"{checked[row]} came at generated unit {row}",
                _KEPT,
            )
        )
    return checked


def _check_kept(
    kept: NDArray[np.float64],
    filled: NDArray[np.bool_],
    counts: NDArray[Any],
    generated_units: NDArray[np.int64],
) -> None:
    """Raise if a row that was not computed has entries, or a part has no mass."""
    for row in np.flatnonzero((kept == 0.0) & (counts > 0))[:1]:
        raise ValueError(
            complaint(
                "kept",
                "a row of which nothing is kept must have no entries",
                f"row {row} (unit {generated_units[row]}) has {counts[row]}",
                _KEPT,
            )
        )
    for row in np.flatnonzero((kept > 0.0) & (kept < 1.0) & ~filled)[:1]:
        raise ValueError(
            complaint(
                "kept",
                "a row of which a part is kept must have mass",
                f"row {row} (unit {generated_units[row]}) has none and kept "
                f"{kept[row]}",
                _KEPT,
            )
        )


def _own_units(sources: Any) -> Iterator[int]:
    """The unit of each row as far as it is known before all rows have come."""
    if isinstance(sources, Integral) and not isinstance(sources, bool):
        return count(_first_sources(sources))
    mask = _mask(sources)
    return chain(np.flatnonzero(~mask).tolist(), repeat(mask.size))


def _collected(
    rows: Iterable[Any],
    sources: Any,
    normalization: Normalization,
    kept: Any,
    share: float | None,
) -> tuple[csr_array, NDArray[np.float64]]:
    """Rows that come one at a time, each cut at once, and what they kept."""
    columns: list[NDArray[np.int32]] = []
    values: list[NDArray[np.float64]] = []
    held: list[float] = []
    n_units: int | None = None
    for row, (given, own) in enumerate(zip(rows, _own_units(sources), strict=False)):
        if given is None:
            columns.append(np.zeros(0, dtype=np.int32))
            values.append(np.zeros(0))
            held.append(0.0)
            continue
        raw = real_array(f"rows[{row}]", given)
        n_units = raw.size if n_units is None else n_units
        if raw.shape != (n_units,):
            raise ValueError(
                complaint(
                    f"rows[{row}]",
                    f"must have shape ({n_units},), one entry per unit",
                    f"shape {raw.shape} came",
                    "Pass rows of equal length, and None for one that was not "
                    "computed.",
                )
            )
        filled = np.flatnonzero(raw)
        entries = raw[filled]
        # Before the cut: an entry that it drops could not be checked any more.
        numbers = np.broadcast_to([[row], [own]], (2, filled.size))
        check_entries(numbers[0], filled, entries, numbers[1])
        part = 1.0
        if share is not None:
            mass, _ = masses(entries, np.array([0, filled.size]), normalization)
            chosen, part = heaviest(mass, share)
            filled, entries = filled[chosen], entries[chosen]
        columns.append(filled.astype(np.int32))
        values.append(entries)
        held.append(part)
    if n_units is None:
        before = isinstance(sources, Integral)
        n_units = int(sources) + len(held) if before else _mask(sources).size
    data = np.concatenate([np.zeros(0), *values])
    indices = np.concatenate([np.zeros(0, dtype=np.int32), *columns])
    indptr = np.cumsum([0, *map(len, values)])
    joined = csr_array((data, indices, indptr), shape=(len(held), n_units))
    holds = np.array(held)
    if kept is None:
        return joined, holds
    checked = _kept_shares(kept, holds.size)
    for row in np.flatnonzero((checked > 0.0) & (holds == 0.0))[:1]:
        raise ValueError(
            complaint(
                "kept",
                "nothing can be kept of a row that is None",
                f"{checked[row]} came at generated unit {row}",
                _KEPT,
            )
        )
    return joined, checked * holds


def _with_source_rows(shares: csr_array, sources: NDArray[np.bool_]) -> csr_array:
    """The graph, shape ``(N, N)``: the shares, and a unit vector for each source."""
    n_units = sources.size
    counts = np.ones(n_units, dtype=np.int64)
    counts[~sources] = np.diff(shares.indptr)
    of_source = np.repeat(sources, counts)
    data = np.ones(of_source.size)
    data[~of_source] = shares.data
    indices = np.empty(of_source.size, dtype=np.int64)
    indices[of_source] = np.flatnonzero(sources)
    indices[~of_source] = shares.indices
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return _canonical(csr_array((data, indices, indptr), shape=(n_units, n_units)))


def _membership(group_of: NDArray[np.int64], n_groups: int) -> csr_array:
    """The 0/1 matrix that sums members into groups, shape ``(groups, members)``."""
    members = np.arange(group_of.size)
    return csr_array(
        (np.ones(group_of.size), (group_of, members)),
        shape=(n_groups, group_of.size),
    )


def _group_of_units(groups: Any, n_units: int) -> NDArray[np.int64]:
    """The group of each unit, shape ``(N,)``; groups are numbered by first member."""
    remedy = (
        "Pass one whole number per unit, or lists of unit indices that hold each unit "
        "exactly once."
    )

    def wrong_type(came: str) -> TypeError:
        must = "must be whole numbers, or lists of whole numbers"
        return TypeError(complaint("groups", must, came, remedy))

    def as_list(value: Any, came: str) -> list[Any]:
        if hasattr(value, "tolist"):
            value = value.tolist()
        try:
            return list(value)
        except TypeError as error:
            raise wrong_type(came) from error

    def is_whole(value: Any) -> bool:
        return isinstance(value, Integral) and not isinstance(value, bool)

    listed = as_list(groups, f"{shown(groups)} came")
    if all(is_whole(label) for label in listed):
        labels = listed
        if len(labels) != n_units:
            raise ValueError(
                complaint(
                    "groups",
                    f"there must be one group number for each of the {n_units} units",
                    f"{len(labels)} came",
                    remedy,
                )
            )
    else:
        labels = [None] * n_units
        for number, group in enumerate(listed):
            members = as_list(group, f"group {number} is {shown(group)}")
            if not members:
                raise ValueError(
                    complaint(
                        "groups",
                        "every group must have a member",
                        f"group {number} is empty",
                        remedy,
                    )
                )
            for member in members:
                unit = whole_number(
                    f"groups[{number}]", member, stop=n_units, remedy=remedy
                )
                if labels[unit] is not None:
                    raise ValueError(
                        complaint(
                            "groups",
                            "each unit must be in one group",
                            f"unit {unit} is named in group {labels[unit]} and again "
                            f"in group {number}",
                            remedy,
                        )
                    )
                labels[unit] = number
        if None in labels:
            raise ValueError(
                complaint(
                    "groups",
                    "each unit must be in one group",
                    f"unit {labels.index(None)} is in none",
                    remedy,
                )
            )
    first: dict[int, int] = {}
    return np.array(
        [first.setdefault(label, len(first)) for label in labels], dtype=np.int64
    )


def _coarse_sources(
    group_of: NDArray[np.int64], sources: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which of the groups are groups of sources; raises if they make no graph."""
    n_groups = int(group_of.max(initial=-1)) + 1
    coarse: NDArray[np.bool_] = np.zeros(n_groups, dtype=np.bool_)
    coarse[group_of[sources]] = True
    for unit in np.flatnonzero(~sources & coarse[group_of])[:1]:
        other = np.flatnonzero(sources & (group_of == group_of[unit]))[0]
        raise ValueError(
            complaint(
                "groups",
                "a group must hold sources only or generated units only",
                f"source unit {other} and generated unit {unit} are in one group",
                "Split this group in two.",
            )
        )
    generated = np.flatnonzero(~sources)
    # Numbered by first member, groups that do not interleave come in rising order.
    order = group_of[generated]
    for place in np.flatnonzero(np.diff(order) < 0)[:1]:
        unit = generated[place + 1]
        raise ValueError(
            complaint(
                "groups",
                "groups of generated units must not interleave",
                f"generated unit {unit} is in the group of unit "
                f"{generated[order == group_of[unit]][0]}, and unit {generated[place]} "
                "between them is in another",
                "Let each group hold neighbouring generated units.",
            )
        )
    return coarse
