"""The tensors of a safetensors file whose header has been checked: views of one piece of memory, into which the file is read once.

It is not mapped. A file that is cut short while it is mapped would end the process, and a copy in memory that nobody else can change takes
longer to make and to map than the file takes to be read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.store.files import AdapterFolder, Refusal
from trimtab.store.header import ITEM_BYTES, Entry

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What torch calls them."""
PIECE_BYTES = 2**20
"""Read and hashed at a time."""


class Contents(NamedTuple):
    """A file's tensors by their names there. runs: the same values, [n], one tensor for each run of one dtype. digest: the file's,
    "sha256:…"."""

    tensors: dict[str, Tensor]
    runs: list[Tensor]
    digest: str


def read_contents(folder: AdapterFolder, name: str, file: int, entries: Sequence[Entry], head: bytes) -> Contents:
    """The tensors behind a header that was read from a file, opened unhashed. head: the bytes read so far. Refusal if the file ends early,
    or is not the one that belongs into the folder."""
    data, sha = bytearray(max((e.stop for e in entries), default=0)), hashlib.sha256(head)
    memory = memoryview(data)
    while memory:
        got = os.readv(file, [memory[:PIECE_BYTES]])
        if not got:
            raise Refusal(f"{name} ends {len(memory):,} bytes early: it is truncated, or was changed while it was read")
        sha.update(memory[:got])  # while it is in the processor's cache
        memory = memory[got:]
    digest = f"sha256:{sha.hexdigest()}"
    folder.check(name, digest)
    return Contents(*_views(data, entries), digest)


def _views(data: bytearray, entries: Sequence[Entry]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The tensors of entries that cover the data without a gap, as a checked header's do."""
    import torch

    tensors, runs = dict[str, Any](), []
    for dtype, group in groupby(sorted(entries, key=lambda e: e.start), key=lambda e: e.dtype):
        run = list(group)
        count = (run[-1].stop - run[0].start) // ITEM_BYTES[dtype]
        flat = torch.frombuffer(data, dtype=getattr(torch, TYPES[dtype]), count=count, offset=run[0].start)
        if flat.data_ptr() % ITEM_BYTES[dtype]:
            flat = flat.clone()  # kernels read whole numbers
        runs.append(flat)
        parts = flat.split([(e.stop - e.start) // ITEM_BYTES[dtype] for e in run])
        tensors |= {e.name: part.view(e.shape) for e, part in zip(run, parts, strict=True)}
    return tensors, runs
