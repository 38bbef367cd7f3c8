"""The engine: the rows of all generated units from one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from captum_cage.engines import RowTask, register_engine
from gradient_norm.method import GradientNorm


@register_engine(GradientNorm)
def gradient_norm_rows(task: RowTask, steps: Sequence[int]) -> Iterator[np.ndarray]:
    """Raw rows of some generated units, in their order.

    Args:
        task (RowTask): the text, its units, and the Captum object.
        steps (Sequence[int]): ascending positions of generated units.

    Yields:
        numpy.ndarray: shape ``(N,)``: norms summed over the tokens of the unit and of
        each unit before it, zero from the unit on.
    """
    prompt, last = len(task.prompt.ids), task.range_of(steps[-1])[1]
    ids = torch.tensor([*task.prompt.ids, *task.generated[:last]])
    norms = task.llm_attr.attr_method.rows(ids[:-1], ids[prompt:]).double().numpy()
    unit_of_token = task.unit_of_token()[: len(ids) - 1]
    for step in steps:
        start, stop = task.range_of(step)
        own = len(task.sources) + step
        before = (unit_of_token >= 0) & (unit_of_token < own)
        row = np.zeros(task.width)
        np.add.at(row, unit_of_token[before], norms[start:stop].sum(axis=0)[before])
        yield row
