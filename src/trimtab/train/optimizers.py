"""The optimizers of a variant: what steps which tensors, its state, and how many bytes that takes.

AdamW, Muon and SGD are torch's, Adafactor is transformers', AdamW with moments in 8 bits is `ops.adam8`. Some leave tensors to AdamW: 8
bits are for tensors of `SMALL` numbers or more, Muon is for matrices of hidden layers: not for the head, nor for one of the adapter's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trimtab.methods.head import NAMES

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from trimtab.bases.spec import Spec
    from trimtab.train.options import TrainOptions

WITHOUT_ADAM = ("adafactor", "sgd")
"""Those that AdamW's rates and epsilon say nothing to."""
SMALL = 4096
"""Tensors of fewer numbers keep their moments in fp32, as with bitsandbytes."""
MOMENT = 4
"""Bytes of an fp32 number."""


class Optimizers:
    """What steps a variant's tensors. groups: (tensors by key, the ratio of their rate to the schedule's)."""

    def __init__(self, options: TrainOptions, groups: Iterable[tuple[Mapping[str, Tensor], float]], spec: Spec):
        self.params: dict[str, Tensor] = {}
        self._of: dict[str, Optimizer] = {}
        parts: dict[str, list[dict[str, Any]]] = {}
        for tensors, ratio in groups:
            chosen: dict[str, list[str]] = {}
            for key, p in tensors.items():
                chosen.setdefault(stepped_by(options.optimizer, key, tuple(p.shape), spec), []).append(key)
            self.params |= tensors
            for name, keys in chosen.items():
                parts.setdefault(name, []).append({"params": [tensors[k] for k in keys], "ratio": ratio, "keys": keys})
        self.each = {name: _MAKE[name](part, options) for name, part in parts.items()}
        for optimizer in self.each.values():
            self._of |= {key: optimizer for group in optimizer.param_groups for key in group["keys"]}

    def step(self, lr: float) -> None:
        for optimizer in self.each.values():
            for group in optimizer.param_groups:
                group["lr"] = lr * group["ratio"]
            optimizer.step()

    def clear(self) -> None:
        """Take the gradients away."""
        for p in self.params.values():
            p.grad = None

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(what it is, the tensor's key, value), not copied; a count is an int64 tensor without dimensions."""
        import torch

        for key, p in self.params.items():
            for kind, value in self._of[key].state.get(p, {}).items():
                yield kind, key, torch.tensor(value) if isinstance(value, int) else value

    def forget(self) -> None:
        for optimizer in self.each.values():
            optimizer.state.clear()

    def restore(self, kind: str, key: str, value: Tensor) -> None:
        """Take on a value of `state`; it is copied. A fused AdamW keeps its count of steps, too, where the parameter is."""
        import torch

        p = self.params[key]
        counts = value.dtype == torch.int64 and not value.dim()
        self._of[key].state[p][kind] = int(value) if counts else value.to(p.device, copy=True)


def stepped_by(optimizer: str, key: str, shape: tuple[int, ...], spec: Spec) -> str:
    """The optimizer of a tensor where `optimizer` is asked for: itself, or AdamW."""
    if optimizer == "adamw8bit":
        return optimizer if math.prod(shape) >= SMALL else "adamw"
    if optimizer == "muon":
        ends = key.rpartition(".")[0] in (spec.embedding, spec.head, *NAMES) or "lora_embedding" in key
        return optimizer if len(shape) == 2 and min(shape) > 1 and not ends else "adamw"
    return optimizer


def state_bytes(optimizer: str, shapes: Mapping[str, tuple[int, ...]], spec: Spec) -> int:
    """Of an optimizer's state for tensors of these shapes."""
    return sum(_BYTES[stepped_by(optimizer, key, shape, spec)](shape) for key, shape in shapes.items())


def _adamw8_bytes(shape: tuple[int, ...]) -> int:
    from trimtab.ops.adam8 import BLOCK

    blocks = -(-math.prod(shape) // BLOCK)
    return 2 * blocks * (BLOCK + MOMENT)


def _factored_bytes(shape: tuple[int, ...]) -> int:
    """Means over the last dimension, and over the one before it."""
    if len(shape) < 2:
        return MOMENT * math.prod(shape)
    return MOMENT * (math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1])))


_BYTES: Mapping[str, Callable[[tuple[int, ...]], int]] = {
    "adamw": lambda shape: 2 * MOMENT * math.prod(shape),
    "adamw8bit": _adamw8_bytes,
    "adafactor": _factored_bytes,
    "muon": lambda shape: MOMENT * math.prod(shape),
    "sgd": lambda shape: 0,
}


def _adam(o: TrainOptions) -> dict[str, Any]:
    return {"lr": 0.0, "betas": (o.adam_beta1, o.adam_beta2), "eps": o.adam_epsilon, "weight_decay": o.weight_decay}


def _adamw(groups: list[dict[str, Any]], o: TrainOptions) -> Optimizer:
    import torch

    return torch.optim.AdamW(groups, **_adam(o), fused=True)


def _adamw8(groups: list[dict[str, Any]], o: TrainOptions) -> Optimizer:
    from trimtab.ops.adam8 import AdamW8

    return AdamW8(groups, **_adam(o))


def _adafactor(groups: list[dict[str, Any]], o: TrainOptions) -> Optimizer:
    """With rates from outside, as transformers' Trainer makes it."""
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False, weight_decay=o.weight_decay)


def _muon(groups: list[dict[str, Any]], o: TrainOptions) -> Optimizer:
    """Its steps are as large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so that rates and decay mean the same."""
    import torch

    return torch.optim.Muon(groups, lr=0.0, weight_decay=o.weight_decay, adjust_lr_fn="match_rms_adamw")


def _sgd(groups: list[dict[str, Any]], o: TrainOptions) -> Optimizer:
    import torch

    return torch.optim.SGD(groups, lr=0.0, weight_decay=o.weight_decay)


_MAKE: Mapping[str, Callable[[list[dict[str, Any]], Any], Any]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8,
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _sgd,
}
