"""Passes that keep only what is needed, against plain passes that keep everything."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache

from captum_cage import causal
from captum_cage.causal import CausalModel, Prefix, close_enough
from tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 9, 11, 4, 8, 30, 2, 7]])


def read(model):
    """The model as the engines see it."""
    return CausalModel(model)


@pytest.fixture
def softcapped():
    """A model that changes its logits after its output layer."""
    return tiny_model(
        "gemma3", vocab_size=len(tiny_tokenizer()), final_logit_softcapping=3.0
    )


@pytest.fixture(params=["plain", "softcapped"])
def either(request, model, softcapped):
    """A model whose output layer makes its logits, and one whose does not."""
    return {"plain": model, "softcapped": softcapped}[request.param]


@pytest.mark.parametrize("keep", [[7], [0, 3], [1, 2, 3, 4, 5, 6, 7]])
def test_scores_are_those_of_a_plain_pass(either, keep):
    """Whether states or logits are kept, and at whichever positions."""
    passes = read(either)
    targets = torch.arange(len(keep)) + 3
    with torch.no_grad():
        states = passes.states({"input_ids": IDS}, torch.tensor(keep))
        scores = passes.log_probabilities(states[0], targets)
        logits = either(input_ids=IDS).logits[0, keep].double()
    expected = logits.log_softmax(dim=-1)[range(len(keep)), targets]
    assert scores.dtype == torch.float64
    assert torch.allclose(scores, expected, atol=1e-6)


def test_states_are_narrow_where_the_output_layer_makes_the_logits(model, softcapped):
    """Elsewhere logits are kept."""
    keep = torch.tensor([1, 4])
    with torch.no_grad():
        for passes, width in ((read(model), 32), (read(softcapped), 374)):
            states = passes.states({"input_ids": IDS}, keep)
            assert states.shape == (1, 2, width)
            assert passes.splits is (width == 32)


def test_pieces_give_the_same_scores(model, monkeypatch):
    """However few logits are held at once."""
    passes = read(model)
    keep = torch.arange(8)
    with torch.no_grad():
        states = passes.states({"input_ids": IDS}, keep)[0]
        whole = passes.log_probabilities(states, IDS[0])
        monkeypatch.setitem(causal._LOGIT_BYTES, "cpu", 1)
        assert torch.allclose(passes.log_probabilities(states, IDS[0]), whole)
        assert torch.allclose(
            passes.slopes(states, IDS[0]), read(model).slopes(states, IDS[0])
        )


@pytest.mark.parametrize("budget", [None, 1])
def test_divergences_are_those_of_plain_passes(either, monkeypatch, budget):
    """Of each state from its own reference, however few logits are held at once."""
    if budget is not None:
        monkeypatch.setitem(causal._LOGIT_BYTES, "cpu", budget)
    passes = read(either)
    which = torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        references = passes.states({"input_ids": IDS}, torch.tensor([3, 5, 6]))[0]
        states = passes.states({"input_ids": IDS.flip(1)}, torch.arange(4))[0]
        found = passes.divergences(states, references, which)
        p = either(input_ids=IDS).logits[0, [3, 5, 6]].double().log_softmax(dim=-1)
        q = either(input_ids=IDS.flip(1)).logits[0, :4].double().log_softmax(dim=-1)
    expected = torch.nn.functional.kl_div(
        q, p[which], log_target=True, reduction="none"
    ).sum(dim=-1)
    assert found.dtype == torch.float64
    assert expected.max() > 0.1
    assert torch.allclose(found, expected, atol=1e-6)


def test_tokens_that_cannot_come_leave_a_divergence_finite(model):
    """A probability of zero contributes nothing."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=torch.float64)
    passes = read(model)
    passes.assume(False)
    other = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    found = passes.divergences(other, logits, torch.tensor([0]))
    p, q = logits.softmax(dim=1)[0, :2], other.softmax(dim=1)[0, :2]
    assert float(found) == pytest.approx(float((p * (p / q).log()).sum()))


@pytest.mark.parametrize("budget", [None, 1])
def test_weighted_log_ratios_are_those_of_plain_passes(either, monkeypatch, budget):
    """``p(y)`` times the sum of its log-ratios to all tokens."""
    if budget is not None:
        monkeypatch.setitem(causal._LOGIT_BYTES, "cpu", budget)
    passes = read(either)
    targets = torch.tensor([3, 7, 300])
    with torch.no_grad():
        states = passes.states({"input_ids": IDS}, torch.tensor([0, 3, 6]))[0]
        found = passes.weighted_log_ratios(states, targets)
        logs = either(input_ids=IDS).logits[0, [0, 3, 6]].double().log_softmax(dim=-1)
    for row, target in enumerate(targets.tolist()):
        own = logs[row, target]
        expected = own.exp() * sum(own - other for other in logs[row])
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-5)


def test_no_logits_of_the_whole_sequence_are_made(model, monkeypatch):
    """The output layer is asked for the positions kept, and for one to compare."""
    seen = []
    head = model.get_output_embeddings()
    forward = type(head).forward

    def recorded(self, states):
        if self is head:
            seen.append(states.shape[-2])
        return forward(self, states)

    monkeypatch.setattr(type(head), "forward", recorded)
    passes = read(model)
    with torch.no_grad():
        states = passes.states({"input_ids": IDS}, torch.tensor([2, 5]))
        passes.log_probabilities(states[0], IDS[0, :2])
    assert seen == [1, 1, 2]


def test_slopes_are_gradients_of_the_scores(either):
    """Of each score with respect to its own state, by autograd on the whole."""
    passes = read(either)
    with torch.no_grad():
        states = passes.states({"input_ids": IDS}, torch.arange(4))[0]
    leaf = states.clone().requires_grad_()
    scores = passes.log_probabilities(leaf, IDS[0, :4])
    (expected,) = torch.autograd.grad(scores.sum(), leaf)
    assert torch.allclose(passes.slopes(states, IDS[0, :4]), expected, atol=1e-6)


def test_a_prefix_serves_any_number_of_sequences_and_is_never_added_to(model):
    """Passes over two batch sizes see the same first tokens."""
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(input_ids=IDS, past_key_values=cache, use_cache=True).logits
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        prefix = Prefix(pairs, 5)
        for size in (1, 3):
            rest = IDS[:, 5:].expand(size, -1)
            found = model(input_ids=rest, past_key_values=prefix, use_cache=True)
            assert torch.allclose(
                found.logits, whole[:, 5:].expand(size, -1, -1), atol=1e-5
            )
            assert prefix.get_seq_length() == 5


@pytest.mark.parametrize(
    ("dtype", "difference", "close"),
    [
        (torch.float64, 1e-10, True),
        (torch.float64, 1e-8, False),
        (torch.float32, 5e-5, True),
        (torch.float32, 1e-3, False),
        (torch.bfloat16, 0.1, True),
        (torch.bfloat16, 0.5, False),
        (torch.float32, float("nan"), False),
    ],
)
def test_closeness_follows_the_rounding_of_the_type(dtype, difference, close):
    """NaN is close to nothing."""
    one = torch.tensor([-1.0], dtype=torch.float64)
    assert close_enough(one, one + difference, dtype) is close


def test_the_model_s_hooks_are_as_before_after_an_error(model):
    """The hook on the output layer goes, whatever happens."""
    passes = read(model)
    with pytest.raises(IndexError):
        passes.states({"input_ids": torch.tensor([[99999]])}, torch.tensor([0]))
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_what_another_thread_asks_meanwhile_is_neither_seen_nor_changed(fresh_model):
    """Whoever uses the model without the package gets all logits, and disturbs none."""
    passes, found = read(fresh_model), []
    keep = torch.tensor([2, 7])
    with torch.no_grad():
        expected = passes.states({"input_ids": IDS}, keep)
        plain = fresh_model(IDS.flip(1)).logits

        def meanwhile(*_):
            handle.remove()

            def ask():
                with torch.no_grad():
                    found.append(fresh_model(IDS.flip(1)).logits)

            other = threading.Thread(target=ask)
            other.start()
            other.join()

        handle = fresh_model.model.layers[0].register_forward_pre_hook(meanwhile)
        assert torch.equal(passes.states({"input_ids": IDS}, keep), expected)
    assert torch.equal(found[0], plain)


def test_a_pass_with_a_cache_is_not_made_twice(fresh_model, monkeypatch):
    """Keys and values would stand in the cache twice, and every number be wrong."""
    passes, head = read(fresh_model), fresh_model.lm_head
    plain = type(fresh_model).forward

    def twice(self, *args, **kwargs):
        head(torch.zeros(1, 1, head.in_features))
        return plain(self, *args, **kwargs)

    with torch.no_grad():
        passes.states({"input_ids": IDS}, torch.tensor([7]))
        monkeypatch.setattr(type(fresh_model), "forward", twice)
        with pytest.raises(RuntimeError, match=r"output layer.*strategy='loop'"):
            passes.states({"input_ids": IDS}, torch.tensor([7]), cache=DynamicCache())
