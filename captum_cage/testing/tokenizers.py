"""Small tokenizers of every kind, made on the spot."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from captum_cage._checks import one_of, whole_number

__all__ = ["CHAT_TEMPLATE", "CORPUS", "MARKS", "VOCABULARY", "tiny_tokenizer"]

# Number of tokens that models and tokenizers have unless asked otherwise.
VOCABULARY = 640
CORPUS = [
    "Ana has 3 pens. Mia has 4 more pens than Ana. How many pens does Mia have?",
    "The answer is 18. So she sells 9 of them, e.g. on Monday, for 3.5 dollars each.",
    "First, read the text. Second, think! Third, write: it costs nothing, does it?",
]
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class _Made(NamedTuple):
    """A tokenizer's inside, and the names of its special tokens."""

    backend: Tokenizer
    names: dict[str, str]


def tiny_tokenizer(
    kind: str = "bpe", *, vocab_size: int | None = VOCABULARY
) -> PreTrainedTokenizerFast:
    """A small fast tokenizer of transformers, the same in each call; no download.

    - ``"bpe"``: byte-level BPE without BOS, like Qwen's. A character may be several
      tokens.
    - ``"byte"``: each byte of UTF-8 is a token, like ByT5's.
    - ``"char"``: each character of printable ASCII is a token; others are unknown.
    - ``"sentencepiece"``: BPE over pieces that begin with a space, with ``<s>`` in
      front and byte fallback, like Llama 2's. What it decodes depends on what stands
      before.
    - ``"wordpiece"``: words in lower case and their parts, like BERT's. Decoding does
      not give the text back.

    All know the marks of four roles, and a chat template that uses them.

    Args:
        kind (str, optional): one of these. Default: ``"bpe"``
        vocab_size (int, optional): number of tokens. Tokens named ``<unused0>`` and so
            on fill it up, so that any tokenizer can read what any model of this size
            writes. None for no such tokens. Default: ``640``, as for
            :func:`tiny_causal_lm`

    Returns:
        PreTrainedTokenizerFast: a new object in each call.

    Raises:
        TypeError: if ``vocab_size`` is no whole number.
        ValueError: if there is no such kind, or it has more tokens than
            ``vocab_size``.

    Example:
        >>> tokenizer = tiny_tokenizer("char")
        >>> tokenizer.tokenize("3 pens")
        ['3', ' ', 'p', 'e', 'n', 's']
        >>> len(tokenizer), len(tiny_tokenizer("wordpiece"))
        (640, 640)
    """
    one_of("kind", kind, tuple(_KINDS))
    made = _KINDS[kind]()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made.backend,
        additional_special_tokens=MARKS,
        clean_up_tokenization_spaces=False,
        **made.names,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if vocab_size is not None:
        size = whole_number(
            "vocab_size",
            vocab_size,
            minimum=len(tokenizer),
            remedy=f"Tokens of kind {kind!r} alone are {len(tokenizer)}. Pass as many "
            "or more, or None for no more than these.",
        )
        fillers = [f"<unused{number}>" for number in range(size - len(tokenizer))]
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in fillers])
    return tokenizer


def _bpe() -> _Made:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<eos>", *MARKS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _Made(backend, {"unk_token": "<unk>", "eos_token": "<eos>"})


def _byte() -> _Made:
    tokens = ["<unk>", "<eos>", *MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    return _Made(backend, {"unk_token": "<unk>", "eos_token": "<eos>"})


def _char() -> _Made:
    tokens = ["<unk>", "<eos>", *MARKS, "\n", *string.printable[:95]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _Made(backend, {"unk_token": "<unk>", "eos_token": "<eos>"})


def _sentencepiece() -> _Made:
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
    backend.train_from_iterator(CORPUS, trainer)
    # Byte pieces are ordinary tokens; only the trainer knew them as special.
    backend = _without_special(backend, pieces)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return _Made(backend, names)


def _wordpiece() -> _Made:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[EOS]", *MARKS], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _Made(backend, {"unk_token": "[UNK]", "eos_token": "[EOS]"})


def _without_special(backend: Tokenizer, pieces: list[str]) -> Tokenizer:
    state: dict[str, Any] = json.loads(backend.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] not in pieces
    ]
    return Tokenizer.from_str(json.dumps(state))


_KINDS: dict[str, Callable[[], _Made]] = {
    "bpe": _bpe,
    "byte": _byte,
    "char": _char,
    "sentencepiece": _sentencepiece,
    "wordpiece": _wordpiece,
}
