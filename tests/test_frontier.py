"""The frontier, against the graph of the computed rows and that of all rows."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from captum_cage import frontier as module
from captum_cage.frontier import Frontier
from captum_cage.graph import AttributionGraph

EXACT = 1e-12
NORMALIZATIONS = ("positive", "absolute", "signed")


@st.composite
def questions(draw, max_rows=7):
    """Raw rows, a number of sources, a normalisation, weights and hops."""
    n_sources = draw(st.integers(0, 3))
    n_generated = draw(st.integers(0, max_rows))
    shape = (n_generated, n_sources + n_generated)
    # No product of these is below the smallest float.
    entry = st.just(0.0) | st.floats(0.001, 10) | st.floats(-10, -0.001)
    rows = np.tril(draw(arrays(np.float64, shape, elements=entry)), n_sources - 1)
    normalization = draw(st.sampled_from(NORMALIZATIONS))
    lowest = -1.0 if normalization == "signed" else 0.0
    weight = st.sampled_from([0.0, lowest]) | st.floats(0.001, 1)
    weights = draw(arrays(np.float64, n_generated, elements=weight))
    return rows, n_sources, normalization, weights, draw(st.none() | st.integers(0, 8))


@pytest.fixture(params=["packed", "sparse"])
def form(request, monkeypatch):
    """Both ways to store rows."""
    if request.param == "sparse":
        monkeypatch.setattr(module, "DENSE_ROWS", -1)
    return request.param


@pytest.fixture(params=["packed", "sparse"], scope="module")
def either_form(request):
    """Both ways to store rows, for tests that draw many examples."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "sparse":
            patch.setattr(module, "DENSE_ROWS", -1)
        yield request.param


def run(frontier, rows, most=1):
    """Compute rows until none is wanted; how many there were."""
    while (steps := frontier.wanted(most)).size:
        for step in steps:
            frontier.add(step, rows[step])
    return int(frontier.computed.sum())


def graph_of(frontier, rows, n_sources, normalization):
    """The graph of the computed rows."""
    known = np.where(frontier.computed[:, None], rows, 0.0)
    return AttributionGraph.from_rows(
        known, n_sources, normalization, kept=frontier.computed
    )


@pytest.mark.usefixtures("either_form")
@settings(deadline=None)
@given(questions(), st.sampled_from([0.0, 0.01, 0.1, 0.3, 1.0]), st.integers(1, 3))
def test_what_is_pending_in_the_end_certifies_the_answer(question, tolerance, most):
    """Within the tolerance, equal to the graph's certificate, and the truth in it."""
    rows, n_sources, normalization, weights, hops = question
    frontier = Frontier(n_sources, weights, normalization, tolerance, hops)
    assert run(frontier, rows, most) <= len(rows)
    graph = graph_of(frontier, rows, n_sources, normalization)
    complete = AttributionGraph.from_rows(rows, n_sources, normalization)
    if hops is None:
        beyond = 0.0
        error = complete.explain(weights) - graph.explain(weights)
    else:
        # What sits beyond the cut, no row within it resolves.
        lower = graph.blocks()[1].toarray()
        left = np.linalg.matrix_power(lower.T, hops + 1) @ weights
        beyond = np.abs(left).sum()
        error = complete.explain(weights) - graph.hops(weights, hops).attr
    assert frontier.unresolved <= tolerance * np.abs(weights).sum() + EXACT
    unresolved = graph.unresolved(weights, hops=hops)
    assert frontier.unresolved + beyond == pytest.approx(unresolved, abs=EXACT)
    assert np.abs(error).sum() <= unresolved + EXACT
    if normalization != "signed":
        assert (error >= -EXACT).all()


@pytest.mark.usefixtures("either_form")
@settings(deadline=None)
@given(questions(), st.randoms())
def test_pending_is_the_throughput_of_rows_that_are_missing(question, random):
    """After each row, in any order, it is what the graph of the rows so far says."""
    rows, n_sources, normalization, weights, hops = question
    frontier = Frontier(n_sources, weights, normalization, 0.0, hops)
    steps = list(range(len(rows)))
    random.shuffle(steps)
    for step in [None, *steps]:
        if step is not None:
            frontier.add(step, rows[step])
        graph = graph_of(frontier, rows, n_sources, normalization)
        through = np.abs(graph.throughput(weights, hops=hops))
        expected = np.where(frontier.computed, 0.0, through)
        assert_allclose(frontier.pending, expected, rtol=0, atol=EXACT)
        assert frontier.unresolved == pytest.approx(expected.sum(), abs=EXACT)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 8), max_size=8),
    st.integers(0, 16).map(lambda n: n / 16),
    st.integers(1, 9),
)
def test_wanted_are_the_fewest_rows_that_leave_little(weights, tolerance, most):
    """By falling mass, of equal rows the later, until the rest may stay."""
    frontier = Frontier(2, weights, "positive", tolerance)
    order = sorted(range(len(weights)), key=lambda step: (-weights[step], -step))
    expected = []
    for step in order:
        rest = sum(weights[other] for other in order if other not in expected)
        if rest <= tolerance * sum(weights):
            break
        expected.append(step)
    found = frontier.wanted(most)
    assert found.dtype == np.int64
    assert found.tolist() == expected[:most]


@settings(deadline=None)
@given(questions())
def test_without_tolerance_each_row_that_mass_reaches_is_computed(question):
    """And no other: the answer is that of all rows.

    In a cut signed series, mass of both signs may meet on a row after different
    numbers of passes. The sum is nothing, but one of them was to go further.
    """
    rows, n_sources, normalization, weights, hops = question
    if normalization == "signed":
        hops = None
    frontier = Frontier(n_sources, weights, normalization, 0.0, hops)
    run(frontier, rows)
    assert frontier.unresolved == 0.0
    graph = graph_of(frontier, rows, n_sources, normalization)
    complete = AttributionGraph.from_rows(rows, n_sources, normalization)
    assert_allclose(
        graph.throughput(weights, hops=hops),
        complete.throughput(weights, hops=hops),
        rtol=0,
        atol=EXACT,
    )
    if normalization != "signed":
        reached = complete.throughput(weights, hops=hops) > 0
        assert_array_equal(frontier.computed, reached)


@pytest.mark.usefixtures("form")
def test_a_chain_computes_few_rows():
    """Each link passes on half of its mass, so that seven links leave less than 1%."""
    n_generated = 500
    rows = np.zeros((n_generated, 1 + n_generated))
    rows[:, 0] = 1.0
    rows[np.arange(1, n_generated), np.arange(1, n_generated)] = 1.0
    weights = np.zeros(n_generated)
    weights[400] = 1.0
    frontier = Frontier(1, weights, "positive", 0.01)
    assert run(frontier, rows, most=5) == 7
    assert np.flatnonzero(frontier.computed).tolist() == list(range(394, 401))
    assert frontier.unresolved == 2**-7


@pytest.mark.usefixtures("form")
def test_rows_that_no_mass_reaches_are_never_computed():
    """Every second unit is read by none, and with one hop only two rows are needed."""
    rows = np.zeros((40, 41))
    for step in range(2, 40, 2):
        rows[step, 1 + step - 2] = 1.0
    weights = np.zeros(40)
    weights[38] = 1.0
    assert run(Frontier(1, weights, "positive", 0.0), rows) == 20
    assert run(Frontier(1, weights, "positive", 0.0, hops=1), rows) == 2
    assert run(Frontier(1, weights, "positive", 0.0, hops=0), rows) == 1


def test_signed_mass_may_cancel():
    """What arrives with both signs is nothing, but is pushed on where it was."""
    frontier = Frontier(1, [0, 1, -1], "signed", 0.0)
    frontier.add(2, [0, 1, 0, 0])
    assert frontier.pending.tolist() == [1.0, 1.0, 0.0]
    frontier.add(1, [0, 1, 0, 0])
    assert frontier.pending.tolist() == [0.0, 0.0, 0.0]
    assert frontier.wanted(9).size == 0


@pytest.mark.usefixtures("form")
def test_mass_goes_on_along_rows_that_came_before_it():
    """Half of the last row's goes by way of a row that was added first."""
    frontier = Frontier(1, [0, 0, 0, 1], "positive", 0.0, hops=2)
    frontier.add(1, [1, 1, 0, 0, 0])
    frontier.add(3, [0, 1, 2, 1, 0])
    assert frontier.pending.tolist() == [0.5, 0.0, 0.25, 0.0]


def test_a_row_is_wanted_where_only_rounding_leaves_all_others():
    """Summed one by one the mass is less than the tolerance, summed in pairs more."""
    tolerance = float(np.nextafter(1.0, 0.0))
    for seed in range(99):
        weights = np.random.default_rng(seed).random(1000)
        if np.sort(weights).cumsum()[-1] <= tolerance * weights.sum():
            break
    frontier = Frontier(1, weights, "positive", tolerance)
    assert frontier.wanted(9).tolist() == [weights.argmax()]


def test_the_triangle_is_stored_densely_up_to_a_size(monkeypatch):
    """Beyond it, what is stored does not grow with its square."""
    monkeypatch.setattr(module, "DENSE_ROWS", 1000)
    taken = []
    for size in (1000, 1001):
        tracemalloc.start()
        frontier = Frontier(1, np.ones(size), "positive", 0.0)
        taken.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert frontier.pending.size == size
    triangle = 1000 * 1001 / 2 * 8
    assert triangle <= taken[0] < 1.1 * triangle
    assert taken[1] < 0.1 * triangle


def test_rows_are_taken_as_they_come():
    """Nothing that was passed is changed, and answers belong to the caller."""
    row, weights = np.array([0.0, 4.0, 0.0]), np.array([0.0, 1.0])
    frontier = Frontier(1, weights, "positive", 0.0)
    frontier.add(1, row)
    frontier.pending[...] = 7.0
    frontier.computed[...] = False
    assert row.tolist() == [0.0, 4.0, 0.0]
    assert weights.tolist() == [0.0, 1.0]
    assert frontier.pending.tolist() == [1.0, 0.0]
    assert frontier.computed.tolist() == [False, True]


@pytest.mark.parametrize("order", ["wanted", "rising"])
def test_many_rows_conserve_mass(order):
    """600 rows one at a time, in the order of their mass or in that of the text."""
    random = np.random.default_rng(0)
    rows = np.tril(random.random((600, 700)), 99)
    weights = random.random(600)
    frontier = Frontier(100, weights, "positive", 0.0)
    if order == "wanted":
        assert run(frontier, rows) == 600
    else:
        for step in range(599):
            frontier.add(step, rows[step])
        through = graph_of(frontier, rows, 100, "positive").throughput(weights)
        assert frontier.pending[599] == weights[599] == through[599]
        assert frontier.wanted(9).tolist() == [599]
        frontier.add(599, rows[599])
    assert frontier.unresolved == 0.0
    assert frontier.wanted(9).size == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, [1], "positive", 0), ValueError, r"n_sources: must be 0 or more, but -1"),
        ((1.0, [1], "positive", 0), TypeError, r"n_sources: must be a whole number"),
        ((1, [[1]], "positive", 0), ValueError, r"weights: must have shape \(1,\)"),
        ((1, [-1], "positive", 0), ValueError, r"weights: no entry may be negative"),
        ((1, ["x"], "positive", 0), TypeError, r"weights: must be real numbers"),
        ((1, [1], "softmax", 0), ValueError, r"normalization: must be one of"),
        ((1, [1], "positive", -0.1), ValueError, r"tolerance: must be .*-0\.1 came"),
        ((1, [1], "positive", 5), ValueError, r"tolerance: .*at most 1, but 5\.0 came"),
        ((1, [1], "positive", np.nan), ValueError, r"tolerance: must be .*nan came"),
        ((1, [1], "positive", "0"), TypeError, r"tolerance: must be .*str '0' came"),
        ((1, [1], "positive", True), TypeError, r"tolerance: must be .*bool True came"),
        ((1, [1], "positive", 0, -1), ValueError, r"hops: must be 0 or more, but -1"),
        ((1, [1], "positive", 0, 1.5), TypeError, r"hops: must be a whole number"),
    ],
)
def test_bad_questions_are_refused(arguments, error, message):
    """Errors name the argument and what came."""
    with pytest.raises(error, match=message):
        Frontier(*arguments)


@pytest.mark.parametrize(
    ("step", "row", "error", "message"),
    [
        (2, [0] * 4, ValueError, r"step: must be at least 0 and less than 2, but 2"),
        (0.0, [0] * 4, TypeError, r"step: must be a whole number"),
        (1, [0] * 4, ValueError, r"step: each row is added once, but row 1 came again"),
        (0, [0] * 3, ValueError, r"row: must have shape \(4,\).*\(3,\) came"),
        (0, ["x"] * 4, TypeError, r"row: must be real numbers"),
        (
            0,
            [np.nan, 0, 0, 0],
            ValueError,
            r"row: .*row 0 \(unit 2\) has a NaN at unit 0",
        ),
        (0, [0, 0, 2, 0], ValueError, r"row: .*row 0 \(unit 2\) has 2\.0 at unit 2"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(step, row, error, message):
    """A row that was refused can be added again as it should be."""
    frontier = Frontier(2, [1, 1], "positive", 0.0)
    frontier.add(1, [0, 1, 1, 0])
    with pytest.raises(error, match=message):
        frontier.add(step, row)
    assert frontier.pending.tolist() == [1.5, 0.0]
    frontier.add(0, [1, 0, 0, 0])
    assert frontier.unresolved == 0.0


@pytest.mark.parametrize(
    ("most", "error", "message"),
    [(0, ValueError, r"most: must be 1 or more"), (1.5, TypeError, r"most: must be a")],
)
def test_at_least_one_row_is_asked_for(most, error, message):
    """Asking for none would never end."""
    with pytest.raises(error, match=message):
        Frontier(1, [1], "positive", 0).wanted(most)
