"""Law 5 on disk: a merged folder, read by transformers alone, computes what base and adapter do; or nothing is
written and the reason is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.store.common import EXAMPLES, SEQUENCES, stirred, tiny_base
from tests.tiny import tiny_folder
from trimtab import bases
from trimtab.bases.load import DTYPES
from trimtab.errors import AdapterError, NotMergeable
from trimtab.methods import IA3Config, LoraConfig
from trimtab.model import Base, load_base
from trimtab.store import Adapter, merge
from trimtab.store.export import export

MERGEABLE = [(name, m) for name, m in EXAMPLES if type(m).mergeable]
REFUSING = [(name, m) for name, m in EXAMPLES if not type(m).mergeable]


@pytest.fixture(autouse=True)
def some_rows_at_a_time(monkeypatch):
    """LoRA merges the tiny matrices as it does large ones: a few rows at a time, the last time fewer."""
    monkeypatch.setattr(merge, "AT_A_TIME", 1000)


def plain_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "method"), MERGEABLE, ids=[name for name, _ in MERGEABLE])
def test_a_merged_folder_computes_what_base_and_adapter_do(family, name, method, tmp_path):
    base = tiny_base(family)
    before = bases.fingerprint_model(base.model)
    adapter = stirred(base, method)
    report = adapter.merge_into(tmp_path / "merged")
    assert report.max_difference < 1e-4 and not report.untied and report.dtype == "float32"
    assert report.relative <= report.allowed == merge.TOLERANCE[torch.float32]
    theirs = base.logits([SEQUENCES[0]], adapters=[adapter])[0]
    assert float((base.logits([SEQUENCES[0]])[0] - theirs).abs().max()) > 0.05
    torch.testing.assert_close(plain_logits(tmp_path / "merged", SEQUENCES[0]), theirs, rtol=0, atol=1e-4)
    assert bases.fingerprint_model(base.model) == before, "law 8: the base never changes"
    assert not bases.folder_problems(tmp_path / "merged")
    assert not [p.name for p in tmp_path.iterdir() if p.name != "merged"]


@pytest.mark.parametrize(("name", "method"), REFUSING, ids=[name for name, _ in REFUSING])
def test_methods_that_cannot_be_merged_say_why_and_leave_nothing(name, method, tmp_path):
    base = tiny_base()
    with pytest.raises(NotMergeable) as refusal:
        stirred(base, method).merge_into(tmp_path / "merged")
    site = method.sites(base.spec)[0]
    if site.name:
        with pytest.raises(NotMergeable) as own:
            method.merge(site, torch.empty(0), None, {})
        assert refusal.value.message == own.value.message != f"{method.name} adapters cannot be merged into the base"
    else:
        assert "before token 0" in refusal.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["embedding", "head", "saved-embedding", "saved-head", "both"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt2", "llama"])
def test_tied_embeddings_are_untied_where_only_one_side_changes(family, target, tmp_path):
    base = tiny_base(family)
    embedding, head = base.spec.embedding, base.spec.head
    method = {
        "embedding": LoraConfig(r=2, target_modules=(embedding,)),
        "head": LoraConfig(r=2, target_modules=(head,)),
        "saved-embedding": LoraConfig(r=2, target_modules=None, modules_to_save=(embedding,)),
        "saved-head": IA3Config(modules_to_save=(head,)),
        "both": LoraConfig(r=2, target_modules=(embedding, head)),
    }[target]
    adapter = stirred(base, method)
    report = adapter.merge_into(tmp_path / "merged")
    assert report.untied == base.spec.tied_head
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    theirs = base.logits([SEQUENCES[0]], adapters=[adapter])[0]
    torch.testing.assert_close(plain_logits(tmp_path / "merged", SEQUENCES[0]), theirs, rtol=0, atol=1e-4)


def test_a_large_matrix_is_not_merged_at_once(tmp_path, monkeypatch):
    """fp32 numbers of a row's block are all that a merge has beside the matrix."""
    base, real, sizes = tiny_base(), LoraConfig.merge, []
    monkeypatch.setattr(
        LoraConfig, "merge", lambda self, site, weight, *rest: sizes.append(weight.numel()) or real(self, site, weight, *rest)
    )
    stirred(base, LoraConfig(r=2, target_modules=(base.spec.embedding, "q_proj", "down_proj"))).merge_into(tmp_path / "merged")
    named = ("embed_tokens.weight", "q_proj.weight", "down_proj.weight")
    assert max(sizes) <= 1000 and sum(sizes) == sum(p.numel() for n, p in base.model.named_parameters() if n.endswith(named))


def test_a_base_from_a_folder_is_merged_as_it_is_stored(tmp_path):
    """Stored in bf16 and loaded in fp32: bf16 is written, and only the merged modules differ from what is stored."""
    folder = tiny_folder(tmp_path / "base", dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = Base(model, transformers.AutoTokenizer.from_pretrained(folder), path=folder)
    report = stirred(base, LoraConfig(r=2, target_modules=("q_proj",))).merge_into(tmp_path / "merged")
    assert report.dtype == "bfloat16"
    old, new = (transformers.AutoModelForCausalLM.from_pretrained(f, dtype="auto").state_dict() for f in (folder, tmp_path / "merged"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
    assert (tmp_path / "merged" / "tokenizer.json").exists() and (tmp_path / "merged" / "generation_config.json").exists()
    assert bases.template_digest(transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")) == bases.template_digest(base.tokenizer)


def test_a_merge_that_went_wrong_is_not_reported_as_done(tmp_path, monkeypatch):
    wrong = LoraConfig.merge
    monkeypatch.setattr(LoraConfig, "merge", lambda self, site, w, b, p: wrong(self, site, w, b, {k: 1.1 * t for k, t in p.items()}))
    with pytest.raises(NotMergeable, match="does not compute what base and adapter do"):
        stirred(tiny_base(), LoraConfig(r=2)).merge_into(tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_values_that_do_not_fit_the_dtype(tmp_path):
    base = tiny_base(dtype=torch.float16)
    adapter = Adapter.create(base, LoraConfig(r=1, lora_alpha=1, target_modules=("q_proj",)))
    for tensor in adapter.params.values():
        tensor.fill_(300.0)
    with pytest.raises(NotMergeable, match="do not fit"):
        adapter.merge_into(tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("x")
    with pytest.raises(AdapterError, match=r"mine\.txt"):
        stirred(tiny_base(), IA3Config()).merge_into(tmp_path / "merged")


def test_tensors_changed_after_a_forward_are_merged_as_they_are_now(tmp_path):
    base = tiny_base()
    adapter = stirred(base, IA3Config())
    base.logits([SEQUENCES[0]], adapters=[adapter])
    for tensor in adapter.params.values():
        tensor.mul_(1.5)
    assert adapter.merge_into(tmp_path / "merged").max_difference < 1e-4


def test_a_bfloat16_base_is_compared_in_fp32(tmp_path, monkeypatch):
    """What is judged is the rounding of weights, not the noise of two bfloat16 forwards: here one that answers at random."""
    folder = tiny_folder(tmp_path / "base", dtype=torch.bfloat16)
    adapter = stirred(load_base(str(folder), dtype="bfloat16"), LoraConfig(r=4))
    noisy = adapter.base.logits
    monkeypatch.setattr(adapter.base, "logits", lambda *a, **k: [torch.randn_like(x) for x in noisy(*a, **k)])
    report = adapter.merge_into(tmp_path / "merged")
    assert report.dtype == "bfloat16" and 0 < report.relative < 0.02 < report.allowed
    exported = export(adapter, tmp_path / "exported")
    assert exported.relative < 1e-5 and "trimtab" in exported.checked


def test_the_tolerances_name_every_dtype_that_a_base_may_have():
    assert set(merge.TOLERANCE) == set(DTYPES.values())
