"""What the views of a result read of it: pages, plots and exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from captum_cage.foils import Foil
from captum_cage.graph import AttributionGraph
from captum_cage.units import Granularity, Unit, Units

__all__ = ["Explanation"]


class Explanation(Protocol):
    """A result as its views see it; `GraphAttributionResult` is one.

    The views stand below the result, whose methods call them, so they know it by this
    form only. What each attribute means stands there.
    """

    @property
    def graph(self) -> AttributionGraph:
        """The graph."""

    @property
    def units(self) -> Sequence[Unit]:
        """Its units in reading order."""

    @property
    def explained(self) -> Sequence[int]:
        """Positions of the explained generated units."""

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """Weight of each generated unit, shape ``(G,)``."""

    @property
    def hops(self) -> int | None:
        """Number of passes after which paths are cut."""

    @property
    def source_text(self) -> str:
        """Text of the prompt."""

    @property
    def generated_text(self) -> str:
        """Text that follows it."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """How the result was made."""

    @property
    def foils(self) -> Sequence[Foil]:
        """What rows are contrasted with."""

    def regrouped(self, units: Granularity) -> tuple[Units, Units]:
        """Larger source units and larger generated units, over the present ones."""
