"""A stand-in for a vLLM server: a small model behind a real socket, failing on demand.

It is not vLLM. It speaks that part of vLLM's OpenAI-compatible protocol which scoring a
text needs: ``GET /v1/models`` and ``POST /v1/completions`` with ``prompt_logprobs``, or
with ``echo`` and ``logprobs``, or to generate greedily. It answers connections side by
side, and misbehaves as it is told: once for each fault of a list, in the order of
requests.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from captum.attr import RemoteLLMProvider

MODEL_NAME = "stand-in"
DRIP = 0.05  # seconds between two bytes of a server that drips


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64  # with five, a burst of connections waits for a second


class StandIn:
    """A server on a port of its own; a context manager.

    Args:
        model: the model that scores and writes.
        tokenizer: its tokenizer, which the server reads texts with.
        delay (float, optional): seconds that each answer takes. Default: ``0.0``

    Attributes:
        faults (list): what goes wrong with the next requests, one entry each: a status
            such as ``500``; ``"429 after S"``; ``"reset"``, ``"slow S"``, ``"drip"``,
            ``"truncated"``, ``"half JSON"``, ``"no choices"``, ``"few scores"``,
            ``"one score less"``, ``"one score more"``, ``"NaN"``, ``"positive"``.
        dead (bool): whether every request from now on is reset.
        texts (list): prompts of the requests that came, as they came.
        together (int): most requests that were under way at once.
    """

    def __init__(self, model: Any, tokenizer: Any, delay: float = 0.0) -> None:
        self.model, self.tokenizer, self.delay = model, tokenizer, delay
        self.faults: list[Any] = []
        self.dead = False
        self.die_after: int | None = None
        self.texts: list[str] = []
        self.together = 0
        self._under_way = 0
        self._lock = threading.Lock()
        stand_in = self

        class Handler(_Handler):
            server_of = stand_in

        self._server = _Listening(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> StandIn:
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def counted(self) -> Counter[str]:
        """How often each text came."""
        return Counter(self.texts)

    def begin(self, text: str) -> Any:
        """Note a request; what is to go wrong with it."""
        with self._lock:
            self.texts.append(text)
            self._under_way += 1
            self.together = max(self.together, self._under_way)
            if self.die_after is not None and len(self.texts) > self.die_after:
                self.dead = True
            if self.dead:
                return "reset"
            return self.faults.pop(0) if self.faults else None

    def end(self) -> None:
        """Note that a request is over."""
        with self._lock:
            self._under_way -= 1

    def scores(self, text: str) -> tuple[list[int], list[float | None]]:
        """Ids of a text and their log-probabilities; the first has none."""
        ids = self.tokenizer.encode(text)
        with torch.no_grad():
            logs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [float(logs[i - 1, ids[i]]) for i in range(1, len(ids))]
        return ids, [None, *found]

    def answer(self, asked: dict[str, Any], fault: Any) -> dict[str, Any]:
        """What the completions end point says."""
        text = asked["prompt"]
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
        if "prompt_logprobs" in asked or asked.get("echo"):
            ids, scores = self.scores(text)
            scores = self._spoilt(scores, fault)
            tokens = [self.tokenizer.decode([number]) for number in ids]
            choice["prompt_logprobs"] = [
                None
                if score is None
                else {
                    str(number): {"logprob": score, "rank": 1, "decoded_token": token}
                }
                for number, score, token in zip(
                    [*ids, 0][: len(scores)], scores, [*tokens, ""], strict=False
                )
            ]
            if asked.get("echo"):
                choice["text"] = text
                choice["logprobs"] = {"tokens": tokens, "token_logprobs": scores}
        else:
            ids = torch.tensor([self.tokenizer.encode(text)])
            found = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=asked.get("max_tokens", 16),
                do_sample=False,
            )
            choice["text"] = self.tokenizer.decode(found[0, ids.shape[1] :])
        return {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 0,
            "model": MODEL_NAME,
            "choices": [] if fault == "no choices" else [choice],
        }

    @staticmethod
    def _spoilt(scores: list[float | None], fault: Any) -> list[float | None]:
        if fault == "few scores":
            return scores[:2]
        if fault == "one score less":
            return scores[:-1]
        if fault == "one score more":
            return [*scores, -1.0]
        if fault == "NaN":
            return [*scores[:-1], float("nan")]
        if fault == "positive":
            return [*scores[:-1], 0.5]
        return scores


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server_of: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """The list of models."""
        self._send(200, {"object": "list", "data": [_model()]})

    def do_POST(self) -> None:
        """Scores of a text, or its continuation."""
        length = int(self.headers["Content-Length"])
        asked = json.loads(self.rfile.read(length))
        fault = self.server_of.begin(asked["prompt"])
        try:
            with suppress(OSError):  # who asked may have gone
                self._misbehave(asked, fault)
        finally:
            self.server_of.end()

    def _misbehave(self, asked: dict[str, Any], fault: Any) -> None:
        time.sleep(self.server_of.delay)
        if isinstance(fault, int):
            self._send(fault, {"error": {"message": f"told to say {fault}"}})
        elif fault == "reset":
            # Without lingering, the socket is reset and not closed.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif isinstance(fault, str) and fault.startswith("429 after "):
            more = {"Retry-After": fault.removeprefix("429 after ")}
            self._send(429, {"error": {"message": "too many"}}, more)
        else:
            if isinstance(fault, str) and fault.startswith("slow "):
                time.sleep(float(fault.removeprefix("slow ")))
            self._send(200, self.server_of.answer(asked, fault), fault=fault)

    def _send(
        self,
        status: int,
        content: Any,
        more: dict[str, str] | None = None,
        fault: Any = None,
    ) -> None:
        data = json.dumps(content).encode()
        if fault == "half JSON":
            data = data[: len(data) // 2]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "truncated":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "drip":
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(DRIP)
        else:
            self.wfile.write(data)


def _model() -> dict[str, Any]:
    return {"id": MODEL_NAME, "object": "model", "created": 0, "owned_by": "tests"}


class EchoProvider(RemoteLLMProvider):
    """A provider as a user may write one: ``echo`` and ``logprobs``, no time-out.

    Args:
        url (str): of the server.
        concurrency (int, optional): what it says of itself. Default: ``1``
    """

    model_name = MODEL_NAME

    def __init__(self, url: str, concurrency: int = 1) -> None:
        self.api_url = url
        self.concurrency = concurrency
        self._host = url.removeprefix("http://").removesuffix("/v1")

    def generate(self, prompt: str, **gen_args: Any) -> str:
        """What the server writes after a text."""
        count = gen_args.get("max_new_tokens", 16)
        found = self._post({"prompt": prompt, "max_tokens": count})
        return str(found["choices"][0]["text"])

    def get_logprobs(
        self, input_prompt: str, target_str: str, tokenizer: Any = None
    ) -> list[float]:
        """Scores of the last tokens of a text."""
        count = len(tokenizer.encode(target_str, add_special_tokens=False))
        text = input_prompt + target_str
        found = self._post({"prompt": text, "echo": True, "logprobs": 1})
        scores: Sequence[float] = found["choices"][0]["logprobs"]["token_logprobs"]
        return list(scores[len(scores) - count :])

    def _post(self, asked: dict[str, Any]) -> Any:
        connection = HTTPConnection(self._host)
        try:
            body = json.dumps({"model": MODEL_NAME, **asked})
            connection.request("POST", "/v1/completions", body)
            response = connection.getresponse()
            data = response.read()
            if response.status != 200:
                raise RefusedError(response.status, dict(response.headers))
            return json.loads(data)
        finally:
            connection.close()


class RefusedError(Exception):
    """A status other than 200."""

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        super().__init__(f"status {status}")
        self.status_code, self.headers = status, headers
