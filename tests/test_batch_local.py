"""Workers on this machine: several processes, and what becomes of those that die."""

import functools
import os
import signal
from pathlib import Path

import pytest

from captum_cage import GraphContextAttribution
from captum_cage.batch import local, worker
from captum_cage.batch.directory import Directory
from captum_cage.batch.examples import given
from captum_cage.batch.local import Processes, Task
from captum_cage.batch.worker import Job
from tiny import tiny_cage

RECORDS = [{"prompt": f"Ana has {n} pens.", "target": " 7"} for n in range(4)]


class Mortal(GraphContextAttribution):
    """Dies of some prompts, or of its task, and leaves a line each time."""

    log: Path
    times = 10**9

    def attribute(self, inp, target=None, **kwargs):
        """What the wrapper says, if it lives."""
        text = "".join(inp.values)
        if "Die" in text:
            with self.log.open("a") as file:
                file.write("died\n")
            if len(self.log.read_text().split()) <= self.times:
                os.kill(os.getpid(), signal.SIGKILL)
        if "Stop" in text:
            raise OSError(28, "No space left on device")
        return super().attribute(inp, target, **kwargs)


def mortal(log, times=10**9):
    """A worker's wrapper."""
    cage = Mortal(tiny_cage().llm_attr)
    cage.log, cage.times = log, times
    return cage


def differing():
    """A wrapper that another worker makes otherwise."""
    odd = int(os.environ[local.WORKER])
    return tiny_cage(normalization=("positive", "absolute")[odd])


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A directory; processes that start at once, since what they do is the same."""
    monkeypatch.setattr(local, "START", "fork")
    return Directory(tmp_path / "out").make().path


def done_by(job, workers, records):
    """What became of each example, by its prompt."""
    pool = Processes(job, workers)
    try:
        tasks = [Task(one) for one in given(records)]
        found = list(pool.map(tasks))
    finally:
        pool.close()
    return {one.given.example.prompt: one for one in found}


def test_an_example_of_which_a_worker_died_is_tried_again(out, tmp_path):
    """By another worker; the rest is not disturbed."""
    job = Job(functools.partial(mortal, tmp_path / "log", times=2), out)
    found = done_by(job, 2, [{"prompt": "Die", "target": " 7"}, *RECORDS])
    assert {one.status for one in found.values()} == {"done"}
    assert len(found) == 5
    assert (tmp_path / "log").read_text().split() == ["died"] * 3


def test_an_example_of_which_all_workers_die_is_a_failure(out, tmp_path):
    """After so many, with the exit code, and it is kept."""
    job = Job(functools.partial(mortal, tmp_path / "log"), out)
    found = done_by(job, 2, [*RECORDS[:2], {"prompt": "Die", "target": " 7"}])
    failure = found.pop("Die").failure
    assert failure.type == "ChildProcessError"
    assert f"exit code was {-signal.SIGKILL}" in failure.message
    assert (tmp_path / "log").read_text().split() == ["died"] * local.ATTEMPTS
    assert Directory(out).failure(failure.key) == failure
    assert {one.status for one in found.values()} == {"done"}


def test_what_cannot_be_sent_is_a_failure(out, monkeypatch):
    """Of the example, and the next ones are done."""
    monkeypatch.setattr(local, "START", "fork")
    odd = {"prompt": "a", "target": " 7", "units": lambda text: [(0, len(text))]}
    found = done_by(Job(tiny_cage, out), 1, [odd, odd | {"prompt": "b"}, *RECORDS[:1]])
    assert [one.status for one in found.values()] == ["failed", "failed", "done"]
    assert "pickle" in found["a"].failure.message


def test_what_stops_a_worker_stops_the_batch(out, tmp_path):
    """The error is raised here, and nobody is left behind."""
    pool = Processes(Job(functools.partial(mortal, tmp_path / "log"), out), 2)
    processes = [worker.process for worker in pool._workers]
    tasks = [Task(one) for one in given([{"prompt": "Stop", "target": " 7"}])]
    with pytest.raises(OSError, match="No space left"):
        list(pool.map(tasks))
    pool.close()
    assert not any(process.is_alive() for process in processes)


def test_a_worker_that_lost_its_device_is_replaced(out, tmp_path, monkeypatch):
    """The example is a failure, and the next ones are done."""
    for module in (local, worker):
        monkeypatch.setattr(module, "LOST_DEVICE", (OSError,))
    job = Job(functools.partial(mortal, tmp_path / "log"), out)
    found = done_by(job, 1, [{"prompt": "Stop", "target": " 7"}, *RECORDS[:2]])
    assert [one.status for one in found.values()] == ["failed", "done", "done"]


def test_a_worker_that_cannot_start_is_told(out):
    """By its own error, or by its end."""
    with pytest.raises(TypeError, match="cage: must be a GraphContextAttribution"):
        Processes(Job(dict, out), 2)
    with pytest.raises(RuntimeError, match="one died before it was ready, exit code 3"):
        Processes(Job(functools.partial(os._exit, 3), out), 1)
    with pytest.raises(ValueError, match="must be made the same by each worker"):
        Processes(Job(differing, out), 2)


def test_a_wrapper_that_cannot_be_sent_is_refused(out, monkeypatch):
    """With what to pass instead."""
    monkeypatch.setattr(local, "START", "spawn")
    with pytest.raises(ValueError, match="must be something that can be sent"):
        Processes(Job(lambda: tiny_cage(), out), 1)
