"""How much memory this process may use."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> tuple[int, int]:
    """(bytes in all, of these free at the moment): the machine's, or those of the container, which sees the machine's but may use less."""
    machine = psutil.virtual_memory()
    limits = [int(text) for p in CGROUP_LIMITS if Path(p).exists() and (text := Path(p).read_text().strip()).isdigit()]
    return min([machine.total, *limits]), min([machine.available, *limits])
