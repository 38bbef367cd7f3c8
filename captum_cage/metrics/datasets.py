"""Texts whose sources are known to matter or not: generators, and public data sets."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from captum_cage._checks import complaint, shown, whole_number
from captum_cage.result import GraphAttributionResult
from captum_cage.text import Span, sentence_spans

__all__ = [
    "LOADERS",
    "Example",
    "facts",
    "gsm8k",
    "hotpotqa",
    "morehopqa",
    "multi_hop",
    "multiarith",
    "needles",
    "ruler",
    "unrelated",
    "variable_tracking",
]

UNRELATED = " Unrelated Sentence."
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Example:
    """A text to explain, and what is known of it.

    Attributes:
        prompt (str): what the model gets.
        completion (str or None): what it wrote, fixed; None where it is to write it.
        explain (str or None): the stretch of what was written that is explained; None
            for its last sentence.
        gold (tuple[tuple[int, int], ...]): ranges of the prompt that are known to
            matter; empty where that is not known.
        sources (tuple[tuple[int, int], ...] or None): ranges of the prompt that may be
            taken away; None for all.
        answer (str or None): the right answer.
        statement (optional): what must come out again, as
            :class:`captum_cage.metrics.Evaluator` takes it. Default: None, the
            explained text
        kind (str): of which kind it is.
        meta (Mapping): where it comes from.
    """

    prompt: str
    completion: str | None = None
    explain: str | None = None
    gold: tuple[Span, ...] = ()
    sources: tuple[Span, ...] | None = None
    answer: str | None = None
    statement: Any = None
    kind: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def sources_in(self, result: GraphAttributionResult) -> list[int] | None:
        """Positions of a result's sources that may be taken away; None for all."""
        if self.sources is None:
            return None
        return self._within(result, self.sources)

    def gold_in(self, result: GraphAttributionResult) -> list[int]:
        """Positions of a result's sources that are known to matter."""
        return self._within(result, self.gold)

    def _within(
        self, result: GraphAttributionResult, spans: Sequence[Span]
    ) -> list[int]:
        """Positions of sources that lie in ranges of the prompt, wherever it stands."""
        shift = result.source_text.find(self.prompt)
        if shift < 0:
            raise ValueError(
                complaint(
                    "result",
                    "its source text must hold the prompt as it is",
                    f"it reads {result.source_text[:60]!r}",
                    "Explain the text of this example.",
                )
            )
        first = int(result.graph.generated_units[0])
        return [
            place
            # Other sources stand in the text after the prompt.
            for place, unit in enumerate(result.units[:first])
            if unit.span is not None
            and any(
                start + shift < unit.span[1] and unit.span[0] < stop + shift
                for start, stop in spans
            )
        ]

    def explained_in(self, text: str) -> str:
        """The stretch of a generated text that is explained.

        Args:
            text (str): what was written.

        Raises:
            ValueError: if there is no visible text.
        """
        if self.explain is not None:
            return self.explain
        ends = [text[start:stop].strip() for start, stop in sentence_spans(text)]
        visible = [sentence for sentence in ends if sentence]
        if not visible:
            raise ValueError(
                complaint(
                    "completion",
                    "must have a sentence to explain",
                    f"{text!r} came",
                    "Let the model write more, or name what to explain.",
                )
            )
        return visible[-1]


class _Prompt:
    """A prompt that is put together, with the ranges of its pieces."""

    def __init__(self, between: str = " ") -> None:
        self.text = ""
        self._between = between

    def add(self, piece: str, between: str | None = None) -> Span:
        """Append a piece, and say where it stands."""
        if self.text:
            self.text += self._between if between is None else between
        start = len(self.text)
        self.text += piece
        return start, len(self.text)


def _texts(where: str, texts: Iterable[str], least: int) -> list[str]:
    listed = [texts] if isinstance(texts, str) else list(texts)
    found = [text.strip() for text in listed if isinstance(text, str) and text.strip()]
    if len(found) != len(listed) or len(found) < least:
        raise ValueError(
            complaint(
                where,
                f"must be at least {least} texts that are not empty",
                f"{len(listed)} came, {len(found)} of them texts",
                "Pass more sentences.",
            )
        )
    return found


def facts(
    texts: Iterable[str],
    count: int,
    *,
    told: int = 9,
    listed: int = 3,
    explained: int = 2,
    in_order: bool = False,
    seed: int = 0,
) -> Iterator[Example]:
    """The Facts recipe: some of the facts told are listed, and some of these explained.

    The prompt tells ``told`` facts and asks for ``listed`` of them; the fixed
    completion lists as many of them, drawn at random. Explained are ``explained`` of
    those side by side, which come from the same facts of the prompt alone.

    Args:
        texts (Iterable[str]): sentences to draw from.
        count (int): number of examples.
        told (int, optional): facts in a prompt. Default: ``9``
        listed (int, optional): facts in a completion. Default: ``3``
        explained (int, optional): facts that are explained. Default: ``2``
        in_order (bool, optional): as the authors' code has it, list the facts in the
            order in which they are told, and ask on a line of its own. Default:
            ``False``
        seed (int, optional): of the draw. Default: ``0``

    Raises:
        ValueError: if there are too few texts, or more is explained than listed or
            listed than told.

    Source: Walker and Ewetz (2025), :cite:p:`walker2025cage`.

    Example:
        >>> example = next(facts([f"Fact {i} is true." for i in range(12)], 1))
        >>> len(example.sources), len(example.gold)
        (9, 2)
    """
    # A fact that is told twice would have two sources.
    known = _texts("texts", dict.fromkeys(_texts("texts", texts, told)), told)
    if not 1 <= explained <= listed <= told:
        raise ValueError(
            complaint(
                "listed",
                "explained, listed and told must not fall",
                f"{explained}, {listed} and {told} came",
                "List fewer facts than are told, and explain some of these.",
            )
        )
    rng = random.Random(f"facts {seed}")
    for _ in range(whole_number("count", count, remedy="Pass how many to draw.")):
        chosen = rng.sample(known, told)
        prompt = _Prompt()
        spans = [prompt.add(text) for text in chosen]
        prompt.add(f"List {listed} of these facts.", "\n" if in_order else None)
        wanted = rng.sample(range(told), listed)
        if in_order:
            wanted.sort()
        first = rng.randint(0, listed - explained)
        matter = wanted[first : first + explained]
        yield Example(
            prompt.text,
            " " + " ".join(chosen[place] for place in wanted),
            " ".join(chosen[place] for place in matter),
            tuple(spans[place] for place in sorted(matter)),
            tuple(spans),
            kind="facts",
        )


def unrelated(
    prompts: Iterable[str | Example],
    *,
    sentence: str = UNRELATED,
    question_apart: bool = False,
) -> Iterator[Example]:
    """The Math recipe: an unrelated sentence after every sentence of a prompt.

    Known to matter are the sentences that were there, all of them.

    Args:
        prompts (Iterable[str or Example]): problems, in any words.
        sentence (str, optional): what is inserted, with the space before it. Default:
            ``" Unrelated Sentence."``
        question_apart (bool, optional): begin a line with the last sentence of a
            prompt, as the authors' code does. Default: ``False``

    Raises:
        ValueError: if the sentence is empty.

    Source: Walker and Ewetz (2025), :cite:p:`walker2025cage`.

    Example:
        >>> next(unrelated(["Ana has 3 pens. How many?"])).prompt
        'Ana has 3 pens. Unrelated Sentence. How many? Unrelated Sentence.'
    """
    _texts("sentence", sentence, 1)
    for given in [prompts] if isinstance(prompts, str) else prompts:
        example = Example(given) if isinstance(given, str) else given
        text, done, gold, sources = "", 0, [], []
        spans = sentence_spans(example.prompt)
        for number, (start, stop) in enumerate(spans, 1):
            own = example.prompt[start:stop]
            lead = len(own) - len(own.lstrip())
            visible = own.strip()
            is_apart = question_apart and 1 < number == len(spans)
            text += "\n" if is_apart else example.prompt[done : start + lead]
            gold.append((len(text), len(text) + len(visible)))
            text += visible
            added = len(sentence) - len(sentence.lstrip())
            sources += [gold[-1], (len(text) + added, len(text) + len(sentence))]
            text += sentence
            done = start + lead + len(visible)
        text += example.prompt[done:]
        yield Example(
            text,
            example.completion,
            example.explain,
            tuple(gold),
            tuple(sources),
            example.answer,
            example.statement,
            "unrelated sentences",
            example.meta,
        )


def needles(
    haystack: Iterable[str],
    count: int,
    *,
    length: int = 40,
    keys: int = 4,
    seed: int = 0,
) -> Iterator[Example]:
    """The needle task of RULER: a number that belongs to a key, among other text.

    Sentences of the haystack, and in random places between them one sentence for each
    of ``keys`` keys that gives a number; the question asks for the number of one key.

    Args:
        haystack (Iterable[str]): sentences to draw from.
        count (int): number of examples.
        length (int, optional): sentences of the haystack in a prompt. Default: ``40``
        keys (int, optional): needles, one of which is asked for. Default: ``4``
        seed (int, optional): of the draw. Default: ``0``

    Raises:
        ValueError: if there is no haystack, or there are more keys than can be told
            apart.

    Source: Hsieh et al. (2024), RULER, :cite:p:`hsieh2024ruler`.

    Example:
        >>> example = next(needles(["The sky is blue."], 1, length=3, keys=2))
        >>> example.answer in example.prompt[slice(*example.gold[0])]
        True
    """
    known = _texts("haystack", haystack, 1)
    rng = random.Random(f"needles {seed}")
    remedy = f"There are {len(_KEYS)} keys."
    number_of_keys = whole_number(
        "keys", keys, minimum=1, stop=len(_KEYS) + 1, remedy=remedy
    )
    whole_number("length", length, remedy="Pass the number of sentences.")
    for _ in range(whole_number("count", count, remedy="Pass how many to draw.")):
        names = rng.sample(_KEYS, number_of_keys)
        numbers = rng.sample(range(1_000_000, 10_000_000), number_of_keys)
        pieces = [(rng.choice(known), -1) for _ in range(length)]
        for place, (name, number) in enumerate(zip(names, numbers, strict=True)):
            sentence = f"One of the special magic numbers for {name} is: {number}."
            pieces.insert(rng.randint(0, len(pieces)), (sentence, place))
        prompt = _Prompt()
        spans = [(prompt.add(text), place) for text, place in pieces]
        prompt.add(
            f"What is the special magic number for {names[0]} mentioned in the "
            "provided text?"
        )
        answer = str(numbers[0])
        yield Example(
            prompt.text,
            f" The special magic number for {names[0]} mentioned in the provided text "
            f"is: {answer}.",
            answer,
            tuple(span for span, place in spans if place == 0),
            tuple(span for span, _ in spans),
            answer,
            kind="needle",
        )


_KEYS = (
    "amber basil cedar delta ember fjord grove heron ivory jade kelp lilac maple north "
    "onyx pearl quartz river sage tulip umber velvet willow yarrow zephyr"
).split()


def variable_tracking(
    count: int,
    *,
    chains: int = 3,
    hops: int = 3,
    noise: Iterable[str] = (),
    length: int = 0,
    seed: int = 0,
) -> Iterator[Example]:
    """The variable tracking task of RULER: assignments that lead on from each other.

    ``VAR A = 12345``, ``VAR B = VAR A`` and so on, in several chains whose statements
    are mixed in order; the question asks for all variables with one value. The fixed
    completion names them.

    Args:
        count (int): number of examples.
        chains (int, optional): number of chains. Default: ``3``
        hops (int, optional): assignments after the first of each chain. Default: ``3``
        noise (Iterable[str], optional): sentences to mix in. Default: none
        length (int, optional): how many of them. Default: ``0``
        seed (int, optional): of the draw. Default: ``0``

    Raises:
        ValueError: if there are more variables than names of three letters, or noise is
            wanted and none came.

    Source: Hsieh et al. (2024), RULER, :cite:p:`hsieh2024ruler`.

    Example:
        >>> example = next(variable_tracking(1, chains=2, hops=1))
        >>> len(example.gold), len(example.sources)
        (2, 4)
    """
    whole_number("length", length, remedy="Pass the number of sentences.")
    known = _texts("noise", noise, 1) if length else []
    rng = random.Random(f"variables {seed}")
    remedy = "Pass how many, at least one."
    whole_number("chains", chains, minimum=1, remedy=remedy)
    whole_number("hops", hops, minimum=0, remedy=remedy)
    if chains * (hops + 1) > (most := len(_LETTERS) ** 3):
        raise ValueError(
            complaint(
                "chains",
                f"must have at most {most} variables in all, one for each name",
                f"{chains} chains of {hops + 1} came",
                "Pass fewer chains or hops.",
            )
        )
    for _ in range(whole_number("count", count, remedy="Pass how many to draw.")):
        names = _names(rng, chains * (hops + 1))
        values = rng.sample(range(10_000, 100_000), chains)
        queues = []
        for chain, value in enumerate(values):
            own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
            queue = [f"VAR {own[0]} = {value}."]
            queue += [f"VAR {new} = VAR {old}." for old, new in pairwise(own)]
            queues.append([(text, chain) for text in queue])
        queues.append([(rng.choice(known), -1) for _ in range(length)])
        prompt = _Prompt()
        spans = []
        while any(queues):
            turn = rng.choices(queues, [len(queue) for queue in queues])[0]
            text, chain = turn.pop(0)
            spans.append((prompt.add(text), chain))
        prompt.add(
            f"Find all variables that are assigned the value {values[0]} in the text "
            "above."
        )
        answer = " ".join(names[: hops + 1])
        yield Example(
            prompt.text,
            f" The variables that are assigned the value {values[0]} are: {answer}.",
            answer,
            tuple(span for span, chain in spans if chain == 0),
            tuple(span for span, _ in spans),
            answer,
            kind="variable tracking",
        )


def multi_hop(
    texts: Iterable[str],
    count: int,
    *,
    hops: int = 2,
    chains: int = 3,
    length: int = 40,
    seed: int = 0,
) -> Iterator[Example]:
    """Questions that need several statements, hidden among other text in any order.

    ``The mentor of Ana is Leo.`` and ``The locker number of Leo is 1234567.``: the
    question asks for the locker number of the mentor of Ana. There are ``chains``
    chains of such statements about the same relations, each with persons and a number
    of its own, and only one leads to the answer. The fixed completion goes through the
    chain, a sentence for each hop; explained is the number at its end.

    Args:
        texts (Iterable[str]): sentences to hide the statements among.
        count (int): number of examples.
        hops (int, optional): statements of a chain, all of which are needed. Default:
            ``2``
        chains (int, optional): number of chains, one of which is asked for. Default:
            ``3``
        length (int, optional): other sentences in a prompt. Default: ``40``
        seed (int, optional): of the draw. Default: ``0``

    Raises:
        ValueError: if there are no texts, or more persons or relations are needed than
            there are.

    Source: in the manner of Yang et al. (2018), HotpotQA, :cite:p:`yang2018hotpotqa`,
    whose questions need supporting facts from several places, as chains of hops hidden
    in other text (Hsieh et al. 2024, RULER, :cite:p:`hsieh2024ruler`).

    Example:
        >>> example = next(multi_hop(["The sky is blue."], 1, length=3, chains=2))
        >>> len(example.gold), len(example.sources)
        (2, 7)
    """
    known = _texts("texts", texts, 1)
    rng = random.Random(f"multi hop {seed}")
    stop = len(_RELATIONS) + 2
    remedy = f"There are {len(_RELATIONS)} relations, and the number at the end."
    whole_number("hops", hops, minimum=1, stop=stop, remedy=remedy)
    whole_number("chains", chains, minimum=1, remedy="Pass how many, at least one.")
    whole_number("length", length, remedy="Pass the number of sentences.")
    if chains * hops > len(_PERSONS):
        raise ValueError(
            complaint(
                "chains",
                f"must have at most {len(_PERSONS)} persons in all, one for each hop",
                f"{chains} chains of {hops} came",
                "Pass fewer chains or hops.",
            )
        )
    for _ in range(whole_number("count", count, remedy="Pass how many to draw.")):
        persons = rng.sample(_PERSONS, chains * hops)
        relations = rng.sample(_RELATIONS, hops - 1)
        numbers = rng.sample(range(1_000_000, 10_000_000), chains)
        hidden = []
        for chain, number in enumerate(numbers):
            own = persons[chain * hops : (chain + 1) * hops]
            hidden.append(
                [
                    f"The {relation} of {one} is {other}."
                    for relation, (one, other) in zip(
                        relations, pairwise(own), strict=True
                    )
                ]
                + [f"The locker number of {own[-1]} is {number}."]
            )
        pieces = [(rng.choice(known), -1) for _ in range(length)]
        for chain, statements in enumerate(hidden):
            for statement in statements:
                pieces.insert(rng.randint(0, len(pieces)), (statement, chain))
        prompt = _Prompt()
        spans = [(prompt.add(text), chain) for text, chain in pieces]
        names = ("locker number", *reversed(relations))
        asked = " of ".join(f"the {name}" for name in names)
        prompt.add(f"What is {asked} of {persons[0]}?")
        answer = str(numbers[0])
        yield Example(
            prompt.text,
            " " + " ".join(hidden[0]),
            answer,
            tuple(span for span, chain in spans if chain == 0),
            tuple(span for span, _ in spans),
            answer,
            kind="multi hop",
        )


_PERSONS = (
    "Ada Ana Ben Cem Cleo Dan Dora Eli Emma Eva Fay Finn Gus Hal Ida Ines Ivan Jack "
    "Jana Joe Kai Kim Lars Lea Leo Lin Lola Luc Mara Max Mia Nils Nina Noor Olga Omar "
    "Otto Paul Pia Ravi Rosa Sam Sara Tara Theo Tom Uma Vera Will Zoe"
).split()
_RELATIONS = (
    "mentor neighbour cousin tutor landlord partner doctor dentist barber coach boss "
    "grandfather"
).split()


def _names(rng: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(_LETTERS, k=3))] = None
    return list(names)


# --- public data sets ---------------------------------------------------------------


def _records(
    name: str, config: str | None, split: str, path: str | os.PathLike[str] | None
) -> Iterator[dict[str, Any]]:
    """Records of a public data set, or of a local file with the same fields.

    Raises:
        ImportError: if the ``datasets`` library is needed and not there.
        OSError: if the file cannot be read.
        ValueError: if it is no JSON.
    """
    if path is not None and Path(path).suffix in (".json", ".jsonl"):
        yield from _json_records(Path(path))
        return
    try:
        import datasets  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f"{name}: reading it needs the datasets library. Install it by "
            "`pip install captum-cage[data]`, or pass path= a file of JSON lines."
        ) from error
    if path is not None:
        kind = Path(path).suffix.lstrip(".")
        yield from datasets.load_dataset(kind, data_files=str(path), split="train")
        return
    yield from datasets.load_dataset(name, config, split=split)


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        whole = json.loads(text) if path.suffix == ".json" else None
        if whole is None:
            whole = [json.loads(line) for line in text.split("\n") if line.strip()]
    # Of the text or its encoding, or of lists in lists in lists.
    except (ValueError, RecursionError) as error:
        raise ValueError(
            complaint(
                os.fspath(path),
                "must hold JSON, or one JSON record a line where it ends in .jsonl",
                f"it does not: {error}",
                "Download it again.",
            )
        ) from error
    records = whole if isinstance(whole, list) else [whole]
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(
                complaint(
                    os.fspath(path),
                    "must hold records with named fields",
                    f"{shown(record)} came at record {number}",
                    "Pass the file as it is published.",
                )
            )
        yield record


def _read(
    name: str,
    read: Callable[[Mapping[str, Any]], Example],
    records: Iterable[Mapping[str, Any]],
    limit: int | None,
) -> Iterator[Example]:
    if limit is not None:
        whole_number("limit", limit, remedy="Pass how many to read.")
    for number, record in enumerate(islice(records, limit)):
        yield _one(name, read, record, number)


def _one(
    name: str,
    read: Callable[[Mapping[str, Any]], Example],
    record: Mapping[str, Any],
    number: int,
) -> Example:
    try:
        return read(record)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            complaint(
                name,
                "every record must have the fields of the published data set",
                f"record {number} has {sorted(map(str, record))}, and "
                f"{type(error).__name__} was raised for {error}",
                "Pass the file as it is published.",
            )
        ) from error


def _last_number(text: str) -> str:
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else ""


def gsm8k(
    path: str | os.PathLike[str] | None = None,
    *,
    split: str = "test",
    limit: int | None = None,
) -> Iterator[Example]:
    """Grade school math problems; the model writes the solution.

    Args:
        path (str or PathLike, optional): a local file. Default: from the hub
        split (str, optional): ``"test"``, ``"train"``, or both as ``"train+test"``.
            Default: ``"test"``
        limit (int, optional): most examples. Default: all

    Raises:
        ImportError: if the ``datasets`` library is needed and not there.
        ValueError: if a file has other fields.

    Source: Cobbe et al. (2021), :cite:p:`cobbe2021gsm8k`.
    """

    def read(record: Mapping[str, Any]) -> Example:
        answer = _last_number(str(record["answer"]).split("####")[-1])
        return Example(record["question"].strip(), answer=answer, kind="gsm8k")

    return _read("gsm8k", read, _records("openai/gsm8k", "main", split, path), limit)


def multiarith(
    path: str | os.PathLike[str] | None = None,
    *,
    split: str = "test",
    limit: int | None = None,
) -> Iterator[Example]:
    """Arithmetic word problems of several steps; the model writes the solution.

    The arguments and errors are those of :func:`gsm8k`.

    Source: Roy and Roth (2015), :cite:p:`roy2015arithmetic`.
    """

    def read(record: Mapping[str, Any]) -> Example:
        answer = _last_number(str(record["final_ans"]))
        return Example(record["question"].strip(), answer=answer, kind="multiarith")

    records = _records("ChilleD/MultiArith", None, split, path)
    return _read("multiarith", read, records, limit)


def _paragraphs(
    context: Iterable[tuple[str, Sequence[str]]],
    supports: set[tuple[str, int]],
    question: str,
    *,
    plain: bool,
) -> tuple[str, tuple[Span, ...], tuple[Span, ...]]:
    """Paragraphs and a question, and the ranges of the gold and of all sentences."""
    prompt = _Prompt(" " if plain else "\n\n")
    gold, sources = [], []
    for title, sentences in context:
        written = [sentence.strip() for sentence in sentences]
        visible = " ".join(sentence for sentence in written if sentence)
        if plain and not visible:
            continue
        head = "" if plain else f"{title}: "
        start, _ = prompt.add(head + visible)
        place = start + len(head)
        for number, sentence in enumerate(written):
            if not sentence:
                continue
            span = (place, place + len(sentence))
            place = span[1] + 1
            sources.append(span)
            if (title, number) in supports:
                gold.append(span)
    if plain:
        prompt.add(question.strip(), "\n")
    else:
        prompt.add(f"Question: {question.strip()}")
    return prompt.text, tuple(gold), tuple(sources)


def hotpotqa(
    path: str | os.PathLike[str] | None = None,
    *,
    split: str = "validation",
    limit: int | None = None,
    plain: bool = False,
) -> Iterator[Example]:
    """Questions over ten paragraphs, with the sentences that support the answer.

    The errors are those of :func:`gsm8k`.

    Args:
        path (str or PathLike, optional): a local file. Default: from the hub
        split (str, optional): of the data set. Default: ``"validation"``
        limit (int, optional): most examples. Default: all
        plain (bool, optional): all sentences in one line and the question in the next,
            as in the code of Walker and Ewetz (2025), instead of titled paragraphs and
            ``"Question:"``. Default: ``False``

    Source: Yang et al. (2018), :cite:p:`yang2018hotpotqa`.
    """

    def read(record: Mapping[str, Any]) -> Example:
        context, supports = record["context"], record["supporting_facts"]
        if isinstance(context, Mapping):  # as the hub has it, not the original file
            pairs = list(zip(context["title"], context["sentences"], strict=True))
            known = set(zip(supports["title"], supports["sent_id"], strict=True))
        else:
            pairs = [(title, sentences) for title, sentences in context]
            known = {(title, number) for title, number in supports}
        prompt, gold, sources = _paragraphs(
            pairs, known, record["question"], plain=plain
        )
        return Example(
            prompt,
            gold=gold,
            sources=sources,
            answer=str(record["answer"]),
            kind="hotpotqa",
        )

    records = _records("hotpotqa/hotpot_qa", "distractor", split, path)
    return _read("hotpotqa", read, records, limit)


def morehopqa(
    path: str | os.PathLike[str] | None = None,
    *,
    split: str = "test",
    limit: int | None = None,
    plain: bool = False,
) -> Iterator[Example]:
    """Questions that need more than one hop and a step of reasoning, with context.

    Which sentences matter is not published, so ``gold`` is empty. The arguments and
    errors are those of :func:`hotpotqa`, and the split is ``"test"`` unless given.

    Source: Schnitzler et al. (2024), :cite:p:`schnitzler2024morehopqa`.
    """

    def read(record: Mapping[str, Any]) -> Example:
        pairs = [(title, sentences) for title, sentences in record["context"]]
        prompt, _, sources = _paragraphs(pairs, set(), record["question"], plain=plain)
        return Example(
            prompt,
            sources=sources,
            answer=str(record["answer"]),
            kind="morehopqa",
        )

    records = _records("alabnii/morehopqa", "verified", split, path)
    return _read("morehopqa", read, records, limit)


def ruler(
    path: str | os.PathLike[str], *, limit: int | None = None
) -> Iterator[Example]:
    """Examples of a file that RULER's own scripts wrote.

    Known to matter are the sentences that hold an expected output: the needles that
    are asked for, and all statements of a chain of variables. The instruction, which is
    the first line, also where it is said again, and the question, which is the last,
    may not be taken away; in a text of fewer than three lines these are the first and
    the last sentence.

    Args:
        path (str or PathLike): a file of JSON lines with ``input`` and ``outputs``.
        limit (int, optional): most examples. Default: all

    Source: Hsieh et al. (2024), RULER, :cite:p:`hsieh2024ruler`.
    """

    def read(record: Mapping[str, Any]) -> Example:
        text, outputs = str(record["input"]), [str(one) for one in record["outputs"]]
        lines = list(_lines(text))
        every = [
            [
                (start + place, start + place + len(piece.strip()))
                for place, piece in _pieces(text[start:stop])
            ]
            for start, stop in lines
        ]
        if len(every) < 3:
            every = [[span] for spans in every for span in spans]
        said = [text[slice(*span)] for line in every[:1] for span in line]
        spans = [
            span
            for line in every[1:-1]
            for span in line
            if text[slice(*span)] not in said
        ]
        gold = [
            span
            for span in spans
            if any(
                re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text[slice(*span)])
                for one in outputs
            )
        ]
        return Example(
            text,
            gold=tuple(gold),
            sources=tuple(spans),
            answer=" ".join(outputs),
            kind="ruler",
            meta={"outputs": outputs},
        )

    return _read("ruler", read, _records("ruler", None, "", path), limit)


def _lines(text: str) -> Iterator[Span]:
    for found in re.finditer(r"[^\n]*\S[^\n]*", text):
        yield found.span()


def _pieces(line: str) -> Iterator[tuple[int, str]]:
    for start, stop in sentence_spans(line):
        piece = line[start:stop]
        if piece.strip():
            yield start + len(piece) - len(piece.lstrip()), piece


LOADERS: dict[str, Callable[..., Iterator[Example]]] = {
    "gsm8k": gsm8k,
    "multiarith": multiarith,
    "morehopqa": morehopqa,
    "hotpotqa": hotpotqa,
    "ruler": ruler,
}
"""The loaders of public data sets, by name."""
