"""Whether the decode path computes what the model's class does. Both run on a stand-in of a few layers and are compared with transformers'
own forward in fp32: long and short prompts, chunks over a paged cache, windows shorter than the prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.bases.weights import weight_of
from trimtab.forward.decode_path import FAMILIES, DecodePath, packs_weights
from trimtab.forward.hosted import Hosted
from trimtab.forward.replica import alike, altered, as_near, let_go
from trimtab.forward.small import in_chunks, random_ids, small_model
from trimtab.memory import release_freed
from trimtab.ops import native

CHUNKS = ((5, 3, 1, 6), (131, 1, 1, 4), (0, 70, 1, 9), (2, 1, 1, 5), *((0, 0, 0, 45),) * 3)
"""Tokens of each sequence that enter in each of four forwards: many rows, a long prompt beside short pieces, one token each, a few each
beside more rows than the one call runs at a time."""
LONGEST = max(map(sum, CHUNKS))
_agreed: dict[Hashable, bool] = {}
"""Models that were compared."""


class DecodePathMaker:
    """Makes the decode path where this model can have one here that agrees with the model's own; else gives None. They are compared once,
    and models that are built alike once in a process: weights change, formulas do not."""

    def __init__(self, hosted: Hosted):
        self.hosted = hosted
        self.agrees: bool | None = None

    @torch.no_grad()
    def __call__(self) -> DecodePath | None:
        if self.agrees is None:  # before the weights are packed, so that the stand-ins are not in memory beside them
            self.agrees = self._can_run() and self._agrees()
        return DecodePath(self.hosted) if self.agrees else None

    def _agrees(self) -> bool:
        hosted, packs = self.hosted, packs_weights(self.hosted)
        known = alike(hosted.model), hosted.dtype, hosted.device, packs
        if known not in _agreed:
            _agreed[known] = _agrees(hosted, partial(DecodePath, packs=packs))
            release_freed()
        return _agreed[known]

    def _can_run(self) -> bool:
        hosted, spec, body = self.hosted, self.hosted.spec, self.hosted.body
        known = spec.model_type in FAMILIES and hosted.model.config.hidden_act == "silu" and not any(map(altered, hosted.model.modules()))
        if not known or spec.max_positions < LONGEST or not native.available(torch.empty(0, dtype=hosted.dtype, device=hosted.device)):
            return False
        if len({(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in spec.layers}) > 1:
            return False
        return {m.variance_epsilon for m in body.modules() if hasattr(m, "variance_epsilon")} == {body.norm.variance_epsilon}


@torch.no_grad()
def _agrees(hosted: Hosted, make: Callable[[Hosted], DecodePath]) -> bool:
    """Whether the decode path that `make` gives of a model of this kind computes hidden states and logits as transformers does."""
    ids = random_ids([sum(chunk) for chunk in CHUNKS])
    wanted, head = _exact(hosted, ids)
    small = Hosted(_small_model(hosted, hosted.dtype), fast=False)  # as transformers wrote it
    path = make(small)
    on_path = lambda batch: path.forward(batch, *path.ways(batch))  # noqa: E731
    ours, theirs = (in_chunks(small, forward, ids, CHUNKS) for forward in (on_path, small.forward_plain))
    x = theirs[1]
    logits = path.head(x), small.head_module(x), head(x.float())
    let_go(small.model)
    return all(as_near(*three) for three in [*zip(ours, theirs, wanted, strict=True), logits])


def _exact(hosted: Hosted, ids: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
    """(hidden states of these sequences in fp32 through transformers' own forward, the output head in fp32). The rest of the stand-in is
    let go, so that two do not lie in memory together."""
    exact = _small_model(hosted, torch.float32)
    body = exact.get_submodule(hosted.spec.body)
    wanted = [body(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in ids]
    let_go(body)
    return wanted, exact.get_submodule(hosted.spec.head)


def _small_model(hosted: Hosted, dtype: torch.dtype) -> Any:
    """A small model whose embeddings are as small as a norm's epsilon lets them matter."""
    made = small_model(hosted.model, hosted.spec, dtype)
    embedding = weight_of(made.get_submodule(hosted.spec.embedding))
    embedding.write(embedding.dense() * hosted.body.norm.variance_epsilon**0.5)
    return made
