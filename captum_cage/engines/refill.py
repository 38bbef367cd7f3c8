"""Rows of one-shot ReAGent: one text per refilled unit serves all rows after it.

What a unit is refilled with does not depend on the row, so one pass over a text with
one unit refilled scores all that was generated after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_cage.engines.columns import Columns, unit_values, unsupported
from captum_cage.engines.engine import Engine
from captum_cage.engines.memory import (
    OutOfMemory,
    bytes_per_token,
    free_bytes,
    half,
    memory_errors,
)
from captum_cage.engines.sequences import SequenceScorer
from captum_cage.methods.reagent import RefillMethod, Stretch, refilled
from captum_cage.task import RowTask

__all__ = ["REFILL"]

Array: TypeAlias = npt.NDArray[np.float64]

# Texts that are refilled before they are scored, and tokens in one pass from which more
# texts are no faster.
_LAID_OUT = 64
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 65536}
_MEMORY_SHARE = 0.5
_MOST_HOST_BYTES = 2**29


@dataclass(frozen=True)
class _Text:
    """A text with one unit refilled, from the first changed token on."""

    unit: int
    ids: Tensor
    same: int

    @property
    def length(self) -> int:
        return self.same + len(self.ids)


def _rows(task: RowTask, steps: Sequence[int]) -> Iterator[Array]:
    last = max(steps)
    P = len(task.sources)
    columns = Columns.of(task, "refill", P + last, last + 1)
    passes = _Passes(task, task.range_of(last)[1])
    plain = unit_values(task, passes.plain)
    for unit, scores in columns.progress(passes.scores(columns.missing())):
        effect = plain - unit_values(task, scores)
        effect[: max(0, unit - P + 1)] = 0.0
        columns.fill(unit, effect)
    yield from columns.rows(task, steps)


class _Passes:
    """Passes over texts with a unit refilled, in batches.

    Args:
        task (RowTask): what to explain.
        stop (int): number of generated tokens to score.
    """

    def __init__(self, task: RowTask, stop: int) -> None:
        self._task = task
        self._method: RefillMethod = task.llm_attr.attr_method
        self._stop = stop
        self._scorer = SequenceScorer(task, stop)
        self._model = self._scorer.model
        self._ids = self._scorer.ids
        self._targets = torch.tensor(task.generated[:stop])
        self._units = task.unit_of_token()
        self._most = task.batch_size
        self._free = free_bytes(self._model.device)
        self.plain = self._scorer.plain

    def scores(self, units: Sequence[int]) -> Iterator[tuple[int, Array]]:
        """Log-probability of each generated token when one unit is refilled.

        Yields:
            tuple[int, numpy.ndarray]: the unit and the scores, shape ``(stop,)``, plain
            ones up to its end. In any order.
        """
        for start in range(0, len(units), _LAID_OUT):
            texts = []
            for unit in units[start : start + _LAID_OUT]:
                text = self._refilled(unit)
                if text is None:
                    yield unit, self.plain.copy()
                else:
                    texts.append(text)
            texts.sort(key=lambda text: (text.same, text.length))
            while texts:
                batch = texts[: self._batch_size(texts)]
                try:
                    with memory_errors(), torch.no_grad():
                        found = self._pass(batch)
                except OutOfMemory as error:
                    self._most = half(len(batch), error, self._model.device)
                    continue
                except Exception:
                    if not self._scorer.reuses_prefix:
                        raise
                    self._scorer.give_up_prefix()
                    continue
                del texts[: len(batch)]
                yield from found

    def _refilled(self, unit: int) -> _Text | None:
        """The text without a unit; None if nothing that is scored changes."""
        whole = [*self._task.prompt.ids, *self._task.generated]
        tokens = np.flatnonzero(self._units == unit)
        stretches = self._method.refill(whole, tokens, len(self._task.prompt.ids))
        plain = self._ids
        ids = torch.tensor(refilled(plain.tolist(), stretches), dtype=torch.long)
        shorter = min(len(ids), len(plain))
        other = torch.nonzero(ids[:shorter] != plain[:shorter])
        same = int(other[0]) if len(other) else shorter
        if same == len(ids) == len(plain):
            return None
        # The state that predicts the first token after what is written is made anew,
        # also where what is written begins like the unit or like what follows it.
        ends = (one.start + len(one.ids) for one in stretches if _changes(one, whole))
        same = max(0, min(same, next(ends, len(ids)) - 1))
        if not self._scorer.reuses_prefix:
            same = 0
        return _Text(unit, ids[same:], same)

    def _batch_size(self, texts: Sequence[_Text]) -> int:
        if self._task.batch_size is not None and self._most is not None:
            return self._most
        kind = self._model.device.type
        start = texts[0].same
        pushed = max(text.length for text in texts) - start
        free = self._free * _MEMORY_SHARE
        if kind == "cpu":
            free = min(free, _MOST_HOST_BYTES)
        each = (pushed + 2 * start) * bytes_per_token(self._model.model)
        if not self._model.splits:
            each += 3 * self._stop * self._model.vocabulary_bytes()
        size = _ENOUGH_TOKENS.get(kind, _ENOUGH_TOKENS["cuda"]) // pushed
        size = min(size, int(free // max(each, 1)))
        return max(1, size if self._most is None else min(size, self._most))

    def _pass(self, batch: Sequence[_Text]) -> list[tuple[int, Array]]:
        """Scores of a few texts by one pass, from where the first one changes."""
        start = batch[0].same if self._scorer.reuses_prefix else 0
        longest = max(text.length for text in batch)
        # What is read after a text's end changes nothing before it.
        ids = torch.zeros((len(batch), longest - start), dtype=torch.long)
        firsts = []
        for row, text in enumerate(batch):
            between = self._ids[start : text.same]
            ids[row, : text.length - start] = torch.cat([between, text.ids])
            firsts.append(max(0, start - (text.length - self._stop)))
        keep = torch.arange(
            min(
                text.length - self._stop + first
                for text, first in zip(batch, firsts, strict=True)
            ),
            longest,
        )
        states = self._model.states(
            {"input_ids": ids.to(self._model.device)},
            keep - start,
            cache=self._scorer.prefix(start),
            direct=True,
        )
        found = []
        for one, text, first in zip(states, batch, firsts, strict=True):
            place = text.length - self._stop + first - int(keep[0])
            chosen = one[place : place + self._stop - first]
            logs = self._model.log_probabilities(chosen, self._targets[first:])
            scores = self.plain.copy()
            scores[first:] = logs.clamp(max=0).cpu().numpy()
            found.append((text.unit, scores))
        return found


def _changes(stretch: Stretch, ids: Sequence[int]) -> bool:
    """Whether something else stands in a text's stretch."""
    return stretch.ids != tuple(ids[stretch.start : stretch.stop])


REFILL = Engine(_rows, unsuitable=unsupported(), by_row=False, rehearsed=True)
