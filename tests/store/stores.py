"""Small adapter folders for a store: written by hand, so that no model is needed, and as different or as equal as one wants."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.store.common import write_tensors
from trimtab.store.manifest import EMPTY_DESCRIPTOR
from trimtab.store.registry import Store

CHANGES = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "utime", "write")
"""Functions of `os` that change what is on disk."""
CONFIG: Mapping[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "tiny"}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def adapter_folder(folder: Path, weights: int = 0, config: Mapping[str, Any] = {}) -> Path:
    """A peft LoRA folder. weights: two folders with the same number have equal weights. config: keys that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    shapes = {f"{LAYER}.lora_A.weight": (2, 8), f"{LAYER}.lora_B.weight": (8, 2)}
    write_weights(folder, {n: np.random.default_rng([weights, i]).normal(size=s) for i, (n, s) in enumerate(shapes.items())})
    return folder


def write_weights(folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, values in tensors.items():
        raw = values.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_tensors(folder / "adapter_model.safetensors", header, data)


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file under a folder, the lock and unfinished files of a store not counted."""
    found = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and not p.is_symlink()}
    return {name: data for name, data in found.items() if name != ".lock" and not name.startswith("tmp/")}


def files_of(store: Store, ref: str) -> dict[str, bytes]:
    """A version's files as the store gives them."""
    with store.open(ref) as folder:
        return {name: folder.read(name, 2**20) for name in folder.names()}


def names_of(store: Store) -> dict[str, tuple[dict[int, str], dict[str, int]]]:
    """path -> (digest by version, version by alias) of all that the store lists."""
    found = {}
    for newest in store.list():
        versions = store.versions(newest.name)
        found[newest.name] = {v.version: v.digest for v in versions}, {a: v.version for v in versions for a in v.aliases}
    return found


def needed_blobs(store: Store) -> set[str]:
    """The blobs that the store's versions need."""
    versions = [v for newest in store.list() for v in store.versions(newest.name)]
    return {EMPTY_DESCRIPTOR.digest, *(v.digest for v in versions), *(b.digest for v in versions for b in v.files.values())}


def blobs_there(store: Store) -> set[str]:
    return {f"sha256:{p.name}" for p in (store.root / "blobs" / "sha256").iterdir()}


class Crash(BaseException):
    """The machine has stopped: nothing that follows, no cleaning up either, reaches the disk."""


@contextmanager
def crashing(at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Stop the machine at the `at`-th change of the disk, from 1; 0: never. Gives the changes made so far. Nothing is flushed."""
    made: list[str] = []

    def stopping(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if at and len(made) >= at - 1:
                raise Crash(f"{name} at {len(made) + 1}")
            made.append(name)
            return None if name == "fsync" else original(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, stopping(name, getattr(os, name)))
        yield made
