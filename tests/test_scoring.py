"""What the model itself says, and the limits that it sets."""

from __future__ import annotations

import threading

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LLMAttribution,
    RemoteLLMAttribution,
    TextTokenInput,
)
from captum.attr._core.llm_attr import _PlaceholderModel
from torch import nn

from captum_cage.inputs import Prompt
from captum_cage.scoring import (
    check_sequence,
    context_length,
    generate_ids,
    held,
    log_probabilities,
)
from conftest import PROMPT, TARGET
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


@pytest.fixture
def prompt(tokenizer):
    """A prompt of tokens."""
    return Prompt.read(TextTokenInput(PROMPT, tokenizer), tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_log_probabilities_are_those_of_one_token_at_a_time(arch, dtype):
    """One pass over all tokens equals one pass for each."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(arch, vocab_size=len(tokenizer), dtype=dtype)
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    prompt = Prompt.read(TextTokenInput("Ana has", tokenizer), tokenizer)
    target = tokenizer.encode(" 3 pens.")
    found = log_probabilities(llm_attr, prompt, target)
    for t, number in enumerate(target):
        ids = torch.tensor([[*prompt.ids, *target[:t]]])
        with torch.no_grad():
            logits = model(ids).logits[0, -1].double()
        expected = float(torch.log_softmax(logits, -1)[number])
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.1)
        assert found[t] == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_context_is_read_from_the_model_s_config(arch):
    """Whatever its family calls it."""
    model = tiny_model(arch, vocab_size=99)
    assert context_length(model) == 256
    assert context_length(nn.Linear(2, 2)) is None


def test_a_sequence_of_the_context_s_length_fits(model, tokenizer):
    """The limit itself is allowed."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    check_sequence(llm_attr, [1] * 250, [1] * 6)
    with pytest.raises(ValueError, match="context of 256"):
        check_sequence(llm_attr, [1] * 250, [1] * 7)


def test_ids_are_generated_as_the_model_generates_them(model, tokenizer, prompt):
    """Greedy, from the very ids of the prompt, special tokens kept."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    found = generate_ids(llm_attr, prompt, {"max_new_tokens": 5, "do_sample": False})
    ids = list(prompt.ids)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == ids[len(prompt.ids) :]


def test_a_generation_that_returns_a_record_is_read(model, tokenizer, prompt):
    """return_dict_in_generate changes nothing here."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    arguments = {"max_new_tokens": 3, "do_sample": False}
    plain = generate_ids(llm_attr, prompt, arguments)
    record = generate_ids(
        llm_attr, prompt, {**arguments, "return_dict_in_generate": True}
    )
    assert plain == record


def test_a_model_that_cannot_generate_needs_a_target(tokenizer, prompt):
    """With the remedy."""

    class Silent(nn.Module):
        device = torch.device("cpu")

    llm_attr = LLMAttribution(FeatureAblation(Silent()), tokenizer)
    with pytest.raises(TypeError, match="target: must be given for a model that"):
        generate_ids(llm_attr, prompt, None)


def test_generating_nothing_is_an_error(model, tokenizer, prompt, monkeypatch):
    """There would be nothing to explain."""
    monkeypatch.setattr(
        type(model), "generate", lambda _self, input_ids, **_kwargs: input_ids
    )
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(ValueError, match="the model generated nothing"):
        generate_ids(llm_attr, prompt, None)


def test_a_held_model_is_in_evaluation_mode_and_comes_back_as_it_was(tokenizer):
    """Each module in the mode that it had."""
    model = tiny_model(vocab_size=len(tokenizer)).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    inside = []

    def fail():
        with held(llm_attr):
            inside.extend(module.training for module in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not any(inside)
    assert [module.training for module in model.modules()] == before


def test_a_held_model_is_held_by_one_thread_alone(tokenizer):
    """The second waits, on another object of the same model too."""
    model = tiny_model(vocab_size=len(tokenizer))
    objects = [LLMAttribution(FeatureAblation(model), tokenizer) for _ in range(2)]
    entered = threading.Event()

    def enter():
        with held(objects[1]):
            entered.set()

    with held(objects[0]):
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.1)
    thread.join()
    assert entered.is_set()


def test_scores_of_a_provider_must_match_the_tokens(tokenizer, prompt):
    """A count that differs is named."""

    class Short:
        def get_logprobs(self, **_request):
            return [-1.0]

    llm_attr = RemoteLLMAttribution(
        FeatureAblation(_PlaceholderModel()), tokenizer, Short()
    )
    with pytest.raises(ValueError, match="score its 17 tokens, but 1 scores came"):
        log_probabilities(llm_attr, prompt, tokenizer.encode(TARGET)[:17])
