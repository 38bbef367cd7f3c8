"""Formulas as MathML, which browsers show without a script from the network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


def _mathml(node: nodes.Element, display: str) -> str:
    try:
        found = str(convert(node.astext(), display=display))
    # Its exceptions have nothing in common.
    except Exception as error:  # noqa: BLE001
        logger.warning("no MathML: %s", error, location=node)
        return ""
    # Browsers do not make digits bold by themselves.
    return found.replace('<mn mathvariant="bold">1</mn>', "<mn>\U0001d7cf</mn>")


def visit_inline(translator: Any, node: nodes.math) -> None:
    """A formula in a line."""
    body = _mathml(node, "inline")
    translator.body.append(f'<span class="math notranslate">{body}</span>')
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    """A formula of its own, in a box that scrolls where it is too wide."""
    place = f' id="{node["ids"][0]}"' if node["ids"] else ""
    body = _mathml(node, "block")
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
