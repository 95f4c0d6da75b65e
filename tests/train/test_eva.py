"""EVA's start of LoRA: peft's own on the same rows, what a run does with it, and what peft reads of it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimtab
from tests.laws.common import difference
from tests.tiny import tiny_model, tiny_tokenizer
from tests.train.common import tiny_base
from tests.train.test_checkpoint import config, interrupt
from trimtab.data import Example
from trimtab.errors import ConfigError
from trimtab.methods import LoraConfig
from trimtab.model import Base
from trimtab.store import Adapter
from trimtab.train import train
from trimtab.train.eva import begin
from trimtab.train.variant import Rows

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
LENGTH, BATCH, SEED = 24, 8, 5
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no rank moves": {"rho": 1.0},
    "whitened": {"whiten": True, "adjust_scaling_factors": False},
    "all tokens": {"use_label_mask": False, "rho": 3.0, "tau": 0.9},
    "the head too": {"tau": 0.95},
}


def rows(count: int = 4 * BATCH) -> list[Example]:
    """Sequences in which a few tokens are frequent, the second half supervised."""
    draw = np.random.default_rng(3)
    ids = [np.minimum(draw.geometric(0.08, LENGTH), 255).astype(np.int32) for _ in range(count)]
    return [Example(row, np.arange(LENGTH) >= LENGTH // 2, f"row {i}", (0, i)) for i, row in enumerate(ids)]


def batches(examples: list[Example]) -> Any:
    """The variant's first batches as peft takes them: ids and labels."""

    class Loader:
        def __len__(self) -> int:
            return 400

        def __iter__(self) -> Any:
            stream = Rows(examples, BATCH, SEED)
            return islice((self.one(stream.take()) for _ in iter(int, 1)), 400)

        @staticmethod
        def one(taken: list[Example]) -> dict[str, torch.Tensor]:
            ids = torch.tensor(np.stack([e.ids for e in taken]), dtype=torch.int64)
            mask = torch.tensor(np.stack([e.supervised for e in taken]))
            return {"input_ids": ids, "labels": torch.where(mask, ids, -100), "attention_mask": torch.ones_like(ids)}

    return Loader()


@pytest.mark.parametrize("case", ["as it is", *(pytest.param(c, marks=pytest.mark.slow) for c in list(SETTINGS)[1:])])
def test_ranks_and_directions_are_pefts(case: str, tmp_path: Path) -> None:
    settings, examples = SETTINGS[case], rows()
    targets = (*TARGETS, "lm_head") if case == "the head too" else TARGETS
    eva = peft.EvaConfig(**settings)
    told = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=list(targets), init_lora_weights="eva", eva_config=eva)
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    theirs = peft.get_peft_model(model, told)
    peft.initialize_lora_eva_weights(theirs, batches(examples), show_progress_bar=False)
    wanted = {n.replace(".default", "").removeprefix("base_model.model."): p for n, p in theirs.named_parameters() if "lora_" in n}
    base = Base(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    asked = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights="eva", eva_config=settings)
    method, params = begin(base, asked, Rows(examples, BATCH, SEED), 10_000, SEED)
    assert {k: tuple(t.shape) for k, t in params.items()} == {k: tuple(t.shape) for k, t in wanted.items()}
    for name, tensor in params.items():
        if "lora_A" in name:
            near = torch.nn.functional.cosine_similarity(tensor, wanted[name].detach())
            assert float(near.min()) > 0.995, (name, near)
            if not settings.get("whiten") or "o_proj" in name or "down_proj" in name:  # peft whitens again for each that reads the same
                assert torch.allclose(tensor.norm(dim=1), wanted[name].detach().norm(dim=1), rtol=1e-2), name
        else:
            assert not tensor.any() and not wanted[name].any()
    ranks = {n: t.shape[0] for n, t in params.items() if "lora_A" in n}
    assert sum(ranks.values()) == 4 * (2 * len(TARGETS) + ("lm_head" in targets))
    assert (len(set(ranks.values())) == 1) == (settings.get("rho") == 1.0)
    scaling = {n: m.scaling["default"] for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert {s.name: pytest.approx(s.scaling) for s in method.sites(base.spec)} == {
        n.removeprefix("base_model.model."): s for n, s in scaling.items()
    }
    with torch.no_grad():  # what is saved is an ordinary LoRA, whose ranks and scalings peft reads
        params = {k: t + 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(i)) for i, (k, t) in enumerate(params.items())}
        adapter = Adapter(base, method, params)
        adapter.save(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours").eval()
        ids = examples[0].ids.tolist()
        assert difference(base.logits([ids], [adapter])[0], again(torch.tensor([ids])).logits[0]) < 2e-5
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["init_lora_weights"] is True


@pytest.mark.parametrize("batch", [7, 8])
def test_inputs_that_are_all_the_same_explain_nothing(batch: int) -> None:
    """As where the one supervised token, at the end, is the same in all rows: the first layer reads its embedding alone."""
    base, examples = Base(tiny_model("llama"), tiny_tokenizer()), rows()
    for example in examples:
        example.ids[-1], example.supervised[:] = 7, np.arange(LENGTH) == LENGTH - 1
    asked = LoraConfig(r=2, target_modules=("q_proj", "down_proj"), init_lora_weights="eva", eva_config={"tau": 0.8})
    method, params = begin(base, asked, Rows(examples, batch, SEED), 10_000, SEED)
    ranks = {s.name: s.rank for s in method.sites(base.spec)}
    assert "model.layers.0.self_attn.q_proj" not in ranks and sum(ranks.values()) == 4 * 2
    assert all(t.isfinite().all() for t in params.values())


def test_forwards_are_cut_where_they_have_too_many_tokens() -> None:
    base, examples = Base(tiny_model("llama"), tiny_tokenizer()), rows()
    asked = LoraConfig(r=2, target_modules=("q_proj", "down_proj"), init_lora_weights="eva", eva_config={"rho": 1})
    seen = []
    handle = base.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-2]))
    begin(base, asked, Rows(examples, BATCH, SEED), 3 * LENGTH, SEED)
    handle.remove()
    assert set(seen) == {3 * LENGTH, 2 * LENGTH}


def test_a_run_begins_so_and_goes_on_bit_equal(tmp_path: Path) -> None:
    variant = {"data": "a", "method": "lora", "r": 3, "init_lora_weights": "eva", "eva_config": {"tau": 0.8}, "batch_size": 4}
    whole = config(tmp_path / "whole", {"v": variant})
    report = train(whole, base=tiny_base())
    adapter = Adapter.load(report.out / "adapters/v", tiny_base())
    assert len({s.rank for s in adapter.sites}) > 1 and sum(s.rank for s in adapter.sites) == 3 * 14
    assert adapter.method.rank_pattern and adapter.method.init_lora_weights is True
    cut = config(tmp_path / "cut", {"v": variant})
    interrupt(cut, 2)
    again = train(cut, base=tiny_base(), resume=True)
    other = Adapter.load(again.out / "adapters/v", tiny_base())
    assert all(torch.equal(other.params[k], t) for k, t in adapter.params.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eva_config": {"rho": 0.5}}, r"eva_config\.rho = 0\.5: at least 1"),
        ({"eva_config": {"tau": 1.0}}, r"eva_config\.tau = 1\.0: a cosine similarity"),
        ({"eva_config": {"whitening": True}}, "unknown key 'whitening' .did you mean 'whiten'"),
        ({"eva_config": {"whiten": 3}}, "whiten = 3.0: true or false"),
        ({"init_lora_weights": True, "eva_config": {"rho": 2}}, "and this is True"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LoraConfig(**{"init_lora_weights": "eva"} | options)


def test_no_rows_and_too_few_of_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(ConfigError, match="train the variant from a run file"):
        Adapter.create(base, LoraConfig(init_lora_weights="eva"))
    monkeypatch.setattr(trimtab.train.eva, "MOST_FORWARDS", 3)
    few, ran = rows(1), list[int]()
    handle = base.model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: ran.append(1))
    with pytest.raises(ConfigError, match="no forward has the 32 supervised tokens"):
        begin(base, LoraConfig(r=16, init_lora_weights="eva"), Rows(few, 1, 0), 1000, 0)
    handle.remove()
    assert len(ran) == 1, "forwards that have too few tokens need not run: the one is told apart by what modules read"
    with pytest.raises(ConfigError, match="after 3 forwards the directions"):
        begin(base, LoraConfig(r=2, init_lora_weights="eva", eva_config={"tau": 0.999999}), Rows(rows(), 4, 0), 1000, 0)
