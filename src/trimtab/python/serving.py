"""`trimtab.serve`: a server in the background of a program or a notebook, for this machine alone."""

from __future__ import annotations

import atexit
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trimtab.cli.serve import GB, check_packages, store_at
from trimtab.errors import TrimtabError
from trimtab.http import server
from trimtab.http.app import create_app
from trimtab.http.assemble import Asked, name_for_clients, services_of
from trimtab.model import IN_MEMORY, Base, load_base
from trimtab.python.adapters import by_name
from trimtab.python.arguments import with_known_keywords
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.live import snapshot
from trimtab.serve.tenant import LOCAL
from trimtab.store import Adapter

HOST = "127.0.0.1"
FAILED_S = 30.0
"""Within which a server that was started answers, or has failed."""


class BackgroundServer:
    """A server that runs on threads of this process. url: where it answers. models: the names that requests may give as `model`.

    It ends with `stop()`, at the end of a `with` block, or with the process.
    """

    def __init__(self, base: Base, engine: Engine, asked: Asked, sock: Any, adapters: Mapping[str, Adapter]):
        self._sock, self._engine, self._switch = sock, engine, sys.getswitchinterval()
        self.url = f"http://{HOST}:{sock.getsockname()[1]}"
        self._services = services = services_of(engine, asked)
        for name, adapter in adapters.items():
            services.catalog.put(name, snapshot(name, base, adapter.method, adapter.params, adapter.head), LOCAL)
        self.models = [services.base_name, *adapters, *(asked.adapters or {})]
        ready = threading.Event()
        self._server = server.make(create_app(services), services, drain_s=0, ready=ready.set, stop=engine.close)
        self._thread = threading.Thread(target=self._server.run, args=([sock],), name="trimtab-http", daemon=True)
        engine.start()
        self._thread.start()
        if not ready.wait(FAILED_S) or not self._thread.is_alive():
            self.stop()
            raise TrimtabError("the server did not start", fix="look at the log of uvicorn; `trimtab serve --local` shows it")
        atexit.register(self.stop)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self, drain_s: float = 10.0) -> None:
        """Take no more requests, finish those that run, end. drain_s: for running answers; what is not finished then is cancelled. Once."""
        atexit.unregister(self.stop)
        if self._thread.is_alive():
            self._server.drain_s = drain_s
            self._server.handle_exit(signal.SIGTERM, None)
            self._thread.join(drain_s + 2 * server.LAST_S)
        self._engine.close()
        for work in (self._services.words_work, self._services.load_work, self._services.store_work):
            work.close()
        self._sock.close()
        sys.setswitchinterval(self._switch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<trimtab server at {self.url}: {', '.join(self.models)}{'' if self.running else ' (stopped)'}>"

    def _repr_html_(self) -> str:
        where = f'<a href="{self.url}/docs">{self.url}</a>' if self.running else "stopped"
        return f"<p>{where}: {escape(', '.join(self.models))}</p>"


@with_known_keywords
def serve(
    base: Base | Any | str,
    *,
    tokenizer: Any = None,
    adapters: Mapping[str, Adapter | str | Path] | Sequence[str | Path] = (),
    port: int = 0,
    base_name: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    quantize: str | None = None,
    base_differs: bool = False,
    kv_gb: float | None = None,
    adapters_gb: float | None = None,
    max_running: int = 64,
    max_queued: int = 256,
    speculate: bool = True,
    store_root: str | Path | None = None,
) -> BackgroundServer:
    """Serve a base and adapters over OpenAI's HTTP API on threads of this process; returns as soon as it answers.

        with trimtab.serve(report.base, adapters=report.adapters) as server:
            print(server.url)

    Only programs of this machine reach it (127.0.0.1), and it asks for no keys. base: a name, a folder, a `Base`, or a model of
    transformers with its `tokenizer`. adapters: by the names that requests give as `model`: an `Adapter` as it is now, a folder, or a name
    in the store. All of the store (store_root, else the default one) is served too. port: 0: any free one. kv_gb, adapters_gb: memory for
    keys and values, and for adapters; by default a share of what is free. The others are as of `trimtab serve`. ConfigError where the
    packages of trimtab[serve] or the port are not to be had, AdapterError where an adapter is refused.
    """
    check_packages()
    every = by_name(adapters)
    given = {name: a for name, a in every.items() if isinstance(a, Adapter)}
    named = {name: str(a) for name, a in every.items() if not isinstance(a, Adapter)}
    sock = server.bind(HOST, port)
    try:
        loaded = (
            base
            if isinstance(base, Base)
            else load_base(base, tokenizer=tokenizer, dtype=dtype, device=device, quantize=quantize, base_differs=base_differs)
        )
        called = base_name or name_for_clients(loaded.name if loaded.name not in ("", IN_MEMORY) else "base")
        config = EngineConfig(
            kv_bytes=None if kv_gb is None else int(kv_gb * GB),
            adapter_bytes=None if adapters_gb is None else int(adapters_gb * GB),
            max_running=max_running,
            speculate=speculate,
            max_queued=max_running + max_queued,
        )
        asked = Asked(
            store=store_at(None if store_root is None else Path(store_root)),
            adapters=named,
            base_names=(called,),
            hosts=server.local_hosts(sock.getsockname()[1]),
            max_open=max_running + max_queued,
            places=max_running,
        )
        return BackgroundServer(loaded, Engine(loaded, config), asked, sock, given)
    except BaseException:
        sock.close()
        raise
