"""`trimtab quantize`"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from trimtab.cli.options import json_option
from trimtab.cli.terminal import say


@click.command()
@click.argument("base")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", default="nf4", show_default=True, help="nf4, fp4, int8, nf4-double or fp4-double (scales quantised too).")
@click.option("--dtype", default="auto", show_default=True, help="Of what stays dense: float32, bfloat16, float16; auto: as stored.")
@json_option("Print the report as JSON.")
def quantize(base: str, folder: Path, to: str, dtype: str, as_json: bool) -> None:
    """Write BASE with its linear layers packed in 4 or 8 bits to FOLDER, as transformers and bitsandbytes read it.

    \b
    Example:
      trimtab quantize ./my-model my-model-nf4 --to nf4

    An adapter fits the written folder, and BASE loaded with --quantize in the same format, alike.
    """
    from trimtab.bases.locate import refuse_hopeless
    from trimtab.bases.recipes import check_quantize
    from trimtab.errors import Mistakes
    from trimtab.store.staging import check_target

    mistakes = Mistakes()
    for look in (lambda: check_quantize(to, str(folder)), lambda: refuse_hopeless(base), lambda: check_target(folder)):
        with mistakes.noted():
            look()
    mistakes.refuse("this cannot be done")
    from trimtab.store.quantized import write_quantized

    report = write_quantized(base, folder, to, dtype=dtype)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report) | {"folder": str(report.folder)}))
        return
    say(f"{folder}: {report.packed} linear layers in {to}, {report.bytes:,} bytes, {report.fingerprint}")
    say(f"dense as before: embedding, norms, {', '.join(report.dense[:5]) or 'nothing else'}")
