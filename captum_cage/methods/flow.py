"""Information flow routes: how near each token brings a block to its output."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from captum_cage._checks import one_of
from captum_cage.methods.blocks import Block, visit_blocks
from captum_cage.methods.capability import Capability
from captum_cage.methods.method import TokenMethod

__all__ = ["IFR", "Aggregation", "Proximity", "route_shares"]

Proximity: TypeAlias = Literal["l1", "l2"]
"""The norm that says how near a token brings a block to its output."""
Aggregation: TypeAlias = Literal["sum", "product"]
"""Whether the shares of layers are summed, or multiplied along the layers."""

PROXIMITIES = ("l1", "l2")
AGGREGATIONS = ("sum", "product")

# Numbers in the largest tensor of one piece of the L1 proximity: about a core's cache.
_PIECE = 2**18
# Most positions in one piece; more of them differ too much in what they need.
_TOGETHER = 8
# Numbers in what some heads bring from all tokens.
_BROUGHT = 2**24
# Shares of the dimensions that may be looked at for most sources of a position, while
# all of them are for the rest, each of which costs as much as this many.
_NARROW = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_GATHERED = 3.0


class IFR(TokenMethod):
    r"""Information flow routes: what each attention block takes from each token.

    A block adds to the residual stream what each head brings from each token:
    :math:`y = x + \sum_{h,j} z_{hj}`. The proximity of a part is how much nearer it
    brings the sum, :math:`\max(0, \lVert y \rVert - \lVert y - z_{hj} \rVert)`. Summed
    over heads, and divided by the proximities of all tokens and of the stream ``x``,
    it is the token's share of the block. A token's row is the sum of the shares at the
    position that predicts it, over all layers; the rest is the stream's.

    One forward pass gives the rows of all tokens. Each layer is taken apart as it is
    computed, some positions at a time, and no attention matrix outlives its layer.

    Args:
        model: a causal language model of transformers, whose layers add attention to
            the residual stream before all else.
        proximity (str, optional): the norm: ``"l1"``, as Ferrando and Voita and
            FlashTrace have it, or ``"l2"``, which needs no vector per pair of tokens.
            Default: ``"l1"``
        aggregation (str, optional): ``"sum"`` of the shares over layers, or
            ``"product"``: shares and the stream's rest as matrices, multiplied, so that
            routes lead through positions as in attention rollout. Default: ``"sum"``

    Raises:
        TypeError: if the model is no PyTorch model.
        ValueError: if an option is unknown; when used, if the model's layers are of
            another form.

    Source: Ferrando and Voita (2024), :cite:p:`ferrando2024routes`; as the direct rows
    of a graph: Pan et al. (2026), FlashTrace, :cite:p:`pan2026flashtrace`.

    Example:
        >>> from captum.attr import LLMGradientAttribution
        >>> from captum_cage import GraphContextAttribution, TokenIdsInput
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> cage = GraphContextAttribution(
        ...     LLMGradientAttribution(IFR(model), tokenizer)
        ... )
        >>> ids = tokenizer("Ana has 3 pens. How many pens does Ana have?").input_ids
        >>> result = cage.attribute(TokenIdsInput(ids, tokenizer), "Ana has 3 pens.")
        >>> result.graph.n_generated
        5
    """

    capability: ClassVar[Capability] = Capability(
        name="ifr",
        summary="how near each token brings an attention block to its output",
        source="Ferrando and Voita (2024), arXiv:2403.00824",
        wrapper="gradient",
        cost="1 pass",
        needs=("attention",),
        signed=False,
        depends_on_target=False,
    )

    def __init__(
        self,
        model: Any,
        proximity: Proximity = "l1",
        aggregation: Aggregation = "sum",
    ) -> None:
        super().__init__(model)
        one_of("proximity", proximity, PROXIMITIES)
        one_of("aggregation", aggregation, AGGREGATIONS)
        self.proximity: Proximity = proximity
        self.aggregation: Aggregation = aggregation

    def rows(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Shares of all tokens in what predicts each target, shape ``(T, n)``."""
        n = len(ids)
        first = 0 if self.aggregation == "product" else n - len(targets)
        total: Any = None
        layer = torch.zeros(())

        def visit(block: Block) -> None:
            nonlocal total, layer
            shares, _ = route_shares(block, self.proximity)
            if total is None:
                total = shares.new_zeros((n - first, n))
            # Of a model that is spread over devices, layers are on several of them.
            shares = shares.to(total.device)
            if self.aggregation == "sum":
                total[block.start - first : block.stop - first, : block.stop] += shares
                return
            if block.start == 0:
                layer = shares.new_zeros((n, n))
                if block.layer == 0:
                    total = torch.eye(n, dtype=shares.dtype, device=shares.device)
            rows = layer[block.start : block.stop]
            rows[:, : block.stop] = shares
            rows.diagonal(block.start).add_(1 - shares.sum(dim=1))
            if block.stop == n:
                total = layer @ total

        visit_blocks(self.model, ids, first, visit, type(self).__name__)
        rows: Tensor = total[n - first - len(targets) :]
        return rows


def route_shares(block: Block, proximity: Proximity) -> tuple[Tensor, Tensor]:
    """Share of each token in an attention block's output, and that of the stream.

    Args:
        block (Block): a block at some positions.
        proximity (str): ``"l1"`` or ``"l2"``.

    Returns:
        tuple[Tensor, Tensor]: shapes ``(some, K)`` and ``(some,)``; all shares of a
        position sum to one, unless nothing brings it nearer.
    """
    order = 1 if proximity == "l1" else 2
    near = (_near_l1 if proximity == "l1" else _near_l2)(block)
    size = torch.linalg.vector_norm(block.after, order, dim=1)
    rest = torch.linalg.vector_norm(block.after - block.before, order, dim=1)
    stream = (size - rest).clamp(min=0)
    total = near.sum(dim=1) + stream
    total = torch.where(total > 0, total, 1)
    return near / total[:, None], stream / total


def _near_l2(block: Block) -> Tensor:
    """Proximities summed over heads: ``|y| - |y - z|``, without a vector per pair.

    ``|y - z|^2 = |y|^2 - 2 w <y, v O> + w^2 v (O O') v'`` for ``z = w v O``.
    """
    seen = torch.einsum("iw,hsw->his", block.after, block.output)
    along = torch.einsum("his,hjs->hij", seen, block.values) * block.weights
    gram = block.output @ block.output.transpose(1, 2)
    squares = ((block.values @ gram) * block.values).sum(dim=-1)
    size = torch.linalg.vector_norm(block.after, dim=1)[:, None]
    # The difference of two large norms, as a quotient that keeps its digits.
    gain = 2 * along - block.weights.square() * squares[:, None]
    rest = (size.square() - gain).clamp(min=0).sqrt()
    gain = gain / (size + rest).clamp(min=torch.finfo(size.dtype).tiny)
    near: Tensor = gain.clamp(min=0).sum(dim=0)
    return near


def _near_l1(block: Block) -> Tensor:
    """Proximities summed over heads: ``|y| - |y - z|``, exact.

    ``|y_k| - |y_k - z_k|`` is ``s_k z_k`` (``s`` the sign of ``y``) wherever ``z``
    does not carry ``y`` beyond zero, and ``2 (s_k z_k - |y_k|)`` less where it does.
    The first part is one matrix product. The second concerns only dimensions whose
    ``|y_k|`` is below the largest ``|z_k|`` of any source: few, and they come first
    when the dimensions are sorted by ``|y_k|``.
    """
    heads, some, K = block.weights.shape
    width = block.after.shape[1]
    signs = block.after.sign()
    sizes, order = block.after.abs().sort(dim=1)
    together = max(1, _BROUGHT // (width * K))
    total = block.after.new_zeros((some, K))
    for start in range(0, heads, together):
        some_heads = slice(start, start + together)
        brought = torch.einsum(
            "hjs,hsw->whj", block.values[some_heads], block.output[some_heads]
        )
        flat = brought.reshape(width, -1)
        weights = block.weights[some_heads].transpose(0, 1).reshape(some, -1)
        near = (signs @ flat).mul_(weights)
        # What is not positive without the second part is not positive with it.
        reach = (weights * flat.abs().amax(dim=0)).masked_fill_(near <= 0, 0)
        _subtract_beyond(near, weights, reach, flat, block.after, sizes, order)
        total += near.clamp_(min=0).view(some, -1, K).sum(dim=1)
    return total


def _subtract_beyond(
    near: Tensor,
    weights: Tensor,
    reach: Tensor,
    flat: Tensor,
    after: Tensor,
    sizes: Tensor,
    order: Tensor,
) -> None:
    """Subtract twice what the parts carry beyond zero.

    Args:
        near (Tensor): what is changed, shape ``(some, sources)``.
        weights (Tensor): weight of each source, shape ``(some, sources)``.
        reach (Tensor): its largest size in any dimension, shape ``(some, sources)``;
            zero where it need not be looked at.
        flat (Tensor): sources before they are weighted, shape ``(width, sources)``.
        after (Tensor): the sums, shape ``(some, width)``.
        sizes (Tensor): their sizes, ascending, shape ``(some, width)``.
        order (Tensor): the dimensions in this order.
    """
    width = len(flat)
    counts = torch.searchsorted(sizes, reach.amax(dim=1, keepdim=True))[:, 0]
    if int(counts.max()) > width // 4:
        narrow = _narrow(reach, sizes)
        if narrow < width:
            far = reach > sizes[:, narrow, None]
            _subtract_far(near, weights, far, flat, after)
            weights = weights.masked_fill(far, 0)
            counts = counts.clamp(max=narrow)
    signs = after.sign()
    each = counts.tolist()
    start = 0
    while start < len(each):
        fitting = _PIECE // max(1, each[start] * flat.shape[1])
        stop = min(len(each), start + max(1, min(_TOGETHER, fitting)))
        count = max(each[start:stop])
        if count:
            places = order[start:stop, :count]
            parts = flat.index_select(0, places.reshape(-1))
            parts = parts.view(stop - start, count, -1)
            parts.mul_(signs[start:stop].gather(1, places)[:, :, None])
            parts.mul_(weights[start:stop, None])
            parts.sub_(sizes[start:stop, :count, None]).clamp_(min=0)
            near[start:stop].sub_(parts.sum(dim=1), alpha=2)
        start = stop


def _subtract_far(
    near: Tensor, weights: Tensor, far: Tensor, flat: Tensor, after: Tensor
) -> None:
    """The same for chosen pairs, in all dimensions."""
    rows, sources = torch.nonzero(far, as_tuple=True)
    step = max(1, _PIECE // len(flat))
    for start in range(0, len(rows), step):
        i, j = rows[start : start + step], sources[start : start + step]
        parts = flat[:, j].T * (after[i].sign() * weights[i, j, None])
        near[i, j] -= 2 * parts.sub_(after[i].abs()).clamp_(min=0).sum(dim=1)


def _narrow(reach: Tensor, sizes: Tensor) -> int:
    """How many dimensions to look at for all sources but those that reach further."""
    width = sizes.shape[1]
    best, least = width, float(reach.numel() * width)
    for share in _NARROW:
        count = int(share * width)
        further = int((reach > sizes[:, count, None]).sum())
        cost = reach.numel() * count + _GATHERED * further * width
        if count and cost < least:
            best, least = count, cost
    return best
