"""Reading a base that ranks share out, part by part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from trimtab.bases.folder import weight_files
from trimtab.bases.sharding import matrices_in, parts_of, shard
from trimtab.bases.structure import read_spec
from trimtab.memory import release_files, release_freed
from trimtab.places.shards import Shards


class ByLayer:
    """Of a load that ranks share out: what has been read is, as soon as something of another part of the model is read. So a rank has its
    own parts and one that is whole."""

    def __init__(self, folder: Path, shards: Shards, device: torch.device):
        self._files, self._shards, self._device = weight_files(folder), shards, device
        self._parts: dict[str, nn.Module] = {}
        self._whole: nn.Module | None = None

    def __deepcopy__(self, memo: Any) -> ByLayer:
        """transformers copies its options."""
        return self

    def prepare(self, model: Any) -> None:
        names = {m: n for n, m in model.named_modules()}
        self._parts = {names[part]: part for part in parts_of(model, read_spec(model))}

    def packs(self, parameter: str) -> bool:
        """Whether its reading is to be noticed."""
        return self._part(parameter) is not None

    def get_ops(self) -> ConversionOps:
        return _Noticed(self)

    def reached(self, name: str) -> None:
        """Something of this name has been read."""
        part = self._part(name)
        if part is self._whole:
            return
        if self._whole is not None:
            self._shards.add(self._whole, matrices_in(self._whole), self._device)
            self._release()
        self._whole = part

    def share(self, parameter: str, made: nn.Module) -> None:
        """Share out what has been packed of a part of the model, which comes later."""
        if (part := self._part(parameter)) is not None:
            self._shards.add(part, matrices_in(made), self._device)

    def fill(self, model: Any) -> None:
        """Nothing is left to be read."""

    def finish(self, model: Any) -> None:
        """Share out what was read last, and what is tied to it."""
        shard(model, read_spec(model), self._shards, self._device)
        self._release()

    def _release(self) -> None:
        release_files(self._files)  # what was read of them stays mapped
        release_freed()  # what is kept lies between what quantising has freed

    def _part(self, name: str) -> nn.Module | None:
        return next((part for at, part in self._parts.items() if name == at or name.startswith(f"{at}.")), None)


class _Noticed(ConversionOps):
    def __init__(self, by_layer: ByLayer):
        self.by_layer = by_layer

    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str = "", **kwargs: Any) -> dict[str, Any]:
        self.by_layer.reached(full_layer_name)
        return input_dict
