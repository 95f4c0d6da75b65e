"""Markdown and plain text files as rows of text: cut at headings, then at paragraphs, into pieces of bounded size.

A row is one section (its heading with what follows); a heading without a body goes with the next section. A section longer than
`ROW_CHARS` is cut between paragraphs, a paragraph longer than that between lines, sentences or words, and where there are none, in the
middle of a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

TEXT_SUFFIXES = (".md", ".markdown", ".txt")
ROW_CHARS = 1500
"""About 400 tokens of English: several rows fit a usual max_length, and a row still holds a thought."""

_HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")
_FENCE = re.compile(r" {0,3}(```|~~~)")
_BREAKS = ("\n", ". ", "? ", "! ", "。", "; ", ", ", " ")


def text_files(folder: Path) -> list[Path]:
    """The text files below `folder`, sorted by path; hidden files and folders are left out."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def split_document(text: str, *, markdown: bool) -> Iterator[tuple[int, str]]:
    """Yield (line number of its first line, text) for each row of a document. markdown: lines that start with `#` are headings."""
    start, kept = 1, ""
    for line, block, heads in _blocks(text, markdown):
        joined = f"{kept}\n\n{block}" if kept else block
        if kept and (len(joined) > ROW_CHARS or (heads and not _is_bare_heading(kept, markdown))):
            yield start, kept
            start, kept = line, block
        else:
            start, kept = (start if kept else line), joined
        while len(kept) > ROW_CHARS:
            at = _break(kept)
            yield start, kept[:at].rstrip()
            start, kept = start + kept[:at].count("\n"), kept[at:].lstrip()
    if kept:
        yield start, kept


def _blocks(text: str, markdown: bool) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, paragraph, whether it is a heading). Fenced code is one paragraph, blank lines and `#` comments included."""
    start, block, fence = 1, list[str](), ""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip()
        heads = markdown and not fence and _HEADING.match(line) is not None
        if (heads or (not line and not fence)) and block:
            yield start, "\n".join(block), False
            block = []
        if heads:
            yield number, line.strip(), True
        elif line or fence:
            start = start if block else number
            block.append(line)
        if markdown and (mark := _FENCE.match(line)) and fence in ("", mark[1]):
            fence = "" if fence else mark[1]
    if block and any(block):
        yield start, "\n".join(block).rstrip(), False


def _is_bare_heading(text: str, markdown: bool) -> bool:
    return markdown and all(_HEADING.match(line) for line in text.split("\n") if line)


def _break(text: str) -> int:
    """Where to cut an over-long text: after the last line, else sentence, else word that ends in its second half within `ROW_CHARS`."""
    for mark in _BREAKS:
        at = text.rfind(mark, ROW_CHARS // 2, ROW_CHARS)
        if at >= 0:
            return at + len(mark)
    return ROW_CHARS
