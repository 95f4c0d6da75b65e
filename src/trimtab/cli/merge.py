"""`trimtab merge`"""

from __future__ import annotations

from pathlib import Path

import click

from trimtab.cli.options import base_option, device_option, dtype_option, open_base


@click.command()
@click.argument("adapter")
@click.argument("folder", type=click.Path(path_type=Path))
@base_option
@dtype_option
@device_option
def merge(adapter: str, folder: Path, base_name: str, dtype: str | None, device: str | None) -> None:
    """Fold ADAPTER into the base's weights and write an ordinary model folder to FOLDER. The merged model is reloaded and compared first.

    \b
    Example:
      trimtab merge runs/desks/adapters/support-lora merged-support
    """
    from trimtab.store import Adapter

    base = open_base(base_name, dtype, device)
    report = Adapter.load(adapter, base).merge_into(folder)
    click.echo(f"{folder}: largest logit difference to base and adapter {report.max_difference:.2e}")
