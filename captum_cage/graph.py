"""The attribution graph: which unit depends on which, and what follows from it.

Pure NumPy and SciPy: it knows nothing of Captum, of tokens or of language.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain, count, pairwise, repeat
from numbers import Integral
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array, issparse, vstack

from captum_cage import solve
from captum_cage._checks import (
    complaint,
    finite_vector,
    one_of,
    real_array,
    share_to_keep,
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
from captum_cage.solve import Hops, Parts, Path

__all__ = [
    "AttributionGraph",
    "Hops",
    "Normalization",
    "Parts",
    "Path",
    "RowsBehind",
]


class RowsBehind(NamedTuple):
    """The rows by which mass passes, where an explanation starts by another row.

    Attributes:
        steps: positions of these rows among the generated units, rising, shape
            ``(K,)``, int64.
        rows: the raw rows, CSR array of shape ``(K, N)``, float64.
        kept: share of its mass that each of them holds, shape ``(K,)``, float64, as
            `AttributionGraph.kept`.
    """

    steps: NDArray[np.int64]
    rows: csr_array
    kept: NDArray[np.float64]


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

    A row may hold only where an explanation starts. In a contrastive question, the row
    of an explained unit says what speaks for it rather than for another one, while
    mass that comes to it from a later unit follows its plain row. Then ``rows`` make
    the first step of each path, and the rows ``behind`` each later one. With
    ``A_s, L_s`` the blocks of ``rows`` and ``A_p, L_p`` those of the rows behind,
    weights ``w`` are explained by ``A_s^T w + A_p^T y``, ``(I - L_p)^T y = L_s^T w``.

    Make one with `from_rows`. The raw rows, the sources, the normalisation, what the
    rows kept and the rows behind are all there is to save: the rest follows from them.

    Attributes:
        rows: the raw rows, shape ``(G, N)``, float64; an array where an array was
            given, else a CSR array.
        sources: whether a unit is a source, shape ``(N,)``, bool.
        normalization: ``"positive"``, ``"absolute"`` or ``"signed"``.
        kept: share of each generated unit's mass that the entries of its row hold,
            shape ``(G,)``, float64, in [0, 1]: 1 for a complete row, 0 for one that
            was not computed. Default: all ones.
        behind: the rows that mass passes by where these are others, a `RowsBehind`;
            ``None`` where mass passes by ``rows`` everywhere.
        matrix: the graph through which mass passes, CSR array of shape ``(N, N)``,
            float64, lower triangular. Rows of sources are unit vectors, rows of
            generated units (those behind) are normalised, multiplied by the share
            that they kept and stand strictly below the diagonal.
        leak: share of each generated unit's mass that goes nowhere, shape ``(G,)``,
            float64: exactly 1 where its complete row has no mass, else exactly 0.
        left_out: ``1 - kept``, share of each generated unit's mass that may go
            anywhere, shape ``(G,)``, float64, in [0, 1].
        leak_behind: ``leak`` of the rows behind, shape ``(G,)``.
        left_out_behind: ``left_out`` of the rows behind, shape ``(G,)``.
        source_units: unit indices of the sources, shape ``(P,)``, int64.
        generated_units: unit indices of the generated units, shape ``(G,)``, int64.

    Source:
        Walker and Ewetz (2025), :cite:p:`walker2025cage`, sections 3 and 4.

    Example:
        Two sources and two generated units. The second generated unit owes a quarter
        to the last source and the rest to the first generated unit.

        >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
        >>> graph
        AttributionGraph(n_sources=2, n_generated=2, normalization='positive')
        >>> graph.explain([0, 1]).tolist()
        [0.375, 0.625]

        Another row holds where the first generated unit is explained:

        >>> rows, plain = [[0, 1, 0, 0], [0, 1, 3, 0]], {0: [1, 1, 0, 0]}
        >>> graph = AttributionGraph.from_rows(rows, 2, behind=plain)
        >>> graph.explain([1, 0]).tolist(), graph.explain([0, 1]).tolist()
        ([0.0, 1.0], [0.375, 0.625])
    """

    rows: Any
    sources: NDArray[np.bool_]
    normalization: Normalization = "positive"
    kept: NDArray[np.float64] = None  # type: ignore[assignment]
    behind: Any = None
    matrix: csr_array = field(init=False)
    leak: NDArray[np.float64] = field(init=False)
    left_out: NDArray[np.float64] = field(init=False)
    leak_behind: NDArray[np.float64] = field(init=False)
    left_out_behind: NDArray[np.float64] = field(init=False)
    source_units: NDArray[np.int64] = field(init=False)
    generated_units: NDArray[np.int64] = field(init=False)
    # Shares of the rows that have another one behind, shape (K, N).
    _first: csr_array = field(init=False)

    def __post_init__(self) -> None:
        one_of("normalization", self.normalization, get_args(Normalization))
        raw = _raw_rows("rows", self.rows)
        sources = _source_mask(self.sources, *raw.shape)
        generated_units = np.flatnonzero(~sources).astype(np.int64)
        kept = _kept_shares(self.kept, generated_units.size)
        entries = _canonical(csr_array(raw))
        normalised, leak = _normalised(
            entries,
            kept,
            np.arange(generated_units.size),
            generated_units,
            self.normalization,
            ("rows", "kept"),
        )
        left_out = 1.0 - kept
        passing, leak_behind, left_out_behind = normalised, leak, left_out
        behind = _rows_behind(self.behind, entries)
        steps = np.zeros(0, dtype=np.int64)
        if behind is not None:
            steps = behind.steps
            others, others_leak = _normalised(
                behind.rows,
                behind.kept,
                steps,
                generated_units[steps],
                self.normalization,
                ("behind", "behind"),
            )
            passing = _exchanged(normalised, steps, others)
            leak_behind, left_out_behind = leak.copy(), left_out.copy()
            leak_behind[steps] = others_leak
            left_out_behind[steps] = 1.0 - behind.kept
            behind = RowsBehind(*map(_locked, behind))
        # A frozen dataclass sets its own fields this way.
        for name, value in {
            "rows": entries if issparse(raw) else raw,
            "sources": sources,
            "kept": kept,
            "matrix": _with_source_rows(passing, sources),
            "leak": leak,
            "left_out": left_out,
            "leak_behind": leak_behind,
            "left_out_behind": left_out_behind,
            "source_units": np.flatnonzero(sources).astype(np.int64),
            "generated_units": generated_units,
            "_first": csr_array(normalised[steps]),
        }.items():
            object.__setattr__(self, name, _locked(value))
        object.__setattr__(self, "behind", behind)

    @classmethod
    def from_rows(
        cls,
        rows: ArrayLike | csr_array | Iterable[ArrayLike | None],
        sources: int | ArrayLike,
        normalization: Normalization = "positive",
        *,
        kept: ArrayLike | None = None,
        sparsify: float | None = None,
        behind: ArrayLike
        | csr_array
        | Mapping[int, ArrayLike | None]
        | RowsBehind
        | None = None,
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
            behind: raw rows by which mass passes, where ``rows`` hold only for units
                that are explained. Either the rows that differ, by their position
                among the generated units, each of shape ``(N,)``, ``None`` for one
                that was not computed; or all of them, shape ``(G, N)``, of which those
                that equal the row in ``rows`` are that row, with what it kept. Any
                other row is complete. Or a `RowsBehind`, which says what its rows
                kept. ``None``: ``rows`` hold everywhere.

        Returns:
            The graph.

        Raises:
            TypeError: if rows, sources or shares are not numbers or booleans of this
                kind.
            ValueError: if shapes do not fit, an entry is not finite, a row has an
                entry at or after its own unit, the normalisation is unknown, a share
                is out of range, a row of which nothing is kept has entries, one of
                which a part is kept has no mass, or a position of a row behind is out
                of range.

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
        one_by_one = listed or isinstance(raw, Iterator)
        if one_by_one:
            one_of("normalization", normalization, get_args(Normalization))
            raw, parts = _collected(raw, mask, normalization, parts, share)
        graph = cls(raw, mask, normalization, parts, behind)
        if share is None or (one_by_one and graph.behind is None):
            return graph
        if one_by_one:
            return replace(graph, behind=_behind_cut(graph, share))
        return graph.sparsified(share)

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

    def normalized(self, *, behind: bool = False) -> csr_array:
        """The rows of the generated units, as shares of all units.

        Args:
            behind: the rows by which mass passes, instead of those by which an
                explanation starts. They are the same where none has one behind it.

        Returns:
            CSR array of shape ``(G, N)``, float64.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> graph.normalized().toarray().tolist()
            [[0.5, 0.5, 0.0, 0.0], [0.0, 0.25, 0.75, 0.0]]
        """
        passing = csr_array(self.matrix[self.generated_units])
        if behind or self.behind is None:
            return passing
        return _exchanged(passing, self.behind.steps, self._first)

    def blocks(self) -> tuple[csr_array, csr_array]:
        """The rows of the generated units, cut into two blocks.

        Returns:
            ``A``, shape ``(G, P)``: shares of the sources. ``L``, shape ``(G, G)``,
            strictly lower triangular: shares of the generated units. Both CSR,
            float64 and read-only. Of ``rows``, by which an explanation starts; those
            by which mass passes are `blocks_behind`.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> to_sources, to_generated = graph.blocks()
            >>> to_sources.toarray().tolist(), to_generated.toarray().tolist()
            ([[0.5, 0.5], [0.0, 0.25]], [[0.0, 0.0], [0.75, 0.0]])
        """
        return self._first_blocks

    def blocks_behind(self) -> tuple[csr_array, csr_array]:
        """The rows behind, cut into two blocks.

        Returns:
            ``A`` and ``L`` as `blocks`, of the rows by which mass passes; the same
            arrays where there are no others.

        Example:
            >>> rows, plain = [[0, 1, 0, 0], [0, 1, 3, 0]], {0: [1, 1, 0, 0]}
            >>> graph = AttributionGraph.from_rows(rows, 2, behind=plain)
            >>> graph.blocks_behind()[0].toarray().tolist()
            [[0.5, 0.5], [0.0, 0.25]]
            >>> graph.blocks()[0].toarray().tolist()
            [[0.0, 1.0], [0.0, 0.25]]
        """
        return self._blocks.to_sources, self._blocks.to_generated

    @cached_property
    def _blocks(self) -> _Blocks:
        behind = self._cut(self.matrix[self.generated_units])
        steps = (
            np.zeros(0, dtype=np.int64) if self.behind is None else self.behind.steps
        )
        return _Blocks(*behind, steps, *self._cut(self._first))

    @cached_property
    def _first_blocks(self) -> tuple[csr_array, csr_array]:
        if self.behind is None:
            return self.blocks_behind()
        behind = self._blocks
        return (
            _locked(
                _exchanged(behind.to_sources, behind.steps, behind.first_to_sources)
            ),
            _locked(
                _exchanged(behind.to_generated, behind.steps, behind.first_to_generated)
            ),
        )

    def _cut(self, rows: csr_array) -> tuple[csr_array, csr_array]:
        """Columns of the sources and of the generated units."""
        return (
            _locked(_canonical(csr_array(rows[:, self.source_units]))),
            _locked(_canonical(csr_array(rows[:, self.generated_units]))),
        )

    @property
    def _masses(self) -> _Blocks:
        """The blocks in absolute values."""
        return self._blocks.absolute() if self._is_signed else self._blocks

    @property
    def _is_signed(self) -> bool:
        return self.normalization == "signed"

    def marginals(self, *, hops: int | None = None) -> NDArray[np.float64]:
        """Mass of all paths from each generated unit to each source unit.

        Solves ``(I - L) X = A``; with rows behind, ``X = A_s + L_s X_p`` where ``X_p``
        solves it for those. To explain one span, `explain` is far cheaper.

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
            Walker and Ewetz (2025), :cite:p:`walker2025cage`, section 4.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> graph.marginals().tolist()
            [[0.5, 0.5], [0.375, 0.625]]
            >>> graph.marginals(hops=0).tolist()
            [[0.5, 0.5], [0.0, 0.25]]
        """
        return self._blocks.marginals(_cut_after(hops))

    def marginal_parts(self, *, hops: int | None = None) -> Parts:
        """`marginals`, the paths of positive and of negative weight apart.

        Args:
            hops: as for `marginals`.

        Returns:
            Two arrays of shape ``(G, P)``, float64, not negative. Their difference is
            ``marginals(hops=hops)``, and their sum that of absolute values. In
            ``positive`` and ``absolute`` the second is zero.

        Raises:
            TypeError: as for `marginals`.
            ValueError: as for `marginals`.

        Example:
            >>> rows = [[1, -1, 0, 0], [0, 1, 3, 0]]
            >>> graph = AttributionGraph.from_rows(rows, 2, "signed")
            >>> positive, negative = graph.marginal_parts()
            >>> positive.tolist(), negative.tolist()
            ([[0.5, 0.0], [0.375, 0.25]], [[0.0, 0.5], [0.0, 0.375]])
        """
        net = self.marginals(hops=hops)
        if not self._is_signed:
            return Parts(net, np.zeros_like(net))
        absolute = self._masses.marginals(_cut_after(hops))
        return solve.signed_parts(absolute, net)

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
        return self._blocks.arrived(self._followed(weights))

    def explain_parts(self, weights: ArrayLike, *, hops: int | None = None) -> Parts:
        """`explain`, the paths of positive and of negative weight apart.

        A path's weight is its first unit's weight times the product of its edges. One
        solve with ``L`` and ``w`` gives the difference of the two, one with their
        absolute values the sum.

        Args:
            weights: as for `explain`.
            hops: count only paths with at most this many passes through generated
                units, as in `hops`; ``None`` for all.

        Returns:
            Two vectors of shape ``(P,)``, float64, not negative: the mass of the paths
            of positive weight, and the absolute mass of those of negative weight.
            Their difference is `explain`, or ``attr`` of `hops`. In ``positive`` and
            ``absolute`` the second is zero.

        Raises:
            TypeError: as for `explain`, or if ``hops`` is not a whole number.
            ValueError: as for `explain`, or if ``hops`` is negative.

        Example:
            What speaks for the second generated unit at the first source is taken back
            in part through the first generated unit.

            >>> rows = [[-1, 1, 0, 0], [2, 0, 2, 0]]
            >>> graph = AttributionGraph.from_rows(rows, 2, "signed")
            >>> positive, negative = graph.explain_parts([0, 1])
            >>> positive.tolist(), negative.tolist()
            ([0.5, 0.25], [0.25, 0.0])
            >>> graph.explain([0, 1]).tolist()
            [0.25, 0.25]
        """
        net = self._blocks.arrived(self._followed(weights, hops))
        if not self._is_signed:
            return Parts(net, np.zeros_like(net))
        masses = self._masses
        absolute = masses.arrived(self._followed(weights, hops, masses))
        return solve.signed_parts(absolute, net)

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
        return self._blocks.passed(self._followed(weights, hops))

    def throughput_parts(self, weights: ArrayLike, *, hops: int | None = None) -> Parts:
        """`throughput`, mass of positive and of negative weight apart.

        Args:
            weights: as for `explain`.
            hops: as for `throughput`.

        Returns:
            Two vectors of shape ``(G,)``, float64, not negative. Their difference is
            ``throughput(weights, hops=hops)``, and their sum that of absolute values.
            In ``positive`` and ``absolute`` the second is zero.

        Raises:
            TypeError: as for `throughput`.
            ValueError: as for `throughput`.

        Example:
            >>> rows = [[1, 0, 0, 0], [1, -1, 0, 0], [0, 1, -1, 0]]
            >>> graph = AttributionGraph.from_rows(rows, 1, "signed")
            >>> positive, negative = graph.throughput_parts([0, 0, 1])
            >>> positive.tolist(), negative.tolist()
            ([0.75, 0.0, 1.0], [0.0, 0.5, 0.0])
        """
        net = self._blocks.passed(self._followed(weights, hops))
        if not self._is_signed:
            return Parts(net, np.zeros_like(net))
        masses = self._masses
        absolute = masses.passed(self._followed(weights, hops, masses))
        return solve.signed_parts(absolute, net)

    def share_through(
        self, weights: ArrayLike, units: ArrayLike, *, hops: int | None = None
    ) -> float:
        """Share of the explained mass whose path visits at least one of some units.

        A path counts once, at the first of the units that it visits: rows of given
        generated units are cut, so that mass ends there. What leaks or stays
        unresolved before it visits one does not count, what does so later counts.

        Args:
            weights: as for `explain`.
            units: unit indices of sources or generated units in ``0 .. N - 1``, or a
                boolean mask of shape ``(N,)``. An explained unit that is among them is
                visited.
            hops: count only visits within this many passes through generated units
                below the first, as in `throughput`, and ends in sources as in `hops`;
                ``None`` for all.

        Returns:
            In [0, 1]; 0 where the weights are all zero. In ``signed``, absolute
            weights along absolute shares: the absolute mass of the paths that visit a
            unit, by the sum of ``|w|``. Positive and negative paths do not cancel.

        Raises:
            TypeError: as for `explain`, or if the units are neither whole numbers nor
                a mask, or ``hops`` is not a whole number.
            ValueError: as for `explain`, or if a unit does not exist, the mask does not
                fit or ``hops`` is negative.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> graph.share_through([0, 1], [2]), graph.share_through([0, 1], [1])
            (0.75, 0.625)
            >>> graph.share_through([0, 1], [1, 2])
            1.0
        """
        checked = checked_weights(weights, self.n_generated, self.normalization)
        given = _chosen_units(units, self.n_units)
        number = _cut_after(hops)
        mass = np.abs(checked)
        total = mass.sum()
        if total == 0.0:
            return 0.0
        steps = given[self.generated_units]
        blocks = self._masses.ending_at(steps)
        flow = blocks.followed(mass, number)
        visiting = blocks.passed(flow)[steps].sum()
        visiting += blocks.arrived(flow)[given[self.source_units]].sum()
        # Rounding of a mass that passes wholly could exceed it.
        return min(float(visiting / total), 1.0)

    def leaked(self, weights: ArrayLike, *, hops: int | None = None) -> float:
        """Mass that ends in rows without mass when some units are explained.

        Args:
            weights: as for `explain`.
            hops: count only what leaks within this many passes through generated
                units, as in `hops`; ``None`` for all.

        Returns:
            The sum of ``throughput(weights, hops=hops) * leak``; with rows behind, of
            ``weights * leak`` and of what passes times ``leak_behind``.

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
        first, through, _ = self._followed(weights, hops)
        leaked = through @ self.leak_behind
        if self.behind is not None:
            leaked += first @ self.leak[self.behind.steps]
        return float(leaked)

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
            ``|left|``. Where a row has another one behind, its weight counts by its own
            ``left_out``, and what passes by ``left_out_behind``. Not negative; exactly
            0 where nothing is left out or cut.

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
        return self._open_mass(self._followed(weights, hops))

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
        flow = self._followed(weights, _passes("k", k))
        return Hops(self._blocks.arrived(flow), self._open_mass(flow))

    def _followed(
        self,
        weights: ArrayLike,
        hops: int | None = None,
        masses: _Blocks | None = None,
    ) -> _Flow:
        """The mass of the weights along all paths; of absolute ones along masses."""
        checked = checked_weights(weights, self.n_generated, self.normalization)
        number = _cut_after(hops)
        # An explanation asks for scores, leak, certificate and throughput of the same
        # weights: one solve gives them all.
        key = checked.tobytes(), number, masses is not None
        known, flow = self._followed_last.get("flow", (None, None))
        if flow is None or known != key:
            blocks, mass = self._blocks, checked
            if masses is not None:
                blocks, mass = masses, np.abs(checked)
            flow = _Flow(*map(_locked, blocks.followed(mass, number)))
            self._followed_last["flow"] = key, flow
        return flow

    @cached_property
    def _followed_last(self) -> dict[str, tuple[Any, _Flow]]:
        """Under one key the question that was solved last, and its flow."""
        return {}

    def _open_mass(self, flow: _Flow) -> float:
        open_mass = np.abs(flow.through) @ self.left_out_behind
        if self.behind is not None:
            open_mass += np.abs(flow.first) @ self.left_out[self.behind.steps]
        return float(open_mass + np.abs(flow.left).sum())

    def flow(self, weights: ArrayLike, *, hops: int | None = None) -> csr_array:
        """Mass that goes from each generated unit to each unit before it.

        An edge's share times the mass that passes through its generated unit. What
        comes to a source makes `explain` (or the ``attr`` of `hops`), and what comes to
        a generated unit, with its own weight, `throughput`.

        Args:
            weights: as for `explain`.
            hops: as for `throughput`.

        Returns:
            CSR array of shape ``(G, N)``, float64.

        Raises:
            TypeError: as for `throughput`.
            ValueError: as for `throughput`.

        Example:
            >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
            >>> graph.flow([0, 1]).toarray().tolist()
            [[0.375, 0.375, 0.0, 0.0], [0.0, 0.25, 0.75, 0.0]]
        """
        ending = self._followed(weights, hops)
        number = _cut_after(hops)
        passing: _Flow | None = ending
        if number is not None:
            # What comes to a generated unit by the last pass goes to sources only.
            passing = self._followed(weights, number - 1) if number else None
        blocks = self._blocks
        parts = [
            (ending, blocks.to_sources, blocks.first_to_sources, self.source_units)
        ]
        if passing is not None:
            parts.append(
                (
                    passing,
                    blocks.to_generated,
                    blocks.first_to_generated,
                    self.generated_units,
                )
            )
        values, rows, columns = [], [], []
        for flow, behind, first, units in parts:
            for mass, block, steps in (
                (flow.through, behind, np.arange(self.n_generated)),
                (flow.first, first, blocks.steps),
            ):
                row = _row_of(block)
                values.append(block.data * mass[row])
                rows.append(steps[row])
                columns.append(units[block.indices])
        entries = np.concatenate(values), tuple(map(np.concatenate, (rows, columns)))
        found = csr_array(entries, shape=(self.n_generated, self.n_units))
        found.sum_duplicates()
        found.eliminate_zeros()
        return found

    def sparsified(self, share: float) -> AttributionGraph:
        """The graph with the fewest entries that hold a share of each row's mass.

        A row's mass is counted as its normalisation does: entries above zero in
        ``positive``, absolute values otherwise; entries without mass are dropped. Of
        equal entries the earlier units stay. What a row loses is not given to the
        others: its ``kept`` is multiplied by the share that stayed, and `unresolved`
        says what an answer lacks. Rows behind are cut in the same way.

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
        rows, held = _heaviest_entries(entries, self.normalization, part)
        return AttributionGraph(
            rows,
            self.sources,
            self.normalization,
            self.kept * held,
            _behind_cut(self, part),
        )

    def without_behind(self) -> AttributionGraph:
        """The graph in which the rows behind hold everywhere.

        Returns:
            The graph itself where ``behind`` is ``None``.

        Example:
            >>> rows, plain = [[1, 0, 0, 0], [1, 0, 0, 0]], {1: [0, 1, 3, 0]}
            >>> graph = AttributionGraph.from_rows(rows, 2, behind=plain)
            >>> graph.without_behind().rows.tolist()
            [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0]]
        """
        if self.behind is None:
            return self
        steps, others, kept = self.behind
        if issparse(self.rows):
            rows = _exchanged(self.rows, steps, others)
        else:
            rows = self.rows.copy()
            rows[steps] = others.toarray()
        every = self.kept.copy()
        every[steps] = kept
        return AttributionGraph(rows, self.sources, self.normalization, every)

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
        if self.behind is None:
            return solve.best_paths(self.matrix, starts, targets, number)
        return self._best_paths_from_first_rows(starts, targets, number)

    def _best_paths_from_first_rows(
        self, starts: NDArray[np.float64], targets: NDArray[np.bool_], k: int
    ) -> list[Path]:
        """The best paths, where some units have another row behind.

        Such a unit is two here: one that paths pass through, and right after it one
        that they start from. So the order of the units, and of equal paths, stays.
        """
        units = self.generated_units[self.behind.steps]  # (K,)
        every = np.arange(self.n_units)
        place = every + np.searchsorted(units, every)
        start_place = place[units] + 1
        passing, first = self.matrix.tocoo(), self._first.tocoo()
        rows = np.concatenate([place[passing.row], start_place[first.row]])
        columns = place[np.concatenate([passing.col, first.col])]
        size = self.n_units + units.size
        matrix = csr_array(
            (np.concatenate([passing.data, first.data]), (rows, columns)),
            shape=(size, size),
        )
        unit_of = np.empty(size, dtype=np.int64)
        unit_of[place], unit_of[start_place] = every, units
        is_start = np.ones(size, dtype=np.bool_)
        is_start[place[units]] = False
        is_target = targets[unit_of]
        found = solve.best_paths(
            matrix, np.where(is_start, starts[unit_of], 0.0), is_target, k
        )
        return [
            Path(tuple(unit_of[list(path.units)].tolist()), path.weight)
            for path in found
        ]

    def coarsen(
        self, groups: Sequence[int] | Sequence[Sequence[int]]
    ) -> AttributionGraph:
        """The graph between groups of units.

        Raw rows are summed over the rows and columns of each group, attribution inside
        a group is dropped, and so is attribution of a generated group to a group that
        does not stand before it; then rows are normalised again. A coarse unit stands
        where its first member stands. It has another row behind where a member has
        one: the sum of its members' rows behind.

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
        lacks = np.maximum(self.left_out, self.left_out_behind)
        for row in np.flatnonzero(lacks)[:1]:
            which = "row" if self.left_out[row] else "the row behind row"
            raise ValueError(
                complaint(
                    "coarsen",
                    "every row must be complete",
                    f"{which} {row} (unit {self.generated_units[row]}) lacks "
                    f"{lacks[row]:.3g} of its mass",
                    "Coarsen the graph of the complete rows and sparsify the result: "
                    "dropping mass does not commute with grouping and normalisation.",
                )
            )
        group_of = _group_of_units(groups, self.n_units)
        sources = _coarse_sources(group_of, self.sources)
        coarse_units = np.flatnonzero(~sources)
        # Groups of generated units do not interleave, so their rows keep their order.
        row_group = np.searchsorted(coarse_units, group_of[self.generated_units])
        rows = _summed(self.rows, row_group, group_of, coarse_units)
        behind = None
        if self.behind is not None:
            steps = np.unique(row_group[self.behind.steps])
            every = _exchanged(
                csr_array(self.rows), self.behind.steps, self.behind.rows
            )
            summed = _summed(every, row_group, group_of, coarse_units)
            behind = RowsBehind(steps, summed[steps], np.ones(steps.size))
        return AttributionGraph(rows, sources, self.normalization, behind=behind)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy from another process is checked and read-only too.
        given = tuple(getattr(self, part.name) for part in fields(self) if part.init)
        return AttributionGraph, given

    def __repr__(self) -> str:
        left_out, others = self.left_out.sum(), ""
        if self.behind is not None:
            left_out += (1.0 - self.behind.kept).sum()
            others = f", rows_behind={self.behind.steps.size}"
        lacks = f", left_out={left_out:.3g}" if left_out > 0.0 else ""
        return (
            f"AttributionGraph(n_sources={self.n_sources}, "
            f"n_generated={self.n_generated}, normalization={self.normalization!r}"
            f"{others}{lacks})"
        )


class _Flow(NamedTuple):
    """Where the mass of some weights is.

    Attributes:
        first: weights that go on by a first row of their own, shape ``(K,)``.
        through: mass that goes on by a row behind, shape ``(G,)``.
        left: mass that was not followed further, shape ``(G,)``.
    """

    first: NDArray[np.float64]
    through: NDArray[np.float64]
    left: NDArray[np.float64]


class _Blocks(NamedTuple):
    """The shares by which mass goes on.

    Attributes:
        to_sources: ``A`` of the rows behind, shape ``(G, P)``.
        to_generated: ``L`` of the rows behind, shape ``(G, G)``.
        steps: which generated units have another first row, rising, shape ``(K,)``.
        first_to_sources: ``A`` of their first rows, shape ``(K, P)``.
        first_to_generated: ``L`` of their first rows, shape ``(K, G)``.
    """

    to_sources: csr_array
    to_generated: csr_array
    steps: NDArray[np.int64]
    first_to_sources: csr_array
    first_to_generated: csr_array

    def absolute(self) -> _Blocks:
        """The blocks in absolute values."""
        steps = self.steps
        to_sources, to_generated = abs(self.to_sources), abs(self.to_generated)
        first = abs(self.first_to_sources), abs(self.first_to_generated)
        return _Blocks(to_sources, to_generated, steps, *first)

    def ending_at(self, cut: NDArray[np.bool_]) -> _Blocks:
        """The blocks without the rows of the cut units, shape ``(G,)``."""
        stays = (~cut).astype(np.float64)
        first = stays[self.steps]
        return _Blocks(
            _scaled(self.to_sources, stays),
            _scaled(self.to_generated, stays),
            self.steps,
            _scaled(self.first_to_sources, first),
            _scaled(self.first_to_generated, first),
        )

    def followed(self, weights: NDArray[np.float64], hops: int | None) -> _Flow:
        """The mass of the weights along all paths, or those with so many passes."""
        first, entering = np.zeros(0), None
        if self.steps.size:
            first = weights[self.steps]
            weights = weights.copy()
            weights[self.steps] = 0.0
            entering = self.first_to_generated.T @ first
        if hops is not None:
            return _Flow(
                first,
                *solve.truncated_throughput(self.to_generated, weights, hops, entering),
            )
        starting = weights if entering is None else weights + entering
        through = solve.throughput(self.to_generated, starting)
        return _Flow(first, through, np.zeros_like(through))

    def arrived(self, flow: _Flow) -> NDArray[np.float64]:
        """Mass that ends in each source, shape ``(P,)``."""
        attr: NDArray[np.float64] = self.to_sources.T @ flow.through
        if self.steps.size:
            attr += self.first_to_sources.T @ flow.first
        return attr

    def passed(self, flow: _Flow) -> NDArray[np.float64]:
        """Mass that passes through each generated unit, shape ``(G,)``."""
        through = flow.through.copy()
        if self.steps.size:
            through[self.steps] += flow.first
        return through

    def marginals(self, hops: int | None) -> NDArray[np.float64]:
        """Mass of all paths from each generated unit to each source, ``(G, P)``."""
        blocks = self.to_sources, self.to_generated
        if hops is None:
            total = onward = solve.marginals(*blocks)
        else:
            total = solve.truncated_marginals(*blocks, hops)
        if self.steps.size == 0:
            return total
        if hops is not None:
            # What goes on by a first row has made one pass when it is behind.
            onward = (
                solve.truncated_marginals(*blocks, hops - 1)
                if hops > 0
                else np.zeros_like(total)
            )
        own = self.first_to_sources.toarray() + self.first_to_generated @ onward
        total[self.steps] = own
        return total


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


def _scaled(rows: csr_array, factor: NDArray[np.float64]) -> csr_array:
    """The rows, each times its factor."""
    data = rows.data * factor[_row_of(rows)]
    return csr_array((data, rows.indices, rows.indptr), shape=rows.shape)


def _exchanged(
    rows: csr_array, steps: NDArray[np.int64], others: csr_array
) -> csr_array:
    """The rows, some of them exchanged for others, as a canonical CSR array."""
    order = np.arange(rows.shape[0])
    order[steps] = rows.shape[0] + np.arange(steps.size)
    return _canonical(csr_array(vstack([rows, others], format="csr")[order]))


def _raw_rows(where: str, rows: Any) -> Any:
    """A copy of the rows as float64: an array, or a CSR array if they are sparse."""
    remedy = "Pass one row per generated unit and one column per unit."
    if issparse(rows):
        if rows.dtype.kind not in "biuf":
            raise TypeError(
                complaint(
                    where,
                    "must be real numbers",
                    f"values of type {rows.dtype} came",
                    "Convert them to float first.",
                )
            )
        raw = rows
    else:
        raw = real_array(where, rows)
    if raw.ndim != 2:
        raise ValueError(
            complaint(where, "must have shape (G, N)", f"{raw.shape} came", remedy)
        )
    return csr_array(raw, dtype=np.float64, copy=True) if issparse(raw) else raw


def _normalised(
    entries: csr_array,
    kept: NDArray[np.float64],
    steps: NDArray[np.int64],
    own_units: NDArray[np.int64],
    normalization: Normalization,
    where: tuple[str, str],
) -> tuple[csr_array, NDArray[np.float64]]:
    """Checked raw rows as rows of the graph, and what of each of them leaks.

    Args:
        entries: the raw rows, canonical, shape ``(K, N)``.
        kept: share of its mass that each of them holds, shape ``(K,)``.
        steps: their positions among the generated units, shape ``(K,)``.
        own_units: their units, shape ``(K,)``.
        normalization: ``"positive"``, ``"absolute"`` or ``"signed"``.
        where: the arguments that rows and shares came by, as the user wrote them.
    """
    row_of = _row_of(entries)
    check_entries(
        steps[row_of], entries.indices, entries.data, own_units[row_of], where[0]
    )
    part, filled = shares(entries.data, entries.indptr, normalization)
    _check_kept(kept, filled, np.diff(entries.indptr), steps, own_units, where[1])
    normalised = csr_array(
        (part * kept[row_of], entries.indices, entries.indptr),
        shape=entries.shape,
        copy=True,
    )
    return _canonical(normalised), (~filled & (kept == 1.0)).astype(np.float64)


def _heaviest_entries(
    entries: csr_array, normalization: Normalization, share: float
) -> tuple[csr_array, NDArray[np.float64]]:
    """The fewest entries that hold a share of each row's mass, and what they hold."""
    mass, _ = masses(entries.data, entries.indptr, normalization)
    chosen = np.zeros(mass.size, dtype=np.bool_)
    held = np.ones(entries.shape[0])
    for row, (start, stop) in enumerate(pairwise(entries.indptr.tolist())):
        chosen[start:stop], held[row] = heaviest(mass[start:stop], share)
    ends = np.concatenate([[0], np.cumsum(chosen)])[entries.indptr]
    rows = csr_array(
        (entries.data[chosen], entries.indices[chosen], ends), shape=entries.shape
    )
    return rows, held


def _behind_cut(graph: AttributionGraph, share: float) -> RowsBehind | None:
    """The rows behind with the fewest entries that hold a share of each one's mass."""
    if graph.behind is None:
        return None
    steps, entries, kept = graph.behind
    rows, held = _heaviest_entries(entries, graph.normalization, share)
    return RowsBehind(steps, rows, kept * held)


_BEHIND = (
    "Pass the rows that differ, by their position among the generated units, or all "
    "rows, of the shape of rows."
)


def _rows_behind(behind: Any, entries: csr_array) -> RowsBehind | None:
    """Copies of the rows behind; ``None`` where none of them is another row."""
    if behind is None:
        return None
    n_generated, n_units = entries.shape

    def position(value: Any) -> int:
        remedy = "Pass positions among the generated units."
        return whole_number("behind", value, stop=n_generated, remedy=remedy)

    if isinstance(behind, Mapping):
        found = _listed_behind(sorted(map(position, behind)), behind, n_units)
    elif isinstance(behind, RowsBehind):
        steps = np.array([position(step) for step in behind.steps], dtype=np.int64)
        rows = csr_array(_raw_rows("behind", behind.rows))
        if (np.diff(steps) <= 0).any() or rows.shape != (steps.size, n_units):
            raise ValueError(
                complaint(
                    "behind",
                    "steps must rise, and rows have one row for each of them and "
                    f"{n_units} columns",
                    f"steps {shown(steps.tolist())} and rows of shape {rows.shape} "
                    "came",
                    _BEHIND,
                )
            )
        kept = _kept_shares(behind.kept, steps.size, "behind.kept", "row")
        found = RowsBehind(steps, _canonical(rows), kept)
    else:
        every = _canonical(csr_array(_raw_rows("behind", behind)))
        if every.shape != entries.shape:
            raise ValueError(
                complaint(
                    "behind",
                    f"must have the shape of rows, {entries.shape}",
                    f"shape {every.shape} came",
                    _BEHIND,
                )
            )
        differing, _ = (every != entries).nonzero()
        steps = np.unique(differing).astype(np.int64)
        found = RowsBehind(steps, csr_array(every[steps]), np.ones(steps.size))
    return found if found.steps.size else None


def _listed_behind(
    steps: list[int], given: Mapping[int, Any], n_units: int
) -> RowsBehind:
    """The rows behind that came by their positions."""
    columns = [np.zeros(0, dtype=np.int32)]
    values = [np.zeros(0)]
    for step in steps:
        row = np.zeros(n_units)
        if given[step] is not None:
            row = real_array(f"behind[{step}]", given[step])
        if row.shape != (n_units,):
            raise ValueError(
                complaint(
                    f"behind[{step}]",
                    f"must have shape ({n_units},), one entry per unit",
                    f"shape {row.shape} came",
                    "Pass one raw row, or None for one that was not computed.",
                )
            )
        columns.append(np.flatnonzero(row).astype(np.int32))
        values.append(row[columns[-1]])
    parts = (
        np.concatenate(values),
        np.concatenate(columns),
        np.cumsum([0, *map(len, values[1:])]),
    )
    return RowsBehind(
        np.array(steps, dtype=np.int64),
        _canonical(csr_array(parts, shape=(len(steps), n_units))),
        np.array([float(given[step] is not None) for step in steps]),
    )


def _summed(
    rows: Any,
    row_group: NDArray[np.int64],
    group_of: NDArray[np.int64],
    coarse_units: NDArray[np.int64],
) -> Any:
    """Raw rows summed over groups, only to groups before their own, ``(G', N')``."""
    n_groups = int(group_of.max(initial=-1)) + 1
    sum_rows = _membership(row_group, coarse_units.size)  # (G', G)
    sum_columns = _membership(group_of, n_groups)  # (N', N)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = (sum_columns @ (sum_rows @ rows).T).T  # (G', N')
    if issparse(rows):
        rows = rows.tocoo()
        before = rows.col < coarse_units[rows.row]
        rows = csr_array(
            (rows.data[before], (rows.row[before], rows.col[before])),
            shape=rows.shape,
        )
        finite = np.isfinite(rows.data).all()
    else:
        rows = np.where(np.arange(n_groups) < coarse_units[:, None], rows, 0.0)
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
    return rows


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


def _cut_after(hops: Any) -> int | None:
    """The number of passes after which paths are cut, or ``None``."""
    return None if hops is None else _passes("hops", hops)


def _chosen_units(units: Any, n_units: int) -> NDArray[np.bool_]:
    """Which of the units are given, shape ``(N,)``."""
    remedy = "Pass a list of unit indices, or one boolean per unit."
    try:
        given = np.array(units)
    except (TypeError, ValueError, RuntimeError):
        given = np.array(None)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "biu"):
        raise TypeError(
            complaint(
                "units",
                "must be a list of whole numbers or a boolean mask",
                f"{shown(units)} came",
                remedy,
            )
        )
    if given.dtype == np.bool_:
        if given.size != n_units:
            raise ValueError(
                complaint(
                    "units",
                    f"a mask must have shape ({n_units},), one entry per unit",
                    f"shape {given.shape} came",
                    remedy,
                )
            )
        return given
    mask: NDArray[np.bool_] = np.zeros(n_units, dtype=np.bool_)
    for unit in given.tolist():
        mask[whole_number("units", unit, stop=n_units, remedy=remedy)] = True
    return mask


def _cut_share(where: str, value: Any) -> float:
    """A share of a row's mass that is to stay."""
    return share_to_keep(where, value, remedy="Pass 0.99 to keep 99% of each row.")


_KEPT = (
    "Pass the share of each row's mass that its entries hold: 1 for a complete row, 0 "
    "for one that was not computed."
)


def _kept_shares(
    kept: Any, size: int, where: str = "kept", entry: str = "generated unit"
) -> NDArray[np.float64]:
    """The share of its mass that each row kept, shape ``(size,)``."""
    if kept is None:
        return np.ones(size)
    checked = finite_vector(where, kept, size, entry=entry)
    for row in np.flatnonzero((checked < 0.0) | (checked > 1.0))[:1]:
        raise ValueError(
            complaint(
                where,
                "every share must be at least 0 and at most 1",
                f"{checked[row]} came at {entry} {row}",
                _KEPT,
            )
        )
    return checked


def _check_kept(
    kept: NDArray[np.float64],
    filled: NDArray[np.bool_],
    counts: NDArray[Any],
    steps: NDArray[np.int64],
    own_units: NDArray[np.int64],
    where: str,
) -> None:
    """Raise if a row that was not computed has entries, or a part has no mass."""
    for row in np.flatnonzero((kept == 0.0) & (counts > 0))[:1]:
        raise ValueError(
            complaint(
                where,
                "a row of which nothing is kept must have no entries",
                f"row {steps[row]} (unit {own_units[row]}) has {counts[row]}",
                _KEPT,
            )
        )
    for row in np.flatnonzero((kept > 0.0) & (kept < 1.0) & ~filled)[:1]:
        raise ValueError(
            complaint(
                where,
                "a row of which a part is kept must have mass",
                f"row {steps[row]} (unit {own_units[row]}) has none and kept "
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
