"""Exact weighted sums of IA³ and of bottleneck adapters, in fp64. They are of one method on one base: who calls this has checked that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.errors import AdapterError
from trimtab.methods import BottleneckConfig, IA3Config, Method

if TYPE_CHECKING:
    from trimtab.store.adapter import Adapter


def sum_ia3(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
    """l = 1 + Σ wᵢ (lᵢ - 1) at every module that any of them scales; lᵢ = 1 where adapter i does not."""
    sites = {(s.name, s.feedforward): s for a in adapters for s in a.sites}
    torn = [name for name, feedforward in sites if feedforward and (name, False) in sites]
    if torn:
        problems = [f"{name}: one scales its input, another its output, and no vector does both" for name in torn]
        raise AdapterError("these IA3 adapters cannot be combined", problems=problems)
    method = IA3Config(
        target_modules=tuple(name for name, _ in sites), feedforward_modules=tuple(name for name, feedforward in sites if feedforward)
    )
    summed = {}
    for site in method.sites(adapters[0].base.spec):
        key = site.key("ia3_l")
        moved = [w * (a.params[key].detach().cpu().double() - 1.0) for w, a in zip(weights, adapters, strict=True) if key in a.params]
        summed[key] = 1.0 + sum(moved, torch.zeros(site.shapes["ia3_l"], dtype=torch.float64))
    return method, summed


def sum_bottleneck(adapters: Sequence[Adapter], weights: Sequence[float]) -> tuple[Method, dict[str, Tensor]]:
    """Bottlenecks side by side: D and d concatenated, wᵢ sᵢ Uᵢ concatenated, u = Σ wᵢ sᵢ uᵢ. Where one does not act, its part is zero."""
    methods = [a.method for a in adapters if isinstance(a.method, BottleneckConfig)]
    _refuse_different(methods)
    spec, widths = adapters[0].base.spec, [a.sites[0].rank for a in adapters]
    houlsby = any(m.variant == "houlsby" for m in methods)
    layers = sorted({layer for a in adapters for layer, of in enumerate(spec.layers) if of.mlp in {s.name for s in a.sites}})
    method = BottleneckConfig(
        variant="houlsby" if houlsby else methods[0].variant,
        reduction_factor=reduction_factor(spec.hidden_size, sum(widths)),
        non_linearity=methods[0].non_linearity,
        layers_to_transform=None if len(layers) == spec.num_layers else tuple(layers),
    )
    summed: dict[str, Tensor] = {}
    for site in method.sites(spec):
        for name, shape in site.shapes.items():
            summed[site.key(name)] = torch.zeros(shape, dtype=torch.float64)
        at = 0
        for adapter, weight, width in zip(adapters, weights, widths, strict=True):
            if (own := next((s for s in adapter.sites if s.name == site.name), None)) is not None:
                D, d, U, u = (adapter.params[site.key(name)].detach().cpu().double() for name in site.shapes)
                factor = weight * own.scaling
                summed[site.key("adapter_down.weight")][at : at + width] = D
                summed[site.key("adapter_down.bias")][at : at + width] = d
                summed[site.key("adapter_up.weight")][:, at : at + width] = factor * U
                summed[site.key("adapter_up.bias")] += factor * u
            at += width
    return method, summed


def _refuse_different(methods: Sequence[BottleneckConfig]) -> None:
    problems = []
    activations = list(dict.fromkeys(m.non_linearity for m in methods))
    if len(activations) > 1:
        problems.append(f"their non-linearities differ ({', '.join(activations)}), and one bottleneck has one")
    if len({m.variant == "parallel" for m in methods}) > 1:
        problems.append("some read the MLP's input (parallel) and some its output, and one bottleneck reads one")
    if problems:
        raise AdapterError("these bottleneck adapters cannot be combined", problems=problems)


def reduction_factor(hidden_size: int, width: int) -> float:
    """The factor from which a configuration computes this bottleneck width again, whatever the division rounds to."""
    factor = hidden_size / width
    while int(hidden_size // factor) < width:
        factor = math.nextafter(factor, 0.0)
    return factor
