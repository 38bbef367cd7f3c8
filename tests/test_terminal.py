import io
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from captum_cage.draws import DrawnRows
from captum_cage.foils import Foil
from captum_cage.graph import AttributionGraph
from captum_cage.result import GraphAttributionResult
from captum_cage.terminal import TerminalView
from captum_cage.text import harmless, sentence_spans, word_spans
from captum_cage.thinking import Part, Thinking
from captum_cage.units import Unit

PROMPT = "Ana has 3 pens. Leo has 5 cups. Mia has 4 more pens than Ana."
ANSWER = "Mia has 3 + 4 = 7 pens. The answer is 7."
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def units_of(text, spans, generated):
    """Units of a text, by ranges."""
    return [Unit(text[a:b], generated, (a, b)) for a, b in spans]


def made(
    rows, prompt=PROMPT, answer=ANSWER, explain=None, segment=sentence_spans, **more
):
    """A result with these rows, units by a function from text to ranges."""
    sources = units_of(prompt, segment(prompt), False)
    steps = units_of(answer, segment(answer), True)
    normalization = more.pop("normalization", "positive")
    graph = AttributionGraph.from_rows(
        rows, len(sources), normalization, kept=more.pop("kept", None)
    )
    result = GraphAttributionResult(
        graph,
        [*sources, *steps],
        range(len(steps)),
        source_text=prompt,
        generated_text=answer,
        meta={"method": "FeatureAblation", "units": "sentence", "model": "tiny"},
        **more,
    )
    return result if explain is None else result.explaining(explain)


def random_result(prompt, answer, explain=None, segment=word_spans, seed=0, **more):
    """A result with random rows, few of them heavy."""
    P, G = len(segment(prompt)), len(segment(answer))
    rng = np.random.default_rng(seed)
    rows = rng.pareto(1.0, size=(G, P + G)) * rng.choice([1, -1], size=(G, P + G))
    rows[:, P:] = np.tril(rows[:, P:], -1)
    return made(rows, prompt, answer, explain, segment, **more)


def shown(result, width=100, color=None, encoding="utf-8", **options):
    """What a console of this width prints."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(
        file=file, width=width, color_system=color, force_terminal=color is not None
    )
    console.print(TerminalView(result, **options))
    file.flush()
    return raw.getvalue().decode(encoding)


def styles(result, start):
    """Style of each piece of the view that begins so; None for plain text."""
    console = Console(width=160, color_system="truecolor", force_terminal=True)
    found = []
    for segment in console.render(TerminalView(result)):
        if start in segment.text:
            plain = not segment.text.strip().startswith(start) or not segment.style
            found.append(None if plain else segment.style)
    return found


def views(text):
    """What stands in the two columns, white space as single spaces."""
    rows = [line.split("│")[1:3] for line in text.splitlines() if line.count("│") == 3]
    return [" ".join(" ".join(column).split()) for column in zip(*rows, strict=True)]


@pytest.fixture(scope="session")
def long():
    """A prompt of 1,440 words and an answer of 300."""
    prompt = "\n".join(
        " ".join(f"word{line}-{i}" for i in range(12)) for line in range(120)
    )
    answer = " ".join(f"out{i}" for i in range(300))
    return random_result(prompt, answer, explain=slice(200, 240))


@pytest.fixture
def solved():
    """An answer that rests on a step, which rests on two of three facts."""
    return made([[3, 0, 1, 0, 0], [0.5, 0.5, 0, 3, 0]], explain="The answer is 7.")


# Letters, marks and symbols that show nothing.
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"


class TestTexts:
    """Prompt and generated text, twice, with the share behind what matters."""

    def test_both_views_label_units_by_their_share(self, solved):
        """The direct row on the left, all paths on the right, in percent."""
        direct, marginal = views(shown(solved))
        assert "Ana has 3 pens.[12%] Leo has 5 cups.[12%] Mia has 4" in direct
        assert "than Ana. generated" in direct  # nothing directly, so no label
        assert "= 7 pens.[75%] >>The answer is 7.<<" in direct
        assert "Ana has 3 pens.[69%] Leo has 5 cups.[12%] Mia has 4" in marginal
        assert "than Ana.[19%] generated text: what passes through Mia" in marginal
        assert "= 7 pens.[75%] >>The answer is 7.<<" in marginal

    def test_views_stand_side_by_side_where_there_is_room(self, solved):
        """One line has both titles on a wide terminal, and none on a narrow one."""
        both = re.compile("direct: one step back.*marginalised: along all paths")
        assert both.search(shown(solved, 80))
        assert not both.search(shown(solved, 60))
        assert both.search(shown(solved, 60).replace("\n", " "))

    def test_several_explained_units_are_marked_as_one_stretch(self, solved):
        """The marks stand around all of them, and the own weight is not a share."""
        for text in views(shown(solved.explaining(None))):
            assert ">>Mia has 3 + 4 = 7 pens.[38%] The answer is 7.<<" in text

    def test_marks_keep_away_from_special_tokens(self):
        """Those have angle brackets, too."""
        spans = iter([[(0, 3)], [(0, 4), (4, 11)]])
        result = made(
            [[1, 0, 0], [1, 0, 0]], "Ana", "Yes.<|end|>", 0, lambda _: next(spans)
        )
        assert ">>Yes.<< <|end|>" in shown(result)

    def test_layout_is_kept(self):
        """Newlines and indentation stay where they are."""
        code = "def f(x):\n    if x:\n        return x"
        text = shown(random_result(code, "It returns x."), top=0)
        assert re.search(r"│ def f\(x\): +│ def f\(x\): +│\n", text)
        assert re.search(r"│ {5}if x: +│ {5}if x: +│\n", text)
        assert re.search(r"│ {9}return x +│ {9}return x +│\n", text)

    def test_text_that_is_no_unit_is_shown(self):
        """Role headers of a chat are there, without a share."""
        prompt = "<|user|>\nAna has 3 pens.<|end|>"
        spans = iter([[(9, 24)], [(0, 3)]])
        result = made([[1, 0]], prompt, "Yes", segment=lambda _: next(spans))
        text = shown(result)
        assert "│ <|user|> " in text
        assert "Ana has 3 pens.[100%]<|end|>" in text

    def test_pieces_of_a_character_share_its_label(self):
        """Tokens with one range are shown once, with the sum of their shares."""
        sources = [Unit("A", False, (0, 1))]
        sources += [Unit(f"😀[{i}/2]", False, (1, 2)) for i in (1, 2)]
        graph = AttributionGraph.from_rows([[2, 1, 1, 0]], 3)
        units = [*sources, Unit("x", True, (0, 1))]
        result = GraphAttributionResult(
            graph, units, [0], source_text="A😀", generated_text="x"
        )
        assert "A[50%]😀[50%]" in shown(result)

    def test_units_without_a_place_are_listed_behind_the_text(self):
        """Features that are no range of the text have lines of their own."""
        units = [Unit("left half", False, None), Unit("right half", False, None)]
        graph = AttributionGraph.from_rows([[3, 1, 0]], 2)
        result = GraphAttributionResult(
            graph,
            [*units, Unit("x", True, (0, 1))],
            [0],
            source_text="<image>",
            generated_text="x",
        )
        text = shown(result)
        assert re.search(
            r"│ <image> +│.*\n│ left half\[75%\] .*\n│ right half\[25%\] ", text
        )

    def test_signed_shares_have_a_sign(self):
        """Negative shares read as such, in another colour."""
        rows = [[1, 0, -1, 0, 0], [0, 0, 0, 1, 0]]
        result = made(rows, explain=1, normalization="signed")
        assert "Ana has 3 pens.[+50%]" in shown(result)
        assert "than Ana.[-50%]" in " ".join(shown(result, 160).split())
        positive, negative = (styles(result, x)[1] for x in ("Ana has 3", "Mia has 4"))
        assert positive.bgcolor != negative.bgcolor

    def test_heavier_units_have_stronger_shades(self, solved):
        """The heaviest on a coloured ground, lighter ones in coloured letters."""
        heavy, light = styles(solved, "Ana has 3")[1], styles(solved, "Leo has 5")[1]
        assert heavy.bgcolor is not None
        assert (light.bgcolor, light.color is None) == (None, False)
        assert styles(solved, "Mia has 4")[0] is None


class TestLongTexts:
    """A long text is shown in parts, and nothing that matters is left out."""

    def test_it_stays_bounded(self, long):
        """17,000 characters take no more than some screens."""
        assert shown(long).count("\n") < 100

    def test_every_heavy_unit_is_there_with_its_share(self, long):
        """Each of the heaviest sources has its label in the text."""
        text = " ".join(shown(long, 160).split())
        for source in np.argsort(-long.seq_attr.numpy())[:8]:
            share = long.seq_attr[source] / 40
            assert re.search(rf"{long.input_tokens[source]}\[{share:.0%}\]", text)

    def test_the_ends_of_what_is_explained_are_there(self, long):
        """The marks are not in a part that is left out."""
        assert ">>out200 " in shown(long)
        assert "out239<<" in shown(long)

    def test_what_is_left_out_is_counted(self, long):
        """The shown characters and those of the gaps make up the text."""
        text = views(shown(long, 160))[0].partition(" prompt ")[2]
        text = text.partition(" generated text ")[0]
        text = re.sub(r"\[\d+%\]", "", text)
        gaps = [int(n) for n in re.findall(r"\[\.\.\. (\d+)\s+characters", text)]
        seen = re.sub(r"\[\.\.\. \d+\s+characters\s+\.\.\.\]", "", text)
        # Where a gap is, one space stands for the white space that it counts.
        kept = len(" ".join(seen.split())) - len(gaps)
        assert len(gaps) > 3
        assert kept + sum(gaps) == len(long.source_text)


class TestSources:
    """The heaviest sources, direct and marginalised."""

    def test_they_are_listed_by_marginalised_share(self, solved):
        """Each with both numbers."""
        table = shown(solved).split("Sources")[1]
        rows = re.findall(r"^(.+?) +(\d+\.\d%) +(\d+\.\d%)", table, re.MULTILINE)
        assert rows == [
            ("Ana has 3 pens.", "12.5%", "68.8%"),
            ("Mia has 4 more pens than Ana.", "0.0%", "18.8%"),
            ("Leo has 5 cups.", "12.5%", "12.5%"),
        ]

    def test_the_rest_is_summed(self, solved):
        """What is not listed is counted, with its shares."""
        assert re.search(r"2 more +12\.5% +31\.2%", shown(solved, top=1))

    def test_sources_without_a_share_are_not_listed(self):
        """They are among the rest."""
        text = shown(made([[1, 0, 0, 0, 0], [1, 0, 0, 1, 0]], explain=1))
        assert re.search(r"2 more +0\.0% +0\.0%", text)

    def test_known_facts_are_marked(self, solved):
        """A star for each source that overlaps with one."""
        table = shown(solved, truth=[(32, 61)]).split("Sources")[1]
        stars = re.findall(r"^(\w+) .+? ([* ]) +\d+\.\d%", table, re.MULTILINE)
        assert stars == [("Ana", " "), ("Mia", "*"), ("Leo", " ")]

    def test_short_units_are_shown_with_the_words_around_them(self):
        """A number alone would say little."""
        P = len(word_spans(PROMPT))
        rows = np.zeros((1, P + 1))
        rows[0, 6] = 1
        result = made(rows, answer="7", segment=word_spans)
        assert re.search(r"has 3 pens\. Leo has «5» cups\. Mia has", shown(result))
        assert " has <5> cups" in shown(result, encoding="ascii")


class TestPaths:
    """The heaviest paths, in words."""

    def test_a_path_leads_down_a_tree_of_quoted_units(self, solved):
        """From what is explained to the source, where its share stands."""
        lines = shown(solved, paths=1).split("Heaviest paths\n")[1].splitlines()
        assert [line.rstrip() for line in lines[:3]] == [
            ' "The answer is 7."',
            ' └── "Mia has 3 + 4 = 7 pens."',
            '     └── 56.2%  "Ana has 3 pens."',
        ]

    def test_paths_share_what_they_have_in_common(self, solved):
        """They part where they differ, the heaviest first."""
        text = shown(solved, paths=9).split("Heaviest paths\n")[1].split("\n\n")[0]
        paths = solved.paths(9)
        assert len({path.units[0] for path in paths}) == 1
        inner = {path.units[:end] for path in paths for end in range(1, 3)}
        inner -= {path.units for path in paths}
        assert len(text.splitlines()) == len(inner) + len(paths)
        shares = [path.share for path in paths]
        found = [float(share) for share in re.findall(r"([\d.]+)%  ", text)]
        assert sorted(found) == pytest.approx(
            sorted(round(100 * share, 1) for share in shares)
        )

    def test_every_explained_unit_has_a_tree(self):
        """Where the paths begin in several of them."""
        rows = [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
        text = shown(made(rows)).split("Heaviest paths\n")[1]
        assert [line.rstrip() for line in text.splitlines()[:4]] == [
            ' "Mia has 3 + 4 = 7 pens."',
            ' └── 50.0%  "Ana has 3 pens."',
            ' "The answer is 7."',
            ' └── 50.0%  "Leo has 5 cups."',
        ]

    def test_their_ends_can_be_chosen(self, solved):
        """Only paths to sources within some ranges of the prompt."""
        text = shown(solved, ends=[(16, 31), (32, 61)], paths=2).split("Heaviest")[1]
        assert re.findall(r'%  "([^"]+)"\s*$', text, re.MULTILINE) == [
            "Mia has 4 more pens than Ana.",
            "Leo has 5 cups.",
        ]

    def test_a_narrow_terminal_wraps_within_the_tree(self):
        """Its lines go on where the unit begins."""
        text = shown(made([[0] * 5, [0, 0, 1, 0, 0]], explain=1), 30, paths=1)
        lines = [line.rstrip() for line in text.splitlines()]
        start = lines.index(' "The answer is 7."')
        assert lines[start + 1 : start + 3] == [
            ' └── 100.0%  "Mia has 4 more',
            '     pens than Ana."',
        ]

    @pytest.mark.parametrize(("width", "left_out"), [(160, 24), (40, 27), (30, 29)])
    def test_a_long_path_loses_its_middle(self, width, left_out):
        """What is left out is counted; the more, the narrower the terminal is."""
        answer = " ".join(f"w{i}" for i in range(30))
        rows = np.eye(30, 31)
        result = made(rows, "p", answer, explain=-1, segment=word_spans)
        text = shown(result, width).split("Heaviest paths\n")[1].split("\n\n")[0]
        units = re.findall(r'"(\w+)"|\.\.\. (\d+) units \.\.\.', text)
        kept = [name for name, _ in units if name]
        assert [count for _, count in units if count] == [str(left_out)]
        assert len(kept) + left_out == 31
        assert (kept[0], kept[-1]) == ("w29", "p")

    def test_long_paths_that_part_late_part_at_their_notes(self):
        """Each goes on below the note that counts what it left out."""
        answer = " ".join(f"w{i}" for i in range(9))
        rows = np.eye(9, 10)
        rows[1, 0:2] = 4, 6  # the first word may be left out
        result = made(rows, "p", answer, explain=-1, segment=word_spans)
        text = shown(result, 160).split("Heaviest paths\n")[1].split("\n\n")[0]
        lines = [line.rstrip() for line in text.splitlines()]
        notes = [n for n, line in enumerate(lines) if line.endswith("units ...")]
        assert [re.search(r"\d", lines[n])[0] for n in notes] == ["3", "2"]
        # Below each note stand the units of one path, and its share.
        ends = [*notes[1:], len(lines)]
        for start, stop, share in zip(notes, ends, ("60.0%", "40.0%"), strict=True):
            told = " ".join(lines[start + 1 : stop])
            assert told.count("%") == 1
            assert share in told

    def test_a_result_without_mass_says_so(self):
        """No path, all of it leaked."""
        text = shown(made(np.zeros((2, 5)), explain=1))
        assert "No path to a source has any mass." in text
        assert "Mass 0.0%" in text
        assert "Leak 100.0% (rows without mass)" in text


class TestQuestions:
    """What is asked besides: for and against, foils, parts, intervals, checks."""

    def test_for_and_against_stand_apart(self):
        """In a signed graph, each source has a share of both."""
        rows = [[3, 0, -1, 0, 0], [1, 1, 0, -2, 0]]
        text = shown(made(rows, explain=1, normalization="signed"), 120)
        lines = text.splitlines()
        head = next(line for line in lines if line.startswith("Sources"))
        assert head.split()[1:5] == ["direct", "marginalised", "for", "against"]
        first = next(line for line in lines if line.startswith("Ana has 3 pens. "))
        numbers = re.findall(r"[+-]?\d+\.\d%", first)
        assert numbers == ["+25.0%", "-12.5%", "25.0%", "37.5%"]

    def test_a_foil_is_part_of_the_question(self):
        """Without white space around."""
        result = made([[3, 0, 1, 0, 0], [0.5, 0.5, 0, 3, 0]], explain=1)
        result.foils = (Foil(1, " 7", " 9"),)
        assert 'Why: "7" rather than "9"' in shown(result)

    def test_the_share_through_the_thoughts_is_told(self):
        """Where thoughts are marked."""
        result = made([[3, 0, 1, 0, 0], [0.5, 0.5, 0, 3, 0]], explain=1)
        cut = result.generated_text.index(" The answer")
        end = len(result.generated_text)
        result.thinking = Thinking(
            {Part.THINK: ((0, cut),), Part.ANSWER: ((cut, end),)}
        )
        text = " ".join(shown(result).split())
        assert "75.0% through generated text (75.0% through the thoughts)." in text

    def test_intervals_have_a_column(self):
        """Low to high, of each source."""
        rows = np.array([[[3.0, 0, 1, 0, 0], [0.5, 0.5, 0, 3, 0]]] * 3)
        rows[1, 1, 3] = 1.0
        result = made(rows.mean(axis=0), explain=1)
        none = np.zeros(0, dtype=np.int64)
        sources = result.graph.sources
        result.drawn = DrawnRows(rows, none, np.zeros((3, 0, 5)), sources, "positive")
        text = shown(result, 140)
        assert "95% interval" in text
        found = result.intervals(resamples=200)
        assert f"{found.low[0]:.1%} to {found.high[0]:.1%}" in text

    def test_checks_stand_below_the_paths(self, solved):
        """As they describe themselves, harmless."""
        text = shown(solved, checks=["The path holds\x1b[2J: 'a' <- 'b'"])
        assert "The path holds\\x1b[2J: 'a' <- 'b'" in text


class TestFacts:
    """Mass, leak, and how the result was made."""

    def test_mass_is_told_by_its_way(self, solved):
        """Directly, and through generated text."""
        assert (
            "Mass 100.0%: 25.0% directly, 75.0% through generated text. Leak 0.0%, "
            "unresolved 0.0%."
        ) in shown(solved)

    def test_what_is_unresolved_is_told(self):
        """As a part of the explained mass, with the number of rows behind it."""
        rows = [[0, 0, 0, 0, 0], [0.5, 0.5, 0, 3, 0]]
        text = shown(made(rows, explain=1, kept=[0, 1]), 160)
        assert "Mass 25.0%: 25.0% directly" in text
        assert "Leak 0.0%, unresolved 75.0% (rows computed: 1 of 2)." in text

    def test_dropped_entries_are_no_missing_rows(self):
        """All rows were computed, though not all of their mass is there."""
        text = shown(made([[1, 0, 0, 0, 0]] * 2, explain=1, kept=[1, 0.992]), 160)
        assert "Leak 0.0%, unresolved 0.8%." in text
        assert "rows computed" not in text

    def test_rows_that_no_mass_reaches_are_told(self):
        """Nothing is unresolved, though one row was not computed."""
        rows = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
        text = shown(made(rows, explain=1, kept=[0, 1]), 160)
        assert "unresolved 0.0% (rows computed: 1 of 2)." in text

    def test_little_is_not_told_as_nothing(self):
        """A part that would read 0.0% is less than 0.1%."""
        text = shown(made([[1, 0, 0, 0, 0]] * 2, explain=1, kept=[1, 0.9999]), 160)
        assert "Mass 100.0%" in text
        assert "unresolved <0.1%." in text

    def test_how_it_was_made_is_told(self, solved):
        """Model, method, normalisation, units and time."""
        assert (
            "tiny, FeatureAblation, positive normalisation, sentence units (3 in the "
            "prompt, 2 generated, 1 explained), 1.5 s"
        ) in shown(solved, 160, seconds=1.46)

    def test_parts_can_be_left_out(self, solved):
        """No sources and no paths where none are asked for."""
        text = shown(solved, top=0, paths=0)
        assert "Sources" not in text
        assert "path" not in text.split("along all paths")[1]


HOSTILE = (
    "[bold]x[/bold] \x1b[31mred\x07 [/] :smile: a\tb \u202eabc\ud800 \x9b5m [link=x]"
)


class TestHostileText:
    """No text steers the terminal, or the markup of rich."""

    def test_markup_is_text(self):
        """Brackets and emoji codes are shown as they are."""
        text = shown(random_result(HOSTILE, "[red]y"), 160)
        assert text.count("[bold]x[/bold]") >= 2
        assert ":smile:" in text
        assert "[red]y" in text

    def test_controls_are_escaped(self):
        """Escape, bell, bidirectional marks and lone surrogates, everywhere."""
        text = shown(random_result(HOSTILE, HOSTILE, segment=sentence_spans), 160)
        for escaped in (r"\x1b[31mred", r"\x07", r"\u202eabc", r"\ud800", r"\x9b5m"):
            assert text.count(escaped) >= 4
        assert not [
            c
            for c in text
            if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"
        ]

    @given(st.text(), st.booleans())
    def test_harmless_text_has_no_control_characters(self, text, one_line):
        """But newlines and tabs, where several lines are wanted, and joiners."""
        allowed = "\u200c\u200d" if one_line else "\n\t\u200c\u200d"
        for character in harmless(text, one_line=one_line):
            category = unicodedata.category(character)
            assert character in allowed or category not in (
                "Cc",
                "Cf",
                "Cs",
                "Zl",
                "Zp",
            )

    @given(
        st.text(
            st.characters(categories=["L", "N", "P", "S"], exclude_characters=BLANK)
        )
    )
    def test_other_text_is_left_alone(self, text):
        """Letters, digits, punctuation and symbols of all scripts."""
        assert harmless(text) == text

    @pytest.mark.parametrize("character", BLANK)
    def test_blank_letters_are_escaped(self, character):
        """What they hide would not be seen."""
        expected = f"a\\u{ord(character):04x}b"
        assert harmless(f"a{character}b") == expected

    def test_how_it_was_made_is_escaped(self, solved):
        """A file of somebody else may say anything."""
        solved.meta.update(method="\x1b]0;x\x07", units="\u202e", model="\x9b")
        text = shown(solved)
        assert r"\x9b, \x1b]0;x\x07, positive" in text
        assert r"\u202e units" in text


TEXTS = {
    "sentences": (PROMPT, ANSWER),
    "wide characters": ("日本語のテキスト。漢字 😀 かな", "答えは七です。😀"),
    "one long word": ("x" * 300, "y" * 90),
    "hostile": (HOSTILE, HOSTILE),
}


class TestExplained:
    """What is explained, and along which paths."""

    def test_stretches_are_told_one_by_one(self):
        """What stands between them is not part of the question."""
        rows = np.tril(np.ones((4, 5)), 0)
        result = made(rows, "Rain.", "It is. So. Was it? No.")
        graph, units = result.graph, result.units
        for explained, told in (
            ([0, 2, 3], '"It is." and "Was it? No."'),
            ([0, 2], '"It is." and "Was it?"'),
        ):
            asked = GraphAttributionResult(
                graph,
                units,
                explained,
                source_text="Rain.",
                generated_text="It is. So. Was it? No.",
            )
            assert f"Explained: {told}\n" in shown(asked)

    @pytest.mark.parametrize(
        ("hops", "told"),
        [(None, "all paths"), (1, "paths of at most 1 hop"), (2, "paths of at most 2")],
    )
    def test_paths_that_are_cut_are_told(self, hops, told):
        """In the heading of their view."""
        rows = [[3, 0, 1, 0, 0], [0.5, 0.5, 0, 3, 0]]
        assert f"marginalised: along {told}" in shown(made(rows, hops=hops))


class TestWidthAndColour:
    """The same content at every width, with and without colour."""

    @pytest.mark.parametrize("width", [30, 50, 76, 100, 200])
    @pytest.mark.parametrize("text", TEXTS)
    def test_no_line_is_wider_than_the_terminal(self, text, width):
        """And the lines of the frame are all of one width, in cells."""
        lines = shown(random_result(*TEXTS[text]), width).splitlines()
        assert max(map(cell_len, lines)) <= width
        frame = [line for line in lines if line.startswith(("│", "╭", "╰", "├"))]
        assert len({cell_len(line) for line in frame}) == 1

    def test_a_very_wide_terminal_is_not_filled(self, solved):
        """Lines of more than 160 cells are hard to read."""
        assert max(map(cell_len, shown(solved, 300).splitlines())) == 160

    @pytest.mark.parametrize("text", TEXTS)
    def test_colour_says_nothing_that_characters_do_not(self, text):
        """Without its escape codes, the coloured output is the plain one."""
        result = random_result(*TEXTS[text], normalization="signed")
        colored = shown(result, color="truecolor")
        assert ESCAPE.search(colored)
        assert ESCAPE.sub("", colored) == shown(result)

    def test_a_terminal_of_ascii_gets_ascii(self, solved):
        """Frames and bars have other characters there."""
        text = shown(solved, encoding="ascii")
        assert "| direct: one step back" in text
        assert re.search(r' [+`]-- "Mia has 3 \+ 4 = 7 pens\."', text)
        assert re.search(r"68\.8% +#+", text)
