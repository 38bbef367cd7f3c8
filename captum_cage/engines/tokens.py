"""Rows of methods that give those of all tokens by one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from captum_cage._captum import is_captums_own
from captum_cage.engines.engine import Engine
from captum_cage.engines.memory import first_pass
from captum_cage.engines.verification import check_length_dependence
from captum_cage.task import RowTask

__all__ = ["TOKENS"]


def _rows(task: RowTask, steps: Sequence[int]) -> Iterator[npt.NDArray[np.float64]]:
    method: Any = task.llm_attr.attr_method
    first, stop = task.range_of(steps[0])[0], task.range_of(steps[-1])[1]
    length = len(task.prompt.ids) + stop - 1
    check_length_dependence(method.model, length + 1)
    ids = torch.tensor([*task.prompt.ids, *task.generated])[:length]
    kept = task.kept.get("tokens")
    if kept is None or kept[0] != (first, stop):
        with first_pass(), torch.no_grad():
            found = method.rows(ids, torch.tensor(task.generated[first:stop]))
        kept = task.kept["tokens"] = ((first, stop), found.detach().cpu())
    table = kept[1]
    units = task.unit_of_token()[:length]
    for step in steps:
        start, end = task.range_of(step)
        width = len(task.sources) + step
        columns = (units >= 0) & (units < width)
        row = np.zeros(task.width)
        # Widened unit by unit: the whole table would take twice as much once more.
        scores = table[start - first : end - first].double().numpy().sum(axis=0)
        np.add.at(row, units[columns], scores[columns])
        yield row


def _unsuitable(task: RowTask) -> str | None:
    if not is_captums_own(task.llm_attr):
        return f"{type(task.llm_attr).__name__} may compute something of its own"
    return None


TOKENS = Engine(_rows, unsuitable=_unsuitable, by_row=False)
