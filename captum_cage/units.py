"""What a node of the graph is: a token, word, sentence or span, made of tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import index
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from captum_cage._checks import complaint, legible
from captum_cage.text import (
    Span,
    TokenText,
    message_spans,
    sentence_spans,
    shifted,
    word_spans,
)

__all__ = [
    "Granularity",
    "Segments",
    "Unit",
    "Units",
    "group_tokens",
    "split_ranges",
    "split_units",
]

Segments: TypeAlias = Callable[[str], Iterable[Span]]
"""Gives the character range of each unit of a text."""
Granularity: TypeAlias = str | Segments | Sequence[Span] | Mapping[str, object]
"""What a unit is, see :meth:`~captum_cage.GraphContextAttribution.attribute`."""

NAMED: dict[str, Segments] = {
    "word": word_spans,
    "sentence": sentence_spans,
    "message": message_spans,
}
FIXED = -1  # group of a token that is not attributed
_SIDES = ("source", "generated")


@dataclass(frozen=True)
class Unit:
    """A node of the graph.

    Attributes:
        text (str): readable text.
        generated (bool): whether the model wrote it.
        span (tuple[int, int] or None): character range in the source text or in the
            generated text; None for a source that is no range of the text, such as a
            part of an image.
        special (bool): whether it is a special token, such as the end of a turn.
    """

    text: str
    generated: bool
    span: Span | None
    special: bool = False

    def __post_init__(self) -> None:
        # NumPy's values are none of JSON or GraphML.
        plain = {
            "text": str(self.text),
            "generated": bool(self.generated),
            "special": bool(self.special),
        }
        if self.span is not None:
            start, stop = self.span
            plain["span"] = (index(start), index(stop))
        for name, value in plain.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Units:
    """The units of one side, source or generated, and the tokens they are made of.

    Attributes:
        units (tuple[Unit, ...]): in reading order.
        groups (numpy.ndarray): unit of each token (or of each feature of an input that
            is not made of tokens), int64; -1 for what is not attributed.
    """

    units: tuple[Unit, ...]
    groups: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.units)

    def members(self, unit: int) -> npt.NDArray[np.intp]:
        """Positions of the tokens of a unit, ascending."""
        return np.flatnonzero(self.groups == unit)


def split_units(units: Granularity) -> dict[str, Any]:
    """The granularity of each side, checked.

    Args:
        units: ``"token"``, ``"word"``, ``"sentence"``, ``"message"``, a function from
            text to character ranges, character ranges in the whole text, or a mapping
            with one of these for ``"source"`` and for ``"generated"`` (ranges then
            count within that side's text).

    Returns:
        dict: one entry for ``"source"``, ``"generated"`` and ``"both"``. Ranges in the
        whole text stand under ``"both"``; None elsewhere.

    Raises:
        TypeError: if ``units`` is nothing of the above.
        ValueError: if a name or a side is unknown, or ranges overlap or are empty.
    """
    if isinstance(units, Mapping):
        unknown = [side for side in units if side not in _SIDES]
        if unknown or not units:
            raise ValueError(
                f"units: a mapping must have the keys 'source' and 'generated', not "
                f"{list(units)}. Pass one granularity for each."
            )
        sides = {side: _checked(units.get(side, "token"), side) for side in _SIDES}
        return {**sides, "both": None}
    checked = _checked(units, "units")
    if isinstance(checked, list):
        return {"source": None, "generated": None, "both": checked}
    return {"source": checked, "generated": checked, "both": None}


def split_ranges(ranges: Sequence[Span], cut: int) -> tuple[list[Span], list[Span]]:
    """Ranges in the whole text, as ranges in the source and in the generated text.

    Raises:
        ValueError: if a range reaches across the end of the prompt.
    """
    for start, stop in ranges:
        if start < cut < stop:
            raise ValueError(
                complaint(
                    "units",
                    f"a range must not reach across the end of the prompt, at {cut}",
                    f"({start}, {stop}) came",
                    "Cut it in two.",
                )
            )
    left = [(start, stop) for start, stop in ranges if stop <= cut]
    right = [(start - cut, stop - cut) for start, stop in ranges if start >= cut]
    return left, right


def _checked(units: object, side: str) -> str | Segments | list[Span]:
    where = "units" if side == "units" else f"units[{side!r}]"
    if isinstance(units, str):
        if units != "token" and units not in NAMED:
            names = ", ".join(repr(name) for name in ("token", *NAMED))
            raise ValueError(
                f"{where}: must be one of {names}, not {units!r}. For other units pass "
                "a function from a text to character ranges, or the ranges themselves."
            )
        return units
    if callable(units):
        return units
    if isinstance(units, Iterable):
        return _ranges(units, where)
    raise TypeError(
        f"{where}: must be a name, a function from a text to character ranges, or "
        f"character ranges, not {type(units).__name__}. Pass 'token', 'word' or "
        "'sentence' if in doubt."
    )


def _ranges(found: Iterable[object], where: str) -> list[Span]:
    """Character ranges, checked and sorted."""
    spans: list[Span] = []
    for item in found:
        try:
            start, stop = (_position(end) for end in item)  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            raise TypeError(
                f"{where}: a range must be a pair (start, stop) of characters, not "
                f"{legible(item)}. Pass pairs of integers."
            ) from None
        if not 0 <= start < stop:
            raise ValueError(
                f"{where}: the range ({start}, {stop}) is empty or begins before the "
                "text. Pass ranges with 0 <= start < stop."
            )
        spans.append((start, stop))
    spans.sort()
    for (_, end), (start, stop) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"{where}: the range ({start}, {stop}) begins before the one ahead of "
                f"it ends, at {end}. Pass ranges that do not overlap."
            )
    return spans


def _position(end: object) -> int:
    if isinstance(end, bool | np.bool_):
        raise TypeError
    return index(end)  # type: ignore[arg-type]


def group_tokens(
    tokens: TokenText,
    units: str | Segments | Sequence[Span],
    *,
    generated: bool,
    attributed: npt.NDArray[np.bool_] | None = None,
    special: npt.NDArray[np.bool_] | None = None,
    breaks: Sequence[int] = (),
) -> Units:
    """Group the tokens of a text into units.

    A token belongs to the range in which its first visible character lies. Tokens of
    white space go with the token before, or with the one after where that is special,
    not attributed or beyond a break. Special tokens are units of their own, and text
    that no range covers makes units of its own, so that nothing is lost. Ranges that
    you give may cover special tokens and breaks.

    Args:
        tokens (TokenText): the text and the range of each token.
        units: a granularity; a function is called once for each stretch of text
            between special tokens and breaks.
        generated (bool): whether the model wrote this text.
        attributed (numpy.ndarray, optional): which tokens are attributed, bool.
            Default: all
        special (numpy.ndarray, optional): which tokens are special, bool.
            Default: none
        breaks (Sequence[int], optional): characters at which a unit must end.
            Default: ``()``

    Returns:
        Units: the units in reading order.

    Raises:
        TypeError: if a function returns something else than ranges.
        ValueError: if a range lies outside the text or covers no attributed token, or a
            function returns ranges that overlap.
    """
    count = len(tokens)
    if attributed is None:
        attributed = np.ones(count, dtype=bool)
    if special is None:
        special = np.zeros(count, dtype=bool)
    side = "generated" if generated else "source"
    if isinstance(units, str) and units == "token":
        return _token_units(tokens, attributed, special, generated)
    given = not isinstance(units, str) and not callable(units)
    if given:
        spans = _ranges(units, "units")  # type: ignore[arg-type]
        _check_end(spans, len(tokens.text), f"the {side} text")
    else:
        segment = NAMED[units] if isinstance(units, str) else units
        spans = _segmented(tokens, segment, special, breaks)  # type: ignore[arg-type]

    keys = _keys(tokens, spans, attributed, special, breaks)
    if given:
        covered = {key for key, chosen in zip(keys, attributed, strict=True) if chosen}
        missed = [span for i, span in enumerate(spans) if i not in covered]
        if missed:
            text = tokens.text[slice(*missed[0])]
            raise ValueError(
                f"units: the range {missed[0]}, {text!r}, covers no whole token of the "
                f"{side} text that is attributed. Widen it to where a token begins."
            )
    return _numbered(tokens, keys, attributed, special, generated)


def _check_end(spans: Sequence[Span], length: int, what: str) -> None:
    if spans and spans[-1][1] > length:
        raise ValueError(
            f"units: the range {spans[-1]} ends after {what}, which has {length} "
            "characters. Pass ranges within the text."
        )


def _token_units(
    tokens: TokenText,
    attributed: npt.NDArray[np.bool_],
    special: npt.NDArray[np.bool_],
    generated: bool,
) -> Units:
    groups = np.where(attributed, np.cumsum(attributed) - 1, FIXED).astype(np.int64)
    labels = tokens.labels()
    units = tuple(
        Unit(labels[i], generated, tokens.offsets[i], bool(special[i]))
        for i in np.flatnonzero(attributed)
    )
    return Units(units, groups)


def _segmented(
    tokens: TokenText,
    segment: Segments,
    special: npt.NDArray[np.bool_],
    breaks: Sequence[int],
) -> list[Span]:
    """Ranges that the function finds between special tokens and breaks."""
    alone = {tokens.offsets[i] for i in np.flatnonzero(special)}
    cuts = {0, len(tokens.text), *breaks, *chain.from_iterable(alone)}
    ends = sorted(cut for cut in cuts if 0 <= cut <= len(tokens.text))
    spans: list[Span] = []
    for start, stop in pairwise(ends):
        if (start, stop) not in alone:
            found = _ranges(segment(tokens.text[start:stop]), "units")
            _check_end(found, stop - start, "the stretch of text it was found in")
            spans.extend(shifted(found, start))
    return spans


def _keys(
    tokens: TokenText,
    spans: Sequence[Span],
    attributed: npt.NDArray[np.bool_],
    special: npt.NDArray[np.bool_],
    breaks: Sequence[int],
) -> list[int]:
    """Number of each token's range; below zero, of a stretch that no range covers."""
    count = len(tokens)
    keys: list[int | None] = [None] * count
    sections: list[int] = []  # how many breaks stand before each token
    alone: set[int] = set()  # keys of special tokens
    passed = 0  # ranges that end before the token
    stretch = -1
    section = 0
    ends = sorted(breaks)
    for i, (start, stop) in enumerate(tokens.offsets):
        visible = stop - len(tokens.text[start:stop].lstrip())
        sections.append(bisect_right(ends, visible if visible < stop else start))
        if visible == stop and not special[i]:
            continue
        while passed < len(spans) and spans[passed][1] <= visible:
            passed += 1
            stretch -= 1
        if passed < len(spans) and spans[passed][0] <= visible < stop:
            keys[i] = passed
            continue
        if special[i] or stretch in alone or sections[i] > section:
            stretch -= 1
        if special[i]:
            alone.add(stretch)
        section = sections[i]
        keys[i] = stretch

    def joins(i: int, neighbour: int) -> bool:
        """Whether a token of white space goes with the one beside it."""
        return (
            0 <= neighbour < count
            and keys[neighbour] not in {None, *alone}
            and sections[i] == sections[neighbour]
            and bool(attributed[neighbour] or not attributed[i])
        )

    blank = [i for i in range(count) if keys[i] is None]
    for i in blank:
        if joins(i, i - 1):
            keys[i] = keys[i - 1]
    for i in reversed(blank):
        if keys[i] is None:
            stretch -= 1
            keys[i] = keys[i + 1] if joins(i, i + 1) else stretch
    return [key for key in keys if key is not None]


def _numbered(
    tokens: TokenText,
    keys: Sequence[int],
    attributed: npt.NDArray[np.bool_],
    special: npt.NDArray[np.bool_],
    generated: bool,
) -> Units:
    """Units from keys, in order of first appearance."""
    groups = np.full(len(keys), FIXED, dtype=np.int64)
    order: dict[int, int] = {}
    for i in np.flatnonzero(attributed).tolist():
        groups[i] = order.setdefault(keys[i], len(order))
    units = []
    for number in range(len(order)):
        members = np.flatnonzero(groups == number)
        start = tokens.offsets[members[0]][0]
        stop = max(tokens.offsets[i][1] for i in members)
        text = tokens.text[start:stop]
        if text.strip():
            stop -= len(text) - len(text.rstrip())
            start += len(text) - len(text.lstrip())
        alone = bool(special[members].all())
        units.append(Unit(tokens.text[start:stop], generated, (start, stop), alone))
    return Units(tuple(units), groups)
