"""Foils in a result, and what else a model might have written."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    RemoteLLMAttribution,
    TextTemplateInput,
    TextTokenInput,
)

from captum_cage import GraphContextAttribution, TokenIdsInput, TraceIdsInput
from captum_cage.foils import Alternative, Foil
from captum_cage.result import GraphAttributionResult
from tiny import LocalProvider, image_input, tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens."
TARGET = " Mia has 7 pens. So 7."


@pytest.fixture(scope="module")
def cage(model, tokenizer):
    """Ablation of a small Llama."""
    return GraphContextAttribution(LLMAttribution(FeatureAblation(model), tokenizer))


@pytest.fixture(scope="module")
def inp(tokenizer):
    """The prompt."""
    return TokenIdsInput(tokenizer.encode(PROMPT), tokenizer)


@pytest.fixture(scope="module")
def result(cage, inp):
    """Two units with foils, the later of which rests on the earlier one."""
    return cage.attribute(inp, TARGET, foil={3: "9", "7": "9"})


class TestFoil:
    """What a contrastive question is about."""

    def test_it_is_told_in_words(self):
        """Without the white space."""
        assert str(Foil(3, " 7", " 9\n")) == "'7' rather than '9'"

    def test_a_result_has_them_in_reading_order(self, result):
        """With the text that was written and the one in its place."""
        assert result.foils == (Foil(3, "7", "9"), Foil(8, "7", "9"))
        assert [str(foil) for foil in result.foils] == ["'7' rather than '9'"] * 2
        assert result.explained == (3, 8)

    def test_without_a_question_there_are_none(self, cage, inp):
        """And no other rows behind."""
        plain = cage.attribute(inp, TARGET)
        assert plain.foils == ()
        assert plain.graph.behind is None


class TestFiles:
    """A contrastive result that is saved."""

    def test_it_is_saved_with_its_numbers(self, result, tmp_path):
        """Foils, contrastive rows and the rows behind them."""
        result.save(tmp_path / "result")
        loaded = GraphAttributionResult.load(tmp_path / "result")
        assert loaded.foils == result.foils
        assert (loaded.graph.rows == result.graph.rows).all()
        assert loaded.graph.behind.steps.tolist() == [3, 8]
        behind = loaded.graph.behind.rows.toarray()
        assert (behind == result.graph.behind.rows.toarray()).all()
        for name in ("seq_attr", "step_attr", "token_attr", "positive_attr"):
            assert (getattr(loaded, name) == getattr(result, name)).all()
        assert [str(path) for path in loaded.paths(9)] == [
            str(path) for path in result.paths(9)
        ]
        for span in (-1, (2, 9)):
            one, other = loaded.explaining(span), result.explaining(span)
            assert one.foils == other.foils
            assert (one.seq_attr == other.seq_attr).all()

    @pytest.mark.parametrize(
        "cut", [{"tolerance": 0.5, "strategy": "loop"}, {"sparsify": 0.6}, {"hops": 1}]
    )
    def test_what_is_left_open_is_saved(self, cage, inp, tmp_path, cut):
        """Of the rows behind, too."""
        result = cage.attribute(inp, TARGET, foil={3: "9", "7": "9"}, **cut)
        result.save(tmp_path / "result")
        loaded = GraphAttributionResult.load(tmp_path / "result")
        assert loaded.unresolved == result.unresolved > 0
        assert (loaded.graph.behind.kept == result.graph.behind.kept).all()
        assert (loaded.seq_attr == result.seq_attr).all()
        assert loaded.explaining(-1).unresolved == result.explaining(-1).unresolved

    def test_json_and_pickle(self, result):
        """As other results."""
        written = json.loads(json.dumps(result.to_dict()))
        assert written["foils"] == [[3, "7", "9"], [8, "7", "9"]]
        copied = pickle.loads(pickle.dumps(result))
        assert copied.foils == result.foils
        assert (copied.seq_attr == result.seq_attr).all()

    def test_a_foil_of_no_unit_is_refused(self, result, tmp_path):
        """As of a file that is damaged."""
        path = tmp_path / "result.npz"
        result.save(path)
        with np.load(path) as archive:
            arrays = dict(archive)
        header = json.loads(arrays["header"].tobytes())
        header["foils"][0][0] = 99
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match="must be a result saved by"):
            GraphAttributionResult.load(path)


class TestAlternatives:
    """What else the model might have written at a place."""

    def next_probabilities(self, model, ids):
        """Of every token after a text, by one plain pass."""
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)

    @pytest.mark.parametrize("position", [0, 3, -1, -10])
    def test_they_are_the_likeliest_tokens_there(
        self, model, tokenizer, result, position
    ):
        """With their probabilities after the text before."""
        prompt, ids = tokenizer.encode(PROMPT), tokenizer.encode(TARGET)
        place = position % len(ids)
        expected = self.next_probabilities(model, [*prompt, *ids[:place]])
        order = expected.argsort(descending=True)
        found = result.alternatives(position, k=6)
        assert [one.id for one in found] == order[:6].tolist()
        assert [one.probability for one in found] == pytest.approx(
            expected[order[:6]].tolist(), rel=1e-4
        )
        every = result.alternatives(position, k=10**6)
        assert len(every) == len(expected)
        assert sum(one.probability for one in every) == pytest.approx(1.0)
        assert [one.id for one in every if one.written] == [ids[place]]
        text = tokenizer.decode([*prompt, *ids[:place]])
        for one in found:
            if one.text.isascii():
                whole = tokenizer.decode([*prompt, *ids[:place], one.id])
                assert whole == text + one.text

    def test_what_was_written_has_the_probability_that_it_has(self, result):
        """As in ``output_probs``."""
        for position in range(10):
            every = result.alternatives(position, k=10**6)
            (written,) = [one for one in every if one.written]
            assert isinstance(written, Alternative)
            assert written.probability == pytest.approx(
                float(result.output_probs[position]), rel=1e-4
            )
            assert written.text == result.output_tokens[position]

    def test_five_of_the_last_unit_unless_more_is_said(self, result):
        """Where an answer often stands."""
        assert result.alternatives() == result.alternatives(-1, 5)
        assert result.alternatives("7") == result.alternatives(8)
        assert result.alternatives("7 pens") == result.alternatives(3)

    def test_a_larger_unit_is_meant_by_its_first_token(self, cage, inp, result):
        """Of the unit, or of a text in it."""
        coarse = cage.attribute(inp, TARGET, units="sentence")
        assert coarse.alternatives(1) == result.alternatives(6)
        assert coarse.alternatives("7") == result.alternatives("7")

    def test_they_are_foils_to_ask_about(self, cage, inp, result):
        """By their ids, also where several of them make one character."""
        for one in result.alternatives("7", k=12):
            if not one.written:
                asked = cage.attribute(inp, TARGET, foil={"7": one.id})
                assert asked.foils == (Foil(8, "7", one.text),)

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ((10,), ValueError, "position: must be at least -10 and less than 10"),
            ((True,), TypeError, "position: must name a place in the generated text"),
            ((None,), TypeError, "position: must name a place in the generated text"),
            (("9",), ValueError, "'9' does not occur in the generated text"),
            ((0, 0), ValueError, "k: must be 1 or more"),
            ((0, 1.5), TypeError, "k: must be"),
        ],
    )
    def test_other_places_and_numbers_are_refused(
        self, result, arguments, error, match
    ):
        """With what there is."""
        with pytest.raises(error, match=match):
            result.alternatives(*arguments)

    def test_a_result_without_its_model_has_none(self, result, tmp_path):
        """One that was loaded or copied."""
        result.save(tmp_path / "result")
        loaded = GraphAttributionResult.load(tmp_path / "result")
        copied = pickle.loads(pickle.dumps(result))
        for other in (loaded, copied):
            with pytest.raises(
                ValueError, match="alternatives: must ask the model agai"
            ):
                other.alternatives()

    def test_a_remote_model_does_not_tell(self, model, tokenizer):
        """It scores given texts only."""
        provider = LocalProvider(model, tokenizer)
        method = FeatureAblation(RemoteLLMAttribution.placeholder_model)
        remote = RemoteLLMAttribution(method, tokenizer, provider)
        inp = TextTokenInput(PROMPT, tokenizer)
        result = GraphContextAttribution(remote).attribute(inp, TARGET, units="word")
        with pytest.raises(TypeError, match="alternatives: needs the model itself"):
            result.alternatives()

    def test_after_a_template(self, cage, model, tokenizer):
        """As it reads."""
        inp = TextTemplateInput("{} has 3 {}.", ["Ana", "pens"])
        found = cage.attribute(inp, TARGET).alternatives(0)
        expected = self.next_probabilities(model, tokenizer.encode(PROMPT))
        assert found[0].id == int(expected.argmax())
        assert found[0].probability == pytest.approx(float(expected.max()), rel=1e-4)

    def test_after_an_image(self, vision_model, tokenizer):
        """What the model sees."""
        cage = GraphContextAttribution(
            LLMAttribution(FeatureAblation(vision_model), tokenizer)
        )
        inp = image_input(tokenizer)
        with torch.no_grad():
            logits = vision_model(**inp.to_model_input()).logits[0, -1]
        found = cage.attribute(inp, [5, 9]).alternatives(0, k=3)
        expected = logits.double().softmax(-1).topk(3)
        assert [one.id for one in found] == expected.indices.tolist()
        assert [one.probability for one in found] == pytest.approx(
            expected.values.tolist(), rel=1e-4
        )

    def test_in_a_trace(self, cage, model, tokenizer):
        """After all that stands before, turns from outside too."""
        ids = tokenizer.encode("Ana has 3 pens. Mia has 4. So Ana has 7.")
        generated = np.zeros(len(ids), dtype=bool)
        generated[5:7] = generated[-3:] = True
        result = cage.attribute(TraceIdsInput(ids, tokenizer, generated))
        for position, place in ((0, 5), (1, 6), (2, len(ids) - 3)):
            expected = self.next_probabilities(model, ids[:place])
            (first,) = result.alternatives(position, k=1)
            assert first.id == int(expected.argmax())
            assert first.written == (first.id == ids[place])

    @pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece"])
    def test_with_other_tokenizers(self, kind):
        """Texts are those after the text before."""
        spelt = tiny_tokenizer(kind)
        model = tiny_model(vocab_size=len(spelt))
        cage = GraphContextAttribution(LLMAttribution(FeatureAblation(model), spelt))
        ids = spelt.encode("mia has pens.", add_special_tokens=False)
        inp = TokenIdsInput(spelt.encode("ana has"), spelt)
        result = cage.attribute(inp, ids)
        for position in range(len(ids)):
            every = result.alternatives(position, k=10**6)
            (written,) = [one for one in every if one.written]
            assert written.text == result.output_tokens[position]
