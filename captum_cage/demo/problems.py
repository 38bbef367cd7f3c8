"""Word problems whose worked answers have known dependencies.

A problem states 6 to 9 facts in shuffled sentences and asks one or two questions. The
worked answer restates in every step what the step uses, so it is known which facts and
which earlier steps each sentence of it depends on.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["KINDS", "SPLITS", "Answer", "Problem", "Step", "sample_problems"]

KINDS = ("one_question", "two_questions", "mixed")
SPLITS = ("held_out", "train")

Span = tuple[int, int]

NAMES = tuple(
    "Ana Ben Cara Dan Eva Finn Gia Hugo Jon Kim Leo "
    "Mia Nora Omar Pia Quinn Rosa Sam Tom Uma Vera Wes Zoe".split()
)
ITEMS = tuple(
    "apples balls books cards coins cups hats keys "
    "kites maps pens rings shells stamps stones toys".split()
)
ORDINALS = ("first", "second", "third")

_KIND_OF = {1: "one_question", 2: "two_questions", 3: "three_questions"}
_HELD_OUT_SHARE = 8  # one prompt of eight is never trained on
_EXTEND = 0.25  # how often a chain goes on beyond the person asked for


@dataclass(frozen=True)
class Step:
    """A sentence of the worked answer that computes one number.

    Attributes:
        text (str): the sentence.
        span (tuple[int, int]): its character range in the completion.
        facts (tuple[tuple[int, int], ...]): character ranges in the prompt of the facts
            that it uses directly.
        steps (tuple[int, ...]): indices of the earlier steps that it uses directly.
    """

    text: str
    span: Span
    facts: tuple[Span, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """The sentence of the worked answer that answers one question.

    Attributes:
        text (str): the sentence.
        span (tuple[int, int]): its character range in the completion.
        facts (tuple[tuple[int, int], ...]): character ranges in the prompt of all facts
            that it depends on, through any number of steps, in prompt order.
        steps (tuple[int, ...]): indices of the steps that it uses directly.
    """

    text: str
    span: Span
    facts: tuple[Span, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """A word problem, its worked answer and the dependencies between them.

    Attributes:
        prompt (str): facts and questions, as they go to the tokenizer.
        completion (str): the worked answer. Begins with a space, so that
            ``prompt + completion`` is well-formed text whose tokens are those of the
            prompt followed by those of the completion.
        facts (tuple[tuple[int, int], ...]): character ranges of all fact sentences in
            the prompt, in prompt order.
        answers (tuple[Answer, ...]): one per question, in the order asked.
        steps (tuple[Step, ...]): in the order written.
        kind (str): ``"one_question"`` or ``"two_questions"``.
    """

    prompt: str
    completion: str
    facts: tuple[Span, ...]
    answers: tuple[Answer, ...]
    steps: tuple[Step, ...]
    kind: str


class _Fact(NamedTuple):
    """``person`` has ``number`` (more than ``other``, if there is one) ``item``."""

    person: str
    item: str
    number: int
    other: str | None

    def sentence(self) -> str:
        if self.other is None:
            return f"{self.person} has {self.number} {self.item}."
        return f"{self.person} has {self.number} more {self.item} than {self.other}."


def sample_problems(
    n: int, seed: int, kind: str = "one_question", *, split: str = "held_out"
) -> tuple[Problem, ...]:
    """Problems drawn at random, the same for the same arguments.

    A prompt belongs to the held-out part or to the training part by a checksum of its
    text, so no sample of one part shares a prompt with a sample of the other. The first
    ``n`` problems of a longer sample are the sample of length ``n``.

    Args:
        n (int): number of problems.
        seed (int): seed of the draw. The global random state is neither read nor
            changed.
        kind (str, optional): ``"one_question"``, ``"two_questions"``, or ``"mixed"``
            (either, with equal chance). Default: ``"one_question"``
        split (str, optional): ``"held_out"``, which the demo model was never trained
            on, or ``"train"``. Training problems have numbers from 1 to 9, held-out
            problems from 2 to 9, where the plural is right. Default: ``"held_out"``

    Returns:
        tuple[Problem, ...]: ``n`` problems.

    Raises:
        ValueError: if ``n`` is negative, or ``kind`` or ``split`` is unknown.

    Example:
        >>> problem = sample_problems(1, seed=0)[0]
        >>> problem.answers[0].text.startswith("The answer is ")
        True
    """
    if n < 0:
        raise ValueError(
            f"n: the number of problems must be 0 or more, not {n}. "
            "Pass how many problems to draw."
        )
    if kind not in KINDS:
        raise ValueError(
            f"kind: must be one of {', '.join(map(repr, KINDS))}, not {kind!r}. "
            "Pass the kind of problem to draw."
        )
    if split not in SPLITS:
        raise ValueError(
            f"split: must be one of {', '.join(map(repr, SPLITS))}, not {split!r}. "
            "Pass the part of the problems to draw from."
        )
    rng = random.Random(f"{split} {kind} {seed}")
    problems: list[Problem] = []
    while len(problems) < n:
        questions = {"one_question": 1, "two_questions": 2}.get(kind)
        if questions is None:
            questions = rng.randint(1, 2)
        problem = draw_problem(rng, questions, smallest=1 if split == "train" else 2)
        if is_held_out(problem.prompt) == (split == "held_out"):
            problems.append(problem)
    return tuple(problems)


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the part that the demo model is not trained on."""
    return zlib.crc32(prompt.encode()) % _HELD_OUT_SHARE == 0


def draw_problem(
    rng: random.Random,
    questions: int,
    *,
    facts: tuple[int, int] = (6, 9),
    same_item: float = 0.25,
    same_person: float = 0.0,
    smallest: int = 1,
) -> Problem:
    """One problem, of either part: chains of facts, some of them asked about.

    Args:
        rng (random.Random): where the draw comes from.
        questions (int): number of questions, 1 to 3.
        facts (tuple[int, int], optional): fewest and most facts, where the questions do
            not need more. Default: ``(6, 9)``
        same_item (float, optional): how often a later chain is about an item met
            before, from 0 to 1. Default: ``0.25``
        same_person (float, optional): how often a later fact is about a person met
            before, with another item. Default: ``0.0``
        smallest (int, optional): smallest number in a fact. Default: ``1``

    Returns:
        Problem: the problem.
    """
    n_facts = rng.randint(*facts)
    asked = [rng.randint(1, 2) for _ in range(questions)]  # relations up to the answer
    lengths = [relations + 1 for relations in asked]
    for question in range(questions):
        if sum(lengths) < n_facts and rng.random() < _EXTEND:
            lengths[question] += 1
    while sum(lengths) < n_facts:
        lengths.append(min(rng.choice((1, 2, 2, 3, 3)), n_facts - sum(lengths)))
    stories = _draw_stories(rng, lengths, same_item, same_person, smallest)

    told = [fact for story in stories for fact in story]
    rng.shuffle(told)
    ranges: dict[_Fact, Span] = {}
    prompt = ""
    for fact in told:
        start = len(prompt) + bool(prompt)
        prompt += " " * bool(prompt) + fact.sentence()
        ranges[fact] = (start, len(prompt))
    chains = [
        story[: relations + 1] for story, relations in zip(stories, asked, strict=False)
    ]
    prompt += " " + " ".join(_questions(chains))

    completion = ""
    steps: list[Step] = []
    answers: list[Answer] = []
    for question, chain in enumerate(chains):
        total = chain[0].number
        for position, fact in enumerate(chain[1:]):
            number, before = fact.number, total
            total += number
            text = (
                f"{fact.person} has {fact.other}'s {before} + {number} = {total} "
                f"{fact.item}."
            )
            span = (len(completion) + 1, len(completion) + 1 + len(text))
            completion += " " + text
            used = [chain[0], fact] if position == 0 else [fact]
            earlier = () if position == 0 else (len(steps) - 1,)
            steps.append(
                Step(text, span, tuple(sorted(ranges[u] for u in used)), earlier)
            )
        ordinal = "" if questions == 1 else ORDINALS[question] + " "
        text = f"The {ordinal}answer is {total}."
        span = (len(completion) + 1, len(completion) + 1 + len(text))
        completion += " " + text
        truth = tuple(sorted(ranges[fact] for fact in chain))
        answers.append(Answer(text, span, truth, (len(steps) - 1,)))
    return Problem(
        prompt=prompt,
        completion=completion,
        facts=tuple(ranges[fact] for fact in told),
        answers=tuple(answers),
        steps=tuple(steps),
        kind=_KIND_OF[questions],
    )


def _draw_stories(
    rng: random.Random,
    lengths: list[int],
    same_item: float,
    same_person: float,
    smallest: int,
) -> list[list[_Fact]]:
    """Chains of facts, one per length, each about one item.

    No two facts say how many of one item the same person has.
    """
    taken: set[tuple[str, str]] = set()
    stories: list[list[_Fact]] = []
    for length in lengths:
        items = sorted({item for _, item in taken})
        new_items = [item for item in ITEMS if item not in items]
        item = rng.choice(items if items and rng.random() < same_item else new_items)
        story: list[_Fact] = []
        other: str | None = None
        for _ in range(length):
            met = {person for person, _ in taken}
            old = sorted(person for person in met if (person, item) not in taken)
            new = [person for person in NAMES if person not in met]
            person = rng.choice(old if old and rng.random() < same_person else new)
            taken.add((person, item))
            story.append(_Fact(person, item, rng.randint(smallest, 9), other))
            other = person
        stories.append(story)
    return stories


def _questions(chains: list[list[_Fact]]) -> list[str]:
    plain = [
        f"how many {chain[-1].item} does {chain[-1].person} have?" for chain in chains
    ]
    if len(plain) == 1:
        return ["H" + plain[0][1:]]
    return [
        f"{ordinal.capitalize()}, {question}"
        for ordinal, question in zip(ORDINALS, plain, strict=False)
    ]


def vocabulary() -> list[str]:
    """All words of the problems, each as it stands after a space and at a start."""
    # The model knows Ida, but at the end of a sentence the name reads as Idaho.
    words = [
        *NAMES,
        "Ida",
        *ITEMS,
        *ORDINALS,
        *(word.capitalize() for word in ORDINALS),
    ]
    words += re.findall(r"\w+", "has more than How how many does have The answer is")
    words += [str(number) for number in range(100)]
    return words
