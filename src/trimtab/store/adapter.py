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
    """One adapter on one base. What it holds is written at `AdapterInMemory`."""

    @classmethod
    def load(cls, source: str | Path, base: Base, *, store: str | Path | Store | None = None) -> Self:
        """Load an adapter onto a base: from a folder, ours or peft's, or from a store, named as "acme/support@3".

        A folder that is there is taken before a name. store: the store or its folder, `default_root()` where None. What a folder of peft's
        says and this base lacks is left out; it is logged, and in `warnings`. AdapterError with every finding where the adapter is not
        there or is refused.
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
        """Write the base with this adapter folded into its weights as a model folder; NotMergeable, nothing left, where that cannot be."""
        return merge_into(self, folder)
