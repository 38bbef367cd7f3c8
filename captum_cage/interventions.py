"""Whether a path is real: its steps are written again without the source."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import issparse

from captum_cage._captum import family
from captum_cage._checks import complaint, one_of, shown, whole_number
from captum_cage.contrast import Contrast
from captum_cage.graph import AttributionGraph
from captum_cage.methods.catalogue import capability_of
from captum_cage.result import GraphAttributionResult
from captum_cage.scoring import context_length, continued_ids, scores_after
from captum_cage.solve import Path
from captum_cage.task import RowTask, generated_units
from captum_cage.text import decode, special_ids
from captum_cage.units import NAMED, group_tokens

__all__ = ["PathCheck", "Removal", "verify_path"]

Removal: TypeAlias = Literal["baseline", "delete"]
"""Whether the tokens of a path's source are replaced, or left out."""

# Base methods whose rows are changes of a log-probability.
_IN_NATS = {
    *("ablation", "shapley-sampling", "shapley", "lime", "kernel-shap", "c-lime"),
    *("l-shap", "integrated-gradients", "gradient-x-activation", "gradient-shap"),
}
# Change of a log-probability, in nats, that counts as none.
_NOTHING = 0.01
# Standard errors that the mean of what is nothing exceeds once in twenty times.
_CHANCE = 1.645
_SPARE = 8  # tokens that a new step may have beyond twice those of the old one


@dataclass(frozen=True)
class PathCheck:
    """What a path claims, and what happens when its source is taken away.

    The step next to the source is written again without it. The new step takes the
    place of the old one, and all else stays as it was; where the path goes on, the next
    step is written again after it, and so on. What is measured is the change of the
    explained unit's log-probability when the last of these new steps stands before it.
    Each is compared with the same made without taking anything away, so that writing
    again counts for nothing. A new step ends where a unit of its kind does; no later
    than the model's context allows, and has at most twice the tokens of the old one
    and a few. Units of your own have as many tokens as before.

    Attributes:
        units (tuple[int, ...]): the path, from the explained unit to the source.
        texts (tuple[str, ...]): text of each.
        kind (str): ``"through generated text"``, a total effect along this path; or
            ``"direct"`` for a path without steps, where the source is taken away and
            the generated text stays fixed: that shows nothing that goes through it.
        removal (str): how the source was taken away.
        predicted (float): the change, in nats, that the graph predicts by propagating
            linearly: the explained unit's raw attribution of the unit before it, times
            the shares of the path from there on. For a base method whose rows are no
            log-probabilities: the path's share of what the log-probability loses when
            all units are taken away. Zero for what the graph leaves out.
        changes (tuple[float, ...]): measured change of each sample, in nats; positive
            where the source made the explained unit likelier.
        steps (tuple[tuple[str, ...], ...]): for each sample, the new steps from the
            source on.
        answers (tuple[str, ...]): for each sample, what the model then writes in the
            place of the explained unit.
        answer (str): what it wrote there.
        changed (float): share of the samples in which that is another text than
            without the intervention.
        least (float): part of the predicted change that a real path must show.
        contrastive (bool): whether changes are of the log-odds against a foil, not of
            the log-probability.
    """

    units: tuple[int, ...]
    texts: tuple[str, ...]
    kind: str
    removal: str
    predicted: float
    changes: tuple[float, ...]
    steps: tuple[tuple[str, ...], ...]
    answers: tuple[str, ...]
    answer: str
    changed: float
    least: float
    contrastive: bool = False

    @property
    def measured(self) -> float:
        """Mean change over the samples, in nats."""
        return float(np.mean(self.changes))

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN for one sample."""
        if len(self.changes) < 2:
            return float("nan")
        return float(np.std(self.changes, ddof=1) / np.sqrt(len(self.changes)))

    @property
    def holds(self) -> bool:
        """Whether the path is real.

        The change has the predicted sign, is more than nothing (0.01 nats) and at least
        ``least`` of what was predicted. That of several samples is also more than
        chance: as steps are written again, one of them may turn out otherwise whatever
        is taken away.
        """
        measured = float(np.sign(self.predicted)) * self.measured
        chance = _CHANCE * self.standard_error if len(self.changes) > 1 else 0.0
        return measured > max(_NOTHING, chance) and (
            measured >= self.least * abs(self.predicted)
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in it as JSON values."""
        error = self.standard_error
        return {
            "units": list(self.units),
            "texts": list(self.texts),
            "kind": self.kind,
            "removal": self.removal,
            "holds": self.holds,
            "least": self.least,
            "contrastive": self.contrastive,
            "predicted": self.predicted,
            "measured": self.measured,
            "standard_error": None if math.isnan(error) else error,
            "changes": list(self.changes),
            "steps": [list(texts) for texts in self.steps],
            "answer": self.answer,
            "answers": list(self.answers),
            "changed": self.changed,
        }

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "does not hold"
        of = "log-odds" if self.contrastive else "log-probability"
        path = " <- ".join(repr(text.strip()) for text in self.texts)
        error = (
            ""
            if len(self.changes) < 2
            else f" (standard error {self.standard_error:.3g})"
        )
        return (
            f"The path {verdict}: {path}\n"
            f"predicted change of the {of} {self.predicted:.3g}, measured "
            f"{self.measured:.3g}{error}, {self.kind}; another answer in "
            f"{self.changed:.0%} of {len(self.changes)} samples"
        )


def verify_path(
    task: RowTask,
    result: GraphAttributionResult,
    path: Any,
    units: str,
    contrasts: Sequence[Contrast] = (),
    *,
    samples: int = 1,
    seed: int = 0,
    temperature: float | None = None,
    removal: Removal = "baseline",
    least: float = 0.5,
) -> PathCheck:
    """Whether a path is real, by intervening along it.

    Args:
        task (RowTask): the texts and their units.
        result (GraphAttributionResult): whose graph the path is of.
        path (Path or Sequence[int]): the path, or its units from the explained one to
            the source.
        units (str): name of the units, by which a new step is cut.
        contrasts (Sequence[Contrast], optional): foils of the question; the change is
            then one of the log-odds. Default: ``()``
        samples (int, optional): how often steps are written again. One is written
            greedily. Default: ``1``
        seed (int, optional): of the first sample. Default: ``0``
        temperature (float, optional): of sampling. Default: greedy for one sample, 1.0
            for several
        removal (str, optional): the source's tokens become the ``"baseline"``, as in
            perturbation methods, or are ``"delete"``d. Default: ``"baseline"``
        least (float, optional): part of the predicted change that a real path must
            show. Default: ``0.5``

    Returns:
        PathCheck: predicted and measured change.

    Raises:
        TypeError: if the model is remote or cannot generate, or the path is none.
        ValueError: if an option is out of range, the path does not lead from an
            explained unit to a source, or the source cannot be deleted.
    """
    if family(task.llm_attr) == "remote":
        raise TypeError(
            complaint(
                "verify_path",
                "needs the model itself",
                "the model is remote",
                "Load the model, or compare answers by provider.generate.",
            )
        )
    if not callable(getattr(task.llm_attr.model, "generate", None)):
        raise TypeError(
            complaint(
                "verify_path",
                "needs a model that can write a step again",
                f"{type(task.llm_attr.model).__name__} came, which has no generate()",
                "Use a causal language model of transformers.",
            )
        )
    one_of("removal", removal, get_args(Removal))
    count = whole_number("samples", samples, minimum=1, remedy="Pass 1 or more.")
    first_seed = whole_number("seed", seed, remedy="Pass a whole number.")
    _check_number("least", least, 0.0, 1.0)
    if temperature is not None:
        _check_number("temperature", temperature, 0.0, float("inf"))
    way = _way(result, path)
    if count > 1 and temperature is None:
        temperature = 1.0
    contrast = next(
        (c for c in contrasts if len(task.sources) + c.step == way[0]), None
    )
    kinds = _kinds(task, [unit - len(task.sources) for unit in way[:-1]], units)
    plain = _Intervention(task, way, kinds, contrast, None, removal, temperature)
    without = _Intervention(task, way, kinds, contrast, way[-1], removal, temperature)
    changes, steps, answers, changed = [], [], [], []
    for sample in range(count):
        with _seeded(first_seed + sample):
            control = plain.run()
        with _seeded(first_seed + sample):
            found = without.run()
        changes.append(control.score - found.score)
        steps.append(found.steps)
        answers.append(found.answer)
        changed.append(control.answer.strip() != found.answer.strip())
    start, stop = task.range_of(way[0] - len(task.sources))
    return PathCheck(
        units=way,
        texts=tuple(result.units[unit].text for unit in way),
        kind="direct" if len(way) == 2 else "through generated text",
        removal=removal,
        predicted=_predicted(task, result.graph, way, contrast),
        changes=tuple(changes),
        steps=tuple(steps),
        answers=tuple(answers),
        answer=decode(task.generated[start:stop], task.llm_attr.tokenizer),
        changed=float(np.mean(changed)),
        least=float(least),
        contrastive=contrast is not None,
    )


def _check_number(where: str, value: object, least: float, most: float) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not least < float(value) <= most:  # type: ignore[arg-type]
        raise ValueError(
            complaint(
                where,
                f"must be a number above {least:g} and at most {most:g}",
                f"{shown(value)} came",
                "Leave it out for the default.",
            )
        )


def _way(result: GraphAttributionResult, path: Any) -> tuple[int, ...]:
    """The units of a path, checked."""
    units = path.units if isinstance(path, Path) else path
    if not isinstance(units, Sequence) or isinstance(units, str):
        raise TypeError(
            complaint(
                "path",
                "must be a path of the result, or its units",
                f"{shown(path)} came",
                "Pass one of result.paths().",
            )
        )
    graph = result.graph
    remedy = f"The graph has {graph.n_units} units."
    way = tuple(
        whole_number("path", unit, stop=graph.n_units, remedy=remedy) for unit in units
    )
    explained = set(graph.generated_units[list(result.explained)].tolist())
    is_path = (
        len(way) >= 2
        and way[0] in explained
        and bool(graph.sources[way[-1]])
        and not graph.sources[list(way[:-1])].any()
        and all(one > other for one, other in pairwise(way))
    )
    if not is_path:
        raise ValueError(
            complaint(
                "path",
                "must lead from an explained unit through earlier generated ones to a "
                "source",
                f"{way} came",
                "Pass one of result.paths().",
            )
        )
    return way


def _predicted(
    task: RowTask,
    graph: AttributionGraph,
    way: tuple[int, ...],
    contrast: Contrast | None,
) -> float:
    """Change of the explained unit's score by linear propagation."""
    inner = 1.0
    for unit, before in pairwise(way[1:]):
        share = float(graph.matrix[unit, before])
        # Shares of absolute values say how much, and the rows in which direction.
        if graph.normalization == "absolute":
            share = math.copysign(share, _raw_row(graph, unit, first=False)[before])
        inner *= share
    row = _raw_row(graph, way[0], first=True)
    if graph.normalization == "positive":
        row = row.clip(0)
    declared = capability_of(type(task.llm_attr.attr_method))
    in_nats = (
        declared is not None
        and declared.name in _IN_NATS
        and getattr(task.llm_attr, "attr_target", "log_prob") == "log_prob"
        and task.kwargs.get("scalarizer", "sum") == "sum"
    )
    if in_nats or not row[way[1]]:
        return float(row[way[1]]) * inner
    # In the method's own measure: its share of what all units before it change.
    kept = graph.kept[np.searchsorted(graph.generated_units, way[0])]
    share = float(kept * row[way[1]] / np.abs(row).sum())
    return share * inner * _all_absent(task, way[0] - len(task.sources), contrast)


def _raw_row(
    graph: AttributionGraph, unit: int, first: bool
) -> npt.NDArray[np.float64]:
    """Raw row of a generated unit, by which a path starts or goes on."""
    place = int(np.searchsorted(graph.generated_units, unit))
    rows = graph.rows
    if not first and graph.behind is not None and place in graph.behind.steps:
        rows, place = graph.behind.rows, graph.behind.steps.tolist().index(place)
    one = rows[[place]]
    row: npt.NDArray[np.float64] = (one.toarray() if issparse(one) else one)[0]
    return row


def _all_absent(task: RowTask, step: int, contrast: Contrast | None) -> float:
    """What a step's score loses when every unit before it is the baseline."""
    start, stop = task.range_of(step)
    if contrast is not None:
        start, stop = contrast.start, contrast.stop
    inp = task.prefixed_input(start, step=step)

    def score(model_input: Any) -> float:
        target = task.generated[start:stop]
        found = scores_after(task.llm_attr, model_input, target).sum()
        if contrast is not None:
            found -= scores_after(task.llm_attr, model_input, contrast.ids).sum()
        return float(found)

    plain, absent = inp.to_tensor(), torch.zeros_like(inp.to_tensor())
    return score(inp.to_model_input(plain)) - score(inp.to_model_input(absent))


def _kinds(task: RowTask, steps: Sequence[int], units: str) -> dict[int, str]:
    """Name of the units of which each step is one, by which a new one ends.

    ``"token"`` where it has none, or is a special token or white space: then the new
    one has as many tokens.
    """
    named = {units: set(steps)}
    if units not in ("token", *NAMED):
        # They were named for each side, or some were refined: see what they are.
        named = {name: _steps_of(task, name) for name in ("token", *NAMED)}
    kinds = {}
    for step in steps:
        names = [name for name in named if step in named[name]]
        unit = task.steps.units[step]
        is_text = unit.text.strip() and not unit.special
        kinds[step] = "token"
        if names and is_text:
            kinds[step] = max(names, key=lambda name: len(named[name]))
    return kinds


def _steps_of(task: RowTask, name: str) -> set[int]:
    """The steps that are units of a name."""
    trace = task.prompt.continuation
    found = group_tokens(
        task.generated_text,
        name,
        generated=True,
        attributed=np.isin(task.steps.groups, task.written),
        special=np.isin(task.generated, list(special_ids(task.llm_attr.tokenizer))),
        breaks=(*(() if trace is None else trace.all_breaks), *task.thinking.breaks),
    )
    own = {step: task.steps.members(step) for step in task.written.tolist()}
    return {
        step
        for step, members in own.items()
        if np.array_equal(found.members(found.groups[members[0]]), members)
    }


@dataclass(frozen=True)
class _Outcome:
    score: float
    steps: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class _Intervention:
    """The steps of a path written again, with or without its source."""

    task: RowTask
    way: tuple[int, ...]
    kinds: Mapping[int, str]
    contrast: Contrast | None
    absent: int | None
    removal: Removal
    temperature: float | None

    def run(self) -> _Outcome:
        """What comes of it."""
        task, contrast = self.task, self.contrast
        explained, *steps = (unit - len(task.sources) for unit in self.way[:-1])
        own, stop = task.range_of(explained)
        start = own
        if contrast is not None:
            start, stop = contrast.start, contrast.stop
        texts: list[str] = []
        change: tuple[int, int, list[int]] | None = None
        prompt = task.prompt.inp.to_model_input()
        for step in reversed(steps):
            begin, end = task.range_of(step)
            if change is None:
                before, later = self._without_source(begin, step), task.generated[:0]
            else:
                before, later = prompt, self._exchanged(change, begin)
            new = self._write(before, later, step)
            texts.append(decode(new, task.llm_attr.tokenizer))
            change = (begin, end, new)
        if change is None:  # a direct path: the generated text stays as it is
            before, later = self._without_source(start, explained), task.generated[:0]
            answer = self._write(
                self._without_source(own, explained), later, explained, greedy=True
            )
        else:
            before, later = prompt, self._exchanged(change, start)
            answer = self._write(
                prompt, self._exchanged(change, own), explained, greedy=True
            )
        score = self._score(before, later, task.generated[start:stop])
        if contrast is not None:
            score -= self._score(before, later, contrast.ids)
        return _Outcome(score, tuple(texts), decode(answer, task.llm_attr.tokenizer))

    def _exchanged(
        self, change: tuple[int, int, list[int]], stop: int
    ) -> tuple[int, ...]:
        """Ids up to a generated token, with one stretch of them exchanged."""
        start, end, new = change
        return (*self.task.generated[:start], *new, *self.task.generated[end:stop])

    def _score(
        self, model_input: Any, later: Sequence[int], target: Sequence[int]
    ) -> float:
        scores = scores_after(self.task.llm_attr, model_input, [*later, *target])
        return float(scores[len(later) :].sum())

    def _without_source(self, stop: int, step: int) -> Any:
        """Model input up to a generated token, the source absent."""
        task = self.task
        inp = task.prefixed_input(stop, step=step)
        if self.absent is None:
            return inp.to_model_input()
        if self.removal == "delete":
            features = inp.token_features
            if features is None:
                raise ValueError(
                    complaint(
                        "removal",
                        "'delete' needs a source that is made of tokens",
                        f"the features of {type(task.prompt.inp).__name__} are not",
                        "Use removal='baseline'.",
                    )
                )
            ids, units = features
            kept = [
                i for i, unit in zip(ids, units, strict=True) if unit != self.absent
            ]
            if not kept:
                raise ValueError(
                    "removal: 'delete' must leave a token before the step, but nothing "
                    "is left. Use removal='baseline'."
                )
            return torch.tensor([kept])
        present = inp.to_tensor()
        present[0, self.absent] = 0
        return inp.to_model_input(present)

    def _write(
        self,
        model_input: Any,
        later: Sequence[int],
        step: int,
        greedy: bool = False,
    ) -> list[int]:
        """One unit that the model writes after an input and more ids."""
        task = self.task
        kind = self.kinds[step]
        most = len(task.steps.members(step))
        if kind != "token":
            most = min(2 * most + _SPARE, self._room(model_input, later, step))
        arguments: dict[str, Any] = {"max_new_tokens": most, "do_sample": False}
        if self.temperature is not None and not greedy:
            arguments |= {"do_sample": True, "temperature": self.temperature}
            arguments |= {"top_k": 0, "top_p": 1.0}
        ids = continued_ids(task.llm_attr, model_input, later, arguments)
        if not ids or kind == "token":
            return ids
        before = [*task.prompt.ids, *task.generated[: task.range_of(step)[0]]]
        _, found = generated_units(before, ids, kind, task.llm_attr.tokenizer)
        for number, unit in enumerate(found.units):
            if unit.special:
                break
            members = found.members(number)
            if unit.text.strip():
                return ids[: int(members[-1]) + 1]
        return []

    def _room(self, model_input: Any, later: Sequence[int], step: int) -> int:
        """Most tokens of a new step after which the rest still fits the model."""
        task = self.task
        longest = context_length(task.llm_attr.model) or sys.maxsize
        length = len(task.prompt.ids)
        if not isinstance(model_input, str):
            is_mapping = isinstance(model_input, Mapping)
            ids = model_input["input_ids"] if is_mapping else model_input
            length = int(ids.shape[1])
        last = task.range_of(self.way[0] - len(task.sources))[1]
        if self.contrast is not None:
            foil = len(self.contrast.ids)
            last = max(self.contrast.stop, self.contrast.start + foil)
        rest = max(last - task.range_of(step)[1], 0)
        return longest - length - len(later) - rest


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from a seed, and as they were afterwards."""
    devices = (
        list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    )
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
