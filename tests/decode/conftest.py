"""Fixtures of serving."""

from tests.laws.common import one_thread

__all__ = ["one_thread"]
