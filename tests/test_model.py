"""What a model says about itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from captum_cage._model import text_config


def test_a_text_model_has_its_own_config(model):
    """The very object."""
    assert text_config(model) is model.config


def test_a_model_of_pictures_and_text_has_a_config_for_text(vision_model):
    """The one with the vocabulary."""
    assert text_config(vision_model) is vision_model.config.text_config
    assert text_config(vision_model).vocab_size > 0


@pytest.mark.parametrize("model", [nn.Linear(1, 1), object(), None])
def test_a_model_without_a_config_has_none(model):
    """Any module can be explained."""
    assert text_config(model) is None


def test_a_config_of_another_library_is_taken_as_it_is():
    """If it names no part for text."""
    config = SimpleNamespace(vocab_size=7)
    assert text_config(SimpleNamespace(config=config)) is config
