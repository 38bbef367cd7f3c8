"""Interpretable inputs: token ids, chats, and a prompt followed by generated ids."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import InterpretableInput, TextTokenInput
from torch import Tensor

from captum_cage._checks import complaint, legible, shown, whole_number
from captum_cage.text import Span, TokenText, decode, read_tokens, special_ids
from captum_cage.units import FIXED

__all__ = [
    "ChatTokenInput",
    "Continuation",
    "Features",
    "PrefixedInput",
    "Prompt",
    "RenderedChat",
    "TokenIdsInput",
    "baseline_id",
    "checked_messages",
    "chosen_messages",
    "empty_prompt",
    "message_at",
    "no_content",
    "target_ids",
    "token_features",
    "token_ids",
]

Features: TypeAlias = str | Collection[str] | Callable[[Mapping[str, Any]], bool]
"""The messages that are attributed to, by their roles or by a function."""
ModelInput: TypeAlias = str | Tensor | dict[str, Any]
"""What a model is given."""

_TAG = "<[^<>]*>"  # such as those around thoughts
# Entries of a processor's output that have one number per token, and what a generated
# token gets there.
_IDS = 2**32  # tokenizers count them in so many
_PER_TOKEN = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}


def token_ids(where: str, ids: Any) -> list[int]:
    """Token ids as a list, from a list, an array or a tensor of one dimension.

    A batch of one sequence counts as that sequence.

    Raises:
        TypeError: if these are no whole numbers.
        ValueError: if there is more than one sequence, or an id is out of range.
    """
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(
            complaint(
                where,
                "must be a sequence of token ids",
                f"{shown(ids)} came",
                "Pass a sequence of ints, or a 1-D tensor of them.",
            )
        )
    values = list(values)
    if len(values) == 1 and isinstance(values[0], list | tuple):
        values = list(values[0])
    if any(isinstance(value, list | tuple) for value in values):
        raise ValueError(
            complaint(
                where,
                "must be the ids of one sequence",
                f"{len(values)} sequences came",
                "Pass one sequence of ids.",
            )
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(
                complaint(
                    where,
                    "must be token ids, which are whole numbers",
                    f"{shown(value)} came",
                    "Pass a sequence of ints, or a 1-D tensor of them.",
                )
            )
        if not 0 <= value < _IDS:
            raise ValueError(
                complaint(
                    where,
                    f"must be token ids below {_IDS}, 0 or more",
                    f"{value} came",
                    "Pass the ids that the tokenizer gave.",
                )
            )
    return [int(value) for value in values]


def target_ids(target: str | Sequence[int] | Tensor, tokenizer: Any) -> list[int]:
    """Ids of a generated text that is given.

    Args:
        target (str or Sequence[int] or Tensor): the text or its ids.
        tokenizer: encodes a text, as Captum does.

    Raises:
        TypeError: if it is neither text nor ids.
        ValueError: if it is empty, or no valid Unicode.
    """
    if isinstance(target, str):
        check_unicode("target", target)
        encoded = tokenizer.encode(target, add_special_tokens=False)
        ids = token_ids("target", encoded)
    elif isinstance(target, Sequence | Tensor | np.ndarray):
        ids = token_ids("target", target)
    else:
        raise TypeError(
            complaint(
                "target",
                "must be a text, token ids or None",
                f"{shown(target)} came",
                "Pass the generated text, its ids, or None to generate.",
            )
        )
    if not ids:
        raise ValueError(
            "target: must have a token, but it is empty. Pass the text to explain, "
            "or None to generate one."
        )
    return ids


@dataclass(frozen=True)
class Continuation:
    """What stands between a prompt and the text that is generated after it.

    In a trace, generated turns alternate with text from outside, such as the results
    of tools. The prompt ends where the first generated turn begins; this is the rest.

    Attributes:
        ids (tuple[int, ...]): token ids.
        text (TokenText): their text.
        generated (numpy.ndarray): which tokens the model wrote, bool.
        attributed (numpy.ndarray): which tokens are part of a unit, bool; the others
            are present and fixed.
        breaks (tuple[int, ...]): characters of the text at which a unit must end.
        ends_generated (bool): whether the trace ends with a generated turn, so that
            nothing is to be generated after it.
    """

    ids: tuple[int, ...]
    text: TokenText
    generated: npt.NDArray[np.bool_]
    attributed: npt.NDArray[np.bool_]
    breaks: tuple[int, ...]
    ends_generated: bool

    @property
    def all_breaks(self) -> tuple[int, ...]:
        """The breaks, and the end of the text, after which the model goes on."""
        return (*self.breaks, len(self.text.text))


class TokenIdsInput(TextTokenInput):
    """A prompt given as token ids; nothing is tokenised.

    Like Captum's ``TextTokenInput``, but the ids go in as they are, tokens can be
    grouped into features or left out of them, and each token may have a baseline of
    its own. Works wherever a ``TextTokenInput`` does, except that Captum's gradient
    methods, used without this package, attribute single tokens and take no groups.

    Args:
        ids (Sequence[int] or Tensor): token ids of the prompt, special tokens included.
        tokenizer: the tokenizer of the ids; used for labels only.
        feature_mask (Sequence[int] or Sequence[bool] or Tensor, optional): one entry
            per token. Booleans say which tokens are features. Integers give each token
            its feature, as in Captum: tokens of the same number are one feature, and
            negative ones are present but not attributed. Default: each token is a
            feature
        baselines (int or str or Sequence[int], optional): the id or token that stands
            for an absent token, or one id per token. Default: ``0``, as in Captum

    Raises:
        TypeError: if the ids are no whole numbers.
        ValueError: if there are no ids, or an argument's length is not theirs.

    Example:
        >>> from captum_cage.demo import load_demo
        >>> _, tokenizer = load_demo()
        >>> ids = tokenizer("Ana has 3 pens.").input_ids
        >>> inp = TokenIdsInput(ids, tokenizer, feature_mask=[0, 0, 1, 1, -1])
        >>> inp.n_itp_features, inp.values
        (2, ['Ana has', ' 3 pens'])
    """

    feature_of_token: npt.NDArray[np.int64]
    baseline_ids: Tensor
    token_text: TokenText

    def __init__(
        self,
        ids: Sequence[int] | Tensor,
        tokenizer: Any,
        feature_mask: Sequence[int] | Sequence[bool] | Tensor | None = None,
        baselines: int | str | Sequence[int] | Tensor = 0,
    ) -> None:
        listed = token_ids("ids", ids)
        if not listed:
            raise ValueError(
                complaint(
                    "ids",
                    "the prompt must have a token",
                    "no id came",
                    "Pass some ids.",
                )
            )
        self.set_tokens(listed, tokenizer, feature_mask, baselines)
        self.set_text(read_tokens(listed, tokenizer))

    @classmethod
    def unlabelled(
        cls,
        ids: Sequence[int],
        tokenizer: Any,
        feature_mask: Sequence[bool] | npt.NDArray[np.bool_],
        baselines: Sequence[int],
    ) -> TokenIdsInput:
        """The same without reading the tokens' text: ``values`` are empty strings."""
        inp = cls.__new__(cls)
        inp.set_tokens(list(ids), tokenizer, feature_mask, baselines)
        inp.values = [""] * inp.n_itp_features
        return inp

    def set_tokens(
        self, ids: list[int], tokenizer: Any, feature_mask: Any, baselines: Any
    ) -> None:
        """Set the fields that do not depend on text."""
        # TextTokenInput's own constructor would tokenise a text.
        feature_of_token = _feature_of_token(feature_mask, len(ids))
        is_feature = feature_of_token >= 0
        baseline_ids = _baseline_ids(baselines, len(ids), tokenizer)
        self.tokenizer = tokenizer
        self.skip_tokens = None
        self.feature_of_token = feature_of_token
        self.baseline_ids = baseline_ids
        self.inp_tensor = torch.tensor([ids])
        mask = torch.from_numpy(is_feature)[None]
        self.itp_mask = None if is_feature.all() else mask
        self.itp_tensor = self.inp_tensor[:, mask[0]]
        self.n_itp_features = int(feature_of_token.max(initial=-1)) + 1
        self.baselines = int(baseline_ids[0])

    def set_text(self, text: TokenText) -> None:
        """Set the text of the tokens, and the labels of the features."""
        self.token_text = text
        self.values = _feature_labels(text, self.feature_of_token, self.n_itp_features)

    @property
    def segments(self) -> tuple[Span, ...]:
        """Character ranges that no unit reaches across; empty where there are none."""
        return ()

    @property
    def continuation(self) -> Continuation | None:
        """What follows the prompt already, as in a trace; None where nothing does."""
        return None

    def to_tensor(self) -> Tensor:
        """Indicator of the features, all present. Shape ``(1, n_itp_features)``."""
        return torch.ones((1, self.n_itp_features), dtype=torch.long)

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> Tensor:
        """Ids with the tokens of absent features replaced by their baseline.

        Args:
            perturbed_tensor (Tensor, optional): indicator of the features, shape
                ``(B, n_itp_features)``; what is not 1 is absent. Default: all present

        Returns:
            Tensor: ids, shape ``(B, tokens)``.
        """
        if perturbed_tensor is None:
            return self.inp_tensor
        device = perturbed_tensor.device
        absent = perturbed_tensor != 1
        # One more column, which is the one that a token's feature -1 points to.
        absent = torch.cat([absent, absent.new_zeros((len(absent), 1))], dim=1)
        return torch.where(
            absent[:, torch.from_numpy(self.feature_of_token).to(device)],
            self.baseline_ids.to(device),
            self.inp_tensor.to(device),
        )


def _feature_of_token(mask: Any, tokens: int) -> npt.NDArray[np.int64]:
    """Feature of each token, numbered from 0 in ascending order; -1 for none."""
    if mask is None:
        return np.arange(tokens)
    array = np.asarray(mask)
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.shape != (tokens,):
        raise ValueError(
            complaint(
                "feature_mask",
                f"must have one entry for each of the {tokens} tokens",
                f"shape {array.shape} came",
                "Pass booleans, or integers with -1 for tokens that stay as they are.",
            )
        )
    if array.dtype == bool:
        return np.where(array, np.cumsum(array) - 1, FIXED).astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(
            complaint(
                "feature_mask",
                "must be booleans or integers",
                f"values of type {array.dtype} came",
                "Convert them first.",
            )
        )
    feature = np.full(tokens, FIXED, dtype=np.int64)
    chosen = array >= 0
    feature[chosen] = np.unique(array[chosen], return_inverse=True)[1]
    return feature


def _baseline_ids(baselines: Any, tokens: int, tokenizer: Any) -> Tensor:
    if isinstance(baselines, str):
        baselines = _known_id("baselines", baselines, tokenizer)
    if isinstance(baselines, int | np.integer):
        ids = token_ids("baselines", [baselines]) * tokens
    else:
        ids = token_ids("baselines", baselines)
    if len(ids) != tokens:
        raise ValueError(
            complaint(
                "baselines",
                f"must be one id, or one for each of the {tokens} tokens",
                f"{len(ids)} came",
                "Pass an int to use one baseline everywhere.",
            )
        )
    return torch.tensor(ids)


def _known_id(where: str, token: str, tokenizer: Any) -> int:
    known = tokenizer.get_vocab()
    if token not in known:
        raise ValueError(
            complaint(
                where,
                "must be a token or an id",
                f"{token!r} came, which the tokenizer does not know",
                "Pass the id, for example tokenizer.eos_token_id.",
            )
        )
    return int(known[token])


def _feature_labels(
    text: TokenText, feature_of_token: npt.NDArray[np.int64], features: int
) -> list[str]:
    if (np.bincount(feature_of_token + 1, minlength=features + 1)[1:] == 1).all():
        labels = text.labels()
        order = np.argsort(feature_of_token)[len(labels) - features :]
        return [labels[i] for i in order]
    parts: list[list[str]] = [[] for _ in range(features)]
    last = [-2] * features
    for i, feature in enumerate(feature_of_token):
        if feature >= 0:
            gap = " … " if parts[feature] and last[feature] != i - 1 else ""
            parts[feature].append(gap + text.text[slice(*text.offsets[i])])
            last[feature] = i
    return ["".join(part) for part in parts]


class ChatTokenInput(TokenIdsInput):
    """Chat messages, through the tokenizer's own chat template.

    The template is applied once and its result tokenised once, without special tokens
    beyond those that it wrote. Only the content of the chosen messages is attributed;
    role headers, other messages and the generation prompt are present but fixed. Where
    a template leaves out the beginning of a content, as some do with the reasoning of
    earlier turns, the rest of it is attributed.

    Args:
        messages (Sequence[Mapping]): messages as ``apply_chat_template`` takes them.
            The content may be a string or a list with parts of type ``"text"``.
        tokenizer: a fast tokenizer with a chat template.
        features (str or Collection[str] or Callable, optional): whose content is
            attributed: a role such as ``"user"``, several roles, ``"all"``, or a
            function from a message to bool. Default: ``"user"``
        baselines (int or str or Sequence[int], optional): as in
            :class:`TokenIdsInput`. Default: ``0``
        **template_args: for ``apply_chat_template``, such as ``tools`` or
            ``enable_thinking``. ``add_generation_prompt`` is true unless given.

    Raises:
        ValueError: if the tokenizer has no chat template or no character offsets, if no
            content is chosen, or if the template does not show a chosen content.

    Example:
        >>> from captum_cage.demo import load_demo
        >>> _, tokenizer = load_demo()
        >>> messages = [{"role": "user", "content": "Ana has 3 pens."}]
        >>> ChatTokenInput(messages, tokenizer).values
        ['Ana', ' has', ' 3', ' pens', '.']
    """

    def __init__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        *,
        features: Features = "user",
        baselines: int | str | Sequence[int] = 0,
        **template_args: Any,
    ) -> None:
        template_args.setdefault(
            "add_generation_prompt",
            not template_args.get("continue_final_message", False),
        )
        copies = checked_messages(messages)
        chat = RenderedChat.of(
            copies, tokenizer, chosen_messages(copies, features), template_args
        )
        inside = chat.message_of_token >= 0
        if not inside.any():
            raise no_content(features)
        self._segments = tuple(span for _, span in chat.contents)
        self.messages = copies
        self.set_tokens(list(chat.ids), tokenizer, inside, baselines)
        self.set_text(chat.text)

    @property
    def segments(self) -> tuple[Span, ...]:
        """Character ranges of the attributed contents."""
        return self._segments


@dataclass(frozen=True)
class RenderedChat:
    """Chat messages as the tokenizer's template writes them, tokenised once.

    Attributes:
        ids (tuple[int, ...]): token ids of the text.
        text (TokenText): the text, with the range of each token.
        contents (tuple): number of the message and character range of each chosen
            content, in reading order.
        message_of_token (numpy.ndarray): message whose chosen content a token belongs
            to, -1 for none, int64.
    """

    ids: tuple[int, ...]
    text: TokenText
    contents: tuple[tuple[int, Span], ...]
    message_of_token: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        chosen: Sequence[bool],
        template_args: Mapping[str, Any],
    ) -> RenderedChat:
        """The chat, and where the contents of the chosen messages stand.

        Args:
            messages (Sequence[Mapping]): the messages.
            tokenizer: a fast tokenizer with a chat template.
            chosen (Sequence[bool]): whose content is to be found.
            template_args (Mapping): for ``apply_chat_template``.

        Raises:
            ValueError: if the tokenizer has no chat template or no character offsets,
                or the template does not take the messages, or does not show a chosen
                content.
        """
        if getattr(tokenizer, "chat_template", None) is None and (
            template_args.get("chat_template") is None
        ):
            raise ValueError(
                "tokenizer: must have a chat template, but this one has none. Use "
                "TextTokenInput with plain text, or pass chat_template=."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                complaint(
                    "tokenizer",
                    "must give character offsets, as fast tokenizers do",
                    f"{type(tokenizer).__name__} came, which is not fast",
                    "Load it with use_fast=True, or tokenise yourself and pass "
                    "TokenIdsInput with a feature mask.",
                )
            )

        for name in ("tokenize", "return_tensors", "return_dict"):
            if name in template_args:
                raise TypeError(
                    f"{name}: is set here, since the template's text is needed. Leave "
                    "it out."
                )

        def render(rendered: Sequence[Mapping[str, Any]]) -> str:
            listed = [dict(message) for message in rendered]
            try:
                text: str = tokenizer.apply_chat_template(
                    listed, tokenize=False, **template_args
                )
            except (ImportError, MemoryError):
                raise
            # Whatever a template raises: it is a program, and not ours.
            except Exception as error:
                raise ValueError(
                    complaint(
                        "messages",
                        "must be such as the tokenizer's chat template takes",
                        f"{type(error).__name__} was raised by it: {error}",
                        "Pass the roles and fields that it knows, in the order that it "
                        "asks for, or another chat_template=.",
                    )
                ) from error
            return text

        text = render(messages)
        check_unicode("messages", text)
        contents = _content_spans(messages, chosen, text, render)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = _without_gaps(encoded["offset_mapping"], text)
        numbers = [message_at(text, span, contents) for span in offsets]
        return cls(
            tuple(encoded["input_ids"]),
            TokenText(text, offsets),
            tuple(contents),
            np.array(numbers, dtype=np.int64),
        )


def no_content(features: Any) -> ValueError:
    """The error of chosen messages in which nothing can be seen."""
    return ValueError(
        complaint(
            "messages",
            "a chosen message must have visible content",
            f"features={legible(features)} chose none with any",
            "Choose other roles, or features='all'.",
        )
    )


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of chat messages.

    Raises:
        TypeError: if they are no sequence of messages.
        ValueError: if there is none, or one has no role.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(
            complaint(
                "messages",
                "must be a sequence of messages",
                f"{shown(messages)} came",
                "Pass messages as apply_chat_template takes them.",
            )
        )
    listed = list(messages)
    if not listed:
        raise ValueError("messages: must have a message, but none came. Pass some.")
    for number, message in enumerate(listed):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(
                complaint(
                    f"messages[{number}]",
                    "must be a mapping with a 'role'",
                    f"{shown(message)} came",
                    "Pass messages as apply_chat_template takes them.",
                )
            )
    return [dict(message) for message in listed]


def check_unicode(where: str, text: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer reads.

    Args:
        where (str): the argument, as the user wrote it.
        text (str): its text.

    Raises:
        ValueError: if there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            complaint(
                where,
                "must be valid Unicode",
                f"half a surrogate pair came, in {text[: error.start + 1][-20:]!r}",
                "Replace it, as in text.encode(errors='replace').decode().",
            )
        ) from None


def chosen_messages(
    messages: Sequence[Mapping[str, Any]], features: Any, where: str = "features"
) -> list[bool]:
    """Which messages a role, several roles, ``"all"`` or a function means.

    Raises:
        TypeError: if ``features`` is none of these.
        ValueError: if no message has such a role.
    """
    if callable(features):
        return [bool(features(message)) for message in messages]
    if features == "all":
        return [True] * len(messages)
    if not isinstance(features, Collection):
        raise TypeError(
            complaint(
                where,
                "must be a role, several, 'all' or a function of a message",
                f"{shown(features)} came",
                f"Pass {where}='user' if in doubt.",
            )
        )
    roles = {features} if isinstance(features, str) else set(features)
    if not any(message["role"] in roles for message in messages):
        there = sorted({str(message["role"]) for message in messages})
        raise ValueError(
            complaint(
                where,
                "must choose a message",
                f"{legible(features)} came and the roles are {', '.join(there)}",
                "Pass one of these roles, several, 'all', or a function of a message.",
            )
        )
    return [message["role"] in roles for message in messages]


def _parts(message: Mapping[str, Any]) -> Iterable[tuple[int | None, str]]:
    """Texts of a message's content, each with its place in a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        yield None, content
    elif isinstance(content, Sequence):
        for place, part in enumerate(content):
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield place, part["text"]


def _content_spans(
    messages: Sequence[Mapping[str, Any]],
    chosen: Sequence[bool],
    text: str,
    render: Callable[[Sequence[Mapping[str, Any]]], str],
) -> list[tuple[int, Span]]:
    """Where the chosen contents stand in the rendered text, each with its message.

    Each text is rendered again between two marks, which are then taken out; what is
    left must be the rendered text itself, so that the marks' places are those of the
    content. Marks stand inside white space, which templates may strip.
    """
    first, last = _unused(text, 2)
    spans: list[tuple[int, Span]] = []
    for number, message in enumerate(messages):
        if not chosen[number]:
            continue
        for place, content in _parts(message):
            core = content.strip()
            if not core:
                continue
            start = content.find(core)
            marked = (
                f"{content[:start]}{first}{core}{last}{content[start + len(core) :]}"
            )
            changed = [dict(other) for other in messages]
            if place is None:
                changed[number]["content"] = marked
            else:
                parts = [
                    dict(part) if isinstance(part, Mapping) else part
                    for part in message["content"]
                ]
                parts[place]["text"] = marked
                changed[number]["content"] = parts
            rendered = render(changed)
            spans += [
                (number, span)
                for span in _marked_span(rendered, text, core, first, last, number)
            ]
    return spans


def _marked_span(
    rendered: str, text: str, core: str, first: str, last: str, number: int
) -> list[Span]:
    begins, ends = rendered.count(first), rendered.count(last)
    if rendered.replace(first, "").replace(last, "") == text and ends == 1:
        stop = rendered.find(last) - begins
        if begins:
            shown_text = text[rendered.find(first) : stop]
            # Some templates write what a tool returned as JSON.
            if shown_text in (core, json.dumps(core, ensure_ascii=False)[1:-1]):
                return [(rendered.find(first), stop)]
        else:
            # The template shows the end of the content only, as some do that drop the
            # reasoning of earlier turns.
            pairs = zip(reversed(core), reversed(text[:stop]), strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            tail = text[stop - same : stop].lstrip()
            begin = stop - len(tail)
            dropped = re.split(_TAG, core.removesuffix(tail))
            kept = [piece.strip() for piece in dropped if piece.strip()][-1:]
            # A beginning that is shown elsewhere is text that would not be attributed.
            if not kept or not re.search(
                rf"{re.escape(kept[0])}(?:[^<>\w]|{_TAG})*$", text[:begin]
            ):
                return [(begin, stop)]
    raise ValueError(
        complaint(
            f"messages[{number}]",
            "the chat template must show a chosen content as it is, once",
            "this one leaves it out or changes it",
            "Choose other messages with features=, or tokenise yourself and pass "
            "TokenIdsInput with a feature mask.",
        )
    )


def _unused(text: str, count: int) -> list[str]:
    """Private-use characters that do not occur in a text."""
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return [next(free) for _ in range(count)]


def _without_gaps(offsets: Iterable[Sequence[int]], text: str) -> tuple[Span, ...]:
    """Ranges to which white space before them is given back if the tokenizer cut it."""
    whole: list[Span] = []
    last = 0
    for start, stop in offsets:
        first = last if last < start and not text[last:start].strip() else start
        whole.append((first, stop))
        last = max(last, stop)
    return tuple(whole)


def message_at(text: str, span: Span, contents: Sequence[tuple[int, Span]]) -> int:
    """The message whose content a token's first visible character belongs to, or -1.

    Args:
        text (str): the rendered chat.
        span (tuple[int, int]): range of the token.
        contents (Sequence): number of the message and range of each content.
    """
    shown_text = text[slice(*span)]
    visible = span[1] - len(shown_text.lstrip())
    place = visible if visible < span[1] else span[0]
    if span[0] < span[1]:
        for number, (start, stop) in contents:
            if start <= place < stop:
                return number
    return FIXED


@dataclass(frozen=True)
class Prompt:
    """What stands before the generated text, as the wrapper needs to know it.

    Attributes:
        inp (InterpretableInput): the user's input.
        ids (tuple[int, ...]): ids of the unperturbed prompt.
        text (TokenText): its text.
        feature_of_token (numpy.ndarray or None): feature of each token, -1 for none;
            None where features are no single tokens (templates, images, groups).
        special (numpy.ndarray): which tokens are special, bool.
        breaks (tuple[int, ...]): characters at which a unit must end.
        continuation (Continuation or None): what follows the prompt already, in a
            trace. Default: None
    """

    inp: InterpretableInput
    ids: tuple[int, ...]
    text: TokenText
    feature_of_token: npt.NDArray[np.int64] | None
    special: npt.NDArray[np.bool_]
    breaks: tuple[int, ...]
    continuation: Continuation | None = None

    @classmethod
    def read(cls, inp: InterpretableInput, tokenizer: Any) -> Prompt:
        """Read a prompt from any of Captum's inputs or ours.

        Raises:
            TypeError: if ``inp`` is no interpretable input.
            ValueError: if the prompt is empty or has nothing to attribute.
        """
        if not isinstance(inp, InterpretableInput):
            raise TypeError(
                complaint(
                    "inp",
                    "must be one of Captum's interpretable inputs",
                    f"{shown(inp)} came",
                    "Wrap a text as TextTokenInput(text, tokenizer), messages as "
                    "ChatTokenInput(messages, tokenizer).",
                )
            )
        ids = token_ids("inp", _ids(inp.to_model_input(), tokenizer))
        if not ids:
            raise ValueError(
                "inp: the prompt must have a token, but it is empty. Pass some text."
            )
        if inp.n_itp_features < 1:
            raise ValueError(
                "inp: must have a feature to attribute to, but none of its tokens is "
                "one. Skip fewer tokens, or choose more messages."
            )
        feature_of_token = None
        breaks: tuple[int, ...] = ()
        continuation = None
        if isinstance(inp, TokenIdsInput):
            feature_of_token = inp.feature_of_token
            continuation = inp.continuation
            text = inp.token_text
            breaks = tuple(end for span in inp.segments for end in span)
        else:
            text = read_tokens(ids, tokenizer)
            if isinstance(inp, TextTokenInput):
                feature_of_token = _feature_of_token(inp.itp_mask, len(ids))
        if feature_of_token is not None and (
            np.bincount(feature_of_token + 1, minlength=2)[1:].max() > 1
            or feature_of_token.max() + 1 != inp.n_itp_features
        ):
            feature_of_token = None  # features are groups of tokens already
        special = np.isin(ids, list(special_ids(tokenizer)))
        return cls(
            inp, tuple(ids), text, feature_of_token, special, breaks, continuation
        )

    @cached_property
    def takes_ids_alone(self) -> bool:
        """Whether the model gets nothing but token ids."""
        return not isinstance(self.inp.to_model_input(), Mapping)


def _ids(model_input: Any, tokenizer: Any) -> Any:
    """Token ids of a model input, shape ``(1, tokens)``."""
    if isinstance(model_input, str):
        # As Captum itself encodes the text of a template.
        check_unicode("inp", model_input)
        return tokenizer.encode(model_input)
    if isinstance(model_input, Mapping) and "input_ids" in model_input:
        return model_input["input_ids"]
    if isinstance(model_input, Tensor):
        return model_input
    raise TypeError(
        complaint(
            "inp",
            "must give the model a text, token ids, or a mapping with 'input_ids'",
            f"{shown(model_input)} came",
            "Give an image input the processor function of its model.",
        )
    )


def baseline_id(choice: int | str, inp: InterpretableInput, tokenizer: Any) -> int:
    """The token that stands for an absent generated token.

    Args:
        choice (int or str): an id, a token, or ``"auto"``: the baseline of the input
            where it has one for all tokens, else the unknown, end or padding token,
            whichever the tokenizer has first, else 0.
        inp (InterpretableInput): the prompt.
        tokenizer: the tokenizer of the ids.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    if isinstance(choice, int):
        return whole_number(
            "generated_baseline",
            choice,
            remedy="Pass the id, for example tokenizer.eos_token_id.",
        )
    if choice != "auto":
        return _known_id("generated_baseline", choice, tokenizer)
    if isinstance(inp, TokenIdsInput):
        own = inp.baseline_ids.unique().tolist()
    else:
        own = [inp.baselines] if isinstance(inp, TextTokenInput) else []
    if len(own) == 1:
        return int(own[0])
    for name in ("unk", "eos", "pad"):
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            return int(found)
    return 0


class PrefixedInput(InterpretableInput):
    """A prompt and the ids generated after it, with units as features.

    Perturbing a unit perturbs all its features of the prompt, or replaces all its
    generated tokens by the baseline. Generated ids are appended as ids.

    Args:
        prompt (Prompt): the prompt.
        source_groups (numpy.ndarray): source unit of each feature of the prompt (of
            each token, where features are tokens), -1 for none.
        n_sources (int): number of source units.
        prefix (Sequence[int]): ids generated so far.
        prefix_groups (numpy.ndarray): generated unit of each of these ids, from 0; -1
            for ids that are present and no feature.
        baseline (int): id that stands for an absent generated token.
        tokenizer: the tokenizer of the ids.
        as_text_before (Sequence[int], optional): give the model text instead of ids,
            as remote models need: the text that stands before these ids, which are
            scored next. Default: None, ids
    """

    def __init__(
        self,
        prompt: Prompt,
        source_groups: npt.NDArray[np.int64],
        n_sources: int,
        prefix: Sequence[int],
        prefix_groups: npt.NDArray[np.int64],
        baseline: int,
        tokenizer: Any,
        as_text_before: Sequence[int] | None = None,
    ) -> None:
        self._prompt = prompt
        self._groups_given = source_groups
        self._source_groups = torch.from_numpy(_of_features(prompt, source_groups))
        self._prefix = torch.tensor([list(prefix)], dtype=torch.long)
        self._prefix_groups = torch.from_numpy(prefix_groups)
        self._n_sources = n_sources
        self._baseline = baseline
        self._tokenizer = tokenizer
        self._scored = as_text_before
        self._generated_groups = prefix_groups
        generated = int(prefix_groups.max(initial=-1)) + 1
        self.n_itp_features = n_sources + generated
        self.values = [str(number) for number in range(self.n_itp_features)]

    @property
    def token_features(self) -> tuple[list[int], npt.NDArray[np.int64]] | None:
        """Ids, and the unit of each, -1 for none; None where units are no tokens."""
        inp, groups = self._prompt.inp, self._groups_given
        if self._prompt.feature_of_token is None:
            if not isinstance(inp, TokenIdsInput):
                return None
            feature = inp.feature_of_token
            groups = np.where(feature >= 0, groups[feature], FIXED)
        generated = self._generated_groups
        later = np.where(generated >= 0, generated + self._n_sources, FIXED)
        ids = [*self._prompt.ids, *self._prefix[0].tolist()]
        return ids, np.concatenate([groups, later])

    @property
    def prompt_length(self) -> int:
        """Number of tokens of the prompt, after which generated ones stand."""
        return len(self._prompt.ids)

    def to_tensor(self) -> Tensor:
        """Indicator of the units, all present. Shape ``(1, n_itp_features)``."""
        dtype = self._prompt.inp.to_tensor().dtype
        return torch.ones((1, self.n_itp_features), dtype=dtype)

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> ModelInput:
        """The prompt as its own input gives it, followed by the generated ids."""
        inp, prefix = self._prompt.inp, self._prefix
        if perturbed_tensor is None:
            prompt = inp.to_model_input()
        else:
            present = perturbed_tensor[
                :, self._source_groups.to(perturbed_tensor.device)
            ]
            prompt = inp.to_model_input(present)
            groups = self._prefix_groups
            places = torch.where(groups >= 0, groups + self._n_sources, 0)
            absent = (perturbed_tensor.cpu()[:, places] != 1) & (groups >= 0)
            prefix = torch.where(absent, self._baseline, prefix)
        if self._scored is not None:
            return text_before(
                prompt, self._prompt, prefix[0].tolist(), self._scored, self._tokenizer
            )
        if isinstance(prompt, str):
            ids = _ids(prompt, self._tokenizer)
            if not len(ids) + prefix.shape[1]:
                raise empty_prompt()
            prompt = torch.tensor([ids], dtype=torch.long)
        if isinstance(prompt, Tensor):
            return torch.cat([prompt, prefix.to(prompt.device)], dim=1)
        return extended_model_input(prompt, prefix)


def token_features(
    inp: InterpretableInput,
) -> tuple[list[int], npt.NDArray[np.int64]]:
    """Token ids of an input, and the feature of each.

    Args:
        inp (InterpretableInput): an input whose features are tokens or groups of them.

    Returns:
        tuple: the ids, and the feature of each, shape ``(tokens,)``, -1 for tokens that
        are present and not attributed.

    Raises:
        TypeError: if the features of the input are something else.
    """
    found = None
    if isinstance(inp, PrefixedInput):
        found = inp.token_features
    elif isinstance(inp, TokenIdsInput):
        found = inp.inp_tensor[0].tolist(), inp.feature_of_token
    elif isinstance(inp, TextTokenInput):
        ids = inp.inp_tensor[0].tolist()
        found = ids, _feature_of_token(inp.itp_mask, len(ids))
    if found is None:
        raise TypeError(
            complaint(
                "inp",
                "its features must be tokens or groups of tokens, as those of a "
                "TextTokenInput, TokenIdsInput or ChatTokenInput",
                f"{type(inp).__name__} came",
                "Use one of these, or a method that perturbs any input, such as "
                "FeatureAblation.",
            )
        )
    return found


def empty_prompt() -> ValueError:
    """The error of a prompt of which nothing is left."""
    return ValueError(
        "inp: the prompt must have a token even where features are absent, but it is "
        "empty then. Give the template some text of its own, or give the input "
        "baselines."
    )


def _without_start(ids: list[int], tokenizer: Any) -> list[int]:
    """Ids without the token that a server puts in front of every text."""
    start = getattr(tokenizer, "bos_token_id", None)
    if start is not None and ids[:1] == [start] == tokenizer.encode("")[:1]:
        return ids[1:]
    return ids


def text_before(
    model_input: str | Tensor,
    prompt: Prompt,
    prefix: Sequence[int],
    scored: Sequence[int],
    tokenizer: Any,
) -> str:
    """The text that a remote model must get before the ids that it scores.

    Captum decodes the scored ids alone, which may lose a space before them: here it
    stays with the text in front.

    Args:
        model_input (str or Tensor): the prompt, perhaps perturbed, as its input gives
            it.
        prompt (Prompt): the prompt as it is.
        prefix (Sequence[int]): generated ids before the scored ones.
        scored (Sequence[int]): ids that are scored next.
        tokenizer: the tokenizer of the ids.
    """
    more = [*prefix, *scored]
    if isinstance(model_input, str):
        context = list(prompt.ids[-1:])
        before = decode(context, tokenizer)
        text = model_input + decode([*context, *more], tokenizer)[len(before) :]
    else:
        ids = _without_start(token_ids("inp", model_input), tokenizer)
        text = decode([*ids, *more], tokenizer)
    return text.removesuffix(decode(scored, tokenizer))


def _of_features(
    prompt: Prompt, groups: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Unit of each feature, from the unit of each token."""
    if prompt.feature_of_token is None:
        return groups
    features = np.zeros(prompt.inp.n_itp_features, dtype=np.int64)
    chosen = prompt.feature_of_token >= 0
    features[prompt.feature_of_token[chosen]] = groups[chosen]
    return features


def extended_model_input(model_input: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """A processor's output with more token ids at its end.

    Args:
        model_input (Mapping): what a processor made, with ``input_ids``.
        ids (Tensor): ids to append, shape ``(1, n)``.

    Raises:
        ValueError: if another entry has one number per token and it is unknown what a
            generated token gets there.
    """
    before = model_input["input_ids"]
    length = before.shape[1]
    extended = {**model_input}
    extended["input_ids"] = torch.cat([before, ids.to(before.device)], dim=1)
    for name, value in model_input.items():
        if name == "input_ids" or not isinstance(value, Tensor):
            continue
        if name in _PER_TOKEN:
            more = value.new_full((value.shape[0], ids.shape[1]), _PER_TOKEN[name])
            extended[name] = torch.cat([value, more], dim=1)
        elif value.dim() == 2 and value.shape == before.shape and length > 1:
            raise ValueError(
                complaint(
                    f"inp: the model input {name!r}",
                    "must not have one number per token, since what a generated token "
                    "gets there is not known",
                    f"it has {length}, as many as the prompt has tokens",
                    "Have the processor function leave it out, if the model can do "
                    "without it.",
                )
            )
    return extended
