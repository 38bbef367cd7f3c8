"""Raw rows by the loop: one call of the wrapped Captum object per generated unit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_cage._captum import (
    attribute_unit,
    base_method,
    check_longest_row,
    check_shortest_row,
    family,
)
from captum_cage._checks import complaint
from captum_cage.inputs import PrefixedInput, TokenIdsInput, text_before
from captum_cage.methods.capability import Capability
from captum_cage.task import RowTask, check_perturbed
from captum_cage.text import decode

__all__ = ["check_loop", "check_task", "checked_row", "loop_row"]


def check_task(task: RowTask) -> None:
    """Refuse, before any model call, what no strategy could do.

    Raises:
        TypeError: if the base method cannot read this input.
        ValueError: if rows are too short for the method, or a unit of a remote model
            would not be scored as its own tokens.
    """
    check_shortest_row(task.llm_attr, len(task.sources))
    kind = family(task.llm_attr)
    declared = getattr(task.llm_attr.attr_method, "capability", None)
    if isinstance(declared, Capability):
        _check_capability(task, declared)
    if kind == "gradient" and not task.reads_tokens:
        raise _needs_tokens(task)
    if kind == "remote":
        _check_remote(task)
    if (
        kind == "perturbation"
        and not task.prompt.takes_ids_alone
        and getattr(task.llm_attr, "attr_target", "log_prob") != "log_prob"
        and any(len(task.steps.members(step)) > 1 for step in range(len(task.steps)))
    ):
        raise ValueError(
            complaint(
                "units",
                "must be 'token' for the generated text where the attributed quantity "
                "is 'prob' and the input is more than ids",
                "larger units came",
                "Use attr_target='log_prob', which adds up over a unit's tokens.",
            )
        )


def _needs_tokens(task: RowTask) -> TypeError:
    return TypeError(
        complaint(
            "inp",
            f"{base_method(task.llm_attr)} attributes to tokens and needs a "
            "TextTokenInput, TokenIdsInput or ChatTokenInput",
            f"{type(task.prompt.inp).__name__} came",
            "Use one of these, or a perturbation method such as FeatureAblation.",
        )
    )


def _check_capability(task: RowTask, declared: Capability) -> None:
    """Refuse what a base method says that it cannot do."""
    method = base_method(task.llm_attr)
    if family(task.llm_attr) == "remote" and not declared.remote:
        raise TypeError(
            complaint(
                "llm_attr",
                f"{method} needs the model itself",
                f"it came in a {type(task.llm_attr).__name__}, whose model is remote",
                "Wrap it in LLMAttribution, or use a method that perturbs text, such "
                "as FeatureAblation.",
            )
        )
    if declared.tokens_only and not task.reads_tokens:
        raise _needs_tokens(task)
    target = getattr(task.llm_attr, "attr_target", "log_prob")
    if target != "log_prob" and not declared.probabilities:
        raise ValueError(
            complaint(
                "attr_target",
                f"must be 'log_prob' for {method}",
                f"{target!r} came",
                "Leave it out, or use a method that attributes probabilities, such as "
                "FeatureAblation.",
            )
        )


def _check_remote(task: RowTask) -> None:
    tokenizer = task.llm_attr.tokenizer
    if not task.prompt.takes_ids_alone:
        raise TypeError(
            complaint(
                "inp",
                "a remote model reads text",
                f"{type(task.prompt.inp).__name__} came, which gives more than that",
                "Use a text input.",
            )
        )
    model_input = task.prompt.inp.to_model_input()
    lost = 0
    for step in task.written.tolist():
        unit = task.steps.units[step]
        start, stop = task.range_of(step)
        ids = list(task.generated[start:stop])
        again = tokenizer.encode(decode(ids, tokenizer), add_special_tokens=False)
        if len(again) != len(ids):
            raise ValueError(
                complaint(
                    "units",
                    "a remote model scores text, so each generated unit must have as "
                    "many tokens when its text is tokenised",
                    f"unit {step}, {unit.text!r}, is {ids} and would become {again}",
                    "Use larger units, for example units='word' or 'sentence'.",
                )
            )
        prefix = task.generated[:start]
        text = text_before(model_input, task.prompt, prefix, ids, tokenizer)
        read = tokenizer.encode(text + decode(ids, tokenizer))
        lost += list(read) != [*task.prompt.ids, *task.generated[:stop]]
    if lost:
        warnings.warn(
            f"The remote model reads the text of {lost} of {len(task.written)} rows as "
            "other tokens than were generated, as text is all it can be sent.",
            stacklevel=4,
        )


def check_loop(task: RowTask) -> None:
    """Refuse, before it starts, what the loop could not do.

    Raises:
        ValueError: if rows are too long for the method.
    """
    check_longest_row(task.llm_attr, task.width - 1)


def loop_row(task: RowTask, step: int) -> npt.NDArray[np.float64]:
    """Raw row of one generated unit.

    Args:
        task (RowTask): what to explain.
        step (int): position of the generated unit.

    Returns:
        numpy.ndarray: attribution of the unit's log-probability to every unit before
        it, zero from the unit on. Shape ``(N,)``, float64.
    """
    compute = _gradient_row if family(task.llm_attr) == "gradient" else _perturbed_row
    row = np.zeros(task.width)
    found = compute(task, step)
    row[: len(found)] = found
    return row


def checked_row(task: RowTask, step: int, row: Any) -> npt.NDArray[np.float64]:
    """A raw row as it must be, from the loop or from an engine.

    Raises:
        ValueError: if it has another shape, NaN or an infinite value, or an entry for a
            unit that does not stand before it.
    """
    found = np.asarray(row, dtype=np.float64)
    text = task.steps.units[step].text
    method = base_method(task.llm_attr)
    if found.shape != (task.width,):
        raise ValueError(
            complaint(
                method,
                f"must give rows of {task.width} numbers, one per unit",
                f"shape {found.shape} came for the row of {text!r}",
                "Correct the engine that was registered for it.",
            )
        )
    for place in np.flatnonzero(~np.isfinite(found))[:1]:
        units = (*task.sources.units, *task.steps.units)
        raise ValueError(
            complaint(
                method,
                "must give finite attributions",
                f"{found[place]} came for unit {place}, {units[place].text!r}, in the "
                f"row of {text!r}",
                "Look for NaN or infinite weights, or use a wider number type.",
            )
        )
    for place in np.flatnonzero(found[len(task.sources) + step :])[:1]:
        late = len(task.sources) + step + int(place)
        units = (*task.sources.units, *task.steps.units)
        raise ValueError(
            complaint(
                method,
                "must attribute a unit to units before it only",
                f"{found[late]} came for unit {late}, {units[late].text!r}, in the row "
                f"of {text!r}",
                "Correct the engine that was registered for it.",
            )
        )
    return found


def _perturbed_row(task: RowTask, step: int) -> npt.NDArray[np.float64]:
    """Captum's sequence attribution of the unit to all units before it."""
    start, stop = task.range_of(step)
    remote = family(task.llm_attr) == "remote"
    pieces = [(i, i + 1) for i in range(start, stop)]
    if not task.by_token:
        pieces = [(start, stop)]
    total = np.zeros(len(task.sources) + step)
    for first, last in pieces:
        scored = task.generated[first:last]
        inp = task.prefixed_input(
            first, step=step, as_text_before=scored if remote else None
        )
        total += _attributed(
            task,
            inp,
            torch.tensor(scored),
            token_by_token=task.by_token,
            check=_finite(task, first),
        )
    return total


def _finite(task: RowTask, first: int) -> Callable[[Tensor, Tensor], None]:
    """Refuses what a perturbed text scores, from a token on, if it is no number."""

    def check(perturbed: Tensor, found: Tensor) -> None:
        # The whole stretch comes before its tokens.
        score = found.detach().double().cpu().flatten()[:1].numpy()
        check_perturbed(task, score, perturbed[0].cpu().numpy() != 0, first)

    return check


def _gradient_row(task: RowTask, step: int) -> npt.NDArray[np.float64]:
    """Sum of the unit's token rows, over the columns of each unit before it."""
    start, stop = task.range_of(step)
    groups = task.unit_of_token()
    width = len(task.sources) + step
    total = np.zeros(width)
    ids = [*task.prompt.ids, *task.generated]
    baselines = task.baseline_ids()
    for position in range(start, stop):
        length = len(task.prompt.ids) + position
        attributed = groups[:length] >= 0
        inp = TokenIdsInput.unlabelled(
            ids[:length], task.llm_attr.tokenizer, attributed, baselines[:length]
        )
        target = torch.tensor(task.generated[position : position + 1])
        scores = _attributed(task, inp, target)
        columns = groups[:length][attributed]
        before = columns < width
        np.add.at(total, columns[before], scores[before])
    return total


def _attributed(
    task: RowTask,
    inp: PrefixedInput | TokenIdsInput,
    target: Tensor,
    token_by_token: bool = False,
    check: Callable[[Tensor, Tensor], None] | None = None,
) -> npt.NDArray[np.float64]:
    found = attribute_unit(
        task.llm_attr,
        inp,
        target,
        task.kwargs,
        token_by_token=token_by_token,
        check=check,
    )
    return found.detach().double().cpu().numpy()
