"""Log-probabilities of generated tokens under many perturbations, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import TextTokenInput
from torch import Tensor
from transformers import DynamicCache

from captum_cage.causal import CausalModel, Prefix, close_enough
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
from captum_cage.inputs import ChatTokenInput, TokenIdsInput, empty_prompt
from captum_cage.task import (
    RowTask,
    check_perturbed,
    check_possible,
    check_scores,
)

__all__ = ["Perturbation", "SequenceScorer"]

# Perturbations that are laid out at once.
_LAID_OUT = 1024
# Tokens in one pass from which a larger batch is no faster. Measured on 2 cores with a
# 256-wide Llama: 139 us per token at 16 tokens, 28 at 500 to 1500, 40 and more at 2000.
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 65536}
# Most sequences of a batch that starts where its first one changes, as a share of all
# tokens: the others push tokens in vain, about this share of the useful ones.
_BATCH_SHARE = 0.08
# Tokens that such a batch may push in vain whatever its share. By the same measurement
# a pass takes as long as 63 tokens besides those that it pushes.
_IN_VAIN = 16
# Share of the free memory that a batch may take, and most of it on the host, where
# larger batches are no faster.
_MEMORY_SHARE = 0.5
_MOST_HOST_BYTES = 2**29

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Perturbation:
    """Which units are present in one sequence.

    Attributes:
        number (int): what the asker knows it by.
        present (numpy.ndarray): one bool per unit that the sequence has.
        first (int): first generated token whose score is needed.
        stop (int or None): the generated token before which to stop; None for all.
    """

    number: int
    present: npt.NDArray[np.bool_]
    first: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class _Sequence:
    """A perturbed sequence from the first token on that differs from the plain one."""

    number: int
    ids: Tensor  # from `same` on
    same: int
    first: int
    stop: int

    @property
    def length(self) -> int:
        return self.same + len(self.ids)


class SequenceScorer:
    """Scores the generated tokens of a text with some of its units absent.

    One pass over a whole sequence scores every generated token, as a token's score
    depends on nothing after it; the passes start where a sequence first differs from
    the plain one, from the keys and values that the plain one left. Both properties
    of the model are verified on the plain sequence before anything else, and known
    from then on for shorter ones.

    Args:
        task (RowTask): what to explain.
        stop (int): number of generated tokens to score.

    Attributes:
        model (CausalModel): the model.
        ids (Tensor): what it reads of the plain text, on the host, shape ``(n,)``.
        plain (numpy.ndarray): scores in the plain text, shape ``(stop,)``.

    Raises:
        Unsuitable: if the model scores a token otherwise in a longer text.
    """

    def __init__(self, task: RowTask, stop: int) -> None:
        self._task = task
        self._stop = stop
        self.model = CausalModel(task.llm_attr.model, task.llm_attr.device)
        self._input = task.prefixed_input(stop - 1)
        self._targets = torch.tensor(task.generated[:stop])
        self._pairs: list[tuple[Tensor, Tensor]] | None = None
        self._prefix: Prefix | None = None
        self._prefix_length = 0
        self._most = task.batch_size
        self._free = free_bytes(self.model.device)
        self._in_batches = task.prompt.takes_ids_alone
        self._several = type(task.prompt.inp) in (
            TextTokenInput,
            TokenIdsInput,
            ChatTokenInput,
        )
        plain = self._input.to_model_input()
        ids: Any = plain["input_ids"] if isinstance(plain, Mapping) else plain
        self.ids: Tensor = ids[0].cpu()
        # Captum reads the last target, too.
        check_length_dependence(self.model.model, len(self.ids) + 1)
        with first_pass(), torch.no_grad():
            self.plain = self._verified_scores(plain)
        if stop == len(task.generated):
            task.kept["scores"] = self.plain
        self.model = task.reader(self.model)

    @property
    def n_units(self) -> int:
        """Number of units that a sequence has, sources and generated ones."""
        return self._input.n_itp_features

    def indicator(self, present: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Whether each unit is present, given the first ones; the rest are."""
        found = np.ones(self.n_units, dtype=bool)
        found[: len(present)] = present
        return found

    @property
    def reuses_prefix(self) -> bool:
        """Whether passes start from the plain sequence's keys and values."""
        return self._pairs is not None

    def _verified_scores(self, plain: Any) -> Scores:
        """Scores of the plain text, by a model that is known to suit."""
        if not self._in_batches:
            return self._plain_scores(plain)
        length = len(self.ids)
        known = found_out(self.model, length)
        if known is None:
            at_end = score_at_end(self.model, self.ids, self._targets)
            scores = self._plain_scores(plain)
            verify(self.model, float(scores[0]), at_end)
        else:
            self.model.assume(known.splits)
            scores = self._plain_scores(plain)
        if known is None or known.reuses is None:
            self._verify_prefix(scores)
            found = Verdict(length, self.model.splits, self.reuses_prefix)
            remember(self.model, found)
        elif not known.reuses:
            self._pairs = None
        return scores

    def _plain_scores(self, plain: Any) -> Scores:
        keep = torch.arange(len(self.ids) - self._stop, len(self.ids))
        if not self._in_batches:
            return self._checked(self._whole(plain, 0))
        inputs = {"input_ids": self.ids[None].to(self.model.device)}
        cache = DynamicCache() if len(self.ids) > 1 else None
        try:
            with memory_errors():
                states = self.model.states(inputs, keep, cache=cache, direct=True)
        except OutOfMemory:
            raise
        except Exception:
            if cache is None:
                raise
            # A model without such a cache, or with another one.
            cache = None
            states = self.model.states(inputs, keep, direct=True)
        if cache is not None:
            self._pairs = _pairs(cache, len(self.ids))
        return self._checked(self._numbers(states[0], self._targets))

    def _checked(self, scores: Scores) -> Scores:
        check_scores(scores, self._task.generated, self._task.llm_attr.tokenizer)
        check_possible(self._task, scores)
        return scores

    def _numbers(self, states: Tensor, targets: Tensor) -> Scores:
        found = self.model.log_probabilities(states, targets)
        # Rounding may lift the log of a probability of one above zero.
        numbers: Scores = found.clamp(max=0).cpu().numpy()
        return numbers

    def _verify_prefix(self, scores: Scores) -> None:
        """Compare the last plain score with one from the keys and values before it."""
        if self._pairs is None:
            return
        late = len(self.ids) - max(1, len(self.ids) // 8)
        ids = self.ids[None, late:].to(self.model.device)
        keep = torch.tensor([ids.shape[1] - 1])
        try:
            with memory_errors():
                states = self.model.states(
                    {"input_ids": ids}, keep, cache=self.prefix(late), direct=True
                )
        except OutOfMemory:
            raise
        except Exception:  # noqa: BLE001  # whatever a model without this cache raises
            self._pairs = None
            return
        reused = self._numbers(states[0], self._targets[-1:])
        plain = torch.from_numpy(scores[-1:])
        if not close_enough(plain, torch.from_numpy(reused), self.model.dtype):
            self._pairs = None

    def scores(
        self, perturbations: Iterable[Perturbation]
    ) -> Iterator[tuple[int, Scores]]:
        """Log-probability of each generated token in each perturbed text.

        Args:
            perturbations (Iterable[Perturbation]): taken a thousand at a time.

        Yields:
            tuple[int, numpy.ndarray]: the perturbation's number and the scores, shape
            ``(stop,)``, float64; before ``first``, the plain ones. In any order.
        """
        queue = iter(perturbations)
        while some := list(islice(queue, _LAID_OUT)):
            present = {one.number: one.present for one in some}
            for number, scores in self._of(some):
                check_perturbed(self._task, scores, present[number])
                yield number, scores

    def _of(self, some: Sequence[Perturbation]) -> Iterator[tuple[int, Scores]]:
        """Scores of a few perturbed texts, in any order."""
        if not self._in_batches:
            for one in some:
                model_input = self._input.to_model_input(_indicator([one]))
                with first_pass(), torch.no_grad():
                    yield one.number, self._whole(model_input, one.first)
            return
        sequences = []
        for sequence in self._laid_out(some):
            if len(sequence.ids):
                sequences.append(sequence)
            else:
                yield sequence.number, self.plain.copy()
        sequences.sort(key=lambda sequence: (sequence.same, sequence.length))
        yield from self._scored(sequences)

    def _laid_out(self, some: Sequence[Perturbation]) -> Iterator[_Sequence]:
        if self._several:
            ids = self._input.to_model_input(_indicator(some))
            rows = iter(ids.cpu())  # type: ignore[union-attr]
        else:
            rows = (
                self._input.to_model_input(_indicator([one]))[0].cpu()  # type: ignore[union-attr,index]
                for one in some
            )
        for one, row in zip(some, rows, strict=True):
            stop = self._stop if one.stop is None else one.stop
            row = row[: len(row) - self._stop + stop]
            plain = self.ids[: len(self.ids) - self._stop + stop]
            same = 0
            if self._pairs is not None or len(row) == len(plain):
                shorter = min(len(row), len(plain))
                other = torch.nonzero(row[:shorter] != plain[:shorter])
                same = int(other[0]) if len(other) else shorter
            if len(row) < stop:
                raise empty_prompt()
            if not same == len(row) == len(plain):
                # The state that predicts the first score needed is computed anew.
                latest = len(row) - stop + one.first
                same = min(same, latest) if self._pairs is not None else 0
            yield _Sequence(one.number, row[same:], same, one.first, stop)

    def _scored(self, sequences: list[_Sequence]) -> Iterator[tuple[int, Scores]]:
        while sequences:
            batch = sequences[: self._batch_size(sequences)]
            try:
                with memory_errors(), torch.no_grad():
                    found = self._pass(batch)
            except OutOfMemory as error:
                self._most = half(len(batch), error, self.model.device)
                continue
            except Exception:
                if self._pairs is None:
                    raise
                # Some models take one prefix and not another, as old sliding windows.
                self.give_up_prefix()
                continue
            sequences = sequences[len(batch) :]
            yield from found

    def _batch_size(self, sequences: Sequence[_Sequence]) -> int:
        """Number of sequences in the next batch, at least 1."""
        if self._task.batch_size is not None and self._most is not None:
            return self._most
        kind = self.model.device.type
        start = sequences[0].same
        pushed = max(1, sequences[0].length - start)
        enough = _ENOUGH_TOKENS.get(kind, _ENOUGH_TOKENS["cuda"]) // pushed
        size = min(enough, self._fitting(start, pushed))
        if self._pairs is not None:
            vain = accumulate(one.same - start for one in sequences[:size])
            few = sum(tokens <= _IN_VAIN for tokens in vain)
            size = min(size, max(few, int(_BATCH_SHARE * len(self.ids))))
        if self._most is not None:
            size = min(size, self._most)
        return max(1, size)

    def _fitting(self, start: int, pushed: int) -> int:
        """Sequences that fit into the free memory."""
        free = self._free * _MEMORY_SHARE
        if self.model.device.type == "cpu":
            free = min(free, _MOST_HOST_BYTES)
        each = pushed * bytes_per_token(self.model.model)
        if self._pairs is not None:
            keys = self._pairs[0][0]
            token = 2 * keys.shape[1] * keys.shape[3] * keys.element_size()
            each += 2 * (start + pushed) * token
        config = getattr(self.model.model, "config", None)
        if getattr(config, "_attn_implementation", "") == "eager":
            heads = getattr(config, "num_attention_heads", 1)
            each += 3 * heads * pushed * (start + pushed) * 4
        if not self.model.splits:
            each += 3 * self._stop * self.model.vocabulary_bytes()
        return int(free // max(each, 1))

    def _pass(self, batch: Sequence[_Sequence]) -> list[tuple[int, Scores]]:
        """Scores of a few sequences by one pass, from where the first one differs."""
        start = 0 if self._pairs is None else batch[0].same
        longest = max(sequence.length for sequence in batch)
        ids = torch.zeros((len(batch), longest - start), dtype=torch.long)
        rows, places, targets, firsts = [], [], [], []
        for row, sequence in enumerate(batch):
            between = self.ids[start : sequence.same]
            ids[row, : sequence.length - start] = torch.cat([between, sequence.ids])
            # State at `place` predicts the token after it.
            place = sequence.length - sequence.stop - start
            first = max(sequence.first, sequence.same - start - place)
            firsts.append(first)
            tokens = torch.arange(first, sequence.stop)
            rows.append(torch.full_like(tokens, row))
            places.append(tokens + place)
            targets.append(self._targets[first : sequence.stop])
        position = torch.cat(places)
        keep = torch.arange(int(position.min()), int(position.max()) + 1)
        states = self.model.states(
            {"input_ids": ids.to(self.model.device)},
            keep,
            cache=self.prefix(start),
            direct=True,
        )
        picked = states[
            torch.cat(rows).to(states.device),
            (position - keep[0]).to(states.device),
        ]
        numbers = self._numbers(picked, torch.cat(targets))
        found = []
        for sequence, first in zip(batch, firsts, strict=True):
            scores = self.plain.copy()
            count = sequence.stop - first
            scores[first : sequence.stop] = numbers[:count]
            numbers = numbers[count:]
            found.append((sequence.number, scores))
        return found

    def give_up_prefix(self) -> None:
        """Start all further passes at the first token, and remember it of the model."""
        self._pairs = None
        remember(self.model, Verdict(len(self.ids), self.model.splits, False))

    def prefix(self, length: int) -> Prefix | None:
        """Keys and values of the plain text's first tokens; None if of no use."""
        if self._pairs is None or length == 0:
            return None
        if self._prefix is None or self._prefix_length != length:
            self._prefix = Prefix(self._pairs, length)
            self._prefix_length = length
        return self._prefix

    def _whole(self, model_input: Any, first: int) -> Scores:
        """Scores by one pass over one input that is more than ids."""
        inputs = {
            name: value.to(self.model.device) if isinstance(value, Tensor) else value
            for name, value in model_input.items()
        }
        ids = inputs["input_ids"]
        if ids.shape[1] < self._stop:
            raise empty_prompt()
        inputs["attention_mask"] = torch.ones_like(ids)
        keep = torch.arange(ids.shape[1] - self._stop + first, ids.shape[1])
        states = self.model.states(inputs, keep, direct=True)
        numbers = self._numbers(states[0], self._targets[first:])
        if not first:
            return numbers
        scores = self.plain.copy()
        scores[first:] = numbers
        return scores


def _indicator(some: Sequence[Perturbation]) -> Tensor:
    return torch.from_numpy(np.stack([one.present for one in some])).long()


def _pairs(cache: Any, length: int) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values of all layers, if each layer kept those of all tokens."""
    pairs: list[tuple[Any, Any]]
    if hasattr(cache, "layers"):
        pairs = [
            (getattr(layer, "keys", None), getattr(layer, "values", None))
            for layer in cache.layers
        ]
    else:  # transformers before 4.56
        pairs = list(zip(cache.key_cache, cache.value_cache, strict=True))
    for pair in pairs:
        for states in pair:
            if not isinstance(states, Tensor) or states.dim() != 4:
                return None
            if states.shape[0] != 1 or states.shape[2] != length:
                return None
    return pairs or None
