"""Looks at the built site as a browser without a network would: every link and anchor leads somewhere, nothing is loaded from elsewhere.
Links to other sites cannot be followed here; they are well-formed, and name hosts that somebody has looked at.

python -m scripts.check_site build/site
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src", "audio": "src", "object": "data"}
"""Elements that make a browser fetch something, and where they say what."""
NOT_FETCHED = {"canonical", "next", "prev", "alternate"}
"""Links of a head that only say where something is."""
ANYWHERE = "404.html"
"""A host shows this page at any address, so its links begin at the root."""
HOSTS = {"keepachangelog.com", "filesystem-spec.readthedocs.io", "docs.ray.io"}
"""Other sites that pages may send a reader to. Who writes a link to another one follows it, and adds its host."""
IN_STYLE = re.compile(r"url\(\s*['\"]?(https?:[^)'\"]+)|@import\s+['\"](https?:[^'\"]+)")


class Page(HTMLParser):
    """What a page names: its anchors, its links, what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {"", "top"}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = {k: v or "" for k, v in attrs}
        self.anchors |= {said[k] for k in ("id", "name") if k in said}
        if tag == "a" and "href" in said:
            self.links.append(said["href"])
        if (where := LOADS.get(tag)) and said.get(where) and not set(said.get("rel", "").split()) & NOT_FETCHED:
            self.loads.append(said[where])


def doubt_of(link: str) -> str | None:
    """What is wrong with a link to another site; None: nothing that can be seen without following it."""
    where = urlsplit(link)
    if where.scheme != "https":
        return "is not https"
    if where.netloc != where.hostname or re.search(r"[\s\"<>\\^`{|}]", link):
        return "is no well-formed address"
    return None if where.hostname in HOSTS else f"names a host that nobody has looked at; follow it, and add {where.hostname} to HOSTS"


def problems(site: Path) -> list[str]:
    """Every finding, as "page: what"."""
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            where = urlsplit(link)
            if where.scheme or where.netloc:
                if link in page.loads and where.scheme != "data":
                    found.append(f"{path.relative_to(site)}: loads {link} from elsewhere")
                elif link not in page.loads and (why := doubt_of(link)):
                    found.append(f"{path.relative_to(site)}: {link} {why}")
                continue
            start = site if path.name == ANYWHERE else path.parent
            target = (start / unquote(where.path).lstrip("/")).resolve() if where.path else path
            if where.path.startswith("/") and path.name != ANYWHERE:
                found.append(f"{path.relative_to(site)}: {link} begins at the root of a host, which a folder does not have")
            elif not (target / "index.html" if target.is_dir() else target).is_file():
                found.append(f"{path.relative_to(site)}: {link} leads nowhere")
            elif where.fragment and target in pages and unquote(where.fragment) not in pages[target].anchors:
                found.append(f"{path.relative_to(site)}: {link} names no anchor of that page")
    for style in sorted(site.rglob("*.css")):
        for match in IN_STYLE.finditer(style.read_text(encoding="utf-8")):
            found.append(f"{style.relative_to(site)}: loads {match[1] or match[2]} from elsewhere")
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    said = problems(folder)
    print("\n".join(said) or f"{len(list(folder.rglob('*.html')))} pages: every link leads somewhere, nothing is loaded from elsewhere")
    sys.exit(bool(said))
