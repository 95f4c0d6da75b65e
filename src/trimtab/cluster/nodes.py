"""A Ray cluster as trimtab sees it: how it is reached, and which nodes it has. Nothing else here imports Ray before it is needed."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from trimtab.errors import ConfigError

REACH_S = 5.0
"""Ray itself tries for ten minutes to reach an address at which nobody listens."""
ADDRESS = re.compile(r"(?:ray://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of HTTP/2 says first, with empty settings. A gRPC server answers with its own settings."""
SETTINGS = 4


@dataclass(frozen=True)
class Node:
    """A node that is alive. memory: bytes that it offers to tasks, as Ray counts them; what runs there is not taken off."""

    id: str
    address: str
    cpus: float
    gpus: float
    memory: int

    def __str__(self) -> str:
        return f"{self.address} ({self.id[:6]})"


@dataclass(frozen=True)
class Cluster:
    """A cluster that this process is connected to."""

    address: str

    def nodes(self) -> list[Node]:
        """Those that are alive, the one with most memory first."""
        import ray

        found = [_node(n) for n in ray.nodes() if n["Alive"]]
        return sorted(found, key=lambda n: (-n.memory, n.id))


def _node(told: dict[str, Any]) -> Node:
    has = told["Resources"]
    return Node(told["NodeID"], told["NodeManagerAddress"], has.get("CPU", 0.0), has.get("GPU", 0.0), int(has.get("memory", 0)))


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """A connection to the cluster at `address`: HOST:PORT of its head, on one of its machines; ray://HOST:PORT from elsewhere; `auto`, the
    one that this machine is part of; `local`, one of this machine alone, which ends with the block.

    ConfigError where Ray is not installed or there is no cluster at the address.
    """
    refuse_without_ray()
    _refuse_unreachable(address)
    import ray

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False if address == "local" else None)
    except Exception as error:  # of many kinds, one for each way in which an address can be wrong
        reason = f"{error}".strip().partition("\n")[0]
        raise _no_cluster(address, reason, "; where the cluster asks for a token, set RAY_AUTH_MODE=token") from error
    finally:
        for s, handler in handlers.items():  # Ray puts its own in their place, which would end a run without a checkpoint
            signal.signal(s, handler)
    try:
        yield Cluster(address)
    finally:
        ray.shutdown()


def refuse_without_ray() -> None:
    if find_spec("ray") is None:
        raise ConfigError("a cluster needs the package ray, which is not installed", fix="pip install 'trimtab[ray]', on every node")


def _refuse_unreachable(address: str) -> None:
    """ConfigError where `address` is none, or where no Ray listens there."""
    if address in ("auto", "local"):
        return
    if (found := ADDRESS.fullmatch(address)) is None or not 0 < int(found["port"]) < 65536:
        raise ConfigError(f"--ray {address!r} is no address of a cluster", fix="give HOST:PORT, ray://HOST:PORT, auto or local")
    host, port = found["host"].strip("[]"), int(found["port"])
    try:
        with socket.create_connection((host, port), timeout=REACH_S) as sock:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return
            sock.sendall(PREFACE)
            head = sock.recv(9)
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from error
    if len(head) < 4 or head[3] != SETTINGS:
        raise _no_cluster(address, "something else listens there (Ray's dashboard has another port than its head)")


def _no_cluster(address: str, reason: str, more: str = "") -> ConfigError:
    fix = "start one (`ray start --head`, which prints its address) and name it; --ray local takes this machine alone" + more
    return ConfigError(f"there is no Ray cluster at {address}: {reason}", fix=fix)
