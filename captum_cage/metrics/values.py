"""What is left of an explained statement when some of the sources are taken away."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from captum_cage._captum import family
from captum_cage._checks import complaint
from captum_cage.causal import CausalModel
from captum_cage.engines.memory import OutOfMemory, half, memory_errors
from captum_cage.inputs import text_before
from captum_cage.methods.suppression import hidden_tokens
from captum_cage.metrics.regeneration import Regenerator, Written
from captum_cage.metrics.removal import ChangedText, Remover
from captum_cage.metrics.statement import Statement, whole
from captum_cage.scoring import context_length, held, scores_after
from captum_cage.text import decode, read_tokens, sentence_spans, special_ids

__all__ = [
    "SHOWS",
    "FixedText",
    "Passes",
    "Probability",
    "Regenerated",
    "Scored",
    "TextScorer",
    "Value",
]

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Tokens in one pass from which a larger batch is no faster.
_ENOUGH_TOKENS = {"cpu": 2048, "cuda": 65536}


SHOWS: dict[str, str] = {
    "regenerated": (
        "the total effect: the text is written again without the sources, so steps "
        "that depended on them change, too"
    ),
    "probability": (
        "the total effect on the explained words: how likely they are after steps that "
        "were written again without the sources"
    ),
    "span": (
        "the direct effect on the explained text alone: steps before it stay as they "
        "were written, so an answer copied from a step does not change"
    ),
    "response": (
        "the direct effects on all that was written, whatever is explained: it prefers "
        "the sources of the whole response to those of the explained text"
    ),
}


class Value:
    """A number for every set of sources that stay, asked for once each.

    Args:
        name (str): what tables call it.

    Attributes:
        name (str): what tables call it.
        shows (str): what it can show, and what not.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.shows = SHOWS[name]
        self._known: dict[bytes, Array] = {}

    def __call__(self, kept: Bools) -> Array:
        """Mean over the samples for each set, shape ``(n,)``.

        Args:
            kept (numpy.ndarray): which sources stay, shape ``(n, P)``, bool.
        """
        found: Array = self.samples(kept).mean(axis=1)
        return found

    def samples(self, kept: Bools) -> Array:
        """Value of each sample, shape ``(n, samples)``."""
        keys = [one.tobytes() for one in kept]
        missing = {
            key: one
            for key, one in zip(keys, kept, strict=True)
            if key not in self._known
        }
        if missing:
            found = self._values(np.stack(list(missing.values())))
            self._known.update(zip(missing, found, strict=True))
        return np.stack([self._known[key] for key in keys])

    @abstractmethod
    def _values(self, kept: Bools) -> Array:
        """Values of new sets, shape ``(n, samples)``."""


class Regenerated(Value):
    """Share of the texts written again that still come to the statement."""

    def __init__(
        self, regenerator: Regenerator, statement: Statement, tokenizer: Any
    ) -> None:
        super().__init__("regenerated")
        self._regenerator = regenerator
        self._statement = statement
        self._tokenizer = tokenizer

    def _values(self, kept: Bools) -> Array:
        return np.array(
            [
                [self._statement(decode(one.turn, self._tokenizer)) for one in drafts]
                for drafts in self._regenerator.drafts(kept)
            ]
        )


class Probability(Value):
    """Probability of the explained text after what was written again before it.

    Of each text written again, what stands before the explained text is kept: up to
    where that text occurs, or else as many sentences as stood before it, and no more
    than the model's context has room for. The last explained stretch is scored.

    Args:
        regenerator (Regenerator): writes texts.
        passes (Passes): scores them.
        before (str): what stood before the explained stretch in its turn.
        target (Sequence[int]): ids of the stretch.
        llm_attr: the wrapped object.
    """

    def __init__(
        self,
        regenerator: Regenerator,
        passes: Passes,
        before: str,
        target: Sequence[int],
        llm_attr: Any,
    ) -> None:
        super().__init__("probability")
        self._regenerator = regenerator
        self._passes = passes
        self._target = list(target)
        self._sentences = len(sentence_spans(before))
        self._llm_attr = llm_attr
        special = special_ids(llm_attr.tokenizer)
        words = [token for token in target if token not in special]
        self._text = decode(words, llm_attr.tokenizer).strip()

    def _values(self, kept: Bools) -> Array:
        texts = self._regenerator.drafts(kept)
        flat = [draft for drafts in texts for draft in drafts]
        if flat[0].model_input is None:
            scores = self._passes.scores([self._scored(draft) for draft in flat])
        else:
            with held(self._llm_attr):
                scores = [self._after(draft) for draft in flat]
        logs = np.array([one.sum() for one in scores])
        found: Array = np.exp(logs).reshape(len(texts), -1)
        return found

    def _cut(self, turn: Sequence[int]) -> int:
        """Number of tokens of a turn that stay before the explained text."""
        text = read_tokens(list(turn), self._llm_attr.tokenizer)
        found = list(whole(self._text).finditer(text.text)) if self._text else []
        if found:
            place = found[-1].start()
        else:
            ends = [stop for _, stop in sentence_spans(text.text)[: self._sentences]]
            place = ends[-1] if ends else 0
        # White space before the text belongs to its first token.
        place = len(text.text[:place].rstrip())
        return sum(1 for _, stop in text.offsets if stop <= place)

    def _before(self, draft: Written) -> list[int]:
        """Tokens that stay before the explained text."""
        count = self._cut(draft.turn)
        context = context_length(self._llm_attr.model)
        if context is not None:
            room = context - len(draft.before) - len(self._target)
            count = max(min(count, room), 0)
        return [*draft.before, *draft.turn[:count]]

    def _scored(self, draft: Written) -> Scored:
        ids = self._before(draft)
        places = np.arange(len(ids), len(ids) + len(self._target))
        ids += self._target
        hidden = np.zeros(len(ids), dtype=bool)
        hidden[: len(draft.hidden)] = draft.hidden
        return Scored(ids, hidden, places)

    def _after(self, draft: Written) -> Array:
        later = self._before(draft)
        ids = [*later, *self._target]
        return scores_after(self._llm_attr, draft.model_input, ids)[len(later) :]


class FixedText(Value):
    """Log-probability of some generated tokens, the generated text as it was."""

    def __init__(
        self, name: str, scorer: TextScorer, remover: Remover, tokens: Sequence[int]
    ) -> None:
        super().__init__(name)
        self._scorer = scorer
        self._remover = remover
        self._tokens = np.asarray(tokens)

    def _values(self, kept: Bools) -> Array:
        scores = self._scorer.scores(kept)
        found: Array = scores[:, self._tokens].sum(axis=1, keepdims=True)
        return found


class Scored(NamedTuple):
    """A text, and which of its tokens are scored.

    Attributes:
        ids (Sequence[int]): the text.
        hidden (Sequence[bool] or numpy.ndarray): which tokens those outside them do
            not attend to.
        places (numpy.ndarray): positions of the scored tokens, ascending, from 1.
    """

    ids: Sequence[int]
    hidden: Any
    places: npt.NDArray[np.int64]


class Passes:
    """Log-probabilities of tokens of many texts, by passes over batches of them.

    Args:
        llm_attr: the wrapped object.
        batch_size (int, optional): most texts in one pass. Default: by their length

    Attributes:
        sequences (int): number of texts that the model was given.
    """

    def __init__(self, llm_attr: Any, batch_size: int | None = None) -> None:
        self._llm_attr = llm_attr
        self._most = batch_size
        self._chosen = batch_size is not None
        self.sequences = 0

    def scores(self, texts: Sequence[Scored]) -> list[Array]:
        """Score of each token that is asked for, of each text, float64."""
        found = dict(self.finished(texts))
        return [found[number] for number in range(len(texts))]

    def finished(self, texts: Sequence[Scored]) -> Iterator[tuple[int, Array]]:
        """The same as it comes, not in order, each with the number of its text.

        Raises:
            ValueError: if a text is longer than the model's context.
        """
        model = CausalModel(self._llm_attr.model, self._llm_attr.device)
        room = context_length(self._llm_attr.model)
        longest = max((len(text.ids) for text in texts), default=0)
        if room is not None and longest > room:
            raise ValueError(
                complaint(
                    "evaluate",
                    f"a text that is scored must fit the model's context of {room} "
                    "tokens",
                    f"what was written again and the explained text are {longest}",
                    "Pass a smaller max_new_tokens in gen_args.",
                )
            )
        # The longest first, to which the others in its batch are filled up.
        queue = sorted(range(len(texts)), key=lambda number: -len(texts[number].ids))
        while queue:
            batch = queue[: self._batch_size(len(texts[queue[0]].ids), model)]
            try:
                with held(self._llm_attr), torch.no_grad(), memory_errors():
                    scores = self._pass(model, [texts[one] for one in batch])
            except OutOfMemory as error:
                self._most = half(len(batch), error, model.device)
                continue
            queue = queue[len(batch) :]
            self.sequences += len(batch)
            yield from zip(batch, scores, strict=True)

    def _batch_size(self, length: int, model: CausalModel) -> int:
        if self._chosen and self._most is not None:
            return self._most
        kind = model.device.type
        enough = _ENOUGH_TOKENS.get(kind, _ENOUGH_TOKENS["cuda"]) // max(length, 1)
        return max(1, enough if self._most is None else min(enough, self._most))

    @staticmethod
    def _pass(model: CausalModel, texts: Sequence[Scored]) -> list[Array]:
        """Scores of a few texts; shorter ones are filled up at their ends."""
        longest = max(len(text.ids) for text in texts)
        ids = torch.zeros((len(texts), longest), dtype=torch.long)
        hidden = torch.zeros((len(texts), longest), dtype=torch.bool)
        rows, places = [], []
        for number, text in enumerate(texts):
            ids[number, : len(text.ids)] = torch.tensor(list(text.ids))
            hidden[number, : len(text.ids)] = torch.tensor(np.asarray(text.hidden))
            places.append(torch.as_tensor(text.places))
            rows.append(torch.full_like(places[-1], number))
        row, place = torch.cat(rows), torch.cat(places)
        before = place - 1
        keep = torch.arange(int(before.min()), int(before.max()) + 1)
        inputs = {"input_ids": ids.to(model.device)}
        if hidden.any():
            with hidden_tokens(model.model, hidden):
                states = model.states(inputs, keep, direct=True)
        else:
            states = model.states(inputs, keep, direct=True)
        picked = states[row.to(states.device), (before - keep[0]).to(states.device)]
        found = model.log_probabilities(picked, ids[row, place]).clamp(max=0)
        sizes = [len(text.places) for text in texts]
        return [part.numpy() for part in found.cpu().split(sizes)]


class TextScorer:
    """Log-probability of every written token, sources taken away.

    Args:
        remover (Remover): takes sources away.
        passes (Passes): asks the model.
        show_progress (bool, optional): show a progress bar. Default: ``False``
    """

    def __init__(
        self, remover: Remover, passes: Passes, show_progress: bool = False
    ) -> None:
        self._remover = remover
        self._passes = passes
        self._show = show_progress
        self._llm_attr = remover.task.llm_attr
        self._generated = remover.task.generated
        self._written = np.flatnonzero(remover.written)
        self._known: dict[bytes, Array] = {}

    def scores(self, kept: Bools) -> Array:
        """Scores of the written tokens, shape ``(n, written tokens)``."""
        keys = [one.tobytes() for one in kept]
        new = {
            key: self._remover.changed(one)
            for key, one in zip(keys, kept, strict=True)
            if key not in self._known
        }
        with tqdm(
            total=len(new), disable=not self._show, desc="scoring", leave=False
        ) as bar:
            if not self._remover.by_token or family(self._llm_attr) == "remote":
                for key, text in new.items():
                    self._known[key] = self._alone(text)
                    self._passes.sequences += 1
                    bar.update()
            else:
                names = list(new)
                texts = [
                    Scored(text.ids, text.hidden, self._places(text))
                    for text in new.values()
                ]
                for number, scores in self._passes.finished(texts):
                    self._known[names[number]] = scores
                    bar.update()
        return np.stack([self._known[key] for key in keys])

    def _places(self, text: ChangedText) -> npt.NDArray[np.int64]:
        """Where the written tokens stand in a changed text."""
        return np.flatnonzero(np.isin(text.origin, self._written))

    def _alone(self, text: ChangedText) -> Array:
        """Scores by one request, or one pass over an input that is more than ids."""
        if family(self._llm_attr) != "remote":
            with held(self._llm_attr):
                return scores_after(self._llm_attr, text.model_input, self._generated)
        places, given = self._places(text), text.model_input
        first = int(places[0])
        if given is None:
            given = torch.tensor([text.ids[:first]])
        tokenizer, scored = self._llm_attr.tokenizer, text.ids[first:]
        before = text_before(given, self._remover.task.prompt, [], scored, tokenizer)
        found = self._llm_attr.provider.get_logprobs(
            input_prompt=before,
            target_str=decode(scored, tokenizer),
            tokenizer=tokenizer,
        )
        if len(found) != len(scored):
            raise ValueError(
                complaint(
                    "evaluate",
                    f"the provider must score {len(scored)} tokens",
                    f"{len(found)} scores came",
                    "Check that the provider's model uses this tokenizer.",
                )
            )
        return np.asarray(found, dtype=np.float64)[places - first]
