"""Rows of FeatureAblation: one perturbed sequence per unit serves all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from captum_cage.engines.columns import Columns, unit_values, unsupported
from captum_cage.engines.engine import Engine
from captum_cage.engines.sequences import Perturbation, SequenceScorer
from captum_cage.task import RowTask

__all__ = ["ABLATION"]


def _rows(task: RowTask, steps: Sequence[int]) -> Iterator[npt.NDArray[np.float64]]:
    last = max(steps)
    scorer = SequenceScorer(task, task.range_of(last)[1])
    P = len(task.sources)
    columns = Columns.of(task, "ablation", P + last, last + 1)
    plain = unit_values(task, scorer.plain)

    def perturbations() -> Iterator[Perturbation]:
        for unit in columns.missing():
            absent = np.arange(P + last) == unit
            first = task.range_of(unit - P)[1] if unit >= P else 0
            yield Perturbation(unit, scorer.indicator(~absent), first)

    for unit, scores in columns.progress(scorer.scores(perturbations())):
        effect = plain - unit_values(task, scores)
        effect[: max(0, unit - P + 1)] = 0.0
        columns.fill(unit, effect)
    yield from columns.rows(task, steps)


def _unsuitable(task: RowTask) -> str | None:
    if task.kwargs.get("num_trials", 1) > 1 and callable(
        getattr(task.prompt.inp, "baselines", None)
    ):
        return "its baselines are drawn anew in each trial"
    return unsupported()(task)


ABLATION = Engine(_rows, unsuitable=_unsuitable, by_row=False, rehearsed=True)
