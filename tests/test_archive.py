"""Files of arrays: what is written is read, and what is no such file is refused."""

import io
import json
import os
import pickle
import struct
import threading
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from captum_cage.archive import read, replacing, write

HEADER = {"a": [1, None, 0.1], "text": "\ud800\x00 é 😀"}
ARRAYS = {
    "flags": np.array([True, False]),
    "one": np.array(True),
    "none": np.zeros((0, 3)),
    "numbers": np.array([[0.1, -0.0], [1e-320, 2.0]]),
    "turned": np.arange(6).reshape(2, 3).T,
    "places": np.array([2**40], dtype=np.int64),
    "single": np.array([0.1], dtype=np.float32),
}


@pytest.mark.parametrize("name", ["file", "file.npz", "file.json.gz", "x.safetensors"])
def test_arrays_and_header_come_back(name, tmp_path):
    """With their types and shapes, whatever the file is called afterwards."""
    path = tmp_path / name
    write(path, HEADER, ARRAYS)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    path = path.rename(tmp_path / "renamed")
    header, arrays = read(path)
    assert header == HEADER
    assert arrays.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert arrays[key].dtype == array.dtype
        assert arrays[key].shape == array.shape
        assert arrays[key].tobytes() == array.tobytes()


@pytest.mark.parametrize("name", ["file.npz", "x.safetensors"])
def test_a_file_may_be_read_by_whoever_may_read_others(name, tmp_path):
    """Its mode is that of any new file."""
    other, path = tmp_path / "other", tmp_path / name
    other.touch()
    write(path, HEADER, ARRAYS)
    assert path.stat().st_mode == other.stat().st_mode


def test_json_has_no_arrays(tmp_path):
    """It says all by itself."""
    path = tmp_path / "file"
    path.write_text("\n " + json.dumps(HEADER))
    assert read(path) == (HEADER, None)


def header_of(length, text):
    """The begin of a safetensors file."""
    return struct.pack("<Q", length) + text


HOSTILE = {
    "empty": b"",
    "text": b"hello",
    "pickle": pickle.dumps({"a": 1}),
    "array": b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'}",
    "zip": b"PK\x03\x04 nonsense",
    "long header": header_of(2**60, b'{"a":1}'),
    "no end": header_of(100, b'{"a":'),
    "more than there is": header_of(
        70, b'{"x":{"dtype":"F64","shape":[9999999999],"data_offsets":[0,8]}}   '
    ),
    "deep": b"[" * 100_000,
    "NaN": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "two values": b"{} {}",
    "other bytes": b"\xff\xfe{\x00}\x00\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_files_are_refused(name, tmp_path):
    """By one error, at once."""
    path = tmp_path / "file"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"file: must be a result saved by.*damaged"):
        read(path)


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"PK\x03\x04", b"{", header_of(20, b"{")]),
)
def test_no_bytes_do_harm(tmp_path_factory, content, begin):
    """They are JSON or refused."""
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(begin + content)
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        with pytest.raises(ValueError, match="must be a result saved by"):
            read(path)
    else:
        assert read(path)[1] is None


@pytest.mark.parametrize("cut", [10, 100, -1])
@pytest.mark.parametrize("name", ["file.npz", "file.safetensors"])
def test_a_damaged_file_is_refused(name, cut, tmp_path):
    """One that was not wholly copied."""
    path = tmp_path / name
    write(path, HEADER, ARRAYS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="must be a result saved by"):
        read(path)


def test_tensors_of_others_are_no_result(tmp_path):
    """A model's weights have no header of ours."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="must be a result saved by"):
        read(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="must be a result saved by"):
        read(path)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    """As it is everywhere in Python."""
    with pytest.raises(FileNotFoundError, match="none"):
        read(tmp_path / "none")


def test_a_link_stays_one(tmp_path):
    """The file that it leads to changes."""
    file, link = tmp_path / "file", tmp_path / "link.npz"
    file.write_bytes(b"old")
    link.symlink_to(file)
    write(link, HEADER, ARRAYS)
    assert link.is_symlink()
    assert read(file)[0] == HEADER


def test_a_private_file_stays_one(tmp_path):
    """As it was made so."""
    path = tmp_path / "file.npz"
    path.touch(mode=0o600)
    write(path, HEADER, ARRAYS)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_pipe_is_written_to(tmp_path):
    """And stays a pipe."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found = []
    reader = threading.Thread(target=lambda: found.append(path.read_text()))
    reader.start()
    with replacing(path) as partial:
        partial.write_text("new")
    reader.join()
    assert found == ["new"]
    assert path.is_fifo()


def test_other_files_are_left_alone(tmp_path):
    """Whatever they are called."""
    other = tmp_path / "file.npz.partial"
    other.write_text("mine")
    write(tmp_path / "file.npz", HEADER, ARRAYS)
    assert other.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("path", "error", "told"),
    [
        (None, TypeError, "None came"),
        (3, TypeError, "3 came"),
        (".", IsADirectoryError, "it is a folder"),
        ("nowhere/file.npz", FileNotFoundError, "its folder does not exist"),
    ],
)
def test_places_that_cannot_be_written_are_told(path, error, told):
    """By what the user passed, with a remedy."""
    match = f"path: must name a file that can be written, but .*{told}. Name another"
    with pytest.raises(error, match=match):
        write(path, HEADER, ARRAYS)


def test_a_path_to_read_is_checked():
    """As one to write."""
    with pytest.raises(TypeError, match="path: must name a file, but NoneType None"):
        read(None)


def test_an_interrupt_leaves_the_old_file(tmp_path):
    """And nothing beside it."""
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# --- files that say that they are larger than they are -------------------------------


def npy_header(shape, descr="<f8"):
    """The begin of a .npy file that promises an array."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def archive_of(entries, packing=zipfile.ZIP_DEFLATED):
    """A zip of entries by name, the header first."""
    stream = io.BytesIO()
    head = np.frombuffer(b"{}", dtype=np.uint8)
    with (
        zipfile.ZipFile(stream, "w", packing) as archive,
        archive.open("header.npy", "w") as file,
    ):
        np.lib.format.write_array(file, head)
    with (
        warnings.catch_warnings(),
        zipfile.ZipFile(stream, "a", packing) as archive,
    ):
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in entries:
            archive.writestr(name, content)
    return stream.getvalue()


def with_field(content, place, value):
    """A zip whose last entry says something else in the directory."""
    start = content.rfind(b"PK\x01\x02") + place
    size = len(value)
    return content[:start] + value + content[start + size :]


HUGE = struct.pack("<I", 2**31 - 2)
ONE = npy_header("(1,)") + bytes(8)
BOMBS = {
    "an array of 2**60 numbers": archive_of([("x.npy", npy_header("(2**60,)"))]),
    "an array of 2**60 numbers, written out": archive_of(
        [("x.npy", npy_header(f"({2**60},)"))]
    ),
    "an array of 2**45 numbers": archive_of([("x.npy", npy_header(f"({2**45},)"))]),
    "two sides of 2**32": archive_of([("x.npy", npy_header(f"({2**32}, {2**32})"))]),
    "sides below zero": archive_of([("x.npy", npy_header("(-1, -1)") + bytes(8))]),
    "objects": archive_of([("x.npy", npy_header("(1,)", "|O") + pickle.dumps(1))]),
    "texts": archive_of([("x.npy", npy_header("(1,)", "<U2") + bytes(8))]),
    "an entry that says more than it can hold": with_field(
        archive_of([("x.npy", ONE)]), 24, HUGE
    ),
    "entries over one another": with_field(
        with_field(archive_of([("x.npy", ONE)]), 24, HUGE), 20, HUGE
    ),
    "another packing": archive_of([("x.npy", ONE)], zipfile.ZIP_BZIP2),
    "an unknown packing": with_field(archive_of([("x.npy", ONE)]), 10, b"\x63\x00"),
    "a password": with_field(archive_of([("x.npy", ONE)]), 8, b"\x01\x00"),
    "a name twice": archive_of([("x.npy", ONE), ("x.npy", ONE)]),
    "very many entries": archive_of([(f"{n}.npy", ONE) for n in range(100)]),
    "a header of brackets": archive_of([("x.npy", npy_header("(" * 9000))]),
    "a place before the begin": with_field(
        archive_of([("x.npy", ONE)]), 42, b"\xff\xff\xff\xff"
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_archive_that_promises_what_it_has_not_is_refused(name, tmp_path):
    """Before memory is taken for it: its sizes are looked at first."""
    path = tmp_path / "file"
    path.write_bytes(BOMBS[name])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"file: must be a result saved by"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["file.npz", "file.safetensors", "file.json"])
def test_a_file_larger_than_the_limit_is_refused(name, tmp_path):
    """By what it would take unpacked, and the error says how to allow it."""
    path, numbers = tmp_path / name, np.zeros(10**6)
    if name == "file.json":
        path.write_text(json.dumps({"a": "x" * 10**6}))
    else:
        write(path, HEADER, {"numbers": numbers})
    if name == "file.npz":
        assert path.stat().st_size < 20_000
    with pytest.raises(
        ValueError,
        match=r"file.* must take at most 999,999 bytes .* it says that it takes \d"
        r".*pass limit= with more bytes to GraphAttributionResult.load, or None",
    ):
        read(path, limit=999_999)
    for enough in (9 * 10**6, None):
        header, arrays = read(path, limit=enough)
        assert header == (HEADER if arrays else {"a": "x" * 10**6})


def test_a_bomb_is_refused_before_memory_is_taken(tmp_path):
    """A hundred kilobytes that would be more than the limit of 2 GiB."""
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("header.npy", "w", force_zip64=True) as file,
    ):
        file.write(npy_header(f"({3 * 2**23},)", "|u1"))
        zeros = bytes(2**20)
        for _ in range(24):
            file.write(zeros)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="at most 16,777,216 bytes of memory"):
            read(path, limit=2**24)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["../../out", "/out", "a/b", "C:\\out", "header/../x"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_names_in_a_file_are_no_places(name, suffix, tmp_path):
    """Whatever they are: nothing is written or read there."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    path = inside / f"file{suffix}"
    if suffix == ".npz":
        path.write_bytes(archive_of([(f"{name}.npy", ONE)]))
    else:
        write(path, {}, {name: np.zeros(1)})
    before = sorted(tmp_path.rglob("*"))
    assert read(path)[1].keys() == {name}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("limit", "error"), [(1.5, TypeError), (-1, ValueError)])
def test_a_limit_is_a_number_of_bytes(limit, error, tmp_path):
    """Or None."""
    with pytest.raises(
        error, match=r"limit: must be .*Pass a number of bytes, or None"
    ):
        read(tmp_path / "file", limit=limit)
