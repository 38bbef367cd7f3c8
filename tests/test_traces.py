"""Traces: generated turns, and text from outside between them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, LLMAttribution
from rich.console import Console

from captum_cage import (
    ChatTokenInput,
    ChatTraceInput,
    GraphContextAttribution,
    TraceIdsInput,
)
from captum_cage.demo.planted import planted_cases, planted_model
from captum_cage.inputs import Prompt
from captum_cage.methods import ContextLengthProbing
from captum_cage.methods.catalogue import capabilities, llm_attribution
from captum_cage.result import GraphAttributionResult
from captum_cage.terminal import TerminalView
from captum_cage.testing import check_engine
from test_methods_reagent import masked
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

TEXT = "Ana has 3 pens. Mia has 4. So Ana has 7. Mia has 3 more pens. How many? Ana."
MESSAGES = [
    {"role": "system", "content": "Ana has 3 pens."},
    {"role": "user", "content": "How many? Mia has 4."},
    {"role": "assistant", "content": "So Ana."},
    {"role": "tool", "content": "Ana has 7 pens. Mia has 3 more."},
    {"role": "assistant", "content": "Ana has 7. So 7."},
]


@pytest.fixture(scope="module")
def chatty():
    """A tokenizer with a chat template, and a small model in float64."""
    tokenizer = tiny_tokenizer("bpe")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tiny_model("llama", vocab_size=len(tokenizer)).double(), tokenizer


@pytest.fixture(scope="module")
def inp(chatty):
    """Three generated stretches, and fixed tokens before and between."""
    tokenizer = chatty[1]
    ids = tokenizer.encode(TEXT)
    generated = np.zeros(len(ids), dtype=bool)
    generated[8:13] = generated[18:21] = generated[-3:] = True
    attributed = np.ones(len(ids), dtype=bool)
    attributed[[0, 14, 17, 22]] = False
    return TraceIdsInput(ids, tokenizer, generated, attributed)


def by_ablation(chatty):
    """Ablation of the small model, with the graph."""
    model, tokenizer = chatty
    return GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))


def log_probabilities(model, ids):
    """Log-probability of each token but the first, by one plain pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].numpy()


class TestTraceIdsInput:
    """A trace as ids."""

    def test_the_prompt_ends_where_generated_text_begins(self, inp, chatty):
        """What follows is the continuation, ids as they are."""
        ids = chatty[1].encode(TEXT)
        assert inp.inp_tensor[0].tolist() == ids[:8]
        assert list(inp.continuation.ids) == ids[8:]
        assert inp.n_itp_features == 7
        assert inp.continuation.ends_generated
        assert not inp.continuation.attributed[[14 - 8, 17 - 8]].any()

    def test_captum_takes_its_prompt(self, inp, chatty):
        """Without the graph it is the text before the first generated token."""
        model, tokenizer = chatty
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
        target = torch.tensor(tokenizer.encode(" Mia"))
        found = llm_attr.attribute(inp, target=target, use_cached_outputs=False)
        assert found.token_attr.shape == (len(target), 7)

    @pytest.mark.parametrize(
        ("changes", "error", "match"),
        [
            ({"generated": [0.5] * 5}, TypeError, "generated: must be booleans"),
            ({"generated": [True]}, ValueError, "one entry for each of the 5 tokens"),
            ({"generated": [False] * 5}, ValueError, "but none was generated"),
            ({"generated": [True] * 5}, ValueError, "the first token is generated"),
            ({"feature_mask": [1] * 5}, TypeError, "feature_mask: must be booleans"),
            ({"baselines": [0] * 5}, TypeError, "one id or token for the whole trace"),
        ],
    )
    def test_bad_arguments_are_refused(self, tokenizer, changes, error, match):
        """Each by name."""
        arguments = {"generated": [False, False, True, False, True], **changes}
        with pytest.raises(error, match=match):
            TraceIdsInput([5, 6, 7, 8, 9], tokenizer, **arguments)


class TestChatTraceInput:
    """A conversation through the chat template."""

    def test_the_ids_are_those_of_the_rendered_chat(self, chatty):
        """Up to the last generated token; nothing after it is read."""
        tokenizer = chatty[1]
        inp = ChatTraceInput(MESSAGES, tokenizer)
        whole = ChatTokenInput(
            MESSAGES, tokenizer, features="all", add_generation_prompt=False
        )
        ids = [*inp.inp_tensor[0].tolist(), *inp.continuation.ids]
        assert ids == whole.inp_tensor[0].tolist()[: len(ids)]
        assert whole.token_text.text.startswith(
            inp.token_text.text + inp.continuation.text.text
        )
        assert inp.continuation.text.text.endswith("Ana has 7. So 7.")

    def test_each_token_of_a_content_is_generated_or_a_source(self, chatty):
        """Headers are neither."""
        inp = ChatTraceInput(MESSAGES, chatty[1])
        after = inp.continuation
        spans = [after.text.text[slice(*span)] for span in after.text.offsets]

        def text(mask):
            return "".join(s for s, m in zip(spans, mask, strict=True) if m)

        assert text(after.generated) == "So Ana.Ana has 7. So 7."
        assert text(after.attributed & ~after.generated) == MESSAGES[3]["content"]

    def test_features_choose_sources(self, chatty):
        """The tool result stays in the text, and gets nothing."""
        inp = ChatTraceInput(MESSAGES, chatty[1], features="user")
        assert "".join(inp.values) == MESSAGES[1]["content"]
        result = by_ablation(chatty).attribute(inp, units="message")
        assert [unit.text for unit in result.units] == [
            MESSAGES[i]["content"] for i in (1, 2, 4)
        ]

    def test_generated_turns_may_be_named(self, chatty):
        """By role or by a function of the message."""
        by_role = ChatTraceInput(MESSAGES, chatty[1], generated="tool")
        by_function = ChatTraceInput(
            MESSAGES, chatty[1], generated=lambda m: "more" in m["content"]
        )
        assert by_role.continuation.ids == by_function.continuation.ids
        assert not by_role.continuation.ends_generated

    def test_the_ids_that_the_model_wrote_are_kept(self, chatty):
        """Where the tokenizer would read their text as others."""
        tokenizer = chatty[1]
        pieces = [i for c in "So Ana." for i in tokenizer.encode(c)]
        assert pieces != tokenizer.encode("So Ana.")
        messages = [dict(message) for message in MESSAGES]
        messages[2]["token_ids"] = [*pieces, tokenizer.convert_tokens_to_ids("<|end|>")]
        inp = ChatTraceInput(messages, tokenizer)
        after = inp.continuation
        assert list(after.ids[: len(pieces)]) == pieces
        assert after.generated[: len(pieces)].all()
        assert not after.generated[len(pieces)]
        plain = ChatTraceInput(MESSAGES, tokenizer).continuation
        assert after.text.text == plain.text.text
        assert after.ids[len(pieces) :] == plain.ids[len(tokenizer.encode("So Ana.")) :]
        assert messages[2]["token_ids"]  # what came is as it was

    def test_tokens_around_those_ids_are_those_of_the_whole(self):
        """Pieces read alone would begin with a space of SentencePiece's own."""
        tokenizer = tiny_tokenizer("sentencepiece")
        tokenizer.chat_template = CHAT_TEMPLATE
        plain = ChatTraceInput(MESSAGES, tokenizer)
        whole = [*plain.inp_tensor[0].tolist(), *plain.continuation.ids]
        messages = [dict(message) for message in MESSAGES]
        wrote = plain.continuation
        messages[2]["token_ids"] = [
            token
            for token, message in zip(
                whole, plain.message_of_token[: len(whole)], strict=True
            )
            if message == 2
        ]
        inp = ChatTraceInput(messages, tokenizer)
        assert [*inp.inp_tensor[0].tolist(), *inp.continuation.ids] == whole
        assert inp.continuation.text == wrote.text
        assert (inp.continuation.generated == wrote.generated).all()

    @pytest.mark.parametrize("around", ["So Ana. \n", "\nSo Ana.", "  So Ana.  "])
    def test_a_template_may_trim_what_the_ids_read(self, around):
        """The ids stay, all of them, and belong to the message."""
        tokenizer = tiny_tokenizer("bpe")
        tokenizer.chat_template = CHAT_TEMPLATE
        assert "| trim" in CHAT_TEMPLATE
        messages = [dict(message) for message in MESSAGES]
        ids = tokenizer.encode(around)
        messages[2] |= {"content": around, "token_ids": ids}
        inp = ChatTraceInput(messages, tokenizer)
        after = inp.continuation
        text = inp.token_text.text + after.text.text
        plain = ChatTraceInput(MESSAGES, tokenizer)
        assert text == plain.token_text.text + plain.continuation.text.text
        assert list(after.ids[: len(ids)]) == ids
        assert after.generated[: len(ids)].all()
        assert not after.generated[len(ids)]
        spans = np.array(after.text.offsets)
        assert (np.diff(spans[:, 0]) >= 0).all()
        assert (spans[:, 0] <= spans[:, 1]).all()

    def test_thoughts_that_the_template_lays_out_anew_are_refused(self):
        """They would be fixed text; where they are dropped, the rest is attributed."""
        tokenizer = tiny_tokenizer("bpe")
        shown = "{{ m['content'].split('</think>')[-1].strip() }}"
        thought = "{{ m['content'].split('</think>')[0].split('<think>')[-1] }}"
        plain = "{{ m['content'] | trim }}"
        other = "{% if '</think>' not in m['content'] %}" + plain + "{% else %}"
        messages = [dict(message) for message in MESSAGES]
        messages[4]["content"] = "<think>Mia has 4.</think>Ana has 7."
        assert plain in CHAT_TEMPLATE
        tokenizer.chat_template = CHAT_TEMPLATE.replace(
            plain, other + "(" + thought + ")" + shown + "{% endif %}"
        )
        with pytest.raises(ValueError, match=r"messages\[4\]: the chat template must"):
            ChatTraceInput(messages, tokenizer)
        tokenizer.chat_template = CHAT_TEMPLATE.replace(
            plain, other + shown + "{% endif %}"
        )
        inp = ChatTraceInput(messages, tokenizer)
        assert inp.continuation.text.text.endswith("Ana has 7.")
        assert "Mia has 4.<" not in inp.continuation.text.text

    @pytest.mark.parametrize(
        ("changed", "arguments", "match"),
        [
            ({2: {"token_ids": [9]}}, {}, r"messages\[2\]: its 'token_ids' must be"),
            ({1: {"token_ids": [9]}}, {}, r"messages\[1\]: only a generated message"),
            ({}, {"generated": "critic"}, "generated: must choose a message"),
            ({}, {"generated": "all"}, "a message that the model did not write"),
            ({}, {"generated": "system"}, "features: must choose a message before"),
            ({4: {"content": None}}, {}, r"messages\[4\]: must have visible text"),
            ({2: {"tool_calls": [{}]}}, {}, r"messages\[2\]: what the model wrote"),
            ({3: {"content": {"pens": 3}}}, {}, r"messages\[3\]: must have visible"),
        ],
    )
    def test_bad_messages_are_refused(self, chatty, changed, arguments, match):
        """Each by name."""
        messages = [{**m, **changed.get(i, {})} for i, m in enumerate(MESSAGES)]

        def read():
            return Prompt.read(
                ChatTraceInput(messages, chatty[1], **arguments), chatty[1]
            )

        with pytest.raises(ValueError, match=match):
            read()


class TestRows:
    """Generated units have rows, others are sources wherever they stand."""

    def test_a_row_is_what_each_unit_before_it_changes(self, inp, chatty):
        """One pass per unit, the unit's tokens replaced."""
        model, tokenizer = chatty
        result = by_ablation(chatty).attribute(inp)
        ids = tokenizer.encode(TEXT)
        after = inp.continuation
        token_of = np.flatnonzero([*(np.arange(8) > 0), *after.attributed])
        generated = np.array([False] * 8 + after.generated.tolist())
        assert result.graph.sources.tolist() == (~generated[token_of]).tolist()
        plain = log_probabilities(model, ids)
        expected = np.zeros_like(result.graph.rows)
        for column, token in enumerate(token_of):
            changed = list(ids)
            changed[token] = 0
            lost = plain - log_probabilities(model, changed)
            scored = np.flatnonzero(generated)
            expected[:, column] = np.where(scored > token, lost[scored - 1], 0.0)
        np.testing.assert_allclose(result.graph.rows, expected, atol=1e-10)

    @pytest.mark.parametrize("normalization", ["positive", "absolute", "signed"])
    def test_the_answer_is_the_sum_over_all_paths(self, inp, chatty, normalization):
        """Enumerated one by one; paths may end in a text that came later."""
        model, tokenizer = chatty
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(model), tokenizer),
            normalization=normalization,
        )
        result = cage.attribute(inp, units={"generated": "word"})
        graph = result.graph
        weights = graph.matrix.toarray()
        generated = graph.generated_units.tolist()
        mass = np.zeros((len(generated), graph.n_units))
        for row, last in enumerate(generated):
            for length in range(row + 1):
                for steps in itertools.combinations(generated[:row][::-1], length):
                    way = [last, *steps]
                    inner = np.prod([weights[a, b] for a, b in itertools.pairwise(way)])
                    mass[row] += inner * weights[way[-1]] * graph.sources
        np.testing.assert_allclose(
            result.token_attr, mass[:, graph.source_units], atol=1e-12
        )
        later = graph.source_units > generated[0]
        assert np.abs(result.token_attr.numpy()[:, later]).max() > 0

    def test_tolerance_and_hops_keep_their_certificate(self, inp, chatty):
        """Mass that comes to a unit from outside stays there."""
        cage = by_ablation(chatty)
        whole = cage.attribute(inp, strategy="loop")
        some = cage.attribute(inp, strategy="loop", tolerance=0.4, explain=-1)
        whole = whole.explaining(-1)
        lacks = (whole.seq_attr - some.seq_attr).numpy()
        assert some.rows_computed < whole.rows_computed
        assert lacks.min() >= -1e-12
        assert lacks.sum() <= some.unresolved + 1e-12 <= 0.4 + 1e-12
        cut = cage.attribute(inp, hops=0, explain=-1)
        assert cut.seq_attr.sum() + cut.leaked + cut.unresolved == pytest.approx(1.0)

    def test_sparse_rows_have_the_same_units(self, inp, chatty):
        """And keep what they are asked to keep."""
        cage = by_ablation(chatty)
        result = cage.attribute(inp, sparsify=0.9, explain=-1)
        assert result.graph.sources.tolist() == (
            cage.attribute(inp).graph.sources.tolist()
        )
        assert result.graph.kept.min() >= 0.9

    @pytest.mark.parametrize("units", ["token", 3])
    @pytest.mark.parametrize(
        "declared",
        [d for _, d in capabilities() if d.name != "reagent"],  # which has none
        ids=lambda d: d.name,
    )
    def test_every_engine_gives_the_loop_s_rows(self, declared, units, chatty):
        """Fixed tokens and turns from outside between generated ones."""
        model, tokenizer = chatty
        count = 8 if declared.name == "shapley" else 10
        ids = tokenizer.encode(TEXT)[:count]
        turn = np.arange(count) % (count // 2)
        generated = turn > count // 4
        attributed = ~np.isin(np.arange(count), [0, count // 4 + 2, count // 2])
        inp = TraceIdsInput(ids, tokenizer, generated, attributed | generated)
        if units == 3:

            def units(text):
                return [(i, min(i + 3, len(text))) for i in range(0, len(text), 3)]

        options, kwargs = {}, {}
        if declared.name in ("reagent", "one-shot-reagent"):
            masked_lm, masked_tokenizer = masked("bert")
            options = {"masked_lm": masked_lm, "masked_tokenizer": masked_tokenizer}
        if declared.name in ("lime", "kernel-shap", "context-cite"):
            pytest.importorskip("sklearn")
        if declared.counted == "n_samples":
            kwargs["n_samples"] = 4
        repeats = 6 if declared.random else 1
        # Captum rounds what these give to float32.
        tolerance = 1e-5 if declared.name == "shapley" else None
        llm_attr = llm_attribution(declared.name, model, tokenizer, **options)
        report = check_engine(
            llm_attr, inp, units=units, repeats=repeats, tolerance=tolerance, **kwargs
        )
        assert report.difference <= report.allowed

    def test_context_lengths_where_the_first_fixed_token_comes_late(self, chatty):
        """Rows before it have a context of no token, rows after it have not."""
        model, tokenizer = chatty
        ids = tokenizer.encode(TEXT)[:14]
        generated = np.isin(np.arange(14), [2, 3, 4, 8, 9, 12, 13])
        attributed = np.arange(14) != 6
        inp = TraceIdsInput(ids, tokenizer, generated, attributed)
        llm_attr = LLMAttribution(ContextLengthProbing(model), tokenizer)
        assert check_engine(llm_attr, inp).difference < 1e-10


class TestAttribution:
    """As a user asks for it."""

    def test_units_may_be_messages(self, chatty):
        """One unit for each, sources and generated in turn."""
        result = by_ablation(chatty).attribute(
            ChatTraceInput(MESSAGES, chatty[1]), units="message", explain=-1
        )
        assert [unit.text for unit in result.units] == [m["content"] for m in MESSAGES]
        assert [u.generated for u in result.units] == [False, False, True, False, True]
        assert result.input_tokens[-1] == MESSAGES[3]["content"]
        assert result.seq_attr.sum() + result.leaked == pytest.approx(1.0)
        assert result.output_probs.shape == (2,)

    def test_messages_are_units_of_a_plain_chat_too(self, chatty):
        """What the model writes is one message."""
        inp = ChatTokenInput(MESSAGES[:2], chatty[1], features="all")
        result = by_ablation(chatty).attribute(inp, " So Ana. So.", units="message")
        assert [unit.text for unit in result.units] == [
            MESSAGES[0]["content"],
            MESSAGES[1]["content"],
            "So Ana. So.",
        ]

    def test_sides_may_have_units_of_their_own(self, chatty):
        """Sources of both places as messages, generated ones as words."""
        result = by_ablation(chatty).attribute(
            ChatTraceInput(MESSAGES, chatty[1]),
            units={"source": "message", "generated": "word"},
        )
        assert result.input_tokens == [MESSAGES[i]["content"] for i in (0, 1, 3)]
        assert result.output_tokens == ["So", "Ana.", "Ana", "has", "7.", "So", "7."]

    def test_ranges_may_not_cross_messages(self, chatty):
        """A unit is generated or it is not."""
        inp = ChatTraceInput(MESSAGES, chatty[1])
        cut = len(inp.token_text.text)
        after = inp.continuation.text.text
        with pytest.raises(ValueError, match="must lie in one message of a trace"):
            by_ablation(chatty).attribute(inp, units=[(cut, cut + len(after))])
        tool = after.index(MESSAGES[3]["content"]) + cut
        own = [(tool, tool + 8), (cut, cut + 7)]
        result = by_ablation(chatty).attribute(inp, units=own)
        assert result.input_tokens[-2] == "Ana has"
        assert result.output_tokens[0] == "So Ana."

    def test_a_question_means_generated_text(self, chatty):
        """The last occurrence may be a tool's; its words have no row."""
        result = by_ablation(chatty).attribute(
            ChatTraceInput(MESSAGES[:4], chatty[1], add_generation_prompt=False),
            " So",
            units="word",
            explain="Ana",
        )
        assert [result.output_tokens[i] for i in result.explained] == ["Ana."]
        with pytest.raises(ValueError, match="no generated unit covers it"):
            result.explaining("more")

    def test_the_model_writes_the_next_turn(self, chatty):
        """After the whole trace, from the generation prompt."""
        model, tokenizer = chatty
        inp = ChatTraceInput(MESSAGES[:4], tokenizer)
        result = by_ablation(chatty).attribute(
            inp, gen_args={"max_new_tokens": 3, "do_sample": False}
        )
        ids = [*inp.inp_tensor[0].tolist(), *inp.continuation.ids]
        written = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=3,
            do_sample=False,
        )[0, len(ids) :]
        given = by_ablation(chatty).attribute(inp, written)
        assert result.generated_text == given.generated_text
        np.testing.assert_array_equal(result.graph.rows, given.graph.rows)
        assert result.graph.n_generated == 3 + int(inp.continuation.generated.sum())
        scores = log_probabilities(model, [*ids, *written.tolist()])[-3:]
        np.testing.assert_allclose(result.output_probs[-3:], np.exp(scores), atol=1e-9)

    def test_nothing_is_generated_after_a_generated_turn(self, chatty):
        """A target would be a second answer."""
        inp = ChatTraceInput(MESSAGES, chatty[1])
        cage = by_ablation(chatty)
        with pytest.raises(ValueError, match="target: must be None where the trace"):
            cage.attribute(inp, " So")
        with pytest.raises(ValueError, match="gen_args: must be None"):
            cage.attribute(inp, gen_args={"max_new_tokens": 1})

    def test_a_saved_result_is_the_same(self, chatty, tmp_path):
        """Sources after generated text included."""
        result = by_ablation(chatty).attribute(
            ChatTraceInput(MESSAGES, chatty[1]), explain=-1
        )
        result.save(tmp_path / "trace.npz")
        loaded = GraphAttributionResult.load(tmp_path / "trace.npz")
        assert loaded.units == result.units
        assert loaded.generated_breaks == result.generated_breaks
        np.testing.assert_array_equal(loaded.seq_attr, result.seq_attr)
        np.testing.assert_array_equal(
            loaded.by("message").seq_attr, result.by("message").seq_attr
        )

    def test_scores_are_summed_over_messages(self, chatty):
        """Those of a tool's words over the tool's message."""
        result = by_ablation(chatty).attribute(
            ChatTraceInput(MESSAGES, chatty[1]), units="word", explain=-1
        )
        shown = result.by("message")
        assert shown.input_tokens == [MESSAGES[i]["content"] for i in (0, 1, 3)]
        assert shown.output_tokens == [MESSAGES[i]["content"] for i in (2, 4)]
        words = [len(MESSAGES[i]["content"].split()) for i in (0, 1, 3)]
        ends = np.cumsum([0, *words])
        sums = np.add.reduceat(result.seq_attr.numpy(), ends[:-1])
        np.testing.assert_allclose(shown.seq_attr, sums, atol=1e-12)

    def test_the_terminal_shows_where_it_ends(self, chatty):
        """A tool's text is listed among the sources, in its place in the text."""
        result = by_ablation(chatty).attribute(
            ChatTraceInput(MESSAGES, chatty[1]), units="sentence", explain=-1
        )
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
        console.print(TerminalView(result, top=20))
        shown = console.export_text()
        assert "after it" in shown
        assert "5 from outside, 3 generated" in shown
        sources = shown[shown.index("Sources") :]
        assert "Mia has 3 more." in sources


class TestPlantedTraces:
    """Conversations in which it is known what the last turn was copied from."""

    @pytest.mark.parametrize("units", ["sentence", "message"])
    @pytest.mark.parametrize("kind", ["trace", "override"])
    def test_the_planted_source_comes_first(self, kind, units):
        """A call that copies an early message, a tool result that overrides it."""
        model, tokenizer = planted_model(kind)
        cage = by_ablation((model, tokenizer))
        first = 0
        cases = planted_cases(40, seed=0, kind=kind)
        for case in cases:
            result = cage.attribute(
                ChatTraceInput(case.messages, tokenizer),
                units=units,
                explain=case.sentences[case.explained].text,
            )
            if units == "message":
                # What the explained turn reads, through earlier turns, is where its
                # sentence comes from.
                origins = {
                    case.sentences[one].message for one in case.origins(case.explained)
                }
                texts = {case.messages[number]["content"] for number in origins}
            else:
                texts = {
                    case.sentences[one].text for one in case.origins(case.explained)
                }
            best = result.input_tokens[int(result.seq_attr.argmax())]
            first += best in texts
        assert first >= 38
