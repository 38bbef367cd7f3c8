"""Corrections of what ``sphinx.ext.viewcode`` writes.

It takes data for members of the module of their type, and has one name for a module
whose classes the reference documents under several.
"""

from __future__ import annotations

import re
from functools import partial
from importlib import import_module
from typing import Any

from sphinx.application import Sphinx

_BACK = re.compile(r'<a class="viewcode-back" href="([^"#]*)#([\w.]+)">[^<]*</a>')


def module_of(app: Sphinx, module: str, attribute: str) -> str | None:
    """The module of data whose type is another's; else None, and viewcode decides."""
    del app
    found = getattr(import_module(module), attribute, None)
    defined = str(getattr(found, "__module__", "captum_cage"))
    return None if defined.startswith("captum_cage") else module


def link_back(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Links from the source to the reference get the names that it has there."""
    del template, doctree
    if page.startswith("_modules/") and "body" in context:
        context["body"] = _BACK.sub(partial(_corrected, app), context["body"])


def _corrected(app: Sphinx, link: re.Match[str]) -> str:
    objects = app.env.domains.python_domain.objects
    if link[2] in objects and not objects[link[2]].aliased:
        return link[0]
    parts = link[2].split(".")
    for start in range(1, len(parts)):
        end = "." + ".".join(parts[start:])
        for name, entry in objects.items():
            shown = link[1].endswith(f"{entry.docname}.html") and not entry.aliased
            if shown and name.endswith(end):
                return link[0].replace(f"#{link[2]}", f"#{name}")
    return ""


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.setup_extension("sphinx.ext.viewcode")
    app.connect("viewcode-follow-imported", module_of)
    app.connect("html-page-context", link_back)
    return {"parallel_read_safe": True}
