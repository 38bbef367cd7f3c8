"""Attention suppression, against passes with a mask written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation, LLMAttribution
from transformers import DynamicCache

from captum_cage import GraphContextAttribution, TokenIdsInput
from captum_cage.methods import AttentionSuppression
from captum_cage.methods.suppression import hidden_tokens
from captum_cage.testing import check_engine
from test_metrics_regeneration import logits_after
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana. How many?"
TARGET = " The answer is 18. So she sells 9."
EFFECTS = ("kl", "log_prob")


def small(arch="llama", dtype=torch.float64):
    """A small model."""
    return tiny_model(arch, vocab_size=len(tiny_tokenizer()), dtype=dtype)


def ids_of(text=PROMPT):
    """Token ids of a text."""
    return tiny_tokenizer().encode(text)


def by_hand(model, ids, inside, targets, effect):
    """Effect on each target of hiding the ids inside a unit, by two masked passes."""
    whole = torch.tensor([[*ids, *targets[:-1]]])
    n = whole.shape[1]
    unit = np.zeros(n, dtype=bool)
    unit[: len(ids)] = inside
    masks = []
    for hides in (False, True):
        mask = torch.zeros((1, 1, n, n), dtype=model.dtype)
        for query in range(n):
            for key in range(n):
                hidden = hides and unit[key] and not unit[query]
                if key > query or hidden:
                    mask[0, 0, query, key] = -1e9
        masks.append(mask)
    with torch.no_grad():
        plain, changed = (
            model(whole, attention_mask=mask).logits[0, len(ids) - 1 :].log_softmax(-1)
            for mask in masks
        )
    if effect == "kl":
        return (plain.exp() * (plain - changed)).sum(-1).double().numpy()
    places = torch.arange(len(targets))
    return (plain - changed)[places, torch.tensor(targets)].double().numpy()


class TestEffects:
    """What hiding a unit changes."""

    @pytest.mark.parametrize("effect", ["kl", "log_prob"])
    @pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
    def test_they_equal_passes_with_a_mask(self, arch, effect):
        """Of each token of the prompt, the first and the last too."""
        model, ids = small(arch), ids_of()
        targets = tiny_tokenizer().encode(TARGET)[:4]
        method = AttentionSuppression(model, effect)
        found = method.effects(ids, np.arange(len(ids)), torch.tensor(targets))
        for unit in (0, 1, 7, len(ids) - 2, len(ids) - 1):
            inside = np.arange(len(ids)) == unit
            expected = by_hand(model, ids, inside, targets, effect)
            np.testing.assert_allclose(found[:, unit], expected, atol=1e-9)

    @pytest.mark.parametrize("effect", ["kl", "log_prob"])
    def test_a_unit_in_pieces_is_hidden_from_what_stands_between(self, effect):
        """Its own tokens see each other; all others do not see it."""
        model, ids = small(), ids_of()
        targets = tiny_tokenizer().encode(TARGET)[:4]
        groups = np.array([(i // 3) % 2 for i in range(len(ids))])
        found = AttentionSuppression(model, effect).effects(
            ids, groups, torch.tensor(targets)
        )
        for unit in (0, 1):
            expected = by_hand(model, ids, groups == unit, targets, effect)
            np.testing.assert_allclose(found[:, unit], expected, atol=1e-9)

    def test_the_last_token_predicts_as_before_when_it_alone_is_hidden(self):
        """Who predicts sees itself: the first target's effect is none."""
        ids = ids_of()
        targets = torch.tensor(tiny_tokenizer().encode(TARGET)[:4])
        found = AttentionSuppression(small()).effects(ids, np.arange(len(ids)), targets)
        assert abs(float(found[0, -1])) < 1e-12
        assert float(found[1:, -1].abs().max()) > 1e-6


class TestEngine:
    """All rows at once."""

    @pytest.mark.parametrize(
        ("arch", "effect", "units"),
        [
            *((arch, effect, "token") for arch in ARCHITECTURES for effect in EFFECTS),
            *(("gemma3", effect, "sentence") for effect in EFFECTS),
        ],
    )
    def test_rows_are_the_loops(self, arch, effect, units):
        """Whatever the architecture, the effect and the units."""
        method = AttentionSuppression(small(arch), effect)
        llm_attr = LLMAttribution(method, tiny_tokenizer())
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        check_engine(llm_attr, inp, TARGET, units=units)

    @pytest.mark.parametrize("batch_size", [1, 3, 1000])
    def test_rows_do_not_depend_on_the_batch(self, batch_size):
        """One unit at a time, or all of them."""
        llm_attr = LLMAttribution(AttentionSuppression(small()), tiny_tokenizer())
        groups = [(i // 3) % 4 for i in range(len(ids_of()))]
        inp = TokenIdsInput(ids_of(), tiny_tokenizer(), groups)
        check_engine(llm_attr, inp, TARGET, batch_size=batch_size)

    def test_passes_start_where_something_changes(self, monkeypatch):
        """Fewer tokens are pushed than units times length."""
        model = small()
        pushed = []
        plain = model.forward

        def counted(input_ids, **kwargs):
            pushed.append(input_ids.numel())
            return plain(input_ids=input_ids, **kwargs)

        monkeypatch.setattr(model, "forward", counted)
        llm_attr = LLMAttribution(AttentionSuppression(model), tiny_tokenizer())
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        result = GraphContextAttribution(llm_attr).attribute(
            inp, TARGET, strategy="fused", batch_size=1
        )
        units = len(result.units)
        assert sum(pushed) < 0.75 * units * units

    @pytest.mark.parametrize("kind", [AttentionSuppression, FeatureAblation])
    def test_a_model_that_takes_some_prefixes_only_reads_whole_texts(
        self, monkeypatch, kind
    ):
        """Where a pass from a prefix fails, the text is read from its beginning."""
        model = small()
        failed = []
        plain = model.forward

        def fussy(*args, past_key_values=None, **kwargs):
            length = 0 if past_key_values is None else past_key_values.get_seq_length()
            if 0 < length < 15:
                failed.append(length)
                raise RuntimeError("sizes do not match")
            return plain(*args, past_key_values=past_key_values, **kwargs)

        monkeypatch.setattr(model, "forward", fussy)
        llm_attr = LLMAttribution(kind(model), tiny_tokenizer())
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        check_engine(llm_attr, inp, TARGET)
        assert len(failed) == 1

    def test_an_interrupted_call_goes_on(self, monkeypatch):
        """Units that were finished are not hidden again."""
        model = small()
        llm_attr = LLMAttribution(AttentionSuppression(model), tiny_tokenizer())
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        whole = GraphContextAttribution(llm_attr).attribute(inp, TARGET, batch_size=1)
        hidden = []
        change = AttentionSuppression.change

        def stopping(self, *args):
            hidden.append(1)
            if len(hidden) == 10:
                raise KeyboardInterrupt
            return change(self, *args)

        monkeypatch.setattr(AttentionSuppression, "change", stopping)
        cage = GraphContextAttribution(llm_attr)
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, TARGET, batch_size=1)
        result = cage.attribute(inp, TARGET, batch_size=1)
        # The unit of the interrupt is asked for twice.
        assert len(hidden) <= len(whole.units) + 1
        np.testing.assert_allclose(result.graph.rows, whole.graph.rows)


class TestGrowingTexts:
    """Tokens that stay hidden while a text grows."""

    @pytest.mark.parametrize("parts", [(30,), (30, 1, 1, 1), (5, 20, 1, 9, 1)])
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_passes_on_kept_keys_are_those_of_the_whole_text(self, arch, parts):
        """One sequence hides other tokens than the next; windows may move on."""
        model = small(arch)
        rng = np.random.default_rng(0)
        ids = torch.from_numpy(rng.integers(7, 300, (2, sum(parts))))
        inside = torch.from_numpy(rng.random((2, parts[0])) < 0.4)
        assert (inside[0] != inside[1]).any()
        cache, length, found = DynamicCache(config=model.config), 0, []
        with torch.no_grad(), hidden_tokens(model, inside, lambda: length):
            for part in parts:
                new = ids[:, length : length + part]
                length += part
                passed = model(new, past_key_values=cache, use_cache=True)
                found.append(passed.logits)
        logits = torch.cat(found, dim=1)
        for one in range(2):
            hidden = [*inside[one].tolist(), *([False] * (length - parts[0]))]
            for place in range(length):
                read = ids[one, : place + 1].tolist()
                expected = logits_after(model, read, hidden[: place + 1])
                np.testing.assert_allclose(logits[one, place], expected, atol=1e-9)
        assert model.config._attn_implementation == "sdpa"


class TestErrors:
    """What is refused."""

    def test_an_unknown_effect_is_refused(self):
        """There are two."""
        with pytest.raises(ValueError, match="effect: must be one of 'kl', 'log_prob'"):
            AttentionSuppression(small(), "logit")

    def test_a_model_whose_attention_cannot_be_reached_is_refused(self):
        """Nothing can be hidden in it."""
        model = tiny_model(
            "llama", vocab_size=len(tiny_tokenizer()), model_type="bloom"
        )
        llm_attr = LLMAttribution(AttentionSuppression(model), tiny_tokenizer())
        inp = TokenIdsInput(ids_of(), tiny_tokenizer())
        with pytest.raises(
            ValueError, match="AttentionSuppression: needs a model whose"
        ):
            GraphContextAttribution(llm_attr).attribute(inp, TARGET)
