"""Passes that an engine would make, written down, and a few of them made and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from captum_cage.causal import CausalModel

__all__ = ["Pass", "Rehearsal", "StandIn"]


@dataclass(frozen=True)
class Pass:
    """One pass through a model, as far as its cost depends on it.

    Attributes:
        sequences (int): sequences in the batch.
        tokens (int): tokens of each that are read.
        before (int): tokens before these whose keys and values are known.
        kept (int): positions of each that get logits.
        backward (bool): whether gradients flow back through it.
    """

    sequences: int
    tokens: int
    before: int = 0
    kept: int = 0
    backward: bool = False

    @property
    def kind(self) -> tuple[bool, int, int]:
        """Passes of one kind take about as long."""
        return (
            self.backward,
            round(np.log2(max(1, self.tokens))),
            round(np.log2(max(1, self.sequences))),
        )

    def parts(self) -> list[float]:
        """What its time is a sum of: a start, tokens, pairs of tokens and so on."""
        read = self.sequences * self.tokens
        return [
            1.0,
            float(read),
            read * (self.before + self.tokens / 2),
            float(self.sequences * self.before),
            float(self.sequences * self.kept),
        ]


class Rehearsal:
    """What an engine has a model read, most of which is not read.

    An engine that knows its model asks :class:`~captum_cage.task.RowTask` who makes its
    passes. In a rehearsal that is a stand-in: it writes each pass down, makes one of
    each kind and times it, and gives zeros for the others.

    Args:
        most (int): passes to make at most.

    Attributes:
        skipped (list[Pass]): passes that were not made.
        made (list[tuple[Pass, float]]): those that were, and their seconds.
    """

    def __init__(self, most: int) -> None:
        self.skipped: list[Pass] = []
        self.made: list[tuple[Pass, float]] = []
        self._most = most
        self._seen: dict[tuple[bool, int, int], int] = {}

    def __call__(self, model: CausalModel) -> StandIn:
        """Who makes the passes of an engine in the model's place."""
        return StandIn(self, model)

    def wants(self, one: Pass) -> bool:
        """Whether a pass is to be made; if not, it is written down."""
        seen = self._seen.get(one.kind, 0)
        same_way = [made for made, _ in self.made if made.backward == one.backward]
        # The first pass of all warms up what the others find warm.
        if len(same_way) < self._most and (not seen or (seen == 1 >= len(same_way))):
            self._seen[one.kind] = seen + 1
            return True
        self.skipped.append(one)
        return False

    @contextmanager
    def timing(self, one: Pass, device: torch.device) -> Iterator[None]:
        """Time a pass that is made."""
        start = _now(device)
        yield
        self.made.append((one, _now(device) - start))

    @contextmanager
    def adding(self, device: torch.device) -> Iterator[None]:
        """Time what belongs to the pass that was made last."""
        start, (one, seconds) = _now(device), self.made[-1]
        yield
        # What was added meanwhile lies within.
        self.made[-1] = one, seconds + _now(device) - start

    def seconds(self) -> float:
        """What the skipped passes would take, by those that were made."""
        return sum(self._seconds(backward) for backward in (False, True))

    def _seconds(self, backward: bool) -> float:
        skipped = [one.parts() for one in self.skipped if one.backward == backward]
        made = [(one, took) for one, took in self.made if one.backward == backward]
        if not skipped or not made:
            return 0.0
        if len(made) > 1 and made[0][0].kind == made[1][0].kind:
            del made[0]
        took = np.array([seconds for _, seconds in made])
        parts = np.array([one.parts() for one, _ in made])
        # Relative errors count: passes of a few tokens are many.
        factors, _ = nnls(parts / took[:, None], np.ones(len(took)))
        return float((np.array(skipped) @ factors).sum())


class StandIn(CausalModel):
    """A model that makes few of the passes that it is asked for.

    Args:
        rehearsal (Rehearsal): what decides which, and writes down the others.
        model (CausalModel): the model.
    """

    def __init__(self, rehearsal: Rehearsal, model: CausalModel) -> None:
        # What is known of the model is not found out once more.
        self.__dict__.update(model.__dict__)
        self._rehearsal = rehearsal
        self._is_made = False
        # A cache that grows, the tokens in it, and whether they were read.
        self._growing: tuple[Any, int, bool] = (None, 0, False)

    def states(
        self,
        inputs: Mapping[str, Any],
        keep: Tensor,
        *,
        cache: Any = None,
        direct: bool = False,
    ) -> Tensor:
        """As the model gives them, or zeros of width one."""
        sequences, tokens = inputs["input_ids"].shape
        growing, before, is_made = self._growing
        goes_on = cache is not None and cache is growing
        if not goes_on:
            before = 0 if cache is None else int(cache.get_seq_length())
        one = Pass(sequences, tokens, before, len(keep))
        # Of a text that is read on, pieces are made or skipped together.
        self._is_made = is_made if goes_on else self._rehearsal.wants(one)
        if goes_on and not is_made:
            self._rehearsal.skipped.append(one)
        if goes_on or (cache is not None and not before):
            self._growing = cache, before + tokens, self._is_made
        if not self._is_made:
            return torch.zeros(1).expand(sequences, len(keep), 1)
        with self._rehearsal.timing(one, self.device):
            return super().states(inputs, keep, cache=cache, direct=direct)

    @contextmanager
    def backward(self, sequences: int, tokens: int, before: int) -> Iterator[bool]:
        """Whether to make a backward pass through the states that were asked for last.

        Args:
            sequences (int): sequences in the batch.
            tokens (int): tokens of each, of the last piece.
            before (int): tokens of each before it.
        """
        one = Pass(sequences, tokens, before, backward=True)
        if self._is_made and self._rehearsal.wants(one):
            with self._rehearsal.timing(one, self.device):
                yield True
            return
        if not self._is_made:
            self._rehearsal.skipped.append(one)
        yield False

    def log_probabilities(self, states: Tensor, targets: Tensor) -> Tensor:
        """As the model gives them, or zeros."""
        return self._of("log_probabilities", states, targets)

    def weighted_log_ratios(self, states: Tensor, targets: Tensor) -> Tensor:
        """As the model gives them, or zeros."""
        return self._of("weighted_log_ratios", states, targets)

    def divergences(self, states: Tensor, references: Tensor, which: Tensor) -> Tensor:
        """As the model gives them, or zeros."""
        return self._of("divergences", states, references, which)

    def logits(self, states: Tensor, targets: Tensor) -> Tensor:
        """As the model gives them, or zeros."""
        return self._of("logits", states, targets)

    def slopes(self, states: Tensor, targets: Tensor, *, logit: bool = False) -> Tensor:
        """As the model gives them, or zeros."""
        if not self._is_made:
            return torch.zeros_like(states)
        with self._rehearsal.adding(self.device):
            return super().slopes(states, targets, logit=logit)

    def _of(self, name: str, states: Tensor, *rest: Tensor) -> Tensor:
        if not self._is_made:
            return torch.zeros(len(states), dtype=torch.float64)
        with self._rehearsal.adding(self.device):
            found: Tensor = getattr(super(), name)(states, *rest)
        return found


def _now(device: torch.device) -> float:
    """Seconds, when a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
