"""What commands share in showing a run: rich bars on a terminal, plain lines elsewhere, and the table of scores."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_EVERY_S = 5.0


def listener(quiet: bool = False) -> Bars | Lines:
    """Bars where standard error is a terminal, a line every few seconds elsewhere, nothing but warnings where `quiet`."""
    return Bars() if sys.stderr.isatty() and not quiet else Lines(quiet)


class Lines:
    """A run as plain lines on standard error."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.last_status, self.total, self.at, self.done = quiet, "", 0, time.monotonic(), 0
        self.losses: dict[str, float] = {}

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        stage = text.partition(":")[0]
        if stage != self.last_status:
            self.last_status = stage
            self._print(stage)

    def begin(self, steps: Mapping[str, int]) -> None:
        self.total = sum(steps.values())
        self._print("training " + ", ".join(f"{name} ({n} steps)" for name, n in steps.items()))

    def step(self, line: Mapping[str, Any]) -> None:
        self.done += 1
        self.losses[line["variant"]] = line["loss"]
        if time.monotonic() - self.at >= PLAIN_EVERY_S or self.done == self.total:
            self.at = time.monotonic()
            losses = "  ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
            self._print(f"step {self.done}/{self.total}  {line['tokens_per_s']:.0f} tokens/s  loss: {losses}")

    def stopped(self, variant: str, reason: str) -> None:
        print(f"warning: {variant} has stopped: {reason}", file=sys.stderr, flush=True)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class Bars:
    """A run as one bar a variant, with its loss and the tokens per second."""

    def __init__(self) -> None:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.stage = self.progress.add_task("starting", total=None, note="")
        self.tasks: dict[str, Any] = {}

    def status(self, text: str) -> None:
        self.progress.update(self.stage, description=text, visible=True)

    def begin(self, steps: Mapping[str, int]) -> None:
        self.progress.update(self.stage, visible=False)
        self.tasks = {name: self.progress.add_task(name, total=n, note="") for name, n in steps.items()}

    def step(self, line: Mapping[str, Any]) -> None:
        note = f"loss {line['loss']:.3f}  {line['tokens_per_s']:.0f} tokens/s"
        self.progress.update(self.tasks[line["variant"]], completed=line["step"], note=note)

    def stopped(self, variant: str, reason: str) -> None:
        self.progress.console.print(f"[yellow]warning:[/] {variant} has stopped: {reason}", highlight=False)

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


SCORES = {"exact_match": "exact match", "token_f1": "F1"}


def console() -> Console:
    """Standard output: as wide as the terminal, and wide enough for a table where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=110)


def score_table(summary: Mapping[str, Any]) -> Table:
    """One row a variant: what it costs beside the base, and the loss and scores as "base → adapter"; summary.json holds all scores."""
    table = Table(title=f"{summary['base']}: {summary['base_parameters']:,} parameters, {summary['base_bytes'] / 1e6:.0f} MB")
    for column in ("variant", "method"):
        table.add_column(column)
    for column in ("trainable", "MB", "loss", *(f"{title}, %" for title in SCORES.values())):
        table.add_column(column, justify="right")
    for name, v in summary["variants"].items():
        before, after = summary["base_scores"].get(v["data"], {}), v["scores"]
        share = 100 * v["trainable"] / summary["base_parameters"]
        cells = [_change(before.get(k), after.get(k), digits) for k, digits in (("loss", 2), *((k, 1) for k in SCORES))]
        table.add_row(name, v["method"], f"{v['trainable']:,} ({share:.2g}%)", f"{v['adapter_bytes'] / 1e6:.1f}", *cells)
    return table


def _change(before: float | None, after: float | None, digits: int) -> str:
    if after is None:
        return "–"
    return f"[bold]{after:.{digits}f}[/]" if before is None else f"{before:.{digits}f}→[bold]{after:.{digits}f}[/]"
