"""What a run on a cluster shows: a live table of groups and variants on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from trimtab.cli.show import PLAIN_EVERY_S, validation
from trimtab.cli.terminal import Terminal
from trimtab.cluster.board import Board, VariantState
from trimtab.errors import printable

if TYPE_CHECKING:
    from trimtab.train.ahead import Ahead

SHOWN = 24
"""Variants in the table at most: those that lead."""
LEADERS = 3


def display(quiet: bool = False) -> ClusterTable | ClusterLines:
    """The table where standard error is a terminal, lines elsewhere, nothing but warnings where `quiet`."""
    return ClusterTable() if sys.stderr.isatty() and not quiet else ClusterLines(quiet)


class _Display:
    """A Listener for what the driver does itself; what the groups do is told to its board."""

    def __init__(self) -> None:
        self.board = Board(on_change=self.changed)

    def changed(self, group: str, kind: str, values: tuple[Any, ...]) -> None:
        """Something has happened in a group, or ("", "begin") all are known."""
        if kind in ("warning", "note"):
            getattr(self, kind)(f"{group}: {values[0]}")
        elif kind == "stopped":
            self.warning(f"{group}: {values[0]} has stopped: {values[1]}")
        elif kind == "lost":
            where = f"the node {values[0]} is lost" if values[0] else "its worker is lost before it has begun"
            self.warning(f"{group}: {where}; it goes on from its newest checkpoint elsewhere ({values[1]})")
        elif kind == "ended" and values[0] == "failed":
            self.warning(f"{group} has failed; the others go on")

    def warning(self, text: str) -> None:
        """Shown."""

    def note(self, text: str) -> None:
        """Shown."""

    def joined(self, variant: str, steps: int, ahead: Ahead) -> None:
        """The board has it."""

    def saved(self, step: int, folder: Path) -> None:
        """Not shown."""

    def begin(self, steps: Mapping[str, int], ahead: Ahead) -> None:
        """The board has it."""

    def step(self, line: Mapping[str, Any]) -> None:
        """The board has it."""

    def valid(self, line: Mapping[str, Any]) -> None:
        """The board has it."""

    def stopped(self, variant: str, reason: str) -> None:
        """The board has it."""


class ClusterLines(_Display):
    """Lines on standard error: where groups are placed, how far they are, validations, and who leads after each."""

    def __init__(self, quiet: bool = False):
        super().__init__()
        self.quiet, self._at, self._last, self._leading, self._due = quiet, time.monotonic(), "", "", False

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        stage = text.partition(":")[0]
        if stage != self._last:
            self._last = stage
            self._print(stage)

    def warning(self, text: str) -> None:
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)

    def changed(self, group: str, kind: str, values: tuple[Any, ...]) -> None:
        super().changed(group, kind, values)
        if kind != "valid" and self._due:  # a pass gives a line for each variant, one after another
            self._tell_leaders()
        self._due = kind == "valid"
        if kind == "begin" and not group:
            names = [f"{g.name} ({len(g.variants)})" for g in self.board.groups.values()]
            self._print(f"{len(names)} group{'s' * (len(names) != 1)}: {', '.join(names)}")
        elif kind == "placed":
            self._print(f"{group} is placed on {values[0]}")
        elif kind == "valid":
            self._print(f"{group}: {validation(values[0])}")
        elif kind == "ended" and values[0] == "finished":
            self._print(f"{group} has finished on {self.board.groups[group].node}")
        elif kind == "step" and time.monotonic() - self._at >= PLAIN_EVERY_S:
            self._at = time.monotonic()
            for g in self.board.groups.values():
                if g.state == "training":
                    mine = [self.board.variants[g.name, n] for n in g.variants]
                    losses = "  ".join(f"{v.name} {v.loss:.3f}" for v in mine if v.loss is not None)
                    self._print(f"{g.name} on {g.node}: step {sum(v.step for v in mine)}/{sum(v.total for v in mine)}  loss: {losses}")

    def _tell_leaders(self) -> None:
        first = [v for v in self.board.ranked() if v.valid is not None][:LEADERS]
        text = ", ".join(f"{v.name} {v.valid:.4g}" for v in first)
        if len(self.board.variants) > 1 and text != self._leading:
            self._leading = text
            self._print(f"leading by valid {first[0].metric}: {text}")

    def __enter__(self) -> ClusterLines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class ClusterTable(_Display):
    """A table of variants, the best first, under a line for each group; drawn anew as they change."""

    def __init__(self) -> None:
        super().__init__()
        self._status = "starting"
        self._live = Live(console=Terminal(stderr=True), get_renderable=self._drawn, refresh_per_second=4)

    def status(self, text: str) -> None:
        self._status = text

    def warning(self, text: str) -> None:
        self._live.console.print(f"[yellow]warning:[/] {escape(printable(text))}", highlight=False)

    def note(self, text: str) -> None:
        self._live.console.print(f"[cyan]note:[/] {escape(printable(text))}", highlight=False)

    def _drawn(self) -> Group:
        lines = [escape(f"{g.name} ({len(g.variants)}): {g.state}{f' on {g.node}' * bool(g.node)}") for g in self.board.groups.values()]
        if not self.board.variants:
            return Group(escape(self._status))
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for heading in ("variant", "group"):
            table.add_column(heading, no_wrap=True)
        for heading in ("step", "loss", "valid", "base"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for v in self.board.ranked()[:SHOWN]:
            table.add_row(*self._row(v))
        return Group(*lines, table)

    def _row(self, v: VariantState) -> list[str]:
        figures = (f"{x:.4g}" if x is not None else "–" for x in (v.loss, v.valid, v.base))
        return [escape(v.name), escape(v.group), f"{v.step}/{v.total or '–'}", *figures, escape(v.ended)]

    def __enter__(self) -> ClusterTable:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
