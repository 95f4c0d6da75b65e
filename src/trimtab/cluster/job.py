"""A joint group as a cluster sees it: the run, and what it asks of a node."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.bases.shapes import Architecture
from trimtab.cluster.nodes import Node
from trimtab.cost.room import Need, at_most
from trimtab.errors import ConfigError, first_of
from trimtab.train.config import RunConfig
from trimtab.train.halving import Halving

PROCESS_BYTES = 600_000_000
"""Of a Python process with torch and transformers, before it holds anything."""


@dataclass(frozen=True)
class Asks:
    """What a group asks of a node. memory: bytes of the machine's memory, beside that of a GPU."""

    cpus: int
    gpus: int
    memory: int

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPU" if self.gpus else ""
        return f"{self.memory / 1e9:.2f} GB of memory, {self.cpus} CPU{'s' * (self.cpus != 1)}{gpus}"

    def fits(self, node: Node) -> bool:
        """Whether the node could take the group if nothing else ran there."""
        return node.cpus >= self.cpus and node.gpus >= self.gpus and node.memory >= self.memory


@dataclass(frozen=True)
class Job:
    """A run that one node carries out. name: in messages. dtype: what the other nodes compute in, where they must agree. store, extend: as
    `train` has them."""

    name: str
    run: RunConfig
    asks: Asks
    resume: bool = False
    halving: Halving | None = None
    dtype: str | None = None
    store: Path | None = None
    extend: bool = False

    def again(self) -> Job:
        """The same, after its node was lost."""
        return dataclasses.replace(self, resume=True)


def need_of(run: RunConfig, shape: Architecture | None) -> Need:
    """What decides the run's memory, from its rows where these can be read here. TrimtabError where its base cannot be had here."""
    from trimtab.train.check import checked

    need = checked(run)[1]
    if need is not None:
        return need
    if shape is None:
        raise ConfigError(f"{run.out}: no variant has rows to train on", fix="`trimtab check` says why")
    return at_most(run, shape)


def part_of_need(need: Need, run: RunConfig) -> Need:
    """Of some of the variants."""
    names = {v.name for v in run.variants}
    return dataclasses.replace(need, run=run, variants=[v for v in need.variants if v.name in names])


def asks(need: Need, nodes: Sequence[Node], cpus: int | None) -> Asks:
    """Of a group whose memory is decided by `need`. cpus: None takes all of the smallest node that has enough memory, since two groups on
    the same cores are no faster than one after the other. On GPUs a group takes one, and its share of the cores.

    There, memory is only what loading the base takes: the node itself refuses a group that does not fit its GPU.
    """
    at_gpus = [n for n in nodes if n.gpus >= 1] if need.run.device is None or _kind_of_device(need) == "cuda" else []
    if at_gpus:
        base = int(need.base.parameters * need.base.dtype.itemsize) + PROCESS_BYTES
        return Asks(cpus or max(1, math.floor(min(n.cpus / n.gpus for n in at_gpus))), 1, base)
    memory = need.bytes()[1] + PROCESS_BYTES
    having = [n.cpus for n in nodes if n.cpus >= 1 and n.memory >= memory] or [n.cpus for n in nodes if n.cpus >= 1] or [1]
    return Asks(cpus or int(min(having)), 0, memory)


def _kind_of_device(need: Need) -> str:
    """The kind of device that the run file names."""
    return str(need.run.device).partition(":")[0]


def refuse_unplaceable(wanted: Mapping[str, Asks], nodes: Sequence[Node]) -> None:
    """ConfigError that names each group that no node could take."""
    problems = [f"{name} asks for {what}" for name, what in wanted.items() if not any(what.fits(n) for n in nodes)]
    if problems:
        fix = "add a node with more, or ask for less: fewer variants a group (sweep.memory_gb), a lower max_tokens, --cpus"
        raise ConfigError("no node of the cluster can take these groups", problems=[*problems, offered(nodes)], fix=fix)


def offered(nodes: Sequence[Node]) -> str:
    """What the nodes have, of many those with most memory."""
    has = [f"{n} {n.memory / 1e9:.2f} GB, {n.cpus:g} CPUs{f', {n.gpus:g} GPUs' * bool(n.gpus)}" for n in nodes]
    return f"nodes offer: {'; '.join(first_of(has, 8)) or 'nothing, none is alive'}"
