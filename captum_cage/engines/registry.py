"""Which engine computes the rows of which base method."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, overload

from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    ShapleyValues,
    ShapleyValueSampling,
)

from captum_cage._captum import base_method
from captum_cage._checks import complaint, shown
from captum_cage.engines.ablation import ABLATION
from captum_cage.engines.engine import Engine, RowFunction
from captum_cage.engines.gradient import GRADIENT
from captum_cage.engines.probing import CONTEXT_LENGTH, WEIGHTED_RATIO
from captum_cage.engines.refill import REFILL
from captum_cage.engines.regression import REGRESSION
from captum_cage.engines.shapley import EXACT_SHAPLEY, SAMPLED_SHAPLEY
from captum_cage.engines.subsets import SUBSETS
from captum_cage.engines.suppression import SUPPRESSION
from captum_cage.engines.tokens import TOKENS
from captum_cage.methods.attention_maps import (
    AttentionRollout,
    AttentionXIntegratedGradients,
    MeanAttention,
    ValueWeightedAttention,
)
from captum_cage.methods.attnlrp import AttnLRP
from captum_cage.methods.flow import IFR
from captum_cage.methods.gradient_shap import EmbeddingGradientShap
from captum_cage.methods.probing import ContextLengthProbing, WeightedLogRatio
from captum_cage.methods.reagent import OneShotReAGent
from captum_cage.methods.subsets import CLime, ContextCite, LShap
from captum_cage.methods.suppression import AttentionSuppression
from captum_cage.task import RowTask

__all__ = ["engine_names", "find_engine", "register_engine"]

_EngineT = TypeVar("_EngineT", bound=Engine | RowFunction)

_engines: dict[type, Engine] = {
    FeatureAblation: ABLATION,
    ShapleyValueSampling: SAMPLED_SHAPLEY,
    ShapleyValues: EXACT_SHAPLEY,
    Lime: REGRESSION,
    KernelShap: REGRESSION,
    LayerIntegratedGradients: GRADIENT,
    LayerGradientXActivation: GRADIENT,
    LayerGradientShap: GRADIENT,
    AttentionRollout: TOKENS,
    AttentionXIntegratedGradients: GRADIENT,
    AttentionSuppression: SUPPRESSION,
    AttnLRP: GRADIENT,
    EmbeddingGradientShap: GRADIENT,
    IFR: TOKENS,
    MeanAttention: TOKENS,
    ValueWeightedAttention: TOKENS,
    ContextLengthProbing: CONTEXT_LENGTH,
    WeightedLogRatio: WEIGHTED_RATIO,
    CLime: SUBSETS,
    LShap: SUBSETS,
    ContextCite: SUBSETS,
    OneShotReAGent: REFILL,
}


@overload
def register_engine(method: type, engine: Engine | RowFunction) -> None: ...


@overload
def register_engine(method: type) -> Callable[[_EngineT], _EngineT]: ...


def register_engine(
    method: type, engine: Engine | RowFunction | None = None
) -> Callable[[_EngineT], _EngineT] | None:
    """Tell how the rows of a base method are computed at once.

    An engine serves objects of this very class, not of its subclasses, since those may
    compute something else. Prove it equal to the loop with
    :func:`captum_cage.testing.check_engine`.

    Args:
        method (type): class of the attribution method, such as ``FeatureAblation``.
        engine (Engine or Callable): a function of a ``RowTask`` and of ascending
            positions of generated units, which gives their raw rows in this order,
            each of shape ``(N,)``; or an ``Engine`` that says more. Left out, the call
            is a decorator.

    Raises:
        TypeError: if ``method`` is no class or the engine cannot be called.

    Example:
        >>> from captum.attr import FeatureAblation
        >>> from captum_cage.engines.registry import find_engine
        >>> class Halved(FeatureAblation):
        ...     pass
        >>> @register_engine(Halved)
        ... def rows(task, steps):
        ...     for step in steps:
        ...         yield [0.5] * task.width
    """
    if not isinstance(method, type):
        raise TypeError(
            complaint(
                "method",
                "must be the class of an attribution method",
                f"{shown(method)} came",
                "Pass the class, for example FeatureAblation.",
            )
        )
    if engine is None:

        def decorate(function: _EngineT) -> _EngineT:
            register_engine(method, function)
            return function

        return decorate
    if not isinstance(engine, Engine):
        if not callable(engine):
            raise TypeError(
                complaint(
                    "engine",
                    "must be a function of a task and of steps, or an Engine",
                    f"{shown(engine)} came",
                    "Pass a function that gives one raw row per step.",
                )
            )
        engine = Engine(engine)
    _engines[method] = engine
    return None


def engine_names() -> list[str]:
    """Names of the methods that have an engine."""
    return sorted(method.__name__ for method in _engines)


def find_engine(task: RowTask) -> tuple[Engine | None, str]:
    """The engine for a task; or None, and why there is none."""
    method = type(task.llm_attr.attr_method)
    engine = _engines.get(method)
    if engine is None:
        return None, f"{base_method(task.llm_attr)} has no engine"
    reason = engine.unsuitable(task)
    if reason is not None:
        return None, f"{base_method(task.llm_attr)}: {reason}"
    return engine, ""
