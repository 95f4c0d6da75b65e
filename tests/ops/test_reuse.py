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

LARGE = """
import psutil
import torch
from trimtab.train.heap import Heap

Heap()
resident = psutil.Process().memory_info
before = resident().rss
t = torch.ones(64 * 2**20, dtype=torch.uint8)
print(resident().rss - before)
del t
print(resident().rss - before)
"""


ONEDNN = """
import torch
from trimtab.ops.reuse import reuse_blocks

def made():
    return [torch.full((n,), float(n)).to_mkldnn() for n in [*range(1, 4000, 7), 10_000_000]]

before = made()
assert reuse_blocks() == (True, "")
after = made()
print(all(float(t.to_dense().sum()) == float(torch.full(t.shape, float(t.shape[0])).sum()) for t in before + after))
del before[::2], after[1::2]
more = made()
del before, after, more
more = made()  # glibc ends a process whose heap is broken
"""

INTERPOSED = """
extern void* __libc_malloc(unsigned long);
extern void __libc_free(void*);
void* malloc(unsigned long bytes) { return __libc_malloc(bytes); }
void free(void* block) { __libc_free(block); }
"""

ASKED = "import torch; from trimtab.ops.reuse import reuse_blocks; print(reuse_blocks(), torch.ones(1000).sum())"


def _says(code: str, **settings: str) -> str:
    """What a fresh process prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")} | settings
    return subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def reused() -> None:
    assert reuse_blocks() == (True, "")


@pytest.mark.slow
def test_what_is_freed_serves_the_next_of_its_size() -> None:
    """By glibc's own count of its heap: tensors take the places of as many freed ones that lie between others in use."""
    grown = [float(line) for line in _says(HOLES).split()]
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


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_what_onednn_had_before_is_freed_as_it_was_made() -> None:
    """oneDNN keeps bare addresses, and hands them to the allocator of the time at which it frees."""
    assert _says(ONEDNN) == "True\n"


@pytest.mark.slow
def test_another_malloc_keeps_torchs_own(tmp_path: Path) -> None:
    """Only with glibc's is it known what lies before a block."""
    (tmp_path / "other.c").write_text(INTERPOSED)
    command = [find_compiler()[0] or "", "-x", "c", "-shared", "-fPIC", "-o", str(tmp_path / "other.so"), str(tmp_path / "other.c")]
    subprocess.run(command, check=True)
    said = _says(ASKED, LD_PRELOAD=str(tmp_path / "other.so"))
    assert said == '(False, "this process has another malloc than glibc\'s") tensor(1000.)\n'


def test_huge_pages_that_a_user_chose_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    reuse_blocks.cache_clear()
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    try:
        assert reuse_blocks() == (False, "THP_MEM_ALLOC_ENABLE is set")
    finally:
        reuse_blocks.cache_clear()


def test_blocks_above_the_threshold_go_back_to_the_system_at_once() -> None:
    """In a process of its own: one that has freed much serves them from its heap's end."""
    grown = [int(line) for line in _says(LARGE).split()]
    assert len(grown) == 2 and grown[0] > 60 * 2**20 and grown[1] < 8 * 2**20, grown


def test_a_forked_child_frees_what_its_parent_made_and_makes_its_own() -> None:
    tensors = [torch.full((n,), n) for n in range(1, 2000, 3)]
    child = os.fork()
    if child == 0:
        try:
            right = all(int(t.sum()) == n * n for t, n in zip(tensors, range(1, 2000, 3), strict=True))
            tensors.clear()
            right &= int(torch.arange(10_000).sum()) == 49_995_000  # more would take OpenMP's threads, which a child does not have
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert all(int(t[-1]) == len(t) for t in tensors)


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
