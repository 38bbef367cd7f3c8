"""Baselines that read the attention weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn

from captum_cage.causal import CausalModel
from captum_cage.inputs import token_features
from captum_cage.methods.attention import (
    AttentionInputs,
    attention_layers,
    attention_weights,
    replaced_attention,
)
from captum_cage.methods.blocks import Block, visit_blocks
from captum_cage.methods.capability import Capability
from captum_cage.methods.method import TokenMethod, check_causal_model

__all__ = [
    "AttentionRollout",
    "AttentionXIntegratedGradients",
    "MeanAttention",
    "ValueWeightedAttention",
    "mean_attention",
    "visit_attention",
]

# Queries whose attention is held at once.
_QUERIES = 128


def visit_attention(
    model: nn.Module,
    ids: Tensor,
    first: int,
    visit: Callable[[int, int, Tensor], None],
    method: str,
) -> None:
    """Call a function with the attention of each layer, some queries at a time.

    Args:
        model (nn.Module): a causal language model.
        ids (Tensor): token ids, shape ``(n,)``.
        first (int): the first query of interest.
        visit (Callable): gets the layer's number, the first query, and weights of
            shape ``(heads, some, K)``; ``K`` ends with the last of the queries.
        method (str): who asks.
    """
    layers = {m: i for i, m in enumerate(attention_layers(model, ids, method))}

    def attend(inputs: AttentionInputs) -> Tensor:
        length = inputs.query.shape[2]
        outputs = torch.empty_like(inputs.value)
        cuts = [*range(0, first, _QUERIES), *range(first, length, _QUERIES), length]
        for start, stop in pairwise(cuts):
            weights = attention_weights(inputs, start, stop, stop)
            values = inputs.value[:, :, :stop]
            outputs[:, :, start:stop] = weights.to(values.dtype) @ values
            if start >= first:
                visit(layers[inputs.module], start, weights[0])
        return outputs

    with torch.no_grad(), replaced_attention(model, attend):
        CausalModel(model).read(ids)


def mean_attention(model: Any, ids: Tensor, targets: Tensor, method: str) -> Tensor:
    """Attention of the positions that predict targets, averaged over layers and heads.

    Args:
        model: a causal language model of transformers.
        ids (Tensor): what the model reads, shape ``(n,)``.
        targets (Tensor): ids of the last tokens, shape ``(T,)``.
        method (str): who asks.

    Returns:
        Tensor: shape ``(T, n)``; each row sums to one.
    """
    n, first = len(ids), len(ids) - len(targets)
    sums: list[Tensor] = []

    def visit(_: int, start: int, weights: Tensor) -> None:
        if not sums:
            sums.append(weights.new_zeros((n - first, n)))
        mean = weights.mean(dim=0)
        rows = sums[0][start - first : start - first + len(mean), : mean.shape[1]]
        rows += mean.to(rows.device)

    visit_attention(model, ids, first, visit, method)
    return sums[0] / len(attention_layers(model, ids, method))


class MeanAttention(TokenMethod):
    """Attention of the predicting position, averaged over layers and heads.

    A cheap baseline: where the model looks is not what it uses.

    Args:
        model: a causal language model of transformers.

    Raises:
        TypeError: if the model is no PyTorch model.

    Source: Jain and Wallace (2019), :cite:p:`jain2019attention`, on what it does not
    tell.
    """

    capability: ClassVar[Capability] = Capability(
        name="mean-attention",
        summary="attention of the predicting position, mean of layers and heads",
        source="Jain and Wallace (2019), arXiv:1902.10186",
        wrapper="gradient",
        cost="1 pass",
        needs=("attention",),
        signed=False,
        depends_on_target=False,
    )

    def rows(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean attention of what predicts each target, shape ``(T, n)``."""
        return mean_attention(self.model, ids, targets, type(self).__name__)


class AttentionRollout(TokenMethod):
    r"""Attention multiplied through the layers, with half for the residual stream.

    :math:`\prod_l (A_l + I) / 2`, with the mean ``A`` over heads; the row of the
    position that predicts the token.

    Args:
        model: a causal language model of transformers.

    Raises:
        TypeError: if the model is no PyTorch model.

    Source: Abnar and Zuidema (2020), :cite:p:`abnar2020flow`.
    """

    capability: ClassVar[Capability] = Capability(
        name="attention-rollout",
        summary="attention multiplied through the layers, half residual",
        source="Abnar and Zuidema (2020), arXiv:2005.00928",
        wrapper="gradient",
        cost="1 pass",
        needs=("attention",),
        signed=False,
        depends_on_target=False,
    )

    def rows(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Rollout to what predicts each target, shape ``(T, n)``."""
        n = len(ids)
        total, layer = torch.eye(n), torch.zeros((n, n))

        def visit(_: int, start: int, weights: Tensor) -> None:
            nonlocal total, layer
            # A model may be spread over devices: what is summed follows.
            total, layer = total.to(weights), layer.to(weights)
            mean = weights.mean(dim=0)
            layer[start : start + len(mean), : mean.shape[1]] = mean
            if start + len(mean) == n:
                total = (layer @ total + total) / 2

        visit_attention(self.model, ids, 0, visit, type(self).__name__)
        return total[n - len(targets) :]


class ValueWeightedAttention(TokenMethod):
    r"""Size of what attention brings from each token to the predicting position.

    :math:`\lVert \sum_h \alpha_{hij} v_{hj} O_h \rVert`, the norm of the weighted and
    transformed values of all heads, averaged over layers.

    Args:
        model: a causal language model of transformers, whose layers add attention to
            the residual stream before all else.

    Raises:
        TypeError: if the model is no PyTorch model.
        ValueError: when used, if the model's layers are of another form.

    Source: Kobayashi et al. (2020), :cite:p:`kobayashi2020norms`.
    """

    capability: ClassVar[Capability] = Capability(
        name="value-weighted-attention",
        summary="size of what attention brings from each token, mean of layers",
        source="Kobayashi et al. (2020), arXiv:2004.10102",
        wrapper="gradient",
        cost="1 pass",
        needs=("attention",),
        signed=False,
        depends_on_target=False,
    )

    def rows(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean norms of what is brought to each target, shape ``(T, n)``."""
        n, first = len(ids), len(ids) - len(targets)
        sums: list[Tensor] = []
        layers = 0

        def visit(block: Block) -> None:
            nonlocal layers
            layers = block.layer + 1
            if not sums:
                sums.append(block.after.new_zeros((n - first, n)))
            rows = sums[0][block.start - first : block.stop - first]
            rows[:, : block.stop] += _norms(block).to(rows.device)

        visit_blocks(self.model, ids, first, visit, type(self).__name__)
        return sums[0] / layers


def _norms(block: Block) -> Tensor:
    """Norm of what all heads bring together, shape ``(some, K)``.

    ``|sum_h w_h v_h O_h|^2 = sum_gh w_g w_h (v_g O_g)(v_h O_h)'``: one matrix of heads
    by heads per token, and no vector per pair of tokens.
    """
    brought = torch.einsum("hjs,hsw->jhw", block.values, block.output)
    gram = brought @ brought.transpose(1, 2)  # (K, heads, heads)
    weights = block.weights.permute(2, 1, 0)  # (K, some, heads)
    squares = ((weights @ gram) * weights).sum(dim=-1)
    return squares.clamp(min=0).sqrt().T


class AttentionXIntegratedGradients(LayerIntegratedGradients):
    """Integrated gradients, times the mean attention of the predicting position.

    The attention is that of the position from which the token is predicted; the code of
    the CAGE authors averages it over all later positions instead.

    Args:
        model: a causal language model of transformers.
        layer (nn.Module, optional): the layer whose output is attributed. Default: the
            embeddings
        multiply_by_inputs (bool, optional): as in ``LayerIntegratedGradients``.
            Default: ``True``

    Raises:
        TypeError: if the model is no PyTorch model.

    Source: Walker and Ewetz (2025), :cite:p:`walker2025cage`, as a base method.
    """

    capability: ClassVar[Capability] = Capability(
        name="attention-x-ig",
        summary="integrated gradients, times mean attention",
        source="Walker and Ewetz (2025), arXiv:2512.15663",
        wrapper="gradient",
        cost="n_steps passes, n_steps * tokens backward",
        needs=("attention",),
        counted="n_steps",
    )

    def __init__(
        self,
        model: Any,
        layer: nn.Module | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        check_causal_model(model, "AttentionXIntegratedGradients")
        super().__init__(
            model,
            layer or model.get_input_embeddings(),
            multiply_by_inputs=multiply_by_inputs,
        )
        self.model: Any = model

    def attention(self, ids: Tensor, targets: Tensor) -> Tensor:
        """What the gradients are multiplied by, shape ``(T, n)``."""
        return mean_attention(self.model, ids, targets, type(self).__name__)

    def attribute(
        self,
        inputs: Tensor,
        baselines: Any = None,
        additional_forward_args: Any = None,
        n_steps: int = 50,
        method: str = "gausslegendre",
        internal_batch_size: int | None = None,
    ) -> Tensor:
        """Products for one target, as ``LLMGradientAttribution`` asks for them.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            baselines (optional): as in ``LayerIntegratedGradients``. Default: absent
            additional_forward_args: the input, the target ids, and the place of the
                target to attribute.
            n_steps (int, optional): points of the integral. Default: ``50``
            method (str, optional): its quadrature. Default: ``"gausslegendre"``
            internal_batch_size (int, optional): most points at once. Default: all

        Returns:
            Tensor: shape ``(1, tokens, width)``; its sum over the width is the row.
        """
        found: Tensor = super().attribute(
            inputs,
            baselines=baselines,
            additional_forward_args=additional_forward_args,
            n_steps=n_steps,
            method=method,
            internal_batch_size=internal_batch_size,
        )
        inp, targets, place = additional_forward_args
        targets = torch.as_tensor(targets).cpu()
        ids = torch.cat([torch.tensor(token_features(inp)[0]), targets[:place]])
        rows = self.attention(ids, targets[place : place + 1])
        return found * rows.to(found)[:, :, None]
