"""Small causal language models of every family, made on the spot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from captum_cage._checks import complaint, whole_number
from captum_cage.testing.tokenizers import VOCABULARY

__all__ = ["FAMILIES", "tiny_causal_lm"]

# What each family needs besides the sizes that all have.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {},
    "mixtral": {
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "phi": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "olmo2": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2},
    "cohere": {"num_key_value_heads": 2},
    "falcon": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "mamba": {"state_size": 4},
}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Sizes that many other families have, and the rest does not look at.
_USUAL = {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
# More than this is not tiny: a size went by another name than the usual one.
_MOST_PARAMETERS = 4_000_000


def tiny_causal_lm(
    arch: str = "llama",
    *,
    seed: int = 0,
    vocab_size: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """A causal language model of two layers with random weights; no download.

    It has a hidden size of 32, reads 256 tokens and has no end token, so that it
    generates as many tokens as it is asked for. It is in evaluation mode, on the CPU.
    Its weights are four times as large as transformers makes them, so that its
    predictions differ from one another. Torch's random state is left as it was.

    Args:
        arch (str, optional): a family that the package is tested with: those of
            ``captum_cage.testing.models.FAMILIES``, such as ``"llama"``,
            ``"qwen3"``, ``"gemma3"`` or ``"gpt2"``. Any other ``model_type`` of
            transformers is tried with the same sizes. Default: ``"llama"``
        seed (int, optional): of the weights. Default: ``0``
        vocab_size (int, optional): number of tokens. Default: ``640``, as for
            :func:`tiny_tokenizer`
        dtype (torch.dtype, optional): of the weights. Default: ``torch.float32``
        **changes: for the model's config, such as ``num_hidden_layers=1``.

    Returns:
        PreTrainedModel: a new model in each call; equal arguments give equal weights.

    Raises:
        TypeError: if ``seed`` or ``vocab_size`` is no whole number.
        ValueError: if transformers has no such family, or it cannot be made tiny by
            these sizes.

    Example:
        >>> from captum_cage.testing import tiny_tokenizer
        >>> model = tiny_causal_lm("qwen3", seed=1)
        >>> model.config.model_type, model.config.vocab_size
        ('qwen3', 640)
        >>> inputs = tiny_tokenizer("char")("Ana has", return_tensors="pt")
        >>> model.generate(**inputs, max_new_tokens=3).shape
        torch.Size([1, 10])
    """
    seed = whole_number("seed", seed, remedy="Pass a number of 0 or more.")
    remedy = "Pass the number of tokens, for example len(tokenizer)."
    size = whole_number("vocab_size", vocab_size, minimum=1, remedy=remedy)
    kind, settings = _settings(arch)
    settings = {**_SIZES, **settings, "vocab_size": size, **changes}
    kind = settings.pop("model_type", kind)
    try:
        config = AutoConfig.for_model(kind, **settings)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, changes.get(name))
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.device("cpu"),
            _number_type(torch.float32),
        ):
            torch.manual_seed(seed)
            if arch not in FAMILIES:
                _check_tiny(config, size)
                torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config)
    # Whatever a config of transformers says to sizes that it does not expect.
    except Exception as error:
        raise ValueError(
            complaint(
                "arch",
                f"{arch!r} must be a model that the usual sizes make tiny",
                f"{type(error).__name__} came: {error}",
                "Pass the sizes by the names of its config, for example n_layer=2, or "
                f"use one of {_names()}.",
            )
        ) from error
    for parameter in model.parameters():
        # Random weights of the usual size give nearly uniform predictions.
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    found: PreTrainedModel = model.to(dtype).eval()
    return found


@contextmanager
def _number_type(dtype: torch.dtype) -> Iterator[None]:
    """Weights are drawn in this type, whatever the default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _settings(arch: str) -> tuple[str, dict[str, Any]]:
    """Name in transformers of a family, and what it needs besides the sizes.

    Raises:
        ValueError: if there is no such family.
    """
    if arch in FAMILIES:
        return arch, FAMILIES[arch]
    if arch in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return arch, _USUAL
    raise ValueError(
        complaint(
            "arch",
            f"must be one of {_names()}, or a model_type of transformers that is a "
            "causal language model",
            f"{arch!r} came",
            "Pass one of these, for example arch='llama'.",
        )
    )


def _names() -> str:
    return ", ".join(repr(name) for name in FAMILIES)


def _check_tiny(config: Any, vocab_size: int) -> None:
    """Refuse what is large, or gives no logits from ids alone, before it is made.

    Raises:
        ValueError: if it is.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"it would have {count} parameters")
    with torch.no_grad():
        small = AutoModelForCausalLM.from_config(config).eval()
        ids = torch.zeros((2, 8), dtype=torch.long)
        ids[1, -1] = vocab_size - 1
        logits = small(input_ids=ids).logits
    if tuple(logits.shape) != (2, 8, vocab_size):
        raise ValueError(f"it gives logits of shape {tuple(logits.shape)}")
    if not torch.allclose(logits[0, :-1], logits[1, :-1], atol=1e-5):
        raise ValueError("its logits depend on later tokens")
