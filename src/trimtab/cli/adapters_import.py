"""`trimtab adapters import`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from trimtab.cli.options import OnBase, base_option, device_option, dtype_option, json_option, on_base
from trimtab.cli.terminal import say


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@base_option
@dtype_option
@device_option
@json_option("Print what was imported as JSON.")
@on_base
def import_adapter(folder: Path, target: Path, on: OnBase, as_json: bool) -> None:
    """Read an adapter of AdapterHub's `adapters`, or of peft's with names of old, from FOLDER and write it to TARGET as trimtab's.

    \b
    Example:
      trimtab adapters import downloads/my-houlsby-adapter mine --base ./llama

    It is laid on the base that you name, and TARGET records that base. What cannot be carried over is named, and nothing is written.
    Folders that peft writes today need no import: every command takes them.
    """
    from trimtab.store.imports import import_folder

    imported = import_folder(folder, on.open())
    imported.adapter.save(target, run={"imported": {"from": str(folder), "format": imported.source, "changes": list(imported.changes)}})
    if as_json:
        found = {"folder": str(target), "format": imported.source, "method": imported.adapter.method.name, "changes": imported.changes}
        click.echo(json.dumps(found | {"parameters": imported.adapter.num_parameters}))
        return
    say(f"{target}: {imported.adapter.method.name} of {imported.source}'s, {imported.adapter.num_parameters:,} parameters")
    for change in imported.changes:
        say(f"  {change}")
