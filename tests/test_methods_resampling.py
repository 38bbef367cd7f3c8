"""Counterfactual resampling, with a writer whose habits are known."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import TextTokenInput
from torch import nn

from captum_cage import ChatTokenInput, TokenIdsInput
from captum_cage.methods.resampling import CounterfactualResampling
from tiny import image_input

PROMPT = "How many?"
ONE, TWO, LAST = " So one.", " So two.", " It is {}."
TARGET = ONE + LAST.format(7)
ANSWER = r"is (\d)"


class Writer(nn.Module):
    """Goes on with a text by fixed rules, at random; its calls are recorded."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.generation_config = SimpleNamespace(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=None
        )
        self.prefixes, self.arguments = [], []
        self.stop_after = math.inf
        self.was_training = []

    def generate(self, input_ids, attention_mask, num_return_sequences, **arguments):
        """As transformers does: the prompt again, then new ids, padded."""
        if len(self.prefixes) >= self.stop_after:
            raise KeyboardInterrupt
        assert input_ids.shape == attention_mask.shape == (1, input_ids.shape[1])
        assert attention_mask.all()
        self.was_training.append(self.training)
        self.prefixes.append(input_ids[0].tolist())
        self.arguments.append(arguments)
        before = self.tokenizer.decode(self.prefixes[-1])
        rows = [self._continuation(before) for _ in range(num_return_sequences)]
        longest = max(map(len, rows))
        pad = arguments["pad_token_id"]
        rows = [self.prefixes[-1] + row + [pad] * (longest - len(row)) for row in rows]
        return torch.tensor(rows)

    def _continuation(self, before):
        text, written = "", before.rstrip()
        if not written.endswith((".", "<eos>")):
            text += ONE if torch.rand(()) < 0.5 else TWO
        if not written.endswith(("7.", "8.")):
            likely = 7 if (written + text).endswith(ONE) else 8
            text += LAST.format(likely if torch.rand(()) < 0.8 else 15 - likely)
        if before.endswith(" "):
            text = text.lstrip()
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [*ids, self.tokenizer.eos_token_id]


@pytest.fixture
def writer(tokenizer):
    """A writer of its own for each test."""
    return Writer(tokenizer)


def resampling(writer, **changes):
    """Of few samples."""
    settings = {"answer": ANSWER, "samples": 40, "batch_size": 10, **changes}
    return CounterfactualResampling(writer, writer.tokenizer, **settings)


def attributed(writer, target=TARGET, *, inp=None, call=None, **changes):
    """The result of a fresh object."""
    inp = TextTokenInput(PROMPT, writer.tokenizer) if inp is None else inp
    return resampling(writer, **changes).attribute(inp, target, **(call or {}))


def divergence(one, other, more=1.0):
    """``KL(one || other)`` of two lists of answers, each count raised by ``more``."""
    answers = {*one, *other}

    def share(some, answer):
        return (some.count(answer) + more) / (len(some) + more * len(answers))

    return sum(
        share(one, a) * math.log(share(one, a) / share(other, a)) for a in answers
    )


def answers(samples):
    """The answers that came."""
    return [sample.answer for sample in samples if sample.answer is not None]


class TestImportance:
    """Which answers are compared."""

    def test_steps_are_the_sentences(self, writer):
        """With the tokens that they are made of."""
        result = attributed(writer)
        ids = writer.tokenizer.encode(TARGET)
        assert [step.text for step in result.steps] == ["So one.", "It is 7."]
        for step in result.steps:
            text = writer.tokenizer.decode(ids[step.start : step.stop])
            assert text.strip() == step.text
        assert result.answer == "7"

    def test_continuations_start_before_and_after_each_step(self, writer):
        """From the very ids of prompt and text; what follows a step is shared."""
        result = attributed(writer)
        prompt, ids = (writer.tokenizer.encode(t) for t in (PROMPT, TARGET))
        places = [0, result.steps[0].stop, len(ids)]
        expected = [[*prompt, *ids[:place]] for place in places for _ in range(4)]
        assert writer.prefixes == expected
        assert result.steps[0].kept == result.steps[1].resampled

    def test_samples_are_what_was_written(self, writer):
        """Ids up to the end, the first sentence, and the answer of the whole."""
        result = attributed(writer)
        end = writer.tokenizer.eos_token_id
        for sample in result.steps[0].resampled:
            text = writer.tokenizer.decode(sample.ids)
            assert sample.ids[-1] == end
            assert end not in sample.ids[:-1]
            assert text.startswith(" " + sample.first)
            assert sample.answer == text[-len("7.<eos>")]
        assert {s.first for s in result.steps[0].resampled} == {"So one.", "So two."}
        assert len(result.steps[0].resampled) == 40

    def test_importance_is_the_divergence_of_answers(self, writer):
        """Of all resamples, and of those that begin otherwise."""
        result = attributed(writer)
        for step in result.steps:
            other = [s for s in step.resampled if s.first != step.text]
            same = [s for s in step.resampled if s.first == step.text]
            assert step.differs == tuple(s.first != step.text for s in step.resampled)
            assert step.resampling == pytest.approx(
                divergence(answers(step.resampled), answers(step.kept))
            )
            assert step.counterfactual == pytest.approx(
                divergence(answers(other), answers([*step.kept, *same]))
            )
        # The first sentence decides; its own resamples often repeat it.
        first = result.steps[0]
        assert first.counterfactual > 2 * first.resampling > 0
        assert result.resampling.tolist() == [s.resampling for s in result.steps]
        assert result.counterfactual[0] == first.counterfactual

    @pytest.mark.parametrize("smoothing", [0.1, 5])
    def test_smoothing_is_added_to_every_count(self, writer, smoothing):
        """Of answers that occur on either side."""
        step = attributed(writer, smoothing=smoothing).steps[0]
        assert step.resampling == pytest.approx(
            divergence(answers(step.resampled), answers(step.kept), smoothing)
        )

    def test_what_counts_as_the_same_can_be_told(self, writer):
        """By a function of the original and the new unit."""
        asked = []

        def same(one, other):
            asked.append((one, other))
            return one[:2] == other[:2]

        result = attributed(writer, same=same)
        assert not any(result.steps[0].differs)
        assert math.isnan(result.steps[0].counterfactual)
        assert ("So one.", "So two.") in asked

    def test_white_space_makes_no_difference(self, writer):
        """Unless another function says so."""
        result = attributed(writer, " So  one." + LAST.format(7))
        assert 0 < sum(result.steps[0].differs) < 40

    def test_the_base_rate_is_that_of_the_prompt_alone(self, writer):
        """Share of the original answer among those from the beginning."""
        result = attributed(writer)
        given = answers(result.steps[0].resampled)
        assert result.base_rate == given.count("7") / len(given)
        assert 0.2 < result.base_rate < 0.8

    def test_answers_are_counted(self, writer):
        """On each of the three sides."""
        step = attributed(writer).steps[0]
        counts = step.answers
        assert counts["resampled"] == Counter(s.answer for s in step.resampled)
        assert counts["kept"] == Counter(s.answer for s in step.kept)
        assert counts["different"].total() == sum(step.differs)


class TestAnswers:
    """What the answer of a text is."""

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (r"is (\d)", "7"),
            (r"\w+", "7"),
            (r"(?i)SO (\w+)", "one"),
            (lambda text: len(text.split(".")), 3),
            (r"never", None),
        ],
    )
    def test_patterns_and_functions(self, writer, answer, expected):
        """The last match of a pattern, its group if it has one; what is returned."""
        assert attributed(writer, answer=answer).answer == expected

    def test_the_text_is_the_generated_one_without_special_tokens(self, writer):
        """From its beginning to its end, however it was continued."""
        texts = []
        attributed(writer, answer=texts.append)
        assert set(texts) == {
            first + LAST.format(n) for first in (ONE, TWO) for n in (7, 8)
        }

    def test_texts_without_an_answer_are_left_out(self, writer):
        """They are not answers of their own."""
        result = attributed(writer, answer=r"is (8)")
        assert set(result.steps[0].answers["resampled"]) == {"8", None}
        assert result.steps[0].resampling == 0.0

    def test_without_any_answer_there_is_nothing_to_compare(self, writer):
        """NaN, not zero; None in JSON."""
        result = attributed(writer, answer="never")
        assert np.isnan(result.resampling).all()
        assert math.isnan(result.base_rate)
        plain = result.to_dict()
        assert plain["base_rate"] is None
        assert plain["steps"][0]["counterfactual"] is None


class TestTexts:
    """Where texts end, and what goes in."""

    def test_nothing_follows_the_end_of_a_text(self, writer):
        """Its token is no step; the text itself is what is kept then."""
        result = attributed(writer, TARGET + "<eos>")
        assert [step.text for step in result.steps] == ["So one.", "It is 7."]
        assert len(writer.prefixes) == 12
        cut = attributed(writer, "<eos>" + TARGET)
        assert cut.steps[0].resampled[0].ids == ()
        assert {s.answer for s in cut.steps[0].resampled} == {None}

    def test_ids_are_never_tokenised_again(self, writer):
        """Neither those of the prompt nor those of the text."""
        odd = [9, 9, 9, 10]
        inp = TokenIdsInput(odd, writer.tokenizer)
        target = [*writer.tokenizer.encode(" So one."), 11, 11]
        attributed(writer, target, inp=inp, samples=1)
        assert writer.prefixes[0] == odd
        assert writer.prefixes[-1] == odd + target
        chat = ChatTokenInput([{"role": "user", "content": "Hi."}], writer.tokenizer)
        attributed(writer, target, inp=chat, samples=1)
        assert writer.prefixes[-1] == chat.inp_tensor[0].tolist() + target

    @pytest.mark.parametrize("units", ["word", lambda text: [(0, len(text))]])
    def test_other_units(self, writer, units):
        """By name or by a function; resamples are split in the same way."""
        result = attributed(writer, call={"units": units})
        texts = [step.text for step in result.steps]
        assert texts == (TARGET.split() if units == "word" else [TARGET.strip()])
        firsts = {s.first for s in result.steps[0].resampled}
        assert firsts <= {
            "So",
            *(f"So {a}. It is {b}." for a in ("one", "two") for b in (7, 8)),
        }

    def test_arguments_of_generate(self, writer):
        """The user's reach it; it samples, whatever they say."""
        call = {"gen_args": {"temperature": 0.5, "do_sample": False}}
        attributed(writer, call=call)
        tokens = len(writer.tokenizer.encode(TARGET))
        end = writer.tokenizer.eos_token_id
        for arguments in writer.arguments:
            assert arguments == {
                "temperature": 0.5,
                "do_sample": True,
                "max_new_tokens": 2 * tokens,
                "pad_token_id": end,
            }
        writer.arguments.clear()
        attributed(writer, call={"gen_args": {"max_new_tokens": 3}})
        assert writer.arguments[0]["max_new_tokens"] == 3

    def test_a_result_is_written_as_json(self, writer):
        """Numbers, answers and samples."""
        result = attributed(writer, answer=lambda text: (text[-2], 1))
        found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert found["answer"] == "('7', 1)"
        first = found["steps"][0]
        assert first["resampling"] == result.steps[0].resampling
        assert first["differ"] == sum(result.steps[0].differs)
        assert sum(n for _, n in first["answers"]["kept"]) == 40
        assert first["kept"][0]["ids"] == list(result.steps[0].kept[0].ids)


class TestSeeds:
    """Samples depend on the seed and their place, and on nothing else."""

    def test_the_same_seed_gives_the_same_samples(self, writer):
        """Whatever was drawn before; another seed gives others."""
        first = attributed(writer, seed=3)
        torch.rand(5)
        assert attributed(writer, seed=3) == first
        assert attributed(writer, seed=4) != first

    def test_batches_differ(self, writer):
        """And so do places."""
        result = attributed(writer, samples=80, batch_size=40)
        drawn = [s.answer for s in result.steps[1].resampled]
        assert drawn[:40] != drawn[40:]

    @pytest.mark.parametrize("fails", [False, True])
    def test_everything_is_left_as_it_was(self, writer, fails):
        """Random numbers and training mode, also after an interrupt."""
        inner = nn.Dropout()
        inner.eval()
        writer.add_module("inner", inner)
        writer.train()
        inner.training = False
        writer.stop_after = 3 if fails else math.inf
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        if fails:
            with pytest.raises(KeyboardInterrupt):
                attributed(writer)
        else:
            attributed(writer)
        assert torch.equal(torch.rand(3), expected)
        assert writer.training
        assert not inner.training
        assert not any(writer.was_training)

    def test_a_real_model_generates(self, fresh_model, tokenizer):
        """Twice the same; at most as many tokens as allowed."""
        inp = TextTokenInput(PROMPT, tokenizer)
        results = [
            CounterfactualResampling(
                fresh_model, tokenizer, answer=r"\S+", samples=3, batch_size=2
            ).attribute(inp, TARGET, gen_args={"max_new_tokens": 4})
            for _ in range(2)
        ]
        assert results[0] == results[1]
        lengths = {len(s.ids) for s in results[0].steps[0].resampled}
        assert lengths == {4}
        assert len({s.ids for s in results[0].steps[0].resampled}) == 3


class TestResume:
    """An interrupted call goes on from what was finished."""

    def test_by_the_same_object(self, writer):
        """The result is that of a call that was not interrupted."""
        expected = attributed(writer)
        writer.prefixes.clear()
        writer.stop_after = 5
        mine = resampling(writer)
        inp = TextTokenInput(PROMPT, writer.tokenizer)
        with pytest.raises(KeyboardInterrupt):
            mine.attribute(inp, TARGET)
        writer.stop_after = math.inf
        assert mine.attribute(inp, TARGET) == expected
        assert len(writer.prefixes) == 12

    @pytest.mark.parametrize("cut", [0, 1, 20])
    def test_by_another_object_with_the_same_file(self, writer, tmp_path, cut):
        """Also where its last line was cut off."""
        expected = attributed(writer)
        writer.prefixes.clear()
        call = {"resume": tmp_path / "samples.jsonl"}
        writer.stop_after = 5
        with pytest.raises(KeyboardInterrupt):
            attributed(writer, call=call)
        whole = call["resume"].read_bytes()
        assert whole.count(b"\n") == 6
        call["resume"].write_bytes(whole[: len(whole) - cut])
        writer.stop_after = math.inf
        assert attributed(writer, call=call) == expected
        assert len(writer.prefixes) == (12 if cut == 0 else 13)
        lines = call["resume"].read_text().splitlines()
        assert len(lines) == 13
        assert all(json.loads(line) for line in lines)
        writer.prefixes.clear()
        assert attributed(writer, call=call) == expected
        assert writer.prefixes == []

    def test_a_file_that_was_cut_off_in_its_first_line(self, writer, tmp_path):
        """Starts anew."""
        call = {"resume": str(tmp_path / "samples.jsonl")}
        expected = attributed(writer, call=call)
        path = tmp_path / "samples.jsonl"
        path.write_text(path.read_text()[:30])
        assert attributed(writer, call=call) == expected

    def test_more_samples_add_to_those_there_are(self, writer, tmp_path):
        """Whole batches count; the answer may be another."""
        call = {"resume": tmp_path / "samples.jsonl"}
        attributed(writer, samples=25, call=call)
        writer.prefixes.clear()
        expected = attributed(writer, answer=r"So (\w+)")
        writer.prefixes.clear()
        assert attributed(writer, answer=r"So (\w+)", call=call) == expected
        assert len(writer.prefixes) == 6

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"seed": 1}, "seed"),
            ({"batch_size": 5}, "batch_size"),
            ({"call": {"gen_args": {"temperature": 0.3}}}, "gen_args"),
            ({"target": TWO}, "target"),
            ({"inp": "How much?"}, "prompt"),
        ],
    )
    def test_a_file_of_something_else_is_refused(self, writer, tmp_path, change, name):
        """The error says what differs, and the file stays as it is."""
        path = tmp_path / "samples.jsonl"
        attributed(writer, call={"resume": path})
        before = path.read_bytes()
        if "inp" in change:
            change = {"inp": TextTokenInput(change["inp"], writer.tokenizer)}
        call = {"resume": path, **change.pop("call", {})}
        with pytest.raises(ValueError, match=f"resume: must .* whose {name} is anoth"):
            attributed(writer, call=call, **change)
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        "content", ["my thesis", "my thesis\n", '{"a": 1}\n', "[1]\n", ""]
    )
    def test_a_file_that_is_not_ours_is_left_alone(self, writer, tmp_path, content):
        """An empty one is as good as none."""
        path = tmp_path / "thesis"
        path.write_text(content)
        if not content:
            attributed(writer, call={"resume": path})
            return
        with pytest.raises(ValueError, match="CounterfactualResampling wrote, or none"):
            attributed(writer, call={"resume": path})
        assert path.read_text() == content

    def test_a_broken_line_in_the_middle_is_refused(self, writer, tmp_path):
        """Nothing is guessed."""
        path = tmp_path / "samples.jsonl"
        attributed(writer, call={"resume": path})
        lines = path.read_text().splitlines()
        for broken in ("{", '{"place": 0}'):
            path.write_text("\n".join([lines[0], broken, *lines[2:]]) + "\n")
            with pytest.raises(ValueError, match="which has a line"):
                attributed(writer, call={"resume": path})

    def test_progress_is_shown_on_request(self, writer, capsys):
        """On stderr."""
        attributed(writer)
        assert capsys.readouterr().err == ""
        attributed(writer, call={"show_progress": True})
        told = capsys.readouterr()
        assert "resamples" in told.err
        assert "12/12" in told.err
        assert told.out == ""


class TestErrors:
    """What cannot be done is said before any text is generated."""

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"answer": 5}, TypeError, "answer: must be a regular expression"),
            ({"answer": "("}, ValueError, "answer: must be a regular expression"),
            ({"samples": 0}, ValueError, "samples: must be 1 or more"),
            ({"batch_size": 0}, ValueError, "batch_size: must be 1 or more"),
            ({"seed": "x"}, TypeError, "seed: must be a whole number"),
            ({"smoothing": 0}, ValueError, "smoothing: must be a number above 0"),
            ({"smoothing": "x"}, ValueError, "smoothing: must be a number above 0"),
        ],
    )
    def test_settings(self, writer, changes, error, message):
        """When the object is made."""
        with pytest.raises(error, match=message):
            resampling(writer, **changes)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            ({"target": ""}, ValueError, "target: must have a token"),
            ({"target": "<eos>"}, ValueError, "must have a unit that is no special"),
            ({"target": [1.5]}, TypeError, "target: must be token ids"),
            ({"units": [(0, 3)]}, TypeError, "units: must be a name or a function"),
            ({"units": "page"}, ValueError, "units: must be one of"),
            ({"gen_args": {"inputs": 1}}, TypeError, "must not have 'inputs'"),
            ({"inp": "text"}, TypeError, "inp: must be one of Captum's"),
        ],
    )
    def test_questions(self, writer, call, error, message):
        """When it is asked."""
        call = dict(call)
        inp = call.pop("inp", TextTokenInput(PROMPT, writer.tokenizer))
        target = call.pop("target", TARGET)
        with pytest.raises(error, match=message):
            resampling(writer).attribute(inp, target, **call)
        assert writer.prefixes == []

    def test_a_model_must_generate(self, tokenizer):
        """Not every module does."""
        with pytest.raises(TypeError, match=r"Linear came, which has no generate\(\)"):
            CounterfactualResampling(nn.Linear(1, 1), tokenizer, answer="x")

    def test_images_are_refused(self, writer):
        """The method and the input are named."""
        inp = image_input(writer.tokenizer)
        with pytest.raises(
            TypeError, match=r"CounterfactualResampling.*ImageMaskInput"
        ):
            attributed(writer, inp=inp)

    def test_a_text_must_leave_room(self, writer):
        """In the model's context; what room there is bounds the new text."""
        length = len(writer.tokenizer.encode(PROMPT) + writer.tokenizer.encode(TARGET))
        writer.config = SimpleNamespace(max_position_embeddings=length)
        with pytest.raises(ValueError, match="must leave room"):
            attributed(writer)
        writer.config.max_position_embeddings = length + 2
        attributed(writer)
        assert writer.arguments[0]["max_new_tokens"] == 2
