"""Rows of context-length probing, and of what CAGE's code has in its place.

One pass over a text, cut from the left or with a unit replaced, serves all rows of the
units that stand after what was changed. Rows need whole distributions, so states are
kept, of the generated tokens only, and their logits are made in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from captum_cage.causal import CausalModel
from captum_cage.engines.columns import Columns, unsupported
from captum_cage.engines.engine import Engine
from captum_cage.engines.memory import (
    OutOfMemory,
    bytes_per_token,
    first_pass,
    free_bytes,
    half,
    memory_errors,
)
from captum_cage.engines.verification import (
    Verdict,
    check_length_dependence,
    found_out,
    remember,
    score_at_end,
    verify,
)
from captum_cage.inputs import empty_prompt
from captum_cage.methods.probing import feature_runs
from captum_cage.task import RowTask, check_scores

__all__ = ["CONTEXT_LENGTH", "WEIGHTED_RATIO"]

Array: TypeAlias = npt.NDArray[np.float64]
# Of states, shape (n, width), and the generated tokens that follow them, shape (n,).
Measure: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Texts that are laid out at once, and tokens in one pass from which more texts are no
# faster.
_LAID_OUT = 1024
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 65536}
# Rows that are read out of the columns at once.
_TOGETHER = 256
_MEMORY_SHARE = 0.5
_MOST_HOST_BYTES = 2**29


@dataclass(frozen=True)
class _Text:
    """A changed text, which ends as the plain one does.

    Attributes:
        number (int): what the asker knows it by.
        ids (Tensor): what the model reads: all but generated token ``stop - 1``.
        first (int): first generated token that is measured.
        stop (int): the generated token before which to stop.
    """

    number: int
    ids: Tensor
    first: int
    stop: int

    def place(self, token: int) -> int:
        """Position of the state that a generated token follows."""
        return len(self.ids) - self.stop + token


class _Reader:
    """Passes over changed texts, in batches, by a model that is known to suit.

    Args:
        task (RowTask): what to explain.
        stop (int): number of generated tokens to measure.

    Raises:
        Unsuitable: if the model scores a token otherwise in a longer text.
    """

    def __init__(self, task: RowTask, stop: int) -> None:
        self.model = CausalModel(task.llm_attr.model, task.llm_attr.device)
        self.input = task.prefixed_input(stop - 1)
        self.targets = torch.tensor(task.generated[:stop])
        self._task = task
        self._stop = stop
        self._most = task.batch_size
        self._free = free_bytes(self.model.device)
        plain: Any = self.input.to_model_input()
        self.ids: Tensor = plain[0].cpu()
        # The loop reads the last target, too, where it explains a longer unit.
        check_length_dependence(self.model.model, len(self.ids) + 1)
        with first_pass(), torch.no_grad():
            self.plain = self._verified_states()
        self.model = task.reader(self.model)

    def _verified_states(self) -> Tensor:
        """States of the plain text, shape ``(stop, width)``."""
        known = found_out(self.model, len(self.ids))
        at_end = None
        if known is None:
            at_end = score_at_end(self.model, self.ids, self.targets)
        else:
            self.model.assume(known.splits)
        text = _Text(0, self.ids, 0, self._stop)
        states = self._states([text])[0]
        found = self.model.log_probabilities(states, self.targets)
        # Rounding may lift the log of a probability of one above zero.
        scores = found.clamp(max=0).cpu().numpy()
        check_scores(scores, self._task.generated, self._task.llm_attr.tokenizer)
        if at_end is not None:
            verify(self.model, float(scores[0]), at_end)
            remember(self.model, Verdict(len(self.ids), self.model.splits, None))
        if self._stop == len(self._task.generated):
            self._task.kept["scores"] = scores
        return states

    def measured(
        self, texts: Iterable[_Text], measure: Measure
    ) -> Iterator[tuple[int, Array]]:
        """A number for each generated token after each text.

        Yields:
            tuple[int, numpy.ndarray]: the text's number and the measures of its tokens
            from ``first`` to ``stop``, float64. In any order.
        """
        queue = iter(texts)
        while some := list(islice(queue, _LAID_OUT)):
            some.sort(key=lambda text: len(text.ids))
            while some:
                batch = some[-self._batch_size(some) :]
                try:
                    with memory_errors(), torch.no_grad():
                        found = self._measured(batch, measure)
                except OutOfMemory as error:
                    self._most = half(len(batch), error, self.model.device)
                    continue
                del some[-len(batch) :]
                yield from found

    def _measured(
        self, batch: Sequence[_Text], measure: Measure
    ) -> list[tuple[int, Array]]:
        states = torch.cat(self._states(batch))
        tokens = torch.cat([torch.arange(text.first, text.stop) for text in batch])
        numbers = measure(states, tokens).cpu().numpy()
        ends = np.cumsum([text.stop - text.first for text in batch])
        parts = np.split(numbers, ends[:-1])
        return [(text.number, part) for text, part in zip(batch, parts, strict=True)]

    def _states(self, batch: Sequence[_Text]) -> list[Tensor]:
        """States that the measured tokens of each text follow."""
        longest = max(len(text.ids) for text in batch)
        # What is read after a text's end changes nothing before it.
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, text in enumerate(batch):
            ids[row, : len(text.ids)] = text.ids
        start = min(text.place(text.first) for text in batch)
        keep = torch.arange(start, max(len(text.ids) for text in batch))
        states = self.model.states(
            {"input_ids": ids.to(self.model.device)}, keep, direct=True
        )
        return [
            states[row, text.place(text.first) - start : len(text.ids) - start]
            for row, text in enumerate(batch)
        ]

    def _batch_size(self, texts: Sequence[_Text]) -> int:
        """Number of texts in the next batch, whose longest is the last, at least 1."""
        if self._task.batch_size is not None and self._most is not None:
            return self._most
        kind = self.model.device.type
        length = len(texts[-1].ids)
        free = self._free * _MEMORY_SHARE
        if kind == "cpu":
            free = min(free, _MOST_HOST_BYTES)
        each = length * bytes_per_token(self.model.model)
        config = getattr(self.model.model, "config", None)
        if getattr(config, "_attn_implementation", "") == "eager":
            each += 3 * getattr(config, "num_attention_heads", 1) * length**2 * 4
        if not self.model.splits:
            each += 3 * self._stop * self.model.vocabulary_bytes()
        size = _ENOUGH_TOKENS.get(kind, _ENOUGH_TOKENS["cuda"]) // length
        size = min(size, int(free // max(each, 1)))
        if self._most is not None:
            size = min(size, self._most)
        return max(1, size)


def _unit_sums(task: RowTask, values: Array, rows: int) -> Array:
    """Sum over the tokens of each generated unit, shape ``(rows,)``."""
    return task.unit_sums(values)[:rows]


# --- context-length probing ----------------------------------------------------------


def _probed_rows(task: RowTask, steps: Sequence[int]) -> Iterator[Array]:
    rows = max(steps) + 1
    probe = _Probe(task, rows)
    columns = Columns.of(task, "context lengths", len(probe.runs), rows)
    shortest = task.kept.setdefault(f"shortest contexts of {rows}", np.zeros(rows))
    for run, divergences in columns.progress(probe.cut(columns.missing())):
        row = probe.row_after_next(run)
        if row is not None:
            shortest[row] = divergences[task.range_of(row)[0]]
        columns.fill(run, _unit_sums(task, divergences, rows))
    alone = probe.alone(steps, shortest)
    for start in range(0, len(steps), _TOGETHER):
        some = list(steps[start : start + _TOGETHER])
        block = np.ascontiguousarray(columns.values[:, some].T)
        for row, found in zip(some, block, strict=True):
            before = probe.runs_before[row]
            divergences = np.concatenate([[0.0], found[:before]])
            divergences[-1] += alone[row]
            effects = np.zeros(task.width)
            units = [unit for unit, _ in probe.runs[:before]]
            np.add.at(effects, units, np.diff(divergences))
            yield effects


class _Probe:
    """A text that is cut after each run of tokens of one unit.

    Args:
        task (RowTask): what to explain.
        rows (int): number of generated units, from the first on.
    """

    def __init__(self, task: RowTask, rows: int) -> None:
        self._task = task
        self._stop = task.range_of(rows - 1)[1]
        self._reader = _Reader(task, self._stop)
        self._prompt = len(task.prompt.ids)
        starts = [self._prompt + task.range_of(row)[0] for row in range(rows)]
        self._units = task.unit_of_token()[: starts[-1]]
        self.runs = list(feature_runs(self._units))
        firsts = [int(tokens[0]) for _, tokens in self.runs]
        self.runs_before: list[int] = np.searchsorted(firsts, starts).tolist()
        self._row_of_count = {count: row for row, count in enumerate(self.runs_before)}
        method: Any = task.llm_attr.attr_method
        self._empty: int | None = method.empty
        # Number of tokens at the beginning that are all attributed.
        self._attributed = int(np.argmin(np.append(self._units >= 0, False)))

    def row_after_next(self, run: int) -> int | None:
        """The row before whose unit one more run is left after a cut."""
        return self._row_of_count.get(run + 2)

    def _measure(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self._reader.model.divergences(states, self._reader.plain, tokens)

    def cut(self, runs: Iterable[int]) -> Iterator[tuple[int, Array]]:
        """Divergence of each generated token when all runs up to one are gone.

        It is zero up to the cut, and where no context is left.
        """
        followed = []
        for run in runs:
            if self._first(run) < self._stop:
                followed.append(run)
            else:
                yield run, np.zeros(self._stop)
        texts = map(self._cut, followed)
        for run, found in self._reader.measured(texts, self._measure):
            divergences = np.zeros(self._stop)
            divergences[self._stop - len(found) :] = found
            yield run, divergences

    def _cut(self, run: int) -> _Text:
        after = int(self.runs[run][1][-1]) + 1
        stay = torch.from_numpy(self._units[:after] < 0)
        ids = torch.cat([self._reader.ids[:after][stay], self._reader.ids[after:]])
        return _Text(run, ids, self._first(run), self._stop)

    def _first(self, run: int) -> int:
        """The first generated token after a cut that has a context."""
        after = int(self.runs[run][1][-1]) + 1
        is_empty = self._prompt <= after <= self._attributed
        return max(0, after - self._prompt) + is_empty

    def alone(self, rows: Sequence[int], shortest: Array) -> Array:
        """Divergence of each row's first token when no context is left.

        Args:
            rows (Sequence[int]): the rows.
            shortest (numpy.ndarray): divergence of each row's first token after one
                run alone.
        """
        found = np.zeros(len(self.runs_before))
        texts = []
        for row in rows:
            first = self._task.range_of(row)[0]
            if self._prompt + first > self._attributed:
                continue
            latest = self._reader.ids[self._prompt + first - 1].reshape(1)
            read = latest if self._empty is None else torch.tensor([self._empty])
            tokens = self.runs[self.runs_before[row] - 1][1]
            if len(tokens) == 1 and torch.equal(read, latest):
                # The same text: a row of zeros must not be one of rounding.
                found[row] = shortest[row]
            else:
                texts.append(_Text(row, read, first, first + 1))
        for row, divergence in self._reader.measured(texts, self._measure):
            found[row] = divergence[0]
        return found


# --- the weighed log-ratio of CAGE's code --------------------------------------------


def _replaced_rows(task: RowTask, steps: Sequence[int]) -> Iterator[Array]:
    rows = max(steps) + 1
    stop = task.range_of(rows - 1)[1]
    reader = _Reader(task, stop)
    P = len(task.sources)
    columns = Columns.of(task, "weighed log-ratios", P + rows - 1, rows)

    def measure(states: Tensor, tokens: Tensor) -> Tensor:
        return reader.model.weighted_log_ratios(states, reader.targets[tokens])

    def texts() -> Iterator[_Text]:
        for unit in columns.missing():
            present = torch.ones((1, reader.input.n_itp_features), dtype=torch.long)
            present[0, unit] = 0
            perturbed: Any = reader.input.to_model_input(present)
            ids = perturbed[0].cpu()
            if len(ids) < stop:
                raise empty_prompt()
            if torch.equal(ids, reader.ids):
                columns.fill(unit, np.zeros(rows))
                continue
            first = task.range_of(unit - P)[1] if unit >= P else 0
            yield _Text(unit, ids, first, stop)

    with torch.no_grad():
        plain = measure(reader.plain, torch.arange(stop)).cpu().numpy()
    for unit, found in columns.progress(reader.measured(texts(), measure)):
        lost = np.zeros(stop)
        lost[stop - len(found) :] = plain[stop - len(found) :] - found
        columns.fill(unit, _unit_sums(task, lost, rows))
    yield from columns.rows(task, steps)


def _unsuitable(task: RowTask) -> str | None:
    inp = task.prompt.inp
    if not task.prompt.takes_ids_alone:
        return "its input is more than token ids"
    if task.kwargs.get("num_trials", 1) > 1 and callable(
        getattr(inp, "baselines", None)
    ):
        return "its baselines are drawn anew in each trial"
    return unsupported()(task)


CONTEXT_LENGTH = Engine(
    _probed_rows, unsuitable=unsupported(), by_row=False, rehearsed=True
)
WEIGHTED_RATIO = Engine(
    _replaced_rows, unsuitable=_unsuitable, by_row=False, rehearsed=True
)
