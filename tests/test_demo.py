"""The demo model solves its problems; problems and conversations state their truth."""

from __future__ import annotations

import dataclasses
import random
import re
import zlib
from collections.abc import Sequence
from typing import TypeAlias

import pytest
import torch
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from captum_cage import GraphContextAttribution
from captum_cage.demo import (
    Answer,
    Conversation,
    Problem,
    Source,
    Step,
    load_demo,
    sample_conversations,
    sample_problems,
)
from captum_cage.demo.model import DEMO_FILES

Demo: TypeAlias = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]
Messages: TypeAlias = list[dict[str, str]]
KINDS = ("one_question", "two_questions")
LARGE = ("long_chain", "distractors")
SIZES = {"long_chain": (5, 14), "distractors": (12, 20)}  # else 6 to 9 facts
TALKS = ("tool", "override", "irrelevant")
FACT = re.compile(r"(\w+) has (\d) (?:more )?(\w+?)(?: than (\w+))?\.")
QUESTION = re.compile(r"[Hh]ow many (\w+) does (\w+) have\?")
START = re.compile(r"Starting with (\w+), how many (\w+) does")
STEP = re.compile(r"(\w+) has \w+'s (\d+) \+ (\d+) = (\d+) (\w+)\.")
ANSWER = re.compile(r"The (?:first |second )?answer is (\d+)\.")


@pytest.fixture(scope="module")
def demo() -> Demo:
    """The demo model and its tokenizer, loaded once."""
    return load_demo()


def as_chats(prompts: Sequence[str]) -> list[Messages]:
    """Each prompt as the only message of a user."""
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def render(demo: Demo, messages: Messages) -> str:
    """The chat up to where the model goes on."""
    text = demo[1].apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    return str(text)


def write(demo: Demo, prompts: Sequence[str | Messages]) -> list[str]:
    """What the model writes after each text or chat, with its end token."""
    model, tokenizer = demo
    texts = [p if isinstance(p, str) else render(demo, p) for p in prompts]
    written = []
    for start in range(0, len(texts), 100):
        batch = tokenizer(texts[start : start + 100], padding=True, return_tensors="pt")
        ids = model.generate(**batch, do_sample=False)  # type: ignore[misc]
        new = ids[:, batch["input_ids"].shape[1] :]
        written += [str(tokenizer.decode(row)).replace("<pad>", "") for row in new]
    return written


def true_facts(prompt: str, person: str, item: str) -> tuple[int, set[tuple[int, int]]]:
    """How many of an item a person has, and the facts that say so: read slowly."""
    for found in FACT.finditer(prompt):
        if (found[1], found[3]) == (person, item):
            number = 0
            facts: set[tuple[int, int]] = set()
            if found[4] is not None:
                number, facts = true_facts(prompt, found[4], item)
            return number + int(found[2]), facts | {found.span()}
    raise AssertionError(f"no fact says how many {item} {person} has: {prompt}")


def renumber(prompt: str, fact: tuple[int, int], rng: random.Random) -> tuple[str, int]:
    """The prompt with another number in one fact, and the difference."""
    (place,) = (i for i in range(*fact) if prompt[i].isdigit())
    old = int(prompt[place])
    new = rng.choice([number for number in range(1, 10) if number != old])
    return prompt[:place] + str(new) + prompt[place + 1 :], new - old


def answers_in(text: str) -> list[int]:
    """The numbers that a written answer gives as answers."""
    return [int(number) for number in ANSWER.findall(text)]


@pytest.mark.parametrize("split", ["held_out", "train"])
@pytest.mark.parametrize("kind", [*KINDS, "mixed", *LARGE])
def test_the_ranges_are_the_sentences(kind: str, split: str) -> None:
    """Every range of a problem cuts out one whole sentence of the form stated."""
    for problem in sample_problems(200, 1, kind, split=split):
        assert problem.kind in KINDS if kind == "mixed" else problem.kind == kind
        fewest, most = SIZES.get(kind, (6, 9))
        assert fewest <= len(problem.facts) <= most
        assert problem.facts == tuple(sorted(problem.facts))
        told = " ".join(problem.prompt[slice(*fact)] for fact in problem.facts)
        assert problem.prompt.startswith(told + " ")
        for fact in problem.facts:
            assert FACT.fullmatch(problem.prompt[slice(*fact)])
        parts: list[Step | Answer] = [*problem.steps, *problem.answers]
        for part in parts:
            assert problem.completion[slice(*part.span)] == part.text
            assert set(part.facts) <= set(problem.facts)
        parts.sort(key=lambda part: part.span)
        assert problem.completion == "".join(" " + part.text for part in parts)


@pytest.mark.parametrize("kind", [*KINDS, "mixed", *LARGE])
def test_the_answers_are_true_and_depend_on_what_is_stated(kind: str) -> None:
    """A slow reader of the prompt finds the same answers and the same true facts."""
    for problem in sample_problems(200, 2, kind):
        questions = QUESTION.findall(problem.prompt)
        assert len(questions) == len(problem.answers)
        for (item, person), answer in zip(questions, problem.answers, strict=True):
            number, facts = true_facts(problem.prompt, person, item)
            assert answers_in(answer.text) == [number]
            assert answer.facts == tuple(sorted(facts))
            (last,) = answer.steps
            assert STEP.fullmatch(problem.steps[last].text)[1] == person  # type: ignore[index]


@pytest.mark.parametrize("kind", [*KINDS, "mixed", *LARGE])
def test_the_steps_use_what_they_say_they_use(kind: str) -> None:
    """The numbers that a step adds are those of its facts and earlier steps."""
    for problem in sample_problems(200, 3, kind):
        for index, step in enumerate(problem.steps):
            found = STEP.fullmatch(step.text)
            assert found is not None
            first, second, total = int(found[2]), int(found[3]), int(found[4])
            used = [FACT.fullmatch(problem.prompt[slice(*fact)]) for fact in step.facts]
            numbers = [int(fact[2]) for fact in used if fact is not None]
            for earlier in step.steps:
                assert earlier < index
                numbers.append(int(STEP.fullmatch(problem.steps[earlier].text)[4]))  # type: ignore[index]
            assert sorted(numbers) == sorted([first, second])
            assert first + second == total
            assert true_facts(problem.prompt, found[1], found[5])[0] == total


def test_two_questions_share_no_fact() -> None:
    """The two answers of a problem depend on different facts."""
    for problem in sample_problems(200, 4, "two_questions"):
        first, second = problem.answers
        assert not set(first.facts) & set(second.facts)


@pytest.mark.parametrize(
    ("kind", "split", "checksum"),
    [
        ("one_question", "held_out", 3703654304),
        ("one_question", "train", 2443735946),
        ("two_questions", "held_out", 1824375814),
        ("two_questions", "train", 3644498839),
        ("mixed", "held_out", 2782558239),
        ("mixed", "train", 993909341),
    ],
)
def test_published_samples_stay_as_they_are(
    kind: str, split: str, checksum: int
) -> None:
    """The same arguments give the problems that they gave in the first version."""
    sample = sample_problems(20, 0, kind, split=split)
    text = repr([dataclasses.astuple(problem) for problem in sample])
    assert zlib.crc32(text.encode()) == checksum


def test_a_long_chain_takes_two_to_eight_steps() -> None:
    """Every number of steps occurs, and the question says whom to start with."""
    sample = sample_problems(300, 4, "long_chain")
    assert {len(problem.steps) for problem in sample} == set(range(2, 9))
    for problem in sample:
        (answer,) = problem.answers
        assert len(answer.facts) == len(problem.steps) + 1
        assert 2 <= len(problem.facts) - len(answer.facts) <= 5
        found = START.search(problem.prompt)
        assert found is not None
        number, facts = true_facts(problem.prompt, found[1], found[2])
        assert len(facts) == 1
        assert facts < set(answer.facts)
        assert f" has {found[1]}'s {number} + " in problem.steps[0].text


@pytest.mark.parametrize("steps", [2, 5, 8])
def test_the_number_of_steps_can_be_chosen(steps: int) -> None:
    """Each answer takes exactly as many steps as asked for."""
    sample = sample_problems(30, 4, "long_chain", steps=steps)
    assert {len(problem.steps) for problem in sample} == {steps}
    assert sample_problems(5, 4, "long_chain", steps=steps) == sample[:5]


def test_samples_are_deterministic_and_leave_the_random_state() -> None:
    """The same arguments give the same problems; other seeds give others."""
    before = random.getstate()
    sample = sample_problems(20, 5, "mixed")
    assert random.getstate() == before
    random.seed(1)
    assert sample_problems(20, 5, "mixed") == sample
    assert sample_problems(10, 5, "mixed") == sample[:10]
    assert sample_problems(20, 6, "mixed") != sample


def test_held_out_and_training_problems_are_disjoint() -> None:
    """No prompt occurs in both parts."""
    parts = [
        {problem.prompt for problem in sample_problems(2000, 0, "mixed", split=split)}
        for split in ("held_out", "train")
    ]
    assert not parts[0] & parts[1]
    for kind in LARGE:
        held_out, train = (
            {problem.prompt for problem in sample_problems(300, 0, kind, split=split)}
            for split in ("held_out", "train")
        )
        assert not held_out & train


def test_problems_are_frozen() -> None:
    """A problem and its parts cannot be changed."""
    (problem,) = sample_problems(1, 0)
    for value in (problem, problem.answers[0], problem.steps[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.facts = ()  # type: ignore[misc]


def test_no_problems_are_an_empty_sample() -> None:
    """Zero problems may be asked for."""
    assert sample_problems(0, 0) == ()


def test_bad_arguments_are_refused() -> None:
    """An unknown kind or part and a negative count say what is allowed."""
    with pytest.raises(ValueError, match="kind: must be one of 'one_question'"):
        sample_problems(1, 0, "three_questions")
    with pytest.raises(ValueError, match="split: must be one of 'held_out'"):
        sample_problems(1, 0, split="test")
    with pytest.raises(ValueError, match="n: the number of problems must be 0 or more"):
        sample_problems(-1, 0)
    with pytest.raises(ValueError, match="steps: must be from 2 to 8, not 9"):
        sample_problems(1, 0, "long_chain", steps=9)
    with pytest.raises(ValueError, match="steps: only problems of the kind"):
        sample_problems(1, 0, "distractors", steps=3)


def sentence(conversation: Conversation, source: Source) -> str:
    """The text of a source, read from its message."""
    return conversation.messages[source.message]["content"][slice(*source.span)]


def count(facts: Sequence[str], person: str, item: str) -> int | None:
    """How many of an item a person has by these facts, the later ones counting."""
    number = None
    for fact in facts:
        told = FACT.fullmatch(fact)
        assert told is not None
        if (told[1], told[3]) == (person, item):
            before = 0 if told[4] is None else count(facts, told[4], item)
            number = None if before is None else before + int(told[2])
    return number


def asked(conversation: Conversation) -> tuple[str, str]:
    """Person and item of the question."""
    found = QUESTION.fullmatch(sentence(conversation, conversation.question))
    assert found is not None
    return found[2], found[1]


def outside(conversation: Conversation) -> list[Source]:
    """All sentences of the messages that the model did not write."""
    return [
        Source(number, found.span())
        for number, message in enumerate(conversation.messages)
        if message["role"] != "assistant"
        for found in re.finditer(r"[A-Z][^.?]*[.?]", message["content"])
    ]


@pytest.mark.parametrize("split", ["held_out", "train"])
@pytest.mark.parametrize("kind", [*TALKS, "mixed"])
def test_a_conversation_is_whole(kind: str, split: str) -> None:
    """Its messages consist of the sentences named, each in its range and no other."""
    by_system = 0
    for conversation in sample_conversations(200, 1, kind, split=split):
        assert conversation.kind in TALKS if kind == "mixed" else [kind]
        *first, call, tool, answer = conversation.messages
        by_system += len(first) == 2
        assert [message["role"] for message in first] == ["system", "user"][
            -len(first) :
        ]
        roles = [message["role"] for message in (call, tool, answer)]
        assert roles == ["assistant", "tool", "assistant"]
        named = [conversation.lookup, *conversation.facts, conversation.question]
        assert sorted(named) == outside(conversation)
        assert conversation.facts[-1] == conversation.result
        assert 6 <= len({*conversation.facts} - {conversation.overridden}) <= 10
        for source in conversation.facts:
            assert FACT.fullmatch(conversation.text(source))
        assert conversation.lookup.message == 0
        assert conversation.lookup.span[0] == 0
        written: dict[int, str] = {}
        for statement in conversation.statements:
            content = conversation.messages[statement.message]["content"]
            assert content[slice(*statement.span)] == statement.text
            before = written.setdefault(statement.message, "")
            written[statement.message] = before + " " + statement.text
        assert [*written.values()] == [call["content"], answer["content"]]
        kinds = [statement.kind for statement in conversation.statements]
        assert kinds == ["call", *["step"] * (len(kinds) - 2), "answer"]
    assert 30 < by_system < 90


@pytest.mark.parametrize("kind", TALKS)
def test_a_call_says_whom_and_what(kind: str) -> None:
    """The name is that of the instruction, the item that of the question."""
    for conversation in sample_conversations(200, 2, kind):
        _, item = asked(conversation)
        name = sentence(conversation, conversation.lookup)[len("Look up ") : -1]
        assert conversation.call.text == f"Look up {name}'s {item}."
        sources = (conversation.lookup, conversation.question)
        assert conversation.call.sources == conversation.call.all_sources == sources
        assert conversation.call.statements == ()
        told = FACT.fullmatch(sentence(conversation, conversation.result))
        assert told is not None
        assert (told[1], told[3]) == (name, item)


@pytest.mark.parametrize("kind", TALKS)
def test_an_answer_is_that_of_its_sources_and_of_no_other_fact(kind: str) -> None:
    """The facts named give the answer alone; each of them changes it, no other does."""
    for conversation in sample_conversations(200, 3, kind):
        person, item = asked(conversation)
        facts = [sentence(conversation, fact) for fact in conversation.facts]
        truth = conversation.answer.all_sources
        named = [sentence(conversation, fact) for fact in truth]
        (number,) = answers_in(conversation.answer.text)
        assert count(named, person, item) == count(facts, person, item) == number
        for place, fact in enumerate(conversation.facts):
            other = re.sub(
                r"\d", lambda digit: str(int(digit[0]) % 9 + 1), facts[place]
            )
            changed = [*facts[:place], other, *facts[place + 1 :]]
            assert (count(changed, person, item) != number) == (fact in truth)


@pytest.mark.parametrize("kind", TALKS)
def test_statements_use_what_they_say_they_use(kind: str) -> None:
    """A step adds the numbers of its sources and statements; origins add up."""
    for conversation in sample_conversations(200, 4, kind):
        for index, statement in enumerate(conversation.statements[1:], 1):
            earlier = [conversation.statements[i] for i in statement.statements]
            assert all(0 < i < index for i in statement.statements)
            origins = {*statement.sources}.union(*(e.all_sources for e in earlier))
            assert statement.all_sources == tuple(sorted(origins))
            numbers = [int(re.findall(r"\d+", before.text)[-1]) for before in earlier]
            for source in statement.sources:
                (digit,) = re.findall(r"\d", sentence(conversation, source))
                numbers.append(int(digit))
            if statement.kind == "answer":
                assert answers_in(statement.text) == numbers
                continue
            found = STEP.fullmatch(statement.text)
            assert found is not None
            assert sorted(numbers) == sorted([int(found[2]), int(found[3])])
            assert int(found[2]) + int(found[3]) == int(found[4])


def test_the_kinds_of_conversations_differ_in_what_the_result_does() -> None:
    """It completes the user's facts, overrides one of them, or does not matter."""
    for kind in TALKS:
        for conversation in sample_conversations(200, 5, kind):
            person, item = asked(conversation)
            facts = [sentence(conversation, fact) for fact in conversation.facts]
            (number,) = answers_in(conversation.answer.text)
            without = count(facts[:-1], person, item)
            stale = conversation.overridden
            truth = conversation.answer.all_sources
            if kind == "tool":
                assert without is None
                assert stale is None
            elif kind == "override":
                assert without not in (None, number)
                assert stale is not None
            else:
                assert without == number
            assert (conversation.result in truth) == (kind != "irrelevant")
            if stale is not None:
                assert stale not in truth
                blurred = [
                    re.sub(r"\d", "#", sentence(conversation, fact))
                    for fact in (stale, conversation.result)
                ]
                assert blurred[0] == blurred[1]


def test_the_messages_before_a_generated_one_are_at_hand() -> None:
    """They are copies of the messages up to the call and up to the worked answer."""
    (conversation,) = sample_conversations(1, 0)
    assert conversation.before_call == [*conversation.messages[:-3]]
    assert conversation.before_answer == [*conversation.messages[:-1]]
    conversation.before_call[0]["content"] = ""
    assert conversation.messages[0]["content"]


def test_conversations_are_deterministic_and_leave_the_random_state() -> None:
    """The same arguments give the same conversations; other seeds give others."""
    before = random.getstate()
    sample = sample_conversations(20, 5, "mixed")
    assert random.getstate() == before
    random.seed(1)
    assert sample_conversations(20, 5, "mixed") == sample
    assert sample_conversations(10, 5, "mixed") == sample[:10]
    assert sample_conversations(20, 6, "mixed") != sample
    assert {conversation.kind for conversation in sample} == set(TALKS)


def test_held_out_and_training_conversations_are_disjoint() -> None:
    """What comes before the call decides on the part, and each has its own."""
    for split in ("held_out", "train"):
        for conversation in sample_conversations(200, 0, "mixed", split=split):
            assert conversation.is_held_out == (split == "held_out")
            changed = dataclasses.replace(
                conversation,
                messages=(
                    *conversation.before_call,
                    *({"role": "tool", "content": str(i)} for i in range(3)),
                ),
            )
            assert changed.is_held_out == conversation.is_held_out


def test_conversations_are_frozen_and_may_be_none() -> None:
    """A conversation cannot be changed, and zero of them may be asked for."""
    (conversation,) = sample_conversations(1, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        conversation.messages = ()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        conversation.call.sources = ()  # type: ignore[misc]
    assert sample_conversations(0, 0) == ()


def test_bad_arguments_for_conversations_are_refused() -> None:
    """An unknown kind or part and a negative count say what is allowed."""
    with pytest.raises(ValueError, match="kind: must be one of 'tool', 'override'"):
        sample_conversations(1, 0, "one_question")
    with pytest.raises(ValueError, match="split: must be one of 'held_out'"):
        sample_conversations(1, 0, split="test")
    with pytest.raises(ValueError, match="n: the number of conversations must be 0"):
        sample_conversations(-1, 0)


@pytest.mark.parametrize(
    "text",
    [
        "Ana has 3 pens.",
        " two  spaces \n\tand a tab",
        "Höhe, 漢字, العربية, 👩‍👩‍👧 and e\u0301",
        "",
        "don't . , 's \u00a0 \x00",
    ],
)
def test_the_tokenizer_loses_nothing(demo: Demo, text: str) -> None:
    """Any text comes back from its ids, and the offsets cut it without gaps."""
    _, tokenizer = demo
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    covered = {i for span in encoded["offset_mapping"] for i in range(*span)}
    assert covered == set(range(len(text)))


def test_every_word_is_one_token(demo: Demo) -> None:
    """The tokens of a problem are its words, numbers and marks, without a first one."""
    _, tokenizer = demo
    texts = [
        problem.prompt + problem.completion
        for kind in ("mixed", *LARGE)
        for problem in sample_problems(50, 6, kind)
    ]
    for conversation in sample_conversations(50, 6, "mixed"):
        texts += [message["content"] for message in conversation.messages]
    for text in texts:
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        words = re.findall(r" ?(?:'s|\w+|[^\w\s])", text)
        assert [text[slice(*span)] for span in spans] == words


def test_prompt_and_completion_join_without_a_merge(demo: Demo) -> None:
    """The ids of the whole text are those of its two parts."""
    _, tokenizer = demo
    for problem in sample_problems(100, 7, "mixed"):
        parts = [
            *tokenizer(problem.prompt)["input_ids"],
            *tokenizer(problem.completion)["input_ids"],
        ]
        assert tokenizer(problem.prompt + problem.completion)["input_ids"] == parts


def test_id_zero_is_the_unknown_token(demo: Demo) -> None:
    """Captum's default baseline, id 0, is the blank that the model was trained with."""
    _, tokenizer = demo
    assert tokenizer.convert_ids_to_tokens(0) == tokenizer.unk_token == "<unk>"
    assert tokenizer.bos_token_id is None
    assert len({0, tokenizer.pad_token_id, tokenizer.eos_token_id}) == 3


def test_the_chat_template_shows_every_role(demo: Demo) -> None:
    """Messages stand unchanged between the tokens of their role and the end token."""
    _, tokenizer = demo
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": " Ana has 3 pens. "},
        {"role": "assistant", "content": " Three."},
        {"role": "tool", "content": "Mia has 4 pens."},
        {"role": "tool", "content": ""},
        {"role": "system", "content": "Go on."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|system|>Add.<|end|><|user|> Ana has 3 pens. <|end|>"
        "<|assistant|> Three.<|end|><|tool|>Mia has 4 pens.<|end|><|tool|><|end|>"
        "<|system|>Go on.<|end|>"
    )
    ids = tokenizer(text)["input_ids"]
    assert sum(i in tokenizer.all_special_ids for i in ids) == 12
    with pytest.raises(Exception, match="roles are system, user, assistant and tool"):
        tokenizer.apply_chat_template([{"role": "me", "content": ""}], tokenize=False)


def test_earlier_turns_are_rendered_as_they_were_written(demo: Demo) -> None:
    """The ids before the answer go on from those of the call and its end."""
    _, tokenizer = demo
    for conversation in sample_conversations(50, 8, "mixed"):
        before = render(demo, conversation.before_call)
        call = conversation.messages[-3]["content"]
        ids = [*tokenizer(before)["input_ids"], *tokenizer(call)["input_ids"]]
        ids.append(tokenizer.eos_token_id)
        whole = tokenizer(render(demo, conversation.before_answer))["input_ids"]
        assert whole[: len(ids)] == ids


def test_the_model_is_ready_and_small(demo: Demo) -> None:
    """Float32, in evaluation mode, at most 4 MB in the package."""
    model, _ = demo
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (DEMO_FILES / "model.safetensors").stat().st_size <= 4_000_000


def test_loading_leaves_the_random_state() -> None:
    """Loading draws nothing from the global random state, and gives a new model."""
    before = torch.random.get_rng_state()
    first, _ = load_demo()
    assert torch.equal(torch.random.get_rng_state(), before)
    second, _ = load_demo()
    assert first is not second


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize(
    ("kind", "count", "share"),
    [*((kind, 100, 0.97) for kind in KINDS), *((kind, 60, 0.95) for kind in LARGE)],
)
def test_the_model_solves_held_out_problems(
    demo: Demo, kind: str, count: int, share: float, chat: bool
) -> None:
    """Nearly all worked answers are right to the letter, then end."""
    problems = sample_problems(count // 2 if chat else count, 11, kind)
    prompts = [problem.prompt for problem in problems]
    written = write(demo, as_chats(prompts) if chat else prompts)
    solved = [
        text == problem.completion + "<|end|>"
        for text, problem in zip(written, problems, strict=True)
    ]
    assert sum(solved) >= share * len(problems)


@pytest.mark.parametrize("kind", TALKS)
def test_the_model_goes_on_with_conversations(demo: Demo, kind: str) -> None:
    """At least 95% of its calls and of its answers are right to the letter."""
    talks = sample_conversations(50, 11, kind)
    for place in (-3, -1):
        written = write(demo, [list(talk.messages[:place]) for talk in talks])
        right = [
            text == talk.messages[place]["content"] + "<|end|>"
            for text, talk in zip(written, talks, strict=True)
        ]
        assert sum(right) >= 0.95 * len(talks)


@pytest.mark.parametrize("kind", TALKS)
def test_an_answer_follows_the_tool_where_it_should(demo: Demo, kind: str) -> None:
    """Another number from the tool changes the answer, unless it must not matter."""
    rng = random.Random(0)
    prompts, expected = [], []
    for talk in sample_conversations(50, 12, kind):
        messages = talk.before_answer
        content, change = renumber(messages[-1]["content"], talk.result.span, rng)
        messages[-1]["content"] = content
        prompts.append(messages)
        (value,) = answers_in(talk.answer.text)
        expected.append([value + change * (kind != "irrelevant")])
    written = [answers_in(text) for text in write(demo, prompts)]
    right = [text == value for text, value in zip(written, expected, strict=True)]
    assert sum(right) >= 0.95 * len(right)


@pytest.mark.parametrize("truth", [False, True], ids=["distractor", "true fact"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_follows_its_true_facts_only(
    demo: Demo, kind: str, truth: bool
) -> None:
    """Another number in a fact changes the answers that depend on it, and no other."""
    rng = random.Random(0)
    cases: list[tuple[Problem, int, str, int]] = []
    for problem in sample_problems(80, 12, kind):
        place = rng.randrange(len(problem.answers))
        mine = problem.answers[place].facts
        facts = [fact for fact in problem.facts if (fact in mine) == truth]
        prompt, change = renumber(problem.prompt, rng.choice(facts), rng)
        cases.append((problem, place, prompt, change))
    written = write(demo, [prompt for _, _, prompt, _ in cases])
    right = []
    for (problem, place, _, change), text in zip(cases, written, strict=True):
        value = answers_in(problem.completion)[place] + change * truth
        right.append(answers_in(text)[place : place + 1] == [value])
    assert sum(right) >= 0.97 * len(right)


def test_the_marginalised_explanation_finds_the_true_facts(demo: Demo) -> None:
    """It ranks an answer's true facts above all others, as no shorter way does."""
    model, tokenizer = demo
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    chances: dict[str, list[float]] = {"result": [], "sequence": [], "direct": []}
    for problem in sample_problems(20, 13, "two_questions"):
        inp = TextTokenInput(problem.prompt, tokenizer)
        whole = cage.attribute(inp, problem.completion, units="sentence")
        for answer in problem.answers:
            result = whole.explaining(answer.text)
            parts = (result, result.sequence, result.direct)
            for name, part in zip(chances, parts, strict=True):
                score = {
                    fact: float(part.seq_attr[place])
                    for fact in problem.facts
                    for place, unit in enumerate(result.units)
                    if unit.span == fact and not unit.generated
                }
                assert len(score) == len(problem.facts)
                won = [
                    (score[true] > score[other]) + (score[true] == score[other]) / 2
                    for true in answer.facts
                    for other in set(problem.facts) - set(answer.facts)
                ]
                chances[name].append(sum(won) / len(won))
    mean = {name: sum(values) / len(values) for name, values in chances.items()}
    assert mean["result"] >= 0.93
    assert mean["result"] >= mean["sequence"] + 0.1
    assert mean["result"] >= mean["direct"] + 0.1
