"""Whether a model's weights are still what they were, told on the device where they are.

A fingerprint needs every byte on the host. To see a change, a sum on the device is enough: of each tensor's 32-bit words, each multiplied
with a random number of 64 bits, modulo 2⁶⁴. Whatever changes, the sum stays the same with a probability of at most 2⁻³³.
"""

from __future__ import annotations

import secrets
from itertools import count
from typing import Any

import torch
from torch import Tensor

from trimtab.bases.fingerprint import fingerprint_model
from trimtab.bases.weights import stored_parts
from trimtab.memory import release_freed
from trimtab.places.shards import shards_of

WORDS, CPU_WORDS = 1 << 24, 1 << 20
"""Words that are multiplied at once: on a device, on a CPU."""


class Watch:
    """A model's weights at one moment. before: their fingerprint then. Of what ranks share out, each watches its own."""

    def __init__(self, model: Any):
        self.before = fingerprint_model(model)
        self._seed = secrets.randbits(63)
        self._sums = None if model.device.type == "cpu" and shards_of(model) is None else self._sum(model)
        if shards_of(model) is not None:
            release_freed()  # what has passed leaves pieces that would be larger than what this rank keeps

    def now(self, model: Any) -> str:
        """Their fingerprint now. Where there are sums, it is computed only if they have changed."""
        if self._sums is not None and torch.equal(self._sum(model), self._sums):
            return self.before
        return fingerprint_model(model)

    def _sum(self, model: Any) -> Tensor:
        """Of each tensor, in the order of the modules; what is packed anew for it is let go before the next. Of a model that ranks share
        out, of what this rank has."""
        seeds, shards = count(self._seed), shards_of(model)
        tensors = (t for part in stored_parts(model) for t in part().values()) if shards is None else shards.kept(model)
        return torch.stack([random_sum(tensor, next(seeds)) for tensor in tensors])


def random_sum(tensor: Tensor, seed: int) -> Tensor:
    """Σ w r modulo 2⁶⁴, int64: w the tensor's words, r random numbers that depend on the seed."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = raw.view(torch.int32) if len(raw) % 4 == 0 and raw.storage_offset() % 4 == 0 else raw
    generator = torch.Generator(tensor.device).manual_seed(seed % 2**63)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in words.split(CPU_WORDS if tensor.device.type == "cpu" else WORDS):
        numbers = torch.randint(-(2**63), 2**63 - 1, part.shape, generator=generator, dtype=torch.int64, device=tensor.device)
        total += numbers.mul_(part).sum()
    return total
