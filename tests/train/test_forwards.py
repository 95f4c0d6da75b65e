"""Into which forwards a joint step is packed, and that its results do not depend on it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model, tiny_tokenizer
from tests.train.common import METHODS, metrics, run, run_file
from trimtab.model import Base, load_base
from trimtab.train import RunConfig, step, train

SMALL = {n: METHODS[n] | {"data": "a"} for n in ("lora", "ia3", "bottleneck")}
STEPS = 2
KEYS: dict[str, Any] = {
    "defaults": {"max_steps": STEPS, "batch_size": 3, "warmup_steps": 0, "max_grad_norm": 0.5, "max_length": 128},
    "evaluate": {"generate": False},
}


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of each variant's rows, in each forward that a run makes from now on."""
    seen: list[list[int]] = []
    compute = step.forward_loss

    def listening(attached: Any, mix: Any, parts: Any) -> Any:
        seen.append([sum(e.tokens for e in p.examples) for p in parts])
        return compute(attached, mix, parts)

    monkeypatch.setattr(step, "forward_loss", listening)
    return seen


def full_at(monkeypatch: pytest.MonkeyPatch, tokens: float) -> None:
    monkeypatch.setattr(step, "FULL", tokens / torch.get_num_threads())


def test_a_forward_that_is_full_takes_no_further_variant(
    tmp_path: Path, forwards: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(monkeypatch, 1)
    run(tmp_path / "alone", SMALL, **KEYS)
    alone = list(forwards)
    assert len(alone) == STEPS * len(SMALL) and {len(f) for f in alone} == {1}
    forwards.clear()
    full_at(monkeypatch, limit := 1.5 * max(n for f in alone for n in f))
    run(tmp_path / "some", SMALL, **KEYS)
    assert {len(f) for f in forwards} == {1, 2} and all(sum(f[:-1]) < limit for f in forwards)
    forwards.clear()
    full_at(monkeypatch, math.inf)
    run(tmp_path / "all", SMALL, **KEYS)
    assert [len(f) for f in forwards] == [len(SMALL)] * STEPS


def test_results_do_not_depend_on_it(tmp_path: Path, forwards: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside each variant's own run."""
    full_at(monkeypatch, 150)
    together = metrics(run(tmp_path / "joint", SMALL, **KEYS))
    assert {len(f) for f in forwards} == {1, 2}
    for name, fields in SMALL.items():
        alone = metrics(run(tmp_path / name, {name: fields}, **KEYS))[name]
        for key in ("loss", "grad_norm"):
            assert [e[key] for e in together[name]] == pytest.approx([e[key] for e in alone], rel=1e-4), (name, key)


def test_a_packed_base_unpacks_its_matrices_for_all_at_once(
    tmp_path: Path, forwards: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(monkeypatch, 1)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base: Base = load_base(str(tmp_path / "base"), dtype="float32", device="cpu", quantize="int8")
    loras = {n: SMALL["lora"] | {"seed": i} for i, n in enumerate(("u", "v"))}
    train(RunConfig.from_dict(run_file(tmp_path / "run", loras, **KEYS), root=tmp_path / "run"), base=base)
    assert [len(f) for f in forwards] == [2] * STEPS
