"""Laws that hold for any graph, model, tokenizer, text and unit, each one test.

Those of the mathematics alone stand beside their modules (`test_graph.py`,
`test_solve.py`, `test_units.py`, `test_text.py`, `test_spans.py`). Here whole
explanations are drawn: a family of models, its weights, a tokenizer, ids in any order,
units of any kind. `make laws` draws many times more examples than a run of all tests.
"""

import csv
import itertools
import re
from functools import lru_cache

import networkx
import numpy as np
import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientXActivation,
    LLMAttribution,
    LLMGradientAttribution,
    TextTemplateInput,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from captum_cage import (
    AttributionGraph,
    GraphAttributionResult,
    GraphContextAttribution,
    TokenIdsInput,
    TraceIdsInput,
    Unit,
)
from captum_cage.foils import Foil
from captum_cage.methods import IFR
from captum_cage.testing import check_result, tiny_causal_lm
from captum_cage.testing.strategies import (
    HARD_PIECES,
    NORMALIZATIONS,
    graphs,
    ranges,
    token_ids,
)
from captum_cage.text import (
    harmless,
    message_spans,
    read_tokens,
    sentence_spans,
    word_spans,
)
from captum_cage.thinking import Part, Thinking
from captum_cage.units import group_tokens
from tiny import tiny_tokenizer

DEEP = settings.get_current_profile_name() == "deep"

ARCHITECTURES = ("llama", "gpt2", "qwen3", "gemma3")
TOKENIZERS = ("bpe", "byte", "char", "sentencepiece", "wordpiece")
METHODS = ("ablation", "gradient", "ifr")
UNITS = ("token", "word", "sentence")
EXACT, ROUNDING = 1e-9, 1e-10  # of sums of shares; of a row's log-probabilities
NORMALIZATION = st.sampled_from(NORMALIZATIONS)

# What texts of people and models have, and what only broken ones have.
SURROGATES = ("\ud800", "\udc00", "a\udfffb")
MORE_PIECES = (
    *(
        "\u0301",
        "\u202eabc\u202c",
        "שלום ",
        "مرحبا",
        "\r",
        "\x00",
        "\x1b[31m",
        "\u2028",
    ),
    *("\ufeff", "1. ", "- ", "```\n", "?!", "。", "\U000e0001", "<think>", "</think>"),
)
PIECES = st.sampled_from((*HARD_PIECES, *MORE_PIECES))
TEXTS = st.lists(PIECES | st.text(max_size=3), max_size=10).map("".join)
BROKEN_TEXTS = st.lists(
    PIECES | st.sampled_from(SURROGATES) | st.text(st.characters(), max_size=3),
    max_size=10,
).map("".join)


def examples(count):
    """So many examples of a law, and twenty-five times as many in a deep run."""
    return settings(max_examples=count * (25 if DEEP else 1))


@lru_cache
def cage_of(arch, kind, method, seed, normalization="positive"):
    """An explainer of a small random model."""
    tokenizer = tiny_tokenizer(kind)
    model = tiny_causal_lm(arch, vocab_size=640, seed=seed, dtype=torch.float64)
    if method == "ablation":
        llm_attr = LLMAttribution(FeatureAblation(model), tokenizer)
    else:
        layer = model.get_input_embeddings()
        base = IFR(model) if method == "ifr" else LayerGradientXActivation(model, layer)
        llm_attr = LLMGradientAttribution(base, tokenizer)
    return GraphContextAttribution(llm_attr, normalization=normalization)


@st.composite
def cages(draw, methods=METHODS, normalization=NORMALIZATION):
    """An explainer of a model, a tokenizer and a method of any kind."""
    return cage_of(
        draw(st.sampled_from(ARCHITECTURES)),
        draw(st.sampled_from(TOKENIZERS)),
        draw(st.sampled_from(methods)),
        draw(st.integers(0, 1)),
        draw(normalization),
    )


@st.composite
def asked(draw, cage, *, most=7, traces=True):
    """An input and a target: a prompt or a trace, ids in any order."""
    tokenizer = cage.llm_attr.tokenizer
    ids = draw(token_ids(tokenizer, max_size=most))
    target = draw(token_ids(tokenizer, max_size=most))
    if traces and len(ids) > 2 and draw(st.booleans()):
        flags = st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))
        wrote = [False, *draw(flags)[1:]]
        if any(wrote[:-1]) and not wrote[-1]:
            return TraceIdsInput(ids, tokenizer, wrote), target
    return TokenIdsInput(ids, tokenizer), target


@st.composite
def explanations(draw, **kinds):
    """An explainer, and what it is asked."""
    cage = draw(cages(**kinds))
    inp, target = draw(asked(cage))
    return cage, inp, target, draw(st.sampled_from(UNITS))


def rows_of(result):
    """Raw rows, dense."""
    rows = result.graph.rows
    return rows.toarray() if hasattr(rows, "toarray") else rows


def assert_close(found, rows):
    """Equal up to rounding of log-probabilities, which are some units large."""
    allowed = ROUNDING * max(float(np.abs(rows).max(initial=0.0)), 1.0)
    np.testing.assert_allclose(found, rows, rtol=0, atol=allowed)


# --- whole explanations --------------------------------------------------------------


@examples(12)
@given(explanations())
def test_any_explanation_keeps_the_laws_of_a_result(case):
    """Shape, causality, row sums, conservation, path sums, span, save and load."""
    cage, inp, target, units = case
    check_result(cage.attribute(inp, target, units=units))


@examples(10)
@given(explanations(), st.data())
def test_what_comes_later_changes_no_earlier_row(case, data):
    """Causality: a unit's row depends on what stands before it and on itself."""
    cage, inp, target, _ = case
    assume(len(target) > 1)
    cut = data.draw(st.integers(1, len(target) - 1))
    others = data.draw(token_ids(cage.llm_attr.tokenizer, max_size=6))
    one = cage.attribute(inp, target)
    other = cage.attribute(inp, [*target[:cut], *others])
    first = one.graph.n_generated - len(target) + cut  # a trace has earlier rows
    width = int(one.graph.generated_units[first])
    assert_close(rows_of(other)[:first, :width], rows_of(one)[:first, :width])
    late = np.arange(one.graph.n_units) >= one.graph.generated_units[:, None]
    assert not rows_of(one)[late].any()


@examples(10)
@given(explanations())
def test_an_engine_gives_the_rows_of_the_loop(case):
    """Whatever the model, the tokenizer, the ids and the units."""
    cage, inp, target, units = case
    fused = cage.attribute(inp, target, units=units, strategy="fused")
    loop = cage.attribute(inp, target, units=units, strategy="loop")
    assert fused.units == loop.units
    assert_close(rows_of(fused), rows_of(loop))


@examples(8)
@given(explanations(), st.integers(1, 9), st.integers(1, 9))
def test_rows_do_not_depend_on_how_they_are_shared_into_batches(case, one, other):
    """Nor on what chunks share a prefix that is computed once."""
    cage, inp, target, units = case
    found = [
        rows_of(cage.attribute(inp, target, units=units, batch_size=size))
        for size in (one, other, None)
    ]
    assert_close(found[0], found[1])
    assert_close(found[0], found[2])


@examples(8)
@given(cages(), st.data())
def test_the_order_of_examples_changes_nothing(cage, data):
    """One explainer, many texts: no text leaves a trace in the next one's numbers."""
    cases = data.draw(st.lists(asked(cage, most=5), min_size=2, max_size=4))
    order = data.draw(st.permutations(range(len(cases))))
    first = [cage.attribute(*case) for case in cases]
    again = {place: cage.attribute(*cases[place]) for place in order}
    for place, result in enumerate(first):
        assert torch.equal(result.seq_attr, again[place].seq_attr)
        assert np.array_equal(rows_of(result), rows_of(again[place]))


# --- certificates --------------------------------------------------------------------


@examples(12)
@given(
    explanations(normalization=st.sampled_from(["positive", "absolute"])),
    st.data(),
    st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    st.none() | st.integers(0, 4),
    st.none() | st.sampled_from([0.5, 0.9, 1.0]),
)
def test_unresolved_bounds_what_an_approximation_lacks(
    case, data, tolerance, hops, sparsify
):
    """The certificate: no true score is below the one given, nor the sum far above."""
    cage, inp, target, units = case
    whole = cage.attribute(inp, target, units=units)
    step = data.draw(st.integers(0, whole.graph.n_generated - 1))
    exact = whole.explaining(step).seq_attr
    found = cage.attribute(
        inp,
        target,
        units=units,
        explain=step,
        tolerance=tolerance,
        hops=hops,
        sparsify=sparsify,
    )
    rounding = 1e-6  # shares of rows that are themselves hardly more than rounding
    lacks = exact - found.seq_attr
    assert (lacks >= -rounding).all()
    assert float(lacks.sum()) <= found.unresolved + rounding
    total = float(found.seq_attr.sum()) + found.leaked + found.unresolved
    assert total == pytest.approx(1.0, abs=EXACT)


# --- units ---------------------------------------------------------------------------


def grouped(rows, sources, groups):
    """Raw rows of larger units: sums, less what a unit owes to itself or later ones."""
    count = max(groups) + 1
    steps = np.flatnonzero(~sources)
    found = np.zeros((count, count))
    for row, step in zip(rows, steps, strict=True):
        for unit, value in enumerate(row):
            if groups[unit] < groups[step]:
                found[groups[step], groups[unit]] += value
    kinds = np.array([sources[groups.index(group)] for group in range(count)])
    return found[~kinds], kinds


@examples(10)
@given(
    cages(methods=["gradient", "ifr"]),
    st.data(),
)
def test_tokens_are_grouped_before_rows_are_normalised_and_solved(cage, data):
    """Group, normalise, solve, in this order, for methods that attribute tokens."""
    inp, target = data.draw(asked(cage, traces=False))
    one = cage.attribute(inp, target)
    spans = [unit.span for unit in one.units]
    # White space alone goes with what stands before it, and is no unit of one's own.
    assume(all(unit.text.strip() for unit in one.units))
    assume(all(start < stop for start, stop in spans) and len(set(spans)) == len(spans))
    joined = [
        data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        for size in (one.graph.n_sources, one.graph.n_generated)
    ]
    groups = []
    for side in joined:
        first = max(groups, default=-1) + 1
        side[0] = False
        groups += [first + part for part in itertools.accumulate(not j for j in side)]
        groups[-len(side) :] = [group - 1 for group in groups[-len(side) :]]
    both = [
        [place for place, group in enumerate(groups) if group == one_group]
        for one_group in range(max(groups) + 1)
    ]
    asked_units = {
        "source": [
            (spans[m[0]][0], spans[m[-1]][1]) for m in both if m[0] < len(joined[0])
        ],
        "generated": [
            (spans[m[0]][0], spans[m[-1]][1]) for m in both if m[0] >= len(joined[0])
        ],
    }
    large = cage.attribute(inp, target, units=asked_units)
    rows, kinds = grouped(rows_of(one), one.graph.sources, groups)
    assert_close(rows_of(large), rows)
    graph = AttributionGraph.from_rows(rows_of(large), kinds, large.graph.normalization)
    np.testing.assert_allclose(large.token_attr, graph.marginals(), atol=EXACT)


def test_grouping_what_was_solved_is_something_else():
    """These do not commute: inside a unit, a token passes on what another one has."""
    rows = [[1.0, 0, 0, 0, 0], [0, 1, 3, 0, 0], [0, 0, 0, 1, 0]]
    tokens = AttributionGraph.from_rows(rows, 2)
    grouped_first = tokens.coarsen([0, 1, 2, 2, 3]).marginals()[-1]
    np.testing.assert_allclose(grouped_first, [0.5, 0.5])
    np.testing.assert_allclose(tokens.marginals()[-1], [0.75, 0.25])


@examples(30)
@given(st.sampled_from(TOKENIZERS), st.data(), st.sampled_from(UNITS))
def test_units_hold_all_that_is_visible_once(kind, data, units):
    """Each unit reads as its place does; no visible character is in none, or in two."""
    tokenizer = tiny_tokenizer(kind)
    ids = data.draw(token_ids(tokenizer, max_size=14))
    tokens = read_tokens(ids, tokenizer)
    found = group_tokens(tokens, units, generated=True)
    held = np.zeros(len(tokens.text), dtype=int)
    for unit in found.units:
        reads = tokens.text[slice(*unit.span)]
        piece = re.fullmatch(rf"{re.escape(reads)}\[\d+/\d+\]", unit.text)
        assert unit.text == reads or (units == "token" and piece)
        if not piece or piece.group().startswith(f"{reads}[1/"):
            held[slice(*unit.span)] += 1
    for place, character in enumerate(tokens.text):
        assert character.isspace() or held[place] == 1


@examples(30)
@given(BROKEN_TEXTS, st.data())
def test_ranges_of_one_s_own_are_the_units(text, data):
    """Where each character is a token, they are what was asked for, in order."""
    spans = data.draw(ranges(len(text)))
    spans = [(a, b) for a, b in spans if text[a:b].strip() and text[a].strip()]
    from_characters = [(place, place + 1) for place in range(len(text))]
    tokens = type(read_tokens([], tiny_tokenizer()))(text, tuple(from_characters))
    found = group_tokens(tokens, spans, generated=False)
    for start, stop in spans:
        inside = {
            int(found.groups[place])
            for place in range(start, stop)
            if text[place].strip()
        }
        assert len(inside) == 1
        unit = found.units[inside.pop()]
        assert unit.text.strip() == text[start:stop].strip()


# --- texts ---------------------------------------------------------------------------


LONG = [
    (piece * (100_000 // len(piece)))
    for piece in (
        "a",
        " ",
        ".",
        "\n",
        "\r\n",
        "é",
        "e\u0301",
        "日",
        "。",
        "😀",
        "\u200b",
    )
]
LONG += ["\ud800" * 100_000, "<think>" * 14_000, "a. " * 33_000, "`" * 100_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:3]))
def test_a_hundred_kilobytes_of_one_character_are_read_in_linear_time(text):
    """As words, as sentences, for a terminal, as a question, as thoughts."""
    for found in (word_spans(text), sentence_spans(text), message_spans(text)):
        ends = [end for span in found for end in span]
        assert ends == sorted(ends)
        assert not ends or 0 <= ends[0] <= ends[-1] <= len(text)
        assert bool(ends) == bool(text.strip())
    harmless(text).encode("utf-8")
    found = Thinking.found(
        text, [(0, len(text))], "", tiny_tokenizer(), ("<think>", "b")
    )
    assert set(found.spans) == set(Part)


@examples(40)
@given(BROKEN_TEXTS)
def test_every_text_is_cut_into_ranges_of_itself(text):
    """Ranges rise and are apart, and each begins and ends with what can be seen."""
    for spans in (word_spans(text), sentence_spans(text), message_spans(text)):
        ends = [end for span in spans for end in span]
        assert ends == sorted(ends)
        for start, stop in spans:
            assert text[start:stop] == text[start:stop].strip() != ""
        left = [
            c
            for place, c in enumerate(text)
            if not any(start <= place < stop for start, stop in spans)
        ]
        assert not "".join(left).strip()


@pytest.mark.parametrize("broken", SURROGATES)
def test_half_a_surrogate_pair_is_refused_by_the_name_of_the_argument(broken):
    """No tokenizer reads it; which of the texts it was would not be known."""
    cage = cage_of("llama", "bpe", "ablation", 0)
    inp = TokenIdsInput([40, 41], cage.llm_attr.tokenizer)
    for where, call in {
        "target": lambda: cage.attribute(inp, broken),
        "foil": lambda: cage.attribute(inp, " 3 pens", foil={0: broken}),
        "inp": lambda: cage.attribute(TextTemplateInput("{} " + broken, ["a"]), "a"),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{where}: must be valid Unicode.*half a"
        ):
            call()


# --- results and files ---------------------------------------------------------------


@st.composite
def results(draw):
    """A result of any graph, whose texts may be anything."""
    graph = draw(graphs().filter(lambda graph: graph.n_generated > 0))
    cut = int(graph.generated_units[0])
    pieces = [draw(BROKEN_TEXTS) for _ in range(graph.n_units)]
    units, places = [], [0, 0]
    for number, (piece, source) in enumerate(
        zip(pieces, graph.sources.tolist(), strict=True)
    ):
        side = int(number >= cut)
        span = (places[side], places[side] + len(piece))
        places[side] = span[1]
        units.append(Unit(piece, not source, span, draw(st.booleans())))
    count = graph.n_generated
    steps = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))
    probs = draw(
        st.none() | st.lists(st.floats(0, 1, width=32), min_size=count, max_size=count)
    )
    return GraphAttributionResult(
        graph,
        units,
        steps,
        source_text="".join(pieces[:cut]),
        generated_text="".join(pieces[cut:]),
        output_probs=probs,
        breaks=[places[0]],
        meta=draw(st.dictionaries(TEXTS, TEXTS | st.integers(), max_size=2)),
        hops=draw(st.none() | st.integers(0, 5)),
        foils=[Foil(0, draw(BROKEN_TEXTS), draw(BROKEN_TEXTS))],
    )


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".json"])
@examples(25)
@given(result=results())
def test_what_is_loaded_is_what_was_saved(suffix, result, tmp_path_factory):
    """To the bit, in every form, whatever texts it holds."""
    path = tmp_path_factory.getbasetemp() / f"saved{suffix}"
    result.save(path)
    loaded = GraphAttributionResult.load(path)
    assert loaded.to_dict() == result.to_dict()
    assert [unit.span for unit in loaded.units] == [unit.span for unit in result.units]
    if not re.search("[\ud800-\udbff][\udc00-\udfff]", result.source_text):
        assert loaded.source_text == result.source_text
    assert torch.equal(loaded.token_attr, result.token_attr)


@examples(12)
@given(result=results())
def test_every_view_takes_any_text(result, tmp_path_factory):
    """Pages, tables and graphs are written, and programs of others read them."""
    folder = tmp_path_factory.getbasetemp()
    result.to_html().encode("utf-8")
    str(result)
    for path in result.paths(3):
        str(path).encode("utf-8")
    result.export(folder / "view.dot")
    (folder / "view.dot").read_text(encoding="utf-8")
    result.export(folder / "view.csv")
    with (folder / "view.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    assert len(lines) == 1 + len(result.explained) * result.graph.n_sources
    result.export(folder / "view.graphml")
    read = networkx.read_graphml(folder / "view.graphml")
    assert read.number_of_nodes() == result.graph.n_units
