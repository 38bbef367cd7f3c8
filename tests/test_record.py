"""What files of results hold, and which are refused."""

import json

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


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, "1", None])
def test_other_versions_are_told(version, tmp_path):
    """With what to do."""
    header = {**header_of(made()), "version": version}
    write(tmp_path / "file", header, arrays_of(made()))
    assert read(tmp_path / "file")[0] == header
    with pytest.raises(ValueError, match=r"of format version 1 or 2 or 3, but version"):
        read_parts(tmp_path / "file")
