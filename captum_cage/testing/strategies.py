"""Hypothesis strategies: graphs, raw rows, weights, texts, ids, ranges.

Import it where Hypothesis is installed: ``from captum_cage.testing import strategies``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

try:
    from hypothesis import strategies as st
    from hypothesis.extra.numpy import arrays
except ImportError as error:
    raise ImportError(
        "captum_cage.testing.strategies needs Hypothesis. Run: "
        "pip install captum-cage[dev], or pip install hypothesis"
    ) from error

from captum_cage.graph import AttributionGraph, Normalization

__all__ = [
    "ENTRIES",
    "HARD_PIECES",
    "NORMALIZATIONS",
    "graphs",
    "hard_texts",
    "ranges",
    "raw_rows",
    "source_masks",
    "token_ids",
    "weighted_graphs",
    "weights",
]

_RawRows: TypeAlias = tuple[
    npt.NDArray[np.float64], npt.NDArray[np.bool_], Normalization
]

NORMALIZATIONS: tuple[Normalization, ...] = ("positive", "absolute", "signed")
# Mostly small whole numbers: zeros and equal entries are where code goes wrong.
ENTRIES = st.integers(-2, 5).map(float) | st.floats(-100, 100, allow_subnormal=False)
# Spaces that merge, accents that are one character or two, signs of several bytes and
# of several characters, and texts that look like tokens.
HARD_PIECES = (
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "a", "A", "é", "e\u0301", "ß"),
    *(
        "日本",
        "한",
        "ا",
        "😀",
        "👩\u200d👩\u200d👧",
        "\u200b",
        "3.5",
        "e.g.",
        "...",
        "'s",
    ),
    *("<unk>", "<|user|>", "<unused0>", "▁", "##s", "Ġ", "Ana", " pens", "</s>"),
)


def _each(dtype: Any, shape: Any, elements: Any = None) -> Any:
    """Arrays of which each entry is drawn; else one value would fill most of them."""
    return arrays(dtype, shape, elements=elements, fill=st.nothing())


@st.composite
def source_masks(draw: st.DrawFn, max_units: int = 7) -> npt.NDArray[np.bool_]:
    """Whether each unit is a source: few are, so that paths are long.

    Args:
        draw: Hypothesis fills it.
        max_units (int, optional): most units. Default: ``7``

    Returns:
        numpy.ndarray: shape ``(N,)``, bool; mostly the first is a source.

    Example:
        >>> from hypothesis import given
        >>> @given(source_masks(max_units=3))
        ... def has_units(mask):
        ...     assert mask.size <= 3
        >>> has_units()
    """
    size = draw(st.integers(max_units // 2, max_units) | st.integers(0, max_units))
    sources: npt.NDArray[np.bool_] = draw(_each(np.int8, size, st.integers(0, 4))) == 0
    sources[:1] |= draw(st.integers(0, 4)) > 0
    return sources


@st.composite
def raw_rows(
    draw: st.DrawFn, entries: st.SearchStrategy[float] = ENTRIES, max_units: int = 7
) -> _RawRows:
    """Raw rows, a mask of sources (anywhere), and a normalisation.

    Args:
        draw: Hypothesis fills it.
        entries (SearchStrategy, optional): of the entries. Default: ``ENTRIES``
        max_units (int, optional): most units. Default: ``7``

    Returns:
        tuple: arguments of ``AttributionGraph.from_rows``: rows of shape ``(G, N)``,
        the mask of shape ``(N,)`` and the normalisation.

    Example:
        >>> from hypothesis import given
        >>> @given(raw_rows())
        ... def is_causal(drawn):
        ...     rows, sources, _ = drawn
        ...     assert rows.shape == ((~sources).sum(), sources.size)
        >>> is_causal()
    """
    sources = draw(source_masks(max_units))
    generated = np.flatnonzero(~sources)
    rows = draw(_each(np.float64, (generated.size, sources.size), entries))
    rows[np.arange(sources.size) >= generated[:, None]] = 0.0
    return rows, sources, draw(st.sampled_from(NORMALIZATIONS))


@st.composite
def graphs(
    draw: st.DrawFn, entries: st.SearchStrategy[float] = ENTRIES, max_units: int = 7
) -> AttributionGraph:
    """Attribution graphs of every normalisation, with leaks and sources in between.

    Args:
        draw: Hypothesis fills it.
        entries (SearchStrategy, optional): of the raw rows. Default: ``ENTRIES``
        max_units (int, optional): most units. Default: ``7``

    Example:
        >>> from hypothesis import given
        >>> @given(graphs())
        ... def leaks_are_shares(graph):
        ...     assert ((graph.leak == 0) | (graph.leak == 1)).all()
        >>> leaks_are_shares()
    """
    return AttributionGraph.from_rows(*draw(raw_rows(entries, max_units)))


def weights(
    n_generated: int, normalization: Normalization = "positive"
) -> st.SearchStrategy[npt.NDArray[np.float64]]:
    """Weights that a graph takes: negative ones, too, if it is signed.

    Args:
        n_generated (int): number of generated units.
        normalization (str, optional): of the graph. Default: ``"positive"``

    Returns:
        SearchStrategy: of arrays of shape ``(G,)``, float64.

    Example:
        >>> from hypothesis import given
        >>> @given(weights(3))
        ... def are_not_negative(drawn):
        ...     assert (drawn >= 0).all()
        >>> are_not_negative()
    """
    lowest = -1.0 if normalization == "signed" else 0.0
    weight = st.integers(0, 2).map(float) | st.floats(lowest, 1, allow_subnormal=False)
    found: st.SearchStrategy[npt.NDArray[np.float64]] = _each(
        np.float64, n_generated, weight
    )
    return found


@st.composite
def weighted_graphs(
    draw: st.DrawFn, max_units: int = 7
) -> tuple[AttributionGraph, npt.NDArray[np.float64]]:
    """A graph, and weights that it takes.

    Args:
        draw: Hypothesis fills it.
        max_units (int, optional): most units. Default: ``7``

    Example:
        >>> from hypothesis import given
        >>> @given(weighted_graphs())
        ... def explains(drawn):
        ...     graph, asked = drawn
        ...     assert graph.explain(asked).shape == (graph.n_sources,)
        >>> explains()
    """
    graph = draw(graphs(max_units=max_units))
    return graph, draw(weights(graph.n_generated, graph.normalization))


def hard_texts(max_pieces: int = 12) -> st.SearchStrategy[str]:
    """Texts that are hard for tokenizers: see ``HARD_PIECES``; and any characters.

    Args:
        max_pieces (int, optional): most pieces of a text. Default: ``12``

    Returns:
        SearchStrategy: of texts without surrogates; empty ones among them.

    Example:
        >>> from hypothesis import given
        >>> @given(hard_texts())
        ... def can_be_encoded(text):
        ...     text.encode("utf-8")
        >>> can_be_encoded()
    """
    any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    piece = st.sampled_from(HARD_PIECES) | any_text
    return st.lists(piece, max_size=max_pieces).map("".join)


def token_ids(
    tokenizer: Any, *, min_size: int = 1, max_size: int = 12, special: bool = False
) -> st.SearchStrategy[list[int]]:
    """Ids of a tokenizer in any order: mostly not as it would tokenise their text.

    Args:
        tokenizer: of transformers.
        min_size (int, optional): fewest ids. Default: ``1``
        max_size (int, optional): most ids. Default: ``12``
        special (bool, optional): whether special tokens are among them.
            Default: ``False``

    Returns:
        SearchStrategy: of lists of ids.

    Example:
        >>> from hypothesis import given
        >>> from captum_cage.testing import tiny_tokenizer
        >>> tokenizer = tiny_tokenizer()
        >>> @given(token_ids(tokenizer))
        ... def are_known(ids):
        ...     assert all(0 <= i < len(tokenizer) for i in ids)
        >>> are_known()
    """
    left_out = set() if special else set(tokenizer.all_special_ids)
    known: Sequence[int] = [i for i in range(len(tokenizer)) if i not in left_out]
    return st.lists(st.sampled_from(known), min_size=min_size, max_size=max_size)


@st.composite
def ranges(draw: st.DrawFn, length: int, *, gaps: bool = True) -> list[tuple[int, int]]:
    """Ascending character ranges of a text, apart from one another, as for ``units``.

    Args:
        draw: Hypothesis fills it.
        length (int): number of characters of the text.
        gaps (bool, optional): whether some characters may be in no range.
            Default: ``True``

    Returns:
        list[tuple[int, int]]: ``(start, stop)`` of each range; none is empty.

    Example:
        >>> from hypothesis import given
        >>> @given(ranges(5, gaps=False))
        ... def cover_all(found):
        ...     assert sum(stop - start for start, stop in found) == 5
        >>> cover_all()
    """
    cuts = draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=length))
    edges = [0, *sorted(cut for cut in cuts if cut < length), length]
    found = [(a, b) for a, b in pairwise(edges) if a < b]
    if gaps and found:
        kept = draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found)))
        found = [pair for pair, keep in zip(found, kept, strict=True) if keep]
    return found
