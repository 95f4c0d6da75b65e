"""Output for people: text from models and files cannot control the terminal. What --json prints is exact, and goes through `click.echo`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click
from rich.console import Console
from rich.segment import Segment
from rich.table import Table

from trimtab.errors import printable


def say(text: str, *, nl: bool = True, err: bool = False, bold: bool = False, mark: str = "", colour: str | None = None) -> None:
    """One text, its control characters spelt out. mark: a word before it, in a colour."""
    before = click.style(mark, fg=colour, bold=bold or None) + " " if mark else ""
    click.echo(before + click.style(printable(text), bold=(bold and not mark) or None), nl=nl, err=err)


class Terminal(Console):
    """A rich console that spells out control characters in whatever it shows: tables, lines, bars. Its own colours stay."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def print_whole(console: Console, table: Table, **options: Any) -> None:
    """Print a table whose numbers are never cut, on a narrow terminal or in a pipe: it may be wider than that."""
    whole = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, whole)
    console.print(table, **options)
