"""`trimtab compare`"""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.markup import escape

from trimtab.cli import show
from trimtab.cli.options import json_option
from trimtab.cli.terminal import print_whole


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=str))
@click.option(
    "--by",
    metavar="SCORE",
    help="Sort by this score or cost, best first; by default the score that fits the answers, else the training loss.",
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the page of all runs (as report.html) to this file.")
@json_option("Print one object a variant, and what to know before comparing.")
def compare(runs: tuple[str, ...], by: str | None, html: Path | None, as_json: bool) -> None:
    """Every variant of several RUNS in one table for each data set: how it was made, what it cost, what it scored. A run is named by its
    folder, or by its URL if it is in a bucket.

    \b
    Example:
      trimtab compare examples/runs/desks examples/runs/halyard --by exact_match --html compare.html

    `s` is a variant's share of the run's time, `peak GB` the memory of the whole run.
    A run that has not finished is shown as far as it has come. Runs on different bases or rows are said not to be comparable.
    """
    from trimtab.train.comparison import compare as compare_runs
    from trimtab.train.page import write_named
    from trimtab.train.past import run_folder, title

    folders = [run_folder(run) for run in runs]
    found = compare_runs(folders, by)
    if html is not None:
        write_named(folders, html)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
        return
    console = show.console()
    chosen = "test loss" if found.by == "loss" else title(found.by)
    for data, table in zip(dict.fromkeys(r["data"] for r in found.variants), found.tables(), strict=True):
        shown = table.rich()
        shown.title, shown.title_justify, shown.title_style = f"[bold]{escape(data)}[/], by {title(found.by)}", "left", ""
        shown.box, shown.padding = SIMPLE_HEAD, (0, 1)
        for column in shown.columns:
            column.no_wrap, column.style = True, "bold" if column.header == escape(chosen) else column.style
        print_whole(console, shown)
    for note in found.notes:
        console.print(f"[yellow]note:[/] {escape(note)}", highlight=False)
    if html is not None:
        console.print(f"written: {html}", highlight=False, markup=False, soft_wrap=True)
