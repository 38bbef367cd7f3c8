"""Mass of all paths through an attribution graph, by triangular solves.

Pure functions on sparse blocks: ``to_sources`` is ``A``, shape ``(G, P)``, and
``to_generated`` is ``L``, shape ``(G, G)`` and strictly lower triangular.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.sparse import csr_array
from scipy.sparse.linalg import spsolve_triangular

from captum_cage._checks import complaint, one_of

__all__ = [
    "DENSE_ENTRIES",
    "DENSE_FILL",
    "DENSE_FILL_SPAN",
    "DENSE_ROWS",
    "Hops",
    "Parts",
    "Path",
    "best_paths",
    "marginals",
    "signed_parts",
    "solve_triangle",
    "throughput",
    "truncated_marginals",
    "truncated_throughput",
]

# Measured by benchmarks/solve.py on 2 cores that did nothing else, 2 BLAS threads, with
# SciPy 1.17.1 and NumPy 2.4.6. The solves take the same time at these fills, G = P:
#   question     100     500     1000    2000
#   marginals    <0.01   <0.01   0.013   0.010
#   one span     <0.01   <0.01   0.111   0.131
# A full triangle, G = P = 2000: marginals 2.35 s sparse and 0.100 s dense, one span
# 0.043 s and 0.0085 s. At 1% filled: 0.083 s and 0.083 s, 0.0005 s and 0.0023 s.
DENSE_FILL = 0.012
"""Share of ``L``'s lower triangle from which the dense solve is used for marginals."""

DENSE_FILL_SPAN = 0.12
"""The same for one right side."""

DENSE_ROWS = 500
"""Largest ``G`` for which the dense solve is used at any fill."""

DENSE_ENTRIES = 2**27
"""Largest ``G * G`` for which a dense copy of ``L`` is made (1 GiB of float64)."""


class Hops(NamedTuple):
    """A series of paths that was cut, and the mass that it leaves open.

    Attributes:
        attr: mass of the paths within the cut, per source unit, shape ``(P,)``.
        unresolved: mass that still sits on generated units. The full answer differs
            from ``attr`` by at most this much, in the sum of absolute values.
    """

    attr: NDArray[np.float64]
    unresolved: float


class Parts(NamedTuple):
    """Mass of the paths of positive weight and of those of negative weight, apart.

    Attributes:
        positive: mass of the paths whose weight is above zero, not negative.
        negative: absolute mass of the paths whose weight is below zero, of the same
            shape, not negative.
    """

    positive: NDArray[np.float64]
    negative: NDArray[np.float64]


@dataclass(frozen=True)
class Path:
    """One path through the graph.

    Attributes:
        units: unit indices in ``0 .. N - 1``, from the explained unit to the source.
        weight: weight of the explained unit times the product of the path's edges.
    """

    units: tuple[int, ...]
    weight: float


def solve_triangle(
    to_generated: csr_array,
    right: NDArray[np.float64],
    *,
    transposed: bool = False,
    method: Literal["auto", "sparse", "dense"] = "auto",
) -> NDArray[np.float64]:
    """The solution ``X`` of ``(I - L) X = right``, or of ``(I - L)^T X = right``.

    One function in front of SciPy's sparse solve and the dense BLAS solve. Both give
    the same numbers up to rounding.

    Args:
        to_generated: ``L``, shape ``(G, G)``, strictly lower triangular.
        right: the right side, shape ``(G,)`` or ``(G, K)``. It is not changed.
        transposed: solve with the transposed matrix.
        method: ``"auto"`` takes the dense solve for at most `DENSE_ROWS` rows, or where
            at least `DENSE_FILL` of the lower triangle is filled (`DENSE_FILL_SPAN`
            for a single right side) and ``L`` has at most `DENSE_ENTRIES` entries.

    Returns:
        ``X``, of the shape of ``right``, float64.

    Raises:
        ValueError: if ``L`` is not square, has an entry on or above its diagonal, or
            does not fit ``right``.

    Example:
        >>> to_generated = csr_array(np.array([[0.0, 0.0], [0.75, 0.0]]))
        >>> solve_triangle(to_generated, np.array([1.0, 1.0])).tolist()
        [1.0, 1.75]
    """
    one_of("method", method, ("auto", "sparse", "dense"))
    lower = _strictly_lower(to_generated)
    n_generated = lower.shape[0]
    right = np.asarray(right, dtype=np.float64)
    if right.ndim not in (1, 2) or right.shape[0] != n_generated:
        raise ValueError(
            complaint(
                "right",
                f"must have shape ({n_generated},) or ({n_generated}, K)",
                f"shape {right.shape} came",
                "Pass one row per row of to_generated.",
            )
        )
    if right.size == 0:
        return np.zeros_like(right)
    if method == "auto":
        several = right.ndim == 2 and right.shape[1] > 1
        method = "dense" if _dense_is_faster(lower, several) else "sparse"
    solution: NDArray[np.float64]
    if method == "dense":
        solution = solve_triangular(
            (-lower).toarray(),
            right,
            lower=True,
            trans=1 if transposed else 0,
            unit_diagonal=True,
            check_finite=False,
        )
        return solution
    # SciPy before 1.14 takes a row's last entry for its diagonal, also with
    # unit_diagonal=True, and warns about anything but CSR: so the diagonal is stored
    # and both triangles are passed as CSR. SciPy 1.14 and 1.15 take 32-bit indices
    # only.
    index = np.arange(n_generated + 1)
    identity = csr_array((np.ones(n_generated), index[:-1], index), shape=lower.shape)
    triangle = csr_array(identity - lower)
    if transposed:
        triangle = csr_array(triangle.T.tocsr())
    if triangle.nnz <= np.iinfo(np.intc).max:
        triangle.indices = triangle.indices.astype(np.intc, copy=False)
        triangle.indptr = triangle.indptr.astype(np.intc, copy=False)
    triangle.sort_indices()
    solution = spsolve_triangular(
        triangle, right, lower=not transposed, unit_diagonal=True
    )
    return solution


def marginals(to_sources: csr_array, to_generated: csr_array) -> NDArray[np.float64]:
    """Mass of all paths from each generated unit to each source unit.

    Solves ``(I - L) X = A``. Rows sum to one, less what leaks on the way.

    Args:
        to_sources: ``A``, shape ``(G, P)``.
        to_generated: ``L``, shape ``(G, G)``, strictly lower triangular.

    Returns:
        ``X``, shape ``(G, P)``, float64; not negative where the blocks are not.

    Raises:
        ValueError: if ``L`` is not square, has an entry on or above its diagonal, or
            does not fit ``A``.

    Source:
        Walker and Ewetz (2025), :cite:p:`walker2025cage`, section 4.

    Example:
        >>> to_sources = csr_array(np.array([[0.5, 0.5], [0.0, 0.25]]))
        >>> to_generated = csr_array(np.array([[0.0, 0.0], [0.75, 0.0]]))
        >>> marginals(to_sources, to_generated).tolist()
        [[0.5, 0.5], [0.375, 0.625]]
    """
    return solve_triangle(to_generated, to_sources.toarray())


def throughput(
    to_generated: csr_array, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mass that passes through each generated unit when some of them are explained.

    Solves ``(I - L)^T y = w`` by one solve with a vector: explaining one span needs
    ``A^T y`` and never the full marginals.

    Args:
        to_generated: ``L``, shape ``(G, G)``, strictly lower triangular.
        weights: ``w``, weight of each explained unit, shape ``(G,)``.

    Returns:
        ``y``, shape ``(G,)``, float64.

    Raises:
        ValueError: if ``L`` is not square, has an entry on or above its diagonal, or
            does not fit ``w``.

    Source:
        Walker and Ewetz (2025), :cite:p:`walker2025cage`, section 4: their backward sum
        is this solve, one row at a time.

    Example:
        >>> to_generated = csr_array(np.array([[0.0, 0.0], [0.75, 0.0]]))
        >>> throughput(to_generated, np.array([0.0, 1.0])).tolist()
        [0.75, 1.0]
    """
    return solve_triangle(to_generated, weights, transposed=True)


def truncated_throughput(
    to_generated: csr_array,
    weights: NDArray[np.float64],
    k: int,
    entering: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mass through each generated unit within ``k`` passes, and the mass left open.

    The first ``k + 1`` terms of the series ``y = sum_i (L^T)^i w``, and the term that
    comes next. From ``k = G - 1`` on nothing is left open. Mass ``e`` that enters with
    the first pass is in term ``i`` as ``(L^T)^(i - 1) e``, for ``i >= 1``.

    Args:
        to_generated: ``L``, shape ``(G, G)``, strictly lower triangular.
        weights: ``w``, weight of each explained unit, shape ``(G,)``.
        k: number of passes through generated units, 0 or more.
        entering: ``e``, mass that comes to each generated unit from elsewhere and is
            there after one pass, shape ``(G,)``; ``None`` for none.

    Returns:
        ``y`` of the cut series and the mass on each generated unit that was not
        followed further, both of shape ``(G,)``, float64.

    Raises:
        ValueError: if ``L`` is not square or has an entry on or above its diagonal.

    Example:
        >>> to_generated = csr_array(np.array([[0.0, 0.0], [0.75, 0.0]]))
        >>> through, left = truncated_throughput(to_generated, np.array([0.0, 1.0]), 0)
        >>> through.tolist(), left.tolist()
        ([0.0, 1.0], [0.75, 0.0])
    """
    backwards = _strictly_lower(to_generated).T
    passing = np.array(weights, dtype=np.float64)
    through = passing.copy()
    passing = backwards @ passing
    if entering is not None:
        passing = passing + entering
    for _ in range(k):
        if not passing.any():
            break
        through += passing
        passing = backwards @ passing
    return through, passing


def truncated_marginals(
    to_sources: csr_array, to_generated: csr_array, k: int
) -> NDArray[np.float64]:
    """Mass of the paths with at most ``k`` passes, from each generated unit.

    The first ``k + 1`` terms of the series ``X = sum_i L^i A``. From ``k = G - 1`` on
    it is all of it.

    Args:
        to_sources: ``A``, shape ``(G, P)``.
        to_generated: ``L``, shape ``(G, G)``, strictly lower triangular.
        k: number of passes through generated units, 0 or more.

    Returns:
        ``X`` of the cut series, shape ``(G, P)``, float64.

    Raises:
        ValueError: if ``L`` is not square or has an entry on or above its diagonal.

    Example:
        >>> to_sources = csr_array(np.array([[0.5, 0.5], [0.0, 0.25]]))
        >>> to_generated = csr_array(np.array([[0.0, 0.0], [0.75, 0.0]]))
        >>> truncated_marginals(to_sources, to_generated, 0).tolist()
        [[0.5, 0.5], [0.0, 0.25]]
    """
    lower = _strictly_lower(to_generated)
    arriving: NDArray[np.float64] = to_sources.toarray()
    total = arriving.copy()
    for _ in range(k):
        arriving = lower @ arriving
        if not arriving.any():
            break
        total += arriving
    return total


def signed_parts(absolute: NDArray[np.float64], net: NDArray[np.float64]) -> Parts:
    """Positive and negative mass, from their sum and their difference.

    ``(s + d) / 2`` and ``(s - d) / 2``. Where one of them is zero, ``s`` and ``d`` are
    the same sums but for a sign, and the difference is zero to the last bit; where
    rounding of the others would make one negative, it is zero.

    Args:
        absolute: ``s``, solved with the absolute values of blocks and weights.
        net: ``d``, solved with the blocks and the weights, of the same shape.

    Returns:
        Both parts, of that shape, float64, not negative.

    Example:
        >>> parts = signed_parts(np.array([1.0, 0.5]), np.array([0.5, -0.5]))
        >>> parts.positive.tolist(), parts.negative.tolist()
        ([0.75, 0.0], [0.25, 0.5])
    """
    return Parts(
        np.maximum((absolute + net) / 2.0, 0.0), np.maximum((absolute - net) / 2.0, 0.0)
    )


def best_paths(
    matrix: csr_array,
    starts: NDArray[np.float64],
    targets: NDArray[np.bool_],
    k: int,
) -> list[Path]:
    """The ``k`` heaviest paths from weighted units down to target units, exactly.

    Paths are ranked by absolute weight; of equal ones the shorter comes first, then
    the lexicographically smaller. Paths of weight zero are not paths; a product below
    the smallest float is zero.

    Every unit keeps a sorted list of its heaviest paths. One pass over all edges fills
    in the first entry of each list; further entries are made when they are asked for,
    by a heap over the unit's edges. That takes time for the edges once, and then for
    ``k`` times the length of a path.

    Args:
        matrix: the graph, shape ``(N, N)``, lower triangular.
        starts: weight of each unit that a path may start from, shape ``(N,)``.
        targets: the units at which a path ends, shape ``(N,)``.
        k: number of paths, 0 or more.

    Returns:
        At most ``k`` paths, the heaviest first.

    Source:
        The recursive enumeration of Jimenez and Marzal (1999), "Computing the K
        shortest paths", :cite:p:`jimenez1999paths`, for products on an acyclic graph.

    Example:
        >>> rows = [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.25, 0.75, 0.0]]
        >>> matrix = csr_array(np.array(rows))
        >>> starts, targets = np.array([0.0, 0.0, 1.0]), np.array([True, False, False])
        >>> for path in best_paths(matrix, starts, targets, 2):
        ...     print(path)
        Path(units=(2, 1, 0), weight=0.75)
        Path(units=(2, 0), weight=0.25)
    """
    if k == 0 or not starts.any():
        return []
    return _PathLists(matrix, starts, targets, k).heaviest()


class _Entry(NamedTuple):
    """A path from a unit: an edge to ``child`` and then the child's path ``rank``.

    The order of the fields is the order of the ranking.
    """

    negative_weight: float
    length: int
    child: int
    rank: int


# The path of no edges that a target unit has to itself.
_ARRIVED = _Entry(-1.0, 0, -1, 0)


class _PathLists:
    """Sorted lists of the heaviest paths of each unit, grown on demand.

    The explained units hang below one more unit, the root, so that the paths sought
    are the root's. All weights are products from the source's end upwards: a longer
    product then never changes the order of two shorter ones.
    """

    def __init__(
        self,
        matrix: csr_array,
        starts: NDArray[np.float64],
        targets: NDArray[np.bool_],
        k: int,
    ) -> None:
        self._matrix = matrix
        self._starts = starts
        self._root = matrix.shape[0]
        self._k = k
        # Absolute weight and length of each unit's heaviest path.
        self._best = np.append(targets.astype(np.float64), 0.0)
        self._length = np.zeros(self._root + 1, dtype=np.int64)
        self._edge: dict[int, dict[int, float]] = {}
        self._found: dict[int, list[_Entry]] = {}
        self._heap: dict[int, list[_Entry]] = {}
        self._ended: set[int] = set()
        for target in np.flatnonzero(targets).tolist():
            self._found[target] = [_ARRIVED]
            self._ended.add(target)
        last = int(np.flatnonzero(starts)[-1])
        for unit in np.flatnonzero(~targets[: last + 1]).tolist():
            self._fill_best(unit)
        self._fill_best(self._root)

    def heaviest(self) -> list[Path]:
        """The root's first ``k`` paths."""
        if self._best[self._root] == 0.0:
            return []
        self._open(self._root)
        found = self._found[self._root]
        while len(found) < self._k and self._root not in self._ended:
            self._grow(self._root)
        return [self._path(entry) for entry in found]

    def _edges(self, unit: int) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """Children and edges of a unit."""
        if unit == self._root:
            children = np.flatnonzero(self._starts)
            return children, self._starts[children]
        row = slice(self._matrix.indptr[unit], self._matrix.indptr[unit + 1])
        return self._matrix.indices[row], self._matrix.data[row]

    def _fill_best(self, unit: int) -> None:
        """Weight and length of a unit's heaviest path, from those of its children."""
        children, edges = self._edges(unit)
        weights = np.abs(edges) * self._best[children]
        best = weights.max(initial=0.0)
        if best > 0.0:
            self._best[unit] = best
            self._length[unit] = 1 + self._length[children[weights == best]].min()

    def _open(self, unit: int) -> None:
        """Start a unit's list by its heaviest path."""
        if unit in self._found:
            return
        children, edges = self._edges(unit)
        weights = np.abs(edges) * self._best[children]
        lengths = 1 + self._length[children]
        # Of a unit's edges only those with the k heaviest first paths can be needed.
        order = np.lexsort((children, lengths, -weights))[: self._k]
        order = order[weights[order] > 0.0]
        kept = children[order].tolist()
        self._edge[unit] = dict(zip(kept, edges[order].tolist(), strict=True))
        # A sorted list is a heap.
        heap = [
            _Entry(-weight, length, child, 0)
            for weight, length, child in zip(
                weights[order].tolist(), lengths[order].tolist(), kept, strict=True
            )
        ]
        self._heap[unit] = heap
        self._found[unit] = [heappop(heap)]

    def _grow(self, unit: int) -> None:
        """Add the next path to a unit's list, or mark the list as ended.

        The next path may need the child's next path, which may need its child's: this
        walks down that one chain and back up, without recursion, as a chain can be
        longer than Python's stack.
        """
        chain = [unit]
        while True:
            last = self._found[chain[-1]][-1]
            self._open(last.child)
            if (
                last.rank + 1 < len(self._found[last.child])
                or last.child in self._ended
            ):
                break
            chain.append(last.child)
        for unit in reversed(chain):
            last = self._found[unit][-1]
            rank = last.rank + 1
            if rank < len(self._found[last.child]):
                after = self._found[last.child][rank]
                edge = abs(self._edge[unit][last.child])
                weight = edge * -after.negative_weight
                if weight > 0.0:
                    entry = _Entry(-weight, 1 + after.length, last.child, rank)
                    heappush(self._heap[unit], entry)
            if self._heap[unit]:
                self._found[unit].append(heappop(self._heap[unit]))
            else:
                self._ended.add(unit)

    def _path(self, entry: _Entry) -> Path:
        """The path that an entry of the root's list stands for."""
        weight = -entry.negative_weight
        units: list[int] = []
        unit = self._root
        while entry.child >= 0:
            if self._edge[unit][entry.child] < 0.0:
                weight = -weight
            unit = entry.child
            units.append(unit)
            self._open(unit)
            entry = self._found[unit][entry.rank]
        return Path(tuple(units), weight)


def _strictly_lower(to_generated: csr_array) -> csr_array:
    """``L`` as it came, if it is square and strictly lower triangular."""
    if to_generated.shape[0] != to_generated.shape[1]:
        raise ValueError(
            complaint(
                "to_generated",
                "must be square",
                f"shape {to_generated.shape} came",
                "Pass the block of the graph between its generated units.",
            )
        )
    lower = csr_array(to_generated)
    row_of = np.repeat(np.arange(lower.shape[0]), np.diff(lower.indptr))
    for entry in np.flatnonzero((lower.indices >= row_of) & (lower.data != 0))[:1]:
        raise ValueError(
            complaint(
                "to_generated",
                "every entry must stand below the diagonal",
                f"row {row_of[entry]} has one in column {lower.indices[entry]}",
                "A generated unit depends only on what stands before it.",
            )
        )
    return lower


def _dense_is_faster(lower: csr_array, several: bool) -> bool:
    """Whether the dense solve is expected to beat the sparse one."""
    n_generated = lower.shape[0]
    entries = n_generated * n_generated
    fill = DENSE_FILL if several else DENSE_FILL_SPAN
    return entries <= DENSE_ENTRIES and (
        n_generated <= DENSE_ROWS
        or bool(lower.nnz >= fill * (entries - n_generated) / 2)
    )
