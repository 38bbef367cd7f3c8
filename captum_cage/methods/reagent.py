"""ReAGent: units give way to what a masked language model would write there."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from captum_cage._checks import complaint, shown, whole_number
from captum_cage._model import text_config
from captum_cage._restored import evaluated
from captum_cage.causal import CausalModel
from captum_cage.inputs import PrefixedInput, token_features
from captum_cage.methods.capability import Capability
from captum_cage.methods.method import UnitMethod
from captum_cage.text import decode

__all__ = [
    "MaskedModel",
    "OneShotReAGent",
    "ReAGent",
    "RefillMethod",
    "Stretch",
    "refilled",
]

# Tokens before a stretch that are decoded along with what is written there.
_CONTEXT = 8
# Positions that models of RoBERTa's kind count but do not read.
_UNREAD = 2
# A change of probability of one has no logit.
_LARGEST_CHANGE = 1.0 - 1e-6


@dataclass(frozen=True)
class Stretch:
    """Tokens side by side, and the ids that stand there instead.

    Attributes:
        start (int): position of the first token.
        stop (int): position after the last.
        ids (tuple[int, ...]): what stands there instead, of any number.
    """

    start: int
    stop: int
    ids: tuple[int, ...]


def refilled(ids: Sequence[int], stretches: Sequence[Stretch]) -> list[int]:
    """Ids with some stretches replaced.

    Example:
        >>> refilled([1, 2, 3, 4], [Stretch(1, 3, (7, 8, 9))])
        [1, 7, 8, 9, 4]
    """
    found: list[int] = []
    done = 0
    for stretch in sorted(stretches, key=lambda one: one.start):
        found += [*ids[done : stretch.start], *stretch.ids]
        done = stretch.stop
    return [*found, *ids[done:]]


class MaskedModel:
    """What a masked language model writes into gaps of a text.

    Args:
        model: a masked language model of transformers.
        tokenizer: its tokenizer.
        causal_tokenizer: the tokenizer of the ids that are replaced.

    Raises:
        TypeError: if it is no PyTorch model, or a tokenizer is missing.
        ValueError: if its tokenizer has no mask token.
    """

    def __init__(self, model: Any, tokenizer: Any, causal_tokenizer: Any) -> None:
        _check_masked(model, tokenizer, causal_tokenizer)
        self._model = model
        self._tokenizer = tokenizer
        self._causal = causal_tokenizer
        mask = tokenizer.mask_token_id
        around = [int(i) for i in tokenizer.encode(tokenizer.mask_token)]
        place = around.index(mask)
        self._mask = int(mask)
        self._first, self._last = around[:place], around[place + 1 :]
        self._limit = _longest(model, tokenizer)
        self._special = sorted({int(i) for i in tokenizer.all_special_ids})

    def stretches(
        self, context: Sequence[int], tokens: npt.NDArray[np.intp]
    ) -> list[Stretch]:
        """What stands for some tokens of a text instead.

        Args:
            context (Sequence[int]): the text that may be read, as ids.
            tokens (numpy.ndarray): positions of the tokens, ascending.
        """
        runs = np.split(tokens, np.flatnonzero(np.diff(tokens) > 1) + 1)
        ranges = [(int(run[0]), int(run[-1]) + 1) for run in runs]
        cuts = sorted({0, len(context), *(end for span in ranges for end in span)})
        texts = dict(zip(pairwise(cuts), self._texts(context, cuts), strict=True))
        written = self._written(texts, ranges)
        found = []
        for (start, stop), new in zip(ranges, written, strict=True):
            old = texts[start, stop]
            if new == old:
                instead = [int(i) for i in context[start:stop]]
            else:
                instead = self._encoded(new, context[max(0, start - _CONTEXT) : start])
            found.append(Stretch(start, stop, tuple(instead)))
        return found

    def _texts(self, ids: Sequence[int], cuts: Sequence[int]) -> Iterator[str]:
        """The text between cuts, each read after what stands before it."""
        for start, stop in pairwise(cuts):
            yield _added(ids[:start], ids[start:stop], self._causal)

    def _written(
        self, texts: dict[tuple[int, int], str], gaps: Sequence[tuple[int, int]]
    ) -> list[str]:
        """What is written into each gap, with the white space around the old text."""
        ids: list[int] = []
        places: list[range] = []
        starts = {start for start, _ in gaps}
        for span, text in texts.items():
            if span not in gaps:
                # Masks take the white space before them.
                ids += self._read(text.rstrip() if span[1] in starts else text)
                continue
            masks = max(1, len(self._read(text.strip())))
            places.append(range(len(ids), len(ids) + masks))
            ids += [self._mask] * masks
        predicted = self._predicted(ids, places)
        written = []
        for span, place in zip(gaps, places, strict=True):
            old = texts[span]
            before = ids[max(0, place[0] - _CONTEXT) : place[0]]
            new = _added(before, [predicted[i] for i in place], self._tokenizer).strip()
            # A text of white space alone keeps it in front.
            visible = old.lstrip()
            lead = old[: len(old) - len(visible)]
            trail = visible[len(visible.rstrip()) :]
            written.append(lead + new + trail)
        return written

    def _read(self, text: str) -> list[int]:
        read = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return [int(i) for i in read]

    def _predicted(self, ids: Sequence[int], places: Sequence[range]) -> dict[int, int]:
        """The most probable token at each masked position that has a text."""
        found = {}
        for window, masked in self._windows(len(ids), places):
            read = [*self._first, *ids[window.start : window.stop], *self._last]
            shift = len(self._first) - window.start
            with torch.no_grad(), evaluated(self._model):
                given = torch.tensor([read], device=self._model.device)
                mask = torch.ones_like(given)
                logits = self._model(input_ids=given, attention_mask=mask).logits[0]
            for place in masked:
                scores = logits[place + shift].float()
                scores[self._special] = -torch.inf
                found[place] = self._visible(scores[: len(self._tokenizer)])
        return found

    def _visible(self, scores: Tensor) -> int:
        order: list[int] = scores.argsort(descending=True, stable=True).tolist()
        return next(
            (i for i in order if decode([i], self._tokenizer).strip()), order[0]
        )

    def _windows(
        self, length: int, places: Sequence[range]
    ) -> Iterator[tuple[range, list[int]]]:
        """Parts of a text that the model can read, and masked positions in each.

        One for all masks if it can; else one around each gap.
        """
        limit = self._limit - len(self._first) - len(self._last)
        gaps = [range(places[0].start, places[-1].stop)]
        if len(gaps[0]) > limit:
            gaps = list(places)
        for gap in gaps:
            if len(gap) > limit:
                raise ValueError(
                    complaint(
                        "masked_lm",
                        f"must write all tokens of a unit and reads at most {limit}",
                        f"a unit has {len(gap)}",
                        "Use smaller units, or a model that reads more.",
                    )
                )
            start = max(0, min(gap.start - (limit - len(gap)) // 2, length - limit))
            window = range(start, min(length, start + limit))
            inside = [i for place in places for i in place if i in gap]
            yield window, inside

    def _encoded(self, text: str, before: Sequence[int]) -> list[int]:
        """Ids of a text that stands after others."""
        alone = self._causal_ids(text)
        tried = [alone]
        # Tokenizers of SentencePiece's kind put a space in front of every text.
        line = self._causal_ids("\n")
        after_line = self._causal_ids("\n" + text)
        if after_line[: len(line)] == line:
            tried.append(after_line[len(line) :])
        fits = (ids for ids in tried if _added(before, ids, self._causal) == text)
        return next(fits, alone)

    def _causal_ids(self, text: str) -> list[int]:
        encoded = self._causal.encode(text, add_special_tokens=False)
        return [int(i) for i in encoded]


def _check_masked(masked_lm: Any, masked_tokenizer: Any, tokenizer: Any) -> None:
    if not isinstance(masked_lm, nn.Module):
        raise TypeError(
            complaint(
                "masked_lm",
                "must be a masked language model",
                f"{shown(masked_lm)} came",
                "Load one with AutoModelForMaskedLM.",
            )
        )
    for where, given in (
        ("masked_tokenizer", masked_tokenizer),
        ("tokenizer", tokenizer),
    ):
        if not callable(getattr(given, "encode", None)):
            raise TypeError(
                complaint(
                    where,
                    "must be a tokenizer",
                    f"{shown(given)} came",
                    "Load it from where its model comes from.",
                )
            )
    if getattr(masked_tokenizer, "mask_token_id", None) is None:
        raise ValueError(
            complaint(
                "masked_tokenizer",
                "must have a mask token",
                "it has none",
                "Use a masked language model and its own tokenizer.",
            )
        )


def _added(context: Sequence[int], ids: Sequence[int], tokenizer: Any) -> str:
    """The text that ids add to the text of those before them."""
    before = decode(list(context), tokenizer)
    now = decode([*context, *ids], tokenizer)
    return now[len(before) :] if now.startswith(before) else decode(ids, tokenizer)


def _longest(model: Any, tokenizer: Any) -> int:
    """Longest sequence that a masked language model reads."""
    longest = int(min(getattr(tokenizer, "model_max_length", 2**30), 2**30))
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        longest = min(longest, positions - _UNREAD)
    return longest


# --- what the two methods share ------------------------------------------------------


class RefillMethod(UnitMethod):
    """A method that replaces units by what a masked language model writes instead.

    Args:
        model: a causal language model of transformers.
        masked_lm: a masked language model of transformers, with any vocabulary.
        masked_tokenizer: the tokenizer of ``masked_lm``.
        tokenizer: the tokenizer of ``model``.

    Raises:
        TypeError: if a model is no PyTorch model, or a tokenizer is missing.
        ValueError: if ``masked_tokenizer`` has no mask token.
    """

    def __init__(
        self, model: Any, masked_lm: Any, masked_tokenizer: Any, tokenizer: Any
    ) -> None:
        super().__init__(model)
        self._masked = MaskedModel(masked_lm, masked_tokenizer, tokenizer)

    def refill(
        self, ids: Sequence[int], tokens: npt.NDArray[np.intp], prompt_length: int
    ) -> list[Stretch]:
        """What stands for a unit instead, whatever comes after it.

        A unit of the prompt is refilled within the prompt, a generated one within the
        prompt and all that was generated up to the unit's end.

        Args:
            ids (Sequence[int]): the text, at least as far as it may be read.
            tokens (numpy.ndarray): positions of the unit's tokens, ascending.
            prompt_length (int): number of tokens of the prompt.

        Returns:
            list[Stretch]: one for each stretch of the unit's tokens.
        """
        is_source = tokens[0] < prompt_length
        end = prompt_length if is_source else int(tokens[-1]) + 1
        return self._masked.stretches(ids[:end], tokens)

    @abstractmethod
    def effects(
        self,
        ids: list[int],
        feature_of_token: npt.NDArray[np.int64],
        targets: Tensor,
        **options: Any,
    ) -> Tensor:
        """Effect of each feature on each target, as ``UnitMethod`` says."""

    def attribute(self, inputs: Tensor, additional_forward_args: Any = None) -> Tensor:
        """Effects of all features, as ``LLMAttribution`` asks for them.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            additional_forward_args: the input and the target ids come first.

        Returns:
            Tensor: shape ``(1 + targets, features)``: the sum over the targets, then
            each target.
        """
        return self._asked(inputs, additional_forward_args)

    def _asked(
        self, inputs: Tensor, additional_forward_args: Any, **options: Any
    ) -> Tensor:
        inp, targets, *_ = additional_forward_args
        ids, feature_of_token = token_features(inp)
        if isinstance(inp, PrefixedInput):
            options["prompt_length"] = inp.prompt_length
        targets = torch.as_tensor(targets).cpu()
        found = self.effects(ids, feature_of_token, targets, **options)
        rows = torch.cat([found.sum(dim=0, keepdim=True), found])
        return rows.to(inputs.device)

    def _refills(
        self,
        ids: Sequence[int],
        feature_of_token: npt.NDArray[np.int64],
        prompt_length: int | None,
    ) -> list[list[Stretch]]:
        """What stands for each feature instead; nothing for one without tokens."""
        length = len(ids) if prompt_length is None else prompt_length
        found = []
        for feature in range(int(feature_of_token.max(initial=-1)) + 1):
            tokens = np.flatnonzero(feature_of_token == feature)
            found.append(self.refill(ids, tokens, length) if len(tokens) else [])
        return found


class OneShotReAGent(RefillMethod):
    """Log-probability lost when a unit is refilled by a masked language model.

    Each unit is masked, one mask for each token that its text has for the masked
    language model, and gets the most probable token at each mask. The score is ``log
    p`` of the target before less after. It is the quantity that CAGE's code computes
    under the name of ReAGent, except that a refill keeps the number of tokens that it
    has, where that code pads and cuts. For what the name stands for see
    :class:`ReAGent`.

    A refill of a unit of the prompt depends on the prompt alone, one of a generated
    unit on the text up to the unit's end. The ids of all other text stay. A unit whose
    refill is its own text gets 0.

    ``LLMAttribution`` takes it.

    Args:
        model: a causal language model of transformers.
        masked_lm: a masked language model of transformers, with any vocabulary.
        masked_tokenizer: the tokenizer of ``masked_lm``.
        tokenizer: the tokenizer of ``model``.

    Raises:
        TypeError: if a model is no PyTorch model, or a tokenizer is missing.
        ValueError: if ``masked_tokenizer`` has no mask token.

    Source: the code of Walker and Ewetz (2025), :cite:p:`walker2025cage`.

    Example:
        >>> from captum.attr import LLMAttribution
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from captum_cage import GraphContextAttribution, TokenIdsInput
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> masked_tokenizer = load_demo()[1]
        >>> _ = masked_tokenizer.add_special_tokens({"mask_token": "<mask>"})
        >>> config = BertConfig(
        ...     vocab_size=len(masked_tokenizer), hidden_size=24, num_hidden_layers=1
        ... )
        >>> masked_lm = BertForMaskedLM(config)  # of no use: it was not trained
        >>> method = OneShotReAGent(model, masked_lm, masked_tokenizer, tokenizer)
        >>> cage = GraphContextAttribution(LLMAttribution(method, tokenizer))
        >>> inp = TokenIdsInput(tokenizer("Ana has 3 pens.").input_ids, tokenizer)
        >>> cage.attribute(inp, " Mia has").graph.rows.shape
        (2, 7)
    """

    capability: ClassVar[Capability] = Capability(
        name="one-shot-reagent",
        summary="log-probability lost when a masked model refills a unit",
        source="code of Walker and Ewetz (2025), arXiv:2512.15663",
        wrapper="perturbation",
        cost="P + G passes, P + G of the masked model",
        needs=("a masked language model",),
    )

    def effects(
        self,
        ids: list[int],
        feature_of_token: npt.NDArray[np.int64],
        targets: Tensor,
        *,
        prompt_length: int | None = None,
        **_: Any,
    ) -> Tensor:
        """Effect of each feature on each target, as ``UnitMethod`` says.

        Args:
            ids (list[int]): everything before the targets.
            feature_of_token (numpy.ndarray): feature of each of these tokens, -1 for
                those that stay.
            targets (Tensor): ids that follow, shape ``(T,)``.
            prompt_length (int, optional): number of ids that are the prompt.
                Default: all

        Returns:
            Tensor: shape ``(T, features)``, float64.
        """
        model = CausalModel(self.model)
        with torch.no_grad():
            plain = _scores(model, ids, targets)
            refills = self._refills(ids, feature_of_token, prompt_length)
            found = torch.zeros((len(targets), len(refills)), dtype=torch.float64)
            for feature, stretches in enumerate(refills):
                changed = refilled(ids, stretches)
                if changed != ids:
                    found[:, feature] = plain - _scores(model, changed, targets)
        return found


def _scores(model: CausalModel, ids: Sequence[int], targets: Tensor) -> Tensor:
    """Log-probability of each target after a text and the targets before it."""
    read = torch.tensor([[*ids, *targets[:-1].tolist()]])
    keep = torch.arange(len(ids) - 1, read.shape[1])
    states = model.states({"input_ids": read.to(model.device)}, keep, direct=True)
    return model.log_probabilities(states[0], targets).cpu()


# --- the recursion -------------------------------------------------------------------


@dataclass(frozen=True)
class _Recursion:
    """When a step replaces what, and when there are no more."""

    replacing_ratio: float = 0.3
    keep_top_n: int = 5
    keep_ratio: float | None = None
    rational_candidates: int = 3
    max_steps: int = 3000

    def __post_init__(self) -> None:
        _check_share("replacing_ratio", self.replacing_ratio, "0.3")
        if self.keep_ratio is not None:
            _check_share("keep_ratio", self.keep_ratio, "0.1")
        remedy = "Pass the number of units that stay."
        whole_number("keep_top_n", self.keep_top_n, remedy=remedy)
        remedy = "Pass the number of predictions to look at, for example 3."
        candidates = self.rational_candidates
        whole_number("rational_candidates", candidates, minimum=1, remedy=remedy)
        remedy = "Pass the number of steps after which to give up."
        whole_number("max_steps", self.max_steps, minimum=1, remedy=remedy)

    def kept(self, units: int) -> int:
        """Number of units that stay when the others are replaced."""
        if self.keep_ratio is None:
            return self.keep_top_n
        return math.ceil(self.keep_ratio * units)


def _check_share(where: str, value: object, example: str) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0.0 < value < 1.0:  # type: ignore[operator]
        raise ValueError(
            complaint(
                where,
                "must be a share of the units, more than 0 and less than 1",
                f"{shown(value)} came",
                f"Pass {example}, for example.",
            )
        )


class ReAGent(RefillMethod):
    r"""Importance of units, found by replacing random ones until the rest suffices.

    Scores of all units begin at random. Each step replaces every unit with probability
    ``replacing_ratio`` by what a masked language model writes in its place. With
    :math:`\Delta = p - p_{\mathrm{replaced}}` the change of the target's probability,
    :math:`\mathrm{logit}((\Delta + 1) / 2)` is added to the scores of the replaced
    units and subtracted from the others. It ends when the target is among the
    ``rational_candidates`` most probable tokens after all but the units with the
    highest scores are replaced, or after ``max_steps``. A target's row is the softmax
    of the scores, and sums to one; the row of a unit of several tokens is the sum of
    theirs.

    As in the authors' code, a unit is replaced by the same text in each step: what is
    most probable in its place when it alone is masked. Where that code draws tokens of
    the same part of speech, this is one of its other samplers, by a masked language
    model. A unit of the prompt is refilled within the prompt, a generated one within
    the text up to its own end. Use ``num_trials`` for the average of several runs.

    ``LLMAttribution`` takes it.

    Args:
        model: a causal language model of transformers.
        masked_lm: a masked language model of transformers, with any vocabulary.
        masked_tokenizer: the tokenizer of ``masked_lm``.
        tokenizer: the tokenizer of ``model``.

    Raises:
        TypeError: if a model is no PyTorch model, or a tokenizer is missing.
        ValueError: if ``masked_tokenizer`` has no mask token.

    Source: Zhao and Shan (2024), :cite:p:`zhao2024reagent`, algorithm 1.

    Example:
        >>> from captum.attr import LLMAttribution
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from captum_cage import GraphContextAttribution, TokenIdsInput
        >>> from captum_cage.demo import load_demo
        >>> model, tokenizer = load_demo()
        >>> masked_tokenizer = load_demo()[1]
        >>> _ = masked_tokenizer.add_special_tokens({"mask_token": "<mask>"})
        >>> config = BertConfig(
        ...     vocab_size=len(masked_tokenizer), hidden_size=24, num_hidden_layers=1
        ... )
        >>> masked_lm = BertForMaskedLM(config)  # of no use: it was not trained
        >>> method = ReAGent(model, masked_lm, masked_tokenizer, tokenizer)
        >>> cage = GraphContextAttribution(LLMAttribution(method, tokenizer))
        >>> inp = TokenIdsInput(tokenizer("Ana has 3 pens.").input_ids, tokenizer)
        >>> result = cage.attribute(inp, " Mia has", max_steps=10)
        >>> result.graph.rows.sum(axis=1).round(6)
        array([1., 1.])
    """

    capability: ClassVar[Capability] = Capability(
        name="reagent",
        summary="units without which the target is no longer predicted",
        source="Zhao and Shan (2024), arXiv:2402.00794",
        wrapper="perturbation",
        cost="at most 2 * max_steps per token, P + G of the masked model per unit",
        needs=("a masked language model",),
        random=True,
        signed=False,
        counted="max_steps",
    )

    def attribute(
        self,
        inputs: Tensor,
        additional_forward_args: Any = None,
        *,
        replacing_ratio: float = 0.3,
        keep_top_n: int = 5,
        keep_ratio: float | None = None,
        rational_candidates: int = 3,
        max_steps: int = 3000,
    ) -> Tensor:
        """Importance of all features, as ``LLMAttribution`` asks for it.

        Args:
            inputs (Tensor): indicator of the features; all are present.
            additional_forward_args: the input and the target ids come first.
            replacing_ratio (float, optional): probability with which a step replaces a
                unit. Default: ``0.3``
            keep_top_n (int, optional): number of units that stay where it is tested
                whether they suffice. Default: ``5``
            keep_ratio (float, optional): share of the units that stay there, in place
                of their number. Default: ``None``
            rational_candidates (int, optional): number of most probable tokens among
                which the target must be. Default: ``3``
            max_steps (int, optional): steps after which to end. Default: ``3000``

        Returns:
            Tensor: shape ``(1 + targets, features)``: the sum over the targets, then
            each target.

        Raises:
            TypeError: if an argument is of the wrong kind.
            ValueError: if it is out of range.
        """
        return self._asked(
            inputs,
            additional_forward_args,
            replacing_ratio=replacing_ratio,
            keep_top_n=keep_top_n,
            keep_ratio=keep_ratio,
            rational_candidates=rational_candidates,
            max_steps=max_steps,
        )

    def effects(
        self,
        ids: list[int],
        feature_of_token: npt.NDArray[np.int64],
        targets: Tensor,
        *,
        prompt_length: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Importance of each feature for each target, as ``UnitMethod`` says.

        Args:
            ids (list[int]): everything before the targets.
            feature_of_token (numpy.ndarray): feature of each of these tokens, -1 for
                those that stay.
            targets (Tensor): ids that follow, shape ``(T,)``.
            prompt_length (int, optional): number of ids that are the prompt.
                Default: all
            **options: those of ``attribute``.

        Returns:
            Tensor: shape ``(T, features)``, float64.
        """
        recursion = _Recursion(**options)
        refills = self._refills(ids, feature_of_token, prompt_length)
        found = torch.zeros((len(targets), len(refills)), dtype=torch.float64)
        # Features without tokens have no part in it.
        units = [feature for feature, one in enumerate(refills) if one]
        with torch.no_grad():
            for row, target in enumerate(targets.tolist()):
                text = _Replaced(
                    CausalModel(self.model),
                    [*ids, *targets[:row].tolist()],
                    [refills[unit] for unit in units],
                    target,
                )
                found[row, units] = _importance(text, recursion)
        return found


class _Replaced:
    """What a model predicts after a text some of whose units are replaced."""

    def __init__(
        self,
        model: CausalModel,
        ids: list[int],
        refills: Sequence[Sequence[Stretch]],
        target: int,
    ) -> None:
        self._model = model
        self._ids = ids
        self._refills = refills
        self._target = target

    def __len__(self) -> int:
        return len(self._refills)

    def scores(self, replaced: Tensor) -> Tensor:
        """Logarithms of the probabilities of all tokens, shape ``(vocabulary,)``."""
        chosen = [i for unit in replaced.nonzero()[:, 0] for i in self._refills[unit]]
        ids = refilled(self._ids, chosen)
        given = {"input_ids": torch.tensor([ids], device=self._model.device)}
        keep = torch.tensor([len(ids) - 1])
        state = self._model.states(given, keep, direct=True)[0, 0]
        if self._model.splits:
            state = self._model.model.get_output_embeddings()(state)
        return state.double().log_softmax(dim=0).cpu()

    def probability(self, replaced: Tensor) -> float:
        """Probability of the target."""
        return float(self.scores(replaced)[self._target].exp())

    def is_candidate(self, replaced: Tensor, count: int) -> bool:
        """Whether the target is among the most probable tokens."""
        scores = self.scores(replaced)
        return int((scores > scores[self._target]).sum()) < count


def _importance(text: _Replaced, recursion: _Recursion) -> Tensor:
    """Importance of each unit for one target, shape ``(units,)``, float64."""
    units = len(text)
    scores = torch.rand(units, dtype=torch.float64)
    plain = text.probability(torch.zeros(units, dtype=torch.bool))
    for _ in range(recursion.max_steps):
        replaced = torch.rand(units) < recursion.replacing_ratio
        change = plain - text.probability(replaced)
        change = max(-_LARGEST_CHANGE, min(_LARGEST_CHANGE, change))
        gained = math.log1p(change) - math.log1p(-change)
        scores += torch.where(replaced, gained, -gained)
        rest = torch.ones(units, dtype=torch.bool)
        rest[scores.argsort(descending=True)[: recursion.kept(units)]] = False
        if text.is_candidate(rest, recursion.rational_candidates):
            break
    return scores.softmax(dim=0)
