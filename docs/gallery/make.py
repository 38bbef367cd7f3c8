"""Makes the gallery: a page and a picture of each explanation.

    python docs/gallery/make.py                # into docs/gallery
    python docs/gallery/make.py --out FOLDER   # elsewhere
    python docs/gallery/make.py --check        # compares it with what is there

All but the last one explain what the demo model writes, one of them with an answer that
was changed by hand. The last one has random words and random rows: it shows how 3,000
tokens look.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
)
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from matplotlib.testing.exceptions import ImageComparisonFailure

from captum_cage import (
    AttributionGraph,
    ChatTraceInput,
    GraphAttributionResult,
    GraphContextAttribution,
    Unit,
)
from captum_cage.demo import load_demo, sample_conversations, sample_problems
from captum_cage.methods import AttnLRP

HERE = Path(__file__).parent
DPI = 110
TOLERANCE = 8.0  # of the root mean square, in 0..255, for other fonts and versions
PEOPLE = (
    "Ana has 3 pens. Mia has 4 more pens than Ana. Leo has 5 cups. "
    "Zoe has 2 more pens than Mia. Tom has 9 hats. Eva has 6 hats. "
)


def ablation(**options: Any) -> GraphContextAttribution:
    """What explains, by leaving units out."""
    model, tokenizer = load_demo()
    return GraphContextAttribution(
        LLMAttribution(FeatureAblation(model), tokenizer), **options
    )


def explained(
    cage: GraphContextAttribution, prompt: str, text: str, **options: Any
) -> GraphAttributionResult:
    """What a text after a prompt comes from."""
    inp = TextTokenInput(prompt, cage.llm_attr.tokenizer)
    return cage.attribute(inp, text, **options)


# --- the explanations ----------------------------------------------------------------


def two_answers() -> GraphAttributionResult:
    """The second of two answers, which stands on the words before it."""
    problem = sample_problems(1, seed=0, kind="two_questions")[0]
    return explained(
        ablation(), problem.prompt, problem.completion, units="sentence", explain=-1
    )


def eight_steps() -> GraphAttributionResult:
    """An answer eight steps away from the first fact."""
    problem = max(
        sample_problems(20, seed=0, kind="long_chain"),
        key=lambda problem: len(problem.steps),
    )
    return explained(
        ablation(), problem.prompt, problem.completion, units="sentence", explain=-1
    )


def against_the_answer() -> GraphAttributionResult:
    """An answer that its own step argues against: 7 was worked out, 9 is said."""
    return explained(
        ablation(normalization="signed"),
        PEOPLE + "How many pens does Mia have?",
        " Mia has Ana's 3 + 4 = 7 pens. The answer is 9.",
        units="sentence",
        explain=-1,
    )


def why_not_another() -> GraphAttributionResult:
    """Why 7 and not 9, word by word."""
    return explained(
        ablation(normalization="signed"),
        PEOPLE + "How many pens does Mia have?",
        " Mia has Ana's 3 + 4 = 7 pens. The answer is 7.",
        units="word",
        explain=-1,
        foil={"7": "9"},
    )


def misled_by_a_tool() -> GraphAttributionResult:
    """A conversation in which a tool says otherwise than the user."""
    talk = sample_conversations(1, seed=0, kind="override")[0]
    cage = ablation()
    trace = ChatTraceInput(talk.messages, cage.llm_attr.tokenizer)
    return cage.attribute(trace, units="sentence", explain=-1)


def word_by_word() -> GraphAttributionResult:
    """All words of an answer, from gradients in one backward pass each."""
    model, tokenizer = load_demo()
    cage = GraphContextAttribution(LLMGradientAttribution(AttnLRP(model), tokenizer))
    return explained(
        cage,
        "Ana has 3 pens. Mia has 4 more pens than Ana. How many pens does Mia have?",
        " Mia has Ana's 3 + 4 = 7 pens. The answer is 7.",
        units="word",
        explain="7",
    )


def long_and_random(n_tokens: int = 3000) -> GraphAttributionResult:
    """Random words, each of which rests on a few before it, and a little on all."""
    random = np.random.default_rng(0)
    half = n_tokens // 2
    syllables = "ka lo mi ne su to ra vi".split()
    texts, units = ["", ""], []
    for side in (0, 1):
        for place in range(half):
            word = "".join(random.choice(syllables, size=random.integers(1, 4)))
            text = word.capitalize() if place % 12 == 0 else word
            text += "." if place % 12 == 11 else ""
            text += "\n\n" if place % 96 == 95 else " "
            start = len(texts[side])
            texts[side] += text
            units.append(Unit(text, bool(side), (start, len(texts[side]))))
    rows = np.tril(random.exponential(size=(half, 2 * half)) ** 3, half - 1)
    rows *= 0.1 / rows.sum(axis=1, keepdims=True)
    for step in range(half):
        near = half + step - random.geometric(1 / 60, size=4)
        far = random.integers(half, size=2)
        heavy = np.concatenate([np.maximum(near, 0), far])
        np.add.at(rows[step], heavy, 0.9 * random.dirichlet(np.ones(6)))
    return GraphAttributionResult(
        AttributionGraph.from_rows(rows, half),
        units,
        list(range(half - 12, half)),
        source_text=texts[0],
        generated_text=texts[1],
        meta={"units": "token", "method": "none: random numbers"},
    )


# --- pictures of them ----------------------------------------------------------------


def with_sources(result: GraphAttributionResult, height: float = 7.4) -> Figure:
    """The graph, and below it the sources: by the row alone, and along all paths."""
    figure, (above, below) = plt.subplots(
        2,
        1,
        figsize=(9, height),
        height_ratios=(height - 3.2, 2.6),
        gridspec_kw={
            "hspace": 0.12,
            "left": 0.01,
            "right": 0.97,
            "top": 0.99,
            "bottom": 0.5 / height,
        },
    )
    figure.set_facecolor("white")
    result.plot_graph(above)
    result.plot_sources(below, top=7)
    box = below.get_position()
    below.set_position((0.32, box.y0, 0.65, box.height))
    return figure


def high(result: GraphAttributionResult) -> Figure:
    """The same for many units."""
    return with_sources(result, 11.5)


def graph(result: GraphAttributionResult) -> Figure:
    """The graph alone, at the size that it needs."""
    figure: Figure = result.plot_graph()[0]
    return figure


def all_steps(result: GraphAttributionResult) -> Figure:
    """The graph with light arcs, too."""
    figure: Figure = result.plot_graph(keep=0.99)[0]
    return figure


def heatmap(result: GraphAttributionResult) -> Figure:
    """The rows themselves."""
    figure: Figure = result.plot_heatmap(direct=True)[0]
    return figure


Explain = Callable[[], GraphAttributionResult]
Draw = Callable[[GraphAttributionResult], Figure]
GALLERY: dict[str, tuple[Explain, Draw]] = {
    "two-answers": (two_answers, with_sources),
    "eight-steps": (eight_steps, all_steps),
    "misled-by-a-tool": (misled_by_a_tool, with_sources),
    "against-the-answer": (against_the_answer, with_sources),
    "why-not-another": (why_not_another, high),
    "word-by-word": (word_by_word, heatmap),
    "long-and-random": (long_and_random, graph),
}


# --- making and comparing them -------------------------------------------------------


def make(folder: Path, names: Sequence[str]) -> None:
    """Write the page and the picture of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        explain, draw = GALLERY[name]
        result = explain()
        result.to_html(folder / f"{name}.html")
        figure = draw(result)
        figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
        plt.close(figure)
        print(f"{name}: {explain.__doc__}")


def held(page: Path) -> tuple[list[str], dict[str, Any]]:
    """The parts of a page around its data, and its data but for the numbers."""
    begin, data, end = re.split(
        '(?<=id="data">)(.*?)(?=</script>)',
        page.read_text(encoding="utf-8"),
        maxsplit=1,
    )
    told = json.loads(data)
    told.update(rows=None, first=None)
    return [begin, end], told


def differences(made: Path, present: Path, names: Sequence[str]) -> list[str]:
    """The files that are not as they were; pictures tell whether numbers are."""
    found = []
    for name in names:
        if held(made / f"{name}.html") != held(present / f"{name}.html"):
            found.append(f"{name}.html")
        expected, actual = (str(folder / f"{name}.png") for folder in (present, made))
        try:
            if compare_images(expected, actual, TOLERANCE):
                found.append(f"{name}.png")
        except ImageComparisonFailure:  # they are not of one size
            found.append(f"{name}.png")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the gallery, or compare it with what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--only", nargs="+", choices=GALLERY, metavar="NAME")
    options = parser.parse_args(arguments)
    names = options.only or list(GALLERY)
    if not options.check:
        make(options.out, names)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), names)
        found = differences(Path(folder), options.out, names)
    if found:
        print(f"Not as they are made: {', '.join(found)}.")
        print("Look at what changed and run: make gallery")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
