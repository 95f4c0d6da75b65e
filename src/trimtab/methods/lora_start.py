"""Where LoRA's factors start: peft's `init_lora_weights`.

    true          A kaiming-uniform(a=√5), B zero; on an embedding A zero, B normal
    gaussian      A normal with deviation 1/r, B zero
    pissa         s B A is W cut to its r largest singular values (Meng et al. 2024, arXiv:2404.02948); pissa_niter_N: found by N rounds of
                  subspace iteration (Halko et al. 2011), which takes seconds where the exact decomposition takes minutes
    olora         B, A: the first r columns of Q and rows of R, W = QR (Büyükakyüz 2024, arXiv:2406.01775)
    eva           A: the directions in which a module's inputs on the variant's own rows vary most, B zero; ranks by how much these
                  explain (Paischer et al. 2024, arXiv:2410.07170). `train.eva` finds them, since only a run has rows
    loftq         B A is what packing took from W, cut to rank r (Li et al. 2023, arXiv:2310.08659, one round): a quantised base alone

peft subtracts s B₀ A₀ of pissa and olora from the base's weight. Here the base is shared, so the subtraction is the adapter's: it computes
s (B A - B₀ A₀) x with the start B₀, A₀ kept beside B and A, which is a LoRA of twice the rank,

    B A - B₀ A₀ = [B - B₀, B₀] [A; A - A₀],

and is saved as one. In this form a new adapter adds exactly 0, and what training has changed is not rounded away against what was there.

Dimensions: I in, O out, r rank; W [O, I].
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trimtab.methods.base import BaseView, Params, Site

A, B = "lora_A.weight", "lora_B.weight"
A0, B0 = "lora_A.start", "lora_B.start"
"""The factors at the start, where they are subtracted; they do not train."""
KINDS = ("gaussian", "pissa", "pissa_niter_N", "olora", "loftq", "eva")
EVA: Mapping[str, float | bool] = {"rho": 2.0, "tau": 0.99, "use_label_mask": True, "whiten": False, "adjust_scaling_factors": True}
"""The keys of `eva_config` with peft's defaults. rho: how many times its r a module's rank may become. tau: cosine similarity from which
on a direction is settled. use_label_mask: inputs at supervised tokens alone. whiten: directions over the roots of their singular values.
adjust_scaling_factors: a module keeps its scaling when its rank changes."""


def problem(kind: bool | str) -> str:
    """What is wrong with a value of `init_lora_weights`; "" if nothing is."""
    if kind is True or kind in KINDS[:2] + KINDS[3:] or re.fullmatch(r"pissa_niter_[1-9][0-9]{0,3}", str(kind)):
        return ""
    return f"init_lora_weights = {kind!r}: one of true, {', '.join(KINDS)}"


def eva_problems(config: Mapping[str, float | bool]) -> list[str]:
    """What is wrong with an `eva_config`."""
    found = [f"eva_config: unknown key {k!r}{nearest(k, EVA)}" for k in config if k not in EVA]
    flags = [k for k, v in config.items() if isinstance(EVA.get(k), bool) and v not in (True, False)]
    found += [f"eva_config.{k} = {config[k]!r}: true or false" for k in flags]
    numbers = {k: float(config[k]) for k in ("rho", "tau") if k in config}
    if not 1 <= numbers.get("rho", 1) <= 1000:
        found.append(f"eva_config.rho = {config['rho']}: at least 1 (no rank moves from module to module), and at most 1000")
    if not 0 < numbers.get("tau", 0.5) < 1:
        found.append(f"eva_config.tau = {config['tau']}: a cosine similarity, above 0 and below 1")
    return found


def subtracted(kind: bool | str) -> bool:
    """Whether the start is a part of the base's weight, which the adapter takes away again."""
    return str(kind).startswith(("pissa", "olora"))


def start(kind: bool | str, site: Site, base: BaseView, generator: torch.Generator) -> dict[str, Tensor]:
    """A and B of a linear layer, fp32, on the CPU; of the starts that are subtracted, A0 and B0 too."""
    import torch

    shape_A, shape_B = site.shapes[A], site.shapes[B]
    if kind == "eva":
        raise ConfigError(
            "init_lora_weights = 'eva': it begins with what the base computes on a variant's rows", fix="train the variant from a run file"
        )
    if kind is True or kind == "gaussian":
        factor = torch.empty(shape_A, dtype=torch.float32)
        if kind is True:
            torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
        else:
            factor.normal_(std=1 / site.rank, generator=generator)
        return {A: factor, B: torch.zeros(shape_B, dtype=torch.float32)}
    if kind == "loftq":
        lost_OI = base.unpacked(site.name).float() - base.matrix(site.name).dense().float().cpu()
        factor_B, factor_A = _halves(*_svd(lost_OI), site.rank)
        return {A: factor_A.contiguous(), B: (factor_B / site.scaling).contiguous()}
    W_OI = base.matrix(site.name).dense().float().cpu()
    if kind == "olora":
        Q, R = torch.linalg.qr(W_OI)
        factor_B, factor_A = Q[:, : site.rank], R[: site.rank]
    else:
        found = _svd(W_OI) if kind == "pissa" else _largest(W_OI, site.rank, int(str(kind).rpartition("_")[2]), generator)
        U, S, Vh = found
        factor_B, factor_A = _halves(U, S / site.scaling, Vh, site.rank)
    params = {A: factor_A.contiguous(), B: factor_B.contiguous()}
    return params | {A0: params[A].clone(), B0: params[B].clone()}


def factors(params: Params) -> tuple[Tensor, Tensor]:
    """(A, B) as they are multiplied: with the start taken away, where there is one."""
    import torch

    if "lora_embedding_A" in params:
        return params["lora_embedding_A"], params["lora_embedding_B"]
    if A0 not in params:
        return params[A], params[B]
    return torch.cat([params[A], params[A] - params[A0]]), torch.cat([params[B] - params[B0], params[B0]], 1)


def _halves(U: Tensor, S: Tensor, Vh: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """U √S and √S Vh of the r largest."""
    root = S[:r].sqrt()
    return U[:, :r] * root, root[:, None] * Vh[:r]


def _svd(W_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    return U, S, Vh


def _largest(W_OI: Tensor, r: int, rounds: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of the r largest singular values, by subspace iteration from random directions."""
    import torch

    Q, _ = torch.linalg.qr(W_OI @ torch.randn(W_OI.shape[1], r, dtype=torch.float32, generator=generator))
    for _ in range(rounds):
        Q, _ = torch.linalg.qr(W_OI @ torch.linalg.qr(W_OI.T @ Q)[0])
    U, S, Vh = _svd(Q.T @ W_OI)
    return Q @ U, S, Vh
