"""`trimtab train`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from trimtab.cli import show


@click.command()
@click.argument("run_file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write the run folder here instead of the run file's `out`.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json at the end, and no progress.")
def train(run_file: Path, out: Path | None, as_json: bool) -> None:
    """Train every variant of RUN_FILE together on one frozen base, score it beside the base on the test rows, and save it.

    \b
    Example:
      trimtab train examples/desks.yaml

    The run folder holds adapters/<variant>/ (peft's format), metrics.jsonl and summary.json.
    """
    from trimtab.train import RunConfig, train

    run = RunConfig.load(run_file)
    if out is not None:
        run = run.model_copy(update={"out": out})
    with show.listener(quiet=as_json) as listener:
        report = train(run, listener=listener)
    if as_json:
        click.echo(json.dumps(report.summary, indent=1))
        return
    console = show.console()
    console.print(show.score_table(report.summary))
    s = report.summary
    console.print(
        f"{s['tokens']:,} tokens in {s['seconds']:.0f} s: {s['tokens_per_s']} tokens/s, peak memory {s['peak_memory_gb']} GB",
        highlight=False,
    )
    console.print(f"saved in {report.out}: adapters/, metrics.jsonl, summary.json", highlight=False, soft_wrap=True)
