"""`trimtab init`"""

from __future__ import annotations

import os
from pathlib import Path

import click

from trimtab.cli.options import write_new
from trimtab.errors import ConfigError


@click.command()
@click.argument("data")
@click.option(
    "--out", default="run.yaml", show_default=True, type=click.Path(dir_okay=False, path_type=Path), help="The run file to write."
)
@click.option("--base", default="smollm2-135m-instruct", show_default=True, help="The base that it names.")
def init(data: str, out: Path, base: str) -> None:
    """Write a run file for DATA: a file or folder of rows, or hf:org/name.

    \b
    Example:
      trimtab init tickets.csv
      trimtab init data/ --out support.yaml

    The form of the rows, their columns, labels, objective, and the rows to validate on are guessed. Each guess is said in a comment.
    """
    from trimtab.train.initial import guess, run_text

    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}", fix="make it, or name a file in a folder that is there")
    if not data.startswith("hf:"):
        data = os.path.relpath(data, out.parent)  # paths of a run file start at its folder
    write_new(out, run_text(guess(data, out.parent), base))
