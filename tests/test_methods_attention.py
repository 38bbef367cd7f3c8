"""The attention of a model, read and replaced."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from captum_cage.methods.attention import (
    attended,
    attention_layers,
    attention_weights,
    replaced_attention,
)
from captum_cage.methods.blocks import visit_blocks
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

IDS = torch.arange(40) + 10
FAMILIES = (*ARCHITECTURES, "mistral", "qwen2", "gemma", "gemma2", "olmo2")


def small(family, **changes):
    """A small model of a family."""
    if family not in ARCHITECTURES:
        changes["model_type"] = family
        family = "llama"
    return tiny_model(family, vocab_size=len(tiny_tokenizer()), **changes)


def registered():
    """Names under which attention and masks are registered."""
    return set(AttentionInterface().keys()), set(AttentionMaskInterface().keys())


class TestReplaced:
    """Attention by a function."""

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_same_function_gives_the_same_logits(self, family, implementation):
        """Sliding windows, groups of heads, soft caps and scales are all handed on."""
        if family == "gemma2" and implementation == "sdpa":
            pytest.skip("PyTorch's attention has no soft cap")
        model = small(family)
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            plain = model(IDS[None]).logits
            with replaced_attention(model, attended):
                found = model(IDS[None]).logits
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)

    def test_weights_of_some_queries_are_those_of_all(self):
        """A piece of the queries and keys has the weights of the whole."""
        model = small("gemma3")
        seen = []

        def attend(inputs):
            whole = attention_weights(inputs)
            some = attention_weights(inputs, 20, 30, 30)
            seen.append((whole[:, :, 20:30, :30] - some).abs().max())
            return attended(inputs)

        with torch.no_grad(), replaced_attention(model, attend):
            model(IDS[None])
        assert len(seen) == 2
        assert max(seen) < 1e-6

    @pytest.mark.parametrize("fails", [False, True])
    def test_all_is_as_it_was(self, fails):
        """Config and registries hold nothing of ours afterwards, failed or not."""
        model = small("llama")
        before = registered(), model.config._attn_implementation

        def attend(inputs):
            if fails:
                raise RuntimeError("on purpose")
            return attended(inputs)

        if fails:
            replaced = replaced_attention(model, attend)
            with pytest.raises(RuntimeError, match="on purpose"), replaced:
                model(IDS[None])
        else:
            with replaced_attention(model, attend):
                model(IDS[None])
        assert (registered(), model.config._attn_implementation) == before

    def test_two_models_do_not_mix(self):
        """Each model attends by its own function, one inside the other."""
        one, other = small("llama"), small("qwen3")
        asked = []

        def noted(name):
            def attend(inputs):
                asked.append(name)
                return attended(inputs)

            return attend

        with (
            replaced_attention(one, noted("one")),
            replaced_attention(other, noted("other")),
        ):
            one(IDS[None])
            other(IDS[None])
        assert asked == ["one", "one", "other", "other"]


class TestLayers:
    """Which layers attend."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_all_are_found_in_order(self, family):
        """One per layer of the model."""
        model = small(family)
        found = attention_layers(model, IDS, "X")
        assert [module.layer_idx for module in found] == [0, 1]

    @pytest.mark.parametrize("family", ["mamba", "bloom"])
    def test_models_beside_the_interface_are_refused(self, family):
        """Their layers cannot be read."""
        with pytest.raises(ValueError, match=r"X: needs a model whose layers all"):
            attention_layers(small(family), IDS, "X")

    def test_sinks_are_refused(self):
        """A softmax over more than tokens is another thing."""
        with pytest.raises(ValueError, match="attends to a sink besides"):
            attention_layers(small("gpt_oss"), IDS, "X")

    def test_a_model_is_looked_at_again_when_its_attention_changes(self):
        """What was found holds for one implementation."""
        model = small("llama")
        attention_layers(model, IDS, "X")
        calls = []
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        attention_layers(model, IDS, "X")
        assert not calls
        model.set_attn_implementation("eager")
        attention_layers(model, IDS, "X")
        assert calls


class TestBlocks:
    """Attention blocks, taken apart."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_parts_add_up_to_what_follows_the_block(self, family):
        """Stream, parts and a constant are what the rest of the layer reads."""
        model = small(family, dtype=torch.float64)
        entered = {}
        first_read = {"gpt2": "ln_2", "olmo2": "mlp"}.get(
            family,
            "pre_feedforward_layernorm"
            if family in ("gemma2", "gemma3")
            else "post_attention_layernorm",
        )
        layers = model.transformer.h if family == "gpt2" else model.model.layers
        for number, layer in enumerate(layers):

            def keep(_, args, number=number):
                entered[number] = args[0][0]

            getattr(layer, first_read).register_forward_pre_hook(keep)
        seen = []

        def visit(block):
            seen.append((block.layer, block.start, block.after))
            brought = (block.weights @ block.values @ block.output).sum(dim=0)
            rest = block.after - block.before - brought
            torch.testing.assert_close(
                rest, rest[:1].expand_as(rest), atol=1e-6, rtol=0
            )

        visit_blocks(model, IDS, 5, visit, "X")
        for layer, start, after in seen[-2:]:
            torch.testing.assert_close(
                after, entered[layer][start:].double(), atol=1e-6, rtol=1e-6
            )

    def test_values_with_biases_are_part_of_what_is_brought(self):
        """A value's bias reaches the stream through each token that is attended to."""
        model = small("qwen2", dtype=torch.float64)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("v_proj.bias"):
                    parameter.normal_()

        def visit(block):
            brought = (block.weights @ block.values @ block.output).sum(dim=0)
            torch.testing.assert_close(block.after - block.before, brought)

        visit_blocks(model, IDS, 0, visit, "X")
