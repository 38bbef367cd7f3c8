"""The answer: marginalised attributions, and the graph that they come from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import InterpretableInput, LLMAttributionResult
from scipy.sparse import issparse
from torch import Tensor

from captum_cage import record
from captum_cage._checks import complaint, whole_number
from captum_cage.archive import LIMIT, not_a_result, replacing, write
from captum_cage.draws import DrawnRows
from captum_cage.graph import AttributionGraph, Parts
from captum_cage.solve import Path
from captum_cage.spans import Explain, explained_units
from captum_cage.text import TokenText, harmless
from captum_cage.thinking import Part, Thinking
from captum_cage.units import (
    Granularity,
    Unit,
    Units,
    group_tokens,
    split_ranges,
    split_units,
)

__all__ = ["GraphAttributionResult", "TextPath"]


@dataclass(frozen=True)
class TextPath(Path):
    """A path with the text of its units.

    Attributes:
        texts (tuple[str, ...]): text of each unit, from the explained one on.
        share (float): part of the explained mass that takes this path.
    """

    texts: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        steps = " <- ".join(json.dumps(text, ensure_ascii=False) for text in self.texts)
        return f"{harmless(steps, one_line=True)} ({self.share:.1%})"


@dataclass(frozen=True)
class Intervals:
    """How sure scores are that come from random draws.

    Attributes:
        low (numpy.ndarray): lower end for each source unit, shape ``(P,)``.
        high (numpy.ndarray): upper end, shape ``(P,)``.
        standard_error (numpy.ndarray): shape ``(P,)``.
        level (float): share of repetitions whose interval is expected to hold what
            infinitely many draws would give.
        draws (int): number of draws.
    """

    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    standard_error: npt.NDArray[np.float64]
    level: float
    draws: int


class FollowUp(Protocol):
    """What answers questions that need the model again."""

    def alternatives(self, position: Any, k: int) -> list[Any]:
        """What else the model might have written."""

    def refine(
        self, result: GraphAttributionResult, top: int, to: Any, side: str
    ) -> GraphAttributionResult:
        """The result with its heaviest units split."""

    def refine_cost(
        self, result: GraphAttributionResult, top: int, to: Any, side: str
    ) -> int | None:
        """Most sequences that refining gives the model."""

    def verify_path(
        self, result: GraphAttributionResult, path: Any, **options: Any
    ) -> Any:
        """Whether a path is real."""

    def evaluator(self, result: GraphAttributionResult, **options: Any) -> Any:
        """What tests attributions of the same text."""

    def repeat(self, result: GraphAttributionResult) -> GraphAttributionResult:
        """The same question asked anew."""


class GraphAttributionResult(LLMAttributionResult):
    """Attribution of generated text to its sources along all paths.

    A ``captum.attr.LLMAttributionResult``, so its plots and everything that takes one
    work. ``P`` is the number of source units, ``G`` of generated units.

    Args:
        graph (AttributionGraph): the graph, sources first.
        units (Sequence[Unit]): its ``P + G`` units.
        explained (Sequence[int]): positions of the explained generated units.
        source_text (str): text of the prompt.
        generated_text (str): text that follows it: what was generated and, in a trace,
            the text from outside in between.
        output_probs (ArrayLike, optional): probability of each generated unit given
            everything before it, shape ``(G,)``. Default: ``None``
        breaks (Sequence[int], optional): characters of the source text that no unit
            reaches across. Default: ``()``
        generated_breaks (Sequence[int], optional): the same of the generated text.
            Default: ``()``
        meta (Mapping, optional): how the result was made, JSON values only.
            Default: ``None``
        inp (InterpretableInput, optional): the input. Default: ``None``
        hops (int, optional): count only paths with at most this many passes through
            generated units. Default: ``None``, paths of any length
        thinking (Thinking, optional): where a reasoning model's thoughts and its answer
            stand in the generated text. Default: nowhere
        foils (Sequence[Foil], optional): what rows are contrasted with.
            Default: ``()``
        drawn (DrawnRows, optional): the rows of each draw of a random method.
            Default: ``None``
        followup (FollowUp, optional): asks the model again. Default: ``None``

    Raises:
        TypeError: if ``hops`` is not a whole number, ``explained`` holds anything
            else, or ``meta`` holds no JSON values.
        ValueError: if ``hops`` is negative, or ``explained`` does not rise or names no
            generated unit.

    Attributes:
        graph (AttributionGraph): the graph.
        units (tuple[Unit, ...]): its units in reading order, with text and character
            range. Those before the first generated one stand in ``source_text``, the
            others in ``generated_text``.
        explained (tuple[int, ...]): positions of the explained generated units.
        weights (numpy.ndarray): 1 for each explained unit, else 0. Shape ``(G,)``.
        source_text (str): text of the prompt.
        generated_text (str): text that follows it.
        meta (dict): base method, units, versions.
        input_tokens (list[str]): text of the source units.
        output_tokens (list[str]): text of the generated units.
        output_probs (Tensor or None): probability of each generated unit, ``(G,)``.
        hops (int or None): number of passes after which paths are cut.
        thinking (Thinking): where the thoughts and the answer stand.
        foils (tuple[Foil, ...]): what rows are contrasted with.
        drawn (DrawnRows or None): the rows of each draw.

    Source: Walker and Ewetz (2025), :cite:p:`walker2025cage`.
    """

    # Of Captum, which ships no types.
    input_tokens: list[str]
    output_tokens: list[str]
    seq_attr: Tensor

    def __init__(
        self,
        graph: AttributionGraph,
        units: Sequence[Unit],
        explained: Sequence[int],
        *,
        source_text: str,
        generated_text: str,
        output_probs: npt.ArrayLike | None = None,
        breaks: Sequence[int] = (),
        generated_breaks: Sequence[int] = (),
        meta: Mapping[str, Any] | None = None,
        inp: InterpretableInput | None = None,
        hops: int | None = None,
        thinking: Thinking | None = None,
        foils: Sequence[Any] = (),
        drawn: DrawnRows | None = None,
        followup: FollowUp | None = None,
    ) -> None:
        if hops is not None:
            remedy = "Pass the number of passes; 0 gives the direct rows."
            hops = whole_number("hops", hops, remedy=remedy)
        self.graph = graph
        self.units = tuple(units)
        self.explained = _checked_steps(explained, graph.n_generated)
        self.weights = np.zeros(graph.n_generated)
        self.weights[list(self.explained)] = 1.0
        self.source_text = source_text
        self.generated_text = generated_text
        self.breaks = tuple(breaks)
        self.generated_breaks = tuple(generated_breaks)
        self.meta = dict(meta or {})
        _check_meta(self.meta)
        self.hops = hops
        self.thinking = Thinking.none() if thinking is None else thinking
        self.foils = tuple(foils)
        self.drawn = drawn
        self._followup = followup
        super().__init__(
            input_tokens=[unit.text for unit in self.units if not unit.generated],
            output_tokens=[unit.text for unit in self.units if unit.generated],
            seq_attr=torch.from_numpy(
                graph.explain(self.weights)
                if hops is None
                else graph.hops(self.weights, hops).attr
            ),
            output_probs=output_probs,
            inp=inp,
        )

    # Results compare by identity, as tensors have no single truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle does not take the model along.
        return {**self.__dict__, "_followup": None}

    def __repr__(self) -> str:
        texts = [self.output_tokens[step] for step in self.explained]
        shown = "".join(texts) if len(texts) == 1 else f"{len(texts)} units"
        lacks = f", unresolved={self.unresolved:.3g}" if self.unresolved > 0 else ""
        return (
            f"{type(self).__name__}(P={self.graph.n_sources}, "
            f"G={self.graph.n_generated}, explained={shown!r}, "
            f"leaked={self.leaked:.3g}{lacks})"
        )

    @property
    def token_attr(self) -> Tensor:
        """Marginals of every generated unit, cut at ``hops``; ``(G, P)``, float64."""
        return self._marginals

    @token_attr.setter
    def token_attr(self, token_attr: None) -> None:
        # Captum's constructor sets it; it is computed when it is first asked for.
        self._token_attr = token_attr

    @cached_property
    def _marginals(self) -> Tensor:
        return torch.from_numpy(self.graph.marginals(hops=self.hops))

    @property
    def seq_attr_dict(self) -> dict[str, float]:
        """Score of each source unit by its text; a repeated text gets a number."""
        scores: dict[str, float] = {}
        for text, score in zip(self.input_tokens, self.seq_attr.tolist(), strict=True):
            key, count = text, 1
            while key in scores:
                count += 1
                key = f"{text} ({count})"
            scores[key] = score
        return scores

    @cached_property
    def direct(self) -> LLMAttributionResult:
        """The explained units' own rows without the graph, as a plain Captum result."""
        to_sources, _ = self.graph.blocks()
        return self._plain(self.weights @ to_sources)

    @cached_property
    def sequence(self) -> LLMAttributionResult:
        """All rows summed, whatever is explained, as a plain Captum result."""
        to_sources, _ = self.graph.blocks()
        return self._plain(np.ones(self.graph.n_generated) @ to_sources)

    def _plain(self, seq_attr: npt.NDArray[np.float64]) -> LLMAttributionResult:
        to_sources, _ = self.graph.blocks()
        return LLMAttributionResult(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            seq_attr=torch.from_numpy(np.array(seq_attr)),
            token_attr=torch.from_numpy(to_sources.toarray()),
            output_probs=self.output_probs,
            inp=self.inp,
        )

    @cached_property
    def step_attr(self) -> Tensor:
        """Mass that passes through each generated unit, shape ``(G,)``, float64.

        Solves ``(I - L)^T y = w``, or cuts its series after ``hops`` passes.
        """
        return torch.from_numpy(self.graph.throughput(self.weights, hops=self.hops))

    @cached_property
    def leaked(self) -> float:
        """Mass that ends in rows without mass, within ``hops`` passes.

        The sum of ``step_attr * graph.leak``. In ``positive`` and ``absolute``,
        ``seq_attr.sum() + leaked + unresolved`` is the number of explained units.
        """
        return self.graph.leaked(self.weights, hops=self.hops)

    @cached_property
    def unresolved(self) -> float:
        """Mass that rows that were not computed, or not wholly, and ``hops`` left open.

        Not negative; exactly 0 where nothing was left out or cut. It bounds the sum of
        the absolute differences of ``seq_attr`` to what complete rows and paths of any
        length would give; in ``positive`` and ``absolute`` no true score is below
        ``seq_attr``. See `AttributionGraph.unresolved`.
        """
        return self.graph.unresolved(self.weights, hops=self.hops)

    @property
    def rows_computed(self) -> int:
        """Number of generated units whose row was computed, 0 to ``G``."""
        return int(np.count_nonzero(self.graph.left_out < 1.0))

    @cached_property
    def positive_attr(self) -> Tensor:
        """Mass of the paths that argue for the explained units, ``(P,)``, float64.

        Those whose product is positive. ``positive_attr - negative_attr`` is
        ``seq_attr``; in ``positive`` and ``absolute`` all paths are of this kind.
        """
        return torch.from_numpy(self._parts.positive)

    @cached_property
    def negative_attr(self) -> Tensor:
        """Mass of the paths that argue against them, ``(P,)``, float64, not negative.

        Only in ``signed``; elsewhere zero.
        """
        return torch.from_numpy(self._parts.negative)

    @cached_property
    def _parts(self) -> Parts:
        return self.graph.explain_parts(self.weights, hops=self.hops)

    @cached_property
    def step_parts(self) -> tuple[Tensor, Tensor]:
        """Mass through each generated unit for and against, ``(G,)`` each, float64.

        ``step_attr`` is the first less the second.
        """
        parts = self.graph.throughput_parts(self.weights, hops=self.hops)
        return torch.from_numpy(parts.positive), torch.from_numpy(parts.negative)

    def share_through(self, span: Explain = Part.THINK) -> float:
        """Share of the explained mass that passes through some generated units.

        Of all paths, those that visit at least one of the units, each counted once. For
        a reasoning model, ``result.explaining(Part.ANSWER).share_through()`` says how
        much of its answer came through its thoughts. In ``signed``, of the absolute
        mass.

        Args:
            span (optional): which generated units, in any form that ``attribute`` takes
                as ``explain``. Default: the thoughts

        Returns:
            float: in [0, 1].

        Raises:
            ValueError: if it means no unit.
        """
        steps = list(self._steps_of(span))
        units = self.graph.generated_units[steps]
        return self.graph.share_through(self.weights, units, hops=self.hops)

    def _steps_of(self, span: Explain) -> tuple[int, ...]:
        steps = [unit for unit in self.units if unit.generated]
        return explained_units(span, steps, self.generated_text, self.thinking)

    def intervals(
        self, level: float = 0.95, *, resamples: int = 1000, seed: int = 0
    ) -> Intervals:
        """How sure ``seq_attr`` is, where a random method drew its rows several times.

        The draws are resampled, and each resample's mean rows are normalised and solved
        again, so that the uncertainty of every row goes through the graph. Of ``D``
        draws, ``D - 1`` are taken each time, which makes the variance of a mean right.

        Args:
            level (float, optional): coverage, in (0, 1). Default: ``0.95``
            resamples (int, optional): number of resamples. Default: ``1000``
            seed (int, optional): of the resampling. Default: ``0``

        Returns:
            Intervals: percentiles and standard errors, per source unit.

        Raises:
            ValueError: if the rows were drawn once, or ``level`` is out of range.

        Source: Efron (1979), :cite:p:`efron1979bootstrap`; Rao and Wu (1988),
        :cite:p:`rao1988resampling`.
        """
        if self.drawn is None:
            raise ValueError(
                "intervals: the rows must have been drawn more than once, but they "
                "were drawn once. Pass draws=10 to attribute, with a random method."
            )
        if not 0.0 < level < 1.0:
            raise ValueError(
                complaint(
                    "level", "must be in (0, 1)", f"{level} came", "Pass 0.95, say."
                )
            )
        remedy = "Pass the number of resamples, for example 1000."
        number = whole_number("resamples", resamples, minimum=2, remedy=remedy)
        found = np.stack(
            [
                graph.explain(self.weights)
                if self.hops is None
                else graph.hops(self.weights, self.hops).attr
                for graph in self.drawn.resampled(number, seed)
            ]
        )
        tail = (1.0 - level) / 2
        low, high = np.quantile(found, [tail, 1.0 - tail], axis=0)
        return Intervals(
            low, high, found.std(axis=0, ddof=1), level, len(self.drawn.rows)
        )

    def alternatives(self, position: Any = -1, k: int = 5) -> list[Any]:
        """What else the model might have written at a place, as foils to ask about.

        Args:
            position (optional): position of a generated unit, whose first token is
                meant, or a text in the generated text. Default: ``-1``, the last unit
            k (int, optional): number of candidates. Default: ``5``

        Returns:
            list[Alternative]: the model's next tokens there, the likeliest first, with
            id, text, probability, and whether it is what was written.

        Raises:
            TypeError: if the model is remote.
            ValueError: if there is no such place, or the result was loaded.
        """
        return self._again("alternatives").alternatives(position, k)

    def refine(
        self, top: int = 3, to: Granularity = "word", *, side: str = "source"
    ) -> GraphAttributionResult:
        """The same question with the heaviest units split into smaller ones.

        The other units stay as they are, so that it costs little more than the first
        time. What it may cost is told before, in sequences given to the model, on the
        log and by :meth:`refine_cost`; what it did cost stands in ``meta["refined"]``.

        Args:
            top (int, optional): number of units that are split: of those that the
                finer units divide, the heaviest. Default: ``3``
            to (optional): the finer units: ``"word"``, ``"token"``, ``"sentence"`` or a
                function from a text to character ranges. Default: ``"word"``
            side (str, optional): ``"source"``, ``"generated"`` (by the mass that passes
                through) or ``"both"``. Default: ``"source"``

        Returns:
            GraphAttributionResult: over the mixed units; it can be refined again.

        Raises:
            ValueError: if no unit can be split, or the result was loaded.

        Source: Monteiro Paes et al. (2024), :cite:p:`paes2024mexgen`; Liu et al.
        (2024), :cite:p:`liu2024attribot`.
        """
        return self._again("refine").refine(self, top, to, side)

    def refine_cost(
        self, top: int = 3, to: Granularity = "word", *, side: str = "source"
    ) -> int | None:
        """Most sequences that :meth:`refine` gives the model.

        None for a base method of which it is not known. The arguments are the same.
        """
        return self._again("refine_cost").refine_cost(self, top, to, side)

    def verify_path(self, path: Any, **options: Any) -> Any:
        """Whether a path is real: what happens when its source is taken away.

        See :class:`captum_cage.interventions.PathCheck`.

        Args:
            path (TextPath or Sequence[int]): a path of this result, or its units from
                the explained one to the source.
            **options: ``samples``, ``seed``, ``removal``, ``temperature`` and others,
                see :func:`captum_cage.interventions.verify_path`.

        Returns:
            PathCheck: predicted and measured change, and whether they agree.

        Raises:
            ValueError: if it is no path of this result, or the result was loaded.
        """
        return self._again("verify_path").verify_path(self, path, **options)

    def evaluate(
        self,
        metrics: str | Sequence[str] | None = None,
        *,
        others: Mapping[str, npt.ArrayLike] | None = None,
        gold: Sequence[Any] | None = None,
        **options: Any,
    ) -> Any:
        """Whether the result says what the model really used.

        Sources are taken away in the order of their scores, the model writes the text
        again, and what counts is whether the explained statement still comes out. The
        explained rows alone, all rows, one hop, the nearest sources first and random
        orders are always measured beside the result.

        Args:
            metrics (str or Sequence[str], optional): names, as
                :func:`captum_cage.metrics.metric_names` lists them, or the name of a
                value for all its metrics. Default: areas of texts written again and of
                the fixed text
            others (Mapping, optional): scores of the same sources from elsewhere, such
                as another library, by name. Default: None
            gold (Sequence, optional): sources that are known to matter, as positions or
                ranges of characters in the source text. Default: None
            **options: ``sources``, ``statement``, ``removal``, ``samples``, ``seed``
                and others, see :class:`captum_cage.metrics.Evaluator`.

        Returns:
            Evaluation: a score for each attribution and metric; ``print`` shows them.

        Raises:
            TypeError: if the model cannot generate, or an argument is of the wrong
                kind.
            ValueError: if the result was loaded, the statement does not hold of the
                text explained, or a metric is unknown.
        """
        tested = self.evaluator(**options)
        return tested.evaluate(self, metrics, gold, others=others or {})

    def evaluator(self, **options: Any) -> Any:
        """What tests attributions of the explained text, whoever made them.

        Asks the model once for each set of sources, however many attributions and
        metrics need it.

        Args:
            **options: see :class:`captum_cage.metrics.Evaluator`.

        Returns:
            Evaluator: see there.

        Raises:
            ValueError: if the result was loaded.
        """
        return self._again("evaluate").evaluator(self, **options)

    def repeat(self) -> GraphAttributionResult:
        """The same question about the same text, asked anew.

        All rows are computed again, as the model and the random state are now.

        Raises:
            ValueError: if the result was loaded.
        """
        return self._again("repeat").repeat(self)

    def _again(self, where: str) -> FollowUp:
        if self._followup is None:
            raise ValueError(
                f"{where}: must ask the model again, but this result was loaded from a "
                "file or copied and has none. Call attribute once more."
            )
        return self._followup

    def paths(self, k: int = 5, source: int | None = None) -> list[TextPath]:
        """The ``k`` heaviest paths from the explained units to the sources.

        Paths of any length through the rows that were computed, whatever ``hops`` is.

        Args:
            k (int, optional): number of paths. Default: ``5``
            source (int, optional): the source unit that they end in. Default: any

        Returns:
            list[TextPath]: at most ``k`` paths, the heaviest first.

        Raises:
            ValueError: if ``k`` is negative or there is no such source.
        """
        total = len(self.explained)
        return [
            TextPath(
                path.units,
                path.weight,
                tuple(self.units[unit].text for unit in path.units),
                path.weight / total,
            )
            for path in self.graph.best_paths(self.weights, source, k)
        ]

    def explaining(self, span: Explain) -> GraphAttributionResult:
        """The explanation of another span, without a model call.

        Args:
            span: which generated units, in any form that ``attribute`` takes as
                ``explain``.

        Returns:
            GraphAttributionResult: the same graph, cut at the same ``hops``; another
            question. Foils stay if their units are explained. Its ``unresolved`` is its
            own: rows that were not needed for this question may be missing for that
            one.
        """
        explained = self._steps_of(span)
        foiled = {foil.unit for foil in self.foils}
        is_same = foiled <= set(explained)
        return GraphAttributionResult(
            self.graph if is_same else self.graph.without_behind(),
            self.units,
            explained,
            source_text=self.source_text,
            generated_text=self.generated_text,
            output_probs=self.output_probs,
            breaks=self.breaks,
            generated_breaks=self.generated_breaks,
            meta=self.meta,
            inp=self.inp,
            hops=self.hops,
            thinking=self.thinking,
            foils=self.foils if is_same else (),
            drawn=self.drawn if is_same or not self.foils else None,
            followup=self._followup,
        )

    def by(self, units: Granularity) -> LLMAttributionResult:
        """The solved scores summed over larger units, for display.

        This is not the explanation that larger units would have had: for that, pass
        ``units`` to ``attribute``, which groups the rows before they are normalised
        and solved.

        Args:
            units: a granularity, as ``attribute`` takes it. Sources without a place in
                the text stay as they are.

        Returns:
            LLMAttributionResult: a plain Captum result over the larger units.
        """
        sources, steps = self.regrouped(units)
        columns = _indicator(sources)
        rows = _indicator(steps)
        probs = None
        if self.output_probs is not None:
            logs = torch.log(self.output_probs.double())
            probs = torch.exp(torch.from_numpy(rows) @ logs)
        return LLMAttributionResult(
            input_tokens=[unit.text for unit in sources.units],
            output_tokens=[unit.text for unit in steps.units],
            seq_attr=torch.from_numpy(columns) @ self.seq_attr,
            token_attr=torch.from_numpy(rows @ self.token_attr.numpy() @ columns.T),
            output_probs=probs,
            inp=self.inp,
        )

    def regrouped(self, units: Granularity) -> tuple[Units, Units]:
        """Larger source units and larger generated units, over the present ones.

        Args:
            units: a granularity, as ``attribute`` takes it.

        Returns:
            tuple[Units, Units]: of both, ``groups`` is the larger unit of each present
            one, shapes ``(P,)`` and ``(G,)``.
        """
        sides = split_units(units)
        outside = sides["source"]
        if sides["both"] is not None:
            cut = len(self.source_text)
            sides["source"], sides["generated"] = split_ranges(sides["both"], cut)
            outside = "token"  # ranges after the prompt are those of generated text
        first = int(self.graph.generated_units[0])
        prompt, later = self.units[:first], self.units[first:]
        parts = [
            _grouped(self.source_text, prompt, False, sides["source"], self.breaks)
        ]
        parts += [
            _grouped(
                self.generated_text,
                later,
                is_generated,
                granularity,
                self.generated_breaks,
            )
            for is_generated, granularity in (
                (False, outside),
                (True, sides["generated"]),
            )
        ]
        prompt_units, outside_units, steps = parts
        groups = [prompt_units.groups, outside_units.groups + len(prompt_units)]
        sources = Units(
            (*prompt_units.units, *outside_units.units), np.concatenate(groups)
        )
        return sources, steps

    def plot_graph(self, ax: Any = None, **options: Any) -> Any:
        """The units in reading order, and arcs by which their mass flows.

        See :func:`captum_cage.plot.plot_graph` for the options.
        """
        from captum_cage import plot  # noqa: PLC0415

        return plot.plot_graph(self, ax, **options)

    def plot_heatmap(self, ax: Any = None, **options: Any) -> Any:
        """What each generated unit owes to each source, as a map of colours.

        See :func:`captum_cage.plot.plot_heatmap` for the options.
        """
        from captum_cage import plot  # noqa: PLC0415

        return plot.plot_heatmap(self, ax, **options)

    def plot_sources(self, ax: Any = None, **options: Any) -> Any:
        """The heaviest sources as bars: one step back against along all paths.

        See :func:`captum_cage.plot.plot_sources` for the options.
        """
        from captum_cage import plot  # noqa: PLC0415

        return plot.plot_sources(self, ax, **options)

    def plot_hops(self, ax: Any = None, **options: Any) -> Any:
        """What has come to the sources after each number of steps.

        See :func:`captum_cage.plot.plot_hops` for the options.
        """
        from captum_cage import plot  # noqa: PLC0415

        return plot.plot_hops(self, ax, **options)

    def plot_token_attr(self, show: bool = False) -> Any:
        """Captum's plot of all generated tokens, of bounded size.

        See :func:`captum_cage.plot.plot_token_attr`.
        """
        from captum_cage import plot  # noqa: PLC0415

        return plot.plot_token_attr(self, show)

    def plot_seq_attr(self, show: bool = False) -> Any:
        """Captum's plot of the scores of all sources, of bounded size.

        See :func:`captum_cage.plot.plot_seq_attr`.
        """
        from captum_cage import plot  # noqa: PLC0415

        return plot.plot_seq_attr(self, show)

    def to_frame(self) -> Any:
        """A pandas data frame: a row for each explained unit and each source.

        See :func:`captum_cage.export.to_columns` for its columns. One-way.

        Raises:
            ImportError: without pandas.
        """
        from captum_cage import export  # noqa: PLC0415

        return export.to_frame(self)

    def to_networkx(self, *, keep: float = 1.0, most: int | None = None) -> Any:
        """The graph as a ``networkx.DiGraph``, with texts, places, shares and flow.

        See :func:`captum_cage.export.to_networkx`.
        """
        from captum_cage import export  # noqa: PLC0415

        return export.to_networkx(self, keep=keep, most=most)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write it in the form that the end of the file's name asks for.

        ``.json``, ``.npz`` and ``.safetensors``, which :meth:`load` reads; ``.graphml``
        for its graph; ``.csv`` and ``.dot``, one-way. See
        :func:`captum_cage.export.export`.

        Args:
            path (str or PathLike): the file; an existing one is replaced.

        Raises:
            ValueError: if it ends in anything else.
        """
        from captum_cage import export  # noqa: PLC0415

        export.export(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Everything in it as JSON values, scores included.

        What :meth:`to_json` writes, and :meth:`load` reads.
        """
        return {
            **record.header_of(self),
            "output_probs": None
            if self.output_probs is None
            else self.output_probs.tolist(),
            "seq_attr": self.seq_attr.tolist(),
            "direct": self.direct.seq_attr.tolist(),
            "sequence": self.sequence.seq_attr.tolist(),
            "step_attr": self.step_attr.tolist(),
            "positive_attr": self.positive_attr.tolist(),
            "negative_attr": self.negative_attr.tolist(),
            "leaked": self.leaked,
            "unresolved": self.unresolved,
            "kept": self.graph.kept.tolist() if self.graph.left_out.any() else None,
            "rows_computed": self.rows_computed,
            "paths": [
                {"units": list(path.units), "weight": path.weight}
                for path in self.paths(10)
            ],
            "rows": _dense(self.graph.rows).tolist(),
            "rows_sparse": issparse(self.graph.rows),
            "behind": None
            if self.graph.behind is None
            else {
                "steps": self.graph.behind.steps.tolist(),
                "rows": _dense(self.graph.behind.rows).tolist(),
                "kept": self.graph.behind.kept.tolist(),
            },
            "draws": 1 if self.drawn is None else len(self.drawn.rows),
            "drawn": None
            if self.drawn is None
            else {
                "rows": self.drawn.rows.tolist(),
                "steps": self.drawn.steps.tolist(),
                "behind": self.drawn.behind.tolist(),
            },
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str | None:
        """The result as JSON, which :meth:`load` reads.

        It holds the scores too, for readers other than this package; ``load`` computes
        them again from the rows. All numbers are exact.

        Args:
            path (str or PathLike, optional): the file; an existing one is replaced.
                Default: ``None``, no file

        Returns:
            str or None: the text in ASCII, if there is no file.
        """
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is None:
            return text
        with replacing(path) as partial:
            partial.write_text(text + "\n", encoding="ascii")
        return None

    def to_html(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        title: str | None = None,
        max_bytes: int | None = 1_000_000,
    ) -> str:
        """The result as one page, which needs neither network nor model.

        Whoever opens it can click on any generated text and sees at once where it comes
        from: the page holds the graph and solves it.

        Args:
            path (str or PathLike, optional): the file; an existing one is replaced.
                Default: None, no file
            title (str, optional): the page's title. Default: what is explained
            max_bytes (int, optional): size of the page. A graph that is too large for
                it keeps its heaviest entries, rounded down, and the page says how much
                mass that leaves unresolved. None for the whole graph. Default:
                ``1_000_000``

        Returns:
            str: the page.

        Raises:
            OSError: if the file cannot be written.
            ValueError: if ``max_bytes`` is below 1.
        """
        from captum_cage import html  # noqa: PLC0415 (it brings jinja2)

        text = html.page(self, title=title, max_bytes=max_bytes)
        if path is not None:
            with replacing(path) as partial:
                # As bytes: another end of line would be another hash of the script.
                partial.write_bytes(text.encode("utf-8"))
        return text

    def _repr_html_(self) -> str:
        # What notebooks show.
        from captum_cage import html  # noqa: PLC0415 (it brings jinja2)

        return html.frame(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to one file, which loads without the model.

        A NumPy archive of plain arrays and JSON; a name that ends in ``.safetensors``
        or ``.json`` gets that form. There is no pickle in any of them. The file is
        written beside its place first, so that an interrupt leaves no half file.

        Args:
            path (str or PathLike): the file; an existing one is replaced.
        """
        if FilePath(path).suffix.lower() == ".json":
            self.to_json(path)
            return
        write(path, record.header_of(self), record.arrays_of(self))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, limit: int | None = LIMIT
    ) -> GraphAttributionResult:
        """Read a result that was saved, in whichever form.

        Nothing in the file is run. One whose content says that it is larger than the
        limit is refused before memory is taken for it, however small the file is.

        Args:
            path (str or PathLike): the file.
            limit (int, optional): most bytes of the arrays and texts in it, unpacked,
                and of the rows that are made of them; None for any number. Default:
                ``2_147_483_648``, which is 2 GiB

        Returns:
            GraphAttributionResult: as it was, but without ``inp``.

        Raises:
            TypeError: if ``path`` is no path, or ``limit`` no whole number.
            OSError: if the file cannot be read.
            ValueError: if it is no saved result, of an unknown version, or larger than
                the limit.
        """
        parts = record.read_parts(path, limit)
        try:
            return cls(**parts)
        # An assertion of Captum's result, where a shape does not fit.
        except (TypeError, ValueError, AssertionError, ArithmeticError) as error:
            raise not_a_result(path) from error

    @classmethod
    def from_spool(
        cls, folder: str | os.PathLike[str], explain: Explain | None = None
    ) -> GraphAttributionResult:
        """What can be said by the rows that a spool holds by now, without the model.

        Of a call that was killed, that is still running or that has ended. Rows that
        are not there are left out, and ``unresolved`` says how much of the answer that
        leaves open: no score is too high, and all together lack at most that much.

        Args:
            folder (str or PathLike): what was passed to ``attribute`` as ``spool``.
            explain (optional): another span, in any form that ``attribute`` takes.
                Default: ``None``, what was asked

        Returns:
            GraphAttributionResult: without ``inp`` and ``output_probs``.

        Raises:
            TypeError: if ``folder`` is no path.
            OSError: if it cannot be read.
            ValueError: if it is no spool, of an unknown version, or damaged.

        Example:
            >>> import tempfile
            >>> from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
            >>> from captum_cage import GraphContextAttribution
            >>> from captum_cage.demo import load_demo
            >>> model, tokenizer = load_demo()
            >>> cage = GraphContextAttribution(
            ...     LLMAttribution(FeatureAblation(model), tokenizer)
            ... )
            >>> inp = TextTokenInput("Ana has 3 pens.", tokenizer)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     result = cage.attribute(inp, "3 pens.", spool=folder)
            ...     again = GraphAttributionResult.from_spool(folder)
            >>> bool((result.seq_attr == again.seq_attr).all()), again.unresolved
            (True, 0.0)
        """
        parts = record.spooled_parts(folder)
        try:
            result = cls(**parts)
        except (TypeError, ValueError, AssertionError) as error:
            raise record.not_a_spool(folder) from error
        return result if explain is None else result.explaining(explain)


def _checked_steps(explained: Sequence[int], n_generated: int) -> tuple[int, ...]:
    """Positions of the explained generated units."""
    remedy = "Pass the positions of generated units in reading order, each once."
    steps = tuple(
        whole_number("explained", step, stop=n_generated, remedy=remedy)
        for step in explained
    )
    if not steps or any(one >= other for one, other in pairwise(steps)):
        raise ValueError(complaint("explained", "must rise", f"{steps} came", remedy))
    return steps


def _check_meta(meta: dict[str, Any]) -> None:
    try:
        json.dumps(meta, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            complaint(
                "meta",
                "must hold JSON values",
                f"it does not: {error}",
                "Turn arrays into lists, and NumPy's numbers into Python's.",
            )
        ) from error


def _grouped(
    text: str,
    units: Sequence[Unit],
    generated: bool,
    granularity: Any,
    breaks: Sequence[int],
) -> Units:
    """The units of one kind in a text, in larger ones; those without a place alone."""
    places = [place for place, unit in enumerate(units) if unit.generated == generated]
    members = tuple(units[place] for place in places)
    if not members or any(unit.span is None for unit in units):
        return Units(members, np.arange(len(members)))
    chosen = np.zeros(len(units), dtype=bool)
    chosen[places] = True
    turns = np.flatnonzero(np.diff(chosen.astype(int))) + 1
    spans = [unit.span for unit in units if unit.span is not None]
    found = group_tokens(
        TokenText(text, tuple(spans)),
        granularity,
        generated=generated,
        attributed=chosen,
        special=np.array([unit.special for unit in units], dtype=bool),
        breaks=(*breaks, *(spans[turn][0] for turn in turns.tolist())),
    )
    return Units(found.units, found.groups[places])


def _indicator(units: Units) -> npt.NDArray[np.float64]:
    """Which old unit (column) belongs to which new one (row)."""
    indicator = np.zeros((len(units), len(units.groups)))
    indicator[units.groups, np.arange(len(units.groups))] = 1.0
    return indicator


def _dense(rows: Any) -> npt.NDArray[np.float64]:
    dense: npt.NDArray[np.float64] = rows.toarray() if issparse(rows) else rows
    return dense
