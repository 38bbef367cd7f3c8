"""Tests of the answers on disk."""

import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from captum_cage.answers import AnswerCache

ROOT = Path(__file__).parents[1]
QUESTION = ["scores", "model", "Ana has", " 3 pens"]


@pytest.fixture
def cache(tmp_path):
    """A cache of ten answers in a folder that was not there."""
    found = AnswerCache(tmp_path / "new" / "folder", 10)
    yield found
    found.close()


def python(code, *arguments):
    """A Python of its own that runs some code; not waited for."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


class TestAnswers:
    """What comes back."""

    def test_what_was_kept_comes_back_to_the_last_bit(self, cache):
        """Numbers and texts, after the file was closed, too."""
        numbers = [-0.1, -1e-300, -0.0, -123.456]
        cache.keep(QUESTION, numbers)
        cache.keep(["text"], "caf\u00e9 \U0001f600 \ud800")
        cache.close()
        assert cache.numbers(QUESTION) == numbers
        assert cache.text(["text"]) == "caf\u00e9 \U0001f600 \ud800"

    def test_another_question_has_no_answer(self, cache):
        """Each part of a question counts, and where one ends."""
        cache.keep(QUESTION, [-1.0])
        for place in range(len(QUESTION)):
            other = list(QUESTION)
            other[place] += "x"
            assert cache.numbers(other) is None
        assert cache.numbers(["scores", "model", "Ana has 3", " pens"]) is None

    def test_a_new_answer_takes_the_place_of_the_old(self, cache):
        """One answer per question."""
        cache.keep(QUESTION, [-1.0])
        cache.keep(QUESTION, [-2.0, -3.0])
        assert cache.numbers(QUESTION) == [-2.0, -3.0]

    def test_the_oldest_answers_go(self, cache):
        """No more are kept than were asked for; a renewed one is new."""
        for number in range(12):
            cache.keep([number], [-1.0])
            cache.keep([0], [-5.0])
        known = [number for number in range(12) if cache.numbers([number])]
        assert len(known) <= 10
        assert {0, 11} <= set(known)
        assert 1 not in known

    def test_a_question_may_hold_any_text(self, cache):
        """Lone surrogates too, which have no UTF-8."""
        cache.keep(["\ud800"], [-1.0])
        assert cache.numbers(["\ud800"]) == [-1.0]
        assert cache.numbers(["?"]) is None

    def test_a_question_may_hold_what_json_has_not(self, cache):
        """By what it shows; arguments come in any order."""
        cache.keep(["text", {"stop": {1}, "n": 2}], "words")
        assert cache.text(["text", {"n": 2, "stop": {1}}]) == "words"
        assert cache.text(["text", {"n": 2, "stop": {2}}]) is None

    def test_it_is_sent_to_another_process_by_its_folder(self, cache):
        """A pickle holds no open file."""
        cache.keep(QUESTION, [-1.0])
        sent = pickle.loads(pickle.dumps(cache))
        assert sent.numbers(QUESTION) == [-1.0]
        sent.close()


class TestTrouble:
    """Kills, other processes and damage."""

    def test_what_was_kept_survives_a_kill(self, tmp_path):
        """SIGKILL in the midst of writing leaves every finished answer."""
        code = """
            import sys
            from captum_cage.answers import AnswerCache
            cache = AnswerCache(sys.argv[1], 100_000)
            for number in range(100_000):
                cache.keep([number], [-float(number)])
                print(number, flush=True)
        """
        process = python(code, tmp_path)
        for line in process.stdout:
            if int(line) >= 20:
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cache = AnswerCache(tmp_path, 100_000)
        found = [cache.numbers([number]) for number in range(21)]
        assert found == [[-float(number)] for number in range(21)]
        cache.close()

    def test_two_processes_write_to_one_folder(self, tmp_path):
        """All answers of both are there, from an empty folder on."""
        code = """
            import sys
            from captum_cage.answers import AnswerCache
            cache = AnswerCache(sys.argv[1], 10_000)
            for number in range(200):
                cache.keep([sys.argv[2], number], [-float(number)])
        """
        processes = [python(code, tmp_path, name) for name in "ab"]
        for process in processes:
            assert process.wait() == 0
            process.stdout.close()
        cache = AnswerCache(tmp_path, 10_000)
        for name in "ab":
            for number in range(200):
                assert cache.numbers([name, number]) == [-float(number)]
        cache.close()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_a_forked_process_opens_the_file_anew(self, cache):
        """SQLite forbids to carry an open file through a fork."""
        cache.keep(QUESTION, [-1.0])
        child = multiprocessing.get_context("fork").Process(
            target=cache.keep, args=(["child"], [-2.0])
        )
        child.start()
        child.join()
        assert cache.numbers(["child"]) == [-2.0]
        assert cache.numbers(QUESTION) == [-1.0]

    @pytest.mark.parametrize("what", ["text", "cut"])
    def test_a_damaged_file_is_refused_when_it_is_opened(self, cache, what):
        """The error says what to delete."""
        cache.keep(QUESTION, [-1.0])
        cache.close()
        data = cache.path.read_bytes()
        cache.path.write_bytes(b"no database" * 100 if what == "text" else data[:700])
        with pytest.raises(ValueError, match=r"cache: .* no such file: .*Delete it"):
            AnswerCache(cache.path.parent, 10)

    def test_another_program_s_file_and_another_version_are_refused(self, tmp_path):
        """Nothing is written to them."""
        path = tmp_path / "answers.sqlite3"
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE mine (x)")
        connection.close()
        before = path.read_bytes()
        with pytest.raises(ValueError, match="another program's"):
            AnswerCache(tmp_path, 10)
        assert path.read_bytes() == before
        path.unlink()
        AnswerCache(tmp_path, 10).close()
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
        with pytest.raises(ValueError, match="version is 99"):
            AnswerCache(tmp_path, 10)

    def test_an_answer_that_was_changed_counts_as_none(self, cache):
        """Its check sum tells."""
        cache.keep(QUESTION, [-1.0])
        cache.keep(["text"], "words")
        cache.close()
        with sqlite3.connect(cache.path) as connection:
            connection.execute("UPDATE answers SET answer = x'00000000000000c0'")
        connection.close()
        assert cache.numbers(QUESTION) is None
        assert cache.text(["text"]) is None

    def test_trouble_in_the_midst_is_a_warning(self, cache):
        """Told once; what cannot be kept is asked again."""
        cache.keep(QUESTION, [-1.0])
        with sqlite3.connect(cache.path) as connection:
            connection.execute("DROP TABLE answers")
        connection.close()
        with pytest.warns(UserWarning, match="cache: answers cannot be read"):
            assert cache.numbers(QUESTION) is None
        cache.keep(QUESTION, [-1.0])  # a second warning would be an error

    def test_trouble_when_the_file_is_opened_again_is_a_warning(self, cache):
        """As in a process that was forked."""
        cache.close()
        cache.path.unlink()
        cache.path.mkdir()
        with pytest.warns(UserWarning, match="cache: answers cannot be read"):
            cache.keep(QUESTION, [-1.0])
        assert cache.numbers(QUESTION) is None

    def test_a_file_in_the_folder_s_place_is_refused(self, tmp_path):
        """As any program would."""
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            AnswerCache(tmp_path / "file", 10)

    def test_a_database_that_cannot_be_opened_is_named(self, tmp_path):
        """With what to do."""
        (tmp_path / "answers.sqlite3").mkdir()
        with pytest.raises(OSError, match=r"cache: must be a folder that can be writ"):
            AnswerCache(tmp_path, 10)
