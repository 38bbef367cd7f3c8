"""Attribution of generated text through the text generated before it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from captum.attr import Attribution as CaptumAttribution
from captum.attr import InterpretableInput, TextTemplateInput
from torch import Tensor, nn
from tqdm import tqdm

from captum_cage._captum import (
    CAPTUM_VERSION,
    LLMAttributionObject,
    base_method,
    check_attribution_object,
    check_kwargs,
)
from captum_cage._checks import complaint, one_of, shown
from captum_cage._version import __version__
from captum_cage.graph import AttributionGraph, Normalization
from captum_cage.inputs import Prompt, TokenIdsInput, baseline_id, token_ids
from captum_cage.result import GraphAttributionResult, split_ranges
from captum_cage.rows import RowTask, check_task, loop_row
from captum_cage.scoring import (
    check_baseline,
    check_model,
    check_sequence,
    generate_ids,
    held,
    log_probabilities,
)
from captum_cage.spans import Explain, explained_units
from captum_cage.text import read_tokens, special_ids
from captum_cage.units import Granularity, Unit, Units, group_tokens, split_units

__all__ = ["GraphContextAttribution"]

logger = logging.getLogger(__name__)

NORMALIZATIONS = ("positive", "absolute", "signed")
STRATEGIES = ("auto", "loop")

# Tokens of the prompt in whose context the generated ones are read.
_CONTEXT = 8


class GraphContextAttribution(CaptumAttribution):
    """Wrap a Captum LLM attribution object and follow the reasoning to the prompt.

    Captum links each generated token to the prompt alone. This class attributes each
    generated unit to the prompt *and* to the units generated before it, makes the rows
    into a row-stochastic graph, and gives to each source unit the mass of all paths
    that lead there from the text to be explained.

    Args:
        llm_attr: an ``LLMAttribution``, ``LLMGradientAttribution`` or
            ``RemoteLLMAttribution`` object of ``captum.attr``. It is not changed.
        normalization (str, optional): how raw rows become shares: ``"positive"``
            (clamped at zero), ``"absolute"``, or ``"signed"``. Default: ``"positive"``
        generated_baseline (int or str, optional): the token that stands for an absent
            *generated* token, as id or token. ``"auto"`` takes the baseline of the
            input, or, where it has none, the unknown, end or padding token.
            Default: ``"auto"``

    Raises:
        TypeError: if ``llm_attr`` is not one of these objects.
        ValueError: if the normalisation is unknown, or the model is an
            encoder-decoder.

    Source: Walker and Ewetz (2025), arXiv:2512.15663.

    Example:
        >>> from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
        >>> from captum_cage.demo import load_demo, sample_problems
        >>> model, tokenizer = load_demo()
        >>> problem = sample_problems(1, seed=0)[0]
        >>> cage = GraphContextAttribution(
        ...     LLMAttribution(FeatureAblation(model), tokenizer)
        ... )
        >>> result = cage.attribute(
        ...     TextTokenInput(problem.prompt, tokenizer),
        ...     target=problem.completion,
        ...     explain=problem.answers[0].text,
        ...     units="sentence",
        ... )
        >>> round(float(result.seq_attr.sum()) + result.leaked, 9)
        1.0
    """

    def __init__(
        self,
        llm_attr: LLMAttributionObject,
        *,
        normalization: Normalization = "positive",
        generated_baseline: int | str = "auto",
    ) -> None:
        check_attribution_object(llm_attr)
        check_model(llm_attr)
        one_of("normalization", normalization, NORMALIZATIONS)
        if isinstance(generated_baseline, bool) or not isinstance(
            generated_baseline, int | str
        ):
            raise TypeError(
                complaint(
                    "generated_baseline",
                    "must be 'auto', a token or an id",
                    f"{shown(generated_baseline)} came",
                    "Pass the id, for example tokenizer.eos_token_id.",
                )
            )
        super().__init__(llm_attr.forward_func)
        self.llm_attr = copy.copy(llm_attr)
        self.normalization: Normalization = normalization
        self.generated_baseline = generated_baseline
        self._unfinished: _Unfinished | None = None

    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Sequence[int] | Tensor | None = None,
        *,
        explain: Explain = None,
        units: Granularity = "token",
        gen_args: Mapping[str, Any] | None = None,
        strategy: str = "auto",
        show_progress: bool = False,
        **kwargs: Any,
    ) -> GraphAttributionResult:
        """Explain generated text by its sources.

        An interrupted call is not lost: the same call on the same object goes on from
        the rows that were finished.

        Args:
            inp (InterpretableInput): the prompt: any input that the wrapped object
                takes, or a ``TokenIdsInput`` or ``ChatTokenInput``.
            target (str or Sequence[int] or Tensor, optional): the generated text, as
                text or as token ids. None lets the model generate it, once; the ids
                that it generated are used as they are. Default: ``None``
            explain (optional): what to explain. None for all of it; an int, a slice or
                ``(start, stop)`` of generated units; a substring of the generated text,
                whose *last* occurrence counts; a compiled regular expression, whose
                last visible match counts. Default: ``None``
            units (optional): the nodes of the graph: ``"token"``, ``"word"``,
                ``"sentence"``, a function from a text to character ranges, character
                ranges in the whole text (prompt followed by generated text), or a
                mapping with one of these for ``"source"`` and for ``"generated"``.
                Features that are no single tokens, such as the segments of a template,
                are source units as they are. Default: ``"token"``
            gen_args (Mapping, optional): for the model's ``generate`` where ``target``
                is None. Default: Captum's own: greedy, 25 tokens
            strategy (str, optional): how the rows are computed. ``"loop"`` asks the
                wrapped object once per generated unit; ``"auto"`` takes the fastest
                way that gives the same rows. Default: ``"auto"``
            show_progress (bool, optional): show a progress bar on stderr.
                Default: ``False``
            **kwargs: for the wrapped object's ``attribute``, such as ``n_steps``.
                ``baselines`` are those of the prompt's features.

        Returns:
            GraphAttributionResult: scores, graph and texts.

        Raises:
            TypeError: if an argument is of the wrong kind or unknown.
            ValueError: if there is nothing to explain or to attribute to, the text does
                not fit the model, or the base method cannot do what is asked.
        """
        one_of("strategy", strategy, STRATEGIES)
        check_kwargs(self.llm_attr, kwargs)
        sides = split_units(units)
        prompt = Prompt.read(inp, self.llm_attr.tokenizer)
        check_sequence(self.llm_attr, prompt.ids, [])
        with held(self.llm_attr):
            generated = self._target_ids(prompt, target, gen_args)
            check_sequence(self.llm_attr, prompt.ids, generated)
            task = self._task(prompt, generated, sides, kwargs)
            check_baseline(self.llm_attr, task.baseline)
            explained = explained_units(
                explain, task.steps.units, task.generated_text.text
            )
            check_task(task)
            scores = log_probabilities(self.llm_attr, prompt, generated)
            rows = self._rows(task, show_progress)
        graph = AttributionGraph.from_rows(rows, len(task.sources), self.normalization)
        logs = np.zeros(len(task.steps))
        np.add.at(logs, task.steps.groups, scores)
        return GraphAttributionResult(
            graph,
            (*task.sources.units, *task.steps.units),
            explained,
            source_text=prompt.text.text,
            generated_text=task.generated_text.text,
            output_probs=torch.from_numpy(np.exp(logs)),
            breaks=prompt.breaks,
            meta=self._meta(units),
            inp=inp,
        )

    def attribute_future(self) -> Callable[[], GraphAttributionResult]:
        """This method is not implemented for GraphContextAttribution."""
        raise NotImplementedError(
            "attribute_future is not implemented for GraphContextAttribution"
        )

    def _target_ids(
        self,
        prompt: Prompt,
        target: str | Sequence[int] | Tensor | None,
        gen_args: Mapping[str, Any] | None,
    ) -> list[int]:
        if target is None:
            return generate_ids(self.llm_attr, prompt, gen_args)
        if gen_args is not None:
            raise ValueError(
                "gen_args: must be None where target is given, since nothing is "
                "generated. Leave one of them out."
            )
        if isinstance(target, str):
            # As Captum encodes a target.
            encoded = self.llm_attr.tokenizer.encode(target, add_special_tokens=False)
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

    def _task(
        self,
        prompt: Prompt,
        generated: list[int],
        sides: Mapping[str, Any],
        kwargs: Mapping[str, Any],
    ) -> RowTask:
        tokenizer = self.llm_attr.tokenizer
        context = list(prompt.ids[-_CONTEXT:])
        text = read_tokens([*context, *generated], tokenizer).split(len(context))[1]
        source_units, step_units = sides["source"], sides["generated"]
        if sides["both"] is not None:
            cut = len(prompt.text.text)
            source_units, step_units = split_ranges(sides["both"], cut)
        return RowTask(
            llm_attr=self.llm_attr,
            prompt=prompt,
            generated=tuple(generated),
            generated_text=text,
            sources=_source_units(prompt, source_units),
            steps=group_tokens(
                text,
                step_units,
                generated=True,
                special=np.isin(generated, list(special_ids(tokenizer))),
            ),
            baseline=baseline_id(self.generated_baseline, prompt.inp, tokenizer),
            kwargs=dict(kwargs),
        )

    def _rows(self, task: RowTask, show_progress: bool) -> npt.NDArray[np.float64]:
        """Raw rows ``(G, N)``; what was finished before an interrupt is kept."""
        unfinished = self._unfinished
        state = _model_state(self.llm_attr.model)
        if unfinished is None or not unfinished.belongs_to(task, state):
            unfinished = _Unfinished(task, state, {})
        self._unfinished = None
        done = unfinished.rows
        steps = range(len(task.steps))
        try:
            for step in tqdm(
                steps, desc="rows", unit="row", disable=not show_progress, initial=0
            ):
                if step not in done:
                    done[step] = loop_row(task, step)
        except BaseException:
            self._unfinished = unfinished
            if done:
                logger.warning(
                    "stopped after %d of %d rows; the same call goes on from there",
                    len(done),
                    len(steps),
                )
            raise
        return np.stack([done[step] for step in steps])

    def _meta(self, units: Granularity) -> dict[str, Any]:
        model = self.llm_attr.model
        name = getattr(getattr(model, "config", None), "name_or_path", "")
        return {
            "method": base_method(self.llm_attr),
            "model": name or type(model).__name__,
            "units": units if isinstance(units, str) else "own",
            "versions": {
                "captum_cage": __version__,
                "captum": CAPTUM_VERSION,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


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


@dataclass(frozen=True)
class _Unfinished:
    """Rows of a call that was interrupted, and what they belong to."""

    task: RowTask
    state: tuple[tuple[int, int], ...]
    rows: dict[int, npt.NDArray[np.float64]]

    def belongs_to(self, task: RowTask, state: tuple[tuple[int, int], ...]) -> bool:
        """Whether a task has the very rows of this one."""
        mine = self.task
        return (
            self.state == state
            and mine.prompt.inp is task.prompt.inp
            and mine.prompt.ids == task.prompt.ids
            and mine.generated == task.generated
            and mine.baseline == task.baseline
            and np.array_equal(mine.sources.groups, task.sources.groups)
            and np.array_equal(mine.steps.groups, task.steps.groups)
            and _same_kwargs(mine.kwargs, task.kwargs)
        )


def _same_kwargs(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    for key, value in one.items():
        if isinstance(value, Tensor):
            if not (isinstance(other[key], Tensor) and torch.equal(value, other[key])):
                return False
        elif value is not other[key] and value != other[key]:
            return False
    return True


def _model_state(model: Any) -> tuple[tuple[int, int], ...]:
    """Changes when a parameter of the model is replaced or written to."""
    if not isinstance(model, nn.Module):
        return ((id(model), 0),)
    return tuple((p.data_ptr(), p._version) for p in model.parameters())
