"""`trimtab train --ray`"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from trimtab.cli import show
from trimtab.cli.stopping import cluster_words, stopping, tell_how_to_resume
from trimtab.cli.terminal import say


def train_on_ray(
    ctx: click.Context,
    files: Sequence[Path],
    address: str,
    cpus: int | None,
    *,
    out: str | None,
    resume: bool,
    extend: bool,
    changes: tuple[str, ...],
    root: Path | None,
    as_json: bool,
) -> None:
    """Each run file on a node of the cluster; then what `train` prints of each, or with as_json one object: name -> summary."""
    from trimtab.train import RunConfig

    runs = dict(zip(names_of(files), (RunConfig.load(file, changes) for file in files), strict=True))
    if out is not None:
        runs = {name: run.writing_to(out) for name, run in runs.items()}
    from trimtab.cli.show_cluster import display
    from trimtab.cluster.nodes import connected
    from trimtab.cluster.training import train_all
    from trimtab.train.interrupt import Interrupted, Stop

    stop = Stop()
    try:
        with connected(address) as cluster, stopping(stop), display(quiet=as_json) as shown:
            found = train_all(runs, cluster, shown.board, stop=stop, resume=resume, extend=extend, store=root, cpus=cpus)
    except Interrupted as e:
        say(str(e), err=True)
        tell_how_to_resume("train", files, out, root, changes, more=cluster_words(address, cpus))
        ctx.exit(e.exit_code)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    console = show.console()
    for name, summary in found.items():
        console.print(show.score_table(summary))
        where = "adapters/, metrics.jsonl, summary.json, report.html"
        console.print(f"{name}: saved in {runs[name].url or runs[name].out}: {where}", highlight=False, markup=False, soft_wrap=True)


def names_of(files: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, or its whole path where several have the same."""
    often = Counter(file.stem for file in files)
    return [file.stem if often[file.stem] == 1 else str(file) for file in files]
