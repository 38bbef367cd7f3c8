"""What a downstream library calls from its own tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import InterpretableInput
from torch import Tensor

from captum_cage._captum import LLMAttributionObject, base_method
from captum_cage._checks import whole_number
from captum_cage.attribution import GraphContextAttribution
from captum_cage.units import Granularity

__all__ = ["EngineReport", "check_engine"]

_CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}
_CLOSE_HALVES = 0.1
# Standard errors by which the means of two random rows may differ. Of a hundred
# thousand entries that are equal in truth, one in two is expected beyond 4.5.
_STANDARD_ERRORS = 6.0


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


def check_engine(
    llm_attr: LLMAttributionObject,
    inp: InterpretableInput,
    target: str | Sequence[int] | Tensor | None = None,
    *,
    units: Granularity = "token",
    tolerance: float | None = None,
    repeats: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> EngineReport:
    """Prove that the engine of a base method gives the rows that the loop gives.

    Both ways compute all raw rows. Rows of a deterministic method must be equal up to
    rounding. For a random one pass ``repeats``: then the means over as many runs must
    agree within their standard errors, entry by entry. Torch and NumPy are seeded for
    the check, and left as they were.

    Args:
        llm_attr: the Captum object, whose base method has an engine.
        inp (InterpretableInput): the prompt.
        target (str or Sequence[int] or Tensor, optional): the generated text or its
            ids; None for a trace that ends with generated text. Default: ``None``
        units (optional): as for ``attribute``. Default: ``"token"``
        tolerance (float, optional): largest difference, relative to the largest entry.
            Default: 1e-5 for float32 models, 1e-10 for float64, 0.1 for half types
        repeats (int, optional): number of runs; more than one compares means.
            Default: ``1``
        batch_size (int, optional): as for ``attribute``. Default: ``None``
        seed (int, optional): of the first run. Default: ``0``
        **kwargs: for the wrapped object's ``attribute``.

    Returns:
        EngineReport: the largest difference, and where it is.

    Raises:
        AssertionError: if the rows differ by more than that.
        ValueError: if the base method has no engine for this.

    Example:
        >>> from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        >>> inp = TextTokenInput("Ana has 3 pens.", tokenizer)
        >>> check_engine(llm_attr, inp, "Ana has 3 pens.").difference < 1e-5
        True
    """
    runs = whole_number(
        "repeats", repeats, minimum=1, remedy="Pass the number of runs to compare."
    )
    cage = GraphContextAttribution(llm_attr)
    arguments = {"units": units, "batch_size": batch_size, **kwargs}
    fused = _rows(cage, inp, target, "fused", runs, seed, arguments)
    # Other seeds, as the two must not agree by using the same numbers.
    offset = seed if runs == 1 else seed + runs
    loop = _rows(cage, inp, target, "loop", runs, offset, arguments)
    if runs == 1:
        scale = float(np.abs(loop).max()) or 1.0
        differences = np.abs(fused[0] - loop[0]) / scale
        allowed = _allowed(llm_attr.model) if tolerance is None else tolerance
        measure = "of the largest entry"
    else:
        differences = _standard_errors(fused, loop)
        allowed = _STANDARD_ERRORS if tolerance is None else tolerance
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


def _allowed(model: Any) -> float:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return _CLOSE.get(dtype, _CLOSE_HALVES)


def _standard_errors(
    one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Difference of two means in standard errors, per entry."""
    runs = len(one)
    variance = (one.var(axis=0, ddof=1) + other.var(axis=0, ddof=1)) / runs
    # Entries that hardly vary differ by rounding.
    largest = np.abs(other.mean(axis=0)).max()
    error = np.sqrt(variance) + 1e-6 * (largest or 1.0)
    differences: npt.NDArray[np.float64] = (
        one.mean(axis=0) - other.mean(axis=0)
    ) / error
    return np.abs(differences)
