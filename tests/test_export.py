"""Other programs' formats: what they hold, and that it comes back."""

import csv
import json
import re
import sys
from xml.etree import ElementTree

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captum_cage import AttributionGraph, GraphAttributionResult, Unit
from captum_cage.draws import DrawnRows
from captum_cage.export import (
    SUFFIXES,
    export,
    from_networkx,
    to_columns,
    to_csv,
    to_dot,
    to_graphml,
    to_networkx,
)
from captum_cage.foils import Foil

TEXTS = [
    "Ana has 3.",
    "Mia\x00 <b>&\r\n",
    "So 4. \ud800]]>",
    'It "is" \\N{4}.',
    "\u202eend",
]
ROWS = [[3, 1, 0, 0, 0], [0, -1, 5, 0, 0], [1, 0, 1, 2, 0]]


def made(explained=(2,), normalization="positive", *, hops=None, **graph):
    """Two facts, two steps and an answer, with texts that break formats."""
    units = [
        Unit(text, i > 1, None if i == 1 else (i, i + 3), i == 4)
        for i, text in enumerate(TEXTS)
    ]
    return GraphAttributionResult(
        AttributionGraph.from_rows(graph.pop("rows", ROWS), 2, normalization, **graph),
        units,
        explained,
        source_text="".join(TEXTS[:2]),
        generated_text="".join(TEXTS[2:]),
        output_probs=[0.5, 0.1, 1 / 3],
        meta={"method": "by hand", "model": "m\x07", "units": "sentence"},
        hops=hops,
    )


def contrastive():
    """A result whose answer has a row of its own, and whose rows lack some mass."""
    result = made(kept=[1.0, 0.5, 0.75], behind={2: [0, 1, 1, 0, 0]})
    return GraphAttributionResult(
        result.graph,
        result.units,
        [1, 2],
        source_text=result.source_text,
        generated_text=result.generated_text,
        foils=[Foil(2, "7", "9")],
    )


def drawn():
    """A result of three draws."""
    rows = np.random.default_rng(0).random((3, 3, 5)) * np.array(ROWS)
    sources = np.array([True, True, False, False, False])
    draws = DrawnRows(
        rows, np.zeros(0, dtype=np.int64), np.zeros((3, 0, 5)), sources, "positive"
    )
    result = made()
    return GraphAttributionResult(
        draws.mean_graph(),
        result.units,
        [2],
        source_text=result.source_text,
        generated_text=result.generated_text,
        drawn=draws,
    )


def sparse():
    """A result whose rows came one by one, some of them not at all."""
    return made(rows=iter([ROWS[0], None, ROWS[2]]))


RESULTS = {
    "plain": made,
    "several": lambda: made((0, 2)),
    "signed": lambda: made(normalization="signed"),
    "absolute, cut": lambda: made(normalization="absolute", hops=1),
    "direct rows": lambda: made(hops=0),
    "contrastive": contrastive,
    "drawn": drawn,
    "sparse": sparse,
}
every_result = pytest.mark.parametrize("name", RESULTS)


# --- whole results -------------------------------------------------------------------


@every_result
@pytest.mark.parametrize("suffix", [".json", ".npz", ".safetensors"])
def test_a_whole_result_comes_back(name, suffix, tmp_path):
    """With every number, whatever the file is called afterwards."""
    result = RESULTS[name]()
    path = tmp_path / f"result{suffix}"
    result.save(path)
    loaded = GraphAttributionResult.load(path.rename(tmp_path / "renamed"))
    assert loaded.to_dict() == result.to_dict()
    assert loaded.units == result.units
    assert type(loaded.graph.rows) is type(result.graph.rows)
    if result.drawn is not None:
        one, other = (each.intervals(resamples=50) for each in (loaded, result))
        assert (one.low == other.low).all()


def test_json_is_a_text_or_a_file(tmp_path):
    """Of ASCII characters, whatever the texts have."""
    result = made()
    text = result.to_json()
    assert text.isascii()
    assert json.loads(text) == result.to_dict()
    assert result.to_json(tmp_path / "file") is None
    assert (tmp_path / "file").read_text() == text + "\n"


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [["a"] * 5] * 3},
        {"rows": [[1.0]]},
        {"rows": [[[1.0]]]},
        {"rows": [[1e999, 0, 0, 0, 0]] * 3},
        {"units": []},
        {"units": 7},
        {"kept": [2, 2, 2]},
        {"kept": [10**400, 1, 1]},
        {"explained": [3]},
        {"explained": [0.5]},
        {"output_probs": [1.0]},
        {"normalization": ["positive"]},
        {"behind": {}},
        {"behind": {"steps": [9], "rows": [[0] * 5], "kept": [1]}},
        {"drawn": {"rows": [], "steps": [], "behind": []}},
        {"format": "another"},
    ],
)
def test_json_that_is_no_result_is_refused(change, tmp_path):
    """By the error that every such file gets."""
    path = tmp_path / "file.json"
    path.write_text(json.dumps({**made().to_dict(), **change}))
    with pytest.raises(ValueError, match="must be a result saved by"):
        GraphAttributionResult.load(path)


def test_arrays_that_claim_to_be_huge_are_refused(tmp_path):
    """Before anything of that size is made."""
    path = tmp_path / "file.npz"
    made().save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["rows_shape"] = np.array([3, 10**15])
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="must be a result saved by"):
        GraphAttributionResult.load(path)


# --- tables --------------------------------------------------------------------------


@every_result
def test_the_table_sums_to_the_scores(name):
    """A row for each explained unit and source, tidy."""
    result = RESULTS[name]()
    table = to_columns(result)
    P, count = 2, len(result.explained)
    assert {len(column) for column in table.values()} == {P * count}
    direct, marginal = (
        np.reshape(table[key], (count, P)) for key in ("direct", "marginal")
    )
    assert direct.sum(axis=0) == pytest.approx(result.direct.seq_attr.numpy())
    assert marginal.sum(axis=0) == pytest.approx(result.seq_attr.numpy())
    pairs = [(step, source) for step in result.explained for source in range(P)]
    assert [*zip(table["explained"], table["source"], strict=True)] == pairs
    assert table["explained_text"] == [result.output_tokens[step] for step, _ in pairs]
    assert table["source_text"] == [result.input_tokens[source] for _, source in pairs]


def test_the_frame_is_the_table():
    """In pandas."""
    pd = pytest.importorskip("pandas")
    frame = made((0, 2)).to_frame()
    assert isinstance(frame, pd.DataFrame)
    table = to_columns(made((0, 2)))
    assert {name: frame[name].tolist() for name in frame} == table
    assert frame.groupby("source")["marginal"].sum().tolist() == pytest.approx(
        made((0, 2)).seq_attr.tolist()
    )


def test_without_pandas_the_extra_is_named(monkeypatch):
    """And what does without."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        ImportError, match=r"pip install captum-cage\[pandas\].*columns"
    ):
        made().to_frame()


@pytest.mark.parametrize("name", ["result.graphml", "result.dot"])
def test_without_networkx_the_extra_is_named(name, tmp_path, monkeypatch):
    """And forms that do without; no file is left."""
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ImportError, match=r"pip install captum-cage\[plot\].*\.json"):
        made().export(tmp_path / name)
    assert not list(tmp_path.iterdir())
    made().export(tmp_path / "result.csv")


def test_comma_separated_values_are_the_table(tmp_path):
    """Numbers exact, texts as they are but for lone surrogates, which are escaped."""
    result = made((0, 2))
    to_csv(result, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    table = to_columns(result)
    assert head == list(table)
    for name, column in zip(head, zip(*rows, strict=True), strict=True):
        if name.endswith("text"):
            assert [*column] == [
                text.replace("\ud800", "\\ud800") for text in table[name]
            ]
        else:
            assert [float(cell) for cell in column] == table[name]


# --- networkx ------------------------------------------------------------------------


def assert_same_graph(found, expected):
    """Equal but for rounding, where it can be told from shares."""
    assert found.normalization == expected.normalization
    assert (found.sources == expected.sources).all()
    assert np.abs((found.matrix - expected.matrix).toarray()).max() < 1e-15
    for ours, theirs in zip(found.blocks(), expected.blocks(), strict=True):
        assert np.abs((ours - theirs).toarray()).max(initial=0) < 1e-15
    assert found.leak.tolist() == expected.leak.tolist()
    assert found.kept.tolist() == expected.kept.tolist()
    assert found.left_out_behind.tolist() == expected.left_out_behind.tolist()
    weights = np.arange(1.0, 1.0 + found.n_generated)
    assert found.explain(weights) == pytest.approx(expected.explain(weights), abs=1e-14)


@every_result
def test_networkx_has_texts_places_kinds_shares_and_flow(name):
    """As plain Python values."""
    result = RESULTS[name]()
    graph = result.to_networkx()
    assert [graph.nodes[i]["text"] for i in range(5)] == [u.text for u in result.units]
    assert [graph.nodes[i]["kind"] for i in range(5)] == ["source"] * 2 + [
        "generated"
    ] * 3
    assert [graph.nodes[i].get("start") for i in range(5)] == [0, None, 2, 3, 4]
    assert [graph.nodes[i]["special"] for i in range(5)] == [False] * 4 + [True]
    assert [i - 2 for i in range(5) if graph.nodes[i]["explained"]] == [
        *result.explained
    ]
    masses = [graph.nodes[i]["mass"] for i in range(5)]
    assert masses == [*result.seq_attr.tolist(), *result.step_attr.tolist()]
    to_sources, to_generated = (block.toarray() for block in result.graph.blocks())
    shares = np.hstack([to_sources, to_generated])
    flow = result.graph.flow(result.weights, hops=result.hops).toarray()
    for step, place in np.ndindex(3, 5):
        edge = graph.get_edge_data(step + 2, place, {"weight": 0.0, "flow": 0.0})
        assert edge["weight"] == shares[step, place]
        assert edge["flow"] == flow[step, place]
    values = [graph.graph, *(v for _, v in graph.nodes(data=True))]
    values += [v for _, _, v in graph.edges(data=True)]
    kinds = {type(value) for attributes in values for value in attributes.values()}
    assert kinds <= {str, int, float, bool}
    assert graph.graph.get("hops") == result.hops
    assert graph.graph["unresolved"] == result.unresolved


@every_result
def test_a_graph_comes_back_from_networkx(name):
    """The shares, the sources, what rows kept, and rows behind."""
    result = RESULTS[name]()
    assert_same_graph(from_networkx(to_networkx(result)), result.graph)


@every_result
def test_a_graph_comes_back_from_graphml(name, tmp_path):
    """Through a file that XML parsers accept, with the texts as they were."""
    result = RESULTS[name]()
    path = tmp_path / "graph.graphml"
    to_graphml(result, path)
    ElementTree.parse(path)
    graph = nx.read_graphml(path, node_type=int)
    assert_same_graph(from_networkx(graph), result.graph)
    expected = to_networkx(result)
    for place in range(5):
        node = dict(graph.nodes[place])
        exact = node.pop("text_json", None)
        if exact is not None:
            node["text"] = json.loads(exact)
        assert node == expected.nodes[place]
    assert {e: graph.edges[e] for e in graph.edges} == {
        e: expected.edges[e] for e in expected.edges
    }
    assert_same_graph(from_networkx(nx.read_graphml(path)), result.graph)


@given(st.text(st.characters(), max_size=8))
def test_any_text_comes_back_from_graphml(tmp_path_factory, text):
    """As it is, or from its JSON."""
    units = [Unit(text, False, None), Unit("b", True, None)]
    graph = AttributionGraph.from_rows([[1, 0]], 1)
    result = GraphAttributionResult(
        graph, units, [0], source_text="", generated_text="", meta={"model": text}
    )
    path = tmp_path_factory.getbasetemp() / "any.graphml"
    to_graphml(result, path)
    found = nx.read_graphml(path)
    for name, values in (("text", found.nodes["0"]), ("model", found.graph)):
        exact = values.get(f"{name}_json")
        assert text == (values.get(name, "") if exact is None else json.loads(exact))


@pytest.mark.parametrize("keep", [0.5, 0.8, 1])
def test_light_edges_can_be_left_out(keep):
    """The fewest edges that have the share of the flow."""
    result = made((0, 1, 2))
    graph = result.to_networkx(keep=keep)
    flow = np.sort(result.graph.flow(result.weights).data)[::-1]
    held = sum(values["flow"] for _, _, values in graph.edges(data=True))
    assert held >= keep * flow.sum() - 1e-12
    if keep < 1:
        assert (
            held - min(v["flow"] for _, _, v in graph.edges(data=True))
            < keep * flow.sum()
        )


@every_result
@pytest.mark.parametrize("limit", [{"keep": 0.5}, {"keep": 0.9}, {"most": 2}])
def test_what_is_left_out_is_unresolved(name, limit, tmp_path):
    """The edges that stay have their shares; the others count as left out."""
    result = RESULTS[name]()
    whole, part = result.to_networkx(), result.to_networkx(**limit)
    assert 0 < part.number_of_edges() < whole.number_of_edges()
    for edge in part.edges:
        assert part.edges[edge] == whole.edges[edge]
    to_graphml(result, tmp_path / "part.graphml", **limit)
    read = from_networkx(nx.read_graphml(tmp_path / "part.graphml"))
    for graph in (from_networkx(part), read):
        expected = result.graph.normalized().toarray()
        gone = np.ones_like(expected, dtype=bool)
        for later, earlier in part.edges:
            gone[result.graph.generated_units.tolist().index(later), earlier] = False
        expected[gone] = 0
        found = graph.normalized().toarray()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        if result.graph.normalization == "positive" and result.hops is None:
            w = result.weights
            mass = graph.explain(w).sum() + graph.leaked(w) + graph.unresolved(w)
            assert mass == pytest.approx(w.sum())


def test_most_edges_are_a_whole_number():
    """One at least."""
    for function in (to_networkx, to_dot):
        with pytest.raises(ValueError, match="most: must be 1 or more"):
            function(made(), most=0)
        with pytest.raises(TypeError, match="most: must be a whole number"):
            function(made(), most=1.5)
    assert to_networkx(made(), most=1).number_of_edges() == 1
    assert len(parsed(to_dot(made(), most=2))[1]) == 2


def test_a_share_to_keep_is_checked():
    """In all that take one."""
    for function in (to_networkx, to_dot):
        with pytest.raises(ValueError, match=r"keep: must be above 0 and at most 1"):
            function(made(), keep=1.5)
        with pytest.raises(TypeError, match=r"keep: must be above 0 and at most 1"):
            function(made(), keep=None)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda graph: graph.remove_node(0),
        lambda graph: graph.add_node("x"),
        lambda graph: graph.nodes[1].pop("kind"),
        lambda graph: graph.graph.pop("normalization"),
        lambda graph: graph.add_edge(0, 1, weight=1.0),
        lambda graph: graph.add_edge(2, 4, weight=1.0),
        lambda graph: graph.edges[2, 0].update(weight="heavy"),
    ],
)
def test_other_graphs_are_refused(spoil):
    """With what is wrong about them."""
    graph = to_networkx(made())
    spoil(graph)
    with pytest.raises(ValueError, match=r"graph: must be one that .*to_networkx made"):
        from_networkx(graph)


# --- Graphviz ------------------------------------------------------------------------

STRING = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)


def parsed(dot):
    """Labels of nodes and edges, and the edges, by Graphviz' rules for strings."""
    nodes, edges = {}, {}
    for line in dot.splitlines()[4:-1]:
        found = re.fullmatch(
            r'  (\d+)(?: -> (\d+))? \[label="((?:[^"\\]|\\.)*)", .*\];', line
        )
        label = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], found[3])
        if found[2] is None:
            nodes[int(found[1])] = label
        else:
            edges[int(found[1]), int(found[2])] = label
    return nodes, edges


def test_graphviz_gets_the_flow():
    """Edges from later to earlier units, with their part of the explained mass."""
    result = made((1, 2))
    nodes, edges = parsed(to_dot(result, keep=1))
    flow = result.graph.flow(result.weights).toarray() / 2
    expected = {
        (step + 2, place): f"{flow[step, place]:.1%}"
        for step, place in zip(*np.nonzero(flow), strict=True)
    }
    assert edges == expected
    assert nodes.keys() == {0, 1, 2, 3, 4}
    assert nodes[0] == f"Ana has 3.\n{result.seq_attr[0] / 2:.1%}"
    assert nodes[3].startswith('It "is" \\N{4}.\n')
    assert nodes[1].startswith("Mia\\x00 <b>&\n")


@given(st.text(st.characters(), max_size=12))
def test_any_text_is_one_string_of_graphviz(text):
    """And is told as it is, but for what cannot be seen."""
    units = [Unit(text, False, None), Unit("b", True, None)]
    graph = AttributionGraph.from_rows([[1, 0]], 1)
    result = GraphAttributionResult(
        graph, units, [0], source_text="", generated_text=""
    )
    dot = to_dot(result)
    assert dot.encode("utf-8")
    nodes, edges = parsed(dot)
    assert edges == {(1, 0): "100.0%"}
    assert nodes.keys() == {0, 1}


def test_graphviz_gets_what_matters(tmp_path):
    """The heaviest edges and their units, to a file or as a text."""
    text = to_dot(made(), keep=0.5)
    assert to_dot(made(), tmp_path / "graph.dot", keep=0.5) is None
    assert (tmp_path / "graph.dot").read_text(encoding="utf-8") == text
    nodes, edges = parsed(text)
    assert len(edges) < len(parsed(to_dot(made(), keep=1))[1])
    assert {place for edge in edges for place in edge} <= nodes.keys()
    told = re.match(r"// captum_cage \S+: edges with ([\d.]+)% of the flow\n", text)
    assert float(told[1]) >= 50
    signed = made(normalization="signed")
    assert "style=dashed" in to_dot(signed, keep=1)
    assert parsed(to_dot(made(rows=[[-1, 0, 0, 0, 0]] * 3)))[1] == {}


# --- by suffix -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".JSON"])
def test_the_suffix_says_what_is_written(suffix, tmp_path):
    """By the function or the method."""
    paths = [tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"]
    export(made(), paths[0])
    made().export(str(paths[1]))
    first, second = (path.read_bytes() for path in paths)
    assert first == second or suffix == ".npz"  # which holds the time
    begins = {
        ".csv": b"explained,explained_text,",
        ".dot": b"// captum_cage",
        ".graphml": b"<?xml",
        ".json": b'{"format": "captum_cage.result"',
        ".npz": b"PK",
    }
    assert first.startswith(begins.get(suffix.lower(), b""))


@pytest.mark.parametrize("name", ["graph", "graph.svg", "graph.json.gz", ".npz"])
def test_an_unknown_suffix_is_refused(name, tmp_path):
    """With those that are known."""
    with pytest.raises(ValueError, match=r"path: must end in one of \.csv, \.dot, .*"):
        export(made(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []
