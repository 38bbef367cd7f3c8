"""Annotations as they are written: aliases by their names, all names in full.

autodoc evaluates annotations, which turns ``Explain`` into the union that it stands for
and ``NDArray[np.float64]`` into what NumPy makes of it. Here each annotation of the
package is replaced by what stands in its source, names looked up in its module:
``~captum_cage.spans.Explain | None``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cached_property
from types import FunctionType, ModuleType
from typing import Any

from sphinx.application import Sphinx

import captum_cage

# Its annotations are read by typer.
READ_AT_RUNTIME = {
    f"captum_cage.{name}" for name in ("cli", "cli_batch", "cli_options")
}
# Names that the reference has elsewhere than where they are defined.
HOMES = {"captum_cage._shares.Normalization": "captum_cage.graph.Normalization"}


class Module:
    """The names of a module, as its annotations use them."""

    def __init__(self, module: ModuleType) -> None:
        name = module.__name__
        tree = ast.parse(inspect.getsource(module))
        self.names: dict[str, str] = {}  # what a name is called in full
        self.shorthands: dict[str, ast.expr] = {}  # written out where they are used
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    self.names[alias.asname or alias.name] = full
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.split(".")[0]
                    self.names[alias.asname or top] = (
                        alias.name if alias.asname else top
                    )
        public = getattr(module, "__all__", [])
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                self.names[node.name] = f"{name}.{node.name}"
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = (
                    node.targets if isinstance(node, ast.Assign) else [node.target]
                )
                for target in targets:
                    if not isinstance(target, ast.Name) or node.value is None:
                        continue
                    if isinstance(node, ast.AnnAssign) or target.id in public:
                        self.names[target.id] = f"{name}.{target.id}"
                    elif not isinstance(node.value, ast.Call):
                        self.shorthands[target.id] = node.value


class InFull(ast.NodeTransformer):
    """Names and dotted names become one name, marked to be shown by its end."""

    def __init__(self, modules: dict[str, Module], name: str) -> None:
        self.modules, self.name = modules, name

    def written(self, annotation: str) -> str:
        """An annotation with all names in full."""
        return ast.unparse(self.visit(ast.parse(annotation, mode="eval").body))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """A name, or what it is short for."""
        own = self.modules[self.name]
        full = own.names.get(node.id, f"{self.name}.{node.id}")
        owner, _, end = full.rpartition(".")
        if owner in self.modules and end in self.modules[owner].shorthands:
            written = ast.unparse(self.modules[owner].shorthands[end])
            tree: ast.expr = ast.parse(
                InFull(self.modules, owner).written(written), mode="eval"
            ).body
            return tree
        if node.id not in own.names:
            return node
        return ast.Name(f"~{HOMES.get(full, full)}")

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """A dotted name."""
        owner = self.visit(node.value)
        if isinstance(owner, ast.Name):
            return ast.Name(f"{owner.id}.{node.attr}")
        return ast.Attribute(owner, node.attr)


def annotated(module: ModuleType) -> Iterator[dict[str, Any]]:
    """The annotations of all classes, functions and methods of a module."""
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = [value]
        if isinstance(value, type):
            yield vars(value).get("__annotations__", {})
            members = list(vars(value).values())
        for member in members:
            found = member
            if isinstance(member, staticmethod | classmethod):
                found = member.__func__
            elif isinstance(member, property):
                found = member.fget
            elif isinstance(member, cached_property):
                found = member.func
            found = inspect.unwrap(found)
            if isinstance(found, FunctionType):
                yield found.__annotations__


def rewrite(app: Sphinx) -> None:
    """Put every annotation of the package as it is written."""
    del app
    found = pkgutil.walk_packages(captum_cage.__path__, "captum_cage.")
    imported = [importlib.import_module(info.name) for info in found]
    modules = {module.__name__: Module(module) for module in imported}
    for module in imported:
        if module.__name__ in READ_AT_RUNTIME:
            continue
        in_full = InFull(modules, module.__name__)
        for written in annotated(module):
            for key, annotation in written.items():
                if isinstance(annotation, str) and "~" not in annotation:
                    written[key] = in_full.written(annotation)


def shown(
    app: Sphinx,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    signature: str | None,
    returned: str | None,
) -> tuple[str | None, str | None]:
    """A signature without the defaults that are no Python, as ``<factory>``."""
    del app, what, name, obj, options
    return signature and re.sub(r"= <[^<>]*>", "= ...", signature), returned


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", rewrite)
    app.connect("autodoc-process-signature", shown)
    return {"parallel_read_safe": True}
