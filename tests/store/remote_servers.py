"""Servers on 127.0.0.1 for the tests of moving adapters: a registry, S3, the hub's few calls, and a wire between them and us that fails."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.common import stirred, tiny_base
from trimtab.methods import LoraConfig
from trimtab.store.manifest import EMPTY_DESCRIPTOR
from trimtab.store.registry import Store, Version

REGISTRY = shutil.which("docker-registry") or "/usr/bin/docker-registry"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def docker_registry(folder: Path, *, htpasswd: Path | None = None) -> Iterator[str]:
    """Debian's docker-registry over an empty folder; yields host:port."""
    if not Path(REGISTRY).exists():
        pytest.skip("docker-registry is not installed")
    port = free_port()
    config = folder / "registry.yml"
    config.parent.mkdir(parents=True, exist_ok=True)
    auth = f"auth: {{htpasswd: {{realm: tests, path: {htpasswd}}}}}\n" if htpasswd else ""
    config.write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/data}}}}\n{auth}"
    )
    server = subprocess.Popen([REGISTRY, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


class Wire:
    """A TCP proxy that may fail. cut: after so many bytes to the client a connection is cut, all in all `cuts` times.

    dies: after so many bytes to clients nothing passes any more; with stalls, connections stay open, silent. flip: the byte at this offset
    of what goes to the client on a connection is another one. down: bytes that went to clients.
    """

    def __init__(
        self,
        upstream: str,
        *,
        cut: int | None = None,
        cuts: int = 1,
        dies: int | None = None,
        stalls: bool = False,
        flip: int | None = None,
    ):
        host, _, port = upstream.partition(":")
        self._upstream, self.cut, self.cuts, self.dies, self.stalls, self.flip, self.down = (
            (host, int(port)),
            cut,
            cuts,
            dies,
            stalls,
            flip,
            0,
        )
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), timeout=1).close()  # wakes the accepting thread
        self._listener.close()

    def _accept(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        _close(client, server)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := bytearray(server.recv(4096)):
                if self.dies is not None and self.down + len(data) > self.dies:
                    client.sendall(data[: max(0, self.dies - self.down)])
                    self.down = self.dies
                    while self.stalls and self._open:
                        time.sleep(0.02)
                    break
                if self.flip is not None and sent <= self.flip < sent + len(data):
                    data[self.flip - sent] ^= 1
                if self.cut is not None and self.cuts and sent + len(data) > self.cut:
                    self.cuts -= 1
                    del data[self.cut - sent :]
                    client.sendall(data)
                    self.down += len(data)
                    break
                client.sendall(data)
                sent += len(data)
                self.down += len(data)
        _close(client, server)


def _close(*sockets: socket.socket) -> None:
    for end in sockets:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


def filled(root: Path) -> tuple[Store, Version, Version]:
    """A store with two versions of acme/support that share all files but the README, and acme/legal, an adapter of its own."""
    base = tiny_base()
    store = Store(root / "store", create=True)
    first = store.publish(stirred(base, LoraConfig(r=4)), "acme/support")
    folder = store.export("acme/support@1", root / "folder")
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\nanother card\n")
    second = store.publish(folder, "acme/support", aliases=["prod"])
    store.publish(stirred(base, LoraConfig(r=2), seed=2), "acme/legal")
    return store, first, second


def contents(store: Store, ref: str, scratch: Path) -> dict[str, bytes]:
    """A version's files as an export gives them."""
    folder = store.export(ref, scratch / uuid.uuid4().hex)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_nothing_arrived(store: Store) -> None:
    """No version, no blob that is not the empty one; at most partial files in tmp."""
    assert store.list() == []
    blobs = {p.name for p in (store.root / "blobs" / "sha256").iterdir()}
    assert blobs <= {EMPTY_DESCRIPTOR.digest.removeprefix("sha256:")}
    assert all(p.name.startswith("pull-") for p in (store.root / "tmp").iterdir())
    assert store.verify().problems == ()
