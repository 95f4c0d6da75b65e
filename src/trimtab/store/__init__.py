"""Adapters as artifacts: peft's folder format, what is refused, merging."""

from trimtab.store.adapter import Adapter

__all__ = ["Adapter"]
