"""`trimtab adapters diff`"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.options import json_option, store_option
from trimtab.cli.tables import print_table, shown
from trimtab.cli.terminal import say

if TYPE_CHECKING:
    from trimtab.store.diff import Diff

SHOWN = 12
"""Tensors that are listed, those that differ most; --json has all."""


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option("--no-weights", is_flag=True, help="Settings and files only: no tensor is read.")
@store_option
@json_option("Print everything as one object.")
def diff(a: str, b: str, no_weights: bool, root: Path | None, as_json: bool) -> None:
    """What differs between the versions A and B, of one name or of two: settings, files, and of each tensor by how much.

    \b
    Example:
      trimtab adapters diff acme/support@1 acme/support@2

    A tensor's difference is relative: the norm of b - a over that of a.
    """
    from trimtab.store.registry import Store

    found = Store(root).diff(a, b, weights=not no_weights)
    if as_json:
        click.echo(json.dumps(_plain(asdict(found)), indent=1))
        return
    say(f"a: {found.a}\nb: {found.b}\n")
    if found.config:
        print_table(("setting", "a", "b"), [(c.key, shown(c.a), shown(c.b)) for c in found.config])
    else:
        say("adapter_config.json says the same")
    say(f"files that are equal: {', '.join(found.shared) or 'none'}")
    if not no_weights:
        _weights(found)


def _weights(found: Diff) -> None:
    apart = sorted(((d, name) for name, d in found.tensors.items() if d), reverse=True)
    say(f"tensors: {len(found.tensors) - len(apart)} equal, {len(apart)} changed")
    for what, names in (("only in a", found.removed), ("only in b", found.added), ("of another shape", found.reshaped)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            say(f"{what}: {', '.join(shown(n, 120) for n in names[:SHOWN])}{more}")
    if apart:
        print_table(("changed most", "relative difference"), [(shown(n, 120), f"{d:.3g}") for d, n in apart[:SHOWN]], right=())


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a tensor that was zero and is not any more is null apart."""
    return found | {"tensors": {n: d if math.isfinite(d) else None for n, d in found["tensors"].items()}}
