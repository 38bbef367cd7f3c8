"""What raw rows depend on, as short texts that another process can compare."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_cage._captum import base_method
from captum_cage._placement import kept_weights
from captum_cage.task import RowTask

__all__ = ["digest", "model_digest", "rows_depend_on"]

# Entries of one weight that are looked at; a smaller one is read whole.
_SAMPLE = 4096
_DEEPEST = 8  # of nested values


def rows_depend_on(task: RowTask) -> dict[str, str]:
    """What the raw rows of a task depend on, by name.

    Equal texts mean equal rows, as far as can be told without computing them: of large
    weights a sample is read, and of a function its name.

    Args:
        task (RowTask): the texts, their units, the base method and its arguments.

    Returns:
        dict[str, str]: a word or the beginning of a hash for each thing.
    """
    llm_attr, prompt = task.llm_attr, task.prompt
    model, method = llm_attr.model, llm_attr.attr_method
    return {
        "the model": type(model).__name__,
        "the served model": digest(_served(getattr(llm_attr, "provider", None))),
        "the model's config": _config_digest(model),
        "the model's weights": model_digest(model),
        "the base method": base_method(llm_attr),
        "the base method's settings": digest(
            [_settings(method, model), getattr(method, "multiplies_by_inputs", None)]
        ),
        "the attributed quantity": str(getattr(llm_attr, "attr_target", "log_prob")),
        "the prompt's ids": digest(prompt.ids),
        "the input": digest([type(prompt.inp).__name__, _settings(prompt.inp, model)]),
        "the generated ids": digest(task.generated),
        "the source units": digest(task.sources.groups),
        "the generated units": digest([task.steps.groups, task.is_source]),
        "the generated baseline": str(task.baseline),
        **{
            f"the argument {name!r}": digest(value)
            for name, value in sorted(task.kwargs.items())
        },
    }


def digest(value: Any) -> str:
    """The beginning of a hash of a value, the same in every process.

    Functions and objects count by their names, arrays by their numbers.

    Example:
        >>> digest([1, "a"]) == digest([1, "a"]), digest([1]) == digest([1.0])
        (True, False)
    """
    found = hashlib.sha256()
    _feed(found, value, 0)
    return found.hexdigest()[:16]


def model_digest(model: Any) -> str:
    """The beginning of a hash of a model's weights.

    Of each weight its name, type and shape, and 4,096 of its entries, evenly spaced:
    quick for any size, and training changes them. Where accelerate keeps weights makes
    no difference; those on disk are read once. Weights that are nowhere count by name.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = model_digest(model)
        >>> _ = nn.init.zeros_(model.weight)
        >>> model_digest(model) == before
        False
    """
    found = hashlib.sha256()
    if not isinstance(model, nn.Module):
        return digest(_settings(model, model))
    for name, weight in kept_weights(model):
        flat = weight.reshape(-1)
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if weight.device.type == "meta":
            continue
        some = flat[:: max(1, -(-len(flat) // _SAMPLE))].contiguous()
        found.update(some.view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def _served(provider: Any) -> list[str]:
    """What a provider, or one that it wraps, calls its model; not where it is."""
    found: list[str] = []
    while provider is not None and len(found) < _DEEPEST:
        named = getattr(provider, "__dict__", {}).items()
        found += [v for k, v in named if "model" in k and isinstance(v, str)]
        provider = getattr(provider, "provider", None)
        found.append("")
    return sorted(found)


def _config_digest(model: Any) -> str:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return digest(None)
    # Where it was loaded from and by which version says nothing of what it does.
    aside = {"_name_or_path", "architectures", "transformers_version"}
    aside |= {"dtype", "torch_dtype"}
    return digest({k: v for k, v in config.to_dict().items() if k not in aside})


def _settings(thing: Any, model: Any) -> dict[str, Any]:
    """Public attributes of an object that say what it does."""
    modules: dict[int, str] = {}
    if isinstance(model, nn.Module):
        modules = {id(module): name for name, module in model.named_modules()}
    settings = {}
    for name, value in getattr(thing, "__dict__", {}).items():
        if name.startswith("_"):
            continue
        if isinstance(value, nn.Module):
            settings[name] = modules.get(id(value), type(value).__name__)
        else:
            settings[name] = value
    return settings


def _feed(found: Any, value: Any, depth: int) -> None:
    """Add a value to a hash, its type first."""
    if hasattr(value, "__array_interface__"):  # NumPy's arrays, and images
        array = np.array(value)
        numeric = array.dtype.kind in "biuf"
        value = torch.from_numpy(array) if numeric else array.tolist()
    found.update(type(value).__name__.encode() + b"(")
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        found.update(flat.view(torch.uint8).numpy().tobytes())
    elif value is None or isinstance(value, str | Number):
        found.update(repr(value).encode("utf-8", "backslashreplace"))
    elif isinstance(value, bytes):
        found.update(value)
    elif depth >= _DEEPEST:
        pass
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            _feed(found, key, depth + 1)
            _feed(found, value[key], depth + 1)
    elif isinstance(value, set | frozenset):
        for one in sorted(value, key=repr):
            _feed(found, one, depth + 1)
    elif isinstance(value, Sequence):
        for one in value:
            _feed(found, one, depth + 1)
    elif isinstance(value, types.FunctionType | types.MethodType | type):
        found.update(f"{value.__module__}.{value.__qualname__}".encode())
    found.update(b")")
