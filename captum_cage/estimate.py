"""What an explanation will cost, by a rehearsal and a few passes that are timed."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from types import MethodType
from typing import Any

import numpy as np
from torch import nn

from captum_cage._captum import argument, base_method, family
from captum_cage._model import text_config
from captum_cage.causal import CausalModel
from captum_cage.contrast import Contrast, ending_with, same_draws
from captum_cage.cost import count_sequences, inner_module, row_sequences
from captum_cage.engines.engine import Engine, Unsuitable
from captum_cage.engines.memory import bytes_per_token
from captum_cage.engines.registry import find_engine
from captum_cage.engines.tokens import TOKENS
from captum_cage.engines.verification import found_out
from captum_cage.graph import AttributionGraph
from captum_cage.methods.catalogue import capability_of, is_random
from captum_cage.rehearsal import Pass, Rehearsal
from captum_cage.rows import loop_row
from captum_cage.scoring import log_probabilities
from captum_cage.strategy import Approximation, Strategy, StrategyName
from captum_cage.task import RowTask, text_units
from captum_cage.units import split_units
from captum_cage.window import planned_requests

__all__ = ["Estimate", "Estimator"]

# Entries of a graph that is made and solved to see how long that takes.
_GRAPH = 2**17
# Methods whose rows do not go on as they begin: they stop when they are done, read less
# and less, or ask another model first.
_UNEVEN = ("clp", "one-shot-reagent", "reagent")
_SHORT = 4  # rows of so many times the passes that are timed are made whole
_WRITTEN = 5  # tokens that are generated to see how long one takes
_LOGITS = 2**27  # bytes of logits that engines hold at once, about
# Engines leave themselves room when they choose a batch: this share of it is taken.
_TAKEN = 0.65
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Estimate:
    """What a call of ``attribute`` will cost.

    With a tolerance it is not known beforehand which rows matter. ``rows``,
    ``sequences``, ``tokens`` and ``seconds`` are then those of all rows that might,
    ``fewest_rows`` to ``fewest_seconds`` those of the explained ones, without which it
    cannot do; otherwise both are the same.

    Attributes:
        method (str): the base method.
        strategy (str): ``"fused"`` or ``"loop"``: how rows will be computed.
        sources (int): source units, ``P``.
        rows (int): generated units whose rows are computed, at most ``G``.
        sequences (int): sequences that the model is given; requests to a remote model.
        tokens (int): tokens in them.
        seconds (float): time of the call.
        memory (int): most bytes that are taken at once, the model's own included.
        model_memory (int): bytes of the model's parameters and buffers; 0 for a remote
            model.
        fewest_rows (int): rows without which it cannot do.
        fewest_sequences (int): sequences for these.
        fewest_tokens (int): tokens in these sequences.
        fewest_seconds (float): time for these.
        generated_tokens (int): tokens that the model writes before it is explained, at
            most; 0 where the text is given.
        calibration_sequences (int): sequences that the model was given for the
            estimate.
        calibration_seconds (float): time that the estimate took.
    """

    method: str
    strategy: str
    sources: int
    rows: int
    sequences: int
    tokens: int
    seconds: float
    memory: int
    model_memory: int
    fewest_rows: int
    fewest_sequences: int
    fewest_tokens: int
    fewest_seconds: float
    generated_tokens: int
    calibration_sequences: int
    calibration_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def table(self) -> list[tuple[str, str]]:
        """What it says, as pairs of a name and a text."""
        remote = self.model_memory == 0
        written = f", {self.generated_tokens} of them to be generated"
        return [
            ("method", f"{self.method}, {self.strategy}"),
            (
                "rows",
                _between(self.fewest_rows, self.rows, _whole)
                + f" over {_whole(self.sources)} source units",
            ),
            (
                "requests" if remote else "model passes (sequences)",
                _between(self.fewest_sequences, self.sequences, _whole),
            ),
            (
                "tokens",
                _between(self.fewest_tokens, self.tokens, _whole)
                + (written if self.generated_tokens else ""),
            ),
            ("time", _between(self.fewest_seconds, self.seconds, duration)),
            (
                "memory",
                size(self.memory)
                + ("" if remote else f", {size(self.model_memory)} of it the model"),
            ),
            (
                "this estimate took",
                f"{duration(self.calibration_seconds)}, "
                f"{_whole(self.calibration_sequences)} sequences",
            ),
        ]

    def __str__(self) -> str:
        """A table, one line for each number."""
        rows = self.table()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def duration(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> duration(0.25), duration(75), duration(7320)
        ('0.25 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def size(count: int) -> str:
    """Bytes as people say them.

    Example:
        >>> size(900), size(3 * 2**30)
        ('900 B', '3.0 GiB')
    """
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def _whole(count: int) -> str:
    return f"{count:,}"


def _between(fewest: Any, most: Any, read: Callable[[Any], str]) -> str:
    if fewest == most:
        return read(most)
    return f"{read(fewest)} to {read(most)}"


@dataclass
class _Cost:
    """Sequences, tokens and seconds, which add up."""

    sequences: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, other: _Cost, times: float = 1.0) -> None:
        """Add another, so many times."""
        self.sequences += times * other.sequences
        self.tokens += times * other.tokens
        self.seconds += times * other.seconds


class _Enough(BaseException):
    """A row was begun, and has told how long a pass takes."""


class _Provider:
    """A provider that counts what it is asked, up to a number of requests."""

    def __init__(self, provider: Any, tokenizer: Any) -> None:
        self._provider = provider
        self._tokenizer = tokenizer
        self.counted = _Cost()
        self.most: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    def get_logprobs(
        self, input_prompt: str, target_str: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Scores as the provider gives them."""
        if self.most is not None and self.counted.sequences >= self.most:
            raise _Enough
        read = self._tokenizer.encode(input_prompt + target_str)
        self.counted.add(_Cost(1, len(read)))
        return self._provider.get_logprobs(
            *args, input_prompt=input_prompt, target_str=target_str, **kwargs
        )


class _Meter:
    """What a model is given, and how long that takes."""

    def __init__(self, llm_attr: Any) -> None:
        self.llm_attr = llm_attr
        self._provider: _Provider | None = None
        if family(llm_attr) == "remote":
            self._provider = _Provider(llm_attr.provider, llm_attr.tokenizer)
            self.llm_attr = _asking(llm_attr, self._provider)
        self.total = _Cost()
        self.ended = False  # whether the last call was ended before its end

    @property
    def is_remote(self) -> bool:
        """Whether what is counted are requests."""
        return self._provider is not None

    def measured(self, call: Callable[[], Any], most: int | None = None) -> _Cost:
        """The cost of a call.

        Args:
            call (Callable): what is done.
            most (int, optional): sequences after which it is not needed any more.
                Default: None
        """
        found = _Cost()
        if self._provider is not None:
            self._provider.counted, self._provider.most = found, most
        start = time.perf_counter()
        with count_sequences(self.llm_attr) as counted, self._ending(most):
            call()
        found.seconds = time.perf_counter() - start
        if counted.sequences is not None:
            found.sequences, found.tokens = counted.sequences, counted.tokens or 0
        self.total.add(found)
        return found

    @contextmanager
    def _ending(self, most: int | None) -> Iterator[None]:
        """End what happens inside at a pass after so many sequences."""
        module = inner_module(self.llm_attr.model)
        self.ended = False
        if most is None or module is None:
            try:
                yield
            except _Enough:
                self.ended = True
            return
        left = most

        def end(*_: Any) -> None:
            nonlocal left
            if left <= 0:
                raise _Enough
            left -= 1

        handle = module.register_forward_pre_hook(end, prepend=True)
        try:
            yield
        except _Enough:
            self.ended = True
        finally:
            handle.remove()


def _asking(llm_attr: Any, provider: Any) -> Any:
    """The object, with another provider."""
    found = copy.copy(llm_attr)
    found.provider = provider
    found.attr_method = copy.copy(llm_attr.attr_method)
    forward = llm_attr.attr_method.forward_func
    # It belongs to the object that it was made for.
    found.attr_method.forward_func = MethodType(forward.__func__, found)
    return found


class Estimator:
    """What the rows of a task cost.

    Args:
        task (RowTask): what is explained; the model is ours alone meanwhile.
        strategy (str): how rows are computed.
        told (set[str]): reasons for the loop that were logged already.
        calibration (int): passes to make and time, at most, of each shape of work.
    """

    def __init__(
        self,
        task: RowTask,
        strategy: StrategyName,
        told: set[str],
        calibration: int,
    ) -> None:
        self._meter = _Meter(task.llm_attr)
        self._strategy = strategy
        self._told = set(told)
        self._most = calibration
        self._task = replace(
            task, llm_attr=self._meter.llm_attr, show_progress=False, kept={}
        )
        self._largest = 0  # bytes of the largest pass
        self._way = Strategy(self._task, strategy, self._told)

    def estimate(
        self,
        explained: Sequence[int],
        contrasts: Sequence[Contrast],
        approximation: Approximation,
        draws: int,
        generate: Callable[[int], Sequence[int]] | None = None,
        generated: int = 0,
        before: float = 0.0,
    ) -> Estimate:
        """The cost of all rows that a question needs, and of what comes of them.

        Args:
            explained (Sequence[int]): positions of the explained generated units.
            contrasts (Sequence[Contrast]): what some are contrasted with.
            approximation (Approximation): what may be left out.
            draws (int): how often rows are drawn.
            generate (Callable, optional): has the model write so many tokens, where the
                text is not given. Default: None
            generated (int, optional): tokens that it will write at most. Default: 0
            before (float, optional): seconds that it took to read the texts.
                Default: 0
        """
        start = time.perf_counter()
        task = self._task
        declared = capability_of(type(task.llm_attr.attr_method))
        if declared is not None and declared.extra is not None:
            # Its first import takes longer than many a call.
            with suppress(ImportError):
                import_module(declared.extra)
        written: list[int] = task.written.tolist()
        needed, least = written, written
        if approximation.tolerance > 0.0:
            chosen = [written[place] for place in explained]
            needed = [step for step in written if step <= max(chosen)]
            if self._way.by_row:
                least = chosen
        with same_draws(task.llm_attr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writing = self._generation(generate, generated)
            scores = _Cost()
            if self._way.by_row:
                scores = self._meter.measured(self._score)
            rows = self._rows(task, needed)
            if not self._way.by_row and not _scores_of(task):
                scores = self._meter.measured(self._score)
            for contrast in contrasts:
                rows.add(self._contrast(contrast, approximation))
        graph = _graph_seconds(len(task.sources), len(written))
        total, fewest = _Cost(), _Cost()
        for cost, part in ((total, 1.0), (fewest, len(least) / len(needed))):
            cost.add(writing)
            cost.add(scores)
            cost.add(rows, draws * part)
            cost.seconds += before + draws * graph
        model = _model_bytes(task.llm_attr.model)
        return Estimate(
            method=base_method(task.llm_attr),
            strategy=self._way.name,
            sources=len(task.sources),
            rows=len(needed),
            sequences=round(total.sequences),
            tokens=round(total.tokens),
            seconds=total.seconds,
            memory=model + self._working_bytes(len(written), approximation, draws),
            model_memory=model,
            fewest_rows=len(least),
            fewest_sequences=round(fewest.sequences),
            fewest_tokens=round(fewest.tokens),
            fewest_seconds=fewest.seconds,
            generated_tokens=generated,
            calibration_sequences=round(self._meter.total.sequences),
            calibration_seconds=before + time.perf_counter() - start,
        )

    def _score(self) -> None:
        self._task.kept["scores"] = log_probabilities(
            self._task.llm_attr, self._task.prompt, self._task.generated
        )

    def _generation(
        self, generate: Callable[[int], Sequence[int]] | None, count: int
    ) -> _Cost:
        """The cost of writing a text, by that of its first tokens."""
        if generate is None or not count:
            return _Cost()
        wrote: list[int] = []

        def write(tokens: int) -> Callable[[], None]:
            return lambda: wrote.append(len(generate(tokens)))

        short = self._meter.measured(write(1))
        longer = self._meter.measured(write(min(count, _WRITTEN)))
        more = max(1, wrote[1] - wrote[0])
        each = max(0.0, longer.seconds - short.seconds) / more
        prompt = len(self._task.prompt.ids)
        if self._meter.is_remote:
            return _Cost(1, prompt + count, short.seconds + each * (count - 1))
        return _Cost(count, prompt + count - 1, short.seconds + each * (count - 1))

    def _contrast(self, contrast: Contrast, approximation: Approximation) -> _Cost:
        """The row of what was written, unless it is known by then, and the foil's."""
        task, found = self._task, _Cost()
        rows = [contrast.ids]
        if (
            is_random(type(task.llm_attr.attr_method), task.prompt.inp)
            or task.range_of(contrast.step) != (contrast.start, contrast.stop)
            or (approximation.tolerance > 0.0 and self._way.by_row)
            or approximation.sparsify is not None
        ):
            rows.append(task.generated[contrast.start : contrast.stop])
        for ids in rows:
            found.add(self._rows(ending_with(task, contrast, ids), None))
        return found

    def _rows(self, task: RowTask, steps: Sequence[int] | None) -> _Cost:
        """The cost of some rows, or of the last one."""
        if steps is None:
            steps = [len(task.steps) - 1]
        engine = None
        if self._way.name == "fused":
            engine, _ = find_engine(task)
        if engine is not None:
            try:
                if engine.rehearsed:
                    return self._rehearsed(task, engine, steps)
                return self._begun(task, engine, steps)
            except Unsuitable as error:
                model = type(task.llm_attr.model).__name__
                self._way.fall_back(f"{model}: {error}")
        if family(task.llm_attr) == "gradient":
            return self._token_by_token(task, steps)
        return self._side_by_side(task, steps, self._one_by_one(task, steps))

    # --- engines ---------------------------------------------------------------------

    def _rehearsed(self, task: RowTask, engine: Engine, steps: Sequence[int]) -> _Cost:
        """The cost of rows by an engine that can be rehearsed."""
        model = CausalModel(task.llm_attr.model, task.llm_attr.device)
        if found_out(model, len(task.prompt.ids) + len(task.generated) - 1) is None:
            # What it finds out about the model it will know from now on.
            asked = replace(task, stand_in=_end, kept={**task.kept})
            self._meter.measured(lambda: _exhaust(engine, asked, steps))
        rehearsal = Rehearsal(self._most)
        asked = replace(task, stand_in=rehearsal, kept={**task.kept})
        found = self._meter.measured(lambda: _exhaust(engine, asked, steps))
        for one in rehearsal.skipped:
            if not one.backward:
                found.add(_Cost(one.sequences, one.sequences * one.tokens))
        self._task.kept.update(_scores_of(asked))
        found.seconds += rehearsal.seconds()
        passes = [*rehearsal.skipped, *(one for one, _ in rehearsal.made)]
        self._note(passes, splits=True)
        return found

    def _begun(self, task: RowTask, engine: Engine, steps: Sequence[int]) -> _Cost:
        """The cost of rows by an engine of which nothing more is known.

        It computes few of them, and what they cost besides a start is taken to grow
        with their entries.
        """
        if engine.by_row:
            return self._interpolated(
                steps,
                lambda step: self._meter.measured(
                    lambda: _exhaust(engine, task, [step])
                ),
            )
        few = sorted({0, len(steps) // 2})
        entries = np.cumsum([len(task.sources) + step for step in steps])

        def first(count: int) -> _Cost:
            asked = replace(task, kept={**task.kept})
            return self._meter.measured(lambda: _exhaust(engine, asked, steps[:count]))

        costs = [first(last + 1) for last in few]
        found = _Cost()
        found.add(costs[-1])
        if len(few) > 1:
            grown = entries[few[1]] - entries[few[0]]
            more = (entries[-1] - entries[few[1]]) / max(1, grown)
            for name in ("sequences", "tokens", "seconds"):
                rise = max(0.0, getattr(costs[1], name) - getattr(costs[0], name))
                setattr(found, name, getattr(found, name) + more * rise)
        if engine is TOKENS:
            # Its one pass ends with the last row.
            read = len(task.prompt.ids) + task.range_of(steps[-1])[1] - 1
            found.tokens = found.sequences * read
        self._note([Pass(1, len(task.prompt.ids) + len(task.generated))], splits=False)
        return found

    # --- the loop --------------------------------------------------------------------

    def _interpolated(
        self, items: Sequence[int], cost: Callable[[int], _Cost]
    ) -> _Cost:
        """The cost of all items, by that of a few."""
        few = sorted({0, len(items) // 2, len(items) - 1})
        if len(items) <= len(few) + 1:
            few = [len(items) // 2]
        costs = [cost(items[place]) for place in few]
        places = np.arange(len(items))
        found = _Cost()
        for name in ("sequences", "tokens", "seconds"):
            each = [getattr(one, name) for one in costs]
            setattr(found, name, float(np.interp(places, few, each).sum()))
        return found

    def _token_by_token(self, task: RowTask, steps: Sequence[int]) -> _Cost:
        """The cost of rows of a gradient method, which are sums over tokens."""
        tokens = [token for step in steps for token in task.steps.members(step)]
        found = text_units(
            task.prompt,
            task.generated,
            split_units("token"),
            task.llm_attr.tokenizer,
        )
        fine = replace(task, sources=found.sources, steps=found.steps, kept={})
        kept = [int(fine.steps.groups[token]) for token in tokens]
        own = len(task.prompt.ids) + len(task.generated)
        points = task.kwargs.get("internal_batch_size") or _counted(task)
        self._note([Pass(points, own, kept=own, backward=True)], splits=False)
        # What a method finds out about its model, it finds out once.
        self._meter.measured(lambda: loop_row(fine, kept[0]))
        return self._interpolated(
            kept, lambda step: self._meter.measured(lambda: loop_row(fine, step))
        )

    def _one_by_one(self, task: RowTask, steps: Sequence[int]) -> _Cost:
        """The cost of rows of a perturbation method, of which few passes are made."""
        own = len(task.prompt.ids) + len(task.generated)
        self._note([Pass(1, own, kept=own)], splits=False)
        declared = capability_of(type(task.llm_attr.attr_method))
        is_even = declared is not None and declared.name not in _UNEVEN
        spared: float | None = None  # sequences that a row has less than it may have

        def row(step: int) -> _Cost:
            nonlocal spared
            bound = row_sequences(task, step) if is_even else None
            whole = bound is None or (spared is None and bound <= _SHORT * self._most)
            found = self._meter.measured(
                lambda: loop_row(task, step), None if whole else self._most
            )
            if bound is None or not self._meter.ended:
                spared = None if bound is None else bound - found.sequences
                return found
            scaled = _Cost()
            expected = max(found.sequences, bound - (spared or 0.0))
            scaled.add(found, expected / max(1.0, found.sequences))
            return scaled

        return self._interpolated(steps, row)

    def _side_by_side(self, task: RowTask, steps: Sequence[int], found: _Cost) -> _Cost:
        """The cost of rows of a remote model that takes several requests at once."""
        requests = planned_requests(task, steps)
        if requests is None:
            return found
        read = sum(len(task.llm_attr.tokenizer.encode(a + b)) for a, b in requests)
        # One after the other was timed.
        width = min(
            max(1, getattr(task.llm_attr.provider, "concurrency", 1)),
            max(1, len(requests)),
        )
        each = found.seconds / max(1.0, found.sequences)
        return _Cost(len(requests), read, each * len(requests) / width)

    # --- memory ----------------------------------------------------------------------

    def _note(self, passes: Sequence[Pass], splits: bool) -> None:
        """Remember the bytes of the largest of some passes."""
        model = self._task.llm_attr.model
        if not isinstance(model, nn.Module):
            return
        causal = CausalModel(model, self._task.llm_attr.device)
        backward = any(one.backward for one in passes)
        each = bytes_per_token(model, kept=backward)
        config = text_config(model)
        heads = getattr(config, "num_attention_heads", 1)
        eager = getattr(config, "_attn_implementation", "") == "eager"
        # Shares stay for each layer that gradients go back through; while they are
        # made there are two more tables of one layer.
        tables = 2 + (getattr(config, "num_hidden_layers", 1) if backward else 1)
        if splits and not backward:
            each = int(each * _TAKEN)
        logits = causal.vocabulary_bytes()
        for one in passes:
            needed = one.sequences * (one.tokens * each + one.before * 2 * each // 8)
            if eager:
                pairs = one.tokens * (one.before + one.tokens)
                needed += tables * one.sequences * heads * pairs * 4
            if splits:
                needed += min(6 * one.sequences * one.kept * logits, _LOGITS)
            else:
                needed += 3 * one.sequences * one.kept * logits
            self._largest = max(self._largest, needed)

    def _working_bytes(
        self, rows: int, approximation: Approximation, draws: int
    ) -> int:
        """Bytes besides the model: the largest pass, the rows, and their graph."""
        entries = rows * self._task.width
        share = 0.5 if approximation.sparsify is None else 0.25
        # Rows, twice while they are made into shares, and the graph's entries.
        return int(self._largest + draws * entries * 8 + entries * share * 2 * 16)


def _end(_: CausalModel) -> CausalModel:
    raise _Enough


def _exhaust(engine: Engine, task: RowTask, steps: Sequence[int]) -> None:
    for _ in engine.rows(task, steps):
        pass


def _scores_of(task: RowTask) -> dict[str, Any]:
    """What is known of the scores of the plain text."""
    return {key: task.kept[key] for key in ("scores",) if key in task.kept}


def _counted(task: RowTask) -> int:
    """How many points a gradient method takes at once."""
    declared = capability_of(type(task.llm_attr.attr_method))
    name = None if declared is None else declared.counted
    return 1 if name is None else int(argument(task.llm_attr, task.kwargs, name))


def _model_bytes(model: Any) -> int:
    if not isinstance(model, nn.Module):
        return 0
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return sum(one.nbytes for one in tensors.values())


def _graph_seconds(sources: int, rows: int) -> float:
    """How long a graph takes to make and to solve, by that of a smaller one."""
    scale = min(1.0, (_GRAPH / max(1, rows * (sources + rows))) ** 0.5)
    P, G = max(1, round(sources * scale)), max(1, round(rows * scale))
    rng = np.random.default_rng(0)
    made = np.tril(rng.random((G, P + G)), P - 1)
    start = time.perf_counter()
    graph = AttributionGraph.from_rows(made, P)
    graph.explain(np.ones(G))
    took = time.perf_counter() - start
    return float(took * rows * (sources + rows) / (G * (P + G)))
