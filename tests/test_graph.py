"""AttributionGraph, against path enumeration, the authors' sum and plain loops."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from captum_cage import solve
from captum_cage.graph import AttributionGraph, Hops, Parts, Path, RowsBehind
from captum_cage.testing.strategies import (
    NORMALIZATIONS,
    source_masks,
    weighted_graphs,
)
from captum_cage.testing.strategies import raw_rows as raw_graphs
from captum_cage.testing.strategies import weights as weights_of

EXACT = 1e-12
PASSES = st.integers(0, 3) | st.integers(0, 8)


def each(dtype, shape, elements=None):
    """Arrays of which each entry is drawn; else one value would fill most of them."""
    return arrays(dtype, shape, elements=elements, fill=st.nothing())


def slow_matrix(rows, sources, normalization):
    """The graph, entry by entry."""
    n_units = len(sources)
    matrix = np.zeros((n_units, n_units))
    remaining = iter(rows)
    for unit in range(n_units):
        if sources[unit]:
            matrix[unit, unit] = 1.0
            continue
        row = [float(entry) for entry in next(remaining)]
        if normalization == "positive":
            row = [max(entry, 0.0) for entry in row]
        elif normalization == "absolute":
            row = [abs(entry) for entry in row]
        total = math.fsum(abs(entry) for entry in row)
        for other, entry in enumerate(row):
            if total > 0:
                matrix[unit, other] = entry / total
    return matrix


def enumerated_paths(graph, weights):
    """All paths from weighted units to sources, with weights that are not zero."""
    matrix = graph.matrix.toarray()
    starts = dict(zip(np.flatnonzero(~graph.sources).tolist(), weights, strict=True))
    found = []
    for length in range(2, graph.n_units + 1):
        for rising in itertools.combinations(range(graph.n_units), length):
            path = rising[::-1]
            if graph.sources[path[-1]] and not graph.sources[list(path[:-1])].any():
                steps = itertools.pairwise(path)
                weight = starts[path[0]] * math.prod(matrix[step] for step in steps)
                found.append(Path(path, float(weight)))
    return [path for path in found if path.weight != 0]


def summed(graph, paths):
    """Mass of paths per source, shape (P,)."""
    mass = dict.fromkeys(np.flatnonzero(graph.sources).tolist(), 0.0)
    for path in paths:
        mass[path.units[-1]] += path.weight
    return np.array(list(mass.values()))


def backward_sum(graph, unit):
    """The CAGE authors' marginalisation of one row: ``r += r[k] * row_k``."""
    matrix = graph.matrix.toarray()
    row = matrix[unit].copy()
    for other in range(unit - 1, -1, -1):
        if not graph.sources[other]:
            share, row[other] = row[other], 0.0
            row += share * matrix[other]
    return row[graph.sources]


@settings(deadline=None)
@given(raw_graphs())
def test_matrix_equals_the_definition(raw):
    """Rows are normalised as defined, sources are unit vectors, the matrix is CSR."""
    graph = AttributionGraph.from_rows(*raw)
    assert isinstance(graph.matrix, sp.csr_array)
    assert graph.matrix.dtype == np.float64
    assert_allclose(graph.matrix.toarray(), slow_matrix(*raw), rtol=0, atol=EXACT)
    assert_array_equal(np.triu(graph.matrix.toarray(), 1), 0.0)
    assert graph.matrix.nnz == np.count_nonzero(graph.matrix.toarray())


@settings(deadline=None)
@given(raw_graphs())
def test_rows_sum_to_one_or_leak(raw):
    """In absolute values a row sums to one, or to zero where ``leak`` is exactly 1."""
    graph = AttributionGraph.from_rows(*raw)
    total = np.abs(graph.matrix.toarray()).sum(axis=1)[~graph.sources]
    assert_allclose(total, 1.0 - graph.leak, rtol=0, atol=EXACT)
    assert set(graph.leak.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("normalization", "expected", "leak"),
    [
        ("positive", [[0.75, 0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], [0.0, 1.0]),
        ("absolute", [[0.75, 0.25, 0.0, 0.0], [0.25, 0.25, 0.5, 0.0]], [0.0, 0.0]),
        ("signed", [[0.75, 0.25, 0.0, 0.0], [-0.25, -0.25, -0.5, 0.0]], [0.0, 0.0]),
    ],
)
def test_each_normalization_has_its_rows(normalization, expected, leak):
    """Clamped, absolute and signed rows of the same raw rows, by hand."""
    rows = [[3, 1, 0, 0], [-1, -1, -2, 0]]
    graph = AttributionGraph.from_rows(rows, 2, normalization)
    assert graph.matrix.toarray()[2:].tolist() == expected
    assert graph.leak.tolist() == leak


def test_positive_is_the_default():
    """Without a word about it, negative entries are clamped."""
    graph = AttributionGraph.from_rows([[1, -1, 0]], 2)
    assert graph.normalization == "positive"
    assert graph.matrix.toarray()[2].tolist() == [1.0, 0.0, 0.0]
    assert AttributionGraph(graph.rows, graph.sources).normalization == "positive"


@settings(deadline=None)
@given(raw_graphs())
def test_properties_describe_the_units(raw):
    """Counts and indices of units follow from the mask."""
    rows, sources, _ = raw
    graph = AttributionGraph.from_rows(*raw)
    assert (graph.n_generated, graph.n_units) == rows.shape
    assert graph.n_sources == graph.n_units - graph.n_generated == sources.sum()
    assert graph.source_units.tolist() == [i for i, s in enumerate(sources) if s]
    assert graph.generated_units.tolist() == [i for i, s in enumerate(sources) if not s]
    assert_array_equal(graph.sources, sources)
    assert_array_equal(graph.rows, rows)


@settings(deadline=None)
@given(raw_graphs())
def test_blocks_are_the_columns_of_the_matrix(raw):
    """``A`` holds the columns of sources, ``L`` those of generated units."""
    graph = AttributionGraph.from_rows(*raw)
    matrix = graph.matrix.toarray()
    to_sources, to_generated = graph.blocks()
    assert_array_equal(to_sources.toarray(), matrix[~graph.sources][:, graph.sources])
    assert_array_equal(
        to_generated.toarray(), matrix[~graph.sources][:, ~graph.sources]
    )
    assert isinstance(to_sources, sp.csr_array)
    assert isinstance(to_generated, sp.csr_array)


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 4), st.sampled_from(NORMALIZATIONS))
def test_a_number_of_sources_is_a_mask(n_sources, n_generated, normalization):
    """``sources=P`` says that the first ``P`` units are sources."""
    n_units = n_sources + n_generated
    rows = np.tril(np.ones((n_generated, n_units)), n_sources - 1)
    by_number = AttributionGraph.from_rows(rows, np.int64(n_sources), normalization)
    mask = [unit < n_sources for unit in range(n_units)]
    by_mask = AttributionGraph.from_rows(rows, mask, normalization)
    assert by_number.sources.tolist() == mask
    assert_array_equal(by_number.matrix.toarray(), by_mask.matrix.toarray())


@settings(deadline=None)
@given(weighted_graphs())
def test_explain_equals_path_enumeration(given_graph):
    """The mass per source is the sum over all paths, signed ones included."""
    graph, weights = given_graph
    expected = summed(graph, enumerated_paths(graph, weights))
    assert_allclose(graph.explain(weights), expected, rtol=0, atol=EXACT)


@settings(deadline=None)
@given(weighted_graphs())
def test_marginals_equal_path_enumeration_and_explain(given_graph):
    """Row ``t`` of the marginals enumerates paths from ``t``; ``explain`` adds up."""
    graph, weights = given_graph
    marginals = graph.marginals()
    assert marginals.shape == (graph.n_generated, graph.n_sources)
    for number, unit_weights in enumerate(np.eye(graph.n_generated)):
        expected = summed(graph, enumerated_paths(graph, unit_weights))
        assert_allclose(marginals[number], expected, rtol=0, atol=EXACT)
    assert_allclose(graph.explain(weights), weights @ marginals, rtol=0, atol=EXACT)


@settings(deadline=None)
@given(raw_graphs())
def test_marginals_equal_the_authors_backward_sum(raw):
    """Each row is what the CAGE code computes by walking backwards."""
    graph = AttributionGraph.from_rows(*raw)
    marginals = graph.marginals()
    for number, unit in enumerate(graph.generated_units):
        expected = backward_sum(graph, unit)
        assert_allclose(marginals[number], expected, rtol=0, atol=EXACT)


@settings(deadline=None)
@given(weighted_graphs())
def test_mass_is_conserved(given_graph):
    """What reaches the sources and what leaks is what was put in."""
    graph, weights = given_graph
    assume(graph.normalization != "signed")
    attr = graph.explain(weights)
    assert (attr >= 0).all()
    assert attr.sum() + graph.leaked(weights) == pytest.approx(weights.sum(), abs=EXACT)


@pytest.mark.parametrize("fill", [0.02, 1.0])
def test_mass_is_conserved_in_a_large_graph(fill):
    """600 units with leaking rows conserve mass to 1e-12, sparse and dense."""
    random = np.random.default_rng(1)
    rows = np.tril(random.normal(size=(400, 600)), 199)
    rows *= random.random(rows.shape) < fill
    rows[::50] = -np.abs(rows[::50])
    graph = AttributionGraph.from_rows(rows, 200)
    weights = random.random(400)
    attr, leaked = graph.explain(weights), graph.leaked(weights)
    assert leaked > 0
    total = weights.sum()
    assert (attr.sum() + leaked) / total == pytest.approx(1.0, abs=EXACT)
    assert_allclose(weights @ graph.marginals(), attr, rtol=0, atol=1e-10)


@settings(deadline=None)
@given(weighted_graphs())
def test_throughput_is_the_mass_of_paths_that_reach_a_unit(given_graph):
    """``y[t]`` is the weight of all path heads that end in unit ``t``."""
    graph, weights = given_graph
    matrix = graph.matrix.toarray()[np.ix_(~graph.sources, ~graph.sources)]
    expected = weights.copy()
    for unit in range(graph.n_generated - 1, -1, -1):
        for later in range(unit + 1, graph.n_generated):
            expected[unit] += expected[later] * matrix[later, unit]
    assert_allclose(graph.throughput(weights), expected, rtol=0, atol=EXACT)
    leaked = sum(graph.throughput(weights) * graph.leak)
    assert graph.leaked(weights) == pytest.approx(leaked, abs=EXACT)


def test_a_leaking_row_swallows_what_reaches_it():
    """Mass on a row with nothing positive in it is reported, not hidden."""
    graph = AttributionGraph.from_rows([[-1, 0, 0], [1, 3, 0]], 1)
    assert graph.leak.tolist() == [1.0, 0.0]
    assert graph.explain([0, 1]).tolist() == [0.25]
    assert graph.leaked([0, 1]) == 0.75
    assert graph.leaked([2, 0]) == 2.0


@settings(deadline=None)
@given(weighted_graphs(), PASSES)
def test_hops_enumerate_the_short_paths(given_graph, k):
    """``hops`` sums the paths with at most ``k`` generated units below the first."""
    graph, weights = given_graph
    paths = enumerated_paths(graph, weights)
    short = [path for path in paths if len(path.units) - 2 <= k]
    hops = graph.hops(weights, k)
    assert_allclose(hops.attr, summed(graph, short), rtol=0, atol=EXACT)


@settings(deadline=None)
@given(weighted_graphs(), PASSES)
def test_hops_account_for_all_mass(given_graph, k):
    """Attribution, leak so far and unresolved mass add up to the weights."""
    graph, weights = given_graph
    assume(graph.normalization != "signed")
    attr, unresolved = graph.hops(weights, k)
    total = attr.sum() + graph.leaked(weights, hops=k) + unresolved
    assert total == pytest.approx(weights.sum(), abs=EXACT)


@settings(deadline=None)
@given(weighted_graphs(), PASSES)
def test_unresolved_bounds_the_error_of_hops(given_graph, k):
    """The full answer is within ``unresolved``; nowhere below unless signed."""
    graph, weights = given_graph
    attr, unresolved = graph.hops(weights, k)
    error = graph.explain(weights) - attr
    assert np.abs(error).sum() <= unresolved + EXACT
    if graph.normalization != "signed":
        assert (error >= -EXACT).all()


@settings(deadline=None)
@given(weighted_graphs())
def test_hops_end_in_explain(given_graph):
    """After ``G`` passes nothing is unresolved, and the series is the full answer."""
    graph, weights = given_graph
    hops = graph.hops(weights, graph.n_generated)
    assert isinstance(hops, Hops)
    assert hops.unresolved == 0.0
    assert_allclose(hops.attr, graph.explain(weights), rtol=0, atol=EXACT)
    assert graph.leaked(weights, hops=graph.n_generated) == pytest.approx(
        graph.leaked(weights), abs=EXACT
    )


def test_zero_hops_are_the_direct_rows():
    """``k=0`` multiplies the weights with ``A`` and leaves the rest open."""
    graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
    attr, unresolved = graph.hops([1, 2], 0)
    assert attr.tolist() == [0.5, 1.0]
    assert unresolved == 1.5
    signed = AttributionGraph.from_rows([[-1, 0, 0], [0, -3, 0]], 1, "signed")
    assert signed.hops([0, 1], 0).unresolved == 1.0


@settings(deadline=None)
@given(weighted_graphs(), st.none() | st.integers(0, 7), st.integers(0, 40))
def test_best_paths_are_the_heaviest_of_all(given_graph, source, k):
    """The ``k`` best are the first of all paths sorted by absolute weight."""
    graph, weights = given_graph
    assume(source is None or source < graph.n_sources)
    every = {path.units: path.weight for path in enumerated_paths(graph, weights)}
    if source is not None:
        end = graph.source_units[source]
        every = {units: w for units, w in every.items() if units[-1] == end}
    found = graph.best_paths(weights, source, k)
    assert len(found) == len({path.units for path in found}) == min(k, len(every))
    heaviest = sorted((abs(weight) for weight in every.values()), reverse=True)[:k]
    assert_allclose([abs(path.weight) for path in found], heaviest, rtol=EXACT)
    for path in found:
        assert path.weight == pytest.approx(every[path.units], rel=EXACT)


def test_best_paths_name_units_from_the_explained_one_to_the_source():
    """Units are counted among all units, a source among the sources."""
    rows = [[1, 0, 0, 0], [1, 1, 2, 0]]
    graph = AttributionGraph.from_rows(rows, [True, False, True, False])
    assert graph.best_paths([0, 2], 1, 5) == [Path((3, 2), 1.0)]
    assert graph.best_paths([0, 2], 0, 5) == [Path((3, 0), 0.5), Path((3, 1, 0), 0.5)]
    assert [path.units[-1] for path in graph.best_paths([0, 2], None, 1)] == [2]


def test_signed_paths_keep_their_sign():
    """A path through two negative edges is positive, through one negative."""
    graph = AttributionGraph.from_rows([[-1, 0, 0], [1, -3, 0]], 1, "signed")
    assert graph.best_paths([0, 1], None, 9) == [
        Path((2, 1, 0), 0.75),
        Path((2, 0), 0.25),
    ]
    assert graph.best_paths([1, 0], 0, 9) == [Path((1, 0), -1.0)]


@st.composite
def grouped_graphs(draw):
    """Raw rows and a group label for each unit."""
    rows, sources, normalization = draw(raw_graphs())
    labels = np.empty(sources.size, dtype=int)
    n_sources = int(sources.sum())
    labels[sources] = draw(
        st.lists(st.integers(0, 3), min_size=n_sources, max_size=n_sources)
    )
    steps = draw(arrays(np.bool_, sources.size - n_sources))
    # Rising labels for generated units: their groups do not interleave.
    labels[~sources] = -7 + np.cumsum(steps) * 1000
    labels[~sources & (labels == 0)] = -1
    assume(not set(labels[sources]) & set(labels[~sources]))
    return rows, sources, normalization, labels.tolist()


def slow_coarse(rows, sources, labels):
    """Coarse raw rows and mask, by loops over pairs of groups."""
    groups = {}
    for unit, label in enumerate(labels):
        groups.setdefault(label, []).append(unit)
    members = sorted(groups.values(), key=min)
    mask = [bool(sources[group[0]]) for group in members]
    row_of = {unit: row for row, unit in enumerate(np.flatnonzero(~sources).tolist())}
    coarse = []
    for place, group in enumerate(members):
        if mask[place]:
            continue
        row = [0.0] * len(members)
        for other in range(place):
            for unit in group:
                for column in members[other]:
                    row[other] += rows[row_of[unit]][column]
        coarse.append(row)
    return np.array(coarse).reshape(len(coarse), len(members)), np.array(mask, bool)


@settings(deadline=None)
@given(grouped_graphs(), st.booleans())
def test_coarsen_equals_loops_over_groups(grouped, sparse):
    """Sum raw rows and columns, drop what is inside or later, and normalise again."""
    rows, sources, normalization, labels = grouped
    given_rows = sp.csr_array(rows) if sparse else rows
    graph = AttributionGraph.from_rows(given_rows, sources, normalization)
    coarse = graph.coarsen(labels)
    expected, mask = slow_coarse(rows, sources, labels)
    assert_array_equal(coarse.sources, mask)
    assert sp.issparse(coarse.rows) == sparse
    found = coarse.rows.toarray() if sparse else coarse.rows
    assert_allclose(found, expected, rtol=0, atol=1e-10)
    assert coarse.normalization == normalization
    again = AttributionGraph.from_rows(found, mask, normalization)
    assert_allclose(coarse.matrix.toarray(), again.matrix.toarray(), rtol=0, atol=EXACT)


@settings(deadline=None)
@given(grouped_graphs(), st.randoms())
def test_coarsen_takes_labels_or_members(grouped, random):
    """Labels of units and lists of members in any order give the same graph."""
    rows, sources, normalization, labels = grouped
    graph = AttributionGraph.from_rows(rows, sources, normalization)
    members = {}
    for unit, label in enumerate(labels):
        members.setdefault(label, []).append(unit)
    listed = list(members.values())
    for group in listed:
        random.shuffle(group)
    random.shuffle(listed)
    by_label, by_members = graph.coarsen(np.array(labels)), graph.coarsen(listed)
    assert_array_equal(by_label.rows, by_members.rows)
    assert_array_equal(by_label.sources, by_members.sources)


def test_coarsen_normalises_after_summing():
    """Grouping and normalising do not commute: a large row outweighs a small one."""
    rows = [[9, 0, 0, 0], [0, 1, 0, 0]]
    coarse = AttributionGraph.from_rows(rows, 2).coarsen([0, 1, 2, 2])
    assert coarse.explain([1]).tolist() == [0.9, 0.1]


def test_coarsen_lets_negative_entries_cancel_before_clamping():
    """Raw rows are summed with their signs, then clamped."""
    rows = [[3, 1, 0, 0], [-2, 1, 0, 0]]
    coarse = AttributionGraph.from_rows(rows, 2).coarsen([[0], [1], [2, 3]])
    assert coarse.rows.tolist() == [[1.0, 2.0, 0.0]]


def test_coarsen_drops_a_group_of_sources_that_stands_later():
    """A generated group never depends on a group that begins after it."""
    rows = [[1, 0, 0, 0], [1, 5, 3, 0]]
    graph = AttributionGraph.from_rows(rows, [True, False, True, False])
    coarse = graph.coarsen([0, 1, 2, 1])
    assert coarse.sources.tolist() == [True, False, True]
    assert coarse.rows.tolist() == [[2.0, 0.0, 0.0]]


def test_coarsen_into_single_units_is_the_same_graph():
    """Every unit in a group of its own changes nothing."""
    rows = [[1, -1, 0, 0], [0, 1, 3, 0]]
    graph = AttributionGraph.from_rows(rows, 2, "signed")
    coarse = graph.coarsen(range(4))
    assert_array_equal(coarse.rows, graph.rows)
    assert_array_equal(coarse.matrix.toarray(), graph.matrix.toarray())


ANY_FLOAT = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(raw_graphs(entries=ANY_FLOAT, max_units=5))
def test_huge_and_tiny_entries_are_normalised(raw):
    """No finite entry, however large or small, makes a NaN, an infinity or a leak."""
    rows, _, normalization = raw
    with np.errstate(all="raise", under="ignore"):
        graph = AttributionGraph.from_rows(*raw)
    has_mass = (rows > 0 if normalization == "positive" else rows != 0).any(axis=1)
    assert_array_equal(graph.leak, np.where(has_mass, 0.0, 1.0))
    total = np.abs(graph.matrix.toarray()).sum(axis=1)[~graph.sources]
    assert_allclose(total, has_mass.astype(float), rtol=0, atol=EXACT)
    assert np.isfinite(graph.marginals()).all()


def test_entries_at_the_ends_of_the_float_range_share_rightly():
    """Halves of a row stay halves at 1e308 and at the smallest float."""
    for value in (1e308, 5e-324):
        graph = AttributionGraph.from_rows([[value, value, 0]], 2)
        assert graph.explain([1]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "lil", "dok"])
@pytest.mark.parametrize("kind", ["array", "matrix"])
def test_sparse_rows_of_any_form_are_kept_as_csr(form, kind):
    """Sparse rows give the dense rows' graph and stay sparse, zeros left out."""
    rows = np.array([[1, -2, 0, 0], [0, 1, 3, 0]])
    sparse = getattr(sp, f"{form}_{kind}")(rows)
    graph = AttributionGraph.from_rows(sparse, 2, "signed")
    dense = AttributionGraph.from_rows(rows, 2, "signed")
    assert isinstance(graph.rows, sp.csr_array)
    assert graph.rows.dtype == np.float64
    assert graph.rows.nnz == 4
    assert_array_equal(graph.rows.toarray(), rows)
    assert_array_equal(graph.matrix.toarray(), dense.matrix.toarray())


def test_sparse_rows_with_duplicates_zeros_and_long_indices():
    """Duplicates are summed, explicit zeros dropped, 64-bit indices solved."""
    data = np.array([1.0, 2.0, 0.0, 1.0])
    columns = np.array([1, 1, 3, 0], dtype=np.int64)
    ends = np.array([0, 4], dtype=np.int64)
    sparse = sp.csr_array((data, columns, ends), shape=(1, 4))
    graph = AttributionGraph.from_rows(sparse, 3)
    assert graph.rows.toarray().tolist() == [[1.0, 3.0, 0.0, 0.0]]
    assert graph.rows.nnz == 2
    assert graph.explain([1]).tolist() == [0.25, 0.75, 0.0]
    assert sparse.nnz == 4
    assert graph.matrix.indices.dtype == np.int32


def test_a_graph_is_frozen():
    """Fields cannot be set and arrays cannot be written."""
    graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, 1, 3, 0]], 2)
    with pytest.raises(dataclasses.FrozenInstanceError, match="rows"):
        graph.rows = np.ones((1, 1))
    to_sources, to_generated = graph.blocks()
    for array in (
        graph.rows,
        graph.sources,
        graph.leak,
        graph.kept,
        graph.left_out,
        graph.source_units,
        graph.generated_units,
        graph.matrix.data,
        graph.matrix.indices,
        graph.matrix.indptr,
        to_sources.data,
        to_generated.data,
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize("make", [np.array, sp.csr_array])
def test_the_callers_arrays_stay_the_callers(make):
    """What was passed is neither changed, nor locked, nor seen by the graph later."""
    given_rows = make(np.array([[3.0, -1.0, 0.0]]))
    sources = np.array([True, True, False])
    weights = np.array([1.0])
    graph = AttributionGraph.from_rows(given_rows, sources, "signed")
    graph.explain(weights)
    graph.hops(weights, 1)
    dense = given_rows.toarray() if sp.issparse(given_rows) else given_rows
    assert dense.tolist() == [[3.0, -1.0, 0.0]]
    assert weights.tolist() == [1.0]
    (given_rows.data if sp.issparse(given_rows) else given_rows)[...] = 7.0
    sources[:] = False
    weights[:] = 0.0
    kept = graph.rows.toarray() if sp.issparse(graph.rows) else graph.rows
    assert kept.tolist() == [[3.0, -1.0, 0.0]]
    assert graph.explain([1]).tolist() == [0.75, -0.25]
    assert graph.sources.tolist() == [True, True, False]


def test_answers_belong_to_the_caller():
    """Writing into an answer does not change the next one."""
    graph = AttributionGraph.from_rows([[1, 1, 0]], 2)
    for answer in (graph.marginals, lambda: graph.explain([1])):
        answer()[...] = 7.0
        assert answer().ravel().tolist() == [0.5, 0.5]


@pytest.mark.parametrize("make", [np.array, sp.csr_array])
def test_rows_sources_and_normalization_make_the_same_graph_again(make):
    """These three are all there is to save; a pickled copy is read-only too."""
    rows = make(np.array([[1.0, 2.0, 0, 0], [-1.0, 1.0, 4.0, 0]]))
    graph = AttributionGraph.from_rows(rows, 2, "signed")
    again = AttributionGraph(graph.rows, graph.sources, graph.normalization)
    copied = pickle.loads(pickle.dumps(graph))
    for other in (again, copied, dataclasses.replace(graph)):
        assert_array_equal(other.matrix.toarray(), graph.matrix.toarray())
        assert not other.matrix.data.flags.writeable


@pytest.mark.parametrize(
    ("rows", "sources", "shape"),
    [
        (np.zeros((0, 3)), 3, (0, 3)),
        (np.zeros((0, 0)), 0, (0, 0)),
        (np.zeros((0, 0)), [], (0, 0)),
        (np.zeros((2, 2)), 0, (2, 0)),
        (np.zeros((1, 3)), 2, (1, 2)),
    ],
)
def test_graphs_without_sources_or_rows_answer(rows, sources, shape):
    """The smallest graphs give empty answers, not errors."""
    graph = AttributionGraph.from_rows(rows, sources)
    weights = np.ones(shape[0])
    assert graph.marginals().shape == shape
    assert graph.explain(weights).shape == shape[1:]
    assert graph.leaked(weights) == shape[0]
    assert graph.hops(weights, 0).attr.shape == shape[1:]
    assert graph.best_paths(weights, None, 3) == []
    assert graph.coarsen(range(sum(shape))).marginals().shape == shape


def test_repr_is_one_short_line():
    """The sizes and the normalisation, not the numbers."""
    graph = AttributionGraph.from_rows([[1, 1, 0]], 2, "absolute")
    assert (
        repr(graph)
        == "AttributionGraph(n_sources=2, n_generated=1, normalization='absolute')"
    )


ROWS = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 3.0, 0.0]])


def with_entry(row, unit, value):
    """``ROWS`` with one entry changed."""
    rows = ROWS.copy()
    rows[row, unit] = value
    return rows


@pytest.mark.parametrize("make", [np.array, sp.coo_array])
@pytest.mark.parametrize(
    ("row", "unit", "value", "message"),
    [
        (1, 2, np.nan, r"rows: .*finite, but row 1 \(unit 3\) has a NaN at unit 2\. "),
        (0, 1, np.inf, r"rows: .*finite, but row 0 \(unit 2\) has inf at unit 1\. "),
        (0, 3, -np.inf, r"rows: .*finite, but row 0 \(unit 2\) has -inf at unit 3\. "),
        (0, 2, 0.5, r"rows: must be causal.*row 0 \(unit 2\) has 0\.5 at unit 2\. "),
        (0, 3, -2.0, r"rows: must be causal.*row 0 \(unit 2\) has -2\.0 at unit 3\. "),
        (1, 3, 1.0, r"rows: must be causal.*row 1 \(unit 3\) has 1\.0 at unit 3\. "),
    ],
)
def test_a_bad_entry_is_named(make, row, unit, value, message):
    """The error names the row, its unit and the unit of the entry."""
    with pytest.raises(ValueError, match=message):
        AttributionGraph.from_rows(make(with_entry(row, unit, value)), 2)


def test_units_are_named_by_position_where_sources_stand_between():
    """With a mask, a row's unit is its position among all units."""
    rows = [[1, 0, 0, 0], [1, 0, 0, 1]]
    with pytest.raises(ValueError, match=r"row 1 \(unit 3\) has 1\.0 at unit 3"):
        AttributionGraph.from_rows(rows, [True, False, True, False])


@pytest.mark.parametrize(
    ("rows", "sources", "error", "message"),
    [
        ([1.0, 2.0], 1, ValueError, r"rows: must have shape \(G, N\), but \(2,\) came"),
        (np.ones((1, 1, 1)), 1, ValueError, r"rows: must have shape \(G, N\)"),
        ([[1, 0], [1]], 1, TypeError, r"rows: must be real numbers in rows of equal"),
        ([["a", "b"]], 1, TypeError, r"rows: must be real numbers, but values of type"),
        (ROWS * 1j, 2, TypeError, r"rows: must be real.*complex128 came"),
        (sp.csr_array(ROWS * 1j), 2, TypeError, r"rows: must be real.*complex128 came"),
        (ROWS, 3, ValueError, r"sources: the 2 rows of 4 columns leave 2.*3 came"),
        (ROWS, -1, ValueError, r"sources: must be 0 or more, but -1 came"),
        (ROWS, True, TypeError, r"sources: must be a whole number or a boolean mask"),
        (ROWS, None, TypeError, r"sources: must be a whole.*NoneType None came\. Pass"),
        (ROWS, 2.0, TypeError, r"sources: must be a whole.*float 2\.0 came\. Pass"),
        (ROWS, [0, 1], TypeError, r"sources: must be a whole.*list \[0, 1\] came"),
        (
            ROWS,
            [True] * 3,
            ValueError,
            r"sources: a mask must have shape \(4,\).*\(3,\)",
        ),
        (
            ROWS,
            [True] * 3 + [False],
            ValueError,
            r"sources: the mask must be False for 2 units.*it is False for 1\. ",
        ),
    ],
)
def test_rows_and_sources_must_fit(rows, sources, error, message):
    """Wrong shapes and types say what was expected and what to pass."""
    with pytest.raises(error, match=message):
        AttributionGraph.from_rows(rows, sources)


@pytest.mark.parametrize("normalization", ["softmax", "Positive", None])
def test_an_unknown_normalization_is_refused(normalization):
    """The error lists the three that there are."""
    message = r"normalization: must be one of 'positive', 'absolute', 'signed', but"
    with pytest.raises(ValueError, match=message):
        AttributionGraph.from_rows(ROWS, 2, normalization)


QUESTIONS = {
    "explain": lambda graph, weights: graph.explain(weights),
    "explain_parts": lambda graph, weights: graph.explain_parts(weights),
    "throughput": lambda graph, weights: graph.throughput(weights),
    "throughput_parts": lambda graph, weights: graph.throughput_parts(weights),
    "flow": lambda graph, weights: graph.flow(weights),
    "share_through": lambda graph, weights: graph.share_through(weights, [0]),
    "leaked": lambda graph, weights: graph.leaked(weights),
    "unresolved": lambda graph, weights: graph.unresolved(weights, hops=1),
    "hops": lambda graph, weights: graph.hops(weights, 1),
    "best_paths": lambda graph, weights: graph.best_paths(weights, None, 1),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0], ValueError, r"weights: must have shape \(2,\), but shape \(1,\) came"),
        (1.0, ValueError, r"weights: must have shape \(2,\), but shape \(\) came"),
        (
            [0, np.nan],
            ValueError,
            r"weights: .*finite, but nan came at generated unit 1",
        ),
        (
            [np.inf, 0],
            ValueError,
            r"weights: .*finite, but inf came at generated unit 0",
        ),
        (
            [1, -0.5],
            ValueError,
            r"weights: no entry may be negative, but -0\.5.*Subtract",
        ),
        (["x", "y"], TypeError, r"weights: must be real numbers"),
    ],
)
def test_bad_weights_are_refused(question, weights, error, message):
    """Every question checks its weights in the same words."""
    graph = AttributionGraph.from_rows(ROWS, 2)
    with pytest.raises(error, match=message):
        QUESTIONS[question](graph, weights)


def test_negative_weights_are_for_signed_graphs():
    """A signed graph takes a contrast of units: it is linear in the weights."""
    graph = AttributionGraph.from_rows(ROWS, 2, "signed")
    contrast = graph.explain([0, 1]) - graph.explain([1, 0])
    assert_allclose(graph.explain([-1, 1]), contrast, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (
            lambda g: g.hops([1, 1], -1),
            ValueError,
            r"k: must be 0 or more, but -1 came",
        ),
        (lambda g: g.hops([1, 1], 1.5), TypeError, r"k: must be a whole.*float 1\.5"),
        (lambda g: g.hops([1, 1], True), TypeError, r"k: must be a whole number"),
        (lambda g: g.leaked([1, 1], hops=-1), ValueError, r"hops: must be 0 or more"),
        (lambda g: g.marginals(hops=-1), ValueError, r"hops: must be 0 or more"),
        (lambda g: g.throughput([1, 1], hops=1.0), TypeError, r"hops: must be a whole"),
        (lambda g: g.unresolved([1, 1], hops=-1), ValueError, r"hops: must be 0 or"),
        (lambda g: g.explain_parts([1, 1], hops=-1), ValueError, r"hops: must be 0"),
        (lambda g: g.throughput_parts([1, 1], hops=1.0), TypeError, r"hops: must be"),
        (lambda g: g.marginal_parts(hops=-1), ValueError, r"hops: must be 0 or more"),
        (lambda g: g.share_through([1, 1], [0], hops=-1), ValueError, r"hops: must be"),
        (lambda g: g.best_paths([1, 1], 0, -1), ValueError, r"k: must be 0 or more"),
        (
            lambda g: g.best_paths([1, 1], 2, 1),
            ValueError,
            r"source: must be at least 0 and less than 2, but 2 came\. .*None for any",
        ),
        (
            lambda g: g.best_paths([1, 1], -1, 1),
            ValueError,
            r"source: must be at least",
        ),
        (lambda g: g.best_paths([1, 1], "0", 1), TypeError, r"source: must be a whole"),
    ],
)
def test_numbers_out_of_range_are_refused(ask, error, message):
    """Passes, paths and sources are whole numbers in range."""
    with pytest.raises(error, match=message):
        ask(AttributionGraph.from_rows(ROWS, 2))


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (
            [0, 0, 1],
            ValueError,
            r"groups: there must be one group number for.* 4 units",
        ),
        ([0, 1, 1, 2], ValueError, r"source unit 1 and generated unit 2 are in one"),
        ([[0], [1, 2], [3]], ValueError, r"source unit 1 and generated unit 2 are in"),
        ([[0, 1], [2], [2, 3]], ValueError, r"unit 2 is named in group 1 and again in"),
        (
            [[0, 1], [2]],
            ValueError,
            r"each unit must be in one group, but unit 3 is in",
        ),
        ([[0, 1], [], [2, 3]], ValueError, r"must have a member, but group 1 is empty"),
        ([[0, 1], [2, 4], [3]], ValueError, r"groups\[1\]: .*less than 4, but 4 came"),
        ([[0, 1], [2, 3.0]], TypeError, r"groups\[1\]: must be a whole number"),
        (
            [0, [1], 2, 3],
            TypeError,
            r"groups: must be whole numbers, or lists.*group 0",
        ),
        ([0.0, 0.0, 1.0, 1.0], TypeError, r"groups: must be whole numbers, or lists"),
        ([True, True, False, False], TypeError, r"groups: must be.*group 0 is bool"),
        (4, TypeError, r"groups: must be whole numbers, or lists.*int 4 came"),
    ],
)
def test_groups_must_partition_the_units(groups, error, message):
    """Each unit is in one group, and a group is of one kind."""
    with pytest.raises(error, match=message):
        AttributionGraph.from_rows(ROWS, 2).coarsen(groups)


def test_generated_groups_must_not_interleave():
    """A group that closes around another would depend on what comes after it."""
    graph = AttributionGraph.from_rows(np.zeros((3, 4)), 1)
    message = (
        r"must not interleave, but generated unit 3 is in the group of unit 1, and"
    )
    with pytest.raises(ValueError, match=message):
        graph.coarsen([0, 1, 2, 1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("make", [np.array, sp.csr_array])
def test_sums_beyond_the_float_range_are_refused(make):
    """A group whose raw scores overflow is an error, not a warning."""
    rows = make(np.array([[1e308, 1e308, 0.0]]))
    graph = AttributionGraph.from_rows(rows, 2)
    with pytest.raises(ValueError, match=r"coarsen: .*too large.*Divide all rows by"):
        graph.coarsen([[0, 1], [2]])


# --- approximations ------------------------------------------------------------------


def masses(row, normalization):
    """Mass of each entry of a raw row."""
    return [
        max(entry, 0.0) if normalization == "positive" else abs(entry) for entry in row
    ]


@st.composite
def thinned(draw, rows, normalization):
    """Raw rows of which some entries and whole rows are missing, and what they kept."""
    thin = np.where(draw(each(np.bool_, rows.shape)), rows, 0.0)
    kept = np.ones(len(rows))
    for row, complete in enumerate(rows):
        total = math.fsum(masses(complete, normalization))
        if draw(st.booleans()):
            thin[row] = complete
        elif total > 0:
            kept[row] = math.fsum(masses(thin[row], normalization)) / total
        elif draw(st.booleans()):
            kept[row] = 0.0
        if kept[row] == 0.0:
            thin[row] = 0.0
    return thin, kept


@st.composite
def thinned_graphs(draw):
    """A complete graph, one that lacks entries and rows of it, weights and hops."""
    rows, sources, normalization = draw(raw_graphs())
    thin, kept = draw(thinned(rows, normalization))
    complete = AttributionGraph.from_rows(rows, sources, normalization)
    graph = AttributionGraph.from_rows(thin, sources, normalization, kept=kept)
    weights = draw(weights_of(len(rows), normalization))
    return complete, graph, weights, draw(st.none() | PASSES)


def answer(graph, weights, hops):
    """What a graph says, cut or not."""
    return graph.explain(weights) if hops is None else graph.hops(weights, hops).attr


@settings(deadline=None)
@given(thinned_graphs())
def test_a_row_sums_to_what_it_kept(graphs):
    """Shares are those of the complete row; sum, leak and what is left out make one."""
    complete, graph, _, _ = graphs
    expected = complete.matrix.toarray()
    found = graph.matrix.toarray()
    assert_allclose(found[found != 0], expected[found != 0], rtol=1e-9, atol=EXACT)
    total = np.abs(found).sum(axis=1)[~graph.sources]
    assert_allclose(total + graph.leak + graph.left_out, 1.0, rtol=0, atol=EXACT)
    assert_array_equal(graph.left_out, 1.0 - graph.kept)
    assert set(graph.leak.tolist()) <= {0.0, 1.0}
    assert not graph.leak[graph.kept == 0].any()


@settings(deadline=None)
@given(thinned_graphs())
def test_unresolved_certifies_the_answer_of_the_complete_graph(graphs):
    """Each true score is at least the found one, and all of them exceed it by little.

    In a signed graph, the differences are small in absolute value.
    """
    complete, graph, weights, hops = graphs
    error = complete.explain(weights) - answer(graph, weights, hops)
    unresolved = graph.unresolved(weights, hops=hops)
    assert unresolved >= 0
    assert np.abs(error).sum() <= unresolved + EXACT
    if graph.normalization != "signed":
        assert (error >= -EXACT).all()


@settings(deadline=None)
@given(thinned_graphs())
def test_mass_is_conserved_by_an_approximation(graphs):
    """What reaches sources, what leaks and what is unresolved is what was put in."""
    _, graph, weights, hops = graphs
    assume(graph.normalization != "signed")
    total = answer(graph, weights, hops).sum() + graph.leaked(weights, hops=hops)
    total += graph.unresolved(weights, hops=hops)
    assert total == pytest.approx(weights.sum(), abs=EXACT)


@settings(deadline=None)
@given(thinned_graphs())
def test_unresolved_is_the_left_out_mass_of_paths(graphs):
    """Per unit: the mass of all path heads that end there, times what its row lacks."""
    _, graph, weights, hops = graphs
    lower = graph.matrix.toarray()[np.ix_(~graph.sources, ~graph.sources)]
    last = graph.n_generated if hops is None else hops
    powers = [np.linalg.matrix_power(lower.T, i) @ weights for i in range(last + 2)]
    through = np.sum(powers[: last + 1], axis=0)
    assert_allclose(graph.throughput(weights, hops=hops), through, rtol=0, atol=EXACT)
    expected = np.abs(through) @ graph.left_out + np.abs(powers[last + 1]).sum()
    found = graph.unresolved(weights, hops=hops)
    assert found == pytest.approx(expected, abs=EXACT)
    if hops is not None:
        assert graph.hops(weights, hops).unresolved == found


@settings(deadline=None)
@given(thinned_graphs(), PASSES)
def test_cut_marginals_are_the_hops_of_each_row(graphs, hops):
    """Row ``t`` of the cut series is the cut answer for unit ``t`` alone."""
    _, graph, _, _ = graphs
    found = graph.marginals(hops=hops)
    assert found.shape == (graph.n_generated, graph.n_sources)
    for row, weights in zip(found, np.eye(graph.n_generated), strict=True):
        expected = graph.hops(weights, hops).attr
        assert_allclose(row, expected, rtol=0, atol=EXACT)


def test_a_complete_graph_leaves_nothing_open():
    """Without a word about it every row is complete, and unresolved is exactly 0."""
    graph = AttributionGraph.from_rows([[1, 1, 0, 0], [0, -1, 0, 0]], 2)
    assert graph.kept.tolist() == [1.0, 1.0]
    assert graph.left_out.tolist() == [0.0, 0.0]
    assert graph.leak.tolist() == [0.0, 1.0]
    assert graph.unresolved([1, 1]) == 0.0


def test_a_row_that_was_not_computed_does_not_leak():
    """Its mass may go anywhere: it is left out."""
    graph = AttributionGraph(
        np.array([[0, 0, 0], [1.0, 3, 0]]), [True, False, False], "positive", [0, 1]
    )
    assert graph.leak.tolist() == [0.0, 0.0]
    assert graph.left_out.tolist() == [1.0, 0.0]
    assert graph.explain([0, 1]).tolist() == [0.25]
    assert (graph.leaked([0, 1]), graph.unresolved([0, 1])) == (0.0, 0.75)


@st.composite
def whole_graphs(draw):
    """Raw graphs of whole numbers, and a dyadic share: sums of them are exact."""
    entries = st.integers(-5, 5).map(float)
    return draw(raw_graphs(entries=entries)), draw(st.integers(1, 16)) / 16


@settings(deadline=None)
@given(whole_graphs(), st.booleans())
def test_sparsified_keeps_the_heaviest_entries_of_each_row(graph_and_share, sparse):
    """Take entries by falling mass, then by unit, until the share is held."""
    (rows, sources, normalization), share = graph_and_share
    given_rows = sp.csr_array(rows) if sparse else rows
    found = AttributionGraph.from_rows(given_rows, sources, normalization).sparsified(
        share
    )
    assert isinstance(found.rows, sp.csr_array)
    for number, row in enumerate(rows):
        mass = masses(row, normalization)
        expected = np.zeros(len(row))
        held = 0.0
        for unit in sorted(range(len(row)), key=lambda unit: (-mass[unit], unit)):
            if mass[unit] > 0 and held < share * sum(mass):
                expected[unit] = row[unit]
                held += mass[unit]
        assert_array_equal(found.rows.toarray()[number], expected)
        kept = held / sum(mass) if sum(mass) else 1.0
        assert found.kept[number] == pytest.approx(kept, abs=EXACT)


@settings(deadline=None)
@given(weighted_graphs(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_sparsified_graphs_certify_the_graph_they_come_from(given_graph, first, second):
    """Once or twice: what was dropped is counted, never shared out to the others."""
    graph, weights = given_graph
    once = graph.sparsified(first)
    for cut in (once, once.sparsified(second)):
        error = graph.explain(weights) - cut.explain(weights)
        assert np.abs(error).sum() <= cut.unresolved(weights) + EXACT
        if graph.normalization != "signed":
            assert (error >= -EXACT).all()
            total = cut.explain(weights).sum() + cut.leaked(weights)
            total += cut.unresolved(weights)
            assert total == pytest.approx(weights.sum(), abs=EXACT)


@settings(deadline=None)
@given(raw_graphs(entries=ANY_FLOAT, max_units=5))
def test_sparsified_by_share_one_is_the_same_graph(raw):
    """Every entry with a share stays, however small; the others are dropped."""
    rows, sources, _ = raw
    graph = AttributionGraph.from_rows(*raw)
    whole = graph.sparsified(1)
    assert_array_equal(whole.matrix.toarray(), graph.matrix.toarray())
    assert_array_equal(whole.kept, graph.kept)
    assert_array_equal(whole.leak, graph.leak)
    expected = np.where(graph.matrix.toarray()[~sources] != 0, rows, 0.0)
    assert_array_equal(whole.rows.toarray(), expected)


@settings(deadline=None)
@given(raw_graphs(), st.none() | st.floats(0.01, 1))
def test_rows_may_come_one_at_a_time(raw, share):
    """An iterator of rows gives the graph of the array, cut as it comes or not."""
    rows, sources, normalization = raw
    whole = AttributionGraph.from_rows(*raw, sparsify=share)
    lazy = AttributionGraph.from_rows(
        (row.tolist() for row in rows), sources, normalization, sparsify=share
    )
    assert isinstance(lazy.rows, sp.csr_array)
    assert_array_equal(lazy.matrix.toarray(), whole.matrix.toarray())
    assert_array_equal(lazy.kept, whole.kept)
    assert_array_equal(lazy.leak, whole.leak)
    whole_rows = whole.rows if share is None else whole.rows.toarray()
    assert_array_equal(lazy.rows.toarray(), whole_rows)


@pytest.mark.parametrize("wrap", [iter, list, tuple])
def test_none_is_a_row_that_was_not_computed(wrap):
    """Among the rows of an iterator, a list or a tuple."""
    rows = wrap([None, [0, 1, 3, 0, 0], None])
    graph = AttributionGraph.from_rows(rows, 2)
    assert graph.kept.tolist() == [0.0, 1.0, 0.0]
    assert graph.rows.toarray().tolist() == [[0] * 5, [0, 1, 3, 0, 0], [0] * 5]


@pytest.mark.parametrize("sources", [2, [True, False, True, False]])
def test_all_rows_may_be_missing(sources):
    """The sources and the number of rows say how many units there are."""
    graph = AttributionGraph.from_rows([None, None], sources)
    assert (graph.n_units, graph.n_sources) == (4, 2)
    assert graph.unresolved([1, 2]) == 3.0


def test_an_empty_iterator_is_a_graph_without_rows():
    """As an array of shape (0, P) is."""
    graph = AttributionGraph.from_rows(iter([]), 3)
    assert (graph.n_generated, graph.n_sources) == (0, 3)


def test_an_iterator_s_rows_are_checked_before_they_are_cut():
    """A late entry is an error even where the cut would drop it."""
    with pytest.raises(
        ValueError, match=r"causal.*row 1 \(unit 3\) has 0\.1 at unit 3"
    ):
        AttributionGraph.from_rows(
            iter([[1, 0, 0, 0], [9, 0, 0, 0.1]]),
            [True, False, True, False],
            sparsify=0.5,
        )


def test_what_rows_kept_and_what_they_keep_multiply():
    """``kept`` of rows that were cut before, and ``sparsify`` now."""
    rows = [[3, 1, 0, 0], [0, 0, 0, 0]]
    for form in (rows, iter(rows)):
        graph = AttributionGraph.from_rows(form, 2, kept=[0.5, 0], sparsify=0.7)
        assert graph.kept.tolist() == [0.375, 0.0]
        assert graph.matrix.toarray()[2:].tolist() == [[0.375, 0, 0, 0], [0] * 4]
    graph = AttributionGraph.from_rows([rows[0], None], 2, kept=[0.5, 0])
    assert graph.left_out.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("make", [np.array, sp.csr_array])
def test_an_approximation_is_copied_and_pickled_with_what_it_kept(make):
    """The four fields that are given make the same graph again."""
    rows = make(np.array([[1.0, 2.0, 0, 0], [0.0, 0.0, 0.0, 0]]))
    graph = AttributionGraph.from_rows(rows, 2, kept=[0.25, 0])
    again = AttributionGraph(graph.rows, graph.sources, "positive", graph.kept)
    for other in (again, pickle.loads(pickle.dumps(graph)), dataclasses.replace(graph)):
        assert_array_equal(other.matrix.toarray(), graph.matrix.toarray())
        assert other.kept.tolist() == [0.25, 0.0]
        assert not other.kept.flags.writeable


def test_repr_of_an_approximation_says_how_much_is_left_out():
    """The sum over the rows, in rows."""
    graph = AttributionGraph.from_rows(ROWS, 2).sparsified(0.5)
    assert repr(graph) == (
        "AttributionGraph(n_sources=2, n_generated=2, normalization='positive', "
        "left_out=0.75)"
    )


def test_coarsen_takes_complete_rows_only():
    """What was dropped of the raw rows cannot be grouped any more."""
    graph = AttributionGraph.from_rows(ROWS, 2)
    assert graph.sparsified(1).coarsen([0, 0, 1, 2]).n_units == 3
    message = (
        r"coarsen: every row must be complete.*row 1 \(unit 3\) lacks 0\.25.*sparsify"
    )
    partial = AttributionGraph.from_rows(ROWS, 2, kept=[1, 0.75])
    with pytest.raises(ValueError, match=message):
        partial.coarsen([0, 0, 1, 2])


NO_ROW = np.array([[0.0] * 4, [0.0, -1.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("rows", "kept", "error", "message"),
    [
        (ROWS, [1], ValueError, r"kept: must have shape \(2,\), but shape \(1,\) came"),
        (
            ROWS,
            [1, 1.5],
            ValueError,
            r"kept: .*at most 1, but 1\.5 came at gen.* unit 1",
        ),
        (
            ROWS,
            [-0.5, 1],
            ValueError,
            r"kept: .*at least 0.*-0\.5 came at gen.* unit 0",
        ),
        (ROWS, [np.nan, 1], ValueError, r"kept: every entry must be finite, but nan"),
        (ROWS, ["x", 1], TypeError, r"kept: must be real numbers"),
        (
            ROWS,
            [1, 0],
            ValueError,
            r"^kept: .*no entries, but row 1 \(unit 3\) has 2\. Pass the",
        ),
        (
            NO_ROW,
            [0.5, 1],
            ValueError,
            r"must have mass, but row 0 \(unit 2\) has none",
        ),
        (
            NO_ROW,
            [0, 0.5],
            ValueError,
            r"must have mass, but row 1 \(unit 3\) has none",
        ),
        (
            [None, [1, 0, 0, 0]],
            [1, 1],
            ValueError,
            r"row that is None, but 1\.0 came at",
        ),
        (
            iter([[1, 0], [1, 0, 0]]),
            None,
            ValueError,
            r"rows\[1\]: must have shape \(2,",
        ),
        (
            iter([ROWS]),
            None,
            ValueError,
            r"rows\[0\]: must have shape \(8,\).*\(2, 4\)",
        ),
        (iter([["a"]]), None, TypeError, r"rows\[0\]: must be real numbers"),
        (
            iter([[1, 0, 0, 0], [np.nan, 0, 0, 0]]),
            None,
            ValueError,
            r"rows: .*finite, but row 1 \(unit 3\) has a NaN at unit 0\. ",
        ),
        (
            iter(ROWS[:, :3]),
            None,
            ValueError,
            r"sources: the 2 rows of 3 columns leave",
        ),
    ],
)
def test_rows_and_what_they_kept_must_fit(rows, kept, error, message):
    """Errors name the row, what came and what to pass."""
    with pytest.raises(error, match=message):
        AttributionGraph.from_rows(rows, 2, kept=kept)


@pytest.mark.parametrize(
    ("share", "error"),
    [
        (0, ValueError),
        (1.5, ValueError),
        (np.nan, ValueError),
        ("x", TypeError),
        (True, TypeError),
    ],
)
def test_a_share_to_keep_is_above_zero_and_at_most_one(share, error):
    """In words that name the argument, before any row is taken."""
    with pytest.raises(error, match=r"share: must be above 0 and at most 1, but .*99%"):
        AttributionGraph.from_rows(ROWS, 2).sparsified(share)
    untouched = iter(ROWS)
    with pytest.raises(error, match=r"sparsify: must be above 0 and at most 1, but"):
        AttributionGraph.from_rows(untouched, 2, sparsify=share)
    assert len(list(untouched)) == 2


@pytest.mark.parametrize("sources", [-1, "x", [0, 1]])
def test_sources_are_checked_for_an_iterator_too(sources):
    """A negative number and what is no mask."""
    with pytest.raises((TypeError, ValueError), match=r"sources: must be"):
        AttributionGraph.from_rows(iter(ROWS), sources)


def test_a_long_graph_never_needs_a_dense_array():
    """8,000 generated units in far less memory than their dense rows (0.5 GB)."""
    n_sources, n_generated = 100, 8_000
    weight = 0.9 ** np.arange(300)[::-1]

    def rows():
        for own in range(n_sources, n_sources + n_generated):
            row = np.zeros(n_sources + n_generated)
            row[max(own - 300, 0) : own] = weight[-min(own, 300) :]
            row[own % n_sources] += 2.0
            yield row

    tracemalloc.start()
    graph = AttributionGraph.from_rows(rows(), n_sources, sparsify=0.95)
    weights = np.zeros(n_generated)
    weights[-20:] = 1.0
    attr, unresolved = graph.explain(weights), graph.unresolved(weights)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert graph.rows.nnz < 30 * n_generated
    assert (graph.kept >= 0.95).all()
    assert 0 < unresolved < 20
    assert attr.sum() + unresolved == pytest.approx(20.0)


# --- positive and negative mass, shares through units, rows behind -------------------

# No product of these is below the smallest float.
APART = st.integers(-5, 9).map(float) | st.floats(0.001, 10)


@dataclasses.dataclass
class Case:
    """A graph with rows behind some of its rows, and all that it stands for."""

    graph: AttributionGraph
    complete: AttributionGraph  # with all entries of all rows
    first: Any  # the graph by which paths start, (N, N), and that behind it
    later: Any
    rows: Any  # raw rows that are known, those behind, what they kept, which differ
    plain: Any
    kept: Any
    plain_kept: Any
    differ: Any
    weights: Any
    hops: int | None

    def heads(self, weights=None):
        """Every path from an explained unit, also where it goes on, and its weight.

        With the number of generated units that it passes through below the first.
        """
        graph = self.graph
        weights = self.weights if weights is None else weights
        starts = zip(graph.generated_units.tolist(), weights.tolist(), strict=True)
        found = [((unit,), weight) for unit, weight in starts if weight != 0]
        for units, weight in found:
            if not graph.sources[units[-1]]:
                row = (self.first if len(units) == 1 else self.later)[units[-1]]
                found += [
                    ((*units, other), weight * float(row[other]))
                    for other in range(units[-1])
                    if row[other] != 0
                ]
        return [
            (units, weight, len(units) - 1 - int(graph.sources[units[-1]]))
            for units, weight in found
        ]

    def within(self, hops, weights=None):
        """Those that a cut leaves."""
        return [h for h in self.heads(weights) if hops is None or h[2] <= hops]

    def at_units(self, heads):
        """Their mass by the unit at which they end, shape (N,)."""
        mass = np.zeros(self.graph.n_units)
        for units, weight, _ in heads:
            mass[units[-1]] += weight
        return mass


def share_matrix(rows, sources, normalization, kept):
    """The graph of rows that hold a part of their mass, entry by entry."""
    matrix = slow_matrix(rows, sources, normalization)
    matrix[~np.asarray(sources)] *= np.asarray(kept)[:, None]
    return matrix


@st.composite
def cases(draw, complete=False):
    """Graphs in which some rows, of which some is missing, have others behind them."""
    sources = draw(source_masks(7))
    own = np.flatnonzero(~sources)
    rows, plain = draw(each(np.float64, (2, own.size, sources.size), APART))
    normalization = draw(st.sampled_from(NORMALIZATIONS))
    for raw in (rows, plain):
        raw[np.arange(sources.size) >= own[:, None]] = 0.0
        raw[draw(each(np.int8, own.size, st.integers(0, 9))) == 0] = 0.0
    differ = draw(each(np.bool_, own.size))
    plain = np.where(differ[:, None], plain, rows)
    whole = AttributionGraph.from_rows(
        rows,
        sources,
        normalization,
        behind={step: plain[step] for step in np.flatnonzero(differ).tolist()},
    )
    kept = plain_kept = np.ones(own.size)
    graph = whole
    if not complete and draw(st.booleans()):
        rows, kept = draw(thinned(rows, normalization))
        plain, plain_kept = draw(thinned(plain, normalization))
        plain = np.where(differ[:, None], plain, rows)
        plain_kept = np.where(differ, plain_kept, kept)
        steps = np.flatnonzero(differ)
        behind = RowsBehind(steps, sp.csr_array(plain[steps]), plain_kept[steps])
        graph = AttributionGraph.from_rows(
            rows, sources, normalization, kept=kept, behind=behind
        )
    weight = st.just(0.0) | st.floats(0.001, 1)
    if normalization == "signed":
        weight |= st.floats(-1, -0.001)
    return Case(
        graph,
        whole,
        share_matrix(rows, sources, normalization, kept),
        share_matrix(plain, sources, normalization, plain_kept),
        rows,
        plain,
        kept,
        plain_kept,
        differ,
        draw(each(np.float64, own.size, weight)),
        draw(st.none() | PASSES),
    )


@settings(deadline=None)
@given(cases())
def test_paths_start_by_rows_and_go_on_by_rows_behind(case):
    """Answer, throughput, leak and what is left open, from the list of all paths."""
    graph, weights, hops = case.graph, case.weights, case.hops
    mass = case.at_units(case.within(hops))
    through = mass[graph.generated_units]
    found = answer(graph, weights, hops)
    assert_allclose(found, mass[graph.source_units], rtol=0, atol=EXACT)
    assert_allclose(graph.throughput(weights, hops=hops), through, rtol=0, atol=EXACT)
    # What passes goes on by the row behind, a weight by its own row.
    passing = np.where(case.differ, through - weights, through)
    own = np.where(case.differ, weights, 0.0)
    leak, leak_behind = (
        (kept == 1) & (np.abs(matrix[graph.generated_units]).sum(axis=1) == 0)
        for kept, matrix in ((case.kept, case.first), (case.plain_kept, case.later))
    )
    assert_array_equal(graph.leak, leak)
    assert_array_equal(graph.leak_behind, leak_behind)
    assert_array_equal(graph.left_out, 1.0 - case.kept)
    assert_array_equal(graph.left_out_behind, 1.0 - case.plain_kept)
    leaked = passing @ leak_behind + own @ leak
    assert graph.leaked(weights, hops=hops) == pytest.approx(leaked, abs=EXACT)
    last = graph.n_generated if hops is None else hops
    beyond = case.at_units(h for h in case.heads() if h[2] == last + 1)
    unresolved = (
        np.abs(passing) @ (1 - case.plain_kept)
        + np.abs(own) @ (1 - case.kept)
        + np.abs(beyond[graph.generated_units]).sum()
    )
    found = graph.unresolved(weights, hops=hops)
    assert found == pytest.approx(unresolved, abs=EXACT)
    if hops is not None:
        assert graph.hops(weights, hops).unresolved == found


@settings(deadline=None)
@given(cases())
def test_marginals_start_by_rows_and_go_on_by_rows_behind(case):
    """Row ``t`` enumerates the paths from ``t``, cut after any number of passes."""
    graph = case.graph
    for hops in (None, *range(graph.n_generated + 1)):
        found = graph.marginals(hops=hops)
        assert found.shape == (graph.n_generated, graph.n_sources)
        for row, weights in zip(found, np.eye(len(found)), strict=True):
            expected = case.at_units(case.within(hops, weights))
            assert_allclose(row, expected[graph.source_units], rtol=0, atol=EXACT)


@settings(deadline=None)
@given(cases())
def test_blocks_are_the_rows_and_those_behind(case):
    """``blocks`` has the rows by which paths start, ``matrix`` those behind them."""
    graph = case.graph
    generated = graph.generated_units
    for blocks, matrix, rows in (
        (graph.blocks(), case.first, graph.normalized()),
        (graph.blocks_behind(), case.later, graph.normalized(behind=True)),
    ):
        assert_allclose(rows.toarray(), matrix[generated], rtol=0, atol=EXACT)
        to_sources, to_generated = blocks
        expected = matrix[generated][:, graph.source_units]
        assert_allclose(to_sources.toarray(), expected, rtol=0, atol=EXACT)
        expected = matrix[np.ix_(generated, generated)]
        assert_allclose(to_generated.toarray(), expected, rtol=0, atol=EXACT)
    assert_allclose(graph.matrix.toarray(), case.later, rtol=0, atol=EXACT)


@settings(deadline=None)
@given(cases())
def test_unresolved_certifies_an_answer_with_rows_behind(case):
    """The answer of complete rows and complete rows behind is as near as it says."""
    error = case.complete.explain(case.weights)
    error = error - answer(case.graph, case.weights, case.hops)
    unresolved = case.graph.unresolved(case.weights, hops=case.hops)
    assert np.abs(error).sum() <= unresolved + EXACT
    if case.graph.normalization != "signed":
        assert (error >= -EXACT).all()
        total = answer(case.graph, case.weights, case.hops).sum() + unresolved
        total += case.graph.leaked(case.weights, hops=case.hops)
        assert total == pytest.approx(case.weights.sum(), abs=EXACT)


@settings(deadline=None)
@given(cases(), st.none() | st.integers(0, 6), st.integers(0, 40))
def test_best_paths_with_rows_behind_are_the_heaviest_of_all(case, source, k):
    """A unit that is explained and passed through uses each row in its place."""
    graph = case.graph
    assume(source is None or source < graph.n_sources)
    ends = graph.source_units if source is None else graph.source_units[[source]]
    every = {units: weight for units, weight, _ in case.heads() if units[-1] in ends}
    found = graph.best_paths(case.weights, source, k)
    assert len(found) == len({path.units for path in found}) == min(k, len(every))
    heaviest = sorted((abs(weight) for weight in every.values()), reverse=True)[:k]
    assert_allclose([abs(path.weight) for path in found], heaviest, rtol=EXACT)
    for path in found:
        assert path.weight == pytest.approx(every[path.units], rel=EXACT)


def test_equal_paths_keep_their_order_with_rows_behind():
    """The shorter first, then the lexicographically smaller, whichever row it takes."""
    rows = [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    for replaced in ({}, {0: None}, {1: None}, {2: None}, {0: None, 2: None}):
        graph = AttributionGraph.from_rows(rows, 1, behind=replaced)
        found = graph.best_paths([1, 1, 2], None, 9)
        passing = [] if 0 in replaced else [(3, 1, 0)]
        assert [path.units for path in found] == [(1, 0), (2, 0), (3, 0), *passing]
        assert {path.weight for path in found} == {1.0}


def test_marginals_cut_a_first_row_and_what_is_behind_it():
    """By hand: each pass adds one unit of a chain, whatever the rows behind are."""
    rows = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    behind = {2: [0, 0, 1, 0, 0], 3: None}
    graph = AttributionGraph.from_rows(rows, 1, "positive", behind=behind)
    for hops, last_rows in enumerate([[0, 0], [0.5, 0], [1, 0], [1, 1], [1, 1]]):
        expected = [1, float(hops > 0), *last_rows]
        assert graph.marginals(hops=hops).ravel().tolist() == expected
    assert graph.marginals().ravel().tolist() == [1, 1, 1, 1]


def test_a_unit_that_is_explained_and_passed_through_uses_each_row_in_its_place():
    """By hand: a quarter by its own row, three quarters by the row behind."""
    rows, plain = [[0, 1, 0, 0], [0, 1, 3, 0]], {0: [1, 0, 0, 0]}
    graph = AttributionGraph.from_rows(rows, 2, behind=plain)
    assert graph.explain([1, 1]).tolist() == [0.75, 1.25]
    assert graph.throughput([1, 1]).tolist() == [1.75, 1.0]
    assert graph.hops([1, 1], 0).attr.tolist() == [0.0, 1.25]
    assert graph.hops([1, 1], 0).unresolved == 0.75
    assert graph.marginals().tolist() == [[0.0, 1.0], [0.75, 0.25]]
    assert graph.marginals(hops=0).tolist() == [[0.0, 1.0], [0.0, 0.25]]
    assert graph.best_paths([1, 1], None, 9) == [
        Path((2, 1), 1.0),
        Path((3, 2, 0), 0.75),
        Path((3, 1), 0.25),
    ]
    assert graph.share_through([1, 1], [2]) == 0.875
    assert graph.share_through([1, 1], [0]) == 0.375


@settings(deadline=None)
@given(cases())
def test_parts_are_the_paths_of_either_sign(case):
    """Paths of positive weight, and those of negative weight in absolute value."""
    graph, weights, hops = case.graph, case.weights, case.hops
    heads = case.within(hops)
    expected = [
        case.at_units((units, max(sign * weight, 0.0), n) for units, weight, n in heads)
        for sign in (1, -1)
    ]
    explained = graph.explain_parts(weights, hops=hops)
    through = graph.throughput_parts(weights, hops=hops)
    for parts, units in (
        (explained, graph.source_units),
        (through, graph.generated_units),
    ):
        assert isinstance(parts, Parts)
        for part, mass in zip(parts, expected, strict=True):
            assert_allclose(part, mass[units], rtol=0, atol=EXACT)
            assert (part >= 0).all()
            # What no path reaches by rounding, none reaches.
            assert not part[mass[units] == 0].any()
    net = graph.throughput(weights, hops=hops)
    assert_allclose(through.positive - through.negative, net, rtol=0, atol=EXACT)
    net = answer(graph, weights, hops)
    assert_allclose(explained.positive - explained.negative, net, rtol=0, atol=EXACT)
    if graph.normalization != "signed":
        assert_array_equal(explained.positive, net)
        assert not explained.negative.any()
        assert not through.negative.any()


def test_a_first_row_below_zero_is_negative_mass():
    """Its sign is that of all paths which start by it."""
    rows, plain = [[1, 0, 0], [0, -1, 0]], {1: [1, 0, 0]}
    graph = AttributionGraph.from_rows(rows, 1, "signed", behind=plain)
    for parts, expected in (
        (graph.explain_parts([0, 1]), ([0.0], [1.0])),
        (graph.throughput_parts([0, 1]), ([0.0, 1.0], [1.0, 0.0])),
        (graph.marginal_parts(), ([[1.0], [0.0]], [[0.0], [1.0]])),
    ):
        assert tuple(part.tolist() for part in parts) == expected


@settings(deadline=None)
@given(cases())
def test_marginal_parts_are_the_parts_of_each_row(case):
    """Row ``t`` holds the parts of unit ``t`` alone."""
    graph, hops = case.graph, case.hops
    parts = graph.marginal_parts(hops=hops)
    assert parts.positive.shape == parts.negative.shape
    assert parts.positive.shape == (graph.n_generated, graph.n_sources)
    for row, weights in enumerate(np.eye(graph.n_generated)):
        expected = graph.explain_parts(weights, hops=hops)
        assert_allclose(parts.positive[row], expected.positive, rtol=0, atol=EXACT)
        assert_allclose(parts.negative[row], expected.negative, rtol=0, atol=EXACT)
    assert all((part >= 0).all() for part in parts)
    if graph.normalization != "signed":
        assert_array_equal(parts.positive, graph.marginals(hops=hops))
        assert not parts.negative.any()


@pytest.mark.parametrize("rows_of_dense", [0, 10**6])
@pytest.mark.parametrize("fill", [0.05, 1.0])
def test_a_part_that_no_path_brings_is_exactly_zero(rows_of_dense, fill, monkeypatch):
    """Also in a large graph, by either solve, where everything is rounded.

    Units have a colour each, and an edge is negative between two colours: so all paths
    between two units have one sign.
    """
    monkeypatch.setattr(solve, "DENSE_ROWS", rows_of_dense)
    monkeypatch.setattr(solve, "DENSE_ENTRIES", rows_of_dense**2)
    random = np.random.default_rng(3)
    colour = random.choice([-1.0, 1.0], size=500)
    rows = np.tril(random.random((400, 500)), 99) * (random.random((400, 500)) < fill)
    rows *= colour[100:, None] * colour
    graph = AttributionGraph.from_rows(rows, 100, "signed")
    weights = random.random(400) * colour[100:]
    explained, through = graph.explain_parts(weights), graph.throughput_parts(weights)
    assert not explained.negative[colour[:100] > 0].any()
    assert not explained.positive[colour[:100] < 0].any()
    assert not through.negative[colour[100:] > 0].any()
    assert not through.positive[colour[100:] < 0].any()
    marginal = graph.marginal_parts()
    same = colour[100:, None] == colour[:100]
    assert not marginal.negative[same].any()
    assert not marginal.positive[~same].any()
    total = np.sum(explained)
    assert total == pytest.approx(np.abs(weights).sum() - graph.leak @ through.positive)


@settings(deadline=None)
@given(cases(), st.data())
def test_share_through_is_the_mass_of_paths_that_visit_a_unit(case, data):
    """Of all paths, whatever becomes of them later; in absolute values if signed."""
    graph, weights, hops = case.graph, case.weights, case.hops
    mask = data.draw(each(np.bool_, graph.n_units))
    # A path arrives where no unit before it is one of those that are given.
    visiting = sum(
        abs(weight)
        for units, weight, _ in case.within(hops)
        if mask[units[-1]] and not mask[list(units[:-1])].any()
    )
    total = np.abs(weights).sum()
    expected = visiting / total if total else 0.0
    found = graph.share_through(weights, mask, hops=hops)
    assert isinstance(found, float)
    assert 0.0 <= found <= 1.0
    assert found == pytest.approx(expected, abs=EXACT)
    units = data.draw(st.permutations(np.flatnonzero(mask).tolist() * 2))
    assert graph.share_through(weights, units, hops=hops) == found


@settings(deadline=None)
@given(cases())
def test_share_through_adds_up_with_the_answers(case):
    """A single unit's share is its throughput, or its attribution, of the mass."""
    assume(case.graph.normalization != "signed")
    assume(case.weights.any())
    graph, weights, total = case.graph, case.weights, case.weights.sum()
    for units, mass in (
        (graph.generated_units, graph.throughput(weights)),
        (graph.source_units, graph.explain(weights)),
    ):
        for unit, expected in zip(units, mass, strict=True):
            found = graph.share_through(weights, [unit])
            assert found == pytest.approx(expected / total, abs=EXACT)
    assert graph.share_through(weights, graph.generated_units) == 1.0


def test_share_through_counts_a_path_once_and_leaks_behind_a_visit():
    """A visit counts although the path leaks later; a leak before it does not."""
    rows = [[1, 0, 0, 0], [-1, 0, 0, 0], [1, 1, 2, 0]]
    graph = AttributionGraph.from_rows(rows, 1)
    assert graph.share_through([0, 0, 1], [2]) == 0.5
    assert graph.share_through([0, 0, 1], [0]) == 0.5
    assert graph.share_through([0, 0, 1], [1, 0]) == 0.5
    assert graph.share_through([0, 0, 2], [1, 2]) == 0.75
    assert graph.share_through([0, 0, 1], [1, 0], hops=0) == 0.25
    assert graph.share_through([0, 0, 0], [0]) == 0.0
    assert graph.share_through([0, 0, 1], []) == 0.0


def test_share_through_never_exceeds_one():
    """What is explained ends in the sources wholly, however it is rounded."""
    for seed in range(50):
        random = np.random.default_rng(seed)
        graph = AttributionGraph.from_rows(np.tril(random.random((9, 20)), 10), 11)
        share = graph.share_through(random.random(9), range(11))
        assert share == pytest.approx(1.0, abs=EXACT)
        assert share <= 1.0


def test_share_through_of_signed_mass_does_not_cancel():
    """Two paths of opposite sign are two paths; their sum is nothing."""
    rows = [[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 1, 0]]
    graph = AttributionGraph.from_rows(rows, 1, "signed")
    assert graph.explain([0, 0, 1]).tolist() == [0.0]
    assert graph.share_through([0, 0, 1], [0]) == 1.0
    assert graph.share_through([-1, 0, 1], [2]) == 0.25


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        (2, TypeError, r"units: must be a list of whole.*int 2 came\. Pass a list"),
        (None, TypeError, r"units: must be a list of whole numbers or a boolean"),
        ([0.0], TypeError, r"units: must be a list of whole.*list \[0\.0\] came"),
        ([[0], [1, 2]], TypeError, r"units: must be a list of whole numbers"),
        ([[0, 1]], TypeError, r"units: must be a list of whole numbers"),
        ([4], ValueError, r"units: must be at least 0 and less than 4, but 4 came"),
        ([0, -1], ValueError, r"units: must be at least 0 and less than 4, but -1"),
        ([True], ValueError, r"units: a mask must have shape \(4,\).*\(1,\) came"),
    ],
)
def test_units_to_visit_must_be_units(units, error, message):
    """Indices of units that there are, or a mask that fits."""
    with pytest.raises(error, match=message):
        AttributionGraph.from_rows(ROWS, 2).share_through([1, 1], units)


@pytest.mark.parametrize("make", [np.array, sp.csr_array])
@settings(deadline=None)
@given(case=cases(complete=True))
def test_rows_behind_come_in_several_forms(make, case):
    """Those that differ by their position, or all of them, dense or sparse."""
    rows, sources, differ = make(case.rows), case.graph.sources, case.differ
    steps = np.flatnonzero(differ)
    normalization = case.graph.normalization
    listed = {np.int64(step): case.plain[step].tolist() for step in steps[::-1]}
    for behind in (
        listed,
        RowsBehind(steps, sp.coo_array(case.plain[steps]), np.ones(steps.size)),
        RowsBehind(steps.tolist(), case.plain[steps], None),
        make(case.plain),
    ):
        graph = AttributionGraph.from_rows(rows, sources, normalization, behind=behind)
        assert_array_equal(graph.matrix.toarray(), case.graph.matrix.toarray())
        assert_array_equal(graph.marginals(), case.graph.marginals())
        if not differ.any():
            assert graph.behind is None
            continue
        expected = steps.tolist()
        if not isinstance(behind, (dict, RowsBehind)):
            # Rows that are equal are the same row.
            expected = [s for s in expected if (case.plain[s] != case.rows[s]).any()]
        found = [] if graph.behind is None else graph.behind.steps.tolist()
        assert found == expected
        if found:
            assert isinstance(graph.behind.rows, sp.csr_array)
            assert_array_equal(graph.behind.rows.toarray(), case.plain[found])
            assert graph.behind.kept.tolist() == [1.0] * len(found)


def test_without_rows_behind_nothing_is_kept_twice():
    """Where no row differs, the graph is the one that it was."""
    rows = np.array([[1.0, 1, 0, 0], [0, 1, 3, 0]])
    for behind in (None, {}, rows, sp.csr_array(rows)):
        graph = AttributionGraph.from_rows(rows, 2, behind=behind)
        assert graph.behind is None
        assert graph.blocks_behind() is not None
        for one, other in zip(graph.blocks(), graph.blocks_behind(), strict=True):
            assert one is other
        assert graph.leak_behind is graph.leak
        assert graph.left_out_behind is graph.left_out
        assert "behind" not in repr(graph)


def test_a_row_behind_that_equals_an_incomplete_row_is_that_row():
    """Among all rows, what it kept stays; a row that is named is complete."""
    rows = [[1, 0, 0, 0], [0, 0, 0, 0]]
    every = AttributionGraph.from_rows(
        rows, 2, kept=[0.5, 0], behind=[[1, 0, 0, 0], [0, 0, 1, 0]]
    )
    assert every.behind.steps.tolist() == [1]
    assert every.left_out_behind.tolist() == [0.5, 0.0]
    named = AttributionGraph.from_rows(rows, 2, kept=[0.5, 0], behind={0: rows[0]})
    assert named.left_out_behind.tolist() == [0.0, 1.0]
    assert named.left_out.tolist() == [0.5, 1.0]


@settings(deadline=None)
@given(cases(), st.booleans())
def test_without_behind_the_rows_behind_hold_everywhere(case, sparse):
    """It is the graph of these rows alone, with what they kept."""
    graph = case.graph
    if sparse:
        graph = dataclasses.replace(graph, rows=sp.csr_array(graph.rows))
    plain = graph.without_behind()
    assert plain.behind is None
    assert (plain is graph) == (graph.behind is None)
    assert sp.issparse(plain.rows) == sparse
    rows = plain.rows.toarray() if sparse else plain.rows
    assert_array_equal(rows, case.plain)
    assert_array_equal(plain.kept, case.plain_kept)
    assert_array_equal(plain.matrix.toarray(), graph.matrix.toarray())
    assert_array_equal(plain.leak, graph.leak_behind)
    assert plain.normalization == graph.normalization
    assert_array_equal(plain.sources, graph.sources)


def test_none_is_a_row_behind_that_was_not_computed():
    """It leaves open what passes, and matters to no one who only starts there."""
    graph = AttributionGraph.from_rows(ROWS, 2, behind={0: None})
    assert graph.left_out_behind.tolist() == [1.0, 0.0]
    assert graph.left_out.tolist() == [0.0, 0.0]
    assert (graph.explain([1, 0]).tolist(), graph.unresolved([1, 0])) == ([0.5] * 2, 0)
    assert graph.explain([0, 1]).tolist() == [0.0, 0.25]
    assert (graph.leaked([0, 1]), graph.unresolved([0, 1])) == (0.0, 0.75)


@settings(deadline=None)
@given(cases(), st.floats(0.01, 1), st.booleans())
def test_sparsified_cuts_rows_behind_in_the_same_way(case, share, lazy):
    """Each keeps the heaviest entries of its own mass; answers stay certified."""
    graph, weights = case.graph, case.weights
    cut = graph.sparsified(share)
    if lazy:
        cut = AttributionGraph.from_rows(
            iter(case.rows),
            graph.sources,
            graph.normalization,
            kept=case.kept,
            sparsify=share,
            behind=graph.behind,
        )
    behind = AttributionGraph.from_rows(
        case.plain, graph.sources, graph.normalization, kept=case.plain_kept
    ).sparsified(share)
    assert_array_equal(cut.matrix.toarray(), behind.matrix.toarray())
    assert_array_equal(cut.left_out_behind, behind.left_out)
    assert_array_equal(cut.leak_behind, behind.leak)
    error = graph.explain(weights) - cut.explain(weights)
    assert np.abs(error).sum() <= cut.unresolved(weights) + EXACT
    assert (cut.behind is None) == (graph.behind is None)


@settings(deadline=None)
@given(grouped_graphs(), st.data(), st.booleans())
def test_coarsen_sums_rows_behind_in_the_same_way(grouped, data, sparse):
    """A group with a row behind has the sum of its members' rows behind."""
    rows, sources, normalization, labels = grouped
    differ = data.draw(arrays(np.bool_, len(rows)))
    plain = np.where(differ[:, None], 2 * rows + (rows != 0), rows)
    graph = AttributionGraph.from_rows(
        sp.csr_array(rows) if sparse else rows,
        sources,
        normalization,
        behind={step: plain[step] for step in np.flatnonzero(differ).tolist()},
    )
    coarse = graph.coarsen(labels)
    expected, _ = slow_coarse(rows, sources, labels)
    found = coarse.rows.toarray() if sparse else coarse.rows
    assert_allclose(found, expected, rtol=0, atol=1e-10)
    own_labels = np.array(labels)[~sources]
    rising = np.unique(own_labels).tolist()  # as their groups do not interleave
    steps = sorted({rising.index(label) for label in own_labels[differ].tolist()})
    if not steps:
        assert coarse.behind is None
        return
    expected_behind, _ = slow_coarse(plain, sources, labels)
    assert coarse.behind.steps.tolist() == steps
    found = coarse.behind.rows.toarray()
    assert_allclose(found, expected_behind[steps], rtol=0, atol=1e-10)
    assert coarse.behind.kept.tolist() == [1.0] * len(steps)


def test_coarsen_takes_complete_rows_behind_only():
    """What was dropped of a row behind cannot be grouped any more."""
    graph = AttributionGraph.from_rows(ROWS, 2, behind={1: None})
    message = r"coarsen: every row.*the row behind row 1 \(unit 3\) lacks 1 of its"
    with pytest.raises(ValueError, match=message):
        graph.coarsen([0, 0, 1, 2])


@pytest.mark.parametrize("make", [np.array, sp.csr_array])
def test_rows_behind_are_saved_with_the_graph(make):
    """The five fields that are given make the same graph again."""
    behind = RowsBehind([1], make([[1.0, 0, 0, 0]]), [0.25])
    graph = AttributionGraph.from_rows(make(ROWS), 2, "signed", behind=behind)
    again = AttributionGraph(
        graph.rows, graph.sources, graph.normalization, graph.kept, graph.behind
    )
    copies = pickle.loads(pickle.dumps(graph)), copy.copy(graph), copy.deepcopy(graph)
    for other in (again, *copies, dataclasses.replace(graph)):
        assert_array_equal(other.matrix.toarray(), graph.matrix.toarray())
        for one, two in zip(other.blocks(), graph.blocks(), strict=True):
            assert_array_equal(one.toarray(), two.toarray())
        assert other.behind.steps.tolist() == [1]
        assert other.behind.kept.tolist() == [0.25]
        assert other.left_out_behind.tolist() == [0.0, 0.75]


def test_rows_behind_are_frozen_and_the_callers_arrays_stay_the_callers():
    """Nothing that was passed is changed or locked, nothing that is kept is open."""
    given_behind = RowsBehind(
        np.array([1]), sp.csr_array([[1.0, 0, 0, 0]]), np.array([0.25])
    )
    graph = AttributionGraph.from_rows(ROWS, 2, behind=given_behind)
    steps, rows, kept = graph.behind
    for array in (
        *(steps, kept, rows.data, rows.indices, rows.indptr),
        *(graph.leak_behind, graph.left_out_behind),
        *(block.data for block in (*graph.blocks(), *graph.blocks_behind())),
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    before = graph.throughput([1, 1]).tolist()
    given_behind.steps[...] = given_behind.kept[...] = 0
    given_behind.rows.data[...] = 7.0
    assert graph.throughput([1, 1]).tolist() == before
    row = np.array([1.0, 0, 0, 0])
    graph = AttributionGraph.from_rows(ROWS, 2, behind={1: row})
    row[...] = 7.0
    assert graph.behind.rows.toarray().tolist() == [[1.0, 0, 0, 0]]
    graph.explain([1, 1])[...] = 7.0
    graph.marginals()[...] = 7.0
    assert graph.explain([0, 1]).tolist() == graph.marginals()[1].tolist()


def test_repr_says_how_many_rows_have_others_behind():
    """Their number, and what both kinds of rows left out."""
    graph = AttributionGraph.from_rows(ROWS, 2, behind={1: None})
    assert repr(graph) == (
        "AttributionGraph(n_sources=2, n_generated=2, normalization='positive', "
        "rows_behind=1, left_out=1)"
    )


ONE_ROW = sp.csr_array([[1.0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("behind", "error", "message"),
    [
        ({2: [1, 0, 0, 0]}, ValueError, r"behind: must be at least 0 and less than 2"),
        ({-1: [1, 0, 0, 0]}, ValueError, r"behind: must be at least 0.*but -1 came"),
        ({1.0: [1, 0, 0, 0]}, TypeError, r"behind: must be a whole.*Pass positions"),
        ({1: [1, 0, 0]}, ValueError, r"behind\[1\]: must have shape \(4,\).*\(3,\)"),
        ({1: ["a"]}, TypeError, r"behind\[1\]: must be real numbers"),
        (
            {1: [0, 0, 0, 2]},
            ValueError,
            r"behind: must be causal.*row 1 \(unit 3\) has 2\.0 at unit 3",
        ),
        (
            {0: [1, 0, 0, 0], 1: [0, np.nan, 0, 0]},
            ValueError,
            r"behind: every entry.*row 1 \(unit 3\) has a NaN at unit 1",
        ),
        (
            [[1, 1, 0, 0], [0, 1, np.inf, 0]],
            ValueError,
            r"behind: every entry.*row 1 \(unit 3\) has inf at unit 2",
        ),
        ([[1, 0, 0, 0]], ValueError, r"behind: must have the shape of rows, \(2, 4\)"),
        ([1, 0, 0, 0], ValueError, r"behind: must have shape \(G, N\), but \(4,\)"),
        ("x", TypeError, r"behind: must be real numbers"),
        (sp.csr_array(ROWS * 1j), TypeError, r"behind: must be real.*complex128"),
        (RowsBehind([2], ONE_ROW, [1]), ValueError, r"behind: .*less than 2, but 2"),
        (RowsBehind([0, 1], ONE_ROW, [1]), ValueError, r"behind: steps must rise"),
        (
            RowsBehind([1, 0], sp.csr_array(ROWS), [1, 1]),
            ValueError,
            r"behind: steps must rise.*list \[1, 0\] and rows of shape \(2, 4\) came",
        ),
        (RowsBehind([1], ONE_ROW[:, :3], [1]), ValueError, r"rows.* and 4 columns"),
        (
            RowsBehind([1], ONE_ROW, [2]),
            ValueError,
            r"behind\.kept: .*2\.0 came at row",
        ),
        (
            RowsBehind([1], ONE_ROW, [1, 1]),
            ValueError,
            r"behind\.kept: must have shape",
        ),
        (
            RowsBehind([1], ONE_ROW, [0]),
            ValueError,
            r"behind: .*must have no entries, but row 1 \(unit 3\) has 1",
        ),
        (
            RowsBehind([1], ONE_ROW * 0, [0.5]),
            ValueError,
            r"behind: .*must have mass, but row 1 \(unit 3\) has none and kept 0\.5",
        ),
    ],
)
def test_rows_behind_must_fit(behind, error, message):
    """Errors name the row, what came and what to pass."""
    with pytest.raises(error, match=message):
        AttributionGraph.from_rows(ROWS, 2, behind=behind)


@settings(deadline=None)
@given(cases())
def test_flow_is_the_mass_that_takes_each_edge(case):
    """Step by step: first rows for weights, rows behind for what passes."""
    graph, last = case.graph, case.hops
    own = graph.generated_units
    last = graph.n_generated if last is None else last
    expected = np.zeros((graph.n_generated, graph.n_units))
    here, matrix = case.weights, case.first
    for step in range(last + 1):
        moved = here[:, None] * matrix[own]
        if step == last:
            moved[:, own] = 0.0  # what was not followed takes no edge
        expected += moved
        here, matrix = moved[:, own].sum(axis=0), case.later
    found = graph.flow(case.weights, hops=case.hops)
    assert_allclose(found.toarray(), expected, rtol=0, atol=EXACT)
    arrived = answer(graph, case.weights, case.hops)
    assert_allclose(found.sum(axis=0)[graph.source_units], arrived, rtol=0, atol=EXACT)
    through = graph.throughput(case.weights, hops=case.hops)
    assert_allclose(found.sum(axis=0)[own] + case.weights, through, rtol=0, atol=EXACT)


@pytest.mark.parametrize("form", [list, iter])
def test_one_boolean_is_neither_a_number_of_sources_nor_a_mask(form):
    """True is 1 for Python."""
    with pytest.raises(TypeError, match="sources: must be a whole number or a boolean"):
        AttributionGraph.from_rows(form([[1.0, 0.0]]), True)


def test_leaks_are_numbers():
    """Sums and products of them need no cast."""
    graph = AttributionGraph.from_rows([[0, 0, 0], [0, 1, 0]], [True, False, False])
    assert graph.leak.dtype == graph.left_out.dtype == np.float64
    assert graph.leak.tolist() == [1.0, 0.0]
