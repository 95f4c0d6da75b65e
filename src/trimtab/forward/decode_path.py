"""The decode path: inference on a CPU for Llama and similar families, where a step has few rows and dispatch takes longer than arithmetic.

It computes the formulas of the model's own forward in a tenth of the operations. Projections that share an input are one matmul, over
weights in the layout that the matmul wants. Everything between the matmuls is one kernel each (`ops.native`), and keys and values are
written straight into the cache. A step with few rows, whose edits are LoRA, IA³ and bottlenecks, runs all layers in one native call
(`ops.stack`) of the same kernels.

Edits of every method run through the same kernels of `ops` as everywhere. Before its first use the decode path is compared with the model's
own forward. If the two differ, the model keeps its own. Dense weights are copied into the layout of matrix tiles, if the machine has enough
memory; where it has no tiles, and where they are quantised, they are read as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.bases.weights import norm_weight
from trimtab.forward.attention import LONG, AttentionPlan
from trimtab.forward.batch import BASE, Batch, Way
from trimtab.forward.buckets import lay_out, over_buckets
from trimtab.forward.decode_layer import Layer, known, linear
from trimtab.forward.hosted import Hosted
from trimtab.forward.kv_cache import KVCache, PagedKV, Run
from trimtab.forward.packs import Mix, StackEdits
from trimtab.memory import machine_memory, release_freed
from trimtab.ops import native_inference
from trimtab.ops.stack import Edit, EditTable, LayerWeights, Stack

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MEMORY_SHARE = 0.25
"""Weights are copied into the matmul's layout where that takes at most this share of all memory. Not of what is free: a copy's results
differ from the original's by rounding, and the same run on the same machine must give the same numbers."""
ONE_CALL_ROWS = 512
"""Up to so many rows one call for all layers is at least as fast as a call for each kernel. It runs them 128 at a time (cpp/layers.cpp)."""


@dataclass(frozen=True)
class Paging:
    """Where the native attention finds each row's keys: row t belongs to a sequence, sees its first length_T[t] tokens (0: it is run
    elsewhere), and token j of sequence s lies at row table_SB[s][j // block] * block + j % block of the pools. All int32."""

    sequence_T: Tensor
    length_T: Tensor
    table_SB: Tensor
    block: int


Long = ops.QueryIndex | list[tuple[slice, Any]]
"""Sequences of many rows as `ops.attend_rows` reads them, or where that cannot run, each one's rows and the layout of its own."""


class DecodePath:
    """The decode path of one model. `ways` says which members of a batch it computes, and how; `forward` does."""

    def __init__(self, hosted: Hosted, packs: bool | None = None):
        """packs: whether weights are copied into the matmul's layout; None: where the machine is large enough."""
        self.hosted, spec, body = hosted, hosted.spec, hosted.body
        self.heads = (spec.layers[0].num_heads, *spec.kv_shape)
        packs = packs_weights(hosted) if packs is None else packs
        self.layers = [Layer(hosted, i, layer, packs) for i, layer in enumerate(body.layers)]
        if packs:
            release_freed()  # packed weights lie between what packing them freed, a quarter of their size; the head's are the largest
        self.norm_name = f"{spec.body}.norm"
        inside = [name for layer in self.layers for name in (*layer.sites, *layer.norm_names)]
        self.sites = frozenset([*inside, self.norm_name, spec.embedding, spec.head])
        self.norm, self.eps = norm_weight(body.norm), body.norm.variance_epsilon
        self.head = linear([hosted.head_weight], [hosted.head_module.bias], packs)[0]
        self.stack = _stack(self.layers, self.heads, self.norm, self.eps)

    def ways(self, batch: Batch) -> dict[Way, frozenset[int]]:
        """The members of a batch with a cache, by how their rows run. What an adapter asks for is no other one's matter: one with edits at
        modules that are looked at nowhere here runs through the model's own, and one with edits that the one call does not know goes
        layer by layer. Where many rows or a long prompt go layer by layer, the others go with them: a matmul of their own would read
        all weights once more."""
        groups, beyond = batch.mix.groups, frozenset[int]()
        if not groups.keys() <= self.sites:
            beyond = batch.members & {m for site in groups.keys() - self.sites for group in groups[site] for m in group.members}
        here = batch.members - beyond
        slow = here
        if self.stack is not None and not self._many(batch, here):
            slow = here & self._edits(self.stack, batch.mix).unknown if here != {BASE} else frozenset()
        found = {Way.ONE_CALL: here - slow, Way.LAYER_BY_LAYER: slow, Way.MODEL: beyond}
        return {way: members for way, members in found.items() if members}

    def _many(self, batch: Batch, members: frozenset[int]) -> bool:
        """Whether these members bring too many rows for the one call, or one sequence of theirs does. How many rows an adapter has does not
        matter: each is computed with its factors by itself, which costs no more than with as many different ones."""
        long = {batch.member_T[r.start] for r in batch.plan.runs if r.queries >= LONG}
        total = batch.total if members == batch.members else len(batch.index(members))
        return total > ONE_CALL_ROWS or not members.isdisjoint(long)

    def _edits(self, stack: Stack, mix: Mix) -> StackEdits:
        """What the one call can do of a mix."""
        if stack not in mix.tables:
            mix.tables[stack] = _stack_edits(self, mix)
        return mix.tables[stack]

    def forward(self, batch: Batch, way: Way) -> Tensor:
        """Hidden states after the final norm, [T, H], of a batch that `ways` sends this way; keys and values go into the batch's cache."""
        assert way is not Way.MODEL
        cache, plan = batch.plan.cache, batch.plan
        assert cache is not None and plan.write_T is not None
        x_TH = self.hosted.embed(batch).contiguous()
        cos_TD, sin_TD = (p[0].contiguous() for p in self.hosted.body.rotary_emb(x_TH[None], position_ids=batch.position_T[None]))
        paging, long = _paging(plan, cache)
        if way is Way.ONE_CALL:
            assert self.stack is not None
            edited = batch.rows(batch.mix.members)
            edits = (None, None) if edited is None else (edited.slot_T, self._edits(self.stack, batch.mix).table)
            return self.stack(x_TH, (cos_TD, sin_TD), (cache.keys, cache.values), plan.write_T, paging, *edits)
        y_TH: Tensor | None = None
        for layer in self.layers:
            h_TH = self._normed(layer.norm_names[0], x_TH, y_TH, layer.input_norm, batch)
            qkv_T = layer.qkv(h_TH, batch)
            pools = cache.keys[layer.index], cache.values[layer.index]
            native_inference.rotate_and_write(qkv_T, self.heads, cos_TD, sin_TD, layer.head_norms, self.eps, pools, plan.write_T)
            a_TH = native_inference.attend(qkv_T, self.heads, pools, paging, layer.scaling, layer.window)
            if long:
                self._attend_long(a_TH, qkv_T, pools, long, layer)
            h_TH = self._normed(layer.norm_names[1], x_TH, layer.o(a_TH, batch), layer.mlp_norm, batch)
            y_TH = layer.mlp(h_TH, batch)
        return self._normed(self.norm_name, x_TH, y_TH, self.norm, batch)

    def _normed(self, name: str, x_TH: Tensor, y_TH: Tensor | None, weight_H: Tensor, batch: Batch) -> Tensor:
        """x += y in place; the norm of x, with the batch's edits of this norm."""
        h_TH = native_inference.add_rms_norm(x_TH, y_TH, weight_H, self.eps)
        if name not in batch.mix.groups:
            return h_TH
        return self.hosted.edited(name, x_TH, batch, known(x_TH, h_TH, partial(ops.rms_norm, weight_H=weight_H, eps=self.eps)))

    def _attend_long(self, a_TH: Tensor, qkv_T: Tensor, pools: tuple[Tensor, Tensor], long: Long, layer: Layer) -> None:
        H, _, D = self.heads
        q_THD = qkv_T[:, : H * D].unflatten(1, (H, D))
        if isinstance(long, ops.QueryIndex):
            ops.attend_rows(q_THD, *pools, a_TH.view(-1, H, D), long, layer.scaling, layer.window)
            return
        for rows, layout in long:
            a_TH[rows] = over_buckets(q_THD[rows], *pools, layout, layer.scaling, None, layer.window).flatten(1)


def packs_weights(hosted: Hosted) -> bool:
    """Whether the machine is large enough for a copy of the dense weights."""
    embedding = hosted.spec.embedding
    size = sum(w.nbytes for name, w in hosted.weights.of.items() if w.stored_dense and name != embedding)
    return hosted.dtype == torch.bfloat16 and size <= MEMORY_SHARE * machine_memory()[0]


def _paging(plan: AttentionPlan, cache: KVCache) -> tuple[Paging, Long]:
    """The native attention's tables, and the long sequences."""
    total = sum(r.queries for r in plan.runs)
    sequence, length, long = np.zeros(total, dtype=np.int32), np.zeros(total, dtype=np.int32), list[Run]()
    for i, run in enumerate(plan.runs):
        if run.queries >= LONG:
            long.append(run)
        else:
            sequence[run.start : run.stop] = i
            length[run.start : run.stop] = np.arange(run.length - run.queries + 1, run.length + 1)
    if isinstance(cache, PagedKV):
        table = np.zeros((len(plan.places), max(len(p) for p in plan.places)), dtype=np.int32)  # type: ignore[arg-type]
        for line, place in zip(table, plan.places, strict=True):
            line[: len(place)] = place  # type: ignore[arg-type]
    else:
        table = np.asarray(plan.places, dtype=np.int32)[:, None]
    sequence_T, length_T, table_SB = (torch.from_numpy(a) for a in (sequence, length, table))
    return Paging(sequence_T, length_T, table_SB, cache.capacity), _long(long, cache)


def _long(runs: Sequence[Run], cache: KVCache) -> Long:
    if runs and ops.takes_flat(cache.keys[0]):
        return ops.query_index([(r.start, r.stop, r.keys) for r in runs])
    return [(slice(r.start, r.stop), lay_out([Run(0, r.queries, r.keys)], cache.keys.device)) for r in runs]


def _stack_edits(path: DecodePath, mix: Mix) -> StackEdits:
    """The mix's edits at every place, and who has one of another kind, or at another place."""
    places, known = list[list[Edit]](), set[int]()
    for layer in path.layers:
        for edits, done in layer.edits(mix):
            places.append(edits)
            known |= {id(group) for group in done}
    known |= {id(group) for group in mix.groups.get(path.hosted.spec.head, ())}  # which comes after the call
    unknown = {m for groups in mix.groups.values() for group in groups if id(group) not in known for m in group.members}
    return StackEdits(EditTable(places), frozenset(unknown))


def _stack(layers: Sequence[Layer], heads: tuple[int, int, int], norm_H: Tensor, eps: float) -> Stack | None:
    """The layers for one native call, where their weights are packed for it."""
    weights = []
    for layer in layers:
        packed = tuple(p.packed for p in layer.projections)
        if any(p is None for p in packed):
            return None
        weights.append(LayerWeights((layer.input_norm, layer.mlp_norm), layer.head_norms, packed, layer.scaling, layer.window))  # type: ignore[arg-type]
    return Stack(weights, heads, norm_H, eps)
