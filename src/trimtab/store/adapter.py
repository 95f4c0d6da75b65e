"""An adapter: a method, its tensors at its sites, and what is known of where they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import AdapterError, ConfigError
from trimtab.methods import METHODS
from trimtab.methods.base import Method, Site
from trimtab.store.files import Folder, open_folder
from trimtab.store.folder import read_opened, write_folder
from trimtab.store.merge import MergeReport, merge_into
from trimtab.store.names import NoSuchAdapter, is_reference
from trimtab.store.registry import Store, Version

if TYPE_CHECKING:
    from trimtab.model import Base

LOOKS = 10
"""How often a folder is opened anew that was replaced while it was read."""


class Adapter:
    """One adapter on one base. Two adapters are equal only if they are the same object, so that an adapter can key what is packed from it.

    params: tensors by `Site.key`, fp32, on the base's device. info: what `trimtab.json` says beside them (empty for a fresh adapter).
    verified: False where it was loaded from a folder whose trimtab.json is missing or names no base: only names and shapes are checked.
    warnings: what its folder says and what means nothing on this base or is not read, one line each.
    """

    def __init__(
        self,
        base: Base,
        method: Method,
        params: dict[str, Tensor],
        *,
        info: dict[str, Any] | None = None,
        verified: bool = True,
        warnings: Sequence[str] = (),
    ):
        self.base, self.method, self.info, self.verified, self.warnings = base, method, info or {}, verified, tuple(warnings)
        self.params: Mapping[str, Tensor] = params
        self.sites: Sequence[Site] = method.sites(base.spec)

    @classmethod
    def create(cls, base: Base, method: Method, *, seed: int = 0) -> Adapter:
        """A freshly initialised adapter; equal seeds give equal tensors. ConfigError where the method finds no place in this base."""
        if method.peft_type not in METHODS:
            raise ConfigError(f"{type(method).__name__} is not an adapter", fix="full fine-tuning trains from a run file: method: full")
        generator = torch.Generator().manual_seed(seed)
        params = {}
        for site in method.sites_to_train(base.spec):
            for name, tensor in method.init(site, base, generator).items():
                params[site.key(name)] = tensor.to(base.device, torch.float32)
        return cls(base, method, params)

    @classmethod
    def load(cls, source: str | Path, base: Base, *, store: str | Path | Store | None = None) -> Adapter:
        """Load an adapter onto a base: from a folder, ours or peft's, or from a store, named as "acme/support@3".

        A folder that is there is taken before a name. store: the store or its folder, `default_root()` where None. What a folder of peft's
        says and this base lacks is left out; it is logged, and in `warnings`. AdapterError with every finding where the adapter is not
        there or is refused.
        """
        if is_reference(source):
            where, version = _find(str(source), store)
            with where.open(version) as folder:
                return cls.read(folder, base, f"adapter {version.ref}")
        for _ in range(LOOKS):
            with open_folder(source) as folder:
                try:
                    return cls.read(folder, base, f"adapter {str(source)!r}")
                except AdapterError:
                    if not folder.is_replaced:  # else its files went while they were read, and another adapter is there
                        raise
        raise AdapterError(f"adapter {str(source)!r} is being replaced again and again", fix="load it when it stays")

    @classmethod
    def read(cls, folder: Folder, base: Base, where: str) -> Adapter:
        """`load` from a folder that is open, or that a store keeps as blobs. where: what errors call the adapter."""
        method, params, info, verified, warnings = read_opened(folder, base, where)
        return cls(base, method, {k: t.to(base.device) for k, t in params.items()}, info=info, verified=verified, warnings=warnings)

    def save(self, folder: str | Path, run: Mapping[str, Any] | None = None, *, dtype: str = "float32") -> Path:
        """Write peft's two files, trimtab.json and a card; an adapter that is there already is replaced in one step. Returns the folder.

        run: what to record of how it was trained (settings, metrics, the data's digest). dtype: what the tensors are stored in, float32,
        bfloat16 or float16; loading gives fp32 tensors with the rounded values (`store.compress.rounding_error` says what that costs).
        AdapterError where the folder holds other files, or values do not fit the dtype.
        """
        return write_folder(folder, self.method, self.params, self.base, run, dtype)

    def merge_into(self, folder: str | Path) -> MergeReport:
        """Write the base with this adapter folded into its weights as a model folder; NotMergeable, nothing left, where that cannot be."""
        return merge_into(self, folder)

    @property
    def num_parameters(self) -> int:
        """How many numbers train."""
        return sum(t.numel() for t in self.params.values())


def _find(text: str, store: str | Path | Store | None) -> tuple[Store, Version]:
    try:
        found = store if isinstance(store, Store) else Store(store)
        return found, found.resolve(text)
    except NoSuchAdapter as error:
        message = f"adapter {text!r}: no such folder (looked for {Path(text).absolute()}), and {error.message}"
        raise NoSuchAdapter(message, fix=error.fix) from error
