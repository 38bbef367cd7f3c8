"""What an explanation costs: sequences given to the model, at most and in fact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from captum_cage._captum import argument, draws_fair_coins
from captum_cage.causal import CausalModel
from captum_cage.contrast import Contrast
from captum_cage.engines.gradient import ENOUGH_TOKENS, MOST_SEGMENTS, TOGETHER
from captum_cage.engines.registry import find_engine
from captum_cage.methods.catalogue import capability_of
from captum_cage.task import RowTask

__all__ = [
    "Counted",
    "count_sequences",
    "inner_module",
    "most_sequences",
    "row_sequences",
]

# Passes besides: the plain text, read by an engine in its own way and for the scores.
_ASIDE = 4


@dataclass
class Counted:
    """Sequences that a model was given.

    Attributes:
        sequences (int or None): their number; None for a remote model.
        tokens (int or None): number of tokens in them.
    """

    sequences: int | None = 0
    tokens: int | None = 0


@contextmanager
def count_sequences(llm_attr: Any) -> Iterator[Counted]:
    """Count what the model is given inside the block.

    Args:
        llm_attr: the wrapped object.
    """
    module = inner_module(llm_attr.model)
    if module is None:
        yield Counted(None, None)
        return
    counted = Counted()

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        first = next((one for one in given if isinstance(one, torch.Tensor)), None)
        if first is not None and counted.sequences is not None:
            counted.sequences += first.shape[0]
            counted.tokens = (counted.tokens or 0) + first.shape[0] * first.shape[1]

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counted
    finally:
        handle.remove()


def inner_module(model: Any) -> nn.Module | None:
    """The part of a model that every pass goes through as a module.

    Captum calls the ``forward`` of the model itself, past its hooks.

    Args:
        model: the model.

    Returns:
        torch.nn.Module or None: None where there is none, as of a remote model.
    """
    if not isinstance(model, nn.Module):
        return None
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    if isinstance(inner, nn.Module):
        return inner
    embeddings = getattr(model, "get_input_embeddings", None)
    found = embeddings() if callable(embeddings) else None
    return found if isinstance(found, nn.Module) else None


@dataclass(frozen=True)
class _Work:
    """Rows that are computed together, and what their number of sequences depends on.

    Attributes:
        task (RowTask): what is explained.
        before (tuple[int, ...]): units before each generated unit.
        tokens (tuple[int, ...]): tokens of each generated unit.
        calls (int): times that an engine is asked for some of them.
    """

    task: RowTask
    before: tuple[int, ...]
    tokens: tuple[int, ...]
    calls: int = 1

    @classmethod
    def of(cls, task: RowTask, tolerance: float) -> _Work:
        """All rows of a task."""
        steps = task.written.tolist()
        before = tuple(len(task.sources) + step for step in steps)
        tokens = tuple(len(task.steps.members(step)) for step in steps)
        # Where rows may be left out, they are computed as they turn out to matter.
        return cls(task, before, tokens, len(steps) if tolerance > 0.0 else 1)

    def ending_with(self, step: int, tokens: int, alone: bool) -> _Work:
        """The row of a step that has other tokens, with or without those before it."""
        unit = len(self.task.sources) + step
        earlier = 0 if alone else self.before.index(unit)
        return _Work(
            self.task, (*self.before[:earlier], unit), (*self.tokens[:earlier], tokens)
        )

    @property
    def units(self) -> int:
        """Units before the last row."""
        return self.before[-1]

    @property
    def pieces(self) -> tuple[int, ...]:
        """Calls of the loop for each unit."""
        return self.tokens if self.task.by_token else (1,) * len(self.tokens)

    @property
    def baselines(self) -> int:
        """Number of baselines that a gradient method is given, at least one."""
        given = self.task.kwargs.get("baselines")
        several = isinstance(given, torch.Tensor) and given.dim() > 1
        return len(given) if several else 1  # type: ignore[arg-type]

    def option(self, name: str) -> int:
        """A number that the base method takes, or its default."""
        return int(argument(self.task.llm_attr, self.task.kwargs, name))

    def long_rows(self) -> list[int]:
        """Units before each generated unit of several tokens."""
        pairs = zip(self.before, self.tokens, strict=True)
        return [before for before, tokens in pairs if tokens > 1]

    def drawn_sets(self) -> int:
        """Sets of absent units that a method draws for all rows, each counted."""
        method: Any = self.task.llm_attr.attr_method
        state = torch.get_rng_state()
        try:
            plan = method.plan(self.task.kwargs)
            free = plan.free(self.units)
            counts = [int(np.searchsorted(free, before)) for before in self.before]
            with_units = [count for count in counts if count]
            _, numbers = plan.absent_sets(with_units) if with_units else ([], [])
            return sum(len(one) for one in numbers)
        finally:
            torch.set_rng_state(state)


Formula = Callable[[_Work], int]


# --- engines, without the passes that each makes besides -----------------------------


def _by_unit(work: _Work) -> int:
    return work.units


def _sampled(work: _Work) -> int:
    rows = sum(before + 1 for before in work.long_rows())
    return work.option("n_samples") * (work.units + 1 + rows)


def _regression(work: _Work) -> int:
    """Samples that all rows share, where they can; a long row has more of its own."""
    rows = len(work.before)
    if draws_fair_coins(work.task.llm_attr):
        rows = 1 + len(work.long_rows())
    return work.option("n_samples") * rows


def _own_samples(work: _Work) -> int:
    return work.option("n_samples") * len(work.before)


def _context_lengths(work: _Work) -> int:
    units = work.task.unit_of_token()
    return int(np.count_nonzero(np.diff(units)) + 1 + len(work.before))


def _one(_: _Work) -> int:
    return 1


def _gradients(name: str | None, by_token: bool = False) -> Formula:
    """Of a gradient engine: three sequences at each point for each target at most.

    Segments and copies share out the targets of one call: ``(parts + 1) * copies``
    sequences, and copies are fewer than twice the targets of a part. There are no more
    segments than a number, and no more sequences in a pass than fill it.
    """

    def formula(work: _Work) -> int:
        points = 1 if name is None else work.option(name)
        task = work.task
        model = CausalModel(task.llm_attr.model, task.llm_attr.device)
        each = by_token or model.dtype == torch.float64
        targets = sum(work.tokens) if each else len(work.tokens)
        enough = ENOUGH_TOKENS.get(model.device.type, ENOUGH_TOKENS["cuda"])
        together = max(1, enough // len(task.prompt.ids))
        calls = max(work.calls, math.ceil(len(work.tokens) / TOGETHER))
        filled = calls * (MOST_SEGMENTS + 1) * (points + together - 1)
        aside = work.calls * (4 + work.baselines)
        return min(3 * points * targets, filled) + aside

    return formula


def _sets(work: _Work) -> int:
    return work.drawn_sets()


_ENGINES: dict[str, Formula] = {
    "ablation": _by_unit,
    "shapley-sampling": _sampled,
    "shapley": lambda work: 2**work.units,
    "lime": _regression,
    "kernel-shap": _own_samples,
    "integrated-gradients": _gradients("n_steps"),
    "gradient-x-activation": _gradients(None),
    "ifr": _one,
    "attnlrp": _gradients(None),
    "attention-x-ig": _gradients("n_steps", by_token=True),
    "attention-rollout": _one,
    "value-weighted-attention": _one,
    "mean-attention": _one,
    "clp": _context_lengths,
    "clp-cage": _by_unit,
    "one-shot-reagent": _by_unit,
    "attention-suppression": _by_unit,
    "c-lime": _sets,
    "l-shap": _sets,
    "context-cite": _sets,
    "gradient-shap": _gradients("n_samples"),
}


# --- the loop ------------------------------------------------------------------------


def _each_unit(work: _Work) -> int:
    """One pass per unit before a row, and a few."""
    pairs = zip(work.before, work.pieces, strict=True)
    return sum((before + 3) * pieces for before, pieces in pairs)


def _each(name: str) -> Formula:
    """As many passes per row as an argument says, and a few."""

    def formula(work: _Work) -> int:
        return sum((work.option(name) + 3) * pieces for pieces in work.pieces)

    return formula


def _each_token(name: str | None, more: int = 1) -> Formula:
    """As many passes per token as an argument says, or one, and some more."""

    def formula(work: _Work) -> int:
        points = 1 if name is None else work.option(name)
        return sum(work.tokens) * (points + more)

    return formula


def _each_point_twice(work: _Work) -> int:
    """Each pass is made again by a model that changes logits after its last layer."""
    points = work.option("n_samples") + work.baselines + 1
    return 2 * sum(work.tokens) * points


def _each_step_twice(work: _Work) -> int:
    """A pass with units replaced, one with the others, and the plain one."""
    return sum(work.tokens) * (2 * work.option("max_steps") + 2)


def _each_sample(work: _Work) -> int:
    samples = work.option("n_samples")
    pairs = zip(work.before, work.pieces, strict=True)
    return sum((samples * before + 3) * pieces for before, pieces in pairs)


def _each_order(work: _Work) -> int:
    pairs = zip(work.before, work.pieces, strict=True)
    return sum((math.factorial(n) * n + 3) * pieces for n, pieces in pairs)


def _each_set(work: _Work) -> int:
    return (work.drawn_sets() + 3 * len(work.before)) * max(work.pieces)


_LOOPS: dict[str, Formula] = {
    "ablation": _each_unit,
    "shapley-sampling": _each_sample,
    "shapley": _each_order,
    "lime": _each("n_samples"),
    "kernel-shap": _each("n_samples"),
    "integrated-gradients": _each_token("n_steps", 3),
    "gradient-x-activation": _each_token(None),
    "ifr": _each_token(None),
    "attnlrp": _each_token(None),
    "attention-x-ig": _each_token("n_steps", 4),
    "attention-rollout": _each_token(None),
    "value-weighted-attention": _each_token(None),
    "mean-attention": _each_token(None),
    "clp": _each_unit,
    "clp-cage": _each_unit,
    "one-shot-reagent": _each_unit,
    "reagent": _each_step_twice,
    "attention-suppression": _each_unit,
    "c-lime": _each_set,
    "l-shap": _each_set,
    "context-cite": _each_set,
    "gradient-shap": _each_point_twice,
}


def most_sequences(
    task: RowTask,
    strategy: str,
    *,
    draws: int = 1,
    contrasts: Sequence[Contrast] = (),
    tolerance: float = 0.0,
) -> int | None:
    """Most sequences that the model is given for all rows.

    A bound by counting, not a guess, for a model that was asked in this way before:
    the passes by which it was found out are not made again. For engines it holds where
    the model suits them and no pass runs out of memory; a model that turned out not to
    suit is asked by the loop, which ``strategy="loop"`` counts.

    Args:
        task (RowTask): what is explained.
        strategy (str): how rows are computed, as in ``attribute``.
        draws (int, optional): how often rows are drawn. Default: ``1``
        contrasts (Sequence[Contrast], optional): contrastive rows. Default: ``()``
        tolerance (float, optional): share of the explained mass that rows may hold that
            are left out. Default: ``0.0``

    Returns:
        int or None: None for a base method that is not listed.
    """
    declared = capability_of(type(task.llm_attr.attr_method))
    engine = None if strategy == "loop" else find_engine(task)[0]
    table = _LOOPS if engine is None else _ENGINES
    formula = table.get("" if declared is None else declared.name)
    if formula is None:
        return None
    work = _Work.of(task, tolerance)
    # A contrastive row is two rows after the same text.
    asked = [work] + [
        work.ending_with(contrast.step, tokens, engine is None)
        for contrast in contrasts
        for tokens in (contrast.stop - contrast.start, len(contrast.ids))
    ]
    trials = int(task.kwargs.get("num_trials", 1))
    return draws * sum(formula(one) * trials + _ASIDE for one in asked)


def row_sequences(task: RowTask, step: int) -> int | None:
    """Most sequences that the loop gives the model for one row.

    Args:
        task (RowTask): what is explained.
        step (int): position of the generated unit.

    Returns:
        int or None: None for a base method that is not listed.
    """
    declared = capability_of(type(task.llm_attr.attr_method))
    formula = _LOOPS.get("" if declared is None else declared.name)
    if formula is None:
        return None
    before = len(task.sources) + step
    work = _Work(task, (before,), (len(task.steps.members(step)),))
    return formula(work) * int(task.kwargs.get("num_trials", 1))
