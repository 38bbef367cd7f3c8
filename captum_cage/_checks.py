"""Checks of arguments: one sentence form for every error a user can cause.

The form is "where: what must hold, but what came. What to do."
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "complaint",
    "finite_vector",
    "legible",
    "one_of",
    "real_array",
    "share_to_keep",
    "shown",
    "whole_number",
]


def complaint(where: str, must: str, came: str, remedy: str) -> str:
    """The text of an error in the one form that all our errors have.

    Args:
        where: the argument, as the user wrote it.
        must: what must hold.
        came: what came instead.
        remedy: what to do, as one or more whole sentences.

    Returns:
        One line of text.

    Example:
        >>> complaint("k", "must be 0 or more", "-1 came", "Pass 0 for direct rows.")
        'k: must be 0 or more, but -1 came. Pass 0 for direct rows.'
    """
    return f"{where}: {must}, but {came}. {remedy}"


def shown(value: object) -> str:
    """The type and a short form of a value, for the "what came" of an error.

    Example:
        >>> shown(1.5)
        'float 1.5'
    """
    text = legible(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def legible(value: object) -> str:
    """The ``repr`` of a value, or that it has none.

    Example:
        >>> legible([1]), legible(10**5000)
        ('[1]', '(too large to be shown)')
    """
    try:
        return repr(value)
    # Lists in lists in lists, and numbers of more digits than Python writes.
    except (RecursionError, ValueError):
        return "(too large to be shown)"


def one_of(where: str, value: str, allowed: Sequence[str]) -> str:
    """The value, if it is one of the allowed words.

    Raises:
        ValueError: if it is none of them.

    Example:
        >>> one_of("normalization", "signed", ("positive", "signed"))
        'signed'
    """
    if not (isinstance(value, str) and value in allowed):
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(
            complaint(
                where,
                f"must be one of {words}",
                f"{legible(value)} came",
                f"Pass one of these, for example {where}={allowed[0]!r}.",
            )
        )
    return value


def whole_number(
    where: str, value: object, *, minimum: int = 0, stop: int | None = None, remedy: str
) -> int:
    """The value as an ``int``, if it is a whole number in ``[minimum, stop)``.

    NumPy integers are whole numbers; booleans and floats are not.

    Args:
        where: the argument, as the user wrote it.
        value: what came.
        minimum: smallest allowed value.
        stop: first value above the allowed ones; ``None`` for no bound.
        remedy: what to do, as a whole sentence.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: if it is out of range.

    Example:
        >>> whole_number("k", np.int64(3), remedy="Pass 0 or more.")
        3
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(
            complaint(where, "must be a whole number", f"{shown(value)} came", remedy)
        )
    number = int(value)
    if number < minimum or (stop is not None and number >= stop):
        allowed = (
            f"must be {minimum} or more"
            if stop is None
            else f"must be at least {minimum} and less than {stop}"
        )
        raise ValueError(complaint(where, allowed, f"{number} came", remedy))
    return number


def share_to_keep(where: str, value: object, *, remedy: str) -> float:
    """The value as a ``float``, if it is a number in ``(0, 1]``.

    Args:
        where: the argument, as the user wrote it.
        value: what came.
        remedy: what to do, as a whole sentence.

    Raises:
        TypeError: if it is not a number.
        ValueError: if it is out of range.

    Example:
        >>> share_to_keep("keep", 1, remedy="Pass 0.9.")
        1.0
    """
    must = "must be above 0 and at most 1"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(complaint(where, must, f"{shown(value)} came", remedy))
    share = float(value)
    if not 0.0 < share <= 1.0:
        raise ValueError(complaint(where, must, f"{share} came", remedy))
    return share


def real_array(where: str, value: Any) -> NDArray[np.float64]:
    """A fresh float64 array with the numbers of ``value``, never a view of it.

    Args:
        where: the argument, as the user wrote it.
        value: anything that NumPy turns into an array of real numbers.

    Returns:
        A C-contiguous array of its own, of the value's shape.

    Raises:
        TypeError: if NumPy cannot read real numbers from it.

    Example:
        >>> real_array("weights", [1, 2]).tolist()
        [1.0, 2.0]
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            complaint(
                where,
                "must be real numbers in rows of equal length",
                f"a {type(value).__name__} came that NumPy cannot read ({error})",
                "Pass a NumPy array or nested lists; for a tensor "
                "tensor.detach().cpu().double().numpy().",
            )
        ) from error
    # Booleans, signed and unsigned whole numbers, floats.
    if array.dtype.kind not in "biuf":
        raise TypeError(
            complaint(
                where,
                "must be real numbers",
                f"values of type {array.dtype} came",
                "Convert them to float first.",
            )
        )
    return np.array(array, dtype=np.float64, order="C")


def finite_vector(
    where: str, value: Any, size: int, *, entry: str, negative: str | None = None
) -> NDArray[np.float64]:
    """A fresh float64 vector of the given size with finite entries.

    Args:
        where: the argument, as the user wrote it.
        value: anything that NumPy turns into an array of real numbers.
        size: the number of entries.
        entry: what one entry stands for, for example ``"generated unit"``.
        negative: what to do instead of passing a negative entry, as a whole
            sentence; ``None`` where negative entries are allowed.

    Returns:
        A vector of its own, shape ``(size,)``.

    Raises:
        TypeError: if NumPy cannot read real numbers from it.
        ValueError: if its shape differs, or an entry is not finite or not allowed.

    Example:
        >>> finite_vector("weights", [0, 1], 2, entry="generated unit").tolist()
        [0.0, 1.0]
    """
    vector = real_array(where, value)
    if vector.shape != (size,):
        raise ValueError(
            complaint(
                where,
                f"must have shape ({size},)",
                f"shape {vector.shape} came",
                f"Pass one number per {entry}.",
            )
        )
    for place in np.flatnonzero(~np.isfinite(vector)):
        raise ValueError(
            complaint(
                where,
                "every entry must be finite",
                f"{vector[place]} came at {entry} {place}",
                "Pass 0 for what shall not count.",
            )
        )
    if negative is not None:
        for place in np.flatnonzero(vector < 0):
            raise ValueError(
                complaint(
                    where,
                    "no entry may be negative",
                    f"{vector[place]} came at {entry} {place}",
                    negative,
                )
            )
    return vector
