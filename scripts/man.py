"""Manual pages of `trimtab` and all of its commands, by click-man: `python -m scripts.man FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click_man.core import write_man_pages

from trimtab.cli import main
from trimtab.version import __version__


def write(folder: Path) -> list[Path]:
    """The pages, written."""
    folder.mkdir(parents=True, exist_ok=True)
    _write("trimtab", main, None, folder)
    return sorted(folder.glob("*.1"))


def _write(name: str, command: click.Command, parent: click.Context | None, folder: Path) -> None:
    """A command's page, and those of the commands in it: groups load theirs when asked, so click-man does not find them by itself."""
    write_man_pages(name, command, parent_ctx=parent, version=__version__, target_dir=str(folder))
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name, parent=parent)
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            _write(inner, found, context, folder)


if __name__ == "__main__":
    pages = write(Path(sys.argv[1]))
    print(f"{len(pages)} manual pages in {sys.argv[1]}: man -l {pages[0]}")
