"""What files of results hold, and which are refused."""

import contextlib
import json
import tracemalloc

import numpy as np
import pytest
from scipy.sparse import csr_array, issparse

from captum_cage import AttributionGraph, GraphAttributionResult, Unit
from captum_cage.archive import read, write
from captum_cage.foils import Foil
from captum_cage.record import FORMAT_VERSION, arrays_of, header_of, read_parts
from captum_cage.thinking import Part, Thinking

SUFFIXES = (".json", ".npz", ".safetensors")


def made(rows=((1, 0, 0), (1, 1, 0)), **more):
    """A source and two generated units, with all that a result may have."""
    units = [Unit("a", False, (0, 1), True), Unit("b", True, None)]
    units.append(Unit("c", True, (2, 3)))
    graph = AttributionGraph.from_rows(
        rows if issparse(rows) else list(rows),
        1,
        "signed",
        kept=[1.0, 0.5],
        behind={1: [0, 1, 0]},
    )
    return GraphAttributionResult(
        graph,
        units,
        [0, 1],
        source_text="a",
        generated_text="b c",
        output_probs=[0.5, 0.25],
        breaks=[1],
        generated_breaks=[2],
        meta={"method": "by hand", "versions": {"torch": "2"}},
        hops=3,
        thinking=Thinking({Part.THINK: ((0, 1),), Part.ANSWER: ((2, 3),)}, (2,)),
        foils=[Foil(1, "c", "d")],
        **more,
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("sparse", [False, True])
def test_what_is_saved_is_what_a_result_is_made_of(suffix, sparse, tmp_path):
    """Its arguments come back, of their types."""
    dense = [[1.0, 0, 0], [1, 1, 0]]
    result = made(csr_array(dense) if sparse else dense)
    result.save(tmp_path / f"file{suffix}")
    parts = read_parts(tmp_path / f"file{suffix}")
    graph = parts.pop("graph")
    assert issparse(graph.rows) is sparse
    for name in ("matrix", "normalized", "kept", "leak"):
        one, other = (getattr(each, name) for each in (graph, result.graph))
        one, other = (each() if callable(each) else each for each in (one, other))
        one, other = (e.toarray() if issparse(e) else e for e in (one, other))
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(parts.pop("output_probs"), [0.5, 0.25])
    assert parts == {
        "units": list(result.units),
        "explained": [0, 1],
        "source_text": "a",
        "generated_text": "b c",
        "breaks": [1],
        "generated_breaks": [2],
        "meta": result.meta,
        "hops": 3,
        "thinking": result.thinking,
        "foils": [Foil(1, "c", "d")],
        "drawn": None,
    }


SPOILT = {
    "no unit": {"explained": [2]},
    "a fraction": {"explained": [0.5]},
    "nothing explained": {"explained": []},
    "twice": {"explained": [1, 1]},
    "beyond the text": {"generated_text": "b"},
    "other kinds": {"units": header_of(made())["units"][::-1]},
    "fewer units": {"units": header_of(made())["units"][:2]},
    "a foil of no unit": {"foils": [[2, "c", "d"]]},
    "half a foil": {"foils": [[1, "c"]]},
    "a range of one": {"thinking": {"think": [[1]]}},
    "no hops": {"hops": -1},
    "another normalisation": {"normalization": "none"},
    "no texts": {"source_text": None, "units": None},
    **{
        name: {name: [99, "x"]} for name in ("units", "normalization", "breaks", "hops")
    },
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", SPOILT)
def test_parts_that_do_not_fit_are_refused(name, suffix, tmp_path):
    """By one error, before anything is drawn of them."""
    result, path = made(), tmp_path / f"file{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps({**result.to_dict(), **SPOILT[name]}))
    else:
        write(path, {**header_of(result), **SPOILT[name]}, arrays_of(result))
    with pytest.raises(ValueError, match=r"file.*: must be a result saved by"):
        GraphAttributionResult.load(path)


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    """Whichever of them it is."""
    arrays = arrays_of(made())
    for name in arrays.keys() - {"output_probs"}:
        write(tmp_path / "file", header_of(made()), {**arrays, name: np.zeros(9)})
        if name == "rows_sparse":
            continue
        with pytest.raises(ValueError, match="must be a result saved by"):
            GraphAttributionResult.load(tmp_path / "file")


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "1", None, True, 1.0, []])
def test_other_versions_are_told(version, tmp_path):
    """With what to do."""
    header = {**header_of(made()), "version": version}
    write(tmp_path / "file", header, arrays_of(made()))
    assert read(tmp_path / "file")[0] == header
    with pytest.raises(ValueError, match=r"of format version 1 or 2 or 3, but version"):
        read_parts(tmp_path / "file")


def test_a_newer_version_names_who_wrote_it_and_says_to_upgrade(tmp_path):
    """The package that read it is too old."""
    header = {**header_of(made()), "version": FORMAT_VERSION + 1}
    header["meta"] = {"versions": {"captum_cage": "9.1"}}
    write(tmp_path / "file", header, arrays_of(made()))
    told = (
        rf"version {FORMAT_VERSION + 1} came, saved by captum_cage 9\.1\. It is newer "
        r"than this captum_cage, .* Run: pip install --upgrade captum-cage"
    )
    with pytest.raises(ValueError, match=told):
        read_parts(tmp_path / "file")


def test_dense_rows_count_as_what_they_will_take(tmp_path):
    """They are saved by their entries: few of them may be very large rows."""
    count, path = 3000, tmp_path / "file.npz"
    sources = np.arange(count) < 1
    sparse = csr_array((count - 1, count))
    arrays = arrays_of(made()) | {"sources": sources, "kept": np.ones(count - 1)}
    arrays |= {"rows_sparse": np.array(False), "rows_shape": np.array(sparse.shape)}
    for part in ("data", "indices", "indptr"):
        arrays[f"rows_{part}"] = getattr(sparse, part)
    write(path, header_of(made()), arrays)
    assert path.stat().st_size < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"takes 71,976,000\. If you trust it"):
            GraphAttributionResult.load(path, limit=2**26)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "ends", [[0, 10**6, 0], [0, 2, 1], [0, -1, 2], [0, 1, 99], [1, 1, 2], [0.0, 1, 2]]
)
def test_ends_of_rows_that_scipy_would_follow_out_of_memory_are_refused(ends, tmp_path):
    """It checks them only if the last one is not 0."""
    arrays = arrays_of(made()) | {"rows_indptr": np.array(ends)}
    write(tmp_path / "file", header_of(made()), arrays)
    with pytest.raises(ValueError, match="must be a result saved by"):
        GraphAttributionResult.load(tmp_path / "file")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_halves_of_a_pair_stay_two_characters(suffix, tmp_path):
    """JSON would make one of them, and the ranges of all units after it be wrong."""
    units = [Unit("\ud83d", False, (0, 1)), Unit("\ude00", False, (1, 2))]
    units.append(Unit("a", True, (0, 1)))
    result = GraphAttributionResult(
        AttributionGraph.from_rows([[1, 1, 0]], 2),
        units,
        [0],
        source_text="\ud83d\ude00",
        generated_text="a",
    )
    result.save(tmp_path / f"file{suffix}")
    loaded = GraphAttributionResult.load(tmp_path / f"file{suffix}")
    assert loaded.source_text == "\ud83d\ufffd"
    assert [unit.span for unit in loaded.units] == [(0, 1), (1, 2), (0, 1)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_nests_too_deep_is_refused(suffix, tmp_path, monkeypatch):
    """In what is read as it is, too."""
    path, plain = tmp_path / f"file{suffix}", json.dumps
    deep = '{"deep": ' + 950 * "[" + "1" + 950 * "]" + "}"
    if suffix == ".json":
        header = plain({**made().to_dict(), "meta": "M"})
        path.write_text(header.replace('"M"', deep))
    else:
        header, arrays = {**header_of(made()), "meta": "M"}, arrays_of(made())
        with monkeypatch.context() as patched:
            patched.setattr(json, "dumps", lambda o: plain(o).replace('"M"', deep))
            write(path, header, arrays)
    with contextlib.suppress(ValueError):
        GraphAttributionResult.load(path)
