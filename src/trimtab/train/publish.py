"""A run's results in a store of adapters, each as the next version of <namespace>/<variant>.

The run folder comes first: when this begins, everything in it is written, so that a store that fails costs nothing but the publishing.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, TrimtabError
from trimtab.methods import FullConfig
from trimtab.model import Base
from trimtab.store.registry import Store
from trimtab.train.config import RunConfig
from trimtab.train.listen import Listener


def open_store(run: RunConfig, root: str | Path | None) -> Store | None:
    """The store that the run publishes to, None where it does not. TrimtabError where it cannot be written, or there is nothing for it."""
    if run.store is None:
        return None
    if all(isinstance(v.method, FullConfig) for v in run.variants):
        raise ConfigError(
            f"store = {run.store!r}: every variant is full fine-tuning, which is a model and no adapter", fix="take `store` away"
        )
    store = Store(root, create=True)
    store.put_blob(b"{}")  # every store needs this blob; that it can be written is better known now than in some hours
    return store


def publish_variants(run: RunConfig, store: Store, base: Base, summary: dict[str, Any], listener: Listener) -> list[str]:
    """Publish the adapters in the run folder, and note each one's version in the summary. What failed, with the command that does it.

    A variant that has stopped is left out: `latest` must not move to what diverged. What is published already is not published again.
    """
    problems = []
    for v in run.variants:
        entry = summary["variants"][v.name]
        if isinstance(v.method, FullConfig):
            continue
        if str(entry.get("published", "")).startswith(f"{run.store}/"):
            continue
        if entry["stopped"]:
            listener.warning(f"{v.name} has stopped, so it is not published")
            continue
        folder, name = run.out / "adapters" / v.name, f"{run.store}/{v.name}"
        try:
            entry["published"] = store.publish(folder, name, base=base).ref
        except TrimtabError as error:
            problems.append(f"{name}: {error.message}; {'; '.join([*error.problems, _command(folder, name, store)])}")
    return problems


def _command(folder: Path, name: str, store: Store) -> str:
    """What publishes an adapter by hand."""
    return f"publish it with: {shlex.join(['trimtab', 'adapters', 'publish', str(folder), name, '--store', str(store.root)])}"


def refuse_unpublished(run: RunConfig, store: Store, problems: list[str]) -> None:
    """TrimtabError where something was not published; the run itself is whole."""
    if problems:
        raise TrimtabError(
            f"the run is finished and saved in {run.out}, but not all of it could be published to the store {store.root}",
            problems=problems,
            fix="mend the store, then publish by hand as said, or `trimtab train` with --resume, which publishes what is missing",
        )
