"""Rows of Lime and KernelShap: Captum's own regressions on sequences scored together.

Captum draws the samples and fits the model, row by row; only the scores come from
here. Lime draws each unit by a fair coin, so that one set of samples, restricted to the
units before a row, is a set of samples for that row. KernelShap draws the number of
units first, by a distribution that depends on how many there are: each row has samples
of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import Lime
from torch import Tensor

from captum_cage._captum import (
    argument,
    attribute_scored,
    draws_fair_coins,
    lime_samples,
)
from captum_cage.engines.columns import scored_subsets, unit_values, unsupported
from captum_cage.engines.engine import Engine
from captum_cage.engines.sequences import Perturbation, SequenceScorer
from captum_cage.task import RowTask

__all__ = ["REGRESSION"]

_T = TypeVar("_T")

# Rows whose samples are scored together.
_TOGETHER = 32


def _rows(task: RowTask, steps: Sequence[int]) -> Iterator[npt.NDArray[np.float64]]:
    shared = isinstance(task.llm_attr.attr_method, Lime) and draws_fair_coins(
        task.llm_attr
    )
    scorer = SequenceScorer(task, task.range_of(max(steps))[1])
    yield from (_shared if shared else _own)(task, steps, scorer)


def _shared(
    task: RowTask, steps: Sequence[int], scorer: SequenceScorer
) -> Iterator[npt.NDArray[np.float64]]:
    """One set of samples of all units, restricted to each row."""
    units = len(task.sources) + max(steps)
    count = argument(task.llm_attr, task.kwargs, "n_samples")
    trials = task.kwargs.get("num_trials", 1)
    kept = task.kept.get("lime")
    if kept is None or kept[0].shape != (trials * count, units):
        samples = lime_samples(trials * count, units)
        values = scored_subsets(task, scorer, samples.numpy() == 1, max(steps) + 1)
        kept = task.kept["lime"] = (samples, values)
    samples, values = kept
    for step in steps:
        width = len(task.sources) + step
        found = attribute_scored(
            task.llm_attr,
            width,
            task.kwargs,
            _one_by_one(values[:, step]),
            draw=_one_by_one(samples[:, None, :width]),
        )
        yield _wide(task, found)


def _own(
    task: RowTask, steps: Sequence[int], scorer: SequenceScorer
) -> Iterator[npt.NDArray[np.float64]]:
    """Samples of each row: drawn, scored together, and drawn again for the fit."""
    for start in range(0, len(steps), _TOGETHER):
        some = steps[start : start + _TOGETHER]
        states = []
        asked: list[dict[bytes, npt.NDArray[np.bool_]]] = []
        for step in some:
            states.append(torch.get_rng_state())
            asked.append(_samples(task, step))
        after = torch.get_rng_state()
        scored = _scored(task, scorer, some, asked)
        for step, state, values in zip(some, states, scored, strict=True):
            torch.set_rng_state(state)
            found = attribute_scored(
                task.llm_attr,
                len(task.sources) + step,
                task.kwargs,
                _looked_up(values),
            )
            yield _wide(task, found)
        torch.set_rng_state(after)


def _samples(task: RowTask, step: int) -> dict[bytes, npt.NDArray[np.bool_]]:
    """The samples that Captum draws for a row."""
    samples = {}

    def record(sample: Tensor) -> float:
        samples[_key(sample)] = sample[0].cpu().numpy() == 1
        # Two values, as some models cannot be fitted to one.
        return float(len(samples))

    attribute_scored(task.llm_attr, len(task.sources) + step, task.kwargs, record)
    return samples


def _one_by_one(items: Iterable[_T]) -> Callable[..., _T]:
    left = iter(items)
    return lambda *_: next(left)


def _looked_up(values: dict[bytes, float]) -> Callable[[Tensor], float]:
    return lambda sample: values[_key(sample)]


def _key(sample: Tensor) -> bytes:
    key: bytes = (sample[0].cpu().numpy() == 1).tobytes()
    return key


def _scored(
    task: RowTask,
    scorer: SequenceScorer,
    steps: Sequence[int],
    asked: Sequence[dict[bytes, npt.NDArray[np.bool_]]],
) -> list[dict[bytes, float]]:
    """What is attributed, for each sample of each row."""
    found: list[dict[bytes, float]] = [{} for _ in steps]
    order = [(place, key) for place, samples in enumerate(asked) for key in samples]

    def perturbations() -> Iterator[Perturbation]:
        for number, (place, key) in enumerate(order):
            start, stop = task.range_of(steps[place])
            present = scorer.indicator(asked[place][key])
            yield Perturbation(number, present, first=start, stop=stop)

    for number, scores in scorer.scores(perturbations()):
        place, key = order[number]
        step = steps[place]
        stop = task.range_of(step)[1]
        found[place][key] = float(unit_values(task, scores[:stop])[step])
    return found


def _wide(task: RowTask, found: Tensor) -> npt.NDArray[np.float64]:
    row = np.zeros(task.width)
    row[: len(found)] = found.numpy()
    return row


def _unsuitable(task: RowTask) -> str | None:
    if task.by_token and any(
        len(task.steps.members(step)) > 1 for step in range(len(task.steps))
    ):
        return "a regression per token does not add up to one per unit"
    return unsupported("n_samples")(task)


REGRESSION = Engine(_rows, unsuitable=_unsuitable, by_row=False, rehearsed=True)
