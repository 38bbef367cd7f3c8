"""How many sequences fit: memory that is free, and halving when it was not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from captum_cage._checks import complaint
from captum_cage._model import text_config

__all__ = [
    "OutOfMemory",
    "bytes_per_token",
    "first_pass",
    "free_bytes",
    "half",
    "memory_errors",
]

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_UNKNOWN = 2**31  # where the system does not tell
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemory(Exception):
    """A pass through the model needed more memory than there is."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn every device's out-of-memory error into :class:`OutOfMemory`."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory from error
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if any(message in str(error).lower() for message in _MESSAGES):
            raise OutOfMemory from error
        raise


@contextmanager
def first_pass() -> Iterator[None]:
    """For a pass that cannot be made smaller: say so when it does not fit."""
    try:
        with memory_errors():
            yield
    except OutOfMemory as error:
        raise _too_large(error) from error


def half(size: int, error: OutOfMemory, device: torch.device) -> int:
    """Half of a batch that did not fit.

    Raises:
        RuntimeError: if it was a single sequence.
    """
    if size == 1:
        raise _too_large(error) from error
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return size // 2


def _too_large(error: OutOfMemory) -> RuntimeError:
    """The error of a single sequence that does not fit."""
    return RuntimeError(
        complaint(
            "strategy",
            "one sequence must fit into memory",
            f"it did not: {error.__cause__}",
            "Shorten the text, use a smaller number type, or free memory.",
        )
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        return int(free + reserved - torch.cuda.memory_allocated(device))
    return _free_host_bytes()


def _free_host_bytes() -> int:
    free: list[int] = []
    with suppress(OSError):
        lines = _MEMINFO.read_text().splitlines()
        available = [line for line in lines if line.startswith("MemAvailable:")]
        free.extend(int(line.split()[1]) * 1024 for line in available)
    with suppress(OSError, ValueError):  # ValueError: there is no limit
        limit = int((_CGROUP / "memory.max").read_text())
        free.append(limit - int((_CGROUP / "memory.current").read_text()))
    if not free and hasattr(os, "sysconf"):
        with suppress(OSError, ValueError):
            free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(min(free, default=_UNKNOWN), 0)


def bytes_per_token(model: Any, *, kept: bool = False) -> int:
    """Bytes that one token takes in a pass through the model, roughly.

    Args:
        model: the model.
        kept (bool, optional): whether all layers' activations stay, as a backward
            pass needs them. Default: ``False``
    """
    config = text_config(model)
    hidden = getattr(config, "hidden_size", 1024)
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * hidden
    layers = getattr(config, "num_hidden_layers", 24) if kept else 1
    weights = model.parameters() if isinstance(model, torch.nn.Module) else ()
    size = next((p.element_size() for p in weights), 4)
    return int(layers * (16 * hidden + 6 * inner) * size)
