"""Which generated units a question means: by index, slice, text or pattern."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TypeAlias

import numpy as np

from captum_cage._checks import complaint, legible, shown, whole_number
from captum_cage.text import Span
from captum_cage.thinking import Part, Thinking
from captum_cage.units import Unit

__all__ = ["Explain", "explained_units", "find_span"]

Explain: TypeAlias = int | slice | tuple[int, int] | str | re.Pattern[str] | Part | None
"""What to explain; None for all of it.

See :meth:`~captum_cage.GraphContextAttribution.attribute`.
"""

_FORMS = (
    "Pass a position, a slice or (start, stop) of generated units, a substring of the "
    "generated text, or a compiled regular expression."
)


def explained_units(
    explain: Explain,
    units: Sequence[Unit],
    text: str,
    thinking: Thinking | None = None,
) -> tuple[int, ...]:
    """Positions of the generated units that a question means.

    Args:
        explain: None for all units; an int (negative ones count from the end), a slice
            or ``(start, stop)`` of generated units; a substring of the generated text,
            whose *last* occurrence counts; or a compiled regular expression, whose last
            visible match counts. A text means every unit that shares a visible
            character with it. Or a ``Part``: all units of the thoughts or of the
            answer.
        units (Sequence[Unit]): the generated units.
        text (str): the generated text, which their ranges count in.
        thinking (Thinking, optional): where its parts stand. Default: None

    Returns:
        tuple[int, ...]: ascending positions, at least one.

    Raises:
        TypeError: if ``explain`` has none of these forms.
        ValueError: if it means no unit.
    """
    count = len(units)
    if explain is None:
        return tuple(range(count))
    if isinstance(explain, tuple):
        if len(explain) != 2:
            raise ValueError(
                complaint(
                    "explain",
                    "a tuple must be (start, stop)",
                    f"{legible(explain)} came",
                    _FORMS,
                )
            )
        explain = slice(*explain)
    if isinstance(explain, Part):
        return _part(explain, units, text, thinking or Thinking.none())
    if isinstance(explain, slice):
        return _sliced(explain, count)
    if isinstance(explain, str | re.Pattern):
        return _overlapping(find_span(explain, text, units), units, text)
    if isinstance(explain, int | np.integer) and not isinstance(explain, bool):
        position = whole_number(
            "explain",
            explain,
            minimum=-count,
            stop=count,
            remedy=f"There are {count} generated units.",
        )
        return (position % count,)
    raise TypeError(
        complaint(
            "explain", "must name generated units", f"{shown(explain)} came", _FORMS
        )
    )


def _part(
    part: Part, units: Sequence[Unit], text: str, thinking: Thinking
) -> tuple[int, ...]:
    spans = thinking.spans[part]
    if not spans:
        raise ValueError(
            complaint(
                "explain",
                f"{part} must be marked in the generated text",
                f"no {part.value} was found in {text[-80:]!r}",
                "Pass think= with the markers or the range of the thoughts.",
            )
        )
    chosen = {unit for span in spans for unit in _overlapping(span, units, text)}
    return tuple(sorted(chosen))


def _sliced(explain: slice, count: int) -> tuple[int, ...]:
    for end in (explain.start, explain.stop, explain.step):
        if not isinstance(end, int | np.integer | None) or isinstance(end, bool):
            raise TypeError(
                complaint(
                    "explain",
                    "the ends of a slice must be whole numbers",
                    f"{shown(end)} came",
                    _FORMS,
                )
            )
    if explain.step == 0:
        raise ValueError(
            complaint("explain", "the step of a slice must not be 0", "0 came", _FORMS)
        )
    chosen = tuple(sorted(range(count)[explain]))
    if not chosen:
        raise ValueError(
            complaint(
                "explain",
                "must mean at least one generated unit",
                f"{legible(explain)} of {count} units came",
                _FORMS,
            )
        )
    return chosen


def find_span(
    explain: str | re.Pattern[str],
    text: str,
    units: Sequence[Unit] = (),
    *,
    where: str = "explain",
    forms: str = _FORMS,
) -> Span:
    """Character range of the last occurrence of a text or pattern.

    Matches of a pattern that have no visible character do not count, such as those of
    ``[0-9]*`` between numbers. Where units are given, an occurrence that shares a
    visible character with one goes before those that do not, as in the text of a trace
    that also has turns from outside.

    Raises:
        TypeError: if the pattern is for bytes.
        ValueError: if it does not occur, or nothing of it is visible.
    """
    if isinstance(explain, re.Pattern):
        what = f"the pattern {explain.pattern!r}"
        if not isinstance(explain.pattern, str):
            raise TypeError(
                complaint(where, "must be a pattern for text", f"{what} came", forms)
            )
        matches = [match.span() for match in explain.finditer(text)]
        found: Iterator[Span] = reversed(matches)
    else:
        what = f"the text {_begin(explain)!r}"
        found = _from_the_end(explain, text)
    last = next(found, None)
    if last is None:
        raise ValueError(
            f"{where}: {what} does not occur in the generated text. It reads: "
            f"{_begin(text)!r}. {forms}"
        )
    visible = (s for s in chain([last], found) if text[slice(*s)].strip())
    first = (
        None
        if isinstance(explain, str) and not explain.strip()
        else next(visible, None)
    )
    if first is None:
        raise ValueError(
            complaint(
                where,
                f"{what} must stand for visible text",
                "an empty stretch came",
                forms,
            )
        )
    placed = [unit for unit in units if unit.span is not None]
    if not placed:
        return first
    shared = (s for s in chain([first], visible) if _shared_units(s, placed, text))
    return next(shared, first)


def _from_the_end(part: str, text: str) -> Iterator[Span]:
    """Where a text stands in another, the last place first; places may overlap."""
    start = text.rfind(part)
    while start >= 0:
        yield start, start + len(part)
        start = text.rfind(part, 0, start + len(part) - 1) if start + len(part) else -1


def _begin(text: str) -> str:
    """A text, or the begin of a long one."""
    return text if len(text) <= 80 else f"{text[:80]}..."


def _overlapping(span: Span, units: Sequence[Unit], text: str) -> tuple[int, ...]:
    """Units that share a visible character with the range, at least one."""
    chosen = _shared_units(span, units, text)
    if not chosen:
        raise ValueError(
            complaint(
                "explain",
                f"the text {text[slice(*span)]!r} must share a unit",
                "no generated unit covers it",
                _FORMS,
            )
        )
    return chosen


def _shared_units(span: Span, units: Sequence[Unit], text: str) -> tuple[int, ...]:
    chosen = []
    for position, unit in enumerate(units):
        if unit.span is not None:
            start, stop = max(unit.span[0], span[0]), min(unit.span[1], span[1])
            if text[start:stop].strip():
                chosen.append(position)
    return tuple(chosen)
