"""How well explanations find the facts that an answer truly depends on.

Two unrelated questions over the same facts are answered in one text. For each answer,
its true facts should score above all other facts: the area under the ROC curve (AUROC)
is the chance that a true fact scores above another, 0.5 for an order at random. ::

    python benchmarks/ground_truth.py            # 200 problems
    python benchmarks/ground_truth.py --smoke    # a few, for CI
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import captum
import numpy as np
import numpy.typing as npt
import scipy
import torch
import transformers
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from scipy.stats import bootstrap, mannwhitneyu
from tqdm import tqdm

from captum_cage import GraphAttributionResult, GraphContextAttribution
from captum_cage.demo import Answer, Problem, load_demo, sample_problems

FloatArray = npt.NDArray[np.float64]

EXPLANATIONS: dict[str, Callable[[GraphAttributionResult], FloatArray]] = {
    "`result` (all paths)": lambda result: result.seq_attr.numpy(),
    "one hop": lambda result: result.graph.hops(result.weights, 1).attr,
    "`sequence` (all rows)": lambda result: result.sequence.seq_attr.numpy(),
    "`direct` (own row)": lambda result: result.direct.seq_attr.numpy(),
}


def fact_scores(
    scores: FloatArray, result: GraphAttributionResult, problem: Problem
) -> FloatArray:
    """Score of each fact: the sum over the source units that lie within it."""
    totals = np.zeros(len(problem.facts))
    sources = [unit for unit in result.units if not unit.generated]
    for score, unit in zip(scores, sources, strict=True):
        for number, (start, stop) in enumerate(problem.facts):
            if unit.span is not None and start <= unit.span[0] and unit.span[1] <= stop:
                totals[number] += score
    return totals


def auroc(scores: FloatArray, problem: Problem, answer: Answer) -> float:
    """Chance that a true fact scores above another one; ties count half."""
    true = np.array([fact in answer.facts for fact in problem.facts])
    statistic = mannwhitneyu(scores[true], scores[~true]).statistic
    return float(statistic / (true.sum() * (~true).sum()))


def measure(problems: int, seed: int, units: str) -> dict[str, list[float]]:
    """AUROC of every explanation, averaged over the answers of each problem."""
    model, tokenizer = load_demo()
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    found: dict[str, list[float]] = {name: [] for name in EXPLANATIONS}
    for problem in tqdm(sample_problems(problems, seed, "two_questions")):
        inp = TextTokenInput(problem.prompt, tokenizer)
        whole = cage.attribute(inp, problem.completion, units=units)
        values: dict[str, list[float]] = {name: [] for name in EXPLANATIONS}
        for answer in problem.answers:
            result = whole.explaining(answer.text)
            for name, scores_of in EXPLANATIONS.items():
                scores = fact_scores(scores_of(result), result, problem)
                values[name].append(auroc(scores, problem, answer))
        for name in found:
            found[name].append(float(np.mean(values[name])))
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--units", default="sentence", choices=["sentence", "token"])
    parser.add_argument("--smoke", action="store_true", help="5 problems")
    args = parser.parse_args()
    count = 5 if args.smoke else args.problems

    began = time.perf_counter()
    found = measure(count, args.seed, args.units)
    seconds = time.perf_counter() - began

    print("| explanation | AUROC of true facts | 95% interval |")
    print("|---|---|---|")
    for name, values in found.items():
        interval = bootstrap(
            (values,), np.mean, rng=np.random.default_rng(0), method="percentile"
        ).confidence_interval
        print(
            f"| {name} | {np.mean(values):.3f} | "
            f"{interval.low:.3f} to {interval.high:.3f} |"
        )
    print(
        f"\n{count} two-question problems, seed {args.seed}, FeatureAblation, "
        f"{args.units} units; {seconds:.0f} s on {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Captum {captum.__version__}, SciPy "
        f"{scipy.__version__}."
    )


if __name__ == "__main__":
    main()
