"""Numbers on their way between the host and a device: what a step knows of its rows goes there in one copy for which the host does not
wait, and what it must read comes back in one for which it does.

On a CPU nothing is moved, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNED = 16
"""Bytes to whose multiples each array of a copy is laid out."""


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Tensors of these arrays on the device. They share one piece of memory there, which is filled from pinned memory: kernels that are
    launched later see it, and the host goes on at once."""
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    ends = np.cumsum([-(-a.nbytes // ALIGNED) * ALIGNED for a in arrays]).tolist()
    pinned = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
    host = pinned.numpy()
    for a, start in zip(arrays, [0, *ends], strict=False):
        host[start : start + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    there = pinned.to(device, non_blocking=True)
    kinds = [torch.from_numpy(a[:0].reshape(-1)).dtype for a in arrays]
    return [there[start : start + a.nbytes].view(kind).view(a.shape) for a, start, kind in zip(arrays, [0, *ends[:-1]], kinds, strict=True)]


def index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """int64, on the device."""
    return upload([np.asarray(numbers, dtype=np.int64)], device)[0]


def floats(numbers: Sequence[float], like: Tensor) -> Tensor:
    """In the dtype and on the device of `like`."""
    return upload([np.asarray(numbers, dtype=np.float64)], like.device)[0].to(like.dtype)


def to_host(tensors: Sequence[Tensor]) -> list[Any]:
    """What `tolist` gives of each, for which the host waits once. Whole numbers must be below 2⁵³."""
    if len(tensors) < 2 or tensors[0].device.type == "cpu":
        return [t.tolist() for t in tensors]
    together = torch.cat([t.detach().reshape(-1).double() for t in tensors]).cpu()
    parts = zip(together.split([t.numel() for t in tensors]), tensors, strict=True)
    return [(part if t.is_floating_point() else part.to(t.dtype)).view(t.shape).tolist() for part, t in parts]
