"""Whether a base fits into memory, told from its config and the headers of its files, before any of its weights is read."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import torch

from trimtab.bases.folder import read_header, read_json, weight_files
from trimtab.bases.quantization_notes import quantization_settings
from trimtab.bases.recipes import BITS, SMALLEST
from trimtab.bases.stored_formats import in_an_order
from trimtab.memory import OutOfMemory, free_bytes, obtainable_bytes
from trimtab.places.shards import Shards

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that loading converts, by safetensors' names."""
CHOICES = ("bfloat16", "float16")
PACKED = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".scales", ".weight_scale_inv", ".weight_scale")
"""Ends of names of floating-point tensors that belong to packed weights, and are not converted."""
CODES = (".qweight", ".weight_packed")
"""Ends of names of codes, several in an int32; of 4 bits each, where the config does not say how many."""
IN_A_LAYER = re.compile(r"\.\d+\..*weight$")
"""Names of weights inside a list of layers, where those are that are packed."""
IN_EXPERTS = re.compile(r"(.*?\.\d+\.)(?:.*\.)?experts\.")
"""Names of experts' weights, one by one or all in one tensor; up to the layer's number."""
PASSING = 4.0
"""Measured on three layers of 32 experts of 1,024 x 512, one by one in the files: 3.9 times a layer's."""
EXPERT = re.compile(r"\.experts\.\d+\.")
"""Names of one expert's weights, which loading copies into one tensor of all experts."""


def weight_bytes(folder: Path, dtype: torch.dtype | str, quantize: str | None = None) -> tuple[int, int]:
    """(bytes that a base's weights take in `dtype`, those of them that the process has to have in memory of its own). dtype: "auto" is the
    config's, or as stored. quantize: a format that the layers' matrices are packed in while they are read.

    Weights that are stored in the dtype are mapped from their files. The system reads them when they are used and may drop them again, so
    they need not fit into memory at once; weights that are converted or put together do.
    """
    tensors, config = [t for file in weight_files(folder) for t in read_header(file)], read_json(folder / "config.json")
    settings = quantization_settings(folder)
    as_they_are, ordered = PACKED if settings else (), settings is not None and in_an_order(settings)
    bits = found if settings and type(found := settings.get("bits")) is int and found > 0 else 4
    if dtype == "auto":
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), "auto")
    whole = own = 0
    for t in tensors:
        stored, made = STORED.get(t.dtype), EXPERT.search(t.name) is not None
        size = t.stop - t.start
        experts = len(t.shape) == 3 and re.search(r"\.\d+\.", t.name) is not None
        if made and ordered and t.dtype == "I32" and t.name.endswith(CODES):
            size = math.prod(t.shape) * 32 // bits * (dtype.itemsize if isinstance(dtype, torch.dtype) else 2)
        elif t.name.endswith(CODES):  # laid out anew, those of 2 and 3 bits in 4
            size, made = size * 4 // min(4, bits), True
        elif quantize is not None and (experts or (len(t.shape) == 2 and IN_A_LAYER.search(t.name))):
            size, made = int(math.prod(t.shape) * BITS[quantize] / 8), True
        elif stored is not None and not t.name.endswith(as_they_are) and isinstance(dtype, torch.dtype) and dtype != stored:
            size, made = math.prod(t.shape) * dtype.itemsize, True
        whole, own = whole + size, own + size * made
    return whole, own


def loading_bytes(folder: Path, dtype: torch.dtype | str, quantize: str | None) -> int:
    """What quantising experts takes beside the weights while they are read. They are put together layer by layer: `PASSING` times a layer's
    experts in `dtype`."""
    if quantize is None:
        return 0
    layers, width = Counter[str](), dtype.itemsize if isinstance(dtype, torch.dtype) else 2
    for t in (t for file in weight_files(folder) for t in read_header(file)):
        if found := IN_EXPERTS.match(t.name):
            layers[found[1]] += math.prod(t.shape)
    return int(PASSING * max(layers.values(), default=0) * width)


def available_bytes(device: torch.device) -> int:
    """Memory that is free on the device; on a CPU within the container's and the process's limits."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_bytes()


def most_bytes(device: torch.device) -> int:
    """The same with a CPU's swap: where more than this is needed, it cannot be had."""
    return available_bytes(device) if device.type == "cuda" else obtainable_bytes()


def refuse_too_large(
    base: str, folder: Path, dtype: torch.dtype | str, device: torch.device, quantize: str | None = None, shards: Shards | None = None
) -> None:
    """OutOfMemory, with what is needed, what is free and what would fit, where a base's weights cannot all be had in `dtype` on `device`.
    base: as the user wrote it. quantize: see `weight_bytes`. shards: of ranks that share the base out, of which each has a part. A part of
    what is mapped is a copy too, and ranks of one machine share its memory."""

    def needed(wanted: torch.dtype | str, quantize: str | None = None) -> int:
        whole, own = weight_bytes(folder, wanted, quantize)
        beside = loading_bytes(folder, wanted, quantize)
        if shards is not None:
            return (whole // shards.ranks + beside) * (shards.here if device.type == "cpu" else 1)
        return whole if device.type == "cuda" else own + beside

    free = most_bytes(device)
    if (need := needed(dtype, quantize)) <= free:
        return
    smaller = {choice: needed(getattr(torch, choice), quantize) for choice in CHOICES}
    if quantize is None and quantization_settings(folder) is None:
        smaller[f"{CHOICES[0]} with quantize: {SMALLEST}"] = needed(getattr(torch, CHOICES[0]), SMALLEST)
    fitting = [f"{name} ({f'{size / 1e9:.3g} GB' if size else 'as it is stored'})" for name, size in smaller.items() if size <= free]
    asked = str(dtype).removeprefix("torch.")
    raise OutOfMemory(
        f"the base {base!r} does not fit: its weights take {need / 1e9:.3g} GB in {asked}, and {free / 1e9:.3g} GB are free on {device}",
        fix=f"load it in {' or '.join(fitting)}; or make memory free." if fitting else "use a smaller base, or make memory free.",
    )
