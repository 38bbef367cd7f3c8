"""The command line: explain what a model generated, or show a saved explanation.

Results go to stdout; progress, notes and errors go to stderr.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, TextIO

import torch
import transformers
import typer
from captum.attr import FeatureAblation, LLMAttribution
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from captum_cage._captum import DEFAULT_GEN_ARGS
from captum_cage._checks import complaint
from captum_cage._version import __version__
from captum_cage.archive import replacing, writable
from captum_cage.attribution import GraphContextAttribution
from captum_cage.demo import load_demo, sample_problems
from captum_cage.demo.problems import KINDS
from captum_cage.engines.registry import engine_names
from captum_cage.export import SUFFIXES, checked_suffix
from captum_cage.foils import Alternative
from captum_cage.inputs import ChatTokenInput, TokenIdsInput
from captum_cage.interventions import PathCheck
from captum_cage.methods.capability import Capability
from captum_cage.methods.catalogue import (
    accepted_inputs,
    capabilities,
    llm_attribution,
    method_named,
    missing_extra,
    needs_argument,
)
from captum_cage.metrics import Evaluation, MaskedRefill
from captum_cage.result import GraphAttributionResult
from captum_cage.spans import Explain
from captum_cage.terminal import TerminalView
from captum_cage.text import Span, harmless, special_ids
from captum_cage.thinking import Part
from captum_cage.traces import ChatTraceInput

__all__ = ["app", "main"]

PROGRAM = "captum-cage"
_LISTED = 8  # alternatives
DEMO = "demo"  # the name of the model in the package

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


# --- the program ---------------------------------------------------------------------


class _Commands(TyperGroup):
    """Commands whose errors are one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (ImportError, OSError, TypeError, ValueError) as error:
            if ctx.params.get("traceback") or not _is_users(error):
                raise
            _say(f"error: {_reason(error)}")
            raise typer.Exit(USER_ERROR) from None


def _is_users(error: Exception) -> bool:
    """Whether a file is at fault, or an argument by our own checks."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    raised_in = str(frame.f_globals.get("__name__"))
    return isinstance(error, OSError) or raised_in.split(".")[0] == __package__


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fspath(error.filename)!r}: {error.strerror}"
    return str(error)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del category, filename, lineno, file, line
    _say(f"warning: {message}")


def _say(text: str) -> None:
    """One line on stderr."""
    line = harmless(" ".join(str(text).split()), one_line=True)
    print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)


app = typer.Typer(
    name=PROGRAM,
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Examples:\n\n"
        "captum-cage demo\n\n"
        "captum-cage explain --model demo --prompt @problem.txt --explain answer\n\n"
        "captum-cage show result.npz --explain -1\n\n"
        "Exit codes: 0 done, 1 unexpected failure, 2 wrong usage or input, "
        "130 interrupted."
    ),
)


def main() -> None:
    """Run the command line, as the installed program does."""
    app(prog_name=PROGRAM)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback(
    help="Explain text that a language model generated, through the text that it wrote "
    "before.\n\n"
    "Every generated unit is attributed to the prompt and to the units generated "
    "before it, and the mass of all paths is followed back to the prompt.\n\n"
    "Results go to stdout; progress, notes and errors go to stderr."
)
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and stop.",
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error was raised.")
    ] = False,
) -> None:
    """Explain what a language model generated, through the text it wrote before."""
    del version, traceback  # read by _Commands and by the callback


# --- options -------------------------------------------------------------------------

_OUTPUT = "Output"
_MODEL = "Model"
_METHOD = "Method"


class _Units(str, Enum):
    token = "token"
    word = "word"
    sentence = "sentence"
    message = "message"


class _Normalization(str, Enum):
    positive = "positive"
    absolute = "absolute"
    signed = "signed"


class _Strategy(str, Enum):
    auto = "auto"
    loop = "loop"
    fused = "fused"


class _Removal(str, Enum):
    delete = "delete"
    baseline = "baseline"
    suppress = "suppress"
    masked_lm = "masked_lm"


class _Part(str, Enum):
    think = "think"
    answer = "answer"


class _Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class _Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_Kind = Enum("_Kind", [(kind, kind) for kind in KINDS], type=str)  # type: ignore[misc]
_TWO_QUESTIONS = _Kind("two_questions")


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
    _Part | None,
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
        rich_help_panel=_OUTPUT,
    ),
]
PathsOption = Annotated[
    int, typer.Option("--paths", min=0, help="Paths to show.", rich_help_panel=_OUTPUT)
]
WidthOption = Annotated[
    int | None,
    typer.Option(
        "--width",
        show_default=False,
        min=20,
        help="Columns to use. Default: those of the terminal.",
        rich_help_panel=_OUTPUT,
    ),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        show_default=False,
        metavar="FILE",
        help="Write all numbers to this file; to stdout, and nothing else, for a dash.",
        rich_help_panel=_OUTPUT,
    ),
]
SaveOption = Annotated[
    Path | None,
    typer.Option(
        "--save",
        show_default=False,
        metavar="FILE",
        help="Save the result, for captum-cage show or for Python.",
        rich_help_panel=_OUTPUT,
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
        rich_help_panel=_OUTPUT,
    ),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        show_default=False,
        metavar="FILE",
        help="Write the result as a page for the browser, which needs no network.",
        rich_help_panel=_OUTPUT,
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print errors only; write the files.",
        rich_help_panel=_OUTPUT,
    ),
]
NoProgressOption = Annotated[
    bool,
    typer.Option("--no-progress", help="No progress bars.", rich_help_panel=_OUTPUT),
]


# --- output --------------------------------------------------------------------------


def _check_writable(option: str, name: str | Path | None) -> None:
    """Refuse a file that could not be written."""
    if name is not None and name != "-":
        writable(option, name)


@dataclass(frozen=True)
class _Output:
    """Where a result goes, and how much is said."""

    top: int
    paths: int
    width: int | None
    json_file: str | None
    save_file: Path | None
    html_file: Path | None
    quiet: bool
    no_progress: bool = False
    export_files: Sequence[Path] = ()

    def __post_init__(self) -> None:
        """Refuse files that could not be written, before anything is computed."""
        _check_writable("--json", self.json_file)
        _check_writable("--save", self.save_file)
        _check_writable("--html", self.html_file)
        for path in self.export_files:
            checked_suffix(path, "--export")

    @property
    def shows_progress(self) -> bool:
        """Whether progress bars are welcome."""
        return not (self.quiet or self.no_progress) and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """Say something on stderr, unless quiet."""
        if not self.quiet:
            _say(text)

    def save(self, result: GraphAttributionResult) -> None:
        """Write the files that are asked for by their names."""
        if self.save_file is not None:
            result.save(self.save_file)
        if self.html_file is not None:
            result.to_html(self.html_file)
        for path in self.export_files:
            result.export(path)

    def write(
        self,
        result: GraphAttributionResult,
        seconds: float | None = None,
        truth: Collection[Span] = (),
        ends: Collection[Span] = (),
        checks: Collection[PathCheck] = (),
        evaluation: Evaluation | None = None,
    ) -> None:
        """Write the files, then print the result."""
        self.save(result)
        numbers = ""
        if self.json_file is not None:
            found = result.to_dict()
            if checks:
                found["checks"] = [check.to_dict() for check in checks]
            if evaluation is not None:
                found["evaluation"] = evaluation.to_dict()
            numbers = json.dumps(found, allow_nan=False) + "\n"
        json_file = None if self.json_file == "-" else self.json_file
        if json_file is not None:
            with replacing(json_file) as partial:
                partial.write_text(numbers, encoding="ascii")
        files = [json_file, self.save_file, self.html_file, *self.export_files]
        if written := [str(path) for path in files if path is not None]:
            self.note(f"wrote {', '.join(written)}")
        if self.json_file == "-":
            sys.stdout.write(numbers)
            return
        if not self.quiet:
            view = TerminalView(
                result, self.top, self.paths, seconds, truth, ends, checks
            )
            console = _console(self.width)
            console.print(view)
            if evaluation is not None:
                console.print("", _evaluation_table(evaluation))
                for note in evaluation.notes:
                    console.print(harmless(note), style="dim", markup=False)

    def list_alternatives(self, found: Sequence[Alternative]) -> None:
        """Print what else the model might have written, unless stdout is for JSON."""
        if self.quiet or self.json_file == "-":
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("The model's candidates")
        table.add_column("probability", justify="right")
        for one in found:
            shown = json.dumps(one.text, ensure_ascii=False)
            mark = " (written)" if one.written else ""
            table.add_row(
                harmless(shown, one_line=True) + mark, f"{one.probability:.2%}"
            )
        _console(self.width).print(table, "")


def _evaluation_table(evaluation: Evaluation) -> Table:
    """A row for each metric, a column for each order."""
    told = f"sources taken away by {evaluation.removal!r}"
    if evaluation.statement:
        told += f"; what had to come out again: {evaluation.statement}"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    table.title = Text(f"Is it true? ({harmless(told, one_line=True)})")
    table.add_column("metric (↑ higher is better, ↓ lower)")
    for order in evaluation.scores:
        table.add_column(order, justify="right")
    for name, info in evaluation.metrics.items():
        way = "↑" if info.higher_is_better else "↓"
        mark = " †" if info.untrusted else ""
        cells = [str(found[name]) for found in evaluation.scores.values()]
        table.add_row(f"{name} {way}{mark}", *cells)
    return table


def _console(width: int | None) -> Console:
    """A console on stdout; without any escape code where colour is not wanted."""
    # Where NO_COLOR is set, rich leaves out colours but not bold and underlined text.
    if os.environ.get("NO_COLOR"):
        return Console(width=width, color_system=None)
    return Console(width=width)


# --- captum-cage demo ----------------------------------------------------------------


@app.command(
    help="Let a small model solve a word problem, and explain its last answer.\n\n"
    "The model is part of the package, so nothing is downloaded, and it has never seen "
    "the problem. The facts that the answer truly depends on are known, and marked.",
    epilog=(
        "Examples:\n\n"
        "captum-cage demo\n\n"
        "captum-cage demo --seed 7 --kind long_chain --html page.html\n\n"
        "captum-cage demo --json - | python -m json.tool"
    ),
)
def demo(
    seed: Annotated[int, typer.Option("--seed", help="Which problem.")] = 0,
    kind: Annotated[
        _Kind, typer.Option("--kind", help="Kind of problem.")
    ] = _TWO_QUESTIONS,
    top: TopOption = 8,
    paths: PathsOption = 2,
    width: WidthOption = None,
    json_file: JsonOption = None,
    save: SaveOption = None,
    html: HtmlOption = None,
    export: ExportOption = None,
    quiet: QuietOption = False,
    no_progress: NoProgressOption = False,
) -> None:
    """Let a small model solve a word problem, and explain its last answer."""
    output = _Output(
        top, paths, width, json_file, save, html, quiet, no_progress, export or ()
    )
    problem = sample_problems(1, seed, kind.value)[0]
    model, tokenizer = load_demo()
    start = time.perf_counter()
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    result = cage.attribute(
        TokenIdsInput(tokenizer(problem.prompt).input_ids, tokenizer),
        units="sentence",
        gen_args=_gen_args(None),
        show_progress=output.shows_progress,
    )
    answer = problem.answers[-1]
    if problem.completion.strip() in result.generated_text:
        result = result.explaining(answer.text)
    else:
        output.note(
            "note: the model got this one wrong. Right is: "
            + problem.completion.strip()
        )
        result = result.explaining(_last_visible(result))
    output.write(
        result, time.perf_counter() - start, truth=answer.facts, ends=problem.facts
    )


def _gen_args(max_new_tokens: int | None) -> dict[str, Any]:
    """Greedy generation; as long as the model's own settings say, for None."""
    arguments = dict(DEFAULT_GEN_ARGS)
    del arguments["max_new_tokens"]
    if max_new_tokens is not None:
        arguments["max_new_tokens"] = max_new_tokens
    return arguments


def _last_visible(result: GraphAttributionResult) -> int:
    """Position of the last generated unit that is no special token."""
    steps = [unit for unit in result.units if unit.generated]
    return max((i for i, unit in enumerate(steps) if not unit.special), default=0)


# --- captum-cage explain -------------------------------------------------------------


@app.command(
    help="Explain what a language model generates, or a text that you give.\n\n"
    "The model reads special tokens of the prompt, and in a chat everything around the "
    "user's message, but nothing is attributed to them.",
    epilog=(
        "Examples:\n\n"
        "captum-cage explain --model demo --prompt 'Ana has 3 pens. Leo has 5 cups. "
        "Mia has 4 more pens than Ana. How many pens does Mia have?'\n\n"
        "captum-cage explain --model Qwen/Qwen2.5-0.5B-Instruct --chat --prompt "
        "@question.txt --explain '/answer is .*/' --save result.npz --html page.html"
        "\n\n"
        "captum-cage explain --model gpt2 --prompt @prompt.txt --target @output.txt "
        "--units word --method integrated-gradients --json - > result.json\n\n"
        "echo 'Why is the sky blue?' | captum-cage explain --model gpt2 --prompt - "
        "--units token --max-new-tokens 20"
    ),
)
def explain(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            show_default=False,
            metavar="NAME_OR_PATH",
            help="A causal language model: a folder, a name on the Hugging Face hub, "
            "or demo for the model in the package.",
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            show_default=False,
            metavar="TEXT|@FILE|-",
            help="The prompt: a text, @ and the name of a file, or a dash for stdin. "
            "One newline at the end of a file is dropped. @@ stands for a plain @.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            show_default=False,
            metavar="TEXT|@FILE",
            help="The generated text. Default: the model generates it, greedily.",
        ),
    ] = None,
    explain: ExplainOption = None,
    part: PartOption = None,
    foil: Annotated[
        list[str] | None,
        typer.Option(
            "--foil",
            show_default=False,
            metavar="PLACE=TEXT",
            help="Why this and not that: a text in the generated text (or # and the "
            "number of a unit) and what might stand there, as 7=9. May be given again "
            "for another place.",
        ),
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            "--messages",
            show_default=False,
            metavar="FILE|-",
            help="A conversation or an agent's trace in place of the prompt: a JSON "
            "list of messages with role and content. Those of the assistant are "
            "explained, the others are sources.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send the prompt through the model's chat template."
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            show_default=False,
            metavar="TEXT|@FILE",
            help="A system message, for --chat. It is read and not attributed.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest text to generate.")
    ] = 100,
    units: Annotated[
        _Units,
        typer.Option(
            "--units",
            help="What is attributed, in prompt and generated text. Fewer units take "
            "less time.",
            rich_help_panel=_METHOD,
        ),
    ] = _Units.sentence,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="The base method, by its name or its class; captum-cage methods lists "
            "them.",
            rich_help_panel=_METHOD,
        ),
    ] = "ablation",
    normalization: Annotated[
        _Normalization,
        typer.Option(
            "--normalization",
            help="How attributions become shares.",
            rich_help_panel=_METHOD,
        ),
    ] = _Normalization.positive,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            show_default=False,
            min=1,
            help="Samples, for the methods that count them.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            show_default=False,
            min=1,
            help="Steps of the integral, for the methods that have one.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    masked_lm: Annotated[
        str | None,
        typer.Option(
            "--masked-lm",
            show_default=False,
            metavar="NAME_OR_PATH",
            help="A masked language model, for the methods that write other words.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            show_default=False,
            metavar="TOKEN",
            help="The token that stands for an absent one. Default: the tokenizer's "
            "unknown, end or padding token, the first that it has.",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", help="Seed of the methods that sample.", rich_help_panel=_METHOD
        ),
    ] = 0,
    draws: Annotated[
        int,
        typer.Option(
            "--draws",
            min=1,
            help="How often a method that samples draws its rows; from 2 on, intervals "
            "are shown.",
            rich_help_panel=_METHOD,
        ),
    ] = 1,
    verify: Annotated[
        int,
        typer.Option(
            "--verify",
            min=0,
            help="Heaviest paths to test: their steps are written again without the "
            "source.",
            rich_help_panel=_OUTPUT,
        ),
    ] = 0,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Test the result: sources are taken away and the model writes again.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    statement: Annotated[
        str | None,
        typer.Option(
            "--statement",
            show_default=False,
            metavar="TEXT|/REGEX/",
            help="What must come out again with --evaluate: a text, or a pattern whose "
            "groups must be the same. Default: the explained text.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    removal: Annotated[
        _Removal | None,
        typer.Option(
            "--removal",
            show_default=False,
            help="How --evaluate takes sources away; masked_lm needs --masked-lm. "
            "Default: delete.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    alternatives: Annotated[
        str | None,
        typer.Option(
            "--alternatives",
            show_default=False,
            metavar="PLACE",
            help="List what else the model might have written at a place, as foils.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    strategy: Annotated[
        _Strategy,
        typer.Option(
            "--strategy",
            help="auto: all rows at once where the method allows it, else one by one.",
            rich_help_panel=_METHOD,
        ),
    ] = _Strategy.auto,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            min=0.0,
            max=0.99,
            help="Share of the explained mass that may stay unresolved. Saves time "
            "where rows are computed one by one.",
            rich_help_panel=_METHOD,
        ),
    ] = 0.0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Most sequences at once. Default: what fits into memory.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    device: Annotated[
        _Device,
        typer.Option(
            "--device", help="auto: a GPU if there is one.", rich_help_panel=_MODEL
        ),
    ] = _Device.auto,
    dtype: Annotated[
        _Dtype,
        typer.Option(
            "--dtype",
            help="auto: float32 on the CPU, the model's own on a GPU.",
            rich_help_panel=_MODEL,
        ),
    ] = _Dtype.auto,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run Python code that comes with the model.",
            rich_help_panel=_MODEL,
        ),
    ] = False,
    top: TopOption = 8,
    paths: PathsOption = 3,
    width: WidthOption = None,
    json_file: JsonOption = None,
    save: SaveOption = None,
    html: HtmlOption = None,
    export: ExportOption = None,
    quiet: QuietOption = False,
    no_progress: NoProgressOption = False,
) -> None:
    """Explain what a language model generates, or a text that you give."""
    output = _Output(
        top, paths, width, json_file, save, html, quiet, no_progress, export or ()
    )
    refills = removal is _Removal.masked_lm
    base, declared = _chosen_method(method, masked_lm, refills)
    options, kwargs = _counts(base, declared, samples, steps)
    span = _question(explain, part)
    foils = _foils(foil)
    if (prompt is None) == (messages is None):
        raise ValueError(
            "--prompt: must be given, or --messages in its place. Pass one of the two."
        )
    if messages is not None and (chat or system is not None):
        raise ValueError(
            "--messages: is a conversation already. Leave --chat and --system out."
        )
    if system is not None and not chat:
        raise ValueError(
            "--system: is a message of a chat, so it needs --chat. Add it."
        )
    if not evaluate and (statement is not None or removal is not None):
        raise ValueError(
            "--statement, --removal: say how a result is tested. Add --evaluate."
        )
    wanted = _pattern("--statement", statement)
    if [prompt, target, system, messages].count("-") > 1:
        raise ValueError(
            "--prompt: stdin can be read once. Put the other text in a file."
        )
    texts = [
        None if value is None else _text(option, value)
        for option, value in (
            ("--prompt", prompt),
            ("--target", target),
            ("--system", system),
        )
    ]
    if messages is None and not texts[0]:
        raise ValueError("--prompt: must have some text, but it is empty. Pass some.")
    listed = None if messages is None else _messages(messages)
    place = _place(device)
    output.note(f"loading {model}")
    if not output.shows_progress:
        transformers.utils.logging.disable_progress_bar()
    network, tokenizer = _load(model, place, dtype, trust_remote_code)
    masked: dict[str, Any] = {}
    if masked_lm is not None:
        output.note(f"loading {masked_lm}")
        masked = _masked_lm(masked_lm, place, dtype, trust_remote_code)
    if needs_argument(base, "masked_lm") is not None:
        options |= masked
    if listed is None:
        inp = _input(str(texts[0]), texts[2], chat, baseline, tokenizer)
    else:
        inp = _conversation(listed, baseline, tokenizer)
    output.note(f"explaining with {base.__name__} on {place}, in {units.value} units")
    transformers.set_seed(seed)
    start = time.perf_counter()
    cage = GraphContextAttribution(
        llm_attribution(base, network, tokenizer, **options),
        normalization=normalization.value,
    )
    trace = inp.continuation
    is_given = texts[1] is not None or (trace is not None and trace.ends_generated)
    result = cage.attribute(
        inp,
        target=texts[1],
        explain=span,
        units=units.value,
        foil=foils,
        gen_args=None if is_given else _gen_args(max_new_tokens),
        draws=draws,
        strategy=strategy.value,
        tolerance=tolerance,
        batch_size=batch_size,
        show_progress=output.shows_progress,
        **kwargs,
    )
    if span is None and foils is None:
        result = result.explaining((0, _last_visible(result) + 1))
    if alternatives is not None:
        output.list_alternatives(result.alternatives(_place_of(alternatives), _LISTED))
    checks = [result.verify_path(path, seed=seed) for path in result.paths(verify)]
    if result.graph.n_sources == 1:
        output.note(
            "note: the prompt is one unit, so all of the mass goes there. Smaller "
            "units tell more: --units word, or --units token."
        )
    seconds = time.perf_counter() - start
    evaluation = None
    if evaluate:
        output.save(result)  # which a statement that does not hold must not lose
        chosen: Any = None if removal is None else removal.value
        if refills:
            chosen = MaskedRefill(masked["masked_lm"], masked["masked_tokenizer"])
        evaluation = result.evaluate(
            statement=wanted,
            removal=chosen,
            gen_args={"max_new_tokens": max_new_tokens} if max_new_tokens else None,
            seed=seed,
            batch_size=batch_size,
            show_progress=output.shows_progress,
        )
    output.write(result, seconds, checks=checks, evaluation=evaluation)


def _question(explain: str | None, part: _Part | None) -> Explain:
    """What ``--explain`` or ``--part`` means."""
    if explain is not None and part is not None:
        raise ValueError(
            "--part: names what to explain, as --explain does. Leave one of them out."
        )
    return _span(explain) if part is None else Part(part.value)


def _place_of(text: str) -> int | str:
    """A place in the generated text: ``#`` and the number of a unit, or a text."""
    return int(text[1:]) if re.fullmatch(r"#-?\d{1,6}", text) else text


def _foils(given: list[str] | None) -> dict[int | str, str] | None:
    """What ``--foil`` means, in the form that ``attribute`` takes."""
    foils: dict[int | str, str] = {}
    for text in given or ():
        place, sign, foil = text.rpartition("=")
        if not sign or not place or not foil:
            raise ValueError(
                complaint(
                    "--foil",
                    "must be a place and what might stand there, as 7=9",
                    f"{text!r} came",
                    "Put an equals sign between the two.",
                )
            )
        foils[_place_of(place)] = foil
    return foils or None


def _messages(name: str) -> list[Any]:
    """The messages of a file."""
    text = _text("--messages", name if name == "-" else f"@{name.removeprefix('@')}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            complaint(
                "--messages",
                "must be JSON",
                f"{name!r} is not ({error})",
                'Pass a list such as [{"role": "user", "content": "..."}].',
            )
        ) from error
    if isinstance(found, dict) and isinstance(found.get("messages"), list):
        found = found["messages"]
    if not isinstance(found, list):
        raise ValueError(
            complaint(
                "--messages",
                "must be a JSON list of messages",
                f"{type(found).__name__} came",
                'Pass a list such as [{"role": "user", "content": "..."}].',
            )
        )
    return found


def _conversation(
    messages: list[Any], baseline: str | None, tokenizer: Any
) -> TokenIdsInput:
    """A trace if the model has written in it, else a chat."""
    token: int | str = _absent(tokenizer) if baseline is None else baseline
    wrote = [
        isinstance(message, dict) and message.get("role") == "assistant"
        for message in messages
    ]
    if any(wrote):
        return ChatTraceInput(messages, tokenizer, baselines=token)
    return ChatTokenInput(messages, tokenizer, features="all", baselines=token)


def _chosen_method(
    name: str, masked_lm: str | None, refills: bool
) -> tuple[type[Any], Capability]:
    """The class of a base method, and what it declares; it has what it needs."""
    try:
        method, declared = method_named(name)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    extra = missing_extra(declared)
    if extra is not None:
        raise ValueError(
            f"--method: {declared.name} needs {', '.join(declared.needs)}, which is "
            f"not installed. Run: pip install captum-cage[{extra}]"
        )
    needed = needs_argument(method, "masked_lm")
    if needed and masked_lm is None:
        raise ValueError(
            f"--masked-lm: {method.__name__} replaces words by those of a masked "
            "language model and needs one. Pass its name, for example "
            "--masked-lm FacebookAI/roberta-base."
        )
    if refills and masked_lm is None:
        raise ValueError(
            "--removal: masked_lm writes other words by a masked language model. Pass "
            "--masked-lm, for example --masked-lm FacebookAI/roberta-base."
        )
    if needed is None and masked_lm is not None and not refills:
        takers = _names(lambda other, _: needs_argument(other, "masked_lm") is not None)
        raise ValueError(
            f"--masked-lm: {method.__name__} does not take it. It is for {takers}. "
            "Leave it out, or choose another --method."
        )
    return method, declared


def _names(fits: Callable[[type[Any], Capability], bool]) -> str:
    """Names of the methods that fit, or that there is none."""
    found = [known[1].name for known in capabilities() if fits(*known)]
    return ", ".join(found) or "none of the methods"


def _counts_by(option: str, _: type[Any], declared: Capability) -> bool:
    """Whether an option says how many evaluations a method takes."""
    return _counting_option(declared.counted) == option


def _counting_option(argument: str | None) -> str | None:
    """The option that says how many evaluations a method takes."""
    if argument is None:
        return None
    return "--steps" if argument == "n_steps" else "--samples"


def _counts(
    method: type[Any], declared: Capability, samples: int | None, steps: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a method's constructor, and of its ``attribute``."""
    options: dict[str, Any] = {}
    taken = signature(method.attribute).parameters
    # All steps at once would be steps x tokens x vocabulary numbers.
    kwargs = {"internal_batch_size": 8} if "internal_batch_size" in taken else {}
    for option, count in (("--samples", samples), ("--steps", steps)):
        if count is None:
            continue
        if declared.counted is None or not _counts_by(option, method, declared):
            takers = _names(partial(_counts_by, option))
            raise ValueError(
                f"{option}: {method.__name__} does not take it. It is for {takers}. "
                "Leave it out, or choose another --method."
            )
        (kwargs if declared.counted in taken else options)[declared.counted] = count
    return options, kwargs


def _pattern(option: str, text: str | None) -> str | re.Pattern[str] | None:
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


def _span(text: str | None) -> Explain:
    """What ``--explain`` means, in a form that ``explaining`` takes."""
    if text is None:
        return None
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if ends := re.fullmatch(r"(-?\d+)?:(-?\d+)?", text):
        return slice(*(None if end is None else int(end) for end in ends.groups()))
    return _pattern("--explain", text)


def _text(option: str, value: str) -> str:
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


def _place(device: _Device) -> str:
    if device is _Device.cuda and not torch.cuda.is_available():
        raise ValueError(
            "--device: must be there, but torch finds no CUDA device. Use --device cpu."
        )
    if device is _Device.auto:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(device.value)


def _load(
    name: str, place: str, dtype: _Dtype, trust_remote_code: bool
) -> tuple[Any, Any]:
    """A model in evaluation mode, and its tokenizer."""
    number_type = _number_type(dtype, place)
    model: Any
    if name == DEMO:
        model, tokenizer = load_demo()
    else:
        # By attribute: transformers imports it, and much more, at its first use.
        kind = transformers.AutoModelForCausalLM
        model, tokenizer = _load_pretrained(
            name, number_type, trust_remote_code, "--model", kind
        )
    return model.to(device=place, dtype=number_type).eval(), tokenizer


def _number_type(dtype: _Dtype, place: str) -> Any:
    """The type of a model's parameters; None for its own."""
    if dtype is _Dtype.auto:
        return torch.float32 if place == "cpu" else None
    return getattr(torch, dtype.value)


def _masked_lm(
    name: str, place: str, dtype: _Dtype, trust_remote_code: bool
) -> dict[str, Any]:
    """A masked language model and its tokenizer, as options of a base method."""
    number_type = _number_type(dtype, place)
    kind = transformers.AutoModelForMaskedLM
    model, tokenizer = _load_pretrained(
        name, number_type, trust_remote_code, "--masked-lm", kind
    )
    model = model.to(device=place, dtype=number_type).eval()
    return {"masked_lm": model, "masked_tokenizer": tokenizer}


def _load_pretrained(
    name: str,
    number_type: torch.dtype | None,
    trust_remote_code: bool,
    option: str,
    kind: Any,
) -> tuple[Any, Any]:
    if name.startswith((".", "/", "~")):
        name = str(Path(name).expanduser())
        if not Path(name).is_dir():
            raise ValueError(f"{option}: there is no folder {name!r}. Check the path.")
    # Its name until transformers 4.55.
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    argument = "dtype" if version >= (4, 56) else "torch_dtype"
    loading: dict[str, Any] = {argument: number_type or "auto"}
    loading["trust_remote_code"] = trust_remote_code
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code
        )
        model = kind.from_pretrained(name, **loading)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        # The first sentences say what is wrong; pages of advice may follow.
        reason = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        remedy = "Check the name, the path and the network."
        if "trust_remote_code" in str(error):
            remedy = "If you trust it, pass --trust-remote-code."
        raise ValueError(
            f"{option}: {name!r} could not be loaded. {remedy} "
            f"transformers says: {reason}"
        ) from error
    return model, tokenizer


def _input(
    prompt: str, system: str | None, chat: bool, baseline: str | None, tokenizer: Any
) -> TokenIdsInput:
    token: int | str = _absent(tokenizer) if baseline is None else baseline
    if chat:
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return ChatTokenInput(messages, tokenizer, baselines=token)
    ids = tokenizer(prompt).input_ids
    special = special_ids(tokenizer)
    attributed = [i not in special for i in ids]
    return TokenIdsInput(ids, tokenizer, feature_mask=attributed, baselines=token)


def _absent(tokenizer: Any) -> int:
    """Id of the token that stands for an absent one."""
    for name in ("unk", "eos", "pad"):
        found = getattr(tokenizer, f"{name}_token_id", None)
        if found is not None:
            return int(found)
    return 0


# --- captum-cage methods -------------------------------------------------------------


@app.command(
    help="List the base methods that captum-cage explain takes.\n\n"
    "P stands for the units of the prompt, G for those of the generated text.",
    epilog=(
        "Examples:\n\n"
        "captum-cage methods\n\n"
        "captum-cage methods --json - | python -m json.tool"
    ),
)
def methods(
    json_file: JsonOption = None,
    width: WidthOption = None,
) -> None:
    """List the base methods that captum-cage explain takes."""
    _check_writable("--json", json_file)
    if json_file is not None:
        text = json.dumps([_declaration(*known) for known in capabilities()]) + "\n"
        if json_file == "-":
            sys.stdout.write(text)
            return
        with replacing(json_file) as partial:
            partial.write_text(text, encoding="ascii")
    table = Table("method", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("what it measures, what it costs, what it takes")
    for method, declared in capabilities():
        about = Text(declared.summary)
        about.append(f"\n{_cost(method, declared)}", style="italic")
        about.append(f"; {'; '.join(_remarks(declared))}", style="dim")
        table.add_row(Text(declared.name, style="bold"), about)
    console = _console(width)
    console.print(table)
    console.print("P, G: number of units in the prompt and in the generated text.")


def _cost(method: type[Any], declared: Capability) -> str:
    """What all rows cost."""
    if method.__name__ in engine_names():
        return declared.cost
    return f"{declared.cost}, row by row"


def _remarks(declared: Capability) -> list[str]:
    """What one must know before choosing a method, in a few words."""
    remarks = [", ".join(accepted_inputs(declared))]
    if declared.random:
        remarks.append("random")
    if not declared.signed:
        remarks.append("unsigned")
    if (option := _counting_option(declared.counted)) is not None:
        remarks.append(f"takes {option}")
    if declared.needs:
        remarks.append(f"needs {', '.join(declared.needs)}")
    return remarks


def _declaration(method: type[Any], declared: Capability) -> dict[str, Any]:
    """What is known of a base method, for JSON."""
    return {
        **asdict(declared),
        "class": method.__name__,
        "inputs": accepted_inputs(declared),
        "engine": method.__name__ in engine_names(),
        "installed": missing_extra(declared) is None,
    }


# --- captum-cage show ----------------------------------------------------------------


@app.command(
    epilog=(
        "Examples:\n\n"
        "captum-cage show result.npz\n\n"
        "captum-cage show result.npz --explain 'so she sells 9' --paths 10\n\n"
        "captum-cage show result.npz --export graph.graphml --export table.csv\n\n"
        "captum-cage show result.npz --html page.html"
    )
)
def show(
    file: Annotated[
        Path, typer.Argument(show_default=False, help="A result that was saved.")
    ],
    explain: ExplainOption = None,
    part: PartOption = None,
    top: TopOption = 8,
    paths: PathsOption = 3,
    width: WidthOption = None,
    json_file: JsonOption = None,
    save: SaveOption = None,
    html: HtmlOption = None,
    export: ExportOption = None,
    quiet: QuietOption = False,
) -> None:
    """Show a saved result, or explain another span of it, without the model."""
    output = _Output(
        top, paths, width, json_file, save, html, quiet, export_files=export or ()
    )
    span = _question(explain, part)
    result = GraphAttributionResult.load(file)
    output.write(result if span is None else result.explaining(span))
