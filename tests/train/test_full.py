"""Full fine-tuning trains the base that the adapters beside it see, and what is saved is what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_folder, tiny_tokenizer
from tests.train.common import METHODS, run_file
from trimtab.bases.copies import copied
from trimtab.model import Base, load_base
from trimtab.train import RunConfig, full, train

LONG = torch.randint(256, (1, 450), generator=torch.Generator().manual_seed(3))
"""Enough positions for rotary frequencies in bf16 to show."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return load_base(str(tiny_folder(tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)), dtype="bfloat16")


@torch.no_grad()
def by_transformers(model) -> torch.Tensor:
    model.set_attn_implementation("eager")
    return model(LONG).logits[0]


def trained(folder: Path, base: Base, monkeypatch, **keys) -> tuple[full.FullVariant, Path]:
    """A variant after its last step, and the model folder that its run has saved."""
    kept: list[full.FullVariant] = []
    made = full.FullVariant.__init__
    monkeypatch.setattr(full.FullVariant, "__init__", lambda self, *args, **kwargs: (made(self, *args, **kwargs), kept.append(self))[0])
    variants = {"full": METHODS["full"] | {"data": "a", "lr": 3e-3} | keys}
    report = train(RunConfig.from_dict(run_file(folder, variants, base=base.name), root=folder), base=base)
    return kept[0], report.out / "adapters" / "full"


def test_before_its_first_step_it_is_the_base_to_the_last_bit(tmp_path: Path, base: Base, monkeypatch) -> None:
    variant, _ = trained(tmp_path, base, monkeypatch, lr=1e-12)
    want = by_transformers(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16))
    copy = Base(copied(variant.attached.model), tiny_tokenizer())
    assert torch.equal(by_transformers(copied(copy.model)), want)
    assert torch.equal(copy.logits(LONG.tolist())[0], base.logits(LONG.tolist())[0])


def test_the_saved_folder_gives_the_logits_that_were_trained(tmp_path: Path, base: Base, monkeypatch) -> None:
    variant, folder = trained(tmp_path, base, monkeypatch)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert saved.dtype == torch.bfloat16
    assert torch.equal(by_transformers(saved), by_transformers(copied(variant.attached.model)))
    assert not torch.equal(by_transformers(saved), by_transformers(AutoModelForCausalLM.from_pretrained(base.path, dtype="auto")))


def _rows(path: Path, start: int, count: int) -> None:
    rows = [{"prompt": f"is {i} even", "completion": "no" if i % 2 else "yes"} for i in range(start, start + count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def test_a_run_that_has_validated_is_scored_by_the_weights_that_it_saves(tmp_path: Path, base: Base) -> None:
    """Answers and labels need a KV cache, and with it packed weights: those of the first validation must not be the last."""
    content = run_file(tmp_path, {"full": METHODS["full"] | {"data": "d", "lr": 1e-2, "max_steps": 6, "eval_every": 2, "keep_best": False}})
    for i, split in enumerate(("train", "valid", "test")):
        _rows(tmp_path / f"{split}.jsonl", 20 * i, 12)
    content |= {"base": base.name, "data": {"d": {s: f"{s}.jsonl" for s in ("train", "valid", "test")} | {"labels": "auto"}}}
    content["defaults"] |= {"valid_metric": "label_accuracy", "warmup_steps": 0, "schedule": "constant"}
    report = train(RunConfig.from_dict(content, root=tmp_path), base=base)
    assert len(report.summary["variants"]["full"]["valid"]["history"]) == 3
    said = [json.loads(line) for line in (report.out / "predictions" / "d-full.jsonl").read_text(encoding="utf-8").splitlines()]
    saved = load_base(str(report.out / "adapters" / "full"), dtype="bfloat16")
    prompts = [saved.tokenizer(row["prompt"])["input_ids"] for row in said]
    assert [row["answer"] for row in said] == saved.generate(prompts, max_new_tokens=4)
    for row, ids in zip(said, prompts, strict=True):
        likelihood = {label: _log_p(saved, ids, saved.tokenizer(label + "<|im_end|>")["input_ids"]) for label in ("no", "yes")}
        assert row["label"] == max(likelihood, key=likelihood.__getitem__), likelihood


def _log_p(base: Base, prompt: list[int], answer: list[int]) -> float:
    log_TV = torch.log_softmax(base.logits([prompt + answer])[0].double(), -1)
    return sum(float(log_TV[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
