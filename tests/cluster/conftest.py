"""A Ray cluster of two nodes on this machine, each with one core."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "src"
GB = 1_000_000_000
NODE: dict[str, Any] = {"num_cpus": 1, "memory": 3 * GB, "object_store_memory": 80_000_000}


def own_copies(folder: Path) -> dict[str, str]:
    """A node's environment: its working copies of runs in buckets lie in a folder of its own."""
    return {"TRIMTAB_RUNS": str(folder / "runs")}


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of commands and nodes: this source, one thread, so that sums are added in one order everywhere."""
    path = os.pathsep.join(p for p in (str(SOURCE), os.environ.get("PYTHONPATH", "")) if p)
    ours = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | ours | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # no token is left in the home folder


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`ray.cluster_utils.Cluster` with a head that takes groups and one more node. A test that kills a node adds one again."""
    utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed: pip install 'trimtab[ray]'")
    before = dict(os.environ)
    os.environ.update(environment | own_copies(tmp_path_factory.mktemp("head")))
    try:
        found = utils.Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
        found.add_node(**NODE, env_vars=own_copies(tmp_path_factory.mktemp("node")))
        yield found
        found.shutdown()
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def trimtab() -> list[str]:
    """The command."""
    return [sys.executable, "-m", "trimtab"]
