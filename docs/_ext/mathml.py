"""Formulas as MathML, which browsers show without a script from the network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def _mathml(node: nodes.Element, *, as_block: bool) -> str:
    text = node.astext()
    try:
        return str(tex2mathml(text, as_block=as_block))
    except MathError as error:
        logger.warning("no MathML for %r: %s", text, error, location=node)
        return ""


def visit_inline(translator: Any, node: nodes.math) -> None:
    """A formula in a line."""
    body = _mathml(node, as_block=False)
    translator.body.append(f'<span class="math notranslate">{body}</span>')
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    """A formula of its own, in a box that scrolls where it is too wide."""
    place = f' id="{node["ids"][0]}"' if node["ids"] else ""
    body = _mathml(node, as_block=True)
    translator.body.append(f'<div class="math notranslate"{place}>{body}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(visit_inline, None),
        block_renderers=(visit_block, None),
    )
    return {"parallel_read_safe": True}
