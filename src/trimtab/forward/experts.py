"""The experts of a layer under adapters: what stands in for their module's forward where the batch has edits there.

transformers' MoE classes share one interface: a module holds `gate_up_proj` (or `up_proj`) and `down_proj`, 3-D parameters, and is called
with rows, the experts of each row, and their weights. Here the same is computed with rows grouped by (adapter, expert) (`ops.experts`).
Without edits, on dense matrices, the class's own forward runs. `agrees` compares both on a small stand-in before an adapter may act there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab import ops
from trimtab.bases.weights.experts import Experts
from trimtab.errors import BaseError
from trimtab.forward.hosts import AtHand
from trimtab.forward.replica import FAR, apart
from trimtab.memory import ran_out

FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"
"""The names of the matrices that read hidden states, and of the one that gives the result."""
ROWS = 13


class _Around:
    """One matrix of all experts, as a kernel sees it."""

    def __init__(self, matrices: Experts, bias_EO: Tensor | None, routes: ops.Routes, site: int):
        self.matrices, self.bias_EO, self.routes, self.site = matrices, bias_EO, routes, site


class ExpertsHost:
    """Stands in for the forward of one module of experts. sites: parameter's name -> the number of its site, for dropout."""

    of_trimtab = True  # see `replica.altered`

    def __init__(self, at_hand: AtHand, name: str, module: Any, sites: dict[str, int]):
        self.at_hand, self.name, self.module, self.sites = at_hand, name, module, sites
        self.packed = any(Experts(module, p).packed is not None for p in sites)
        self.original: Callable[..., Tensor] = module.forward

    def __call__(self, x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        batch = self.at_hand.batch
        edits = {} if batch is None else {p: g for p in self.sites if (g := batch.mix.groups.get(f"{self.name}.{p}"))}
        if not edits and not self.packed:
            return self.original(x_TH, expert_TK, weight_TK)
        if batch is not None and edits and len(x_TH) != batch.total:
            raise BaseError(f"{self.name} is called with {len(x_TH)} rows of the {batch.total} of a batch: adapters cannot act there")

        def product(parameter: str, x_PI: Tensor, routes: ops.Routes) -> Tensor:
            matrices, bias_EO = _read(self.module, parameter)
            for group in edits.get(parameter, ()):
                if batch is not None and (rows := batch.rows(group.members)) is not None:
                    return group.kernel(x_PI, _Around(matrices, bias_EO, routes, self.sites[parameter]), group.packs, rows)
            return ops.experts_product(x_PI, matrices, routes, bias_EO)

        return run_experts(self.module, product, x_TH, expert_TK, weight_TK)


def _read(module: Any, parameter: str) -> tuple[Experts, Tensor | None]:
    bias: Tensor | None = module._parameters.get(f"{parameter}_bias") if module.has_bias else None
    return Experts(module, parameter), bias


def run_experts(
    module: Any, product: Callable[[str, Tensor, ops.Routes], Tensor], x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor
) -> Tensor:
    """What transformers' `grouped_mm_experts_forward` computes, [T, H]. product: (parameter's name, x of each pair, routes) -> y."""
    routes = ops.Routes(expert_TK, module.num_experts)
    inner = product(FIRST[0] if module.has_gate else FIRST[1], routes.gather(x_TH), routes)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    y_PH = product(LAST, inner, routes)
    if module.has_post_expert_norm:
        y_PH = module.post_expert_norm(y_PH)
    return routes.scatter(y_PH, weight_TK).to(x_TH.dtype)


@torch.no_grad()
def agrees(module: Any) -> bool:
    """Whether a module of experts computes what `run_experts` does, compared on random rows. It is a stand-in in fp32."""
    if not all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed")):
        return False
    first = module._parameters.get(FIRST[0] if module.has_gate else FIRST[1])
    if first is None or first.dim() != 3 or LAST not in module._parameters:
        return False
    random, width = torch.Generator().manual_seed(0), first.shape[1 if module.is_transposed else 2]
    x_TH = torch.randn(ROWS, width, generator=random, dtype=torch.float32).to(first.device)
    chosen = torch.rand(ROWS, module.num_experts, generator=random, dtype=torch.float32).to(first.device).topk(min(2, module.num_experts))

    def product(parameter: str, x_PI: Tensor, routes: ops.Routes) -> Tensor:
        matrices, bias_EO = _read(module, parameter)
        return ops.experts_product(x_PI, matrices, routes, bias_EO)

    try:
        theirs = type(module).forward(module, x_TH, chosen.indices, chosen.values)
        return apart(run_experts(module, product, x_TH, chosen.indices, chosen.values), theirs) <= FAR[torch.float32]
    except Exception as error:  # it is called otherwise, or has other parts: the base can be used, but for adapters on its experts
        if ran_out(error):
            raise
        return False
