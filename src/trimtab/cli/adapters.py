"""`trimtab adapters`: what a store holds, and what is done with it. Its commands' files are loaded when they are called."""

from __future__ import annotations

from importlib import import_module

import click

from trimtab.cli.unknown import refuse_unknown

SUBCOMMANDS = {
    "list": ("adapters_list", "The newest version of every name in the store."),
    "show": ("adapters_list", "One version: base, method, scores, files; and all versions of its name."),
    "publish": ("adapters_names", "Put an adapter's folder into the store as the next version of a name."),
    "alias": ("adapters_names", "Let an alias, such as prod, stand for a version."),
    "unalias": ("adapters_names", "Take an alias away."),
    "remove": ("adapters_names", "Take a version, or a whole name, out of the store."),
    "diff": ("adapters_diff", "What differs between two versions, in settings and in weights."),
    "combine": ("adapters_combine", "The weighted sum of several adapters of one method as one adapter."),
    "compress": ("adapters_compress", "An adapter in fewer bytes: lower ranks, half precision."),
    "import": ("adapters_import", "Read an adapter of AdapterHub's, or of an older peft's, and write it as trimtab's."),
    "push": ("adapters_push", "Copy a version to a registry, a bucket, a folder or the Hugging Face hub."),
    "pull": ("adapters_pull", "Fetch an adapter from there into the store."),
}
"""name -> (file in trimtab.cli that has a command of that name, what it does)."""


class Subcommands(click.Group):
    """Loads `trimtab.cli.<file>` when a command is called, and takes the command of that name from it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in SUBCOMMANDS:
            return None
        found = vars(import_module(f"trimtab.cli.{SUBCOMMANDS[name][0]}")).values()
        return next(c for c in found if isinstance(c, click.Command) and c.name == name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        refuse_unknown(ctx, args, SUBCOMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, what) in SUBCOMMANDS.items()])


@click.group(cls=Subcommands)
def adapters() -> None:
    """Adapters in the store: namespace/name@version, immutable, counted up. `name` alone is its newest version, `name@prod` an alias.

    \b
    Example:
      trimtab adapters publish examples/runs/desks/adapters/support-lora acme/support
      trimtab adapters list
      trimtab generate --adapter acme/support "How do I cancel an invoice?"
    """
