"""Engine against loop: the same rows, and what either costs.

    python benchmarks/rows.py             # all cases and the growth table
    python benchmarks/rows.py --smoke     # tiny sizes, a few seconds
    python benchmarks/rows.py --targets   # also what must be reached, and whether it is
    python benchmarks/rows.py --peers     # also the other tools that are installed here
    python benchmarks/rows.py --gpu       # only a model of 1B parameters, on a GPU

The model is a Llama with random weights, the text is random; all is computed in this
process, one thing after the other. On a machine that does other things as well, the
ratios say little: threads that wait for each other slow some passes down tenfold. The
load average stands in the first lines and in the last. The exit code is 1 if an
engine's rows are not the loop's. What the columns say:

loop        One Captum call per generated unit, in Captum's fastest correct setting: no
            token-by-token decoding (forward_in_tokens=False) and no key-value cache,
            with which its scores are wrong. Runs once unless --loop-repeats says more.
engine      strategy="fused"; like the loop's, the time is that of the whole call.
difference  Largest one of two entries, as a share of the loop's largest entry. Random
            methods draw other samples in each run, but no sample changes a row's sum:
            the sums are compared for them, marked "sums".
bare        The passes that the engine made, made again with other ids and nothing else:
            the same shapes, cached tokens and positions with logits; for gradients the
            same backward passes, from the last hidden states to the embeddings.
tokens      Tokens pushed through the model, as a share of N * N. Cached ones are not.
backward    Calls of torch.autograd.grad; the loop's are not counted.
MiB         Highest memory during the runs, above that before them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import platform
import re
import resource
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import captum
import numpy as np
import numpy.typing as npt
import torch
import transformers
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    ShapleyValueSampling,
    TextTokenInput,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from captum_cage import (
    GraphAttributionResult,
    GraphContextAttribution,
    TokenIdsInput,
    __version__,
)
from captum_cage.methods.catalogue import llm_attribution

FloatArray = npt.NDArray[np.float64]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Largest difference that passes.
CLOSE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1, "float16": 0.1}
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
METHODS = {
    "ablation": "FeatureAblation",
    "shapley": "ShapleyValueSampling",
    "integrated": "LayerIntegratedGradients",
    "activation": "LayerGradientXActivation",
    "attnlrp": "AttnLRP",
    "suppression": "AttentionSuppression",
    "ifr": "IFR",
}
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


# --- what is explained -------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One method with one kind of units, and what must be reached.

    Attributes:
        method: a key of ``METHODS``.
        units: ``"token"`` or ``"sentence"``.
        generated: number of generated tokens.
        kwargs: arguments of the method.
        ratio: least seconds of the loop / seconds of the engine.
        over_bare: most seconds of the engine / seconds of the bare passes.
        tokens: most tokens pushed / N / N.
    """

    method: str
    units: str
    generated: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    ratio: float | None = None
    over_bare: float | None = None
    tokens: float | None = None

    @property
    def random(self) -> bool:
        """Whether each run draws samples of its own."""
        return self.method == "shapley"

    @property
    def title(self) -> tuple[str, str, str]:
        """Method, units and G, as the tables begin."""
        return METHODS[self.method], self.units, str(self.generated)


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases that were asked for; the targets are those of the default sizes."""
    short, long = options.generated, options.long
    steps = {"n_steps": options.steps}
    found = [
        Case("ablation", "token", short, {}, 60.0, 1.25, 0.55),
        Case("ablation", "token", long, {}, 200.0, 1.25, 0.55),
        Case("shapley", "token", short, {"n_samples": options.permutations}, 25.0),
        Case("integrated", "token", short, steps, 2.0, 1.2),
        Case("integrated", "sentence", short, steps, 8.0, 1.2),
        Case("activation", "token", short, {}, 2.5),
        Case("activation", "sentence", short, {}, 8.0),
        Case("attnlrp", "token", short, {}),
        Case("attnlrp", "sentence", short, {}),
        Case("suppression", "token", short, {}),
        Case("ifr", "token", short, {}),
    ]
    return [
        case
        for case in found
        if case.method in options.methods and case.units in options.units
    ]


def random_llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights, ready to use."""
    heads = max(1, options.width // 32)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
        # Small weights make all tokens equally likely, whatever stands before them.
        initializer_range=0.08,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(options.seed)
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.to(options.device, DTYPES[options.dtype]).eval()
    return model


def number_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are numbers, separated by spaces."""
    words = [*SPECIAL, *(f"{number:06d}" for number in range(len(SPECIAL), vocab))]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    return tokenizer


def random_ids(count: int, vocab: int, seed: int) -> list[int]:
    """Ids of tokens that are not special."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(SPECIAL), vocab, (count,), generator=generator)
    ids: list[int] = drawn.tolist()
    return ids


def in_parts(count: int) -> Callable[[str], list[tuple[int, int]]]:
    """A function that cuts a text into stretches of as many tokens, nearly."""

    def cut(text: str) -> list[tuple[int, int]]:
        tokens = [match.span() for match in re.finditer(r"\S+", text)]
        parts = np.array_split(np.arange(len(tokens)), min(count, len(tokens)))
        return [(tokens[part[0]][0], tokens[part[-1]][1]) for part in parts]

    return cut


@dataclass(frozen=True)
class Bench:
    """The model and the text that all cases are about."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    prompt: int
    vocab: int
    sentences: int
    seed: int

    def ids(self, generated: int, prompt: int | None = None) -> list[int]:
        """Ids of prompt and generated text."""
        return random_ids((prompt or self.prompt) + generated, self.vocab, self.seed)

    def wrapped(self, method: str) -> Any:
        """Captum's object for a method."""
        if method in ("attnlrp", "suppression", "ifr"):
            return llm_attribution(METHODS[method], self.model, self.tokenizer)
        if method == "ablation":
            return LLMAttribution(FeatureAblation(self.model), self.tokenizer)
        if method == "shapley":
            return LLMAttribution(ShapleyValueSampling(self.model), self.tokenizer)
        layer = self.model.get_input_embeddings()
        kind = (
            LayerIntegratedGradients
            if method == "integrated"
            else LayerGradientXActivation
        )
        return LLMGradientAttribution(kind(self.model, layer), self.tokenizer)

    def call(
        self, case: Case, strategy: str, prompt: int | None = None
    ) -> Callable[[], GraphAttributionResult]:
        """What is timed: one call of ``attribute``, on an object of its own."""
        length = prompt or self.prompt
        ids = self.ids(case.generated, length)
        units = "token" if case.units == "token" else in_parts(self.sentences)

        def attribute() -> GraphAttributionResult:
            cage = GraphContextAttribution(self.wrapped(case.method))
            return cage.attribute(
                TokenIdsInput(ids[:length], self.tokenizer),
                ids[length:],
                units=units,
                strategy=strategy,  # type: ignore[arg-type]
                **case.kwargs,
            )

        return attribute


# --- what is measured --------------------------------------------------------------


@dataclass
class Forward:
    """A pass through the model.

    Attributes:
        inputs: its arguments, without a cache that the pass added to.
        chain: number of the cache that it added to, if any.
        cached: tokens in that cache before it.
        graph: whether gradients can go back through it.
    """

    inputs: dict[str, Any]
    chain: int | None
    cached: int
    graph: bool


@dataclass
class Backward:
    """A call of ``torch.autograd.grad``, with the shapes of what it was given."""

    inputs: list[torch.Size]
    upstream: torch.Size | None
    retain: bool
    batched: bool


@dataclass
class Record:
    """What was asked of a model."""

    passes: int = 0
    tokens: int = 0
    backward: int = 0
    events: list[Forward | Backward] = field(default_factory=list)


@contextmanager
def recorded(model: Any, keep_events: bool = False) -> Iterator[Record]:
    """Count the passes through a model, and remember them if asked to.

    A pass that is given up on the way, by an exception, does not count.
    """
    record = Record()
    forward, grad = model.forward, torch.autograd.grad
    chains: dict[int, int] = {}  # by the identity of a cache that lives

    @functools.wraps(forward)
    def count(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        before = 0 if cache is None else int(cache.get_seq_length())
        result = forward(*args, **kwargs)
        given = kwargs.get("input_ids")
        if given is None:
            given = args[0] if args else kwargs["inputs_embeds"]
        record.passes += 1
        record.tokens += int(given.shape[0] * given.shape[1])
        if keep_events:
            inputs, chain = dict(kwargs), None
            if cache is not None and int(cache.get_seq_length()) > before:
                # Not kept itself, as it may hold the graph of gradients.
                del inputs["past_key_values"]
                if not before:
                    chains[id(cache)] = record.passes
                chain = chains.setdefault(id(cache), record.passes)
            graph = torch.is_grad_enabled()
            record.events.append(Forward(inputs, chain, before, graph))
        return result

    def count_grad(
        outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        record.backward += 1
        if keep_events:
            given = [inputs] if isinstance(inputs, Tensor) else inputs
            shapes = [each.shape for each in given]
            shape = grad_outputs.shape if isinstance(grad_outputs, Tensor) else None
            retain = bool(kwargs.get("retain_graph"))
            batched = bool(kwargs.get("is_grads_batched"))
            record.events.append(Backward(shapes, shape, retain, batched))
        return grad(outputs, inputs, grad_outputs, *args, **kwargs)

    model.forward = count
    torch.autograd.grad = count_grad
    try:
        yield record
    finally:
        del model.forward
        torch.autograd.grad = grad


class Replay:
    """The passes of a record, made again with other ids and nothing else.

    All that they are given is made beforehand.

    Args:
        model: the model.
        record: its passes.
        logits: whether logits are computed where they were kept; otherwise those of
            the last position, so that a wide vocabulary needs no memory.
    """

    def __init__(self, model: Any, record: Record, logits: bool = True) -> None:
        self._model = model
        self._head = model.get_output_embeddings()
        weight = self._head.weight
        self._new = functools.partial(
            torch.randn, device=weight.device, dtype=weight.dtype
        )
        self._steps: list[Callable[[], None]] = []
        self._forget()
        vocab = model.config.vocab_size
        for event in record.events:
            if isinstance(event, Forward):
                ids = event.inputs["input_ids"]
                inputs = {**event.inputs, "input_ids": torch.randint_like(ids, vocab)}
                if not logits:
                    inputs["logits_to_keep"] = 1
                make = self._with_graph if event.graph else self._without_graph
                self._steps.append(make(event, inputs))
            elif len(event.inputs[0]) == 2:
                self._steps.append(self._of_head(event))
            else:
                self._steps.append(self._of_states(event))

    def __call__(self) -> None:
        """Make the passes."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            for step in self._steps:
                step()
            if self._head.weight.is_cuda:
                torch.cuda.synchronize()
        finally:
            self._forget()
            for parameter in trained:
                parameter.requires_grad_(True)

    def _forget(self) -> None:
        self._chain: int | None = None
        self._cache = DynamicCache()
        self._leaves: list[Tensor] = []
        self._states = torch.empty(0)

    def _cached(self, event: Forward) -> dict[str, Any]:
        """The cache that a pass adds to, with as many tokens as it had."""
        if event.chain is None:
            self._leaves = []
            return {}
        if event.chain != self._chain:
            self._forget()
            self._chain = event.chain
        more = int(self._cache.get_seq_length()) - event.cached
        if more < 0:
            raise RuntimeError("the engine filled a cache by other means than a pass")
        if more > 0:
            self._cache.crop(-more)
        return {"past_key_values": self._cache}

    def _without_graph(
        self, event: Forward, inputs: dict[str, Any]
    ) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                self._model.forward(**inputs, **self._cached(event))

        return run

    def _with_graph(self, event: Forward, inputs: dict[str, Any]) -> Callable[[], None]:
        batch, length = inputs["input_ids"].shape
        leaf = self._new(batch, length, self._model.config.hidden_size)
        leaf.requires_grad_()
        keep = inputs.get("logits_to_keep", slice(None))
        if isinstance(keep, int):
            keep = slice(-keep, None) if keep else slice(None)

        def run() -> None:
            cached = self._cached(event)
            found = self._model.base_model(
                inputs_embeds=leaf, use_cache=bool(cached), **cached
            )
            self._leaves.append(leaf)
            self._states = found.last_hidden_state[:, keep]

        return run

    def _of_head(self, event: Backward) -> Callable[[], None]:
        leaf = self._new(*event.inputs[0]).requires_grad_()

        def run() -> None:
            torch.autograd.grad(self._head(leaf).sum(), leaf)

        return run

    def _of_states(self, event: Backward) -> Callable[[], None]:
        upstream = None if event.upstream is None else self._new(*event.upstream)

        def run() -> None:
            states = self._states
            scored = states.sum() if upstream is None else states
            torch.autograd.grad(
                scored,
                self._leaves[-len(event.inputs) :],
                upstream,
                retain_graph=event.retain,
                is_grads_batched=event.batched,
            )

        return run


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Least seconds of several runs."""
    least = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return float(least)


def _status(key: str) -> int:
    """An entry of this process' status, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


class Peak:
    """Highest memory while the block runs, above that before it, in MiB.

    On a GPU, what PyTorch allocates there. On the host, the resident set: the kernel's
    own high-water mark where it may be reset, else samples; nan where there is neither.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self.mib = float("nan")

    def __enter__(self) -> Peak:
        self._samples: list[int] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif _STATUS.exists():
            self._before = _status("VmRSS")
            try:
                _CLEAR_REFS.write_text("5")
            except OSError:
                self._thread = threading.Thread(target=self._sample, daemon=True)
                self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self._samples.append(_status("VmRSS"))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._device.type == "cuda":
            highest = torch.cuda.max_memory_allocated(self._device)
        elif self._thread is not None:
            self._thread.join()
            highest = max(self._samples, default=self._before)
        elif _STATUS.exists():
            highest = _status("VmHWM")
        else:
            return
        self.mib = max(0, highest - self._before) / 2**20


@dataclass
class Measured:
    """What one case came to."""

    case: Case
    loop: float
    engine: float
    bare: float
    difference: float
    units: int
    loop_record: Record
    engine_record: Record
    loop_mib: float
    engine_mib: float

    @property
    def ratio(self) -> float:
        """Seconds of the loop / seconds of the engine."""
        return self.loop / self.engine

    @property
    def over_bare(self) -> float:
        """Seconds of the engine / seconds of its bare passes."""
        return self.engine / self.bare


def difference(case: Case, fused: FloatArray, loop: FloatArray) -> float:
    """Largest difference of two entries, relative to the largest one of the loop."""
    if case.random:
        fused, loop = fused.sum(axis=1), loop.sum(axis=1)
    return float(np.abs(fused - loop).max() / (np.abs(loop).max() or 1.0))


def measure(bench: Bench, case: Case, options: argparse.Namespace) -> Measured:
    """Run a case both ways, and its bare passes."""
    engine, loop = bench.call(case, "fused"), bench.call(case, "loop")
    with recorded(bench.model, keep_events=True) as engine_record:
        fused_rows = engine().graph.rows
    replay = Replay(bench.model, engine_record)
    replay()  # as the engine, it ran before it is timed
    took, bare = np.inf, np.inf
    with Peak(options.device) as engine_peak:
        took = seconds(engine, 1)
    for _ in range(options.repeats):  # in turn, as other processes come and go
        bare = min(bare, seconds(replay, 1))
        took = min(took, seconds(engine, 1))
    with (
        Peak(options.device) as loop_peak,
        recorded(bench.model) as loop_record,
    ):
        start = time.perf_counter()
        loop_rows = loop().graph.rows
        loop_took = time.perf_counter() - start
    if options.loop_repeats > 1:
        loop_took = min(loop_took, seconds(loop, options.loop_repeats - 1))
    engine_record.events.clear()
    return Measured(
        case,
        loop_took,
        took,
        bare,
        difference(case, fused_rows, loop_rows),
        bench.prompt + case.generated,
        loop_record,
        engine_record,
        loop_peak.mib,
        engine_peak.mib,
    )


# --- what is printed ---------------------------------------------------------------


def print_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Aligned columns; the first one to the left."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *body):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row, widths, strict=True)][
            1:
        ]
        print("  ".join(cells))
    print(flush=True)


def short(number: float) -> str:
    """A number in about three digits."""
    if not np.isfinite(number):
        return "-"
    if number == 0 or 0.001 <= abs(number) < 1000:
        digits = 3 if abs(number) < 1 else 2 if abs(number) < 10 else 1
        return f"{number:.{digits}f}"
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.1e}"


def _against(number: float, target: float | None, least: bool) -> str:
    if target is None:
        return short(number)
    good = number >= target if least else number <= target
    sign = ">=" if least else "<="
    return f"{short(number)} ({sign} {target:g}: {'pass' if good else 'FAIL'})"


def print_measured(found: Sequence[Measured], targets: bool) -> None:
    """Two tables: seconds, and work."""
    rows, work = [], []
    for one in found:
        case = one.case
        ratio, over = (case.ratio, case.over_bare) if targets else (None, None)
        unlike = short(one.difference) + (" sums" if case.random else "")
        rows.append(
            [
                *case.title,
                short(one.loop),
                short(one.engine),
                _against(one.ratio, ratio, least=True),
                unlike,
                short(one.bare),
                _against(one.over_bare, over, least=False),
            ]
        )
        square = one.units**2
        pushed = one.engine_record.tokens / square
        work.append(
            [
                *case.title,
                str(one.loop_record.passes),
                str(one.engine_record.passes),
                str(one.engine_record.backward),
                short(one.loop_record.tokens / square),
                _against(pushed, case.tokens if targets else None, least=False),
                short(one.loop_mib),
                short(one.engine_mib),
            ]
        )
    head = ["method", "units", "G"]
    print("Seconds")
    print_table(
        [*head, "loop", "engine", "ratio", "difference", "bare", "engine/bare"], rows
    )
    print("Work")
    print_table(
        [
            *head,
            "passes: loop",
            "engine",
            "backward",
            "tokens/N^2: loop",
            "engine",
            "MiB: loop",
            "engine",
        ],
        work,
    )


def load() -> str:
    """How busy the machine is, with other processes as well."""
    return f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""


def machine(device: str) -> str:
    """What this runs on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        name = found[1] if found else name
    gpu = ""
    if torch.device(device).type == "cuda":
        gpu = f"{torch.cuda.get_device_name(device)}; "
    threads = torch.get_num_threads()
    return f"{gpu}{name}, {os.cpu_count()} cores, {threads} threads{load()}"


def print_head(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Command, machine and versions."""
    print(f"python benchmarks/rows.py {shlex.join(arguments)}".rstrip())
    print(machine(options.device))
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Captum {captum.__version__}, NumPy "
        f"{np.__version__}, captum-cage {__version__}"
    )


# --- growth ------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One size of the growth table; nan where the loop was not run."""

    prompt: int
    generated: int
    engine: float
    tokens: int
    passes: int
    loop: float

    @property
    def units(self) -> int:
        """``N``."""
        return self.prompt + self.generated


def exponent(sizes: Sequence[int], values: Sequence[float]) -> str:
    """Slope of the values over the sizes on logarithmic axes, by least squares."""
    pairs = [
        (size, value)
        for size, value in zip(sizes, values, strict=True)
        if np.isfinite(value)
    ]
    if len({size for size, _ in pairs}) < 2:
        return "-"
    x, y = np.log(np.array(pairs, dtype=np.float64)).T
    return f"{np.polyfit(x, y, 1)[0]:.2f}"


def print_growth(bench: Bench, case: Case, options: argparse.Namespace) -> None:
    """Seconds by P and G, and exponents fitted to them."""
    points: list[Point] = []
    for prompt in options.growth_prompts:
        for generated in options.growth_generated:
            sized = Case(case.method, case.units, generated, case.kwargs)
            engine = bench.call(sized, "fused", prompt)
            with recorded(bench.model) as record:
                engine()
            took = seconds(engine, options.repeats)
            loop = float("nan")
            if generated * (prompt + generated // 2) <= options.growth_passes:
                loop = seconds(bench.call(sized, "loop", prompt), 1)
            points.append(
                Point(prompt, generated, took, record.tokens, record.passes, loop)
            )
    print(f"Growth of {METHODS[case.method]}, {case.units} units")
    print_table(
        ["P", "G", "N", "loop", "engine", "ratio", "passes", "tokens/N^2"],
        [
            [
                str(point.prompt),
                str(point.generated),
                str(point.units),
                short(point.loop),
                short(point.engine),
                short(point.loop / point.engine),
                str(point.passes),
                short(point.tokens / point.units**2),
            ]
            for point in points
        ],
    )
    groups: list[tuple[str, list[Point], list[int]]] = []
    for prompt in options.growth_prompts:
        some = [point for point in points if point.prompt == prompt]
        groups.append((f"G at P={prompt}", some, [p.generated for p in some]))
    for generated in options.growth_generated:
        some = [point for point in points if point.generated == generated]
        groups.append((f"P at G={generated}", some, [p.prompt for p in some]))
    groups.append(("N, all sizes", points, [p.units for p in points]))
    print("Exponents: seconds and tokens grow with this power of")
    print_table(
        ["", "loop seconds", "engine seconds", "engine tokens"],
        [
            [
                name,
                exponent(sizes, [p.loop for p in some]),
                exponent(sizes, [p.engine for p in some]),
                exponent(sizes, [float(p.tokens) for p in some]),
            ]
            for name, some, sizes in groups
        ],
    )


# --- other tools -------------------------------------------------------------------


@dataclass(frozen=True)
class PeerRun:
    """One method of another tool.

    Attributes:
        what: what was called.
        against: the method of ours that comes nearest.
        seconds: least seconds.
        leaves_out: what our answer has and this one has not.
    """

    what: str
    against: str
    seconds: float
    leaves_out: str


@dataclass(frozen=True)
class Peer:
    """What every other tool is given: a copy of the model, and the same text."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    prompt: str
    generated: str
    ids: list[int]
    count: int
    span: tuple[int, int]
    steps: int
    repeats: int
    device: str

    def eager(self) -> Any:
        """The model with attention weights that can be read."""
        self.model.set_attn_implementation("eager")
        return self.model


def run_captum(peer: Peer) -> list[PeerRun]:
    """Captum alone: the generated text, once, attributed to the prompt."""
    llm_attr = LLMAttribution(FeatureAblation(peer.model), peer.tokenizer)
    inp = TextTokenInput(peer.prompt, peer.tokenizer)

    def attribute() -> object:
        return llm_attr.attribute(
            inp,
            target=torch.tensor(peer.ids[-peer.count :]),
            forward_in_tokens=False,
            use_cached_outputs=False,
        )

    return [
        PeerRun(
            "FeatureAblation, forward_in_tokens=False",
            "ablation",
            seconds(attribute, peer.repeats),
            "no generated-to-generated influence, no paths",
        )
    ]


def run_flashtrace(peer: Peer) -> list[PeerRun]:
    """FlashTrace: information flow from one span, or all rows of its matrix."""
    tracer = import_module("flashtrace").FlashTrace(peer.eager(), peer.tokenizer)

    def trace(method: str, span: tuple[int, int] | None) -> Callable[[], object]:
        # It numbers spans inclusively, and adds an end token to the text.
        return lambda: tracer.trace(
            prompt=peer.prompt,
            target=peer.generated,
            output_span=span,
            hops=1,
            method=method,
        )

    last = (peer.span[0], peer.span[1] - 1)
    return [
        PeerRun(
            f"trace, 1 hop, tokens {last[0]} to {last[1]}",
            "ablation",
            seconds(trace("flashtrace", last), peer.repeats),
            "one span only, one hop, no exact rows (flow, not effect; no sign)",
        ),
        PeerRun(
            "ifr-matrix, all rows",
            "ablation",
            seconds(trace("ifr-matrix", None), peer.repeats),
            "no exact rows (flow, not effect; no sign), no paths",
        ),
    ]


def run_inseq(peer: Peer) -> list[PeerRun]:
    """Inseq: one row after the other."""
    inseq = import_module("inseq")
    whole = f"{peer.prompt} {peer.generated}"
    found = []
    for name, against, kwargs in (
        ("occlusion", "ablation", {}),
        ("layer_integrated_gradients", "integrated", {"n_steps": peer.steps}),
        ("layer_gradient_x_activation", "activation", {}),
    ):
        model = inseq.load_model(
            peer.eager(), name, tokenizer=peer.tokenizer, device=peer.device
        )
        run = functools.partial(
            model.attribute, peer.prompt, whole, show_progress=False, **kwargs
        )
        took = seconds(run, min(2, peer.repeats))
        found.append(PeerRun(name, against, took, "no paths; tokens only"))
    return found


def run_interpreto(peer: Peer) -> list[PeerRun]:
    """Interpreto: one pass per perturbation scores all tokens, as here."""
    interpreto = import_module("interpreto")
    modes = import_module("interpreto.attributions").InferenceModes
    found = []
    for name, against, kwargs, lacks in (
        ("Occlusion", "ablation", {}, "adds a token to the model; no paths"),
        (
            "IntegratedGradients",
            "integrated",
            {"n_perturbations": peer.steps},
            "no sign, rows are scaled, no paths",
        ),
        ("Saliency", "activation", {}, "no sign, rows are scaled, no paths"),
    ):
        explainer = getattr(interpreto, name)(
            peer.model,
            peer.tokenizer,
            batch_size=32,
            granularity=interpreto.Granularity.TOKEN,
            inference_mode=modes.LOG_SOFTMAX,
            **kwargs,
        )
        run = functools.partial(explainer.explain, peer.prompt, peer.generated)
        what = f"{name}, batches of 32"
        found.append(PeerRun(what, against, seconds(run, peer.repeats), lacks))
    return found


PEERS: dict[str, Callable[[Peer], list[PeerRun]]] = {
    "captum": run_captum,
    "flashtrace": run_flashtrace,
    "inseq": run_inseq,
    "interpreto": run_interpreto,
}


def print_peers(bench: Bench, options: argparse.Namespace) -> None:
    """Seconds of each tool that is installed, and of ours on the same text."""
    ids = bench.ids(options.generated)
    tokens = bench.tokenizer.convert_ids_to_tokens(ids)
    ours: dict[str, float] = {}
    for method in ("ablation", "integrated", "activation"):
        kwargs = {"n_steps": options.steps} if method == "integrated" else {}
        case = Case(method, "token", options.generated, kwargs)
        engine = bench.call(case, "fused")
        engine()
        ours[method] = seconds(engine, options.repeats)
    body: list[list[str]] = []
    for name, run in PEERS.items():
        try:
            title = f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            body.append([f"{name}: not installed", *[""] * 5])
            continue
        peer = Peer(
            # Some of them change the model or the tokenizer.
            copy.deepcopy(bench.model),
            copy.deepcopy(bench.tokenizer),
            " ".join(tokens[: bench.prompt]),
            " ".join(tokens[bench.prompt :]),
            ids,
            options.generated,
            (max(0, options.generated - 4), options.generated),
            options.steps,
            options.repeats,
            options.device,
        )
        try:
            found = run(peer)
        except Exception as error:  # noqa: BLE001  # whatever another tool raises
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            body.append([title, f"failed: {reason[:60]}", *[""] * 4])
            continue
        for one in found:
            own = ours[one.against]
            faster = "" if one.seconds >= own else " (faster than ours)"
            body.append(
                [
                    title,
                    one.what,
                    short(one.seconds),
                    short(own),
                    short(one.seconds / own) + faster,
                    one.leaves_out,
                ]
            )
    print(
        f"Other tools, P={bench.prompt}, G={options.generated}, tokens; ours computes "
        "all rows and the paths of any span"
    )
    print_table(["tool", "call", "its s", "our s", "ratio", "it leaves out"], body)


# --- GPU ---------------------------------------------------------------------------


def billion_llama(device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of the shape of Llama 3.2 1B with random weights."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: LlamaForCausalLM = LlamaForCausalLM(config)
            model.eval()
            return model
    finally:
        torch.set_default_dtype(before)


def sampled_rows(
    bench: Bench, generated: int, sample: int
) -> tuple[float, list[tuple[int, FloatArray]]]:
    """Seconds of all loop rows by some passes of three of them, and these entries.

    A row of the loop is one Captum call with a pass per unit before it. Here only the
    first units of the first, the middle and the last row are perturbed, at the row's
    own length; the seconds of a pass are interpolated between these rows.
    """
    ids = bench.ids(generated)
    llm_attr = bench.wrapped("ablation")
    steps = sorted({0, generated // 2, generated - 1})
    each, found = [], []
    for step in steps:
        length = bench.prompt + step
        mask = [i if i < sample else -1 for i in range(length)]
        inp = TokenIdsInput(ids[:length], bench.tokenizer, feature_mask=mask)
        target = torch.tensor(ids[length : length + 1])
        rows: list[FloatArray] = []

        def attribute(
            inp: TokenIdsInput = inp,
            target: Tensor = target,
            rows: list[FloatArray] = rows,
        ) -> None:
            result = llm_attr.attribute(
                inp, target=target, forward_in_tokens=False, use_cached_outputs=False
            )
            rows.append(result.seq_attr.double().cpu().numpy())

        each.append(seconds(attribute, 2) / (min(sample, length) + 1))
        found.append((step, rows[0]))
    passes = bench.prompt + np.arange(generated) + 1
    per_pass = np.interp(np.arange(generated), steps, each)
    return float((passes * per_pass).sum()), found


def print_gpu(
    bench: Bench, generated: Sequence[int], device: str, repeats: int
) -> None:
    """Engine against loop on a model of realistic size."""
    body = []
    for count in generated:
        case = Case("ablation", "token", count)
        engine = bench.call(case, "fused")
        with recorded(bench.model, keep_events=True) as record:
            rows = engine().graph.rows
        with Peak(device) as peak:
            took = seconds(engine, repeats)
        replay = Replay(bench.model, record, logits=False)
        replay()
        bare = seconds(replay, repeats)
        tokens = record.tokens
        passes = record.passes
        del replay
        record.events.clear()
        loop, sampled = sampled_rows(bench, count, 32)
        unlike = max(
            float(np.abs(rows[step, : len(row)] - row).max()) for step, row in sampled
        ) / max(float(np.abs(row).max()) for _, row in sampled)
        body.append(
            [
                str(count),
                f"{loop:.0f}",
                short(took),
                short(loop / took),
                short(unlike),
                str(passes),
                short(tokens / (bench.prompt + count) ** 2),
                f"{tokens / took:.0f}",
                f"{tokens / bare:.0f}",
                short(took / bare),
                short(peak.mib),
            ]
        )
    print_table(
        [
            "G",
            "loop, extrapolated",
            "engine",
            "ratio",
            "difference in a part",
            "passes",
            "tokens/N^2",
            "tokens/s",
            "bare tokens/s",
            "engine/bare",
            "MiB",
        ],
        body,
    )
    print(
        "The loop was not run whole: 32 perturbations of the first, the middle and the "
        "last row were, and the seconds\nof the others follow from them. The bare "
        "passes compute the logits of one position only."
    )


def run_gpu(options: argparse.Namespace) -> None:
    """The GPU's table, or that it was not run."""
    if not torch.cuda.is_available():
        print("no GPU: not run")
        return
    model = billion_llama("cuda", torch.bfloat16)
    bench = Bench(
        model, number_tokenizer(128256), 512, 128256, options.sentences, options.seed
    )
    count = sum(p.numel() for p in model.parameters())
    print(
        f"Llama, {count / 1e9:.2f}B random weights, bfloat16, FeatureAblation, tokens, "
        "P=512\n"
    )
    print_gpu(bench, [64, 256, 1024], "cuda", options.repeats)


# --- command line ------------------------------------------------------------------


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, with the sizes of ``--smoke`` where nothing else is said."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = functools.partial(parser.add_argument, action="store_true")
    flag("--smoke", help="tiny sizes, a few seconds")
    flag("--targets", help="print what must be reached; for the default sizes")
    flag("--peers", help="also measure the other tools that are installed")
    flag("--gpu", help="measure a model of 1B parameters on a GPU, and nothing else")
    flag("--no-growth", help="leave out the growth table")
    whole = functools.partial(parser.add_argument, type=int)
    whole("--prompt", help="P (48)")
    whole("--generated", help="G (32)")
    whole("--long", help="G of the second ablation case (128)")
    whole("--layers", help="of the model (4)")
    whole("--width", help="of the model, a multiple of 32 (256)")
    whole("--vocab", help="size of the vocabulary (1000)")
    whole("--steps", help="of integrated gradients (20)")
    whole("--permutations", help="of Shapley values (10)")
    whole("--sentences", default=4, help="per side")
    whole("--repeats", help="least of so many runs (5)")
    whole("--loop-repeats", default=1, help="of the loop")
    whole("--seed", default=0)
    whole("--threads", help="of PyTorch (its own choice)")
    whole("--growth-prompts", nargs="+", help="P, one or more (48 96 192)")
    whole("--growth-generated", nargs="+", help="G, one or more (16 32 64 128)")
    whole("--growth-passes", help="the loop is run up to so many passes (8000)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--units",
        nargs="+",
        choices=["token", "sentence"],
        default=["token", "sentence"],
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS)
    )
    parser.add_argument(
        "--growth-methods", nargs="+", choices=list(METHODS), default=["ablation"]
    )
    options = parser.parse_args(arguments)
    usual: dict[str, tuple[Any, Any]] = {
        "prompt": (48, 12),
        "generated": (32, 8),
        "long": (128, 16),
        "layers": (4, 2),
        "width": (256, 32),
        "vocab": (1000, 100),
        "steps": (20, 4),
        "permutations": (10, 2),
        "repeats": (5, 1),
        "growth_prompts": ([48, 96, 192], [8, 16]),
        "growth_generated": ([16, 32, 64, 128], [4, 8]),
        "growth_passes": (8000, 1000),
    }
    for name, values in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, values[options.smoke])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; the exit code says whether all rows are the loop's."""
    options = options_of(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print_head(options, sys.argv[1:] if arguments is None else arguments)
    if options.gpu:
        run_gpu(options)
        return 0
    bench = Bench(
        random_llama(options),
        number_tokenizer(options.vocab),
        options.prompt,
        options.vocab,
        options.sentences,
        options.seed,
    )
    print(
        f"Llama with random weights: {options.layers} layers, width {options.width}, "
        f"vocabulary {options.vocab}, {options.dtype} on {options.device}; "
        f"P={options.prompt}, {options.sentences} sentences per side, "
        f"{options.steps} steps, {options.permutations} permutations; least of "
        f"{options.repeats} runs, of the loop {options.loop_repeats}\n"
    )
    found = [measure(bench, case, options) for case in cases(options)]
    if found:
        print_measured(found, options.targets)
    if not options.no_growth:
        for case in cases(options):
            first = case.generated == options.generated
            if case.method in options.growth_methods and first:
                print_growth(bench, case, options)
    if options.peers:
        print_peers(bench, options)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = 1 if sys.platform == "darwin" else 1024
    allowed = CLOSE[options.dtype]
    worst = max((one.difference for one in found), default=0.0)
    agree = worst <= allowed
    print(
        f"largest difference {worst:.1e}, {'within' if agree else 'ABOVE'} "
        f"{allowed:g}; this process took {highest * size / 2**20:.0f} MiB at most"
        f"{load()}"
    )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
