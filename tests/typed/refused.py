"""Programs that a strict type checker must refuse: `make types`.

Each wrong line names its error. A line that is taken after all has an ignore that
nothing needs, which strict checking reports.
"""

from __future__ import annotations

from collections.abc import Sequence

from captum.attr import FeatureAblation, LLMAttribution

from captum_cage import AttributionGraph, GraphContextAttribution, TokenIdsInput, Unit
from captum_cage.demo import load_demo, sample_problems
from captum_cage.engines import Engine, register_engine
from captum_cage.graph import Path
from captum_cage.methods import Capability, TokenMethod
from captum_cage.metrics import auroc
from captum_cage.task import RowTask

model, tokenizer = load_demo()
llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
cage = GraphContextAttribution(llm_attr)
inp = TokenIdsInput([1, 2, 3], tokenizer)
result = cage.attribute(inp, "text")

# Names that there are none of.
GraphContextAttribution(llm_attr, normalisation="positive")  # type: ignore[call-arg]
cage.attribute(inp, "text", strategy="quick")  # type: ignore[arg-type]
result.graph.marginal()  # type: ignore[attr-defined]

# Values of the wrong kind.
GraphContextAttribution(llm_attr, normalization="softmax")  # type: ignore[arg-type]
cage.attribute(inp, 5)  # type: ignore[arg-type]
cage.attribute(inp, "text", explain=0.5)  # type: ignore[arg-type]
cage.attribute(inp, "text", units=3)  # type: ignore[arg-type]
cage.attribute(inp, "text", foil="18")  # type: ignore[arg-type]
cage.attribute(inp, "text", tolerance="small")  # type: ignore[arg-type]
result.paths(source="Ana")  # type: ignore[arg-type]
result.by(2)  # type: ignore[arg-type]
AttributionGraph.from_rows([[1.0]], 1, "softmax")  # type: ignore[arg-type]
Unit("word", False, 4)  # type: ignore[arg-type]
sample_problems("one", seed=0)  # type: ignore[arg-type]
auroc([0.1, 0.9], gold=1)  # type: ignore[arg-type]

# Positions where a name is asked for, and the other way round.
result.to_html("page.html", "title")  # type: ignore[call-arg]
cage.attribute(inp, "text", "explain")  # type: ignore[call-arg]

# What comes back, taken for something else.
shares: list[float] = result.token_attr  # type: ignore[assignment]
paths: list[Path] = result.graph.best_paths([1.0], None)  # type: ignore[call-arg]
page: bytes = result.to_html()  # type: ignore[assignment]

# Values do not change.
result.graph.normalization = "signed"  # type: ignore[misc]
Path((1, 0), 0.5).weight = 1.0  # type: ignore[misc]


# Methods and engines of another form.
class Wrong(TokenMethod):
    """A method whose rows take other things."""

    capability = Capability(  # type: ignore[call-arg]
        name="wrong", summary="nothing", source="none"
    )

    def rows(self, text: str) -> list[float]:  # type: ignore[override]
        """No tensors."""
        return [float(len(text))]


@register_engine(Wrong)  # type: ignore[type-var]
def rows_without_steps(task: RowTask) -> list[list[float]]:
    """It must take steps."""
    return [[0.5] * task.width]


def rows(task: RowTask, steps: Sequence[int]) -> list[list[float]]:
    """As it should be."""
    return [[0.5] * task.width for _ in steps]


Engine(rows, unsuitable="never")  # type: ignore[arg-type]
register_engine("Wrong", rows)  # type: ignore[call-overload]
