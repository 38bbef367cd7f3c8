"""Context-length probing and CAGE's weighed log-ratio, against plain passes."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from captum.attr import LLMAttribution, TextTemplateInput, TextTokenInput
from torch import nn

from captum_cage import ChatTokenInput, GraphContextAttribution, TokenIdsInput, causal
from captum_cage.methods.probing import ContextLengthProbing, WeightedLogRatio
from captum_cage.testing import check_engine
from conftest import PROMPT, TARGET
from tiny import (
    ARCHITECTURES,
    UNITS_AND_ARCHITECTURES,
    image_input,
    inputs_of_each_kind,
    tiny_model,
    tiny_tokenizer,
)

METHODS = (ContextLengthProbing, WeightedLogRatio)
SHORT = "Ana has 3 pens."
both = pytest.mark.parametrize("method", METHODS)


def log_distribution(model, ids):
    """Log-probabilities of the token after a text, by a plain pass."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(dim=-1)


def divergence(model, whole, context):
    """KL divergence of what follows a context from what follows the whole text."""
    p, q = log_distribution(model, whole), log_distribution(model, context)
    return float((p.exp() * (p - q)).sum())


def probed(model, ids, targets, features=None, empty=None):
    """Scores of the definition, one pass per context, target and token."""
    features = list(range(len(ids))) if features is None else features
    fixed = [i for i, feature in enumerate(features) if feature < 0]
    scores = np.zeros((len(targets), max(features) + 1))
    for row in range(len(targets)):
        own = targets[:row]
        whole = [*ids, *own]

        def from_token(j, own=own, whole=whole):
            stay = [ids[i] for i in fixed if i < j]
            context = [*stay, *ids[j:], *own]
            if not context:
                context = [ids[-1]] if empty is None else [empty]
            return divergence(model, whole, context)

        for token, feature in enumerate(features):
            if feature >= 0:
                score = from_token(token + 1) - from_token(token)
                scores[row, feature] += score
    return scores


def ratio(model, ids, target):
    """``p(y) * sum_v [log p(y) - log p(v)]``, token by token."""
    logs = log_distribution(model, ids).tolist()
    own = logs[target]
    return np.exp(own) * sum(own - other for other in logs)


def attributed(method, tokenizer, inp, target):
    """What Captum's object gives without the graph, each target's row."""
    llm_attr = LLMAttribution(method, tokenizer)
    target = torch.tensor(target)
    found = llm_attr.attribute(inp, target=target, use_cached_outputs=False)
    assert torch.allclose(found.seq_attr, found.token_attr.sum(dim=0), atol=1e-4)
    return found.token_attr.numpy()


@pytest.fixture(scope="module")
def target(tokenizer):
    """Ids of a generated text."""
    return tokenizer.encode(" Mia has 7. So")


class TestContextLengthProbing:
    """KL divergence of contexts that begin later and later."""

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_scores_are_those_of_the_definition(self, tokenizer, arch):
        """Differences of divergences, token by token, for every target."""
        model = tiny_model(arch, vocab_size=len(tokenizer))
        inp = TextTokenInput(SHORT, tokenizer)
        target = tokenizer.encode(" Mia has")
        found = attributed(ContextLengthProbing(model), tokenizer, inp, target)
        expected = probed(model, tokenizer.encode(SHORT), target)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, atol=2e-5)

    def test_the_last_token_of_all_is_never_taken_away(self, model, tokenizer):
        """As in the authors' code: its score for the next token is 0."""
        inp = TextTokenInput(SHORT, tokenizer)
        target = tokenizer.encode(" Mia has")
        first, second = attributed(ContextLengthProbing(model), tokenizer, inp, target)
        assert first[-1] == 0
        assert second[-1] != 0

    def test_what_is_read_instead_can_be_given(self, model, tokenizer):
        """Then the last token has a score, and the others stay the same."""
        inp = TextTokenInput(SHORT, tokenizer)
        target = tokenizer.encode(" Mia has")
        probing = ContextLengthProbing(model, empty=1)
        found = attributed(probing, tokenizer, inp, target)
        expected = probed(model, tokenizer.encode(SHORT), target, empty=1)
        assert abs(expected[0, -1]) > 0.1
        np.testing.assert_allclose(found, expected, atol=2e-5)

    @pytest.mark.parametrize(
        "features",
        [[-1, 0, 1, 2, 3], [0, -1, 1, -1, 2], [-1, -1, 0, 1, -1], [0, 0, 1, 0, -1]],
    )
    def test_tokens_that_are_not_attributed_stay(self, model, tokenizer, features):
        """In front of every context; tokens of one feature are summed."""
        ids = tokenizer.encode(SHORT)[-5:]
        inp = TokenIdsInput(ids, tokenizer, feature_mask=features)
        target = tokenizer.encode(" Mia has")
        found = attributed(ContextLengthProbing(model), tokenizer, inp, target)
        expected = probed(model, ids, target, features)
        np.testing.assert_allclose(found, expected, atol=2e-5)

    def test_a_row_sums_to_the_divergence_of_the_shortest_context(
        self, model, tokenizer
    ):
        """Of the headers of a chat alone, and of the last token in plain text."""
        messages = [{"role": "user", "content": SHORT}]
        chat = ChatTokenInput(messages, tokenizer)
        ids = chat.inp_tensor[0].tolist()
        headers = [i for i, f in zip(ids, chat.feature_of_token, strict=True) if f < 0]
        (row,) = attributed(ContextLengthProbing(model), tokenizer, chat, [9])
        assert row.sum() == pytest.approx(divergence(model, ids, headers), abs=1e-5)
        ids = tokenizer.encode(SHORT)
        inp = TextTokenInput(SHORT, tokenizer)
        (row,) = attributed(ContextLengthProbing(model), tokenizer, inp, [9])
        assert row.sum() == pytest.approx(divergence(model, ids, ids[-1:]), abs=1e-5)

    @pytest.mark.parametrize("units", ["token", "word", "sentence"])
    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    def test_rows_of_the_graph_are_those_of_the_definition(
        self, model, tokenizer, target, units, strategy
    ):
        """Summed over the tokens of units, for generated units too."""
        inp = TextTokenInput(SHORT + " So", tokenizer)
        cage = GraphContextAttribution(
            LLMAttribution(ContextLengthProbing(model), tokenizer)
        )
        result = cage.attribute(inp, target, units=units, strategy=strategy)
        ids = tokenizer.encode(SHORT + " So")
        source = unit_numbers(tokenizer, ids, units)
        sources = source[-1] + 1
        generated = sources + unit_numbers(tokenizer, target, units)
        groups = np.concatenate([source, generated])
        assert len(result.units) == groups[-1] + 1
        for row, found in enumerate(result.graph.rows):
            own = np.flatnonzero(groups == sources + row)
            before = [*ids, *target][: own[0]]
            scored = [[*ids, *target][i] for i in own]
            expected = probed(model, before, scored, groups[: own[0]].tolist())
            filled = np.zeros(len(found))
            filled[: sources + row] = expected.sum(axis=0)
            np.testing.assert_allclose(found, filled, atol=5e-5)

    @pytest.mark.parametrize("strategy", ["loop", "fused"])
    @pytest.mark.parametrize("empty", [None, 9])
    def test_a_prompt_of_one_token_explains_nothing(
        self, model, tokenizer, monkeypatch, strategy, empty
    ):
        """Its row is zero, not rounding that normalisation would blow up."""
        with_noise(monkeypatch, "divergences")
        probing = ContextLengthProbing(model, empty=empty)
        cage = GraphContextAttribution(LLMAttribution(probing, tokenizer))
        inp = TokenIdsInput([9], tokenizer)
        result = cage.attribute(inp, [9, 7, 11], explain=0, strategy=strategy)
        assert (result.graph.rows[0] == 0).all()
        assert result.graph.rows[1, 1] == 0
        assert result.graph.rows[1, 0] != 0
        assert result.leaked == 1

    @pytest.mark.parametrize("empty", [-1, "x", 1.5])
    def test_what_is_read_instead_must_be_an_id(self, model, empty):
        """Anything else is refused."""
        with pytest.raises((TypeError, ValueError), match="empty: must be"):
            ContextLengthProbing(model, empty=empty)

    def test_no_distribution_of_the_whole_text_is_held(self, model, monkeypatch):
        """The output layer is asked for a few states at a time."""
        tokenizer = tiny_tokenizer()
        sizes = []
        head = model.get_output_embeddings()
        forward = type(head).forward

        def recorded(self, states):
            if self is head:
                sizes.append(states.numel() // states.shape[-1])
            return forward(self, states)

        monkeypatch.setattr(type(head), "forward", recorded)
        few = 5
        width = 4 * head.out_features
        monkeypatch.setitem(causal._LOGIT_BYTES, "cpu", few * 12 * width)
        inp = TextTokenInput(PROMPT, tokenizer)
        cage = GraphContextAttribution(
            LLMAttribution(ContextLengthProbing(model), tokenizer)
        )
        cage.attribute(inp, TARGET, units="sentence", strategy="fused")
        assert max(sizes) <= 2 * few
        assert len(sizes) > 20


def unit_numbers(tokenizer, ids, units):
    """Unit of each token of a text in which this is easily told."""
    numbers, before = [], "."
    for token in ids:
        text = tokenizer.decode([token])
        begins = {
            "token": True,
            "word": text.strip() and (text[0] == " " or not before.strip()),
            "sentence": before.endswith("."),
        }[units]
        numbers.append((numbers[-1] if numbers else -1) + bool(begins or not numbers))
        before = text
    return np.array(numbers)


class TestWeightedLogRatio:
    """``p(y) * sum_v [log p(y) - log p(v)]``, before and after."""

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_scores_are_those_of_the_formula(self, tokenizer, arch):
        """For each unit that is replaced, and each target."""
        model = tiny_model(arch, vocab_size=len(tokenizer))
        ids = tokenizer.encode(SHORT)
        baselines = list(range(20, 20 + len(ids)))
        inp = TokenIdsInput(ids, tokenizer, baselines=baselines)
        target = tokenizer.encode(" Mia has")
        found = attributed(WeightedLogRatio(model), tokenizer, inp, target)
        expected = np.zeros(found.shape)
        for row, token in enumerate(target):
            plain = ratio(model, [*ids, *target[:row]], token)
            for place in range(len(ids)):
                changed = list(ids)
                changed[place] = baselines[place]
                after = ratio(model, [*changed, *target[:row]], token)
                expected[row, place] = plain - after
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)

    def test_a_template_follows_its_own_baselines(self, model, tokenizer):
        """Its text is tokenised as a whole, as Captum does."""
        template = TextTemplateInput(
            "{} has {}.", ["Ana", "3 pens"], baselines=["Mia", "hats"]
        )
        method = WeightedLogRatio(model, tokenizer)
        (row,) = attributed(method, tokenizer, template, [9])
        texts = ["Ana has 3 pens.", "Mia has 3 pens.", "Ana has hats."]
        plain, *changed = [ratio(model, tokenizer.encode(t), 9) for t in texts]
        expected = [plain - other for other in changed]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4)

    def test_a_text_needs_the_tokenizer(self, model, tokenizer):
        """Without the graph; the error says how."""
        template = TextTemplateInput("{} has.", ["Ana"])
        with pytest.raises(TypeError, match=r"WeightedLogRatio\(model, tokenizer\)"):
            attributed(WeightedLogRatio(model), tokenizer, template, [9])

    def test_an_image_is_perturbed_like_any_input(self, vision_model, tokenizer):
        """By the loop; one pass per part and target."""
        llm_attr = LLMAttribution(WeightedLogRatio(vision_model), tokenizer)
        result = GraphContextAttribution(llm_attr).attribute(
            image_input(tokenizer), [5, 9]
        )
        assert result.meta["strategy"] == "loop"
        inp = image_input(tokenizer)

        def asked(present):
            inputs = inp.to_model_input(torch.tensor([present]))
            with torch.no_grad():
                logits = vision_model(**inputs).logits[0, -1].double()
            logs = logits.log_softmax(dim=-1)
            return float(logs[5].exp() * (logs[5] - logs).sum())

        expected = [asked([1, 1]) - asked(left) for left in ([0, 1], [1, 0])]
        np.testing.assert_allclose(result.graph.rows[0, :2], expected, rtol=1e-3)


class TestEngine:
    """All rows at once are the loop's."""

    @pytest.mark.parametrize(
        ("units", "arch", "dtype"),
        [
            *((*both, torch.float64) for both in UNITS_AND_ARCHITECTURES),
            ("token", "llama", torch.float32),
            ("sentence", "gemma3", torch.float32),
        ],
    )
    @both
    def test_rows_are_the_loop_s(self, tokenizer, target, method, arch, units, dtype):
        """To 1e-5 of the largest entry in float32, to 1e-10 in float64."""
        model = tiny_model(arch, vocab_size=len(tokenizer), dtype=dtype)
        llm_attr = LLMAttribution(method(model), tokenizer)
        inp = TextTokenInput(SHORT + " Mia has 4.", tokenizer)
        check_engine(llm_attr, inp, target, units=units)

    @pytest.mark.parametrize(
        ("method", "kind", "units"),
        [
            (method, kind, units)
            for method in METHODS
            for kind in inputs_of_each_kind(tiny_tokenizer(), SHORT)
            for units in ("token", "word")
            # A template has no tokens to cut.
            if method is WeightedLogRatio or not kind.startswith("template")
            if units == "token" or kind in ("tokens", "chat", "template, list")
        ],
    )
    def test_of_every_input(self, model, tokenizer, target, method, kind, units):
        """Tokens, groups of them, chats; templates where they may be replaced."""
        inp = inputs_of_each_kind(tokenizer, SHORT)[kind]
        llm_attr = LLMAttribution(method(model), tokenizer)
        check_engine(llm_attr, inp, target, units=units)

    @pytest.mark.parametrize("empty", [None, 1, 9])
    def test_whatever_is_read_in_place_of_nothing(
        self, model, tokenizer, target, empty
    ):
        """Of token units and of longer ones; the id may be the last token itself."""
        llm_attr = LLMAttribution(ContextLengthProbing(model, empty=empty), tokenizer)
        inp = TokenIdsInput([9], tokenizer)
        for units in ("token", "sentence"):
            check_engine(llm_attr, inp, [9, *target], units=units)

    @pytest.mark.parametrize("batch_size", [1, 3, None])
    @both
    def test_of_any_batch_size(self, model, tokenizer, target, method, batch_size):
        """Texts of many lengths share a batch."""
        inp = TextTokenInput(SHORT, tokenizer)
        llm_attr = LLMAttribution(method(model), tokenizer)
        check_engine(llm_attr, inp, target, batch_size=batch_size)

    @both
    def test_memory_that_runs_out_halves_the_batch(
        self, model, tokenizer, target, method, monkeypatch
    ):
        """The rows are the same."""
        passes = Passes(monkeypatch, model)
        passes.fails = lambda ids: (
            RuntimeError("CUDA out of memory.") if ids.shape[0] > 2 else None
        )
        inp = TextTokenInput(SHORT, tokenizer)
        llm_attr = LLMAttribution(method(model), tokenizer)
        check_engine(llm_attr, inp, target)
        assert max(size for size, _ in passes.asked) > 2

    @both
    def test_a_repeated_call_goes_on_from_what_was_finished(
        self, model, tokenizer, target, method, monkeypatch
    ):
        """After an interrupt, few passes are made twice."""
        passes = Passes(monkeypatch, model)
        inp = TextTokenInput(PROMPT, tokenizer)
        cage = GraphContextAttribution(LLMAttribution(method(model), tokenizer))
        arguments = {"strategy": "fused", "batch_size": 1}
        expected = cage.attribute(inp, target, **arguments).graph.rows
        whole = len(passes.asked)
        passes.asked.clear()
        stop = whole * 2 // 3
        passes.fails = lambda _: (
            KeyboardInterrupt() if len(passes.asked) == stop else None
        )
        with pytest.raises(KeyboardInterrupt):
            cage.attribute(inp, target, **arguments)
        passes.fails = lambda _: None
        found = cage.attribute(inp, target, **arguments).graph.rows
        assert len(passes.asked) <= whole + 4
        np.testing.assert_allclose(found, expected, atol=1e-5)

    @both
    def test_a_model_that_is_not_causal_takes_the_loop(
        self, model, tokenizer, target, method, caplog
    ):
        """It is found out by a pass over part of the text."""
        llm_attr = LLMAttribution(method(LookingAhead(model).eval()), tokenizer)
        cage = GraphContextAttribution(llm_attr)
        inp = TextTokenInput(SHORT, tokenizer)
        with caplog.at_level(logging.WARNING, "captum_cage"):
            result = cage.attribute(inp, target)
        assert result.meta["strategy"] == "loop"
        assert "another probability when more text follows" in caplog.text
        with pytest.raises(ValueError, match="'fused' needs an engine"):
            cage.attribute(inp, target, strategy="fused")

    @both
    def test_scores_that_are_none_are_named(self, fresh_model, tokenizer, method):
        """A model with NaN weights is at fault, not the method."""
        next(fresh_model.parameters()).data.fill_(torch.nan)
        cage = GraphContextAttribution(LLMAttribution(method(fresh_model), tokenizer))
        with pytest.raises(ValueError, match="must give log-probabilities"):
            cage.attribute(TextTokenInput(SHORT, tokenizer), [5, 7])

    @both
    def test_the_scores_of_the_text_come_with_the_rows(
        self, model, tokenizer, target, method
    ):
        """They are those of a plain pass."""
        inp = TextTokenInput(SHORT, tokenizer)
        cage = GraphContextAttribution(LLMAttribution(method(model), tokenizer))
        fused, loop = (
            cage.attribute(inp, target, strategy=way).output_probs
            for way in ("fused", "loop")
        )
        torch.testing.assert_close(fused, loop, rtol=1e-4, atol=0)

    @both
    def test_of_units_in_several_pieces(self, model, tokenizer, target, method):
        """Which come and go as one, whatever stands between them."""
        ids = tokenizer.encode(SHORT)
        inp = TokenIdsInput(ids, tokenizer, feature_mask=[0, 1, 0, -1, 1])
        check_engine(LLMAttribution(method(model), tokenizer), inp, target)

    def test_a_replaced_unit_that_stays_the_same_changes_nothing(
        self, model, tokenizer, target, monkeypatch
    ):
        """Exactly."""
        with_noise(monkeypatch, "weighted_log_ratios")
        ids = tokenizer.encode(SHORT)
        inp = TokenIdsInput(ids, tokenizer, baselines=ids[2])
        llm_attr = LLMAttribution(WeightedLogRatio(model), tokenizer)
        result = GraphContextAttribution(llm_attr).attribute(inp, target)
        assert result.meta["strategy"] == "fused"
        assert (result.graph.rows[:, 2] == 0).all()
        assert (result.graph.rows[:, 1] != 0).all()


def with_noise(monkeypatch, name):
    """What the model measures differs from call to call, as by rounding."""
    known = getattr(causal.CausalModel, name)
    numbers = np.random.default_rng(0)

    def noisy(*args):
        found = known(*args)
        return found + 1e-9 * torch.from_numpy(numbers.random(found.shape))

    monkeypatch.setattr(causal.CausalModel, name, noisy)


class Passes:
    """Every forward pass of a model: its shape, and what goes wrong in it."""

    def __init__(self, monkeypatch, model):
        self.asked = []
        self.fails = lambda _: None
        forward = type(model).forward

        @functools.wraps(forward)
        def recorded(itself, *args, **kwargs):
            ids = kwargs["input_ids"]
            self.asked.append(tuple(ids.shape))
            error = self.fails(ids)
            if error is not None:
                raise error
            return forward(itself, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", recorded)


class LookingAhead(nn.Module):
    """What follows a token changes what the model says before it."""

    device = torch.device("cpu")

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask=None):
        """The inner model's answer to tokens mixed with the mean of the text."""
        states = self.inner.get_input_embeddings()(input_ids)
        states = states + states.mean(dim=1, keepdim=True)
        return self.inner(inputs_embeds=states, attention_mask=attention_mask)


@both
def test_a_model_is_needed(method):
    """Not a function, as Captum's own methods take."""
    with pytest.raises(TypeError, match=f"{method.__name__}: reads the inside of a"):
        method(lambda x: x)
