"""What a group that loads its commands late says to a name that it does not have: click knows only those that are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

from trimtab.errors import nearest, printable


def refuse_unknown(ctx: click.Context, arguments: Sequence[str], known: Iterable[str]) -> None:
    """UsageError where the first argument is neither a known command nor an option; it names the nearest one."""
    name = arguments[0]
    if name not in (names := list(known)) and not name.startswith("-") and not ctx.resilient_parsing:
        ctx.fail(f"No such command '{printable(name)}'{nearest(name, names)}.")
