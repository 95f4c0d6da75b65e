"""`trimtab sweep`"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD

from trimtab.cli import show
from trimtab.cli.options import cluster_options, json_option, set_option
from trimtab.cli.stopping import cluster_words, stopping, tell_how_to_resume
from trimtab.cli.terminal import print_whole, say


@click.command()
@click.argument("sweep_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=str), help="Write here instead of into the file's `out`.")
@click.option("--resume", is_flag=True, help="Go on where the sweep in that folder was interrupted; what has finished is not repeated.")
@set_option("defaults.epochs=1")
@cluster_options
@json_option("Print leaderboard.json at the end, and no progress.")
@click.pass_context
def sweep(
    ctx: click.Context,
    sweep_file: Path,
    out: str | None,
    resume: bool,
    changes: tuple[str, ...],
    address: str | None,
    cpus: int | None,
    as_json: bool,
) -> None:
    """Search for the best settings: train all trials of SWEEP_FILE together on one frozen base, and rank them by their valid rows.

    \b
    Example:
      trimtab sweep examples/sweep.yaml
      trimtab sweep examples/sweep.yaml --resume
      trimtab sweep examples/sweep.yaml --ray auto

    A sweep file is a run file with `sweep` in place of `variants`: a template, lists or ranges of values, and optionally halving, which
    stops the worst trials early. The folder holds a run folder for each group of trials, leaderboard.json and report.html. Only the best
    trial, and the base, are scored on the test rows. Ctrl-C or SIGTERM ends a sweep after the current step, with a checkpoint.
    With --ray the groups train on the nodes of a Ray cluster, which share the folder of `out`; one whose node is lost goes on elsewhere.
    """
    from trimtab.train.trials import Sweep

    what = Sweep.load(sweep_file, changes)  # before torch is loaded: a mistake in it is told at once
    if out is not None:
        what = what.into(out)
    from trimtab.train.interrupt import Interrupted, Stop
    from trimtab.train.sweep import sweep as run_sweep

    stop = Stop()
    try:
        with ExitStack() as parts:
            if address is None:
                parts.enter_context(stopping(stop))
                listener: Any = parts.enter_context(show.listener(quiet=as_json))
                spread = None
            else:
                from trimtab.cli.show_cluster import display
                from trimtab.cluster.nodes import connected
                from trimtab.cluster.sweeping import OnRay

                cluster = parts.enter_context(connected(address))
                parts.enter_context(stopping(stop))
                listener = parts.enter_context(display(quiet=as_json))
                spread = OnRay(cluster, listener.board, cpus)
            report = run_sweep(what, listener=listener, resume=resume, stop=stop, spread=spread)
    except Interrupted as e:
        say(str(e), err=True)
        tell_how_to_resume("sweep", [sweep_file], out, changes=changes, more=cluster_words(address, cpus))
        ctx.exit(e.exit_code)
    if as_json:
        click.echo(json.dumps(report.leaderboard, indent=1))
        return
    _show(report.leaderboard, report.out, what.run.url or str(report.out))


def _show(board: Mapping[str, Any], out: Path, where: str) -> None:
    """The table, what to know of it, the best trial, and the run file that trains it alone."""
    from trimtab.train.leaderboard import table_of, told

    console, table = show.console(), table_of(board).rich()
    table.box, table.padding = SIMPLE_HEAD, (0, 1)
    for column in table.columns:
        column.no_wrap = True
    print_whole(console, table)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for line in told(board, out):
        say(line)
    if board["best"] is not None and board["best"]["run_file"] is not None:
        say(f"the run file that trains it alone, to stand beside this one:\n\n{board['best']['run_file']}")
    say(f"saved in {where}: leaderboard.json, report.html, {', '.join(g['folder'] + '/' for g in board['groups'])}")
