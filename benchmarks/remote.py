"""Seconds and requests for the rows of a served model, by window and sharing.

    python benchmarks/remote.py             # the demo model; about two minutes
    python benchmarks/remote.py --smoke     # few requests; checks the equality only

The server is a stand-in, not vLLM: it listens on a real socket of this machine, answers
each request after a fixed delay (as a model of its own hardware would), in any number
side by side, and scores a token by a formula of it and of the eight characters before
it, so that hardly any of the time is its own. "loop" asks one request after the other
without any wrapper; the others go through ReliableProvider. Rows must be equal to the
last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
import zlib
from collections.abc import Sequence
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import captum
import numpy as np
import numpy.typing as npt
import torch
from captum.attr import (
    FeatureAblation,
    RemoteLLMAttribution,
    RemoteLLMProvider,
    ShapleyValueSampling,
    TextTokenInput,
)

from captum_cage import GraphContextAttribution
from captum_cage.demo import load_demo, sample_problems
from captum_cage.remote import ReliableProvider

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "FeatureAblation": (FeatureAblation, {}),
    "ShapleyValueSampling": (ShapleyValueSampling, {"n_samples": 2}),
}


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # with five, a burst of connections waits for a second


class Server:
    """A server of scores on a port of its own.

    Args:
        tokenizer: what it reads texts with.
        delay (float): seconds before each answer.
    """

    def __init__(self, tokenizer: Any, delay: float) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                text = json.loads(self.rfile.read(length))["prompt"]
                time.sleep(delay)
                data = json.dumps(_scores(tokenizer, text)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = _Listening(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _scores(tokenizer: Any, text: str) -> list[float]:
    found = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return [
        -1.0 - zlib.crc32(text[max(0, stop - 8) : stop].encode()) / 2**32
        for _, stop in found
    ]


class Provider(RemoteLLMProvider):
    """Asks the server, by one connection per thread.

    Args:
        host (str): its address.
    """

    def __init__(self, host: str) -> None:
        self.api_url, self.asked = host, 0
        self._lock = threading.Lock()

    def generate(self, prompt: str, **gen_args: Any) -> str:
        """Not needed here."""
        raise NotImplementedError

    def get_logprobs(
        self, input_prompt: str, target_str: str, tokenizer: Any = None
    ) -> list[float]:
        """Scores of the last tokens."""
        count = len(tokenizer.encode(target_str, add_special_tokens=False))
        with self._lock:
            self.asked += 1
        connection = HTTPConnection(self.api_url)
        try:
            body = json.dumps({"prompt": input_prompt + target_str})
            connection.request("POST", "/v1/completions", body)
            scores: list[float] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return scores[len(scores) - count :]


def explained(
    server: Server,
    tokenizer: Any,
    method: str,
    units: str,
    options: dict[str, Any] | None,
) -> tuple[float, int, npt.NDArray[np.float64]]:
    """Seconds, requests and rows; with the options of the wrapper, or without it."""
    plain = Provider(server.host)
    provider = plain if options is None else ReliableProvider(plain, **options)
    kind, arguments = METHODS[method]
    llm_attr = RemoteLLMAttribution(
        kind(RemoteLLMAttribution.placeholder_model), tokenizer, provider
    )
    problem = sample_problems(1, seed=0)[0]
    inp = TextTokenInput(problem.prompt, tokenizer)
    torch.manual_seed(0)
    start = time.perf_counter()
    result = GraphContextAttribution(llm_attr).attribute(
        inp, problem.completion, units=units, **arguments
    )
    took = time.perf_counter() - start
    rows: npt.NDArray[np.float64] = result.graph.rows
    return took, plain.asked, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code says whether all rows are those of the loop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="sentences, short delays")
    parser.add_argument("--delay", type=float, help="seconds before each answer")
    parser.add_argument("--units", nargs="+", help="granularities")
    options = parser.parse_args(arguments)
    delay = options.delay or (0.005 if options.smoke else 0.05)
    units = options.units or (["sentence"] if options.smoke else ["sentence", "word"])
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{os.cpu_count()} cores{load}, {platform.machine()}, "
        f"Python {platform.python_version()}, Captum {captum.__version__}, "
        f"PyTorch {torch.__version__}; {delay * 1000:g} ms per answer"
    )
    ways: list[tuple[str, dict[str, Any] | None]] = [
        ("loop", None),
        ("window 1", {"concurrency": 1}),
        ("window 8", {"concurrency": 8}),
        ("window 1, shared", {"concurrency": 1, "share": True}),
        ("window 8, shared", {"concurrency": 8, "share": True}),
    ]
    _, tokenizer = load_demo()
    server = Server(tokenizer, delay)
    same = True
    print("| method | units | way | requests | seconds | loop / way | equal |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    try:
        for method in METHODS:
            for unit in units:
                base = explained(server, tokenizer, method, unit, None)
                for name, more in ways:
                    found = base
                    if more is not None:
                        found = explained(server, tokenizer, method, unit, more)
                    equal = np.array_equal(found[2], base[2])
                    same &= equal
                    print(
                        f"| {method} | {unit} | {name} | {found[1]} | {found[0]:.2f} | "
                        f"{base[0] / found[0]:.1f} | {'yes' if equal else 'NO'} |",
                        flush=True,
                    )
    finally:
        server.close()
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
