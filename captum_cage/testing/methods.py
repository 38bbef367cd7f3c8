"""The laws of a base method, each looked at on small models."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from captum_cage._captum import is_captums_own
from captum_cage._checks import complaint
from captum_cage.attribution import GraphContextAttribution
from captum_cage.engines.registry import find_engine
from captum_cage.rows import loop_row
from captum_cage.testing.engines import EngineTrial, equality_to_the_loop
from captum_cage.testing.report import (
    Broken,
    LawReport,
    LawsBroken,
    NotApplicable,
    chosen_laws,
    judged,
)
from captum_cage.testing.results import check_result
from captum_cage.testing.trials import (
    CASES,
    Factory,
    Rows,
    Trial,
    check_finite,
    check_nothing_later,
    check_random_state,
    check_same,
    is_gradient,
    made_trial,
    name_of,
    place,
)
from captum_cage.testing.watch import seeded

__all__ = ["METHOD_LAWS", "check_attribution_method"]


def check_attribution_method(
    factory: Factory,
    *,
    laws: Iterable[str] | None = None,
    cases: Sequence[tuple[str, str]] = CASES,
    tolerance: float | None = None,
    repeats: int = 12,
    seed: int = 0,
    **kwargs: Any,
) -> LawReport:
    """Prove that a base method can be wrapped and gives rows that a graph can take.

    The method explains short texts of small models, by the loop: one call of the Captum
    object per generated unit. The ids of these texts are such that their text would be
    tokenised otherwise. The laws:

    - ``"runs"``: every row is computed.
    - ``"shape"``: the base method gives one number per unit before the explained one.
    - ``"finiteness"``: there is no NaN and nothing infinite.
    - ``"causality"``: a row is the same whatever stands after its unit.
    - ``"determinism"``: the same seed gives the same rows.
    - ``"random state"``: the method leaves the random states of Torch, NumPy and Python
      as they were, or draws from them; it never seeds them. It leaves Torch's gradient
      mode and default types as they were.
    - ``"model unchanged"``: parameters, buffers, gradients, ``requires_grad``, modes,
      hooks, config and attention implementation are as they were.
    - ``"objects unchanged"``: so are the Captum object, the base method, the tokenizer
      and the input.
    - ``"ids never re-tokenised"``: nothing of the text is tokenised again.
    - ``"group then solve"``: of a gradient method, the row of a larger unit is the sum
      of its tokens' rows over the columns of each unit before it.
    - ``"conservation"``: the mass of the explained units arrives at the sources or
      leaks.
    - ``"result"``: the result keeps the laws of :func:`check_result`.
    - ``"equality to the loop"``: the engine that is registered for the method gives the
      loop's rows; of a random method the same means.

    Args:
        factory: the class of a base method, such as ``FeatureAblation``, or its name;
            or a function of a model, or of a model and a tokenizer, that gives a base
            method or a Captum LLM attribution object. What is no Captum object is
            wrapped in the one that takes it, with the input embeddings as its layer.
        laws (Iterable[str], optional): names of the laws to look at, of
            ``METHOD_LAWS``. Default: ``None``, all
        cases (Sequence[tuple[str, str]], optional): models and tokenizers, as
            :func:`tiny_causal_lm` and :func:`tiny_tokenizer` know them.
            Default: three different ones
        tolerance (float, optional): largest difference between rows that must be equal,
            relative to the largest entry. Default: 1e-5
        repeats (int, optional): runs of a random method whose means are compared.
            Default: ``12``
        seed (int, optional): of models and runs. Default: ``0``
        **kwargs: for the Captum object's ``attribute``, such as ``n_steps``. What says
            how many evaluations a listed method takes is small by default.

    Returns:
        LawReport: every law and its verdict.

    Raises:
        LawsBroken: if a law is broken; an ``AssertionError`` whose text is the report.
        TypeError: if the factory makes no attribution object.
        ValueError: if there is no such law or case.

    Example:
        >>> from captum.attr import FeatureAblation
        >>> report = check_attribution_method(
        ...     FeatureAblation, laws=["shape", "causality"], cases=[("llama", "bpe")]
        ... )
        >>> print(report)
        check_attribution_method: FeatureAblation: 2 laws, none broken
          shape                        pass
          causality                    pass
    """
    names = chosen_laws(laws, METHOD_LAWS)
    if not cases:
        raise ValueError(
            complaint(
                "cases",
                "must have a case",
                "none came",
                "Leave it out, or pass pairs such as [('llama', 'bpe')].",
            )
        )
    trials = []
    for case in cases:
        trial = made_trial(factory, case, seed, tolerance, kwargs)
        trial.kept["repeats"] = repeats
        trials.append((", ".join(case), trial))
    subject = f"check_attribution_method: {name_of(factory)}"
    return judged(subject, {name: _LAWS[name] for name in names}, trials)


def _rows(trial: Trial) -> Rows:
    """The rows, for laws that need some.

    Raises:
        NotApplicable: if there are none.
    """
    if "failed" in trial.kept:
        raise NotApplicable("its rows could not be computed")
    try:
        return trial.loop()
    # Whatever a method of others raises; the law "runs" tells of it.
    except Exception as error:
        trial.kept["failed"] = error
        raise NotApplicable("its rows could not be computed") from error


def _runs(trial: Trial) -> None:
    try:
        _rows(trial)
    except NotApplicable:
        error = trial.kept["failed"]
        try:
            with suppress(NotApplicable):
                _shape(trial)
        except Broken:
            raise NotApplicable("rows of another shape are no rows") from error
        raise Broken(
            "a row for every generated unit",
            f"{type(error).__name__}: {error}",
            "Run the method on the same input by Captum alone. If it cannot take this "
            "model, pass cases= that it takes.",
        ) from error


def _shape(trial: Trial) -> None:
    """The shapes that the base method's own ``attribute`` gives."""
    method = trial.llm_attr.attr_method
    kind = type(method)
    shapes: list[tuple[int, ...]] = []

    class Noted(kind):  # type: ignore[misc, valid-type]
        # Captum and the package read the signature.
        @functools.wraps(kind.attribute)
        def attribute(self, *args: Any, **kwargs: Any) -> Any:
            found = super().attribute(*args, **kwargs)
            one = found[0] if isinstance(found, tuple) else found
            shapes.append(tuple(getattr(one, "shape", ())))
            return found

    Noted.__name__ = kind.__name__
    noted = copy.copy(method)
    noted.__class__ = Noted
    llm_attr = copy.copy(trial.llm_attr)
    llm_attr.attr_method = noted
    task = copy.copy(trial.task)
    object.__setattr__(task, "llm_attr", llm_attr)
    for step in range(len(task.steps)):
        shapes.clear()
        try:
            with seeded(trial.seed):
                row = loop_row(task, step)
        # A method of others; whether its shapes are the reason is found out below.
        except Exception as error:
            if not shapes:
                raise NotApplicable("its rows could not be computed") from error
            row = None
        before = len(task.sources) + step
        _check_shapes(trial, shapes, before, place(task, step))
        if row is None:
            raise NotApplicable("its rows could not be computed")


def _check_shapes(
    trial: Trial, shapes: Sequence[tuple[int, ...]], before: int, where: str
) -> None:
    """Refuse shapes that Captum's wrapper would misread."""
    if not shapes:
        return
    if is_gradient(trial.llm_attr):
        expected = f"(1, {before}, any), one vector per token"
        is_right = all(
            len(shape) == 3 and shape[:2] == (1, before) and shape[2] > 0
            for shape in shapes
        )
    else:
        one_by_one = getattr(trial.llm_attr, "include_per_token_attr", False)
        rows = 2 if one_by_one else 1  # the sum, then each of the one token
        expected = f"({rows}, {before})"
        if one_by_one:
            expected += ", the sum over the target's tokens, then each token"
        is_right = all(
            shape[-1:] == (before,) and math.prod(shape[:-1]) == rows
            for shape in shapes
        )
    if not is_right:
        wrong = " and ".join(map(str, dict.fromkeys(shapes)))
        raise Broken(
            f"attributions of shape {expected}",
            wrong,
            "Give attribute() of the base method one entry per feature of the input "
            "that it is given.",
            where,
        )


def _finiteness(trial: Trial) -> None:
    check_finite(trial.task, _rows(trial))


def _causality(trial: Trial) -> None:
    rows = _rows(trial)
    check_nothing_later(trial.task, rows)
    steps, sources = len(trial.task.steps), len(trial.task.sources)
    for count in range(1, steps):
        begun = trial.begun(count)
        check_same(
            trial,
            begun,
            trial.loop(task=begun),
            rows[:count, : sources + count],
            f"the same rows when the text ends after unit {count - 1}",
            "A row must depend on the text up to its own unit alone: keep nothing from "
            "one call to the next.",
        )


def _determinism(trial: Trial) -> None:
    rows = _rows(trial)
    del trial.kept[_key(trial)]
    check_same(
        trial,
        trial.task,
        trial.loop(),
        rows,
        "the same rows when called again with the same seed",
        "Draw from Torch's or NumPy's global generator, or seed your own in each call.",
    )


def _key(trial: Trial) -> tuple[Any, ...]:
    task = trial.task
    return ("loop", trial.seed, len(task.generated), len(task.steps))


def _random_state(trial: Trial) -> None:
    _rows(trial)
    check_random_state(lambda: loop_row(trial.task, 0), trial.seed)


def _model_unchanged(trial: Trial) -> None:
    with suppress(NotApplicable):  # the law "runs" tells of it
        _rows(trial)
    trial.check_model()


def _objects_unchanged(trial: Trial) -> None:
    _rows(trial)
    trial.check_objects()


def _ids_kept(trial: Trial) -> None:
    _rows(trial)
    trial.tokenised.clear()
    with seeded(trial.seed):
        loop_row(trial.task, len(trial.task.steps) - 1)
    trial.check_ids()


def _group_then_solve(trial: Trial) -> None:
    rows = _rows(trial)
    if not is_gradient(trial.llm_attr):
        raise NotApplicable("perturbation methods replace a unit as a whole")
    if not is_captums_own(trial.llm_attr):
        raise NotApplicable("the Captum object is one of your own")
    sources = len(trial.pairs.sources)
    group = [
        *trial.pairs.sources.groups,
        *(sources + np.array(trial.pairs.steps.groups)),
    ]
    expected = np.zeros((len(trial.pairs.steps), len(trial.pairs.steps) + sources))
    for row, own in enumerate(trial.pairs.steps.groups):
        for unit, column in enumerate(group):
            if column < sources + own:
                expected[own, column] += rows[row, unit]
    check_same(
        trial,
        trial.pairs,
        trial.loop(task=trial.pairs),
        expected,
        "the sum of the tokens' rows over the columns of each unit before",
        "Let the attribution of a token depend on the token, not on how the input is "
        "grouped.",
    )


def _explained(trial: Trial, normalization: Any) -> Any:
    cage = GraphContextAttribution(trial.llm_attr, normalization=normalization)
    with seeded(trial.seed):
        return cage.attribute(
            trial.inp,
            list(trial.task.generated),
            strategy="loop",
            explain=-1,
            **trial.task.kwargs,
        )


def _conservation(trial: Trial) -> None:
    _sound(trial)
    for normalization in ("positive", "absolute"):
        result = _explained(trial, normalization)
        try:
            check_result(result, laws=["row sums", "conservation"])
        except LawsBroken as error:
            raise _nested(error) from error


def _result(trial: Trial) -> None:
    _sound(trial)
    result = _explained(trial, "positive")
    try:
        check_result(result)
    except LawsBroken as error:
        raise _nested(error) from error


def _sound(trial: Trial) -> None:
    if not np.isfinite(_rows(trial)).all():
        raise NotApplicable("rows that are not finite make no graph")


def _nested(error: LawsBroken) -> Broken:
    """The first law that a result breaks, as the finding of a method."""
    first = error.report.broken[0]
    return Broken(
        f"{first.expected} (law {first.law!r} of check_result)",
        first.came,
        first.remedy,
        first.where,
    )


def _engine_equals_loop(trial: Trial) -> None:
    _rows(trial)
    engine, reason = find_engine(trial.task)
    if engine is None:
        raise NotApplicable(reason)
    equality_to_the_loop(EngineTrial(trial, engine, trial.kept["repeats"]))


_LAWS: dict[str, Callable[[Trial], None]] = {
    "runs": _runs,
    "shape": _shape,
    "finiteness": _finiteness,
    "causality": _causality,
    "determinism": _determinism,
    "random state": _random_state,
    "model unchanged": _model_unchanged,
    "objects unchanged": _objects_unchanged,
    "ids never re-tokenised": _ids_kept,
    "group then solve": _group_then_solve,
    "conservation": _conservation,
    "result": _result,
    "equality to the loop": _engine_equals_loop,
}
METHOD_LAWS = tuple(_LAWS)
