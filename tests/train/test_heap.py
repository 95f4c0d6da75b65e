"""Freed memory is kept for the next step, and goes back to the system where the process has grown."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trimtab.train.heap import Heap


def _steps(heap: Heap, monkeypatch: pytest.MonkeyPatch, resident: list[int]) -> list[bool]:
    seen = iter(resident)
    monkeypatch.setattr(heap.process, "memory_info", lambda: SimpleNamespace(rss=next(seen)))
    return [heap.after_step() for _ in resident]


def test_it_trims_only_beyond_the_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    heap, trims = Heap(), []
    heap.trim = lambda: trims.append(1)
    assert _steps(heap, monkeypatch, [100, 129, 131, 110]) == [False, False, True, False]
    assert len(trims) == 1


def test_what_a_step_needs_after_a_trim_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    heap = Heap()
    heap.trim = lambda: None
    assert _steps(heap, monkeypatch, [100, 131, 131, 150, 170, 171]) == [False, True, False, False, False, True]


def test_without_glibc_it_does_nothing() -> None:
    heap = Heap()
    heap.trim = None
    assert not heap.after_step()
