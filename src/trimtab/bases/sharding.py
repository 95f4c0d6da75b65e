"""Which parts of a model ranks share out: the matrices of each decoder layer, of the embedding and of the output head.

Vectors (norms, biases) and small tables stay whole on every rank. So do matrices outside of the layers that are no embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases.spec import Spec
from trimtab.bases.weights.packed import PackedLinear
from trimtab.places.shards import NAME, Shards

TABLE_BYTES = 1024
"""Buffers of packed layers of so many bytes at most stay whole: tables of a format's values."""


def shard(model: Any, spec: Spec, shards: Shards, device: torch.device | None = None) -> None:
    """Share a model out, as far as it is not yet. What stays whole is on `device` too."""
    device = device or model.device
    for module in parts_of(model, spec):
        shards.add(module, matrices_in(module), device)
    vars(model)[NAME] = shards
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for t in table.values():
                if t is not None and t.device != device and not t.is_meta:
                    t.data = t.data.to(device)


def parts_of(model: Any, spec: Spec) -> list[nn.Module]:
    """What is brought as a whole: the embeddings, the decoder layers and the head."""
    layers = list(model.get_submodule(spec.layer_list))
    inside = {m for layer in layers for m in layer.modules()}
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside]
    return list(dict.fromkeys([model.get_submodule(spec.embedding), *embeddings, *layers, model.get_submodule(spec.head)]))


def matrices_in(module: nn.Module) -> Mapping[nn.Module, list[Tensor]]:
    """The matrices of a module and of all that is in it, as far as they have values already."""
    return {m: own for m in module.modules() if (own := list(_matrices(m)))}


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module._parameters.values() if p is not None and p.dim() > 1 and not p.is_meta)
    if isinstance(module, PackedLinear):
        yield from (b for b in module._buffers.values() if b is not None and b.nbytes > TABLE_BYTES)
