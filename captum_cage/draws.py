"""Rows that a random method drew several times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

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
        """The rows of complete graphs over the same units."""
        first = graphs[0]
        steps = np.zeros(0, dtype=np.int64)
        if first.behind is not None:
            steps = first.behind.steps
        behind = [
            np.zeros((0, first.n_units))
            if graph.behind is None
            else graph.behind.rows.toarray()
            for graph in graphs
        ]
        rows = np.stack([np.asarray(graph.rows) for graph in graphs])
        return cls(rows, steps, np.stack(behind), first.sources, first.normalization)

    def mean_graph(self) -> AttributionGraph:
        """The graph of the mean rows."""
        return self._graph(np.arange(len(self.rows)))

    def resampled(self, count: int, seed: int) -> Iterator[AttributionGraph]:
        """Graphs of the mean rows of draws that are taken at random, with repetition.

        Args:
            count (int): number of graphs.
            seed (int): of the choice.
        """
        rng = np.random.default_rng(seed)
        draws = len(self.rows)
        for _ in range(count):
            yield self._graph(rng.integers(draws, size=max(draws - 1, 1)))

    def _graph(self, chosen: npt.NDArray[np.int64]) -> AttributionGraph:
        behind = None
        if len(self.steps):
            rows = csr_array(self.behind[chosen].mean(axis=0))
            behind = RowsBehind(self.steps, rows, np.ones(len(self.steps)))
        return AttributionGraph.from_rows(
            self.rows[chosen].mean(axis=0),
            self.sources,
            self.normalization,
            behind=behind,
        )
