"""`trimtab store`: the folder in which adapters are kept. What it holds is the business of `trimtab adapters`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from trimtab.cli.options import Group, json_option, store_option
from trimtab.cli.terminal import say
from trimtab.cli.transfer import megabytes
from trimtab.tables import counted

MAX_SHOWN = 50


@click.group(cls=Group)
def store() -> None:
    """The folder in which published adapters are kept: an OCI image layout, so that skopeo and oras can read it.

    \b
    Example:
      trimtab store verify

    It is --store, else $TRIMTAB_STORE, else ~/.local/share/trimtab/store.
    """


@store.command("init")
@store_option
@json_option("Print {root} as JSON.")
def init(root: Path | None, as_json: bool) -> None:
    """Make an empty store where there is none. `trimtab adapters publish` and `pull` do so by themselves.

    \b
    Example:
      trimtab store init --store /srv/adapters
    """
    from trimtab.store.registry import Store

    made = Store(root, create=True)
    click.echo(json.dumps({"root": str(made.root)}) if as_json else f"{made.root} is a store of {sum(1 for _ in made.names())} adapters")


@store.command("where")
@store_option
@json_option("Print {root, exists} as JSON.")
def where(root: Path | None, as_json: bool) -> None:
    """Print the folder that commands take for the store, whether there is one or not.

    \b
    Example:
      du -sh $(trimtab store where)
    """
    from trimtab.store.names import default_root

    folder = root if root is not None else default_root()
    click.echo(json.dumps({"root": str(folder), "exists": (folder / "index.json").is_file()}) if as_json else str(folder))


@store.command("verify")
@store_option
@json_option("Print {versions, blobs, bytes, problems} as JSON.")
@click.pass_context
def verify(ctx: click.Context, root: Path | None, as_json: bool) -> None:
    """Read every byte in the store and compare it with its digest; say everything that is missing, damaged or strange.

    \b
    Example:
      trimtab store verify

    Exits with 1 where something is wrong.
    """
    from trimtab.store.registry import Store

    report = Store(root).verify()
    if as_json:
        click.echo(json.dumps(asdict(report), indent=1))
    else:
        for problem in report.problems[:MAX_SHOWN]:
            say(problem, mark="!!", colour="red")
        if len(report.problems) > MAX_SHOWN:
            say(f"… and {len(report.problems) - MAX_SHOWN} more; --json has all")
        read = f"{counted(report.versions, 'version')}, {counted(report.blobs, 'blob')}, {megabytes(report.bytes)}"
        say(f"{read}: {counted(len(report.problems), 'problem') if report.problems else 'all as it was published'}")
        if report.problems:
            say("fix: publish or pull what is damaged again; `trimtab adapters remove` takes a version away", err=True)
    ctx.exit(1 if report.problems else 0)


@store.command("gc")
@click.option("--grace", default=3600.0, show_default=True, type=click.FloatRange(0), help="Seconds for which a blob is spared, unused.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@store_option
@json_option("Print {blobs, bytes, unfinished} as JSON.")
def gc(grace: float, dry_run: bool, root: Path | None, as_json: bool) -> None:
    """Remove files that no version needs any more, and what interrupted commands have left.

    \b
    Example:
      trimtab store gc --dry-run

    Files younger than --grace stay, since a pull that is going on may be about to need them.
    """
    from trimtab.store.registry import Store

    report = Store(root).gc(grace_seconds=grace, dry_run=dry_run)
    if as_json:
        click.echo(json.dumps(asdict(report)))
        return
    verb = "would be removed" if dry_run else "removed"
    say(f"{report.blobs} blobs and {report.unfinished} unfinished files {verb}, {megabytes(report.bytes)}")
