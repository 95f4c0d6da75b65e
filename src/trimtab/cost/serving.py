"""How much memory serving takes: the one number of `trimtab plan`, `trimtab doctor` and the server's log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trimtab.bases.fits import weight_bytes
from trimtab.bases.spec import Spec
from trimtab.cost.activations import comparison_bytes, forward_bytes, packed_sizes

if TYPE_CHECKING:
    from trimtab.model import Base


LOOKED_AT = 2 * 2**20
"""Before a computation 16 values of each tensor are compared (`weights.derived`); the system maps so much of the file around them."""


@dataclass(frozen=True)
class ServingMemory:
    """Bytes beside what the process itself takes: the base's weights, KV cache, packed adapters, work space of the largest forward, or
    on a CPU of the decode path's comparison before its first one."""

    weight_bytes: int
    kv_bytes: int
    adapter_bytes: int
    work_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.adapter_bytes + self.work_bytes


def serving_memory(
    spec: Spec, dtype: torch.dtype, *, converted: bool, on_cpu: bool = True, kv_bytes: int, adapter_bytes: int, rows: int, length: int
) -> ServingMemory:
    """Of a base in `dtype`. converted: whether it is stored in another dtype. rows, length: of the largest forward and its sequences."""
    weights = resident_bytes(spec, dtype, converted=converted, on_cpu=on_cpu)
    work = forward_bytes(spec, dtype.itemsize, rows, length)
    return ServingMemory(weights, kv_bytes, adapter_bytes, max(work, comparison_bytes(spec)) if on_cpu else work)


def resident_bytes(spec: Spec, dtype: torch.dtype, *, converted: bool, on_cpu: bool = True) -> int:
    """Bytes that a base's weights take while it answers. Where inference copies them, which it does on some CPUs alone, the copies take the
    place of those that are mapped from a file, of which up to `LOOKED_AT` a matrix come back whenever they are looked at; weights that were
    converted stay."""
    beside = sum(size if converted else min(size, LOOKED_AT) for size in packed_sizes(spec, dtype)) if on_cpu else 0
    return spec.weight_bytes(dtype) + beside


def memory_of_server(base: Base, kv_bytes: int, adapter_bytes: int, rows: int) -> ServingMemory:
    """Of a base that is loaded."""
    converted = base.path is None or weight_bytes(base.path, base.dtype)[1] > 0
    sizes = {"kv_bytes": kv_bytes, "adapter_bytes": adapter_bytes, "rows": rows, "length": min(rows, base.spec.max_positions)}
    return serving_memory(base.spec, base.dtype, converted=converted, on_cpu=base.device.type == "cpu", **sizes)
