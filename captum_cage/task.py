"""What the raw rows of one explanation depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from captum.attr import InterpretableInput, TextTemplateInput

from captum_cage._captum import LLMAttributionObject, base_method
from captum_cage._checks import complaint
from captum_cage.causal import CausalModel
from captum_cage.inputs import Continuation, PrefixedInput, Prompt, TokenIdsInput
from captum_cage.text import Span, TokenText, decode, read_tokens, special_ids
from captum_cage.thinking import Thinking
from captum_cage.units import FIXED, Segments, Unit, Units, group_tokens, split_ranges

__all__ = [
    "RowTask",
    "TextUnits",
    "check_perturbed",
    "check_possible",
    "check_scores",
    "generated_units",
    "text_units",
]

# Tokens of the prompt in whose context the generated ones are read.
_CONTEXT = 8
_NO_NUMBER = "Look for NaN or infinite weights, or use a wider number type."
_TAIL = 200  # characters of the prompt, whose end may open the first thought
_NOTHING = Continuation(
    (), TokenText("", ()), np.zeros(0, dtype=bool), np.zeros(0, dtype=bool), (), False
)


def check_scores(
    scores: npt.NDArray[np.float64], generated: Sequence[int], tokenizer: Any
) -> None:
    """Refuse what is no log-probability.

    Args:
        scores (numpy.ndarray): one per generated token.
        generated (Sequence[int]): ids of the generated text.
        tokenizer: the tokenizer of the ids.

    Raises:
        ValueError: if one is NaN or above zero.
    """
    for place in np.flatnonzero(~(scores <= 0)).tolist():
        raise ValueError(
            complaint(
                "llm_attr",
                "the model must give log-probabilities",
                f"{scores[place]} came for generated token {place}, "
                f"{decode([generated[place]], tokenizer)!r}",
                _NO_NUMBER,
            )
        )


def check_perturbed(
    task: RowTask,
    scores: npt.NDArray[np.float64],
    present: npt.NDArray[np.bool_],
    first: int = 0,
) -> None:
    """Refuse scores of a perturbed text from which no attribution follows.

    Args:
        task (RowTask): what is explained.
        scores (numpy.ndarray): what the model gave for generated tokens, from ``first``
            on.
        present (numpy.ndarray): whether each of the first units is present.
        first (int, optional): the first of these tokens. Default: ``0``

    Raises:
        ValueError: if one is NaN, or infinite where log-probabilities are attributed;
            it names the units that are absent, and the generated unit.
    """
    refused = np.isnan(scores)
    if getattr(task.llm_attr, "attr_target", "log_prob") == "log_prob":
        refused = ~np.isfinite(scores)
    for place in np.flatnonzero(refused).tolist():
        step = int(task.steps.groups[first + place])
        if step < 0 or not task.steps.units[step].generated:
            continue
        units = (*task.sources.units, *task.steps.units)
        absent = np.flatnonzero(~present).tolist()
        named = [f"unit {unit}, {units[unit].text!r}" for unit in absent[:3]]
        if len(absent) > len(named):
            named.append(f"{len(absent) - len(named)} more")
        without = f", without {'; '.join(named)}" if named else ""
        raise ValueError(
            complaint(
                base_method(task.llm_attr),
                "needs finite log-probabilities",
                f"{scores[place]} came for generated unit {step}, "
                f"{task.steps.units[step].text!r}{without}",
                "The model says that it cannot follow: explain another text, use a "
                "wider number type, or attribute probabilities by attr_target='prob'."
                if np.isneginf(scores[place])
                else _NO_NUMBER,
            )
        )


def check_possible(task: RowTask, scores: npt.NDArray[np.float64]) -> None:
    """Refuse a text that cannot be, where its log-probability is attributed.

    Args:
        task (RowTask): what is explained.
        scores (numpy.ndarray): log-probabilities of the first generated tokens.

    Raises:
        ValueError: if one is minus infinity; it names the unit.
    """
    method = task.llm_attr.attr_method
    declared = getattr(method, "capability", None)
    depends = getattr(declared, "depends_on_target", True)
    if not getattr(method, "depends_on_target", depends):
        return
    if getattr(task.llm_attr, "attr_target", "log_prob") != "log_prob":
        return
    for place in np.flatnonzero(np.isneginf(scores)).tolist():
        step = int(task.steps.groups[place])
        if step < 0 or not task.steps.units[step].generated:
            continue
        token = decode([task.generated[place]], task.llm_attr.tokenizer)
        raise ValueError(
            complaint(
                base_method(task.llm_attr),
                "the text must be one that the model could write",
                f"token {place}, {token!r}, in generated unit {step}, "
                f"{task.steps.units[step].text!r}, has probability 0",
                "Explain a text without it, or take away what bans the token.",
            )
        )


@dataclass(frozen=True)
class RowTask:
    """Everything that the raw rows of one explanation depend on.

    Attributes:
        llm_attr: the wrapped Captum object.
        prompt (Prompt): what stands before the generated text.
        generated (tuple[int, ...]): ids of all that follows the prompt: what the model
            wrote and, in a trace, text from outside in between.
        generated_text (TokenText): their text.
        sources (Units): source units, by token of the prompt or by feature.
        steps (Units): the units that follow the prompt, by token; those from outside
            are not generated and have no row, and tokens of no unit have -1.
        baseline (int): id that stands for an absent generated token.
        kwargs (Mapping): arguments for the wrapped object's ``attribute``.
        batch_size (int or None): most sequences that an engine may give the model at
            once; None lets it choose by the memory that is free.
        show_progress (bool): whether an engine shows a progress bar.
        thinking (Thinking): which parts of the generated text are thinking.
        kept (dict): finished work of an engine, by the engine's own key; a call that
            was interrupted finds it here when it is repeated. Under ``"scores"`` the
            log-probabilities of all generated tokens, once an engine has them.
        stand_in (Callable or None): who makes an engine's passes in the place of a
            model that it knows by then; None for the model.
    """

    llm_attr: LLMAttributionObject
    prompt: Prompt
    generated: tuple[int, ...]
    generated_text: TokenText
    sources: Units
    steps: Units
    baseline: int
    kwargs: Mapping[str, Any]
    batch_size: int | None = None
    show_progress: bool = False
    thinking: Thinking = field(default_factory=Thinking.none)
    kept: dict[str, Any] = field(default_factory=dict, compare=False)
    stand_in: Callable[[CausalModel], CausalModel] | None = field(
        default=None, compare=False
    )

    @cached_property
    def written(self) -> npt.NDArray[np.int64]:
        """Steps that the model wrote and that have rows, ascending. Shape ``(G,)``."""
        return np.flatnonzero([unit.generated for unit in self.steps.units])

    @property
    def is_source(self) -> npt.NDArray[np.bool_]:
        """Whether a unit is a source, in the order of the text. Shape ``(N,)``."""
        outside = [not unit.generated for unit in self.steps.units]
        return np.array([True] * len(self.sources) + outside, dtype=bool)

    def reader(self, model: CausalModel) -> CausalModel:
        """Who makes an engine's passes, once it knows the model: as a rule, the model.

        Args:
            model (CausalModel): the model.
        """
        return model if self.stand_in is None else self.stand_in(model)

    def unit_sums(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sums over the tokens of each step, of values of the first tokens.

        Args:
            values (numpy.ndarray): one per token after the prompt, from the first on.

        Returns:
            numpy.ndarray: one per step up to that of the last token, float64.
        """
        groups = self.steps.groups[: len(values)]
        inside = groups >= 0
        found = np.bincount(groups[inside], weights=values[inside])
        return found.astype(np.float64)

    @property
    def width(self) -> int:
        """Number of units ``N``, sources and then all that follow the prompt."""
        return len(self.sources) + len(self.steps)

    @property
    def by_token(self) -> bool:
        """Whether Captum scores a unit token by token, as inputs besides ids need."""
        return not self.prompt.takes_ids_alone

    @property
    def reads_tokens(self) -> bool:
        """Whether the prompt is a sequence of token ids, as gradient methods need."""
        return self.prompt.feature_of_token is not None or isinstance(
            self.prompt.inp, TokenIdsInput
        )

    def range_of(self, step: int) -> tuple[int, int]:
        """First token of a step after the prompt, and the one after its last."""
        members = self.steps.members(step)
        return int(members[0]), int(members[-1]) + 1

    def unit_of_token(self) -> npt.NDArray[np.int64]:
        """Unit of each token of prompt and generated text, -1 for none.

        Only for prompts that are a sequence of tokens, see :attr:`reads_tokens`.
        """
        sources = self.sources.groups
        if self.prompt.feature_of_token is None:
            feature: npt.NDArray[np.int64] = self.prompt.inp.feature_of_token
            sources = np.where(feature >= 0, sources[feature], FIXED)
        steps = self.steps.groups
        later = np.where(steps >= 0, steps + len(self.sources), FIXED)
        return np.concatenate([sources, later])

    def baseline_ids(self) -> list[int]:
        """The id that stands for each token of prompt and generated text if absent."""
        inp = self.prompt.inp
        if isinstance(inp, TokenIdsInput):
            own = [int(i) for i in inp.baseline_ids]
        else:
            own = [int(inp.baselines)] * len(self.prompt.ids)
        return [*own, *([self.baseline] * len(self.generated))]

    def prefixed_input(
        self,
        stop: int,
        *,
        step: int | None = None,
        as_text_before: tuple[int, ...] | None = None,
    ) -> PrefixedInput:
        """The prompt and the first ``stop`` generated ids, with units as features.

        Args:
            stop (int): number of generated ids.
            step (int, optional): generated units from this one on are present and no
                features. Default: all of them are features
            as_text_before (tuple[int, ...], optional): as in ``PrefixedInput``.
        """
        groups = self.steps.groups[:stop]
        if step is not None:
            groups = np.where(groups < step, groups, FIXED)
        return PrefixedInput(
            self.prompt,
            self.sources.groups,
            len(self.sources),
            self.generated[:stop],
            groups,
            self.baseline,
            self.llm_attr.tokenizer,
            as_text_before=as_text_before,
        )


class TextUnits(NamedTuple):
    """What a prompt and the text after it are made of.

    Attributes:
        text (TokenText): all that follows the prompt.
        sources (Units): the units of the prompt.
        steps (Units): the units that follow it.
        thinking (Thinking): which parts of it are thinking, and the answer.
    """

    text: TokenText
    sources: Units
    steps: Units
    thinking: Thinking


def text_units(
    prompt: Prompt,
    generated: Sequence[int],
    sides: Mapping[str, Any],
    tokenizer: Any,
    think: Any = None,
) -> TextUnits:
    """The generated text, and the units of prompt and generated text.

    Args:
        prompt (Prompt): the prompt.
        generated (Sequence[int]): ids of all that follows the prompt.
        sides (Mapping): the granularity of each side, as ``split_units`` gives it.
        tokenizer: the tokenizer of the ids.
        think (optional): where thinking stands, as ``Thinking.found`` takes it.
            Default: None

    Raises:
        TypeError: if ``think`` is nothing that says where.
        ValueError: if ranges do not fit the text.
    """
    source_units, step_units = sides["source"], sides["generated"]
    if sides["both"] is not None:
        cut = len(prompt.text.text)
        source_units, step_units = split_ranges(sides["both"], cut)
    sources = _source_units(prompt, source_units)
    # Ranges count in the prompt or in all that follows it, turns from outside too.
    ranges = isinstance(step_units, list) or isinstance(source_units, list)
    trace = _Trace.of(prompt, generated, tokenizer)
    thinking = Thinking.found(
        trace.text.text, trace.turns(), prompt.text.text[-_TAIL:], tokenizer, think
    )
    steps = trace.units(
        step_units if ranges else source_units, step_units, thinking.breaks, tokenizer
    )
    return TextUnits(trace.text, sources, steps, thinking)


@dataclass(frozen=True)
class _Trace:
    """All that follows the prompt of a trace, up to the end of what was generated."""

    ids: tuple[int, ...]
    text: TokenText
    generated: npt.NDArray[np.bool_]
    attributed: npt.NDArray[np.bool_]
    breaks: tuple[int, ...]

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        generated: Sequence[int],
        tokenizer: Any,
    ) -> _Trace:
        """The trace with what was generated after it; or what follows a prompt."""
        before = prompt.continuation or _NOTHING
        new = generated[len(before.ids) :]
        text, breaks = before.text, before.breaks
        if new:
            context = [*prompt.ids, *before.ids][-_CONTEXT:]
            added = read_tokens([*context, *new], tokenizer).split(len(context))[1]
            cut = len(text.text)
            offsets = tuple((a + cut, b + cut) for a, b in added.offsets)
            text = TokenText(text.text + added.text, (*text.offsets, *offsets))
            breaks = before.all_breaks if before.ids else ()
        ones = np.ones(len(new), dtype=bool)
        return cls(
            tuple(generated),
            text,
            np.concatenate([before.generated, ones]),
            np.concatenate([before.attributed, ones]),
            breaks,
        )

    def turns(self) -> list[Span]:
        """Character ranges that the model wrote."""
        edges = np.flatnonzero(np.diff(self.generated, prepend=False, append=False))
        offsets = self.text.offsets
        return [
            (offsets[first][0], offsets[stop - 1][1])
            for first, stop in edges.reshape(-1, 2).tolist()
        ]

    def units(
        self, outside: Any, written: Any, breaks: Sequence[int], tokenizer: Any
    ) -> Units:
        """The units of both kinds, in reading order."""
        special = np.isin(self.ids, list(special_ids(tokenizer)))
        kinds = []
        for is_written, granularity in ((False, outside), (True, written)):
            mask = self.attributed & (self.generated == is_written)
            if not mask.any():
                continue
            if isinstance(granularity, list):
                granularity = self._ranges_in(granularity, mask)
            units = group_tokens(
                self.text,
                granularity,
                generated=is_written,
                attributed=mask,
                special=special,
                breaks=(*self.breaks, *breaks),
            )
            kinds.append(units)
        return kinds[0] if len(kinds) == 1 else _merged(*kinds)

    def _ranges_in(
        self, ranges: Sequence[Span], mask: npt.NDArray[np.bool_]
    ) -> list[Span]:
        """The ranges that cover tokens of one kind, and of this kind only."""
        chosen = []
        for start, stop in ranges:
            inside = [a < stop and start < b for a, b in self.text.offsets]
            covered = np.array(inside) & self.attributed
            if not (covered & mask).any():
                continue
            first, last = np.flatnonzero(covered)[[0, -1]]
            if not mask[first : last + 1].all():
                text = self.text.text[start:stop]
                raise ValueError(
                    complaint(
                        "units",
                        "a range must lie in one message of a trace",
                        f"({start}, {stop}), {text!r}, came",
                        "Cut it where the message ends.",
                    )
                )
            chosen.append((start, stop))
        return chosen


def _merged(outside: Units, written: Units) -> Units:
    """Units of two kinds over the same tokens, in the order of their first tokens."""
    found = [
        (int(kind.members(number)[0]), kind, number)
        for kind in (outside, written)
        for number in range(len(kind))
    ]
    found.sort(key=lambda item: item[0])
    groups = np.full(len(written.groups), FIXED, dtype=np.int64)
    for place, (_, kind, number) in enumerate(found):
        groups[kind.groups == number] = place
    return Units(tuple(kind.units[number] for _, kind, number in found), groups)


def generated_units(
    before: Sequence[int],
    generated: Sequence[int],
    units: str | Segments | Sequence[Span],
    tokenizer: Any,
) -> tuple[TokenText, Units]:
    """A generated text, read in its context, and its units.

    Args:
        before (Sequence[int]): ids that stand before it.
        generated (Sequence[int]): its ids.
        units: its granularity, as ``group_tokens`` takes it.
        tokenizer: the tokenizer of the ids.
    """
    context = list(before[-_CONTEXT:])
    text = read_tokens([*context, *generated], tokenizer).split(len(context))[1]
    special = np.isin(generated, list(special_ids(tokenizer)))
    return text, group_tokens(text, units, generated=True, special=special)


def _source_units(prompt: Prompt, units: Any) -> Units:
    """Source units from the tokens of a prompt, or its features as they are."""
    inp = prompt.inp
    if prompt.feature_of_token is not None:
        return group_tokens(
            prompt.text,
            units,
            generated=False,
            attributed=prompt.feature_of_token >= 0,
            special=prompt.special,
            breaks=prompt.breaks,
        )
    if isinstance(units, list) and units:
        raise ValueError(
            complaint(
                "units",
                "ranges of the source text must group single tokens",
                f"the features of this {type(inp).__name__} are larger than that",
                "Leave out the ranges of the prompt: its features are its units.",
            )
        )
    labels = _feature_labels(inp)
    spans = _feature_spans(prompt)
    found = tuple(
        Unit(label, False, span) for label, span in zip(labels, spans, strict=True)
    )
    return Units(found, np.arange(len(found)))


def _feature_labels(inp: InterpretableInput) -> list[str]:
    values = [str(value) for value in inp.values]
    if isinstance(inp, TextTemplateInput) and inp.mask is not None:
        groups: list[list[str]] = [[] for _ in range(inp.n_itp_features)]
        for value, feature in zip(values, inp.formatted_mask, strict=True):
            groups[feature].append(value)
        return [" … ".join(group) for group in groups]
    if len(values) != inp.n_itp_features:
        return [f"feature {number}" for number in range(inp.n_itp_features)]
    return values


def _feature_spans(prompt: Prompt) -> list[tuple[int, int] | None]:
    """Range of each feature that is a stretch of tokens."""
    inp = prompt.inp
    spans: list[tuple[int, int] | None] = [None] * inp.n_itp_features
    if isinstance(inp, TokenIdsInput):
        for feature in range(inp.n_itp_features):
            tokens = np.flatnonzero(inp.feature_of_token == feature)
            if tokens[-1] - tokens[0] + 1 == len(tokens):
                first, last = (
                    prompt.text.offsets[tokens[0]],
                    prompt.text.offsets[tokens[-1]],
                )
                spans[feature] = (first[0], last[1])
    return spans
