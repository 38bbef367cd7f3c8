"""Long generations: how time and memory grow, what a lever saves, what is to come.

    python benchmarks/long.py               # 20,000 tokens by sentences, 5,000 by token
    python benchmarks/long.py --smoke       # tiny sizes, a few seconds
    python benchmarks/long.py --only levers
    python benchmarks/long.py --plan        # computed, not measured: a large model
    python benchmarks/long.py --plan --flops 4e14 --parameters 70e9 --layers 80

Each case runs in a process of its own. The model is a Llama with random weights (two
layers, one head, width 32) on the CPU; the text is sums in words, in sentences of some
40 tokens. What the tables say:

growth      Seconds and memory of one call of ``attribute``, and the exponent: the slope
            of a line through the logarithms of the sizes and of what was measured.
            Memory is the peak above what the process took before the call.
levers      The same text of 5,000 tokens with ``tolerance``, ``hops`` and ``sparsify``.
            "unresolved" is the certificate, "missing" what the scores really lack of
            the complete ones; the exit code is 1 if the certificate is exceeded.
spool       Rows kept in a folder: a call that finds them all there, and a question to
            them read one after another, beside the same question to the graph in
            memory; the exit code is 1 if the answers differ by more than 1e-12.

"cache" in the plan: keys and values, and the table of shares that IFR fills. What a
backward pass keeps is not in it; engines cut it to what is free.

The plan counts the tokens that each method gives the model, multiplies them with the
operations that a token takes (two for each parameter, and the attention), and divides
by a rate that you may set. Its part for the graph is measured here, at one size, and
scaled by the entries. It is arithmetic about a machine that was not there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LLMAttribution,
    LLMGradientAttribution,
)
from scipy.sparse import csr_array

from captum_cage import (
    AttributionGraph,
    GraphAttributionResult,
    GraphContextAttribution,
    TokenIdsInput,
    __version__,
)
from captum_cage.demo import load_demo, sample_problems
from captum_cage.methods import IFR
from captum_cage.spool import RowSpool
from captum_cage.testing import tiny_causal_lm

MIB = 2**20
_STATUS = Path("/proc/self/status")
# Method, units, what the call is given, sizes, sizes with --smoke.
GROWTH: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...]], ...] = (
    ("ifr", "sentence", (2500, 5000, 10000, 20000), (60, 120)),
    ("ablation", "sentence", (1250, 2500, 5000), ()),
    ("ifr", "token", (1250, 2500, 5000), ()),
    ("activation", "token", (1250, 2500, 5000), (30, 60)),
)
# The first of each method is what the others are held to.
LEVERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("activation", "all rows", {}),
    ("activation", "tolerance=0.3", {"tolerance": 0.3}),
    ("ifr", "all rows", {}),
    ("ifr", "hops=2", {"hops": 2}),
    ("ifr", "hops=10", {"hops": 10}),
    ("ifr", "sparsify=0.99", {"sparsify": 0.99}),
    ("ifr", "sparsify=0.9", {"sparsify": 0.9}),
)


# --- what is explained ---------------------------------------------------------------


@lru_cache
def long_text(tokenizer: Any, count: int) -> tuple[int, ...]:
    """Ids of sums in words; three of four full stops are commas."""
    ids: list[int] = []
    number = 0
    seed = 0
    while len(ids) < count:
        for problem in sample_problems(64, seed=seed):
            text = problem.completion.rstrip().rstrip(".")
            number += 1
            text += "." if number % 4 == 0 else ","
            ids += tokenizer.encode(text.replace(". ", ", "), add_special_tokens=False)
            if len(ids) >= count:
                break
        seed += 1
    return tuple(ids[:count])


@lru_cache
def cage_of(method: str) -> tuple[GraphContextAttribution, Any]:
    """The wrapper of a method and a small random model, and the tokenizer."""
    _, tokenizer = load_demo()
    model = tiny_causal_lm(
        "llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=32768,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    llm_attr: Any
    if method == "ablation":
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    elif method == "activation":
        layer = model.get_input_embeddings()
        llm_attr = LLMGradientAttribution(
            LayerGradientXActivation(model, layer), tokenizer
        )
    else:
        llm_attr = LLMGradientAttribution(IFR(model), tokenizer)
    return GraphContextAttribution(llm_attr), tokenizer


def explained(spec: dict[str, Any], **options: Any) -> GraphAttributionResult:
    """One call of ``attribute``."""
    cage, tokenizer = cage_of(spec["method"])
    prompt = tokenizer.encode(sample_problems(1, seed=9)[0].prompt)
    ids = long_text(tokenizer, spec["generated"])
    return cage.attribute(
        TokenIdsInput(prompt, tokenizer),
        list(ids),
        units=spec["units"],
        explain=-1,
        strategy="fused",
        **spec["options"],
        **options,
    )


# --- in the process of one case ------------------------------------------------------


def memory(key: str) -> int:
    """Resident memory now (``VmRSS``) or at most (``VmHWM``), in bytes."""
    if _STATUS.exists():
        found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest * (1 if sys.platform == "darwin" else 1024)


def settled() -> int:
    """Resident memory when all that is free was given back, in bytes."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return memory("VmRSS")


def attribute_case(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds, memory and certificate of one call."""
    if not spec["smoke"]:  # what is loaded and set up once
        explained({**spec, "generated": 40, "options": {}})
    before, start = settled(), time.perf_counter()
    result = explained(spec)
    attr, unresolved = result.seq_attr.tolist(), result.unresolved
    took = time.perf_counter() - start
    return {
        "seconds": took,
        "above": max(0, memory("VmHWM") - before),
        "units": result.graph.n_generated,
        "rows": result.rows_computed,
        "entries": int(result.graph.matrix.nnz),
        "unresolved": unresolved,
        "attr": attr,
    }


def spool_case(spec: dict[str, Any]) -> dict[str, Any]:
    """Rows kept in a folder, found there, and read one after another."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = explained(spec, spool=folder)
        first = time.perf_counter() - start
        start = time.perf_counter()
        again = explained(spec, spool=folder)
        resumed = time.perf_counter() - start
        weights = result.weights
        start = time.perf_counter()
        attr = result.graph.without_behind().explain(weights)
        solved = time.perf_counter() - start
        size = (Path(folder) / "rows.bin").stat().st_size
        in_graph = result.graph.matrix.data.nbytes + result.graph.matrix.indices.nbytes
        same = bool((result.seq_attr == again.seq_attr).all())
        del again
        before = settled()
        start = time.perf_counter()
        answer = RowSpool.read(folder).streamed().answer(weights)
        streamed = time.perf_counter() - start
        # Pages of the map that were read count, too, as long as memory is free.
        above = max(0, memory("VmRSS") - before)
    return {
        "first": first,
        "resumed": resumed,
        "solved": solved,
        "streamed": streamed,
        "file": size,
        "graph": in_graph,
        "above": above,
        "difference": float(np.abs(answer.attr - attr).max()),
        "same": same,
    }


def run_case(spec: dict[str, Any]) -> dict[str, Any]:
    """What one case took."""
    torch.set_num_threads(spec["threads"])
    return (spool_case if spec["case"] == "spool" else attribute_case)(spec)


# --- in the process that was started -------------------------------------------------


def measured(spec: dict[str, Any]) -> dict[str, Any]:
    """Run a case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the case {spec} ended with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Aligned columns; the first one to the left."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *body):
        cells = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells))
    print(flush=True)


def mib(size: float) -> str:
    """A size in MiB."""
    return f"{size / MIB:,.1f}" if abs(size) < 100 * MIB else f"{size / MIB:,.0f}"


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Slope of a line through the logarithms."""
    pairs = [(s, v) for s, v in zip(sizes, values, strict=True) if v > 0]
    if len(pairs) < 2:
        return float("nan")
    x, y = np.log(np.array(pairs, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def of_all(options: argparse.Namespace) -> dict[str, Any]:
    """What the processes of all cases are told."""
    return {"threads": options.threads, "smoke": options.smoke}


Measure = Callable[[dict[str, Any]], dict[str, Any]]


def growth(options: argparse.Namespace, measure: Measure) -> None:
    """How time and memory of a call grow with the text."""
    for method, units, sizes, tiny in GROWTH:
        chosen = tiny if options.smoke else sizes
        chosen = tuple(size for size in chosen if size <= options.most)
        if not chosen:
            continue
        rows, found = [], []
        for size in chosen:
            spec: dict[str, Any] = {"case": "attribute", "method": method}
            spec |= {
                "units": units,
                "generated": size,
                "options": {},
                **of_all(options),
            }
            found.append(one := measure(spec))
            rows.append(
                [
                    f"{size:,}",
                    f"{one['units']:,}",
                    f"{one['seconds']:.2f}",
                    mib(one["above"]),
                    f"{one['entries']:,}",
                ]
            )
        print(f"{method}, {units} units")
        print_table(["tokens", "G", "seconds", "MiB above", "entries"], rows)
        time_slope = exponent(chosen, [one["seconds"] for one in found])
        space_slope = exponent(chosen, [one["above"] for one in found])
        print(
            f"growth with the tokens: time ^{time_slope:.2f}, memory "
            f"^{space_slope:.2f}\n",
            flush=True,
        )


def levers(options: argparse.Namespace, measure: Measure) -> bool:
    """What each lever saves, and what it leaves open; whether certificates hold."""
    size = min(options.levers, options.most)
    common: dict[str, Any] = {"case": "attribute", "units": "token", "generated": size}
    common |= of_all(options)
    rows, good = [], True
    full: dict[str, npt.NDArray[np.float64]] = {}
    for method, name, given in LEVERS[: 2 if options.smoke else None]:
        one = measure({**common, "method": method, "options": given})
        attr = np.array(one["attr"])
        missing = full.setdefault(method, attr) - attr
        good &= bool(missing.min() > -1e-6)
        good &= bool(missing.sum() <= one["unresolved"] + 1e-6)
        rows.append(
            [
                f"{method}, {name}",
                f"{one['seconds']:.1f}",
                mib(one["above"]),
                f"{one['rows']:,}",
                f"{one['entries']:,}",
                f"{one['unresolved']:.3f}",
                f"{missing.sum():.3f}",
            ]
        )
    print(f"levers, {size:,} tokens; the last one is explained")
    head = ["", "seconds", "MiB above", "rows", "entries", "unresolved", "missing"]
    print_table(head, rows)
    return good


def spooled(options: argparse.Namespace, measure: Measure) -> bool:
    """What a spool takes; whether answers from it are the same."""
    size = min(options.levers, options.most)
    rows, good = [], True
    for given in ({}, {"sparsify": 0.9})[: 1 if options.smoke else None]:
        spec: dict[str, Any] = {"case": "spool", "method": "ifr", "units": "token"}
        spec |= {"generated": size, "options": given, **of_all(options)}
        one = measure(spec)
        good &= one["same"] and one["difference"] <= 1e-12
        rows.append(
            [
                "sparsify=0.9" if given else "all entries",
                f"{one['first']:.2f}",
                f"{one['resumed']:.2f}",
                mib(one["file"]),
                mib(one["graph"]),
                f"{one['solved']:.2f}",
                f"{one['streamed']:.2f}",
                f"{one['difference']:.0e}",
            ]
        )
    print(f"spool, {size:,} tokens, IFR")
    head = ["", "call, s", "resumed, s", "file, MiB", "matrix, MiB"]
    head += ["question, s", "streamed, s", "difference"]
    print_table(head, rows)
    return good


# --- the plan ------------------------------------------------------------------------


def graph_rates(smoke: bool) -> tuple[float, float, float]:
    """Seconds per entry to build a graph and to ask it, and its bytes at most, here."""
    half = 200 if smoke else 1500
    random = np.random.default_rng(0)
    rows = csr_array(np.tril(random.random((half, 2 * half)), half - 1))
    weights = np.eye(half)[-1]

    def asked() -> tuple[float, float]:
        start = time.perf_counter()
        graph = AttributionGraph.from_rows(rows, half)
        graph.blocks()
        built = time.perf_counter()
        graph.explain(weights)
        return built - start, time.perf_counter() - built

    build, ask = asked()
    tracemalloc.start()
    asked()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return build / rows.nnz, ask / rows.nnz, peak / rows.nnz


def plan(options: argparse.Namespace) -> None:
    """What 1k, 10k and 100k generated tokens cost a large model: arithmetic."""
    build, ask, each = graph_rates(options.smoke)
    rate = options.flops
    print(
        f"COMPUTED, not measured: {options.parameters / 1e9:g}e9 parameters, "
        f"{options.layers} layers of width {options.width}, a prompt of "
        f"{options.prompt:,} tokens, sentences of {options.sentence} tokens, "
        f"{rate:.3g} operations per second."
    )
    print(
        f"Graph: measured here, {build * 1e9:.0f} ns per entry to build, "
        f"{ask * 1e9:.0f} ns to ask, {each:.0f} bytes at most. Cache: 2 bytes a "
        f"number, width {options.cache}. Weights: {2 * options.parameters / 2**30:.1f} "
        "GiB.\n"
    )
    rows = []
    for tokens in (1_000, 10_000, 100_000):
        for name, size, sequences, cost, table in planned(options, tokens):
            p, g = options.prompt / size, tokens / size
            entries = g * (p + g / 2)
            cache = 4 * options.layers * options.cache * (options.prompt + tokens)
            rows.append(
                [
                    name,
                    f"{tokens:,}",
                    f"{sequences:,.0f}",
                    spelt(cost / rate),
                    f"{(cache + table) / 2**30:.2g}",
                    spelt(entries * build),
                    spelt(entries * ask),
                    f"{entries * each / 2**30:.2g}",
                ]
            )
    head = ["method, units", "tokens", "passes", "model", "cache, GiB", "graph"]
    head += ["question", "graph, GiB"]
    if options.markdown:
        for row in (head, ["---"] * len(head), *rows):
            print(f"| {' | '.join(row)} |")
        return
    print_table(head, rows)


def planned(
    options: argparse.Namespace, tokens: int
) -> list[tuple[str, int, float, float, float]]:
    """Name, tokens of a unit, passes, operations and bytes of each method."""
    p, total = options.prompt, options.prompt + tokens

    def forward(start: Any, stop: Any) -> Any:
        """Operations of the tokens from one place to another, all before them read."""
        seen = (stop**2 - start**2) / 2
        return (
            2 * options.parameters * (stop - start)
            + 4 * options.layers * options.width * seen
        )

    found = []
    for name, size in (("token", 1), ("sentence", options.sentence)):
        # A text without a unit is read from that unit on: the keys and values of what
        # stands before it are those of the whole text.
        begins = np.arange(0, total - 1, size, dtype=np.float64)
        cost = float(forward(begins, float(total)).sum())
        found.append((f"ablation, {name}", size, float(len(begins)), cost, 0.0))
    for name, size in (("token", 1), ("sentence", options.sentence)):
        # A backward pass to the inputs takes about what a forward pass takes.
        ends = np.arange(p + size, total + 1, size, dtype=np.float64)
        cost = float(forward(0.0, ends).sum() + forward(0, total))
        found.append((f"grad x act, {name}", size, float(len(ends)), cost, 0.0))
    # One pass, and beside it in each layer and head a product over the width for each
    # pair of positions.
    pairs = options.layers * options.heads * 2 * options.width * total**2 / 2
    for name, size in (("token", 1), ("sentence", options.sentence)):
        cost, table = float(forward(0, total)) + pairs, 4.0 * tokens * total
        found.append((f"IFR, {name}", size, 1.0, cost, table))
    return found


def spelt(seconds: float) -> str:
    """A time in the unit that people would use."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds * 1000:,.1f} ms"


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="arithmetic only")
    parser.add_argument("--markdown", action="store_true", help="the plan, for docs")
    parts = ["growth", "levers", "spool"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--most", type=int, default=10**9, help="tokens, at most")
    parser.add_argument("--levers", type=int, help="tokens there (5000)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--flops",
        type=float,
        default=0.4 * 989e12,
        help="operations per second (0.4 of the 989e12 of an H100 in bfloat16)",
    )
    for name, value in (
        ("parameters", 8.0e9),
        ("layers", 32),
        ("width", 4096),
        ("heads", 32),
        ("cache", 1024),
        ("prompt", 1000),
        ("sentence", 25),
    ):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    if options.levers is None:
        options.levers = 60 if options.smoke else 5000
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; the exit code says whether what must hold holds."""
    options = options_of(arguments)
    if options.case is not None:
        print(json.dumps(run_case(json.loads(options.case))))
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"python benchmarks/long.py {shlex.join(given)}".rstrip())
    print(
        f"{os.cpu_count()} cores, {options.threads} threads{load}, "
        f"{platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, NumPy "
        f"{np.__version__}, captum-cage {__version__}\n"
    )
    if options.plan or options.smoke:
        plan(options)
    if options.plan:
        return 0
    measure: Measure = run_case if options.smoke else measured
    checks = []
    if "growth" in options.only:
        growth(options, measure)
    if "levers" in options.only:
        checks.append(("no certificate is exceeded", levers(options, measure)))
    if "spool" in options.only:
        checks.append(("a spool gives the same", spooled(options, measure)))
    for text, good in checks:
        print(f"{'pass' if good else 'FAIL'}  {text}")
    return 0 if all(good for _, good in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
