"""A crew of threads shares the loops of the kernels for inference as long as other processes want the cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.test_crowd import SOURCE, told
from trimtab.compiler import find_compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or find_compiler()[0] is None, reason="a kernel for Linux, and no C++ compiler or no Linux"),
]
GENERATE = """
torch.set_num_threads(cores)
say(0)
import ctypes, subprocess, sys
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.model import Base
from trimtab import BottleneckConfig, IA3Config, LoraConfig
from trimtab.decode.generate import Sampling
from trimtab.store import Adapter

torch.manual_seed(0)
base = Base(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer(), name="tiny")
adapters = [None] + [Adapter.create(base, c, seed=i) for i, c in enumerate([
    LoraConfig(r=8), LoraConfig(r=3), IA3Config(), BottleneckConfig()])]
for adapter in adapters[1:]:
    for value in adapter.params.values():
        value.data.normal_(0, 0.2)
prompts = [torch.randint(5, 200, (5 + 7 * i,)).tolist() for i in range(10)]
library = native.load()[0]
library.crew_works.restype = ctypes.c_int64

def once(seed=0):
    return base.generate_ids(prompts, [adapters[i % 5] for i in range(10)], Sampling(24, temperature=1.0, seed=seed))
"""


@pytest.mark.parametrize("file", ["test_native.py", "test_native_quantized.py", "test_paged.py"])
def test_its_results_are_torchs(file: str) -> None:
    """The tests that compare the kernels with torch, with a crew."""
    root = Path(__file__).parents[2]
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.ops.crowded", "-p", "no:cacheprovider", "-m", "", f"tests/ops/{file}"]
    done = subprocess.run(command, cwd=root, env=kept | {"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else True, reason="one core: it is always crowded")
def test_it_answers_as_the_team_does_beside_processes_that_never_rest(tmp_path: Path) -> None:
    """Two of them for each core, so that its threads lose theirs in the middle of loops. Drawn texts of five adapters, over and over."""
    steps = (
        GENERATE
        + """
print(seen(0), library.crew_works())
want = [once(seed) for seed in range(4)]
print(library.crew_works(), len({repr(w) for w in want}))
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cores)]
say(500)
print(seen(1))
same = [once(seed) == want[seed] for _ in range(6) for seed in range(4)]
print(all(same), library.crew_works() > 1000)
say(0)
print(seen(0))
worked = library.crew_works()
print(once() == want[0], library.crew_works() - worked)
for process in busy: process.kill()
"""
    )
    assert told(tmp_path, steps).splitlines() == ["0 0", "0 4", "1", "True True", "0", "True 0"]


def test_a_fork_has_a_crew_of_its_own(tmp_path: Path) -> None:
    """Its parent's threads are not in it."""
    steps = """
import ctypes
from trimtab.ops import native_inference as kernels
library = native.load()[0]
library.crew_works.restype = ctypes.c_int64
say(500)
seen(1)
x, w = torch.randn(64, 512), torch.ones(512)
with torch.no_grad():
    want = kernels.add_rms_norm(x.clone(), None, w, 1e-5)
    child = os.fork()
    if child == 0:
        worked, same = library.crew_works(), torch.equal(kernels.add_rms_norm(x.clone(), None, w, 1e-5), want)
        os._exit(0 if same and library.crew_works() == worked + 1 else 1)
print(library.crew_works(), os.waitpid(child, 0)[1])
"""
    assert told(tmp_path, steps) == "1 0\n"


@pytest.mark.parametrize(
    "case, said",
    [
        ("numbers end", "0 10"),
        ("fewer threads", "4 2"),
        ("another rounding", "0"),
        ("bound threads", "0"),
        ("an exception in the middle", None),
    ],
)
def test_its_limits(case: str, said: str | None, tmp_path: Path) -> None:
    """Numbers of loops and works begin again; no more threads than OpenMP may use now; all round and flush as their
    caller does; none that is bound to its caller's core; and what a kernel throws ends the process as in a team, instead of
    leaving helpers in what is gone."""
    compiler = find_compiler()[0]
    assert compiler is not None
    sources, program = SOURCE / "trimtab" / "ops" / "cpp", tmp_path / "limits"
    asked = [compiler, "-O1", "-std=c++17", "-fopenmp", "-pthread", "-w", f"-I{sources}", "-o", str(program)]
    subprocess.run([*asked, str(Path(__file__).with_name("crew_limits.cpp"))], check=True, timeout=120)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    bound = {"OMP_PROC_BIND": "true"} if case == "bound threads" else {}
    done = subprocess.run([program, case], env=kept | bound, capture_output=True, text=True, timeout=120)
    if said is None:
        assert done.returncode == -signal.SIGABRT and not done.stdout
    else:
        assert (done.returncode, done.stdout.strip()) == (0, said)
