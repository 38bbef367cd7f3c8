"""What a file of a result holds: a header and arrays, or all of it as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, issparse

from captum_cage._checks import complaint, shown, whole_number
from captum_cage._version import __version__
from captum_cage.archive import (
    LIMIT,
    Arrays,
    TooLarge,
    check_size,
    not_a_result,
    read,
)
from captum_cage.draws import DrawnRows
from captum_cage.explanation import Explanation
from captum_cage.foils import Foil
from captum_cage.graph import AttributionGraph, RowsBehind
from captum_cage.spool import RowSpool
from captum_cage.text import Span, unpaired
from captum_cage.thinking import Part, Thinking
from captum_cage.units import Unit

__all__ = [
    "FORMAT_VERSION",
    "Description",
    "arrays_of",
    "described",
    "header_of",
    "not_a_spool",
    "read_parts",
    "spooled_parts",
]

_FORMAT = "captum_cage.result"
FORMAT_VERSION = 3
"""Of the files that are written. Older ones are read, too: version 1 had complete rows
only, version 2 no foils, no thinking and no draws."""

_READABLE = (1, 2, FORMAT_VERSION)
_CSR = ("data", "indices", "indptr")


# --- writing -------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """What an explanation has besides its rows; its attributes say what they are."""

    units: tuple[Unit, ...]
    explained: tuple[int, ...]
    source_text: str
    generated_text: str
    breaks: tuple[int, ...]
    generated_breaks: tuple[int, ...]
    thinking: Thinking
    foils: tuple[Foil, ...]
    hops: int | None
    meta: Mapping[str, Any]


def header_of(result: Explanation) -> dict[str, Any]:
    """What is no array, as JSON values."""
    return {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        "normalization": result.graph.normalization,
        **described(result),
    }


def described(result: Explanation | Description) -> dict[str, Any]:
    """What an explanation has besides its rows, as JSON values."""
    return {
        "meta": dict(result.meta),
        "source_text": unpaired(result.source_text),
        "generated_text": unpaired(result.generated_text),
        "breaks": list(result.breaks),
        "generated_breaks": list(result.generated_breaks),
        "explained": list(result.explained),
        "hops": result.hops,
        "thinking": {
            "breaks": list(result.thinking.breaks),
            **{
                part.value: [list(span) for span in spans]
                for part, spans in result.thinking.spans.items()
            },
        },
        "foils": [
            [foil.unit, unpaired(foil.target), unpaired(foil.text)]
            for foil in result.foils
        ],
        "units": [
            {
                "text": unpaired(unit.text),
                "generated": unit.generated,
                "span": None if unit.span is None else list(unit.span),
                "special": unit.special,
            }
            for unit in result.units
        ],
    }


def arrays_of(result: Explanation) -> Arrays:
    """The arrays, by name."""
    graph, drawn = result.graph, result.drawn
    arrays: Arrays = {
        "sources": graph.sources,
        "kept": graph.kept,
        "rows_sparse": np.array(issparse(graph.rows)),
        **_csr_arrays("rows", csr_array(graph.rows)),
    }
    if result.output_probs is not None:
        arrays["output_probs"] = result.output_probs.numpy()
    if graph.behind is not None:
        arrays |= _csr_arrays("behind", graph.behind.rows)
        arrays["behind_steps"] = graph.behind.steps
        arrays["behind_kept"] = graph.behind.kept
    if drawn is not None:
        arrays["drawn_rows"] = drawn.rows
        arrays["drawn_steps"] = drawn.steps
        arrays["drawn_behind"] = drawn.behind
    return arrays


def _csr_arrays(name: str, rows: csr_array) -> Arrays:
    """The arrays of a sparse matrix, as they are saved."""
    arrays = {f"{name}_{part}": getattr(rows, part) for part in _CSR}
    return {**arrays, f"{name}_shape": np.array(rows.shape)}


# --- reading -------------------------------------------------------------------------


def read_parts(
    path: str | os.PathLike[str], limit: int | None = LIMIT
) -> dict[str, Any]:
    """The arguments that a result is made of, from a file of any form.

    Args:
        path (str or PathLike): the file.
        limit (int, optional): most bytes of its content, and of the rows that are made
            of it; None for any number. Default: ``LIMIT``

    Raises:
        TypeError: if ``path`` is no path, or ``limit`` no whole number.
        OSError: if the file cannot be read.
        ValueError: if it is no saved result, of an unknown version, or larger than the
            limit.
    """
    header, found = read(path, limit)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise not_a_result(path)
    version = header.get("version")
    # By its type, too: True is 1 for Python, and no version of ours.
    if type(version) is not int or version not in _READABLE:
        raise ValueError(_other_version(path, header))
    try:
        arrays = _listed_arrays(header) if found is None else found
        if version == 1 or not arrays["rows_sparse"]:
            # They are saved by their entries, so a small file may have large rows.
            count = (arrays["rows_indptr"].size - 1) * arrays["sources"].size
            check_size(path, count * np.dtype(np.float64).itemsize, limit)
        return _parts(header, arrays, _graph(header, arrays))
    except TooLarge:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise not_a_result(path) from error


def spooled_parts(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments that a result is made of, from a spool of rows.

    Args:
        folder (str or PathLike): where the spool is.

    Raises:
        TypeError: if ``folder`` is no path.
        OSError: if it cannot be read.
        ValueError: if it is no spool, of an unknown version, or damaged.
    """
    spool = RowSpool.read(folder)
    try:
        header = {"version": FORMAT_VERSION, **spool.header["explanation"]}
        return _parts(header, {}, spool.graph())
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise not_a_spool(folder) from error


def not_a_spool(folder: str | os.PathLike[str]) -> ValueError:
    """The error for a folder whose rows or header make no result."""
    return ValueError(
        complaint(
            f"{os.fspath(folder)}",
            "must be a spool of rows",
            "it is damaged",
            "Delete it and begin anew.",
        )
    )


def _other_version(path: str | os.PathLike[str], header: Mapping[str, Any]) -> str:
    """The error for a file that a later package wrote, or none."""
    version, meta = header.get("version"), header.get("meta")
    versions = meta.get("versions") if isinstance(meta, dict) else None
    known = versions.get("captum_cage") if isinstance(versions, dict) else None
    wrote = f", saved by captum_cage {known:.40}" if isinstance(known, str) else ""
    remedy = "Load it with the captum_cage that saved it."
    if type(version) is int and version > FORMAT_VERSION:
        remedy = (
            f"It is newer than this captum_cage, {__version__}. Run: "
            "pip install --upgrade captum-cage"
        )
    return complaint(
        os.fspath(path),
        f"must be a result of format version {' or '.join(map(str, _READABLE))}",
        f"version {version if type(version) is int else shown(version)} came{wrote}",
        remedy,
    )


def _parts(
    header: Mapping[str, Any], arrays: Arrays, graph: AttributionGraph
) -> dict[str, Any]:
    texts = str(header["source_text"]), str(header["generated_text"])
    probs = arrays.get("output_probs")
    n_steps, remedy = graph.n_generated, "Save it again."
    foils = [
        Foil(
            whole_number("foil", step, stop=n_steps, remedy=remedy),
            str(target),
            str(text),
        )
        for step, target, text in header.get("foils", ())
    ]
    return {
        "graph": graph,
        "units": _units(header, graph, texts),
        "explained": header["explained"],
        "source_text": texts[0],
        "generated_text": texts[1],
        "output_probs": probs,
        "breaks": [int(end) for end in header["breaks"]],
        "generated_breaks": [int(end) for end in header.get("generated_breaks", ())],
        "meta": header["meta"],
        "hops": None if header["version"] == 1 else header["hops"],
        "thinking": _thinking(header.get("thinking", {})),
        "foils": foils,
        "drawn": _drawn(arrays, graph),
    }


def _graph(header: Mapping[str, Any], arrays: Arrays) -> AttributionGraph:
    rows = _csr_of("rows", arrays)
    if rows.shape[1:] != arrays["sources"].shape:
        raise ValueError("Rows and sources differ.")  # before more of that size is made
    behind = None
    if "behind_steps" in arrays:
        behind = RowsBehind(
            arrays["behind_steps"], _csr_of("behind", arrays), arrays["behind_kept"]
        )
    first = header["version"] == 1
    return AttributionGraph.from_rows(
        rows if not first and arrays["rows_sparse"] else rows.toarray(),
        arrays["sources"],
        header["normalization"],
        kept=None if first else arrays["kept"],
        behind=behind,
    )


def _drawn(arrays: Arrays, graph: AttributionGraph) -> DrawnRows | None:
    if "drawn_rows" not in arrays:
        return None
    drawn = DrawnRows(
        arrays["drawn_rows"],
        arrays["drawn_steps"],
        arrays["drawn_behind"],
        graph.sources,
        graph.normalization,
    )
    drawn.mean_graph()  # which checks the arrays
    return drawn


def _thinking(marked: Mapping[str, Any]) -> Thinking:
    spans = {
        part: tuple(_pair(span) for span in marked.get(part.value, ())) for part in Part
    }
    return Thinking(spans, tuple(int(end) for end in marked.get("breaks", ())))


def _units(
    header: Mapping[str, Any], graph: AttributionGraph, texts: tuple[str, str]
) -> list[Unit]:
    """The units, each within its text."""
    units = [
        Unit(unit["text"], unit["generated"], unit["span"], unit["special"])
        for unit in header["units"]
    ]
    if [not unit.generated for unit in units] != graph.sources.tolist():
        raise ValueError("Units and sources differ.")
    cut = int(graph.generated_units[0])
    for place, unit in enumerate(units):
        start, stop = unit.span or (0, 0)
        if not 0 <= start <= stop <= len(texts[place >= cut]):
            raise ValueError("A unit stands outside its text.")
    return units


def _listed_arrays(header: Mapping[str, Any]) -> Arrays:
    """The arrays of a result that was written as JSON, as they are in other files."""
    sources = np.array([not unit["generated"] for unit in header["units"]], dtype=bool)
    rows = _numbers(header["rows"])
    kept = header["kept"]
    arrays = {
        "sources": sources,
        "kept": np.ones(len(rows)) if kept is None else _numbers(kept),
        "rows_sparse": np.array(bool(header.get("rows_sparse", False))),
        **_csr_arrays("rows", csr_array(rows)),
    }
    if header["output_probs"] is not None:
        arrays["output_probs"] = _numbers(header["output_probs"])
    if (behind := header.get("behind")) is not None:
        arrays |= _csr_arrays("behind", csr_array(_numbers(behind["rows"])))
        arrays["behind_steps"] = np.array(behind["steps"], dtype=np.int64)
        arrays["behind_kept"] = _numbers(behind["kept"])
    if (drawn := header.get("drawn")) is not None:
        arrays["drawn_rows"] = _numbers(drawn["rows"])
        arrays["drawn_steps"] = np.array(drawn["steps"], dtype=np.int64)
        count = len(arrays["drawn_rows"]), len(drawn["steps"]), len(sources)
        arrays["drawn_behind"] = _numbers(drawn["behind"]).reshape(count)
    return arrays


def _numbers(values: Any) -> npt.NDArray[np.float64]:
    return np.array(values, dtype=np.float64)


def _csr_of(name: str, arrays: Mapping[str, Any]) -> csr_array:
    """A sparse matrix from its arrays; raises where they are none."""
    parts = tuple(arrays[f"{name}_{part}"] for part in _CSR)
    _, indices, ends = parts
    # SciPy reads beyond its arrays where the last end is 0 and others are not.
    if (
        {indices.dtype.kind, ends.dtype.kind} - set("iu")
        or ends.ndim != 1
        or ends[0] != 0
        or (np.diff(ends.astype(np.int64)) < 0).any()
    ):
        raise ValueError("The ends of rows must rise from 0.")
    rows = csr_array(parts, shape=tuple(int(n) for n in arrays[f"{name}_shape"]))
    rows.check_format()
    return rows


def _pair(value: Any) -> Span:
    start, stop = value
    return int(start), int(stop)
