"""The decode path: inference on a CPU for Llama and similar families, where a step has few rows and dispatch takes longer than arithmetic.

It computes the formulas of the model's own forward in a tenth of the operations. Projections that share an input are one matmul, over
weights in the layout that the matmul wants. Everything between the matmuls is one kernel each (`ops.native`), and keys and values are
written straight into the cache. A step with few rows, whose edits are LoRA, IA³ and bottlenecks, runs all layers in one native call
(`ops.stack`) of the same kernels.

Edits of every method run through the same kernels of `ops` as everywhere. Before its first use the decode path is compared with the model's
own forward. If the two differ, the model keeps its own. The projections' weights are copied, if the machine has enough memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.bases.weights import Weight, norm_weight
from trimtab.forward.attention import AttentionPlan, KVCache, PagedKV, Run, lay_out, over_buckets
from trimtab.forward.batch import BASE, Batch, Way
from trimtab.forward.hosted import Hosted
from trimtab.forward.packs import Group, Mix, StackEdits
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
    """The decode path of one model. `ways` says which members of a batch it computes, and how; `forward` does."""

    def __init__(self, hosted: Hosted, packs: bool | None = None):
        """packs: whether weights are copied into the matmul's layout; None: where the machine is large enough."""
        self.hosted, spec, body = hosted, hosted.spec, hosted.body
        self.heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        packs = packs_weights(hosted) if packs is None else packs
        self.layers = [_Layer(hosted, i, layer, packs) for i, layer in enumerate(body.layers)]
        self.norm_name = f"{spec.body}.norm"
        inside = [name for layer in self.layers for name in (*layer.sites, *layer.norm_names)]
        self.sites = frozenset([*inside, self.norm_name, spec.embedding, spec.head])
        self.norm, self.eps = norm_weight(body.norm), body.norm.variance_epsilon
        self.head = _linear([hosted.head_weight], [hosted.head_module.bias], packs)[0]
        self.stack = _stack(self.layers, self.heads, self.norm, self.eps)

    def ways(self, batch: Batch) -> dict[Way, frozenset[int]]:
        """The members of a batch with a cache, by how their rows run. What an adapter asks for is no other one's matter: one with edits at
        modules that are looked at nowhere here runs through the model's own, and one with edits that the one call does not know goes
        layer by layer. Where many rows or a long prompt go layer by layer, the others go with them: a matmul of their own would read
        all weights once more."""
        sites = batch.mix.groups.keys() - self.sites
        beyond = batch.members & {m for site in sites for group in batch.mix.groups[site] for m in group.members}
        here = batch.members - beyond
        slow = here
        if self.stack is not None and not self._many(batch, here):
            slow = here & self._edits(self.stack, batch.mix).unknown if here != {BASE} else frozenset()
        found = {Way.ONE_CALL: here - slow, Way.LAYER_BY_LAYER: slow, Way.MODEL: beyond}
        return {way: members for way, members in found.items() if members}

    def _many(self, batch: Batch, members: frozenset[int]) -> bool:
        """Whether these members bring too many rows for the one call, or one of them does, or one sequence."""
        rows, runs = batch.rows(batch.mix.members), batch.plan.runs
        long = {s.slot for s in rows.by_row[1]} if rows else set[int]()
        long |= {batch.member_T[r.start] for r in runs if r.queries >= LONG}
        total = batch.total if members == batch.members else len(batch.index(members))
        return total > FEW_ROWS or not members.isdisjoint(long)

    def _edits(self, stack: Stack, mix: Mix) -> StackEdits:
        """What the one call can do of a mix."""
        if stack not in mix.tables:
            mix.tables[stack] = _stack_edits(self, mix)
        return mix.tables[stack]

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states after the final norm, [T, H], of a batch whose `ways` are one; keys and values go into the batch's cache."""
        (way,) = self.ways(batch)
        assert way is not Way.MODEL
        cache, plan = batch.plan.cache, batch.plan
        assert cache is not None and plan.write_T is not None
        x_TH = self.hosted.embed(batch).contiguous()
        cos_TD, sin_TD = (p[0].contiguous() for p in self.hosted.body.rotary_emb(x_TH[None], position_ids=batch.position_T[None]))
        paging, long = _paging(plan, cache)
        if way is Way.ONE_CALL:
            assert self.stack is not None
            edited = batch.rows(batch.mix.members)
            edits = (None, None) if edited is None else (edited.by_row[0], self._edits(self.stack, batch.mix).table)
            return self.stack(x_TH, (cos_TD, sin_TD), (cache.keys, cache.values), plan.write_T, paging, *edits)
        y_TH: Tensor | None = None
        for layer in self.layers:
            h_TH = self._normed(layer.norm_names[0], x_TH, y_TH, layer.input_norm, batch)
            qkv_T = layer.qkv(h_TH, batch)
            pools = cache.keys[layer.index], cache.values[layer.index]
            native_inference.rotate_and_write(qkv_T, self.heads, cos_TD, sin_TD, layer.head_norms, self.eps, pools, plan.write_T)
            a_TH = native_inference.attend(qkv_T, self.heads, pools, paging, layer.scaling, layer.window)
            for rows, layout in long:
                self._attend_long(a_TH, qkv_T, pools, rows, layout, layer)
            h_TH = self._normed(layer.norm_names[1], x_TH, layer.o(a_TH, batch), layer.mlp_norm, batch)
            y_TH = layer.mlp(h_TH, batch)
        return self._normed(self.norm_name, x_TH, y_TH, self.norm, batch)

    def _normed(self, name: str, x_TH: Tensor, y_TH: Tensor | None, weight_H: Tensor, batch: Batch) -> Tensor:
        """x += y in place; the norm of x, with the batch's edits of this norm."""
        h_TH = native_inference.add_rms_norm(x_TH, y_TH, weight_H, self.eps)
        if name not in batch.mix.groups:
            return h_TH
        return self.hosted.edited(name, x_TH, batch, _known(x_TH, h_TH, partial(ops.rms_norm, weight_H=weight_H, eps=self.eps)))

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


def _stack_edits(path: DecodePath, mix: Mix) -> StackEdits:
    """The mix's edits at every place, and who has one of another kind, or at another place."""
    places, known = list[list[Edit]](), set[tuple[str, int]]()
    for layer in path.layers:
        for edits, done in layer.edits(mix):
            places.append(edits)
            known |= done
    known |= {(path.hosted.spec.head, m) for m in mix.members}  # which comes after the call
    unknown = {m for site, groups in mix.groups.items() for group in groups for m in group.members if (site, m) not in known}
    return StackEdits(EditTable(places), frozenset(unknown))


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
        here = {n: [g for g in batch.mix.groups.get(n, ()) if batch.rows(g.members) is not None] for n in self.names}
        lora = self._joined(x_TI, batch, [g for groups in here.values() for g in groups])
        if lora is not None:  # it touches rows that nothing else touches here, and goes after what may compute these again
            here = {n: [g for g in groups if g.kernel is not ops.lora] for n, groups in here.items()}
        if len(self.names) == 1 and here[self.names[0]]:
            y_TO = self.hosted.edited(self.names[0], x_TI, batch, self.plain, here[self.names[0]])
        else:
            y_TO = self.plain(x_TI)
            for name, weight, bias, (a, b) in zip(self.names, self.weights, self.biases, self.parts, strict=True):
                if here[name]:
                    part = y_TO[:, a:b]
                    edited = self.hosted.edited(name, x_TI, batch, _known(x_TI, part, partial(weight.matmul, bias_O=bias)), here[name])
                    if edited.data_ptr() != part.data_ptr():
                        part.copy_(edited)
        if lora is not None:
            lora(y_TO)
        return y_TO

    def lora_parts(self, mix: Mix) -> native_inference.LoraParts | None:
        """The mix's factors of LoRA at all of these modules."""
        return mix.lora_parts(self.names, [a for a, _ in self.parts], ops.lora)

    def edits(self, mix: Mix) -> tuple[list[Edit], set[tuple[str, int]]]:
        """What the one call can do of the mix at these modules, and whose edits at which module these are."""
        lora, outputs = self.lora_parts(mix), self.parts[-1][1]
        found, done = [Edit("lora", 0, outputs, lora)] if lora else [], set[tuple[str, int]]()
        for name, (a, b) in zip(self.names, self.parts, strict=True):
            for group in mix.groups.get(name, ()):
                edit = _edit(group, a, b - a, len(mix.adapters), own_input=len(self.names) == 1)
                found += [edit] if edit else []
                done |= {(name, m) for m in group.members if edit or group.kernel is ops.lora}
        return found, done

    def _joined(self, x_TI: Tensor, batch: Batch, groups: Sequence[Group]) -> Callable[[Tensor], None] | None:
        """Adds LoRA at all of these modules in one pass over the rows; None where there is none, or a run of rows is better off as
        matmuls."""
        members = {m for g in groups if g.kernel is ops.lora for m in g.members}
        rows, parts = batch.rows(batch.mix.members), self.lora_parts(batch.mix) if members else None
        if rows is None or parts is None:
            return None
        slot_T, long = rows.by_row
        long = tuple(span for span in long if span.slot in members)
        if long and not native_inference.runs_on_tiles(x_TI):
            return None

        def add(y_TO: Tensor) -> None:
            if slot_T is not None:
                native_inference.lora(x_TI, y_TO, slot_T, parts)
            for span in long:
                slots = torch.full((span.stop - span.start,), span.slot, dtype=torch.int32)
                native_inference.lora(x_TI[span.start : span.stop], y_TO[span.start : span.stop], slots, parts)

        return add


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
        self.norm_names = (f"{at}.input_layernorm", f"{at}.post_attention_layernorm")
        self.input_norm, self.mlp_norm = norm_weight(layer.input_layernorm), norm_weight(layer.post_attention_layernorm)
        self.head_norms = (norm_weight(attn.q_norm), norm_weight(attn.k_norm)) if hasattr(attn, "q_norm") else None
        self.mlp_name = f"{at}.mlp"
        self.qkv = _Projection(hosted, [f"{at}.self_attn.{p}_proj" for p in "qkv"], packs)
        self.o = _Projection(hosted, [f"{at}.self_attn.o_proj"], packs)
        self.gate_up = _Projection(hosted, [f"{at}.mlp.{p}_proj" for p in ("gate", "up")], packs)
        self.down = _Projection(hosted, [f"{at}.mlp.down_proj"], packs)
        self.projections = (self.qkv, self.o, self.gate_up, self.down)
        self.sites = [n for p in self.projections for n in p.names] + [self.mlp_name]

    def edits(self, mix: Mix) -> Iterator[tuple[list[Edit], set[tuple[str, int]]]]:
        """What the one call can do of the mix at each place, and whose edits at which module these are."""
        for projection in self.projections:
            yield projection.edits(mix)
        width, around_mlp = self.down.parts[-1][1], mix.groups.get(self.mlp_name, ())
        each = [(g, _edit(g, 0, width, len(mix.adapters), own_input=True)) for g in around_mlp]
        yield [e for _, e in each if e], {(self.mlp_name, m) for g, e in each if e for m in g.members}

    def mlp(self, h_TH: Tensor, batch: Batch) -> Tensor:
        inside = lambda x: self.down(native_inference.swiglu(self.gate_up(x, batch)), batch)  # noqa: E731
        return self.hosted.edited(self.mlp_name, h_TH, batch, inside) if self.mlp_name in batch.mix.groups else inside(h_TH)
