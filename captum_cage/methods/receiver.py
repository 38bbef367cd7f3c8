"""Receiver heads: which units later ones look at, by the heads that look narrowly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
import torch
from captum.attr import InterpretableInput
from torch import Tensor

from captum_cage._checks import complaint, whole_number
from captum_cage.inputs import Prompt, TokenIdsInput, target_ids
from captum_cage.methods.attention_maps import visit_attention
from captum_cage.methods.method import check_causal_model
from captum_cage.task import text_units
from captum_cage.units import FIXED, Granularity, Unit, Units, split_units

__all__ = ["ReceiverHeads", "receiver_heads"]


@dataclass(frozen=True)
class ReceiverHeads:
    """Which units are looked at by later ones, and by which heads.

    Attributes:
        units (tuple[Unit, ...]): prompt and generated text, in reading order.
        scores (numpy.ndarray): attention that each unit receives from later ones, mean
            of the receiver heads, shape ``(N,)``; NaN for the last units, which no unit
            follows at the distance asked for.
        received (numpy.ndarray): the same for every head, shape ``(layers, heads, N)``.
        kurtosis (numpy.ndarray): of ``received`` over the units, shape ``(layers,
            heads)``: how narrowly a head looks. NaN where it looks at all alike.
        heads (tuple[tuple[int, int], ...]): layer and number of the receiver heads, the
            narrowest first.
    """

    units: tuple[Unit, ...]
    scores: npt.NDArray[np.float64]
    received: npt.NDArray[np.float64]
    kurtosis: npt.NDArray[np.float64]
    heads: tuple[tuple[int, int], ...]


def receiver_heads(
    model: Any,
    tokenizer: Any,
    inp: InterpretableInput,
    target: str | Sequence[int] | Tensor,
    *,
    units: Granularity = "sentence",
    heads: int = 16,
    distance: int = 4,
    generated_only: bool = False,
) -> ReceiverHeads:
    r"""Which units later ones look at, by the heads that look most narrowly.

    The attention between two units is the mean over their pairs of tokens. What a unit
    receives in a head is the mean attention from all units at least ``distance``
    behind it. Heads in which a few units receive far more than the others, by the
    kurtosis of what is received, are receiver heads; a unit's score is the mean over
    them. One pass; no attention matrix is kept.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        inp (InterpretableInput): the prompt: a ``TextTokenInput``, ``TokenIdsInput`` or
            ``ChatTokenInput``.
        target (str or Sequence[int] or Tensor): the generated text or its ids.
        units (optional): as for ``GraphContextAttribution.attribute``. Default:
            ``"sentence"``
        heads (int, optional): number of receiver heads. Default: ``16``, or all
        distance (int, optional): how many units later a unit must stand to count.
            Default: ``4``, as in the paper
        generated_only (bool, optional): leave the prompt's units out, as the paper
            does. Default: ``False``

    Returns:
        ReceiverHeads: scores, what each head gives, and which heads were chosen.

    Raises:
        TypeError: if the model is no PyTorch model, or the features of the input are no
            tokens.
        ValueError: if there are too few units, or the model's layers do not attend
            through transformers' attention interface.

    Source: Bogdan et al. (2025), Thought Anchors, :cite:p:`bogdan2025anchors`.

    Example:
        >>> from captum_cage import TokenIdsInput
        >>> from captum_cage.demo import load_demo, sample_problems
        >>> model, tokenizer = load_demo()
        >>> problem = sample_problems(1, seed=0, kind="two_questions")[0]
        >>> found = receiver_heads(
        ...     model,
        ...     tokenizer,
        ...     TokenIdsInput(tokenizer(problem.prompt).input_ids, tokenizer),
        ...     problem.completion,
        ... )
        >>> len(found.units) == len(found.scores)
        True
    """
    check_causal_model(model, "receiver_heads")
    wanted = whole_number("heads", heads, minimum=1, remedy="Pass 1 or more.")
    apart = whole_number("distance", distance, minimum=1, remedy="Pass 1 or more.")
    prompt = Prompt.read(inp, tokenizer)
    generated = target_ids(target, tokenizer)
    if prompt.continuation is not None:
        raise TypeError(
            complaint(
                "inp",
                "must be a prompt, after which all is generated",
                f"{type(inp).__name__} came, a trace",
                "Use TokenIdsInput or ChatTokenInput.",
            )
        )
    found = text_units(prompt, generated, split_units(units), tokenizer)
    sources, steps = found.sources, found.steps
    groups = _groups(prompt, sources, steps, generated_only)
    chosen = steps.units if generated_only else (*sources.units, *steps.units)
    count = len(chosen)
    if count <= apart + 1:
        raise ValueError(
            complaint(
                "units",
                f"there must be at least {apart + 2} of them, so that two are followed "
                f"at a distance of {apart}",
                f"the text has {count}",
                "Pass smaller units or a smaller distance.",
            )
        )
    ids = torch.tensor([*prompt.ids, *generated])
    between = _between(model, ids, groups, count)
    received = np.full((*between.shape[:2], count), np.nan)
    for unit in range(count - apart):
        received[..., unit] = between[..., unit + apart :, unit].mean(axis=-1)
    with np.errstate(invalid="ignore"):
        narrowness = scipy.stats.kurtosis(received[..., : count - apart], axis=-1)
    order = np.argsort(-np.nan_to_num(narrowness, nan=-np.inf), axis=None)[:wanted]
    layers, numbers = np.unravel_index(order, narrowness.shape)
    return ReceiverHeads(
        units=chosen,
        scores=received[layers, numbers].mean(axis=0),
        received=received,
        kurtosis=narrowness,
        heads=tuple(zip(layers.tolist(), numbers.tolist(), strict=True)),
    )


def _groups(
    prompt: Prompt, sources: Units, steps: Units, generated_only: bool
) -> npt.NDArray[np.int64]:
    """Unit of each token, -1 for tokens that count for none."""
    groups = sources.groups
    if prompt.feature_of_token is None:
        if not isinstance(prompt.inp, TokenIdsInput):
            raise TypeError(
                complaint(
                    "inp",
                    "receiver_heads needs a TextTokenInput, TokenIdsInput or "
                    "ChatTokenInput",
                    f"{type(prompt.inp).__name__} came",
                    "Use one of these.",
                )
            )
        feature = prompt.inp.feature_of_token
        groups = np.where(feature >= 0, groups[feature], FIXED)
    if generated_only:
        return np.concatenate([np.full(len(groups), FIXED), steps.groups])
    return np.concatenate([groups, steps.groups + len(sources)])


def _between(
    model: Any, ids: Tensor, groups: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.float64]:
    """Mean attention from unit to unit, ``(layers, heads, count, count)``."""
    membership = torch.zeros((len(ids), count), dtype=torch.float64)
    inside = torch.from_numpy(np.flatnonzero(groups >= 0))
    membership[inside, torch.from_numpy(groups)[inside]] = 1.0
    sizes = membership.sum(dim=0)
    membership = membership.to(torch.float32)
    sums: dict[int, Tensor] = {}

    def visit(layer: int, start: int, weights: Tensor) -> None:
        stop = start + weights.shape[1]
        here = membership.to(weights)
        found = here[start:stop].T @ (weights @ here[:stop])
        sums[layer] = sums.get(layer, 0) + found.double()

    visit_attention(model, ids, 0, visit, "receiver_heads")
    pairs = (sizes[:, None] * sizes).numpy()
    layers = [sums[layer].cpu().numpy() / pairs for layer in sorted(sums)]
    return np.stack(layers)
