"""The directive ``autoalias``: a type alias as it is written, and what it is for."""

from __future__ import annotations

import ast
import importlib
import inspect
from typing import Any

from annotations import InFull, Module
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective


def written(name: str) -> tuple[str, list[str]]:
    """The right side of an alias, names in full, and its docstring."""
    owner, _, alias = name.rpartition(".")
    module = importlib.import_module(owner)
    for node in ast.parse(inspect.getsource(module)).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        target = node.target if isinstance(node, ast.AnnAssign) else target
        if isinstance(target, ast.Name) and target.id == alias:
            in_full = InFull({owner: Module(module)}, owner)
            documented = ModuleAnalyzer.for_module(owner).find_attr_docs()
            value = ast.unparse(node.value)  # type: ignore[attr-defined]
            return in_full.written(value), documented["", alias]
    imported = Module(module).names[alias]  # it comes from another module
    return written(imported)


class AutoAlias(SphinxDirective):
    """``autoalias``, with the dotted name of a type alias."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The entry of the alias."""
        (name,) = self.arguments
        owner, _, alias = name.rpartition(".")
        value, said = written(name)
        lines = [f".. py:type:: {alias}", f"   :module: {owner}"]
        lines += [f"   :canonical: {value}", ""]
        lines += [f"   {line}" for line in said]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("autoalias", AutoAlias)
    return {"parallel_read_safe": True}
