"""A replica: the engine and the app of `trimtab serve`, which Ray Serve calls in place of a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from typing import Any

from trimtab.cluster.arguments import Args
from trimtab.cluster.relayed import Relayed, model_of

GB = 1e9
LAST_S = 5.0
"""For a request whose client went away, to leave the engine."""


class Replica:
    """args: of `Args`, as plain values."""

    def __init__(self, args: Mapping[str, Any]):
        from ray import serve

        from trimtab.http import logs
        from trimtab.http.app import create_app
        from trimtab.http.assemble import Asked, services_of
        from trimtab.http.services import Limits
        from trimtab.model import load_base
        from trimtab.serve.audit import Audit, audit_path
        from trimtab.serve.database import is_url
        from trimtab.serve.engine import Engine, EngineConfig
        from trimtab.serve.tenants import Tenants

        a = Args(**args)
        self.base_name, self.id = a.name, serve.get_replica_context().replica_tag
        self._parts = ExitStack()
        tenants = None if a.tenants is None else self._parts.enter_context(Tenants(a.tenants, create=is_url(a.tenants)))
        audit = None if tenants is None else self._parts.enter_context(Audit(audit_path(tenants.where)))
        config = EngineConfig(
            kv_bytes=None if a.kv_gb is None else int(a.kv_gb * GB),
            adapter_bytes=None if a.adapters_gb is None else int(a.adapters_gb * GB),
            max_running=a.max_running,
            speculate=a.speculate,
            max_queued=a.max_running + a.max_queued,
        )
        base = load_base(a.base, dtype=a.dtype, device=a.device, quantize=a.quantize, base_differs=a.base_differs)
        self.engine = Engine(base, config)
        self._parts.callback(self.engine.close)
        if tenants is not None:
            tenants.share_limits()
        self.services = services_of(
            self.engine,
            Asked(
                store=_store(a),
                base_names=(a.name,),
                tenants=tenants,
                audit=audit,
                max_open=a.max_running + a.max_queued,
                places=a.max_running,
                max_wait=a.max_wait,
                limits=Limits(request_s=a.request_seconds),
                vllm_metrics=a.vllm_metrics,
            ),
        )
        logs.configure()
        self.app = create_app(self.services)
        self._held = serve.multiplexed(max_num_models_per_replica=a.adapters_per_replica)(_held)
        self.engine.start()

    async def answer(self, asked: Relayed) -> AsyncIterator[dict[str, Any]]:
        """ASGI's messages of the answer: its start, then its body. A model that was answered counts as held from then on."""
        gone, messages, told = asyncio.Event(), asyncio.Queue[dict[str, Any] | None](), False

        async def receive() -> dict[str, Any]:
            nonlocal told
            if not told:
                told = True
                return {"type": "http.request", "body": asked.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            messages.put_nowait(message)

        async def run() -> None:
            try:
                await self.app(dict(asked.scope), receive, send)  # type: ignore[arg-type]
            finally:
                messages.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message.get("headers", ()), (b"x-trimtab-replica", self.id.encode())]}
                    await self._note(asked, message["status"])
                yield message
            await running
        finally:
            gone.set()
            if not running.done():
                await asyncio.wait([running], timeout=LAST_S)
                running.cancel()

    async def _note(self, asked: Relayed, status: int) -> None:
        """Say that this replica holds the adapter. Not of names that were refused, which would push others out of the list."""
        if status < 400 and (model := model_of(asked.body)) and model != self.base_name:
            await self._held(model)

    def check_health(self) -> None:
        """Serve replaces a replica where this raises."""
        if not self.engine.alive:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        """Serve calls this when the replica has no requests left and is to end."""
        if parts := getattr(self, "_parts", None):
            parts.close()


async def _held(model_id: str) -> str:
    """What Serve keeps for a model, in the order of use. The adapter itself is in the engine's memory, which has an order of its own."""
    return model_id


def _store(a: Args) -> Any:
    from trimtab.store.names import default_root
    from trimtab.store.registry import Store

    if a.store is None and not (default_root() / "index.json").is_file():
        return None
    store = Store(a.store)
    store.namespaces()  # what is wrong with its index is said at the start
    return store
