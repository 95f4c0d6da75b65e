"""A whole model's stand-in, with few layers and few tokens, and how sequences are fed to it. Comparisons of whole forwards run on it.

See `replica.py` for what a stand-in keeps of its original.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases.spec import Spec
from trimtab.forward.batch import BASE, Batch, Piece, make_batch
from trimtab.forward.hosted import Hosted
from trimtab.forward.kv_cache import PagedKV
from trimtab.forward.packs import Mix
from trimtab.forward.replica import dense_twin, kind, small_config, stand_in

TOKENS = 64
BLOCK = 4


def small_model(model: Any, spec: Spec, dtype: torch.dtype) -> Any:
    """A stand-in of a causal LM under transformers' own attention: one layer of each kind, two at least, and `TOKENS` tokens."""
    layers = model.get_submodule(spec.layer_list)
    chosen = _of_each_kind(layers)
    config = small_config(model.config, chosen)
    config.vocab_size, config.pad_token_id, config.tie_word_embeddings = TOKENS, None, False
    ends = [model.get_submodule(name) for name in (spec.embedding, spec.head)]
    replaced: dict[int, nn.Module] = {id(m): _of_few_tokens(m) for m in ends}
    replaced |= _of_few_layers(model.get_submodule(spec.body), model.config, len(chosen))
    replaced[id(layers)] = nn.ModuleList([layers[i] for i in chosen])
    made = stand_in(model, dtype, config, replaced)
    for i, layer in enumerate(made.get_submodule(spec.layer_list)):
        for part in layer.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = i
    return made.eval()


def _of_each_kind(layers: Sequence[nn.Module]) -> list[int]:
    """Two layers, or one of each kind where there are more: the places of the first ones."""
    kinds = [kind(layer) for layer in layers]
    first = sorted({k: i for i, k in reversed(list(enumerate(kinds)))}.values())
    return first if len(first) > 1 else [0, min(1, len(kinds) - 1)]


def _of_few_tokens(module: nn.Module) -> nn.Module:
    """A token embedding or an output head of `TOKENS` tokens, whose values the stand-in gives anew."""
    module = dense_twin(module, TOKENS)
    made = copy.copy(module)
    made.__dict__["_parameters"] = {
        n: None if p is None else nn.Parameter(p.new_empty(TOKENS, *p.shape[1:]), False) for n, p in module._parameters.items()
    }
    for size in ("num_embeddings", "out_features"):
        if hasattr(made, size):
            setattr(made, size, TOKENS)
    made.__dict__["padding_idx"] = None
    return made


def _of_few_layers(body: nn.Module, config: Any, layers: int) -> dict[int, nn.Module]:
    """What holds embeddings of tokens for each layer, side by side (Gemma 3n, Gemma 4), for these layers alone: by the module's id."""
    each = getattr(config, "hidden_size_per_layer_input", 0)
    replaced: dict[int, nn.Module] = {}
    for module in body.children() if each else ():
        if isinstance(module, nn.Embedding) and module.embedding_dim == each * config.num_hidden_layers:
            replaced[id(module)] = _resized(module, (TOKENS, each * layers), num_embeddings=TOKENS, embedding_dim=each * layers)
        elif isinstance(module, nn.Linear) and module.out_features == each * config.num_hidden_layers:
            replaced[id(module)] = _resized(module, (each * layers, module.in_features), out_features=each * layers)
    return replaced


def _resized(module: nn.Module, shape: tuple[int, int], **sizes: int) -> nn.Module:
    """A copy whose weight has another shape, and values that the stand-in gives anew."""
    made = copy.copy(module)
    made.__dict__["_parameters"] = {"weight": nn.Parameter(next(module.parameters()).new_empty(shape), False), "bias": None}
    made.__dict__ |= sizes | {"padding_idx": None}
    return made


def random_ids(lengths: Sequence[int]) -> list[Tensor]:
    """Sequences of random token ids of a small model."""
    return [torch.randint(TOKENS, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]


def in_chunks(
    small: Hosted,
    forward: Callable[[Batch], Tensor],
    ids: Sequence[Tensor],
    chunks: Sequence[Sequence[int]],
    mix: Mix | None = None,
    members: Sequence[int] = (),
) -> list[Tensor]:
    """What `forward` gives for each row of each sequence, fed through a paged cache whose blocks lie in disorder. chunks: how many tokens
    of each sequence enter in each forward. members: each sequence's adapter in the mix; the base where there are none."""
    spec, past, mix = small.spec, [0] * len(ids), mix or Mix([])
    blocks = iter(torch.randperm(-(-sum(map(len, ids)) // BLOCK) + len(ids), generator=torch.Generator().manual_seed(0)).tolist())
    places = [[next(blocks) for _ in range(-(-len(row) // BLOCK))] for row in ids]
    cache = PagedKV(spec.num_layers, sum(map(len, places)) + len(ids), BLOCK, *spec.kv_shape, small.dtype, small.device)
    found: list[list[Tensor]] = [[] for _ in ids]
    for counts in zip(*chunks, strict=True):
        now = [i for i, count in enumerate(counts) if count]
        pieces = [Piece(ids[i][past[i] : past[i] + counts[i]], members[i] if members else BASE, slot=places[i], past=past[i]) for i in now]
        batch = make_batch(pieces, mix, device=small.device, max_positions=spec.max_positions, cache=cache)
        rows = forward(batch)
        for i, (a, b) in zip(now, batch.where, strict=True):
            found[i].append(rows[a:b])
            past[i] += counts[i]
    return [torch.cat(parts) for parts in found]
