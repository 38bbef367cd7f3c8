"""What stays behind after 1,000 explanations: memory, hooks, caches, figures, files.

    python benchmarks/leaks.py             # 1,000 explanations, some minutes
    python benchmarks/leaks.py --smoke     # a few, for CI

One process explains short texts by a tiny model, family by family. After a warm-up of a
fifth, the resident memory is read after every explanation, once the allocator has given
back what is free; the slope is that of a
straight line through the medians of blocks, with its standard error. All else is
counted before and after and must not grow.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import logging
import os
import pkgutil
import platform
import sys
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import captum
import numpy as np
import torch
import transformers
from captum.attr import TextTokenInput

import captum_cage
from captum_cage import GraphAttributionResult, GraphContextAttribution
from captum_cage.methods.catalogue import llm_attribution
from captum_cage.testing import tiny_causal_lm, tiny_tokenizer

# Kilobytes per explanation that are no leak: what three standard errors cannot tell.
ALLOWED = 2.0
_BLOCKS = 20
_PAGE = os.sysconf("SC_PAGE_SIZE") / 1024
TEXTS = ("Ana has 3.", "Mia has 4.", "So she has 7.", "How many?")


def resident() -> float:
    """Resident memory of this process, kB, when what is free was given back."""
    with suppress(OSError, AttributeError):  # only the GNU library has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def our_modules() -> Iterator[Any]:
    """The modules of the package that are loaded."""
    for found in pkgutil.walk_packages(captum_cage.__path__, "captum_cage."):
        if found.name in sys.modules:
            yield sys.modules[found.name]


def cached() -> int:
    """Entries of all caches and weak maps of the package."""
    total = 0
    for module in our_modules():
        for value in vars(module).values():
            info = getattr(value, "cache_info", None)
            if callable(info):
                total += info().currsize
            elif isinstance(value, weakref.WeakKeyDictionary):
                total += len(value)
    return total


class World:
    """A model, and what is done with it.

    Attributes:
        model: a tiny Llama.
    """

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer("char")
        self.model: Any = tiny_causal_lm(num_hidden_layers=1)
        self._cages: dict[str, GraphContextAttribution] = {}
        self._number = 0

    def cage(self, method: str) -> GraphContextAttribution:
        """One object for all calls of a method."""
        if method not in self._cages:
            wrapped = llm_attribution(method, self.model, self.tokenizer)
            self._cages[method] = GraphContextAttribution(wrapped)
        return self._cages[method]

    def explained(
        self, method: str, target: str | None = " 7.", **more: Any
    ) -> GraphAttributionResult:
        """One of a few texts."""
        self._number += 1
        text = TEXTS[self._number % len(TEXTS)]
        inp = TextTokenInput(text, self.tokenizer)
        return self.cage(method).attribute(inp, target, **more)

    def counts(self) -> dict[str, int]:
        """What must not grow."""
        pyplot = importlib.import_module("matplotlib.pyplot")
        hooks = sum(
            len(getattr(module, kind))
            for module in self.model.modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        )
        gc.collect()
        return {
            "hooks": hooks,
            "caches": cached(),
            "attention functions": len(transformers.AttentionInterface._global_mapping),
            "figures": len(pyplot.get_fignums()),
            "threads": threading.active_count(),
            "files": len(list(Path("/proc/self/fd").iterdir())),
            "objects": len(gc.get_objects()),
        }


def _drawn(world: World) -> None:
    pyplot = importlib.import_module("matplotlib.pyplot")
    result = world.explained("ablation", units="word")
    for draw in (result.plot_graph, result.plot_heatmap, result.plot_token_attr):
        draw()
        pyplot.close("all")


def _saved(world: World) -> None:
    result = world.explained("ablation")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.npz"
        result.save(path)
        GraphAttributionResult.load(path)


def _written(world: World) -> None:
    world.explained(
        "ablation", None, gen_args={"max_new_tokens": 3, "do_sample": False}
    )


def _followed(world: World) -> None:
    result = world.explained("ablation", units="word")
    result.explaining(0)
    result.paths(2)
    result.to_dict()
    result.to_html()


def _refused(world: World) -> None:
    try:
        world.explained("ablation", explain="no such text")
    except ValueError:
        return
    raise RuntimeError("nothing was refused")


FAMILIES: dict[str, Callable[[World], Any]] = {
    "ablation": lambda world: world.explained("ablation"),
    "ablation, loop": lambda world: world.explained("ablation", strategy="loop"),
    "integrated gradients": lambda w: w.explained("integrated-gradients", n_steps=3),
    "attnlrp": lambda world: world.explained("attnlrp"),
    "ifr": lambda world: world.explained("ifr"),
    "attention suppression": lambda world: world.explained("attention-suppression"),
    "kernel shap": lambda world: world.explained("kernel-shap", n_samples=6),
    "context-length probing": lambda world: world.explained("clp"),
    "writing": _written,
    "follow-up, page": _followed,
    "saving": _saved,
    "plots": _drawn,
    "refused": _refused,
}


def slope(memory: list[float]) -> tuple[float, float]:
    """Growth of the resident memory per explanation, kB, and its standard error."""
    blocks = np.array_split(np.array(memory), min(_BLOCKS, len(memory)))
    heights = np.array([np.median(block) for block in blocks])
    size = len(memory) / len(blocks)
    places = np.arange(len(blocks)) * size
    if len(blocks) < 3:
        return float("nan"), float("nan")
    (rise, start), *_ = np.polyfit(places, heights, 1, full=True)
    left = heights - (start + rise * places)
    spread = np.sqrt((left**2).sum() / (len(blocks) - 2))
    error = spread / np.sqrt(((places - places.mean()) ** 2).sum())
    return float(rise), float(error)


def main() -> int:
    """Print the table; 1 if something grows."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--count", type=int, default=1000, help="explanations in all")
    parser.add_argument("--smoke", action="store_true", help="a few")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    importlib.import_module("matplotlib").use("agg")
    each = 3 if options.smoke else -(-options.count // len(FAMILIES))
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, captum "
        f"{captum.__version__}, {each} explanations of each family"
    )
    print("| family | kB per explanation | standard error | what grew |")
    print("|---|---|---|---|")
    world, failed, in_all = World(), 0, 0
    every: list[float] = []
    families = dict(list(FAMILIES.items())[:2]) if options.smoke else FAMILIES
    for name, do in families.items():
        # Before memory is looked at: allocators and caches fill up at first.
        for _ in range(2 if options.smoke else 120):
            do(world)
        before = world.counts()
        memory = []
        for _ in range(each):
            do(world)
            memory.append(resident())
        after = world.counts()
        every += memory
        in_all += each
        grew = {
            kind: after[kind] - before[kind]
            for kind in before
            # Python keeps a few objects more or less of its own.
            if after[kind] - before[kind] > (each // 2 if kind == "objects" else 0)
        }
        rise, error = slope(memory)
        flat = options.smoke or rise - 3 * error <= ALLOWED
        failed += bool(grew) or not flat
        told = ", ".join(f"{count} {kind}" for kind, count in grew.items()) or "nothing"
        print(f"| {name} | {rise:.2f} | {error:.2f} | {told} |", flush=True)
    print(f"{in_all} explanations, {resident() / 1024:.0f} MB, {failed} families leak")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
