"""What is read from outside, fed with broken and hostile input.

    python benchmarks/fuzz.py --runs 50000                    # of each target
    python benchmarks/fuzz.py --minutes 5 --targets npz json  # for so long each
    python benchmarks/fuzz.py --engine atheris --runs 20000   # led by coverage
    python benchmarks/fuzz.py --replay npz 1234               # one input, its traceback
    python benchmarks/fuzz.py --smoke                         # a few inputs, for CI

A target makes an input that is nearly right, spoils it (a field, an array's header, an
offset, a byte), and gives it to the package. Nothing but `ValueError`, `TypeError` and
`OSError` may come out, which are documented, and what is read must keep its laws. An
input follows from a number alone, so there is no corpus to keep; with `--engine
atheris` that generator of numbers reads the bytes that libFuzzer chooses. The exit
status is 1 if anything else came out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from typer.testing import CliRunner

from captum_cage import (
    AttributionGraph,
    ChatTokenInput,
    ChatTraceInput,
    GraphAttributionResult,
    TokenIdsInput,
    TraceIdsInput,
    Unit,
)
from captum_cage._version import __version__
from captum_cage.cli import app
from captum_cage.draws import DrawnRows
from captum_cage.foils import Foil
from captum_cage.inputs import target_ids
from captum_cage.metrics.datasets import LOADERS
from captum_cage.record import arrays_of, header_of
from captum_cage.spans import explained_units, find_span
from captum_cage.testing import tiny_tokenizer
from captum_cage.text import (
    TokenText,
    harmless,
    message_spans,
    read_tokens,
    sentence_spans,
    word_spans,
)
from captum_cage.thinking import MARKERS, Part, Thinking
from captum_cage.units import group_tokens, split_ranges, split_units

Source = random.Random
Target = Callable[[Source], None]

DOCUMENTED = (ValueError, TypeError, OSError)
LIMIT = 2**24  # bytes: the corpus is small, so that what grows beyond it is a bomb
SLOW = 5.0  # seconds that no small input may take
MANY_CHARACTERS = 100_000

PIECES = (
    *("", " ", "\n", "\r\n", "\r", "\t", "\x00", "\x1b[31m", "\u00a0", "\u2028"),
    *(
        "a",
        "Ana has 3 pens.",
        "é",
        "e\u0301",
        "\u0301",
        "ß",
        "日本。",
        "한",
        "ا",
        "שלום",
    ),
    *(
        "😀",
        "👩\u200d👩\u200d👧",
        "\u200b",
        "\u202e",
        "\ud800",
        "\udc00",
        "\ufffd",
        "\ue000",
    ),
    *(
        "3.5",
        "e.g.",
        "...",
        "'s",
        "```",
        "- ",
        "1. ",
        "|",
        "{",
        "}",
        "<br>",
        "</script>",
    ),
    *(mark for pair in MARKERS for mark in pair),
    *("<|user|>", "<|assistant|>", "<|end|>", "<eos>", "</s>", "▁", "##s", "Ġ"),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, -(2**31), 2**63, 2**64, 10**30),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "a",
        "0",
        "\ud800",
        "\x00",
        "../../etc/passwd",
        "positive",
        "signed",
        "x" * 999,
    ),
    *(
        [],
        [[]],
        [0],
        [0, 1],
        [-1, 2],
        [1, 0],
        ["a", 1],
        {},
        {"a": 1},
        [None],
        [[], [0]],
    ),
)


# --- where inputs come from ----------------------------------------------------------


class OfBytes(random.Random):
    """A generator whose draws are the bytes that a fuzzer chose; zeros at the end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._place = data, 0

    def getrandbits(self, k: int) -> int:
        """A number of ``k`` bits."""
        size = (k + 7) // 8
        piece = self._data[self._place : self._place + size]
        self._place += size
        return int.from_bytes(piece, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """A number in [0, 1)."""
        return self.getrandbits(32) / 2**32


def some_text(rng: Source, most: int = 8) -> str:
    """A text of hard pieces; rarely a very long one."""
    if rng.random() < 0.0005:
        piece = rng.choice(PIECES)
        return piece * (MANY_CHARACTERS // max(len(piece), 1))
    pieces = [rng.choice(PIECES) for _ in range(rng.randrange(most))]
    if rng.random() < 0.1:
        pieces.append(chr(rng.randrange(0x110000)))
    return "".join(pieces)


def odd(rng: Source) -> Any:
    """A value that a field is not meant to have."""
    kind = rng.randrange(12)
    if kind == 0:
        return some_text(rng)
    if kind == 1:
        value: Any = rng.choice(ODD)
        for _ in range(rng.choice((3, 40, 300, 2000))):
            value = [value] if rng.random() < 0.9 else {"a": value}
        return value
    if kind == 2:
        return rng.randrange(-5, 12)
    return copy.copy(rng.choice(ODD))


def spoilt(rng: Source, value: Any) -> Any:
    """A JSON value in which one place differs, whose value is changed in place."""
    holder: Any = None
    key: Any = None
    here = value
    while isinstance(here, dict | list) and here and rng.random() < 0.85:
        holder = here
        key = (
            rng.choice(list(here))
            if isinstance(here, dict)
            else rng.randrange(len(here))
        )
        here = here[key]
    if holder is None:
        return odd(rng)
    what = rng.randrange(6)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, list):
        holder.insert(key, copy.copy(here))
    elif what == 2 and isinstance(holder, dict):
        holder[rng.choice(list(holder))] = copy.copy(here)
    elif what == 3 and isinstance(here, int | float) and not isinstance(here, bool):
        holder[key] = rng.choice((here + 1, here - 1, -here, here * 2, float(here)))
    else:
        holder[key] = odd(rng)
    return value


def written(rng: Source, value: Any) -> bytes:
    """A JSON value as a file has it, now and then with what JSON does not have."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    except RecursionError:
        depth = rng.choice((10, 500, 990, 5000, 100_000))
        text = "[" * depth + "]" * depth
    if rng.random() < 0.05:
        numbers = (
            "1e999",
            "-1e999",
            "9" * 5000,
            "NaN",
            "01",
            "1e-400",
            "-0",
            "1" * 300,
        )
        text = re.sub(r"\b\d+\b", rng.choice(numbers), text, count=rng.randrange(1, 9))
    encoding = rng.choice(("utf-8",) * 20 + ("utf-16", "utf-32-be", "utf-8-sig"))
    return noisy(rng, text.encode(encoding, "surrogatepass"), 0.1)


def noisy(rng: Source, data: bytes, often: float) -> bytes:
    """Bytes, some of which are changed, lost, doubled or swapped, so often."""
    if rng.random() > often or not data:
        return data
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place = rng.randrange(len(changed)) if changed else 0
        what = rng.randrange(6)
        if what == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            changed[place : place + 4] = struct.pack(
                "<I", rng.choice((0, 1, 2**31, 2**32 - 1))
            )
        elif what == 2:
            del changed[place : place + rng.choice((1, 4, 100, 10**6))]
        elif what == 3:
            changed[place:place] = changed[place : place + rng.choice((1, 8, 200))]
        elif what == 4 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        else:
            other = rng.randrange(len(changed) + 1)
            changed[place : place + 8] = changed[other : other + 8]
    return bytes(changed)


# --- the corpus: results made by code ------------------------------------------------


@cache
def results() -> tuple[GraphAttributionResult, ...]:
    """Small results with all that a result may have."""
    units = [
        Unit("a", False, (0, 1), True),
        Unit("b", True, None),
        Unit("c", True, (2, 3)),
    ]
    rows = [[1.0, 0, 0], [1, 1, 0]]
    contrast = AttributionGraph.from_rows(
        rows, 1, "signed", kept=[1.0, 0.5], behind={1: [0, 1, 0]}
    )
    full = GraphAttributionResult(
        contrast,
        units,
        [0, 1],
        source_text="a",
        generated_text="b c",
        output_probs=[0.5, 0.25],
        breaks=[1],
        generated_breaks=[2],
        meta={"method": "by hand", "versions": {"captum_cage": __version__}},
        hops=3,
        thinking=Thinking({Part.THINK: ((0, 1),), Part.ANSWER: ((2, 3),)}, (2,)),
        foils=[Foil(1, "c", "d")],
    )
    text = "é 😀"
    traced = [
        Unit("é", False, (0, 1)),
        Unit(" ", True, (0, 1)),
        Unit("😀", False, (1, 2)),
    ]
    traced.append(Unit("\ud800", True, (2, 3)))
    mask = [not unit.generated for unit in traced]
    sparse = csr_array(np.array([[1.0, 0, 0, 0], [0, 2, 1, 0]]))
    trace = GraphAttributionResult(
        AttributionGraph.from_rows(sparse, mask),
        traced,
        [1],
        source_text=text,
        generated_text=" 😀\ud800",
    )
    draws = [
        AttributionGraph.from_rows([[1.0, 0, 0], [1, k, 0]], 1) for k in (0.5, 2.0)
    ]
    drawn = DrawnRows.of(draws)
    random_one = GraphAttributionResult(
        drawn.mean_graph(),
        units,
        [1],
        source_text="a",
        generated_text="b c",
        drawn=drawn,
    )
    return full, trace, random_one


@cache
def folder() -> Path:
    """Where files are written that are read again."""
    memory = Path("/dev/shm")
    kept = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    _FOLDERS.append(kept)
    return Path(kept.name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def load(rng: Source, content: bytes, name: str) -> None:
    """Read a file with this content; what is read is written and read again."""
    path = folder() / name
    path.write_bytes(content)
    limit = LIMIT if rng.random() < 0.95 else rng.choice((len(content), 100))
    result = GraphAttributionResult.load(path, limit=limit)
    if rng.random() < 0.1:
        again = folder() / f"again{rng.choice(('.npz', '.json', '.safetensors'))}"
        result.save(again)
        loaded = GraphAttributionResult.load(again, limit=None)
        if not torch.equal(loaded.seq_attr, result.seq_attr):
            raise AssertionError("A result changed when it was saved and loaded.")
        text = result.to_html()
        text.encode("utf-8")
        result.export(folder() / f"view{rng.choice(('.csv', '.dot'))}")


# --- targets: files of results -------------------------------------------------------


SHAPES = (
    *("({n},)", "({n}L,)", "({n}, 1)", "(1, {n})", "()", "(0,)", "(-1,)", "({n}.0,)"),
    *("(1152921504606846976,)", "(4294967296, 4294967296)", "(-2, -{n})", "[{n}]"),
    *("('a',)", "(True,)", "(" * 200 + ")" * 200, "-" * 5000 + "1", "9" * 5000, "{n}"),
)
DTYPES = (
    *("'<f8'", "'>f8'", "'<f4'", "'<f2'", "'<i8'", "'|i1'", "'<u8'", "'|b1'", "'<c16'"),
    *(
        "'|O'",
        "'<U5'",
        "'|S9'",
        "'|V8'",
        "'<M8[s]'",
        "'<f16'",
        "[('a', '<f8')]",
        "'O8'",
    ),
    *("('<f8', (3,))", "'<f8,<i4'", "None", "'(2,)<f8'", "''", "'\\x00'", "{{}}"),
)
NAMES = (
    "../../escape",
    "/etc/passwd",
    "",
    "header",
    "rows_data",
    "a" * 70_000,
    "é\x00",
    "C:\\x",
)


def npy(rng: Source, array: Any, alter: bool) -> bytes:
    """An array as a .npy file, whose header may say something else."""
    stream = io.BytesIO()
    if not alter:
        np.lib.format.write_array(stream, array, allow_pickle=False)
        return stream.getvalue()
    what = rng.randrange(5)
    values = np.array(array)
    if what == 0 and values.size:
        flat = values.reshape(-1)
        with np.errstate(all="ignore"):
            flat[rng.randrange(flat.size)] = rng.choice((0, 1, 2, 100))
    elif what == 1:
        values = np.resize(values, max(0, values.size + rng.choice((-1, 1, 5))))
    elif what == 2:
        kinds = (
            "f8",
            ">f8",
            "f4",
            "f2",
            "i8",
            "i4",
            "u1",
            "?",
            "c16",
            "U3",
            "S3",
            "M8[s]",
        )
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = values.astype(rng.choice(kinds))
    elif values.dtype.kind == "f" and values.size and what == 3:
        values.reshape(-1)[rng.randrange(values.size)] = rng.choice(
            (math.nan, math.inf, -math.inf, 1e308, -1.0, 5e-324)
        )
    else:
        shape = rng.choice(SHAPES).format(n=values.size)
        dtype = rng.choice((f"'{values.dtype.str}'", rng.choice(DTYPES)))
        order = rng.choice(("False", "True", "None", "1"))
        head = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}\n"
        version = rng.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
        data = head.encode("latin1")
        length = rng.choice((len(data), len(data), len(data), 65535, 0))
        size = struct.pack("<H" if version[0] == 1 else "<I", length)
        return b"\x93NUMPY" + version + size + data + values.tobytes()
    np.lib.format.write_array(stream, values, allow_pickle=False)
    return stream.getvalue()


def target_npz(rng: Source) -> None:
    """NumPy archives: entries, names, array headers, sizes, packing, the header."""
    result = rng.choice(results())
    header, arrays = header_of(result), arrays_of(result)
    if rng.random() < 0.5:
        header = spoilt(rng, copy.deepcopy(header))
    text = np.frombuffer(written(rng, header), dtype=np.uint8)
    entries = [("header", text), *arrays.items()]
    victim = rng.randrange(len(entries)) if rng.random() < 0.7 else -1
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    if rng.random() < 0.02:
        kind = rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", kind) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for place, (name, array) in enumerate(entries):
            data = npy(rng, array, place == victim)
            if place == victim and rng.random() < 0.1:
                continue
            if place == victim and rng.random() < 0.1:
                name = rng.choice(NAMES)
            if place == victim and rng.random() < 0.02:
                head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }"
                data = (
                    npy(rng, np.zeros(0), False)[:10] + head % 10**6 + bytes(8 * 10**6)
                )
                kind = zipfile.ZIP_DEFLATED
            if len(name) > 65_000 or "\x00" in name:
                name = name[:60_000]
            archive.writestr(f"{name}.npy", data, kind)
            if place == victim and rng.random() < 0.05:
                archive.writestr(f"{name}.npy", data, kind)
        if rng.random() < 0.01:
            for number in range(rng.choice((60, 200))):
                archive.writestr(f"{number}.npy", b"")
    content = stream.getvalue()
    if rng.random() < 0.3:
        content = directory_spoilt(rng, content)
    load(rng, noisy(rng, content, 0.1), "file.npz")


_FIELDS = (  # of an entry in a zip's directory: offset, bytes
    *((6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2)),
    *((32, 2), (34, 2), (36, 2), (38, 4), (42, 4)),
)


def directory_spoilt(rng: Source, content: bytes) -> bytes:
    """A zip whose directory says something else: sizes, places, flags, packing."""
    places = [match.start() for match in re.finditer(b"PK\x01\x02", content)]
    if not places:
        return content
    changed = bytearray(content)
    offset, size = rng.choice(_FIELDS)
    place = rng.choice(places) + offset
    most = 2 ** (8 * size) - 1
    old = int.from_bytes(changed[place : place + size], "little")
    new = rng.choice(
        (0, 1, 8, 12, 14, old + 1, old * 1000, most, most - 1, rng.randrange(256))
    )
    changed[place : place + size] = (new & most).to_bytes(size, "little")
    if rng.random() < 0.2:  # the end of the directory, too
        end = content.rfind(b"PK\x05\x06")
        place = end + rng.choice((4, 6, 8, 10, 12, 16, 20))
        changed[place : place + 2] = struct.pack("<H", rng.choice((0, 1, 65535)))
    return bytes(changed)


@cache
def archives() -> tuple[bytes, ...]:
    """Files of results, as they are saved."""
    found = []
    for result, suffix in itertools.product(results(), (".npz", ".safetensors")):
        path = folder() / f"seed{suffix}"
        result.save(path)
        found.append(path.read_bytes())
    return tuple(found)


def target_bytes(rng: Source) -> None:
    """Saved files of both binary forms, with bytes changed, lost or doubled."""
    content = rng.choice(archives())
    if rng.random() < 0.3:
        content = directory_spoilt(rng, content)
    load(rng, noisy(rng, content, 1.0), "file")


def target_safetensors(rng: Source) -> None:
    """Safetensors files: names, types, shapes, offsets, metadata, lengths."""
    result = rng.choice(results())
    header, arrays = header_of(result), arrays_of(result)
    if rng.random() < 0.3:
        header = spoilt(rng, copy.deepcopy(header))
    names = {"f": "F64", "i": "I64", "b": "BOOL", "u": "U8"}
    listed: dict[str, Any] = {
        "__metadata__": {"captum_cage": written(rng, header).decode("utf-8", "replace")}
    }
    data = b""
    for name, array in arrays.items():
        values = np.array(array, order="C")
        kind = names[values.dtype.kind] if values.dtype.itemsize != 4 else "I32"
        piece = values.tobytes()
        listed[name] = {
            "dtype": kind,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(piece)],
        }
        data += piece
    if rng.random() < 0.7:
        victim = rng.choice(list(listed))
        if victim != "__metadata__" and rng.random() < 0.6:
            kinds = (
                "F8_E4M3",
                "BF16",
                "F16",
                "F32",
                "F64",
                "I8",
                "U64",
                "BOOL",
                "X",
                "F4",
                "C64",
            )
            field = rng.choice(("dtype", "shape", "data_offsets"))
            listed[victim][field] = {
                "dtype": rng.choice(kinds),
                "shape": rng.choice(
                    ([2**60], [2**32, 2**32], [-1], [0], [], [1.5], [1] * 99)
                ),
                "data_offsets": [
                    rng.randrange(300),
                    rng.choice((0, 8, 2**40, len(data))),
                ],
            }[field]
        else:
            listed = spoilt(rng, listed)
    text = written(rng, listed)
    length = len(text)
    if rng.random() < 0.1:
        length = rng.choice((0, 1, length - 1, length + 1, 2**60, 2**64 - 1, 10**8))
    load(
        rng,
        noisy(rng, struct.pack("<Q", length) + text + data, 0.1),
        "file.safetensors",
    )


@cache
def listings() -> tuple[dict[str, Any], ...]:
    """Results as JSON."""
    return tuple(json.loads(json.dumps(result.to_dict())) for result in results())


def target_json(rng: Source) -> None:
    """Results as JSON: fields, types, nesting, numbers, encodings."""
    value: Any = copy.deepcopy(rng.choice(listings()))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
        value = spoilt(rng, value) if isinstance(value, dict | list) else value
    load(rng, written(rng, value), "file.json")


# --- targets: texts and questions ----------------------------------------------------


def some_units(rng: Source, text: str) -> list[Unit]:
    """Units of a text, apart from one another."""
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
    pairs = list(itertools.pairwise([0, *cuts]))
    return [
        Unit(
            text[a:b], True, None if rng.random() < 0.1 else (a, b), rng.random() < 0.1
        )
        for a, b in pairs
    ]


PATTERNS = (
    ".",
    "",
    "a*",
    "[0-9]*",
    r"\b",
    r"\w+",
    "(?s).*",
    r"\d+\.",
    "$",
    "(a|b)?",
    r"\s",
    "é",
)


def question(rng: Source, text: str) -> Any:
    """What somebody might ask to be explained."""
    kind = rng.randrange(8)
    if kind == 0:
        return odd(rng)
    if kind == 1:
        start = rng.randrange(len(text) + 1)
        return text[start : start + rng.randrange(9)]
    if kind == 2:
        return some_text(rng, 3)
    if kind == 3:
        return re.compile(rng.choice(PATTERNS))
    if kind == 4:
        return re.compile(rng.choice((b"a", b"", b".")))
    if kind == 5:
        ends = (None, 0, 1, -1, 5, 2**70, -(2**70), 1.5, True, "a", np.int64(2))
        return slice(*(rng.choice(ends) for _ in range(3)))
    if kind == 6:
        return tuple(odd(rng) for _ in range(rng.randrange(4)))
    return rng.choice((*Part, rng.randrange(-9, 9), np.int8(1), None))


def target_spans(rng: Source) -> None:
    """Questions by index, slice, text and pattern; and where a text stands."""
    text = some_text(rng)
    units = some_units(rng, text)
    asked = question(rng, text)
    thinking = None
    if rng.random() < 0.3:
        thinking = Thinking.found(
            text, [(0, len(text))], "", tokenizer(), rng.choice(MARKERS)
        )
    found = explained_units(asked, units, text, thinking)
    if list(found) != sorted({place for place in found if 0 <= place < len(units)}):
        raise AssertionError(f"{asked!r} means {found} of {len(units)} units.")
    if isinstance(asked, str | re.Pattern):
        start, stop = find_span(asked, text, units)
        if not 0 <= start < stop <= len(text):
            raise AssertionError(f"{asked!r} stands at {start} to {stop}.")


def granularity(rng: Source, text: str) -> Any:
    """What somebody might pass as units."""
    kind = rng.randrange(7)
    if kind == 0:
        return odd(rng)
    if kind == 1:
        return rng.choice(("token", "word", "sentence", "message"))
    if kind == 2:
        return {rng.choice(("source", "generated", "x")): granularity(rng, text)}
    if kind == 3:
        return lambda part: [(0, len(part) + rng.choice((0, 0, 1)))]
    ends = (
        0,
        1,
        2,
        3,
        5,
        len(text),
        len(text) + 1,
        -1,
        2**70,
        1.5,
        None,
        "a",
        True,
        np.int64(1),
    )
    if kind == 4:
        return [
            tuple(rng.choice(ends) for _ in range(2)) for _ in range(rng.randrange(4))
        ]
    cuts = sorted({rng.randrange(len(text) + 1) for _ in range(rng.randrange(6))})
    return list(itertools.pairwise(cuts))


def target_units(rng: Source) -> None:
    """Units by name, function and character range."""
    text = some_text(rng)
    asked = granularity(rng, text)
    sides = split_units(asked)
    ends = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(9)))
    tokens = TokenText(text, tuple(itertools.pairwise([0, *ends, len(text)])))
    if sides["both"] is not None:
        sides["source"], sides["generated"] = split_ranges(
            sides["both"], rng.randrange(len(text) + 1)
        )
    special = np.array([rng.random() < 0.1 for _ in tokens.offsets])
    attributed = np.array([rng.random() < 0.9 for _ in tokens.offsets])
    breaks = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(3))]
    for side in ("source", "generated"):
        found = group_tokens(
            tokens,
            sides[side],
            generated=side == "generated",
            attributed=attributed,
            special=special,
            breaks=breaks,
        )
        numbered = found.groups[found.groups >= 0]
        if sorted(set(numbered.tolist())) != list(range(len(found.units))):
            raise AssertionError("A unit has no token.")
        if ((found.groups >= 0) != attributed).any():
            raise AssertionError("A token that is attributed is lost, or another came.")


def target_text(rng: Source) -> None:
    """Words, sentences and messages of any text, and what a terminal is shown."""
    text = some_text(rng, 20)
    for spans in (word_spans(text), sentence_spans(text), message_spans(text)):
        ends = [end for span in spans for end in span]
        if ends != sorted(ends) or (ends and not 0 <= ends[0] <= ends[-1] <= len(text)):
            raise AssertionError(f"{spans} are no ranges of {text!r}.")
        if any(not text[start:stop].strip() for start, stop in spans):
            raise AssertionError(f"A range of {text!r} has nothing visible.")
    shown = harmless(text)
    shown.encode("utf-8")
    if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown):
        raise AssertionError(f"{shown!r} has a control character.")


@cache
def tokenizer(kind: str = "bpe") -> Any:
    """A small tokenizer."""
    return tiny_tokenizer(kind, vocab_size=None)


def target_think(rng: Source) -> None:
    """Markers and ranges of thoughts."""
    text = some_text(rng, 14)
    ends = sorted({rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 5))})
    turns = list(itertools.pairwise([*ends, len(text)])) or [(0, len(text))]
    think = rng.choice(
        (
            "auto",
            rng.choice(MARKERS),
            (some_text(rng, 3), some_text(rng, 3)),
            (rng.randrange(-2, 9), rng.randrange(12)),
            [(rng.randrange(9), rng.randrange(12)) for _ in range(rng.randrange(3))],
            odd(rng),
            None,
        )
    )
    found = Thinking.found(text, turns, some_text(rng, 3), tokenizer(), think)
    for start, stop in itertools.chain(*found.spans.values()):
        if not 0 <= start < stop <= len(text):
            raise AssertionError(f"A part stands at {start} to {stop} of {len(text)}.")


def target_tokens(rng: Source) -> None:
    """Ids in any order, read token by token; targets as texts and as ids."""
    known = tokenizer(rng.choice(("bpe", "byte", "char", "sentencepiece", "wordpiece")))
    ids = [rng.randrange(len(known)) for _ in range(rng.randrange(12))]
    found = read_tokens(ids, known)
    ends = [end for span in found.offsets for end in span]
    if len(found) != len(ids) or any(not 0 <= end <= len(found.text) for end in ends):
        raise AssertionError(f"{ids} are read as {found}.")
    listed: Any = rng.choice(
        (ids, torch.tensor(ids), some_text(rng), odd(rng), [odd(rng)])
    )
    target_ids(listed, known)
    TokenIdsInput(listed, known, rng.choice((None, [odd(rng)] * len(ids))))


# --- targets: conversations ----------------------------------------------------------


ROLES = ("user", "assistant", "system", "tool", "", "\ud800", None, 3)
TEMPLATE_PIECES = (
    *(
        "{{ bos_token }}",
        "{% for m in messages %}",
        "{{ m['content'] }}",
        "{% endfor %}",
    ),
    *(
        "{% if add_generation_prompt %}",
        "{% endif %}",
        "{{ messages[0].content | trim }}",
    ),
    *(
        "{{ m.role }}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ nothing.here }}",
    ),
    *(
        "{{",
        "}}",
        "{%",
        "%}",
        "{{ ().__class__ }}",
        "{% include 'x' %}",
        "text",
        "{{ m }}",
    ),
    *("{{ range(3) | list }}", "{{ messages | tojson }}", "{{ 'a' * 9 }}", "<|end|>\n"),
)


def some_messages(rng: Source) -> Any:
    """Messages of a chat, mostly of the right form."""
    listed: list[Any] = []
    for _ in range(rng.randrange(4)):
        content: Any = some_text(rng, 4)
        if rng.random() < 0.1:
            content = [{"type": "text", "text": some_text(rng, 3)}, odd(rng)]
        message: Any = {"role": rng.choice(ROLES[:4]), "content": content}
        if rng.random() < 0.1:
            message["token_ids"] = rng.choice(
                ([1, 2], tokenizer().encode("a"), odd(rng))
            )
        if rng.random() < 0.05:
            message[rng.choice(("tool_calls", "reasoning"))] = odd(rng)
        listed.append(message)
    if rng.random() < 0.2:
        return spoilt(rng, listed)
    return listed


def target_chat(rng: Source) -> None:
    """Chats and traces as messages, through templates of any text."""
    messages = some_messages(rng)
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        pieces = [rng.choice(TEMPLATE_PIECES) for _ in range(rng.randrange(6))]
        options["chat_template"] = "".join(pieces)
    if rng.random() < 0.2:
        options["features"] = rng.choice(("all", "user", "tool", ["user"], odd(rng)))
    if rng.random() < 0.1:
        options["baselines"] = odd(rng)
    if rng.random() < 0.5:
        ChatTokenInput(messages, tokenizer(), **options)
    else:
        if rng.random() < 0.2:
            options["generated"] = rng.choice(("assistant", "user", odd(rng)))
        ChatTraceInput(messages, tokenizer(), **options)


def target_trace(rng: Source) -> None:
    """Traces as ids with masks."""
    ids = [rng.randrange(len(tokenizer())) for _ in range(rng.randrange(9))]
    generated: Any = [rng.random() < 0.5 for _ in ids]
    mask: Any = None if rng.random() < 0.5 else [rng.random() < 0.8 for _ in ids]
    if rng.random() < 0.2:
        generated = rng.choice((np.array(generated), torch.tensor(generated), odd(rng)))
    if rng.random() < 0.1:
        mask = odd(rng)
    breaks = [rng.choice((0, 1, 3, -1, 99)) for _ in range(rng.randrange(3))]
    baselines = 0 if rng.random() < 0.8 else odd(rng)
    TraceIdsInput(ids, tokenizer(), generated, mask, breaks, baselines)


# --- targets: records of data sets, the command line ---------------------------------


RECORDS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "How many?", "answer": "3 + 4 = 7\n#### 7"}],
    "multiarith": [{"question": "How many?", "final_ans": "7"}],
    "hotpotqa": [
        {
            "question": "Who?",
            "answer": "Ana",
            "context": [["Title", ["One.", " Two."]], ["Other", [""]]],
            "supporting_facts": [["Title", 1]],
        },
        {
            "question": "Who?",
            "answer": "Ana",
            "context": {"title": ["T"], "sentences": [["One."]]},
            "supporting_facts": {"title": ["T"], "sent_id": [0]},
        },
    ],
    "morehopqa": [{"question": "Who?", "answer": "Ana", "context": [["T", ["One."]]]}],
    "ruler": [{"input": "First.\nThe number is 7. So.\nWhat?", "outputs": ["7"]}],
}


def target_datasets(rng: Source) -> None:
    """Records of public data sets, as JSON and JSON lines."""
    name = rng.choice(list(RECORDS))
    records: list[Any] = [
        copy.deepcopy(rng.choice(RECORDS[name])) for _ in range(rng.randrange(3))
    ]
    for record in records:
        for key in record:
            if rng.random() < 0.2 and isinstance(record[key], str):
                record[key] = some_text(rng)
    records = [
        spoilt(rng, record) if rng.random() < 0.7 else record for record in records
    ]
    path = folder() / rng.choice(("records.json", "records.jsonl"))
    if path.suffix == ".json":
        path.write_bytes(written(rng, records))
    else:
        path.write_bytes(
            rng.choice((b"\n", b"\r\n", b"\r")).join(
                written(rng, record) for record in records
            )
        )
    for example in LOADERS[name](path):
        for start, stop in (*example.gold, *(example.sources or ())):
            if not 0 <= start <= stop <= len(example.prompt):
                raise AssertionError("A range stands outside its prompt.")


_RUNNER = CliRunner()


@cache
def saved() -> Path:
    """A result as a file."""
    path = folder() / "shown.npz"
    results()[0].save(path)
    return path


def target_cli(rng: Source) -> None:
    """The command line: questions about a saved result, and files of messages."""
    text = some_text(rng, 3).replace("\x00", "")
    asked = rng.choice(
        (text, f"/{text}/", "b c", "/(/", "1", "-1", "9" * 30, "0:", ":", "5:2")
    )
    if rng.random() < 0.8:
        part = rng.choice(([], [], ["--part", rng.choice(("answer", "think", "x"))]))
        given = [
            "show",
            str(saved()),
            f"--explain={asked}",
            *part,
            "--json",
            os.devnull,
        ]
        if rng.random() < 0.2:
            given += rng.choice((["--top", "0"], ["--paths", asked], ["--width", "9"]))
    else:
        path = folder() / "messages.json"
        path.write_bytes(written(rng, some_messages(rng)))
        given = [
            "explain",
            "--messages",
            str(path),
            f"--foil={asked}",
            "--model",
            "/nowhere",
        ]
    found = _RUNNER.invoke(app, given)
    error = found.exception
    if error is not None and not isinstance(error, (SystemExit, *DOCUMENTED)):
        raise error
    if found.exit_code not in (0, 1, 2):
        raise AssertionError(f"The exit status is {found.exit_code}.")


# --- targets: what explaining many texts reads again ---------------------------------


def module(name: str) -> Any:
    """A module of the package, which an older one lacks."""
    return importlib.import_module(f"captum_cage.{name}")


EXAMPLES: tuple[dict[str, Any], ...] = (
    {"prompt": "Ana has 3 pens.", "target": " So 3.", "explain": "3", "id": "a"},
    {"prompt": "a", "explain": {"regex": r"\d+"}, "units": "sentence", "level": 3},
    {"prompt": "a", "target": [1, 2], "explain": [0, 1], "units": [[0, 1], [1, 2]]},
    {"messages": [{"role": "user", "content": "a"}], "explain": {"part": "answer"}},
    {"prompt": "a", "foil": {"3": "4"}, "gen_args": {"max_new_tokens": 3}, "id": 7},
)


def target_examples(rng: Source) -> None:
    """Lines of a file of examples, and the hash of each."""
    value: Any = copy.deepcopy(rng.choice(EXAMPLES))
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        value = spoilt(rng, value) if isinstance(value, dict | list) else value
    if rng.random() < 0.2 and isinstance(value, dict):
        value[rng.choice(("prompt", "target", "explain"))] = some_text(rng)
    example = module("batch.examples").read_example(written(rng, value))
    if not re.fullmatch("[0-9a-f]{32}", example.key):
        raise AssertionError(f"{example.key!r} is no key.")
    json.dumps(example.scalars, allow_nan=False).encode("ascii")


MANIFEST: dict[str, Any] = {
    "format": "captum_cage.batch",
    "version": 1,
    "versions": {"captum_cage": __version__},
    "settings": {"units": "token", "seed": 0},
    "inputs": {},
}
FAILURE: dict[str, Any] = {
    "key": "0" * 32,
    "type": "ValueError",
    "message": "no",
    "position": 0,
    "line": None,
    "id": "a",
    "traceback": "",
}


def target_manifest(rng: Source) -> None:
    """Manifests and errors of a directory of results."""
    directory = module("batch.directory")
    if rng.random() < 0.3:
        directory.read_failure(written(rng, spoilt(rng, dict(FAILURE))))
        return
    value = copy.deepcopy(MANIFEST)
    value["format"], value["version"] = directory._FORMAT, directory.FORMAT_VERSION
    for number in range(rng.randrange(3)):
        place = {"position": number, "line": 1, "id": "a", "meta": {"level": 3}}
        known = {"status": rng.choice(list(directory._STATUS)), "places": [place]}
        value["inputs"][f"{number:032x}"] = known
    if rng.random() < 0.8:
        value = spoilt(rng, value)
    manifest = directory.read_manifest(written(rng, value))
    again = directory.read_manifest(manifest.to_bytes())
    if again != manifest:
        raise AssertionError("A manifest changed when it was written and read.")


def target_spool(rng: Source) -> None:
    """Files of finished rows: heads, checksums, entries, and what they belong to."""
    spool = module("spool")
    sources, steps = 3, 4
    data = b""
    for step in range(rng.randrange(steps + 1)):
        count = sources + step
        units = np.array(sorted(rng.sample(range(count), rng.randrange(count + 1))))
        values = np.array([rng.choice((0.0, 1.0, -1.0, 1e300)) for _ in units])
        row: Any = (values, units.astype(np.int64), rng.choice((1.0, 0.5)))
        if rng.random() < 0.3:
            row = (np.ones(count), None, 1.0)
        if rng.random() < 0.1:
            bad = (math.nan, math.inf)
            row = (np.full(count, rng.choice(bad)), None, rng.choice((0.0, 2.0, 1.0)))
        piece = spool._packed(rng.choice((0, 1)), rng.choice((step, step, 99)), row)
        data += noisy(rng, piece, 0.1)
    if rng.random() < 0.2:
        # With sums that fit, so that what they guard is looked at.
        head = struct.pack(
            "<4sHHqdQI",
            b"CCR1",
            rng.randrange(4),
            rng.randrange(5),
            rng.choice((-1, 0, 3, 2**62)),
            rng.choice((1.0, math.nan, -1.0)),
            rng.choice((0, 1, 7, 2**32, 2**63)),
            rng.choice((0, zlib.crc32(b""))),
        )
        data += head + struct.pack("<I", zlib.crc32(head)) + bytes(rng.randrange(99))
    for record in spool.rows_in(noisy(rng, data, 0.3), sources + steps, steps):
        if not 0 <= record.step < steps:
            raise AssertionError(f"{record} is of no step.")
    header = {
        "format": "captum_cage.spool",
        "version": spool.SPOOL_VERSION,
        "belongs": {"model": "a"},
        "explanation": {"units": [{"generated": False}, {"generated": True}]},
        "prompt_units": 1,
        "normalization": "positive",
    }
    spool.header_in(written(rng, spoilt(rng, header)))


LATER = {"examples": "batch", "manifest": "batch", "spool": "spool"}
TARGETS: dict[str, Target] = {
    name.removeprefix("target_"): function
    for name, function in list(globals().items())
    if name.startswith("target_")
    and name != "target_ids"
    and find_spec(f"captum_cage.{LATER.get(name.removeprefix('target_'), 'text')}")
}


# --- running -------------------------------------------------------------------------


class Tally:
    """What came of the inputs of a target."""

    def __init__(self, name: str) -> None:
        self.name, self.begin = name, time.perf_counter()
        self.inputs = 0
        self.taken = 0
        self.slowest = 0.0
        self.crashes: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def run(self, rng: Source, label: str) -> None:
        """One input."""
        self.inputs += 1
        begin = time.perf_counter()
        try:
            TARGETS[self.name](rng)
            self.taken += 1
        except DOCUMENTED:
            pass
        # Whatever else comes is what this program looks for.
        except Exception as error:  # noqa: BLE001
            self.note(error, label)
        seconds = time.perf_counter() - begin
        self.slowest = max(self.slowest, seconds)
        if seconds > SLOW:
            self.note(TimeoutError(f"{seconds:.1f} s"), label)

    def note(self, error: Exception, label: str) -> None:
        """Keep where an error came from, and the first input that made it."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "captum_cage/" in frame.filename] or frames
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
        key = f"{type(error).__name__} at {where}: {str(error)[:80]!r}"
        if len(self.first) > 50:
            key = "more"
        self.crashes[key] += 1
        self.first.setdefault(key, label)

    def line(self) -> str:
        """The row of the table."""
        seconds = time.perf_counter() - self.begin
        return (
            f"| {self.name} | {self.inputs:,} | {self.inputs / seconds:,.0f} | "
            f"{self.taken / max(self.inputs, 1):.0%} | {self.slowest:.2f} | "
            f"{sum(self.crashes.values())} |"
        )


def at_random(name: str, runs: int, seconds: float, seed: int) -> Tally:
    """Inputs from numbers one after another."""
    tally = Tally(name)
    for number in range(seed, seed + runs):
        tally.run(random.Random(number), str(number))
        if time.perf_counter() - tally.begin > seconds:
            break
    return tally


def by_coverage(name: str, runs: int, seconds: float) -> Tally:
    """Inputs that atheris chooses, in this process, which it ends."""
    atheris: Any = importlib.import_module("atheris")  # optional, and without types

    tally = Tally(name)
    for module in [m for n, m in sys.modules.items() if n.startswith("captum_cage.")]:
        for value in vars(module).values():
            members = vars(value).values() if isinstance(value, type) else [value]
            for function in members:
                if isinstance(function, FunctionType) and function.__module__ == (
                    module.__name__
                ):
                    atheris.instrument_func(function)

    def report() -> None:
        print(tally.line(), flush=True)
        tell(tally)

    def one(data: bytes) -> None:
        tally.run(OfBytes(data), data.hex()[:2000])
        if tally.inputs >= runs or time.perf_counter() - tally.begin > seconds:
            report()
            for kept in _FOLDERS:
                kept.cleanup()
            os._exit(bool(tally.crashes))

    atheris.Setup(
        [sys.argv[0], "-max_len=2000", "-verbosity=0", "-close_fd_mask=0"], one
    )
    atheris.Fuzz()
    return tally


def tell(tally: Tally) -> None:
    """Say what came out that is not documented."""
    for key, count in tally.crashes.most_common():
        print(f"    {count} x {key} (--replay {tally.name} {tally.first[key]})")


def prepare() -> None:
    """Make what the targets share; what is right must be read as it is."""
    archives()
    saved()
    for kind in ("bpe", "byte", "char", "sentencepiece", "wordpiece"):
        tokenizer(kind)
    for content in (*archives(), *(json.dumps(one).encode() for one in listings())):
        (folder() / "seed").write_bytes(content)
        GraphAttributionResult.load(folder() / "seed", limit=LIMIT)


def main() -> int:
    """Run the targets, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS)
    )
    parser.add_argument("--runs", type=int, default=None, help="inputs of each target")
    parser.add_argument("--minutes", type=float, default=None, help="for each target")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input")
    parser.add_argument("--engine", choices=("random", "atheris"), default="random")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "NUMBER"))
    parser.add_argument("--smoke", action="store_true", help="a few inputs, for CI")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # of texts that are no sentences, and the like
    sys.set_int_max_str_digits(4300)
    if given.replay:
        prepare()
        name, number = given.replay
        hexed = not number.isdigit() or len(number) > 18
        TARGETS[name](
            OfBytes(bytes.fromhex(number)) if hexed else random.Random(int(number))
        )
        return 0
    prepare()
    runs = given.runs
    if given.smoke:
        runs = 8
    elif runs is None and given.minutes is None:
        runs = 2000
    runs = 10**12 if runs is None else runs
    seconds = math.inf if given.minutes is None else 60 * given.minutes
    if given.engine == "atheris" and find_spec("atheris") is None:
        raise SystemExit("--engine atheris: needs atheris. Run: pip install atheris")
    if given.engine == "atheris" and len(given.targets) == 1:
        by_coverage(given.targets[0], runs, seconds)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, NumPy {np.__version__}; "
        f"engine {given.engine}, first input {given.seed}"
    )
    print("| target | inputs | a second | taken | slowest, s | crashes |")
    print("|---|---|---|---|---|---|", flush=True)
    total = crashes = 0
    for name in given.targets:
        if given.engine == "atheris":
            # libFuzzer ends its process, so each target has one.
            again = [sys.executable, __file__, "--engine", "atheris", "--targets", name]
            again += ["--runs", str(runs)]
            again += [] if given.minutes is None else ["--minutes", str(given.minutes)]
            found = subprocess.run(
                again, check=False, stdout=subprocess.PIPE, text=True
            )
            print(found.stdout, end="", flush=True)
            crashes += found.returncode != 0
            continue
        tally = at_random(name, runs, seconds, given.seed)
        print(tally.line(), flush=True)
        tell(tally)
        total, crashes = total + tally.inputs, crashes + sum(tally.crashes.values())
    if given.engine == "random":
        print(f"{total:,} inputs, {crashes} crashes", flush=True)
    return int(crashes > 0)


if __name__ == "__main__":
    sys.exit(main())
