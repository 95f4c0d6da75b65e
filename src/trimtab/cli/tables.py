"""Tables of what a store holds: aligned columns whose cells are never cut, and text from files that cannot act on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from trimtab.cli import show
from trimtab.cli.terminal import print_whole


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), headed: bool = True) -> None:
    """Print rows under their headings; `right` are those of numbers. With lines on a terminal, plain text elsewhere. headed: False where
    a table goes on."""
    console = show.console()
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, padding=(0, 1), pad_edge=False, show_header=headed)
    for heading in headings:
        table.add_column(escape(heading), justify="right" if heading in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    print_whole(console, table, highlight=False)


def shown(text: object, most: int = 60) -> str:
    """A value from a file for a terminal: one line, printable, not long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= most else line[: most - 1] + "…"
