"""How faithful attributions are: methods, ways through the graph, data sets, metrics.

Each example is explained by every base method, and every explanation is tested on the
same sets of sources that are taken away: the model writes again (``regenerated``), or
the text stays fixed (``span``, ``response``). ::

    python benchmarks/faithfulness.py --out runs/demo            # the demo model
    python benchmarks/faithfulness.py --out runs/demo --docs     # and the page of docs
    python benchmarks/faithfulness.py --model Qwen/Qwen3-4B --datasets math --out runs/q
        --masked-lm FacebookAI/roberta-base   # where a method asks one
    python benchmarks/faithfulness.py --paper --estimate         # what it would cost
    python benchmarks/faithfulness.py --paper --out runs/paper   # the paper's tables
    python benchmarks/faithfulness.py --smoke                    # for CI

A run that was interrupted goes on where it stopped. Other libraries are scored alike,
through files: ``--export`` writes the examples, ``benchmarks/rivals.py`` reads them in
the library's own environment, and ``--rivals`` takes its scores.

``--paper`` follows the code of Walker and Ewetz (2025), arXiv:2512.15663: its models,
prompts, base methods and metrics (the text fixed, sources replaced by the end of text,
each of them deletable), with a folder of records for each model under ``--out``. Their
scripts take the first 500 examples of each data set (``--most 500``). What differs:
explained in Facts are two neighbours of the three that are listed, and the sentences of
Facts are those of ``--texts`` (theirs are claims of FEVEROUS), by default built in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import captum
import numpy as np
import numpy.typing as npt
import scipy
import torch
import transformers
from captum.attr import InterpretableInput, TextTokenInput
from ground_truth import trained_masked_lm
from scipy.stats import false_discovery_control
from tqdm import tqdm

from captum_cage import (
    AttributionGraph,
    ChatTokenInput,
    GraphAttributionResult,
    GraphContextAttribution,
)
from captum_cage.demo import examples as demo_examples
from captum_cage.demo import load_demo
from captum_cage.methods.catalogue import llm_attribution, method_named, needs_argument
from captum_cage.metrics import (
    Comparison,
    MaskedRefill,
    by_position,
    calibrate_metric,
    compare,
    estimate,
    metric_info,
    metric_names,
    orders_of,
)
from captum_cage.metrics.datasets import (
    LOADERS,
    Example,
    facts,
    multi_hop,
    needles,
    unrelated,
    variable_tracking,
)

FloatArray = npt.NDArray[np.float64]

ROOT = Path(__file__).parents[1]
GENERATED = "<!-- what follows is written by benchmarks/faithfulness.py --docs -->"
DEMO = "demo"
BASELINES = ("truth", "nearest", "random")
WAYS = ("marginalised", "one hop", "signed", "sequence", "direct")
METRICS = (
    *("auroc", "coverage", "recovery"),
    *("regenerated: deletion", "regenerated: insertion", "regenerated: rise"),
    *("regenerated: mas", "span: rise", "span: mas", "response: rise", "response: mas"),
)
TRUTH = tuple(name for name in metric_names() if ": " not in name)
HIGHER = {name for name in metric_names() if metric_info(name).higher_is_better}
REMOVALS = ("delete", "baseline", "suppress", "masked_lm")
# What makes the numbers of a record: another setting needs another folder.
SETTINGS = (
    *("model", "seed", "removal", "samples", "axis", "max_new_tokens"),
    *("masked_lm", "paper"),
)
# Of records that do not say, since they are older.
UNSAID = {"masked_lm": None, "paper": False}
POINTS = np.linspace(0.0, 1.0, 11)
# Colours that colour-blind readers tell apart, and never colour alone.
LINES: dict[str, dict[str, Any]] = {
    "truth": {"color": "black", "linestyle": ":"},
    "marginalised": {"color": "#0072b2", "linestyle": "-"},
    "one hop": {"color": "#e69f00", "linestyle": "--"},
    "sequence": {"color": "#009e73", "linestyle": "-."},
    "direct": {"color": "#d55e00", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}
# What must hold on two questions: against what, by which metric.
CLAIMS = {
    "auroc": ("direct", "sequence", "one hop"),
    "regenerated: deletion": ("direct", "sequence", "one hop"),
    "coverage": ("direct",),
}
# Facts of common knowledge, for the Facts recipe.
FACTS = (
    "Water boils at 100 degrees Celsius at sea level.",
    "The Moon orbits the Earth about once a month.",
    "Honey bees tell each other where food is by dancing.",
    "The heart of an adult beats about 70 times a minute at rest.",
    "Iron rusts when it meets water and air.",
    "The Nile flows north into the Mediterranean Sea.",
    "A chess board has 64 squares.",
    "Sound travels faster in water than in air.",
    "Bamboo is a kind of grass.",
    "The Great Wall of China was built over many centuries.",
    "Light from the Sun takes about eight minutes to reach the Earth.",
    "Octopuses have three hearts.",
    "Gold does not tarnish in air.",
    "The piano has 88 keys in its modern form.",
    "Penguins live mostly in the southern half of the world.",
    "Salt lowers the freezing point of water.",
    "The longest bone of the body is in the thigh.",
    "Mount Everest rises on the border of Nepal and China.",
)


@dataclass(frozen=True)
class Case:
    """A base method as it is measured.

    Attributes:
        name (str): its name in the catalogue.
        kwargs (Mapping): for ``attribute``.
        label (str): what tables call it.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.name


PAPER_IG = {"n_steps": 20, "method": "riemann_trapezoid"}
CASES = (
    Case("attnlrp", label="AttnLRP"),
    Case("attention-suppression", label="suppression"),
    Case("ablation"),
    Case("integrated-gradients", PAPER_IG, "IG (paper)"),
    Case("attention-x-ig", PAPER_IG, "attention x IG (paper)"),
    Case("clp-cage", label="CLP (paper)"),
    Case("one-shot-reagent", label="ReAGent (paper)"),
    Case("ifr", label="IFR"),
    Case("c-lime", label="C-LIME"),
)
PAPER_CASES = (
    *("integrated-gradients", "ablation", "clp-cage", "one-shot-reagent"),
    "attention-x-ig",
)
PAPER_MODELS = (
    *("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    *("Qwen/Qwen3-4B", "Qwen/Qwen3-8B"),
)
# Their file of Facts has more; the scripts take 500 of it.
PAPER_DATA = {"facts": 500, "math": 1258, "morehopqa": 1118}
PAPER_METRICS = (
    *("response: rise", "response: mas"),
    *(name for name in metric_names() if name.startswith("coverage")),
)
PAPER_CLAIMS = dict.fromkeys(PAPER_METRICS, CLAIMS["auroc"])
PAPER_MASKED_LM = "allenai/longformer-base-4096"
PAPER_FRAME = ("Context: ", "\n\n\nQuery: ")
PAPER_AGGREGATES = (
    "The paper (arXiv:2512.15663) gives: gains over the base method of up to 40% on "
    "average; coverage better in 17 of 20 pairs of model and base method, faithfulness "
    "(RISE and MAS) in 40 of 40."
)


# --- examples -------------------------------------------------------------------------


def alternating(examples: Iterable[Example]) -> Iterator[Example]:
    """One answer of each problem: the first of one, the second of the next."""
    by_prompt: dict[str, list[Example]] = {}
    for example in examples:
        by_prompt.setdefault(example.prompt, []).append(example)
    for number, several in enumerate(by_prompt.values()):
        yield several[number % len(several)]


Recipe = Callable[[argparse.Namespace, int], Iterator[Example]]


def of_demo(kind: str) -> Recipe:
    """Problems of the demo model, one answer of each."""
    return lambda options, count: alternating(demo_examples(count, options.seed, kind))


def public(options: argparse.Namespace, name: str, **more: Any) -> Iterator[Example]:
    """A public data set, from the folder of ``--data`` or from the hub."""
    if options.data is None:
        return LOADERS[name](**more)
    found = sorted(options.data.glob(f"{name}.*"))
    if not found:
        raise SystemExit(
            f"--data: {options.data} must have a file {name}.json, .jsonl or .parquet, "
            "but has none. Download it there, or leave --data out to ask the hub."
        )
    return LOADERS[name](found[0], **more)


def of_hub(name: str) -> Recipe:
    """The first examples of a public data set."""
    return lambda options, count: islice(
        public(options, name), options.seed, options.seed + count
    )


def math(options: argparse.Namespace, count: int) -> Iterator[Example]:
    """GSM8K with an unrelated sentence after every sentence."""
    return unrelated(public(options, "gsm8k", limit=count))


def paper_facts(options: argparse.Namespace, count: int) -> Iterator[Example]:
    """The Facts recipe as the paper has it; all sentences count."""
    found = facts(options.texts, count, in_order=True, seed=options.seed)
    for example in found:
        completion = (example.completion or "").strip()
        yield replace(example, completion=completion, sources=None)


def paper_math(options: argparse.Namespace, count: int) -> Iterator[Example]:
    """The 658 problems of GSM8K and 600 of MultiArith; all sentences count.

    Those of GSM8K are the problems of its test split with three full stops or more, in
    their order: so are the authors' own (but for one word that they corrected).
    """
    long = (one for one in public(options, "gsm8k") if one.prompt.count(".") >= 3)
    both = chain(long, public(options, "multiarith", split="train+test"))
    single = (
        replace(example, prompt=" ".join(example.prompt.split()))
        for example in islice(both, count)
    )
    for example in unrelated(single, question_apart=True):
        yield replace(example, sources=None)


def paper_morehopqa(options: argparse.Namespace, count: int) -> Iterator[Example]:
    """MoreHopQA without titles, the question in a line of its own; all count."""
    for example in public(options, "morehopqa", limit=count, plain=True):
        yield replace(example, sources=None)


DATASETS: dict[str, Recipe] = {
    "one_question": of_demo("one_question"),
    "two_questions": of_demo("two_questions"),
    "long_chain": of_demo("long_chain"),
    "distractors": of_demo("distractors"),
    "facts": lambda options, count: facts(options.texts, count, seed=options.seed),
    "needle": lambda options, count: needles(
        options.texts, count, length=20, seed=options.seed
    ),
    "variables": lambda options, count: variable_tracking(count, seed=options.seed),
    "multi_hop": lambda options, count: multi_hop(
        options.texts, count, length=10, seed=options.seed
    ),
    "math": math,
    **{name: of_hub(name) for name in ("gsm8k", "multiarith", "hotpotqa", "morehopqa")},
}
PAPER_DATASETS: dict[str, Recipe] = {
    "facts": paper_facts,
    "math": paper_math,
    "morehopqa": paper_morehopqa,
}


def count_of(options: argparse.Namespace, name: str) -> int:
    """How many examples of a data set are measured."""
    if not options.paper:
        return int(options.problems)
    return min(options.most or PAPER_DATA[name], PAPER_DATA[name])


def examples_of(options: argparse.Namespace, name: str) -> Iterator[Example]:
    """The examples of a data set that are measured."""
    recipes = PAPER_DATASETS if options.paper else DATASETS
    return recipes[name](options, count_of(options, name))


# --- one example ----------------------------------------------------------------------


class FramedInput(ChatTokenInput):
    """A message whose prompt is attributed, and what stands around it is not.

    Args:
        prompt (str): the prompt.
        frame (tuple[str, str]): what stands before and after it.
        tokenizer: a fast tokenizer with a chat template.
    """

    def __init__(self, prompt: str, frame: tuple[str, str], tokenizer: Any) -> None:
        end = tokenizer.eos_token_id
        super().__init__(
            [{"role": "user", "content": prompt.join(frame)}],
            tokenizer,
            baselines=end,
            enable_thinking=False,
        )
        text = self.token_text
        start = text.text.index(prompt)
        # The space before the first word is its token's.
        space = len(frame[0]) - len(frame[0].rstrip())
        self._framed = (start - space, start + len(prompt))
        inside = [
            self._framed[0] < stop and begin < self._framed[1]
            for begin, stop in text.offsets
        ]
        self.set_tokens(self.inp_tensor[0].tolist(), tokenizer, inside, end)
        self.set_text(text)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Character range of the prompt, with the space before it."""
        return (self._framed,)


@dataclass
class Bench:
    """A model, and how its texts are explained and tested.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        chat (bool): whether prompts go through its chat template.
        options (argparse.Namespace): what was asked for.
        masked (dict): a masked language model, once a method needs it.
    """

    model: Any
    tokenizer: Any
    chat: bool
    options: argparse.Namespace
    masked: dict[str, Any] = field(default_factory=dict)

    def as_input(self, example: Example) -> InterpretableInput:
        """The input for an example."""
        if not self.chat:
            return TextTokenInput(example.prompt, self.tokenizer)
        if self.options.paper:
            return FramedInput(example.prompt, PAPER_FRAME, self.tokenizer)
        end = self.tokenizer.eos_token_id
        return ChatTokenInput(
            [{"role": "user", "content": example.prompt}],
            self.tokenizer,
            baselines=end,
            enable_thinking=False,
        )

    def cage(self, case: Case) -> GraphContextAttribution:
        """The wrapped base method."""
        options: dict[str, Any] = {}
        if needs_masked_lm(case):
            options = self._masked_lm()
        return GraphContextAttribution(
            llm_attribution(case.name, self.model, self.tokenizer, **options)
        )

    def removal(self, name: str) -> Any:
        """A way of taking sources away, as metrics take it."""
        return MaskedRefill(**self._masked_lm()) if name == "masked_lm" else name

    def _masked_lm(self) -> dict[str, Any]:
        if not self.masked:
            name = self.options.masked_lm
            if name is None:
                steps = 2 if self.options.smoke else 600
                model, tokenizer = trained_masked_lm(load_demo()[1], steps)
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(name)
                model = transformers.AutoModelForMaskedLM.from_pretrained(name)
                model = model.to(self.model.device).eval()
            self.masked = {"masked_lm": model, "masked_tokenizer": tokenizer}
        return self.masked

    def explained(
        self, example: Example, case: Case, ids: list[int] | None
    ) -> GraphAttributionResult:
        """The explanation of an example by a base method."""
        arguments = dict(case.kwargs)
        if ids is None and example.completion is None:
            arguments["gen_args"] = {"max_new_tokens": self.options.max_new_tokens}
        target = example.completion if ids is None else ids
        result = self.cage(case).attribute(
            self.as_input(example), target, units="sentence", **arguments
        )
        return result.explaining(example.explained_in(result.generated_text))


def needs_masked_lm(case: Case) -> bool:
    """Whether a base method asks a masked language model."""
    return bool(needs_argument(method_named(case.name)[0], "masked_lm"))


def ways_of(result: GraphAttributionResult) -> dict[str, FloatArray]:
    """Scores by each way through the same rows."""
    found = orders_of(result)
    graph = result.graph
    signed = AttributionGraph.from_rows(
        graph.rows, graph.sources, "signed", kept=graph.kept
    )
    return {
        "marginalised": found["result"],
        "one hop": found["one hop"],
        "signed": np.asarray(signed.explain(result.weights)),
        "sequence": found["sequence"],
        "direct": found["direct"],
    }


def measured(
    bench: Bench,
    example: Example,
    cases: Sequence[Case],
    rivals: Mapping[str, Sequence[float]],
    metrics: Sequence[str],
    known: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Scores of all methods on one example, and what came of the model.

    Args:
        bench (Bench): the model.
        example (Example): the example.
        cases (Sequence[Case]): base methods to explain it with.
        rivals (Mapping): scores of other libraries.
        metrics (Sequence[str]): what is measured.
        known (Mapping): attributions of an earlier run, which are tested again.

    Returns:
        dict: ``attributions`` by ``method|way``, ``scores[method][way][metric]``,
        ``curves`` of texts written again, the seconds of each method and of the test.
    """
    options = bench.options
    orders = {name: np.array(own) for name, own in known.items()}
    took: dict[str, float] = {}
    result: GraphAttributionResult | None = None
    ids: list[int] | None = None
    for case in cases:
        began = time.perf_counter()
        result = bench.explained(example, case, ids)
        took[str(case)] = time.perf_counter() - began
        ids = list(result.evaluator().task.generated)
        orders |= {f"{case}|{way}": own for way, own in ways_of(result).items()}
    if result is None:  # nothing but tests is new
        result = bench.explained(example, Case("ablation"), ids)
    gold = example.gold_in(result)
    chosen = example.sources_in(result)
    every = list(range(result.graph.n_sources)) if chosen is None else chosen
    orders = {name: own[every] for name, own in orders.items() if name not in known}
    orders |= {name: np.array(own) for name, own in known.items()}
    orders |= {f"{name}|own": np.array(theirs) for name, theirs in rivals.items()}
    # The first lends its sizes to random orders.
    first = next(iter(orders.values()))
    if gold:
        first = np.isin(every, gold).astype(np.float64)
        orders = {"truth|": first, **orders}
    orders["nearest|"] = by_position(first)
    began = time.perf_counter()
    tested = result.evaluator(
        sources=chosen,
        statement=example.statement,
        removal=bench.removal(options.removal),
        samples=options.samples,
        seed=options.seed,
        axis=options.axis,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the model does not reach is recorded
        found = tested.evaluate(
            orders, [m for m in metrics if gold or m not in TRUTH], gold or None
        )
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, own in found.scores.items():
        method, _, way = name.partition("|")
        scores.setdefault(method, {})[way] = {m: s.value for m, s in own.items()}
    curves = {
        name: np.interp(POINTS, found.places[name], curve).tolist()
        for (name, value), curve in found.curves.items()
        if value == "regenerated"
    }
    return {
        "kind": example.kind,
        "sources": len(every),
        "reached": found.reached,
        "reached_without": found.reached_without,
        "attributions": {name: own.tolist() for name, own in orders.items()},
        "scores": scores,
        "curves": curves,
        "seconds": {**took, "test": time.perf_counter() - began},
    }


# --- records --------------------------------------------------------------------------


def read_records(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Finished examples by data set and number; a half-written last line is dropped."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        key = (record["dataset"], record["number"])
        earlier = found.get(key, {"seconds": {}})
        record["seconds"] = earlier["seconds"] | record["seconds"]
        found[key] = record  # the later one has all methods of the earlier
    return found


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What makes the numbers of a record."""
    return {name: getattr(options, name) for name in SETTINGS}


def check_settings(options: argparse.Namespace) -> None:
    """Refuse a folder whose records were made with other settings."""
    path: Path = options.out / "settings.json"
    own = settings_of(options)
    if path.exists():
        theirs = {**UNSAID, **json.loads(path.read_text(encoding="utf-8"))}
        other = [
            f"{name} {theirs[name]!r}" for name in own if own[name] != theirs[name]
        ]
        if other:
            raise SystemExit(
                f"--out: {options.out} has records made with {', '.join(other)}. Pass "
                "another folder, or the same settings."
            )
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(own) + "\n", encoding="utf-8")


def run(bench: Bench, cases: Sequence[Case], records_file: Path) -> None:
    """Measure all examples that have no record yet."""
    options = bench.options
    done = read_records(records_file)
    rivals = read_rivals(options.rivals)
    records_file.parent.mkdir(parents=True, exist_ok=True)
    with records_file.open("a", encoding="utf-8") as file:
        for name in options.datasets:
            examples = examples_of(options, name)
            for number, example in enumerate(
                tqdm(examples, desc=name, total=count_of(options, name))
            ):
                earlier = done.get((name, number), {"scores": {}, "attributions": {}})
                known = earlier["scores"]
                new = [case for case in cases if str(case) not in known]
                theirs = {
                    rival: scores[name, number]
                    for rival, scores in rivals.items()
                    if (name, number) in scores and rival not in known
                }
                scored = known.get("nearest", {}).get("", {})
                metrics = [m for m in options.metrics if m not in scored]
                if not new and not theirs and not set(metrics) - set(TRUTH):
                    continue
                attributions = {
                    name: own
                    for name, own in earlier["attributions"].items()
                    if name not in ("truth|", "nearest|")
                }
                try:
                    found = measured(
                        bench, example, new, theirs, options.metrics, attributions
                    )
                except ValueError as error:
                    if options.strict:
                        raise
                    tqdm.write(f"{name} {number} left out: {error}")
                    continue
                record = {"dataset": name, "number": number, **found}
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())


def read_rivals(
    paths: Sequence[Path],
) -> dict[str, dict[tuple[str, int], list[float]]]:
    """Scores of other libraries, by their name, data set and number."""
    found: dict[str, dict[tuple[str, int], list[float]]] = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            own = found.setdefault(record["rival"], {})
            own[record["dataset"], record["number"]] = record["scores"]
    return found


def export(bench: Bench, path: Path) -> None:
    """Write the examples for other libraries, each with its sources' ranges."""
    options = bench.options
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for name in options.datasets:
            for number, example in enumerate(examples_of(options, name)):
                if example.completion is None or example.sources is None:
                    raise SystemExit(
                        f"--export: examples of {name} have no fixed text or no named "
                        "sources. Export data sets that have both."
                    )
                record = {
                    "dataset": name,
                    "number": number,
                    "prompt": example.prompt,
                    "completion": example.completion,
                    "explain": example.explained_in(example.completion),
                    "sources": [list(span) for span in example.sources],
                }
                file.write(json.dumps(record) + "\n")


# --- tables ---------------------------------------------------------------------------


def column(
    records: Sequence[Mapping[str, Any]], method: str, way: str, metric: str
) -> FloatArray:
    """One number per example; NaN where there is none."""
    nothing: dict[str, Any] = {}
    return np.array(
        [
            record["scores"].get(method, nothing).get(way, nothing).get(metric, np.nan)
            for record in records
        ]
    )


def mean(values: FloatArray) -> float:
    """Of the finite ones; NaN where there is none."""
    values = values[np.isfinite(values)]
    return float(np.mean(values)) if len(values) else np.nan


def methods_in(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods that were measured, in the order of the first record."""
    names = dict.fromkeys(name for record in records for name in record["scores"])
    return [name for name in names if name not in BASELINES]


def marks(calibration: Mapping[str, Any]) -> dict[str, str]:
    """Why a metric is not to be trusted, of those that are not."""
    found = calibration.get("metrics", {})
    return {name: one["untrusted"] for name, one in found.items() if one["untrusted"]}


def scores_table(
    records: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    untrusted: Mapping[str, str],
) -> str:
    """A row for each method and way, with 95% intervals over the examples."""
    heads = [
        f"{m} {'↑' if m in HIGHER else '↓'}{' †' if m in untrusted else ''}"
        for m in metrics
    ]
    lines = [
        f"| method | way | {' | '.join(heads)} |",
        "|---|---|" + "---:|" * len(heads),
    ]
    rows = [(name, "") for name in BASELINES]
    for method in methods_in(records):
        ways = dict.fromkeys(
            way for record in records for way in record["scores"].get(method, {})
        )
        rows += [(method, way) for way in ways]
    for method, way in rows:
        cells = []
        for metric in metrics:
            values = column(records, method, way, metric)
            values = values[np.isfinite(values)]
            cells.append(str(estimate(values)) if len(values) else "")
        if any(cells):
            lines.append(f"| {method} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def claims_table(
    records: Sequence[Mapping[str, Any]],
    claims: Mapping[str, Sequence[str]] = CLAIMS,
) -> str:
    """Marginalised against other ways, pair by pair; bold where it is better."""
    against = list(dict.fromkeys(other for own in claims.values() for other in own))
    lines = [
        f"| method | metric | {' | '.join(f'against {other}' for other in against)} |",
        "|---|---|" + "---|" * len(against),
    ]
    found: dict[tuple[str, str], dict[str, Comparison]] = {}
    for method in methods_in(records):
        for metric, others in claims.items():
            own = column(records, method, "marginalised", metric)
            theirs = {other: column(records, method, other, metric) for other in others}
            valid = np.isfinite(own)
            for values in theirs.values():
                valid &= np.isfinite(values)
            if valid.sum() < 2:
                continue
            found[method, metric] = {
                other: compare(
                    own[valid], values[valid], higher_is_better=metric in HIGHER
                )
                for other, values in theirs.items()
            }
    every = [one for row in found.values() for one in row.values()]
    corrected = iter(false_discovery_control([one.p for one in every]) if every else [])
    for (method, metric), row in found.items():
        cells = {
            other: claim(replace(one, p_corrected=float(next(corrected))))
            for other, one in row.items()
        }
        texts = [cells.get(other, "") for other in against]
        lines.append(f"| {method} | {metric} | {' | '.join(texts)} |")
    held = sum(one.is_better for one in every)
    lines += [
        "",
        f"Marginalised is better in {held} of {len(every)} comparisons. Each p is "
        f"corrected for all {len(every)} of the table (Benjamini and Hochberg).",
    ]
    return "\n".join(lines)


def claim(found: Comparison) -> str:
    """Difference, wins and losses, effect size and corrected p-value."""
    difference = f"**{found.difference}**" if found.is_better else f"{found.difference}"
    effect = f", d {found.effect:.2f}" if np.isfinite(found.effect) else ""
    return (
        f"{difference}; {found.wins}:{found.losses}{effect}, p {found.p_corrected:.0e}"
    )


def gains_table(records: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Mean relative gain of marginalised over direct, by method and metric."""
    lines = [
        f"| method | {' | '.join(metrics)} |",
        "|---|" + "---:|" * len(metrics),
    ]
    gains: dict[str, list[float]] = {metric: [] for metric in metrics}
    for method in methods_in(records):
        cells = []
        for metric in metrics:
            own = mean(column(records, method, "marginalised", metric))
            direct = mean(column(records, method, "direct", metric))
            gain = (own - direct) / abs(direct) if direct else np.nan
            gain *= 1.0 if metric in HIGHER else -1.0
            cells.append(f"{gain:+.0%}" if np.isfinite(gain) else "")
            if np.isfinite(gain):
                gains[metric].append(gain)
        if any(cells):  # another library's scores come one way only
            lines.append(f"| {method} | {' | '.join(cells)} |")
    means = [mean(np.array(values)) for values in gains.values()]
    cells = [f"**{gain:+.0%}**" if np.isfinite(gain) else "" for gain in means]
    lines.append(f"| mean of methods | {' | '.join(cells)} |")
    return "\n".join(lines)


def seconds_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Seconds for each example, by method."""
    lines = ["| what | median seconds for an example |", "|---|---:|"]
    names = dict.fromkeys(name for record in records for name in record["seconds"])
    for name in names:
        values = [r["seconds"][name] for r in records if name in r["seconds"]]
        lines.append(f"| {name} | {np.median(values):.3f} |")
    return "\n".join(lines)


def plot_curves(
    records: Sequence[Mapping[str, Any]], methods: Sequence[str], path: Path
) -> None:
    """Share of texts that still reach the statement as sources go, by way."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  # only where a plot is wanted

    figure, panels = plt.subplots(
        1, len(methods), figsize=(4.2 * len(methods), 3.4), sharey=True, squeeze=False
    )
    for panel, method in zip(panels[0], methods, strict=True):
        lines = {"truth": "truth|", **{way: f"{method}|{way}" for way in WAYS}}
        del lines["signed"]
        for label, name in lines.items():
            curves = [r["curves"][name] for r in records if name in r["curves"]]
            if curves:
                panel.plot(POINTS, np.mean(curves, axis=0), label=label, **LINES[label])
        panel.set_title(method)
        panel.set_xlabel("share of the sources taken away")
    panels[0][0].set_ylabel("still says so, written again")
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def provenance(options: argparse.Namespace) -> str:
    """Machine, versions, sizes and command."""
    command = " ".join(["python benchmarks/faithfulness.py", *options.given])
    problems = f"{options.problems} problems of each data set"
    if options.paper:
        problems = ", ".join(f"{count_of(options, n)} {n}" for n in options.datasets)
    return (
        f"Model {options.model}; {problems}, seed "
        f"{options.seed}; sources taken away by {options.removal!r}, curves over "
        f"{options.axis}, "
        + ("greedy" if options.samples is None else f"{options.samples} samples")
        + f". {torch.get_num_threads()} threads of {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Captum {captum.__version__}, SciPy "
        f"{scipy.__version__}. Command: `{command}`."
    )


def report(
    options: argparse.Namespace,
    records_file: Path,
    calibration: Mapping[str, Any],
    *,
    brief: bool = False,
) -> str:
    """All tables, as Markdown; in brief, only the main ones of other data sets."""
    records = read_records(records_file)
    untrusted = marks(calibration)
    parts = [provenance(options)]
    if calibration:
        parts += ["## Which metrics tell the truth", calibration_table(calibration)]
    for name in options.datasets:
        own = [record for (data, _), record in records.items() if data == name]
        if not own:
            continue
        metrics = [m for m in options.metrics if any_value(own, m)]
        if brief and name != options.datasets[0]:
            metrics = [m for m in metrics if m in CLAIMS]
        fixed = [m for m in metrics if m.startswith(("span", "response"))]
        told = [m for m in metrics if m not in fixed]
        left_out = count_of(options, name) - len(own)
        parts += [f"## {name}: {len(own)} examples", reached(own)]
        parts += [f"{left_out} examples could not be used."] if left_out else []
        if (options.out / f"{name}.png").exists():
            picture = f"../images/faithfulness_{name}.png"
            parts += [f"![Deletion curves of {name}]({picture})"]
        parts += ["### Known truth, and texts written again"]
        parts += [scores_table(own, told, untrusted)] if told else []
        parts += ["### The text held fixed"] if fixed else []
        parts += [scores_table(own, fixed, untrusted)] if fixed else []
        parts += [
            "### Marginalised against the other ways",
            claims_table(own, PAPER_CLAIMS if options.paper else CLAIMS),
            "### Mean relative gain over direct",
            gains_table(own, metrics),
        ]
        if not brief or name == options.datasets[0]:
            parts += [PAPER_AGGREGATES, "### Time", seconds_table(own)]
    return "\n\n".join(parts) + "\n"


def reached(records: Sequence[Mapping[str, Any]]) -> str:
    """How often the model comes to the statements at all."""
    whole, none = (
        mean(np.array([np.nan if r[key] is None else r[key] for r in records]))
        for key in ("reached", "reached_without")
    )
    return (
        "With all sources the model comes to the explained statement in "
        f"{whole:.1%} of its texts, without them in {none:.1%}."
    )


def calibration_table(calibration: Mapping[str, Any]) -> str:
    """Means of the truth and of what is known to be worse, by metric."""
    orders = list(next(iter(calibration["metrics"].values()))["means"])
    lines = [
        f"| metric | {' | '.join(orders)} | does the truth win? |",
        "|---|" + "---:|" * len(orders) + "---|",
    ]
    for metric, found in calibration["metrics"].items():
        cells = [
            "{:.3f} ({:.3f} to {:.3f})".format(*(round(x, 3) + 0.0 for x in means))
            for means in found["means"].values()
        ]
        lost = ", ".join(found["lost"])
        verdict = f"**no**: not against {lost} †" if lost else "yes"
        lines.append(f"| {metric} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def write_page(options: argparse.Namespace, text: str) -> None:
    """The page of the docs, its pictures, and the verdicts in the package."""
    page = ROOT / "docs" / "explanation" / "faithfulness.md"
    head = page.read_text(encoding="utf-8").split(GENERATED)[0]
    page.write_text(f"{head}{GENERATED}\n\n{text}", encoding="utf-8")
    for name in options.datasets:
        picture = options.out / f"{name}.png"
        if picture.exists():
            images = ROOT / "docs" / "images"
            images.mkdir(exist_ok=True)
            (images / f"faithfulness_{name}.png").write_bytes(picture.read_bytes())
    verdicts = ROOT / "captum_cage" / "metrics" / "calibration.json"
    known = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(options.out.glob("calibration_*.json"))
    ]
    verdicts.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def any_value(records: Sequence[Mapping[str, Any]], metric: str) -> bool:
    """Whether any record has the metric."""
    return any(
        metric in ways
        for record in records
        for method in record["scores"].values()
        for ways in method.values()
    )


# --- what a run costs -----------------------------------------------------------------


def cost_of_paper(most: int | None = None) -> str:
    """What the paper's tables take, roughly, before anything is loaded."""
    tokens, units, generated = 400, 25, 120
    lines = [
        "| model | data set | examples | passes for an example | 10^15 operations |",
        "|---|---|---:|---:|---:|",
    ]
    total = 0.0
    for model, size in zip(PAPER_MODELS, (3.2e9, 8.0e9, 4.0e9, 8.2e9), strict=True):
        for data, whole in PAPER_DATA.items():
            count = min(most or whole, whole)
            # Ablation, CLP and ReAGent: a pass per unit; the two gradient methods: 20
            # steps of forward and backward per generated sentence; the metrics: one
            # pass per unit and order, with 5 methods and 5 ways.
            passes = 3 * units + 2 * 20 * 3 * 5 + units * 25
            operations = 2 * size * (tokens + generated) * passes * count
            total += operations
            lines.append(
                f"| {model} | {data} | {count} | {passes} | {operations / 1e15:.0f} |"
            )
    hours = total / 2e14 / 3600
    lines.append("")
    lines.append(
        f"In all {total / 1e15:.0f} x 10^15 operations: about {hours:.0f} hours of a "
        "GPU that does 200 x 10^12 a second. Pass --most for a part of it."
    )
    return "\n".join(lines)


def run_paper(options: argparse.Namespace) -> None:
    """The paper's models, data sets, base methods and metrics."""
    print(cost_of_paper(options.most))
    print(PAPER_AGGREGATES)
    if options.estimate:
        return
    names = PAPER_MODELS if options.model == DEMO else (options.model,)
    runs = [
        argparse.Namespace(
            **{
                **vars(options),
                "model": name,
                "out": options.out / name.strip("/").replace("/", "--"),
            }
        )
        for name in names
    ]
    for own in runs:
        check_settings(own)
    wins: dict[str, list[int]] = {metric: [0, 0] for metric in PAPER_METRICS}
    gains = []
    for own in runs:
        records_file = own.out / "records.jsonl"
        run(load_bench(own), cases_of(own), records_file)
        text = report(own, records_file, {})
        (own.out / "tables.md").write_text(text, encoding="utf-8")
        print(text)
        records = list(read_records(records_file).values())
        for method in methods_in(records):
            for metric in PAPER_METRICS:
                mine = mean(column(records, method, "marginalised", metric))
                direct = mean(column(records, method, "direct", metric))
                if not np.isfinite(mine - direct):
                    continue
                better = mine > direct if metric in HIGHER else mine < direct
                wins[metric][0] += int(better)
                wins[metric][1] += 1
                if direct:
                    sign = 1.0 if metric in HIGHER else -1.0
                    gains.append(sign * (mine - direct) / abs(direct))
    print(PAPER_AGGREGATES)
    for metric, (won, tried) in wins.items():
        print(f"Here: {metric}, better in {won} of {tried}.")
    if gains:
        print(f"Here: mean relative gain over the base method {np.mean(gains):+.0%}.")


# --- the program ----------------------------------------------------------------------


def load_bench(options: argparse.Namespace) -> Bench:
    """The model, its tokenizer, and how it is asked."""
    if options.model == DEMO:
        model, tokenizer = load_demo()
        return Bench(model, tokenizer, False, options)
    reader: Any = transformers.AutoTokenizer.from_pretrained(options.model)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=options.dtype
    )
    loaded = loaded.to(options.device).eval()
    return Bench(loaded, reader, reader.chat_template is not None, options)


def calibrated(bench: Bench, removal: str) -> Mapping[str, Any]:
    """Whether metrics tell the truth: all that there are, measured once and kept."""
    options = bench.options
    path: Path = options.out / f"calibration_{removal}.json"
    if path.exists():
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["examples"] == options.problems:
            return found
    metrics = [
        name
        for name in metric_names()
        if ": " in name and (not options.smoke or name in options.metrics)
    ]
    # Other problems than those that are measured.
    examples = alternating(
        demo_examples(options.problems, options.seed + 1, "two_questions")
    )
    calibration = calibrate_metric(
        bench.cage(Case("ablation")),
        examples,
        metrics,
        removal=bench.removal(removal),
        axis=options.axis,
        show_progress=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(calibration.to_dict(), indent=1) + "\n")
    return calibration.to_dict()


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=DEMO, help="a name on the hub or a folder; default: demo")
    add(
        "--masked-lm",
        help="masked language model for ReAGent and --removal masked_lm; default: of "
        f"the demo model, one trained here; with --paper, {PAPER_MASKED_LM}",
    )
    add("--datasets", nargs="+", default=["one_question", "two_questions"])
    add("--methods", nargs="+", default=["all"], help="names in the catalogue, or all")
    add("--metrics", nargs="+", default=list(METRICS))
    add("--problems", type=int, default=200)
    add("--removal", default="delete", choices=REMOVALS)
    add("--axis", default="units", choices=["units", "tokens"])
    add("--samples", type=int, help="texts for each set of sources; default: greedy")
    add("--max-new-tokens", type=int, help="default: 256, with --paper 512")
    add("--seed", type=int, default=0)
    add("--calibrate", nargs="+", choices=REMOVALS, help="only test the metrics")
    add("--texts", type=Path, help="sentences of generators, one a line")
    add("--data", type=Path, help="folder of public data sets, instead of the hub")
    add("--out", type=Path, default=Path("runs/faithfulness"))
    add("--export", type=Path, help="write the examples for other libraries, and stop")
    add("--rivals", type=Path, nargs="+", default=[], help="scores of other libraries")
    add("--tables", action="store_true", help="only tables of what was measured")
    add("--docs", action="store_true", help="write the tables of the docs")
    add(
        "--paper",
        action="store_true",
        help="the paper's tables: its data sets, metrics and removal, whatever else is "
        "given; with --model, of that model alone",
    )
    add("--estimate", action="store_true", help="with --paper: only what it would cost")
    add("--most", type=int, help="with --paper: most examples of each data set")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto")
    add("--strict", action="store_true", help="stop at an example that cannot be used")
    add("--smoke", action="store_true", help="two problems, for CI")
    options = parser.parse_args(arguments)
    options.given = list(sys.argv[1:] if arguments is None else arguments)
    if options.smoke:
        options.problems, options.strict = 2, True
        options.out = Path(tempfile.mkdtemp(prefix="faithfulness_"))
        options.datasets = ["two_questions"]
        options.methods = ["attnlrp", "one-shot-reagent"]
    if options.paper:
        options.datasets, options.metrics = list(PAPER_DATA), list(PAPER_METRICS)
        options.methods, options.removal = list(PAPER_CASES), "baseline"
        options.masked_lm = options.masked_lm or PAPER_MASKED_LM
    if options.max_new_tokens is None:
        options.max_new_tokens = 512 if options.paper else 256
    options.texts = FACTS if options.texts is None else lines_of(options.texts)
    for name in options.methods:
        if name != "all" and name not in (known := [case.name for case in CASES]):
            parser.error(f"--methods: must be of all, {', '.join(known)}, not {name!r}")
    for name in options.metrics:
        if name not in metric_names():
            parser.error(f"--metrics: must be of {', '.join(metric_names())}")
    for name in options.datasets:
        if name not in DATASETS:
            parser.error(f"--datasets: must be of {', '.join(DATASETS)}, not {name!r}")
    refused = without_masked_lm(options)
    if refused:
        parser.error(
            f"--masked-lm: {', '.join(refused)} must have a masked language model, but "
            f"none came for {options.model}, and the one that is trained here knows "
            "nothing but the demo's problems. Pass one, for example "
            f"{PAPER_MASKED_LM}, or leave that out."
        )
    return options


def lines_of(path: Path) -> tuple[str, ...]:
    """The lines of a file that are not empty."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return tuple(line.strip() for line in lines if line.strip())


def without_masked_lm(options: argparse.Namespace) -> list[str]:
    """What was asked for and needs a masked language model that there is not."""
    if options.model == DEMO or options.masked_lm is not None or options.export:
        return []
    removals = options.calibrate or [options.removal]
    wanted = ["masked_lm as a way of removal"] if "masked_lm" in removals else []
    if options.calibrate:
        return wanted
    return wanted + [case.name for case in cases_of(options) if needs_masked_lm(case)]


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The base methods that were asked for."""
    return [c for c in CASES if "all" in options.methods or c.name in options.methods]


def main() -> None:
    """Measure, and print the tables."""
    options = parsed()
    if options.paper:
        run_paper(options)
        return
    bench = load_bench(options)
    if options.export is not None:
        export(bench, options.export)
        return
    check_settings(options)
    if options.calibrate:
        for removal in options.calibrate:
            print(calibration_table(calibrated(bench, removal)))
        return
    records_file = options.out / "records.jsonl"
    if not options.tables:
        run(bench, cases_of(options), records_file)
    calibration: Mapping[str, Any] = {}
    if options.model == DEMO:
        calibration = calibrated(bench, options.removal)
    records = read_records(records_file)
    for name in options.datasets:
        own = [record for (data, _), record in records.items() if data == name]
        shown = [m for m in methods_in(own) if m in map(str, CASES)][:3]
        if own and shown and any(record["curves"] for record in own):
            plot_curves(own, shown, options.out / f"{name}.png")
    text = report(options, records_file, calibration)
    (options.out / "tables.md").write_text(text, encoding="utf-8")
    if options.docs:
        write_page(options, report(options, records_file, calibration, brief=True))
    print(text)
    if options.smoke:
        print(cost_of_paper())


if __name__ == "__main__":
    main()
