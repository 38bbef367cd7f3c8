"""Engines, against the loop: one Captum call per generated unit."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValues,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)
from torch import nn

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage import scoring as scoring_module
from captum_cage.causal import CausalModel
from captum_cage.engines import Engine, register_engine
from captum_cage.engines import columns as columns_module
from captum_cage.engines import gradient as gradient_module
from captum_cage.engines import memory as memory_module
from captum_cage.engines import sequences as sequences_module
from captum_cage.engines import verification as verification_module
from captum_cage.engines.columns import Columns, scored_subsets
from captum_cage.engines.engine import Unsuitable
from captum_cage.engines.registry import _engines, engine_names
from captum_cage.engines.sequences import Perturbation, SequenceScorer
from captum_cage.inputs import Prompt
from captum_cage.methods.gradient_shap import EmbeddingGradientShap
from captum_cage.task import RowTask, text_units
from captum_cage.testing import check_engine
from captum_cage.units import split_units
from conftest import PROMPT
from tiny import (
    ARCHITECTURES,
    image_input,
    inputs_of_each_kind,
    tiny_model,
    tiny_tokenizer,
)

SHORT = "Ana has 3 pens."
ANSWER = " Mia has 7. So"
GRADIENT = (LayerIntegratedGradients, LayerGradientXActivation, LayerGradientShap)
METHODS = {
    FeatureAblation: {},
    ShapleyValueSampling: {"n_samples": 2},
    ShapleyValues: {},
    Lime: {"n_samples": 6},
    KernelShap: {"n_samples": 6},
    LayerIntegratedGradients: {"n_steps": 3},
    LayerGradientXActivation: {},
    LayerGradientShap: {"n_samples": 2},
}
DETERMINISTIC = (
    FeatureAblation,
    ShapleyValues,
    LayerIntegratedGradients,
    LayerGradientXActivation,
)
KINDS = list(inputs_of_each_kind(tiny_tokenizer(), PROMPT))

pytestmark = pytest.mark.filterwarnings("ignore:LayerGradientShap")


def wrapped(method, model, tokenizer, *, attr_target="log_prob", layer=None, **made):
    """A base method in Captum's wrapper for language models."""
    if issubclass(method, GRADIENT):
        layer = model.get_input_embeddings() if layer is None else layer
        return LLMGradientAttribution(method(model, layer, **made), tokenizer)
    return LLMAttribution(method(model, **made), tokenizer, attr_target=attr_target)


def explained(llm_attr, inp, target, strategy, **arguments):
    """The result of a fresh wrapper, with Torch and NumPy seeded."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    cage = GraphContextAttribution(llm_attr)
    return cage.attribute(inp, target, strategy=strategy, **arguments)


def assert_same_rows(found, expected, allowed=1e-5):
    """Equal up to a share of the largest entry, of which there must be one."""
    assert found.shape == expected.shape
    largest = np.abs(expected).max()
    assert largest > 0
    assert np.abs(found - expected).max() <= allowed * largest


def assert_equals_loop(
    llm_attr, inp, target, *, allowed=1e-5, strategy="fused", **arguments
):
    """The engine gives the loop's rows; which they are."""
    loop = explained(llm_attr, inp, target, "loop", **arguments)
    found = explained(llm_attr, inp, target, strategy, **arguments)
    assert loop.meta["strategy"] == "loop"
    assert strategy == "auto" or found.meta["strategy"] == "fused"
    assert_same_rows(found.graph.rows, loop.graph.rows, allowed)
    return loop.graph.rows


class Recorder:
    """Every forward pass of a class of models, and what goes wrong in it."""

    def __init__(self, monkeypatch, kind):
        self.asked = []  # shape of each pass
        self.passed = []  # shape of each pass that succeeded
        self.failure = lambda *_: None  # of the number of the pass and its ids
        forward = kind.forward

        @functools.wraps(forward)
        def record(model, *args, **kwargs):
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.asked.append(tuple(ids.shape))
            error = self.failure(len(self.asked), ids)
            if error is not None:
                raise error
            found = forward(model, *args, **kwargs)
            self.passed.append(tuple(ids.shape))
            return found

        monkeypatch.setattr(kind, "forward", record)

    @property
    def sequences(self):
        """Number of sequences that were pushed through the model."""
        return sum(shape[0] for shape in self.passed)

    @property
    def tokens(self):
        """Number of tokens that were pushed through the model."""
        return sum(shape[0] * shape[1] for shape in self.passed)

    def clear(self):
        """Forget all passes."""
        self.asked.clear()
        self.passed.clear()


class Forgetful(dict):
    """A memory of verdicts that keeps none."""

    def __setitem__(self, model, verdict):
        """Nothing is kept."""


@pytest.fixture
def passes(model, monkeypatch):
    """Passes of the small Llama, the same in each call."""
    monkeypatch.setattr(verification_module, "_verdicts", Forgetful())
    return Recorder(monkeypatch, type(model))


class TestVerdicts:
    """A model is found out once, and again where that says nothing of the new case."""

    @pytest.fixture
    def counted(self, fresh_model, tokenizer, monkeypatch):
        """Passes of one call about a text of so many tokens."""
        recorder = Recorder(monkeypatch, type(fresh_model))

        def count(tokens, method=FeatureAblation):
            recorder.clear()
            llm_attr = wrapped(method, fresh_model, tokenizer)
            target = tokenizer.encode(ANSWER)[:tokens]
            explained(llm_attr, TextTokenInput("Ana has", tokenizer), target, "fused")
            return len(recorder.passed)

        return count

    def test_the_second_call_makes_no_checks(self, counted):
        """Two passes fewer: one at the end of a text, one from its prefix."""
        assert counted(6) == counted(6) + 2
        assert counted(4) == counted(4)

    def test_a_longer_text_is_checked_anew(self, counted):
        """Windows and position encodings may end between the two."""
        counted(4)
        assert counted(6) == counted(6) + 2

    def test_gradients_find_out_one_half_of_it(self, counted):
        """Whether a prefix can be read on is left to ablation."""
        first = counted(6, LayerGradientXActivation)
        assert counted(6, LayerGradientXActivation) == first - 1
        assert counted(6) == counted(6) + 1

    def test_another_forward_is_another_model(self, fresh_model, tokenizer, counted):
        """Replaced on the object itself, it is found out to look ahead."""
        counted(6)
        plain = fresh_model.forward

        @functools.wraps(plain)
        def looking_ahead(*args, **kwargs):
            found = plain(*args, **kwargs)
            ids = kwargs["input_ids"]
            found.logits = found.logits * (1 + ids.shape[1])
            return found

        fresh_model.forward = looking_ahead
        llm_attr = wrapped(FeatureAblation, fresh_model, tokenizer)
        target = tokenizer.encode(ANSWER)[:6]
        with pytest.raises(ValueError, match="when more text follows"):
            explained(llm_attr, TextTokenInput("Ana has", tokenizer), target, "fused")


@pytest.fixture
def backwards(monkeypatch):
    """Shape of what each gradient of the engine is taken by, a state's own aside."""
    shapes = []
    grad = torch.autograd.grad

    def record(outputs, inputs, *args, **kwargs):
        leaf = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
        if leaf.dim() == 3:
            shapes.append(tuple(leaf.shape))
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(gradient_module.torch.autograd, "grad", record)
    return shapes


@pytest.fixture
def inp(tokenizer):
    """A prompt of one sentence."""
    return TextTokenInput(SHORT, tokenizer)


@pytest.fixture
def target(tokenizer):
    """Ids of a sentence and a bit."""
    return tokenizer.encode(ANSWER)


OWN_RANGES = {
    "source": [(0, 7), (7, 9)],
    "generated": lambda text: [(0, 4), (4, 7), (7, len(text))],
}


# --- models ------------------------------------------------------------------------

MODELS = {
    **{name: dict(changes) for name, changes in ARCHITECTURES.items()},
    "gemma3": {**ARCHITECTURES["gemma3"], "sliding_window": 8},
    "mistral, window": {"model_type": "mistral", "sliding_window": 8},
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gemma2, softcap": {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
    },
    "granite, scaled": {"model_type": "granite", "logits_scaling": 4.0},
    "cohere, scaled": {"model_type": "cohere", "logit_scale": 0.25},
    "gpt_neox": {"model_type": "gpt_neox"},
    "opt": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"model_type": "bloom", "n_layer": 2, "n_head": 4},
    "qwen2": {"model_type": "qwen2"},
    "phi3": {"model_type": "phi3"},
    "falcon": {"model_type": "falcon"},
    "falcon, alibi": {"model_type": "falcon", "alibi": True},
    "mpt": {
        "model_type": "mpt",
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 256,
    },
    "llama4, chunks": {
        "model_type": "llama4_text",
        "head_dim": 8,
        "num_local_experts": 2,
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 64,
    },
    "mamba": {"model_type": "mamba", "state_size": 4},
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        "lru_width": 32,
        "attention_window_size": 8,
        "num_hidden_layers": 3,
    },
    "bamba": {
        "model_type": "bamba",
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
        "attn_layer_indices": [1],
    },
}
RECURRENT = {"mamba", "recurrent_gemma", "bamba"}
IN_FLOAT64 = [
    "llama",
    "gpt2",
    "qwen3",
    "gemma3",
    "mistral, window",
    "granite, scaled",
    "cohere, scaled",
    "gpt_neox",
    "opt",
    "qwen2",
    "phi3",
    "falcon",
]


def own_model(name, tokenizer, **changes):
    """A model of MODELS, or a skipped test where transformers cannot make it."""
    try:
        return tiny_model(vocab_size=len(tokenizer), **{**MODELS[name], **changes})
    except (ImportError, KeyError, ValueError) as error:
        pytest.skip(f"transformers makes no tiny {name}: {error}")


class TestModels:
    """Whatever a model does inside, the rows are the loop's."""

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("method", [FeatureAblation, LayerIntegratedGradients])
    def test_every_architecture_gives_the_loop_s_rows(self, tokenizer, name, method):
        """By its engine; the text is longer than the windows."""
        model = own_model(name, tokenizer)
        prompt = TextTokenInput(SHORT + " Mia", tokenizer)
        target = tokenizer.encode(ANSWER)[:5]
        assert prompt.n_itp_features + len(target) > 8 + 2
        assert_equals_loop(
            wrapped(method, model, tokenizer),
            prompt,
            target,
            strategy="auto" if name in RECURRENT else "fused",
            **({"n_steps": 2} if method in GRADIENT else {}),
        )

    @pytest.mark.parametrize("name", IN_FLOAT64)
    @pytest.mark.parametrize(
        "method", [FeatureAblation, LayerIntegratedGradients, LayerGradientXActivation]
    )
    def test_float64_models_agree_to_ten_digits(
        self, tokenizer, inp, target, name, method
    ):
        """What Captum computes in float64, the engine computes in float64."""
        model = own_model(name, tokenizer, dtype=torch.float64)
        kwargs = {"n_steps": 2} if method is LayerIntegratedGradients else {}
        assert_equals_loop(
            wrapped(method, model, tokenizer), inp, target, allowed=1e-10, **kwargs
        )

    @pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("method", [FeatureAblation, LayerGradientXActivation])
    def test_half_models_agree_within_their_rounding(
        self, tokenizer, inp, target, name, dtype, method
    ):
        """Nearer to the loop than the loop is to float32, or nearly."""
        model = own_model(name, tokenizer, dtype=dtype)
        single = own_model(name, tokenizer).float()
        loop, fused, exact = (
            explained(wrapped(method, made, tokenizer), inp, target, way).graph.rows
            for made, way in ((model, "loop"), (model, "fused"), (single, "loop"))
        )
        rounding = np.abs(loop - exact).max()
        assert rounding > 0
        assert np.abs(fused - loop).max() <= 3 * rounding
        assert np.abs(fused - exact).max() <= 3 * rounding

    @pytest.mark.parametrize("name", ["gemma2, softcap", "granite, scaled"])
    def test_one_token_of_a_model_that_changes_its_logits(self, tokenizer, inp, name):
        """It is found out with the very first pass, which then does not count."""
        model = own_model(name, tokenizer)
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        assert_equals_loop(llm_attr, inp, tokenizer.encode("7"))

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("method", [FeatureAblation, LayerGradientXActivation])
    def test_every_way_to_attend_gives_the_loop_s_rows(
        self, tokenizer, inp, target, attention, method
    ):
        """Masks for reused keys are made by other code in each."""
        model = own_model("gemma3", tokenizer, attn_implementation=attention)
        assert_equals_loop(wrapped(method, model, tokenizer), inp, target)


class Shell(nn.Module):
    """A module around a Llama, no model of transformers."""

    device = torch.device("cpu")

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class Bare(Shell):
    """No output layer to be found, no cache, no choice of logits."""

    def forward(self, input_ids, attention_mask=None):
        """The inner model's answer."""
        return self.inner(input_ids, attention_mask=attention_mask)


class PassedOn(Shell):
    """Takes whatever the inner model takes, as adapters do."""

    def forward(self, *args, **kwargs):
        """The inner model's answer."""
        return self.inner(*args, **kwargs)


class Halved(Shell):
    """Logits that are not what its output layer gives."""

    def get_output_embeddings(self):
        """The inner model's output layer."""
        return self.inner.lm_head

    def forward(self, input_ids, attention_mask=None):
        """Half of the inner model's logits."""
        logits = self.inner(input_ids, attention_mask=attention_mask).logits
        return SimpleNamespace(logits=logits / 2)


class LookingAhead(Shell):
    """What follows a token changes what the model says before it."""

    def forward(self, input_ids, attention_mask=None):
        """The inner model's answer to tokens mixed with the mean of the text."""
        states = self.inner.get_input_embeddings()(input_ids)
        states = states + states.mean(dim=1, keepdim=True)
        return self.inner(inputs_embeds=states, attention_mask=attention_mask)


class TestShells:
    """Modules that are no models of transformers."""

    @pytest.mark.parametrize("shell", [Bare, PassedOn, Halved])
    @pytest.mark.parametrize("method", [FeatureAblation, LayerGradientXActivation])
    @pytest.mark.parametrize("tokens", [1, 6])
    def test_any_causal_module_gives_the_loop_s_rows(
        self, model, tokenizer, inp, target, shell, method, tokens
    ):
        """A text of one token, too, on which nothing can be checked."""
        layer = model.get_input_embeddings()
        llm_attr = wrapped(method, shell(model).eval(), tokenizer, layer=layer)
        assert_equals_loop(llm_attr, inp, target[:tokens])

    @pytest.mark.parametrize(
        "method", [FeatureAblation, ShapleyValueSampling, LayerGradientXActivation]
    )
    def test_a_model_that_is_not_causal_is_found_out(
        self, model, tokenizer, inp, target, method, caplog
    ):
        """By a pass over a part of the text; auto takes the loop and says why."""
        layer = model.get_input_embeddings()
        ahead = LookingAhead(model).eval()
        llm_attr = wrapped(method, ahead, tokenizer, layer=layer)
        kwargs = {"n_samples": 1} if method is ShapleyValueSampling else {}
        with pytest.raises(
            ValueError, match=r"LookingAhead: .*another probability when more text"
        ):
            explained(llm_attr, inp, target, "fused", **kwargs)
        with caplog.at_level(logging.WARNING, "captum_cage"):
            result = explained(llm_attr, inp, target, "auto", **kwargs)
        assert result.meta["strategy"] == "loop"
        assert caplog.text.count("another probability when more text follows") == 1
        loop = explained(llm_attr, inp, target, "loop", **kwargs)
        assert (result.graph.rows == loop.graph.rows).all()


def stretched_model(tokenizer, original, rope_type, monkeypatch):
    """A model whose position encodings depend on a text longer than its original."""
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 50.0}
    changes = {"max_position_embeddings": original}
    if rope_type == "longrope":
        del rope["factor"]
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope["original_max_position_embeddings"] = original
        changes = {
            "model_type": "phi3",
            "original_max_position_embeddings": original,
        }
    # The check of the length would refuse what such a model is made for.
    monkeypatch.setattr(scoring_module, "context_length", lambda _: None)
    try:
        return tiny_model(
            vocab_size=len(tokenizer), rope_scaling=dict(rope), rope_theta=50, **changes
        )
    except (KeyError, ValueError) as error:
        pytest.skip(f"transformers makes no tiny model with {rope_type}: {error}")


ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", ORIGINAL: 8}}, 8),
        ({"rope_scaling": {"type": "longrope", ORIGINAL: 8}}, 8),
        ({"rope_scaling": {"type": "longrope"}, ORIGINAL: 8}, 8),
        ({"rope_scaling": {"type": "longrope", ORIGINAL: 9}, ORIGINAL: 8}, 9),
        ({"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 8}, 8),
        ({"rope_scaling": {"type": "dynamic"}}, 0),
        ({"rope_parameters": {"rope_type": "longrope", ORIGINAL: 8}}, 8),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {"rope_type": "longrope", ORIGINAL: 8},
                }
            },
            8,
        ),
        ({"rope_scaling": {"rope_type": "linear", ORIGINAL: 8}}, None),
        ({"rope_scaling": None, "max_position_embeddings": 8}, None),
        ({"rope_parameters": {"rope_type": "default"}}, None),
    ],
)
def test_a_length_that_stretches_positions_is_refused(config, most):
    """Wherever the config says it; the text of that length itself is none."""
    model = SimpleNamespace(config=SimpleNamespace(**config))
    if most is None:
        verification_module.check_length_dependence(model, 10**9)
        return
    verification_module.check_length_dependence(model, most)
    message = f"encoding beyond {most} tokens depends .*, which has {most + 1}$"
    with pytest.raises(Unsuitable, match=message):
        verification_module.check_length_dependence(model, most + 1)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
@pytest.mark.parametrize("method", [FeatureAblation, LayerGradientXActivation])
class TestStretchedPositions:
    """Position encodings that change when the text grows beyond a length."""

    def test_beyond_the_original_length_only_the_loop_is_right(
        self, tokenizer, inp, target, rope_type, method, monkeypatch, caplog
    ):
        """Auto takes it and says so once; fused says why it cannot."""
        model = stretched_model(tokenizer, 8, rope_type, monkeypatch)
        whole = torch.tensor([[*inp.inp_tensor[0].tolist(), *target]])
        with torch.no_grad():
            short = model(whole[:, :6]).logits[0, 4]
            differ = (short - model(whole).logits[0, 4]).abs().max()
        assert differ > 1e-2
        llm_attr = wrapped(method, model, tokenizer)
        cage = GraphContextAttribution(llm_attr)
        with caplog.at_level(logging.WARNING, "captum_cage"):
            results = [cage.attribute(inp, target) for _ in range(2)]
        assert caplog.text.count("computed by the loop") == 1
        assert f"{rope_type} position encoding beyond 8 tokens" in caplog.text
        loop = cage.attribute(inp, target, strategy="loop")
        for result in results:
            assert result.meta["strategy"] == "loop"
            assert (result.graph.rows == loop.graph.rows).all()
        with pytest.raises(ValueError, match=f"'fused' needs.*{rope_type} position"):
            cage.attribute(inp, target, strategy="fused")

    def test_within_it_the_engine_serves(
        self, tokenizer, inp, target, rope_type, method, monkeypatch, caplog
    ):
        """Without a word."""
        whole = inp.inp_tensor.shape[1] + len(target)
        model = stretched_model(tokenizer, whole + 1, rope_type, monkeypatch)
        llm_attr = wrapped(method, model, tokenizer)
        with caplog.at_level(logging.WARNING, "captum_cage"):
            assert_equals_loop(llm_attr, inp, target)
        # transformers may say something of the model.
        names = {record.name.partition(".")[0] for record in caplog.records}
        assert "captum_cage" not in names

    @pytest.mark.parametrize("more", [-2, -1, 0, 1])
    def test_around_it_the_rows_are_the_loop_s(
        self, tokenizer, inp, target, rope_type, method, monkeypatch, more
    ):
        """Captum reads the last target, too, which the engine need not read."""
        whole = inp.inp_tensor.shape[1] + len(target)
        rows = []
        for way in ("loop", "auto"):
            # Such models remember how long their longest text was.
            model = stretched_model(tokenizer, whole + more, rope_type, monkeypatch)
            llm_attr = wrapped(method, model, tokenizer)
            rows.append(explained(llm_attr, inp, target, way).graph.rows)
        assert_same_rows(rows[1], rows[0])


# --- what is explained -------------------------------------------------------------


class TestAblation:
    """FeatureAblation, for inputs, units and targets of every kind."""

    @pytest.mark.parametrize(
        ("kind", "units", "attr_target"),
        [
            *((kind, "token", "log_prob") for kind in KINDS),
            *((kind, "sentence", "prob") for kind in KINDS),
            ("chat", "token", "prob"),
            ("template, list", "sentence", "log_prob"),
        ],
    )
    def test_every_input_gives_the_loop_s_rows(
        self, model, tokenizer, target, kind, units, attr_target
    ):
        """Segments whose removal shifts all that follows, too."""
        inp = inputs_of_each_kind(tokenizer, PROMPT)[kind]
        llm_attr = wrapped(FeatureAblation, model, tokenizer, attr_target=attr_target)
        assert_equals_loop(llm_attr, inp, target, units=units)

    @pytest.mark.parametrize("units", ["word", OWN_RANGES], ids=["word", "ranges"])
    @pytest.mark.parametrize("attr_target", ["log_prob", "prob"])
    def test_every_unit_gives_the_loop_s_rows(
        self, model, tokenizer, inp, target, units, attr_target
    ):
        """Words, and ranges of the user's own."""
        llm_attr = wrapped(FeatureAblation, model, tokenizer, attr_target=attr_target)
        rows = assert_equals_loop(llm_attr, inp, target, units=units)
        assert rows.shape[0] < len(target)

    def test_segments_of_very_different_lengths_share_a_batch(
        self, model, tokenizer, target
    ):
        """Shorter ones are padded on the right, and their positions gathered."""
        values = ["Ana", "has three red and four blue pens", "", " So: "]
        inp = TextTemplateInput(
            "{} {} x {}{}", values, baselines=["Mia" * 6, "", "", ""]
        )
        lengths = {
            len(tokenizer.encode(inp.to_model_input(torch.tensor([present]))))
            for present in itertools.product([0, 1], repeat=len(values))
        }
        assert len(lengths) > 4
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        for batch_size in (None, 64):
            assert_equals_loop(llm_attr, inp, target, batch_size=batch_size)

    @pytest.mark.parametrize("units", ["token", "sentence"])
    def test_images_give_the_loop_s_rows(self, vision_model, tokenizer, units):
        """One pass per perturbation, with the picture."""
        llm_attr = wrapped(FeatureAblation, vision_model, tokenizer)
        target = tokenizer.encode(" 3 pens. So 4.")
        assert_equals_loop(llm_attr, image_input(tokenizer), target, units=units)

    def test_probabilities_of_an_image_s_tokens(self, vision_model, tokenizer):
        """Where units are single tokens, which add up to nothing."""
        llm_attr = wrapped(FeatureAblation, vision_model, tokenizer, attr_target="prob")
        assert_equals_loop(
            llm_attr, image_input(tokenizer), tokenizer.encode(" 3 pens.")
        )

    def test_a_tokenizer_with_a_first_token(self):
        """``<s>`` is part of the prompt."""
        tokenizer = tiny_tokenizer("sentencepiece")
        model = tiny_model(vocab_size=len(tokenizer))
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        target = tokenizer.encode("Mia has 7.", add_special_tokens=False)
        assert_equals_loop(llm_attr, TextTokenInput(SHORT, tokenizer), target)
        template = TextTemplateInput("{}{}", ["Ana ", "has"])
        assert_equals_loop(llm_attr, template, target)

    def test_a_baseline_that_is_the_token_itself_changes_nothing(
        self, model, tokenizer, inp
    ):
        """Sequences equal to the plain one are not pushed, and their effect is zero."""
        same = int(inp.inp_tensor[0, 1])
        prompt = TextTokenInput(SHORT, tokenizer, baselines=same)
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        target = [*tokenizer.encode(ANSWER), same, 9]
        rows = assert_equals_loop(llm_attr, prompt, target)
        assert (rows[:, 1] == 0).all()
        fused = explained(llm_attr, prompt, target, "fused").graph.rows
        assert (fused[:, 1] == 0).all()

    def test_a_template_that_can_be_empty_is_refused_as_the_loop_refuses_it(
        self, model, tokenizer, target
    ):
        """There is nothing from which the first token could follow."""
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        inp = TextTemplateInput("{}", ["Ana"])
        for strategy in ("loop", "fused", "auto"):
            with pytest.raises(ValueError, match="inp: the prompt must have a token"):
                explained(llm_attr, inp, target, strategy)

    @pytest.mark.parametrize("trials", [1, 24])
    def test_drawn_baselines_are_drawn_for_every_trial(self, model, tokenizer, trials):
        """The mean of many trials varies less."""
        draws = []
        generator = np.random.default_rng(0)

        def draw():
            draws.append(["Mia", "Bob says that"][generator.integers(2)])
            return [draws[-1], "hats"]

        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"], baselines=draw)
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        found = [
            explained(llm_attr, inp, [9], "auto", num_trials=trials).graph.rows[0, 0]
            for _ in range(12)
        ]
        fixed = [
            explained(
                llm_attr,
                TextTemplateInput(
                    "{} has 3 {}.", ["Ana", "pens"], baselines=[name, "hats"]
                ),
                [9],
                "loop",
            ).graph.rows[0, 0]
            for name in ("Mia", "Bob says that")
        ]
        assert len(draws) >= 12 * trials
        spread = abs(fixed[0] - fixed[1]) / 2
        assert spread > 1e-2
        assert np.mean(found) == pytest.approx(
            np.mean(fixed), abs=5 * spread / math.sqrt(12 * trials)
        )
        if trials > 1:
            assert np.std(found) < 0.6 * spread

    def test_other_baselines_of_captum_s_are_left_to_the_loop(
        self, model, tokenizer, inp, target
    ):
        """The argument is named."""
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        given = torch.zeros((1, inp.n_itp_features), dtype=torch.long)
        with pytest.raises(ValueError, match="argument 'baselines' is Captum's own"):
            explained(llm_attr, inp, target, "fused", baselines=given)
        result = explained(llm_attr, inp, target, "auto", baselines=given)
        assert result.meta["strategy"] == "loop"

    def test_a_prompt_may_be_one_token(self, model, tokenizer, target):
        """There is one before the first that is scored."""
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        rows = assert_equals_loop(llm_attr, TokenIdsInput([9], tokenizer), target)
        assert rows.shape == (len(target), 1 + len(target))

    def test_columns_may_lie_in_a_file(
        self, model, tokenizer, inp, target, monkeypatch
    ):
        """Those of long texts do not fit into memory."""
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        expected = explained(llm_attr, inp, target, "fused").graph.rows
        monkeypatch.setattr(columns_module, "_IN_MEMORY", 4)
        monkeypatch.setattr(columns_module, "_BLOCK", 3)
        found = explained(llm_attr, inp, target, "fused").graph.rows
        assert (found == expected).all()

    def test_tokens_pushed_are_about_half_of_all(
        self, model, tokenizer, passes, monkeypatch
    ):
        """Passes start where a sequence first changes: at most 0.55 N^2 tokens."""
        P, G = 48, 32
        ids = torch.randint(7, 300, (P + G,), generator=torch.manual_seed(0)).tolist()
        inp = TokenIdsInput(ids[:P], tokenizer)
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        result = explained(llm_attr, inp, ids[P:], "fused")
        assert result.graph.rows.shape == (G, P + G)
        assert passes.tokens <= 0.55 * (P + G) ** 2
        # Not by leaving perturbations out.
        assert passes.sequences >= P + G - 1
        monkeypatch.undo()
        some = [0, G // 2, G - 1]
        prompt = list(ids)
        with torch.no_grad():
            plain = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
            for unit in (0, P // 2, P + G // 2 - 1):
                changed = [*prompt[:unit], 0, *prompt[unit + 1 :]]
                logs = torch.log_softmax(model(torch.tensor([changed])).logits[0], -1)
                for t in some:
                    place = P + t - 1, ids[P + t]
                    effect = float(plain[place] - logs[place]) if unit < P + t else 0
                    assert result.graph.rows[t, unit] == pytest.approx(effect, abs=1e-4)

    def test_only_units_before_the_last_explained_one_are_perturbed(
        self, model, tokenizer, passes
    ):
        """Where rows need not all be exact."""
        ids = torch.randint(7, 300, (40,), generator=torch.manual_seed(0)).tolist()
        inp = TokenIdsInput(ids[:8], tokenizer)
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        whole = explained(llm_attr, inp, ids[8:], "fused")
        pushed = passes.sequences
        passes.clear()
        some = explained(llm_attr, inp, ids[8:], "fused", explain=1, tolerance=0.5)
        assert passes.sequences < pushed / 2
        assert_same_rows(some.graph.rows[:2], whole.graph.rows[:2])


class TestColumns:
    """Rows that are computed column by column."""

    @pytest.mark.parametrize("in_memory", [12, 11])
    def test_rows_are_read_out_of_the_columns(self, monkeypatch, in_memory):
        """Those asked for, in blocks; units that have no column are zero."""
        monkeypatch.setattr(columns_module, "_IN_MEMORY", in_memory)
        monkeypatch.setattr(columns_module, "_BLOCK", 2)
        task = SimpleNamespace(kept={}, show_progress=False, width=5)
        columns = Columns.of(task, "key", 3, 4)
        assert isinstance(columns.values, np.memmap) == (in_memory < 12)
        assert columns.missing() == [0, 1, 2]
        effects = np.arange(12.0).reshape(3, 4) + 1
        for unit in (1, 0, 2):
            columns.fill(unit, effects[unit])
        assert columns.missing() == []
        found = list(columns.rows(task, [0, 1, 3]))
        expected = [[*effects[:, step], 0.0, 0.0] for step in (0, 1, 3)]
        assert [row.tolist() for row in found] == expected

    def test_columns_of_an_interrupted_call_are_gone_on_with(self):
        """Where they are of the same units and rows."""
        task = SimpleNamespace(kept={}, show_progress=False, width=5)
        columns = Columns.of(task, "key", 3, 4)
        columns.fill(1, np.ones(4))
        assert Columns.of(task, "key", 3, 4) is columns
        assert Columns.of(task, "key", 3, 4).missing() == [0, 2]
        for units, rows in ((3, 3), (2, 4)):
            assert Columns.of(task, "key", units, rows).missing() == [*range(units)]
        assert Columns.of(task, "other", 3, 4).missing() == [0, 1, 2]

    def test_progress_counts_the_columns_that_were_there(self, capsys):
        """A bar for who wants one."""
        for shown in (True, False):
            task = SimpleNamespace(kept={}, show_progress=shown, width=5)
            columns = Columns.of(task, "key", 4, 1)
            columns.fill(2, np.ones(1))
            assert list(columns.progress("abc")) == ["a", "b", "c"]
            bar = capsys.readouterr().err
            assert ("perturbations: 100%" in bar and "4/4" in bar) == shown
            assert shown or not bar

    def test_what_is_captum_s_own_matter_is_named(self, model, tokenizer):
        """Arguments, subclasses and weighted windows; what changes no row is none."""

        class Other(LLMAttribution):
            pass

        method = FeatureAblation(model)
        llm_attr = LLMAttribution(method, tokenizer)
        harmless = {
            "enable_cross_tensor_attribution": True,
            "forward_in_tokens": False,
            "num_trials": 2,
            "perturbations_per_eval": 4,
            "show_progress": True,
            "use_cached_outputs": False,
        }
        for wrapper, kwargs, reason in (
            (llm_attr, harmless, None),
            (llm_attr, {"n_samples": 3}, None),
            (llm_attr, {"baselines": 3}, "the argument 'baselines' is Captum's own"),
            (Other(method, tokenizer), {}, "Other may compute something of its own"),
        ):
            task = SimpleNamespace(llm_attr=wrapper, kwargs=kwargs)
            found = columns_module.unsupported("n_samples")(task)
            if reason is None:
                assert found is None
            else:
                assert found.startswith(reason)
        task = SimpleNamespace(llm_attr=llm_attr, kwargs={})
        llm_attr.attr_method.use_weights = True
        found = columns_module.unsupported()(task)
        assert found == "this FeatureAblation weighs overlapping windows"


class TestShapley:
    """Exact Shapley values, and their estimate from permutations."""

    @pytest.mark.parametrize(
        ("units", "prompt", "text"),
        [
            ("token", "Ana has", " 3 pens."),
            ("word", "Ana has", " So she sells"),
            ("sentence", SHORT, " Mia has 7. So it is. The answer is 7."),
        ],
    )
    @pytest.mark.parametrize("attr_target", ["log_prob", "prob"])
    def test_exact_values_are_the_loop_s(
        self, model, tokenizer, units, prompt, text, attr_target
    ):
        """Captum's own go over all orders; ours over all subsets."""
        llm_attr = wrapped(ShapleyValues, model, tokenizer, attr_target=attr_target)
        target = tokenizer.encode(text)[:4] if units == "token" else text
        inp = TextTokenInput(prompt, tokenizer)
        # The probability of a sentence is e to the power of a large float32.
        allowed = 2e-6 if attr_target == "log_prob" else 3e-5
        assert_equals_loop(llm_attr, inp, target, units=units, allowed=allowed)

    def test_exact_values_in_float64(self, tokenizer):
        """Within the float32 in which Captum's own are added."""
        model = tiny_model(vocab_size=len(tokenizer), dtype=torch.float64)
        llm_attr = wrapped(ShapleyValues, model, tokenizer)
        inp = TextTokenInput("Ana has", tokenizer)
        assert_equals_loop(llm_attr, inp, tokenizer.encode(" 3 pens."), allowed=1e-6)

    def test_exact_values_of_a_template_and_an_image(
        self, model, vision_model, tokenizer
    ):
        """Segments of a text and parts of a picture play with generated units."""
        template = TextTemplateInput("{} has {}.", ["Ana", "three red pens"])
        llm_attr = wrapped(ShapleyValues, model, tokenizer)
        target = tokenizer.encode(" Mia has")
        assert_equals_loop(llm_attr, template, target, allowed=2e-6)
        llm_attr = wrapped(ShapleyValues, vision_model, tokenizer)
        picture = image_input(tokenizer)
        assert_equals_loop(llm_attr, picture, target, allowed=2e-6)

    def test_more_units_than_the_loop_could_ever_do(self, model, tokenizer):
        """2**n sequences, not n * n!; each row adds up to the drop to nothing."""
        inp = TextTokenInput(SHORT, tokenizer)
        target = tokenizer.encode(" Mia has 7.")
        assert 8 <= inp.n_itp_features + len(target) - 1 <= 14
        llm_attr = wrapped(ShapleyValues, model, tokenizer)
        with pytest.raises(ValueError, match="takes at most 7"):
            explained(llm_attr, inp, target, "loop")
        rows = explained(llm_attr, inp, target, "auto").graph.rows
        prompt = inp.inp_tensor[0].tolist()
        for t, number in enumerate(target):
            scores = []
            for ids in (prompt + target[:t], [0] * (len(prompt) + t)):
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, -1]
                scores.append(float(torch.log_softmax(logits, -1)[number]))
            assert rows[t].sum() == pytest.approx(scores[0] - scores[1], abs=1e-4)

    def test_too_many_units_are_refused_with_both_limits(self, model, tokenizer):
        """The engine's where it was asked for, the loop's otherwise."""
        inp = TextTokenInput(PROMPT, tokenizer)
        llm_attr = wrapped(ShapleyValues, model, tokenizer)
        with pytest.raises(ValueError, match="subsets of at most 14"):
            explained(llm_attr, inp, ANSWER, "fused")
        with pytest.raises(ValueError, match="takes at most 7"):
            explained(llm_attr, inp, ANSWER, "auto")

    @pytest.mark.parametrize("units", ["token", "sentence"])
    @pytest.mark.parametrize("attr_target", ["log_prob", "prob"])
    def test_the_mean_of_permutations_is_the_exact_value(
        self, model, tokenizer, units, attr_target
    ):
        """Within five standard errors, with the rows' own later tokens present."""
        if units == "token":
            prompt, target = "Ana has", tokenizer.encode(" 3 pens")
        else:
            prompt, target = SHORT, tokenizer.encode(" Mia has 7. So it is.")
        inp = TextTokenInput(prompt, tokenizer)
        exact = explained(
            wrapped(ShapleyValues, model, tokenizer, attr_target=attr_target),
            inp,
            target,
            "loop",
            units=units,
        ).graph.rows
        torch.manual_seed(1)
        cage = GraphContextAttribution(
            wrapped(ShapleyValueSampling, model, tokenizer, attr_target=attr_target)
        )
        runs = np.stack(
            [
                cage.attribute(
                    inp, target, units=units, n_samples=3, strategy="fused"
                ).graph.rows
                for _ in range(40)
            ]
        )
        error = runs.std(axis=0, ddof=1) / math.sqrt(len(runs))
        allowed = 5 * error + 1e-5 * np.abs(exact).max()
        assert (np.abs(runs.mean(axis=0) - exact) <= allowed).all()

    def test_each_permutation_s_row_adds_up(self, model, tokenizer, inp, target):
        """To the drop from all present to all absent, as a permutation's does."""
        llm_attr = wrapped(ShapleyValueSampling, model, tokenizer)
        rows = explained(llm_attr, inp, target, "fused", n_samples=1).graph.rows
        again = explained(llm_attr, inp, target, "fused", n_samples=3).graph.rows
        loop = explained(llm_attr, inp, target, "loop", n_samples=1).graph.rows
        assert rows.sum(axis=1) == pytest.approx(loop.sum(axis=1), abs=1e-4)
        assert again.sum(axis=1) == pytest.approx(loop.sum(axis=1), abs=1e-4)
        assert np.abs(rows - loop).max() > 1e-2

    @pytest.mark.parametrize(
        "units", ["token", OWN_RANGES["generated"]], ids=["token", "ranges"]
    )
    def test_means_and_variances_are_the_loop_s(self, model, tokenizer, units):
        """Same estimator: the same distribution of each entry."""
        inp = TextTokenInput("Ana has", tokenizer)
        llm_attr = wrapped(ShapleyValueSampling, model, tokenizer)
        units = {"source": "token", "generated": units}
        check_engine(llm_attr, inp, " Mia has", units=units, repeats=16, n_samples=4)
        cage = GraphContextAttribution(llm_attr)
        torch.manual_seed(2)
        spread = [
            np.std(
                [
                    cage.attribute(
                        inp, " Mia has", units=units, n_samples=1, strategy=way
                    ).graph.rows
                    for _ in range(40)
                ],
                axis=0,
            )
            for way in ("fused", "loop")
        ]
        large = spread[1] > 0.1 * spread[1].max()
        assert large.sum() >= 3
        assert (spread[0][large] / spread[1][large] < 1.8).all()
        assert (spread[0][large] / spread[1][large] > 1 / 1.8).all()

    def test_trials_are_more_permutations(self, model, tokenizer, inp, target):
        """Captum's num_trials draws as many more."""
        llm_attr = wrapped(ShapleyValueSampling, model, tokenizer)
        one = explained(
            llm_attr, inp, target, "fused", n_samples=6, num_trials=1
        ).graph.rows
        two = explained(
            llm_attr, inp, target, "fused", n_samples=2, num_trials=3
        ).graph.rows
        assert two == pytest.approx(one, abs=1e-5)


class TestScoredSubsets:
    """What several rows see of one set of units."""

    def test_a_row_s_own_question_outlasts_a_later_one_of_all_rows(
        self, model, tokenizer
    ):
        """Two sets that begin alike share it; either may be asked about first."""
        llm_attr = wrapped(ShapleyValueSampling, model, tokenizer)
        prompt = Prompt.read(TextTokenInput(SHORT, tokenizer), tokenizer)
        ids = tokenizer.encode(ANSWER)
        sides = split_units({"source": "word", "generated": "word"})
        text, sources, steps, _ = text_units(prompt, ids, sides, tokenizer)
        task = RowTask(llm_attr, prompt, tuple(ids), text, sources, steps, 0, {})
        row = next(s for s in range(len(steps)) if len(steps.members(s)) > 1)
        own, rows = len(sources) + row, len(steps)
        present = np.ones((3, len(sources) + rows - 1), dtype=bool)
        present[0, own] = False
        present[1, own:] = False
        present[2, [0, own]] = False
        scorer = SequenceScorer(task, len(ids))
        found = scored_subsets(task, scorer, present, rows)
        for place, step in itertools.product(range(3), range(rows)):
            # A row by itself: what is present before it, and its own unit.
            before = present[place, : len(sources) + step]
            units = scorer.indicator(np.append(before, True)[: scorer.n_units])
            ((_, scores),) = scorer.scores([Perturbation(0, units)])
            expected = columns_module.unit_values(task, scores)[step]
            assert found[place, step] == pytest.approx(expected, abs=1e-5)


class TestRegression:
    """Lime and KernelShap: Captum's samples and fits, our scores."""

    @pytest.mark.parametrize(
        "units", ["token", "word", OWN_RANGES], ids=["token", "word", "ranges"]
    )
    @pytest.mark.parametrize("attr_target", ["log_prob", "prob"])
    def test_kernel_shap_draws_what_the_loop_draws(
        self, model, tokenizer, inp, target, units, attr_target
    ):
        """Same seed, same samples, same rows."""
        llm_attr = wrapped(KernelShap, model, tokenizer, attr_target=attr_target)
        assert_equals_loop(llm_attr, inp, target, units=units, n_samples=20)

    def test_rows_may_be_scored_a_few_at_a_time(
        self, model, tokenizer, inp, target, monkeypatch
    ):
        """Each once, whatever their number."""
        monkeypatch.setattr("captum_cage.engines.regression._TOGETHER", 3)
        llm_attr = wrapped(KernelShap, model, tokenizer)
        assert_equals_loop(llm_attr, inp, target, n_samples=4)

    def test_kernel_shap_of_a_template(self, model, tokenizer, target):
        """Of segments whose removal shifts positions."""
        llm_attr = wrapped(KernelShap, model, tokenizer)
        inp = TextTemplateInput("{} has {}.", ["Ana", "three red pens"])
        assert_equals_loop(llm_attr, inp, target, n_samples=12)

    def test_the_generator_stands_where_the_loop_leaves_it(
        self, model, tokenizer, inp, target
    ):
        """What is drawn afterwards does not depend on the strategy."""
        llm_attr = wrapped(KernelShap, model, tokenizer)
        after = []
        for strategy in ("loop", "fused"):
            explained(llm_attr, inp, target, strategy, n_samples=5)
            after.append(torch.rand(()).item())
        assert after[0] == after[1]

    def test_lime_with_a_sampler_of_its_own_draws_what_the_loop_draws(
        self, model, tokenizer, inp, target
    ):
        """A sampler that is not Captum's is asked row by row."""

        def draw(original, **kwargs):
            size = kwargs["num_interp_features"]
            return (torch.rand((1, size)) < 0.7).long().to(original.device)

        llm_attr = wrapped(
            Lime,
            model,
            tokenizer,
            perturb_func=draw,
            interpretable_model=SkLearnLinearRegression(),
        )
        assert_equals_loop(llm_attr, inp, target, n_samples=30)

    @pytest.mark.parametrize("units", ["token", "sentence"])
    def test_lime_s_mean_is_the_loop_s(self, model, tokenizer, units):
        """Shared samples, each row with a fit of its own."""
        llm_attr = wrapped(
            Lime, model, tokenizer, interpretable_model=SkLearnLinearRegression()
        )
        inp = TextTokenInput("Ana has", tokenizer)
        report = check_engine(
            llm_attr,
            inp,
            " Mia has",
            units={"source": "token", "generated": units},
            repeats=12,
            n_samples=16,
        )
        assert report.allowed == 6.0

    def test_lime_s_first_row_of_the_same_samples_is_captum_s_fit(
        self, model, tokenizer, inp
    ):
        """One row: the engine draws what the loop draws."""
        llm_attr = wrapped(
            Lime, model, tokenizer, interpretable_model=SkLearnLinearRegression()
        )
        assert_equals_loop(llm_attr, inp, [9], n_samples=30)

    def test_regressions_of_units_that_are_scored_token_by_token_are_left_to_the_loop(
        self, vision_model, tokenizer
    ):
        """A fit per token does not add up to one per unit."""
        llm_attr = wrapped(KernelShap, vision_model, tokenizer)
        picture = image_input(tokenizer)
        with pytest.raises(ValueError, match="regression per token does not add up"):
            explained(
                llm_attr, picture, " 3 pens.", "fused", units="sentence", n_samples=4
            )
        assert_equals_loop(llm_attr, picture, " 3 p", n_samples=8)


# --- gradients ---------------------------------------------------------------------


class TestGradient:
    """Gradients at embeddings, along paths, for targets of any size."""

    @pytest.mark.parametrize(
        "method",
        [
            "gausslegendre",
            "riemann_left",
            "riemann_right",
            "riemann_middle",
            "riemann_trapezoid",
        ],
    )
    @pytest.mark.parametrize("steps", [2, 7])
    def test_integrated_gradients_by_every_rule(
        self, model, tokenizer, inp, target, method, steps
    ):
        """Captum's points and weights, in its precision."""
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        assert_equals_loop(llm_attr, inp, target, method=method, n_steps=steps)

    @pytest.mark.parametrize("internal", [7, 14])
    @pytest.mark.parametrize("batch_size", [None, 2])
    def test_captum_s_own_batches_change_nothing(
        self, model, tokenizer, inp, target, internal, batch_size
    ):
        """They bound the number of points in a pass."""
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        assert_equals_loop(
            llm_attr,
            inp,
            target,
            n_steps=5,
            internal_batch_size=internal,
            batch_size=batch_size,
        )

    @pytest.mark.parametrize(
        "given",
        [[[0, 0, 0, 0, 0]], [[1, 0, 1, 0, 0]], [[0.5, 1, 0, 1, 1]], [[1, 1]], 0, 0.0],
    )
    @pytest.mark.parametrize("units", ["token", "word"])
    def test_baselines_of_prompt_features(
        self, model, tokenizer, inp, target, given, units
    ):
        """A token is absent from the baseline where its indicator is not one."""
        baselines = torch.tensor(given) if isinstance(given, list) else given
        assert inp.n_itp_features == 5
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        assert_equals_loop(
            llm_attr, inp, target, n_steps=3, baselines=baselines, units=units
        )

    def test_baselines_that_are_present_or_drawn_are_left_to_the_loop(
        self, model, tokenizer, inp, target
    ):
        """The reason is told."""
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        with pytest.raises(ValueError, match="baselines are not absent units"):
            explained(llm_attr, inp, target, "fused", n_steps=2, baselines=1)
        shap = wrapped(LayerGradientShap, model, tokenizer)
        with pytest.raises(ValueError, match="drawn by a function"):
            explained(shap, inp, target, "fused", baselines=torch.zeros_like)
        with pytest.raises(ValueError, match="adds noise to indicators"):
            explained(shap, inp, target, "fused", stdevs=0.1)

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if "template" not in kind])
    @pytest.mark.parametrize("units", ["token", "sentence"])
    @pytest.mark.parametrize(
        "method", [LayerIntegratedGradients, LayerGradientXActivation]
    )
    def test_every_input_of_tokens_gives_the_loop_s_rows(
        self, model, tokenizer, target, kind, units, method
    ):
        """Skipped tokens stay present; groups and chats are summed."""
        inp = inputs_of_each_kind(tokenizer, PROMPT)[kind]
        kwargs = {"n_steps": 2} if method is LayerIntegratedGradients else {}
        llm_attr = wrapped(method, model, tokenizer)
        assert_equals_loop(llm_attr, inp, target, units=units, **kwargs)

    @pytest.mark.parametrize("method", GRADIENT)
    def test_ranges_of_the_user_s_own(self, model, tokenizer, inp, target, method):
        """Their tokens' rows and columns are summed; the block inside is dropped."""
        llm_attr = wrapped(method, model, tokenizer)
        kwargs = METHODS[method]
        assert_equals_loop(llm_attr, inp, target, units=OWN_RANGES, **kwargs)

    @pytest.mark.parametrize("place", ["layer", "mlp", "norm"])
    @pytest.mark.parametrize(
        "method", [LayerIntegratedGradients, LayerGradientXActivation]
    )
    def test_layers_after_the_embedding(
        self, model, tokenizer, inp, target, place, method
    ):
        """Any layer that gives one vector per token."""
        layer = {
            "layer": model.model.layers[0],
            "mlp": model.model.layers[1].mlp,
            "norm": model.model.norm,
        }[place]
        kwargs = {"n_steps": 3} if method is LayerIntegratedGradients else {}
        llm_attr = wrapped(method, model, tokenizer, layer=layer)
        if not isinstance(_output_of(layer, model), torch.Tensor):
            pytest.skip("this transformers' layer gives a tuple")
        assert_equals_loop(llm_attr, inp, target, **kwargs)

    def test_position_embeddings(self, tokenizer, inp, target):
        """They have one vector per token, too."""
        model = tiny_model("gpt2", vocab_size=len(tokenizer))
        llm_attr = wrapped(
            LayerGradientXActivation, model, tokenizer, layer=model.transformer.wpe
        )
        assert_equals_loop(llm_attr, inp, target)

    @pytest.mark.parametrize("place", ["attention", "head"])
    def test_a_layer_without_a_vector_per_token_is_told(
        self, model, tokenizer, inp, target, place
    ):
        """Attention gives a tuple; the output layer sees one position."""
        layer = model.model.layers[0].self_attn if place == "attention" else None
        layer = model.lm_head if layer is None else layer
        llm_attr = wrapped(LayerGradientXActivation, model, tokenizer, layer=layer)
        with pytest.raises(ValueError, match="layer does not give one vector per tok"):
            explained(llm_attr, inp, target, "fused")

    @pytest.mark.parametrize(
        "method", [LayerIntegratedGradients, LayerGradientXActivation]
    )
    def test_gradients_alone(self, model, tokenizer, inp, target, method):
        """``multiply_by_inputs=False`` of Captum's methods is honoured."""
        kwargs = {"n_steps": 3} if method is LayerIntegratedGradients else {}
        llm_attr = wrapped(method, model, tokenizer, multiply_by_inputs=False)
        rows = assert_equals_loop(llm_attr, inp, target, **kwargs)
        other = explained(
            wrapped(method, model, tokenizer), inp, target, "loop", **kwargs
        )
        assert np.abs(rows - other.graph.rows).max() > 1e-2

    def test_gradient_shap_of_one_baseline(self, model, tokenizer, inp, target):
        """With all absent every draw is the same point."""
        llm_attr = wrapped(LayerGradientShap, model, tokenizer)
        assert_equals_loop(llm_attr, inp, target, n_samples=3)

    def test_gradient_shap_of_several_baselines(self, model, tokenizer):
        """Rows share their draws; each row's mean is the loop's."""
        inp = TextTokenInput("Ana has", tokenizer)
        baselines = torch.tensor([[0, 0], [1, 0], [1, 1]])
        llm_attr = wrapped(LayerGradientShap, model, tokenizer)
        report = check_engine(
            llm_attr, inp, " Mia", repeats=24, n_samples=3, baselines=baselines
        )
        assert report.difference > 0

    def test_a_long_text_is_done_in_chunks(self, model, tokenizer):
        """More targets than one pass carries."""
        ids = torch.randint(7, 300, (80,), generator=torch.manual_seed(0)).tolist()
        inp = TokenIdsInput(ids[:8], tokenizer)
        llm_attr = wrapped(LayerGradientXActivation, model, tokenizer)
        rows = explained(llm_attr, inp, ids[8:], "fused").graph.rows
        loop = explained(llm_attr, inp, ids[8:], "loop").graph.rows
        assert_same_rows(rows, loop)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_backward_passes_are_as_many_as_units(
        self, tokenizer, backwards, monkeypatch, dtype
    ):
        """A unit's tokens are one target, at each point; in float64 token by token."""
        model = tiny_model(vocab_size=len(tokenizer), dtype=dtype)
        passes = Recorder(monkeypatch, type(model))
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        inp = TextTokenInput(PROMPT, tokenizer)
        text = " Mia has 7. So it is. The answer is 7."
        result = explained(
            llm_attr, inp, text, "fused", units="sentence", n_steps=4, batch_size=1
        )
        tokens = len(tokenizer.encode(text))
        targets = {torch.float32: 3, torch.float64: tokens}[dtype]
        assert result.graph.n_generated == 3
        assert len(backwards) == 4 * targets
        # One forward for each point, and a few for points and self-check.
        assert 4 * 1 <= len(passes.passed) <= 4 * 3 + 6
        backwards.clear()
        explained(llm_attr, inp, text, "fused", units="sentence", n_steps=4)
        assert sum(shape[0] for shape in backwards) >= 4 * targets
        assert len(backwards) <= targets

    def test_the_first_row_alone_takes_little(self, model, tokenizer, passes):
        """No more is read than predicts it, checks aside."""
        ids = torch.randint(7, 300, (60,), generator=torch.manual_seed(0)).tolist()
        inp = TokenIdsInput(ids[:10], tokenizer)
        cage = GraphContextAttribution(
            wrapped(LayerIntegratedGradients, model, tokenizer)
        )
        arguments = {"strategy": "fused", "n_steps": 30}
        whole = cage.attribute(inp, ids[10:], **arguments)
        pushed = passes.tokens
        passes.clear()
        one = cage.attribute(inp, ids[10:], explain=0, tolerance=0.5, **arguments)
        assert passes.tokens < pushed / 3
        assert_same_rows(one.graph.rows[:1], whole.graph.rows[:1])


def _output_of(layer, model):
    """What a layer gives in a pass over three tokens."""
    seen = []
    handle = layer.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(torch.tensor([[7, 8, 9]]))
    handle.remove()
    return seen[0]


# --- memory, batches ---------------------------------------------------------------


class TestBatches:
    """How many sequences go at once changes nothing but speed."""

    @pytest.mark.parametrize(
        "method",
        [
            FeatureAblation,
            ShapleyValueSampling,
            KernelShap,
            LayerIntegratedGradients,
            LayerGradientXActivation,
        ],
    )
    @pytest.mark.parametrize("units", ["token", "sentence"])
    def test_any_batch_size_gives_the_same_rows(
        self, model, tokenizer, target, method, units, passes
    ):
        """One, two, many, or chosen by the memory; never more than asked for."""
        inp = TextTokenInput(PROMPT, tokenizer)
        llm_attr = wrapped(method, model, tokenizer)
        units = {"source": "token", "generated": units}
        kwargs = METHODS[method]
        expected = explained(
            llm_attr, inp, target, "fused", units=units, **kwargs
        ).graph.rows
        for size in (1, 2, 500):
            passes.clear()
            found = explained(
                llm_attr, inp, target, "fused", units=units, batch_size=size, **kwargs
            )
            assert_same_rows(found.graph.rows, expected)
            assert max(shape[0] for shape in passes.passed) <= size
            if size == 2:
                widest = max(shape[0] for shape in passes.passed)
                one_point = method is LayerGradientXActivation and units == "sentence"
                assert widest == (1 if one_point else 2)

    def test_perturbations_of_a_short_text_share_passes(
        self, model, tokenizer, inp, target, passes
    ):
        """Where a pass takes longer than the few tokens that are pushed in vain."""
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        result = explained(llm_attr, inp, target, "fused")
        perturbed = len(result.units) - 1
        plain_and_checks = 3
        assert passes.sequences == perturbed + plain_and_checks
        # Of sequences that change one token later each, six start at most 16 too early.
        assert len(passes.passed) == math.ceil(perturbed / 6) + plain_and_checks

    @pytest.mark.parametrize("name", ["llama", "mamba"])
    def test_templates_in_batches(self, tokenizer, target, name):
        """With and without reuse of what stands before."""
        model = own_model(name, tokenizer)
        inp = TextTemplateInput("{} has {} and {}.", ["Ana Mia", "3 pens", "no hat"])
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        for size in (1, 3, 100):
            assert_equals_loop(llm_attr, inp, target, batch_size=size)


def no_memory(message="CUDA out of memory. Tried to allocate 2.00 GiB"):
    """The error of a device that is full."""
    return RuntimeError(message)


class TestMemory:
    """A pass that does not fit is repeated by halves."""

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            MemoryError(),
        ],
        ids=["cuda", "cpu", "host"],
    )
    def test_ablation_goes_on_with_half_the_batch(
        self, model, tokenizer, target, passes, error
    ):
        """Same rows; no perturbation is scored twice."""
        inp = TextTokenInput(PROMPT, tokenizer)
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        expected = explained(llm_attr, inp, target, "fused", batch_size=12)
        sequences = passes.sequences
        assert 12 in {shape[0] for shape in passes.passed}
        assert sequences > 18
        passes.clear()
        passes.failure = lambda _, ids: error if len(ids) > 3 else None
        found = explained(llm_attr, inp, target, "fused", batch_size=12)
        assert_same_rows(found.graph.rows, expected.graph.rows)
        assert passes.sequences == sequences
        sizes = [shape[0] for shape in passes.asked]
        assert [size for size in sizes if size > 3] == [12, 6]
        assert sizes[sizes.index(6) + 1] == 3

    def test_memory_that_runs_out_late_does_not_repeat_what_is_done(
        self, model, tokenizer, target, passes
    ):
        """The batches before stay."""
        inp = TextTokenInput(PROMPT, tokenizer)
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        expected = explained(llm_attr, inp, target, "fused", batch_size=4)
        sequences, calls = passes.sequences, len(passes.asked)
        assert calls > 6
        passes.clear()
        passes.failure = lambda n, ids: no_memory() if n > 5 and len(ids) > 1 else None
        found = explained(llm_attr, inp, target, "fused", batch_size=4)
        assert_same_rows(found.graph.rows, expected.graph.rows)
        assert passes.sequences == sequences
        assert len(passes.asked) - len(passes.passed) == 2

    @pytest.mark.parametrize("units", ["token", "sentence"])
    def test_gradients_go_on_with_half_the_batch(
        self, model, tokenizer, target, passes, units
    ):
        """Points of a path are fewer at a time."""
        inp = TextTokenInput(PROMPT, tokenizer)
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        arguments = {"units": units, "n_steps": 6, "batch_size": 6}
        expected = explained(llm_attr, inp, target, "fused", **arguments)
        assert 6 in {shape[0] for shape in passes.passed}
        passes.clear()
        passes.failure = lambda _, ids: no_memory() if len(ids) > 2 else None
        found = explained(llm_attr, inp, target, "fused", **arguments)
        assert_same_rows(found.graph.rows, expected.graph.rows)
        sizes = [shape[0] for shape in passes.asked]
        assert [size for size in sizes if size > 2] == [6, 3]

    def test_gradients_survive_memory_that_runs_out_on_the_way_back(
        self, model, tokenizer, inp, target, monkeypatch
    ):
        """The backward pass needs the most."""
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        expected = explained(llm_attr, inp, target, "fused", n_steps=4, batch_size=4)
        grad = torch.autograd.grad
        failed = []

        def failing(outputs, inputs, *args, **kwargs):
            leaf = inputs if isinstance(inputs, torch.Tensor) else inputs[0]
            if leaf.dim() == 3 and len(leaf) > 2:
                failed.append(len(leaf))
                raise no_memory()
            return grad(outputs, inputs, *args, **kwargs)

        monkeypatch.setattr(torch.autograd, "grad", failing)
        found = explained(llm_attr, inp, target, "fused", n_steps=4, batch_size=4)
        assert failed == [4]
        assert_same_rows(found.graph.rows, expected.graph.rows)

    @pytest.mark.parametrize(
        "method", [FeatureAblation, ShapleyValueSampling, LayerIntegratedGradients]
    )
    def test_a_sequence_that_never_fits_is_a_clear_error(
        self, model, tokenizer, passes, method
    ):
        """Halving ends at one."""
        inp = TextTokenInput(PROMPT, tokenizer)
        llm_attr = wrapped(method, model, tokenizer)
        kwargs = {"n_steps": 40} if method is LayerIntegratedGradients else {}
        passes.failure = lambda n, _: no_memory() if n > 10 else None
        with pytest.raises(
            RuntimeError, match=r"one sequence must fit.*Tried to alloc"
        ):
            explained(llm_attr, inp, ANSWER, "fused", batch_size=2, **kwargs)
        passes.clear()
        passes.failure = lambda n, _: no_memory() if n > 10 else None
        with pytest.raises(
            RuntimeError, match=r"one sequence must fit.*Tried to alloc"
        ):
            explained(llm_attr, inp, ANSWER, "fused", batch_size=1, **kwargs)

    @pytest.mark.parametrize("method", [FeatureAblation, LayerIntegratedGradients])
    def test_other_errors_are_passed_on(
        self, model, tokenizer, inp, target, passes, method
    ):
        """They are no matter of memory."""
        llm_attr = wrapped(method, model, tokenizer)
        passes.failure = lambda n, _: RuntimeError("no luck") if n > 5 else None
        with pytest.raises(RuntimeError, match=r"^no luck$"):
            explained(llm_attr, inp, target, "fused", batch_size=1, **METHODS[method])


def host(monkeypatch, folder, *, available=None, limit=None, current=None):
    """A host that tells this much about its memory."""
    for name in ("_MEMINFO", "_CGROUP"):
        monkeypatch.setattr(memory_module, name, folder / name)
    (folder / "_CGROUP").mkdir()
    if available is not None:
        lines = f"MemTotal: 900 kB\nMemAvailable:   {available} kB\nCached: 1 kB\n"
        (folder / "_MEMINFO").write_text(lines)
    for name, value in (("max", limit), ("current", current)):
        if value is not None:
            (folder / "_CGROUP" / f"memory.{name}").write_text(f"{value}\n")


@pytest.mark.parametrize(
    "kind", [Columns, Engine, Perturbation, verification_module.Verdict]
)
def test_values_of_engines_cannot_be_changed(kind):
    """A field is not set."""
    one = object.__new__(kind)
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(one, field.name, None)


def test_a_verdict_holds_for_shorter_texts_and_one_kind_of_attention(fresh_model):
    """Another implementation may do otherwise."""
    model = CausalModel(fresh_model, torch.device("cpu"))
    assert verification_module.found_out(model, 1) is None
    verdict = verification_module.Verdict(10, True, None)
    verification_module.remember(model, verdict)
    assert verification_module.found_out(model, 10) == verdict
    assert verification_module.found_out(model, 11) is None
    before = fresh_model.config._attn_implementation
    other = "eager" if before != "eager" else "sdpa"
    fresh_model.set_attn_implementation(other)
    assert verification_module.found_out(model, 10) is None
    fresh_model.set_attn_implementation(before)
    assert verification_module.found_out(model, 10) == verdict


class TestFreeMemory:
    """What decides how many sequences go at once."""

    @pytest.mark.parametrize(
        ("told", "free"),
        [
            ({"available": 70}, 70 * 1024),
            ({"available": 70, "limit": "max", "current": 5}, 70 * 1024),
            ({"available": 70, "limit": 50_000, "current": 20_000}, 30_000),
            ({"available": 20, "limit": 50_000, "current": 20_000}, 20 * 1024),
            ({"limit": 50_000, "current": 20_000}, 30_000),
            ({"available": 70, "limit": 20_000, "current": 50_000}, 0),
        ],
    )
    def test_a_host_has_what_system_and_container_leave(
        self, monkeypatch, tmp_path, told, free
    ):
        """The less of the two; a container may have more than its limit for a time."""
        host(monkeypatch, tmp_path, **told)
        assert memory_module.free_bytes(torch.device("cpu")) == free

    def test_a_host_that_has_no_such_files_is_asked_otherwise(
        self, monkeypatch, tmp_path
    ):
        """By the number of its free pages; else two gigabytes are a careful guess."""
        host(monkeypatch, tmp_path)
        pages = {"SC_AVPHYS_PAGES": 30, "SC_PAGE_SIZE": 4096}
        monkeypatch.setattr(os, "sysconf", pages.__getitem__, raising=False)
        assert memory_module.free_bytes(torch.device("cpu")) == 30 * 4096

        def unknown(name):
            raise ValueError(name)

        monkeypatch.setattr(os, "sysconf", unknown)
        assert memory_module.free_bytes(torch.device("cpu")) == 2**31
        monkeypatch.delattr(os, "sysconf")
        assert memory_module.free_bytes(torch.device("cpu")) == 2**31

    def test_a_token_takes_more_in_wider_deeper_and_more_precise_models(self):
        """In proportion; all layers count where all are kept."""

        def taken(kind=torch.float32, kept=False, **config):
            model = nn.Linear(2, 2).to(kind)
            model.config = SimpleNamespace(**config)
            return memory_module.bytes_per_token(model, kept=kept)

        usual = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
        one = taken(**usual)
        assert one >= 64 * 4
        assert (
            taken(torch.float64, **usual) == 2 * one == 4 * taken(torch.half, **usual)
        )
        assert taken(kept=True, **usual) == 3 * one
        assert taken(**{**usual, "num_hidden_layers": 9}) == one
        assert taken(hidden_size=128, intermediate_size=512) == 2 * one
        assert one < taken(**{**usual, "intermediate_size": 257}) < 1.1 * one
        assert one < taken(**{**usual, "hidden_size": 65}) < 1.1 * one
        # Some models have a width for each layer, or do not say it.
        assert taken(hidden_size=64) == one
        assert taken(**{**usual, "intermediate_size": [1, 2]}) == one
        assert taken() == taken(hidden_size=1024)
        assert taken(kept=True) == 24 * taken()
        assert memory_module.bytes_per_token(object()) == taken()

    def test_the_memory_decides_how_many_sequences_go_at_once(
        self, model, tokenizer, target, passes, monkeypatch
    ):
        """One at least, twice as many in twice the memory, never more than are fast."""
        inp = TextTokenInput(PROMPT, tokenizer)
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        monkeypatch.setattr(sequences_module, "_IN_VAIN", 10**9)
        widest = {}
        for free in (0, 2**20, 2**21, 2**40):
            monkeypatch.setattr(sequences_module, "free_bytes", lambda _, n=free: n)
            passes.clear()
            explained(llm_attr, inp, target, "fused")
            widest[free] = max(shape[0] for shape in passes.passed)
        assert widest[0] == 1
        assert 1 < widest[2**20] < widest[2**21] <= 2 * widest[2**20] + 1
        assert widest[2**21] < widest[2**40]
        monkeypatch.setattr(sequences_module, "_ENOUGH_TOKENS", {"cpu": 1, "cuda": 1})
        passes.clear()
        explained(llm_attr, inp, target, "fused")
        assert max(shape[0] for shape in passes.passed) == 1

    def test_a_gpu_has_what_torch_holds_and_does_not_use_besides(self, monkeypatch):
        """Torch keeps memory that tensors have left."""
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9000))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 500)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 200)
        assert memory_module.free_bytes(torch.device("cuda")) == 1300

    def test_half_of_one_is_an_error(self, monkeypatch):
        """Else it is rounded down; a GPU gives back what it holds in vain."""
        emptied = []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
        error, cpu = memory_module.OutOfMemory(), torch.device("cpu")
        assert [memory_module.half(size, error, cpu) for size in (2, 3, 9)] == [1, 1, 4]
        with pytest.raises(RuntimeError, match="one sequence must fit into memory"):
            memory_module.half(1, error, cpu)
        assert not emptied
        assert memory_module.half(8, error, torch.device("cuda")) == 4
        assert emptied == [1]

    def test_errors_of_memory_are_told_from_others(self):
        """By what every device says, whichever letters are large."""
        for error in (
            MemoryError(),
            RuntimeError("HIP Out Of Memory"),
            RuntimeError("x: can't allocate memory: y"),
            RuntimeError("Not enough memory: 5 bytes"),
        ):
            with (
                pytest.raises(memory_module.OutOfMemory) as caught,
                memory_module.memory_errors(),
            ):
                raise error
            assert caught.value.__cause__ is error
            with (
                pytest.raises(RuntimeError, match=r"one sequence must fit into memory"),
                memory_module.first_pass(),
            ):
                raise error
        for manager in (memory_module.memory_errors, memory_module.first_pass):
            for other in (RuntimeError("no luck"), ValueError("out of memory")):
                with pytest.raises(type(other)) as caught, manager():
                    raise other
                assert caught.value is other


# --- what goes at once -------------------------------------------------------------


def row_task(llm_attr, inp, ids, **made):
    """What an engine is asked, by token."""
    prompt = Prompt.read(inp, llm_attr.tokenizer)
    sides = split_units("token")
    text, sources, steps, _ = text_units(prompt, ids, sides, llm_attr.tokenizer)
    asked = {"baseline": 0, "kwargs": {}, **made}
    return RowTask(llm_attr, prompt, tuple(ids), text, sources, steps, **asked)


def some_ids(count, seed=0):
    """Ids of tokens of which none is the one that stands for an absent one."""
    return torch.randint(7, 300, (count,), generator=torch.manual_seed(seed)).tolist()


def scorer_of(model, tokenizer, prompt, generated, **made):
    """Who scores a text of so many tokens."""
    ids = some_ids(prompt + generated)
    llm_attr = wrapped(FeatureAblation, model, tokenizer)
    inp = TokenIdsInput(ids[:prompt], tokenizer)
    return SequenceScorer(row_task(llm_attr, inp, ids[prompt:], **made), generated)


def fast(tokens):
    """So many tokens of a pass are fast on the host, and few elsewhere."""
    return {"cpu": tokens, "cuda": 1}


def without(scorer, *absent):
    """Which units are present, all but these."""
    present = np.ones(scorer.n_units, dtype=bool)
    present[list(absent)] = False
    return present


class TestSequencesAtOnce:
    """The size of a batch: by memory, by speed, by what is pushed in vain."""

    @pytest.fixture
    def widths(self, monkeypatch):
        """Sizes of the batches of a scorer that is asked for so much."""
        monkeypatch.setattr(verification_module, "_verdicts", Forgetful())
        monkeypatch.setattr(sequences_module, "_ENOUGH_TOKENS", fast(10**9))

        def find(model, tokenizer, changed, *, free=2**40, sizes=(4, 8), **made):
            monkeypatch.setattr(sequences_module, "free_bytes", lambda _: free)
            scorer = scorer_of(model, tokenizer, *sizes, **made)
            if made.pop("anew", False):
                scorer.give_up_prefix()
            recorder = Recorder(monkeypatch, type(model))
            asked = [
                Perturbation(number, without(scorer, unit))
                for number, unit in enumerate(changed)
            ]
            assert len(dict(scorer.scores(asked))) == len(asked)
            return [shape[0] for shape in recorder.passed]

        return find

    @pytest.mark.parametrize("unit", [0, 3])
    @pytest.mark.parametrize("kind", ["sdpa", "eager", "float64", "logits", "mamba"])
    def test_half_of_the_free_memory_is_filled(self, tokenizer, widths, kind, unit):
        """With a layer's states, keys and values twice, scores and logits thrice."""
        changes = {
            "eager": {"attn_implementation": "eager"},
            "sdpa": {"attn_implementation": "sdpa"},
            "float64": {"attn_implementation": "sdpa", "dtype": torch.float64},
        }.get(kind, {})
        name = {"logits": "granite, scaled"}.get(kind, "llama")
        name = "mamba" if kind == "mamba" else name
        model = own_model(name, tokenizer, **changes)
        config, length, generated = model.config, 11, 8
        start = 0 if kind == "mamba" else unit
        pushed = length - start
        size = 8 if kind == "float64" else 4
        each = pushed * memory_module.bytes_per_token(model)
        if kind != "mamba":
            heads = config.num_key_value_heads
            head = config.hidden_size // config.num_attention_heads
            each += 2 * length * (2 * heads * head * size)
        if kind in ("eager", "mamba"):
            # A model that says nothing of its heads has one.
            heads = getattr(config, "num_attention_heads", 1)
            each += 3 * heads * pushed * length * 4
        if kind == "logits":
            each += 3 * generated * len(tokenizer) * 4
        fitting = 5
        for free in (2 * fitting * each, 2 * (fitting + 1) * each - 2):
            found = widths(model, tokenizer, [unit] * 11, free=free)
            assert found == [fitting, fitting, 1]

    def test_a_host_s_batch_has_a_limit_of_its_own(
        self, model, tokenizer, widths, monkeypatch
    ):
        """However much is free; an accelerator's is what is free."""
        one = widths(model, tokenizer, [0] * 40, free=2**20)
        assert 1 < one[0] < 40
        monkeypatch.setattr(sequences_module, "_MOST_HOST_BYTES", 2**19)
        assert widths(model, tokenizer, [0] * 40, free=2**30) == one

    @pytest.mark.parametrize("unit", [0, 3])
    def test_no_more_tokens_go_at_once_than_are_fast(
        self, model, tokenizer, widths, monkeypatch, unit
    ):
        """Those that are pushed count, not those that are read from the prefix."""
        pushed = 11 - unit
        for tokens in (4 * pushed, 5 * pushed - 1):
            monkeypatch.setattr(sequences_module, "_ENOUGH_TOKENS", fast(tokens))
            assert widths(model, tokenizer, [unit] * 9) == [4, 4, 1]

    def test_few_tokens_are_pushed_in_vain(self, model, tokenizer, widths):
        """A twelfth of a long text's sequences, or so many tokens of a short one."""
        # 0 + 1 + 2 + 3 + 4 + 5 = 15 tokens are pushed by those that change later.
        assert widths(model, tokenizer, range(12), sizes=(16, 4)) == [6, 6]
        text = sequences_module._BATCH_SHARE * (100 + 4 - 1)
        assert int(text) == 8
        assert widths(model, tokenizer, range(20), sizes=(100, 4)) == [8, 8, 4]
        # All change at one place: nothing is in vain.
        assert widths(model, tokenizer, [3] * 20, sizes=(16, 4)) == [20]
        # Without a prefix all are read from the first token on.
        assert widths(
            own_model("mamba", tokenizer), tokenizer, range(12), sizes=(16, 4)
        ) == [12]

    def test_the_user_s_number_holds(self, model, tokenizer, widths):
        """Whatever is free and however much is in vain."""
        asked = [*range(7)]
        assert widths(model, tokenizer, asked, sizes=(8, 4), batch_size=7) == [7]
        assert widths(model, tokenizer, asked, free=0, batch_size=3) == [3, 3, 1]

    def test_what_did_not_fit_once_is_not_tried_again(
        self, model, tokenizer, inp, target, passes
    ):
        """The batch that was halved bounds all later ones."""
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        expected = explained(llm_attr, inp, target, "fused").graph.rows
        passes.clear()
        passes.failure = lambda _, ids: no_memory() if len(ids) > 3 else None
        found = explained(llm_attr, inp, target, "fused")
        assert_same_rows(found.graph.rows, expected)
        assert len(passes.asked) - len(passes.passed) == 1
        assert max(shape[0] for shape in passes.passed) == 3

    def test_a_thousand_perturbations_are_laid_out_at_once(
        self, model, tokenizer, monkeypatch
    ):
        """More wait until these are scored; their masks need not exist before."""
        scorer = scorer_of(model, tokenizer, 3, 2)
        monkeypatch.setattr(sequences_module, "_LAID_OUT", 5)
        taken = []

        def ask():
            for number in range(12):
                taken.append(number)
                yield Perturbation(number, without(scorer, number % 3))

        numbers = []
        for number, _ in scorer.scores(ask()):
            numbers.append(number)
            assert len(taken) <= 5 * math.ceil(len(numbers) / 5)
        assert sorted(numbers) == [*range(12)]


class TestScoredSequences:
    """Scores of perturbed texts, against a plain pass over each."""

    @pytest.mark.parametrize("name", ["llama", "llama, anew", "mamba"])
    @pytest.mark.parametrize("batch_size", [None, 1, 4])
    def test_any_part_of_any_text(self, tokenizer, name, batch_size):
        """Before the part the plain scores; after it, too; inside, the model's own."""
        model = own_model(name.partition(",")[0], tokenizer)
        scorer = scorer_of(model, tokenizer, 5, 7, batch_size=batch_size)
        assert scorer.reuses_prefix == (name != "mamba")
        if "anew" in name:
            scorer.give_up_prefix()
            assert not scorer.reuses_prefix
        ids = torch.tensor(some_ids(12))
        generator = np.random.default_rng(0)
        asked, expected = [], {}

        def of(present):
            own = ids.clone()
            own[:11][torch.from_numpy(~present)] = 0
            with torch.no_grad():
                logits = model(own[None, :11]).logits[0].double()
            return logits.log_softmax(-1)[range(4, 11), ids[5:]].numpy()

        plain = of(np.ones(11, dtype=bool))
        assert scorer.plain == pytest.approx(plain, abs=1e-4)
        for number in range(14):
            present = generator.random(11) < (0.7 if number % 2 else 0.95)
            if number == 0:
                present[:] = True
            first = int(generator.integers(0, 6))
            stop = int(generator.integers(first + 1, 8)) if number % 3 else None
            asked.append(Perturbation(number, present, first, stop))
            expected[number] = plain.copy()
            inside = slice(first, stop)
            expected[number][inside] = of(present)[inside]
        found = list(scorer.scores(asked))
        assert sorted(number for number, _ in found) == [*range(14)]
        for number, scores in found:
            assert scores.dtype == np.float64
            assert scores == pytest.approx(expected[number], abs=2e-4), number
            scores[:] = 0.0
        # What was given is the asker's own.
        assert scorer.plain == pytest.approx(plain, abs=1e-4)

    def test_no_token_is_pushed_that_nothing_is_read_of(
        self, model, tokenizer, monkeypatch
    ):
        """From the first change, or what predicts the first score, to the last."""
        scorer = scorer_of(model, tokenizer, 5, 7)
        recorder = Recorder(monkeypatch, type(model))

        def pushed(present, *part):
            recorder.clear()
            list(scorer.scores([Perturbation(0, present, *part)]))
            return recorder.tokens

        assert pushed(without(scorer)) == 0
        assert pushed(without(scorer, 0)) == 11
        assert pushed(without(scorer, 3)) == 8
        assert pushed(without(scorer, 3), 0, 4) == 5
        assert pushed(without(scorer, 9), 0, 4) == 0
        # All scores are asked, and the first needs the state before the change.
        assert pushed(without(scorer, 9), 0) == 7
        assert pushed(without(scorer, 9), 5) == 2
        assert pushed(without(scorer, 9), 6) == 2
        assert pushed(without(scorer, 10), 6) == 1
        scorer.give_up_prefix()
        assert pushed(without(scorer, 9), 5) == 11

    def test_the_units_of_a_question_are_the_first_ones(self, model, tokenizer):
        """All after them are present."""
        scorer = scorer_of(model, tokenizer, 3, 4)
        assert scorer.n_units == 6
        found = scorer.indicator(np.array([True, False]))
        assert found.tolist() == [True, False, True, True, True, True]

    @pytest.mark.parametrize("kind", ["tokens", "image", "bare"])
    def test_forward_is_called_as_captum_calls_it(
        self, model, vision_model, tokenizer, target, kind
    ):
        """Hooks on the model itself, which its forward passes by, see nothing."""
        whole = {"tokens": model, "image": vision_model}.get(kind)
        whole = Bare(model).eval() if whole is None else whole
        inp = TextTokenInput(SHORT, tokenizer)
        if kind == "image":
            inp = image_input(tokenizer)
        seen = []
        handle = whole.register_forward_pre_hook(lambda *_: seen.append(1))
        llm_attr = wrapped(FeatureAblation, whole, tokenizer)
        explained(llm_attr, inp, target, "fused")
        handle.remove()
        assert not seen


class Reader(nn.Module):
    """A Llama whose answers change in passes of some kind."""

    device = torch.device("cpu")

    def __init__(self, inner, wrong):
        super().__init__()
        self.inner = inner
        self.wrong = wrong

    def get_input_embeddings(self):
        """The inner model's."""
        return self.inner.get_input_embeddings()

    @property
    def config(self):
        """The inner model's."""
        return self.inner.config

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
    ):
        """The inner model's logits, or those of a wrong kind."""
        before = past_key_values.get_seq_length() if past_key_values is not None else 0
        found = self.inner(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return self.wrong(found, past_key_values, before)


def forgets(found, _, before):
    """Other scores after a prefix."""
    if before:
        found.logits = found.logits.roll(1, -1)
    return found


def refuses(found, _, before):
    """No prefix is taken."""
    if before:
        raise TypeError
    return found


def refuses_any(found, cache, _):
    """Nothing is kept, either."""
    if cache is not None:
        raise TypeError
    return found


def refuses_short(found, _, before):
    """A short prefix is not taken."""
    if 0 < before < 6:
        raise TypeError
    return found


def is_full(found, _, before):
    """There is no memory after a prefix."""
    if before:
        raise no_memory()
    return found


class TestPrefixes:
    """Whether a model reads on from what it has read is found out."""

    @pytest.mark.parametrize("wrong", [forgets, refuses, refuses_any])
    @pytest.mark.parametrize("method", [FeatureAblation, LayerIntegratedGradients])
    def test_a_model_that_does_not_is_read_from_the_first_token(
        self, model, tokenizer, wrong, method
    ):
        """Same rows by each engine, at the first call and the next."""
        reader = Reader(model, wrong).eval()
        kwargs = {"n_steps": 20} if method is LayerIntegratedGradients else {}
        llm_attr = wrapped(method, reader, tokenizer)
        ids = some_ids(16)
        inp = TokenIdsInput(ids[:8], tokenizer)
        plain = wrapped(method, model, tokenizer)
        expected = explained(plain, inp, ids[8:], "fused", **kwargs).graph.rows
        for _ in range(2):
            found = explained(llm_attr, inp, ids[8:], "fused", **kwargs)
            assert_same_rows(found.graph.rows, expected)
        if method is FeatureAblation:
            task = row_task(llm_attr, inp, ids[8:])
            assert not SequenceScorer(task, 8).reuses_prefix

    def test_one_prefix_may_be_taken_and_another_not(self, model, tokenizer):
        """Then none is, from there on; the scores are the same."""
        reader = Reader(model, refuses_short).eval()
        scorer = scorer_of(reader, tokenizer, 8, 8)
        assert scorer.reuses_prefix
        plain = scorer_of(model, tokenizer, 8, 8)
        asked = [Perturbation(unit, without(scorer, unit)) for unit in (2, 10, 9, 5)]
        found, expected = dict(scorer.scores(asked)), dict(plain.scores(asked))
        for unit, scores in expected.items():
            assert found[unit] == pytest.approx(scores, abs=1e-4)
        assert not scorer.reuses_prefix
        assert not scorer_of(reader, tokenizer, 8, 8).reuses_prefix

    @pytest.mark.parametrize("method", [FeatureAblation, LayerIntegratedGradients])
    def test_a_check_that_does_not_fit_is_told(self, model, tokenizer, method):
        """Memory is no matter of what the model can do."""
        reader = Reader(model, is_full).eval()
        kwargs = {"n_steps": 20} if method is LayerIntegratedGradients else {}
        ids = some_ids(40)
        inp = TokenIdsInput(ids[:20], tokenizer)
        llm_attr = wrapped(method, reader, tokenizer)
        with pytest.raises(RuntimeError, match="one sequence must fit into memory"):
            explained(llm_attr, inp, ids[20:], "fused", **kwargs)

    def test_other_errors_of_the_first_pass_are_passed_on(
        self, model, tokenizer, monkeypatch
    ):
        """Without and with a cache to blame."""
        monkeypatch.setattr(verification_module, "_verdicts", Forgetful())
        recorder = Recorder(monkeypatch, type(model))
        for length in (1, 6):
            recorder.clear()
            recorder.failure = lambda *_: RuntimeError("no luck")
            with pytest.raises(RuntimeError, match=r"^no luck$"):
                scorer_of(model, tokenizer, 1, length)

    def test_the_verdict_is_kept(self, model, tokenizer):
        """A prefix that was given up is not tried in the next call."""
        reader = Reader(model, lambda found, *_: found).eval()
        assert scorer_of(reader, tokenizer, 4, 6).reuses_prefix
        one = scorer_of(reader, tokenizer, 4, 6)
        assert one.reuses_prefix
        one.give_up_prefix()
        other = scorer_of(reader, tokenizer, 4, 6)
        assert not other.reuses_prefix
        assert other.plain == pytest.approx(one.plain, abs=1e-6)


class TestSharedGradients:
    """How points and targets are shared out over passes."""

    @staticmethod
    def passes_of(model, tokenizer, prompt, generated, **made):
        """The passes of an engine over so many tokens; and which rows it has."""
        ids = some_ids(prompt + generated)
        layer = model.get_input_embeddings()
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer, layer=layer)
        inp = TokenIdsInput(ids[:prompt], tokenizer)
        made = {"kwargs": {"n_steps": 5}, **made}
        task = row_task(llm_attr, inp, ids[prompt:], **made)
        return gradient_module._Passes(task, generated)

    @staticmethod
    def recorded(passes, name, monkeypatch):
        """What a method is given, and what it gives, at each call."""
        calls = []
        method = getattr(passes, name)

        def record(*given):
            found = method(*given)
            calls.append((given, found))
            return found

        monkeypatch.setattr(passes, name, record)
        return calls

    def test_the_cheapest_way_by_a_count_of_what_is_done(self, tokenizer, monkeypatch):
        """Its cost is that of the passes it makes; no other way costs less."""
        model = own_model("llama", tokenizer, num_hidden_layers=3)
        # Of the last of three layers a fifth is left for what stands before.
        start, lighter = gradient_module._START["cpu"], 1 - 0.8 / 3
        forwards = Recorder(monkeypatch, type(model))
        made = []
        grad = torch.autograd.grad

        def record(outputs, inputs, *args, **kwargs):
            if not isinstance(inputs, torch.Tensor):
                made.append([tuple(leaf.shape[:2]) for leaf in inputs])
            return grad(outputs, inputs, *args, **kwargs)

        def counted(passes, plan, points):
            forwards.clear()
            made.clear()
            passes._pass(plan, slice(0, points))
            done = sum(batch * tokens + start for batch, tokens in forwards.passed)
            for leaves in made:
                batch, own = leaves[-1]
                before = sum(tokens for _, tokens in leaves[:-1])
                done += batch * (own + lighter * before) + start * len(leaves)
            return done

        monkeypatch.setattr(torch.autograd, "grad", record)
        some = [(3, 1, 1, 1), (3, 9, 1, 64), (40, 12, 1, 6), (6, 30, 3, 10)]
        for reads_on, size in itertools.product((False, True), [*some, (1, 4, 2, 1)]):
            prompt, generated, points, most = size
            passes = self.passes_of(model, tokenizer, prompt, generated)
            targets = passes._targets_of(range(generated))
            plan = passes._plan(targets, points, most, reads_on)
            assert plan.cost == pytest.approx(counted(passes, plan, points), rel=1e-9)
            assert plan.copies == 1 or points * plan.copies <= most
            for parts, copies in itertools.product(
                range(1, min(generated, gradient_module.MOST_SEGMENTS) + 1),
                (1, 2, 4, 8, 16, 32, 64),
            ):
                if copies > 1 and (copies > generated or points * copies > most):
                    continue
                cost = 0.0
                segments = passes._segments(targets, parts, reads_on)
                for number, one in enumerate(segments):
                    own, before = one.stop - one.start, one.start * lighter
                    read = number + 1 if reads_on else 1
                    batch = points * copies
                    cost += batch * own + start
                    groups = math.ceil(len(one.targets) / copies)
                    cost += groups * (batch * (own + before) + start * read)
                assert plan.cost <= cost * (1 + 1e-9)

    @pytest.mark.parametrize("reads_on", [False, True])
    @pytest.mark.parametrize("prompt", [1, 5])
    def test_segments_hold_the_text_up_to_the_last_target(
        self, model, tokenizer, reads_on, prompt
    ):
        """Read on, each begins where the one before ends; else all at the start."""
        passes = self.passes_of(model, tokenizer, prompt, 7)
        targets = passes._targets_of(range(2, 7))
        segments = passes._segments(targets, 2, reads_on)
        assert sum((one.targets for one in segments), ()) == tuple(targets)
        assert segments[-1].stop == prompt + 6
        sizes = [len(one.targets) for one in segments if one.targets]
        assert sizes == [3, 2]
        starts = [one.start for one in segments]
        stops = [one.stop for one in segments]
        if reads_on:
            assert starts == [0, prompt + 1, prompt + 4]
            assert stops == [prompt + 1, prompt + 4, prompt + 6]
        else:
            assert starts == [0, 0]
            assert stops == [prompt + 4, prompt + 6]
        first = passes._segments(passes._targets_of(range(7)), 1, reads_on)
        assert len(first) == (2 if reads_on and prompt > 1 else 1)

    def test_all_ways_give_the_same_scores(self, tokenizer):
        """Any number of segments and copies, read on or not."""
        model = own_model("llama", tokenizer, dtype=torch.float64)
        passes = self.passes_of(model, tokenizer, 3, 6)
        targets = passes._targets_of(range(6))
        found = []
        for parts, copies, reads_on in itertools.product(
            (1, 3), (1, 2, 4), (False, True)
        ):
            segments = passes._segments(targets, parts, reads_on)
            plan = gradient_module._Plan(segments, copies, reads_on, 0.0)
            total = np.zeros((6, 8))
            for place, scores in passes._pass(plan, slice(1, 4)):
                total[place, : len(scores)] += scores
            found.append(total)
        for total in found[1:]:
            assert_same_rows(total, found[0], 1e-9)

    @pytest.mark.parametrize(("batch_size", "sizes"), [(4, {4, 3}), (5, {5})])
    def test_batches_are_of_about_one_size(
        self, model, tokenizer, passes, batch_size, sizes
    ):
        """Ten points in fours: four, three and three."""
        inp = TextTokenInput("Ana has", tokenizer)
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        arguments = {"n_steps": 10, "batch_size": batch_size}
        explained(llm_attr, inp, " 3", "fused", units="sentence", **arguments)
        found = [shape[0] for shape in passes.passed if shape[0] > 1]
        assert set(found) == sizes
        assert sum(found) == 10

    def test_points_that_go_at_once_by_memory_and_speed(self, tokenizer, monkeypatch):
        """Half of what is free; the user's number; no more than are fast."""
        model = own_model("llama", tokenizer)
        each = 11 * memory_module.bytes_per_token(model, kept=True)
        recorder = Recorder(monkeypatch, type(model))

        def widest(free, enough=10**9, **made):
            monkeypatch.setattr(gradient_module, "free_bytes", lambda _: free)
            monkeypatch.setattr(gradient_module, "ENOUGH_TOKENS", fast(enough))
            made["kwargs"] = {"n_steps": 12, **made.get("kwargs", {})}
            passes = self.passes_of(model, tokenizer, 4, 8, **made)
            passes._reads_on = False
            recorder.clear()
            passes.scores(range(7, 8))
            return [shape[0] for shape in recorder.passed]

        assert widest(2 * 4 * each) == [4, 4, 4]
        assert widest(2 * 5 * each - 2) == [4, 4, 4]
        assert widest(0) == [1] * 12
        assert widest(2**40) == [12]
        assert widest(2**40, enough=6 * 11) == [6, 6]
        assert widest(2**40, enough=7 * 11 - 1) == [6, 6]
        assert widest(2**40, enough=1) == [1] * 12
        assert widest(0, batch_size=6) == [6, 6]
        assert widest(2**40, kwargs={"internal_batch_size": 3}) == [3] * 4
        assert widest(2**40, kwargs={"internal_batch_size": 3}, batch_size=2) == [2] * 6

    def test_what_did_not_fit_once_is_not_tried_again(
        self, model, tokenizer, inp, target, passes
    ):
        """Points and copies together are halved, for good."""
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        expected = explained(llm_attr, inp, target, "fused", n_steps=16)
        passes.clear()
        passes.failure = lambda _, ids: no_memory() if len(ids) > 3 else None
        found = explained(llm_attr, inp, target, "fused", n_steps=16)
        assert_same_rows(found.graph.rows, expected.graph.rows)
        sizes = [shape[0] for shape in passes.asked if shape[0] > 3]
        assert sizes == sorted(set(sizes), reverse=True)
        assert max(shape[0] for shape in passes.passed) in (2, 3)

    def test_a_long_answer_is_read_on(self, model, tokenizer, passes):
        """Where that is cheaper, and the model says the same: in several segments."""
        ids = some_ids(130)
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        inp = TokenIdsInput(ids[:100], tokenizer)
        found = explained(llm_attr, inp, ids[100:], "fused", n_steps=4)
        own = [shape[1] for shape in passes.passed]
        assert found.graph.rows.shape == (30, 130)
        # Most of what is pushed is the answer, as the prompt is read once a point.
        assert min(own) < 30
        assert passes.tokens < 4 * 130 * 2 + 3 * 130
        assert any(tokens == 99 for tokens in own)

    def test_what_a_short_text_could_gain_is_not_worth_finding_out(
        self, model, tokenizer, monkeypatch
    ):
        """Whether the model reads on is not tried; where it is long, it is once."""
        for prompt, generated, tried in ((4, 3, 0), (60, 20, 3)):
            passes = self.passes_of(model, tokenizer, prompt, generated)
            plans = self.recorded(passes, "_pass", monkeypatch)
            recorder = Recorder(monkeypatch, type(model))
            passes.scores(range(generated))
            read = sum(len(plan.segments) for (plan, _), _ in plans)
            assert len(recorder.passed) == read + tried
            recorder.clear()
            passes._task.kept.clear()
            passes.scores(range(generated))
            assert len(recorder.passed) == read
            assert plans[0][0][0].reads_on == bool(tried)


class TestGivenToGradients:
    """Arguments of Captum's gradient methods that the engine knows, and the rest."""

    @pytest.mark.parametrize(
        ("method", "known"),
        [
            (
                LayerIntegratedGradients,
                {"method": "riemann_left", "n_steps": 2, "internal_batch_size": 14},
            ),
            (LayerGradientXActivation, {}),
            (LayerGradientShap, {"n_samples": 2, "stdevs": 0.0}),
        ],
    )
    def test_what_is_known_and_what_is_not(
        self, model, tokenizer, inp, target, method, known
    ):
        """Each name by itself; what is unknown is named."""
        llm_attr = wrapped(method, model, tokenizer)
        never = {"attribute_to_layer_input": False}
        if method is not LayerGradientXActivation:
            known = {**known, "baselines": 0}
        for name, value in {**known, **never}.items():
            task = row_task(llm_attr, inp, target, kwargs={name: value})
            assert gradient_module._unsuitable(task) is None
        others = {"method", "n_steps", "n_samples", "baselines", "grad_kwargs"}
        for name in others - set(known):
            task = row_task(llm_attr, inp, target, kwargs={name: 0})
            assert repr(name) in gradient_module._unsuitable(task)
        task = row_task(
            llm_attr, inp, target, kwargs={"attribute_to_layer_input": True}
        )
        assert "the layer's input" in gradient_module._unsuitable(task)

    def test_why_not(self, model, tokenizer, inp, target):
        """Layers, wrappers, baselines and noise."""

        def why(llm_attr, **kwargs):
            task = row_task(llm_attr, inp, target, kwargs=kwargs)
            return gradient_module._unsuitable(task)

        layers = [model.model.layers[0], model.model.layers[1]]
        with pytest.warns(UserWarning, match="Multiple layers provided"):
            made = LayerIntegratedGradients(model, layers)
        several = LLMGradientAttribution(made, tokenizer)
        assert why(several) == "it attributes to several layers"
        integrated = wrapped(LayerIntegratedGradients, model, tokenizer)
        assert why(integrated, baselines=1) == "its baselines are not absent units"
        assert why(integrated, baselines=torch.ones(1, 5)) is None
        assert why(integrated, baselines=0.0) is None
        assert "by a function" in why(integrated, baselines=torch.zeros_like)
        assert "by a function" in why(integrated, baselines=(0,))
        sampled = wrapped(LayerGradientShap, model, tokenizer)
        assert why(sampled, stdevs=0.5) == "it adds noise to indicators"
        assert why(sampled, stdevs=0) is None
        drawn = LLMGradientAttribution(EmbeddingGradientShap(model), tokenizer)
        assert why(drawn, stdevs=0.5) is None

        class Own(LLMGradientAttribution):
            def attribute(self, *args, **kwargs):
                return super().attribute(*args, **kwargs)

        own = Own(integrated.attr_method, tokenizer)
        assert why(own) == "Own may compute something of its own"

    @pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 1, 3), (1, 9), (1, 5)])
    def test_baselines_of_any_width(self, model, tokenizer, inp, target, shape):
        """Of tokens that they do not reach to, all are absent; more are left out."""
        given = torch.zeros(shape)
        given[..., 1] = 1.0
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        whole = torch.zeros((1, 5))
        whole[0, 1] = 1.0
        found, expected = (
            explained(llm_attr, inp, target, "fused", n_steps=2, baselines=one)
            for one in (given, whole)
        )
        assert_same_rows(found.graph.rows, expected.graph.rows, 1e-6)

    @pytest.mark.parametrize("multiplied", [True, False])
    def test_sampled_baselines(self, tokenizer, inp, target, multiplied):
        """The gradient times the difference to what was drawn, or alone."""
        model = own_model("llama", tokenizer, dtype=torch.float64)
        made = {"multiply_by_inputs": multiplied}
        llm_attr = wrapped(LayerGradientShap, model, tokenizer, **made)
        # Each is all absent, so that whatever is drawn is the same.
        assert_equals_loop(llm_attr, inp, target, allowed=1e-6, n_samples=3)

    @pytest.mark.parametrize("multiplied", [True, False])
    def test_drawn_points(self, model, tokenizer, inp, target, multiplied, monkeypatch):
        """Their mean gradient, times the differences that were drawn, or alone."""

        def twice(_, here, there, n_samples, stdevs):
            assert (n_samples, stdevs) == (2, 0.5)
            assert there.shape == (3, *here.shape)
            return torch.stack([here, here]), torch.stack([here, here])

        monkeypatch.setattr(EmbeddingGradientShap, "draw", twice)
        shap = EmbeddingGradientShap(model, multiply_by_inputs=multiplied)
        llm_attr = LLMGradientAttribution(shap, tokenizer)
        kwargs = {"n_samples": 2, "stdevs": 0.5, "baselines": torch.eye(3, 5)}
        found = explained(llm_attr, inp, target, "fused", **kwargs)
        plain = wrapped(
            LayerGradientXActivation, model, tokenizer, multiply_by_inputs=multiplied
        )
        expected = explained(plain, inp, target, "fused")
        assert_same_rows(found.graph.rows, expected.graph.rows)


class TestFirstPasses:
    """What an engine asks of a model before anything else."""

    @staticmethod
    def by_ablation(model, tokenizer, prompt, generated):
        """An engine of perturbations that is ready."""
        return scorer_of(model, tokenizer, prompt, generated)

    by_gradients = staticmethod(TestSharedGradients.passes_of)
    ways = pytest.mark.parametrize("way", ["by_ablation", "by_gradients"])

    @ways
    def test_a_text_as_long_as_captum_reads_it_must_suit(
        self, fresh_model, tokenizer, way
    ):
        """With the last target, which the engines need not read."""
        make = getattr(self, way)
        scaling = {"rope_type": "dynamic", "original_max_position_embeddings": 9}
        fresh_model.config.rope_parameters = scaling
        make(fresh_model, tokenizer, 4, 5)
        with pytest.raises(Unsuitable, match="whole text, which has 10"):
            make(fresh_model, tokenizer, 4, 6)

    @ways
    def test_no_graph_is_kept_of_a_check(self, model, tokenizer, monkeypatch, way):
        """Whatever the mode of the caller is."""
        monkeypatch.setattr(verification_module, "_verdicts", Forgetful())
        recorder = Recorder(monkeypatch, type(model))
        modes = []
        recorder.failure = lambda *_: modes.append(torch.is_grad_enabled())
        with torch.enable_grad():
            engine = getattr(self, way)(model, tokenizer, 60, 20)
            if way == "by_ablation":
                list(engine.scores([Perturbation(0, without(engine, 1))]))
            else:
                engine._pass = lambda *_: []
                engine.scores(range(20))
                assert engine._reads_on
        assert len(modes) >= 4
        assert not any(modes)

    def test_no_parameter_takes_part_in_a_gradient(
        self, fresh_model, tokenizer, monkeypatch
    ):
        """Nor does any stay so; those that were fixed stay fixed."""
        fresh_model.requires_grad_(True)
        fresh_model.model.norm.requires_grad_(False)
        trained = [p.requires_grad for p in fresh_model.parameters()]
        passes = TestSharedGradients.passes_of(fresh_model, tokenizer, 3, 4)
        recorder = Recorder(monkeypatch, type(fresh_model))
        during = []
        recorder.failure = lambda *_: during.extend(
            p.requires_grad for p in fresh_model.parameters()
        )
        passes.scores(range(4))
        assert during
        assert not any(during)
        assert [p.requires_grad for p in fresh_model.parameters()] == trained

    @ways
    def test_memory_that_runs_out_is_told(self, model, tokenizer, monkeypatch, way):
        """In each of the checks."""
        monkeypatch.setattr(verification_module, "_verdicts", Forgetful())
        recorder = Recorder(monkeypatch, type(model))
        for number in (1, 2, 3):
            recorder.clear()
            recorder.failure = lambda n, _, k=number: no_memory() if n == k else None
            with pytest.raises(RuntimeError, match="one sequence must fit into mem"):
                getattr(self, way)(model, tokenizer, 6, 5)

    @pytest.mark.parametrize("generated", [1, 2, 6])
    def test_first_and_last_plain_score(self, model, tokenizer, monkeypatch, generated):
        """By a pass; or those that ablation has left, if they reach as far."""
        passes = TestSharedGradients.passes_of(model, tokenizer, 3, generated)
        plain = scorer_of(model, tokenizer, 3, generated).plain
        ends = pytest.approx((plain[0], plain[-1]), abs=1e-4)
        with torch.no_grad():
            assert passes._plain_scores() == ends
        recorder = Recorder(monkeypatch, type(model))
        left = -1.0 - np.arange(generated + 2)
        for longer in (0, 2):
            passes._task.kept["scores"] = left[: generated + longer]
            assert passes._plain_scores() == (-1.0, -float(generated))
        assert not recorder.passed
        passes._task.kept["scores"] = left[: generated - 1]
        with torch.no_grad():
            assert passes._plain_scores() == ends

    def test_all_plain_scores_are_left_for_others(self, model, tokenizer):
        """Where they are those of the whole text."""
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        ids = some_ids(9)
        task = row_task(llm_attr, TokenIdsInput(ids[:4], tokenizer), ids[4:])
        SequenceScorer(task, 3)
        assert "scores" not in task.kept
        scorer = SequenceScorer(task, 5)
        assert task.kept["scores"] is scorer.plain

    @pytest.mark.parametrize(("prompt", "reads"), [(1, False), (2, True), (9, True)])
    def test_a_prompt_of_one_token_leaves_nothing_to_read_on_from(
        self, model, tokenizer, monkeypatch, prompt, reads
    ):
        """Its only token belongs to the answer's first segment."""
        passes = TestSharedGradients.passes_of(model, tokenizer, prompt, 5)
        recorder = Recorder(monkeypatch, type(model))
        with torch.no_grad():
            assert passes._can_read_on() is reads
        assert [shape[1] for shape in recorder.passed][:2] == (
            [prompt - 1, 5] if reads else []
        )

    @pytest.mark.parametrize("wrong", [forgets, refuses])
    def test_a_model_that_does_not_read_on_is_asked_once(
        self, model, tokenizer, wrong, monkeypatch
    ):
        """By each call."""
        reader = Reader(model, wrong).eval()
        passes = TestSharedGradients.passes_of(reader, tokenizer, 60, 20)
        tried = TestSharedGradients.recorded(passes, "_can_read_on", monkeypatch)
        for _ in range(2):
            passes._task.kept.clear()
            passes.scores(range(20))
        assert tried == [((), False)]

    def test_a_prefix_of_any_text_of_two_tokens_or_more(
        self, model, tokenizer, monkeypatch
    ):
        """Of one token nothing stands before the last."""
        monkeypatch.setattr(verification_module, "_verdicts", Forgetful())
        for prompt, generated in ((1, 2), (2, 1), (3, 3), (1, 8), (9, 9)):
            assert scorer_of(model, tokenizer, prompt, generated).reuses_prefix
        assert not scorer_of(model, tokenizer, 1, 1).reuses_prefix


class TestLinuxFiles:
    """Where Linux tells of memory."""

    def test_the_kernel_s_own_paths(self, monkeypatch):
        """``/proc/meminfo`` and the limit of the control group."""
        texts = {
            "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n",
            "/sys/fs/cgroup/memory.max": "7000\n",
            "/sys/fs/cgroup/memory.current": "3000\n",
        }
        monkeypatch.setattr(Path, "read_text", lambda path, *_: texts[path.as_posix()])
        cpu = torch.device("cpu")
        assert memory_module.free_bytes(cpu) == 4000
        texts["/sys/fs/cgroup/memory.max"] = "1000\n"
        assert memory_module.free_bytes(cpu) == 0
        texts["/sys/fs/cgroup/memory.max"] = "max\n"
        assert memory_module.free_bytes(cpu) == 8 * 1024


# --- interrupts ------------------------------------------------------------------


class TestInterrupts:
    """The same call on the same object goes on from what was finished."""

    @pytest.mark.parametrize(
        ("method", "kwargs"),
        [
            (FeatureAblation, {"batch_size": 1}),
            (ShapleyValues, {"batch_size": 4}),
            (ShapleyValueSampling, {"n_samples": 120, "batch_size": 64}),
            (LayerIntegratedGradients, {"n_steps": 8, "batch_size": 1}),
        ],
    )
    def test_finished_perturbations_are_not_repeated(
        self, model, tokenizer, passes, method, kwargs, monkeypatch
    ):
        """Both calls together push what one would, and a few checks."""
        # A chunk of gradients is finished as a whole.
        monkeypatch.setattr(gradient_module, "TOGETHER", 2)
        inp = TextTokenInput("Ana has", tokenizer)
        target = tokenizer.encode(" 3 pens. So she sells 9 of them.")
        if method is ShapleyValues:
            target = target[:4]
        llm_attr = wrapped(method, model, tokenizer)
        cage = GraphContextAttribution(llm_attr)
        expected = cage.attribute(inp, target, strategy="fused", **kwargs)
        whole, calls = passes.sequences, len(passes.passed)
        assert calls >= 8
        passes.clear()
        stop = calls * 3 // 4
        passes.failure = lambda n, _: KeyboardInterrupt() if n == stop else None
        torch.manual_seed(0)
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, target, strategy="fused", **kwargs)
        done = passes.sequences
        passes.failure = lambda *_: None
        passes.clear()
        found = cage.attribute(inp, target, strategy="fused", **kwargs)
        assert passes.sequences < 0.7 * whole
        repeated = done + passes.sequences - whole
        # Checks and points of the path; rows of Shapley values come by the hundred.
        chunk = 8 * 3  # points of two rows, in up to three segments
        allowed = {ShapleyValueSampling: 700, LayerIntegratedGradients: chunk + 8}
        assert repeated <= allowed.get(method, 8)
        if method is not ShapleyValueSampling:
            assert_same_rows(found.graph.rows, expected.graph.rows)
        else:
            # A permutation's row adds up to the same, whatever was drawn.
            assert found.graph.rows.sum(axis=1) == pytest.approx(
                expected.graph.rows.sum(axis=1), abs=1e-4
            )
        passes.clear()
        again = cage.attribute(inp, target, strategy="fused", **kwargs)
        assert passes.sequences > 0.9 * whole
        assert again.graph.rows.shape == found.graph.rows.shape

    @pytest.mark.parametrize("method", [ShapleyValues, FeatureAblation])
    @pytest.mark.parametrize("fewer_first", [False, True])
    def test_work_of_a_call_with_fewer_rows_is_not_taken_for_that_of_all(
        self, model, tokenizer, passes, method, fewer_first
    ):
        """Rows up to the explained one, then all; or the other way round."""
        inp = TextTokenInput("Ana has", tokenizer)
        target = tokenizer.encode(" 3 pens. So")[:4]
        llm_attr = wrapped(method, model, tokenizer)
        questions = [{}, {"tolerance": 0.1, "explain": 1}]
        first, second = reversed(questions) if fewer_first else questions
        expected = explained(llm_attr, inp, target, "fused", **second).graph.rows
        cage = GraphContextAttribution(llm_attr)
        passes.clear()
        passes.failure = lambda n, _: KeyboardInterrupt() if n == 5 else None
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, target, strategy="fused", batch_size=1, **first)
        passes.failure = lambda *_: None
        found = cage.attribute(inp, target, strategy="fused", batch_size=1, **second)
        assert_same_rows(found.graph.rows, expected)

    @pytest.mark.parametrize("change", ["target", "weights", "kwargs"])
    def test_finished_work_serves_that_call_alone(
        self, fresh_model, tokenizer, inp, monkeypatch, change
    ):
        """Another question, or a changed model, starts afresh."""
        passes = Recorder(monkeypatch, type(fresh_model))
        method = LayerIntegratedGradients if change == "kwargs" else FeatureAblation
        llm_attr = wrapped(method, fresh_model, tokenizer)
        kwargs = {"n_steps": 12} if change == "kwargs" else {}
        target = tokenizer.encode(ANSWER)
        cage = GraphContextAttribution(llm_attr)
        passes.failure = lambda n, _: KeyboardInterrupt() if n == 10 else None
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, target, strategy="fused", batch_size=1, **kwargs)
        passes.failure = lambda *_: None
        if change == "target":
            target = [*target[:-1], 9]
        elif change == "weights":
            with torch.no_grad():
                next(fresh_model.parameters()).mul_(1.1)
        else:
            kwargs = {"n_steps": 3}
        found = cage.attribute(inp, target, strategy="fused", batch_size=1, **kwargs)
        fresh = explained(llm_attr, inp, target, "loop", **kwargs)
        assert_same_rows(found.graph.rows, fresh.graph.rows)


# --- the model is left as it was ---------------------------------------------------


def state_of(model):
    """What must not change: flags, gradients, modes, hooks."""
    return {
        "requires": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "own": [sorted(vars(module)) for module in model.modules()],
    }


class TestLeftAsFound:
    """Flags, hooks, modes, gradients and generators, after success and failure."""

    @pytest.fixture
    def marked(self, tokenizer):
        """A model in training mode, one parameter of which is frozen."""
        model = tiny_model(vocab_size=len(tokenizer)).train()
        model.model.layers[0].eval()
        model.model.norm.weight.requires_grad_(False)
        return model

    @pytest.mark.parametrize("method", METHODS)
    def test_after_success(self, marked, tokenizer, method):
        """No parameter got a gradient."""
        llm_attr = wrapped(method, marked, tokenizer)
        inp = TextTokenInput("Ana has", tokenizer)
        before = state_of(marked)
        explained(llm_attr, inp, " 3 pens", "fused", **METHODS[method])
        assert state_of(marked) == before
        assert all(gradient is None for gradient in before["gradients"])

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("number", [1, 3])
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_after_an_error_within_a_pass(
        self, marked, tokenizer, method, number, error
    ):
        """Deep inside, while hooks are set and flags are changed."""
        inp = TextTokenInput("Ana has", tokenizer)
        llm_attr = wrapped(method, marked, tokenizer)
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) >= number:
                raise error("no luck")

        handle = marked.model.layers[1].mlp.register_forward_hook(fail)
        before = state_of(marked)
        with pytest.raises(error, match="no luck"):
            explained(
                llm_attr, inp, " 3 pens", "fused", batch_size=1, **METHODS[method]
            )
        assert state_of(marked) == before
        handle.remove()

    def test_after_an_error_on_the_way_back(
        self, marked, tokenizer, inp, target, monkeypatch
    ):
        """In the backward pass."""

        def fail(*_args, **_kwargs):
            raise RuntimeError("no luck")

        llm_attr = wrapped(LayerIntegratedGradients, marked, tokenizer)
        before = state_of(marked)
        monkeypatch.setattr(torch.autograd, "grad", fail)
        with pytest.raises(RuntimeError, match="no luck"):
            explained(llm_attr, inp, target, "fused", n_steps=2)
        assert state_of(marked) == before

    @pytest.mark.parametrize("method", DETERMINISTIC)
    def test_nothing_is_drawn_by_a_deterministic_method(self, model, tokenizer, method):
        """Torch's and NumPy's generators stand where they stood."""
        llm_attr = wrapped(method, model, tokenizer)
        cage = GraphContextAttribution(llm_attr)
        inp = TextTokenInput("Ana has", tokenizer)
        before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
        cage.attribute(inp, " 3 pens", strategy="fused", **METHODS[method])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert str(np.random.get_state()) == before[1]  # noqa: NPY002

    @pytest.mark.parametrize("method", [FeatureAblation, LayerGradientXActivation])
    @pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
    def test_inside_any_gradient_mode(
        self, model, tokenizer, inp, target, method, around
    ):
        """The user's mode is neither needed nor changed."""
        llm_attr = wrapped(method, model, tokenizer)
        expected = explained(llm_attr, inp, target, "fused").graph.rows
        with around():
            mode = torch.is_grad_enabled()
            found = explained(llm_attr, inp, target, "fused").graph.rows
            assert torch.is_grad_enabled() == mode
        assert (found == expected).all()

    def test_memory_of_a_pass_is_given_back(self, model, tokenizer, inp, target):
        """No graph of a gradient lives on in the result or the wrapper."""
        llm_attr = wrapped(LayerIntegratedGradients, model, tokenizer)
        cage = GraphContextAttribution(llm_attr)
        result = cage.attribute(inp, target, n_steps=2, strategy="fused")
        assert not result.seq_attr.requires_grad
        assert not result.token_attr.requires_grad


# --- the registry ------------------------------------------------------------------


class Mine(FeatureAblation):
    """A downstream method: plain ablation under another name."""


class MyGradient(LayerGradientXActivation):
    """A downstream gradient method."""


@pytest.fixture
def registry(monkeypatch):
    """The registered engines, which are put back afterwards."""
    kept = dict(_engines)
    for method, engine in kept.items():
        monkeypatch.setitem(_engines, method, engine)
    for method in (Mine, MyGradient):
        monkeypatch.setitem(_engines, method, None)
        del _engines[method]
    return _engines


def by_captum(task, steps):
    """Rows of ablation, one perturbed text at a time."""
    model = task.llm_attr.model
    ids = [*task.prompt.ids, *task.generated]
    P = len(task.sources)

    def scores(ids):
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        return [float(logs[P + t - 1, n]) for t, n in enumerate(task.generated)]

    plain = scores(ids)
    columns = [scores([*ids[:unit], 0, *ids[unit + 1 :]]) for unit in range(len(ids))]
    for step in steps:
        row = [plain[step] - column[step] for column in columns]
        yield [*row[: P + step], *([0.0] * (len(ids) - P - step))]


class TestRegistry:
    """A downstream method can bring its own engine."""

    def test_an_engine_is_registered_by_a_call(
        self, registry, model, tokenizer, inp, target
    ):
        """A function of a task and steps is enough."""
        assert register_engine(Mine, by_captum) is None
        assert "Mine" in engine_names()
        assert isinstance(registry[Mine], Engine)
        llm_attr = wrapped(Mine, model, tokenizer)
        assert_equals_loop(llm_attr, inp, target)
        assert explained(llm_attr, inp, target, "auto").meta["strategy"] == "fused"

    @pytest.mark.usefixtures("registry")
    def test_an_engine_is_registered_by_a_decorator(
        self, model, tokenizer, inp, target
    ):
        """Which gives the function back."""
        asked = []

        @register_engine(Mine)
        def rows(task, steps):
            asked.append(list(steps))
            return list(by_captum(task, steps))

        assert callable(rows)
        assert_equals_loop(wrapped(Mine, model, tokenizer), inp, target)
        assert asked == [list(range(len(target)))]

    def test_an_engine_says_what_it_cannot_do(
        self, registry, model, tokenizer, inp, target, caplog
    ):
        """Before a model call, or when it looks at the model."""
        llm_attr = wrapped(Mine, model, tokenizer)
        register_engine(Mine, Engine(by_captum, unsuitable=lambda _: "it is Monday"))
        with pytest.raises(ValueError, match="Mine: it is Monday"):
            explained(llm_attr, inp, target, "fused")

        def rows(_task, _steps):
            raise Unsuitable("it is Tuesday")
            yield

        register_engine(Mine, rows)
        with pytest.raises(ValueError, match="LlamaForCausalLM: it is Tuesday"):
            explained(llm_attr, inp, target, "fused")
        with caplog.at_level(logging.WARNING, "captum_cage"):
            found = explained(llm_attr, inp, target, "auto")
        assert found.meta["strategy"] == "loop"
        assert "it is Tuesday" in caplog.text
        assert registry[Mine].by_row

    def test_subclasses_take_the_loop(self, model, tokenizer, inp, target, caplog):
        """They may compute something else: the very class counts."""
        llm_attr = wrapped(Mine, model, tokenizer)
        with caplog.at_level(logging.WARNING, "captum_cage"):
            result = explained(llm_attr, inp, target, "auto")
        assert result.meta["strategy"] == "loop"
        assert "Mine has no engine" in caplog.text
        with pytest.raises(ValueError, match=r"Mine has no engine.*FeatureAblation"):
            explained(llm_attr, inp, target, "fused")

    @pytest.mark.usefixtures("registry")
    def test_a_registered_engine_serves_no_subclass(
        self, model, tokenizer, inp, target
    ):
        """Nor the class above it."""

        class Further(Mine):
            pass

        register_engine(Mine, lambda task, steps: [[0.0] * task.width for _ in steps])
        for method in (Further, FeatureAblation):
            result = explained(wrapped(method, model, tokenizer), inp, target, "auto")
            assert np.abs(result.graph.rows).max() > 0

    @pytest.mark.usefixtures("registry")
    def test_an_engine_can_be_replaced(self, model, tokenizer, inp, target):
        """The last one counts, also for Captum's own methods."""
        register_engine(
            FeatureAblation, lambda task, steps: [[0.0] * task.width for _ in steps]
        )
        llm_attr = wrapped(FeatureAblation, model, tokenizer)
        assert not explained(llm_attr, inp, target, "auto").graph.rows.any()

    @pytest.mark.parametrize(
        ("base", "overridden"),
        [
            (LLMAttribution, "attribute"),
            (LLMAttribution, "_forward_func"),
            (LLMGradientAttribution, "attribute"),
        ],
    )
    def test_a_wrapper_that_computes_something_else_takes_the_loop(
        self, model, tokenizer, inp, target, base, overridden
    ):
        """Not the method alone makes the rows."""

        class Doubled(base):
            pass

        def attribute(self, *args, **kwargs):
            result = base.attribute(self, *args, **kwargs)
            result.seq_attr = 2 * result.seq_attr
            return result

        def forward(self, *args, **kwargs):
            return 2 * base._forward_func(self, *args, **kwargs)

        changed = {"attribute": attribute, "_forward_func": forward}[overridden]
        setattr(Doubled, overridden, changed)
        if base is LLMAttribution:
            method = FeatureAblation(model)
        else:
            method = LayerGradientXActivation(model, model.get_input_embeddings())
        plain = explained(base(method, tokenizer), inp, target, "loop").graph.rows
        found = explained(Doubled(method, tokenizer), inp, target, "auto").graph.rows
        assert found == pytest.approx(2 * plain, abs=1e-4)

    @pytest.mark.usefixtures("registry")
    @pytest.mark.parametrize("method", [Mine, MyGradient])
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (
                lambda task, steps: [[0.0] * (task.width + 1) for _ in steps],
                r"must give rows of \d+ numbers, one per unit, but shape",
            ),
            (
                lambda task, steps: [np.zeros((1, task.width)) for _ in steps],
                r"but shape \(1, \d+\) came",
            ),
            (
                lambda task, steps: [[0.0] * task.width for _ in steps[1:]],
                r"its engine must give 6 rows, but 5 came",
            ),
            (lambda _task, _steps: [], "its engine must give 6 rows, but 0 came"),
            (
                lambda task, steps: [[0.0] * task.width for _ in [0, *steps]],
                "its engine must give 6 rows, but more came",
            ),
            (
                lambda task, steps: [[0.5] * task.width for _ in steps],
                "must attribute a unit to units before it only, but 0.5 came for unit",
            ),
            (
                lambda task, steps: [[math.nan] * task.width for _ in steps],
                "must give finite attributions, but nan came for unit 0, 'Ana'",
            ),
            (
                lambda task, steps: [[-math.inf] * task.width for _ in steps],
                "must give finite attributions, but -inf came for unit 0",
            ),
        ],
        ids=["wide", "nested", "few", "none", "more", "acausal", "nan", "infinite"],
    )
    def test_rows_that_are_none_are_refused(
        self, model, tokenizer, inp, target, method, rows, message
    ):
        """With the method, the unit and what came."""
        target = target[:6]
        register_engine(method, rows)
        llm_attr = wrapped(method, model, tokenizer)
        with pytest.raises(ValueError, match=f"^{method.__name__}: .*{message}"):
            explained(llm_attr, inp, target, "auto")

    @pytest.mark.usefixtures("registry")
    def test_rows_may_be_any_array(self, model, tokenizer, inp, target):
        """Lists, NumPy arrays of other types, tensors."""
        for make in (list, lambda row: np.float32(row), torch.tensor):
            register_engine(
                Mine,
                lambda task, steps, make=make: (
                    make(row) for row in by_captum(task, steps)
                ),
            )
            assert_equals_loop(wrapped(Mine, model, tokenizer), inp, target)

    @pytest.mark.parametrize("method", ["FeatureAblation", 3, None])
    def test_a_method_that_is_no_class_is_refused(self, registry, method):
        """With the remedy."""
        before = dict(registry)
        with pytest.raises(TypeError, match=r"method: must be the class.*came"):
            register_engine(method, by_captum)
        with pytest.raises(TypeError, match="method: must be the class"):
            register_engine(method)
        assert registry == before

    @pytest.mark.parametrize("engine", ["rows", 3, [by_captum]])
    def test_an_engine_that_cannot_be_called_is_refused(self, registry, engine):
        """Before it is needed."""
        with pytest.raises(TypeError, match="engine: must be a function of a task"):
            register_engine(Mine, engine)
        assert Mine not in registry

    def test_every_method_of_captum_s_that_takes_text_has_an_engine(self):
        """And the error lists their names, with those of engines of your own."""
        assert {method.__name__ for method in METHODS} <= set(engine_names())


def test_no_engine_warns_of_anything(model, tokenizer, inp, target):
    """Warnings of the package's own making are errors here; of libraries, seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in (FeatureAblation, LayerIntegratedGradients):
            llm_attr = wrapped(method, model, tokenizer)
            explained(llm_attr, inp, target, "fused", **METHODS[method])
