"""The text of tokens, and where its words and sentences begin and end."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sentencex

__all__ = [
    "Span",
    "TokenText",
    "decode",
    "harmless",
    "message_spans",
    "percent",
    "read_tokens",
    "sentence_spans",
    "special_ids",
    "unpaired",
    "word_spans",
]

Span: TypeAlias = tuple[int, int]
"""A range of characters, without its end."""

# A character has at most four UTF-8 bytes, so at most three tokens complete one.
_COMPLETING = 3
_REPLACEMENT = "\ufffd"
_PAIR = re.compile("(?<=[\ud800-\udbff])[\udc00-\udfff]")


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
    needs no offsets from the tokenizer and never tokenises anything. Bytes that are no
    character are shown as ``"\ufffd"``.

    Args:
        ids (Sequence[int]): token ids.
        tokenizer: the tokenizer of the ids.

    Returns:
        TokenText: one range per id.
    """
    ids = list(ids)
    text = ""
    offsets: list[Span] = []
    context = 0  # the tokens from here on are decoded along with those to be read
    while len(offsets) < len(ids):
        done = len(offsets)
        piece, count = _next_piece(ids, context, done, tokenizer)
        if piece:
            offsets.extend([(len(text), len(text) + len(piece))] * count)
            text += piece
            context = done
        else:
            # No text of its own: nothing at all, or more bytes of what is no character.
            empty = (len(text), len(text))
            offsets.append(offsets[-1] if text.endswith(_REPLACEMENT) else empty)
            context = max(context, done - _COMPLETING)
    return TokenText(text, tuple(offsets))


def _next_piece(
    ids: list[int], context: int, done: int, tokenizer: Any
) -> tuple[str, int]:
    """Text of the next token, or of the next ones that share a character; their number.

    Decoders with byte fallback turn a whole run of bytes into replacement characters
    if it has a broken character, so bytes after one need another try without it.
    """
    piece, count = _completed(ids, context, done, tokenizer)
    if piece.endswith(_REPLACEMENT) and count == 1:
        alone, more = _completed(ids, done, done, tokenizer)
        if more > 1:
            return alone, more
    return piece, count


def _completed(
    ids: list[int], context: int, done: int, tokenizer: Any
) -> tuple[str, int]:
    """Text of the next token, with the tokens after it that complete its character."""
    stop = done + 1
    piece = _continuation(ids[context:done], ids[done:stop], tokenizer)
    while piece.endswith(_REPLACEMENT):
        for end in range(stop + 1, min(stop + _COMPLETING, len(ids)) + 1):
            longer = _continuation(ids[context:done], ids[done:end], tokenizer)
            if not longer.startswith(piece):
                piece, stop = longer, end
                break
        else:
            break
    return piece, stop - done


def _continuation(context: list[int], ids: list[int], tokenizer: Any) -> str:
    """The text that ids add to the text of those before them."""
    before, now = decode(context, tokenizer), decode([*context, *ids], tokenizer)
    return now[len(before) :] if now.startswith(before) else decode(ids, tokenizer)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokenizer's special tokens; the unknown token is not one of them."""
    ids = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids.update(i for i, token in added.items() if getattr(token, "special", False))
    ids.discard(getattr(tokenizer, "unk_token_id", None))
    eos, unknown = (getattr(tokenizer, f"{k}_token_id", None) for k in ("eos", "unk"))
    if eos is not None and eos == unknown:  # GPT-2 has one token for both
        ids.add(eos)
    return frozenset(ids)


# White space as it stands, and the joiners that scripts and emoji are written with.
_LAYOUT = "\n\t"
_JOINERS = "\u200c\u200d"
# Letters and marks that are blank, by which a text could hide something.
_BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"


def harmless(text: str, *, one_line: bool = False) -> str:
    r"""A text in which no character can steer a terminal or hide.

    Control and format characters, bidirectional ones among them, lone surrogates and
    blank letters are written as Python escapes. Newlines and tabs stay.

    Args:
        text (str): any text.
        one_line (bool, optional): escape newlines and tabs too. Default: ``False``

    Example:
        >>> print(harmless("\x1b[31mred\r\n[bold]"))
        \x1b[31mred
        [bold]
    """
    kept = _JOINERS if one_line else _LAYOUT + _JOINERS
    return "".join(
        character
        if character in kept
        or not (
            character in _BLANK
            or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        )
        else character.encode("unicode_escape").decode("ascii")
        for character in (text if one_line else text.replace("\r\n", "\n"))
    )


def unpaired(text: str) -> str:
    r"""A text in which no two surrogates make a pair, of the same length.

    JSON has no form for two halves side by side that are not one character. The second
    one becomes ``"\ufffd"``.

    Args:
        text (str): any text.

    Example:
        >>> ascii(unpaired("\ud83d\ude00")), ascii(unpaired("\ud83d."))
        ("'\\ud83d\\ufffd'", "'\\ud83d.'")
    """
    return text if text.isascii() else _PAIR.sub(_REPLACEMENT, text)


def percent(share: float, signed: bool = False, *, digits: int = 0) -> str:
    """A share in percent; with its sign where there are two.

    Example:
        >>> percent(0.256), percent(0.256, True, digits=1), percent(-0.0001)
        ('26%', '+25.6%', '0%')
    """
    rounded = round(100 * float(share), digits) + 0.0  # no negative zero
    sign = "+" if signed and rounded else ""
    return f"{rounded:{sign}.{digits}f}%"


# --- words -------------------------------------------------------------------------

# Scripts that put no space between words: each character is a unit, with its marks.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana, Han
    "\U00020000-\U0003ffff"
)
_MARKS = (
    "\u0300-\u036f\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef\u3099\u309a"
    "\u0e31\u0e33-\u0e3a\u0e47-\u0e4e"  # Thai
    "\u0eb1\u0eb3-\u0ebc\u0ec8-\u0ece"  # Lao
    "\u102b-\u103e\u1056-\u1059\u105e-\u1060\u1062-\u1064\u1067-\u106d"  # Myanmar
    "\u1071-\u1074\u1082-\u108d\u108f\u109a-\u109d"
    "\u17b4-\u17d3\u17dd"  # Khmer
)
# After these signs of Myanmar and Khmer, a letter is written below the one before.
_STACKED = rf"(?<=[\u1039\u17d2])[{_UNSPACED}]"
_WORD = re.compile(rf"[{_UNSPACED}](?:[{_MARKS}]|{_STACKED})*|[^\s{_UNSPACED}]+")


def word_spans(text: str) -> list[Span]:
    """Ranges of the words of a text.

    A word is a run of characters without white space, punctuation included. Scripts
    that do not put spaces between words give one unit per character.

    Example:
        >>> word_spans("It is 3.5.")
        [(0, 2), (3, 5), (6, 10)]
    """
    return [match.span() for match in _WORD.finditer(text)]


def message_spans(text: str) -> list[Span]:
    """A whole message of a chat, without the white space around it.

    Units end where a message of a chat does, so that each message is one unit.

    Example:
        >>> message_spans(" It is 3. Is it? ")
        [(1, 16)]
    """
    start = len(text) - len(text.lstrip())
    stop = len(text.rstrip())
    return [(start, stop)] if start < stop else []


# --- sentences ---------------------------------------------------------------------

_LINE = re.compile(r"[^\r\n\u2028\u2029]+")
_FENCE = re.compile(r"\s*(?:```[^`]*|~~~.*)$")
_CODE = re.compile(r"(?: {4,}|\t)|.*[;{}]\s*$")
_BULLET = re.compile(
    r"\s*(?:[-*+•‣–—]|\(?(?:\d{1,3}|[ivxIVX]{1,4}|[A-Za-z])[.)])\s+(?=\S)"
)
_FINISHED = re.compile(r".*[.!?:;…。！？：；|][\"'”’)\]*_]*\s*$")
# Of a line with more characters or full stops than this, so many characters are looked
# at together, and so many of them again.
_LONG, _MANY, _PIECE, _AGAIN = 50_000, 4000, 20_000, 4000
_STOP = re.compile("[.!?\u061f\u06d4\u0964\u1362\u3002\uff01\uff0e\uff1f\uff61]")
_WRAPPED = 50  # characters: a shorter line was not cut by a margin
_SURROGATE = re.compile("[\ud800-\udfff]")
# Quotes, brackets and Markdown's emphasis
_CLOSING = re.compile(r"(?<!\s)[\"'”’»)\]*_]+(?=\s|$)")


def sentence_spans(text: str, language: str = "en") -> list[Span]:
    """Ranges of the sentences of a text, without white space around them.

    A line ends a sentence, unless it is long and the next goes on in lower case, as in
    prose wrapped at a margin. Items of a list are sentences, and so is every line of
    code (fenced, indented by four, or ending in ``;``, ``{`` or ``}``). Within a line,
    the library sentencex decides, which knows abbreviations and decimal points.

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
    first = start
    for end in _ends(block, language):
        closing = _CLOSING.match(block, end)
        last = max(first, body + (closing.end() if closing else end))
        yield first, last
        first = last


def _ends(block: str, language: str) -> Iterator[int]:
    """Ends of the sentences of a line.

    sentencex takes the square of their number, and of that of quotes, so that a very
    long line is looked at piece by piece. What ends a piece may be half a quotation: it
    is looked at again.
    """
    start, size = 0, len(block)
    if len(block) > _LONG or len(_STOP.findall(block)) > _MANY:
        size = _PIECE
    while start < len(block):
        found = sentencex.get_sentence_boundaries(language, block[start : start + size])
        ends = [start + int(one["end_index"]) for one in found]
        if start + size >= len(block):
            yield from ends
            return
        sure = [end for end in ends if end <= start + size - _AGAIN]
        yield from sure
        start = sure[-1] if sure else start + size - _AGAIN


def _trim(text: str, start: int, stop: int) -> Span | None:
    inside = text[start:stop]
    if not inside.strip():
        return None
    return stop - len(inside.lstrip()), start + len(inside.rstrip())


def shifted(spans: Iterable[Span], by: int) -> list[Span]:
    """The ranges moved by a number of characters."""
    return [(start + by, stop + by) for start, stop in spans]
