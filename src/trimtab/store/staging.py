"""Folders that users name: written whole or not at all (`trimtab.atomic`), and never over files of other origin."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.atomic import atomic_dir
from trimtab.errors import AdapterError


@contextmanager
def staged(target: str | Path, *, may_replace: Collection[str] = ()) -> Iterator[Path]:
    """A new empty folder beside `target`; when the block ends well its files are fsynced and it takes the name `target`.

    may_replace: names of files; an existing target is replaced only if it holds no other. AdapterError if it does, or cannot be written.
    """
    target = Path(target).absolute()
    check_target(target, may_replace)
    where, fix = f"into {target.parent}", "give a folder that can be written"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_dir(target, lambda content: check_target(target, may_replace, content)) as work:
            where, fix = str(target), "make room, or give another folder"
            yield work
    except OSError as error:
        raise AdapterError(f"cannot write {where}: {error.strerror or error}", fix=fix) from error


def check_target(target: Path, may_replace: Collection[str] = (), content: Path | None = None) -> None:
    """AdapterError if target must not be replaced. content: where what was in it is by now."""
    if target.is_symlink():
        raise AdapterError(f"{target} is a symbolic link, which is not replaced", fix="give the folder itself")
    if target.exists() and not target.is_dir():
        raise AdapterError(f"{target} is a file", fix="give the name of a folder, new or empty")
    if (up := next((p for p in target.absolute().parents if p.exists()), None)) is not None and not up.is_dir():
        raise AdapterError(f"cannot write {target}: {up} is a file", fix="give the name of a folder, new or empty")
    content = content or target
    others = sorted(p.name for p in content.iterdir() if p.name not in may_replace) if content.exists() else []
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise AdapterError(
            f"{target} already holds {', '.join(others[:5])}{more}, which would be lost", fix="give the name of a new folder"
        )
