"""`trimtab export`"""

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
@click.option("--format", "kind", default="peft", show_default=True, help="peft, vllm, merged or gguf.")
@click.option("--call-base", "called", help="What the folder calls its base: vLLM's name for the model. By default its hub id or folder.")
@base_options
@json_option("Print the report as JSON.")
def export(
    adapter: str,
    folder: Path,
    kind: str,
    called: str | None,
    on: OnBase,
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

    with on.before_loading([adapter]) as mistakes:
        with mistakes.noted():
            check_format(kind)
        with mistakes.noted():
            check_target(folder)
    loaded = on.adapter(adapter, on.as_stored().open())
    report = write(loaded, folder, kind, base_name=called)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report) | {"folder": str(report.folder)}))
        return
    sizes = ", ".join(f"{name} ({size:,} bytes)" for name, size in report.files.items())
    say(f"{folder}: {sizes}" + (f"; rank {report.rank}" if report.rank else ""))
    say(
        f"read back by {' and '.join(report.checked)}: its logits differ from those of base with adapter by {report.relative:.2%} of the "
        f"logits' standard deviation (RMS; rounding explains up to {report.allowed:.2%})"
    )
