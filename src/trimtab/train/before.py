"""What keeps a run from starting, as far as run file and file system tell: found before the base is loaded, all at once."""

from __future__ import annotations

from collections.abc import Callable

from trimtab.bases import BUNDLED_NAMES, resolve_device, resolve_dtype
from trimtab.bases.locate import refuse_hopeless
from trimtab.bases.shapes import PRESETS, Architecture, read_architecture
from trimtab.cost.room import Need, at_most, refuse_without_room
from trimtab.errors import BaseError, ConfigError, Mistakes
from trimtab.model import Base
from trimtab.paths import user_path
from trimtab.train.config import RunConfig, unreadable
from trimtab.train.dry import unrewarded


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


def refuse_too_much(run: RunConfig, shape: Architecture | None, warning: Callable[[str], None], *, loaded: bool, sharers: int = 1) -> None:
    """OutOfMemory, with what would fit, where a run on a base of this shape cannot have the memory that it needs; see `cost.room`. What it
    could need at most is known without its rows. They are read here only where that is more than is free. sharers: its ranks here."""

    def exact() -> Need | None:
        from trimtab.train.check import checked

        return checked(run)[1]

    if shape is not None:
        refuse_without_room(at_most(run, shape), exact, warning, loaded=loaded, sharers=sharers)


def _shape_here(name: str) -> Architecture | None:
    """The shapes of a base that need no network and no conversion, None of another one. BaseError where it cannot be a base."""
    refuse_hopeless(name)
    known = (name in BUNDLED_NAMES and name in PRESETS) or user_path(name, BaseError, "base").is_dir()
    return read_architecture(name) if known else None
