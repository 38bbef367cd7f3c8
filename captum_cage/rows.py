"""Raw rows by the loop: one call of the wrapped Captum object per generated unit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from captum_cage._captum import (
    LLMAttributionObject,
    attribute_unit,
    base_method,
    check_row_length,
    family,
)
from captum_cage._checks import complaint
from captum_cage.inputs import PrefixedInput, Prompt, TokenIdsInput, text_before
from captum_cage.text import TokenText, decode
from captum_cage.units import FIXED, Units

__all__ = ["RowTask", "check_task", "loop_row"]


@dataclass(frozen=True)
class RowTask:
    """Everything that the raw rows of one explanation depend on.

    Attributes:
        llm_attr: the wrapped Captum object.
        prompt (Prompt): what stands before the generated text.
        generated (tuple[int, ...]): generated ids.
        generated_text (TokenText): their text.
        sources (Units): source units, by token of the prompt or by feature.
        steps (Units): generated units, by generated token.
        baseline (int): id that stands for an absent generated token.
        kwargs (Mapping): arguments for the wrapped object's ``attribute``.
    """

    llm_attr: LLMAttributionObject
    prompt: Prompt
    generated: tuple[int, ...]
    generated_text: TokenText
    sources: Units
    steps: Units
    baseline: int
    kwargs: Mapping[str, Any]

    @property
    def width(self) -> int:
        """Number of units, ``N = P + G``."""
        return len(self.sources) + len(self.steps)

    def range_of(self, step: int) -> tuple[int, int]:
        """First generated token of a unit, and the one after its last."""
        members = self.steps.members(step)
        return int(members[0]), int(members[-1]) + 1


def check_task(task: RowTask) -> None:
    """Refuse, before any model call, what the loop could not do.

    Raises:
        TypeError: if the base method cannot read this input.
        ValueError: if rows are too long or too short for the method, or a unit of a
            remote model would not be scored as its own tokens.
    """
    P, G = len(task.sources), len(task.steps)
    check_row_length(task.llm_attr, P, P + G - 1)
    kind = family(task.llm_attr)
    if kind == "gradient" and not _has_tokens(task.prompt):
        raise TypeError(
            complaint(
                "inp",
                f"{base_method(task.llm_attr)} attributes to tokens and needs a "
                "TextTokenInput, TokenIdsInput or ChatTokenInput",
                f"{type(task.prompt.inp).__name__} came",
                "Use one of these, or a perturbation method such as FeatureAblation.",
            )
        )
    if kind == "remote":
        _check_remote(task)
    if (
        kind == "perturbation"
        and not task.prompt.takes_ids_alone
        and getattr(task.llm_attr, "attr_target", "log_prob") != "log_prob"
        and any(len(task.steps.members(step)) > 1 for step in range(G))
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


def _has_tokens(prompt: Prompt) -> bool:
    return prompt.feature_of_token is not None or isinstance(prompt.inp, TokenIdsInput)


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
    for step, unit in enumerate(task.steps.units):
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
            f"The remote model reads the text of {lost} of {len(task.steps)} rows as "
            "other tokens than were generated, as text is all it can be sent.",
            stacklevel=4,
        )


def loop_row(task: RowTask, step: int) -> npt.NDArray[np.float64]:
    """Raw row of one generated unit.

    Args:
        task (RowTask): what to explain.
        step (int): position of the generated unit.

    Returns:
        numpy.ndarray: attribution of the unit's log-probability to every unit before
        it, zero from the unit on. Shape ``(N,)``, float64.

    Raises:
        ValueError: if the base method gives NaN or an infinite value.
    """
    compute = _gradient_row if family(task.llm_attr) == "gradient" else _perturbed_row
    row = np.zeros(task.width)
    found = compute(task, step)
    row[: len(found)] = found
    for place in np.flatnonzero(~np.isfinite(row)):
        unit = (*task.sources.units, *task.steps.units)[place]
        raise ValueError(
            complaint(
                base_method(task.llm_attr),
                "must give finite attributions",
                f"{row[place]} came for unit {place}, {unit.text!r}, in the row of "
                f"{task.steps.units[step].text!r}",
                "Look for NaN or infinite weights, or use a wider number type.",
            )
        )
    return row


def _perturbed_row(task: RowTask, step: int) -> npt.NDArray[np.float64]:
    """Captum's sequence attribution of the unit to all units before it."""
    start, stop = task.range_of(step)
    by_token = not task.prompt.takes_ids_alone
    remote = family(task.llm_attr) == "remote"
    pieces = [(i, i + 1) for i in range(start, stop)] if by_token else [(start, stop)]
    width = len(task.sources) + step
    total = np.zeros(width)
    for first, last in pieces:
        # Tokens of the unit itself that precede the piece are present and no feature.
        groups = task.steps.groups[:first]
        inp = PrefixedInput(
            task.prompt,
            task.sources.groups,
            len(task.sources),
            task.generated[:first],
            np.where(groups < step, groups, FIXED),
            task.baseline,
            task.llm_attr.tokenizer,
            as_text_before=task.generated[first:last] if remote else None,
        )
        target = torch.tensor(task.generated[first:last])
        total += _attributed(task, inp, target, token_by_token=by_token)
    return total


def _gradient_row(task: RowTask, step: int) -> npt.NDArray[np.float64]:
    """Sum of the unit's token rows, over the columns of each unit before it."""
    start, stop = task.range_of(step)
    prompt = task.prompt
    sources = _source_of_token(task)
    groups = np.concatenate([sources, task.steps.groups + len(task.sources)])
    width = len(task.sources) + step
    total = np.zeros(width)
    ids = [*prompt.ids, *task.generated]
    baselines = [*_baselines(prompt), *([task.baseline] * len(task.generated))]
    for position in range(start, stop):
        length = len(prompt.ids) + position
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


def _source_of_token(task: RowTask) -> npt.NDArray[np.int64]:
    """Source unit of each token of the prompt, -1 for none."""
    if task.prompt.feature_of_token is not None:
        return task.sources.groups
    feature: npt.NDArray[np.int64] = task.prompt.inp.feature_of_token
    return np.where(feature >= 0, task.sources.groups[feature], FIXED)


def _baselines(prompt: Prompt) -> list[int]:
    if isinstance(prompt.inp, TokenIdsInput):
        return [int(i) for i in prompt.inp.baseline_ids]
    return [int(prompt.inp.baselines)] * len(prompt.ids)


def _attributed(
    task: RowTask,
    inp: PrefixedInput | TokenIdsInput,
    target: torch.Tensor,
    token_by_token: bool = False,
) -> npt.NDArray[np.float64]:
    found = attribute_unit(
        task.llm_attr, inp, target, task.kwargs, token_by_token=token_by_token
    )
    return found.detach().double().cpu().numpy()
