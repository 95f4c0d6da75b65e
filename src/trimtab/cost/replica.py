"""What one server (a replica) of a base takes and gives on a device: keys and values, adapters in memory, streams, tokens a second.

Budgets are those that `trimtab serve` makes where it is told none. Speeds follow from a device's data sheet, or from what was measured of
this machine, and from assumptions, which `ReplicaPlan.assumes` spells out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.bases.shapes import Architecture
from trimtab.cost.activations import forward_bytes
from trimtab.cost.devices import Device
from trimtab.cost.plan import CostPlan
from trimtab.cost.ranks import LAUNCH_S, USABLE, launch_seconds
from trimtab.cost.serving import resident_bytes
from trimtab.serve.config import ADAPTER_SHARE, KV_SHARE, TYPICAL_TOKENS, EngineConfig

READ_SHARES = (0.5, 0.8)
"""(least, most) part of the memory's bandwidth that a decode step is assumed to reach."""
DECODE_LAUNCHES = 80
"""Kernels of a layer in a decode step of several LoRAs, as law 17 counts them."""
STREAMS = (1, 8, 32, 64)
"""Streams for which tokens a second are shown, as far as they fit."""


@dataclass(frozen=True)
class Decoding:
    """A decode step of so many streams, each with an adapter of its own: its tokens a second, (least, most); cost: of 10⁶ of them."""

    streams: int
    tokens_per_s: tuple[float, float]
    cost_per_million: tuple[float, float] | None


@dataclass(frozen=True)
class ReplicaPlan:
    """One server on one device. base_bytes: of the weights; work_bytes: of its largest forward. kv_bytes, adapter_budget_bytes: budgets.
    kv_tokens: how many tokens' keys and values fit; streams: how many sequences of `length` tokens run at once. adapter_bytes: of one
    packed adapter, None for full fine-tuning, which shares no base; resident: how many fit. prompt_tokens_per_s: (least, most) of prompts
    of `length`. `replicas` of them give as many times the tokens, where a router shares requests out evenly."""

    device: Device
    replicas: int
    length: int
    base_bytes: int
    work_bytes: int
    kv_bytes: int
    kv_tokens: int
    streams: int
    adapter_bytes: int | None
    adapter_budget_bytes: int
    resident: int
    prompt_tokens_per_s: tuple[float, float]
    decoding: tuple[Decoding, ...]
    assumes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.streams > 0

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return dataclasses.asdict(self) | {"fits": self.fits}


def plan_replica(
    base: Architecture,
    adapter: CostPlan,
    device: Device,
    *,
    replicas: int,
    dtype: torch.dtype,
    length: int,
    price_per_hour: float | None = None,
    shares: tuple[float, float] | None = None,
) -> ReplicaPlan:
    """adapter: the plan of one adapter. length: tokens of a sequence, prompt and answer together. price_per_hour: of one device.

    A decode step of S streams reads the weights once, S adapters, and keys and values of S sequences that are half written on average; it
    computes 2 FLOPs for each parameter and stream, and launches its kernels. It takes the longest of the three. Of experts those count that
    some stream is sent to.
    """
    spec, config = base.spec, EngineConfig()
    on_cpu = device.kind == "cpu"
    weights = resident_bytes(spec, dtype, converted=dtype != base.dtype, on_cpu=on_cpu)
    work = forward_bytes(spec, dtype.itemsize, config.max_step_rows, min(length, config.max_step_rows))
    free = max(0, int(USABLE * device.memory_bytes) - weights)
    per_token = spec.kv_numbers * dtype.itemsize
    most = config.max_running * spec.max_positions
    if on_cpu:
        most = min(most, max(spec.max_positions, config.max_running * TYPICAL_TOKENS))
    cap = (
        f"here less: {most:,} tokens are the most that `trimtab serve` keeps of a base with {spec.max_positions:,} positions on this device"
    )
    tokens = min(int(KV_SHARE * free) // per_token, most)
    fits = free * (1 - KV_SHARE - ADAPTER_SHARE) >= work
    streams = min(config.max_running, tokens // length) if fits else 0
    each = None if adapter.full is None else max(1, adapter.serve_adapter_bytes // adapter.variants)
    budget = int(ADAPTER_SHARE * free)
    resident = 0 if each is None else budget // each
    speed = _Speed(base, device, dtype, length, each or 0, shares or device.shares, price_per_hour)
    shown: Sequence[int] = sorted({*(n for n in STREAMS if n <= streams), streams} - {0})
    return ReplicaPlan(
        device=device,
        replicas=replicas,
        length=length,
        base_bytes=weights,
        work_bytes=work,
        kv_bytes=tokens * per_token,
        kv_tokens=tokens,
        streams=streams,
        adapter_bytes=each,
        adapter_budget_bytes=budget,
        resident=resident,
        prompt_tokens_per_s=speed.prompts(),
        decoding=tuple(map(speed.decoding, shown)),
        assumes=_assumes(device, speed.shares, length, f" ({cap})" if tokens == most else "", given=shares is not None),
    )


@dataclass(frozen=True)
class _Speed:
    """Of one device. each: bytes of an adapter, of which each stream has one. shares: (least, most) of the device's peak, as reached."""

    base: Architecture
    device: Device
    dtype: torch.dtype
    length: int
    each: int
    shares: tuple[float, float]
    price_per_hour: float | None

    @property
    def table(self) -> int:
        """Numbers in the embedding."""
        return self.base.spec.vocab_size * self.base.spec.hidden_size

    @property
    def numbers(self) -> int:
        """What a decoded token is multiplied with."""
        spec = self.base.spec
        return spec.num_parameters - (0 if spec.tied_head else self.table) - spec.idle_parameters()

    @property
    def launches(self) -> int:
        return self.base.spec.num_layers * DECODE_LAUNCHES

    def decoding(self, streams: int) -> Decoding:
        """A decode step of so many streams, at the least and the most that the device reaches."""
        spans = zip(self.shares, READ_SHARES, launch_seconds(self.device)[::-1], strict=True)
        low, high = (streams / self._step(streams, *span) for span in spans)
        price = self.price_per_hour
        return Decoding(streams, (low, high), None if price is None else (price / 3600 / high * 1e6, price / 3600 / low * 1e6))

    def prompts(self) -> tuple[float, float]:
        """Tokens of prompts a second, in forwards of as many rows as a server takes. One row of a prompt reaches the head."""
        flops, rows = 2 * (self.numbers - self.table) + _scores(self.base, self.length), EngineConfig().max_step_rows
        spans = zip(self.shares, launch_seconds(self.device)[::-1], strict=True)
        low, high = (1 / max(flops / (self.device.flops * compute), self.launches * launch / rows) for compute, launch in spans)
        return low, high

    def _step(self, streams: int, compute: float, read: float, launch: float) -> float:
        """Seconds. The embedding's rows are few, so its table counts only where it is the head too. Nobody reads experts that no stream is
        sent to."""
        spec, size = self.base.spec, self.dtype.itemsize
        embedding = 0 if spec.tied_head else self.table * size
        idle = spec.idle_parameters(streams) * spec.weight_bytes(self.dtype) / spec.num_parameters
        moved = spec.weight_bytes(self.dtype) - embedding - idle + streams * (self.each + spec.kv_numbers * size * self.length / 2)
        computing = 2 * self.numbers * streams / (self.device.flops * compute)
        return max(moved / (self.device.read_bytes * read), computing, self.launches * launch)


def _scores(base: Architecture, length: int) -> float:
    """FLOPs of attention for one token of a prompt."""
    return sum(
        2 * layer.num_heads * (layer.head_dim + layer.value_dim) * min(length / 2, layer.window or length) for layer in base.spec.layers
    )


def _assumes(device: Device, shares: tuple[float, float], length: int, cap: str, *, given: bool) -> tuple[str, ...]:
    (low, high), (least, most) = shares, READ_SHARES
    span = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    usable = f"{USABLE:.0%} of {device.memory_bytes / 1e9:,.4g} GB can be used"
    budgets = f"{KV_SHARE:.0%} for keys and values{cap} and {ADAPTER_SHARE:.0%} for adapters"
    micro = f"{LAUNCH_S[0] * 1e6:.0f} to {LAUNCH_S[1] * 1e6:.0f} µs"
    launches = f"a step launches {DECODE_LAUNCHES} kernels a layer, for which the host needs {micro} each"
    reading = f"decode steps read memory at {least:.0%} to {most:.0%} of {device.read_bytes / 1e9:,.4g} GB/s (assumed)"
    computing = f"{span} of {device.flops / 1e12:,.3g} TFLOP/s ({'as given' if given else device.reached})"
    return (
        f"`trimtab serve` without sizes: of what is free, {budgets}; {EngineConfig().max_running} sequences at most; {usable}",
        f"{reading}, and compute at {computing}, whichever takes longer; prompts compute at that, too",
        *([] if device.kind == "cpu" else [f"{launches} at least (assumed): on a small base that is the longest"]),
        f"each stream has an adapter of its own, and {length / 2:,.0f} tokens in the cache on average; prompts take no time from decoding",
        "scheduling, sampling and HTTP are not counted: on a small base they are most of a step. `trimtab simulate` counts them",
    )
