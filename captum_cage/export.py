"""An explanation for other programs: tables, networkx, GraphML, Graphviz, by suffix."""

from __future__ import annotations

import csv
import json
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import csr_array

from captum_cage._checks import complaint, share_to_keep, whole_number
from captum_cage._shares import heaviest
from captum_cage._version import __version__
from captum_cage.archive import replacing, writable
from captum_cage.explanation import Explanation
from captum_cage.graph import AttributionGraph, RowsBehind
from captum_cage.text import harmless

if TYPE_CHECKING:
    import networkx as nx

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
    return pd.DataFrame(
        {
            # Arrow, which keeps the texts of pandas, has no half surrogate pairs.
            name: values if _is_encodable(values) else pd.Series(values, dtype=object)
            for name, values in to_columns(result).items()
        }
    )


def _is_encodable(values: Sequence[Any]) -> bool:
    try:
        "".join(one for one in values if isinstance(one, str)).encode()
    except UnicodeEncodeError:
        return False
    return True


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


def _networkx() -> Any:
    try:
        import networkx  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "to_networkx: graphs for other programs need networkx. Install it by "
            "`pip install captum-cage[plot]`, or write .json, .npz or .csv."
        ) from error
    return networkx


def to_networkx(
    result: Explanation, *, keep: float = 1.0, most: int | None = None
) -> nx.DiGraph:
    """The graph in networkx, with an edge from each unit to those that it rests on.

    `from_networkx` makes an `AttributionGraph` of it again. It has the shares, not the
    raw rows: what normalising took away is gone.

    - Nodes are the units, by position: ``text``, ``kind`` (``"source"`` or
      ``"generated"``), ``start`` and ``stop`` (characters in the text of the prompt or
      of what follows; absent without a place), ``special``, ``explained``, ``mass``
      (at a source what ends there, else what passes through), ``kept`` (generated
      units: the part of its row's mass that the edges have).
    - Edges: ``weight`` (share of the later unit's row), ``flow`` (mass of the
      explanation that takes it). In a contrastive question, a row that holds only where
      the explanation starts has another one behind: ``weight_behind`` is its share.
    - The graph: ``normalization``, ``leaked``, ``unresolved``, ``hops`` if cut, and
      ``model``, ``method``, ``units`` as far as known.

    Args:
        result (GraphAttributionResult): what is told.
        keep (float, optional): leave out the lightest edges, so that the others have
            this share of the flow, in (0, 1]. Default: ``1.0``, every edge
        most (int, optional): leave out all but so many of the heaviest edges.
            Default: ``None``, no limit

    Returns:
        networkx.DiGraph: all values are plain Python ones.

    Raises:
        ImportError: without networkx.
        TypeError: if ``keep`` is not a number, or ``most`` not a whole one.
        ValueError: if one of them is out of range.
    """
    share = share_to_keep("keep", keep, remedy="Pass 0.9, say.")
    if most is not None:
        most = whole_number("most", most, minimum=1, remedy="Pass a number of edges.")
    graph = result.graph
    made = _networkx().DiGraph(
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
            made.nodes[place].update(start=unit.span[0], stop=unit.span[1])
    _add_edges(made, result, share, most)
    return made


def _add_edges(
    made: nx.DiGraph, result: Explanation, share: float, most: int | None
) -> None:
    """The edges that stay, and how much of each row they have."""
    graph = result.graph
    flow = graph.flow(result.weights, hops=result.hops)
    stays = None
    if share < 1.0 or most is not None:
        stays = _heaviest(flow, share, most)
        flow = flow * stays
    weights = {"weight": graph.normalized()}
    kept = {"kept": (np.arange(graph.n_generated), graph.kept)}
    if graph.behind is not None:
        steps = graph.behind.steps
        only = np.zeros((graph.n_generated, 1))
        only[steps] = 1.0
        weights["weight_behind"] = csr_array(graph.normalized(behind=True) * only)
        weights["weight_behind"].eliminate_zeros()
        kept["kept_behind"] = (steps, graph.behind.kept)
    for (name, rows), (its_kept, (steps, shares)) in zip(
        weights.items(), kept.items(), strict=True
    ):
        whole = np.asarray(abs(rows).sum(axis=1)).ravel()
        edges = rows if stays is None else csr_array(rows * stays)
        held = np.asarray(abs(edges).sum(axis=1)).ravel()
        # A row that leaks has no edges to lose.
        part = np.where(whole > 0.0, held / np.where(whole > 0.0, whole, 1.0), 1.0)
        for step, value in zip(steps.tolist(), shares.tolist(), strict=True):
            place = int(graph.generated_units[step])
            made.nodes[place][its_kept] = value * float(part[step])
        _set_values(made, graph, edges, name)
    for _, _, values in made.edges(data=True):
        values.setdefault("weight", 0.0)
        values["flow"] = 0.0
    _set_values(made, graph, csr_array(flow), "flow")


def _heaviest(flow: csr_array, share: float, most: int | None) -> csr_array:
    """Ones at the fewest edges that have a share of the flow, at most so many."""
    sizes = np.abs(flow.data)
    chosen, _ = heaviest(sizes, share)
    if most is not None and np.count_nonzero(chosen) > most:
        chosen = np.zeros(sizes.size, dtype=bool)
        chosen[np.argsort(-sizes, kind="stable")[:most]] = True
    found = csr_array(flow, copy=True)
    found.data = chosen.astype(np.float64)
    found.eliminate_zeros()
    return found


def _set_values(
    made: nx.DiGraph, graph: AttributionGraph, rows: csr_array, name: str
) -> None:
    """An attribute of the edges, from a matrix of shape ``(G, N)``."""
    entries = rows.tocoo()
    made.add_edges_from(
        (later, earlier, {name: value})
        for later, earlier, value in zip(
            graph.generated_units[entries.row].tolist(),
            entries.col.tolist(),
            entries.data.tolist(),
            strict=True,
        )
    )


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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
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


def to_graphml(
    result: Explanation,
    path: str | os.PathLike[str],
    *,
    keep: float = 1.0,
    most: int | None = None,
) -> None:
    """Write `to_networkx` as GraphML, which `networkx.read_graphml` reads.

    ``from_networkx(networkx.read_graphml(path))`` is the graph again. A text with
    characters that XML has no place for gets escapes in ``text``, and stands as it is,
    as a JSON string, in ``text_json``.

    Args:
        result (GraphAttributionResult): what is told.
        path (str or PathLike): the file; an existing one is replaced.
        keep (float, optional): as for `to_networkx`. Default: ``1.0``, every edge
        most (int, optional): as for `to_networkx`. Default: ``None``, no limit

    Raises:
        ImportError: as `to_networkx` does.
        TypeError: as `to_networkx` does, or if ``path`` is no path.
        ValueError: as `to_networkx` does.
        OSError: if the file cannot be written.
    """
    made = to_networkx(result, keep=keep, most=most)
    for values in (made.graph, *(values for _, values in made.nodes(data=True))):
        for name, value in list(values.items()):
            if isinstance(value, str) and _NOT_XML.search(value):
                values[name] = _NOT_XML.sub(_escaped, value)
                values[f"{name}_json"] = json.dumps(value)
    with replacing(path) as partial:
        _networkx().write_graphml_xml(made, str(partial), prettyprint=False)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


# --- Graphviz ------------------------------------------------------------------------


def to_dot(
    result: Explanation,
    path: str | os.PathLike[str] | None = None,
    *,
    keep: float = 0.9,
    most: int = 150,
) -> str | None:
    """The units that matter and the mass between them, in Graphviz' language.

    One-way, for drawing: ``dot -Tsvg graph.dot``. Its first line says what share of the
    flow the edges have.

    Args:
        result (GraphAttributionResult): what is told.
        path (str or PathLike, optional): the file; an existing one is replaced.
            Default: ``None``, no file
        keep (float, optional): share of the flow that the edges have, the heaviest
            first, in (0, 1]. Default: ``0.9``
        most (int, optional): most edges. Default: ``150``

    Returns:
        str or None: the text, if there is no file.

    Raises:
        ImportError: as `to_networkx` does.
        TypeError: if ``keep`` is not a number, or ``most`` not a whole one.
        ValueError: if one of them is out of range.
    """
    made = to_networkx(result, keep=keep, most=most)
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
"""Ends of the names of the files that :func:`export` writes."""


def checked_suffix(path: str | os.PathLike[str], where: str = "path") -> str:
    """The suffix of a file's name, if it says what to write.

    Args:
        path (str or PathLike): the file.
        where (str, optional): the argument, as the user wrote it. Default: ``"path"``

    Raises:
        TypeError: if it is no path.
        OSError: if no file can be there.
        ValueError: if it is none of `SUFFIXES`.
    """
    suffix = writable(where, path).suffix.lower()
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
        ImportError: without networkx, for ``.graphml`` and ``.dot``.
        ValueError: if the suffix is none of `SUFFIXES`.
    """
    _WRITERS[checked_suffix(path)](result, path)
