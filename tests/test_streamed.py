"""Questions to rows that are read one after another equal those to the graph."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from captum_cage import AttributionGraph
from captum_cage.graph import RowsBehind
from captum_cage.streamed import RawRow, StreamedGraph

CLOSE = {"rel": 1e-12, "abs": 1e-12}


def random_rows(random, sources, zeros):
    """Raw rows of the units that are no sources, some without mass."""
    units = np.flatnonzero(~sources)
    rows = random.normal(size=(units.size, sources.size))
    rows[random.random(rows.shape) < zeros] = 0.0
    rows *= np.arange(sources.size) < units[:, None]
    rows[random.random(units.size) < 0.2] = 0.0
    return rows


def raw(row, kept=1.0):
    """A row by its entries."""
    units = np.flatnonzero(row)
    return RawRow(units, row[units], kept)


def reader(graph_rows, kept):
    """Reads rows of an array; those of which nothing is kept are not there."""
    rows = csr_array(graph_rows)

    def read(step):
        part = slice(*rows.indptr[step : step + 2])
        if kept[step] == 0.0:
            return None
        return RawRow(rows.indices[part], rows.data[part], float(kept[step]))

    return read


class TestAnswers:
    """The same as those of the graph in memory."""

    @settings(deadline=None, max_examples=40)
    @given(
        seed=st.integers(0, 2**32 - 1),
        size=st.integers(1, 9),
        normalization=st.sampled_from(["positive", "absolute", "signed"]),
        hops=st.none() | st.integers(0, 5),
        cut=st.booleans(),
        foiled=st.booleans(),
    )
    def test_equal_those_of_the_graph(
        self, seed, size, normalization, hops, cut, foiled
    ):
        """With sources between, rows left out, rows cut, rows behind and a last hop."""
        random = np.random.default_rng(seed)
        sources = np.append(True, random.random(size) < 0.4)
        sources[-1] = False
        rows = random_rows(random, sources, 0.3)
        known = random.random(len(rows)) < 0.8
        rows[~known] = 0.0
        behind = starts = None
        if foiled:
            step = int(random.integers(len(rows)))
            start = random_rows(random, sources, 0.3)[step]
            plain = csr_array(rows[[step]])
            behind = RowsBehind(np.array([step]), plain, known[[step]].astype(float))
            rows[step], known[step], starts = start, True, {step: raw(start)}
        graph = AttributionGraph.from_rows(
            rows,
            sources,
            normalization,
            kept=known.astype(float),
            behind=behind,
            sparsify=0.7 if cut else None,
        )
        passing = graph.without_behind()
        if starts is not None and graph.behind is not None:
            starts = {step: reader(graph.rows, graph.kept)(step)}
        streamed = StreamedGraph(
            reader(passing.rows, passing.kept), sources, normalization, starts=starts
        )
        weights = random.random(len(rows)) * (random.random(len(rows)) < 0.5)
        found = streamed.answer(weights, hops=hops)
        expected = (
            graph.explain(weights) if hops is None else graph.hops(weights, hops).attr
        )
        assert found.attr == pytest.approx(expected, **CLOSE)
        through = graph.throughput(weights, hops=hops)
        assert found.throughput == pytest.approx(through, **CLOSE)
        leaked = graph.leaked(weights, hops=hops)
        assert found.leaked == pytest.approx(leaked, **CLOSE)
        open_mass = graph.unresolved(weights, hops=hops)
        assert found.unresolved == pytest.approx(open_mass, **CLOSE)

    def test_each_answer_has_its_own_name(self):
        """Those of the graph."""
        rows = [raw(np.array(row)) for row in ([1.0, 1, 0, 0], [0.0, 1, 3, 0])]
        graph = StreamedGraph(rows.__getitem__, [True, True, False, False])
        assert graph.explain([0, 1]).tolist() == [0.375, 0.625]
        assert graph.throughput([0, 1]).tolist() == [0.75, 1.0]
        assert graph.throughput([0, 1], hops=0).tolist() == [0.0, 1.0]
        assert graph.leaked([0, 1]) == graph.unresolved([0, 1]) == 0.0
        assert graph.hops([0, 1], 0).attr.tolist() == [0.0, 0.25]
        assert graph.hops([0, 1], 0).unresolved == 0.75

    def test_rows_on_which_no_mass_sits_are_not_read(self):
        """Nor is any read twice."""
        read = []

        def reading(step):
            read.append(step)
            return raw(np.eye(6)[max(step - 2, 0) + (step > 2)])

        StreamedGraph(reading, [True, *[False] * 5]).explain([0, 0, 0, 0, 1])
        assert read == [4, 2]


class TestChecks:
    """What is refused."""

    def test_a_row_must_be_causal_and_finite(self):
        """The error names row and unit."""
        for value, unit, match in ((1.0, 1, "causal"), (np.nan, 0, "finite")):
            row = RawRow(np.array([unit]), np.array([value]), 1.0)
            graph = StreamedGraph(lambda _, row=row: row, [True, False])
            with pytest.raises(ValueError, match=f"rows:.*{match}.*row 0"):
                graph.explain([1])

    def test_questions_are_checked_as_those_to_a_graph(self):
        """Weights, hops and the normalisation."""
        graph = StreamedGraph(lambda _: None, [True, False])
        with pytest.raises(ValueError, match="weights: "):
            graph.explain([1, 2])
        with pytest.raises(ValueError, match="hops: must be 0 or more"):
            graph.answer([1], hops=-1)
        with pytest.raises(ValueError, match="normalization: must be one of"):
            StreamedGraph(lambda _: None, [True, False], "other")
