"""What an engine is: raw rows of many generated units at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from captum_cage.task import RowTask

__all__ = ["Engine", "RowFunction", "Unsuitable", "never"]

Row: TypeAlias = npt.NDArray[np.float64]
RowFunction: TypeAlias = Callable[[RowTask, Sequence[int]], Iterable[Any]]
"""Gives the raw rows of some generated units, one by one."""


class Unsuitable(Exception):
    """This model or this question needs the loop; the message says why."""


def never(_: RowTask) -> str | None:
    """No reason against any task."""
    return None


@dataclass(frozen=True)
class Engine:
    """A way to compute raw rows that equals the loop.

    Attributes:
        rows: function of a task and ascending positions of generated units; gives
            their raw rows in this order, each of shape ``(N,)``, zero from the row's
            own unit on. It may raise :class:`~captum_cage.engines.engine.Unsuitable`
            before the first row.
        unsuitable: function of a task that says, without a model call, why the engine
            cannot do it, or None if it can.
        by_row (bool): whether fewer rows cost less, beyond those after the last one.
        rehearsed (bool): whether its passes are made by the ``reader`` of a task, so
            that they can be counted without being made.
    """

    rows: RowFunction
    unsuitable: Callable[[RowTask], str | None] = never
    by_row: bool = True
    rehearsed: bool = False
