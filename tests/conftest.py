"""What all tests share: one thread, and a model and a tokenizer for those that do not
care which."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)

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
