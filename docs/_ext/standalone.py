"""Links to HTML files of the gallery open them, as they do on a code host."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx
from sphinx.util.osutil import relative_uri


def open_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Links that would download an HTML file become links to it."""
    for node in list(doctree.findall(download_reference)):
        target = str(node["reftarget"])
        if not target.endswith(".html"):
            continue
        source = Path(app.env.doc2path(app.env.docname)).parent / target
        if target.startswith("/"):
            source = Path(app.srcdir) / target[1:]
        place = source.resolve().relative_to(Path(app.srcdir).resolve()).as_posix()
        page = app.builder.get_target_uri(app.env.docname)
        link = nodes.reference("", "", *node.children, refuri=relative_uri(page, place))
        link["internal"] = True
        node.replace_self(link)


def copy_pages(app: Sphinx, error: Exception | None) -> None:
    """The gallery's pages, beside the page that shows them."""
    if error is None and app.builder.format == "html":
        target = Path(app.outdir) / "gallery"
        target.mkdir(parents=True, exist_ok=True)
        for page in (Path(app.srcdir) / "gallery").glob("*.html"):
            shutil.copyfile(page, target / page.name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("doctree-read", open_pages, priority=400)
    app.connect("build-finished", copy_pages)
    return {"parallel_read_safe": True}
