"""Pictures of an explanation, drawn by matplotlib."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len

from captum_cage._checks import complaint, share_to_keep, shown, whole_number
from captum_cage.explanation import Explanation, along
from captum_cage.text import harmless, percent

try:
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import FuncNorm, LinearSegmentedColormap, to_rgb
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path as Curve
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise ImportError(
        "captum_cage.plot: pictures need matplotlib. Install it by "
        "`pip install captum-cage[plot]`."
    ) from error

__all__ = [
    "plot_graph",
    "plot_heatmap",
    "plot_hops",
    "plot_seq_attr",
    "plot_sources",
    "plot_token_attr",
]

Picture: TypeAlias = tuple[Figure | SubFigure, Axes]
"""What every plot returns, as Captum's plots do."""
Values = npt.NDArray[np.float64]

# Colours of Okabe and Ito (2008), which colour-blind readers tell apart. Direction and
# kind are said by signs, hatching, markers or dashes as well.
_ORANGE, _BLUE, _DARK = "#e69f00", "#0072b2", "#8a4b00"
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", ":")
_MASS = LinearSegmentedColormap.from_list(
    "captum_cage_mass", ["#ffffff", "#ffe2a8", "#f0a030", "#a14d00", "#3b1a00"]
)
_SIGNED = LinearSegmentedColormap.from_list(
    "captum_cage_signed",
    ["#08264a", "#1f6fb4", "#b7d7ee", "#ffffff", "#ffdba0", "#d07a10", "#4a2200"],
)

_MISSING = "\u25a1"  # in place of a character that the font lacks
_MOST_MARKS = 4
_WRITTEN_CELLS = 400  # of a heatmap; more of them carry no number
_WRITTEN_COLUMNS = 20
_PIXELS = 1_000  # cells of a heatmap along one side; more are pooled
_WIDEST, _HIGHEST = 14.0, 11.0  # inches
_LABEL = 0.14  # inches that a label takes across
_MOST_ARCS = 300
_NARROWEST = 8  # characters of a line
_QUOTED = 100  # units at each end of a gap
_MOST_TURNS = 20  # between prompt, generated text and text from outside
_TOLD = 0.0005  # of the mass: less reads 0.0%
_SHORT, _AROUND = 12, 16  # characters of a unit, and of what is shown around it
_ENOUGH = 0.001  # of the mass: nothing more is seen in a plot of hops


# --- texts in pictures ---------------------------------------------------------------


@lru_cache(maxsize=16)
def _characters(
    families: tuple[str, ...], _settings: tuple[str, ...]
) -> frozenset[int]:
    """The characters that the fonts of some families have.

    What generic ones, such as "serif", stand for is a matter of the settings.
    """
    found: set[int] = set()
    for family in families:
        try:
            path = findfont(FontProperties(family=[family]), fallback_to_default=False)
        except ValueError:
            continue
        found.update(get_font(path).get_charmap())
    return frozenset(found)


def _drawable(text: str) -> str:
    """A text on one line, of characters that the font has."""
    families = tuple(mpl.rcParams["font.family"])
    settings = map(str, mpl.rcParams.find_all(r"^font\.").values())
    known = _characters(families, tuple(settings))
    marks = 0  # in a row: they take no room, and would have no end

    def drawn(character: str) -> str:
        nonlocal marks
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks > _MOST_MARKS:
            return ""
        if ord(character) in known:
            return character
        # Joiners and selectors of variants are seen in what they join only.
        unseen = unicodedata.category(character) in ("Cf", "Mn")
        return "" if unseen else _MISSING

    return "".join(map(drawn, harmless(text, one_line=True)))


def _cut(text: str, longest: int) -> str:
    """A text without its middle, where it is long."""
    if cell_len(text) <= longest:
        return text
    mark = " … " if " " in text else "…"
    room = longest - len(mark)
    head = _beginning(text, room - room // 3)
    end = _beginning(text[::-1], room // 3)[::-1]
    return f"{head.rstrip()}{mark}{end.lstrip()}"


def _beginning(text: str, room: int) -> str:
    """As much of a text as there is room for, to the end of a word if one is near."""
    kept = text[:room]  # a character that joins another one takes no room
    while cell_len(kept) > room:
        kept = kept[:-1]
    if not text[len(kept) :][:1].isspace():
        words = kept.rpartition(" ")[0]
        kept = words if 2 * len(words) > len(kept) else kept
    return kept


def _wrapped(text: str, width: int, most: int) -> list[str]:
    """Lines of a text, without what lies between the first ones and its end."""
    # A wide character takes the room of two: the lines are as long as all of them.
    room = max(width * len(text) // max(cell_len(text), 1), 4)
    lines = textwrap.wrap(text, room, drop_whitespace=True) or [text]
    if len(lines) > most:
        lines = [*lines[: most - 1], _cut(" ".join(lines[most - 1 :]), width)]
    return lines


def _source_name(result: Explanation, source: int) -> str:
    """The text of a source, with the words around it where it is short."""
    place = int(result.graph.source_units[source])
    unit = result.units[place]
    before = after = ""
    if unit.span is not None and len(unit.text.strip()) < _SHORT:
        in_prompt = place < int(result.graph.generated_units[0])
        text = result.source_text if in_prompt else result.generated_text
        start, stop = unit.span
        before, after = text[max(start - _AROUND, 0) : start], text[stop:][:_AROUND]
        if start > _AROUND:
            before = "… " + before.partition(" ")[2]
        if stop + _AROUND < len(text):
            after = after.rpartition(" ")[0] + " …"
    name = _drawable(unit.text.strip()) or "␣"
    if not before.strip("… ") and not after.strip("… "):
        return name
    lead = " " if unit.text[:1].isspace() or before[-1:].isspace() else ""
    gap = " " if unit.text[-1:].isspace() or after[:1].isspace() else ""
    around = [_drawable(" ".join(part.split())) for part in (before, after)]
    return f"{around[0]}{lead}«{name}»{gap}{around[1]}"


def _literal(texts: Iterable[Text]) -> None:
    """Draw texts as they are: a dollar sign begins no formula."""
    for text in texts:
        text.set_parse_math(False)
        text.set_usetex(False)


def _signed(result: Explanation) -> bool:
    return result.graph.normalization == "signed"


def _axes(ax: Axes | None, width: float, height: float) -> Picture:
    """The axes that are given, or new ones of a size in inches."""
    if ax is not None:
        return _checked(ax).figure, ax
    figure, made = plt.subplots(figsize=(width, height), layout="constrained")
    figure.set_facecolor("white")
    return figure, made


def _checked(ax: Axes) -> Axes:
    if not isinstance(ax, Axes):
        raise TypeError(
            complaint(
                "ax",
                "must be matplotlib's axes",
                f"{shown(ax)} came",
                "Pass the second value of matplotlib.pyplot.subplots(), or none.",
            )
        )
    return ax


def _inches(ax: Axes) -> tuple[float, float]:
    """Width and height of axes."""
    box = ax.get_window_extent()
    dpi = float(ax.figure.dpi)
    return box.width / dpi, box.height / dpi


def _total(result: Explanation) -> float:
    return float(result.weights.sum())


# --- heatmaps ------------------------------------------------------------------------


def plot_heatmap(
    result: Explanation, ax: Axes | None = None, *, direct: bool = False
) -> Picture:
    """What each generated unit owes to each source, as a map of colours.

    Colour goes by the square root, so that small shares are seen. Cells carry their
    number where there are at most 400. Of many units some are named, and more than
    1,000 a side are drawn in blocks, each as its heaviest cell.

    Args:
        result (GraphAttributionResult): what is drawn.
        ax (matplotlib.axes.Axes, optional): where; saving the figure is yours. Default:
            a new figure of bounded size
        direct (bool, optional): the rows themselves, over all units, shape ``(G, N)``,
            in place of the marginals over the sources, ``(G, P)``. Default: ``False``

    Returns:
        tuple[Figure, Axes]: as Captum's plots.
    """
    graph = result.graph
    if direct:
        values = graph.normalized().toarray()
        names = [unit.text for unit in result.units]
        what = "share of the row: one step back"
    else:
        values = result.token_attr.numpy()
        names = result.input_tokens
        what = f"share: {along(result.hops)}"
    picture = _drawn_heatmap(result, ax, values, names, what)
    if direct:
        kinds = np.array([unit.generated for unit in result.units])
        for edge in np.flatnonzero(np.diff(kinds))[:50]:
            picture[1].axvline(float(edge) + 0.5, color="#666666", linewidth=1)
    return picture


def _drawn_heatmap(
    result: Explanation,
    ax: Axes | None,
    values: Values,
    names: Sequence[str],
    what: str,
) -> Picture:
    n_rows, n_columns = values.shape
    written = n_columns <= _WRITTEN_COLUMNS and values.size <= _WRITTEN_CELLS
    each = 0.62 if written else 0.2
    figure, ax = _axes(
        ax,
        float(np.clip(each * n_columns + 3.5, 6.4, _WIDEST)),
        float(np.clip(0.26 * n_rows + 2.4, 3.6, _HIGHEST)),
    )
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    is_signed = _signed(result)
    image = ax.imshow(
        _pooled(values),
        cmap=_SIGNED if is_signed else _MASS,
        norm=FuncNorm(
            (_rooted, _squared), vmin=-largest if is_signed else 0.0, vmax=largest
        ),
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, n_columns - 0.5, n_rows - 0.5, -0.5),
    )
    bar = figure.colorbar(image, ax=ax, format=PercentFormatter(1.0), pad=0.02)
    bar.set_ticks((largest * np.array([0.0, 0.05, 0.25, 0.5, 1.0])).tolist())
    if is_signed:
        ticks = largest * np.array([-1.0, -0.5, -0.05, 0.0, 0.05, 0.5, 1.0])
        bar.set_ticks(ticks.tolist())
    bar.ax.set_ylabel(what, rotation=-90, va="bottom")
    width, height = _inches(ax)
    steps = [
        ("\u25b8 " if step in set(result.explained) else "") + _cut(_drawable(text), 30)
        for step, text in enumerate(result.output_tokens)
    ]
    _name_ticks(ax, "y", steps, height)
    columns = [_cut(_drawable(text), 32) for text in names]
    _name_ticks(ax, "x", columns, width)
    ax.tick_params(
        top=True, bottom=False, labeltop=True, labelbottom=False, labelsize=8
    )
    if written:
        for row, column in zip(*np.nonzero(np.abs(values) >= 0.005), strict=True):
            value = float(values[row, column])
            ax.text(
                column,
                row,
                percent(value, is_signed),
                ha="center",
                va="center",
                fontsize=8,
                color=_readable_on(image.to_rgba(np.array([value]))[0]),
            )
    return figure, ax


def _rooted(values: Any) -> Any:
    return np.sign(values) * np.sqrt(np.abs(values))


def _squared(values: Any) -> Any:
    return np.sign(values) * np.square(values)


def _pooled(values: Values) -> Values:
    """The heaviest entry of each block, so that no side is longer than a picture's."""
    for axis in (0, 1):
        size = -(-values.shape[axis] // _PIXELS)
        if size > 1:
            starts = np.arange(0, values.shape[axis], size)
            high = np.maximum.reduceat(values, starts, axis=axis)
            low = np.minimum.reduceat(values, starts, axis=axis)
            values = np.where(high >= -low, high, low)
    return values


def _readable_on(colour: Any) -> str:
    """Black or white, whichever stands out."""
    red, green, blue = to_rgb(tuple(colour[:3]))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _name_ticks(ax: Axes, side: str, names: Sequence[str], inches: float) -> None:
    """Name as many units along a side as there is room for."""
    every = -(-len(names) // max(int(inches / _LABEL), 1)) if names else 1
    places = list(range(0, len(names), every))
    axis: Axis = ax.yaxis if side == "y" else ax.xaxis
    axis.set_ticks(places, labels=[names[place] for place in places])
    found = _tick_labels(axis)
    _literal(found)
    crowded = side == "x" and inches / max(len(places), 1) < 0.35
    for label in found:
        label.set_fontsize(8)
        if side == "x":
            label.set_rotation(90 if crowded else 35)
            label.set_horizontalalignment("center" if crowded else "left")
            label.set_rotation_mode("default" if crowded else "anchor")


def _tick_labels(axis: Axis) -> list[Text]:
    """The labels on both sides, seen or not."""
    return [
        label for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)
    ]


def _label_above(ax: Axes) -> None:
    ax.tick_params("x", top=True, bottom=False, labeltop=True, labelbottom=False)


def plot_token_attr(result: Explanation, show: bool = False) -> Picture | None:
    """Captum's plot of all generated tokens, of bounded size.

    Args:
        result (GraphAttributionResult): what is drawn.
        show (bool, optional): show it and return nothing. Default: ``False``

    Returns:
        tuple[Figure, Axes] or None: the picture, unless it is shown.
    """
    return _shown(plot_heatmap(result), show)


def plot_seq_attr(result: Explanation, show: bool = False) -> Picture | None:
    """Captum's plot of the scores of all sources in reading order, of bounded size.

    Args:
        result (GraphAttributionResult): what is drawn.
        show (bool, optional): show it and return nothing. Default: ``False``

    Returns:
        tuple[Figure, Axes] or None: the picture, unless it is shown.
    """
    values = result.seq_attr.numpy()
    names = [_cut(_drawable(text), 26) for text in result.input_tokens]
    figure, ax = _axes(None, float(np.clip(len(names) / 4 + 2, 6.4, _WIDEST)), 4.8)
    places = np.arange(len(values))
    for chosen, colour, hatch in (
        (values >= 0, _ORANGE, None),
        (values < 0, _BLUE, "////"),
    ):
        ax.bar(
            places[chosen],
            values[chosen],
            width=0.8 if len(values) < 100 else 1.0,
            color=colour,
            hatch=hatch,
            edgecolor="white" if hatch else None,
        )
    ax.axhline(0, color="black", linewidth=0.8)
    ax.margins(x=0.01)
    _name_ticks(ax, "x", names, _inches(ax)[0])
    ax.tick_params(
        top=True, bottom=False, labeltop=True, labelbottom=False, labelsize=8
    )
    ax.set_ylabel("Sequence Attribution", rotation=90, va="bottom")
    return _shown((figure, ax), show)


def _shown(picture: Picture, show: bool) -> Picture | None:
    if not show:
        return picture
    plt.show()
    return None


# --- bars and lines ------------------------------------------------------------------


def plot_sources(
    result: Explanation, ax: Axes | None = None, *, top: int = 12
) -> Picture:
    """The heaviest sources as bars: one step back against along all paths.

    Args:
        result (GraphAttributionResult): what is drawn.
        ax (matplotlib.axes.Axes, optional): where; saving the figure is yours. Default:
            a new figure
        top (int, optional): number of sources; the others are summed. Default: ``12``

    Returns:
        tuple[Figure, Axes]: as Captum's plots.

    Raises:
        TypeError: if ``top`` is not a whole number.
        ValueError: if it is below 1.
    """
    whole_number("top", top, minimum=1, remedy="Pass the number of sources.")
    is_signed = _signed(result)
    marginal = result.seq_attr.numpy() / _total(result)
    direct = result.direct.seq_attr.numpy() / _total(result)
    order = np.lexsort((-np.abs(direct), -np.abs(marginal)))
    told = np.maximum(np.abs(marginal), np.abs(direct))[order] >= _TOLD
    listed = order[told][:top]
    rest = np.concatenate([order[told][top:], order[~told]])
    names = ["\n".join(_wrapped(_source_name(result, i), 44, 2)) for i in listed]
    series = [direct[listed], marginal[listed]]
    if rest.size:
        names.append(f"{rest.size} more")
        series = [
            np.append(values, whole[rest].sum())
            for values, whole in zip(series, (direct, marginal), strict=True)
        ]
    figure, ax = _axes(ax, 8.5, 0.46 * len(names) + 1.2)
    places = np.arange(len(names))
    looks: tuple[dict[str, Any], ...] = (
        {"color": "white", "edgecolor": _BLUE, "hatch": "////", "linewidth": 0.8},
        {"color": _ORANGE, "edgecolor": _DARK, "linewidth": 0.8},
    )
    labels = ("direct: one step back", f"marginalised: {along(result.hops)}")
    for offset, values, look, label in zip(
        (-0.2, 0.2), series, looks, labels, strict=True
    ):
        bars = ax.barh(places + offset, values, 0.38, label=label, **look)
        texts = [
            percent(value, is_signed, digits=1) if abs(value) >= _TOLD else "0%"
            for value in values
        ]
        ax.bar_label(bars, texts, padding=3, fontsize=8)
    ax.set_yticks(places, labels=names)
    _literal(_tick_labels(ax.yaxis))
    ax.tick_params(axis="y", labelsize=9, length=0)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.margins(x=0.2 if is_signed else 0.12)  # room for numbers beside the bars
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("share of the explained mass")
    ax.spines[["top", "right", *(["left"] if is_signed else [])]].set_visible(False)
    ax.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, fontsize=9, frameon=False
    )
    return figure, ax


def plot_hops(
    result: Explanation,
    ax: Axes | None = None,
    *,
    top: int = 5,
    most: int = 12,
) -> Picture:
    """What has come to the sources after each number of steps through generated units.

    Zero steps are the direct rows. The curves end when nothing more is to be seen.

    Args:
        result (GraphAttributionResult): what is drawn.
        ax (matplotlib.axes.Axes, optional): where; saving the figure is yours. Default:
            a new figure
        top (int, optional): number of sources with a line of their own, those that are
            heaviest in the end. Default: ``5``
        most (int, optional): most steps to draw. Default: ``12``

    Returns:
        tuple[Figure, Axes]: as Captum's plots.

    Raises:
        TypeError: if ``top`` or ``most`` is not a whole number.
        ValueError: if ``top`` is negative or ``most`` below 1.
    """
    whole_number("top", top, remedy="Pass the number of sources.")
    whole_number("most", most, minimum=1, remedy="Pass a number of steps.")
    graph, weights, total = result.graph, result.weights, _total(result)
    open_in_the_end = graph.unresolved(weights)
    after = []
    for number in range(most + 1):
        attr, unresolved = graph.hops(weights, number)
        after.append(attr / total)
        if abs(unresolved - open_in_the_end) <= _ENOUGH * total and number > 0:
            break
    curves = np.array(after)
    listed = np.argsort(-np.abs(curves[-1]), kind="stable")[:top]
    figure, ax = _axes(ax, 8.5, 4.4)
    steps = np.arange(len(curves))
    names = ["all sources"]
    ax.plot(steps, curves.sum(axis=1), color="black", linewidth=3, marker=".")
    for number, source in enumerate(listed):
        ax.plot(
            steps,
            curves[:, source],
            color=_LINES[number % len(_LINES)],
            marker=_MARKERS[number % len(_MARKERS)],
            linestyle=_DASHES[number % len(_DASHES)],
            markersize=5,
        )
        names.append("\n".join(_wrapped(_source_name(result, source), 30, 2)))
    if result.hops is not None and result.hops < len(curves):
        ax.axvline(result.hops, color="#666666", linestyle=":")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlim(-0.15, max(len(curves) - 1, 1) + 0.15)
    ax.set_xlabel("steps through generated units, at most (0: direct)")
    ax.set_ylabel("share of the explained mass")
    ax.grid(axis="y", color="#dddddd")
    ax.spines[["top", "right"]].set_visible(False)
    legend = ax.legend(
        ax.get_lines()[: len(names)],
        names,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        fontsize=9,
    )
    _literal(legend.get_texts())
    return figure, ax


# --- the graph -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A unit, a heading or a gap, as it stands in the picture.

    Attributes:
        unit (int or None): the unit; None for a heading or a gap.
        lines (tuple[str, ...]): its text.
        top (float): in inches from the upper edge.
        height (float): in inches.
    """

    unit: int | None
    lines: tuple[str, ...]
    top: float
    height: float

    @property
    def middle(self) -> float:
        """Where its arcs begin."""
        return self.top + self.height / 2


@dataclass(frozen=True)
class _Edge:
    """Mass that goes from a generated unit to a unit before it."""

    later: int
    earlier: int
    mass: float


def plot_graph(
    result: Explanation,
    ax: Axes | None = None,
    *,
    keep: float = 0.9,
    most: int = 40,
) -> Picture:
    """The units in reading order, and arcs by which their mass flows.

    An arc leads from a later unit back to an earlier one that it rests on, and is as
    wide as the mass that takes it. The heaviest arcs are drawn, until they have the
    share ``keep`` of all mass on arcs or reach more than ``most`` units; what share
    that is stands below. Beside each source stands the mass that ends there, and in
    brackets beside a generated unit that which passes through.

    Args:
        result (GraphAttributionResult): what is drawn.
        ax (matplotlib.axes.Axes, optional): where; its size decides on that of the
            letters, and saving the figure is yours. Default: a new figure
        keep (float, optional): share of the mass on arcs, in (0, 1]. Default: ``0.9``
        most (int, optional): most units to draw. Default: ``40``

    Returns:
        tuple[Figure, Axes]: as Captum's plots.

    Raises:
        TypeError: if ``keep`` is not a number, or ``most`` not a whole one.
        ValueError: if ``keep`` is out of range or ``most`` below 2.
    """
    share = share_to_keep("keep", keep, remedy="Pass 0.9, say.")
    whole_number("most", most, minimum=2, remedy="Pass a number of units.")
    edges, units, told = _heaviest_edges(result, share, most)
    figure: Figure | SubFigure
    if ax is None:
        width, size = 9.0, 9.0
        rows, needed = _laid_out(result, units, width, size)
        height = needed
        figure, ax = plt.subplots(figsize=(width, height))
        figure.set_facecolor("white")
        ax.set_position((0.0, 0.0, 1.0, 1.0))
    else:
        figure = _checked(ax).figure
        width, height = _inches(ax)
        for size in (9.0, 8.0, 7.0, 6.0, 5.0, 4.0):
            rows, needed = _laid_out(result, units, width, size)
            if needed <= height:
                break
        height = max(height, needed)
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    ax.axis("off")
    _draw_rows(ax, result, rows, width, size)
    _draw_arcs(ax, result, edges, {row.unit: row for row in rows}, width)
    room = max(int(width / (0.0078 * size)) - 4, _NARROWEST)
    lines = [line for part in told.split("\n") for line in _wrapped(part, room, 2)]
    ax.text(0.1, needed - 0.1, "\n".join(lines), fontsize=size - 1, va="bottom")
    return figure, ax


def _heaviest_edges(
    result: Explanation, keep: float, most: int
) -> tuple[list[_Edge], list[int], str]:
    """The edges that are drawn, the units that they join, and what share that is."""
    graph = result.graph
    flow = graph.flow(result.weights, hops=result.hops).tocoo()
    order = np.argsort(-np.abs(flow.data), kind="stable")
    whole = float(np.abs(flow.data).sum())
    explained = graph.generated_units[list(result.explained)].tolist()
    units = set(explained if len(explained) <= most // 2 else ())
    edges: list[_Edge] = []
    kept = 0.0
    for entry in order[:_MOST_ARCS]:
        if kept >= keep * whole * (1 - 1e-12):
            break
        later = int(graph.generated_units[flow.row[entry]])
        earlier = int(flow.col[entry])
        if len(units | {later, earlier}) > most:
            break
        units |= {later, earlier}
        edges.append(_Edge(later, earlier, float(flow.data[entry])))
        kept += abs(float(flow.data[entry]))
    share = percent(kept / whole if whole else 1.0, digits=1)
    told = (
        f"{len(edges)} of {len(order)} arcs, with {share} of the mass on arcs; "
        f"{len(units)} of {graph.n_units} units."
    )
    total = _total(result)
    ends, leaked, unresolved = (
        percent(mass / total, digits=1)
        for mass in (float(result.seq_attr.sum()), result.leaked, result.unresolved)
    )
    told += f" To sources {ends}, leak {leaked}, "
    told += f"unresolved {unresolved}.\nAn arc: a later unit "
    told += "rests on an earlier one. In brackets: mass that passes through."
    return edges, sorted(units), told


def _laid_out(
    result: Explanation, units: Sequence[int], width: float, size: float
) -> tuple[list[_Row], float]:
    """Rows of units, headings and gaps, and the height that they need in inches."""
    line = size * 1.3 / 72
    left, right = _text_edges(width, size)
    room = max(int((right - left) / (size * 0.56 / 72)), _NARROWEST)
    first = int(result.graph.generated_units[0])
    rows: list[_Row] = []
    top = 0.12

    def add(unit: int | None, lines: Sequence[str], space: float) -> None:
        nonlocal top
        height = len(lines) * line + 0.4 * line
        rows.append(_Row(unit, tuple(lines), top, height))
        top += height + space

    kinds = [
        "generated" if unit.generated else "prompt" if i < first else "from outside"
        for i, unit in enumerate(result.units)
    ]
    drawn = set(units)
    turns = {0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1])}
    # A unit is drawn, or begins a gap: after a unit that is drawn, or where kinds turn.
    starts = {*drawn, *turns, *(unit + 1 for unit in drawn)} - {len(kinds)}
    for start, stop in pairwise([*sorted(starts), len(kinds)]):
        # Turns between undrawn units would fill the picture with gaps.
        if start in turns and (start == 0 or len(turns) <= _MOST_TURNS):
            top += 0.3 * line
            add(None, [f"[{kinds[start]}]"], 0.1 * line)
        if start in drawn:
            text = _drawable(result.units[start].text.strip()) or "␣"
            add(start, _wrapped(text, room, 3), 0.35 * line)
        else:
            add(None, [_gap(result, start, stop, room)], 0.35 * line)
    return rows, top + 3.9 * line


def _text_edges(width: float, size: float) -> tuple[float, float]:
    """Where the texts begin and end: arcs left of them, numbers right."""
    left = 0.24 * width
    return left, max(width - 11 * size * 0.62 / 72, left + 0.1)


def _gap(result: Explanation, start: int, stop: int, room: int) -> str:
    """A note about units that are not drawn, with what they say."""
    units = result.units[start:stop]
    count = f"{len(units)} unit{'s' if len(units) > 1 else ''}"
    # The middle of a long gap is not shown anyway.
    ends = units if len(units) <= 2 * _QUOTED else (*units[:_QUOTED], *units[-_QUOTED:])
    text = _drawable(" ".join(" ".join(unit.text for unit in ends).split()))
    return f"⋮ {count}: {_cut(text, max(room - len(count) - 4, 8))}"


def _draw_rows(
    ax: Axes, result: Explanation, rows: Sequence[_Row], width: float, size: float
) -> None:
    graph = result.graph
    shares = np.zeros(graph.n_units)
    shares[graph.source_units] = result.seq_attr.numpy()
    # Without the explained units' own weight.
    shares[graph.generated_units] = result.step_attr.numpy() - result.weights
    shares /= _total(result)
    largest = float(np.abs(shares).max(initial=0.0)) or 1.0
    explained = set(graph.generated_units[list(result.explained)].tolist())
    left, right = _text_edges(width, size)
    for row in rows:
        if row.unit is None:
            ax.text(
                left,
                row.middle,
                row.lines[0],
                fontsize=size - 1,
                va="center",
                color="#555555",
                parse_math=False,
                usetex=False,
            )
            continue
        unit = result.units[row.unit]
        is_explained = row.unit in explained
        share = float(shares[row.unit])
        ax.add_patch(
            FancyBboxPatch(
                (left, row.top),
                right - left,
                row.height,
                boxstyle="round,pad=0.0,rounding_size=0.05",
                facecolor=_light(share / largest),
                edgecolor="black" if is_explained else "#888888",
                linewidth=2.2 if is_explained else 0.8,
                linestyle="--" if unit.generated and not is_explained else "-",
            )
        )
        ax.text(
            left + 0.08,
            row.middle,
            "\n".join(row.lines),
            fontsize=size,
            va="center",
            linespacing=1.15,
            parse_math=False,
            usetex=False,
        )
        number = percent(share, _signed(result), digits=1)
        if unit.generated:
            number = f"({number})" if abs(share) >= _TOLD else ""
        if is_explained:
            number = f"\u25c2 explained\n{number}".rstrip()
        ax.text(
            right + 0.08,
            row.middle,
            number,
            fontsize=size - 1,
            va="center",
            fontweight="bold" if not unit.generated else "normal",
            linespacing=1.0,
        )


def _light(part: float) -> tuple[float, float, float]:
    """A ground on which black letters can be read: orange for, blue against."""
    end = np.array(to_rgb("#ffb84d" if part >= 0 else "#8cc4ee"))
    strength = float(np.sqrt(min(abs(part), 1.0)))
    red, green, blue = 1.0 + (end - 1.0) * strength
    return float(red), float(green), float(blue)


def _draw_arcs(
    ax: Axes,
    result: Explanation,
    edges: Sequence[_Edge],
    rows: dict[int | None, _Row],
    width: float,
) -> None:
    left, _ = _text_edges(width, 9.0)
    largest = max((abs(edge.mass) for edge in edges), default=1.0)
    longest = max(
        (rows[edge.later].middle - rows[edge.earlier].middle for edge in edges),
        default=1.0,
    )
    # The widest last, or they would hide the others.
    for edge in sorted(edges, key=lambda edge: abs(edge.mass)):
        start, end = rows[edge.later].middle, rows[edge.earlier].middle
        part = abs(edge.mass) / largest
        reach = (left - 0.2) * (0.12 + 0.88 * np.sqrt((start - end) / longest))
        control = left - reach * 4 / 3  # the curve goes three quarters of the way
        colour = _BLUE if result.units[edge.earlier].generated else _DARK
        ax.add_patch(
            PathPatch(
                Curve(
                    [(left, start), (control, start), (control, end), (left, end)],
                    [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
                ),
                facecolor="none",
                edgecolor=colour,
                linewidth=0.6 + 4.2 * part,
                linestyle="-" if edge.mass > 0 else (0, (2, 1.5)),
                alpha=0.35 + 0.5 * part,
                capstyle="butt",
            )
        )
        ax.plot(
            [left - 0.02],
            [start],
            marker=5,  # a caret that points to the unit which rests on the other
            markersize=4 + 4 * part,
            color=colour,
            linestyle="none",
        )
