"""The attention of a transformers model: read, and replaced for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn

from captum_cage._checks import complaint
from captum_cage._model import text_config
from captum_cage.causal import CausalModel, close_enough

__all__ = [
    "AttentionFunction",
    "AttentionInputs",
    "attended",
    "attention_layers",
    "attention_weights",
    "replaced_attention",
]

AttentionFunction: TypeAlias = Callable[["AttentionInputs"], Tensor]

_IMPLEMENTATION = "_attn_implementation"
# Tokens that are read to find out how a model attends.
_LOOKED_AT = 64
_numbers = count()
# The layers that attend, of each model that was looked at.
_checked: WeakKeyDictionary[nn.Module, tuple[str, list[nn.Module]]] = (
    WeakKeyDictionary()
)


class AttentionInputs:
    """What an attention layer hands to the function that attends.

    Attributes:
        module (nn.Module): the attention layer.
        query (Tensor): shape ``(B, heads, Q, size)``.
        key (Tensor): one per query head, shape ``(B, heads, K, size)``.
        value (Tensor): one per query head, shape ``(B, heads, K, size)``.
        scaling (float): factor of the scores.
        softcap (float or None): bound of the scores, by a hyperbolic tangent.
        softmax_type (torch.dtype): the type in which weights are computed.
    """

    def __init__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        softcap: float | None,
    ) -> None:
        repeats = query.shape[1] // key.shape[1]
        self.module = module
        self.query = query
        self.key = key.repeat_interleave(repeats, dim=1) if repeats > 1 else key
        self.value = value.repeat_interleave(repeats, dim=1) if repeats > 1 else value
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.softcap = softcap
        self.softmax_type = torch.promote_types(query.dtype, torch.float32)
        self._mask = mask

    def allowed(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Which keys some queries may attend to, shape ``(B or 1, 1, some, K)``."""
        Q, K = self.query.shape[2], self.key.shape[2]
        stop = Q if stop is None else stop
        if self._mask is None:
            queries = torch.arange(start, stop, device=self.query.device) + K - Q
            keys = torch.arange(K, device=self.query.device)
            return (keys <= queries[:, None])[None, None]
        mask = self._mask[:, :, start:stop, :K]
        if mask.dtype == torch.bool:
            return mask
        # Masks that are added hold 0, or the type's lowest number.
        return mask > torch.finfo(mask.dtype).min / 2


def attention_weights(
    inputs: AttentionInputs,
    start: int = 0,
    stop: int | None = None,
    keys: int | None = None,
    *,
    allowed: Tensor | None = None,
) -> Tensor:
    """Attention weights of some queries, as the model's own layer computes them.

    Args:
        inputs (AttentionInputs): what the layer has.
        start (int, optional): the first query. Default: ``0``
        stop (int, optional): the query after the last. Default: all
        keys (int, optional): number of keys that come into question. Default: all
        allowed (Tensor, optional): which keys each query may attend to, bool.
            Default: as in the model

    Returns:
        Tensor: shape ``(B, heads, some, keys)``, of at least float32.
    """
    scores = inputs.query[:, :, start:stop] @ inputs.key[:, :, :keys].transpose(2, 3)
    scores = scores * inputs.scaling
    if inputs.softcap is not None:
        scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
    if allowed is None:
        allowed = inputs.allowed(start, stop)[..., :keys]
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=inputs.softmax_type)


def attended(inputs: AttentionInputs) -> Tensor:
    """The heads' outputs, by matrix products that several gradients can go through."""
    return attention_weights(inputs).to(inputs.value.dtype) @ inputs.value


@contextmanager
def replaced_attention(model: nn.Module, function: AttentionFunction) -> Iterator[None]:
    """All attention layers of a model attend by a function; as before, afterwards.

    Args:
        model (nn.Module): a model whose layers use transformers' attention interface.
        function (Callable): given :class:`AttentionInputs`, the heads' outputs, shape
            ``(B, heads, Q, size)``.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if s_aux is not None:
            raise ValueError(
                complaint(
                    "model",
                    "its attention must be a softmax over tokens",
                    f"{type(module).__name__} attends to a sink besides",
                    "Use a method that perturbs, such as FeatureAblation.",
                )
            )
        inputs = AttentionInputs(
            module, query, key, value, attention_mask, scaling, softcap
        )
        if before[0] == "eager":  # which takes every softmax in float32
            inputs.softmax_type = torch.float32
        return function(inputs).transpose(1, 2).contiguous(), None

    name = f"captum_cage_{next(_numbers)}"
    configs = _configs(model)
    before = [getattr(config, _IMPLEMENTATION) for config in configs]
    # By attribute: transformers imports them, and much more, at their first use.
    attentions = transformers.AttentionInterface
    # transformers before 4.53 makes masks in each model.
    masks = getattr(transformers, "AttentionMaskInterface", None)

    def restore() -> None:
        for config, implementation in zip(configs, before, strict=True):
            setattr(config, _IMPLEMENTATION, implementation)
        for registry in (attentions, masks):
            if registry is not None:
                registry._global_mapping.pop(name, None)

    try:
        attentions.register(name, attend)
        if masks is not None:
            masks.register(name, masks()["sdpa"])
        for config in configs:
            setattr(config, _IMPLEMENTATION, name)
        yield
    finally:
        try:
            restore()
        finally:  # once more, for an interrupt on the way
            restore()


def _configs(model: nn.Module) -> list[Any]:
    """All configs that the model's layers ask for their attention."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, _IMPLEMENTATION):
            found[id(config)] = config
    return list(found.values())


def attention_layers(model: nn.Module, ids: Tensor, method: str) -> list[nn.Module]:
    """The layers of a model that attend, which must all do so in the same way.

    A model is looked at once, by two passes over the first ids.

    Args:
        model (nn.Module): a causal language model.
        ids (Tensor): token ids, shape ``(n,)``.
        method (str): who asks.

    Returns:
        list[nn.Module]: in the order of the forward pass.

    Raises:
        ValueError: if a layer does not attend through transformers' attention
            interface, or the model says something else when it is read that way.
    """
    kind = str(getattr(getattr(model, "config", None), _IMPLEMENTATION, None))
    known, found = _checked.get(model, ("", []))
    if known == kind:
        return found
    seen: dict[nn.Module, None] = {}

    def attend(inputs: AttentionInputs) -> Tensor:
        seen[inputs.module] = None
        return attended(inputs)

    causal = CausalModel(model)
    read = {"input_ids": ids[None, :_LOOKED_AT].to(causal.device)}
    last = torch.tensor([read["input_ids"].shape[1] - 1])
    with torch.no_grad():
        plain = causal.states(read, last).float()
        with replaced_attention(model, attend):
            replaced = causal.states(read, last).float()
    if bool(plain.isnan().any()):
        raise ValueError(
            complaint(
                method,
                "needs a model that gives numbers",
                f"{type(model).__name__} gives NaN after {int(last) + 1} tokens",
                "Look for NaN or infinite weights, or use a wider number type.",
            )
        )
    layers = getattr(text_config(model), "num_hidden_layers", 0)
    noise = torch.float32 if kind == "eager" else causal.dtype
    came = ""
    if len(seen) != layers:
        came = f"{len(seen)} of the {layers} layers of {type(model).__name__} do"
    elif not close_enough(plain, replaced, noise):
        came = f"{type(model).__name__} says something else when it is read that way"
    if came:
        raise ValueError(
            complaint(
                method,
                "needs a model whose layers all attend through the attention interface "
                "of transformers",
                came,
                "Use a method that perturbs, such as FeatureAblation.",
            )
        )
    _checked[model] = (kind, list(seen))
    return list(seen)
