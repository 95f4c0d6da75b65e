"""What mkdocs does not do by itself for the site: pages from outside docs/, links written for a code host, reference made from the code."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from scripts import reference  # noqa: E402

OUTSIDE = ["CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "examples/README.md", "examples/*.yaml"]
"""Files of the project that pages link to. Those in Markdown become pages, all others are served as they are."""
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
MADE = re.compile(r"^<!-- made from the code: (\w+) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add what is outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File(path.relative_to(ROOT).as_posix(), str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put the reference in its places, and make links relative to the site."""
    markdown = MADE.sub(lambda m: getattr(reference, m[1])(), markdown)
    inside = page.file.src_dir == config["docs_dir"]
    here = f"docs/{page.file.src_uri}" if inside else page.file.src_uri
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda m: m[1] + moved(m[2], here, page.file.src_uri) + (m[3] or "") + m[4], text) for text in parts[::2]]
    return "".join(parts)


def moved(link: str, here: str, uri: str) -> str:
    """A link of the file `here`, as it is from the page `uri` of the site: docs/ is the site's root there.

    >>> moved("../examples/README.md", "docs/guide.md", "guide.md"), moved("docs/guide.md", "README.md", "README.md")
    ('examples/README.md', 'guide.md')
    """
    target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    target = "index.md" if target == "README.md" else target.removeprefix("docs/")
    return posixpath.relpath(target, posixpath.dirname(uri) or ".")
