"""Rows that a random method drew several times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, issparse

from captum_cage._checks import complaint
from captum_cage.graph import AttributionGraph, Normalization, RowsBehind

__all__ = ["DrawnRows"]


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """The raw rows of each draw.

    Attributes:
        rows (numpy.ndarray): shape ``(D, G, N)``, float64.
        steps (numpy.ndarray): positions of the rows that have another one behind, for
            contrastive questions, shape ``(K,)``, int64.
        behind (numpy.ndarray): these other rows, shape ``(D, K, N)``, float64.
        sources (numpy.ndarray): whether a unit is a source, shape ``(N,)``, bool.
        normalization (str): of the graph.
    """

    rows: npt.NDArray[np.float64]
    steps: npt.NDArray[np.int64]
    behind: npt.NDArray[np.float64]
    sources: npt.NDArray[np.bool_]
    normalization: Normalization

    @classmethod
    def of(cls, graphs: Sequence[AttributionGraph]) -> DrawnRows:
        """The rows of complete graphs over the same units.

        Raises:
            ValueError: if a row is not complete.
        """
        first = graphs[0]
        for graph in graphs:
            if graph.left_out.any() or graph.left_out_behind.any():
                raise ValueError(
                    complaint(
                        "draws",
                        "every draw must have all of its rows",
                        "one lacks some",
                        "Leave tolerance and sparsify out.",
                    )
                )
        steps = np.zeros(0, dtype=np.int64)
        if first.behind is not None:
            steps = first.behind.steps
        behind = [
            np.zeros((0, first.n_units))
            if graph.behind is None
            else graph.behind.rows.toarray()
            for graph in graphs
        ]
        rows = np.stack(
            [
                graph.rows.toarray() if issparse(graph.rows) else graph.rows
                for graph in graphs
            ]
        )
        return cls(rows, steps, np.stack(behind), first.sources, first.normalization)

    def mean_graph(self) -> AttributionGraph:
        """The graph of the mean rows."""
        draws = len(self.rows)
        return self._graph(np.full(draws, 1.0 / draws))

    def resampled(self, count: int, seed: int) -> Iterator[AttributionGraph]:
        """Graphs of the mean rows of draws that are taken at random, with repetition.

        Args:
            count (int): number of graphs.
            seed (int): of the choice.
        """
        rng = np.random.default_rng(seed)
        draws = len(self.rows)
        size = max(draws - 1, 1)
        for _ in range(count):
            chosen = rng.integers(draws, size=size)
            yield self._graph(np.bincount(chosen, minlength=draws) / size)

    def _graph(self, weights: npt.NDArray[np.float64]) -> AttributionGraph:
        """The graph of the weighted mean of the draws, whose weights sum to one."""
        behind = None
        if len(self.steps):
            rows = csr_array(np.tensordot(weights, self.behind, axes=1))
            behind = RowsBehind(self.steps, rows, np.ones(len(self.steps)))
        return AttributionGraph.from_rows(
            np.tensordot(weights, self.rows, axes=1),
            self.sources,
            self.normalization,
            behind=behind,
        )
