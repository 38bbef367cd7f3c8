"""Whether a metric tells the truth from what is not, where the truth is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Protocol

import numpy as np
from captum.attr import InterpretableInput, TextTokenInput
from tqdm.auto import tqdm

from captum_cage._checks import complaint, shown, whole_number
from captum_cage.metrics.datasets import Example
from captum_cage.metrics.scores import by_position
from captum_cage.metrics.statistics import Comparison, Estimate, compare_all, estimate
from captum_cage.result import GraphAttributionResult

__all__ = ["Calibration", "calibrate_metric", "untrusted"]

TRUTH = "truth"
OTHERS = ("random", "sequence", "nearest")
"""What the known truth is compared with."""


class _Wrapper(Protocol):
    llm_attr: Any

    def attribute(
        self, inp: InterpretableInput, target: Any, **options: Any
    ) -> GraphAttributionResult:
        """The explanation of a text."""


@dataclass(frozen=True)
class Calibration:
    """How metrics rank the known truth against what is known to be worse.

    Attributes:
        means (Mapping): for each metric and order, its mean over the examples.
        comparisons (Mapping): for each metric, the truth against each other order, pair
            by pair, corrected for their number.
        higher_is_better (Mapping): which way is better, for each metric.
        removal (str): how sources were taken away.
        examples (int): number of examples.
        kinds (tuple[str, ...]): of which kinds they were.
    """

    means: Mapping[str, Mapping[str, Estimate]]
    comparisons: Mapping[str, Mapping[str, Comparison]]
    higher_is_better: Mapping[str, bool]
    removal: str
    examples: int
    kinds: tuple[str, ...]

    def lost(self, metric: str) -> tuple[str, ...]:
        """Orders that the truth does not beat under a metric.

        Beaten is what scores worse on more examples than better, with a 95% interval of
        the mean difference that excludes zero.
        """
        return tuple(
            other
            for other, found in self.comparisons[metric].items()
            if not found.is_better
        )

    def verdict(self, metric: str) -> str:
        """Why a metric is not to be trusted; empty where the truth wins."""
        lost = self.lost(metric) if metric in self.comparisons else ()
        if not lost:
            return ""
        details = [
            f"{other} ({self.comparisons[metric][other].difference})" for other in lost
        ]
        return (
            f"on {self.examples} examples of known truth ({', '.join(self.kinds)}), "
            f"the truth does not win against {', '.join(details)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in it as JSON values."""
        return {
            "removal": self.removal,
            "examples": self.examples,
            "kinds": list(self.kinds),
            "metrics": {
                metric: {
                    "untrusted": self.verdict(metric),
                    "lost": list(self.lost(metric)),
                    "higher_is_better": self.higher_is_better[metric],
                    "means": {
                        order: [found.mean, found.low, found.high]
                        for order, found in means.items()
                    },
                    "differences": {
                        other: [
                            found.difference.mean,
                            found.difference.low,
                            found.difference.high,
                        ]
                        for other, found in self.comparisons[metric].items()
                    },
                }
                for metric, means in self.means.items()
            },
        }

    def to_markdown(self) -> str:
        """A row for each metric: means of all orders, and whether the truth wins."""
        orders = list(next(iter(self.means.values())))
        lines = [
            f"| metric | {' | '.join(orders)} | does the truth win? |",
            "|---|" + "---:|" * len(orders) + "---|",
        ]
        for metric, means in self.means.items():
            lost = self.lost(metric)
            verdict = "yes" if not lost else f"no: not against {', '.join(lost)} †"
            cells = " | ".join(str(means[order]) for order in orders)
            lines.append(f"| {metric} | {cells} | {verdict} |")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()


def calibrate_metric(
    cage: _Wrapper,
    examples: Iterable[Example],
    metrics: str | Sequence[str] | None = None,
    *,
    units: Any = "sentence",
    as_input: Callable[[Example], InterpretableInput] | None = None,
    gen_args: Mapping[str, Any] | None = None,
    attribute_args: Mapping[str, Any] | None = None,
    resamples: int = 9999,
    seed: int = 0,
    show_progress: bool = False,
    **options: Any,
) -> Calibration:
    """How metrics rank the true order of sources, which is known.

    For each example the sources that matter come first in the true order, in any order
    among themselves. It is compared with random orders, with the attribution of the
    whole response (``"sequence"``, the rows of the base method summed), and with the
    nearest sources first. A metric under which the truth does not win against all of
    them is not to be trusted on texts of this kind.

    Args:
        cage (GraphContextAttribution): explains the examples, for ``"sequence"``.
        examples (Iterable[datasets.Example]): with known truth, the same kind of text
            that is to be judged. At least two.
        metrics (str or Sequence[str], optional): as in ``result.evaluate``.
            Default: its default
        units (optional): as in ``cage.attribute``. Default: ``"sentence"``
        as_input (Callable, optional): the input for an example. Default: its prompt as
            a ``TextTokenInput``
        gen_args (Mapping, optional): for the model's ``generate``, where an example
            has no fixed text, and where texts are written again. Default: None
        attribute_args (Mapping, optional): more for ``cage.attribute``, such as
            ``n_samples``. Default: None
        resamples (int, optional): of the bootstrap. Default: ``9999``
        seed (int, optional): of random orders and of the bootstrap. Default: ``0``
        show_progress (bool, optional): show a progress bar. Default: ``False``
        **options: ``removal`` and others, see
            :class:`captum_cage.metrics.Evaluator`.

    Returns:
        Calibration: means, paired comparisons, and a verdict for each metric.

    Raises:
        TypeError: if ``cage`` is no ``GraphContextAttribution``.
        ValueError: if an example has no known truth, or there are fewer than two.
    """
    listed = list(examples)
    _check(listed)
    whole_number("seed", seed, remedy="Pass a whole number.")
    if not callable(getattr(cage, "attribute", None)) or not hasattr(cage, "llm_attr"):
        raise TypeError(
            complaint(
                "cage",
                "must be a GraphContextAttribution",
                f"{shown(cage)} came",
                "Pass GraphContextAttribution(llm_attr).",
            )
        )
    found: dict[str, dict[str, list[float]]] = {}
    better: dict[str, bool] = {}
    removal = ""
    for number, example in enumerate(
        tqdm(listed, disable=not show_progress, desc="calibrating")
    ):
        inp = (
            TextTokenInput(example.prompt, cage.llm_attr.tokenizer)
            if as_input is None
            else as_input(example)
        )
        arguments: dict[str, Any] = {"units": units, **(attribute_args or {})}
        if example.completion is None:
            arguments["gen_args"] = gen_args
        result = cage.attribute(inp, example.completion, **arguments)
        result = result.explaining(example.explained_in(result.generated_text))
        gold = example.gold_in(result)
        tested = result.evaluator(
            sources=example.sources_in(result),
            statement=example.statement,
            seed=seed + number,
            gen_args=gen_args,
            **options,
        )
        chosen = example.sources_in(result)
        truth = np.isin(np.arange(result.graph.n_sources), gold).astype(np.float64)
        sequence = result.sequence.seq_attr.numpy()
        if chosen is not None:
            truth, sequence = truth[chosen], sequence[chosen]
        orders = {
            TRUTH: truth,
            "sequence": sequence,
            "nearest": by_position(truth),
        }
        measured = tested.evaluate(orders, metrics)
        removal = measured.removal
        for metric, info in measured.metrics.items():
            better[metric] = info.higher_is_better
            scores = found.setdefault(metric, {})
            for order, own in measured.scores.items():
                scores.setdefault(order, []).append(own[metric].value)
    return Calibration(
        {
            metric: {
                order: estimate(values, resamples=resamples, seed=seed)
                for order, values in scores.items()
            }
            for metric, scores in found.items()
        },
        {
            metric: compare_all(
                scores[TRUTH],
                {other: scores[other] for other in OTHERS},
                higher_is_better=better[metric],
                resamples=resamples,
                seed=seed,
            )
            for metric, scores in found.items()
        },
        better,
        removal,
        len(listed),
        tuple(dict.fromkeys(example.kind for example in listed)),
    )


def _check(examples: Sequence[Example]) -> None:
    if len(examples) < 2:
        raise ValueError(
            complaint(
                "examples",
                "must be several, since single ones say little",
                f"{len(examples)} came",
                "Pass fifty or more.",
            )
        )
    for number, example in enumerate(examples):
        if not example.gold:
            raise ValueError(
                complaint(
                    f"examples[{number}]",
                    "must say which sources matter",
                    "it has no gold",
                    "Pass examples whose truth is known, such as those of "
                    "captum_cage.demo.examples.",
                )
            )


@cache
def _shipped() -> Mapping[tuple[str, str], str]:
    """Verdicts that were measured on the demo model's problems, with the package."""
    source = files("captum_cage.metrics").joinpath("calibration.json")
    if not source.is_file():
        return {}
    return {
        (metric, entry["removal"]): found["untrusted"]
        for entry in json.loads(source.read_text(encoding="utf-8"))
        for metric, found in entry["metrics"].items()
    }


def untrusted(metric: str, removal: str) -> str:
    """Why a metric is not to be trusted, as measured on the demo model's problems.

    Empty where the truth wins, or where that was not measured.
    """
    found = _shipped().get((metric, removal), "")
    return found and f"with the demo model, {found}"
