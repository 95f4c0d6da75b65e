"""A version of the store as JSON, for --json of the command line and for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimtab.errors import AdapterError
from trimtab.store.files import Refusal
from trimtab.store.folder import NOTE
from trimtab.store.version import Version

if TYPE_CHECKING:
    from trimtab.store.registry import Store


def told_of(v: Version) -> dict[str, Any]:
    """What lists say of a version; null for what is not known."""
    names = {"ref": v.ref, "name": v.name, "version": v.version, "aliases": list(v.aliases), "digest": v.digest}
    return names | {
        "method": v.method or None,
        "base": v.base or None,
        "fingerprint": v.fingerprint or None,
        "parameters": v.parameters,
        "bytes": v.size,
        "created": v.created or None,
    }


def files_of(v: Version) -> dict[str, dict[str, Any]]:
    """name -> digest and bytes of each of its files."""
    return {n: {"digest": f.digest, "bytes": f.size} for n, f in v.files.items()}


def note_of(store: Store, version: Version) -> dict[str, Any] | None:
    """trimtab.json, which a peft folder does not have. AdapterError if it is damaged."""
    if NOTE not in version.files:
        return None
    try:
        with store.open(version) as folder:
            return folder.read_json(NOTE)[0]
    except Refusal as reason:
        raise AdapterError(f"{version.ref} is refused: {reason}", fix="`trimtab store verify` lists all that is wrong") from reason
