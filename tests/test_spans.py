"""Which generated units a question means, for each of its forms."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captum_cage.spans import explained_units, find_span
from captum_cage.thinking import Part, Thinking
from captum_cage.units import Unit

TEXT = "She has 3 eggs. So 3 are sold, she sells 9.<eos>"
PIECES = "She| has| 3| eggs.| So| 3| are| sold|,| she| sells| 9|.|<eos>".split("|")


def units_of(pieces):
    """Generated units with these texts, one after the other."""
    ends = [0, *itertools.accumulate(len(piece) for piece in pieces)]
    spans = itertools.pairwise(ends)
    return [Unit(text, True, span) for text, span in zip(pieces, spans, strict=True)]


UNITS = units_of(PIECES)
COUNT = len(UNITS)


def asked(explain):
    """The units of the text above that a question means."""
    return explained_units(explain, UNITS, TEXT)


class TestPositions:
    """Positions, slices and pairs count generated units."""

    def test_nothing_asked_means_all(self):
        """Every generated unit."""
        assert asked(None) == tuple(range(COUNT))

    @given(st.integers(-COUNT, COUNT - 1))
    def test_an_int_means_what_it_means_in_a_list(self, position):
        """Negative ones count from the end; NumPy integers are whole numbers."""
        expected = (list(range(COUNT))[position],)
        assert asked(position) == expected
        assert asked(np.int64(position)) == expected
        assert type(asked(np.int64(position))[0]) is int

    @given(*[st.none() | st.integers(-COUNT - 3, COUNT + 3)] * 3)
    def test_a_slice_means_what_it_means_in_a_list(self, start, stop, step):
        """Steps may be negative; positions come in ascending order."""
        if step == 0:
            return
        expected = tuple(sorted(list(range(COUNT))[start:stop:step]))
        if not expected:
            with pytest.raises(ValueError, match="explain: must mean at least one"):
                asked(slice(start, stop, step))
            return
        assert asked(slice(start, stop, step)) == expected
        if step in (None, 1):
            assert asked((start, stop)) == expected

    def test_numpy_integers_bound_slices_and_pairs(self):
        """They come from np.flatnonzero and the like."""
        assert asked((np.int32(2), np.int64(4))) == (2, 3)
        assert asked(slice(np.int64(0), None, np.int64(6))) == (0, 6, 12)

    @pytest.mark.parametrize(
        ("explain", "error", "match"),
        [
            (
                COUNT,
                ValueError,
                "explain: must be at least -14 and less than 14, but 14",
            ),
            (-COUNT - 1, ValueError, "but -15 came. There are 14 generated units"),
            (True, TypeError, "explain: must name generated units, but bool True came"),
            (np.True_, TypeError, "explain: must name generated units"),
            (1.0, TypeError, "but float 1.0 came"),
            ([1, 2], TypeError, r"but list \[1, 2\] came"),
            (b"She", TypeError, "but bytes b'She' came"),
            ((1,), ValueError, r"explain: a tuple must be \(start, stop\), but \(1,\)"),
            ((), ValueError, r"a tuple must be \(start, stop\), but \(\) came"),
            ((1, 2, 1), ValueError, r"a tuple must be \(start, stop\)"),
            (
                (1.0, 2),
                TypeError,
                "ends of a slice must be whole .* but float 1.0 came",
            ),
            ((True, 2), TypeError, "ends of a slice .* but bool True came"),
            (slice("a"), TypeError, "ends of a slice .* but str 'a' came"),
            (slice(0, 2, 1.5), TypeError, "ends of a slice .* but float 1.5 came"),
            (slice(0, 2, 0), ValueError, "the step of a slice must not be 0"),
            (
                (3, 3),
                ValueError,
                r"at least one .* slice\(3, 3, None\) of 14 units came",
            ),
            ((99, 100), ValueError, "explain: must mean at least one generated unit"),
        ],
    )
    def test_what_names_no_unit_is_refused(self, explain, error, match):
        """The message says what came and what to pass."""
        with pytest.raises(error, match=match):
            asked(explain)


class TestParts:
    """Questions about the thoughts or the answer."""

    def test_a_part_means_the_units_it_touches(self):
        """All of them, in the order of the text, each once."""
        thinking = Thinking({Part.THINK: ((16, 24), (0, 3)), Part.ANSWER: ((30, 43),)})
        for part, chosen in (
            (Part.THINK, ["She", " So", " 3", " are"]),
            (Part.ANSWER, [" she", " sells", " 9", "."]),
        ):
            found = explained_units(part, UNITS, TEXT, thinking)
            assert [PIECES[i] for i in found] == chosen
            assert found == tuple(sorted(found))

    @pytest.mark.parametrize("thinking", [None, Thinking.none()])
    def test_a_part_that_is_not_marked_is_refused(self, thinking):
        """With the end of the text, where it may be looked for."""
        with pytest.raises(ValueError, match=r"no answer was found in '.*9\.<eos>'"):
            explained_units(Part.ANSWER, UNITS, TEXT, thinking)


class TestTexts:
    """Texts and patterns mean the units that they share a visible character with."""

    @pytest.mark.parametrize(
        ("explain", "chosen"),
        [
            ("3", [" 3"]),
            ("She", ["She"]),
            (" she sells 9", [" she", " sells", " 9"]),
            ("ld, s", [" sold", ",", " she"]),
            # A space at the end belongs to the next unit, which it does not name.
            ("So ", [" So"]),
            (" So 3 ", [" So", " 3"]),
            ("<eos>", ["<eos>"]),
            (re.compile("[0-9]"), [" 9"]),
            (re.compile("[0-9](?= are)"), [" 3"]),
            (re.compile("SHE|so", re.IGNORECASE), [" she"]),
            (re.compile(r"^.*?\."), ["She", " has", " 3", " eggs."]),
            (re.compile(r"\b"), None),
            # Between and after the numbers it matches the empty text, too.
            (re.compile("[0-9]*"), [" 9"]),
        ],
    )
    def test_a_text_means_the_units_it_touches(self, explain, chosen):
        """The last occurrence of a text, the last visible match of a pattern."""
        if chosen is None:
            with pytest.raises(
                ValueError, match=r"'\\\\b' must stand for visible text"
            ):
                asked(explain)
            return
        found = asked(explain)
        assert [PIECES[i] for i in found] == chosen
        assert found == tuple(range(found[0], found[-1] + 1))

    def test_the_last_occurrence_counts(self):
        """Both for a text and for a pattern."""
        assert asked("3") == asked(re.compile("3")) == (5,)
        assert find_span("aa", "aaa") == (1, 3)
        assert find_span(re.compile("aa"), "aaa") == (0, 2)

    def test_a_very_long_question_takes_no_longer_than_a_search(self):
        """It is no pattern that must be compiled."""
        text = "<|im_start|>" * 300_000
        start, stop = find_span(text, text)
        assert (start, stop) == (0, len(text))
        with pytest.raises(
            ValueError, match=r"the text '(<\|im_start\|>){6}.*\.\.\.' does"
        ):
            find_span(text, "a")

    @given(st.data())
    def test_every_part_of_a_text_is_found(self, data):
        """Against a search from the end, and a look at every character."""
        pieces = data.draw(
            st.lists(
                st.text("ab \n😀é", min_size=1, max_size=3), min_size=1, max_size=8
            )
        )
        text, units = "".join(pieces), units_of(pieces)
        start = data.draw(st.integers(0, len(text) - 1))
        part = text[start : data.draw(st.integers(start + 1, len(text)))]
        last = max(i for i in range(len(text)) if text[i:].startswith(part))
        expected = tuple(
            number
            for number, unit in enumerate(units)
            if any(
                last <= place < last + len(part) and not text[place].isspace()
                for place in range(*unit.span)
            )
        )
        if not part.strip():
            with pytest.raises(ValueError, match="must stand for visible text"):
                explained_units(part, units, text)
            return
        assert explained_units(part, units, text) == expected
        assert find_span(part, text) == (last, last + len(part))

    def test_pieces_of_a_character_come_together(self):
        """They share its range."""
        units = [Unit("😀[1/2]", True, (0, 1)), Unit("😀[2/2]", True, (0, 1))]
        assert explained_units("😀", units, "😀") == (0, 1)

    @pytest.mark.parametrize(
        ("explain", "error", "match"),
        [
            (
                "eleven",
                ValueError,
                "the text 'eleven' does not occur .* reads: 'She has",
            ),
            ("she has", ValueError, "Pass a position, a slice or"),
            (re.compile("x+"), ValueError, r"the pattern 'x\+' does not occur in the"),
            ("", ValueError, "explain: the text '' must stand for visible text"),
            (" ", ValueError, "explain: the text ' ' must stand for visible text"),
            (re.compile(" |$"), ValueError, r"pattern ' \|\$' must stand for visible"),
            (re.compile(b"3"), TypeError, "must be a pattern for text, but .* b'3'"),
        ],
    )
    def test_what_is_not_in_the_text_is_refused(self, explain, error, match):
        """The message shows the text that there is."""
        with pytest.raises(error, match=match):
            asked(explain)

    def test_a_long_text_is_shortened_in_the_message(self):
        """Eighty characters say enough."""
        with pytest.raises(ValueError, match=r"It reads: 'a{80}\.\.\.'\. Pass"):
            find_span("b", "a" * 81)
        with pytest.raises(ValueError, match=r"It reads: 'a{80}'\. Pass"):
            find_span("b", "a" * 80)

    def test_white_space_that_a_pattern_also_matches_does_not_count(self):
        """The last match that shows something does, without units, too."""
        assert find_span(re.compile("[0-9 ]+"), "a 12 b ") == (1, 5)
        assert find_span(re.compile("[0-9]*"), "a 12 b") == (2, 4)

    def test_an_occurrence_within_a_unit_goes_first(self):
        """In a trace, others stand in turns from outside; else the last counts."""
        text, units = "a 1, a 1, a 1", [Unit("a 1", True, (5, 8))]
        for explain in ("1", re.compile("[0-9]")):
            assert find_span(explain, text, units) == (7, 8)
            assert find_span(explain, text) == (12, 13)
            assert explained_units(explain, units, text) == (0,)

    def test_a_text_without_a_unit_is_refused(self):
        """Some units have no range."""
        units = [Unit("image", True, None), Unit("b", True, (1, 2))]
        assert explained_units("b", units, "ab") == (1,)
        with pytest.raises(ValueError, match="'a' must share a unit, but no generated"):
            explained_units("a", units, "ab")
