"""Adapters by name: loaded from a folder or a store, saved, merged into their base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from trimtab.errors import AdapterError
from trimtab.store.files import open_folder
from trimtab.store.find import InStore, find_adapter
from trimtab.store.in_memory import AdapterInMemory
from trimtab.store.merge import MergeReport, merge_into
from trimtab.store.registry import Store

if TYPE_CHECKING:
    from trimtab.model import Base

LOOKS = 10
"""How often a folder is opened anew that was replaced while it was read."""


class Adapter(AdapterInMemory):
    """One adapter on one base. Its attributes are described at `AdapterInMemory`."""

    @classmethod
    def load(cls, source: str | Path, base: Base, *, store: str | Path | Store | None = None) -> Self:
        """Load an adapter onto a base: from a folder of trimtab's or of peft's, or from a store, by a name such as "acme/support@3".

        If there is a folder of that name, it is taken. store: the store or its folder; None: `default_root()`. What a peft folder names and
        this base lacks is ignored, logged, and listed in `warnings`. AdapterError with every finding if the adapter does not exist or is
        refused.
        """
        found = find_adapter(source, store)
        if isinstance(found, InStore):
            with found.store.open(found.version) as folder:
                return cls.read(folder, base, f"adapter {found.version.ref}")
        for _ in range(LOOKS):
            with open_folder(found) as folder:
                try:
                    return cls.read(folder, base, f"adapter {str(source)!r}")
                except AdapterError:
                    if not folder.is_replaced:  # else its files went while they were read, and another adapter is there
                        raise
        raise AdapterError(f"adapter {str(source)!r} is being replaced again and again", fix="load it when it stays")

    def merge_into(self, folder: str | Path) -> MergeReport:
        """Write a model folder of the base with this adapter merged into its weights. If that cannot be done, NotMergeable is raised and
        nothing is left."""
        return merge_into(self, folder)
