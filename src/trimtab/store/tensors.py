"""The tensors of an adapter folder: which names and shapes belong there, and what their values must be.

Names and shapes are compared with the header alone, so that nothing is read, and no memory taken, beyond what the adapter can hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trimtab.methods.base import Site
from trimtab.store.header import Entry

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.model import Base

PREFIX = "base_model.model."
"""What peft puts before a module's name."""
OUTER = "base_model."


def file_key(site: Site, tensor: str) -> str:
    """A tensor's name in adapter_model.safetensors: peft's prefix stands before modules, not before virtual tokens."""
    return PREFIX + site.key(tensor) if site.name else site.key(tensor)


def expected(sites: Sequence[Site]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name in the file -> (name in `Adapter.params`, shape)."""
    return {as_peft_has(file_key(s, t), sites): (s.key(t), shape) for s in sites for t, shape in s.shapes.items()}


def as_peft_has(name: str, sites: Sequence[Site]) -> str:
    """A tensor's name, where a head stands beside virtual tokens: peft wraps no modules there, so that its prefix is shorter."""
    wrapped = any(s.name and not s.head for s in sites)
    return name if wrapped or not name.startswith(PREFIX) else OUTER + name.removeprefix(PREFIX)


def copies_of_base(entries: Sequence[Entry], sites: Sequence[Site], base: Base) -> dict[str, str]:
    """Tensors that are only the base's own, as peft saves them beside a targeted embedding, or with a router that is trained in full (what
    it adds to scores): name in the file -> the base's parameter."""
    wanted = expected(sites)
    shapes = {f"{m.name}.{p}": shape for m in base.spec.modules.values() for p, shape in m.parameters.items()}
    shapes |= {name: tuple(base.parameter(name).shape) for name in beside_routers(sites, base)}
    found = {}
    for e in entries:
        parameter = e.name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if e.name not in wanted and e.name.startswith(PREFIX) and shapes.get(parameter) == e.shape:
            found[e.name] = parameter
    return found


def beside_routers(sites: Sequence[Site], base: Base) -> list[str]:
    """The base's tensors that peft wants in the file beside the parameters of routers that are trained in full: what is added to scores
    before experts are chosen. No gradient reaches these."""
    routers = {s.name: s.shapes for s in sites if s.router and s.saved}
    inside = {name: base.model.get_submodule(name).state_dict() for name in routers}
    return [f"{name}.{n}" for name, found in inside.items() for n in found if n not in routers[name]]


def layout_problems(entries: Sequence[Entry], sites: Sequence[Site], copies: Mapping[str, str]) -> list[str]:
    """Missing, left-over and mis-shaped tensors, one line each."""
    wanted, found = expected(sites), {e.name: e for e in entries}
    problems = [f"{name} is missing; the config asks for it, of shape {shape}" for name, (_, shape) in wanted.items() if name not in found]
    for name, entry in found.items():
        if name in wanted and entry.shape != wanted[name][1]:
            problems.append(f"{name} has shape {entry.shape}; the config and this base ask for {wanted[name][1]}")
        elif name not in wanted and name not in copies:
            problems.append(f"{name} {entry.shape} belongs to no module that the config names on this base")
    return problems


def value_problems(
    tensors: Mapping[str, Tensor], copies: Mapping[str, str], base: Base, *, edits: bool, runs: Sequence[Tensor] = ()
) -> list[str]:
    """Values that no adapter has, one line for each tensor. tensors: by name in the file, as stored. runs: the same values in few tensors,
    where there are such: a sum is finite only if each of its terms is, so most adapters need one pass."""
    import torch

    problems = []
    finite = bool(runs) and all(bool(run.sum(dtype=torch.float32).isfinite()) for run in runs)
    for name, tensor in tensors.items():
        bad = 0 if finite else tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            problems.append(f"{name} has {bad:,} values of {tensor.numel():,} that are not finite")
        if name in copies and not _equal(tensor, base.parameter(copies[name])):
            problems.append(
                f"{name} is not the base's own {copies[name]}: it was changed or resized in training; name it in modules_to_save to keep it"
            )
    own = [t for name, t in tensors.items() if name not in copies]
    if edits and not problems and not any(bool(t.any()) for t in own):
        problems.append(f"all {len(own)} tensors are zero: the adapter does nothing (saved from shards that were not gathered?)")
    return problems


def _equal(stored: Tensor, parameter: Tensor) -> bool:
    """Equal in either's dtype, since a base may be loaded in another one than the adapter was saved in."""
    import torch

    parameter = parameter.detach().cpu()
    return torch.equal(stored.to(parameter.dtype), parameter) or torch.equal(stored, parameter.to(stored.dtype))
