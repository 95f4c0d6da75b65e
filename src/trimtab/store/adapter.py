"""An adapter: a method, its tensors at its sites, and what is known of where they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.methods import METHODS
from trimtab.methods.base import Method, Site
from trimtab.store.folder import read_folder, write_folder
from trimtab.store.merge import MergeReport, merge_into

if TYPE_CHECKING:
    from trimtab.model import Base


class Adapter:
    """One adapter on one base. Two adapters are equal only if they are the same object, so that an adapter can key what is packed from it.

    params: tensors by `Site.key`, fp32, on the base's device. info: what `trimtab.json` says beside them (empty for a fresh adapter).
    verified: False where it was loaded from a folder whose trimtab.json is missing or names no base: only names and shapes are checked.
    """

    def __init__(self, base: Base, method: Method, params: dict[str, Tensor], *, info: dict[str, Any] | None = None, verified: bool = True):
        self.base, self.method, self.info, self.verified = base, method, info or {}, verified
        self.params: Mapping[str, Tensor] = params
        self.sites: Sequence[Site] = method.sites(base.spec)

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

    @classmethod
    def load(cls, folder: str | Path, base: Base) -> Adapter:
        """Load an adapter folder, ours or peft's, onto a base. AdapterError with every finding where it is not there or is refused."""
        method, params, info, verified = read_folder(folder, base)
        return cls(base, method, {k: t.to(base.device) for k, t in params.items()}, info=info, verified=verified)

    def save(self, folder: str | Path, run: Mapping[str, Any] | None = None) -> Path:
        """Write peft's two files and trimtab.json; an adapter that is there already is replaced in one step. Returns the folder.

        run: what to record of how it was trained (settings, metrics, the data's digest). AdapterError where the folder holds other files.
        """
        return write_folder(folder, self.method, self.params, self.base, run)

    def merge_into(self, folder: str | Path) -> MergeReport:
        """Write the base with this adapter folded into its weights as a model folder; NotMergeable, nothing left, where that cannot be."""
        return merge_into(self, folder)

    @property
    def num_parameters(self) -> int:
        """How many numbers train."""
        return sum(t.numel() for t in self.params.values())
