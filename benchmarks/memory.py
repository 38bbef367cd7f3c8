"""Highest memory of the engines and of a long, sparse graph.

    python benchmarks/memory.py             # all cases; P=512, G=512 takes minutes
    python benchmarks/memory.py --smoke     # tiny sizes, a few seconds
    python benchmarks/memory.py --only ablation sentences

Each case runs in a process of its own, so that no case finds the memory of another;
with --smoke only the last one does.
The model is a Llama with random weights on the CPU. What the columns say:

peak        Highest memory of the whole process, Python, PyTorch and weights included.
above       The peak above the memory just before the call; a small call went before.
between     Memory when a pass through the model begins, above that before the call, at
            most: the graph that the pass goes on from, and nothing of earlier ones.
left        Memory after the call, and after a second one, above that before the first.
            Freed memory is given back to the system first, where it can be.
logits      What the logits of the whole sequence would take.

The gradient engines are measured with a small and with a large vocabulary and growing
G. A peak that grew with the vocabulary times the sequence would grow by the width of
the vocabulary more for each token: "held" is the share of that growth that is seen.

The exit code is 1 if a limit is missed: bytes everywhere, seconds only with the
default sizes of the two cases that have such a limit.
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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
)
from transformers import LlamaConfig, LlamaForCausalLM

from captum_cage import (
    AttributionGraph,
    GraphContextAttribution,
    TokenIdsInput,
    __version__,
)
from captum_cage.demo import load_demo

MIB = 2**20
# Bytes that the process may take in a case, and its seconds, on 2 cores.
ABLATION_LIMIT = (3 * 2**30, 600.0)
SENTENCES_LIMIT = (3 * 2**30, 300.0)
# Share of the vocabulary's width that a peak may grow by, for each token.
HELD_LIMIT = 0.25
# Share of a dense array of all units by all units.
GRAPH_LIMIT = 0.5
# Memory that may be left by a second call, beyond what the first one left.
LEFT_LIMIT = 16 * MIB
_STATUS = Path("/proc/self/status")


# --- in the process of one case ----------------------------------------------------


def random_llama(spec: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama with random weights, ready to use."""
    heads = max(1, spec["width"] // 32)
    config = LlamaConfig(
        vocab_size=spec["vocab"],
        hidden_size=spec["width"],
        intermediate_size=spec["width"] * 11 // 4,
        num_hidden_layers=spec["layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(spec["seed"])
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.eval()
    return model


def in_parts(count: int) -> Callable[[str], list[tuple[int, int]]]:
    """A function that cuts a text into stretches of as many words, nearly."""

    def cut(text: str) -> list[tuple[int, int]]:
        words = [match.span() for match in re.finditer(r"\S+", text)]
        parts = np.array_split(np.arange(len(words)), min(count, len(words)))
        return [(words[part[0]][0], words[part[-1]][1]) for part in parts]

    return cut


def memory(key: str) -> int:
    """Resident memory now (``VmRSS``) or at most (``VmHWM``), in bytes."""
    if _STATUS.exists():
        status = _STATUS.read_text()
        found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest * (1 if sys.platform == "darwin" else 1024)


def settled() -> int:
    """Resident memory when all that is free was given back, in bytes."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return memory("VmRSS")


def attribute_case(spec: dict[str, Any]) -> dict[str, float]:
    """Measure one call of ``attribute``, and what a second one leaves."""
    model = random_llama(spec)
    _, tokenizer = load_demo()
    prompt, generated = spec["prompt"], spec["generated"]
    vocab = min(spec["vocab"], len(tokenizer))
    random = torch.Generator().manual_seed(spec["seed"])
    ids = torch.randint(8, vocab, (prompt + generated,), generator=random).tolist()
    method, layer = spec["method"], model.get_input_embeddings()
    llm_attr: Any
    if method == "ablation":
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    elif method == "integrated":
        llm_attr = LLMGradientAttribution(
            LayerIntegratedGradients(model, layer), tokenizer
        )
    else:
        llm_attr = LLMGradientAttribution(
            LayerGradientXActivation(model, layer), tokenizer
        )
    kwargs = {"n_steps": spec["steps"]} if method == "integrated" else {}
    sentences = spec["sentences"]
    units: Any = in_parts(sentences) if sentences else "token"

    def attribute(first: int = 0, last: int = prompt + generated) -> None:
        GraphContextAttribution(llm_attr).attribute(
            TokenIdsInput(ids[first:prompt], tokenizer),
            ids[prompt:last],
            units=units,
            strategy="fused",
            **kwargs,
        )

    # What is loaded or set up once is not what a call takes.
    attribute(prompt - 4, prompt + 4)
    before = settled()
    start = time.perf_counter()
    attribute()
    took = time.perf_counter() - start
    peak = memory("VmHWM")
    left = settled()
    found = {
        "seconds": took,
        "peak": peak,
        "above": peak - before,
        "left": left - before,
        "logits": 4 * spec["vocab"] * (prompt + generated),
    }
    if spec["again"]:
        forward = model.forward
        between = 0

        def sampled(*args: Any, **inputs: Any) -> Any:
            nonlocal between
            between = max(between, settled() - left)
            return forward(*args, **inputs)

        sampled.__wrapped__ = forward  # type: ignore[attr-defined]  # its signature
        model.forward = sampled
        attribute()
        del model.forward
        found["between"] = between
        found["again"] = settled() - before
    return found


def graph_case(spec: dict[str, Any]) -> dict[str, float]:
    """Measure a graph of rows that come one by one, and one question to it."""
    units, generated = spec["units"], spec["generated"]
    sources = units - generated
    random = np.random.default_rng(spec["seed"])

    def rows() -> Iterator[npt.NDArray[np.float64]]:
        for step in range(generated):
            row = np.zeros(units)
            # A few entries have most of the mass, as in rows of real texts.
            row[: sources + step] = random.pareto(0.6, sources + step)
            yield row

    before = settled()
    start = time.perf_counter()
    graph = AttributionGraph.from_rows(rows(), sources, sparsify=spec["sparsify"])
    took = time.perf_counter() - start
    weights = np.zeros(generated)
    weights[-1] = 1.0
    start = time.perf_counter()
    answer = graph.explain(weights)
    solved = time.perf_counter() - start
    peak = memory("VmHWM")
    return {
        "seconds": took,
        "solve": solved,
        "peak": peak,
        "above": peak - before,
        "left": settled() - before,
        "dense": 8 * units**2,
        "entries": int(graph.rows.nnz),
        "mass": float(answer.sum()),
    }


def run_case(spec: dict[str, Any]) -> dict[str, float]:
    """What one case took."""
    torch.set_num_threads(spec["threads"])
    measure = graph_case if spec["method"] == "graph" else attribute_case
    return measure(spec)


# --- in the process that was started -----------------------------------------------


def measured(spec: dict[str, Any]) -> dict[str, float]:
    """Run a case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the case {spec} ended with code {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
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
    return f"{size / MIB:.1f}" if abs(size) < 100 * MIB else f"{size / MIB:.0f}"


Results = list[tuple[dict[str, Any], dict[str, float]]]


def print_attributions(results: Results) -> None:
    """What each call of ``attribute`` took."""
    body = []
    for spec, found in results:
        units = f"{spec['sentences']} a side" if spec["sentences"] else "tokens"
        body.append(
            [
                spec["method"],
                units,
                str(spec["prompt"]),
                str(spec["generated"]),
                str(spec["vocab"]),
                f"{found['seconds']:.2f}",
                mib(found["peak"]),
                mib(found["above"]),
                mib(found["logits"]),
                mib(found["between"]) if "between" in found else "-",
                mib(found["left"]),
                mib(found["again"]) if "again" in found else "-",
            ]
        )
    print("Calls of attribute; sizes in MiB")
    print_table(
        [
            "method",
            "units",
            "P",
            "G",
            "vocabulary",
            "seconds",
            "peak",
            "above",
            "logits",
            "between",
            "left",
            "after 2nd",
        ],
        body,
    )


def held_share(results: Results, method: str) -> float:
    """Growth of the peak per token and entry of the vocabulary, in float32 numbers.

    Between the two longest texts.

    1 if the logits of the whole sequence were held once, 0 if the vocabulary does not
    matter for the growth.
    """
    slopes, vocabs = [], []
    for vocab in sorted({spec["vocab"] for spec, _ in results}):
        pairs = [
            (spec["generated"], found["above"])
            for spec, found in results
            if spec["method"] == method and spec["vocab"] == vocab
        ]
        # Below that, a piece of the sequence is all of it.
        (size, peak), (larger, higher) = sorted(pairs)[-2:]
        slopes.append((higher - peak) / (larger - size))
        vocabs.append(vocab)
    return float((slopes[-1] - slopes[0]) / (4 * (vocabs[-1] - vocabs[0])))


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the sizes of ``--smoke`` where nothing else is said."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["ablation", "sentences", "gradient", "graph"],
        default=["ablation", "sentences", "gradient", "graph"],
    )

    def whole(name: str, text: str, **kwargs: Any) -> None:
        parser.add_argument(name, type=int, help=text, **kwargs)

    whole("--size", "P = G of ablation by tokens (512)")
    whole("--sentence-size", "P = G of ablation by sentences (2000)")
    whole("--sentences", "per side (40)")
    whole("--gradient-prompt", "P of the gradient engines (64)")
    whole("--gradient-generated", "G of the gradient engines (64 256 1024)", nargs="+")
    whole("--vocabs", "a small and a large one (1000 32000)", nargs=2)
    whole("--graph-units", "units of the long graph, a tenth sources (20000)")
    whole("--layers", "of the model (4)")
    whole("--width", "of the model, a multiple of 32 (256)")
    whole("--vocab", "size of the vocabulary (1000)", default=1000)
    whole("--steps", "of integrated gradients (20)")
    whole("--threads", "of PyTorch (its own choice)")
    whole("--seed", "", default=0)
    parser.add_argument(
        "--sparsify", type=float, default=0.9, help="mass kept of a row (0.9)"
    )
    options = parser.parse_args(arguments)
    usual: dict[str, tuple[Any, Any]] = {
        "size": (512, 24),
        "sentence_size": (2000, 40),
        "sentences": (40, 4),
        "gradient_prompt": (64, 8),
        "gradient_generated": ([64, 256, 1024], [8, 16]),
        "vocabs": ([1000, 32000], [200, 400]),
        "graph_units": (20000, 500),
        "layers": (4, 2),
        "width": (256, 32),
        "steps": (20, 4),
        "threads": (torch.get_num_threads(),) * 2,
    }
    for name, values in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.smoke])
    return options


def specifications(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases of ``attribute``, as their processes are given them."""
    common = {
        key: getattr(options, key)
        for key in ("layers", "width", "vocab", "steps", "threads", "seed")
    }
    found: list[dict[str, Any]] = []

    def add(name: str, method: str, prompt: int, generated: int, **kw: Any) -> None:
        found.append(
            {
                **common,
                "name": name,
                "method": method,
                "prompt": prompt,
                "generated": generated,
                "sentences": 0,
                "again": False,
                **kw,
            }
        )

    if "ablation" in options.only:
        size = options.size
        add("ablation", "ablation", size, size)
        # Many chunks, and quick enough to be run twice.
        add("again", "ablation", size // 4, size // 4, again=True)
    if "sentences" in options.only:
        size = options.sentence_size
        add("sentences", "ablation", size, size, sentences=options.sentences)
    if "gradient" in options.only:
        for method in ("activation", "integrated"):
            for vocab in options.vocabs:
                for generated in options.gradient_generated:
                    add(
                        "gradient",
                        method,
                        options.gradient_prompt,
                        generated,
                        vocab=vocab,
                        sentences=4,
                        again=True,
                    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; the exit code says whether all limits are kept."""
    options = options_of(arguments)
    if options.case is not None:
        print(json.dumps(run_case(json.loads(options.case))))
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"python benchmarks/memory.py {shlex.join(given)}".rstrip())
    print(
        f"{os.cpu_count()} cores, {options.threads} threads{load}, "
        f"{platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, NumPy "
        f"{np.__version__}, captum-cage {__version__}"
    )
    print(
        f"Llama with random weights: {options.layers} layers, width {options.width}, "
        f"float32; {options.steps} steps of integrated gradients\n"
    )
    # A smoke run starts a process for the last case only.
    measure = run_case if options.smoke else measured
    results = [(spec, measure(spec)) for spec in specifications(options)]
    checks: list[tuple[str, bool | None]] = []
    if results:
        print_attributions(results)
    for spec, found in results:
        for name, size, limit in (
            ("ablation", options.size == 512, ABLATION_LIMIT),
            ("sentences", options.sentence_size == 2000, SENTENCES_LIMIT),
        ):
            if spec["name"] != name:
                continue
            what = f"{name}, P=G={spec['prompt']}"
            kept: bool | None = found["peak"] <= limit[0]
            text = f"{mib(found['peak'])} MiB of at most {mib(limit[0])}"
            checks.append((f"{what}: {text}", kept))
            if size:
                text = f"{found['seconds']:.0f} s of at most {limit[1]:.0f}"
                checks.append((f"{what}: {text}", found["seconds"] <= limit[1]))
    again = [found for _, found in results if "again" in found]
    if again:
        most = max(found["again"] - found["left"] for found in again)
        text = f"second calls left at most {mib(most)} MiB more than the first"
        checks.append((text, most <= LEFT_LIMIT))
        most = max(found["between"] for found in again)
        checks.append((f"between passes at most {mib(most)} MiB were kept", None))
    gradient = [pair for pair in results if pair[0]["name"] == "gradient"]
    if gradient:
        small, large = options.vocabs
        for method in ("activation", "integrated"):
            held = held_share(gradient, method)
            text = f"{method}: held {held:.3f} of the logits of each further token"
            # Tiny sizes drown in what the allocator does.
            kept = None if options.smoke else held <= HELD_LIMIT
            checks.append((f"{text} (vocabulary {small} to {large})", kept))
    if "graph" in options.only:
        units = options.graph_units
        found = measured(
            {
                "method": "graph",
                "units": units,
                "generated": units - units // 10,
                "sparsify": options.sparsify,
                "seed": options.seed,
                "threads": options.threads,
            }
        )
        print(f"Graph of {units} units, {options.sparsify:g} of each row's mass kept")
        print_table(
            [
                "units",
                "entries",
                "seconds",
                "one question",
                "peak",
                "above",
                "left",
                "dense array",
            ],
            [
                [
                    str(units),
                    f"{found['entries']:.0f}",
                    f"{found['seconds']:.1f}",
                    f"{found['solve']:.3f}",
                    mib(found["peak"]),
                    mib(found["above"]),
                    mib(found["left"]),
                    mib(found["dense"]),
                ]
            ],
        )
        share = found["above"] / found["dense"]
        text = f"graph: {share:.3f} of a dense array"
        checks.append((text, None if options.smoke else share <= GRAPH_LIMIT))
    for text, good in checks:
        sign = "    " if good is None else "pass" if good else "FAIL"
        print(f"{sign}  {text}")
    return 1 if any(good is False for _, good in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
