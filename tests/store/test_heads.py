"""An adapter's own head: peft's SEQ_CLS and TOKEN_CLS folders and ours, in both directions, against transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.store.common import EXAMPLES, SEQUENCES, stir_, stir_trained_, tiny_base
from tests.tiny import PAD_ID, tiny_model
from trimtab.errors import AdapterError, NotMergeable, TrimtabError
from trimtab.methods import Head, LoraConfig
from trimtab.model import Base
from trimtab.store import Adapter, Store
from trimtab.store.combine import combine
from trimtab.store.compress import compress

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # peft explains itself at length
LABELS = ("refund", "delivery", "other")
CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
CONFIGS: dict[str, Any] = {
    "lora": lambda task: peft.LoraConfig(task_type=task, r=4, lora_alpha=6, target_modules="all-linear"),
    "dora": lambda task: peft.LoraConfig(task_type=task, r=4, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "saved": lambda task: peft.LoraConfig(task_type=task, r=4, target_modules=["v_proj"], modules_to_save=["model.norm"]),
    "ia3": lambda task: peft.IA3Config(task_type=task),
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4),
}


def classifier(family: str, task: str = "SEQ_CLS", labels: int = 3) -> Any:
    """transformers' own classifier with the weights of the tiny base."""
    model = tiny_model(family)
    config = model.config
    config.num_labels, config.pad_token_id = labels, PAD_ID
    made = CLASSES[task]._model_mapping[type(config)](config)
    made.load_state_dict(model.state_dict(), strict=False)
    made.set_attn_implementation("eager")
    return made.eval()


def stirred(base: Base, method: Any, head: Head) -> Adapter:
    adapter = Adapter.create(base, method, seed=1, head=head)
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter.params.values():
        stir_(tensor, generator)
    return adapter


@torch.no_grad()
def said(model: Any) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([ids])).logits[0] for ids in SEQUENCES]


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("family", "case", "task"),
    [("llama", case, "SEQ_CLS") for case in CONFIGS]
    + [("llama", "ia3", "TOKEN_CLS"), ("gpt2", "ia3", "SEQ_CLS"), ("gemma2", "lora", "SEQ_CLS")],
)
def test_scores_equal_those_of_transformers_and_peft_in_both_directions(family, case, task, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = peft.get_peft_model(classifier(family, task), CONFIGS[case](task)).eval()
    stir_trained_(model, torch.Generator().manual_seed(4))
    model.save_pretrained(tmp_path / "theirs")
    theirs, base = said(model), tiny_base(family)
    adapter = Adapter.load(tmp_path / "theirs", base)
    assert not adapter.warnings
    assert adapter.head is not None and adapter.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert apart(base.scores(SEQUENCES, [adapter] * len(SEQUENCES)), theirs) < 1e-5
    adapter.save(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(classifier(family, task), tmp_path / "ours").eval()
    assert apart(said(again), theirs) < 1e-5


def test_pooled_is_the_last_token_that_is_not_padding():
    base, longest = tiny_base(), max(map(len, SEQUENCES))
    adapter = stirred(base, LoraConfig(r=4, target_modules=["q_proj"]), Head(LABELS))
    model = classifier("llama")
    padded = torch.tensor([ids + [PAD_ID] * (longest - len(ids)) for ids in SEQUENCES])
    with torch.no_grad():
        model.score.weight.copy_(adapter.params["score.weight"])
        wanted = model(input_ids=padded, attention_mask=(padded != PAD_ID).long()).logits
    plain = Adapter(base, adapter.method, adapter.params | {k: torch.zeros_like(t) for k, t in adapter.params.items() if "lora_B" in k})
    plain = Adapter(base, plain.method, plain.params, head=adapter.head)
    assert apart(base.scores(SEQUENCES, [plain] * 3), list(wanted)) < 1e-5


@pytest.mark.parametrize(("name", "method"), EXAMPLES, ids=[n for n, _ in EXAMPLES])
def test_every_method_takes_a_head_through_folder_and_store(name, method, tmp_path):
    base, head = tiny_base(), Head(LABELS, bias=True)
    adapter, plain = stirred(base, method, head), Adapter.create(base, method, seed=1)
    fresh = Adapter.create(base, method, seed=1, head=head)
    assert all(torch.equal(fresh.params[k], t) for k, t in plain.params.items()), "a head changes no other tensor's start"
    adapter.save(tmp_path / "a", run={})
    back = Adapter.load(tmp_path / "a", base)
    assert (back.head, back.verified) == (head, True)
    assert torch.equal(torch.stack(base.scores(SEQUENCES, [adapter] * 3)), torch.stack(base.scores(SEQUENCES, [back] * 3)))
    assert back.num_parameters == sum(t.numel() for t in method.export(adapter.params)[1].values())
    store = Store(tmp_path / "store", create=True)
    store.publish(tmp_path / "a", "acme/intents", base=base)
    stored = Adapter.load("acme/intents", base, store=store)
    assert stored.head == head and all(torch.equal(stored.params[k], t) for k, t in back.params.items())
    assert not store.verify().problems


def test_heads_of_other_sizes_share_one_forward():
    base = tiny_base()
    methods = [m for _, m in EXAMPLES]
    adapters = [stirred(base, m, Head(tuple(f"l{i}" for i in range(n + 1)))) for n, m in enumerate(methods)]
    together = base.scores([SEQUENCES[0]] * len(adapters), adapters)
    for adapter, scores in zip(adapters, together, strict=True):
        torch.testing.assert_close(scores, base.scores([SEQUENCES[0]], [adapter])[0], rtol=1e-4, atol=1e-5)
    weight = adapters[0].params["score.weight"]
    hidden = base.attached.head_module  # by hand: the hidden state is what the base's own head reads
    seen: list[torch.Tensor] = []
    handle = hidden.register_forward_hook(lambda module, given, result: seen.append(given[0]))
    base.logits([SEQUENCES[0]], [adapters[0]])
    handle.remove()
    torch.testing.assert_close(together[0], seen[0][0, -1] @ weight.T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_base_multiplies_its_logits_with_is_not_the_heads():
    base, model = tiny_base("granite"), tiny_model("granite")
    adapter = Adapter.create(base, LoraConfig(r=4), head=Head(LABELS))
    hidden = model.model(input_ids=torch.tensor([SEQUENCES[0]])).last_hidden_state[0, -1]
    torch.testing.assert_close(base.scores([SEQUENCES[0]], [adapter])[0], adapter.params["score.weight"] @ hidden)


def test_a_head_of_every_token_is_no_target_of_all_linear(tmp_path):
    base = tiny_base()
    adapter = stirred(base, LoraConfig(r=4), Head(("wrong", "right"), every_token=True, bias=True))
    adapter.save(tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(classifier("llama", "TOKEN_CLS", 2), tmp_path / "ours").eval()
    assert apart(base.scores(SEQUENCES, [adapter] * 3), said(model)) < 1e-5


def test_what_cannot_be_done_with_a_head_is_refused_with_the_reason(tmp_path):
    base = tiny_base()
    adapter = stirred(base, LoraConfig(r=4), Head(LABELS))
    with pytest.raises(NotMergeable, match="head of its own"):
        adapter.merge_into(tmp_path / "merged")
    with pytest.raises(AdapterError, match="score trained in full"):
        combine([adapter, adapter])
    with pytest.raises(TrimtabError, match="no head"):
        base.scores([[1, 2]], [Adapter.create(base, LoraConfig(r=4))])
    with pytest.raises(TrimtabError, match="gives no answers"):
        base.generate([[1, 2]], [adapter])
    small, _ = compress(adapter, rank=2)
    assert small.head == adapter.head and torch.equal(small.params["score.weight"], adapter.params["score.weight"])


def test_a_folder_that_contradicts_itself_is_refused(tmp_path):
    base = tiny_base()
    folder = stirred(base, LoraConfig(r=4), Head(LABELS)).save(tmp_path / "a")
    note = json.loads((folder / "trimtab.json").read_text())
    for change, what in (({"head": None}, "different adapters"), ({"head": {"labels": [1]}}, "cannot be read")):
        (folder / "trimtab.json").write_text(json.dumps(note | change))
        with pytest.raises(AdapterError, match=what):
            Adapter.load(folder, base)
    (folder / "trimtab.json").unlink()
    assert Adapter.load(folder, base).head == Head(("LABEL_0", "LABEL_1", "LABEL_2"))


def test_the_head_that_older_peft_saves_beside_the_trained_one_is_not_read(tmp_path):
    base = tiny_base()
    adapter = stirred(base, LoraConfig(r=4), Head(LABELS))
    folder = adapter.save(tmp_path / "a")
    (folder / "trimtab.json").unlink()
    path: Path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    weight = tensors.pop("base_model.model.score.weight")
    tensors |= {
        "base_model.model.score.modules_to_save.default.weight": weight,
        "base_model.model.score.original_module.weight": 0 * weight,
    }
    save_file(tensors, path)
    assert torch.equal(Adapter.load(folder, base).params["score.weight"], adapter.params["score.weight"])


@torch.no_grad()
def test_texts_for_which_an_alora_is_off_are_scored_by_its_head():
    base, model, off, on = tiny_base("llama"), tiny_model("llama"), [1, 2, 3, 4], [1, 7, 8, 4]
    adapter = stirred(base, LoraConfig(r=4, alora_invocation_tokens=(7, 8)), Head(LABELS))
    found = base.scores([off, on, off], [adapter] * 3)
    plain = [adapter.params["score.weight"] @ model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in (off, on, off)]
    assert [torch.allclose(a, b, atol=1e-5) for a, b in zip(found, plain, strict=True)] == [True, False, True]
