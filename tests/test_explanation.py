"""What views read of a result is there."""

from inspect import getmembers, isfunction

from captum_cage import AttributionGraph, GraphAttributionResult, Unit
from captum_cage.explanation import Explanation


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
