"""Freed memory goes back to the system where the process has grown."""

from __future__ import annotations

import pytest

from trimtab.train.heap import Heap


def test_it_trims_only_beyond_the_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    heap, trims, resident = Heap(), [], 100

    class Info:
        @property
        def rss(self) -> int:
            return resident

    heap.trim = lambda: trims.append(resident)
    monkeypatch.setattr(heap.process, "memory_info", Info)
    for resident, expected in [(100, False), (129, False), (131, True), (110, False)]:
        assert heap.after_step() is expected
    assert trims == [131]


def test_without_glibc_it_does_nothing() -> None:
    heap = Heap()
    heap.trim = None
    assert not heap.after_step()
