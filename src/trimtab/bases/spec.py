"""Where attention, MLP, projections, embedding and KV shape live in a model family.

A `Spec` is read off a `transformers` causal LM (weights not needed: the meta device will do) and is all that a method may know of a base.
Adding a family is one `Family` row. A family without a row is refused by name: nothing is guessed from module names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import BaseError, nearest

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["linear", "conv1d", "embedding", "norm"]


@dataclass(frozen=True)
class Family:
    """Module names of one family, relative to the causal LM (`body`, `layers`, `embedding`, `head`) or to one layer (the rest)."""

    body: str = "model"
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    attention_output: str = "self_attn.o_proj"
    mlp: str = "mlp"
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    ia3_targets: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    ia3_feedforward: tuple[str, ...] = ("down_proj",)
    learned_positions: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "phi3": Family(lora_targets=("qkv_proj",), ia3_targets=("qkv_proj", "down_proj")),
    "gpt2": Family(
        body="transformer",
        layers="transformer.h",
        embedding="transformer.wte",
        attention_output="attn.c_proj",
        lora_targets=("c_attn",),
        ia3_targets=("c_attn", "mlp.c_proj"),
        ia3_feedforward=("mlp.c_proj",),
        learned_positions=True,
    ),
}


@dataclass(frozen=True)
class Module:
    """One row-wise leaf of the base: `name` as in `named_modules()`, feature counts, the layer it belongs to (None outside the layers)."""

    name: str
    kind: Kind
    in_features: int
    out_features: int
    layer: int | None
    parameters: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Spec:
    """What a method may know of a base model. Sizes are counts of features, heads, rows; no weights, no devices."""

    model_type: str
    family: Family
    modules: Mapping[str, Module]
    attention_outputs: tuple[str, ...]
    mlps: tuple[str, ...]
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_head: bool
    final_softcap: float | None
    num_parameters: int

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of every linear layer but the output head: peft's "all-linear"."""
        return tuple(m.name for m in self.modules.values() if m.kind in ("linear", "conv1d") and m.name != self.family.head)

    @property
    def kv_width(self) -> int:
        """Features of one layer's keys (or values) for one token: num_kv_heads * head_dim."""
        return self.num_kv_heads * self.head_dim


def read_spec(model: Any) -> Spec:
    """Read the spec off a `transformers` causal LM. BaseError where the family, or something that its config asks for, is not supported."""
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise BaseError(
            f"model family {config.model_type!r} is not supported{nearest(config.model_type, FAMILIES)}",
            fix=f"use one of: {', '.join(FAMILIES)}; or add a Family row to trimtab/bases/spec.py",
        )
    _refuse_unsupported(config)
    layers = model.get_submodule(family.layers)
    heads, hidden = config.num_attention_heads, config.hidden_size
    return Spec(
        model_type=config.model_type,
        family=family,
        modules={m.name: m for name, mod in model.named_modules() if (m := _leaf(name, mod, family.layers)) is not None},
        attention_outputs=tuple(f"{family.layers}.{i}.{family.attention_output}" for i in range(len(layers))),
        mlps=tuple(f"{family.layers}.{i}.{family.mlp}" for i in range(len(layers))),
        hidden_size=hidden,
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        tied_head=bool(config.tie_word_embeddings),
        final_softcap=getattr(config, "final_logit_softcapping", None),
        num_parameters=sum(p.numel() for p in model.parameters()),
    )


def _refuse_unsupported(config: Any) -> None:
    """Refuse by name whatever would make one row's result depend on other rows, or that the attention function does not compute exactly."""
    problems = []
    if getattr(config, "use_bidirectional_attention", False):
        problems.append("use_bidirectional_attention is set: only causal attention is supported")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(v for v in ropes.values() if isinstance(v, dict))]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            problems.append(f"rope_type {rope['rope_type']!r} depends on the longest sequence of the batch, so batches could not be mixed")
    if getattr(config, "add_cross_attention", False):
        problems.append("add_cross_attention is set: only decoder-only models are supported")
    if getattr(config, "quantization_config", None):
        problems.append("quantization_config is set: load the base unquantised (a .gguf file is converted on loading)")
    if problems:
        raise BaseError(f"this {config.model_type} model needs what trimtab does not support", problems=problems)


def _leaf(name: str, module: nn.Module, layers: str) -> Module | None:
    from torch import nn

    kind = type(module).__name__
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
    if isinstance(module, nn.Linear):
        leaf: tuple[Kind, int, int] = ("linear", module.in_features, module.out_features)
    elif kind == "Conv1D":
        leaf = ("conv1d", shapes["weight"][0], shapes["weight"][1])  # transformers' Conv1D keeps its weight as (in, out)
    elif isinstance(module, nn.Embedding):
        leaf = ("embedding", module.num_embeddings, module.embedding_dim)
    elif kind.endswith("Norm") and list(shapes)[:1] == ["weight"]:
        leaf = ("norm", shapes["weight"][0], shapes["weight"][0])
    else:
        return None
    prefix = layers + "."
    layer = int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None
    return Module(name, *leaf, layer, shapes)
