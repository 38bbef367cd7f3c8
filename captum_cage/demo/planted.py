r"""Hand-weighted models and texts, of which it is known what each sentence reads.

The models are Llama models of transformers whose weights are written down, not trained.
Their attention finds things by construction, so that an attribution can be held to the
truth instead of to another attribution. They write and read sentences of two forms::

    The lamp is red.        a fact, from outside: a thing and its colour
    So the key is red.      a generated sentence: its opener says what it is about

How the weights work. The hidden state is a list of one-hot parts, and norms are as good
as linear, because their ``eps`` outweighs what they norm. Heads of the first layer see
by position alone: rotary positions turn a bias into a look ``d`` tokens back. They put
the word one back and the word two back into parts of their own. The heads of the second
layer look something up: at ``is``, the word one back is the thing asked for; a colour
whose word two back is that thing has it; of several, the latest wins, since a slow
rotary frequency favours what is near. The colour found goes to the last part, which
``lm_head`` reads. The rest is grammar: a word follows from the word before it, a first
word from the role of the last message and the distance to ``<|assistant|>``.

What follows from that:

- Among sentences, a generated one reads those that it is said to read, and no other.
- Besides them it reads role tokens. Without them a model knows less well how to begin,
  and loses about one unit of log-probability, where a lost fact costs four or more.
- The unknown token, id 0, is nothing at all: its embedding is zero.

Source: Olsson et al. (2022), In-context learning and induction heads,
:cite:p:`olsson2022induction`; Su et al. (2021), RoFormer, :cite:p:`su2021roformer`.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "PLANTED_KINDS",
    "PlantedCase",
    "PlantedSentence",
    "planted_cases",
    "planted_model",
    "planted_tokenizer",
]

PLANTED_KINDS = ("copy", "induction", "chain", "trace", "override")
"""What the models of :func:`planted_model` are made to do."""

Span = tuple[int, int]
Message = dict[str, str]

# --- words ---------------------------------------------------------------------------

UNKNOWN, PAD, END = "<unk>", "<pad>", "<|end|>"
ASSISTANT = "<|assistant|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = (UNKNOWN, PAD, END, *(f"<|{role}|>" for role in ROLES))
CODE, KEY, SAFE, LAMP, GATE = "code", "key", "safe", "lamp", "gate"
OTHER_THINGS = tuple(
    "bell boat cart desk door drum fork harp kite pump rope sail tent vase wall".split()
)
THINGS = (CODE, KEY, SAFE, LAMP, GATE, *OTHER_THINGS)
COLOURS = tuple(
    "black blue brown gold gray green lime pink plum red teal white".split()
)
MISSING = "missing"  # the colour of a thing that nothing is said about
OPENERS = ("So", "Also", "Thus", "Send:")
WORDS = ("The", "the", "is", ".", *OPENERS, *THINGS, *COLOURS, MISSING)
# A token has the space before it, if there is one. These may stand at a beginning.
TOKENS = (
    *SPECIAL,
    *("The", *OPENERS, "."),
    *(" " + word for word in WORDS if word != "."),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# --- what the models write -----------------------------------------------------------

# After a message of this role, these sentences: how each begins, and about what.
Plan = dict[str, tuple[tuple[str, str], ...]]
PLANS: dict[str, Plan] = {
    "induction": {"user": (("So", CODE),)},
    "chain": {"user": (("So", KEY), ("Also", GATE), ("Thus", SAFE))},
    "trace": {"user": (("Send:", KEY),), "tool": (("Thus", SAFE),)},
}
PLANS["override"] = PLANS["trace"]
# What is looked up to say something of a thing, where it is not the thing itself.
LOOKED_UP = {
    "induction": {},
    "chain": {KEY: CODE, SAFE: KEY, GATE: LAMP},
    "trace": {KEY: CODE, SAFE: KEY},
}
LOOKED_UP["override"] = LOOKED_UP["trace"]
FACT_TOKENS = 5  # The lamp is red.
WRITTEN_TOKENS = 6  # So the lamp is red.
OUTDATED = 5  # sentences at least from an outdated fact to the latest
COPIED = 3  # sentences that the copying model writes
# From a copied token to its copy, past the end token and the role token.
COPY_DISTANCE = COPIED * FACT_TOKENS + 2

# --- sizes and scores ----------------------------------------------------------------

HEAD_SIZE = 64
ROPE_THETA = 1e16  # turns per token: 1, 10^-0.5, 10^-1, ...
FAST = 4  # frequencies that tell a token from its neighbours
SLOW = 5  # the frequency that tells near from far
STILL = 9  # frequencies from here on hardly turn within a text
EPS = 1e4
LENGTH = 128  # tokens up to which scores are made
# Scores, before the softmax: a token that is d back has exp(-20) of one that is not.
LOOK_BACK = 40.0
RECENCY = 0.2  # lost per token
# A colour scores less than what is no colour, so that without a match none is found.
NO_COLOUR = 7.0
MATCH = NO_COLOUR + 6.5 + RECENCY * LENGTH
ROLE_RECENCY = 0.6
ROLE_MATCH = 8.0 + ROLE_RECENCY * LENGTH


def planted_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the planted models: a word with the space before it is a token.

    Text comes back from its ids unchanged. A word that is not among its 41 is the
    unknown token, id 0. The chat template writes ``<|role|>content<|end|>``.

    Example:
        >>> tokenizer = planted_tokenizer()
        >>> ids = tokenizer("<|user|>The lamp is red.").input_ids
        >>> tokenizer.convert_ids_to_tokens(ids)
        ['<|user|>', 'The', ' lamp', ' is', ' red', '.']
    """
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, token in enumerate(SPECIAL)
    ]
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    pieces = {"Regex": r" ?\w+:?|[^\w\s]|\s"}
    settings = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": pieces,
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            unk_token=UNKNOWN,
            pad_token=PAD,
            eos_token=END,
            additional_special_tokens=[f"<|{role}|>" for role in ROLES],
            clean_up_tokenization_spaces=False,
            model_max_length=LENGTH,
            padding_side="left",
        )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# --- models --------------------------------------------------------------------------


def planted_model(
    kind: str = "induction",
    *,
    confidence: float = 0.98,
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A hand-weighted model that writes the texts of one kind, and its tokenizer.

    The kinds are those of :func:`planted_cases`. The model of ``"copy"`` has one layer
    and one head, which sees the token 16 back, whatever it is, and writes it next. The
    others look things up, in two layers: after ``the lamp is``, the colour of the lamp
    in the latest sentence of this form, or ``missing``. Only some things go by others:
    where there are several steps, the key is looked up as the code, the safe as the
    key, and the gate as the lamp.

    Texts of up to 128 tokens are read right. Of two facts about one thing, the latest
    wins clearly (0.99 of the attention) if 25 tokens lie between them.

    Args:
        kind (str, optional): one of :data:`PLANTED_KINDS`. ``"trace"`` and
            ``"override"`` are the same model. Default: ``"induction"``
        confidence (float, optional): probability of a colour that is found, more than
            0.5 and less than 1; a copy's is a little higher. Nearer to 1, gradients
            vanish. Default: ``0.98``
        dtype (torch.dtype, optional): of the weights. Default: ``torch.float32``
        seed (int, optional): turns the hidden space by a random rotation, which
            changes nothing that the model says. None leaves one number per word.
            Default: ``None``

    Returns:
        tuple[LlamaForCausalLM, PreTrainedTokenizerFast]: the model in evaluation mode,
        on the CPU, and its tokenizer. The global random state is left as it was.

    Raises:
        ValueError: if the kind is unknown or the confidence out of range.

    Example:
        >>> model, tokenizer = planted_model("induction")
        >>> text = "<|user|>The lamp is red. The code is blue.<|end|><|assistant|>"
        >>> ids = tokenizer(text, return_tensors="pt").input_ids
        >>> tokenizer.decode(model.generate(ids, max_new_tokens=9)[0, ids.shape[1] :])
        'So the code is blue.<|end|>'
    """
    _check_kind(kind)
    if not 0.5 < confidence < 1.0:
        raise ValueError(
            "confidence: must be a probability, more than 0.5 and less than 1, but "
            f"{confidence!r} came. Pass 0.98 if in doubt."
        )
    tokenizer = planted_tokenizer()
    known = _logit_of(confidence)
    if kind == "copy":
        parts = _Parts(0)
        model = _empty_model(parts.width, layers=1, heads=1)
        _write_copying(model, parts, known)
    else:
        plan = PLANS[kind]
        sentences = max(map(len, plan.values()))
        parts = _Parts(sentences)
        model = _empty_model(parts.width, layers=2, heads=3 + sentences)
        _write_looking_up(model, parts, LOOKED_UP[kind])
        _write_grammar(model, parts, plan, known)
    if seed is not None:
        _rotate(model, seed)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval(), tokenizer


def _check_kind(kind: str) -> None:
    if kind not in PLANTED_KINDS:
        raise ValueError(
            f"kind: must be one of {', '.join(map(repr, PLANTED_KINDS))}, not "
            f"{kind!r}. Pass the kind of texts that the model is to write."
        )


def _logit_of(confidence: float) -> float:
    """Logit ``s`` of a word that has this probability.

    One other word has the logit ``s / 2``, all others have 0.
    """
    odds = 1 / confidence - 1
    return 2 * math.log((1 + math.sqrt(1 + 4 * odds * (len(TOKENS) - 2))) / (2 * odds))


class _Parts:
    """The parts of the hidden state, and where each number of them stands.

    - ``word``: the word itself, one number per word;
    - ``back 1`` and ``back 2``: the word one and two back, if it matters;
    - ``since``: whether ``<|assistant|>`` is 1, 2, ... sentences back;
    - ``role``: the role of the last message that the model did not write;
    - ``one``: one;
    - ``found``: the word that was looked up or copied.

    Args:
        sentences (int): sentences in a turn of the model.
    """

    def __init__(self, sentences: int) -> None:
        words = [*SPECIAL[2:], *WORDS]
        entries: dict[str, Sequence[object]] = {
            "word": words,
            "back 1": [*OPENERS, *THINGS],
            "back 2": THINGS,
            "since": range(1, sentences + 1),
            "role": ("user", "tool"),
            "one": (1,),
            "found": [END, *WORDS],
        }
        places = [(part, entry) for part, names in entries.items() for entry in names]
        self._place = {place: number for number, place in enumerate(places)}
        self.width = len(places)

    def at(self, part: str, entry: object) -> int:
        """Where a number stands in the hidden state."""
        return self._place[part, entry]


def _empty_model(width: int, layers: int, heads: int) -> LlamaForCausalLM:
    """A model that does nothing: weights are zero, norms leave all as it is."""
    settings: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "hidden_size": width,
        "intermediate_size": 4,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 2 * LENGTH,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": EPS,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": TOKENS.index(END),
        "pad_token_id": TOKENS.index(PAD),
    }
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    for name, parameter in model.named_parameters():
        size = math.sqrt(EPS) if "norm" in name else 0.0
        parameter.data = torch.full_like(parameter, size, dtype=torch.float64)
    return model


class _Head:
    """One head of an attention layer, to be written.

    Scores are sums of terms ``query * key``, each in two numbers of the head that are
    turned by the same angle per token.
    """

    def __init__(self, model: LlamaForCausalLM, layer: int, number: int) -> None:
        self._attention: Any = model.model.layers[layer].self_attn
        self._start = number * HEAD_SIZE
        self._turns = model.model.rotary_emb.inv_freq.double()  # (HEAD_SIZE / 2,)
        self._matches = 0
        self._carried = 0

    def look_back(self, distance: int) -> None:
        """Prefer the token that is ``distance`` back, whatever it is."""
        for number in range(FAST):
            self._by_position(number, LOOK_BACK, -distance * self._turns[number])

    def prefer_near(self, per_token: float) -> None:
        """Take ``per_token`` from the score of a token for each token in between."""
        turn = self._turns[SLOW]
        self._by_position(SLOW, float(per_token / turn), torch.tensor(math.pi / 2))

    def _by_position(self, number: int, score: float, angle: Tensor) -> None:
        # The score is that of the angle between the two, after rotary positions.
        size = math.sqrt(score) * HEAD_SIZE**0.25
        query, key = self._attention.q_proj.bias, self._attention.k_proj.bias
        first = self._start + number
        key.data[first] = size
        query.data[first] = size * angle.cos()
        query.data[first + HEAD_SIZE // 2] = size * angle.sin()

    def match(
        self, score: float, queries: Iterable[int] | None, keys: Iterable[int]
    ) -> None:
        """Add ``score`` where one of the queries meets one of the keys.

        Args:
            score (float): what is added, per product of the two.
            queries (Iterable[int], optional): places in the hidden state. None for all
                tokens alike.
            keys (Iterable[int]): places in the hidden state.
        """
        place = self._start + STILL + self._matches
        self._matches += 1
        size = math.sqrt(abs(score)) * HEAD_SIZE**0.25
        if queries is None:
            self._attention.q_proj.bias.data[place] = math.copysign(size, score)
        else:
            self._attention.q_proj.weight.data[place, list(queries)] = size
        self._attention.k_proj.weight.data[place, list(keys)] = size

    def carry(self, pairs: Iterable[tuple[int, int]], share: float = 1.0) -> None:
        """Bring numbers of the hidden state from one place to another."""
        for source, target in pairs:
            place = self._start + self._carried
            self._carried += 1
            self._attention.v_proj.weight.data[place, source] = 1.0
            self._attention.o_proj.weight.data[target, place] = share


def _write_words(model: LlamaForCausalLM, parts: _Parts) -> None:
    """Embeddings: one number per word, with or without a space before it."""
    for number, token in enumerate(TOKENS):
        if token not in (UNKNOWN, PAD):
            place = parts.at("word", token.strip())
            model.model.embed_tokens.weight.data[number, place] = 1.0
    model.model.layers[0].self_attn.o_proj.bias.data[parts.at("one", 1)] = 1.0


def _write_copying(model: LlamaForCausalLM, parts: _Parts, known: float) -> None:
    """The next token is the one that is ``COPY_DISTANCE`` before it."""
    _write_words(model, parts)
    head = _Head(model, 0, 0)
    head.look_back(COPY_DISTANCE - 1)
    words = [END, *WORDS]
    head.carry((parts.at("word", word), parts.at("found", word)) for word in words)
    logits = model.lm_head.weight.data
    at_start = parts.at("word", ASSISTANT)
    for number, token in enumerate(TOKENS):
        if token.strip() in words:
            logits[number, parts.at("found", token.strip())] = known
        # Of a word's two tokens, the one without a space stands at a beginning.
        if " " + token in TOKENS:
            logits[number, parts.at("one", 1)] = -known
            logits[number, at_start] = known
            logits[TOKENS.index(" " + token), at_start] = -known


def _write_looking_up(
    model: LlamaForCausalLM, parts: _Parts, looked_up: dict[str, str]
) -> None:
    """Attention that finds the colour of a thing, the role, and the distance."""
    _write_words(model, parts)
    heads = model.config.num_attention_heads
    for back, entries in ((1, [*OPENERS, *THINGS]), (2, THINGS)):
        head = _Head(model, 0, back - 1)
        head.look_back(back)
        part = f"back {back}"
        head.carry((parts.at("word", word), parts.at(part, word)) for word in entries)

    role = _Head(model, 0, 2)
    role.prefer_near(ROLE_RECENCY)
    marks = {name: parts.at("word", f"<|{name}|>") for name in ("user", "tool")}
    role.match(ROLE_MATCH, [parts.at("word", ASSISTANT)], marks.values())
    role.carry((mark, parts.at("role", name)) for name, mark in marks.items())

    for sentence in range(1, heads - 3 + 1):
        head = _Head(model, 0, 2 + sentence)
        head.look_back(sentence * WRITTEN_TOKENS)
        head.carry([(parts.at("word", ASSISTANT), parts.at("since", sentence))])

    colours = [*COLOURS, MISSING]
    for number in range(heads):  # all alike, so that attention maps show it
        head = _Head(model, 1, number)
        head.prefer_near(RECENCY)
        for thing in THINGS:
            asked = [t for t in THINGS if looked_up.get(t, t) == thing]
            head.match(
                MATCH,
                [parts.at("back 1", t) for t in asked],
                [parts.at("back 2", thing)],
            )
        head.match(-NO_COLOUR, None, [parts.at("word", colour) for colour in colours])
        head.carry(
            ((parts.at("word", c), parts.at("found", c)) for c in colours), 1 / heads
        )


def _write_grammar(
    model: LlamaForCausalLM, parts: _Parts, plan: Plan, known: float
) -> None:
    """Logits: ``known`` for the word that follows, half of it for what may as well."""
    logits = model.lm_head.weight.data
    openers = {opener for sentences in plan.values() for opener, _ in sentences}
    last = max(map(len, plan.values()))

    def token(word: str, sentence: int = 1) -> int:
        return TOKENS.index(word if sentence == 0 or word in SPECIAL else " " + word)

    # All openers are at hand at first; once there is a word, none is.
    may_open = {
        token(opener, number)
        for sentences in plan.values()
        for number, (opener, _) in enumerate(sentences)
    }
    for number in may_open:
        logits[number, parts.at("one", 1)] = known / 2
        logits[number, parts.at("since", last)] = -known / 2
        for word in WORDS:
            if word != ".":
                logits[number, parts.at("word", word)] = -known / 2
    for role, sentences in plan.items():
        logits[token(sentences[0][0], 0), parts.at("role", role)] = known / 2
        for number, (opener, thing) in enumerate(sentences):
            if number:
                logits[token(opener, number), parts.at("since", number)] = known / 2
            logits[token(thing), parts.at("back 1", opener)] = known
    logits[TOKENS.index(END), parts.at("since", last)] = known
    for opener in openers:
        logits[token("the"), parts.at("word", opener)] = known
    for thing in THINGS:
        logits[token("is"), parts.at("word", thing)] = known
    for colour in (*COLOURS, MISSING):
        logits[token(colour), parts.at("found", colour)] = known
        logits[TOKENS.index("."), parts.at("word", colour)] = known
    logits[token(MISSING), parts.at("word", "is")] = known / 2


def _rotate(model: LlamaForCausalLM, seed: int) -> None:
    """Turn the hidden space; the model computes the same."""
    generator = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    noise = torch.randn(width, width, generator=generator, dtype=torch.float64)
    turned = torch.linalg.qr(noise).Q  # (width, width)
    inner: Any = model.model
    readers = [inner.embed_tokens, model.lm_head]
    for layer in inner.layers:
        attention = layer.self_attn
        readers += [attention.q_proj, attention.k_proj, attention.v_proj]
        attention.o_proj.weight.data = turned.T @ attention.o_proj.weight.data
        attention.o_proj.bias.data = turned.T @ attention.o_proj.bias.data
    for module in readers:
        module.weight.data = module.weight.data @ turned


# --- cases ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PlantedSentence:
    """A sentence of a conversation, and what it reads.

    Attributes:
        text (str): the sentence.
        message (int): index of its message.
        span (tuple[int, int]): its character range in the content of the message.
        generated (bool): whether the model writes it.
        reads (tuple[int, ...]): the sentences that it reads directly, by their place
            in the conversation. Sentences from outside read none.
    """

    text: str
    message: int
    span: Span
    generated: bool
    reads: tuple[int, ...]


@dataclass(frozen=True)
class PlantedCase:
    """A conversation of which it is known what each generated sentence reads.

    Attributes:
        kind (str): one of :data:`PLANTED_KINDS`.
        messages (tuple[dict[str, str], ...]): all of it, as ``apply_chat_template``
            takes it. Assistant messages are exactly what the model generates after
            ``<|assistant|>``, without ``<|end|>``. The last message is one of them.
        sentences (tuple[PlantedSentence, ...]): all sentences, in reading order.
    """

    kind: str
    messages: tuple[Message, ...]
    sentences: tuple[PlantedSentence, ...]

    @property
    def before(self) -> list[Message]:
        """The messages after which the model writes the last one."""
        return [dict(message) for message in self.messages[:-1]]

    @property
    def completion(self) -> str:
        """What the model writes at last, without ``<|end|>``."""
        return self.messages[-1]["content"]

    @property
    def prompt(self) -> str:
        """What stands before the completion, as the chat template writes it."""
        return "".join(map(_rendered, self.messages[:-1])) + ASSISTANT

    @property
    def text(self) -> str:
        """The whole conversation, as the chat template writes it."""
        return "".join(map(_rendered, self.messages))

    @property
    def explained(self) -> int:
        """The sentence in question, which is the last one."""
        return len(self.sentences) - 1

    @property
    def sources(self) -> tuple[int, ...]:
        """The sentences from outside."""
        return tuple(i for i, s in enumerate(self.sentences) if not s.generated)

    def span(self, sentence: int) -> Span:
        """Character range of a sentence in :attr:`text`, whose beginning is the prompt.

        Args:
            sentence (int): its place in the conversation.
        """
        found = self.sentences[sentence]
        message = self.messages[found.message]
        start = sum(len(_rendered(m)) for m in self.messages[: found.message])
        start += len(_rendered(message)) - len(message["content"]) - len(END)
        return start + found.span[0], start + found.span[1]

    def origins(self, sentence: int) -> tuple[int, ...]:
        """The sentences from outside that a sentence depends on, on any path.

        Args:
            sentence (int): its place in the conversation.
        """
        return tuple(sorted({path[-1] for path in self._paths(sentence)}))

    def messages_read(self, message: int) -> tuple[int, ...]:
        """The messages that the sentences of a message read directly.

        Args:
            message (int): its place in the conversation.
        """
        reads = {
            self.sentences[read].message
            for sentence in self.sentences
            if sentence.message == message
            for read in sentence.reads
        }
        return tuple(sorted(reads))

    @property
    def real_paths(self) -> tuple[tuple[int, ...], ...]:
        """All paths from the sentence in question to sentences from outside.

        Each is a tuple of places in the conversation, the sentence in question first.
        """
        return tuple(sorted(self._paths(self.explained)))

    @property
    def false_paths(self) -> tuple[tuple[int, ...], ...]:
        """Paths of which at least one step is not there, in the same form.

        To a source that nothing leads to, directly or through a sentence that is read;
        and through a sentence that is not read, to what this one reads.
        """
        last = self.explained
        read = self.sentences[last].reads
        paths: list[tuple[int, ...]] = [
            (last, source)
            for source in self.sources
            if source not in self.origins(last)
        ]
        for step, sentence in enumerate(self.sentences[:last]):
            if not sentence.generated:
                continue
            if step in read:
                origins = self.origins(step)
                sources = [s for s in self.sources if s < step and s not in origins]
            else:
                sources = list(self.origins(step))
            paths += [(last, step, source) for source in sources]
        return tuple(sorted(paths))

    def _paths(self, sentence: int) -> list[tuple[int, ...]]:
        if not self.sentences[sentence].generated:
            return [(sentence,)]
        reads = self.sentences[sentence].reads
        return [(sentence, *path) for read in reads for path in self._paths(read)]


def _rendered(message: Message) -> str:
    return f"<|{message['role']}|>{message['content']}{END}"


def planted_cases(
    n: int, seed: int, kind: str = "induction"
) -> tuple[PlantedCase, ...]:
    """Conversations drawn at random, the same for the same arguments.

    - ``"copy"``: 7 to 10 facts, of which the model copies the last three. Each
      sentence reads one fact, each of its tokens the token 17 back, and no other.
    - ``"induction"``: 6 to 9 facts, one about the code. The model says what the code
      is. In some, an older fact says otherwise; the latest counts.
    - ``"chain"``: 6 to 9 facts. A first step reads the code, a second one the lamp,
      and the answer reads the first step: not the fact behind it, nor the second.
    - ``"trace"``: 5 or 6 messages of system and user, one of them about the code; a
      call that reads it; a tool's result that does not matter. The last turn reads the
      call, or, after one more message of the user, the early message again.
    - ``"override"``: the same with the tool's result about the code, too. The last turn
      reads this result, not the early message that the call has read, nor the call.

    Everything else is about other things, in other colours. The first ``n`` cases of a
    longer sample are the sample of length ``n``.

    Args:
        n (int): number of cases.
        seed (int): seed of the draw. The global random state is neither read nor
            changed.
        kind (str, optional): one of the kinds above. Default: ``"induction"``

    Returns:
        tuple[PlantedCase, ...]: ``n`` cases.

    Raises:
        ValueError: if ``n`` is negative or the kind unknown.

    Example:
        >>> case = planted_cases(1, seed=0, kind="chain")[0]
        >>> print(case.completion)
        So the key is gold. Also the gate is lime. Thus the safe is gold.
        >>> for path in case.real_paths:
        ...     print(" <- ".join(case.sentences[place].text for place in path))
        Thus the safe is gold. <- So the key is gold. <- The code is gold.
    """
    _check_kind(kind)
    if n < 0:
        raise ValueError(
            f"n: the number of cases must be 0 or more, not {n}. "
            "Pass how many cases to draw."
        )
    rng = random.Random(f"planted {kind} {seed}")
    return tuple(_DRAW[kind](rng) for _ in range(n))


class _Draft:
    """A conversation that is being written."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        # What the answer may be, and what everything else is.
        self.colour, self.other_colour, *self._colours = rng.sample(
            COLOURS, len(COLOURS)
        )
        self._things = rng.sample(OTHER_THINGS, len(OTHER_THINGS))
        self._messages: list[Message] = []
        self._sentences: list[PlantedSentence] = []

    def others(self, count: int) -> list[str]:
        """Facts about things that no other fact is about."""
        return [
            _fact(self._things.pop(), self.rng.choice(self._colours))
            for _ in range(count)
        ]

    def say(self, role: str, texts: Iterable[str], *reads: tuple[int, ...]) -> None:
        """Add a message; ``reads`` are what its sentences read, if it is generated."""
        content = ""
        for number, text in enumerate(texts):
            content += " " * bool(content)
            self._sentences.append(
                PlantedSentence(
                    text,
                    len(self._messages),
                    (len(content), len(content) + len(text)),
                    bool(reads),
                    reads[number] if reads else (),
                )
            )
            content += text
        self._messages.append({"role": role, "content": content})

    def place(self, text: str) -> int:
        """The latest sentence of this text."""
        places = [i for i, s in enumerate(self._sentences) if s.text == text]
        return places[-1]

    def case(self, kind: str) -> PlantedCase:
        """What was written."""
        return PlantedCase(kind, tuple(self._messages), tuple(self._sentences))


def _fact(thing: str, colour: str) -> str:
    return f"The {thing} is {colour}."


def _draw_copy(rng: random.Random) -> PlantedCase:
    draft = _Draft(rng)
    facts = draft.others(rng.randint(7, 10))
    draft.say("user", facts)
    first = len(facts) - COPIED
    copied = facts[first:]
    draft.say("assistant", copied, *((first + i,) for i in range(COPIED)))
    return draft.case("copy")


def _draw_induction(rng: random.Random) -> PlantedCase:
    draft = _Draft(rng)
    count = rng.randint(6, 9)
    facts = draft.others(count)
    outdated = rng.random() < 0.5
    place = rng.randrange(OUTDATED if outdated else 0, count)
    facts[place] = _fact(CODE, draft.colour)
    if outdated:
        facts[rng.randint(0, place - OUTDATED)] = _fact(CODE, draft.other_colour)
    draft.say("user", facts)
    draft.say("assistant", [f"So the {CODE} is {draft.colour}."], (place,))
    return draft.case("induction")


def _draw_chain(rng: random.Random) -> PlantedCase:
    draft = _Draft(rng)
    count = rng.randint(6, 9)
    facts = draft.others(count)
    code, lamp = rng.sample(range(count), 2)
    facts[code] = _fact(CODE, draft.colour)
    facts[lamp] = _fact(LAMP, draft.other_colour)
    draft.say("user", facts)
    written = [
        f"So the {KEY} is {draft.colour}.",
        f"Also the {GATE} is {draft.other_colour}.",
        f"Thus the {SAFE} is {draft.colour}.",
    ]
    draft.say("assistant", written, (code,), (lamp,), (count,))
    return draft.case("chain")


def _draw_trace(rng: random.Random, overrides: bool = False) -> PlantedCase:
    draft = _Draft(rng)
    roles = ["system"] + ["user"] * rng.randint(4, 5)
    # An overridden message stands far enough from what overrides it.
    told = rng.randrange(len(roles) - 2 * overrides)
    early = _fact(CODE, draft.colour)
    for number, role in enumerate(roles):
        facts = draft.others(rng.randint(1, 2) - (number == told))
        if number == told:
            facts.insert(rng.randint(0, len(facts)), early)
        draft.say(role, facts)
    call = f"Send: the {KEY} is {draft.colour}."
    draft.say("assistant", [call], (draft.place(early),))
    result = _fact(CODE, draft.other_colour)
    draft.say("tool", [result] if overrides else draft.others(1))
    if overrides:
        draft.say("user", draft.others(1))
        again = f"Send: the {KEY} is {draft.other_colour}."
        draft.say("assistant", [again], (draft.place(result),))
    elif rng.random() < 0.5:
        draft.say("user", draft.others(1))
        draft.say("assistant", [call], (draft.place(early),))
    else:
        answer = f"Thus the {SAFE} is {draft.colour}."
        draft.say("assistant", [answer], (draft.place(call),))
    return draft.case("override" if overrides else "trace")


_DRAW: dict[str, Callable[[random.Random], PlantedCase]] = {
    "copy": _draw_copy,
    "induction": _draw_induction,
    "chain": _draw_chain,
    "trace": _draw_trace,
    "override": partial(_draw_trace, overrides=True),
}
