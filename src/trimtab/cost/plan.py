"""What a method costs on a base, computed from the architecture alone: parameters, file sizes, memory. No weights are read or allocated.

    plan(read_architecture("llama-2-7b"), LoraConfig(r=16, target_modules=["q_proj", "v_proj"])).trainable    # 8_388_608

Parameters and file sizes are exact: the sum over `method.sites(spec)`, which is what a real attach makes. Memory is an estimate: a sum of
the terms that `plan` and `activation_bytes` spell out. Sizes are bytes; MB and GB, where shown, are 10⁶ and 10⁹.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from trimtab.bases import resolve_dtype
from trimtab.bases.shapes import Architecture
from trimtab.bases.spec import Spec
from trimtab.cost.activations import CPU, activation_bytes, forward_bytes
from trimtab.cost.serving import resident_bytes, serving_memory
from trimtab.errors import ConfigError, nearest
from trimtab.methods import FullConfig, Head, Method
from trimtab.methods.base import Site
from trimtab.store.tensors import expected
from trimtab.train.optimizers import state_bytes
from trimtab.train.options import OptimizerName


@dataclass(frozen=True)
class CostPlan:
    """One method on one base. `variants` adapters train, or are served, together; all else is as the names say.

    activation_checkpointing: whether training recomputes each layer in the backward. optimizer: what steps.
    Of one adapter: trainable (numbers), adapter_file_bytes (fp32, as saved), adapter_file_bytes_bf16.
    Of training all variants: base_bytes, weight_bytes (adapters in fp32 and packed), gradient_bytes, optimizer_bytes, activation_bytes;
    their sum is train_peak_bytes. Of serving them all: serve_adapter_bytes, serve_kv_bytes (of batch_tokens tokens); serve_peak_bytes also
    holds the base and work space.
    full: the same of full fine-tuning, None where the method is that.
    """

    base: str
    method: str
    hyperparameters: Mapping[str, Any]
    dtype: str
    batch_tokens: int
    sequence_length: int
    variants: int
    activation_checkpointing: bool
    optimizer: str
    base_parameters: int
    trainable: int
    adapter_file_bytes: int
    adapter_file_bytes_bf16: int
    base_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    train_peak_bytes: int
    serve_adapter_bytes: int
    serve_kv_bytes: int
    serve_peak_bytes: int
    full: CostPlan | None = None

    @property
    def percent(self) -> float:
        """Trainable parameters, % of the base's."""
        return 100.0 * self.trainable / self.base_parameters

    def row(self) -> dict[str, Any]:
        """What a table of plans shows, as plain numbers: method, trainable, percent, and bytes."""
        shown = ("method", "trainable", "percent", "adapter_file_bytes", "optimizer_bytes", "train_peak_bytes", "serve_peak_bytes")
        return {name: getattr(self, name) for name in shown}

    def to_dict(self) -> dict[str, Any]:
        """All fields and percent, as plain JSON values."""
        return dataclasses.asdict(self) | {"percent": self.percent, "full": self.full.to_dict() if self.full else None}


def rows(plans: Sequence[CostPlan]) -> list[dict[str, Any]]:
    """One `CostPlan.row` for each plan, in their order."""
    return [p.row() for p in plans]


def plan(
    architecture: Architecture,
    method: Method,
    *,
    dtype: str = "bfloat16",
    batch_tokens: int = 4096,
    sequence_length: int = 512,
    variants: int = 1,
    activation_checkpointing: bool = False,
    device: torch.device = CPU,
    optimizer: str = "adamw",
    head: Head | None = None,
) -> CostPlan:
    """What `method` costs on `architecture`. dtype: the base's, or "auto": as stored. batch_tokens: rows of a step, all variants together.
    activation_checkpointing, optimizer: as in a run file. device: where it trains. head: the adapter's own, if it has one.

    With P trainable parameters of an adapter, N of the base, b bytes of dtype, n variants:

        adapter:  base N·b,  weights n·P·(4 + b),  gradients n·4·P,  optimizer n·8·P,  activations: see `activation_bytes`
        full:     base N·b,  gradients N·b,  optimizer N·8, and N·4 more for an fp32 master copy where b < 4; n train one after another

    The optimizer's are AdamW's; `state_bytes` knows the others'. Packed matrices take their own bytes; full fine-tuning needs dense ones.

    Serving: base + n adapters as they lie in memory (b for each number; a prefix or prompt as keys and values) + keys and values of
    batch_tokens tokens + work space of a forward of batch_tokens rows; n fully fine-tuned models share no base. A base that is stored in
    another dtype than it computes in lies in memory twice where decoding packs it (`cost.serving`). ConfigError where the method does not
    fit the base, or a number is out of range.
    """
    _check(architecture.spec, optimizer, batch_tokens=batch_tokens, sequence_length=sequence_length, variants=variants)
    resolved = resolve_dtype(dtype, torch.device("cpu"))
    kept = resolved if isinstance(resolved, torch.dtype) else architecture.dtype
    work = _Work(
        dtype=kept,
        converted=kept != architecture.dtype,
        tokens=batch_tokens,
        length=sequence_length,
        variants=variants,
        activation_checkpointing=activation_checkpointing,
        device=device,
        optimizer=optimizer,
    )
    if isinstance(method, FullConfig):
        return _cost_plan(architecture, method, work, _costs_full(architecture.spec, work))
    heads = [head.site(architecture.spec)] if head else []
    full = _cost_plan(architecture, FullConfig(), work, _costs_full(architecture.spec, work))
    return _cost_plan(architecture, method, work, _costs_adapter(architecture.spec, method, heads, work), full)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is planned for. converted: whether the base is stored in another dtype than `dtype`. tokens: batch_tokens. length:
    sequence_length. All else as in `plan`."""

    dtype: torch.dtype
    converted: bool
    tokens: int
    length: int
    variants: int
    activation_checkpointing: bool
    device: torch.device
    optimizer: str


def _check(spec: Spec, optimizer: str, **numbers: int) -> None:
    if optimizer not in get_args(OptimizerName):
        known = ", ".join(get_args(OptimizerName))
        raise ConfigError(
            f"optimizer = {optimizer!r}: there is no such optimizer{nearest(optimizer, get_args(OptimizerName))}", fix=f"use one of {known}"
        )
    problems = [f"{name} = {value}: must be at least 1" for name, value in numbers.items() if value < 1]
    if numbers["sequence_length"] > spec.max_positions:
        problems.append(f"sequence_length = {numbers['sequence_length']}: this base has {spec.max_positions} positions")
    if problems:
        raise ConfigError("this plan cannot be made", problems=problems)


def _cost_plan(architecture: Architecture, method: Method, work: _Work, costs: Mapping[str, int], full: CostPlan | None = None) -> CostPlan:
    training = ("base_bytes", "weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
    return CostPlan(
        base=architecture.name,
        method=method.name,
        hyperparameters=method.to_dict(),
        dtype=str(work.dtype).removeprefix("torch."),
        batch_tokens=work.tokens,
        sequence_length=work.length,
        variants=work.variants,
        activation_checkpointing=work.activation_checkpointing,
        optimizer=work.optimizer,
        base_parameters=architecture.parameters,
        train_peak_bytes=sum(costs[name] for name in training),
        full=full,
        **costs,
    )


def _costs_adapter(spec: Spec, method: Method, heads: Sequence[Site], work: _Work) -> dict[str, int]:
    dtype, tokens, length, variants = work.dtype, work.tokens, work.length, work.variants
    sites = method.sites_to_train(spec)
    params = {
        site.key(name): torch.empty(shape, device="meta", dtype=torch.float32) for site in sites for name, shape in site.shapes.items()
    }
    fixed = {site.key(name) for site in sites for name in site.fixed}
    trained = {k: tuple(t.shape) for k, t in params.items() if k not in fixed}
    trainable, kept = (sum(map(math.prod, shapes)) for shapes in (trained.values(), (t.shape for t in params.values())))
    own = {site.key(name): shape for site in heads for name, shape in site.shapes.items()}
    head = sum(map(math.prod, own.values()))  # computes in fp32, as it trains
    saved_method, saved = method.export(params)
    prefix = saved_method.prefix(spec, saved, dtype)
    shapes = {name: shape for name, (_, shape) in expected([*saved_method.sites(spec), *heads]).items()}
    kv = spec.kv_numbers * dtype.itemsize
    base, b = spec.weight_bytes(dtype), dtype.itemsize
    resident = variants * (prefix.length * kv if prefix else b * sum(t.numel() for t in saved.values()))
    resident += variants * 4 * head
    virtual = prefix.length if prefix else 0
    computed = variants * virtual if prefix and prefix.embeds_NH is not None else 0  # a prompt's embeddings are rows of the batch
    rows = tokens + computed
    serving = serving_memory(
        spec, dtype, converted=work.converted, kv_bytes=tokens * kv, adapter_bytes=resident, rows=tokens, length=length
    )
    return {
        "trainable": trainable + head,
        "adapter_file_bytes": file_bytes(shapes, torch.float32),
        "adapter_file_bytes_bf16": file_bytes(shapes, torch.bfloat16),
        "base_bytes": base,
        "weight_bytes": variants * (kept * (4 + b) + 4 * head),
        "gradient_bytes": variants * (trainable + head) * 4,
        "optimizer_bytes": variants * state_bytes(work.optimizer, trained | own, spec),
        "activation_bytes": activation_bytes(
            spec, sites, dtype, rows, length, virtual=virtual, activation_checkpointing=work.activation_checkpointing, device=work.device
        ),
        "serve_adapter_bytes": serving.adapter_bytes,
        "serve_kv_bytes": serving.kv_bytes,
        "serve_peak_bytes": serving.total_bytes,
    }


def _costs_full(spec: Spec, work: _Work) -> dict[str, int]:
    dtype, tokens, length, variants = work.dtype, work.tokens, work.length, work.variants
    spec = spec.packed(None)
    sites = [Site(m.name, m.parameters, saved=True) for m in spec.modules.values()]
    shapes = {s.key(name): shape for s in sites for name, shape in s.shapes.items() if not (spec.tied_head and s.name == spec.head)}
    n, b = spec.num_parameters, dtype.itemsize
    kv = tokens * spec.kv_numbers * b
    return {
        "trainable": n,
        "adapter_file_bytes": file_bytes(shapes, torch.float32),
        "adapter_file_bytes_bf16": file_bytes(shapes, torch.bfloat16),
        "base_bytes": n * b,
        "weight_bytes": 0,
        "gradient_bytes": n * b,
        "optimizer_bytes": state_bytes(work.optimizer, shapes, spec) + n * (4 if b < 4 else 0),
        "activation_bytes": activation_bytes(
            spec, sites, dtype, tokens, length, activation_checkpointing=work.activation_checkpointing, device=work.device
        ),
        "serve_adapter_bytes": variants * n * b,
        "serve_kv_bytes": kv,
        "serve_peak_bytes": variants * resident_bytes(spec, dtype, converted=work.converted) + kv + forward_bytes(spec, b, tokens, length),
    }


def file_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Size of a safetensors file of tensors of these names and shapes, all of one dtype: 8 bytes, the JSON header padded to 8, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    code, at = {4: "F32", 2: "BF16"}[dtype.itemsize], 0
    for name, shape in sorted(shapes.items()):
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    return 8 + math.ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8 + at
