"""What keeps a run from starting, as far as run file and file system tell: found before the base is loaded, all at once."""

from __future__ import annotations

from trimtab.bases import BUNDLED_NAMES, resolve_device, resolve_dtype
from trimtab.bases.locate import refuse_hopeless
from trimtab.bases.shapes import PRESETS, read_architecture
from trimtab.bases.spec import Spec
from trimtab.errors import BaseError, ConfigError, Mistakes
from trimtab.paths import user_path
from trimtab.train.config import RunConfig, unreadable


def note_mistakes(run: RunConfig, spec: Spec | None, mistakes: Mistakes, called: str = "variants.{}") -> None:
    """Collect what is wrong with device, dtype and base, with the files of the data that variants use, and with their target modules.

    spec: of a base that is loaded already; None looks at the one that the run names, as far as it lies on this machine.
    called: what a variant is called in messages.
    """
    with mistakes.noted():
        resolve_dtype(run.dtype, resolve_device(run.device))
    if spec is None:
        with mistakes.noted():
            spec = _spec_here(run.base)
    used = dict.fromkeys(v.data for v in run.variants)
    mistakes.errors += [error for name in used for error in unreadable(name, run.data[name], run.root, run.variants)]
    if spec is None:
        return
    for v in run.variants:
        try:
            v.method.sites_to_train(spec)
        except ConfigError as e:
            mistakes.errors.append(ConfigError(f"{called.format(v.name)}: {e.message}", problems=e.problems, fix=e.fix))


def _spec_here(name: str) -> Spec | None:
    """The shapes of a base that need no network and no conversion, None of another one. BaseError where it cannot be a base."""
    refuse_hopeless(name)
    known = (name in BUNDLED_NAMES and name in PRESETS) or user_path(name, BaseError, "base").is_dir()
    return read_architecture(name).spec if known else None
