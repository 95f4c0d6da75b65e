"""torch's memory on the CPU: freed blocks are used again, and all else is as with torch's own allocator."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from trimtab.compiler import find_compiler
from trimtab.memory import ran_out
from trimtab.ops.reuse import reuse_blocks
from trimtab.train.heap import Heap

pytestmark = pytest.mark.skipif(sys.platform != "linux" or find_compiler()[0] is None, reason="no glibc, or no C++ compiler")

HOLES = """
import ctypes
import trimtab, torch
from trimtab.train.heap import Heap

class Told(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Told
Heap()
for size in (3_000_000, 200_000, 10_000):
    kept = [(torch.empty(size, dtype=torch.uint8), torch.empty(size // 9, dtype=torch.uint8)) for _ in range(30)]
    before = mallinfo2().arena
    beside = [small for _, small in kept]
    del kept
    again = [torch.empty(size, dtype=torch.uint8) for _ in range(30)]
    print((mallinfo2().arena - before) / (30 * size))
"""


@pytest.fixture(autouse=True)
def reused() -> None:
    assert reuse_blocks() == (True, "")


@pytest.mark.slow
def test_what_is_freed_serves_the_next_of_its_size() -> None:
    """By glibc's own count of its heap: tensors take the places of as many freed ones that lie between others in use."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    said = subprocess.run([sys.executable, "-c", HOLES], env=environment, check=True, capture_output=True, text=True).stdout
    grown = [float(line) for line in said.split()]
    assert len(grown) == 3 and max(grown) < 0.1, grown


def test_tensors_are_aligned_and_apart() -> None:
    sizes = [*range(1, 200), 4095, 4096, 4097, 2**20, 2**25, 2**26 + 1]
    tensors = [torch.empty(n, dtype=torch.uint8).fill_(i % 251) for i, n in enumerate(sizes)]
    assert all(t.data_ptr() % 64 == 0 for t in tensors)
    assert all(bool((t == i % 251).all()) for i, t in enumerate(tensors))
    assert torch.empty(0).data_ptr() == 0


def test_storages_grow_are_shared_and_outlive_their_makers() -> None:
    t = torch.arange(1000)
    t.resize_(100_000)
    assert t[:1000].tolist() == list(range(1000)) and t.data_ptr() % 64 == 0
    part, array = t[10:20], t.numpy()
    del t
    assert part.tolist() == list(range(10, 20)) == array[10:20].tolist()
    shared = torch.arange(1000).share_memory_()
    assert shared.sum() == 499_500
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda n: torch.full((n,), n), range(1, 400)))
    assert all(int(t.sum()) == n * n for n, t in enumerate(made, 1))


def test_what_cannot_be_had_is_told_as_memory_that_ran_out() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate 1152921504606846976 bytes") as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(refused.value)


@pytest.mark.slow
def test_the_profiler_sees_what_is_allocated_and_freed() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        t = torch.empty(1_000_000, dtype=torch.uint8)
        del t
    sizes = [e.cpu_memory_usage for e in profile.events() if e.name == "aten::empty"]
    freed = [e.cpu_memory_usage for e in profile.events() if e.name == "[memory]"]
    assert 1_000_000 in sizes and -1_000_000 in freed


def test_without_a_compiler_training_goes_on_with_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_NATIVE", "0")
    reuse_blocks.cache_clear()
    try:
        assert reuse_blocks() == (False, "TRIMTAB_NATIVE=0")
        assert not Heap().after_step()
        monkeypatch.setenv("TRIMTAB_NATIVE", "1")
        monkeypatch.setenv("CXX", "/bin/false")
        reuse_blocks.cache_clear()
        built, why = reuse_blocks()
        assert not built and "/bin/false could not build or load it" in why
    finally:
        reuse_blocks.cache_clear()
