"""How well explanations find the facts that an answer truly depends on.

Two unrelated questions over the same facts are answered in one text. For each answer,
its true facts should score above all other facts: the area under the ROC curve (AUROC)
is the chance that a true fact scores above another, 0.5 for an order at random. ::

    python benchmarks/ground_truth.py                          # ablation, 200 problems
    python benchmarks/ground_truth.py --methods all --problems 60
    python benchmarks/ground_truth.py --methods attnlrp ifr
    python benchmarks/ground_truth.py --smoke                  # all methods, for CI
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import captum
import numpy as np
import numpy.typing as npt
import scipy
import torch
import transformers
from captum.attr import TextTokenInput
from scipy.stats import bootstrap, mannwhitneyu
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase

from captum_cage import GraphAttributionResult, GraphContextAttribution
from captum_cage.demo import Answer, Problem, load_demo, sample_problems
from captum_cage.methods.catalogue import llm_attribution, method_named, needs_argument

FloatArray = npt.NDArray[np.float64]

EXPLANATIONS: dict[str, Callable[[GraphAttributionResult], FloatArray]] = {
    "`direct` (own row)": lambda result: result.direct.seq_attr.numpy(),
    "`sequence` (all rows)": lambda result: result.sequence.seq_attr.numpy(),
    "one hop": lambda result: result.graph.hops(result.weights, 1).attr,
    "`result` (all paths)": lambda result: result.seq_attr.numpy(),
}


@dataclass(frozen=True)
class Case:
    """A base method as it is measured.

    Attributes:
        name (str): its name in the catalogue.
        options (Mapping): for its constructor.
        kwargs (Mapping): for ``attribute``.
        most (int or None): most problems, where each takes long.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    most: int | None = None

    @property
    def label(self) -> str:
        """The name, and what is not its default."""
        more = {**self.options, **self.kwargs}
        more = {k: v for k, v in more.items() if not k.startswith("masked")}
        if not more:
            return self.name
        return f"{self.name}, " + ", ".join(f"{k}={v}" for k, v in more.items())


# With the defaults ReAGent is content with the first draw on these problems.
STRICT = {"max_steps": 50, "keep_top_n": 1, "rational_candidates": 1}

CASES = (
    Case("attnlrp"),
    Case("ifr"),
    Case("ifr", {"proximity": "l2"}),
    Case("ifr", {"aggregation": "product"}),
    Case("ablation"),
    Case("attention-suppression"),
    Case("attention-suppression", {"effect": "kl"}),
    Case("shapley-sampling", kwargs={"n_samples": 10}),
    Case("l-shap"),
    Case("c-lime"),
    Case("context-cite"),
    Case("lime", kwargs={"n_samples": 256}),
    Case("kernel-shap", kwargs={"n_samples": 256}),
    Case("one-shot-reagent"),
    Case("reagent", kwargs={"max_steps": 50}, most=20),
    Case("reagent", kwargs=STRICT, most=20),
    Case("clp"),
    Case("clp-cage"),
    Case("attention-x-ig", kwargs={"n_steps": 20}),
    Case("integrated-gradients", kwargs={"n_steps": 20}),
    Case("gradient-shap", kwargs={"n_samples": 20}),
    Case("gradient-x-activation"),
    Case("value-weighted-attention"),
    Case("mean-attention"),
    Case("attention-rollout"),
)


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


def trained_masked_lm(
    tokenizer: PreTrainedTokenizerBase, steps: int, seed: int = 0
) -> tuple[BertForMaskedLM, PreTrainedTokenizerBase]:
    """A small masked language model that knows the problems, for ReAGent.

    Trained on the part of the problems that is not measured, a few words masked in
    each; its tokenizer is the demo's, with a mask token.
    """
    model_tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    model_tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=len(model_tokenizer),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=512,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        texts = [
            problem.prompt + problem.completion
            for problem in sample_problems(32 * steps, seed, "mixed", split="train")
        ]
        for step in tqdm(range(steps), desc="masked model", leave=False):
            batch = model_tokenizer(
                texts[32 * step : 32 * step + 32], padding=True, return_tensors="pt"
            )
            ids = batch["input_ids"]
            words = ids != model_tokenizer.pad_token_id
            masked = words & (torch.rand(ids.shape, generator=generator) < 0.2)
            loss = model(
                input_ids=ids.masked_fill(masked, model_tokenizer.mask_token_id),
                attention_mask=words.long(),
                labels=ids.masked_fill(~masked, -100),
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), model_tokenizer


def measure(
    case: Case, problems: Sequence[Problem], units: str, seed: int
) -> tuple[dict[str, list[float]], float]:
    """AUROC of every explanation, averaged over the answers of each problem.

    Returns:
        tuple: values by explanation, one per problem; and CPU seconds for all.
    """
    model, tokenizer = load_demo()
    cage = GraphContextAttribution(
        llm_attribution(case.name, model, tokenizer, **case.options)
    )
    transformers.set_seed(seed)
    found: dict[str, list[float]] = {name: [] for name in EXPLANATIONS}
    began = time.process_time()
    for problem in tqdm(problems, desc=case.label, leave=False):
        inp = TextTokenInput(problem.prompt, tokenizer)
        whole = cage.attribute(inp, problem.completion, units=units, **case.kwargs)
        values: dict[str, list[float]] = {name: [] for name in EXPLANATIONS}
        for answer in problem.answers:
            result = whole.explaining(answer.text)
            for name, scores_of in EXPLANATIONS.items():
                scores = fact_scores(scores_of(result), result, problem)
                values[name].append(auroc(scores, problem, answer))
        for name in found:
            found[name].append(float(np.mean(values[name])))
    return found, time.process_time() - began


def interval(values: Sequence[float]) -> str:
    """The mean and its 95% interval, by the bootstrap over problems."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all values alike: the interval is a point
        found = bootstrap(
            (values,), np.mean, rng=np.random.default_rng(0), method="percentile"
        ).confidence_interval
    low, high = (
        (np.mean(values),) * 2 if np.ptp(values) == 0 else (found.low, found.high)
    )
    return f"{np.mean(values):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--units", default="sentence", choices=["sentence", "token"])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["ablation"],
        metavar="NAME",
        help="names of base methods, or all",
    )
    parser.add_argument(
        "--masked-steps", type=int, default=600, help="training of ReAGent's model"
    )
    parser.add_argument("--smoke", action="store_true", help="all methods, 2 problems")
    args = parser.parse_args()
    names = ["all"] if args.smoke else args.methods
    count = 2 if args.smoke else args.problems
    for name in names:
        if name != "all":
            method_named(name)
    cases = [case for case in CASES if "all" in names or case.name in names]
    problems = sample_problems(count, args.seed, "two_questions")

    masked: dict[str, Any] = {}
    print("| base method | " + " | ".join(EXPLANATIONS) + " | CPU s per problem |")
    print("|---" * (len(EXPLANATIONS) + 2) + "|")
    began = time.perf_counter()
    for case in cases:
        if needs_argument(method_named(case.name)[0], "masked_lm"):
            if not masked:
                steps = 2 if args.smoke else args.masked_steps
                model, tokenizer = trained_masked_lm(load_demo()[1], steps)
                masked = {"masked_lm": model, "masked_tokenizer": tokenizer}
            case = replace(case, options={**case.options, **masked})
        some = problems[: case.most]
        found, seconds = measure(case, some, args.units, args.seed)
        cells = [interval(values) for values in found.values()]
        label = case.label + (f" ({len(some)} problems)" if some != problems else "")
        each = seconds / len(some)
        print(f"| {label} | {' | '.join(cells)} | {each:.2f} |", flush=True)
    print(
        f"\nAUROC of true facts (95% interval): {count} two-question problems, seed "
        f"{args.seed}, {args.units} units; {time.perf_counter() - began:.0f} s on "
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, Captum "
        f"{captum.__version__}, SciPy {scipy.__version__}."
    )


if __name__ == "__main__":
    main()
