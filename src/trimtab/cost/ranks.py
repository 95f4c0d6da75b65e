"""What training takes on so many devices of a kind: what fits where, tokens a second, hours, cost. Nothing is measured there: every figure
follows from a device's data sheet, from `plan`'s bytes and from assumptions, which `RanksPlan.assumes` spells out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimtab.bases.shapes import Architecture
from trimtab.bases.spec import Spec
from trimtab.cost.devices import Device
from trimtab.cost.estimate import flops_per_token
from trimtab.cost.plan import CostPlan, plan
from trimtab.cost.room import part_bytes
from trimtab.errors import ConfigError
from trimtab.methods import FullConfig, Head, Method

USABLE = 0.9
"""Part of a device's memory that is planned with: its driver, the runtime and an allocator's slack take the rest."""
LINK_SHARE = 0.7
"""Part of a link's bandwidth that an all-reduce or all-gather is assumed to reach."""
MOST_TOKENS = 2**20
"""Micro-batches are not looked for beyond this."""
SECOND = 64
"""Rows of the second point of a line."""
SMALL = 10**9
"""Parameters of a base from which on its matrices fill a device."""
LAUNCH_S = (4e-6, 1e-5)
"""Seconds that the host is assumed to need for a kernel on a GPU, at best and at worst."""
TRAINING_LAUNCHES = 220
"""Kernels of a layer in a training step of LoRAs, forward and backward, as law 17 counts them."""


@dataclass(frozen=True)
class Trainee:
    """One variant as far as it costs something. tokens, steps: of its whole training; tokens_per_step: of its largest step. flops: of its
    whole training, without attention's scores. length: of its mean row."""

    method: Method
    optimizer: str
    head: Head | None
    trainable: int
    tokens: int
    steps: int
    tokens_per_step: int
    flops: float
    length: float


@dataclass(frozen=True)
class Fit:
    """Bytes of one rank. adapters: all variants' numbers, gradients and optimizer states. activations: of a forward of `forward_tokens`.
    most_tokens: of the largest micro-batch that fits, in whole rows; 0 where not even one row does."""

    base: int
    gathered: int
    adapters: int
    optimizer: int
    activations: int
    total: int
    usable: int
    most_tokens: int
    most_rows: int

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


@dataclass(frozen=True)
class RanksPlan:
    """Training on `ranks` devices. whole, sharded: what a rank holds if it has the whole base, or a part of it. forward_tokens: rows of a
    rank's largest forward; longest: tokens of the longest row. all_reduce_bytes: of one step, as each rank gives it. gathered_bytes: of a
    sharded base, as each rank receives them for one of its `forwards` and the backward.

    tokens_per_s, hours, cost: (least, most) for the whole base and for the sharded one (`shard: true`); None where it does not fit, and
    where a variant is fully fine-tuned, since such a base is not shared out (`shardable`). hours are None where
    nothing says how many tokens there are, cost where no price is given.
    """

    device: Device
    ranks: int
    forward_tokens: int
    longest: int
    whole: Fit
    sharded: Fit
    shardable: bool
    tokens: int
    steps: int
    flops: float
    all_reduce_bytes: int
    gathered_bytes: int
    forwards: int
    tokens_per_s: dict[str, tuple[float, float] | None]
    hours: dict[str, tuple[float, float] | None] | None
    cost: dict[str, tuple[float, float] | None] | None
    cost_per_million: dict[str, tuple[float, float] | None] | None
    assumes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as plain JSON values."""
        return dataclasses.asdict(self) | {"whole": _fit(self.whole), "sharded": _fit(self.sharded)}


def _fit(fit: Fit) -> dict[str, Any]:
    return dataclasses.asdict(fit) | {"fits": fit.fits}


def plan_ranks(
    base: Architecture,
    trainees: Sequence[Trainee],
    device: Device,
    *,
    ranks: int,
    dtype: torch.dtype,
    max_tokens: int,
    longest: int,
    again: bool = False,
    whole_run: bool = True,
    price_per_hour: float | None = None,
    shares: tuple[float, float] | None = None,
) -> RanksPlan:
    """Of variants that train together. max_tokens: rows of a forward at most. longest: tokens of the longest row. again: with activation
    checkpointing. whole_run: whether `trainees` say how long training is, so that there are hours. price_per_hour: of one device. shares:
    (least, most) of the device's peak that is reached, instead of the device's own.

    With N ranks, K bytes of gradients, B of the base, F FLOPs, and f forwards of a rank in all steps:

        compute     F / (N · peak · share), or the time that the host needs for the kernels of its forwards, if that is longer
        all-reduce  2 · K · (N − 1) / N bytes a step through each rank's link, both ways at once
        all-gather  where the base is sharded, 2 · B · (N − 1) / N a forward: once for it, once for its backward

    The all-reduce comes after computing; the all-gathers run beside it at best, and at worst after it.
    ConfigError where `ranks` is below 1, or the dtype has no peak on the device.
    """
    _check(device, ranks, dtype, price_per_hour, shares)
    joint = sum(t.tokens_per_step for t in trainees)
    forward = max(longest, min(max_tokens, math.ceil(joint / ranks)))
    plans = _Plans(base, trainees, device, dtype, again, longest)
    whole, sharded = plans.fit(forward, 1), plans.fit(forward, ranks)
    tokens, steps = sum(t.tokens for t in trainees), max(t.steps for t in trainees)
    flops = sum(t.flops + t.tokens * attention_flops(base.spec, t.length, again) for t in trainees)
    reduced = sum(4 * t.trainable * t.steps for t in trainees)
    forwards = sum(_forwards(trainees, step, ranks, max(max_tokens, longest)) for step in _phases(trainees))
    gathered, used = int(2 * base.spec.weight_bytes(dtype) * (ranks - 1) / ranks), shares or device.shares
    shardable = not any(isinstance(t.method, FullConfig) for t in trainees)
    alone, together = _seconds(base, device, ranks, used, flops=flops, forwards=forwards, reduced=reduced, gathered=gathered)
    spans = {"whole": alone if whole.fits else None, "sharded": together if sharded.fits and shardable else None}

    def of(number: Callable[[float], float]) -> dict[str, tuple[float, float] | None]:
        return {k: None if s is None else (min(map(number, s)), max(map(number, s))) for k, s in spans.items()}

    price = None if price_per_hour is None else price_per_hour * ranks / 3600
    return RanksPlan(
        device=device,
        ranks=ranks,
        forward_tokens=forward,
        longest=longest,
        whole=whole,
        sharded=sharded,
        shardable=shardable,
        tokens=tokens,
        steps=steps,
        flops=flops,
        all_reduce_bytes=sum(4 * t.trainable for t in trainees) if ranks > 1 else 0,
        gathered_bytes=gathered,
        forwards=forwards,
        tokens_per_s=of(lambda s: tokens / s),
        hours=of(lambda s: s / 3600) if whole_run else None,
        cost=of(lambda s: s * price) if price is not None and whole_run else None,
        cost_per_million=of(lambda s: s * price / tokens * 1e6) if price is not None else None,
        assumes=_assumes(base, device, ranks, used, given=shares is not None, again=again),
    )


def _seconds(
    base: Architecture,
    device: Device,
    ranks: int,
    shares: tuple[float, float],
    *,
    flops: float,
    forwards: int,
    reduced: int,
    gathered: int,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(least, most) of all steps: the base whole on each rank, and shared out. flops: of all ranks. reduced: bytes of gradients.
    gathered: bytes of the base that a forward brings together."""
    link, (low, high) = device.link_bytes * LINK_SHARE, shares
    talk, gathering = 2 * reduced * (ranks - 1) / ranks / link, gathered * forwards / link
    launching = (forwards * base.spec.num_layers * TRAINING_LAUNCHES * seconds for seconds in launch_seconds(device))
    least, most = (max(flops / (ranks * device.flops * s), launches) for s, launches in zip((high, low), launching, strict=True))
    return (least + talk, most + talk), (max(least, gathering) + talk, most + gathering + talk)


def launch_seconds(device: Device) -> tuple[float, float]:
    """(least, most) for one kernel; on a CPU, where a layer is a few native calls, nothing is counted."""
    return (0.0, 0.0) if device.kind == "cpu" else LAUNCH_S


def trainee(
    base: Architecture,
    method: Method,
    *,
    optimizer: str,
    head: Head | None,
    trainable: int,
    tokens_per_step: int,
    length: int,
    again: bool,
) -> Trainee:
    """A variant that trains one step of so many tokens, all of them supervised, in rows of `length`."""
    flops = flops_per_token(base, method, trainable, 1.0, again=again) * tokens_per_step
    return Trainee(method, optimizer, head, trainable, tokens_per_step, 1, tokens_per_step, flops, length)


def attention_flops(spec: Spec, length: float, again: bool = False) -> float:
    """FLOPs of causal attention's scores and sums for one token of a row of `length`, forward and backward. A token sees half of its row,
    or the layer's window. The forward has two products, the backward five, as scores are formed again."""
    seen = [min(length / 2, layer.window or length) for layer in spec.layers]
    forward = sum(layer.num_heads * (layer.head_dim + layer.value_dim) * 2 * n for layer, n in zip(spec.layers, seen, strict=True))
    return forward * (3.5 + again)


class _Plans:
    """Bytes of a rank by the tokens of its forwards."""

    def __init__(
        self, base: Architecture, trainees: Sequence[Trainee], device: Device, dtype: torch.dtype, again: bool, longest: int
    ) -> None:
        self.base, self.trainees, self.device, self.longest = base, trainees, device, longest
        self.options: dict[str, Any] = {
            "dtype": str(dtype).removeprefix("torch."),
            "activation_checkpointing": again,
            "device": device.torch,
        }
        self.dtype, self._known = dtype, dict[int, list[CostPlan]]()

    def fit(self, tokens: int, parts: int) -> Fit:
        """With the base in so many parts, of which a rank has one."""
        plans = self._of(tokens)
        whole = plans[0].base_bytes
        base = whole // parts + sum(p.base_bytes for p in plans if p.full is None)  # a fully fine-tuned variant has a model of its own
        gathered = part_bytes(self.base.spec, self.dtype, whole, parts) - whole // parts if parts > 1 else 0
        adapters = sum(p.weight_bytes + p.gradient_bytes for p in plans)
        optimizer = sum(p.optimizer_bytes for p in plans)
        held, usable = base + gathered + adapters + optimizer, int(USABLE * self.device.memory_bytes)
        activations = max(p.activation_bytes for p in plans)
        rows = self._rows(usable - held)
        return Fit(base, gathered, adapters, optimizer, activations, held + activations, usable, rows * self.longest, rows)

    def _of(self, tokens: int) -> list[CostPlan]:
        if tokens not in self._known:
            length = min(self.longest, self.base.spec.max_positions)
            each = dict[Any, CostPlan]()
            for t in self.trainees:
                if (kind := (repr(t.method), t.optimizer, t.head)) not in each:
                    own = self.options | {"optimizer": t.optimizer, "head": t.head}
                    each[kind] = plan(self.base, t.method, batch_tokens=tokens, sequence_length=length, **own)
            self._known[tokens] = [each[repr(t.method), t.optimizer, t.head] for t in self.trainees]
        return self._known[tokens]

    def _rows(self, free: int) -> int:
        """The most rows of the longest length whose activations take at most so many bytes: looked for around where a straight line through
        two numbers of rows says, as activations are nearly one."""

        def taken(rows: int) -> int:
            return max(p.activation_bytes for p in self._of(rows * self.longest))

        if taken(1) > free:
            return 0
        most = max(1, MOST_TOKENS // self.longest)
        guess = 1 + int((free - taken(1)) * (SECOND - 1) / (taken(SECOND) - taken(1)))
        low, high, step = 1, most + 1, 1
        at = min(max(guess, 1), most)
        while low < at < high:
            low, high = (at, high) if taken(at) <= free else (low, at)
            at, step = (at + step, 2 * step) if at == low else (at - step, 2 * step)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if taken(middle) <= free else (low, middle)
        return low


def _phases(trainees: Sequence[Trainee]) -> list[tuple[int, int]]:
    """(steps, steps that the variants that train in them have at least): the joint steps, by which variants still train."""
    ends = sorted({t.steps for t in trainees})
    return [(end - start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _forwards(trainees: Sequence[Trainee], phase: tuple[int, int], ranks: int, most: int) -> int:
    """Forwards of a rank in the steps of a phase, by the mean step of those that train in it."""
    steps, least = phase
    mean = sum(t.tokens / t.steps for t in trainees if t.steps >= least)
    return steps * max(1, math.ceil(mean / (ranks * most)))


def _check(device: Device, ranks: int, dtype: torch.dtype, price: float | None, shares: tuple[float, float] | None) -> None:
    problems = [f"--ranks {ranks}: must be at least 1"] if ranks < 1 else []
    if price is not None and not 0 <= price < math.inf:
        problems.append(f"--price-per-hour {price}: must be a number of at least 0")
    if shares is not None and not 0 < shares[0] <= shares[1] <= 1:
        problems.append(f"--share-of-peak {shares[0]}: must be above 0 and at most 1")
    if device.kind != "cpu" and dtype.itemsize != 2:
        problems.append(f"dtype {str(dtype).removeprefix('torch.')}: the figures of {device.name} are for bfloat16 and float16")
    if problems:
        raise ConfigError("this cannot be planned", problems=problems)


def _micro() -> str:
    return f"{LAUNCH_S[0] * 1e6:.0f} to {LAUNCH_S[1] * 1e6:.0f} µs"


def _assumes(base: Architecture, device: Device, ranks: int, shares: tuple[float, float], *, given: bool, again: bool) -> tuple[str, ...]:
    low, high = shares
    span = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    reached = "as given" if given else device.reached
    found = [
        f"steps reach {span} of {device.flops / 1e12:,.3g} TFLOP/s ({reached})",
        "FLOPs a token: 4 for each frozen parameter, 6 for each trained one, and causal attention's"
        + (", and 2 more for each in the layers, which run again" if again else "")
        + "; packed weights are taken to multiply as fast as dense ones",
        f"{USABLE:.0%} of the memory of {device.memory_bytes / 1e9:,.4g} GB can be used",
    ]
    if base.parameters < SMALL and device.kind != "cpu" and not given:
        found.append("a base of less than 10⁹ parameters does not fill such a device, so that it may reach less than that")
    if device.kind != "cpu":
        found.append(f"a forward and its backward launch {TRAINING_LAUNCHES} kernels a layer, which takes {_micro()} each at least")
    if ranks > 1:
        found += [
            f"links ({device.link}) give {LINK_SHARE:.0%} of {device.link_bytes / 1e9:,.3g} GB/s in each direction, to all ranks at once",
            "rows are shared out evenly; the all-reduce waits for computing",
            "a sharded base's all-gathers run beside computing at best, and at worst after it",
        ]
    return (*found, "validation, scores, reading rows and checkpoints are not counted")
