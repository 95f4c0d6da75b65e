"""A family from outside: the row of CONTRIBUTING.md and transformers' own class. Nothing else in trimtab knows of it.

OLMo 2 normalises queries and keys over all heads at once, and what attention and MLP give instead of what they read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from tests import tiny
from tests.laws.common import EXAMPLES, cached_logits, difference, noisy, one_thread, tokens
from tests.laws.plain import plain_logits
from trimtab import load_base
from trimtab.bases import spec
from trimtab.decode.generate import Sampling
from trimtab.errors import BaseError
from trimtab.methods import LoraConfig
from trimtab.model import Base
from trimtab.store import Adapter

__all__ = ["one_thread"]
ROOT = Path(__file__).parent.parent.parent
LR = 0.5


@pytest.fixture
def olmo2(monkeypatch: pytest.MonkeyPatch) -> str:
    """The two lines of CONTRIBUTING.md: the row of defaults, and the tiny model of the tests."""
    _, section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a model family\n")
    row, model = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    monkeypatch.setitem(spec.FAMILIES, "olmo2", eval(f"{{{row}}}", vars(spec))["olmo2"])
    monkeypatch.setitem(tiny.FAMILIES, "olmo2", eval(f"{{{model}}}", vars(tiny))["olmo2"])
    return "olmo2"


def plain(family: str) -> Any:
    model = tiny.tiny_model(family)
    model.set_attn_implementation("eager")
    return model.requires_grad_(False)


def test_without_its_row_it_is_refused_by_name() -> None:
    config = transformers.Olmo2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=300)
    with pytest.raises(BaseError, match="model family 'olmo2' is not supported") as refusal:
        Base(transformers.Olmo2ForCausalLM(config), tiny.tiny_tokenizer())
    assert "add a row to FAMILIES in trimtab/bases/spec.py" in refusal.value.fix


@torch.no_grad()
def test_its_forward_its_cache_and_its_answers_are_those_of_transformers(olmo2: str) -> None:
    base, model = Base(tiny.tiny_model(olmo2), tiny.tiny_tokenizer()), plain(olmo2)
    sequences = [tokens(n, n) for n in (1, 7, 40, 140)]
    wanted = [model(torch.tensor([ids])).logits[0] for ids in sequences]
    chunks = [[1], [3, 4], [20, 1, 19], [130, 1, 9]]
    for found in (base.logits(sequences), cached_logits(base, sequences, [None] * 4, chunks)):
        assert max(difference(got, want) for got, want in zip(found, wanted, strict=True)) <= 1e-5
    for ids in sequences[:3]:
        whole = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=9, do_sample=False)[0].tolist()
        assert base.generate_ids([ids], sampling=Sampling(max_new_tokens=9)) == [[t for t in whole[len(ids) :] if t not in base.stop_ids]]


@pytest.mark.parametrize("case", EXAMPLES)
def test_each_method_computes_what_it_computes_on_transformers_own_model(case: str, olmo2: str) -> None:
    base, ids = Base(tiny.tiny_model(olmo2), tiny.tiny_tokenizer()), tokens(21, 2)
    adapter = noisy(base, EXAMPLES[case])
    mixed = base.logits([ids, ids], [None, adapter])
    assert difference(mixed[1], plain_logits(plain(olmo2), adapter, ids).detach()) < 1e-5
    assert difference(mixed[0], mixed[1]) > 0.02


def test_a_step_of_lora_is_that_of_autograd_on_transformers_own_model(olmo2: str, tmp_path: Path) -> None:
    base, model, ids = load_base(str(tiny.tiny_folder(tmp_path / "base", olmo2)), dtype="float32"), plain(olmo2), tokens(30, 5)
    after = []
    for logits in (lambda a: base.logits([ids], [a], grad=True)[0], lambda a: plain_logits(model, a, ids)):
        adapter = noisy(base, LoraConfig(r=4, target_modules=None))
        assert {s.name.rpartition(".")[2] for s in adapter.sites} == {"q_proj", "v_proj"}
        adapter.params = {k: p.requires_grad_() for k, p in adapter.params.items()}
        loss = cross_entropy(logits(adapter)[:-1], torch.tensor(ids[1:]))
        slopes = torch.autograd.grad(loss, list(adapter.params.values()))
        stepped = {k: (p - LR * slope).detach() for (k, p), slope in zip(adapter.params.items(), slopes, strict=True)}
        after.append((float(loss.detach()), stepped))
    (loss, ours), (their_loss, theirs) = after
    assert loss == pytest.approx(their_loss, abs=1e-5)
    assert max(difference(ours[k], theirs[k]) for k in theirs) < 1e-5
    trained = Adapter(base, LoraConfig(r=4, target_modules=None), ours)
    trained.save(tmp_path / "adapter")
    loaded = Adapter.load(tmp_path / "adapter", base)
    better = cross_entropy(base.logits([ids], [loaded])[0][:-1], torch.tensor(ids[1:]))
    assert float(better) < loss
