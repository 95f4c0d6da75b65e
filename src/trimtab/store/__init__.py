"""Adapters as artifacts: peft's folder format, what is refused, merging, the store."""

from typing import TYPE_CHECKING

from trimtab.lazy import load_on_first_use

if TYPE_CHECKING:
    from trimtab.store.adapter import Adapter
    from trimtab.store.merge import MergeReport
    from trimtab.store.names import Ref, is_reference
    from trimtab.store.registry import Store, Version
else:
    load_on_first_use(__name__)

__all__ = ["Adapter", "MergeReport", "Ref", "Store", "Version", "is_reference"]
