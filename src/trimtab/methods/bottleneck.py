"""Bottleneck adapters: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2020 (arXiv:2005.00247), and the parallel form of He et al.
2021 (arXiv:2110.04366).

    y = h' + s · (U f(D h + d) + u)       houlsby, pfeiffer: h = h' = the sub-layer's output, before the residual addition
                                          parallel: h = the MLP's input, h' = the MLP's output

D [b, H] normal(0.02), d zero; U [H, b] zero and u zero, so that a new adapter computes what the base computes. b = max(1, H //
reduction_factor). f is a non-linearity. Houlsby acts after attention and after the MLP of each layer, Pfeiffer after the MLP, parallel
beside the MLP. Because f is between the two matrices, the adapter cannot be merged into a weight. Dimensions: H hidden, b bottleneck.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trimtab import ops
from trimtab.bases.spec import Spec
from trimtab.errors import ConfigError, NotMergeable, nearest
from trimtab.methods.base import BaseView, Method, Packed, Params, Site
from trimtab.ops.names import NON_LINEARITIES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trimtab.bases.weights import Weight

VARIANTS = ("houlsby", "pfeiffer", "parallel")


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(Method):
    """Hyperparameters, under AdapterHub's names.

    variant: houlsby, pfeiffer or parallel. reduction_factor: hidden size over bottleneck size. non_linearity: relu, gelu, silu, tanh,
    leakyrelu, sigmoid, linear. scaling: s, a factor of what is added. dropout: on the bottleneck's activations, in [0, 1).
    layers_to_transform: indices of the layers to act on.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    name: ClassVar[str] = "bottleneck"
    preset_lr: ClassVar[float] = 1e-3
    """Larger bases want 2e-4."""
    mergeable: ClassVar[bool] = False

    variant: str = "houlsby"
    reduction_factor: float = 16
    non_linearity: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    layers_to_transform: int | tuple[int, ...] | None = None

    def problems(self) -> list[str]:
        found = []
        if self.variant not in VARIANTS:
            found.append(f"variant = {self.variant!r}{nearest(self.variant, VARIANTS)}: one of {', '.join(VARIANTS)}")
        if self.non_linearity not in NON_LINEARITIES:
            found.append(
                f"non_linearity = {self.non_linearity!r}{nearest(self.non_linearity, NON_LINEARITIES)}: one of {', '.join(NON_LINEARITIES)}"
            )
        if not 0 < self.reduction_factor < math.inf:
            found.append(f"reduction_factor = {self.reduction_factor}: must be a finite number above 0")
        if not math.isfinite(self.scaling) or self.scaling == 0:
            found.append(f"scaling = {self.scaling}: must be a finite number other than 0")
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout = {self.dropout}: must be in [0, 1)")
        return found

    @classmethod
    def examples(cls) -> list[Method]:
        return [
            cls(reduction_factor=4),
            cls(reduction_factor=8, variant="pfeiffer", non_linearity="gelu"),
            cls(reduction_factor=4, variant="parallel", non_linearity="silu", scaling=4.0),
        ]

    def sites(self, spec: Spec) -> list[Site]:
        wanted = range(spec.num_layers) if self.layers_to_transform is None else self.layers_to_transform
        wanted = (wanted,) if isinstance(wanted, int) else tuple(wanted)
        absent = [i for i in wanted if not 0 <= i < spec.num_layers]
        if absent or not wanted:
            raise ConfigError(f"layers_to_transform = {list(wanted)}: this base has layers 0..{spec.num_layers - 1}")
        H, b = spec.hidden_size, max(1, int(spec.hidden_size // self.reduction_factor))
        shapes = {"adapter_down.weight": (b, H), "adapter_down.bias": (b,), "adapter_up.weight": (H, b), "adapter_up.bias": (H,)}
        names: list[str] = []
        for i in sorted(set(wanted)):
            layer = spec.layers[i]
            if layer.mlp is None:
                raise ConfigError(
                    f"{layer.name} of this {spec.model_type} base has no module of its own for its MLP, or several, so a bottleneck "
                    "adapter has no place there",
                    fix="use LoRA, or leave the layer out of layers_to_transform",
                )
            names += [layer.attention_output] if self.variant == "houlsby" else []
            names.append(layer.mlp)
        return [Site(name, shapes, rank=b, scaling=self.scaling) for name in names]

    def init(self, site: Site, base: BaseView, generator: torch.Generator) -> dict[str, Tensor]:
        import torch

        params = {name: torch.zeros(shape, dtype=torch.float32) for name, shape in site.shapes.items()}
        params["adapter_down.weight"].normal_(std=0.02, generator=generator)
        return params

    def pack(self, site: Site, params: Params, dtype: torch.dtype, matrix: Weight | None) -> Packed:
        short = {"D": "adapter_down.weight", "d": "adapter_down.bias", "U": "adapter_up.weight", "u": "adapter_up.bias"}
        tensors = {k: (params[name] * site.scaling if k in "Uu" else params[name]).to(dtype) for k, name in short.items()}
        return Packed(ops.Bottleneck(self.non_linearity, self.variant == "parallel"), tensors, self.dropout)

    def merge(self, site: Site, weight_OI: Tensor, bias_O: Tensor | None, params: Params) -> tuple[Tensor, Tensor | None]:
        raise NotMergeable(
            f"a bottleneck adapter has a non-linearity ({self.non_linearity}) between its matrices, so it cannot be folded into a weight"
        )
