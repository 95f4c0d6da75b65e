"""An adapter that is still in memory, served as it is at one moment: a variant that trains can be asked between two steps.

Its digest is taken from its tensors, so after each step it is another adapter to the engine, and nothing is reused across steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.methods import Head, Method
from trimtab.store import Adapter

if TYPE_CHECKING:
    from trimtab.model import Base


@dataclass(frozen=True)
class Snapshot:
    """A copy of an adapter's tensors, and how to serve it. ref: what logs and /v1/models call it."""

    ref: str
    digest: str
    method: Method = field(repr=False, compare=False)
    params: Mapping[str, Tensor] = field(repr=False, compare=False)
    base: Base = field(repr=False, compare=False)
    head: Head | None = field(default=None, repr=False, compare=False)

    def load(self) -> Adapter:
        return Adapter(self.base, self.method, dict(self.params), head=self.head)


def snapshot(ref: str, base: Base, method: Method, params: Mapping[str, Tensor], head: Head | None = None) -> Snapshot:
    """The adapter as it would be saved now: training-time aids folded away, tensors copied, so that the next step does not change it.
    Call it between two steps."""
    with torch.no_grad():
        method, exported = method.export(params)
        copied = {key: t.detach().clone() for key, t in exported.items()}
    return Snapshot(ref, digest_of(method, copied), method, copied, base, head)


def digest_of(method: Method, params: Mapping[str, Tensor]) -> str:
    """sha256 over the method with its fields, and names, shapes, dtypes and bytes of the tensors."""
    sha = hashlib.sha256(f"{type(method).__name__} {method!r}\n".encode())
    for key, tensor in sorted(params.items()):
        sha.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return f"sha256:{sha.hexdigest()}"
