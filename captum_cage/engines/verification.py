"""Whether a model is one whose rows can be computed all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_cage._model import text_config
from captum_cage.causal import CausalModel, close_enough
from captum_cage.engines.engine import Unsuitable

__all__ = ["check_length_dependence", "score_at_end", "verify"]


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
