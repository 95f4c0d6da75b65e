"""The lean forward: when it is used, and what for."""

from __future__ import annotations

from collections import namedtuple

import psutil
import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.lean import Lean
from trimtab.model import Base
from trimtab.ops import native

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason="no native kernels on this machine")


@pytest.mark.parametrize("total", [2**40, 2**10])
def test_packing_depends_on_the_machine_and_not_on_what_is_free(monkeypatch, total: int) -> None:
    memory = namedtuple("memory", "total available")
    base, packs = Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer()), []
    monkeypatch.setattr(torch, "cat", lambda tensors, real=torch.cat: packs.append(len(tensors)) or real(tensors))
    for free in (2**40, 0):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: memory(total, free))
        Lean(base.attached)
        assert bool(packs) is (total == 2**40), "weights that share an input are laid out side by side"
        packs.clear()
