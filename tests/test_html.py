"""The page of a result: what it holds, what it shows, what it computes."""

from __future__ import annotations

import base64
import csv
import hashlib
import html as standard_html
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from scipy.sparse import csr_array

from captum_cage import AttributionGraph, GraphAttributionResult, Unit, html
from captum_cage.foils import Foil
from captum_cage.graph import RowsBehind

FACTS = ["Ana has 3 pens.", "Mia has 4 more pens than Ana.", "It is Monday."]
STEPS = ["Mia has 3 + 4 = 7 pens.", "Indeed.", "The answer is 7."]

HOSTILE = (
    '</script><img src=x onerror="window.pwned=1"> {{ 7 * 7 }} {% raw %} <!-- & &amp; '
    "\u202eoverride\u202c \u2066isolate\u2069 \x07 \x00 \x1b[31m \x7f \x9b \ud800 "
    "\udc00 \u2028 \u200b \U000e0041 .\ufe0f\ufe01 \u3164\n"
    "שלום עולם 123. 👨‍👩‍👧‍👦 🇩🇪 e\u0301.\n\n```python\nreturn {'a': x}\n```\n"
)
HOSTILE_ANSWER = (
    "So </script><script>window.pwned=2</script> <svg onload=window.pwned=3>.\n"
    '    ${window.pwned=4} `x` =HYPERLINK("http://x") שלום, 👩🏿‍🚀 done.'
)
NOTHING = 1e-9  # what Python and the page may differ by


def placed(texts, generated, separator=" "):
    """One text of several, and a unit for each."""
    units, whole = [], ""
    for text in texts:
        whole += separator if whole else ""
        span = (len(whole), len(whole) + len(text))
        units.append(Unit(text, generated, span))
        whole += text
    return whole, units


def result_of(rows, sources, steps, explained, normalization="positive", **more):
    """A result over some texts, whose rows are given."""
    behind, kept = more.pop("behind", None), more.pop("kept", None)
    source_text, source_units = placed(sources, False)
    generated_text, step_units = placed(steps, True)
    graph = AttributionGraph.from_rows(
        rows, len(sources), normalization, behind=behind, kept=kept
    )
    return GraphAttributionResult(
        graph,
        [*source_units, *step_units],
        explained,
        source_text=source_text,
        generated_text=generated_text,
        meta={"method": "by hand", "model": "none", **more.pop("meta", {})},
        **more,
    )


def random_rows(n_sources, n_generated, seed, signed=False):
    """Raw rows, a few heavy entries in each."""
    random = np.random.default_rng(seed)
    rows = np.zeros((n_generated, n_sources + n_generated))
    for step in range(n_generated):
        count = n_sources + step
        rows[step, :count] = random.exponential(size=count) ** 3
        if signed:
            rows[step, :count] *= random.choice([-1, 1], count, p=[0.3, 0.7])
    return rows


def token_result(text, answer, explained, seed=0, **more):
    """A result whose units are short pieces of two texts."""
    pieces = [re.findall(r"\s*\S{1,7}|\s+\Z", part) for part in (text, answer)]
    assert ["".join(part) for part in pieces] == [text, answer]
    units = []
    for part, generated in zip(pieces, (False, True), strict=True):
        spans = pairwise(np.cumsum([0, *map(len, part)]).tolist())
        units += [
            Unit(piece, generated, span)
            for piece, span in zip(part, spans, strict=True)
        ]
    rows = random_rows(len(pieces[0]), len(pieces[1]), seed)
    return GraphAttributionResult(
        AttributionGraph.from_rows(rows, len(pieces[0])),
        units,
        explained,
        source_text=text,
        generated_text=answer,
        meta={"method": "<b>m</b>", "model": "</script>\u202e", "units": "token"},
        **more,
    )


@pytest.fixture
def by_hand():
    """Three facts, a step that uses two of them, and an answer that uses the step."""
    rows = [[3, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0.5, 6, 0.5, 0]]
    return result_of(rows, FACTS, STEPS, [2], meta={"units": "sentence"})


def named(n_sources, n_generated):
    """Texts of sources and of steps."""
    return (
        [f"Fact {i}." for i in range(n_sources)],
        [f"Step {i}." for i in range(n_generated)],
    )


def cases():
    """Results of every kind, by name."""
    signed = random_rows(5, 6, 3, signed=True)
    plain = random_rows(5, 6, 4)
    names = named(5, 6)
    kept = [1, 0.9, 1, 0, 0.5, 1]
    known = plain * (np.array(kept) > 0)[:, None]
    foils = [Foil(4, " 7", " 9"), Foil(5, " x", " y")]
    # Half of it ends in a tool's result, and half passes through an earlier unit.
    tied = np.zeros((9, 9))
    tied[2, 0] = tied[4, 2] = tied[4, 3] = 1
    tied[5:, 4] = 1
    return {
        "plain": result_of(plain, *names, [5]),
        "several": result_of(plain, *names, [1, 4, 5]),
        "absolute": result_of(signed, *names, [5], "absolute"),
        "signed": result_of(signed, *names, [4, 5], "signed"),
        "cut after a hop": result_of(signed, *names, [5], "signed", hops=1),
        "incomplete": result_of(known, *names, [5], kept=kept),
        "contrast": result_of(
            signed,
            *names,
            [4, 5],
            "signed",
            behind={4: plain[4], 5: plain[5]},
            foils=foils,
        ),
        "incomplete contrast": result_of(
            signed,
            *names,
            [4, 5],
            "signed",
            kept=[1, 0.9, 1, 1, 0.5, 0.7],
            behind=RowsBehind(
                np.array([4, 5]), csr_array(plain[[4, 5]]), np.array([0.6, 0.9])
            ),
            foils=foils,
        ),
        "leaking contrast": result_of(
            signed * (np.arange(6) < 5)[:, None],
            *names,
            [4, 5],
            "signed",
            behind={4: plain[4], 5: plain[5]},
            foils=foils,
        ),
        "equal weights": result_of(plain > 0, *names, [5]),
        "equal weights in a trace": trace_result(tied),
        "leaking": result_of(-plain * (np.arange(6) % 2)[:, None] + plain, *names, [5]),
        "trace": trace_result(random_rows(0, 9, 7)),
    }


def trace_result(rows):
    """Two tool results stand between what was generated; a row for each unit."""
    sources, later = placed(["Fact 0.", "Fact 1."], False)
    text, units = placed(
        ["Call.", "Result.", "Then.", "So.", "Result.", "A.", "B."], True
    )
    outside = [1, 4]
    units = [
        Unit(unit.text, place not in outside, unit.span)
        for place, unit in enumerate(units)
    ]
    mask = [True] * 2 + [place in outside for place in range(7)]
    return GraphAttributionResult(
        AttributionGraph.from_rows(rows[~np.array(mask)], mask),
        [*later, *units],
        [4],
        source_text=sources,
        generated_text=text,
    )


class Reader(HTMLParser):
    """What a browser would see of a page, elements and their text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.inside = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        """Note an element."""
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self.inside.append(f"{tag}#{dict(attrs).get('id', '')}")

    def handle_endtag(self, tag):
        """Note where it ends."""
        if tag in ("script", "style", "title"):
            self.inside.pop()

    def handle_data(self, data):
        """Note what stands in it."""
        if self.inside:
            self.text[self.inside[-1]] = self.text.get(self.inside[-1], "") + data


def data_of(page):
    """The data of a page."""
    return json.loads(Reader(page).text["script#data"])


def decoded(text, kind):
    """An array of the data."""
    return np.frombuffer(base64.b64decode(text), dtype=kind)


# --- what the page is ----------------------------------------------------------------


def test_a_page_is_one_file_that_asks_for_nothing(by_hand):
    """No element, style or script names another file."""
    page = by_hand.to_html()
    read = Reader(page)
    names = {name for _, attributes in read.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "style", "background"}
    assert not [name for name in names if name.startswith("on")]
    assert {tag for tag, _ in read.elements}.isdisjoint({"link", "img", "iframe"})
    assert not re.search(r"url\(|@import|@font-face", read.text["style#"])
    assert "://" not in page


def test_the_policy_allows_the_pages_own_script_and_style_only(by_hand):
    """By their hashes, and nothing else; the script never makes markup of a text."""
    read = Reader(by_hand.to_html())
    [policy] = [
        attributes["content"]
        for tag, attributes in read.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))

    def hashed(name):
        digest = hashlib.sha256(read.text[name].encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    assert rules == {
        "default-src": "'none'",
        "script-src": hashed("script#"),
        "style-src": hashed("style#"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\("
    )
    assert not re.search(forbidden, read.text["script#"])


def test_hostile_text_is_data():
    """It makes no element, and what the script reads is what was written."""
    title = "</title><script>window.pwned=5</script> \ud800\x00\u202e"
    result = token_result(HOSTILE, HOSTILE_ANSWER, [1])
    page = result.to_html(title=title)
    page.encode("utf-8")
    plain = Reader(token_result("a b c", "d e f", [1]).to_html())
    read = Reader(page)
    tags = [tag for tag, _ in read.elements]
    others = [tag for tag, _ in plain.elements]
    assert sorted(set(tags)) == sorted(set(others))
    assert tags.count("script") == 2
    assert json.loads(read.text["script#data"])["texts"] == [HOSTILE, HOSTILE_ANSWER]
    assert read.text["title#"].startswith("</title><script>window.pwned=5")
    assert "\\ud800\\x00\\u202e" in read.text["title#"]
    data = page.split('id="data">')[1].split("</script>")[0]
    assert data.isascii()
    assert not set("<>&\x7f") & set(data)


def test_the_data_hold_the_graph_to_the_last_bit(by_hand):
    """Row pointers, columns and shares of the generated rows."""
    told = data_of(by_hand.to_html())
    rows = by_hand.graph.matrix[by_hand.graph.generated_units]
    assert (decoded(told["rows"]["indptr"], "<u4") == rows.indptr).all()
    assert (decoded(told["rows"]["columns"], "<u2") == rows.indices).all()
    assert (decoded(told["rows"]["values"], "<f8") == rows.data).all()
    assert told["rows"]["leak"] == [1]
    assert (told["first"], told["whole"]) == (None, True)


def test_ranges_count_as_scripts_count():
    """A character beyond the basic plane takes two places."""
    told = data_of(token_result("😀 a", "é 😀😀 b", [0]).to_html())
    texts = [text.encode("utf-16-le", "surrogatepass") for text in told["texts"]]
    found = [
        texts[place >= told["cut"]][2 * start : 2 * stop].decode("utf-16-le")
        for place, (start, stop) in enumerate(
            zip(told["starts"], told["stops"], strict=True)
        )
    ]
    assert found == ["😀", " a", "é", " 😀😀", " b"]


def test_larger_units_are_those_of_the_result():
    """The groups sum to what ``by`` gives; larger units than the own are offered."""
    result = token_result("It is so. It was.", "Yes it is. Now 3 + 4 = 7.", [5, 6])
    told = data_of(result.to_html())
    assert [level["name"] for level in told["levels"]] == ["tokens", "sentences"]
    groups = np.array(told["levels"][1]["groups"])[result.graph.source_units]
    sums = np.bincount(groups, result.seq_attr.numpy())
    assert sums == pytest.approx(result.by("sentence").seq_attr.numpy())


def test_no_group_holds_both_kinds():
    """Sentences from outside stand beside generated ones, and keep apart."""
    prompt, turns = "It is so.", ["Is it?", " It is.", " So be it."]
    units = [Unit(prompt[slice(*s)], False, s) for s in ((0, 2), (2, 5), (5, 9))]
    begin = 0
    for number, turn in enumerate(turns):
        for found in re.finditer(r"\s*\S+", turn):
            span = (begin + found.start(), begin + found.end())
            units.append(Unit(found[0], number != 1, span))
        begin += len(turn)
    mask = [not unit.generated for unit in units]
    rows = random_rows(0, len(units), 7)[~np.array(mask)]
    result = GraphAttributionResult(
        AttributionGraph.from_rows(rows, mask),
        units,
        [4],
        source_text=prompt,
        generated_text="".join(turns),
        meta={"units": "word"},
    )
    groups = data_of(result.to_html())["levels"][1]["groups"]
    assert np.unique(groups, return_inverse=True)[1].tolist() == [
        *(0, 0, 0),
        *(2, 2),
        *(1, 1),
        *(3, 3, 3),
    ]


def test_no_larger_units_than_sentences_are_offered(by_hand):
    """Words in sentences, sentences as they are."""
    told = data_of(by_hand.to_html())
    assert [level["name"] for level in told["levels"]] == ["sentences"]


def test_layout_of_a_unit_stays(shown):
    """Also where white space has no end in it; what is around it has no shade."""
    text = " a" + " " * 100_000 + "b \r\n\t"
    units = [Unit(text, False, (0, len(text))), Unit("c", True, (0, 1))]
    graph = AttributionGraph.from_rows([[1, 0]], 1)
    result = GraphAttributionResult(
        graph, units, [0], source_text=text, generated_text="c"
    )
    view = shown(result)
    [inner] = view.locator("#source .u").all_text_contents()
    assert inner == text.strip()
    spaces = view.locator("#source .space").all_text_contents()
    assert spaces == [" ", " \r\n\t"]


def test_the_title_tells_what_is_explained(by_hand):
    """Unless another one is given; a long text is cut."""
    assert Reader(by_hand.to_html()).text["title#"] == (
        "Where “The answer is 7.” comes from"
    )
    assert Reader(by_hand.to_html(title="A <title>")).text["title#"] == "A <title>"
    long = result_of([[1, 0]], ["One."], ["word " * 100], [0])
    assert "…” comes from" in Reader(long.to_html()).text["title#"]


def test_text_from_outside_among_the_generated_has_its_heading(by_hand):
    """A tool's result was not generated."""
    heading = "Generated text and what came in between"
    assert f">{heading}</h2>" in cases()["trace"].to_html()
    assert ">Generated text</h2>" in by_hand.to_html()


def test_the_header_names_what_was_done(by_hand):
    """Model, base method, units, normalisation, version."""
    page = by_hand.to_html()
    for told in ("none", "by hand", "sentence: 3 sources, 3 generated", "positive"):
        assert f"<dd>{told}</dd>" in page
    contrast = cases()["contrast"].to_html()
    assert "'7' rather than '9'" in standard_html.unescape(contrast)


# --- how large it is -----------------------------------------------------------------


@pytest.fixture(scope="module")
def thousand():
    """A result of 1,000 tokens, with complete rows."""
    words = " ".join(f"word{i % 97}." if i % 9 == 0 else "and" for i in range(500))
    return token_result(words, words, [-1 % 500])


def test_a_thousand_tokens_fit_into_a_megabyte(thousand):
    """The heaviest entries of each row stay, as many as fit, and the page says so."""
    assert thousand.graph.n_units >= 1000
    page = thousand.to_html()
    assert 990_000 < len(page.encode()) <= 1_000_000
    assert data_of(page)["whole"] is False
    assert 'id="cut"' in page


def test_a_page_of_any_size_holds_the_whole_graph(thousand):
    """With None for a limit."""
    page = thousand.to_html(max_bytes=None)
    assert data_of(page)["whole"] is True
    rows = thousand.graph.matrix[thousand.graph.generated_units]
    assert (decoded(data_of(page)["rows"]["values"], "<f8") == rows.data).all()


def test_the_graph_of_a_page_has_the_heaviest_entries_of_each_row(thousand):
    """As many as fit, rounded down; what is missing is left out, not lost."""
    graph = thousand.graph
    found = html.fitting_graph(graph, 200_000)
    fitting = (200_000 * 3 // 4 - (graph.n_generated + 1) * (12 + 4)) // 3
    assert 0.999 * fitting <= found.matrix.nnz - graph.n_sources <= fitting
    shares = []
    for unit in graph.generated_units:
        whole, kept = (one.matrix[[unit]].toarray()[0] for one in (graph, found))
        chosen = kept > 0
        assert whole[chosen].min() >= whole[~chosen].max()
        assert (kept <= whole).all()
        assert (kept[chosen] > whole[chosen] * (1 - 2.0**-10)).all()
        shares.append(whole[chosen].sum() - whole[chosen].min())
    # No row holds more than the share that all have, but for its last entry.
    assert max(shares[1:]) <= min(found.kept) + 1e-3
    assert found.kept == pytest.approx(1.0 - found.left_out)
    missing = graph.explain(thousand.weights) - found.explain(thousand.weights)
    assert missing.min() >= -NOTHING
    assert missing.sum() <= found.unresolved(thousand.weights) + NOTHING


@pytest.mark.parametrize("name", ["contrast", "signed", "leaking", "incomplete"])
def test_a_rounded_graph_loses_nothing_but_what_it_leaves_out(name):
    """Rows behind, signs, leaks and rows that were not computed stay."""
    graph = cases()[name].graph
    found = html.fitting_graph(graph, 350)
    assert found is not graph
    assert found.matrix.nnz > graph.n_sources
    assert (found.leak == graph.leak).all()
    assert (found.leak_behind == graph.leak_behind).all()
    assert (found.kept <= graph.kept).all()
    assert (found.kept[graph.kept == 0] == 0).all()
    assert (found.behind is None) == (graph.behind is None)
    entries = found.matrix.toarray()
    filled = (entries != 0) & ~graph.sources[:, None]
    assert entries[filled] == pytest.approx(graph.matrix.toarray()[filled], rel=1e-3)
    for step in range(graph.n_generated):
        weights = np.eye(graph.n_generated)[step]
        missing = graph.explain(weights) - found.explain(weights)
        bound = found.unresolved(weights) - graph.unresolved(weights)
        assert np.abs(missing).sum() <= found.unresolved(weights) + NOTHING
        assert bound >= -NOTHING


def test_rows_keep_at_least_their_heaviest_entry(by_hand):
    """A page cannot be smaller than that."""
    found = html.fitting_graph(by_hand.graph, 1)
    assert np.diff(found.matrix.indptr).tolist() == [1, 1, 1, 1, 0, 1]
    assert found.kept == pytest.approx([0.75, 1.0, 0.75], rel=1e-3)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, "max_bytes: must be 1 or more"),
        (1e6, TypeError, "max_bytes: must be a whole number"),
    ],
)
def test_a_size_is_a_positive_number(by_hand, size, error, message):
    """Or None."""
    with pytest.raises(error, match=message):
        by_hand.to_html(max_bytes=size)


# --- where it goes -------------------------------------------------------------------


def test_a_page_is_written_in_utf_8(tmp_path):
    """The very text that is returned; what stood there is replaced."""
    path = tmp_path / "page é.html"
    path.write_text("old")
    page = token_result(HOSTILE, HOSTILE_ANSWER, [1]).to_html(path)
    assert path.read_bytes() == page.encode("utf-8")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_place_that_cannot_be_written_is_told(by_hand, tmp_path):
    """Before anything else is touched."""
    with pytest.raises(IsADirectoryError, match=r"path: must name a file .* a folder"):
        by_hand.to_html(tmp_path)
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        by_hand.to_html(tmp_path / "no" / "page.html")


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(by_hand):
    """Its script runs and can reach nothing outside."""
    [(tag, attributes)] = Reader(by_hand._repr_html_()).elements
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    assert attributes["srcdoc"] == by_hand.to_html(max_bytes=html.NOTEBOOK_BYTES)


# --- in a browser --------------------------------------------------------------------

ARGUMENTS = (
    "--no-sandbox --headless --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser():
    """Chromium: the system's, or Playwright's own."""
    playwright = pytest.importorskip(
        "playwright.sync_api",
        reason="pages are not looked at: playwright is not installed",
    )
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    with playwright.sync_playwright() as tools:
        try:
            running = tools.chromium.launch(executable_path=found, args=ARGUMENTS)
        except playwright.Error as error:
            reason = str(error).splitlines()[0]
            pytest.skip(f"pages are not looked at: there is no Chromium ({reason})")
        yield running
        running.close()


@pytest.fixture
def shown(browser, tmp_path):
    """Opens the page of a result; no message and no error may come from it."""
    contexts, said = [], []

    def open_page(result, *, width=1200, scheme="light", text=None):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        context.set_default_timeout(300_000)  # ms; a slow machine is no failure
        contexts.append(context)
        view = context.new_page()
        view.on("console", lambda message: said.append(message.text))
        view.on("pageerror", lambda error: said.append(str(error)))
        view.on("request", lambda request: asked.append(request.url))
        path = tmp_path / f"{len(contexts)}.html"
        if text is None:
            result.to_html(path)
        else:
            path.write_text(text, encoding="utf-8")
        view.goto(path.as_uri())
        return view

    asked = []
    yield open_page
    assert [url for url in asked if not url.startswith(("file:", "about:"))] == []
    for context in contexts:
        context.close()
    assert said == []


def settle(view):
    """Wait until the page has drawn what was asked for."""
    view.evaluate("() => new Promise((done) => requestAnimationFrame("
                  "() => requestAnimationFrame(done)))")  # fmt: skip


def selected(view):
    """Steps that are selected."""
    settle(view)
    return view.evaluate("captumCage.selected()")


def expected(graph, steps, hops):
    """The numbers of Python."""
    weights = np.zeros(graph.n_generated)
    weights[steps] = 1.0
    ends = graph.explain_parts(weights, hops=hops)
    through = graph.throughput_parts(weights, hops=hops)
    return {
        "seq_attr": ends.positive - ends.negative,
        "positive_attr": ends.positive,
        "negative_attr": ends.negative,
        "step_attr": graph.throughput(weights, hops=hops),
        "step_positive": through.positive,
        "step_negative": through.negative,
        "leaked": graph.leaked(weights, hops=hops),
        "unresolved": graph.unresolved(weights, hops=hops),
    }


@pytest.mark.parametrize("name", cases())
def test_the_page_computes_what_python_computes(shown, name):
    """Every question about every kind of result, along all paths or some; the paths."""
    result = cases()[name]
    view = shown(result)
    last = result.graph.n_generated - 1
    questions = [*([step] for step in range(last + 1)), [0, last], [last - 1, last]]
    asked = [(steps, hops) for steps in questions for hops in (None, 0, 1, 2, 9)]
    answers = view.evaluate(
        "(asked) => asked.map(([steps, hops]) => captumCage.explain(steps, hops))",
        asked,
    )
    for (steps, hops), answer in zip(asked, answers, strict=True):
        foiled = {foil.unit for foil in result.foils}
        graph = result.graph
        if not foiled <= set(steps):
            graph = graph.without_behind()
        for key, value in expected(graph, steps, hops).items():
            told = np.asarray(answer[key])
            assert told == pytest.approx(value, abs=NOTHING), (steps, hops, key)
    # The same paths in the same order, with the same shares.
    for question in (None, -1, slice(0, 3), slice(2, None)):
        asked = result if question is None else result.explaining(question)
        told = view.evaluate(
            "([k, steps]) => captumCage.paths(k, steps)", [40, list(asked.explained)]
        )
        paths = asked.paths(40)
        assert [tuple(path["units"]) for path in told] == [p.units for p in paths]
        assert [path["share"] for path in told] == pytest.approx(
            [path.share for path in paths], rel=1e-12, abs=NOTHING
        )


def graph_of(page):
    """The graph of a page that holds a part of one, read in the plainest way."""
    told = data_of(page)
    n_units, generated, rows = len(told["starts"]), told["generated"], told["rows"]
    pieces = iter(base64.b64decode(rows["columns"]))
    values = iter(decoded(rows["values"], "<f2").astype(float) / 2**15)
    dense = np.zeros((len(generated), n_units))
    for row, count in enumerate(np.diff(decoded(rows["indptr"], "<u4"))):
        column = 0
        for _ in range(count):
            while (piece := next(pieces)) == 255:
                column += 255
            column += piece
            dense[row, column] = next(values)
    sources = ~np.isin(np.arange(n_units), generated)
    kept = 1.0 - decoded(rows["left_out"], "<f8")
    assert np.abs(dense).sum(1) == pytest.approx(kept)
    return AttributionGraph.from_rows(dense, sources, kept=kept)


def test_numbers_of_a_cut_graph_are_those_of_the_smaller_one(shown, thousand):
    """The page says what that leaves unresolved; no score is too high."""
    page = thousand.to_html()
    view = shown(None, text=page)
    told = view.evaluate("captumCage.explain()")
    steps, graph = list(thousand.explained), graph_of(page)
    for key, value in expected(graph, steps, None).items():
        assert np.asarray(told[key]) == pytest.approx(value, abs=NOTHING)
    share = re.search(r"([\d.]+)% of the mass", view.inner_text("#cut"))[1]
    assert float(share) == pytest.approx(100 * told["unresolved"], abs=0.6)
    missing = thousand.seq_attr.numpy() - np.array(told["seq_attr"])
    assert missing.min() >= -NOTHING
    assert missing.sum() == pytest.approx(told["unresolved"], abs=NOTHING)
    paths = view.evaluate("captumCage.paths(20)")
    best = graph.best_paths(thousand.weights, None, 20)
    assert [path["weight"] for path in paths] == pytest.approx(
        [path.weight for path in best], rel=NOTHING
    )


def test_a_click_asks_about_a_unit_and_escape_goes_back(shown, by_hand):
    """What is shown changes at once: shades, numbers, balance, paths, map."""
    view = shown(by_hand)
    texts = view.locator("#generated .u")
    assert selected(view) == [2]
    assert view.inner_text("#selected") == "The answer is 7."
    texts.nth(0).click()
    assert selected(view) == [0]
    assert view.inner_text("#selected") == STEPS[0]
    assert texts.nth(0).get_attribute("aria-selected") == "true"
    labels = view.locator("#source .label").all_inner_texts()
    assert labels == ["75%", "25%"]
    paths = view.locator("#paths .path")
    assert [paths.nth(i).get_attribute("data-units") for i in (0, 1)] == ["3,0", "3,1"]
    view.keyboard.press("Escape")
    assert selected(view) == [2]
    texts.nth(1).click()
    settle(view)
    assert "100% leaks" in view.inner_text("#balance")
    assert view.inner_text("#leak") == "100%"
    assert "No path leads to a source" in view.inner_text("#paths")
    view.click("#back")
    assert selected(view) == [2]


def test_a_drag_asks_about_a_span(shown):
    """In either direction; with the shift key a click extends."""
    view = shown(token_result("It is so. It was.", "Yes it is. Now 3 + 4 = 7.", [1]))
    texts = view.locator("#generated .u")

    def middle(place):
        box = texts.nth(place).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    view.mouse.move(*middle(5))
    view.mouse.down()
    view.mouse.move(*middle(3), steps=3)
    assert selected(view) == [3, 4, 5]
    view.mouse.move(*middle(2), steps=3)
    view.mouse.up()
    assert selected(view) == [2, 3, 4, 5]
    view.mouse.move(*middle(7))  # the button is up
    assert selected(view) == [2, 3, 4, 5]
    texts.nth(4).click()
    texts.nth(6).click(modifiers=["Shift"])
    assert selected(view) == [4, 5, 6]


def test_a_tap_asks_and_a_scroll_does_not(browser, tmp_path):
    """On a phone, where a finger on the text may be there to move it."""
    words = " ".join(f"word{i}." for i in range(300))
    result = token_result("It is so.", words, [1])
    result.to_html(tmp_path / "page.html")
    with browser.new_context(
        viewport={"width": 400, "height": 700}, has_touch=True
    ) as context:
        view = context.new_page()
        view.goto((tmp_path / "page.html").as_uri())
        texts = view.locator("#generated .u")
        finger = context.new_cdp_session(view)

        def drawn(*points):
            kinds = ["touchStart", *(["touchMove"] * (len(points) - 1)), "touchEnd"]
            for kind, at in zip(kinds, [*points, None], strict=True):
                touches = [] if at is None else [{"x": at[0], "y": at[1]}]
                event = {"type": kind, "touchPoints": touches}
                finger.send("Input.dispatchTouchEvent", event)

        texts.nth(7).tap()
        assert selected(view) == [7]
        scrolled = "document.getElementById('generated').scrollTop"
        box = texts.nth(40).bounding_box()
        drawn(*((box["x"] + 5, box["y"] + 5 - way) for way in range(0, 200, 15)))
        settle(view)
        assert view.evaluate(scrolled) > 50
        assert selected(view) == [7]
        view.reload()  # it may be scrolling still
        boxes = {place: texts.nth(place).bounding_box() for place in range(10, 20)}
        first = min(boxes, key=lambda place: boxes[place]["x"])  # of its line
        y = boxes[first]["y"] + boxes[first]["height"] / 2
        drawn(*((boxes[first]["x"] + way, y) for way in range(5, 250, 40)))
        span = selected(view)
        assert span[0] == first
        assert span[-1] > first + 1


def test_all_can_be_done_by_keyboard(shown):
    """Arrows move, shift extends, enter selects; the focus is seen."""
    view = shown(token_result("It is so. It was.", "Yes it is. Now 3 + 4 = 7.", [1]))
    view.focus("#generated .u[tabindex='0']")
    view.keyboard.press("ArrowRight")
    view.keyboard.press("ArrowRight")
    assert selected(view) == [1]
    view.keyboard.press("Enter")
    assert selected(view) == [2]
    view.keyboard.press("Shift+ArrowRight")
    view.keyboard.press("Shift+ArrowRight")
    assert selected(view) == [2, 3, 4]
    view.keyboard.press("Shift+ArrowLeft")
    assert selected(view) == [2, 3]
    view.keyboard.press("ArrowUp")
    view.keyboard.press("ArrowDown")
    view.keyboard.press("Enter")
    assert selected(view) == [3]  # "Now", where the second sentence begins
    style = view.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert style == "solid"
    assert view.evaluate("document.activeElement.getAttribute('role')") == "option"


def test_the_switches_change_what_is_shown(shown):
    """Paths by their length, mass by its sign, units by their size, shades by mass."""
    result = cases()["signed"]
    view = shown(result)
    sources = range(result.graph.n_sources)

    def numbers(column=5):
        settle(view)
        lines = view.evaluate("captumCage.csv()").splitlines()[1:]
        return [float(lines[unit].split(",")[column]) for unit in sources]

    def choose(name, value):
        view.check(f"input[name={name}][value={value}]", force=True)

    parts = result.graph.explain_parts(result.weights)
    assert numbers() == pytest.approx(result.seq_attr.numpy(), abs=NOTHING)
    assert numbers(6) == pytest.approx(parts.positive, abs=NOTHING)
    assert numbers(7) == pytest.approx(parts.negative, abs=NOTHING)
    choose("sign", "positive")
    assert numbers() == pytest.approx(parts.positive, abs=NOTHING)
    choose("sign", "negative")
    assert numbers() == pytest.approx(parts.negative, abs=NOTHING)
    choose("sign", "net")
    choose("follow", "direct")
    assert numbers() == pytest.approx(result.direct.seq_attr.numpy(), abs=NOTHING)
    view.fill("#hops", "2")
    hops = result.graph.hops(result.weights, 2).attr
    assert numbers() == pytest.approx(hops, abs=NOTHING)
    assert view.is_checked("input[name=follow][value=hops]")
    shaded = view.locator("#source :is(.l1, .l2, .l3, .l4)")
    view.fill("#keep", "100")
    settle(view)
    every = shaded.count()
    view.fill("#keep", "10")
    settle(view)
    assert (shaded.count(), every) == (1, len(sources))
    assert parts.negative.max() > 0
    choose("sign", "negative")
    settle(view)
    assert view.locator("#source .u.minus").count() == 1


def test_what_stands_between_is_not_selected(shown):
    """Neither a tool's result nor a step that was not chosen."""
    result = cases()["trace"].explaining(slice(0, 2))
    view = shown(result)
    assert view.inner_text("#selected") == "Call. … Then."
    assert view.title() == "Where “Call. … Then.” comes from"
    apart = result_of(random_rows(5, 6, 4), *named(5, 6), [0, 1, 5])
    assert shown(apart).inner_text("#selected") == "Step 0. Step 1. … Step 5."


def test_a_selection_that_leaves_the_contrast_says_so(shown):
    """Its numbers are those without it."""
    view = shown(cases()["contrast"])
    assert view.is_hidden("#contrast")
    view.locator("#generated .u").nth(5).click()
    assert selected(view) == [5]
    assert view.is_visible("#contrast")
    view.keyboard.press("Escape")
    settle(view)
    assert view.is_hidden("#contrast")
    assert shown(cases()["plain"]).is_hidden("#contrast")


def test_the_map_follows_the_switch_for_signs(shown):
    """Its arcs as its numbers: what argues against, of all arcs."""
    rows = [[1, 0, 0, 0, 0], [1, -1, 0, 0, 0], [0, 0, 3, 1, 0]]
    result = result_of(rows, FACTS[:2], STEPS, [2], "signed")
    view = shown(result)
    view.fill("#keep", "100")

    def arcs(sign):
        view.check(f"input[name=sign][value={sign}]", force=True)
        settle(view)
        return view.evaluate(
            "[...document.querySelectorAll('#map svg path')]"
            ".map((a) => [+a.dataset.from, +a.dataset.to, a.matches('.minus')])"
        )

    every = [[4, 2, False], [4, 3, False], [2, 0, False], [3, 0, False], [3, 1, True]]
    assert sorted(arcs("net")) == sorted(every)
    assert sorted(arcs("positive")) == sorted(every[:4])
    assert arcs("negative") == [[3, 1, True]]


def test_larger_units_are_shown_with_summed_mass(shown):
    """A click then means all of a sentence, and the page says what the sums are."""
    result = token_result("It is so. It was.", "Yes it is. Now 3 + 4 = 7.", [4, 5])
    view = shown(result)
    view.check("input[name=level][value='1']", force=True)
    settle(view)
    assert view.locator("#source .u").all_inner_texts() == ["It is so.", "It was."]
    assert "added up for display" in view.inner_text("#grouping")
    shares = result.by("sentence").seq_attr.numpy() / 2
    label = view.locator("#source .label").first.inner_text()
    assert label == f"{100 * max(shares):.0f}%"
    view.locator("#generated .u").first.click()
    assert selected(view) == [0, 1, 2]
    assert "solved as tokens" in view.inner_text("#grouping")


@pytest.mark.parametrize("name", ["plain", "signed", "contrast"])
def test_mass_counts_once_for_a_group_that_it_comes_into(shown, name):
    """However many of its units it then passes through."""
    signed = name != "plain"
    rows = random_rows(4, 12, 7, signed=signed)
    behind, foils = {}, []
    if name == "contrast":
        behind, foils = {10: rows[10]}, [Foil(10, " 7", " 9")]
        rows = np.vstack([rows[:10], random_rows(4, 12, 8, signed=True)[10:]])
    graph = AttributionGraph.from_rows(
        rows, 4, "signed" if signed else "positive", behind=behind
    )
    sizes = AttributionGraph.from_rows(
        abs(rows), 4, behind={step: abs(row) for step, row in behind.items()}
    )
    texts = ["Rain fell. Snow fell.", "So it is. Or it was so. Is it not so then?"]
    units = []
    for text, generated in zip(texts, (False, True), strict=True):
        spans = [found.span() for found in re.finditer(r"\s*\S+", text)]
        units += [Unit(text[slice(*span)], generated, span) for span in spans]
    result = GraphAttributionResult(
        graph,
        units,
        [9, 10],
        source_text=texts[0],
        generated_text=texts[1],
        meta={"units": "word"},
        foils=foils,
    )
    view = shown(result)
    view.check("input[name=level][value='1']", force=True)
    settle(view)
    flows = [one.flow(result.weights).toarray() for one in (graph, sizes)]
    found = view.evaluate("captumCage.groups()")
    assert [len(group["units"]) for group in found] == [2, 2, 3, 4, 5]
    shares = []
    for group in found:
        outside = [step for step in range(12) if step + 4 not in group["units"]]
        net, size = (flow[np.ix_(outside, group["units"])].sum() / 2 for flow in flows)
        assert group["mass"] == pytest.approx(net, abs=NOTHING)
        shares.append([(size + net) / 2, (size - net) / 2])
    for place, sign in enumerate(["positive", "negative"] if signed else []):
        view.check(f"input[name=sign][value={sign}]", force=True)
        settle(view)
        masses = [group["mass"] for group in view.evaluate("captumCage.groups()")]
        wanted = [share[place] for share in shares]
        assert masses == pytest.approx(wanted, abs=NOTHING)


def test_both_texts_are_read_by_keyboard(shown):
    """Numbers of the prompt and of text from outside, which nothing selects."""
    view = shown(cases()["trace"])
    view.focus("#source .u[tabindex='0']")
    view.keyboard.press("ArrowRight")
    assert "Fact 1." in view.inner_text("#readout")
    view.keyboard.press("Enter")
    assert selected(view) == [4]
    view.keyboard.press("ArrowRight")  # there is no further one in this text
    assert "Fact 1." in view.inner_text("#readout")
    view.focus("#generated .u[tabindex='0']")
    view.keyboard.press("ArrowRight")
    assert "Result." in view.inner_text("#readout")
    view.keyboard.press("Enter")
    assert selected(view) == [4]
    view.keyboard.press("Shift+ArrowRight")
    assert selected(view) == [1]


def test_more_paths_keep_the_one_that_was_chosen(shown):
    """And the focus goes to the first new one."""
    view = shown(result_of(random_rows(5, 9, 3), *named(5, 9), [8]))
    view.locator("#paths .path").nth(1).click()
    view.click("#more")
    paths = view.locator("#paths .path")
    assert paths.count() == 10
    assert paths.nth(1).get_attribute("aria-pressed") == "true"
    assert view.locator(".path.lit").count() == 1
    assert view.evaluate("document.activeElement.dataset.path") == "5"
    view = shown(result_of([[5, 4, 3, 2, 1, 0]], *named(5, 1), [0]))
    view.locator("#paths .path").nth(1).click()
    view.click("#more")
    assert view.is_disabled("#more")  # there are five
    assert paths_pressed(view) == ["false", "true", "false", "false", "false"]


def paths_pressed(view):
    """Which paths were chosen to stay lit."""
    paths = view.locator("#paths .path")
    return [paths.nth(i).get_attribute("aria-pressed") for i in range(paths.count())]


def test_a_path_lights_up_where_it_is_pointed_at(shown, by_hand):
    """And stays lit when it is clicked."""
    view = shown(by_hand)
    view.locator("#paths .path").first.hover()
    lit = view.locator(".u.lit")
    assert lit.all_inner_texts() == [FACTS[0], STEPS[0], STEPS[2]]
    assert view.locator("#arcs path").count() == 2
    view.mouse.move(0, 0)
    assert lit.count() == 0
    view.locator("#paths .path").nth(1).click()
    view.mouse.move(0, 0)
    assert lit.count() == 3
    assert view.locator("#paths .path").first.inner_text().split("\n")[0] == "56%"


def test_a_path_of_words_is_told_in_sentences(shown):
    """In which its own words stand out, those of one sentence together."""
    result = token_result("It is so. It was.", "Yes it is. Now 3 + 4 = 7.", [8])
    view = shown(result)
    [path] = result.paths(1)
    first = view.locator("#paths .path").first
    told = first.locator("b").all_inner_texts()
    assert sorted(told) == sorted(text.strip() for text in path.texts)
    sentences = {"It is so.", "It was.", "Yes it is.", "Now 3 + 4 = 7."}
    assert set(first.locator(".words").all_inner_texts()) <= sentences


def test_light_paths_have_arcs_where_they_are_pointed_at(shown):
    """Those of less than a tenth of the heaviest one's share."""
    rows = [[9, 1, 0, 0], [0, 0.5, 10, 0]]
    view = shown(result_of(rows, ["Fact 0.", "Fact 1."], ["Step.", "End."], [1]))
    assert view.locator("#paths .path").count() == 3
    assert view.locator("#arcs path").count() == 3  # End, Step, Fact 0 and Fact 1
    view.locator("#paths .path").nth(2).hover()
    assert view.locator("#arcs path").count() == 1
    view.mouse.move(0, 0)
    view.uncheck("#arcs-on")
    assert view.locator("#arcs path").count() == 0


def test_the_map_stays_readable_with_sixty_sentences(shown):
    """Few arcs, no row higher than a line, rows without mass folded."""
    sources = [f"Fact {i} of {'many ' * 30}." for i in range(25)]
    steps = [f"Step {i} of {'many ' * 30}." for i in range(35)]
    result = result_of(random_rows(25, 35, 5), sources, steps, [34])
    view = shown(result)
    rows = view.locator("#map .row")
    assert view.locator("#map svg path").count() <= 60
    assert rows.count() + view.locator("#map .gap").count() <= 60
    heights = view.evaluate(
        "[...document.querySelectorAll('.row')].map((r) => r.offsetHeight)"
    )
    assert max(heights) < 32
    rows.nth(rows.count() - 2).click()
    assert selected(view) != [34]


def test_hostile_text_does_nothing_in_a_browser(shown):
    """It is read as it was written, what cannot be seen is named, nothing runs."""
    title = "</title><script>window.pwned=5</script>"
    text = token_result(HOSTILE, HOSTILE_ANSWER, [1]).to_html(title=title)
    view = shown(None, text=text)
    assert view.evaluate("window.pwned") is None
    assert view.evaluate("document.images.length") == 0
    told = view.evaluate("document.getElementById('source').textContent")
    codes = "E0041 FE01 202E 2066 0007 0000 001B 009B D800 DC00 2028 200B 3164"
    for code in codes.split():
        assert f"U+{code}" in told
    assert not set(told) & set("\u202e\u2066\x07\x00\x1b\x9b\u2028\u200b\u3164")
    assert "{{ 7 * 7 }}" in told
    assert "👨‍👩‍👧‍👦" in told
    for place in range(view.locator("#generated .u").count()):
        view.evaluate("(step) => captumCage.timed([step])", place)
    assert view.evaluate("window.pwned") is None
    assert view.title() == title
    code = view.locator("#source .u.code")
    assert "return" in "".join(code.all_inner_texts())


def test_copied_numbers_are_a_table_of_all_units(shown, by_hand):
    """Exact numbers, and texts that no spreadsheet takes for formulas."""
    view = shown(token_result(HOSTILE, HOSTILE_ANSWER, [1]))
    lines = list(csv.DictReader(io.StringIO(view.evaluate("captumCage.csv()"))))
    texts = [json.loads(line["text_json"]) for line in lines]
    assert "".join(texts) == HOSTILE + HOSTILE_ANSWER
    assert all(line["text_json"].startswith('"') for line in lines)
    view = shown(by_hand)
    view.context.grant_permissions(["clipboard-read", "clipboard-write"])
    view.click("#copy")
    view.wait_for_function("document.getElementById('done').value")
    assert view.inner_text("#done") == "Copied 6 lines."
    copied = view.evaluate("navigator.clipboard.readText()")
    lines = list(csv.DictReader(io.StringIO(copied)))
    ends = [float(line["all_paths"]) for line in lines]
    assert ends[:3] == pytest.approx(by_hand.seq_attr.numpy(), abs=NOTHING)
    through = by_hand.step_attr.numpy() - by_hand.weights
    assert ends[3:] == pytest.approx(through, abs=NOTHING)
    direct = [float(line["direct"]) for line in lines]
    assert direct[:3] == pytest.approx(by_hand.direct.seq_attr.numpy(), abs=NOTHING)
    assert [line["selected"] for line in lines] == ["0", "0", "0", "0", "0", "1"]


def test_several_pages_in_a_notebook_do_not_disturb_each_other(shown, by_hand):
    """Each has its own frame; there the numbers are shown where none can be copied."""
    frames = by_hand._repr_html_() + cases()["plain"]._repr_html_()
    view = shown(None, text=f"<!doctype html><meta charset=utf-8>{frames}")
    one, two = (frame for frame in view.frames if frame != view.main_frame)
    one.locator("#generated .u").first.click()
    settle(one)
    assert one.evaluate("captumCage.selected()") == [0]
    assert two.evaluate("captumCage.selected()") == [5]
    one.click("#copy")
    one.wait_for_selector("#numbers[open]")
    assert one.input_value("#csv").startswith("unit,kind,selected")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_follow_the_colour_scheme_and_fit_a_phone(shown, tmp_path, scheme):
    """Nothing is wider than the page, whatever the text."""
    wide = token_result(HOSTILE + "x" * 300, HOSTILE_ANSWER, [1])
    view = shown(wide, width=400, scheme=scheme)
    assert view.evaluate("document.documentElement.scrollWidth") <= 400
    paper = view.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", paper)[:3])) > 3 * 128
    assert light is (scheme == "light")
    picture = tmp_path / f"{scheme}.png"
    view.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 10_000


def test_two_thousand_tokens_are_explained_by_a_click(shown):
    """At once; benchmarks/page.py measures how long it takes."""
    words = " ".join(f"word{i % 97}." if i % 9 == 0 else "and" for i in range(1000))
    view = shown(token_result(words, words, [900]))
    view.locator("#generated .u").nth(500).click()
    assert selected(view) == [500]
    assert view.locator("#paths .path").count() == 5
