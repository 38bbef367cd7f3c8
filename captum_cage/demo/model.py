"""The demo model and its tokenizer, from the files of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

__all__ = ["DEMO_FILES", "load_demo"]

DEMO_FILES = Path(__file__).parent
"""Folder of the demo model, in the form that ``from_pretrained`` reads."""


def load_demo() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The demo model and its tokenizer, ready to generate.

    The model solves the problems of :func:`sample_problems`, of every kind, given as
    plain text or through the chat template, and goes on with the conversations of
    :func:`sample_conversations` through the chat template: it writes the call and,
    after the tool's result, the worked answer. It knows nothing else.

    The chat template writes every message as ``<|role|>content<|end|>``, roles being
    ``system``, ``user``, ``assistant`` and ``tool`` in any order. What the model writes
    as an assistant begins with a space, as a completion of plain text does; give it
    back with that space, and an earlier turn has the ids that it was written with.

    Id 0 is ``<unk>``, the baseline that Captum's ``TextTokenInput`` uses by default;
    the model was trained with it in random places.

    Reads the files of the package only. The global random state is left as it was.

    Returns:
        tuple[LlamaForCausalLM, PreTrainedTokenizerFast]: a model of its own for each
        call, float32, on the CPU and in evaluation mode, and its tokenizer.

    Example:
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> prompt = "Ana has 3 pens. Mia has 4 more pens than Ana. Leo has 5 cups. "
        >>> prompt += "Zoe has 2 more pens than Mia. Tom has 8 hats. Eva has 6 hats. "
        >>> prompt += "How many pens does Mia have?"
        >>> ids = tokenizer(prompt, return_tensors="pt").input_ids
        >>> written = model.generate(ids)[0, ids.shape[1]:]
        >>> print(tokenizer.decode(written, skip_special_tokens=True).strip())
        Mia has Ana's 3 + 4 = 7 pens. The answer is 7.
    """
    settings: dict[str, Any] = json.loads(_read("config.json"))
    generation: dict[str, Any] = json.loads(_read("generation_config.json"))
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(load_file(DEMO_FILES / "model.safetensors"))
    model.generation_config = GenerationConfig(**generation)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
        DEMO_FILES, local_files_only=True
    )
    return model.float().eval(), tokenizer


def _read(name: str) -> str:
    return (DEMO_FILES / name).read_text(encoding="utf-8")
