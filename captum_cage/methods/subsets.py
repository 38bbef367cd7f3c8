"""Base methods that ask a model with some units absent: C-LIME, L-SHAP, ContextCite."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Real
from types import MethodType
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import Lime, LLMAttribution, PerturbationAttribution
from scipy.linalg import solve
from scipy.sparse import csr_array
from torch import Tensor

from captum_cage._checks import complaint, one_of, shown, whole_number
from captum_cage.methods.capability import Capability

__all__ = [
    "AbsentSet",
    "CLime",
    "ContextCite",
    "LShap",
    "SubsetMethod",
    "SubsetPlan",
]

AbsentSet: TypeAlias = tuple[int, ...]
Array: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = npt.NDArray[np.int64]

_SCALARIZERS = ("sum", "mean", "geometric_mean", "product")
# Sets of one size that are put in random order at most (half a GiB).
_MOST_SETS = 2**26
# Log-probabilities this near 0 are those of a certain token, in float32.
_CERTAIN = -(2.0**-24)


@dataclass(frozen=True)
class SubsetPlan(ABC):
    """Which sets of units are made absent, and what follows from the answers.

    A row knows its units by their place among those that may be absent. A row of more
    units begins with those of a row of fewer, so that one set serves both: each row
    sees of a set the units that it has.

    Attributes:
        never_perturb (Collection[int]): units that are always present.
    """

    never_perturb: Collection[int]

    def __post_init__(self) -> None:
        fixed = self.never_perturb
        if isinstance(fixed, str | bytes) or not isinstance(fixed, Collection):
            raise TypeError(
                complaint(
                    "never_perturb",
                    "must be numbers of units",
                    f"{shown(fixed)} came",
                    "Pass a list of them, for example [0].",
                )
            )
        remedy = "Source units count from 0, generated ones after them."
        for unit in fixed:
            whole_number("never_perturb", unit, remedy=remedy)

    @property
    def adds_up(self) -> bool:
        """Whether attributions of tokens add up to that of their unit."""
        return True

    def free(self, units: int) -> Numbers:
        """The units that may be absent, among the first ones, ascending."""
        fixed = [int(unit) for unit in self.never_perturb]
        return np.setdiff1d(np.arange(units), np.array(fixed, dtype=np.int64))

    @abstractmethod
    def check_target(self, attr_target: str) -> None:
        """Refuse a quantity that the plan has no use for.

        Raises:
            ValueError: if there is one.
        """

    @abstractmethod
    def absent_sets(
        self, counts: Sequence[int]
    ) -> tuple[list[AbsentSet], list[Numbers]]:
        """The sets that rows of some numbers of units need.

        Args:
            counts (Sequence[int]): number of units of each row.

        Returns:
            tuple: the sets, each ascending, and for each row the numbers of its sets.
        """

    @abstractmethod
    def fit(
        self, units: int, absent: Sequence[AbsentSet], values: Array, tokens: int
    ) -> Array:
        """Attributions of a row.

        Args:
            units (int): number of units.
            absent (Sequence[AbsentSet]): the row's sets, without units beyond it.
            values (numpy.ndarray): what Captum attributes, after each of them.
            tokens (int): number of tokens that are explained.

        Returns:
            numpy.ndarray: shape ``(units,)``, float64.
        """


@dataclass(frozen=True)
class _Scalarized(SubsetPlan):
    """A plan for one of MExGen's quantities.

    Attributes:
        scalarizer (str): what becomes of the sum of a unit's log-probabilities.
    """

    scalarizer: str

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("scalarizer", self.scalarizer, _SCALARIZERS)

    @property
    def adds_up(self) -> bool:
        """Whether attributions of tokens add up to that of their unit."""
        return self.scalarizer == "sum"

    def check_target(self, attr_target: str) -> None:
        """Refuse to make another quantity of what is no log-probability.

        Raises:
            ValueError: if that is asked for.
        """
        if attr_target != "log_prob" and self.scalarizer != "sum":
            raise ValueError(
                complaint(
                    "scalarizer",
                    "must be 'sum' where the attributed quantity is no log-probability",
                    f"{self.scalarizer!r} came with attr_target={attr_target!r}",
                    "Use attr_target='log_prob', or leave the scalarizer out.",
                )
            )

    def scalars(self, values: Array, tokens: int) -> Array:
        """The quantity that is attributed, from what Captum gives."""
        if self.scalarizer in ("mean", "geometric_mean"):
            values = values / tokens
        if self.scalarizer in ("geometric_mean", "product"):
            values = np.exp(values)
        return values


# --- what the three methods share ----------------------------------------------------


class SubsetMethod(Lime):
    """A method that asks for what remains when sets of units are absent.

    It asks the forward function alone, about indicators of features, and so takes any
    input and a remote model. ``LLMAttribution`` takes it.

    Args:
        forward_func: a model, as Captum's perturbation methods take it.
    """

    capability: ClassVar[Capability]
    plan_type: ClassVar[type[SubsetPlan]]
    fewest_units: ClassVar[int] = 1

    def __init__(self, forward_func: Any) -> None:
        # Lime's own constructor wants an interpretable model.
        PerturbationAttribution.__init__(self, forward_func)

    def plan(self, options: Mapping[str, Any]) -> SubsetPlan:
        """The plan for some arguments of ``attribute``; the rest have their defaults.

        Args:
            options (Mapping): names and values; others than the plan's are ignored.

        Raises:
            TypeError: if a value is of the wrong kind.
            ValueError: if it is out of range, or of no use for what is attributed.
        """
        parameters = inspect.signature(self.attribute).parameters.values()
        chosen = {
            parameter.name: options.get(parameter.name, parameter.default)
            for parameter in parameters
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        plan = self.plan_type(**chosen)
        asked = getattr(self.forward_func, "__self__", None)
        plan.check_target(getattr(asked, "attr_target", "log_prob"))
        return plan

    def _attributed(
        self, inputs: Tensor, additional_forward_args: Any, **options: Any
    ) -> Tensor:
        """One row, shape ``(1, features)``, float64."""
        plan = self.plan(options)
        score = _scoring(self.forward_func)
        features = inputs.shape[1]
        free = plan.free(features)
        found = torch.zeros((1, features), dtype=torch.float64)
        if len(free):
            sets, (numbers,) = plan.absent_sets([len(free)])
            absent = [sets[number] for number in numbers]
            known = {}
            for one in dict.fromkeys(absent):
                present = torch.ones_like(inputs)
                present[:, free[list(one)]] = 0
                with torch.no_grad():
                    known[one] = score(present, additional_forward_args)
            values = np.array([known[one] for one in absent])
            tokens = len(additional_forward_args[1])
            row = plan.fit(len(free), absent, values, tokens)
            found[0, free] = torch.from_numpy(row)
        return found.to(inputs.device)


def _scoring(forward_func: Any) -> Callable[[Tensor, Any], float]:
    """What a forward function gives, before Captum's objects round its sum.

    A difference of two sums of float32 log-probabilities has lost digits.
    """
    asked = getattr(forward_func, "__self__", None)
    if not isinstance(asked, LLMAttribution) or asked.attr_target != "log_prob":
        return lambda present, arguments: float(forward_func(present, *arguments))
    by_token = copy.copy(asked)
    by_token.include_per_token_attr = True
    scores = MethodType(forward_func.__func__, by_token)

    def total(present: Tensor, arguments: Any) -> float:
        of_tokens = scores(present, *arguments).reshape(-1)[1:]
        return float(of_tokens.double().sum())

    return total


# --- C-LIME --------------------------------------------------------------------------


@dataclass(frozen=True)
class _CLimePlan(_Scalarized):
    oversampling: float
    max_units_replaced: int

    def __post_init__(self) -> None:
        super().__post_init__()
        ratio = self.oversampling
        if not isinstance(ratio, Real) or isinstance(ratio, bool) or not ratio > 0:
            raise ValueError(
                complaint(
                    "oversampling",
                    "must be a number of samples per unit, more than 0",
                    f"{shown(ratio)} came",
                    "Pass 10 for ten times as many samples as units.",
                )
            )
        _check_most(self.max_units_replaced, minimum=1)

    def _shares(self, units: int) -> Iterator[tuple[int, int, int]]:
        """Size of the sets, how many there are, and how many of them are taken."""
        left = math.ceil(self.oversampling * units)
        most = self.max_units_replaced
        yield 0, 1, 1
        for size in range(1, min(most, units) + 1):
            there = math.comb(units, size)
            taken = min(there, round(left / (most + 1 - size)))
            if taken:
                yield size, there, taken
            left -= taken
            if left <= 0:
                return

    def absent_sets(
        self, counts: Sequence[int]
    ) -> tuple[list[AbsentSet], list[Numbers]]:
        """Sets of few units: all of a size, or a random choice that rows share."""
        shares = [list(self._shares(units)) for units in counts]
        most = max(counts)
        sets: list[AbsentSet] = []
        rows: list[list[Numbers]] = [[] for _ in counts]
        for size in range(self.max_units_replaced + 1):
            asked = [
                (row, there, taken)
                for row, of_row in enumerate(shares)
                for own, there, taken in of_row
                if own == size
            ]
            # Those of fewer units are the first ranks, so that one order serves all.
            order = None
            if any(there > taken for _, there, taken in asked):
                order = _random_order(math.comb(most, size), size)
            ranks = [
                np.arange(there)
                if order is None or there == taken
                else order[order < there][:taken]
                for _, there, taken in asked
            ]
            if not ranks:
                continue
            distinct = np.unique(np.concatenate(ranks))
            for (row, _, _), chosen in zip(asked, ranks, strict=True):
                rows[row].append(np.searchsorted(distinct, chosen) + len(sets))
            sets.extend(map(tuple, _unranked(distinct, size, most).tolist()))
        return sets, [np.concatenate(numbers) for numbers in rows]

    def fit(
        self, units: int, absent: Sequence[AbsentSet], values: Array, tokens: int
    ) -> Array:
        """Coefficients of a linear model in which sizes of sets weigh the same."""
        sizes = np.array([len(one) for one in absent])
        weights = 1.0 / np.bincount(sizes)[sizes]
        weights /= weights.sum()
        columns = np.array([unit for one in absent for unit in one], dtype=np.int64)
        # Few samples may leave out some units, and not tell others apart.
        sampled, columns = np.unique(columns, return_inverse=True)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        replaced = csr_array(
            (np.ones(len(columns)), columns, ends), shape=(len(absent), len(sampled))
        )
        # The whole text comes first. Where nothing changes, nothing is left to fit.
        scalars = self.scalars(values, tokens)
        lost = scalars[0] - scalars
        means = replaced.T @ weights
        weighted = csr_array(replaced.multiply(weights[:, None]))
        gram = (replaced.T @ weighted).toarray() - np.outer(means, means)
        right = weighted.T @ (lost - weights @ lost)
        found = np.zeros(units)
        if np.count_nonzero(sizes == 1) == len(sampled):
            # With each unit absent alone the matrix is positive definite.
            found[sampled] = solve(gram, right, assume_a="pos")
        else:
            found[sampled] = np.linalg.lstsq(gram, right, rcond=1e-10)[0]
        return found


def _check_most(number: int, minimum: int) -> None:
    remedy = "Pass the number of units that may be absent at once, for example 2."
    whole_number("max_units_replaced", number, minimum=minimum, remedy=remedy)


def _random_order(count: int, size: int) -> Numbers:
    if count > _MOST_SETS:
        raise ValueError(
            complaint(
                "max_units_replaced",
                f"must leave at most {_MOST_SETS} sets of a size to choose from",
                f"there are {count} sets of {size} units",
                "Pass a smaller number, or use larger units.",
            )
        )
    order: Numbers = torch.randperm(count).numpy()
    return order


def _unranked(ranks: Numbers, size: int, units: int) -> Numbers:
    """Sets of a size by their rank in colexicographic order, ``(ranks, size)``.

    Example:
        >>> _unranked(np.arange(4), 2, 4).tolist()
        [[0, 1], [0, 2], [1, 2], [0, 3]]
    """
    members = np.zeros((len(ranks), size), dtype=np.int64)
    left = ranks.copy()
    for place in reversed(range(size)):
        before = np.array([math.comb(unit, place + 1) for unit in range(units)])
        members[:, place] = np.searchsorted(before, left, side="right") - 1
        left -= before[members[:, place]]
    return members


class CLime(SubsetMethod):
    """Coefficients of a linear model, fitted to texts with few units absent.

    The samples are the whole text, each unit absent alone, and sets of up to
    ``max_units_replaced`` units: all of a size, or as many as are left of
    ``oversampling`` samples per unit, drawn without replacement. The sizes of sets get
    the same total weight, and the squared error of a linear model with an intercept is
    minimised. A unit's attribution is what it adds to the model by being present.

    ``LLMAttribution`` takes it, with any input.

    Args:
        forward_func: a model, as Captum's perturbation methods take it.

    Source: C-LIME in Monteiro Paes et al. (2024), :cite:p:`paes2024mexgen`.

    Example:
        >>> from captum.attr import LLMAttribution, TextTokenInput
        >>> from captum_cage import GraphContextAttribution
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> cage = GraphContextAttribution(LLMAttribution(CLime(model), tokenizer))
        >>> inp = TextTokenInput("Ana has 3 pens.", tokenizer)
        >>> cage.attribute(inp, " Mia", never_perturb=[4]).seq_attr[4]
        tensor(0., dtype=torch.float64)
    """

    capability: ClassVar[Capability] = Capability(
        name="c-lime",
        summary="linear model of the text with one or two units replaced",
        source="Monteiro Paes et al. (2024), arXiv:2403.14459",
        wrapper="perturbation",
        cost="about 14 * (P + G) passes",
        tokens_only=False,
        remote=True,
        random=True,
        probabilities=True,
    )
    plan_type = _CLimePlan

    def attribute(
        self,
        inputs: Tensor,
        additional_forward_args: Any = None,
        *,
        oversampling: float = 10,
        max_units_replaced: int = 2,
        never_perturb: Collection[int] = (),
        scalarizer: str = "sum",
    ) -> Tensor:
        """One row, as ``LLMAttribution`` asks for it.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            additional_forward_args: the input and the target ids come first.
            oversampling (float, optional): samples per unit. Default: ``10``
            max_units_replaced (int, optional): most units that are absent at once.
                Default: ``2``
            never_perturb (Collection[int], optional): units that are always present
                and get 0: source units come first, then generated ones. Default: none
            scalarizer (str, optional): what is attributed: ``"sum"`` of the
                log-probabilities of a unit's tokens, their ``"mean"``, the
                ``"geometric_mean"`` of the probabilities, or their ``"product"``. With
                ``attr_target="prob"`` it must be ``"sum"``, which then stands for
                Captum's probability. Default: ``"sum"``

        Returns:
            Tensor: shape ``(1, features)``, float64.

        Raises:
            TypeError: if an argument is of the wrong kind.
            ValueError: if it is out of range, or there are too many sets of a size.
        """
        return self._attributed(
            inputs,
            additional_forward_args,
            oversampling=oversampling,
            max_units_replaced=max_units_replaced,
            never_perturb=never_perturb,
            scalarizer=scalarizer,
        )


# --- L-SHAP --------------------------------------------------------------------------


@dataclass(frozen=True)
class _LShapPlan(_Scalarized):
    neighbors: int
    max_units_replaced: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "Pass the number of units on either side, for example 2."
        whole_number("neighbors", self.neighbors, remedy=remedy)
        if self.max_units_replaced is not None:
            _check_most(self.max_units_replaced, minimum=0)

    def _games(self, units: int) -> Iterator[tuple[int, AbsentSet, float]]:
        """Each unit, each set of absent neighbours, and its weight."""
        for unit in range(units):
            first = max(0, unit - self.neighbors)
            near = [*range(first, unit)]
            near += range(unit + 1, min(units, unit + self.neighbors + 1))
            most = len(near)
            if self.max_units_replaced is not None:
                most = min(most, self.max_units_replaced)
            for size in range(most + 1):
                weight = 1.0 / (math.comb(len(near), size) * (most + 1))
                for absent in combinations(near, size):
                    yield unit, absent, weight

    def absent_sets(
        self, counts: Sequence[int]
    ) -> tuple[list[AbsentSet], list[Numbers]]:
        """Sets of neighbours, with and without the unit between them."""
        found: set[AbsentSet] = set()
        for unit, absent, _ in self._games(max(counts)):
            found.update((absent, _with(absent, unit)))
        # Those of a row of fewer units are the ones that it has all units of.
        sets = sorted(found, key=lambda one: one[::-1])
        lasts = [one[-1] if one else -1 for one in sets]
        return sets, [np.arange(np.searchsorted(lasts, units)) for units in counts]

    def fit(
        self, units: int, absent: Sequence[AbsentSet], values: Array, tokens: int
    ) -> Array:
        """What is lost with each unit, averaged over sets of absent neighbours."""
        scalars = self.scalars(values, tokens).tolist()
        known = dict(zip(absent, scalars, strict=True))
        found = np.zeros(units)
        for unit, others, weight in self._games(units):
            found[unit] += weight * (known[others] - known[_with(others, unit)])
        return found


def _with(absent: AbsentSet, unit: int) -> AbsentSet:
    return tuple(sorted((*absent, unit)))


class LShap(SubsetMethod):
    """Shapley values of each unit among its neighbours.

    ``phi_i = mean_k mean_(|S| = k) [v(S) - v(S + i)]``, with ``v(S)`` the value of the
    text without the units ``S``, for sets ``S`` of at most ``max_units_replaced`` of
    the ``neighbors`` units on either side of ``i``. With all such sets it is the exact
    Shapley value of ``i`` in the game of the unit and its neighbours. Units that are
    never absent are no neighbours. Where a unit has fewer neighbours than
    ``max_units_replaced``, the mean is over the sizes that there are; the authors' code
    divides by ``max_units_replaced + 1`` there, too.

    ``LLMAttribution`` takes it, with any input.

    Args:
        forward_func: a model, as Captum's perturbation methods take it.

    Source: L-SHAP in Monteiro Paes et al. (2024), :cite:p:`paes2024mexgen`, after Chen
    et al. (2019), :cite:p:`chen2019shapley`.

    Example:
        >>> from captum.attr import LLMAttribution, TextTokenInput
        >>> from captum_cage import GraphContextAttribution
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> cage = GraphContextAttribution(LLMAttribution(LShap(model), tokenizer))
        >>> inp = TextTokenInput("Ana has 3 pens.", tokenizer)
        >>> result = cage.attribute(inp, " Mia", neighbors=1, scalarizer="mean")
        >>> result.meta["strategy"]
        'fused'
    """

    capability: ClassVar[Capability] = Capability(
        name="l-shap",
        summary="Shapley values among two units on either side",
        source="Monteiro Paes et al. (2024), arXiv:2403.14459",
        wrapper="perturbation",
        cost="about 9 * (P + G) passes",
        tokens_only=False,
        remote=True,
        probabilities=True,
    )
    plan_type = _LShapPlan

    def attribute(
        self,
        inputs: Tensor,
        additional_forward_args: Any = None,
        *,
        neighbors: int = 2,
        max_units_replaced: int | None = 2,
        never_perturb: Collection[int] = (),
        scalarizer: str = "sum",
    ) -> Tensor:
        """One row, as ``LLMAttribution`` asks for it.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            additional_forward_args: the input and the target ids come first.
            neighbors (int, optional): number of units on either side. Default: ``2``
            max_units_replaced (int, optional): most neighbours that are absent at
                once; None for any number of them. Default: ``2``
            never_perturb (Collection[int], optional): units that are always present
                and get 0: source units come first, then generated ones. Default: none
            scalarizer (str, optional): as for :class:`CLime`. Default: ``"sum"``

        Returns:
            Tensor: shape ``(1, features)``, float64.

        Raises:
            TypeError: if an argument is of the wrong kind.
            ValueError: if it is out of range.
        """
        return self._attributed(
            inputs,
            additional_forward_args,
            neighbors=neighbors,
            max_units_replaced=max_units_replaced,
            never_perturb=never_perturb,
            scalarizer=scalarizer,
        )


# --- ContextCite ---------------------------------------------------------------------


@dataclass(frozen=True)
class _ContextCitePlan(SubsetPlan):
    n_samples: int
    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "Pass the number of ablations, for example 64."
        whole_number("n_samples", self.n_samples, minimum=1, remedy=remedy)
        alpha = self.alpha
        if not isinstance(alpha, Real) or isinstance(alpha, bool) or not alpha > 0:
            raise ValueError(
                complaint(
                    "alpha",
                    "must be the weight of the penalty, more than 0",
                    f"{shown(alpha)} came",
                    "Pass 0.01, as the authors do.",
                )
            )

    @property
    def adds_up(self) -> bool:
        """Whether attributions of tokens add up to that of their unit."""
        return False

    def check_target(self, attr_target: str) -> None:
        """Refuse what is no log-probability.

        Raises:
            ValueError: if it is none.
        """
        if attr_target != "log_prob":
            raise ValueError(
                complaint(
                    "attr_target",
                    "must be 'log_prob' for ContextCite, which attributes the logit of "
                    "the probability",
                    f"{attr_target!r} came",
                    "Leave it out.",
                )
            )

    def absent_sets(
        self, counts: Sequence[int]
    ) -> tuple[list[AbsentSet], list[Numbers]]:
        """Sets to which each unit belongs or not by a fair coin."""
        drawn = torch.randint(0, 2, (self.n_samples, max(counts))).numpy()
        sets = [tuple(np.flatnonzero(coins).tolist()) for coins in drawn]
        return sets, [np.arange(self.n_samples) for _ in counts]

    def fit(
        self, units: int, absent: Sequence[AbsentSet], values: Array, tokens: int
    ) -> Array:
        """Coefficients of a Lasso on whether units are present."""
        try:
            from sklearn.linear_model import Lasso  # noqa: PLC0415
        except ImportError as error:
            raise ImportError(
                "ContextCite needs a package that is not installed. Run: "
                "pip install captum-cage[sklearn]"
            ) from error
        for place in np.flatnonzero(~np.isfinite(values)):
            raise ValueError(
                complaint(
                    "ContextCite",
                    "needs finite log-probabilities",
                    f"{values[place]} came",
                    "Look for NaN or infinite weights, or use a wider number type.",
                )
            )
        present = np.ones((len(absent), units))
        for row, one in zip(present, absent, strict=True):
            row[list(one)] = 0.0
        spread = present.std(axis=0)
        spread[spread == 0.0] = 1.0
        scaled = (present - present.mean(axis=0)) / spread
        lasso = Lasso(alpha=self.alpha).fit(scaled, _logits(values) / tokens)
        found: Array = lasso.coef_ / spread * tokens
        return found


def _logits(log_probabilities: Array) -> Array:
    """Logits of probabilities, from their logarithms; finite for probability 1.

    Example:
        >>> _logits(np.log([0.5, 0.9, 1.0])).round(3)
        array([ 0.   ,  2.197, 16.636])
    """
    logs = np.minimum(log_probabilities, _CERTAIN)
    near = logs > -math.log(2.0)
    rest = np.empty_like(logs)
    rest[near] = np.log(-np.expm1(logs[near]))
    rest[~near] = np.log1p(-np.exp(logs[~near]))
    return logs - rest


class ContextCite(SubsetMethod):
    """Coefficients of a sparse linear model of the logit of a response's probability.

    In each of ``n_samples`` ablations every unit is present by a fair coin. A Lasso is
    fitted to ``log p - log(1 - p)``, divided by the number of tokens, on whether each
    unit is present, standardised; its coefficients are scaled back. A probability above
    ``1 - 2**-24`` counts as that.

    ``LLMAttribution`` takes it, with any input. A generated unit is a response.

    Args:
        forward_func: a model, as Captum's perturbation methods take it.

    Source: Cohen-Wang et al. (2024), :cite:p:`cohenwang2024contextcite`, section 4.

    Example:
        >>> from captum.attr import LLMAttribution, TextTokenInput
        >>> from captum_cage import GraphContextAttribution
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> cage = GraphContextAttribution(
        ...     LLMAttribution(ContextCite(model), tokenizer)
        ... )
        >>> inp = TextTokenInput("Ana has 3 pens.", tokenizer)
        >>> cage.attribute(inp, " Mia has", n_samples=16).graph.rows.shape
        (2, 7)
    """

    capability: ClassVar[Capability] = Capability(
        name="context-cite",
        summary="sparse linear model of the logit over random subsets",
        source="Cohen-Wang et al. (2024), arXiv:2409.00729",
        wrapper="perturbation",
        cost="n_samples passes",
        needs=("scikit-learn",),
        tokens_only=False,
        remote=True,
        random=True,
        counted="n_samples",
        extra="sklearn",
    )
    plan_type = _ContextCitePlan

    def attribute(
        self,
        inputs: Tensor,
        additional_forward_args: Any = None,
        *,
        n_samples: int = 64,
        alpha: float = 0.01,
        never_perturb: Collection[int] = (),
    ) -> Tensor:
        """One row, as ``LLMAttribution`` asks for it.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            additional_forward_args: the input and the target ids come first.
            n_samples (int, optional): number of ablations. Default: ``64``
            alpha (float, optional): weight of the Lasso's penalty. Default: ``0.01``
            never_perturb (Collection[int], optional): units that are always present
                and get 0: source units come first, then generated ones. Default: none

        Returns:
            Tensor: shape ``(1, features)``, float64.

        Raises:
            ImportError: if scikit-learn is not installed.
            TypeError: if an argument is of the wrong kind.
            ValueError: if it is out of range, or probabilities are attributed.
        """
        return self._attributed(
            inputs,
            additional_forward_args,
            n_samples=n_samples,
            alpha=alpha,
            never_perturb=never_perturb,
        )
