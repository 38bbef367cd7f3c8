"""Receiver heads, against sums over all pairs of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import TextTemplateInput, TextTokenInput
from scipy.stats import kurtosis

from captum_cage import ChatTokenInput, TokenIdsInput
from captum_cage.methods import receiver_heads
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens. Mia has 4 pens. How many? Think! Read it."
TARGET = " She has 7. So she sells 9. The answer is 18. It costs nothing."


def read(inp=None, arch="llama", **options):
    """What is found for a small model, the model, and all ids."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(arch, vocab_size=len(tokenizer))
    inp = inp or TextTokenInput(PROMPT, tokenizer)
    found = receiver_heads(model, tokenizer, inp, TARGET, **options)
    ids = [*inp.to_model_input()[0].tolist(), *tokenizer.encode(TARGET)]
    return found, model, torch.tensor([ids])


def attention(model, ids):
    """Attention weights of a plain pass, ``(layers, heads, n, n)``."""
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        found = model(ids, output_attentions=True).attentions
    model.config._attn_implementation = "sdpa"
    return torch.cat(found).double().numpy()


def tokens_of(found, tokenizer, ids, prompt_text=PROMPT):
    """Positions of the tokens of each unit, by the characters that they cover."""
    texts = [tokenizer.decode([i]) for i in ids[0].tolist()]
    ends = np.cumsum([len(text) for text in texts]).tolist()
    visible: list[int] = []
    for text, end in zip(texts, ends, strict=True):
        # White space goes with the token before it.
        visible.append(end - len(text.lstrip()) if text.strip() else visible[-1])
    places = []
    for unit in found.units:
        offset = len(prompt_text) if unit.generated else 0
        start, stop = unit.span[0] + offset, unit.span[1] + offset
        places.append([i for i, at in enumerate(visible) if start <= at < stop])
    return places


class TestReceived:
    """What a unit receives in each head."""

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_it_is_the_mean_over_pairs_of_tokens_then_over_later_units(self, arch):
        """Every head's numbers equal a loop over units and pairs of their tokens."""
        found, model, ids = read(arch=arch, distance=2)
        weights = attention(model, ids)
        places = tokens_of(found, tiny_tokenizer(), ids)
        count = len(places)
        assert count == 9
        for unit in range(count - 2):
            later = [
                weights[:, :, places[other]][:, :, :, places[unit]].mean(axis=(2, 3))
                for other in range(unit + 2, count)
            ]
            expected = np.mean(later, axis=0)
            np.testing.assert_allclose(
                found.received[:, :, unit], expected, rtol=1e-4, atol=1e-7
            )

    def test_units_that_nothing_follows_at_the_distance_have_no_number(self):
        """The last ``distance`` units are NaN, and no others."""
        found, _, _ = read(distance=3)
        empty = np.isnan(found.scores)
        assert empty.tolist() == [False] * 6 + [True] * 3


class TestHeads:
    """Which heads are receiver heads."""

    def test_they_have_the_highest_kurtosis(self):
        """Heads are ordered by the kurtosis of what their units receive."""
        found, _, _ = read(heads=3, distance=2)
        narrow = kurtosis(found.received[:, :, :-2], axis=-1)
        best = np.argsort(-narrow.ravel())[:3]
        assert found.heads == tuple(divmod(int(i), narrow.shape[1]) for i in best)
        np.testing.assert_allclose(found.kurtosis, narrow)

    def test_scores_are_their_mean(self):
        """A unit's score is what it receives in the chosen heads, on average."""
        found, _, _ = read(heads=3, distance=2)
        mean = np.mean([found.received[layer, head] for layer, head in found.heads], 0)
        np.testing.assert_allclose(found.scores, mean)

    def test_more_heads_than_there_are_means_all(self):
        """The number of heads is bounded by the model's."""
        found, model, _ = read(heads=1000, distance=2)
        layers = model.config.num_hidden_layers
        assert len(found.heads) == layers * model.config.num_attention_heads


class TestUnits:
    """Which units count."""

    def test_the_prompt_can_be_left_out(self):
        """Only generated units are compared then; what they receive is the same."""
        whole, _, _ = read(distance=2)
        own, _, _ = read(distance=2, generated_only=True)
        assert all(unit.generated for unit in own.units)
        assert len(own.units) == 4
        np.testing.assert_allclose(own.received, whole.received[..., 5:])

    def test_headers_of_a_chat_are_no_units(self):
        """Tokens that are not attributed count for nothing."""
        chat = ChatTokenInput(
            [{"role": "user", "content": "Ana has 3 pens. How many?"}], tiny_tokenizer()
        )
        found, _, _ = read(chat, distance=2)
        texts = [unit.text for unit in found.units if not unit.generated]
        assert texts == ["Ana has 3 pens.", "How many?"]

    def test_groups_of_tokens_are_units_as_they_are(self):
        """An input's own features are its units."""
        tokenizer = tiny_tokenizer()
        ids = tokenizer.encode(PROMPT)
        half = len(ids) // 2
        mask = [0] * half + [1] * (len(ids) - half)
        found, _, _ = read(TokenIdsInput(ids, tokenizer, mask), distance=2)
        assert sum(not unit.generated for unit in found.units) == 2


class TestErrors:
    """What is refused."""

    def test_too_few_units_are_refused(self):
        """Two units must be followed at the distance, or heads cannot be compared."""
        with pytest.raises(ValueError, match="units: there must be at least 22"):
            read(distance=20)

    def test_templates_are_refused(self):
        """Their features are no tokens."""
        with pytest.raises(TypeError, match="receiver_heads needs a TextTokenInput"):
            read(TextTemplateInput("{} has 3 {}.", ["Ana", "pens"]))

    @pytest.mark.parametrize("name", ["heads", "distance"])
    def test_counts_must_be_one_or_more(self, name):
        """Zero heads, or no distance, mean nothing."""
        with pytest.raises(ValueError, match=f"{name}: must be 1 or more"):
            read(**{name: 0})

    def test_a_function_is_no_model(self):
        """The attention of something else cannot be read."""
        tokenizer = tiny_tokenizer()
        with pytest.raises(TypeError, match="receiver_heads: reads the inside"):
            receiver_heads(print, tokenizer, TextTokenInput("a", tokenizer), "b")
