"""Rows of C-LIME, L-SHAP and ContextCite: one sequence per set of absent units.

A row sees of a set the units before it, and its own unit is always present. So a
sequence serves all rows whose set begins like it, except those of units of several
tokens that are absent from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from captum_cage.engines.columns import unit_values, unsupported
from captum_cage.engines.engine import Engine
from captum_cage.engines.sequences import Perturbation, SequenceScorer
from captum_cage.methods.subsets import AbsentSet, SubsetMethod, SubsetPlan
from captum_cage.task import RowTask

__all__ = ["SUBSETS"]

Array: TypeAlias = npt.NDArray[np.float64]


def _rows(task: RowTask, steps: Sequence[int]) -> Iterator[Array]:
    plan = _plan(task)
    scorer = SequenceScorer(task, task.range_of(max(steps))[1])
    asked = task.kept.get("subsets")
    if asked is None or not asked.has(steps):
        asked = task.kept["subsets"] = _Asked.of(task, plan, steps)
    asked.answer(task, scorer)
    for step in steps:
        yield asked.row(task, plan, step)


def _plan(task: RowTask) -> SubsetPlan:
    method: SubsetMethod = task.llm_attr.attr_method
    return method.plan(task.kwargs)


@dataclass
class _Question:
    """A set of absent units, the rows that need it, and what came of it for them."""

    first: int
    last: int
    values: Array | None = None

    def value(self, row: int) -> float:
        """What is attributed of a row's unit."""
        if self.values is None:
            raise LookupError("a set of absent units was not scored")
        return float(self.values[row - self.first])


@dataclass
class _Asked:
    """The sets that some rows need, drawn once, and their scores as they come."""

    steps: tuple[int, ...]
    free: npt.NDArray[np.int64]
    questions: dict[AbsentSet, _Question] = field(default_factory=dict)
    # Of each row and trial: the sets that answer it, as numbers of units.
    of_row: dict[int, list[list[AbsentSet]]] = field(default_factory=dict)

    @classmethod
    def of(cls, task: RowTask, plan: SubsetPlan, steps: Sequence[int]) -> _Asked:
        """The sets of some rows, not scored yet."""
        P = len(task.sources)
        asked = cls(tuple(steps), plan.free(P + max(steps)))
        counts = [int(np.searchsorted(asked.free, P + step)) for step in steps]
        with_units = [count for count in counts if count]
        for _ in range(task.kwargs.get("num_trials", 1)):
            if not with_units:
                continue
            drawn, numbers = plan.absent_sets(with_units)
            sets = [tuple(asked.free[list(one)].tolist()) for one in drawn]
            found = iter(numbers)
            for step, count in zip(steps, counts, strict=True):
                if count:
                    chosen = [sets[number] for number in next(found)]
                    asked._ask(task, step, chosen)
        return asked

    def has(self, steps: Sequence[int]) -> bool:
        """Whether these rows are among those that were asked for, the last too."""
        return max(steps) == max(self.steps) and set(steps) <= set(self.steps)

    def _ask(self, task: RowTask, step: int, sets: Sequence[AbsentSet]) -> None:
        own = len(task.sources) + step
        start, stop = task.range_of(step)
        needed = []
        for one in sets:
            # What follows an absent token of the unit itself must not be read.
            if stop - start > 1 and own in one:
                one = _before(one, own)
            question = self.questions.setdefault(one, _Question(step, step))
            question.first = min(question.first, step)
            question.last = max(question.last, step)
            needed.append(one)
        self.of_row.setdefault(step, []).append(needed)

    def answer(self, task: RowTask, scorer: SequenceScorer) -> None:
        """Score the sets that are not scored."""
        order = [(one, q) for one, q in self.questions.items() if q.values is None]

        def perturbations() -> Iterator[Perturbation]:
            for number, (one, question) in enumerate(order):
                present = np.ones(scorer.n_units, dtype=bool)
                present[list(one)] = False
                first = task.range_of(question.first)[0]
                stop = task.range_of(question.last)[1]
                yield Perturbation(number, present, first, stop)

        scored = tqdm(
            scorer.scores(perturbations()),
            desc="perturbations",
            total=len(self.questions),
            initial=len(self.questions) - len(order),
            disable=not task.show_progress,
        )
        for number, scores in scored:
            _, question = order[number]
            stop = task.range_of(question.last)[1]
            found = unit_values(task, scores[:stop])
            question.values = found[question.first :].copy()

    def row(self, task: RowTask, plan: SubsetPlan, step: int) -> Array:
        """The raw row of a generated unit, shape ``(N,)``."""
        P = len(task.sources)
        free = self.free[: np.searchsorted(self.free, P + step)]
        start, stop = task.range_of(step)
        place = {int(unit): number for number, unit in enumerate(free)}
        row = np.zeros(task.width)
        trials = self.of_row.get(step, [])
        for needed in trials:
            absent = [
                tuple(place[unit] for unit in one if unit < P + step) for one in needed
            ]
            values = np.array([self.questions[one].value(step) for one in needed])
            row[free] += plan.fit(len(free), absent, values, stop - start)
        return row / max(1, len(trials))


def _before(absent: AbsentSet, unit: int) -> AbsentSet:
    return tuple(other for other in absent if other < unit)


def _unsuitable(task: RowTask) -> str | None:
    plan = _plan(task)
    several = len(task.steps) < len(task.generated)
    if task.by_token and several and not plan.adds_up:
        return "what it fits to tokens does not add up to what it fits to a unit"
    if task.kwargs.get("num_trials", 1) > 1 and callable(
        getattr(task.prompt.inp, "baselines", None)
    ):
        return "its baselines are drawn anew in each trial"
    options = (
        *("alpha", "max_units_replaced", "n_samples", "neighbors"),
        *("never_perturb", "oversampling", "scalarizer"),
    )
    return unsupported(*options)(task)


SUBSETS = Engine(_rows, unsuitable=_unsuitable, by_row=False, rehearsed=True)
