"""`trimtab adapters list` and `show`"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.options import json_option, store_option
from trimtab.cli.tables import print_table, shown
from trimtab.cli.terminal import say
from trimtab.cli.transfer import megabytes
from trimtab.store.told import files_of, note_of, told_of

if TYPE_CHECKING:
    from trimtab.store.version import Version


BLOCK = 1000
"""Rows that are printed at once, with columns as wide as these need."""


@click.command("list")
@click.argument("namespace", required=False)
@store_option
@json_option("Print one object for each name.")
def list_names(namespace: str | None, root: Path | None, as_json: bool) -> None:
    """The newest version of every name, or of those in NAMESPACE.

    \b
    Example:
      trimtab adapters list acme
    """
    from trimtab.store.registry import Store

    store = Store(root)
    found = (store.version(n, n.newest) for n in store.names(namespace))
    if as_json:
        _print_json(found)
        return
    rows, first = ((v.ref, *_cells(v), shown(v.base or "–", 40)) for v in found), True
    while some := list(islice(rows, BLOCK)):
        print_table(("adapter", *HEADINGS, "base"), some, right=NUMBERS, headed=first)
        first = False
    if first:
        say(f"no adapters {f'in namespace {namespace} ' if namespace else ''}in {store.root}")


def _print_json(versions: Iterable[Version]) -> None:
    """One array, an object at a time."""
    before = "[\n"
    for v in versions:
        click.echo(before + indent(json.dumps(told_of(v), indent=1), " "), nl=False)
        before = ",\n"
    click.echo("[]" if before == "[\n" else "\n]")


@click.command("show")
@click.argument("ref")
@store_option
@json_option("Print one object, trimtab.json's content in it.")
def show_version(ref: str, root: Path | None, as_json: bool) -> None:
    """One version: where it comes from, what it scores, its files. REF is namespace/name, with @version or @alias for another than the
    newest.

    \b
    Example:
      trimtab adapters show acme/support@2
    """
    from trimtab.store.registry import Store

    store = Store(root)
    version = store.resolve(ref)
    note, versions = note_of(store, version), store.versions(version.name)
    if as_json:
        more = {"files": files_of(version), "note": note, "versions": [v.version for v in versions]}
        click.echo(json.dumps(told_of(version) | more, indent=1))
        return
    for name, value in _facts(version, note):
        say(f"{name:<12} {value}")
    say("")
    print_table(("file", "bytes", "digest"), [(n, f"{f.size:,}", f.digest) for n, f in version.files.items()], right=("bytes",))
    if len(versions) > 1:
        say(f"\nversions of {version.name}")
        print_table(("version", *HEADINGS), [(f"@{v.version}", *_cells(v)) for v in reversed(versions)], right=NUMBERS)


HEADINGS = ("aliases", "method", "parameters", "size", "created")
NUMBERS = ("parameters", "size")


def _cells(v: Version) -> tuple[str, ...]:
    numbers = f"{v.parameters:,}" if v.parameters is not None else "–"
    return ", ".join(v.aliases), shown(v.method or "–"), numbers, megabytes(v.size), shown(v.created[:16] or "–")


def _facts(v: Version, note: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    facts = [("adapter", f"{v.ref} ({', '.join(v.aliases)})" if v.aliases else v.ref), ("digest", v.digest)]
    facts += [("base", shown(v.base or "not named", 100)), ("fingerprint", shown(v.fingerprint or "none: it is unverified", 100))]
    numbers = f"{v.parameters:,} parameters, " if v.parameters is not None else ""
    facts += [("method", shown(v.method or "–")), ("size", f"{numbers}{v.size:,} bytes"), ("created", shown(v.created or "–"))]
    run = (note or {}).get("run")
    if note is not None and isinstance(note.get("fields"), dict):
        facts.append(("fields", _pairs(note["fields"])))
    if isinstance(run, dict):
        facts += [(name, _pairs(run[name])) for name in ("options", "metrics") if isinstance(run.get(name), dict) and run[name]]
        facts += [("data", shown(run["data_digest"], 100))] if run.get("data_digest") else []
    return facts


def _pairs(values: Mapping[str, Any]) -> str:
    said = [f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items() if v not in (None, {}, [])]
    return shown(" ".join(said), 400)
