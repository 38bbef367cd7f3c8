"""Inputs in which generated text alternates with text from outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from captum_cage._checks import complaint, legible, shown
from captum_cage.inputs import (
    Continuation,
    Features,
    RenderedChat,
    TokenIdsInput,
    checked_messages,
    chosen_messages,
    message_at,
    no_content,
    token_ids,
)
from captum_cage.text import Span, TokenText, decode, read_tokens, special_ids

__all__ = ["ChatTraceInput", "TraceIdsInput"]

_IDS = "token_ids"  # of a generated message: what the model wrote, as ids
# Where servers put what a model wrote besides the content.
_BESIDE = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


class TraceIdsInput(TokenIdsInput):
    """A trace as token ids: generated stretches, and text from outside around them.

    Generated tokens have rows; those from outside are sources wherever they stand, so
    that a late step can be explained by what a tool returned between two others. As a
    Captum input it is the part before the first generated token, and
    :class:`GraphContextAttribution` goes on from there: ``target`` is what the model
    wrote after the whole trace, and may be left out if the trace ends with generated
    text.

    Args:
        ids (Sequence[int] or Tensor): token ids of the whole trace.
        tokenizer: the tokenizer of the ids; used for labels only.
        generated (Sequence[bool] or Tensor): which tokens the model wrote.
        feature_mask (Sequence[bool] or Tensor, optional): which tokens are part of a
            unit; the others are present and not attributed. Default: all
        breaks (Sequence[int], optional): tokens before which a unit must end, besides
            those where generated text begins or ends. Default: ``()``
        baselines (int or str, optional): the id or token that stands for an absent
            token of the prompt. Default: ``0``, as in Captum

    Raises:
        TypeError: if the ids are no whole numbers, or a mask has no booleans.
        ValueError: if nothing is generated or nothing stands before it, or a mask does
            not fit.

    Example:
        >>> from captum_cage.demo import load_demo
        >>> _, tokenizer = load_demo()
        >>> ids = tokenizer("Ana has 3 pens. Mia has 4 pens.").input_ids
        >>> inp = TraceIdsInput(ids, tokenizer, [4 < i < 8 for i in range(len(ids))])
        >>> inp.values, inp.continuation.text.text
        (['Ana', ' has', ' 3', ' pens', '.'], ' Mia has 4 pens.')
    """

    def __init__(
        self,
        ids: Sequence[int] | Tensor,
        tokenizer: Any,
        generated: Sequence[bool] | Tensor | npt.NDArray[np.bool_],
        feature_mask: Sequence[bool] | Tensor | npt.NDArray[np.bool_] | None = None,
        breaks: Sequence[int] = (),
        baselines: int | str = 0,
    ) -> None:
        listed = token_ids("ids", ids)
        written = _booleans("generated", generated, len(listed))
        attributed = np.ones(len(listed), dtype=bool)
        if feature_mask is not None:
            attributed = _booleans("feature_mask", feature_mask, len(listed))
        text = read_tokens(listed, tokenizer)
        places = sorted({int(place) for place in breaks})
        self._fill_trace(
            listed, text, tokenizer, written, attributed, places, baselines
        )

    def _fill_trace(
        self,
        ids: list[int],
        text: TokenText,
        tokenizer: Any,
        generated: npt.NDArray[np.bool_],
        attributed: npt.NDArray[np.bool_],
        breaks: Sequence[int],
        baselines: int | str,
    ) -> None:
        """Set all fields; ``breaks`` are tokens before which a unit ends."""
        first = int(np.argmax(generated)) if generated.any() else len(ids)
        if not 0 < first < len(ids):
            raise ValueError(
                complaint(
                    "generated",
                    "a trace must have generated tokens, and others before them",
                    "none was generated"
                    if first
                    else "the first token is generated already",
                    "Mark what the model wrote; use TokenIdsInput or ChatTokenInput "
                    "for a prompt alone.",
                )
            )
        if not isinstance(baselines, int | str | np.integer):
            raise TypeError(
                complaint(
                    "baselines",
                    "must be one id or token for the whole trace",
                    f"{type(baselines).__name__} came",
                    "Pass the id, for example tokenizer.eos_token_id.",
                )
            )
        # Where generated text begins or ends, a unit does.
        turns = np.flatnonzero(np.diff(generated.astype(int))) + 1
        ends = [
            text.offsets[place][0]
            for place in sorted({*breaks, *turns.tolist()})
            if 0 < place < len(ids)
        ]
        before, after = text.split(first)
        cut = len(before.text)
        self._segments = tuple((end, end) for end in ends if end <= cut)
        self._continuation = Continuation(
            tuple(ids[first:]),
            after,
            generated[first:],
            attributed[first:] | generated[first:],
            tuple(end - cut for end in ends if end > cut),
            bool(generated[-1]),
        )
        self.set_tokens(ids[:first], tokenizer, attributed[:first], baselines)
        self.set_text(before)

    @property
    def segments(self) -> tuple[Span, ...]:
        """Character ranges of the prompt that no unit reaches across."""
        return self._segments

    @property
    def continuation(self) -> Continuation:
        """Generated stretches and the text between them, from the first one on."""
        return self._continuation


class ChatTraceInput(TraceIdsInput):
    """A conversation or an agent's trace, through the tokenizer's own chat template.

    Generated turns are what the model wrote and have rows; other messages (system,
    user, tool results, retrieved documents) are sources wherever they stand. Role
    headers are present and not attributed. The template is applied once.

    Args:
        messages (Sequence[Mapping]): messages as ``apply_chat_template`` takes them, in
            the order in which they came. A generated one may have ``"token_ids"``, the
            very ids that the model wrote: then its text is not tokenised again.
        tokenizer: a fast tokenizer with a chat template.
        generated (str or Collection[str] or Callable, optional): which messages the
            model wrote: a role, several, or a function from a message to bool.
            Default: ``"assistant"``
        features (str or Collection[str] or Callable, optional): whose content is
            attributed, of the other messages, in the same forms. Default: ``"all"``
        baselines (int or str, optional): as in :class:`TraceIdsInput`. Default: ``0``
        **template_args: for ``apply_chat_template``, such as ``tools``.
            ``add_generation_prompt`` is true where the last message is not generated:
            the model then writes the next turn.

    Raises:
        TypeError: if there are no messages, or an argument is of the wrong kind.
        ValueError: if the tokenizer has no chat template or no character offsets, no
            message is generated, none stands before it, or the template does not show
            a content as it is.

    Example:
        >>> from captum_cage.demo import load_demo
        >>> _, tokenizer = load_demo()
        >>> messages = [
        ...     {"role": "user", "content": "Ana has 3 pens."},
        ...     {"role": "assistant", "content": "Mia has 4 pens."},
        ...     {"role": "user", "content": "Leo has 5 cups."},
        ... ]
        >>> inp = ChatTraceInput(messages, tokenizer)
        >>> inp.values
        ['Ana', ' has', ' 3', ' pens', '.']
        >>> inp.continuation.ends_generated
        False
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        generated: Features = "assistant",
        features: Features = "all",
        baselines: int | str = 0,
        **template_args: Any,
    ) -> None:
        copies = checked_messages(messages)
        wrote = [message.pop(_IDS, None) for message in copies]
        written = chosen_messages(copies, generated, "generated")
        others = [m for m, w in zip(copies, written, strict=True) if not w]
        if not others:
            raise ValueError(
                complaint(
                    "messages",
                    "a trace must have a message that the model did not write",
                    f"generated={legible(generated)} chose all of them",
                    "Pass the system or user message that it began with, too.",
                )
            )
        attributed = iter(chosen_messages(others, features))
        chosen = [w or next(attributed) for w in written]
        template_args.setdefault("add_generation_prompt", not written[-1])
        for number, ids in enumerate(wrote):
            plain = isinstance(copies[number].get("content"), str)
            if ids is not None and not (written[number] and plain):
                raise ValueError(
                    complaint(
                        f"messages[{number}]",
                        f"only a generated message whose content is a text may have "
                        f"{_IDS!r}",
                        f"the role {copies[number]['role']!r} came",
                        "Leave them out, or name its role in generated=.",
                    )
                )
        for number, message in enumerate(copies):
            if written[number]:
                _check_all_in_content(number, message)
        chat = RenderedChat.of(copies, tokenizer, chosen, template_args)
        _check_contents(chat, copies, written, chosen, wrote)
        if any(ids is not None for ids in wrote):
            chat = _with_ids(chat, wrote, tokenizer)
        message_of = chat.message_of_token
        if written[-1] and not template_args["add_generation_prompt"]:
            # What the template writes after the last turn is of no use to anything.
            message_of = message_of[: np.flatnonzero(message_of >= 0)[-1] + 1]
        count = len(message_of)
        model_wrote = np.array([*written, False])[message_of]
        if not model_wrote.any():
            raise no_content(generated)
        breaks = np.flatnonzero(np.diff(message_of)) + 1
        self.messages = copies
        self.message_of_token = message_of
        self._fill_trace(
            list(chat.ids[:count]),
            TokenText(
                chat.text.text[: chat.text.offsets[count - 1][1]],
                chat.text.offsets[:count],
            ),
            tokenizer,
            model_wrote,
            message_of >= 0,
            breaks.tolist(),
            baselines,
        )


def _check_all_in_content(number: int, message: Mapping[str, Any]) -> None:
    """Refuse what a model wrote outside the content, which would be fixed text."""
    hidden = [name for name in _BESIDE if message.get(name)]
    if hidden:
        raise ValueError(
            complaint(
                f"messages[{number}]",
                "what the model wrote must stand in its content",
                f"{', '.join(hidden)} came, which the template writes as fixed text",
                "Write it into the content as the model did, or use TraceIdsInput.",
            )
        )


def _check_contents(
    chat: RenderedChat,
    messages: Sequence[Mapping[str, Any]],
    written: Sequence[bool],
    chosen: Sequence[bool],
    wrote: Sequence[Any],
) -> None:
    """Refuse chosen messages that are not shown, where that would change the question.

    Raises:
        ValueError: if the last turn was generated and has no text, ids came for a turn
            without any, a chosen content is no text, or no source stands before the
            first generated turn.
    """
    shown_messages = {number for number, _ in chat.contents}
    for number, message in enumerate(messages):
        if number in shown_messages:
            continue
        is_last = number == len(messages) - 1 and written[number]
        is_text = isinstance(message.get("content"), str | list | tuple | None)
        if is_last or wrote[number] is not None or (chosen[number] and not is_text):
            raise ValueError(
                complaint(
                    f"messages[{number}]",
                    "must have visible text as its content",
                    f"{shown(message.get('content'))} came",
                    "Write what the model wrote or what came back as text, or leave "
                    "the message out.",
                )
            )
    turns = [number for number in shown_messages if written[number]]
    sources = [number for number in shown_messages if not written[number]]
    if turns and sources and min(sources) > min(turns):
        raise ValueError(
            complaint(
                "features",
                "must choose a message before the first generated one, too",
                "none was chosen there",
                "Pass features='all', or a function that also takes the first message.",
            )
        )


def _booleans(where: str, mask: Any, count: int) -> npt.NDArray[np.bool_]:
    array = np.asarray(mask)
    if array.dtype != bool:
        raise TypeError(
            complaint(
                where,
                "must be booleans",
                f"values of type {array.dtype} came",
                "Pass one boolean for each token.",
            )
        )
    if array.shape != (count,):
        raise ValueError(
            complaint(
                where,
                f"must have one entry for each of the {count} tokens",
                f"shape {array.shape} came",
                "Pass one boolean for each token.",
            )
        )
    return array.copy()


def _with_ids(chat: RenderedChat, wrote: Sequence[Any], tokenizer: Any) -> RenderedChat:
    """The chat with the ids that the model wrote in the place of their text."""
    text = chat.text.text
    ids: list[int] = []
    numbers: list[int] = []
    offsets: list[Span] = []
    done = 0  # characters that have their tokens

    def tokenise(start: int, stop: int) -> None:
        if start < stop:
            encoded = tokenizer(
                text[start:stop], add_special_tokens=False, return_offsets_mapping=True
            )
            ids.extend(encoded["input_ids"])
            offsets.extend((a + start, b + start) for a, b in encoded["offset_mapping"])

    def take_until(stop: int) -> None:
        """Tokens of text that the model did not write, as they are in the whole."""
        inside = [
            place
            for place, (a, b) in enumerate(chat.text.offsets)
            if done <= a and b <= stop and a < stop
        ]
        first = len(offsets)
        if inside:
            tokenise(done, chat.text.offsets[inside[0]][0])
            ids.extend(chat.ids[place] for place in inside)
            offsets.extend(chat.text.offsets[place] for place in inside)
            tokenise(max(chat.text.offsets[place][1] for place in inside), stop)
        else:
            tokenise(done, stop)
        new = offsets[first:]
        numbers.extend(message_at(text, span, chat.contents) for span in new)

    for number, (start, stop) in chat.contents:
        if wrote[number] is None:
            continue
        given = _without_end(token_ids(f"messages[{number}]", wrote[number]), tokenizer)
        reads = read_tokens(given, tokenizer)
        core = reads.text.strip()
        if not core or text[start:stop] != core:
            raise ValueError(
                complaint(
                    f"messages[{number}]",
                    f"its {_IDS!r} must be those of its content {text[start:stop]!r}",
                    f"they read {decode(given, tokenizer)!r}",
                    "Pass the content as the tokenizer decodes the ids.",
                )
            )
        # The white space around it stands there, unless the template trims.
        shift = start - reads.text.index(core)
        end = shift + len(reads.text)
        begin = shift if text[shift:start] == reads.text[: start - shift] else start
        stop = end if text[stop:end] == reads.text[stop - shift :] else stop
        take_until(begin)
        ids.extend(given)
        offsets.extend(
            (min(max(a + shift, begin), stop), min(max(b + shift, begin), stop))
            for a, b in reads.offsets
        )
        numbers.extend([number] * len(given))
        done = stop
    take_until(len(text))
    return RenderedChat(
        tuple(ids),
        TokenText(text, tuple(offsets)),
        chat.contents,
        np.array(numbers, dtype=np.int64),
    )


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Ids without the special tokens at their end, which the template writes."""
    special = special_ids(tokenizer)
    while ids and ids[-1] in special:
        ids = ids[:-1]
    return ids
