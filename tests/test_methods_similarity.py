"""Models that give text alone, against the similarities written out."""

from __future__ import annotations

import math
from difflib import SequenceMatcher
from itertools import combinations

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    RemoteLLMAttribution,
    ShapleyValueSampling,
    TextTemplateInput,
    TextTokenInput,
)

from captum_cage import GraphContextAttribution
from captum_cage.methods.similarity import TextSimilarityProvider
from captum_cage.methods.subsets import CLime, ContextCite, LShap
from tiny import tiny_tokenizer

FACTS = ["Ana has pens. ", "Mia has hats. ", "It rains. "]
GENERATED = " So Ana has pens. So Mia has hats."
METHODS = (FeatureAblation, ShapleyValueSampling, CLime, LShap, ContextCite)


def writer(prompt):
    """A model that repeats the facts that it reads, one after the other."""
    said = prompt.count("So")
    known = [fact for fact in ("Ana has pens.", "Mia has hats.") if fact in prompt]
    parts = [f" So {fact}" for fact in known][said:]
    return "".join(parts) + " That is all."


def overlap(text, target):
    """Share of characters that two texts have in common."""
    return SequenceMatcher(None, text, target, autojunk=False).ratio()


class Stub:
    """A model's placeholder that must not be asked for anything."""

    device = torch.device("cpu")

    def __call__(self, *_, **__):
        """Fail."""
        raise RuntimeError("a probability was asked for")

    forward = generate = __call__


def wrapped(method, provider, **more):
    """A method around a model that gives text alone."""
    return RemoteLLMAttribution(method(Stub()), tiny_tokenizer(), provider, **more)


def similarity_without(absent, before, target):
    """Similarity of what is written when some facts are gone, by hand."""
    prompt = "".join("" if i in absent else fact for i, fact in enumerate(FACTS))
    text = writer(prompt + before)
    return max(overlap(text[: len(target)], target), 1e-6)


@pytest.fixture
def inp():
    """Three facts."""
    return TextTemplateInput("{}{}{}", FACTS)


class TestValues:
    """What stands in for a probability."""

    @pytest.mark.parametrize(
        "target", [" So Ana has pens.", " So", " It rains.", GENERATED, "x"]
    )
    def test_log_probabilities_sum_to_the_log_of_the_similarity(self, target):
        """In equal parts, one per token."""
        tokenizer = tiny_tokenizer()
        provider = TextSimilarityProvider(writer, overlap)
        prompt = "".join(FACTS)
        logs = provider.get_logprobs(prompt, target, tokenizer)
        assert len(logs) == len(tokenizer.encode(target))
        assert len(set(logs)) == 1
        expected = overlap(writer(prompt)[: len(target)], target)
        assert math.exp(sum(logs)) == pytest.approx(max(expected, 1e-6))
        assert provider.get_logprobs(prompt, target) == [pytest.approx(sum(logs))]

    def test_what_the_model_writes_on_does_not_count(self):
        """Unless it is to."""
        of_beginning = TextSimilarityProvider(writer, overlap)
        of_all = TextSimilarityProvider(writer, overlap, cut=False)
        prompt, target = "".join(FACTS), " So Ana has pens."
        assert of_beginning.get_logprobs(prompt, target) == [0.0]
        (found,) = of_all.get_logprobs(prompt, target)
        expected = overlap(writer(prompt), target)
        assert expected < 0.7
        assert math.exp(found) == pytest.approx(expected)

    def test_logarithms_are_finite(self):
        """No similarity at all counts as the floor."""
        for floor in (1e-6, 0.25):
            provider = TextSimilarityProvider(writer, lambda *_: 0, floor=floor)
            assert provider.get_logprobs("", "x") == [math.log(floor)]

    @pytest.mark.parametrize(
        ("value", "expected"),
        [(np.float32(0.5), 0.5), (torch.tensor(0.5), 0.5), (1, 1), (1 + 1e-8, 1)],
    )
    def test_numbers_of_other_libraries_are_numbers(self, value, expected):
        """And rounding beyond the range is none."""
        provider = TextSimilarityProvider(writer, lambda *_: value)
        assert provider.get_logprobs("", "x") == [math.log(expected)]


class TestGeneration:
    """The user's function."""

    def test_each_prompt_is_asked_for_once(self):
        """For whatever targets."""
        prompts = []
        provider = TextSimilarityProvider(
            lambda prompt: prompts.append(prompt) or "x", overlap
        )
        for prompt in ("a", "b", "a", "b"):
            for target in ("x", "y"):
                provider.get_logprobs(prompt, target)
            provider.generate(prompt)
        assert prompts == ["a", "b"]

    def test_the_least_recent_prompts_are_forgotten(self):
        """When there are too many."""
        prompts = []
        provider = TextSimilarityProvider(
            lambda prompt: prompts.append(prompt) or "x", overlap, cache_size=2
        )
        for prompt in "abacab":
            provider.generate(prompt)
        assert prompts == ["a", "b", "c", "b"]

    def test_a_target_may_be_generated(self, inp):
        """By the same function, which alone decides how."""
        provider = TextSimilarityProvider(writer, overlap)
        cage = GraphContextAttribution(wrapped(FeatureAblation, provider))
        result = cage.attribute(inp)
        assert result.generated_text == GENERATED + " That is all."
        with pytest.raises(ValueError, match="gen_args: must be left out"):
            cage.attribute(inp, gen_args={"max_new_tokens": 3})


class TestAttribution:
    """Every method that perturbs takes it."""

    @pytest.mark.parametrize("attr_target", ["prob", "log_prob"])
    def test_ablation_is_the_similarity_that_is_lost(self, inp, attr_target):
        """Row by row, to the facts and to what was generated."""
        provider = TextSimilarityProvider(writer, overlap)
        llm_attr = wrapped(FeatureAblation, provider, attr_target=attr_target)
        cage = GraphContextAttribution(llm_attr)
        result = cage.attribute(inp, GENERATED, units="sentence")
        first, second = " So Ana has pens.", " So Mia has hats."
        scale = (lambda value: value) if attr_target == "prob" else math.log
        for row, (before, target) in enumerate([("", first), (first, second)]):
            plain = scale(similarity_without((), before, target))
            expected = [
                plain - scale(similarity_without((fact,), before, target))
                for fact in range(len(FACTS))
            ]
            found = result.graph.rows[row, : len(FACTS)]
            np.testing.assert_allclose(found, expected, atol=1e-5)
            assert np.abs(expected).max() > 0.1
            assert expected[2] == 0
        # Without the first sentence the model says it again.
        assert result.graph.rows[1, len(FACTS)] > 0.1

    def test_l_shap_is_a_shapley_value_of_similarities(self, inp):
        """Of three facts, which are all neighbours."""
        provider = TextSimilarityProvider(writer, overlap)
        llm_attr = wrapped(LShap, provider, attr_target="prob")
        target = " So Ana has pens."
        found = llm_attr.attribute(inp, target=target).seq_attr.numpy()
        expected = np.zeros(3)
        for fact in range(3):
            others = [i for i in range(3) if i != fact]
            for size in range(3):
                for gone in combinations(others, size):
                    lost = similarity_without(gone, "", target)
                    lost -= similarity_without((*gone, fact), "", target)
                    expected[fact] += lost / math.comb(2, size) / 3
        np.testing.assert_allclose(found, expected, atol=1e-6)

    @pytest.mark.parametrize("method", METHODS)
    def test_no_probability_is_ever_asked_for(self, inp, method):
        """The model is a stub that fails when it is called."""
        provider = TextSimilarityProvider(writer, overlap)
        torch.manual_seed(0)
        result = GraphContextAttribution(wrapped(method, provider)).attribute(
            inp, GENERATED, explain="hats", units="sentence"
        )
        assert result.meta["strategy"] == "loop"
        direct = result.graph.rows[1]
        assert direct[1] == max(direct) > 0

    def test_without_the_graph(self, inp):
        """By Captum's object alone, and for an input of tokens."""
        provider = TextSimilarityProvider(writer, overlap)
        llm_attr = wrapped(FeatureAblation, provider, attr_target="prob")
        target = " So Ana has pens."
        found = llm_attr.attribute(inp, target=target).seq_attr.numpy()
        expected = [
            1 - similarity_without((fact,), "", target) for fact in range(len(FACTS))
        ]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        tokens = TextTokenInput("".join(FACTS), llm_attr.tokenizer)
        assert llm_attr.attribute(tokens, target=target).seq_attr.max() > 0.1


class TestErrors:
    """What a user's functions can get wrong."""

    @pytest.mark.parametrize("value", [math.nan, -0.1, 1.1, math.inf, np.float64(2)])
    def test_a_similarity_out_of_its_range_is_refused(self, value):
        """With the target that it came for."""
        provider = TextSimilarityProvider(writer, lambda *_: value)
        with pytest.raises(ValueError, match=r"must give a number from 0 to 1.*' So'"):
            provider.get_logprobs("", " So")

    @pytest.mark.parametrize("value", [None, "0.5", [0.5], 1j])
    def test_a_similarity_must_be_a_number(self, value):
        """With the target that it came for."""
        provider = TextSimilarityProvider(writer, lambda *_: value)
        with pytest.raises(TypeError, match=r"similarity: must give a number.*' So'"):
            provider.get_logprobs("", " So")

    @pytest.mark.parametrize("text", [None, b"x", ["x"]])
    def test_a_model_must_write_text(self, text):
        """Nothing else is compared."""
        provider = TextSimilarityProvider(lambda _: text, overlap)
        with pytest.raises(TypeError, match="generate: must give the text"):
            provider.generate("")

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            ((None, overlap), {}, "generate: must be a function"),
            ((writer, 0.5), {}, "similarity: must be a function"),
            ((writer, overlap), {"floor": 0}, "floor: must be a similarity"),
            ((writer, overlap), {"floor": 1.0}, "floor: must be a similarity"),
            ((writer, overlap), {"floor": "0"}, "floor: must be a similarity"),
            ((writer, overlap), {"cache_size": 0}, "cache_size: must be 1 or more"),
        ],
    )
    def test_arguments_are_checked(self, arguments, options, message):
        """Before anything is written."""
        with pytest.raises((TypeError, ValueError), match=message):
            TextSimilarityProvider(*arguments, **options)
