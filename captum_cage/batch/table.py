"""The table of scores: one row for each example and source unit, in Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from captum_cage.explanation import Explanation, explained_texts

__all__ = ["COLUMNS", "parquet", "score_columns", "write_part", "write_table"]

COLUMNS: dict[str, tuple[str, str]] = {
    "key": ("string", "hash of the example, as in the manifest and in file names"),
    "id": ("string", "the example's own name, or null"),
    "position": ("int64", "its place in the input, from 0"),
    "line": ("int64", "its line in a file of lines, from 1, or null"),
    "unit": ("int64", "the source unit, from 0"),
    "text": ("string", "its text"),
    "start": ("int64", "its first character in the prompt's text, or null"),
    "stop": ("int64", "the character after its last, or null"),
    "score": ("float64", "mass of all paths from the explained units to it"),
    "direct": ("float64", "the same of the explained units' own rows"),
    "explained": ("string", "the explained text"),
    "n_explained": ("int64", "number of explained units, which is the mass"),
    "leaked": ("float64", "mass that ends in rows without mass"),
    "unresolved": ("float64", "mass that was left open"),
    "method": ("string", "the base method"),
}
"""Type and meaning of each column of ``scores.parquet``; those of an example's own
scalars follow, by the name ``meta.`` and theirs."""

_OF_PLACE = ("id", "position", "line")
_ROWS = 2**16  # of a row group


def parquet() -> Any:
    """The module that reads and writes Parquet.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "captum_cage.batch: its table needs pyarrow: pip install captum-cage[scale]"
        ) from error
    return pq


def _arrow() -> Any:
    try:
        import pyarrow as pa  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "captum_cage.batch: its table needs pyarrow: pip install captum-cage[scale]"
        ) from error
    return pa


def score_columns(result: Explanation) -> dict[str, list[Any]]:
    """The rows of one result: a column for each name, of ``P`` values.

    Args:
        result (GraphAttributionResult): the result.
    """
    sources = [unit for unit in result.units if not unit.generated]
    spans = [unit.span or (None, None) for unit in sources]
    shared = {
        "explained": _clean("".join(explained_texts(result))),
        "n_explained": len(result.explained),
        "leaked": result.leaked,
        "unresolved": result.unresolved,
        "method": _clean(str(result.meta.get("method", ""))),
    }
    return {
        "unit": list(range(len(sources))),
        "text": [_clean(unit.text) for unit in sources],
        "start": [start for start, _ in spans],
        "stop": [stop for _, stop in spans],
        "score": result.seq_attr.tolist(),
        "direct": result.direct.seq_attr.tolist(),
        **{name: [value] * len(sources) for name, value in shared.items()},
    }


def write_part(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write the rows of one result."""
    pa = _arrow()
    schema = pa.schema([(name, _type(COLUMNS[name][0])) for name in columns])
    parquet().write_table(pa.table(dict(columns), schema=schema), path)


def write_table(
    path: Path,
    parts: Iterable[tuple[Mapping[str, Any], Any]],
    meta: Mapping[str, type],
) -> None:
    """Write the whole table, some rows in memory at a time.

    Args:
        path (Path): the file.
        parts (Iterable): for each example what stands in all its rows, ``meta`` as a
            mapping, and its rows as an Arrow table.
        meta (Mapping[str, type]): type of each of the examples' own scalars.
    """
    pa = _arrow()
    names = {name: kind for name, (kind, _) in COLUMNS.items()}
    own = {f"meta.{name}": _NAMES[kind] for name, kind in meta.items()}
    schema = pa.schema([(n, _type(k)) for n, k in (names | own).items()])
    schema = schema.with_metadata({"captum_cage": "scores, version 1"})
    with parquet().ParquetWriter(path, schema) as writer:
        for tables in _groups(_complete(parts, meta, schema)):
            writer.write_table(pa.concat_tables(tables))


def _complete(
    parts: Iterable[tuple[Mapping[str, Any], Any]],
    meta: Mapping[str, type],
    schema: Any,
) -> Iterator[Any]:
    pa = _arrow()
    for shared, rows in parts:
        found = {name: shared[name] for name in ("key", *_OF_PLACE)}
        for name, kind in meta.items():
            value = shared["meta"].get(name)
            found[f"meta.{name}"] = None if value is None else kind(value)
        columns = [
            pa.array([found[field.name]] * len(rows), field.type)
            if field.name in found
            else rows[field.name].cast(field.type)
            for field in schema
        ]
        yield pa.table(columns, schema=schema)


def _groups(tables: Iterable[Any]) -> Iterator[list[Any]]:
    """Tables that make a row group each."""
    group: list[Any] = []
    count = 0
    for table in tables:
        group.append(table)
        count += len(table)
        if count >= _ROWS:
            yield group
            group, count = [], 0
    if group:
        yield group


_NAMES: dict[type, str] = {
    bool: "bool",
    int: "int64",
    float: "float64",
    str: "string",
}


def _type(name: str) -> Any:
    """A type of Arrow by the name that stands in ``COLUMNS``."""
    return _arrow().type_for_alias(name)


def _clean(text: str) -> str:
    """A text that UTF-8 has a form for: half a surrogate pair is written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
