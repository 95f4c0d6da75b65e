"""How files that move are shown: a bar each on a terminal, a line each elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from trimtab.cli.terminal import Terminal, say

Begin = Callable[[str, int, int], Callable[[int], None]]


@contextmanager
def showing(quiet: bool) -> Iterator[Begin | None]:
    """What is told of each file: its name, its bytes, those there already; what it returns is told of every piece. None if quiet."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield _line
    else:
        columns = TextColumn("{task.description}"), BarColumn(bar_width=32), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Terminal(stderr=True)) as bars:

            def begin(name: str, size: int, there: int) -> Callable[[int], None]:
                if not name:
                    return _nothing
                task = bars.add_task(escape(name), total=size, completed=there)
                return lambda count: bars.advance(task, count)

            yield begin


def _line(name: str, size: int, there: int) -> Callable[[int], None]:
    if name:
        state = (
            "is there already"
            if there == size
            else f"{megabytes(size - there)} to move" + (f", {megabytes(there)} are there" if there else "")
        )
        say(f"{name}: {state}", err=True)
    return _nothing


def _nothing(count: int) -> None:
    """Of a file that is not shown."""


def megabytes(count: int) -> str:
    """Bytes as 19.5 MB, 812 kB or 90 bytes."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB" if count >= 1e4 else f"{count} bytes"
