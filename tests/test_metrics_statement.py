"""Whether a text still says what is explained."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from captum_cage.metrics.statement import Statement

TEXT = "She has 3 + 4 = 7 pens. So the answer is 7."


class TestTexts:
    """Texts must occur as they are."""

    @pytest.mark.parametrize(
        ("piece", "text", "reached"),
        [
            ("7", "It is 7.", True),
            ("7", "It is (7)", True),
            ("7", "It is 17.", False),
            ("7", "It is 70.", False),
            ("7", "It is 7.5", False),
            ("7", "It is 7,000", False),
            ("7", "It is 3.7", False),
            ("7", "It is 1,7", False),
            ("7", "It is 3. 7 pens", True),
            ("7", "It is a7.", False),
            ("7 pens", "7 pensive men", False),
            ("7 pens", "7  pens", False),
            ("7 pens", "She has 7 pens!", True),
            ("7 pens", "she has 7 Pens", False),
            ("pens. So", "pens. Some", False),
            ("is 7.", "It is 7.", True),
            ("is 7.", "It is 7. 5 are hers.", True),
            ("is 7.", "It is 7.5", False),
            ("is 7.", "This 7.", False),
            ("= 7", "4=7", False),
            ("= 7", "x= 7", True),
        ],
    )
    def test_no_part_of_a_longer_word_or_number_counts(self, piece, text, reached):
        """A number goes on after its point, and a sentence does not."""
        assert Statement(piece, TEXT)(text) == float(reached)

    def test_signs_are_no_pattern(self):
        """They stand for themselves."""
        statement = Statement("3 + 4", TEXT)
        assert statement("It is 3 + 4.") == 1.0
        assert statement("It is 3   4.") == 0.0
        assert statement.description == "'3 + 4'"

    def test_all_explained_stretches_must_occur(self):
        """In any order, without the white space around them."""
        statement = Statement(None, TEXT, [" 7 pens.", "\n", "the answer is 7.\n"])
        assert statement("the answer is 7. She has 7 pens.") == 1.0
        assert statement("the answer is 7.") == 0.0
        assert statement("") == 0.0
        assert statement.description == "'7 pens.' and 'the answer is 7.'"

    @pytest.mark.parametrize("explained", [(), [" ", ""]])
    def test_nothing_explained_is_nothing_to_come_out_again(self, explained):
        """An empty text would occur in every other one."""
        with pytest.raises(ValueError, match="white space or special tokens alone"):
            Statement(None, TEXT, explained)

    @pytest.mark.parametrize("piece", ["", " "])
    def test_an_empty_text_is_refused(self, piece):
        """It says nothing."""
        with pytest.raises(ValueError, match="an empty text does not"):
            Statement(piece, TEXT)


class TestPatterns:
    """Patterns must be found, with the groups of the text explained."""

    def test_without_groups_it_must_be_found(self):
        """Anywhere."""
        statement = Statement(re.compile(r"answer is \d+"), TEXT)
        assert statement("My answer is 12!") == 1.0
        assert statement("My answer is twelve!") == 0.0
        assert statement.description == r"the pattern /answer is \d+/"

    def test_the_last_match_counts(self):
        """All of its groups must be those of the last one in the text explained."""
        statement = Statement(re.compile(r"(\w+) (?:is|=) (\d+)"), TEXT)
        assert statement("4 = 9, so the answer is 7") == 1.0
        assert statement("the answer is 7, and 4 = 7") == 0.0
        assert statement("the answer is 8") == 0.0
        assert statement("no number is to be found") == 0.0

    def test_groups_may_be_left_open(self):
        """As in the text explained, or not at all."""
        statement = Statement(re.compile(r"is (\d+)( pens)?"), TEXT)
        assert statement("it is 7") == 1.0
        assert statement("it is 7 pens") == 0.0

    def test_flags_are_its_own(self):
        """As it was compiled."""
        statement = Statement(re.compile("THE ANSWER", re.IGNORECASE), TEXT)
        assert statement("The Answer") == 1.0

    def test_what_is_not_found_in_the_text_explained_is_refused(self):
        """Nothing could be compared with it."""
        with pytest.raises(ValueError, match=r"the pattern /total \(.*/ does not. It "):
            Statement(re.compile(r"total (\d+)"), TEXT)


def last_number(text):
    """The last number of a text, or None."""
    found = re.findall(r"\d+", text)
    return int(found[-1]) if found else None


class TestFunctions:
    """Functions of a text."""

    @pytest.mark.parametrize("kind", [bool, np.bool_])
    def test_a_verdict_is_taken_as_it_is(self, kind):
        """True or false."""
        statement = Statement(lambda text: kind("7" in text), TEXT)
        assert statement("17") == 1.0
        assert statement("18") == 0.0
        with pytest.raises(ValueError, match="the function <lambda> does not"):
            Statement(lambda _: kind(False), TEXT)

    @pytest.mark.parametrize("kind", [float, np.float32, np.float64])
    def test_a_probability_is_taken_as_it_is(self, kind):
        """Zero to one; the text explained must have some."""
        statement = Statement(lambda text: kind(min(len(text), 4) / 4), TEXT)
        assert [statement("x" * n) for n in (0, 1, 2, 9)] == [0.0, 0.25, 0.5, 1.0]
        assert type(statement("x")) is float
        with pytest.raises(ValueError, match="statement: must hold of the text"):
            Statement(lambda _: kind(0.0), TEXT)

    @pytest.mark.parametrize("number", [-0.1, 1.5, float("nan"), np.float32(2)])
    def test_floats_beyond_are_refused(self, number):
        """They are no probabilities."""
        with pytest.raises(ValueError, match=r"must give them in \[0, 1\], but"):
            Statement(lambda _: number, TEXT)
        statement = Statement(lambda text: 1.0 if text == TEXT else number, TEXT)
        with pytest.raises(ValueError, match=r"must give them in \[0, 1\], but"):
            statement("another")

    def test_anything_else_must_be_what_it_was(self):
        """A number, or the name of a class."""
        statement = Statement(last_number, TEXT)
        assert statement("3, 4, 7") == 1.0
        assert statement("7, 8") == 0.0
        assert statement("none") == 0.0
        assert statement.description == "the function last_number"
        named = Statement(lambda text: "seven" if "7" in text else "other", TEXT)
        assert (named("17"), named("18")) == (1.0, 0.0)

    def test_nothing_found_is_not_reached(self):
        """Nor may it be what the text explained says."""
        with pytest.raises(ValueError, match="the function last_number does not"):
            Statement(last_number, "no number")

    def test_an_object_is_named_by_its_class(self):
        """Where it has no name of its own."""

        class Judge:
            def __call__(self, text):
                return "7" in text

        assert Statement(Judge(), TEXT).description == "the function Judge"


def test_a_token_inside_a_word_is_looked_for_as_such():
    """The explained text may be a part of a word or number; given texts are whole."""
    part = Statement(None, "Mia has 17 pens.", ["7"])
    assert (part("It is 27."), part("It is 8.")) == (1.0, 0.0)
    assert Statement(None, "Mia has 7 pens.", ["7"])("It is 27.") == 0.0
    with pytest.raises(ValueError, match="statement: must hold"):
        Statement("7", "Mia has 17 pens.")


@pytest.mark.parametrize(
    ("piece", "text", "other"),
    [("北京", "答案是北京。", "答案是南京。"), ("18", "It is 18kg.", "It is 118kg.")],
)
def test_a_given_text_may_be_joined_to_others(piece, text, other):
    """Where the text explained has it so; a longer number is another number."""
    statement = Statement(piece, text)
    assert (statement(text), statement(other)) == (1.0, 0.0)


@pytest.mark.parametrize("other", ["It is -7.", "It is 7/8.", "It is 1/7.", "\u22127"])
def test_a_sign_or_a_fraction_makes_another_number(other):
    """As a point or another digit does."""
    assert Statement("7", "The answer is 7.")(other) == 0.0


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_a_number_without_dimensions_is_a_number(kind):
    """Whichever library it comes from."""
    likely = Statement(lambda text: kind(0.4 if "7" in text else 0.1), "It is 7.")
    assert (likely("7"), likely("8")) == (pytest.approx(0.4), pytest.approx(0.1))
    holds = Statement(lambda text: kind("7" in text), "It is 7.")
    assert (holds("7"), holds("8")) == (1.0, 0.0)


class TestErrors:
    """What is refused."""

    @pytest.mark.parametrize("predicate", [7, ["7"], b"7"])
    def test_what_is_no_predicate_is_refused(self, predicate):
        """By its type."""
        match = "statement: must be a text, a compiled pattern, or a function"
        with pytest.raises(TypeError, match=match):
            Statement(predicate, TEXT)

    def test_it_must_hold_of_the_text_explained(self):
        """The error says what that text reads."""
        match = "statement: must hold .*, but '8' does not. It ends with 'She has 3"
        with pytest.raises(ValueError, match=match):
            Statement("8", TEXT)
