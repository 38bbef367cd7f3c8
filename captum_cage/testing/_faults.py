"""Faults at a chosen place: memory that runs out, an interrupt, as the n-th event."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import captum
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Events", "events_of_memory", "events_of_operations", "events_of_signals"]

# Code in which hooks and modes are set, ours and others'.
_WHERE = (
    str(Path(__file__).parents[1]),
    str(Path(captum.__file__).parent),
    contextlib.__file__,
    nn.modules.module.__file__,
    torch.autograd.grad_mode.__file__,
    torch.utils.hooks.__file__,
)
_TESTING = str(Path(__file__).parent)
# Run also by the collector of garbage, where an error is only printed.
_NEVER = ("<genexpr>", "__del__", "named_modules", "named_parameters", "_named_members")
_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@dataclass
class Events:
    """Events that were seen, and at which of them a fault comes.

    Attributes:
        fails_at (int or None): number of the event, from 0; None for never.
        error (type): what is raised there, once.
        seen (int): number of events so far.
        where (str): the event at which it was raised; empty if it was not.
    """

    fails_at: int | None = None
    error: type[BaseException] = KeyboardInterrupt
    seen: int = 0
    where: str = ""

    def happen(self, what: str) -> None:
        """Count an event, and fail if it is the one."""
        number = self.seen
        self.seen += 1
        if number == self.fails_at:
            self.where = what
            if self.error is torch.OutOfMemoryError:
                raise torch.OutOfMemoryError("CUDA out of memory: put in by a test.")
            raise self.error


class _Operations(TorchDispatchMode):
    """Every operation of Torch is an event, or those that need new memory."""

    def __init__(self, events: Events, only_new: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._events = events
        self._only_new = only_new

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        results = function._schema.returns
        if not self._only_new or any(one.alias_info is None for one in results):
            self._events.happen(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def events_of_operations(events: Events) -> Iterator[None]:
    """Every operation of Torch inside the block is an event."""
    with _Operations(events, only_new=False):
        yield


@contextmanager
def events_of_memory(events: Events) -> Iterator[None]:
    """Every operation of Torch inside the block that makes a tensor is an event."""
    with _Operations(events, only_new=True):
        yield


@contextmanager
def events_of_signals(events: Events) -> Iterator[None]:
    """Every place inside the block where Python may see Ctrl-C is an event.

    Python looks for signals where a function begins and after a call, in this package,
    and in code of Captum, ``contextlib`` and Torch that sets hooks and modes for it.
    """

    def happened(frame: FrameType, event: str, what: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(_WHERE):
            return
        if code.co_filename.startswith(_TESTING) or code.co_name in _NEVER:
            return
        if event == "return" and (
            code.co_flags & _SUSPENDED or code.co_name == "__enter__"
        ):
            return  # what is called by the interpreter itself ends unseen
        if event in ("call", "return", "c_return"):
            name = getattr(what, "__name__", "") if event == "c_return" else ""
            place = f"{Path(code.co_filename).name}:{frame.f_lineno}"
            events.happen(f"{place} {event} {code.co_name} {name}".rstrip())

    before = sys.getprofile()
    sys.setprofile(happened)
    try:
        yield
    finally:
        sys.setprofile(before)
