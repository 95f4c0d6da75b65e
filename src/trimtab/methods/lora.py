"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732), and the
configuration of DoRA, whose mathematics is in `dora.py`.

    y = W x + b + s · B (A dropout(x))        s = lora_alpha / r, or lora_alpha / √r with use_rslora

W [O, I] frozen; A [r, I] kaiming-uniform(a=√5); B [O, r] zero. On an embedding: y = E[t] + s · Aᵀ[t] Bᵀ with A [r, V] zero, B [H, r]
normal.
Dimensions: I in, O out, r rank, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from trimtab import ops
from trimtab.bases.spec import Module, Spec
from trimtab.errors import ConfigError, first_of
from trimtab.methods import dora
from trimtab.methods.base import BaseView, Method, Packed, Params, Site, TargetedMethod
from trimtab.methods.targets import merge_saved, pattern_value, regex_problem, saved_sites, select, stray_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trimtab.bases.weights import Weight

MAX_RANK = 4096


@dataclass(frozen=True, kw_only=True)
class LoraConfig(TargetedMethod):
    """LoRA's hyperparameters, under peft's names.

    r: rank. lora_alpha: numerator of the scaling; None means 2r. lora_dropout: dropout on the adapter's input, in [0, 1).
    target_modules: "all-linear" by default, which beats attention only at equal size ("LoRA Without Regret").
    rank_pattern, alpha_pattern: r and alpha for modules whose name ends in a match of the key (the first key that matches counts; one that
    matches no targeted module is refused, where peft ignores it).
    layers_to_transform: indices of the layers to act on. use_rslora, use_dora: the variants above.
    """

    peft_type: ClassVar[str] = "LORA"
    name: ClassVar[str] = "lora"
    preset_lr: ClassVar[float] = 1e-3
    """Larger bases want 2e-4."""
    in_peft: ClassVar[bool] = True

    r: int = 16
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] | None = "all-linear"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | tuple[int, ...] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def alpha(self) -> float:
        """lora_alpha, with its default written out."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * self.r

    def problems(self) -> list[str]:
        ranks: dict[str, int] = {"r": self.r} | {f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}
        found = [f"{k} = {v}: a rank is at least 1 and at most {MAX_RANK}" for k, v in ranks.items() if not 1 <= v <= MAX_RANK]
        alphas: dict[str, float | None] = {"lora_alpha": self.lora_alpha} | {
            f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()
        }
        found += [f"{k} = {v}: must be a finite number above 0" for k, v in alphas.items() if v is not None and not (0 < v < math.inf)]
        patterns: dict[str, dict[str, int] | dict[str, float]] = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        found += [f"{option}: {key!r} {problem}" for option, keys in patterns.items() for key in keys if (problem := regex_problem(key))]
        if not 0.0 <= self.lora_dropout < 1.0:
            found.append(f"lora_dropout = {self.lora_dropout}: must be in [0, 1)")
        return found

    @classmethod
    def examples(cls) -> list[Method]:
        return [
            cls(r=4, lora_alpha=8),
            cls(r=8, lora_alpha=12, use_rslora=True, target_modules=None),
            cls(r=4, use_dora=True),
            cls(r=2, rank_pattern={"mlp.*": 6}, alpha_pattern={"mlp.*": 3}, layers_to_transform=(1,)),
        ]

    def sites(self, spec: Spec) -> list[Site]:
        sites, saved, problems = self._places(spec)
        self._refuse(spec, sites, problems)
        return sites + saved

    def sites_to_train(self, spec: Spec) -> list[Site]:
        """`sites`; ConfigError too if a rank is above a module's smaller side: it could learn no more than that side's rank. Adapters
        from elsewhere have such ranks (PiSSA's, converted to LoRA, have twice r) and are computed as they are."""
        sites, saved, problems = self._places(spec)
        sides = {s.name: min(spec.modules[s.name].in_features, spec.modules[s.name].out_features) for s in sites}
        high = [f"{s.name}: rank {s.rank} is above its smaller side {sides[s.name]}" for s in sites if s.rank > sides[s.name]]
        self._refuse(spec, sites, high + problems)
        return sites + saved

    def _places(self, spec: Spec) -> tuple[list[Site], list[Site], list[str]]:
        """(sites with factors, sites trained in full, modules that are both)."""
        sites, saved = [self._site(m) for m in self._targets(spec)], saved_sites(spec, self.modules_to_save)
        names = {s.name for s in sites}
        return sites, saved, [f"{s.name} is both in target_modules and in modules_to_save" for s in saved if s.name in names]

    def _refuse(self, spec: Spec, sites: Sequence[Site], problems: list[str]) -> None:
        names = [s.name for s in sites]
        stray = self._stray_keys(spec, names)
        if stray or problems:
            found, short = stray + problems, dict.fromkeys(n.rpartition(".")[2] for n in names)
            shown = first_of(found, 8)
            fixes = [f"correct these keys, or take them away; targeted are: {', '.join(short)}"] if stray else []
            fixes += ["lower r or rank_pattern, or exclude these modules"] if problems else []
            raise ConfigError(f"LoRA cannot attach to this {spec.model_type} base", problems=shown, fix="; ".join(fixes))

    def _targets(self, spec: Spec) -> list[Module]:
        try:
            return select(
                spec,
                self.target_modules if self.target_modules is not None else spec.defaults.lora_targets,
                excluded=self.exclude_modules,
                layers=self.layers_to_transform,
                kinds=("linear", "conv1d") if self.use_dora else ("linear", "conv1d", "embedding"),
            )
        except ConfigError as e:  # which modules are meant is not known; a key that no module at all has is wrong whichever they are
            raise ConfigError(e.message, problems=[*e.problems, *self._stray_keys(spec, list(spec.modules))], fix=e.fix) from None

    def _stray_keys(self, spec: Spec, targeted: Sequence[str]) -> list[str]:
        ranks, alphas = (stray_keys(spec, p, getattr(self, p), targeted) for p in ("rank_pattern", "alpha_pattern"))
        return ranks + alphas

    def _site(self, module: Module) -> Site:
        r = pattern_value(self.rank_pattern, module.name, self.r)
        alpha = pattern_value(self.alpha_pattern, module.name, self.alpha)
        scaling = alpha / math.sqrt(r) if self.use_rslora else alpha / r
        if module.kind == "embedding":
            shapes: dict[str, tuple[int, ...]] = {"lora_embedding_A": (r, module.in_features), "lora_embedding_B": (module.out_features, r)}
        else:
            shapes = {"lora_A.weight": (r, module.in_features), "lora_B.weight": (module.out_features, r)}
        if self.use_dora:
            shapes["lora_magnitude_vector"] = (module.out_features,)
        return Site(module.name, shapes, rank=r, scaling=scaling)

    def init(self, site: Site, base: BaseView, generator: torch.Generator) -> dict[str, Tensor]:
        if site.saved:
            return base.parameters_of(site.name)
        import torch

        params = {name: torch.zeros(shape) for name, shape in site.shapes.items()}
        if "lora_embedding_B" in params:
            params["lora_embedding_B"].normal_(generator=generator)
        else:
            torch.nn.init.kaiming_uniform_(params["lora_A.weight"], a=math.sqrt(5), generator=generator)
        if self.use_dora:
            params["lora_magnitude_vector"] = dora.norm(base.matrix(site.name), None, None)
        return params

    def pack(self, site: Site, params: Params, dtype: torch.dtype, matrix: Weight | None) -> Packed:
        if site.saved:
            return Packed(ops.replace, {k: v.to(dtype) for k, v in params.items()})
        A, B = _factors(params)
        if self.use_dora:
            assert matrix is not None
            return dora.pack(A, site.scaling * B, params["lora_magnitude_vector"], matrix, self.lora_dropout)
        if not self.lora_dropout and "lora_A.weight" in params and ops.trains_grouped(A, B, dtype):
            return Packed(ops.lora_grouped, {}, factors=ops.Factors(A, B, site.scaling, dtype))
        kernel = ops.lora_embedding if "lora_embedding_A" in params else ops.lora
        return Packed(kernel, {"A": A.to(dtype), "B": (site.scaling * B).to(dtype)}, self.lora_dropout)

    def merge(self, site: Site, weight_OI: Tensor, bias_O: Tensor | None, params: Params) -> tuple[Tensor, Tensor | None]:
        if site.saved:
            return merge_saved(site, params)
        A, B = _factors(params)
        merged = (B.float() @ A.float()).mul_(site.scaling)
        if "lora_embedding_A" in params:
            merged = merged.T  # an embedding's weight is (V, H)
        merged += weight_OI  # in place: of a large vocabulary's matrix there should be one in fp32
        if self.use_dora:
            merged = dora.merge(merged, params["lora_magnitude_vector"])
        return merged, None if bias_O is None else bias_O.float().clone()


def _factors(params: Params) -> tuple[Tensor, Tensor]:
    if "lora_embedding_A" in params:
        return params["lora_embedding_A"], params["lora_embedding_B"]
    return params["lora_A.weight"], params["lora_B.weight"]
