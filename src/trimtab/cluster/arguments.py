"""The arguments of the application on Ray Serve."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.errors import ConfigError, nearest


def _named(variable: str, default: str | None = None) -> Any:
    return Field(default_factory=lambda: os.environ.get(variable) or default, validate_default=True)


class Args(BaseModel):
    """What the application is asked to be. Most are options of `trimtab serve`, and mean the same.

    base, base_name, store, tenants, local: also from TRIMTAB_BASE, TRIMTAB_BASE_NAME, TRIMTAB_STORE, TRIMTAB_TENANTS, TRIMTAB_LOCAL.
    local: without keys and tenants, for whoever reaches Serve's port. replicas: of the server. ingresses: of what reads the bodies.
    adapters_per_replica: how many a replica is taken to hold; as many as fit into adapters_gb is right. multiplex: false leaves the choice
    of a replica to Serve, whatever the adapter. cpus, gpus: of a replica, of which a group of threads has as many.
    """

    model_config = ConfigDict(extra="forbid")

    base: str = _named("TRIMTAB_BASE", "smollm2-135m-instruct")
    base_name: str | None = _named("TRIMTAB_BASE_NAME")
    store: Path | None = _named("TRIMTAB_STORE")
    tenants: str | None = _named("TRIMTAB_TENANTS")
    local: bool = _named("TRIMTAB_LOCAL", "false")
    dtype: str | None = None
    device: str | None = None
    quantize: str | None = None
    base_differs: bool = False
    kv_gb: float | None = Field(None, gt=0)
    adapters_gb: float | None = Field(None, gt=0)
    max_running: int = Field(64, ge=1)
    max_queued: int = Field(256, ge=1)
    max_wait: float | None = Field(None, ge=0)
    speculate: bool = True
    request_seconds: float | None = Field(None, gt=0)
    drain_seconds: float = Field(60, ge=0)
    vllm_metrics: bool = False
    replicas: int = Field(1, ge=1)
    ingresses: int = Field(1, ge=1)
    adapters_per_replica: int = Field(32, ge=1)
    multiplex: bool = True
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)

    @property
    def name(self) -> str:
        """The base's name for clients."""
        from trimtab.http.assemble import name_for_clients

        return self.base_name or name_for_clients(self.base)


def read(said: Mapping[str, Any]) -> Args:
    """From plain values. ConfigError that names all that are wrong."""
    try:
        return Args(**said)
    except ValidationError as error:
        problems = []
        for found in error.errors():
            name = ".".join(map(str, found["loc"]))
            if found["type"] == "extra_forbidden":
                problems.append(f"{name}: there is no such argument{nearest(name, Args.model_fields)}")
            else:
                problems.append(f"{name} = {found['input']!r}: {found['msg']}")
        raise ConfigError("these arguments of trimtab.cluster.serve:app are wrong", problems=problems) from None
