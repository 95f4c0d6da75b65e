"""`trimtab runs`: orders to a run that trains."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trimtab.cli.options import Command, Group, json_option
from trimtab.cli.terminal import say

if TYPE_CHECKING:
    from trimtab.train.ordering import Asked

LOOK_S = 0.1


@click.group(cls=Group)
def runs() -> None:
    """Stop, pause, resume or clone variants of a run while the others go on. FOLDER is the run folder, the run file's `out`.

    \b
    Example:
      trimtab runs pause examples/runs/desks support-lora
      trimtab runs resume examples/runs/desks support-lora
      trimtab runs clone examples/runs/desks support-lora --name support-slow --set lr=1e-4
      trimtab runs stop examples/runs/desks support-lora

    The run reads orders between two steps, on any number of ranks. They are kept in control.json in the run folder, so they hold for a run
    that is resumed, too. The page of `trimtab studio` has a button for each of them.
    """


def _common(command: Command) -> Command:
    command = click.option(
        "--wait",
        "wait_s",
        type=click.FloatRange(0),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for the run to do it; 0: not.",
    )(command)
    command = json_option("Print what became of it as JSON.")(command)
    return click.argument("folder", type=click.Path(file_okay=False, path_type=Path))(command)


@runs.command()
@_common
@click.argument("variants", nargs=-1, metavar="[VARIANT]…")
def stop(folder: Path, variants: tuple[str, ...], wait_s: float, as_json: bool) -> None:
    """End variants for good: each keeps its best validated step, or its last one, and is saved and scored when the run ends.

    \b
    Example:
      trimtab runs stop examples/runs/desks support-lora

    Without a VARIANT the whole run ends after its step with a checkpoint, as on Ctrl-C; `trimtab train --resume` goes on with it.
    """
    from trimtab.train import ordering

    _await(ordering.order(folder, variants, "stop") if variants else ordering.end(folder), wait_s, as_json)


@runs.command()
@_common
@click.argument("variants", nargs=-1, metavar="[VARIANT]…")
def pause(folder: Path, variants: tuple[str, ...], wait_s: float, as_json: bool) -> None:
    """Let variants, or all, make no more steps until `trimtab runs resume`. They keep their place in their rows and schedules.

    \b
    Example:
      trimtab runs pause examples/runs/desks support-lora
    """
    from trimtab.train import ordering

    _await(ordering.order(folder, variants, "pause"), wait_s, as_json)


@runs.command()
@_common
@click.argument("variants", nargs=-1, metavar="[VARIANT]…")
def resume(folder: Path, variants: tuple[str, ...], wait_s: float, as_json: bool) -> None:
    """Let paused variants, or all, go on.

    \b
    Example:
      trimtab runs resume examples/runs/desks
    """
    from trimtab.train import ordering

    _await(ordering.order(folder, variants, None), wait_s, as_json)


@runs.command()
@_common
@click.argument("variant")
@click.option("--name", required=True, help="Of the new variant.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="A setting of its own, such as lr=1e-4; several times.")
@click.option(
    "--write",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a run file of the clone alone instead, beside the run file of FOLDER.",
)
def clone(folder: Path, variant: str, name: str, changes: tuple[str, ...], file: Path | None, wait_s: float, as_json: bool) -> None:
    """Add a variant with VARIANT's settings, but for those that --set gives. It trains from its first step on, as it would alone.

    \b
    Example:
      trimtab runs clone examples/runs/desks support-lora --name support-slow --set lr=1e-4

    Its data set must be one that the run has read, and max_length, last_turn_only and what its objective reads of a row must be as they are
    for this data. For anything else, and from a run that has finished, --write makes a run file, which `trimtab train` trains as a run of
    its own.
    """
    from trimtab.train import ordering
    from trimtab.train.clone import changes_of

    if file is not None:
        from trimtab.cli.options import write_new
        from trimtab.train.apart import run_file_of

        write_new(file, run_file_of(folder, variant, name, changes_of(changes), file))
        return
    _await(ordering.clone(folder, variant, name, changes_of(changes)), wait_s, as_json)


def _await(asked: Asked, wait_s: float, as_json: bool) -> None:
    """Say what became of an order."""
    until = time.monotonic() + wait_s
    while (outcome := asked.outcome() if asked.runs else None) is None and asked.runs and time.monotonic() < until:
        time.sleep(LOOK_S)
    if as_json:
        say(json.dumps({"runs": asked.runs, "done": outcome is not None, "outcome": outcome}))
    elif not asked.runs:
        say("nobody trains into this folder now; the order holds when the run is resumed")
    elif outcome is None:
        say("asked, and not done yet: the run reads it after the step that runs")
    else:
        say(outcome)
