"""Models, base methods and inputs that options of the command line name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers

from captum_cage._captum import DEFAULT_GEN_ARGS
from captum_cage.cli_options import Device, Dtype
from captum_cage.demo import load_demo
from captum_cage.inputs import ChatTokenInput, TokenIdsInput
from captum_cage.methods.capability import Capability
from captum_cage.methods.catalogue import (
    capabilities,
    method_named,
    missing_extra,
    needs_argument,
)
from captum_cage.text import special_ids
from captum_cage.traces import ChatTraceInput

__all__ = [
    "DEMO",
    "chosen_method",
    "conversation_input",
    "counting_arguments",
    "counting_option",
    "device_name",
    "generation_arguments",
    "load_masked_lm",
    "load_model",
    "token_input",
]

DEMO = "demo"  # the name of the model in the package


def generation_arguments(max_new_tokens: int | None) -> dict[str, Any]:
    """Greedy generation; as long as the model's own settings say, for None."""
    arguments = dict(DEFAULT_GEN_ARGS)
    del arguments["max_new_tokens"]
    if max_new_tokens is not None:
        arguments["max_new_tokens"] = max_new_tokens
    return arguments


def conversation_input(
    messages: list[Any], baseline: str | None, tokenizer: Any
) -> TokenIdsInput:
    """A trace if the model has written in it, else a chat."""
    token: int | str = _absent(tokenizer) if baseline is None else baseline
    wrote = [
        isinstance(message, dict) and message.get("role") == "assistant"
        for message in messages
    ]
    if any(wrote):
        return ChatTraceInput(messages, tokenizer, baselines=token)
    return ChatTokenInput(messages, tokenizer, features="all", baselines=token)


def chosen_method(
    name: str, masked_lm: str | None, refills: bool
) -> tuple[type[Any], Capability]:
    """The class of a base method, and what it declares; it has what it needs."""
    try:
        method, declared = method_named(name)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    extra = missing_extra(declared)
    if extra is not None:
        raise ValueError(
            f"--method: {declared.name} needs {', '.join(declared.needs)}, which is "
            f"not installed. Run: pip install captum-cage[{extra}]"
        )
    needed = needs_argument(method, "masked_lm")
    if needed and masked_lm is None:
        raise ValueError(
            f"--masked-lm: {method.__name__} replaces words by those of a masked "
            "language model and needs one. Pass its name, for example "
            "--masked-lm FacebookAI/roberta-base."
        )
    if refills and masked_lm is None:
        raise ValueError(
            "--removal: masked_lm writes other words by a masked language model. Pass "
            "--masked-lm, for example --masked-lm FacebookAI/roberta-base."
        )
    if needed is None and masked_lm is not None and not refills:
        takers = _names(lambda other, _: needs_argument(other, "masked_lm") is not None)
        raise ValueError(
            f"--masked-lm: {method.__name__} does not take it. It is for {takers}. "
            "Leave it out, or choose another --method."
        )
    return method, declared


def _names(fits: Callable[[type[Any], Capability], bool]) -> str:
    """Names of the methods that fit, or that there is none."""
    found = [known[1].name for known in capabilities() if fits(*known)]
    return ", ".join(found) or "none of the methods"


def _counts_by(option: str, _: type[Any], declared: Capability) -> bool:
    """Whether an option says how many evaluations a method takes."""
    return counting_option(declared.counted) == option


def counting_option(argument: str | None) -> str | None:
    """The option that says how many evaluations a method takes."""
    if argument is None:
        return None
    return "--steps" if argument == "n_steps" else "--samples"


def counting_arguments(
    method: type[Any], declared: Capability, samples: int | None, steps: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a method's constructor, and of its ``attribute``."""
    options: dict[str, Any] = {}
    taken = signature(method.attribute).parameters
    # All steps at once would be steps x tokens x vocabulary numbers.
    kwargs = {"internal_batch_size": 8} if "internal_batch_size" in taken else {}
    for option, count in (("--samples", samples), ("--steps", steps)):
        if count is None:
            continue
        if declared.counted is None or not _counts_by(option, method, declared):
            takers = _names(partial(_counts_by, option))
            raise ValueError(
                f"{option}: {method.__name__} does not take it. It is for {takers}. "
                "Leave it out, or choose another --method."
            )
        (kwargs if declared.counted in taken else options)[declared.counted] = count
    return options, kwargs


def device_name(device: Device) -> str:
    """Where a model goes, as torch says it.

    Raises:
        ValueError: if there is none.
    """
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError(
            "--device: must be there, but torch finds no CUDA device. Use --device cpu."
        )
    if device is Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(device.value)


def load_model(
    name: str, place: str, dtype: Dtype, trust_remote_code: bool
) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer."""
    number_type = _number_type(dtype, place)
    model: Any
    if name == DEMO:
        model, tokenizer = load_demo()
    else:
        # By attribute: transformers imports it, and much more, at its first use.
        kind = transformers.AutoModelForCausalLM
        model, tokenizer = _load_pretrained(
            name, number_type, trust_remote_code, "--model", kind
        )
    return model.to(device=place, dtype=number_type).eval(), tokenizer


def _number_type(dtype: Dtype, place: str) -> Any:
    """The type of a model's parameters; None for its own."""
    if dtype is Dtype.auto:
        return torch.float32 if place == "cpu" else None
    return getattr(torch, dtype.value)


def load_masked_lm(
    name: str, place: str, dtype: Dtype, trust_remote_code: bool
) -> dict[str, Any]:
    """A masked language model and its tokenizer, as options of a base method."""
    number_type = _number_type(dtype, place)
    kind = transformers.AutoModelForMaskedLM
    model, tokenizer = _load_pretrained(
        name, number_type, trust_remote_code, "--masked-lm", kind
    )
    model = model.to(device=place, dtype=number_type).eval()
    return {"masked_lm": model, "masked_tokenizer": tokenizer}


def _load_pretrained(
    name: str,
    number_type: torch.dtype | None,
    trust_remote_code: bool,
    option: str,
    kind: Any,
) -> tuple[Any, Any]:
    if name.startswith((".", "/", "~")):
        name = str(Path(name).expanduser())
        if not Path(name).is_dir():
            raise ValueError(f"{option}: there is no folder {name!r}. Check the path.")
    # Its name until transformers 4.55.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    argument = "dtype" if version >= (4, 56) else "torch_dtype"
    loading: dict[str, Any] = {argument: number_type or "auto"}
    loading["trust_remote_code"] = trust_remote_code
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
        model = kind.from_pretrained(name, **loading)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        # The first sentences say what is wrong; pages of advice may follow.
        reason = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        remedy = "Check the name, the path and the network."
        if "trust_remote_code" in str(error):
            remedy = "If you trust it, pass --trust-remote-code."
        raise ValueError(
            f"{option}: {name!r} could not be loaded. {remedy} "
            f"transformers says: {reason}"
        ) from error
    return model, tokenizer


def token_input(
    prompt: str, system: str | None, chat: bool, baseline: str | None, tokenizer: Any
) -> TokenIdsInput:
    """A prompt, or a chat of one message, whose tokens are its features."""
    token: int | str = _absent(tokenizer) if baseline is None else baseline
    if chat:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return ChatTokenInput(messages, tokenizer, baselines=token)
    ids = tokenizer(prompt).input_ids
    special = special_ids(tokenizer)
    attributed = [i not in special for i in ids]
    return TokenIdsInput(ids, tokenizer, feature_mask=attributed, baselines=token)


def _absent(tokenizer: Any) -> int:
    """Id of the token that stands for an absent one."""
    for name in ("unk", "eos", "pad"):
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            return int(found)
    return 0
