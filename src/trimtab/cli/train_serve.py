"""`trimtab train --serve`: the variants of a run, asked over HTTP while they train: in the run's process, on its base, for this machine.

One thread computes, the one that trains: between two joint steps it takes snapshots of the variants and drives the engine. So no lock is
needed, no forward meets another, the teams of threads of two forwards do not fight over the cores, and a run that is asked gives the very
numbers of one that is not. The price is time: a request waits for the step that runs (and the validation or checkpoint after it), and while
there are requests, training and serving take turns of equal length.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from trimtab.cli.terminal import say
from trimtab.http import server
from trimtab.http.app import create_app
from trimtab.http.assemble import Asked, name_for_clients, services_of
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.live import Snapshot, snapshot
from trimtab.serve.request import Request
from trimtab.serve.runner import Runner
from trimtab.serve.tenant import LOCAL
from trimtab.train.beside import Beside
from trimtab.train.follow import RunFolders
from trimtab.train.full import FullVariant
from trimtab.train.listen import Listener
from trimtab.train.prepare import Prepared

HOST = "127.0.0.1"
RUNNING, TOKENS = 16, 1024
"""Answers at a time, and tokens of each that the KV blocks have room for: memory is for training first, and known beforehand."""
SNAPSHOT_SHARE = 0.05
"""Of the time, for taking snapshots: after each step where they are cheap, less often where there is much to copy and to hash."""
DRAIN_S = 10.0
"""After the last step, for running answers; scores and files wait for them."""

log = logging.getLogger(__name__)


@contextmanager
def serving(port: int, listener: Listener) -> Iterator[Beside]:
    """What `train` takes as `beside` to be served at this port of 127.0.0.1 (0: any free one). The socket is there before anything slow is
    begun; ConfigError if it cannot be had. listener: hears what cannot be served, and of a server that has failed."""
    with server.bind(HOST, port) as sock:

        @contextmanager
        def beside(prepared: Prepared) -> Iterator[Callable[[], None]]:
            live = LiveServer(prepared, sock, listener)
            try:
                live.start()
                yield live.turn
            finally:
                live.close()

        yield beside


class LiveServer:
    """A server of one run, for this machine alone. All but the answering of HTTP happens on the thread that calls these methods."""

    def __init__(self, prepared: Prepared, sock: socket.socket, listener: Listener):
        base, self.listener, self.sock = prepared.base, listener, sock
        self.prepared = prepared
        if full := [v.name for v in prepared.variants if isinstance(v, FullVariant)]:
            listener.warning(f"not served, as they train models of their own: {', '.join(full)}")
        self.engine = Engine(
            base, EngineConfig(kv_bytes=RUNNING * TOKENS // 16 * Runner.bytes_per_block(base, 16), max_running=RUNNING), loader=AtOnce()
        )
        port = sock.getsockname()[1]
        made = services_of(self.engine, Asked(base_names=(name_for_clients(prepared.run.base),), hosts=server.local_hosts(port)))
        self.services = replace(made, alive=lambda: not self.failed)
        self.engine.on_finish = self._finished
        self.failed = False
        self.shown: dict[str, tuple[tuple[int, bool], Snapshot]] = {}
        self._snapshots_due = self._turn_ended = 0.0
        self._ready = threading.Event()
        self.server = server.make(
            create_app(self.services, runs=RunFolders(prepared.run.out)),
            self.services,
            drain_s=DRAIN_S,
            ready=self._ready.set,
            stop=lambda: None,
        )  # stop is ours: the engine belongs to this thread
        self._thread = threading.Thread(target=self.server.run, args=([sock],), name="trimtab-http", daemon=True)

    def start(self) -> None:
        """Answer from now on, and say where."""
        self._take_snapshots()
        self._thread.start()
        while self._thread.is_alive() and not self._ready.wait(0.1):
            pass
        names = ", ".join([self.services.base_name, *self.shown])
        say(f"serving {names} at http://{HOST}:{self.sock.getsockname()[1]} for this machine only, as long as it trains", err=True)
        self._turn_ended = time.monotonic()

    def turn(self) -> None:
        """Between two steps: newer snapshots, and as long as there are requests, as much time for them as training has had since the last
        turn. What goes wrong here ends the server and never the run."""
        if self.failed:
            return
        began = time.monotonic()
        stop = began + (began - self._turn_ended)
        try:
            self._take_snapshots()
            while (self.engine.step() or self.engine.stats().loading) and time.monotonic() < stop:
                pass
        except Exception as error:
            self._fail(error)
            self.close()
        self._turn_ended = time.monotonic()

    def close(self) -> None:
        """Take no more requests, finish those that run, end. Once."""
        if self.services.life.draining:
            return
        self.server.handle_exit(signal.SIGTERM, None)
        try:
            if not self.failed:
                self.engine.drain(DRAIN_S)
            self.engine.close()
        except Exception as error:
            self._fail(error)
        if self._thread.is_alive():
            self._thread.join(DRAIN_S + 2 * server.LAST_S)

    def _fail(self, error: Exception) -> None:
        log.error("serving has failed", exc_info=error)
        self.failed = True
        self.listener.warning(f"serving has failed and ends, the run goes on: {type(error).__name__}: {error}")

    def _take_snapshots(self) -> None:
        """Let the names stand for the variants as they are now, where they have changed and it is not too soon."""
        began = time.monotonic()
        if began < self._snapshots_due:
            return
        for v in [v for v in self.prepared.variants if not isinstance(v, FullVariant)]:  # clones may have joined
            state = v.progress.step, v.live  # the end of a variant may bring its best tensors back, without a step
            known = self.shown.get(v.name)
            if known is None or known[0] != state:
                new = snapshot(f"{v.name} after step {v.progress.step}", self.engine.base, v.method, v.trained(), v.head)
                self.shown[v.name] = state, new
                (self.services.catalog.put if known is None else self.services.catalog.replace)(v.name, new, LOCAL)
        now = time.monotonic()
        self._snapshots_due = now + (now - began) * (1 / SNAPSHOT_SHARE - 1)

    def _finished(self, request: Request, *facts: Any) -> None:
        """A request has ended. Where its snapshot was replaced while it waited for the step that ran, the snapshot was loaded after the
        catalog had let go of it, and nobody else would."""
        self.services.metrics.finished(request, *facts)
        adapter = request.adapter
        if adapter is not None and all(s.digest != adapter.digest for _, s in self.shown.values()):
            self.engine.evict(adapter.digest)


class AtOnce(Executor):
    """Runs what it is given before it returns: an adapter is a copy in memory, and another thread may not compute."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done
