"""What the base methods of this package have in common.

Captum's LLM attribution objects take subclasses of Captum's own methods only, so ours
are: of ``LayerGradientXActivation`` where ``LLMGradientAttribution`` takes them, of
``FeatureAblation`` where ``LLMAttribution`` does.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import (
    Attribution,
    FeatureAblation,
    InterpretableInput,
    LayerGradientXActivation,
)
from torch import Tensor, nn

from captum_cage._checks import complaint, shown
from captum_cage.inputs import token_features
from captum_cage.methods.capability import Capability

__all__ = ["TokenMethod", "UnitMethod", "check_causal_model"]


def check_causal_model(model: object, method: str) -> None:
    """Refuse what is no PyTorch model.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            complaint(
                method,
                "reads the inside of a PyTorch model",
                f"{shown(model)} came",
                "Pass a causal language model of transformers.",
            )
        )


class TokenMethod(LayerGradientXActivation):
    """A method that attributes tokens to tokens, from their ids alone.

    ``LLMGradientAttribution`` takes it. Subclasses say how rows are computed; whatever
    computes the row of one token computes those of many at once.

    Args:
        model: a causal language model of transformers.

    Raises:
        TypeError: if it is no PyTorch model.
    """

    capability: ClassVar[Capability]

    def __init__(self, model: Any) -> None:
        check_causal_model(model, type(self).__name__)
        # LayerGradientXActivation's own constructor wants a layer.
        Attribution.__init__(self, model)
        self.model: Any = model

    @abstractmethod
    def rows(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Attribution of the last tokens of a text to all tokens before each.

        Args:
            ids (Tensor): what the model reads: all tokens but the last target, shape
                ``(n,)``.
            targets (Tensor): ids of the last tokens, shape ``(T,)``. Target ``t`` is
                what follows position ``n - T + t``.

        Returns:
            Tensor: shape ``(T, n)``; zero after the position that a target follows.
        """

    def attribute(self, inputs: Tensor, additional_forward_args: Any = None) -> Tensor:
        """The row of one token, as ``LLMGradientAttribution`` asks for it.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            additional_forward_args: the input, the target ids, and the place of the
                target to attribute.

        Returns:
            Tensor: shape ``(1, tokens, 1)``.
        """
        del inputs
        inp, targets, place = additional_forward_args
        ids, _ = token_features(inp)
        targets = torch.as_tensor(targets).cpu()
        before = torch.cat([torch.tensor(ids), targets[:place]])
        row = self.rows(before, targets[place : place + 1])
        return row[:, :, None].detach()


class UnitMethod(FeatureAblation):
    """A method that needs to know which tokens each unit is made of.

    ``LLMAttribution`` takes it.

    Args:
        model: a causal language model of transformers.

    Raises:
        TypeError: if it is no PyTorch model.
    """

    capability: ClassVar[Capability]

    def __init__(self, model: Any) -> None:
        check_causal_model(model, type(self).__name__)
        super().__init__(model)
        self.model: Any = model

    @abstractmethod
    def effects(
        self,
        ids: list[int],
        feature_of_token: npt.NDArray[np.int64],
        targets: Tensor,
        **options: Any,
    ) -> Tensor:
        """Effect of each feature on each target.

        Args:
            ids (list[int]): everything before the targets.
            feature_of_token (numpy.ndarray): feature of each of these tokens, -1 for
                those that are present and not attributed.
            targets (Tensor): ids that follow, shape ``(T,)``.
            **options: the method's own arguments.

        Returns:
            Tensor: shape ``(T, features)``, float64.
        """

    def _attributed(
        self, inputs: Tensor, additional_forward_args: Any, **options: Any
    ) -> Tensor:
        """What ``LLMAttribution`` expects: the sum over targets, then each target."""
        inp: InterpretableInput = additional_forward_args[0]
        targets = torch.as_tensor(additional_forward_args[1]).cpu()
        ids, feature_of_token = token_features(inp)
        found = self.effects(ids, feature_of_token, targets, **options)
        # Captum adds it to a tensor on the device of the inputs.
        found = found.to(inputs.device)
        return torch.cat([found.sum(dim=0, keepdim=True), found])

    def attribute(self, inputs: Tensor, additional_forward_args: Any = None) -> Tensor:
        """Effects of all features, as ``LLMAttribution`` asks for them.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            additional_forward_args: the input and the target ids come first.

        Returns:
            Tensor: shape ``(1 + targets, features)``: the sum over the targets, then
            each target.
        """
        return self._attributed(inputs, additional_forward_args)
