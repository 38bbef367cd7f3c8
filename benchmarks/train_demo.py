"""Train the demo model of ``captum_cage.demo`` from scratch.

Writes the tokenizer and the model, and evaluates them on held-out problems and
conversations of every kind::

    python benchmarks/train_demo.py             # the model that ships
    python benchmarks/train_demo.py --smoke     # seconds, for CI
    python benchmarks/train_demo.py --shipped   # evaluates the model in the package

Trains on a GPU if PyTorch sees one. A run that was interrupted goes on from its last
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import re
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from captum_cage.demo.conversations import (
    CONVERSATION_KINDS,
    Conversation,
    Message,
    Source,
    draw_conversation,
    sample_conversations,
)
from captum_cage.demo.model import DEMO_FILES, load_demo
from captum_cage.demo.problems import (
    KINDS,
    Problem,
    draw_draft,
    draw_kind,
    is_held_out,
    problem_of,
    sample_problems,
    vocabulary,
)

UNKNOWN, PAD, END = "<unk>", "<pad>", "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}
SPECIAL = [UNKNOWN, PAD, END, *ROLES.values()]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('The roles are system, user, assistant and tool, not ' "
    "+ message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_LENGTH = 512
MAX_NEW_TOKENS = 128
ROPE_THETA = 10000.0
STEPS = 5600
SAVE_EVERY = 200
ADAM = 1.0  # learning rate of AdamW, as a share of Muon's
POOL = 1024  # lessons drawn at once and sorted by length into batches
IGNORED = -100

IntArray = np.ndarray[Any, np.dtype[np.int64]]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that has every word of the problems as one token.

    Numbers up to 99 are one token each, so that a number is one thing to look up and
    one thing to explain.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = vocabulary()
    starts = [word for word in words if word[0].isupper()]
    corpus = [*starts, *(" " + word for word in words), "'s", " +", " ="]
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES.values()),
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(
    tokenizer: PreTrainedTokenizerFast, layers: int, width: int
) -> LlamaForCausalLM:
    """A freshly initialised Llama model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # faster to train on a CPU than sdpa
    initialise(model)
    return model


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    """Start where looking things up is near.

    Found by chance, a look-up takes most of the training. It needs to know which words
    stand together, so head ``h < 3`` of the first layer starts by copying the token
    ``h + 1`` back: with rotary positions, a bias of the queries that is the keys' bias
    turned back by ``d`` steps prefers the token ``d`` steps back. And it needs to find
    the place *after* one that is like the present one, so in other layers head ``h``
    starts by comparing the token ``h`` back with the token ``h + 1`` back of each place
    before, as induction heads do; the last head compares like with like.

    Source: Olsson et al. (2022), In-context learning and induction heads,
    arXiv:2209.11895; Trockman and Kolter (2023), Mimetic initialization of
    self-attention layers, arXiv:2305.09828.
    """
    config = model.config
    width = config.hidden_size
    heads = config.num_attention_heads
    size = width // heads
    copies = min(3, heads)
    turns = ROPE_THETA ** (-torch.arange(0, size, 2) / size)
    fast = size // 5  # these tell neighbours apart; the others know no distance
    for matrix in model.model.parameters():
        if matrix.ndim == 2:
            torch.nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    first = model.model.layers[0].self_attn
    torch.nn.init.normal_(first.q_proj.weight, std=0.02)
    torch.nn.init.normal_(first.k_proj.weight, std=0.02)
    copied = torch.randn(size, width) * width**-0.5
    read = [copied]  # read[h] finds in a place the token h back
    for head in range(copies):
        block = slice(head * size, (head + 1) * size)
        angle = -(head + 1) * turns[:fast]
        cosine = slice(block.start, block.start + fast)
        sine = slice(block.start + size // 2, block.start + size // 2 + fast)
        first.k_proj.bias[cosine] = 5.0
        first.q_proj.bias[cosine] = 5.0 * angle.cos()
        first.q_proj.bias[sine] = 5.0 * angle.sin()
        first.v_proj.weight[block] = copied
        place = torch.linalg.qr(torch.randn(width, size)).Q
        first.o_proj.weight[:, block] = 2.0 * place
        read.append(place.T)
    slow = torch.ones(size)
    slow[:fast] = slow[size // 2 : size // 2 + fast] = 0.1
    for layer in model.model.layers[1:]:
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        for head in range(copies):
            block = slice(head * size, (head + 1) * size)
            mixed = slow[:, None] * torch.linalg.qr(torch.randn(size, size)).Q
            attention.q_proj.weight[block] = 1.3 * mixed @ read[head]
            attention.k_proj.weight[block] = 1.3 * mixed @ read[head + 1]


def encode(
    tokenizer: PreTrainedTokenizerFast, lessons: Sequence[Lesson]
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of each lesson, and which of them the model is to write."""
    texts = [turn.text for lesson in lessons for turn in lesson.turns]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts))
    known = tokenizer.get_vocab()
    rows = []
    for lesson in lessons:
        ids: list[int] = []
        written: list[bool] = []
        for turn in lesson.turns:
            head = [known[ROLES[turn.role]]] if turn.role else []
            body = list(next(encoded).ids)
            if turn.role or turn.written:
                body.append(known[END])
            ids += head + body
            written += [False] * len(head) + [turn.written] * len(body)
        rows.append((ids, written))
    return rows


def blank(
    ids: IntArray, ends: IntArray, rng: np.random.Generator, share: float
) -> IntArray:
    """The ids with a share of the rows partly replaced by the unknown token, id 0.

    Half of these rows lose random tokens, half whole sentences. Explanations by
    ablation put this token in the place of what they take away: a model that has seen
    it becomes unsure there, as it should, and not odd. Marks of roles and ends stay.
    """
    rows, length = ids.shape
    text = ids >= len(SPECIAL)
    chance = np.zeros((rows, length))
    fate = rng.random(rows)
    by_token = fate < share / 2
    by_sentence = (fate >= share / 2) & (fate < share)
    chance[by_token] = rng.uniform(0.0, 0.3, (int(by_token.sum()), 1))
    gone = rng.random((rows, length)) < chance

    last = np.isin(ids, ends)
    sentence: IntArray = np.cumsum(last, axis=1) - last  # (rows, length)
    for row in np.flatnonzero(by_sentence):
        count = int(sentence[row][text[row]].max()) + 1
        lost = rng.permutation(count)[: min(count, rng.geometric(0.6))]
        gone[row] = np.isin(sentence[row], lost)
    blanked: IntArray = np.where(gone & text, 0, ids)
    return blanked


class Stage(NamedTuple):
    """What the lessons are like up to a share of the training.

    ``long``, ``many`` and ``talk`` are the shares of long chains, of problems among
    many facts and of conversations.
    """

    until: float
    facts: tuple[int, int]
    same_item: float
    repeat: float
    blank: float
    long: float
    many: float
    talk: float


# Looking up a fact is what takes long to learn. It is learnt soonest by repeating a few
# facts in another order, all about one item, where only the person tells them apart.
# The last stage is like the held-out problems.
STAGES = (
    Stage(0.10, (2, 5), 1.0, 0.4, 0.00, 0.00, 0.00, 0.00),
    Stage(0.20, (4, 7), 0.8, 0.2, 0.02, 0.10, 0.00, 0.15),
    Stage(0.50, (4, 9), 0.8, 0.0, 0.05, 0.15, 0.15, 0.25),
    Stage(1.00, (6, 9), 0.4, 0.0, 0.25, 0.15, 0.15, 0.25),
)


class Turn(NamedTuple):
    """A text with its role, or with none, and whether the model is to write it."""

    role: str
    text: str
    written: bool


class Lesson(NamedTuple):
    """A plain text or a conversation, some of it to be written by the model.

    ``repeats``: what to write are facts told before, in another order. Then the first
    word of a sentence cannot be known and is not asked for.
    """

    turns: tuple[Turn, ...]
    repeats: bool = False


def practice(stage: Stage, seed: int) -> list[Lesson]:
    """A pool of lessons: repeated facts, problems and conversations.

    Half of the facts and problems are plain text, the other half are chats.
    """
    rng = random.Random(f"practice {seed}")
    lessons: list[Lesson] = []
    while len(lessons) < POOL:
        fate = rng.random()
        if fate < stage.talk:
            talk = draw_conversation(rng, "mixed", same_item=stage.same_item)
            if not talk.is_held_out:
                lessons.append(Lesson(turns_of(talk)))
            continue
        if fate < stage.talk + stage.long:
            problem = draw_kind(rng, "long_chain", same_item=stage.same_item)
        elif fate < stage.talk + stage.long + stage.many:
            problem = draw_kind(rng, "distractors", same_item=stage.same_item)
        else:
            problem = problem_of(
                draw_draft(
                    rng,
                    rng.choice((1, 1, 2, 2, 3)),
                    facts=stage.facts,
                    same_item=stage.same_item,
                )
            )
        if is_held_out(problem.prompt):
            continue
        user, assistant = rng.choice((("", ""), ("user", "assistant")))
        prompt, answer = problem.prompt, problem.completion
        repeats = fate >= 1 - stage.repeat
        if repeats:
            told = [problem.prompt[slice(*fact)] for fact in problem.facts]
            prompt = " ".join(told)
            answer = " " + " ".join(rng.sample(told, len(told)))
        turns = (Turn(user, prompt, False), Turn(assistant, answer, True))
        lessons.append(Lesson(turns, repeats))
    return lessons


def turns_of(talk: Conversation) -> tuple[Turn, ...]:
    """A conversation's messages, the assistant's to be written."""
    return tuple(
        Turn(message["role"], message["content"], message["role"] == "assistant")
        for message in talk.messages
    )


Batch = tuple[IntArray, IntArray]  # inputs and labels, (rows, length) each


class Course(NamedTuple):
    """What the batches of a training depend on, besides the code."""

    steps: int
    batch: int
    seed: int


def pool_of_batches(
    tokenizer: PreTrainedTokenizerFast, course: Course, pool: int
) -> list[Batch]:
    """The batches that one pool of lessons makes."""
    full_stop = tokenizer.get_vocab()["."]
    ends = np.array([full_stop, tokenizer.get_vocab()["?"]])
    per_pool = POOL // course.batch
    seed = course.seed * 1_000_003 + pool
    progress = pool * per_pool / course.steps
    stage = next(stage for stage in STAGES if progress < stage.until)
    lessons = practice(stage, seed)
    encoded = encode(tokenizer, lessons)
    rng = np.random.default_rng(seed)
    order = sorted(range(POOL), key=lambda index: len(encoded[index][0]))
    made = []
    for group in rng.permutation(per_pool):
        chosen = order[group * course.batch :][: course.batch]
        rows = [encoded[i] for i in chosen]
        length = 8 * math.ceil(max(len(ids) for ids, _ in rows) / 8)
        ids = np.full((course.batch, length), tokenizer.pad_token_id)
        labels = np.full((course.batch, length), IGNORED)
        for row, (tokens, written) in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            places = np.flatnonzero(written)
            labels[row, places - 1] = ids[row, places]
            if lessons[chosen[row]].repeats:
                labels[row, places[0] - 1] = IGNORED
                labels[row, ids[row] == full_stop] = IGNORED
        made.append((blank(ids, ends, rng, stage.blank), labels))
    return made


def batches(
    tokenizer: PreTrainedTokenizerFast, course: Course, start: int, workers: int
) -> Iterator[Batch]:
    """Inputs and labels of every training step from ``start``, the same in each run.

    Drawn ahead by ``workers`` other processes, or here if there are none.
    """
    per_pool = POOL // course.batch
    pools = range(start // per_pool, math.ceil(course.steps / per_pool))
    skipped = start % per_pool
    for made in _pools(tokenizer, course, pools, workers):
        yield from made[skipped:]
        skipped = 0


def _pools(
    tokenizer: PreTrainedTokenizerFast, course: Course, pools: range, workers: int
) -> Iterator[list[Batch]]:
    if workers == 0:
        for pool in pools:
            yield pool_of_batches(tokenizer, course, pool)
        return
    # A forked process would inherit the locks of this one's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as executor:
        ahead: deque[Future[list[Batch]]] = deque()
        for pool in pools:
            ahead.append(executor.submit(pool_of_batches, tokenizer, course, pool))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    args: argparse.Namespace,
) -> None:
    """Train the model in place, saving a checkpoint now and then."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others, lr=ADAM * args.lr, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]
    device = model.device
    checkpoint: Path = args.checkpoint
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["steps"] != args.steps:
            raise ValueError(
                f"{checkpoint}: was made by a run of {state['steps']} steps, not "
                f"{args.steps}. Pass the same --steps to go on, or delete it."
            )
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]

    model.train()
    backbone = torch.compile(model.model, dynamic=True) if args.compile else model.model
    bar = tqdm(total=args.steps, initial=start, unit="step", mininterval=5)
    course = Course(args.steps, args.batch, args.seed)
    drawn = batches(tokenizer, course, start, args.workers)
    for step, batch in zip(range(start, args.steps), drawn, strict=False):
        inputs, labels = (torch.from_numpy(part).to(device) for part in batch)
        warm = min(1.0, (step + 1) / (0.04 * args.steps))
        rate = args.lr * warm * (1 - step / args.steps) ** 2
        for optimizer, share in zip(optimizers, (1.0, ADAM), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * rate
        with torch.autocast(device.type, torch.bfloat16):
            hidden = backbone(input_ids=inputs, use_cache=False).last_hidden_state
            asked = labels != IGNORED
            logits = model.lm_head(hidden[asked])
        loss = functional.cross_entropy(logits.float(), labels[asked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.update()
        if step % 100 == 0:  # reading a loss waits for the device
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % SAVE_EVERY == 0:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step + 1,
                "steps": args.steps,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    bar.close()
    model.eval()


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Write the files that ``load_demo`` and ``from_pretrained`` read.

    The settings are written by hand, in the names that every supported version of
    transformers reads. Weights are float16 on disk, which halves the package.
    """
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    config = model.config
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers head_dim "
        "num_attention_heads num_key_value_heads max_position_embeddings "
        "tie_word_embeddings bos_token_id eos_token_id pad_token_id rms_norm_eps "
        "hidden_act attention_bias mlp_bias"
    ).split()
    settings: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "torch_dtype": "float32",
        "rope_theta": ROPE_THETA,
    }
    settings |= {name: getattr(config, name) for name in names}
    generation = {
        "do_sample": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "pad_token": PAD,
        "eos_token": END,
        "additional_special_tokens": list(ROLES.values()),
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("config.json", settings),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokens),
    ):
        text = json.dumps(content, indent=2) + "\n"
        (out / name).write_text(text, encoding="utf-8")


@torch.no_grad()
def write(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str | list[Message]],
) -> list[str]:
    """What the model writes after each text or chat, greedily, without its end."""
    texts = [
        prompt if isinstance(prompt, str) else render(tokenizer, prompt)
        for prompt in prompts
    ]
    written = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), 100):
        chosen = order[start : start + 100]
        batch = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
        ids = model.generate(  # type: ignore[misc]
            **batch.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )[:, batch["input_ids"].shape[1] :]
        for index, row in zip(chosen, ids.tolist(), strict=True):
            length = (
                row.index(tokenizer.eos_token_id)
                if tokenizer.eos_token_id in row
                else len(row)
            )
            written[index] = str(tokenizer.decode(row[:length]))
    return written


def render(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> str:
    """The chat as the model reads it before it writes the next message."""
    return str(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
    )


def answers(text: str) -> list[int]:
    """The numbers that a worked answer gives as answers."""
    return [int(number) for number in re.findall(r"answer is (\d+)\.", text)]


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int
) -> Iterator[tuple[str, float]]:
    """Share of held-out problems and conversations solved, and of right interventions.

    Solved means written to the letter. An intervention changes the number of one fact.
    A fact that an answer does not depend on must leave it as it is; one that it depends
    on must change it by as much.
    """
    for kind in KINDS:
        if kind == "mixed":
            continue
        problems = sample_problems(n, 7, kind)
        for chat in (False, True):
            asked: list[str | list[Message]] = [
                [{"role": "user", "content": p.prompt}] if chat else p.prompt
                for p in problems
            ]
            written = write(model, tokenizer, asked)
            yield (
                f"{kind}, {'chat' if chat else 'plain'}: solved",
                mean(
                    [w == p.completion for w, p in zip(written, problems, strict=True)]
                ),
            )
        yield from changed_problems(model, tokenizer, kind, problems)
    for kind in CONVERSATION_KINDS:
        if kind == "mixed":
            continue
        talks = sample_conversations(n, 7, kind)
        for name, part in (("call", -3), ("worked answer", -1)):
            written = write(model, tokenizer, [list(t.messages[:part]) for t in talks])
            right = [
                text == talk.messages[part]["content"]
                for text, talk in zip(written, talks, strict=True)
            ]
            yield f"conversation, {kind}, {name}: right", mean(right)
        yield from changed_conversations(model, tokenizer, kind, talks)


def changed_problems(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    problems: Sequence[Problem],
) -> Iterator[tuple[str, float]]:
    """Shares of problems answered rightly with another number in one of their facts."""
    rng = random.Random(kind)
    for name in ("distractor", "true fact"):
        prompts, expected, places = [], [], []
        for problem in problems:
            place = rng.randrange(len(problem.answers))
            truth = problem.answers[place].facts
            facts = [f for f in problem.facts if (f in truth) == (name != "distractor")]
            if not facts:
                continue
            prompt, change = renumber(problem.prompt, rng.choice(facts), rng)
            value = answers(problem.completion)[place]
            prompts.append(prompt)
            expected.append(value + change * (name != "distractor"))
            places.append(place)
        written = write(model, tokenizer, prompts)
        right = [
            answers(text)[place : place + 1] == [value]
            for text, value, place in zip(written, expected, places, strict=True)
        ]
        yield f"{kind}, {name} changed: right answer", mean(right)


def changed_conversations(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    talks: Sequence[Conversation],
) -> Iterator[tuple[str, float]]:
    """The same for conversations: a number of the user's or the tool's is changed."""
    rng = random.Random(kind)
    for name in ("distractor", "true fact", "overridden fact", "tool result"):
        prompts, expected = [], []
        for talk in talks:
            truth = talk.answer.all_sources
            candidates: dict[str, list[Source]] = {
                "distractor": [f for f in talk.facts if f not in truth],
                "true fact": [f for f in talk.facts if f in truth],
                "overridden fact": [f for f in talk.facts if f == talk.overridden],
                "tool result": [talk.result],
            }
            if not candidates[name]:
                continue
            fact = rng.choice(candidates[name])
            messages = talk.before_answer
            message = messages[fact.message]
            message["content"], change = renumber(message["content"], fact.span, rng)
            prompts.append(messages)
            (value,) = answers(talk.messages[-1]["content"])
            expected.append(value + change * (fact in truth))
        if not prompts:
            continue
        written = write(model, tokenizer, prompts)
        right = [answers(w) == [e] for w, e in zip(written, expected, strict=True)]
        yield f"conversation, {kind}, {name} changed: right answer", mean(right)


def renumber(prompt: str, fact: tuple[int, int], rng: random.Random) -> tuple[str, int]:
    """The prompt with another number in one fact, and the difference."""
    start, stop = fact
    found = re.search(r"\d", prompt[start:stop])
    if found is None:
        raise ValueError(f"fact: {prompt[start:stop]!r} has no number.")
    old = int(found.group())
    new = rng.choice([number for number in range(1, 10) if number != old])
    place = start + found.start()
    return prompt[:place] + str(new) + prompt[place + 1 :], new - old


def mean(values: Sequence[bool]) -> float:
    """Share of the values that are true."""
    return sum(values) / max(len(values), 1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=DEMO_FILES, help="folder of the files written"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=None, help="default: build/train_demo.pt"
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that draw lessons; default: %(default)s",
    )
    parser.add_argument(
        "--shipped", action="store_true", help="evaluate the model in the package, only"
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: needs a C++ compiler"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps of a tiny model, for CI"
    )
    parser.add_argument(
        "--evaluate", type=int, default=500, metavar="N", help="problems of each kind"
    )
    args = parser.parse_args(arguments)
    if args.smoke:
        args.steps, args.batch, args.layers, args.width = 4, 8, 1, 32
        args.evaluate, args.workers = 2, 0
        if args.out == DEMO_FILES:
            args.out = Path(tempfile.mkdtemp(prefix="train_demo_"))
    if args.checkpoint is None:
        args.checkpoint = (
            args.out / "checkpoint.pt" if args.smoke else Path("build/train_demo.pt")
        )
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write the files, evaluate."""
    args = parse(arguments)
    if args.shipped:
        model, tokenizer = load_demo()
        model.to(args.device)
    else:
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, args.layers, args.width).to(args.device)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
        began = time.perf_counter()
        train(model, tokenizer, args)
        print(f"trained for {time.perf_counter() - began:.0f} s")
        save(model, tokenizer, args.out)
        args.checkpoint.unlink(missing_ok=True)
    for name, figure in evaluate(model, tokenizer, args.evaluate):
        print(f"{name}: {figure:.1%} of {args.evaluate}", flush=True)


if __name__ == "__main__":
    main()
