"""How much memory the activations of a step take, told from shapes alone: what the layers keep for the backward, and what passes through.

The formulas follow `ops`, `fast` and `attention`, and a test compares them with what autograd keeps of a real forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trimtab.bases.spec import Module, Spec
from trimtab.decode.generate import MAX_ROWS
from trimtab.forward.decode_path import FAMILIES
from trimtab.forward.rowwise import LLAMA_LIKE
from trimtab.methods.base import Site
from trimtab.ops import QUERY_BLOCK, loss_rows, native

CPU = torch.device("cpu")
FUSED = frozenset(name.lower() for name in LLAMA_LIKE)
"""Model types whose RMSNorm and gated MLP run as `ops.rms_norm` and `ops.swiglu`."""


def activation_bytes(
    spec: Spec,
    sites: Sequence[Site],
    dtype: torch.dtype,
    tokens: int,
    length: int,
    *,
    virtual: int = 0,
    activation_checkpointing: bool = False,
    device: torch.device = CPU,
) -> int:
    """Bytes of activations at the peak of a step of `tokens` rows in sequences of `length`: what the layers keep (`kept_bytes`), the
    supervised rows' hidden states and their gradient, 2·b·H a row (all rows taken as supervised), and the largest of three passing things:

        head       `loss_rows` rows of logits, twice in fp32 (logsumexp makes a copy), a third time where they are soft-capped
        attention  in one layer's backward, a block of queries: the probabilities, their gradient and the scores' (and the slope of a cap)
        MLP        in one layer's backward, the gradients of 3·M + 2·H features a row

    With activation checkpointing a layer's activations are there during its own backward only, so never beside the logits.

    An allocator's slack is not counted: on a CPU up to 17% more, without a compiler (`ops.reuse`) 20 to 70%.
    """
    b, capped = dtype.itemsize, spec.final_softcap is not None
    head = min(tokens, loss_rows(spec.vocab_size, device)) * spec.vocab_size * (12 if capped else 8)
    attention = tokens * max(layer.num_heads for layer in spec.layers) * min(length, QUERY_BLOCK, tokens) * b * (4 if capped else 3)
    mlp = tokens * b * (3 * _widest_mlp(spec) + 2 * spec.hidden_size)
    held, again = _held_and_again(spec, sites, dtype, tokens, length, virtual, activation_checkpointing)
    return held + tokens * 2 * b * spec.hidden_size + max(head, again + max(attention, mlp))


def kept_bytes(
    spec: Spec,
    sites: Sequence[Site],
    dtype: torch.dtype,
    tokens: int,
    length: int,
    *,
    virtual: int = 0,
    activation_checkpointing: bool = False,
) -> int:
    """Bytes that the layers keep for the backward, at most at a time. For each row, in each layer from the first that an adapter touches:

        norms      b·width each for a LayerNorm, and for a fused RMSNorm with 4 for each vector that it normalises; 4·width for an RMSNorm
                   of the model's own, which computes in fp32
        attention  b·(A + 2·K): queries, keys and values as gathered; scores are formed again in the backward, and rotation keeps nothing.
                   Keys and values also for `virtual` tokens before each sequence
        MLP        b·2·M where fused (gate and up), b·3·M where gated by the model's own (gate, its activation, up), b·4·M where not
                   (GPT-2's tanh-GELU)
        edits      b·width of what their tensors must remember: see `_remembered`

    b bytes of dtype, A heads·head_dim, K kv_heads·head_dim, M the MLP's inner width. A frozen linear keeps nothing. Sequences are taken as
    equally long, so nothing is padded; the first layer is counted whole, though an adapter behind its attention needs less of it.

    With activation checkpointing it is b·H a row for each of these layers' inputs, and all of the above for the dearest of them alone.
    """
    return sum(_held_and_again(spec, sites, dtype, tokens, length, virtual, activation_checkpointing))


def _held_and_again(
    spec: Spec, sites: Sequence[Site], dtype: torch.dtype, tokens: int, length: int, virtual: int, activation_checkpointing: bool
) -> tuple[int, int]:
    """(bytes held from the forward on, bytes of the layer that is computed again at the time)."""
    first = min((_layer(spec, s.name) for s in sites), default=0)
    live, at = range(first, spec.num_layers), {s.name: _layer(spec, s.name) for s in sites}
    inside, beside = list[Site](), list[Site]()
    for s in sites:
        (inside if s.name.startswith(spec.layer_list + ".") else beside).append(s)
    outside = tokens * dtype.itemsize * _remembered(spec, beside)
    if not activation_checkpointing:
        return outside + _kept_by(spec, inside, live, dtype, tokens, length, virtual), 0
    again = [_kept_by(spec, [s for s in inside if at[s.name] == i], range(i, i + 1), dtype, tokens, length, virtual) for i in live]
    return outside + len(live) * tokens * dtype.itemsize * spec.hidden_size, max(again, default=0)


def _kept_by(spec: Spec, sites: Sequence[Site], layers: range, dtype: torch.dtype, tokens: int, length: int, virtual: int) -> int:
    """What these layers keep, their edits at `sites` included: see `kept_bytes`."""
    b, fused = dtype.itemsize, spec.model_type in FUSED
    norms = [m for m in spec.modules.values() if m.kind == "norm" and m.layer in layers]
    norm_bytes = sum(_norm_bytes(m, b, fused) for m in norms)
    own = [spec.layers[i] for i in layers]
    mlps = sum(((2 if fused else 3) if layer.gated else 4) * layer.intermediate_size for layer in own)
    per_row = norm_bytes + b * (sum(layer.num_heads * layer.head_dim for layer in own) + mlps + _remembered(spec, sites))
    kv_width = sum(layer.num_kv_heads * layer.head_dim for layer in own)
    return tokens * per_row + 2 * b * kv_width * (tokens + virtual * math.ceil(tokens / length))


def forward_bytes(spec: Spec, b: int, tokens: int, length: int) -> int:
    """Work space of a forward that keeps nothing: hidden states, one MLP or one block of attention, a row of logits for each sequence."""
    sequences = math.ceil(tokens / length)
    seen = 2 * min(length, QUERY_BLOCK, tokens)
    attention = tokens * b * max(layer.num_heads * (seen + 2 * layer.head_dim) for layer in spec.layers)
    return tokens * 2 * b * spec.hidden_size + max(tokens * b * 3 * _widest_mlp(spec), attention) + sequences * spec.vocab_size * 4


def comparison_bytes(spec: Spec) -> int:
    """The decode path's comparison before its first use (`forward.decode_path_check`), beside all else: two fp32 stand-ins and one in the
    base's dtype share the memory of the largest matrix. Measured at 1,024 to 3,072 features: 12 bytes for each of its numbers, and up to 40
    MB of smaller matrices, which are not counted."""
    if spec.model_type not in FAMILIES:
        return 0
    return 12 * max(
        (m.in_features * m.out_features for m in spec.modules.values() if m.kind == "linear" and m.layer is not None), default=0
    )


def judging_bytes(spec: Spec, dtype: torch.dtype, tokens: int, length: int, slots: int, capacity: int, device: torch.device) -> int:
    """Bytes of validation and scoring at their peak, beside base and adapters, whichever is more: a forward of `tokens` rows that keeps
    nothing, with `loss_rows` rows of logits and their copy in fp32; or the KV cache of `slots` answers of at most `capacity` tokens, with
    the forwards of their prompts and their logits.
    """
    b = dtype.itemsize
    losses = forward_bytes(spec, b, tokens, length) + min(tokens, loss_rows(spec.vocab_size, device)) * spec.vocab_size * (8 + b)
    if not slots:
        return losses
    cache = slots * capacity * spec.kv_numbers * b
    rows = min(slots * capacity, MAX_ROWS + slots)
    return max(losses, cache + forward_bytes(spec, b, rows, capacity) + slots * spec.vocab_size * (4 + b))


def packed_sizes(spec: Spec, dtype: torch.dtype) -> list[int]:
    """Bytes of each tensor that inference on this machine's CPU copies, those of projections and head; none where it copies none (see
    `forward.decode_path`)."""
    if dtype != torch.bfloat16 or spec.model_type not in FAMILIES or not native.copies_weights():
        return []
    return [
        math.prod(shape) * dtype.itemsize
        for m in spec.modules.values()
        if m.kind == "linear" and m.bits is None
        for shape in m.parameters.values()
    ]


def _widest_mlp(spec: Spec) -> int:
    return max(layer.intermediate_size for layer in spec.layers)


def _norm_bytes(module: Module, b: int, fused: bool) -> int:
    """Bytes that a norm keeps of one row."""
    if "bias" in module.parameters:
        return module.vectors * module.out_features * b
    return module.vectors * (module.out_features * b + 4 if fused else module.out_features * 4)


def _layer(spec: Spec, name: str) -> int:
    """The first layer whose activations an adapter at `name` needs: its own, 0 before all (prefixes too), the number of layers behind."""
    prefix = spec.layer_list + "."
    if name.startswith(prefix):
        return int(name.removeprefix(prefix).partition(".")[0])
    module = spec.modules.get(name)
    return 0 if module is None or module.kind == "embedding" else spec.num_layers


def _remembered(spec: Spec, sites: Sequence[Site]) -> int:
    """Features of one row that the edits keep, told from shapes alone: a matrix [out, in] keeps its input, a scale (a vector, or a matrix
    with a side of 1) what it scales, a bias nothing. Modules of a block that read the same input (q, k, v; gate, up) keep it once. Prefixes
    keep nothing here."""
    total, inputs = 0, set()
    for site in (s for s in sites if s.name):
        module = spec.modules.get(site.name)
        if module is not None and module.kind == "embedding":
            total += site.rank  # token ids weigh nothing
            continue
        if module is not None and module.kind == "norm" and "bias" not in module.parameters and spec.model_type in FUSED:
            continue  # the fused norm's weight gets its gradient from what the norm keeps anyway
        for name, shape in site.shapes.items():
            if name.rpartition(".")[2] == "bias":
                continue
            if len(shape) == 1 or (1 in shape and not site.rank and not site.saved):
                total += max(shape) * (module.vectors if module is not None else 1)
                continue
            width = shape[0] if site.saved and module is not None and module.kind == "conv1d" else shape[-1]
            if module is None or width != module.in_features:
                total += width
            elif (key := (site.name.rpartition(".")[0], site.name in spec.attention_outputs, width)) not in inputs:
                inputs.add(key)
                total += width
    return total
