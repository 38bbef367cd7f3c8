"""Attention blocks taken apart, against what the model's own layers say."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from captum_cage.methods import blocks as blocks_module
from captum_cage.methods.blocks import visit_blocks
from tiny import ARCHITECTURES, tiny_model

VOCABULARY = 50
LENGTH = 24
MODELS = {
    **ARCHITECTURES,
    "gemma2": {
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 7.0,
    },
    "mistral": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "sliding_window": 16,
    },
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
}
# Where the residual stream goes on after the attention block.
FOLLOWING = {
    "gpt2": "ln_2",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "olmo2": "mlp",
}


def made(name, **changes):
    """A small model in float64, whose norms and biases are not trivial."""
    settings = {"dtype": torch.float64, **MODELS[name], **changes}
    settings.setdefault("attn_implementation", "eager")
    model = tiny_model("llama", vocab_size=VOCABULARY, **settings)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.data += 0.5 * noise.to(parameter)
    return model


def text(length=LENGTH, seed=0):
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator)


def decoder_layers(model):
    """The layers of a model."""
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def plain_pass(model, ids, name):
    """Attention weights, and the stream before and after each attention block."""
    before, after, handles = [], [], []

    def into(found):
        def keep(_, args, kwargs):
            found.append((args[0] if args else kwargs["hidden_states"])[0])

        return keep

    for layer in decoder_layers(model):
        following = getattr(layer, FOLLOWING.get(name, "post_attention_layernorm"))
        for module, found in ((layer, before), (following, after)):
            hook = module.register_forward_pre_hook(into(found), with_kwargs=True)
            handles.append(hook)
    with torch.no_grad():
        attentions = model(ids[None], output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    return [weights[0] for weights in attentions], before, after


def visited(model, ids, first=0):
    """All blocks that are visited."""
    found = []
    visit_blocks(model, ids, first, found.append, "IFR")
    return found


@pytest.mark.parametrize("name", MODELS)
class TestBlocks:
    """What a block holds is what flows through the model."""

    def test_stream_and_attention_are_the_models_own(self, name):
        """Before, after and the weights, of every layer."""
        model, ids = made(name), text()
        weights, before, after = plain_pass(model, ids, name)
        blocks = visited(model, ids)
        assert [block.layer for block in blocks] == [0, 1]
        for block, *expected in zip(blocks, before, after, weights, strict=True):
            found = (block.before, block.after, block.attention.double())
            for own, other in zip(found, expected, strict=True):
                torch.testing.assert_close(own, other.double(), rtol=0, atol=1e-5)

    def test_what_heads_bring_adds_up(self, name):
        """All parts and the bias, the same at each position, are the difference."""
        model, ids = made(name), text(8)
        for block in visited(model, ids):
            heads, some, tokens = block.weights.shape
            total = torch.zeros_like(block.after)
            for h in range(heads):
                for i in range(some):
                    for j in range(tokens):
                        part = block.values[h, j] @ block.output[h]
                        total[i] += block.weights[h, i, j] * part
            bias = block.after - block.before - total
            assert total.abs().max() > 1e-3
            torch.testing.assert_close(
                bias, bias[:1].expand_as(bias), rtol=0, atol=1e-5
            )
            if name != "gpt2":
                assert bias.abs().max() < 1e-5

    def test_a_second_visit_finds_the_same(self, name):
        """The checks of the first one leave nothing behind."""
        if name == "gemma2":
            pytest.skip("has a test of its own")
        model, ids = made(name), text(8)
        once, again = visited(model, ids), visited(model, ids)
        assert len(once) == len(again) == 2
        for one, other in zip(once, again, strict=True):
            torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=0)


def test_each_block_is_visited_once_in_models_that_bound_their_logits():
    """Gemma 2 as any other, in the first call and the second."""
    model, ids = made("gemma2"), text(8)
    for _ in range(2):
        assert [block.layer for block in visited(model, ids)] == [0, 1]


class TestPieces:
    """Positions come in pieces, and only those of interest."""

    @pytest.mark.parametrize("first", [0, 1, 7, LENGTH - 1])
    @pytest.mark.parametrize("together", [1, 5, 128])
    def test_pieces_are_parts_of_the_whole(self, monkeypatch, first, together):
        """They cover the positions from the first one on, once each."""
        model, ids = made("llama", attn_implementation="sdpa"), text()
        whole = visited(model, ids)
        monkeypatch.setattr(blocks_module, "_QUERIES", together)
        pieces = visited(model, ids, first)
        seen = {0: [], 1: []}
        for piece in pieces:
            assert piece.stop - piece.start <= together
            seen[piece.layer] += range(piece.start, piece.stop)
            expected = whole[piece.layer]
            some = slice(piece.start, piece.stop)
            cut = expected.weights[:, some, : piece.stop]
            torch.testing.assert_close(piece.weights, cut, rtol=0, atol=1e-9)
            torch.testing.assert_close(
                piece.after, expected.after[some], rtol=0, atol=1e-9
            )
        assert seen == {0: [*range(first, LENGTH)], 1: [*range(first, LENGTH)]}

    def test_no_piece_outlives_its_visit(self, monkeypatch):
        """When the next weights are made, the last ones are gone."""
        model, ids = made("llama", attn_implementation="sdpa"), text()
        visited(model, ids)
        monkeypatch.setattr(blocks_module, "_QUERIES", 4)
        own, alive, most = blocks_module.attention_weights, [], []

        def counted(*args, **kwargs):
            found = own(*args, **kwargs)
            alive.append(weakref.ref(found))
            most.append(sum(one() is not None for one in alive))
            return found

        monkeypatch.setattr(blocks_module, "attention_weights", counted)
        visit_blocks(model, ids, 0, lambda _: None, "IFR")
        assert len(alive) == 2 * math.ceil(LENGTH / 4)
        assert max(most) <= 2

    def test_one_pass_serves_all_blocks(self):
        """After the model was looked at."""
        model, ids = made("llama", attn_implementation="sdpa"), text()
        visited(model, ids)
        passes = []
        model.model.register_forward_pre_hook(lambda *_: passes.append(1))
        visited(model, ids)
        visited(model, text(seed=1))
        assert len(passes) == 2

    def test_half_types_are_visited_in_float32(self):
        """All parts are wide and finite."""
        model, ids = made("gemma3", dtype=torch.bfloat16), text()
        for block in visited(model, ids):
            for part in (block.weights, block.values, block.output, block.after):
                assert part.dtype == torch.float32
                assert part.isfinite().all()

    def test_a_block_that_brings_nothing_is_finite(self):
        """Values of zero, also where a norm follows the block."""
        model, ids = made("gemma3"), text(8)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.data.zero_()
        for block in visited(model, ids):
            assert block.weights.isfinite().all()
            torch.testing.assert_close(block.after, block.before, rtol=0, atol=0)


class TestRefused:
    """Models of another form are refused by name."""

    @pytest.mark.parametrize(
        ("kind", "name"),
        [("gpt_neox", "GPTNeoXForCausalLM"), ("phi", "PhiForCausalLM")],
    )
    def test_parallel_blocks_are_refused(self, kind, name):
        """Their feed-forward part does not read stream plus attention."""
        model = tiny_model("llama", vocab_size=VOCABULARY, model_type=kind)
        pattern = (
            "IFR: needs decoder layers that add attention to the residual stream, and "
            f"then the rest, but {name} came: what follows its attention does not"
        )
        for _ in range(2):  # nothing is remembered of it
            with pytest.raises(ValueError, match=pattern):
                visited(model, text())

    def test_heads_that_do_not_add_up_are_refused(self, monkeypatch):
        """An output layer that is not linear is none that can be taken apart."""
        model = made("llama", hidden_act="relu")
        for layer in model.model.layers:
            projection = layer.self_attn.o_proj
            own = projection.forward
            monkeypatch.setattr(projection, "forward", lambda x, own=own: own(x).abs())
        with pytest.raises(ValueError, match="LlamaForCausalLM came: its heads do not"):
            visited(model, text())

    def test_attention_without_a_known_output_layer_is_refused(self, monkeypatch):
        """There is no weight to bring values to the stream by."""
        monkeypatch.setattr(blocks_module, "_OUTPUTS", ("out_proj",))
        with pytest.raises(ValueError, match="its attention has no output layer"):
            visited(made("llama"), text())
