"""Weighted combinations of adapters of one method on one base: Σ wᵢ · adapterᵢ as one adapter, and how far it is from that sum.

    exact         LoRA: ranks concatenated (peft's "cat"), so that ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ. IA³: l = 1 + Σ wᵢ (lᵢ - 1), since W ∘ (l - 1) is
                  what IA³ adds to a weight. Bottleneck adapters: bottlenecks concatenated, so that what they add is added up
    svd           LoRA: the best approximation of that sum of a given rank
    ties          LoRA: TIES on the ΔWᵢ, then the best approximation of a given rank (peft's "ties_svd")
    dare_linear   LoRA: DARE on the ΔWᵢ, then the same ("dare_linear_svd")
    dare_ties     LoRA: DARE, then TIES' election of signs, then the same ("dare_ties_svd")

Combining A with A and B with B, as peft's "linear", "ties" and "dare_*" do, is not offered: (Σ Bᵢ)(Σ Aᵢ) has cross terms that no adapter
was trained with. What is no sum at all is refused with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import AdapterError, ConfigError, nearest
from trimtab.methods import BottleneckConfig, IA3Config, LoraConfig, Method
from trimtab.store.adapter import Adapter
from trimtab.store.combine_edits import sum_bottleneck, sum_ia3
from trimtab.store.factors import Factors, approximated, distance, factors_of, lora_from_factors, side_by_side, truncated
from trimtab.store.sparsify import dare_linear, dare_ties, ties
from trimtab.tables import counted

HOW = ("exact", "svd", "ties", "dare_linear", "dare_ties")
TRUNCATING, THINNING = HOW[1:], HOW[2:]


@dataclass(frozen=True)
class CombineReport:
    """What a combination lost. Errors are Frobenius norms of the difference, relative to that of Σ wᵢ · adapterᵢ, rounding included.

    error: over all modules; errors: module by module. rank_error: the part that bringing a thinned sum (ties, dare) back to a rank lost,
    relative to the thinned sum; what thinning itself changes is meant, and is the rest of `error`. None if nothing was thinned.
    ranks: of each module; empty if the method has none.
    """

    how: str
    weights: tuple[float, ...]
    parameters: int
    error: float
    errors: Mapping[str, float]
    ranks: Mapping[str, int]
    rank_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    how: str = "exact",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> tuple[Adapter, CombineReport]:
    """Σ wᵢ · adapterᵢ as one new adapter (see above for `how`), and how far it is from that.

    weights: one for each adapter; by default all 1. rank: of the result where it is truncated; by default the largest rank there is.
    density: the share of entries that TIES and DARE keep. seed: of DARE's draws.
    ConfigError for wrong arguments, AdapterError for adapters that do not go together or whose method has no weighted sum.
    """
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    _check_arguments(adapters, weights, how, rank, density)
    exported = [Adapter(a.base, *a.method.export(a.params), head=a.head) for a in adapters]
    _check_together(exported, how)
    if how == "exact" and not isinstance(exported[0].method, LoraConfig):
        add = sum_ia3 if isinstance(exported[0].method, IA3Config) else sum_bottleneck
        method, wanted = add(exported, weights)
        combined, report = _rounded(exported[0], method, wanted, weights)
    else:
        combined, report = _combine_lora(exported, weights, how, rank, density, seed)
    combined.verified = all(a.verified for a in adapters)
    return combined, report


def summed(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Σ wᵢ · adapterᵢ exactly, of LoRA or IA³, without a report. AdapterError that names what has no such sum."""
    exported = [Adapter(a.base, *a.method.export(a.params), head=a.head) for a in adapters]
    _check_together(exported, "exact")
    first = exported[0].method
    if isinstance(first, IA3Config):
        made = sum_ia3(exported, weights)
    elif isinstance(first, LoraConfig):
        each = [(w, factors_of(a)) for w, a in zip(weights, exported, strict=True)]
        names = [name for name in exported[0].base.spec.modules if any(name in found for _, found in each)]
        sums = {name: side_by_side([found[name].scaled(w) for w, found in each if name in found]) for name in names}
        made = lora_from_factors(exported[0].base, sums)
    else:
        raise AdapterError(f"adapters of {first.name} cannot be composed in a request: only those of lora and of ia3 are")
    return Adapter(exported[0].base, *made, verified=all(a.verified for a in adapters))


def _check_arguments(adapters: Sequence[Adapter], weights: Sequence[float], how: str, rank: int | None, density: float) -> None:
    problems = []
    if how not in HOW:
        problems.append(f"how = {how!r}{nearest(how, HOW)}: one of {', '.join(HOW)}")
    if len(adapters) < 2:
        problems.append(f"{len(adapters)} adapter(s): at least two are combined")
    if len(weights) != len(adapters):
        problems.append(f"{counted(len(weights), 'weight')} for {counted(len(adapters), 'adapter')}: give one for each")
    problems += [
        f"weight {w}: must be a finite number other than 0 (leave the adapter out)" for w in weights if w == 0 or not math.isfinite(w)
    ]
    if rank is not None and how == "exact":
        problems.append(f"rank = {rank}: an exact combination keeps all ranks; truncate with how = 'svd'")
    if rank is not None and rank < 1:
        problems.append(f"rank = {rank}: at least 1")
    if not 0.0 < density <= 1.0:
        problems.append(f"density = {density}: the share of entries that is kept, above 0 and at most 1")
    if problems:
        raise ConfigError("these adapters cannot be combined so", problems=problems)


def _check_together(adapters: Sequence[Adapter], how: str) -> None:
    """AdapterError, with every finding, if the adapters have no weighted sum of this kind."""
    first, problems = adapters[0], []
    kinds = list(dict.fromkeys(a.method.name for a in adapters))
    if len(kinds) > 1:
        problems.append(f"they are of different methods: {', '.join(kinds)}")
    elif reason := _no_sum(first):
        problems.append(reason)
    elif how != "exact" and not isinstance(first.method, LoraConfig):
        problems.append(f"{how} truncates or thins low-rank weight changes, and {first.method.name} has none: use how = 'exact'")
    for i, adapter in enumerate(adapters):
        here, there = adapter.base, first.base
        if here is not there and (here.fingerprint != there.fingerprint or not here.fingerprint):
            problems.append(f"adapter {i + 1} is on another base ({here.name or 'unnamed'}) than the first ({there.name or 'unnamed'})")
        if getattr(adapter.method, "use_dora", False):
            problems.append(f"adapter {i + 1} is a DoRA: it divides by the norm of W + BA, so what it adds is no sum with what others add")
        if experts := [s.name for s in adapter.sites if s.experts]:
            problems.append(f"adapter {i + 1} acts on experts ({experts[0]}), and their factors are not added up")
        if routers := [s.name for s in adapter.sites if s.router and not s.saved]:
            problems.append(f"adapter {i + 1} acts on routers of experts ({routers[0]}), and their factors are not added up")
        if adapter.method.invocation:
            problems.append(f"adapter {i + 1} is an aLoRA: it is on after its invocation tokens alone, and a sum is on for every token")
        if saved := [s.name for s in adapter.sites if s.saved]:
            problems.append(
                f"adapter {i + 1} holds {', '.join(saved[:4])} trained in full: a copy replaces a module and cannot be added up"
            )
    if problems:
        raise AdapterError("these adapters cannot be combined", problems=problems, fix="combine others, or merge them into the base")


def _no_sum(adapter: Adapter) -> str:
    """Why adapters of this one's method have no weighted sum, or ""."""
    name = adapter.method.name
    if isinstance(adapter.method, (LoraConfig, IA3Config, BottleneckConfig)):
        return ""
    if any(not s.name for s in adapter.sites):
        return (
            f"{name} adapters put virtual tokens before the text, and attention shares itself out among all tokens: one set behind the "
            "other is not the sum of what each does, and the average of two sets is a third one that nobody trained"
        )
    return f"no sum of {name} adapters is known"


def _combine_lora(
    adapters: Sequence[Adapter], weights: Sequence[float], how: str, rank: int | None, density: float, seed: int
) -> tuple[Adapter, CombineReport]:
    base, parts = adapters[0].base, [factors_of(a) for a in adapters]
    rank = rank or max(f.rank for p in parts for f in p.values())
    generator = torch.Generator().manual_seed(seed)
    exact: dict[str, Factors] = {}
    found: dict[str, Factors] = {}
    lost, thinned = 0.0, 0.0
    for name, module in base.spec.modules.items():
        here = [(w, p[name]) for w, p in zip(weights, parts, strict=True) if name in p]
        if not here:
            continue
        exact[name] = side_by_side([f.scaled(w) for w, f in here])
        side = min(module.in_features, module.out_features)
        if how in THINNING:
            deltas = [(f.B_OR @ f.A_RI).float() for _, f in here]  # as large as the module, and twice as fast in fp32
            wanted = _thinned(how, deltas, [w for w, _ in here], density, generator)
            found[name] = approximated(wanted, min(rank, side))
            lost += float((wanted - found[name].B_OR @ found[name].A_RI).square().sum())
            thinned += float(wanted.square().sum())
        elif how == "svd":
            found[name] = truncated(exact[name], min(rank, side))
        else:  # more ranks than the module has sides are written with as many as it has, which is still exact
            found[name] = exact[name] if exact[name].rank <= side else truncated(exact[name], side)
    combined = Adapter(base, *lora_from_factors(base, found))
    got = factors_of(combined)
    apart = {name: (distance(got[name], exact[name]), exact[name].norm()) for name in exact}
    rank_error = math.sqrt(lost / thinned) if thinned else None
    report = _report(how, weights, combined, apart, ranks={n: f.rank for n, f in found.items()}, rank_error=rank_error)
    return combined, report


def _thinned(how: str, deltas: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    if how == "ties":
        return ties(deltas, weights, density)
    draw: Callable[..., Tensor] = dare_linear if how == "dare_linear" else dare_ties
    return draw(deltas, weights, density, generator)


def _rounded(first: Adapter, method: Method, wanted: Mapping[str, Tensor], weights: Sequence[float]) -> tuple[Adapter, CombineReport]:
    """The adapter of an exact sum that was computed in fp64, and what its fp32 tensors differ from it by."""
    combined = Adapter(first.base, method, wanted)
    apart = {}
    for site in combined.sites:
        pairs = [(combined.params[site.key(t)].cpu().double(), wanted[site.key(t)]) for t in site.shapes]
        apart[site.name] = (math.hypot(*(float((a - b).norm()) for a, b in pairs)), math.hypot(*(float(b.norm()) for _, b in pairs)))
    return combined, _report("exact", weights, combined, apart, ranks={}, rank_error=None)


def _report(
    how: str,
    weights: Sequence[float],
    combined: Adapter,
    apart: Mapping[str, tuple[float, float]],
    *,
    ranks: Mapping[str, int],
    rank_error: float | None,
) -> CombineReport:
    """apart: module -> (norm of the difference, norm of the exact sum)."""
    errors = {name: relative(*both) for name, both in apart.items()}
    whole = relative(math.hypot(*(d for d, _ in apart.values())), math.hypot(*(n for _, n in apart.values())))
    return CombineReport(how, tuple(weights), combined.num_parameters, whole, errors, ranks, rank_error)


def relative(difference: float, norm: float) -> float:
    """difference / norm; 0 where both are 0."""
    return difference / norm if norm else math.inf if difference else 0.0
