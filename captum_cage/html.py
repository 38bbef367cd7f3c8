"""A result as one page: a single HTML file that needs no network.

The page holds the texts, the graph and a script that solves it, so that whoever reads
it can ask about any span. What the script computes is what `AttributionGraph` does.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, vstack

from captum_cage._checks import complaint, shown, whole_number
from captum_cage._version import __version__
from captum_cage.explanation import Explanation, explained_texts
from captum_cage.graph import AttributionGraph, RowsBehind
from captum_cage.text import harmless

try:
    from jinja2 import Environment, StrictUndefined
except ImportError as error:
    raise ImportError(
        "captum_cage.html: a page needs Jinja. Install it by "
        "`pip install captum-cage[html]`."
    ) from error

__all__ = ["MAX_BYTES", "NOTEBOOK_BYTES", "fitting_graph", "frame", "page"]

MAX_BYTES = 1_000_000
"""Size of a page unless another one is asked for."""

NOTEBOOK_BYTES = 400_000
"""The same where a page becomes part of a notebook, which may hold many."""

# From small to large. Units are shown as they are and, if asked for, in larger ones.
_NAMES = {
    "token": "tokens",
    "word": "words",
    "sentence": "sentences",
    "message": "messages",
}
_LARGER = ("word", "sentence")
_LEAST = 1e-9  # share of a row's mass that its heaviest entry certainly has
_SCALE = 2.0**15  # of half floats, whose exponents are spent on shares of at most 1
_ESCAPE = 255  # a gap between columns that goes on in the next byte
_AROUND_ROWS = 600  # bytes: names of the arrays, rounding of base64, a notice
_LONGEST_TITLE = 80  # characters
_HEIGHT = 720  # pixels of the frame in a notebook


def page(
    explanation: Explanation,
    *,
    title: str | None = None,
    max_bytes: int | None = MAX_BYTES,
) -> str:
    """The page of an explanation.

    All text is escaped, and a content security policy in the page allows its own
    script and style, by their hashes, and nothing else.

    Args:
        explanation: what is shown first; the reader may ask about other spans.
        title: the page's title. By default it tells what is explained.
        max_bytes: size of the page. A graph that is too large for it becomes what
            `fitting_graph` makes of it, and the page says how much mass that leaves
            unresolved. ``None`` for the whole graph, whatever its size. A page needs
            some 75,000 bytes, its texts, and an entry for each generated unit, so it
            can be larger if that is.

    Returns:
        HTML, which UTF-8 can encode whatever the texts hold.

    Raises:
        TypeError: if ``title`` is no text, or ``max_bytes`` not a whole number.
        ValueError: if ``max_bytes`` is below 1.
    """
    graph = explanation.graph
    if title is not None and not isinstance(title, str):
        raise TypeError(
            complaint(
                "title", "must be a text", f"{shown(title)} came", "Pass a string."
            )
        )
    fields = _page_fields(explanation, title)
    if max_bytes is not None:
        remedy = "Pass the size in bytes, or None for the whole graph."
        limit = whole_number("max_bytes", max_bytes, minimum=1, remedy=remedy)
        bare = _rendered(fields, _told(explanation, graph, graph, with_rows=False))
        graph = fitting_graph(graph, limit - len(bare.encode("utf-8")) - _AROUND_ROWS)
    return _rendered(fields, _told(explanation, graph, explanation.graph))


def frame(explanation: Explanation, *, max_bytes: int | None = NOTEBOOK_BYTES) -> str:
    """The page in an isolated frame, for the output cell of a notebook.

    Args:
        explanation: what is shown.
        max_bytes: as for `page`.

    Returns:
        An ``iframe`` that holds the page. Its script can reach nothing outside.
    """
    held = escape(page(explanation, max_bytes=max_bytes))
    return (
        f'<iframe srcdoc="{held}" sandbox="allow-scripts" title="captum_cage" '
        f'style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
    )


def fitting_graph(graph: AttributionGraph, n_bytes: int) -> AttributionGraph:
    """The graph, made so small that a page holds it in so many bytes.

    Args:
        graph: the graph.
        n_bytes: bytes for its entries.

    Returns:
        The graph itself if it fits. Else `AttributionGraph.sparsified` with the largest
        share that does, or with one entry for each row if none does; its shares are
        rounded down to 11 binary digits, which lets a page hold three times as many of
        them. What both leave out is missing from ``kept``, so that `unresolved` bounds
        it.

    Example:
        >>> graph = AttributionGraph.from_rows([[1, 1, 0, 0], [1, 2, 5, 0]], 2)
        >>> fitting_graph(graph, 10_000) is graph
        True
        >>> fitting_graph(graph, 40).matrix.toarray().tolist()[2:]
        [[0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.625, 0.0]]
    """
    every = _row_blocks(graph)
    wide = _column_type(graph.n_units).itemsize
    n_rows = sum(rows.shape[0] + 1 for rows in every)
    # Base64 has four characters for three bytes; what a row kept is a float64.
    room = n_bytes * 3 // 4 - n_rows * (4 + 8)
    if sum(rows.nnz for rows in every) * (8 + wide) <= room:
        return graph
    most_escapes = n_rows * (graph.n_units // _ESCAPE + 1)
    n_fitting = max((room - most_escapes) // 3, 1)
    before = np.sort(np.concatenate([_held_before(rows) for rows in every]))
    share = 1.0
    if before.size > n_fitting:
        share = max(float(before[n_fitting]), _LEAST)
    found = graph.sparsified(share)
    less = 1e-12
    while share > _LEAST and sum(rows.nnz for rows in _row_blocks(found)) > n_fitting:
        # Rounding here differs from the rounding there.
        share, less = max(share * (1.0 - less), _LEAST), less * 10.0
        found = graph.sparsified(share)
    return _rounded_down(found)


def _rounded_down(graph: AttributionGraph) -> AttributionGraph:
    """The graph with shares of a half float's digits; what is lost is left out."""

    def rounded(
        rows: csr_array, leak: npt.NDArray[np.float64]
    ) -> tuple[csr_array, npt.NDArray[np.float64]]:
        halves = (rows.data * _SCALE).astype(np.float16)
        above = np.abs(halves).astype(np.float64) > np.abs(rows.data) * _SCALE
        halves[above] = np.nextafter(halves[above], np.float16(0.0))
        values = halves.astype(np.float64) / _SCALE
        found = csr_array((values, rows.indices, rows.indptr), shape=rows.shape)
        held = np.minimum(np.asarray(abs(found).sum(axis=1)).ravel(), 1.0)
        return found, np.where(held > 0.0, held, leak)

    passing, *first = _row_blocks(graph)
    rows, kept = rounded(passing, graph.leak_behind)
    if not first:
        return AttributionGraph(rows, graph.sources, graph.normalization, kept)
    steps = graph.behind.steps
    behind = RowsBehind(steps, csr_array(rows[steps]), kept[steps])
    first_rows, first_kept = rounded(first[0], graph.leak[steps])
    order = np.arange(graph.n_generated)
    order[steps] = graph.n_generated + np.arange(steps.size)
    starting = csr_array(vstack([rows, first_rows], format="csr")[order])
    kept[steps] = first_kept
    return AttributionGraph(starting, graph.sources, graph.normalization, kept, behind)


def _held_before(rows: csr_array) -> npt.NDArray[np.float64]:
    """For each entry, the share of its row's mass that heavier entries hold."""
    shares = [np.zeros(0)]
    mass = np.abs(rows.data)
    for start, stop in pairwise(rows.indptr.tolist()):
        falling = np.sort(mass[start:stop])[::-1]
        held = np.cumsum(falling)
        if stop > start:
            shares.append((held - falling) / held[-1])
    return np.concatenate(shares)


def _row_blocks(graph: AttributionGraph) -> list[csr_array]:
    """Normalised rows of the generated units, and first rows where there are others."""
    passing = graph.normalized(behind=True)
    if graph.behind is None:
        return [passing]
    return [passing, csr_array(graph.normalized()[graph.behind.steps])]


# --- what the script reads -----------------------------------------------------------


def _told(
    explanation: Explanation,
    graph: AttributionGraph,
    whole: AttributionGraph,
    *,
    with_rows: bool = True,
) -> dict[str, Any]:
    """Everything that the script needs, as JSON values."""
    units = explanation.units
    cut = int(graph.generated_units[0])
    texts = [explanation.source_text, explanation.generated_text]
    places = [_utf16_places(text) for text in texts]
    spans = [
        (-1, -1)
        if unit.span is None
        else tuple(places[number >= cut][end] for end in unit.span)
        for number, unit in enumerate(units)
    ]
    return {
        "texts": texts,
        "cut": cut,
        "starts": [start for start, _ in spans],
        "stops": [stop for _, stop in spans],
        "generated": graph.generated_units.tolist(),
        "special": [number for number, unit in enumerate(units) if unit.special],
        "labels": {
            str(number): unit.text
            for number, unit in enumerate(units)
            if unit.span is None
            or unit.text != texts[number >= cut][unit.span[0] : unit.span[1]]
        },
        "levels": _levels(explanation),
        "signed": graph.normalization == "signed",
        "explained": list(explanation.explained),
        "hops": explanation.hops,
        "foiled": sorted({foil.unit for foil in explanation.foils}),
        "whole": graph is whole,
        **(_graph_arrays(graph, graph is not whole) if with_rows else {}),
    }


def _utf16_places(text: str) -> list[int]:
    """Where each character, and the end, stands in a script's string."""
    places = [0]
    for character in text:
        places.append(places[-1] + (2 if ord(character) > 0xFFFF else 1))
    return places


def _levels(explanation: Explanation) -> list[dict[str, Any]]:
    """The units, and the larger ones in which they can be shown."""
    given = str(explanation.meta.get("units"))
    graph = explanation.graph
    levels: list[dict[str, Any]] = [
        {"name": _NAMES.get(given, "units"), "groups": None}
    ]
    for granularity in _LARGER:
        sources, steps = explanation.regrouped(granularity)
        if len(sources) + len(steps) < graph.n_units:
            groups = np.zeros(graph.n_units, dtype=np.int64)
            groups[graph.source_units] = sources.groups
            groups[graph.generated_units] = steps.groups + len(sources)
            levels.append({"name": _NAMES[granularity], "groups": groups.tolist()})
    return levels


def _graph_arrays(graph: AttributionGraph, compact: bool) -> dict[str, Any]:
    """The graph's rows and what they lack."""
    passing, *first = _row_blocks(graph)
    arrays = {
        "compact": compact,
        "rows": {
            **_encoded_rows(passing, compact),
            **_lacks(graph.leak_behind, graph.left_out_behind),
        },
        "first": None,
    }
    if first:
        steps = graph.behind.steps
        arrays["first"] = {
            "steps": steps.tolist(),
            **_encoded_rows(first[0], compact),
            **_lacks(graph.leak[steps], graph.left_out[steps]),
        }
    return arrays


def _encoded_rows(rows: csr_array, compact: bool) -> dict[str, Any]:
    """A sparse matrix; compact, with gaps for columns and half floats for values."""
    if compact:
        columns, kind = _gaps(rows), np.dtype("u1")
        values = _encoded(rows.data * _SCALE, np.dtype("<f2"))
    else:
        columns, kind = rows.indices, _column_type(rows.shape[1])
        values = _encoded(rows.data, np.dtype("<f8"))
    return {
        "indptr": _encoded(rows.indptr, np.dtype("<u4")),
        "columns": _encoded(columns, kind),
        "wide": kind.itemsize,
        "values": values,
    }


def _gaps(rows: csr_array) -> npt.NDArray[np.int64]:
    """Columns as the gaps between them, each as bytes that are summed up to one < 255.

    Example:
        >>> _gaps(csr_array(([1.0] * 3, [2, 3, 600], [0, 3]), shape=(1, 601))).tolist()
        [2, 1, 255, 255, 87]
    """
    gaps = np.diff(rows.indices.astype(np.int64), prepend=0)
    starts = rows.indptr[:-1][np.diff(rows.indptr) > 0]
    gaps[starts] = rows.indices[starts]
    spent = np.full(gaps.size + int((gaps // _ESCAPE).sum()), _ESCAPE, dtype=np.int64)
    spent[np.cumsum(gaps // _ESCAPE + 1) - 1] = gaps % _ESCAPE
    return spent


def _lacks(
    leak: npt.NDArray[np.float64], left_out: npt.NDArray[np.float64]
) -> dict[str, Any]:
    """Rows that leak, and what was left out of each."""
    return {
        "leak": np.flatnonzero(leak).tolist(),
        "left_out": _encoded(left_out, np.dtype("<f8")) if left_out.any() else None,
    }


def _column_type(n_units: int) -> np.dtype[Any]:
    return np.dtype("<u2" if n_units <= 1 << 16 else "<u4")


def _encoded(array: npt.NDArray[Any], kind: np.dtype[Any]) -> str:
    return base64.b64encode(array.astype(kind).tobytes()).decode("ascii")


# --- the page around it --------------------------------------------------------------


def _page_fields(explanation: Explanation, title: str | None) -> dict[str, Any]:
    """What the template shows, but for the numbers."""
    graph, meta = explanation.graph, explanation.meta
    if title is None:
        text = " ".join(" … ".join(explained_texts(explanation)).split())
        if len(text) > _LONGEST_TITLE:
            text = text[: _LONGEST_TITLE - 1] + "…"
        title = f"Where “{text}” comes from" if text else "Where it comes from"
    granularity = meta.get("units", "units")
    facts = {
        "Model": meta.get("model"),
        "Base method": meta.get("method"),
        "Units": f"{granularity}: {graph.n_sources} sources, "
        f"{graph.n_generated} generated",
        "Normalisation": graph.normalization,
        "Contrast": "; ".join(str(foil) for foil in explanation.foils) or None,
        "Made with": f"captum_cage {_made_with(meta)}",
    }
    return {
        "title": harmless(title, one_line=True),
        "facts": {
            name: harmless(str(value), one_line=True)
            for name, value in facts.items()
            if value is not None
        },
    }


def _made_with(meta: Any) -> str:
    versions = meta.get("versions")
    found = versions.get("captum_cage") if isinstance(versions, dict) else None
    return str(found or __version__)


def _rendered(fields: dict[str, Any], told: dict[str, Any]) -> str:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = _asset("page.js"), _asset("page.css")
    return environment.from_string(_asset("page.html.j2")).render(
        **fields,
        script=script,
        style=style,
        script_hash=_hash(script),
        style_hash=_hash(style),
        data=_json(told),
        signed=told["signed"],
        levels=[level["name"] for level in told["levels"]],
        whole=told["whole"],
        mixed=len(told["generated"]) < len(told["starts"]) - told["cut"],
    )


@cache
def _asset(name: str) -> str:
    """A file of the folder of templates."""
    folder = FilePath(__file__).parent / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy calls a script or style by."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _json(value: object) -> str:
    """JSON that cannot end the element it stands in, nor begin another one."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # in ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
