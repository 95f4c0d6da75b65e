"""Network namespaces that a test makes for itself, each with a wire to the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Namespace:
    """name: for `ip netns exec`. address: of what runs in it; outside: of this end of its wire."""

    name: str
    address: str
    outside: str


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)


@contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    """So many, which do not reach each other. The test is skipped, with the reason, where none can be made."""
    if shutil.which("ip") is None or os.getuid() != 0:
        pytest.skip("network namespaces need root and `ip` (apt-get install iproute2)")
    with ExitStack() as stack:
        made = []
        for i in range(count):
            name, wire = f"trimtab-{os.getpid()}-{i}", f"tt{os.getpid() % 10**6}x{i}"
            space = Namespace(name, f"10.213.{i}.2", f"10.213.{i}.1")
            try:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)  # its end of the wire goes with it, and so the other
                ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
            ip("addr", "add", f"{space.outside}/30", "dev", wire)
            ip("link", "set", wire, "up")
            ip("-n", name, "addr", "add", f"{space.address}/30", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            made.append(space)
        yield made
