"""Where a model computes, and its weights while they are kept elsewhere.

accelerate spreads a model over devices, the main memory and a disk by a hook at each
module that holds weights. What is kept elsewhere is on the device ``meta``, without
numbers, until the module's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["entry_device", "is_dispatched", "kept_weights", "own_weights"]

_HOOK = "_hf_hook"


def entry_device(model: Any) -> torch.device:
    """Where a model takes its ids.

    As accelerate's hooks say, if the model has any; else where it says that it is.

    Args:
        model: any model.
    """
    modules = [model, *model.modules()] if isinstance(model, nn.Module) else []
    for hook in chain.from_iterable(_hooks(module) for module in modules):
        device = getattr(hook, "execution_device", None)
        if device is not None and torch.device(device).type != "meta":
            return torch.device(device)
    return torch.device(getattr(model, "device", None) or "cpu")


def is_dispatched(model: Any) -> bool:
    """Whether accelerate moves what a model is given, and what it gives.

    Args:
        model: any model.
    """
    return getattr(model, _HOOK, None) is not None


@contextmanager
def own_weights(module: nn.Module) -> Iterator[None]:
    """A module's own weights are there, to be read; as before, afterwards.

    Tensors that are taken inside stay whole.

    Args:
        module (nn.Module): one layer of the model.
    """
    if not any(one.is_meta for one in module.parameters(recurse=False)):
        yield
        return
    hook: Any = getattr(module, _HOOK, None)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def kept_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All weights by name, each from where it is kept; one that is nowhere is ``meta``.

    Names and numbers are those of the model in one place: tied weights come once for
    each name.

    Args:
        model (nn.Module): any model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, weight in model.named_parameters(remove_duplicate=False):
        found = weight.detach()
        path = name.split(".")
        # A hook may hold the weights of all modules inside of its own.
        for depth in range(len(path) - 1, -1, -1):
            if not found.is_meta:
                break
            for hook in _hooks(modules[".".join(path[:depth])]):
                kept = getattr(hook, "weights_map", None)
                with suppress(KeyError):
                    if kept is not None:
                        found = kept[".".join(path[depth:])].detach().to(weight.dtype)
        yield name, found


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate at a module, also those that are chained."""
    hook = getattr(module, _HOOK, None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]
