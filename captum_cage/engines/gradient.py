"""Rows of gradient methods: one forward pass for many targets, one backward for each.

The graph of a pass ends at the states from which the targets' logits follow, reaches
back to the attributed layer and no further, and holds no parameter. A unit's tokens are
one target: the gradient of a sum is the sum of gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn

from captum_cage._captum import argument, integration_points
from captum_cage.engines.causal import CausalModel, check_length_dependence, verify
from captum_cage.engines.engine import Engine, Unsuitable
from captum_cage.engines.memory import (
    OutOfMemory,
    bytes_per_token,
    free_bytes,
    memory_errors,
    too_large,
)
from captum_cage.task import RowTask

__all__ = ["GRADIENT"]

# Tokens in one pass below which several targets are carried by copies of the sequence.
_FEW_TOKENS = {"cpu": 256, "cuda": 16384}
_MEMORY_SHARE = 0.5
# A backward pass costs about two forward passes.
_BACKWARD = 2.0


@dataclass(frozen=True)
class _Path:
    """Points in the layer's space at which gradients are taken.

    A row is ``sum_s weights[s] * grad(points[s]) * factors[s]``, summed over width.
    """

    points: Tensor  # (S, tokens, width)
    weights: Tensor  # (S,)
    factors: Tensor  # (S or 1, tokens, width)


def _rows(task: RowTask, steps: Sequence[int]) -> Iterator[npt.NDArray[np.float64]]:
    passes = _Passes(task, task.range_of(max(steps))[1])
    for chunk in passes.chunks(steps):
        for step, scores in zip(chunk, passes.scores(chunk), strict=True):
            width = len(task.sources) + step
            row = np.zeros(task.width)
            columns = passes.units[: len(scores)]
            counted = (columns >= 0) & (columns < width)
            np.add.at(row, columns[counted], scores[counted])
            yield row


class _Passes:
    """Forward and backward passes over one sequence."""

    def __init__(self, task: RowTask, stop: int) -> None:
        self._task = task
        self._method: Any = task.llm_attr.attr_method
        self._layer: nn.Module = self._method.layer
        self._model = CausalModel(task.llm_attr)
        self._prompt = len(task.prompt.ids)
        self._targets = torch.tensor(task.generated[:stop])
        # The last generated token is a target only.
        length = self._prompt + stop - 1
        self._ids = torch.tensor([*task.prompt.ids, *task.generated])[:length]
        self.units = task.unit_of_token()[:length]
        absent = torch.tensor(task.baseline_ids())[:length]
        fixed = torch.from_numpy(self.units < 0)
        self._absent = torch.where(fixed, self._ids, absent)
        check_length_dependence(self._model.model, length)
        with torch.no_grad():
            verify(self._model, self._ids, self._targets)
            self._path = self._points()
        self._most = task.batch_size

    def _inputs(self, length: int, copies: int) -> dict[str, Tensor]:
        ids = self._ids[:length].to(self._model.device)
        return {"input_ids": ids.expand(copies, -1)}

    def _at_layer(self, ids: Tensor) -> Tensor:
        """What the layer gives for these ids, shape ``(tokens, width)``."""
        caught: list[Any] = []

        def catch(_: nn.Module, __: Any, output: Any) -> None:
            caught.append(output)
            raise _Caught

        handle = self._layer.register_forward_hook(catch)
        try:
            keep = torch.tensor([len(ids) - 1])
            inputs = {"input_ids": ids[None].to(self._model.device)}
            self._model.states(inputs, keep)
        except _Caught:
            pass
        finally:
            handle.remove()
        output = caught[0] if caught else None
        if not isinstance(output, Tensor) or output.shape[:2] != (1, len(ids)):
            raise Unsuitable("its layer does not give one vector per token")
        return output[0].detach()

    def _points(self) -> _Path:
        here = self._at_layer(self._ids)
        ones = here.new_ones(1)
        if isinstance(self._method, LayerGradientXActivation):
            factor = here if self._method.multiplies_by_inputs else here.new_ones(())
            return _Path(here[None], ones, factor.expand(1, *here.shape))
        if isinstance(self._method, LayerIntegratedGradients):
            there = self._at_layer(self._without(self._given_baselines()))
            alphas, weights = integration_points(
                argument(self._task.llm_attr, self._task.kwargs, "method"),
                argument(self._task.llm_attr, self._task.kwargs, "n_steps"),
            )
            points = torch.stack([there + alpha * (here - there) for alpha in alphas])
            factor = (
                here - there if self._method.multiplies_by_inputs else here.new_ones(())
            )
            # Captum keeps these weights in float32, whatever the model's type.
            sizes = torch.tensor(weights).float().to(here.device)
            return _Path(points, sizes, factor.expand(1, *here.shape))
        return self._sampled_points(here)

    def _sampled_points(self, here: Tensor) -> _Path:
        """As LayerGradientShap takes them: each with a baseline from a distribution.

        It scales indicators, not embeddings: a token is absent wherever the scaled
        indicator is not exactly 1.
        """
        count = argument(self._task.llm_attr, self._task.kwargs, "n_samples")
        given = self._given_baselines()
        drawn = given[_choices(len(given), count)].float()
        coefficients = torch.tensor(_coefficients(count)).float()[:, None]
        scaled = coefficients * torch.ones_like(drawn) + (1.0 - coefficients) * drawn
        points, factors = [], []
        for point, baseline in zip(scaled, drawn, strict=True):
            points.append(self._at_layer(self._without(point[None])))
            there = self._at_layer(self._without(baseline[None]))
            factors.append(here - there)
        factor = torch.stack(factors)
        if not self._method.multiplies_by_inputs:
            factor = torch.ones_like(factor)
        weights = here.new_full((count,), 1.0 / count)
        return _Path(torch.stack(points), weights, factor)

    def _given_baselines(self) -> Tensor:
        """Indicators that the user gave, one column per attributed token."""
        tokens = int((self.units >= 0).sum())
        given = self._task.kwargs.get("baselines")
        if not isinstance(given, Tensor) or given.dim() == 0:
            return torch.zeros((1, tokens))
        given = given.cpu().reshape(-1, given.shape[-1])
        missing = tokens - given.shape[-1]
        return torch.nn.functional.pad(given, (0, max(missing, 0)))[:, :tokens]

    def _without(self, indicator: Tensor) -> Tensor:
        """Ids with the tokens absent whose indicator is not 1."""
        attributed = torch.from_numpy(self.units >= 0)
        absent = torch.zeros(len(self._ids), dtype=torch.bool)
        absent[attributed] = indicator[0] != 1
        return torch.where(absent, self._absent, self._ids)

    def _end(self, step: int) -> int:
        """Number of tokens that the model must read to predict all of a unit."""
        return self._prompt + self._task.range_of(step)[1] - 1

    def chunks(self, steps: Sequence[int]) -> list[list[int]]:
        """Units that share forward passes: neighbours, so that little is read in vain.

        A chunk costs, per token up to its end, one forward pass and a backward pass
        for each unit.
        """
        ends = [self._end(step) for step in steps]

        def split(parts: int) -> list[list[int]]:
            return [list(part) for part in np.array_split(np.array(steps), parts)]

        def cost(chunks: list[list[int]]) -> float:
            place, total = 0, 0.0
            for chunk in chunks:
                place += len(chunk)
                total += ends[place - 1] * (1 + _BACKWARD * len(chunk))
            return total

        most = min(len(steps), 64)
        least = -(-len(steps) // 64)  # states of at most 64 units at once
        return [
            [int(step) for step in chunk]
            for chunk in min(
                (split(n) for n in range(least, max(most, least) + 1)), key=cost
            )
        ]

    def scores(self, chunk: Sequence[int]) -> npt.NDArray[np.float64]:
        """Attribution of each unit to each token, ``(len(chunk), tokens)``, float64."""
        length = self._end(chunk[-1])
        total = np.zeros((len(chunk), length))
        start = 0
        while start < len(self._path.points):
            size, copies = self._batch(length, len(chunk), start)
            try:
                with memory_errors():
                    found = self._pass(
                        chunk, length, slice(start, start + size), copies
                    )
            except OutOfMemory as error:
                if size * copies == 1:
                    raise too_large(error) from error
                self._most = max(1, size * copies // 2)
                if self._model.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            total += found
            start += size
        return total

    def _targets_of(
        self, chunk: Sequence[int]
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Ranges of generated tokens that are one target, and the unit of each.

        A float64 model is asked token by token: many compute norms in float32, through
        which gradients do not add up to the last digits.
        """
        ranges = [self._task.range_of(step) for step in chunk]
        if self._model.dtype != torch.float64:
            return ranges, list(range(len(ranges)))
        tokens = [
            ((token, token + 1), unit)
            for unit, (start, stop) in enumerate(ranges)
            for token in range(start, stop)
        ]
        return [token for token, _ in tokens], [unit for _, unit in tokens]

    def _batch(self, length: int, units: int, start: int) -> tuple[int, int]:
        """How many points, and how many copies of each, one pass holds."""
        kind = self._model.device.type
        points = len(self._path.points) - start
        each = length * bytes_per_token(self._model.model, kept=True)
        most = int(free_bytes(self._model.device) * _MEMORY_SHARE // each)
        if self._most is not None:
            most = self._most if self._task.batch_size else min(most, self._most)
        inner = self._task.kwargs.get("internal_batch_size")
        if inner is not None:
            most = min(most, inner)
        size = max(1, min(points, most))
        few = _FEW_TOKENS.get(kind, _FEW_TOKENS["cuda"])
        copies = min(units, most // size, few // max(1, size * length))
        return size, max(1, copies)

    def _pass(
        self, chunk: Sequence[int], length: int, some: slice, copies: int
    ) -> npt.NDArray[np.float64]:
        """The part of the scores that some points of the path give."""
        path = self._path
        points = path.points[some, :length]
        size = len(points)
        leaf = points.repeat(copies, 1, 1).requires_grad_()
        ranges, unit_of_range = self._targets_of(chunk)
        first, last = ranges[0][0], ranges[-1][1]
        keep = torch.arange(self._prompt + first - 1, self._prompt + last - 1)
        with (
            torch.enable_grad(),
            _without_parameters(self._model.model),
            _replaced(self._layer, leaf),
        ):
            states = self._model.states(self._inputs(length, len(leaf)), keep)
        kept = states.shape[1]
        slopes = self._model.slopes(
            states[:size].detach().reshape(size * kept, -1),
            self._targets[first:last].repeat(size),
        ).reshape(size, kept, -1)
        weights = path.weights[some, None, None]
        factors = path.factors if len(path.factors) == 1 else path.factors[some]
        found = np.zeros((len(chunk), length))
        for start in range(0, len(ranges), copies):
            group = ranges[start : start + copies]
            upstream = torch.zeros_like(states)
            for copy, (a, b) in enumerate(group):
                rows = slice(copy * size, (copy + 1) * size)
                tokens = slice(a - first, b - first)
                upstream[rows, tokens] = slopes[:, tokens]
            (gradient,) = torch.autograd.grad(
                states, leaf, upstream, retain_graph=start + copies < len(ranges)
            )
            for copy in range(len(group)):
                part = gradient[copy * size : (copy + 1) * size] * weights
                if len(factors) == 1:
                    part = part.sum(dim=0, keepdim=True)
                scores = (part * factors[:, :length]).sum(dim=(0, 2))
                found[unit_of_range[start + copy]] += scores.double().cpu().numpy()
        return found


def _choices(count: int, size: int) -> list[int]:
    # NumPy's global generator, as in Captum: the user seeds that one.
    drawn: list[int] = np.random.choice(count, size).tolist()  # noqa: NPY002
    return drawn


def _coefficients(size: int) -> npt.NDArray[np.float64]:
    return np.random.uniform(0.0, 1.0, size)  # noqa: NPY002


class _Caught(Exception):
    """The layer was reached; the rest of the pass is not needed."""


@contextmanager
def _replaced(layer: nn.Module, output: Tensor) -> Iterator[None]:
    """The layer gives this output, whatever it is asked."""
    handle = layer.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _without_parameters(model: nn.Module) -> Iterator[None]:
    """No parameter takes part in gradients."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _unsuitable(task: RowTask) -> str | None:
    """Why the gradients of this task are Captum's own matter."""
    method: Any = task.llm_attr.attr_method
    if not isinstance(getattr(method, "layer", None), nn.Module):
        return "it attributes to several layers"
    known = {"baselines", "attribute_to_layer_input"}
    if isinstance(method, LayerIntegratedGradients):
        known |= {"method", "n_steps", "internal_batch_size"}
    elif isinstance(method, LayerGradientXActivation):
        known.remove("baselines")
    else:
        known |= {"n_samples", "stdevs"}
    for name, value in task.kwargs.items():
        if name not in known:
            return f"the argument {name!r} is Captum's own matter"
        if name == "baselines" and not isinstance(value, Tensor | int | float):
            return "its baselines are drawn by a function"
        if name == "baselines" and not isinstance(value, Tensor) and value != 0:
            return "its baselines are not absent units"
    if task.kwargs.get("attribute_to_layer_input"):
        return "it attributes to the layer's input"
    if task.kwargs.get("stdevs", 0) != 0:
        return "it adds noise to indicators"
    return None


GRADIENT = Engine(_rows, unsuitable=_unsuitable, by_row=True)
