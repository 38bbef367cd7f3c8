"""Grouping of tokens to units, against the rule applied character by character."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from captum_cage.text import TokenText, read_tokens, sentence_spans, word_spans
from captum_cage.units import FIXED, Unit, group_tokens, split_ranges, split_units
from tiny import tiny_tokenizer

PIECES = st.sampled_from(
    ["He", " came", ".", " ", "\n", "", " So", "!", " a b", "3", ".5", "你", "\n\n"]
)


def spelled(*pieces):
    """A text whose tokens are these."""
    ends = [0, *itertools.accumulate(len(piece) for piece in pieces)]
    return TokenText("".join(pieces), tuple(itertools.pairwise(ends)))


def mask(count, *positions):
    """True at these positions."""
    return np.isin(np.arange(count), positions)


def texts(units):
    """Their texts."""
    return [unit.text for unit in units.units]


def first_visible(tokens, i):
    """Place of a token's first visible character; None if it has none."""
    places = range(*tokens.offsets[i])
    return next((p for p in places if not tokens.text[p].isspace()), None)


@st.composite
def marked_texts(draw):
    """Tokens; which are attributed and which special; and breaks."""
    pieces = draw(st.lists(PIECES, max_size=12))
    flags = st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces))
    attributed, special = draw(flags), draw(flags)
    # A special token has a text of its own.
    pieces = ["<s>" if s else p for p, s in zip(pieces, special, strict=True)]
    tokens = spelled(*pieces)
    ends = sorted({end for span in tokens.offsets for end in span})
    breaks = draw(st.lists(st.sampled_from(ends), unique=True)) if ends else []
    return tokens, np.array(attributed, bool), np.array(special, bool), breaks


class TestGroups:
    """What holds for every granularity."""

    @given(marked_texts(), st.sampled_from(["token", "word", "sentence"]))
    def test_units_are_numbered_in_reading_order(self, marked, name):
        """Each attributed token has a unit, no other token has; none is left out."""
        tokens, attributed, special, breaks = marked
        units = group_tokens(
            tokens,
            name,
            generated=True,
            attributed=attributed,
            special=special,
            breaks=breaks,
        )
        assert units.groups.dtype == np.int64
        assert_array_equal(units.groups != FIXED, attributed)
        chosen = units.groups[attributed]
        assert (np.diff(chosen) >= 0).all()
        assert sorted(set(chosen.tolist())) == list(range(len(units)))
        for number, unit in enumerate(units.units):
            members = units.members(number)
            assert_array_equal(members, np.flatnonzero(units.groups == number))
            assert unit.generated
            assert unit.text == tokens.text[slice(*unit.span)] or name == "token"
            for i in members:
                place = first_visible(tokens, i)
                assert place is None or unit.span[0] <= place < unit.span[1]

    @given(marked_texts(), st.sampled_from(["word", "sentence", "nothing"]))
    def test_tokens_share_a_unit_where_the_rule_says_so(self, marked, name):
        """Visible tokens: same range, or the same stretch between ranges."""
        tokens, attributed, special, breaks = marked
        segment = {"word": word_spans, "sentence": sentence_spans}.get(
            name,
            lambda text: [],  # noqa: ARG005
        )
        units = group_tokens(
            tokens,
            segment,
            generated=False,
            attributed=attributed,
            special=special,
            breaks=breaks,
        )
        # The range of each character, found between special tokens and breaks.
        cuts = {0, len(tokens.text), *breaks}
        for i in np.flatnonzero(special):
            cuts.update(tokens.offsets[i])
        owner = {}
        for start, stop in itertools.pairwise(sorted(cuts)):
            for number, span in enumerate(segment(tokens.text[start:stop])):
                for place in range(*span):
                    owner[start + place] = (start, number)
        shown = [i for i in range(len(tokens)) if first_visible(tokens, i) is not None]
        for one, other in itertools.combinations(shown, 2):
            if not (attributed[one] and attributed[other]):
                continue
            first, last = first_visible(tokens, one), first_visible(tokens, other)
            if special[one] or special[other]:
                together = False
            elif first in owner or last in owner:
                together = owner.get(first) == owner.get(last)
            else:
                between = [i for i in shown if one < i < other]
                together = not any(
                    special[i] or first_visible(tokens, i) in owner for i in between
                ) and not any(first < end <= last for end in breaks)
            assert (units.groups[one] == units.groups[other]) == together

    @given(marked_texts())
    def test_white_space_makes_no_unit_beside_a_word_it_can_join(self, marked):
        """It goes with the token before, else with the one after, else alone."""
        tokens, attributed, special, breaks = marked
        units = group_tokens(
            tokens,
            "sentence",
            generated=False,
            attributed=attributed,
            special=special,
            breaks=breaks,
        )
        for unit in range(len(units)):
            members = units.members(unit)
            if any(first_visible(tokens, i) is not None for i in members):
                continue
            for one, other in (
                (members[0] - 1, members[0]),
                (members[-1], members[-1] + 1),
            ):
                beside = one if other == members[0] else other
                if 0 <= beside < len(tokens):
                    assert (
                        special[beside]
                        or not attributed[beside]
                        or tokens.offsets[other][0] in breaks
                    )

    @pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "wordpiece"])
    @pytest.mark.parametrize("name", ["word", "sentence"])
    @settings(max_examples=30)
    @given(
        text=st.text(st.sampled_from("aZ3 .,!?\n\r\t😀你。é\u0301\u200bש"), max_size=25)
    )
    def test_ranges_stay_on_their_words(self, kind, name, text):
        """CAGE's sentence masks drift: a token is never far from its sentence."""
        tokenizer = tiny_tokenizer(kind)
        tokens = read_tokens(
            tokenizer.encode(text, add_special_tokens=False), tokenizer
        )
        units = group_tokens(tokens, name, generated=False)
        segment = word_spans if name == "word" else sentence_spans
        for start, stop in segment(tokens.text):
            inside = {
                i
                for i in range(len(tokens))
                if first_visible(tokens, i) in range(start, stop)
            }
            for unit in {int(units.groups[i]) for i in inside}:
                shown = {
                    i
                    for i in units.members(unit)
                    if first_visible(tokens, i) is not None
                }
                assert shown == inside


class TestNamedUnits:
    """Tokens, words and sentences."""

    def test_tokens_keep_their_labels_and_ranges(self):
        """Pieces of a character are units, with the character's range."""
        tokens = TokenText("a é", ((0, 1), (1, 3), (1, 3)))
        units = group_tokens(
            tokens,
            "token",
            generated=False,
            attributed=mask(3, 0, 2),
            special=mask(3, 0),
        )
        assert units.units == (
            Unit("a", False, (0, 1), True),
            Unit(" é[2/2]", False, (1, 3), False),
        )
        assert units.groups.tolist() == [0, -1, 1]

    def test_words_take_the_white_space_after_them(self):
        """The text of a unit has none at its ends."""
        tokens = spelled("\n", "It", " is", "\n", " ", "3", ".5", ".", " ")
        units = group_tokens(tokens, "word", generated=False)
        assert units.groups.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
        assert texts(units) == ["It", "is", "3.5."]
        assert [unit.span for unit in units.units] == [(1, 3), (4, 6), (8, 12)]

    def test_a_token_of_two_words_goes_with_the_first(self):
        """A token belongs to the range of its first visible character."""
        tokens = spelled("One", ".\nTwo", " t", "wo", ".")
        units = group_tokens(tokens, "sentence", generated=False)
        assert texts(units) == ["One.\nTwo", "two."]

    def test_pieces_of_a_character_are_one_word(self):
        """They are never apart."""
        tokens = TokenText("a 你b", ((0, 1), (1, 3), (1, 3), (3, 4)))
        units = group_tokens(tokens, "word", generated=False)
        assert units.groups.tolist() == [0, 1, 1, 2]

    def test_special_tokens_are_units_of_their_own(self):
        """At the end and in the middle of a sentence, and twice in a row."""
        tokens = spelled("He", "<s>", " came", ".", " ", "<e>", "<e>", "\n", "So")
        units = group_tokens(
            tokens, "sentence", generated=True, special=mask(9, 1, 5, 6)
        )
        assert texts(units) == ["He", "<s>", "came.", "<e>", "<e>", "So"]
        assert units.groups.tolist() == [0, 1, 2, 2, 2, 3, 4, 5, 5]
        assert [u.special for u in units.units] == [0, 1, 0, 1, 1, 0]

    def test_white_space_between_special_tokens_is_a_unit(self):
        """There is nothing that it could go with, and nothing is lost."""
        tokens = spelled("<s>", "\n", " ", "<e>")
        units = group_tokens(tokens, "word", generated=False, special=mask(4, 0, 3))
        assert units.groups.tolist() == [0, 1, 1, 2]
        assert texts(units) == ["<s>", "\n ", "<e>"]

    def test_special_tokens_need_no_visible_text(self):
        """Nor any text at all: they are units all the same."""
        tokens = spelled("a", "", " b", "\n", " ", "c")
        units = group_tokens(tokens, "word", generated=True, special=mask(6, 1, 3))
        assert units.groups.tolist() == [0, 1, 2, 3, 4, 4]
        assert texts(units) == ["a", "", "b", "\n", "c"]

    def test_a_fixed_token_inside_a_sentence_does_not_cut_it(self):
        """Captum's ``skip_tokens`` leave one sentence on both sides."""
        tokens = spelled("She", " then", " came", ".", " So", ".")
        units = group_tokens(
            tokens, "sentence", generated=False, attributed=~mask(6, 1, 4)
        )
        assert units.groups.tolist() == [0, -1, 0, 0, -1, 1]
        assert texts(units) == ["She then came.", "."]

    def test_white_space_does_not_go_with_a_fixed_token(self):
        """It goes with the attributed word after it instead of making a unit."""
        tokens = spelled("User:", " ", "Hi", " all", "\n", "Bot:", " ", "<e>")
        units = group_tokens(
            tokens,
            "word",
            generated=False,
            attributed=~mask(8, 0, 5),
            special=mask(8, 7),
        )
        assert texts(units) == ["Hi", "all", " ", "<e>"]
        assert units.groups.tolist() == [-1, 0, 0, 1, 1, -1, 2, 3]

    def test_breaks_end_units_and_bind_white_space(self):
        """No sentence goes on in the next message, no white space either."""
        tokens = spelled("I", " am", " ", "3", " or", " 4", ".")
        units = group_tokens(tokens, "sentence", generated=False, breaks=(4, 9))
        assert texts(units) == ["I am", "3 or", "4."]
        assert units.groups.tolist() == [0, 0, 1, 1, 1, 2, 2]

    @pytest.mark.parametrize("name", ["word", "sentence"])
    def test_white_space_that_begins_a_text_goes_with_what_follows(self, name):
        """Not with what stands at the end."""
        tokens = spelled(" ", "He", " came.", " So", " it")
        found = group_tokens(tokens, name, generated=True).groups.tolist()
        assert found[0] == found[1] == 0
        assert found[-1] > 0

    def test_breaks_come_in_any_order(self):
        """Each ends a unit."""
        tokens = spelled("a", "b", "c", "d")
        for breaks in itertools.permutations((1, 2, 3)):
            found = group_tokens(tokens, lambda _: [], generated=True, breaks=breaks)
            assert found.groups.tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("name", ["token", "word", "sentence"])
    def test_no_tokens_make_no_units(self, name):
        """An empty text, or one of fixed tokens only."""
        assert len(group_tokens(TokenText("", ()), name, generated=True)) == 0
        units = group_tokens(
            spelled("a", "b"), name, generated=False, attributed=mask(2)
        )
        assert len(units) == 0
        assert units.groups.tolist() == [-1, -1]


class TestOwnUnits:
    """Functions from a text to ranges, and ranges."""

    def test_a_function_sees_the_stretches_between_special_tokens_and_breaks(self):
        """Once each, and never the text of a special token."""
        seen = []

        def commas(text):
            seen.append(text)
            return [(0, text.index(",") + 1)] if "," in text else []

        tokens = spelled("a", ",", " b", "<s>", "c", ",", " d", " e")
        units = group_tokens(
            tokens, commas, generated=False, special=mask(8, 3), breaks=(11,)
        )
        assert seen == ["a, b", "c, d", " e"]
        assert texts(units) == ["a,", "b", "<s>", "c,", "d", "e"]

    def test_text_between_ranges_makes_units(self):
        """One for each stretch, so that nothing is lost."""
        tokens = spelled("a", " b", " c", " d", " e", " f")
        units = group_tokens(tokens, [(6, 8), (2, 3)], generated=False)
        assert texts(units) == ["a", "b", "c", "d", "e f"]
        assert units.groups.tolist() == [0, 1, 2, 3, 4, 4]

    def test_ranges_may_be_adjacent_and_in_any_order(self):
        """They are sorted; the first visible character of a token decides."""
        tokens = spelled("ab", " cd", " ef")
        spans = np.array([[4, 8], [0, 4]])
        units = group_tokens(tokens, spans, generated=False)
        assert texts(units) == ["ab cd", "ef"]

    def test_ranges_may_cover_special_tokens_and_breaks(self):
        """Such a unit is special only if nothing else is in it."""
        tokens = spelled("a", "<s>", " b", "<e>")
        units = group_tokens(
            tokens,
            [(0, 6), (6, 9)],
            generated=False,
            special=mask(4, 1, 3),
            breaks=(1,),
        )
        assert units.units == (
            Unit("a<s> b", False, (0, 6), False),
            Unit("<e>", False, (6, 9), True),
        )

    def test_special_tokens_that_no_range_covers_are_units_of_their_own(self):
        """The end of a text is never part of what stands before it."""
        tokens = spelled("a", " b", " c", "<e>")
        units = group_tokens(tokens, [(0, 1)], generated=True, special=mask(4, 3))
        assert texts(units) == ["a", "b c", "<e>"]
        assert [unit.special for unit in units.units] == [False, False, True]
        units = group_tokens(tokens, lambda _: [], generated=True, special=mask(4, 1))
        assert texts(units) == ["a", "b", "c<e>"]

    def test_breaks_end_what_no_range_covers(self):
        """Text of two messages is never one unit unless a range says so."""
        tokens = spelled("a", " b", " c", "\n", " d")
        units = group_tokens(tokens, [(0, 1)], generated=False, breaks=(3, 5))
        assert texts(units) == ["a", "b", "c", "d"]
        assert units.groups.tolist() == [0, 1, 2, 3, 3]
        # The space of " b" stands before the break, and "b" after it.
        units = group_tokens(tokens, lambda _: [], generated=False, breaks=(2, 4))
        assert texts(units) == ["a", "b", "c\n d"]

    @pytest.mark.parametrize(
        ("spans", "error", "match"),
        [
            (
                [(0, 9)],
                ValueError,
                r"\(0, 9\) ends after the generated text, which.* 6",
            ),
            ([(1, 3), (0, 2)], ValueError, r"\(1, 3\) begins before .* ends, at 2"),
            ([(2, 2)], ValueError, r"\(2, 2\) is empty"),
            ([(-1, 2)], ValueError, r"begins before the text"),
            ([(1, 2)], ValueError, r"'b', covers no whole token of the generated"),
            ([(2, 3)], ValueError, r"' ', covers no whole token"),
            ([(4, 6)], ValueError, r"' e', covers .* that is attributed"),
            ([(0, 1.0)], TypeError, r"units: a range must be a pair .* not \(0, 1.0\)"),
            ([(False, 2)], TypeError, r"not \(False, 2\)"),
            (["02"], TypeError, r"not '02'"),
            ([(0, 1, 2)], TypeError, r"not \(0, 1, 2\)"),
            ([3], TypeError, r"a range must be a pair .* not 3"),
        ],
    )
    def test_ranges_that_make_no_units_are_refused(self, spans, error, match):
        """From you and from a function; the message names the range."""
        tokens, attributed = spelled("ab", " ", "d", " e"), ~mask(4, 3)
        with pytest.raises(error, match=match):
            group_tokens(tokens, spans, generated=True, attributed=attributed)

    @pytest.mark.parametrize(
        ("found", "error", "match"),
        [
            ([(0, 4)], ValueError, r"\(0, 4\) ends after the stretch .* has 3"),
            ([(0, 2), (1, 3)], ValueError, r"\(1, 3\) begins before"),
            (["ab"], TypeError, r"must be a pair .* not 'ab'"),
        ],
    )
    def test_a_function_must_find_ranges_in_its_stretch(self, found, error, match):
        """One that reaches into the next would take its tokens."""
        tokens = spelled("abc", " d", " e")
        with pytest.raises(error, match=match):
            group_tokens(
                tokens,
                lambda text: found,  # noqa: ARG005
                generated=True,
                breaks=(3,),
            )


def test_a_unit_of_numpy_s_values_has_python_s():
    """JSON takes them."""
    span = (np.int64(0), np.int64(1))
    unit = Unit(np.str_("a"), np.bool_(True), span, np.bool_(False))
    values = [unit.text, unit.generated, *unit.span, unit.special]
    assert [type(value) for value in values] == [str, bool, int, int, bool]
    assert json.dumps(values) == '["a", true, 0, 1, false]'
    assert unit == Unit("a", True, (0, 1))
    assert Unit("a", False, None).span is None
    assert Unit("a", False, None).special is False


class TestSplitUnits:
    """The granularity of each side."""

    @pytest.mark.parametrize("units", ["token", "word", "sentence", word_spans])
    def test_one_granularity_is_for_both_sides(self, units):
        """A name or a function."""
        assert split_units(units) == {"source": units, "generated": units, "both": None}

    def test_ranges_stand_in_the_whole_text(self):
        """They are cut at the end of the prompt later; NumPy integers will do."""
        sides = split_units(np.array([[3, 5], [0, 2]]))
        assert sides == {"source": None, "generated": None, "both": [(0, 2), (3, 5)]}

    def test_ranges_are_cut_at_the_end_of_the_prompt(self):
        """Those after it count in the generated text; none reaches across."""
        ranges = [(0, 2), (2, 5), (5, 7), (8, 9)]
        assert split_ranges(ranges, 5) == ([(0, 2), (2, 5)], [(0, 2), (3, 4)])
        assert split_ranges(ranges, 0) == ([], ranges)
        assert split_ranges(ranges, 9) == (ranges, [])
        match = r"reach across the end of the prompt, at 3, but \(2, 5\) came\. Cut it"
        with pytest.raises(ValueError, match=match):
            split_ranges(ranges, 3)

    def test_a_mapping_has_a_granularity_for_each_side(self):
        """Ranges there count within that side's text."""
        sides = split_units({"source": [(1, 2)], "generated": "word"})
        assert sides == {"source": [(1, 2)], "generated": "word", "both": None}

    def test_a_side_left_out_has_tokens(self):
        """The finest units."""
        sides = split_units({"source": "sentence"})
        assert sides == {"source": "sentence", "generated": "token", "both": None}

    @pytest.mark.parametrize(
        ("units", "error", "match"),
        [
            ("words", ValueError, "units: must be one of 'token', .* not 'words'"),
            ({"generated": "x"}, ValueError, r"units\['generated'\]: must be one of"),
            ({"prompt": "word"}, ValueError, r"keys 'source' and .* not \['prompt'\]"),
            ({}, ValueError, "must have the keys"),
            (3, TypeError, "must be a name, a function .* not int"),
            (None, TypeError, "not NoneType"),
            ({"source": None}, TypeError, r"units\['source'\]: must be a name"),
            ([(0, 2), (1, 3)], ValueError, r"units: the range \(1, 3\) begins before"),
            ({"source": [(2, 1)]}, ValueError, r"units\['source'\]: .* is empty"),
            ({"source": {"a": 1}}, TypeError, r"units\['source'\]: a range must be"),
        ],
    )
    def test_what_is_no_granularity_is_refused(self, units, error, match):
        """The message names the side."""
        with pytest.raises(error, match=match):
            split_units(units)
