"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190).

    in each layer: softmax(q [K_P; K]ᵀ) [V_P; V]        K_P, V_P [N, kv_heads, head_dim] learned

Prefix keys are used as stored, not rotated. Real tokens are at positions N, N+1, …. The tensor is saved as in peft: `prompt_embeddings` [N,
2·L·kv_heads·D], for each token layer by layer, key then value. The optional reparametrisation MLP (embedding → tanh → keys and values) is
for training only, and its output is saved. The initial prefix is the keys and values of a text ("TEXT", which in peft's own comparison more
than doubles the score of a random start), zero, or normal.

Dimensions: N virtual tokens, L layers, D head_dim, H MLP's hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from trimtab.bases.spec import Spec
from trimtab.errors import ConfigError, nearest
from trimtab.methods.base import BaseView, Method, Params, Prefix, Site
from trimtab.methods.prompt import fit, room_for

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INITS = ("TEXT", "RANDOM", "ZERO")
DEFAULT_TEXT = "Read the request with care and answer it briefly, in the form that is asked for."


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(Method):
    """num_virtual_tokens: N, the tokens before each sequence. prefix_init: TEXT, RANDOM or ZERO. prefix_init_text: the text of TEXT,
    repeated or cut to N tokens.

    prefix_projection: train through the MLP, which has its own random start. encoder_hidden_size: the MLP's hidden size; None: the width
    of one layer's keys.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    name: ClassVar[str] = "prefix"
    preset_lr: ClassVar[float] = 3e-2
    mergeable: ClassVar[bool] = False
    in_peft: ClassVar[bool] = True

    num_virtual_tokens: int = 30
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    prefix_init: str = "TEXT"
    prefix_init_text: str = DEFAULT_TEXT

    def problems(self) -> list[str]:
        found = []
        if self.num_virtual_tokens < 1:
            found.append(f"num_virtual_tokens = {self.num_virtual_tokens}: must be at least 1")
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            found.append(f"encoder_hidden_size = {self.encoder_hidden_size}: must be at least 1")
        if self.prefix_init not in INITS:
            found.append(f"prefix_init = {self.prefix_init!r}{nearest(self.prefix_init, INITS)}: one of {', '.join(INITS)}")
        if self.prefix_init == "TEXT" and not self.prefix_projection and not self.prefix_init_text.strip():
            found.append("prefix_init = 'TEXT' needs prefix_init_text")
        return found

    @classmethod
    def examples(cls) -> list[Method]:
        return [cls(num_virtual_tokens=4, prefix_init="RANDOM"), cls(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8)]

    @property
    def fresh_is_base(self) -> bool:
        return False

    def sites(self, spec: Spec) -> list[Site]:
        room_for(self.num_virtual_tokens, spec)
        if not spec.heads_alike:
            raise ConfigError(
                f"the layers of this {spec.model_type} base keep keys and values of different shapes, and a stored prefix has one for all",
                fix=f"use {'prompt tuning or ' * spec.layers_alike}LoRA",
            )
        if spec.layers_share_kv:
            raise ConfigError(
                f"some layers of this {spec.model_type} base attend to keys and values of another; a stored prefix has its own for each",
                fix="use LoRA",
            )
        n, width = self.num_virtual_tokens, spec.kv_width
        flat = 2 * spec.num_layers * width
        if not self.prefix_projection:
            return [Site("", {"prompt_embeddings": (n, flat)})]
        h = self.encoder_hidden_size or width
        shapes = {"embedding.weight": (n, width), "transform.0.weight": (h, width), "transform.0.bias": (h,)}
        return [Site("", shapes | {"transform.2.weight": (flat, h), "transform.2.bias": (flat,)})]

    def init(self, site: Site, base: BaseView, generator: torch.Generator) -> dict[str, Tensor]:
        import torch

        if self.prefix_projection:
            return {name: _fresh(name, shape, site, generator) for name, shape in site.shapes.items()}
        shape = site.shapes["prompt_embeddings"]
        if self.prefix_init == "TEXT":
            keys_LNHD, values_LNHD = base.kv(fit(base.encode(self.prefix_init_text), self.num_virtual_tokens, "prefix_init_text"))
            return {
                "prompt_embeddings": torch.stack([keys_LNHD, values_LNHD], 1).float().flatten(3).permute(2, 0, 1, 3).reshape(shape).cpu()
            }
        flat = torch.zeros(shape, dtype=torch.float32)
        return {"prompt_embeddings": flat if self.prefix_init == "ZERO" else flat.normal_(generator=generator)}

    def prefix(self, spec: Spec, params: Params, dtype: torch.dtype) -> Prefix:
        n, L = self.num_virtual_tokens, spec.num_layers
        flat = _flatten(params) if self.prefix_projection else params["prompt_embeddings"]
        kv_NLkHD = flat.to(dtype).view(n, L, 2, *spec.kv_shape)
        keys, values = kv_NLkHD.permute(2, 1, 0, 3, 4).unbind(0)
        return Prefix(n, kv_LNHD=(keys, values))

    def export(self, params: Mapping[str, Tensor]) -> tuple[Method, dict[str, Tensor]]:
        if not self.prefix_projection:
            return self, dict(params)
        import torch

        rest = {name: t for name, t in params.items() if not name.startswith(("embedding.", "transform."))}  # such as a head
        with torch.no_grad():
            return replace(self, prefix_projection=False, encoder_hidden_size=None), {"prompt_embeddings": _flatten(params)} | rest


def _flatten(params: Params) -> Tensor:
    """The MLP's output, [N, 2·L·kv_heads·D]."""
    from torch.nn.functional import linear

    hidden_NH = linear(params["embedding.weight"], params["transform.0.weight"], params["transform.0.bias"]).tanh()
    return linear(hidden_NH, params["transform.2.weight"], params["transform.2.bias"])


def _fresh(name: str, shape: tuple[int, ...], site: Site, generator: torch.Generator) -> Tensor:
    """torch's own starts: normal for the embedding, uniform(±1/√fan_in) for the linear layers."""
    import torch

    if name == "embedding.weight":
        return torch.randn(shape, dtype=torch.float32, generator=generator)
    bound = 1 / math.sqrt(site.shapes[name.replace("bias", "weight")][1])
    return (torch.rand(shape, dtype=torch.float32, generator=generator) * 2 - 1) * bound
