"""Whether a model is one whose rows can be computed all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_cage._model import text_config
from captum_cage.causal import CausalModel, close_enough
from captum_cage.engines.engine import Unsuitable

__all__ = [
    "Verdict",
    "check_length_dependence",
    "found_out",
    "remember",
    "score_at_end",
    "verify",
]


@dataclass(frozen=True)
class Verdict:
    """What was found out about a model by passes through it.

    It depends on the model's code, not on its weights: a verdict on a text holds for
    every shorter one.

    Attributes:
        length (int): number of tokens of the text on which it was verified that what
            follows a token does not change its probability.
        splits (bool): whether the output layer alone makes the logits.
        reuses (bool or None): whether a pass can start from the keys and values of a
            prefix; None if that was not tried.
    """

    length: int
    splits: bool
    reuses: bool | None


_verdicts: WeakKeyDictionary[Any, tuple[Any, Verdict]] = WeakKeyDictionary()


def _code(model: CausalModel) -> tuple[Any, ...]:
    """What a verdict depends on besides the model object."""
    config = getattr(model.model, "config", None)
    forward = model.model.forward
    return (
        getattr(forward, "__func__", forward),
        getattr(config, "_attn_implementation", None),
        model.dtype,
        model.device,
    )


def found_out(model: CausalModel, length: int) -> Verdict | None:
    """The verdict on a model that holds for a text of this length, if there is one."""
    if not isinstance(model.model, nn.Module):
        return None
    code, verdict = _verdicts.get(model.model, (None, None))
    if verdict is None or code != _code(model) or verdict.length < length:
        return None
    return verdict


def remember(model: CausalModel, verdict: Verdict) -> None:
    """Keep a verdict for as long as the model lives."""
    if isinstance(model.model, nn.Module):
        _verdicts[model.model] = (_code(model), verdict)


def check_length_dependence(model: Any, length: int) -> None:
    """Refuse position encodings whose values depend on the whole length.

    Raises:
        Unsuitable: if a token's position is encoded differently in a longer text.
    """
    config = text_config(model)
    for name in ("rope_parameters", "rope_scaling"):
        scaling = getattr(config, name, None)
        if not isinstance(scaling, Mapping):
            continue
        kinds = [scaling, *(v for v in scaling.values() if isinstance(v, Mapping))]
        for kind in kinds:
            rope = kind.get("rope_type", kind.get("type"))
            if rope not in ("dynamic", "longrope"):
                continue
            original = kind.get(
                "original_max_position_embeddings",
                getattr(config, "original_max_position_embeddings", None),
            )
            if original is None:
                original = getattr(config, "max_position_embeddings", 0)
            if length > original:
                raise Unsuitable(
                    f"its {rope} position encoding beyond {original} tokens depends "
                    f"on the length of the whole text, which has {length}"
                )


def score_at_end(model: CausalModel, ids: Tensor, targets: Tensor) -> float:
    """Log-probability of the first target when nothing follows it.

    Args:
        model (CausalModel): the model.
        ids (Tensor): the sequence that it reads, shape ``(tokens,)``.
        targets (Tensor): the generated ids, of which ``ids`` lacks the last.
    """
    shorter = ids[: len(ids) - len(targets) + 1]
    inputs = {"input_ids": shorter[None].to(model.device)}
    states = model.states(inputs, torch.tensor([len(shorter) - 1]), direct=True)
    return float(model.log_probabilities(states[0], targets[:1])[0])


def verify(model: CausalModel, whole: float, at_end: float) -> None:
    """Make sure that what follows a token does not change its probability.

    Args:
        model (CausalModel): the model.
        whole (float): log-probability of a token in a longer text.
        at_end (float): the same at the end of a text.

    Raises:
        Unsuitable: if they differ by more than rounding.
    """
    one = torch.tensor([whole], dtype=torch.float64)
    other = torch.tensor([at_end], dtype=torch.float64)
    if not close_enough(one, other, model.dtype):
        raise Unsuitable(
            "it gives a token another probability when more text follows: "
            f"log-probability {whole:.4f} in the whole text and {at_end:.4f} at its end"
        )
