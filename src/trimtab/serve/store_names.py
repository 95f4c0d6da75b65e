"""Which names a store has, for looking one up in microseconds: read anew when the store's index changes, never answered from before.

`Store.resolve` looks for the nearest spelling of a name that is not there. That helps a person, but it takes as long as there are names
alike, other tenants' among them, so a server must not ask it for names that are not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from threading import Lock

from trimtab.store.index import REF_NAME
from trimtab.store.registry import Store


class StoreNames:
    """The names of one store. Any number of threads."""

    def __init__(self, store: Store):
        self._store, self._file = store, store.root / "index.json"
        self._lock = Lock()
        self._mark: tuple[int, int, int] | None = None
        self._namespaces: Mapping[str, tuple[str, ...]] = {}

    def namespaces(self) -> Mapping[str, tuple[str, ...]]:
        """name -> the namespaces that have it, as of now. AdapterError or OSError if the store cannot be read."""
        status = os.stat(self._file)
        mark = (status.st_ino, status.st_mtime_ns, status.st_size)  # taken first: what is read is then at least as new
        with self._lock:
            if mark != self._mark:
                self._namespaces, self._mark = self._read(), mark
            return self._namespaces

    def _read(self) -> dict[str, tuple[str, ...]]:
        self._store.namespaces()  # refuses an index in which anything is wrong
        found: dict[str, set[str]] = {}
        for entry in json.loads(self._file.read_bytes())["manifests"]:
            namespace, _, name = entry["annotations"][REF_NAME].partition("@")[0].partition("/")
            found.setdefault(name, set()).add(namespace)
        return {name: tuple(sorted(those)) for name, those in found.items()}
