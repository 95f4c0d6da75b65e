"""Freed memory of a size serves the next tensor of that size on the CPU (reuse.cpp says why it would not)."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

import torch

from trimtab.compiler import find_compiler
from trimtab.ops import native

SOURCE = Path(__file__).with_name("reuse.cpp")
INSIDE = Path(torch.__file__).parent
"""torch's own folder: the allocator is built against its headers and its library of the same version."""

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Has torch's own allocator ask the system for huge pages."""


@cache
def reuse_blocks() -> tuple[bool, str]:
    """Have all tensors of this process that are made from now on take freed blocks again: (True, "") or (False, why it cannot be had).

    Without a compiler, with TRIMTAB_NATIVE=0, beside another malloc, or where torch was told to use huge pages, its own allocator stays.
    Results are the same, and steps take more memory.
    """
    if os.environ.get(HUGE_PAGES, "0") != "0":
        return False, f"{HUGE_PAGES} is set"
    compiler, why = find_compiler()
    if compiler is None:
        return False, why
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-DFOR_TORCH={torch.__version__}"]
    where = [f"-I{INSIDE / 'include'}", f"-L{INSIDE / 'lib'}"]
    try:
        built = native.build("reuse", compiler, [SOURCE], [*flags, *where], ["-lc10"])
        do = ctypes.CDLL(str(built)).reuse_blocks
        do.restype = ctypes.c_char_p
        why = (do() or b"").decode()
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return False, f"{compiler} could not build or load it: {said.strip().splitlines()[-1] if said.strip() else error!r}"
    return not why, why
