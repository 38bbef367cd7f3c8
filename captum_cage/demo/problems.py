"""Word problems whose worked answers have known dependencies.

A problem states facts in shuffled sentences and asks one or two questions. The worked
answer restates in every step what the step uses, so it is known which facts and which
earlier steps each sentence of it depends on.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "KINDS",
    "LONG_CHAIN",
    "SPLITS",
    "Answer",
    "Problem",
    "Step",
    "sample_problems",
]

KINDS = ("one_question", "two_questions", "mixed", "long_chain", "distractors")
"""Kinds of problems that :func:`sample_problems` draws."""
SPLITS = ("held_out", "train")
"""Problems that the demo model has never seen, and those that it learnt from."""
LONG_CHAIN = (2, 8)
"""Fewest and most steps of a long chain."""

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
        kind (str): ``"one_question"``, ``"two_questions"``, ``"long_chain"`` or
            ``"distractors"``.
    """

    prompt: str
    completion: str
    facts: tuple[Span, ...]
    answers: tuple[Answer, ...]
    steps: tuple[Step, ...]
    kind: str


class Fact(NamedTuple):
    """``person`` has ``number`` (more than ``other``, if there is one) ``item``."""

    person: str
    item: str
    number: int
    other: str | None

    def sentence(self) -> str:
        """The fact as problems state it."""
        if self.other is None:
            return f"{self.person} has {self.number} {self.item}."
        return f"{self.person} has {self.number} more {self.item} than {self.other}."


class Draft(NamedTuple):
    """The facts of a problem in the order told, and the chains asked about.

    A chain begins with a fact that stands alone; each further fact counts on from the
    one before it. The question asks for the person of the last one.
    """

    told: list[Fact]
    chains: list[list[Fact]]


class Worked(NamedTuple):
    """A sentence of a worked answer: a step or, for a whole chain, its answer.

    ``facts`` are those used directly by a step, and all of them for an answer.
    """

    text: str
    span: Span
    facts: list[Fact]
    steps: tuple[int, ...]


def sample_problems(
    n: int,
    seed: int,
    kind: str = "one_question",
    *,
    split: str = "held_out",
    steps: int | None = None,
) -> tuple[Problem, ...]:
    """Problems drawn at random, the same for the same arguments.

    A prompt belongs to the held-out part or to the training part by a checksum of its
    text, so no sample of one part shares a prompt with a sample of the other. The first
    ``n`` problems of a longer sample are the sample of length ``n``.

    - ``"one_question"``: one answer, of one or two steps, among 6 to 9 facts.
    - ``"two_questions"``: two answers, each of one or two steps, among 6 to 9 facts.
    - ``"long_chain"``: one answer, of 2 to 8 steps. The question says whom to start
      with, and 2 to 5 facts more are told, none of which leads to the answer.
    - ``"distractors"``: one answer, of one or two steps, among 12 to 20 facts.

    Args:
        n (int): number of problems.
        seed (int): seed of the draw. The global random state is neither read nor
            changed.
        kind (str, optional): ``"one_question"``, ``"two_questions"``, ``"mixed"``
            (either of these, with equal chance), ``"long_chain"`` or
            ``"distractors"``. Default: ``"one_question"``
        split (str, optional): ``"held_out"``, which the demo model was never trained
            on, or ``"train"``. Training problems have numbers from 1 to 9, held-out
            problems from 2 to 9, where the plural is right. Default: ``"held_out"``
        steps (int, optional): exact number of steps of every ``"long_chain"``, from 2
            to 8. Default: any of them, with equal chance

    Returns:
        tuple[Problem, ...]: ``n`` problems.

    Raises:
        ValueError: if ``n`` is negative, ``kind`` or ``split`` is unknown, or ``steps``
            is out of its range or given for another kind.

    Example:
        >>> problem = sample_problems(1, seed=0)[0]
        >>> problem.answers[0].text.startswith("The answer is ")
        True
        >>> len(sample_problems(1, seed=0, kind="long_chain", steps=5)[0].steps)
        5
    """
    check_sample("problem", n, kind, KINDS, split)
    stream = f"{split} {kind} {seed}"
    if steps is not None:
        if kind != "long_chain":
            raise ValueError(
                f"steps: only problems of the kind 'long_chain' have a number of steps "
                f"to choose, not {kind!r}. Pass kind='long_chain', or leave it out."
            )
        if not LONG_CHAIN[0] <= steps <= LONG_CHAIN[1]:
            raise ValueError(
                f"steps: must be from {LONG_CHAIN[0]} to {LONG_CHAIN[1]}, not {steps}. "
                "Pass how many steps each answer is to take."
            )
        stream += f" {steps}"
    rng = random.Random(stream)
    problems: list[Problem] = []
    while len(problems) < n:
        problem = draw_kind(
            rng, kind, smallest=1 if split == "train" else 2, steps=steps
        )
        if is_held_out(problem.prompt) == (split == "held_out"):
            problems.append(problem)
    return tuple(problems)


def check_sample(
    noun: str, n: int, kind: str, kinds: Sequence[str], split: str
) -> None:
    """Refuse arguments of a sample that nothing can be drawn for."""
    if n < 0:
        raise ValueError(
            f"n: the number of {noun}s must be 0 or more, not {n}. "
            f"Pass how many {noun}s to draw."
        )
    if kind not in kinds:
        raise ValueError(
            f"kind: must be one of {', '.join(map(repr, kinds))}, not {kind!r}. "
            f"Pass the kind of {noun} to draw."
        )
    if split not in SPLITS:
        raise ValueError(
            f"split: must be one of {', '.join(map(repr, SPLITS))}, not {split!r}. "
            f"Pass the part of the {noun}s to draw from."
        )


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the part that the demo model is not trained on."""
    return zlib.crc32(prompt.encode()) % _HELD_OUT_SHARE == 0


def draw_kind(
    rng: random.Random,
    kind: str,
    *,
    same_item: float = 0.25,
    smallest: int = 1,
    steps: int | None = None,
) -> Problem:
    """One problem of a kind, of either part.

    Args:
        rng (random.Random): where the draw comes from.
        kind (str): one of :data:`KINDS`.
        same_item (float, optional): as in :func:`draw_draft`. Default: ``0.25``
        smallest (int, optional): smallest number in a fact. Default: ``1``
        steps (int, optional): number of steps of a long chain. Default: drawn

    Returns:
        Problem: the problem.
    """
    if kind == "long_chain":
        length = rng.randint(*LONG_CHAIN) if steps is None else steps
        draft = draw_draft(
            rng,
            1,
            facts=(length + 3, length + 6),
            steps=(length, length),
            same_item=same_item,
            smallest=smallest,
        )
    elif kind == "distractors":
        draft = draw_draft(
            rng, 1, facts=(12, 20), same_item=same_item, smallest=smallest
        )
    else:
        questions = {"one_question": 1, "two_questions": 2}.get(kind)
        if questions is None:
            questions = rng.randint(1, 2)
        kind = _KIND_OF[questions]
        draft = draw_draft(rng, questions, same_item=same_item, smallest=smallest)
    return problem_of(draft, kind)


def draw_draft(
    rng: random.Random,
    questions: int,
    *,
    facts: tuple[int, int] = (6, 9),
    steps: tuple[int, int] = (1, 2),
    same_item: float = 0.25,
    same_person: float = 0.0,
    smallest: int = 1,
) -> Draft:
    """The facts of one problem: chains, the first of them asked about.

    Args:
        rng (random.Random): where the draw comes from.
        questions (int): number of questions, 1 to 3.
        facts (tuple[int, int], optional): fewest and most facts, where the questions do
            not need more. Default: ``(6, 9)``
        steps (tuple[int, int], optional): fewest and most steps to an answer.
            Default: ``(1, 2)``
        same_item (float, optional): how often a later chain is about an item met
            before, from 0 to 1. Default: ``0.25``
        same_person (float, optional): how often a later fact is about a person met
            before, with another item. Default: ``0.0``
        smallest (int, optional): smallest number in a fact. Default: ``1``

    Returns:
        Draft: the facts, in the order told, and the chains asked about.
    """
    n_facts = rng.randint(*facts)
    asked = [rng.randint(*steps) for _ in range(questions)]
    lengths = [relations + 1 for relations in asked]
    for question in range(questions):
        if sum(lengths) < n_facts and rng.random() < _EXTEND:
            lengths[question] += 1
    while sum(lengths) < n_facts:
        lengths.append(min(rng.choice((1, 2, 2, 3, 3)), n_facts - sum(lengths)))
    stories = _draw_stories(rng, lengths, same_item, same_person, smallest)
    told = [fact for story in stories for fact in story]
    rng.shuffle(told)
    chains = [
        story[: relations + 1] for story, relations in zip(stories, asked, strict=False)
    ]
    return Draft(told, chains)


def problem_of(draft: Draft, kind: str | None = None) -> Problem:
    """The problem that tells a draft's facts and asks for its chains.

    Args:
        draft (Draft): facts and chains.
        kind (str, optional): what to call it; the question of a ``"long_chain"`` says
            whom to start with. Default: by the number of questions

    Returns:
        Problem: the problem.
    """
    prompt, spans = tell(draft.told)
    ranges = dict(zip(draft.told, spans, strict=True))
    questions = questions_of(draft.chains, starting=kind == "long_chain")
    prompt += " " + " ".join(questions)
    completion, steps, answers = work_out(draft.chains)
    parts = [
        (text, span, tuple(sorted(ranges[fact] for fact in facts)), earlier)
        for text, span, facts, earlier in [*steps, *answers]
    ]
    return Problem(
        prompt=prompt,
        completion=completion,
        facts=spans,
        answers=tuple(Answer(*part) for part in parts[len(steps) :]),
        steps=tuple(Step(*part) for part in parts[: len(steps)]),
        kind=_KIND_OF[len(draft.chains)] if kind is None else kind,
    )


def tell(facts: Iterable[Fact]) -> tuple[str, tuple[Span, ...]]:
    """The facts as one text, and the character range of each sentence."""
    text = ""
    spans: list[Span] = []
    for fact in facts:
        text += " " * bool(text)
        spans.append((len(text), len(text) + len(fact.sentence())))
        text += fact.sentence()
    return text, tuple(spans)


def work_out(chains: Sequence[list[Fact]]) -> tuple[str, list[Worked], list[Worked]]:
    """The worked answer to one question per chain, its steps and its answers."""
    completion = ""
    steps: list[Worked] = []
    answers: list[Worked] = []
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
            steps.append(Worked(text, span, used, earlier))
        ordinal = "" if len(chains) == 1 else ORDINALS[question] + " "
        text = f"The {ordinal}answer is {total}."
        span = (len(completion) + 1, len(completion) + 1 + len(text))
        completion += " " + text
        answers.append(Worked(text, span, chain, (len(steps) - 1,)))
    return completion, steps, answers


def _draw_stories(
    rng: random.Random,
    lengths: list[int],
    same_item: float,
    same_person: float,
    smallest: int,
) -> list[list[Fact]]:
    """Chains of facts, one per length, each about one item.

    No two facts say how many of one item the same person has.
    """
    taken: set[tuple[str, str]] = set()
    stories: list[list[Fact]] = []
    for length in lengths:
        items = sorted({item for _, item in taken})
        new_items = [item for item in ITEMS if item not in items]
        again = not new_items or (items and rng.random() < same_item)
        item = rng.choice(items if again else new_items)
        story: list[Fact] = []
        other: str | None = None
        for _ in range(length):
            met = {person for person, _ in taken}
            old = sorted(person for person in met if (person, item) not in taken)
            new = [person for person in NAMES if person not in met]
            person = rng.choice(old if old and rng.random() < same_person else new)
            taken.add((person, item))
            story.append(Fact(person, item, rng.randint(smallest, 9), other))
            other = person
        stories.append(story)
    return stories


def questions_of(chains: Sequence[list[Fact]], *, starting: bool = False) -> list[str]:
    """The questions that ask for the end of each chain, one of it with its start."""
    plain = [
        f"how many {chain[-1].item} does {chain[-1].person} have?" for chain in chains
    ]
    if starting:
        return [f"Starting with {chains[0][0].person}, {plain[0]}"]
    if len(plain) == 1:
        return ["H" + plain[0][1:]]
    return [
        f"{ordinal.capitalize()}, {question}"
        for ordinal, question in zip(ORDINALS, plain, strict=False)
    ]


def vocabulary() -> list[str]:
    """All words of problems and conversations, each once."""
    words = [*NAMES, *ITEMS, *ORDINALS, *(word.capitalize() for word in ORDINALS)]
    words += "has more than How how many does have The answer is".split()
    words += "Starting with Look up".split()
    words += [str(number) for number in range(100)]
    return words
