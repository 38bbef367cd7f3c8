"""The solves and the path search, against dense algebra and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose
from scipy.sparse import csr_array

from captum_cage import solve

EXACT = 1e-12


@st.composite
def blocks(draw):
    """Random dense ``A`` and ``L``; a row's absolute values sum to 1 at most."""
    n_generated = draw(st.integers(0, 7))
    n_sources = draw(st.integers(0, 4))
    shape = (n_generated, n_sources + n_generated)
    entry = st.just(0.0) | st.floats(-1, 1, allow_subnormal=False)
    rows = draw(arrays(np.float64, shape, elements=entry, fill=st.nothing()))
    rows = np.tril(rows, n_sources - 1)
    rows /= np.maximum(np.abs(rows).sum(axis=1, keepdims=True), 1.0)
    return rows[:, :n_sources], rows[:, n_sources:]


def series(to_generated, vector, stop):
    """``sum_i (L^T)^i vector`` for ``i < stop``, one power at a time."""
    total = np.zeros(len(vector))
    for power in range(stop):
        total += np.linalg.matrix_power(to_generated.T, power) @ vector
    return total


@settings(deadline=None)
@given(blocks())
def test_marginals_solve_their_equation(both):
    """``X`` of ``marginals`` is ``A + L X``."""
    to_sources, to_generated = both
    found = solve.marginals(csr_array(to_sources), csr_array(to_generated))
    assert found.shape == to_sources.shape
    assert_allclose(found, to_sources + to_generated @ found, rtol=0, atol=EXACT)


@settings(deadline=None)
@given(blocks(), st.integers(0, 2**32 - 1))
def test_throughput_is_the_whole_series(both, seed):
    """``throughput`` is the sum of all powers of ``L^T`` times the weights."""
    _, to_generated = both
    weights = np.random.default_rng(seed).random(len(to_generated))
    found = solve.throughput(csr_array(to_generated), weights)
    expected = series(to_generated, weights, len(weights) + 1)
    assert_allclose(found, expected, rtol=0, atol=EXACT)


@settings(deadline=None)
@given(blocks(), st.integers(0, 8))
def test_truncated_throughput_is_the_cut_series(both, k):
    """``truncated_throughput`` is the series up to ``k`` and the term after it."""
    _, to_generated = both
    weights = np.linspace(0.5, 1.5, len(to_generated))
    through, left = solve.truncated_throughput(csr_array(to_generated), weights, k)
    assert_allclose(through, series(to_generated, weights, k + 1), rtol=0, atol=EXACT)
    term = np.linalg.matrix_power(to_generated.T, k + 1) @ weights
    assert_allclose(left, term, rtol=0, atol=EXACT)


@settings(deadline=None)
@given(blocks(), st.integers(0, 8))
def test_mass_that_enters_is_there_after_one_pass(both, k):
    """It is followed for one pass less than the weights, and left open with them."""
    _, to_generated = both
    weights = np.linspace(0.5, 1.5, len(to_generated))
    entering = np.linspace(-1.0, 2.0, len(to_generated))
    through, left = solve.truncated_throughput(
        csr_array(to_generated), weights, k, entering
    )
    expected = series(to_generated, weights, k + 1) + series(to_generated, entering, k)
    assert_allclose(through, expected, rtol=0, atol=EXACT)
    powers = [np.linalg.matrix_power(to_generated.T, power) for power in (k, k + 1)]
    term = powers[0] @ entering + powers[1] @ weights
    assert_allclose(left, term, rtol=0, atol=EXACT)
    assert entering.tolist() == np.linspace(-1.0, 2.0, len(to_generated)).tolist()


@settings(deadline=None)
@given(blocks(), st.integers(0, 2**32 - 1))
def test_signed_parts_are_the_masses_of_either_sign(both, seed):
    """As by a graph of twice the units, in which a negative edge changes the side."""
    _, to_generated = both
    weights = np.random.default_rng(seed).normal(size=len(to_generated))
    found = solve.signed_parts(
        solve.throughput(csr_array(np.abs(to_generated)), np.abs(weights)),
        solve.throughput(csr_array(to_generated), weights),
    )
    above, below = np.maximum(to_generated, 0), np.maximum(-to_generated, 0)
    double = np.block([[above, below], [below, above]])
    starting = np.concatenate([np.maximum(weights, 0), np.maximum(-weights, 0)])
    expected = series(double, starting, len(weights) + 1)
    assert_allclose(np.concatenate(found), expected, rtol=0, atol=EXACT)
    assert (np.concatenate(found) >= 0).all()
    assert not np.concatenate(found)[expected == 0].any()


def test_signed_parts_are_never_negative():
    """Where the difference exceeds the sum by rounding, the other part is zero."""
    net = np.array([1.0 + 1e-16, -0.3, 0.0])
    parts = solve.signed_parts(np.abs(net) * (1 - 1e-15), net)
    assert (np.concatenate(parts) >= 0).all()
    assert parts.negative[0] == parts.positive[1] == parts.positive[2] == 0.0


@settings(deadline=None)
@given(blocks(), st.integers(0, 8))
def test_truncated_marginals_are_the_cut_series(both, k):
    """``truncated_marginals`` is the series up to ``k``, in the end all of it."""
    to_sources, to_generated = both
    blocks = csr_array(to_sources), csr_array(to_generated)
    found = solve.truncated_marginals(*blocks, k)
    expected = np.zeros(to_sources.shape)
    for power in range(k + 1):
        expected += np.linalg.matrix_power(to_generated, power) @ to_sources
    assert found.shape == to_sources.shape
    assert_allclose(found, expected, rtol=0, atol=EXACT)
    everything = solve.truncated_marginals(*blocks, 10**18)
    assert_allclose(everything, solve.marginals(*blocks), rtol=0, atol=EXACT)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns", [None, 0, 1, 3])
@settings(deadline=None)
@given(both=blocks())
def test_sparse_and_dense_solve_agree(both, transposed, columns):
    """Both methods give the same numbers for a vector and for several columns."""
    lower = csr_array(both[1])
    shape = lower.shape[:1] if columns is None else (lower.shape[0], columns)
    right = np.random.default_rng(0).normal(size=shape)
    sparse, dense = (
        solve.solve_triangle(lower, right, transposed=transposed, method=method)
        for method in ("sparse", "dense")
    )
    assert sparse.shape == dense.shape == right.shape
    assert_allclose(sparse, dense, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    ("entries", "limit", "rows", "columns", "method"),
    [
        (45, 2**27, 0, None, "dense"),
        (0, 2**27, 0, None, "sparse"),
        (0, 2**27, 10, None, "dense"),
        (45, 99, 10, None, "sparse"),
        (5, 2**27, 0, None, "sparse"),
        (6, 2**27, 0, None, "dense"),
        (2, 2**27, 0, 1, "sparse"),
        (2, 2**27, 0, 2, "dense"),
    ],
)
def test_method_follows_fill_and_size(
    entries, limit, rows, columns, method, monkeypatch
):
    """A small or filled triangle is solved densely, unless a copy would be too large.

    The more right sides, the less fill it takes.
    """
    called = []
    for name, kind in (("solve_triangular", "dense"), ("spsolve_triangular", "sparse")):
        original = getattr(solve, name)

        def spy(*args, original=original, kind=kind, **kwargs):
            called.append(kind)
            return original(*args, **kwargs)

        monkeypatch.setattr(solve, name, spy)
    monkeypatch.setattr(solve, "DENSE_ENTRIES", limit)
    monkeypatch.setattr(solve, "DENSE_ROWS", rows)
    filled = np.zeros((10, 10))
    for row, column in zip(*np.tril_indices(10, -1), strict=True):
        filled[row, column] = 0.1 * (np.count_nonzero(filled) < entries)
    shape = 10 if columns is None else (10, columns)
    solve.solve_triangle(csr_array(filled), np.ones(shape))
    assert called == [method]


@pytest.mark.parametrize("method", ["sparse", "dense"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.filterwarnings("error")
def test_solve_changes_nothing_and_warns_of_nothing(method, transposed):
    """Read-only 64-bit blocks are solved without a change and without a warning."""
    index = np.arange(4, dtype=np.int64)
    lower = csr_array(
        (np.full(3, 0.5), (index[1:], index[:-1])), shape=(4, 4), dtype=np.float64
    )
    right = np.ones(4)
    for part in (lower.data, lower.indices, lower.indptr, right):
        part.flags.writeable = False
    before = lower.toarray()
    found = solve.solve_triangle(lower, right, transposed=transposed, method=method)
    expected = [1.0, 1.5, 1.75, 1.875]
    assert found.tolist() == (expected[::-1] if transposed else expected)
    assert np.array_equal(lower.toarray(), before)
    assert right.tolist() == [1.0] * 4


def test_long_chain_conserves_mass():
    """2,000 passes in a row lose nothing beyond rounding."""
    n_generated = 2000
    random = np.random.default_rng(0)
    near = random.random(n_generated - 1) / n_generated
    lower = csr_array(np.diag(1 - near, -1))
    to_sources = csr_array(np.append(1.0, near)[:, None])
    weights = np.zeros(n_generated)
    weights[-1] = 1.0
    for method in ("sparse", "dense"):
        through = solve.solve_triangle(lower, weights, transposed=True, method=method)
        assert (to_sources.T @ through).sum() == pytest.approx(1.0, abs=EXACT)


# Shares whose products are exact in binary, so that ties are ties.
DYADIC = st.sampled_from([0.0, 0.0, 0.25, 0.5, 1.0, -0.25, -0.5])


@st.composite
def dyadic_graphs(draw):
    """A lower triangular matrix of dyadic edges, starting weights and targets."""
    n_units = draw(st.integers(1, 7))
    targets = draw(arrays(np.bool_, n_units, fill=st.nothing()))
    shape = n_units, n_units
    edges = draw(arrays(np.float64, shape, elements=DYADIC, fill=st.nothing()))
    edges = np.tril(edges, -1)
    edges[targets] = 0.0
    edges[np.diag_indices(n_units)] = targets
    starts = draw(arrays(np.float64, n_units, elements=DYADIC))
    return edges, np.where(targets, 0.0, starts), targets


def enumerated_paths(edges, starts, targets):
    """All paths of weight other than zero, sorted: the slow and obvious way."""
    found = []
    units = range(len(starts))
    for length in range(2, len(starts) + 1):
        for rising in itertools.combinations(units, length):
            path = rising[::-1]
            steps = itertools.pairwise(path)
            weight = starts[path[0]] * math.prod(edges[step] for step in steps)
            if weight != 0 and targets[path[-1]]:
                found.append(solve.Path(path, float(weight)))
    return sorted(found, key=lambda p: (-abs(p.weight), len(p.units), p.units))


@settings(max_examples=100, deadline=None)
@given(dyadic_graphs(), st.integers(0, 70))
def test_best_paths_are_the_first_of_all_sorted_paths(graph, k):
    """``best_paths`` equals sorting all paths by weight, length and units."""
    edges, starts, targets = graph
    found = solve.best_paths(csr_array(edges), starts, targets, k)
    assert found == enumerated_paths(*graph)[:k]


def test_best_paths_of_equal_weight_come_in_a_fixed_order():
    """Of equal paths the shorter comes first, then the one with lower units."""
    edges = np.zeros((5, 5))
    edges[0, 0] = 1.0
    edges[1, 0] = edges[2, 0] = 1.0
    edges[3, 1] = edges[3, 2] = edges[3, 0] = 0.5
    edges[4, 3] = 1.0
    starts = np.array([0.0, 0.0, 0.0, 1.0, 1.0])
    found = solve.best_paths(csr_array(edges), starts, np.arange(5) == 0, 99)
    assert [path.units for path in found] == [
        (3, 0),
        (3, 1, 0),
        (3, 2, 0),
        (4, 3, 0),
        (4, 3, 1, 0),
        (4, 3, 2, 0),
    ]
    assert {path.weight for path in found} == {0.5}


def test_best_paths_follow_chains_longer_than_the_stack():
    """Paths of 1,500 units are found in order without recursion."""
    n_units = 1500
    edges = np.zeros((n_units, n_units))
    edges[0, 0] = 1.0
    edges[1, 0] = 1.0
    below = np.arange(2, n_units)
    edges[below, below - 1] = 0.9999
    edges[below, below - 2] = 0.0001
    starts = np.zeros(n_units)
    starts[-1] = 1.0
    found = solve.best_paths(csr_array(edges), starts, np.arange(n_units) == 0, 100)
    lengths = [len(path.units) for path in found]
    # One path without a skip, then one for each place of one skip.
    assert lengths == [n_units] + [n_units - 1] * 99
    weights = [path.weight for path in found]
    assert weights == sorted(weights, reverse=True)
    assert len({path.units for path in found}) == 100


def test_best_paths_that_underflow_are_left_out():
    """A product below the smallest float counts as weight zero."""
    edges = np.array([[1.0, 0, 0], [1e-200, 0, 0], [0.5, 1e-200, 0]])
    found = solve.best_paths(
        csr_array(edges), np.array([0.0, 0.0, 1.0]), np.array([True, False, False]), 9
    )
    assert found == [solve.Path((2, 0), 0.5)]
    edges = np.zeros((4, 4))
    edges[0, 0] = edges[1, 0] = 1.0
    edges[2, :2] = 1e-50, 1e-200
    edges[3, 2] = 1e-200
    found = solve.best_paths(
        csr_array(edges), np.array([0.0, 0.0, 0.0, 1.0]), np.arange(4) == 0, 9
    )
    assert [path.units for path in found] == [(3, 2, 0)]


LOWER = csr_array(np.tril(np.full((3, 3), 0.25), -1))


@pytest.mark.parametrize(
    ("lower", "right", "method", "message"),
    [
        (
            csr_array((2, 3)),
            np.ones(2),
            "auto",
            r"to_generated: must be square.*\(2, 3",
        ),
        (csr_array(np.eye(3)), np.ones(3), "auto", r"row 0 has one in column 0"),
        (LOWER.T.tocsr(), np.ones(3), "auto", r"row 0 has one in column 1"),
        (LOWER, np.ones(2), "auto", r"right: must have shape \(3,\).*\(2,\) came"),
        (LOWER, np.ones((3, 1, 1)), "auto", r"right: must have shape \(3,\)"),
        (LOWER, np.ones(3), "fast", r"method: must be one of.*'dense', but 'fast'"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(lower, right, method, message):
    """Errors name the argument, what must hold and what came."""
    with pytest.raises(ValueError, match=message):
        solve.solve_triangle(lower, right, method=method)


def test_cut_series_refuse_a_full_matrix():
    """An entry on the diagonal would make the series endless: it is an error."""
    with pytest.raises(ValueError, match=r"row 0 has one in column 0.*stands before"):
        solve.truncated_throughput(csr_array(np.eye(2)), np.ones(2), 1)
    with pytest.raises(ValueError, match=r"row 0 has one in column 0.*stands before"):
        solve.truncated_marginals(csr_array(np.ones((2, 1))), csr_array(np.eye(2)), 1)
