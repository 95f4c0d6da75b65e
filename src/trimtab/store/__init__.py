"""Adapters as artifacts: peft's folder format, what is refused, merging, the store."""

from trimtab.store.adapter import Adapter
from trimtab.store.merge import MergeReport
from trimtab.store.names import Ref, is_reference
from trimtab.store.registry import Store, Version

__all__ = ["Adapter", "MergeReport", "Ref", "Store", "Version", "is_reference"]
