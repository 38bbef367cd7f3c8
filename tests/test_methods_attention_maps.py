"""Attention baselines, against weights that the model itself gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import LayerIntegratedGradients, LLMGradientAttribution

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.methods import (
    AttentionRollout,
    AttentionXIntegratedGradients,
    MeanAttention,
    ValueWeightedAttention,
)
from captum_cage.testing import check_engine
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana. How many?"
TARGET = " The answer is 18. So she sells 9."
METHODS = (MeanAttention, AttentionRollout, ValueWeightedAttention)
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def small(arch="llama", dtype=torch.float64):
    """A small model."""
    return tiny_model(arch, vocab_size=len(tiny_tokenizer()), dtype=dtype)


def ids_of(text=PROMPT):
    """Token ids of a text."""
    return torch.tensor(tiny_tokenizer().encode(text))


def attentions(model, ids):
    """Attention weights of a plain pass, ``(layers, heads, n, n)``."""
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        found = torch.cat(model(ids[None], output_attentions=True).attentions)
    model.config._attn_implementation = before
    return found.double().numpy()


class TestMeanAttention:
    """Attention of the predicting position."""

    @every_architecture
    def test_it_is_the_mean_over_layers_and_heads(self, arch):
        """Of the position before each target, and of no later one."""
        model, ids = small(arch), ids_of()
        found = MeanAttention(model).rows(ids, ids[-7:])
        expected = attentions(model, ids).mean(axis=(0, 1))[-7:]
        np.testing.assert_allclose(found, expected, atol=1e-6)


class TestAttentionRollout:
    """Attention multiplied through the layers."""

    @every_architecture
    def test_it_is_the_product_with_half_residual(self, arch):
        """Each layer is the mean of its heads' mean and the identity."""
        model, ids = small(arch), ids_of()
        total = np.eye(len(ids))
        for layer in attentions(model, ids):
            total = (0.5 * layer.mean(axis=0) + 0.5 * np.eye(len(ids))) @ total
        found = AttentionRollout(model).rows(ids, ids[-7:])
        np.testing.assert_allclose(found, total[-7:], atol=1e-6)


class TestValueWeightedAttention:
    """Size of what attention brings."""

    def test_it_is_the_norm_of_weighted_transformed_values(self):
        """The vectors of all heads are summed before the norm is taken."""
        model, ids = small(), ids_of()
        weights = attentions(model, ids)
        values = []
        hooks = [
            layer.self_attn.v_proj.register_forward_hook(
                lambda _, __, out: values.append(out[0].numpy())
            )
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(ids[None])
        for hook in hooks:
            hook.remove()
        heads = model.config.num_attention_heads
        size = model.config.hidden_size // heads
        group = heads // model.config.num_key_value_heads
        n = len(ids)
        expected = np.zeros((3, n))
        for layer, module in enumerate(model.model.layers):
            output = module.self_attn.o_proj.weight.detach().numpy()
            for row in range(3):
                i = n - 3 + row
                for j in range(i + 1):
                    vector = np.zeros(model.config.hidden_size)
                    for head in range(heads):
                        own = slice(head // group * size, (head // group + 1) * size)
                        block = output[:, head * size : (head + 1) * size]
                        value = block @ values[layer][j, own]
                        vector += weights[layer, head, i, j] * value
                    expected[row, j] += np.linalg.norm(vector) / 2
        found = ValueWeightedAttention(model).rows(ids, ids[-3:])
        np.testing.assert_allclose(found, expected, atol=1e-6)


class TestAttentionXIntegratedGradients:
    """Integrated gradients, times attention."""

    def test_it_is_captums_table_times_the_predicting_positions_attention(self):
        """Not times the mean over all later positions."""
        tokenizer, model = tiny_tokenizer(), small()
        inp = TokenIdsInput(ids_of(), tokenizer)
        target = torch.tensor(tokenizer.encode(TARGET)[:3])
        plain = LLMGradientAttribution(
            LayerIntegratedGradients(model, model.get_input_embeddings()), tokenizer
        ).attribute(inp, target=target, n_steps=4)
        found = LLMGradientAttribution(
            AttentionXIntegratedGradients(model), tokenizer
        ).attribute(inp, target=target, n_steps=4)
        whole = torch.cat([ids_of(), target])
        weights = attentions(model, whole).mean(axis=(0, 1))
        first = len(ids_of())
        own = weights[first - 1 : first + 2, :first]
        np.testing.assert_allclose(
            found.token_attr, plain.token_attr.numpy() * own, rtol=1e-4, atol=1e-7
        )

    @pytest.mark.parametrize("units", ["token", "sentence"])
    @every_architecture
    def test_engine_and_loop_agree(self, arch, units):
        """Products are taken token by token, and summed for larger units."""
        method = AttentionXIntegratedGradients(small(arch))
        llm_attr = LLMGradientAttribution(method, tiny_tokenizer())
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        check_engine(llm_attr, inp, TARGET, units=units, n_steps=3)


class TestEngine:
    """All rows at once."""

    @pytest.mark.parametrize("units", ["token", "sentence"])
    @pytest.mark.parametrize("method", METHODS)
    @every_architecture
    def test_rows_are_the_loops(self, arch, method, units):
        """Whatever the architecture and the units."""
        llm_attr = LLMGradientAttribution(method(small(arch)), tiny_tokenizer())
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        check_engine(llm_attr, inp, TARGET, units=units)

    @pytest.mark.parametrize("method", METHODS)
    def test_they_work_without_the_graph(self, method):
        """Captum's object alone gives the prompt's part of the rows."""
        tokenizer, model = tiny_tokenizer(), small()
        inp = TokenIdsInput(ids_of(), tokenizer)
        llm_attr = LLMGradientAttribution(method(model), tokenizer)
        alone = llm_attr.attribute(inp, target=torch.tensor(tokenizer.encode(TARGET)))
        rows = GraphContextAttribution(llm_attr).attribute(inp, TARGET).graph.rows
        prompt = rows[:, : len(ids_of())]
        np.testing.assert_allclose(alone.token_attr, prompt, atol=1e-6)
