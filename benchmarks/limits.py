"""What shares do and do not tell, measured on the demo problems.

    python benchmarks/limits.py                      # all tables, some minutes
    python benchmarks/limits.py --tables leaks signs
    python benchmarks/limits.py --smoke              # one problem each, for CI

The tables stand in docs/explanation: `leaks` in leaks.md, `grouping` in grouping.md,
the others in limits.md.
"""

from __future__ import annotations

import argparse
import platform
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import captum
import numpy as np
import numpy.typing as npt
import scipy
import torch
import transformers
from captum.attr import TextTokenInput
from ground_truth import auroc, fact_scores, interval
from tqdm import tqdm

from captum_cage import GraphAttributionResult, GraphContextAttribution
from captum_cage.demo import Problem, load_demo, sample_problems
from captum_cage.graph import AttributionGraph, Normalization
from captum_cage.methods.catalogue import llm_attribution

FloatArray = npt.NDArray[np.float64]
Span = tuple[int, int]

METHODS = ("ablation", "attnlrp", "ifr", "clp")
KINDS = ("two_questions", "long_chain")
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)
CHAINS = (2, 4, 6, 8)
UNITS = ("sentence", "token")
OPTIONS: dict[str, dict[str, Any]] = {"integrated-gradients": {"n_steps": 20}}


class Demo:
    """The demo model, and what is asked of it.

    Args:
        smoke (bool, optional): fewer methods, kinds and lengths. Default: ``False``
    """

    def __init__(self, smoke: bool = False) -> None:
        cut = 1 if smoke else None
        self.methods, self.kinds = METHODS[:cut], KINDS[:cut]
        self.chains, self.units = CHAINS[:cut], UNITS[:cut]
        self.model: Any
        self.model, self.tokenizer = load_demo()
        self._cages: dict[str, GraphContextAttribution] = {}
        self._found: dict[tuple[str, str, str], GraphAttributionResult] = {}

    def explained(
        self, method: str, problem: Problem, units: str
    ) -> GraphAttributionResult:
        """All rows of a problem's worked answer, computed once."""
        key = method, problem.prompt, units
        if key in self._found:
            return self._found[key]
        if method not in self._cages:
            wrapped = llm_attribution(method, self.model, self.tokenizer)
            self._cages[method] = GraphContextAttribution(wrapped)
        transformers.set_seed(0)
        inp = TextTokenInput(problem.prompt, self.tokenizer)
        options = OPTIONS.get(method, {})
        self._found[key] = self._cages[method].attribute(
            inp, problem.completion, units=units, **options
        )
        return self._found[key]

    def log_prob(self, prompt: Sequence[int], completion: str) -> float:
        """Log-probability of a completion, the text held fixed."""
        target = self.tokenizer(completion, add_special_tokens=False).input_ids
        ids = torch.tensor([[*prompt, *target]])
        with torch.no_grad():
            logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        found = logits.double().log_softmax(-1)[range(len(target)), target].sum()
        return float(found)

    def written(self, prompt: str) -> str:
        """What the model writes after a prompt, greedily."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            found = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=160,
                do_sample=False,
            )
        text = self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        return str(text)


def without(text: str, span: Span) -> str:
    """A text less one of its sentences and the space beside it."""
    start, stop = span
    if start:
        return text[: start - 1] + text[stop:]
    return text[stop:].lstrip()


def percent(values: Iterable[float]) -> str:
    """The mean as a percentage."""
    return f"{np.mean(list(values)):.1%}"


def row(*cells: object) -> None:
    """A line of a table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells: str) -> None:
    """The head of a table."""
    row(*cells)
    print("|---" * len(cells) + "|")


def renormalised(
    result: GraphAttributionResult, normalization: Normalization
) -> AttributionGraph:
    """The graph of the same raw rows under another normalisation."""
    graph = result.graph
    return AttributionGraph.from_rows(graph.rows, graph.sources, normalization)


# --- tables --------------------------------------------------------------------------


def leaks(demo: Demo, problems: int) -> None:
    """How many rows have no mass, and how much of the answers' mass they swallow."""
    header(
        "units",
        "base method",
        "rows without mass: positive",
        "absolute, signed",
        "answers that leak: positive",
        "mass leaked: mean",
        "largest",
    )
    for units in demo.units:
        for method in demo.methods:
            empty: dict[str, list[float]] = defaultdict(list)
            lost: list[float] = []
            for kind in demo.kinds:
                for problem in sample_problems(problems, 0, kind):
                    whole = demo.explained(method, problem, units)
                    for normalization in ("positive", "absolute"):
                        graph = renormalised(whole, normalization)
                        empty[normalization] += graph.leak.tolist()
                    for answer in problem.answers:
                        result = whole.explaining(answer.text)
                        lost.append(result.leaked / len(result.explained))
            row(
                units,
                method,
                percent(empty["positive"]),
                percent(empty["absolute"]),
                percent(value > 0 for value in lost),
                percent(lost),
                f"{max(lost):.1%}",
            )


def signs(demo: Demo, problems: int) -> None:
    """How much of the raw rows argues against the unit that was written."""
    header(
        "units",
        "base method",
        "negative part of a row: mean",
        "rows whose heaviest entry is negative",
        "`signed`: mass of paths that argue against the answer",
    )
    for units in demo.units:
        for method in demo.methods:
            parts: list[float] = []
            first: list[float] = []
            spread: list[float] = []
            for kind in demo.kinds:
                for problem in sample_problems(problems, 0, kind):
                    whole = demo.explained(method, problem, units)
                    rows = np.asarray(whole.graph.rows)
                    mass = np.abs(rows).sum(axis=1)
                    some = mass > 0
                    rows = rows[some]
                    parts += (rows.clip(max=0).sum(axis=1) / -mass[some]).tolist()
                    heaviest = np.abs(rows).argmax(axis=1)
                    first += (rows[np.arange(len(rows)), heaviest] < 0).tolist()
                    signed = renormalised(whole, "signed")
                    for answer in problem.answers:
                        weights = whole.explaining(answer.text).weights
                        found = signed.explain_parts(weights)
                        spread.append(float(found.negative.sum() / weights.sum()))
            row(units, method, percent(parts), percent(first), percent(spread))


def grouping(demo: Demo, problems: int) -> None:
    """Group the rows, then solve; against: solve for tokens, then sum."""
    header(
        "base method",
        "data set",
        "half the absolute difference of shares: mean",
        "largest",
        "AUROC, grouped first",
        "AUROC, solved first",
    )
    for method in demo.methods:
        for kind in demo.kinds:
            apart: list[float] = []
            values: dict[str, list[float]] = defaultdict(list)
            for problem in sample_problems(problems, 0, kind):
                fine = demo.explained(method, problem, "token")
                coarse = demo.explained(method, problem, "sentence")
                for answer in problem.answers:
                    first = coarse.explaining(answer.text)
                    last = fine.explaining(answer.text).by("sentence")
                    one, other = first.seq_attr.numpy(), last.seq_attr.numpy()
                    shares = [x / (x.sum() or 1.0) for x in (one, other)]
                    apart.append(float(np.abs(shares[0] - shares[1]).sum() / 2))
                    for name, scores in (("first", one), ("last", other)):
                        found = fact_scores(scores, first, problem)
                        values[name].append(auroc(found, problem, answer))
            row(
                method,
                kind,
                percent(apart),
                f"{max(apart):.1%}",
                interval(values["first"]),
                interval(values["last"]),
            )


def absent(demo: Demo, problems: int) -> None:
    """What taking away a fact that no answer depends on does to the written text."""
    ways: dict[str, list[float]] = defaultdict(list)
    for problem in sample_problems(problems, 0, "two_questions"):
        used = {fact for answer in problem.answers for fact in answer.facts}
        read = demo.tokenizer(problem.prompt, return_offsets_mapping=True)
        ids, offsets = read.input_ids, read.offset_mapping
        whole = demo.log_prob(ids, problem.completion)
        for fact in problem.facts:
            start, stop = fact
            inside = [a < stop and start < b for a, b in offsets]
            digit = re.search(r"\d", problem.prompt[start:stop])
            if digit is None:
                raise ValueError("a fact must have a number")
            place = start + digit.start()
            other = "9" if problem.prompt[place] == "2" else "2"
            changed = problem.prompt[:place] + other + problem.prompt[place + 1 :]
            texts = {
                "every token is the baseline (id 0)": [
                    0 if gone else token
                    for token, gone in zip(ids, inside, strict=True)
                ],
                "the sentence is deleted": demo.tokenizer(
                    without(problem.prompt, fact)
                ).input_ids,
                "its number is another one": demo.tokenizer(changed).input_ids,
            }
            role = "used" if fact in used else "unused"
            for name, text in texts.items():
                lost = whole - demo.log_prob(text, problem.completion)
                ways[f"{role} {name}"].append(lost)
    header(
        "way of taking it away",
        "unused facts: mean loss in nats",
        "largest",
        "used facts: mean loss in nats",
    )
    for name in list(texts):
        unused, used_lost = ways[f"unused {name}"], ways[f"used {name}"]
        row(
            name,
            f"{np.mean(np.abs(unused)):.3f}",
            f"{np.max(np.abs(unused)):.2f}",
            f"{np.mean(used_lost):.2f}",
        )
    print(f"\n{len(unused)} unused and {len(used_lost)} used facts.")


def chains(demo: Demo, problems: int) -> None:
    """The share of a chain's facts by their distance, and what deleting them does."""
    header(
        "steps",
        "share of the first fact",
        "of the last fact",
        "of all true facts",
        "of the question",
        "answer changed without the first fact",
        "without the last",
        "without one that is not in the chain",
    )
    for steps in demo.chains:
        shares: dict[str, list[float]] = defaultdict(list)
        changed: dict[str, list[float]] = defaultdict(list)
        for problem in sample_problems(problems, 0, "long_chain", steps=steps):
            answer = problem.answers[0]
            result = demo.explained("ablation", problem, "sentence")
            result = result.explaining(answer.text)
            scores = result.seq_attr.numpy()
            of_fact = dict(
                zip(problem.facts, fact_scores(scores, result, problem), strict=True)
            )
            start = problem.steps[0].facts
            told = [problem.prompt[slice(*fact)] for fact in start]
            # The chain begins with the fact that stands alone.
            first = start[0] if " more " not in told[0] else start[1]
            last = problem.steps[-1].facts[-1]
            other = next(fact for fact in problem.facts if fact not in answer.facts)
            shares["first"].append(of_fact[first])
            shares["last"].append(of_fact[last])
            shares["true"].append(sum(of_fact[fact] for fact in answer.facts))
            shares["question"].append(float(scores.sum()) - sum(of_fact.values()))
            for name, fact in (("first", first), ("last", last), ("other", other)):
                text = demo.written(without(problem.prompt, fact))
                changed[name].append(answer.text not in text)
        row(
            steps,
            *(percent(shares[name]) for name in ("first", "last", "true", "question")),
            *(percent(changed[name]) for name in ("first", "last", "other")),
        )


def twice(demo: Demo, problems: int) -> None:
    """What becomes of a fact's share when the prompt tells it twice."""
    header(
        "base method",
        "share of the last fact, told once",
        "told twice: first telling",
        "second telling",
        "both",
    )
    for method in (*demo.methods, "integrated-gradients"):
        once: list[float] = []
        found: list[list[float]] = []
        for problem in sample_problems(problems, 0, "one_question"):
            answer = problem.answers[0]
            start, stop = problem.steps[-1].facts[-1]
            fact = problem.prompt[start:stop]
            prompt = f"{fact} {problem.prompt}"
            if answer.text not in demo.written(prompt):
                continue
            result = demo.explained(method, problem, "sentence").explaining(answer.text)
            once += _shares_of(result, fact)
            doubled = Problem(prompt, problem.completion, (), (), (), problem.kind)
            result = demo.explained(method, doubled, "sentence").explaining(answer.text)
            found.append(_shares_of(result, fact))
        table = np.array(found)
        row(
            method,
            percent(once),
            *(percent(table[:, telling]) for telling in (0, 1)),
            percent(table.sum(axis=1)),
        )
    print(f"\nThe same answer comes out in {len(found)} of {problems} problems.")


def _shares_of(result: GraphAttributionResult, text: str) -> list[float]:
    """Share of each source unit of this text, in order."""
    pairs = zip(result.input_tokens, result.seq_attr.tolist(), strict=True)
    return [share for unit, share in pairs if unit.strip() == text]


TABLES: dict[str, tuple[Callable[[Demo, int], None], int]] = {
    "chains": (chains, 20),
    "absent": (absent, 30),
    "twice": (twice, 20),
    "leaks": (leaks, 10),
    "signs": (signs, 10),
    "grouping": (grouping, 10),
}


def chosen(names: Sequence[str]) -> Iterator[str]:
    """The tables asked for, in their order."""
    for name in tqdm(list(TABLES), desc="tables", leave=False):
        if name in names:
            yield name


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--problems", type=int, help="of each kind and table")
    parser.add_argument("--smoke", action="store_true", help="one problem each")
    args = parser.parse_args()
    demo = Demo(args.smoke)
    for name in chosen(args.tables):
        table, usual = TABLES[name]
        count = 1 if args.smoke else args.problems or usual
        began = time.perf_counter()
        print(f"\n## {name}\n")
        table(demo, count)
        print(
            f"\n{count} problems of each kind, seed 0; "
            f"{time.perf_counter() - began:.0f} s."
        )
    print(
        f"\n{torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Captum "
        f"{captum.__version__}, SciPy {scipy.__version__}."
    )


if __name__ == "__main__":
    main()
