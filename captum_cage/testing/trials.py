"""A method on a small model with a text that is hard to keep apart: what checks try."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import (
    Attribution,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValues,
    ShapleyValueSampling,
)

from captum_cage._captum import LLMAttributionObject, family
from captum_cage._checks import complaint, shown
from captum_cage.inputs import Prompt, TokenIdsInput, baseline_id
from captum_cage.methods.capability import Capability
from captum_cage.methods.catalogue import (
    capability_of,
    llm_attribution,
    method_named,
    needs_argument,
)
from captum_cage.rows import loop_row
from captum_cage.task import RowTask, text_units
from captum_cage.testing.models import tiny_causal_lm
from captum_cage.testing.report import Broken
from captum_cage.testing.tokenizers import tiny_tokenizer
from captum_cage.testing.watch import (
    Snapshot,
    changes,
    model_snapshot,
    object_snapshot,
    random_snapshot,
    seeded,
    settings_snapshot,
    tokenizer_snapshot,
    watched_tokenizer,
)
from captum_cage.units import FIXED, Unit, Units, split_units

__all__ = [
    "CASES",
    "Factory",
    "Rows",
    "Trial",
    "check_finite",
    "check_nothing_later",
    "check_same",
    "grouped",
    "made_trial",
    "name_of",
    "standard_errors",
]

Rows: TypeAlias = npt.NDArray[np.float64]
Factory: TypeAlias = str | type[Any] | Callable[..., Any]

# Model and tokenizer of each trial: rotary and learnt positions, windows; bytes,
# characters, pieces whose text depends on what stands before.
CASES = (("llama", "bpe"), ("gpt2", "char"), ("gemma3", "sentencepiece"))
PROMPT = "Ana has 3 pens. Mia has 4."
ANSWER = " 7 pens"
_UNITS = (4, 4)  # source units, and generated ones
_FEW = 6  # samples, or steps of an integral
_FEW_ORDERS = 2  # of all units, each of which asks the model once per unit
_CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}
_CLOSE_HALVES = 0.1


@dataclass
class Trial:
    """An attribution object, its model, and a text to explain.

    Attributes:
        llm_attr: the Captum object.
        task (RowTask): the text, its units single tokens.
        seed (int): of the first run.
        tolerance (float): largest difference that passes, relative to the largest
            entry.
        tokenised (list[str]): texts that the tokenizer was asked to tokenise.
        untouched (Snapshot): the model, before anything was done with it.
        kept (dict): what laws found out already.
    """

    llm_attr: LLMAttributionObject
    task: RowTask
    seed: int
    tolerance: float
    tokenised: list[str]
    untouched: Snapshot
    kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._objects = self.objects()

    @property
    def model(self) -> Any:
        """The small model."""
        return self.llm_attr.model

    @property
    def inp(self) -> TokenIdsInput:
        """The prompt, as ids."""
        found: TokenIdsInput = self.task.prompt.inp
        return found

    @cached_property
    def pairs(self) -> RowTask:
        """The same text in units of two tokens."""
        return grouped(self.task, 2)

    @cached_property
    def gapped(self) -> RowTask:
        """The same text; one token of each side is of no unit, one from outside."""
        ids = list(self.task.prompt.ids)
        mask = [-1, *range(len(ids) - 1)]
        inp = TokenIdsInput(ids, self.llm_attr.tokenizer, feature_mask=mask)
        whole = task_of(self.llm_attr, inp, self.task.generated, self.task.kwargs)
        return with_gaps(whole)

    def begun(self, steps: int) -> RowTask:
        """The same text up to its first generated tokens."""
        return task_of(
            self.llm_attr, self.inp, self.task.generated[:steps], self.task.kwargs
        )

    def loop(self, seed: int | None = None, task: RowTask | None = None) -> Rows:
        """Raw rows, one call of the Captum object each. Shape ``(G, N)``."""
        asked = self.task if task is None else task
        number = self.seed if seed is None else seed
        key = ("loop", number, len(asked.generated), len(asked.steps))
        if key not in self.kept:
            with seeded(number):
                rows = [loop_row(asked, step) for step in range(len(asked.steps))]
            self.kept[key] = np.stack(rows)
        found: Rows = self.kept[key]
        return found

    @cached_property
    def is_random(self) -> bool:
        """Whether the rows depend on the seed."""
        one, other = self.loop(), self.loop(self.seed + 1)
        return not np.array_equal(one, other, equal_nan=True)

    def objects(self) -> Snapshot:
        """The Captum object, the base method, the tokenizer and the input."""
        return {
            **object_snapshot("the Captum object", self.llm_attr),
            **object_snapshot("the base method", self.llm_attr.attr_method),
            **tokenizer_snapshot(self.llm_attr.tokenizer),
            **object_snapshot("the input", self.inp),
        }

    def check_model(self) -> None:
        """Refuse a model that is not as it was before anything was done with it.

        Raises:
            Broken: with all that changed.
        """
        _check_unchanged(
            self.untouched,
            model_snapshot(self.model),
            "the model",
            "Put back what you change, in a finally block: hooks, modes, gradients, "
            "weights.",
        )

    def check_objects(self) -> None:
        """Refuse objects that are not as they were when the trial began.

        Raises:
            Broken: with all that changed.
        """
        _check_unchanged(
            self._objects,
            self.objects(),
            "the Captum object, the base method, the tokenizer and the input",
            "Work on copies, and keep what belongs to a call in the call.",
        )

    def check_ids(self) -> None:
        """Refuse what was tokenised of the text since ``tokenised`` was empty.

        Raises:
            Broken: with the texts.
        """
        whole = self.task.prompt.text.text + self.task.generated_text.text
        texts = [
            text
            for text in self.tokenised
            if text.strip() and (text in whole or whole.strip() in text)
        ]
        if texts:
            raise Broken(
                "no text of the prompt or of what was generated to be tokenised",
                ", ".join(map(repr, texts)),
                "Use the ids that are given: their text may be tokenised otherwise.",
            )


def made_trial(
    factory: Factory,
    case: tuple[str, str],
    seed: int,
    tolerance: float | None,
    kwargs: Mapping[str, Any],
) -> Trial:
    """A method on a small model and a text.

    Args:
        factory: what makes the method from the model.
        case (tuple[str, str]): family of the model, kind of the tokenizer.
        seed (int): of the model, and of the first run.
        tolerance (float or None): largest difference that passes.
        kwargs (Mapping): for the Captum object's ``attribute``.

    Raises:
        TypeError: if the factory makes no attribution object.
        ValueError: if there is no such case.
    """
    arch, kind = _checked_case(case)
    model = _marked(tiny_causal_lm(arch, seed=seed))
    untouched = model_snapshot(model)
    tokenizer, tokenised = watched_tokenizer(tiny_tokenizer(kind))
    llm_attr = wrapped(factory, model, tokenizer)
    arguments = {**_few(llm_attr), **kwargs}
    ids = list(tokenizer.encode(PROMPT))
    # Each character alone: ids whose text would be tokenised otherwise.
    answer = [
        i for char in ANSWER for i in tokenizer.encode(char, add_special_tokens=False)
    ]
    # It asks the model n * n! times for a row of n units.
    units = (3, 2) if isinstance(llm_attr.attr_method, ShapleyValues) else _UNITS
    inp = TokenIdsInput(ids[-units[0] :], tokenizer)
    task = task_of(llm_attr, inp, answer[: units[1]], arguments)
    tokenised.clear()
    allowed = allowed_difference(model) if tolerance is None else tolerance
    return Trial(llm_attr, task, seed, allowed, tokenised, untouched)


def task_of(
    llm_attr: LLMAttributionObject,
    inp: TokenIdsInput,
    generated: Sequence[int],
    kwargs: Mapping[str, Any],
) -> RowTask:
    """What the rows of ids after a prompt depend on, in units of one token."""
    tokenizer = llm_attr.tokenizer
    prompt = Prompt.read(inp, tokenizer)
    found = text_units(prompt, generated, split_units("token"), tokenizer)
    return RowTask(
        llm_attr=llm_attr,
        prompt=prompt,
        generated=tuple(generated),
        generated_text=found.text,
        sources=found.sources,
        steps=found.steps,
        baseline=baseline_id("auto", inp, tokenizer),
        kwargs=dict(kwargs),
    )


def grouped(task: RowTask, size: int) -> RowTask:
    """A task whose units are tokens, in units of several.

    Args:
        task (RowTask): with one unit per token.
        size (int): number of tokens of a unit; the last one may have fewer.
    """
    return replace(
        task,
        sources=_grouped(task.sources, size, False),
        steps=_grouped(task.steps, size, True),
    )


def with_gaps(task: RowTask) -> RowTask:
    """A task whose units are tokens, as a chat with a result of a tool has them.

    The second token after the prompt is of no unit; the third stands there from
    outside.

    Args:
        task (RowTask): with one unit per token, three of them generated or more.
    """
    steps = list(task.steps.units)
    steps[2] = replace(steps[2], generated=False)
    del steps[1]
    groups = np.arange(len(task.steps)) - (np.arange(len(task.steps)) > 0)
    groups[1] = FIXED
    return replace(task, steps=Units(tuple(steps), groups))


def wrapped(factory: Factory, model: Any, tokenizer: Any) -> LLMAttributionObject:
    """The Captum object of whatever makes a method from a model.

    Args:
        factory: the name or class of a base method; or a function of a model, or of a
            model and a tokenizer, which gives a base method or a Captum object.
        model: a causal language model.
        tokenizer: its tokenizer.

    Raises:
        TypeError: if something else came, or comes from it.
    """
    if isinstance(factory, str):
        factory = method_named(factory)[0]
    if isinstance(factory, type):
        return llm_attribution(factory, model, tokenizer, **_few_made(factory))
    if not callable(factory):
        raise _no_factory(factory, "came")
    made = factory(*_arguments(factory, model, tokenizer))
    if isinstance(made, LLMAttribution | LLMGradientAttribution):
        return made
    if isinstance(made, LLMGradientAttribution.SUPPORTED_METHODS):
        return LLMGradientAttribution(made, tokenizer)
    if isinstance(made, LLMAttribution.SUPPORTED_METHODS):
        return LLMAttribution(made, tokenizer)
    raise _no_factory(made, "came from it")


def name_of(value: Any) -> str:
    """What a report calls a method, an engine or what makes one."""
    if isinstance(value, str):
        return value
    if isinstance(value, Attribution):
        return type(value).__name__
    return getattr(value, "__qualname__", None) or type(value).__name__


def check_same(
    trial: Trial,
    task: RowTask,
    found: Rows,
    expected: Rows,
    what: str,
    remedy: str,
    *,
    steps: Sequence[int] | None = None,
) -> None:
    """Refuse rows that are not those that are expected.

    Args:
        trial (Trial): whose tolerance counts.
        task (RowTask): whose rows they are.
        found (numpy.ndarray): shape ``(rows, N)``, or ``(runs, rows, N)`` of a random
            method, whose means are compared in standard errors.
        expected (numpy.ndarray): the same shape.
        what (str): what is expected.
        remedy (str): what to do.
        steps (Sequence[int], optional): positions of the rows. Default: all

    Raises:
        Broken: if they differ.
    """
    if found.shape != expected.shape:
        raise Broken(f"{what}, shape {expected.shape}", f"shape {found.shape}", remedy)
    if found.ndim == 3:
        differences, allowed = standard_errors(found, expected), STANDARD_ERRORS
        measure = f"standard errors over {len(found)} runs"
        found, expected = found.mean(axis=0), expected.mean(axis=0)
    else:
        scale = float(np.abs(expected).max(initial=0, where=np.isfinite(expected)))
        differences, allowed = np.abs(found - expected) / (scale or 1), trial.tolerance
        measure = "of the largest entry"
        # That both are not finite is for another law to say.
        differences[~np.isfinite(found) & ~np.isfinite(expected)] = 0
    wrong = ~(differences <= allowed)
    if not wrong.any():
        return
    order = np.where(np.isnan(differences), np.inf, differences)
    row, unit = np.unravel_index(int(order.argmax()), order.shape)
    step = int(row) if steps is None else steps[int(row)]
    raise Broken(
        f"{what}, {float(expected[row, unit])!r}",
        f"{float(found[row, unit])!r}, off by {differences[row, unit]:.3g} {measure} "
        f"where {allowed:.3g} is allowed; {int(wrong.sum())} of {wrong.size} entries "
        "are off",
        remedy,
        place(task, step, int(unit)),
    )


def place(task: RowTask, step: int, unit: int | None = None) -> str:
    """A row and a unit in words."""
    row = f"row {step} ({task.steps.units[step].text!r})"
    if unit is None:
        return row
    units = (*task.sources.units, *task.steps.units)
    return f"{row}, unit {unit} ({units[unit].text!r})"


def check_finite(task: RowTask, rows: Rows) -> None:
    """Refuse rows with NaN or infinite entries.

    Args:
        task (RowTask): whose rows they are.
        rows (numpy.ndarray): all of them, shape ``(G, N)``.

    Raises:
        Broken: with the first such entry.
    """
    for row, unit in np.argwhere(~np.isfinite(rows)).tolist():
        raise Broken(
            "finite attributions",
            f"{rows[row, unit]}",
            "Look for a division by zero, or a number type that is too narrow.",
            place(task, row, unit),
        )


def check_nothing_later(task: RowTask, rows: Rows) -> None:
    """Refuse rows with entries for their own unit or a later one.

    Args:
        task (RowTask): whose rows they are.
        rows (numpy.ndarray): all of them, shape ``(G, N)``.

    Raises:
        Broken: with the first such entry.
    """
    sources = len(task.sources)
    for row, unit in np.argwhere(np.triu(rows[:, sources:])).tolist():
        raise Broken(
            "0 for a unit at or after the row's own",
            f"{rows[row, sources + unit]}",
            "Attribute a unit to what stands before it only.",
            place(task, row, sources + unit),
        )


# Standard errors by which the means of two random rows may differ. Of a hundred
# thousand entries that are equal in truth, one in two is expected beyond 4.5.
STANDARD_ERRORS = 6.0


def standard_errors(one: Rows, other: Rows) -> Rows:
    """Difference of two means in standard errors, per entry.

    Args:
        one (numpy.ndarray): runs in front.
        other (numpy.ndarray): the same shape.
    """
    runs = len(one)
    variance = (one.var(axis=0, ddof=1) + other.var(axis=0, ddof=1)) / runs
    # Entries that hardly vary differ by rounding.
    largest = np.abs(other.mean(axis=0)).max()
    error = np.sqrt(variance) + 1e-6 * (largest or 1.0)
    differences: Rows = (one.mean(axis=0) - other.mean(axis=0)) / error
    return np.abs(differences)


def check_random_state(run: Callable[[], Any], seed: int) -> None:
    """Refuse what seeds a global generator.

    Args:
        run: what might do it.
        seed (int): of the first run; the second has the next one.

    Raises:
        Broken: if it does.
    """
    found = []
    for number in (seed, seed + 1):
        with seeded(number):
            before = random_snapshot()
            settings = settings_snapshot()
            run()
            found.append((before, random_snapshot()))
            _check_unchanged(
                settings,
                settings_snapshot(),
                "the settings of Torch and NumPy",
                "Put back what you set, in a finally block or by a with statement.",
            )
    (one, after_one), (other, after_other) = found
    for name in one:
        if not changes({name: one[name]}, {name: after_one[name]}) and not changes(
            {name: other[name]}, {name: after_other[name]}
        ):
            continue
        if not changes({name: after_one[name]}, {name: after_other[name]}):
            raise Broken(
                f"{name} as it was, or drawn from",
                "the same state after two different seeds: it was set",
                "Seed a generator of your own, not the global one.",
            )


def _check_unchanged(before: Snapshot, after: Snapshot, what: str, remedy: str) -> None:
    found = changes(before, after)
    if found:
        raise Broken(f"{what} as it was", "\n".join(found), remedy)


def _checked_case(case: Any) -> tuple[str, str]:
    if not (isinstance(case, tuple) and len(case) == 2):
        raise ValueError(
            complaint(
                "cases",
                "must be pairs of a family of models and a kind of tokenizer",
                f"{shown(case)} came",
                "Pass pairs, for example [('llama', 'bpe')].",
            )
        )
    return case


def _marked(model: Any) -> Any:
    """The model with something of all that an explanation must leave as it is."""
    model.get_output_embeddings().train()  # of no effect, as it only multiplies
    norms = [p for p in model.parameters() if p.dim() == 1]
    if norms:
        norms[-1].requires_grad_(False)
        norms[0].grad = torch.ones_like(norms[0])
    return model


def allowed_difference(model: Any) -> float:
    """Largest relative difference of equal rows, by a model's type of numbers."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return _CLOSE.get(dtype, _CLOSE_HALVES)


def _grouped(units: Units, size: int, generated: bool) -> Units:
    groups = np.arange(len(units)) // size
    found = []
    for number in range(int(groups[-1]) + 1):
        members = [units.units[i] for i in np.flatnonzero(groups == number)]
        first, last = members[0].span, members[-1].span
        span = None if first is None or last is None else (first[0], last[1])
        found.append(Unit("".join(unit.text for unit in members), generated, span))
    return Units(tuple(found), groups)


def _declared(method: type[Any]) -> Capability | None:
    """What is known of a class or of those that it extends."""
    known = (capability_of(kind) for kind in method.__mro__)
    return next((declared for declared in known if declared is not None), None)


def _few_made(method: type[Any]) -> dict[str, Any]:
    """Options of a constructor that keep the number of evaluations small."""
    declared = _declared(method)
    if declared is None or declared.counted is None:
        return {}
    takes = needs_argument(method, declared.counted) is not None
    return {declared.counted: _FEW} if takes else {}


def _few(llm_attr: LLMAttributionObject) -> dict[str, Any]:
    """Arguments of ``attribute`` that keep the number of evaluations small."""
    method = llm_attr.attr_method
    declared = _declared(type(method))
    if declared is None or declared.counted is None:
        return {}
    takes = declared.counted in inspect.signature(method.attribute).parameters
    few = _FEW_ORDERS if isinstance(method, ShapleyValueSampling) else _FEW
    return {declared.counted: few} if takes else {}


def _arguments(factory: Callable[..., Any], model: Any, tokenizer: Any) -> list[Any]:
    """A model, and a tokenizer where the function cannot do without it."""
    for arguments in ([model], [model, tokenizer]):
        with suppress(TypeError):
            inspect.signature(factory).bind(*arguments)
            return arguments
    raise _no_factory(factory, "came")


def _no_factory(value: object, how: str) -> TypeError:
    return TypeError(
        complaint(
            "factory",
            "must be the class of an attribution method, or a function of a model, or "
            "of a model and a tokenizer, that gives a method or a Captum LLM "
            "attribution object",
            f"{shown(value)} {how}",
            "Pass for example FeatureAblation, or lambda model: "
            "LayerIntegratedGradients(model, model.get_input_embeddings()).",
        )
    )


def is_gradient(llm_attr: LLMAttributionObject) -> bool:
    """Whether the Captum object takes gradients, or methods that look like these."""
    return family(llm_attr) == "gradient"
