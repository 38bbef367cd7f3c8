"""Questions that follow an answer and need the model again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from captum_cage._checks import complaint, one_of, whole_number
from captum_cage.contrast import Contrast, tokens_of
from captum_cage.cost import count_sequences, most_sequences
from captum_cage.foils import Alternative
from captum_cage.interventions import PathCheck, verify_path
from captum_cage.metrics.evaluation import Evaluator
from captum_cage.result import GraphAttributionResult
from captum_cage.scoring import held, next_token_probabilities
from captum_cage.strategy import Approximation, Strategy, StrategyName
from captum_cage.task import RowTask
from captum_cage.text import TokenText, read_tokens, special_ids
from captum_cage.units import FIXED, Granularity, Unit, Units, group_tokens, split_units

__all__ = ["Followup", "Question"]

logger = logging.getLogger(__name__)

SIDES = ("source", "generated", "both")


@dataclass(frozen=True)
class Question:
    """What is asked about a text.

    Attributes:
        explained (tuple[int, ...]): positions of the explained generated units.
        contrasts (tuple[Contrast, ...]): what some of them are contrasted with.
        strategy (str): how rows are computed.
        approximation (Approximation): what may be left out.
        draws (int): how often rows are drawn.
        units (str): name of the units, ``"own"`` for others.
    """

    explained: tuple[int, ...]
    contrasts: tuple[Contrast, ...]
    strategy: StrategyName
    approximation: Approximation
    draws: int
    units: str

    def must_start(self, way: Strategy) -> bool:
        """Whether contrastive rows say which other rows are needed."""
        return self.approximation.tolerance > 0.0 and way.by_row


class _Wrapper(Protocol):
    llm_attr: Any

    def answer(self, task: RowTask, question: Question) -> GraphAttributionResult:
        """The answer to a question whose units are known."""


@dataclass(frozen=True)
class Followup:
    """The wrapper that gave a result, and what it was asked.

    Attributes:
        wrapper: the ``GraphContextAttribution`` object.
        task (RowTask): the texts and their units.
        question (Question): what was asked about them.
    """

    wrapper: _Wrapper
    task: RowTask
    question: Question

    def alternatives(self, position: Any, k: int) -> list[Alternative]:
        """The likeliest tokens at a place of the generated text."""
        count = whole_number("k", k, minimum=1, remedy="Pass how many to list.")
        start, _ = tokens_of(self.task, position, "position")
        task = self.task
        with held(task.llm_attr):
            found = next_token_probabilities(
                task.llm_attr, task.prompt, task.generated[:start]
            )
        order = np.argsort(-found, kind="stable")[:count]
        return [
            Alternative(
                int(token),
                self._text_after(start, int(token)),
                float(found[token]),
                int(token) == task.generated[start],
            )
            for token in order
        ]

    def _text_after(self, start: int, token: int) -> str:
        ids = [*self.task.prompt.ids, *self.task.generated[:start]][-8:]
        text = read_tokens([*ids, token], self.task.llm_attr.tokenizer)
        return text.split(len(ids))[1].text

    def verify_path(
        self, result: GraphAttributionResult, path: Any, **options: Any
    ) -> PathCheck:
        """Whether a path of the result is real."""
        with held(self.task.llm_attr):
            return verify_path(
                self.task,
                result,
                path,
                self.question.units,
                self.question.contrasts if result.foils else (),
                **options,
            )

    def evaluator(self, result: GraphAttributionResult, **options: Any) -> Evaluator:
        """What tests attributions of the same text; special tokens always stay."""
        sources = [unit for unit in result.units if not unit.generated]
        said = [place for place, unit in enumerate(sources) if not unit.special]
        if options.get("sources") is None and said:
            options = {**options, "sources": said}
        options = {**options, "told": result.input_tokens}
        with held(self.task.llm_attr):
            return Evaluator(self.task, result.explained, **options)

    def repeat(self, result: GraphAttributionResult) -> GraphAttributionResult:
        """The same question asked anew."""
        question = self.question
        if result.explained != question.explained:
            if result.foils:
                kept = {foil.unit for foil in result.foils}
                contrasts = [c for c in question.contrasts if c.foil.unit in kept]
            else:
                contrasts = []
            question = replace(
                question, explained=result.explained, contrasts=tuple(contrasts)
            )
        return self.wrapper.answer(replace(self.task, kept={}), question)

    # --- from coarse to fine --------------------------------------------------------

    def refine(
        self, result: GraphAttributionResult, top: int, to: Granularity, side: str
    ) -> GraphAttributionResult:
        """The same question with the heaviest units split."""
        task, question = self._refined(result, top, to, side)
        most = self._most(result, task, question)
        logger.info(
            "refining %d units to %d takes at most %s sequences",
            self.task.width,
            task.width,
            "an unknown number of" if most is None else most,
        )
        with held(task.llm_attr), count_sequences(task.llm_attr) as counted:
            refined = self.wrapper.answer(task, question)
        refined.meta["refined"] = {
            "units_before": self.task.width,
            "estimated_sequences": most,
            "sequences": counted.sequences,
        }
        logger.info("refining took %s sequences", counted.sequences)
        return refined

    def refine_cost(
        self, result: GraphAttributionResult, top: int, to: Granularity, side: str
    ) -> int | None:
        """Most sequences that this gives the model."""
        task, question = self._refined(result, top, to, side)
        return self._most(result, task, question)

    @staticmethod
    def _most(
        result: GraphAttributionResult, task: RowTask, question: Question
    ) -> int | None:
        return most_sequences(
            task,
            # A model that did not suit the engine does not suit it now.
            "loop" if result.meta["strategy"] == "loop" else question.strategy,
            draws=question.draws,
            contrasts=question.contrasts,
            tolerance=question.approximation.tolerance,
        )

    def _refined(
        self, result: GraphAttributionResult, top: int, to: Granularity, side: str
    ) -> tuple[RowTask, Question]:
        count = whole_number("top", top, minimum=1, remedy="Pass how many to split.")
        one_of("side", side, SIDES)
        finer = split_units(to)
        if any(isinstance(units, list) for units in finer.values()):
            raise ValueError(
                complaint(
                    "to",
                    "must be a name or a function from a text to character ranges",
                    "ranges came",
                    "Pass ranges of the whole text as units= to attribute.",
                )
            )
        task = self.task
        mass = np.zeros(task.width)
        graph = result.graph
        if side != "generated":
            # For and against together: a unit whose paths cancel may matter most.
            for attr in (result.positive_attr, result.negative_attr):
                mass[graph.source_units] += attr.numpy()
        if side != "source":
            for attr in result.step_parts:
                mass[graph.generated_units] += attr.numpy()
        pieces = self._divided(mass, count, finer)
        if not pieces:
            raise ValueError(
                complaint(
                    "to",
                    "must divide a unit that has mass",
                    f"{'a function' if callable(to) else repr(to)} divides none",
                    "Pass smaller units, or another side.",
                )
            )
        first = len(task.sources)
        sources, _ = _split(task.sources, pieces, 0)
        steps, parents = _split(task.steps, pieces, first)
        scores = task.kept.get("scores")
        finest = replace(
            task,
            sources=sources,
            steps=steps,
            kept={} if scores is None else {"scores": scores},
        )
        return finest, self._asked_of(result, finest, parents)

    def _asked_of(
        self, result: GraphAttributionResult, task: RowTask, parents: Sequence[int]
    ) -> Question:
        """What was asked, of the finer units."""
        rows = [int(self.task.written[step]) for step in result.explained]
        explained = [
            row for row, step in enumerate(task.written) if parents[step] in rows
        ]
        foiled = {foil.unit for foil in result.foils}
        contrasts = []
        for contrast in self.question.contrasts:
            if contrast.foil.unit in foiled:
                step = int(task.steps.groups[contrast.start])
                unit = int(np.searchsorted(task.written, step))
                foil = replace(contrast.foil, unit=unit)
                contrasts.append(replace(contrast, step=step, foil=foil))
        kept = {contrast.foil.unit for contrast in contrasts}
        if foiled == set(result.explained):
            explained = sorted(kept)
        approximation = replace(self.question.approximation, hops=result.hops)
        return replace(
            self.question,
            explained=tuple(explained),
            contrasts=tuple(contrasts),
            approximation=approximation,
            units="own",
        )

    def _divided(
        self, mass: npt.NDArray[np.float64], count: int, finer: Any
    ) -> dict[int, tuple[list[Unit], npt.NDArray[np.int64]]]:
        """The heaviest units that the finer ones divide: their parts, by token."""
        pieces: dict[int, tuple[list[Unit], npt.NDArray[np.int64]]] = {}
        for unit in np.argsort(-mass, kind="stable").tolist():
            if len(pieces) == count or mass[unit] == 0.0:
                break
            parts = self._parts(unit, finer)
            if parts is not None and len(parts[0]) > 1:
                pieces[unit] = parts
        return pieces

    def _parts(
        self, unit: int, finer: Any
    ) -> tuple[list[Unit], npt.NDArray[np.int64]] | None:
        """A unit's parts, and the part of each of its tokens; None if it has none."""
        task = self.task
        first = len(task.sources)
        if unit < first:
            if task.prompt.feature_of_token is None:
                return None
            units, place, text = task.sources, unit, task.prompt.text
            breaks = task.prompt.breaks
        else:
            units, place, text = task.steps, unit - first, task.generated_text
            trace = task.prompt.continuation
            breaks = task.thinking.breaks
            if trace is not None:
                breaks = (*trace.all_breaks, *breaks)
        whole = units.units[place]
        members = units.members(place)
        tokens = np.arange(members[0], members[-1] + 1)
        start = text.offsets[tokens[0]][0]
        stop = max(text.offsets[token][1] for token in tokens)
        inside = TokenText(
            text.text[start:stop],
            tuple(
                (a - start, b - start)
                for a, b in (text.offsets[token] for token in tokens)
            ),
        )
        ids = np.array(task.prompt.ids if unit < first else task.generated)[tokens]
        found = group_tokens(
            inside,
            finer["generated" if whole.generated else "source"],
            generated=whole.generated,
            attributed=np.isin(tokens, members),
            special=np.isin(ids, list(special_ids(task.llm_attr.tokenizer))),
            breaks=[end - start for end in breaks if start < end < stop],
        )
        parts = [
            replace(part, span=(part.span[0] + start, part.span[1] + start))
            for part in found.units
            if part.span is not None
        ]
        return parts, found.groups[np.isin(tokens, members)]


def _split(
    units: Units,
    pieces: dict[int, tuple[list[Unit], npt.NDArray[np.int64]]],
    first: int,
) -> tuple[Units, list[int]]:
    """Units of one side with some of them divided, and the old unit of each new one."""
    groups = np.full(len(units.groups), FIXED, dtype=np.int64)
    found: list[Unit] = []
    parents: list[int] = []
    for place, unit in enumerate(units.units):
        parts, part_of = pieces.get(
            first + place, ([unit], np.zeros(len(units.members(place)), dtype=np.int64))
        )
        groups[units.members(place)] = part_of + len(found)
        found.extend(parts)
        parents.extend([place] * len(parts))
    return Units(tuple(found), groups), parents
