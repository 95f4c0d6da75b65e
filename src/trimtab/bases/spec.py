"""What a method may know of a base: a `Spec` says where embedding, layers, attention, MLPs, norms and head are, and their sizes.

`structure.py` reads it off a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from trimtab.errors import BaseError

Kind = Literal["linear", "conv1d", "embedding", "norm", "experts"]


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
    vectors: how many vectors of one token it acts on, each by itself: the number of heads for a norm of queries or keys, else 1; 0 for a
    module that is not run once with each token's row (`forward/proof.py` finds these), where no adapter can act.
    """

    name: str
    kind: Kind
    in_features: int
    out_features: int
    layer: int | None
    parameters: Mapping[str, tuple[int, ...]]
    vectors: int = 1


@dataclass(frozen=True)
class Layer:
    """One decoder layer: names of its parts as in `named_modules()`, and its sizes.

    attention_output: the projection whose result is the attention's. intermediate_size: features that the MLP's down-projection
    reads. gated: whether the matrices before it make two of them. window: tokens on which its attention looks back, its own
    included; None: all.
    """

    name: str
    attention: str
    attention_output: str
    mlp: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    gated: bool
    window: int | None


@dataclass(frozen=True)
class Spec:
    """What a method may know of a base model. Sizes are counts of features, heads, rows; no weights, no devices.

    body: the part of the causal LM that gives hidden states. layer_list: the list of its layers. logit_scale: what logits are multiplied
    with before the soft cap. writes_results: whether the model's code writes into what its modules give.
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
    writes_results: bool
    num_parameters: int

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of every linear layer where an adapter can act but the output head: peft's "all-linear". Gates, which give one number, are
        left out: a low rank saves nothing there."""
        found = (m for m in self.modules.values() if m.kind in ("linear", "conv1d") and m.name != self.head)
        return tuple(m.name for m in found if m.vectors and min(m.in_features, m.out_features) > 1)

    @cached_property
    def attention_outputs(self) -> tuple[str, ...]:
        return tuple(layer.attention_output for layer in self.layers)

    @cached_property
    def mlps(self) -> tuple[str, ...]:
        return tuple(layer.mlp for layer in self.layers)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def num_heads(self) -> int:
        return self._of_every_layer("num_heads")

    @cached_property
    def num_kv_heads(self) -> int:
        return self._of_every_layer("num_kv_heads")

    @cached_property
    def head_dim(self) -> int:
        return self._of_every_layer("head_dim")

    @property
    def kv_width(self) -> int:
        """Features of one layer's keys (or values) for one token: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    def _of_every_layer(self, size: str) -> int:
        """A size that all layers share. BaseError where they do not: the KV cache and stored prefixes have one shape for all layers."""
        found = sorted({getattr(layer, size) for layer in self.layers})
        if len(found) > 1:
            raise BaseError(
                f"the layers of this {self.model_type} base differ in {size}: {', '.join(map(str, found))}",
                fix="use a base whose layers all keep keys and values of one shape.",
            )
        return found[0]
