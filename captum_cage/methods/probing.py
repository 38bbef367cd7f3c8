"""Context-length probing, and the quantity that CAGE's code has in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import FeatureAblation, InterpretableInput
from torch import Tensor

from captum_cage._checks import complaint, whole_number
from captum_cage.causal import CausalModel
from captum_cage.inputs import empty_prompt, extended_model_input
from captum_cage.methods.capability import Capability
from captum_cage.methods.method import UnitMethod, check_causal_model

__all__ = ["ContextLengthProbing", "WeightedLogRatio", "feature_runs"]


def feature_runs(
    feature_of_token: npt.NDArray[np.int64],
) -> Iterator[tuple[int, npt.NDArray[np.intp]]]:
    """Runs of attributed tokens of one feature, in reading order.

    Tokens of feature -1 neither belong to a run nor end one.

    Yields:
        tuple[int, numpy.ndarray]: the feature, and the positions of the run's tokens.

    Example:
        >>> runs = feature_runs(np.array([-1, 0, 0, 1]))
        >>> [(feature, tokens.tolist()) for feature, tokens in runs]
        [(0, [1, 2]), (1, [3])]
    """
    attributed = np.flatnonzero(feature_of_token >= 0)
    features = feature_of_token[attributed]
    for run in np.split(attributed, np.flatnonzero(np.diff(features)) + 1):
        if len(run):
            yield int(feature_of_token[run[0]]), run


class ContextLengthProbing(UnitMethod):
    """How much the prediction changes when the context begins after a unit.

    The score of token ``j`` for a target is ``KL(p || p_j+1) - KL(p || p_j)``, with
    ``p`` the distribution of the next token after the whole text and ``p_j`` after the
    text from token ``j`` on; a unit gets the sum over its tokens, and the row of a
    unit the sum over its targets. Contexts are cut from the left, and positions start
    anew. A row sums to ``KL(p || p_shortest)``.

    Tokens that are not attributed, such as the one that begins a text or the headers
    of a chat, stay in front of every context; for a text without them this is the
    authors' differential importance score with the KL metric. There, nothing is left
    once the last token is gone: that token is never taken away and gets 0, as in the
    authors' code, unless ``empty`` says what is read then.

    ``LLMAttribution`` takes it.

    Args:
        model: a causal language model of transformers.
        empty (int, optional): id that is read where no context is left, such as the
            token that begins texts. Default: ``None``, the last token stays

    Raises:
        TypeError: if the model is no PyTorch model, or ``empty`` is no id.
        ValueError: if ``empty`` is below 0.

    Source: Cifka and Liutkus (2023), :cite:p:`cifka2023probing`, section 3.

    Example:
        >>> from captum.attr import LLMAttribution
        >>> from captum_cage import TokenIdsInput
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> inp = TokenIdsInput(tokenizer("Ana has 3 pens.").input_ids, tokenizer)
        >>> probing = LLMAttribution(ContextLengthProbing(model), tokenizer)
        >>> result = probing.attribute(inp, target=" Mia")
        >>> result.seq_attr.shape, float(result.seq_attr[-1])
        (torch.Size([5]), 0.0)
    """

    capability: ClassVar[Capability] = Capability(
        name="clp",
        summary="divergence of the prediction when the context begins later",
        source="Cifka and Liutkus (2023), arXiv:2212.14815",
        wrapper="perturbation",
        cost="P + G passes over what is left",
        depends_on_target=False,
    )

    def __init__(self, model: Any, *, empty: int | None = None) -> None:
        super().__init__(model)
        if empty is not None:
            remedy = "Pass the id, for example tokenizer.bos_token_id."
            empty = whole_number("empty", empty, remedy=remedy)
        self.empty = empty

    def effects(
        self,
        ids: list[int],
        feature_of_token: npt.NDArray[np.int64],
        targets: Tensor,
        **options: Any,
    ) -> Tensor:
        """Effect of each feature on each target, as ``UnitMethod`` says.

        Args:
            ids (list[int]): everything before the targets.
            feature_of_token (numpy.ndarray): feature of each of these tokens, -1 for
                those that stay.
            targets (Tensor): ids that follow, shape ``(T,)``.
            **options: none.

        Returns:
            Tensor: shape ``(T, features)``, float64.
        """
        del options
        model = CausalModel(self.model)
        features = int(feature_of_token.max(initial=-1)) + 1
        found = torch.zeros((len(targets), features), dtype=torch.float64)
        places = torch.arange(len(targets))
        left = np.ones(len(ids), dtype=bool)
        before = torch.zeros(len(targets), dtype=torch.float64)
        with torch.no_grad():
            whole = _states(model, ids, targets)
            for feature, tokens in feature_runs(feature_of_token):
                left[tokens] = False
                context = [ids[i] for i in np.flatnonzero(left)]
                if context:
                    states = _states(model, context, targets)
                else:
                    shortest = ids[-1] if self.empty is None else self.empty
                    states = _states(model, [shortest], targets[:1])
                    if len(targets) > 1:
                        # The first target is context for those after it.
                        rest = _states(model, targets[:1].tolist(), targets[1:])
                        states = torch.cat([states, rest])
                after = model.divergences(states, whole, places).cpu()
                if not context and len(tokens) == 1 and shortest == ids[-1]:
                    # The same text: its score is 0, and not rounding.
                    after[0] = before[0]
                found[:, feature] += after - before
                before = after
        return found


def _states(model: CausalModel, context: list[int], targets: Tensor) -> Tensor:
    """States that the targets' distributions follow from, shape ``(T, width)``."""
    ids = torch.tensor([[*context, *targets[:-1].tolist()]])
    keep = torch.arange(len(context) - 1, ids.shape[1])
    return model.states({"input_ids": ids.to(model.device)}, keep, direct=True)[0]


class WeightedLogRatio(FeatureAblation):
    """How much a weighed log-ratio drops when a unit is replaced by the baseline.

    The score of a unit for a target ``y`` is ``q(text) - q(text without the unit)``,
    with ``q = p(y) * sum_v [log p(y) - log p(v)]`` over all tokens ``v``. This is what
    CAGE's code computes under the name of context-length probing; for what the name
    stands for see :class:`ContextLengthProbing`. ``q`` grows with the size of the
    vocabulary, and counts hardly where the target is improbable.

    ``LLMAttribution`` takes it, with any input.

    Args:
        model: a causal language model of transformers.
        tokenizer (optional): its tokenizer, for inputs that give text, such as
            ``TextTemplateInput``. ``GraphContextAttribution`` does without it.
            Default: ``None``

    Raises:
        TypeError: if the model is no PyTorch model.

    Source: the code of Walker and Ewetz (2025), :cite:p:`walker2025cage`.

    Example:
        >>> from captum.attr import LLMAttribution, TextTokenInput
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> ratios = LLMAttribution(WeightedLogRatio(model), tokenizer)
        >>> inp = TextTokenInput("Ana has 3 pens.", tokenizer)
        >>> ratios.attribute(inp, target=" Mia").seq_attr.shape
        torch.Size([5])
    """

    capability: ClassVar[Capability] = Capability(
        name="clp-cage",
        summary="weighed log-ratio lost when a unit is replaced",
        source="code of Walker and Ewetz (2025), arXiv:2512.15663",
        wrapper="perturbation",
        cost="P + G passes",
        tokens_only=False,
    )

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        check_causal_model(model, type(self).__name__)
        super().__init__(model)
        self.model: Any = model
        self.tokenizer = tokenizer

    def attribute(self, inputs: Tensor, additional_forward_args: Any = None) -> Tensor:
        """Effects of all features, as ``LLMAttribution`` asks for them.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            additional_forward_args: the input and the target ids come first.

        Returns:
            Tensor: shape ``(1 + targets, features)``: the sum over the targets, then
            each target.
        """
        inp: InterpretableInput = additional_forward_args[0]
        targets = torch.as_tensor(additional_forward_args[1]).cpu()
        model = CausalModel(self.model)
        with torch.no_grad():
            plain = self._ratios(model, inp.to_model_input(), targets)
            found = torch.zeros((len(plain), inputs.shape[1]), dtype=torch.float64)
            for feature in range(inputs.shape[1]):
                present = torch.ones_like(inputs)
                present[:, feature] = 0
                perturbed = inp.to_model_input(present)
                found[:, feature] = plain - self._ratios(model, perturbed, targets)
        return torch.cat([found.sum(dim=0, keepdim=True), found]).to(inputs.device)

    def _ratios(self, model: CausalModel, model_input: Any, targets: Tensor) -> Tensor:
        """The weighed log-ratio of each target, shape ``(T,)``."""
        if isinstance(model_input, str):
            model_input = torch.tensor([self._encoded(model_input)], dtype=torch.long)
        if isinstance(model_input, Tensor):
            model_input = {"input_ids": model_input}
        length = model_input["input_ids"].shape[1]
        if not length:
            raise empty_prompt()
        inputs = extended_model_input(model_input, targets[None, :-1])
        on_device = {
            name: value.to(model.device) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        keep = torch.arange(length - 1, length - 1 + len(targets))
        states = model.states(on_device, keep, direct=True)[0]
        return model.weighted_log_ratios(states, targets).cpu()

    def _encoded(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise TypeError(
                complaint(
                    "tokenizer",
                    f"{type(self).__name__} needs it for an input that gives text",
                    "none was passed",
                    f"Write {type(self).__name__}(model, tokenizer).",
                )
            )
        ids: list[int] = self.tokenizer.encode(text)
        return ids
