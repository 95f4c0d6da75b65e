"""Whether a base fits into memory, told from its config and the headers of its files, before any of its weights is read."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from trimtab.bases.folder import read_header, read_json, weight_files
from trimtab.memory import OutOfMemory, free_bytes, obtainable_bytes

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that loading converts, by safetensors' names."""
CHOICES = ("bfloat16", "float16")


def weight_bytes(folder: Path, dtype: torch.dtype | str) -> tuple[int, int]:
    """(bytes that a base's weights take in `dtype`, those of them that the process has to have in memory of its own). dtype: "auto" is the
    config's, or as stored.

    Weights that are stored in the dtype are mapped from their files. The system reads them when they are used and may drop them again, so
    they need not fit into memory at once; weights that are converted do.
    """
    tensors = [t for file in weight_files(folder) for t in read_header(file)]
    if dtype == "auto":
        config = read_json(folder / "config.json")
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), "auto")
    whole = own = 0
    for t in tensors:
        stored = STORED.get(t.dtype)
        if stored is None or dtype in ("auto", stored):
            whole += t.stop - t.start
        elif isinstance(dtype, torch.dtype):
            size = math.prod(t.shape) * dtype.itemsize
            whole, own = whole + size, own + size
    return whole, own


def available_bytes(device: torch.device) -> int:
    """Memory that is free on the device; on a CPU within the container's and the process's limits."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_bytes()


def most_bytes(device: torch.device) -> int:
    """The same with a CPU's swap: where more than this is needed, it cannot be had."""
    return available_bytes(device) if device.type == "cuda" else obtainable_bytes()


def refuse_too_large(base: str, folder: Path, dtype: torch.dtype | str, device: torch.device) -> None:
    """OutOfMemory, with what is needed, what is free and what would fit, where a base's weights cannot all be had in `dtype` on `device`.
    base: as the user wrote it."""

    def needed(wanted: torch.dtype | str) -> int:
        return weight_bytes(folder, wanted)[0 if device.type == "cuda" else 1]

    free = most_bytes(device)
    if (need := needed(dtype)) <= free:
        return
    smaller = {choice: needed(getattr(torch, choice)) for choice in CHOICES}
    fitting = [f"{name} ({f'{size / 1e9:.3g} GB' if size else 'as it is stored'})" for name, size in smaller.items() if size <= free]
    asked = str(dtype).removeprefix("torch.")
    raise OutOfMemory(
        f"the base {base!r} does not fit: its weights take {need / 1e9:.3g} GB in {asked}, and {free / 1e9:.3g} GB are free on {device}",
        fix=f"load it in {' or '.join(fitting)}; or make memory free." if fitting else "use a smaller base, or make memory free.",
    )
