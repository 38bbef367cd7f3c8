"""Workers on a Ray cluster: one actor each, on whatever machine has room."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch

from captum_cage._checks import complaint, shown
from captum_cage.batch.directory import Directory, Failure
from captum_cage.batch.examples import Given
from captum_cage.batch.local import ATTEMPTS, WORKER, Task
from captum_cage.batch.worker import (
    LOST_DEVICE,
    Job,
    Outcome,
    Worker,
    failure_of,
)
from captum_cage.result import GraphAttributionResult

__all__ = ["RayCluster"]

_PATIENCE = 60.0  # seconds without any worker, before it is told why


@dataclass(frozen=True)
class RayCluster:
    """Where and how the workers of ``batch.run(..., backend=...)`` run on Ray.

    ``backend="ray"`` is ``RayCluster()``. Each worker is an actor with a model of its
    own. Results come back through Ray's object store, and the process that calls
    ``run`` writes them, so that the machines need not share a disk. A worker that dies
    is replaced, and its example tried again.

    A Ray that is initialised already is used as it is, and left so; otherwise ``run``
    connects to the cluster of ``address``, and disconnects at the end.

    Args:
        address (str, optional): of the cluster, as ``ray.init`` takes it: ``"auto"``
            for the one of this machine, ``"local"`` for a new one here. Default: as
            Ray finds it: that of ``RAY_ADDRESS``, of this machine, or a new one here
        num_cpus (float, optional): CPU cores of a worker, which computes in as many
            threads. Default: ``1``
        num_gpus (float, optional): GPUs of a worker; 0.25 lets four share one, and
            with 0 it sees none. Default: ``0``
        resources (Mapping[str, float], optional): what else Ray is to reserve for it.
            Default: nothing
        runtime_env (Mapping, optional): what Ray is to set up for it, such as packages.
            Default: as on its machine

    Raises:
        TypeError: if a number is none.
        ValueError: if a number is below 0, or more than one GPU is no whole number.

    Example:
        >>> RayCluster(address="auto", num_gpus=0.25).num_gpus
        0.25
    """

    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_cpus", "num_gpus"):
            value = getattr(self, name)
            remedy = "Pass how many one worker takes, such as 0.5 for half of one."
            must = "must be a number of 0 or more, and whole if above 1"
            if isinstance(value, bool) or not isinstance(value, int | float):
                came = f"{shown(value)} came"
                raise TypeError(complaint(name, must, came, remedy))
            if not 0 <= value < float("inf") or (value > 1 and value != int(value)):
                raise ValueError(complaint(name, must, f"{value!r} came", remedy))

    def __call__(self, job: Job, workers: int) -> Actors:
        """The workers of a batch, of which at least one has its model.

        Args:
            job (Job): what is to be done.
            workers (int): how many.

        Raises:
            ImportError: if Ray is missing.
            ValueError: if the job cannot be sent to other machines.
            RuntimeError: if no worker can start.
        """
        return Actors(self, job, workers)


class Actors:
    """Workers that are actors of Ray; this process holds the claims and writes.

    Args:
        cluster (RayCluster): where they run.
        job (Job): what is to be done.
        workers (int): how many.

    Raises:
        ImportError: if Ray is missing.
        ValueError: if the job cannot be sent to other machines.
        RuntimeError: if no worker can start.
    """

    def __init__(self, cluster: RayCluster, job: Job, workers: int) -> None:
        self._ray = _ray()
        self._cluster = cluster
        self._job = job
        self._directory = Directory(job.out)
        self._close = ExitStack()
        self._actors: list[_Actor] = []
        self._deaths = 0  # one after the other, of workers that were not ready
        self.settings: dict[str, Any] = {}
        try:
            self._connect(workers)
            self._sent = self._send()
            self._probe = self._mark()
            self._close.callback(self._kill_all)
            for number in range(workers):
                self._actors.append(self._start(number))
            self._wait_for_one()
        except BaseException:
            self.close()
            raise

    def _connect(self, workers: int) -> None:
        ray = self._ray
        if ray.is_initialized():
            return
        more: dict[str, Any] = {}
        known = os.environ.get("RAY_ADDRESS")
        if self._cluster.address == "local" or (
            self._cluster.address is None and not known
        ):
            more["include_dashboard"] = False
        if self._cluster.address == "local":
            needed = int(workers * self._cluster.num_cpus + 1)
            more["num_cpus"] = max(os.cpu_count() or 1, needed)
        ray.init(
            address=self._cluster.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **more,
        )
        self._close.callback(ray.shutdown)

    def _send(self) -> Any:
        """What workers are told, once for all, in the object store."""
        try:
            return self._ray.put(self._job)
        except Exception as error:
            # Ray raises whatever pickling does, and errors of its own.
            raise ValueError(
                complaint(
                    "cage",
                    "must be something that can be sent to another machine",
                    f"it cannot be pickled: {error}",
                    "Pass a function without arguments that makes it.",
                )
            ) from error

    def _mark(self) -> str:
        """The name of a file by which a worker knows that it sees this very folder."""
        path = self._directory.path / "saving" / f"ray-{uuid4().hex}"
        path.touch()
        self._close.callback(path.unlink, missing_ok=True)
        return path.name

    def _start(self, number: int) -> _Actor:
        cluster = self._cluster
        kind = self._ray.remote(
            num_cpus=cluster.num_cpus,
            num_gpus=cluster.num_gpus,
            resources=dict(cluster.resources) or None,
            runtime_env=dict(cluster.runtime_env) or None,
            max_restarts=0,
        )(_Explainer)
        handle = kind.remote()
        threads = max(1, int(cluster.num_cpus))
        ready = handle.start.remote(self._sent, number, threads, self._probe)
        return _Actor(number, handle, ready)

    def _wait_for_one(self) -> None:
        """Wait for a model; say what is lacking where none has room."""
        ray, since, told = self._ray, time.monotonic(), False
        while not any(actor.is_ready for actor in self._actors):
            starting = {actor.running: actor for actor in self._actors}
            done, _ = ray.wait(list(starting), num_returns=1, timeout=5.0)
            for reference in done:
                self._started(starting[reference])
            if not (done or told) and time.monotonic() - since > _PATIENCE:
                told = True
                warnings.warn(
                    f"no worker has started after {_PATIENCE:.0f} s. Each takes "
                    f"{self._cluster.num_cpus} CPUs and {self._cluster.num_gpus} GPUs; "
                    f"free in the cluster are {ray.available_resources()}. Add "
                    "machines, ask for less, or wait, if the models are large.",
                    stacklevel=5,
                )

    def _started(self, actor: _Actor) -> None:
        """Take in a worker that has its model, or replace it if it died."""
        try:
            found = self._ray.get(actor.running)
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from error
        except self._ray.exceptions.RayError as error:
            self._deaths += 1
            if self._deaths >= ATTEMPTS:
                raise RuntimeError(
                    complaint(
                        "workers",
                        "must be able to start",
                        f"{ATTEMPTS} died before they were ready: {error}",
                        "The model may be larger than the memory of a machine; "
                        "captum_cage must be installed on each of them.",
                    )
                ) from error
            self._replace(actor)
            return
        self._deaths = 0
        actor.is_ready, actor.running = True, None
        if not self.settings:
            self.settings = found
        elif found != self.settings:
            raise ValueError(
                complaint(
                    "cage",
                    "must be made the same by each worker",
                    "their models or settings differ",
                    "Make it of the same weights and with the same arguments.",
                )
            )

    def _replace(self, actor: _Actor) -> None:
        self._kill(actor)
        self._actors[self._actors.index(actor)] = self._start(actor.number)

    def map(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """What became of each example, in the order in which they are finished.

        Raises:
            OSError: if the directory cannot be written, or a worker's disk is full.
            ImportError: if the method lacks a package.
        """
        asked = _Asked(tasks)
        try:
            while True:
                for actor in self._actors:
                    if actor.is_ready and actor.under_way is None:
                        yield from self._give(actor, asked)
                busy = [actor for actor in self._actors if actor.under_way is not None]
                if not busy and asked.is_over():
                    return
                # Those that start are waited for where there is work for them.
                waited = {a.running: a for a in self._actors if a.running is not None}
                done, _ = self._ray.wait(list(waited), num_returns=1)
                for reference in done:
                    actor = waited[reference]
                    if actor.under_way is None:
                        self._started(actor)
                    else:
                        yield from self._finished(actor, asked)
        finally:
            for actor in self._actors:
                if actor.under_way is not None:
                    actor.under_way.claim.close()

    def _give(self, actor: _Actor, asked: _Asked) -> Iterator[Outcome]:
        """Give a worker the next example that nobody has; say what became of others."""
        while (one := asked.next()) is not None:
            given, claim = one.task.given, ExitStack()
            # To wait while this process holds claims itself might be for ever.
            idle = all(other.under_way is None for other in self._actors)
            wait = one.task.wait and idle
            with claim:
                if not claim.enter_context(self._directory.claim(given.key, wait=wait)):
                    if one.task.wait:
                        asked.later(one)
                        return
                    yield Outcome(given, "busy")
                    continue
                if self._directory.is_done(given.key):
                    yield Outcome(given, "skipped")
                    continue
                known = self._directory.failure(given.key)
                if known is not None and not self._job.retry_failed:
                    yield Outcome(given, "failed", known)
                    continue
                try:
                    actor.running = actor.handle.explain.remote(given)
                except Exception as error:  # noqa: BLE001 (whatever pickling raises)
                    yield self._fail(failure_of(given, error), given)
                    continue
                actor.under_way = _Tried(one.task, one.times + 1, claim.pop_all())
            return

    def _finished(self, actor: _Actor, asked: _Asked) -> Iterator[Outcome]:
        """Keep what a worker found; replace it if it died."""
        tried, reference = actor.under_way, actor.running
        if tried is None:
            return
        given = tried.task.given
        with tried.claim:
            actor.under_way = actor.running = None
            try:
                found = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            except self._ray.exceptions.RayError as error:
                self._replace(actor)
                if tried.times < ATTEMPTS:
                    asked.again(tried)
                    return
                text = (
                    f"{ATTEMPTS} workers died of this example, the last so: {error} "
                    "Less memory per example may help, or fewer workers for a machine."
                )
                yield self._fail(failure_of(given, ChildProcessError(text)), given)
                return
            if isinstance(found, Failure):
                yield self._fail(found, given)
                return
            self._directory.save(given.key, _result_of(found.saved))
        yield Outcome(given, "done", seconds=found.seconds)

    def _fail(self, failure: Failure, given: Given) -> Outcome:
        """Keep an error; whoever calls holds the claim."""
        self._directory.fail(failure)
        return Outcome(given, "failed", failure)

    def _kill(self, actor: _Actor) -> None:
        with suppress(Exception):  # it may be dead, and the cluster gone
            self._ray.kill(actor.handle)

    def _kill_all(self) -> None:
        for actor in self._actors:
            self._kill(actor)
        self._actors = []

    def close(self) -> None:
        """End the workers, and Ray where it was started here."""
        self._close.close()


class _Actor:
    """One worker, as this process sees it."""

    def __init__(self, number: int, handle: Any, ready: Any) -> None:
        self.number = number
        self.handle = handle
        self.running: Any = ready  # what it does, as Ray refers to it
        self.is_ready = False
        self.under_way: _Tried | None = None


class _Tried(NamedTuple):
    """A task, how many workers have had it, and its claim."""

    task: Task
    times: int
    claim: ExitStack


class _Asked:
    """The tasks that are left: those of dead workers first, then as they come."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = iter(tasks)
        self._again: deque[_Tried] = deque()

    def next(self) -> _Tried | None:
        """The next one; None if none is left."""
        if self._again:
            return self._again.popleft()
        task = next(self._tasks, None)
        return None if task is None else _Tried(task, 0, ExitStack())

    def again(self, tried: _Tried) -> None:
        """Ask it before all others."""
        self._again.appendleft(tried)

    def later(self, tried: _Tried) -> None:
        """Ask it after those that are to be asked again."""
        self._again.append(tried)

    def is_over(self) -> bool:
        """Whether none is left."""
        if (one := self.next()) is not None:
            self.again(one)
        return one is None


class _Found(NamedTuple):
    """A result, as its file holds it, and how long it took."""

    saved: bytes
    seconds: float


class _Explainer:
    """What runs in the actor."""

    def start(
        self, job: Job, number: int, threads: int, probe: str
    ) -> dict[str, Any]:  # pragma: no cover (in another process)
        """Make the model; the settings that results share."""
        os.environ[WORKER] = str(number)
        torch.set_num_threads(threads)
        self._worker = Worker(job)
        self._directory = Directory(job.out)
        self._shares = (job.out / "saving" / probe).exists()
        return self._worker.settings

    def explain(
        self, given: Given
    ) -> _Found | Failure:  # pragma: no cover (in another process)
        """Explain one example; only its rows are written, where all see them."""
        start = time.perf_counter()
        spool = self._directory.spool(given.key) if self._shares else None
        try:
            found = self._worker.attribute(given, spool)
        except LOST_DEVICE:
            # Another worker, with the device as new, tries it again.
            os.kill(os.getpid(), signal.SIGKILL)
            raise
        if isinstance(found, Failure):
            return found
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.npz"
            found.save(path)
            return _Found(path.read_bytes(), time.perf_counter() - start)


def _result_of(saved: bytes) -> GraphAttributionResult:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.npz"
        path.write_bytes(saved)
        return GraphAttributionResult.load(path, limit=None)


def _cause(error: Any) -> Exception:
    """What a worker raised, rather than Ray's account of it."""
    cause = getattr(error, "cause", None)
    if "ModuleNotFoundError" in str(cause):
        lacking = str(cause).splitlines()[0].removeprefix("System error: ")
        return RuntimeError(
            complaint(
                "cage",
                "what it is made of must be installed on each machine",
                lacking,
                "Install it there, or name it in RayCluster(runtime_env=...).",
            )
        )
    return cause if isinstance(cause, Exception) else RuntimeError(str(error))


def _ray() -> Any:
    try:
        import ray  # noqa: PLC0415
        import ray.exceptions  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "backend='ray' needs a package that is not installed. Run: "
            "pip install captum-cage[scale]"
        ) from error
    return ray
