"""The only module that touches Captum's private parts and knows its versions."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Literal, TypeAlias

import captum
import torch
from captum.attr import (
    InterpretableInput,
    KernelShap,
    LayerGradientShap,
    Lime,
    LLMAttribution,
    LLMGradientAttribution,
    RemoteLLMAttribution,
    RemoteLLMProvider,
    ShapleyValues,
)
from captum.attr._core.lime import default_perturb_func
from captum.attr._core.llm_attr import DEFAULT_GEN_ARGS
from captum.attr._utils.approximation_methods import (
    SUPPORTED_METHODS,
    approximation_parameters,
)
from torch import Tensor

from captum_cage._checks import complaint, one_of, shown, whole_number

__all__ = [
    "DEFAULT_GEN_ARGS",
    "Family",
    "LLMAttributionObject",
    "argument",
    "asking",
    "attribute_scored",
    "attribute_unit",
    "base_method",
    "check_attribution_object",
    "check_kwargs",
    "check_longest_row",
    "check_shortest_row",
    "draws_fair_coins",
    "family",
    "integration_points",
    "is_captums_own",
    "lime_samples",
    "sent_to",
]

Family: TypeAlias = Literal["perturbation", "gradient", "remote"]
LLMAttributionObject: TypeAlias = LLMAttribution | LLMGradientAttribution

CAPTUM_VERSION: str = captum.__version__

# ShapleyValues asks the model n * n! times: 35,280 calls for 7 features, 322,560 for 8.
_MOST_SHAPLEY_FEATURES = 7

_COUNTS = ("internal_batch_size", "n_samples", "n_steps", "num_trials")
_WRAPPER_KWARGS = ("num_trials", "use_cached_outputs", "forward_in_tokens")
_OURS = {
    "inputs": "it is made from `inp`",
    "inp": "pass it as the first argument",
    "additional_forward_args": "Captum's LLM attribution fills it",
    "feature_mask": "pass `units=` or an input with a feature mask instead",
    "return_convergence_delta": "rows are attributions alone",
    "return_input_shape": "rows have one entry per unit",
}


def check_attribution_object(llm_attr: object) -> LLMAttributionObject:
    """The object itself, if it is one of Captum's LLM attribution objects.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(llm_attr, LLMAttribution | LLMGradientAttribution):
        raise TypeError(
            complaint(
                "llm_attr",
                "must be a LLMAttribution, LLMGradientAttribution or "
                "RemoteLLMAttribution object of captum.attr",
                f"{shown(llm_attr)} came",
                "Wrap your method first, as in "
                "LLMAttribution(FeatureAblation(model), tokenizer).",
            )
        )
    return llm_attr


def family(llm_attr: LLMAttributionObject) -> Family:
    """How the object asks its model."""
    if isinstance(llm_attr, RemoteLLMAttribution):
        return "remote"
    return "perturbation" if isinstance(llm_attr, LLMAttribution) else "gradient"


def is_captums_own(llm_attr: LLMAttributionObject) -> bool:
    """Whether the object is Captum's, not of a subclass that may compute otherwise."""
    own = (LLMAttribution, LLMGradientAttribution, RemoteLLMAttribution)
    return type(llm_attr) in own


def sent_to(
    llm_attr: LLMAttributionObject, device: torch.device
) -> LLMAttributionObject:
    """The same object, which sends what its model reads to a device.

    Args:
        llm_attr: the wrapped object, which is left as it is.
        device (torch.device): where the model takes its ids.
    """
    moved: Any = copy.copy(llm_attr)
    moved.device = device
    moved.attr_method = copy.copy(llm_attr.attr_method)
    forward = moved.attr_method.forward_func
    # Captum's forward functions ask the object that they were made for.
    if getattr(forward, "__self__", None) is llm_attr:
        moved.attr_method.forward_func = forward.__func__.__get__(moved)
    elif getattr(forward, "attr", None) is llm_attr:
        moved.attr_method.forward_func = copy.copy(forward)
        moved.attr_method.forward_func.attr = moved
    found: LLMAttributionObject = moved
    return found


def base_method(llm_attr: LLMAttributionObject) -> str:
    """Name of the wrapped attribution method's class."""
    return type(llm_attr.attr_method).__name__


def check_kwargs(llm_attr: LLMAttributionObject, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that Captum would swallow, reject late, or do wrong.

    Raises:
        TypeError: if the wrapped object's ``attribute`` does not take an argument.
        ValueError: if it takes it, but cannot do what it says.
    """
    name = base_method(llm_attr)
    allowed = set(_named_parameters(llm_attr.attr_method.attribute))
    wrapper = set(_named_parameters(llm_attr.attribute))
    allowed |= wrapper - {"target", "gen_args"}
    for key, value in kwargs.items():
        if key in _OURS:
            raise TypeError(
                f"{key}: is not an argument of GraphContextAttribution.attribute: "
                f"{_OURS[key]}. Leave it out."
            )
        if key not in allowed:
            names = ", ".join(sorted(allowed - set(_OURS) - {"target"})) or "none"
            raise TypeError(
                f"{key}: neither GraphContextAttribution nor {name} takes this "
                f"argument. {name} takes: {names}."
            )
        if key in _COUNTS and value is not None:
            whole_number(key, value, minimum=1, remedy="Pass a number of 1 or more.")
        if key == "method":
            one_of(key, value, SUPPORTED_METHODS)
        if key == "perturbations_per_eval" and value != 1:
            raise ValueError(
                complaint(
                    key,
                    "must be 1, since LLMAttribution scores one perturbation at a time",
                    f"{value!r} came",
                    "Leave it out.",
                )
            )
    if kwargs.get("use_cached_outputs"):
        warnings.warn(
            "use_cached_outputs: ignored. With the key-value cache Captum's scores are "
            "wrong from transformers 5.3 on; without it they are right everywhere.",
            stacklevel=3,
        )
    if type(llm_attr.attr_method) is LayerGradientShap:
        warnings.warn(
            "LayerGradientShap: with text, Captum turns every input between 0 and 1 "
            "into the baseline token, so the gradient is taken at the baseline, "
            "n_samples has no effect and stdevs > 0 gives zeros. "
            "captum_cage.methods.EmbeddingGradientShap has no such defect.",
            stacklevel=3,
        )


def check_longest_row(llm_attr: LLMAttributionObject, longest: int) -> None:
    """Refuse rows that the base method would take for ever to compute.

    Args:
        llm_attr: the wrapped object.
        longest (int): number of units before the last generated unit.

    Raises:
        ValueError: if a row is too long for the method.
    """
    method = llm_attr.attr_method
    if isinstance(method, ShapleyValues) and longest > _MOST_SHAPLEY_FEATURES:
        raise ValueError(
            complaint(
                "ShapleyValues",
                f"takes at most {_MOST_SHAPLEY_FEATURES} units, as it asks the model "
                "n * n! times",
                f"the last row has {longest} units before it",
                "Use larger units, for example units='sentence', or "
                "ShapleyValueSampling.",
            )
        )


def check_shortest_row(llm_attr: LLMAttributionObject, shortest: int) -> None:
    """Refuse rows that the base method cannot compute.

    Args:
        llm_attr: the wrapped object.
        shortest (int): number of units before the first generated unit.

    Raises:
        ValueError: if a row is too short for the method.
    """
    method = llm_attr.attr_method
    fewest = 2 if isinstance(method, Lime | KernelShap) else 1
    # Subclasses that fit something else say what they need.
    if shortest < getattr(method, "fewest_units", fewest):
        raise ValueError(
            complaint(
                base_method(llm_attr),
                "fits a regression and needs at least two units before the first "
                "generated one",
                f"{shortest} came",
                "Use smaller source units, or FeatureAblation.",
            )
        )


def asking(
    llm_attr: LLMAttributionObject, provider: RemoteLLMProvider
) -> LLMAttributionObject | None:
    """A copy of a remote object that asks another provider; None if it has its own way.

    Args:
        llm_attr: the wrapped object.
        provider (RemoteLLMProvider): what the copy asks.
    """
    forward = getattr(llm_attr.attr_method, "forward_func", None)
    owner = getattr(forward, "__self__", None)
    if not isinstance(owner, RemoteLLMAttribution) or not is_captums_own(owner):
        return None
    found = copy.copy(owner)
    found.provider = provider
    method: Any = copy.copy(llm_attr.attr_method)
    method.forward_func = found._remote_forward_func
    found.attr_method = method
    return found


def attribute_unit(
    llm_attr: LLMAttributionObject,
    inp: InterpretableInput,
    target: Tensor,
    kwargs: Mapping[str, Any],
    *,
    token_by_token: bool = False,
    check: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Attribution of the log-probability of one stretch of ids to an input's features.

    One call of the wrapped object's own ``attribute``, kept clear of Captum's defects:
    no key-value cache, the whole stretch scored in one pass, labels not made.

    Args:
        llm_attr: the wrapped object.
        inp (InterpretableInput): everything before the stretch.
        target (Tensor): ids of the stretch, 1-D.
        kwargs: arguments for the base method. ``baselines`` given for the features of
            the prompt are extended to the generated ones, which are then absent.
        token_by_token (bool, optional): score the stretch id by id, as models with
            inputs besides ids need. Default: ``False``
        check (Callable, optional): told each perturbation, an indicator of shape
            ``(1, n_itp_features)``, and its scores. Default: None

    Returns:
        Tensor: shape ``(n_itp_features,)``, as the base method gives it.
    """
    call = copy.copy(llm_attr)
    # FeatureAblation remembers in itself whether an output's shape was seen.
    method: Any = copy.copy(llm_attr.attr_method)
    call.attr_method = method
    if check is not None:
        method.forward_func = _checked(method.forward_func, check)
    call.SUPPORTED_INPUTS = (InterpretableInput,)
    call.tokenizer = _Unlabelled(llm_attr.tokenizer)
    arguments = dict(kwargs)
    if "baselines" in arguments:
        arguments["baselines"] = _extended(arguments["baselines"], inp.n_itp_features)
    elif type(llm_attr.attr_method) is LayerGradientShap:
        arguments["baselines"] = _all_absent
    known = _named_parameters(llm_attr.attribute)
    arguments.pop("use_cached_outputs", None)
    if "forward_in_tokens" in known:
        arguments.setdefault("forward_in_tokens", token_by_token)
    if type(llm_attr).attribute is LLMAttribution.attribute:
        return _perturbed(call, inp, target, arguments)
    if "use_cached_outputs" in known:
        arguments["use_cached_outputs"] = False
    result = call.attribute(inp, target=target, **arguments)
    scores: Tensor = result.seq_attr
    return scores


def _checked(
    forward: Callable[..., Tensor], check: Callable[[Tensor, Tensor], None]
) -> Callable[..., Tensor]:
    """A forward function that tells what it gives; a method if it was one."""
    if not isinstance(forward, MethodType):
        return forward
    function = forward.__func__

    def scored(asked: Any, perturbed: Tensor, *rest: Any) -> Tensor:
        found: Tensor = function(asked, perturbed, *rest)
        check(perturbed, found)
        return found

    return MethodType(scored, forward.__self__)


def _perturbed(
    call: Any, inp: InterpretableInput, target: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """What ``LLMAttribution.attribute`` gives, before it is rounded to float32.

    Where the method attributes each token, theirs are summed: the difference of two
    sums of float32 log-probabilities has lost digits.
    """
    trials = arguments.pop("num_trials", 1)
    in_tokens = arguments.pop("forward_in_tokens")
    each_token = call.include_per_token_attr and call.attr_target == "log_prob"
    total = torch.zeros(inp.n_itp_features, dtype=torch.float64)
    for _ in range(trials):
        found = call.attr_method.attribute(
            inp.to_tensor().to(call.device),
            additional_forward_args=(inp, target, False, None, in_tokens),
            **arguments,
        )
        rows = found.detach().double().cpu().reshape(-1, inp.n_itp_features)
        total += rows[1:].sum(dim=0) if each_token else rows[0]
    mean: Tensor = total / trials
    return mean


def attribute_scored(
    llm_attr: LLMAttributionObject,
    features: int,
    kwargs: Mapping[str, Any],
    score: Callable[[Tensor], float],
    draw: Callable[[], Tensor] | None = None,
) -> Tensor:
    """What the base method gives when the scores of its samples come from elsewhere.

    Args:
        llm_attr: the wrapped object.
        features (int): number of features.
        kwargs: arguments for the base method.
        score: value of a sample, an indicator of shape ``(1, features)``.
        draw (optional): the next sample, in place of Captum's own. Default: None

    Returns:
        Tensor: attributions, shape ``(features,)``, float64.
    """

    def forward(sample: Tensor, *_: Any) -> Tensor:
        return torch.tensor(score(sample), dtype=torch.float64)

    def perturb(*_: Any, **__: Any) -> Tensor:
        return draw()  # type: ignore[misc]

    method: Any = copy.copy(llm_attr.attr_method)
    method.forward_func = forward
    if draw is not None:
        method.perturb_func = perturb
    arguments = {k: v for k, v in kwargs.items() if k not in _WRAPPER_KWARGS}
    trials = kwargs.get("num_trials", 1)
    total = torch.zeros(features, dtype=torch.float64)
    for _ in range(trials):
        found = method.attribute(
            torch.ones((1, features), dtype=torch.long), **arguments
        )
        total += found.detach().double().cpu().reshape(features)
    mean: Tensor = total / trials
    return mean


def argument(
    llm_attr: LLMAttributionObject, kwargs: Mapping[str, Any], name: str
) -> Any:
    """An argument of the base method, or its default."""
    if name in kwargs:
        return kwargs[name]
    parameters = inspect.signature(llm_attr.attr_method.attribute).parameters
    return parameters[name].default


def draws_fair_coins(llm_attr: LLMAttributionObject) -> bool:
    """Whether a Lime object draws its samples as Captum does by default."""
    method: Any = llm_attr.attr_method
    return getattr(method, "perturb_func", None) is default_perturb_func


def lime_samples(count: int, features: int) -> Tensor:
    """Samples as Captum's Lime draws them by default, shape ``(count, features)``."""
    inputs = torch.ones((1, features), dtype=torch.long)
    drawn = [
        default_perturb_func(inputs, num_interp_features=features) for _ in range(count)
    ]
    return torch.cat(drawn)


def integration_points(method: str, steps: int) -> tuple[list[float], list[float]]:
    """Where Captum's integrated gradients evaluate, and the weight of each point.

    Raises:
        ValueError: if there is no such method.
    """
    find_weights, find_alphas = approximation_parameters(method)
    return find_alphas(steps), find_weights(steps)


def _named_parameters(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter.name for parameter in parameters if parameter.kind in named]


def _all_absent(inputs: Tensor) -> Tensor:
    return torch.zeros_like(inputs)


def _extended(baselines: Any, features: int) -> Any:
    """Baselines for all features of a row; generated ones are absent (0)."""
    if not isinstance(baselines, Tensor) or baselines.dim() == 0:
        return baselines
    missing = features - baselines.shape[-1]
    return torch.nn.functional.pad(baselines, (0, max(missing, 0)))


class _Unlabelled:
    """A tokenizer that makes one empty label per id.

    Captum labels every target when it is done, and fails there when an id is a piece
    of a character. Everything else is left to the tokenizer itself.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Tensor, **_: Any) -> str:
        self._ids = [int(i) for i in ids]
        return ""

    def __call__(self, _: str, **__: Any) -> dict[str, list[Any]]:
        return {"input_ids": self._ids, "offset_mapping": [(0, 0)] * len(self._ids)}
