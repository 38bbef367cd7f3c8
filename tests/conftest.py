"""What all tests share: one thread, a model, a tokenizer, and Hypothesis' profile."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch
from hypothesis import settings
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tiny import tiny_model, tiny_tokenizer, tiny_vision_model

torch.set_num_threads(1)
# A job that runs in the background ignores Ctrl-C; these tests are about it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure, and whether a change lands is no matter of luck.
settings.register_profile(
    "captum_cage",
    deadline=None,
    max_examples=50,
    print_blob=True,
    derandomize="CI" in os.environ,
)
# Slow: `make laws`.
settings.register_profile(
    "deep", settings.get_profile("captum_cage"), max_examples=2000, derandomize=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "captum_cage"))

PROMPT = "Ana has 3 pens. Mia has 4 more pens than Ana."
TARGET = " Mia has 3 + 4 = 7 pens. The answer is 7."


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer."""
    return tiny_tokenizer("bpe")


@pytest.fixture(scope="session")
def model(tokenizer) -> PreTrainedModel:
    """A small Llama that tests must leave as it is."""
    return tiny_model("llama", vocab_size=len(tokenizer))


@pytest.fixture
def fresh_model(tokenizer) -> PreTrainedModel:
    """A small Llama that a test may change."""
    return tiny_model("llama", vocab_size=len(tokenizer))


@pytest.fixture(scope="session")
def vision_model(tokenizer) -> LlavaForConditionalGeneration:
    """A small Llava that tests must leave as it is."""
    return tiny_vision_model(len(tokenizer))


def pytest_collection_finish():
    """What was imported and collected stays: it need not be searched for garbage."""
    gc.collect()
    gc.freeze()
