"""Files of a result: arrays with a JSON header (npz, safetensors), or JSON alone."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from captum_cage._checks import complaint, shown

__all__ = ["Arrays", "not_a_result", "read", "replacing", "writable", "write"]

Arrays = dict[str, npt.NDArray[Any]]

_HEADER = "captum_cage"  # its key among the metadata of a safetensors file
_ZIP = b"PK\x03\x04"
_LENGTH = 8  # bytes; a safetensors file begins with the length of its own header


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


def read(path: str | os.PathLike[str]) -> tuple[Any, Arrays | None]:
    """The header and the arrays of a file, whatever its name.

    Nothing in it is run.

    Returns:
        What the header says, and the arrays; None for JSON, which says it all.

    Raises:
        TypeError: if ``path`` is no path.
        OSError: if the file cannot be read.
        ValueError: if it is of none of the forms, or damaged.
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
    with Path(path).open("rb") as file:
        begin = file.read(_LENGTH + 1)
        size = file.seek(0, os.SEEK_END)
    try:
        if begin.startswith(_ZIP):
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            return json.loads(arrays.pop("header").tobytes()), arrays
        if (
            begin[_LENGTH:] == b"{"
            and int.from_bytes(begin[:_LENGTH], "little") <= size - _LENGTH
        ):
            with safe_open(path, "np") as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
                return json.loads(tensors.metadata()[_HEADER]), arrays
        return json.loads(Path(path).read_bytes(), parse_constant=_no_number), None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        RecursionError,
        zipfile.BadZipFile,
        zlib.error,
        SafetensorError,
    ) as error:
        raise not_a_result(path) from error


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON.")


def not_a_result(path: str | os.PathLike[str]) -> ValueError:
    """The error for a file that is no result."""
    return ValueError(
        f"{os.fspath(path)}: must be a result saved by GraphAttributionResult.save, "
        "but it is not one, or it is damaged. Save it again."
    )
