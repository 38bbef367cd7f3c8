"""Seconds of the sparse and the dense solve, by size and fill, and their difference.

    python benchmarks/solve.py             # the table beside solve.DENSE_FILL
    python benchmarks/solve.py --smoke     # a few seconds; checks the equality only

Rows are random and sum to one. "fill" is the filled share of the lower triangle of L
and of A. "all" solves for the marginals (G, P); "span" is one solve with a vector.
The crossover of a size is the fill at which both take the same time, by interpolation
between the two fills around it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.sparse import csr_array

from captum_cage import solve

TOLERANCE = 1e-12


def random_blocks(
    n_generated: int, n_sources: int, fill: float, seed: int
) -> tuple[csr_array, csr_array]:
    """Random ``A`` and ``L`` whose rows sum to one, with the given share filled."""
    random = np.random.default_rng(seed)
    n_units = n_sources + n_generated
    shares = random.random((n_generated, n_units))
    shares *= random.random((n_generated, n_units)) < fill
    shares = np.tril(shares, n_sources - 1)
    total = shares.sum(1, keepdims=True)
    shares /= np.where(total > 0, total, 1.0)
    return csr_array(shares[:, :n_sources]), csr_array(shares[:, n_sources:])


def seconds(
    run: Callable[[], NDArray[np.float64]], repeats: int
) -> tuple[float, NDArray[np.float64]]:
    """Least seconds of several runs, and the last result."""
    least = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        least = min(least, time.perf_counter() - start)
    return least, result


def crossover(fills: Sequence[float], ratios: Sequence[float]) -> str:
    """The fill at which sparse / dense passes one, on logarithmic axes."""
    logs = np.log(ratios)
    for place in range(1, len(fills)):
        if logs[place - 1] < 0 <= logs[place]:
            at = np.interp(
                0.0, logs[place - 1 : place + 1], np.log(fills[place - 1 : place + 1])
            )
            return f"{np.exp(at):.3f}"
    return f"above {fills[-1]}" if logs[-1] < 0 else f"below {fills[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code says whether both solves agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="two small sizes")
    parser.add_argument("--sizes", type=int, nargs="+", help="G = P, one or more")
    parser.add_argument("--fills", type=float, nargs="+", help="shares in (0, 1]")
    parser.add_argument("--repeats", type=int, default=3, help="the least counts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    sizes = options.sizes or ([20, 100] if options.smoke else [100, 500, 1000, 2000])
    fills = sorted(
        options.fills
        or ([0.02, 1.0] if options.smoke else [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    )

    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{os.cpu_count()} cores{load}, {platform.machine()}, "
        f"Python {platform.python_version()}, NumPy {np.__version__}, "
        f"SciPy {scipy.__version__}; least of {options.repeats} runs, in seconds"
    )
    print(
        f"now: dense up to {solve.DENSE_ROWS} rows, from fill {solve.DENSE_FILL} on "
        f"for marginals, {solve.DENSE_FILL_SPAN} for one span\n"
    )
    header = (
        f"{'G = P':>6} {'fill':>6} | {'all sparse':>10} {'dense':>9} {'ratio':>6} | "
        f"{'span sparse':>11} {'dense':>9} {'ratio':>6} | {'difference':>10}"
    )
    print(header)
    worst = 0.0
    for size in sizes:
        ratios: dict[str, list[float]] = {"all": [], "span": []}
        for fill in fills:
            to_sources, to_generated = random_blocks(size, size, fill, options.seed)
            weights = np.full(size, 1.0 / size)
            cells = []
            difference = 0.0
            for question, right in (("all", to_sources.toarray()), ("span", weights)):
                took, results = [], []
                for method in ("sparse", "dense"):
                    least, result = seconds(
                        partial(
                            solve.solve_triangle,
                            to_generated,
                            right,
                            transposed=question == "span",
                            method=method,
                        ),
                        options.repeats,
                    )
                    took.append(least)
                    results.append(result)
                ratios[question].append(took[0] / took[1])
                cells += [*took, took[0] / took[1]]
                difference = max(difference, float(np.abs(np.subtract(*results)).max()))
            worst = max(worst, difference)
            print(
                f"{size:>6} {fill:>6} | {cells[0]:>10.4f} {cells[1]:>9.4f} "
                f"{cells[2]:>6.2f} | {cells[3]:>11.5f} {cells[4]:>9.5f} "
                f"{cells[5]:>6.2f} | {difference:>10.1e}",
                flush=True,
            )
        print(
            f"{size:>6} crossover: all {crossover(fills, ratios['all'])}, "
            f"span {crossover(fills, ratios['span'])}"
        )
    agree = worst <= TOLERANCE
    print(f"\nlargest difference {worst:.1e}, {'within' if agree else 'ABOVE'} 1e-12")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
