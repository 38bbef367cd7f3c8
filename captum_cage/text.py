"""The text of tokens, and where its words and sentences begin and end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, TypeAlias

import sentencex

__all__ = [
    "Span",
    "TokenText",
    "decode",
    "read_tokens",
    "sentence_spans",
    "special_ids",
    "word_spans",
]

Span: TypeAlias = tuple[int, int]

# A character is at most four UTF-8 bytes, so at most four tokens share it.
_LONGEST_CHARACTER = 4
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class TokenText:
    """The text of a token sequence and the characters that each token stands for.

    Attributes:
        text (str): the text of all tokens.
        offsets (tuple[tuple[int, int], ...]): character range of each token in
            ``text``. Tokens that are pieces of one character share its range.
    """

    text: str
    offsets: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def labels(self) -> list[str]:
        """Readable text of each token.

        A token that is a piece of a character is labelled by the character and by the
        piece's number, as in ``"😀[1/3]"``.
        """
        labels: list[str] = []
        for first, last in _shared(self.offsets):
            text = self.text[slice(*self.offsets[first])]
            if last - first == 1:
                labels.append(text)
            else:
                count = last - first
                labels.extend(f"{text}[{i + 1}/{count}]" for i in range(count))
        return labels

    def split(self, position: int) -> tuple[TokenText, TokenText]:
        """The tokens before ``position`` and those from it on, as texts of their own.

        A character whose pieces stand on both sides goes to the right side, where it
        is completed; the pieces on the left then have no text.
        """
        cut = len(self.text) if position >= len(self) else self.offsets[position][0]
        left = tuple((min(a, cut), min(b, cut)) for a, b in self.offsets[:position])
        right = tuple((a - cut, b - cut) for a, b in self.offsets[position:])
        return TokenText(self.text[:cut], left), TokenText(self.text[cut:], right)


def _shared(offsets: Sequence[Span]) -> Iterator[tuple[int, int]]:
    """Runs ``[first, last)`` of tokens with the same non-empty range."""
    first = 0
    for i in range(1, len(offsets) + 1):
        end = i == len(offsets)
        if end or offsets[i] != offsets[first] or offsets[i][0] == offsets[i][1]:
            yield first, i
            first = i


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """Text of the ids, special tokens included, nothing tidied up."""
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


def read_tokens(ids: Sequence[int], tokenizer: Any) -> TokenText:
    """Text of a token sequence with the exact range of each token.

    The text is read token by token, in the context of the tokens just before, so it
    needs no offsets from the tokenizer and never tokenises anything.

    Args:
        ids (Sequence[int]): token ids.
        tokenizer: the tokenizer of the ids.

    Returns:
        TokenText: one range per id.
    """
    ids = list(ids)
    text: list[str] = []
    offsets: list[Span] = []
    length = 0
    context = 0  # tokens[context:done] are decoded along with the ones to be read
    done = 0
    before = ""
    i = 0
    while i < len(ids):
        now = decode(ids[context : i + 1], tokenizer)
        waiting = i + 1 - done
        if now.endswith(_REPLACEMENT):
            if waiting < _LONGEST_CHARACTER and i + 1 < len(ids):
                i += 1
                continue
            # No character came of these bytes: they are read one by one.
            now = decode(ids[context : done + 1], tokenizer)
            waiting = 1
        piece = now[len(commonprefix([before, now])) :]
        offsets.extend([(length, length + len(piece))] * waiting)
        text.append(piece)
        length += len(piece)
        context, done = done, done + waiting
        before = decode(ids[context:done], tokenizer)
        i = done
    return TokenText("".join(text), tuple(offsets))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokenizer's special tokens; the unknown token is a token like others."""
    ids = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids.update(i for i, token in added.items() if getattr(token, "special", False))
    ids.discard(getattr(tokenizer, "unk_token_id", None))
    eos, unknown = (getattr(tokenizer, f"{k}_token_id", None) for k in ("eos", "unk"))
    if eos is not None and eos == unknown:  # GPT-2 has one token for both
        ids.add(eos)
    return frozenset(ids)


# --- words -------------------------------------------------------------------------

# Scripts that put no space between words: each character is a unit.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana, Han
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}][\u0300-\u036f\u0e31\u0e34-\u0e3a]*|[^\s{_UNSPACED}]+")


def word_spans(text: str) -> list[Span]:
    """Ranges of the words of a text.

    A word is a run of characters without white space, punctuation included. Scripts
    that do not put spaces between words give one unit per character.

    Example:
        >>> word_spans("It is 3.5.")
        [(0, 2), (3, 5), (6, 10)]
    """
    return [match.span() for match in _WORD.finditer(text)]


# --- sentences ---------------------------------------------------------------------

_LINE = re.compile(r"[^\r\n\u2028\u2029]+")
_FENCE = re.compile(r"\s*(```|~~~)")
_CODE = re.compile(r"(?: {4,}|\t)|.*[;{}]\s*$")
_BULLET = re.compile(r"\s*(?:[-*+•‣–—]|\(?(?:\d{1,3}|[A-Za-z])[.)])\s+(?=\S)")
_FINISHED = re.compile(r".*[.!?:;…。！？：；|][\"'”’)\]*_]*\s*$")
_WRAPPED = 50  # characters: a shorter line was not cut by a margin
_SURROGATE = re.compile("[\ud800-\udfff]")


def sentence_spans(text: str, language: str = "en") -> list[Span]:
    """Ranges of the sentences of a text, without white space around them.

    A line ends a sentence, unless it is long and the next goes on in lower case, as in
    prose wrapped at a margin. Items of a list are sentences, and so is every line of code (fenced,
    indented by four, or ending in ``;``, ``{`` or ``}``). Within a line, the library
    sentencex decides, which knows abbreviations and decimal points.

    Args:
        text (str): the text.
        language (str, optional): its language, as an ISO 639-1 code. Default: ``"en"``

    Example:
        >>> text = "It costs 3.5, e.g. for you. Why?"
        >>> [text[a:b] for a, b in sentence_spans(text)]
        ['It costs 3.5, e.g. for you.', 'Why?']
    """
    spans: list[Span] = []
    for start, stop, prose in _blocks(text):
        if prose:
            spans.extend(_split_prose(text, start, stop, language))
        else:
            spans.append((start, stop))
    return [span for span in (_trim(text, *span) for span in spans) if span]


def _blocks(text: str) -> Iterator[tuple[int, int, bool]]:
    """Ranges of lines or wrapped lines, and whether each is prose."""
    fenced = False
    open_block: list[int] | None = None
    last_line = ""
    for match in _LINE.finditer(text):
        line = match.group()
        if not line.strip():
            continue
        fence = _FENCE.match(line) is not None
        bullet = _BULLET.match(line) is not None
        code = fenced or fence or (_CODE.match(line) is not None and not bullet)
        if open_block is not None:
            between = text[open_block[1] : match.start()]
            wrapped = (
                not code
                and not bullet
                and line.lstrip()[0].islower()
                and len(last_line) >= _WRAPPED
                and not _FINISHED.match(last_line)
                and between.replace("\r\n", "\n").count("\n") == 1
            )
            if wrapped:
                open_block[1] = match.end()
                last_line = line
                continue
            yield open_block[0], open_block[1], True
            open_block = None
        if code:
            yield match.start(), match.end(), False
            fenced ^= fence
        else:
            open_block = [match.start(), match.end()]
            last_line = line
    if open_block is not None:
        yield open_block[0], open_block[1], True


def _split_prose(text: str, start: int, stop: int, language: str) -> Iterator[Span]:
    bullet = _BULLET.match(text, start, stop)
    body = bullet.end() if bullet else start
    # Same length, so that ranges stay: sentencex takes no lone surrogates.
    block = _SURROGATE.sub(_REPLACEMENT, text[body:stop])
    block = block.replace("\n", " ").replace("\r", " ")
    for number, found in enumerate(sentencex.get_sentence_boundaries(language, block)):
        first = start if number == 0 else body + int(found["start_index"])
        yield first, body + int(found["end_index"])


def _trim(text: str, start: int, stop: int) -> Span | None:
    inside = text[start:stop]
    if not inside.strip():
        return None
    return stop - len(inside.lstrip()), start + len(inside.rstrip())


def shifted(spans: Iterable[Span], by: int) -> list[Span]:
    """The ranges moved by a number of characters."""
    return [(start + by, stop + by) for start, stop in spans]
