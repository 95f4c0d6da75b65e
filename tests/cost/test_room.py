"""A run that has no room in memory is refused before its base is loaded, and what would fit does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.objectives.test_new_objective import write_pairs
from tests.train.common import METHODS, run_file, tiny_base
from trimtab.bases.shapes import read_architecture
from trimtab.cost import room
from trimtab.data import Source, load_examples
from trimtab.memory import OutOfMemory
from trimtab.objectives import OBJECTIVES
from trimtab.train import RunConfig, train
from trimtab.train.check import check, checked
from trimtab.train.sweep import sweep
from trimtab.train.trials import Sweep

PAIRS = [{"prompt": "x" * (20 + i), "completion": "y" * 20} for i in range(40)]


@pytest.fixture
def content(tmp_path: Path, tiny_llama_folder: Path) -> dict[str, Any]:
    variants = {"v": METHODS["lora"] | {"data": "a", "batch_size": 32}}
    found = run_file(tmp_path, variants, base=str(tiny_llama_folder), dtype="float32")
    found["data"] = {"a": found["data"]["a"]}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return found


def needed(content: dict[str, Any], folder: Path) -> int:
    """As `check` says, without the base's weights, which lie in a file."""
    estimate = check(RunConfig.from_dict(content, root=folder)).estimate
    assert estimate is not None
    base = read_architecture(content["base"])
    assert base.dtype == torch.float32
    return estimate.memory_bytes[0] - base.parameters * 4


def test_what_does_not_fit_is_refused_before_loading_and_what_would_fit_does(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = int(0.8 * needed(content, tmp_path))
    for name in ("most_bytes", "available_bytes"):
        monkeypatch.setattr(room, name, lambda _: free)
    monkeypatch.setattr("trimtab.train.before.load_base", lambda *_, **__: pytest.fail("the base is loaded"))
    with pytest.raises(OutOfMemory) as refused:
        train(RunConfig.from_dict(content, root=tmp_path))
    fixes = str(refused.value.fix).removeprefix("set ").partition(";")[0].split(", or ")
    assert [fix.partition(":")[0] for fix in fixes] == ["max_tokens", "batch_size", "activation_checkpointing"]
    for fix in fixes:
        name, _, value = fix.partition(": ")
        if name == "batch_size":
            changed = content | {"variants": {"v": content["variants"]["v"] | {name: int(value)}}}
        else:
            changed = content | {name: value == "true" or int(value)}
        assert needed(changed, tmp_path) <= free, fix
    assert not (tmp_path / "out").exists()


def test_a_sweep_in_groups_asks_for_its_greediest_trial(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = int(0.8 * needed(content, tmp_path))
    (tmp_path / "valid.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    content["data"]["a"] = content["data"]["a"] | {"valid": "valid.jsonl"}
    del content["variants"]
    content["sweep"] = {
        "variant": METHODS["lora"] | {"data": "a", "max_steps": 2},
        "search": {"batch_size": [1, 32]},
        "memory_gb": 1.0,
    }
    for name in ("most_bytes", "available_bytes"):
        monkeypatch.setattr(room, name, lambda _: free)
    monkeypatch.setattr("trimtab.train.sweep.load_base", lambda *_, **__: pytest.fail("the base is loaded"))
    with pytest.raises(OutOfMemory, match="this run does not fit"):
        sweep(Sweep.from_dict(content, root=tmp_path))


def test_rows_are_read_only_where_it_is_not_clear_without_them(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = RunConfig.from_dict(content, root=tmp_path), list[str]()
    most = room.at_most(run, read_architecture(content["base"]))
    assert most.bytes()[0] >= check(run).estimate.memory_bytes[0]  # type: ignore[union-attr]
    monkeypatch.setattr(room, "available_bytes", lambda _: most.bytes()[1])
    room.refuse_without_room(most, lambda: pytest.fail("the rows are read"), said.append, loaded=True)
    monkeypatch.setattr(room, "available_bytes", lambda _: 1000)
    room.refuse_without_room(most, lambda: most, said.append, loaded=True)
    assert len(said) == 1 and "may not fit" in said[0]
    monkeypatch.setattr(room, "available_bytes", lambda _: most.bytes()[1])
    room.refuse_without_room(most, lambda: most, said.append, loaded=True, sharers=2)
    assert len(said) == 2 and "are free on cpu for each of 2 ranks" in said[1], "all of it is enough for one, not for two"


@pytest.mark.parametrize("objective", ["dpo", "kto", "distil"])
def test_nothing_needs_more_than_is_told_without_its_rows(objective: str, content: dict[str, Any], tmp_path: Path) -> None:
    """Of rows as long as is allowed, the segments of one of which are more than max_tokens."""
    if objective == "distil":
        (tmp_path / "pairs.jsonl").write_text((tmp_path / "a.jsonl").read_text())
    else:
        rows = write_pairs(tmp_path / "pairs.jsonl", 12)
        long = [row | {side: row[side] + " y" * 40 for side in ("chosen", "rejected")} for row in rows]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    parts = OBJECTIVES[objective].parts
    found = load_examples([Source("pairs.jsonl")], tiny_base().tokenizer, root=tmp_path, max_length=1000, parts=parts).examples
    longest = int(found.longest.max())
    variant = METHODS["lora"] | {"data": "pairs", "objective": objective, "max_length": longest, "batch_size": 1}
    changed = content | {"data": {"pairs": {"train": "pairs.jsonl"}}, "variants": {"v": variant}, "max_tokens": 64}
    run = RunConfig.from_dict(changed, root=tmp_path)
    most, need = room.at_most(run, read_architecture(content["base"])), checked(run)[1]
    assert need is not None and most.referred >= need.referred > 0
    assert most.forward_tokens >= need.forward_tokens == max(found.tokens) and most.bytes()[0] >= need.bytes()[0]
    assert objective == "distil" or need.forward_tokens > longest
