"""Answers of a server, kept in a folder: a SQLite database that processes share."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from captum_cage._checks import complaint

__all__ = ["AnswerCache"]

_NAME = "answers.sqlite3"
_VERSION = 1  # of the table's form
_APPLICATION = 0x43414745  # "CAGE", by which SQLite files tell whose they are
# Seconds that a process waits for another one that writes.
_PATIENCE = 30.0
# The last two where the file is opened again, as after a fork.
_TROUBLE = (sqlite3.Error, OSError, ValueError)


class AnswerCache:
    """Numbers or a text by the question that they answer.

    Each answer is a transaction of its own: what was kept survives a kill, and several
    processes may use one folder. An answer that does not agree with its check sum
    counts as none. Trouble after the start, such as a full disk, is a warning, as
    everything can be asked again.

    Args:
        folder (str or os.PathLike): where to keep them, on a disk of this machine; it
            is made if need be.
        size (int): most answers that are kept; the oldest go.

    Raises:
        ValueError: if the file there is damaged, or of another program or version.
        OSError: if the folder cannot be made or written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = AnswerCache(folder, 1000)
        ...     cache.keep(["model", "Ana has", " 3"], [-0.5])
        ...     cache.numbers(["model", "Ana has", " 3"])
        ...     cache.close()
        [-0.5]
    """

    def __init__(self, folder: str | os.PathLike[str], size: int) -> None:
        self._folder = Path(folder)
        self._size = size
        self._lock = threading.Lock()
        self._open: tuple[int, sqlite3.Connection] | None = None
        self._works = True
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._connection()

    @property
    def path(self) -> Path:
        """The database."""
        return self._folder / _NAME

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self._folder, "size": self._size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["size"])  # type: ignore[misc]

    def numbers(self, question: Sequence[Any]) -> list[float] | None:
        """The numbers that answer a question; None if they are not here."""
        found = self._found(question)
        if found is None or len(found) % 8:
            return None
        numbers: list[float] = np.frombuffer(found, dtype="<f8").tolist()
        return numbers

    def text(self, question: Sequence[Any]) -> str | None:
        """The text that answers a question; None if it is not here."""
        found = self._found(question)
        try:
            return None if found is None else found.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return None

    def keep(self, question: Sequence[Any], answer: Sequence[float] | str) -> None:
        """Keep the answer to a question, in place of an older one."""
        if isinstance(answer, str):
            data = answer.encode("utf-8", "surrogatepass")
        else:
            data = np.asarray(answer, dtype="<f8").tobytes()
        key = _key(question)
        row = (key, _check_sum(key, data), data)
        with self._lock:
            try:
                with self._connection() as connection:
                    connection.execute(
                        "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row
                    )
                    connection.execute(
                        "DELETE FROM answers WHERE rowid <= "
                        "(SELECT MAX(rowid) FROM answers) - ?",
                        (self._size,),
                    )
            except _TROUBLE as error:
                self._complain(error)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._open is not None and self._open[0] == os.getpid():
                self._open[1].close()
            self._open = None

    def _found(self, question: Sequence[Any]) -> bytes | None:
        key = _key(question)
        with self._lock:
            try:
                row = (
                    self._connection()
                    .execute(
                        "SELECT check_sum, answer FROM answers WHERE question = ?",
                        (key,),
                    )
                    .fetchone()
                )
            except _TROUBLE as error:
                self._complain(error)
                return None
        if row is None or not isinstance(row[1], bytes):
            return None
        data: bytes = row[1]
        return data if row[0] == _check_sum(key, data) else None

    def _complain(self, error: Exception) -> None:
        if self._works:
            self._works = False
            warnings.warn(
                f"cache: answers cannot be read from or kept in {self.path}: {error}. "
                "What is not kept is asked again.",
                stacklevel=4,
            )

    def _connection(self) -> sqlite3.Connection:
        """The open file. A process that was forked must not use its parent's."""
        if self._open is not None and self._open[0] == os.getpid():
            return self._open[1]
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(
                self.path, timeout=_PATIENCE, check_same_thread=False
            )
            self._prepare(connection)
            _log_ahead(connection)
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(
                    complaint(
                        "cache",
                        "must be a folder that can be written to",
                        f"{self.path} cannot be used: {error}",
                        "Pass another folder.",
                    )
                ) from error
            raise _not_ours(self.path, str(error)) from error
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        self._open = (os.getpid(), connection)
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            whose = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT COUNT(*) FROM sqlite_master")
            if not tables.fetchone()[0] and not whose and not version:
                connection.execute(
                    "CREATE TABLE answers "
                    "(question BLOB PRIMARY KEY, check_sum INTEGER, answer BLOB)"
                )
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            elif whose != _APPLICATION:
                raise _not_ours(self.path, "it is another program's database")
            elif version != _VERSION:
                raise _not_ours(
                    self.path, f"its version is {version} and this package reads 1"
                )


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Write to a log first: it need not wait for the disk, and survives a kill."""
    with suppress(sqlite3.OperationalError):  # another process is just doing it
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def _not_ours(path: Path, why: str) -> ValueError:
    return ValueError(
        complaint(
            "cache",
            "must be a folder in which this package keeps answers",
            f"{path} is no such file: {why}",
            "Delete it, and everything is asked again; or pass another folder.",
        )
    )


def _key(question: Sequence[Any]) -> bytes:
    # ASCII: lone surrogates have no UTF-8.
    text = json.dumps(list(question), ensure_ascii=True, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("ascii")).digest()


def _check_sum(key: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(key))
