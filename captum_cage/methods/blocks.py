"""The attention blocks of a model, taken apart into what each token brings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cage._checks import complaint
from captum_cage._placement import own_weights
from captum_cage.causal import CausalModel
from captum_cage.methods.attention import (
    AttentionInputs,
    attention_layers,
    attention_weights,
    replaced_attention,
)

__all__ = ["Block", "visit_blocks"]

# Names of the layer that mixes the heads' outputs.
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
# Tokens that are read to find out how a model is built.
_LOOKED_AT = 64
# What sums may differ by, relative to their largest entry.
_CLOSE = {torch.float64: 1e-3, torch.float32: 1e-3}
_CLOSE_HALVES = 3e-2
# Queries whose attention is held at once.
_QUERIES = 128


@dataclass(frozen=True)
class Block:
    """An attention block at some positions: what flows in, and where it comes from.

    What head ``h`` brings from token ``j`` to position ``i`` is ``weights[h, i, j] *
    values[h, j] @ output[h]``. The sum of all that, ``before``, and the block's bias is
    ``after``.

    Attributes:
        layer (int): number of the layer.
        start (int): the first position.
        stop (int): the position after the last; ``K = stop`` tokens come into question.
        attention (Tensor): attention weights, shape ``(heads, some, K)``.
        weights (Tensor): the same, times the scale of a norm that follows the block.
        values (Tensor): value states, shape ``(heads, K, size)``.
        output (Tensor): how a head's values reach the residual stream, shape
            ``(heads, size, width)``.
        before (Tensor): residual stream before the block, shape ``(some, width)``.
        after (Tensor): residual stream after the block, shape ``(some, width)``.
    """

    layer: int
    start: int
    stop: int
    attention: Tensor
    weights: Tensor
    values: Tensor
    output: Tensor
    before: Tensor
    after: Tensor


class _Layer:
    """A decoder layer around its attention."""

    def __init__(self, layer: nn.Module, attention: nn.Module, heads: int) -> None:
        self.layer = layer
        found = (getattr(attention, name, None) for name in _OUTPUTS)
        self.projection: Any = next((m for m in found if m is not None), None)
        # Gemma 2 and 3 and OLMo 2 have a norm between the block and the sum.
        self.norm: Any = None
        if hasattr(layer, "post_feedforward_layernorm"):
            self.norm = layer.post_attention_layernorm
        self.stream: Tensor | None = None
        self._heads = heads

    def output(self) -> Tensor:
        """The output projection of each head, ``(heads, size, width)``."""
        with own_weights(self.projection):
            weight: Tensor = self.projection.weight.detach()
        if isinstance(self.projection, nn.Linear):
            weight = weight.T
        return weight.reshape(self._heads, -1, weight.shape[1])

    def added(self, outputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the block adds to the stream; scale and gain of the norm after it."""
        mixed: Tensor = self.projection(outputs)
        if self.norm is None:
            return mixed, None, None
        normed: Tensor = self.norm(mixed)
        # An RMS norm: one scale per position, one gain per dimension.
        gain = self.norm(torch.ones_like(mixed[:1])).float()
        spread = mixed * gain
        largest = spread.abs().argmax(dim=-1, keepdim=True)
        above, below = normed.gather(-1, largest), spread.gather(-1, largest)
        # Where the block brings nothing, any scale will do.
        scale = torch.where(below == 0, 0, above / torch.where(below == 0, 1, below))
        return normed, scale, gain[0]


# Models whose blocks were found to be of the form that is needed.
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def visit_blocks(
    model: nn.Module,
    ids: Tensor,
    first: int,
    visit: Callable[[Block], None],
    method: str,
) -> None:
    """Take the attention blocks of one forward pass apart.

    Nothing is kept: a block is visited, some positions at a time, and forgotten.

    Args:
        model (nn.Module): a causal language model.
        ids (Tensor): token ids, shape ``(n,)``.
        first (int): the first position of interest.
        visit (Callable): called with each :class:`Block`, layer by layer.
        method (str): who asks.

    Raises:
        ValueError: if the model's blocks are of no known form.
    """
    causal = CausalModel(model)
    with torch.no_grad():
        attending = attention_layers(model, ids, method)
        layers = _layers(model, attending, method)
        if model not in _known:
            _check(causal, layers, ids, method)
            _known[model] = True
        _pass(causal, layers, ids, first, visit)


def _layers(
    model: nn.Module, attending: list[nn.Module], method: str
) -> dict[nn.Module, _Layer]:
    inside: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        for child in module.children():
            inside[child] = module
    config: Any = attending[0].config
    heads = int(config.num_attention_heads)
    layers = {module: _Layer(inside[module], module, heads) for module in attending}
    if any(layer.projection is None for layer in layers.values()):
        raise _unknown_form(model, method, "its attention has no output layer")
    return layers


def _pass(
    causal: CausalModel,
    layers: dict[nn.Module, _Layer],
    ids: Tensor,
    first: int,
    visit: Callable[[Block], None],
) -> None:
    order = {module: number for number, module in enumerate(layers)}

    def attend(inputs: AttentionInputs) -> Tensor:
        layer = layers[inputs.module]
        return _taken_apart(inputs, layer, order[inputs.module], first, visit)

    with ExitStack() as stack:
        for layer in layers.values():
            stack.callback(_keep_stream(layer).remove)
        stack.enter_context(replaced_attention(causal.model, attend))
        causal.read(ids)


def _keep_stream(layer: _Layer) -> Any:
    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        layer.stream = args[0] if args else kwargs["hidden_states"]

    return layer.layer.register_forward_pre_hook(keep, with_kwargs=True)


def _taken_apart(
    inputs: AttentionInputs,
    layer: _Layer,
    number: int,
    first: int,
    visit: Callable[[Block], None],
) -> Tensor:
    """The heads' outputs; on the way, each piece of the block is visited."""
    length = inputs.query.shape[2]
    outputs = torch.empty_like(inputs.value)
    output = layer.output()
    wide = torch.promote_types(output.dtype, torch.float32)
    stream = layer.stream
    cuts = [*range(0, first, _QUERIES), *range(first, length, _QUERIES), length]
    for start, stop in pairwise(cuts):
        attention = attention_weights(inputs, start, stop, stop)
        some = attention.to(inputs.value.dtype) @ inputs.value[:, :, :stop]
        outputs[:, :, start:stop] = some
        if start < first or stream is None:
            continue
        flat = some[0].transpose(0, 1).reshape(stop - start, -1)
        added, scale, gain = layer.added(flat)
        weights = attention[0]
        mixing = output.to(wide)
        if scale is not None and gain is not None:
            mixing = mixing * gain
            weights = weights * scale.T[..., None]
        # Taken before the layer moves what it is given to its own device.
        before = stream[0, start:stop].to(added.device)
        visit(
            Block(
                layer=number,
                start=start,
                stop=stop,
                attention=attention[0],
                weights=weights.to(wide),
                values=inputs.value[0, :, :stop].to(wide),
                output=mixing,
                before=before.to(wide),
                after=(before + added).to(wide),
            )
        )
    return outputs


def _check(
    causal: CausalModel, layers: dict[nn.Module, _Layer], ids: Tensor, method: str
) -> None:
    """Make sure that the sum of stream and block is what the layer goes on with."""
    ids = ids[:_LOOKED_AT]
    close = _CLOSE.get(causal.dtype, _CLOSE_HALVES)
    entered: dict[nn.Module, list[Tensor]] = {}
    after: dict[int, Tensor] = {}

    def same(one: Tensor, other: Tensor, size: Tensor) -> bool:
        allowed = close * float(size.abs().max())
        return torch.allclose(one.to(other.dtype), other, rtol=0, atol=allowed)

    def visit(block: Block) -> None:
        after[block.layer] = block.after
        brought = (block.weights @ block.values @ block.output).sum(dim=0)
        bias = block.after - block.before - brought
        if not same(bias, bias[:1].expand_as(bias), block.after):
            raise _unknown_form(causal.model, method, "its heads do not add up")

    with ExitStack() as stack:
        for layer in layers.values():
            seen = entered.setdefault(layer.layer, [])

            def keep(_: nn.Module, args: Any, seen: list[Tensor] = seen) -> None:
                if args and isinstance(args[0], Tensor):
                    seen.append(args[0])

            for child in layer.layer.children():
                stack.callback(child.register_forward_pre_hook(keep).remove)
        _pass(causal, layers, ids, 0, visit)
    for number, layer in enumerate(layers.values()):
        expected = after[number]
        if not any(
            found.shape[-2:] == expected.shape and same(found[0], expected, expected)
            for found in entered[layer.layer]
        ):
            came = "what follows its attention does not read stream plus attention"
            raise _unknown_form(causal.model, method, came)


def _unknown_form(model: nn.Module, method: str, came: str) -> ValueError:
    return ValueError(
        complaint(
            method,
            "needs decoder layers that add attention to the residual stream, and then "
            "the rest",
            f"{type(model).__name__} came: {came}",
            "Use a method that perturbs, such as FeatureAblation.",
        )
    )
