"""Which replica a request goes to. A router knows how many requests each replica has, and which adapters it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

Router = Callable[[str], int]
"""Takes an adapter's name, gives a replica's number."""
SPILL = 8
"""An adapter's replica may have so many requests more than the one that has fewest, before others are asked."""


class Seen(Protocol):
    """What a router sees of a replica. open: requests that it has; requests: that it was ever given."""

    open: int
    requests: int

    def holds(self, digest: str) -> bool: ...


def round_robin(replicas: Sequence[Seen]) -> Router:
    """One after the other."""
    turn = -1

    def choose(digest: str) -> int:
        nonlocal turn
        turn = (turn + 1) % len(replicas)
        return turn

    return choose


def by_hash(replicas: Sequence[Seen]) -> Router:
    """By the adapter's name alone: the replica whose hash with it is the highest (rendezvous hashing, Thaler and Ravishankar 1998), so that
    one replica more or less moves few adapters."""
    known: dict[str, int] = {}

    def choose(digest: str) -> int:
        if digest not in known:
            hashes = [blake2b(f"{number} {digest}".encode(), digest_size=8).digest() for number in range(len(replicas))]
            known[digest] = max(range(len(replicas)), key=hashes.__getitem__)
        return known[digest]

    return choose


def least_loaded(replicas: Sequence[Seen]) -> Router:
    """The replica with the fewest requests; of several the one that was given the fewest so far."""

    def choose(digest: str) -> int:
        return _least(replicas, range(len(replicas)))

    return choose


def by_affinity(replicas: Sequence[Seen]) -> Router:
    """Of the replicas that hold the adapter the least loaded, if it has at most SPILL requests more than any; else the least loaded of
    all."""

    def choose(digest: str) -> int:
        numbers = range(len(replicas))
        fewest = min(r.open for r in replicas)
        near = [n for n in numbers if replicas[n].open <= fewest + SPILL and replicas[n].holds(digest)]
        return _least(replicas, near or numbers)

    return choose


def _least(replicas: Sequence[Seen], numbers: Sequence[int]) -> int:
    return min(numbers, key=lambda n: (replicas[n].open, replicas[n].requests))


ROUTERS: Mapping[str, Callable[[Sequence[Seen]], Router]] = {
    "round-robin": round_robin,
    "hash": by_hash,
    "least-loaded": least_loaded,
    "affinity": by_affinity,
}
