"""What a machine can see of prose: docstrings that a reflow broke, links that lead nowhere, commands and files that do not exist."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import click
import pytest

from trimtab.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
CODE = sorted(p for folder in ("src", "tests", "bench", "scripts") for p in (ROOT / folder).rglob("*.py"))
COMMANDS = sorted((ROOT / "src" / "trimtab" / "cli").glob("*.py"))

ROOM = 110
"""A line of prose that could have taken the next word and stayed shorter than this was not wrapped there: something broke it."""

FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
BEGINS = re.compile(r"\s*([-*•|\[{]|\d+[.)]\s|>>>|\$ |trimtab |curl |python |\w+ =|[\w.*`]+(, [\w.*`]+)*( \([^)]*\))?:(\s|$))")
"""Lines that begin anew: items, fields ("rank: …"), formulas, commands."""
LAID_OUT = re.compile(r"\s*(\||>>>|trimtab |curl |python )|.*\S {2,}\S")
"""Lines that end where they end for a reason: tables, commands, columns."""


def broken_lines(source: str) -> list[int]:
    """Line numbers of docstrings and comments that end in the middle of a sentence, far from the margin, though the sentence goes on."""
    lines, found = source.splitlines(), []
    for start, stop, mark in _prose(source):
        for n in range(start, stop - 1):
            a, b = (line.replace(mark, " " * len(mark), 1) if mark else line for line in lines[n : n + 2])
            if not a.strip() or not b.strip() or LAID_OUT.match(a) or LAID_OUT.match(b) or BEGINS.match(b):
                continue
            ends = re.search(r'[.:?!]$|"""$', a.rstrip()) or b.strip() == '"""'
            if not ends and len(a.rstrip()) + 1 + len(b.split()[0]) <= ROOM:
                found.append(n + 1)
    return found


def _prose(source: str) -> Iterator[tuple[int, int, str]]:
    """(first line, line after the last one, what each line begins with) of docstrings and of comments that have lines to themselves."""
    blocks: list[ast.AST] = [ast.parse(source)]
    while blocks:
        node = blocks.pop()
        blocks += [inner for inner in getattr(node, "body", ()) if hasattr(inner, "body")]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node, clean=False):
            yield node.body[0].lineno - 1, node.body[0].end_lineno or 0, ""
    for comment in re.finditer(r"(?:^[ \t]*#.*\n)+", source, re.MULTILINE):
        first = source.count("\n", 0, comment.start())
        yield first, first + comment[0].count("\n"), "#"


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ('"""Rows reach each layer flat.\n\nA plan says\nwhich rows are queries.\n"""', [3]),
        ('"""Rows reach each layer flat.\n\n- an edit acts around one module. Edits\nof many adapters run together.\n"""', [3]),
        ('"""Rows reach each layer flat.\n\nA plan says it.\nWhich rows are queries.\n\n    y = W x\n    z = V y\n"""', []),
        ('"""Rows.\n\nrank: of the adapter\nalpha: its scale\n"""', []),
        ("# A plan says which of the rows\n# are queries.\nx = 1\n", [1]),
        ("# One.\n# Two.\nx = 1  # three\n", []),
    ],
)
def test_a_broken_line_is_seen(text: str, broken: list[int]) -> None:
    assert broken_lines(text) == broken


def test_no_docstring_or_comment_is_broken() -> None:
    found = {str(p.relative_to(ROOT)): lines for p in CODE if (lines := broken_lines(p.read_text(encoding="utf-8")))}
    assert not found, "lines that end in the middle of a sentence, far from the margin"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Links within the project: the file exists, and so does the heading that the link names."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text)
    for link in filter(lambda x: not re.match(r"[a-z]+:", x), (a or b for a, b in links)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(text: str) -> list[str]:
    """`trimtab …` and `python -m …` as they stand in blocks of code and between backticks, lines joined."""
    blocks = "\n".join([*FENCE.findall(text), *re.findall(r"^ {4,}.*", FENCE.sub("", text.replace("\\\n", "")), re.MULTILINE)])
    lines = re.sub(r"\\+\n\s*", " ", blocks).splitlines()
    whole = [line.strip().removeprefix("$ ") for line in lines if re.match(r"\s*(\$ )?(trimtab|python -m) ", line)]
    whole += re.findall(r"\$\(((?:trimtab|python -m) [^()]*)\)", blocks)
    inline = [" ".join(c.split()) for c in re.findall(r"(?<!`)`((?:trimtab|python -m) [^`]+)`(?!`)", FENCE.sub("", text))]
    return [c for c in whole + inline if not re.search(r"[…<>{}]", c)]


def unknown(command: str) -> str | None:
    """What is wrong with a command: there is no such command or option, or it takes no argument there."""
    words = shlex.split(command, comments=True)
    if words[:2] == ["python", "-m"]:
        words = words[2:]
        if words[0] != "trimtab":
            return None if words[0] in ("pytest", "pip", "build", "venv") else f"no module {words[0]}"
    known: click.Command = main
    context = click.Context(main, info_name="trimtab")
    args = words[1:]
    while isinstance(known, click.Group) and args and not args[0].startswith("-"):
        name, *args = args
        inner = known.get_command(context, name)
        if inner is None:
            return f"no command {name}"
        known, context = inner, click.Context(inner, info_name=name, parent=context)
    if {"--help", "-h"} & set(args):
        return None
    try:
        _, rest, _ = known.make_parser(context).parse_args(list(args))
    except click.NoSuchOption as e:
        return e.format_message()
    except click.BadOptionUsage:  # an option that is named alone, as in `trimtab generate --file`
        return None
    return f"left over: {rest}" if rest and not isinstance(known, click.Group) else None


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("trimtab train RUN.yaml --resume  # goes on", None),
        ("trimtab train RUN.yaml --resum", "No such option"),
        ("trimtab trian RUN.yaml", "no command trian"),
        ("trimtab adapters pusch a b", "no command pusch"),
        ("trimtab doctor RUN.yaml", "left over"),
    ],
)
def test_a_wrong_command_is_seen(command: str, said: str | None) -> None:
    found = unknown(command)
    assert found is None if said is None else said in str(found)


@pytest.mark.parametrize("page", [*PAGES, *COMMANDS], ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist_with_their_options(page: Path) -> None:
    assert not {c: said for c in commands(page.read_text(encoding="utf-8")) if (said := unknown(c))}


def leaves(known: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """(name, command) of every command below this one that is no group."""
    if not isinstance(known, click.Group):
        yield name, known
        return
    context = click.Context(known)
    for inner in known.list_commands(context):
        if (command := known.get_command(context, inner)) is not None:
            yield from leaves(command, f"{name} {inner}")


def test_the_help_of_every_command_has_an_example() -> None:
    found = dict(leaves(main, "trimtab"))
    lacking = [name for name, c in found.items() if not re.search(rf"Examples?:\n(.*\n)*? +(\w.*)?{name}\b", f"{c.help}\n{c.epilog or ''}")]
    assert len(found) > 40 and not lacking


def test_files_that_are_named_exist() -> None:
    """`train/loop.py`, `loop.py`, tests/laws/test_law6_*.py: the project has a file whose path ends in this."""
    tops = ("src", "tests", "bench", "docs", "examples", "scripts")
    files = [f"/{p.relative_to(ROOT)}" for top in tops for p in (ROOT / top).rglob("*") if "__pycache__" not in p.parts]
    missing = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"`([\w./*-]+\.(?:py|cpp))`", text))
        named |= set(re.findall(rf"(?<![\w/.-])((?:{'|'.join(tops)})/[\w./*-]*\w)", text))
        named |= set(re.findall(r"(?<![\w/.`*-])(\w+\.py)\b", text))
        written = {n.rpartition("/")[2] for n in re.findall(r"in a file of its own, `([^`]+)`", text)}  # by readers of CONTRIBUTING.md
        written |= set(re.findall(r'^```\w+ title="([^"]+)"', text, re.MULTILINE))  # by readers of a tutorial
        named = {n for n in named if not n.startswith("examples/runs") and n.rpartition("/")[2] not in written}
        gone = [n for n in named if not any(fnmatchcase(f, f"*/{n}") for f in files)]
        missing |= {str(page.relative_to(ROOT)): sorted(gone)} if gone else {}
    assert not missing
