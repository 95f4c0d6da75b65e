"""The kernels of cpp/: built once with the machine's own compiler, kept in the cache, called with addresses of tensors.

They serve inference on a CPU, where a step has few rows and the dispatch of small operations is most of its time. Without a compiler, or
with TRIMTAB_NATIVE=0, `available` is false and callers run the same formulas in torch. No gradients.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
HUGE = 2**21
"""Bytes of a huge page."""
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def find_compiler() -> tuple[str | None, str]:
    """(the compiler that builds the kernels, "") or (None, why they are not built)."""
    if os.environ.get("TRIMTAB_NATIVE") == "0":
        return None, "TRIMTAB_NATIVE=0"
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    return found, "" if found else "no C++ compiler (g++, clang++) is installed"


@cache
def load() -> tuple[Any, str]:
    """(the library, "") or (None, why there is none)."""
    compiler, why = find_compiler()
    if compiler is None:
        return None, why
    try:
        library = ctypes.CDLL(str(_built(compiler)))
        return (library, "") if library.trimtab_native() == 1 else (None, "the built library is another one")
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return None, f"{compiler} could not build or load it: {said.strip().splitlines()[-1] if said.strip() else error!r}"


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


class PackedWeight:
    """A frozen bfloat16 weight [O, I], I a multiple of 32, laid out as tiles read it: a copy, read as one stream."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None):
        (self.outputs, self.inputs), self.bias_O = weight_OI.shape, bias_O
        self.packed = torch.empty(-(-self.outputs // 32) * 32 * self.inputs, dtype=torch.bfloat16)
        advise_huge(self.packed)
        weight_OI = weight_OI.contiguous()
        _function("pack", torch.bfloat16, "ppii")(weight_OI.data_ptr(), self.packed.data_ptr(), self.inputs, self.outputs)
        self._run = _function("matmul", torch.bfloat16, "pipppiiii")
        self._addresses = self.packed.data_ptr(), 0 if bias_O is None else bias_O.data_ptr()

    def __call__(self, x_TI: Tensor) -> Tensor:
        """x Wᵀ + b, accumulated in fp32; what a row gives does not depend on the rows beside it."""
        T = x_TI.shape[0]
        y = torch.empty(T, self.outputs, dtype=torch.bfloat16)
        self._run(x_TI.data_ptr(), x_TI.stride(0), *self._addresses, y.data_ptr(), self.outputs, T, self.inputs, self.outputs)
        return y


def advise_huge(memory: Tensor) -> None:
    """Ask for huge pages under a large tensor on the CPU: weights that are read once a step otherwise cost a page walk every 4 KB."""
    if memory.device.type != "cpu" or memory.nbytes < 2 * HUGE or sys.platform != "linux":
        return
    start = -(-memory.data_ptr() // HUGE) * HUGE
    stop = (memory.data_ptr() + memory.nbytes) // HUGE * HUGE
    _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), 14)  # MADV_HUGEPAGE; where it fails nothing is lost


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
    """The library's path, built if it is not there. Its name is a digest of what decides it, the processor's features included."""
    files = sorted(f for f in SOURCES.iterdir() if f.suffix in (".cpp", ".h"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    options = " ".join(FLAGS).encode(), version.encode(), _features().encode()
    digest = hashlib.sha256(b"\0".join([*(f.read_bytes() for f in files), *options])).hexdigest()
    folder = _folder()
    target = folder / f"native-{digest[:16]}.so"
    if not target.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "native.so"
            command = [compiler, *FLAGS, "-o", str(made), *(str(f) for f in files if f.suffix == ".cpp")]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            made.replace(target)
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
def _function(name: str, dtype: torch.dtype, kinds: str) -> Any:
    """A kernel for a dtype. kinds: a letter an argument: p address, i integer, f number."""
    found = getattr(load()[0], f"{name}_{DTYPES[dtype]}")
    found.argtypes = [{"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}[k] for k in kinds]
    found.restype = None
    return found


def add_rms_norm(x_TH: Tensor, y_TH: Tensor | None, weight_H: Tensor, eps: float) -> Tensor:
    """x += y in place (where y is given); returns w ∘ x / √(mean x² + eps)."""
    out = torch.empty_like(x_TH)
    T, width = x_TH.shape
    y = 0 if y_TH is None else y_TH.data_ptr()
    _function("add_rms_norm", x_TH.dtype, "ppppiif")(x_TH.data_ptr(), y, weight_H.data_ptr(), out.data_ptr(), T, width, eps)
    return out


def rotate_and_write(
    qkv_T: Tensor,
    heads: tuple[int, int, int],
    cos_TD: Tensor,
    sin_TD: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    pools: tuple[Tensor, Tensor],
    write_T: Tensor,
) -> None:
    """Rows of [q | k | v] with heads (H, G, D): q is rotated in place; k, rotated, and v go to rows write_T of the pools [rows, G, D].
    norms: weights of RMS norms of each head of q and k, before the rotation."""
    H, G, D = heads
    q_norm, k_norm = (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    _function("rotate_and_write", qkv_T.dtype, "pippppfpppiiii")(
        qkv_T.data_ptr(), qkv_T.stride(0), cos_TD.data_ptr(), sin_TD.data_ptr(), q_norm, k_norm, eps,
        pools[0].data_ptr(), pools[1].data_ptr(), write_T.data_ptr(), qkv_T.shape[0], H, G, D,
    )  # fmt: skip


def attend(
    q_T: Tensor, heads: tuple[int, int, int], pools: tuple[Tensor, Tensor], paging: Any, scaling: float, window: int | None
) -> Tensor:
    """Attention [T, H·D] of rows that start with their H query heads over their sequences' tokens in the pools. paging: see `Paging`."""
    H, G, D = heads
    T = q_T.shape[0]
    out = torch.empty(T, H * D, dtype=q_T.dtype)
    _function("attend", q_T.dtype, "pippppppiiiiiifii")(
        q_T.data_ptr(), q_T.stride(0), pools[0].data_ptr(), pools[1].data_ptr(), out.data_ptr(), paging.sequence_T.data_ptr(),
        paging.length_T.data_ptr(), paging.table_SB.data_ptr(), paging.table_SB.shape[1], paging.block, T, H, G, D, scaling,
        window or 0, paging.longest,
    )  # fmt: skip
    return out


def swiglu(gate_up_T: Tensor) -> Tensor:
    """silu(gate) ∘ up of rows [gate | up]."""
    T, width = gate_up_T.shape
    out = torch.empty(T, width // 2, dtype=gate_up_T.dtype)
    _function("swiglu", gate_up_T.dtype, "ppii")(gate_up_T.data_ptr(), out.data_ptr(), T, width // 2)
    return out


class LoraParts:
    """The factors of several adapters at sites that share an input, in tables for `lora`. packs: one a site; widths: the sites' outputs."""

    def __init__(self, packs: Sequence[Any], widths: Sequence[int]):
        tables = [(*p.addresses("A"), p.addresses("B")[0]) for p in packs]
        A, rank, B = (torch.stack(list(column)) for column in zip(*tables, strict=True))
        self._kept = A, B, rank, torch.tensor([0, *accumulate(widths)][:-1]), torch.tensor(list(widths)), list(packs)
        addresses = [t.data_ptr() for t in self._kept[:5]]
        self.arguments = len(widths), addresses[3], addresses[4], addresses[0], addresses[1], addresses[2], A.shape[1]


def lora(x_TI: Tensor, y_TO: Tensor, slot_T: Tensor, parts: LoraParts) -> None:
    """y += (x Aᵀ) Bᵀ, each row with the factors A [R, I] and B [O, R] of its slot (-1: none); the parts' outputs lie side by side in y."""
    _function("lora", x_TI.dtype, "pipipipppppiii")(
        x_TI.data_ptr(), x_TI.stride(0), y_TO.data_ptr(), y_TO.stride(0), slot_T.data_ptr(), *parts.arguments, *x_TI.shape
    )  # fmt: skip


def scale(x_TI: Tensor, slot_T: Tensor, packs: Any) -> None:
    """x ∘= 1 + g in place, each row with the g [I] (fp32) of its slot in `packs` (-1: none)."""
    g, _ = packs.addresses("g")
    _function("scale", x_TI.dtype, "pippii")(x_TI.data_ptr(), x_TI.stride(0), slot_T.data_ptr(), g.data_ptr(), *x_TI.shape)


def bottleneck(h_TI: Tensor, y_TO: Tensor, slot_T: Tensor, packs: Any, activation: int) -> None:
    """y += U f(D h + d) + u in place, each row with the D [R, I], d, U [O, R], u of its slot in `packs` (-1: none). activation: the
    number of f in `ACTIVATIONS`."""
    (D, rank), (d, _), (U, _), (u, _) = (packs.addresses(n) for n in ("D", "d", "U", "u"))
    _function("bottleneck", h_TI.dtype, "pipippppppiiii")(
        h_TI.data_ptr(), h_TI.stride(0), y_TO.data_ptr(), y_TO.stride(0), slot_T.data_ptr(), D.data_ptr(), d.data_ptr(), U.data_ptr(),
        u.data_ptr(), rank.data_ptr(), activation, *h_TI.shape, y_TO.shape[1],
    )  # fmt: skip


def largest(x_TV: Tensor) -> tuple[Tensor, Tensor]:
    """(each row's largest value in fp32, NaN where the row holds one; its index, the first of equals)."""
    T = x_TV.shape[0]
    value, place = torch.empty(T), torch.empty(T, dtype=torch.int64)
    _function("largest", x_TV.dtype, "pippii")(x_TV.data_ptr(), x_TV.stride(0), value.data_ptr(), place.data_ptr(), *x_TV.shape)
    return value, place
