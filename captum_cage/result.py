"""The answer: marginalised attributions, and the graph that they come from."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import InterpretableInput, LLMAttributionResult
from scipy.sparse import csr_array, issparse
from torch import Tensor

from captum_cage._checks import complaint, whole_number
from captum_cage.graph import AttributionGraph
from captum_cage.solve import Path
from captum_cage.spans import Explain, explained_units
from captum_cage.text import Span, TokenText
from captum_cage.units import (
    Granularity,
    Unit,
    Units,
    group_tokens,
    split_ranges,
    split_units,
)

__all__ = ["FORMAT_VERSION", "GraphAttributionResult", "TextPath"]

FORMAT = "captum_cage.result"
FORMAT_VERSION = 2
"""Of the files that are written. Version 1 is read, too: it had complete rows only."""

_READABLE = (1, FORMAT_VERSION)


@dataclass(frozen=True)
class TextPath(Path):
    """A path with the text of its units.

    Attributes:
        texts (tuple[str, ...]): text of each unit, from the explained one on.
        share (float): part of the explained mass that takes this path.
    """

    texts: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        steps = " <- ".join(json.dumps(text, ensure_ascii=False) for text in self.texts)
        return f"{steps} ({self.share:.1%})"


class GraphAttributionResult(LLMAttributionResult):
    """Attribution of generated text to its sources along all paths.

    A ``captum.attr.LLMAttributionResult``, so its plots and everything that takes one
    work. ``P`` is the number of source units, ``G`` of generated units.

    Args:
        graph (AttributionGraph): the graph, sources first.
        units (Sequence[Unit]): its ``P + G`` units.
        explained (Sequence[int]): positions of the explained generated units.
        source_text (str): text of the prompt.
        generated_text (str): text that follows it: what was generated and, in a trace,
            the text from outside in between.
        output_probs (ArrayLike, optional): probability of each generated unit given
            everything before it, shape ``(G,)``. Default: ``None``
        breaks (Sequence[int], optional): characters of the source text that no unit
            reaches across. Default: ``()``
        generated_breaks (Sequence[int], optional): the same of the generated text.
            Default: ``()``
        meta (Mapping, optional): how the result was made, JSON values only.
            Default: ``None``
        inp (InterpretableInput, optional): the input. Default: ``None``
        hops (int, optional): count only paths with at most this many passes through
            generated units. Default: ``None``, paths of any length

    Raises:
        TypeError: if ``hops`` is not a whole number.
        ValueError: if ``hops`` is negative.

    Attributes:
        graph (AttributionGraph): the graph.
        units (tuple[Unit, ...]): its units in reading order, with text and character
            range. Those before the first generated one stand in ``source_text``, the
            others in ``generated_text``.
        explained (tuple[int, ...]): positions of the explained generated units.
        weights (numpy.ndarray): 1 for each explained unit, else 0. Shape ``(G,)``.
        source_text (str): text of the prompt.
        generated_text (str): text that follows it.
        meta (dict): base method, units, versions.
        input_tokens (list[str]): text of the source units.
        output_tokens (list[str]): text of the generated units.
        output_probs (Tensor or None): probability of each generated unit, ``(G,)``.
        hops (int or None): number of passes after which paths are cut.

    Source: Walker and Ewetz (2025), arXiv:2512.15663.
    """

    def __init__(
        self,
        graph: AttributionGraph,
        units: Sequence[Unit],
        explained: Sequence[int],
        *,
        source_text: str,
        generated_text: str,
        output_probs: npt.ArrayLike | None = None,
        breaks: Sequence[int] = (),
        generated_breaks: Sequence[int] = (),
        meta: Mapping[str, Any] | None = None,
        inp: InterpretableInput | None = None,
        hops: int | None = None,
    ) -> None:
        if hops is not None:
            remedy = "Pass the number of passes; 0 gives the direct rows."
            hops = whole_number("hops", hops, remedy=remedy)
        self.graph = graph
        self.units = tuple(units)
        self.explained = tuple(explained)
        self.weights = np.zeros(graph.n_generated)
        self.weights[list(self.explained)] = 1.0
        self.source_text = source_text
        self.generated_text = generated_text
        self.breaks = tuple(breaks)
        self.generated_breaks = tuple(generated_breaks)
        self.meta = dict(meta or {})
        self.hops = hops
        super().__init__(
            input_tokens=[unit.text for unit in self.units if not unit.generated],
            output_tokens=[unit.text for unit in self.units if unit.generated],
            seq_attr=torch.from_numpy(
                graph.explain(self.weights)
                if hops is None
                else graph.hops(self.weights, hops).attr
            ),
            output_probs=output_probs,
            inp=inp,
        )

    # Results compare by identity, as tensors have no single truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        texts = [self.output_tokens[step] for step in self.explained]
        shown = "".join(texts) if len(texts) == 1 else f"{len(texts)} units"
        lacks = f", unresolved={self.unresolved:.3g}" if self.unresolved > 0 else ""
        return (
            f"{type(self).__name__}(P={self.graph.n_sources}, "
            f"G={self.graph.n_generated}, explained={shown!r}, "
            f"leaked={self.leaked:.3g}{lacks})"
        )

    @property
    def token_attr(self) -> Tensor:
        """Marginals of every generated unit, cut at ``hops``; ``(G, P)``, float64."""
        return self._marginals

    @token_attr.setter
    def token_attr(self, token_attr: None) -> None:
        # Captum's constructor sets it; it is computed when it is first asked for.
        self._token_attr = token_attr

    @cached_property
    def _marginals(self) -> Tensor:
        return torch.from_numpy(self.graph.marginals(hops=self.hops))

    @property
    def seq_attr_dict(self) -> dict[str, float]:
        """Score of each source unit by its text; a repeated text gets a number."""
        scores: dict[str, float] = {}
        for text, score in zip(self.input_tokens, self.seq_attr.tolist(), strict=True):
            key, count = text, 1
            while key in scores:
                count += 1
                key = f"{text} ({count})"
            scores[key] = score
        return scores

    @cached_property
    def direct(self) -> LLMAttributionResult:
        """The explained units' own rows, without the graph: a plain Captum result."""
        to_sources, _ = self.graph.blocks()
        return self._plain(self.weights @ to_sources)

    @cached_property
    def sequence(self) -> LLMAttributionResult:
        """All rows summed, whatever is explained: a plain Captum result."""
        to_sources, _ = self.graph.blocks()
        return self._plain(np.ones(self.graph.n_generated) @ to_sources)

    def _plain(self, seq_attr: npt.NDArray[np.float64]) -> LLMAttributionResult:
        to_sources, _ = self.graph.blocks()
        return LLMAttributionResult(
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            seq_attr=torch.from_numpy(np.array(seq_attr)),
            token_attr=torch.from_numpy(to_sources.toarray()),
            output_probs=self.output_probs,
            inp=self.inp,
        )

    @cached_property
    def step_attr(self) -> Tensor:
        """Mass that passes through each generated unit, shape ``(G,)``, float64.

        Solves ``(I - L)^T y = w``, or cuts its series after ``hops`` passes.
        """
        return torch.from_numpy(self.graph.throughput(self.weights, hops=self.hops))

    @cached_property
    def leaked(self) -> float:
        """Mass that ends in rows without mass, within ``hops`` passes.

        The sum of ``step_attr * graph.leak``. In ``positive`` and ``absolute``,
        ``seq_attr.sum() + leaked + unresolved`` is the number of explained units.
        """
        return self.graph.leaked(self.weights, hops=self.hops)

    @cached_property
    def unresolved(self) -> float:
        """Mass that rows that were not computed, or not wholly, and ``hops`` left open.

        Not negative; exactly 0 where nothing was left out or cut. It bounds the sum of
        the absolute differences of ``seq_attr`` to what complete rows and paths of any
        length would give; in ``positive`` and ``absolute`` no true score is below
        ``seq_attr``. See `AttributionGraph.unresolved`.
        """
        return self.graph.unresolved(self.weights, hops=self.hops)

    @property
    def rows_computed(self) -> int:
        """Number of generated units whose row was computed, 0 to ``G``."""
        return int(np.count_nonzero(self.graph.left_out < 1.0))

    def paths(self, k: int = 5, source: int | None = None) -> list[TextPath]:
        """The ``k`` heaviest paths from the explained units to the sources.

        Paths of any length through the rows that were computed, whatever ``hops`` is.

        Args:
            k (int, optional): number of paths. Default: ``5``
            source (int, optional): the source unit that they end in. Default: any

        Returns:
            list[TextPath]: at most ``k`` paths, the heaviest first.

        Raises:
            ValueError: if ``k`` is negative or there is no such source.
        """
        total = len(self.explained)
        return [
            TextPath(
                path.units,
                path.weight,
                tuple(self.units[unit].text for unit in path.units),
                path.weight / total,
            )
            for path in self.graph.best_paths(self.weights, source, k)
        ]

    def explaining(self, span: Explain) -> GraphAttributionResult:
        """The explanation of another span, without a model call.

        Args:
            span: which generated units, in any form that ``attribute`` takes as
                ``explain``.

        Returns:
            GraphAttributionResult: the same graph, cut at the same ``hops``; another
            question. Its ``unresolved`` is its own: rows that were not needed for this
            question may be missing for that one.
        """
        steps = [unit for unit in self.units if unit.generated]
        return GraphAttributionResult(
            self.graph,
            self.units,
            explained_units(span, steps, self.generated_text),
            source_text=self.source_text,
            generated_text=self.generated_text,
            output_probs=self.output_probs,
            breaks=self.breaks,
            generated_breaks=self.generated_breaks,
            meta=self.meta,
            inp=self.inp,
            hops=self.hops,
        )

    def by(self, units: Granularity) -> LLMAttributionResult:
        """The solved scores summed over larger units, for display.

        This is not the explanation that larger units would have had: for that, pass
        ``units`` to ``attribute``, which groups the rows before they are normalised
        and solved.

        Args:
            units: a granularity, as ``attribute`` takes it. Sources without a place in
                the text stay as they are.

        Returns:
            LLMAttributionResult: a plain Captum result over the larger units.
        """
        sources, steps = self._regrouped(units)
        columns = _indicator(sources)
        rows = _indicator(steps)
        probs = None
        if self.output_probs is not None:
            logs = torch.log(self.output_probs.double())
            probs = torch.exp(torch.from_numpy(rows) @ logs)
        return LLMAttributionResult(
            input_tokens=[unit.text for unit in sources.units],
            output_tokens=[unit.text for unit in steps.units],
            seq_attr=torch.from_numpy(columns) @ self.seq_attr,
            token_attr=torch.from_numpy(rows @ self.token_attr.numpy() @ columns.T),
            output_probs=probs,
            inp=self.inp,
        )

    def _regrouped(self, units: Granularity) -> tuple[Units, Units]:
        """Larger source units and larger generated units, over the present ones."""
        sides = split_units(units)
        outside = sides["source"]
        if sides["both"] is not None:
            cut = len(self.source_text)
            sides["source"], sides["generated"] = split_ranges(sides["both"], cut)
            outside = "token"  # ranges after the prompt are those of generated text
        first = int(self.graph.generated_units[0])
        prompt, later = self.units[:first], self.units[first:]
        parts = [
            _grouped(self.source_text, prompt, False, sides["source"], self.breaks)
        ]
        parts += [
            _grouped(
                self.generated_text,
                later,
                is_generated,
                granularity,
                self.generated_breaks,
            )
            for is_generated, granularity in (
                (False, outside),
                (True, sides["generated"]),
            )
        ]
        prompt_units, outside_units, steps = parts
        groups = [prompt_units.groups, outside_units.groups + len(prompt_units)]
        sources = Units(
            (*prompt_units.units, *outside_units.units), np.concatenate(groups)
        )
        return sources, steps

    def to_dict(self) -> dict[str, Any]:
        """Everything in it as JSON values, scores included."""
        return {
            **self._header(),
            "output_probs": None
            if self.output_probs is None
            else self.output_probs.tolist(),
            "seq_attr": self.seq_attr.tolist(),
            "direct": self.direct.seq_attr.tolist(),
            "sequence": self.sequence.seq_attr.tolist(),
            "step_attr": self.step_attr.tolist(),
            "leaked": self.leaked,
            "unresolved": self.unresolved,
            "kept": self.graph.kept.tolist() if self.graph.left_out.any() else None,
            "rows_computed": self.rows_computed,
            "paths": [
                {"units": list(path.units), "weight": path.weight}
                for path in self.paths(10)
            ],
            "rows": _dense(self.graph.rows).tolist(),
        }

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "meta": self.meta,
            "normalization": self.graph.normalization,
            "source_text": self.source_text,
            "generated_text": self.generated_text,
            "breaks": list(self.breaks),
            "generated_breaks": list(self.generated_breaks),
            "explained": list(self.explained),
            "hops": self.hops,
            "units": [
                {
                    "text": unit.text,
                    "generated": unit.generated,
                    "span": None if unit.span is None else list(unit.span),
                    "special": unit.special,
                }
                for unit in self.units
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to one file, which loads without the model.

        The file is a NumPy archive of plain arrays and JSON, with no pickle. It is
        written beside its place first, so that an interrupt leaves no half file.

        Args:
            path (str or PathLike): the file; an existing one is replaced.
        """
        arrays: dict[str, Any] = {
            "header": np.frombuffer(
                json.dumps(self._header()).encode("ascii"), dtype=np.uint8
            ),
            "sources": self.graph.sources,
            "kept": self.graph.kept,
            "rows_sparse": np.array(issparse(self.graph.rows)),
        }
        if self.output_probs is not None:
            arrays["output_probs"] = self.output_probs.numpy()
        rows = csr_array(self.graph.rows)
        arrays["rows_shape"] = np.array(rows.shape)
        for part in ("data", "indices", "indptr"):
            arrays[f"rows_{part}"] = getattr(rows, part)
        target = FilePath(path)
        partial = target.with_name(target.name + ".partial")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, **arrays)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GraphAttributionResult:
        """Read a result that was saved.

        Args:
            path (str or PathLike): the file.

        Returns:
            GraphAttributionResult: as it was, but without ``inp``.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is no saved result, or of an unknown version.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays["header"].tobytes())
            version = header["version"] if header["format"] == FORMAT else None
        except (ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise _not_a_result(path) from error
        except zipfile.BadZipFile as error:
            raise _not_a_result(path) from error
        if version is None:
            raise _not_a_result(path)
        if version not in _READABLE:
            readable = " or ".join(map(str, _READABLE))
            raise ValueError(
                complaint(
                    f"{os.fspath(path)}",
                    f"must be a result of format version {readable}",
                    f"version {version!r} came",
                    "Load it with the captum_cage that saved it.",
                )
            )
        try:
            parts = tuple(
                arrays[f"rows_{part}"] for part in ("data", "indices", "indptr")
            )
            rows = csr_array(parts, shape=tuple(int(n) for n in arrays["rows_shape"]))
            rows.check_format()
            first = version == 1
            graph = AttributionGraph.from_rows(
                rows if not first and arrays["rows_sparse"] else rows.toarray(),
                arrays["sources"],
                header["normalization"],
                kept=None if first else arrays["kept"],
            )
            units = [
                Unit(
                    str(unit["text"]),
                    bool(unit["generated"]),
                    _span(unit["span"]),
                    bool(unit["special"]),
                )
                for unit in header["units"]
            ]
            if [not unit.generated for unit in units] != graph.sources.tolist():
                raise _not_a_result(path)
            explained = [
                whole_number("explained", step, stop=graph.n_generated, remedy="")
                for step in header["explained"]
            ]
            return cls(
                graph,
                units,
                explained,
                source_text=str(header["source_text"]),
                generated_text=str(header["generated_text"]),
                output_probs=arrays.get("output_probs"),
                breaks=[int(end) for end in header["breaks"]],
                generated_breaks=[
                    int(end) for end in header.get("generated_breaks", ())
                ],
                meta=header["meta"],
                hops=None if first else header["hops"],
            )
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            IndexError,
            AssertionError,  # of Captum's result, where a shape does not fit
        ) as error:
            raise _not_a_result(path) from error


def _grouped(
    text: str,
    units: Sequence[Unit],
    generated: bool,
    granularity: Any,
    breaks: Sequence[int],
) -> Units:
    """The units of one kind in a text, in larger ones; those without a place alone."""
    places = [place for place, unit in enumerate(units) if unit.generated == generated]
    members = tuple(units[place] for place in places)
    if not members or any(unit.span is None for unit in units):
        return Units(members, np.arange(len(members)))
    chosen = np.zeros(len(units), dtype=bool)
    chosen[places] = True
    turns = np.flatnonzero(np.diff(chosen.astype(int))) + 1
    spans = [unit.span for unit in units if unit.span is not None]
    found = group_tokens(
        TokenText(text, tuple(spans)),
        granularity,
        generated=generated,
        attributed=chosen,
        special=np.array([unit.special for unit in units], dtype=bool),
        breaks=(*breaks, *(spans[turn][0] for turn in turns.tolist())),
    )
    return Units(found.units, found.groups[places])


def _indicator(units: Units) -> npt.NDArray[np.float64]:
    """Which old unit (column) belongs to which new one (row)."""
    indicator = np.zeros((len(units), len(units.groups)))
    indicator[units.groups, np.arange(len(units.groups))] = 1.0
    return indicator


def _dense(rows: Any) -> npt.NDArray[np.float64]:
    dense: npt.NDArray[np.float64] = rows.toarray() if issparse(rows) else rows
    return dense


def _span(value: Any) -> Span | None:
    return None if value is None else (int(value[0]), int(value[1]))


def _not_a_result(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"{os.fspath(path)}: must be a result saved by GraphAttributionResult.save, "
        "but it is not one, or it is damaged. Save it again."
    )
