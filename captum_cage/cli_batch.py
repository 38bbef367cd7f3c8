"""The command ``captum-cage batch``: many examples to a directory of results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from captum.attr import InterpretableInput
from rich.table import Table

from captum_cage.attribution import GraphContextAttribution
from captum_cage.batch import BatchReport, Example, Failure, RayCluster, run
from captum_cage.batch.directory import Directory
from captum_cage.batch.examples import digest, given, total
from captum_cage.batch.worker import settings_of
from captum_cage.cli_models import (
    chosen_method,
    conversation_input,
    counting_arguments,
    device_name,
    generation_arguments,
    load_masked_lm,
    load_model,
    token_input,
)
from captum_cage.cli_options import (
    BaselineOption,
    BatchSizeOption,
    Device,
    DeviceOption,
    DrawsOption,
    DryRunOption,
    Dtype,
    DtypeOption,
    JsonOption,
    MaskedLmOption,
    MaxNewTokensOption,
    MethodOption,
    ModelOption,
    NoProgressOption,
    Normalization,
    NormalizationOption,
    PartOption,
    QuietOption,
    SamplesOption,
    SeedOption,
    StepsOption,
    Strategy,
    StrategyOption,
    ToleranceOption,
    TrustRemoteCodeOption,
    Units,
    UnitsOption,
    WidthOption,
    asked_span,
    check_writable,
    progress_is_welcome,
    say,
    stdout_console,
    write_json,
)
from captum_cage.estimate import Estimate, duration, size
from captum_cage.methods.catalogue import llm_attribution, needs_argument
from captum_cage.text import harmless

__all__ = ["BATCH_EPILOG", "BATCH_HELP", "SOME_FAILED", "batch"]

SOME_FAILED = 3
"""Exit code: all was done, but some examples have an error in place of a result."""

BATCH_HELP = (
    "Explain many examples, and keep each result.\n\n"
    "Each line of the file is a JSON object with prompt (or messages), and if you like "
    "target, explain, units, foil, gen_args and id; options hold where it says nothing "
    "else, and what it has besides stands in the table of scores. The same command "
    "goes on where it was interrupted, also where it was killed, and several may run "
    "on one directory."
)
BATCH_EPILOG = (
    "Examples:\n\n"
    "captum-cage batch examples.jsonl --out results --model demo\n\n"
    "captum-cage batch examples.jsonl --out results --model demo --dry-run\n\n"
    "captum-cage batch examples.parquet --out results --model gpt2 --workers 2 "
    "--method integrated-gradients --explain '/answer is .*/'\n\n"
    "Exit code 3: all is done, but some examples failed."
)

_SAMPLED = 5  # examples whose cost is estimated, for that of all
_SHOWN = 5  # errors


class Backend(str, Enum):
    """Where the workers are."""

    local = "local"
    ray = "ray"


@dataclass(frozen=True, eq=False)
class _Asked(Example):
    """An example as ``captum-cage explain`` reads it: special tokens are no features.

    Attributes:
        chat (bool): whether the prompt goes through the model's chat template.
        baseline (str or None): the token that stands for an absent one.
    """

    chat: bool = False
    baseline: str | None = None

    @cached_property
    def key(self) -> str:
        """Hash of what is asked, and of how it is read."""
        return digest([super().key, self.chat, self.baseline])

    def input(self, tokenizer: Any) -> InterpretableInput:
        """The prompt, a chat or a trace, as ``captum-cage explain`` reads it."""
        if self.messages is not None:
            return conversation_input(list(self.messages), self.baseline, tokenizer)
        return token_input(str(self.prompt), None, self.chat, self.baseline, tokenizer)


@dataclass(frozen=True)
class _File:
    """The examples of a file, as the options have them read."""

    path: Path
    chat: bool
    baseline: str | None

    def __len__(self) -> int:
        return total(self.path) or 0

    def __iter__(self) -> Iterator[Any]:
        for one in given(self.path):
            if one.example is None:
                yield one
                continue
            fields = {name: getattr(one.example, name) for name in _FIELDS}
            asked = _Asked(**fields, chat=self.chat, baseline=self.baseline)
            yield replace(one, example=asked, key=asked.key)


_FIELDS = tuple(Example.__dataclass_fields__)


@dataclass(frozen=True)
class _Maker:
    """Makes what explains, in each worker."""

    model: str
    device: str
    dtype: Dtype
    trust_remote_code: bool
    method: type[Any]
    options: dict[str, Any]
    masked_lm: str | None
    normalization: Normalization

    def __call__(self) -> GraphContextAttribution:
        place = self.device
        worker = os.environ.get("CAPTUM_CAGE_WORKER")
        if place == "cuda" and worker is not None:
            place = f"cuda:{int(worker) % max(1, torch.cuda.device_count())}"
        network, tokenizer = load_model(
            self.model, place, self.dtype, self.trust_remote_code
        )
        options = dict(self.options)
        if self.masked_lm is not None:
            options |= load_masked_lm(
                self.masked_lm, place, self.dtype, self.trust_remote_code
            )
        return GraphContextAttribution(
            llm_attribution(self.method, network, tokenizer, **options),
            normalization=self.normalization.value,
        )


def batch(
    examples: Annotated[
        Path,
        typer.Argument(
            show_default=False,
            help="A file of examples that ends in .jsonl, .ndjson or .parquet.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            show_default=False,
            metavar="DIR",
            help="The directory of the results. It is made, or gone on with.",
        ),
    ],
    model: ModelOption,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send each prompt through the model's chat template."
        ),
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            show_default=False,
            metavar="SPAN",
            help="What to explain, as in captum-cage explain. Default: all of it.",
        ),
    ] = None,
    part: PartOption = None,
    max_new_tokens: MaxNewTokensOption = 100,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first example that fails.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="Try examples again that failed in a run before."
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=1, help="Processes, each with a model of its own."
        ),
    ] = 1,
    backend: Annotated[
        Backend,
        typer.Option(
            "--backend",
            help="Where the workers are: local for this machine, ray for a cluster of "
            "Ray, where each takes a GPU if the model goes to one.",
        ),
    ] = Backend.local,
    dry_run: DryRunOption = False,
    units: UnitsOption = Units.sentence,
    method: MethodOption = "ablation",
    normalization: NormalizationOption = Normalization.positive,
    samples: SamplesOption = None,
    steps: StepsOption = None,
    masked_lm: MaskedLmOption = None,
    baseline: BaselineOption = None,
    seed: SeedOption = 0,
    draws: DrawsOption = 1,
    strategy: StrategyOption = Strategy.auto,
    tolerance: ToleranceOption = 0.0,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    trust_remote_code: TrustRemoteCodeOption = False,
    width: WidthOption = None,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
    no_progress: NoProgressOption = False,
) -> None:
    """Explain many examples, and keep each result."""
    check_writable("--json", json_file)
    base, declared = chosen_method(method, masked_lm, refills=False)
    made, kwargs = counting_arguments(base, declared, samples, steps)
    taken = needs_argument(base, "masked_lm") is not None
    maker = _Maker(
        model,
        device_name(device),
        dtype,
        trust_remote_code,
        base,
        made,
        masked_lm if taken else None,
        normalization,
    )
    file = _File(examples, chat, baseline)
    len(file)  # a file that cannot be read is refused before a model is loaded
    options: dict[str, Any] = {
        "explain": asked_span(explain, part),
        "units": units.value,
        "gen_args": generation_arguments(max_new_tokens),
        "draws": draws,
        "strategy": strategy.value,
        "tolerance": tolerance,
        "batch_size": batch_size,
        **kwargs,
    }
    shows_progress = progress_is_welcome(quiet or no_progress)
    if not shows_progress:
        transformers.utils.logging.disable_progress_bar()
    if not quiet:
        say(f"loading {model}")
    if dry_run:
        cage, directory = maker(), Directory(out)
        directory.check(settings_of(cage, options, seed))
        plan = _plan(file, directory, cage, options, retry_failed, workers)
        if json_file is not None:
            write_json(json_file, plan.to_dict())
        if json_file != "-" and not quiet:
            stdout_console(width).print(plan.table())
        return
    try:
        report = run(
            maker,
            file,
            out,
            backend=_backend(backend, maker.device),
            workers=workers,
            strict=strict,
            retry_failed=retry_failed,
            seed=seed,
            show_progress=shows_progress,
            **options,
        )
    except KeyboardInterrupt:
        say(f"what is finished is kept in {out}; the same command goes on from there")
        raise
    if json_file is not None:
        write_json(json_file, _numbers(report))
    if json_file != "-" and not quiet:
        stdout_console(width).print(_summary(report))
    if report.failed:
        raise typer.Exit(SOME_FAILED)


def _backend(backend: Backend, device: str) -> str | RayCluster:
    """Where the workers are; Ray shows a worker the GPUs that it asks for."""
    if backend is Backend.ray and device == "cuda":
        return RayCluster(num_gpus=1)
    return backend.value


def _numbers(report: BatchReport) -> dict[str, Any]:
    """A report, for JSON."""
    found = {name: getattr(report, name) for name in ("done", "skipped", "failed")}
    errors = [asdict(one) for one in report.errors]
    return {
        "path": str(report.path),
        **found,
        "seconds": report.seconds,
        "errors": errors,
    }


def _table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    return table


def _summary(report: BatchReport) -> Table:
    """What was done, and the first errors."""
    table = _table()
    table.add_row("explained", f"{report.done:,}")
    table.add_row("skipped", f"{report.skipped:,}, done before or repeated")
    table.add_row("failed", f"{report.failed:,}")
    for one in report.errors[:_SHOWN]:
        text = f"{one.type}: {one.message}"
        table.add_row(f"  {_where(one)}", harmless(text, one_line=True))
    if len(report.errors) > _SHOWN:
        more = len(report.errors) - _SHOWN
        table.add_row("", f"and {more:,} more, in {report.path / 'errors'}")
    table.add_row("time", duration(report.seconds))
    table.add_row("results", str(report.path))
    return table


def _where(failure: Failure) -> str:
    """Where a failed example stands in the input."""
    place = f"example {failure.position}"
    if failure.line is not None:
        place = f"line {failure.line}"
    name = "" if failure.id is None else f", {failure.id}"
    return harmless(place + name, one_line=True)


# --- dry run -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What a run would do, and cost.

    Attributes:
        examples (int): in the input.
        unreadable (int): of these, no examples.
        repeated (int): of these, those that stand further up, too.
        done (int): of these, those that have a result.
        failed (int): of these, those that failed before and are not tried again.
        left (int): those that would be explained.
        sequences (int or None): sequences that the model would be given. It, and what
            follows, is None where all that were to be estimated would fail.
        tokens (int or None): tokens in them.
        seconds (float or None): time that one worker would take.
        memory (int or None): most bytes that one worker takes at once.
        workers (int): number of workers.
        refused (int): examples that were to be estimated, but would fail.
        reason (str or None): why the first of them would.
        estimated (int): examples whose cost was estimated; the others' follows from
            their lengths.
    """

    examples: int
    unreadable: int
    repeated: int
    done: int
    failed: int
    left: int
    sequences: int | None
    tokens: int | None
    seconds: float | None
    memory: int | None
    workers: int
    refused: int
    reason: str | None
    estimated: int

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """A line for each."""
        table = _table()
        table.add_row("examples", f"{self.examples:,}")
        table.add_row("  done before", f"{self.done:,}")
        table.add_row("  failed before", f"{self.failed:,}")
        table.add_row("  cannot be read", f"{self.unreadable:,}")
        table.add_row("  repeated", f"{self.repeated:,}")
        table.add_row("  to explain", f"{self.left:,}")
        each = "" if self.workers == 1 else f" of work for {self.workers} workers"
        for name, number, read in (
            ("model passes (sequences)", self.sequences, "{:,}".format),
            ("tokens", self.tokens, "{:,}".format),
            ("time", self.seconds, lambda seconds: duration(seconds) + each),
            ("memory", self.memory, lambda count: f"{size(count)} for each worker"),
        ):
            table.add_row(name, "unknown" if number is None else read(number))
        told = f"{self.estimated} of them, spread over the lengths"
        table.add_row("estimated from", told)
        if self.reason is not None:
            told = f"{self.refused} more that were tried, the first with {self.reason}"
            table.add_row("would fail", harmless(told, one_line=True))
        return table


def _plan(
    file: _File,
    directory: Directory,
    cage: GraphContextAttribution,
    options: dict[str, Any],
    retry_failed: bool,
    workers: int,
) -> _Plan:
    """What a run would do: counted over all examples, timed by a few."""
    tokenizer = cage.llm_attr.tokenizer
    names = ("examples", "unreadable", "repeated", "done", "failed")
    counts = dict.fromkeys(names, 0)
    seen: set[str] = set()
    left: list[tuple[int, int]] = []  # tokens, position
    for one in file:
        counts["examples"] += 1
        if one.example is None:
            counts["unreadable"] += 1
        elif one.key in seen:
            counts["repeated"] += 1
        elif directory.is_done(one.key):
            counts["done"] += 1
        elif directory.failure(one.key) is not None and not retry_failed:
            counts["failed"] += 1
        else:
            left.append((_length(one.example, tokenizer, options), one.position))
        seen.add(one.key)
    left.sort()
    places = np.linspace(0, len(left) - 1, min(_SAMPLED, len(left))).round()
    chosen = {left[int(place)][1]: left[int(place)][0] for place in places}
    found: dict[int, list[Estimate]] = {}  # by tokens
    refused: list[str] = []
    for one in file:
        if one.position in chosen and one.example is not None:
            try:
                estimate = _estimate(cage, one.example, options)
            except (ImportError, OSError):
                raise
            except Exception as error:  # noqa: BLE001 (a run would record it)
                refused.append(f"{type(error).__name__}: {error}")
            else:
                found.setdefault(chosen[one.position], []).append(estimate)
    lengths = [length for length, _ in left]
    known = sorted(found)
    estimates = [one for length in known for one in found[length]]
    is_unknown = bool(left) and not known

    def all_of(name: str) -> float:
        if not known:
            return 0.0
        each = [np.mean([getattr(e, name) for e in found[k]]) for k in known]
        return float(np.interp(lengths, known, each).sum())

    return _Plan(
        **counts,
        left=len(left),
        sequences=None if is_unknown else round(all_of("sequences")),
        tokens=None if is_unknown else round(all_of("tokens")),
        seconds=None if is_unknown else all_of("seconds"),
        memory=None if is_unknown else max((e.memory for e in estimates), default=0),
        workers=workers,
        refused=len(refused),
        reason=refused[0] if refused else None,
        estimated=len(estimates),
    )


def _length(example: Example, tokenizer: Any, options: dict[str, Any]) -> int:
    """Tokens of an example, about."""
    messages = example.messages or [{"content": example.prompt}]
    texts = [str(one.get("content") or "") for one in messages]
    written = (example.gen_args or options["gen_args"]).get("max_new_tokens", 0)
    if isinstance(example.target, str):
        texts.append(example.target)
        written = 0
    elif example.target is not None:
        written = len(example.target)
    return sum(len(tokenizer(text).input_ids) for text in texts) + int(written)


def _estimate(
    cage: GraphContextAttribution, example: Example, options: dict[str, Any]
) -> Estimate:
    inp: Any = example.input(cage.llm_attr.tokenizer)
    asked = {**options, **example.arguments}
    trace = inp.continuation
    if "target" in asked or (trace is not None and trace.ends_generated):
        asked.pop("gen_args", None)
    return cage.estimate(inp, **asked)
