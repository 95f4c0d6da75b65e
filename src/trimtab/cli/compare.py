"""`trimtab compare`"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from trimtab.cli import show
from trimtab.cli.options import json_option
from trimtab.cli.terminal import print_whole
from trimtab.errors import ConfigError, nearest

if TYPE_CHECKING:
    from trimtab.train.past import PastVariant

COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "train_loss": ("train loss", "{:.3f}".format),
    "trainable": ("trainable", "{:,}".format),
    "adapter_mb": ("MB", "{:.1f}".format),
    "seconds": ("s", "{:.0f}".format),
    "tokens_per_s": ("tokens/s", "{:.0f}".format),
    "peak_memory_gb": ("peak GB", "{:.2f}".format),
}
"""Key of a row -> heading and format."""
SMALLER_FIRST = {*COSTS} - {"tokens_per_s"}


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--by", metavar="SCORE", help="Sort by this score or cost, best first; by default the first score of answers, else the training loss."
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the page of all runs (as report.html) to this file.")
@json_option("Print one object a variant, and what to know before comparing.")
def compare(runs: tuple[Path, ...], by: str | None, html: Path | None, as_json: bool) -> None:
    """Every variant of several RUNS (run folders) in one table for each data set: how it was made, what it cost, what it scored.

    \b
    Example:
      trimtab compare examples/runs/desks examples/runs/halyard --by exact_match --html compare.html

    A run that has not finished is shown as far as it has come. Runs on different bases or rows are said not to be comparable.
    """
    from trimtab.train.page import write_page
    from trimtab.train.past import LOWER_IS_BETTER, doubts, read_runs

    past = read_runs(runs)
    variants = [v for run in past for v in run.variants]
    scores = list(dict.fromkeys(s for v in variants for s in v.scores))
    by = _order(by, scores)
    rows = sorted((_row(v) for v in variants), key=lambda r: _rank(r, by, by in SMALLER_FIRST | LOWER_IS_BETTER))
    notes = doubts(past)
    if html is not None:
        write_page(runs, html)
    if as_json:
        base = {run.name: run.summary.get("base_scores", {}) for run in past}
        click.echo(json.dumps({"sorted_by": by, "notes": notes, "variants": rows, "base_scores": base}, indent=1))
        return
    console = show.console()
    for data in dict.fromkeys(r["data"] for r in rows):
        table = _table(data, [r for r in rows if r["data"] == data], scores, by)
        print_whole(console, table)
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    if html is not None:
        console.print(f"written: {html}", highlight=False, markup=False, soft_wrap=True)


def _order(by: str | None, scores: Sequence[str]) -> str:
    """What to sort by. ConfigError if no variant has it."""
    from trimtab.train.past import PERCENT

    known = [*scores, *COSTS]
    if by is None:
        return next((s for s in scores if s in PERCENT), "train_loss")
    if by not in known:
        raise ConfigError(f"--by {by}: no variant has that score{nearest(by, known)}", fix=f"use one of {', '.join(known)}")
    return by


def _row(v: PastVariant) -> dict[str, Any]:
    """A variant as --json gives it; what is not known is None."""
    f = v.facts
    size = f.get("adapter_bytes")
    return {
        "run": v.run.name,
        "variant": v.name,
        "finished": v.run.finished,
        "data": v.data,
        "method": f.get("method"),
        "fields": {**(f.get("fields") or {}), "lr": f.get("lr"), "steps": f.get("steps")},
        "trainable": f.get("trainable"),
        "adapter_mb": size / 1e6 if size is not None else None,
        "tokens_per_s": f.get("tokens_per_s"),
        "seconds": f.get("seconds"),
        "peak_memory_gb": v.run.summary.get("peak_memory_gb"),
        "train_loss": (f.get("losses") or {}).get("last"),
        "stopped": f.get("stopped"),
        "scores": v.scores,
    }


def _rank(row: Mapping[str, Any], by: str, smaller_first: bool) -> tuple[bool, float]:
    """Sorts best first, rows without a value last."""
    value = row["scores"].get(by, row.get(by))
    return (value is None, 0.0 if value is None else value if smaller_first else -value)


def _table(data: str, rows: Sequence[Mapping[str, Any]], scores: Sequence[str], by: str) -> Table:
    """The variants of one data set. Only fields are shown in which its variants of one method differ."""
    from trimtab.train.past import title

    table = Table(title=f"[bold]{escape(data)}[/], by {title(by)}", title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("run/variant", "method"):
        table.add_column(heading, no_wrap=True)
    measured = [s for s in scores if any(s in r["scores"] for r in rows)]
    for heading in (*("test loss" if s == "loss" else title(s) for s in measured), *(h for h, _ in COSTS.values())):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("differs in", no_wrap=True)
    for r in rows:
        name = f"{r['run']}/{r['variant']}" + (" (stopped)" if r["stopped"] else "" if r["finished"] else " (not finished)")
        marks = [_score(s, r["scores"].get(s), s == by) for s in measured]
        costs = [form(r[k]) if r[k] is not None else "–" for k, (_, form) in COSTS.items()]
        table.add_row(escape(name), r["method"] or "–", *marks, *costs, escape(_differing(r, rows)))
    return table


def _score(name: str, value: float | None, chosen: bool) -> str:
    from trimtab.train.past import PERCENT

    text = "–" if value is None else f"{value:.1f}" if name in PERCENT else f"{value:.3f}"
    return f"[bold]{text}[/]" if chosen else text


def _differing(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The fields of a row that not every row of the same method shares."""
    own, alike = row["fields"], [r["fields"] for r in rows if r["method"] == row["method"]]
    keys = [k for k in own if any(other.get(k) != own[k] for other in alike)]
    return " ".join(f"{k}={own[k]:g}" if isinstance(own[k], float) else f"{k}={own[k]}" for k in keys)
