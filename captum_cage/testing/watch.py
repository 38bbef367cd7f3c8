"""What must stay as it was found: models, tokenizers, Captum objects, random states."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "Snapshot",
    "changes",
    "model_snapshot",
    "object_snapshot",
    "random_snapshot",
    "seeded",
    "settings_snapshot",
    "tokenizer_snapshot",
    "watched_tokenizer",
]

# What was found, by its place in words.
Snapshot: TypeAlias = dict[str, Any]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_CAPTURING = "transformers.utils.output_capturing"
_MOST_SHOWN = 6


def model_snapshot(model: nn.Module) -> Snapshot:
    """Everything about a model that an explanation must leave as it was.

    Parameters and buffers with their values, gradients, ``requires_grad``, the mode,
    the hooks, the class and the replaced methods of each module, the config and the
    attention implementation.

    Args:
        model (nn.Module): the model; it is not changed.

    Example:
        >>> from captum_cage.testing import tiny_causal_lm
        >>> model = tiny_causal_lm()
        >>> before = model_snapshot(model)
        >>> _ = model.model.layers[0].train()
        >>> changes(before, model_snapshot(model))[0]
        'mode of model.layers.0 was evaluation and is training'
    """
    found: Snapshot = {}
    for name, module in model.named_modules():
        place = name or "the model"
        found[f"class of {place}"] = type(module).__qualname__
        found[f"mode of {place}"] = "training" if module.training else "evaluation"
        for kind in _HOOKS:
            hooks = [
                hook
                for hook in (vars(module).get(kind) or {}).values()
                # Those by which transformers collects attention weights stay.
                if not getattr(hook, "__module__", "").startswith(_CAPTURING)
            ]
            found[f"{kind.strip('_').replace('_', ' ')} of {place}"] = len(hooks)
        for key, value in vars(module).items():
            if not key.startswith("_") and not callable(value):
                found[f"{key} of {place}"] = _copied(value)
        replaced = [key for key, value in vars(module).items() if callable(value)]
        found[f"methods replaced in {place}"] = sorted(replaced)
    for name, parameter in model.named_parameters():
        found[f"object of parameter {name}"] = id(parameter)
        found[f"value of parameter {name}"] = parameter.detach().clone()
        found[f"requires_grad of parameter {name}"] = parameter.requires_grad
        hooks = [getattr(parameter, kind, None) for kind in _PARAMETER_HOOKS]
        found[f"hooks of parameter {name}"] = sum(len(kind or {}) for kind in hooks)
        gradient = parameter.grad
        found[f"gradient of parameter {name}"] = (
            None if gradient is None else gradient.detach().clone()
        )
    for name, buffer in model.named_buffers():
        found[f"value of buffer {name}"] = buffer.detach().clone()
    for name in ("config", "generation_config"):
        config = getattr(model, name, None)
        if config is not None:
            found |= {f"{name}.{k}": v for k, v in config.to_dict().items()}
    config = getattr(model, "config", None)
    found["attention implementation"] = getattr(config, "_attn_implementation", None)
    return found


def tokenizer_snapshot(tokenizer: Any) -> Snapshot:
    """Everything about a tokenizer that an explanation must leave as it was.

    Args:
        tokenizer: of transformers.

    Example:
        >>> from captum_cage.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> before = tokenizer_snapshot(tokenizer)
        >>> tokenizer.padding_side = "left"
        >>> changes(before, tokenizer_snapshot(tokenizer))
        ["padding_side of the tokenizer was 'right' and is 'left'"]
    """
    names = (
        "padding_side",
        "truncation_side",
        "chat_template",
        "model_max_length",
        "special_tokens_map",
    )
    found = {f"{n} of the tokenizer": getattr(tokenizer, n, None) for n in names}
    found["length of the tokenizer"] = len(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        inside = json.loads(backend.to_str())
        # Each call of the tokenizer sets them anew.
        for name in ("truncation", "padding"):
            inside.pop(name, None)
        found["inside of the tokenizer"] = json.dumps(inside)
    return found


def object_snapshot(name: str, value: Any) -> Snapshot:
    """The attributes of an object: which there are, and what they hold.

    Lists, sets, mappings, numbers, texts and tensors are compared by value, all else by
    identity.

    Args:
        name (str): how the object is called in words.
        value: the object.
    """
    return {f"{k} of {name}": _copied(v) for k, v in vars(value).items()}


def random_snapshot() -> Snapshot:
    """The random states of Torch, NumPy and Python."""
    return {
        "Torch's random state": torch.get_rng_state(),
        "NumPy's random state": repr(np.random.get_state()),  # noqa: NPY002
        "Python's random state": random.getstate(),
    }


def settings_snapshot() -> Snapshot:
    """What holds for all of Torch and NumPy, and an explanation must leave so."""
    return {
        "Torch's gradient mode": torch.is_grad_enabled(),
        "Torch's default number type": torch.get_default_dtype(),
        "Torch's default device": str(torch.get_default_device()),
        "Torch's determinism": torch.are_deterministic_algorithms_enabled(),
        "NumPy's error handling": np.geterr(),
    }


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """What differs between two snapshots, in words; empty if nothing does.

    Args:
        before (Snapshot): the first.
        after (Snapshot): the second, of the same thing.
    """
    found = []
    for place in [*before, *(new for new in after if new not in before)]:
        if place not in after:
            found.append(f"{place} is gone")
        elif place not in before:
            found.append(f"{place} is new: {_shown(after[place])}")
        elif not _same(before[place], after[place]):
            one, other = _shown(before[place]), _shown(after[place])
            # A tensor or an object of which no more is to be said.
            found.append(
                f"{place} is another"
                if one == other
                else f"{place} was {one} and is {other}"
            )
    if len(found) > _MOST_SHOWN:
        found[_MOST_SHOWN:] = [f"and {len(found) - _MOST_SHOWN} more"]
    return found


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch, NumPy and Python seeded; as they were, afterwards.

    Args:
        seed (int): for all three.
    """
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    kind = torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        torch.set_grad_enabled(torch.is_grad_enabled()),
        np.errstate(),
    ):
        try:
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            random.seed(seed)
            yield
        finally:
            np.random.set_state(states[0])  # noqa: NPY002
            random.setstate(states[1])
            torch.set_default_dtype(kind)


def watched_tokenizer(tokenizer: Any) -> tuple[Any, list[str]]:
    """The same tokenizer, which notes every text that it is asked to tokenise.

    What is asked of its backend directly is not seen.

    Args:
        tokenizer: of transformers; it is changed and given back.

    Returns:
        tuple: the tokenizer, and the list that the texts are added to.
    """
    texts: list[str] = []
    kind = type(tokenizer)

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            _note(texts, text)
            return super().__call__(text, *args, **kwargs)

        def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            _note(texts, text)
            return super().encode(text, *args, **kwargs)

        def tokenize(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            _note(texts, text)
            return super().tokenize(text, *args, **kwargs)

        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            _note(texts, text)
            return super()._encode_plus(text, *args, **kwargs)

    Watched.__name__, Watched.__qualname__ = kind.__name__, kind.__qualname__
    tokenizer.__class__ = Watched
    return tokenizer, texts


def _note(texts: list[str], text: Any) -> None:
    if isinstance(text, str):
        if text not in texts:
            texts.append(text)
    elif isinstance(text, list | tuple):
        for part in text:
            _note(texts, part)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return (
            type(value)(map(_copied, value)) if type(value) in (list, tuple) else value
        )
    if isinstance(value, set):
        return set(value)
    return value


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(
        one, str | int | float | complex | bytes | set | frozenset | type(None)
    ):
        return bool(one == other)
    # Captum's objects bind a method of theirs anew; configs hold types of numbers.
    return callable(one) and bool(one == other)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if value in ("training", "evaluation"):
        return str(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
