"""Adapters as artifacts: peft's folder format, what is refused, merging."""

from trimtab.store.adapter import Adapter
from trimtab.store.merge import MergeReport

__all__ = ["Adapter", "MergeReport"]
