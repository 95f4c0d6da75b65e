"""CSV against Python's own csv module where it is well formed; where it is broken, never a row that is not one of the file's records."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.common import write_jsonl
from trimtab.data import Source, read_source
from trimtab.data.delimited import read_delimited
from trimtab.data.rows import Dropped
from trimtab.errors import DataError

MAPPED = {"prompt": "q", "completion": "a"}
CELLS = st.text(st.sampled_from('ab ,;"\n\r\t'), max_size=9)
TABLES = st.integers(2, 3).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=9))


def records(text: str) -> list[dict[str, str]]:
    return [found[1] for found in read_delimited(text, "t.csv") if not isinstance(found, Dropped)]


def written(table: list[list[str]], delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL, end: str = "\n") -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(table)
    return out.getvalue()


def read(tmp_path: Path, content: bytes | str, columns: dict[str, str] | None = None, name: str = "t.csv"):
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    rows, dropped = read_source(Source(name, columns=MAPPED if columns is None else columns), tmp_path)
    return [(r.prompt, r.completion) for r in rows], {d.origin: d.reason for d in dropped}


FORMS = [(quoting, end) for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL) for end in ("\r\n", "\n", "\r")]
FORMS = [(q, e) for q, e in FORMS if q == csv.QUOTE_ALL or e == "\r\n"]  # Python 3.11 quotes no line break that is not the file's own


@settings(max_examples=300, deadline=None)
@given(TABLES, st.sampled_from(",;\t"), st.sampled_from(FORMS))
def test_well_formed_files_read_as_the_csv_module_reads_them(table, delimiter, form) -> None:
    header = [f"c{i}" for i in range(len(table[0]))]
    text = written([header, *table], delimiter, *form)
    wanted = [dict(zip(header, row, strict=True)) for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    assert records(text) == wanted[1:]


@st.composite
def broken(draw):
    """(records, text): a well-formed file in which one quote is lost, added, or not doubled."""
    words = st.text(st.sampled_from('xyz ,"\n'), max_size=8)
    table = [[f"r{i}{draw(words)}", draw(words)] for i in range(draw(st.integers(1, 8)))]
    head, text = "q,a\n", written(table, quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
    quotes = [i for i, c in enumerate(text) if c == '"']
    if quotes and draw(st.booleans()):
        at = draw(st.sampled_from(quotes))
        return [tuple(row) for row in table], head + text[:at] + text[at + 1 :]
    at = draw(st.integers(0, len(text)))
    return [tuple(row) for row in table], f'{head}{text[:at]}"{text[at:]}'


@settings(max_examples=800, deadline=None)
@given(broken())
def test_one_quote_too_many_or_too_few_never_makes_a_row_of_the_inside_of_a_record(case) -> None:
    table, text = case
    found = []
    try:
        for item in read_delimited(text, "t.csv"):
            if not isinstance(item, Dropped):
                found.append((item[1]["q"], item[1]["a"]))
    except DataError as error:
        assert str(error).startswith("t.csv:")
    assert [row for row in found if row not in table] == [], text


def test_a_field_is_as_long_as_it_is(tmp_path) -> None:
    ticket = "a line, with a comma\n" * 8000
    rows, dropped = read(tmp_path, written([["q", "a"], ["x", "y"], [ticket, "z"], ["v", "w"]], quoting=csv.QUOTE_ALL))
    assert rows == [("x", "y"), (ticket, "z"), ("v", "w")] and not dropped


UNDOUBLED = {
    "in one line": ('"The "Pro" plan",no\n', 2),
    "before a line break": ('"He wrote: "it broke"\nthen I left","Answer"\n', 2),
    "at the start of a line": ('"He wrote:\n"it broke" and left","Answer"\n', 2),
    "at the end of a field": ('"He said "yes"","Answer"\n', 2),
    "at the end of a record": ('"question","He said "yes""\n', 2),
    "in a field with doubled ones": ('"He said ""yes"" and "no", then left","Answer"\n', 2),
    "an inch": ('"a 5" disk, and more","Answer"\n', 2),
    "in the last field": ('"question","say "yes", then\nclose it"\n', 2),
    "in a field without quotes": ('a 5" disk,"fits"\n', 2),
    "lost behind the first field": ('"question,"Answer"\n', 2),
}


@pytest.mark.parametrize("name", UNDOUBLED)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_broken_record_goes_with_its_line_and_the_next_whole_one_is_read(tmp_path, name, quoting) -> None:
    bad, line = UNDOUBLED[name]
    good = [[f"g{i}, it says", f"h{i}"] for i in range(20)]
    for before in (0, 7, 20):
        rows, dropped = read(tmp_path, "q,a\n" + written(good[:before], quoting=quoting) + bad + written(good[before:], quoting=quoting))
        assert f"t.csv:{line + before}" in dropped and all("quote" in reason for reason in dropped.values())
        assert set(rows) <= set(map(tuple, good))
        assert rows[-1:] == [tuple(good[-1])] and len(rows) >= 18, (rows, dropped)


@pytest.mark.parametrize("inside", ['"He said "hi"\\n"bye","Answer"\\n', '"r0 a b",""no"\\n"5"\\n"no""\\n'])
def test_several_quotes_that_are_not_doubled_make_no_row_either(tmp_path, inside) -> None:
    good = [("g, 0", "h0"), ("g, 1", "h1"), ("g, 2", "h2")]
    rows, _ = read(tmp_path, "q,a\n" + inside + written([list(row) for row in good]))
    assert rows and rows == good[-len(rows) :]


def test_text_of_a_broken_record_that_looks_like_a_record_is_no_row(tmp_path) -> None:
    inside = '"He pasted "this"\n"no","yes"\nand left","Answer"\n'
    rows, _ = read(tmp_path, "q,a\n" + inside + written([[f"g, {i}", "h"] for i in range(9)]))
    assert ("no", "yes") not in rows and ("g, 8", "h") in rows
    with pytest.raises(DataError, match=r"t\.csv:2 holds a quote that is not doubled, and where the next row begins is not certain"):
        read(tmp_path, 'q,a\n"He said "no,yes\n",",","\n')
    with pytest.raises(DataError, match=r"t\.csv:2 opens a quote that is never closed"):
        read(tmp_path, 'q,a\n"never closed,A\nQ,A\n')


def test_headers_as_helpdesks_write_them(tmp_path) -> None:
    """Repeated and nameless columns that nothing uses, delimiters inside of quotes, Excel's first line, short rows, old line ends."""
    jira = "Summary,Comment,Comment,Labels,Labels,Description\ns,c1,c2,l1,,d\n"
    assert read(tmp_path, jira, {"prompt": "Description", "completion": "Summary"})[0] == [("d", "s")]
    with pytest.raises(DataError, match="names a column twice: Comment"):
        read(tmp_path, jira, {"prompt": "Description", "completion": "Comment"})
    assert read(tmp_path, "q,a,,\nx,y,,\nz,w,,extra\n")[0] == [("x", "y"), ("z", "w")]
    assert read(tmp_path, "q,,a,\nx,,y,\n")[0] == [("x", "y")]
    assert read(tmp_path, "q,a,note\nx,y\nz,w,n\n")[0] == [("x", "y"), ("z", "w")]
    assert read(tmp_path, "q,a\nx,y,,\nz,w,more\n") == ([("x", "y")], {"t.csv:3": "not CSV: 3 fields where the header has 2"})
    assert read(tmp_path, '"q";"a, b, c, d"\n"x";"y"\n', {"prompt": "q", "completion": "a, b, c, d"})[0] == [("x", "y")]
    assert read(tmp_path, '"q\tof\tthe","a"\nx,y\n', {"prompt": "q\tof\tthe", "completion": "a"})[0] == [("x", "y")]
    for line in ("sep=;\n", '"sep=;"\r\n', "\ufeffsep=;\n", "SEP=;\n"):
        assert read(tmp_path, line + "q;a,b\nx;y\n", {"prompt": "q", "completion": "a,b"})[0] == [("x", "y")]
    assert read(tmp_path, "sep=|\nq|a\nx,1|y\n")[0] == [("x,1", "y")]
    assert read(tmp_path, 'q,a\rx,"y\rz"\r"v",w')[0] == [("x", "y\rz"), ("v", "w")]
    assert read(tmp_path, "\n\nq,a\n\n\nx,y\n,\n") == ([("x", "y")], {})
    with pytest.raises(DataError, match="is not a header"):
        read(tmp_path, '"q,"a"\nx,y\n')


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_spreadsheets_unicode_text_is_read(tmp_path, encoding) -> None:
    mark = "" if encoding == "utf-16" else "\ufeff"
    raw = (mark + 'q\ta\r\nwo ist\tdaß €\r\n"x\ny"\tz\r\n').encode(encoding)
    assert read(tmp_path, raw)[0] == [("wo ist", "daß €"), ("x\ny", "z")]
    with pytest.raises(DataError, match="is cut off"):
        read(tmp_path, raw[:-1])


def test_control_bytes_drop_their_rows(tmp_path) -> None:
    for code in (0, 1, 8, 27, 31):
        rows, dropped = read(tmp_path, f"q,a\nx{chr(code)}y,z\ng,h\n")
        assert rows == [("g", "h")] and dropped == {"t.csv:2": f"control character U+{code:04X} in prompt"}
        write_jsonl(tmp_path / "t.jsonl", [{"q": f"x{chr(code)}y", "a": "c"}, {"q": "a", "a": f"{chr(code)}[31m"}, {"q": "g", "a": "h"}])
        found, reasons = read_source(Source("t.jsonl", columns=MAPPED), tmp_path)
        assert [d.reason for d in reasons] == [f"control character U+{code:04X} in {name}" for name in ("prompt", "completion")]
        assert [(row.prompt, row.completion) for row in found] == [("g", "h")]
    for code in (9, 11, 12):  # tab, and the breaks that Office and PDF have
        write_jsonl(tmp_path / "t.jsonl", [{"q": f"x{chr(code)}y", "a": "c"}])
        assert len(read_source(Source("t.jsonl", columns=MAPPED), tmp_path)[0]) == 1
        assert read(tmp_path, f'q,a\n"x{chr(code)}y",z\n')[0] == [(f"x{chr(code)}y", "z")]


def test_as_pandas_writes_and_reads_it(tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"q": ['say "yes"', "a, b", "line\nbreak", '5"'], "a": ["1,5", '"', "x", " y "], "n": [1, 2, 3, 4]})
    for delimiter in ",;\t":
        frame.to_csv(tmp_path / "p.csv", index=False, sep=delimiter)
        rows, dropped = read_source(Source("p.csv", columns=MAPPED), tmp_path)
        back = pandas.read_csv(tmp_path / "p.csv", sep=delimiter)
        assert [(r.prompt, r.completion) for r in rows] == list(zip(back["q"], back["a"], strict=True)) and not dropped


def test_a_broken_record_that_swallows_much_of_a_file_stops_it(tmp_path) -> None:
    rows = [[f"g{i}", "h"] for i in range(400)]
    lost = written(rows[:5]) + '"g,h\n' + written(rows[5:30]) + '"x, y",z\n' + written(rows[30:])
    found, dropped = read(tmp_path, "q,a\n" + lost)
    assert dropped["t.csv:7"] == "not CSV: a quote within a field that is not doubled (lines 7 to 33)"
    assert found == [tuple(row) for row in rows if int(row[0][1:]) not in range(5, 30)]
    with pytest.raises(DataError, match=r"t\.csv:7 holds a quote that is not doubled, and up to line 108 it is not certain"):
        read(tmp_path, "q,a\n" + written(rows[:5]) + '"g,h\n' + written(rows[5:105]) + '"x, y",z\n' + written(rows[105:]))
