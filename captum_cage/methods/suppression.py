"""Attention suppression: what changes when later tokens may not look at a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from captum_cage._checks import one_of
from captum_cage.causal import CausalModel
from captum_cage.methods.attention import (
    AttentionInputs,
    attention_layers,
    attention_weights,
    replaced_attention,
)
from captum_cage.methods.capability import Capability
from captum_cage.methods.method import UnitMethod

__all__ = ["AttentionSuppression", "Effect", "hidden_tokens"]

Effect: TypeAlias = Literal["kl", "log_prob"]
"""Whether a divergence is measured, or the loss of log-probability."""

EFFECTS = ("kl", "log_prob")

# Units whose suppression is read in one pass, outside the engine.
_TOGETHER = 8


class AttentionSuppression(UnitMethod):
    r"""What changes when later tokens may not attend to a unit, in any layer.

    The unit's own tokens see each other; every token outside it that comes after one of
    them does not see that one. Nothing is replaced, so no baseline token is needed, and
    all positions stay. The effect on a target is the divergence of its prediction,
    :math:`\mathrm{KL}(p \Vert p_{\mathrm{suppressed}})`, or the change of its
    log-probability, :math:`\log p - \log p_{\mathrm{suppressed}}`.

    Args:
        model: a causal language model of transformers.
        effect (str, optional): ``"kl"``, which is never negative, or ``"log_prob"``.
            Default: ``"log_prob"``

    Raises:
        TypeError: if the model is no PyTorch model.
        ValueError: if the effect is unknown.

    Source: Bogdan et al. (2025), Thought Anchors, :cite:p:`bogdan2025anchors`.

    Example:
        >>> from captum.attr import LLMAttribution
        >>> from captum_cage import GraphContextAttribution, TokenIdsInput
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> cage = GraphContextAttribution(
        ...     LLMAttribution(AttentionSuppression(model), tokenizer)
        ... )
        >>> ids = tokenizer("Ana has 3 pens. How many pens does Ana have?").input_ids
        >>> result = cage.attribute(TokenIdsInput(ids, tokenizer), "Ana has 3 pens.")
        >>> result.graph.n_generated
        5
    """

    capability: ClassVar[Capability] = Capability(
        name="attention-suppression",
        summary="effect of hiding a unit from later tokens' attention",
        source="Bogdan et al. (2025), arXiv:2506.19143",
        wrapper="perturbation",
        cost="P + G passes over what follows",
        needs=("attention",),
    )

    def __init__(self, model: Any, effect: Effect = "log_prob") -> None:
        super().__init__(model)
        one_of("effect", effect, EFFECTS)
        self.effect: Effect = effect

    @property
    def depends_on_target(self) -> bool:
        """Whether the effect differs between tokens that might be written."""
        return self.effect != "kl"

    def effects(
        self,
        ids: list[int],
        feature_of_token: npt.NDArray[np.int64],
        targets: Tensor,
        **_: Any,
    ) -> Tensor:
        """Effect of each feature on each target, shape ``(T, features)``."""
        whole = torch.cat([torch.tensor(ids), targets[:-1]])
        groups = np.full(len(whole), -1)
        groups[: len(ids)] = feature_of_token
        units = int(feature_of_token.max(initial=-1)) + 1
        attention_layers(self.model, whole, type(self).__name__)
        causal = CausalModel(self.model)
        keep = torch.arange(len(ids) - 1, len(whole))
        read = whole.to(causal.device)
        found = torch.zeros((len(targets), units), dtype=torch.float64)
        with torch.no_grad():
            plain = causal.states({"input_ids": read[None]}, keep)[0]
            for start in range(0, units, _TOGETHER):
                some = range(start, min(units, start + _TOGETHER))
                inside = torch.from_numpy(np.stack([groups == unit for unit in some]))
                inputs = {"input_ids": read.expand(len(inside), -1)}
                with self.suppressed(inside):
                    states = causal.states(inputs, keep)
                for unit, one in zip(some, states, strict=True):
                    found[:, unit] = self.change(causal, plain, one, targets)
        return found

    @contextmanager
    def suppressed(self, inside: Tensor) -> Iterator[None]:
        """Tokens outside a unit do not attend to it; as before, afterwards.

        Args:
            inside (Tensor): whether each token that is read, or kept from before,
                belongs to the unit; one row per sequence, shape ``(B, K)``, bool.
        """
        with hidden_tokens(self.model, inside):
            yield

    def change(
        self, causal: CausalModel, plain: Tensor, states: Tensor, targets: Tensor
    ) -> Tensor:
        """Effect on each target, from what precedes it with and without suppression.

        Args:
            causal (CausalModel): the model.
            plain (Tensor): states of the plain text, shape ``(T, width)``.
            states (Tensor): states with a unit suppressed, shape ``(T, width)``.
            targets (Tensor): what follows them, shape ``(T,)``.

        Returns:
            Tensor: shape ``(T,)``, float64, on the host.
        """
        if self.effect == "kl":
            found = causal.divergences(states, plain, torch.arange(len(states)))
            return found.clamp(min=0).cpu()
        before = causal.log_probabilities(plain, targets)
        return (before - causal.log_probabilities(states, targets)).cpu()


@contextmanager
def hidden_tokens(
    model: Any, inside: Tensor, length: Callable[[], int] | None = None
) -> Iterator[None]:
    """No token outside a group attends to one inside it; as before, afterwards.

    Args:
        model: a causal language model of transformers.
        inside (Tensor): whether each token that is read, or kept from before, belongs
            to the group; one row per sequence, shape ``(B, K)``, bool.
        length (Callable, optional): number of tokens that a sequence has at a pass,
            where it grows; those beyond ``inside`` are outside. Default: ``K``
    """
    masks: dict[tuple[torch.device, int, int, int], Tensor] = {}

    def attend(inputs: AttentionInputs) -> Tensor:
        queries, keys = inputs.query.shape[2], inputs.key.shape[2]
        total = inside.shape[1] if length is None else length()
        kind = (inputs.query.device, total, queries, keys)
        if kind not in masks:
            if any(other[1] != total for other in masks):
                masks.clear()
            here = F.pad(inside, (0, total - inside.shape[1])).to(inputs.query.device)
            outside = ~here[:, total - queries :]
            # Layers with a window keep the last keys only.
            masks[kind] = (
                here[:, None, None, total - keys :] & outside[:, None, :, None]
            )
        return _attended(inputs, inputs.allowed() & ~masks[kind])

    with replaced_attention(model, attend):
        yield


def _attended(inputs: AttentionInputs, allowed: Tensor) -> Tensor:
    if inputs.softcap is None and inputs.softmax_type == inputs.query.dtype:
        return F.scaled_dot_product_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            attn_mask=allowed,
            scale=inputs.scaling,
        )
    weights = attention_weights(inputs, allowed=allowed)
    return weights.to(inputs.value.dtype) @ inputs.value
