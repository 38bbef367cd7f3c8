"""Texts without some of their sources, against lists made token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    RemoteLLMAttribution,
    TextTemplateInput,
    TextTokenInput,
)

from captum_cage import ChatTokenInput, ChatTraceInput, TokenIdsInput, TraceIdsInput
from captum_cage.metrics.removal import MaskedRefill, Remover, removal_name
from test_methods_reagent import masked
from tiny import LocalProvider, image_input, task_of, tiny_model, tiny_tokenizer

FACTS = ["Ana has 3 pens.", "Mia has 4 more pens than Ana."]
FOUND = ["The answer is 18.", "First, read the text."]
ANSWER = "So she sells 9."
GRANULARITIES = ("token", "word", "sentence")
NAMES = ("text", "some skipped", "ids", "groups", "chat", "trace", "chat trace")
USER = {"role": "user", "content": " ".join(FACTS)}
TURNS = [
    {"role": "system", "content": "think!"},
    USER,
    {"role": "assistant", "content": "How many?"},
    {"role": "tool", "content": " ".join(FOUND)},
]
BASELINE, LATER = 9, 11  # of the prompt, and of what follows it


class Case(NamedTuple):
    """An input, and what is known about it without asking anybody."""

    inp: Any
    generated: list[int]
    ids: list[int]
    source: list[int]  # of each token, -1 for none
    written: list[bool]
    prompt: int  # tokens of it


def of_tokens(text, contents, granularity, skipped=()):
    """Ids of a text, and the source of each; white space goes with what is before."""
    read = tiny_tokenizer()(text, return_offsets_mapping=True, add_special_tokens=False)
    spans, inside = [], np.zeros(len(text), dtype=bool)
    for content in contents:
        at = text.index(" ".join(content))
        inside[at : at + len(" ".join(content))] = True
        pieces = content if granularity == "sentence" else " ".join(content).split()
        for piece in pieces:
            at = text.index(piece, at)
            spans.append((at, at + len(piece)))
            at += len(piece)
    source: list[int] = []
    count = 0
    for token, (start, stop) in zip(
        read["input_ids"], read["offset_mapping"], strict=True
    ):
        visible = text[start:stop].lstrip()
        place = stop - len(visible) if visible else start
        if token in skipped or not inside[place]:
            source.append(-1)
        elif granularity == "token":
            source.append(count)
            count += 1
        elif visible:
            found = [n for n, (a, b) in enumerate(spans) if a <= place < b]
            source.append(found[0])
        else:
            source.append(source[-1])
    return read["input_ids"], source


def case_of(name, granularity):
    """A case by its name; its sources are of a granularity."""
    tokenizer = tiny_tokenizer()
    prompt = " ".join(FACTS)
    answer = tokenizer.encode(ANSWER)
    ids, source = of_tokens(prompt, [FACTS], granularity)
    if name == "text":
        inp: Any = TextTokenInput(prompt, tokenizer, baselines=BASELINE)
    elif name == "some skipped":
        stop = tokenizer.encode(".")
        ids, source = of_tokens(prompt, [FACTS], granularity, stop)
        inp = TextTokenInput(prompt, tokenizer, BASELINE, skip_tokens=stop)
    elif name == "ids":
        inp = TokenIdsInput(ids, tokenizer, baselines=BASELINE)
    elif name == "groups":  # whose granularity is their own
        groups = [i // 4 % 3 - 1 for i in range(len(ids))]
        inp = TokenIdsInput(ids, tokenizer, groups, BASELINE)
        source = groups
    elif name == "chat":
        inp = ChatTokenInput(TURNS[:2], tokenizer, baselines=BASELINE)
        text = tokenizer.apply_chat_template(
            TURNS[:2], tokenize=False, add_generation_prompt=True
        )
        ids, source = of_tokens(text, [FACTS], granularity)
    if "trace" not in name:
        size = len(ids)
        later = len(answer)
        source = [*source, *([-1] * later)]
        wrote = [False] * size + [True] * later
        return Case(inp, answer, [*ids, *answer], source, wrote, size)
    if name == "chat trace":
        messages = [*TURNS, {"role": "assistant", "content": ANSWER}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        text = text[: text.index(ANSWER) + len(ANSWER)]
        said = ["How many?", ANSWER]
        heard = [["think!"], FACTS, FOUND]
        ids, source = of_tokens(text, heard, granularity)
        inp = ChatTraceInput(messages, tokenizer, baselines=BASELINE)
        answer = []
        wrote = [s >= 0 for s in of_tokens(text, [[one] for one in said], "word")[1]]
    else:
        parts = [prompt, " How many?", " " + " ".join(FOUND), " " + ANSWER]
        encoded = [tokenizer.encode(part) for part in parts]
        wrote = [n % 2 == 1 for n, part in enumerate(encoded) for _ in part]
        heard = [
            of_tokens(part, [s], granularity)[1]
            for part, s in ((parts[0], FACTS), (parts[2], FOUND))
        ]
        heard[1] = [s + max(heard[0]) + 1 for s in heard[1]]
        source = [*heard[0], *([-1] * len(encoded[1])), *heard[1]]
        source += [-1] * len(encoded[3])
        ids = [token for part in encoded for token in part]
        inp = TraceIdsInput(
            ids[: -len(encoded[3])],
            tokenizer,
            wrote[: -len(encoded[3])],
            baselines=BASELINE,
        )
        answer = encoded[3]
    return Case(inp, answer, ids, source, wrote, wrote.index(True))


def remover_of(case, removal, granularity="token", model=None):
    """What takes sources away from a case."""
    if model is None:
        model = tiny_model(vocab_size=len(tiny_tokenizer()))
    llm_attr = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    task = task_of(llm_attr, case.inp, case.generated, granularity, LATER)
    return Remover(task, removal)


def sets(count):
    """All sources, none, all but one, and some at random."""
    rng = np.random.default_rng(0)
    some = rng.random((4, count)) < 0.5
    return [
        np.ones(count, dtype=bool),
        np.zeros(count, dtype=bool),
        *(np.arange(count) != one for one in (0, count // 2, count - 1)),
        *some,
    ]


every_case = pytest.mark.parametrize(
    ("name", "granularity"),
    [
        (name, granularity)
        for name in NAMES
        for granularity in (GRANULARITIES if name != "groups" else ("token",))
    ],
)


class TestTokens:
    """Sources that are made of tokens."""

    @every_case
    def test_the_text_is_read_as_it_is(self, model, name, granularity):
        """The sources, their sizes, and what the model wrote."""
        case = case_of(name, granularity)
        remover = remover_of(case, "delete", granularity, model)
        assert remover.by_token
        assert remover.n_sources == max(case.source) + 1 > 1
        sizes = [case.source.count(s) for s in range(remover.n_sources)]
        assert remover.sizes.tolist() == sizes
        assert remover.written.tolist() == case.written

    @every_case
    def test_deleted_tokens_are_not_there(self, model, name, granularity):
        """All others are, in order; where nothing is left, what stands for nothing."""
        case = case_of(name, granularity)
        remover = remover_of(case, "delete", granularity, model)
        for kept in sets(remover.n_sources):
            stays = [s < 0 or bool(kept[s]) for s in case.source]
            origin = [place for place, there in enumerate(stays) if there]
            ids = [case.ids[place] for place in origin]
            if origin[0] >= case.prompt:
                ids, origin = [BASELINE, *ids], [-1, *origin]
            changed = remover.changed(kept)
            assert list(changed.ids) == ids
            assert changed.origin.tolist() == origin
            assert changed.hidden.tolist() == [False] * len(ids)
            assert changed.model_input is None

    @every_case
    def test_the_baseline_stands_for_a_token(self, model, name, granularity):
        """That of the prompt, or that of what follows it."""
        case = case_of(name, granularity)
        remover = remover_of(case, "baseline", granularity, model)
        for kept in sets(remover.n_sources):
            ids = [
                token
                if source < 0 or kept[source]
                else BASELINE
                if place < case.prompt
                else LATER
                for place, (token, source) in enumerate(
                    zip(case.ids, case.source, strict=True)
                )
            ]
            changed = remover.changed(kept)
            assert list(changed.ids) == ids
            assert changed.origin.tolist() == list(range(len(ids)))
            assert not changed.hidden.any()

    @every_case
    def test_suppressed_tokens_are_hidden_at_their_places(
        self, model, name, granularity
    ):
        """The text is the same."""
        case = case_of(name, granularity)
        remover = remover_of(case, "suppress", granularity, model)
        for kept in sets(remover.n_sources):
            changed = remover.changed(kept)
            assert list(changed.ids) == case.ids
            assert changed.hidden.tolist() == [
                source >= 0 and not kept[source] for source in case.source
            ]

    def test_a_text_starts_as_its_tokenizer_says_where_it_has_a_start(self):
        """Nothing else is left before the generated text."""
        tokenizer = tiny_tokenizer("sentencepiece")
        model = tiny_model(vocab_size=len(tokenizer))
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        ids = tokenizer.encode(FACTS[0], add_special_tokens=False)
        answer = tokenizer.encode(ANSWER, add_special_tokens=False)
        task = task_of(llm_attr, TokenIdsInput(ids, tokenizer), answer)
        changed = Remover(task, "delete").changed(np.zeros(len(ids), dtype=bool))
        assert list(changed.ids) == [tokenizer.bos_token_id, *answer]

    def test_each_token_may_have_a_baseline_of_its_own(self, model, tokenizer):
        """As in the input."""
        ids = tokenizer.encode(FACTS[0])
        own = list(range(20, 20 + len(ids)))
        inp = TokenIdsInput(ids, tokenizer, baselines=own)
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        task = task_of(llm_attr, inp, tokenizer.encode(ANSWER))
        changed = Remover(task, "baseline").changed(np.zeros(len(ids), dtype=bool))
        assert list(changed.ids[: len(ids)]) == own
        changed = Remover(task, "delete").changed(np.zeros(len(ids), dtype=bool))
        assert changed.ids[0] == own[0]


def rewritten(pieces, kind):
    """Texts in the place of those that are None's partners, by one masked pass.

    Args:
        pieces: texts, and whether each is gone.
        kind: of the masked language model.
    """
    network, tokenizer = masked(kind)
    text, counts = "", []
    for piece, gone in pieces:
        if gone:
            count = len(tokenizer.encode(piece.strip(), add_special_tokens=False))
            counts.append(count)
            text += " " * piece.startswith(" ") + tokenizer.mask_token * count
        else:
            text += piece
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = network(ids).logits[0]
    predicted = []
    for place in (ids[0] == tokenizer.mask_token_id).nonzero()[:, 0]:
        ranked = logits[place].argsort(descending=True).tolist()
        predicted.append(
            next(
                i
                for i in ranked
                if i < len(tokenizer)
                and i not in tokenizer.all_special_ids
                and tokenizer.decode([i]).strip()
            )
        )
    assert len(predicted) == sum(counts)
    found = []
    for piece, gone in pieces:
        if gone:
            mine, predicted = predicted[: counts[0]], predicted[counts[0] :]
            counts = counts[1:]
            new = tokenizer.decode(mine).strip()
            piece = " " * piece.startswith(" ") + new
        found.append(piece)
    return found


class TestMaskedRefill:
    """A masked language model writes something else."""

    def test_its_name_is_short(self):
        """Tables have no place for a model."""
        assert removal_name(MaskedRefill(None, None)) == "masked_lm"
        assert removal_name("delete") == "delete"

    @pytest.mark.parametrize("kind", ["bert", "roberta"])
    def test_what_is_gone_is_filled_by_one_pass(self, model, tokenizer, kind):
        """All gaps at once, from the prompt alone; the rest has its old places."""
        words = " ".join(FACTS).split(" ")
        words = [words[0], *(f" {word}" for word in words[1:])]
        case = case_of("text", "word")
        remover = remover_of(case, MaskedRefill(*masked(kind)), "word", model)
        for gone in ([2], [0, 1], [3, 6, 7], [len(words) - 1]):
            kept = np.ones(len(words), dtype=bool)
            kept[gone] = False
            joined: list[tuple[str, bool]] = []  # a gap is made of all words in it
            for word, stays in zip(words, kept, strict=True):
                if joined and joined[-1][1] == (not stays):
                    joined[-1] = (joined[-1][0] + word, not stays)
                else:
                    joined.append((word, not stays))
            changed = remover.changed(kept)
            text = "".join(rewritten(joined, kind))
            assert text != " ".join(FACTS)
            assert tokenizer.decode(changed.ids) == text + ANSWER
            old = [p for p, s in enumerate(case.source) if s < 0 or kept[s]]
            assert [o for o in changed.origin.tolist() if o >= 0] == old
            for token, origin in zip(changed.ids, changed.origin, strict=True):
                assert origin < 0 or token == case.ids[origin]
            assert not changed.hidden.any()

    def test_nothing_is_written_where_nothing_is_gone(self, model):
        """The masked model is not asked."""
        case = case_of("trace", "sentence")
        remover = remover_of(case, MaskedRefill(*masked("bert")), "sentence", model)
        changed = remover.changed(np.ones(remover.n_sources, dtype=bool))
        assert list(changed.ids) == case.ids

    def test_no_gap_of_a_trace_is_filled_from_what_is_gone(
        self, model, tokenizer, monkeypatch
    ):
        """Each reads up to the end of its turn, and earlier gaps are masks to it."""
        network, reader = masked("bert")
        case = case_of("trace", "sentence")
        remover = remover_of(case, MaskedRefill(network, reader), "sentence", model)
        asked = []
        forward = network.forward

        def noted(input_ids, attention_mask):
            asked.append(input_ids[0].tolist())
            return forward(input_ids=input_ids, attention_mask=attention_mask)

        monkeypatch.setattr(network, "forward", noted)
        changed = remover.changed(np.array([False, True, True, False]))
        monkeypatch.undo()
        between = f" How many? {FOUND[0]}"
        pieces = [(FACTS[0], True), (f" {FACTS[1]}{between}", False)]
        pieces.append((f" {FOUND[1]}", True))
        holes = [
            reader.mask_token * len(reader.encode(text, add_special_tokens=False))
            for text in (FACTS[0], FOUND[1])
        ]
        prompt = f"{holes[0]} {FACTS[1]}"
        texts = [prompt, f"{prompt}{between} {holes[1]}"]
        assert asked == [reader.encode(text) for text in texts]
        beginning = rewritten([pieces[0], (f" {FACTS[1]}", False)], "bert")
        end = rewritten(pieces, "bert")[-1]
        text = "".join([*beginning, between, end, " ", ANSWER])
        assert tokenizer.decode(changed.ids) == text
        old = [p for p, s in enumerate(case.source) if s in (-1, 1, 2)]
        assert [o for o in changed.origin.tolist() if o >= 0] == old


class TestFeatures:
    """Sources that are something else."""

    def test_words_of_a_template_give_way_to_their_baselines(self, tokenizer):
        """As Captum perturbs them; one unit may be several words."""
        inp = TextTemplateInput(
            "{} has 3 {}. {}?", ["Ana", "pens", "Mia"], mask=[7, 3, 7]
        )
        answer = tokenizer.encode(ANSWER)
        remover = remover_of(SimpleNamespace(inp=inp, generated=answer), "baseline")
        assert (remover.by_token, remover.n_sources) == (False, 2)
        assert remover.sizes.tolist() == [1.0, 1.0]
        assert remover.written.tolist() == [True] * len(answer)
        expected = {
            (True, True): "Ana has 3 pens. Mia?",
            (False, True): "Ana has 3 . Mia?",  # features are numbered in order
            (True, False): " has 3 pens. ?",
            (False, False): " has 3 . ?",
        }
        for kept, text in expected.items():
            changed = remover.changed(np.array(kept))
            assert changed.model_input == text
            assert list(changed.ids) == answer
            assert changed.origin.tolist() == list(range(len(answer)))
            assert not changed.hidden.any()

    def test_parts_of_a_picture_are_blackened(self, vision_model, tokenizer):
        """What the processor makes of the picture without them."""
        inp = image_input(tokenizer)
        answer = tokenizer.encode(ANSWER)
        case = SimpleNamespace(inp=inp, generated=answer)
        remover = remover_of(case, "baseline", model=vision_model)
        pixels = np.array(inp.image)
        for kept in ([True, True], [False, True], [True, False], [False, False]):
            changed = remover.changed(np.array(kept))
            left = pixels.copy()
            for half, stays in zip((slice(0, 4), slice(4, 8)), kept, strict=True):
                left[:, half] = left[:, half] if stays else 255
            expected = inp.processor_fn(left)["pixel_values"]
            assert torch.equal(changed.model_input["pixel_values"], expected)
            assert list(changed.ids) == answer


class TestErrors:
    """What is refused."""

    @pytest.mark.parametrize("removal", ["delete", "suppress", MaskedRefill(1, 2)])
    def test_features_can_only_have_baselines(self, tokenizer, removal):
        """They have no tokens that could be left out, hidden or written."""
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        case = SimpleNamespace(inp=inp, generated=tokenizer.encode(ANSWER))
        name = removal_name(removal)
        with pytest.raises(ValueError, match=f"'{name}' needs sources that are made"):
            remover_of(case, removal)

    @pytest.mark.parametrize(
        ("removal", "error", "match"),
        [
            ("cut", ValueError, "removal: must be one of 'delete', 'baseline'"),
            (None, TypeError, "removal: must be a name or a MaskedRefill, but NoneTy"),
            (MaskedRefill(1, 2), TypeError, "masked_lm"),
        ],
    )
    def test_what_is_no_removal_is_refused(self, removal, error, match):
        """By name."""
        with pytest.raises(error, match=match):
            remover_of(case_of("ids", "token"), removal)

    def test_attention_that_cannot_be_replaced_is_refused(self, tokenizer):
        """Nothing can be hidden in it."""
        model = tiny_model(vocab_size=len(tokenizer), model_type="bloom")
        with pytest.raises(ValueError, match="removal='suppress': needs a model whose"):
            remover_of(case_of("ids", "token"), "suppress", model=model)

    def test_nothing_can_be_hidden_from_afar(self, model, tokenizer):
        """The model itself is needed."""
        provider = LocalProvider(model, tokenizer)
        llm_attr = RemoteLLMAttribution(
            FeatureAblation(RemoteLLMAttribution.placeholder_model),
            tokenizer,
            provider,
        )
        case = case_of("ids", "token")
        task = task_of(llm_attr, case.inp, case.generated)
        with pytest.raises(ValueError, match="'suppress' needs the model itself"):
            Remover(task, "suppress")
