"""What keeps a run from starting, as far as run file and file system tell: found before the base is loaded, all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trimtab.bases import BUNDLED_NAMES, resolve_device, resolve_dtype
from trimtab.bases.locate import refuse_hopeless
from trimtab.bases.shapes import PRESETS, Architecture, read_architecture
from trimtab.cost.room import Need, at_most, refuse_without_room
from trimtab.errors import BaseError, ConfigError, Mistakes
from trimtab.methods import FullConfig
from trimtab.model import Base, load_base
from trimtab.paths import user_path
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.train.config import RunConfig, unreadable
from trimtab.train.dry import unrewarded
from trimtab.train.listen import Listener


def note_mistakes(run: RunConfig, base: Base | None, mistakes: Mistakes, called: str = "variants.{}") -> Architecture | None:
    """Collect what is wrong with device, dtype and base, with the files of the data that variants use, and with their target modules.

    base: one that is loaded already; None looks at the one that the run names, as far as it lies on this machine. Returns its shape, where
    it is known. called: what a variant is called in messages.
    """
    shape = Architecture(base.name, base.spec, base.spec.num_parameters, base.dtype) if base else None
    with mistakes.noted():
        resolve_dtype(run.dtype, resolve_device(run.device))
    if shape is None:
        with mistakes.noted():
            shape = _shape_here(run.base)
    used = dict.fromkeys(v.data for v in run.variants)
    mistakes.errors += [error for name in used for error in unreadable(name, run.data[name], run.root, run.variants)]
    mistakes.errors += [error for v in run.variants if (error := unrewarded(v, run.root, called.format(v.name))) is not None]
    if shape is None:
        return None
    for v in run.variants:
        try:
            v.method.sites_to_train(shape.spec)
        except ConfigError as e:
            mistakes.errors.append(ConfigError(f"{called.format(v.name)}: {e.message}", problems=e.problems, fix=e.fix))
    return shape


def refuse_too_much(
    run: RunConfig, shape: Architecture | None, warning: Callable[[str], None], *, loaded: bool, place: Place = ONE_PROCESS
) -> None:
    """OutOfMemory, with what would fit, where a run on a base of this shape cannot have the memory that it needs; see `cost.room`. What it
    could need at most is known without its rows. They are read here only where that is more than is free. place: where it runs."""
    parts = place.ranks if run.shard else 1

    def exact() -> Need | None:
        from trimtab.train.check import checked

        need = checked(run)[1]
        return need and replace(need, parts=parts)

    if shape is not None:
        refuse_without_room(at_most(run, shape, parts), exact, warning, loaded=loaded, sharers=place.here)


NOT_SHARED = "shard: one process holds the whole base; with `trimtab train --ranks N` each of N processes holds a part of it"


def refuse_sharded(run: RunConfig, place: Place) -> None:
    """ConfigError where ranks share out the base and a variant trains all of it."""
    said = "method full trains a copy of the whole base, which every rank would hold"
    full = [f"variants.{v.name}: {said}" for v in run.variants if isinstance(v.method, FullConfig)]
    if run.shard and place.ranks > 1 and full:
        raise ConfigError("shard: true is for adapters", problems=full, fix="train an adapter there, or take `shard` away")


def base_of(run: RunConfig, base: Base | None, place: Place, dtype: str | None, listener: Listener) -> Base:
    """The run's base: the one that is loaded already, or loaded now. Where the run asks for it, the ranks share it out."""
    shards = place.shards() if run.shard else None
    if run.shard and shards is None:
        listener.warning(NOT_SHARED)
    base = base or load_base(run.base, dtype=dtype, device=place.device(run.device), quantize=run.quantize, shards=shards)
    if shards is not None:
        base.shard(shards)
        own, whole = shards.own_bytes / 1e9, shards.whole_bytes / 1e9
        listener.status(f"each of {place.ranks} ranks holds {own:.3g} of {whole:.3g} GB of the base's matrices")
    return base


def _shape_here(name: str) -> Architecture | None:
    """The shapes of a base that need no network and no conversion, None of another one. BaseError where it cannot be a base."""
    refuse_hopeless(name)
    known = (name in BUNDLED_NAMES and name in PRESETS) or user_path(name, BaseError, "base").is_dir()
    return read_architecture(name) if known else None
