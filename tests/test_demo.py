"""The demo model solves its problems, and the problems state their truth."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import TypeAlias

import pytest
import torch
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from captum_cage import GraphContextAttribution
from captum_cage.demo import Answer, Problem, Step, load_demo, sample_problems
from captum_cage.demo.model import DEMO_FILES

Demo: TypeAlias = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]
KINDS = ("one_question", "two_questions")
FACT = re.compile(r"(\w+) has (\d) (?:more )?(\w+?)(?: than (\w+))?\.")
QUESTION = re.compile(r"[Hh]ow many (\w+) does (\w+) have\?")
STEP = re.compile(r"(\w+) has \w+'s (\d+) \+ (\d+) = (\d+) (\w+)\.")
ANSWER = re.compile(r"The (?:first |second )?answer is (\d+)\.")


@pytest.fixture(scope="module")
def demo() -> Demo:
    """The demo model and its tokenizer, loaded once."""
    return load_demo()


def write(demo: Demo, prompts: list[str], chat: bool = False) -> list[str]:
    """What the model writes after each prompt, with its end token."""
    model, tokenizer = demo
    if chat:
        prompts = [
            str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
            )
            for prompt in prompts
        ]
    written = []
    for start in range(0, len(prompts), 100):
        batch = tokenizer(
            prompts[start : start + 100], padding=True, return_tensors="pt"
        )
        ids = model.generate(  # type: ignore[misc]
            **batch, do_sample=False, max_new_tokens=80
        )
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
@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_the_ranges_are_the_sentences(kind: str, split: str) -> None:
    """Every range of a problem cuts out one whole sentence of the form stated."""
    for problem in sample_problems(200, 1, kind, split=split):
        assert problem.kind in KINDS if kind == "mixed" else problem.kind == kind
        assert 6 <= len(problem.facts) <= 9
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


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
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


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
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
    for problem in sample_problems(100, 6, "mixed"):
        text = problem.prompt + problem.completion
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
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|system|>Add.<|end|><|user|> Ana has 3 pens. <|end|>"
        "<|assistant|> Three.<|end|>"
    )
    ids = tokenizer(text)["input_ids"]
    assert sum(i in tokenizer.all_special_ids for i in ids) == 6
    with pytest.raises(Exception, match="The roles are system, user and assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_the_model_is_ready_and_small(demo: Demo) -> None:
    """Float32, in evaluation mode, at most 6 MB in the package."""
    model, _ = demo
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (DEMO_FILES / "model.safetensors").stat().st_size <= 6_000_000


def test_loading_leaves_the_random_state() -> None:
    """Loading draws nothing from the global random state, and gives a new model."""
    before = torch.random.get_rng_state()
    first, _ = load_demo()
    assert torch.equal(torch.random.get_rng_state(), before)
    second, _ = load_demo()
    assert first is not second


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_solves_held_out_problems(demo: Demo, kind: str, chat: bool) -> None:
    """At least 97% of the worked answers are right to the letter, then end."""
    problems = sample_problems(200, 11, kind)
    written = write(demo, [problem.prompt for problem in problems], chat)
    solved = [
        text == problem.completion + "<|end|>"
        for text, problem in zip(written, problems, strict=True)
    ]
    assert sum(solved) >= 0.97 * len(problems)


@pytest.mark.parametrize("truth", [False, True], ids=["distractor", "true fact"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_follows_its_true_facts_only(
    demo: Demo, kind: str, truth: bool
) -> None:
    """Another number in a fact changes the answers that depend on it, and no other."""
    rng = random.Random(0)
    cases: list[tuple[Problem, int, str, int]] = []
    for problem in sample_problems(150, 12, kind):
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
