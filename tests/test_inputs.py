"""The ids that the model sees, and which of them stand for which feature."""

from __future__ import annotations

import copy
import dataclasses
import operator
import re

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    ImageMaskInput,
    InterpretableInput,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from captum_cage.inputs import (
    ChatTokenInput,
    Continuation,
    PrefixedInput,
    Prompt,
    RenderedChat,
    TokenIdsInput,
    baseline_id,
    extended_model_input,
    message_at,
    target_ids,
    token_features,
    token_ids,
)
from captum_cage.text import TokenText, decode, special_ids
from conftest import PROMPT, TARGET
from tiny import CHAT_TEMPLATE, tiny_tokenizer

KINDS = ["bpe", "sentencepiece", "wordpiece"]


class OnlyDecodes:
    """A tokenizer that fails as soon as something is tokenised."""

    bos_token_id = eos_token_id = pad_token_id = unk_token_id = None
    all_special_ids = ()

    def decode(self, ids, **_):
        """One letter per id."""
        return "".join(chr(ord("a") + int(i) % 26) for i in ids)


def with_template(template, kind="bpe"):
    """A tokenizer with another chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer(kind))
    tokenizer.chat_template = template
    return tokenizer


def snapshot(inp):
    """Everything that an input holds, in a form that can be compared."""
    return {
        name: value.tolist() if hasattr(value, "tolist") else copy.deepcopy(value)
        for name, value in vars(inp).items()
        if name not in ("tokenizer", "format_fn", "processor_fn")
    }


class TestTokenIds:
    """Ids come as lists, arrays and tensors."""

    @pytest.mark.parametrize(
        "ids",
        [
            [3, 1, 2],
            (3, 1, 2),
            range(3, 0, -1),
            np.array([3, 1, 2], dtype=np.uint16),
            [np.int64(3), 1, np.int32(2)],
            torch.tensor([3, 1, 2]),
            torch.tensor([[3, 1, 2]]),
            [[3, 1, 2]],
            iter([3, 1, 2]),
        ],
    )
    def test_a_sequence_becomes_a_list_of_ints(self, ids):
        """A batch of one is its sequence."""
        expected = [3, 2, 1] if isinstance(ids, range) else [3, 1, 2]
        found = token_ids("ids", ids)
        assert found == expected
        assert all(type(i) is int for i in found)

    @pytest.mark.parametrize(
        ("ids", "error", "match"),
        [
            (
                "31",
                TypeError,
                "ids: must be a sequence of token ids, but str '31' came",
            ),
            (31, TypeError, "ids: must be a sequence .* but int 31 came"),
            (torch.tensor(3), TypeError, "ids: must be a sequence of token ids"),
            (None, TypeError, "but NoneType None came"),
            ([1, 2.0], TypeError, "which are whole numbers, but float 2.0 came"),
            ([1, True], TypeError, "but bool True came"),
            (torch.tensor([1.0]), TypeError, "but float 1.0 came"),
            ([1, "2"], TypeError, "but str '2' came"),
            (torch.ones(2, 3).long(), ValueError, "one sequence, but 2 sequences came"),
        ],
    )
    def test_what_is_no_sequence_of_ids_is_refused(self, ids, error, match):
        """The message names the argument."""
        with pytest.raises(error, match=match):
            token_ids("ids", ids)


@st.composite
def masked_ids(draw):
    """Ids, a feature mask, baselines, and an indicator of the features."""
    ids = draw(st.lists(st.integers(0, 25), min_size=1, max_size=8))
    each = {"min_size": len(ids), "max_size": len(ids)}
    mask = draw(
        st.none()
        | st.lists(st.booleans(), **each)
        | st.lists(st.integers(-2, 4), **each)
        | st.lists(st.integers(-2, 4), **each).map(torch.tensor)
    )
    baselines = draw(st.integers(0, 25) | st.lists(st.integers(0, 25), **each))
    return ids, mask, baselines


class TestTargets:
    """A generated text that is given."""

    def test_a_text_or_its_ids(self, tokenizer):
        """A text without special tokens, ids as they are."""
        ids = tokenizer.encode(TARGET, add_special_tokens=False)
        for target in (TARGET, ids, tuple(ids), np.array(ids), torch.tensor(ids)):
            assert target_ids(target, tokenizer) == ids

    @pytest.mark.parametrize("target", ["", [], torch.zeros(0, dtype=torch.long)])
    def test_an_empty_one_is_refused(self, tokenizer, target):
        """There is nothing to explain."""
        with pytest.raises(ValueError, match="target: must have a token, but it is"):
            target_ids(target, tokenizer)

    @pytest.mark.parametrize("target", [None, 5, {"input_ids": [5]}])
    def test_anything_else_is_refused(self, tokenizer, target):
        """The message says what came."""
        with pytest.raises(TypeError, match=r"target: must be a text, token ids or"):
            target_ids(target, tokenizer)


def test_a_unit_ends_where_a_trace_does():
    """After the breaks that it has."""
    text, every = TokenText("ab c", ((0, 2), (2, 4))), np.ones(2, bool)
    trace = Continuation((5, 6), text, every, every, (2,), True)
    assert trace.all_breaks == (2, 4)


@pytest.mark.parametrize("kind", [Continuation, Prompt, RenderedChat])
def test_what_was_read_cannot_be_changed(kind):
    """A field is not set."""
    one = object.__new__(kind)
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(one, field.name, None)


class TestTokenIdsInput:
    """Ids go in as they are; features are tokens or groups of them."""

    @given(masked_ids(), st.data())
    def test_absent_features_have_their_tokens_replaced(self, masked, data):
        """Against a loop over tokens; everything else stays as it is."""
        ids, mask, baselines = masked
        inp = TokenIdsInput(ids, OnlyDecodes(), mask, baselines)
        listed = list(range(len(ids))) if mask is None else np.asarray(mask).tolist()
        if all(isinstance(entry, bool) for entry in listed):
            listed = [i if entry else -1 for i, entry in enumerate(listed)]
        numbers = sorted({number for number in listed if number >= 0})
        assert inp.n_itp_features == len(numbers) == len(inp.values)
        assert inp.to_tensor().tolist() == [[1] * len(numbers)]
        assert inp.to_model_input().tolist() == [ids]
        entries = st.lists(
            st.sampled_from([0, 1, 0.5]), min_size=len(numbers), max_size=len(numbers)
        )
        rows = data.draw(st.lists(entries, min_size=1, max_size=3))
        by_token = baselines if isinstance(baselines, list) else [baselines] * len(ids)
        expected = [
            [
                by_token[i]
                if number >= 0 and row[numbers.index(number)] != 1
                else ids[i]
                for i, number in enumerate(listed)
            ]
            for row in rows
        ]
        assert inp.to_model_input(torch.tensor(rows)).tolist() == expected

    @given(masked_ids())
    def test_the_fields_are_those_of_captum_s_class(self, masked):
        """Gradient methods slice by ``itp_mask``; ids and tensors are integers."""
        ids, mask, baselines = masked
        inp = TokenIdsInput(ids, OnlyDecodes(), mask, baselines)
        attributed = inp.feature_of_token >= 0
        assert isinstance(inp, TextTokenInput)
        assert inp.inp_tensor.tolist() == [ids]
        assert inp.itp_tensor.tolist() == [np.array(ids)[attributed].tolist()]
        assert (inp.itp_mask is None) == attributed.all()
        if inp.itp_mask is not None:
            assert inp.itp_mask.tolist() == [attributed.tolist()]
        assert {inp.inp_tensor.dtype, inp.to_tensor().dtype} == {torch.int64}

    @pytest.mark.parametrize(
        ("mask", "values"),
        [
            (None, ["a", "b", "c", "d"]),
            ([True, False, True, True], ["a", "c", "d"]),
            ([7, 7, 3, 3], ["cd", "ab"]),
            ([5, 0, -1, 0], ["b … d", "a"]),
            ([0, 1, 1, -9], ["a", "bc"]),
            ([False] * 4, []),
            ([-1] * 4, []),
        ],
    )
    def test_features_are_labelled_by_their_tokens(self, mask, values):
        """In ascending order of their numbers; a gap is shown as one."""
        inp = TokenIdsInput([0, 1, 2, 3], OnlyDecodes(), mask)
        assert inp.values == values
        assert inp.n_itp_features == len(values)

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_gives_what_captum_s_class_gives(self, kind):
        """For the ids that Captum makes of a text, with readable labels."""
        tokenizer = tiny_tokenizer(kind)
        skipped = tokenizer.encode(PROMPT)[-2:]
        captums = TextTokenInput(PROMPT, tokenizer, baselines=3, skip_tokens=skipped)
        ids = captums.inp_tensor
        ours = TokenIdsInput(ids, tokenizer, captums.itp_mask, baselines=3)
        for name in ("n_itp_features", "baselines"):
            assert getattr(ours, name) == getattr(captums, name)
        for name in ("inp_tensor", "itp_tensor", "itp_mask"):
            assert torch.equal(getattr(ours, name), getattr(captums, name))
        assert torch.equal(ours.to_tensor(), captums.to_tensor())
        for feature in range(captums.n_itp_features):
            absent = captums.to_tensor()
            absent[0, feature] = 0
            assert torch.equal(
                ours.to_model_input(absent), captums.to_model_input(absent)
            )
        assert len(ours.values) == len(captums.values)
        assert ours.token_text.text == decode(ids[0].tolist(), tokenizer)

    @pytest.mark.parametrize(
        "method", [FeatureAblation, LayerGradientXActivation, LayerIntegratedGradients]
    )
    @pytest.mark.parametrize("skip", [False, True])
    def test_captum_s_own_classes_take_it(self, model, tokenizer, method, skip):
        """Their numbers are those of a ``TextTokenInput``, bit by bit."""
        skipped = tokenizer.encode(" has") if skip else None
        captums = TextTokenInput(PROMPT, tokenizer, baselines=3, skip_tokens=skipped)
        ours = TokenIdsInput(captums.inp_tensor, tokenizer, captums.itp_mask, 3)
        if method is FeatureAblation:
            llm_attr = LLMAttribution(method(model), tokenizer)
            kwargs = {"use_cached_outputs": False, "forward_in_tokens": False}
        else:
            layer = model.get_input_embeddings()
            llm_attr = LLMGradientAttribution(method(model, layer), tokenizer)
            kwargs = {"n_steps": 3} if method is LayerIntegratedGradients else {}
        target = torch.tensor(tokenizer.encode(" Mia has"))
        expected = llm_attr.attribute(inp=captums, target=target, **kwargs)
        found = llm_attr.attribute(inp=ours, target=target, **kwargs)
        assert expected.token_attr.abs().max() > 0
        assert torch.equal(found.token_attr, expected.token_attr)
        assert torch.equal(found.seq_attr, expected.seq_attr)
        assert found.input_tokens == ours.values

    def test_captum_s_ablation_takes_groups(self, model, tokenizer):
        """A group is one feature: log-probability with all of it less without."""
        ids, (target,) = (
            tokenizer.encode("Ana has 3 pens."),
            tokenizer.encode(" Mia")[:1],
        )
        inp = TokenIdsInput(ids, tokenizer, [1, 1, 0, -1, 0], [2, 3, 4, 5, 6])

        def scored(changed):
            with torch.no_grad():
                logits = model(torch.tensor([changed])).logits[0, -1]
            return torch.log_softmax(logits, -1)[target]

        expected = [
            scored(ids) - scored([*ids[:2], 4, ids[3], 6]),
            scored(ids) - scored([2, 3, *ids[2:]]),
        ]
        found = LLMAttribution(FeatureAblation(model), tokenizer).attribute(
            inp=inp, target=torch.tensor([target]), use_cached_outputs=False
        )
        assert found.seq_attr.tolist() == pytest.approx(
            [float(value) for value in expected], rel=1e-5
        )
        assert found.input_tokens == [" 3 … .", "Ana has"]

    def test_pieces_of_a_character_are_labelled_beside_fixed_tokens_too(
        self, tokenizer
    ):
        """Each by its number, whatever the tokens before them are."""
        ids = tokenizer.encode("ab😀", add_special_tokens=False)
        for fixed in range(len(ids)):
            inp = TokenIdsInput(ids, tokenizer, [i >= fixed for i in range(len(ids))])
            assert inp.values == inp.token_text.labels()[fixed:]
        assert inp.values == ["😀[4/4]"]

    def test_unlabelled_is_the_same_without_texts(self):
        """For the loop, which needs no text of a million prefixes."""
        mask, baselines = np.array([True, False, True]), [4, 5, 6]
        labelled = TokenIdsInput([1, 2, 3], OnlyDecodes(), mask, baselines)
        quick = TokenIdsInput.unlabelled([1, 2, 3], None, mask, baselines)
        absent = torch.zeros(1, 2)
        assert torch.equal(
            quick.to_model_input(absent), labelled.to_model_input(absent)
        )
        assert torch.equal(quick.to_tensor(), labelled.to_tensor())
        assert torch.equal(quick.itp_mask, labelled.itp_mask)
        assert quick.values == ["", ""]

    def test_baselines_may_be_a_token(self, tokenizer):
        """By its name, the unknown token too."""
        for name in ("<eos>", "<unk>"):
            inp = TokenIdsInput([5, 6], tokenizer, baselines=name)
            assert (
                inp.baseline_ids.tolist() == [tokenizer.convert_tokens_to_ids(name)] * 2
            )

    def test_nothing_given_is_changed(self):
        """Ids, mask and baselines stay the caller's."""
        ids, mask, baselines = torch.tensor([[1, 2]]), np.array([3, -1]), [7, 8]
        inp = TokenIdsInput(ids, OnlyDecodes(), mask, baselines)
        inp.to_model_input(torch.zeros(1, 1))
        assert ids.tolist() == [[1, 2]]
        assert mask.tolist() == [3, -1]
        assert baselines == [7, 8]

    @pytest.mark.parametrize(
        ("kwargs", "error", "match"),
        [
            ({"ids": []}, ValueError, "ids: the prompt must have a token"),
            ({"ids": "ab"}, TypeError, "ids: must be a sequence of token ids"),
            ({"ids": [5, -1]}, ValueError, "ids: must be token ids .* but -1 came"),
            ({"ids": [2**32]}, ValueError, "ids: must be token ids below 4294967296"),
            (
                {"feature_mask": [0]},
                ValueError,
                r"each of the 2 tokens, but shape \(1,\)",
            ),
            ({"feature_mask": [[0, 1]] * 2}, ValueError, r"feature_mask: .* \(2, 2\)"),
            ({"feature_mask": [0.5, 1]}, TypeError, "booleans or integers, .* float64"),
            (
                {"baselines": [1]},
                ValueError,
                "one for each of the 2 tokens, but 1 came",
            ),
            ({"baselines": -1}, ValueError, "baselines: .* 0 or more, but -1 came"),
            ({"baselines": [0, -7]}, ValueError, "0 or more, but -7 came"),
            ({"baselines": True}, TypeError, "baselines: .* but bool True came"),
            (
                {"baselines": 0.0},
                TypeError,
                "baselines: must be a sequence .* float 0.0",
            ),
            (
                {"baselines": "<no>"},
                ValueError,
                "'<no>' came, which the tokenizer does",
            ),
        ],
    )
    def test_bad_arguments_are_refused(self, tokenizer, kwargs, error, match):
        """The message names the argument and what came."""
        with pytest.raises(error, match=match):
            TokenIdsInput(**{"ids": [5, 6], "tokenizer": tokenizer, **kwargs})


# --- chats -------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# A header that has a date in it, as Llama 3.1's.
DATED = (
    "{{ bos_token or '' }}<|system|>\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n<|end|>" + CHATML
)
INSTRUCTED = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
RENAMED = (
    "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}</turn>\n{% endfor %}"
)
# As Qwen 3's: only the last turn shows its reasoning, in a form of its own.
REASONING = """
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = '' %}
{%- if '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- endif %}
{{- '<|assistant|>\\n' }}
{%- if loop.last %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
{{- content + '<|end|>\\n' }}
{%- else %}
{{- '<|' + m.role + '|>\\n' + (m.content if m.role != 'tool' else m.content | tojson) }}
{{- '<|end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}
{%- if thinking is defined and not thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{%- endif %}"""
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}"
    "{{ p.text if p.type == 'text' else '[image]' }}{% endfor %}<|end|>{% endfor %}"
)
TOOLS = "{{ tools | length }} tools{% for m in messages %}: {{ m.content }}{% endfor %}"


def said(role, content, **more):
    """A message."""
    return {"role": role, "content": content, **more}


def marked_spans(marked):
    """A text with «marks» around the contents; without them, and their ranges."""
    text, spans = "", []
    for part in re.split("([«»])", marked):
        if part == "«":
            spans.append((len(text), None))
        elif part == "»":
            spans[-1] = (spans[-1][0], len(text))
        else:
            text += part
    return text, tuple(spans)


THOUGHT = "<think>\nSo 3.\n</think>\n\nIt is 3."
CHATS = {
    "a role's name": (
        CHATML,
        [said("user", "user")],
        "<|user|>\n«user»<|end|>\n<|assistant|>\n",
    ),
    "December": (
        DATED,
        [said("user", "December")],
        "<|system|>\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n"
        "<|end|><|user|>\n«December»<|end|>\n<|assistant|>\n",
    ),
    "Date": (
        DATED,
        [said("user", "Date: 26 Jul 2024")],
        "<|system|>\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n"
        "<|end|><|user|>\n«Date: 26 Jul 2024»<|end|>\n<|assistant|>\n",
    ),
    "the same content twice": (
        CHATML,
        [said("user", "Hi"), said("assistant", "Hi"), said("user", "Hi")],
        "<|user|>\n«Hi»<|end|>\n<|assistant|>\nHi<|end|>\n<|user|>\n«Hi»<|end|>\n"
        "<|assistant|>\n",
    ),
    "a content in another": (
        CHATML,
        [said("system", "Say a. b"), said("user", "a. b"), said("user", "b")],
        "<|system|>\nSay a. b<|end|>\n<|user|>\n«a. b»<|end|>\n<|user|>\n«b»<|end|>\n"
        "<|assistant|>\n",
    ),
    "the template's own text": (
        INSTRUCTED,
        [said("user", "[INST] [/INST]")],
        "[INST] «[INST] [/INST]» [/INST]",
    ),
    "the template's marks and braces": (
        CHATML,
        [said("user", "{{ m }}<|end|>\n<|user|>\n{% if %}")],
        "<|user|>\n«{{ m }}<|end|>\n<|user|>\n{% if %}»<|end|>\n<|assistant|>\n",
    ),
    "white space kept": (
        CHATML,
        [said("user", "\n a  b \n")],
        "<|user|>\n\n «a  b» \n<|end|>\n<|assistant|>\n",
    ),
    "white space stripped": (
        RENAMED,
        [said("user", "\n a  b \n"), said("assistant", " c ")],
        "<turn>user\n«a  b»</turn>\n<turn>model\nc</turn>\n",
    ),
    "private characters": (
        CHATML,
        [said("user", "\ue000a\ue001 \ue002")],
        "<|user|>\n«\ue000a\ue001 \ue002»<|end|>\n<|assistant|>\n",
    ),
    "other scripts": (
        INSTRUCTED,
        [said("user", "你好 😀é\u200bשלום")],
        "[INST] «你好 😀é\u200bשלום» [/INST]",
    ),
    "one empty content": (
        CHATML,
        [said("user", " "), said("user", "a")],
        "<|user|>\n <|end|>\n<|user|>\n«a»<|end|>\n<|assistant|>\n",
    ),
    "parts": (
        PARTS,
        [
            said(
                "user",
                [
                    {"type": "text", "text": "Ana "},
                    {"type": "image"},
                    {"type": "text", "text": "Ana"},
                    {"type": "text", "text": " Mia"},
                ],
            )
        ],
        "<|user|>«Ana» [image]«Ana» «Mia»<|end|>",
    ),
}
EVERYONE = {
    "earlier reasoning": (
        REASONING,
        [said("user", "Why?"), said("assistant", THOUGHT), said("user", "So?")],
        "<|user|>\n«Why?»<|end|>\n<|assistant|>\n«It is 3.»<|end|>\n"
        "<|user|>\n«So?»<|end|>\n<|assistant|>\n",
    ),
    "reasoning": (
        REASONING,
        [said("user", "Why?"), said("assistant", THOUGHT)],
        "<|user|>\n«Why?»<|end|>\n<|assistant|>\n«<think>\nSo 3.\n</think>\n\nIt is 3.»"
        "<|end|>\n<|assistant|>\n",
    ),
    "tool results": (
        REASONING,
        [said("user", "Go"), said("tool", 'a "b"\né'), said("assistant", "ok")],
        '<|user|>\n«Go»<|end|>\n<|tool|>\n"«a \\"b\\"\\né»"<|end|>\n<|assistant|>\n'
        "<think>\n\n</think>\n\n«ok»<|end|>\n<|assistant|>\n",
    ),
    "messages without content": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '()' }}{% endfor %}",
        [
            said("system", "Go"),
            said("assistant", None, tool_calls=[]),
            {"role": "assistant"},
        ],
        "<|system|>«Go»<|assistant|>()<|assistant|>()",
    ),
}


def held_to(inp, marked, tokenizer):
    """The input attributes the tokens of the marked contents, and no others."""
    text, spans = marked_spans(marked)
    ids = inp.inp_tensor[0].tolist()
    assert inp.segments == spans
    assert inp.token_text.text == text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ids == encoded["input_ids"]
    expected = []
    for start, stop in encoded["offset_mapping"]:
        shown = [p for p in range(start, stop) if not text[p].isspace()]
        places = (shown or list(range(start, stop)))[:1]
        expected.append(any(a <= p < b for a, b in spans for p in places))
    assert ((inp.feature_of_token >= 0) == expected).all()
    attributed = {
        p
        for span, chosen in zip(inp.token_text.offsets, expected, strict=True)
        for p in range(*span)
        if chosen
    }
    for start, stop in spans:
        assert {p for p in range(start, stop) if not text[p].isspace()} <= attributed


class TestChatTokenInput:
    """Chats go through the template once; only contents are attributed."""

    @pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
    @pytest.mark.parametrize("name", CHATS)
    def test_the_user_s_content_is_attributed_where_it_stands(self, name, kind):
        """Against texts marked by hand; ids are the template's own, byte for byte."""
        template, messages, marked = CHATS[name]
        tokenizer = with_template(template, kind)
        before = copy.deepcopy(messages)
        inp = ChatTokenInput(messages, tokenizer)
        start = tokenizer.bos_token if "bos_token" in template else None
        held_to(inp, (start or "") + marked, tokenizer)
        assert inp.inp_tensor[0].tolist() == tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert inp.messages == messages == before
        assert not any(map(operator.is_, inp.messages, messages))

    @pytest.mark.parametrize("name", EVERYONE)
    def test_content_is_found_where_templates_rewrite_the_chat(self, name):
        """Dropped reasoning has no tokens; what is shown has all of its own."""
        template, messages, marked = EVERYONE[name]
        tokenizer = with_template(template)
        held_to(ChatTokenInput(messages, tokenizer, features="all"), marked, tokenizer)

    @settings(max_examples=60)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["system", "user", "assistant", "tool"]),
                st.text(
                    st.sampled_from("ab \n:{}%<|>😀é你\u0301\u200b\ue000"), max_size=12
                )
                | st.sampled_from(
                    ["user", "<|user|>", "<|end|>\n", "assistant\n", "n"]
                ),
            ),
            min_size=1,
            max_size=4,
        )
    )
    @pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
    def test_any_content_is_found(self, kind, chat):
        """Against a text put together by hand."""
        tokenizer = with_template(CHAT_TEMPLATE, kind)
        marked = tokenizer.bos_token or ""
        for role, content in chat:
            core = content.strip()
            shown = f"«{core}»" if role == "user" and core else core
            marked += f"<|{role}|>\n{shown}<|end|>\n"
        marked += "<|assistant|>\n"
        messages = [said(role, content) for role, content in chat]
        if "«" not in marked:
            with pytest.raises(ValueError, match=r"must choose a mess|visible content"):
                ChatTokenInput(messages, tokenizer)
            return
        held_to(ChatTokenInput(messages, tokenizer), marked, tokenizer)

    @pytest.mark.parametrize("kind", KINDS)
    def test_there_is_one_start_token(self, kind):
        """The template's, and none that the tokenizer would put in front of it."""
        tokenizer = tiny_tokenizer(kind)
        inp = ChatTokenInput([said("user", "Ana has 3 pens.")], tokenizer)
        ids = inp.inp_tensor[0].tolist()
        assert ids.count(tokenizer.bos_token_id) == (kind == "sentencepiece")
        assert "".join(inp.values).replace(" ", "").strip().lower() == "anahas3pens."

    def test_a_token_belongs_to_its_first_visible_character(self):
        """The last token of the content takes newlines after it, not the header's."""
        letters = "Qhi?:\nab"
        vocab = {letter: i for i, letter in enumerate(letters)}
        merges = [("?", "\n"), (":", "a")]
        vocab |= {one + other: len(vocab) + i for i, (one, other) in enumerate(merges)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(vocab, merges))
        )
        tokenizer.chat_template = (
            "Q:{{ messages[0].content }}\n{{ messages[1].content }}"
        )
        messages = [said("user", "hi?"), said("user", "b")]
        inp = ChatTokenInput(messages, tokenizer)
        assert tokenizer.convert_ids_to_tokens(inp.inp_tensor[0].tolist()) == [
            *["Q", ":", "h", "i", "?\n", "b"]
        ]
        assert inp.values == ["h", "i", "?\n", "b"]
        joined = ChatTokenInput([said("user", "ab"), said("user", "b")], tokenizer)
        assert joined.values == ["b", "b"]  # ":a" begins in the header

    def test_a_token_without_text_belongs_to_no_message(self):
        """Wherever it stands."""
        contents = [(0, (0, 2)), (3, (2, 4))]
        spans = [(0, 1), (1, 1), (1, 3), (2, 2), (3, 4), (4, 5)]
        found = [message_at("ab c", span, contents) for span in spans]
        assert found == [0, -1, 0, -1, 3, -1]

    def test_white_space_that_a_tokenizer_trims_is_shown(self):
        """RoBERTa's offsets leave it out; a label without it would be empty."""
        tokenizer = with_template(CHATML)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(
            trim_offsets=True
        )
        assert isinstance(
            tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel
        )
        inp = ChatTokenInput([said("user", "Ana has\n\n3 pens.")], tokenizer)
        assert inp.values == ["Ana", " has", "\n", "\n", "3", " pens", "."]
        assert inp.token_text.text[inp.token_text.offsets[-1][0] :] == "\n"

    @pytest.mark.parametrize(
        ("features", "chosen"),
        [
            ("user", ["u1", "u2"]),
            ("assistant", ["a1"]),
            ("all", ["s1", "u1", "a1", "t1", "u2"]),
            (("system", "tool"), ["s1", "t1"]),
            ({"user"}, ["u1", "u2"]),
            (["assistant", "nobody"], ["a1"]),
            (lambda message: message["content"].endswith("2"), ["u2"]),
            (lambda message: message.get("name") == "x", ["t1"]),
        ],
    )
    def test_features_choose_messages(self, tokenizer, features, chosen):
        """By role, by several, all of them, or by a function."""
        messages = [
            said("system", "s1"),
            said("user", "u1"),
            said("assistant", "a1"),
            said("tool", "t1", name="x"),
            said("user", "u2"),
        ]
        inp = ChatTokenInput(messages, tokenizer, features=features)
        text = inp.token_text.text
        assert [text[start:stop] for start, stop in inp.segments] == chosen

    def test_arguments_go_to_the_template(self):
        """``chat_template`` itself, tools, flags, and the generation prompt."""
        tokenizer, message = with_template(None), said("user", "Hi")
        assert (
            ChatTokenInput([message], tokenizer, chat_template=CHATML).token_text.text
            == "<|user|>\nHi<|end|>\n<|assistant|>\n"
        )
        tool = {"type": "function", "function": {"name": "f"}}
        inp = ChatTokenInput([message], tokenizer, chat_template=TOOLS, tools=[tool])
        assert inp.token_text.text == "1 tools: Hi"
        tokenizer = with_template(REASONING)
        inp = ChatTokenInput([message], tokenizer, thinking=False)
        assert inp.token_text.text.endswith("<think>\n\n</think>\n\n")
        inp = ChatTokenInput([message], tokenizer, add_generation_prompt=False)
        assert inp.token_text.text == "<|user|>\nHi<|end|>\n"

    @pytest.mark.parametrize("template", [CHATML, CHAT_TEMPLATE])
    @pytest.mark.parametrize("end", ["", " "])
    def test_a_final_message_may_be_continued(self, template, end):
        """The prompt then ends with it, and no generation prompt follows."""
        tokenizer = with_template(template)
        messages = [said("user", "Hi"), said("assistant", "It is" + end)]
        inp = ChatTokenInput(
            messages, tokenizer, features="all", continue_final_message=True
        )
        end = end if template == CHATML else ""
        marked = "<|user|>\n«Hi»<|end|>\n<|assistant|>\n«It is»" + end
        held_to(inp, marked, tokenizer)

    def test_baselines_are_those_of_ids(self, tokenizer):
        """One for all tokens."""
        inp = ChatTokenInput([said("user", "Hi")], tokenizer, baselines="<eos>")
        absent = inp.to_model_input(torch.zeros(1, inp.n_itp_features))[0].tolist()
        ids = inp.inp_tensor[0].tolist()
        eos = tokenizer.eos_token_id
        assert absent == [*ids[:2], eos, eos, *ids[4:]]

    def test_messages_may_come_from_a_generator(self, tokenizer):
        """They are read once."""
        inp = ChatTokenInput((said("user", text) for text in ("a", "b")), tokenizer)
        assert inp.values == ["a", "b"]

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
            "{% for m in messages %}{{ m.content }}, {{ m.content }}{% endfor %}",
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            "{% for m in messages %}{{ m.content[:2] }}{% endfor %}",
            "{% for m in messages %}{{ m.content[:2] }}|{{ m.content }}{% endfor %}",
            "{% for m in messages %}{{ m.content | count }}{{ m.content }}{% endfor %}",
            "{% for m in messages %}{{ m.content | replace(' ', '_') }}{% endfor %}",
        ],
    )
    def test_a_template_that_changes_a_content_is_refused(self, template):
        """Its tokens would stand for another text than the message's."""
        with pytest.raises(ValueError, match=r"messages\[1\]: the chat template must"):
            ChatTokenInput(
                [said("system", "x"), said("user", "so it is")], with_template(template)
            )

    @pytest.mark.parametrize(
        ("template", "told"),
        [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ nothing.here }}", "UndefinedError"),
            ("{% for m in messages %}", "TemplateSyntaxError"),
            ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ],
    )
    def test_a_template_that_fails_is_told_as_an_error_of_the_messages(
        self, template, told
    ):
        """It is a program of others, which may raise anything."""
        messages = [{"role": "user", "content": "a"}]
        with pytest.raises(ValueError, match=rf"messages: must be such as .*{told}"):
            ChatTokenInput(messages, tiny_tokenizer(), chat_template=template)

    def test_what_a_template_shows_apart_is_refused(self):
        """The thought before the answer stands there, but not as in the content."""
        tokenizer = with_template(
            "{% set parts = messages[0].content.split('</think>') %}"
            "{{ parts[1] }}. {{ parts[2] }}"
        )
        with pytest.raises(ValueError, match=r"messages\[0\]: the chat template must"):
            ChatTokenInput([said("user", "one</think>two</think>six")], tokenizer)

    def test_a_template_that_counts_characters_is_refused(self):
        """The place that was found by marking the content is then another one."""
        tokenizer = with_template(
            "{{ messages[0].content | count }}{{ messages[0].content }}11"
        )
        with pytest.raises(ValueError, match=r"messages\[0\]: the chat template must"):
            ChatTokenInput([said("user", "1" * 9)], tokenizer)

    @pytest.mark.parametrize(
        ("messages", "kwargs", "error", "match"),
        [
            ([], {}, ValueError, "messages: must have a message, but none came"),
            ("Hi", {}, TypeError, "messages: must be a sequence .* but str 'Hi' came"),
            (said("user", "Hi"), {}, TypeError, "must be a sequence of messages"),
            (3, {}, TypeError, "must be a sequence of messages, but int 3 came"),
            ([{"content": "Hi"}], {}, ValueError, r"messages\[0\]: .* with a 'role'"),
            (
                [said("user", "Hi"), "x"],
                {},
                ValueError,
                r"messages\[1\]: must be a mapp",
            ),
            ([said("user", " \n")], {}, ValueError, "must have visible content"),
            ([said("user", "\ud83d!")], {}, ValueError, "half a surrogate pair came"),
            ([said("user", "a")], {"features": "tool"}, ValueError, "roles are user"),
            (
                [said("user", "a")],
                {"features": ()},
                ValueError,
                "must choose a message",
            ),
            (
                [said("user", "a")],
                {"features": 3},
                TypeError,
                "features: .* int 3 came",
            ),
            (
                [said("user", "a")],
                {"features": lambda message: False},  # noqa: ARG005
                ValueError,
                "a chosen message must have visible content",
            ),
        ],
    )
    def test_bad_messages_are_refused(self, tokenizer, messages, kwargs, error, match):
        """The message names the argument and what came."""
        with pytest.raises(error, match=match):
            ChatTokenInput(messages, tokenizer, **kwargs)

    def test_a_tokenizer_without_chat_template_is_refused(self):
        """With the way out."""
        with pytest.raises(ValueError, match="tokenizer: must have a chat template"):
            ChatTokenInput([said("user", "Hi")], with_template(None))

    def test_a_slow_tokenizer_is_refused(self):
        """It knows no character offsets."""
        tokenizer = ByT5Tokenizer()
        tokenizer.chat_template = CHATML
        with pytest.raises(
            ValueError, match=r"character offsets, .* ByT5Tokenizer came"
        ):
            ChatTokenInput([said("user", "Hi")], tokenizer)


# --- prompts -----------------------------------------------------------------------


class ImageLike(InterpretableInput):
    """Two features that are no tokens, and a processor's output."""

    def __init__(self, ids):
        self.n_itp_features, self.values = 2, ["left", "right"]
        self.ids, self.calls = ids, 0

    def to_tensor(self):
        """Both present."""
        return torch.ones(1, 2)

    def to_model_input(self, perturbed_tensor=None):
        """Ids that stay, and an image whose halves may be blank."""
        self.calls += 1
        present = torch.ones(2) if perturbed_tensor is None else perturbed_tensor[0]
        return {
            "input_ids": torch.tensor([self.ids]),
            "attention_mask": torch.ones(1, len(self.ids), dtype=torch.long),
            "pixel_values": present.float().repeat_interleave(3)[None, None],
        }


class TestPrompt:
    """What the wrapper knows of a prompt."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_text_is_read_as_captum_tokenises_it(self, kind):
        """Ids, text, features and special tokens of a ``TextTokenInput``."""
        tokenizer = tiny_tokenizer(kind)
        ids = tokenizer.encode(PROMPT)
        prompt = Prompt.read(TextTokenInput(PROMPT, tokenizer), tokenizer)
        assert prompt.ids == tuple(ids)
        assert prompt.text.text == decode(ids, tokenizer)
        assert len(prompt.text) == len(ids)
        assert prompt.feature_of_token.tolist() == list(range(len(ids)))
        assert prompt.special.tolist() == [i in special_ids(tokenizer) for i in ids]
        assert prompt.breaks == ()
        assert prompt.takes_ids_alone

    def test_skipped_tokens_are_no_features(self, tokenizer):
        """The other ones are numbered in order."""
        skipped = tokenizer.encode(" has")
        inp = TextTokenInput(PROMPT, tokenizer, skip_tokens=skipped)
        prompt = Prompt.read(inp, tokenizer)
        kept = [i not in skipped for i in prompt.ids]
        assert not all(kept)
        assert ((prompt.feature_of_token >= 0) == kept).all()
        assert_array_equal(prompt.feature_of_token[kept], np.arange(sum(kept)))

    def test_a_chat_has_breaks_at_its_contents(self, tokenizer):
        """No unit reaches into the next message."""
        inp = ChatTokenInput([said("user", "Hi"), said("user", "So")], tokenizer)
        prompt = Prompt.read(inp, tokenizer)
        ends = iter(prompt.breaks)
        found = [prompt.text.text[start : next(ends)] for start in ends]
        assert found == ["Hi", "So"]
        assert prompt.special.sum() == 5

    def test_features_of_several_tokens_are_left_as_they_are(self, tokenizer):
        """Groups, templates and images have no feature per token."""
        ids = tokenizer.encode("Ana has 3 pens.")
        grouped = TokenIdsInput(ids, tokenizer, [0, 0, 1, 2, 3])
        single = TokenIdsInput(ids, tokenizer, [4, 3, 2, 1, -1])
        template = TextTemplateInput("{} has {}", ["Ana", "3 pens"])
        assert Prompt.read(grouped, tokenizer).feature_of_token is None
        assert Prompt.read(template, tokenizer).feature_of_token is None
        assert Prompt.read(ImageLike(ids), tokenizer).feature_of_token is None
        found = Prompt.read(single, tokenizer).feature_of_token
        assert found.tolist() == [3, 2, 1, 0, -1]

    def test_a_template_is_tokenised_as_captum_does_it(self):
        """With a start token where the tokenizer has one."""
        tokenizer = tiny_tokenizer("sentencepiece")
        inp = TextTemplateInput("{} has {}", ["Ana", "3 pens"])
        prompt = Prompt.read(inp, tokenizer)
        assert prompt.ids == tuple(tokenizer.encode("Ana has 3 pens"))
        assert prompt.ids[0] == tokenizer.bos_token_id

    def test_a_processor_is_not_asked_again_for_what_is_known(self, tokenizer):
        """Whether the model takes ids alone is found once."""
        inp = ImageLike([5, 6])
        prompt = Prompt.read(inp, tokenizer)
        assert not prompt.takes_ids_alone
        calls = inp.calls
        assert not prompt.takes_ids_alone
        assert inp.calls == calls

    @pytest.mark.parametrize(
        ("make", "error", "match"),
        [
            (
                lambda _: "Ana has",
                TypeError,
                "inp: must be one of Captum's .* 'Ana has'",
            ),
            (lambda t: TextTokenInput("", t), ValueError, "but it is empty"),
            (lambda _: TextTemplateInput("{}", [""]), ValueError, "but it is empty"),
            (
                lambda t: TextTokenInput("Ana", t, skip_tokens=t.encode("Ana")),
                ValueError,
                "inp: must have a feature to attribute to",
            ),
            (
                lambda t: TokenIdsInput([5, 6], t, [-1, -1]),
                ValueError,
                "inp: must have a feature to attribute to",
            ),
            (
                lambda _: ImageMaskInput(Image.new("RGB", (2, 2))),
                TypeError,
                "inp: must give the model a text, token ids, or a mapping .* came",
            ),
        ],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
    def test_a_prompt_that_cannot_be_attributed_to_is_refused(
        self, tokenizer, make, error, match
    ):
        """Empty ones, ones without features, and what is no input."""
        inp = make(tokenizer)
        with pytest.raises(error, match=match):
            Prompt.read(inp, tokenizer)


class TestBaselineId:
    """The token that stands for an absent generated token."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_choice_is_taken(self, kind):
        """An id as it is, a token by its name."""
        tokenizer = tiny_tokenizer(kind)
        inp = TextTokenInput("a", tokenizer, baselines=3)
        assert baseline_id(7, inp, tokenizer) == 7
        assert (
            baseline_id(tokenizer.eos_token, inp, tokenizer) == tokenizer.eos_token_id
        )

    def test_auto_is_the_baseline_of_the_input(self, tokenizer):
        """Where it has one for all of its tokens."""
        assert baseline_id("auto", TextTokenInput("a", tokenizer), tokenizer) == 0
        assert baseline_id("auto", TextTokenInput("a", tokenizer, 5), tokenizer) == 5
        same = TokenIdsInput([8, 9], tokenizer, baselines=[4, 4])
        assert baseline_id("auto", same, tokenizer) == 4

    def test_auto_is_a_token_of_the_tokenizer_otherwise(self, tokenizer):
        """Unknown, end or padding, whichever it has first; else 0."""
        inp = TextTemplateInput("{}", ["a"])
        several = TokenIdsInput([8, 9], tokenizer, baselines=[4, 5])
        assert baseline_id("auto", inp, tokenizer) == tokenizer.unk_token_id
        assert baseline_id("auto", several, tokenizer) == tokenizer.unk_token_id
        bare = OnlyDecodes()
        assert baseline_id("auto", inp, bare) == 0
        bare.pad_token_id = 6
        assert baseline_id("auto", inp, bare) == 6
        bare.eos_token_id = 5
        assert baseline_id("auto", inp, bare) == 5

    def test_what_the_tokenizer_does_not_know_is_refused(self, tokenizer):
        """Instead of becoming the unknown token."""
        inp = TextTemplateInput("{}", ["a"])
        with pytest.raises(ValueError, match=r"generated_baseline: .* '<no>' came"):
            baseline_id("<no>", inp, tokenizer)
        with pytest.raises(ValueError, match=r"generated_baseline: .* but -1 came"):
            baseline_id(-1, inp, tokenizer)


# --- prompts and what was generated after them -------------------------------------

GENERATED = TARGET + " 😀你"
BASELINE = 2
WORDS = ["Ana", "3 pens", " Mia"]
NAMED = {"one": "Ana", "two": "3 pens", "three": " Mia"}
TEMPLATE = "{} has {}, so has{}."
NAMED_TEMPLATE = "{one} has {two}, so has{three}."
INPUTS = {
    "tokens": lambda t: TextTokenInput(PROMPT, t, baselines=3),
    "tokens, some skipped": lambda t: TextTokenInput(
        PROMPT, t, baselines=3, skip_tokens=t.encode(" has")
    ),
    "ids": lambda t: TokenIdsInput(
        t.encode(PROMPT), t, baselines=list(range(10, 10 + len(t.encode(PROMPT))))
    ),
    "grouped ids": lambda t: TokenIdsInput(
        t.encode(PROMPT),
        t,
        [i % 3 - 1 for i in range(len(t.encode(PROMPT)))],
        list(range(10, 10 + len(t.encode(PROMPT)))),
    ),
    "chat": lambda t: ChatTokenInput(
        [said("user", PROMPT), said("assistant", "So?"), said("user", "Go 😀")],
        t,
        baselines=3,
    ),
    "template of a list": lambda _: TextTemplateInput(TEMPLATE, WORDS),
    "template of a dict": lambda _: TextTemplateInput(
        NAMED_TEMPLATE, NAMED, baselines=dict.fromkeys(NAMED, "?")
    ),
    "callable template": lambda _: TextTemplateInput(
        lambda one, two, three: f"{one}{two}.{three}😀", WORDS, baselines=["X", "", "Y"]
    ),
    "masked template": lambda _: TextTemplateInput(TEMPLATE, WORDS, mask=[7, 2, 7]),
    "masked dict": lambda _: TextTemplateInput(
        NAMED_TEMPLATE, NAMED, mask={"one": 1, "two": 0, "three": 0}
    ),
    "callable baselines": lambda _: TextTemplateInput(
        NAMED_TEMPLATE, NAMED, baselines=lambda: dict.fromkeys(NAMED, "Bo")
    ),
    "callable baselines of a list": lambda _: TextTemplateInput(
        TEMPLATE, WORDS, baselines=lambda: ["A", "B", "C"]
    ),
    "mapping": lambda t: ImageLike(t.encode(PROMPT)),
}


def grouped(prompt, tokenizer, width):
    """Source units of ``width`` features each, generated units of two tokens each."""
    attributed = prompt.feature_of_token
    if attributed is None:
        features = np.arange(prompt.inp.n_itp_features)
        sources = features
    else:
        sources = np.where(attributed >= 0, attributed // width, -1)
    ids = tokenizer.encode(GENERATED, add_special_tokens=False)
    return sources, ids, np.arange(len(ids)) // 2


def ids_of(model_input, tokenizer):
    """The ids that Captum makes of a model input."""
    if isinstance(model_input, str):
        return tokenizer.encode(model_input)
    if isinstance(model_input, dict):
        model_input = model_input["input_ids"]
    return model_input[0].tolist()


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("name", INPUTS)
class TestPrefixedInput:
    """A prompt of any kind, followed by generated ids."""

    def test_the_ids_are_those_of_the_prompt_and_those_generated(self, name, kind):
        """For every prefix, exactly; nothing of the two is tokenised together."""
        tokenizer = tiny_tokenizer(kind)
        inp = INPUTS[name](tokenizer)
        prompt = Prompt.read(inp, tokenizer)
        expected = ids_of(inp.to_model_input(), tokenizer)
        sources, ids, groups = grouped(prompt, tokenizer, 1)
        for t in range(len(ids) + 1):
            prefixed = PrefixedInput(
                prompt, sources, max(sources) + 1, ids[:t], groups[:t], 2, tokenizer
            )
            count = max(sources) + 1 + (t + 1) // 2
            assert prefixed.n_itp_features == len(prefixed.values) == count
            present = prefixed.to_tensor()
            assert present.tolist() == [[1] * count]
            for given_input in (
                prefixed.to_model_input(),
                prefixed.to_model_input(present),
            ):
                assert ids_of(given_input, tokenizer) == [*expected, *ids[:t]]
                if isinstance(given_input, dict):
                    assert given_input["attention_mask"].shape == (1, len(expected) + t)

    @pytest.mark.parametrize("width", [1, 3])
    def test_an_absent_unit_changes_its_own_tokens_alone(self, name, kind, width):
        """Against the input's own perturbation and a loop over generated tokens."""
        tokenizer = tiny_tokenizer(kind)
        inp = INPUTS[name](tokenizer)
        before = snapshot(inp)
        prompt = Prompt.read(inp, tokenizer)
        sources, ids, groups = grouped(prompt, tokenizer, width)
        groups[-3:] = -1  # present, but no feature
        n_sources = max(sources) + 1
        prefixed = PrefixedInput(
            prompt, sources, n_sources, ids, groups, BASELINE, tokenizer
        )
        assert prefixed.n_itp_features == n_sources + max(groups) + 1
        for unit in range(prefixed.n_itp_features):
            indicator = prefixed.to_tensor()
            indicator[0, unit] = 0
            features = inp.to_tensor()
            if unit < n_sources and prompt.feature_of_token is None:
                features[0, unit] = 0
            elif unit < n_sources:
                features[0, prompt.feature_of_token[sources == unit]] = 0
            expected = ids_of(inp.to_model_input(features), tokenizer) + [
                BASELINE if group == unit - n_sources and group >= 0 else i
                for i, group in zip(ids, groups, strict=True)
            ]
            assert ids_of(prefixed.to_model_input(indicator), tokenizer) == expected
            if isinstance(inp, TextTokenInput):
                changed = np.array(expected) != [*prompt.ids, *ids]
                mine = np.zeros(len(expected), bool)
                if unit >= n_sources:
                    mine[len(prompt.ids) :] = groups == unit - n_sources
                elif prompt.feature_of_token is None:
                    mine[: len(prompt.ids)] = inp.feature_of_token == unit
                else:
                    mine[: len(prompt.ids)] = sources == unit
                assert_array_equal(changed, mine)
        assert {**snapshot(inp), "calls": 0} == {**before, "calls": 0}


class TestPrefixedInputs:
    """What holds for some prompts."""

    def test_a_batch_is_perturbed_row_by_row(self, tokenizer):
        """Gradient methods ask for many at once."""
        prompt = Prompt.read(TokenIdsInput([5, 6], tokenizer, baselines=3), tokenizer)
        prefixed = PrefixedInput(
            prompt, np.arange(2), 2, [7, 8], np.array([0, 1]), 4, tokenizer
        )
        found = prefixed.to_model_input(torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]))
        assert found.tolist() == [[5, 3, 7, 4], [3, 6, 4, 8]]

    def test_units_of_tokens_are_told_where_units_are_tokens(self, tokenizer):
        """Of the prompt and of what was generated; -1 for tokens without a unit."""
        plain = TokenIdsInput([5, 6], tokenizer)
        groups = TokenIdsInput([5, 6, 9], tokenizer, [0, -1, 0])
        for inp, sources, expected in (
            (plain, [1, 0], ([5, 6, 7, 8], [1, 0, 2, -1])),
            (plain, [-1, 0], ([5, 6, 7, 8], [-1, 0, 1, -1])),
            (groups, [0], ([5, 6, 9, 7, 8], [0, -1, 0, 1, -1])),
            (TextTemplateInput("{}", ["Ana"]), [0], None),
        ):
            prefixed = PrefixedInput(
                Prompt.read(inp, tokenizer),
                np.array(sources),
                max(sources) + 1,
                [7, 8],
                np.array([0, -1]),
                4,
                tokenizer,
            )
            if expected is None:
                assert prefixed.token_features is None
                with pytest.raises(TypeError, match="features must be tokens or"):
                    token_features(prefixed)
                continue
            ids, units = token_features(prefixed)
            assert (ids, units.tolist()) == expected

    @pytest.mark.parametrize("name", INPUTS)
    def test_ids_are_whole_numbers_where_nothing_was_generated(self, name, tokenizer):
        """A model looks them up."""
        prompt = Prompt.read(INPUTS[name](tokenizer), tokenizer)
        sources = np.arange(prompt.inp.n_itp_features)
        if prompt.feature_of_token is not None:
            sources = prompt.feature_of_token
        none = np.zeros(0, np.int64)
        prefixed = PrefixedInput(
            prompt, sources, max(sources) + 1, [], none, 4, tokenizer
        )
        found = prefixed.to_model_input()
        ids = found["input_ids"] if isinstance(found, dict) else found
        assert ids.dtype == torch.long

    def test_a_mapping_keeps_its_other_entries(self, tokenizer):
        """The image is perturbed by its own input."""
        prompt = Prompt.read(ImageLike([5, 6]), tokenizer)
        prefixed = PrefixedInput(
            prompt, np.arange(2), 2, [7], np.array([0]), 4, tokenizer
        )
        found = prefixed.to_model_input(torch.tensor([[0.0, 1.0, 0.0]]))
        assert found["pixel_values"].tolist() == [[[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]]
        assert found["input_ids"].tolist() == [[5, 6, 4]]
        assert found["attention_mask"].tolist() == [[1, 1, 1]]

    def test_numbers_per_token_grow_where_their_meaning_is_known(self):
        """Attention and token types do; what else has one per token is refused."""
        ids, ones = torch.tensor([[5, 6]]), torch.ones(1, 2)
        known = {"input_ids": ids, "attention_mask": ones, "token_type_ids": ones}
        other = {"note": "a", "sizes": torch.ones(1, 3), "grid": torch.ones(2)}
        found = extended_model_input({**known, **other}, torch.tensor([[7, 8]]))
        assert found["input_ids"].tolist() == [[5, 6, 7, 8]]
        assert found["attention_mask"].tolist() == [[1, 1, 1, 1]]
        assert found["token_type_ids"].tolist() == [[1, 1, 0, 0]]
        assert all(found[name] is value for name, value in other.items())
        assert ids.tolist() == [[5, 6]]
        with pytest.raises(ValueError, match=r"'position_ids': must not .* has 2, as"):
            extended_model_input({**known, "position_ids": ones}, torch.tensor([[7]]))

    def test_a_template_without_its_segments_may_be_empty(self, tokenizer):
        """What was generated still stands; with nothing at all there is an error."""
        prompt = Prompt.read(TextTemplateInput("{}", ["Ana"]), tokenizer)
        absent = torch.zeros(1, 1)
        alone = PrefixedInput(
            prompt, np.arange(1), 1, [7], np.array([-1]), 4, tokenizer
        ).to_model_input(absent)
        assert alone.tolist() == [[7]]
        assert alone.dtype == torch.long
        empty = PrefixedInput(
            prompt, np.arange(1), 1, [], np.zeros(0, np.int64), 4, tokenizer
        )
        with pytest.raises(
            ValueError, match="even where features are absent, but it is"
        ):
            empty.to_model_input(absent)

    @pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
    @pytest.mark.parametrize("name", ["tokens", "ids", "chat", "template of a list"])
    def test_text_for_a_remote_model_goes_on_with_what_is_scored(self, name, kind):
        """Followed by the scored text, it is the whole text; no start token in it."""
        tokenizer = tiny_tokenizer(kind)
        inp = INPUTS[name](tokenizer)
        prompt = Prompt.read(inp, tokenizer)
        ids = tokenizer.encode(TARGET, add_special_tokens=False)
        sources = np.arange(inp.n_itp_features)
        if prompt.feature_of_token is not None:
            sources = prompt.feature_of_token
        for t in range(len(ids)):
            prefixed = PrefixedInput(
                prompt,
                sources,
                max(sources) + 1,
                ids[:t],
                np.arange(t),
                BASELINE,
                tokenizer,
                as_text_before=ids[t : t + 1],
            )
            text = prefixed.to_model_input()
            scored = decode(ids[t : t + 1], tokenizer)
            whole = decode([*prompt.ids, *ids[: t + 1]], tokenizer)
            start = tokenizer.bos_token
            if start is not None:
                whole = whole.removeprefix(start)
            assert (text + scored).removeprefix(" ") == whole.removeprefix(" ")
