"""The kernels of cpp/: built once with the machine's own compiler, kept in the cache, called with addresses of tensors.

`native_inference`, `native_attention` and `native_training` wrap them. They run on a CPU, where dispatching small operations and passing
over memory for each is most of a step's time. Without a compiler, or with TRIMTAB_NATIVE=0, `available` is false and callers run the same
formulas in torch. Kernels know of no gradients.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.atomic import sync, take_name
from trimtab.compiler import find_compiler

SOURCES = Path(__file__).with_name("cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-w",
)
"""Not -ffast-math: a library linked with it makes the whole process flush denormal numbers."""
LOADS = b"/proc/loadavg"
"""Where the system says how many threads want to run."""
HUGE = 2**21
"""Bytes of a huge page."""
GIVEN_BACK = 2**25
"""glibc keeps no freed block of so many bytes for the next who asks."""
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@cache
def load() -> tuple[Any, str]:
    """(the library, "") or (None, why there is none)."""
    compiler, why = find_compiler()
    if compiler is None:
        return None, why
    try:
        library = ctypes.CDLL(str(_built(compiler)))
        if library.trimtab_native() != 1:
            return None, "the built library is another one"
        _watch_crowd(library)
        return library, ""
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return None, f"{compiler} could not build or load it: {said.strip().splitlines()[-1] if said.strip() else error!r}"


def _watch_crowd(library: Any) -> None:
    """Have a thread look at whether other processes want our cores (cpp/crowd.cpp), where threads wait for each other at all."""
    threads = torch.get_num_threads()
    if sys.platform == "linux" and threads > 1 and "OMP_WAIT_POLICY" not in os.environ:
        library.crowd_watch(LOADS, ctypes.c_int64(threads))


def available(*tensors: Tensor) -> bool:
    """Whether the kernels can run on tensors like these: on the CPU, float32 or bfloat16, no gradients wanted."""
    return (
        not torch.is_grad_enabled()
        and all(t.device.type == "cpu" and t.dtype in DTYPES and t.dtype == tensors[0].dtype for t in tensors)
        and load()[0] is not None
    )


@cache
def has_tiles() -> bool:
    """Whether this processor multiplies bfloat16 matrices in tiles (AMX) and this process may."""
    library = load()[0]
    return library is not None and bool(library.trimtab_tiles())


@cache
def attends_flat() -> bool:
    """Whether `native_attention` and the products of `native_quantized` in bfloat16 run here: on matrix tiles, or where the processor has
    none in registers that multiply bfloat16."""
    library = load()[0]
    return library is not None and bool(library.trimtab_attends())


def copies_weights() -> bool:
    """Whether inference multiplies by copies of dense bfloat16 matrices: in the layout of matrix tiles, or in that of torch's library where
    `attends_flat` is false. Told by the processor, so that nothing is built for it."""
    has = {name: getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("amx_tile", "avx512_bf16")}
    return find_compiler()[0] is not None and (has["amx_tile"] or not has["avx512_bf16"])


def advise_huge(memory: Tensor) -> None:
    """Ask for huge pages under a large tensor on the CPU: weights that are read once a step otherwise cost a page walk every 4 KB."""
    if memory.device.type != "cpu" or memory.nbytes < 2 * HUGE or sys.platform != "linux":
        return
    start = -(-memory.data_ptr() // HUGE) * HUGE
    stop = (memory.data_ptr() + memory.nbytes) // HUGE * HUGE
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), 14)  # MADV_HUGEPAGE; where it fails nothing is lost


def fresh(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix on the CPU whose numbers are undefined. Where the memory comes from the system each time, it asks for huge pages: a fault
    every 4 KB costs a third of what fills it."""
    made = torch.empty(rows, columns, dtype=dtype)
    if made.nbytes >= GIVEN_BACK:
        advise_huge(made)
    return made


@cache
def _libc() -> Any:
    return ctypes.CDLL(None)


def let_threads_go() -> None:
    """End the calling thread's team of OpenMP threads, if it has one: a process with more of them than cores makes each wait asleep, and
    waking takes longer than most kernels. For a thread that will not compute for long; its next parallel operation makes a new team."""
    pause = getattr(_libc(), "omp_pause_resource_all", None)
    if pause is not None:
        pause(1)  # omp_pause_soft


def compute_alone() -> None:
    """Have the calling thread compute without a team of its own, for the same reason: for threads that work beside the forward."""
    torch.get_num_threads()  # torch sets a thread's number at its first question, and not again
    limit = getattr(_libc(), "omp_set_num_threads", None)
    if limit is not None:
        limit(1)


def _built(compiler: str) -> Path:
    """The library's path, built if it is not there."""
    return build("native", compiler, sorted(f for f in SOURCES.iterdir() if f.suffix in (".cpp", ".h")), FLAGS)


def build(name: str, compiler: str, files: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """Path of a library in the cache, built if it is not there. Its name is a digest of what decides it, the processor's features too."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    options = " ".join([*flags, *libraries]).encode(), version.encode(), _features().encode()
    digest = hashlib.sha256(b"\0".join([*(f.read_bytes() for f in files), *options])).hexdigest()
    folder = _folder()
    target = folder / f"{name}-{digest[:16]}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / f"{name}.so"
            command = [compiler, *flags, "-o", str(made), *(str(f) for f in files if f.suffix == ".cpp"), *libraries]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            made.chmod(0o755)  # with a umask of 002 its group could write it, and it would not be loaded
            sync(made)
            take_name(made, target)
    status = target.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{target} is somebody else's, or others may write it: it is not loaded")
    return target


def _folder() -> Path:
    root = os.environ.get("TRIMTAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
    return Path(root) / "native"


def _features() -> str:
    """What the compiler makes code for: a cache may be shared by machines of different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


@cache
def function(name: str, dtype: torch.dtype, kinds: str) -> Any:
    """A kernel for a dtype. kinds: a letter an argument: p address, i integer, f number."""
    found = getattr(load()[0], f"{name}_{DTYPES[dtype]}")
    found.argtypes = [{"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}[k] for k in kinds]
    found.restype = None
    return found
