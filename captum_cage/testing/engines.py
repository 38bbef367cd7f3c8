"""Engines against the loop: on a text of your own, or by all laws on small models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import (
    Attribution,
    InterpretableInput,
    LLMAttribution,
    LLMGradientAttribution,
)
from torch import Tensor

from captum_cage._captum import LLMAttributionObject, base_method
from captum_cage._checks import complaint, shown, whole_number
from captum_cage.attribution import GraphContextAttribution
from captum_cage.engines.engine import Engine, RowFunction, Unsuitable
from captum_cage.engines.registry import _engines, find_engine
from captum_cage.rows import loop_row
from captum_cage.task import RowTask
from captum_cage.testing.report import (
    Broken,
    LawReport,
    NotApplicable,
    chosen_laws,
    judged,
)
from captum_cage.testing.trials import (
    CASES,
    STANDARD_ERRORS,
    Factory,
    Rows,
    Trial,
    allowed_difference,
    check_finite,
    check_nothing_later,
    check_random_state,
    check_same,
    made_trial,
    name_of,
    place,
    standard_errors,
)
from captum_cage.testing.watch import seeded
from captum_cage.units import Granularity

__all__ = ["ENGINE_LAWS", "EngineReport", "check_engine"]

_REPEATS = 12


@dataclass(frozen=True)
class EngineReport:
    """How far an engine's rows are from the loop's.

    Attributes:
        difference (float): largest absolute difference of two entries, divided by the
            loop's largest entry; with ``repeats``, in standard errors of the
            difference of the two means.
        allowed (float): largest difference that passes.
        row (int): generated unit of the largest difference.
        unit (int): the unit that it stands for.
    """

    difference: float
    allowed: float
    row: int
    unit: int


@overload
def check_engine(
    engine: LLMAttributionObject,
    inp: InterpretableInput,
    target: str | Sequence[int] | Tensor | None = None,
    *,
    units: Granularity = "token",
    tolerance: float | None = None,
    repeats: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> EngineReport: ...


@overload
def check_engine(
    engine: Engine | RowFunction | type[Attribution],
    *,
    method: type[Attribution] | None = None,
    factory: Factory | None = None,
    laws: Iterable[str] | None = None,
    cases: Sequence[tuple[str, str]] = CASES,
    tolerance: float | None = None,
    repeats: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> LawReport: ...


def check_engine(
    engine: Any,
    inp: InterpretableInput | None = None,
    target: str | Sequence[int] | Tensor | None = None,
    *,
    method: Any = None,
    factory: Factory | None = None,
    laws: Iterable[str] | None = None,
    cases: Sequence[tuple[str, str]] = CASES,
    units: Granularity = "token",
    tolerance: float | None = None,
    repeats: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> EngineReport | LawReport:
    """Prove that the engine of a base method gives the rows that the loop gives.

    There are two forms. ``check_engine(engine)`` looks at every law on small models and
    short texts. ``check_engine(llm_attr, inp, target)`` compares the rows of a text of
    your own with the loop's.

    Rows of a deterministic method must be equal up to rounding. For a random one the
    means over several runs must agree within their standard errors, entry by entry.
    Torch and NumPy are seeded for the check, and left as they were.

    The laws of the first form:

    - ``"runs"``: there is a row for every generated unit that is asked for.
    - ``"shape"``: each has one entry per unit.
    - ``"finiteness"``: there is no NaN and nothing infinite.
    - ``"causality"``: it is zero from its own unit on, and the same whatever stands
      after that.
    - ``"equality to the loop"``: it is the loop's row.
    - ``"group then solve"``: with units of two tokens, too.
    - ``"tokens of no unit"``: tokens of no unit, and units from outside between
      generated ones, as chats and traces have them, are taken as the loop takes them.
    - ``"rows asked for"``: rows of any ascending positions come alone, in this order
      and also after others of the same task.
    - ``"batch size"``: they do not depend on ``task.batch_size``.
    - ``"determinism"``: the same seed gives the same rows.
    - ``"random state"``: the random states are left as they were, or drawn from; never
      seeded. Torch's gradient mode and default types are left as they were.
    - ``"model unchanged"``: parameters, buffers, gradients, ``requires_grad``, modes,
      hooks, config and attention implementation are as they were.
    - ``"objects unchanged"``: so are the Captum object, the base method, the tokenizer
      and the input.
    - ``"ids never re-tokenised"``: nothing of the text is tokenised again.
    - ``"refusal without a call"``: ``unsuitable`` asks no model.

    Args:
        engine: what :func:`captum_cage.register_engine` takes, an ``Engine`` or a
            function of a task and of steps; or the class of the base method that one
            is registered for. Or, in the second form, the Captum object whose base
            method has an engine.
        inp (InterpretableInput): the prompt, in the second form only.
        target (str or Sequence[int] or Tensor, optional): the generated text or its
            ids; None for a trace that ends with generated text. Default: ``None``
        method (type, optional): class of the base method, where the engine is not
            registered. Default: those that it is registered for
        factory (optional): what makes the base method from a model, as for
            :func:`check_attribution_method`. Default: its class
        laws (Iterable[str], optional): names of the laws to look at, of
            ``ENGINE_LAWS``. Default: ``None``, all
        cases (Sequence[tuple[str, str]], optional): models and tokenizers, as
            :func:`tiny_causal_lm` and :func:`tiny_tokenizer` know them. Those that the
            engine says it is unsuitable for are left out. Default: three different ones
        units (optional): as for ``attribute``, in the second form only.
            Default: ``"token"``
        tolerance (float, optional): largest difference, relative to the largest entry.
            Default: 1e-5 for float32 models, 1e-10 for float64, 0.1 for half types
        repeats (int, optional): number of runs whose means are compared. In the first
            form of random methods only. In the second, 1 compares single rows.
            Default: 12 in the first form, 1 in the second
        batch_size (int, optional): as for ``attribute``, in the second form only.
            Default: ``None``
        seed (int, optional): of the first run. Default: ``0``
        **kwargs: for the wrapped object's ``attribute``.

    Returns:
        LawReport or EngineReport: every law and its verdict; or the largest difference,
        and where it is.

    Raises:
        AssertionError: if a law is broken (:class:`LawsBroken`), or the rows differ by
            more than is allowed. Its text says which, what, and where.
        TypeError: if ``engine`` is none of these.
        ValueError: if there is no engine, or no case that it is suitable for.

    Example:
        >>> from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
        >>> report = check_engine(FeatureAblation, cases=[("llama", "bpe")])
        >>> report.verdict("equality to the loop")
        'pass'

        A text of your own:

        >>> from captum_cage.testing import tiny_causal_lm, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> llm_attr = LLMAttribution(FeatureAblation(tiny_causal_lm()), tokenizer)
        >>> inp = TextTokenInput("Ana has 3 pens.", tokenizer)
        >>> check_engine(llm_attr, inp, "Ana has 3 pens.").difference < 1e-5
        True
    """
    if isinstance(engine, LLMAttribution | LLMGradientAttribution):
        if inp is None:
            raise TypeError(
                complaint(
                    "inp",
                    "must be given with a Captum object",
                    "none came",
                    "Pass an input and a text, or the class of the base method alone.",
                )
            )
        if method is not None:
            kwargs["method"] = method  # of integrated gradients
        arguments = {"units": units, "batch_size": batch_size, **kwargs}
        runs = 1 if repeats is None else repeats
        return _compared(engine, inp, target, tolerance, runs, seed, arguments)
    if inp is not None:
        raise TypeError(
            complaint(
                "engine",
                "must be a Captum LLM attribution object where an input is given",
                f"{shown(engine)} came",
                "Wrap the method first, or leave the input out.",
            )
        )
    runs = whole_number(
        "repeats",
        _REPEATS if repeats is None else repeats,
        minimum=2,
        remedy="Pass the number of runs to compare.",
    )
    names = chosen_laws(laws, ENGINE_LAWS)
    trials = _trials(engine, method, factory, cases, seed, tolerance, runs, kwargs)
    laws_asked = {name: _LAWS[name] for name in names}
    return judged(f"check_engine: {_name(engine)}", laws_asked, trials)


# --- one text ------------------------------------------------------------------------


def _compared(
    llm_attr: LLMAttributionObject,
    inp: InterpretableInput,
    target: str | Sequence[int] | Tensor | None,
    tolerance: float | None,
    repeats: int,
    seed: int,
    arguments: Mapping[str, Any],
) -> EngineReport:
    """The largest difference between the rows of an engine and the loop's."""
    runs = whole_number(
        "repeats", repeats, minimum=1, remedy="Pass the number of runs to compare."
    )
    cage = GraphContextAttribution(llm_attr)
    fused = _rows(cage, inp, target, "fused", runs, seed, arguments)
    # Other seeds, as the two must not agree by using the same numbers.
    offset = seed if runs == 1 else seed + runs
    loop = _rows(cage, inp, target, "loop", runs, offset, arguments)
    if runs == 1:
        scale = float(np.abs(loop).max()) or 1.0
        differences = np.abs(fused[0] - loop[0]) / scale
        allowed = allowed_difference(llm_attr.model) if tolerance is None else tolerance
        measure = "of the largest entry"
    else:
        differences = standard_errors(fused, loop)
        allowed = STANDARD_ERRORS if tolerance is None else tolerance
        measure = f"standard errors over {runs} runs"
    row, unit = np.unravel_index(int(differences.argmax()), differences.shape)
    report = EngineReport(float(differences.max()), allowed, int(row), int(unit))
    if not report.difference <= allowed:
        raise AssertionError(
            f"the engine of {base_method(llm_attr)} does not give the loop's rows: in "
            f"row {row}, unit {unit}, {fused[:, row, unit].mean()} is not "
            f"{loop[:, row, unit].mean()}; they differ by {report.difference:.3g} "
            f"{measure}, and {allowed:.3g} is allowed"
        )
    return report


def _rows(
    cage: GraphContextAttribution,
    inp: InterpretableInput,
    target: str | Sequence[int] | Tensor | None,
    strategy: Any,
    runs: int,
    seed: int,
    arguments: Mapping[str, Any],
) -> npt.NDArray[np.float64]:
    """Raw rows of several runs, shape ``(runs, G, N)``."""
    found = []
    # The methods draw from NumPy's global generator as well.
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            for run in range(runs):
                torch.manual_seed(seed + run)
                np.random.seed(seed + run)  # noqa: NPY002
                result = cage.attribute(inp, target, strategy=strategy, **arguments)
                found.append(result.graph.rows)
        finally:
            np.random.set_state(before)  # noqa: NPY002
    return np.stack(found)


# --- all laws ------------------------------------------------------------------------


@dataclass
class EngineTrial:
    """An engine, and the trial of its base method.

    Attributes:
        trial (Trial): a small model and a text.
        engine (Engine): what is checked.
        repeats (int): runs of a random method whose means are compared.
    """

    trial: Trial
    engine: Engine
    repeats: int

    @property
    def task(self) -> RowTask:
        """The text, its units single tokens."""
        return self.trial.task

    def given(
        self,
        *,
        task: RowTask | None = None,
        steps: Sequence[int] | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        kept: dict[str, Any] | None = None,
    ) -> list[Any]:
        """What the engine gives, as it is.

        Args:
            task (RowTask, optional): the text. Default: the trial's
            steps (Sequence[int], optional): the rows to ask for. Default: all
            seed (int, optional): of the run. Default: the trial's
            batch_size (int, optional): as in ``RowTask``. Default: ``None``
            kept (dict, optional): as in ``RowTask``. Default: nothing is kept
        """
        asked = self.task if task is None else task
        # What an engine keeps for a call that is repeated must not answer this one.
        own = {} if kept is None else kept
        fresh = replace(asked, kept=own, batch_size=batch_size)
        chosen = asked.written.tolist() if steps is None else list(steps)
        with seeded(self.trial.seed if seed is None else seed):
            return list(self.engine.rows(fresh, chosen))

    def rows(self, **asked: Any) -> Rows:
        """What the engine gives, as numbers, shape ``(rows, N)``.

        Raises:
            Broken: if it gives another number of rows than was asked for.
            NotApplicable: if the rows are no rows; other laws tell of it.
        """
        found = self.given(**asked)
        task = asked.get("task") or self.task
        steps = asked.get("steps")
        count = len(task.written) if steps is None else len(steps)
        if len(found) != count:
            raise Broken(
                f"{count} rows, one per position that was asked for",
                f"{len(found)} rows",
                "Give one row per entry of steps, in their order, and no other.",
                f"steps={list(range(count)) if steps is None else list(steps)}",
            )
        rows = [_numbers(row) for row in found]
        if any(row.shape != (task.width,) for row in rows):
            raise NotApplicable("rows of another shape are no rows")
        return np.stack(rows)

    @cached_property
    def plain(self) -> Rows:
        """All rows of the first run."""
        return self.sound()

    def sound(self) -> Rows:
        """All rows of the first run, for laws that need some.

        Raises:
            NotApplicable: if there are none; the law "runs" tells why.
        """
        try:
            return self.rows()
        except NotApplicable:
            raise
        # Whatever the code of others raises; the law "runs" tells of it.
        except Exception as error:
            raise NotApplicable("its rows could not be computed") from error

    @property
    def is_random(self) -> bool:
        """Whether the loop's rows depend on the seed, so that means must be compared.

        An engine that is random where the loop is not has no means to hide behind.
        """
        return self.trial.is_random

    def agree(
        self,
        found: Callable[[int], Rows],
        expected: Callable[[int], Rows],
        what: str,
        remedy: str,
        *,
        task: RowTask | None = None,
        steps: Sequence[int] | None = None,
    ) -> None:
        """Refuse rows of two kinds that differ; of a random method, in the mean.

        Args:
            found: the rows that are checked, by the seed of the run.
            expected: what they must be.
            what (str): the same in words.
            remedy (str): what to do.
            task (RowTask, optional): whose rows they are. Default: the trial's
            steps (Sequence[int], optional): positions of the rows. Default: all
        """
        asked = self.task if task is None else task
        seed, runs = self.trial.seed, self.repeats
        if self.is_random:
            # Other seeds, as the two must not agree by using the same numbers.
            one = np.stack([found(seed + run) for run in range(runs)])
            other = np.stack([expected(seed + runs + run) for run in range(runs)])
        else:
            one, other = found(seed), expected(seed)
        check_same(self.trial, asked, one, other, what, remedy, steps=steps)

    def all_rows(self, seed: int) -> Rows:
        """All rows of one run; they are computed once."""
        if seed == self.trial.seed:
            return self.plain
        key = ("engine", seed)
        if key not in self.trial.kept:
            self.trial.kept[key] = self.rows(seed=seed)
        found: Rows = self.trial.kept[key]
        return found


def _trials(
    engine: Any,
    method: Any,
    factory: Factory | None,
    cases: Sequence[tuple[str, str]],
    seed: int,
    tolerance: float | None,
    repeats: int,
    kwargs: Mapping[str, Any],
) -> list[tuple[str, EngineTrial]]:
    """Engine and base method on every case that they are suitable for."""
    makers = [factory] if factory is not None else _methods(engine, method)
    found, reasons = [], []
    for maker in makers:
        for case in cases:
            trial = made_trial(maker, case, seed, tolerance, kwargs)
            one = _engine(engine, trial)
            reason = _refused(one, trial)
            if reason:
                reasons.append(f"{', '.join(case)}: {reason}")
                continue
            parts = ([name_of(maker)] if len(makers) > 1 else []) + list(case)
            found.append((", ".join(parts), EngineTrial(trial, one, repeats)))
    if not found:
        raise ValueError(
            complaint(
                "cases",
                "must have a case that the engine is suitable for",
                "; ".join(reasons) or "none came",
                "Pass cases= that it is made for, as [('llama', 'bpe')].",
            )
        )
    return found


def _methods(engine: Any, method: Any) -> list[Any]:
    """Classes of the base methods of an engine.

    Raises:
        TypeError: if it is no engine.
        ValueError: if it is registered for none.
    """
    if method is not None:
        return [method]
    if isinstance(engine, type):
        return [engine]
    if not isinstance(engine, Engine) and not callable(engine):
        raise TypeError(
            complaint(
                "engine",
                "must be an Engine, a function of a task and of steps, the class of a "
                "base method that has an engine, or a Captum LLM attribution object",
                f"{shown(engine)} came",
                "Pass what register_engine takes.",
            )
        )
    found = [
        kind
        for kind, registered in _engines.items()
        if registered is engine or registered.rows is engine
    ]
    if not found:
        raise ValueError(
            complaint(
                "engine",
                "must be registered for a base method",
                f"{_name(engine)} came, which is not",
                "Register it, or pass method= or factory=.",
            )
        )
    return found


def _engine(engine: Any, trial: Trial) -> Engine:
    """The engine itself, or the one that a class is registered with.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(engine, Engine):
        return engine
    if not isinstance(engine, type):
        return Engine(engine)
    found = _engines.get(engine)
    if found is None:
        _, reason = find_engine(trial.task)
        raise ValueError(
            complaint(
                "engine",
                "must be an engine or the class of a base method that has one",
                reason or f"{engine.__name__} came, which has none",
                "Register one with register_engine first.",
            )
        )
    return found


def _refused(engine: Engine, trial: Trial) -> str | None:
    """Why an engine does not take a task; None if it does."""
    reason = engine.unsuitable(trial.task)
    if reason is not None:
        return reason
    try:
        with seeded(trial.seed):
            next(iter(engine.rows(replace(trial.task, kept={}), [0])), None)
    except Unsuitable as error:
        return str(error)
    # Whatever the code of others raises; the laws tell of it.
    except Exception:  # noqa: BLE001
        return None
    return None


def _name(engine: Any) -> str:
    if isinstance(engine, Engine):
        return f"Engine({name_of(engine.rows)})"
    return name_of(engine)


def _numbers(row: Any) -> Rows:
    return np.asarray(row, dtype=np.float64)


def _runs(trial: EngineTrial) -> None:
    try:
        trial.given()
    # Whatever the code of others raises is a finding about it.
    except Exception as error:
        raise Broken(
            "a row for every generated unit",
            f"{type(error).__name__}: {error}",
            "Raise Unsuitable before the first row, or say so in Engine.unsuitable, "
            "where the engine cannot do it.",
        ) from error
    try:
        trial.rows()
    except NotApplicable:
        return


def _shape(trial: EngineTrial) -> None:
    try:
        found = trial.given()
    except Exception as error:
        raise NotApplicable("its rows could not be computed") from error
    width = trial.task.width
    for step, row in enumerate(found[: len(trial.task.steps)]):
        shape = tuple(np.shape(row))
        if shape != (width,):
            raise Broken(
                f"shape ({width},), one entry per unit of the whole text",
                f"{shape}",
                "Give each row task.width entries, zero from the row's own unit on.",
                place(trial.task, step),
            )


def _finiteness(trial: EngineTrial) -> None:
    check_finite(trial.task, trial.sound())


def _causality(trial: EngineTrial) -> None:
    check_nothing_later(trial.task, trial.sound())
    steps, sources = len(trial.task.steps), len(trial.task.sources)
    # Means take many runs: of a random method one length is enough.
    for count in (steps // 2,) if trial.is_random else range(1, steps):
        begun = trial.trial.begun(count)
        if _refused(trial.engine, replace(trial.trial, task=begun)):
            continue

        def cut(seed: int, begun: RowTask = begun) -> Rows:
            return trial.rows(task=begun, seed=seed)

        def whole(seed: int, count: int = count) -> Rows:
            return trial.all_rows(seed)[:count, : sources + count]

        trial.agree(
            cut,
            whole,
            f"the same rows when the text ends after unit {count - 1}",
            "A row must depend on the text up to its own unit alone: mask what stands "
            "after it.",
            task=begun,
        )


def equality_to_the_loop(trial: EngineTrial) -> None:
    """Refuse rows that are not the loop's.

    Args:
        trial (EngineTrial): engine, model and text.

    Raises:
        Broken: if they are not.
    """
    trial.sound()
    trial.agree(
        trial.all_rows,
        trial.trial.loop,
        "the loop's row",
        "The loop is what the engine must equal: one call of the Captum object for "
        "this unit, given all before it.",
    )


def _group_then_solve(trial: EngineTrial) -> None:
    trial.sound()
    pairs = trial.trial.pairs
    if reason := _refused(trial.engine, replace(trial.trial, task=pairs)):
        raise NotApplicable(f"it takes no units of two tokens: {reason}")

    def loop(seed: int) -> Rows:
        return trial.trial.loop(seed, pairs)

    trial.agree(
        lambda seed: trial.rows(task=pairs, seed=seed),
        loop,
        "the loop's row of units of two tokens",
        "Perturb a unit as a whole, or sum the tokens' raw scores over the rows and "
        "columns of each unit and drop the block inside it. Use task.unit_of_token().",
        task=pairs,
    )


def _gaps(trial: EngineTrial) -> None:
    trial.sound()
    task = trial.trial.gapped if len(trial.task.steps) > 2 else None
    if task is None:
        raise NotApplicable("the text is too short")
    if reason := _refused(trial.engine, replace(trial.trial, task=task)):
        raise NotApplicable(f"it takes no tokens of no unit: {reason}")
    steps = task.written.tolist()

    def loop(seed: int) -> Rows:
        with seeded(seed):
            return np.stack([loop_row(task, step) for step in steps])

    trial.agree(
        lambda seed: trial.rows(task=task, seed=seed),
        loop,
        "the loop's row of a text of which some tokens are of no unit and one from "
        "outside",
        "Leave out tokens whose entry of task.unit_of_token() is -1, and take steps "
        "for positions among all units after the prompt.",
        task=task,
        steps=steps,
    )


def _rows_asked_for(trial: EngineTrial) -> None:
    trial.sound()
    last = len(trial.task.steps) - 1
    several = [[last], [0], list(range(0, last + 1, 2)), list(range(1, last + 1))]
    for steps in several[-1:] if trial.is_random else several:

        def asked(seed: int, steps: Sequence[int] = steps) -> Rows:
            return trial.rows(steps=steps, seed=seed)

        def all_of_them(seed: int, steps: Sequence[int] = steps) -> Rows:
            return trial.all_rows(seed)[list(steps)]

        trial.agree(
            asked,
            all_of_them,
            f"for steps={steps} the rows that steps={list(range(last + 1))} give there",
            "Give the row of each entry of steps, in their order; steps are positions "
            "of generated units.",
            steps=steps,
        )
    if trial.is_random:
        return
    kept: dict[str, Any] = {}
    for steps in several:
        check_same(
            trial.trial,
            trial.task,
            trial.rows(steps=steps, kept=kept),
            trial.plain[list(steps)],
            f"for steps={steps}, after other steps of the same task, the same rows",
            "Keep in task.kept what holds for any steps, or the steps it holds for.",
            steps=steps,
        )


def _batch_size(trial: EngineTrial) -> None:
    trial.sound()
    for size in (1,) if trial.is_random else (1, 2, 3):

        def in_batches(seed: int, size: int = size) -> Rows:
            return trial.rows(batch_size=size, seed=seed)

        trial.agree(
            in_batches,
            trial.all_rows,
            f"with batch_size={size} the rows that come without",
            "A sequence must not see the others of its batch: look at padding, masks "
            "and what is summed over the batch.",
        )


def _determinism(trial: EngineTrial) -> None:
    check_same(
        trial.trial,
        trial.task,
        trial.sound(),
        trial.sound(),
        "the same rows when called again with the same seed",
        "Draw from Torch's or NumPy's global generator, or seed your own in each call.",
    )


def _random_state(trial: EngineTrial) -> None:
    trial.sound()

    def run() -> None:
        list(trial.engine.rows(replace(trial.task, kept={}), [0]))

    check_random_state(run, trial.trial.seed)


def _model_unchanged(trial: EngineTrial) -> None:
    with suppress(Exception):  # the law "runs" tells of it
        trial.given()
    trial.trial.check_model()


def _objects_unchanged(trial: EngineTrial) -> None:
    trial.sound()
    trial.trial.check_objects()


def _ids_kept(trial: EngineTrial) -> None:
    trial.trial.tokenised.clear()
    trial.sound()
    trial.trial.check_ids()


def _refusal(trial: EngineTrial) -> None:
    calls = []
    model = trial.trial.model
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        trial.engine.unsuitable(trial.task)
    finally:
        handle.remove()
    if calls:
        raise Broken(
            "unsuitable to say it without asking the model",
            f"{len(calls)} forward passes",
            "Raise Unsuitable before the first row where the model must be asked.",
        )


_LAWS: dict[str, Callable[[EngineTrial], None]] = {
    "runs": _runs,
    "shape": _shape,
    "finiteness": _finiteness,
    "causality": _causality,
    "equality to the loop": equality_to_the_loop,
    "group then solve": _group_then_solve,
    "tokens of no unit": _gaps,
    "rows asked for": _rows_asked_for,
    "batch size": _batch_size,
    "determinism": _determinism,
    "random state": _random_state,
    "model unchanged": _model_unchanged,
    "objects unchanged": _objects_unchanged,
    "ids never re-tokenised": _ids_kept,
    "refusal without a call": _refusal,
}
ENGINE_LAWS = tuple(_LAWS)
