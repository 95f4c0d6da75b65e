"""`trimtab export`"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from trimtab.cli.options import base_option, before_loading, device_option, dtype_option, open_adapter, open_base, store_option


@click.command()
@click.argument("adapter")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--format", "kind", default="peft", show_default=True, help="peft, vllm, merged or gguf.")
@click.option("--call-base", "called", help="What the folder calls its base: vLLM's name for the model. By default its hub id or folder.")
@base_option
@store_option
@dtype_option
@device_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def export(
    adapter: str,
    folder: Path,
    kind: str,
    called: str | None,
    base_name: str,
    root: Path | None,
    dtype: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Write ADAPTER (its folder, or its name in the store) to FOLDER as another program wants it, read it back, and compare.

    \b
    Example:
      trimtab export examples/runs/desks/adapters/support-lora for-vllm --format vllm

    \b
    peft    the plain folder that peft's PeftModel.from_pretrained loads
    vllm    LoRA with one rank and one scaling: vllm serve --enable-lora --lora-modules NAME=FOLDER
    merged  base and adapter as one ordinary model folder
    gguf    adapter.gguf for llama.cpp's --lora, of a LoRA on a Llama model

    What a format cannot hold is refused, and nothing is written.
    """
    from trimtab.store.export import check_format
    from trimtab.store.export import export as write
    from trimtab.store.staging import check_target

    with before_loading(base_name, dtype, device, [adapter], root) as mistakes:
        with mistakes.noted():
            check_format(kind)
        with mistakes.noted():
            check_target(folder)
    loaded = open_adapter(adapter, open_base(base_name, dtype, device), root)
    assert loaded is not None
    report = write(loaded, folder, kind, base_name=called)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report) | {"folder": str(report.folder)}))
        return
    sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in report.files.items())
    click.echo(f"{folder}: {sizes}" + (f"; rank {report.rank}" if report.rank else ""))
    click.echo(
        f"read back by {' and '.join(report.checked)}: logits differ from base and adapter by {report.relative:.2g} of their spread "
        f"(rounding explains up to {report.allowed:g})"
    )
