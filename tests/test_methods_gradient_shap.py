"""GradientSHAP between embeddings."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from captum.attr import (
    LayerGradientShap,
    LayerIntegratedGradients,
    LLMGradientAttribution,
)

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.methods import EmbeddingGradientShap
from captum_cage.testing import check_engine
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana."
TARGET = " The answer is 18."


def small(arch="llama", dtype=torch.float64):
    """A small model."""
    return tiny_model(arch, vocab_size=len(tiny_tokenizer()), dtype=dtype)


def ids_of(text=PROMPT):
    """Token ids of a text."""
    return torch.tensor(tiny_tokenizer().encode(text))


def rows(base, seed=0, **kwargs):
    """Raw rows of all units, in sentences."""
    torch.manual_seed(seed)
    llm_attr = LLMGradientAttribution(base, tiny_tokenizer())
    inp = TokenIdsInput(ids_of(), tiny_tokenizer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cage = GraphContextAttribution(llm_attr)
        return cage.attribute(inp, TARGET, units="sentence", **kwargs).graph.rows


class TestRows:
    """What the rows converge to."""

    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    def test_points_at_regular_distances_give_integrated_gradients(
        self, monkeypatch, strategy
    ):
        """With a quadrature's points in place of random ones, it is the integral."""
        model = small()
        integral = rows(
            LayerIntegratedGradients(model, model.get_input_embeddings()),
            method="riemann_middle",
            n_steps=20,
        )
        monkeypatch.setattr(torch, "rand", lambda n: (torch.arange(n) + 0.5) / n)
        found = rows(EmbeddingGradientShap(model), n_samples=20, strategy=strategy)
        # Captum keeps its weights in float32.
        np.testing.assert_allclose(found, integral, atol=1e-6)

    def test_one_sample_is_the_gradient_at_its_point(self, monkeypatch):
        """The gradient at the drawn point, times the difference to the baseline."""
        model, tokenizer = small(), tiny_tokenizer()
        monkeypatch.setattr(torch, "rand", lambda n: torch.full((n,), 0.25))
        llm_attr = LLMGradientAttribution(EmbeddingGradientShap(model), tokenizer)
        found = llm_attr.attribute(
            TokenIdsInput(ids_of(), tokenizer), target=torch.tensor([9]), n_samples=1
        )
        table = model.get_input_embeddings().weight.detach()
        here, there = table[ids_of()], table[torch.zeros_like(ids_of())]
        point = (there + 0.25 * (here - there)).requires_grad_()
        logits = model(inputs_embeds=point[None]).logits[0, -1]
        (slope,) = torch.autograd.grad(logits.log_softmax(-1)[9], point)
        expected = (slope * (here - there)).sum(-1)
        np.testing.assert_allclose(found.token_attr[0], expected, rtol=1e-5, atol=1e-8)

    def test_several_baselines_are_drawn_from(self):
        """With a baseline that is the text itself, half of the samples give nothing."""
        model, tokenizer = small(), tiny_tokenizer()
        llm_attr = LLMGradientAttribution(EmbeddingGradientShap(model), tokenizer)
        inp = TokenIdsInput(ids_of(), tokenizer)
        baselines = torch.stack([torch.zeros(len(ids_of())), torch.ones(len(ids_of()))])
        arguments = {"target": torch.tensor([9]), "n_samples": 400}
        torch.manual_seed(0)
        alone = llm_attr.attribute(inp, **arguments).token_attr.sum()
        mixed = llm_attr.attribute(inp, baselines=baselines, **arguments)
        share = float(mixed.token_attr.sum() / alone)
        assert share == pytest.approx(0.5, abs=0.1)

    def test_noise_changes_the_points(self):
        """A deviation moves embeddings, and the rows with them."""
        model = small()
        plain = rows(EmbeddingGradientShap(model), n_samples=4)
        noisy = rows(EmbeddingGradientShap(model), n_samples=4, stdevs=0.1)
        assert np.abs(plain - noisy).max() > 1e-4
        assert np.isfinite(noisy).all()

    def test_a_seed_gives_the_same_rows(self):
        """Draws come from torch's global generator."""
        model = small()
        one = rows(EmbeddingGradientShap(model), 3, n_samples=2)
        assert np.array_equal(one, rows(EmbeddingGradientShap(model), 3, n_samples=2))
        assert not np.array_equal(
            one, rows(EmbeddingGradientShap(model), 4, n_samples=2)
        )


class TestEngine:
    """All rows at once."""

    @pytest.mark.parametrize(
        ("arch", "options"),
        [*((arch, {}) for arch in ARCHITECTURES), ("llama", {"stdevs": 0.05})],
    )
    def test_means_over_many_runs_are_the_loops(self, arch, options):
        """Other draws of the same distribution."""
        method = EmbeddingGradientShap(small(arch, torch.float32))
        llm_attr = LLMGradientAttribution(method, tiny_tokenizer())
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        check_engine(
            llm_attr, inp, TARGET, units="sentence", n_samples=3, repeats=8, **options
        )


class TestErrors:
    """What is refused, and what is warned of."""

    def test_bad_numbers_are_refused(self):
        """At least one sample, and no negative deviation."""
        with pytest.raises(ValueError, match="n_samples: must be 1 or more"):
            rows(EmbeddingGradientShap(small()), n_samples=0)
        with pytest.raises(ValueError, match="stdevs: must be a deviation"):
            rows(EmbeddingGradientShap(small()), stdevs=-1.0)

    def test_captums_version_still_warns_and_names_this_one(self):
        """Captum's is degenerate with text."""
        model, tokenizer = small(), tiny_tokenizer()
        own = LayerGradientShap(model, model.get_input_embeddings())
        cage = GraphContextAttribution(LLMGradientAttribution(own, tokenizer))
        with pytest.warns(
            UserWarning, match="EmbeddingGradientShap has no such defect"
        ):
            cage.attribute(TokenIdsInput(ids_of(), tokenizer), TARGET, units="sentence")

    def test_this_one_does_not_warn(self):
        """It takes gradients where it says."""
        llm_attr = LLMGradientAttribution(
            EmbeddingGradientShap(small()), tiny_tokenizer()
        )
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            GraphContextAttribution(llm_attr).attribute(inp, TARGET, n_samples=2)
