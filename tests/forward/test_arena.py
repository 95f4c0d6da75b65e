"""Rows of an arena: they never overlap, hold what was written, and are read through one tensor; adapters give theirs back."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from tests.laws.standin import OnDevice, standin
from tests.store.common import tiny_base
from trimtab import ops
from trimtab.forward.arena import Arena, Layout, Placed, in_order, tables_of
from trimtab.forward.packs import PackedAdapter, together
from trimtab.methods import LoraConfig
from trimtab.methods.base import Packed
from trimtab.store import Adapter

HERE = torch.device("cpu")


def edits(r: int, seed: int = 0) -> dict[str, Packed]:
    generator = torch.Generator().manual_seed(seed)
    factors = {"A": torch.randn(r, 12, generator=generator), "B": torch.randn(20, r, generator=generator)}
    return {"q": Packed(ops.lora, factors), "norm": Packed(ops.scale_output, {"g": torch.randn(7, generator=generator)})}


def test_rows_of_any_sizes_never_overlap() -> None:
    """A thousand rows come and go; beside the arena a plain list says which bytes are whose."""
    draw, arena = random.Random(0), Arena(10_000, HERE)
    bytes_of: dict[int, set[int]] = {}
    for name in range(1000):
        size = draw.choice((100, 256, 700, 1500))
        if (row := arena.take(size)) is None:
            sizes = [len(b) for b in bytes_of.values()]
            assert sum(sizes) + 2 * size > 10_000 - len(sizes) * size, "there was room"
            for gone in draw.sample(sorted(bytes_of), len(bytes_of) // 2):
                arena.leave(min(bytes_of.pop(gone)))
            continue
        mine = set(range(row * size, (row + 1) * size))
        assert max(mine) < 10_000 and all(mine.isdisjoint(other) for other in bytes_of.values())
        bytes_of[name] = mine


def test_what_is_written_is_read_as_views_and_as_one_tensor() -> None:
    layout = Layout.of(edits(5))
    assert layout is Layout.of(edits(6, seed=1)) is Layout.of(edits(8)), "ranks up to 8 are padded to 8"
    assert layout is not Layout.of(edits(9)) and Layout.of(edits(9)) is Layout.of(edits(16))
    arena = Arena(4 * layout.size + Layout.of(edits(16)).size, HERE)
    arena.memory.fill_(255)  # which are NaN
    written = {}
    for seed, r in enumerate((5, 8, 3)):
        row = arena.take(layout.size)
        assert row is not None
        want = edits(r, seed)
        got = Placed(arena, layout, row).write(want)
        for site, packed in want.items():
            for name, t in packed.tensors.items():
                assert torch.equal(got[site].tensors[name], t)
        written[row] = want
    A, B = (arena.tensors(layout, ("q", name)) for name in "AB")
    for row, want in written.items():
        r = len(want["q"].tensors["A"])
        assert torch.equal(A[row, :r], want["q"].tensors["A"]) and torch.equal(B[row, :, :r], want["q"].tensors["B"])
        assert not A[row, r:].any() and not B[row, :, r:].any(), "the padding is zeros"


def test_tables_and_their_order() -> None:
    a, b, small, large = Arena(1 << 16, HERE), Arena(1 << 16, HERE), Layout.of(edits(8)), Layout.of(edits(16))
    placed = [None, Placed(a, small, 3), Placed(b, small, 0), Placed(a, large, 0), Placed(a, small, 1)]
    assert in_order(placed)[0] == 0 and [i for i in in_order(placed) if i in (1, 4)] == [4, 1]
    found = {(t.arena, t.layout): t for t in tables_of(placed)}
    assert found[a, small].places == (-1, 3, -1, -1, 1) and found[a, small].slots == (4, -1, 1) and found[a, small].first == 1
    assert found[b, small].places == (-1, -1, 0, -1, -1) and len(found) == 3


@pytest.fixture(scope="module")
def packed() -> list[PackedAdapter]:
    """Adapters as they are packed before they have a row."""
    base = tiny_base()
    adapters = [Adapter.create(base, LoraConfig(r=r), seed=r) for r in (4, 8, 16, 2)]
    return [base.attached.pack(a.method, dict(a.params), a.sites) for a in adapters]


def test_adapters_of_one_layout_are_brought_together_and_give_their_rows_back(packed: list[PackedAdapter]) -> None:
    def there(adapter: PackedAdapter) -> PackedAdapter:
        moved = {s: Packed(p.kernel, {n: OnDevice(t) for n, t in p.tensors.items()}) for s, p in adapter.edits.items()}
        return PackedAdapter(moved).for_inference()

    with standin() as device:
        alone = [there(p) for p in packed]
        with device.counted() as costs:
            joined = together(alone)
        assert costs.launches == 3, "one copy for each adapter that moves"
        arenas = [p.placed.arena for p in joined if p.placed]
        assert arenas[0] is arenas[1] is arenas[3] is not arenas[2] and joined[2] is alone[2]
        for before, after in zip(packed, joined, strict=True):
            for site, edit in before.edits.items():
                assert all(torch.equal(after.edits[site].tensors[n].cpu(), t) for n, t in edit.tensors.items())
        size = joined[0].placed.layout.size
        assert arenas[0].take(size) is None
        del alone[0], joined[0]
        gc.collect()
        assert arenas[0].take(size) == 0, "the row of an adapter that is gone"
