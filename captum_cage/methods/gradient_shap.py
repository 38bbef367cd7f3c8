"""GradientSHAP between embeddings, which Captum's layer version does not give."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from captum.attr import LayerGradientShap
from torch import Tensor, nn

from captum_cage._checks import complaint, shown, whole_number
from captum_cage.causal import CausalModel
from captum_cage.methods.capability import Capability
from captum_cage.methods.method import check_causal_model

__all__ = ["EmbeddingGradientShap"]


class EmbeddingGradientShap(LayerGradientShap):
    r"""GradientSHAP in the space of embeddings: expected gradients.

    .. math:: \mathbb{E}_{b, u, \epsilon} \left[ (x + \epsilon - b) \cdot
        \nabla f(b + u (x + \epsilon - b)) \right]

    with the embedded text ``x``, a baseline ``b`` drawn from those given, ``u`` uniform
    in [0, 1), and noise of the given deviation. Without noise and with one baseline it
    is integrated gradients at random points.

    Captum's ``LayerGradientShap`` scales 0/1 indicators of features instead. A fraction
    of one counts as absent there, so it takes every gradient at the baseline.

    Args:
        model: a causal language model of transformers.
        layer (nn.Module, optional): the layer whose output is attributed. Default: the
            embeddings
        multiply_by_inputs (bool, optional): whether gradients are multiplied by the
            difference to the baseline. Default: ``True``

    Raises:
        TypeError: if the model is no PyTorch model.

    Source: Lundberg and Lee (2017), :cite:p:`lundberg2017shap`; Erion et al. (2021),
    :cite:p:`erion2021priors`.

    Example:
        >>> from captum.attr import LLMGradientAttribution
        >>> from captum_cage import GraphContextAttribution, TokenIdsInput
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> cage = GraphContextAttribution(
        ...     LLMGradientAttribution(EmbeddingGradientShap(model), tokenizer)
        ... )
        >>> ids = tokenizer("Ana has 3 pens. How many pens does Ana have?").input_ids
        >>> result = cage.attribute(
        ...     TokenIdsInput(ids, tokenizer), "Ana has 3 pens.", n_samples=20
        ... )
        >>> result.graph.n_generated
        5
    """

    capability: ClassVar[Capability] = Capability(
        name="gradient-shap",
        summary="expected gradients between absent and present embeddings",
        source="Lundberg and Lee (2017), arXiv:1705.07874",
        wrapper="gradient",
        cost="n_samples passes, n_samples * G backward",
        random=True,
        counted="n_samples",
    )

    def __init__(
        self,
        model: Any,
        layer: nn.Module | None = None,
        multiply_by_inputs: bool = True,
    ) -> None:
        check_causal_model(model, "EmbeddingGradientShap")
        super().__init__(
            model,
            layer or model.get_input_embeddings(),
            multiply_by_inputs=multiply_by_inputs,
        )
        self.model: Any = model

    def attribute(
        self,
        inputs: Tensor,
        baselines: Tensor | int | None = None,
        n_samples: int = 20,
        stdevs: float = 0.0,
        additional_forward_args: Any = None,
    ) -> Tensor:
        """Expected gradients of one target, as ``LLMGradientAttribution`` asks.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            baselines (Tensor or int, optional): 0/1 indicators of the features that
                baselines have, shape ``(B, features)``; each sample draws one.
                Default: one without any
            n_samples (int, optional): number of samples. Default: ``20``
            stdevs (float, optional): deviation of the noise that is added to the
                embeddings. Default: ``0.0``
            additional_forward_args: the input, the target ids, and the place of the
                target to attribute.

        Returns:
            Tensor: shape ``(1, tokens, width)``; its sum over the width is the row.
        """
        inp, targets, place = additional_forward_args
        targets = torch.as_tensor(targets).cpu()
        if not isinstance(baselines, Tensor):
            baselines = torch.zeros_like(inputs)
        present = [inp.to_model_input(), *map(inp.to_model_input, baselines[:, None])]
        prefix = targets[None, :place]
        embedded = [
            self._embedded(torch.cat([ids.cpu(), prefix], dim=1)) for ids in present
        ]
        points, differences = self.draw(
            embedded[0], torch.stack(embedded[1:]), n_samples, stdevs
        )
        ids = torch.cat([present[0].cpu(), prefix], dim=1)
        total = torch.zeros_like(embedded[0])
        for point, difference in zip(points, differences, strict=True):
            gradient = self._gradient(ids, point, targets[place : place + 1])
            total += gradient * difference if self.multiplies_by_inputs else gradient
        return (total / len(points))[None]

    def draw(
        self, here: Tensor, there: Tensor, n_samples: int, stdevs: float
    ) -> tuple[Tensor, Tensor]:
        """Points at which gradients are taken, and what they are multiplied by.

        Args:
            here (Tensor): the embedded text, shape ``(tokens, width)``.
            there (Tensor): embedded baselines, shape ``(B, tokens, width)``.
            n_samples (int): number of points.
            stdevs (float): deviation of the noise.

        Returns:
            tuple[Tensor, Tensor]: both of shape ``(n_samples, tokens, width)``.

        Raises:
            TypeError: if an argument is no number.
            ValueError: if one is out of its range.
        """
        remedy = "Pass a number of 1 or more."
        count = whole_number("n_samples", n_samples, minimum=1, remedy=remedy)
        if not (isinstance(stdevs, float | int) and stdevs >= 0):
            raise ValueError(
                complaint(
                    "stdevs",
                    "must be a deviation in units of the embeddings, 0 or more",
                    f"{shown(stdevs)} came",
                    "Pass 0.0 for no noise.",
                )
            )
        baselines = there[torch.randint(len(there), (count,)).to(there.device)]
        fractions = torch.rand(count).to(here)[:, None, None]
        noise = torch.randn((count, *here.shape)).to(here) * stdevs if stdevs else 0.0
        differences = here + noise - baselines
        return baselines + fractions * differences, differences

    def _embedded(self, ids: Tensor) -> Tensor:
        """What the layer gives for some ids, shape ``(tokens, width)``."""
        caught: list[Tensor] = []
        handle = self.layer.register_forward_hook(
            lambda _, __, output: caught.append(output)
        )
        causal = CausalModel(self.model)
        try:
            with torch.no_grad():
                last = torch.tensor([ids.shape[1] - 1])
                causal.states({"input_ids": ids.to(causal.device)}, last)
        finally:
            handle.remove()
        return caught[0][0].detach()

    def _gradient(self, ids: Tensor, point: Tensor, target: Tensor) -> Tensor:
        """Gradient of a target's log-probability at one point, ``(tokens, width)``."""
        causal = CausalModel(self.model)
        leaf = point.detach()[None].requires_grad_()
        handle = self.layer.register_forward_hook(lambda *_: leaf)
        try:
            with torch.enable_grad():
                last = torch.tensor([ids.shape[1] - 1])
                states = causal.states({"input_ids": ids.to(causal.device)}, last)
                score = causal.log_probabilities(states[0], target)
                (gradient,) = torch.autograd.grad(score.sum(), leaf)
        finally:
            handle.remove()
        return gradient[0]
