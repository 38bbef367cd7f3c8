"""A result on a terminal: shaded texts, sources and paths, as rich renderables.

Everything that colour says is said in characters too, so that a pipe, a file or a
terminal without colour shows the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.typing import ArrayLike
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from captum_cage.explanation import along, explained_texts
from captum_cage.result import GraphAttributionResult, TextPath
from captum_cage.text import Span, harmless, percent
from captum_cage.thinking import Part
from captum_cage.units import Unit

__all__ = ["TerminalView", "harmless"]

Shares = npt.NDArray[np.float64]
_Sides: TypeAlias = tuple[Shares, Shares]  # of units before generated text, and after

SIDES = (0, 1)  # prompt, generated text

WIDEST = 160  # cells
SIDE_BY_SIDE = 76  # cells; the two views stand one above the other below that
WITH_BARS = 64  # cells; the table of sources has no bars below that

# Shade by the part of the largest share on its side: (from, positive, negative). The
# weakest shade colours the letters and the others the ground, so that the order holds
# on dark and light terminals; orange and blue differ for colour-blind readers too.
_SHADES = (
    (0.50, "bold black on #ff9d2e", "bold white on #2f6fc4"),
    (0.20, "black on #fdd9a0", "black on #b9d4f5"),
    (0.05, "#d07000", "#3b82d6"),
)
_FIXED = "dim"  # text that is present but not attributed
_EXPLAINED = ("bold underline", ">>", "<<")

# Around a unit in its context, and in bars.
_MARKS, _ASCII = ("«", "»", "█"), ("<", ">", "#")

_LABELLED = 0.005  # shares that round to 0% get no label
_LISTED = 0.0005  # sources that would read 0.0% are not listed
_WHOLE_TEXT = 1_600  # characters; longer texts are shown in parts
_AROUND = 60  # characters that are kept around what matters
_SHORT_UNIT = 12  # characters; the table shows such units with the words around them
_LONGEST_PATH = 8  # units; longer paths lose their middle, on narrow terminals more
_LONGEST_BAR = 16  # cells
_RESAMPLES = 200  # for intervals
_MOST_STRETCHES = 3  # of explained text that are quoted


@dataclass(frozen=True)
class TerminalView:
    """A result as it is shown on a terminal.

    A rich renderable: ``rich.print(TerminalView(result))``. It shows prompt and
    generated text twice, with the direct and with the marginalised attribution, then
    the heaviest sources, the heaviest paths and what became of the mass. Shares are
    parts of the explained mass.

    Attributes:
        result (GraphAttributionResult): what is shown.
        top (int): number of sources that are listed, and of units that are labelled
            in each text. Default: ``8``
        paths (int): number of paths. Default: ``3``
        seconds (float or None): how long it took, if that is to be shown.
        truth (Collection[Span]): character ranges of the prompt that are known to
            matter; sources that overlap with one are marked. Default: none
        ends (Collection[Span]): character ranges of the prompt; only paths to sources
            that overlap with one are shown. Default: none, paths to any source
        checks (Collection): what `verify_path` found, shown below the paths.
            Default: none
    """

    result: GraphAttributionResult
    top: int = 8
    paths: int = 3
    seconds: float | None = None
    truth: Collection[Span] = ()
    ends: Collection[Span] = ()
    checks: Collection[object] = ()

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """Yield the parts, as wide as the console allows."""
        width = min(options.max_width, WIDEST)
        parts = [self._question(), self._texts(width), self._legend()]
        if self.top:
            parts.append(self._sources(width, _ASCII if options.ascii_only else _MARKS))
        if self.paths:
            parts.append(self._paths(width))
        parts.append(self._facts())
        for number, part in enumerate(parts):
            if number:
                yield ""
            yield from console.render(part, options.update(width=width))

    @cached_property
    def _total(self) -> float:
        return float(self.result.weights.sum())

    @cached_property
    def _views(self) -> tuple[_View, _View]:
        """Shares one step back, and along all paths that count."""
        result = self.result
        _, to_generated = result.graph.blocks()
        direct = self._by_side(result.direct.seq_attr, result.weights @ to_generated)
        # Without the explained units' own weight.
        through = result.step_attr.numpy() - result.weights
        marginal = self._by_side(result.seq_attr, through)
        if self._outside:
            headings = ("before the first generated text", "after it")
            what = "after it: what ends there or passes through"
        else:
            headings = ("prompt", "generated text")
            what = "generated text: what passes through"
        return (
            _View("direct: one step back", headings, direct),
            _View(f"marginalised: {along(result.hops)}", (headings[0], what), marginal),
        )

    @property
    def _cut(self) -> int:
        """Number of units before the first generated one."""
        return int(self.result.graph.generated_units[0])

    @property
    def _outside(self) -> bool:
        """Whether units from outside stand after generated text, as in a trace."""
        return self._cut < self.result.graph.n_sources

    def _by_side(self, of_sources: ArrayLike, of_steps: ArrayLike) -> _Sides:
        """Shares of the explained mass, in the order of the units."""
        graph = self.result.graph
        shares = np.zeros(graph.n_units)
        shares[graph.source_units] = of_sources
        shares[graph.generated_units] = of_steps
        shares /= self._total
        return shares[: self._cut], shares[self._cut :]

    @cached_property
    def _source_text(self) -> _Layout:
        return _Layout.of(self.result.source_text, self.result.units[: self._cut], ())

    @cached_property
    def _generated_text(self) -> _Layout:
        places = self.result.graph.generated_units[list(self.result.explained)]
        return _Layout.of(
            self.result.generated_text,
            self.result.units[self._cut :],
            (places - self._cut).tolist(),
        )

    @property
    def _signed(self) -> bool:
        return self.result.graph.normalization == "signed"

    # --- what is explained ----------------------------------------------------------

    def _question(self) -> RenderableType:
        texts = explained_texts(self.result)
        question = Text("Explained: ", "bold")
        if len(texts) <= _MOST_STRETCHES:
            quoted = [_quoted(text, 160 // len(texts)) for text in texts]
            question.append(" and ".join(quoted))
        else:
            count = len(self.result.explained)
            whole = self.result.graph.n_generated
            question.append(f"{count} of {whole} generated units")
        for foil in self.result.foils:
            question.append("\nWhy: ", "bold")
            question.append(
                f"{_quoted(foil.target.strip(), 80)} rather than "
                f"{_quoted(foil.text.strip(), 80)}"
            )
        return question

    # --- the texts -----------------------------------------------------------------

    def _texts(self, width: int) -> RenderableType:
        layouts = (self._source_text, self._generated_text)
        labelled = [
            [
                _labelled(layouts[side].summed(view.shares[side]), self.top)
                for side in SIDES
            ]
            for view in self._views
        ]
        # Parts and scale are the same in both views, so that they can be compared.
        shown = [layouts[i].shown([each[i] for each in labelled]) for i in SIDES]
        largest = [
            max(float(np.abs(view.shares[i]).max(initial=0.0)) for view in self._views)
            for i in SIDES
        ]
        columns: list[list[RenderableType]] = []
        for view, chosen in zip(self._views, labelled, strict=True):
            cells: list[RenderableType] = [Text(view.title, "bold")]
            for i in SIDES:
                text = layouts[i].render(
                    view.shares[i],
                    labelled=chosen[i],
                    shown=shown[i],
                    largest=largest[i],
                    signed=self._signed,
                )
                cells.append(Group(Text(view.headings[i], "dim italic"), text))
            columns.append(cells)
        if width < SIDE_BY_SIDE:
            return Group(*(_framed([column]) for column in columns))
        return _framed(columns)

    def _legend(self) -> RenderableType:
        return Text(">>explained<<  unit[share of the explained mass]", "dim")

    # --- the sources ---------------------------------------------------------------

    def _source_places(self) -> list[tuple[int, _Stretch, int]]:
        """Side, stretch and its number of all places where sources stand."""
        found = []
        for side, layout in enumerate((self._source_text, self._generated_text)):
            for number, stretch in enumerate(layout.stretches):
                first = stretch.units[0] + side * self._cut
                if not self.result.units[first].generated:
                    found.append((side, stretch, number))
        return found

    def _sources(self, width: int, marks: tuple[str, str, str]) -> RenderableType:
        opened, closed, block = marks
        places = self._source_places()
        direct, marginal = (
            np.array([view.shares[side][list(s.units)].sum() for side, s, _ in places])
            for view in self._views
        )
        order = np.lexsort((-np.abs(direct), -np.abs(marginal)))
        told = (np.abs(marginal) + np.abs(direct) >= _LISTED)[order]
        listed, rest = order[told][: self.top], order[told][self.top :]
        rest = np.concatenate([rest, order[~told]])
        bar = 0 if width < WITH_BARS else min(width // 8, _LONGEST_BAR)
        numbers = [len("direct"), len("marginalised")]
        more = self._more_columns(places)
        columns = [*([len("true fact")] if self.truth else []), *numbers]
        columns += [max(len(title), 5) for title in more]
        columns += [bar] if bar else []
        left = width - sum(columns) - 2 * len(columns)
        layouts = (self._source_text, self._generated_text)
        texts = []
        for i in listed:
            side, _, number = places[i]
            texts.append(layouts[side].in_context(number, left, opened, closed))
        longest = max((text.cell_len for text in texts), default=0)
        table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        table.add_column(
            "Sources",
            no_wrap=True,
            overflow="ellipsis",
            width=max(min(longest, left), len("Sources")),
        )
        if self.truth:
            table.add_column("true fact", justify="center", no_wrap=True)
        for title, cells in zip(("direct", "marginalised"), numbers, strict=True):
            table.add_column(title, justify="right", no_wrap=True, min_width=cells)
        for title in more:
            table.add_column(title, justify="right", no_wrap=True)
        if bar:
            table.add_column("", width=bar)
        largest = np.abs(marginal).max(initial=0.0)
        for i, text in zip(listed, texts, strict=True):
            row: list[RenderableType] = [text]
            if self.truth:
                side, _, number = places[i]
                is_true = side == 0 and layouts[0].overlaps(number, self.truth)
                row.append("*" if is_true else "")
            row.append(percent(direct[i], self._signed, digits=1))
            row.append(Text(percent(marginal[i], self._signed, digits=1), "bold"))
            row += [cells[i] for cells in more.values()]
            if bar:
                length = round(bar * abs(marginal[i]) / largest) if largest else 0
                row.append(Text(block * length, _bar_style(marginal[i])))
            table.add_row(*row)
        if len(rest):
            row = [Text(f"{len(rest)} more", "dim")]
            if self.truth:
                row.append("")
            row.append(percent(direct[rest].sum(), self._signed, digits=1))
            row.append(percent(marginal[rest].sum(), self._signed, digits=1))
            table.add_row(*row, style="dim")
        return table

    def _more_columns(
        self, places: Sequence[tuple[int, _Stretch, int]]
    ) -> dict[str, list[str]]:
        """What argues for and against, and intervals, where there are any."""
        result = self.result
        more: dict[str, list[str]] = {}
        if self._signed:
            for title, attr in (
                ("for", result.positive_attr),
                ("against", result.negative_attr),
            ):
                sides = self._by_side(attr, np.zeros(result.graph.n_generated))
                more[title] = [
                    percent(sides[side][list(s.units)].sum(), digits=1)
                    for side, s, _ in places
                ]
        # Intervals of several units do not add up.
        if result.drawn is not None and all(len(s.units) == 1 for _, s, _ in places):
            found = result.intervals(resamples=_RESAMPLES)
            none = np.zeros(result.graph.n_generated)
            low, high = (self._by_side(end, none) for end in (found.low, found.high))
            more[f"{found.level:.0%} interval"] = [
                f"{percent(low[side][s.units[0]], self._signed, digits=1)} to "
                f"{percent(high[side][s.units[0]], self._signed, digits=1)}"
                for side, s, _ in places
            ]
        return more

    # --- the paths -----------------------------------------------------------------

    def _found_paths(self) -> list[TextPath]:
        if not self.ends:
            return self.result.paths(self.paths)
        layout = self._source_text
        found = [
            path
            for number, stretch in enumerate(layout.stretches)
            if layout.overlaps(number, self.ends)
            for source in stretch.units
            for path in self.result.paths(self.paths, source)
        ]
        return sorted(found, key=lambda path: -abs(path.weight))[: self.paths]

    def _paths(self, width: int) -> RenderableType:
        """A tree for each explained unit: its paths, up to where they part."""
        found = self._found_paths()
        longest = int(np.clip((width - 20) // 4, 3, _LONGEST_PATH))
        branches: dict[_Place, Tree] = {}
        roots = []
        for path in found:
            branch: Tree | None = None
            for place, label in _steps(path, longest):
                if place.units == path.units:
                    share = percent(path.share, self._signed, digits=1)
                    label = Text.assemble((share, "bold"), "  ", label)
                if place not in branches:
                    if branch is None:
                        branches[place] = Tree(label, guide_style="dim")
                        roots.append(branches[place])
                    else:
                        branches[place] = branch.add(label)
                branch = branches[place]
        title = "Heaviest paths" if found else "No path to a source has any mass."
        parts: list[RenderableType] = [Text(title, "bold")]
        parts += [Padding(root, (0, 0, 0, 1)) for root in roots]
        for check in self.checks:
            parts += ["", Text(harmless(str(check)))]
        return Group(*parts)

    # --- mass, and how it was made -------------------------------------------------

    def _facts(self) -> RenderableType:
        result, signed = self.result, self._signed
        graph = result.graph
        direct, mass = (
            float(attr.sum()) / self._total
            for attr in (result.direct.seq_attr, result.seq_attr)
        )
        leak = percent(result.leaked / self._total, signed, digits=1)
        unresolved = percent(result.unresolved / self._total, digits=1)
        if result.unresolved > 0 and not float(unresolved[:-1]):
            unresolved = "<0.1%"
        explained = len(result.explained)
        units = result.meta.get("units", "own")
        where = "from outside" if self._outside else "in the prompt"
        how = [
            str(result.meta.get("method", "unknown method")),
            f"{graph.normalization} normalisation",
            f"{units} units ({graph.n_sources} {where}, {graph.n_generated} "
            f"generated, {explained} explained)",
        ]
        if "model" in result.meta:
            how.insert(0, str(result.meta["model"]))
        if self.seconds is not None:
            how.append(f"{self.seconds:.1f} s")
        parts = [
            percent(part, signed, digits=1) for part in (mass, direct, mass - direct)
        ]
        thoughts = ""
        if result.thinking.spans[Part.THINK]:
            through = result.share_through(Part.THINK)
            thoughts = f" ({percent(through, digits=1)} through the thoughts)"
        why = " (rows without mass)" if float(leak[:-1]) else ""
        rows = result.rows_computed
        if rows < graph.n_generated:
            unresolved += f" (rows computed: {rows} of {graph.n_generated})"
        facts = Text(f"Mass {parts[0]}", "bold")
        facts.append(
            f": {parts[1]} directly, {parts[2]} through generated text{thoughts}. "
            f"Leak {leak}{why}, unresolved {unresolved}.",
            "not bold",
        )
        return Group(facts, Text(harmless(", ".join(how), one_line=True), "dim"))


class _Place(NamedTuple):
    """Where a step of a path stands in a tree.

    Attributes:
        units (tuple[int, ...]): of the path, up to and with this step.
        dropped (int): how many of them a note stands for.
    """

    units: tuple[int, ...]
    dropped: int = 0


def _steps(path: TextPath, longest: int) -> Iterator[tuple[_Place, Text]]:
    """The units of a path, quoted, each with its place; a note in between."""
    head, dropped = longest // 2, len(path.units) - longest + 1
    for number, text in enumerate(path.texts, 1):
        units = path.units[:number]
        if dropped <= 1 or number <= head:
            yield _Place(units), Text(_quoted(text, 100))
        elif number == head + dropped:
            yield _Place(units, dropped), Text(f"... {dropped} units ...", "dim")
        elif number > head + dropped:
            yield _Place(units, dropped), Text(_quoted(text, 100))


class _View(NamedTuple):
    """One way to attribute: its title, and for each side its heading and its shares."""

    title: str
    headings: tuple[str, str]
    shares: _Sides  # of the explained mass


@dataclass(frozen=True)
class _Stretch:
    """A stretch of text and the units that stand there."""

    span: Span
    units: tuple[int, ...]
    explained: bool


@dataclass(frozen=True)
class _Layout:
    """A text and where its units stand in it.

    Attributes:
        text (str): the text.
        stretches (tuple[_Stretch, ...]): one for each place where units stand, in
            reading order. Units without a place stand behind the text.
    """

    text: str
    stretches: tuple[_Stretch, ...]
    placed: int  # number of stretches within the text proper

    @classmethod
    def of(cls, text: str, units: Sequence[Unit], explained: Sequence[int]) -> _Layout:
        # Tokens that are pieces of one character share its range.
        places: dict[Span, list[int]] = {}
        for number, unit in enumerate(units):
            if unit.span is not None and unit.span[0] < unit.span[1] <= len(text):
                places.setdefault(unit.span, []).append(number)
        stretches = []
        covered: set[int] = set()
        end = 0
        for (start, stop), members in sorted(places.items()):
            if stop > end:
                span = (max(start, end), stop)
                known = not set(explained).isdisjoint(members)
                stretches.append(_Stretch(span, tuple(members), known))
                covered.update(members)
                end = stop
        placed = len(stretches)
        for number, unit in enumerate(units):
            if number not in covered:
                start = len(text) + 1 if text else 0
                text = f"{text}\n{unit.text}" if text else unit.text
                span = (start, len(text))
                stretches.append(_Stretch(span, (number,), number in explained))
        return cls(text, tuple(stretches), placed)

    def summed(self, shares: Shares) -> Shares:
        """Share of each stretch."""
        return np.array([shares[list(s.units)].sum() for s in self.stretches])

    def overlaps(self, stretch: int, ranges: Collection[Span]) -> bool:
        """Whether a stretch shares a character with one of the ranges."""
        start, stop = self.stretches[stretch].span
        return any(start < b and a < stop for a, b in ranges)

    def in_context(self, number: int, width: int, opened: str, closed: str) -> Text:
        """A stretch on one line, with the words around it where it is short."""
        start, stop = self.stretches[number].span
        text = self.text[start:stop]
        if number >= self.placed or len(text.strip()) >= _SHORT_UNIT:
            return Text(harmless(" ".join(text.split()), one_line=True))
        if text.strip():
            start += len(text) - len(text.lstrip())
            stop -= len(text) - len(text.rstrip())
        around = max((width - (stop - start)) // 2 - 5, 0)
        before = self.text[max(0, start - around) : start]
        after = self.text[stop : stop + around]
        if start > around:
            before = "..." + before.partition(" ")[2]
        if stop + around < len(self.text):
            after = after.rpartition(" ")[0] + "..."
        line = Text(harmless(before, one_line=True), "dim")
        unit = harmless(self.text[start:stop], one_line=True)
        line.append(f"{opened}{unit}{closed}", "not dim bold")
        line.append(harmless(after, one_line=True))
        return line

    def shown(self, labelled: Sequence[Collection[int]]) -> npt.NDArray[np.bool_]:
        """Which characters of a long text are shown: those near to what matters."""
        count = len(self.text)
        if count <= _WHOLE_TEXT:
            return np.ones(count, dtype=bool)
        shown = np.zeros(count, dtype=bool)

        def keep(start: int, stop: int) -> None:
            shown[max(start, 0) : max(stop, 0)] = True

        keep(0, 2 * _AROUND)
        for number in set().union(*labelled):
            start, stop = self.stretches[number].span
            keep(start - _AROUND, min(stop, start + 4 * _AROUND))
            keep(max(start, stop - _AROUND), stop + _AROUND)
        for number, stretch in enumerate(self.stretches):
            if stretch.explained:
                if number == 0 or not self.stretches[number - 1].explained:
                    keep(stretch.span[0] - _AROUND, stretch.span[0] + 2 * _AROUND)
                if stretch is self.stretches[-1] or (
                    not self.stretches[number + 1].explained
                ):
                    keep(stretch.span[1] - 2 * _AROUND, stretch.span[1] + _AROUND)
        for first, end in _runs(~shown):
            gap = self.text[first:end]
            # Parts end with whole words; a short gap is as long as the note about it.
            words = re.search(r"\s.*\s", gap, re.DOTALL)
            if words is None or words.end() - words.start() < _AROUND:
                shown[first:end] = True
            else:
                shown[first : first + words.start()] = True
                shown[first + words.end() : end] = True
        return shown

    def render(
        self,
        shares: Shares,
        *,
        labelled: Collection[int],
        shown: npt.NDArray[np.bool_],
        largest: float,
        signed: bool,
    ) -> Text:
        """The text in its own layout, shaded and labelled by share."""
        out = Text(overflow="fold", tab_size=4)
        summed = self.summed(shares)
        style, opened, closed = _EXPLAINED
        end = 0
        last_explained = False
        for number, stretch in enumerate(self.stretches):
            start, stop = stretch.span
            fixed = self.text[end:start]
            # White space between units is shown as it is, and so is a fixed text
            # that the explained units do not reach across.
            self._append(out, end, start, shown, _FIXED if fixed.strip() else "")
            text = self.text[start:stop]
            lead = start + len(text) - len(text.lstrip())
            trail = max(stop - len(text) + len(text.rstrip()), lead)
            self._append(out, start, min(lead, stop), shown, "")
            if stretch.explained and not last_explained:
                out.append(opened, "bold")
            shade = _shade(summed[number], largest)
            if stretch.explained:
                shade = f"{shade} {style}".strip()
            self._append(out, lead, trail, shown, shade)
            if number in labelled:
                label = percent(summed[number], signed)
                out.append(f"[{label}]", "bold")
            following = self.stretches[number + 1 : number + 2]
            if stretch.explained and not (following and following[0].explained):
                out.append(closed, "bold")
                if self.text[trail : trail + 1].strip():
                    out.append(" ")  # or << and <|end|> would run together
            last_explained = stretch.explained
            self._append(out, trail, stop, shown, "")
            end = stop
        tail = self.text[end:]
        self._append(out, end, len(self.text), shown, _FIXED if tail.strip() else "")
        out.rstrip()
        lead = len(out.plain) - len(out.plain.lstrip("\n"))
        # The space that parts generated text from the prompt is no layout.
        lead += out.plain[lead : lead + 1] == " "
        return out[lead:]

    def _append(
        self,
        out: Text,
        start: int,
        stop: int,
        shown: npt.NDArray[np.bool_],
        style: str,
    ) -> None:
        """Add what is shown of a range, and a note where a gap begins."""
        position = start
        while position < stop:
            same = shown[position:stop] == shown[position]
            run = stop if same.all() else position + int(np.argmin(same))
            if shown[position]:
                out.append(harmless(self.text[position:run]), style or None)
            elif position == 0 or shown[position - 1]:
                gap = _first_run(~shown[position:])
                out.append(f" [... {gap} characters ...] ", "dim italic")
            position = run


def _runs(mask: npt.NDArray[np.bool_]) -> Iterator[Span]:
    """Ranges in which a mask is true."""
    padded = np.concatenate([[False], mask, [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1])
    for start, stop in edges.reshape(-1, 2):
        yield int(start), int(stop)


def _first_run(mask: npt.NDArray[np.bool_]) -> int:
    """How many entries are true before the first that is not."""
    return len(mask) if mask.all() else int(np.argmin(mask))


def _labelled(shares: Shares, top: int) -> frozenset[int]:
    """The heaviest stretches, without those that would read 0%."""
    order = np.argsort(-np.abs(shares), kind="stable")[:top]
    return frozenset(int(i) for i in order if abs(shares[i]) >= _LABELLED)


def _framed(columns: Sequence[Sequence[RenderableType]]) -> Table:
    """Columns of equal width in a frame, the first row their titles."""
    table = Table(
        box=box.ROUNDED, show_header=False, show_lines=True, expand=True, padding=(0, 1)
    )
    for _ in columns:
        table.add_column(ratio=1, overflow="fold")
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table


def _shade(share: float, largest: float) -> str:
    part = abs(share) / largest if largest else 0.0
    for least, positive, negative in _SHADES:
        if part >= least:
            return positive if share > 0 else negative
    return ""


def _bar_style(share: float) -> str:
    return "#ff9d2e" if share >= 0 else "#3b82d6"


def _quoted(text: str, longest: int) -> str:
    """A text in quotation marks, on one line, without its middle where it is long."""
    core = re.sub(r"\s*\n\s*", " ", text.strip()) or text
    if len(core) > longest:
        core = f"{core[: longest - 25].rstrip()} ... {core[-20:].lstrip()}"
    return f'"{harmless(core, one_line=True)}"'
