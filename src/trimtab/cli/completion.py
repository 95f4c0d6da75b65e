"""`trimtab completion`"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print a script for SHELL that completes trimtab's commands, options and paths.

    \b
    Example:
      trimtab completion bash > ~/.local/share/bash-completion/completions/trimtab
      eval "$(trimtab completion zsh)"
      trimtab completion fish > ~/.config/fish/completions/trimtab.fish

    The folder must exist. A new shell knows the completions.
    """
    from trimtab.cli import main

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "trimtab", "_TRIMTAB_COMPLETE").source())
