"""An adapter in memory: a method, its tensors at its sites, and where they came from.

This is what merging and the store need of an adapter. `store.adapter.Adapter` adds loading by name, and merging.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from trimtab.errors import ConfigError
from trimtab.methods import METHODS, Head
from trimtab.methods.base import Method, Site
from trimtab.store.files import AdapterFolder
from trimtab.store.folder import read_opened
from trimtab.store.save import write_folder

if TYPE_CHECKING:
    from trimtab.model import Base


class AdapterInMemory:
    """One adapter on one base. Two adapters are equal only if they are the same object, so an adapter can be the key of what is packed from
    it.

    params: tensors by `Site.key`, fp32, on the base's device. info: the other content of `trimtab.json` (empty for a new adapter).
    verified: False if it was loaded from a folder without trimtab.json, or with one that names no base; then only names and shapes were
    checked. warnings: what its folder names and this base lacks, and what is not read, one line each. head: its own head, if it has one,
    whose tensors are among params.
    """

    def __init__(
        self,
        base: Base,
        method: Method,
        params: Mapping[str, Tensor],
        *,
        info: dict[str, Any] | None = None,
        verified: bool = True,
        warnings: Sequence[str] = (),
        head: Head | None = None,
    ):
        self.base, self.method, self.info, self.verified, self.warnings = base, method, info or {}, verified, tuple(warnings)
        self.params: Mapping[str, Tensor] = {name: t.to(base.device, torch.float32) for name, t in params.items()}
        self.head = head
        self.sites: Sequence[Site] = method.sites(base.spec) + ([head.site(base.spec)] if head else [])

    @classmethod
    def create(cls, base: Base, method: Method, *, seed: int = 0, head: Head | None = None) -> Self:
        """A newly initialised adapter. Equal seeds give equal tensors; a head does not change the others. ConfigError if the method finds
        no module to act on in this base."""
        if method.peft_type not in METHODS:
            raise ConfigError(f"{type(method).__name__} is not an adapter", fix="full fine-tuning trains from a run file: method: full")
        generator = torch.Generator().manual_seed(seed)
        params = {}
        for site in method.sites_to_train(base.spec):
            for name, tensor in method.init(site, base, generator).items():
                params[site.key(name)] = tensor
        params |= head.init(base.spec, generator) if head else {}
        return cls(base, method, params, head=head)

    @classmethod
    def read(cls, folder: AdapterFolder, base: Base, where: str) -> Self:
        """An adapter from a folder that is open, or that a store keeps as blobs. where: what errors call the adapter."""
        read = read_opened(folder, base, where)
        return cls(base, read.method, read.params, info=read.info, verified=read.verified, warnings=read.warnings, head=read.head)

    def save(self, folder: str | Path, run: Mapping[str, Any] | None = None, *, dtype: str = "float32") -> Path:
        """Write peft's two files, trimtab.json and a model card. An existing adapter is replaced in one step. Returns the folder.

        run: what to record about the training (settings, metrics, the data's digest). dtype: of the stored tensors: float32, bfloat16 or
        float16. Loading gives fp32 tensors with the rounded values; `store.compress.rounding_error` computes the error. AdapterError if the
        folder has other files, or if values do not fit the dtype.
        """
        return write_folder(folder, self.method, self.params, self.base, run, dtype, self.head)

    @property
    def num_parameters(self) -> int:
        """How many numbers train."""
        fixed = {s.key(name) for s in self.sites for name in s.fixed}
        return sum(t.numel() for k, t in self.params.items() if k not in fixed)
