"""The house: where modules stand, what they may import, and what each must have."""

import ast
import configparser
import importlib
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from inspect import isclass, isfunction
from pathlib import Path

import pytest

import captum_cage
from captum_cage._version import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "captum_cage"

# A module imports only from the layers above its own. A folder is one entry.
LAYERS = (
    {"_checks", "_version"},
    {"_captum", "_model", "_placement", "_restored", "_shares", "solve", "text"},
    {"units", "graph", "frontier", "causal", "thinking", "foils"},
    {"draws", "archive", "answers", "explanation", "rehearsal", "streamed"},
    {"spool"},
    {"plot", "html", "export", "record"},
    {"spans", "inputs"},
    {"task", "traces"},
    {"methods", "remote"},
    {"rows", "scoring", "engines", "result", "fingerprint"},
    {"window"},
    {"strategy"},
    {"contrast"},
    {"cost"},
    {"interventions", "metrics", "estimate"},
    {"followup"},
    {"attribution"},
    {"terminal", "batch", "testing", "demo"},
    {"cli_options"},
    {"cli_models"},
    {"cli_batch"},
    {"cli", "pytest_plugin"},
)
PURE = ("graph", "frontier", "solve")  # of torch, and of what brings it
TOP_LEVEL = {
    *(".ci", ".gitignore", "Makefile", "constraints.txt", "pyproject.toml"),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in"),
    *(".github", "README.md", "SECURITY.md", "benchmarks", "captum_cage", "docs"),
    *("setup.cfg", "tests"),
}
# Distributions whose module has another name.
MODULES = {"scikit-learn": "sklearn"}
# Extras for who works on the package; the others are for its users.
OURS = {"dev", "docs"}
# Modules of users' extras that others import for us.
FOR_OTHERS = {
    "accelerate",  # transformers, to spread a model over devices
    "openai",  # Captum, to ask a vLLM server
}
# Views that a result imports at their first use, for they bring what the package's
# import must not.
LAZY = {"captum_cage.plot", "captum_cage.html", "captum_cage.export"}
# What the pytest plugin imports at its first use, for it is loaded in every test run.
LAZY |= {"captum_cage.testing", "captum_cage.testing.watch"}
# Packages of those who test: the dev extra has them. Transformers brings tokenizers.
TESTERS = {"hypothesis", "pytest", "tokenizers"}
# Private attributes of others that have no public form.
TOLERATED = {
    "_replace",  # named tuples: a documented method, named so as not to be a field
    "_schema",  # torch: what an operation gives, to whom dispatches it
    "_version",  # torch: how often a tensor was changed in place
    "_global_mapping",  # transformers: its registries have no way to unregister
}
UNTESTED = {"captum_cage", "captum_cage._version"}  # but here


@cache
def tree(path):
    """The syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def dotted(path):
    """The name that a source file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TESTS = {path.name for path in (ROOT / "tests").glob("test_*.py")}
SOURCES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
every_module = pytest.mark.parametrize("name", SOURCES)


def imported(name, node):
    """The modules that an import statement of a module names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        is_package = SOURCES[name].name == "__init__.py"
        parents = name.split(".")
        parents = parents[: len(parents) + is_package - node.level]
        base = ".".join([*parents, base]).rstrip(".")
    return [
        inner if (inner := f"{base}.{alias.name}") in SOURCES else base
        for alias in node.names
    ]


@cache
def imports(name):
    """All modules that a module imports, with the line: type checking included."""
    return [
        (target, node.lineno)
        for node in ast.walk(tree(SOURCES[name]))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in imported(name, node)
    ]


def entry(name):
    """The entry of the table that a module of the package belongs to."""
    return name.split(".")[1]


def is_private(name):
    """Whether a module is private, by its name or by its folder's."""
    return any(part.startswith("_") for part in name.split("."))


def layer(name):
    """The layer that a module stands in; above all layers if it is not in the table."""
    rows = (i for i, names in enumerate(LAYERS) if entry(name) in names)
    return next(rows, len(LAYERS))


def requirements():
    """The distributions that setup.cfg lists, by extra; the key of the rest is ""."""
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = {"": setup["options"]["install_requires"]}
    listed |= setup["options.extras_require"]
    return {
        extra: {re.split(r"[<>=!~\[;]", line)[0] for line in lines.strip().splitlines()}
        for extra, lines in listed.items()
    }


def modules(distributions):
    """The names that distributions are imported by."""
    return {MODULES.get(name, name.replace("-", "_")) for name in distributions}


def run(code):
    """Words that a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def optional_modules():
    """The modules that the extras for users bring."""
    listed = [
        names for extra, names in requirements().items() if extra not in {"", *OURS}
    ]
    return modules(set().union(*listed) - {"captum-cage"})


class TestImports:
    """Imports run one way."""

    @pytest.mark.parametrize("name", [name for name in SOURCES if "." in name])
    def test_every_module_stands_in_the_table(self, name):
        """A new module or folder gets its place in LAYERS."""
        assert entry(name) in set().union(*LAYERS), f"Give {name} a place in LAYERS."

    @pytest.mark.parametrize("name", [name for name in SOURCES if "." in name])
    def test_a_module_imports_from_lower_layers_only(self, name):
        """No module imports from its own layer or a later one, or the package."""
        wrong = [
            f"{SOURCES[name].relative_to(ROOT)}:{line} imports {target}"
            for target, line in imports(name)
            if target.split(".")[0] == "captum_cage"
            and ("." not in target or entry(target) != entry(name))
            and ("." not in target or layer(target) >= layer(name))
        ]
        assert not wrong, "\n".join(wrong)

    def test_no_module_imports_itself_in_the_end(self):
        """There is no cycle, within a folder either."""
        graph = {
            name: {to for to, _ in imports(name)} & set(SOURCES) for name in SOURCES
        }
        TopologicalSorter(graph).prepare()

    @pytest.mark.parametrize("name", PURE)
    def test_graph_frontier_and_solve_import_no_torch(self, name):
        """Neither they nor what they import knows torch, Captum or transformers."""
        seen, waiting = set(), {f"captum_cage.{name}"}
        while waiting:
            module = waiting.pop()
            seen.add(module)
            if module in SOURCES:
                waiting |= {target for target, _ in imports(module)} - seen
        brought = {module.split(".")[0] for module in seen}
        assert not brought & {"captum", "torch", "transformers"}

    @every_module
    def test_captums_private_parts_are_touched_in_one_module(self, name):
        """Only _captum.py imports a private module or name of Captum."""
        private = [
            f"{SOURCES[name].relative_to(ROOT)}:{node.lineno}"
            for node in ast.walk(tree(SOURCES[name]))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for target in imported(name, node)
            if target.split(".")[0] == "captum"
            and any(
                part.startswith("_")
                for part in [*target.split("."), *(alias.name for alias in node.names)]
            )
        ]
        assert name == "captum_cage._captum" or not private, private

    @every_module
    def test_private_attributes_of_other_objects_stay_private(self, name):
        """Only _captum.py reads an underscore attribute that its file does not make."""
        nodes = list(ast.walk(tree(SOURCES[name])))
        own = {
            *(n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)),
            *(
                n.id
                for n in nodes
                if isinstance(n, ast.Name) and type(n.ctx) is ast.Store
            ),
            *(
                n.attr
                for n in nodes
                if isinstance(n, ast.Attribute) and type(n.ctx) is ast.Store
            ),
            # object.__setattr__(self, "_name", value), as frozen dataclasses need it
            *(n.value for n in nodes if isinstance(n, ast.Constant)),
        }
        foreign = [
            f"{SOURCES[name].relative_to(ROOT)}:{node.lineno} reads .{node.attr}"
            for node in nodes
            if isinstance(node, ast.Attribute)
            and re.match(r"_(?!_)", node.attr)
            and node.attr not in {*own, *TOLERATED}
        ]
        assert name == "captum_cage._captum" or not foreign, "\n".join(foreign)

    @every_module
    def test_imports_inside_functions_are_of_optional_packages(self, name):
        """Or of views; an optional one's failure names the extra to install."""
        path = SOURCES[name]
        inner = {
            node
            for function in ast.walk(tree(path))
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        explained = {
            statement
            for block in ast.walk(tree(path))
            if isinstance(block, ast.Try)
            and any(
                re.search(
                    "(ImportError|ModuleNotFoundError)", ast.unparse(handler.type)
                )
                and "pip install captum-cage[" in ast.unparse(handler)
                for handler in block.handlers
                if handler.type
            )
            for statement in block.body
        }
        wrong = [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for node in inner
            if not set(imported(name, node)) <= LAZY
            if node not in explained
            or not {m.split(".")[0] for m in imported(name, node)} <= optional_modules()
        ]
        assert not wrong, wrong

    def test_import_and_the_pytest_plugin_pull_in_no_torch(self):
        """Names and modules of the package are imported at their first use."""
        code = (
            "import sys, captum_cage, captum_cage.pytest_plugin; "
            "print(*{'torch', 'captum', 'transformers', 'numpy'} & set(sys.modules))"
        )
        assert run(code) == []

    def test_names_and_modules_come_with_a_bare_import(self):
        """Each public name, each module; others are no attributes."""
        code = (
            "import captum_cage as c; "
            "print(all(hasattr(c, n) and n in dir(c) for n in c.__all__), "
            "c.graph.AttributionGraph is c.AttributionGraph, c.metrics.__name__, "
            "hasattr(c, 'nothing'), hasattr(c, '_ipython_display_'))"
        )
        expected = ["True", "True", "captum_cage.metrics", "False", "False"]
        assert run(code) == expected

    def test_a_star_brings_the_public_names(self):
        """All of them, and no module."""
        code = "from captum_cage import *; print(*sorted(set(dir()) - set(dir(type))))"
        public = set(captum_cage.__all__) - {"__version__"}
        assert public <= set(run(code))

    def test_import_pulls_in_no_plotting_and_no_command_line(self):
        """The package's import brings none of them that Captum's does not bring."""
        heavy = ["rich", "typer", "matplotlib.pyplot", "sklearn", "networkx", "pandas"]
        heavy += [
            f"captum_cage.{name}"
            for name in ("cli", "plot", "html", "export", "terminal", "demo")
        ]

        code = (
            "import sys, captum.attr; before = set(sys.modules); "
            "from captum_cage import *; "
            f"print(*(sys.modules.keys() - before) & set({heavy!r}))"
        )
        assert run(code) == []

    def test_the_command_line_starts_without_what_extras_bring(self):
        """Nothing at the import of captum_cage.cli brings views or their packages."""
        # Not accelerate: transformers imports it where it is.
        extra = {"networkx", "pandas", "pyarrow", "sklearn", "datasets", "ray"}
        extra |= {"matplotlib.pyplot", "captum_cage.plot", "captum_cage.html"}
        code = (
            # transformers brings accelerate by itself, where that is installed.
            "import sys, captum.attr, typer, transformers.modeling_utils; "
            "before = set(sys.modules); import captum_cage.cli; "
            f"print(*(sys.modules.keys() - before) & set({extra!r}))"
        )
        assert run(code) == []


class TestDependencies:
    """setup.cfg lists what is imported, and nothing else."""

    def test_required_packages_are_the_imported_ones(self):
        """Each package imported is required, or an extra; each required is imported."""
        used = {target.split(".")[0] for name in SOURCES for target, _ in imports(name)}
        used -= {*sys.stdlib_module_names, "captum_cage"}
        assert modules(requirements()["dev"]) >= TESTERS
        assert used - optional_modules() - TESTERS == modules(requirements()[""])
        assert optional_modules() - used == FOR_OTHERS

    def test_packages_of_testers_are_imported_by_what_they_use_alone(self):
        """Only testing and the pytest plugin need them."""
        users = {
            entry(name)
            for name in SOURCES
            for target, _ in imports(name)
            if target.split(".")[0] in TESTERS
        }
        assert users == {"testing", "pytest_plugin"}

    def test_extras_that_errors_name_exist(self):
        """So do those that the docs name, and "all" has each of the users' extras."""
        places = [*SOURCES.values(), *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
        named = {
            extra.strip()
            for path in places
            for found in re.findall(
                r"pip install ['\"]?captum-cage\[([a-z, ]+)\]",
                path.read_text(encoding="utf-8"),
            )
            for extra in found.split(",")
        }
        setup = configparser.RawConfigParser()
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        extras = setup["options.extras_require"]
        assert named
        assert named - {"extra"} <= set(extras)
        everything = re.search(r"\[(.+)\]", extras["all"])[1]
        assert set(everything.split(", ")) == set(extras) - {"all", *OURS}

    def test_constraints_pin_every_requirement(self):
        """constraints.txt has a version of everything that setup.cfg asks for."""
        asked = set().union(*requirements().values()) - {"captum-cage"}
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        assert asked <= {line.split("==")[0] for line in lines}

    def test_the_cited_version_is_the_packages(self):
        """CITATION.cff names the version of the package."""
        cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
        assert f"\nversion: {__version__}\n" in cited


class TestModules:
    """Each module has what a reader looks for."""

    @every_module
    def test_a_module_says_what_it_is(self, name):
        """The first line is its docstring, one sentence that ends there."""
        first = (ast.get_docstring(tree(SOURCES[name])) or "").split("\n")[0]
        assert first.endswith("."), f"{name} begins with {first!r}"

    @pytest.mark.parametrize("name", [name for name in SOURCES if not is_private(name)])
    def test_public_names_exist_and_are_documented(self, name):
        """Each public module has __all__, and what it lists has a docstring."""
        module = importlib.import_module(name)
        for public in module.__all__:
            value = getattr(module, public)
            if isclass(value) or isfunction(value):
                assert value.__doc__, f"{name}.{public} has no docstring"

    @pytest.mark.parametrize("name", sorted(SOURCES.keys() - UNTESTED))
    def test_a_module_has_its_test_file(self, name):
        """tests/test_<module>.py; a folder's modules may share their folder's file."""
        parts = [part.lstrip("_") for part in name.split(".")[1:]]
        wanted = {f"test_{'_'.join(parts)}.py", f"test_{parts[0]}.py"}
        assert wanted & TESTS, f"{name} has none of {wanted}"

    def test_a_test_file_has_its_module(self):
        """No test file outlives what it tests."""
        # Those of the whole: its house, docs, every question, what needs a GPU, ...
        whole = ("house", "docs", "questions", "cuda", "api", "typing", "wheel", "laws")
        whole += ("numbers", "faults", "leaks")
        known = {f"test_{name}.py" for name in whole}
        for name in SOURCES:
            parts = [part.lstrip("_") for part in name.split(".")[1:]]
            known.add(f"test_{'_'.join(parts)}.py")
        assert known >= TESTS

    @every_module
    def test_user_errors_are_raised(self, name):
        """No assert: python -O removes it."""
        lines = [
            n.lineno for n in ast.walk(tree(SOURCES[name])) if type(n) is ast.Assert
        ]
        assert not lines, f"{SOURCES[name].relative_to(ROOT)}: lines {lines}"

    @pytest.mark.parametrize(
        "path",
        [
            p
            for d in ("captum_cage", "tests", "benchmarks")
            for p in ROOT.glob(f"{d}/**/*.py")
        ],
        ids=lambda path: str(path.relative_to(ROOT)),
    )
    def test_a_silenced_check_says_which(self, path):
        """Each "type: ignore" and "noqa" names its rule."""
        bare = re.compile(r"# ?(type: ?ignore(?!\[)|noqa(?!: ?[A-Z]))")
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [i for i, line in enumerate(lines, 1) if bare.search(line)]
        assert not found, f"{path.relative_to(ROOT)}: lines {found}"


def test_the_top_level_holds_what_is_expected():
    """Files that git tracks, or would, stand in their folder."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the tree is not known")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL
