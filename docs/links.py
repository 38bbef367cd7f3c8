"""Whether all links of the built site lead somewhere, without the network.

``python docs/links.py build/site`` prints those that do not, and then fails. A relative
link leads to a file, and what stands after its ``#`` to an element of that file. A link
to another site is only looked at: it is https and names a host. Pictures, scripts and
styles all come with the site.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADED = {"img", "script", "source", "iframe", "video", "audio", "embed"}
_HOST = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)+(:\d+)?", re.IGNORECASE)


class Page(HTMLParser):
    """The links and the anchors of a page.

    Attributes:
        links (list[tuple[str, bool]]): each link, and whether the page loads it.
        anchors (set[str]): what a link to the page may name.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, bool]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each element."""
        found = dict(attrs)
        for name in ("id", "name") if tag == "a" else ("id",):
            if value := found.get(name):
                self.anchors.add(value)
        if (source := found.get("src")) is not None:
            self.links.append((source, tag in _LOADED))
        if (target := found.get("href")) is not None:
            loaded = tag == "link" and found.get("rel") in {"stylesheet", "preload"}
            self.links.append((target, loaded))


@cache
def read(path: Path) -> Page:
    """A page, parsed."""
    return Page(path.read_text(encoding="utf-8"))


def fault(page: Path, link: str, loaded: bool) -> str | None:
    """What is wrong with a link, or None."""
    if link != link.strip() or re.search(r"\s", link):
        return "has white space in it"
    parts = urlsplit(link)
    if parts.scheme in {"data", "mailto"}:
        return None
    if parts.scheme or parts.netloc:
        if loaded:
            return "is loaded from the network"
        if parts.scheme != "https" or not _HOST.fullmatch(parts.netloc):
            return "is no https address"
        return None
    path = page.parent / unquote(parts.path) if parts.path else page
    if path.is_dir():
        path /= "index.html"
    if not path.is_file():
        return "leads to no file"
    anchor = unquote(parts.fragment)
    if anchor and path.suffix == ".html" and anchor not in read(path).anchors:
        return "leads to no place in that file"
    return None


def pages(site: Path) -> list[Path]:
    """The pages of a site; the theme's own templates are none of them."""
    static = site / "_static"
    return sorted(page for page in site.rglob("*.html") if static not in page.parents)


def dead_links(site: Path) -> Iterator[str]:
    """A line for each link of a folder's pages that leads nowhere."""
    for page in pages(site):
        for link, loaded in dict.fromkeys(read(page).links):
            if found := fault(page, link, loaded):
                yield f"{page.relative_to(site)}: {link!r} {found}"


def main(site: Path) -> int:
    """Print what is dead; the exit code."""
    dead = list(dead_links(site))
    count = len(pages(site))
    lines = [*dead, f"{count} pages, {len(dead)} dead links"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if dead or not count else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
