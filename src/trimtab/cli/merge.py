"""`trimtab merge`"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from trimtab.cli.options import OnBase, base_options, json_option
from trimtab.cli.terminal import say


@click.command()
@click.argument("adapter")
@click.argument("folder", type=click.Path(path_type=Path))
@base_options
@json_option("Print the report as JSON.")
def merge(adapter: str, folder: Path, on: OnBase, as_json: bool) -> None:
    """Fold ADAPTER (its folder, or its name in the store) into the base's weights and write an ordinary model folder to FOLDER. The merged
    model is reloaded and compared first.

    \b
    Example:
      trimtab merge examples/runs/desks/adapters/support-lora merged-support

    Merged weights are rounded once to the dtype in which the base is stored, so the merged model's logits differ a little from those of
    base and adapter. The relative difference says how much: 0.01 is a hundredth of what logits vary by. Above what rounding explains, the
    merge is refused and nothing is written.

    An adapter that was trained on a quantised base is merged into the dense one: with --quantize as in its training, or with
    --base-differs.
    """
    from trimtab.store.staging import check_target

    with on.before_loading([adapter]) as mistakes, mistakes.noted():
        check_target(folder)
    loaded = on.adapter(adapter, on.as_stored().open())
    report = loaded.merge_into(folder)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report) | {"folder": str(report.folder)}))
        return
    say(f"{folder}: an ordinary model folder, weights in {report.dtype}")
    say(
        f"its logits differ from those of base with adapter by {report.relative:.2%} of the logits' standard deviation (RMS; rounding "
        f"explains up to {report.allowed:.2%}), at most by {report.max_difference:.2g}"
    )
    if report.quantized:
        say(f"merged into the base's dense weights; answers on {report.quantized} differ from them by what quantising changed")
    if report.untied:
        say("the output head got weights of its own: the adapter changes it or the embedding, to which it was tied")
