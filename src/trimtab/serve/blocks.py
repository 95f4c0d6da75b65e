"""KV blocks: which sequences hold them, and which of them have the beginning of a prompt that may come again (a prefix cache).

A full block is identified by a hash chain over everything that its keys and values depend on: base, adapter, tenant, and every token from
the first one on. Only full blocks are shared. So a shared block is never written again, and nothing is ever copied. This file does not know
the contents of blocks, nor the sequences.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

VIRTUAL = -1
"""Stands for a virtual token in a key: the adapter's digest, with which every chain begins, says which."""


def chain_start(fingerprint: str, digest: str | None, tenant: str | None, salt: str, block_size: int) -> bytes:
    """The hash before the first block. digest: None is the base. tenant: None shares among all tenants."""
    owner = [b"shared"] if tenant is None else [b"tenant", tenant.encode()]
    adapter = [b"base"] if digest is None else [b"adapter", digest.encode()]
    return _hash([b"trimtab kv 1", fingerprint.encode(), *adapter, *owner, b"salt", salt.encode(), block_size.to_bytes(8, "little")])


def chain_next(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block: the hash of the one before it and of its own tokens."""
    return _hash([before, array("q", tokens).tobytes()])


def chain_activated(before: bytes, digest: str, at: int) -> bytes:
    """Stands before the first block in which an aLoRA is on, from token `at` of the sequence; the blocks before are the base's. The same
    tokens may be activated elsewhere in a longer prompt."""
    return _hash([before, b"activated", digest.encode(), at.to_bytes(8, "little")])


def _hash(fields: Iterable[bytes]) -> bytes:
    """Each field with its length before it, so that no two lists of fields give the same bytes."""
    digest = sha256()
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()


class BlockPool:
    """`total` blocks with reference counts. A block without holders is free. If it has a key, it is also cached: it can be found again
    until its room is needed (the least recently freed block goes first)."""

    def __init__(self, total: int):
        self.total = total
        self._empty = list(range(total - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * total
        self._key: list[bytes | None] = [None] * total
        self._digest: list[str | None] = [None] * total
        self._by_key: dict[bytes, int] = {}
        self._by_digest: dict[str, set[int]] = {}

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        return self.total - self.available

    @property
    def cached(self) -> int:
        """Free blocks that hold a known prefix."""
        return len(self._cached)

    @property
    def digests(self) -> list[str]:
        """The adapters of which it knows blocks."""
        return list(self._by_digest)

    def held(self, block: int) -> bool:
        return self._holders[block] > 0

    def take(self, count: int) -> list[int]:
        """`count` blocks of one's own, whose content is not known. The caller has looked at `available`."""
        assert count <= self.available, f"{count} blocks wanted, {self.available} available"
        taken = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block = self._cached.popitem(last=False)[0]
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of known keys from the first one on. Their reference counts do not change."""
        found = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._cached[block]
            self._holders[block] += 1

    def publish(self, block: int, key: bytes, digest: str | None) -> None:
        """Say what a full block that one holds contains. Where the key is known already it stays unknown: one of a kind is enough."""
        if key in self._by_key or self._key[block] is not None:
            return
        self._key[block], self._by_key[key] = key, block
        if digest is not None:
            self._digest[block] = digest
            self._by_digest.setdefault(digest, set()).add(block)

    def release(self, blocks: Sequence[int]) -> None:
        """One holder less for each. The end of a sequence is the first to go when room is needed: its beginning is likelier to be asked
        for again."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is released by nobody's holder"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._key[block] is None:
                    self._empty.append(block)
                else:
                    self._cached[block] = None

    def forget(self, digest: str) -> None:
        """Nothing of this adapter is found again; who holds blocks keeps them."""
        for block in list(self._by_digest.get(digest, ())):
            self._forget(block)
            if self._holders[block] == 0:
                del self._cached[block]
                self._empty.append(block)

    def _forget(self, block: int) -> None:
        key, digest = self._key[block], self._digest[block]
        assert key is not None
        del self._by_key[key]
        self._key[block] = self._digest[block] = None
        if digest is not None:
            self._by_digest[digest].discard(block)
            if not self._by_digest[digest]:
                del self._by_digest[digest]
