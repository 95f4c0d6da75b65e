"""Attention over the sequences of a flat batch: causal, with a prefix and cached keys before it, no padding of rows, no dense mask.

Rows reach each layer flat, [1, heads, T, D]. An `AttentionPlan`, made once for each batch and used by all layers, says for each sequence
which rows are its queries and which rows of a *pool* are its keys. The pool is the layer's own T rows followed by the stored prefixes, or,
with a cache, the cache. It runs in a kernel for flat rows where there is one, else in `buckets`.

One function, registered with `transformers`' attention interface, serves every family. What it does not compute exactly it refuses by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface

from trimtab import ops
from trimtab.errors import BaseError
from trimtab.forward.buckets import Bucket, lay_out, over_buckets
from trimtab.forward.kv_cache import KVCache, Place, Run

NAME = "trimtab"
LONG = 64
"""Sequences that bring this many rows run their attention over a cache in blocks of queries, or as batched matmuls; others row by row."""


@dataclass
class AttentionPlan:
    """Which rows attend to which, for all layers of one forward.

    prefixes: stored (keys, values) [L, N, kv_heads, D] that stand in the pool behind the layer's own rows. cache: keys and values are
    written there at `write_T` and read from there; each run's sequence has its place there. captured: filled with each layer's (keys,
    values) [T, kv_heads, D] where `capture` is set.
    """

    runs: Sequence[Run]
    device: torch.device
    prefixes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    cache: KVCache | None = None
    places: Sequence[Place] = ()
    write_T: Tensor | None = None
    capture: bool = False
    captured: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @cached_property
    def layout(self) -> tuple[list[Bucket], Tensor]:
        return lay_out(self.runs, self.device)

    @cached_property
    def index(self) -> ops.FlatIndex:
        return ops.flat_index([(r.start, r.stop, r.keys) for r in self.runs])

    @cached_property
    def varlen(self) -> ops.VarlenIndex:
        return ops.varlen_index([(r.start, r.stop, r.keys) for r in self.runs], self.device)

    @cached_property
    def pages(self) -> ops.PagedIndex:
        """Of a cache without pages a slot is one."""
        sequences = [(r.queries, r.length, [p] if isinstance(p, int) else p) for r, p in zip(self.runs, self.places, strict=True)]
        return ops.paged_index(sequences, self.device)

    def pool(self, layer: int, k_THD: Tensor, v_THD: Tensor) -> tuple[Tensor, Tensor]:
        if self.capture:
            self.captured.append((k_THD, v_THD))
        if self.cache is not None:
            keys, values = self.cache.of_layer(layer, k_THD, v_THD)
            keys[self.write_T], values[self.write_T] = k_THD, v_THD
            return keys, values
        if not self.prefixes:
            return k_THD, v_THD
        return torch.cat([k_THD, *(k[layer] for k, _ in self.prefixes)]), torch.cat([v_THD, *(v[layer] for _, v in self.prefixes)])


def forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    trimtab_plan: AttentionPlan | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The function that transformers calls in each layer: query [1, H, T, D], key and value [1, kv_heads, T, D]; returns [1, T, H, D]."""
    plan = at_hand(module) if trimtab_plan is None else trimtab_plan
    if plan is None:
        raise RuntimeError("this model is attached to trimtab: call Base.logits, Base.generate or Attached.forward, or load another copy")
    # A model has read its cache, if it has one, before it calls this: what it found there would be keys without queries.
    others = {name: value for name, value in kwargs.items() if not _is_cache(value)}
    refuse_changes(others | {"attention_mask": attention_mask, "dropout": dropout, "cached_keys": key.shape[2] - query.shape[2]})
    q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(q_THD, k_THD, v_THD, plan, module.layer_idx, scaling, softcap, sliding_window, s_aux)[None], None


class HasPlan(Protocol):
    """A batch."""

    @property
    def plan(self) -> AttentionPlan: ...


class KeepsBatch(Protocol):
    """What keeps a base's batch of the calling thread (`hosts.AtHand`)."""

    @property
    def batch(self) -> HasPlan | None: ...


KEPT: WeakKeyDictionary[Any, KeepsBatch] = WeakKeyDictionary()
"""An attention module of a base -> where the batch is, for classes whose layers do not hand their arguments on to the attention."""


def at_hand(module: Any) -> AttentionPlan | None:
    """The plan of the batch that the calling thread runs on the module's base."""
    kept = KEPT.get(module)
    batch = None if kept is None else kept.batch
    return None if batch is None else batch.plan


def refuse_changes(arguments: Mapping[str, object]) -> None:
    """BaseError where a model hands its attention something that may change the result and that is not computed here.

    Every version of transformers hands over other names, so what decides is what an argument asks for (`_asks_nothing`).
    """
    refused = [f"{name}={_in_words(value)}" for name, value in sorted(arguments.items()) if not _asks_nothing(name, value)]
    if refused:
        raise BaseError(
            f"this model's attention asks for {', '.join(refused)}, which trimtab's attention does not compute",
            fix="use another base, or a version of transformers that trimtab is tested with: `trimtab doctor` says whether yours is one",
        )


def _asks_nothing(name: str, value: Any) -> bool:
    """Whether attention is the same with and without this argument: it says what is known already, asks that something be kept or returned
    besides, or holds nothing (None, off, zero, an empty sequence, a cache without tokens).

    Scores are always scaled and causal here, so "no" to one of these is a change, and "yes" to causality is none.
    """
    if value is None or name in _KNOWN or name.startswith(_BESIDES):
        return True
    if "causal" in name:
        return value is True
    if "scal" in name:
        return False
    if isinstance(value, bool | int | float):
        return not value
    if isinstance(value, Tensor):
        return value.numel() == 0
    if _is_cache(value):
        return bool(value.get_seq_length() == 0)
    return isinstance(value, Sized) and len(value) == 0


def _is_cache(value: Any) -> bool:
    return callable(getattr(value, "get_seq_length", None))


_KNOWN = {"position_ids", "cache_position", "layer_idx"}
"""The plan's positions and the module's number, under transformers' names."""
_BESIDES = ("output_", "return_", "use_cache")


def _in_words(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return repr(value) if isinstance(value, bool | int | float | str) else f"a {type(value).__name__}"


def attend(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    plan: AttentionPlan,
    layer: int,
    scaling: float,
    softcap: float | None,
    window: int | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of a layer's flat rows over the plan's sequences; q and k [T, heads, D], v [T, kv_heads, E]; returns [T, H, E]."""
    k_pool, v_pool = plan.pool(layer, k_THD, v_THD)
    if softcap is None and sinks_H is None:
        flat = plan.cache is None or any(run.queries >= LONG for run in plan.runs)
        if flat and scaling > 0 and ops.takes_flat(q_THD, k_pool, v_pool):
            return ops.flat_attention(q_THD, k_pool, v_pool, plan.index, scaling, window)
        alike = q_THD.shape[-1] == v_pool.shape[-1] and (plan.cache is None or k_pool.is_contiguous())
        if alike and plan.cache is None and (kernel := ops.varlen_kernel(q_THD, k_pool)) is not None:
            return ops.varlen_attention(q_THD, k_pool, v_pool, plan.varlen, scaling, window, kernel)
        if alike and plan.cache is not None and (kernel := ops.paged_kernel(q_THD, k_pool, page := plan.cache.capacity)) is not None:
            return ops.paged_attention(q_THD, k_pool, v_pool, page, plan.pages, scaling, window, kernel)
    return over_buckets(q_THD, k_pool, v_pool, plan.layout, scaling, softcap, window, sinks_H)


AttentionInterface.register(NAME, forward)
