"""The result: a Captum result, its graph, its file."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import sys
import zipfile

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    LLMAttributionResult,
    TextTemplateInput,
    TextTokenInput,
)

from captum_cage import (
    AttributionGraph,
    GraphAttributionResult,
    GraphContextAttribution,
    Unit,
)
from captum_cage.record import header_of
from captum_cage.result import TextPath
from conftest import PROMPT, TARGET


@pytest.fixture(scope="module")
def result(model, tokenizer):
    """Every token of a small answer, from the ablation of a small Llama."""
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    return cage.attribute(
        TextTokenInput(PROMPT, tokenizer), TARGET, explain="answer is 7"
    )


@pytest.fixture
def by_hand():
    """Two facts, a step that uses both, and an answer that uses the step."""
    rows = [[3, 1, 0, 0], [0, 1, 5, 0]]
    texts = ["Ana has 3.", "Mia has 1.", "So 4.", "The answer is 4."]
    spans = [(0, 10), (11, 21), (0, 5), (6, 22)]
    units = [
        Unit(t, i > 1, s) for i, (t, s) in enumerate(zip(texts, spans, strict=True))
    ]
    return GraphAttributionResult(
        AttributionGraph.from_rows(rows, 2),
        units,
        [1],
        source_text="Ana has 3. Mia has 1.",
        generated_text="So 4. The answer is 4.",
        output_probs=[0.5, 0.25],
        meta={"method": "by hand"},
    )


def test_it_is_a_captum_result_with_captum_s_fields(result):
    """Scores over the sources, one row per generated token."""
    assert isinstance(result, LLMAttributionResult)
    P, G = result.graph.n_sources, result.graph.n_generated
    assert result.seq_attr.shape == (P,)
    assert result.token_attr.shape == (G, P)
    assert result.output_probs.shape == (G,)
    assert (len(result.input_tokens), len(result.output_tokens)) == (P, G)


def test_scores_are_those_of_paths_counted_by_hand(by_hand):
    """The answer owes 1/6 to Mia directly and 5/6 to the step, 3/4 of that to Ana."""
    assert by_hand.seq_attr.tolist() == pytest.approx([15 / 24, 9 / 24])
    assert by_hand.direct.seq_attr.tolist() == pytest.approx([0.0, 1 / 6])
    assert by_hand.sequence.seq_attr.tolist() == pytest.approx([3 / 4, 5 / 12])
    assert by_hand.step_attr.tolist() == pytest.approx([5 / 6, 1.0])
    assert by_hand.token_attr.tolist() == [
        pytest.approx([0.75, 0.25]),
        pytest.approx([15 / 24, 9 / 24]),
    ]
    assert (by_hand.leaked, by_hand.unresolved) == (0.0, 0.0)


def test_paths_are_told_in_words(by_hand):
    """From the explained unit back to the source, with the share of each."""
    paths = by_hand.paths(2)
    assert [path.units for path in paths] == [(3, 2, 0), (3, 2, 1)]
    assert [path.share for path in paths] == pytest.approx([15 / 24, 5 / 24])
    assert str(paths[0]) == '"The answer is 4." <- "So 4." <- "Ana has 3." (62.5%)'
    assert [path.units for path in by_hand.paths(5, source=1)] == [(3, 2, 1), (3, 1)]


def test_direct_and_sequence_are_plain_captum_results(result):
    """Rows of the graph, the explained ones or all."""
    to_sources, _ = result.graph.blocks()
    assert type(result.direct) is LLMAttributionResult
    assert type(result.sequence) is LLMAttributionResult
    expected = sum(to_sources.toarray()[step] for step in result.explained)
    assert result.direct.seq_attr.numpy() == pytest.approx(expected)
    assert result.sequence.seq_attr.numpy() == pytest.approx(
        to_sources.toarray().sum(0)
    )
    assert (result.direct.token_attr.numpy() == to_sources.toarray()).all()


@pytest.mark.parametrize("span", [None, -1, slice(0, 3), (2, 5), "pens", "Mia"])
def test_another_span_needs_no_model_call(result, model, tokenizer, monkeypatch, span):
    """And equals the answer to that question asked first."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput(PROMPT, tokenizer)
    fresh = GraphContextAttribution(llm_attr).attribute(inp, TARGET, explain=span)

    def called(*_args, **_kwargs):
        raise AssertionError("the model was called")

    monkeypatch.setattr(type(model), "forward", called)
    again = result.explaining(span)
    assert again.explained == fresh.explained
    assert torch.equal(again.seq_attr, fresh.seq_attr)
    assert again.graph is result.graph
    assert result.explained != again.explained or span is None


def test_labels_are_readable_and_none_is_lost(model, tokenizer):
    """No marks of the byte-level alphabet; a repeated text keeps its scores."""
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    inp = TextTokenInput("Ana has 3 has 3 é", tokenizer)
    result = cage.attribute(inp, " pens 😀")
    expected = ["Ana", " has", " 3", " has", " 3", " ", "é[1/2]", "é[2/2]"]
    assert result.input_tokens == expected
    assert result.output_tokens[-4:] == [f"😀[{i}/4]" for i in (1, 2, 3, 4)]
    assert list(result.seq_attr_dict)[2:5] == [" 3", " has (2)", " 3 (2)"]
    assert list(result.seq_attr_dict.values()) == result.seq_attr.tolist()


def test_character_ranges_are_kept(result):
    """Each unit's range gives its text."""
    for unit in result.units:
        text = result.generated_text if unit.generated else result.source_text
        assert text[slice(*unit.span)] == unit.text


@pytest.mark.parametrize("units", ["word", "sentence"])
def test_display_by_larger_units_sums_the_solved_scores(result, units):
    """Nothing is solved again, and no mass is lost."""
    coarse = result.by(units)
    assert type(coarse) is LLMAttributionResult
    assert float(coarse.seq_attr.sum()) == pytest.approx(float(result.seq_attr.sum()))
    assert float(coarse.token_attr.sum()) == pytest.approx(
        float(result.token_attr.sum())
    )
    if units == "sentence":
        assert coarse.input_tokens == [
            "Ana has 3 pens.",
            "Mia has 4 more pens than Ana.",
        ]
        first = sum(
            score
            for score, unit in zip(result.seq_attr.tolist(), result.units, strict=False)
            if unit.span[1] <= len("Ana has 3 pens.")
        )
        assert float(coarse.seq_attr[0]) == pytest.approx(first)
        assert coarse.output_probs.tolist() == pytest.approx(
            [
                float(result.output_probs[:11].prod()),
                float(result.output_probs[11:].prod()),
            ]
        )


def test_display_by_larger_units_is_not_the_explanation_of_larger_units(result):
    """Grouping and normalising do not commute; the two say different things."""
    first, second = "Ana has 3 pens.", " Mia has 3 + 4 = 7 pens."
    groups = [
        2 + (unit.span[1] > len(second))
        if unit.generated
        else int(unit.span[1] > len(first))
        for unit in result.units
    ]
    solved = result.graph.coarsen(groups).marginals()[1]
    answer = result.explaining(" The answer is 7.")
    shown = answer.by("sentence").seq_attr.numpy() / len(answer.explained)
    assert not np.allclose(solved, shown, atol=1e-3)


def test_sources_without_a_place_in_the_text_stay_as_they_are(model, tokenizer):
    """A template's segments are no ranges of tokens."""
    cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))
    inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
    coarse = cage.attribute(inp, TARGET).by("sentence")
    assert coarse.input_tokens == ["Ana", "pens"]
    assert len(coarse.output_tokens) == 2


@pytest.mark.parametrize("plot", ["plot_token_attr", "plot_seq_attr"])
def test_captum_s_plots_work(by_hand, plot):
    """On the result and on its plain companions."""
    for one in (by_hand, by_hand.direct, by_hand.by("sentence")):
        figure, _ = getattr(one, plot)()
        figure.canvas.draw()
        plt.close(figure)


def test_a_saved_result_loads_as_it_was(result, tmp_path):
    """Without the model; numbers to the last bit."""
    path = tmp_path / "result.npz"
    result.save(path)
    loaded = GraphAttributionResult.load(path)
    assert torch.equal(loaded.seq_attr, result.seq_attr)
    assert torch.equal(loaded.token_attr, result.token_attr)
    assert torch.equal(loaded.output_probs, result.output_probs)
    assert (loaded.graph.rows == result.graph.rows).all()
    for name in ("units", "explained", "source_text", "generated_text", "meta"):
        assert getattr(loaded, name) == getattr(result, name)
    assert loaded.inp is None
    assert loaded.explaining("pens").explained == result.explaining("pens").explained
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]


@pytest.mark.parametrize("name", ["plain", "with.dots.npz", "é 😀"])
def test_a_result_is_saved_under_the_very_name_given(by_hand, tmp_path, name):
    """No suffix is added."""
    by_hand.save(tmp_path / name)
    assert GraphAttributionResult.load(str(tmp_path / name)).paths(1)[0].units == (
        3,
        2,
        0,
    )


def test_odd_characters_survive_saving(tmp_path):
    """Lone surrogates, zero bytes, and texts in both directions."""
    texts = ["\ud800 a\x00", "שלום", "\u200d😀"]
    units = [Unit(text, i == 2, None) for i, text in enumerate(texts)]
    graph = AttributionGraph.from_rows([[1, 2, 0]], 2)
    result = GraphAttributionResult(
        graph, units, [0], source_text="\udfff", generated_text="\r\n"
    )
    result.save(tmp_path / "odd")
    loaded = GraphAttributionResult.load(tmp_path / "odd")
    assert loaded.units == result.units
    assert (loaded.source_text, loaded.generated_text) == ("\udfff", "\r\n")
    assert loaded.output_probs is None


def test_an_interrupted_save_leaves_the_old_file(by_hand, tmp_path, monkeypatch):
    """The new one is written beside it first."""
    path = tmp_path / "result"
    by_hand.save(path)
    before = path.read_bytes()

    def interrupted(file, **_arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        by_hand.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class Malice:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize(
    "content", ["empty", "text", "pickle", "pickled array", "array", "zip", "no units"]
)
def test_a_file_that_is_no_result_is_refused(by_hand, tmp_path, content, capsys):
    """And nothing in it is run."""
    path = tmp_path / "file"
    if content == "empty":
        path.write_bytes(b"")
    elif content == "text":
        path.write_text("hello")
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Malice()))
    elif content == "pickled array":
        with path.open("wb") as file:
            np.savez(file, header=np.array([Malice()], dtype=object))
    elif content == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("header.npy", b"\x93NUMPY nonsense")
    else:
        header = {**header_of(by_hand), "units": []}
        save_with(by_hand, path, header)
    with pytest.raises(ValueError, match="must be a result saved by"):
        GraphAttributionResult.load(path)
    assert "unpickled" not in capsys.readouterr().out


def save_with(result, path, header, without=()):
    """Save a result with another header, and without some arrays."""
    result.save(path)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive if name not in without}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def approximation(rows, kept=None, explained=(2,), **more):
    """Two facts, two steps and an answer, with rows that may be missing."""
    texts = ["Ana has 3.", "Mia has 1.", "So 4.", "Or 5.", "It is 4."]
    graph = AttributionGraph.from_rows(
        rows, 2, more.pop("normalization", "positive"), kept=kept
    )
    return GraphAttributionResult(
        graph,
        [Unit(text, i > 1, None) for i, text in enumerate(texts)],
        explained,
        source_text="",
        generated_text="",
        **more,
    )


# The first step's row was not computed; half of the second's mass was dropped.
PARTIAL = [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 1, 2, 0]]
KEPT = [0.0, 0.5, 1.0]


def test_what_is_left_out_is_told():
    """Half of the answer's mass meets the second step, a quarter the first directly."""
    result = approximation(PARTIAL, KEPT)
    assert result.seq_attr.tolist() == [0.25, 0.0]
    # The first step gets a quarter directly and a quarter through the second.
    assert result.step_attr.tolist() == [0.5, 0.5, 1.0]
    assert result.unresolved == 0.5 + 0.5 * 0.5
    assert result.rows_computed == 2
    assert repr(result).endswith("leaked=0, unresolved=0.75)")


@pytest.mark.parametrize("hops", [None, 0, 1, 2, 9])
@pytest.mark.parametrize("kept", [None, KEPT])
def test_every_score_obeys_the_same_hops(hops, kept):
    """Scores, steps, leak and marginals are those of the cut series; mass is kept."""
    rows = PARTIAL if kept else [[0, -1, 0, 0, 0], *PARTIAL[1:]]
    result = approximation(rows, kept, (1, 2), hops=hops)
    graph = result.graph
    assert result.hops == hops
    to_sources, to_generated = (block.toarray() for block in graph.blocks())
    powers = [
        np.linalg.matrix_power(to_generated, i)
        for i in range(3 if hops is None else hops + 1)
    ]
    marginals = sum(power @ to_sources for power in powers)
    through = sum(result.weights @ power for power in powers)
    assert result.token_attr.numpy() == pytest.approx(marginals)
    assert result.seq_attr.numpy() == pytest.approx(result.weights @ marginals)
    assert result.step_attr.numpy() == pytest.approx(through)
    assert result.leaked == pytest.approx(float(through @ graph.leak))
    total = float(result.seq_attr.sum()) + result.leaked + result.unresolved
    assert total == pytest.approx(2.0)
    assert result.unresolved == graph.unresolved(result.weights, hops=hops)
    assert result.direct.seq_attr.numpy() == pytest.approx(result.weights @ to_sources)


def test_another_span_has_its_own_unresolved_mass():
    """The hops stay; rows that were not needed before are missing now."""
    result = approximation(PARTIAL, [0, 1, 1], explained=(1,), hops=0)
    assert result.unresolved == 1.0
    again = result.explaining(0)
    assert (again.hops, again.rows_computed) == (0, 2)
    assert (again.unresolved, again.seq_attr.tolist()) == (1.0, [0.0, 0.0])
    whole = approximation(PARTIAL, [0, 1, 1], explained=(1,))
    assert whole.explaining(2).unresolved == 0.75


def test_a_complete_result_leaves_nothing_open(result):
    """All rows were computed, and the short form is silent about it."""
    assert result.unresolved == 0.0
    assert result.rows_computed == result.graph.n_generated
    assert result.hops is None
    assert "unresolved" not in repr(result)


@pytest.mark.parametrize(
    ("hops", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_hops_are_a_number_of_passes(hops, error):
    """Refused when the result is made."""
    with pytest.raises(error, match=r"hops: must be"):
        approximation(PARTIAL, KEPT, hops=hops)


@pytest.mark.parametrize("make", [np.array, sp.csr_array])
@pytest.mark.parametrize("hops", [None, 1])
def test_an_approximation_loads_as_it_was(make, hops, tmp_path):
    """What rows kept, hops, and sparse rows as sparse rows."""
    result = approximation(make(np.array(PARTIAL, dtype=float)), KEPT, hops=hops)
    result.save(tmp_path / "file")
    loaded = GraphAttributionResult.load(tmp_path / "file")
    assert sp.issparse(loaded.graph.rows) == sp.issparse(result.graph.rows)
    assert loaded.to_dict() == result.to_dict()
    assert loaded.graph.kept.tolist() == KEPT
    assert (loaded.hops, loaded.unresolved) == (hops, result.unresolved)


def test_sparse_rows_are_never_made_dense_by_loading(tmp_path, monkeypatch):
    """A long result stays small."""
    result = approximation(sp.csr_array(np.array(PARTIAL, dtype=float)), KEPT)
    result.save(tmp_path / "file")

    original = sp.csr_array.toarray

    def dense(self, *args, **kwargs):
        assert self.shape != result.graph.rows.shape, "the rows were made dense"
        return original(self, *args, **kwargs)

    monkeypatch.setattr(sp.csr_array, "toarray", dense)
    loaded = GraphAttributionResult.load(tmp_path / "file")
    assert loaded.unresolved == result.unresolved


def test_a_file_of_version_1_loads(by_hand, tmp_path):
    """It has neither hops nor what rows kept: all rows are complete."""
    path = tmp_path / "file"
    header = {**header_of(by_hand), "version": 1}
    del header["hops"]
    save_with(by_hand, path, header, without=("kept", "rows_sparse"))
    loaded = GraphAttributionResult.load(path)
    assert loaded.to_dict() == by_hand.to_dict()
    assert isinstance(loaded.graph.rows, np.ndarray)
    assert (loaded.hops, loaded.unresolved) == (None, 0.0)


@pytest.mark.parametrize("missing", ["kept", "rows_sparse", "sources", "rows_data"])
def test_a_file_that_lacks_an_array_is_refused(by_hand, tmp_path, missing):
    """Version 2 has all of them."""
    save_with(by_hand, tmp_path / "file", header_of(by_hand), without=(missing,))
    with pytest.raises(ValueError, match="must be a result saved by"):
        GraphAttributionResult.load(tmp_path / "file")


def test_the_dictionary_tells_what_is_left_out(by_hand):
    """Null where every row is complete."""
    told = approximation(PARTIAL, KEPT, hops=1).to_dict()
    assert (told["hops"], told["kept"], told["rows_computed"]) == (1, KEPT, 2)
    assert told["unresolved"] == 0.75
    told = by_hand.to_dict()
    assert (told["hops"], told["kept"], told["rows_computed"]) == (None, None, 2)


def test_a_missing_file_is_an_os_error(tmp_path):
    """As everywhere in Python."""
    with pytest.raises(FileNotFoundError, match="nothing"):
        GraphAttributionResult.load(tmp_path / "nothing")


def test_the_dictionary_is_json_and_has_the_scores(result):
    """What the command line writes."""
    read = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert read["seq_attr"] == result.seq_attr.tolist()
    assert read["direct"] == result.direct.seq_attr.tolist()
    assert read["rows"] == result.graph.rows.tolist()
    assert [unit["text"] for unit in read["units"]] == [u.text for u in result.units]
    assert read["meta"]["method"] == "FeatureAblation"
    assert set(read["meta"]["versions"]) >= {"captum", "captum_cage", "transformers"}


def test_the_short_form_says_what_is_explained(by_hand, result):
    """A result's repr is one line."""
    assert repr(by_hand) == (
        "GraphAttributionResult(P=2, G=2, explained='The answer is 4.', leaked=0)"
    )
    assert "explained='3 units'" in repr(result)


def test_results_are_compared_by_identity(by_hand):
    """Captum's dataclass would ask tensors for one truth value."""
    assert by_hand == by_hand
    assert by_hand != by_hand.explaining(0)
    assert len({by_hand, by_hand.explaining(0)}) == 2


REFUSED = {
    "none explained": (
        {"explained": []},
        ValueError,
        "explained: must rise, but () came",
    ),
    "twice": ({"explained": [1, 1]}, ValueError, "explained: must rise"),
    "falling": ({"explained": [1, 0]}, ValueError, "explained: must rise"),
    "too many": (
        {"explained": [2]},
        ValueError,
        "explained: must be at least 0 and less",
    ),
    "a fraction": (
        {"explained": [0.5]},
        TypeError,
        "explained: must be a whole number",
    ),
    "an array": ({"meta": {"a": np.ones(2)}}, TypeError, "meta: must hold JSON values"),
    "no number": ({"meta": {"a": np.nan}}, TypeError, "meta: must hold JSON values"),
}


def plain_result(**changed):
    """A source and two generated units, as NumPy might tell them."""
    units = [Unit(np.str_("a"), np.False_, (np.int64(0), np.int64(1)), np.True_)]
    units += [Unit("b", True, (0, 1)), Unit("c", True, (2, 3))]
    arguments = {
        "explained": np.array([0, 1]),
        "source_text": "a",
        "generated_text": "b c",
        **changed,
    }
    graph = AttributionGraph.from_rows([[1, 0, 0], [1, 1, 0]], 1)
    return GraphAttributionResult(graph, units, **arguments)


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_result_is_refused(name):
    """Not when it is drawn or saved."""
    changed, error, told = REFUSED[name]
    with pytest.raises(error, match=re.escape(told)):
        plain_result(**changed)


def test_numbers_of_numpy_are_plain_ones(tmp_path):
    """So that all forms can hold them."""
    result = plain_result()
    for suffix in (".json", ".npz", ".graphml", ".csv", ".dot"):
        result.export(tmp_path / f"file{suffix}")
    assert result.to_html()
    loaded = GraphAttributionResult.load(tmp_path / "file.npz")
    assert loaded.units == result.units
    assert loaded.explained == (0, 1)
    assert {type(step) for step in result.explained} == {int}


def test_a_path_is_told_without_steering_the_terminal():
    """Whatever its units say."""
    path = TextPath((1, 0), 1.0, ("a\u202e\x9b", "\ud800\x1b"), 1.0)
    assert str(path) == '"a\\u202e\\x9b" <- "\\ud800\\u001b" (100.0%)'


@pytest.mark.parametrize(
    ("view", "package", "extra"),
    [("plot", "matplotlib", "plot"), ("html", "jinja2", "html")],
)
def test_a_view_without_its_package_names_the_extra(view, package, extra, monkeypatch):
    """The result itself needs neither."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"captum_cage.{view}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install captum-cage\[{extra}\]"):
        importlib.import_module(f"captum_cage.{view}")
