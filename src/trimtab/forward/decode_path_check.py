"""Does the decode path compute what the model's class does? Both run on a stand-in of a few layers, against transformers' own forward in
fp32: long and short prompts, chunks over a paged cache, windows shorter than the prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.forward.attention import PagedKV
from trimtab.forward.batch import Piece, make_batch
from trimtab.forward.decode_path import FAMILIES, DecodePath, packs_weights
from trimtab.forward.packs import Mix
from trimtab.forward.replica import altered, as_near, kind, small_config, stand_in
from trimtab.ops import native

if TYPE_CHECKING:
    from trimtab.forward.attached import Attached

TOKENS = 64
BLOCK = 4
CHUNKS = ((5, 3, 1), (131, 1, 1), (0, 70, 1), (2, 1, 1))
"""Tokens of each sequence that enter in each of three forwards: many rows, a long prompt beside short pieces, one token each."""
LONGEST = max(map(sum, CHUNKS))


class DecodePathMaker:
    """Makes the decode path where this model can have one here that agrees with the model's own; else gives None. They are compared once:
    weights change, formulas do not."""

    def __init__(self, attached: Attached):
        self.attached = attached
        self.agrees: bool | None = None

    @torch.no_grad()
    def __call__(self) -> DecodePath | None:
        if self.agrees is None and not self._can_run():
            self.agrees = False
        path = None if self.agrees is False else DecodePath(self.attached)
        if path is not None and self.agrees is None:
            self.agrees = _agrees(self.attached, partial(DecodePath, packs=packs_weights(self.attached)))
        return path if self.agrees else None

    def _can_run(self) -> bool:
        attached, spec, body = self.attached, self.attached.spec, self.attached.body
        known = (
            spec.model_type in FAMILIES and attached.model.config.hidden_act == "silu" and not any(map(altered, attached.model.modules()))
        )
        if not known or spec.max_positions < LONGEST or not native.available(attached.embedding.weight):
            return False
        return {m.variance_epsilon for m in body.modules() if hasattr(m, "variance_epsilon")} == {body.norm.variance_epsilon}


@torch.no_grad()
def _agrees(attached: Attached, make: Callable[[Attached], DecodePath]) -> bool:
    """Whether the decode path that `make` gives of a model of this kind computes hidden states and logits as transformers does."""
    layers = _of_each_kind(attached)
    exact = _small_model(attached, layers, torch.float32)
    small = type(attached)(_small_model(attached, layers, attached.dtype))
    path = make(small)
    ids = [torch.randint(TOKENS, (sum(chunk),), generator=torch.Generator().manual_seed(i)) for i, chunk in enumerate(CHUNKS)]
    body, head = exact.get_submodule(attached.spec.family.body), exact.get_submodule(attached.spec.family.head)
    ours, theirs = (_in_chunks(small, forward, ids) for forward in (path.forward, small.forward_plain))
    wanted = [body(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in ids]
    x = theirs[1]
    logits = path.head(x), small.head_module(x), torch.nn.functional.linear(x.float(), head.weight, head.bias)
    return all(as_near(*three) for three in [*zip(ours, theirs, wanted, strict=True), logits])


def _of_each_kind(attached: Attached) -> list[int]:
    """Two layers, or one of each kind where there are more: the places of the first ones."""
    kinds = [kind(layer) for layer in attached.body.layers]
    first = sorted({k: i for i, k in reversed(list(enumerate(kinds)))}.values())
    return first if len(first) > 1 else [0, min(1, len(kinds) - 1)]


def _small_model(attached: Attached, layers: list[int], dtype: torch.dtype) -> Any:
    """A stand-in with these layers and a few tokens, whose embeddings are as small as a norm's epsilon lets them matter."""
    config = small_config(attached.model.config, layers)
    config.vocab_size, config.pad_token_id, config.tie_word_embeddings = TOKENS, None, False
    with torch.device("meta"):
        model = type(attached.model)(config)
    family, body = attached.spec.family, model.get_submodule(attached.spec.family.body)
    body.layers = torch.nn.ModuleList([attached.body.layers[i] for i in layers])
    body.norm, body.rotary_emb = attached.body.norm, attached.body.rotary_emb
    made = stand_in(model, dtype, config)
    for i, layer in enumerate(made.get_submodule(family.layers)):
        layer.self_attn.layer_idx = i
    made.get_submodule(family.embedding).weight.mul_(attached.body.norm.variance_epsilon**0.5)
    return made.eval()


def _in_chunks(small: Attached, forward: Callable[[Any], Tensor], ids: list[Tensor]) -> list[Tensor]:
    """Hidden states of each sequence, fed through a paged cache whose blocks lie in disorder."""
    spec, places, past = small.spec, [], [0] * len(ids)
    blocks = iter(torch.randperm(-(-sum(map(len, ids)) // BLOCK) + len(ids), generator=torch.Generator().manual_seed(0)).tolist())
    places = [[next(blocks) for _ in range(-(-len(row) // BLOCK))] for row in ids]
    cache = PagedKV(spec.num_layers, sum(map(len, places)) + len(ids), BLOCK, spec.num_kv_heads, spec.head_dim, small.dtype, small.device)
    found: list[list[Tensor]] = [[] for _ in ids]
    for counts in zip(*CHUNKS, strict=True):
        now = [i for i, count in enumerate(counts) if count]
        pieces = [Piece(ids[i][past[i] : past[i] + counts[i]], slot=places[i], past=past[i]) for i in now]
        batch = make_batch(pieces, Mix([]), device=small.device, max_positions=spec.max_positions, cache=cache)
        hidden_TH = forward(batch)
        for i, (a, b) in zip(now, batch.where, strict=True):
            found[i].append(hidden_TH[a:b])
            past[i] += counts[i]
    return [torch.cat(parts) for parts in found]
