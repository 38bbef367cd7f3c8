"""Thoughts and answers: where they stand, and what came through them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from captum.attr import LayerGradientXActivation, LLMGradientAttribution

from captum_cage import (
    AttributionGraph,
    ChatTokenInput,
    ChatTraceInput,
    GraphContextAttribution,
    Part,
    TokenIdsInput,
    TraceIdsInput,
)
from captum_cage.result import GraphAttributionResult
from captum_cage.spans import explained_units
from captum_cage.thinking import MARKERS, Thinking
from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

OPEN, CLOSE = MARKERS[0]
PAIR = (OPEN, CLOSE)
PROMPT = "Ana has 3 pens."
TEXT = f"{OPEN}Mia has 4. So 7.{CLOSE}Ana has 7. It is 7."


def marked(*pairs, special=False):
    """A tokenizer with markers of its own."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    names = [name for pair in pairs for name in pair]
    tokenizer.add_tokens(names, special_tokens=special)
    return tokenizer


def parts(text, think="auto", *, before="", turns=None, tokenizer=None):
    """The texts of the thoughts and of the answer."""
    tokenizer = tokenizer or marked(PAIR)
    turns = turns or [(0, len(text))]
    found = Thinking.found(text, turns, before, tokenizer, think)
    assert list(found.breaks) == sorted(set(found.breaks))
    assert all(0 <= end <= len(text) for end in found.breaks)
    assert set(found.spans) == set(Part)
    return [[text[slice(*span)] for span in found.spans[part]] for part in Part]


# --- where they stand ----------------------------------------------------------------


class TestMarkers:
    """Parts of a text by the markers in it."""

    @pytest.mark.parametrize("pair", MARKERS)
    @pytest.mark.parametrize("special", [False, True])
    def test_every_known_format_is_found_by_its_tokenizer(self, pair, special):
        """By the vocabulary; the markers belong to no part."""
        opening, closing = pair
        text = f"{opening}I think.{closing}\n\nIt is."
        tokenizer = marked(pair, special=special)
        assert parts(text, tokenizer=tokenizer) == [["I think."], ["It is."]]
        assert parts(text, tokenizer=tiny_tokenizer()) == [[], []]

    @pytest.mark.parametrize("pair", MARKERS)
    def test_or_by_its_chat_template(self, pair):
        """Where the markers are spelt in ordinary tokens."""
        text = f"{pair[0]}I think.{pair[1]}It is."
        tokenizer = copy.deepcopy(tiny_tokenizer())
        for template in (pair[0] + pair[1], {"default": "", "think": "".join(pair)}):
            tokenizer.chat_template = template
            assert parts(text, tokenizer=tokenizer) == [["I think."], ["It is."]]
        tokenizer.chat_template = pair[1]
        assert parts(text, tokenizer=tokenizer) == [[], []]
        tokenizer.chat_template = None
        assert parts(text, tokenizer=tokenizer) == [[], []]

    def test_the_format_that_the_text_has_is_taken(self):
        """Of a tokenizer that knows several."""
        tokenizer = marked(*MARKERS)
        for opening, closing in MARKERS:
            text = f"{opening}a{closing}b"
            assert parts(text, tokenizer=tokenizer) == [["a"], ["b"]]

    @pytest.mark.parametrize(
        ("text", "thoughts", "answer"),
        [
            (f"{OPEN}a{CLOSE}b", ["a"], ["b"]),
            (f"b {OPEN}a{CLOSE} c", ["a"], ["c"]),
            (f"{OPEN}a{CLOSE}b{OPEN}c{CLOSE}d", ["a", "c"], ["d"]),
            (f"{OPEN}a{CLOSE}{OPEN}c{CLOSE}d", ["a", "c"], ["d"]),
            # Never closed, or closed at the end.
            (f"{OPEN}a", ["a"], []),
            (f"b{OPEN}a", ["a"], []),
            (f"{OPEN}a{CLOSE}b{OPEN}c", ["a", "c"], []),
            (f"{OPEN}a{CLOSE}", ["a"], []),
            (f"{OPEN}a{CLOSE} \n", ["a"], []),
            # Opened by what stands before the text, even if that is not known.
            (f"a{CLOSE}b", ["a"], ["b"]),
            (f"a{CLOSE}b{OPEN}c{CLOSE}d", ["a", "c"], ["d"]),
            # One inside another, and one that is spoken of.
            (f"{OPEN}a{OPEN}b{CLOSE}c{CLOSE}d", [f"a{OPEN}b{CLOSE}c"], ["d"]),
            (f"{OPEN}a {OPEN} b{CLOSE}c", [f"a {OPEN} b"], ["c"]),
            # The same marker twice.
            (f"{OPEN}{OPEN}a{CLOSE}b", ["a"], ["b"]),
            (f"{OPEN}\n{OPEN}a{CLOSE}\n{CLOSE}b", ["a"], ["b"]),
            (f"{OPEN}a{CLOSE}{CLOSE}b", ["a"], ["b"]),
            (f"a{CLOSE}{CLOSE}b", ["a"], ["b"]),
            # An answer may speak of the markers.
            (f"{OPEN}a{CLOSE}It is {CLOSE}.", ["a"], [f"It is {CLOSE}."]),
            # Nothing was thought.
            (f"{OPEN}\n\n{CLOSE}\n\nb", [], ["b"]),
            (f"{OPEN}{CLOSE}", [], []),
            ("b", [], []),
            (" ", [], []),
        ],
    )
    def test_where_thoughts_begin_and_end(self, text, thoughts, answer):
        """The answer is what stands after the last thought."""
        assert parts(text) == [thoughts, answer]

    @pytest.mark.parametrize(
        "before", [OPEN, f"Why?{OPEN}", f"{OPEN}\n", f"x{OPEN} \n"]
    )
    @pytest.mark.parametrize(
        ("text", "thoughts", "answer"),
        [
            (f"a{CLOSE}b", ["a"], ["b"]),
            (f"\na{CLOSE}b", ["\na"], ["b"]),
            ("a", ["a"], []),
            (f"{OPEN}a{CLOSE}b", ["a"], ["b"]),
            (f"\n{OPEN}a", ["a"], []),
            (f"a{OPEN}b{CLOSE}c", [f"a{OPEN}b"], ["c"]),
            (f"a{OPEN}b{CLOSE}c{CLOSE}d", [f"a{OPEN}b{CLOSE}c"], ["d"]),
            (f"a{CLOSE}b{OPEN}c{CLOSE}d", ["a", "c"], ["d"]),
            (f"{OPEN}a{CLOSE}b{OPEN}c{CLOSE}d", ["a", "c"], ["d"]),
        ],
    )
    def test_thoughts_that_the_prompt_opens(self, before, text, thoughts, answer):
        """As many chat templates do; the model may open them once more."""
        for think in ("auto", PAIR):
            assert parts(text, think, before=before) == [thoughts, answer]

    def test_a_prompt_that_closes_the_thought(self):
        """Then there is none, and all is the answer."""
        before = f"How many?{OPEN}\n\n{CLOSE}\n\n"
        assert parts("It is 7.", before=before) == [[], ["It is 7."]]
        assert parts("It is 7.", before=f"{CLOSE} How many?") == [[], []]

    def test_channels(self):
        """An answer in a channel of its own, and messages that all end alike."""
        pair = MARKERS[3]
        tokenizer = marked()
        tokenizer.chat_template = "".join(pair)
        head, final = "<|start|>assistant", "<|channel|>final<|message|>"
        thought = f"{pair[0]}a<|end|>"
        assert parts(f"{thought}{head}{final}b", tokenizer=tokenizer) == [["a"], ["b"]]
        tool = f"{head}<|channel|>commentary<|message|>x<|end|>"
        text = f"{thought}{tool}{head}{thought}{head}{final}b<|end|>"
        assert parts(text, tokenizer=tokenizer) == [["a", "a"], ["b"]]
        # Nothing was thought: what ends is the answer.
        assert parts(f"{final}b<|end|>", tokenizer=tokenizer) == [[], ["b"]]
        assert parts("a<|end|>", tokenizer=tokenizer, before=pair[0]) == [["a"], []]

    def test_special_tokens_at_its_ends_are_not_the_answer(self):
        """Such as the end of a turn, or what a response begins with."""
        text = f"{OPEN}a{CLOSE}<|tool|> \nIt is.<|end|>\n<eos>"
        assert parts(text) == [["a"], ["It is."]]
        assert parts(f"{OPEN}a{CLOSE}<eos>") == [["a"], []]
        inside = f"{OPEN}a{CLOSE}It <eos> is."
        assert parts(inside) == [["a"], ["It <eos> is."]]

    def test_markers_that_are_given(self):
        """Whatever the tokenizer knows; two different texts."""
        text = "(a) b <think>c</think>d"
        assert parts(text, ("(", ")")) == [["a"], ["b <think>c</think>d"]]
        assert parts(text, ["(", ")"]) == [["a"], ["b <think>c</think>d"]]
        assert parts(text, ("[", "]")) == [[], [text]]
        assert parts("|a||b", ("|", "||")) == [["a"], ["b"]]
        for pair in (("", ")"), ("(", ""), ("", ""), ("|", "|"), (" ", ")")):
            with pytest.raises(
                ValueError, match="think: markers must be two different"
            ):
                parts(text, pair)


class TestTurns:
    """Several turns, and text from outside between them."""

    def test_each_turn_has_its_thoughts_and_the_last_the_answer(self):
        """What is from outside belongs to neither."""
        turns = [f"{OPEN}a{CLOSE}b", f"{OPEN}c{CLOSE}d"]
        text = f"{turns[0]} tool {OPEN}x{CLOSE} {turns[1]} tool"
        second = text.rindex(turns[1])
        spans = [(0, len(turns[0])), (second, second + len(turns[1]))]
        assert parts(text, turns=spans) == [["a", "c"], ["d"]]
        assert parts(text, turns=spans[:1]) == [["a"], ["b"]]

    def test_a_turn_without_thoughts_is_an_answer(self):
        """If it is the last, and another one has some."""
        text = f"{OPEN}a{CLOSE}b tool c"
        spans = [(0, text.index(" tool")), (len(text) - 1, len(text))]
        assert parts(text, turns=spans) == [["a"], ["c"]]

    def test_a_turn_that_its_header_opens(self):
        """In the text from outside, as in the prompt; closed or not."""
        for end, answer in ((f"{CLOSE}d", ["d"]), ("", [])):
            text = f"a{CLOSE}b<|assistant|>{OPEN}\nc{end}"
            start = text.index("\nc")
            spans = [(0, text.index("<|assistant|>")), (start, len(text))]
            for before in ("", OPEN):
                found = parts(text, turns=spans, before=before)
                assert found == [["a", "\nc"], answer]


class TestRanges:
    """Ranges that are given."""

    @pytest.mark.parametrize(
        ("think", "thoughts", "answer"),
        [
            ((0, 2), ["ab"], ["cdefgh"]),
            ([0, 2], ["ab"], ["cdefgh"]),
            ((np.int64(0), np.int64(2)), ["ab"], ["cdefgh"]),
            ([(0, 2)], ["ab"], ["cdefgh"]),
            ([(4, 6), (0, 2)], ["ab", "ef"], ["gh"]),
            ([(0, 6), (2, 4)], ["abcdef", "cd"], ["gh"]),
            ((2, 8), ["cdefgh"], []),
        ],
    )
    def test_the_answer_is_what_stands_after_them(self, think, thoughts, answer):
        """One or several, in any order."""
        assert parts("abcdefgh", think) == [thoughts, answer]

    def test_in_several_turns(self):
        """The answer is in the last, after the thoughts."""
        turns = [(0, 3), (5, 8)]
        assert parts("abcdefgh", (0, 2), turns=turns) == [["ab"], ["fgh"]]
        assert parts("abcdefgh", (5, 6), turns=turns) == [["f"], ["gh"]]

    @pytest.mark.parametrize(
        "think", [(0, 9), (-1, 3), (3, 3), (4, 2), [(0, 2), (3, 99)], (0, 1, 2), [()]]
    )
    def test_ranges_outside_the_text_are_refused(self, think):
        """With the length of the text."""
        with pytest.raises(ValueError, match="think: a range must lie in the 8 charac"):
            parts("abcdefgh", think)

    def test_numbers_that_are_not_whole_are_refused(self):
        """Rather than rounded."""
        with pytest.raises(ValueError, match="think: a range must lie in the 8 charac"):
            parts("abcdefgh", [(0.5, 2)])

    @pytest.mark.parametrize("think", ["on", "", 5, [], (), {}, True, {"a": "b"}])
    def test_other_things_are_refused(self, think):
        """By what they must be."""
        with pytest.raises(TypeError, match="think: must be 'auto', a pair of markers"):
            parts("abcdefgh", think)

    def test_none_is_no_thinking(self):
        """Markers in the text are text then."""
        assert parts(TEXT, None) == [[], []]
        assert Thinking.none().spans == {Part.THINK: (), Part.ANSWER: ()}


# --- what is explained ---------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    """It knows markers."""
    tokenizer = marked(PAIR)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    """A small Llama in float64."""
    return tiny_model(vocab_size=len(tokenizer), dtype=torch.float64)


@pytest.fixture(scope="module")
def asked(model, tokenizer):
    """A function that explains a text after the prompt."""

    def ask(text=TEXT, inp=None, normalization="positive", spelt=tokenizer, **more):
        method = LayerGradientXActivation(model, model.get_input_embeddings())
        llm_attr = LLMGradientAttribution(method, spelt)
        cage = GraphContextAttribution(llm_attr, normalization=normalization)
        if inp is None:
            inp = TokenIdsInput(spelt.encode(PROMPT), spelt)
        return cage.attribute(inp, text, **more)

    return ask


def texts(result, explained=None):
    """Texts of the explained units."""
    steps = result.explained if explained is None else explained
    return [result.output_tokens[step] for step in steps]


def walked(result, inside):
    """Share of the absolute mass of the paths that visit a unit, path by path."""
    graph = result.graph
    first = AttributionGraph.from_rows(graph.rows, graph.sources, graph.normalization)
    starts, passing = abs(first.matrix.toarray()), abs(graph.matrix.toarray())

    def walk(unit, mass, rows, passes):
        nonlocal visiting
        is_source = graph.sources[unit]
        if not is_source and result.hops is not None and passes > result.hops:
            return
        if unit in inside:
            visiting += mass
        elif not is_source:
            for before in np.flatnonzero(rows[unit]):
                walk(before, mass * rows[unit, before], passing, passes + 1)

    visiting = 0.0
    for step in result.explained:
        walk(graph.generated_units[step], 1.0, starts, 0)
    return visiting / len(result.explained)


class TestExplained:
    """``explain=Part.ANSWER`` and what no unit reaches across."""

    @pytest.mark.parametrize(
        ("units", "thoughts", "answer"),
        [
            (
                "word",
                ["Mia", "has", "4.", "So", "7."],
                ["Ana", "has", "7.", "It", "is"],
            ),
            ("sentence", ["Mia has 4.", "So 7."], ["Ana has 7.", "It is 7."]),
            ("message", ["Mia has 4. So 7."], ["Ana has 7. It is 7."]),
            ("token", ["M", "ia", " has", " 4", ".", " So"], ["Ana", " has", "7", "."]),
        ],
    )
    def test_the_units_of_a_part(self, asked, units, thoughts, answer):
        """All of them and no other; markers are units of their own."""
        result = asked(units=units, explain=Part.ANSWER)
        assert texts(result)[: len(answer)] == answer
        thinking = result.explaining(Part.THINK)
        assert texts(thinking)[: len(thoughts)] == thoughts
        rest = set(range(len(result.output_tokens)))
        rest -= {*result.explained, *thinking.explained}
        others = [text for text in texts(result, sorted(rest)) if text.strip()]
        assert others == [OPEN, CLOSE]
        assert {0, min(result.explained) - 1} <= rest

    @pytest.mark.parametrize("units", ["word", "sentence", "message"])
    @pytest.mark.parametrize("spelt", ["own tokens", "ordinary tokens"])
    def test_no_unit_reaches_across_a_marker(self, asked, tokenizer, units, spelt):
        """Whether markers are tokens of their own or spelt in several."""
        if spelt == "ordinary tokens":
            tokenizer = copy.deepcopy(tiny_tokenizer())
            tokenizer.chat_template = "".join(PAIR)
            assert len(tokenizer.encode(CLOSE)) > 1
        result = asked(units=units, spelt=tokenizer)
        ends = result.thinking.breaks
        assert [TEXT[end:] for end in ends] == [
            TEXT,
            TEXT[len(OPEN) :],
            TEXT[TEXT.index(CLOSE) :],
            TEXT[TEXT.index("Ana") :],
        ]
        spans = [unit.span for unit in result.units if unit.generated]
        assert not [
            (start, stop) for start, stop in spans for end in ends if start < end < stop
        ]
        without = asked(units=units, spelt=tokenizer, think=None)
        assert len(without.output_tokens) < len(result.output_tokens)
        assert result.by(units).output_tokens == result.output_tokens

    def test_parts_that_are_not_there_cannot_be_explained(self, asked):
        """Which one, and what to pass."""
        for text, part, name in (
            ("It is 7.", Part.ANSWER, "answer"),
            ("It is 7.", Part.THINK, "think"),
            (f"{OPEN}Mia has 4.", Part.ANSWER, "answer"),
        ):
            with pytest.raises(
                ValueError,
                match=f"explain: {part} must be marked .* no {name} was found",
            ):
                asked(text, explain=part)
        with pytest.raises(ValueError, match="Pass think= with the markers or the ran"):
            asked(explain=Part.ANSWER, think=None)
        assert texts(asked(f"{OPEN}Mia has 4.", explain=Part.THINK))

    def test_without_what_is_known_of_thinking_there_is_no_part(self, asked):
        """As of a text that was not read for it."""
        result = asked()
        steps = [unit for unit in result.units if unit.generated]
        with pytest.raises(ValueError, match=r"explain: Part\.THINK must be marked"):
            explained_units(Part.THINK, steps, TEXT)

    def test_thoughts_that_are_given(self, asked):
        """By range or by markers, in any text."""
        text = "Mia has 4. So 7. It is 7."
        cut = len("Mia has 4. So 7.")
        by_range = asked(text, think=(0, cut), units="sentence", explain=Part.ANSWER)
        assert texts(by_range) == ["It is 7."]
        assert by_range.output_tokens == ["Mia has 4.", "So 7.", "It is 7."]
        text = "(Mia has 4.) So 7."
        marked = asked(text, think=("(", ")"), units="sentence", explain=Part.ANSWER)
        assert texts(marked) == ["So 7."]
        # A range cuts a sentence in two.
        cut = asked("Mia has 4 pens.", think=(0, 7), units="sentence")
        assert cut.output_tokens == ["Mia has", "4 pens."]

    def test_a_thought_that_the_prompt_opens(self, asked, tokenizer):
        """By the end of the prompt's text."""
        inp = TokenIdsInput(tokenizer.encode(f"{PROMPT}{OPEN}"), tokenizer)
        text = f"So 7.{CLOSE}It is 7."
        result = asked(text, inp, units="sentence", explain=Part.ANSWER)
        assert texts(result) == ["It is 7."]
        assert texts(result.explaining(Part.THINK)) == ["So 7."]
        unclosed = asked("So 7. It is 7.", inp, units="sentence", explain=Part.THINK)
        assert texts(unclosed) == ["So 7.", "It is 7."]

    def test_the_end_of_the_turn_is_not_explained(self, asked, tokenizer):
        """Its unit is no part of the answer."""
        ids = [*tokenizer.encode(TEXT), tokenizer.eos_token_id]
        result = asked(ids, units="sentence", explain=Part.ANSWER)
        assert texts(result) == ["Ana has 7.", "It is 7."]
        assert result.output_tokens[-1] == "<eos>"

    def test_a_chat(self, asked, tokenizer):
        """The header of the answer's turn opens the thought."""
        chatty = copy.deepcopy(tokenizer)
        chatty.chat_template = CHAT_TEMPLATE.replace(
            "<|assistant|>\n{%", f"<|assistant|>\n{OPEN}\n{{%"
        )
        inp = ChatTokenInput([{"role": "user", "content": "How many?"}], chatty)
        result = asked(
            f"So 7.{CLOSE}It is 7.", inp, units="sentence", explain=Part.ANSWER
        )
        assert texts(result) == ["It is 7."]
        assert texts(result.explaining(Part.THINK)) == ["So 7."]

    def test_a_trace(self, asked, tokenizer):
        """Thoughts of all turns, the answer of the last; tool results are sources."""
        first, last = f"{OPEN}So Mia.{CLOSE}Read.", f"{OPEN}So 7.{CLOSE}It is 7."
        tool = f"{OPEN}Mia has 4.{CLOSE}"
        pieces = [(PROMPT, False), (first, True), (tool, False), (last, True)]
        encoded = [(tokenizer.encode(text), flag) for text, flag in pieces]
        ids = [token for some, _ in encoded for token in some]
        generated = [flag for some, flag in encoded for _ in some]
        inp = TraceIdsInput(ids, tokenizer, generated)
        result = asked(None, inp, units="sentence", explain=Part.ANSWER)
        assert texts(result) == ["It is 7."]
        assert texts(result.explaining(Part.THINK)) == ["So Mia.", "So 7."]
        units = {"So Mia.", "So 7."}
        inside = {i for i, unit in enumerate(result.units) if unit.text in units}
        assert len(inside) == 2
        assert result.share_through() == pytest.approx(walked(result, inside))

    def test_a_chat_trace(self, asked, tokenizer):
        """By messages of a conversation."""
        messages = [
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": f"{OPEN}So Mia.{CLOSE}Read."},
            {"role": "tool", "content": "Mia has 4."},
            {"role": "assistant", "content": f"{OPEN}So 7.{CLOSE}It is 7."},
        ]
        inp = ChatTraceInput(messages, tokenizer)
        result = asked(None, inp, units="sentence", explain=Part.ANSWER)
        assert texts(result) == ["It is 7."]
        assert texts(result.explaining(Part.THINK)) == ["So Mia.", "So 7."]


class TestShareThrough:
    """How much of an answer came through its thoughts."""

    @pytest.mark.parametrize("normalization", ["positive", "absolute", "signed"])
    @pytest.mark.parametrize("hops", [None, 0, 1])
    @pytest.mark.parametrize("units", ["word", "sentence"])
    def test_it_is_the_mass_of_the_paths_that_visit_one(
        self, asked, normalization, hops, units
    ):
        """Each counted once, over all paths written out."""
        text = f"{OPEN}Mia has 4.{CLOSE}Ana 7."
        result = asked(
            text,
            normalization=normalization,
            hops=hops,
            units=units,
            explain=Part.ANSWER,
        )
        first = result.graph.n_sources
        thoughts = result.explaining(Part.THINK).explained
        inside = {first + step for step in thoughts}
        expected = walked(result, inside)
        assert 0 < expected < 1 or hops is not None
        assert result.share_through() == pytest.approx(expected, abs=1e-12)
        assert result.share_through(Part.THINK) == result.share_through()
        # Other spans, in every form that explain= takes.
        for span in (0, (0, 2), "Mia", OPEN):
            steps = result.explaining(span).explained
            expected = walked(result, {first + step for step in steps})
            assert result.share_through(span) == pytest.approx(expected, abs=1e-12)
        assert result.share_through(None) == 1.0

    def test_with_a_foil(self, asked, tokenizer):
        """What speaks for the one rather than the other, through the thoughts."""
        place = len(tokenizer.encode(TEXT)) - 2
        result = asked(foil={place: tokenizer.encode("9")})
        first = result.graph.n_sources
        thoughts = result.explaining(Part.THINK).explained
        expected = walked(result, {first + step for step in thoughts})
        assert result.share_through() == pytest.approx(expected, abs=1e-12)
        plain = asked(explain=place)
        assert abs(plain.share_through() - expected) > 1e-3

    def test_thoughts_that_are_explained_are_visited(self, asked):
        """All of their own mass passes through them."""
        assert asked(explain=Part.THINK).share_through() == 1.0

    def test_a_text_without_thoughts_has_no_share(self, asked):
        """Unless another span is meant."""
        result = asked("It is 7.", units="word")
        with pytest.raises(ValueError, match=r"explain: Part\.THINK must be marked"):
            result.share_through()
        assert 0 < result.share_through("is") < 1


class TestFiles:
    """A result that is saved."""

    def test_parts_are_saved(self, asked, tmp_path):
        """With all that follows from them."""
        result = asked(explain=Part.ANSWER, units="word")
        result.save(tmp_path / "result")
        loaded = GraphAttributionResult.load(tmp_path / "result")
        assert loaded.thinking == result.thinking
        assert loaded.generated_breaks == result.generated_breaks
        assert loaded.share_through() == result.share_through()
        for part in Part:
            again = loaded.explaining(part)
            assert again.explained == result.explaining(part).explained
            assert (again.seq_attr == result.explaining(part).seq_attr).all()
        sentences = loaded.by("sentence").output_tokens
        assert sentences == result.by("sentence").output_tokens
        assert CLOSE in sentences

    def test_a_text_without_parts_is_saved(self, asked, tmp_path):
        """Nothing is marked in it afterwards."""
        asked("It is 7.").save(tmp_path / "result")
        loaded = GraphAttributionResult.load(tmp_path / "result")
        assert loaded.thinking == Thinking.none()
        with pytest.raises(ValueError, match=r"explain: Part\.ANSWER must be marked"):
            loaded.explaining(Part.ANSWER)

    def test_json_has_them(self, asked):
        """As ranges of characters."""
        thinking = asked().to_dict()["thinking"]
        assert [TEXT[slice(*span)] for span in thinking["think"]] == [
            "Mia has 4. So 7."
        ]
        assert [TEXT[slice(*span)] for span in thinking["answer"]] == [
            "Ana has 7. It is 7."
        ]
