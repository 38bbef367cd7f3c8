"""Examples of a batch: fields, errors, hashes, files."""

import json
import re
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from captum.attr import TextTemplateInput, TextTokenInput
from hypothesis import given as drawn
from hypothesis import strategies as st

from captum_cage import Part
from captum_cage.batch import Example, examples
from captum_cage.batch.examples import digest, given, read_example, total

RECORDS = [
    {"prompt": "Ana has 3 pens.", "target": " 7", "explain": "7", "id": "a"},
    {"prompt": "Mia has 4.", "target": [1, 2], "explain": [0, 2], "level": 3},
    {"messages": [{"role": "user", "content": "Who?"}], "explain": {"regex": r"\d"}},
]


def write_lines(path, *lines, end=b"\n"):
    """A file of JSON lines."""
    encoded = [
        one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines
    ]
    path.write_bytes(b"".join(one + end for one in encoded))
    return path


def keys(source):
    """Hashes of all examples, none of which is bad."""
    found = list(given(source))
    assert [one.error for one in found] == [None] * len(found)
    return [one.key for one in found]


class TestFields:
    """What a record means."""

    @pytest.mark.parametrize(
        ("form", "meaning"),
        [
            ("7", "7"),
            (-1, -1),
            ([0, 2], (0, 2)),
            ({"regex": r"\d+"}, re.compile(r"\d+")),
            ({"regex": None, "part": "answer"}, Part.ANSWER),
            ({"part": "think"}, Part.THINK),
        ],
    )
    def test_explain_has_a_form_in_json(self, form, meaning):
        """A text, a position, a range, a pattern or a part."""
        example = Example.of({"prompt": "x", "explain": form})
        assert example.explain == meaning
        assert type(example.explain) is type(meaning)

    def test_a_null_is_as_absent_and_what_is_no_field_is_kept(self):
        """As Parquet and data sets fill their records up."""
        example = Example.of({"prompt": "x", "foil": None, "messages": None, "n": 1})
        assert example.foil is None
        assert example.meta == {"n": 1}
        assert example.key == Example("x").key

    def test_places_of_foils_may_be_positions(self):
        """Pairs, since a key of JSON is a text."""
        pairs = [[3, " 8"], ["7", " 9"], [{"regex": "a"}, [5]]]
        example = Example.of({"prompt": "x", "foil": pairs})
        assert example.foil == {3: " 8", "7": " 9", re.compile("a"): [5]}

    def test_units_of_json_are_ranges(self):
        """Lists of two become what attribute takes."""
        units = {"source": [[0, 1], [1, 2]], "generated": "word"}
        example = Example.of({"prompt": "x", "units": units})
        assert example.units == {"source": [(0, 1), (1, 2)], "generated": "word"}

    def test_scalars_of_meta_go_on(self):
        """What fits into a table; the rest stays with the example."""
        meta = {
            "text": "a\ud800",
            "yes": np.bool_(True),
            "n": np.int64(3),
            "share": np.float32(0.5),
            "none": None,
            "list": [1],
            "large": 2**70,
            "nan": float("nan"),
        }
        expected = {"text": "a\\ud800", "yes": True, "n": 3, "share": 0.5, "none": None}
        assert Example("x", meta=meta).scalars == expected

    def test_the_prompt_is_read_as_captum_and_chats_do(self, tokenizer):
        """Text tokens, messages through the template, inputs as they are."""
        inp = TextTemplateInput("{} has", ["Ana"])
        read = Example("Ana has").input(tokenizer)
        assert read.values == TextTokenInput("Ana has", tokenizer).values
        chat = Example(messages=[{"role": "user", "content": "Ana has"}])
        assert chat.input(tokenizer).values == ["Ana", " has"]
        assert Example(inp).input(tokenizer) is inp

    @pytest.mark.parametrize(
        ("record", "error", "match"),
        [
            ({}, ValueError, "prompt: must be given"),
            ({"prompt": "x", "messages": []}, ValueError, "both came"),
            ({"prompt": 3}, TypeError, "prompt: must be a text, but int 3"),
            ({"messages": "x"}, TypeError, "messages"),
            ({"prompt": "x", "target": 1.5}, TypeError, "target: must be a text or"),
            ({"prompt": "x", "target": [1, True]}, TypeError, "whole numbers"),
            ({"prompt": "x", "explain": {"regex": "("}}, ValueError, "regular expr"),
            ({"prompt": "x", "explain": {"part": "end"}}, TypeError, "explain: must"),
            ({"prompt": "x", "explain": 1.5}, TypeError, "explain: must"),
            ({"prompt": "x", "explain": [1]}, TypeError, "explain: must"),
            ({"prompt": "x", "units": "letter"}, ValueError, "units"),
            ({"prompt": "x", "foil": "y"}, TypeError, "foil: must be a mapping"),
            ({"prompt": "x", "foil": [[1, 2, 3]]}, TypeError, "foil: must be a mapp"),
            ({"prompt": "x", "gen_args": 3}, TypeError, "gen_args: must be a mapping"),
            ({"prompt": "x", "id": [1]}, TypeError, "id: must be a text"),
            ({"prompt": "x", "id": True}, TypeError, "id: must be a text"),
            (["prompt"], TypeError, "example: must be a mapping"),
        ],
    )
    def test_a_wrong_field_is_named(self, record, error, match):
        """By the sentence of all our errors."""
        with pytest.raises(error, match=match):
            Example.of(record)

    def test_meta_is_a_mapping(self):
        """In Python it can be anything."""
        with pytest.raises(TypeError, match="meta: must be a mapping"):
            Example("x", meta=[1])

    @drawn(
        st.one_of(
            st.binary(),
            st.text(),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            ).map(json.dumps),
            st.fixed_dictionaries(
                {"prompt": st.just("x") | st.integers()},
                optional={
                    name: st.integers() | st.lists(st.integers()) | st.text()
                    for name in ("explain", "units", "foil", "target", "gen_args", "id")
                },
            ).map(json.dumps),
        )
    )
    def test_any_line_is_an_example_or_a_documented_error(self, line):
        """Nothing but TypeError and ValueError."""
        with suppress(TypeError, ValueError):
            assert len(read_example(line).key) == 32

    @pytest.mark.parametrize(
        "line", [b"[" * 100_000, b'{"prompt": NaN}', b"\xff", b"3", b'{"prompt": "x"']
    )
    def test_a_line_that_is_no_object_is_refused(self, line):
        """However deep it nests."""
        with pytest.raises((TypeError, ValueError), match="line: must be a JSON obj"):
            read_example(line)


class TestHashes:
    """What makes two examples the same."""

    def test_the_hash_is_of_what_is_asked(self):
        """Each field counts, name and meta do not, nor the form of a range."""
        base = {"prompt": "x", "target": " y", "explain": [0, 1]}
        same = [
            Example.of({**base, "id": "a", "n": 1}),
            Example("x", target=" y", explain=(np.int64(0), 1)),
        ]
        others = [
            {**base, "prompt": "y"},
            {**base, "target": [1]},
            {**base, "explain": 0},
            {**base, "explain": {"regex": "0"}},
            {**base, "units": "word"},
            {**base, "foil": {"y": "z"}},
            {**base, "gen_args": {"max_new_tokens": 3}},
            {"messages": [{"role": "user", "content": "x"}]},
        ]
        found = {Example.of(one).key for one in [base, *others]}
        assert len(found) == len(others) + 1
        assert {one.key for one in same} == {Example.of(base).key}

    def test_inputs_are_hashed_by_what_they_hold(self, tokenizer):
        """Ids, masks, templates and functions, not by their place in memory."""

        def template(*parts):
            return "! ".join(parts)

        def other(*parts):
            return "? ".join(parts)

        def inputs():
            return [
                TextTokenInput("Ana has", tokenizer),
                TextTokenInput("Mia has", tokenizer),
                TextTokenInput("Ana has", tokenizer, baselines=1),
                TextTemplateInput("{} has", ["Ana"]),
                TextTemplateInput("{} had", ["Ana"]),
                TextTemplateInput(template, ["Ana"]),
                TextTemplateInput(other, ["Ana"]),
            ]

        first, again = ([Example(one).key for one in inputs()] for _ in range(2))
        assert first == again
        assert len(set(first)) == len(first)

    def test_tensors_and_arrays_are_hashed_by_their_bytes(self):
        """Type, shape and values, of bfloat16 and of scalars, too."""
        made = [
            lambda: torch.tensor([1, 2]),
            lambda: torch.tensor([[1, 2]]),
            lambda: torch.tensor([1, 2], dtype=torch.bfloat16),
            lambda: torch.tensor(1),
            lambda: torch.zeros(0),
            lambda: np.array([1, 2]),
            lambda: np.array([1.0, 2.0]),
            lambda: slice(1, 2),
            lambda: b"12",
            lambda: {1, 2},
            lambda: 2.0,
            lambda: 2,
            lambda: True,
        ]
        found = [digest(one()) for one in made]
        assert found == [digest(one()) for one in made]
        assert len(set(found)) == len(found)

    def test_a_hash_is_the_same_in_every_process(self):
        """Whatever the seed of Python's own hashes."""
        known = "716125ce2960595f9dcee0386cbeaee8"
        assert digest({"prompt": "x", "explain": (0, 1)}) == known

    def test_what_has_no_hash_is_refused(self):
        """By name, since a second start could not know it again."""
        with pytest.raises(TypeError, match="Without a hash a second start"):
            digest({"a": object()})
        nested: list = []
        nested.append(nested)
        with pytest.raises(ValueError, match="must not nest deep"):
            digest(nested)


class TestSources:
    """Files and iterables, one example at a time."""

    def test_lines_end_as_they_like(self, tmp_path):
        """CRLF, a byte order mark, empty lines and no end at all."""
        plain = write_lines(tmp_path / "a.jsonl", *RECORDS)
        odd = tmp_path / "b.JSONL"
        lines = [json.dumps(one).encode() for one in RECORDS]
        odd.write_bytes(b"\xef\xbb\xbf\r\n\r\n" + b"\r\n  \r\n".join(lines))
        assert keys(odd) == keys(plain) == keys(RECORDS)
        assert [one.line for one in given(odd)] == [3, 5, 7]
        assert [one.position for one in given(odd)] == [0, 1, 2]
        assert total(plain) == total(odd) == len(RECORDS)

    def test_a_bad_line_is_told_with_its_number_and_the_rest_is_read(self, tmp_path):
        """Its error stands in its place."""
        bad = [b"{", b'{"id": "b"}', RECORDS[0]]
        found = list(given(write_lines(tmp_path / "a.jsonl", *bad)))
        assert [type(one.error) for one in found] == [ValueError] * 2 + [type(None)]
        assert [one.line for one in found] == [1, 2, 3]
        assert len({one.key for one in found}) == 3

    def test_a_line_too_long_is_not_kept(self, tmp_path, monkeypatch):
        """It is an error of its own, and the next line is read."""
        monkeypatch.setattr(examples, "LONGEST_LINE", 100)
        path = write_lines(tmp_path / "a.jsonl", {"prompt": "x" * 300}, RECORDS[0])
        first, second = given(path)
        assert "must have at most 100 bytes" in str(first.error)
        assert second.error is None
        assert (first.line, second.line) == (1, 2)

    def test_parquet_says_what_lines_say(self, tmp_path):
        """The same examples, nulls in the columns that they lack."""
        records = [
            {"prompt": "a", "target": [1, 2], "explain": {"regex": "1", "part": None}},
            {"messages": [{"role": "user", "content": "b"}], "gen_args": {"top_k": 1}},
            {"prompt": "c", "target": None, "level": 3},
        ]
        names = dict.fromkeys(name for one in records for name in one)
        columns = {name: [one.get(name) for one in records] for name in names}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        assert keys(tmp_path / "a.parquet") == keys(records)
        assert total(tmp_path / "a.parquet") == 3

    def test_a_generator_is_read_as_it_is_needed(self):
        """Its first example comes before the second is made."""
        made = []

        def endless():
            while True:
                made.append(1)
                yield RECORDS[0]

        stream = given(endless())
        next(stream)
        assert len(made) == 1
        assert total(endless()) is None

    def test_data_sets_are_iterables(self):
        """Those of datasets, with their nulls."""
        datasets = pytest.importorskip("datasets")
        records = [{"prompt": "a", "level": 1}, {"prompt": "b", "level": None}]
        data = datasets.Dataset.from_list(records)
        assert keys(data) == keys(records) == keys(data.to_iterable_dataset())
        assert total(data) == 2

    @pytest.mark.parametrize("wrong", [3, {"prompt": "x"}, Example("x"), b"x"])
    def test_what_gives_no_examples_is_refused(self, wrong):
        """A single one, too."""
        with pytest.raises(TypeError, match="examples: must be a path, or give"):
            given(wrong)

    def test_a_file_is_opened_at_once(self, tmp_path):
        """A wrong name is found before any work."""
        with pytest.raises(FileNotFoundError):
            given(tmp_path / "none.jsonl")
        with pytest.raises(ValueError, match=r"ends in \.jsonl, \.ndjson or \.parquet"):
            given(tmp_path / "a.csv")
        (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(ValueError, match="must be a Parquet file"):
            given(str(tmp_path / "a.parquet"))

    def test_what_is_no_example_has_a_hash_too(self):
        """By its looks, if by nothing else."""
        (one,) = given([object])
        assert len(one.key) == 32
        assert isinstance(one.error, TypeError)
