"""Adapters with tensors that matter, and safetensors files with whatever one wants to be wrong in them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

from tests.tiny import VOCAB, tiny_model, tiny_tokenizer
from trimtab.methods import METHODS
from trimtab.methods.base import Method
from trimtab.model import Base
from trimtab.store import Adapter

EXAMPLES = [(f"{cls.name}-{i}", method) for cls in METHODS.values() for i, method in enumerate(cls.examples())]
SEQUENCES = [[7, 250, 3, 3, 90, 41, 12, 199, 5, 64, 28, 77, 130, 9], [1, 2, 3], [42]]
"""The first is longer than the tiny models' sliding windows."""


def tiny_base(family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, fingerprint: str = "sha256:tiny") -> Base:
    return Base(tiny_model(family, seed=seed, dtype=dtype), tiny_tokenizer(), name=f"tiny-{family}", fingerprint=fingerprint)


def stir_(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Move a tensor away from its start, in place: nothing may be right by being zero, one, or small."""
    spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
    tensor += (0.3 * spread or 0.2) * torch.randn(tensor.shape, generator=generator)


@torch.no_grad()
def stir_trained_(model: torch.nn.Module, generator: torch.Generator) -> None:
    """The same with all of a model's tensors that train, as those of peft's adapters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            stir_(parameter, generator)


def stirred(base: Base, method: Method, *, seed: int = 1) -> Adapter:
    adapter = Adapter.create(base, method, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter.params.values():
        stir_(tensor, generator)
    return adapter


def write_tensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    """A safetensors file with this header, given as an object or as bytes; length: what the file claims of the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def read_tensors(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def random_ids(count: int, *, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
