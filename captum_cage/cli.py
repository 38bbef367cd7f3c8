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
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TextIO

import transformers
import typer
from captum.attr import FeatureAblation, LLMAttribution
from rich import box
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from captum_cage._checks import complaint
from captum_cage._version import __version__
from captum_cage.archive import replacing
from captum_cage.attribution import GraphContextAttribution
from captum_cage.cli_batch import BATCH_EPILOG, BATCH_HELP, batch
from captum_cage.cli_models import (
    chosen_method,
    conversation_input,
    counting_arguments,
    counting_option,
    device_name,
    generation_arguments,
    load_masked_lm,
    load_model,
    token_input,
)
from captum_cage.cli_options import (
    OUTPUT_PANEL,
    PROGRAM,
    BaselineOption,
    BatchSizeOption,
    Device,
    DeviceOption,
    DrawsOption,
    DryRunOption,
    Dtype,
    DtypeOption,
    ExplainOption,
    ExportOption,
    HtmlOption,
    JsonOption,
    MaskedLmOption,
    MaxNewTokensOption,
    MethodOption,
    ModelOption,
    NoProgressOption,
    Normalization,
    NormalizationOption,
    PartOption,
    PathsOption,
    QuietOption,
    Removal,
    SamplesOption,
    SaveOption,
    SeedOption,
    StepsOption,
    Strategy,
    StrategyOption,
    ToleranceOption,
    TopOption,
    TrustRemoteCodeOption,
    Units,
    UnitsOption,
    WidthOption,
    asked_span,
    check_writable,
    progress_is_welcome,
    read_text,
    say,
    stdout_console,
    text_or_pattern,
    write_json,
)
from captum_cage.demo import load_demo, sample_problems
from captum_cage.demo.problems import KINDS
from captum_cage.engines.registry import engine_names
from captum_cage.estimate import Estimate
from captum_cage.export import checked_suffix
from captum_cage.foils import Alternative
from captum_cage.inputs import TokenIdsInput
from captum_cage.interventions import PathCheck
from captum_cage.methods.capability import Capability
from captum_cage.methods.catalogue import (
    accepted_inputs,
    capabilities,
    llm_attribution,
    missing_extra,
    needs_argument,
)
from captum_cage.metrics import Evaluation, MaskedRefill
from captum_cage.result import GraphAttributionResult
from captum_cage.terminal import TerminalView
from captum_cage.text import Span, harmless

__all__ = ["app", "main"]

_LISTED = 8  # alternatives

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
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (ImportError, OSError, TypeError, ValueError) as error:
            if ctx.params.get("traceback") or not _is_users(error):
                raise
            say(f"error: {_reason(error)}")
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
    say(f"warning: {message}")


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
        "Exit codes: 0 done, 1 unexpected failure, 2 wrong usage or input, 3 done but "
        "for some examples of a batch, 130 interrupted."
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


_Kind = Enum("_Kind", [(kind, kind) for kind in KINDS], type=str)  # type: ignore[misc]
_TWO_QUESTIONS = _Kind("two_questions")


# --- output --------------------------------------------------------------------------


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
        check_writable("--json", self.json_file)
        check_writable("--save", self.save_file)
        check_writable("--html", self.html_file)
        for path in self.export_files:
            checked_suffix(path, "--export")

    @property
    def shows_progress(self) -> bool:
        """Whether progress bars are welcome."""
        return progress_is_welcome(self.quiet or self.no_progress)

    def note(self, text: str) -> None:
        """Say something on stderr, unless quiet."""
        if not self.quiet:
            say(text)

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
            console = stdout_console(self.width)
            console.print(view)
            if evaluation is not None:
                console.print("", _evaluation_table(evaluation))
                for note in evaluation.notes:
                    console.print(harmless(note), style="dim", markup=False)

    def write_estimate(self, estimate: Estimate) -> None:
        """Write what it would cost, or print it."""
        if self.json_file is not None:
            write_json(self.json_file, estimate.to_dict())
        if self.json_file == "-" or self.quiet:
            return
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for name, text in estimate.table():
            table.add_row(name, text)
        stdout_console(self.width).print(table)

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
        stdout_console(self.width).print(table, "")


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
        gen_args=generation_arguments(None),
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
    model: ModelOption,
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
    max_new_tokens: MaxNewTokensOption = 100,
    units: UnitsOption = Units.sentence,
    method: MethodOption = "ablation",
    normalization: NormalizationOption = Normalization.positive,
    samples: SamplesOption = None,
    steps: StepsOption = None,
    masked_lm: MaskedLmOption = None,
    baseline: BaselineOption = None,
    seed: SeedOption = 0,
    draws: DrawsOption = 1,
    verify: Annotated[
        int,
        typer.Option(
            "--verify",
            min=0,
            help="Heaviest paths to test: their steps are written again without the "
            "source.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = 0,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Test the result: sources are taken away and the model writes again.",
            rich_help_panel=OUTPUT_PANEL,
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
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    removal: Annotated[
        Removal | None,
        typer.Option(
            "--removal",
            show_default=False,
            help="How --evaluate takes sources away; masked_lm needs --masked-lm. "
            "Default: delete.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    alternatives: Annotated[
        str | None,
        typer.Option(
            "--alternatives",
            show_default=False,
            metavar="PLACE",
            help="List what else the model might have written at a place, as foils.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    strategy: StrategyOption = Strategy.auto,
    tolerance: ToleranceOption = 0.0,
    batch_size: BatchSizeOption = None,
    dry_run: DryRunOption = False,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    trust_remote_code: TrustRemoteCodeOption = False,
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
    refills = removal is Removal.masked_lm
    base, declared = chosen_method(method, masked_lm, refills)
    options, kwargs = counting_arguments(base, declared, samples, steps)
    span = asked_span(explain, part)
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
    wanted = text_or_pattern("--statement", statement)
    if [prompt, target, system, messages].count("-") > 1:
        raise ValueError(
            "--prompt: stdin can be read once. Put the other text in a file."
        )
    texts = [
        None if value is None else read_text(option, value)
        for option, value in (
            ("--prompt", prompt),
            ("--target", target),
            ("--system", system),
        )
    ]
    if messages is None and not texts[0]:
        raise ValueError("--prompt: must have some text, but it is empty. Pass some.")
    listed = None if messages is None else _messages(messages)
    place = device_name(device)
    output.note(f"loading {model}")
    if not output.shows_progress:
        transformers.utils.logging.disable_progress_bar()
    network, tokenizer = load_model(model, place, dtype, trust_remote_code)
    masked: dict[str, Any] = {}
    if masked_lm is not None:
        output.note(f"loading {masked_lm}")
        masked = load_masked_lm(masked_lm, place, dtype, trust_remote_code)
    if needs_argument(base, "masked_lm") is not None:
        options |= masked
    if listed is None:
        inp = token_input(str(texts[0]), texts[2], chat, baseline, tokenizer)
    else:
        inp = conversation_input(listed, baseline, tokenizer)
    cage = GraphContextAttribution(
        llm_attribution(base, network, tokenizer, **options),
        normalization=normalization.value,
    )
    trace = inp.continuation
    is_given = texts[1] is not None or (trace is not None and trace.ends_generated)
    asked: dict[str, Any] = {
        "target": texts[1],
        "explain": span,
        "units": units.value,
        "foil": foils,
        "gen_args": None if is_given else generation_arguments(max_new_tokens),
        "draws": draws,
        "strategy": strategy.value,
        "tolerance": tolerance,
        "batch_size": batch_size,
        **kwargs,
    }
    transformers.set_seed(seed)
    if dry_run:
        output.write_estimate(cage.estimate(inp, **asked))
        if verify or evaluate or alternatives is not None:
            output.note(
                "note: --verify, --evaluate and --alternatives come besides; what they "
                "cost depends on the result"
            )
        return
    output.note(f"explaining with {base.__name__} on {place}, in {units.value} units")
    start = time.perf_counter()
    result = cage.attribute(inp, show_progress=output.shows_progress, **asked)
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
    text = read_text(
        "--messages", name if name == "-" else f"@{name.removeprefix('@')}"
    )
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


# --- captum-cage batch ---------------------------------------------------------------

app.command(help=BATCH_HELP, epilog=BATCH_EPILOG)(batch)


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
    check_writable("--json", json_file)
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
    console = stdout_console(width)
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
    if (option := counting_option(declared.counted)) is not None:
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
    span = asked_span(explain, part)
    result = GraphAttributionResult.load(file)
    output.write(result if span is None else result.explaining(span))
