"""What the raw rows of one explanation depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from captum.attr import InterpretableInput, TextTemplateInput

from captum_cage._captum import LLMAttributionObject
from captum_cage._checks import complaint
from captum_cage.inputs import PrefixedInput, Prompt, TokenIdsInput
from captum_cage.text import Span, TokenText, decode, read_tokens, special_ids
from captum_cage.units import FIXED, Segments, Unit, Units, group_tokens, split_ranges

__all__ = ["RowTask", "check_scores", "generated_units", "text_units"]

# Tokens of the prompt in whose context the generated ones are read.
_CONTEXT = 8


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
                "Look for NaN or infinite weights, or use a wider number type.",
            )
        )


@dataclass(frozen=True)
class RowTask:
    """Everything that the raw rows of one explanation depend on.

    Attributes:
        llm_attr: the wrapped Captum object.
        prompt (Prompt): what stands before the generated text.
        generated (tuple[int, ...]): generated ids.
        generated_text (TokenText): their text.
        sources (Units): source units, by token of the prompt or by feature.
        steps (Units): generated units, by generated token.
        baseline (int): id that stands for an absent generated token.
        kwargs (Mapping): arguments for the wrapped object's ``attribute``.
        batch_size (int or None): most sequences that an engine may give the model at
            once; None lets it choose by the memory that is free.
        show_progress (bool): whether an engine shows a progress bar.
        kept (dict): finished work of an engine, by the engine's own key; a call that
            was interrupted finds it here when it is repeated. Under ``"scores"`` the
            log-probabilities of all generated tokens, once an engine has them.
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
    kept: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def width(self) -> int:
        """Number of units, ``N = P + G``."""
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
        """First generated token of a unit, and the one after its last."""
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
        return np.concatenate([sources, self.steps.groups + len(self.sources)])

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


def text_units(
    prompt: Prompt, generated: Sequence[int], sides: Mapping[str, Any], tokenizer: Any
) -> tuple[TokenText, Units, Units]:
    """The generated text, and the units of prompt and generated text.

    Args:
        prompt (Prompt): the prompt.
        generated (Sequence[int]): ids of the generated text.
        sides (Mapping): the granularity of each side, as ``split_units`` gives it.
        tokenizer: the tokenizer of the ids.

    Raises:
        ValueError: if ranges do not fit the text.
    """
    source_units, step_units = sides["source"], sides["generated"]
    if sides["both"] is not None:
        cut = len(prompt.text.text)
        source_units, step_units = split_ranges(sides["both"], cut)
    text, steps = generated_units(prompt.ids, generated, step_units, tokenizer)
    return text, _source_units(prompt, source_units), steps


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
