"""Markdown and text become rows of bounded size that together hold the whole document, each with the line where it starts."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data import Source, read_source
from trimtab.data.documents import ROW_CHARS, split_document
from trimtab.errors import DataError

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = """# Top

## Part one
First.

Second.
```
# no heading

code
```
## Part two
Third.
"""


def test_markdown_splits_at_headings():
    rows = list(split_document(PAGE, markdown=True))
    assert [line for line, _ in rows] == [1, 12]
    assert rows[0][1].startswith("# Top\n\n## Part one\n\nFirst.\n\nSecond.\n```\n# no heading\n\ncode\n```")
    assert rows[1][1] == "## Part two\n\nThird."


def test_text_splits_at_paragraphs_only_where_it_must():
    assert list(split_document("# a\n\nb\n", markdown=False)) == [(1, "# a\n\nb")]
    paragraphs = ["x" * 600] * 5
    rows = list(split_document("\n\n".join(paragraphs), markdown=False))
    assert [line for line, _ in rows] == [1, 5, 9] and all(len(text) <= ROW_CHARS for _, text in rows)


def test_long_paragraphs_split_at_sentences_words_or_anywhere():
    for text in ("A sentence of words. " * 200, "word " * 800, "字" * 4000, "line of text\n" * 300):
        rows = [t for _, t in split_document(text, markdown=True)]
        assert all(0 < len(t) <= ROW_CHARS for t in rows) and "".join("".join(rows).split()) == "".join(text.split())
    lines = list(split_document("line of text\n" * 300, markdown=False))
    assert lines[1][0] == lines[0][1].count("\n") + 2


@given(st.text(st.sampled_from("ab# `\n\t.字"), max_size=400) | st.text(max_size=200), st.booleans())
def test_nothing_is_lost_and_lines_are_right(text, markdown):
    text = text.replace("\r", "")
    rows = list(split_document(text, markdown=markdown))
    assert "".join("".join(t for _, t in rows).split()) == "".join(text.split())
    for line, row in rows:
        assert row and "".join(text.split("\n")[line - 1].split())[:1] == "".join(row.split())[:1]


def test_folder(tmp_path):
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / ".hidden").mkdir()
    for name in ("b.md", "sub/a.txt", ".hidden/c.md", "d.png", "empty.md"):
        (tmp_path / "docs" / name).write_bytes(b"" if name == "empty.md" else b"\xef\xbb\xbf# T\r\n\r\nbody\r\n")
    (tmp_path / "docs" / "z.md").write_bytes(b"# fine\n\nyes\n\n# not\n\ncaf\xe9\n")
    rows, dropped = read_source(Source("docs"), tmp_path)
    assert [(r.origin, r.text) for r in rows] == [
        ("docs/b.md:1", "# T\n\nbody"),
        ("docs/sub/a.txt:1", "# T\n\nbody"),
        ("docs/z.md:1", "# fine\n\nyes"),
    ]
    assert [(d.origin, d.reason) for d in dropped] == [("docs/z.md:5", "not UTF-8: byte 0xe9 in text")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.jsonl").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"(?s)holds no \.md.*it holds rows\.jsonl"):
        read_source(Source("other"), tmp_path)


def test_the_examples_read():
    sources = [Source(str(p.relative_to(EXAMPLES))) for p in sorted(EXAMPLES.glob("desks/*/*.jsonl"))]
    sources += [Source("halyard/docs"), Source("halyard/guides"), Source("halyard/docs/api.md"), Source("halyard/guides/refunds.txt")]
    sources += [Source("halyard/tickets.csv", columns={"prompt": "question", "completion": "answer"})]
    counts = {}
    for source in sources:
        rows, dropped = read_source(source, EXAMPLES)
        assert not dropped
        counts[source.path] = len(rows)
    assert counts["desks/support/train.jsonl"] == 240 and counts["halyard/tickets.csv"] == 68 and min(counts.values()) >= 1
