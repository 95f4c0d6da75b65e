"""The device itself: its memory's bandwidth, its products, whether trimtab trusts torch's kernels there, and the laws."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from on_gpu.common import ROOT, Setting, gemm_flops, run_points, seconds, tell


def device(setting: Setting) -> None:
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "device": setting.device}
    if setting.on_gpu:
        of = torch.cuda.get_device_properties(0)
        facts |= {"name": of.name, "memory_gb": of.total_memory / 1e9, "capability": f"{of.major}.{of.minor}"}
    tell(item="device", **facts)


def bandwidth(setting: Setting) -> None:
    import torch

    n = (1 << 20) if setting.tiny else (1 << 30)
    there = torch.zeros(n, dtype=torch.float32, device=setting.device)
    host = torch.zeros(n // 8, dtype=torch.float32, pin_memory=setting.on_gpu)
    result = torch.empty((), device=setting.device)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "read and write": (2 * there.nbytes, lambda: there.mul_(1.0)),
        "read": (there.nbytes, lambda: torch.sum(there, dim=None, out=result)),
        "to the device": (host.nbytes, lambda: there[: n // 8].copy_(host, non_blocking=True)),
        "to the host": (host.nbytes, lambda: host.copy_(there[: n // 8], non_blocking=True)),
    }
    run_points(setting, "bandwidth", {name: partial(_rate, setting, size, work) for name, (size, work) in works.items()})


def _rate(setting: Setting, size: int, work: Callable[[], object]) -> Mapping[str, float]:
    return {"gb_per_s": size / seconds(setting, work) / 1e9}


def gemm(setting: Setting) -> None:
    """Square products, and those of a decode step with few rows, which the weights' bandwidth bounds."""
    import torch

    def thin(rows: int) -> Mapping[str, float]:
        n = 256 if setting.tiny else 4096
        x, w = torch.randn(rows, n, device=setting.device), torch.randn(4 * n, n, device=setting.device)
        x, w = x.bfloat16(), w.bfloat16()
        took = seconds(setting, lambda: x @ w.T, 50)
        return {"tflops": 2 * x.numel() * 4 * n / took / 1e12, "gb_per_s": w.nbytes / took / 1e9}

    points: dict[str, Callable[[], Mapping[str, float]]] = {
        f"square {n}": partial(lambda n: {"tflops": gemm_flops(setting, n) / 1e12}, n) for n in (2048, 4096, 8192)
    }
    run_points(setting, "gemm", points | {f"{rows} rows": partial(thin, rows) for rows in (1, 16, 64, 256)})


def verdicts(setting: Setting) -> None:
    """Whether torch's kernels for flat rows, for a paged cache and for grouped products agree with trimtab's own there."""
    import torch

    from trimtab.ops import grouped, paged, varlen

    at = torch.device(setting.device, 0) if setting.on_gpu else torch.device(setting.device)
    for dtype in (torch.bfloat16, torch.float16):
        for width, repeat in ((64, 1), (64, 4), (128, 4), (128, 8)):
            tell(item="verdicts", point="varlen", says=varlen.verdict(at, dtype, width, repeat))
            tell(item="verdicts", point="paged", says=paged.verdict(at, dtype, width, repeat))
    tell(item="verdicts", point="grouped_mm", says="used" if grouped._trusted(at, torch.bfloat16) else "not used")


def laws(setting: Setting) -> None:
    """Law 17, which runs on a GPU where there is one. (Elsewhere its stand-in does, and of it only one test.)"""
    chosen = ["-k", "mixed_forward and llama"] if setting.tiny else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "tests/laws/test_law17_device.py"]
    began = time.monotonic()
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?)", lines[-1] if lines else "")}
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    tell(item="laws", **counts, **({"first": failed[0][:300]} if failed else {}), seconds=time.monotonic() - began)
