"""`trimtab adapters publish`, `alias`, `unalias` and `remove`: what changes names."""

from __future__ import annotations

import json
from pathlib import Path

import click

from trimtab.cli.options import OnBase, device_option, dtype_option, json_option, refuse_folder_of_adapters, store_option
from trimtab.cli.terminal import say
from trimtab.store.told import told_of


@click.command("publish")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--alias", "aliases", multiple=True, help="Let this alias stand for it too, such as prod; may be given several times.")
@click.option("--base", "base_name", help="Load it on this base first; without one, files and digests are checked, but not that they fit.")
@store_option
@dtype_option
@device_option
@json_option("Print the version as JSON.")
def publish(
    folder: Path,
    name: str,
    aliases: tuple[str, ...],
    base_name: str | None,
    root: Path | None,
    dtype: str | None,
    quantize: str | None,
    base_differs: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Copy the adapter in FOLDER, trimtab's or peft's, into the store as the next version of NAME (namespace/name).

    \b
    Example:
      trimtab adapters publish examples/runs/desks/adapters/support-lora acme/support --alias prod

    The store is made where there is none. What the newest version holds already is not published again.
    """
    from trimtab.store.registry import Store

    refuse_folder_of_adapters(folder)
    base = OnBase(base_name, dtype, device, quantize=quantize, base_differs=base_differs).open() if base_name is not None else None
    version = Store(root, create=True).publish(folder, name, base=base, aliases=aliases)
    if as_json:
        click.echo(json.dumps(told_of(version)))
        return
    say(f"{version.ref} ({', '.join(version.aliases)}): {version.method or 'adapter'}, {version.size:,} bytes, {version.digest}")
    if not version.fingerprint and base is None:
        say("it names no base, so nothing says which one it fits: --base BASE would have tried", err=True)


@click.command("alias")
@click.argument("ref")
@click.argument("alias")
@store_option
@json_option("Print the version that it stands for as JSON.")
def set_alias(ref: str, alias: str, root: Path | None, as_json: bool) -> None:
    """Let ALIAS stand for REF (namespace/name@version), whatever it stood for before. `latest` always is the newest version.

    \b
    Example:
      trimtab adapters alias acme/support@2 prod
    """
    from trimtab.store.registry import Store

    store = Store(root)
    store.alias(ref, alias)
    version = store.resolve(ref)
    click.echo(json.dumps(told_of(version)) if as_json else f"{version.name}@{alias} is {version.ref}")


@click.command("unalias")
@click.argument("name")
@click.argument("alias")
@store_option
@json_option("Print {name, removed} as JSON.")
def unalias(name: str, alias: str, root: Path | None, as_json: bool) -> None:
    """Take ALIAS away from NAME (namespace/name). No version goes.

    \b
    Example:
      trimtab adapters unalias acme/support prod
    """
    from trimtab.store.registry import Store

    Store(root).unalias(name, alias)
    click.echo(json.dumps({"name": name, "removed": alias}) if as_json else f"{name}@{alias} is no more")


@click.command("remove")
@click.argument("ref")
@click.option("--all", "whole", is_flag=True, help="Every version of a name, and its aliases.")
@store_option
@json_option("Print what was removed as a JSON list.")
def remove(ref: str, whole: bool, root: Path | None, as_json: bool) -> None:
    """Take REF (namespace/name@version) out of the store, or with --all a whole name. Its number is never used again.

    \b
    Example:
      trimtab adapters remove acme/support@1

    A version that an alias stands for stays until the alias is moved. `trimtab store gc` frees the space.
    """
    from trimtab.store.registry import Store

    removed = Store(root).remove(ref, all=whole)
    if as_json:
        click.echo(json.dumps([told_of(v) for v in removed]))
        return
    say(f"removed: {', '.join(v.ref for v in removed)}; `trimtab store gc` frees the space")
