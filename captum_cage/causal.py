"""Passes through a causal language model that keep only what is needed."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from captum_cage._model import text_config
from captum_cage._placement import entry_device, is_dispatched

__all__ = ["CausalModel", "Prefix", "close_enough"]

# Logits that are held at once, in bytes.
_LOGIT_BYTES = {"cpu": 2**25, "cuda": 2**29}

# Tensors of the logits' size that a gradient of their log-probabilities takes.
_COPIES = 6

# Largest difference between two log-probabilities of one token that is still noise.
_NOISE = {torch.float64: 1e-9, torch.float32: 1e-4}
_NOISE_OF_HALVES = 0.25


def close_enough(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two log-probabilities differ by no more than the model's rounding.

    Of what cannot come, both are minus infinity; nothing is close to NaN.
    """
    allowed = _NOISE.get(dtype, _NOISE_OF_HALVES)
    scale = torch.where(one.isfinite(), one.abs(), 1.0).max().clamp(min=1.0)
    difference = torch.where(one == other, 0.0, (one - other).abs())
    return bool(difference.max() <= allowed * scale)


class Prefix(DynamicCache):
    """Keys and values of the first tokens, shared by all sequences of all batches.

    Nothing is ever added: a pass sees the prefix and its own tokens.

    Args:
        pairs: keys and values of each layer, shape ``(1, heads, tokens, size)``.
        length (int): number of tokens to take from them.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], length: int) -> None:
        super().__init__()
        self._shared = [(k[:, :, :length], v[:, :, :length]) for k, v in pairs]
        for layer, (keys, values) in enumerate(self._shared):
            super().update(keys, values, layer)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, of the prefix and of the new tokens."""
        keys, values = self._shared[layer_idx]
        size = (key_states.shape[0], -1, -1, -1)
        return (
            torch.cat([keys.expand(size), key_states], dim=2),
            torch.cat([values.expand(size), value_states], dim=2),
        )


class CausalModel:
    """A causal language model, asked for the states that stand before its logits.

    The output layer is applied here, to chosen positions and in pieces, so that no
    pass holds logits of the vocabulary's width for the whole sequence. Models that
    change logits after that layer are found out, and asked for logits instead.

    Args:
        model: the model.
        device (torch.device or str, optional): where its inputs go. Default: where the
            model takes them
    """

    def __init__(self, model: Any, device: torch.device | str | None = None) -> None:
        self.model: Any = model
        self.device = entry_device(model) if device is None else torch.device(device)
        weights = self.model.parameters() if isinstance(self.model, nn.Module) else ()
        self.dtype: torch.dtype = next(
            (p.dtype for p in weights if p.is_floating_point()), torch.float32
        )
        accepted = inspect.signature(self.model.forward).parameters
        self._accepted = set(accepted)
        self._needs_mask = not isinstance(self.model, transformers.PreTrainedModel)
        find_head = getattr(self.model, "get_output_embeddings", None)
        head = find_head() if callable(find_head) else None
        self._head: nn.Module | None = head if isinstance(head, nn.Module) else None
        self._head_checked = False

    def states(
        self,
        inputs: Mapping[str, Any],
        keep: Tensor,
        *,
        cache: Any = None,
        direct: bool = False,
    ) -> Tensor:
        """What the model has at some positions, from which its logits follow.

        Args:
            inputs (Mapping): arguments of the model's forward, with ``input_ids`` of
                shape ``(B, T)``.
            keep (Tensor): the positions in ``0 .. T - 1``, ascending, the same for all
                sequences.
            cache (optional): the model's key-value cache. Default: none
            direct (bool, optional): call ``model.forward`` rather than the model, as
                Captum's perturbation methods do. Default: ``False``

        Returns:
            Tensor: shape ``(B, len(keep), width)``.
        """
        # On the host, as with several devices the states may lie on any of them.
        keep = keep.cpu()
        arguments, kept, first = self._arguments(inputs, keep, cache)
        chosen = keep - first
        call = self.model.forward if direct else self.model
        if self._head is None:
            return _chosen(_three(call(**arguments).logits), chosen, kept)
        caught: list[Tensor] = []
        mine = threading.get_ident()

        def catch(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if threading.get_ident() != mine:
                return None  # somebody else uses the model meanwhile
            caught.append(args[0])
            return (args[0][:, -1:], *args[1:])

        handle = self._head.register_forward_pre_hook(catch)
        try:
            logits = _three(call(**arguments).logits)
        finally:
            handle.remove()
        if len(caught) == 1 and caught[0].dim() == 3 and caught[0].shape[1] == kept:
            states = caught[0]
            if self._head_checked or self._is_whole_head(states, logits):
                self._head_checked = True
                return _chosen(states, chosen, kept)
        # Engines make their first pass without a cache, which such a pass would fill.
        if cache is not None:
            raise RuntimeError(
                f"{type(self.model).__name__} went through its output layer in another "
                "way than at its first pass. Use strategy='loop'."
            )
        self._head = None
        return self.states(inputs, keep, direct=direct)

    def read(self, ids: Tensor) -> None:
        """One pass over a text, for what hooks see on the way.

        Args:
            ids (Tensor): token ids, shape ``(n,)``.
        """
        last = torch.tensor([len(ids) - 1])
        inputs = {"input_ids": ids[None].to(self.device)}
        self.model(**self._arguments(inputs, last, None)[0])

    def _arguments(
        self, inputs: Mapping[str, Any], keep: Tensor, cache: Any
    ) -> tuple[dict[str, Any], int, int]:
        """Arguments of the model's forward; how many get logits, which is the first."""
        length = inputs["input_ids"].shape[1]
        arguments = dict(inputs)
        if self._needs_mask and "attention_mask" not in arguments:
            before = 0 if cache is None else int(cache.get_seq_length())
            ids = inputs["input_ids"]
            arguments["attention_mask"] = ids.new_ones((len(ids), before + length))
        if "use_cache" in self._accepted:
            arguments["use_cache"] = cache is not None
        if cache is not None:
            arguments["past_key_values"] = cache
        if "logits_to_keep" not in self._accepted:
            return arguments, length, 0
        if not is_dispatched(self.model):
            arguments["logits_to_keep"] = keep
            return arguments, len(keep), 0
        # accelerate would move positions to where the model begins, not where it ends.
        first = int(keep[0])
        arguments["logits_to_keep"] = length - first
        return arguments, length - first, first

    def assume(self, splits: bool) -> None:
        """Take it as known whether the output layer alone makes the logits."""
        self._head_checked = True
        if not splits:
            self._head = None

    def _is_whole_head(self, states: Tensor, logits: Tensor) -> bool:
        """Whether the output layer alone makes the model's logits."""
        if self._head is None:
            return False
        with torch.no_grad():
            own = self._head(states[:, -1:].detach())
            if own.shape != logits.shape:
                return False
            there = logits.detach().to(own.device)
            difference = (own.double() - there.double()).abs().max()
            return bool(difference <= 1e-6 * own.double().abs().max())

    def log_probabilities(self, states: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of a token after each state.

        Args:
            states (Tensor): shape ``(n, width)``.
            targets (Tensor): token ids, shape ``(n,)``.

        Returns:
            Tensor: shape ``(n,)``, float64.
        """
        found = [
            self._log_probabilities(part, targets[start : start + len(part)])
            for start, part in self._pieces(states)
        ]
        return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float64)

    def _pieces(
        self, states: Tensor, copies: int = _COPIES
    ) -> list[tuple[int, Tensor]]:
        size = max(1, _budget(self.device) // (copies * self.vocabulary_bytes()))
        return [
            (start, states[start : start + size])
            for start in range(0, len(states), size)
        ]

    def vocabulary_bytes(self) -> int:
        """Bytes of one position's logits in float32, at least."""
        width: Any = getattr(self._head, "out_features", None)
        if not isinstance(width, int):
            width = getattr(text_config(self.model), "vocab_size", 2**16)
        return int(width) * max(4, self.dtype.itemsize)

    @property
    def splits(self) -> bool:
        """Whether states are narrower than logits."""
        return self._head is not None

    def _log_probabilities(self, states: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits(states)
        if logits.dtype != torch.float64:
            logits = logits.float()
        targets = targets.to(logits.device)
        peak = logits.detach().amax(dim=1, keepdim=True)
        chosen = logits.gather(1, targets[:, None]) - peak
        # In float32 the sum of these two would lose the last digits.
        total = (logits - peak).exp().sum(dim=1)
        return chosen[:, 0].double() - total.double().log()

    def weighted_log_ratios(self, states: Tensor, targets: Tensor) -> Tensor:
        """Sum of a token's log-ratios to all tokens, weighed by its probability.

        ``p(target) * sum_v [log p(target) - log p(v)]`` over the whole vocabulary.

        Args:
            states (Tensor): shape ``(n, width)``.
            targets (Tensor): token ids, shape ``(n,)``.

        Returns:
            Tensor: shape ``(n,)``, float64.
        """
        found = states.new_zeros(len(states), dtype=torch.float64)
        for start, part in self._pieces(states, copies=2 * _COPIES):
            logs = self._logits(part).double().log_softmax(dim=1)
            wanted = targets[start : start + len(part), None].to(logs.device)
            own = logs.gather(1, wanted)[:, 0]
            sums = logs.shape[1] * own - logs.sum(dim=1)
            found[start : start + len(part)] = own.exp() * sums
        return found

    def divergences(self, states: Tensor, references: Tensor, which: Tensor) -> Tensor:
        """Kullback-Leibler divergence of what follows states from what is expected.

        ``sum_v p(v) * (log p(v) - log q(v))`` with ``p`` after the reference and ``q``
        after the state, over the whole vocabulary.

        Args:
            states (Tensor): shape ``(n, width)``.
            references (Tensor): shape ``(m, width)``.
            which (Tensor): reference of each state, shape ``(n,)``.

        Returns:
            Tensor: shape ``(n,)``, float64, 0 or more but for rounding.
        """
        found = states.new_zeros(len(states), dtype=torch.float64)
        # States of one reference side by side, so that its logits are made once.
        order = which.to(states.device).argsort(stable=True)
        for start, part in self._pieces(states[order], copies=2 * _COPIES):
            chosen = order[start : start + len(part)]
            wanted, own = which[chosen.to(which.device)].unique(return_inverse=True)
            expected = self._logits(references[wanted.to(references.device)])
            p = expected.double().log_softmax(dim=1)[own.to(expected.device)]
            q = self._logits(part).double().log_softmax(dim=1)
            terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
            found[chosen] = terms.sum(dim=1).to(found.device)
        return found

    def logits(self, states: Tensor, targets: Tensor) -> Tensor:
        """Logit of a token after each state, shape ``(n,)``.

        Args:
            states (Tensor): shape ``(n, width)``.
            targets (Tensor): token ids, shape ``(n,)``.
        """
        found = []
        for start, part in self._pieces(states):
            logits = self._logits(part)
            wanted = targets[start : start + len(part), None].to(logits.device)
            found.append(logits.gather(1, wanted)[:, 0])
        return torch.cat(found) if found else states.new_zeros(0)

    def probabilities(self, states: Tensor) -> Tensor:
        """Probability of every token after each state, ``(n, vocabulary)``, float64.

        Args:
            states (Tensor): a few states, shape ``(n, width)``.
        """
        return self._logits(states).double().softmax(-1)

    def _logits(self, states: Tensor) -> Tensor:
        logits = states if self._head is None else self._head(states)
        return logits if logits.dtype == torch.float64 else logits.float()

    def slopes(self, states: Tensor, targets: Tensor, *, logit: bool = False) -> Tensor:
        """Gradient of each target's log-probability with respect to its own state.

        Args:
            states (Tensor): shape ``(n, width)``.
            targets (Tensor): token ids, shape ``(n,)``.
            logit (bool, optional): take the target's logit instead. Default: ``False``

        Returns:
            Tensor: shape ``(n, width)``, of the states' type.
        """
        slopes = torch.empty_like(states)
        for start, part in self._pieces(states.detach()):
            leaf = part.clone().requires_grad_()
            with torch.enable_grad():
                score = self.logits if logit else self._log_probabilities
                scores = score(leaf, targets[start : start + len(part)])
                # A token's score depends on its own state alone.
                (slope,) = torch.autograd.grad(scores.sum(), leaf)
            slopes[start : start + len(part)] = slope
        return slopes

    @contextmanager
    def backward(self, sequences: int, tokens: int, before: int) -> Iterator[bool]:
        """Whether to make a backward pass through the states that were asked for last.

        Args:
            sequences (int): sequences in the batch.
            tokens (int): tokens of each, of the last piece.
            before (int): tokens of each before it.
        """
        del sequences, tokens, before
        yield True


def _budget(device: torch.device) -> int:
    return _LOGIT_BYTES.get(device.type, _LOGIT_BYTES["cpu"])


def _three(logits: Tensor) -> Tensor:
    return logits[:, 0] if logits.dim() == 4 else logits  # Llama 4


def _chosen(states: Tensor, keep: Tensor, kept: int) -> Tensor:
    if kept == len(keep) and states.shape[1] == kept:
        return states
    return states[:, keep.to(states.device)]
