"""The attention of a model, read and replaced, against the model's own."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from captum_cage.causal import Prefix
from captum_cage.methods import attention as attention_module
from captum_cage.methods.attention import (
    attended,
    attention_layers,
    attention_weights,
    replaced_attention,
)
from tiny import ARCHITECTURES, tiny_model, tiny_vision_model

VOCABULARY = 50
# More tokens than the sliding windows hold.
LENGTH = 24
GEMMA2 = {
    "model_type": "gemma2",
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 16,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 7.0,
    "attn_implementation": "eager",
}
MODELS = {
    **ARCHITECTURES,
    "gemma2": GEMMA2,
    "mistral": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "sliding_window": 16,
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
}
CASES = [
    (name, kind)
    for name in MODELS
    for kind in ("eager", "sdpa")
    if (name, kind) != ("gemma2", "sdpa")  # which transformers does not offer
]


def made(name, kind="sdpa", **changes):
    """A small model in float64, of a family and an attention implementation."""
    settings = {**MODELS[name], "attn_implementation": kind, **changes}
    return tiny_model(
        "llama", vocab_size=VOCABULARY, **{"dtype": torch.float64, **settings}
    )


def text(length=LENGTH, seed=0):
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator)


def logits(model, ids):
    """What the model says of every position."""
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def implementations(model):
    """The implementation that each module would ask for now."""
    return [
        module.config._attn_implementation
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    ]


def registered():
    """All names that transformers knows, of attention and of masks."""
    return set(AttentionInterface().valid_keys()), set(AttentionMaskInterface())


def zeros(inputs):
    """Attention that brings nothing."""
    return torch.zeros_like(inputs.query[..., : inputs.value.shape[-1]])


@pytest.fixture(scope="module")
def llama():
    """A small Llama that tests must leave as it is."""
    return made("llama")


class TestReplacedAttention:
    """The model reads through a function of ours, and as before afterwards."""

    @pytest.mark.parametrize(("name", "kind"), CASES)
    def test_plain_attention_gives_the_models_own_logits(self, name, kind):
        """Also where windows slide, scores are bounded, or heads share keys."""
        model, ids = made(name, kind), text()
        with replaced_attention(model, attended):
            found = logits(model, ids)
        expected = logits(model, ids)
        assert expected.std() > 0.01
        # Eager attention takes its softmax in float32, but not in every family.
        allowed = 1e-6 if kind == "eager" else 1e-9
        torch.testing.assert_close(found, expected, rtol=0, atol=allowed)

    @pytest.mark.parametrize("name", ["gemma3", "mistral", "gemma2"])
    def test_the_test_text_is_longer_than_the_windows(self, name):
        """Without windows these models say something else of it."""
        model, ids = made(name, "eager"), text()
        expected = logits(model, ids)

        def without(inputs):
            queries = inputs.query.shape[2]
            everything = torch.ones(queries, queries).tril().bool()[None, None]
            weights = attention_weights(inputs, allowed=everything)
            return weights.to(inputs.value.dtype) @ inputs.value

        with replaced_attention(model, without):
            found = logits(model, ids)
        torch.testing.assert_close(found[:16], expected[:16], rtol=0, atol=1e-9)
        assert (found - expected)[-1].abs().max() > 1e-4

    @pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
    def test_several_sequences_are_read_at_once(self, name):
        """Each as if alone."""
        model = made(name)
        ids = torch.stack([text(seed=seed) for seed in range(3)])
        with torch.no_grad(), replaced_attention(model, attended):
            found = model(input_ids=ids, use_cache=False).logits
        for own, one in zip(found, ids, strict=True):
            torch.testing.assert_close(own, logits(model, one), rtol=0, atol=1e-9)

    @pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mistral"])
    @pytest.mark.parametrize("start", [1, 10, LENGTH - 1])
    def test_a_text_is_read_on_from_its_prefix(self, name, start):
        """Keys that were kept from before are attended to as well."""
        model, ids = made(name), text()
        with torch.no_grad():
            kept = DynamicCache()  # which keeps more than the windows
            model(input_ids=ids[None, :start], past_key_values=kept)
            pairs = [(layer.keys, layer.values) for layer in kept.layers]
            prefix = Prefix(pairs, start)
            with replaced_attention(model, attended):
                found = model(input_ids=ids[None, start:], past_key_values=prefix)
        expected = logits(model, ids)[start:]
        torch.testing.assert_close(found.logits[0], expected, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("kind", ["eager", "sdpa"])
    @pytest.mark.parametrize("fails", [False, True])
    def test_everything_is_restored(self, kind, fails):
        """Logits, configs and registries, also after an exception."""
        model, ids = made("llama", kind), text()
        before, known = logits(model, ids), registered()

        def read(inputs):
            if fails:
                raise RuntimeError("the function failed")
            return zeros(inputs)

        def replaced():
            with replaced_attention(model, read):
                assert set(implementations(model)) != {kind}
                return logits(model, ids)

        if fails:
            with pytest.raises(RuntimeError, match="the function failed"):
                replaced()
        else:
            assert not torch.allclose(replaced(), before)
        assert set(implementations(model)) == {kind}
        assert registered() == known
        assert not any("captum_cage" in name for names in known for name in names)
        torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=0)

    def test_an_inner_replacement_ends_before_the_outer_one(self, llama):
        """Each context gives back what it found."""
        ids = text()
        before = logits(llama, ids)
        with replaced_attention(llama, zeros):
            nothing = logits(llama, ids)
            with replaced_attention(llama, attended):
                inner = logits(llama, ids)
            torch.testing.assert_close(logits(llama, ids), nothing, rtol=0, atol=0)
        torch.testing.assert_close(inner, before, rtol=0, atol=1e-9)
        assert not torch.allclose(nothing, before)
        assert set(implementations(llama)) == {"sdpa"}
        torch.testing.assert_close(logits(llama, ids), before, rtol=0, atol=0)

    @pytest.mark.parametrize("first_ends_first", [False, True])
    def test_two_models_do_not_disturb_each_other(self, first_ends_first):
        """Their contexts may end in either order."""
        one, other, ids = made("llama"), made("llama", seed=1), text()
        of_one, of_other = logits(one, ids), logits(other, ids)
        first = replaced_attention(one, zeros)
        second = replaced_attention(other, attended)
        first.__enter__()
        second.__enter__()
        assert not torch.allclose(logits(one, ids), of_one)
        torch.testing.assert_close(logits(other, ids), of_other, rtol=0, atol=1e-9)
        if first_ends_first:
            first.__exit__(None, None, None)
            assert set(implementations(other)) != {"sdpa"}
            second.__exit__(None, None, None)
        else:
            second.__exit__(None, None, None)
            assert not torch.allclose(logits(one, ids), of_one)
            first.__exit__(None, None, None)
        torch.testing.assert_close(logits(one, ids), of_one, rtol=0, atol=0)
        torch.testing.assert_close(logits(other, ids), of_other, rtol=0, atol=0)

    def test_parts_keep_implementations_of_their_own(self):
        """A vision tower in eager beside a language model that is not."""
        model = tiny_vision_model(VOCABULARY)
        model.config.vision_config._attn_implementation = "eager"
        before = implementations(model)
        assert len(set(before)) > 1
        with replaced_attention(model, attended):
            assert len(set(implementations(model))) == 1
        assert implementations(model) == before


class TestAttentionWeights:
    """Weights of some queries are those that eager attention returns."""

    @pytest.mark.parametrize("name", MODELS)
    def test_they_are_the_models_own(self, name):
        """All layers and heads, in pieces of queries."""
        model, ids = made(name, "eager"), text()
        pieces: dict[object, list] = {}

        def read(inputs):
            found = pieces.setdefault(inputs.module, [])
            for start, stop in ((0, 1), (1, 10), (10, LENGTH)):
                weights = attention_weights(inputs, start, stop, stop)
                assert weights.shape[-1] == stop
                found.append(torch.nn.functional.pad(weights[0], (0, LENGTH - stop)))
            return attended(inputs)

        with replaced_attention(model, read):
            logits(model, ids)
        with torch.no_grad():
            expected = model(ids[None], output_attentions=True).attentions
        assert len(pieces) == len(expected) == 2
        for found, weights in zip(pieces.values(), expected, strict=True):
            torch.testing.assert_close(
                torch.cat(found, dim=1).double(), weights[0].double(), rtol=0, atol=1e-6
            )


class TestAttentionLayers:
    """Models are looked at before they are read, and remembered."""

    def test_they_come_in_the_order_of_the_pass(self, llama):
        """One module per layer."""
        expected = [layer.self_attn for layer in llama.model.layers]
        assert attention_layers(llama, text(), "IFR") == expected

    def test_a_model_is_looked_at_once_per_implementation(self, monkeypatch):
        """Another implementation may read differently, so it is looked at again."""
        model, ids = made("llama"), text()
        passes = []
        model.model.register_forward_pre_hook(lambda *_: passes.append(1))
        attention_layers(model, ids, "IFR")
        first = len(passes)
        assert first >= 2
        attention_layers(model, text(seed=1), "AttnLRP")
        assert len(passes) == first
        model.set_attn_implementation("eager")
        attention_layers(model, ids, "IFR")
        assert len(passes) == 2 * first
        monkeypatch.setattr(model.model.layers[0].self_attn, "scaling", 0.3)
        attention_layers(model, ids, "IFR")
        assert len(passes) == 2 * first

    def test_no_model_is_kept_alive(self):
        """What is remembered goes with the model."""
        model = made("llama")
        attention_layers(model, text(), "IFR")
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None

    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"model_type": "mamba"}, "MambaForCausalLM"),
            ({"model_type": "bloom", "n_head": 4, "n_layer": 2}, "BloomForCausalLM"),
        ],
    )
    def test_models_without_the_interface_are_refused(self, settings, name):
        """The message names the method, the model, and what to do."""
        model = tiny_model("llama", vocab_size=VOCABULARY, **settings)
        pattern = (
            "IFR: needs a model whose layers all attend through the attention interface"
            f" of transformers, but 0 of the 2 layers of {name} do. Use a method that"
        )
        with pytest.raises(ValueError, match=pattern):
            attention_layers(model, text(), "IFR")

    def test_attention_sinks_are_refused(self):
        """Weights over tokens do not tell what the sink takes."""
        model = tiny_model(
            "llama",
            vocab_size=VOCABULARY,
            model_type="gpt_oss",
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["full_attention"] * 2,
            attn_implementation="eager",
        )
        with pytest.raises(ValueError, match="GptOssAttention attends to a sink"):
            attention_layers(model, text(), "IFR")
        assert set(implementations(model)) == {"eager"}

    def test_a_layer_that_adds_something_of_its_own_is_refused(self, monkeypatch):
        """Known by what the model says when it is read that way."""
        model = made("llama")
        own = AttentionInterface()["sdpa"]

        def other(*args, **kwargs):
            found, weights = own(*args, **kwargs)
            return 1.01 * found, weights

        monkeypatch.setitem(AttentionInterface._global_mapping, "other", other)
        masks = AttentionMaskInterface._global_mapping
        monkeypatch.setitem(masks, "other", AttentionMaskInterface()["sdpa"])
        model.config._attn_implementation = "other"
        pattern = "MeanAttention: .* LlamaForCausalLM says something else when it is"
        with pytest.raises(ValueError, match=pattern):
            attention_layers(model, text(), "MeanAttention")
        assert model not in attention_module._checked

    def test_half_types_are_accepted(self):
        """Their rounding is no sign of another attention."""
        model = made("llama", dtype=torch.bfloat16)
        assert len(attention_layers(model, text(), "IFR")) == 2
