"""Tables of results, for terminals and for notebooks. Cells are text or (before, after); no cell can act on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, TypeAlias

from trimtab.errors import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Cell: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True)
class Table:
    """rows: one cell for each heading. words: the headings of columns that hold words; the others hold numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: frozenset[str] = frozenset()

    def rich(self) -> RichTable:
        """For a terminal."""
        from rich.markup import escape as plain
        from rich.table import Table as RichTable

        table = RichTable(title=plain(self.title) if self.title else None)
        for heading in self.headings:
            table.add_column(plain(heading), justify="left" if heading in self.words else "right")
        for row in self.rows:
            table.add_row(*(plain(c) if isinstance(c, str) else f"{plain(c[0])}→[bold]{plain(c[1])}[/]" for c in row))
        return table

    def html(self) -> str:
        """For a notebook."""
        align = ["left" if h in self.words else "right" for h in self.headings]

        def line(tag: str, cells: Sequence[Cell]) -> str:
            parts = [f"<{tag} style='text-align: {side}'>{_html(cell)}</{tag}>" for cell, side in zip(cells, align, strict=True)]
            return f"<tr>{''.join(parts)}</tr>"

        title = f"<caption>{_html(self.title)}</caption>" if self.title else ""
        body = "".join(line("td", row) for row in self.rows)
        return f"<table>{title}<thead>{line('th', self.headings)}</thead><tbody>{body}</tbody></table>"

    def __str__(self) -> str:
        cells = [[c if isinstance(c, str) else f"{c[0]}→{c[1]}" for c in row] for row in [self.headings, *self.rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        align = ["<" if h in self.words else ">" for h in self.headings]
        lines = ["  ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=True)).rstrip() for row in cells]
        return printable("\n".join([*([self.title] if self.title else []), *lines]))


def _html(cell: Cell) -> str:
    return escape(printable(cell)) if isinstance(cell, str) else f"{_html(cell[0])} → <b>{_html(cell[1])}</b>"


def counted(n: int, thing: str) -> str:
    """A number of things: 1 thread, 2 threads."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"
