"""What views read of a result is there."""

from inspect import getmembers, isfunction

import numpy as np
import pytest

from captum_cage import AttributionGraph, GraphAttributionResult, Unit
from captum_cage.explanation import Explanation, explained_texts


def test_a_result_is_an_explanation():
    """It has every attribute and method that the protocol names."""
    graph = AttributionGraph.from_rows([[1, 0]], 1)
    units = [Unit("a", False, None), Unit("b", True, None)]
    result = GraphAttributionResult(
        graph, units, [0], source_text="", generated_text=""
    )
    names = {
        name
        for name, member in getmembers(Explanation)
        if not name.startswith("_")
        and (isfunction(member) or isinstance(member, property))
    }
    assert {"graph", "units", "seq_attr", "paths", "save"} <= names
    assert all(hasattr(result, name) for name in names)


def result_of(texts, spans, mask, explained):
    """A result of the source "So." and these units, some of them from outside."""
    units = [Unit("So.", False, (0, 3))]
    for text, span, outside in zip(texts, spans, mask, strict=True):
        units.append(Unit(text, not outside, span))
    sources = [not unit.generated for unit in units]
    rows = np.tril(np.ones((len(units), len(units))), -1)[~np.array(sources)]
    return GraphAttributionResult(
        AttributionGraph.from_rows(rows, sources),
        units,
        explained,
        source_text="So.",
        generated_text="It is. Told. Was it? No.",
    )


SPANS = [(0, 6), (7, 12), (13, 20), (21, 24)]
TEXTS = ["It is.", "Told.", "Was it?", "No."]


@pytest.mark.parametrize(
    ("mask", "explained", "expected"),
    [
        ([0, 0, 0, 0], [1], ["Told."]),
        ([0, 0, 0, 0], [1, 2], ["Told. Was it?"]),
        ([0, 0, 0, 0], [0, 2, 3], ["It is.", "Was it? No."]),
        ([0, 1, 0, 0], [0, 1], ["It is.", "Was it?"]),
        ([0, 1, 0, 0], [0, 1, 2], ["It is.", "Was it? No."]),
    ],
)
def test_explained_texts_are_stretches_of_neighbours(mask, explained, expected):
    """What stands between two of them is not explained."""
    assert explained_texts(result_of(TEXTS, SPANS, mask, explained)) == expected


def test_units_without_a_place_are_told_by_their_text():
    """Each on its own."""
    spans = [(0, 6), None, None, (21, 24)]
    result = result_of(TEXTS, spans, [0, 0, 0, 0], [0, 1, 2, 3])
    assert explained_texts(result) == TEXTS
