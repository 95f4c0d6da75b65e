"""Freed memory is kept for the next step, and goes back to the system where the process has grown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
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


SHAPES = """
import ctypes
import trimtab, torch

class Told(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Told
weight = torch.randn(1536, 576, dtype=torch.bfloat16)

def used(first, last):
    for rows in range(first, last):
        torch.nn.functional.linear(torch.ones(rows, 576, dtype=torch.bfloat16), weight)
    return mallinfo2().uordblks

before = used(100, 200)
print(used(200, 400) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc tells what is in use")
@pytest.mark.parametrize(("kept", "grows"), [(None, False), ("1024", True)])
def test_what_torch_keeps_for_each_shape_does_not_grow(kept: str | None, grows: bool) -> None:
    """By glibc's own count, 200 products of other numbers of rows. A user's own choice stays."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {k: v for k, v in os.environ.items() if k not in names} | ({} if kept is None else dict.fromkeys(names, kept))
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    said = subprocess.run([sys.executable, "-c", SHAPES], env=environment, check=True, capture_output=True, text=True).stdout
    assert (int(said) > 2e7) == grows, said
