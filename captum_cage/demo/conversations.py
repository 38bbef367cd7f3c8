"""Conversations in which a tool's result changes a worked answer, with known truth.

A user tells facts, asks one question and has somebody looked up; the model writes the
call, a tool returns one more fact from outside, and the model writes the worked answer.
It is known which sentences before it each generated sentence depends on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from captum_cage.demo.problems import (
    NAMES,
    Draft,
    Fact,
    Span,
    check_sample,
    draw_draft,
    is_held_out,
    questions_of,
    tell,
    work_out,
)

__all__ = [
    "CONVERSATION_KINDS",
    "Conversation",
    "Source",
    "Statement",
    "sample_conversations",
]

CONVERSATION_KINDS = ("tool", "override", "irrelevant", "mixed")
"""Kinds of conversations that :func:`sample_conversations` draws."""

_BY_SYSTEM = 0.3  # how often a system message has somebody looked up, not the user

Message = dict[str, str]


class Source(NamedTuple):
    """Where a sentence that the model did not write stands.

    Attributes:
        message (int): index of its message.
        span (tuple[int, int]): its character range in the content of the message.
    """

    message: int
    span: Span


@dataclass(frozen=True)
class Statement:
    """A sentence that the model wrote, and what it depends on.

    The call depends on the sentence that has somebody looked up and on the question,
    which names the item. Steps and answers depend on facts. That the question says
    whom to work towards, and that the call brought the tool's result about, is not
    counted.

    Attributes:
        text (str): the sentence.
        message (int): index of its message.
        span (tuple[int, int]): its character range in the content of the message.
        kind (str): ``"call"``, ``"step"`` or ``"answer"``.
        sources (tuple[Source, ...]): the sentences from outside that it uses directly.
            An answer uses its last step alone and has none.
        statements (tuple[int, ...]): indices of the earlier statements that it uses
            directly.
        all_sources (tuple[Source, ...]): all sentences from outside that it depends on,
            through any number of statements, in the order in which they stand.
    """

    text: str
    message: int
    span: Span
    kind: str
    sources: tuple[Source, ...]
    statements: tuple[int, ...]
    all_sources: tuple[Source, ...]


@dataclass(frozen=True)
class Conversation:
    """A conversation with a looked-up fact, and the dependencies of what was generated.

    Attributes:
        messages (tuple[dict[str, str], ...]): all of it, as ``apply_chat_template``
            takes it: a system message in some, then user, assistant (the call), tool
            and assistant (the worked answer). The assistant's contents are exactly what
            the model generates after ``<|assistant|>``, without ``<|end|>``: they begin
            with a space, as the completion of a problem does. No other content does.
        statements (tuple[Statement, ...]): the generated sentences in the order
            written: the call, the steps and the answer.
        facts (tuple[Source, ...]): all facts, the user's and then the tool's.
        lookup (Source): the sentence that has somebody looked up.
        question (Source): the question.
        result (Source): the fact that the tool returned.
        overridden (Source or None): the user's fact that the result contradicts, if
            there is one. No statement depends on it.
        kind (str): ``"tool"``, ``"override"`` or ``"irrelevant"``.
    """

    messages: tuple[Message, ...]
    statements: tuple[Statement, ...]
    facts: tuple[Source, ...]
    lookup: Source
    question: Source
    result: Source
    overridden: Source | None
    kind: str

    @property
    def before_call(self) -> list[Message]:
        """The messages after which the model writes the call."""
        return [dict(message) for message in self.messages[:-3]]

    @property
    def before_answer(self) -> list[Message]:
        """The messages after which the model writes the worked answer."""
        return [dict(message) for message in self.messages[:-1]]

    @property
    def is_held_out(self) -> bool:
        """Whether it belongs to the part that the demo model is not trained on."""
        contents = [message["content"] for message in self.before_call]
        return is_held_out("\n".join(contents))

    @property
    def call(self) -> Statement:
        """The generated sentence that looks somebody up."""
        return self.statements[0]

    @property
    def answer(self) -> Statement:
        """The generated sentence that answers the question."""
        return self.statements[-1]

    def text(self, source: Source) -> str:
        """The sentence that stands at a source."""
        return self.messages[source.message]["content"][slice(*source.span)]


def sample_conversations(
    n: int, seed: int, kind: str = "tool", *, split: str = "held_out"
) -> tuple[Conversation, ...]:
    """Conversations drawn at random, the same for the same arguments.

    Facts and question are those of a problem of one question: 6 to 9 facts, one or two
    steps.

    - ``"tool"``: the user leaves out one of the facts that the answer takes, and the
      tool returns it.
    - ``"override"``: the tool returns one of these facts with another number than the
      user gave, and the tool's number counts.
    - ``"irrelevant"``: somebody else is looked up, whom the answer does not depend on,
      and the result must not matter, nor that it may contradict the user.

    A conversation belongs to the held-out part or to the training part by a checksum of
    the messages before the call. The first ``n`` conversations of a longer sample are
    the sample of length ``n``.

    Args:
        n (int): number of conversations.
        seed (int): seed of the draw. The global random state is neither read nor
            changed.
        kind (str, optional): one of the kinds above, or ``"mixed"`` (any of them, with
            equal chance). Default: ``"tool"``
        split (str, optional): ``"held_out"``, which the demo model was never trained
            on, or ``"train"``. Training facts have numbers from 1 to 9, held-out facts
            from 2 to 9, where the plural is right. Default: ``"held_out"``

    Returns:
        tuple[Conversation, ...]: ``n`` conversations.

    Raises:
        ValueError: if ``n`` is negative, or ``kind`` or ``split`` is unknown.

    Example:
        >>> conversation = sample_conversations(1, seed=0)[0]
        >>> for message in conversation.messages[-3:]:
        ...     print(f"{message['role']}: {message['content']}")
        assistant:  Look up Uma's coins.
        tool: Uma has 2 more coins than Ana.
        assistant:  Uma has Ana's 6 + 2 = 8 coins. The answer is 8.
        >>> [conversation.text(source) for source in conversation.answer.all_sources]
        ['Ana has 6 coins.', 'Uma has 2 more coins than Ana.']
    """
    check_sample("conversation", n, kind, CONVERSATION_KINDS, split)
    rng = random.Random(f"{split} conversation {kind} {seed}")
    conversations: list[Conversation] = []
    while len(conversations) < n:
        drawn = draw_conversation(rng, kind, smallest=1 if split == "train" else 2)
        if drawn.is_held_out == (split == "held_out"):
            conversations.append(drawn)
    return tuple(conversations)


def draw_conversation(
    rng: random.Random, kind: str, *, same_item: float = 0.25, smallest: int = 1
) -> Conversation:
    """One conversation of a kind, of either part.

    Args:
        rng (random.Random): where the draw comes from.
        kind (str): one of :data:`CONVERSATION_KINDS`.
        same_item (float, optional): how often a later chain of facts is about an item
            met before, from 0 to 1. Default: ``0.25``
        smallest (int, optional): smallest number in a fact. Default: ``1``

    Returns:
        Conversation: the conversation.
    """
    if kind == "mixed":
        kind = rng.choice(CONVERSATION_KINDS[:-1])
    draft = draw_draft(rng, 1, same_item=same_item, smallest=smallest)
    (chain,) = draft.chains
    told = list(draft.told)
    stale: Fact | None = None
    if kind == "irrelevant":
        result = _beside_the_point(rng, draft, smallest)
        stale = next((fact for fact in told if _same_matter(fact, result)), None)
    else:
        result = rng.choice(chain)
        place = told.index(result)
        if kind == "override":
            stale = result._replace(number=_another(rng, result.number, smallest))
            told[place] = stale
        else:
            del told[place]
    return _conversation(told, chain, result, stale, kind, rng.random() < _BY_SYSTEM)


def _beside_the_point(rng: random.Random, draft: Draft, smallest: int) -> Fact:
    """A fact about the item asked for that leads nowhere.

    Its person is not in the chain. If the user said how many of the item the person
    has, it says so with another number.
    """
    (chain,) = draft.chains
    inside = {fact.person for fact in chain}
    person = rng.choice([name for name in NAMES if name not in inside])
    told = [fact for fact in draft.told if fact.person == person]
    for fact in told:
        if fact.item == chain[0].item:
            return fact._replace(number=_another(rng, fact.number, smallest))
    outside = sorted({fact.person for fact in draft.told} - inside - {person})
    other = rng.choice(outside) if outside and rng.random() < 0.5 else None
    return Fact(person, chain[0].item, rng.randint(smallest, 9), other)


def _same_matter(fact: Fact, other: Fact) -> bool:
    return (fact.person, fact.item) == (other.person, other.item)


def _another(rng: random.Random, number: int, smallest: int) -> int:
    return rng.choice([other for other in range(smallest, 10) if other != number])


def _conversation(
    told: list[Fact],
    chain: list[Fact],
    result: Fact,
    stale: Fact | None,
    kind: str,
    by_system: bool,
) -> Conversation:
    """The conversation in which ``told`` is told and ``result`` is looked up."""
    user = 1 if by_system else 0
    instruction = f"Look up {result.person}."
    story, spans = tell(told)
    (asked,) = questions_of([chain])
    opening = "" if by_system else f"{instruction} "
    content = f"{opening}{story} {asked}"
    call = f"Look up {result.person}'s {result.item}."
    completion, steps, answers = work_out([chain])
    contents = [
        ("user", content),
        ("assistant", f" {call}"),
        ("tool", result.sentence()),
        ("assistant", completion),
    ]
    if by_system:
        contents.insert(0, ("system", instruction))

    lookup = Source(0, (0, len(instruction)))
    question = Source(user, (len(content) - len(asked), len(content)))
    place_of = {
        fact: Source(user, (start + len(opening), stop + len(opening)))
        for fact, (start, stop) in zip(told, spans, strict=True)
    }
    place_of[result] = Source(user + 2, (0, len(result.sentence())))
    statements = [
        Statement(
            call,
            user + 1,
            (1, 1 + len(call)),
            "call",
            (lookup, question),
            (),
            (lookup, question),
        )
    ]
    for worked in [*steps, *answers]:
        used = tuple(sorted(place_of[fact] for fact in worked.facts))
        earlier = tuple(step + 1 for step in worked.steps)  # the call comes first
        is_step = len(statements) <= len(steps)
        origins = set(used).union(*(statements[i].all_sources for i in earlier))
        statements.append(
            Statement(
                worked.text,
                user + 3,
                worked.span,
                "step" if is_step else "answer",
                used if is_step else (),
                earlier,
                tuple(sorted(origins)),
            )
        )
    return Conversation(
        messages=tuple({"role": role, "content": text} for role, text in contents),
        statements=tuple(statements),
        facts=tuple(sorted(place_of.values())),
        lookup=lookup,
        question=question,
        result=place_of[result],
        overridden=None if stale is None else place_of[stale],
        kind=kind,
    )
