"""Rows of Shapley values: permutations, or subsets, of all units serve all rows.

A random permutation of all units, restricted to the units before a row, is a random
permutation of those; and units that stand after a row do not change its value. The
row's own unit is always present, as its later tokens follow its earlier ones: where a
permutation has not reached it yet, a unit of several tokens is scored once more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from captum_cage._captum import argument
from captum_cage.engines.columns import scored_subsets, unit_values, unsupported
from captum_cage.engines.engine import Engine
from captum_cage.engines.sequences import Perturbation, SequenceScorer
from captum_cage.task import RowTask

__all__ = ["EXACT_SHAPLEY", "SAMPLED_SHAPLEY"]

Array = npt.NDArray[np.float64]

# 2**14 sequences; Captum would ask the model 14 * 14! times for the last row alone.
_MOST_UNITS = 14
# Sequences that are scored together, at least.
_TOGETHER = 512


def _scorer(task: RowTask, last: int) -> SequenceScorer:
    return SequenceScorer(task, task.range_of(last)[1])


def _before(task: RowTask, last: int) -> npt.NDArray[np.bool_]:
    """Whether a unit stands before a row, shape ``(units, rows)``."""
    units = np.arange(len(task.sources) + last)
    rows = np.arange(last + 1) + len(task.sources)
    return units[:, None] < rows


def _sampled_rows(task: RowTask, steps: Sequence[int]) -> Iterator[Array]:
    last = max(steps)
    units = len(task.sources) + last
    kept = task.kept.setdefault("shapley", {"done": 0})
    if kept.get("last") != last:
        kept.update(done=0, last=last, total=np.zeros((units, last + 1)))
    total: Array = kept["total"]
    wanted = argument(task.llm_attr, task.kwargs, "n_samples")
    wanted *= task.kwargs.get("num_trials", 1)
    scorer = _scorer(task, last)
    group = max(1, _TOGETHER // units)
    bar = tqdm(
        desc="permutations",
        total=wanted,
        initial=kept["done"],
        disable=not task.show_progress,
    )
    with bar:
        while kept["done"] < wanted:
            count = min(group, wanted - kept["done"])
            orders = [torch.randperm(units).tolist() for _ in range(count)]
            total += _contributions(task, scorer, orders)
            kept["done"] += count
            bar.update(count)
    rows = np.where(_before(task, last), total / wanted, 0.0).T
    yield from _wide(task, rows[list(steps)])


def _contributions(
    task: RowTask, scorer: SequenceScorer, orders: Sequence[list[int]]
) -> Array:
    """What each unit adds when it comes, summed over orders, ``(units, rows)``."""
    units = len(orders[0])
    rows = units - len(task.sources) + 1
    # Present before each unit came, and after the last: (orders, units + 1, units).
    rank = np.argsort(orders, axis=1)
    present = rank[:, None, :] < np.arange(units + 1)[:, None]
    values = scored_subsets(task, scorer, present.reshape(-1, units), rows)
    added = np.diff(values.reshape(len(orders), units + 1, rows), axis=1)
    total = np.zeros((units, rows))
    for order, effects in zip(orders, added, strict=True):
        total[order] += effects
    return total


def _exact_rows(task: RowTask, steps: Sequence[int]) -> Iterator[Array]:
    last = max(steps)
    P = len(task.sources)
    units = P + last
    scorer = _scorer(task, last)
    values, done = task.kept.setdefault(
        f"subsets before {last}",
        (np.empty((2**units, last + 1)), np.zeros(2**units, dtype=bool)),
    )
    bits = np.arange(units)

    def perturbations() -> Iterator[Perturbation]:
        for subset in np.flatnonzero(~done).tolist():
            yield Perturbation(subset, scorer.indicator((subset >> bits) & 1 == 1))

    scored = tqdm(
        scorer.scores(perturbations()),
        desc="subsets",
        total=len(done),
        initial=int(done.sum()),
        disable=not task.show_progress,
    )
    for subset, scores in scored:
        values[subset] = unit_values(task, scores)
        done[subset] = True
    rows = np.zeros((len(steps), units))
    for place, step in enumerate(steps):
        # The row's own unit and all after it are present: their bits are set.
        found = _shapley_values(values[-(2 ** (P + step)) :, step])
        rows[place, : P + step] = found
    yield from _wide(task, rows)


def _shapley_values(values: Array) -> Array:
    """Shapley values from the value of each subset, whose bits are its members.

    ``phi_j = sum_S |S|! (n - |S| - 1)! / n! * (v(S + j) - v(S))``.
    """
    n = len(values).bit_length() - 1
    subsets = np.arange(len(values))
    sizes = np.array([subset.bit_count() for subset in range(len(values))])
    weights = np.array(
        [1.0 / (n * math.comb(n - 1, size)) for size in range(n)] + [0.0]
    )
    found = np.zeros(n)
    for unit in range(n):
        without = subsets[(subsets >> unit) & 1 == 0]
        added = values[without | (1 << unit)] - values[without]
        found[unit] = weights[sizes[without]] @ added
    return found


def _wide(task: RowTask, rows: Array) -> Iterator[Array]:
    """Rows with a column for every unit."""
    for found in rows:
        row = np.zeros(task.width)
        row[: len(found)] = found
        yield row


def _too_many(task: RowTask) -> str | None:
    units = task.width - 1
    if units > _MOST_UNITS:
        return (
            f"the last row has {units} units before it and the engine asks for all "
            f"subsets of at most {_MOST_UNITS}"
        )
    return unsupported()(task)


EXACT_SHAPLEY = Engine(_exact_rows, unsuitable=_too_many, by_row=False, rehearsed=True)
SAMPLED_SHAPLEY = Engine(
    _sampled_rows, unsuitable=unsupported("n_samples"), by_row=False, rehearsed=True
)
