"""A model as it was found, whatever comes in between."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["AsFound", "evaluated"]

# Where a module keeps its hooks, and what it knows of them, by the hooks' numbers.
_HOOKS = {
    "_forward_hooks": (
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
    ),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_backward_hooks": (),
    "_backward_pre_hooks": (),
}
_IMPLEMENTATION = "_attn_implementation"


class AsFound:
    """A context manager that leaves a model as it was when this was made.

    Modes, ``requires_grad``, hooks of this package and of Captum, the attention
    implementation, and Torch's gradient mode. What is set inside is undone inside, too;
    this is for an interrupt that comes between the setting and the undoing. One that
    comes into the way of this needs a second: ``with found, found:``.

    Args:
        model (nn.Module): the model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modes = [(module, module.training) for module in modules]
        self._hooks = [
            (module, kind, set(hooks))
            for module in modules
            for kind in _HOOKS
            if (hooks := getattr(module, kind, None)) is not None
        ]
        # By name: what is kept elsewhere is another object after each pass.
        self._flags = [
            (module, name, parameter.requires_grad)
            for module in modules
            for name, parameter in module.named_parameters(recurse=False)
        ]
        configs = {
            id(config): config
            for module in modules
            if hasattr(config := getattr(module, "config", None), _IMPLEMENTATION)
        }
        self._attentions = [
            (config, getattr(config, _IMPLEMENTATION)) for config in configs.values()
        ]
        self._has_gradients = torch.is_grad_enabled()

    def __enter__(self) -> None:
        """Nothing is changed."""

    def __exit__(self, *_: object) -> None:
        """Undo what is not undone; where all is, this only looks."""
        for module, mode in self._modes:
            if module.training != mode:
                module.training = mode
        for module, kind, before in self._hooks:
            hooks = getattr(module, kind)
            if len(hooks) != len(before):
                _remove(module, kind, [n for n in hooks if n not in before])
        for module, name, flag in self._flags:
            parameter = getattr(module, name, None)
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for config, implementation in self._attentions:
            if getattr(config, _IMPLEMENTATION) != implementation:
                setattr(config, _IMPLEMENTATION, implementation)
        if torch.is_grad_enabled() != self._has_gradients:
            torch.set_grad_enabled(self._has_gradients)


def _remove(module: nn.Module, kind: str, numbers: list[int]) -> None:
    """Take away hooks that are this package's or Captum's."""
    hooks = getattr(module, kind)
    for number in numbers:
        hook: Any = hooks[number]
        while isinstance(hook, functools.partial):
            hook = hook.func
        # Others set some that are to stay, as transformers does for attention weights.
        if (getattr(hook, "__module__", None) or "").startswith("captum"):
            for name in _HOOKS[kind]:
                getattr(module, name, {}).pop(number, None)
            del hooks[number]


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """The model in evaluation mode; as it was found, afterwards."""
    if not isinstance(model, nn.Module):  # what stands for a remote model
        yield
        return
    found = AsFound(model)
    with found, found:
        model.eval()
        yield
