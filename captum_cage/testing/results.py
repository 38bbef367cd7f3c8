"""The laws of a result, each against a calculation that is slow and obvious."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from captum_cage._checks import complaint, shown
from captum_cage.result import GraphAttributionResult
from captum_cage.testing.report import (
    Broken,
    LawReport,
    NotApplicable,
    chosen_laws,
    judged,
)

__all__ = ["RESULT_LAWS", "check_result"]

_Array = npt.NDArray[np.float64]

_EXACT = 1e-9
_MADE = "Make results by GraphContextAttribution or from rows, and do not change them."


def check_result(
    result: GraphAttributionResult, *, laws: Iterable[str] | None = None
) -> LawReport:
    """Prove that a result keeps the laws of its graph.

    No model is asked. Each law recalculates something from the raw rows, slowly:

    - ``"shape"``: scores, marginals and texts are as many as the units.
    - ``"finiteness"``: there is no NaN and nothing infinite.
    - ``"causality"``: no row has an entry for its own unit or a later one.
    - ``"row sums"``: each row of the graph is its raw row in shares of its mass, and
      with the row's leak and what was left out it makes one.
    - ``"conservation"``: what reaches the sources, what leaked and what is not resolved
      make the number of explained units.
    - ``"path sum"``: ``seq_attr`` is the sum over all paths.
    - ``"marginals"``: ``token_attr`` is the sum over all paths from each unit.
    - ``"direct and sequence"``: they are the explained rows, and all rows.
    - ``"span"``: ``explained`` names generated units, and explaining all of them gives
      the sum of all marginals.
    - ``"save and load"``: the result that is loaded is the one that was saved.

    Args:
        result (GraphAttributionResult): any; one that was loaded, too.
        laws (Iterable[str], optional): names of the laws to look at, of
            ``RESULT_LAWS``. Default: ``None``, all

    Returns:
        LawReport: every law and its verdict.

    Raises:
        LawsBroken: if a law is broken; an ``AssertionError`` whose text is the report.
        TypeError: if ``result`` is something else.
        ValueError: if there is no such law.

    Example:
        >>> from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
        >>> from captum_cage import GraphContextAttribution
        >>> from captum_cage.testing import tiny_causal_lm, tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> llm_attr = LLMAttribution(FeatureAblation(tiny_causal_lm()), tokenizer)
        >>> inp = TextTokenInput("Ana has 3", tokenizer)
        >>> result = GraphContextAttribution(llm_attr).attribute(inp, " pens.")
        >>> check_result(result).verdict("conservation")
        'pass'
    """
    if not isinstance(result, GraphAttributionResult):
        raise TypeError(
            complaint(
                "result",
                "must be a GraphAttributionResult",
                f"{shown(result)} came",
                "Pass what GraphContextAttribution.attribute gives.",
            )
        )
    chosen = {name: _LAWS[name] for name in chosen_laws(laws, RESULT_LAWS)}
    return judged("check_result", chosen, [("", result)])


def _shape(result: GraphAttributionResult) -> None:
    sources, generated = result.graph.n_sources, result.graph.n_generated
    expected = {
        "graph.rows": ((generated, sources + generated), result.graph.rows),
        "graph.matrix": ((sources + generated,) * 2, result.graph.matrix),
        "seq_attr": ((sources,), result.seq_attr),
        "token_attr": ((generated, sources), result.token_attr),
        "step_attr": ((generated,), result.step_attr),
        "input_tokens": ((sources,), np.empty(len(result.input_tokens))),
        "output_tokens": ((generated,), np.empty(len(result.output_tokens))),
        "units": ((sources + generated,), np.empty(len(result.units))),
    }
    if result.output_probs is not None:
        expected["output_probs"] = ((generated,), result.output_probs)
    for name, (shape, value) in expected.items():
        if tuple(value.shape) != shape:
            raise Broken(f"shape {shape}", f"{tuple(value.shape)}", _MADE, name)
    for number, unit in enumerate(result.units):
        in_prompt = number < int(result.graph.generated_units[0])
        text = result.source_text if in_prompt else result.generated_text
        reads = unit.text if unit.span is None else text[slice(*unit.span)]
        # A token may be a piece of a character: "é[1/2]".
        if reads != unit.text and not re.fullmatch(
            rf"{re.escape(reads)}\[\d+/\d+\]", unit.text
        ):
            raise Broken(
                f"{unit.text!r} at {unit.span} of the text",
                f"{reads!r}",
                _MADE,
                f"unit {number}",
            )
    told = {
        "input_tokens": (result.input_tokens, result.graph.source_units),
        "output_tokens": (result.output_tokens, result.graph.generated_units),
    }
    for name, (texts, places) in told.items():
        own = [result.units[place].text for place in places]
        if list(texts) != own:
            raise Broken(f"texts of the units, {own}", f"{texts}", _MADE, name)
    kinds = [unit.generated for unit in result.units]
    if kinds != (~result.graph.sources).tolist():
        raise Broken("units of the graph's kinds", f"generated: {kinds}", _MADE)


def _finiteness(result: GraphAttributionResult) -> None:
    values = {
        "graph.rows": _dense(result.graph.rows),
        "graph.matrix": _dense(result.graph.matrix),
        "seq_attr": result.seq_attr.numpy(),
        "token_attr": result.token_attr.numpy(),
        "step_attr": result.step_attr.numpy(),
    }
    for name, value in values.items():
        for where in np.argwhere(~np.isfinite(value)).tolist():
            raise Broken(
                "finite numbers",
                f"{value[tuple(where)]}",
                "Look for NaN or infinite weights of the model.",
                f"{name}{where}",
            )


def _causality(result: GraphAttributionResult) -> None:
    units = np.arange(result.graph.n_units)
    late = units >= result.graph.generated_units[:, None]
    for name, rows in (("rows", result.graph.rows), ("behind", _behind(result))):
        for row, unit in np.argwhere((_dense(rows) != 0) & late).tolist():
            raise Broken(
                "0 for a unit at or after the row's own",
                f"{_dense(rows)[row, unit]}",
                "Attribute a unit to what stands before it only.",
                f"graph.{name}, {_place(result, row, unit)}",
            )


def _row_sums(result: GraphAttributionResult) -> None:
    graph = result.graph
    shares, kept = _shares(result, _behind(result)), _kept_behind(result)
    matrix = _dense(graph.matrix)[graph.generated_units]
    _equal(result, matrix, shares, "its raw row in shares of its mass", "graph.matrix")
    sums = np.abs(matrix).sum(axis=1) + graph.leak_behind + graph.left_out_behind
    for row in np.flatnonzero(np.abs(sums - 1) > _EXACT).tolist():
        raise Broken(
            "1 as the sum of a row, its leak and what was left out",
            f"{sums[row]}",
            _MADE,
            _place(result, row),
        )
    leaks = (np.abs(shares).sum(axis=1) == 0) & (kept == 1)
    for row in np.flatnonzero(leaks != (graph.leak_behind == 1)).tolist():
        raise Broken(
            f"leak {float(leaks[row])}, as the row's mass says",
            f"{graph.leak_behind[row]}",
            _MADE,
            _place(result, row),
        )


def _conservation(result: GraphAttributionResult) -> None:
    if result.graph.normalization == "signed":
        raise NotApplicable("signed rows do not sum to one")
    arrived, wanted = float(result.seq_attr.sum()), float(result.weights.sum())
    total = arrived + result.leaked + result.unresolved
    if not abs(total - wanted) <= _EXACT * max(wanted, 1.0):
        raise Broken(
            f"{wanted:g}, the number of explained units",
            f"{total!r}: {arrived!r} at the sources, {result.leaked!r} leaked, "
            f"{result.unresolved!r} not resolved",
            _MADE,
        )


def _path_sum(result: GraphAttributionResult) -> None:
    found = result.seq_attr.numpy()
    expected = _all_paths(result, result.weights[None])[0]
    for unit in np.flatnonzero(~(np.abs(found - expected) <= _close(expected))):
        raise Broken(
            f"{float(expected[unit])!r}, the sum over all paths",
            f"{float(found[unit])!r}",
            _MADE,
            f"seq_attr[{unit}] ({result.input_tokens[unit]!r})",
        )


def _marginals(result: GraphAttributionResult) -> None:
    expected = _all_paths(result, np.eye(result.graph.n_generated))
    found = result.token_attr.numpy()
    for row, unit in np.argwhere(~(np.abs(found - expected) <= _close(expected))):
        raise Broken(
            f"{float(expected[row, unit])!r}, the sum over all paths",
            f"{float(found[row, unit])!r}",
            _MADE,
            f"token_attr[{row}, {unit}]",
        )


def _direct_and_sequence(result: GraphAttributionResult) -> None:
    shares = _shares(result, result.graph.rows)[:, result.graph.sources]
    ones = np.ones(result.graph.n_generated)
    for name, weights in (("direct", result.weights), ("sequence", ones)):
        plain = getattr(result, name)
        for part, found, expected in (
            ("seq_attr", plain.seq_attr.numpy(), weights @ shares),
            ("token_attr", plain.token_attr.numpy(), shares),
        ):
            if found.shape != expected.shape or not np.allclose(
                found, expected, rtol=0, atol=_close(expected)
            ):
                raise Broken(
                    f"{expected.tolist()}, of the rows themselves",
                    f"{found.tolist()}",
                    _MADE,
                    f"{name}.{part}",
                )


def _span(result: GraphAttributionResult) -> None:
    count = result.graph.n_generated
    rising = sorted({step for step in result.explained if 0 <= step < count})
    if list(result.explained) != rising:
        raise Broken(
            f"rising positions of {count} generated units",
            f"{result.explained}",
            _MADE,
            "explained",
        )
    chosen = np.isin(np.arange(count), rising).astype(float)
    if not np.array_equal(result.weights, chosen):
        raise Broken(f"{chosen}", f"{result.weights}", _MADE, "weights")
    if count == 0:
        return
    whole = result.explaining(slice(0, count)).seq_attr.numpy()
    expected = result.token_attr.numpy().sum(axis=0)
    if not np.allclose(whole, expected, rtol=0, atol=_close(expected)):
        raise Broken(
            f"{expected.tolist()}, the sum of all marginals",
            f"{whole.tolist()}",
            _MADE,
            "explaining all generated units",
        )


def _save_and_load(result: GraphAttributionResult) -> None:
    before = _everything(result)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("result.npz", "result.json"):
            path = Path(folder) / name
            result.save(path)
            after = _everything(type(result).load(path))
            for key, value in before.items():
                if not _equal_values(value, after[key]):
                    raise Broken(
                        f"{value}",
                        f"{after[key]}",
                        "Keep what a result holds to what save() writes.",
                        f"{key}, from {name}",
                    )


_LAWS: dict[str, Callable[[GraphAttributionResult], None]] = {
    "shape": _shape,
    "finiteness": _finiteness,
    "causality": _causality,
    "row sums": _row_sums,
    "conservation": _conservation,
    "path sum": _path_sum,
    "marginals": _marginals,
    "direct and sequence": _direct_and_sequence,
    "span": _span,
    "save and load": _save_and_load,
}
RESULT_LAWS = tuple(_LAWS)


def _dense(rows: Any) -> _Array:
    dense = rows.toarray() if hasattr(rows, "toarray") else rows
    return np.asarray(dense, dtype=np.float64)


def _behind(result: GraphAttributionResult) -> _Array:
    """Raw rows that mass passes by, shape ``(G, N)``."""
    rows = _dense(result.graph.rows).copy()
    behind = result.graph.behind
    if behind is not None:
        rows[behind.steps] = _dense(behind.rows)
    return rows


def _kept_behind(result: GraphAttributionResult) -> _Array:
    kept = np.array(result.graph.kept, dtype=np.float64)
    behind = result.graph.behind
    if behind is not None:
        kept[behind.steps] = behind.kept
    return kept


def _shares(result: GraphAttributionResult, raw: Any) -> _Array:
    """Rows in shares of their mass, entry by entry."""
    is_first = raw is result.graph.rows
    kept = np.asarray(result.graph.kept) if is_first else _kept_behind(result)
    kind = result.graph.normalization
    shares = np.zeros(_dense(raw).shape)
    for number, row in enumerate(_dense(raw).tolist()):
        entries = [
            max(entry, 0.0) if kind == "positive" else float(entry) for entry in row
        ]
        if kind == "absolute":
            entries = [abs(entry) for entry in entries]
        mass = math.fsum(abs(entry) for entry in entries)
        if mass > 0:
            shares[number] = [kept[number] * (entry / mass) for entry in entries]
    return shares


def _all_paths(result: GraphAttributionResult, weights: _Array) -> _Array:
    """Sums over all paths from weighted units to sources, shape ``(len, P)``."""
    sources = result.graph.sources
    first = _shares(result, result.graph.rows)
    later = _shares(result, _behind(result))
    found = weights @ first[:, sources]
    passing = weights @ first[:, ~sources]
    # Each pass goes to a unit before: after as many passes as units none is left.
    passes = result.graph.n_generated if result.hops is None else result.hops
    for _ in range(passes):
        found = found + passing @ later[:, sources]
        passing = passing @ later[:, ~sources]
    return found


def _close(expected: _Array) -> float:
    return _EXACT * max(float(np.abs(expected).max(initial=0.0)), 1.0)


def _equal(
    result: GraphAttributionResult,
    found: _Array,
    expected: _Array,
    what: str,
    name: str,
) -> None:
    for row, unit in np.argwhere(~(np.abs(found - expected) <= _EXACT)).tolist():
        raise Broken(
            f"{what}, {float(expected[row, unit])!r}",
            f"{float(found[row, unit])!r}",
            _MADE,
            f"{name}, {_place(result, row, unit)}",
        )


def _place(result: GraphAttributionResult, row: int, unit: int | None = None) -> str:
    text = f"row {row} ({result.output_tokens[row]!r})"
    if unit is None:
        return text
    return f"{text}, unit {unit} ({result.units[unit].text!r})"


def _everything(result: GraphAttributionResult) -> dict[str, Any]:
    """All that a saved result holds."""
    graph = result.graph
    probabilities = result.output_probs
    return {
        "graph.rows": _dense(graph.rows),
        "graph.sources": graph.sources,
        "graph.normalization": graph.normalization,
        "graph.kept": graph.kept,
        "rows behind": _behind(result),
        "units": result.units,
        "explained": result.explained,
        "seq_attr": result.seq_attr.numpy(),
        "token_attr": result.token_attr.numpy(),
        "step_attr": result.step_attr.numpy(),
        "positive_attr": result.positive_attr.numpy(),
        "negative_attr": result.negative_attr.numpy(),
        "input_tokens": list(result.input_tokens),
        "output_tokens": list(result.output_tokens),
        "leaked": result.leaked,
        "unresolved": result.unresolved,
        "source_text": result.source_text,
        "generated_text": result.generated_text,
        "output_probs": None if probabilities is None else np.asarray(probabilities),
        "breaks": result.breaks,
        "generated_breaks": result.generated_breaks,
        "hops": result.hops,
        "meta": result.meta,
        "thinking": result.thinking,
        "foils": result.foils,
    }


def _equal_values(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    return bool(one == other)
