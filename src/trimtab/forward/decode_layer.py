"""One layer of the decode path: its weights, and what adapters do at its modules.

Projections that share an input are one matmul. The same edits are told to the one native call of all layers (`ops.stack`), as far as that
knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.bases.weights import Weight, norm_weight
from trimtab.forward.batch import Batch
from trimtab.forward.hosted import Hosted
from trimtab.forward.packs import Group, Mix
from trimtab.memory import release_mapped
from trimtab.methods.base import Rows
from trimtab.ops import native, native_inference, native_quantized
from trimtab.ops.native_quantized import FEW_ROWS, Projection
from trimtab.ops.stack import Edit

Linear = Callable[[Tensor], Tensor]


class Layer:
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

    def edits(self, mix: Mix) -> Iterator[tuple[list[Edit], list[Group]]]:
        """What the one call can do of the mix at each place, and whose edits these are."""
        for projection in self.projections:
            yield projection.edits(mix)
        width, around_mlp = self.down.parts[-1][1], mix.groups.get(self.mlp_name, ())
        each = [(g, _edit(g, 0, width, len(mix.adapters), own_input=True)) for g in around_mlp]
        yield [e for _, e in each if e], [g for g, e in each if e]

    def mlp(self, h_TH: Tensor, batch: Batch) -> Tensor:
        inside = lambda x: self.down(native_inference.swiglu(self.gate_up(x, batch)), batch)  # noqa: E731
        return self.hosted.edited(self.mlp_name, h_TH, batch, inside) if self.mlp_name in batch.mix.groups else inside(h_TH)


class _Projection:
    """Linear layers that share an input, as one matmul; edits of each act on its part of the result."""

    def __init__(self, hosted: Hosted, names: Sequence[str], packs: bool):
        self.hosted, self.names = hosted, tuple(names)
        self.weights = [hosted.weights.of[n] for n in names]
        self.biases: list[Tensor | None] = [hosted.model.get_submodule(n).bias for n in names]
        self.plain, self.packed = linear(self.weights, self.biases, packs)
        stops = np.cumsum([w.shape[0] for w in self.weights]).tolist()
        self.parts = list(zip([0, *stops[:-1]], stops, strict=True))
        self._starts, self._widths = (np.array(n, dtype=np.int64) for n in ([a for a, _ in self.parts], [b - a for a, b in self.parts]))

    def __call__(self, x_TI: Tensor, batch: Batch) -> Tensor:
        groups, rows = batch.mix.groups, batch.rows(batch.mix.members)
        if rows is None or not any(name in groups for name in self.names):
            return self.plain(x_TI)
        here = [[g for g in groups.get(name, ()) if batch.rows(g.members) is not None] for name in self.names]
        lora = self._joined(x_TI, rows, here, batch.mix)
        if lora is not None:  # it touches rows that nothing else touches here, and goes after what may compute these again
            here = [[g for g in found if g.kernel is not ops.lora] for found in here]
        if len(self.names) == 1 and here[0]:
            y_TO = self.hosted.edited(self.names[0], x_TI, batch, self.plain, here[0])
        else:
            y_TO = self.plain(x_TI)
            for name, found, weight, bias, (a, b) in zip(self.names, here, self.weights, self.biases, self.parts, strict=True):
                if found:
                    part = y_TO[:, a:b]
                    edited = self.hosted.edited(name, x_TI, batch, known(x_TI, part, partial(weight.matmul, bias_O=bias)), found)
                    if edited.data_ptr() != part.data_ptr():
                        part.copy_(edited)
        if lora is not None:
            _add_lora(x_TI, y_TO, rows, lora)
        return y_TO

    def lora_parts(self, mix: Mix) -> native_inference.LoraParts | None:
        """The mix's factors of LoRA at all of these modules."""
        return mix.lora_parts(self.names, self._starts, self._widths)

    def edits(self, mix: Mix) -> tuple[list[Edit], list[Group]]:
        """What the one call can do of the mix at these modules, and whose edits these are."""
        lora, outputs = self.lora_parts(mix), self.parts[-1][1]
        found, done = [Edit("lora", 0, outputs, lora)] if lora else [], list[Group]()
        for name, (a, b) in zip(self.names, self.parts, strict=True):
            for group in mix.groups.get(name, ()):
                edit = _edit(group, a, b - a, len(mix.adapters), own_input=len(self.names) == 1)
                found += [edit] if edit else []
                done += [group] if edit or group.kernel is ops.lora else []
        return found, done

    def _joined(self, x_TI: Tensor, rows: Rows, here: list[list[Group]], mix: Mix) -> native_inference.LoraParts | None:
        """The factors of LoRA at all of these modules, for one pass over the rows; None where there is none, or where a run of its rows is
        better off as matmuls."""
        if not any(g.kernel is ops.lora for found in here for g in found):
            return None
        long = {span.slot for span in rows.by_row[1]}
        matmuls = long and any(g.kernel is ops.lora and not long.isdisjoint(g.members) for found in here for g in found)
        return None if matmuls and not native_inference.runs_on_tiles(x_TI) else self.lora_parts(mix)


def _add_lora(x_TI: Tensor, y_TO: Tensor, rows: Rows, parts: native_inference.LoraParts) -> None:
    slot_T, long = rows.by_row
    if slot_T is not None:
        native_inference.lora(x_TI, y_TO, slot_T, parts)
    for span in long if native_inference.runs_on_tiles(x_TI) else ():  # else they are of members without LoRA here
        slots = torch.full((span.stop - span.start,), span.slot, dtype=torch.int32)
        native_inference.lora(x_TI[span.start : span.stop], y_TO[span.start : span.stop], slots, parts)


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


def known(x_TI: Tensor, y_TO: Tensor, otherwise: Linear) -> Linear:
    """A linear layer for an edit to call: what it gives for x is known; for another input it is computed."""
    return lambda x: y_TO if x is x_TI else otherwise(x)


def linear(weights: Sequence[Weight], biases: Sequence[Tensor | None], packs: bool) -> tuple[Linear, Projection | None]:
    """Linear layers of one input side by side, and the same as the one call reads them, where it can. packs: they may be copied into the
    layout that the matmul wants. What was copied leaves the process's memory where it is mapped from a file; whatever reads it still finds
    it there."""
    many: Linear = partial(ops.linears, weights=weights, biases=biases)
    if len(weights) == 1:
        many = _fresh_pages(weights[0], biases[0])
    packs = packs and all(w.stored_dense for w in weights)
    reads = native.attends_flat() and all(map(_reads, weights))
    tiles = packs and native.has_tiles() and weights[0].shape[1] % 32 == 0
    if reads and not tiles:
        few = Projection([_as_stored(w) for w in weights], _bias(weights, biases))
        return lambda x: few(x) if len(x) <= FEW_ROWS else many(x), few
    if not packs:
        return many, None
    dense = [w.dense() for w in weights]
    together, bias_O = torch.cat(dense) if len(dense) > 1 else dense[0], _bias(weights, biases)
    tiled = Projection([native_quantized.tiles_of(together)], bias_O) if tiles else None
    packed = None if tiles else torch.ops.mkldnn._reorder_linear_weight(together, 32)
    for w in dense:
        release_mapped(w.data_ptr(), w.nbytes)
    if tiled is not None:
        return lambda x: tiled(x) if len(x) <= FEW_ROWS else many(x), tiled
    # oneDNN's layout is as fast as the original for many rows too, and gives the same bits
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, "none", [], ""), None


def _fresh_pages(weight: Weight, bias_O: Tensor | None) -> Linear:
    """x Wᵀ + b. The logits of many rows are a block that the system gives anew each time."""

    def product(x_TI: Tensor) -> Tensor:
        if x_TI.device.type != "cpu" or len(x_TI) * weight.shape[0] * x_TI.element_size() < native.GIVEN_BACK:
            return weight.matmul(x_TI, bias_O)
        return weight.matmul(x_TI, bias_O, out=native.fresh(len(x_TI), weight.shape[0], x_TI.dtype))

    return product


def _reads(weight: Weight) -> bool:
    """Whether the one call multiplies with this matrix."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return False
    return weight.stored_dense or (weight.packed is not None and native_quantized.reads(weight.packed))


def _as_stored(weight: Weight) -> native_quantized.Quantized:
    return native_quantized.rows_of(weight.dense()) if weight.packed is None else native_quantized.struct(weight.packed)


def _bias(weights: Sequence[Weight], biases: Sequence[Tensor | None]) -> Tensor | None:
    """The biases side by side; None where there is none."""
    if all(b is None for b in biases):
        return None
    return torch.cat([torch.zeros(w.shape[0], dtype=w.dtype) if b is None else b for w, b in zip(weights, biases, strict=True)])
