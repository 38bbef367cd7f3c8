"""AttnLRP: layer-wise relevance propagation through transformers, by gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from captum.attr import LayerGradientXActivation
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from captum_cage._checks import complaint
from captum_cage._model import text_config
from captum_cage._placement import own_weights
from captum_cage.causal import CausalModel
from captum_cage.inputs import token_features
from captum_cage.methods.attention import (
    AttentionInputs,
    attention_layers,
    replaced_attention,
)
from captum_cage.methods.capability import Capability
from captum_cage.methods.method import check_causal_model

__all__ = ["AttnLRP", "Conservation"]

# What the rules below are written for: one gated or plain feed-forward part per layer,
# norms with one scale per position, attention by a softmax.
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
    *("gemma3", "gemma3_text", "gpt2"),
)

_GATED = ("gate_proj", "up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "act")


@dataclass(frozen=True)
class Conservation:
    """Where the relevance of one logit goes.

    Attributes:
        logit (float): what is distributed.
        tokens (float): what arrives at the tokens: the sum of the attributions.
        softmax (float): what the attention's softmax absorbs.
        biases (float): what biases of linear layers and norms absorb.
        positions (float): what learnt position embeddings absorb.
        other (float): the rest: a bound on the logits, and rounding.
    """

    logit: float
    tokens: float
    softmax: float
    biases: float
    positions: float
    other: float


class AttnLRP(LayerGradientXActivation):
    r"""Attention-aware layer-wise relevance propagation, by modified gradients.

    The relevance of a token is its embedding times the gradient of the target's logit,
    where gradients follow these rules: a norm's scale is a constant; an activation is
    a multiplication by output over input; the factors of a product share its relevance
    (gated feed-forward parts: 1/2 each; attention: values 1/2, queries and keys 1/4
    each); the softmax has its own gradient. Products, norms and linear layers without
    biases then conserve relevance; :meth:`conservation` measures the rest.

    Args:
        model: a Llama, Mistral, Qwen 2 or 3, Gemma 1 to 3, or GPT-2 of transformers.
        layer (nn.Module, optional): the layer whose output is attributed. Default: the
            embeddings

    Raises:
        TypeError: if the model is no PyTorch model.
        ValueError: if it is of another family.

    Source: Achtibat et al. (2024), :cite:p:`achtibat2024attnlrp`.

    Example:
        >>> from captum.attr import LLMGradientAttribution
        >>> from captum_cage import GraphContextAttribution, TokenIdsInput
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> cage = GraphContextAttribution(
        ...     LLMGradientAttribution(AttnLRP(model), tokenizer)
        ... )
        >>> ids = tokenizer("Ana has 3 pens. How many pens does Ana have?").input_ids
        >>> result = cage.attribute(TokenIdsInput(ids, tokenizer), "Ana has 3 pens.")
        >>> result.graph.n_generated
        5
    """

    capability: ClassVar[Capability] = Capability(
        name="attnlrp",
        summary="relevance of each token for a logit, propagated layer by layer",
        source="Achtibat et al. (2024), arXiv:2402.05602",
        wrapper="gradient",
        cost="1 pass, G backward in a few batches",
        needs=("attention", f"one of {', '.join(FAMILIES)}"),
    )

    def __init__(self, model: Any, layer: nn.Module | None = None) -> None:
        check_causal_model(model, "AttnLRP")
        family = getattr(text_config(model), "model_type", None)
        if family not in FAMILIES:
            raise ValueError(
                complaint(
                    "AttnLRP",
                    f"has rules for the families {', '.join(FAMILIES)}",
                    f"{type(model).__name__} came, of the family {family!r}",
                    "Use IFR, attention suppression or FeatureAblation.",
                )
            )
        super().__init__(model, layer or model.get_input_embeddings())
        self.model: Any = model

    def attribute(self, inputs: Tensor, additional_forward_args: Any = None) -> Tensor:
        """Relevance of the tokens for one target, as ``LLMGradientAttribution`` asks.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            additional_forward_args: the input, the target ids, and the place of the
                target to attribute.

        Returns:
            Tensor: shape ``(1, tokens, width)``; its sum over the width is the row.
        """
        del inputs
        inp, targets, place = additional_forward_args
        targets = torch.as_tensor(targets).cpu()
        before = torch.cat([torch.tensor(token_features(inp)[0]), targets[:place]])
        relevance, _ = self._relevance(before, targets[place], None)
        return relevance

    def conservation(self, ids: Tensor, target: int) -> Conservation:
        """Where the relevance of one logit goes.

        Args:
            ids (Tensor): what the model reads, shape ``(n,)``.
            target (int): id of the token that follows.
        """
        ledger = _Ledger(CausalModel(self.model).dtype)
        ids = torch.as_tensor(ids).reshape(-1)
        relevance, logit = self._relevance(ids, torch.tensor(target), ledger)
        tokens = float(relevance.double().sum())
        # The factors of a product share: what reaches the weights is half of this.
        softmax = (ledger.absorbed("weights") - ledger.absorbed("scores")) / 2
        biases, positions = ledger.absorbed("biases"), ledger.absorbed("positions")
        return Conservation(
            logit=logit,
            tokens=tokens,
            softmax=softmax,
            biases=biases,
            positions=positions,
            other=logit - tokens - softmax - biases - positions,
        )

    def _relevance(
        self, ids: Tensor, target: Tensor, ledger: _Ledger | None
    ) -> tuple[Tensor, float]:
        causal = CausalModel(self.model)
        inputs = {"input_ids": ids[None].to(causal.device)}
        caught: list[Tensor] = []

        def catch(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            # The last pass counts: a model may be read twice to find out its head.
            caught[:] = [output.detach().requires_grad_()]
            return caught[0]

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self.rules(ids, ledger=ledger))
            stack.callback(self.layer.register_forward_hook(catch).remove)
            keep = torch.tensor([len(ids) - 1])
            states = causal.states(inputs, keep)
            (logit,) = causal.logits(states[0], target.reshape(1))
            wanted = [caught[0], *(ledger.factors.values() if ledger else ())]
            gradients = torch.autograd.grad(
                logit, wanted, allow_unused=True, materialize_grads=True
            )
        if ledger is not None:
            ledger.take(gradients[1:])
        return (gradients[0] * caught[0]).detach(), float(logit.detach())

    @contextmanager
    def rules(self, ids: Tensor, *, ledger: _Ledger | None = None) -> Iterator[None]:
        """The model's gradients follow the rules of AttnLRP; as before, afterwards.

        Args:
            ids (Tensor): what the model will read, shape ``(n,)``.
            ledger (optional): notes what is absorbed. Default: nothing is noted
        """
        attention_layers(self.model, ids, "AttnLRP")

        def attend(inputs: AttentionInputs) -> Tensor:
            return _attended(inputs, ledger)

        with ExitStack() as stack:
            for module in self.model.modules():
                for hook in _hooks(module, ledger):
                    stack.callback(hook.remove)
            stack.enter_context(replaced_attention(self.model, attend))
            yield


class _Ledger:
    """What constants take of the relevance: factors of one, and their gradients."""

    def __init__(self, dtype: torch.dtype) -> None:
        kinds = ("weights", "scores", "biases", "positions")
        self.factors = {
            kind: torch.ones((), dtype=dtype, requires_grad=True) for kind in kinds
        }
        self._absorbed: dict[str, float] = {}

    def factor(self, kind: str, where: Tensor) -> Tensor:
        """A factor of one, on the device of what it multiplies."""
        return self.factors[kind].to(where.device)

    def take(self, gradients: tuple[Tensor, ...]) -> None:
        for kind, gradient in zip(self.factors, gradients, strict=True):
            self._absorbed[kind] = float(gradient)

    def absorbed(self, kind: str) -> float:
        return self._absorbed[kind]


def _hooks(module: nn.Module, ledger: _Ledger | None) -> Iterator[Any]:
    """Hooks that make one module follow the rules."""
    kind = type(module).__name__
    if isinstance(module, nn.LayerNorm):
        yield module.register_forward_hook(_layer_norm(ledger))
    elif kind.endswith("RMSNorm"):
        yield module.register_forward_hook(_rms_norm)
    if all(hasattr(module, name) for name in _GATED):
        down: Any = module.down_proj
        yield down.register_forward_pre_hook(lambda _, args: (_scaled(args[0], 0.5),))
    if hasattr(module, "down_proj") or hasattr(module, "c_fc"):
        for name in _ACTIVATIONS:
            activation = getattr(module, name, None)
            if isinstance(activation, nn.Module):
                yield activation.register_forward_hook(_activation)
    if ledger is not None:
        if isinstance(module, nn.Linear | Conv1D) and module.bias is not None:
            yield module.register_forward_hook(_bias(ledger))
        if isinstance(getattr(module, "wpe", None), nn.Embedding):
            wpe: Any = module.wpe
            yield wpe.register_forward_hook(
                lambda _, __, output: output * ledger.factor("positions", output)
            )


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """The same tensor, whose gradient is multiplied by a factor."""
    if not tensor.requires_grad:
        return tensor
    # Hooks on the tensor itself would also scale what flows through its other uses.
    view = tensor.view_as(tensor)
    view.register_hook(lambda gradient: gradient * factor)
    return view


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rms_norm(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = _wide(args[0])
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)) or 0.0
    with torch.no_grad():
        # Of ones, the norm is its gain; some models add one to the weight.
        gain = _wide(module.forward(torch.ones_like(args[0][..., :1, :])))
        gain = gain.reshape(-1, gain.shape[-1])[0] * (1 + eps) ** 0.5
        scale = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        factor = gain * scale
    found: Tensor = x * factor
    return found.to(output.dtype)


def _layer_norm(ledger: _Ledger | None) -> Callable[..., Tensor]:
    def hook(module: nn.LayerNorm, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = _wide(args[0])
        centred = x - x.mean(dim=-1, keepdim=True)
        with torch.no_grad():
            variance = centred.square().mean(dim=-1, keepdim=True)
            scale = (variance + module.eps).rsqrt()
            with own_weights(module):
                weight, bias = (
                    None if one is None else one.detach().to(x.device)
                    for one in (module.weight, module.bias)
                )
            if weight is not None:
                scale = scale * weight
        found = centred * scale
        if bias is not None:
            found = found + (
                bias if ledger is None else bias * ledger.factor("biases", bias)
            )
        return found.to(output)

    return hook


def _activation(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = args[0]
    with torch.no_grad():
        # Where nothing comes in, there is nothing to propagate.
        slope = torch.where(x == 0, 0, output / torch.where(x == 0, 1, x))
    return x * slope


def _bias(ledger: _Ledger) -> Callable[..., Tensor]:
    def hook(module: Any, _: Any, output: Tensor) -> Tensor:
        with own_weights(module):
            bias: Tensor = module.bias.detach().to(output.device)
        return output + (ledger.factor("biases", bias) - 1) * bias

    return hook


def _attended(inputs: AttentionInputs, ledger: _Ledger | None) -> Tensor:
    """Attention whose products share relevance, with the softmax's own gradient."""
    query, key = _scaled(inputs.query, 0.25), _scaled(inputs.key, 0.25)
    value = _scaled(inputs.value, 0.5)
    allowed = inputs.allowed()
    if ledger is None and inputs.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=inputs.scaling
        )
    scores = query @ key.transpose(2, 3) * inputs.scaling
    if inputs.softcap is not None:
        scores = _capped(scores, inputs.softcap)
    if ledger is not None:
        scores = scores * ledger.factor("scores", scores)
    scores = scores.masked_fill(~allowed, float("-inf"))
    weights = torch.softmax(_wide(scores), dim=-1).to(value.dtype)
    if ledger is not None:
        weights = weights * ledger.factor("weights", weights)
    return weights @ value


def _capped(scores: Tensor, cap: float) -> Tensor:
    """A bound on scores, as an activation."""
    with torch.no_grad():
        capped = torch.tanh(scores / cap) * cap
        slope = torch.where(
            scores == 0, 1, capped / torch.where(scores == 0, 1, scores)
        )
    return scores * slope
