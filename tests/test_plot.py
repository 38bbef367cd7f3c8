"""The pictures: what they show, that they stay bounded, and how they look.

How they look is compared with small pictures without text, so that fonts do not matter.
``PYTHONPATH=tests python tests/test_plot.py`` draws those in tests/baseline_images
anew: look at them.
"""

import inspect
import warnings
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from captum.attr import LLMAttributionResult
from matplotlib.legend import Legend
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text

from captum_cage import AttributionGraph, GraphAttributionResult, Unit, plot

BASELINES = Path(__file__).parent / "baseline_images"
TOLERANCE = 6.0  # of the root mean square, in 0..255: edges are smoothed differently
OF_CELLS = 12.0  # the same: whether cells end one pixel earlier depends on the version
PLOTS = ("plot_graph", "plot_heatmap", "plot_hops", "plot_sources")

# What breaks a picture where a token is taken for more than a text.
HOSTILE = [
    r"$\frac{1}{$",
    "$x",
    "$a$",
    "a\nb",
    "\t",
    "",
    " ",
    "😀",
    "👩‍🚀",
    "שלום",
    "مرحبا",
]
HOSTILE += [
    "你好",
    "\x00\x1b[0m",
    "\ud800",
    "\u202eabc",
    "%d {} \\",
    "é",
    "_^~#&",
    "\u2028",
]


@pytest.fixture(autouse=True)
def settings():
    """Matplotlib as it comes, and no picture left open."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.use("agg")
        yield
        plt.close("all")


def made(rows, texts, n_sources, explained, normalization="positive", **more):
    """A result with these rows; sources first, or where a mask says so."""
    graph = AttributionGraph.from_rows(rows, n_sources, normalization)
    parts, ends = ["", ""], []
    first = int(graph.generated_units[0])
    for place, text in enumerate(texts):
        side = int(place >= first)
        start = len(parts[side])
        parts[side] += text
        ends.append((start, start + len(text)))
    units = [
        Unit(text, not source, span)
        for text, source, span in zip(texts, graph.sources, ends, strict=True)
    ]
    return GraphAttributionResult(
        graph, units, explained, source_text=parts[0], generated_text=parts[1], **more
    )


def small(normalization="positive", explained=(2,)):
    """Three facts, two steps and an answer."""
    rows = [
        [4, 2, -1, 0, 0, 0],
        [0, -2, 5, 3, 0, 0],
        [1, 0, 0, 2, 7, 0],
    ]
    texts = ["Ana has 3 pens. ", "Leo has 5 cups. ", "Mia has 4 more than Ana. "]
    texts += ["Mia has 3 + 4 = 7 pens. ", "That is more than Leo. ", "The answer is 7."]
    return made(rows, texts, 3, explained, normalization)


def large(P, G, normalization="positive", seed=0):
    """Random rows, a few of them heavy, of hostile tokens."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((G, P + G)) * rng.exponential(1.0, (G, P + G)) ** 3
    rows[:, P:] = np.tril(rows[:, P:], -1)
    texts = [HOSTILE[i % len(HOSTILE)] for i in range(P + G)]
    return made(rows, texts, P, [G - 1], normalization)


def arcs_of(ax):
    """The arcs of a graph."""
    return [patch for patch in ax.patches if isinstance(patch, PathPatch)]


def texts_of(figure):
    """All texts of a picture that are seen."""
    found = (text for text in figure.findobj(Text) if text.get_visible())
    return [text.get_text() for text in found if text.get_text()]


# --- how they look -------------------------------------------------------------------

LOOKS = {
    "graph": lambda: small().plot_graph(),
    "graph_signed": lambda: small("signed").plot_graph(keep=1),
    "heatmap": lambda: small().plot_heatmap(direct=True),
    "heatmap_signed": lambda: small("signed").plot_heatmap(),
    "hops": lambda: small().plot_hops(),
    "sources": lambda: small("signed").plot_sources(),
    "seq_attr": lambda: small("signed").plot_seq_attr(),
}


def written(draw, path):
    """A picture in a file, without its texts."""
    figure, _ = draw()
    figure.set_layout_engine("none")  # its results change with matplotlib's version
    # A legend is as large as its texts.
    for hidden in (*figure.findobj(Text), *figure.findobj(Legend)):
        hidden.set_visible(False)
    figure.savefig(path, dpi=50, metadata={"Software": None})
    return str(path)


@pytest.mark.parametrize("name", LOOKS)
def test_it_looks_as_it_did(name, tmp_path):
    """Without texts; renewed by ``python tests/test_plot.py``."""
    drawn = written(LOOKS[name], tmp_path / f"{name}.png")
    tolerance = OF_CELLS if name.startswith("heatmap") else TOLERANCE
    assert compare_images(str(BASELINES / f"{name}.png"), drawn, tolerance) is None


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("graph", lambda: small().plot_graph(keep=1)),
        ("heatmap", lambda: small("signed").plot_heatmap(direct=True)),
        ("sources", lambda: small("absolute").plot_sources()),
        ("hops", lambda: small("signed").plot_hops()),
    ],
)
def test_another_picture_looks_otherwise(name, draw, tmp_path):
    """The comparison sees one arc more, or another normalisation."""
    drawn = written(draw, tmp_path / f"{name}.png")
    assert compare_images(str(BASELINES / f"{name}.png"), drawn, OF_CELLS) is not None


# --- any text, any size --------------------------------------------------------------


@pytest.mark.parametrize("name", [*PLOTS, "plot_token_attr", "plot_seq_attr"])
def test_any_text_is_drawn_as_it_is(name, tmp_path):
    """No formula, no missing sign that matplotlib would warn of."""
    P = len(HOSTILE)
    result = large(P, P, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure, _ = getattr(result, name)()
        for suffix in ("png", "svg", "pdf"):
            figure.savefig(tmp_path / f"picture.{suffix}")
    for text in figure.findobj(Text):
        assert "$" not in text.get_text() or not text.get_parse_math()


def test_what_the_font_lacks_is_seen_to_be_missing():
    """A box for each character; layout is written as an escape."""
    result = made([[4, 2, 1, 0]], ["你好", "a\nb", "\u202eabc", "x"], 3, [0])
    figure, _ = result.plot_heatmap()
    assert {"□□", "a\\nb", "\\u202eabc"} <= set(texts_of(figure))


def test_what_a_generic_family_stands_for_may_change():
    """The characters that are drawn change with it."""
    result = made([[1, 0]], ["\u042f", "b"], 1, [0])
    drawn = []
    mpl.rcParams["axes.formatter.use_mathtext"] = True  # cmr10 has no minus sign
    for name in ("cmr10", "DejaVu Serif"):
        with mpl.rc_context({"font.family": ["serif"], "font.serif": [name]}):
            drawn.append(texts_of(result.plot_sources()[0]))
    assert "\u25a1" in drawn[0]
    assert "\u042f" in drawn[1]


def test_fonts_that_have_a_character_are_found():
    """By the families of the settings, in which those after the first help out."""
    mpl.rcParams["font.family"] = ["no such font", "DejaVu Sans"]
    result = made([[4, 0]], ["é😀", "x"], 1, [0])
    figure, _ = result.plot_heatmap()
    assert "é😀" in texts_of(figure)


@pytest.mark.parametrize(
    "draw",
    [
        lambda result: result.plot_heatmap(),
        lambda result: result.plot_heatmap(direct=True),
        lambda result: result.plot_token_attr(),
        lambda result: result.plot_seq_attr(),
        lambda result: result.plot_graph(),
        lambda result: result.plot_sources(),
        lambda result: result.plot_hops(),
    ],
)
def test_300_by_600_units_stay_within_bounds(draw, tmp_path):
    """A picture of bounded size, with a bounded number of texts."""
    figure, _ = draw(large(600, 300, "signed"))
    figure.savefig(tmp_path / "picture.png", dpi=100)
    width, height = figure.get_size_inches()
    assert width <= 14
    assert height <= 25
    assert len(texts_of(figure)) <= 250


@pytest.mark.parametrize("name", PLOTS)
def test_a_picture_is_drawn_onto_given_axes(name):
    """Which are returned with their figure; no other one is made."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    picture = getattr(small(), name)(left)
    assert picture == (figure, left)
    assert left.get_children()
    assert not right.lines
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", PLOTS)
def test_tiny_axes_are_drawn_onto(name, tmp_path):
    """There is little to be seen, but nothing fails or hangs."""
    figure, ax = plt.subplots(figsize=(1, 1))
    getattr(large(20, 10), name)(ax)
    figure.savefig(tmp_path / "tiny.png")


@pytest.mark.parametrize("name", ["plot_token_attr", "plot_seq_attr"])
def test_captum_s_plots_keep_their_signature(name, monkeypatch):
    """They return figure and axes, or show them and return nothing."""
    ours = inspect.signature(getattr(GraphAttributionResult, name))
    captums = inspect.signature(getattr(LLMAttributionResult, name))
    assert list(ours.parameters) == list(captums.parameters)
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    figure, ax = getattr(small(), name)()
    assert ax.figure is figure
    assert not shown
    assert getattr(small(), name)(show=True) is None
    assert len(shown) == 1


# --- what they show ------------------------------------------------------------------


def cells(ax):
    """The numbers of a heatmap."""
    return np.asarray(ax.images[0].get_array())


@pytest.mark.parametrize("normalization", ["positive", "absolute", "signed"])
def test_a_heatmap_shows_the_marginals(normalization):
    """Or the rows themselves, over all units in reading order."""
    result = small(normalization)
    _, ax = result.plot_heatmap()
    assert cells(ax) == pytest.approx(result.token_attr.numpy())
    _, ax = result.plot_heatmap(direct=True)
    expected = result.graph.matrix.toarray()[result.graph.generated_units]
    assert cells(ax) == pytest.approx(expected)
    assert (
        f"{expected[2, 4]:{'+' if normalization == 'signed' else ''}.0%}"
        in texts_of(ax.figure)
    )


def test_the_heaviest_cell_of_a_block_is_drawn():
    """Of more cells than a picture has pixels."""
    P = 2_345
    row = np.zeros(P + 1)
    row[[7, 2_000]] = 3, -5
    result = made([row], ["a"] * (P + 1), P, [0], "signed")
    _, ax = result.plot_heatmap()
    drawn = cells(ax)[0]
    assert drawn.shape == (782,)
    assert np.flatnonzero(drawn).tolist() == [7 // 3, 2_000 // 3]
    assert drawn[[7 // 3, 2_000 // 3]] == pytest.approx([3 / 8, -5 / 8])


def test_sources_are_bars_of_both_kinds():
    """The heaviest first; those that come to nothing are summed."""
    rows = [[6, 3, 0, 1, 0, 0], [1, 0, 0, 0, 3, 0]]
    texts = ["the first fact", "the second one", "none", "another", "step", "end"]
    result = made(rows, texts, 4, [1])
    _, ax = result.plot_sources(top=2)
    direct, marginal = ([bar.get_width() for bar in bars] for bars in ax.containers)
    assert marginal == pytest.approx([0.25 + 0.45, 0.225, 0.075])
    assert direct == pytest.approx([0.25, 0.0, 0.0])
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["the first fact", "the second one", "2 more"]


def test_nothing_is_told_as_nothing():
    """A source that the row alone does not know has a number, not a gap."""
    result = made([[1, 0, 0, 0], [0, 1, 3, 0]], ["a", "b", "c", "d"], 2, [1])
    _, ax = result.plot_sources()
    assert [text.get_text() for text in ax.texts] == ["0%", "25.0%", "75.0%", "25.0%"]


def test_short_sources_are_named_with_the_words_around_them():
    """A token alone says little."""
    texts = [*"Ana has 3 pens and Leo has 5 cups".replace(" ", "@ ").split("@"), " x"]
    row = np.zeros(10)
    row[2] = 1
    _, ax = made([row], texts, 9, [0]).plot_sources()
    assert ax.get_yticklabels()[0].get_text() == "Ana has «3» pens and Leo …"


def test_hops_are_curves_of_the_cut_series():
    """All sources together, then each of the heaviest."""
    result = small()
    figure, ax = result.plot_hops(top=2)
    curves = [line.get_ydata() for line in ax.get_lines()]
    after = [result.graph.hops(result.weights, k).attr for k in range(3)]
    order = np.argsort(-after[2], kind="stable")
    assert len(curves) == 3
    assert curves[0] == pytest.approx([attr.sum() for attr in after])
    for curve, source in zip(curves[1:], order, strict=False):
        assert curve == pytest.approx([attr[source] for attr in after])
    assert "all sources" in texts_of(figure)


def test_hops_end_where_they_are_told_to():
    """A chain of twenty steps."""
    rows = np.eye(20, 21)
    result = made(rows, list("abcdefghijklmnopqrstu"), 1, [19], hops=2)
    _, ax = result.plot_hops(most=4, top=0)
    assert len(ax.get_lines()[0].get_xdata()) == 5
    assert ax.get_lines()[1].get_xdata() == [2, 2]


# --- the graph -----------------------------------------------------------------------


def arcs(ax):
    """The two ends of each arc, by height."""
    found = arcs_of(ax)
    return [(p.get_path().vertices[0][1], p.get_path().vertices[-1][1]) for p in found]


def boxes(ax):
    """The boxes of units, from the top."""
    found = [p for p in ax.patches if isinstance(p, FancyBboxPatch)]
    return sorted(found, key=lambda box: box.get_y())


def middle(box):
    """Where the arcs of a unit begin."""
    return pytest.approx(box.get_y() + box.get_height() / 2)


def test_arcs_are_blue_to_generated_units_and_brown_to_sources():
    """Also to a generated unit of whose own row nothing is drawn."""
    rows = [[1] * 9 + [0, 0], [0] * 9 + [1, 0]]
    texts = [f"Fact {n}. " for n in range(9)] + ["A step. ", "The answer."]
    result = made(rows, texts, 9, [1])
    _, ax = result.plot_graph(keep=0.5)
    assert [arc.get_edgecolor()[:3] for arc in arcs_of(ax)] == [
        mpl.colors.to_rgb(plot._BLUE)
    ]
    _, ax = result.plot_graph(keep=1)
    assert [arc.get_edgecolor()[:3] for arc in arcs_of(ax)].count(
        mpl.colors.to_rgb(plot._DARK)
    ) == 9


def test_every_edge_with_mass_is_an_arc():
    """From the later unit to the earlier one, as wide as its mass."""
    result = small()
    _, ax = result.plot_graph(keep=1)
    flow = result.graph.flow(result.weights).toarray()
    drawn = boxes(ax)
    assert len(drawn) == 6
    expected = [
        (flow[step, place], drawn[3 + step], drawn[place])
        for step, place in zip(*np.nonzero(flow), strict=True)
    ]
    found = arcs(ax)
    assert len(found) == len(expected)
    for _, later, earlier in expected:
        assert (middle(later), middle(earlier)) in found
    widths = [p.get_linewidth() for p in arcs_of(ax)]
    by_width = [found[i] for i in np.argsort(widths)]
    by_mass = sorted(expected, key=lambda edge: edge[0])
    assert by_width[-1] == (middle(by_mass[-1][1]), middle(by_mass[-1][2]))


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.99])
def test_arcs_have_the_share_of_mass_that_is_told(keep):
    """The fewest arcs that have it."""
    result = large(30, 20)
    figure, ax = result.plot_graph(keep=keep, most=50)
    flow = np.sort(result.graph.flow(result.weights).data)[::-1]
    count = int(np.argmax(np.cumsum(flow) >= keep * flow.sum())) + 1
    assert len(arcs(ax)) == count
    told = f"{count} of {len(flow)} arcs, with {flow[:count].sum() / flow.sum():.1%}"
    assert any(told in " ".join(text.split()) for text in texts_of(figure))


def test_units_are_bounded_and_what_lies_between_is_counted():
    """Every unit is drawn or counted."""
    figure, ax = large(600, 300).plot_graph(most=12)
    assert len(boxes(ax)) <= 12
    counted = [
        int(text.split()[1]) for text in texts_of(figure) if text.startswith("⋮")
    ]
    assert sum(counted) + len(boxes(ax)) == 900


def test_what_lies_between_is_quoted_by_whole_words():
    """Its begin and its end, as long as there is room for."""
    rng = np.random.default_rng(0)
    words = ["ka", "lomi", "nesutora", "vi.", "tokalo"]
    texts = [f" {rng.choice(words)}" for _ in range(90)]
    rows = np.zeros((1, 90))
    rows[0, [0, 40, 88]] = 1, 2, 1
    _, ax = made(rows, texts, 89, [0]).plot_graph()
    gaps = [text.get_text() for text in ax.texts if text.get_text().startswith("⋮")]
    assert len(gaps) == 2
    for gap, (start, stop) in zip(gaps, ((1, 40), (41, 88)), strict=True):
        between = "".join(texts[start:stop]).split()
        head, tail = (part.split() for part in gap.partition(": ")[2].split(" … "))
        assert head == between[: len(head)]
        assert tail == between[-len(tail) :]
        assert 60 < len(gap) < 110


def test_masses_stand_beside_the_units():
    """Bare where it ends, in brackets where it passes; what is explained is marked."""
    result = small()
    figure, _ = result.plot_graph(keep=1)
    texts = texts_of(figure)
    assert f"{result.seq_attr[0]:.1%}" in texts
    assert f"({result.step_attr[1]:.1%})" in texts
    assert "◂ explained" in texts
    assert [text for text in texts if text.startswith("[")] == [
        "[prompt]",
        "[generated]",
    ]


def test_units_from_outside_have_a_heading():
    """Where they stand after generated text."""
    mask = [True, False, True, False]
    rows = [[1, 0, 0, 0], [1, 1, 2, 0]]
    figure, _ = made(rows, ["ask", "call", "reply", "end"], mask, [1]).plot_graph(
        keep=1
    )
    headings = [text for text in texts_of(figure) if text.startswith("[")]
    assert headings == ["[prompt]", "[generated]", "[from outside]", "[generated]"]


def test_what_argues_against_is_dashed():
    """Colour is not all that says it."""
    _, ax = small("signed").plot_graph(keep=1)
    styles = {p.get_linestyle() for p in arcs_of(ax)}
    assert len(styles) == 2
    _, ax = small("positive").plot_graph(keep=1)
    assert {p.get_linestyle() for p in arcs_of(ax)} == {"-"}


def test_rows_do_not_overlap():
    """Long sentences are wrapped, and shortened at three lines."""
    sentence = "A rather long story about pens and cups and what became of them. " * 9
    result = made(
        [
            [1, 1, 0],
        ],
        [sentence, "short", sentence],
        2,
        [0],
    )
    figure, ax = result.plot_graph(keep=1)
    for above, below in pairwise(boxes(ax)):
        assert above.get_y() + above.get_height() <= below.get_y()
    lines = max(texts_of(figure), key=len).split("\n")
    assert len(lines) == 3
    assert "…" in lines[-1]


@pytest.mark.parametrize("name", PLOTS)
def test_marks_without_end_are_drawn_to_some(name, tmp_path):
    """They take no room, so nothing else would cut them."""
    text = "e" + "\u0301" * 100_000
    result = made([[1, 0, 0], [1, 2, 0]], [text, "b", "c"], 1, [1])
    figure, _ = getattr(result, name)()
    assert max(len(told) for told in texts_of(figure)) < 200
    figure.savefig(tmp_path / "file.png")


def test_paths_that_are_cut_are_told():
    """In legends and beside colours."""
    given = [[1, 0, 0], [1, 2, 0]], ["a", "b", "c"], 1, [1]
    for one, told in (
        (made(*given), "along all paths"),
        (made(*given, hops=1), "along paths of at most 1 hop"),
    ):
        assert any(told in text for text in texts_of(one.plot_sources()[0]))
        assert any(told in text for text in texts_of(one.plot_heatmap()[0]))


@pytest.mark.parametrize("name", PLOTS)
def test_axes_are_axes(name):
    """Of matplotlib."""
    with pytest.raises(TypeError, match="ax: must be matplotlib's axes, but str 'x'"):
        getattr(small(), name)("x")


def test_a_result_without_mass_is_drawn():
    """Nothing flows; all of it leaks."""
    result = made([[-1, 0]], ["a", "b"], 1, [0])
    figure, ax = result.plot_graph()
    assert arcs(ax) == []
    assert any("leak 100.0%" in text for text in texts_of(figure))
    for name in PLOTS[1:]:
        getattr(result, name)()


@pytest.mark.parametrize(
    ("draw", "error", "match"),
    [
        (lambda r: r.plot_graph(keep=0), ValueError, r"keep: must be above 0"),
        (lambda r: r.plot_graph(keep="all"), TypeError, r"keep: must be above 0"),
        (
            lambda r: r.plot_graph(most=1),
            ValueError,
            r"most: must be .*number of units",
        ),
        (lambda r: r.plot_sources(top=0), ValueError, r"top: must be .*of sources"),
        (lambda r: r.plot_hops(top=-1), ValueError, r"top: must be .*of sources"),
        (lambda r: r.plot_hops(most=1.5), TypeError, r"most: must be .*of steps"),
    ],
)
def test_arguments_are_checked(draw, error, match):
    """Before anything is drawn."""
    with pytest.raises(error, match=match):
        draw(small())
    assert plt.get_fignums() == []


def test_functions_and_methods_are_the_same():
    """Each function of the module is a method of the result."""
    assert all(hasattr(GraphAttributionResult, name) for name in plot.__all__)


if __name__ == "__main__":
    mpl.rcdefaults()
    mpl.use("agg")
    BASELINES.mkdir(exist_ok=True)
    for name, draw in LOOKS.items():
        print(written(draw, BASELINES / f"{name}.png"))  # noqa: T201
