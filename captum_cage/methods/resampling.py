"""Counterfactual resampling: what a generated sentence does to the final answer."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import InterpretableInput
from torch import Tensor
from tqdm import tqdm

from captum_cage._checks import complaint, shown, whole_number
from captum_cage._model import text_config
from captum_cage._placement import entry_device
from captum_cage._restored import evaluated
from captum_cage.inputs import Prompt, target_ids, token_ids
from captum_cage.task import generated_units
from captum_cage.text import decode, special_ids
from captum_cage.units import Segments, split_units

__all__ = ["CounterfactualResampling", "ResampledStep", "ResamplingResult", "Sample"]

Answer: TypeAlias = Hashable
"""What a continuation was asked for."""

_FORMAT = "captum_cage resampling 1"
# Arguments of ``generate`` that are no choice of the user's.
_OURS = {"input_ids", "inputs", "attention_mask", "num_return_sequences"}


@dataclass(frozen=True)
class Sample:
    """A continuation that the model wrote.

    Attributes:
        ids (tuple[int, ...]): its token ids, up to the first end of text.
        first (str): its first unit.
        answer: the answer of the whole text; None if it has none.
    """

    ids: tuple[int, ...]
    first: str
    answer: Answer


@dataclass(frozen=True)
class ResampledStep:
    """One generated unit, and the answers with it and without it.

    Attributes:
        text (str): the unit.
        start (int): its first generated token.
        stop (int): the token after its last.
        resampling (float): ``KL(resampled || kept)``, in nats; NaN if one of them has
            no answer.
        counterfactual (float): ``KL(different || kept or same)``: the same for the
            resamples whose first unit differs from the original one.
        resampled (tuple[Sample, ...]): continuations from just before it.
        kept (tuple[Sample, ...]): continuations from just after it.
        differs (tuple[bool, ...]): which resamples begin with another unit.
    """

    text: str
    start: int
    stop: int
    resampling: float
    counterfactual: float
    resampled: tuple[Sample, ...]
    kept: tuple[Sample, ...]
    differs: tuple[bool, ...]

    @property
    def answers(self) -> dict[str, Counter[Answer]]:
        """How often each answer came, resampled, different and kept."""
        pairs = zip(self.resampled, self.differs, strict=True)
        return {
            "resampled": Counter(sample.answer for sample in self.resampled),
            "different": Counter(sample.answer for sample, other in pairs if other),
            "kept": Counter(sample.answer for sample in self.kept),
        }


@dataclass(frozen=True)
class ResamplingResult:
    """Which generated units an answer hangs on.

    Attributes:
        steps (tuple[ResampledStep, ...]): the units, in reading order.
        answer: the answer of the original text; None if it has none.
        base_rate (float): share of the answers from the prompt alone that are the
            original one; NaN if there is no answer.
    """

    steps: tuple[ResampledStep, ...]
    answer: Answer
    base_rate: float

    @property
    def resampling(self) -> npt.NDArray[np.float64]:
        """Resampling importance of each unit, shape ``(steps,)``."""
        return np.array([step.resampling for step in self.steps])

    @property
    def counterfactual(self) -> npt.NDArray[np.float64]:
        """Counterfactual importance of each unit, shape ``(steps,)``."""
        return np.array([step.counterfactual for step in self.steps])

    def to_dict(self) -> dict[str, Any]:
        """All numbers and answers, in the types of JSON; NaN is None."""
        return {
            "answer": _plain(self.answer),
            "base_rate": _number(self.base_rate),
            "steps": [
                {
                    "text": step.text,
                    "start": step.start,
                    "stop": step.stop,
                    "resampling": _number(step.resampling),
                    "counterfactual": _number(step.counterfactual),
                    "differ": sum(step.differs),
                    "answers": {
                        name: [[_plain(a), n] for a, n in counts.most_common()]
                        for name, counts in step.answers.items()
                    },
                    "resampled": [_listed(sample) for sample in step.resampled],
                    "kept": [_listed(sample) for sample in step.kept],
                }
                for step in self.steps
            ],
        }


def _plain(answer: Answer) -> Any:
    return answer if isinstance(answer, str | int | float | None) else repr(answer)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _listed(sample: Sample) -> dict[str, Any]:
    answer = _plain(sample.answer)
    return {"ids": list(sample.ids), "first": sample.first, "answer": answer}


def _alike(one: str, other: str) -> bool:
    """Whether two texts are equal but for white space."""
    return one.split() == other.split()


class CounterfactualResampling:
    r"""How the distribution of answers changes when a generated unit is written anew.

    The model continues the text from just before each unit and from just after it,
    ``samples`` times each. With ``A'`` the answers from before and ``A`` those from
    after, the resampling importance of the unit is ``KL(A' || A)``. Its counterfactual
    importance counts in ``A'`` only resamples that begin with another unit; those that
    begin with the same one count in ``A``. Texts without an answer are left out.
    Probabilities are ``(count + smoothing) / (total + smoothing * answers)`` over the
    answers that occur in either.

    What stands after one unit is what stands before the next, so ``n`` units take
    ``(n + 1) * samples`` continuations. Each batch of them has a seed of its own, made
    from ``seed`` and its place: an interrupted call that is repeated gives what it
    would have given.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        answer (str or re.Pattern or Callable): what the answer of a generated text is:
            a regular expression, whose last match counts (its first group if it has
            one), or a function from the text to anything hashable, None for no answer.
        samples (int, optional): continuations from each place. Default: ``100``
        same (Callable, optional): function of two texts that says whether a unit is
            the same as the original one. Default: equal but for white space
        smoothing (float, optional): what is added to each answer's count, more than 0.
            Default: ``1.0``
        batch_size (int, optional): continuations that are sampled together; another
            size gives other samples. Default: ``10``
        seed (int, optional): of all samples. Default: ``0``

    Raises:
        TypeError: if the model cannot generate, or an argument is of the wrong kind.
        ValueError: if a number is out of range, or the pattern is none.

    Source: Bogdan et al. (2025), :cite:p:`bogdan2025anchors`, section 3. There,
    resamples count as the same where the embeddings of two sentences are close.

    Example:
        >>> from captum.attr import TextTokenInput
        >>> from captum_cage.demo import load_demo, sample_problems
        >>> model, tokenizer = load_demo()
        >>> problem = sample_problems(1, seed=0)[0]
        >>> resampling = CounterfactualResampling(
        ...     model, tokenizer, answer=r"answer is (\d+)", samples=4
        ... )
        >>> inp = TextTokenInput(problem.prompt, tokenizer)
        >>> result = resampling.attribute(inp, problem.completion)
        >>> len(result.steps) == len(result.counterfactual)
        True
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        answer: str | re.Pattern[str] | Callable[[str], Answer],
        samples: int = 100,
        same: Callable[[str, str], bool] | None = None,
        smoothing: float = 1.0,
        batch_size: int = 10,
        seed: int = 0,
    ) -> None:
        if not callable(getattr(model, "generate", None)):
            raise TypeError(
                complaint(
                    "model",
                    "must generate text",
                    f"{type(model).__name__} came, which has no generate()",
                    "Pass a causal language model of transformers.",
                )
            )
        remedy = "Pass the number of continuations."
        self.samples = whole_number("samples", samples, minimum=1, remedy=remedy)
        self.batch_size = whole_number(
            "batch_size", batch_size, minimum=1, remedy=remedy
        )
        self.seed = whole_number("seed", seed, remedy="Pass 0 if in doubt.")
        if not (
            isinstance(smoothing, int | float)
            and not isinstance(smoothing, bool)
            and 0 < smoothing < math.inf
        ):
            raise ValueError(
                complaint(
                    "smoothing",
                    "must be a number above 0",
                    f"{shown(smoothing)} came",
                    "Pass 1.0 if in doubt.",
                )
            )
        self.model: Any = model
        self.tokenizer = tokenizer
        self.answer = _answer_function(answer)
        self.same = _alike if same is None else same
        self.smoothing = float(smoothing)
        self._kept: dict[str, dict[tuple[int, int], list[list[int]]]] = {}

    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Sequence[int] | Tensor,
        *,
        units: str | Segments = "sentence",
        gen_args: Mapping[str, Any] | None = None,
        resume: str | Path | None = None,
        show_progress: bool = False,
    ) -> ResamplingResult:
        """Importance of each unit of a generated text for its answer.

        An interrupted call is not lost: the same call on the same object goes on from
        the batches that were finished, and so does one with the same file.

        Args:
            inp (InterpretableInput): the prompt; any input that gives token ids or
                text.
            target (str or Sequence[int] or Tensor): the generated text or its ids.
            units (str or Callable, optional): ``"sentence"``, ``"word"``, ``"token"``,
                or a function from a text to character ranges. Default: ``"sentence"``
            gen_args (Mapping, optional): for the model's ``generate``, such as
                ``temperature``; it always samples. Unless they say how long a text may
                get, twice as long as the target. Default: ``None``
            resume (str or Path, optional): file in which finished batches are kept,
                one per line, and found again. Default: ``None``
            show_progress (bool, optional): show a progress bar on stderr.
                Default: ``False``

        Returns:
            ResamplingResult: importances, answers and samples of each unit that is no
            special token.

        Raises:
            TypeError: if an argument is of the wrong kind, or the input is more than
                ids.
            ValueError: if there is nothing to resample, the text does not fit the
                model, or the file belongs to something else.
        """
        granularity = _granularity(units)
        prompt = Prompt.read(inp, self.tokenizer)
        if not prompt.takes_ids_alone:
            raise TypeError(
                complaint(
                    "inp",
                    "CounterfactualResampling needs an input that gives token ids or "
                    "text alone",
                    f"{type(inp).__name__} came, which gives more than that",
                    "Use TextTokenInput, TokenIdsInput or ChatTokenInput.",
                )
            )
        generated = target_ids(target, self.tokenizer)
        arguments = self._generation(len(prompt.ids), len(generated), gen_args)
        spans = [
            (text, start, stop)
            for text, start, stop, special in self._units(
                prompt.ids, generated, granularity
            )
            if not special
        ]
        if not spans:
            raise ValueError(
                "target: must have a unit that is no special token, but all are. Pass "
                "the generated text."
            )
        places = sorted({place for _, *ends in spans for place in ends})
        continuations = self._continuations(
            prompt.ids, generated, places, arguments, resume, show_progress
        )
        samples = {
            place: tuple(
                self._sample(prompt.ids, generated[:place], ids, granularity)
                for ids in found
            )
            for place, found in continuations.items()
        }
        steps = [
            self._step(text, start, stop, samples[start], samples[stop])
            for text, start, stop in spans
        ]
        answer = self.answer(self._text(generated))
        given = [s.answer for s in samples[places[0]] if s.answer is not None]
        rate = given.count(answer) / len(given) if given else math.nan
        return ResamplingResult(tuple(steps), answer, rate)

    # --- texts -----------------------------------------------------------------------

    def _text(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens."""
        special = special_ids(self.tokenizer)
        return decode([i for i in ids if i not in special], self.tokenizer)

    def _units(
        self, before: Sequence[int], ids: Sequence[int], granularity: str | Segments
    ) -> list[tuple[str, int, int, bool]]:
        """Text, first token, token after the last of each unit; whether special."""
        _, found = generated_units(before, ids, granularity, self.tokenizer)
        spans = []
        for number, unit in enumerate(found.units):
            members = found.members(number)
            first, last = int(members[0]), int(members[-1])
            spans.append((unit.text, first, last + 1, unit.special))
        return spans

    def _sample(
        self,
        prompt: Sequence[int],
        prefix: Sequence[int],
        ids: Sequence[int],
        granularity: str | Segments,
    ) -> Sample:
        units = self._units([*prompt, *prefix], ids, granularity) if ids else []
        first = units[0][0] if units else ""
        return Sample(tuple(ids), first, self.answer(self._text([*prefix, *ids])))

    # --- samples ---------------------------------------------------------------------

    def _generation(
        self, prompt: int, generated: int, gen_args: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Arguments of the model's ``generate``."""
        arguments = {**(gen_args or {}), "do_sample": True}
        for name in _OURS & set(arguments):
            raise TypeError(
                f"gen_args: must not have {name!r}, which is set here. Leave it out."
            )
        longest = getattr(text_config(self.model), "max_position_embeddings", None)
        whole = prompt + generated
        if isinstance(longest, int) and whole >= longest:
            raise ValueError(
                complaint(
                    "target",
                    f"prompt and target must leave room in the model's context of "
                    f"{longest} tokens",
                    f"they have {whole}",
                    "Shorten them, or load a model with a longer context.",
                )
            )
        if not {"max_new_tokens", "max_length", "generation_config"} & set(arguments):
            room = longest - whole if isinstance(longest, int) else 2 * generated
            arguments["max_new_tokens"] = min(2 * generated, room)
        ends = self._ends(arguments)
        if ends and self._setting(arguments, "pad_token_id") is None:
            arguments["pad_token_id"] = ends[0]
        return arguments

    def _setting(self, arguments: Mapping[str, Any], name: str) -> Any:
        """What ``generate`` takes a setting from: its arguments, or a config."""
        config = arguments.get("generation_config")
        if config is None:
            config = getattr(self.model, "generation_config", None)
        return arguments.get(name, getattr(config, name, None))

    def _ends(self, arguments: Mapping[str, Any]) -> list[int]:
        """Ids that end a text."""
        ends = self._setting(arguments, "eos_token_id")
        if ends is None:
            return []
        return token_ids("eos_token_id", [ends] if isinstance(ends, int) else ends)

    def _continuations(
        self,
        prompt: Sequence[int],
        generated: list[int],
        places: list[int],
        arguments: dict[str, Any],
        resume: str | Path | None,
        show_progress: bool,
    ) -> dict[int, list[list[int]]]:
        """Continuations of the text from some places on."""
        header = self._header(prompt, generated, arguments)
        key = json.dumps(header, sort_keys=True)
        finished = self._kept.setdefault(key, {})
        file = None if resume is None else _Finished(Path(resume), header)
        if file is not None:
            finished.update(file.read())
        ends = self._ends(arguments)
        batches = [
            (place, number, min(self.batch_size, self.samples - first))
            for place in places
            for number, first in enumerate(range(0, self.samples, self.batch_size))
        ]
        found: dict[int, list[list[int]]] = {place: [] for place in places}
        bar = tqdm(batches, desc="resamples", disable=not show_progress, unit="batch")
        with evaluated(self.model):
            for place, number, count in bar:
                prefix = generated[:place]
                if prefix and prefix[-1] in ends:
                    found[place] += [[] for _ in range(count)]  # nothing can follow
                    continue
                drawn = finished.get((place, number), [])
                if len(drawn) != count:
                    drawn = self._drawn(
                        [*prompt, *prefix], (place, number), count, arguments, ends
                    )
                    finished[place, number] = drawn
                    if file is not None:
                        file.add(place, number, drawn)
                found[place] += drawn
        del self._kept[key]
        return found

    def _header(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What samples depend on, in the types of JSON."""
        config = getattr(self.model, "config", None)
        return {
            "format": _FORMAT,
            "model": [
                type(self.model).__name__,
                str(getattr(config, "name_or_path", "")),
            ],
            "prompt": _digest(prompt),
            "target": _digest(generated),
            "gen_args": {k: repr(v) for k, v in sorted(arguments.items())},
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def _drawn(
        self,
        ids: list[int],
        where: tuple[int, int],
        count: int,
        arguments: Mapping[str, Any],
        ends: list[int],
    ) -> list[list[int]]:
        """One batch of continuations, with the seed of its place."""
        digest = hashlib.sha256(repr((self.seed, *where)).encode()).digest()
        device = entry_device(self.model)
        inputs = torch.tensor([ids], device=device)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            output = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                num_return_sequences=count,
                **arguments,
            )
        sequences = output if isinstance(output, Tensor) else output.sequences
        return [_ended(row, ends) for row in sequences[:, len(ids) :].tolist()]

    # --- importance ------------------------------------------------------------------

    def _step(
        self,
        text: str,
        start: int,
        stop: int,
        resampled: tuple[Sample, ...],
        kept: tuple[Sample, ...],
    ) -> ResampledStep:
        differs = tuple(not self.same(text, sample.first) for sample in resampled)
        pairs = list(zip(resampled, differs, strict=True))
        other = [sample for sample, differ in pairs if differ]
        same = [sample for sample, differ in pairs if not differ]
        return ResampledStep(
            text=text,
            start=start,
            stop=stop,
            resampling=self._divergence(resampled, kept),
            counterfactual=self._divergence(other, [*kept, *same]),
            resampled=resampled,
            kept=kept,
            differs=differs,
        )

    def _divergence(self, one: Sequence[Sample], other: Sequence[Sample]) -> float:
        """``KL(one || other)`` of smoothed answers; NaN if there are none."""
        p, q = (
            Counter(s.answer for s in some if s.answer is not None)
            for some in (one, other)
        )
        if not p or not q:
            return math.nan
        answers = p.keys() | q.keys()
        more = self.smoothing
        totals = [counts.total() + more * len(answers) for counts in (p, q)]
        total = 0.0
        for answer in answers:
            here, there = (
                (counts[answer] + more) / whole
                for counts, whole in zip((p, q), totals, strict=True)
            )
            total += here * math.log(here / there)
        return max(0.0, total)


def _answer_function(answer: Any) -> Callable[[str], Answer]:
    """The answer of a text, from a pattern or a function."""
    if callable(answer):
        function: Callable[[str], Answer] = answer
        return function
    if not isinstance(answer, str | re.Pattern):
        raise TypeError(
            complaint(
                "answer",
                "must be a regular expression or a function of a text",
                f"{shown(answer)} came",
                r"Pass for example r'answer is (\d+)'.",
            )
        )
    try:
        pattern = re.compile(answer)
    except re.error as error:
        raise ValueError(
            complaint(
                "answer",
                "must be a regular expression",
                f"{answer!r} came ({error})",
                "Escape what is meant as it is, for example \\( for a bracket.",
            )
        ) from error

    def last_match(text: str) -> Answer:
        matches = list(pattern.finditer(text))
        if not matches:
            return None
        return matches[-1].group(1 if pattern.groups else 0)

    return last_match


def _granularity(units: Any) -> str | Segments:
    """The granularity, if it can be found in any text."""
    if not isinstance(units, str) and not callable(units):
        raise TypeError(
            complaint(
                "units",
                "must be a name or a function, as resampled texts are split, too",
                f"{shown(units)} came",
                "Pass 'sentence', 'word', 'token' or a function from a text to ranges.",
            )
        )
    checked: str | Segments = split_units(units)["generated"]
    return checked


def _digest(ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()


def _ended(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Ids up to the first that ends a text."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


class _Finished:
    """A file with finished batches, one per line, after a line that says of what.

    Args:
        path (Path): the file; made if there is none.
        header (dict): what the batches depend on.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        self._header = header

    def read(self) -> dict[tuple[int, int], list[list[int]]]:
        """Batches by place and number. A last line that was cut off is taken out.

        Raises:
            ValueError: if the file is none of ours, or belongs to something else.
        """
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        lines = text.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if not whole:
            start = json.dumps(self._header)[: len(text)]
            if text != start:
                raise self._foreign("has no line of it")
            self._path.write_text(json.dumps(self._header) + "\n", encoding="utf-8")
            return {}
        records = [self._parsed(line) for line in whole]
        self._check(records[0])
        if len(whole) < len(lines):
            with self._path.open("r+b") as file:
                file.truncate(len("".join(whole).encode()))
        return dict(map(self._batch, records[1:]))

    def _batch(
        self, record: Mapping[str, Any]
    ) -> tuple[tuple[int, int], list[list[int]]]:
        try:
            return (record["place"], record["batch"]), record["ids"]
        except KeyError as error:
            raise self._foreign(f"has a line without {error}") from error

    def _parsed(self, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise self._foreign(f"has a line that is no JSON: {line[:40]!r}") from error
        if not isinstance(record, dict):
            raise self._foreign(f"has the line {line[:40]!r}")
        return record

    def _check(self, header: Mapping[str, Any]) -> None:
        if header.get("format") != _FORMAT:
            raise self._foreign("begins otherwise")
        for name, value in self._header.items():
            if header.get(name) != value:
                raise ValueError(
                    complaint(
                        "resume",
                        "must name a file of the same model, prompt, target and "
                        "settings, or none yet",
                        f"{str(self._path)!r} came, whose {name} is another",
                        "Name another file, or delete it.",
                    )
                )

    def _foreign(self, why: str) -> ValueError:
        return ValueError(
            complaint(
                "resume",
                "must name a file that CounterfactualResampling wrote, or none yet",
                f"{str(self._path)!r} came, which {why}",
                "Name another file.",
            )
        )

    def add(self, place: int, number: int, ids: list[list[int]]) -> None:
        """Write a batch."""
        record = {"place": place, "batch": number, "ids": ids}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
