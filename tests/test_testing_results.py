"""The laws of results: what the package makes keeps them, what was changed is told."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

from captum_cage.graph import AttributionGraph
from captum_cage.result import GraphAttributionResult
from captum_cage.testing import (
    RESULT_LAWS,
    LawsBroken,
    check_result,
    random_graph,
)
from captum_cage.testing.strategies import graphs
from captum_cage.units import Unit


def result_of(graph, explained=None, **more):
    """A result of letters."""
    texts = [chr(97 + number) for number in range(graph.n_units)]
    generated = (~graph.sources).tolist()
    first = generated.index(True)
    units = []
    for place, (text, written) in enumerate(zip(texts, generated, strict=True)):
        start = place - first if place >= first else place
        units.append(Unit(text, written, (start, start + 1)))
    if explained is None:
        explained = [graph.n_generated - 1]
    return GraphAttributionResult(
        graph,
        units,
        explained,
        source_text="".join(texts[:first]),
        generated_text="".join(texts[first:]),
        **more,
    )


@given(graphs().filter(lambda graph: graph.n_generated > 0))
def test_results_of_any_graph_keep_the_laws(graph):
    """Of any normalisation, with leaks and sources in between; files are left out."""
    laws = [law for law in RESULT_LAWS if law != "save and load"]
    check_result(result_of(graph, range(0, graph.n_generated, 2)), laws=laws)


def test_a_piece_of_a_character_may_be_a_unit():
    """It is labelled by the character and its number; other texts are told."""
    units = [Unit("a", False, (0, 1)), Unit("é[1/2]", True, (0, 1))]
    graph, texts = AttributionGraph.from_rows([[1, 0]], 1), {"source_text": "a"}
    texts["generated_text"] = "é"
    check_result(GraphAttributionResult(graph, units, [0], **texts))
    units[1] = Unit("é[1/2", True, (0, 1))
    with pytest.raises(LawsBroken, match=r"'é\[1/2' at \(0, 1\) of the text"):
        check_result(GraphAttributionResult(graph, units, [0], **texts))


VARIANTS = {
    "plain": lambda: result_of(random_graph(seed=1), [1, 4]),
    "leaks": lambda: result_of(random_graph(leak=0.5, seed=2)),
    "hops": lambda: result_of(random_graph(signed=True, seed=3), hops=1),
    "sparse": lambda: result_of(random_graph(seed=4).sparsified(0.7)),
    "not all rows": lambda: result_of(
        AttributionGraph.from_rows([None, [0, 1, 3, 0]], 2)
    ),
    "rows behind": lambda: result_of(
        AttributionGraph.from_rows(
            [[0, 1, 0, 0], [0, 1, 3, 0]], 2, behind={0: [1, 1, 0, 0]}
        )
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_results_of_every_kind_keep_all_laws(name):
    """Loaded from a file, too."""
    report = check_result(VARIANTS[name]())
    verdicts = {finding.law: finding.verdict for finding in report.findings}
    assert tuple(verdicts) == RESULT_LAWS
    left_out = {law for law, verdict in verdicts.items() if verdict != "pass"}
    assert left_out == ({"conservation"} if name == "hops" else set())


def tampered(**attributes):
    """A result, some of whose attributes are others."""
    result = result_of(random_graph(seed=1), [1, 4])
    for name, value in attributes.items():
        if name in ("graph_rows", "graph_matrix"):
            graph = random_graph(seed=1)
            object.__setattr__(graph, name.removeprefix("graph_"), value(graph))
            object.__setattr__(result, "graph", graph)
        else:
            setattr(result, name, value(result))
    return result


def late(graph):
    """Rows with an entry for the row's own unit."""
    rows = np.array(graph.rows)
    rows[0, graph.n_sources] = 1.0
    return rows


BROKEN = {
    "scores too few": ("shape", {"_seq_attr": lambda _: torch.ones(3)}, "seq_attr"),
    "NaN": (
        "finiteness",
        {"seq_attr": lambda r: r.seq_attr * torch.nan},
        r"seq_attr\[0\].*nan",
    ),
    "itself": ("causality", {"graph_rows": late}, r"row 0 \('e'\), unit 4 \('e'\)"),
    "shares": (
        "row sums",
        {"graph_matrix": lambda g: g.matrix * 1.01},
        "raw row in shares of its mass",
    ),
    "mass": (
        "conservation",
        {"seq_attr": lambda r: r.seq_attr * 1.01},
        "2, the number of explained units",
    ),
    "paths": (
        "path sum",
        {"seq_attr": lambda r: r.seq_attr.flip(0)},
        "the sum over all paths",
    ),
    "marginals": (
        "marginals",
        {"_marginals": lambda r: r.token_attr.flip(0)},
        r"token_attr\[0, 0\]",
    ),
    "direct": ("direct and sequence", {"direct": lambda r: r.sequence}, "direct.seq"),
    "explained": ("span", {"explained": lambda _: (4, 1)}, "rising positions of 6"),
    "weights": ("span", {"weights": lambda r: r.weights * 2}, "weights"),
    "a token": ("shape", {"input_tokens": lambda r: r.input_tokens[::-1]}, "of the un"),
    "a text": ("shape", {"source_text": lambda r: "x" + r.source_text}, "of the text"),
    "steps": ("save and load", {"step_attr": lambda r: r.step_attr + 1}, "step_attr"),
    "saved": ("save and load", {"seq_attr": lambda r: r.seq_attr + 1}, "result.npz"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_changed_result_is_told(name):
    """The law, what was expected, and what came."""
    law, change, pattern = BROKEN[name]
    with pytest.raises(LawsBroken, match=rf"(?s)1 law, it is broken.*{pattern}"):
        check_result(tampered(**change), laws=[law])


def test_every_law_has_a_result_that_breaks_it():
    """So that none passes whatever comes."""
    assert {law for law, _, _ in BROKEN.values()} == set(RESULT_LAWS)


def test_only_results_are_taken():
    """With what to pass."""
    with pytest.raises(TypeError, match="result: must be a GraphAttributionResult"):
        check_result(random_graph())
