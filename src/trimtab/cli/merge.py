"""`trimtab merge`"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from trimtab.cli.options import base_option, before_loading, device_option, dtype_option, open_adapter, open_base, store_option


@click.command()
@click.argument("adapter")
@click.argument("folder", type=click.Path(path_type=Path))
@base_option
@store_option
@dtype_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def merge(adapter: str, folder: Path, base_name: str, root: Path | None, dtype: str | None, device: str | None, as_json: bool) -> None:
    """Fold ADAPTER (its folder, or its name in the store) into the base's weights and write an ordinary model folder to FOLDER. The merged
    model is reloaded and compared first.

    \b
    Example:
      trimtab merge examples/runs/desks/adapters/support-lora merged-support

    Merged weights are rounded once to the dtype in which the base is stored, so the merged model's logits differ a little from those of
    base and adapter. The relative difference says how much: 0.01 is a hundredth of what logits vary by. Above what rounding explains, the
    merge is refused and nothing is written.
    """
    from trimtab.store.staging import check_target

    with before_loading(base_name, dtype, device, [adapter], root) as mistakes, mistakes.noted():
        check_target(folder)
    loaded = open_adapter(adapter, open_base(base_name, dtype, device), root)
    assert loaded is not None
    report = loaded.merge_into(folder)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report) | {"folder": str(report.folder)}))
        return
    click.echo(f"{folder}: an ordinary model folder, weights in {report.dtype}")
    click.echo(
        f"logits against base and adapter: RMS difference {report.relative:.2g} of their spread (rounding explains up to "
        f"{report.allowed:g}), largest difference {report.max_difference:.2g}"
    )
    if report.untied:
        click.echo("the output head got weights of its own: the adapter changes it or the embedding, to which it was tied")
