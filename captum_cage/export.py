"""An explanation for other programs: tables, networkx, GraphML, Graphviz, by suffix."""

from __future__ import annotations

import csv
import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from scipy.sparse import csr_array

from captum_cage._checks import complaint, share_to_keep
from captum_cage._shares import heaviest
from captum_cage._version import __version__
from captum_cage.archive import replacing
from captum_cage.explanation import Explanation
from captum_cage.graph import AttributionGraph, RowsBehind
from captum_cage.text import harmless

__all__ = [
    "SUFFIXES",
    "checked_suffix",
    "export",
    "from_networkx",
    "to_columns",
    "to_csv",
    "to_dot",
    "to_frame",
    "to_graphml",
    "to_networkx",
]

# What XML 1.0 has no place for, and the carriage return, which parsers change.
_NOT_XML = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LABEL_WIDTH = 36  # characters of a line in Graphviz


# --- tables --------------------------------------------------------------------------


def to_columns(result: Explanation) -> dict[str, list[Any]]:
    """A tidy table: one row for each explained unit and each source.

    Args:
        result (GraphAttributionResult): what is told.

    Returns:
        dict[str, list]: ``explained`` (position among the generated units),
        ``explained_text``, ``source`` (position among the sources), ``source_text``,
        ``direct`` (its own row) and ``marginal`` (along all paths, or those with so
        many ``hops``). Over the explained units, ``direct`` sums to
        ``result.direct.seq_attr`` and ``marginal`` to ``result.seq_attr``.
    """
    n_sources = result.graph.n_sources
    steps = list(result.explained)
    to_sources, _ = result.graph.blocks()
    return {
        "explained": [step for step in steps for _ in range(n_sources)],
        "explained_text": [
            result.output_tokens[step] for step in steps for _ in range(n_sources)
        ],
        "source": list(range(n_sources)) * len(steps),
        "source_text": result.input_tokens * len(steps),
        "direct": to_sources[steps].toarray().ravel().tolist(),
        "marginal": result.token_attr.numpy()[steps].ravel().tolist(),
    }


def to_frame(result: Explanation) -> Any:
    """`to_columns` as a pandas data frame.

    One-way: the frame holds scores, not the graph.

    Raises:
        ImportError: without pandas.
    """
    try:
        import pandas as pd  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "to_frame: a data frame needs pandas. Install it by "
            "`pip install captum-cage[pandas]`, or call captum_cage.export.to_columns."
        ) from error
    return pd.DataFrame(to_columns(result))


def to_csv(result: Explanation, path: str | os.PathLike[str]) -> None:
    """Write `to_columns` as comma-separated values, UTF-8.

    One-way: the table holds scores, not the graph. Lone surrogates are escaped.

    Args:
        result (GraphAttributionResult): what is told.
        path (str or PathLike): the file; an existing one is replaced.
    """
    columns = to_columns(result)
    with (
        replacing(path) as partial,
        partial.open(
            "w", encoding="utf-8", errors="backslashreplace", newline=""
        ) as file,
    ):
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))


# --- networkx ------------------------------------------------------------------------


def to_networkx(result: Explanation, *, keep: float = 1.0) -> nx.DiGraph:
    """The graph in networkx, with an edge from each unit to those that it rests on.

    `from_networkx` makes an `AttributionGraph` of it again. It has the shares, not the
    raw rows: what normalising took away is gone.

    - Nodes are the units, by position: ``text``, ``kind`` (``"source"`` or
      ``"generated"``), ``start`` and ``stop`` (characters in the text of the prompt or
      of what follows; absent without a place), ``special``, ``explained``, ``mass``
      (at a source what ends there, else what passes through), ``kept`` (generated
      units).
    - Edges: ``weight`` (share of the later unit's row), ``flow`` (mass of the
      explanation that takes it). In a contrastive question, a row that holds only where
      the explanation starts has another one behind: ``weight_behind`` is its share.
    - The graph: ``normalization``, ``leaked``, ``unresolved``, ``hops`` if cut, and
      ``model``, ``method``, ``units`` as far as known.

    Args:
        result (GraphAttributionResult): what is told.
        keep (float, optional): leave out the lightest edges, so that the others have
            this share of the flow, in (0, 1]. Default: ``1.0``, every edge

    Returns:
        networkx.DiGraph: all values are plain Python ones.

    Raises:
        TypeError: if ``keep`` is not a number.
        ValueError: if it is out of range.
    """
    share = share_to_keep("keep", keep, remedy="Pass 0.9, say.")
    graph = result.graph
    made = nx.DiGraph(
        normalization=graph.normalization,
        leaked=float(result.leaked),
        unresolved=float(result.unresolved),
        captum_cage=__version__,
    )
    if result.hops is not None:
        made.graph["hops"] = result.hops
    for name in ("model", "method", "units"):
        if name in result.meta:
            made.graph[name] = str(result.meta[name])
    mass = np.zeros(graph.n_units)
    mass[graph.source_units] = result.seq_attr.numpy()
    mass[graph.generated_units] = result.step_attr.numpy()
    explained = set(graph.generated_units[list(result.explained)].tolist())
    for place, unit in enumerate(result.units):
        made.add_node(
            place,
            text=unit.text,
            kind="generated" if unit.generated else "source",
            special=unit.special,
            explained=place in explained,
            mass=float(mass[place]),
        )
        if unit.span is not None:
            made.nodes[place].update(start=int(unit.span[0]), stop=int(unit.span[1]))
    for place, kept in zip(graph.generated_units.tolist(), graph.kept, strict=True):
        made.nodes[place]["kept"] = float(kept)
    for name, (to_sources, to_generated) in (
        ("weight", graph.blocks()),
        ("weight_behind", graph.blocks_behind()),
    ):
        steps = list(range(graph.n_generated))
        if name == "weight_behind":
            if graph.behind is None:
                break
            steps = graph.behind.steps.tolist()
            for step, kept in zip(steps, graph.behind.kept, strict=True):
                place = int(graph.generated_units[step])
                made.nodes[place]["kept_behind"] = float(kept)
        for block, columns in (
            (to_sources, graph.source_units),
            (to_generated, graph.generated_units),
        ):
            entries = block[steps].tocoo()
            later = graph.generated_units[steps][entries.row].tolist()
            earlier = columns[entries.col].tolist()
            values = entries.data.tolist()
            for edge in zip(later, earlier, values, strict=True):
                made.add_edge(edge[0], edge[1], **{name: edge[2]})
    for _, _, values in made.edges(data=True):
        values.setdefault("weight", 0.0)
        values["flow"] = 0.0
    flow = graph.flow(result.weights, hops=result.hops).tocoo()
    later = graph.generated_units[flow.row].tolist()
    for edge in zip(later, flow.col.tolist(), flow.data.tolist(), strict=True):
        made.edges[edge[0], edge[1]]["flow"] = edge[2]
    if share < 1.0:
        made.remove_edges_from(_lightest(made, share))
    return made


def _lightest(graph: nx.DiGraph, keep: float) -> list[tuple[int, int]]:
    """The edges without which the others have a share of the flow."""
    edges = list(graph.edges)
    flows = np.array([abs(graph.edges[edge]["flow"]) for edge in edges])
    kept, _ = heaviest(flows, keep)
    return [edges[i] for i in np.flatnonzero(~kept)]


def from_networkx(graph: nx.DiGraph) -> AttributionGraph:
    """The attribution graph of what `to_networkx` made, or was read from GraphML.

    Its shares are those of the first one but for rounding.

    Args:
        graph (networkx.DiGraph): nodes by position, with ``kind`` and ``kept``; edges
            with ``weight``.

    Returns:
        AttributionGraph: whose raw rows are the shares.

    Raises:
        ValueError: if it is no such graph.
    """
    try:
        names = sorted(graph.nodes, key=int)
        nodes = [graph.nodes[name] for name in names]
        if [int(name) for name in names] != list(range(len(names))):
            raise ValueError("The nodes are not numbered.")
        sources = np.array([node["kind"] == "source" for node in nodes], dtype=bool)
        generated = np.flatnonzero(~sources)
        step_of = {int(place): step for step, place in enumerate(generated)}
        kept = [float(nodes[place].get("kept", 1.0)) for place in generated]
        behind = None
        steps = [
            step
            for step, place in enumerate(generated)
            if "kept_behind" in nodes[place]
        ]
        if steps:
            behind = RowsBehind(
                np.array(steps, dtype=np.int64),
                csr_array(_rows(graph, "weight_behind", step_of, len(nodes))[steps]),
                np.array([float(nodes[generated[i]]["kept_behind"]) for i in steps]),
            )
        return AttributionGraph.from_rows(
            _rows(graph, "weight", step_of, len(nodes)),
            sources,
            graph.graph["normalization"],
            kept=kept,
            behind=behind,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            complaint(
                "graph",
                "must be one that captum_cage.export.to_networkx made",
                f"it is not: {error}",
                "Pass that one, or what networkx.read_graphml reads of its file.",
            )
        ) from error


def _rows(
    graph: nx.DiGraph, name: str, step_of: dict[int, int], n_units: int
) -> csr_array:
    """An attribute of the edges, as rows of the generated units."""
    edges = [
        (step_of[int(later)], int(earlier), float(values[name]))
        for later, earlier, values in graph.edges(data=True)
        if values.get(name)
    ]
    rows, columns, weights = zip(*edges, strict=True) if edges else ((), (), ())
    shape = (len(step_of), n_units)
    entries = np.array(weights, dtype=np.float64), (rows, columns)
    return csr_array(entries, shape=shape) if edges else csr_array(shape)


def to_graphml(result: Explanation, path: str | os.PathLike[str]) -> None:
    """Write `to_networkx` as GraphML, which `networkx.read_graphml` reads.

    ``from_networkx(networkx.read_graphml(path))`` is the graph again. A text with
    characters that XML has no place for gets escapes in ``text``, and stands as it is,
    as a JSON string, in ``text_json``.

    Args:
        result (GraphAttributionResult): what is told.
        path (str or PathLike): the file; an existing one is replaced.
    """
    made = to_networkx(result)
    for values in (made.graph, *(values for _, values in made.nodes(data=True))):
        for name, value in list(values.items()):
            if isinstance(value, str) and _NOT_XML.search(value):
                values[name] = _NOT_XML.sub(_escaped, value)
                values[f"{name}_json"] = json.dumps(value)
    with replacing(path) as partial:
        nx.write_graphml_xml(made, str(partial), prettyprint=False)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


# --- Graphviz ------------------------------------------------------------------------


def to_dot(
    result: Explanation,
    path: str | os.PathLike[str] | None = None,
    *,
    keep: float = 0.9,
) -> str | None:
    """The units that matter and the mass between them, in Graphviz' language.

    One-way, for drawing: ``dot -Tsvg graph.dot``.

    Args:
        result (GraphAttributionResult): what is told.
        path (str or PathLike, optional): the file; an existing one is replaced.
            Default: ``None``, no file
        keep (float, optional): share of the flow that the edges have, the heaviest
            first, in (0, 1]. Default: ``0.9``

    Returns:
        str or None: the text, if there is no file.

    Raises:
        TypeError: if ``keep`` is not a number.
        ValueError: if it is out of range.
    """
    made = to_networkx(result, keep=keep)
    made.remove_edges_from([e for e in made.edges if not made.edges[e]["flow"]])
    total = float(result.weights.sum())
    drawn = {place for edge in made.edges for place in edge}
    drawn |= {place for place in made if made.nodes[place]["explained"]}
    flows = abs(result.graph.flow(result.weights, hops=result.hops)).sum()
    held = sum(abs(made.edges[edge]["flow"]) for edge in made.edges)
    part = held / flows if flows else 1.0
    lines = [
        f"// captum_cage {__version__}: edges with {part:.1%} of the flow",
        "digraph {",
        "  rankdir=BT;",
        '  node [shape=box, style="rounded,filled", fillcolor="#ffffff"];',
    ]
    largest = max((abs(made.nodes[place]["mass"]) for place in drawn), default=0.0)
    for place in sorted(drawn):
        node = made.nodes[place]
        style = ['style="rounded,filled,dashed"'] if node["kind"] == "generated" else []
        if node["explained"]:
            style = ["penwidth=3"]
        else:
            # Twenty steps of a ground that black letters stand out on.
            part = round(20 * abs(node["mass"]) / largest) if largest else 0
            ends = (255, 255 - 4 * part, 255 - 9 * part)
            order = 1 if node["mass"] >= 0 else -1
            style.append('fillcolor="#{:02x}{:02x}{:02x}"'.format(*ends[::order]))
        text = " ".join(node["text"].split()) or node["text"]
        label = textwrap.wrap(harmless(text, one_line=True), _LABEL_WIDTH) or [""]
        label.append(f"{node['mass'] / total:.1%}")
        lines.append(f"  {place} [label={_quoted(label)}, {', '.join(style)}];")
    widest = max((abs(made.edges[edge]["flow"]) for edge in made.edges), default=1.0)
    for later, earlier, values in made.edges(data=True):
        flow = values["flow"]
        style = [f'label="{flow / total:.1%}"']
        style.append(f"penwidth={0.5 + 4.5 * abs(flow) / widest:.2f}")
        if flow < 0:
            style.append("style=dashed")
        lines.append(f"  {later} -> {earlier} [{', '.join(style)}];")
    text = "\n".join([*lines, "}", ""])
    if path is None:
        return text
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return None


def _quoted(lines: list[str]) -> str:
    """Lines as one quoted string, in which a backslash is a backslash."""
    escaped = [line.replace("\\", "\\\\").replace('"', '\\"') for line in lines]
    return '"' + "\\n".join(escaped) + '"'


# --- by suffix -----------------------------------------------------------------------


def _save(result: Explanation, path: str | os.PathLike[str]) -> None:
    result.save(path)


_WRITERS: dict[str, Callable[[Explanation, str | os.PathLike[str]], Any]] = {
    ".csv": to_csv,
    ".dot": to_dot,
    ".graphml": to_graphml,
    ".json": _save,
    ".npz": _save,
    ".safetensors": _save,
}
SUFFIXES = tuple(_WRITERS)
"""Of the files that `export` writes."""


def checked_suffix(path: str | os.PathLike[str], where: str = "path") -> str:
    """The suffix of a file's name, if it says what to write.

    Args:
        path (str or PathLike): the file.
        where (str, optional): the argument, as the user wrote it. Default: ``"path"``

    Raises:
        ValueError: if it is none of `SUFFIXES`.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _WRITERS:
        raise ValueError(
            complaint(
                where,
                f"must end in one of {', '.join(SUFFIXES)}",
                f"{os.fspath(path)!r} came",
                "The end of its name says what is written.",
            )
        )
    return suffix


def export(result: Explanation, path: str | os.PathLike[str]) -> None:
    """Write an explanation in the form that the end of the file's name asks for.

    ``.json``, ``.npz`` and ``.safetensors`` hold the whole result, which
    `GraphAttributionResult.load` reads; ``.graphml`` its graph, which `from_networkx`
    makes of it again; ``.csv`` (`to_csv`) and ``.dot`` (`to_dot`) are one-way.

    Args:
        result (GraphAttributionResult): what is written.
        path (str or PathLike): the file; an existing one is replaced.

    Raises:
        ValueError: if the suffix is none of `SUFFIXES`.
    """
    _WRITERS[checked_suffix(path)](result, path)
