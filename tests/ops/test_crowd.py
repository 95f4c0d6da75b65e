"""OpenMP's threads sleep where they wait for each other, as long as other processes want the cores."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.compiler import find_compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or find_compiler()[0] is None, reason="a kernel for Linux, and no C++ compiler or no Linux"),
]
SOURCE = Path(__file__).parents[2] / "src"
LOOK = """
import os, sys, time
import torch
from trimtab.ops import native

cores, loads = len(os.sched_getaffinity(0)), sys.argv[1]
torch.set_num_threads(cores + 1)  # so that a machine with one core has threads that wait, too
native.LOADS = loads.encode()

def say(runnable):
    with open(loads + ".new", "w") as file:
        file.write(f"0.10 0.20 0.30 {runnable}/200 4321\\n")
    os.replace(loads + ".new", loads)

def seen(expected):
    until = time.monotonic() + 60
    while library.crowd_seen() != expected and time.monotonic() < until:
        time.sleep(0.01)
    return library.crowd_seen()

def threads():
    return len(os.listdir("/proc/self/task"))

def settled(count):  # ends of threads take a moment
    until = time.monotonic() + 60
    while threads() != count and time.monotonic() < until:
        time.sleep(0.01)
    return threads() - count

STEPS
"""


def told(tmp_path: Path, steps: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", LOOK.replace("STEPS", steps), str(tmp_path / "loadavg")],
        env=kept | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{SOURCE.parent}"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert not done.returncode, done.stderr
    return done.stdout


def linux() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])


def test_they_do_as_long_as_more_threads_are_runnable_than_there_are_cores(tmp_path: Path) -> None:
    """Ten threads more than cores, then none. What the process itself uses is no neighbour."""
    steps = """
torch.set_num_threads(1)  # so that nobody looks yet
library = native.load()[0]
before = threads()
import ctypes
say(1)
library.crowd_watch(loads.encode(), ctypes.c_int64(cores))
print(seen(0), settled(before + 1))
say(cores + 10)
print(seen(1), settled(before + 3))  # the one that looks, and two that are parked
say(1)
print(seen(0), settled(before + 1))
say(cores + 10)
print(seen(1), settled(before + 3))
os.unlink(loads)  # the load cannot be read for a while: nobody is parked for what is not known
print(seen(0), settled(before + 1))
say(cores + 10)
library.crowd_watch(loads.encode(), ctypes.c_int64(cores))  # there is one that looks
print(seen(1), settled(before + 3))
"""
    assert told(tmp_path, steps).splitlines() == ["0 0", "1 0", "0 0", "1 0", "0 0", "1 0"]


def test_a_process_at_its_limit_of_threads_lives(tmp_path: Path) -> None:
    """libgomp would end it. The limit is planted in pthread_create: root is above the system's own."""
    compiler = find_compiler()[0]
    assert compiler is not None
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", tmp_path / "full.so", Path(__file__).with_name("no_more_threads.cpp"), "-ldl"], check=True
    )
    steps = """
import ctypes
torch.set_num_threads(1)
library = native.load()[0]
say(1)
library.crowd_watch(loads.encode(), ctypes.c_int64(cores))
print(seen(0))
ctypes.CDLL(os.environ["LD_PRELOAD"]).fill()
say(cores + 10)
print(seen(1))
time.sleep(0.5)
print("lives")
"""
    assert told(tmp_path, steps, LD_PRELOAD=str(tmp_path / "full.so")).splitlines() == ["0", "1", "lives"]


def test_a_process_looks_where_it_has_threads_that_wait_and_the_user_said_nothing(tmp_path: Path) -> None:
    steps = "say(500); library = native.load()[0]; print(seen(1))"
    assert told(tmp_path, steps) == "1\n"
    alone = "torch.set_num_threads(1); " + steps.replace("seen(1)", "time.sleep(1) or library.crowd_seen()")
    assert told(tmp_path, alone) == "0\n"
    assert told(tmp_path, alone.replace("set_num_threads(1)", "get_num_threads()"), OMP_WAIT_POLICY="active") == "0\n"


@pytest.mark.skipif(linux() < (6, 12), reason="Linux gives threads turns of their own length from 6.12 on")
def test_turns_are_short_as_long_as_others_want_the_cores(tmp_path: Path) -> None:
    """As the kernel says it, for each thread, one that is started meanwhile too."""
    steps = """
import ctypes, struct, threading
number = {"x86_64": 315, "aarch64": 275}[os.uname().machine]  # sched_getattr
libc, said = ctypes.CDLL(None), ctypes.create_string_buffer(48)
def turns():
    found = set()
    for thread in os.listdir("/proc/self/task"):
        if libc.syscall(number, int(thread), said, 48, 0) == 0:  # else it has ended just now
            found.add(struct.unpack("<IIQiIQQQ", said.raw)[5])
    return found
torch.set_num_threads(1)
usual = turns()
library = native.load()[0]
say(1)
library.crowd_watch(loads.encode(), ctypes.c_int64(cores))
print(seen(0), turns() == usual)
say(500)
seen(1)
held = threading.Event()
threading.Thread(target=held.wait).start()
print(sorted(turns() - {100_000}), 100_000 in usual)
say(1)
print(seen(0), sorted(turns() ^ usual))
held.set()
"""
    assert told(tmp_path, steps).splitlines() == ["0 True", "[] False", "0 []"]


def test_sums_are_the_same_while_others_want_the_cores(tmp_path: Path) -> None:
    """Of two threads, with and without those that are parked: a product and a sum as numpy's in float64 are, and bit by bit alike."""
    steps = """
import numpy
torch.set_num_threads(2)
say(1)
library = native.load()[0]
a = torch.arange(300 * 4096, dtype=torch.float32).reshape(300, 4096).sin()
def made():
    return (a @ a.T).numpy().tobytes(), a.sum().numpy().tobytes(), torch.softmax(a, 1).numpy().tobytes()
quiet = seen(0), made()
say(500)
crowded = seen(1), made()
exact = a.double().numpy() @ a.double().numpy().T
print(quiet[0], crowded[0], quiet[1] == crowded[1], numpy.abs((a @ a.T).numpy() - exact).max() < 1e-2)
"""
    assert told(tmp_path, steps) == "0 1 True True\n"


FILTERED = """
import ctypes, platform, struct
number = {"x86_64": 314, "aarch64": 274}[platform.machine()]  # sched_setattr
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, ANSWER), (6, 0, 0, 0x7FFF0000)]  # load it, compare, answer so, else allow
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
given = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
print("filtered" if libc.prctl(22, 2, given, 0, 0) == 0 else "no filter")
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the number of the system call is not known")
@pytest.mark.parametrize("answer", ["0x80000000", "0x00000000", "0x00050001"], ids=["the process ends", "the thread ends", "refused"])
def test_a_filter_of_system_calls_that_ends_who_asks_for_turns(answer: str, tmp_path: Path) -> None:
    """As systemd's `SystemCallFilter=~@resources` does, and containers' filters, which refuse it. The threads are parked all the same."""
    steps = f"""
torch.set_num_threads(1)
library = native.load()[0]
before = threads()
{FILTERED.replace("ANSWER", answer)}
say(1)
library.crowd_watch(loads.encode(), ctypes.c_int64(cores))
print(seen(0))
say(cores + 10)
print(seen(1), settled(before + 3))
say(1)
print(seen(0), settled(before + 1))
try:
    print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError:
    print("no child is left")
"""
    first, *lines = told(tmp_path, steps).splitlines()
    if first == "no filter":
        pytest.skip("this system has no filters of system calls")
    assert lines == ["0", "1 0", "0 0", "no child is left"]
