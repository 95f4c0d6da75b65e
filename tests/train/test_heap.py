"""Freed memory goes back to the system where the process has grown."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trimtab.train.heap import Heap


def test_it_trims_only_beyond_the_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    heap, trims = Heap(), []
    heap.trim = lambda: trims.append(1)
    resident = iter([100, 129, 131, 110])
    monkeypatch.setattr(heap.process, "memory_info", lambda: SimpleNamespace(rss=next(resident)))
    assert [heap.after_step() for _ in range(4)] == [False, False, True, False]
    assert len(trims) == 1


def test_without_glibc_it_does_nothing() -> None:
    heap = Heap()
    heap.trim = None
    assert not heap.after_step()
