"""How faithful attributions of one text are, measured side by side."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from captum_cage._captum import family
from captum_cage._checks import (
    complaint,
    finite_vector,
    one_of,
    real_array,
    shown,
    whole_number,
)
from captum_cage.metrics.calibration import Calibration, untrusted
from captum_cage.metrics.regeneration import Regenerator, Sampling
from captum_cage.metrics.removal import MaskedRefill, RemovalName, Remover
from captum_cage.metrics.scores import (
    METRICS,
    Metric,
    Probe,
    Score,
    by_position,
    shuffled,
)
from captum_cage.metrics.statement import Predicate, Statement
from captum_cage.metrics.truth import (
    COVERAGE,
    auroc,
    average_precision,
    coverage,
    recovery_at,
)
from captum_cage.metrics.values import (
    SHOWS,
    FixedText,
    Passes,
    Probability,
    Regenerated,
    TextScorer,
    Value,
)
from captum_cage.result import GraphAttributionResult
from captum_cage.scoring import held
from captum_cage.task import RowTask
from captum_cage.text import Span, decode, read_tokens, special_ids

__all__ = [
    "Evaluation",
    "Evaluator",
    "Gold",
    "MetricInfo",
    "metric_info",
    "metric_names",
    "orders_of",
]

Array = npt.NDArray[np.float64]
Gold: TypeAlias = Sequence[int] | Sequence[Span]
"""Sources that are known to matter, as positions or as ranges of the source text."""
Axis: TypeAlias = Literal["units", "tokens"]
"""Whether a curve counts sources that are gone, or tokens in them."""

VALUES = ("regenerated", "probability", "span", "response")
AXES = ("units", "tokens")
# Metrics of a curve, which is kept then.
_DRAWN = ("deletion", "rise", "mas", "insertion")
RESULT = "result"
RANDOM = "random"
# Metrics of known truth: whether higher is better, and what gives it.
TRUTH: dict[str, Callable[[Array, list[int]], float]] = {
    "auroc": auroc,
    "average precision": average_precision,
    "recovery": recovery_at,
    **{name: partial(coverage, bounds=bounds) for name, bounds in COVERAGE.items()},
}
DEFAULT = (
    *("regenerated: deletion", "regenerated: insertion", "regenerated: rise"),
    *("regenerated: mas", "span: rise", "span: mas", "response: rise"),
    "response: mas",
)


@dataclass(frozen=True)
class MetricInfo:
    """What is known about a metric, whatever it is applied to.

    Attributes:
        name (str): value and metric, as ``"regenerated: deletion"``.
        higher_is_better (bool): which way is better.
        summary (str): what it is.
        shows (str): what it can show, and what not.
        source (str): the paper.
        untrusted (str): where the known truth does not win under it, on problems whose
            truth is known: by what. Empty where it does, or where that was not tried.
    """

    name: str
    higher_is_better: bool
    summary: str
    shows: str
    source: str
    untrusted: str


def metric_names() -> tuple[str, ...]:
    """Names of all metrics that an evaluation takes."""
    return (*(f"{value}: {name}" for value in VALUES for name in METRICS), *TRUTH)


def orders_of(result: GraphAttributionResult) -> dict[str, Array]:
    """The scores that are always evaluated beside a result, and its own.

    ``"result"``: its ``seq_attr``. ``"direct"``: the explained rows alone.
    ``"sequence"``: all rows summed. ``"one hop"``: paths with at most one pass through
    generated text. ``"nearest"``: the scores of the result, given to the sources by
    their position alone, see :func:`by_position`. Random orders are added by the
    evaluation.
    """
    return {
        RESULT: result.seq_attr.numpy(),
        "direct": result.direct.seq_attr.numpy(),
        "sequence": result.sequence.seq_attr.numpy(),
        "one hop": np.asarray(result.graph.hops(result.weights, 1).attr),
        "nearest": by_position(result.seq_attr.numpy()),
    }


@dataclass(frozen=True)
class Evaluation:
    """Scores of several attributions of one text under several metrics.

    Attributes:
        scores (Mapping): for each attribution, the :class:`Score` of each metric.
        metrics (Mapping): what is known about each metric.
        statement (str): what had to come out again.
        removal (str): how sources were taken away.
        reached (float): value of ``"regenerated"`` with all sources; NaN if it was not
            asked for.
        reached_without (float): the same with none of them.
        curves (Mapping): deletion curve of each attribution and value that a metric of
            it was asked of, from all sources to none, shape ``(P + 1,)``.
        insertions (Mapping): the same as the highest sources come, from none to all.
        places (Mapping): where the points of each attribution's curves stand.
        sequences (int): number of texts that the model was given or wrote.
        seed (int): of samples, ties, random sets and random orders.
    """

    scores: Mapping[str, Mapping[str, Score]]
    metrics: Mapping[str, MetricInfo]
    statement: str
    removal: str
    reached: float
    reached_without: float
    curves: Mapping[tuple[str, str], Array] = field(repr=False)
    insertions: Mapping[tuple[str, str], Array] = field(repr=False)
    places: Mapping[str, Array] = field(repr=False)
    sequences: int
    seed: int

    def beats(self, metric: str, other: str = RANDOM, *, order: str = RESULT) -> bool:
        """Whether an attribution scores strictly better than another.

        Args:
            metric (str): the metric.
            other (str, optional): the other attribution. Default: ``"random"``
            order (str, optional): the attribution. Default: ``"result"``
        """
        own, theirs = (self.scores[name][metric].value for name in (order, other))
        if np.isclose(own, theirs, rtol=1e-9, atol=0.0):
            return False  # they differ by rounding at most
        better = own > theirs if self.metrics[metric].higher_is_better else own < theirs
        return bool(better)

    def curve(
        self, kind: str, value: str = "regenerated", order: str = RESULT
    ) -> Array:
        """One curve over the sources of an attribution, the highest first.

        ``"deletion"``: what is left as they go. ``"insertion"``: what is there as they
        come. ``"necessity"``: what is lost without the ``k`` highest, the first less
        the deletion curve. ``"sufficiency"``: what the ``k`` highest alone hold, the
        insertion curve less its end.

        Args:
            kind (str): one of the four.
            value (str, optional): which value. Default: ``"regenerated"``
            order (str, optional): which attribution. Default: ``"result"``

        Returns:
            numpy.ndarray: shape ``(P + 1,)``; ``places`` says where its points
            stand.

        Raises:
            ValueError: if no metric was asked for that needs it.

        Source: DeYoung et al. (2020), :cite:p:`deyoung2020eraser`; Chuang et al.
        (2025), :cite:p:`chuang2025selfcite`.
        """
        one_of("kind", kind, ("deletion", "insertion", "necessity", "sufficiency"))
        going = kind in ("deletion", "necessity")
        curves = self.curves if going else self.insertions
        if (order, value) not in curves:
            asked = "deletion" if going else "insertion"
            raise ValueError(
                complaint(
                    "curve",
                    "must be one that a metric needed",
                    f"{kind!r} of {value!r} and {order!r} came",
                    f"Evaluate '{value}: {asked}', too.",
                )
            )
        found: Array = curves[order, value].copy()
        if kind == "necessity":
            found = found[0] - found
        elif kind == "sufficiency":
            found -= found[-1]
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be known to read the numbers, in sentences."""
        found = []
        if not np.isnan(self.reached) and self.reached <= self.reached_without:
            found.append(
                f"With all sources the model comes to {self.statement} in "
                f"{self.reached:.0%} of its texts, without them in "
                f"{self.reached_without:.0%}: what is written again says nothing here."
            )
        for order in self.scores:
            if order in (RANDOM, "nearest"):
                continue
            lost = [name for name in self.metrics if not self.beats(name, order=order)]
            if lost:
                found.append(
                    f"{order!r} does not beat a random order by {', '.join(lost)}."
                )
        found += [
            f"{info.name}: {info.untrusted}"
            for info in self.metrics.values()
            if info.untrusted
        ]
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Everything in it as JSON values."""

        def number(value: float) -> float | None:
            return None if np.isnan(value) else float(value)

        return {
            "statement": self.statement,
            "removal": self.removal,
            "reached": number(self.reached),
            "reached_without": number(self.reached_without),
            "sequences": self.sequences,
            "seed": self.seed,
            "scores": {
                order: {
                    name: [number(score.value), number(score.standard_error)]
                    for name, score in found.items()
                }
                for order, found in self.scores.items()
            },
            "metrics": {
                name: {
                    "higher_is_better": info.higher_is_better,
                    "shows": info.shows,
                    "untrusted": info.untrusted,
                }
                for name, info in self.metrics.items()
            },
            "curves": [
                {
                    "order": order,
                    "value": value,
                    "kind": kind,
                    "values": curve.tolist(),
                }
                for kind, found in (
                    ("deletion", self.curves),
                    ("insertion", self.insertions),
                )
                for (order, value), curve in found.items()
            ],
            "places": {name: at.tolist() for name, at in self.places.items()},
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """The scores as a Markdown table, a row for each attribution."""
        heads = []
        for name, info in self.metrics.items():
            way = "↑" if info.higher_is_better else "↓"
            heads.append(f"{name} {way}{' †' if info.untrusted else ''}")
        lines = [
            "| order | " + " | ".join(heads) + " |",
            "|---|" + "---:|" * len(heads),
        ]
        lines += [
            f"| {order} | "
            + " | ".join(str(found[name]) for name in self.metrics)
            + " |"
            for order, found in self.scores.items()
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        head = f"Sources were taken away by {self.removal!r}."
        if self.statement:
            head += f" What had to come out again: {self.statement}."
        return "\n".join([head, "", self.to_markdown(), "", *self.notes]).rstrip()


class Evaluator:
    """Tests attributions of one text, whoever made them.

    The model is asked once for each set of sources, however many attributions and
    metrics need it. Made by :meth:`~captum_cage.GraphAttributionResult.evaluator`.

    Args:
        task (RowTask): the text and its units.
        explained (Sequence[int]): positions of the explained generated units.
        sources (Sequence[int], optional): positions of the sources that may be taken
            away, among all of them; the others always stay. Default: all; those that a
            result makes leave special tokens out, such as the one that begins a text
        statement (optional): what must come out again, see
            :class:`~captum_cage.metrics.statement.Statement`.
            Default: the explained text; of a trace, that of its last explained turn
        removal (str or MaskedRefill, optional): how sources are taken away:
            ``"delete"``, ``"baseline"``, ``"suppress"`` or a :class:`MaskedRefill`.
            Default: ``"delete"``; ``"baseline"`` where sources are no tokens
        samples (int, optional): how many texts are sampled for each set of sources.
            Default: None, one, written greedily
        seed (int, optional): of samples, ties, random sets and orders. Default: ``0``
        temperature (float, optional): of sampling. Default: ``1.0``
        gen_args (Mapping, optional): for the model's ``generate``, such as
            ``max_new_tokens``. Default: None
        axis (str, optional): curves run over the ``"units"`` that are gone, or over
            the fraction of ``"tokens"``, which favours no long units. RISE and MAS are
            over units always, as their authors have them. Default: ``"units"``
        top (int, optional): number of sources for metrics of the highest ones.
            Default: three, or all where there are fewer
        masks (int, optional): number of random sets for ``lds`` and ``infidelity``.
            Default: ``32``
        random_orders (int, optional): number of random orders, of which the mean
            counts. They are the first attribution's scores, shuffled, so that metrics
            that look at sizes see the same ones. Default: ``5``
        batch_size (int, optional): most texts that the model gets at once.
        calibration (Calibration, optional): which metrics are to be trusted, as
            :func:`calibrate_metric` found for this model and removal. Default: what was
            found on the demo model's problems
        told (Sequence[str], optional): texts of all sources; a result with others is
            refused. Default: None, not known
        show_progress (bool, optional): show progress bars. Default: ``False``

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if an argument is out of range, or the statement does not hold of
            the text that is explained.
    """

    def __init__(
        self,
        task: RowTask,
        explained: Sequence[int],
        *,
        sources: Sequence[int] | None = None,
        statement: Predicate | None = None,
        removal: RemovalName | MaskedRefill | None = None,
        samples: int | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        gen_args: Mapping[str, Any] | None = None,
        axis: Axis = "units",
        top: int | None = None,
        masks: int = 32,
        random_orders: int = 5,
        batch_size: int | None = None,
        calibration: Calibration | None = None,
        told: Sequence[str] | None = None,
        show_progress: bool = False,
    ) -> None:
        one_of("axis", axis, AXES)
        if calibration is not None and not isinstance(calibration, Calibration):
            raise TypeError(
                complaint(
                    "calibration",
                    "must be what calibrate_metric gives",
                    f"{shown(calibration)} came",
                    "Leave it out for what was found on the demo model's problems.",
                )
            )
        self._calibration = calibration
        self._told = None if told is None else tuple(told)
        if removal is None:
            removal = "delete" if task.reads_tokens else "baseline"
        self.task = task
        self._remover = Remover(task, removal)
        self._candidates = _candidates(sources, self._remover.n_sources)
        self._sampling = Sampling(samples, seed, temperature)
        self._by_tokens = axis == "tokens"
        size = len(self._candidates)
        remedy = "Pass how many of the highest sources to take."
        if top is None:
            top = min(3, size)
        self._top = whole_number("top", top, minimum=1, stop=size + 1, remedy=remedy)
        remedy = "Pass the number of random sets, for example 32."
        self._masks = whole_number("masks", masks, minimum=3, remedy=remedy)
        remedy = "Pass the number of random orders, for example 5."
        self._random = whole_number(
            "random_orders", random_orders, minimum=1, remedy=remedy
        )
        if batch_size is not None:
            remedy = "Pass None to have it chosen."
            whole_number("batch_size", batch_size, minimum=1, remedy=remedy)
        self._gen_args = gen_args
        self._batch_size = batch_size
        self._show = show_progress
        self._spans = _explained_tokens(task, explained)
        self._predicate = statement
        if statement is not None:
            _ = self._statement  # which must hold of the text explained
        self._passes = Passes(task.llm_attr, batch_size)
        self._scorer = TextScorer(self._remover, self._passes, show_progress)
        self._regenerator: Regenerator | None = None
        self._values: dict[str, Value] = {}

    @property
    def removal(self) -> str:
        """How sources are taken away."""
        return self._remover.name

    @property
    def statement(self) -> str:
        """What must come out again."""
        return self._statement.description

    @property
    def sequences(self) -> int:
        """Number of texts that the model was given or wrote so far."""
        written = 0 if self._regenerator is None else self._regenerator.sequences
        return written + self._passes.sequences

    @cached_property
    def _statement(self) -> Statement:
        start, stop = self._turn()
        whole = self._text(start, stop)
        read = read_tokens(
            self.task.generated[start:stop], self.task.llm_attr.tokenizer
        )
        pieces = []
        for first, last in self._spans:
            if first < start:
                continue
            # By place, as a token alone may be a part of a character.
            places = [read.offsets[i - start] for i in self._visible(first, last)]
            piece = read.text[places[0][0] : places[-1][1]] if places else ""
            pieces.append(piece if piece in whole else self._text(first, last))
        return Statement(self._predicate, whole, pieces)

    def _visible(self, start: int, stop: int) -> range:
        """Some generated tokens, without the marks at their end."""
        special = special_ids(self.task.llm_attr.tokenizer)
        while stop > start and self.task.generated[stop - 1] in special:
            stop -= 1
        return range(start, stop)

    def _text(self, start: int, stop: int) -> str:
        """Text of some generated tokens, without the marks at its end."""
        tokens = self._visible(start, stop)
        ids = self.task.generated[tokens.start : tokens.stop]
        return decode(ids, self.task.llm_attr.tokenizer)

    def _turn(self) -> tuple[int, int]:
        """The turn that holds the last explained token, in the generated ids."""
        before = len(self._remover.written) - len(self.task.generated)
        written = self._remover.written[before:]
        last = self._spans[-1][1] - 1
        outside = np.flatnonzero(~written)
        start = outside[outside < last].max(initial=-1) + 1
        stop = outside[outside > last].min(initial=len(written))
        return int(start), int(stop)

    def value(self, name: str) -> Value:
        """What is left of the explained text, by its name.

        Args:
            name (str): ``"regenerated"``, ``"probability"``, ``"span"`` or
                ``"response"``.
        """
        if name not in self._values:
            self._values[name] = self._new_value(one_of("value", name, VALUES))
        return self._values[name]

    def _new_value(self, name: str) -> Value:
        tokenizer = self.task.llm_attr.tokenizer
        if name == "response":
            count = int(self._remover.written.sum())
            return FixedText(name, self._scorer, self._remover, range(count))
        before = len(self._remover.written) - len(self.task.generated)
        if name == "span":
            rank = np.cumsum(self._remover.written) - 1
            tokens = [
                int(rank[before + token])
                for start, stop in self._spans
                for token in range(start, stop)
            ]
            return FixedText(name, self._scorer, self._remover, tokens)
        if self._regenerator is None:
            self._regenerator = Regenerator(
                self._remover,
                before + self._spans[-1][1] - 1,
                self._sampling,
                self._gen_args,
                self._batch_size,
                self._show,
            )
        if name == "regenerated":
            return Regenerated(self._regenerator, self._statement, tokenizer)
        if family(self.task.llm_attr) == "remote":
            raise TypeError(
                complaint(
                    "metrics",
                    "'probability' needs the model itself",
                    "the model is remote",
                    "Ask for 'regenerated'.",
                )
            )
        start, stop = self._spans[-1]
        return Probability(
            self._regenerator,
            self._passes,
            self._text(self._turn()[0], start),
            self.task.generated[start:stop],
            self.task.llm_attr,
        )

    def evaluate(
        self,
        tested: GraphAttributionResult | Mapping[str, npt.ArrayLike],
        metrics: str | Sequence[str] | None = None,
        gold: Gold | None = None,
        *,
        others: Mapping[str, npt.ArrayLike] | None = None,
    ) -> Evaluation:
        """Scores of several attributions, and of random orders.

        Args:
            tested (GraphAttributionResult or Mapping): a result, which brings what is
                always measured beside it, see :func:`orders_of`; or for each name the
                scores of all sources, or of those that may be taken away.
            metrics (str or Sequence[str], optional): names as :func:`metric_names`
                lists them, or the name of a value for all its metrics. Default: areas
                of texts written again and of fixed ones
            others (Mapping, optional): more scores, as in ``tested``. Default: None
            gold (Sequence, optional): which sources are known to matter: positions
                among all sources, or ranges of characters in the source text. Adds the
                metrics of known truth. Default: None

        Raises:
            TypeError: if scores are no numbers.
            ValueError: if a metric is unknown, shapes do not fit, or two attributions
                have the same name.
        """
        of_result = isinstance(tested, GraphAttributionResult)
        if isinstance(tested, GraphAttributionResult):
            self._check_text(tested)
            tested = orders_of(tested)
        orders = {**tested, **(others or {})}
        _check_names(tested, others or {})
        infos = self._asked(metrics, gold is not None)
        known = self._gold(gold)
        given = {name: self._scores(name, scores) for name, scores in orders.items()}
        rng = np.random.default_rng([self._sampling.seed, 1])
        if of_result:  # of those that may be taken away, not of all sources
            given["nearest"] = by_position(given[RESULT])
        first = next(iter(given.values()), np.zeros(len(self._candidates)))
        random = [shuffled(first, rng) for _ in range(self._random)]
        self._refuse_early(infos, known)
        scores: dict[str, dict[str, Score]] = {name: {} for name in given}
        curves: dict[tuple[str, str], Array] = {}
        insertions: dict[tuple[str, str], Array] = {}
        places: dict[str, Array] = {}
        chance: dict[str, Score] = {}
        with held(self.task.llm_attr):
            self._ask_ahead(infos, [*given.values(), *random])
            for name in infos:
                for order, own in given.items():
                    scores[order][name] = self._one(name, own, known)
                several = [self._one(name, own, known).value for own in random]
                error = float("nan")
                if len(several) > 1:
                    error = float(np.std(several, ddof=1) / np.sqrt(len(several)))
                chance[name] = Score(float(np.mean(several)), error)
            for name in infos:
                value, _, kind = name.partition(": ")
                if kind not in _DRAWN:
                    continue
                for order, own in given.items():
                    probe = self._probe(value, own)
                    places[order] = probe.places
                    if kind == "insertion":
                        insertions[order, value] = probe.insertion.mean(axis=1)
                    else:
                        curves[order, value] = probe.deletion.mean(axis=1)
            reached, without = self._reached(infos)
        scores[RANDOM] = chance
        found = Evaluation(
            scores,
            infos,
            self.statement if not np.isnan(reached) else "",
            self.removal,
            reached,
            without,
            curves,
            insertions,
            places,
            self.sequences,
            self._sampling.seed,
        )
        if reached <= without:
            warnings.warn(found.notes[0], stacklevel=2)
        return found

    def _check_text(self, result: GraphAttributionResult) -> None:
        if self._told is not None and tuple(result.input_tokens) != self._told:
            raise ValueError(
                complaint(
                    "tested",
                    "must explain the text that this evaluator was made for",
                    "a result with other sources came",
                    "Ask that result for its own: result.evaluate(...).",
                )
            )

    def _refuse_early(self, infos: Iterable[str], gold: list[int]) -> None:
        """Raise whatever the metrics would raise, before any model call."""
        for name in infos:
            if name in TRUTH:
                TRUTH[name](np.zeros(len(self._candidates)), gold)
            else:
                self.value(_value_of(name))
            if _value_of(name) == "regenerated":
                _ = self._statement  # which must hold of the text explained

    def _reached(self, infos: Iterable[str]) -> tuple[float, float]:
        if "regenerated" not in map(_value_of, infos):
            return float("nan"), float("nan")
        size = len(self._candidates)
        sets = np.stack([np.ones(size, dtype=bool), np.zeros(size, dtype=bool)])
        whole, none = self.value("regenerated")(self._whole(sets)).tolist()
        return whole, none

    def _asked(self, metrics: Any, has_gold: bool) -> dict[str, MetricInfo]:
        names = DEFAULT if metrics is None else metrics
        names = [names] if isinstance(names, str) else list(names)
        found: dict[str, MetricInfo] = {}
        for name in names:
            several = (
                [f"{name}: {one}" for one in METRICS] if name in VALUES else [name]
            )
            for one in several:
                if not has_gold and one in TRUTH:
                    raise ValueError(
                        complaint(
                            "metrics",
                            f"{one!r} needs known truth",
                            "no gold came",
                            "Pass gold=, the sources that are known to matter.",
                        )
                    )
                one_of("metrics", one, metric_names())
                found[one] = metric_info(one, self.removal, self._calibration)
        if has_gold and metrics is None:
            found |= {name: metric_info(name) for name in TRUTH}
        if not found:
            raise ValueError(
                "metrics: must name a metric, but none came. Leave it out for the "
                "default ones."
            )
        return found

    def _scores(self, name: str, scores: npt.ArrayLike) -> Array:
        where = f"orders[{name!r}]"
        listed = real_array(where, scores)
        count = self._remover.n_sources
        if listed.shape == (count,) and count != len(self._candidates):
            listed = listed[self._candidates]
        return finite_vector(where, listed, len(self._candidates), entry="source")

    def _gold(self, gold: Gold | None) -> list[int]:
        if gold is None:
            return []
        if isinstance(gold, str) or not isinstance(gold, Iterable):
            raise TypeError(
                complaint(
                    "gold",
                    "must be positions of sources, or ranges of characters",
                    f"{shown(gold)} came",
                    "Pass a list, such as [0, 2].",
                )
            )
        count = self._remover.n_sources
        remedy = f"There are {count} sources."
        places: set[int] = set()
        for one in gold:
            if isinstance(one, tuple):
                start, stop = _span(one)
                inside = {
                    place
                    # Other units stand in the text after the prompt.
                    for place, unit in enumerate(self.task.sources.units)
                    if unit.span is not None
                    and start < unit.span[1]
                    and unit.span[0] < stop
                }
                if not inside:
                    raise ValueError(
                        complaint(
                            "gold",
                            "a range must hold a source",
                            f"{one} came, which holds none",
                            "Pass ranges of characters in the source text.",
                        )
                    )
                places |= inside
            else:
                places.add(whole_number("gold", one, stop=count, remedy=remedy))
        rank = {place: number for number, place in enumerate(self._candidates.tolist())}
        outside = sorted(places - rank.keys())
        if outside or not places:
            raise ValueError(
                complaint(
                    "gold",
                    "must be sources that may be taken away",
                    f"sources {outside} are not among them" if outside else "none came",
                    "Name them in sources=, too.",
                )
            )
        return sorted(rank[place] for place in places)

    def _whole(self, kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Sets of all sources, from sets of those that may be taken away."""
        whole = np.ones((len(kept), self._remover.n_sources), dtype=bool)
        whole[:, self._candidates] = kept
        return whole

    def _probe(self, value: str, scores: Array) -> Probe:
        asked = self.value(value)
        return Probe(
            scores,
            self._remover.sizes[self._candidates],
            lambda kept: asked.samples(self._whole(kept)),
            is_log=value in ("span", "response"),
            by_tokens=self._by_tokens,
            masks=self._masks,
            top=self._top,
            seed=self._sampling.seed,
        )

    def _one(self, name: str, scores: Array, gold: list[int]) -> Score:
        if name in TRUTH:
            return Score(TRUTH[name](scores, gold))
        value, metric = name.split(": ")
        return METRICS[metric].function(self._probe(value, scores))

    def _ask_ahead(self, infos: Iterable[str], orders: Sequence[Array]) -> None:
        """Ask the model for the sets of all orders at once, in the largest batches."""
        wanted: dict[str, set[str]] = {}
        for name in infos:
            if name not in TRUTH:
                value, metric = name.split(": ")
                wanted.setdefault(value, set()).add(metric)
        for value, names in wanted.items():
            recorder = _Recorder()
            for scores in orders:
                probe = replace(self._probe(value, scores), samples=recorder)
                for name in names:
                    METRICS[name].function(probe)
            sets = np.unique(np.concatenate(recorder.sets), axis=0)
            self.value(value).samples(self._whole(sets))


class _Recorder:
    """Notes which sets a metric asks for."""

    def __init__(self) -> None:
        self.sets: list[npt.NDArray[np.bool_]] = []

    def __call__(self, kept: npt.NDArray[np.bool_]) -> Array:
        self.sets.append(kept)
        # Any numbers will do, but constant ones.
        numbers: Array = kept.sum(axis=1, keepdims=True).astype(np.float64)
        return numbers


def _check_names(tested: Iterable[str], others: Iterable[str]) -> None:
    names = [RANDOM, *tested, *others]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                complaint(
                    "orders",
                    "must have names of their own",
                    f"{name!r} came, which is taken",
                    "Pass another name.",
                )
            )


def _span(given: tuple[Any, ...]) -> Span:
    if len(given) != 2:
        raise ValueError(
            complaint(
                "gold",
                "a range must be a pair (start, stop) of characters",
                f"{shown(given)} came",
                "Pass ranges of characters in the source text.",
            )
        )
    remedy = "Pass ranges of characters in the source text."
    start, stop = (whole_number("gold", end, remedy=remedy) for end in given)
    return start, stop


def _value_of(name: str) -> str:
    return name.split(": ")[0] if ": " in name else ""


def metric_info(
    name: str, removal: str = "delete", calibration: Calibration | None = None
) -> MetricInfo:
    """What is known about a metric.

    Args:
        name (str): one of :func:`metric_names`.
        removal (str, optional): how sources are taken away. Default: ``"delete"``
        calibration (Calibration, optional): what says whether it is to be trusted.
            Default: what was measured on the demo model's problems

    Raises:
        ValueError: if there is no such metric.

    Example:
        >>> metric_info("auroc").higher_is_better
        True
    """
    one_of("name", name, metric_names())
    if name in TRUTH:
        return MetricInfo(
            name,
            True,
            "agreement with the sources that are known to matter",
            "whether the known truth is found",
            "Walker and Ewetz (2025), arXiv:2512.15663"
            if name in COVERAGE
            else "see captum_cage.metrics.truth",
            "",
        )
    value, metric = name.split(": ")
    found: Metric = METRICS[metric]
    return MetricInfo(
        name,
        found.higher_is_better,
        found.summary,
        SHOWS[value],
        found.source,
        untrusted(name, removal) if calibration is None else calibration.verdict(name),
    )


def _candidates(sources: Sequence[int] | None, count: int) -> npt.NDArray[np.int64]:
    if sources is None:
        return np.arange(count)
    if isinstance(sources, str) or not isinstance(sources, Iterable):
        raise TypeError(
            complaint(
                "sources",
                "must be positions of sources",
                f"{shown(sources)} came",
                "Pass a list of positions among the result's input_tokens.",
            )
        )
    remedy = f"There are {count} sources."
    places = [
        whole_number("sources", source, stop=count, remedy=remedy) for source in sources
    ]
    if not places or len(set(places)) != len(places):
        raise ValueError(
            complaint(
                "sources",
                "must name at least one source, and each once",
                f"{shown(list(sources))} came",
                "Pass positions among the result's input_tokens.",
            )
        )
    return np.array(sorted(places))


def _explained_tokens(task: RowTask, explained: Sequence[int]) -> list[Span]:
    """Stretches of generated tokens that are explained, joined where they meet."""
    spans: list[Span] = []
    for step in sorted(explained):
        start, stop = task.range_of(int(task.written[step]))
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return spans
