"""Rows that are drawn several times, and how sure the scores are."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LLMAttribution,
    LLMGradientAttribution,
)

from captum_cage import (
    AttributionGraph,
    GraphAttributionResult,
    GraphContextAttribution,
    TokenIdsInput,
    Unit,
)
from captum_cage.draws import DrawnRows
from captum_cage.graph import RowsBehind
from captum_cage.methods import EmbeddingGradientShap
from tiny import tiny_model

PROMPT = "Ana has 3 pens."
TARGET = " So 7. It is 7."


@pytest.fixture(scope="module")
def model(tokenizer):
    """A small Llama in float64."""
    return tiny_model(vocab_size=len(tokenizer), dtype=torch.float64)


@pytest.fixture
def cage(model, tokenizer):
    """A random method with the graph: gradients at random points."""
    llm_attr = LLMGradientAttribution(EmbeddingGradientShap(model), tokenizer)
    return GraphContextAttribution(llm_attr)


@pytest.fixture
def inp(tokenizer):
    """The prompt."""
    return TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)


def by_kernel_shap(model, tokenizer):
    """Another one, whose engine computes all rows together."""
    pytest.importorskip("sklearn")
    return GraphContextAttribution(LLMAttribution(KernelShap(model), tokenizer))


def seed(number=0):
    """Begin with the random numbers of a seed."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002


def drawn(values):
    """A result whose rows are drawn, by hand.

    Args:
        values (numpy.ndarray): draws of the share of the first of two sources that
            each generated unit has for itself, shape ``(D, G)``.
    """
    count, steps = values.shape
    rows = np.zeros((count, steps, 3 * steps))
    every = np.arange(steps)
    rows[:, every, 2 * every] = values
    rows[:, every, 2 * every + 1] = 1.0 - values
    return result_of(rows, range(steps))


def result_of(rows, explained, normalization="positive", **more):
    """A result with the mean of some draws of rows, shape ``(D, G, N)``."""
    sources = np.arange(rows.shape[2]) < rows.shape[2] - rows.shape[1]
    found = DrawnRows(
        rows,
        np.zeros(0, dtype=np.int64),
        np.zeros((len(rows), 0, rows.shape[2])),
        sources,
        normalization,
    )
    return GraphAttributionResult(
        found.mean_graph(),
        [Unit(str(i), not source, (i, i + 1)) for i, source in enumerate(sources)],
        explained,
        source_text="",
        generated_text="",
        drawn=found,
        **more,
    )


# --- the draws -----------------------------------------------------------------------


class TestRows:
    """What is drawn, and the graph of its mean."""

    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    def test_draws_are_what_as_many_calls_give(self, cage, inp, strategy):
        """One after another; the graph is that of their mean."""
        arguments = {"n_samples": 2, "strategy": strategy}
        seed()
        rows = [cage.attribute(inp, TARGET, **arguments).graph.rows for _ in range(3)]
        seed()
        result = cage.attribute(inp, TARGET, draws=3, **arguments)
        assert (result.drawn.rows == np.stack(rows)).all()
        assert np.ptp(result.drawn.rows, axis=0).max() > 1e-3
        np.testing.assert_allclose(result.graph.rows, np.mean(rows, axis=0), atol=1e-15)
        mean = AttributionGraph.from_rows(np.mean(rows, axis=0), result.graph.n_sources)
        np.testing.assert_allclose(
            result.seq_attr, mean.explain(result.weights), atol=1e-12
        )
        assert not result.drawn.steps.size
        assert result.drawn.behind.shape == (3, 0, len(result.units))

    def test_an_engine_that_computes_all_rows_together(self, model, tokenizer, inp):
        """Other samples in each draw, the plain text scored once."""
        cage = by_kernel_shap(model, tokenizer)
        seed()
        result = cage.attribute(inp, TARGET, draws=2, n_samples=6, strategy="fused")
        assert result.meta["strategy"] == "fused"
        one, other = result.drawn.rows
        assert np.abs(one - other).max() > 1e-3
        seed()
        once = cage.attribute(inp, TARGET, n_samples=6, strategy="fused")
        assert (one == once.graph.rows).all()
        np.testing.assert_allclose(result.output_probs, once.output_probs)

    def test_one_draw_is_none(self, cage, inp):
        """There is nothing to compare."""
        result = cage.attribute(inp, TARGET, n_samples=2)
        assert result.drawn is None
        with pytest.raises(
            ValueError, match="intervals: the rows must have been drawn "
        ):
            result.intervals()

    @pytest.mark.parametrize(
        ("draws", "error"),
        [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)],
    )
    def test_other_numbers_are_refused(self, cage, inp, draws, error):
        """Of draws: 1 or more."""
        with pytest.raises(error, match="draws: must be "):
            cage.attribute(inp, TARGET, draws=draws)

    @pytest.mark.parametrize("cut", [{"tolerance": 0.1}, {"sparsify": 0.9}])
    def test_draws_need_whole_rows(self, cage, inp, cut):
        """As their mean is taken entry by entry."""
        with pytest.raises(
            ValueError, match="draws: must be 1 where rows are left out"
        ):
            cage.attribute(inp, TARGET, draws=2, **cut)

    def test_means_have_the_normalisation_of_the_wrapper(self, model, tokenizer, inp):
        """The mean is taken first: opposite signs cancel."""
        llm_attr = LLMGradientAttribution(EmbeddingGradientShap(model), tokenizer)
        cage = GraphContextAttribution(llm_attr, normalization="signed")
        result = cage.attribute(inp, TARGET, draws=3, n_samples=1)
        assert result.drawn.normalization == result.graph.normalization == "signed"
        rows = np.array([[[1.0, 1.0, 0.0]], [[-1.0, 1.0, 0.0]]])
        found = result_of(rows, [0], "absolute").seq_attr.tolist()
        assert found == [0.0, 1.0]


class TestFoils:
    """Draws of contrastive rows."""

    def test_both_rows_are_drawn_each_time(self, cage, inp, tokenizer):
        """The contrastive one and the plain one behind it."""
        foil = {-2: tokenizer.encode("9")[0]}
        arguments = {"n_samples": 2, "foil": foil}
        seed()
        graphs = [cage.attribute(inp, TARGET, **arguments).graph for _ in range(3)]
        seed()
        result = cage.attribute(inp, TARGET, draws=3, **arguments)
        place = result.foils[0].unit
        assert result.drawn.steps.tolist() == [place]
        assert (result.drawn.rows == np.stack([graph.rows for graph in graphs])).all()
        behind = np.stack([graph.behind.rows.toarray() for graph in graphs])
        assert (result.drawn.behind == behind).all()
        mean = result.graph.behind.rows.toarray()
        np.testing.assert_allclose(mean, behind.mean(axis=0), atol=1e-15)
        found = result.intervals(resamples=50)
        assert (found.low <= result.seq_attr.numpy() + 1e-12).any()
        assert found.standard_error.max() > 0
        plain = result.explaining((0, 2))
        assert plain.drawn is None
        assert result.explaining((0, place + 1)).drawn is result.drawn

    def test_rows_behind_are_resampled_with_their_rows(self):
        """What a resample has of a row it has of the row behind."""
        rows = np.zeros((5, 2, 4))
        rows[:, 0, :2] = [0.5, 0.5]
        rows[:, 1, 2] = 1.0
        behind = np.zeros((5, 1, 4))
        shares = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
        behind[:, 0, 0], behind[:, 0, 1] = shares, 1.0 - shares
        found = DrawnRows(
            rows,
            np.array([0]),
            behind,
            np.array([True, True, False, False]),
            "positive",
        )
        graph = found.mean_graph()
        assert isinstance(graph.behind, RowsBehind)
        assert graph.explain([0, 1]).tolist() == pytest.approx([0.5, 0.5])
        scores = np.array([g.explain([0, 1])[0] for g in found.resampled(400, seed=1)])
        assert scores.std() == pytest.approx(shares.std(ddof=1) / 5**0.5, rel=0.15)
        assert {g.explain([1, 0])[0] for g in found.resampled(20, seed=1)} == {0.5}


class TestInterrupted:
    """The same call goes on where it stopped."""

    @pytest.fixture
    def interrupted(self, model, tokenizer):
        """A random method that is interrupted in one of its calls."""

        class Interrupted(EmbeddingGradientShap):
            calls, stop = 0, None

            def attribute(self, inputs, additional_forward_args=None, n_samples=1):
                type(self).calls += 1
                if type(self).calls == type(self).stop:
                    raise KeyboardInterrupt
                return super().attribute(
                    inputs,
                    n_samples=n_samples,
                    additional_forward_args=additional_forward_args,
                )

        llm_attr = LLMGradientAttribution(Interrupted(model), tokenizer)
        return GraphContextAttribution(llm_attr), Interrupted

    @pytest.mark.parametrize("foil", [None, {1: 9}])
    @pytest.mark.parametrize("into", [1, 2])
    def test_finished_draws_and_rows_are_kept(
        self, interrupted, inp, tokenizer, foil, into
    ):
        """And are not drawn again."""
        cage, kind = interrupted
        steps = len(tokenizer.encode(TARGET))
        each = steps + (0 if foil is None else 2)  # a random method draws both rows
        arguments = {"draws": 3, "foil": foil, "strategy": "loop"}
        kind.stop = into * each + 3  # in the third row of a later draw
        seed()
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, TARGET, **arguments)
        result = cage.attribute(inp, TARGET, **arguments)
        assert kind.calls == 3 * each + 1
        assert len(result.drawn.rows) == 3
        seed()
        first = copy.copy(cage).attribute(inp, TARGET, **{**arguments, "draws": 1})
        assert (result.drawn.rows[0] == first.graph.rows).all()
        # A later call begins afresh.
        kind.calls, kind.stop = 0, None
        cage.attribute(inp, TARGET, **arguments)
        assert kind.calls == 3 * each

    def test_another_call_has_draws_of_its_own(self, interrupted, inp, tokenizer):
        """Another text is another question."""
        cage, kind = interrupted
        steps = len(tokenizer.encode(TARGET))
        kind.stop = 2 * steps + 3
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, TARGET, draws=3, strategy="loop")
        kind.calls, kind.stop = 0, None
        found = cage.attribute(inp, " So 9.", draws=2, strategy="loop")
        assert kind.calls == 2 * found.graph.n_generated


# --- intervals -----------------------------------------------------------------------


class TestIntervals:
    """How sure the scores are."""

    def test_they_cover_the_truth_as_often_as_they_say(self):
        """Of scores that are means, in 300 repetitions of ten draws."""
        rng = np.random.default_rng(0)
        truth, covered, errors = 0.45, [], []
        for number in range(6):
            values = rng.normal(truth, 0.08, size=(10, 50))
            result = drawn(values)
            np.testing.assert_allclose(result.seq_attr[::2], values.mean(axis=0))
            found = result.intervals(0.95, resamples=200, seed=number)
            assert found.level == 0.95
            assert found.draws == 10
            covered += ((found.low < truth) & (truth < found.high))[::2].tolist()
            errors += (found.standard_error[::2] / (0.08 / 10**0.5)).tolist()
        assert len(covered) == 300
        # Ten draws know their deviation by some: the interval of Student's t is wider.
        assert 0.88 <= np.mean(covered) <= 0.99
        assert np.mean(np.square(errors)) == pytest.approx(1.0, abs=0.1)

    def test_the_error_is_that_of_a_mean(self):
        """The deviation of the draws by the root of their number."""
        for count in (2, 3, 8):
            values = np.random.default_rng(count).uniform(0.2, 0.8, size=(count, 60))
            found = drawn(values).intervals(resamples=200)
            expected = values.std(axis=0, ddof=1) / count**0.5
            ratio = found.standard_error[::2] / expected
            assert np.square(ratio).mean() == pytest.approx(1.0, abs=0.06)

    def test_fewer_draws_are_less_sure(self):
        """By the root of their number."""
        rng = np.random.default_rng(1)
        widths = {}
        for count in (5, 20, 80):
            result = drawn(rng.normal(0.5, 0.08, size=(count, 20)))
            found = result.intervals(resamples=100)
            widths[count] = (found.high - found.low).mean()
        assert widths[5] > widths[20] > widths[80]
        assert widths[20] / widths[80] == pytest.approx(2.0, rel=0.2)

    def test_a_higher_level_is_wider(self):
        """And holds the lower one."""
        result = drawn(np.random.default_rng(2).normal(0.5, 0.05, size=(8, 3)))
        inner, outer = (result.intervals(x, resamples=200) for x in (0.5, 0.99))
        assert (outer.low < inner.low).all()
        assert (inner.high < outer.high).all()
        assert (inner.standard_error == outer.standard_error).all()

    def test_the_ends_are_percentiles(self):
        """Of the scores of all resamples."""
        result = drawn(np.random.default_rng(3).normal(0.5, 0.05, size=(6, 2)))
        scores = [
            graph.explain(result.weights) for graph in result.drawn.resampled(101, 7)
        ]
        found = result.intervals(0.8, resamples=101, seed=7)
        ordered = np.sort(scores, axis=0)
        np.testing.assert_allclose(found.low, ordered[10], rtol=1e-12)
        np.testing.assert_allclose(found.high, ordered[90], rtol=1e-12)

    def test_a_seed_gives_the_same(self):
        """Another one nearly so; nobody else's random numbers are drawn."""
        result = drawn(np.random.default_rng(4).normal(0.5, 0.05, size=(6, 2)))
        seed()
        before = torch.rand(1), np.random.rand()  # noqa: NPY002
        seed()
        one, same, other = (result.intervals(resamples=200, seed=i) for i in (1, 1, 2))
        assert (torch.rand(1), np.random.rand()) == before  # noqa: NPY002
        assert (one.low == same.low).all()
        assert (one.high == same.high).all()
        assert (one.low != other.low).any()
        np.testing.assert_allclose(one.low, other.low, atol=0.02)

    def test_resamples_take_all_but_one_of_the_draws(self):
        """With repetition; of one draw, that one."""
        rows = np.zeros((4, 1, 5))
        rows[range(4), 0, range(4)] = 1.0
        graphs = list(result_of(rows, [0]).drawn.resampled(200, 0))
        assert len(graphs) == 200
        counts = np.array([graph.explain([1.0]) * 3 for graph in graphs])
        np.testing.assert_allclose(counts, counts.round(), atol=1e-12)
        assert counts.sum(axis=1).round(9).tolist() == [3.0] * 200
        assert counts.max() == 3.0
        assert counts.mean(axis=0).round(1).tolist() == pytest.approx(
            [0.75] * 4, abs=0.2
        )
        alone = result_of(rows[:1], [0]).intervals(resamples=5)
        assert alone.low.tolist() == alone.high.tolist() == [1.0, 0.0, 0.0, 0.0]

    def test_the_uncertainty_of_every_row_goes_through_the_graph(self):
        """A unit that rests on another is as unsure as that one."""
        values = np.random.default_rng(5).normal(0.5, 0.1, size=(8, 1))
        rows = np.zeros((8, 2, 4))
        rows[:, 0, :1], rows[:, 0, 1:2] = values, 1.0 - values
        rows[:, 1, 2] = 3.0
        first, second = (
            result_of(rows, [step]).intervals(resamples=50) for step in (0, 1)
        )
        np.testing.assert_allclose(first.low, second.low, atol=1e-12)
        np.testing.assert_allclose(first.high, second.high, atol=1e-12)
        assert second.standard_error.min() > 0.01
        # Cut before it gets there, nothing is unsure.
        cut = result_of(rows, [1], hops=0).intervals(resamples=10)
        assert (cut.low == 0).all()
        assert (cut.high == 0).all()

    def test_another_span_has_its_own(self, cage, inp):
        """From the same draws, without a model call."""
        result = cage.attribute(inp, TARGET, draws=4, n_samples=1, explain=-1)
        for span in (0, (0, 3)):
            other = result.explaining(span)
            found = other.intervals(resamples=50)
            assert found.low.shape == (result.graph.n_sources,)
            scores = other.seq_attr.numpy()
            assert ((found.low <= scores) & (scores <= found.high)).mean() > 0.5

    @pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95, float("nan")])
    def test_levels_are_shares(self, level):
        """Between none and all."""
        result = drawn(np.full((3, 1), 0.5))
        with pytest.raises(ValueError, match=r"level: must be in \(0, 1\), but"):
            result.intervals(level)

    def test_at_least_two_resamples(self):
        """One has no deviation."""
        result = drawn(np.full((3, 1), 0.5))
        for number in (0, 1):
            with pytest.raises(ValueError, match="resamples: must be 2 or more"):
                result.intervals(resamples=number)

    def test_a_method_that_does_not_sample_is_refused(self, model, tokenizer, inp):
        """Each draw would be the same, and its interval a promise of nothing."""
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        cage = GraphContextAttribution(llm_attr)
        with pytest.raises(ValueError, match="for a method that does not sample"):
            cage.attribute(inp, TARGET, draws=3)


class TestFiles:
    """A result that is saved."""

    @pytest.mark.parametrize("foil", [None, {1: 9, -2: 9}])
    def test_draws_are_saved(self, cage, inp, tmp_path, foil):
        """With the intervals that follow from them."""
        result = cage.attribute(inp, TARGET, draws=3, n_samples=1, foil=foil)
        result.save(tmp_path / "result")
        loaded = GraphAttributionResult.load(tmp_path / "result")
        for name in ("rows", "steps", "behind", "sources"):
            one, other = getattr(loaded.drawn, name), getattr(result.drawn, name)
            assert one.dtype == other.dtype
            assert (one == other).all()
        assert loaded.drawn.normalization == result.drawn.normalization
        one, other = loaded.intervals(resamples=20), result.intervals(resamples=20)
        assert (one.low == other.low).all()
        assert (one.high == other.high).all()
        assert (loaded.seq_attr == result.seq_attr).all()

    def test_without_draws_there_are_none(self, cage, inp, tmp_path):
        """Before and afterwards."""
        cage.attribute(inp, TARGET, n_samples=1).save(tmp_path / "result")
        loaded = GraphAttributionResult.load(tmp_path / "result")
        assert loaded.drawn is None
        with pytest.raises(ValueError, match="Pass draws=10 to attribute"):
            loaded.intervals()

    def test_draws_that_do_not_fit_are_refused(self, cage, inp, tmp_path):
        """As of a file that is damaged."""
        path = tmp_path / "result.npz"
        cage.attribute(inp, TARGET, draws=2, n_samples=1).save(path)
        with np.load(path) as archive:
            arrays = dict(archive)
        arrays["drawn_rows"] = arrays["drawn_rows"][:, :, :-1]
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match="must be a result saved by"):
            GraphAttributionResult.load(path)
