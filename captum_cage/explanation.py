"""What plots, pages and exports read of an explanation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from captum.attr import LLMAttributionResult
from torch import Tensor

from captum_cage.foils import Foil
from captum_cage.graph import AttributionGraph, Path
from captum_cage.thinking import Thinking
from captum_cage.units import Granularity, Unit, Units

__all__ = ["Explanation", "along", "explained_texts"]


class Explanation(Protocol):
    """A `GraphAttributionResult`, as those see it that stand below it.

    Its attributes say what they are. ``P`` source units, ``G`` generated units.
    """

    @property
    def graph(self) -> AttributionGraph:
        """The graph, sources and generated units."""

    @property
    def units(self) -> tuple[Unit, ...]:
        """Its units in reading order."""

    @property
    def explained(self) -> tuple[int, ...]:
        """Positions of the explained generated units."""

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """1 for each explained unit, else 0; shape ``(G,)``."""

    @property
    def source_text(self) -> str:
        """Text of the prompt."""

    @property
    def generated_text(self) -> str:
        """Text that follows it."""

    @property
    def breaks(self) -> tuple[int, ...]:
        """Characters of the prompt that no unit reaches across."""

    @property
    def generated_breaks(self) -> tuple[int, ...]:
        """The same of the text that follows it."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """How the explanation was made, JSON values."""

    @property
    def hops(self) -> int | None:
        """Number of passes after which paths are cut."""

    @property
    def thinking(self) -> Thinking:
        """Where thoughts and answer stand."""

    @property
    def foils(self) -> tuple[Foil, ...]:
        """What rows are contrasted with."""

    @property
    def drawn(self) -> Any:
        """The `DrawnRows` of a random method, or None."""

    @property
    def output_probs(self) -> Tensor | None:
        """Probability of each generated unit, ``(G,)``."""

    @property
    def input_tokens(self) -> list[str]:
        """Text of the source units."""

    @property
    def output_tokens(self) -> list[str]:
        """Text of the generated units."""

    @property
    def seq_attr(self) -> Tensor:
        """Mass of the explained units at each source, ``(P,)``, float64."""

    @property
    def token_attr(self) -> Tensor:
        """Marginals of every generated unit, ``(G, P)``, float64."""

    @property
    def direct(self) -> LLMAttributionResult:
        """The explained units' own rows, without the graph."""

    @property
    def step_attr(self) -> Tensor:
        """Mass that passes through each generated unit, ``(G,)``, float64."""

    @property
    def positive_attr(self) -> Tensor:
        """Mass of the paths that argue for them, ``(P,)``, float64."""

    @property
    def negative_attr(self) -> Tensor:
        """Mass of the paths that argue against them, ``(P,)``, float64."""

    @property
    def leaked(self) -> float:
        """Mass that ends in rows without mass."""

    @property
    def unresolved(self) -> float:
        """Mass that was left open."""

    def paths(self, k: int = 5, source: int | None = None) -> Sequence[Path]:
        """The ``k`` heaviest paths, to any source or to one."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one file, which loads without the model."""

    def regrouped(self, units: Granularity) -> tuple[Units, Units]:
        """Larger source units and larger generated units, over the present ones."""


def explained_texts(explanation: Explanation) -> list[str]:
    """The explained text: each stretch of units that stand side by side.

    What stands between two stretches is not explained: other generated units or, in a
    trace, text from outside.
    """
    texts: list[str] = []
    begin = before = -2  # a character, and a unit
    for place in explanation.graph.generated_units[list(explanation.explained)]:
        unit = explanation.units[place]
        if unit.span is None:
            texts.append(unit.text)
            continue
        start, stop = unit.span
        if place == before + 1:
            texts.pop()
        else:
            begin = start
        texts.append(explanation.generated_text[begin:stop])
        before = place
    return texts


def along(hops: int | None) -> str:
    """Along which paths an explanation goes, in words.

    Example:
        >>> along(None), along(1)
        ('along all paths', 'along paths of at most 1 hop')
    """
    if hops is None:
        return "along all paths"
    return f"along paths of at most {hops} hop{'' if hops == 1 else 's'}"
