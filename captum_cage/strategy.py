"""The raw rows of a task: by the loop or an engine, all or those that matter."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from tqdm import tqdm

from captum_cage._captum import base_method
from captum_cage._checks import complaint
from captum_cage._shares import heaviest, masses
from captum_cage.engines.engine import Engine, Unsuitable
from captum_cage.engines.registry import engine_names, find_engine
from captum_cage.fingerprint import digest, rows_depend_on
from captum_cage.frontier import Frontier
from captum_cage.graph import AttributionGraph, Normalization, RowsBehind
from captum_cage.rows import check_loop, checked_row
from captum_cage.spool import RowSpool, StoredRow
from captum_cage.task import RowTask
from captum_cage.window import loop_rows

__all__ = ["Approximation", "RowStore", "Strategy", "StrategyName", "fill"]

logger = logging.getLogger(__name__)

StrategyName: TypeAlias = Literal["auto", "loop", "fused"]
"""How rows are computed, see :meth:`~captum_cage.GraphContextAttribution.attribute`."""

# Rows that are computed between two looks at which rows still matter: at least, and at
# most where many were computed, for each look costs a pass through the model.
_ROWS_AT_ONCE = 16
_MOST_AT_ONCE = 64
# Entries up to which whole rows make an array (256 MiB), and beyond a sparse one: half
# of them stand above the diagonal.
_DENSE_ENTRIES = 2**25

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Approximation:
    """What may be left out, within a certificate.

    Attributes:
        tolerance (float): share of the explained mass that rows may hold that are not
            computed.
        hops (int or None): number of passes through generated units to follow.
        sparsify (float or None): share of each row's mass to keep.
    """

    tolerance: float = 0.0
    hops: int | None = None
    sparsify: float | None = None


class _FellBack(Exception):
    """The engine gave up before its first row; from here on the loop is taken."""


class Strategy:
    """How the rows of a task are computed: an engine where there is one, or the loop.

    Args:
        task (RowTask): what to explain.
        name (str): ``"auto"``, ``"loop"`` or ``"fused"``.
        told (set[str]): reasons for the loop that were logged already.

    Raises:
        ValueError: if ``name`` is ``"fused"`` and no engine can do the task, or if the
            loop could not do it either.
    """

    def __init__(self, task: RowTask, name: StrategyName, told: set[str]) -> None:
        self.task = task
        self._fused = name == "fused"
        self._told = told
        self._engine: Engine | None = None
        if name == "loop":
            check_loop(task)
            return
        self._engine, reason = find_engine(task)
        if self._engine is None:
            self.fall_back(reason)

    @property
    def name(self) -> str:
        """``"fused"`` or ``"loop"``: the way that was taken in the end."""
        return "loop" if self._engine is None else "fused"

    @property
    def by_row(self) -> bool:
        """Whether fewer rows cost less."""
        return self._engine is None or self._engine.by_row

    def fall_back(self, reason: str) -> None:
        """Take the loop from here on, and say why.

        Args:
            reason (str): why no engine can.

        Raises:
            ValueError: if an engine was asked for, or the loop cannot do it either.
        """
        if self._fused:
            raise ValueError(
                complaint(
                    "strategy",
                    "'fused' needs an engine that can compute these rows",
                    reason,
                    f"Methods with an engine are {', '.join(engine_names())}. Use "
                    "strategy='auto', which takes the loop where it must.",
                )
            )
        check_loop(self.task)
        self._engine = None
        kind = re.sub(r"\d+", "", reason)  # another text has other numbers
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(
                "the rows are computed by the loop, one call per generated unit: %s",
                reason,
            )

    def rows(
        self, steps: Sequence[int]
    ) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
        """Raw rows of some generated units, in ascending order.

        Yields:
            tuple[int, numpy.ndarray]: position of the unit and its row, shape ``(N,)``.

        Raises:
            ValueError: if a row is not as it must be.
            _FellBack: if an engine gave up; the next call takes the loop.
        """
        steps = sorted(steps)
        if self._engine is not None:
            found = iter(self._engine.rows(self.task, steps))
            try:
                first = next(found, None)
            except Unsuitable as error:
                model = type(self.task.llm_attr.model).__name__
                self.fall_back(f"{model}: {error}")
                raise _FellBack from error
            else:
                count = 0
                while first is not None:
                    if count == len(steps):
                        break
                    yield steps[count], checked_row(self.task, steps[count], first)
                    count += 1
                    first = next(found, None)
                if count != len(steps) or first is not None:
                    raise ValueError(
                        complaint(
                            base_method(self.task.llm_attr),
                            f"its engine must give {len(steps)} rows",
                            f"{count} came" if first is None else "more came",
                            "Correct the engine that was registered for it.",
                        )
                    )
                return
        rows = loop_rows(self.task, steps)
        for step, row in zip(steps, rows, strict=True):
            yield step, checked_row(self.task, step, row)

    def row(self, step: int) -> npt.NDArray[np.float64]:
        """Raw row of one generated unit, shape ``(N,)``.

        Raises:
            ValueError: if it is not as it must be.
        """
        try:
            return next(row for _, row in list(self.rows([step])))
        except _FellBack:
            return next(row for _, row in self.rows([step]))


@dataclass
class RowStore:
    """Rows that were computed; they survive an interrupt.

    Attributes:
        task (RowTask): what they belong to.
        normalization (str): by which mass rows are cut.
        sparsify (float or None): share of each row's mass that is stored.
        contrasts (tuple): what rows are contrasted with where an explanation starts.
        starts (MutableMapping): by step, the contrastive rows, as `rows`, whole.
        rows (MutableMapping): by step, the entries that were kept, their units, and
            the share of the row's mass that they hold.
        spool (RowSpool or None): the folder that both are kept in.
    """

    task: RowTask
    normalization: Normalization
    sparsify: float | None
    contrasts: tuple[Any, ...]
    state: tuple[tuple[int, int], ...]
    rows: MutableMapping[int, StoredRow] = field(default_factory=dict)
    starts: MutableMapping[int, StoredRow] = field(default_factory=dict)
    spool: RowSpool | None = None

    @classmethod
    def of(
        cls,
        task: RowTask,
        normalization: Normalization,
        sparsify: float | None,
        contrasts: tuple[Any, ...],
        unfinished: RowStore | None,
    ) -> RowStore:
        """The store of an interrupted call with the very rows of this one, or a new."""
        state = _model_state(task.llm_attr.model)
        store = cls(task, normalization, sparsify, contrasts, state)
        if unfinished is not None and unfinished.has_rows_of(store):
            return unfinished
        return store

    def spooled(self, folder: Any, explanation: Mapping[str, Any]) -> RowStore:
        """The same store with its rows in a folder, and those that are there already.

        Args:
            folder (str or PathLike): where they are kept.
            explanation (Mapping): what a saved result has besides its rows.

        Raises:
            ValueError: if it holds anything else, such as rows of another model.
            OSError: if it cannot be written.
        """
        belongs = rows_depend_on(self.task)
        belongs["the foil"] = digest(
            [(one.step, one.start, one.stop, one.ids) for one in self.contrasts]
        )
        belongs["the share of a row that is kept"] = str(self.sparsify)
        if self.sparsify is not None:
            belongs["the normalization"] = self.normalization
        header = {
            "belongs": belongs,
            "normalization": self.normalization,
            "prompt_units": len(self.task.sources),
            "explanation": explanation,
        }
        spool = RowSpool.open(folder, header)
        try:
            for mine, theirs in ((self.rows, spool.rows), (self.starts, spool.starts)):
                for step in mine.keys() - theirs.keys():
                    theirs[step] = mine[step]
        except BaseException:
            spool.close()
            raise
        return replace(self, rows=spool.rows, starts=spool.starts, spool=spool)

    def in_memory(self) -> RowStore:
        """The same store without the rows of a folder, which are found there again."""
        if self.spool is None:
            return self
        return replace(self, rows={}, starts={}, spool=None)

    def close(self) -> None:
        """Let others write to the folder of the rows, which stay readable."""
        if self.spool is not None:
            self.spool.close()

    def has_rows_of(self, other: RowStore) -> bool:
        """Whether its rows are those that the other is to have."""
        mine, theirs = self.task, other.task
        return (
            self.state == other.state
            and self.sparsify == other.sparsify
            and self.contrasts == other.contrasts
            and (self.sparsify is None or self.normalization == other.normalization)
            and mine.prompt.inp is theirs.prompt.inp
            and mine.prompt.ids == theirs.prompt.ids
            and mine.generated == theirs.generated
            and mine.baseline == theirs.baseline
            and np.array_equal(mine.sources.groups, theirs.sources.groups)
            and np.array_equal(mine.steps.groups, theirs.steps.groups)
            and _same_kwargs(mine.kwargs, theirs.kwargs)
        )

    def add(self, step: int, row: npt.NDArray[np.float64]) -> None:
        """Keep a row, cut to the share of its mass that is stored."""
        if self.sparsify is None:
            self.rows[step] = (row, None, 1.0)
            return
        mass, _ = masses(row, np.array([0, len(row)]), self.normalization)
        chosen, held = heaviest(mass, self.sparsify)
        self.rows[step] = (row[chosen], np.flatnonzero(chosen), held)

    def row(self, step: int) -> npt.NDArray[np.float64]:
        """A row as it is stored, shape ``(N,)``."""
        values, units, _ = self.rows[step]
        if units is None:
            return values
        row = np.zeros(self.task.width)
        row[units] = values
        return row

    def complete_row(self, step: int) -> npt.NDArray[np.float64] | None:
        """A row that is stored whole, shape ``(N,)``; None if it is not."""
        values, units, _ = self.rows.get(step, (None, None, 0.0))
        return values if units is None else None

    def graph(self) -> AttributionGraph:
        """The graph of the rows that are stored."""
        written = self.task.written.tolist()
        rows: Any
        if self.sparsify is None and len(written) * self.task.width <= _DENSE_ENTRIES:
            rows, kept = (
                np.zeros((len(written), self.task.width)),
                np.zeros(len(written)),
            )
            for place, step in enumerate(written):
                found = self.starts.get(step) or self.rows.get(step)
                if found is not None:
                    rows[place], _, kept[place] = found
        elif self.spool is not None:
            return self.spool.graph()
        else:
            rows, kept = self._sparse(written)
        return AttributionGraph.from_rows(
            rows,
            self.task.is_source,
            self.normalization,
            kept=kept,
            behind=self._rows_behind(),
        )

    def _rows_behind(self) -> RowsBehind | None:
        """The plain rows of units that have a contrastive one."""
        if not self.starts:
            return None
        steps = sorted(self.starts)
        rows = np.zeros((len(steps), self.task.width))
        kept = np.zeros(len(steps))
        for place, step in enumerate(steps):
            if step in self.rows:
                rows[place] = self.row(step)
                kept[place] = self.rows[step][2]
        places = np.searchsorted(self.task.written, steps).astype(np.int64)
        return RowsBehind(places, csr_array(rows), kept)

    def _sparse(self, written: Sequence[int]) -> tuple[csr_array, Array]:
        """The rows as a CSR array, and what they kept."""
        values, units, kept = [], [], np.zeros(len(written))
        for place, step in enumerate(written):
            found = self.starts.get(step) or self.rows.get(step)
            if found is None:
                found = np.zeros(0), np.zeros(0, dtype=np.int64), 0.0
            entries, filled, kept[place] = found
            if filled is None:
                filled = np.flatnonzero(entries)
                entries = entries[filled]
            values.append(entries)
            units.append(filled)
        rows = csr_array(
            (
                np.concatenate(values),
                np.concatenate(units),
                np.cumsum([0, *map(len, values)]),
            ),
            shape=(len(written), self.task.width),
        )
        return rows, kept


def fill(
    store: RowStore,
    strategy: Strategy,
    weights: npt.NDArray[np.float64],
    approximation: Approximation,
    show_progress: bool,
) -> None:
    """Compute the rows that a question needs.

    Without a tolerance these are all rows, so that every other question can be
    answered, too. With one, they are computed from the explained units backwards, the
    row with the most pending mass first, until the mass that sits on the others is
    within the tolerance.

    Args:
        store (RowStore): where rows are kept.
        strategy (Strategy): how they are computed.
        weights (numpy.ndarray): weight of each step, zero where it is not explained,
            shape ``(steps,)``.
        approximation (Approximation): what may be left out.
        show_progress (bool): show a progress bar on stderr.
    """
    G = len(store.task.written)
    bar = tqdm(
        desc="rows",
        unit="row",
        total=G,
        initial=len(store.rows),
        disable=not (show_progress and strategy.by_row),
    )
    with bar:
        try:
            _fill(store, strategy, weights, approximation, bar)
        except _FellBack:
            _fill(store, strategy, weights, approximation, bar)


def _fill(
    store: RowStore,
    strategy: Strategy,
    weights: npt.NDArray[np.float64],
    approximation: Approximation,
    bar: Any,
) -> None:
    written = store.task.written
    if approximation.tolerance == 0.0 or not strategy.by_row:
        if approximation.tolerance > 0.0:
            written = written[written < _after(weights)]
        missing = [step for step in written.tolist() if step not in store.rows]
        if missing:
            for step, row in strategy.rows(missing):
                store.add(step, row)
                bar.update()
        return
    needed = _Needed(store, weights, approximation)
    at_once = _ROWS_AT_ONCE if strategy.name == "fused" else 1
    done = 0
    while wanted := needed.steps(at_once):
        done += len(wanted)
        if strategy.name == "fused":
            at_once = max(_ROWS_AT_ONCE, min(_MOST_AT_ONCE, done // 4))
        missing = sorted(step for step in wanted if step not in store.rows)
        if missing:
            for step, row in strategy.rows(missing):
                store.add(step, row)
                bar.update()
        needed.add(wanted)


class _Needed:
    """Which rows an explanation needs, within its tolerance.

    A step whose explanation starts by a contrastive row stands twice: the plain one, by
    which mass passes, and right after it the contrastive one, which is known.
    """

    def __init__(
        self,
        store: RowStore,
        weights: npt.NDArray[np.float64],
        approximation: Approximation,
    ) -> None:
        self._store = store
        self._written = set(store.task.written.tolist())
        first, steps = len(store.task.sources), np.arange(len(weights))
        twice = np.array(sorted(store.starts), dtype=np.int64)
        self._place = steps + np.searchsorted(twice, steps)
        start = self._place.copy()
        start[twice] += 1
        wide = np.zeros(len(weights) + len(twice))
        wide[start] = weights
        self._step = np.repeat(steps, np.where(np.isin(steps, twice), 2, 1))
        self._columns = np.concatenate([np.arange(first), first + self._place])
        self._width = first + len(wide)
        self._frontier = Frontier(
            first,
            wide,
            store.normalization,
            approximation.tolerance,
            approximation.hops,
        )

    def steps(self, count: int) -> list[int]:
        """Steps whose plain rows are needed next; empty where enough is known."""
        while wanted := self._frontier.wanted(count).tolist():
            plain = []
            for place in wanted:
                step = int(self._step[place])
                if place != self._place[step]:
                    self._push(place, self._store.starts[step][0])
                elif step in self._written:
                    plain.append(step)
                else:
                    # Mass that comes to a unit from outside stays, as in a source.
                    self._push(place, np.zeros(self._store.task.width))
            if plain:
                return plain
        return []

    def add(self, steps: Sequence[int]) -> None:
        """Follow the mass along rows that are stored now."""
        for step in steps:
            self._push(int(self._place[step]), self._store.row(step))

    def _push(self, place: int, row: npt.NDArray[np.float64]) -> None:
        wide = np.zeros(self._width)
        wide[self._columns] = row
        self._frontier.add(place, wide)


def _after(weights: npt.NDArray[np.float64]) -> int:
    """The unit after the last explained one."""
    return int(np.flatnonzero(weights)[-1]) + 1


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
