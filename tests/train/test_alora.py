"""Runs with an aLoRA: beside a LoRA as alone, saved for peft, and refused where rows lack its call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.laws.common import one_thread
from tests.train.common import metrics, run, tiny_base
from trimtab.errors import DataError
from trimtab.store import Adapter

__all__ = ["one_thread"]


def test_it_trains_beside_others_as_alone(tmp_path: Path):
    base = tiny_base()
    call = base.encode("n ")  # every row's question begins so
    variants = {
        "called": {"method": "lora", "r": 4, "lr": 1e-2, "lora_dropout": 0.1, "alora_invocation_tokens": call, "data": "a"},
        "plain": {"method": "lora", "r": 4, "lr": 1e-2, "data": "b"},
    }
    joint, alone = run(tmp_path / "joint", variants), run(tmp_path / "alone", {"called": variants["called"]})
    losses = [[line["loss"] for line in metrics(r)["called"] if "loss" in line] for r in (joint, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][-1] < losses[0][0]
    config = json.loads((joint.out / "adapters" / "called" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == call
    both = [Adapter.load(r.out / "adapters" / "called", base) for r in (joint, alone)]
    assert both[0].method.invocation == tuple(call)
    ids = [1, 2, *call, 3, 4]
    of_joint, of_alone = (base.logits([ids], [adapter])[0] for adapter in both)
    assert float((of_joint - of_alone).abs().max()) < 1e-3  # Adam takes the sign of gradients that are nearly zero


def test_rows_without_a_call_are_named(tmp_path: Path):
    variants = {"called": {"method": "lora", "r": 4, "alora_invocation_tokens": tiny_base().encode("n 1"), "data": "a"}}
    with pytest.raises(DataError, match=r"called: .*a\.jsonl:1\b") as caught:
        run(tmp_path, variants)
    assert "more of 11" in caught.value.render() or len(caught.value.problems) > 3
