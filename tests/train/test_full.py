"""Full fine-tuning trains the base that the adapters beside it see, and what is saved is what was trained."""

from __future__ import annotations

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
