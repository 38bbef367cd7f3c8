"""Attribution of generated text through the text generated before it."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from inspect import signature
from itertools import cycle, islice
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from captum.attr import Attribution as CaptumAttribution
from captum.attr import InterpretableInput
from torch import Tensor

from captum_cage._captum import (
    CAPTUM_VERSION,
    DEFAULT_GEN_ARGS,
    LLMAttributionObject,
    base_method,
    check_attribution_object,
    check_kwargs,
    sent_to,
)
from captum_cage._checks import complaint, one_of, shown, whole_number
from captum_cage._placement import entry_device
from captum_cage._version import __version__
from captum_cage.contrast import Contrast, Foils, contrast_row, contrasts
from captum_cage.draws import DrawnRows
from captum_cage.estimate import Estimate, Estimator
from captum_cage.followup import Followup, Question
from captum_cage.graph import AttributionGraph, Normalization
from captum_cage.inputs import Prompt, baseline_id, target_ids
from captum_cage.methods.catalogue import is_random
from captum_cage.record import Description, described
from captum_cage.result import GraphAttributionResult
from captum_cage.rows import check_task
from captum_cage.scoring import (
    check_baseline,
    check_model,
    check_sequence,
    generate_ids,
    held,
    log_probabilities,
    most_new_tokens,
)
from captum_cage.spans import Explain, explained_units
from captum_cage.spool import folder_of
from captum_cage.strategy import (
    Approximation,
    RowStore,
    Strategy,
    StrategyName,
    fill,
)
from captum_cage.task import RowTask, check_possible, text_units
from captum_cage.text import special_ids
from captum_cage.thinking import Think
from captum_cage.units import Granularity, split_units

__all__ = ["GraphContextAttribution"]

logger = logging.getLogger(__name__)

NORMALIZATIONS = ("positive", "absolute", "signed")
STRATEGIES = ("auto", "loop", "fused")


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

    Source: Walker and Ewetz (2025), :cite:p:`walker2025cage`.

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
        self.llm_attr = _placed(llm_attr)
        self.normalization: Normalization = normalization
        self.generated_baseline = generated_baseline
        self._unfinished: RowStore | None = None
        self._finished: list[RowStore] = []  # draws of an interrupted call
        self._told: set[str] = set()

    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Sequence[int] | Tensor | None = None,
        *,
        explain: Explain = None,
        units: Granularity = "token",
        foil: Foils | None = None,
        gen_args: Mapping[str, Any] | None = None,
        think: Think = "auto",
        strategy: StrategyName = "auto",
        tolerance: float = 0.0,
        hops: int | None = None,
        sparsify: float | None = None,
        draws: int = 1,
        batch_size: int | None = None,
        spool: str | os.PathLike[str] | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> GraphAttributionResult:
        """Explain generated text by its sources.

        An interrupted call is not lost: the same call on the same object goes on from
        the rows that were finished; with ``spool``, so does another process.

        Args:
            inp (InterpretableInput): the prompt: any input that the wrapped object
                takes, or a ``TokenIdsInput`` or ``ChatTokenInput``.
            target (str or Sequence[int] or Tensor, optional): the generated text, as
                text or as token ids. None lets the model generate it, once; the ids
                that it generated are used as they are. Default: ``None``
            explain (optional): what to explain. None for all of it; an int, a slice or
                ``(start, stop)`` of generated units; a substring of the generated text,
                whose *last* occurrence counts; a compiled regular expression, whose
                last visible match counts; ``Part.ANSWER`` or ``Part.THINK`` of a
                reasoning model's text. Default: ``None``
            units (optional): the nodes of the graph: ``"token"``, ``"word"``,
                ``"sentence"``, ``"message"``, a function from a text to character
                ranges, character ranges in the whole text (prompt followed by
                generated text), or a mapping with one of these for ``"source"`` and
                for ``"generated"``. Features that are no single tokens, such as the
                segments of a template, are source units as they are.
                Default: ``"token"``
            foil (Mapping, optional): why this and not that: what might stand in the
                place of something generated, as ``{place: foil}``. A place is the
                position of a generated unit, a text in it or a pattern; a foil is a
                text, an id or several. The row of such a unit becomes the row of what
                was written less the row of the foil after the same text; the rows
                behind it stay as they are. These units are explained unless
                ``explain`` names more. Default: ``None``
            gen_args (Mapping, optional): for the model's ``generate`` where ``target``
                is None. Default: Captum's own: greedy, 25 tokens
            think (optional): where a reasoning model's thoughts stand in what follows
                the prompt: ``"auto"`` for the tokenizer's own markers, a pair of
                markers, a range of characters or several, or None for nowhere.
                Default: ``"auto"``
            strategy (str, optional): how the rows are computed. ``"loop"`` asks the
                wrapped object once per generated unit. ``"fused"`` computes the same
                rows all at once by an engine, see :func:`register_engine`; random
                methods draw other samples of the same distribution. ``"auto"`` takes
                an engine where there is one and otherwise the loop, which it logs
                once. Default: ``"auto"``
            tolerance (float, optional): share of the explained mass, in [0, 1), that
                may stay on rows that are not computed; ``result.unresolved`` says how
                much did. Saves work where rows are computed one by one, by the loop or
                a gradient engine. Default: ``0.0``, all rows
            hops (int, optional): follow at most this many passes through generated
                units; 0 gives the direct rows. What is cut is in
                ``result.unresolved``. Default: ``None``, paths of any length
            sparsify (float, optional): keep of each row the fewest entries that hold
                this share of its mass, in (0, 1]; what is dropped is in
                ``result.unresolved``. For texts of thousands of tokens.
                Default: ``None``, all entries
            draws (int, optional): how often a random method draws its rows. The graph
                is that of their mean, and ``result.intervals()`` says how sure the
                scores are. Default: ``1``
            batch_size (int, optional): most sequences that an engine gives the model
                at once. Default: ``None``, chosen by the memory that is free
            spool (str or PathLike, optional): a folder that finished rows are written
                to as they come. They survive a kill of the process, and the same call
                with the same folder goes on from them; of a random method, rows that
                were drawn stay, and the others are drawn by the random state of then.
                Rows of another model, text or setting are refused. It may be deleted
                when the call has ended. See :class:`captum_cage.spool.RowSpool`.
                Default: ``None``, in memory
            show_progress (bool, optional): show a progress bar on stderr.
                Default: ``False``
            **kwargs: for the wrapped object's ``attribute``, such as ``n_steps``.
                ``baselines`` are those of the prompt's features.

        Returns:
            GraphAttributionResult: scores, graph and texts.

        Raises:
            TypeError: if an argument is of the wrong kind or unknown.
            ValueError: if there is nothing to explain or to attribute to, the text does
                not fit the model, the base method cannot do what is asked, or the spool
                holds other rows.
            OSError: if the spool cannot be written, or another process writes to it.
        """
        asked = _Asked(
            explain, units, foil, think, strategy, tolerance, hops, sparsify, draws
        )
        prompt = self._checked_prompt(inp, asked, batch_size, kwargs)
        with held(self.llm_attr):
            generated = self._target_ids(prompt, target, gen_args)
            task, question = self._question(prompt, generated, asked, kwargs)
            task = replace(task, batch_size=batch_size, show_progress=show_progress)
            return self.answer(task, question, spool)

    def estimate(
        self,
        inp: InterpretableInput,
        target: str | Sequence[int] | Tensor | None = None,
        *,
        calibration: int = 6,
        **options: Any,
    ) -> Estimate:
        """What the same call of :meth:`attribute` would cost, before it is made.

        An engine is rehearsed: it goes through the very task, but of its passes through
        the model only a few are made and timed, one of each size; the others are
        counted. Of the loop and of engines of your own a few rows are begun. Nothing
        is changed by it: the model, random numbers and what an interrupted call left
        are as before.

        Where ``target`` is None the text is not generated. A text of ``max_new_tokens``
        tokens with units like the prompt's stands for it, so what comes out is an upper
        bound; ``explain`` is not looked up in it.

        Args:
            inp (InterpretableInput): the prompt, as in :meth:`attribute`.
            target (str or Sequence[int] or Tensor, optional): the generated text.
                Default: ``None``
            calibration (int, optional): most passes of one kind, forward or backward,
                that are made and timed. Default: ``6``
            **options: all others that :meth:`attribute` takes, with its defaults. Rows
                that a ``spool`` holds already are counted, too.

        Returns:
            Estimate: rows, passes, tokens, seconds and bytes.

        Raises:
            TypeError: if an argument is of the wrong kind or unknown.
            ValueError: if ``attribute`` would refuse the call, or ``foil`` names a text
                where there is no target.

        Example:
            >>> from captum.attr import FeatureAblation, LLMAttribution
            >>> from captum_cage import GraphContextAttribution, TokenIdsInput
            >>> from captum_cage.demo import load_demo
            >>> model, tokenizer = load_demo()
            >>> cage = GraphContextAttribution(
            ...     LLMAttribution(FeatureAblation(model), tokenizer)
            ... )
            >>> ids = tokenizer("Ana has 3 pens. How many are they?").input_ids
            >>> estimate = cage.estimate(
            ...     TokenIdsInput(ids, tokenizer), " Ana has 3 pens.", units="word"
            ... )
            >>> estimate.rows, estimate.strategy
            (4, 'fused')
        """
        whole_number(
            "calibration",
            calibration,
            minimum=1,
            remedy="Pass how many passes to time at most.",
        )
        start = time.perf_counter()
        given = _options(options)
        kwargs, batch_size = given["kwargs"], given["batch_size"]
        asked = _Asked(**{one.name: given[one.name] for one in fields(_Asked)})
        prompt = self._checked_prompt(inp, asked, batch_size, kwargs)
        gen_args = given["gen_args"]
        count = 0
        with held(self.llm_attr):
            if target is None and not _is_whole(prompt):
                asked = _without_text(asked)
                count = most_new_tokens(self.llm_attr, prompt, gen_args)
                generated = _placeholder(prompt, count, self.llm_attr.tokenizer)
            else:
                generated = self._target_ids(prompt, target, gen_args)
            task, question = self._question(prompt, generated, asked, kwargs)
            task = replace(task, batch_size=batch_size)
            check_task(task)

            def generate(tokens: int) -> list[int]:
                arguments = dict(DEFAULT_GEN_ARGS if gen_args is None else gen_args)
                arguments |= {"max_new_tokens": tokens}
                return generate_ids(self.llm_attr, prompt, arguments)

            took = time.perf_counter() - start
            estimator = Estimator(task, asked.strategy, self._told, calibration)
            return estimator.estimate(
                question.explained,
                question.contrasts,
                question.approximation,
                question.draws,
                generate,
                count,
                took,
            )

    def _checked_prompt(
        self,
        inp: InterpretableInput,
        asked: _Asked,
        batch_size: int | None,
        kwargs: Mapping[str, Any],
    ) -> Prompt:
        """The prompt, once all is checked that does not depend on the text."""
        one_of("strategy", asked.strategy, STRATEGIES)
        approximation = asked.approximation
        _check_batch_size(batch_size)
        _check_draws(self.llm_attr, inp, asked.draws, approximation)
        check_kwargs(self.llm_attr, kwargs)
        split_units(asked.units)
        prompt = Prompt.read(inp, self.llm_attr.tokenizer)
        check_sequence(self.llm_attr, prompt.ids, [])
        return prompt

    def _question(
        self,
        prompt: Prompt,
        generated: list[int],
        asked: _Asked,
        kwargs: Mapping[str, Any],
    ) -> tuple[RowTask, Question]:
        """What is asked, about a text that is known."""
        check_sequence(self.llm_attr, prompt.ids, generated)
        sides = split_units(asked.units)
        task = self._task(prompt, generated, sides, asked.think, kwargs)
        check_baseline(self.llm_attr, task.baseline)
        foiled = () if asked.foil is None else contrasts(task, asked.foil)
        return task, Question(
            _explained(task, asked.explain, foiled),
            foiled,
            asked.strategy,
            asked.approximation,
            asked.draws,
            asked.units if isinstance(asked.units, str) else "own",
        )

    def answer(
        self,
        task: RowTask,
        question: Question,
        spool: str | os.PathLike[str] | None = None,
    ) -> GraphAttributionResult:
        """The answer to a question whose units are known, as follow-up questions ask.

        Args:
            task (RowTask): the texts and their units.
            question (Question): what is asked about them.
            spool (str or PathLike, optional): a folder for finished rows.
                Default: ``None``

        Returns:
            GraphAttributionResult: scores, graph and texts.

        Raises:
            TypeError: if the base method cannot read this input.
            ValueError: if it cannot do what is asked.
        """
        with held(self.llm_attr):
            check_task(task)
            way = Strategy(task, question.strategy, self._told)
            # An engine that perturbs scores the plain text itself.
            if way.by_row and "scores" not in task.kept:
                task.kept["scores"] = self._scores(task)
                check_possible(task, task.kept["scores"])
            about = self._description(task, question, way.name)
            kept_in = None if spool is None else _Spooling(spool, about)
            graph, drawn = self._graph(way, question, kept_in)
            scores = way.task.kept.get("scores")
            if scores is None:
                scores = self._scores(task)
        logs = task.unit_sums(scores)[task.written]
        about = replace(about, meta=self._meta(question, way.name))
        return GraphAttributionResult(
            graph,
            **vars(about),
            output_probs=torch.from_numpy(np.exp(logs)),
            drawn=drawn,
            inp=task.prompt.inp,
            followup=Followup(self, task, question),
        )

    def _description(
        self, task: RowTask, question: Question, strategy: str
    ) -> Description:
        trace = task.prompt.continuation
        return Description(
            units=(*task.sources.units, *task.steps.units),
            explained=question.explained,
            source_text=task.prompt.text.text,
            generated_text=task.generated_text.text,
            breaks=tuple(task.prompt.breaks),
            generated_breaks=(
                *(() if trace is None else trace.all_breaks),
                *task.thinking.breaks,
            ),
            thinking=task.thinking,
            foils=tuple(contrast.foil for contrast in question.contrasts),
            hops=question.approximation.hops,
            meta=self._meta(question, strategy),
        )

    def _scores(self, task: RowTask) -> npt.NDArray[np.float64]:
        return log_probabilities(self.llm_attr, task.prompt, task.generated)

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
        """Ids of all that follows the prompt."""
        trace = prompt.continuation
        before = [] if trace is None else list(trace.ids)
        is_whole = _is_whole(prompt)
        if target is None and not is_whole:
            return [*before, *generate_ids(self.llm_attr, prompt, gen_args)]
        if gen_args is not None:
            raise ValueError(
                "gen_args: must be None where target is given or the trace ends with a "
                "generated turn, since nothing is generated. Leave one of them out."
            )
        if target is None:
            return before
        if is_whole:
            raise ValueError(
                complaint(
                    "target",
                    "must be None where the trace ends with a generated turn",
                    f"{shown(target)} came",
                    "Leave it out, or leave the last turn out of the trace.",
                )
            )
        return [*before, *target_ids(target, self.llm_attr.tokenizer)]

    def _task(
        self,
        prompt: Prompt,
        generated: list[int],
        sides: Mapping[str, Any],
        think: Think,
        kwargs: Mapping[str, Any],
    ) -> RowTask:
        tokenizer = self.llm_attr.tokenizer
        found = text_units(prompt, generated, sides, tokenizer, think)
        return RowTask(
            llm_attr=self.llm_attr,
            prompt=prompt,
            generated=tuple(generated),
            generated_text=found.text,
            sources=found.sources,
            steps=found.steps,
            thinking=found.thinking,
            baseline=baseline_id(self.generated_baseline, prompt.inp, tokenizer),
            kwargs=dict(kwargs),
        )

    def _graph(
        self, way: Strategy, question: Question, spool: _Spooling | None
    ) -> tuple[AttributionGraph, DrawnRows | None]:
        """The graph, and the rows of each draw where there are several."""
        if question.draws == 1:
            return self._drawn(way, question, spool).graph(), None
        stores = self._draws_of(way.task, question)[: question.draws]
        while len(stores) < question.draws:
            task = replace(way.task, kept={**_scores_of(way.task)})
            fresh = Strategy(task, question.strategy, self._told)
            part = None if spool is None else spool.of_draw(len(stores))
            try:
                stores.append(self._drawn(fresh, question, part))
            except BaseException:
                self._finished = stores
                raise
            way.task.kept.update(_scores_of(task))
        self._finished = []
        drawn = DrawnRows.of([store.graph() for store in stores])
        return drawn.mean_graph(), drawn

    def _draws_of(self, task: RowTask, question: Question) -> list[RowStore]:
        """Draws of an interrupted call with the very rows of this one."""
        finished, self._finished = self._finished, []
        wanted = self._store(task, question)
        return [store for store in finished if store.has_rows_of(wanted)]

    def _store(self, task: RowTask, question: Question) -> RowStore:
        return RowStore.of(
            task,
            self.normalization,
            question.approximation.sparsify,
            question.contrasts,
            self._unfinished,
        )

    def _drawn(
        self, way: Strategy, question: Question, spool: _Spooling | None
    ) -> RowStore:
        """Rows that answer a question; finished ones are kept when interrupted."""
        task = way.task
        store = self._store(task, question)
        if store is self._unfinished:
            # What an engine finished before the interrupt is of use, too.
            task.kept.update(store.task.kept)
        if spool is not None:
            store = store.spooled(spool.folder, described(spool.about))
        self._unfinished = None
        weights = np.zeros(len(task.steps))
        weights[task.written[list(question.explained)]] = 1.0
        try:
            for contrast in question.contrasts:
                if contrast.step not in store.starts and question.must_start(way):
                    self._start(store, contrast, question)
            fill(store, way, weights, question.approximation, task.show_progress)
            for contrast in question.contrasts:
                if contrast.step not in store.starts:
                    self._start(store, contrast, question)
        except BaseException:
            store.task.kept.update(task.kept)
            self._unfinished = store.in_memory()
            if store.rows:
                logger.warning(
                    "stopped after %d of %d rows; the same call goes on from there",
                    len(store.rows),
                    len(task.written),
                )
            raise
        finally:
            store.close()
        return store

    def _start(self, store: RowStore, contrast: Contrast, question: Question) -> None:
        plain = store.complete_row(contrast.step)
        row = contrast_row(store.task, contrast, question.strategy, self._told, plain)
        store.starts[contrast.step] = row, None, 1.0

    def _meta(self, question: Question, strategy: str) -> dict[str, Any]:
        model = self.llm_attr.model
        name = getattr(getattr(model, "config", None), "name_or_path", "")
        provider = getattr(self.llm_attr, "provider", None)
        name = name or getattr(provider, "model_name", None)
        return {
            "method": base_method(self.llm_attr),
            "model": name or type(model).__name__,
            "units": question.units,
            "strategy": strategy,
            "tolerance": question.approximation.tolerance,
            "sparsify": question.approximation.sparsify,
            "versions": {
                "captum_cage": __version__,
                "captum": CAPTUM_VERSION,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


@dataclass(frozen=True)
class _Spooling:
    """Where finished rows are kept, and what a result has besides them."""

    folder: str | os.PathLike[str]
    about: Description

    def of_draw(self, number: int) -> _Spooling:
        """The same for the rows of one draw of several."""
        return replace(self, folder=folder_of("spool", self.folder) / f"draw-{number}")


@dataclass(frozen=True)
class _Asked:
    """What a call asks, before the text is known."""

    explain: Explain
    units: Granularity
    foil: Foils | None
    think: Think
    strategy: StrategyName
    tolerance: float
    hops: int | None
    sparsify: float | None
    draws: int

    @property
    def approximation(self) -> Approximation:
        """What may be left out, checked."""
        return _approximation(self.tolerance, self.hops, self.sparsify)


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``attribute`` with its defaults; others under ``"kwargs"``."""
    call = signature(GraphContextAttribution.attribute).bind(None, None, **options)
    call.apply_defaults()
    return call.arguments


def _is_whole(prompt: Prompt) -> bool:
    """Whether the text to explain is part of the input already."""
    trace = prompt.continuation
    return trace is not None and trace.ends_generated


def _without_text(asked: _Asked) -> _Asked:
    """The question about a text that is not known; its places are left out."""
    foil = asked.foil
    if foil is not None and not all(isinstance(place, int) for place in foil):
        raise ValueError(
            complaint(
                "foil",
                "must name places by their numbers where the text is not known yet",
                f"{shown(list(foil))} came",
                "Pass the text as target to estimate what it costs.",
            )
        )
    is_place = isinstance(asked.explain, int | slice | tuple)
    return asked if is_place else replace(asked, explain=None)


def _placeholder(prompt: Prompt, count: int, tokenizer: Any) -> list[int]:
    """Ids in the place of those that are not generated yet, like the prompt's."""
    trace = prompt.continuation
    before = [] if trace is None else list(trace.ids)
    special = special_ids(tokenizer)
    like = [i for i in prompt.ids if i >= 0 and i not in special] or [0]
    return [*before, *islice(cycle(like), count)]


def _scores_of(task: RowTask) -> dict[str, Any]:
    """The scores of the plain text, which every draw shares."""
    scores = task.kept.get("scores")
    return {} if scores is None else {"scores": scores}


def _explained(
    task: RowTask, explain: Explain, asked: Sequence[Contrast]
) -> tuple[int, ...]:
    """Positions of the explained generated units."""
    steps = [task.steps.units[step] for step in task.written]
    text = task.generated_text.text
    foiled = tuple(contrast.foil.unit for contrast in asked)
    if asked and explain is None:
        return foiled
    explained = explained_units(explain, steps, text, task.thinking)
    for contrast in asked:
        if contrast.foil.unit not in explained:
            raise ValueError(
                complaint(
                    "foil",
                    "must be about units that are explained",
                    f"{contrast.foil}, in unit {contrast.foil.unit}, came",
                    "Leave explain out: with a foil, its own unit is explained.",
                )
            )
    return explained


def _approximation(tolerance: Any, hops: int | None, sparsify: Any) -> Approximation:
    """The approximations that the user asked for, checked."""
    if not _is_share(tolerance) or not 0.0 <= tolerance < 1.0:
        raise ValueError(
            complaint(
                "tolerance",
                "must be a share of the explained mass, 0 or more and less than 1",
                f"{shown(tolerance)} came",
                "Pass 0.01 to leave at most 1% open.",
            )
        )
    if sparsify is not None and not (_is_share(sparsify) and 0.0 < sparsify <= 1.0):
        raise ValueError(
            complaint(
                "sparsify",
                "must be a share of each row's mass, more than 0 and at most 1",
                f"{shown(sparsify)} came",
                "Pass 0.99 to keep 99% of it, or None for all entries.",
            )
        )
    if hops is not None:
        remedy = "Pass the number of passes; 0 gives the direct rows."
        hops = whole_number("hops", hops, remedy=remedy)
    return Approximation(
        float(tolerance), hops, None if sparsify is None else float(sparsify)
    )


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _placed(llm_attr: LLMAttributionObject) -> LLMAttributionObject:
    """A copy of an object, which sends ids to where its model takes them.

    Captum sends them to where the model says that it is, which is nowhere if its first
    weights are kept elsewhere. A device that the user has set stays.
    """
    model: Any = llm_attr.model
    given = torch.device(llm_attr.device)
    said = getattr(model, "device", None)
    guessed = given.type == "meta" or (said is not None and given == torch.device(said))
    device = entry_device(model) if guessed else given
    return copy.copy(llm_attr) if device == given else sent_to(llm_attr, device)


def _check_draws(
    llm_attr: LLMAttributionObject,
    inp: Any,
    draws: Any,
    approximation: Approximation,
) -> None:
    number = whole_number(
        "draws", draws, minimum=1, remedy="Pass how often to draw the rows."
    )
    if number > 1 and not is_random(type(llm_attr.attr_method), inp):
        raise ValueError(
            complaint(
                "draws",
                "must be 1 for a method that does not sample",
                f"{number} came for {base_method(llm_attr)}",
                "Leave it out: each draw would be the same.",
            )
        )
    if number > 1 and (approximation.tolerance or approximation.sparsify):
        raise ValueError(
            complaint(
                "draws",
                "must be 1 where rows are left out or cut",
                f"{number} came, with tolerance={approximation.tolerance} and "
                f"sparsify={approximation.sparsify}",
                "Leave these out, so that the draws have the same entries.",
            )
        )


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None:
        remedy = "Pass the number of sequences, or None to have it chosen."
        whole_number("batch_size", batch_size, minimum=1, remedy=remedy)
