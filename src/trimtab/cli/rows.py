"""`trimtab rows`: rows as the base reads them, with what is supervised, and those that are dropped."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from trimtab.cli.check import rendered_line, show_runs
from trimtab.cli.options import base_option, json_option
from trimtab.cli.terminal import say

ORDERS = ("file", "longest", "shortest")
MOST = 1000


@click.command()
@click.argument("subject", type=click.Path(path_type=Path))
@click.option("--data", help="The data set; by default the first.")
@click.option("--split", default="train", show_default=True, help="train, valid or test.")
@click.option("--start", default=0, show_default=True, type=click.IntRange(min=0), help="The first row to show, counted from 0.")
@click.option("--count", default=5, show_default=True, type=click.IntRange(1, MOST), help="How many.")
@click.option("--order", default="file", show_default=True, type=click.Choice(ORDERS), help="Which come first.")
@click.option("--dropped", is_flag=True, help="The rows that are dropped instead, each with file, line and reason.")
@base_option
@json_option("Print JSON.")
def rows(
    subject: Path,
    data: str | None,
    split: str,
    start: int,
    count: int,
    order: str,
    dropped: bool,
    base_name: str,
    as_json: bool,
) -> None:
    """Rows of SUBJECT as training gets them: a run file's, a run folder's, or those of a file that no run file names yet.

    \b
    Examples:
      trimtab rows run.yaml --split valid
      trimtab rows runs/support --order longest --count 3
      trimtab rows tickets.csv --dropped

    Supervised tokens are coloured, or between ⟦ and ⟧. A file of rows is read as `trimtab init` would write it into a run file, on --base.
    """
    from trimtab.bases.progress import reporting
    from trimtab.train.subject import run_of

    run = run_of(subject, base_name)
    from trimtab.train.shown_rows import RowsOfRun

    with reporting((lambda text: None) if as_json else None) as status:
        found = RowsOfRun(run, status=status)
        name = data if data is not None else next(iter(run.data))
        for finding in found.checked.report.errors:
            if finding.where == f"data.{name}.{split}" and not finding.items:
                say(f"{finding.where}: {finding.message}" + (f" (fix: {finding.fix})" if finding.fix else ""), err=True)
        part = found.dropped(name, split, "", start, count) if dropped else found.rows(name, split, start, count, order)
    if as_json:
        click.echo(json.dumps({"data": name, "split": split, **part}, indent=1))
        return
    _show(name, split, start, part, dropped)


def _show(name: str, split: str, start: int, part: dict[str, Any], dropped: bool) -> None:
    from trimtab.cli.show import console

    out = console()
    what = "dropped rows" if dropped else "rows"
    if not part["rows"]:
        say(f"data.{name}.{split}: {part['total']:,} {what}" + (f", none from {start:,} on" if part["total"] else ""))
        return
    say(f"data.{name}.{split}: {what} {start + 1:,} to {start + len(part['rows']):,} of {part['total']:,}")
    for row in part["rows"]:
        if dropped:
            say(f"{row['origin']}: {row['reason']}")
            continue
        for segment in row["segments"]:
            role = f" ({segment['role']})" if segment["role"] else ""
            say("")
            say(rendered_line(f"{row['origin']}{role}, {row['targets']:,} of {row['tokens']:,} tokens supervised,"))
            runs = groupby([*([("… ", 0)] if segment["goes_on"] else []), *segment["runs"]], key=lambda run: bool(run[1] & 1))
            show_runs(out, [("".join(text for text, _ in group), learnt) for learnt, group in runs])
