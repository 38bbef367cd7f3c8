"""Information flow routes: exact rows of a whole text, and what they cost.

    python benchmarks/flow.py                # 8 layers, 10 + 500 tokens
    python benchmarks/flow.py --smoke        # tiny sizes, a few seconds

The model is a Qwen2 with random weights, the text is random. Rows are compared with a
loop over layers, heads and pairs of tokens on a short text, and, where the package
``flashtrace`` is installed, with its exact rows of the whole text, in the same run; the
exit code is 1 if they differ. FlashTrace gives a token the row of its own position,
ours is that of the position before it, which predicts it; rows of the same position
are compared. Ratios are to FlashTrace's default, which explains one span by a
truncated recursion, and to its exact rows.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from rows import machine, number_tokenizer, print_table, random_ids
from transformers import Qwen2Config, Qwen2ForCausalLM

from captum_cage import AttributionGraph, __version__
from captum_cage.methods import IFR

Array = npt.NDArray[np.float64]

VOCAB = 1000
CLOSE = 2e-5  # float32, of rows that sum to the number of layers at most


def random_qwen2(layers: int, width: int, heads: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=8192,
    )
    model: Qwen2ForCausalLM = Qwen2ForCausalLM(config)
    model.eval()
    return model


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Least seconds of several runs, after one that does not count."""
    run()
    least = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return float(least)


def solved(rows: Array, prompt: int, span: int) -> Array:
    """Mass of all paths from the last tokens to the prompt."""
    generated, length = rows.shape
    wide = np.zeros((generated, length + 1))
    wide[:, :length] = rows
    weights = np.zeros(generated)
    weights[-span:] = 1.0
    attr: Array = AttributionGraph.from_rows(wide, prompt).explain(weights)
    return attr


def loop_rows(model: Any, ids: torch.Tensor, order: int) -> Array:
    """Rows of all positions, by a loop over layers, heads and pairs of tokens."""
    model.set_attn_implementation("eager")
    entered: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    hooks = []
    for layer in model.model.layers:
        hooks += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: entered.append(
                    (args[0] if args else kwargs["hidden_states"])[0]
                ),
                with_kwargs=True,
            ),
            layer.self_attn.v_proj.register_forward_hook(
                lambda _, __, output: values.append(output[0])
            ),
            layer.self_attn.register_forward_hook(
                lambda _, __, output: added.append(output[0][0])
            ),
        ]
    with torch.no_grad():
        weights = model(ids[None], output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    heads, size = model.config.num_attention_heads, values[0].shape[1]
    size //= model.config.num_key_value_heads
    groups = heads // model.config.num_key_value_heads
    n = len(ids)
    total = np.zeros((n, n))
    for layer, module in enumerate(model.model.layers):
        output = module.self_attn.o_proj.weight.detach()
        for i in range(n):
            after = entered[layer][i] + added[layer][i]
            norm = torch.linalg.vector_norm(after, order)
            rest = torch.linalg.vector_norm(added[layer][i], order)
            stream = max(0.0, float(norm - rest))
            near = np.zeros(n)
            for j in range(i + 1):
                for head in range(heads):
                    first = head // groups * size
                    value = values[layer][j, first : first + size]
                    part = output[:, head * size : (head + 1) * size] @ value
                    part = part * weights[layer][0, head, i, j]
                    left = torch.linalg.vector_norm(after - part, order)
                    near[j] += max(0.0, float(norm - left))
            total[i] += near / (near.sum() + stream)
    model.set_attn_implementation("sdpa")
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code says whether all rows agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=10)
    parser.add_argument("--generated", type=int, default=500)
    parser.add_argument("--span", type=int, default=10, help="explained tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.layers, options.width, options.heads = 2, 32, 4
        options.generated, options.repeats = 40, 1
    print(machine("cpu"))
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, captum-cage {__version__}; "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"Qwen2 with random weights: {options.layers} layers, width {options.width}, "
        f"{options.heads} heads; P={options.prompt}, G={options.generated}, the last "
        f"{options.span} tokens explained; least of {options.repeats} runs\n"
    )
    model = random_qwen2(options.layers, options.width, options.heads)
    ids = random_ids(options.prompt + options.generated, VOCAB, 1)
    whole = torch.tensor(ids)
    worst = 0.0

    short = whole[:24]
    double = copy.deepcopy(model).double()
    for order, method in ((1, IFR(double)), (2, IFR(double, "l2"))):
        ours = method.rows(short, short).numpy()
        worst = max(worst, float(np.abs(ours - loop_rows(double, short, order)).max()))
    print(f"largest difference to the loop, 24 tokens in float64: {worst:.1e}")

    def bare() -> None:
        with torch.no_grad():
            model(whole[None, :-1])

    def rows(method: IFR) -> Callable[[], Array]:
        def run() -> Array:
            found = method.rows(whole[:-1], whole[options.prompt :])
            return solved(found.double().numpy(), options.prompt, options.span)

        return run

    took = {"one forward pass": seconds(bare, options.repeats)}
    for name, method in (
        ("IFR l1, all rows and solve", IFR(model)),
        ("IFR l2, all rows and solve", IFR(model, "l2")),
        ("IFR l1 product, all rows and solve", IFR(model, "l1", "product")),
    ):
        took[name] = seconds(rows(method), options.repeats)
    default = exact = float("nan")
    if find_spec("flashtrace") is not None:
        default, exact, theirs = flashtrace_runs(model, ids, options)
        took["flashtrace, one span, its default"] = default
        took["flashtrace, exact rows"] = exact
        ours = IFR(model).rows(whole, whole[options.prompt :]).double().numpy()
        # It adds an end token to the text.
        theirs = theirs[: options.generated, : ours.shape[1]]
        difference = float(np.abs(ours - theirs).max())
        worst = max(worst, difference)
        print(f"largest difference to flashtrace's exact rows: {difference:.1e}")
    print()
    print_table(
        ["", "seconds", "of flashtrace's default", "its exact rows over this"],
        [
            [name, f"{s:.3f}", f"{s / default:.2f}", f"{exact / s:.1f}"]
            for name, s in took.items()
        ],
    )
    print(f"load {os.getloadavg()[0]:.1f}")
    return 0 if worst <= CLOSE else 1


def flashtrace_runs(
    model: Any, ids: list[int], options: argparse.Namespace
) -> tuple[float, float, Array]:
    """Seconds of its default and of its exact rows, and those rows."""
    attribution = import_module("flashtrace.attribution")
    core: Any = import_module("flashtrace.core")
    core.tqdm = lambda items, **_: items
    tokenizer = number_tokenizer(VOCAB)
    prompt = tokenizer.decode(ids[: options.prompt])
    target = tokenizer.decode(ids[options.prompt :])
    model.set_attn_implementation("eager")
    tracer = attribution.LLMIFRAttribution(model, tokenizer, show_progress=False)
    last = (options.generated - options.span, options.generated - 1)

    def trace() -> None:
        tracer.calculate_ifr_multi_hop(prompt, target, sink_span=last, n_hops=1)

    default = seconds(trace, options.repeats)
    found: list[Any] = []

    def matrix() -> None:
        found[:] = [tracer.calculate_ifr_for_all_positions(prompt, target)]

    exact = seconds(matrix, 1)
    model.set_attn_implementation("sdpa")
    table: Array = found[0].attribution_matrix.double().numpy()
    return default, exact, table


if __name__ == "__main__":
    sys.exit(main())
