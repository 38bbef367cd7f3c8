"""Programs of users, as a strict type checker must take them: `make types`.

tests/test_typing.py runs them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import FeatureAblation, LLMAttribution
from typing_extensions import assert_type

from captum_cage import (
    AttributionGraph,
    ChatTokenInput,
    GraphAttributionResult,
    GraphContextAttribution,
    TextPath,
    TokenIdsInput,
    Unit,
    register_engine,
)
from captum_cage.demo import Problem, load_demo, sample_problems
from captum_cage.engines import Engine
from captum_cage.graph import Parts
from captum_cage.methods import Capability, TokenMethod
from captum_cage.metrics import Estimate, auroc, estimate
from captum_cage.task import RowTask
from captum_cage.testing import EngineReport, check_engine


def explain_an_answer() -> None:
    """A result and what it is asked for."""
    model, tokenizer = load_demo()
    problem = sample_problems(1, seed=1, kind="two_questions")[0]
    assert_type(problem, Problem)
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    inp = TokenIdsInput(tokenizer(problem.prompt).input_ids, tokenizer)
    result = cage.attribute(
        inp, problem.completion, units="sentence", explain="The second answer"
    )
    assert_type(result, GraphAttributionResult)
    assert_type(result.seq_attr, torch.Tensor)
    assert_type(result.token_attr, torch.Tensor)
    assert_type(result.input_tokens, list[str])
    assert_type(result.leaked, float)
    assert_type(result.graph, AttributionGraph)
    assert_type(result.seq_attr_dict, dict[str, float])
    for path in result.paths(3):
        assert_type(path, TextPath)
        assert_type(path.texts, tuple[str, ...])
        assert_type(path.share, float)
    assert_type([unit.text for unit in result.units if not unit.generated], list[str])
    for span in (-1, slice(0, 2), (0, 2), "first", re.compile("second")):
        assert_type(result.explaining(span), GraphAttributionResult)


def ask_a_chat() -> None:
    """Messages are mappings; units are chosen for each side."""
    model, tokenizer = load_demo()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [{"role": "user", "content": sample_problems(1, seed=1)[0].prompt}]
    inp = ChatTokenInput(messages, tokenizer, features="all")
    cage = GraphContextAttribution(
        LLMAttribution(FeatureAblation(model), tokenizer), normalization="absolute"
    )
    result = cage.attribute(
        inp,
        units={"source": "sentence", "generated": "word"},
        strategy="loop",
        gen_args={"max_new_tokens": 3, "do_sample": False},
    )
    assert_type(result, GraphAttributionResult)


def solve_rows_of_my_own() -> None:
    """A graph needs no model."""
    graph = AttributionGraph.from_rows(
        [[1.0, 3.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]], sources=2
    )
    assert_type(graph.marginals(), npt.NDArray[np.float64])
    assert_type(graph.explain([0.0, 1.0]), npt.NDArray[np.float64])
    assert_type(graph.explain_parts([0.0, 1.0]), Parts)
    assert_type(graph.unresolved([0.0, 1.0]), float)
    assert_type(Unit("word", generated=False, span=(0, 4)).span, tuple[int, int] | None)


def measure() -> None:
    """Metrics take arrays and lists."""
    assert_type(auroc([0.1, 0.9, 0.3], gold=[1]), float)
    assert_type(estimate(np.array([0.1, 0.2, 0.4])), Estimate)


class Nearest(TokenMethod):
    """A base method: each token owes all to the one before it."""

    capability = Capability(
        name="nearest",
        summary="the token before",
        source="an example",
        wrapper="gradient",
        cost="none",
    )

    def rows(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One for the position that each target follows."""
        first = len(ids) - len(targets)
        return torch.eye(len(ids))[first:]


def give_a_method_an_engine() -> None:
    """A function of a task and steps, an `Engine`, or a decorator."""

    @register_engine(Nearest)
    def rows(task: RowTask, steps: Sequence[int]) -> Iterator[npt.NDArray[np.float64]]:
        for step in steps:
            row = np.zeros(task.width)
            row[len(task.sources) + step - 1] = 1.0
            yield row

    kept: Callable[[RowTask, list[int]], Iterator[npt.NDArray[np.float64]]] = rows
    assert_type(kept is rows, bool)


def declare_an_engine() -> None:
    """An engine that says what it cannot do."""

    def rows(task: RowTask, steps: Sequence[int]) -> Iterable[list[float]]:
        return ([0.5] * task.width for _ in steps)

    def unsuitable(task: RowTask) -> str | None:
        return None if task.by_token else "only tokens"

    engine = Engine(rows, unsuitable=unsuitable, by_row=True)
    register_engine(Nearest, engine)


def prove_an_engine() -> None:
    """As a test of a library that registers one."""
    model, tokenizer = load_demo()
    problem = sample_problems(1, seed=1)[0]
    inp = TokenIdsInput(tokenizer(problem.prompt).input_ids, tokenizer)
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    report = check_engine(llm_attr, inp, [5, 6], units="token")
    assert_type(report, EngineReport)
    assert_type(report.difference, float)
