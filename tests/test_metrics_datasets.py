"""Texts of known truth: what their ranges hold, and public files as they are read."""

from __future__ import annotations

import json
import random
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput

from captum_cage import ChatTokenInput, ChatTraceInput, GraphContextAttribution
from captum_cage.metrics.datasets import (
    LOADERS,
    Example,
    facts,
    gsm8k,
    hotpotqa,
    morehopqa,
    multi_hop,
    multiarith,
    needles,
    ruler,
    unrelated,
    variable_tracking,
)
from captum_cage.text import sentence_spans

FACTS = [f"Fact number {n} is about a thing of {n} letters." for n in range(20)]
HAYSTACK = ["The grass is green.", "The sky is blue.", "Here we go."]


def held(example: Example, spans: Any) -> list[str]:
    """The texts of ranges of a prompt."""
    return [example.prompt[slice(*span)] for span in spans]


# --- generators ----------------------------------------------------------------------


class TestFacts:
    """The Facts recipe."""

    def test_gold_is_what_is_explained(self):
        """Two neighbours of the three listed, told among nine."""
        for example in facts(FACTS, 30):
            told = held(example, example.sources)
            assert len(set(told)) == 9
            assert set(told) <= set(FACTS)
            assert example.prompt == " ".join([*told, "List 3 of these facts."])
            listed = [
                example.completion[a:b] for a, b in sentence_spans(example.completion)
            ]
            assert len(listed) == 3
            assert set(listed) <= set(told)
            assert example.completion == "".join(f" {one}" for one in listed)
            gold = held(example, example.gold)
            assert example.explain in (
                " ".join(listed[:2]),
                " ".join(listed[1:]),
            )
            explained = sorted(gold, key=listed.index)
            assert " ".join(explained) == example.explain
            assert set(example.gold) <= set(example.sources)
            assert example.gold == tuple(sorted(example.gold))
            assert example.kind == "facts"

    def test_every_fact_may_be_told_listed_and_explained(self):
        """In any place."""
        drawn = list(facts(FACTS, 200, told=4, listed=2, explained=1))
        places = {example.sources.index(example.gold[0]) for example in drawn}
        assert places == {0, 1, 2, 3}
        first = {e.completion.strip().startswith(e.explain) for e in drawn}
        assert first == {True, False}
        assert all("List 2 of these facts." in example.prompt for example in drawn)

    def test_facts_may_be_listed_in_the_order_in_which_they_are_told(self):
        """And asked for on a line of their own, as the authors' code has it."""
        mixed = False
        for example, drawn in zip(
            facts(FACTS, 30, in_order=True), facts(FACTS, 30), strict=True
        ):
            told = held(example, example.sources)
            assert example.prompt == " ".join(told) + "\nList 3 of these facts."
            listed = [
                example.completion[a:b] for a, b in sentence_spans(example.completion)
            ]
            assert len(listed) == 3
            assert [told.index(one) for one in listed] == sorted(
                told.index(one) for one in listed
            )
            assert " ".join(held(example, example.gold)) == example.explain
            mixed |= drawn.completion != example.completion
        assert mixed

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"texts": FACTS[:8]}, "texts: must be at least 9 texts"),
            ({"texts": [*FACTS, " "]}, "texts: must be .* 21 came, 20 of them texts"),
            ({"texts": [*FACTS, 3]}, "texts: must be .* 21 came, 20 of them texts"),
            ({"texts": FACTS[0]}, "texts: must be at least 9 .* 1 came"),
            ({"explained": 0}, "listed: explained, listed and told must not fall"),
            ({"explained": 4}, "listed: .* 4, 3 and 9 came"),
            ({"listed": 10}, "listed: .* 2, 10 and 9 came"),
            ({"count": -1}, "count: must be 0 or more"),
        ],
    )
    def test_bad_arguments_are_refused(self, options, match):
        """By name."""
        options = {"texts": FACTS, "count": 1, **options}
        with pytest.raises(ValueError, match=match):
            list(facts(**options))


class TestUnrelated:
    """The Math recipe."""

    PROMPT = (
        "Ana has 3 pens.  Mia has 2.5 more\nthan Ana.\n\nHow many, e.g. pens, has Mia?"
    )

    def test_gold_is_what_was_there(self):
        """Sentence by sentence, an unrelated one after each; the rest stays."""
        (example,) = unrelated([self.PROMPT])
        own = [self.PROMPT[a:b] for a, b in sentence_spans(self.PROMPT)]
        assert held(example, example.gold) == own
        assert len(own) > 2
        between = [x for one in own for x in (one, "Unrelated Sentence.")]
        assert held(example, example.sources) == between
        assert example.prompt.replace(" Unrelated Sentence.", "") == self.PROMPT
        assert example.prompt.count("Unrelated Sentence.") == len(own)
        assert example.kind == "unrelated sentences"

    @pytest.mark.parametrize("sentence", [" It rains.", "\n\nIt rains.", "It rains."])
    def test_the_sentence_may_be_another(self, sentence):
        """The white space before it is no part of it."""
        (example,) = unrelated([self.PROMPT], sentence=sentence)
        assert set(held(example, example.sources[1::2])) == {"It rains."}
        assert example.prompt.count(sentence) == len(example.gold)

    @pytest.mark.parametrize("prompt", [PROMPT, PROMPT.replace("\n\n", " ")])
    def test_the_question_may_begin_a_line(self, prompt):
        """As the authors' code has it; all else stays, and so do the ranges."""
        (example,) = unrelated([prompt], question_apart=True)
        own = [prompt[a:b] for a, b in sentence_spans(prompt)]
        assert held(example, example.gold) == own
        before, question = example.prompt.rsplit("\n", 1)
        assert question == f"{own[-1]} Unrelated Sentence."
        assert before.replace(" Unrelated Sentence.", "") == (
            prompt[: prompt.index(own[-1])].rstrip()
        )

    def test_a_question_alone_has_no_line_to_begin(self):
        """It stands where it stood."""
        (example,) = unrelated("How many?", question_apart=True)
        assert example.prompt == "How many? Unrelated Sentence."

    def test_what_else_is_known_of_an_example_stays(self):
        """Completion, answer, statement and where it comes from."""
        given = Example(
            "  Ana has 3 pens. ",
            " So 3.",
            "So 3.",
            answer="3",
            statement="3",
            meta={"from": "x"},
        )
        (example,) = unrelated([given])
        assert example.prompt == "  Ana has 3 pens. Unrelated Sentence. "
        assert held(example, example.gold) == ["Ana has 3 pens."]
        for name in ("completion", "explain", "answer", "statement", "meta"):
            assert getattr(example, name) == getattr(given, name)

    def test_a_text_is_a_prompt(self):
        """Not a list of letters."""
        assert list(unrelated(self.PROMPT)) == list(unrelated([self.PROMPT]))

    @pytest.mark.parametrize("sentence", ["", "  "])
    def test_an_empty_sentence_is_refused(self, sentence):
        """It could not be taken away."""
        with pytest.raises(ValueError, match="sentence: must be at least 1 text"):
            list(unrelated([self.PROMPT], sentence=sentence))


class TestNeedles:
    """A number that belongs to a key, among other text."""

    def test_gold_is_the_needle_that_is_asked_for(self):
        """One sentence of all; the number is the answer and what is explained."""
        places = set()
        for example in needles(HAYSTACK, 40, length=6, keys=3):
            told = held(example, example.sources)
            (gold,) = held(example, example.gold)
            form = r"One of the special magic numbers for (\w+) is: (\d{7})\."
            hidden = [found for text in told if (found := re.fullmatch(form, text))]
            assert len({found[1] for found in hidden}) == 3
            assert len({found[2] for found in hidden}) == 3
            assert sum(text in HAYSTACK for text in told) == 6
            assert len(told) == 9
            asked = re.fullmatch(
                r".* What is the special magic number for (\w+) mentioned in the "
                r"provided text\?",
                example.prompt,
            )
            (found,) = (found for found in hidden if found[1] == asked[1])
            assert gold == found[0]
            assert example.answer == example.explain == found[2]
            assert example.completion.count(found[2]) == 1
            assert f"for {found[1]} " in example.completion
            assert example.prompt.startswith(" ".join(told))
            assert example.kind == "needle"
            places.add(told.index(gold))
        assert {0, 8} <= places

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"haystack": []}, ValueError, "haystack: must be at least 1 text"),
            ({"haystack": [""]}, ValueError, "haystack: must be .* 0 of them texts"),
            ({"keys": 0}, ValueError, "keys: must be at least 1"),
            ({"keys": 99}, ValueError, "keys: must be .* There are 25 keys"),
            ({"keys": 2.0}, TypeError, "keys: must be a whole number"),
            ({"length": -1}, ValueError, "length: must be 0 or more"),
            ({"count": 1.5}, TypeError, "count: must be a whole number"),
        ],
    )
    def test_bad_arguments_are_refused(self, options, error, match):
        """By name."""
        options = {"haystack": HAYSTACK, "count": 1, **options}
        with pytest.raises(error, match=match):
            list(needles(**options))

    def test_needles_need_no_haystack_around_them(self):
        """As many as there are keys may be hidden."""
        (example,) = needles(HAYSTACK, 1, length=0, keys=25)
        assert len(example.sources) == 25


class TestVariableTracking:
    """Assignments that lead on from each other."""

    def test_gold_is_the_chain_of_the_value(self):
        """Read by running the assignments in the order in which they stand."""
        mixed = False
        for example in variable_tracking(
            40, chains=3, hops=2, noise=HAYSTACK, length=4
        ):
            told = held(example, example.sources)
            values: dict[str, str] = {}
            asked = re.search(
                r"assigned the value (\d+) in the text above\.$", example.prompt
            )
            expected = []
            for text in told:
                found = re.fullmatch(r"VAR ([A-Z]{3}) = (?:VAR )?(\w+)\.", text)
                if found is None:
                    assert text in HAYSTACK
                    continue
                assert found[1] not in values
                # A variable is known before it is used.
                value = found[2] if found[2].isdigit() else values[found[2]]
                values[found[1]] = value
                if value == asked[1]:
                    expected.append(text)
            assert held(example, example.gold) == expected
            assert len(expected) == 3
            assert len(values) == 9
            assert len(set(values.values())) == 3
            assert len(told) == 13
            names = [name for name, value in values.items() if value == asked[1]]
            assert example.answer.split() == names
            assert example.explain == example.answer
            assert example.completion.endswith(f"{asked[1]} are: {example.answer}.")
            at = [told.index(text) for text in expected]
            mixed |= at != list(range(at[0], at[0] + 3))
        assert mixed

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"chains": 0}, "chains: must be 1 or more"),
            ({"hops": -1}, "hops: must be 0 or more"),
            ({"length": 2}, "noise: must be at least 1 text"),
            (
                {"chains": 17_577, "hops": 0},
                "chains: .* at most 17576 variables",
            ),
            ({"chains": 4_395}, "chains: .* 4395 chains of 4 came. Pass fewer"),
            ({"length": -2}, "length: must be 0 or more"),
            ({"count": -1}, "count: must be 0 or more"),
        ],
    )
    def test_bad_arguments_are_refused(self, options, match):
        """By name."""
        with pytest.raises(ValueError, match=match):
            list(variable_tracking(**{"count": 1, **options}))


def answered(statements: list[str], question: str) -> tuple[str, list[str]]:
    """The answer to a question of several hops, and the statements that it took."""
    known = {}
    for text in statements:
        found = re.fullmatch(r"The ([a-z ]+) of (\w+) is (\w+)\.", text)
        if found is not None:
            assert found.group(1, 2) not in known
            known[found.group(1, 2)] = (found[3], text)
    *names, person = question.removeprefix("What is the ").rstrip("?").split(" of ")
    used = []
    for name in reversed([one.removeprefix("the ") for one in names]):
        person, text = known[name, person]
        used.append(text)
    return person, used


class TestMultiHop:
    """Questions that need a chain of statements."""

    @pytest.mark.parametrize("hops", [1, 2, 4])
    def test_gold_is_the_chain_that_leads_to_the_answer(self, hops):
        """Read by following the question through the statements."""
        mixed = False
        for example in multi_hop(HAYSTACK, 30, hops=hops, chains=3, length=5):
            told = held(example, example.sources)
            question = example.prompt.removeprefix(" ".join(told)).strip()
            answer, used = answered(told, question)
            assert answer == example.answer == example.explain
            assert sorted(held(example, example.gold)) == sorted(used)
            assert len(set(used)) == hops
            assert example.gold == tuple(sorted(example.gold))
            assert set(example.gold) <= set(example.sources)
            assert example.completion == "".join(f" {text}" for text in used)
            assert example.completion.count(answer) == 1
            assert sum(text in HAYSTACK for text in told) == 5
            assert len(told) == 5 + 3 * hops
            assert example.kind == "multi hop"
            mixed |= held(example, example.gold) != used
        assert mixed == (hops > 1)

    def test_decoys_do_not_answer(self):
        """They are about the same relations, and each has a number of its own."""
        for example in multi_hop(HAYSTACK, 20, hops=3, chains=4, length=2):
            told = held(example, example.sources)
            gold = held(example, example.gold)
            decoys = [one for one in told if one not in [*gold, *HAYSTACK]]
            assert len(decoys) == 9
            assert not any(example.answer in one for one in decoys)
            numbers = [n for one in decoys for n in re.findall(r"\d{7}", one)]
            assert len(set(numbers) - {example.answer}) == 3
            relations = [re.match(r"The ([a-z ]+) of", one)[1] for one in decoys]
            asked = {re.match(r"The ([a-z ]+) of", one)[1] for one in gold}
            assert set(relations) == asked
            question = example.prompt.removeprefix(" ".join(told)).strip()
            for missing in gold:
                with pytest.raises(KeyError):
                    answered([one for one in told if one != missing], question)

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"texts": []}, ValueError, "texts: must be at least 1 text"),
            ({"texts": [" "]}, ValueError, "texts: must be .* 0 of them texts"),
            ({"hops": 0}, ValueError, "hops: must be at least 1 and less than 14"),
            ({"hops": 14}, ValueError, "hops: must be .* There are 12 relations"),
            ({"hops": 2.0}, TypeError, "hops: must be a whole number"),
            ({"chains": 0}, ValueError, "chains: must be 1 or more"),
            ({"chains": 26}, ValueError, "chains: must have at most 50 persons"),
            ({"length": -1}, ValueError, "length: must be 0 or more"),
            ({"count": -1}, ValueError, "count: must be 0 or more"),
        ],
    )
    def test_bad_arguments_are_refused(self, options, error, match):
        """By name."""
        options = {"texts": HAYSTACK, "count": 1, **options}
        with pytest.raises(error, match=match):
            list(multi_hop(**options))

    @pytest.mark.parametrize(("hops", "chains"), [(13, 1), (2, 25), (1, 50)])
    def test_all_persons_and_relations_may_be_used(self, hops, chains):
        """Without text around them."""
        (example,) = multi_hop(HAYSTACK, 1, hops=hops, chains=chains, length=0)
        assert len(example.sources) == hops * chains


@pytest.mark.parametrize(
    "drawn",
    [
        lambda count, seed: multi_hop(HAYSTACK, count, seed=seed),
        lambda count, seed: facts(FACTS, count, seed=seed),
        lambda count, seed: needles(HAYSTACK, count, seed=seed),
        lambda count, seed: variable_tracking(
            count, noise=HAYSTACK, length=3, seed=seed
        ),
    ],
)
def test_the_seed_says_what_is_drawn(drawn):
    """The first ones of more are the same, and no random state is touched."""
    state = random.getstate()
    many = list(drawn(6, 1))
    assert random.getstate() == state
    random.seed(5)
    assert list(drawn(6, 1)) == many
    assert list(drawn(2, 1)) == many[:2]
    assert list(drawn(6, 2)) != many
    assert len({example.prompt for example in many}) == 6
    assert list(drawn(0, 1)) == []
    random.setstate(state)


# --- examples ------------------------------------------------------------------------


class TestExample:
    """Ranges of a prompt are sources of a result."""

    PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana. How many?"
    SPANS = tuple(sentence_spans(PROMPT))

    def explained(self, model: Any, tokenizer: Any, inp: Any) -> Any:
        """A result over sentences."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer)
        )
        return cage.attribute(inp, " Mia has 7.", units="sentence")

    @pytest.mark.parametrize("chat", [False, True])
    def test_they_are_found_wherever_the_prompt_stands(self, chat, model, tokenizer):
        """Also in a chat, after what the system says."""
        example = Example(
            self.PROMPT, gold=self.SPANS[1:2], sources=(self.SPANS[0], self.SPANS[1])
        )
        inp: Any = TextTokenInput(self.PROMPT, tokenizer)
        if chat:
            messages = [
                {"role": "system", "content": "Read this."},
                {"role": "user", "content": self.PROMPT},
            ]
            inp = ChatTokenInput(messages, tokenizer, features="all")
        result = self.explained(model, tokenizer, inp)
        texts = [unit.text.strip() for unit in result.units]
        whole = [self.PROMPT[slice(*span)] for span in self.SPANS]
        assert [texts[i] for i in example.gold_in(result)] == whole[1:2]
        assert [texts[i] for i in example.sources_in(result)] == whole[:2]
        assert Example(self.PROMPT).sources_in(result) is None
        assert Example(self.PROMPT).gold_in(result) == []

    def test_what_came_after_the_prompt_is_no_part_of_it(self, model, tokenizer):
        """A tool's answer has places in a text of its own."""
        messages = [
            {"role": "user", "content": self.PROMPT},
            {"role": "assistant", "content": "First, read the text. Mia has 7 pens."},
            {"role": "tool", "content": "The answer is 18."},
        ]
        result = self.explained(model, tokenizer, ChatTraceInput(messages, tokenizer))
        tool = next(unit for unit in result.units if "18" in unit.text)
        whole = (0, len(self.PROMPT))
        assert tool.span[0] < whole[1] + result.source_text.find(self.PROMPT)
        found = Example(self.PROMPT, gold=(whole,)).gold_in(result)
        assert [result.units[i].text.strip() for i in found] == [
            self.PROMPT[slice(*span)] for span in self.SPANS
        ]

    def test_another_text_is_refused(self, model, tokenizer):
        """Its places would be of nothing."""
        result = self.explained(model, tokenizer, TextTokenInput("Leo.", tokenizer))
        with pytest.raises(ValueError, match="result: its source text must hold"):
            Example(self.PROMPT, gold=((0, 3),)).gold_in(result)

    def test_the_last_sentence_is_explained(self):
        """Unless the example says what."""
        assert Example("x").explained_in("One. Two 2.5.\n\n") == "Two 2.5."
        assert Example("x", explain="One").explained_in("One. Two.") == "One"
        with pytest.raises(ValueError, match="completion: must have a sentence"):
            Example("x").explained_in(" \n")


# --- public data sets ----------------------------------------------------------------

GSM8K = [
    {
        "question": "Janet has 16 eggs.\nHow many dollars? ",
        "answer": "She sells 16 - 3 = <<16-3=13>>13 eggs.\n#### 1,018",
    },
    {"question": "How cold?", "answer": "It is less.\n#### -7"},
]
MULTIARITH = [
    {"question": " Faye had 43 pencils. How many? ", "final_ans": "11"},
    {"question": "How many?", "final_ans": 11.5},
]
CONTEXT = [
    ["Ed Wood", ["Ed Wood is a film.", " It is by Tim Burton.", " "]],
    ["Woodson", ["Woodson is a place.", " It was counted."]],
]
HOTPOT = {
    "_id": "5a8b",
    "question": "Who made Ed Wood? ",
    "answer": "Tim Burton",
    "supporting_facts": [["Ed Wood", 1], ["Woodson", 0]],
    "context": CONTEXT,
    "type": "bridge",
    "level": "hard",
}
HOTPOT_HUB = {
    **HOTPOT,
    "supporting_facts": {"title": ["Ed Wood", "Woodson"], "sent_id": [1, 0]},
    "context": {
        "title": [title for title, _ in CONTEXT],
        "sentences": [sentences for _, sentences in CONTEXT],
    },
}
MOREHOP = {
    "_id": "1",
    "question": "How many letters has the first name?",
    "answer": 3,
    "previous_question": "Who?",
    "context": CONTEXT,
}
PARAGRAPHS = (
    "Ed Wood: Ed Wood is a film. It is by Tim Burton.\n\n"
    "Woodson: Woodson is a place. It was counted.\n\n"
)
SENTENCES = [
    *("Ed Wood is a film.", "It is by Tim Burton.", "Woodson is a place."),
    "It was counted.",
]
RULER = [
    {
        "index": 0,
        "input": "A special magic number is hidden.\nThe grass is green. One of the "
        "special magic numbers for amber is: 1234567. The sky is blue.\nOne of the "
        "special magic numbers for basil is: 12345678.\nWhat is the number for amber?",
        "outputs": ["1234567"],
        "length": 60,
    },
    {
        "index": 1,
        "input": "Memorise.\n\nVAR ABC = 12345. VAR XY = 9.\nVAR DEF = VAR ABC.\n\n"
        "Memorise.\n\nQuestion: Find all with the value 12345. Answer: They are: ",
        "outputs": ["ABC", "DEF"],
    },
]


def written(path: Any, records: Any) -> Any:
    """A file as it is published: a JSON list, or a record a line."""
    text = (
        "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
        if path.suffix == ".jsonl"
        else json.dumps(records)
    )
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the `datasets` library, and what it was asked for."""
    asked: list[tuple[Any, ...]] = []
    records: list[dict[str, Any]] = []

    def load_dataset(name: str, config: Any = None, **more: Any) -> Any:
        asked.append((name, config, more))
        return iter(records)

    fake = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return SimpleNamespace(asked=asked, records=records)


class TestLoaders:
    """Local files in the form in which they are published."""

    @pytest.mark.parametrize("name", ["test.jsonl", "test.json"])
    def test_gsm8k(self, name, tmp_path):
        """The number after the mark, without its commas."""
        one, other = gsm8k(written(tmp_path / name, GSM8K))
        assert one.prompt == "Janet has 16 eggs.\nHow many dollars?"
        assert (one.answer, other.answer) == ("1018", "-7")
        assert one.completion is None
        assert one.gold == ()
        assert one.sources is None
        assert one.kind == "gsm8k"

    def test_multiarith(self, tmp_path):
        """Whether the answer is text or a number."""
        one, other = multiarith(str(written(tmp_path / "test.json", MULTIARITH)))
        assert one.prompt == "Faye had 43 pencils. How many?"
        assert (one.answer, other.answer) == ("11", "11.5")
        assert one.kind == "multiarith"

    @pytest.mark.parametrize("record", [HOTPOT, HOTPOT_HUB])
    def test_hotpotqa(self, record, tmp_path):
        """As the authors publish it, and as the hub does."""
        (example,) = hotpotqa(written(tmp_path / "dev.json", [record]))
        assert example.prompt == PARAGRAPHS + "Question: Who made Ed Wood?"
        assert held(example, example.sources) == SENTENCES
        assert held(example, example.gold) == SENTENCES[1:3]
        assert example.answer == "Tim Burton"
        assert example.kind == "hotpotqa"

    def test_morehopqa(self, tmp_path):
        """Sentences may be taken away; which ones matter is not known."""
        (example,) = morehopqa(written(tmp_path / "more.json", [MOREHOP]))
        assert example.prompt == PARAGRAPHS + f"Question: {MOREHOP['question']}"
        assert held(example, example.sources) == SENTENCES
        assert example.gold == ()
        assert example.answer == "3"
        assert example.kind == "morehopqa"

    def test_ruler(self, tmp_path):
        """Sentences that hold an output, as a word of its own."""
        needle, chain = ruler(written(tmp_path / "validation.jsonl", RULER))
        assert needle.prompt == RULER[0]["input"]
        assert held(needle, needle.gold) == [
            "One of the special magic numbers for amber is: 1234567."
        ]
        assert held(needle, needle.sources) == [
            "The grass is green.",
            "One of the special magic numbers for amber is: 1234567.",
            "The sky is blue.",
            "One of the special magic numbers for basil is: 12345678.",
        ]
        assert held(chain, chain.gold) == ["VAR ABC = 12345.", "VAR DEF = VAR ABC."]
        assert held(chain, chain.sources) == [
            *("VAR ABC = 12345.", "VAR XY = 9.", "VAR DEF = VAR ABC.")
        ]
        assert chain.answer == "ABC DEF"
        assert chain.meta["outputs"] == ["ABC", "DEF"]

    @pytest.mark.parametrize("between", [" ", "\n"])
    def test_instruction_and_question_of_a_needle_task_may_not_be_taken_away(
        self, between, tmp_path
    ):
        """In a file and from the generator alike, also where all is in one line."""
        (own,) = needles(HAYSTACK, 1, length=5, keys=2)
        told = held(own, own.sources)
        question = own.prompt.removeprefix(" ".join(told)).strip()
        text = between.join(["Remember this.", " ".join(told), question])
        record = {"input": text, "outputs": [own.answer]}
        (read,) = ruler(written(tmp_path / "one.jsonl", [record]))
        assert held(read, read.sources) == told
        assert held(read, read.gold) == held(own, own.gold)
        for example in (own, read):
            last = max(stop for _, stop in example.sources)
            assert example.prompt[last:].strip() == question

    def test_paragraphs_may_be_plain(self, tmp_path):
        """Sentences in one line and the question in the next; the ranges hold."""
        records = [{**HOTPOT, "context": [*CONTEXT, ["Empty", [" "]]]}]
        (example,) = hotpotqa(written(tmp_path / "dev.json", records), plain=True)
        assert example.prompt == " ".join(SENTENCES) + "\nWho made Ed Wood?"
        assert held(example, example.sources) == SENTENCES
        assert held(example, example.gold) == SENTENCES[1:3]
        (example,) = morehopqa(written(tmp_path / "more.json", [MOREHOP]), plain=True)
        assert example.prompt == " ".join(SENTENCES) + f"\n{MOREHOP['question']}"
        assert held(example, example.sources) == SENTENCES

    def test_line_separators_within_a_text_do_not_end_a_record(self, tmp_path):
        """Only a line feed does, as JSON lines are."""
        record = {
            "question": "Ana\u2028has\x85 3 pens.\x0b How many?",
            "answer": "#### 3",
        }
        path = written(tmp_path / "test.jsonl", [record, *GSM8K])
        assert "\u2028" in path.read_text(encoding="utf-8")
        found = list(gsm8k(path))
        assert len(found) == 3
        assert found[0].prompt == record["question"]

    @pytest.mark.parametrize("name", ["test.json", "test.jsonl"])
    @pytest.mark.parametrize(
        "content", [b"[" * 100_000, b"\xff\xfe", b"{", b"9" * 5000]
    )
    def test_what_is_no_json_is_refused_by_the_name_of_its_file(
        self, name, content, tmp_path
    ):
        """Lists in lists in lists and other encodings, too."""
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: must hold JSON.*Download it"):
            list(gsm8k(path))

    def test_only_some_may_be_read(self, tmp_path):
        """The first ones."""
        path = written(tmp_path / "test.jsonl", GSM8K)
        assert list(gsm8k(path, limit=1)) == list(gsm8k(path))[:1]
        assert list(gsm8k(path, limit=0)) == []
        with pytest.raises(ValueError, match="limit: must be 0 or more"):
            list(gsm8k(path, limit=-1))

    def test_all_are_listed(self):
        """By their names."""
        assert {
            "gsm8k": gsm8k,
            "multiarith": multiarith,
            "morehopqa": morehopqa,
            "hotpotqa": hotpotqa,
            "ruler": ruler,
        } == LOADERS


class TestLibrary:
    """What is no JSON is read by the `datasets` library."""

    @pytest.mark.parametrize(
        ("load", "record", "name", "config", "split"),
        [
            (gsm8k, GSM8K[0], "openai/gsm8k", "main", "test"),
            (multiarith, MULTIARITH[0], "ChilleD/MultiArith", None, "test"),
            (hotpotqa, HOTPOT_HUB, "hotpotqa/hotpot_qa", "distractor", "validation"),
            (morehopqa, MOREHOP, "alabnii/morehopqa", "verified", "test"),
        ],
    )
    def test_the_hub_is_asked_for_a_split(self, load, record, name, config, split, hub):
        """The usual one, or another."""
        hub.records.append(record)
        (example,) = load()
        assert example.kind == load.__name__
        assert list(load(split="train", limit=1)) == [example]
        assert hub.asked == [
            (name, config, {"split": split}),
            (name, config, {"split": "train"}),
        ]

    def test_a_local_table_is_read_by_its_kind(self, hub, tmp_path):
        """Such as parquet."""
        hub.records += MULTIARITH
        path = tmp_path / "test-00000-of-00001.parquet"
        assert [example.answer for example in multiarith(path)] == ["11", "11.5"]
        expected = {"data_files": str(path), "split": "train"}
        assert hub.asked == [("parquet", None, expected)]

    def test_json_needs_no_library(self, hub, tmp_path):
        """It is not asked."""
        assert list(gsm8k(written(tmp_path / "test.jsonl", GSM8K)))
        assert hub.asked == []

    @pytest.mark.parametrize("path", [None, "test.parquet"])
    def test_without_it_an_error_says_what_to_install(self, path, monkeypatch):
        """Where it is needed."""
        monkeypatch.setitem(sys.modules, "datasets", None)
        match = r"gsm8k: .*pip install captum-cage\[data\].* or pass path= a file"
        with pytest.raises(
            ImportError, match=match.replace("gsm8k", "(openai/)?gsm8k")
        ):
            list(gsm8k(path))


class TestRefusals:
    """Files of another form are refused by name and record."""

    @pytest.mark.parametrize(
        ("load", "records", "match"),
        [
            (gsm8k, [GSM8K[0], {"text": "x"}], r"gsm8k: .* record 1 has \['text'\]"),
            (gsm8k, [{"question": 3, "answer": "4"}], "record 0 .* AttributeError"),
            (multiarith, GSM8K, "multiarith: every record must have .* KeyError"),
            (hotpotqa, [{**HOTPOT, "context": [["x"]]}], "hotpotqa: .* ValueError"),
            (hotpotqa, [{**HOTPOT, "context": None}], "hotpotqa: .* TypeError"),
            (morehopqa, [{"question": "x"}], "morehopqa: every record must have"),
            (ruler, [{"input": "x"}], "ruler: every record .* KeyError .*outputs"),
        ],
    )
    def test_records_without_the_fields(self, load, records, match, tmp_path):
        """With the fields that came."""
        path = written(tmp_path / "file.json", records)
        with pytest.raises(ValueError, match=match):
            list(load(path))

    @pytest.mark.parametrize(
        ("name", "text", "match"),
        [
            ("a.json", "{", "a.json: must hold JSON, .* it does not"),
            ("a.jsonl", '{"question": 1}\nx', "a.jsonl: must hold JSON, or one JSON"),
            ("a.json", "[1]", "a.json: must hold records .* int 1 came at record 0"),
            ("a.jsonl", "[1]", "a.jsonl: must hold records with named fields"),
        ],
    )
    def test_what_is_no_json_or_no_record(self, name, text, match, tmp_path):
        """With the name of the file."""
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=match):
            list(gsm8k(path))

    def test_a_file_that_is_not_there(self, tmp_path):
        """The system says so."""
        with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
            list(ruler(tmp_path / "none.jsonl"))
