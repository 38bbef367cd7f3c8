"""What README and docs show is run: Python blocks, commands and relative links.

A block that cannot run here stands below a comment that says why, and the test report
repeats it::

    <!-- skip: needs a model of 16 GB -->

The tables of docs/reference/methods.md are written by ``python tests/test_docs.py``.
"""

import re
import shlex
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

from captum_cage.cli import main
from captum_cage.engines.registry import engine_names
from captum_cage.methods.catalogue import markdown_table, unsupported_table

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


class Block(NamedTuple):
    """A fenced block of code."""

    page: Path
    line: int  # of its first line of code, from 1
    language: str
    code: str
    skip: str  # the reason, or nothing


def where(place):
    """How the report names a page or a block."""
    if isinstance(place, Block):
        return f"{where(place.page)}:{place.line}"
    return str(place.relative_to(ROOT))


@cache
def tokens(page):
    """The Markdown of a page, parsed."""
    return MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))


def blocks(page):
    """The fenced blocks of a page, in order."""
    skip = ""
    for token in tokens(page):
        if token.type == "fence":
            language = (token.info.split() or [""])[0]
            yield Block(page, token.map[0] + 2, language, token.content, skip)
        found = re.fullmatch(r"\s*<!-- skip: (.+?) -->\s*", token.content, re.DOTALL)
        skip = " ".join(found[1].split()) if found else ""


BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def python_cases():
    """The pages with Python blocks, and beside them each block that is not run."""
    for page in dict.fromkeys(block.page for block in PYTHON):
        yield pytest.param(page, id=where(page))
    for block in PYTHON:
        if block.skip:
            skip = pytest.mark.skip(reason=f"{where(block)}: {block.skip}")
            yield pytest.param(block.page, id=where(block), marks=skip)


def command_cases():
    """The commands of this project after "$ " in console blocks."""
    for block in BLOCKS:
        code = block.code.replace("\\\n", " ")
        for command in re.findall(
            r"^\$ ((?:captum-cage|make)\b.*)", code, re.MULTILINE
        ):
            reason = block.skip
            if command.startswith("captum-cage") and not re.search(
                r"\b(demo|methods)\b|--help|--version", command
            ):
                reason = reason or f"{command} needs a model that is not in the package"
            marks = (
                pytest.mark.skip(reason=f"{where(block)}: {reason}") if reason else ()
            )
            yield pytest.param(
                shlex.split(command, comments=True),
                id=f"{where(block)} {command}",
                marks=marks,
            )


@pytest.mark.parametrize("page", [*python_cases()])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in PYTHON:
        if block.page == page and not block.skip:
            # Empty lines before it, so that a traceback names the line of the page.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize("words", [*command_cases()])
def test_commands_run(words, tmp_path, monkeypatch):
    """A command ends with exit code 0; make has each target that is named."""
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = {word for word in words[1:] if "=" not in word}
        assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:  # as a console script's last line does
        sys.exit(main())
    assert stopped.value.code in {None, 0}


def links(page):
    """The targets of links and pictures, in Markdown and in HTML."""
    for token in tokens(page):
        for part in [token, *(token.children or [])]:
            if target := part.attrGet("href") or part.attrGet("src"):
                yield str(target)
            if part.type in {"html_block", "html_inline"}:
                yield from re.findall(r'(?:href|src)="([^"]*)"', part.content)


@cache
def anchors(page):
    """The anchors of a page's headings, as the usual Markdown hosts name them."""
    parsed, seen, found = tokens(page), Counter(), set()
    for opening, title in pairwise(parsed):
        if opening.type == "heading_open":
            slug = re.sub(r"[^\w\- ]", "", title.content.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def leads_somewhere(page, link):
    """Whether the file of a relative link exists, and the heading that it names."""
    path, _, heading = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (
        not heading or target.suffix != ".md" or heading in anchors(target)
    )


@pytest.mark.parametrize("page", PAGES, ids=where)
def test_relative_links_lead_somewhere(page):
    """No link within the project is dead."""
    relative = [link for link in links(page) if not re.match(r"[a-z]+:", link)]
    assert [link for link in relative if not leads_somewhere(page, link)] == []


# --- the tables of base methods ------------------------------------------------------


def test_the_gallery_shows_what_is_made():
    """Each page has its picture and its link."""
    gallery = ROOT / "docs" / "gallery"
    shown = set(links(gallery / "README.md"))
    made = {file.name for file in gallery.iterdir() if file.suffix in {".html", ".png"}}
    assert made <= shown
    assert len(made) == 14


METHODS_PAGE = ROOT / "docs" / "reference" / "methods.md"


def with_tables(text):
    """A page with its tables of base methods as they are declared."""
    tables = {
        "methods": markdown_table(engine_names()),
        "unsupported": unsupported_table(),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}{table}{end}{after}"
    return text


def test_the_tables_of_base_methods_are_what_the_methods_declare():
    """Each method's row, and what is refused."""
    page = METHODS_PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "Run: python tests/test_docs.py"


if __name__ == "__main__":
    old = METHODS_PAGE.read_text(encoding="utf-8")
    METHODS_PAGE.write_text(with_tables(old), encoding="utf-8")
