"""Rows of attention suppression: one pass per unit serves all rows.

Hiding a unit changes nothing up to its end, so a pass starts there, from the keys and
values that the plain text left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_cage.engines.columns import Columns, unsupported
from captum_cage.engines.engine import Engine
from captum_cage.engines.memory import OutOfMemory, first_pass, half, memory_errors
from captum_cage.engines.sequences import SequenceScorer
from captum_cage.methods.attention import attention_layers
from captum_cage.task import RowTask

__all__ = ["SUPPRESSION"]

# Tokens in one pass from which a larger batch is no faster.
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 65536}
# Most bytes of the masks of one batch.
_MOST_MASK_BYTES = 2**27


def _rows(task: RowTask, steps: Sequence[int]) -> Iterator[npt.NDArray[np.float64]]:
    last = max(steps)
    units = len(task.sources) + last
    columns = Columns.of(task, "suppression", units, last + 1)
    passes = _Passes(task, task.range_of(last)[1])
    for unit, effects in columns.progress(passes.effects(columns.missing())):
        effect = task.unit_sums(effects)
        effect[: max(0, unit - len(task.sources) + 1)] = 0.0
        columns.fill(unit, effect)
    yield from columns.rows(task, steps)


class _Passes:
    """Passes with units hidden, in batches."""

    def __init__(self, task: RowTask, stop: int) -> None:
        self._task = task
        self._method: Any = task.llm_attr.attr_method
        self._stop = stop
        self._scorer = SequenceScorer(task, stop)
        self._model = self._scorer.model
        self._ids = self._scorer.ids
        self._targets = torch.tensor(task.generated[:stop])
        self._groups = torch.from_numpy(task.unit_of_token()[: len(self._ids)])
        self._most = task.batch_size
        attention_layers(self._model.model, self._ids, type(self._method).__name__)
        with first_pass(), torch.no_grad():
            keep = torch.arange(len(self._ids) - stop, len(self._ids))
            self._plain = self._model.states(self._read(0, 1), keep, direct=True)[0]

    def _read(self, start: int, count: int) -> dict[str, Tensor]:
        ids = self._ids[start:].to(self._model.device)
        return {"input_ids": ids.expand(count, -1)}

    def _first_changed(self, unit: int) -> int:
        """The first position that does not see what it saw before."""
        outside = self._groups != unit
        outside[: int((~outside).nonzero()[0])] = False
        after = outside.nonzero()
        return int(after[0]) if len(after) else len(self._ids)

    def effects(
        self, units: Sequence[int]
    ) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        """Effect of each unit on each generated token, shape ``(stop,)``."""
        changed = {unit: self._first_changed(unit) for unit in units}
        left = sorted(units, key=changed.__getitem__)
        while left:
            start = changed[left[0]]
            if start == len(self._ids):
                yield left.pop(0), np.zeros(self._stop)
                continue
            if not self._scorer.reuses_prefix:
                start = 0
            batch = left[: self._batch_size(start)]
            batch = [unit for unit in batch if changed[unit] < len(self._ids)]
            try:
                with memory_errors(), torch.no_grad():
                    found = self._pass(batch, start)
            except OutOfMemory as error:
                self._most = half(len(batch), error, self._model.device)
                continue
            except Exception:
                if not self._scorer.reuses_prefix:
                    raise
                self._scorer.give_up_prefix()
                continue
            left = left[len(batch) :]
            yield from zip(batch, found, strict=True)

    def _batch_size(self, start: int) -> int:
        if self._task.batch_size is not None and self._most is not None:
            return self._most
        kind = self._model.device.type
        pushed = len(self._ids) - start
        enough = _ENOUGH_TOKENS.get(kind, _ENOUGH_TOKENS["cuda"]) // pushed
        fitting = _MOST_MASK_BYTES // (pushed * len(self._ids))
        sizes = [enough, fitting] + ([] if self._most is None else [self._most])
        return max(1, min(sizes))

    def _pass(self, units: Sequence[int], start: int) -> list[npt.NDArray[np.float64]]:
        """Effects of a few units, by one pass from where the first one changes."""
        first = max(0, start - (len(self._ids) - self._stop))
        keep = torch.arange(len(self._ids) - self._stop + first, len(self._ids))
        inside = torch.stack([self._groups == unit for unit in units])
        with self._method.suppressed(inside):
            states = self._model.states(
                self._read(start, len(units)),
                keep - start,
                cache=self._scorer.prefix(start),
                direct=True,
            )
        found = []
        for one in states:
            effect = np.zeros(self._stop)
            effect[first:] = self._method.change(
                self._model, self._plain[first:], one, self._targets[first:]
            ).numpy()
            found.append(effect)
        return found


def _unsuitable(task: RowTask) -> str | None:
    return unsupported()(task)


SUPPRESSION = Engine(_rows, unsuitable=_unsuitable, by_row=False, rehearsed=True)
