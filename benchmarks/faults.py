"""A fault at every place of an explanation: what is wrong afterwards.

    python benchmarks/faults.py                      # all methods, 200 places each
    python benchmarks/faults.py --places 0           # every place: hours
    python benchmarks/faults.py --smoke              # one method, few places, for CI

Memory runs out at an operation of Torch that makes a tensor; Ctrl-C comes at an
operation of Torch, or where Python looks for signals in between: where a function of
this package, of Captum or of Torch's hooks begins, and after a call. Each time the call
must give the rows of an undisturbed one or say what happened; model, tokenizer,
settings and random states must be as before; and the same call on the same object must
then give the undisturbed rows.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import captum
import numpy as np
import numpy.typing as npt
import torch
import transformers
from captum.attr import TextTokenInput

from captum_cage import GraphContextAttribution
from captum_cage.methods.catalogue import capabilities, llm_attribution
from captum_cage.testing import tiny_causal_lm, tiny_tokenizer
from captum_cage.testing._faults import (
    Events,
    events_of_memory,
    events_of_operations,
    events_of_signals,
)
from captum_cage.testing.watch import (
    Snapshot,
    changes,
    model_snapshot,
    random_snapshot,
    settings_snapshot,
    tokenizer_snapshot,
)

Rows = npt.NDArray[np.float64]

FAULTS: dict[
    str,
    tuple[type[BaseException], Callable[[Events], AbstractContextManager[None]]],
] = {
    "memory": (torch.OutOfMemoryError, events_of_memory),
    "Ctrl-C, operation": (KeyboardInterrupt, events_of_operations),
    "Ctrl-C, between": (KeyboardInterrupt, events_of_signals),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "shapley-sampling": {"n_samples": 1},
    "lime": {"n_samples": 6},
    "kernel-shap": {"n_samples": 6},
    "integrated-gradients": {"n_steps": 2},
    "attention-x-ig": {"n_steps": 2},
    "gradient-shap": {"n_samples": 2},
}


class World:
    """A small model, part of it in training mode and frozen, and a method for it."""

    def __init__(self, name: str, strategy: Any) -> None:
        self.random = {d.name: d.random for _, d in capabilities()}[name]
        self._strategy = strategy
        self._options = OPTIONS.get(name, {})
        self.tokenizer = tiny_tokenizer("char")
        self.model: Any = tiny_causal_lm(num_hidden_layers=1).train()
        self.model.model.layers[0].eval()
        self.model.model.norm.weight.requires_grad_(False)
        self.llm_attr = llm_attribution(name, self.model, self.tokenizer)

    def rows(self, cage: GraphContextAttribution) -> Rows:
        """Rows of a small text, with the same seed in each call."""
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  # Captum draws there
        found = cage.attribute(
            TextTokenInput("Ana", self.tokenizer),
            " ha",
            strategy=self._strategy,
            batch_size=3,
            **self._options,
        )
        return np.asarray(found.graph.rows)

    def snapshot(self) -> Snapshot:
        """All that is to be as before."""
        found = {
            **model_snapshot(self.model),
            **tokenizer_snapshot(self.tokenizer),
            **settings_snapshot(),
            "attentions": sorted(transformers.AttentionInterface._global_mapping),
        }
        return found if self.random else {**found, **random_snapshot()}

    def try_out(self, kind: str, most: int, seed: int) -> tuple[Counter[str], set[str]]:
        """What came of a fault at some places, or at all, and what went wrong."""
        error, events = FAULTS[kind]
        expected = self.rows(GraphContextAttribution(self.llm_attr))
        size = np.abs(expected).max()
        seen = Events()
        with events(seen):
            self.rows(GraphContextAttribution(self.llm_attr))
        places = np.arange(seen.seen)
        if most and most < len(places):
            places = np.random.default_rng(seed).choice(places, most, replace=False)
        told: Counter[str] = Counter(places=seen.seen)
        wrong: set[str] = set()
        for place in places.tolist():
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            before = self.snapshot()
            cage = GraphContextAttribution(self.llm_attr)
            fault = Events(place, error)
            try:
                with events(fault):
                    found = self.rows(cage)
            except (KeyboardInterrupt, RuntimeError) as raised:
                interrupted = isinstance(raised, KeyboardInterrupt)
                clear = interrupted or "memory" in str(raised)
                told["refused" if clear else "unclear"] += 1
            else:
                same = bool(np.abs(found - expected).max() <= 1e-5 * size)
                told["right" if same else "wrong"] += 1
                if not same:
                    wrong.add(f"{fault.where}: rows")
            if different := changes(before, self.snapshot()):
                told["not restored"] += 1
                wrong.add(f"{fault.where}: {different[0]}")
            again = self.rows(cage)
            # What a random method drew before the fault is not drawn again.
            if not self.random and np.abs(again - expected).max() > 1e-5 * size:
                told["wrong afterwards"] += 1
                wrong.add(f"{fault.where}: rows afterwards")
        return told, wrong


def main() -> int:
    """Print the counts; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--methods", nargs="*", help="names; all by default")
    parser.add_argument("--strategies", nargs="*", default=["fused"])
    parser.add_argument("--places", type=int, default=200, help="0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--smoke", action="store_true", help="one method, few places")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # An interrupt in what the collector of garbage runs is only printed.
    sys.unraisablehook = lambda _: None
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, captum "
        f"{captum.__version__}, one layer, 3 + 3 tokens"
    )
    known = [d.name for _, d in capabilities() if "reagent" not in d.name]
    names = options.methods or (["attnlrp"] if options.smoke else known)
    most = 3 if options.smoke else options.places
    outcomes = ("right", "refused")
    bad = ("wrong", "unclear", "not restored", "wrong afterwards")
    print(f"| method | way | fault | places | {' | '.join((*outcomes, *bad))} |")
    print("|---" * (4 + len(outcomes) + len(bad)) + "|")
    total: Counter[str] = Counter()
    for name in names:
        for strategy in options.strategies:
            for kind in FAULTS:
                try:
                    world = World(name, strategy)
                    told, wrong = world.try_out(kind, most, options.seed)
                except (ImportError, ValueError) as error:
                    print(f"| {name} | {strategy} | {kind} | {str(error)[:60]} |")
                    continue
                counts = " | ".join(str(told[one]) for one in (*outcomes, *bad))
                print(f"| {name} | {strategy} | {kind} | {told['places']} | {counts} |")
                for line in sorted(wrong)[:5]:
                    print(f"    {line}")
                sys.stdout.flush()
                total += told
    tried = sum(total[one] for one in (*outcomes, "wrong", "unclear"))
    failed = sum(total[one] for one in bad)
    print(f"{tried} faults, {failed} wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
