"""All base methods, Captum's and ours: what each takes, and how it is wrapped."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any, TypeAlias

from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValues,
    ShapleyValueSampling,
)

from captum_cage import methods
from captum_cage._checks import complaint, one_of, shown
from captum_cage.methods.capability import Capability

__all__ = [
    "accepted_inputs",
    "capabilities",
    "capability_of",
    "is_random",
    "llm_attribution",
    "markdown_table",
    "method_named",
    "missing_extra",
    "needs_argument",
    "unsupported_table",
]

Wrapped: TypeAlias = LLMAttribution | LLMGradientAttribution
"""A base method, wrapped by Captum."""

_TARGETS = ("log_prob", "prob")
# Arguments of a method's constructor that are filled here.
_FILLED = ("layer", "tokenizer")
_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_CAPTUM: tuple[tuple[type[Any], Capability], ...] = (
    (
        FeatureAblation,
        Capability(
            name="ablation",
            summary="log-probability lost when a unit is replaced",
            source="Zeiler and Fergus (2014), arXiv:1311.2901",
            wrapper="perturbation",
            cost="P + G passes",
            tokens_only=False,
            remote=True,
            probabilities=True,
        ),
    ),
    (
        ShapleyValueSampling,
        Capability(
            name="shapley-sampling",
            summary="Shapley values from random orders of the units",
            source="Castro et al. (2009), doi:10.1016/j.cor.2008.04.004",
            wrapper="perturbation",
            cost="n_samples * (P + G) passes",
            tokens_only=False,
            remote=True,
            random=True,
            probabilities=True,
            counted="n_samples",
        ),
    ),
    (
        ShapleyValues,
        Capability(
            name="shapley",
            summary="Shapley values over all subsets of 14 units at most",
            source="Shapley (1953), doi:10.1515/9781400881970-018",
            wrapper="perturbation",
            cost="2^(P + G) passes",
            tokens_only=False,
            remote=True,
            probabilities=True,
        ),
    ),
    (
        Lime,
        Capability(
            name="lime",
            summary="sparse linear model over random subsets of units",
            source="Ribeiro et al. (2016), arXiv:1602.04938",
            wrapper="perturbation",
            cost="n_samples passes",
            needs=("scikit-learn",),
            tokens_only=False,
            remote=True,
            random=True,
            probabilities=True,
            counted="n_samples",
            extra="sklearn",
        ),
    ),
    (
        KernelShap,
        Capability(
            name="kernel-shap",
            summary="Shapley values by a weighted linear model",
            source="Lundberg and Lee (2017), arXiv:1705.07874",
            wrapper="perturbation",
            cost="n_samples * G passes",
            needs=("scikit-learn",),
            tokens_only=False,
            remote=True,
            random=True,
            probabilities=True,
            counted="n_samples",
            extra="sklearn",
        ),
    ),
    (
        LayerIntegratedGradients,
        Capability(
            name="integrated-gradients",
            summary="gradients on a path from baseline embeddings",
            source="Sundararajan et al. (2017), arXiv:1703.01365",
            wrapper="gradient",
            cost="n_steps passes, n_steps * G backward",
            counted="n_steps",
        ),
    ),
    (
        LayerGradientXActivation,
        Capability(
            name="gradient-x-activation",
            summary="gradient times embedding",
            source="Shrikumar et al. (2016), arXiv:1605.01713",
            wrapper="gradient",
            cost="1 pass, G backward",
        ),
    ),
)


def capabilities() -> tuple[tuple[type[Any], Capability], ...]:
    """All base methods that have a name: the class of each and what it declares.

    Captum's come first, then those of this package in the order of its ``__all__``.

    Example:
        >>> [declared.name for _, declared in capabilities()][:2]
        ['ablation', 'shapley-sampling']
    """
    found = [getattr(methods, name) for name in methods.__all__]
    ours = [(method, declared) for method in found if (declared := _declared(method))]
    return (*_CAPTUM, *ours)


def _declared(method: Any) -> Capability | None:
    """What a class itself or the class that it extends declares."""
    declared = getattr(method, "capability", None)
    return declared if isinstance(declared, Capability) else None


def capability_of(method: type[Any]) -> Capability | None:
    """What is known of a base method's class; None of a class that is not listed.

    Example:
        >>> from captum.attr import KernelShap
        >>> capability_of(KernelShap).counted
        'n_samples'
    """
    return dict(_CAPTUM).get(method) or _declared(method)


def is_random(method: type[Any], inp: Any) -> bool:
    """Whether a base method's rows may differ from one call to the next.

    They do where it samples, where it is not listed, so that nobody knows, and where
    the input's baselines are a function, which is called anew each time.

    Args:
        method (type): class of the base method.
        inp (InterpretableInput): what is explained.

    Example:
        >>> from captum.attr import FeatureAblation, KernelShap
        >>> is_random(KernelShap, None), is_random(FeatureAblation, None)
        (True, False)
    """
    declared = capability_of(method)
    draws_baselines = callable(getattr(inp, "baselines", None))
    return declared is None or declared.random or draws_baselines


def method_named(name: str) -> tuple[type[Any], Capability]:
    """The base method of a name, or of the name of its class, in any case.

    Args:
        name (str): such as ``"kernel-shap"`` or ``"KernelShap"``.

    Returns:
        tuple[type, Capability]: the class, and what it declares.

    Raises:
        ValueError: if there is no such method.

    Example:
        >>> method_named("kernelshap")[1].name
        'kernel-shap'
    """
    known = capabilities()
    for method, declared in known:
        if str(name).lower() in (declared.name, method.__name__.lower()):
            return method, declared
    names = ", ".join(declared.name for _, declared in known)
    raise ValueError(
        complaint(
            "method",
            f"must be one of {names}, or the name of its class",
            f"{name!r} came",
            "Pass one of these.",
        )
    )


def missing_extra(declared: Capability) -> str | None:
    """The extra of this package that a method needs and that is not installed."""
    if declared.extra is None or find_spec(declared.extra) is not None:
        return None
    return declared.extra


def needs_argument(method: type[Any], name: str) -> bool | None:
    """Whether a method's constructor needs an argument; None if it does not take it.

    Example:
        >>> from captum.attr import LayerIntegratedGradients
        >>> needs_argument(LayerIntegratedGradients, "layer")
        True
        >>> needs_argument(LayerIntegratedGradients, "multiply_by_inputs")
        False
        >>> needs_argument(LayerIntegratedGradients, "masked_lm") is None
        True
    """
    taken = inspect.signature(method).parameters.get(name)
    return None if taken is None else taken.default is inspect.Parameter.empty


def llm_attribution(
    method: str | type[Any],
    model: Any,
    tokenizer: Any,
    *,
    attr_target: str = "log_prob",
    **options: Any,
) -> Wrapped:
    """A Captum LLM attribution object, ready for ``GraphContextAttribution``.

    Args:
        method (str or type): name of a base method, or its class.
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        attr_target (str, optional): ``"log_prob"``, or ``"prob"`` for methods that
            attribute probabilities. Default: ``"log_prob"``
        **options: for the method's constructor, such as ``masked_lm`` and
            ``masked_tokenizer``. A layer is the input embeddings unless given.

    Returns:
        LLMAttribution or LLMGradientAttribution: the wrapped method.

    Raises:
        ImportError: if it needs an extra that is not installed.
        TypeError: if an option is missing or unknown, or the class is none that
            Captum's objects take.
        ValueError: if there is no method of this name, or it cannot attribute
            probabilities.

    Example:
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> wrapped = llm_attribution("integrated-gradients", model, tokenizer)
        >>> wrapped.attr_method.layer is model.get_input_embeddings()
        True
    """
    kind = method_named(method)[0] if isinstance(method, str) else method
    is_gradient = _is_gradient(kind)
    declared = capability_of(kind)
    one_of("attr_target", attr_target, _TARGETS)
    if attr_target != "log_prob" and (
        is_gradient or (declared is not None and not declared.probabilities)
    ):
        raise ValueError(
            complaint(
                "attr_target",
                f"must be 'log_prob' for {kind.__name__}",
                f"{attr_target!r} came",
                "Leave it out, or use a method that attributes probabilities, such as "
                "FeatureAblation.",
            )
        )
    if declared is not None and (extra := missing_extra(declared)):
        raise ImportError(
            f"{kind.__name__} needs a package that is not installed. Run: "
            f"pip install captum-cage[{extra}]"
        )
    base = kind(model, **_arguments(kind, model, tokenizer, options))
    if is_gradient:
        return LLMGradientAttribution(base, tokenizer)
    return LLMAttribution(base, tokenizer, attr_target=attr_target)


def _is_gradient(method: Any) -> bool:
    """Whether ``LLMGradientAttribution`` takes a class; else ``LLMAttribution`` does.

    Raises:
        TypeError: if neither does.
    """
    if isinstance(method, type):
        if issubclass(method, LLMGradientAttribution.SUPPORTED_METHODS):
            return True
        if issubclass(method, LLMAttribution.SUPPORTED_METHODS):
            return False
    raise TypeError(
        complaint(
            "method",
            "must be the name of a base method, or a class that Captum's LLM "
            "attribution objects take",
            f"{shown(method)} came",
            "Pass a name, for example 'ablation', or a class such as FeatureAblation.",
        )
    )


def _arguments(
    method: type[Any], model: Any, tokenizer: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a method's constructor after the model."""
    _, *taken = inspect.signature(method).parameters.values()
    parameters = [p for p in taken if p.kind not in _ANY_NUMBER]
    names = [parameter.name for parameter in parameters]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken)
    for name in options:
        if name not in names and not takes_any:
            takes = ", ".join(n for n in names if n not in _FILLED) or "none"
            raise TypeError(
                f"{name}: is no option of {method.__name__}. Its options are: {takes}."
            )
    arguments = dict(options)
    for parameter in parameters:
        if parameter.name in arguments:
            continue
        if parameter.name == "tokenizer":
            arguments["tokenizer"] = tokenizer
        elif parameter.default is not inspect.Parameter.empty:
            continue
        elif parameter.name == "layer":
            arguments["layer"] = model.get_input_embeddings()
        else:
            raise TypeError(
                f"{parameter.name}: {method.__name__} cannot do without it. Pass "
                f"{parameter.name}=."
            )
    return arguments


# --- documentation -------------------------------------------------------------------


def accepted_inputs(declared: Capability) -> tuple[str, ...]:
    """The kinds of input that a method takes.

    ``"tokens"`` stands for inputs that are a sequence of token ids, ``"remote"`` for
    text that is sent to a server.

    Example:
        >>> accepted_inputs(method_named("ablation")[1])
        ('tokens', 'templates', 'images', 'remote')
        >>> accepted_inputs(method_named("gradient-x-activation")[1])
        ('tokens',)
    """
    more = () if declared.tokens_only else ("templates", "images")
    return ("tokens", *more, *(("remote",) if declared.remote else ()))


def markdown_table(engines: Collection[str]) -> str:
    """What each base method is, takes and costs, as a table in Markdown.

    Args:
        engines (Collection[str]): class names of the methods that have an engine.
    """
    head = (
        *("method", "what it measures", "inputs", "needs", "random", "signed"),
        *("passes through the model", "engine", "paper"),
    )
    lines = [
        (
            f"`{method.__name__}`<br>`{declared.name}`",
            declared.summary,
            ", ".join(accepted_inputs(declared)),
            ", ".join(declared.needs),
            _tick(declared.random),
            _tick(declared.signed),
            declared.cost,
            _tick(method.__name__ in engines),
            declared.source,
        )
        for method, declared in capabilities()
    ]
    return _table(head, lines)


def unsupported_table() -> str:
    """What base methods refuse, and which they are, as a table in Markdown."""
    known = [declared for _, declared in capabilities()]
    perturbing = [declared for declared in known if declared.wrapper == "perturbation"]
    refusals = (
        (
            "templates, images",
            "`TypeError`, before any model call",
            [declared for declared in known if declared.tokens_only],
        ),
        (
            "`RemoteLLMAttribution`",
            "`TypeError`, before any request",
            [declared for declared in perturbing if not declared.remote],
        ),
        (
            "`RemoteLLMAttribution`",
            "Captum takes no gradient methods there",
            [declared for declared in known if declared.wrapper == "gradient"],
        ),
        (
            '`LLMAttribution(..., attr_target="prob")`',
            "`ValueError`, before any model call",
            [declared for declared in perturbing if not declared.probabilities],
        ),
        (
            "`foil=`",
            "`ValueError`, before any model call",
            [declared for declared in known if not declared.depends_on_target],
        ),
    )
    lines = [
        (what, ", ".join(f"`{declared.name}`" for declared in which), error)
        for what, error, which in refusals
        if which
    ]
    return _table(("combination", "methods that refuse it", "error"), lines)


def _tick(is_so: bool) -> str:
    return "yes" if is_so else ""


def _table(head: Collection[str], lines: Collection[Collection[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
