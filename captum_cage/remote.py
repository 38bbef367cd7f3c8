"""Providers for remote models that fail, stall or lie at times."""

from __future__ import annotations

import contextvars
import http.client
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from numbers import Real
from typing import Any, TypeVar

from captum.attr import RemoteLLMProvider, VLLMProvider

from captum_cage._checks import complaint, shown, whole_number
from captum_cage.answers import AnswerCache

__all__ = ["ReliableProvider", "RequestCounts"]

_T = TypeVar("_T")

_LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
_TOO_MANY_REQUESTS = 429
# What a log-probability may exceed zero by, as rounded sums do.
_ROUNDING = 1e-6
# Characters of a text that an error shows.
_SHOWN = 80
# Errors of clients that mean that no whole answer came, by the top package and class.
_NO_ANSWER = {
    ("aiohttp", "ClientConnectionError"),
    ("aiohttp", "ClientPayloadError"),
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
    ("openai", "APIConnectionError"),
    ("requests", "ChunkedEncodingError"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
}
# Set where nobody waits for answers any more.
stopped: ContextVar[threading.Event | None] = ContextVar("stopped", default=None)


@dataclass(frozen=True)
class RequestCounts:
    """What a provider was asked.

    Attributes:
        asked (int): requests that were sent, attempts that failed among them.
        retried (int): those that repeated a failed one.
        cached (int): answers that came from the cache.
    """

    asked: int = 0
    retried: int = 0
    cached: int = 0


class ReliableProvider(RemoteLLMProvider):
    """A provider whose requests are repeated, bounded in time, checked and kept.

    It wraps any provider of Captum's ``RemoteLLMAttribution``. A request that fails in
    a way that may pass is repeated: a broken connection, a truncated answer, no answer
    in time, a status of 500 or more, and 429, after as long as the server asks for. The
    waits double, with jitter. Other failures, such as a status of 400 or 404, are
    raised at once.

    An answer must have one finite log-probability, of zero or less, for each token of
    the target. Those of a ``VLLMProvider`` must be of the tokenizer's tokens, too:
    Captum's takes the last scores that come, whatever they are of. Answers are kept on
    disk where ``cache`` names a folder; failures and sampled texts never are.

    Around a provider with a ``concurrency`` of more than 1, ``GraphContextAttribution``
    has several requests under way at once, and each is sent once only. The rows are the
    same.

    Args:
        provider (RemoteLLMProvider): the provider to ask. It is called from several
            threads, one per request. A call that takes too long is given up, not ended:
            its thread goes on until the provider comes back.
        retries (int, optional): how often a request is repeated. Default: ``5``
        backoff (float, optional): seconds before the first repetition; each further
            one waits twice as long, at most a minute, less up to a half at random.
            Default: ``0.5``
        timeout (float, optional): seconds in which an attempt must be answered in
            whole. Default: ``60.0``
        limit (float, optional): seconds for an answer, all attempts and waits together.
            Default: ``600.0``
        concurrency (int, optional): most requests that one explanation has under way
            at once when its rows are computed. Default: ``8``
        share (bool, optional): let one request serve all rows that need scores of the
            beginning of its text, if the tokens are the same. Rows are then as those of
            single requests up to the rounding of the server. Only for providers whose
            score of a token depends on nothing after it, as that of a causal language
            model. Default: ``None``, for a ``VLLMProvider`` only
        cache (str or os.PathLike, optional): folder in which answers are kept, on a
            disk of this machine. Several processes may use it. Delete it to clear it.
            Default: ``None``, nothing is kept
        cache_size (int, optional): most answers that are kept there; the oldest go.
            Default: ``1_000_000``
        model (str, optional): what the cache knows the model by. Add the revision
            yourself: nothing else tells that the weights have changed.
            Default: ``None``, the provider's ``model_name``

    Raises:
        TypeError: if the provider is none, or an argument is of the wrong kind.
        ValueError: if an argument is out of range, the folder is not a cache, or
            nothing names the model of a cache.

    Example:
        >>> from captum.attr import RemoteLLMProvider
        >>> class Flaky(RemoteLLMProvider):
        ...     api_url = ""
        ...     calls = 0
        ...     def generate(self, prompt, **gen_args):
        ...         return " 3"
        ...     def get_logprobs(self, input_prompt, target_str, tokenizer=None):
        ...         self.calls += 1
        ...         if self.calls == 1:
        ...             raise ConnectionResetError
        ...         return [-0.5]
        >>> provider = ReliableProvider(Flaky(), backoff=0.01)
        >>> provider.get_logprobs("Ana has", " 3")
        [-0.5]
        >>> provider.counts
        RequestCounts(asked=2, retried=1, cached=0)
    """

    def __init__(
        self,
        provider: RemoteLLMProvider,
        *,
        retries: int = 5,
        backoff: float = 0.5,
        timeout: float = 60.0,
        limit: float = 600.0,
        concurrency: int = 8,
        share: bool | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_size: int = 1_000_000,
        model: str | None = None,
    ) -> None:
        if not callable(getattr(provider, "get_logprobs", None)):
            raise TypeError(
                complaint(
                    "provider",
                    "must be a provider of Captum's RemoteLLMAttribution",
                    f"{shown(provider)} came, which has no get_logprobs()",
                    "Pass an object such as VLLMProvider(api_url).",
                )
            )
        self.provider = provider
        self.api_url = getattr(provider, "api_url", "")
        self.retries = whole_number(
            "retries", retries, remedy="Pass 0 to ask but once."
        )
        self.backoff = _seconds("backoff", backoff, may_be_zero=True)
        self.timeout = _seconds("timeout", timeout)
        self.limit = _seconds("limit", limit)
        remedy = "Pass 1 to ask one after the other."
        self.concurrency = whole_number(
            "concurrency", concurrency, minimum=1, remedy=remedy
        )
        self.share = isinstance(provider, VLLMProvider) if share is None else share
        self._model = getattr(provider, "model_name", None) if model is None else model
        self._cache: AnswerCache | None = None
        if cache is not None:
            self._cache = self._opened(cache, cache_size)
        self._counts = RequestCounts()
        self._lock = threading.Lock()
        # Of its own: jitter must not change what methods draw.
        self._jitter = random.Random()

    def __getstate__(self) -> dict[str, Any]:
        return {name: it for name, it in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def model_name(self) -> str | None:
        """What the cache knows the model by."""
        return self._model

    @property
    def counts(self) -> RequestCounts:
        """What was asked so far."""
        return self._counts

    def generate(self, prompt: str, **gen_args: Any) -> str:
        """The text that the model writes after a prompt.

        Args:
            prompt (str): the prompt.
            **gen_args: for the provider. With ``temperature=0`` the text is kept in the
                cache; else it may be sampled, and is not.

        Raises:
            ConnectionError: if no attempt was answered, or the server refuses it.
            TimeoutError: if there was no answer in time.
            TypeError: if what comes is no text.
        """
        question = [*self._whose("text"), prompt, gen_args]
        keeps = self._cache is not None and gen_args.get("temperature") == 0
        if self._cache is not None and keeps:
            known = self._cache.text(question)
            if known is not None:
                self._count(cached=1)
                return known
        text = self._answer(
            prompt, lambda: self.provider.generate(prompt, **dict(gen_args))
        )
        if not isinstance(text, str):
            raise TypeError(
                complaint(
                    "provider",
                    "generate() must give a text",
                    f"{shown(text)} came",
                    "Correct the provider.",
                )
            )
        if self._cache is not None and keeps:
            self._cache.keep(question, text)
        return text

    def get_logprobs(
        self, input_prompt: str, target_str: str, tokenizer: Any = None
    ) -> list[float]:
        """Log-probability of each token of a target after a text.

        Args:
            input_prompt (str): the text.
            target_str (str): the target.
            tokenizer (optional): says how many tokens the target has. Default: None,
                the number is not checked

        Returns:
            list[float]: one number per token, finite, zero or less.

        Raises:
            ConnectionError: if no attempt was answered, or the server refuses it.
            TimeoutError: if there was no answer in time.
            ValueError: if the answer has another number of scores, or one that is no
                log-probability.
        """
        count = None
        if tokenizer is not None:
            count = len(tokenizer.encode(target_str, add_special_tokens=False))
        whose = self._whose("scores")
        if self.share and count is not None:
            question = [*whose, input_prompt + target_str]
        else:
            question = [*whose, input_prompt, target_str, count]
        if self._cache is not None:
            known = self._cache.numbers(question)
            if known is not None and (count is None or len(known) >= count):
                self._count(cached=1)
                return known[len(known) - count :] if count is not None else known
        given = self._answer(
            input_prompt + target_str,
            lambda: self._scores(input_prompt, target_str, tokenizer),
        )
        scores = checked_scores(given, count, input_prompt, target_str)
        if self._cache is not None:
            self._cache.keep(question, scores)
        return scores

    def _scores(self, prompt: str, target: str, tokenizer: Any) -> Any:
        provider = self.provider
        plain = type(provider) is VLLMProvider and "get_logprobs" not in vars(provider)
        if plain and tokenizer is not None and target:
            return _served_scores(provider, self.timeout, prompt, target, tokenizer)
        return provider.get_logprobs(
            input_prompt=prompt, target_str=target, tokenizer=tokenizer
        )

    def _opened(self, cache: str | os.PathLike[str], size: int) -> AnswerCache:
        if self._model is None:
            raise ValueError(
                complaint(
                    "model",
                    "must name the model where answers are kept, or those of another "
                    "would be taken for its own",
                    f"None came, and {type(self.provider).__name__} has no model_name",
                    "Pass model='name and revision'.",
                )
            )
        remedy = "Pass the number of answers to keep."
        return AnswerCache(
            cache, whole_number("cache_size", size, minimum=1, remedy=remedy)
        )

    def _whose(self, what: str) -> list[Any]:
        kind = type(self.provider)
        return [what, self._model, f"{kind.__module__}.{kind.__qualname__}"]

    def _count(self, asked: int = 0, retried: int = 0, cached: int = 0) -> None:
        with self._lock:
            now = self._counts
            self._counts = RequestCounts(
                now.asked + asked, now.retried + retried, now.cached + cached
            )

    def _answer(self, text: str, ask: Callable[[], Any]) -> Any:
        """What comes back in the end."""
        end = time.monotonic() + self.limit
        stop = stopped.get() or threading.Event()
        for attempt in range(1, self.retries + 2):
            left = end - time.monotonic()
            self._count(asked=1, retried=int(attempt > 1))
            try:
                return _within(min(self.timeout, left), ask)
            except Exception as error:
                cause, again, wished = _verdict(error)
                if cause is None:
                    raise
                if not again:
                    raise _refused(text, cause) from error
                wait = max(self._wait(attempt), wished)
                late = time.monotonic() + wait >= end
                if attempt > self.retries or late or stop.wait(wait):
                    raise self._failed(text, attempt, cause, wished, late) from error
        raise AssertionError("unreachable")  # pragma: no cover

    def _wait(self, attempt: int) -> float:
        longest = min(_LONGEST_WAIT, self.backoff * 2.0 ** min(attempt - 1, 30))
        return longest * self._jitter.uniform(0.5, 1.0)

    def _failed(
        self, text: str, attempts: int, cause: BaseException, wished: float, late: bool
    ) -> OSError:
        kind = TimeoutError if isinstance(cause, TimeoutError) else ConnectionError
        tries = "one attempt" if attempts == 1 else f"{attempts} attempts"
        more = f", which asks to wait for {wished:g} s" if wished else ""
        limit = f"within {self.limit:g} s " if late else ""
        return kind(
            complaint(
                "provider",
                f"must answer {limit}in {self.retries + 1} attempts",
                f"{tries} failed for the text {_short(text)}, the last by "
                f"{_named(cause)}{more}",
                "See whether the server runs and is not overloaded, or pass a lower "
                "`concurrency` or a longer `timeout` and `limit`; the same call goes "
                "on from what was finished.",
            )
        )


def _served_scores(
    provider: VLLMProvider, seconds: float, prompt: str, target: str, tokenizer: Any
) -> list[float]:
    """What Captum's provider for vLLM gives, with the tokens compared.

    Captum's takes the last scores that come. If the server reads the text as other
    tokens, or leaves some out, these are scores of something else. vLLM names the token
    of each score: here they must be the tokenizer's.

    Raises:
        ValueError: if there are no scores, or they are of other tokens.
    """
    text = prompt + target
    # The client would repeat requests on its own, and wait ten minutes for each.
    client: Any = provider.client.with_options(max_retries=0, timeout=seconds)
    response: Any = client.completions.create(
        model=provider.model_name,
        prompt=text,
        temperature=0.0,
        max_tokens=1,
        extra_body={"prompt_logprobs": 0},
    )
    choices = getattr(response, "choices", None) or [None]
    entries = getattr(choices[0], "prompt_logprobs", None)
    if not isinstance(entries, list):
        raise ValueError(
            complaint(
                "provider",
                "the server must give 'prompt_logprobs'",
                f"{shown(entries)} came {_which(prompt, target)}",
                "Use a vLLM server, at its completions end point.",
            )
        )
    ids = list(tokenizer.encode(text))
    # One of the two may put a special token in front that the other leaves out.
    if abs(len(entries) - len(ids)) > 1:
        raise _other_tokens(text, f"it read {len(entries)} tokens, not {len(ids)}")
    count = len(tokenizer.encode(target, add_special_tokens=False))
    scores = []
    for entry, number in zip(reversed(entries), reversed(ids), strict=False):
        if entry is None:  # the first token, which has no score
            break
        if not isinstance(entry, Mapping) or str(number) not in entry:
            read = next(iter(entry), None) if isinstance(entry, Mapping) else entry
            raise _other_tokens(
                text, f"its last tokens are not the same: {read} stands for {number}"
            )
        scores.append(entry[str(number)]["logprob"])
    return scores[:count][::-1]


def _other_tokens(text: str, how: str) -> ValueError:
    return ValueError(
        complaint(
            "tokenizer",
            "must read a text as the server does",
            f"{how}, in {_short(text)}",
            "Use the tokenizer of the model that is served, and send no chat template "
            "twice.",
        )
    )


def _seconds(where: str, value: Any, may_be_zero: bool = False) -> float:
    must = "must be seconds, 0 or more" if may_be_zero else "must be seconds, above 0"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(
            complaint(where, must, f"{shown(value)} came", "Pass a number.")
        )
    number = float(value)
    if not (number > 0 or (may_be_zero and number == 0)) or math.isinf(number):
        raise ValueError(complaint(where, must, f"{number} came", "Pass a number."))
    return number


def _within(seconds: float, ask: Callable[[], _T]) -> _T:
    """What a call gives, if it comes back in time.

    Raises:
        TimeoutError: if it does not.
    """
    found: list[_T] = []
    failed: list[BaseException] = []
    back = threading.Event()

    def call() -> None:
        try:
            found.append(ask())
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            failed.append(error)
        finally:
            back.set()

    # A daemon: a call that never comes back must not keep the program from ending.
    threading.Thread(
        target=contextvars.copy_context().run, args=(call,), daemon=True
    ).start()
    if not back.wait(max(seconds, 0.0)):
        raise TimeoutError(f"no answer within {seconds:.3g} s")
    if failed:
        raise failed[0]
    return found[0]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it: Captum's provider wraps what its client raises."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _verdict(error: BaseException) -> tuple[BaseException | None, bool, float]:
    """What failed, whether to try again, and how long the server asks to wait.

    The first is None where the error is not of the network or the server.
    """
    chain = list(_chain(error))
    for one in chain:
        status = _status(one)
        if status is not None and status >= 400:
            again = status >= 500 or status == _TOO_MANY_REQUESTS
            return one, again, _retry_after(one) if again else 0.0
    for one in chain:
        if _is_no_answer(one):
            return one, True, 0.0
    return None, False, 0.0


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error tells of."""
    response = getattr(error, "response", None)
    for value in (
        getattr(error, "status_code", None),
        getattr(response, "status_code", None),
        getattr(error, "status", None),
        getattr(error, "code", None),
    ):
        if isinstance(value, int) and 100 <= value < 600:
            return int(value)
    return None


def _is_no_answer(error: BaseException) -> bool:
    ours = (ConnectionError, TimeoutError, http.client.HTTPException)
    # A truncated answer is no JSON.
    if isinstance(error, (*ours, json.JSONDecodeError)):
        return True
    return any(
        (kind.__module__.split(".")[0], kind.__name__) in _NO_ANSWER
        for kind in type(error).__mro__
    )


def _retry_after(error: BaseException) -> float:
    """Seconds that the server asks to wait; 0 where it does not say."""
    response = getattr(error, "response", None)
    headers = getattr(response, "headers", None) or getattr(error, "headers", None)
    value: Any = None
    if headers is not None and hasattr(headers, "get"):
        value = headers.get("Retry-After")
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def _refused(text: str, cause: BaseException) -> ConnectionError:
    return ConnectionError(
        complaint(
            "provider",
            "the server must accept the request",
            f"it refused the text {_short(text)} by {_named(cause)}",
            "It would do so again: correct what it names, such as the model's name, "
            "the key, or a text that is too long.",
        )
    )


def checked_scores(
    given: Any, count: int | None, prompt: str, target: str
) -> list[float]:
    """Scores as they must be.

    Args:
        given: what a provider gave.
        count (int or None): how many there must be; None for any number.
        prompt (str): the text.
        target (str): the target after it.

    Raises:
        ValueError: if there is another number, or one is no log-probability.
    """
    where = _which(prompt, target)
    try:
        scores = [float(value) for value in given]
    except (TypeError, ValueError):
        raise ValueError(
            complaint(
                "provider",
                "must give a list of log-probabilities",
                f"{shown(given)} came {where}",
                "Correct the provider.",
            )
        ) from None
    if count is not None and len(scores) != count:
        raise ValueError(
            complaint(
                "provider",
                f"must give {count} log-probabilities, one per token of the target",
                f"{len(scores)} came {where}",
                "Use the tokenizer of the model that is served, and see that the "
                "server does not cut texts that are too long.",
            )
        )
    for place, score in enumerate(scores):
        if not math.isfinite(score) or score > _ROUNDING:
            raise ValueError(
                complaint(
                    "provider",
                    "must give finite log-probabilities, 0 or less",
                    f"{score} came for token {place}, {where}",
                    "See whether the server's number type overflows, or whether it "
                    "gives probabilities.",
                )
            )
    return [min(score, 0.0) for score in scores]


def _which(prompt: str, target: str) -> str:
    return f"for the target {_short(target)} after {_short(prompt)}"


def _short(text: str) -> str:
    """The beginning and the end of a text."""
    if len(text) <= _SHOWN:
        return repr(text)
    half = _SHOWN // 2
    return f"{text[:half]!r} ... {text[-half:]!r}"


def _named(error: BaseException) -> str:
    message = " ".join(str(error).split())
    name = type(error).__name__
    if len(message) > 200:
        message = f"{message[:200]}..."
    return f"{name}: {message}" if message else name
