"""Which part of a generated text is thinking, and which is the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from operator import index
from typing import Any, TypeAlias

from captum_cage._checks import complaint, shown
from captum_cage.text import Span, special_ids

__all__ = ["MARKERS", "Part", "Think", "Thinking"]


class Part(Enum):
    """A part of what a reasoning model wrote.

    ``explain=Part.ANSWER`` asks for the answer, ``result.share_through(Part.THINK)``
    for the share of it that came through the thoughts.
    """

    THINK = "think"
    ANSWER = "answer"


Think: TypeAlias = str | tuple[str, str] | tuple[int, int] | Sequence[Span] | None
"""Where the thoughts stand.

See :meth:`~captum_cage.GraphContextAttribution.attribute`.
"""

MARKERS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
)
"""Where thinking begins and ends in the formats that are known.

These are those of Qwen, DeepSeek and others; Mistral; Cohere; the channels of gpt-oss;
and others.
"""

_FINAL = "<|channel|>final<|message|>"  # where the answer begins in such channels
_ANY_END = "<|end|>"  # which ends messages of every channel


@dataclass(frozen=True)
class Thinking:
    """Where the parts stand in a generated text.

    Attributes:
        spans (dict): character ranges of each part, in reading order; none of a part
            that is not there.
        breaks (tuple[int, ...]): characters at which a part or a marker begins or ends,
            so that no unit reaches across.
    """

    spans: dict[Part, tuple[Span, ...]]
    breaks: tuple[int, ...] = ()

    @classmethod
    def none(cls) -> Thinking:
        """Of a text in which nothing is marked."""
        return cls({Part.THINK: (), Part.ANSWER: ()})

    @classmethod
    def found(
        cls, text: str, turns: Sequence[Span], before: str, tokenizer: Any, think: Any
    ) -> Thinking:
        """The parts of a text.

        Args:
            text (str): all that follows the prompt.
            turns (Sequence[tuple[int, int]]): ranges in it that the model wrote.
            before (str): the prompt, whose end may open the first thought.
            tokenizer: its tokenizer, whose vocabulary or chat template has the markers.
            think: ``"auto"`` for the tokenizer's own markers; a pair of markers; the
                range or ranges of the thoughts; None for no thinking.

        Raises:
            TypeError: if ``think`` is none of these.
            ValueError: if a range does not lie in the text, or markers are no markers.
        """
        if think is None:
            return cls.none()
        special = _special_texts(tokenizer)
        if think == "auto":
            pairs = [pair for pair in MARKERS if _knows(tokenizer, pair)]
            found = [cls._marked(text, turns, pair, before, special) for pair in pairs]
            ends = (before + text[: turns[-1][0]]).rstrip()
            return next(
                (
                    one
                    for one, (_, closing) in zip(found, pairs, strict=True)
                    # Templates close a thought that there is not to be.
                    if one.breaks or ends.endswith(closing)
                ),
                cls.none(),
            )
        if isinstance(think, Sequence) and not isinstance(think, str) and think:
            if len(think) == 2 and all(isinstance(mark, str) for mark in think):
                pair = _checked(str(think[0]), str(think[1]))
                return cls._marked(text, turns, pair, before, special)
            return cls._given(text, turns, think, special)
        raise TypeError(
            complaint(
                "think",
                "must be 'auto', a pair of markers, ranges of the generated text, or "
                "None",
                f"{shown(think)} came",
                'Pass ("<think>", "</think>"), or the range (start, stop).',
            )
        )

    @classmethod
    def _marked(
        cls,
        text: str,
        turns: Sequence[Span],
        pair: tuple[str, str],
        before: str,
        special: Sequence[str],
    ) -> Thinking:
        found = []
        for turn in turns:
            opened = (before + text[: turn[0]]).rstrip().endswith(pair[0])
            found.append((turn, _thoughts(text, turn, pair, opened)))
        thoughts = [inner for _, pieces in found for _, inner in pieces]
        breaks = {
            end for _, pieces in found for piece in pieces for end in sum(piece, ())
        }
        (start, stop), pieces = found[-1]
        if pieces:
            start = pieces[-1][0][1]
        final = text.find(_FINAL, start, stop) if pair[1] == _ANY_END else -1
        if final >= 0:
            start = final + len(_FINAL)
            breaks |= {final, start}
        visible = tuple(span for span in thoughts if text[slice(*span)].strip())
        answer = _answer(text, start, stop, special)
        return cls({Part.THINK: visible, Part.ANSWER: answer}, tuple(sorted(breaks)))

    @classmethod
    def _given(
        cls, text: str, turns: Sequence[Span], think: Any, special: Sequence[str]
    ) -> Thinking:
        listed = [think] if hasattr(think[0], "__index__") else list(think)
        spans: list[Span] = []
        for span in listed:
            try:
                start, stop = (index(end) for end in span)
            except (TypeError, ValueError):
                start, stop = 0, 0
            if not 0 <= start < stop <= len(text):
                raise ValueError(
                    complaint(
                        "think",
                        f"a range must lie in the {len(text)} characters that follow "
                        "the prompt",
                        f"{shown(span)} came",
                        "Pass (start, stop) with 0 <= start < stop.",
                    )
                )
            spans.append((start, stop))
        spans.sort()
        first, last = turns[-1]
        first = max(first, *(stop for _, stop in spans))
        breaks = {end for span in spans for end in span}
        return cls(
            {
                Part.THINK: tuple(spans),
                Part.ANSWER: _answer(text, first, last, special),
            },
            tuple(sorted(breaks)),
        )


def _checked(opening: str, closing: str) -> tuple[str, str]:
    """Markers that tell where a thought begins and where it ends."""
    if not opening.strip() or not closing.strip() or opening == closing:
        raise ValueError(
            complaint(
                "think",
                "markers must be two different texts",
                f"{(opening, closing)} came",
                'Pass ("<think>", "</think>"), say.',
            )
        )
    return opening, closing


def _thoughts(
    text: str, turn: Span, pair: tuple[str, str], opened: bool
) -> list[tuple[Span, Span]]:
    """Range of each thought of a turn, with its markers and without.

    A thought may have thoughts inside. One that has more opening markers than closing
    ones, as it speaks of them, ends at the last that closes.
    """
    start, stop = turn
    longer_first = sorted(pair, key=len, reverse=True)
    either = re.compile("|".join(map(re.escape, longer_first)))
    marks = [
        (match.group() == pair[0], *match.span())
        for match in either.finditer(text, start, stop)
    ]
    if marks and marks[0][0]:
        # What the prompt's end opened may be opened once more.
        opened = opened and bool(text[start : marks[0][1]].strip())
    elif marks:
        opened = opened or pair[1] != _ANY_END
    found: list[tuple[Span, Span]] = []
    depth, begin, first = int(opened), start, start
    closed: Span | None = None
    for is_opening, here, there in marks:
        if is_opening:
            if depth == 0:
                begin, first, closed = here, there, None
            elif not text[first:here].strip():
                first = there  # the same marker twice
            depth += 1
        elif depth > 0:
            depth -= 1
            again = closed is not None and not text[closed[1] : here].strip()
            closed = (closed[0] if closed and again else here, there)
            if depth == 0:
                found.append(((begin, there), (first, closed[0])))
        elif found and not text[found[-1][0][1] : here].strip():
            found[-1] = ((found[-1][0][0], there), found[-1][1])
    if depth > 0:
        inner, outer = closed or (stop, stop)
        found.append(((begin, outer), (first, inner)))
    return found


def _answer(
    text: str, start: int, stop: int, special: Sequence[str]
) -> tuple[Span, ...]:
    """A range without special tokens at its ends, if anything is visible in it."""
    left = ""
    while start < stop and left != text[start:stop]:
        left = text[start:stop]
        start, stop = stop - len(left.lstrip()), start + len(left.rstrip())
        for token in special:
            if text.startswith(token, start, stop):
                start += len(token)
            elif text.endswith(token, start, stop):
                stop -= len(token)
    return ((start, stop),) if start < stop else ()


def _special_texts(tokenizer: Any) -> list[str]:
    """Texts of the special tokens, such as the end of a turn."""
    texts = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    return [text for text in texts if text]


def _knows(tokenizer: Any, pair: tuple[str, str]) -> bool:
    """Whether both markers are a tokenizer's own."""
    added: Any = getattr(tokenizer, "get_added_vocab", dict)()
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = "".join(map(str, template.values()))
    return all(mark in added or mark in (template or "") for mark in pair)
