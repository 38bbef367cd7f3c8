"""Workers on this machine: in this process, or in several others."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Protocol

import torch

from captum_cage._checks import complaint
from captum_cage.batch.directory import Directory
from captum_cage.batch.examples import Given
from captum_cage.batch.worker import (
    LOST_DEVICE,
    Job,
    Outcome,
    Worker,
    failure_of,
)

__all__ = ["ATTEMPTS", "Pool", "Processes", "Task", "ThisProcess"]

ATTEMPTS = 3
"""How many workers may die of one example before that is its error."""

WORKER = "CAPTUM_CAGE_WORKER"
"""Environment variable with a worker's number, from 0, where ``cage`` is made."""

START = "spawn"  # a process that was forked cannot use CUDA
_PATIENCE = 5.0  # seconds, for a worker to end by itself


class Task(NamedTuple):
    """An example to explain, and whether to wait while another process has it."""

    given: Given
    wait: bool = False


class Pool(Protocol):
    """Workers that explain examples, wherever they are."""

    @property
    def settings(self) -> dict[str, Any]:
        """What every result shares, as one worker with its model knows it."""

    def map(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """What became of each example, in any order; tasks are taken as needed.

        Raises:
            OSError: if the directory cannot be written.
            ImportError: if the method lacks a package.
        """

    def close(self) -> None:
        """End the workers."""


class ThisProcess:
    """One worker, here.

    Args:
        job (Job): what is to be done.
    """

    def __init__(self, job: Job) -> None:
        self._worker = Worker(job)
        self.settings = self._worker.settings

    def map(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """What became of each example, in their order."""
        for task in tasks:
            yield self._worker.explain(task.given, wait=task.wait)

    def close(self) -> None:
        """Nothing is to be ended."""


class Processes:
    """Workers in processes of their own, each with its own model.

    One that dies is replaced, and its example tried again by another.

    Args:
        job (Job): what is to be done. Its ``cage`` is pickled, or made there.
        workers (int): how many.

    Raises:
        ValueError: if the job cannot be sent to another process.
        RuntimeError: if a worker dies before it is ready.
    """

    def __init__(self, job: Job, workers: int) -> None:
        self._job = job
        self._directory = Directory(job.out)
        self._threads = max(1, torch.get_num_threads() // workers)
        self._workers: list[_Process] = []
        try:
            for number in range(workers):
                self._workers.append(self._start(number))
            found = [worker.hello() for worker in self._workers]
            self.settings: dict[str, Any] = found[0]
            if any(one != found[0] for one in found):
                raise ValueError(
                    complaint(
                        "cage",
                        "must be made the same by each worker",
                        "their models or settings differ",
                        "Make it of the same weights and with the same arguments.",
                    )
                )
        except BaseException:
            self.close()
            raise

    def _start(self, number: int) -> _Process:
        return _Process(self._job, number, self._threads)

    def map(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """What became of each example, in the order in which they are finished."""
        waiting = iter(tasks)
        again: deque[_Tried] = deque()
        while True:
            for place in range(len(self._workers)):
                while self._workers[place].tried is None:
                    tried = again.popleft() if again else _next(waiting)
                    if tried is None:
                        break
                    if self._workers[place].is_lost:
                        self._workers[place] = self._start(place)
                    try:
                        self._workers[place].send(tried)
                    except (pickle.PicklingError, AttributeError, TypeError) as error:
                        yield self._failed(tried.task.given, error)
            busy = {w.connection: w for w in self._workers if w.tried is not None}
            if not busy and not again:
                return
            for ready in wait(list(busy)):
                worker = busy[ready]
                tried = worker.tried
                try:
                    found = worker.receive()
                except EOFError:
                    code = worker.end()
                    if tried is not None and tried.times < ATTEMPTS:
                        again.append(tried)
                    elif tried is not None:
                        yield self._lost(tried.task.given, code)
                else:
                    if found is not None:
                        yield found

    def _lost(self, given: Given, code: int | None) -> Outcome:
        text = (
            f"{ATTEMPTS} workers died of this example; the last one's exit code was "
            f"{code}. Less memory per example may help, or fewer workers."
        )
        return self._failed(given, ChildProcessError(text))

    def _failed(self, given: Given, error: Exception) -> Outcome:
        failure = failure_of(given, error)
        with self._directory.claim(given.key, wait=True):
            self._directory.fail(failure)
        return Outcome(given, "failed", failure)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.end()
        self._workers = []


class _Tried(NamedTuple):
    """A task, and how many workers have had it."""

    task: Task
    times: int


def _next(waiting: Iterator[Task]) -> _Tried | None:
    task = next(waiting, None)
    return None if task is None else _Tried(task, 0)


class _Process:
    """One worker, as its parent sees it."""

    def __init__(self, job: Job, number: int, threads: int) -> None:
        context: Any = multiprocessing.get_context(START)
        self.connection, theirs = context.Pipe()
        self.tried: _Tried | None = None
        self.settings: dict[str, Any] = {}
        self.is_ready = self.is_lost = False
        self.process = context.Process(
            target=_serve, args=(theirs, job, number, threads), daemon=True
        )
        try:
            self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                complaint(
                    "cage",
                    "must be something that can be sent to another process",
                    f"it cannot be pickled: {error}",
                    "Pass a function of a module that makes it, or workers=1.",
                )
            ) from error
        finally:
            theirs.close()

    def hello(self) -> dict[str, Any]:
        """The settings, once the worker has its model."""
        self.receive()
        return self.settings

    def send(self, tried: _Tried) -> None:
        """Give it an example."""
        with suppress(BrokenPipeError, ConnectionResetError):
            # Where it died, whoever waits for its answer finds out.
            self.connection.send(tried.task)
        self.tried = _Tried(tried.task, tried.times + 1)

    def receive(self) -> Outcome | None:
        """What became of its example; None where it said that it is ready.

        Raises:
            EOFError: if it died of the example.
            RuntimeError: if it died before it was ready.
            Exception: what it raised.
        """
        try:
            kind, value = self.connection.recv()
        except (ConnectionResetError, EOFError) as error:
            if self.is_ready:
                raise EOFError from error
            raise RuntimeError(
                complaint(
                    "workers",
                    "must be able to start",
                    f"one died before it was ready, exit code {self.end()}",
                    'A script needs: if __name__ == "__main__": around its start. '
                    "Or the model is larger than the memory: take fewer workers.",
                )
            ) from None
        if kind == "raised":
            raise value
        if kind == "settings":
            self.is_ready, self.settings = True, value
            return None
        self.tried = None
        found: Outcome = value
        return found

    def hang_up(self) -> None:
        """Let it end."""
        if self.tried is not None:
            self.process.terminate()
        with suppress(OSError):  # it may be closed, or nobody there
            self.connection.send(None)
        self.connection.close()

    def end(self) -> int | None:
        """End it; its exit code."""
        self.hang_up()
        self.tried, self.is_lost = None, True
        self.process.join(_PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code: int | None = self.process.exitcode
        return code


def _serve(
    connection: Connection, job: Job, number: int, threads: int
) -> None:  # pragma: no cover (in another process)
    """What a worker does until its parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(threads)
    os.environ[WORKER] = str(number)
    try:
        worker = Worker(job)
        _answer(connection, "settings", worker.settings)
        while (task := connection.recv()) is not None:
            _answer(connection, "outcome", worker.explain(task.given, wait=task.wait))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except LOST_DEVICE:
        return  # another worker, with the device as new, answers for this one
    except Exception as error:  # noqa: BLE001 (the parent raises it)
        _answer(connection, "raised", error)


def _answer(
    connection: Connection, kind: str, value: Any
) -> None:  # pragma: no cover (in another process)
    try:
        connection.send((kind, value))
    except (pickle.PicklingError, TypeError, AttributeError):
        text = f"{type(value).__name__}: {value}"
        connection.send(("raised", RuntimeError(text)))
