"""Puts a server's parts together around an engine, as `Services`: for `trimtab serve` and `trimtab train --serve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.errors import ConfigError
from trimtab.http.services import Limits, Services
from trimtab.http.words import words_of
from trimtab.serve.admission import Admission
from trimtab.serve.audit import Audit
from trimtab.serve.catalog import Catalog
from trimtab.serve.metrics import Metrics
from trimtab.serve.served import served
from trimtab.serve.tenants import LOCAL, Tenants
from trimtab.store.registry import Store

if TYPE_CHECKING:
    from trimtab.serve.engine import Engine


@dataclass(frozen=True)
class Asked:
    """What a server is asked to be. store, folders: where adapters come from (catalog.py). adapters: names given at the start, in local
    mode: name -> a folder or a name in the store. base_names: see catalog.py. tenants, audit: None in local mode. max_open, places,
    max_wait: see admission.py."""

    store: Store | None = None
    folders: Sequence[Path] = ()
    adapters: Mapping[str, str] | None = None
    base_names: Sequence[str] = ()
    tenants: Tenants | None = None
    audit: Audit | None = None
    hosts: frozenset[str] | None = None
    max_open: int = 256
    places: int | None = None
    max_wait: float | None = None
    limits: Limits = field(default_factory=Limits)
    vllm_metrics: bool = False


def name_for_clients(base: str) -> str:
    """A base's name, as a command or a run file gives it; of a folder or file its last part, since a path is nothing for clients."""
    return Path(base).name if Path(base).exists() else base


def services_of(engine: Engine, asked: Asked) -> Services:
    """The services of a server around this engine, which is observed from now on. AdapterError if a named adapter is refused."""
    base = engine.base
    catalog = Catalog(base, asked.store, folders=asked.folders, base_names=asked.base_names, evict=engine.evict)
    if asked.adapters and asked.tenants is not None:
        raise ConfigError("names for adapters at the start are for local mode", fix="publish them to the store, in the tenants' namespaces")
    for name, source in (asked.adapters or {}).items():
        adapter = served(source, base, asked.store)
        adapter.load()  # what is wrong with it shows at the start
        catalog.put(name, adapter, LOCAL)
    usage = None if asked.tenants is None else asked.tenants.usage
    leases = None if asked.tenants is None else asked.tenants.leases
    admission = Admission(asked.max_open, places=asked.places, max_wait=asked.max_wait, leases=leases)
    metrics = Metrics(
        catalog.base_names[0],
        engine.stats,
        admission=admission,
        audit=asked.audit,
        usage=usage,
        vllm=asked.vllm_metrics,
        max_running=engine.config.max_running,
        block_size=engine.runner.block_size,
    )
    engine.on_finish = metrics.finished
    return Services(
        base_name=catalog.base_names[0],
        fingerprint=base.fingerprint,
        hidden_size=base.spec.hidden_size,
        words=words_of(base),
        engine=engine,
        admission=admission,
        catalog=catalog,
        metrics=metrics,
        alive=lambda: engine.alive,
        tenants=asked.tenants,
        audit=asked.audit,
        hosts=asked.hosts,
        limits=asked.limits,
    )
