"""Options of the commands, and what they mean."""

from __future__ import annotations

import json
import os
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from captum_cage._checks import complaint
from captum_cage.archive import replacing, writable
from captum_cage.export import SUFFIXES
from captum_cage.spans import Explain
from captum_cage.text import harmless
from captum_cage.thinking import Part

__all__ = [
    "METHOD_PANEL",
    "MODEL_PANEL",
    "OUTPUT_PANEL",
    "PROGRAM",
    "BaselineOption",
    "BatchSizeOption",
    "Device",
    "DeviceOption",
    "DrawsOption",
    "DryRunOption",
    "Dtype",
    "DtypeOption",
    "ExplainOption",
    "ExportOption",
    "HtmlOption",
    "JsonOption",
    "MaskedLmOption",
    "MaxNewTokensOption",
    "MethodOption",
    "ModelOption",
    "NoProgressOption",
    "Normalization",
    "NormalizationOption",
    "PartName",
    "PartOption",
    "PathsOption",
    "QuietOption",
    "Removal",
    "SamplesOption",
    "SaveOption",
    "SeedOption",
    "StepsOption",
    "Strategy",
    "StrategyOption",
    "ToleranceOption",
    "TopOption",
    "TrustRemoteCodeOption",
    "Units",
    "UnitsOption",
    "WidthOption",
    "asked_span",
    "check_writable",
    "progress_is_welcome",
    "read_text",
    "say",
    "span_of",
    "stdout_console",
    "text_or_pattern",
    "write_json",
]

PROGRAM = "captum-cage"


OUTPUT_PANEL = "Output"


MODEL_PANEL = "Model"


METHOD_PANEL = "Method"


class Units(str, Enum):
    """The granularity of both sides."""

    token = "token"
    word = "word"
    sentence = "sentence"
    message = "message"


class Normalization(str, Enum):
    """How rows become shares."""

    positive = "positive"
    absolute = "absolute"
    signed = "signed"


class Strategy(str, Enum):
    """How rows are computed."""

    auto = "auto"
    loop = "loop"
    fused = "fused"


class Removal(str, Enum):
    """How sources are taken away."""

    delete = "delete"
    baseline = "baseline"
    suppress = "suppress"
    masked_lm = "masked_lm"


class PartName(str, Enum):
    """A part of what a reasoning model wrote."""

    think = "think"
    answer = "answer"


class Device(str, Enum):
    """Where the model goes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """The type of its numbers."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ExplainOption = Annotated[
    str | None,
    typer.Option(
        "--explain",
        show_default=False,
        metavar="SPAN",
        help="What to explain: a text in the generated text (its last occurrence), the "
        "number of a generated unit (-1 is the last), START:STOP of them, or a pattern "
        "as /REGEX/. Default: all but special tokens at the end.",
    ),
]


PartOption = Annotated[
    PartName | None,
    typer.Option(
        "--part",
        show_default=False,
        help="Explain a part of what a reasoning model wrote: its thoughts or its "
        "answer.",
    ),
]


TopOption = Annotated[
    int,
    typer.Option(
        "--top",
        min=0,
        help="Sources to list, and units to label.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


PathsOption = Annotated[
    int,
    typer.Option("--paths", min=0, help="Paths to show.", rich_help_panel=OUTPUT_PANEL),
]


WidthOption = Annotated[
    int | None,
    typer.Option(
        "--width",
        show_default=False,
        min=20,
        help="Columns to use. Default: those of the terminal.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        show_default=False,
        metavar="FILE",
        help="Write all numbers to this file; to stdout, and nothing else, for a dash.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


SaveOption = Annotated[
    Path | None,
    typer.Option(
        "--save",
        show_default=False,
        metavar="FILE",
        help="Save the result, for captum-cage show or for Python.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


ExportOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--export",
        show_default=False,
        metavar="FILE",
        help="Write it for other programs too, as the end of the name says: "
        f"{', '.join(SUFFIXES)}. May be given again.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        show_default=False,
        metavar="FILE",
        help="Write the result as a page for the browser, which needs no network.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print errors only; write the files.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


NoProgressOption = Annotated[
    bool,
    typer.Option(
        "--no-progress", help="No progress bars.", rich_help_panel=OUTPUT_PANEL
    ),
]


DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Tell what it would cost, by a short calibration, and do nothing else.",
    ),
]


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        show_default=False,
        metavar="NAME_OR_PATH",
        help="A causal language model: a folder, a name on the Hugging Face hub, "
        "or demo for the model in the package.",
    ),
]


MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest text to generate.")
]


UnitsOption = Annotated[
    Units,
    typer.Option(
        "--units",
        help="What is attributed, in prompt and generated text. Fewer units take "
        "less time.",
        rich_help_panel=METHOD_PANEL,
    ),
]


MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help="The base method, by its name or its class; captum-cage methods lists "
        "them.",
        rich_help_panel=METHOD_PANEL,
    ),
]


NormalizationOption = Annotated[
    Normalization,
    typer.Option(
        "--normalization",
        help="How attributions become shares.",
        rich_help_panel=METHOD_PANEL,
    ),
]


SamplesOption = Annotated[
    int | None,
    typer.Option(
        "--samples",
        show_default=False,
        min=1,
        help="Samples, for the methods that count them.",
        rich_help_panel=METHOD_PANEL,
    ),
]


StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        show_default=False,
        min=1,
        help="Steps of the integral, for the methods that have one.",
        rich_help_panel=METHOD_PANEL,
    ),
]


MaskedLmOption = Annotated[
    str | None,
    typer.Option(
        "--masked-lm",
        show_default=False,
        metavar="NAME_OR_PATH",
        help="A masked language model, for the methods that write other words.",
        rich_help_panel=METHOD_PANEL,
    ),
]


BaselineOption = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        show_default=False,
        metavar="TOKEN",
        help="The token that stands for an absent one. Default: the tokenizer's "
        "unknown, end or padding token, the first that it has.",
        rich_help_panel=METHOD_PANEL,
    ),
]


SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", help="Seed of the methods that sample.", rich_help_panel=METHOD_PANEL
    ),
]


DrawsOption = Annotated[
    int,
    typer.Option(
        "--draws",
        min=1,
        help="How often a method that samples draws its rows; from 2 on, intervals "
        "are shown.",
        rich_help_panel=METHOD_PANEL,
    ),
]


StrategyOption = Annotated[
    Strategy,
    typer.Option(
        "--strategy",
        help="auto: all rows at once where the method allows it, else one by one.",
        rich_help_panel=METHOD_PANEL,
    ),
]


ToleranceOption = Annotated[
    float,
    typer.Option(
        "--tolerance",
        min=0.0,
        max=0.99,
        help="Share of the explained mass that may stay unresolved. Saves time "
        "where rows are computed one by one.",
        rich_help_panel=METHOD_PANEL,
    ),
]


BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Most sequences at once. Default: what fits into memory.",
        show_default=False,
        rich_help_panel=METHOD_PANEL,
    ),
]


DeviceOption = Annotated[
    Device,
    typer.Option(
        "--device", help="auto: a GPU if there is one.", rich_help_panel=MODEL_PANEL
    ),
]


DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="auto: float32 on the CPU, the model's own on a GPU.",
        rich_help_panel=MODEL_PANEL,
    ),
]


TrustRemoteCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model.",
        rich_help_panel=MODEL_PANEL,
    ),
]


def say(text: str) -> None:
    """One line on stderr."""
    line = harmless(" ".join(str(text).split()), one_line=True)
    sys.stderr.write(f"{PROGRAM}: {line}\n")
    sys.stderr.flush()


def progress_is_welcome(unwanted: bool) -> bool:
    """Whether to show progress bars: on a terminal, where they are not unwanted."""
    return not unwanted and sys.stderr.isatty()


def write_json(name: str, found: Any) -> None:
    """Write numbers to a file, or to stdout for a dash."""
    text = json.dumps(found, allow_nan=False) + "\n"
    if name == "-":
        sys.stdout.write(text)
        return
    with replacing(name) as partial:
        partial.write_text(text, encoding="ascii")


def check_writable(option: str, name: str | Path | None) -> None:
    """Refuse a file that could not be written."""
    if name is not None and name != "-":
        writable(option, name)


def stdout_console(width: int | None) -> Console:
    """A console on stdout; without any escape code where colour is not wanted."""
    # Where NO_COLOR is set, rich leaves out colours but not bold and underlined text.
    if os.environ.get("NO_COLOR"):
        return Console(width=width, color_system=None)
    return Console(width=width)


def asked_span(explain: str | None, part: PartName | None) -> Explain:
    """What ``--explain`` or ``--part`` means."""
    if explain is not None and part is not None:
        raise ValueError(
            "--part: names what to explain, as --explain does. Leave one of them out."
        )
    return span_of(explain) if part is None else Part(part.value)


def text_or_pattern(option: str, text: str | None) -> str | re.Pattern[str] | None:
    """A text, or a pattern between slashes."""
    if text is None or len(text) < 2 or not text[0] == text[-1] == "/":
        return text
    try:
        return re.compile(text[1:-1])
    except re.error as error:
        raise ValueError(
            complaint(
                option,
                "a text between slashes must be a regular expression",
                f"{text!r} came ({error})",
                "Escape what is meant as it is, for example \\( for a bracket.",
            )
        ) from error


def span_of(text: str | None) -> Explain:
    """What ``--explain`` means, in a form that ``explaining`` takes."""
    if text is None:
        return None
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if ends := re.fullmatch(r"(-?\d+)?:(-?\d+)?", text):
        return slice(*(None if end is None else int(end) for end in ends.groups()))
    return text_or_pattern("--explain", text)


def read_text(option: str, value: str) -> str:
    """A text as it stands, of a file (``@FILE``), or of stdin (``-``)."""
    is_file = value.startswith("@") and not value.startswith("@@")
    content: bytes
    try:
        if value == "-":
            content = sys.stdin.buffer.read()
        elif is_file:
            content = Path(value[1:]).expanduser().read_bytes()
        else:
            content = os.fsencode(value.removeprefix("@"))
        text = content.decode("utf-8")
    except OSError as error:
        raise ValueError(
            complaint(
                option,
                "must name a file that can be read",
                f"{value!r} came ({error.strerror})",
                "For a text that begins with @, write @@.",
            )
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            complaint(
                option,
                "must be a text in UTF-8",
                f"{value!r} is not ({error.reason} at byte {error.start})",
                "Convert it first.",
            )
        ) from error
    if value == "-" or is_file:
        return text.replace("\r\n", "\n").removesuffix("\n")
    return text
