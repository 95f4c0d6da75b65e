"""What a method may know of a base: a `Spec` says where embedding, layers, attention, MLPs, norms and head are, and their sizes.

`structure.py` reads it off a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["linear", "conv1d", "embedding", "norm", "experts", "router"]


@dataclass(frozen=True)
class Defaults:
    """The modules that LoRA and IA³ take where they are told none, by the last parts of their names. They are those that peft's tables have
    for most families: LoRA takes queries and values, IA³ keys, values and what the MLP's last matrix reads."""

    lora_targets: tuple[str, ...]
    ia3_targets: tuple[str, ...]
    ia3_feedforward: tuple[str, ...]


@dataclass(frozen=True)
class Module:
    """One leaf of the base: `name` as in `named_modules()`, feature counts, the layer it belongs to (None outside the layers).

    kind "experts": a parameter that holds a matrix for each expert; `name` as in `named_parameters()`, its shape under "weight", [experts,
    out, in], or [experts, in, out] as some models keep it; feature counts are those of one expert.
    kind "router": a module that chooses experts for each row, and gives more than the product with its matrix.
    vectors: how many vectors of one token it acts on, each by itself: the number of heads for a norm of queries or keys, else 1; 0 for a
    module that is not run once with each token's row (`forward/proof.py` finds these), where no adapter can act.
    bits: how many bits an entry of its matrix takes, with its scales, where the matrix is packed.
    experts: how many experts a parameter of kind "experts" holds. routes: whether it is a router or its matrix, where a method acts only if
    it is named.
    """

    name: str
    kind: Kind
    in_features: int
    out_features: int
    layer: int | None
    parameters: Mapping[str, tuple[int, ...]]
    vectors: int = 1
    bits: float | None = None
    experts: int = 0
    routes: bool = False


@dataclass(frozen=True)
class Layer:
    """One decoder layer: names of its parts as in `named_modules()`, and its sizes.

    attention_output: the projection whose result is the attention's. mlp: None where its matrices are in no module of their own, or in
    several (beside experts). intermediate_size: features that the last matrix there reads. gated: whether the matrices before it make two
    of them. value_dim: features of a head's values, where head_dim are those of its keys. window: tokens on which its attention looks
    back, its own included; None: all.
    """

    name: str
    attention: str
    attention_output: str
    mlp: str | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    intermediate_size: int
    gated: bool
    window: int | None


@dataclass(frozen=True)
class Spec:
    """What a method may know of a base model. Sizes are counts of features, heads, rows; no weights, no devices.

    body: the part of the causal LM that gives hidden states. layer_list: the list of its layers. logit_scale: what logits are multiplied
    with before the soft cap. layer_embeddings: whether layers have embeddings of tokens of their own. layers_share_kv: whether some layers
    attend to the keys and values of another. writes_results: whether the model's code writes into what its modules give.
    experts_per_token: how many experts a layer's router chooses for a row; 0 where there are none, or where the config does not say it.
    """

    model_type: str
    defaults: Defaults
    body: str
    layer_list: str
    embedding: str
    head: str
    layers: tuple[Layer, ...]
    modules: Mapping[str, Module]
    hidden_size: int
    vocab_size: int
    max_positions: int
    tied_head: bool
    final_softcap: float | None
    logit_scale: float
    layer_embeddings: bool
    layers_share_kv: bool
    writes_results: bool
    num_parameters: int
    experts_per_token: float = 0.0

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of every linear layer where an adapter can act but the output head: peft's "all-linear". Routers of experts are
        left out, and gates, which give one number: a low rank saves nothing there."""
        found = (m for m in self.modules.values() if m.kind in ("linear", "conv1d") and m.name != self.head and not m.routes)
        return tuple(m.name for m in found if m.vectors and min(m.in_features, m.out_features) > 1)

    def idle_parameters(self, rows: int = 1) -> int:
        """Entries of experts that nobody of so many rows is sent to, if each row chooses at random: a row is computed by few of a layer's
        experts, and these alone are read."""
        experts = [m for m in self.modules.values() if m.kind == "experts"] if self.experts_per_token else []
        away = (max(0.0, 1 - self.experts_per_token / m.experts) ** rows * m.experts * m.in_features * m.out_features for m in experts)
        return int(sum(away))

    @property
    def packed_bits(self) -> float | None:
        """Bits of an entry of the packed matrices, None where all are dense."""
        return next((m.bits for m in self.modules.values() if m.bits is not None), None)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all weights: packed ones as they are, others in dtype."""
        packed = [(m.in_features * m.out_features * max(1, m.experts), m.bits) for m in self.modules.values() if m.bits is not None]
        return int(self.num_parameters * dtype.itemsize - sum(n * (dtype.itemsize - bits / 8) for n, bits in packed))

    def packed(self, bits: float | None, kinds: Sequence[Kind] = ("linear", "experts")) -> Spec:
        """The same base with the linear layers of its decoder layers and its experts packed, or those of these kinds; None: dense."""
        routers = tuple(f"{m.name.rpartition('.experts')[0]}." for m in self.modules.values() if m.kind == "experts")
        chosen = {
            n: replace(m, bits=bits)
            for n, m in self.modules.items()
            if m.kind in kinds and m.layer is not None and not m.routes and not (routers and f"{n.rpartition('.')[0]}." in routers)
        }
        return replace(self, modules={**self.modules, **chosen})

    @cached_property
    def attention_outputs(self) -> tuple[str, ...]:
        return tuple(layer.attention_output for layer in self.layers)

    @cached_property
    def mlps(self) -> tuple[str, ...]:
        return tuple(layer.mlp for layer in self.layers if layer.mlp is not None)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def kv_shape(self) -> tuple[int, int]:
        """(heads, features of each) of what a KV cache keeps of one token in a layer, keys or values. Where layers differ, or keys from
        values: one head with room for the widest."""
        found = {(layer.num_kv_heads, d) for layer in self.layers for d in (layer.head_dim, layer.value_dim)}
        return found.pop() if len(found) == 1 else (1, max(heads * dim for heads, dim in found))

    @property
    def kv_width(self) -> int:
        """Features of one layer's keys (or values) for one token in a KV cache."""
        return math.prod(self.kv_shape)

    @property
    def kv_numbers(self) -> int:
        """What a KV cache keeps of one token, in all layers."""
        return 2 * self.num_layers * self.kv_width

    @property
    def layers_alike(self) -> bool:
        """Whether keys have one shape in all layers, and values one."""
        return len({(layer.num_kv_heads, layer.head_dim, layer.value_dim) for layer in self.layers}) == 1

    @property
    def heads_alike(self) -> bool:
        """Whether keys and values have one shape in all layers, as stored prefixes have."""
        return self.layers_alike and self.layers[0].head_dim == self.layers[0].value_dim
