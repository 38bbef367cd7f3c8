"""Size of a page, and milliseconds that a click on it takes in a browser.

    python benchmarks/page.py             # 100 to 3,000 tokens
    python benchmarks/page.py --smoke     # 100 tokens

Rows are random, with few heavy entries. "select" is the time to solve the graph, find
the paths and lay the page out again, within the page; "click" is from the event to the
second frame after it. "open" is the time until a page is ready.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Error, sync_playwright

from captum_cage import AttributionGraph, GraphAttributionResult, Unit

ARGUMENTS = [
    *("--no-sandbox", "--headless", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
CLICK = """(place) => new Promise((done) => {
  const unit = document.querySelectorAll("#generated .u")[place];
  const begin = performance.now();
  unit.dispatchEvent(new PointerEvent("pointerdown", {bubbles: true, button: 0}));
  document.dispatchEvent(new PointerEvent("pointerup"));
  requestAnimationFrame(() => requestAnimationFrame(
    () => done(performance.now() - begin)));
})"""


def random_result(n_tokens: int, seed: int) -> GraphAttributionResult:
    """A result of as many tokens, half of them generated."""
    random = np.random.default_rng(seed)
    half = n_tokens // 2
    texts, units = ["", ""], []
    for side in (0, 1):
        for place in range(half):
            word = f" word{random.integers(100)}" + "." * (place % 12 == 11)
            start = len(texts[side])
            texts[side] += word
            units.append(Unit(word, bool(side), (start, len(texts[side]))))
    rows = random.exponential(size=(half, 2 * half)) ** 3
    rows = np.tril(rows, half - 1)
    return GraphAttributionResult(
        AttributionGraph.from_rows(rows, half),
        units,
        [half - 1],
        source_text=texts[0],
        generated_text=texts[1],
        meta={"units": "token", "method": "random"},
    )


def measure(browser: Any, result: GraphAttributionResult, clicks: int) -> list[str]:
    """Size, unresolved share and times of a result's page."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        size = len(result.to_html(path).encode("utf-8"))
        view = browser.new_page(viewport={"width": 1400, "height": 900})
        view.goto(path.as_uri())
        timing = "performance.getEntriesByType('navigation')[0].domComplete"
        opened = float(view.evaluate(timing))
        G = result.graph.n_generated
        places = np.linspace(G // 10, G - 2, clicks).astype(int).tolist()
        solved = [
            view.evaluate("(step) => captumCage.timed([step])", place)
            for place in places
        ]
        clicked = [view.evaluate(CLICK, place) for place in places]
        open_mass = float(view.evaluate("captumCage.explain().unresolved"))
        view.close()
    times = [opened, np.median(solved), max(solved), np.median(clicked), max(clicked)]
    return [f"{size}", f"{open_mass:.1%}", *(f"{time:.0f}" for time in times)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; without a browser, say so."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="one small page")
    parser.add_argument("--tokens", type=int, nargs="+", help="sizes")
    parser.add_argument("--clicks", type=int, default=10)
    options = parser.parse_args(arguments)
    sizes = options.tokens or ([100] if options.smoke else [100, 1000, 2000, 3000])
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    heads = ["tokens", "bytes", "unresolved", "open", "select", "worst"]
    heads += ["click", "worst"]
    with sync_playwright() as tools:
        try:
            browser = tools.chromium.launch(executable_path=found, args=ARGUMENTS)
        except Error as error:
            print(f"There is no browser: {str(error).splitlines()[0]}")
            return 0
        print(f"Chromium {browser.version}; times in ms")
        print(" ".join(f"{head:>10}" for head in heads))
        for n_tokens in sizes:
            clicks = 2 if options.smoke else options.clicks
            told = measure(browser, random_result(n_tokens, 0), clicks)
            print(" ".join(f"{cell:>10}" for cell in [str(n_tokens), *told]))
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
