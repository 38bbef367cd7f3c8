"""Raw rows that come column by column: what perturbation engines share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from captum_cage._captum import base_method, family, is_captums_own
from captum_cage.engines.sequences import Perturbation, SequenceScorer
from captum_cage.task import RowTask

__all__ = ["Columns", "scored_subsets", "unit_values", "unsupported"]

# Entries from which columns lie in a file and not in memory (1 GiB of float64).
_IN_MEMORY = 2**27
# Rows that are read out of the columns at once.
_BLOCK = 256
# Arguments of Captum's perturbation methods that leave the rows as they are.
_WITHOUT_EFFECT = {
    "enable_cross_tensor_attribution",
    "forward_in_tokens",
    "perturbations_per_eval",
    "show_progress",
    "use_cached_outputs",
}

_T = TypeVar("_T")


def unsupported(*supported: str) -> Callable[[RowTask], str | None]:
    """Why a perturbation engine cannot do a task: remote models, other arguments."""

    def reason(task: RowTask) -> str | None:
        if family(task.llm_attr) != "perturbation":
            return "a remote model is sent one text at a time"
        if not is_captums_own(task.llm_attr):
            return f"{type(task.llm_attr).__name__} may compute something of its own"
        known = {*_WITHOUT_EFFECT, "num_trials", *supported}
        for name in task.kwargs:
            if name not in known:
                return f"the argument {name!r} is Captum's own matter"
        if getattr(task.llm_attr.attr_method, "use_weights", False):
            return f"this {base_method(task.llm_attr)} weighs overlapping windows"
        return None

    return reason


def unit_values(
    task: RowTask, scores: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """What is attributed, of each generated unit that is scored whole.

    Args:
        task (RowTask): what to explain; its object says whether log-probabilities or
            probabilities are attributed.
        scores (numpy.ndarray): log-probabilities of generated tokens, ``(tokens,)``.

    Returns:
        numpy.ndarray: one value per unit, float64.
    """
    values = task.unit_sums(scores)
    if getattr(task.llm_attr, "attr_target", "log_prob") != "log_prob":
        return np.exp(values)
    return values


def scored_subsets(
    task: RowTask,
    scorer: SequenceScorer,
    present: npt.NDArray[np.bool_],
    rows: int,
) -> npt.NDArray[np.float64]:
    """What is attributed of each generated unit, with some of the units before it.

    One sequence serves all rows, except those of units of several tokens that are
    absent from it: such a unit is scored once more after the same units, with its own
    tokens in place.

    Args:
        task (RowTask): what to explain.
        scorer (SequenceScorer): scores its sequences.
        present (numpy.ndarray): which units are present, shape ``(n, units)``; equal
            ones are asked for once.
        rows (int): number of generated units.

    Returns:
        numpy.ndarray: shape ``(n, rows)``, float64.
    """
    P = len(task.sources)
    values = np.empty((len(present), rows))
    asked: dict[tuple[int | None, bytes], int] = {}
    questions: list[tuple[npt.NDArray[np.bool_], int, int, int | None]] = []
    answered: list[list[int]] = []

    def ask(
        units: npt.NDArray[np.bool_], place: int, first: int, stop: int, row: int | None
    ) -> None:
        key = (row, units.tobytes())
        if key not in asked:
            asked[key] = len(questions)
            questions.append((units, first, stop, row))
            answered.append([])
        answered[asked[key]].append(place)

    ranges = [task.range_of(row) for row in range(rows)]
    for place, units in enumerate(present):
        ask(units, place, 0, ranges[-1][1], None)
        for row in task.written.tolist():
            if row >= rows:
                break
            first, stop = ranges[row]
            own = P + row
            if stop - first > 1 and own < len(units) and not units[own]:
                ask(np.append(units[:own], True), place, first, stop, row)

    def perturbations() -> Iterator[Perturbation]:
        for number, (units, first, stop, _) in enumerate(questions):
            yield Perturbation(number, scorer.indicator(units), first, stop)

    found: list[npt.NDArray[np.float64] | float] = [0.0] * len(questions)
    for number, scores in scorer.scores(perturbations()):
        _, _, end, alone = questions[number]
        of_units = unit_values(task, scores[:end])
        found[number] = of_units if alone is None else float(of_units[alone])
    # A row's own question may have been asked before the one of all rows.
    whole_first = sorted(range(len(questions)), key=lambda n: questions[n][3] is None)
    for number in reversed(whole_first):
        row = questions[number][3]
        values[answered[number], slice(None) if row is None else row] = found[number]
    return values


@dataclass(frozen=True)
class Columns:
    """Effects of units on rows, filled unit by unit and read row by row.

    Large ones lie in a temporary file, so that they take no memory.
    """

    values: Any  # (units, rows), float64
    done: npt.NDArray[np.bool_]  # (units,)
    show_progress: bool

    @classmethod
    def of(cls, task: RowTask, key: str, units: int, rows: int) -> Columns:
        """The columns of a task; those of an interrupted call if there are any."""
        kept = task.kept.get(key)
        if isinstance(kept, Columns) and kept.values.shape == (units, rows):
            return kept
        if units * rows > _IN_MEMORY:
            with tempfile.TemporaryFile() as file:  # lives on as long as its map
                values: Any = np.memmap(file, np.float64, "w+", shape=(units, rows))
        else:
            values = np.zeros((units, rows))
        columns = cls(values, np.zeros(units, dtype=bool), task.show_progress)
        task.kept[key] = columns
        return columns

    def missing(self) -> list[int]:
        """Units whose column is not filled."""
        found: list[int] = np.flatnonzero(~self.done).tolist()
        return found

    def progress(self, items: Iterable[_T]) -> Iterable[_T]:
        """The items, with a progress bar if the user wants one."""
        bar: Iterable[_T] = tqdm(
            items,
            desc="perturbations",
            total=len(self.done),
            initial=int(self.done.sum()),
            disable=not self.show_progress,
        )
        return bar

    def fill(self, unit: int, effect: npt.NDArray[np.float64]) -> None:
        """Set the effect of one unit on all rows."""
        self.values[unit] = effect
        self.done[unit] = True

    def rows(
        self, task: RowTask, steps: Sequence[int]
    ) -> Iterator[npt.NDArray[np.float64]]:
        """The rows of some generated units, shape ``(N,)`` each."""
        for start in range(0, len(steps), _BLOCK):
            some = list(steps[start : start + _BLOCK])
            block = np.ascontiguousarray(self.values[:, some].T)
            for found in block:
                row = np.zeros(task.width)
                row[: len(found)] = found
                yield row
