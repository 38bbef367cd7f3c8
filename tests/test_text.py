"""What the tokens of a text stand for, and where words and sentences end."""

from __future__ import annotations

import itertools

import pytest
import sentencex
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from captum_cage.text import (
    TokenText,
    decode,
    read_tokens,
    sentence_spans,
    shifted,
    special_ids,
    word_spans,
)
from tiny import CORPUS, MARKS, tiny_tokenizer

BROKEN = "\ufffd"
KINDS = ["bpe", "sentencepiece", "wordpiece"]

# Some of everything: scripts, emoji joined and with modifiers, marks, directions,
# white space of all kinds, what is invisible, and what code and lists are made of.
CHARACTERS = st.sampled_from(
    list("aZé3 .,!?:;\"'()[]{}*_-#`~|\\/\t\n\r\v\f\x00\x1c\x85\xa0\u2028\u3000")
    + list("你好。の\u3099ที่ກຳក្कि한שلاם")
    + list("😀👨\u200d👩🏽\u200b\u200e\u0301\ufeff\ufe0f\ue000\U0010ffff")
)
TEXTS = st.text(CHARACTERS, max_size=30) | st.lists(
    st.sampled_from(["- ", "1. ", "e.g. ", "3.5", "```", "    ", "\r\n", "Dr. ", "He "])
    | CHARACTERS,
    max_size=20,
).map("".join)


class ByteTokens:
    """A tokenizer that can only decode: each token is a run of bytes."""

    def __init__(self, tokens):
        self.tokens = tokens

    def decode(self, ids, **_):
        """The characters of the tokens' bytes."""
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")


@st.composite
def cut_bytes(draw, whole):
    """Bytes cut into tokens at random places."""
    found = draw(whole)
    cuts = draw(st.sets(st.integers(1, max(1, len(found) - 1))))
    ends = [0, *sorted(cut for cut in cuts if cut < len(found)), len(found)]
    return [found[a:b] for a, b in itertools.pairwise(ends) if a < b]


def characters_of_bytes(whole):
    """For each byte, the character of the decoded text that it belongs to."""
    return [
        max(0, len(whole[: i + 1].decode(errors="replace")) - 1)
        for i in range(len(whole))
    ]


def touched(tokens):
    """For each token, the characters that its bytes belong to."""
    character = characters_of_bytes(b"".join(tokens))
    start, found = 0, []
    for token in tokens:
        found.append(set(character[start : start + len(token)]))
        start += len(token)
    return found


def pieces(text, spans):
    """The texts of ranges."""
    return [text[start:stop] for start, stop in spans]


def visible(text):
    """Positions of the characters that are no white space."""
    return {i for i, character in enumerate(text) if not character.isspace()}


class TestReadTokens:
    """Each token gets the characters that it stands for."""

    @given(cut_bytes(TEXTS.map(str.encode)))
    def test_a_token_has_the_characters_of_its_bytes(self, tokens):
        """Tokens that share a character have the range of all their characters."""
        expected = touched(tokens)
        for _ in tokens:  # far enough for every chain of shared characters
            for one, other in itertools.pairwise(range(len(tokens))):
                if expected[one] & expected[other]:
                    expected[one] = expected[other] = expected[one] | expected[other]
            for one, other in itertools.pairwise(reversed(range(len(tokens)))):
                if expected[one] & expected[other]:
                    expected[one] = expected[other] = expected[one] | expected[other]
        found = read_tokens(range(len(tokens)), ByteTokens(tokens))
        assert found.text == b"".join(tokens).decode()
        assert [set(range(*span)) for span in found.offsets] == expected

    @example([b"\xf0", b"\x9f", b"\x98", b"a"])
    @given(
        cut_bytes(
            st.binary(max_size=12)
            | st.lists(
                st.sampled_from(
                    [
                        b"\xf0",
                        b"\x9f",
                        b"\x98",
                        b"\x80",
                        b"\xe4",
                        b"\xbd",
                        b"a",
                        " 你".encode(),
                    ]
                ),
                max_size=12,
            ).map(b"".join)
        )
    )
    def test_broken_bytes_leave_the_text_around_them_alone(self, tokens):
        """The text is that of all bytes together; every token has some of its own."""
        found = read_tokens(range(len(tokens)), ByteTokens(tokens))
        assert found.text == b"".join(tokens).decode(errors="replace")
        assert {i for span in found.offsets for i in range(*span)} == set(
            range(len(found.text))
        )
        for span, characters in zip(found.offsets, touched(tokens), strict=True):
            assert set(range(*span)) & characters
        assert list(found.offsets) == sorted(found.offsets)

    @pytest.mark.parametrize("kind", KINDS)
    @given(text=TEXTS)
    def test_the_text_is_the_decoded_text(self, kind, text):
        """Token by token gives what decoding all at once gives, special tokens too."""
        tokenizer = tiny_tokenizer(kind)
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        found = read_tokens(ids, tokenizer)
        assert found.text == decode(ids, tokenizer)
        assert len(found) == len(ids)
        assert found.text[slice(*found.offsets[-1])].strip() == tokenizer.eos_token

    @given(st.data())
    def test_random_ids_are_read_as_they_are_decoded(self, data):
        """Models generate bytes that are no text; nothing around them is lost."""
        tokenizer = tiny_tokenizer("bpe")
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
        assert read_tokens(ids, tokenizer).text == decode(ids, tokenizer)

    @pytest.mark.parametrize(
        ("tokens", "labels"),
        [
            # A whole run of bytes is decoded as broken if one of them is.
            ("😀 E4", ["😀[1/4]", "😀[2/4]", "😀[3/4]", "😀[4/4]", BROKEN]),
            ("é FF é", ["é[1/2]", "é[2/2]", BROKEN, "é[1/2]", "é[2/2]"]),
            ("FF é", [BROKEN, "é[1/2]", "é[2/2]"]),
            ("E4 a", [BROKEN, "a"]),
            ("a E4 BD ▁ a", ["a", BROKEN, BROKEN, " ", "a"]),
        ],
    )
    def test_byte_fallback_reads_what_can_be_read(self, tokens, labels):
        """One broken byte does not break the characters before and after it."""
        tokenizer = tiny_tokenizer("sentencepiece")
        names = []
        for token in tokens.split():
            if len(token) == 2:
                names.append(f"<0x{token}>")
            elif token in "a▁":
                names.append(token)
            else:
                names.extend(f"<0x{byte:02X}>" for byte in token.encode())
        ids = tokenizer.convert_tokens_to_ids(names)
        assert read_tokens(ids, tokenizer).labels() == labels

    def test_tokens_without_text_have_empty_ranges(self):
        """They lose nothing of the tokens beside them, however many they are."""
        tokens = [b"a", *[b""] * 9, "é".encode()[:1], "é".encode()[1:], b""]
        found = read_tokens(range(len(tokens)), ByteTokens(tokens))
        assert found.text == "aé"
        assert found.offsets == ((0, 1), *[(1, 1)] * 9, (1, 2), (1, 2), (2, 2))

    def test_a_replacement_character_of_the_text_is_a_character(self):
        """The text may hold one of its own."""
        tokens = [b"a", BROKEN.encode()[:1], BROKEN.encode()[1:], b"b"]
        found = read_tokens(range(4), ByteTokens(tokens))
        assert found.offsets == ((0, 1), (1, 2), (1, 2), (2, 3))

    def test_spaces_before_words_are_kept_after_the_first_token(self):
        """A SentencePiece decoder strips the space of what it sees first."""
        tokenizer = tiny_tokenizer("sentencepiece")
        ids = tokenizer.convert_tokens_to_ids(["3", "▁An", "▁", "▁An"])
        assert read_tokens(ids, tokenizer).labels() == ["3", " An", " ", " An"]


class TestTokenText:
    """A text whose tokens are known."""

    def test_pieces_of_a_character_are_numbered(self):
        """A label is readable, and no two pieces of a character share one."""
        tokens = [b"a", *[bytes([byte]) for byte in "😀é".encode()], b"b"]
        labels = read_tokens(range(len(tokens)), ByteTokens(tokens)).labels()
        assert labels == [
            *["a", "😀[1/4]", "😀[2/4]", "😀[3/4]", "😀[4/4]", "é[1/2]", "é[2/2]", "b"]
        ]

    def test_the_same_character_twice_is_not_one(self):
        """Tokens are pieces of one character only where their ranges are the same."""
        assert TokenText("aab", ((0, 1), (1, 2), (2, 3))).labels() == ["a", "a", "b"]

    def test_empty_tokens_are_no_pieces_of_each_other(self):
        """They have empty labels."""
        assert TokenText("a", ((0, 0), (0, 0), (0, 1))).labels() == ["", "", "a"]

    @given(cut_bytes(TEXTS.map(str.encode)), st.data())
    def test_split_gives_two_texts_of_their_own(self, tokens, data):
        """Ranges count within each; a character cut in two goes to the right."""
        whole = read_tokens(range(len(tokens)), ByteTokens(tokens))
        position = data.draw(st.integers(0, len(tokens)))
        left, right = whole.split(position)
        assert left.text + right.text == whole.text
        assert len(left) == position
        assert len(right) == len(tokens) - position
        cut = len(left.text)
        assert tuple(shifted(right.offsets, cut)) == whole.offsets[position:]
        for before, after in zip(whole.offsets, left.offsets, strict=False):
            assert set(range(*after)) == {i for i in range(*before) if i < cut}
        shared = (
            position < len(tokens)
            and whole.offsets[position] in (whole.offsets[:position])
        )
        assert shared or cut == max((stop for _, stop in left.offsets), default=0)
        if shared:
            assert cut == whole.offsets[position][0]


class TestDecode:
    """Text of ids as they are."""

    def test_nothing_is_tidied_up_or_left_out(self):
        """Spaces before punctuation and special tokens stay."""
        tokenizer = tiny_tokenizer("bpe")
        tidy = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
            eos_token="<eos>",
            clean_up_tokenization_spaces=True,
            clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
        )
        text = "Ana , is n't it ?<eos>"
        ids = tokenizer.encode(text)
        assert tidy.decode(ids) != text
        assert decode(ids, tidy) == text


class TestSpecialIds:
    """Which tokens are special."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_marks_are_special_and_the_unknown_token_is_not(self, kind):
        """The unknown token stands for text."""
        tokenizer = tiny_tokenizer(kind)
        names = {tokenizer.bos_token, tokenizer.eos_token, *MARKS} - {None}
        assert special_ids(tokenizer) == set(
            tokenizer.convert_tokens_to_ids(list(names))
        )

    def test_a_tokenizer_need_not_list_its_added_tokens(self):
        """Those that it calls special will do."""
        tokenizer = ByteTokens([b"a"])
        tokenizer.all_special_ids = [3, 5]
        tokenizer.unk_token_id = 5
        assert special_ids(tokenizer) == {3}

    def test_one_token_for_end_and_unknown_is_special(self):
        """GPT-2 has ``<|endoftext|>`` for both."""
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(
                tiny_tokenizer("bpe").backend_tokenizer.to_str()
            ),
            eos_token="<eos>",
            unk_token="<eos>",
        )
        assert tokenizer.eos_token_id in special_ids(tokenizer)


class TestWords:
    """Words are what stands between white space."""

    @given(TEXTS)
    def test_words_cover_what_is_visible(self, text):
        """Every visible character is in one word, in order, and no white space is."""
        spans = word_spans(text)
        covered = [i for span in spans for i in range(*span)]
        assert covered == sorted(visible(text))

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("It is 3.5, e.g.\there.", ["It", "is", "3.5,", "e.g.", "here."]),
            ("don't stop-gap", ["don't", "stop-gap"]),
            ("a\xa0b\u3000c\u2028d\r\ne", ["a", "b", "c", "d", "e"]),
            ("שלום עולם مرحبا", ["שלום", "עולם", "مرحبا"]),
            ("안녕 세상", ["안녕", "세상"]),
            ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
            ("e\u0301te\u0301 👨‍👩‍👧 ok", ["e\u0301te\u0301", "👨‍👩‍👧", "ok"]),
            ("a\u200bb \u200b", ["a\u200bb", "\u200b"]),
            ("価格は3.5円です", ["価", "格", "は", "3.5", "円", "で", "す"]),
            ("か\u3099き", ["か\u3099", "き"]),
            ("葛\U000e0100x", ["葛\U000e0100", "x"]),
            ("ที่นี่น้ำ", ["ที่", "นี่", "น้ำ"]),
            ("ກຳ່ມາ", ["ກຳ່", "ມ", "າ"]),
            ("မြန်မာ", ["မြ", "န်", "မာ"]),
            ("ក្ក្រុង", ["ក្ក្រុ", "ង"]),
            ("", []),
            (" \n", []),
        ],
    )
    def test_words_are_a_readers_words(self, text, words):
        """Scripts without spaces give characters, together with their marks."""
        assert pieces(text, word_spans(text)) == words


WRAPPED = "This line of prose is so long that a margin has cut it off"


class TestSentences:
    """Sentences end where a reader sees their end."""

    @given(TEXTS | st.text(max_size=20))
    def test_sentences_cover_what_is_visible(self, text):
        """They are in order, do not overlap, and have no white space around them."""
        spans = sentence_spans(text)
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end <= start
        covered = {i for span in spans for i in range(*span)}
        assert visible(text) <= covered
        assert all(piece == piece.strip() != "" for piece in pieces(text, spans))

    def test_a_line_of_very_many_sentences_is_cut_as_a_whole(self):
        """In time that grows with its length, though it is read piece by piece."""
        spoken = ['"Hello there. I am," he said.', "(See p. 3. It is.)", *CORPUS]
        line = " ".join(spoken[place * place % len(spoken)] for place in range(2200))
        found = sentencex.get_sentence_boundaries("en", line)
        starts = [int(one["start_index"]) for one in found]
        spans = sentence_spans(line)
        assert len(spans) > 3000
        assert [start for start, _ in spans] == [
            start + len(line[start:]) - len(line[start:].lstrip()) for start in starts
        ]

    @given(st.lists(st.sampled_from(CORPUS), min_size=1, max_size=3), TEXTS)
    def test_sentences_do_not_drift(self, lines, other):
        """What stands on the lines before does not change the sentences after it."""
        alone = "\n".join(lines)
        before = other.replace("`", "").replace("~", "") + "\n\n"
        found = sentence_spans(before + alone)
        expected = shifted(sentence_spans(alone), len(before))
        assert found[-len(expected) :] == expected

    @pytest.mark.parametrize(
        "sentences",
        [
            # points that end no sentence
            ["It costs 3.5, e.g. for you.", "Why?"],
            ["Dr. Smith and Mrs. Jones met Prof. Lee vs. Mr. Poe.", "So it goes."],
            [
                "See Fig. 3 in J. R. R. Tolkien et al. for more.",
                "It is in the U.S. now.",
            ],
            ["16 - 3 - 4 = 9.", "So she makes 9 * 2 = $18.", "The answer is 18."],
            ["On Jan. 5 it was v1.2.3 at 9 a.m. in example.com.", "OK."],
            ["See https://a.b/c.html?d=1.5&e=f.", "Then go on."],
            ["Hmm... wait.", "What?!", "No!!", "Yes."],
            # quotes, brackets, emphasis
            ['"Hi!" he said.', "“No.”", "She left (in a hurry).", "‘Why?’", "Oh."],
            ["**Bold.**", "Plain.", "_It._", "Then *more.*", "**Step 1:** Add."],
            ["See one.", "* See two.", "* See it.", "**So.**"],
            # other scripts
            ["你好。", "世界很大！", "是吗？", "“好的。”", "再见"],
            ["नमस्ते।", "आप कैसे हैं?"],
            ["مرحبا.", "كيف حالك؟", "بخير"],
            ["Привет, мир.", "Как дела?", "¿Qué?", "¡Sí!"],
            ["😀 He left.", "👨‍👩‍👧 came.", "e\u0301te\u0301.", "Oui."],
            ["\ud83d alone.", "Next \udc00.", "Last."],
        ],
        ids=lambda sentences: sentences[0],
    )
    def test_sentences_on_one_line_are_a_readers(self, sentences):
        """Whatever white space stands between them."""
        between = "" if sentences[0] == "你好。" else " "
        text = between.join(sentences)
        assert pieces(text, sentence_spans(text)) == sentences
        if between:
            text = "  ".join(sentences)
            assert pieces(text, sentence_spans(text)) == sentences

    @pytest.mark.parametrize(
        "lines",
        [
            ["The facts", "Ana has 3 pens", "mia has 4"],
            ["It weighs 3.5", "kilograms", "or 4.", "5 of them"],
            ["# Heading", "Text", "## Next", "- - -", "More"],
            ["- one", "* two: 3.5", "• three", "+ four", "– five", "  - six"],
            ["1. one", "2. two", "10. ten", "3) three", "(4) four", "a) x", "IV. y"],
            ["```python", "a = 1. B = 2", "if x: Y. Z", "```", "Text"],
            ["~~~", "One. Two. Three", "~~~"],
            ["for i in x:", "    print(i). Then. More", "\tTab. Tab", "int a; B. C;"],
            ["| a | b. C |", "|---|---|", "| 1 | 2 |"],
            ["<think>", "Let me see", "</think>", "Answer"],
            [WRAPPED + ":", "then a list"],
            [WRAPPED, "Then a line in upper case"],
            [WRAPPED, "- then an item"],
            [WRAPPED, "    then = code"],
            [WRAPPED, "a) then an item"],
            [WRAPPED + "!", "then more"],
        ],
        ids=lambda lines: lines[0],
    )
    @pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n", "\n \t\n", "\u2028"])
    def test_a_line_ends_a_sentence(self, lines, newline):
        """Headings, items of lists, code, tables and short lines are their own."""
        text = newline.join(lines)
        expected = [line.strip() for line in lines]
        assert pieces(text, sentence_spans(text)) == expected

    def test_an_item_may_have_several_sentences(self):
        """Its mark stays with the first."""
        text = "1. One is 3.5. Two.\n  * Three! Four"
        assert pieces(text, sentence_spans(text)) == [
            *["1. One is 3.5.", "Two.", "* Three!", "Four"]
        ]

    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    def test_prose_wrapped_at_a_margin_goes_on(self, newline):
        """A long line whose next begins in lower case is not the sentence's end."""
        first = f"{WRAPPED} at 3.5{newline}kilograms of it{newline}and"
        assert pieces(first, sentence_spans(first)) == [
            f"{WRAPPED} at 3.5{newline}kilograms of it",
            "and",
        ]
        text = f"{WRAPPED}{newline}in two. Then comes{newline}More."
        assert pieces(text, sentence_spans(text)) == [
            *[f"{WRAPPED}{newline}in two.", "Then comes", "More."]
        ]

    @pytest.mark.parametrize("between", ["\n\n", "\n \t\n", "\r\n\r\n", "\n\n\n"])
    def test_an_empty_line_ends_wrapped_prose(self, between):
        """A paragraph ends there."""
        text = f"{WRAPPED}{between}in lower case"
        assert pieces(text, sentence_spans(text)) == [WRAPPED, "in lower case"]

    def test_fences_on_one_line_open_no_block(self):
        """Prose goes on after code within a line."""
        text = "```x``` is one. Two.\nThree. Four."
        assert pieces(text, sentence_spans(text)) == [
            *["```x``` is one.", "Two.", "Three.", "Four."]
        ]

    def test_white_space_of_any_kind_ends_a_sentence(self):
        """No-break and ideographic spaces do as well."""
        for space in (" ", "\t", "\xa0", "\u3000", "\u2009"):
            text = f"He left.{space}She ran."
            assert pieces(text, sentence_spans(text)) == ["He left.", "She ran."]

    def test_the_language_decides_on_abbreviations(self):
        """A Russian abbreviation ends no Russian sentence."""
        text = "В 2020 г. Москва росла. Да."
        found = pieces(text, sentence_spans(text, language="ru"))
        assert found == ["В 2020 г. Москва росла.", "Да."]
        assert len(sentence_spans(text)) == 3

    @pytest.mark.parametrize("text", ["", " ", "\n\r\n", "\u2028\x85"])
    def test_no_text_has_no_sentence(self, text):
        """White space alone is none."""
        assert sentence_spans(text) == []


def test_shifted_moves_ranges():
    """Both ends move."""
    assert shifted([(0, 2), (5, 6)], 3) == [(3, 5), (8, 9)]
