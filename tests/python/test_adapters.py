"""Merging and exporting from Python: what is written is read by transformers and by peft, and computes what base and adapter do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trimtab
from tests.tiny import tiny_folder
from trimtab.errors import ConfigError, NotMergeable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("bases") / "tiny")


def saved(base: trimtab.Base, where: Path) -> trimtab.Adapter:
    adapter = trimtab.Adapter.create(base, trimtab.LoraConfig(r=4), seed=1)
    generator = torch.Generator().manual_seed(0)
    adapter.params = {k: t + 0.05 * torch.randn(t.shape, generator=generator) for k, t in adapter.params.items()}
    adapter.save(where)
    return adapter


def test_a_merged_folder_is_base_and_adapter(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, ids = trimtab.load_base(str(folder), dtype="float32"), [5, 9, 40, 41]
    adapter = saved(base, tmp_path / "adapter")
    (expected,) = base.logits([ids], [adapter])
    for name, given, more in (("object", adapter, {}), ("folder", tmp_path / "adapter", {"base": str(folder)})):
        report = trimtab.merge(given, tmp_path / name, **more)
        with torch.no_grad():
            got = AutoModelForCausalLM.from_pretrained(report.folder)(torch.tensor([ids])).logits[0]
        assert (got - expected).abs().max() < 1e-3
    with pytest.raises(NotMergeable):
        trimtab.merge(trimtab.Adapter.create(base, trimtab.PromptTuningConfig(num_virtual_tokens=2)), tmp_path / "prompt")
    assert not (tmp_path / "prompt").exists()


def test_an_export_is_read_by_peft(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base, ids = trimtab.load_base(str(folder), dtype="float32"), [5, 9, 40, 41]
    adapter = saved(base, tmp_path / "adapter")
    report = trimtab.export(tmp_path / "adapter", tmp_path / "out", base=str(folder))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), report.folder)
    with torch.no_grad():
        got = model(torch.tensor([ids])).logits[0]
    assert (got - base.logits([ids], [adapter])[0]).abs().max() < 1e-3


def test_mistakes_are_said_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the base that it is for is missing"):
        trimtab.merge(tmp_path / "adapter", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"format = 'pfet' \(did you mean 'peft'"):
        trimtab.export("nothing", tmp_path / "x", "pfet", base="nothing")
    base = trimtab.load_base(str(folder), dtype="float32")
    with pytest.raises(ConfigError, match="beside an Adapter"):
        trimtab.merge(trimtab.Adapter.create(base, trimtab.LoraConfig(r=2)), tmp_path / "x", base=base)
    with pytest.raises(TypeError, match=r"fromat: unknown \(did you mean 'format'"):
        trimtab.export("a", "b", fromat="peft")  # type: ignore[call-arg]
