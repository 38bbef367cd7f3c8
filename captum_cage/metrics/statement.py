"""Whether a text that was written again still says what is explained."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from captum_cage._checks import complaint, shown

__all__ = ["Predicate", "Statement", "whole"]

Predicate: TypeAlias = str | re.Pattern[str] | Callable[[str], Any]
"""What a text must have, match or fulfil to say what is explained."""


class Statement:
    r"""What must come out again for a text to count as having reached it.

    Args:
        predicate (str or re.Pattern or Callable, optional): a text that must occur; a
            pattern that must be found and, where it has groups, whose last match must
            have the groups that it has in the text explained (the number in
            ``\boxed{(.*?)}``); or a function of the text. What the function gives is
            taken as it is if it is a ``bool``, or a ``float`` in [0, 1]; anything else,
            such as a number or the name of a class, must be what it gives for the text
            explained. Default: the explained texts themselves, as they are
        text (str): the generated text that is explained.
        explained (Sequence[str], optional): the explained stretches of it.

    Raises:
        TypeError: if the predicate is none of these.
        ValueError: if it does not hold of the text explained.

    Example:
        >>> text = "She has 3 + 4 = 7 pens. The answer is 7."
        >>> Statement(None, text, ["The answer is 7."])("The answer is 7.")
        1.0
        >>> Statement(re.compile(r"answer is (\d+)"), text)("So the answer is 9.")
        0.0
    """

    def __init__(
        self, predicate: Predicate | None, text: str, explained: Sequence[str] = ()
    ) -> None:
        self._wanted: Any = None
        self._inside: frozenset[str] = frozenset()
        self._joined = False
        self._pieces: tuple[str, ...] = ()
        if predicate is None:
            self._pieces = tuple(piece.strip() for piece in explained if piece.strip())
            # A token may be a part of a word, and is looked for as such.
            self._inside = frozenset(p for p in self._pieces if not _occurs(p, text))
            self._reached = self._has_pieces
        elif isinstance(predicate, str):
            self._pieces = (predicate,) if predicate.strip() else ()
            # Where words are not set apart, as in Chinese or in "18kg".
            self._joined = not all(_occurs(piece, text) for piece in self._pieces)
            self._reached = self._has_pieces
        elif isinstance(predicate, re.Pattern):
            self._pattern = predicate
            self._wanted = self._found(text)
            self._reached = self._matches
        elif callable(predicate):
            self._function = predicate
            self._wanted = _plain(predicate(text))
            self._reached = self._agrees
        else:
            raise TypeError(
                complaint(
                    "statement",
                    "must be a text, a compiled pattern, or a function of a text",
                    f"{shown(predicate)} came",
                    "Leave it out for the explained text itself.",
                )
            )
        self.description = _described(predicate, self._pieces)
        if predicate is None and not self._pieces:
            raise ValueError(
                complaint(
                    "statement",
                    "must be something that can come out again",
                    "what is explained is white space or special tokens alone",
                    "Pass statement=, or ask for metrics of the text as it stands, "
                    "such as 'span: deletion'.",
                )
            )
        if not self(text) > 0.0:
            raise ValueError(
                complaint(
                    "statement",
                    "must hold of the text that is explained",
                    f"{self.description} does not. It ends with {text[-160:]!r}",
                    "Pass what that text says.",
                )
            )

    def __call__(self, text: str) -> float:
        """1 if the text reaches it, 0 if not, or how much it does."""
        return self._reached(text)

    def _has_pieces(self, text: str) -> float:
        return float(
            bool(self._pieces)
            and all(
                piece in text
                if piece in self._inside
                else _occurs(piece, text, joined=self._joined)
                for piece in self._pieces
            )
        )

    def _found(self, text: str) -> Any:
        matches = list(self._pattern.finditer(text))
        if not matches:
            return None
        return matches[-1].groups() or True

    def _matches(self, text: str) -> float:
        found = self._found(text)
        return float(found is not None and found == self._wanted)

    def _agrees(self, text: str) -> float:
        found = _plain(self._function(text))
        if isinstance(found, bool):
            return float(found)
        if isinstance(found, float):
            if not 0.0 <= found <= 1.0:
                raise ValueError(
                    complaint(
                        "statement",
                        "a function that gives floats must give them in [0, 1]",
                        f"{found} came",
                        "Return a bool, a probability, or what the text says.",
                    )
                )
            return float(found)
        return float(found is not None and found == self._wanted)


def _plain(found: Any) -> Any:
    """A Python value for an array or a tensor without dimensions."""
    return found.item() if getattr(found, "ndim", None) == 0 else found


def whole(piece: str, *, joined: bool = False) -> re.Pattern[str]:
    """Finds a text as it is, not as a part of a longer word, number or fraction.

    Args:
        piece (str): the text.
        joined (bool, optional): it may be a part of a longer word. Default: ``False``
    """
    start = r"(?<!\w)" if piece[:1].isalnum() and not joined else ""
    stop = r"(?!\w)" if piece[-1:].isalnum() and not joined else ""
    if piece[:1].isdigit():
        start += r"(?<!\d)"
        start += r"(?<!\d[.,/])(?<![-\u2212])"
    if re.search(r"\d[.,]?$", piece):  # "is 7." does not occur in "is 7.5"
        stop += r"(?![.,/]?\d)"
    return re.compile(start + re.escape(piece) + stop)


def _occurs(piece: str, text: str, *, joined: bool = False) -> bool:
    return whole(piece, joined=joined).search(text) is not None


def _described(predicate: Predicate | None, pieces: Sequence[str]) -> str:
    if isinstance(predicate, re.Pattern):
        return f"the pattern /{predicate.pattern}/"
    if callable(predicate):
        name = getattr(predicate, "__name__", type(predicate).__name__)
        return f"the function {name}"
    return " and ".join(repr(piece) for piece in pieces) or "an empty text"
