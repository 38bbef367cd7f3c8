"""What an explanation costs: sequences given to the model, at most and in fact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from captum_cage._captum import argument
from captum_cage.engines.registry import find_engine
from captum_cage.methods.catalogue import capability_of
from captum_cage.task import RowTask

__all__ = ["Counted", "count_sequences", "most_sequences"]

# Passes that an engine makes besides: the plain text, and two that verify the model.
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
    module = _inner(llm_attr.model)
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


def _inner(model: Any) -> nn.Module | None:
    """The part of a model that every pass goes through as a module.

    Captum calls the ``forward`` of the model itself, past its hooks.
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
    """What the number of sequences depends on.

    Attributes:
        task (RowTask): what is explained.
        before (tuple[int, ...]): units before each generated unit.
        tokens (tuple[int, ...]): tokens of each generated unit.
    """

    task: RowTask
    before: tuple[int, ...] = field(init=False)
    tokens: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        first = len(self.task.sources)
        written = self.task.written.tolist()
        ranges = [self.task.range_of(step) for step in written]
        object.__setattr__(self, "before", tuple(first + step for step in written))
        object.__setattr__(self, "tokens", tuple(b - a for a, b in ranges))

    @property
    def units(self) -> int:
        """Units before the last row."""
        return self.before[-1]

    @property
    def pieces(self) -> tuple[int, ...]:
        """Calls of the loop for each unit."""
        return self.tokens if self.task.by_token else (1,) * len(self.tokens)

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
            _, numbers = plan.absent_sets([count for count in counts if count])
            return sum(len(one) for one in numbers)
        finally:
            torch.set_rng_state(state)


Formula = Callable[[_Work], int]


def _by_unit(work: _Work) -> int:
    return work.units


def _sampled(work: _Work) -> int:
    rows = sum(before + 1 for before in work.long_rows())
    return work.option("n_samples") * (work.units + 1 + rows)


def _shared_samples(work: _Work) -> int:
    return (work.option("n_samples") + 1) * (1 + len(work.long_rows()))


def _samples_per_row(work: _Work) -> int:
    return (work.option("n_samples") + 3) * 2 * len(work.before)


def _context_lengths(work: _Work) -> int:
    units = work.task.unit_of_token()
    return int(np.count_nonzero(np.diff(units)) + 1 + len(work.before))


def _one(_: _Work) -> int:
    return 1


def _points(name: str | None) -> Formula:
    """Of a gradient engine: each target has at most two passes at each point."""

    def formula(work: _Work) -> int:
        points = 1 if name is None else work.option(name)
        return points * (2 * sum(work.tokens) + 2)

    return formula


# Sequences of an engine, without those that it makes besides.
_ENGINES: dict[str, Formula] = {
    "ablation": _by_unit,
    "shapley-sampling": _sampled,
    "shapley": lambda work: 2**work.units,
    "lime": _shared_samples,
    "kernel-shap": _samples_per_row,
    "integrated-gradients": _points("n_steps"),
    "gradient-x-activation": _points(None),
    "ifr": _one,
    "attnlrp": _points(None),
    "attention-x-ig": _points("n_steps"),
    "attention-rollout": _one,
    "value-weighted-attention": _one,
    "mean-attention": _one,
    "clp": _context_lengths,
    "clp-cage": _by_unit,
    "one-shot-reagent": _by_unit,
    "attention-suppression": _by_unit,
    "c-lime": lambda work: 2 * work.drawn_sets(),
    "l-shap": lambda work: 2 * work.drawn_sets(),
    "context-cite": lambda work: 2 * work.drawn_sets(),
    "gradient-shap": _points("n_samples"),
}


def _each_unit(work: _Work) -> int:
    """One pass per unit before a row, and a few."""
    pairs = zip(work.before, work.pieces, strict=True)
    return sum((before + 3) * pieces for before, pieces in pairs)


def _each(name: str) -> Formula:
    """As many passes per row as an argument says, and a few."""

    def formula(work: _Work) -> int:
        return sum((work.option(name) + 3) * pieces for pieces in work.pieces)

    return formula


def _each_token(name: str | None) -> Formula:
    """As many passes per token as an argument says, and a few."""

    def formula(work: _Work) -> int:
        points = 1 if name is None else work.option(name)
        return sum(work.tokens) * (2 * points + 3)

    return formula


def _each_sample(work: _Work) -> int:
    samples = work.option("n_samples")
    pairs = zip(work.before, work.pieces, strict=True)
    return sum((samples * before + 3) * pieces for before, pieces in pairs)


def _each_order(work: _Work) -> int:
    pairs = zip(work.before, work.pieces, strict=True)
    return sum((math.factorial(n) * n + 3) * pieces for n, pieces in pairs)


def _each_set(work: _Work) -> int:
    return (work.drawn_sets() + 3 * len(work.before)) * max(work.pieces)


# Sequences of the loop.
_LOOPS: dict[str, Formula] = {
    "ablation": _each_unit,
    "shapley-sampling": _each_sample,
    "shapley": _each_order,
    "lime": _each("n_samples"),
    "kernel-shap": _each("n_samples"),
    "integrated-gradients": _each_token("n_steps"),
    "gradient-x-activation": _each_token(None),
    "ifr": _each_token(None),
    "attnlrp": _each_token(None),
    "attention-x-ig": _each_token("n_steps"),
    "attention-rollout": _each_token(None),
    "value-weighted-attention": _each_token(None),
    "mean-attention": _each_token(None),
    "clp": _each_unit,
    "clp-cage": _each_unit,
    "one-shot-reagent": _each_unit,
    "reagent": _each_token("max_steps"),
    "attention-suppression": _each_unit,
    "c-lime": _each_set,
    "l-shap": _each_set,
    "context-cite": _each_set,
    "gradient-shap": _each_token("n_samples"),
}


def most_sequences(
    task: RowTask, strategy: str, *, draws: int = 1, contrasts: Sequence[Any] = ()
) -> int | None:
    """Most sequences that the model is given for all rows.

    A bound by counting, not a guess. For engines it holds where the model suits them;
    one that turns out not to is asked by the loop, which ``strategy="loop"`` counts.

    Args:
        task (RowTask): what is explained.
        strategy (str): how rows are computed, as in ``attribute``.
        draws (int, optional): how often rows are drawn. Default: ``1``
        contrasts (Sequence, optional): contrastive rows. Default: ``()``

    Returns:
        int or None: None for a base method that is not listed.
    """
    declared = capability_of(type(task.llm_attr.attr_method))
    engine = None if strategy == "loop" else find_engine(task)[0]
    table = _LOOPS if engine is None else _ENGINES
    formula = table.get("" if declared is None else declared.name)
    if formula is None:
        return None
    trials = int(task.kwargs.get("num_trials", 1))
    once = formula(_Work(task)) * trials + _ASIDE
    # A contrastive row is two rows after the same text, each a task of its own.
    return draws * once * (1 + 2 * len(contrasts))
