"""An adapter: a method, its tensors at its sites, and what is known of where they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.methods import METHODS
from trimtab.methods.base import Method, Site

if TYPE_CHECKING:
    from trimtab.model import Base


class Adapter:
    """One adapter on one base. Two adapters are equal only if they are the same object, so that an adapter can key what is packed from it.

    params: tensors by `Site.key`, fp32, on the base's device. info: what `trimtab.json` says beside them (empty for a fresh adapter).
    """

    def __init__(self, base: Base, method: Method, params: dict[str, Tensor], *, info: dict[str, Any] | None = None):
        self.base, self.method, self.params, self.info = base, method, params, info or {}
        self.sites: list[Site] = method.sites(base.spec)

    @classmethod
    def create(cls, base: Base, method: Method, *, seed: int = 0) -> Adapter:
        """A freshly initialised adapter; equal seeds give equal tensors. ConfigError where the method finds no place in this base."""
        if method.peft_type not in METHODS:
            raise ConfigError(f"{type(method).__name__} is not an adapter", fix="full fine-tuning trains from a run file: method: full")
        generator = torch.Generator().manual_seed(seed)
        params = {}
        for site in method.sites(base.spec):
            for name, tensor in method.init(site, base, generator).items():
                params[site.key(name)] = tensor.to(base.device, torch.float32)
        return cls(base, method, params)

    @property
    def num_parameters(self) -> int:
        """How many numbers train."""
        return sum(t.numel() for t in self.params.values())
