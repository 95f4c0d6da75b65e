"""The decode path: inference on a CPU for Llama and similar families, where a step has few rows and dispatch takes longer than arithmetic.

It computes the formulas of the model's own forward in a tenth of the operations. Projections that share an input are one matmul, over
weights in the layout that the matmul wants. Everything between the matmuls is one kernel each (`ops.native`), and keys and values are
written straight into the cache. A step with few rows, whose edits are LoRA, IA³ and bottlenecks, runs all layers in one native call
(`ops.stack`) of the same kernels.

Edits of every method run through the same kernels of `ops` as everywhere. Before its first use the decode path is compared with the model's
own forward. If the two differ, the model keeps its own. The projections' weights are copied, if the machine has enough memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.bases.weights import Weight, norm_weight
from trimtab.forward.attention import AttentionPlan, KVCache, PagedKV, Run, lay_out, over_buckets
from trimtab.forward.batch import Batch
from trimtab.forward.hosted import Hosted
from trimtab.forward.packs import Group, Mix
from trimtab.memory import machine_memory
from trimtab.ops import native, native_inference
from trimtab.ops.stack import Edit, EditTable, LayerWeights, Stack

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LONG = 64
"""Sequences that bring this many rows run their attention as batched matmuls, which a long prompt is worth."""
FEW_ROWS = 128
"""Up to so many rows a matmul is bound by reading its weights; beyond, the library's own blocking is faster."""
MEMORY_SHARE = 0.25
"""Weights are copied into the matmul's layout where that takes at most this share of all memory. Not of what is free: a copy's results
differ from the original's by rounding, and the same run on the same machine must give the same numbers."""

T = TypeVar("T")
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Paging:
    """Where the native attention finds each row's keys: row t belongs to a sequence, sees its first length_T[t] tokens (0: it is run
    elsewhere), and token j of sequence s lies at row table_SB[s][j // block] * block + j % block of the pools. All int32."""

    sequence_T: Tensor
    length_T: Tensor
    table_SB: Tensor
    block: int
    longest: int


class DecodePath:
    """The decode path of one model. `takes` says whether it computes a batch; `forward` does."""

    def __init__(self, hosted: Hosted, packs: bool | None = None):
        """packs: whether weights are copied into the matmul's layout; None: where the machine is large enough."""
        self.hosted, spec, body = hosted, hosted.spec, hosted.body
        self.heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        packs = packs_weights(hosted) if packs is None else packs
        self.layers = [_Layer(hosted, i, layer, packs) for i, layer in enumerate(body.layers)]
        self.sites = frozenset(name for layer in self.layers for name in layer.sites) | {spec.head}
        self.norm, self.eps = norm_weight(body.norm), body.norm.variance_epsilon
        self.head = _linear([hosted.head_weight], [hosted.head_module.bias], packs)[0]
        self.stack = _stack(self.layers, self.heads, self.norm, self.eps)

    def takes(self, batch: Batch) -> bool:
        """Whether all that this batch asks for is computed here: a cache, no embedded prefix rows, edits at the layers' modules only."""
        return batch.plan.cache is not None and not batch.embeds and not batch.plan.capture and batch.mix.groups.keys() <= self.sites

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [T, H]; keys and values go into the batch's cache."""
        cache, plan = batch.plan.cache, batch.plan
        assert cache is not None and plan.write_T is not None
        x_TH = self.hosted.embedding(batch.ids_T[None])[0].contiguous()
        cos_TD, sin_TD = (p[0].contiguous() for p in self.hosted.body.rotary_emb(x_TH[None], position_ids=batch.position_T[None]))
        paging, long = _paging(plan, cache)
        if self.stack is not None and len(x_TH) <= FEW_ROWS and not long:
            edits = self._edits(self.stack, batch)
            if edits is not None:
                return self.stack(x_TH, (cos_TD, sin_TD), (cache.keys, cache.values), plan.write_T, paging, *edits)
        y_TH: Tensor | None = None
        for layer in self.layers:
            h_TH = native_inference.add_rms_norm(x_TH, y_TH, layer.input_norm, self.eps)
            qkv_T = layer.qkv(h_TH, batch)
            pools = cache.keys[layer.index], cache.values[layer.index]
            native_inference.rotate_and_write(qkv_T, self.heads, cos_TD, sin_TD, layer.head_norms, self.eps, pools, plan.write_T)
            a_TH = native_inference.attend(qkv_T, self.heads, pools, paging, layer.scaling, layer.window)
            for rows, layout in long:
                self._attend_long(a_TH, qkv_T, pools, rows, layout, layer)
            h_TH = native_inference.add_rms_norm(x_TH, layer.o(a_TH, batch), layer.mlp_norm, self.eps)
            y_TH = layer.mlp(h_TH, batch)
        return native_inference.add_rms_norm(x_TH, y_TH, self.norm, self.eps)

    def _edits(self, stack: Stack, batch: Batch) -> tuple[Tensor | None, EditTable | None] | None:
        """Each row's adapter and what all of them do, where the one call knows all that edits this batch; else None."""
        rows = batch.rows(batch.mix.members)
        if rows is None:
            return None, None
        if stack not in batch.mix.tables:
            batch.mix.tables[stack] = _edit_table(self.layers, batch.mix)
        table, (slot_T, long) = batch.mix.tables[stack], rows.by_row
        return None if table is None or long else (slot_T, table)

    def _attend_long(self, a_TH: Tensor, qkv_T: Tensor, pools: tuple[Tensor, Tensor], rows: slice, layout: Any, layer: _Layer) -> None:
        H, _, D = self.heads
        q_THD = qkv_T[rows, : H * D].reshape(-1, H, D)
        a_TH[rows] = over_buckets(q_THD, *pools, layout, layer.scaling, None, layer.window).flatten(1)


def packs_weights(hosted: Hosted) -> bool:
    """Whether the machine is large enough for a copy of the weights."""
    embedding = hosted.spec.embedding
    size = sum(w.nbytes for name, w in hosted.weights.of.items() if name != embedding)
    return hosted.dtype == torch.bfloat16 and size <= MEMORY_SHARE * machine_memory()[0]


def _paging(plan: AttentionPlan, cache: KVCache) -> tuple[Paging, list[tuple[slice, Any]]]:
    """The native attention's tables, and for each long sequence its rows and the layout of its own."""
    total = sum(r.queries for r in plan.runs)
    sequence, length, long = np.zeros(total, dtype=np.int32), np.zeros(total, dtype=np.int32), []
    for i, run in enumerate(plan.runs):
        if run.queries >= LONG:
            layout = lay_out([Run(0, run.queries, run.keys)], plan.device)
            long.append((slice(run.start, run.stop), layout))
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
    return Paging(sequence_T, length_T, table_SB, cache.capacity, max(1, int(length.max(initial=0)))), long


def _edit_table(layers: Sequence[_Layer], mix: Mix) -> EditTable | None:
    """The mix's edits at every place; None where one is of another kind."""
    places = _all_of([place for layer in layers for place in layer.edits(mix)])
    return None if places is None else EditTable(places)


def _edit(group: Group, first: int, width: int, slots: int, *, own_input: bool) -> Edit | None:
    """What a group does at a module whose outputs are `width` of its place's; None where the one call cannot. own_input: no other module
    reads what this one does."""
    kernel, packs, members = group.kernel, group.packs, group.members
    if isinstance(kernel, ops.Bottleneck) and (own_input or not kernel.parallel):
        parts = native_inference.BottleneckParts(packs, members, slots, kernel.number)
        return Edit("beside" if kernel.parallel else "behind", first, width, parts)
    if kernel is ops.scale_output or (kernel is ops.scale_input and own_input):
        kind = "scale_output" if kernel is ops.scale_output else "scale_input"
        return Edit(kind, first, width, native_inference.ScaleParts(packs, members, slots))
    return None


def _stack(layers: Sequence[_Layer], heads: tuple[int, int, int], norm_H: Tensor, eps: float) -> Stack | None:
    """The layers for one native call, where their weights are packed for it."""
    weights = []
    for layer in layers:
        packed = tuple(p.packed for p in layer.projections)
        if any(p is None for p in packed):
            return None
        weights.append(LayerWeights((layer.input_norm, layer.mlp_norm), layer.head_norms, packed, layer.scaling, layer.window))  # type: ignore[arg-type]
    return Stack(weights, heads, norm_H, eps)


class _Projection:
    """Linear layers that share an input, as one matmul; edits of each act on its part of the result."""

    def __init__(self, hosted: Hosted, names: Sequence[str], packs: bool):
        self.hosted, self.names = hosted, tuple(names)
        self.weights = [hosted.weights.of[n] for n in names]
        self.biases: list[Tensor | None] = [hosted.model.get_submodule(n).bias for n in names]
        self.plain, self.packed = _linear(self.weights, self.biases, packs)
        stops = np.cumsum([w.shape[0] for w in self.weights]).tolist()
        self.parts = list(zip([0, *stops[:-1]], stops, strict=True))

    def __call__(self, x_TI: Tensor, batch: Batch) -> Tensor:
        groups: Mapping[str, Any] = batch.mix.groups
        if not any(name in groups for name in self.names):
            return self.plain(x_TI)
        lora = self.lora_parts(batch.mix) if all(g.kernel is ops.lora for n in self.names for g in groups.get(n, ())) else None
        if len(self.names) == 1 and not lora:
            return self.hosted.edited(self.names[0], x_TI, batch, self.plain)
        y_TO = self.plain(x_TI)
        if not lora or not self._add_lora(x_TI, y_TO, batch, lora):
            for name, weight, bias, (a, b) in zip(self.names, self.weights, self.biases, self.parts, strict=True):
                if name in groups:
                    part = y_TO[:, a:b]
                    edited = self.hosted.edited(name, x_TI, batch, _known(x_TI, part, partial(weight.matmul, bias_O=bias)))
                    if edited.data_ptr() != part.data_ptr():
                        part.copy_(edited)
        return y_TO

    def lora_parts(self, mix: Mix) -> native_inference.LoraParts | None:
        """The mix's factors of LoRA at all of these modules."""
        return mix.lora_parts(self.names, [a for a, _ in self.parts], ops.lora)

    def edits(self, mix: Mix) -> list[Edit] | None:
        """What the mix does at these modules; None where the one call cannot."""
        lora, outputs = self.lora_parts(mix), self.parts[-1][1]
        found: list[Edit | None] = [Edit("lora", 0, outputs, lora)] if lora else []
        for name, (a, b) in zip(self.names, self.parts, strict=True):
            others = [g for g in mix.groups.get(name, ()) if g.kernel is not ops.lora]
            found += [_edit(g, a, b - a, len(mix.adapters), own_input=len(self.names) == 1) for g in others]
        return _all_of(found)

    def _add_lora(self, x_TI: Tensor, y_TO: Tensor, batch: Batch, parts: native_inference.LoraParts) -> bool:
        """Add LoRA at all of these modules in one pass over the rows; False where some run of them is better off as matmuls."""
        rows = batch.rows(batch.mix.members)
        if rows is None:
            return True
        slot_T, long = rows.by_row
        if long and not native_inference.runs_on_tiles(x_TI):
            return False
        if slot_T is not None:
            native_inference.lora(x_TI, y_TO, slot_T, parts)
        for span in long:
            slots = torch.full((span.stop - span.start,), span.slot, dtype=torch.int32)
            native_inference.lora(x_TI[span.start : span.stop], y_TO[span.start : span.stop], slots, parts)
        return True


def _all_of(found: Sequence[T | None]) -> list[T] | None:
    """All, or None where one is None."""
    known = [f for f in found if f is not None]
    return known if len(known) == len(found) else None


def _known(x_TI: Tensor, y_TO: Tensor, linear: Linear) -> Linear:
    """A linear layer for an edit to call: what it gives for x is known; for another input it is computed."""
    return lambda x: y_TO if x is x_TI else linear(x)


def _linear(weights: Sequence[Weight], biases: Sequence[Tensor | None], packs: bool) -> tuple[Linear, native_inference.PackedWeight | None]:
    """Linear layers of one input side by side, and their weights on tiles where they are packed so."""
    many: Linear = partial(ops.linears, weights=weights, biases=biases)
    if len(weights) == 1:
        many = partial(weights[0].matmul, bias_O=biases[0])
    if packs and all(w.stored_dense for w in weights):
        given = [w.dense().new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
        few = _packed(torch.cat([w.dense() for w in weights]), None if all(b is None for b in biases) else torch.cat(given))
        return lambda x: few(x) if len(x) <= FEW_ROWS else many(x), few if isinstance(few, native_inference.PackedWeight) else None
    return many, None


def _packed(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    if native.has_tiles() and weight_OI.shape[1] % 32 == 0:
        return native_inference.PackedWeight(weight_OI, bias_O)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 32)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, "none", [], "")


class _Layer:
    """One layer's weights and places for edits."""

    def __init__(self, hosted: Hosted, index: int, layer: Any, packs: bool):
        found, attn = hosted.spec.layers[index], layer.self_attn
        at = found.name
        self.hosted, self.index, self.scaling = hosted, index, attn.scaling
        self.window = found.window
        self.input_norm, self.mlp_norm = norm_weight(layer.input_layernorm), norm_weight(layer.post_attention_layernorm)
        self.head_norms = (norm_weight(attn.q_norm), norm_weight(attn.k_norm)) if hasattr(attn, "q_norm") else None
        self.mlp_name = f"{at}.mlp"
        self.qkv = _Projection(hosted, [f"{at}.self_attn.{p}_proj" for p in "qkv"], packs)
        self.o = _Projection(hosted, [f"{at}.self_attn.o_proj"], packs)
        self.gate_up = _Projection(hosted, [f"{at}.mlp.{p}_proj" for p in ("gate", "up")], packs)
        self.down = _Projection(hosted, [f"{at}.mlp.down_proj"], packs)
        self.projections = (self.qkv, self.o, self.gate_up, self.down)
        self.sites = [n for p in self.projections for n in p.names] + [self.mlp_name]

    def edits(self, mix: Mix) -> list[list[Edit] | None]:
        """What the mix does at each place; None where the one call cannot."""
        width = self.down.parts[-1][1]
        around_mlp = [_edit(g, 0, width, len(mix.adapters), own_input=True) for g in mix.groups.get(self.mlp_name, ())]
        return [*(p.edits(mix) for p in self.projections), _all_of(around_mlp)]

    def mlp(self, h_TH: Tensor, batch: Batch) -> Tensor:
        inside = lambda x: self.down(native_inference.swiglu(self.gate_up(x, batch)), batch)  # noqa: E731
        return self.hosted.edited(self.mlp_name, h_TH, batch, inside) if self.mlp_name in batch.mix.groups else inside(h_TH)
