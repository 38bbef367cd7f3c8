"""Argument checks: one sentence form, and the values they let through."""

from __future__ import annotations

import numpy as np
import pytest

from captum_cage._checks import (
    complaint,
    finite_vector,
    one_of,
    real_array,
    share_to_keep,
    shown,
    whole_number,
)


def test_an_error_says_where_what_must_hold_what_came_and_what_to_do():
    """In this order, as one line."""
    text = complaint("k", "must be 0 or more", "-1 came", "Pass 0.")
    assert text == "k: must be 0 or more, but -1 came. Pass 0."


@pytest.mark.parametrize(
    ("value", "expected"), [(3, "int 3"), ("a" * 99, "str '" + "a" * 56 + "...")]
)
def test_what_came_is_shown_with_its_type_and_cut_short(value, expected):
    """Nobody reads a page of repr."""
    assert shown(value) == expected


def test_what_cannot_be_written_is_named_by_its_type():
    """An error of its own would hide which argument was wrong."""
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value, kind in ((deep, "list"), (10**5000, "int")):
        assert shown(value) == f"{kind} (too large to be shown)"
        with pytest.raises(
            ValueError, match=r"'a', but \(too large to be shown\) came"
        ):
            one_of("mode", value, ("a",))


def test_a_word_must_be_one_of_the_allowed():
    """The error lists them."""
    assert one_of("mode", "a", ("a", "b")) == "a"
    for value in ("c", None, 1):
        with pytest.raises(ValueError, match="mode: must be one of 'a', 'b'"):
            one_of("mode", value, ("a", "b"))


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2)])
def test_whole_numbers_of_any_kind_are_taken(value):
    """And come back as Python's own."""
    number = whole_number("k", value, remedy="")
    assert (type(number), number) == (int, 2)


@pytest.mark.parametrize("value", [True, 2.0, "2", None, np.float64(2)])
def test_other_things_are_no_whole_numbers(value):
    """Booleans are no numbers here."""
    with pytest.raises(TypeError, match="k: must be a whole number"):
        whole_number("k", value, remedy="")


@pytest.mark.parametrize(
    ("value", "stop", "message"),
    [(-1, None, "must be 0 or more"), (5, 5, "at least 0 and less than 5")],
)
def test_whole_numbers_are_held_to_their_range(value, stop, message):
    """Up to the stop, which is not in it."""
    assert whole_number("k", 4, stop=5, remedy="") == 4
    with pytest.raises(ValueError, match=message):
        whole_number("k", value, stop=stop, remedy="")


def test_real_arrays_are_never_views_of_what_came():
    """The user's array cannot change under us, nor we it."""
    given = np.ones(3)
    array = real_array("rows", given)
    array[0] = 5
    assert given[0] == 1
    assert real_array("rows", [True, 2]).dtype == np.float64


@pytest.mark.parametrize("value", [["a"], [1j], [[1], [1, 2]], object()])
def test_what_is_no_array_of_real_numbers_is_refused(value):
    """With the argument's name."""
    with pytest.raises(TypeError, match="rows: must be real numbers"):
        real_array("rows", value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], r"weights: must have shape \(3,\), but shape \(2,\) came"),
        ([[1, 2, 3]], r"shape \(1, 3\) came"),
        ([1, np.nan, 0], "nan came at unit 1"),
        ([1, 0, np.inf], "inf came at unit 2"),
        ([1, -2, 0], "no entry may be negative, but -2.0 came at unit 1"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused_by_its_entry(value, message):
    """Shape, finiteness and sign."""
    with pytest.raises(ValueError, match=message):
        finite_vector("weights", value, 3, entry="unit", negative="Pass 0.")


def test_a_vector_that_fits_is_taken():
    """Negative entries where they are allowed."""
    assert finite_vector("weights", [1, -2, 0], 3, entry="unit").tolist() == [1, -2, 0]


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.25), True, "1", None])
def test_a_share_to_keep_is_a_number(value):
    """Of any kind, but no boolean."""
    if isinstance(value, str | bool | None):
        with pytest.raises(TypeError, match=r"keep: must be above 0.* came. Pass 0.9."):
            share_to_keep("keep", value, remedy="Pass 0.9.")
    else:
        assert share_to_keep("keep", value, remedy="Pass 0.9.") == float(value)


@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan")])
def test_a_share_to_keep_is_in_its_range(value):
    """Nothing is not kept."""
    with pytest.raises(ValueError, match=r"keep: must be above 0 and at most 1, but"):
        share_to_keep("keep", value, remedy="Pass 0.9.")
