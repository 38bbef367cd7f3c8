"""Examples to explain: what one holds, its hash, and where examples are read from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, partial
from itertools import count
from numbers import Integral, Real
from pathlib import Path
from types import (
    BuiltinFunctionType,
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, TypeAlias

import numpy as np
import torch
import transformers
from captum.attr import InterpretableInput, TextTokenInput
from torch import Tensor

from captum_cage._checks import complaint, shown
from captum_cage.inputs import ChatTokenInput, checked_messages
from captum_cage.spans import Explain
from captum_cage.thinking import Part
from captum_cage.units import Granularity, split_units

__all__ = ["Example", "Examples", "Given", "digest", "given", "read_example", "total"]

Examples: TypeAlias = "str | os.PathLike[str] | Iterable[Mapping[str, Any] | Example]"
"""Where examples come from: a file, or anything that gives them one by one."""

LONGEST_LINE = 2**26
"""Bytes of a line; a longer one is an error of its example, and is not kept."""

_MARK = b"\xef\xbb\xbf"  # of byte order, as some editors write it
_KEY_LENGTH = 32  # hexadecimal digits: 128 bits
_FIELDS = ("prompt", "messages", "target", "explain", "units", "foil", "gen_args", "id")
_REMEDY = "Mend the example, or leave it out."


@dataclass(frozen=True, eq=False)
class Example:
    """One text to explain, and what is asked about it.

    A field that is None takes what the options of :func:`run` say.

    Args:
        prompt (str or InterpretableInput, optional): the prompt; a text is read as
            Captum's ``TextTokenInput`` does.
        messages (Sequence[Mapping], optional): in place of ``prompt``: a chat, which
            the tokenizer's template writes out as in
            :class:`~captum_cage.ChatTokenInput`.
        target (str or Sequence[int] or Tensor, optional): the generated text, or its
            token ids; None lets the model generate it. Default: ``None``
        explain (optional): as in
            :meth:`~captum_cage.GraphContextAttribution.attribute`. Default: ``None``
        units (optional): as there. Default: ``None``
        foil (Mapping, optional): as there. Default: ``None``
        gen_args (Mapping, optional): as there. Default: ``None``
        id (str or int, optional): your name for it, which the table repeats. No file is
            named after it. Default: ``None``
        meta (Mapping, optional): what else is known of it. Its scalars stand in the
            table. Default: ``{}``

    Raises:
        TypeError: if a field is of the wrong kind.
        ValueError: if there is no prompt, or there are two.

    Example:
        >>> one = Example("Ana has 3 pens.", explain="7", id="a")
        >>> one.key == Example("Ana has 3 pens.", explain="7", id="b").key
        True
    """

    prompt: str | InterpretableInput | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    target: str | Sequence[int] | Tensor | None = None
    explain: Explain = None
    units: Granularity | None = None
    foil: Mapping[Any, Any] | None = None
    gen_args: Mapping[str, Any] | None = None
    id: str | int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            came = "neither" if self.prompt is None else "both"
            raise ValueError(
                complaint(
                    "prompt",
                    "must be given, or messages in its place",
                    f"{came} came",
                    "Pass one of the two.",
                )
            )
        if self.messages is not None:
            checked_messages(self.messages)
        else:
            _check("prompt", self.prompt, str | InterpretableInput, "a text")
        _check_target(self.target)
        for name in ("foil", "gen_args"):
            _check(name, getattr(self, name), Mapping | None, "a mapping")
        if self.units is not None:
            split_units(self.units)
        if isinstance(self.id, bool) or not isinstance(self.id, str | int | None):
            _check("id", self.id, str, "a text or a whole number")
        _check("meta", self.meta, Mapping, "a mapping")

    @cached_property
    def key(self) -> str:
        """Hash of what is asked, 32 hexadecimal digits; ``id`` and ``meta`` left out.

        Raises:
            TypeError: if something in it has no stable hash.
        """
        asked = {name: getattr(self, name) for name in _FIELDS if name != "id"}
        return digest({name: v for name, v in asked.items() if v is not None})

    @property
    def scalars(self) -> dict[str, str | int | float | bool | None]:
        """What of ``meta`` fits into a table or JSON."""
        return {
            _paired(str(name)): plain
            for name, value in self.meta.items()
            for plain in [_scalar(value)]
            if plain is not None or value is None
        }

    def input(self, tokenizer: Any) -> InterpretableInput:
        """The prompt as Captum takes it.

        Args:
            tokenizer: of the model.

        Raises:
            TypeError, ValueError: if the tokenizer cannot read it.
        """
        if self.messages is not None:
            return ChatTokenInput(self.messages, tokenizer)
        if isinstance(self.prompt, str):
            return TextTokenInput(self.prompt, tokenizer)
        return self.prompt

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``attribute`` is given besides the prompt, where this one says it."""
        names = ("target", "explain", "units", "foil", "gen_args")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Example:
        """The example that a record means, as it stands in a file.

        Args:
            record (Mapping): fields by name. What is no field becomes ``meta``. Null is
                as absent. ``explain`` may be ``{"regex": ...}`` or ``{"part":
                "answer"}``, and ``foil`` a list of pairs of place and foil.

        Raises:
            TypeError: if a field is of the wrong kind.
            ValueError: if it has no prompt, or a field cannot be read.

        Example:
            >>> one = Example.of({"prompt": "1 + 1 =", "explain": [0, 2], "level": 3})
            >>> one.explain, dict(one.meta)
            ((0, 2), {'level': 3})
        """
        if not isinstance(record, Mapping):
            raise TypeError(
                complaint(
                    "example",
                    "must be a mapping or an Example",
                    f"{shown(record)} came",
                    'Write it as {"prompt": "...", "target": "..."}.',
                )
            )
        found = {n: record[n] for n in _FIELDS if record.get(n) is not None}
        meta = {name: record[name] for name in record if name not in _FIELDS}
        for name, read in _READERS.items():
            if name in found:
                found[name] = read(found[name])
        return cls(**found, meta=meta)


def read_example(line: bytes | str) -> Example:
    """The example of one line of JSON.

    Args:
        line (bytes or str): UTF-8, or text.

    Raises:
        TypeError: if a field is of the wrong kind.
        ValueError: if it is no JSON, or the example lacks something.

    Example:
        >>> read_example(b'{"prompt": "1 + 1 =", "target": " 2"}').target
        ' 2'
    """
    return Example.of(_record(line))


def _record(line: bytes | str) -> dict[str, Any]:
    """The object that a line of JSON holds."""
    must, remedy = "must be a JSON object in UTF-8", "Mend the line, or leave it out."
    try:
        record = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        came = f"it is none: {type(error).__name__}: {error}"
        raise ValueError(complaint("line", must, came, remedy)) from error
    if not isinstance(record, dict):
        raise TypeError(complaint("line", must, f"{shown(record)} came", remedy))
    return record


# --- fields of a record --------------------------------------------------------------


def _check(name: str, value: Any, kind: Any, words: str) -> None:
    if not isinstance(value, kind):
        must = f"must be {words}"
        raise TypeError(complaint(name, must, f"{shown(value)} came", _REMEDY))


def _check_target(target: Any) -> None:
    if target is None or isinstance(target, str | Tensor | np.ndarray):
        return
    if not isinstance(target, Sequence) or isinstance(target, bytes):
        _check("target", target, str, "a text or token ids")
    for one in target:
        if isinstance(one, bool) or not isinstance(one, Integral):
            _check("target", one, str, "a text or token ids, which are whole numbers")


def _explain(value: Any) -> Any:
    """What to explain, from its form in a file."""
    if isinstance(value, Mapping):
        value = {name: inner for name, inner in value.items() if inner is not None}
        match value:
            case {"regex": str(pattern), **rest} if not rest:
                try:
                    return re.compile(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    must = "must be a regular expression"
                    came = f"{pattern!r} came: {error}"
                    text = complaint("explain", must, came, _REMEDY)
                    raise ValueError(text) from error
            case {"part": str(part), **rest} if not rest:
                if part in {one.value for one in Part}:
                    return Part(part)
    elif isinstance(value, str | bool | slice | re.Pattern | Part):
        return value
    elif isinstance(value, Integral):
        return int(value)
    elif isinstance(value, list | tuple | np.ndarray) and len(value) == 2:
        return tuple(value)
    raise TypeError(
        complaint(
            "explain",
            'must be a text, a position, [start, stop], {"regex": ...} or {"part": '
            '"answer"}',
            f"{shown(value)} came",
            _REMEDY,
        )
    )


def _units(value: Any) -> Any:
    """Units, from their form in a file: lists of ranges as tuples."""
    if isinstance(value, list):
        return [_pair(one) for one in value]
    if isinstance(value, Mapping):
        found = {n: _units(inner) for n, inner in value.items() if inner is not None}
        return {name: "token" if v is None else v for name, v in found.items()}
    return value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _foil(value: Any) -> Any:
    """Foils by place: a mapping, or pairs, whose places may be positions."""
    if isinstance(value, Mapping):
        return {place: foil for place, foil in value.items() if foil is not None}
    if isinstance(value, list | tuple):
        try:
            return {_explain(place): foil for place, foil in value}
        except (TypeError, ValueError):
            pass
    must = "must be a mapping of places to foils, or pairs of them"
    raise TypeError(complaint("foil", must, f"{shown(value)} came", _REMEDY))


def _messages(value: Any) -> Any:
    """Messages, less the nulls that a table fills up with."""
    if not isinstance(value, list | tuple | np.ndarray):
        return value
    return [
        {n: v for n, v in one.items() if v is not None or n == "content"}
        if isinstance(one, Mapping)
        else one
        for one in value
    ]


def _settings(value: Any) -> Any:
    """Arguments by name, less the nulls that a table fills up with."""
    if not isinstance(value, Mapping):
        return value
    return {name: inner for name, inner in value.items() if inner is not None}


_READERS: dict[str, Callable[[Any], Any]] = {
    "messages": _messages,
    "explain": _explain,
    "units": _units,
    "foil": _foil,
    "gen_args": _settings,
}


def _scalar(value: Any) -> str | int | float | bool | None:
    """A value as JSON and a table hold it; None for what is no scalar."""
    if isinstance(value, str):
        return _paired(value)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        number = int(value)
        return number if -(2**63) <= number < 2**63 else None
    if isinstance(value, Real):
        return float(value) if np.isfinite(float(value)) else None
    return None


def _paired(text: str) -> str:
    """A text as UTF-8 can hold it: half a surrogate pair is written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON.")


# --- hashes --------------------------------------------------------------------------


def digest(value: Any) -> str:
    """Hash of a value by what it holds, the same in every process; 32 digits.

    Raises:
        TypeError: if something in it is known by its place in memory only.
        ValueError: if it contains itself.

    Example:
        >>> digest({"a": [1, 2], "b": None}) == digest({"b": None, "a": (1, 2)})
        True
    """
    try:
        return hashlib.sha256(_encoded(value)).hexdigest()[:_KEY_LENGTH]
    except RecursionError as error:
        text = complaint("example", "must not nest deep", "it does", _REMEDY)
        raise ValueError(text) from error


def _encoded(value: Any) -> bytes:
    """Bytes that are equal for equal values and different for different ones."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return _tagged("c", str(value).encode())
    if isinstance(value, Enum):
        return _tagged("e", f"{type(value).__qualname__}.{value.name}".encode())
    if isinstance(value, str):
        return _tagged("s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _tagged("b", value)
    if isinstance(value, Integral):
        return _tagged("i", f"{int(value):x}".encode())
    if isinstance(value, float):
        return _tagged("f", value.hex().encode())
    if isinstance(value, Mapping):
        items = sorted(_encoded(k) + _encoded(v) for k, v in value.items())
        return _tagged("d", b"".join(items))
    if isinstance(value, list | tuple | range):
        return _tagged("l", b"".join(map(_encoded, value)))
    if isinstance(value, set | frozenset):
        return _tagged("u", b"".join(sorted(map(_encoded, value))))
    return _tagged("o", _encoded_object(value))


def _tagged(tag: str, content: bytes) -> bytes:
    return f"{tag}{len(content)}:".encode() + content


def _encoded_object(value: Any) -> bytes:
    """Of what is no plain value of JSON."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, slice):
        return _encoded([name, value.start, value.stop, value.step])
    if isinstance(value, re.Pattern):
        return _encoded([name, value.pattern, value.flags])
    if isinstance(value, Tensor):
        shape, flat = list(value.shape), value.detach().cpu().reshape(-1)
        # NumPy has no bfloat16; the bytes are what counts.
        content = flat.view(torch.uint8).numpy().tobytes() if shape else flat.tolist()
        return _encoded([name, str(value.dtype), shape, content])
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        return _encoded([name, str(value.dtype), list(value.shape), value.tobytes()])
    if isinstance(value, transformers.PreTrainedTokenizerBase):
        return _encoded([name])  # the settings know the tokenizer
    if isinstance(value, partial):
        return _encoded([name, value.func, value.args, value.keywords])
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        parts = [value.__module__, value.__qualname__, value.__defaults__, cells]
        return _encoded([name, *parts]) + _encoded_code(value.__code__)
    if isinstance(value, MethodType | BuiltinMethodType | BuiltinFunctionType):
        owner = value.__self__
        of = owner.__name__ if isinstance(owner, ModuleType) else owner
        return _encoded([name, of, value.__name__])
    if isinstance(value, MethodDescriptorType):
        return _encoded([name, value.__objclass__, value.__name__])
    if isinstance(value, type):
        return _encoded([name, value.__module__, value.__qualname__])
    if hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):
        return _encoded([name, value.mode, list(value.size), value.tobytes()])
    if isinstance(value, InterpretableInput):
        return _encoded([name, vars(value)])
    raise TypeError(
        complaint(
            "examples and options",
            "must be made of texts, numbers, tensors, functions and inputs of Captum",
            f"{shown(value)} came",
            "Without a hash a second start could not know it again.",
        )
    )


def _encoded_code(code: CodeType) -> bytes:
    """Of what a function does."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    plain = [c for c in code.co_consts if not isinstance(c, CodeType)]
    names = [code.co_code, code.co_names, plain]
    return _encoded(names) + b"".join(map(_encoded_code, inner))


# --- where examples come from --------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What was read at one place of the input.

    Attributes:
        position (int): from 0.
        line (int or None): in a file of lines, from 1.
        key (str): hash of the example, or of what cannot be read as one.
        example (Example or None): the example, where it can be read.
        error (Exception or None): why it cannot.
        id (str or None): its name, where it has one.
    """

    position: int
    line: int | None
    key: str
    example: Example | None = None
    error: Exception | None = None
    id: str | None = None


def given(examples: Examples) -> Iterator[Given]:
    """The examples of a file or an iterable, one by one; bad ones with their error.

    A file is opened at once, so that a wrong name is found before any work.

    Args:
        examples: the path of a file of JSON lines (``.jsonl``, ``.ndjson``) or of
            Parquet (``.parquet``), or an iterable of mappings or examples, such as a
            list, a generator or a data set of ``datasets``.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the file's name ends otherwise, or it is no Parquet file.
        OSError: if the file cannot be read.
        ImportError: if pyarrow is missing, which Parquet needs.
    """
    if isinstance(examples, str | os.PathLike):
        return _reader(Path(examples))
    if isinstance(examples, Mapping | Example | bytes) or not isinstance(
        examples, Iterable
    ):
        raise TypeError(
            complaint(
                "examples",
                "must be a path, or give mappings or examples one by one",
                f"{shown(examples)} came",
                "Put a single example into a list.",
            )
        )
    return (_read(place, None, one) for place, one in enumerate(examples))


def total(examples: Examples) -> int | None:
    """How many examples there are, if that is known before they are read.

    Raises:
        OSError: if the file cannot be read.
    """
    if isinstance(examples, str | os.PathLike):
        path = Path(examples)
        if path.suffix.lower() == ".parquet":
            return int(_parquet(path).metadata.num_rows)
        with path.open("rb") as file:
            return sum(1 for line in file if line.removeprefix(_MARK).strip())
    return len(examples) if isinstance(examples, Sized) else None


def _reader(path: Path) -> Iterator[Given]:
    suffix = path.suffix.lower()
    if suffix in {".jsonl", ".ndjson"}:
        path.open("rb").close()  # now, not at the first example
        return _lines(path)
    if suffix == ".parquet":
        return _rows(_parquet(path))
    raise ValueError(
        complaint(
            "examples",
            "must name a file that ends in .jsonl, .ndjson or .parquet",
            f"{str(path)!r} came",
            "Rename it, or read it yourself and pass the records.",
        )
    )


def _lines(path: Path) -> Iterator[Given]:
    """Of a file of JSON lines, one line in memory at a time."""
    places = count()
    with path.open("rb") as file:
        for number in count(1):
            line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            if number == 1:
                line = line.removeprefix(_MARK)
            if len(line) > LONGEST_LINE:
                while not line.endswith(b"\n") and (rest := file.readline(2**20)):
                    line = rest
                must = f"must have at most {LONGEST_LINE} bytes"
                text = complaint("line", must, "a longer one came", _REMEDY)
                key = digest(["too long", number])
                yield Given(next(places), number, key, error=ValueError(text))
            elif line.strip():
                yield _read(next(places), number, line.strip())


def _parquet(path: Path) -> Any:
    try:
        import pyarrow as pa  # noqa: PLC0415
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "examples: a Parquet file needs pyarrow: pip install captum-cage[scale]"
        ) from error
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        came = f"{str(path)!r} came: {error}"
        text = complaint("examples", "must be a Parquet file", came, "Write it again.")
        raise ValueError(text) from error


def _rows(file: Any) -> Iterator[Given]:
    """Of an open Parquet file, some rows in memory at a time."""
    places = count()
    with file:
        for batch in file.iter_batches(batch_size=256):
            for record in batch.to_pylist():
                yield _read(next(places), None, record)


def _read(position: int, line: int | None, found: Any) -> Given:
    """What stands at one place, or why it cannot be read."""
    if isinstance(found, Given):
        return found
    name = None
    raw = found
    try:
        if isinstance(found, bytes):
            found = _record(found)
        example = found if isinstance(found, Example) else Example.of(found)
        name = None if example.id is None else _paired(str(example.id))
        return Given(position, line, example.key, example, id=name)
    except (TypeError, ValueError) as error:
        if name is None and isinstance(found, Mapping):
            own = found.get("id")
            name = _paired(str(own)) if isinstance(own, str | int) else None
        return Given(position, line, _key_of_bad(raw), error=error, id=name)


def _key_of_bad(found: Any) -> str:
    """A hash of what is no example; by its looks, where it has no better one."""
    try:
        return digest(["bad", found])
    except (TypeError, ValueError):
        return digest(["bad", shown(found)])
