"""The tables of the reference, from what the code declares.

They stand in the pages between comments, so that they read well on a code host, too.
``python docs/tables.py`` writes them; the tests hold the pages to them.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterable
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import captum_cage
from captum_cage import AttributionGraph
from captum_cage.batch.table import COLUMNS
from captum_cage.demo import conversations, planted, problems
from captum_cage.engines import registry
from captum_cage.export import _WRITERS, SUFFIXES
from captum_cage.graph import Normalization
from captum_cage.methods.catalogue import (
    capability_of,
    markdown_table,
    unsupported_table,
)
from captum_cage.metrics import COVERAGE, METRICS, metric_info
from captum_cage.metrics.datasets import LOADERS
from captum_cage.metrics.evaluation import TRUTH, VALUES
from captum_cage.metrics.values import SHOWS
from captum_cage.units import NAMED

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
PUBLIC = REFERENCE / "public.md"

_DOCUMENTED = re.compile(r"^\.\. auto(\w+):: ([\w.]+)$", re.MULTILINE)


# --- what is public ------------------------------------------------------------------


def all_modules() -> list[str]:
    """Names of the package and of all its modules."""
    found = pkgutil.walk_packages(captum_cage.__path__, "captum_cage.")
    return ["captum_cage", *sorted(info.name for info in found)]


def public_modules() -> list[str]:
    """The modules that docs/reference/public.md promises."""
    text = PUBLIC.read_text(encoding="utf-8")
    return re.findall(r"^\| `([\w.]+)` \|", _between(text, "public"), re.MULTILINE)


@cache
def documented() -> list[tuple[str, Path]]:
    """Dotted names that the reference has an entry for, and the page of each."""
    found = []
    for page in sorted(REFERENCE.glob("*.md")):
        for kind, name in _DOCUMENTED.findall(page.read_text(encoding="utf-8")):
            names = [name]
            if kind == "module":
                names = [f"{name}.{one}" for one in import_module(name).__all__]
            found += [(one, page) for one in names]
    return found


@cache
def resolved(dotted: str) -> Any:
    """The object of a dotted name."""
    owner, _, name = dotted.rpartition(".")
    return getattr(import_module(owner), name)


def entries_of(module: str, name: str) -> list[Path]:
    """The pages with an entry for a name of a module, wherever else it is found."""
    found = getattr(import_module(module), name)
    return [
        page
        for dotted, page in documented()
        if dotted.rpartition(".")[2] == name and resolved(dotted) is found
    ]


def _summary(name: str) -> str:
    (first, *_) = (inspect.getdoc(import_module(name)) or "").split("\n")
    return first


def _public() -> str:
    rows = []
    for module in public_modules():
        pages = {
            page
            for name in import_module(module).__all__
            for page in entries_of(module, name)
        }
        links = [f"[{_title(page)}]({page.name})" for page in sorted(pages)]
        rows.append((f"`{module}`", _summary(module), ", ".join(links)))
    return _table(("module", "what it is", "its names"), rows)


def _internal() -> str:
    public = set(public_modules())
    rows = []
    for module in all_modules():
        if module not in public:
            names = [
                f"`{dotted.rpartition('.')[2]}`"
                for dotted, _ in documented()
                if dotted.rpartition(".")[0] == module
            ]
            rows.append((f"`{module}`", _summary(module), ", ".join(names)))
    return _table(("module", "why it is there", "public names"), rows)


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").split("\n")[0].removeprefix("# ")


# --- what the code declares ----------------------------------------------------------


def _units() -> str:
    rows = [('`"token"`', "One token each.")]
    rows += [(f'`"{name}"`', _first_line(split)) for name, split in NAMED.items()]
    rows += [
        ("a function", "From a text to the character range of each unit."),
        ("ranges", "Character ranges in the prompt followed by the generated text."),
        ("a mapping", 'One of these for `"source"` and for `"generated"`.'),
    ]
    return _table(("`units=`", "what a unit is"), rows)


def _normalizations() -> str:
    raw = ([3.0, 1.0, -1.0], [-1.0, -1.0, 0.0])
    rows = []
    for name in get_args(Normalization):
        cells = [f'`"{name}"`']
        for row in raw:
            graph = AttributionGraph.from_rows([[*row, 0.0]], 3, normalization=name)
            shares = graph.blocks()[0].toarray()[0]
            cells.append(", ".join(f"{share:g}" for share in shares))
            cells.append(f"{graph.leaked([1.0]):g}")
        rows.append(tuple(cells))
    head = ["`normalization=`"]
    for row in raw:
        head += [", ".join(f"{value:g}" for value in row), "leaks"]
    return _table(head, rows)


def _engines() -> str:
    rows = []
    for method, engine in registry._engines.items():
        if method.__module__.split(".")[0] not in {"captum", "captum_cage"}:
            continue
        declared = capability_of(method)
        rows.append(
            (
                f"`{method.__name__}`",
                _summary(engine.rows.__module__),
                "the same distribution"
                if declared is None or declared.random
                else "the same rows",
                "each row" if engine.by_row else "all rows",
                "" if declared is None else ", ".join(declared.needs),
            )
        )
    head = ("method", "engine", "gives, beside the loop", "computes at once", "needs")
    return _table(head, sorted(rows))


def _values() -> str:
    return _table(
        ("value", "what it shows"),
        [(f"`{name}`", _phrase(SHOWS[name])) for name in VALUES],
    )


def _metrics() -> str:
    rows = [
        (
            f"`{name}`",
            _better(one.higher_is_better),
            _phrase(one.summary),
            one.source,
        )
        for name, one in METRICS.items()
    ]
    for name in TRUTH:
        info = metric_info(name)
        source = "" if info.source.startswith("see ") else info.source
        rows.append((f"`{name}`", _better(info.higher_is_better), _truth(name), source))
    return _table(("metric", "better", "what it is", "paper"), rows)


def _better(higher: bool) -> str:
    return "higher" if higher else "lower"


def _truth(name: str) -> str:
    function = TRUTH[name]
    first = _first_line(getattr(function, "func", function))
    if name not in COVERAGE:
        return first
    low, high = COVERAGE[name]
    above = "" if high == float("inf") else f" to {high:g}"
    return f"{first} Here: from {low:g}{above} of it."


def _datasets() -> str:
    rows = [(f"`{name}`", _first_line(load)) for name, load in LOADERS.items()]
    return _table(("data set", "what it is"), rows)


def _demo() -> str:
    rows = []
    for function, kinds in (
        (problems.sample_problems, problems.KINDS),
        (conversations.sample_conversations, conversations.CONVERSATION_KINDS),
        (planted.planted_cases, planted.PLANTED_KINDS),
    ):
        said = _listed(function)
        rows += [
            (f"`{function.__name__}`", f'`"{kind}"`', _phrase(said[kind]))
            for kind in kinds
        ]
    return _table(("drawn by", "kind", "what it is"), rows)


def _listed(function: Any) -> dict[str, str]:
    """What a docstring says of each kind, in a list or in its argument ``kind``."""
    text = inspect.getdoc(function) or ""
    found = re.findall(r'^- ``"(\w+)"``: (.+?)(?=\n- |\n\n)', text, re.M | re.S)
    said = {kind: " ".join(what.split()) for kind, what in found}
    for kind, what in re.findall(r'``"(\w+)"``\s+\(([^()]+)\)', text):
        said.setdefault(kind, " ".join(what.split()))
    return {kind: what.replace("``", "`") for kind, what in said.items()}


def _suffixes() -> str:
    rows = []
    for suffix in SUFFIXES:
        writer = _WRITERS[suffix]
        whole = writer.__name__ == "_save"
        rows.append(
            (
                f"`{suffix}`",
                "The whole result." if whole else _first_line(writer),
                "yes" if whole else "",
            )
        )
    return _table(("suffix", "what is written", "`load` reads it"), rows)


def _scores() -> str:
    rows = [(f"`{name}`", kind, what) for name, (kind, what) in COLUMNS.items()]
    return _table(("column", "type", "what it is"), rows)


def _extras() -> str:
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    parsed = ConfigParser(comment_prefixes=("#",))
    parsed.read_string(text)
    rows = []
    for extra, packages in parsed["options.extras_require"].items():
        comment = re.search(rf"((?:^# .*\n)+)^{re.escape(extra)} =", text, re.M)
        what = re.sub(r"^# ", "", comment[1], flags=re.M) if comment else ""
        names = (f"`{name}`" for name in packages.split("\n") if name)
        rows.append((f"`{extra}`", " ".join(what.split()), ", ".join(names)))
    return _table(("extra", "what for", "packages"), rows)


# --- the pages -----------------------------------------------------------------------


@cache
def tables() -> dict[Path, dict[str, str]]:
    """For each page, its tables by their names in the comments around them."""
    methods = {"methods": markdown_table(registry.engine_names())}
    methods["unsupported"] = unsupported_table()
    declared = {
        "units": _units(),
        "normalizations": _normalizations(),
        "engines": _engines(),
        "values": _values(),
        "metrics": _metrics(),
        "datasets": _datasets(),
        "demo": _demo(),
        "suffixes": _suffixes(),
        "extras": _extras(),
    }
    return {
        REFERENCE / "methods.md": methods,
        REFERENCE / "tables.md": declared,
        REFERENCE / "batch.md": {"scores": _scores()},
        PUBLIC: {"public": _public(), "internal": _internal()},
    }


def with_tables(text: str, made: dict[str, str]) -> str:
    """A page with its tables as they are declared."""
    for name, table in made.items():
        old = _between(text, name)
        begin, end = _marks(name)
        text = text.replace(f"{begin}{old}{end}", f"{begin}{_linked(table)}{end}")
    return text


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def _between(text: str, name: str) -> str:
    begin, end = _marks(name)
    _, rest = text.split(begin)
    return rest.split(end)[0]


def _linked(table: str) -> str:
    """A table whose papers are links."""
    table = re.sub(
        r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", table
    )
    return re.sub(r"doi:(10\.[^\s|;]+)", r"[doi:\1](https://doi.org/\1)", table)


def _first_line(function: Any) -> str:
    return (inspect.getdoc(function) or "").split("\n")[0].replace("``", "`")


def _phrase(text: str) -> str:
    """A phrase as a sentence."""
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for page, made in tables().items():
        before = page.read_text(encoding="utf-8")
        page.write_text(with_tables(before, made), encoding="utf-8")
