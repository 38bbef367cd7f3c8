"""Rows of a remote model: what they ask is found first, and asked side by side.

A base method that perturbs does not look at one answer to choose the next question. So
a row is computed twice: first with a provider that only notes what it is asked, and,
when the answers are there, with one that knows them. Both times it draws the same
random numbers, so that the row is that of the loop. What was not noted is asked then.
"""

from __future__ import annotations

import queue
import random
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import RemoteLLMProvider
from tqdm import tqdm

from captum_cage._captum import asking, family
from captum_cage.remote import checked_scores, stopped
from captum_cage.rows import loop_row
from captum_cage.task import RowTask

__all__ = ["loop_rows", "planned_requests"]

Row: TypeAlias = npt.NDArray[np.float64]
Question: TypeAlias = tuple[str, str]
"""A text and the target after it."""

# Questions, and characters of texts, from which no further row is looked at before the
# answers are there.
_QUESTIONS_PER_REQUEST = 32
_CHARACTERS = 2**25
# Seconds between two looks at whether the user interrupts.
_LOOK = 0.5
# What warnings are shown is the same for all threads: one of them sets it at a time.
_quiet = threading.Lock()


def loop_rows(task: RowTask, steps: Sequence[int]) -> Iterator[Row]:
    """Raw rows by the loop; several requests at once where the provider takes them.

    A provider says so by an attribute ``concurrency`` of more than 1, or by ``share``.

    Args:
        task (RowTask): what to explain.
        steps (Sequence[int]): positions of generated units, ascending.

    Yields:
        numpy.ndarray: one row per step, in this order, shape ``(N,)``.
    """
    asked = _Asked.of(task) if family(task.llm_attr) == "remote" else None
    if asked is None:
        for step in steps:
            yield loop_row(task, step)
    else:
        yield from asked.rows(steps)


def planned_requests(task: RowTask, steps: Sequence[int]) -> list[Question] | None:
    """What :func:`loop_rows` will ask a remote model for; nothing is asked.

    Args:
        task (RowTask): what to explain.
        steps (Sequence[int]): positions of generated units, ascending.

    Returns:
        list or None: a text and the target after it for each request; None where one
        question after the other is asked, or one depends on an answer.
    """
    asked = _Asked.of(task) if family(task.llm_attr) == "remote" else None
    return None if asked is None else asked.requests(steps)


@dataclass
class _Notes(RemoteLLMProvider):
    """Notes what it is asked."""

    api_url: str = ""
    questions: dict[Question, int] = field(default_factory=dict)

    def generate(self, prompt: str, **_: Any) -> str:
        """Rows need no text."""
        raise NotImplementedError(prompt)

    def get_logprobs(
        self, input_prompt: str, target_str: str, tokenizer: Any = None
    ) -> list[float]:
        """Some scores, as many as the target has tokens."""
        count = len(tokenizer.encode(target_str, add_special_tokens=False))
        self.questions[input_prompt, target_str] = count
        return [-1.0] * count


@dataclass
class _Known(RemoteLLMProvider):
    """Gives the answers that are there, and asks for others."""

    provider: RemoteLLMProvider
    api_url: str = ""
    answers: dict[Question, list[float]] = field(default_factory=dict)

    def generate(self, prompt: str, **gen_args: Any) -> str:
        """What the provider writes."""
        return str(self.provider.generate(prompt, **gen_args))

    def get_logprobs(
        self, input_prompt: str, target_str: str, tokenizer: Any = None
    ) -> list[float]:
        """The answer."""
        known = self.answers.get((input_prompt, target_str))
        if known is not None:
            return known
        return list(
            self.provider.get_logprobs(
                input_prompt=input_prompt, target_str=target_str, tokenizer=tokenizer
            )
        )


@dataclass(frozen=True)
class _Slice:
    """Where the scores of a question stand in the answer to a request.

    Counted from its end, as that is where a text's own tokens stand for sure.
    """

    request: Question
    start: int
    stop: int

    def of(self, answer: list[float]) -> list[float]:
        return answer[len(answer) - self.start : len(answer) - self.stop]


@dataclass
class _Drafted:
    """A row whose questions are known.

    Attributes:
        step (int): its position.
        before: the state of the generators of random numbers before it.
        questions (dict): what it asks, and how many scores answer it; None if that
            cannot be told without answers.
    """

    step: int
    before: Any
    questions: dict[Question, int] | None


class _Asked:
    """The questions of rows and their answers."""

    def __init__(self, task: RowTask, notes: _Notes, known: _Known) -> None:
        self._task = task
        self._notes, self._known = notes, known
        provider: Any = task.llm_attr.provider
        self._provider = provider
        self._tokenizer = task.llm_attr.tokenizer
        self._width = max(1, getattr(provider, "concurrency", 1))
        self._share = bool(getattr(provider, "share", False))
        # Answers to requests of rows that are not finished, also of an earlier call.
        self._kept: dict[Any, list[float]] = task.kept.setdefault("answers", {})

    @classmethod
    def of(cls, task: RowTask) -> _Asked | None:
        """None where one question after the other is asked."""
        provider: Any = task.llm_attr.provider
        side_by_side = getattr(provider, "concurrency", 1) > 1
        if not side_by_side and not getattr(provider, "share", False):
            return None
        notes, known = _Notes(), _Known(provider)
        if asking(task.llm_attr, notes) is None:
            return None
        return cls(task, notes, known)

    def rows(self, steps: Sequence[int]) -> Iterator[Row]:
        """Rows in the order of steps."""
        left = list(steps)
        while left:
            block = self._block(left)
            del left[: len(block)]
            yield from self._answered(block)

    def requests(self, steps: Sequence[int]) -> list[Question] | None:
        """Requests for these rows; None if one depends on an answer."""
        left, found = list(steps), list[Question]()
        while left:
            block = self._block(left)
            del left[: len(block)]
            asked: dict[Question, int] = {}
            for row in block:
                if row.questions is None:
                    return None
                asked.update(row.questions)
            plan = _plan(asked, self._tokenizer) if self._share else _plain(asked)
            found += dict.fromkeys(part.request for part in plan.values())
        return found

    def _task_of(self, provider: RemoteLLMProvider) -> RowTask:
        llm_attr = asking(self._task.llm_attr, provider)
        if llm_attr is None:
            raise LookupError("the object no longer asks a provider")
        return replace(self._task, llm_attr=llm_attr)

    def _block(self, steps: Sequence[int]) -> list[_Drafted]:
        """The first of these rows, as many as are answered together."""
        task = self._task_of(self._notes)
        found: list[_Drafted] = []
        questions = characters = 0
        for step in steps:
            self._notes.questions = {}
            before = _random_state()
            noted: dict[Question, int] | None
            try:
                with _quiet, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # they come again with the answers
                    loop_row(task, step)
                noted = self._notes.questions
            # It looks at scores, perhaps; and where it fails, it will do so again.
            except Exception:  # noqa: BLE001
                noted = None
            found.append(_Drafted(step, before, noted))
            if noted is None:
                break
            questions += len(noted)
            characters += sum(len(prompt) + len(target) for prompt, target in noted)
            many = questions >= _QUESTIONS_PER_REQUEST * self._width
            if characters >= _CHARACTERS or (many and not self._share):
                break
        return found

    def _answered(self, block: Sequence[_Drafted]) -> Iterator[Row]:
        task = self._task_of(self._known)
        asked: dict[Question, int] = {}
        for row in block:
            asked.update(row.questions or {})
        plan = _plan(asked, self._tokenizer) if self._share else _plain(asked)
        longest: dict[Question, int] = {}
        for part in plan.values():
            longest[part.request] = max(longest.get(part.request, 0), part.start)
        missing = {
            request: count
            for request, count in longest.items()
            if len(self._kept.get(self._key(request), ())) < count
        }
        requests = dict.fromkeys(
            plan[question].request
            for row in block
            for question in row.questions or ()
            if plan[question].request in missing
        )
        # As in the loop, an interrupt finds the generators as the last row left them.
        _set_random_state(block[0].before)
        bar = tqdm(
            desc="requests",
            total=len(requests),
            leave=False,
            disable=not self._task.show_progress,
        )
        answers = _side_by_side(list(requests), self._ask, self._width, self._keep)
        try:
            for row in block:
                needed = {plan[question].request for question in row.questions or ()}
                needed &= missing.keys()
                while needed:
                    answered = next(answers)
                    bar.update()
                    del missing[answered]
                    needed.discard(answered)
                self._known.answers = {
                    question: plan[question].of(
                        self._kept[self._key(plan[question].request)]
                    )
                    for question in row.questions or ()
                }
                _set_random_state(row.before)
                found = loop_row(task, row.step)
                yield found
        finally:
            answers.close()
            bar.close()
        for request in longest:
            self._kept.pop(self._key(request), None)

    def _ask(self, request: Question) -> list[float]:
        prompt, target = request
        count = len(self._tokenizer.encode(target, add_special_tokens=False))
        given = self._provider.get_logprobs(
            input_prompt=prompt, target_str=target, tokenizer=self._tokenizer
        )
        return checked_scores(given, count, prompt, target)

    def _keep(self, request: Question, answer: list[float]) -> None:
        key = self._key(request)
        # Two requests may be cuts of one text: the longer target has all scores.
        if len(answer) >= len(self._kept.get(key, ())):
            self._kept[key] = answer

    def _key(self, request: Question) -> Any:
        return "".join(request) if self._share else request


def _plain(asked: dict[Question, int]) -> dict[Question, _Slice]:
    """Each question is a request."""
    return {question: _Slice(question, count, 0) for question, count in asked.items()}


def _plan(asked: dict[Question, int], tokenizer: Any) -> dict[Question, _Slice]:
    """Requests that answer all questions: those of the longest texts.

    A text is answered by a longer one that begins with it, if its tokens are the first
    ones of the longer text's, too.
    """
    plan = _plain(asked)
    of_text: dict[str, list[Question]] = {}
    for question in asked:
        of_text.setdefault("".join(question), []).append(question)
    groups: dict[str, list[tuple[Question, int]]] = {}
    host = ""
    host_ids: list[int] = []
    # Whatever begins with a text stands right after it.
    for text in sorted(of_text, reverse=True):
        ids = list(tokenizer.encode(text))
        if not (host.startswith(text) and host_ids[: len(ids)] == ids):
            host, host_ids = text, ids
        members = groups.setdefault(host, [])
        members.extend(
            (question, len(host_ids) - len(ids)) for question in of_text[text]
        )
    for text, members in groups.items():
        if len(members) == 1:
            continue
        first = min(members, key=lambda member: len(member[0][0]))[0]
        request = first[0], text[len(first[0]) :]
        # As many scores as a provider gives for this target.
        given = len(tokenizer.encode(request[1], add_special_tokens=False))
        for question, behind in members:
            part = _Slice(request, behind + asked[question], behind)
            if part.start <= given:
                plan[question] = part
    return plan


def _side_by_side(
    requests: Sequence[Question],
    ask: Callable[[Question], list[float]],
    width: int,
    keep: Callable[[Question, list[float]], None],
) -> Generator[Question, None, None]:
    """Requests as they are answered; some at once, no more when one fails.

    Raises:
        Exception: what the first request that failed raised.
    """
    waiting: queue.SimpleQueue[Question] = queue.SimpleQueue()
    for request in requests:
        waiting.put(request)
    answered: queue.SimpleQueue[tuple[Question, Any, BaseException | None]]
    answered = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        stopped.set(stop)
        while not stop.is_set():
            try:
                request = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answered.put((request, ask(request), None))
            except BaseException as error:  # noqa: BLE001  # raised where it is awaited
                answered.put((request, None, error))
                stop.set()

    try:
        for _ in range(min(width, len(requests))):
            threading.Thread(target=work, daemon=True).start()
        for _ in requests:
            request, answer, error = _next_of(answered)
            if error is not None:
                raise error
            keep(request, answer)
            yield request
    finally:
        stop.set()
        while not answered.empty():
            request, answer, error = answered.get()
            if error is None:
                keep(request, answer)


def _next_of(answered: queue.SimpleQueue[Any]) -> Any:
    while True:
        with suppress(queue.Empty):
            return answered.get(timeout=_LOOK)


def _random_state() -> Any:
    of_numpy = np.random.get_state()  # noqa: NPY002  # some of Captum's draw there
    return torch.get_rng_state(), of_numpy, random.getstate()


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])
