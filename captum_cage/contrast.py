"""Contrastive rows: why a model wrote this and not that."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_cage._captum import LLMAttributionObject, base_method
from captum_cage._checks import complaint, shown, whole_number
from captum_cage.foils import Foil
from captum_cage.inputs import check_unicode, token_ids
from captum_cage.methods.catalogue import capability_of, is_random
from captum_cage.rows import check_task
from captum_cage.scoring import check_sequence
from captum_cage.spans import find_span
from captum_cage.strategy import Strategy, StrategyName
from captum_cage.task import RowTask
from captum_cage.text import Span, decode, read_tokens
from captum_cage.units import FIXED, Unit, Units

__all__ = [
    "Contrast",
    "Foils",
    "contrast_row",
    "contrasts",
    "ending_with",
    "same_draws",
    "tokens_of",
]

# Tokens in whose context the text of a foil is read.
_CONTEXT = 8
# Texts after which a tokenizer encodes what goes on without a space.
_LEADS = ("\n", "a")
_PLACES = "Pass the position of a generated unit, a text in it, or a pattern."

FoilText: TypeAlias = int | str | Sequence[int] | Tensor
"""A foil, as text or as ids."""
Foils: TypeAlias = Mapping[Any, FoilText]
"""Foils by their places, see :meth:`~captum_cage.GraphContextAttribution.attribute`."""


@dataclass(frozen=True)
class Contrast:
    """A stretch of generated tokens and the foil that could stand in its place.

    Attributes:
        step (int): the step in which the stretch begins.
        start (int): its first token after the prompt.
        stop (int): the token after its last.
        ids (tuple[int, ...]): ids of the foil.
        foil (Foil): the same as texts.
    """

    step: int
    start: int
    stop: int
    ids: tuple[int, ...]
    foil: Foil


def tokens_of(task: RowTask, key: Any, where: str) -> tuple[int, int]:
    """The tokens after the prompt that a position or a text means.

    Args:
        task (RowTask): what is explained.
        key: position of a generated unit (negative ones count from the end), or a text
            or pattern in the generated text, whose last occurrence counts.
        where (str): the argument's name.

    Returns:
        tuple[int, int]: the first token, and the one after the last.

    Raises:
        TypeError: if it is neither.
        ValueError: if there is no such unit or text, or the text reaches beyond what
            the model wrote at once.
    """
    return _place(task, key, where)[0]


def _place(task: RowTask, key: Any, where: str) -> tuple[tuple[int, int], Span]:
    """The tokens that a position or a text means, and its visible characters."""
    text = task.generated_text.text
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        count = len(task.written)
        remedy = f"There are {count} generated units."
        place = whole_number(where, key, minimum=-count, stop=count, remedy=remedy)
        start, stop = task.range_of(int(task.written[place]))
        return (start, stop), _visible(text, _characters(task, start, stop))
    if not isinstance(key, str) and not hasattr(key, "finditer"):
        raise TypeError(
            complaint(
                where,
                "must name a place in the generated text",
                f"{shown(key)} came",
                _PLACES,
            )
        )
    steps = [task.steps.units[step] for step in task.written]
    span = _visible(text, find_span(key, text, steps, where=where, forms=_PLACES))
    written = np.isin(task.steps.groups, task.written)
    chosen = [
        token
        for token, (start, stop) in enumerate(task.generated_text.offsets)
        if written[token] and text[max(start, span[0]) : min(stop, span[1])].strip()
    ]
    if not chosen:
        raise ValueError(
            complaint(
                where,
                f"the text {text[slice(*span)]!r} must be generated",
                "no generated token covers it",
                "Pass a text that the model wrote.",
            )
        )
    start, stop = chosen[0], chosen[-1] + 1
    if not written[start:stop].all():
        raise ValueError(
            complaint(
                where,
                "a text must be what the model wrote at once",
                f"{text[slice(*span)]!r} came, part of which is from outside",
                "Pass a text of one turn.",
            )
        )
    return (start, stop), span


def _characters(task: RowTask, start: int, stop: int) -> Span:
    """Range of generated tokens in the generated text."""
    offsets = task.generated_text.offsets
    return offsets[start][0], offsets[stop - 1][1]


def _visible(text: str, span: Span) -> Span:
    """A range without the white space around it; all of it where it is nothing else."""
    inside = text[slice(*span)]
    if not inside.strip():
        return span
    return span[1] - len(inside.lstrip()), span[0] + len(inside.rstrip())


def contrasts(task: RowTask, foils: Any) -> tuple[Contrast, ...]:
    """The stretches and their foils, in reading order, checked.

    What stretch and foil begin with alike is left out of both.

    Raises:
        TypeError: if ``foils`` is no mapping, or a foil neither text nor ids.
        ValueError: if a place or a foil is not as it must be, two foils are about one
            unit, or the base method has rows that do not depend on what was written.
    """
    if not isinstance(foils, Mapping) or not foils:
        raise TypeError(
            complaint(
                "foil",
                "must be a mapping from a place to what might stand there",
                f"{shown(foils)} came",
                'Pass {"7": "9"} to ask why it is 7 and not 9.',
            )
        )
    _check_method(task)
    found = [_contrast(task, key, foil) for key, foil in foils.items()]
    found.sort(key=lambda contrast: contrast.start)
    for one, other in pairwise(found):
        if one.step == other.step or other.start < one.stop:
            raise ValueError(
                complaint(
                    "foil",
                    "a generated unit must have one foil",
                    f"{one.foil} and {other.foil} came",
                    "Ask twice, or use smaller units.",
                )
            )
    for one in found:
        check_task(ending_with(task, one, one.ids))
    return tuple(found)


def _check_method(task: RowTask) -> None:
    method = task.llm_attr.attr_method
    declared = capability_of(type(task.llm_attr.attr_method))
    depends = declared is None or declared.depends_on_target
    if not getattr(method, "depends_on_target", depends):
        raise ValueError(
            complaint(
                "foil",
                "the base method's rows must depend on what was written",
                f"those of {base_method(task.llm_attr)} are the same for every token "
                "that might stand there, so the difference is zero",
                "Use a method that attributes a probability or a logit, such as "
                "FeatureAblation or AttnLRP.",
            )
        )


def _contrast(task: RowTask, key: Any, foil: Any) -> Contrast:
    (start, stop), span = _place(task, key, "foil")
    ids = _foil_ids(task, (start, stop), span, foil)
    target = list(task.generated[start:stop])
    if ids == target:
        raise ValueError(
            complaint(
                "foil",
                "must differ from what was written",
                f"{decode(ids, task.llm_attr.tokenizer)!r} came for {key!r}",
                "Pass another text; result.alternatives() lists candidates.",
            )
        )
    short = min(len(ids), len(target))
    if ids[:short] == target[:short]:
        raise ValueError(
            complaint(
                "foil",
                "must differ from what was written before either of them ends",
                f"{foil!r} came for {key!r}, and one is the beginning of the other",
                "Add what follows the shorter one, such as a full stop.",
            )
        )
    same = 0
    while same < min(len(ids), len(target)) - 1 and ids[same] == target[same]:
        same += 1
    start += same
    step = int(task.steps.groups[start])
    unit = int(np.searchsorted(task.written, step))
    written = task.generated_text.text[slice(*_characters(task, start, stop))]
    shown_foil = _read(task, start, ids[same:])
    return Contrast(
        step, start, stop, tuple(ids[same:]), Foil(unit, written, shown_foil)
    )


def _read(task: RowTask, start: int, ids: Sequence[int]) -> str:
    """Text of ids after the tokens before them."""
    before = [*task.prompt.ids, *task.generated[:start]][-_CONTEXT:]
    text = read_tokens([*before, *ids], task.llm_attr.tokenizer)
    return text.split(len(before))[1].text


def _foil_ids(
    task: RowTask, tokens: tuple[int, int], span: Span, foil: Any
) -> list[int]:
    """Ids of a foil in the place of some tokens, or, as a text, of some characters."""
    if isinstance(foil, str):
        if not foil.strip():
            raise ValueError(
                complaint(
                    "foil",
                    "must have a visible character",
                    f"{foil!r} came",
                    "Pass what might stand there.",
                )
            )
        text = task.generated_text.text
        begin, end = _characters(task, *tokens)
        before, after = text[begin : span[0]], text[span[1] : end]
        # The white space that was written stays, unless the foil has its own.
        if foil[0].isspace() and not before.strip():
            before = ""
        if foil[-1].isspace() and not after.strip():
            after = ""
        ids = _encoded(task, tokens[0], before + foil + after)
    elif isinstance(foil, int | np.integer) and not isinstance(foil, bool):
        ids = [int(foil)]
    else:
        ids = token_ids("foil", foil)
    if not ids:
        raise ValueError("foil: must have a token, but it is empty. Pass some ids.")
    try:
        whole = [*task.generated[: tokens[0]], *ids]
        check_sequence(task.llm_attr, task.prompt.ids, whole)
    except ValueError as error:
        raise ValueError(f"foil: cannot stand after this text. {error}") from error
    return ids


def _encoded(task: RowTask, start: int, wanted: str) -> list[int]:
    """Ids that read as a text in its place; else as the tokenizer has it alone."""
    tokenizer = task.llm_attr.tokenizer

    def encoded(text: str) -> list[int]:
        check_unicode("foil", text)
        return token_ids("foil", tokenizer.encode(text, add_special_tokens=False))

    found = [encoded(wanted)]
    for lead in _LEADS:  # as some tokenizers put a space in front of every text
        first, both = encoded(lead), encoded(lead + wanted)
        if both[: len(first)] == first:
            found.append(both[len(first) :])
    fitting = (ids for ids in found if ids and _read(task, start, ids) == wanted)
    return next(fitting, found[0])


def contrast_row(
    task: RowTask,
    contrast: Contrast,
    strategy: StrategyName,
    told: set[str],
    plain: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.float64]:
    """Row of what was written less that of the foil.

    Both are scored after the same text. Tokens of the same unit before them are present
    and fixed. A random method draws the same samples for both.

    Args:
        task (RowTask): what is explained.
        contrast (Contrast): the stretch and its foil.
        strategy (str): how the two rows are computed.
        told (set[str]): reasons for the loop that were logged already.
        plain (numpy.ndarray, optional): the raw row of the unit in which the stretch
            begins, which is not computed again where the stretch is that unit and the
            method is not random. Default: None

    Returns:
        numpy.ndarray: raw row, shape ``(N,)``, zero from the stretch on.
    """
    is_unit = task.range_of(contrast.step) == (contrast.start, contrast.stop)
    draws = is_random(type(task.llm_attr.attr_method), task.prompt.inp)
    written = task.generated[contrast.start : contrast.stop]

    def row(ids: Sequence[int]) -> npt.NDArray[np.float64]:
        found = np.zeros(task.width)
        asked = Strategy(ending_with(task, contrast, ids), strategy, told)
        one = asked.row(contrast.step)
        found[: len(one) - 1] = one[:-1]
        return found

    if plain is not None and is_unit and not draws:
        return plain - row(contrast.ids)
    with same_draws(task.llm_attr):
        target = row(written)
    return target - row(contrast.ids)


@contextmanager
def same_draws(llm_attr: LLMAttributionObject) -> Iterator[None]:
    """Random numbers that are drawn inside are drawn once more afterwards.

    Args:
        llm_attr: the wrapped object, on whose device they are drawn.
    """
    device = torch.device(llm_attr.device)
    # Captum's methods use NumPy's, its baselines Python's.
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(of_numpy)  # noqa: NPY002
            random.setstate(of_python)


def ending_with(task: RowTask, contrast: Contrast, ids: Sequence[int]) -> RowTask:
    """The task up to the stretch, with these ids as its last unit.

    Args:
        task (RowTask): what is explained.
        contrast (Contrast): the stretch.
        ids (Sequence[int]): what stands in its place.
    """
    groups = task.steps.groups[: contrast.start]
    groups = np.where(groups < contrast.step, groups, FIXED)
    groups = np.concatenate([groups, np.full(len(ids), contrast.step)])
    last = Unit(decode(ids, task.llm_attr.tokenizer), True, None)
    generated = (*task.generated[: contrast.start], *ids)
    return replace(
        task,
        generated=generated,
        generated_text=read_tokens(generated, task.llm_attr.tokenizer),
        steps=Units((*task.steps.units[: contrast.step], last), groups),
        kept={},
        show_progress=False,
    )
