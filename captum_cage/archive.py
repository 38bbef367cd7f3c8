"""Files of a result: arrays with a JSON header (npz, safetensors), or JSON alone."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from captum_cage._checks import complaint, shown, whole_number

__all__ = [
    "LIMIT",
    "Arrays",
    "TooLarge",
    "check_size",
    "not_a_result",
    "read",
    "replacing",
    "writable",
    "write",
]

Arrays = dict[str, npt.NDArray[Any]]

LIMIT = 2**31
"""Bytes that the content of a file may have, unless the reader allows more: 2 GiB."""

_HEADER = "captum_cage"  # its key among the metadata of a safetensors file
_ZIP = b"PK\x03\x04"
_LENGTH = 8  # bytes; a safetensors file begins with the length of its own header
_ENTRIES = 64  # arrays of a file; a result has fewer than twenty
# Those that zipfile unpacks in pieces, so that no entry gives more than it says.
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DENSEST = 1032  # bytes that a byte of a deflated stream can stand for
_KINDS = "?biuf"  # of NumPy's number types: those without objects, which are pickled


class TooLarge(ValueError):
    """A file would take more memory than was allowed for it."""


def writable(where: str, path: str | os.PathLike[str]) -> Path:
    """The path, if a file can be there.

    Args:
        where: the argument, as the user wrote it.
        path: names the file.

    Raises:
        TypeError: if it is no path.
        OSError: if it is a folder, or in none.
    """
    must, remedy = "must name a file that can be written", "Name another file."
    if not isinstance(path, str | os.PathLike):
        raise TypeError(complaint(where, must, f"{shown(path)} came", remedy))
    file = Path(path)
    if file.is_dir():
        came = f"{str(file)!r} came and it is a folder"
        raise IsADirectoryError(complaint(where, must, came, remedy))
    if not file.parent.is_dir():
        came = f"{str(file)!r} came and its folder does not exist"
        raise FileNotFoundError(complaint(where, must, came, remedy))
    return file


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside the one that is meant, which takes its place at the end.

    So that an interrupt leaves no half file, and nobody reads one. A link stays a link
    to the file that changes, and a file keeps its mode. What is no plain file, such as
    a pipe, is written to as it is.

    Raises:
        TypeError: if ``path`` is no path.
        OSError: if it is a folder, or in none, or cannot be written.
    """
    target = Path(os.path.realpath(writable("path", path)))
    if target.exists() and not target.is_file():
        yield target
        return
    partial = target.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write(
    path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Write arrays and a header, without pickle.

    Args:
        path (str or PathLike): the file; an existing one is replaced. A name that ends
            in ``.safetensors`` gets that form, any other one is a NumPy archive.
        header (Mapping): JSON values.
        arrays (Mapping): arrays by name.
    """
    text = json.dumps(header)
    with replacing(path) as partial:
        if Path(path).suffix.lower() == ".safetensors":
            # It writes memory as it lies, so each array must be in C order.
            ordered = {name: np.array(a, order="C") for name, a in arrays.items()}
            partial.write_bytes(save(ordered, {_HEADER: text}))
            return
        encoded = np.frombuffer(text.encode("ascii"), dtype=np.uint8)
        with partial.open("wb") as file:
            np.savez_compressed(file, header=encoded, **arrays)


def read(
    path: str | os.PathLike[str], limit: int | None = LIMIT
) -> tuple[Any, Arrays | None]:
    """The header and the arrays of a file, whatever its name.

    Nothing in it is run, and names in it name arrays, never files. A file that says
    that it is larger than the limit, or that its arrays are, is refused before memory
    is taken for them.

    Args:
        path (str or PathLike): the file.
        limit (int, optional): most bytes of the content, unpacked; None for any
            number. Default: ``LIMIT``

    Returns:
        What the header says, and the arrays; None for JSON, which says it all.

    Raises:
        TypeError: if ``path`` is no path, or ``limit`` no whole number.
        OSError: if the file cannot be read.
        ValueError: if it is of none of the forms, damaged, or larger than the limit.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            complaint(
                "path",
                "must name a file",
                f"{shown(path)} came",
                "Pass where the result was saved.",
            )
        )
    if limit is not None:
        remedy = "Pass a number of bytes, or None for any."
        limit = whole_number("limit", limit, remedy=remedy)
    with Path(path).open("rb") as file:
        begin = file.read(_LENGTH + 1)
        size = file.seek(0, os.SEEK_END)
        check_size(path, size, limit)
        file.seek(0)
        try:
            if begin.startswith(_ZIP):
                return _unpacked(path, file, size, limit)
            if (
                begin[_LENGTH:] == b"{"
                and int.from_bytes(begin[:_LENGTH], "little") <= size - _LENGTH
            ):
                return _tensors(path)
            # No more than was there: what is no plain file may never end.
            return json.loads(file.read(size), parse_constant=_no_number), None
        except TooLarge:
            raise
        except OSError as error:
            # A place that a damaged file names, and that cannot be.
            if error.errno not in (None, errno.EINVAL):
                raise
            raise not_a_result(path) from error
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            EOFError,
            OverflowError,
            RecursionError,
            RuntimeError,  # of zipfile: encrypted, or packed in a way it does not know
            SyntaxError,  # these two are of NumPy, which reads a header as Python
            TokenError,
            struct.error,
            zipfile.BadZipFile,
            zlib.error,
            SafetensorError,
        ) as error:
            raise not_a_result(path) from error


def check_size(path: str | os.PathLike[str], size: int, limit: int | None) -> None:
    """Refuse what takes more memory than was allowed.

    Args:
        path (str or PathLike): the file that it comes from.
        size (int): bytes.
        limit (int, optional): most bytes; None for any number.

    Raises:
        TooLarge: if there are more.
    """
    if limit is not None and size > limit:
        raise TooLarge(
            complaint(
                os.fspath(path),
                f"must take at most {limit:,} bytes of memory when it is read",
                f"it says that it takes {size:,}",
                "If you trust it, pass limit= with more bytes to "
                "GraphAttributionResult.load, or None for any number.",
            )
        )


def _unpacked(
    path: str | os.PathLike[str], file: IO[bytes], size: int, limit: int | None
) -> tuple[Any, Arrays]:
    """The header and the arrays of a NumPy archive, whose sizes are checked first."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if len(entries) > _ENTRIES or len(set(archive.namelist())) < len(entries):
            raise ValueError("There are more entries than a result has, or one twice.")
        # What shares its bytes with another entry, or says more than can be packed.
        if sum(entry.compress_size for entry in entries) > size or any(
            entry.file_size > entry.compress_size * _DENSEST + _DENSEST
            or entry.compress_type not in _PACKINGS
            for entry in entries
        ):
            raise ValueError("An entry is packed as NumPy packs none.")
        check_size(path, sum(entry.file_size for entry in entries), limit)
        arrays = {
            entry.filename.removesuffix(".npy"): _array(archive, entry)
            for entry in entries
        }
    return json.loads(arrays.pop("header").tobytes()), arrays


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> npt.NDArray[Any]:
    """An array of an archive, of the very size that its entry has."""
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        try:
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        except MemoryError as error:  # Python's, of brackets in brackets
            raise ValueError("A header nests too deep.") from error
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in _KINDS or size != entry.file_size - stream.tell():
            raise ValueError("An array has another size than its entry, or no numbers.")
        stream.seek(0)
        array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _tensors(path: str | os.PathLike[str]) -> tuple[Any, Arrays]:
    """The header and the arrays of a safetensors file, which is as large as they."""
    with safe_open(path, "np") as tensors:
        names = list(tensors.keys())
        if len(names) > _ENTRIES:
            raise ValueError("There are more arrays than a result has.")
        header = json.loads(tensors.metadata()[_HEADER])
        return header, {name: tensors.get_tensor(name) for name in names}


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON.")


def not_a_result(path: str | os.PathLike[str]) -> ValueError:
    """The error for a file that is no result."""
    return ValueError(
        f"{os.fspath(path)}: must be a result saved by GraphAttributionResult.save, "
        "but it is not one, or it is damaged. Save it again."
    )
