"""Finished rows stay, whatever happens to the process that wrote them."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    KernelShap,
    LayerGradientXActivation,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import issparse

from captum_cage import GraphAttributionResult, GraphContextAttribution
from captum_cage.spool import SPOOL_VERSION, RowSpool, header_in, rows_in
from conftest import PROMPT, TARGET
from tiny import tiny_model

WIDTH, BEFORE = 6, 2


def header(**changes):
    """Rows of four generated units after two sources."""
    units = [{"generated": number >= BEFORE} for number in range(WIDTH)]
    found = {
        "belongs": {"the model": "Llama", "the text": "1f"},
        "normalization": "positive",
        "prompt_units": BEFORE,
        "explanation": {"units": units},
    }
    return {**found, **changes}


def row(step, *, whole=True):
    """A row of a step, with one entry that is zero where another follows."""
    values = np.zeros(WIDTH)
    values[[0, step + 1]] = 1.0, 1.0 + step
    if whole:
        return values, None, 1.0
    return values[[0, step + 1]], np.array([0, step + 1]), 0.75


def filled(folder, steps=(2, 0)):
    """A spool with some rows, closed, and the bytes of these."""
    with RowSpool.open(folder, header()) as spool:
        for step in steps:
            spool.rows[step] = row(step)
    return (folder / "rows.bin").read_bytes()


def same(one, other):
    """Whether two stored rows are equal."""
    pairs = zip(one[:2], other[:2], strict=True)
    return one[2] == other[2] and all(
        (a is b is None) or np.array_equal(a, b) for a, b in pairs
    )


class TestRows:
    """What is set is there."""

    @settings(max_examples=30)
    @given(data=st.data())
    def test_come_back_to_the_last_bit(self, data, tmp_path_factory):
        """Whole or cut, full, sparse or empty; also of another process."""
        folder = tmp_path_factory.mktemp("spool")
        numbers = st.floats(allow_nan=False, allow_infinity=False)
        written = {}
        with RowSpool.open(folder / "new" / "er", header()) as spool:
            for step in data.draw(st.permutations(range(4))):
                own = step + BEFORE
                size = data.draw(st.integers(0, own))
                values = np.array(
                    data.draw(st.lists(numbers, min_size=size, max_size=size))
                )
                if data.draw(st.booleans()):
                    whole = np.zeros(WIDTH)
                    whole[own - size : own] = values
                    one = whole, None, 1.0
                else:
                    one = values, np.arange(own - size, own), 0.5
                written[step] = spool.rows[step] = one
                assert same(spool.rows[step], one)
            assert list(spool.rows) == sorted(written)
            again = RowSpool.read(folder / "new" / "er").rows
            assert len(again) == len(written)
            for rows in again, spool.rows:
                assert all(same(rows[step], one) for step, one in written.items())

    def test_of_both_kinds_are_kept_apart(self, tmp_path):
        """The one that mass passes by, and the one that an explanation starts by."""
        with RowSpool.open(tmp_path, header()) as spool:
            spool.rows[1] = row(1)
            spool.starts[1] = row(0)
            assert 1 in spool.starts
            assert 2 not in spool.rows
            assert "1" not in spool.rows
            with pytest.raises(KeyError):
                spool.rows[2]
            with pytest.raises(TypeError, match="spool: must keep its rows"):
                del spool.rows[1]
        found = RowSpool.read(tmp_path)
        assert same(found.rows[1], row(1))
        assert same(found.starts[1], row(0))
        with pytest.raises(ValueError, match="must be open to take a row"):
            found.rows[2] = row(2)

    def test_make_the_graph_and_its_answers(self, tmp_path):
        """In memory and streamed; rows that are not there are left open."""
        with RowSpool.open(tmp_path, header()) as spool:
            for step in (3, 1):
                spool.rows[step] = row(step, whole=step == 3)
            spool.starts[3] = row(0)
            graph, streamed = spool.graph(), spool.streamed()
        weights = [0.0, 0.5, 0.0, 2.0]
        assert graph.kept.tolist() == [0.0, 0.75, 0.0, 1.0]
        assert graph.behind.steps.tolist() == [3]
        found = streamed.answer(weights)
        assert found.attr == pytest.approx(graph.explain(weights), abs=1e-12)
        assert found.unresolved == pytest.approx(graph.unresolved(weights))
        assert found.unresolved > 0.0


class TestCrashes:
    """Whatever was cut short."""

    def test_a_torn_last_row_is_left_out_and_written_over(self, tmp_path):
        """At each byte; the rows before it stay, and go on to be written."""
        data = filled(tmp_path)
        first = filled(tmp_path / "other", (2,))
        assert data.startswith(first)
        for stop in range(len(first), len(data)):
            (tmp_path / "rows.bin").write_bytes(data[:stop])
            found = RowSpool.read(tmp_path)
            assert list(found.rows) == [2]
            assert same(found.rows[2], row(2))
        with RowSpool.open(tmp_path, header()) as spool:
            spool.rows[0] = row(0)
        assert (tmp_path / "rows.bin").read_bytes() == data

    def test_what_the_system_did_not_write_any_more_is_left_out(self, tmp_path):
        """Zeros, or a last row with another checksum."""
        data = filled(tmp_path)
        first = filled(tmp_path / "other", (2,))
        torn = data[:-8] + bytes(8)
        for tail in (first + bytes(200), torn, torn + bytes(64)):
            assert len(rows_in(tail, WIDTH, 4)) == 1

    def test_damage_before_the_end_is_named(self, tmp_path):
        """Any other byte in a row that another one follows."""
        data = filled(tmp_path)
        length = len(filled(tmp_path / "other", (2,)))
        for place in range(length):
            changed = bytearray(data)
            changed[place] ^= 4
            (tmp_path / "rows.bin").write_bytes(changed)
            with pytest.raises(ValueError, match=r"rows\.bin: must hold rows as they"):
                RowSpool.read(tmp_path)

    @pytest.mark.parametrize(
        "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()]
    )
    def test_a_row_that_cannot_be_written_leaves_nothing(self, tmp_path, error):
        """A disk that is full, an interrupt; the rows before it stay."""
        with RowSpool.open(tmp_path, header()) as spool:
            spool.rows[0] = row(0)
            size = (tmp_path / "rows.bin").stat().st_size
            writer = spool._writer

            class Full:
                truncate, seek = writer.truncate, writer.seek

                def write(self, data):
                    writer.write(data[:20])
                    raise error

            spool._writer = Full()
            with pytest.raises(type(error)):
                spool.rows[1] = row(1)
            spool._writer = writer
            assert 1 not in spool.rows
            assert (tmp_path / "rows.bin").stat().st_size == size
            spool.rows[2] = row(2)
        assert list(RowSpool.read(tmp_path).rows) == [0, 2]

    @settings(
        max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(data=st.data())
    def test_no_bytes_do_anything_but_be_refused(self, data, tmp_path):
        """Changed and random ones, as rows and as header."""
        folder = tmp_path
        file = folder / "rows.bin"
        good = bytearray(file.read_bytes() if file.exists() else filled(folder))
        for _ in range(data.draw(st.integers(1, 3))):
            good[data.draw(st.integers(0, len(good) - 1))] = data.draw(
                st.integers(0, 255)
            )
        number = data.draw(st.integers(0, 2))
        if number < 2:
            read = partial(rows_in, width=WIDTH, steps=4)
            given_bytes = bytes(good) if number else data.draw(st.binary(max_size=200))
        else:
            read = header_in
            value = json.loads((folder / "spool.json").read_bytes())
            value[data.draw(st.sampled_from(sorted(value)))] = data.draw(
                st.none()
                | st.integers()
                | st.lists(st.integers())
                | st.text(max_size=3)
            )
            given_bytes = json.dumps(value).encode()
        try:
            assert len(read(given_bytes)) <= 6
        except ValueError as error:
            match = r"^rows: must hold rows as they|^spool: must be a spool of"
            if re.search(match, str(error)) is None:
                raise


class TestFolders:
    """What a folder may be."""

    def test_other_rows_are_refused_by_name(self, tmp_path):
        """The error says what is another."""
        filled(tmp_path)
        other = header(belongs={"the model": "Llama", "the text": "2f"})
        with pytest.raises(
            ValueError, match=r"holds others: the text differs \(1f there, 2f now\)"
        ):
            RowSpool.open(tmp_path, other)
        other = header(belongs={"the model": "GPT", "the foil": "3f"})
        with pytest.raises(ValueError, match="the model, the foil, the text differ "):
            RowSpool.open(tmp_path, other)
        assert len(RowSpool.read(tmp_path).rows) == 2

    def test_another_question_about_the_same_rows_is_written_down(self, tmp_path):
        """As the rows are the same."""
        filled(tmp_path)
        asked = {**header()["explanation"], "explained": [3]}
        with RowSpool.open(tmp_path, header(explanation=asked)) as spool:
            assert len(spool.rows) == 2
        assert RowSpool.read(tmp_path).header["explanation"] == asked

    def test_one_process_writes_at_a_time(self, tmp_path):
        """Another may read meanwhile, and write later."""
        with RowSpool.open(tmp_path, header()) as spool:
            spool.rows[0] = row(0)
            with pytest.raises(BlockingIOError, match="no other call is writing to"):
                RowSpool.open(tmp_path, header())
            assert list(RowSpool.read(tmp_path).rows) == [0]
        spool.close()
        RowSpool.open(tmp_path, header()).close()

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path):
        """Nothing is written into it; a half-written header is no such thing."""
        (tmp_path / ".0123.partial").write_text("{")
        RowSpool.open(tmp_path, header()).close()
        other = tmp_path / "other"
        other.mkdir()
        (other / "thesis.tex").write_text("mine")
        with pytest.raises(ValueError, match=r"or nothing, but .*'thesis\.tex' in it"):
            RowSpool.open(other, header())
        assert {one.name for one in other.iterdir()} <= {"thesis.tex", "lock"}
        with pytest.raises(NotADirectoryError, match="spool: must name a folder"):
            RowSpool.open(other / "thesis.tex", header())
        with pytest.raises(TypeError, match="spool: must name a folder"):
            RowSpool.read(3)
        with pytest.raises(FileNotFoundError, match=r"has no spool\.json"):
            RowSpool.read(other)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"format": "captum_cage.result"}, "it is something else"),
            ({"version": SPOOL_VERSION + 1}, "format version 1, but version int 2"),
            ({"prompt_units": WIDTH}, "its header is damaged"),
            ({"prompt_units": 3}, "its header is damaged"),
            ({"normalization": "other"}, "its header is damaged"),
            ({"belongs": {"a": 1}}, "its header is damaged"),
            ({"explanation": {}}, "its header is damaged"),
        ],
    )
    def test_what_is_no_spool_or_of_another_version_is_refused(
        self, tmp_path, changes, match
    ):
        """With what is the matter."""
        filled(tmp_path)
        file = tmp_path / "spool.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(ValueError, match=match):
            RowSpool.read(tmp_path)
        with pytest.raises(ValueError, match=match):
            RowSpool.open(tmp_path, header())

    def test_without_its_rows_it_is_damaged(self, tmp_path):
        """A header alone says nothing."""
        filled(tmp_path)
        (tmp_path / "rows.bin").unlink()
        with pytest.raises(ValueError, match=r"it has no rows\.bin"):
            RowSpool.read(tmp_path)


class Own(FeatureAblation):
    """A method without an engine: ablation under another name."""


def cage_of(model, tokenizer, method=Own, **settings):
    """The method in Captum's wrapper, in ours."""
    if method is LayerGradientXActivation:
        gradient = method(model, model.get_input_embeddings())
        llm_attr = LLMGradientAttribution(gradient, tokenizer)
    else:
        llm_attr = LLMAttribution(method(model), tokenizer)
    return GraphContextAttribution(llm_attr, **settings)


def stopping_after(monkeypatch, method, rows):
    """The base method is interrupted after some rows; the list of its calls."""
    attribute, calls = method.attribute, []

    def counted(self, *args, **kwargs):
        if len(calls) == rows:
            raise KeyboardInterrupt
        calls.append(1)
        return attribute(self, *args, **kwargs)

    counted.__wrapped__ = attribute
    monkeypatch.setattr(method, "attribute", counted)
    return calls


class TestAttribution:
    """`attribute(spool=...)`."""

    @pytest.mark.parametrize("method", [Own, FeatureAblation, LayerGradientXActivation])
    @pytest.mark.parametrize("sparsify", [None, 0.9])
    def test_changes_nothing_in_the_result(
        self, model, tokenizer, tmp_path, method, sparsify
    ):
        """By the loop and by both kinds of engine; a second call asks for no row."""
        cage = cage_of(model, tokenizer, method)
        inp = TextTokenInput(PROMPT, tokenizer)
        options = {"units": "word", "explain": "7", "sparsify": sparsify}
        plain = cage.attribute(inp, TARGET, **options)
        kept = cage.attribute(inp, TARGET, spool=tmp_path, **options)
        size = (tmp_path / "rows.bin").stat().st_size
        again = cage_of(model, tokenizer, method).attribute(
            TextTokenInput(PROMPT, tokenizer), TARGET, spool=tmp_path, **options
        )
        read = GraphAttributionResult.from_spool(tmp_path)
        for result in kept, again, read:
            assert torch.equal(result.seq_attr, plain.seq_attr)
            rows = result.graph.matrix - plain.graph.matrix
            assert rows.nnz == 0
        for result in kept, again:
            assert type(result.graph.rows) is type(plain.graph.rows)
            assert torch.allclose(result.output_probs, plain.output_probs)
        assert (tmp_path / "rows.bin").stat().st_size == size
        assert read.units == plain.units
        assert read.explained == plain.explained
        other = GraphAttributionResult.from_spool(tmp_path, explain=0)
        assert torch.equal(other.seq_attr, plain.explaining(0).seq_attr)

    @pytest.mark.parametrize("spooled", [False, True])
    def test_rows_of_many_entries_make_a_sparse_graph(
        self, model, tokenizer, tmp_path, monkeypatch, spooled
    ):
        """With the same answers, with and without a spool, a foil and a missing row."""
        inp = TextTokenInput(PROMPT, tokenizer)
        options = {"units": "word", "foil": {"7": "9"}, "tolerance": 0.1}
        cage = cage_of(model, tokenizer, LayerGradientXActivation)
        full = cage.attribute(inp, TARGET, **options)
        monkeypatch.setattr("captum_cage.strategy._DENSE_ENTRIES", 0)
        spool = tmp_path if spooled else None
        lean = cage.attribute(inp, TARGET, spool=spool, **options)
        assert issparse(lean.graph.rows)
        assert not issparse(full.graph.rows)
        assert torch.equal(lean.seq_attr, full.seq_attr)
        assert lean.unresolved == full.unresolved
        assert np.array_equal(lean.graph.rows.toarray(), full.graph.rows)
        assert np.array_equal(lean.graph.kept, full.graph.kept)
        assert (lean.graph.behind.rows - full.graph.behind.rows).nnz == 0

    def test_goes_on_after_an_interrupt_in_another_object(
        self, model, tokenizer, tmp_path, monkeypatch
    ):
        """With a foil and a tolerance, too; what is there certifies the rest."""
        inp = TextTokenInput(PROMPT, tokenizer)
        options = {"units": "word", "foil": {"7": "9"}, "tolerance": 0.05}
        with monkeypatch.context() as patch:
            calls = stopping_after(patch, Own, 10**9)
            full = cage_of(model, tokenizer).attribute(inp, TARGET, **options)
            total = len(calls)
        with monkeypatch.context() as patch:
            stopping_after(patch, Own, 5)
            cage = cage_of(model, tokenizer)
            with pytest.raises(KeyboardInterrupt):
                cage.attribute(inp, TARGET, spool=tmp_path, **options)
        early = GraphAttributionResult.from_spool(tmp_path)
        assert 0 < early.rows_computed < full.rows_computed
        missing = full.seq_attr - early.seq_attr
        assert missing.min() > -1e-9
        assert early.unresolved > full.unresolved
        calls = stopping_after(monkeypatch, Own, 10**9)
        done = cage_of(model, tokenizer).attribute(
            inp, TARGET, spool=tmp_path, **options
        )
        assert (
            len(calls) == total - 5 + (5 - early.rows_computed - 0)
            or len(calls) < total
        )
        assert torch.equal(done.seq_attr, full.seq_attr)

    def test_rows_in_memory_and_rows_in_a_folder_serve_each_other(
        self, model, tokenizer, tmp_path, monkeypatch
    ):
        """Interrupted without a spool, a call goes on with one."""
        inp = TextTokenInput(PROMPT, tokenizer)
        cage = cage_of(model, tokenizer)
        with monkeypatch.context() as patch:
            stopping_after(patch, Own, 3)
            with pytest.raises(KeyboardInterrupt):
                cage.attribute(inp, TARGET, units="word")
        with monkeypatch.context() as patch:
            stopping_after(patch, Own, 2)
            with pytest.raises(KeyboardInterrupt):
                cage.attribute(inp, TARGET, units="word", spool=tmp_path)
        assert len(RowSpool.read(tmp_path).rows) == 5
        plain = cage.attribute(inp, TARGET, units="word")
        kept = cage.attribute(inp, TARGET, units="word", spool=tmp_path)
        assert torch.equal(plain.seq_attr, kept.seq_attr)

    def test_drawn_rows_stay_in_a_folder_for_each_draw(
        self, model, tokenizer, tmp_path
    ):
        """A second call draws nothing."""
        inp = TextTokenInput(PROMPT, tokenizer)
        options = {"units": "sentence", "draws": 2, "n_samples": 8, "spool": tmp_path}
        one, other = (
            cage_of(model, tokenizer, KernelShap).attribute(inp, TARGET, **options)
            for _ in range(2)
        )
        assert torch.equal(one.seq_attr, other.seq_attr)
        assert np.array_equal(one.drawn.rows, other.drawn.rows)
        assert not np.array_equal(*one.drawn.rows)
        assert sorted(part.name for part in tmp_path.iterdir()) == ["draw-0", "draw-1"]

    def test_follow_up_questions_leave_it_alone(self, model, tokenizer, tmp_path):
        """They are about other rows."""
        inp = TextTokenInput(PROMPT, tokenizer)
        cage = cage_of(model, tokenizer, FeatureAblation)
        result = cage.attribute(inp, TARGET, units="sentence", spool=tmp_path)
        before = (tmp_path / "rows.bin").read_bytes()
        result.refine(top=1)
        result.repeat()
        assert (tmp_path / "rows.bin").read_bytes() == before

    def test_other_models_texts_and_settings_are_refused(
        self, model, tokenizer, tmp_path
    ):
        """By what is another; another span is not."""
        inp = TextTokenInput(PROMPT, tokenizer)
        cage = cage_of(model, tokenizer, FeatureAblation)
        options = {"units": "sentence", "spool": tmp_path}
        cage.attribute(inp, TARGET, **options)
        other = tiny_model("llama", vocab_size=len(tokenizer), seed=1)
        for what, call in {
            "the model's weights": lambda: cage_of(
                other, tokenizer, FeatureAblation
            ).attribute(inp, TARGET, **options),
            "the generated ids": lambda: cage.attribute(inp, TARGET[:-1], **options),
            "the source units": lambda: cage.attribute(
                inp, TARGET, **{**options, "units": "word"}
            ),
            "the share of a row that is kept": lambda: cage.attribute(
                inp, TARGET, sparsify=0.9, **options
            ),
            "the foil": lambda: cage.attribute(inp, TARGET, foil={"7": "9"}, **options),
            "the generated baseline": lambda: cage_of(
                model, tokenizer, FeatureAblation, generated_baseline=9
            ).attribute(inp, TARGET, **options),
        }.items():
            with pytest.raises(ValueError, match=f"spool: .*holds others:.*{what}"):
                call()
        cage.attribute(inp, TARGET, explain=-1, hops=0, **options)
        assert GraphAttributionResult.from_spool(tmp_path).hops == 0

    def test_a_folder_that_makes_no_result_is_named(self, model, tokenizer, tmp_path):
        """Whatever in its header is not as it was written."""
        cage_of(model, tokenizer, FeatureAblation).attribute(
            TextTokenInput(PROMPT, tokenizer), TARGET, units="word", spool=tmp_path
        )
        file = tmp_path / "spool.json"
        text = json.loads(file.read_text())
        for name in text["explanation"]:
            about = {**text["explanation"], name: 3}
            file.write_text(json.dumps({**text, "explanation": about}))
            if name in ("source_text", "generated_text", "hops"):
                continue
            with pytest.raises(ValueError, match="must be a spool of rows"):
                GraphAttributionResult.from_spool(tmp_path)


CALL = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from captum.attr import TextTokenInput
from conftest import PROMPT, TARGET
from test_spool import Own, cage_of
from tiny import tiny_model, tiny_tokenizer

tokenizer = tiny_tokenizer("bpe")
model = tiny_model("llama", vocab_size=len(tokenizer))
attribute, calls = Own.attribute, []

def counted(self, *args, **kwargs):
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return attribute(self, *args, **kwargs)

counted.__wrapped__ = attribute
Own.attribute = counted
inp = TextTokenInput(PROMPT, tokenizer)
cage_of(model, tokenizer).attribute(inp, TARGET, units="word", spool=sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_call_goes_on_without_a_row_computed_twice(
    model, tokenizer, tmp_path, monkeypatch
):
    """By SIGKILL, in another process, to the same bytes."""
    code = textwrap.dedent(CALL).format(path=sys.path)
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(RowSpool.read(tmp_path).rows) == 4
    inp = TextTokenInput(PROMPT, tokenizer)
    full = cage_of(model, tokenizer).attribute(inp, TARGET, units="word")
    calls = stopping_after(monkeypatch, Own, -1)
    done = cage_of(model, tokenizer).attribute(
        inp, TARGET, units="word", spool=tmp_path
    )
    assert len(calls) == full.graph.n_generated - 4
    assert torch.equal(done.seq_attr, full.seq_attr)
    assert np.array_equal(done.graph.rows, full.graph.rows)
