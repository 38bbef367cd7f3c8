"""Whether the tests see it when the code of the core is wrong, by mutants of the code.

    python benchmarks/mutation.py                        # 60 mutants of each module
    python benchmarks/mutation.py --modules graph solve --sample 0         # all of them
    python benchmarks/mutation.py --out left.json        # and keep those that survived
    python benchmarks/mutation.py --again left.json      # only these, after a mend
    python benchmarks/mutation.py --smoke                # a few, for CI

A mutant is a module with one small mistake: a comparison shifted by one or turned
round, another operator, a number one off, a condition negated or half of it gone, a
statement, a guard, a keyword argument or a context manager left out, the end of a
slice, ``max`` for ``min``. A sample of them is drawn, the same for one seed. Each
mutant meets the tests of its part of the core that run the lines it changes, until one
of them fails; a test that takes more than ten times its time ends the mutant, too. Not
mutated: annotations, docstrings, what errors and warnings say (every text with a space
in it), ``__all__``, imports, overloads, and ``strict`` of ``zip``, which only guards.

Some mutants mean the same as the code. ``equivalent_mutants.json`` has them, each with
the reason; they count neither way. The score is the share of the others that died, with
the 95% interval of Wilson for the share of all mutants of the module.

Tests are collected once; each mutant and each test of the plain code gets a fork of
that process, so none sees what another left. Hypothesis draws the same examples every
time. A mutant of what stands outside of all functions gets a fresh process.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import json
import math
import os
import pickle
import platform
import random
import resource
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import coverage
import hypothesis
import pytest
from _mistakes import ROOT, Mistakes, Mutant
from hypothesis import strategies

EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")

CORE = ("_shares", "graph", "solve", "frontier", "units", "spans", "inputs")
ENGINES = tuple(
    f"engines/{path.stem}"
    for path in sorted((ROOT / "captum_cage" / "engines").glob("[a-z]*.py"))
)
# The tests of each part: one file per module, and one per method for the engines.
CORE_TESTS = tuple(f"test_{name.strip('_')}.py" for name in CORE)
ENGINE_TESTS = (
    *(path.name for path in sorted((ROOT / "tests").glob("test_engines*.py"))),
    *("test_testing_engines.py", "test_rows.py"),
    *(path.name for path in sorted((ROOT / "tests").glob("test_methods*.py"))),
)

# What the tests import, once for all forks, and what is said of the machine.
HEAVY = ("torch", "transformers", "captum.attr", "scipy.sparse.linalg")
SHOWN = ("pytest", "hypothesis", "numpy", "scipy", "torch", "captum", "transformers")
# Seconds of processor time that a test may take with a mutant: so many times those that
# it takes without, and so many more. Wall time counts where a mutant waits for ever.
TIMES, MORE, WAIT = 10.0, 1.5, 180.0
# Bytes that a mutant may take more than the process it is a fork of.
MOST_BYTES = 4 * 2**30


@dataclass
class Ran:
    """What a test of the plain code did.

    Attributes:
        seconds: its processor time.
        lines: lines of each module that it ran, by file.
        passed: whether it passed.
    """

    seconds: float
    lines: dict[str, set[int]]
    passed: bool


class _Plain:
    """Each test by itself, in a fork: its time and its lines."""

    def __init__(self, files: Sequence[str], kept: Path | None) -> None:
        self.files = list(files)
        self.found: dict[str, Ran] = {}
        self._kept = kept

    def run(self, items: Sequence[Any]) -> None:
        """Run all of them, but for those that were run before."""
        known: dict[tuple[str, str], Ran] = {}
        if self._kept and self._kept.exists():
            # A file that this script has written.
            known = pickle.loads(self._kept.read_bytes())
        state = {path: self._state(path) for path in {str(item.path) for item in items}}
        for item in items:
            key = item.nodeid, state[str(item.path)]
            if key not in known:
                ended, told, _ = _forked(partial(self._one, item), WAIT)
                whole = ended == "ended" and told
                known[key] = pickle.loads(told) if whole else Ran(0.0, {}, False)
            self.found[item.nodeid] = known[key]
        if self._kept:
            self._kept.write_bytes(pickle.dumps(known))

    def _state(self, path: str) -> str:
        """What a test's lines depend on: the modules and its own file."""
        digest = hashlib.sha256()
        for one in (path, *self.files):
            digest.update(Path(one).read_bytes())
        return digest.hexdigest()

    def _one(self, item: Any, tell: Callable[[bytes], None]) -> None:
        watched = coverage.Coverage(
            data_file=None, include=self.files, config_file=False, messages=False
        )
        failed: list[str] = []
        item.config.pluginmanager.register(_Reports(failed.append))
        before = time.process_time()
        watched.start()
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        watched.stop()
        seconds = time.process_time() - before
        data = watched.get_data()
        lines = {path: set(data.lines(path) or ()) for path in self.files}
        tell(pickle.dumps(Ran(seconds, lines, not failed)))


class _Reports:
    """Tells of a test that failed, whatever part of it."""

    def __init__(self, failed: Callable[[str], None]) -> None:
        self._failed = failed

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report.nodeid)


def _forked(
    work: Callable[[Callable[[bytes], None]], None], wait: float
) -> tuple[str, bytes, int]:
    """Do something in a fork; how it ended, what it told, and its status."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        code = 1
        try:
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(silence, stream)
            free = resource.getrlimit(resource.RLIMIT_AS)[1]
            most = _taken() + MOST_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, free))

            def tell(news: bytes) -> None:
                while news:
                    news = news[os.write(writing, news) :]

            work(tell)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    told = b""
    how = "ended"
    while True:
        ready, _, _ = select.select([reading], [], [], wait)
        if not ready:
            os.kill(child, signal.SIGKILL)
            how = "waited"
            break
        news = os.read(reading, 1 << 16)
        if not news:
            break
        told += news
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if how == "ended" and os.WIFSIGNALED(status):
        late = {signal.SIGPROF, signal.SIGKILL}
        how = "late" if os.WTERMSIG(status) in late else "crashed"
    return how, told, status


def _taken() -> int:
    """Bytes of address space of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 1 << 46
    return pages * resource.getpagesize()


def _run_items(
    items: Sequence[Any], seconds: dict[str, float], tell: Callable[[bytes], None]
) -> None:
    """Run tests until one fails, each within its time; tell which was the last."""

    def failed(nodeid: str) -> None:
        tell(f"killed {nodeid}\n".encode())
        os._exit(0)

    config = items[0].config
    config.pluginmanager.register(_Reports(failed))
    for item, following in zip(items, [*items[1:], None], strict=True):
        tell(f"began {item.nodeid}\n".encode())
        limit = TIMES * seconds.get(item.nodeid, 1.0) + MORE
        # Its default action ends the process, in the midst of compiled code, too.
        signal.setitimer(signal.ITIMER_PROF, limit)
        config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    tell(b"survived\n")


def _verdict(how: str, told: bytes) -> tuple[str, str]:
    """The outcome, and the test that brought it about."""
    lines = told.decode(errors="replace").splitlines()
    last = lines[-1] if lines else ""
    kind, _, nodeid = last.partition(" ")
    if kind == "killed" or kind == "survived":
        return kind, nodeid
    if how in ("late", "waited"):
        return "timed out", nodeid
    return "killed", nodeid or "at import"


class _Part:
    """A plugin of pytest that meets the mutants instead of running the tests."""

    def __init__(
        self,
        mistakes: dict[str, Mistakes],
        drawn: Sequence[Mutant],
        longest: float,
        seconds: float,
        plain: Path | None,
        note: Callable[..., None],
    ) -> None:
        self.mistakes = mistakes
        self.drawn = drawn
        self.longest = longest
        self.seconds = seconds
        self.plain = plain
        self.note = note
        self.ran: dict[str, Ran] = {}
        self.at_import: dict[str, set[int]] = {}
        self.late: list[tuple[Mutant, list[str]]] = []
        self._kills: dict[tuple[str, str], Counter[str]] = {}
        self._watched = coverage.Coverage(
            data_file=None,
            include=[str(one.path) for one in mistakes.values()],
            config_file=False,
            messages=False,
        )
        self._watched.start()

    def pytest_sessionstart(self) -> None:
        """Hypothesis draws the same for all, and stops at the first failure."""
        _same_examples()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        """Take the place of the loop over the tests."""
        self._watched.stop()
        data = self._watched.get_data()
        for one in self.mistakes.values():
            self.at_import[one.module] = set(data.lines(str(one.path)) or ())
        items = list(session.items)
        plain = _Plain([str(one.path) for one in self.mistakes.values()], self.plain)
        plain.run(items)
        self.ran = plain.found
        for nodeid, ran in self.ran.items():
            if not ran.passed:
                self.note(f"left out, as it fails on the plain code: {nodeid}")
        gc.unfreeze()
        functions = _functions(one.path for one in self.mistakes.values())
        by_id = {item.nodeid: item for item in items}
        for number, mutant in enumerate(self.drawn):
            nodeids = self._tests(mutant)
            if not nodeids:
                mutant.outcome = "survived"
                mutant.by = "no test runs it"
                continue
            if mutant.warm:
                chosen = [by_id[nodeid] for nodeid in nodeids]
                self._meet(mutant, chosen, functions)
            if not mutant.outcome or (
                mutant.outcome == "survived"
                and self.at_import[mutant.module] & set(mutant.lines)
            ):
                mutant.outcome = ""
                self.late.append((mutant, nodeids))
            if mutant.outcome == "survived":
                self.note(
                    f"survived: {mutant.module}:{mutant.line} {mutant.where}\n"
                    f"- {mutant.before}\n+ {mutant.after}"
                )
            if number % 20 == 19:
                self.note(f"{number + 1} of {len(self.drawn)}")
        return True

    def _tests(self, mutant: Mutant) -> list[str]:
        """Tests that run a mutant: those that killed its like, then the quick ones."""
        one = self.mistakes[mutant.module]
        path = str(one.path)
        lines = set(mutant.lines)
        every = False
        if not mutant.warm:
            # What a class is, a test may see without running a line of it.
            lines = set(_using(one.tree, mutant))
            every = not lines
        kills = self._kills.get((mutant.module, mutant.where), Counter())
        found = sorted(
            (ran.seconds, nodeid)
            for nodeid, ran in self.ran.items()
            if ran.passed
            and ran.seconds <= self.longest
            and (every or lines & ran.lines[path])
        )
        # Of a test with many parameters the quickest first, then all others.
        turns: Counter[str] = Counter()
        turn = {}
        for _, nodeid in found:
            function = nodeid.partition("[")[0]
            turn[nodeid] = turns[function]
            turns[function] += 1
        found.sort(key=lambda one: (-kills[one[1]], turn[one[1]], one[0]))
        spent = accumulate(seconds for seconds, _ in found)
        return [
            nodeid
            for (_, nodeid), sofar in zip(found, spent, strict=True)
            if sofar <= self.seconds
        ]

    def _meet(
        self,
        mutant: Mutant,
        items: Sequence[Any],
        functions: dict[tuple[str, int, str], list[FunctionType]],
    ) -> None:
        one = self.mistakes[mutant.module]
        seconds = {nodeid: ran.seconds for nodeid, ran in self.ran.items()}

        def work(tell: Callable[[bytes], None]) -> None:
            mutant.apply()
            try:
                _exchange(one, functions)
            except ValueError:
                tell(b"other cells\n")
                return
            _run_items(items, seconds, tell)

        how, told, _ = _forked(work, WAIT)
        if told.startswith(b"other cells"):
            return
        mutant.outcome, mutant.by = _verdict(how, told)
        self._count(mutant)

    def _count(self, mutant: Mutant) -> None:
        if mutant.outcome == "killed":
            place = self._kills.setdefault((mutant.module, mutant.where), Counter())
            place[mutant.by] += 1


def _same_examples() -> None:
    """Hypothesis draws alike in every fork, and does not shrink what fails."""
    hypothesis.settings.register_profile(
        "mutation",
        parent=hypothesis.settings(),
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutation")
    # What it reads at its first examples is then read before all forks.
    _any_example()


@hypothesis.given(strategies.text(), strategies.floats(), strategies.integers())
def _any_example(text: str, number: float, whole: int) -> None:
    """Takes anything."""
    del text, number, whole


def _functions(
    paths: Iterable[Path],
) -> dict[tuple[str, int, str], list[FunctionType]]:
    """All functions made from some files, by file, line and name."""
    files = {str(path) for path in paths}
    found: dict[tuple[str, int, str], list[FunctionType]] = {}
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__.co_filename in files:
            code = one.__code__
            key = code.co_filename, code.co_firstlineno, code.co_name
            found.setdefault(key, []).append(one)
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield one
            yield from _codes(one)


def _exchange(
    one: Mistakes, functions: dict[tuple[str, int, str], list[FunctionType]]
) -> None:
    """Give all functions of a module the code of its tree as it now is."""
    for code in _codes(one.code()):
        key = code.co_filename, code.co_firstlineno, code.co_name
        for function in functions.get(key, ()):
            function.__code__ = code


def _using(tree: ast.Module, mutant: Mutant) -> Iterator[int]:
    """Lines of the functions that need what stands outside of all functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            uses = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            head = first <= mutant.line < node.body[0].lineno
            if head or uses & set(mutant.names):
                yield from range(node.body[0].lineno, (node.end_lineno or 0) + 1)


class _Mutated(importlib.abc.MetaPathFinder):
    """Imports one module from a tree instead of its file."""

    def __init__(self, one: Mistakes) -> None:
        self._one = one

    def find_spec(
        self, fullname: str, *_: object
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's spec, if it is this one."""
        if fullname != self._one.dotted:
            return None
        code = self._one.code()

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, *_: object) -> CodeType:
                return code

        loader = Loader(fullname, str(self._one.path))
        return importlib.machinery.ModuleSpec(
            fullname, loader, origin=str(self._one.path)
        )


class _Fresh:
    """A plugin of pytest that runs some tests until one fails."""

    def __init__(
        self,
        nodeids: Sequence[str],
        seconds: dict[str, float],
        tell: Callable[[bytes], None],
    ) -> None:
        self._nodeids, self._seconds, self._tell = nodeids, seconds, tell

    def pytest_sessionstart(self) -> None:
        """Hypothesis draws the same as for the plain code."""
        _same_examples()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        """Run the chosen tests."""
        by_id = {item.nodeid: item for item in session.items}
        chosen = [by_id[nodeid] for nodeid in self._nodeids if nodeid in by_id]
        if session.testsfailed or len(chosen) < len(self._nodeids):
            # The mutant cannot be imported.
            self._tell(b"killed at import\n")
            os._exit(0)
        _run_items(chosen, self._seconds, self._tell)
        os._exit(0)


def _pytest(files: Sequence[str], plugin: object) -> int:
    quiet = ["-q", "-s", "--tb=native", "--assert=plain", "--no-header"]
    apart = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov"]
    more = ["--continue-on-collection-errors", "--rootdir", str(ROOT)]
    config = ["-c", str(ROOT / "pyproject.toml")]
    return int(pytest.main([*config, *quiet, *apart, *more, *files], plugins=[plugin]))


def met(
    mistakes: dict[str, Mistakes],
    drawn: list[Mutant],
    files: Sequence[str],
    limits: tuple[float, float],
    plain: Path | None,
) -> tuple[list[Mutant], dict[str, Any]]:
    """Mutants with their outcomes, and what there is to say of the tests."""
    paths = [
        name if name.startswith("-") else str(ROOT / "tests" / name) for name in files
    ]

    def warm(tell: Callable[[bytes], None]) -> None:
        noted = os.fdopen(os.dup(keep), "w", buffering=1)
        part = _Part(
            mistakes, drawn, *limits, plain, lambda text: print(text, file=noted)
        )
        _pytest(paths, part)
        where = {id(mutant): place for place, mutant in enumerate(drawn)}
        tell(
            pickle.dumps(
                (
                    [(mutant.outcome, mutant.by) for mutant in drawn],
                    [(where[id(mutant)], nodeids) for mutant, nodeids in part.late],
                    {nodeid: ran.seconds for nodeid, ran in part.ran.items()},
                    [nodeid for nodeid, ran in part.ran.items() if not ran.passed],
                    [
                        nodeid
                        for nodeid, ran in part.ran.items()
                        if ran.passed and ran.seconds > limits[0]
                    ],
                )
            )
        )

    keep = os.dup(2)
    flags = [name for name in files if name.startswith("-")]
    how, told, status = _forked(warm, 24 * 3600.0)
    if how != "ended" or not told or not pickle.loads(told)[2]:
        raise RuntimeError(f"the tests could not be collected: {how}, status {status}")
    outcomes, late, seconds, failing, long = pickle.loads(told)
    for mutant, (outcome, by) in zip(drawn, outcomes, strict=True):
        mutant.outcome, mutant.by = outcome, by
    for number, (place, nodeids) in enumerate(late):
        mutant = drawn[place]
        one = mistakes[mutant.module]
        needed = sorted({nodeid.split("::")[0] for nodeid in nodeids})

        def fresh(
            tell: Callable[[bytes], None],
            mutant: Mutant = mutant,
            one: Mistakes = one,
            nodeids: list[str] = nodeids,
            needed: list[str] = needed,
        ) -> None:
            mutant.apply()
            sys.meta_path.insert(0, _Mutated(one))
            tell(b"began at import\n")
            _pytest(
                [*flags, *(str(ROOT / file) for file in needed)],
                _Fresh(nodeids, seconds, tell),
            )
            tell(b"killed at import\n")

        how, told, _ = _forked(fresh, WAIT)
        mutant.outcome, mutant.by = _verdict(how, told)
        if number % 20 == 19:
            print(f"{number + 1} of {len(late)} afresh", file=sys.stderr, flush=True)
    os.close(keep)
    for mutant in drawn:
        if not mutant.outcome:
            raise RuntimeError(f"no test was run with {mutant.key}")
    said = {
        "tests": len(seconds),
        "failing": failing,
        "long": long,
        "afresh": len(late),
    }
    return drawn, said


def wilson(hits: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share."""
    if not of:
        return 0.0, 1.0
    share = hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    half /= 1 + z * z / of
    return max(0.0, middle - half), min(1.0, middle + half)


def equivalents() -> dict[tuple[str, str, str, str, int], str]:
    """The reason of each mutant that means the same as the code."""
    found = {}
    for one in json.loads(EQUIVALENT.read_text("utf-8")):
        key = one["module"], one["where"], one["before"], one["after"]
        found[(*key, one.get("nth", 0))] = one["reason"]
    return found


def report(
    mistakes: dict[str, Mistakes], drawn: Sequence[Mutant]
) -> tuple[list[Mutant], float]:
    """Print the table; the survivors, and the least score of a module."""
    known = equivalents()
    least = 1.0
    print(
        "\n| module | mutants | met | killed | timed out | survived | equivalent "
        "| score | 95% interval |\n|---|---|---|---|---|---|---|---|---|"
    )
    rows: list[tuple[str, int, Counter[str]]] = []
    for module, one in mistakes.items():
        counts = Counter(
            "equivalent"
            if mutant.outcome == "survived" and mutant.key in known
            else mutant.outcome
            for mutant in drawn
            if mutant.module == module
        )
        rows.append((module, len(one.mutants), counts))
    for part, names in (("core", CORE), ("engines", ENGINES)):
        some = [row for row in rows if row[0] in names]
        if len(some) > 1:
            rows.append(
                (
                    f"all of {part}",
                    sum(row[1] for row in some),
                    sum((row[2] for row in some), Counter()),
                )
            )
    for module, total, counts in rows:
        met_with = sum(counts.values())
        died = counts["killed"] + counts["timed out"]
        of = met_with - counts["equivalent"]
        low, high = wilson(died, of)
        score = died / of if of else 1.0
        least = min(least, score)
        interval = "all" if met_with == total else f"{low:.0%} to {high:.0%}"
        print(
            f"| {module} | {total} | {met_with} | {counts['killed']} "
            f"| {counts['timed out']} | {counts['survived']} | {counts['equivalent']} "
            f"| {score:.1%} | {interval} |"
        )
    for mutant in drawn:
        if mutant.outcome != "survived" and mutant.key in known:
            print(f"\nlisted as equivalent, but killed by {mutant.by}:", end="")
            show(mutant)
    survivors = [
        mutant
        for mutant in drawn
        if mutant.outcome == "survived" and mutant.key not in known
    ]
    return survivors, least


def _no_mistake(one: Mistakes, warm: bool) -> Mutant:
    """The plain code in the form of a mutant, which must survive."""
    same = "the plain code"
    return Mutant(one.module, "", same, same, 0, 1, tuple(range(1, 10**4)), warm)


def show(mutant: Mutant) -> None:
    """Print a mutant as a difference."""
    nth = f", number {mutant.nth + 1} of its kind" if mutant.nth else ""
    why = f" ({mutant.by})" if mutant.by else ""
    print(
        f"\ncaptum_cage/{mutant.module}.py:{mutant.line} {mutant.where}{nth}{why}\n"
        f"- {mutant.before}\n+ {mutant.after}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the scores; the exit code says whether all are high enough."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*CORE, *ENGINES]
    parser.add_argument("--modules", nargs="+", choices=names, default=names)
    parser.add_argument("--sample", type=int, default=60, help="of each; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.9, help="score of a module")
    parser.add_argument(
        "--longest", type=float, default=1.5, help="no test that takes more seconds"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of tests that a mutant meets"
    )
    parser.add_argument(
        "--plain", type=Path, help="file of the tests' lines, for a second run"
    )
    parser.add_argument("--out", type=Path, help="file for those that survived")
    parser.add_argument("--again", type=Path, help="only those of such a file")
    parser.add_argument("--tests", nargs="+", help="these files, not those of the part")
    parser.add_argument(
        "--smoke", action="store_true", help="three mutants of one module"
    )
    options = parser.parse_args(arguments)
    if not hasattr(os, "fork"):
        print("This needs os.fork, which this system lacks.")
        return 0
    out = options.out and options.out.resolve()
    plain = options.plain and options.plain.resolve()
    modules = ["_shares"] if options.smoke else list(dict.fromkeys(options.modules))
    sample = 3 if options.smoke else options.sample
    if options.smoke:
        # It needs nothing of conftest.py, which takes seconds to import.
        options.tests = ["test_shares.py", "--noconftest"]
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

    versions = [f"{name} {version(name)}" for name in SHOWN]
    print(
        f"{os.cpu_count()} cores, {platform.machine()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}; "
        f"{sample or 'all'} mutants of each module, seed {options.seed}",
        flush=True,
    )
    if not options.smoke:
        for name in HEAVY:
            importlib.import_module(name)
    again = None
    if options.again:
        again = {
            (one["module"], one["where"], one["before"], one["after"], one["nth"])
            for one in json.loads(options.again.read_text("utf-8"))
        }
        modules = [name for name in names if name in {key[0] for key in again}]
    start = time.perf_counter()
    mistakes: dict[str, Mistakes] = {}
    drawn: list[Mutant] = []
    wrong: list[Mutant] = []
    for part, files in ((CORE, CORE_TESTS), (ENGINES, ENGINE_TESTS)):
        some = {name: Mistakes(name) for name in modules if name in part}
        if not some:
            continue
        chosen: list[Mutant] = []
        for name, one in some.items():
            every = one.mutants
            if again is not None:
                every = [mutant for mutant in every if mutant.key in again]
            elif 0 < sample < len(every):
                # A text as seed: the same on all machines and versions of Python.
                every = [*every]
                random.Random(f"{options.seed} {name}").shuffle(every)
                every = every[:sample]
            chosen += every
        files = tuple(options.tests or files)
        random.Random(options.seed).shuffle(chosen)
        same = [
            _no_mistake(one, warm) for one in some.values() for warm in (True, False)
        ]
        every = [*chosen, *same] if options.smoke else chosen
        limits = options.longest, options.seconds
        found, said = met(some, every, files, limits, plain)
        drawn += found[: len(chosen)]
        wrong += [
            mutant for mutant in found[len(chosen) :] if mutant.outcome != "survived"
        ]
        mistakes |= some
        print(
            f"{', '.join(some)}: {said['tests']} tests, {said['afresh']} mutants in a "
            f"fresh process, {time.perf_counter() - start:.0f} s so far",
            flush=True,
        )
        print(f"left out, as they take too long: {len(said['long'])}")
        for nodeid in said["failing"]:
            print(f"left out, as it fails on the plain code: {nodeid}")
    survivors, least = report(mistakes, drawn)
    for mutant in sorted(survivors, key=lambda one: (one.module, one.line)):
        show(mutant)
    if out:
        out.write_text(
            json.dumps(
                [
                    {
                        "module": mutant.module,
                        "where": mutant.where,
                        "before": mutant.before,
                        "after": mutant.after,
                        "nth": mutant.nth,
                        "line": mutant.line,
                        "by": mutant.by,
                    }
                    for mutant in survivors
                ],
                indent=2,
                ensure_ascii=False,
            )
            + "\n",
            "utf-8",
        )
    for mutant in wrong:
        print(f"\n{mutant.module}: killed without a mistake, by {mutant.by}")
    if options.smoke:
        return int(bool(wrong))
    return 0 if least >= options.least or again is not None else 1


if __name__ == "__main__":
    sys.exit(main())
