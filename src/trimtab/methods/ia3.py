"""IA³: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638).

    feed-forward modules:  y = W (l ∘ x) + b        l [I]
    the others:            y = l ∘ (W x + b)        l [O]

l starts at ones. In files l is (1, I) for feed-forward modules and (O, 1) for the others, as in peft. Dimensions: I in, O out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab import ops
from trimtab.bases.spec import Spec
from trimtab.errors import ConfigError
from trimtab.methods.base import BaseView, Method, Packed, Params, Site, TargetedMethod
from trimtab.methods.targets import matches, merge_saved, saved_sites, select, unmatched

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trimtab.bases.weights import Weight


@dataclass(frozen=True, kw_only=True)
class IA3Config(TargetedMethod):
    """IA³'s hyperparameters, under peft's names.

    target_modules: the family's keys, values and MLP output by default. feedforward_modules: those of them whose *input* is scaled.
    """

    peft_type: ClassVar[str] = "IA3"
    name: ClassVar[str] = "ia3"
    preset_lr: ClassVar[float] = 5e-3
    in_peft: ClassVar[bool] = True

    feedforward_modules: str | tuple[str, ...] | None = None

    @classmethod
    def examples(cls) -> list[Method]:
        return [cls(), cls(target_modules="all-linear", feedforward_modules=())]

    def sites(self, spec: Spec) -> list[Site]:
        targets = self.target_modules if self.target_modules is not None else spec.defaults.ia3_targets
        feedforward = self.feedforward_modules if self.feedforward_modules is not None else spec.defaults.ia3_feedforward
        modules = select(spec, targets, excluded=self.exclude_modules)
        problems = unmatched(spec, feedforward, "feedforward_modules") if feedforward else []
        stray = [m.name for m in spec.modules.values() if matches(m.name, feedforward) and m.name not in {t.name for t in modules}]
        if self.feedforward_modules is not None and stray and self.exclude_modules is None:
            problems.append(f"feedforward_modules names {stray[0]!r}, which target_modules does not")
        saved = saved_sites(spec, self.modules_to_save)
        problems += [f"{s.name} is both in target_modules and in modules_to_save" for s in saved if s.name in {m.name for m in modules}]
        if problems:
            raise ConfigError(f"IA3 cannot attach to this {spec.model_type} base", problems=problems)
        sites = []
        for m in modules:
            ff = matches(m.name, feedforward)
            sites.append(Site(m.name, {"ia3_l": (1, m.in_features) if ff else (m.out_features, 1)}, feedforward=ff))
        return sites + saved

    def init(self, site: Site, base: BaseView, generator: torch.Generator) -> dict[str, Tensor]:
        import torch

        return base.parameters_of(site.name) if site.saved else {"ia3_l": torch.ones(site.shapes["ia3_l"], dtype=torch.float32)}

    def pack(self, site: Site, params: Params, dtype: torch.dtype, matrix: Weight | None) -> Packed:
        if site.saved:
            return Packed(ops.replace, {k: v.to(dtype) for k, v in params.items()})
        kernel = ops.scale_input if site.feedforward else ops.scale_output
        return Packed(kernel, {"g": params["ia3_l"].flatten() - 1.0})

    def merge(self, site: Site, weight_OI: Tensor, bias_O: Tensor | None, params: Params) -> tuple[Tensor, Tensor | None]:
        if site.saved:
            return merge_saved(site, params)
        l_shape = params["ia3_l"].float()  # (1, I) or (O, 1): broadcasts over W [O, I] as it is
        bias = None if bias_O is None else bias_O.float() * (1.0 if site.feedforward else l_shape.flatten())
        return weight_OI.float() * l_shape, bias
