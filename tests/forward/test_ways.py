"""Which rows of a batch run in one native call, layer by layer or through the model's own modules: an adapter decides for its own rows.

The one call needs matrix tiles. A stand-in takes its place here. It notes what it was asked to run and runs it kernel by kernel. That both
ways give the same is tested in `tests/ops/test_stack.py`, where there are tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.laws.common import cached_logits, difference, noisy, one_thread, solo, tokens
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.forward.attached import Attached
from trimtab.forward.attention import LONG, AttentionPlan
from trimtab.forward.batch import BASE, Batch, Piece, Way
from trimtab.forward.decode_path import ONE_CALL_ROWS, DecodePath
from trimtab.forward.kv_cache import PagedKV
from trimtab.forward.packs import Mix
from trimtab.methods import BottleneckConfig, IA3Config, LoraConfig
from trimtab.methods.base import SHORT_SPAN, Span
from trimtab.model import Base
from trimtab.ops import native

__all__ = ["one_thread"]
pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="no native kernels on this machine")

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KNOWN = {
    "lora": LoraConfig(r=3, target_modules=EVERY),
    "another lora": LoraConfig(r=5, target_modules=("q_proj", "down_proj")),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(reduction_factor=8),
    "head": LoraConfig(r=2, target_modules=("lm_head",)),
}
UNKNOWN = {
    "dora": LoraConfig(r=2, use_dora=True),
    "an input of two": IA3Config(target_modules=("gate_proj",), feedforward_modules=("gate_proj",)),
    "saved": LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=("o_proj",)),
    "norm": LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=("input_layernorm",)),
    "embedding": LoraConfig(r=2, target_modules=("embed_tokens", "v_proj")),
}
BEYOND = {"last norm": LoraConfig(r=2, target_modules=("v_proj",), modules_to_save=("norm",))}
"""What the one call knows, what it does not, and what lies at a module that the decode path of these tests does not look at."""


class StandIn(DecodePath):
    """A decode path whose one call is a pretence. ran: which members have run which way, by forward."""

    def __init__(self, attached: Attached):
        super().__init__(attached)
        self.stack = type("Stack", (), {})()
        self.sites -= {self.norm_name}
        self.ran: list[tuple[Way, frozenset[int], int]] = []

    def forward(self, batch: Batch, way: Way) -> torch.Tensor:
        assert self.ways(batch) == {way: batch.members}, "a part of a batch runs as it does in the whole"
        self.ran.append((way, batch.members, batch.total))
        return super().forward(batch, Way.LAYER_BY_LAYER)


@pytest.fixture
def base(monkeypatch) -> Base:
    base = Base(tiny_model("llama"), tiny_tokenizer())
    path = StandIn(base.attached)
    monkeypatch.setattr(Attached, "decode_path", path)
    return base


def adapters(base: Base, *kinds: dict[str, object]) -> dict[str, object]:
    return {name: noisy(base, config, seed=i) for kind in kinds for i, (name, config) in enumerate(kind.items(), 10 * len(kind))}


def test_each_adapter_decides_for_its_own_rows(base: Base) -> None:
    """Two sequences of each and of the base, interleaved, through prefill and decoding; each equals a full forward of its own."""
    made = [None, *adapters(base, KNOWN, UNKNOWN, BEYOND).values()]
    entries = [(a, tokens(7 + i % 2, 3 * i + k)) for k in range(2) for i, a in enumerate(made)]
    sequences, who = [s for _, s in entries], [a for a, _ in entries]
    got = cached_logits(base, sequences, who, [[4, 1, 1, *[1] * (len(s) - 6)] for s in sequences])
    for logits, want in zip(got, solo(base, sequences, who), strict=True):
        assert difference(logits, want) <= 1e-5
    path, known, beyond = Attached.decode_path, len(KNOWN), len(KNOWN) + len(UNKNOWN)
    ways = {Way.ONE_CALL: {BASE, *range(known)}, Way.LAYER_BY_LAYER: set(range(known, beyond))}
    assert [(way, set(members)) for way, members, _ in path.ran][:2] == list(ways.items()), "in the first forward"
    rows = dict.fromkeys(Way, 0)
    for a, s in entries:
        member = made.index(a) - 1
        rows[next((w for w, members in ways.items() if member in members), Way.MODEL)] += len(s)
    assert base.attached.cached_rows == rows


def test_an_adapter_without_rows_decides_nothing(base: Base) -> None:
    made = adapters(base, KNOWN, UNKNOWN, BEYOND)
    mix, _ = base.mix(list(made.values()))
    batch = fed(base, [(BASE, 3), (0, 2), (2, 1)], mix)
    assert Attached.decode_path.ways(batch) == {Way.ONE_CALL: {BASE, 0, 2}}


@pytest.mark.parametrize(
    "lengths",
    [[(BASE, 1), (0, LONG), (1, 1)], [(BASE, LONG - 1)] * (ONE_CALL_ROWS // (LONG - 1) + 1)],
    ids=["a long prompt", "many rows"],
)
def test_rows_that_go_layer_by_layer_take_the_others_along(base: Base, lengths: list[tuple[int, int]]) -> None:
    mix, _ = base.mix(list(adapters(base, KNOWN).values()))
    assert Attached.decode_path.ways(fed(base, lengths, mix)) == {Way.LAYER_BY_LAYER: {m for m, _ in lengths}}


def test_an_adapter_with_many_rows_in_short_sequences_stays_in_the_one_call(base: Base) -> None:
    """What a server decodes where most requests are for one adapter. The slot of every row is told."""
    mix, _ = base.mix(list(adapters(base, KNOWN).values()))
    batch = fed(base, [(1, 1), *[(0, SHORT_SPAN // 2 + 1)] * 2, (BASE, 3)], mix)
    assert Attached.decode_path.ways(batch) == {Way.ONE_CALL: {BASE, 0, 1}}
    assert batch.rows(mix.members).slot_T.tolist() == [-1] * 3 + [0] * (SHORT_SPAN + 2) + [1]


def test_a_long_prompt_elsewhere_takes_nobody_along(base: Base) -> None:
    """Rows that run through the model's own modules do not count."""
    mix, _ = base.mix(list(adapters(base, KNOWN, BEYOND).values()))
    last = len(mix.adapters) - 1
    batch = fed(base, [(BASE, 1), (0, 2), (last, LONG)], mix)
    assert Attached.decode_path.ways(batch) == {Way.ONE_CALL: {BASE, 0}, Way.MODEL: {last}}


def fed(base: Base, lengths: Sequence[tuple[int, int]], mix: Mix) -> Batch:
    spec = base.spec
    cache = PagedKV(spec.num_layers, 100, 4, *spec.kv_shape, base.dtype, base.device)
    pieces = [Piece(torch.tensor(tokens(n, i)), m, list(range(25 * i, 25 * i + 25))) for i, (m, n) in enumerate(lengths)]
    return base.batch(pieces, mix, cache=cache)


def test_a_part_of_a_batch_by_hand(base: Base) -> None:
    """Three sequences of the base, of member 1 and of member 4; the parts are the middle one, and the two others."""
    batch = fed(base, [(4, 3), (BASE, 2), (1, 4)], Mix([]))
    assert batch.members == {BASE, 1, 4} and batch.where == [(6, 9), (0, 2), (2, 6)]
    one, two = batch.part(batch.index({1})), batch.part(batch.index({BASE, 4}))
    assert (one.spans, two.spans) == ([Span(0, 4, 1)], [Span(2, 5, 4)])
    assert [(r.start, r.stop, r.keys) for r in one.plan.runs] == [(0, 4, ((200, 204),))]
    assert [(r.start, r.stop, r.keys) for r in two.plan.runs] == [(0, 2, ((100, 102),)), (2, 5, ((0, 3),))]
    assert one.plan.write_T.tolist() == [200, 201, 202, 203] and two.plan.write_T.tolist() == [100, 101, 0, 1, 2]
    assert two.ids_T.tolist() == tokens(2, 1) + tokens(3, 0) and two.position_T.tolist() == [0, 1, 0, 1, 2]
    assert [p[0] for p in two.plan.places] == [25, 0] and isinstance(one.plan, AttentionPlan)


def test_training_and_full_forwards_are_not_counted(base: Base) -> None:
    base.logits([tokens(5, 1)])
    assert not any(base.attached.cached_rows.values())
