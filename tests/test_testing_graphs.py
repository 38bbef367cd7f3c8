"""Random graphs and Hypothesis strategies: they are what they say."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captum_cage.testing import random_graph, strategies, tiny_tokenizer

SIZES = {"n_sources": st.integers(1, 5), "n_generated": st.integers(0, 6)}
TOKENIZER = tiny_tokenizer()


@given(
    **SIZES,
    density=st.floats(0, 1),
    signed=st.booleans(),
    mixed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_random_graph_has_the_shape_and_no_leak(
    n_sources, n_generated, density, signed, mixed, seed
):
    """Entries stand before their unit only, and every row has mass."""
    arguments = {"density": density, "signed": signed, "mixed": mixed, "seed": seed}
    graph = random_graph(n_sources, n_generated, **arguments)
    assert (graph.n_sources, graph.n_generated) == (n_sources, n_generated)
    assert graph.sources[0]
    assert mixed or graph.sources[:n_sources].all()
    assert graph.normalization == ("signed" if signed else "positive")
    assert (graph.rows >= 0).all() or signed
    assert not graph.leak.any()
    again = random_graph(n_sources, n_generated, **arguments)
    assert np.array_equal(again.rows, graph.rows)


def test_density_signs_and_leaks_are_shares():
    """Of many entries and rows."""
    graph = random_graph(30, 60, density=0.3, signed=True, seed=5)
    before = np.arange(90) < graph.generated_units[:, None]
    entries = graph.rows[before]
    assert np.count_nonzero(entries) / entries.size == pytest.approx(0.3, abs=0.04)
    assert (entries < 0).sum() / (entries != 0).sum() == pytest.approx(0.5, abs=0.06)
    leaking = random_graph(5, 400, leak=0.25, normalization="absolute", seed=5)
    assert leaking.normalization == "absolute"
    assert leaking.leak.mean() == pytest.approx(0.25, abs=0.06)
    assert random_graph(leak=1).leak.all()


def test_mixed_sources_stand_anywhere():
    """Between generated units, too."""
    sources = random_graph(3, 20, mixed=True, seed=1).sources
    assert sources.sum() == 3
    assert sources[0]
    assert not sources[:3].all()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"n_sources": 0}, ValueError, "n_sources: must be 1 or more"),
        ({"n_generated": 1.5}, TypeError, "n_generated: must be a whole number"),
        ({"density": 2}, ValueError, r"density: must be a probability in \[0, 1\]"),
        ({"leak": "a"}, TypeError, "leak: must be a probability"),
        ({"normalization": "no"}, ValueError, "normalization: must be one of"),
        ({"seed": -1}, ValueError, "seed: must be 0 or more"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, match):
    """With what to pass."""
    with pytest.raises(error, match=match):
        random_graph(**arguments)


class TestStrategies:
    """What is drawn can be used as it is."""

    @given(strategies.weighted_graphs())
    def test_graphs_take_their_weights(self, drawn):
        """And explain them."""
        graph, weights = drawn
        assert graph.explain(weights).shape == (graph.n_sources,)
        assert graph.normalization == "signed" or (weights >= 0).all()

    @given(strategies.raw_rows(entries=st.just(1.0)))
    def test_entries_are_those_asked_for(self, drawn):
        """Before the row's own unit; zero behind."""
        rows, sources, _ = drawn
        before = np.arange(sources.size) < np.flatnonzero(~sources)[:, None]
        assert np.array_equal(rows, before.astype(float))

    @given(st.data())
    def test_ids_are_known_and_not_special(self, data):
        """Unless special ones are asked for."""
        ids = data.draw(strategies.token_ids(TOKENIZER, min_size=2, max_size=4))
        assert 2 <= len(ids) <= 4
        assert not set(ids) & set(TOKENIZER.all_special_ids)
        TOKENIZER.decode(ids)

    @given(st.data(), st.integers(0, 8), st.booleans())
    def test_ranges_ascend_apart(self, data, length, gaps):
        """Inside the text; all of it, where there are no gaps."""
        found = data.draw(strategies.ranges(length, gaps=gaps))
        edges = [edge for pair in found for edge in pair]
        assert edges == sorted(edges)
        assert all(0 <= start < stop <= length for start, stop in found)
        covered = sum(stop - start for start, stop in found)
        assert covered == length or gaps

    @given(strategies.hard_texts(max_pieces=3))
    def test_texts_can_be_encoded(self, text):
        """There are no lone surrogates."""
        assert text.encode("utf-8").decode("utf-8") == text

    def test_without_hypothesis_the_error_says_what_to_install(self):
        """The rest of the module needs none."""
        code = (
            "import sys; sys.modules['hypothesis'] = None\n"
            "import captum_cage.testing\n"
            "try:\n    import captum_cage.testing.strategies\n"
            "except ImportError as error:\n    print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert "pip install captum-cage[dev], or pip install hypothesis" in done.stdout
