"""Many examples: which are left to do, who does them, and what came of it."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captum_cage._checks import complaint, one_of, whole_number
from captum_cage.archive import LIMIT
from captum_cage.batch.directory import Directory, Failure, Manifest, Place
from captum_cage.batch.examples import Examples, Given, given, total
from captum_cage.batch.local import Pool, Processes, Task, ThisProcess
from captum_cage.batch.on_ray import RayCluster
from captum_cage.batch.table import parquet, score_columns, write_part, write_table
from captum_cage.batch.worker import Cage, Job, Outcome, failure_of, versions
from captum_cage.result import GraphAttributionResult

__all__ = ["BatchReport", "Explained", "results", "run"]

_NOTE_EVERY = 30.0  # seconds between two manifests, at least
_COST = 20.0  # times what one takes to write
_LATER = 64  # examples that others have, before it is asked again


def _local(job: Job, workers: int) -> Pool:
    return ThisProcess(job) if workers == 1 else Processes(job, workers)


BACKENDS: dict[str, Callable[[Job, int], Pool]] = {
    "local": _local,
    "ray": RayCluster(),
}
"""What makes the workers, by name."""


@dataclass(frozen=True)
class Explained:
    """A result of a batch, with the example that it is of.

    Attributes:
        key (str): hash of the example.
        position (int): its place in the input, from 0.
        line (int or None): in a file of lines, from 1.
        id (str or None): its name.
        meta (Mapping): the scalars of what else is known of it.
        path (Path): the file of the result.
    """

    key: str
    position: int
    line: int | None
    id: str | None
    meta: Mapping[str, Any]
    path: Path

    def load(self, limit: int | None = LIMIT) -> GraphAttributionResult:
        """The result.

        Args:
            limit (int, optional): as in
                :meth:`~captum_cage.GraphAttributionResult.load`; None for
                results of any size. Default: 2 GiB

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged, or larger than the limit.
        """
        return GraphAttributionResult.load(self.path, limit=limit)


@dataclass(frozen=True)
class BatchReport:
    """What a run did.

    Attributes:
        path (Path): the directory.
        done (int): examples that it explained.
        skipped (int): examples that had their result already, or got it from another
            process, or stand in the input again.
        failed (int): examples without a result, now or from a run before.
        errors (tuple[Failure, ...]): why.
        seconds (float): how long it took.
    """

    path: Path
    done: int
    skipped: int
    failed: int
    errors: tuple[Failure, ...]
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.done} explained, {self.skipped} skipped, {self.failed} failed in "
            f"{self.seconds:.1f} s: {self.path}"
        )

    def table(self) -> Any:
        """The scores of the whole directory, as a table of pyarrow.

        One row for each example and source unit; ``.to_pandas()`` makes a data frame.
        """
        return parquet().read_table(self.path / "scores.parquet")

    def results(self) -> Iterator[Explained]:
        """All results of the directory, in the order of the input; see `results`."""
        return results(self.path)


def run(
    cage: Cage,
    examples: Examples,
    out: str | os.PathLike[str],
    *,
    backend: str | Callable[[Job, int], Pool] = "local",
    workers: int = 1,
    strict: bool = False,
    retry_failed: bool = False,
    seed: int = 0,
    show_progress: bool = False,
    **options: Any,
) -> BatchReport:
    """Explain many examples; what is finished is kept, whatever happens.

    Interrupted or killed, the same call goes on: no finished example is explained
    again. Several processes may run it on one directory and share the work.

    Args:
        cage (GraphContextAttribution or Callable): what explains, or a function without
            arguments that makes it, which each worker calls.
        examples: a path that ends in ``.jsonl``, ``.ndjson`` or ``.parquet``, or an
            iterable of mappings or of :class:`Example`, or a data set of ``datasets``.
        out (str or PathLike): the directory of the results.
        backend (str or RayCluster, optional): where the workers are: ``"local"``,
            ``"ray"``, or a :class:`RayCluster`, which says more. Default: ``"local"``
        workers (int, optional): how many, each with a model of its own; 1 is this
            process itself. Default: ``1``
        strict (bool, optional): stop at the first example without a result.
            Default: ``False``
        retry_failed (bool, optional): try examples again that failed in a run before.
            Default: ``False``
        seed (int, optional): of random methods: each example is seeded by it and by
            its hash, so order and workers change nothing. Default: ``0``
        show_progress (bool, optional): show a progress bar on stderr.
            Default: ``False``
        **options: of :meth:`~captum_cage.GraphContextAttribution.attribute`, for each
            example that does not say otherwise.

    Returns:
        BatchReport: counts, errors, and ways to the results.

    Raises:
        TypeError: if an argument is of the wrong kind, or an option unknown.
        ValueError: if the directory holds results of other settings, or is damaged; or
            if an example fails and ``strict`` is set.
        OSError: if the input cannot be read or the directory not be written.
        ImportError: if pyarrow is missing.
        RuntimeError: if a worker cannot start.
    """
    start = time.perf_counter()
    if not callable(backend):
        backend = BACKENDS[one_of("backend", backend, tuple(BACKENDS))]
    whole_number(
        "workers", workers, minimum=1, remedy="Pass how many, or leave it out."
    )
    seed = whole_number("seed", seed, remedy="Pass a number of 0 or more.")
    parquet()
    stream = given(examples)
    directory = Directory(out).make()
    directory.manifest()  # a damaged one is refused before a model is loaded
    job = Job(cage, directory.path.resolve(), options, seed, retry_failed)
    with closing(backend(job, workers)) as pool:
        _agree(directory, pool.settings)
        count = total(examples) if show_progress else None
        with tqdm(
            total=count,
            disable=not show_progress,
            file=sys.stderr,
            desc="explaining",
            unit="example",
            smoothing=0,
        ) as bar:
            state = _Run(directory, job, strict, bar)
            try:
                state.work(stream, pool)
            except BaseException:
                with suppress(OSError, ValueError):
                    state.note()
                raise
    directory.tidy()
    with directory.alone():
        _tabulate(directory, directory.noted(state.places, whole=True))
    return BatchReport(
        path=directory.path,
        done=state.counts["done"],
        skipped=state.counts["skipped"],
        failed=state.counts["failed"],
        errors=tuple(state.failures),
        seconds=time.perf_counter() - start,
    )


def _agree(directory: Directory, settings: Mapping[str, Any]) -> None:
    now = versions()
    before = directory.agree(settings, now)
    changed = [
        f"{name} was {before.get(name)} and is {now[name]}"
        for name in now
        if before.get(name) != now[name]
    ]
    if changed:
        warnings.warn(
            f"{directory.path} was begun with other versions: {'; '.join(changed)}. "
            "What was finished then is not explained again.",
            stacklevel=3,
        )


class _Run:
    """The course of one run."""

    def __init__(self, directory: Directory, job: Job, strict: bool, bar: Any) -> None:
        self.directory = directory
        self.job = job
        self.strict = strict
        self.bar = bar
        self.places: dict[str, list[Place]] = {}
        self.counts = {"done": 0, "skipped": 0, "failed": 0}
        self.failures: list[Failure] = []
        self._later: deque[Given] = deque()
        self._repeated: list[str] = []
        self._unkept: list[Failure] = []
        self._note_at = time.monotonic() + _NOTE_EVERY

    def work(self, stream: Iterator[Given], pool: Pool) -> None:
        """Do all that is to be done, at last what other processes had."""
        tasks: Iterator[Task] = self._tasks(stream)
        while True:
            for outcome in pool.map(tasks):
                self._count(outcome)
            if not self._later:
                break
            waiting, self._later = self._later, deque()
            tasks = (Task(one, wait=True) for one in waiting)
        for failure in self._unkept:
            self._keep(failure, wait=True)
        for key in self._repeated:
            self._tally("skipped" if self.directory.is_done(key) else "failed")

    def _tasks(self, stream: Iterator[Given]) -> Iterator[Task]:
        """What the workers are to do, while the input is read."""
        for one in stream:
            known = one.key in self.places
            meta = {} if one.example is None else one.example.scalars
            place = Place(one.position, one.line, one.id, meta)
            self.places.setdefault(one.key, []).append(place)
            if one.example is None:
                self._record(one)
            elif known:
                self._repeated.append(one.key)
            elif self.directory.is_done(one.key):
                self._count(Outcome(one, "skipped"))
            else:
                yield Task(one)
            if len(self._later) > _LATER:
                self._ask_again()

    def _ask_again(self) -> None:
        """What others have finished meanwhile is not kept in memory."""
        for _ in range(len(self._later)):
            one = self._later.popleft()
            if self.directory.is_done(one.key):
                self._count(Outcome(one, "skipped"))
            else:
                self._later.append(one)

    def _record(self, one: Given) -> None:
        """Keep the error of what cannot be read."""
        failure = failure_of(one, one.error or ValueError("no example"))
        # The workers of this process may hold the claim, and wait for this.
        if not self._keep(failure, wait=False):
            self._unkept.append(failure)
        self._count(Outcome(one, "failed", failure), error=one.error)

    def _keep(self, failure: Failure, *, wait: bool) -> bool:
        with self.directory.claim(failure.key, wait=wait) as ours:
            if ours:
                self.directory.fail(failure)
        return ours

    def _count(self, outcome: Outcome, error: Exception | None = None) -> None:
        if outcome.status == "busy":
            self._later.append(outcome.given)
            return
        self._tally(outcome.status)
        if outcome.failure is not None:
            self.failures.append(outcome.failure)
            self.bar.set_postfix(failed=self.counts["failed"])
            if self.strict:
                raise _stopped(outcome.failure) from error
        if time.monotonic() > self._note_at:
            self.note()

    def _tally(self, status: str) -> None:
        self.counts[status] += 1
        if status == "skipped" and not self.bar.disable:
            self.bar.initial += 1  # which the rate leaves out
        self.bar.update()

    def note(self) -> None:
        """Write what is known into the manifest, seldom enough to cost little."""
        start = time.monotonic()
        with self.directory.alone():
            self.directory.noted(self.places)
        end = time.monotonic()
        self._note_at = end + max(_NOTE_EVERY, _COST * (end - start))


def _stopped(failure: Failure) -> ValueError:
    place = f"example {failure.position}"
    if failure.line is not None:
        place = f"line {failure.line}"
    if failure.id is not None:
        place += f", id {failure.id!r}"
    return ValueError(
        complaint(
            place,
            "must be explained, since strict is set",
            f"{failure.type} came: {failure.message.rstrip('.')}",
            "Mend the example, or leave strict out; retry_failed tries it again.",
        )
    )


# --- what a directory holds ----------------------------------------------------------


def results(out: str | os.PathLike[str]) -> Iterator[Explained]:
    """The results of a directory one by one, in the order of the input.

    Nothing is loaded before :meth:`Explained.load` is called.

    Args:
        out (str or PathLike): the directory that :func:`run` wrote.

    Raises:
        TypeError: if it is no path.
        FileNotFoundError: if it has no manifest.
        ValueError: if its manifest is damaged or of another version.
    """
    directory = Directory(out)
    manifest = directory.manifest()
    if manifest is None:
        raise FileNotFoundError(
            complaint(
                "out",
                "must be a directory that batch.run wrote",
                f"{str(directory.path)!r} has no manifest",
                "Name that one.",
            )
        )
    return _explained(directory, manifest)


def _explained(directory: Directory, manifest: Manifest) -> Iterator[Explained]:
    places = [
        (place.position, key, place)
        for key, one in manifest.inputs.items()
        for place in one.places
        if directory.is_done(key)
    ]
    for position, key, place in sorted(places, key=lambda one: one[:2]):
        path = directory.result_file(key)
        yield Explained(key, position, place.line, place.id, place.meta, path)


def _tabulate(directory: Directory, manifest: Manifest) -> None:
    """Write the table of all finished results; nobody else does meanwhile."""
    found = list(_explained(directory, manifest))
    parts = ((vars(one), _part(directory, one)) for one in found)
    meta = _kinds(found)
    directory.put("scores.parquet", lambda path: write_table(path, parts, meta))


def _part(directory: Directory, one: Explained) -> Any:
    """The rows of a result; made again if they are lost."""
    path = directory.score_file(one.key)
    pq = parquet()
    try:
        return pq.read_table(path)
    except (OSError, ValueError):
        # Ours, however large it is.
        write_part(path, score_columns(one.load(limit=None)))
        return pq.read_table(path)


def _kinds(found: list[Explained]) -> dict[str, type]:
    """The type of each of the examples' scalars: what holds all its values."""
    seen: dict[str, set[type]] = {}
    for one in found:
        for name, value in one.meta.items():
            kinds = seen.setdefault(name, set())
            if value is not None:
                kinds.add(type(value))
    return {name: _kind(kinds) for name, kinds in seen.items()}


def _kind(kinds: set[type]) -> type:
    if len(kinds) == 1:
        return next(iter(kinds))
    return float if kinds == {int, float} else str
