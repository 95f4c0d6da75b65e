"""`trimtab check`: what a run file would train on and what it would cost, before anything is trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trimtab.cli.options import json_option, set_option
from trimtab.cli.terminal import print_whole
from trimtab.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from trimtab.train.findings import CheckReport, Estimate, Finding, Rendered, SplitCounts

EXAMPLE = """\b
Examples:
  trimtab check examples/halyard.yaml
  trimtab check run.yaml --rows 5
  trimtab check run.yaml --strict --json
"""
BAR, MAX_RUN = 40, 600
"""Width of the longest bar; characters of one run of a rendered row, more are left out of its middle."""
STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@click.command(epilog=EXAMPLE)
@click.argument("run_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--rows", default=2, show_default=True, type=click.IntRange(min=0), help="Rows of each training source to show rendered.")
@click.option("--strict", is_flag=True, help="Exit with 2 on warnings too.")
@set_option("variants.v.lr=1e-4")
@json_option("Print JSON.")
@click.pass_context
def check(ctx: click.Context, run_file: Path, rows: int, strict: bool, changes: tuple[str, ...], as_json: bool) -> None:
    """Read everything that RUN_FILE names, and train nothing. Only caches are written.

    Shows the rows, tokens and supervised tokens of every source, rows that are dropped and why, the first rows as the base reads them
    (supervised tokens coloured, or between ⟦ and ⟧), rows of train that stand in valid or test too, and estimates of steps, memory and
    time. Exits with 2 on errors: rows with nothing supervised, or with everything, files that cannot be read, nothing left to train on.
    """
    from trimtab.bases.progress import reporting
    from trimtab.train import RunConfig

    run = RunConfig.load(run_file, changes)  # before torch is loaded: a mistake in it is told at once
    from trimtab.train.check import check as run_check

    with reporting((lambda text: None) if as_json else None) as status:
        report = run_check(run, rows=rows, status=status)
    failed = bool(report.errors or (strict and report.warnings))
    if as_json:
        click.echo(json.dumps({"ok": not failed, **report.to_dict()}, indent=1))
    else:
        _show(report, run_file)
    ctx.exit(2 if failed else 0)


def _show(report: CheckReport, run_file: Path) -> None:
    from trimtab.cli.show import console

    out = console()
    _line(out, f"{run_file}: {report.base}, {report.base_parameters:,} parameters, {report.max_positions:,} positions")
    for split in report.splits:
        _split(out, split)
    for row in report.rendered:
        _rendered(out, row)
    if report.estimate:
        _variants(out, report)
        _estimate(out, report.estimate)
    for finding in report.findings:
        _finding(out, finding)
    counts = ", ".join(f"{len(n)} {word}{'s' * (len(n) != 1)}" for word, n in (("error", report.errors), ("warning", report.warnings)))
    _line(out, f"\n{counts}; checked in {report.seconds:.1f} s, nothing was trained", STYLES["error"] if report.errors else "bold")


def _line(out: Console, text: str, style: str = "") -> None:
    """One line as it is: no markup, never wrapped, control characters of hostile rows spelt out."""
    out.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def _split(out: Console, split: SplitCounts) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column(f"{split.data}.{split.split}", overflow="fold")
    for heading in ("rows", "dropped", "weight", "an epoch", "tokens", "share", "supervised"):
        table.add_column(heading, justify="right", no_wrap=True)
    for s in split.sources:
        share = f"{s.tokens / split.tokens:.0%}" if split.tokens else "–"
        learnt = f"{s.supervised:,} ({s.supervised / s.tokens:.0%})" if s.tokens else "–"
        numbers = (f"{s.read:,}", f"{s.dropped:,}", f"{s.weight:g}", f"{s.drawn:,}", f"{s.tokens:,}", share, learnt)
        table.add_row(Text(printable(s.path)), *numbers)
    out.print()
    out.print(table)
    if split.lengths:
        spread = ", ".join(f"{name} {n:,}" for name, n in split.lengths.items())
        _line(out, f"  tokens of a row: {spread}; {split.tokens:,} an epoch, {split.supervised / split.tokens:.0%} supervised")
    most = max((n for _, n in split.histogram), default=0)
    for longest, n in split.histogram:
        bar = "█" * max(round(BAR * n / most), 1 if n else 0)
        _line(out, f"  {longest // 2 + 1 if longest > 1 else 1:>7,}–{longest:<7,} {bar} {n:,}")


def _rendered(out: Console, row: Rendered) -> None:
    out.print()
    _line(out, rendered_line(row.origin), "bold")
    show_runs(out, row.runs)


def rendered_line(origin: str) -> str:
    """What stands above a row."""
    return f"{origin} as the base reads it, supervised tokens {'coloured' if sys.stdout.isatty() else 'between ⟦ and ⟧'}:"


def show_runs(out: Console, runs: Iterable[tuple[str, bool]]) -> None:
    """The text of a row, run by run: (text, whether it is supervised)."""
    from rich.text import Text

    marks = ("", "") if sys.stdout.isatty() else ("⟦", "⟧")
    text = Text()
    for run, supervised in runs:
        shown = printable(run if len(run) <= MAX_RUN else f"{run[: MAX_RUN // 2]} […] {run[-MAX_RUN // 2 :]}")
        text.append(f"{marks[0]}{shown}{marks[1]}" if supervised else shown, style="black on green" if supervised else "dim")
    out.print(text, soft_wrap=True)


def _variants(out: Console, report: CheckReport) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), header_style="bold")
    for heading in ("variant", "method", "data"):
        table.add_column(heading)
    for heading in ("trainable", "MB", "rows an epoch", "steps", "tokens a step", "tokens", "alone"):
        table.add_column(heading, justify="right", no_wrap=True)
    for v in report.variants:
        size = f"{v.adapter_bytes / 1e6:.1f}"
        numbers = (f"{v.rows_per_epoch:,}", f"{v.steps:,}", f"≤ {v.tokens_per_step:,}", f"{v.tokens:,}", _span(v.seconds))
        table.add_row(v.name, v.method, v.data, f"{v.trainable:,}", size, *numbers)
    out.print()
    print_whole(out, table)


def _estimate(out: Console, e: Estimate) -> None:
    low, high = e.efficiency
    least, most = (f"{n / 1e9:.1f}" for n in e.memory_bytes)
    memory = least if least == most else f"{least} to {most}"
    _line(
        out,
        f"memory: {memory} GB for forwards of at most {e.forward_tokens:,} tokens in {e.dtype} on {e.device}, "
        f"beside {e.process_bytes / 1e9:.1f} GB of the process itself; {e.available_bytes / 1e9:.1f} GB are free",
    )
    _line(
        out,
        f"time: {_span(e.seconds)} for all steps, if they reach {low:.0%} to {high:.0%} of what a single MLP reached just now "
        f"({e.probe_flops / 1e9:,.0f} GFLOP/s, beside what else runs here)",
    )
    if any(e.judging_seconds):
        scored = f", with {e.answers:,} answers to test rows" if e.answers else ""
        _line(out, f"besides: {_span(e.judging_seconds)} for validation and scores at the end{scored}")


def _span(seconds: tuple[float, float]) -> str:
    def short(s: float) -> str:
        return f"{s:.0f} s" if s < 120 else f"{s / 60:.0f} min" if s < 7200 else f"{s / 3600:.1f} h"

    low, high = map(short, seconds)
    return low if low == high else f"{low} to {high}"


def _finding(out: Console, f: Finding) -> None:
    _line(out, f"\n{f.level}: {f.where}: {f.message}", STYLES[f.level])
    for item in f.items:
        _line(out, f"  - {item}")
    if f.count > len(f.items):
        _line(out, f"  - and {f.count - len(f.items):,} more")
    if f.fix:
        _line(out, f"  fix: {f.fix}")
