"""What the source of an adapter means: a folder, or a name in a store."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from trimtab.errors import AdapterError
from trimtab.paths import is_url
from trimtab.store.names import is_reference
from trimtab.store.registry import Store
from trimtab.store.version import Version


class InStore(NamedTuple):
    """A version, and the store that holds it."""

    store: Store
    version: Version


def find_adapter(source: str | Path, store: str | Path | Store | None = None) -> Path | InStore:
    """A folder's path, or a version of the store that is named as "acme/support@3". A folder that is there is taken before a name. Of a run
    in a bucket, "s3://bucket/run/adapters/v", the path of a copy in the cache.

    store: the store or its folder, `default_root()` where None. AdapterError if a name means nothing there; whether there is a folder,
    and what it holds, is not looked at.
    """
    if is_url(source):
        from trimtab.store.remotes.snapshot import brought

        return brought(str(source))
    if not is_reference(source):
        return Path(source)
    try:
        found = store if isinstance(store, Store) else Store(store)
        return InStore(found, found.resolve(str(source)))
    except AdapterError as error:
        message = f"adapter {str(source)!r}: no such folder (looked for {Path(source).absolute()}), and {error.message}"
        raise type(error)(message, problems=error.problems, fix=error.fix) from error
