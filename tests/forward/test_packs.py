"""Packed adapters and mixes: what the tables of native kernels hold, and that a mix makes them of what its adapters keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.store.common import tiny_base
from trimtab import ops
from trimtab.forward.packs import Mix
from trimtab.methods import IA3Config, LoraConfig
from trimtab.store import Adapter

SITES = tuple(f"model.layers.1.self_attn.{p}_proj" for p in "qkv")


@pytest.fixture(scope="module")
def packed():
    """Adapters of different targets, ranks and methods."""
    base = tiny_base()
    configs = [
        LoraConfig(r=4, lora_alpha=8),
        LoraConfig(r=2, target_modules=("q_proj", "v_proj")),
        IA3Config(),
        LoraConfig(r=6, target_modules=("v_proj", "q_proj", "down_proj"), layers_to_transform=(1,)),
        LoraConfig(r=4),
    ]
    return [base.pack(Adapter.create(base, config, seed=i)) for i, config in enumerate(configs)]


def tables(parts, count, slots):
    """What a kernel reads behind `LoraParts.address`."""
    number, first, width, A, B, rank, S = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_int64 * 7).from_address(parts.address)).tolist()
    assert (number, S) == (count, slots)
    read = lambda at, kind, n: np.ctypeslib.as_array((kind * n).from_address(at)).copy()  # noqa: E731
    int64, int32 = np.ctypeslib.ctypes.c_int64, np.ctypeslib.ctypes.c_int32
    shape = (count, slots)
    return (
        read(first, int64, count).tolist(),
        read(width, int64, count).tolist(),
        *(read(at, kind, count * slots).reshape(shape) for at, kind in ((A, int64), (B, int64), (rank, int32))),
    )


@pytest.mark.parametrize("members", [(0, 1, 2, 3, 4), (1, 3), (4, 0), (3, 2)])
def test_tables_are_those_of_a_plain_loop(packed, members):
    adapters = [packed[i] for i in members]
    mix, starts, widths = Mix(adapters), np.array([0, 64, 96]), np.array([64, 32, 32])
    here = [s for s in range(3) if any(SITES[s] in a.edits and a.edits[SITES[s]].kernel is ops.lora for a in adapters)]
    found = tables(mix.lora_parts(SITES, starts, widths), len(here), len(adapters))
    assert found[:2] == (starts[here].tolist(), widths[here].tolist())
    for line, site in enumerate(here):
        for slot, adapter in enumerate(adapters):
            edit = adapter.edits.get(SITES[site])
            got = [int(table[line, slot]) for table in found[2:]]
            if edit is None or edit.kernel is not ops.lora:
                assert got == [0, 0, 0]
            else:
                A, B = edit.tensors["A"], edit.tensors["B"]
                assert got == [A.data_ptr(), B.data_ptr(), len(A)]
                assert A.is_contiguous() and B.T.is_contiguous()


def test_groups_are_those_of_a_plain_loop(packed):
    mix = Mix(packed)
    for site in {site for a in packed for site in a.edits}:
        want: dict = {}
        for i, adapter in enumerate(packed):
            if site in adapter.edits:
                want.setdefault(adapter.edits[site].kernel, []).append(i)
        assert {g.kernel: list(g.members) for g in mix.groups[site]} == want
        assert all(g.packs.items == [packed[i].edits[site] for i in g.members] for g in mix.groups[site])


def test_a_second_mix_looks_at_no_tensor(packed, monkeypatch):
    """What an adapter knows of its factors does not depend on the mix, so a new mix costs no call of torch for each site and adapter."""
    widths, calls = np.array([64, 32, 32]), []
    Mix(packed).lora_parts(SITES, widths, widths)
    real = torch.Tensor.data_ptr
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda t: calls.append(t) or real(t))
    assert Mix(packed[::-1]).lora_parts(SITES, widths, widths) is not None
    assert calls == []
