"""Numbers: of every type and kind of model, against float64; and what is none."""

import functools

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LLMAttribution,
    TextTokenInput,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from captum_cage import GraphContextAttribution
from captum_cage.methods.catalogue import llm_attribution
from captum_cage.testing import tiny_causal_lm, tiny_tokenizer

PROMPT = "Ana has 3 pens."
TARGET = " Mia has 7."
# Largest error of an entry, as a share of the row's largest.
ALLOWED = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-2,
    torch.bfloat16: 0.15,
}
OPTIONS = {"integrated-gradients": {"n_steps": 4}, "kernel-shap": {"n_samples": 8}}
# One of each family of engines.
METHODS = (
    *("ablation", "kernel-shap", "integrated-gradients", "attnlrp", "ifr"),
    *("attention-suppression", "clp", "c-lime"),
)


def rows_of(name, model, tokenizer, strategy="fused", **arguments):
    """Raw rows, seeded."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    cage = GraphContextAttribution(llm_attribution(name, model, tokenizer))
    inp = TextTokenInput(PROMPT, tokenizer)
    arguments = {**OPTIONS.get(name, {}), **arguments}
    return cage.attribute(inp, TARGET, strategy=strategy, **arguments).graph.rows


def assert_close(found, truth, allowed):
    """Row by row, as a share of the row's largest entry."""
    largest = np.abs(truth).max(axis=1, keepdims=True)
    assert largest.min() > 0
    assert (np.abs(found - truth) / largest).max() <= allowed


@functools.lru_cache
def exact(name, dtype, strategy):
    """Rows in float64 of weights that the type holds exactly."""
    model = tiny_causal_lm().to(dtype).double()
    return rows_of(name, model, tiny_tokenizer(), strategy)


class TestTypes:
    """Rows of a rounded model are near those of the same weights in float64."""

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            *((name, torch.bfloat16) for name in METHODS),
            *((name, torch.float64) for name in METHODS[3:]),
            *((name, torch.float16) for name in METHODS[:3]),
            *((name, torch.float32) for name in METHODS[2:4]),
        ],
        ids=str,
    )
    def test_rows_are_those_of_float64(self, tokens, name, dtype):
        """Of each family of engines, against the loop in float64."""
        # In half of the pairs the loop, in half the engine, whose draws are the same.
        way = "loop" if dtype in (torch.float64, torch.float16) else "fused"
        way = "fused" if name in ("c-lime", "kernel-shap") else way
        model = tiny_causal_lm().to(dtype)
        found = rows_of(name, model, tokens)
        assert found.dtype == np.float64
        assert_close(found, exact(name, dtype, way), ALLOWED[dtype])


@pytest.fixture(scope="module")
def tokens():
    """A tokenizer that tests must leave as it is."""
    return tiny_tokenizer()


KINDS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "untied": ("llama", {"tie_word_embeddings": False}),
    "tied, gemma2": (
        "gemma2",
        {"sliding_window": 4, "tie_word_embeddings": True},
    ),
    "window": ("mistral", {"sliding_window": 4}),
    "window, gemma3": ("gemma3", {"sliding_window": 4}),
    "soft-capped": (
        "gemma2",
        {
            "sliding_window": 4,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "olmoe": ("olmoe", {}),
}


class TestModels:
    """What a model does inside changes nothing."""

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            *(("ablation", kind) for kind in list(KINDS)[1::2]),
            *(("gradient-x-activation", kind) for kind in KINDS),
        ],
    )
    def test_engines_give_the_loop_s_rows(self, tokens, kind, name):
        """The text is longer than the windows."""
        arch, changes = KINDS[kind]
        # Torch mixes no experts in float64.
        dtype = torch.float32 if "mo" in arch or "mix" in arch else torch.float64
        model = tiny_causal_lm(arch, dtype=dtype, **changes)
        if (wanted := changes.get("tie_word_embeddings")) is not None:
            output, into = model.get_output_embeddings(), model.get_input_embeddings()
            assert (output.weight is into.weight) == wanted
        allowed = 1e-10 if dtype == torch.float64 else ALLOWED[dtype]
        loop = rows_of(name, model, tokens, "loop")
        assert_close(rows_of(name, model, tokens), loop, allowed)

    # flex_attention compiles for minutes on a CPU.
    @pytest.mark.parametrize("attention", ["eager", "flash"])
    @pytest.mark.parametrize("name", ["ablation", "integrated-gradients", "attnlrp"])
    def test_every_way_to_attend_gives_the_same_rows(self, tokens, attention, name):
        """As PyTorch's own, ``sdpa``."""
        if attention == "flash" and not torch.cuda.is_available():
            pytest.skip("flash attention needs a GPU")
        model = tiny_causal_lm()
        truth = rows_of(name, model, tokens)
        implementation = "flash_attention_2" if attention == "flash" else attention
        try:
            model.set_attn_implementation(implementation)
        except ImportError as error:
            pytest.skip(f"{attention} is not installed: {error}")
        assert_close(rows_of(name, model, tokens), truth, 1e-4)
        assert model.config._attn_implementation == implementation

    @pytest.mark.parametrize(
        ("side", "pad"), [("left", "its own"), ("left", "eos"), ("right", "none")]
    )
    def test_padding_changes_nothing(self, side, pad):
        """Texts of a batch differ in length; nothing is padded by the tokenizer."""
        plain, padded = tiny_tokenizer(), tiny_tokenizer()
        padded.padding_side = side
        if pad != "its own":
            padded.pad_token = padded.eos_token if pad == "eos" else None
        model = tiny_causal_lm()
        expected = rows_of("ablation", model, plain, units="word", batch_size=3)
        found = rows_of("ablation", model, padded, units="word", batch_size=3)
        assert (found == expected).all()
        assert padded.padding_side == side

    @pytest.mark.parametrize(
        ("kind", "config"),
        [
            (
                T5ForConditionalGeneration,
                T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1),
            ),
            (
                BartForConditionalGeneration,
                BartConfig(
                    vocab_size=16,
                    d_model=16,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_ffn_dim=8,
                    decoder_ffn_dim=8,
                ),
            ),
        ],
        ids=["T5", "BART"],
    )
    def test_an_encoder_decoder_is_refused_at_once(self, tokens, kind, config):
        """It does not read prompt and text as one sequence."""
        llm_attr = LLMAttribution(FeatureAblation(kind(config)), tokens)
        with pytest.raises(ValueError, match=r"an encoder-decoder\. Use a causal"):
            GraphContextAttribution(llm_attr)


def banning(model, token, *, after=None):
    """A model that gives a token no probability, everywhere or in some texts."""
    forward = model.forward

    @functools.wraps(forward)
    def banned(*args, **kwargs):
        found = forward(*args, **kwargs)
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        found.logits = found.logits.clone()
        rows = slice(None) if after is None else (ids == after).any(dim=1)
        found.logits[rows, :, token] = float("-inf")
        return found

    model.forward = banned
    return model


class TestNoNumbers:
    """What is no number is named, by unit, before it is taken for one."""

    @pytest.mark.parametrize("strategy", ["fused", "loop"])
    @pytest.mark.parametrize("name", ["ablation", "kernel-shap", "c-lime", "l-shap"])
    def test_a_perturbed_text_that_gives_nan_is_named(self, tokens, name, strategy):
        """By what is absent from it, and by the unit that is scored."""
        model = tiny_causal_lm()
        absent = tokens.encode("x")[0]
        with torch.no_grad():
            model.get_input_embeddings().weight[absent] = float("nan")
        cage = GraphContextAttribution(llm_attribution(name, model, tokens))
        inp = TextTokenInput(PROMPT, tokens, baselines=absent)
        options = OPTIONS.get(name, {})
        named = (
            r"nan came for generated unit 0, ' Mia', without .*unit \d, '.*Look for NaN"
        )
        torch.manual_seed(0)
        with pytest.raises(ValueError, match=named):
            cage.attribute(inp, TARGET, strategy=strategy, **options)

    @pytest.mark.parametrize("strategy", ["fused", "loop"])
    def test_a_gradient_that_is_nan_is_named(self, tokens, strategy):
        """By its row and by its unit."""
        model = tiny_causal_lm()
        absent = tokens.encode("x")[0]
        with torch.no_grad():
            model.get_input_embeddings().weight[absent] = float("nan")
        wrapped = llm_attribution("integrated-gradients", model, tokens)
        inp = TextTokenInput(PROMPT, tokens, baselines=absent)
        with pytest.raises(ValueError, match="nan came for unit 0, 'Ana', in the row"):
            GraphContextAttribution(wrapped).attribute(
                inp, TARGET, strategy=strategy, n_steps=2
            )

    @pytest.mark.parametrize("name", ["ablation", "attnlrp", "attention-suppression"])
    def test_a_text_whose_plain_score_is_nan_is_named(self, tokens, name):
        """A token whose embedding is none spoils all after it."""
        model = tiny_causal_lm(tie_word_embeddings=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokens.encode(" Mia")[0]] = float("nan")
        with pytest.raises(ValueError, match=r"nan came for generated token \d, ' "):
            rows_of(name, model, tokens)

    def test_attention_that_is_nan_is_no_matter_of_the_model_s_form(self, tokens):
        """The error is of numbers."""
        model = tiny_causal_lm()
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="IFR: needs a model that gives numbers"):
            rows_of("ifr", model, tokens)

    @pytest.mark.parametrize("name", ["ablation", "gradient-x-activation", "lime"])
    @pytest.mark.parametrize("strategy", ["fused", "loop"])
    def test_a_token_of_probability_zero_is_named(self, tokens, name, strategy):
        """Its log-probability is no number to attribute."""
        model = banning(tiny_causal_lm(), tokens.encode(TARGET)[1])
        options = {"n_samples": 8} if name == "lime" else {}
        named = "token 1, ' has', in generated unit 1, ' has', has probability 0"
        with pytest.raises(ValueError, match=named):
            rows_of(name, model, tokens, strategy, **options)

    def test_its_probability_can_be_attributed(self, tokens):
        """Zero is a number."""
        model = banning(tiny_causal_lm(), tokens.encode(TARGET)[1])
        wrapped = LLMAttribution(FeatureAblation(model), tokens, attr_target="prob")
        inp = TextTokenInput(PROMPT, tokens)
        for strategy in ("fused", "loop"):
            found = GraphContextAttribution(wrapped).attribute(
                inp, TARGET, strategy=strategy
            )
            assert (found.graph.rows[1] == 0).all()
            assert np.isfinite(found.graph.rows).all()

    def test_other_banned_tokens_are_no_matter(self, tokens):
        """As those by which a vocabulary is filled up; attention is read, too."""
        model = banning(tiny_causal_lm(), tokens.encode("x")[0])
        for name in ("ablation", "ifr", "attnlrp"):
            assert np.isfinite(rows_of(name, model, tokens)).all()

    def test_a_token_that_is_banned_in_some_texts_is_named(self, tokens):
        """By what is absent."""
        absent, token = tokens.encode("x")[0], tokens.encode(TARGET)[1]
        model = banning(tiny_causal_lm(), token, after=absent)
        cage = GraphContextAttribution(LLMAttribution(KernelShap(model), tokens))
        inp = TextTokenInput(PROMPT, tokens, baselines=absent)
        named = r"-inf came for generated unit 1, ' has', without unit \d.*attr_target"
        with pytest.raises(ValueError, match=named):
            cage.attribute(inp, TARGET, strategy="loop", n_samples=8)

    def test_numbers_too_large_for_float16_are_refused(self, tokens):
        """Not scored as something else."""
        model = tiny_causal_lm().half()
        with torch.no_grad():
            model.model.norm.weight.mul_(6e4)
        with pytest.raises(ValueError, match=r"(nan|inf) came.*wider number type"):
            rows_of("ablation", model, tokens)
