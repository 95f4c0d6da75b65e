"""Smaller adapters: LoRA's ranks cut by SVD to what an error allows, and what storing in bf16 or fp16 rounds away.

Truncation keeps the largest singular values of each module's ΔW = s B A, which is the best approximation of its rank (Eckart-Young). All
errors are Frobenius norms of the difference relative to that of ΔW.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trimtab.bases.load import DTYPES
from trimtab.errors import AdapterError, ConfigError
from trimtab.methods import LoraConfig
from trimtab.store.adapter import Adapter
from trimtab.store.combine import relative
from trimtab.store.factors import balanced, distance, factors_of, lora_from_factors


@dataclass(frozen=True)
class CompressReport:
    """What a truncation saved and lost.

    error: over all modules, relative to ΔW of the adapter that came in, rounding to fp32 included; errors: module by module.
    ranks: module -> (before, after). parameters: numbers that train, (before, after).
    """

    error: float
    errors: Mapping[str, float]
    ranks: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


def compress(adapter: Adapter, *, rank: int | None = None, error: float | None = None) -> tuple[Adapter, CompressReport]:
    """A LoRA of smaller ranks, and what that lost.

    rank: of every module at most this. error: of every module the smallest rank whose relative error is at most this, which bounds the
    error over all modules too. Exactly one of them. Modules trained in full are carried along as they are.
    ConfigError for wrong arguments; AdapterError if the adapter has no ranks to cut.
    """
    _check(rank, error)
    if not isinstance(adapter.method, LoraConfig):
        fix = "store it in half precision instead: save(dtype='bfloat16')"
        raise AdapterError(f"a {adapter.method.name} adapter has no low-rank weight change to truncate", fix=fix)
    if adapter.method.invocation:
        raise AdapterError("an aLoRA is not truncated: what is written would be on for every token")
    if adapter.method.target_parameters:
        raise AdapterError(
            "an adapter that acts on experts is not truncated: each expert has factors of its own",
            fix="store it in half precision instead: save(dtype='bfloat16')",
        )
    if adapter.method.use_dora:
        raise AdapterError(
            "a DoRA adapter is not truncated: its magnitudes were trained with the norm of W + BA, which another BA changes",
            fix="store it in half precision instead: save(dtype='bfloat16')",
        )
    before, after = factors_of(adapter), {}
    for name, factors in before.items():
        U, sizes, Vh = factors.svd()
        kept = min(rank, factors.rank) if rank is not None else _smallest_rank(sizes, error or 0.0)
        after[name] = balanced(U, sizes, Vh, kept)
    saved: dict[str, dict[str, Tensor]] = {
        s.name: {t: adapter.params[s.key(t)] for t in s.shapes} for s in adapter.sites if s.saved and not s.head
    }
    method, params = lora_from_factors(adapter.base, after, saved)
    params |= {s.key(t): adapter.params[s.key(t)] for s in adapter.sites if s.head for t in s.shapes}
    small = Adapter(adapter.base, method, params, info=adapter.info, verified=adapter.verified, head=adapter.head)
    got = factors_of(small)
    apart = {name: (distance(got[name], f), f.norm()) for name, f in before.items()}
    report = CompressReport(
        error=relative(math.hypot(*(d for d, _ in apart.values())), math.hypot(*(n for _, n in apart.values()))),
        errors={name: relative(*both) for name, both in apart.items()},
        ranks={name: (before[name].rank, after[name].rank) for name in before},
        parameters=(adapter.num_parameters, small.num_parameters),
    )
    return small, report


def _check(rank: int | None, error: float | None) -> None:
    problems = []
    if (rank is None) == (error is None):
        problems.append("give either rank or error, one of them")
    if rank is not None and rank < 1:
        problems.append(f"rank = {rank}: at least 1")
    if error is not None and not 0.0 <= error < 1.0:
        problems.append(f"error = {error}: the share of a module's weight change that may be lost, at least 0 and below 1")
    if problems:
        raise ConfigError("the adapter cannot be compressed so", problems=problems)


def _smallest_rank(sizes: Tensor, error: float) -> int:
    """How many of the singular values (descending) must stay so that the root of the sum of the others' squares is within the error."""
    squares = sizes.square()
    beyond = squares.flip(0).cumsum(0).flip(0)  # beyond[k]: what is lost if k values stay
    return max(1, int((beyond > (error**2) * squares.sum()).sum()))


def rounding_error(adapter: Adapter, dtype: str) -> float:
    """What `Adapter.save(dtype=…)` rounds away: norm of the difference of all tensors relative to their norm."""
    params = adapter.method.export(adapter.params)[1].values()
    pairs = [(t.detach().double(), t.detach().to(DTYPES[dtype]).double()) for t in params]
    return relative(math.hypot(*(float((a - b).norm()) for a, b in pairs)), math.hypot(*(float(a.norm()) for a, _ in pairs)))
