"""Hand-weighted models do what their cases say, and attributions of them find it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from captum.attr import TextTokenInput
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from captum_cage import ChatTokenInput, GraphAttributionResult, GraphContextAttribution
from captum_cage.demo.planted import (
    COLOURS,
    COPY_DISTANCE,
    LOOKED_UP,
    PLANTED_KINDS,
    PlantedCase,
    planted_cases,
    planted_model,
    planted_tokenizer,
)
from captum_cage.methods.catalogue import (
    capability_of,
    llm_attribution,
    method_named,
    missing_extra,
)
from captum_cage.text import sentence_spans

Planted: TypeAlias = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]

N = 100
END = "<|end|>"
PLAIN = ("copy", "induction", "chain")
TRACES = ("trace", "override")
every_kind = pytest.mark.parametrize("kind", PLANTED_KINDS)

# Methods whose scores add up to something, and others that find what is planted.
SUMMING = {
    "shapley": {},
    "shapley-sampling": {"n_samples": 3},
    "kernel-shap": {"n_samples": 64},
    "integrated-gradients": {"n_steps": 20},
    "gradient-shap": {"n_samples": 10},
    "attnlrp": {},
}
OTHERS: dict[str, dict[str, int]] = {
    "ablation": {},
    "lime": {"n_samples": 64},
    "c-lime": {},
    "l-shap": {},
    "context-cite": {},
    "gradient-x-activation": {},
    "ifr": {},
    "attention-suppression": {},
    "value-weighted-attention": {},
    "clp-cage": {},
}


@cache
def planted(kind: str) -> Planted:
    """The model of a kind and its tokenizer, made once."""
    return planted_model(kind)


def rendered(messages: Sequence[dict[str, str]]) -> str:
    """Messages as the chat template should write them."""
    return "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)


def write(kind: str, prompts: Sequence[str]) -> list[str]:
    """What the model of a kind writes after each prompt."""
    model, tokenizer = planted(kind)
    batch = tokenizer(list(prompts), padding=True, return_tensors="pt")
    ids = model.generate(  # type: ignore[misc]
        **batch, do_sample=False, max_new_tokens=20
    )
    new = ids[:, batch["input_ids"].shape[1] :]
    return [str(tokenizer.decode(row)).replace("<pad>", "") for row in new]


def replay(
    kind: str, conversations: Sequence[Sequence[dict[str, str]]]
) -> list[list[dict[str, str]]]:
    """The conversations with every generated turn written anew."""
    played = [[dict(message) for message in messages] for messages in conversations]
    turns = [
        [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        for messages in played
    ]
    for places in zip(*turns, strict=True):
        prompts = [
            rendered(messages[:place]) + "<|assistant|>"
            for messages, place in zip(played, places, strict=True)
        ]
        for messages, place, text in zip(
            played, places, write(kind, prompts), strict=True
        ):
            messages[place]["content"] = text.removesuffix(END)
    return played


def log_probs(planted: Planted, texts: Sequence[Tensor]) -> list[Tensor]:
    """Log-probability of every token after the first, of each text."""
    model, tokenizer = planted
    batch = tokenizer.pad(
        {"input_ids": [ids.tolist() for ids in texts]},
        return_tensors="pt",
    )
    with torch.no_grad():
        scores = model(**batch).logits.log_softmax(-1)
    return [
        row[:-1].gather(1, ids[1:, None])[-len(text) + 1 :, 0]
        for row, ids, text in zip(scores, batch["input_ids"], texts, strict=True)
    ]


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[Tensor, np.ndarray]:
    """Ids of a text, and the character range of each, shape ``(n, 2)``."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    return torch.tensor(encoded["input_ids"]), np.array(encoded["offset_mapping"])


def inside(offsets: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    """Which tokens lie in a character range, but for the space before it."""
    return (offsets[:, 1] > span[0]) & (offsets[:, 1] <= span[1])


def message_span(case: PlantedCase, message: int) -> tuple[int, int]:
    """Character range of the content of a message in the whole text."""
    spans = [case.span(i) for i, s in enumerate(case.sentences) if s.message == message]
    return spans[0][0], spans[-1][1]


def explained(
    case: PlantedCase,
    name: str = "ablation",
    units: str = "sentence",
    **arguments: int,
) -> tuple[GraphAttributionResult, list[int]]:
    """The last sentence explained, and the unit of each sentence of the case."""
    model, tokenizer = planted(case.kind)
    cage = GraphContextAttribution(llm_attribution(name, model, tokenizer))
    inp = ChatTokenInput(case.before, tokenizer, features="all")
    result = cage.attribute(inp, case.completion, units=units, explain=-1, **arguments)
    cut = len(case.prompt)
    ranges = [case.span(i) for i in range(len(case.sentences))]
    places = [
        (s.generated, (start - cut * s.generated, stop - cut * s.generated))
        for s, (start, stop) in zip(case.sentences, ranges, strict=True)
    ]
    if units != "sentence":
        return result, []
    units_at = [(unit.generated, unit.span) for unit in result.units]
    return result, [units_at.index(place) for place in places]


def last_row(result: GraphAttributionResult) -> np.ndarray:
    """Raw attribution of the last generated unit to all units, shape ``(N,)``."""
    return np.asarray(result.graph.rows[-1])


class TestTexts:
    """Cases say where everything stands."""

    @every_kind
    def test_sentences_are_units_and_stand_where_it_is_said(self, kind: str) -> None:
        """Splitting a message by sentences gives the sentences of the case."""
        for case in planted_cases(N, 1, kind):
            for number, message in enumerate(case.messages):
                content = message["content"]
                mine = [s for s in case.sentences if s.message == number]
                assert [s.span for s in mine] == sentence_spans(content)
                assert all(content[slice(*s.span)] == s.text for s in mine)
                role = message["role"]
                assert all(s.generated == (role == "assistant") for s in mine)
            for place, sentence in enumerate(case.sentences):
                assert case.text[slice(*case.span(place))] == sentence.text

    @every_kind
    def test_prompt_and_completion_are_what_the_template_writes(
        self, kind: str
    ) -> None:
        """The chat template, the properties and the ids of the parts agree."""
        tokenizer = planted_tokenizer()
        for case in planted_cases(N, 2, kind):
            prompt = tokenizer.apply_chat_template(
                case.before, add_generation_prompt=True, tokenize=False
            )
            assert prompt == case.prompt
            assert (
                case.text == rendered(case.messages) == prompt + case.completion + END
            )
            parts = [tokenizer(text).input_ids for text in (prompt, case.completion)]
            ids = tokenizer(case.text).input_ids
            assert ids == [*parts[0], *parts[1], tokenizer.eos_token_id]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == case.text
            assert len(ids) <= tokenizer.model_max_length

    @every_kind
    def test_there_is_something_to_confuse_the_truth_with(self, kind: str) -> None:
        """At least four sentences, or messages of a trace, are not read at all."""
        for case in planted_cases(N, 3, kind):
            last = case.sentences[-1]
            others = set(case.sources) - set(case.origins(case.explained))
            assert len(others) >= 4
            assert len(last.reads) == 1
            if kind in TRACES:
                read = case.messages_read(last.message)
                assert len(read) == 1
                outside = {case.sentences[i].message for i in others} - {*read}
                assert len(outside) >= 4

    @every_kind
    def test_paths_are_real_and_false(self, kind: str) -> None:
        """A real path has edges of the truth only; a false one lacks at least one."""
        for case in planted_cases(N, 4, kind):
            edges = {(i, j) for i, s in enumerate(case.sentences) for j in s.reads}
            for path in (*case.real_paths, *case.false_paths):
                assert path[0] == case.explained
                assert not case.sentences[path[-1]].generated
                assert all(case.sentences[i].generated for i in path[:-1])
                assert all(i > j for i, j in pairwise(path))
                is_real = set(pairwise(path)) <= edges
                assert is_real == (path in case.real_paths)
            assert case.real_paths
            assert not set(case.real_paths) & set(case.false_paths)
            origins = {path[-1] for path in case.real_paths}
            assert set(case.origins(case.explained)) == origins
            direct = {path[-1] for path in case.false_paths if len(path) == 2}
            assert direct == set(case.sources) - origins
            assert any(len(path) == 3 for path in case.false_paths) == (
                kind != "induction"
            )

    def test_chains_have_two_steps_and_a_side_step(self) -> None:
        """The answer depends on the code through the first step, on the lamp never."""
        for case in planted_cases(N, 5, "chain"):
            ((answer, step, code),) = case.real_paths
            assert case.sentences[step].text.startswith("So the key is")
            assert case.sentences[code].text.startswith("The code is")
            (lamp,) = case.sentences[answer - 1].reads
            assert case.sentences[lamp].text.startswith("The lamp is")
            assert (answer, answer - 1, lamp) in case.false_paths

    def test_traces_read_the_call_or_an_early_message(self) -> None:
        """Both ends occur; an override reads the tool, with the early value around."""
        read = {
            case.messages[message]["role"]
            for case in planted_cases(N, 6, "trace")
            for message in case.messages_read(len(case.messages) - 1)
        }
        assert read == {"system", "user", "assistant"}
        for case in planted_cases(N, 6, "override"):
            (tool,) = case.messages_read(len(case.messages) - 1)
            assert case.messages[tool]["role"] == "tool"
            about = [
                i
                for i, sentence in enumerate(case.sentences)
                if sentence.text.startswith("The code is")
            ]
            early, late = about
            assert case.sentences[late].message == tool
            (call,) = (s for s in case.sentences[:-1] if s.generated)
            assert call.reads == (early,)
            # Far enough apart for the latest to win.
            between = case.text[case.span(early)[1] : case.span(late)[0]]
            assert len(planted_tokenizer()(between).input_ids) >= 20

    @every_kind
    def test_samples_are_deterministic_and_leave_the_random_state(
        self, kind: str
    ) -> None:
        """The same arguments give the same cases; other seeds give others."""
        before = random.getstate(), torch.random.get_rng_state()
        sample = planted_cases(20, 5, kind)
        planted_model(kind, seed=3)
        assert random.getstate() == before[0]
        assert torch.equal(torch.random.get_rng_state(), before[1])
        assert planted_cases(10, 5, kind) == sample[:10]
        assert planted_cases(20, 6, kind) != sample
        with pytest.raises(dataclasses.FrozenInstanceError):
            sample[0].kind = "copy"  # type: ignore[misc]

    def test_bad_arguments_are_refused(self) -> None:
        """Unknown kinds, negative counts and odd confidences say what is allowed."""
        assert planted_cases(0, 0) == ()
        with pytest.raises(
            ValueError, match="n: the number of cases must be 0 or more"
        ):
            planted_cases(-1, 0)
        for make in (lambda kind: planted_cases(1, 0, kind), planted_model):
            with pytest.raises(ValueError, match="kind: must be one of 'copy'"):
                make("three_step")
        for confidence in (0.5, 1.0, float("nan")):
            with pytest.raises(ValueError, match="confidence: must be a probability"):
                planted_model(confidence=confidence)


class TestModels:
    """The models do what they are written to do."""

    @every_kind
    def test_every_generated_turn_is_written_greedily(self, kind: str) -> None:
        """In 100 of 100 cases, each turn is written to the letter, and ended."""
        cases = planted_cases(N, 0, kind)
        played = replay(kind, [case.messages for case in cases])
        assert played == [list(case.messages) for case in cases]
        written = write(kind, [case.prompt for case in cases])
        assert written == [case.completion + END for case in cases]

    @every_kind
    def test_the_model_is_sure_of_what_it_writes(self, kind: str) -> None:
        """Log-probabilities are near 0; a colour that is found has 0.98."""
        cases = planted_cases(N, 0, kind)
        _, tokenizer = planted(kind)
        texts = [tokens(tokenizer, case.text) for case in cases]
        scores = log_probs(planted(kind), [ids for ids, _ in texts])
        for case, (_, offsets), score in zip(cases, texts, scores, strict=True):
            generated = inside(offsets, (len(case.prompt), len(case.text)))
            assert score[generated[1:]].min() > -0.04
            words = [case.text[slice(*span)].strip() for span in offsets]
            colour = max(i for i, word in enumerate(words) if word in COLOURS)
            if kind != "copy":
                assert score[colour - 1].exp() == pytest.approx(0.98, abs=3e-3)

    @pytest.mark.parametrize("confidence", [0.7, 0.999])
    def test_the_confidence_is_that_of_a_colour(self, confidence: float) -> None:
        """A colour that is found has the probability asked for."""
        made = planted_model("induction", confidence=confidence)
        (case,) = planted_cases(1, 0)
        ids, _ = tokens(made[1], case.text)
        (score,) = log_probs(made, [ids])
        assert score[-3].exp() == pytest.approx(confidence, abs=1e-3)

    @every_kind
    def test_attention_goes_where_it_is_planted(self, kind: str) -> None:
        """A copy sees the token 17 before it; a look-up, the colour in the source."""
        model, tokenizer = planted_model(kind)
        model.set_attn_implementation("eager")
        for case in planted_cases(20, 7, kind):
            ids, offsets = tokens(tokenizer, case.text)
            with torch.no_grad():
                maps = model(ids[None], output_attentions=True).attentions
            if kind == "copy":
                seen = maps[0][0, 0].diagonal(1 - COPY_DISTANCE)
                assert seen.min() > 0.99
                continue
            for place, sentence in enumerate(case.sentences):
                for read in sentence.reads:
                    # before the colour: "is"; before the full stop: the colour
                    query = np.flatnonzero(inside(offsets, case.span(place)))[-3]
                    key = np.flatnonzero(inside(offsets, case.span(read)))[-2]
                    assert maps[1][0, :, query, key].min() > 0.97
            for back in (1, 2):
                assert maps[0][0, back - 1].diagonal(-back).min() > 0.99

    @pytest.mark.parametrize("seed", [None, 3])
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    @every_kind
    def test_types_implementations_and_rotations_say_the_same(
        self, kind: str, implementation: str, seed: int | None
    ) -> None:
        """Logits do not depend on how the model is run or how its space is turned."""
        made = planted_model(kind, dtype=torch.float64, seed=seed)
        assert {parameter.dtype for parameter in made[0].parameters()} == {
            torch.float64
        }
        made[0].set_attn_implementation(implementation)
        (case,) = planted_cases(1, 8, kind)
        ids, _ = tokens(made[1], case.text)
        with torch.no_grad():
            expected = planted(kind)[0](ids[None]).logits
            found = made[0](ids[None]).logits
        torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)

    @every_kind
    def test_the_unknown_token_is_nothing(self, kind: str) -> None:
        """Id 0 is unknown, and no number of the hidden state stands for it."""
        model, tokenizer = planted(kind)
        assert tokenizer.convert_ids_to_tokens(0) == tokenizer.unk_token == "<unk>"
        assert not model.get_input_embeddings().weight[0].any()
        assert tokenizer("The unicorn is red.").input_ids[1] == 0

    def test_what_nothing_is_said_about_is_missing(self) -> None:
        """Without its source, a look-up finds nothing, and the next one finds that."""
        for case in planted_cases(20, 9, "chain"):
            blank = case.prompt.replace("The code is", "The bell is")
            (written,) = write("chain", [blank])
            assert written.startswith("So the key is missing. Also the gate is ")
            assert written.endswith(" Thus the safe is missing.<|end|>")

    def test_things_go_by_others_in_steps_only(self) -> None:
        """The induction model says of any thing what was said of it last."""
        assert not LOOKED_UP["induction"]
        model, tokenizer = planted("induction")
        text = "<|user|>The harp is red. The lamp is blue.<|end|><|assistant|>So the"
        for thing, colour in (("harp", "red"), ("lamp", "blue"), ("code", "missing")):
            ids, _ = tokens(tokenizer, f"{text} {thing} is")
            with torch.no_grad():
                found = int(model(ids[None]).logits[0, -1].argmax())
            assert tokenizer.decode([found]) == f" {colour}"


class TestTruth:
    """A sentence depends on what it is said to depend on, and on nothing else."""

    @every_kind
    def test_the_last_sentence_follows_its_origins_only(self, kind: str) -> None:
        """An origin's other colour becomes the answer; elsewhere it changes nothing."""
        rng = random.Random(0)
        cases = planted_cases(N, 10, kind)
        changed, expected = [], []
        for number, case in enumerate(cases):
            origins = case.origins(case.explained)
            others = [s for s in case.sources if s not in origins]
            true = number % 2 == 0
            place = rng.choice(origins if true else others)
            source = case.sentences[place]
            old = source.text.split()[-1].strip(".")
            new = rng.choice([c for c in COLOURS if c not in case.text])
            messages = [dict(message) for message in case.messages]
            start, stop = source.span
            content = messages[source.message]["content"]
            messages[source.message]["content"] = (
                content[:start] + source.text.replace(old, new) + content[stop:]
            )
            changed.append(messages)
            last = case.sentences[-1].text
            expected.append(last.replace(old, new) if true else last)
        for messages, last in zip(replay(kind, changed), expected, strict=True):
            assert messages[-1]["content"].endswith(last)

    @every_kind
    def test_every_edge_is_there_and_no_other(self, kind: str) -> None:
        """Blanking what a sentence reads costs 3 or more, all the rest nearly nothing.

        The text is held fixed and each sentence is blanked as a whole, so that this
        tells every edge of every path, real or false.
        """
        _, tokenizer = planted(kind)
        for case in planted_cases(15, 11, kind):
            ids, offsets = tokens(tokenizer, case.text)
            places = [inside(offsets, case.span(i)) for i in range(len(case.sentences))]
            blank = [ids.masked_fill(torch.from_numpy(place), 0) for place in places]
            plain, *scores = log_probs(planted(kind), [ids, *blank])
            for place, sentence in enumerate(case.sentences):
                for earlier in range(place if sentence.generated else 0):
                    lost = (plain - scores[earlier])[places[place][1:]].sum()
                    if earlier in sentence.reads:
                        assert lost > 3
                    else:
                        assert abs(lost) < 0.05

    @pytest.mark.parametrize("kind", TRACES)
    def test_blanking_the_planted_message_costs_the_last_turn_most(
        self, kind: str
    ) -> None:
        """In at least 95 of 100 traces, among all messages before it."""
        _, tokenizer = planted(kind)
        found = 0
        for case in planted_cases(N, 12, kind):
            ids, offsets = tokens(tokenizer, case.text)
            *places, last = (
                inside(offsets, message_span(case, i))
                for i in range(len(case.messages))
            )
            blank = [ids.masked_fill(torch.from_numpy(place), 0) for place in places]
            scores = torch.stack(log_probs(planted(kind), blank))
            lowest = int(scores[:, last[1:]].sum(1).argmin())
            found += (lowest,) == case.messages_read(len(case.messages) - 1)
        assert found >= 95


class TestAttribution:
    """What base methods and the graph make of it."""

    @pytest.mark.parametrize("kind", PLAIN)
    def test_ablation_ranks_the_planted_sentence_first(self, kind: str) -> None:
        """In at least 38 of 40: the edge in its row, and the source over all paths."""
        edges, paths, direct, strays = 0, 0, 0, []
        for case in planted_cases(40, 13, kind):
            result, units = explained(case)
            row = last_row(result)
            (read,) = (units[i] for i in case.sentences[-1].reads)
            (origin,) = (units[i] for i in case.origins(case.explained))
            edges += int(row.argmax()) == read
            paths += int(result.seq_attr.argmax()) == origin
            direct += int(result.direct.seq_attr.argmax()) == origin
            strays.append(np.delete(np.abs(row), read).max() / row[read])
        assert edges >= 38
        assert paths >= 38
        assert max(strays) < 0.01
        if kind == "chain":  # what is left for the sources directly is noise
            assert direct <= 20
        else:
            assert direct >= 38

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            (name, kind)
            for name in (*SUMMING, *OTHERS)
            for kind in PLAIN
            if (name, kind) != ("shapley", "copy")  # too many units
        ],
    )
    def test_a_method_finds_the_planted_edge_and_path(
        self, name: str, kind: str
    ) -> None:
        """The edge is first in the row, and its source over all paths."""
        declared = capability_of(method_named(name)[0])
        assert declared is not None
        if extra := missing_extra(declared):
            pytest.skip(f"{extra} is not installed")
        arguments = {**SUMMING, **OTHERS}[name]
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        for case in planted_cases(1, 14, kind):
            result, units = explained(case, name, **arguments)
            row = np.clip(last_row(result), 0, None)
            (read,) = (units[i] for i in case.sentences[-1].reads)
            (origin,) = (units[i] for i in case.origins(case.explained))
            assert int(row.argmax()) == read
            assert row[read] > 0.85 * row.sum()
            assert int(result.seq_attr.argmax()) == origin

    @pytest.mark.parametrize("kind", ["copy", "induction"])
    def test_gradients_are_smooth_enough_to_be_integrated(self, kind: str) -> None:
        """With 50 steps, the row sums to what is lost when all units are blank."""
        _, tokenizer = planted(kind)
        (case,) = planted_cases(1, 15, kind)
        result, _ = explained(case, "integrated-gradients", "token", n_steps=50)
        rows = result.graph.rows
        ids, _ = tokens(tokenizer, case.text)
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        blank = ids.masked_fill(~special, 0)
        model = planted(kind)[0]
        with torch.no_grad():
            logits = model(torch.stack([ids, blank])).logits
        full, nothing = logits.log_softmax(-1)[:, :-1].gather(
            2, ids[None, 1:, None].expand(2, -1, -1)
        )
        lost = (full - nothing)[-len(rows) - 1 : -1, 0].numpy()
        assert lost.max() > 3
        np.testing.assert_allclose(rows.sum(axis=1), lost, atol=0.02)

    def test_of_plain_text_the_roles_are_read_too(self) -> None:
        """As plain text with role tokens, the planted sentence is first, not alone."""
        model, tokenizer = planted("induction")
        cage = GraphContextAttribution(llm_attribution("ablation", model, tokenizer))
        for case in planted_cases(5, 16):
            inp: Any = TextTokenInput(case.prompt, tokenizer)
            result = cage.attribute(inp, case.completion, units="sentence")
            row = last_row(result)[: result.graph.n_sources]
            (read,) = case.sentences[-1].reads
            best = result.units[int(row.argmax())]
            assert best.span == case.span(read)
            special = np.array([u.special for u in result.units[: len(row)]])
            assert 0.3 < row[special].max() < 0.3 * row.max()
