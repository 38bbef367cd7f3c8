"""The table of scores: its columns, its values, types of the examples' own scalars."""

import pyarrow.parquet as pq
import pytest
from captum.attr import TextTokenInput

from captum_cage.batch import table
from captum_cage.batch.table import COLUMNS, score_columns, write_part, write_table
from tiny import tiny_cage


@pytest.fixture(scope="module")
def result(tokenizer):
    """A small result, in words."""
    inp = TextTokenInput("Ana has 3 pens.", tokenizer)
    return tiny_cage().attribute(inp, " Mia 7.", explain="7", units="word")


def shared(position, **meta):
    """What stands in all rows of an example."""
    return {"key": "k", "id": None, "position": position, "line": 2, "meta": meta}


def test_rows_are_the_results_sources(result):
    """Text, characters and scores of each, with what is said of the whole."""
    columns = score_columns(result)
    sources = [unit for unit in result.units if not unit.generated]
    assert columns["text"] == ["Ana", "has", "3", "pens."]
    assert [*zip(columns["start"], columns["stop"], strict=True)] == [
        unit.span for unit in sources
    ]
    assert columns["score"] == result.seq_attr.tolist()
    assert columns["direct"] == result.direct.seq_attr.tolist()
    assert set(columns["leaked"]) == {result.leaked}
    assert set(columns["method"]) == {"FeatureAblation"}
    assert set(columns["explained"]) == {"7."}
    total = sum(columns["score"]) + columns["leaked"][0] + columns["unresolved"][0]
    assert total == pytest.approx(columns["n_explained"][0])


@pytest.mark.parametrize("rows", [1, 2**16])
def test_the_table_has_the_documented_columns(result, tmp_path, monkeypatch, rows):
    """In their types, then the examples' own; in row groups as large as it says."""
    monkeypatch.setattr(table, "_ROWS", rows)
    write_part(tmp_path / "part", score_columns(result))
    part = pq.read_table(tmp_path / "part")
    meta = {"level": float, "name": str, "good": bool, "n": int}
    parts = [(shared(3, level=1, good=True), part), (shared(5, name=True, n=3), part)]
    write_table(tmp_path / "scores.parquet", parts, meta)
    file = pq.ParquetFile(tmp_path / "scores.parquet")
    found = file.read()
    kinds = {field.name: str(field.type) for field in found.schema}
    documented = {
        name: {"float64": "double"}.get(kind, kind)
        for name, (kind, _) in COLUMNS.items()
    }
    own = {"level": "double", "name": "string", "good": "bool", "n": "int64"}
    assert kinds == documented | {f"meta.{name}": kind for name, kind in own.items()}
    assert file.num_row_groups == (2 if rows == 1 else 1)
    size = len(part)
    assert found["position"].to_pylist() == [3] * size + [5] * size
    assert found["meta.level"].to_pylist() == [1.0] * size + [None] * size
    assert found["meta.name"].to_pylist() == [None] * size + ["True"] * size
    assert found["score"].to_pylist() == 2 * result.seq_attr.tolist()


def test_a_table_without_examples_has_its_columns(tmp_path):
    """So that a reader need not ask."""
    write_table(tmp_path / "scores.parquet", [], {})
    found = pq.read_table(tmp_path / "scores.parquet")
    assert found.column_names == [*COLUMNS]
    assert len(found) == 0


def test_half_a_surrogate_pair_is_written_out(result, monkeypatch):
    """UTF-8 has no form for it."""
    unit = result.units[0]
    odd = type(unit)("a\ud800", unit.generated, unit.span, unit.special)
    monkeypatch.setattr(result, "units", (odd, *result.units[1:]))
    assert score_columns(result)["text"][0] == "a\\ud800"


def test_a_missing_package_is_named(monkeypatch):
    """With what brings it."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install captum-cage\[scale\]"):
        table.parquet()
