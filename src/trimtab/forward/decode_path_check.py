"""Whether the decode path computes what the model's class does. Both run on a stand-in of a few layers and are compared with transformers'
own forward in fp32: long and short prompts, chunks over a paged cache, windows shorter than the prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from trimtab.bases.weights import weight_of
from trimtab.forward.decode_path import FAMILIES, DecodePath, packs_weights
from trimtab.forward.hosted import Hosted
from trimtab.forward.replica import altered, as_near
from trimtab.forward.small import in_chunks, random_ids, small_model
from trimtab.memory import release_freed
from trimtab.ops import native

CHUNKS = ((5, 3, 1), (131, 1, 1), (0, 70, 1), (2, 1, 1))
"""Tokens of each sequence that enter in each of three forwards: many rows, a long prompt beside short pieces, one token each."""
LONGEST = max(map(sum, CHUNKS))


class DecodePathMaker:
    """Makes the decode path where this model can have one here that agrees with the model's own; else gives None. They are compared once:
    weights change, formulas do not."""

    def __init__(self, hosted: Hosted):
        self.hosted = hosted
        self.agrees: bool | None = None

    @torch.no_grad()
    def __call__(self) -> DecodePath | None:
        if self.agrees is None:  # before the weights are packed, so that the stand-ins are not in memory beside them
            self.agrees = self._can_run() and _agrees(self.hosted, partial(DecodePath, packs=packs_weights(self.hosted)))
            release_freed()
        return DecodePath(self.hosted) if self.agrees else None

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
    exact, model = (_small_model(hosted, dtype) for dtype in (torch.float32, hosted.dtype))
    small = Hosted(model)
    path, ids = make(small), random_ids([sum(chunk) for chunk in CHUNKS])
    body, head = exact.get_submodule(hosted.spec.body), exact.get_submodule(hosted.spec.head)
    on_path = lambda batch: path.forward(batch, *path.ways(batch))  # noqa: E731
    ours, theirs = (in_chunks(small, forward, ids, CHUNKS) for forward in (on_path, small.forward_plain))
    wanted = [body(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in ids]
    x = theirs[1]
    logits = path.head(x), small.head_module(x), head(x.float())
    return all(as_near(*three) for three in [*zip(ours, theirs, wanted, strict=True), logits])


def _small_model(hosted: Hosted, dtype: torch.dtype) -> Any:
    """A small model whose embeddings are as small as a norm's epsilon lets them matter."""
    made = small_model(hosted.model, hosted.spec, dtype)
    embedding = weight_of(made.get_submodule(hosted.spec.embedding))
    embedding.write(embedding.dense() * hosted.body.norm.variance_epsilon**0.5)
    return made
