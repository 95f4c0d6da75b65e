"""Small stand-ins for a model's modules, on which two ways of computing are compared before one replaces the other.

A stand-in has a module's class, its settings and its buffers, and random weights. So formulas are compared, and the comparison is equally
sharp for every model: attention attends clearly, no residual hides a layer, and inputs are so small that a norm's epsilon matters. The
reference is the module's own forward in fp32. In another dtype the new code must be about as close to it as the module itself is in that
dtype. Rounding moves both equally far from the reference; a scale of attention that is a tenth too large moves one three times as far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from trimtab.bases.weights import claimed

WINDOW = 8
"""The sliding window of stand-ins whose original has one: short enough to matter within a few rows."""
PERIOD = 65537
"""Weights repeat after so many values, a prime, so that rows differ: filling large modules with new random numbers takes seconds."""
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.004, torch.float16: 0.0005}
"""What rounding once explains of a distance, relative to what is exact."""
FAR = {dtype: 6 * once for dtype, once in ROUNDING.items()}
"""And rounding at each step of a few layers."""
FARTHER = 1.8
"""How much farther than the module itself, in the same dtype, one may be from what is exact."""
SCALARS = (int, float, str, bool, type(None))


def kind(module: nn.Module) -> Hashable:
    """Equal for modules that compute alike, whatever their weights: classes and settings of all that is in them, without their place."""
    found = []
    for name, part in module.named_modules():
        settings = {
            k: v for k, v in vars(part).items() if isinstance(v, SCALARS) and k not in ("layer_idx", "training", "_is_hf_initialized")
        }
        found.append((name, type(part), tuple(sorted(settings.items()))))
    return tuple(found)


def ours(forward: Any) -> Any:
    """A forward, marked as one that trimtab puts on an instance in place of its class's."""
    forward.of_trimtab = True
    return forward


def altered(module: nn.Module) -> bool:
    """Whether somebody else has put a forward on the instance: what it computes is not known."""
    own = vars(module).get("forward")
    return own is not None and not getattr(own, "of_trimtab", False)


def stand_in(module: nn.Module, dtype: torch.dtype, config: Any = None, replaced: Mapping[int, nn.Module] | None = None) -> Any:
    """A module's stand-in, without what may stand on the instance in place of its forward; the same weights in every dtype, up to rounding
    them to bfloat16. config: in place of its own. replaced: the id of a module inside -> what is copied in its place."""
    return _stand_in(module, dtype, config, replaced or {}, count())


def _stand_in(module: nn.Module, dtype: torch.dtype, config: Any, replaced: Mapping[int, nn.Module], serial: Iterator[int]) -> Any:
    module = dense_twin(replaced.get(id(module), module))
    made = copy.copy(module)
    fields = made.__dict__
    fields.pop("forward", None)
    fields["_parameters"] = {n: None if p is None else _filled(p, n, next(serial), dtype) for n, p in module._parameters.items()}
    fields["_buffers"] = dict(module._buffers)
    fields["_modules"] = {n: None if m is None else _stand_in(m, dtype, config, replaced, serial) for n, m in module._modules.items()}
    if "config" in fields and config is not None:
        fields["config"] = config
    if has_window(module):
        fields["sliding_window"] = WINDOW
    return made


def has_window(of: Any) -> bool:
    """Whether a config, or a module with one, has a sliding window that is shorter than the positions that the base has."""
    most = getattr(getattr(of, "config", of), "max_position_embeddings", None)
    window = getattr(of, "sliding_window", None)
    return window is not None and not (most and window >= most)


def dense_twin(module: nn.Module, most: int | None = None) -> nn.Module:
    """The module; where its matrix is stored in another format, a dense one of its shape, since the values are random anyway. most: of so
    many outputs at most."""
    weight = claimed(module)
    if weight is None or weight.stored_dense:
        return module
    outputs, inputs = min(weight.shape[0], most or weight.shape[0]), weight.shape[1]
    if isinstance(module, nn.Embedding):
        return skip_init(nn.Embedding, outputs, inputs, device=weight.device)
    return skip_init(nn.Linear, inputs, outputs, bias=module.bias is not None, device=weight.device)


def _filled(like: Tensor, name: str, seed: int, dtype: torch.dtype) -> nn.Parameter:
    """Matrices that keep the size of what they are applied to, half as large again; norms' weights around 1, biases around 0."""
    values = torch.randn(min(PERIOD, like.numel()), generator=torch.Generator().manual_seed(seed))
    values = 1.5 / math.sqrt(like.shape[-1]) * values if like.dim() > 1 else 0.3 * values + (name != "bias")
    values = values.to(torch.bfloat16).to("cpu" if like.is_meta else like.device, dtype)
    return nn.Parameter(values.repeat(-(-like.numel() // len(values)))[: like.numel()].view(like.shape), False)


def small_config(config: Any, layers: Sequence[int] = ()) -> Any:
    """A config for stand-ins: these layers only, a window of `WINDOW` where there is one, transformers' own attention."""
    made = copy.deepcopy(config)
    made._attn_implementation = "eager"
    if has_window(made):
        made.sliding_window = WINDOW
    if layers:
        made.num_hidden_layers = len(layers)
        if getattr(made, "layer_types", None):
            made.layer_types = [config.layer_types[i] for i in layers]
    return made


def as_near(ours: Tensor, theirs: Tensor, exact: Tensor) -> bool:
    """Whether what we compute in a dtype is about as near to what is exact as what the module itself computes in it."""
    return apart(ours, exact) <= max(ROUNDING[ours.dtype], FARTHER * min(apart(theirs, exact), FAR[ours.dtype]))


def apart(got: Tensor, exact: Tensor) -> float:
    """How far a result is from what is exact, relative to that."""
    distance = float((got.double() - exact.double()).norm() / exact.double().norm())
    return math.inf if math.isnan(distance) else distance
