"""Finished rows on disk, as they come: what a killed call leaves behind.

A spool is a folder of three files. ``spool.json`` says what the rows belong to,
``rows.bin`` holds them one behind the other, and ``lock`` is held by the process that
writes. Rows are appended and never changed. A record is

    magic, kind, form, step, kept, entries, checksum of the body, checksum of this head
    the values, float64
    their units, int32, filled up to whole 8 bytes; only where the form says so

all little-endian, so that a record whose writing was cut short is known by its length
or a checksum, and left out. Together the records are the rows of a CSR array in the
order in which they were finished, and they are read through a memory map. Nothing in a
spool is run, and nothing in it makes more memory than it has bytes itself, but for one
row.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from scipy.sparse import csr_array

from captum_cage._checks import complaint, shown
from captum_cage.archive import replacing
from captum_cage.graph import AttributionGraph, Normalization, RowsBehind
from captum_cage.streamed import RawRow, StreamedGraph

__all__ = [
    "SPOOL_VERSION",
    "OtherRows",
    "RowSpool",
    "SpooledRows",
    "StoredRow",
    "folder_of",
    "has_rows",
    "header_in",
    "rows_in",
]

SPOOL_VERSION = 1
"""Of the folders that are written and read."""

StoredRow: TypeAlias = tuple[
    npt.NDArray[np.float64], npt.NDArray[np.int64] | None, float
]
"""Values, their units (None: one value for each unit), share of the mass that they
hold."""

_FORMAT = "captum_cage.spool"
_HEADER, _ROWS, _LOCK = "spool.json", "rows.bin", "lock"
_MAGIC = b"CCR1"
_HEAD = struct.Struct("<4sHHqdQI")
_SUM = struct.Struct("<I")
_SIZE = _HEAD.size + _SUM.size  # 40: values stay aligned to 8 bytes
_PLAIN, _START = 0, 1  # kinds of rows: mass passes by it, an explanation starts by it
_LISTED, _WHOLE = 1, 2  # form: units are listed; a value not given is zero
_MOST_UNITS = 2**31 - 1
_MOST_HEADER = 2**30
_REMEDY = "Name another folder, or delete this one to begin anew."


class OtherRows(ValueError):
    """A folder holds rows of another explanation, damaged ones, or something else."""


class _Record(NamedTuple):
    """Where a row lies, and what it is."""

    kind: int
    form: int
    step: int
    kept: float
    size: int
    start: int  # of its values

    @property
    def stop(self) -> int:
        """The byte after its last one."""
        return self.start + _body(self.form, self.size)


def _body(form: int, count: int) -> int:
    """Bytes that stand behind the head of a record."""
    return 8 * count + (-(-count // 2) * 8 if form & _LISTED else 0)


def _packed(kind: int, step: int, row: StoredRow) -> bytes:
    """A row as a record."""
    values, units, kept = row
    form = _LISTED
    if units is None:
        form = _WHOLE
        filled = np.flatnonzero(values)
        stop = int(filled[-1]) + 1 if filled.size else 0
        if 3 * filled.size < 2 * stop:
            form, units, values = _WHOLE | _LISTED, filled, values[filled]
        else:
            values = values[:stop]
    body = np.ascontiguousarray(values, dtype="<f8").tobytes()
    if units is not None:
        listed = np.ascontiguousarray(units, dtype="<i4").tobytes()
        body += listed + b"\0" * (-len(listed) % 8)
    count = len(values)
    head = _HEAD.pack(_MAGIC, kind, form, step, kept, count, zlib.crc32(body))
    return head + _SUM.pack(zlib.crc32(head)) + body


def rows_in(data: Any, width: int, steps: int, where: str = "rows") -> list[_Record]:
    """The records of a file of rows, from its bytes, each checked.

    What the last writing left unfinished is not among them: a record that is shorter
    than it says, a last one with another checksum, or zeros that the system put in its
    place.

    Args:
        data: anything that gives its bytes, such as bytes or a memory map.
        width: number of units, ``N``.
        steps: number of steps, which come last among the units.
        where: names the file in errors.

    Raises:
        ValueError: if anything else is not as it was written.
    """
    view = memoryview(data)
    found: list[_Record] = []
    place, end = 0, len(view)
    if end == 0:
        return found
    every = np.frombuffer(view, np.uint8)
    while place < end:
        rest = end - place
        head = bytes(view[place : place + _SIZE])
        if rest < _SIZE:
            break
        whole = zlib.crc32(head[: _HEAD.size]) == _SUM.unpack(head[_HEAD.size :])[0]
        if not whole or head[:4] != _MAGIC:
            if not every[place:].any():
                break
            raise _damaged(where, f"no row begins at byte {place}")
        _, kind, form, step, kept, count, check = _HEAD.unpack(head[: _HEAD.size])
        record = _Record(kind, form, step, kept, count, place + _SIZE)
        if (
            kind not in (_PLAIN, _START)
            or form not in (_LISTED, _WHOLE, _LISTED | _WHOLE)
            or not 0 <= step < steps
            or not 0.0 < kept <= 1.0
            or count > width
        ):
            raise _damaged(where, f"the row at byte {place} is none of these units")
        torn = record.stop > end
        if torn or zlib.crc32(view[record.start : record.stop]) != check:
            if not every[record.stop :].any():
                break
            raise _damaged(where, f"the row at byte {place} has another checksum")
        values, units = _entries(view, record)
        own = width - steps + step
        if not np.isfinite(values).all() or (
            count
            and (units[0] < 0 or units[-1] >= own or not (np.diff(units) > 0).all())
        ):
            raise _damaged(where, f"the row at byte {place} is no row")
        found.append(record)
        place = record.stop
    return found


def _entries(
    view: Any, record: _Record
) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    """The values of a record and their units, without a copy of what lies there."""
    values = np.frombuffer(view, "<f8", record.size, record.start)
    if not record.form & _LISTED:
        return values, np.arange(record.size)
    units = np.frombuffer(view, "<i4", record.size, record.start + 8 * record.size)
    return values, units


def _damaged(where: str, came: str) -> OtherRows:
    return OtherRows(
        complaint(where, "must hold rows as they were written", came, _REMEDY)
    )


class RowSpool:
    """The finished rows of one explanation, in a folder.

    Make one with `open`, to write and read, or with `read`, to read what is there.

    Attributes:
        folder (Path): where it is.
        header (Mapping): what the rows belong to: under ``"belongs"`` a short text for
            each thing that they depend on; ``"prompt_units"``, how many units stand
            before the first step; ``"normalization"``; and under ``"explanation"`` what
            a saved result has besides its rows, its ``"units"`` first of all.
    """

    def __init__(
        self,
        folder: Path,
        header: Mapping[str, Any],
        writer: FileIO | None,
        lock: FileLock | None,
    ) -> None:
        self.folder = folder
        self.header = header
        self._writer, self._lock = writer, lock
        self._map: Any = b""
        self._found: dict[tuple[int, int], _Record] = {}
        self._generated = [unit["generated"] for unit in header["explanation"]["units"]]
        if (folder / _ROWS).stat().st_size:
            self._remap()
        where = str(folder / _ROWS)
        for record in rows_in(self._map, self.width, self._steps, where):
            self._found[record.kind, record.step] = record
        if writer is not None:  # what was left unfinished makes room
            stops = (record.stop for record in self._found.values())
            writer.truncate(max(stops, default=0))

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], header: Mapping[str, Any]
    ) -> RowSpool:
        """The spool of these rows in a folder, which is made where there is none.

        Args:
            folder: where it is, or is to be.
            header: what the rows belong to, see the class; JSON values.

        Raises:
            TypeError: if ``folder`` is no path.
            ValueError: if the folder holds something else, rows of another explanation,
                which the error names, or damaged ones.
            OSError: if it cannot be written, or another process writes to it.
        """
        place = folder_of("spool", folder)
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise BlockingIOError(
                complaint(
                    "spool",
                    "must be a folder that no other call is writing to",
                    f"{str(place)!r} came and one is",
                    "Wait for it to end, or name another folder.",
                )
            ) from error
        try:
            text = json.dumps({"format": _FORMAT, "version": SPOOL_VERSION, **header})
            written = header_in(text, str(place))
            found = _header_of(place) if (place / _HEADER).exists() else None
            if found is None:
                _check_free(place)
            else:
                _check_same(found, written, place)
            if found != written:
                with replacing(place / _HEADER) as partial:
                    partial.write_text(text, encoding="ascii")
            writer = (place / _ROWS).open("ab", buffering=0)
            try:
                spool = cls(place, written, writer, lock)
            except BaseException:
                writer.close()
                raise
        except BaseException:
            lock.release()
            raise
        return spool

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RowSpool:
        """The rows that a folder holds by now; another process may be writing to it.

        Raises:
            TypeError: if ``folder`` is no path.
            OSError: if it cannot be read.
            ValueError: if it is no spool, of an unknown version, or damaged.
        """
        place = folder_of("spool", folder)
        header = _header_of(place)
        if not (place / _ROWS).exists():
            raise _damaged(str(place), f"it has no {_ROWS}")
        return cls(place, header, None, None)

    @property
    def width(self) -> int:
        """Number of units, ``N``."""
        return len(self._generated)

    @property
    def _steps(self) -> int:
        """Number of units that follow the prompt."""
        return self.width - int(self.header["prompt_units"])

    @property
    def rows(self) -> SpooledRows:
        """The rows that mass passes by, by step."""
        return SpooledRows(self, _PLAIN)

    @property
    def starts(self) -> SpooledRows:
        """The contrastive rows that an explanation starts by, by step."""
        return SpooledRows(self, _START)

    def close(self) -> None:
        """Bring all that was written to the disk and let others write; twice is once.

        What was read stays readable.
        """
        if self._writer is not None:
            try:
                os.fsync(self._writer.fileno())
            finally:
                self._writer.close()
                self._writer = None
                if self._lock is not None:
                    self._lock.release()

    def __enter__(self) -> RowSpool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def has(self, kind: int, step: int) -> bool:
        """Whether a step has a row of a kind."""
        return (kind, step) in self._found

    def steps(self, kind: int) -> list[int]:
        """Steps that have a row of a kind, rising."""
        return sorted(step for one, step in self._found if one == kind)

    def add(self, kind: int, step: int, row: StoredRow) -> None:
        """Append a row.

        Raises:
            OSError: if it cannot be written; what was written before stays.
            ValueError: if the spool is closed.
        """
        if self._writer is None:
            raise ValueError("spool: must be open to take a row, but it is closed.")
        data = memoryview(_packed(kind, step, row))
        begin = self._writer.seek(0, os.SEEK_END)
        try:
            left = data
            while left:
                left = left[self._writer.write(left) :]
        except BaseException:
            # A disk that is full or an interrupt: no half row stays.
            self._writer.truncate(begin)
            raise
        _, _, form, _, kept, count, _ = _HEAD.unpack(data[: _HEAD.size])
        record = _Record(kind, form, step, kept, count, begin + _SIZE)
        self._found[kind, step] = record

    def entries(self, kind: int, step: int) -> RawRow | None:
        """The entries of a row that are not zero; None if there is none such row."""
        record = self._found.get((kind, step))
        if record is None:
            return None
        values, units = _entries(self._mapped(record.stop), record)
        filled = values != 0.0
        return RawRow(units[filled], values[filled], record.kept)

    def stored(self, kind: int, step: int) -> StoredRow:
        """A row as it was given.

        Raises:
            KeyError: if there is none such row.
        """
        record = self._found[kind, step]
        values, units = _entries(self._mapped(record.stop), record)
        if not record.form & _WHOLE:
            return values, units.astype(np.int64), record.kept
        row = np.zeros(self.width)
        row[units] = values
        return row, None, record.kept

    def _mapped(self, stop: int) -> Any:
        """The bytes of the rows, up to one at least."""
        if stop > len(self._map):
            self._remap()
        return self._map

    def _remap(self) -> None:
        with (self.folder / _ROWS).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def written(self) -> npt.NDArray[np.int64]:
        """Steps that the model wrote, rising, shape ``(G,)``, int64."""
        before = int(self.header["prompt_units"])
        return np.flatnonzero(self._generated[before:]).astype(np.int64)

    @property
    def is_source(self) -> npt.NDArray[np.bool_]:
        """Whether a unit is a source, shape ``(N,)``."""
        return ~np.array(self._generated, dtype=np.bool_)

    def streamed(self) -> StreamedGraph:
        """Questions to the rows as they lie on the disk, in memory for one row."""
        written = self.written.tolist()
        place = {step: row for row, step in enumerate(written)}
        starts = {
            place[step]: row
            for step in self.steps(_START)
            if (row := self.entries(_START, step)) is not None
        }
        return StreamedGraph(
            lambda row: self.entries(_PLAIN, written[row]),
            self.is_source,
            self.header["normalization"],
            starts=starts,
        )

    def graph(self) -> AttributionGraph:
        """The graph of the rows; those that are not here are ``left_out``."""
        written = self.written.tolist()
        kinds = [
            _START if (_START, step) in self._found else _PLAIN for step in written
        ]
        rows, kept = self._csr(kinds, written)
        behind = None
        started = [step for step in written if (_START, step) in self._found]
        if started:
            places = np.searchsorted(written, started).astype(np.int64)
            behind = RowsBehind(places, *self._csr([_PLAIN] * len(started), started))
        return AttributionGraph.from_rows(
            rows,
            self.is_source,
            self.header["normalization"],
            kept=kept,
            behind=behind,
        )

    def _csr(
        self, kinds: list[int], steps: list[int]
    ) -> tuple[csr_array, npt.NDArray[np.float64]]:
        """Some rows as one array, and what they kept, in two passes over them."""
        counts, kept = np.zeros(len(steps), dtype=np.int64), np.zeros(len(steps))
        for place, key in enumerate(zip(kinds, steps, strict=True)):
            row = self.entries(*key)
            if row is not None:
                counts[place], kept[place] = len(row.units), row.kept
        ends = np.concatenate([[0], np.cumsum(counts)])
        data, indices = np.empty(ends[-1]), np.empty(ends[-1], dtype=np.int32)
        for place, key in enumerate(zip(kinds, steps, strict=True)):
            row = self.entries(*key)
            if row is not None:
                part = slice(ends[place], ends[place + 1])
                data[part], indices[part] = row.values, row.units
        shape = (len(steps), self.width)
        return csr_array((data, indices, ends), shape=shape), kept


class SpooledRows(MutableMapping[int, StoredRow]):
    """The rows of one kind, by step; a row that is set is on the disk."""

    def __init__(self, spool: RowSpool, kind: int) -> None:
        self._spool, self._kind = spool, kind

    def __getitem__(self, step: int) -> StoredRow:
        return self._spool.stored(self._kind, step)

    def __setitem__(self, step: int, row: StoredRow) -> None:
        self._spool.add(self._kind, step, row)

    def __delitem__(self, step: int) -> None:
        raise TypeError("spool: must keep its rows, but one was to be deleted.")

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and self._spool.has(self._kind, step)

    def __iter__(self) -> Iterator[int]:
        return iter(self._spool.steps(self._kind))

    def __len__(self) -> int:
        return len(self._spool.steps(self._kind))


# --- what the rows belong to ---------------------------------------------------------


def header_in(data: str | bytes, where: str = "spool") -> dict[str, Any]:
    """What rows belong to, from the bytes of ``spool.json``, checked.

    Args:
        data: the text of the file.
        where: names it in errors.

    Raises:
        ValueError: if it is none, or of an unknown version.
    """
    must = "must be a spool of rows"
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as error:
        came = "its header is no JSON"
        raise OtherRows(complaint(where, must, came, _REMEDY)) from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise OtherRows(complaint(where, must, "it is something else", _REMEDY))
    if header.get("version") != SPOOL_VERSION:
        raise OtherRows(
            complaint(
                where,
                f"must be a spool of format version {SPOOL_VERSION}",
                f"version {shown(header.get('version'))} came",
                "Read it with the captum_cage that wrote it, or name another folder.",
            )
        )
    if not _is_whole(header):
        raise OtherRows(complaint(where, must, "its header is damaged", _REMEDY))
    return header


def _is_whole(header: Mapping[str, Any]) -> bool:
    """Whether all is there that a spool reads itself."""
    belongs, explanation = header.get("belongs"), header.get("explanation")
    units = explanation.get("units") if isinstance(explanation, dict) else None
    before = header.get("prompt_units")
    return (
        isinstance(belongs, dict)
        and all(isinstance(value, str) for value in belongs.values())
        and isinstance(units, list)
        and all(
            isinstance(unit, dict) and isinstance(unit.get("generated"), bool)
            for unit in units
        )
        and type(before) is int
        and 0 <= before < len(units) <= _MOST_UNITS
        and not any(unit["generated"] for unit in units[:before])
        and header.get("normalization") in get_args(Normalization)
    )


def _header_of(folder: Path) -> dict[str, Any]:
    try:
        with (folder / _HEADER).open("rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            complaint(
                "spool",
                "must be a folder that holds a spool",
                f"{str(folder)!r} has no {_HEADER}",
                "Name the folder that was passed to attribute.",
            )
        ) from error
    return header_in(data, str(folder))


def _check_same(
    found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path
) -> None:
    """Refuse rows of another explanation, and say what is another."""
    ours, theirs = wanted["belongs"], found["belongs"]
    differ = [
        name
        for name in [*ours, *(set(theirs) - set(ours))]
        if ours.get(name) != theirs.get(name)
    ]
    for name in differ[:1]:
        values = [given.get(name, "nothing") for given in (theirs, ours)]
        several = ", ".join(differ)
        raise OtherRows(
            complaint(
                "spool",
                "must hold rows of the same model, text and settings",
                f"{str(folder)!r} holds others: {several} differ"
                f"{'s' if len(differ) == 1 else ''} ({values[0]} there, {values[1]} "
                f"now{'' if len(differ) == 1 else ', the first of them'})",
                _REMEDY,
            )
        )


def _check_free(folder: Path) -> None:
    """Refuse a folder of something else."""
    other = sorted({one.name for one in folder.iterdir()} - {_LOCK})
    # A process that was killed while it wrote the header left a part of it.
    other = [name for name in other if not name.endswith(".partial")]
    if other:
        raise OtherRows(
            complaint(
                "spool",
                "must name a folder that holds a spool, or nothing",
                f"{str(folder)!r} came, with {other[0]!r} in it",
                "Name another folder.",
            )
        )


def has_rows(folder: Path) -> bool:
    """Whether a folder holds rows, whatever they belong to."""
    rows = folder / _ROWS
    return rows.exists() and rows.stat().st_size > 0


def folder_of(where: str, folder: Any) -> Path:
    """The path of a folder, which need not exist.

    Args:
        where: the argument, as the user wrote it.
        folder: names it.

    Raises:
        TypeError: if it is no path.
        NotADirectoryError: if it is a file.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(
            complaint(
                where,
                "must name a folder",
                f"{shown(folder)} came",
                "Name one that is empty, or is to be made.",
            )
        )
    place = Path(folder)
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(
            complaint(
                where,
                "must name a folder",
                f"{str(place)!r} came and it is a file",
                "Name another one.",
            )
        )
    return place
