"""The directory of a batch: whole files, claims, and what a file may say."""

import errno
import json
import os
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
from captum.attr import TextTokenInput
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_cage import GraphAttributionResult
from captum_cage._checks import shown
from captum_cage.batch import Failure
from captum_cage.batch.directory import (
    Directory,
    Input,
    Manifest,
    Place,
    read_failure,
    read_manifest,
)
from tiny import tiny_cage

KEY, OTHER = "0" * 32, "0" * 31 + "1"  # which share a claim
VERSIONS = {"torch": "2"}
SETTINGS = {"units": "word", "options": {"n_samples": 3}}
MANIFEST = Manifest(
    VERSIONS,
    SETTINGS,
    {
        KEY: Input("done", (Place(0, 1, "a", {"n": 1, "x": 0.5, "b": True}),)),
        OTHER: Input("open", (Place(1), Place(7, None, "\ud800"))),
    },
)
FAILURE = Failure(KEY, "ValueError", "no", 3, 4, "a", "Traceback")


@pytest.fixture(scope="module")
def result(tokenizer):
    """A small result."""
    return tiny_cage().attribute(TextTokenInput("Ana has 3", tokenizer), " pens.")


@pytest.fixture
def directory(tmp_path):
    """An empty directory with a manifest."""
    made = Directory(tmp_path / "out").make()
    made.agree(SETTINGS, VERSIONS)
    return made


def files(directory):
    """All files but locks."""
    found = directory.path.rglob("*")
    return sorted(p.name for p in found if p.is_file() and p.suffix != ".lock")


class TestManifest:
    """What it says, and what it may not say."""

    def test_it_is_read_as_it_was_written(self):
        """Each field of each input."""
        assert read_manifest(MANIFEST.to_bytes()) == MANIFEST
        empty = Manifest(VERSIONS, SETTINGS)
        assert read_manifest(empty.to_bytes()) == empty

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"version": 2}, "must be of format version 1, but version int 2 came"),
            ({"version": True}, "must be of format version 1"),
            ({"format": "captum_cage.result"}, "it is none, or it is damaged"),
            ({"versions": {"torch": 2}}, "damaged"),
            ({"settings": []}, "damaged"),
            ({"inputs": {"../../etc/passwd": {}}}, "damaged"),
            ({"inputs": {KEY: {"status": "fine", "places": []}}}, "damaged"),
            ({"inputs": {KEY: {"status": "done", "places": [{}]}}}, "damaged"),
            ({"inputs": {KEY: 3}}, "damaged"),
        ],
    )
    def test_another_version_or_a_damaged_one_is_refused(self, change, match):
        """In words; a key is no path."""
        found = {**json.loads(MANIFEST.to_bytes()), **change}
        with pytest.raises(ValueError, match=match):
            read_manifest(json.dumps(found).encode())

    @pytest.mark.parametrize(
        "value", [[], {}, 2**63, "x" * 3, -1, True, None, float("inf")]
    )
    @pytest.mark.parametrize("name", ["position", "line", "id", "meta"])
    def test_a_place_holds_what_it_should(self, name, value):
        """It is read back as it is, or refused."""
        found = json.loads(MANIFEST.to_bytes())
        found["inputs"][KEY]["places"][0][name] = value
        with suppress(ValueError):
            place = read_manifest(json.dumps(found).encode()).inputs[KEY].places[0]
            assert getattr(place, name) == value
            assert isinstance(place.meta, dict)
            assert type(place.position) is int

    @settings(max_examples=100)
    @given(st.integers(0), st.binary(max_size=4), st.integers(0, 3))
    def test_damage_is_found_or_does_no_harm(self, place, content, cut):
        """Bytes written over, and cut out, of both files."""
        for data, read in [
            (MANIFEST.to_bytes(), read_manifest),
            (json.dumps(vars(FAILURE)).encode(), read_failure),
        ]:
            at = place % len(data)
            with suppress(ValueError):
                read(data[:at] + content + data[at + cut :])

    @given(st.binary() | st.sampled_from([b"[" * 100_000, b"null", b"1" * 5000]))
    def test_no_bytes_raise_anything_else(self, data):
        """ValueError alone."""
        for read in (read_manifest, read_failure):
            with pytest.raises(ValueError, match="must be a file that captum_cage"):
                read(data)


class TestFiles:
    """Each is whole, or it is not there."""

    def test_a_result_is_kept_and_replaces_its_error(self, directory, result):
        """What was under way is gone."""
        directory.fail(FAILURE)
        assert directory.failure(KEY) == FAILURE
        directory.spool(KEY).mkdir()
        directory.save(KEY, result)
        assert directory.is_done(KEY)
        assert directory.failure(KEY) is None
        assert not directory.spool(KEY).exists()
        again = GraphAttributionResult.load(directory.result_file(KEY))
        assert again.seq_attr.equal(result.seq_attr)
        assert files(directory) == sorted(
            [f"{KEY}.npz", f"{KEY}.parquet", "manifest.json"]
        )

    @pytest.mark.parametrize("key", ["../x", "", "0" * 31, "A" * 32, None, "0" * 33])
    def test_nothing_but_a_hash_names_a_file(self, directory, key):
        """So no path leads out of the directory."""
        for name in (
            directory.result_file,
            directory.error_file,
            directory.score_file,
            directory.spool,
        ):
            with pytest.raises(ValueError, match=shown(key)):
                name(key)

    @pytest.mark.parametrize("call", range(1, 5))
    def test_a_full_disk_leaves_nothing_half(
        self, directory, result, monkeypatch, call
    ):
        """Whichever of the writes fails; afterwards the same works."""
        calls = []
        real = os.fsync

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            directory.save(KEY, result)
        assert [*(directory.path / "saving").iterdir()] == []
        if directory.is_done(KEY):
            GraphAttributionResult.load(directory.result_file(KEY))
        directory.save(KEY, result)
        assert directory.is_done(KEY)

    def test_a_manifest_that_cannot_be_written_stays_as_it_was(
        self, directory, monkeypatch
    ):
        """The one before is whole."""
        before = directory.manifest()

        def full(path, data):
            with path.open("wb") as file:
                file.write(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            directory.noted({KEY: [Place(0)]})
        monkeypatch.undo()
        assert directory.manifest() == before
        assert files(directory) == ["manifest.json"]

    def test_a_folder_that_cannot_be_is_refused(self, tmp_path):
        """Below a file, and what is no path."""
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            Directory(tmp_path / "file" / "out").make()
        with pytest.raises(TypeError, match="out: must name a folder, but int 3 came"):
            Directory(3)


class TestSharing:
    """What several processes do in one directory."""

    def test_a_claim_is_held_by_one(self, directory):
        """Until it gives it back."""
        with directory.claim(KEY) as ours, directory.claim(OTHER) as theirs:
            assert (ours, theirs) == (True, False)
        with directory.claim(OTHER) as ours:
            assert ours

    def test_the_kernel_gives_back_the_claim_of_a_killed_process(self, directory):
        """So the next one has not to wait."""
        context = get_context("fork")
        ours, theirs = context.Pipe()

        def hold():
            with directory.claim(KEY) as found:
                theirs.send(found)
                theirs.recv()

        process = context.Process(target=hold)
        process.start()
        assert ours.recv() is True
        with directory.claim(KEY) as found:
            assert not found
        process.kill()
        with directory.claim(KEY, wait=True) as found:
            assert found
        process.join()

    def test_other_settings_are_refused_by_name(self, directory):
        """What it was and what it is; the same ones are not."""
        changed = {"units": "token", "options": {"n_samples": 5}, "seed": 1}
        expected = (
            "units was 'word' and is 'token'; options.n_samples was 3 and is 5; "
            "seed was None and is 1"
        )
        with pytest.raises(ValueError, match=expected):
            directory.agree(changed, VERSIONS)
        assert directory.agree(SETTINGS, {"torch": "3"}) == VERSIONS

    def test_notes_of_several_add_up(self, directory, result):
        """Each place once, with what became of it."""
        directory.save(KEY, result)
        directory.noted({KEY: [Place(0, id="a")], OTHER: [Place(1)]})
        directory.fail(Failure(OTHER, "ValueError", "no"))
        directory.noted({KEY: [Place(0, id="a"), Place(5, id="b")]})
        found = directory.manifest().inputs
        assert found == {
            KEY: Input("done", (Place(0, id="a"), Place(5, id="b"))),
            OTHER: Input("failed", (Place(1),)),
        }
