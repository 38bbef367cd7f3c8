"""AttnLRP, against its rules written out, and books that must close."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import LLMGradientAttribution
from torch.nn import functional as F

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.engines import gradient
from captum_cage.methods import AttnLRP
from captum_cage.testing import check_engine
from tiny import tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana. How many?"
TARGET = " The answer is 18. So she sells 9."
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3"),
    *("gemma", "gemma2", "gemma3", "gpt2"),
)


def small(family="llama", dtype=torch.float64, **changes):
    """A small model of a family."""
    known = family in ("llama", "qwen3", "gemma3", "gpt2")
    arch = family if known else "llama"
    if not known:
        changes["model_type"] = family
    return tiny_model(arch, vocab_size=len(tiny_tokenizer()), dtype=dtype, **changes)


def ids_of(text=PROMPT):
    """Token ids of a text."""
    return torch.tensor(tiny_tokenizer().encode(text))


def constant(tensor):
    """The same numbers, through which nothing is propagated."""
    return tensor.detach()


def halved(tensor, share=0.5):
    """The same numbers, which take a share of what is propagated."""
    return tensor * share + tensor.detach() * (1 - share)


def rms(x, weight, eps):
    """A norm whose scale is a constant."""
    return x * constant((x.square().mean(-1, keepdim=True) + eps).rsqrt()) * weight


def turned(x, base, positions):
    """Rotary positions, of a tensor of shape ``(heads, n, size)``."""
    size = x.shape[-1]
    angles = positions[:, None] * base ** (-torch.arange(0, size, 2) / size)
    angles = torch.cat([angles, angles], dim=-1).to(x)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def llama_relevance(model, ids, target):
    """Relevance of each token for a logit, from a Llama's weights and the rules."""
    config, weights = model.config, dict(model.named_parameters())
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size, n = config.hidden_size // heads, len(ids)
    rope = getattr(config, "rope_parameters", None) or vars(config)
    base = rope["rope_theta"]
    embedded = weights["model.embed_tokens.weight"][ids].detach().requires_grad_()
    x = embedded
    for layer in range(config.num_hidden_layers):
        of = f"model.layers.{layer}."
        h = rms(x, weights[of + "input_layernorm.weight"], config.rms_norm_eps)

        def projected(name, count, h=h, of=of):
            flat = h @ weights[f"{of}self_attn.{name}.weight"].T
            return flat.view(n, count, size).transpose(0, 1)

        q = halved(turned(projected("q_proj", heads), base, torch.arange(n)), 0.25)
        k = halved(turned(projected("k_proj", groups), base, torch.arange(n)), 0.25)
        v = halved(projected("v_proj", groups))
        k = k.repeat_interleave(heads // groups, 0)
        v = v.repeat_interleave(heads // groups, 0)
        scores = q @ k.transpose(1, 2) / size**0.5
        scores = scores + torch.full((n, n), float("-inf")).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
        x = x + mixed @ weights[of + "self_attn.o_proj.weight"].T
        h = rms(x, weights[of + "post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = h @ weights[of + "mlp.gate_proj.weight"].T
        gate = gate * constant(F.silu(gate) / gate)
        up = h @ weights[of + "mlp.up_proj.weight"].T
        x = x + halved(gate * up) @ weights[of + "mlp.down_proj.weight"].T
    last = rms(x[-1], weights["model.norm.weight"], config.rms_norm_eps)
    logit = last @ weights["lm_head.weight"][target]
    (slope,) = torch.autograd.grad(logit, embedded)
    return (slope * embedded).sum(-1).detach(), float(logit.detach())


class TestRules:
    """What the modified gradients say."""

    def test_a_llama_follows_the_rules_written_out(self):
        """Relevance equals that of a forward pass written from weights and rules."""
        model, ids = small(), ids_of()
        expected, logit = llama_relevance(model, ids, 7)
        method = AttnLRP(model)
        wrapped = LLMGradientAttribution(method, tiny_tokenizer())
        found = wrapped.attribute(
            TokenIdsInput(ids, tiny_tokenizer()), target=torch.tensor([7])
        )
        # The model's norms are computed in float32, the rules' in float64.
        torch.testing.assert_close(
            found.token_attr[0].double(), expected, rtol=1e-6, atol=1e-8
        )
        assert method.conservation(ids, 7).logit == pytest.approx(logit, abs=1e-6)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_books_close(self, family):
        """Tokens, softmax, biases and positions take all of the logit."""
        books = AttnLRP(small(family)).conservation(ids_of(), 9)
        softcapped = family == "gemma2"  # its last bound on the logits keeps a little
        assert abs(books.other) < (1e-3 if softcapped else 1e-10)
        total = books.tokens + books.softmax + books.biases + books.positions
        assert total + books.other == pytest.approx(books.logit, abs=1e-12)

    @pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
    def test_products_norms_and_linear_layers_lose_nothing(self, family):
        """Without what attention adds, the tokens get the whole logit."""
        model = small(family)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "o_proj" in name:
                    parameter.zero_()
        books = AttnLRP(model).conservation(ids_of(), 9)
        assert books.tokens == pytest.approx(books.logit, abs=1e-12)

    def test_the_softmax_takes_the_half_of_constant_weights(self):
        """A token that sees only itself has a weight of one, which nothing changes."""
        model = small()
        books = AttnLRP(model).conservation(ids_of()[:1], 9)
        assert books.softmax + books.tokens == pytest.approx(books.logit, abs=1e-12)
        assert abs(books.softmax) > 1e-3

    def test_biases_take_their_part(self):
        """What biases take is what they add, times the propagated gradient."""
        model = small("qwen2")
        drawn = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(generator=drawn)
        books = AttnLRP(model).conservation(ids_of(), 9)
        assert abs(books.biases) > 1e-3
        assert abs(books.other) < 1e-10

    def test_learnt_positions_take_their_part(self):
        """GPT-2 adds an embedding of each position, which is no token's."""
        books = AttnLRP(small("gpt2")).conservation(ids_of(), 9)
        assert abs(books.positions) > 1e-3


class TestModel:
    """What becomes of the user's model."""

    @pytest.mark.parametrize("fails", [False, True])
    def test_it_is_as_it_was(self, fails):
        """Output, gradients, hooks and attention are the plain ones afterwards."""
        model, ids = small(), ids_of()

        def state():
            model.zero_grad()
            logits = model(ids[None]).logits
            logits[0, -1, 7].backward()
            gradient_of = model.get_input_embeddings().weight.grad.clone()
            hooks = sum(
                len(m._forward_hooks) + len(m._forward_pre_hooks)
                for m in model.modules()
            )
            return (
                logits.detach(),
                gradient_of,
                hooks,
                model.config._attn_implementation,
            )

        before = state()
        if fails:
            with (
                pytest.raises(RuntimeError, match="on purpose"),
                AttnLRP(model).rules(ids),
            ):
                raise RuntimeError("on purpose")
        else:
            AttnLRP(model).conservation(ids, 7)
        for one, other in zip(before, state(), strict=True):
            assert torch.equal(one, other) if torch.is_tensor(one) else one == other

    @pytest.mark.parametrize("family", ["mixtral", "gpt_neox", "mamba"])
    def test_other_families_are_refused_by_name(self, family):
        """There are no rules for them, which is said before anything is computed."""
        with pytest.raises(ValueError, match=f"of the family '{family}'. Use IFR"):
            AttnLRP(small(family, torch.float32))

    def test_a_function_is_refused(self):
        """Only a PyTorch model has an inside."""
        with pytest.raises(TypeError, match="AttnLRP: reads the inside of a PyTorch"):
            AttnLRP(print)


class TestEngine:
    """All rows at once."""

    @pytest.mark.parametrize("units", ["token", "sentence"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_rows_are_the_loops(self, family, units):
        """Whatever the family and the units."""
        dtype = torch.float32 if family == "gemma2" else torch.float64
        llm_attr = LLMGradientAttribution(
            AttnLRP(small(family, dtype)), tiny_tokenizer()
        )
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        check_engine(llm_attr, inp, TARGET, units=units)

    @pytest.mark.parametrize("start", [0, 40, 10**6])
    def test_rows_do_not_depend_on_how_many_are_taken_at_once(self, monkeypatch, start):
        """One backward pass may serve one row or many: the dearer, the more."""
        monkeypatch.setattr(gradient, "_START", {"cpu": start, "cuda": start})
        llm_attr = LLMGradientAttribution(AttnLRP(small()), tiny_tokenizer())
        check_engine(llm_attr, TokenIdsInput(ids_of(), tiny_tokenizer()), TARGET)

    def test_many_rows_take_few_backward_passes(self, monkeypatch):
        """Gradients of several units are taken together."""
        calls = []
        plain = torch.autograd.grad

        def counted(*args, **kwargs):
            calls.append(1)
            return plain(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", counted)
        llm_attr = LLMGradientAttribution(AttnLRP(small()), tiny_tokenizer())
        result = GraphContextAttribution(llm_attr).attribute(
            TokenIdsInput(ids_of(), tiny_tokenizer()), TARGET, strategy="fused"
        )
        assert result.graph.n_generated > 10
        assert len(calls) < result.graph.n_generated / 2

    def test_a_half_precision_model_gives_finite_rows(self):
        """Rules are computed in at least float32."""
        llm_attr = LLMGradientAttribution(
            AttnLRP(small(dtype=torch.bfloat16)), tiny_tokenizer()
        )
        result = GraphContextAttribution(llm_attr).attribute(
            TokenIdsInput(ids_of(), tiny_tokenizer()), TARGET
        )
        assert np.isfinite(result.graph.rows).all()
