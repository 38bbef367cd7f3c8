"""Attribution graphs drawn at random, from a seed."""

from __future__ import annotations

from numbers import Real
from typing import get_args

import numpy as np

from captum_cage._checks import complaint, one_of, shown, whole_number
from captum_cage.graph import AttributionGraph, Normalization

__all__ = ["random_graph"]


def random_graph(
    n_sources: int = 4,
    n_generated: int = 6,
    *,
    density: float = 1.0,
    signed: bool = False,
    leak: float = 0.0,
    mixed: bool = False,
    normalization: Normalization | None = None,
    seed: int = 0,
) -> AttributionGraph:
    """An attribution graph whose raw rows are drawn at random.

    Entries are uniform in (0, 1), or in (-1, 1). Every row that does not leak has mass.

    Args:
        n_sources (int, optional): number ``P`` of sources, 1 or more. Default: ``4``
        n_generated (int, optional): number ``G`` of generated units. Default: ``6``
        density (float, optional): probability of an entry before the row's own unit to
            be other than zero, in [0, 1]. Default: ``1.0``
        signed (bool, optional): whether entries may be negative. Default: ``False``
        leak (float, optional): probability of a row to be without mass, in [0, 1].
            Default: ``0.0``
        mixed (bool, optional): whether sources also stand after generated units, as
            tool results do; the first unit is one in any case. Default: ``False``
        normalization (str, optional): ``"positive"``, ``"absolute"`` or ``"signed"``.
            Default: ``"signed"`` where entries may be negative, else ``"positive"``
        seed (int, optional): equal arguments give equal graphs. Default: ``0``

    Returns:
        AttributionGraph: with dense rows, shape ``(G, P + G)``.

    Raises:
        TypeError: if a number is of another kind.
        ValueError: if one is out of range, or there is no such normalisation.

    Example:
        >>> graph = random_graph(3, 2, leak=0.5, seed=2)
        >>> graph
        AttributionGraph(n_sources=3, n_generated=2, normalization='positive')
        >>> graph.rows.shape, graph.leak.shape
        ((2, 5), (2,))
    """
    sources = whole_number("n_sources", n_sources, minimum=1, remedy="Pass 1 or more.")
    steps = whole_number("n_generated", n_generated, remedy="Pass 0 or more.")
    number = whole_number("seed", seed, remedy="Pass a number of 0 or more.")
    for name, value in (("density", density), ("leak", leak)):
        _check_probability(name, value)
    kind: Normalization = "signed" if signed else "positive"
    if normalization is not None:
        one_of("normalization", normalization, get_args(Normalization))
        kind = normalization
    draw = np.random.default_rng(number)
    units = sources + steps
    mask = np.arange(units) < sources
    if mixed:
        mask[1:] = draw.permutation(mask[1:])
    before = np.arange(units) < np.flatnonzero(~mask)[:, None]
    # Not zero, so that density says how many are.
    rows = 1.0 - draw.random((steps, units))
    if signed:
        rows *= draw.choice([-1.0, 1.0], size=rows.shape)
    kept = draw.random(rows.shape) < density
    # Each row keeps a positive entry, or it would leak by itself.
    one = draw.integers(0, before.sum(axis=1), size=steps)
    place = (np.arange(steps), one)
    kept[place] = True
    rows[place] = np.abs(rows[place])
    rows *= before & kept
    rows[draw.random(steps) < leak] = 0.0
    return AttributionGraph.from_rows(rows, mask, kind)


def _check_probability(name: str, value: object) -> None:
    must, remedy = "must be a probability in [0, 1]", "Pass for example 0.5."
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(complaint(name, must, f"{shown(value)} came", remedy))
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(complaint(name, must, f"{value} came", remedy))
