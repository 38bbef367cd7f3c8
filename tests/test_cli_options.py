"""What options of the command line mean."""

import json
import re

import pytest

from captum_cage.cli_options import (
    PartName,
    asked_span,
    progress_is_welcome,
    read_text,
    text_or_pattern,
    write_json,
)
from captum_cage.thinking import Part


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (None, None),
        ("-1", -1),
        ("2:", slice(2, None)),
        ("so it", "so it"),
        ("/a.b/", re.compile("a.b")),
    ],
)
def test_spans(text, meant):
    """A number, a stretch, a text or a pattern."""
    assert asked_span(text, None) == meant


def test_a_part_is_a_span_too():
    """But not beside another."""
    assert asked_span(None, PartName.answer) is Part.ANSWER
    with pytest.raises(ValueError, match="--part: names what to explain"):
        asked_span("x", PartName.answer)


def test_a_pattern_must_be_one():
    """Between slashes."""
    with pytest.raises(ValueError, match="--statement: a text between slashes"):
        text_or_pattern("--statement", "/(/")


def test_texts_may_lie_in_files(tmp_path):
    """One newline at the end is dropped."""
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"two\r\nlines\n\n")
    assert read_text("--prompt", f"@{file}") == "two\nlines\n"
    assert read_text("--prompt", "@@x") == "@x"
    with pytest.raises(ValueError, match="--prompt: must name a file that can be read"):
        read_text("--prompt", "@none")


def test_numbers_are_written_whole(tmp_path, capsys):
    """To a file, or to stdout."""
    write_json(str(tmp_path / "x.json"), {"a": 1})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    write_json("-", [2])
    assert capsys.readouterr().out == "[2]\n"


def test_progress_is_for_terminals():
    """Pytest is none."""
    assert not progress_is_welcome(False)
    assert not progress_is_welcome(True)
