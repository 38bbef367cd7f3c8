"""Small models, tokenizers and inputs, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from captum.attr import (
    ImageMaskInput,
    InterpretableInput,
    TextTemplateInput,
    TextTokenInput,
)
from PIL import Image
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from captum_cage import ChatTokenInput, TokenIdsInput
from captum_cage.inputs import Prompt
from captum_cage.task import RowTask, text_units
from captum_cage.units import split_units

CORPUS = [
    "Ana has 3 pens. Mia has 4 more pens than Ana. How many pens does Mia have?",
    "The answer is 18. So she sells 9 of them, e.g. on Monday, for 3.5 dollars each.",
    "First, read the text. Second, think! Third, write: it costs nothing, does it?",
]
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
IMAGE_TOKEN = 3  # a role mark of the tokenizer, put to another use
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "gpt2": {"model_type": "gpt2"},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
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
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **ARCHITECTURES[arch],
        **changes,
    }
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        # Random weights of the usual size give nearly uniform predictions.
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    torch.set_rng_state(state)
    return model.to(dtype).eval()


@lru_cache
def tiny_tokenizer(kind: str = "bpe") -> PreTrainedTokenizerFast:
    """A fast tokenizer: ``"bpe"`` (bytes), ``"sentencepiece"``, or ``"wordpiece"``.

    Byte BPE has no BOS, like Qwen's; the SentencePiece-like one has ``<s>`` and byte
    fallback, like Llama 2's; WordPiece lower-cases, like BERT's.
    """
    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<unk>", "<eos>", *MARKS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        names = {"unk_token": "<unk>", "eos_token": "<eos>"}
    elif kind == "sentencepiece":
        pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=520,
            special_tokens=["<unk>", "<s>", "</s>", *MARKS, *pieces],
            show_progress=False,
        )
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    else:
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=200,
            special_tokens=["[UNK]", "[EOS]", *MARKS],
            show_progress=False,
        )
        names = {"unk_token": "[UNK]", "eos_token": "[EOS]"}
    backend.train_from_iterator(CORPUS, trainer)
    if kind == "sentencepiece":
        # Byte pieces are ordinary tokens; only the trainer knew them as special.
        backend = _without_special(backend, pieces)
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=MARKS,
        clean_up_tokenization_spaces=False,
        **names,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _without_special(backend: Tokenizer, pieces: list[str]) -> Tokenizer:
    state = json.loads(backend.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] not in pieces
    ]
    return Tokenizer.from_str(json.dumps(state))


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
