"""The directory of a batch: manifest, claims, results, errors, each whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from captum_cage._checks import complaint, shown
from captum_cage.batch.table import score_columns, write_part
from captum_cage.result import GraphAttributionResult
from captum_cage.spool import has_rows

__all__ = [
    "FORMAT_VERSION",
    "Directory",
    "Failure",
    "Input",
    "Manifest",
    "Place",
    "read_failure",
    "read_manifest",
]

FORMAT_VERSION = 1
"""Of the directories that are written."""

_FORMAT = "captum_cage.batch"
_KEY = re.compile(r"[0-9a-f]{32}")
_STATUS = ("done", "failed", "open")
_SLOT = 3  # digits of a key; 4,096 lock files at most
_MOST_BYTES = 2**31  # of a manifest: some millions of inputs


# --- what the files say --------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where an example stands in the input.

    Attributes:
        position (int): from 0.
        line (int or None): in a file of lines, from 1.
        id (str or None): its name.
        meta (Mapping): the scalars of what else is known of it.
    """

    position: int
    line: int | None = None
    id: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why an example has no result.

    Attributes:
        key (str): hash of the example.
        type (str): name of the exception's class.
        message (str): what it says.
        position (int or None): where the example was first seen, from 0.
        line (int or None): in a file of lines, from 1.
        id (str or None): its name.
        traceback (str): where it was raised; empty for what could not be read.
    """

    key: str
    type: str
    message: str
    position: int | None = None
    line: int | None = None
    id: str | None = None
    traceback: str = ""


@dataclass(frozen=True)
class Input:
    """What is known of one example.

    Attributes:
        status (str): ``"done"``, ``"failed"`` or ``"open"``.
        places (tuple[Place, ...]): where it stands; several, if it was given again.
    """

    status: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Manifest:
    """What a directory of results was made from.

    Attributes:
        versions (Mapping): of captum_cage, captum, torch, transformers and Python.
        settings (Mapping): what every result of the directory shares.
        inputs (Mapping[str, Input]): by the hash of the example.
    """

    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    inputs: Mapping[str, Input] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The text of its file, which :func:`read_manifest` reads."""
        header = {
            "format": _FORMAT,
            "version": FORMAT_VERSION,
            "versions": dict(self.versions),
            "settings": dict(self.settings),
        }
        inputs = ",\n".join(
            f"{json.dumps(key)}: {json.dumps(asdict(one), allow_nan=False)}"
            for key, one in self.inputs.items()
        )
        text = json.dumps(header, indent=1, allow_nan=False)
        return f'{text[:-2]},\n "inputs": {{\n{inputs}\n}}}}\n'.encode("ascii")


def read_manifest(data: bytes, where: str = "manifest.json") -> Manifest:
    """What a manifest says, checked.

    Args:
        data (bytes): the whole file.
        where (str, optional): its name, for errors. Default: ``"manifest.json"``

    Raises:
        ValueError: if it is no manifest, damaged, or of an unknown version.
    """
    header = _json_of(where, data)
    if header.get("format") != _FORMAT:
        raise _damaged(where)
    version = header.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            complaint(
                where,
                f"must be of format version {FORMAT_VERSION}",
                f"version {shown(version)} came",
                "Use the captum_cage that wrote it, or another folder.",
            )
        )
    try:
        return Manifest(
            {_text(name): _text(v) for name, v in _items(header["versions"])},
            dict(_items(header["settings"])),
            {_key(key): _input(one) for key, one in _items(header["inputs"])},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(where) from error


def read_failure(data: bytes, where: str = "error.json") -> Failure:
    """What the file of an error says, checked.

    Args:
        data (bytes): the whole file.
        where (str, optional): its name, for errors. Default: ``"error.json"``

    Raises:
        ValueError: if it is none, or damaged.
    """
    found = _json_of(where, data)
    try:
        return Failure(
            key=_key(found["key"]),
            type=_text(found["type"]),
            message=_text(found["message"]),
            position=_number(found["position"]),
            line=_number(found["line"]),
            id=_name(found["id"]),
            traceback=_text(found["traceback"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(where) from error


def _json_of(where: str, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(where) from error
    if not isinstance(found, dict):
        raise _damaged(where)
    return found


def _damaged(where: str) -> ValueError:
    must = "must be a file that captum_cage.batch wrote"
    came = "it is none, or it is damaged"
    remedy = "Take it away, or start in another folder; results are not lost."
    return ValueError(complaint(where, must, came, remedy))


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(value, dict):
        raise TypeError(shown(value))
    return value.items()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(shown(value))
    return value


def _name(value: Any) -> str | None:
    return None if value is None else _text(value)


def _number(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(shown(value))
    return value


def _key(value: Any) -> str:
    if not isinstance(value, str) or not _KEY.fullmatch(value):
        raise ValueError(shown(value))
    return value


def _input(found: Any) -> Input:
    if found["status"] not in _STATUS or not isinstance(found["places"], list):
        raise ValueError(shown(found))
    return Input(found["status"], tuple(map(_place, found["places"])))


def _place(found: Any) -> Place:
    position = _number(found["position"])
    if position is None:
        raise TypeError(shown(found))
    meta = dict(_items(found["meta"]))
    for value in meta.values():
        if not isinstance(value, str | int | float | bool | None):
            raise TypeError(shown(value))
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(shown(value))
    return Place(position, _number(found["line"]), _name(found["id"]), meta)


# --- the directory -------------------------------------------------------------------


class Directory:
    """A folder of results that several processes may write at once.

    Each file is written beside its place and put there when it is whole. Files are
    named after the hash of an example and never after anything in it.

    Args:
        path (str or PathLike): the folder; it is made if it is not there.

    Raises:
        TypeError: if it is no path.
        OSError: if nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(
                complaint(
                    "out",
                    "must name a folder",
                    f"{shown(path)} came",
                    "Pass where the results shall be.",
                )
            )
        self.path = Path(path)

    def make(self) -> Directory:
        """Itself, with all its folders, once it is sure that files can be written.

        Raises:
            OSError: if they cannot.
        """
        for name in ("results", "errors", "scores", "rows", "saving", "claims"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        probe = self.path / "saving" / f"probe-{os.getpid()}"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            with suppress(OSError):
                probe.unlink()
        return self

    # --- examples ---

    def result_file(self, key: str) -> Path:
        """Where the result of an example is, or will be."""
        return self.path / "results" / f"{_key(key)}.npz"

    def score_file(self, key: str) -> Path:
        """Where its rows of the table are."""
        return self.path / "scores" / f"{_key(key)}.parquet"

    def error_file(self, key: str) -> Path:
        """Where its error is."""
        return self.path / "errors" / f"{_key(key)}.json"

    def spool(self, key: str) -> Path:
        """Where its finished rows are while it is under way."""
        return self.path / "rows" / _key(key)

    def is_done(self, key: str) -> bool:
        """Whether its result is there; a file that was cut short is none."""
        return zipfile.is_zipfile(self.result_file(key))  # looks at its end

    def failure(self, key: str) -> Failure | None:
        """Why it has no result, if that is known.

        Raises:
            ValueError: if the file of its error is damaged.
        """
        path = self.error_file(key)
        try:
            return read_failure(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None

    @contextmanager
    def claim(self, key: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether it is ours, so that no other process works on it meanwhile.

        The kernel gives it back when the process ends, however it ends. Some keys share
        a claim, so do not hold two.

        Args:
            key: hash of the example.
            wait: wait until others gave it back.
        """
        path = self.path / "claims" / f"{_key(key)[:_SLOT]}.lock"
        lock = FileLock(path)
        try:
            lock.acquire(timeout=-1 if wait else 0, poll_interval=0.1)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def save(self, key: str, result: GraphAttributionResult) -> None:
        """Keep a result, and its rows of the table; whoever calls holds the claim.

        Raises:
            OSError: if it cannot be written; nothing is half written then.
        """
        with self._saving(key) as folder:
            write_part(folder / "scores", score_columns(result))
            result.save(folder / "result.npz")
            _put(folder / "scores", self.score_file(key))
            _put(folder / "result.npz", self.result_file(key))
        self.error_file(key).unlink(missing_ok=True)
        shutil.rmtree(self.spool(key), ignore_errors=True)

    def fail(self, failure: Failure) -> None:
        """Keep the error of an example; whoever calls holds the claim.

        The rows that were finished stay, for another trial.

        Raises:
            OSError: if it cannot be written.
        """
        text = json.dumps(asdict(failure), indent=1)
        with self._saving(failure.key) as folder:
            (folder / "error.json").write_text(text + "\n", encoding="ascii")
            _put(folder / "error.json", self.error_file(failure.key))
        if not has_rows(self.spool(failure.key)):
            shutil.rmtree(self.spool(failure.key), ignore_errors=True)

    @contextmanager
    def _saving(self, key: str) -> Iterator[Path]:
        """An empty folder for files that are not whole, of a kill before, too."""
        folder = self.path / "saving" / _key(key)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- all of it ---

    def tidy(self) -> None:
        """Remove what a kill left of examples that are done."""
        for folder, suffix in (("rows", ""), ("saving", ""), ("errors", ".json")):
            for key in _stems(self.path / folder, suffix):
                if not _KEY.fullmatch(key) or not self.is_done(key):
                    continue
                with self.claim(key) as ours:
                    if ours:
                        self.error_file(key).unlink(missing_ok=True)
                        shutil.rmtree(self.spool(key), ignore_errors=True)
                        shutil.rmtree(self.path / "saving" / key, ignore_errors=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process changes manifest and table meanwhile."""
        with FileLock(self.path / "claims" / "directory.lock"):
            yield

    def manifest(self) -> Manifest | None:
        """What the manifest says; None if there is none yet.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is damaged or of another version.
        """
        path = self.path / "manifest.json"
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise _damaged(str(path))
            return read_manifest(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None

    def agree(
        self, settings: Mapping[str, Any], versions: Mapping[str, str]
    ) -> Mapping[str, str]:
        """The versions of whoever began; only with the same settings goes one on.

        Raises:
            ValueError: if the folder holds results of other settings, or its manifest
                is damaged.
            OSError: if it cannot be written.
        """
        with self.alone():
            found = self.check(settings)
            if found is None:
                self._write(Manifest(versions, settings))
                return versions
        return found.versions

    def check(self, settings: Mapping[str, Any]) -> Manifest | None:
        """The manifest, if its settings are these; None if there is none yet.

        Raises:
            ValueError: if the folder holds results of other settings, or its manifest
                is damaged.
            OSError: if it cannot be read.
        """
        found = self.manifest()
        if found is None:
            return None
        # As a file holds them: tuples are lists there.
        wanted = json.loads(json.dumps(settings))
        if differences := list(_differences(found.settings, wanted)):
            raise ValueError(
                complaint(
                    "out",
                    "must be a folder of the same settings",
                    f"{str(self.path)!r} differs: {'; '.join(differences)}",
                    "Name another folder, or ask as before.",
                )
            )
        return found

    def noted(
        self, places: Mapping[str, Iterable[Place]], *, whole: bool = False
    ) -> Manifest:
        """The manifest, with these examples and what became of each; written, too.

        Whoever calls is alone.

        Args:
            places: where each example stands, by its hash.
            whole: whether these are all the places of the input, so that those where
                these examples stood in another one are forgotten.

        Raises:
            ValueError: if the manifest is damaged or missing.
            OSError: if it cannot be written.
        """
        found = self.manifest()
        if found is None:
            raise _damaged(str(self.path / "manifest.json"))
        done = _stems(self.path / "results", ".npz")
        failed = _stems(self.path / "errors", ".json")
        inputs = {}
        for key in {**found.inputs, **places}:
            known = found.inputs[key].places if key in found.inputs else ()
            if whole and key in places:
                known = ()
            all_of_it = {(p.position, p.id): p for p in (*known, *places.get(key, ()))}
            status = "done" if key in done else "failed" if key in failed else "open"
            inputs[key] = Input(status, tuple(all_of_it[n] for n in all_of_it))
        manifest = Manifest(found.versions, found.settings, inputs)
        self._write(manifest)
        return manifest

    def _write(self, manifest: Manifest) -> None:
        self.put("manifest.json", lambda path: path.write_bytes(manifest.to_bytes()))

    def put(self, name: str, write: Callable[[Path], Any]) -> None:
        """Put a file of the whole directory in its place; whoever calls is alone.

        Raises:
            OSError: if it cannot be written.
        """
        partial = self.path / "saving" / f"{name}.partial"
        try:
            write(partial)
            _put(partial, self.path / name)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _put(partial: Path, target: Path) -> None:
    """Put a whole file in its place, so that it is there after a power cut, too."""
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:  # some file systems do not sync folders
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
                raise
        finally:
            os.close(folder)


def _stems(folder: Path, suffix: str) -> set[str]:
    """Names of the files of a folder, less their suffix."""
    with os.scandir(folder) as entries:
        return {
            entry.name.removesuffix(suffix)
            for entry in entries
            if entry.name.endswith(suffix)
        }


def _differences(before: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What two settings differ in, in words."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(name), now.get(name), (*path, name))
    elif before != now:
        yield f"{'.'.join(path)} was {before!r} and is {now!r}"
