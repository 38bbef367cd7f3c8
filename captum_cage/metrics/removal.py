"""Ways of taking sources away from a text that a model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch

from captum_cage._captum import family
from captum_cage._checks import complaint, one_of, shown
from captum_cage.methods.attention import attention_layers
from captum_cage.methods.reagent import MaskedModel, refilled
from captum_cage.task import RowTask

__all__ = ["ChangedText", "MaskedRefill", "RemovalName", "Remover", "removal_name"]

RemovalName: TypeAlias = Literal["delete", "baseline", "suppress"]
"""Left out, replaced by the baseline, or hidden from the attention."""

REMOVALS = get_args(RemovalName)
_REFILLED = -1  # origin of a token that a masked language model wrote

Bools = npt.NDArray[np.bool_]
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MaskedRefill:
    """Taking sources away by what a masked language model writes in their place.

    Attributes:
        masked_lm: a masked language model of transformers, with any vocabulary.
        masked_tokenizer: its tokenizer.
    """

    masked_lm: Any
    masked_tokenizer: Any


Removal: TypeAlias = RemovalName | MaskedRefill
"""How sources are taken away."""


def removal_name(removal: Removal) -> str:
    """What a table calls a way of taking sources away."""
    return "masked_lm" if isinstance(removal, MaskedRefill) else removal


@dataclass(frozen=True)
class ChangedText:
    """A text some of whose sources are taken away.

    Attributes:
        ids (tuple[int, ...]): what the model reads of the prompt and all that follows
            it; of a prompt that is more than tokens, what follows it.
        origin (numpy.ndarray): position of each token in the whole text, -1 for those
            that were written anew. Shape ``(n,)``.
        hidden (numpy.ndarray): which tokens those outside them do not attend to, bool.
        model_input (Any): what stands before ``ids`` where the prompt is more than
            tokens; None elsewhere.
    """

    ids: tuple[int, ...]
    origin: Places
    hidden: Bools
    model_input: Any = None


class Remover:
    """Takes sources away from the text of an explanation.

    ``"delete"`` leaves their tokens out; ``"baseline"`` puts the baseline in their
    place, as perturbation methods do; ``"suppress"`` hides them from the attention of
    all other tokens, at their places; a :class:`MaskedRefill` has a masked language
    model write something else there.

    Args:
        task (RowTask): the text and its units.
        removal (str or MaskedRefill): how sources are taken away.

    Attributes:
        by_token (bool): whether sources are made of tokens.
        written (numpy.ndarray): which tokens of the whole text the model wrote, bool.
        n_sources (int): number of sources, ``P``.
        sizes (numpy.ndarray): number of tokens of each source, shape ``(P,)``; ones
            where sources are no tokens.

    Raises:
        TypeError: if the removal is none of these.
        ValueError: if it needs tokens and sources are none, or the model's attention
            cannot be replaced.
    """

    def __init__(self, task: RowTask, removal: Removal) -> None:
        if not isinstance(removal, MaskedRefill):
            if not isinstance(removal, str):
                raise TypeError(
                    complaint(
                        "removal",
                        "must be a name or a MaskedRefill",
                        f"{shown(removal)} came",
                        "Pass removal='delete', for example.",
                    )
                )
            one_of("removal", removal, REMOVALS)
        self.task = task
        self.name = removal_name(removal)
        self.by_token = task.reads_tokens
        self.n_sources = int(task.is_source.sum())
        before = task.prompt.continuation
        later = np.ones(len(task.generated), dtype=bool)
        if before is not None:
            later[: len(before.ids)] = before.generated
        if not self.by_token:
            self._check_features()
            self.written = later
            self.sizes = np.ones(self.n_sources)
            return
        self._ids = np.array([*task.prompt.ids, *task.generated])
        self.written = np.concatenate(
            [np.zeros(len(task.prompt.ids), dtype=bool), later]
        )
        rank = np.full(task.width + 1, -1)
        rank[np.flatnonzero(task.is_source)] = np.arange(self.n_sources)
        self._source = rank[task.unit_of_token()]  # (tokens,), -1 for no source
        self.sizes = np.bincount(
            self._source[self._source >= 0], minlength=self.n_sources
        ).astype(np.float64)
        self._baseline = np.array(task.baseline_ids())
        self._masked = None
        if isinstance(removal, MaskedRefill):
            self._masked = MaskedModel(
                removal.masked_lm, removal.masked_tokenizer, task.llm_attr.tokenizer
            )
        if self.name == "suppress":
            self._check_attention()

    def _check_features(self) -> None:
        if self.name != "baseline":
            raise ValueError(
                complaint(
                    "removal",
                    f"{self.name!r} needs sources that are made of tokens",
                    f"the features of {type(self.task.prompt.inp).__name__} are not",
                    "Pass removal='baseline'.",
                )
            )

    def _check_attention(self) -> None:
        if family(self.task.llm_attr) == "remote":
            raise ValueError(
                complaint(
                    "removal",
                    "'suppress' needs the model itself",
                    "the model is remote",
                    "Pass removal='delete'.",
                )
            )
        # Looked at outside of any replaced attention.
        ids = torch.from_numpy(self._ids)
        attention_layers(self.task.llm_attr.model, ids, "removal='suppress'")

    def changed(self, kept: Bools) -> ChangedText:
        """The text without some of its sources.

        Args:
            kept (numpy.ndarray): which sources stay, shape ``(P,)``, bool.
        """
        if not self.by_token:
            return self._changed_features(kept)
        gone = (self._source >= 0) & ~np.append(kept, True)[self._source]
        ids, origin = self._ids, np.arange(len(self._ids))
        hidden = np.zeros(len(ids), dtype=bool)
        if self.name == "delete":
            ids, origin = self._shortened(gone)
            hidden = hidden[: len(ids)]
        elif self.name == "baseline":
            ids = np.where(gone, self._baseline, ids)
        elif self.name == "suppress":
            hidden = gone
        elif gone.any():
            ids, origin = self._refilled(gone)
            hidden = np.zeros(len(ids), dtype=bool)
        return ChangedText(tuple(ids.tolist()), origin, hidden)

    def _changed_features(self, kept: Bools) -> ChangedText:
        inp = self.task.prompt.inp
        present = inp.to_tensor()
        units = torch.from_numpy(self.task.sources.groups)
        present = present * torch.from_numpy(kept)[units].to(present.dtype)
        given = None if kept.all() else present
        count = len(self.task.generated)
        return ChangedText(
            self.task.generated,
            np.arange(count),
            np.zeros(count, dtype=bool),
            inp.to_model_input(given),
        )

    def _shortened(self, gone: Bools) -> tuple[Places, Places]:
        origin = np.flatnonzero(~gone)
        ids = self._ids[origin]
        if origin[0] >= len(self.task.prompt.ids):
            # Nothing would be left for the first generated token to follow.
            ids = np.insert(ids, 0, self._start())
            origin = np.insert(origin, 0, _REFILLED)
        return ids, origin

    def _start(self) -> int:
        """The token that a text begins with, or what stands for nothing."""
        start = getattr(self.task.llm_attr.tokenizer, "bos_token_id", None)
        return int(self._baseline[0]) if start is None else int(start)

    def _refilled(self, gone: Bools) -> tuple[Places, Places]:
        """What was gone is written anew, of the text up to the end of its turn."""
        stretches = []
        cuts = np.flatnonzero(np.diff(self.written, prepend=True, append=True))
        for start, stop in zip(cuts[::2], cuts[1::2], strict=True):
            if gone[start:stop].any() and self._masked is not None:
                # What is gone before it is masked, too, or it could be copied.
                found = self._masked.stretches(
                    self._ids[:stop].tolist(), np.flatnonzero(gone[:stop])
                )
                stretches += [one for one in found if one.start >= start]
        ids = refilled(self._ids.tolist(), stretches)
        places = refilled(
            list(range(len(self._ids))),
            [type(s)(s.start, s.stop, (_REFILLED,) * len(s.ids)) for s in stretches],
        )
        return np.array(ids), np.array(places)
