"""What rows depend on is the same in another process, and differs where they do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerIntegratedGradients,
    Lime,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
)
from PIL import Image
from torch import nn

from captum_cage.fingerprint import digest, model_digest, rows_depend_on
from conftest import PROMPT
from tiny import task_of, tiny_model


def ablated(model, tokenizer):
    """A task about a few tokens."""
    llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    return task_of(llm_attr, TextTokenInput(PROMPT, tokenizer), [5, 6, 7])


class TestValues:
    """Hashes of values."""

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ([1, 2], [12]),
            (["a", "b"], ["ab"]),
            (1, 1.0),
            (True, 1),
            (None, "None"),
            ({"a": 1}, {"a": 2}),
            (torch.zeros(2), torch.zeros(2, 1)),
            (np.zeros(2), np.zeros(2, dtype=np.float32)),
            (digest, model_digest),
            (Image.new("L", (2, 2)), Image.new("L", (2, 2), 1)),
            ("\ud800", "\ud801"),
        ],
    )
    def test_of_others_are_others(self, one, other):
        """Types, shapes and names count."""
        assert digest(one) == digest(one)
        assert digest(one) != digest(other)

    def test_are_the_same_in_every_process(self):
        """Whatever the seed of Python's own hashes."""
        value = {"b": {1, 2, "x"}, "a": [1.5, b"x", ("y",), None, np.arange(3)]}
        assert digest(value) == "b69e368fbc7a5791"


class TestModels:
    """Hashes of weights."""

    def test_training_changes_them_and_a_copy_does_not(self):
        """In every type, and where a sample is read."""
        for dtype in torch.float32, torch.bfloat16, torch.int8:
            model = nn.Linear(300, 100).to(torch.float32)
            model.weight = nn.Parameter(torch.ones(100, 300).to(dtype), False)
            before = model_digest(model)
            assert model_digest(model) == before
            model.weight[0, 0] = 2
            assert model_digest(model) != before

    def test_weights_that_are_nowhere_count_by_name(self):
        """As those of a model that is but a plan."""
        with torch.device("meta"):
            assert model_digest(nn.Linear(2, 2)) != model_digest(nn.Linear(2, 3))


class TestRows:
    """What raw rows depend on."""

    def test_each_thing_has_a_name_and_changes_alone(self, tokenizer):
        """So that an error can say what is another."""
        model = tiny_model(vocab_size=len(tokenizer))
        task = ablated(model, tokenizer)
        before = rows_depend_on(task)
        other = tiny_model(vocab_size=len(tokenizer), seed=1)
        method = Lime(model, perturb_func=print)
        changed = {
            "the model's weights": ablated(other, tokenizer),
            "the generated ids": replace(
                task, generated=(*task.generated[:-1], task.generated[-1] + 1)
            ),
            "the generated baseline": replace(task, baseline=task.baseline + 1),
            "the argument 'n_samples'": replace(task, kwargs={"n_samples": 7}),
        }
        for name, one in changed.items():
            after = rows_depend_on(one)
            differ = {
                key for key in {**before, **after} if before.get(key) != after.get(key)
            }
            assert differ == {name}
        llm_attr = LLMAttribution(method, tokenizer)
        llm_attr.provider = SimpleNamespace(model_name="a", api_url="b")
        after = rows_depend_on(replace(task, llm_attr=llm_attr))
        llm_attr.provider = SimpleNamespace(model_name="a", api_url="c", calls=3)
        assert rows_depend_on(replace(task, llm_attr=llm_attr)) == after
        llm_attr.provider = SimpleNamespace(model_name="b", api_url="b")
        other = rows_depend_on(replace(task, llm_attr=llm_attr))
        assert other["the served model"] != after["the served model"]
        assert after["the base method"] != before["the base method"]
        assert rows_depend_on(ablated(model, tokenizer)) == before

    def test_gradients_alone_are_other_rows(self, tokenizer):
        """Than their products with what they are of."""
        model = tiny_model(vocab_size=len(tokenizer))
        found = []
        for multiplies in (True, False):
            method = LayerIntegratedGradients(
                model, model.get_input_embeddings(), multiply_by_inputs=multiplies
            )
            llm_attr = LLMGradientAttribution(method, tokenizer)
            inp = TextTokenInput(PROMPT, tokenizer)
            found.append(rows_depend_on(task_of(llm_attr, inp, [5, 6, 7])))
        assert found[0] != found[1]
