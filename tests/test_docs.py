"""What README and docs show is run: Python blocks and commands; and links are followed.

A block that cannot run here stands below a comment that says why, and the test report
repeats it::

    <!-- skip: needs a model of 16 GB -->

The blocks of a page are run one after the other. Cells of notebooks are run by Sphinx,
which follows the links of the built pages, too. The tables of the reference are written
by ``python docs/tables.py``.
"""

import ast
import configparser
import inspect
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

from captum_cage.cli import main

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "docs" / "_ext")]

import command_line  # noqa: E402
import links as site_links  # noqa: E402
import tables as site_tables  # noqa: E402

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
SHELLS = {"sh", "bash", "shell"}
# What a command of the program needs that is in the package.
OWN_MODEL = re.compile(r"\b(demo|methods|show)\b|--help|--version")


def commands(block):
    """The commands of a block: after "$ " in a console, each line of a script."""
    code = block.code.replace("\\\n", " ")
    if block.language == "console":
        return re.findall(r"^\$ (.+)", code, re.MULTILINE)
    if block.language in SHELLS:
        return re.findall(r"^(?!#)(\S.*)", code, re.MULTILINE)
    return []


def no_model(command):
    """Why a command of the program cannot be run here, if it cannot."""
    if "captum-cage " in command and not OWN_MODEL.search(command):
        return f"{command} needs a model that is not in the package"
    return ""


RUN = [block for block in BLOCKS if block.language == "python" or commands(block)]


def run_cases():
    """The pages with blocks to run, and beside them each one that is not run."""
    for page in dict.fromkeys(block.page for block in RUN):
        yield pytest.param(page, id=where(page))
    for block in RUN:
        reasons = [block.skip] if block.skip else map(no_model, commands(block))
        for reason in filter(None, reasons):
            skip = pytest.mark.skip(reason=f"{where(block)}: {reason}")
            yield pytest.param(block.page, id=where(block), marks=skip)


@pytest.mark.parametrize("page", [*run_cases()])
def test_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in RUN:
        if block.page != page or block.skip:
            continue
        if block.language == "python":
            # Empty lines before it, so that a traceback names the line of the page.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, page, "exec"), namespace)
        for command in commands(block):
            if not no_model(command):
                run(command, block, monkeypatch)


def run(command, block, monkeypatch):
    """Run a command of this project; of another tool, look whether it could be run."""
    words = shlex.split(command, comments=True)
    if not words:
        return
    if {"|", ">", "<"} & set(words):
        run_by_shell(command)
    elif words[0] == "captum-cage":
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:  # as a console script's last line
            sys.exit(main())
        assert stopped.value.code in {None, 0}, command
    elif words[0] in LOOKED_AT:
        LOOKED_AT[words[0]](words[1:])
    else:
        pytest.fail(
            f"{where(block)}: {words[0]} is not run here. Say why, in a line above the "
            "block: <!-- skip: reason -->"
        )


def run_by_shell(command):
    """A pipe, in which ``captum-cage`` and ``python`` are those of the tests."""
    functions = """
        captum-cage() { "$PYTHON" -c 'from captum_cage.cli import main; main()' "$@"; }
        python() { "$PYTHON" "$@"; }
        set -eo pipefail
    """
    found = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": found}
    subprocess.run(
        ["bash", "-c", textwrap.dedent(functions) + command],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
    )


def has_targets(words):
    """``make`` has each target that is named."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = {word for word in words if "=" not in word}
    assert wanted <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def has_extras(words):
    """What ``pip`` is asked to install is this project, with extras that it has."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert words[0] == "install"
    for word in words[1:]:
        if not word.startswith("-"):
            name, extras = re.fullmatch(r"([\w.-]+?)(?:\[([\w,-]+)\])?", word).groups()
            assert name in {"captum-cage", "."}, f"pip install {word}: skip the block"
            known = setup["options.extras_require"]
            assert set((extras or "").split(",")) - {""} <= set(known)


def has_options(words):
    """A program of the tree exists and names each option; ``make`` runs it."""
    if words[:2] == ["-m", "pip"]:
        has_extras(words[2:])
        return
    program = ROOT / words[0]
    source = program.read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{words[0]} has no {word}"


LOOKED_AT = {
    "make": has_targets,
    "pip": has_extras,
    "python": has_options,
}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("make no-such-target", "assert"),
        ("pip install captum-cage[no-such-extra]", "assert"),
        ("python benchmarks/rows.py --no-such-option", "has no --no-such-option"),
        ("no-such-tool", "is not run here"),
        ("captum-cage no-such-command", "captum-cage no-such-command"),
        ("captum-cage demo --no-such-option | cat", "non-zero exit status"),
    ],
)
def test_a_wrong_command_is_found(command, message, monkeypatch):
    """A command that is not there, or an option, fails the test of its page."""
    block = Block(ROOT / "README.md", 1, "console", command, "")
    failures = (AssertionError, subprocess.CalledProcessError, pytest.fail.Exception)
    with pytest.raises(failures, match=message):
        run(command, block, monkeypatch)


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


def test_the_gallery_shows_what_is_made():
    """Each page has its picture and its link."""
    gallery = ROOT / "docs" / "gallery"
    shown = set(links(gallery / "README.md"))
    made = {file.name for file in gallery.iterdir() if file.suffix in {".html", ".png"}}
    assert made <= shown
    assert len(made) == 14


SITE = {
    "index.html": """<h1 id="top">Top</h1><a href="a/b%20c.html#here">
        <img src="one.png"><a href="https://example.org/x"><a href="#top"><a href="">
        <a href="a/"><a href="mailto:a@example.org">""",
    "a/index.html": "",
    "a/b c.html": '<p id="here"><a href="../index.html">',
    "one.png": "",
}


@pytest.mark.parametrize(
    ("link", "found"),
    [
        ('<a href="none.html">', "leads to no file"),
        ('<a href="a/b%20c.html#there">', "leads to no place in that file"),
        ('<a href="#there">', "leads to no place in that file"),
        ('<img src="two.png">', "leads to no file"),
        ('<a href="a/b c.html">', "has white space in it"),
        ('<a href="http://example.org">', "is no https address"),
        ('<a href="https://example">', "is no https address"),
        ('<script src="https://example.org/x.js">', "is loaded from the network"),
        (
            '<link rel="stylesheet" href="https://example.org/x.css">',
            "from the network",
        ),
    ],
)
def test_dead_links_of_the_built_site_are_found(tmp_path, capsys, link, found):
    """What leads nowhere is named with its page; the rest is not."""
    for name, text in SITE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert site_links.main(tmp_path) == 0
    (tmp_path / "index.html").write_text(SITE["index.html"] + link, encoding="utf-8")
    site_links.read.cache_clear()
    assert site_links.main(tmp_path) == 1
    line, count = capsys.readouterr().out.splitlines()[-2:]
    assert line.startswith("index.html: ")
    assert line.endswith(found)
    assert count == "3 pages, 1 dead links"


# --- the reference -------------------------------------------------------------------


@pytest.mark.parametrize("page", [*site_tables.tables()], ids=where)
def test_tables_are_what_the_code_declares(page):
    """Each table of the reference, line by line."""
    text = page.read_text(encoding="utf-8")
    made = site_tables.tables()[page]
    assert text == site_tables.with_tables(text, made), "Run: python docs/tables.py"


@pytest.mark.parametrize("module", site_tables.public_modules())
def test_public_names_have_one_entry(module):
    """Each name of a public module's ``__all__`` is documented exactly once."""
    names = site_tables.import_module(module).__all__
    entries = {name: len(site_tables.entries_of(module, name)) for name in names}
    assert entries == dict.fromkeys(names, 1)


def test_every_entry_is_of_a_name_that_is_exported():
    """No entry is of a private name, and none is there twice."""
    names = [name for name, _ in site_tables.documented()]
    assert len(names) == len(set(names))
    for dotted in names:
        owner, _, name = dotted.rpartition(".")
        assert not name.startswith("_") or name == "__version__", dotted
        assert hasattr(site_tables.import_module(owner), name), dotted


def test_every_command_has_a_section():
    """The page of the command line shows each command once."""
    page = ROOT / "docs" / "reference" / "command-line.md"
    shown = re.findall(r"^```\{command-line\} ?(\S*)", page.read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(command_line.commands())


@pytest.mark.parametrize("name", [*command_line.commands()])
def test_a_command_s_section_has_what_its_help_has(name, capsys, monkeypatch):
    """All options that are typed at a prompt, and no citation in what is printed."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["captum-cage", *filter(None, [name]), "--help"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    options = {*re.findall(r"(--[a-z][\w-]*)\b", printed)} - {"--help"}
    section = command_line.markdown(name)
    assert {option for option in options if option not in section} == set()
    assert ":cite:" not in printed + section


# --- the bibliography ----------------------------------------------------------------

SOURCES = [*ROOT.glob("captum_cage/**/*.py"), *ROOT.glob("docs/**/*.md")]
BIBLIOGRAPHY = (ROOT / "docs" / "references.bib").read_text(encoding="utf-8")
ENTRIES = {
    key: dict(re.findall(r"^  (\w+) = \{(.*)\},$", fields, re.MULTILINE))
    for key, fields in re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", BIBLIOGRAPHY, re.M | re.S)
}
NUMBER = re.compile(
    r"arXiv:(\d{4}\.\d{4,5})|doi:(10\.\d{4,}/[^\s|;,\])\"]*[^\s|;,\])\".])"
)


def test_entries_are_whole():
    """Each has its authors, a title, a year, and where it is found."""
    assert len(ENTRIES) == BIBLIOGRAPHY.count("@")
    for key, fields in ENTRIES.items():
        assert {"author", "title", "year"} <= set(fields), key
        assert {"eprint", "doi", "url"} & set(fields), key
        assert fields["year"] in key, key


def test_every_entry_is_cited_or_named():
    """By its key, or by its number where a table links to the paper."""
    texts = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    cited = {*re.findall(r"cite(?:\}|:p:|:t:)`(\w+)`", texts)}
    cited |= {*re.findall(r"\{cite:[pt]\}`(\w+)`", texts)}
    assert cited <= set(ENTRIES)
    numbers = {arxiv or doi for arxiv, doi in NUMBER.findall(texts)}
    for key, fields in ENTRIES.items():
        found = {fields.get("eprint"), fields.get("doi")} & numbers
        assert key in cited or found, f"{key} is not cited"


def test_every_paper_that_is_named_is_in_the_bibliography():
    """Each arXiv number and DOI in the package and in the reference."""
    known = {
        fields.get(name) for fields in ENTRIES.values() for name in ("eprint", "doi")
    }
    for path in SOURCES:
        if path.suffix == ".py" or "reference" in path.parts:
            named = NUMBER.findall(path.read_text(encoding="utf-8"))
            missing = {arxiv or doi for arxiv, doi in named} - known
            assert missing == set(), where(path)


def docstrings():
    """All docstrings of the package."""
    for path in ROOT.glob("captum_cage/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield where(path), inspect.cleandoc(text)


def test_every_source_of_a_docstring_is_cited():
    """What stands after "Source:" has the key of an entry, beside the plain words."""
    found = 0
    for place, text in docstrings():
        for source in re.findall(r"^\s*Source:\s+(.+?)(?:\n\n|\Z)", text, re.M | re.S):
            assert re.match(r"(?!:cite)\S.*:cite:p:`\w+`", source, re.DOTALL), place
            found += 1
    assert found >= 50
