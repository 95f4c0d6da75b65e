"""Small stand-ins for a model's modules, on which two ways of computing are compared before one replaces the other.

A stand-in has a module's class, its settings and its buffers, and random weights. So formulas are compared, and the comparison is equally
sharp for every model: attention attends clearly, no residual hides a layer, and inputs are so small that a norm's epsilon matters. The
reference is the module's own forward in fp32. In another dtype the new code must be about as close to it as the module itself is in that
dtype. Rounding moves both equally far from the reference; a scale of attention that is a tenth too large moves one three times as far.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from trimtab.bases.weights import claimed
from trimtab.bases.weights.packed import PackedLinear
from trimtab.places.shards import without_hooks

WINDOW = 8
"""The sliding window of stand-ins whose original has one: short enough to matter within a few rows."""
PERIOD = 65537
"""Weights repeat after so many values, a prime, so that rows differ: filling large modules with new random numbers takes seconds."""
LARGE = 2**21
"""Matrices of more numbers lie in one another's memory, each with a beginning of its own: stand-ins of a few layers of a large base would
else take more memory than all of a packed base. Nobody writes to them."""
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.004, torch.float16: 0.0005}
"""What rounding once explains of a distance, relative to what is exact."""
FAR = {dtype: 6 * once for dtype, once in ROUNDING.items()}
"""And rounding at each step of a few layers."""
FARTHER = 1.8
"""How much farther than the module itself, in the same dtype, one may be from what is exact."""
SCALARS = (int, float, str, bool, type(None))


def kind(module: nn.Module) -> Hashable:
    """Equal for modules that compute alike, whatever their weights: classes, the forwards that these have now (other packages put theirs on
    transformers' classes), and settings of all that is in them, without their place."""
    found = []
    for name, part in module.named_modules():
        settings = {
            k: v for k, v in vars(part).items() if isinstance(v, SCALARS) and k not in ("layer_idx", "training", "_is_hf_initialized")
        }
        found.append((name, type(part), type(part).forward, tuple(sorted(settings.items()))))
    return tuple(found)


def alike(model: Any) -> Hashable:
    """Equal for models that compute alike, whatever their weights and dtypes: their class, all that is in them, and their config."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("dtype", "_name_or_path")}
    return type(model), kind(model), str(config)


def ours(forward: Any) -> Any:
    """A forward, marked as one that trimtab puts on an instance in place of its class's."""
    forward.of_trimtab = True
    return forward


def let_go(stand_in: nn.Module) -> None:
    """Free a stand-in's parameters. Forwards on its modules hold the modules that hold them, so it would stay until Python looks for such
    circles."""
    for module in stand_in.modules():
        module._parameters.clear()


def altered(module: nn.Module) -> bool:
    """Whether somebody else has put a forward on the instance: what it computes is not known."""
    own = vars(module).get("forward")
    return own is not None and not getattr(own, "of_trimtab", False)


def stand_in(module: nn.Module, dtype: torch.dtype, config: Any = None, replaced: Mapping[int, nn.Module] | None = None) -> Any:
    """A module's stand-in, without what may stand on the instance in place of its forward; the same weights in every dtype, up to rounding
    them to bfloat16. config: in place of its own. replaced: the id of a module inside -> what is copied in its place."""
    return _stand_in(module, _Values(dtype), config, replaced or {})


def _stand_in(module: nn.Module, values: _Values, config: Any, replaced: Mapping[int, nn.Module]) -> Any:
    module = dense_twin(replaced.get(id(module), module))
    made = copy.copy(module)
    fields = made.__dict__
    fields.pop("forward", None)
    without_hooks(fields)
    fields["_parameters"] = {n: None if p is None else values.like(p, n) for n, p in module._parameters.items()}
    fields["_buffers"] = dict(module._buffers)
    packed = {n: m for n, m in module._modules.items() if isinstance(m, PackedLinear) and m.experts}
    for n, experts in packed.items():
        like = torch.empty(*_dense_shape(module, experts), device="meta", dtype=torch.float32)
        fields["_parameters"][n] = values.like(like, n, experts.matrix.device)
    children = {n: m for n, m in module._modules.items() if n not in packed}
    fields["_modules"] = {n: None if m is None else _stand_in(m, values, config, replaced) for n, m in children.items()}
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


def _dense_shape(module: Any, packed: PackedLinear) -> tuple[int, int, int]:
    """The shape that a parameter of experts has where it is dense."""
    outputs = packed.out_features // packed.experts
    return (packed.experts, packed.in_features, outputs) if module.is_transposed else (packed.experts, outputs, packed.in_features)


class _Values:
    """Gives the parameters of one stand-in: matrices that keep the size of what they are applied to, half as large again; norms' weights
    around 1, biases around 0."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self._serial = dtype, count()
        self._shared: dict[tuple[int, torch.device], Tensor] = {}

    def like(self, like: Tensor, name: str, device: torch.device | None = None) -> nn.Parameter:
        """Of this shape. name: the parameter's own, in its module."""
        serial, device = next(self._serial), device or torch.device("cpu" if like.is_meta else like.device)
        if like.numel() > LARGE:
            start = serial * 977 % 1024 * 64  # below PERIOD, and another one for each of 1,024 matrices
            found = self._large(like.shape[-1], like.numel() + PERIOD, device)[start:]
        else:
            values = self._random(serial, like.numel())
            values = 1.5 / math.sqrt(like.shape[-1]) * values if like.dim() > 1 else 0.3 * values + (name != "bias")
            found = self._repeated(values, like.numel(), device)
        return nn.Parameter(found[: like.numel()].view(like.shape), False)

    def _large(self, width: int, size: int, device: torch.device) -> Tensor:
        """The numbers that large matrices of this width share, so many at least."""
        if len(self._shared.get((width, device), ())) < size:
            self._shared[width, device] = self._repeated(1.5 / math.sqrt(width) * self._random(0, PERIOD), size, device)
        return self._shared[width, device]

    @staticmethod
    def _random(seed: int, size: int) -> Tensor:
        return torch.randn(min(PERIOD, size), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)

    def _repeated(self, values: Tensor, size: int, device: torch.device) -> Tensor:
        return values.to(torch.bfloat16).to(device, self.dtype).repeat(-(-size // len(values)))


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
