"""What the views of a result read of it is what a result has."""

from captum_cage import AttributionGraph, GraphAttributionResult, Unit
from captum_cage.explanation import Explanation


def test_a_result_is_an_explanation():
    """It has all that the form names."""
    result = GraphAttributionResult(
        AttributionGraph.from_rows([[1.0, 0.0]], 1),
        [Unit("It is.", False, (0, 6)), Unit("Yes.", True, (0, 4))],
        [0],
        source_text="It is.",
        generated_text="Yes.",
    )
    named = [name for name in vars(Explanation) if not name.startswith("_")]
    assert {"graph", "units", "explained", "weights", "regrouped"} <= set(named)
    assert [name for name in named if not hasattr(result, name)] == []
