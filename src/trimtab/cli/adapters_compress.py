"""`trimtab adapters compress`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from trimtab.cli.options import OnBase, base_options, json_option
from trimtab.cli.terminal import say
from trimtab.errors import ConfigError


@click.command("compress")
@click.argument("adapter")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="LoRA: every module's rank at most.")
@click.option("--error", type=float, help="LoRA: the smallest rank of each module that loses at most this share of its weight change.")
@click.option("--store-as", "stored", default="float32", show_default=True, help="float32, bfloat16 or float16: any method.")
@base_options
@json_option("Print the report as JSON, module by module.")
def compress(
    adapter: str,
    target: Path,
    rank: int | None,
    error: float | None,
    stored: str,
    on: OnBase,
    as_json: bool,
) -> None:
    """Write ADAPTER (its folder, or its name in the store) to TARGET in fewer bytes: lower ranks, half precision, or both.

    \b
    Example:
      trimtab adapters compress examples/runs/desks/adapters/support-lora small --error 0.1 --store-as bfloat16

    Errors are relative: 0.1 is a tenth of the norm of the weight change. Score the result with `trimtab eval` before it is used.
    """
    from trimtab.store.compress import compress as cut
    from trimtab.store.compress import rounding_error

    if rank is None and error is None and stored == "float32":
        raise ConfigError("nothing to compress", fix="give --rank, --error, or --store-as bfloat16")
    loaded = on.adapter(adapter, on.open())
    small, report = (loaded, None) if rank is None and error is None else cut(loaded, rank=rank, error=error)
    origin = loaded.info.get("run") or {}
    said: dict[str, Any] = {"of": adapter, "rank": rank, "error": report.error if report else None, "dtype": stored}
    small.save(target, run={"data_digest": origin.get("data_digest"), "compressed": said, "origin": origin}, dtype=stored)
    rounded = rounding_error(small, stored)
    size = (target / "adapter_model.safetensors").stat().st_size
    if as_json:
        found = {"folder": str(target), "bytes": size, "dtype": stored, "rounding_error": rounded}
        click.echo(json.dumps(found | (report.to_dict() if report else {})))
        return
    say(f"{target}: {small.method.name}, {small.num_parameters:,} parameters in {stored}, {size:,} bytes")
    if report is not None:
        ranks = [after for _, after in report.ranks.values()]
        say(
            f"ranks {min(ranks)} to {max(ranks)}, {report.parameters[0] / report.parameters[1]:.1f} times fewer parameters; "
            f"error of the weight change {report.error:.3g}, of one module at most {max(report.errors.values()):.3g}"
        )
    if stored != "float32":
        say(f"error of rounding to {stored}: {rounded:.2g}")
