"""Which part of a generated text is thinking, and which is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

from captum_cage._checks import complaint, shown
from captum_cage.text import Span

__all__ = ["MARKERS", "Part", "Think", "Thinking"]


class Part(Enum):
    """A part of what a reasoning model wrote.

    ``explain=Part.ANSWER`` asks for the answer, ``result.share_through(Part.THINK)``
    for the share of it that came through the thoughts.
    """

    THINK = "think"
    ANSWER = "answer"


Think: TypeAlias = str | tuple[str, str] | tuple[int, int] | Sequence[Span] | None

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
"""Where thinking begins and ends, in the formats that are known: Qwen, DeepSeek and
others; Mistral; Cohere; the channels of gpt-oss; and others."""

_FINAL = "<|channel|>final<|message|>"  # where the answer begins in such channels


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
            ValueError: if a range does not lie in the text.
        """
        if think is None:
            return cls.none()
        if think == "auto":
            pairs = [pair for pair in MARKERS if _knows(tokenizer, pair)]
            found = [
                cls._marked(text, turns, pair, before.rstrip().endswith(pair[0]))
                for pair in pairs
            ]
            return next((one for one in found if one.breaks), cls.none())
        if isinstance(think, Sequence) and not isinstance(think, str) and think:
            if len(think) == 2 and all(isinstance(mark, str) for mark in think):
                pair = (str(think[0]), str(think[1]))
                opened = before.rstrip().endswith(pair[0])
                return cls._marked(text, turns, pair, opened)
            return cls._given(text, turns, think)
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
        cls, text: str, turns: Sequence[Span], pair: tuple[str, str], opened: bool
    ) -> Thinking:
        found = [
            (turn, _thoughts(text, turn, pair, opened and turn == turns[0]))
            for turn in turns
        ]
        thoughts = [inner for _, pieces in found for _, inner in pieces]
        breaks = {
            end for _, pieces in found for piece in pieces for end in sum(piece, ())
        }
        (start, stop), pieces = found[-1]
        if pieces:
            start = pieces[-1][0][1]
        final = text.find(_FINAL, start, stop)
        if final >= 0:
            start = final + len(_FINAL)
            breaks |= {final, start}
        visible = tuple(span for span in thoughts if text[slice(*span)].strip())
        answer = ((start, stop),) if text[start:stop].strip() else ()
        return cls({Part.THINK: visible, Part.ANSWER: answer}, tuple(sorted(breaks)))

    @classmethod
    def _given(cls, text: str, turns: Sequence[Span], think: Any) -> Thinking:
        listed = [think] if isinstance(think[0], int) else list(think)
        spans: list[Span] = []
        for span in listed:
            try:
                start, stop = (int(end) for end in span)
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
        last = turns[-1]
        answer = (max(last[0], spans[-1][1]), last[1])
        breaks = {end for span in (*spans, answer) for end in span}
        return cls(
            {
                Part.THINK: tuple(spans),
                Part.ANSWER: (answer,) if text[slice(*answer)].strip() else (),
            },
            tuple(sorted(breaks)),
        )


def _thoughts(
    text: str, turn: Span, pair: tuple[str, str], opened: bool
) -> list[tuple[Span, Span]]:
    """Range of each thought of a turn, with its markers and without."""
    opening, closing = pair
    place, stop = turn
    found: list[tuple[Span, Span]] = []
    while True:
        begin = text.find(opening, place, stop)
        end = text.find(closing, place, stop)
        if not found and (opened or end >= 0) and not 0 <= begin < max(end, 0):
            # The prompt's end opened it, as many chat templates do.
            begin = first = place
        elif begin >= 0:
            first = begin + len(opening)
        else:
            return found
        end = text.find(closing, first, stop)
        inner = (first, stop if end < 0 else end)
        place = stop if end < 0 else end + len(closing)
        found.append(((begin, place), inner))


def _knows(tokenizer: Any, pair: tuple[str, str]) -> bool:
    """Whether both markers are a tokenizer's own."""
    added: Any = getattr(tokenizer, "get_added_vocab", dict)()
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = "".join(map(str, template.values()))
    return all(mark in added or mark in (template or "") for mark in pair)
