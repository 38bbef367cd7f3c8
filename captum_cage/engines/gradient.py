"""Rows of gradient methods: one forward pass for all targets, one backward for each.

The graph of a pass ends at the states from which the targets' logits follow, reaches
back to the attributed layer and no further, and holds no parameter. A unit's tokens are
one target: the gradient of a sum is the sum of gradients.

A sequence is read in segments, each from the keys and values of those before it. A
target's gradient then flows through its own segment and what stands before it, and
through earlier segments' last layer by keys and values alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn
from transformers import DynamicCache

from captum_cage._captum import argument, integration_points, is_captums_own
from captum_cage._model import text_config
from captum_cage.causal import CausalModel, close_enough
from captum_cage.engines.engine import Engine, Unsuitable
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
from captum_cage.methods.attention_maps import AttentionXIntegratedGradients
from captum_cage.methods.attnlrp import AttnLRP
from captum_cage.methods.gradient_shap import EmbeddingGradientShap
from captum_cage.task import RowTask

__all__ = ["ENOUGH_TOKENS", "GRADIENT", "MOST_SEGMENTS", "TOGETHER"]

_MEMORY_SHARE = 0.5
# Tokens in one pass from which more points or copies are no faster.
ENOUGH_TOKENS = {"cpu": 1024, "cuda": 32768}
# What starting the operations of one segment costs, in tokens that pass meanwhile.
_START = {"cpu": 40, "cuda": 8192}
MOST_SEGMENTS = 8
_COPIES = (1, 2, 4, 8, 16, 32, 64)
TOGETHER = 64


@dataclass(frozen=True)
class _Path:
    """Points in the layer's space at which gradients are taken.

    A row is ``sum_s weights[s] * grad(points(s)) * factors[s]``, summed over width.
    """

    points: Callable[[slice], Tensor]  # some of them, (some, tokens, width)
    weights: Tensor  # (S,)
    factors: Tensor  # (S or 1, tokens, width)


def _rows(task: RowTask, steps: Sequence[int]) -> Iterator[npt.NDArray[np.float64]]:
    passes = _Passes(task, task.range_of(max(steps))[1])
    for chunk in _chunks(list(steps)):
        for step, scores in zip(chunk, passes.scores(chunk), strict=True):
            width = len(task.sources) + step
            row = np.zeros(task.width)
            columns = passes.units[: len(scores)]
            counted = (columns >= 0) & (columns < width)
            np.add.at(row, columns[counted], scores[counted])
            yield row


def _chunks(steps: list[int]) -> list[list[int]]:
    """Units whose rows are finished together: what an interrupt may lose."""
    return [steps[i : i + TOGETHER] for i in range(0, len(steps), TOGETHER)]


@dataclass(frozen=True)
class _Target:
    """A sum of log-probabilities whose gradient is taken.

    Attributes:
        place (int): which of the asked units it belongs to.
        first (int): its first generated token.
        stop (int): the generated token after its last.
    """

    place: int
    first: int
    stop: int


@dataclass(frozen=True)
class _Segment:
    """Tokens that are read together, and the targets that they predict."""

    start: int
    stop: int
    targets: tuple[_Target, ...]


@dataclass(frozen=True)
class _Plan:
    """How targets are shared out over passes.

    Attributes:
        segments (tuple[_Segment, ...]): read one after the other.
        copies (int): copies of the sequence, each of which carries another target.
        reads_on (bool): whether a segment is read on from those before it; otherwise
            each starts at the first token.
        cost (float): time, in tokens that pass meanwhile.
    """

    segments: tuple[_Segment, ...]
    copies: int
    reads_on: bool
    cost: float


class _Passes:
    """Forward and backward passes over one sequence."""

    def __init__(self, task: RowTask, stop: int) -> None:
        self._task = task
        self._method: Any = task.llm_attr.attr_method
        self._layer: nn.Module = self._method.layer
        self._lrp = isinstance(self._method, AttnLRP)
        self._model = CausalModel(task.llm_attr.model, task.llm_attr.device)
        self._prompt = len(task.prompt.ids)
        self._targets = torch.tensor(task.generated[:stop])
        # The last generated token is a target only.
        length = self._prompt + stop - 1
        self._ids = torch.tensor([*task.prompt.ids, *task.generated])[:length]
        self.units = task.unit_of_token()[:length]
        absent = torch.tensor(task.baseline_ids())[:length]
        fixed = torch.from_numpy(self.units < 0)
        self._absent = torch.where(fixed, self._ids, absent)
        # Captum reads the last target, too.
        check_length_dependence(self._model.model, length + 1)
        known = found_out(self._model, length)
        with first_pass(), torch.no_grad():
            if known is not None:
                self._model.assume(known.splits)
            else:
                at_end = score_at_end(self._model, self._ids, self._targets)
                verify(self._model, self._plain_scores()[0], at_end)
                remember(self._model, Verdict(length, self._model.splits, None))
            self._path = self._points()
        # One factor per target and token, where the method multiplies by something.
        self._factors: npt.NDArray[np.float64] | None = None
        if isinstance(self._method, AttentionXIntegratedGradients):
            rows = self._method.attention(self._ids, self._targets)
            self._factors = rows.double().cpu().numpy()
        self._reads_on: bool | None = None  # not known yet
        self._most = task.batch_size
        self._reader = task.reader(self._model)

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
            return _Path(here[None].__getitem__, ones, factor.expand(1, *here.shape))
        if isinstance(self._method, LayerIntegratedGradients):
            there = self._at_layer(self._without(self._given_baselines()))
            alphas, weights = integration_points(
                argument(self._task.llm_attr, self._task.kwargs, "method"),
                argument(self._task.llm_attr, self._task.kwargs, "n_steps"),
            )

            def points(some: slice) -> Tensor:
                found = [there + alpha * (here - there) for alpha in alphas[some]]
                return torch.stack(found)

            factor = (
                here - there if self._method.multiplies_by_inputs else here.new_ones(())
            )
            # Captum keeps these weights in float32, whatever the model's type.
            sizes = torch.tensor(weights).float().to(here.device)
            return _Path(points, sizes, factor.expand(1, *here.shape))
        if isinstance(self._method, EmbeddingGradientShap):
            return self._drawn_points(here)
        return self._sampled_points(here)

    def _drawn_points(self, here: Tensor) -> _Path:
        """As GradientSHAP takes them, between embeddings of present and absent."""
        given = self._given_baselines()
        there = [self._at_layer(self._without(one)) for one in given[:, None]]
        points, differences = self._method.draw(
            here,
            torch.stack(there),
            argument(self._task.llm_attr, self._task.kwargs, "n_samples"),
            argument(self._task.llm_attr, self._task.kwargs, "stdevs"),
        )
        if not self._method.multiplies_by_inputs:
            differences = torch.ones_like(differences)
        weights = here.new_full((len(points),), 1.0 / len(points))
        return _Path(points.__getitem__, weights, differences)

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
        found, factors = [], []
        for point, baseline in zip(scaled, drawn, strict=True):
            found.append(self._at_layer(self._without(point[None])))
            there = self._at_layer(self._without(baseline[None]))
            factors.append(here - there)
        factor = torch.stack(factors)
        if not self._method.multiplies_by_inputs:
            factor = torch.ones_like(factor)
        weights = here.new_full((count,), 1.0 / count)
        return _Path(torch.stack(found).__getitem__, weights, factor)

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

    def _plain_scores(self) -> tuple[float, float]:
        """Log-probabilities of the first and the last target in the whole text."""
        known = self._task.kept.get("scores")
        if known is not None and len(known) >= len(self._targets):
            return float(known[0]), float(known[len(self._targets) - 1])
        length = len(self._ids)
        keep = torch.tensor(sorted({length - len(self._targets), length - 1}))
        inputs = {"input_ids": self._ids[None].to(self._model.device)}
        states = self._model.states(inputs, keep, direct=True)
        targets = self._targets[[0, -1]][-len(keep) :]
        found = self._model.log_probabilities(states[0], targets)
        return float(found[0]), float(found[-1])

    def _can_read_on(self) -> bool:
        """Whether the model, read in two segments, says what it says in one."""
        stop = len(self._ids)
        start = self._prompt - 1
        if not 0 < start < stop:
            return False
        ids = self._ids[None].to(self._model.device)
        cache = DynamicCache()
        try:
            with memory_errors():
                last = torch.tensor([start - 1])
                self._model.states({"input_ids": ids[:, :start]}, last, cache=cache)
                last = torch.tensor([stop - start - 1])
                inputs = {"input_ids": ids[:, start:]}
                states = self._model.states(inputs, last, cache=cache)
        except OutOfMemory:
            raise
        except Exception:  # noqa: BLE001  # whatever a model without this cache raises
            return False
        split = self._model.log_probabilities(states[0], self._targets[-1:])
        whole = torch.tensor([self._plain_scores()[1]], dtype=torch.float64)
        return close_enough(whole, split.double().cpu(), self._model.dtype)

    def _targets_of(self, chunk: Sequence[int]) -> list[_Target]:
        """What gradients are taken of: each unit, or each token where that matters.

        Many models compute norms in float32, through which gradients do not add up to
        the last digits of float64; and a method may weigh each token's gradients.
        """
        targets = []
        for place, step in enumerate(chunk):
            first, stop = self._task.range_of(step)
            if self._factors is not None or self._model.dtype == torch.float64:
                targets += [_Target(place, t, t + 1) for t in range(first, stop)]
            else:
                targets.append(_Target(place, first, stop))
        return targets

    def _segments(
        self, targets: Sequence[_Target], parts: int, reads_on: bool
    ) -> tuple[_Segment, ...]:
        """The sequence up to the last target, cut so that targets are spread evenly."""
        segments = []
        start = 0
        before = self._prompt + targets[0].first - 1
        if reads_on and before > 0:
            segments.append(_Segment(0, before, ()))
            start = before
        for part in np.array_split(np.arange(len(targets)), parts):
            some = tuple(targets[i] for i in part)
            stop = self._prompt + some[-1].stop - 1
            segments.append(_Segment(start, stop, some))
            if reads_on:
                start = stop
        return tuple(segments)

    def _plan(
        self, targets: Sequence[_Target], points: int, most: int, reads_on: bool
    ) -> _Plan:
        """Segments and copies of the sequence that take the least time, by estimate.

        Each segment costs its tokens and a start, forward once and backward for each
        group of targets that as many copies carry. Through earlier segments a backward
        pass leaves out most of the last layer.
        """
        start = _START.get(self._model.device.type, _START["cuda"])
        layers = getattr(text_config(self._model.model), "num_hidden_layers", 24)
        lighter = 1 - 0.8 / max(1, layers)

        def plan(parts: int, copies: int) -> _Plan:
            segments = self._segments(targets, parts, reads_on)
            batch = points * copies
            cost = 0.0
            for number, segment in enumerate(segments):
                own = segment.stop - segment.start
                cost += batch * own + start
                groups = -(-len(segment.targets) // copies)
                starts = start * (number + 1 if reads_on else 1)
                cost += groups * (batch * (own + segment.start * lighter) + starts)
            return _Plan(segments, copies, reads_on, cost)

        plans = [
            plan(parts, copies)
            for parts in range(1, min(len(targets), MOST_SEGMENTS) + 1)
            for copies in _COPIES
            if copies == 1 or (copies <= len(targets) and points * copies <= most)
        ]
        return min(plans, key=lambda plan: plan.cost)

    def _best_plan(
        self, targets: Sequence[_Target], points: int, most: int, left: int
    ) -> _Plan:
        """The better of reading in one piece and of reading on, if the model can."""
        whole = self._plan(targets, points, most, False)
        if self._reads_on is False:
            return whole
        split = self._plan(targets, points, most, True)
        gain = whole.cost - split.cost
        if self._reads_on is None:
            start = _START.get(self._model.device.type, _START["cuda"])
            if gain * left / points <= len(self._ids) + 2 * start:
                return whole  # not worth finding out
            with first_pass(), torch.no_grad():
                self._reads_on = self._can_read_on()
        return split if self._reads_on and gain > 0 else whole

    def scores(self, chunk: Sequence[int]) -> npt.NDArray[np.float64]:
        """Attribution of each unit to each token, ``(len(chunk), tokens)``, float64."""
        targets = self._targets_of(chunk)
        kept = self._task.kept.get("gradient")
        if kept is None or kept[0] != tuple(chunk):
            length = self._prompt + targets[-1].stop - 1
            kept = (tuple(chunk), 0, np.zeros((len(chunk), length)))
        _, start, total = kept
        while start < len(self._path.weights):
            most = self._fitting(total.shape[1])
            kind = self._model.device.type
            enough = ENOUGH_TOKENS.get(kind, ENOUGH_TOKENS["cuda"])
            most = max(1, min(most, enough // total.shape[1]))
            left = len(self._path.weights) - start
            size = -(-left // -(-left // most))  # batches of about one size
            plan = self._best_plan(targets, size, most, left)
            try:
                with memory_errors():
                    found = self._pass(plan, slice(start, start + size))
            except OutOfMemory as error:
                self._most = half(size * plan.copies, error, self._model.device)
                continue
            # Sum and place change together: an interrupt may come in between.
            total = total.copy()
            for place, scores in found:
                total[place, : len(scores)] += scores
            start += size
            self._task.kept["gradient"] = (tuple(chunk), start, total)
        return total

    def _fitting(self, length: int) -> int:
        """Sequences of this length whose graph fits into the free memory."""
        each = length * bytes_per_token(self._model.model, kept=True)
        most = int(free_bytes(self._model.device) * _MEMORY_SHARE // each)
        if self._most is not None:
            most = self._most if self._task.batch_size else min(most, self._most)
        inner = self._task.kwargs.get("internal_batch_size")
        return max(1, most if inner is None else min(most, inner))

    def _pass(
        self, plan: _Plan, some: slice
    ) -> list[tuple[int, npt.NDArray[np.float64]]]:
        """The part of each target's scores that some points of the path give."""
        points = self._path.points(some)
        cache = DynamicCache() if plan.reads_on else None
        leaves: list[Tensor] = []
        found = []
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_without_parameters(self._model.model))
            if self._lrp:
                stack.enter_context(self._method.rules(self._ids))
            for segment in plan.segments:
                if cache is None:
                    leaves.clear()
                leaf = points[:, segment.start : segment.stop].repeat(plan.copies, 1, 1)
                leaves.append(leaf.requires_grad_())
                states = self._states(segment, leaf, cache)
                if segment.targets:
                    last = cache is None or segment is plan.segments[-1]
                    found += self._backward(plan, segment, states, leaves, some, last)
        return found

    def _states(self, segment: _Segment, leaf: Tensor, cache: Any) -> Tensor:
        """What predicts the segment's targets, as a function of the layer's output."""
        ids = self._ids[segment.start : segment.stop].to(self._model.device)
        keep = torch.tensor([len(ids) - 1])
        if segment.targets:
            first = self._prompt + segment.targets[0].first - 1
            keep = torch.arange(first, segment.stop) - segment.start
        with _replaced(self._layer, leaf):
            return self._reader.states(
                {"input_ids": ids.expand(len(leaf), -1)}, keep, cache=cache
            )

    def _backward(
        self,
        plan: _Plan,
        segment: _Segment,
        states: Tensor,
        leaves: Sequence[Tensor],
        some: slice,
        last: bool,
    ) -> list[tuple[int, npt.NDArray[np.float64]]]:
        path, targets = self._path, segment.targets
        weights = path.weights[some, None, None]
        factors = path.factors if len(path.factors) == 1 else path.factors[some]
        size = len(path.weights[some])
        first, kept = targets[0].first, states.shape[1]
        slopes = self._reader.slopes(
            states[:size].detach().reshape(size * kept, -1),
            self._targets[first : first + kept].repeat(size),
            logit=self._lrp,
        ).reshape(size, kept, -1)
        found = []
        for start in range(0, len(targets), plan.copies):
            group = targets[start : start + plan.copies]
            upstream = torch.zeros_like(states)
            for copy, target in enumerate(group):
                rows = slice(copy * size, (copy + 1) * size)
                tokens = slice(target.first - first, target.stop - first)
                upstream[rows, tokens] = slopes[:, tokens]
            own = segment.stop - segment.start
            before = sum(leaf.shape[1] for leaf in leaves) - own
            with self._reader.backward(len(states), own, before) as is_made:
                if not is_made:
                    continue
                gradients = torch.autograd.grad(
                    states,
                    list(leaves),
                    upstream,
                    retain_graph=not last or start + plan.copies < len(targets),
                    # A layer that mixes no positions after it gives earlier ones
                    # nothing.
                    allow_unused=True,
                    materialize_grads=True,
                )
            gradient = torch.cat(gradients, dim=1)
            length = gradient.shape[1]
            for copy, target in enumerate(group):
                part = gradient[copy * size : (copy + 1) * size] * weights
                if len(factors) == 1:
                    part = part.sum(dim=0, keepdim=True)
                scores = (part * factors[:, :length]).sum(dim=(0, 2))
                found.append((target.place, self._weighed(target, scores)))
        return found

    def _weighed(self, target: _Target, scores: Tensor) -> npt.NDArray[np.float64]:
        """Scores of the tokens, times what the method multiplies them by."""
        found: npt.NDArray[np.float64] = scores.double().cpu().numpy()
        if self._factors is not None:
            found = found * self._factors[target.first, : len(found)]
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
    # By name, as weights that are kept elsewhere are other objects after each pass.
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    for name in trained:
        model.get_parameter(name).requires_grad_(False)
    try:
        yield
    finally:
        for name in trained:
            model.get_parameter(name).requires_grad_(True)


def _unsuitable(task: RowTask) -> str | None:
    """Why the gradients of this task are Captum's own matter."""
    method: Any = task.llm_attr.attr_method
    if not isinstance(getattr(method, "layer", None), nn.Module):
        return "it attributes to several layers"
    if not is_captums_own(task.llm_attr):
        return f"{type(task.llm_attr).__name__} may compute something of its own"
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
    if task.kwargs.get("stdevs", 0) != 0 and not isinstance(
        method, EmbeddingGradientShap
    ):
        return "it adds noise to indicators"
    return None


GRADIENT = Engine(_rows, unsuitable=_unsuitable, by_row=True, rehearsed=True)
