"""Models, base methods and inputs that options name."""

import pytest
from captum.attr import FeatureAblation, LayerIntegratedGradients

from captum_cage.cli_models import (
    chosen_method,
    conversation_input,
    counting_arguments,
    device_name,
    generation_arguments,
    load_model,
    token_input,
)
from captum_cage.cli_options import Device, Dtype
from captum_cage.demo import load_demo
from captum_cage.inputs import ChatTokenInput
from captum_cage.traces import ChatTraceInput


def test_methods_by_name():
    """Those of the catalogue."""
    assert chosen_method("ablation", None, False)[0] is FeatureAblation
    with pytest.raises(ValueError, match="--method: "):
        chosen_method("magic", None, False)


def test_counts_go_where_they_are_taken():
    """Others are refused with those that take them."""
    base, declared = chosen_method("integrated-gradients", None, False)
    assert base is LayerIntegratedGradients
    _, kwargs = counting_arguments(base, declared, None, 7)
    assert kwargs == {"internal_batch_size": 8, "n_steps": 7}
    with pytest.raises(ValueError, match=r"--samples: .* does not take it"):
        counting_arguments(base, declared, 7, None)


def test_generation_is_greedy():
    """And as long as is said."""
    assert generation_arguments(9)["max_new_tokens"] == 9
    assert "max_new_tokens" not in generation_arguments(None)


def test_the_demo_model_is_in_the_package():
    """Every other name is a model of transformers."""
    model, _ = load_model("demo", "cpu", Dtype.auto, False)
    assert not model.training
    with pytest.raises(ValueError, match="--model: there is no folder"):
        load_model("./none", "cpu", Dtype.auto, False)
    assert device_name(Device.cpu) == "cpu"


def test_special_tokens_are_no_features():
    """Of a prompt, or of a conversation."""
    _, tokenizer = load_demo()
    inp = token_input("Ana has 3 pens.", None, False, None, tokenizer)
    assert inp.n_itp_features == len(tokenizer.tokenize("Ana has 3 pens."))
    messages = [{"role": "user", "content": "x"}]
    assert type(conversation_input(messages, None, tokenizer)) is ChatTokenInput
    messages.append({"role": "assistant", "content": "y"})
    assert type(conversation_input(messages, None, tokenizer)) is ChatTraceInput
