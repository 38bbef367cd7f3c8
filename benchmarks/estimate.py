"""Estimates before the work, and what the work then took.

For each base method, size of unit and length of text: sequences, tokens, seconds and
bytes as ``cage.estimate`` tells them, and as ``cage.attribute`` then takes them, with
the ratio of the two and whether it lies within 1.5. Memory is the most that the process
holds during the call less what it held before, to which the estimate's share without
the model is compared; below some MiB it is the allocator's, and not judged.

    python benchmarks/estimate.py
    python benchmarks/estimate.py --methods ablation shapley-sampling --repeats 1 4 16
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from captum.attr import LLMAttribution
from rich.console import Console
from rich.table import Table

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.cost import count_sequences
from captum_cage.demo import load_demo, sample_problems
from captum_cage.methods.catalogue import capabilities, llm_attribution
from captum_cage.testing import tiny_causal_lm

WITHIN = 1.5
# Bytes below which a process's memory tells nothing of a call.
LEAST_BYTES = 32 * 2**20
METHODS = ("ablation", "shapley-sampling", "c-lime", "integrated-gradients", "attnlrp")
FEW = {"n_samples": 5, "n_steps": 8}


def held_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * 4096


class Peak:
    """The most memory that the process takes inside, above what it had."""

    def __enter__(self) -> Peak:
        gc.collect()
        self._before = self._most = held_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self._most = max(self._most, held_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        """Bytes above those before."""
        return self._most - self._before


def mark(ratio: float) -> str:
    """A ratio, and whether it is within the promise."""
    return f"{ratio:.2f}" + ("" if 1 / WITHIN <= ratio <= WITHIN else " !")


def measure(
    llm_attr: LLMAttribution,
    inp: TokenIdsInput,
    target: Sequence[int],
    options: dict[str, Any],
) -> tuple[list[str], list[float]]:
    """A line of the table, and the ratios of sequences, tokens and seconds."""
    cage = GraphContextAttribution(llm_attr)
    torch.manual_seed(0)
    told = cage.estimate(inp, target, **options)
    torch.manual_seed(0)
    with Peak() as peak, count_sequences(cage.llm_attr) as counted:
        start = time.perf_counter()
        cage.attribute(inp, target, **options)
        took = time.perf_counter() - start
    ratios = [
        told.sequences / max(1, counted.sequences or 0),
        told.tokens / max(1, counted.tokens or 0),
        told.seconds / took,
    ]
    memory = "small"
    if peak.bytes >= LEAST_BYTES:
        memory = mark((told.memory - told.model_memory) / peak.bytes)
    row = [
        f"{told.sequences}/{counted.sequences}",
        *(mark(ratio) for ratio in ratios[:2]),
        f"{told.seconds:.2f}/{took:.2f}",
        mark(ratios[2]),
        f"{(told.memory - told.model_memory) / 2**20:.0f}/{peak.bytes / 2**20:.0f}",
        memory,
        f"{told.calibration_seconds / took:.0%}",
    ]
    return row, ratios


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a count is not within the promise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--methods", nargs="+", help="base methods by name, or all")
    parser.add_argument("--repeats", nargs="+", type=int, help="lengths of the text")
    parser.add_argument("--strategy", default="auto")
    options = parser.parse_args(arguments)
    names = options.methods or (METHODS[:1] if options.smoke else METHODS)
    if names == ["all"]:
        names = [declared.name for _, declared in capabilities()]
    repeats = options.repeats or ([1] if options.smoke else [1, 4])
    print(
        f"{platform.platform()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, captum "
        f"{metadata.version('captum')}"
    )
    demo, tokenizer = load_demo()
    models: dict[str, Any] = {"demo": demo}
    if not options.smoke:
        models["random"] = tiny_causal_lm(
            "llama",
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
        )
    problem = sample_problems(1, seed=0)[0]
    prompt = tokenizer(problem.prompt).input_ids
    written = tokenizer(problem.completion, add_special_tokens=False).input_ids
    table = Table(box=None, pad_edge=False)
    for title in (
        *("model", "method", "units", "tokens", "sequences", "ratio", "of tokens"),
        *("seconds", "ratio", "MiB", "ratio", "calibration"),
    ):
        table.add_column(title)
    counts: list[float] = []
    times: list[float] = []
    for model_name, model in models.items():
        longest = getattr(model.config, "max_position_embeddings", 10**9)
        for name in names:
            (declared,) = (one for _, one in capabilities() if one.name == name)
            llm_attr = llm_attribution(name, model, tokenizer)
            kwargs: dict[str, Any] = {}
            if declared.counted is not None:
                kwargs[declared.counted] = FEW[declared.counted]
            for units in ("sentence", "token"):
                for repeat in repeats:
                    ids, target = prompt * repeat, written * repeat
                    if len(ids) + len(target) > longest:
                        continue
                    row, ratios = measure(
                        llm_attr,
                        TokenIdsInput(ids, tokenizer),
                        target,
                        {"units": units, "strategy": options.strategy, **kwargs},
                    )
                    table.add_row(
                        model_name, name, units, str(len(ids) + len(target)), *row
                    )
                    counts += ratios[:2]
                    times.append(ratios[2])
    Console(width=140).print(table)
    good = sum(1 / WITHIN <= ratio <= WITHIN for ratio in counts)
    fine = sum(1 / WITHIN <= ratio <= WITHIN for ratio in times)
    print(
        f"within {WITHIN}: {good} of {len(counts)} counts of sequences and tokens, "
        f"{fine} of {len(times)} times (estimate/actual; ! is not)"
    )
    return 0 if good == len(counts) else 1


if __name__ == "__main__":
    sys.exit(main())
