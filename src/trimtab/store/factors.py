"""The algebra of LoRA's factors: sizes, differences and truncations of ΔW = B A, without ever forming ΔW.

Both factors go through a QR decomposition, after which everything happens in a small square core: with B = Q R and Aᵀ = P S,
ΔW = Q (R Sᵀ) Pᵀ, and R Sᵀ has ΔW's singular values. Computed in fp64; results are fp32. Knows adapters, but no files.

Dimensions: I in, O out, R rank (of several adapters side by side: the sum of theirs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.bases.spec import Spec
from trimtab.methods import LoraConfig
from trimtab.methods.targets import matches

if TYPE_CHECKING:
    from trimtab.model import Base
    from trimtab.store.adapter import Adapter


@dataclass(frozen=True)
class Factors:
    """ΔW = B A of one module, the scaling folded into B; fp64 on the CPU. Of an embedding, ΔW is the transposed table [H, V]."""

    A_RI: Tensor
    B_OR: Tensor

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]

    def scaled(self, weight: float) -> Factors:
        """weight · ΔW."""
        return Factors(self.A_RI, weight * self.B_OR)

    def core(self) -> tuple[Tensor, Tensor, Tensor]:
        """(Q, R Sᵀ, P) with ΔW = Q (R Sᵀ) Pᵀ, Q and P with orthonormal columns."""
        Q, R = torch.linalg.qr(self.B_OR)
        P, S = torch.linalg.qr(self.A_RI.T)
        return Q, R @ S.T, P

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius)."""
        return float(self.core()[1].norm())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U, singular values in descending order, Vᵀ) of ΔW."""
        Q, core, P = self.core()
        U, sizes, Vh = torch.linalg.svd(core)
        return Q @ U[:, : len(sizes)], sizes, Vh[: len(sizes)] @ P.T


def side_by_side(parts: Sequence[Factors]) -> Factors:
    """Σ ΔWᵢ exactly: ranks concatenated."""
    return Factors(torch.cat([p.A_RI for p in parts]), torch.cat([p.B_OR for p in parts], 1))


def distance(one: Factors, other: Factors) -> float:
    """‖ΔW₁ - ΔW₂‖ (Frobenius)."""
    return side_by_side([one, other.scaled(-1.0)]).norm()


def balanced(U_OR: Tensor, sizes_R: Tensor, Vh_RI: Tensor, rank: int) -> Factors:
    """The `rank` largest parts of an SVD, each singular value split evenly over both factors: neither rounds worse than the other."""
    root = sizes_R[:rank].sqrt()
    return Factors(root.unsqueeze(1) * Vh_RI[:rank], U_OR[:, :rank] * root)


def truncated(factors: Factors, rank: int) -> Factors:
    """The best approximation of ΔW of at most this rank (Eckart-Young)."""
    return balanced(*factors.svd(), rank)


def approximated(delta_OI: Tensor, rank: int) -> Factors:
    """The best approximation of at most this rank of a ΔW that is no product of small factors.

    Through the eigenvectors U of the smaller of ΔW ΔWᵀ and ΔWᵀ ΔW: ΔW's projection on the largest of them is U (Uᵀ ΔW).
    """
    wide = delta_OI.shape[0] <= delta_OI.shape[1]
    M = delta_OI if wide else delta_OI.T
    U = torch.linalg.eigh(M @ M.T)[1].flip(-1)[:, :rank]
    rows = U.T @ M
    root = rows.norm(dim=1, keepdim=True).sqrt()
    safe = torch.where(root > 0, root, 1.0)
    left, right = U * root.T, rows / safe
    return Factors(right, left) if wide else Factors(left.T, right.T)


def factors_of(adapter: Adapter) -> dict[str, Factors]:
    """module -> its factors, of a LoRA adapter; modules trained in full are left out."""
    found = {}
    for site in adapter.sites:
        if not site.saved:
            A, B = (adapter.params[site.key(name)].detach().to("cpu", torch.float64) for name in list(site.shapes)[:2])
            found[site.name] = Factors(A, site.scaling * B)
    return found


def lora_from_factors(
    base: Base, factors: Mapping[str, Factors], saved: Mapping[str, Mapping[str, Tensor]] | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(method, tensors by `Site.key`) of the LoRA whose ΔW these are. Scaling is 1 everywhere: alpha equals the rank, module by module.

    saved: modules trained in full, name -> parameters, carried along.
    """
    ranks = {name: f.rank for name, f in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {name: rank for name, rank in ranks.items() if rank != usual}
    method = LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=short_targets(base.spec, list(factors)),
        rank_pattern=unusual,
        alpha_pattern={name: float(rank) for name, rank in unusual.items()},
        modules_to_save=tuple(saved) if saved else None,
    )
    params: dict[str, Tensor] = {}
    for site in method.sites(base.spec):
        if site.saved:
            assert saved is not None
            params |= {site.key(name): saved[site.name][name] for name in site.shapes}
            continue
        assert site.scaling == 1.0 and site.rank == ranks[site.name], site
        both = (factors[site.name].A_RI, factors[site.name].B_OR)
        params |= {site.key(n): t.contiguous() for n, t in zip(site.shapes, both, strict=True)}
    return method, params


def short_targets(spec: Spec, names: Sequence[str]) -> tuple[str, ...]:
    """target_modules for exactly these modules: their last parts ("q_proj", …) where those name no other module, else the whole names."""
    short = tuple(dict.fromkeys(n.rpartition(".")[2] for n in names))
    return short if {m for m in spec.modules if matches(m, short)} == set(names) else tuple(names)
