"""What a model writes when some of the sources are taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList

from captum_cage._captum import family
from captum_cage._checks import complaint, shown, whole_number
from captum_cage.causal import close_enough
from captum_cage.engines.memory import OutOfMemory, half, memory_errors
from captum_cage.inputs import text_before
from captum_cage.methods.suppression import hidden_tokens
from captum_cage.metrics.removal import ChangedText, Remover
from captum_cage.scoring import context_length, continued_ids, held
from captum_cage.text import special_ids

__all__ = ["Regenerator", "Sampling", "Written"]

# Sequences that are written at once, unless the user says how many.
_TOGETHER = {"cpu": 128, "cuda": 512}
_SPARE = 16  # tokens that a new turn may have beyond twice those of the old one
# What would make the texts depend on each other, or on more than seed and sample.
_REFUSED = (
    *("do_sample", "num_beams", "num_return_sequences", "temperature", "top_k"),
    *("top_p", "return_dict_in_generate", "seed"),
)
# Texts that end by these go on in a batch until all have ended.
_ALONE = ("stop_strings", "stopping_criteria")

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Sampling:
    """How texts are written again.

    Attributes:
        samples (int or None): how many for each set of sources; None for one, greedily.
        seed (int): of the first sample.
        temperature (float): of sampling.
    """

    samples: int | None = None
    seed: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        remedy = "Pass the number of samples, or None for one that is greedy."
        if self.samples is not None:
            whole_number("samples", self.samples, minimum=1, remedy=remedy)
        whole_number("seed", self.seed, remedy="Pass a whole number.")
        is_number = isinstance(self.temperature, int | float)
        is_number = is_number and not isinstance(self.temperature, bool)
        if not is_number or not 0.0 < self.temperature < float("inf"):
            raise ValueError(
                complaint(
                    "temperature",
                    "must be a finite number above zero",
                    f"{shown(self.temperature)} came",
                    "Leave samples=None for greedy decoding.",
                )
            )

    @property
    def count(self) -> int:
        """Number of texts for each set of sources."""
        return 1 if self.samples is None else self.samples


class _Noise(LogitsProcessor):
    """Gumbel noise on logits, with which the largest one is a sample.

    Each sample has a stream of its own: what it becomes depends neither on the other
    texts of a batch nor on their number. Texts of one sample and other sources share
    the noise, so that they differ by what was taken away.

    Source: Maddison, Tarlow and Minka (2014), A* sampling, :cite:p:`maddison2014astar`.
    """

    def __init__(self, samples: Sequence[int], turn: int, sampling: Sampling) -> None:
        self._samples = sorted(set(samples))
        self._row = torch.tensor([self._samples.index(one) for one in samples])
        self._temperature = sampling.temperature
        self._streams = []
        for sample in self._samples:
            stream = torch.Generator().manual_seed(_seed(sampling, sample, turn))
            self._streams.append(stream)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        size = scores.shape[1]
        drawn = torch.stack(
            [
                torch.rand(size, generator=stream, dtype=torch.float64)
                for stream in self._streams
            ]
        )
        noise = -torch.log(-torch.log(drawn.clamp(1e-300, 1 - 1e-16)))
        rows = noise[self._row].to(scores.device)
        noisy: Tensor = scores.double() / self._temperature + rows
        return noisy


def _seed(sampling: Sampling, sample: int, turn: int) -> int:
    entropy = np.random.SeedSequence([sampling.seed, sample, turn])
    return int(entropy.generate_state(1, np.uint64)[0]) >> 1


class Written(NamedTuple):
    """A turn that was written again, and what stood before it.

    Attributes:
        before (tuple[int, ...]): ids before the turn; of a prompt that is more than
            tokens, those after it.
        hidden (tuple[bool, ...]): which of them those outside do not attend to.
        turn (tuple[int, ...]): ids of the turn.
        model_input (Any): the prompt, where it is more than tokens; None elsewhere.
    """

    before: tuple[int, ...]
    hidden: tuple[bool, ...]
    turn: tuple[int, ...]
    model_input: Any


@dataclass
class _Draft:
    """A text that is being written."""

    number: int
    sample: int
    changed: ChangedText
    ids: list[int]
    hidden: list[bool]
    turn: list[int]

    def written(self) -> Written:
        """What came of it."""
        stop = len(self.ids) - len(self.turn)
        return Written(
            tuple(self.ids[:stop]),
            tuple(self.hidden[:stop]),
            tuple(self.turn),
            self.changed.model_input,
        )


class Regenerator:
    """Writes the generated turns again, with some sources taken away.

    Turns are written in order, each after what stands before it by then; text from
    outside between them stays. The last one is the turn that holds the explained units.
    Texts are written together: shorter ones filled up at their beginnings where the
    model is seen to go on alike then, and otherwise those of the same length. What was
    written is kept, so that asking for the same sources again costs nothing.

    Args:
        remover (Remover): takes sources away.
        last (int): the turn's last token that is asked for, in the whole text.
        sampling (Sampling): greedily, or several samples.
        gen_args (Mapping, optional): for the model's ``generate``. Default: twice as
            many new tokens as the turn had, and 16.
        batch_size (int, optional): most texts that are written at once.
        show_progress (bool, optional): show a progress bar. Default: ``False``

    Raises:
        TypeError: if the model cannot generate.
        ValueError: if ``gen_args`` would take the sampling from us.
    """

    def __init__(
        self,
        remover: Remover,
        last: int,
        sampling: Sampling,
        gen_args: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> None:
        self._remover = remover
        self._task = remover.task
        self._llm_attr = remover.task.llm_attr
        self._sampling = sampling
        self._gen_args: dict[str, Any] = {}
        self._show = show_progress
        self._remote = family(self._llm_attr) == "remote"
        device = torch.device(getattr(self._llm_attr, "device", None) or "cpu")
        kind = device.type if device.type in _TOGETHER else "cuda"
        self._check(gen_args)
        self._most = batch_size or _TOGETHER[kind]
        if any(name in self._gen_args for name in _ALONE):
            self._most = 1
        self._device = device
        self._kept: dict[bytes, tuple[Written, ...]] = {}
        self.sequences = 0
        self._pads: bool | None = None  # not known yet
        written = remover.written
        edges = np.flatnonzero(np.diff(written, prepend=False, append=False))
        turns = edges.reshape(-1, 2)
        asked = int(np.searchsorted(turns[:, 0], last, side="right"))
        self._ids = [*self._task.prompt.ids, *self._task.generated][-len(written) :]
        self._own_ends = self._model_ends()
        self._special = special_ids(self._llm_attr.tokenizer)
        self._turns = [self._without_end(int(a), int(b)) for a, b in turns[:asked]]
        self._ends = [self._ends_of(stop) for _, stop in self._turns]

    def _check(self, given: Any) -> None:
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                complaint(
                    "gen_args",
                    "must be a mapping of arguments of the model's generate",
                    f"{shown(given)} came",
                    'Pass {"max_new_tokens": 200}, for example.',
                )
            )
        # Captum's own default asks for what is done anyway.
        self._gen_args = {
            name: value
            for name, value in dict(given or {}).items()
            if value is not None and not (name == "do_sample" and value is False)
        }
        if "max_new_tokens" in self._gen_args:
            whole_number(
                "gen_args['max_new_tokens']",
                self._gen_args["max_new_tokens"],
                minimum=1,
                remedy="Leave it out for twice the length of the text.",
            )
        refused = [name for name in _REFUSED if name in self._gen_args]
        if refused:
            raise ValueError(
                complaint(
                    "gen_args",
                    "must leave to the metric how tokens are drawn",
                    f"{', '.join(refused)} came",
                    "Pass samples=, seed= and temperature= instead.",
                )
            )
        asked = self._llm_attr.provider if self._remote else self._llm_attr.model
        if not callable(getattr(asked, "generate", None)):
            raise TypeError(
                complaint(
                    "evaluate",
                    "needs a model that can write the text again",
                    f"{type(asked).__name__} came, which has no generate()",
                    "Ask for metrics of given texts only, such as 'span: deletion'.",
                )
            )

    def _model_ends(self) -> set[int]:
        """Ids at which the model ends any turn."""
        model: Any = self._llm_attr.model
        own = self._gen_args.get("eos_token_id")
        if own is None:
            own = getattr(
                getattr(model, "generation_config", None), "eos_token_id", None
            )
        listed = own if isinstance(own, list | tuple) else [own]
        return {int(i) for i in listed if i is not None}

    def _without_end(self, start: int, stop: int) -> tuple[int, int]:
        """A turn without the marks that end it, which stay whatever is written."""
        marks = self._own_ends | self._special
        while stop > start and self._ids[stop - 1] in marks:
            stop -= 1
        return start, stop

    def _ends_of(self, stop: int) -> set[int]:
        """Ids at which a turn ends: the model's own, and the mark that came next."""
        return self._own_ends | (self._special & set(self._ids[stop : stop + 1]))

    def drafts(self, kept: Bools) -> list[tuple[Written, ...]]:
        """The turn that is asked for, by sample, for each set of sources.

        Args:
            kept (numpy.ndarray): which sources stay, shape ``(n, P)``, bool.
        """
        keys = [one.tobytes() for one in kept]
        new = {
            key: one
            for key, one in zip(keys, kept, strict=True)
            if key not in self._kept
        }
        changed = {key: self._remover.changed(one) for key, one in new.items()}
        with held(self._llm_attr):
            self._write(changed)
        return [self._kept[key] for key in keys]

    def _write(self, changed: Mapping[bytes, ChangedText]) -> None:
        """Write all samples of some texts, and keep each set that is done."""
        keys = list(changed)
        samples = range(self._sampling.count)
        # All samples of a text in one go, so that an interrupt loses few.
        size = max(1, self._most // len(samples))
        with tqdm(
            total=len(keys) * len(samples),
            disable=not self._show,
            desc="writing again",
            leave=False,
        ) as bar:
            order = sorted(keys, key=lambda key: len(changed[key].ids))
            for group in _batches(order, size):
                drafts = [
                    _Draft(number, sample, changed[key], [], [], [])
                    for number, key in enumerate(group)
                    for sample in samples
                ]
                self._finish(drafts)
                bar.update(len(drafts))
                for number, key in enumerate(group):
                    self._kept[key] = tuple(
                        draft.written() for draft in drafts if draft.number == number
                    )

    def _finish(self, drafts: Sequence[_Draft]) -> None:
        """Write all turns of some drafts."""
        done = 0  # of the whole text
        for number, (start, stop) in enumerate(self._turns):
            for draft in drafts:
                self._copy(draft, done, start)
            most = 2 * (stop - start) + _SPARE
            for together in self._together(drafts, most):
                self._continue(together, number, most)
            done = stop

    def _together(self, drafts: Sequence[_Draft], most: int) -> Iterator[list[_Draft]]:
        """Drafts that are written together: all, or those of the same length."""
        ordered = sorted(drafts, key=lambda draft: len(draft.ids))
        short, long = ordered[0], ordered[-1]
        room = (context_length(self._llm_attr.model) or 2**30) - len(long.ids)
        differs = len(short.ids) < len(long.ids)
        seen = not any(any(draft.hidden) for draft in drafts)
        if differs and seen and room >= self._gen_args.get("max_new_tokens", most):
            if self._pads is None:
                self._pads = self._padding_changes_nothing(short, long)
            if self._pads:
                yield ordered
                return
        for _, same in groupby(ordered, key=lambda draft: len(draft.ids)):
            yield list(same)

    def _padding_changes_nothing(self, short: _Draft, long: _Draft) -> bool:
        """Whether the model goes on alike behind a shorter text that is filled up."""
        if self._remote or short.changed.model_input is not None:
            return False
        model: Any = self._llm_attr.model
        arguments: dict[str, Any] = {
            **{"max_new_tokens": 3, "do_sample": False, "num_beams": 1},
            **{"output_logits": True, "return_dict_in_generate": True},
            "pad_token_id": self._fill(),
        }
        try:
            with memory_errors(), torch.no_grad():
                alone = model.generate(**self._padded([short]), **arguments)
                filled = model.generate(**self._padded([short, long]), **arguments)
        except OutOfMemory:
            return False
        dtype = next(model.parameters()).dtype
        pairs = zip(alone.logits, filled.logits, strict=False)
        return all(close_enough(one[0], two[0], dtype) for one, two in pairs)

    def _fill(self) -> int:
        config = getattr(self._llm_attr.model, "generation_config", None)
        found = getattr(config, "pad_token_id", None)
        return 0 if found is None else int(found)

    def _padded(self, drafts: Sequence[_Draft]) -> dict[str, Tensor]:
        """Texts filled up at their beginnings, as ids and a mask."""
        longest = max(len(draft.ids) for draft in drafts)
        ids = torch.full((len(drafts), longest), self._fill())
        mask = torch.zeros_like(ids)
        for row, draft in enumerate(drafts):
            ids[row, longest - len(draft.ids) :] = torch.tensor(draft.ids)
            mask[row, longest - len(draft.ids) :] = 1
        return {
            "input_ids": ids.to(self._device),
            "attention_mask": mask.to(self._device),
        }

    @staticmethod
    def _copy(draft: _Draft, start: int, stop: int) -> None:
        """Copy what stands in the changed text between two places of the whole one."""
        origin = draft.changed.origin
        first = (
            int(np.argmax(origin >= start)) if (origin >= start).any() else len(origin)
        )
        # Tokens written anew stand before the next one that is not.
        while first > 0 and origin[first - 1] < 0:
            first -= 1
        last = int(np.argmax(origin >= stop)) if (origin >= stop).any() else len(origin)
        draft.ids += draft.changed.ids[first:last]
        draft.hidden += draft.changed.hidden[first:last].tolist()

    def _continue(self, drafts: Sequence[_Draft], turn: int, most: int) -> None:
        """Write one turn of drafts that are written together."""
        queue = list(drafts)
        while queue:
            batch = queue[: self._most]
            try:
                with memory_errors(), torch.no_grad():
                    found = self._generated(batch, turn, most)
            except OutOfMemory as error:
                self._most = half(len(batch), error, self._device)
                continue
            queue = queue[len(batch) :]
            self.sequences += len(batch)
            for draft, ids in zip(batch, found, strict=True):
                cut = next(
                    (i for i, one in enumerate(ids) if one in self._ends[turn]),
                    len(ids),
                )
                draft.turn = ids[:cut]
                draft.ids += draft.turn
                draft.hidden += [False] * cut

    def _generated(
        self, drafts: Sequence[_Draft], turn: int, most: int
    ) -> list[list[int]]:
        arguments: dict[str, Any] = {"max_new_tokens": most, **self._gen_args}
        if self._remote:
            return [self._from_afar(draft, turn, arguments) for draft in drafts]
        model: Any = self._llm_attr.model
        longest = max(len(draft.ids) for draft in drafts)
        room = (context_length(model) or 2**30) - longest
        if drafts[0].changed.model_input is None:
            if room < 1:
                raise ValueError(
                    complaint(
                        "evaluate",
                        "the text must leave room for another turn in the model's "
                        "context",
                        f"it has {longest} tokens",
                        "Explain a shorter text.",
                    )
                )
            arguments["max_new_tokens"] = min(arguments["max_new_tokens"], room)
        arguments |= {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
        ends = sorted(self._ends[turn])
        if ends:
            arguments["eos_token_id"] = ends
            config = getattr(model, "generation_config", None)
            if getattr(config, "pad_token_id", None) is None:
                arguments.setdefault("pad_token_id", ends[0])
        processors = LogitsProcessorList(arguments.pop("logits_processor", []))
        if self._sampling.samples is not None:
            processors.append(
                _Noise([draft.sample for draft in drafts], turn, self._sampling)
            )
        arguments["logits_processor"] = processors
        if drafts[0].changed.model_input is not None:
            found = []
            for draft in drafts:  # the noise of each starts anew
                if self._sampling.samples is not None:
                    processors[-1] = _Noise([draft.sample], turn, self._sampling)
                found.append(
                    continued_ids(
                        self._llm_attr, draft.changed.model_input, draft.ids, arguments
                    )
                )
            return found
        with ExitStack() as stack:
            if any(any(draft.hidden) for draft in drafts):
                # Then all are of the same length.
                hidden = torch.tensor([draft.hidden for draft in drafts])
                stack.enter_context(_hidden_while_writing(model, hidden))
            output = model.generate(**self._padded(drafts), **arguments)
        sequences = output if isinstance(output, Tensor) else output.sequences
        rows: list[list[int]] = sequences[:, longest:].tolist()
        return rows

    def _from_afar(
        self, draft: _Draft, turn: int, arguments: Mapping[str, Any]
    ) -> list[int]:
        tokenizer, sampling = self._llm_attr.tokenizer, self._sampling
        # Servers sample unless told otherwise.
        drawn: dict[str, Any] = {"do_sample": False, "temperature": 0.0}
        if sampling.samples is not None:
            drawn = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "seed": _seed(sampling, draft.sample, turn),
            }
        given = draft.changed.model_input
        if given is None:
            given = torch.tensor([draft.ids])
            later: Sequence[int] = ()
        else:
            later = draft.ids
        text = text_before(given, self._task.prompt, later, [], tokenizer)
        answer = self._llm_attr.provider.generate(text, **arguments, **drawn)
        found: list[int] = tokenizer.encode(answer, add_special_tokens=False)
        return found


@contextmanager
def _hidden_while_writing(model: Any, hidden: Tensor) -> Iterator[None]:
    """Some tokens hidden from the attention of all others, while a text grows."""
    length = [0]

    def counted(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        ids = args[0] if ids is None else ids
        cache = kwargs.get("past_key_values")
        before = 0 if cache is None else int(cache.get_seq_length())
        length[0] = before + ids.shape[1]

    current: Callable[[], int] = lambda: length[0]  # noqa: E731
    handle = model.register_forward_pre_hook(counted, with_kwargs=True)
    try:
        with hidden_tokens(model, hidden, current):
            yield
    finally:
        handle.remove()


def _batches(items: Sequence[bytes], size: int) -> Iterator[list[bytes]]:
    queue = iter(items)
    while group := list(islice(queue, size)):
        yield group
