"""The base method: how long the gradient at each token is."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from captum_cage.methods import Capability, TokenMethod


class GradientNorm(TokenMethod):
    """Length of the gradient of a token's log-probability at each embedding before it.

    ``captum.attr.LLMGradientAttribution`` takes it, as ``TokenMethod`` is a subclass of
    Captum's ``LayerGradientXActivation``.

    Args:
        model: a causal language model of transformers.

    Source: Simonyan et al. (2014), arXiv:1312.6034.
    """

    capability: ClassVar[Capability] = Capability(
        name="gradient-norm",
        summary="length of the gradient at each embedding",
        source="Simonyan et al. (2014), arXiv:1312.6034",
        wrapper="gradient",
        cost="1 pass, G backward",
        signed=False,
    )

    def rows(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Norms for the last tokens of a text.

        Args:
            ids (Tensor): all tokens but the last target, shape ``(n,)``.
            targets (Tensor): the last tokens, shape ``(T,)``.

        Returns:
            Tensor: shape ``(T, n)``, not negative; zero where a target does not look.
        """
        layer = self.model.get_input_embeddings()
        device = layer.weight.device
        with torch.enable_grad():
            embeddings = layer(ids[None].to(device)).detach().requires_grad_()
            logits = self.model(inputs_embeds=embeddings).logits[0, -len(targets) :]
            scores = torch.log_softmax(logits.float(), dim=-1)
            chosen = scores[torch.arange(len(targets)), targets.to(device)]
            # Not backward(), which would add to the gradients of the model's weights.
            gradients = [
                torch.autograd.grad(score, embeddings, retain_graph=True)[0][0]
                for score in chosen
            ]
        return torch.stack(gradients).norm(dim=-1).cpu()
