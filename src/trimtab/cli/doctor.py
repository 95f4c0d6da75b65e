"""`trimtab doctor`"""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from rich.table import Table

from trimtab.cli.options import json_option
from trimtab.cli.terminal import Terminal


@click.command()
@json_option("Print the findings as JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine has (Python, torch, threads, bf16, device, memory, cache, disk, bundled base), run a forward and a training
    step on a tiny random base, and say what to do about what is wrong.

    \b
    Example:
      trimtab doctor

    Exits with 1 where something is wrong.
    """
    from trimtab.bases import examine
    from trimtab.tryout import try_out

    checks = [*examine(), *try_out()]
    if as_json:
        click.echo(json.dumps([asdict(c) for c in checks], indent=1))
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for c in checks:
            table.add_row("[green]ok[/]" if c.ok else "[red]!![/]", c.name, c.value + (f"\n[yellow]{c.advice}[/]" if c.advice else ""))
        Terminal(soft_wrap=True).print(table)
    ctx.exit(0 if all(c.ok for c in checks) else 1)
