"""How exact the rows are: every engine in every number type, against float64.

    python benchmarks/number_types.py             # all methods, some minutes
    python benchmarks/number_types.py --smoke     # two methods, for CI

The same weights, rounded to half precision once so that every type holds them exactly,
are read in each type; the truth is the loop in float64, one Captum call per generated
unit. Error: largest difference of two raw rows' entries, as a share of the row's
largest; the table gives the median and the largest over all rows. Top-1: share of rows
whose heaviest unit is that of the truth. The last column is the largest difference of
two scores of the whole explanation, of a sum of 1.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import warnings
from typing import Any

import captum
import numpy as np
import numpy.typing as npt
import torch
import transformers
from captum.attr import TextTokenInput

from captum_cage import GraphContextAttribution
from captum_cage.engines.engine import Unsuitable
from captum_cage.methods.catalogue import capabilities, llm_attribution
from captum_cage.testing import tiny_causal_lm, tiny_tokenizer

FloatArray = npt.NDArray[np.float64]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# Largest error of a row that passes.
ALLOWED = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-2, "bfloat16": 0.15}
OPTIONS: dict[str, dict[str, Any]] = {
    "shapley-sampling": {"n_samples": 5},
    "lime": {"n_samples": 60},
    "kernel-shap": {"n_samples": 60},
    "integrated-gradients": {"n_steps": 10},
    "attention-x-ig": {"n_steps": 10},
    "gradient-shap": {"n_samples": 10},
}
PROMPT = "Ana has 3 pens. Mia has 4 more."
TARGET = " Mia has 7 pens."


def rows_of(name: str, model: Any, tokenizer: Any, strategy: Any) -> tuple[Any, Any]:
    """Raw rows and scores, with the same seed in each call."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # Captum draws there
    cage = GraphContextAttribution(llm_attribution(name, model, tokenizer))
    units = "word" if name == "shapley" else "token"
    target = " Mia has 7." if name == "shapley" else TARGET
    prompt = "Ana has 3 pens." if name == "shapley" else PROMPT
    inp = TextTokenInput(prompt, tokenizer)
    options = OPTIONS.get(name, {})
    found = cage.attribute(inp, target, units=units, strategy=strategy, **options)
    return np.asarray(found.graph.rows), found.seq_attr.double().numpy()


def errors_of(found: FloatArray, truth: FloatArray) -> FloatArray:
    """Error of each row that has a largest entry."""
    size = np.abs(truth).max(axis=1)
    kept = size > 0
    error: FloatArray = np.abs(found - truth).max(axis=1)[kept] / size[kept]
    return error


def main() -> int:
    """Print the table; 1 if an error is larger than is allowed."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n", maxsplit=1)[0]
    )
    parser.add_argument("--arch", default="llama", help="a family of tiny_causal_lm")
    parser.add_argument("--smoke", action="store_true", help="two methods")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    print(
        f"{platform.machine()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, captum {captum.__version__}, {options.arch}, "
        "one thread"
    )
    tokenizer = tiny_tokenizer()
    found = [(d.name, d) for _, d in capabilities() if "reagent" not in d.name]
    if options.smoke:
        found = [(n, d) for n, d in found if n in ("ablation", "gradient-x-activation")]
    print("| method | type | error: median | largest | top-1 | scores |")
    print("|---|---|---|---|---|---|")
    failed = 0
    for name, declared in found:
        # Random methods draw otherwise in the loop: theirs is the engine in float64.
        way = "auto" if declared.random or name == "shapley" else "loop"
        exact = tiny_causal_lm(options.arch).half().double()
        truth, scores = rows_of(name, exact, tokenizer, way)
        for kind, dtype in DTYPES.items():
            model = tiny_causal_lm(options.arch).half().to(dtype)
            if dtype == torch.bfloat16:  # it holds fewer digits: round the truth, too
                rounded = tiny_causal_lm(options.arch).half().to(dtype).double()
                truth, scores = rows_of(name, rounded, tokenizer, way)
            try:
                rows, own = rows_of(name, model, tokenizer, "auto")
            except (Unsuitable, ValueError, RuntimeError) as refusal:
                print(f"| {name} | {kind} | refused: {str(refusal)[:80]} | | | |")
                continue
            error = errors_of(rows, truth)
            top = (np.abs(rows).argmax(1) == np.abs(truth).argmax(1)).mean()
            passes = bool(error.max() <= ALLOWED[kind])
            failed += not passes
            print(
                f"| {name} | {kind} | {np.median(error):.1e} | {error.max():.1e} | "
                f"{top:.0%} | {np.abs(own - scores).max():.1e} |"
                + ("" if passes else f" more than {ALLOWED[kind]}"),
                flush=True,
            )
    print("passed" if not failed else f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
