"""What differs between two versions: fields of the config, files, tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.store.contents import read_contents
from trimtab.store.files import AdapterFolder
from trimtab.store.folder import CONFIG, WEIGHTS
from trimtab.store.header import read_header

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Change:
    """A key of adapter_config.json; None on a side that does not have it."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Diff:
    """a, b: what was compared, as "acme/support@3". shared: names of files that are equal byte for byte.

    tensors: for those that both have in one shape, ‖b - a‖ / ‖a‖ in the Frobenius norm, 0 for equal ones, infinite where a is zero and b is
    not; empty if weights were not asked for. reshaped: in both, of different shapes. removed, added: only in a, only in b.
    """

    a: str
    b: str
    config: tuple[Change, ...]
    shared: tuple[str, ...]
    tensors: Mapping[str, float]
    reshaped: tuple[str, ...]
    removed: tuple[str, ...]
    added: tuple[str, ...]


def compare(a: str, b: str, folder_a: AdapterFolder, folder_b: AdapterFolder, shared: tuple[str, ...], *, weights: bool) -> Diff:
    """Refusal if a file is not what its digest says."""
    before, after = folder_a.read_json(CONFIG)[0], folder_b.read_json(CONFIG)[0]
    keys = sorted({*before, *after})
    changes = tuple(Change(k, before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k))
    if not weights:
        return Diff(a, b, changes, shared, {}, (), (), ())
    old = _tensors(folder_a)
    new = old if WEIGHTS in shared else _tensors(folder_b)
    both = [name for name in old if name in new]
    same_shape = [name for name in both if old[name].shape == new[name].shape]
    return Diff(
        a,
        b,
        changes,
        shared,
        tensors={name: _apart(old[name], new[name]) for name in same_shape},
        reshaped=tuple(name for name in both if name not in same_shape),
        removed=tuple(name for name in old if name not in new),
        added=tuple(name for name in new if name not in old),
    )


def _tensors(folder: AdapterFolder) -> dict[str, Tensor]:
    with folder.open_unhashed(WEIGHTS) as (file, size):
        entries, head = read_header(file, size, WEIGHTS)
        return read_contents(folder, WEIGHTS, file, entries, head).tensors


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    distance, norm = float((b - a).norm()), float(a.norm())
    return 0.0 if distance == 0 else distance / norm if norm else float("inf")
