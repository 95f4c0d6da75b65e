"""KV blocks: counts of holders, what is found again, what a key says."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trimtab.serve.blocks import BlockPool, chain_next, chain_start


def test_every_part_of_a_key_counts_and_lengths_part_the_fields():
    starts = [
        chain_start("base", "d", "t", "s", 16),
        chain_start("base2", "d", "t", "s", 16),
        chain_start("base", None, "t", "s", 16),
        chain_start("base", "dt", "", "s", 16),
        chain_start("base", "d", None, "s", 16),
        chain_start("base", "d", "shared", "s", 16),
        chain_start("base", "d", "t", "", 16),
        chain_start("base", "d", "ts", "", 16),
        chain_start("base", "d", "t", "s", 32),
        chain_start("base", "base", "t", "s", 16),
        chain_start("based", "", "t", "s", 16),
        chain_start("base", "d", "a", "bsaltc", 16),
        chain_start("base", "d", "asaltb", "c", 16),
    ]
    assert all(a != b for a, b in combinations(starts, 2)) and {len(s) for s in starts} == {32}
    assert chain_start("base", "d", "t", "s", 16) == starts[0]
    nexts = [chain_next(starts[0], t) for t in ([1, 2], [2, 1], [1], [1, 2, 0], [-1, 2], [])] + [chain_next(starts[1], [1, 2])]
    assert all(a != b for a, b in combinations(nexts, 2))


def test_a_key_depends_on_all_tokens_before():
    start = chain_start("b", None, "", "", 2)
    assert chain_next(chain_next(start, [1, 2]), [3, 4]) != chain_next(chain_next(start, [1, 5]), [3, 4])


def test_free_blocks_are_found_again_until_there_is_no_other_room():
    pool = BlockPool(4)
    blocks = pool.take(3)
    for i, block in enumerate(blocks[:2]):
        pool.publish(block, bytes([i]), "d")
    assert pool.find([b"\0", b"\1", b"\2"]) == blocks[:2] and pool.find([b"\2", b"\0"]) == []
    pool.release(blocks)
    assert (pool.used, pool.cached, pool.available) == (0, 2, 4)
    pool.share(pool.find([b"\0"]))
    assert pool.cached == 1 and pool.held(blocks[0])
    pool.take(3)
    assert pool.find([b"\0", b"\1"]) == blocks[:1], "the end of a prompt goes before its beginning, what is held stays"


def test_the_least_recently_freed_goes_first():
    pool = BlockPool(3)
    a, b, c = (pool.take(1)[0] for _ in range(3))
    for i, block in enumerate((a, b, c)):
        pool.publish(block, bytes([i]), None)
    pool.release([b])
    pool.release([a])
    assert pool.take(1) == [b] and pool.find([b"\1"]) == [] and pool.find([b"\0"]) == [a]
    assert pool.find([b"\2"]) == [c], "still held, and still found"


def test_the_end_of_a_sequence_goes_before_its_beginning():
    pool = BlockPool(2)
    blocks = pool.take(2)
    for i, block in enumerate(blocks):
        pool.publish(block, bytes([i]), None)
    pool.release(blocks)
    assert pool.take(1) == blocks[1:]


def test_the_second_of_a_kind_stays_unknown():
    pool = BlockPool(2)
    a, b = pool.take(2)
    pool.publish(a, b"k", "d")
    pool.publish(b, b"k", "d")
    pool.release([a, b])
    assert pool.cached == 1 and pool.find([b"k"]) == [a]


def test_forgetting_an_adapter_forgets_its_blocks_alone():
    pool = BlockPool(4)
    a, b, c = pool.take(3)
    pool.publish(a, b"a", "x")
    pool.publish(b, b"b", "y")
    pool.publish(c, b"c", "x")
    pool.release([a, b])
    pool.forget("x")
    pool.forget("unknown")
    assert pool.find([b"a"]) == [] and pool.find([b"c"]) == [] and pool.find([b"b"]) == [b]
    assert (pool.used, pool.cached) == (1, 1)
    pool.release([c])
    assert (pool.used, pool.cached, pool.available) == (0, 1, 4)


def test_what_is_not_there_cannot_be_taken_nor_released():
    pool = BlockPool(2)
    with pytest.raises(AssertionError):
        pool.take(3)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="nobody's holder"):
        pool.release(blocks)


class Pool(RuleBasedStateMachine):
    """Random holders against a plain list of who holds what."""

    def __init__(self):
        super().__init__()
        self.pool, self.holders, self.keys = BlockPool(6), [], 0

    @rule(n=st.integers(1, 4))
    def take(self, n):
        if n <= self.pool.available:
            taken = self.pool.take(n)
            assert not {b for h in self.holders for b in h} & set(taken), "a block that somebody holds"
            self.holders.append(taken)

    @precondition(lambda self: self.holders)
    @rule(i=st.integers(0, 9), digest=st.sampled_from(["x", "y", None]))
    def publish(self, i, digest):
        for block in self.holders[i % len(self.holders)]:
            self.pool.publish(block, self.keys.to_bytes(4, "little"), digest)
            self.keys += 1

    @rule(k=st.integers(0, 40))
    def share(self, k):
        found = self.pool.find([k.to_bytes(4, "little")])
        self.pool.share(found)
        self.holders.append(found)

    @precondition(lambda self: self.holders)
    @rule(i=st.integers(0, 9))
    def release(self, i):
        self.pool.release(self.holders.pop(i % len(self.holders)))

    @rule(digest=st.sampled_from(["x", "y"]))
    def forget(self, digest):
        self.pool.forget(digest)

    @invariant()
    def counts_agree(self):
        held = {b for h in self.holders for b in h}
        assert self.pool.used == len(held) and self.pool.available == 6 - len(held)
        assert all(self.pool.held(b) == (b in held) for b in range(6))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None)
