"""Small models, tokenizers and inputs, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from captum.attr import (
    FeatureAblation,
    ImageMaskInput,
    InterpretableInput,
    LLMAttribution,
    TextTemplateInput,
    TextTokenInput,
)
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from captum_cage import ChatTokenInput, GraphContextAttribution, TokenIdsInput
from captum_cage.inputs import Prompt
from captum_cage.task import RowTask, text_units
from captum_cage.testing import tiny_causal_lm, tokenizers
from captum_cage.testing.models import FAMILIES
from captum_cage.units import split_units

CORPUS, MARKS = tokenizers.CORPUS, tokenizers.MARKS
CHAT_TEMPLATE = tokenizers.CHAT_TEMPLATE
IMAGE_TOKEN = 3  # a role mark of the tokenizer, put to another use

# Few of the families: what holds for these is proved family by family elsewhere.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    arch: {"model_type": arch, **FAMILIES[arch]}
    for arch in ("llama", "gpt2", "qwen3", "gemma3")
}

# Units and architectures: what one does is the same for the other, so not all pairs.
UNITS_AND_ARCHITECTURES = [
    *(("token", arch) for arch in ARCHITECTURES),
    ("word", "llama"),
    ("sentence", "gemma3"),
]


def tiny_model(
    arch: str = "llama",
    *,
    vocab_size: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """A causal language model of two layers with random weights, ready to use."""
    return tiny_causal_lm(
        arch, vocab_size=vocab_size, seed=seed, dtype=dtype, **changes
    )


@lru_cache
def tiny_tokenizer(kind: str = "bpe") -> PreTrainedTokenizerFast:
    """A fast tokenizer without filler tokens, made once."""
    return tokenizers.tiny_tokenizer(kind, vocab_size=None)


def inputs_of_each_kind(
    tokenizer: PreTrainedTokenizerFast, prompt: str
) -> dict[str, InterpretableInput]:
    """An input of every kind that perturbation methods take, with a name."""
    ids = tokenizer.encode(prompt)
    messages = [{"role": "user", "content": "Ana has 3 pens.\nHow many?"}]
    spaced = {"item": "pens", "name": "Ana"}
    return {
        "tokens": TextTokenInput(prompt, tokenizer),
        "tokens, some skipped": TextTokenInput(
            prompt, tokenizer, skip_tokens=tokenizer.encode(".")
        ),
        "ids": TokenIdsInput(ids, tokenizer),
        "ids in groups": TokenIdsInput(
            ids, tokenizer, feature_mask=[i // 4 - 1 for i in range(len(ids))]
        ),
        "chat": ChatTokenInput(messages, tokenizer),
        "template, list": TextTemplateInput("{} has 3 {}.", ["Ana", "pens"]),
        "template, dict": TextTemplateInput("{name} has 3 {item}.", spaced),
        "template, function": TextTemplateInput(
            lambda *parts: "! ".join(parts), ["Ana", "has", "pens"]
        ),
        "template, baselines": TextTemplateInput(
            "{} has 3 {}.", ["Ana", "pens"], baselines=["Mia", "hats"]
        ),
        "template, drawn baselines": TextTemplateInput(
            "{} has 3 {}.", ["Ana", "pens"], baselines=lambda: ["Mia", "hats"]
        ),
        "template, mask": TextTemplateInput(
            "{} has 3 {}. {}?", ["Ana", "pens", "Mia"], mask=[7, 3, 7]
        ),
        "template, odd bytes": TextTemplateInput("{} 😀日{}", ["é", " x"]),
    }


def task_of(
    llm_attr: Any,
    inp: InterpretableInput,
    generated: Sequence[int],
    units: Any = "token",
    baseline: int = 0,
) -> RowTask:
    """A text to explain, as the wrapper reads it; of a trace, what follows it."""
    tokenizer = llm_attr.tokenizer
    prompt = Prompt.read(inp, tokenizer)
    if prompt.continuation is not None:
        generated = [*prompt.continuation.ids, *generated]
    found = text_units(prompt, generated, split_units(units), tokenizer)
    return RowTask(
        llm_attr=llm_attr,
        prompt=prompt,
        generated=tuple(generated),
        generated_text=found.text,
        sources=found.sources,
        steps=found.steps,
        baseline=baseline,
        kwargs={},
    )


def tiny_vision_model(vocab_size: int) -> LlavaForConditionalGeneration:
    """A Llava of two small layers that reads images of 8 x 8 pixels as four patches."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
        ),
        image_token_id=IMAGE_TOKEN,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config).eval()
    torch.set_rng_state(state)
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return model


def image_input(tokenizer: PreTrainedTokenizerFast, **more: Any) -> ImageMaskInput:
    """Left and right half of a picture, and a fixed question about it."""
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    mask = torch.zeros((8, 8), dtype=torch.int32)
    mask[:, 4:] = 1
    question = tokenizer.encode("How many?")

    def processor(image: Any) -> dict[str, Any]:
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        ids = torch.tensor([[IMAGE_TOKEN] * 4 + question])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": values,
            **{name: make(ids) for name, make in more.items()},
        }

    return ImageMaskInput(Image.fromarray(pixels), mask, processor_fn=processor)


class LocalProvider:
    """Scores text with a local model, as a server would: it sees text only."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prompts: list[str] = []

    def generate(self, prompt: str, **gen_args: Any) -> str:
        """Text that the model writes after a text."""
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **gen_args)
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :])
        return text

    def get_logprobs(
        self,
        input_prompt: str,
        target_str: str,
        tokenizer: Any = None,  # noqa: ARG002
    ) -> list[float]:
        """Scores of the last tokens, as many as the target has when read alone."""
        self.prompts.append(input_prompt)
        count = len(self.tokenizer.encode(target_str, add_special_tokens=False))
        ids = self.tokenizer.encode(input_prompt + target_str)
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0]
        scores = torch.log_softmax(logits, dim=-1)
        places = range(len(ids) - count, len(ids))
        return [float(scores[i - 1, ids[i]]) for i in places]


class ForwardOnly(torch.nn.Module):
    """A causal model that has nothing but its forward pass.

    Args:
        inner: the model it asks.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.config, self.device = inner.config, inner.device

    def forward(self, input_ids: Any, **_: Any) -> Any:
        """What the model gives for the ids alone."""
        return self.inner(input_ids)


def tiny_cage(**options: Any) -> GraphContextAttribution:
    """Ablation of a small Llama, as a worker of a batch makes it."""
    tokenizer = tiny_tokenizer("bpe")
    network = tiny_model("llama", vocab_size=len(tokenizer))
    llm_attr = LLMAttribution(FeatureAblation(network), tokenizer)
    return GraphContextAttribution(llm_attr, **options)
