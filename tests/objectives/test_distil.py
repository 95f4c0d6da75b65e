"""Distillation: TRL's divergence where all tokens are kept, a case by hand where few are, teachers of every kind, as alone and resumed."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.plain import plain_logits
from tests.store.common import stirred
from tests.tiny import VOCAB, tiny_folder, tiny_model
from tests.train.common import METHODS, metrics, run_file, tiny_base
from trimtab.data import Source, load_examples
from trimtab.errors import ConfigError
from trimtab.forward.batch import BASE
from trimtab.forward.packs import Mix
from trimtab.methods import LoraConfig
from trimtab.model import load_base
from trimtab.objectives import Counts, Segments
from trimtab.objectives.distil import Distil
from trimtab.train import RunConfig, teachers, train
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent
from trimtab.train.losses import Part, forward_loss
from trimtab.train.measure import likeliest

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
LORA = {"method": "lora", "r": 4, "lora_dropout": 0.1, "lr": 1e-2, "data": "a", "objective": "distil"}


@pytest.mark.parametrize("head", [False, True], ids=["", "edited head"])
@pytest.mark.parametrize(("beta", "heat"), [(0.0, 1.0), (0.3, 1.0), (1.0, 1.0), (0.3, 2.5)])
@pytest.mark.filterwarnings("ignore")
def test_with_all_tokens_it_is_trls_divergence(beta: float, heat: float, head: bool, tmp_path: Path) -> None:
    """Value, and gradients of every adapter tensor, of a stirred adapter that learns from the base."""
    from trl.experimental.gkd import GKDTrainer

    base = tiny_base()
    run_file(tmp_path, {})
    rows = load_examples([Source("a.jsonl")], base.tokenizer, root=tmp_path, max_length=128).examples[:4]
    targets = ("lm_head", "v_proj") if head else ("q_proj", "down_proj")
    adapter = stirred(base, LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=targets))
    reference = likeliest(base.attached, Mix([]), BASE, rows, VOCAB, VOCAB, 90, heat)
    leaves = {k: p.clone().requires_grad_() for k, p in adapter.params.items()}
    mix = Mix([base.attached.pack(adapter.method, leaves, adapter.sites)])
    objective = Distil(distil_beta=beta, distil_temperature=heat, teacher_tokens=VOCAB)
    total, unread = forward_loss(base.attached, mix, [Part(0, rows, objective, Counts.of(rows), reference)])
    total.backward()

    model, mine = tiny_model("llama").requires_grad_(False), {k: p.clone().requires_grad_() for k, p in adapter.params.items()}
    plain = stirred(base, adapter.method)
    plain.params = mine
    student, teacher = [], []
    for e in rows:
        places = torch.from_numpy(e.supervised).nonzero()[:, 0] - 1
        ids = e.ids.tolist()
        student.append(plain_logits(model, plain, ids)[places])
        teacher.append(model(torch.tensor([ids])).logits[0, places])
    labels = torch.zeros(1, sum(map(len, student)), dtype=torch.long)
    want = GKDTrainer.generalized_jsd_loss(torch.cat(student)[None], torch.cat(teacher)[None], labels, beta=beta, temperature=heat)
    want.backward()
    assert unread.read()[0].loss == pytest.approx(want.item(), rel=2e-5)
    for key, p in mine.items():
        assert p.grad is not None and leaves[key].grad is not None
        assert float((leaves[key].grad - p.grad).norm() / p.grad.norm()) < 1e-4, key


def test_few_tokens_by_hand() -> None:
    # the teacher says 0.5, 0.3 and 0.2 for all others, the adapter 0.25, 0.25 and 0.5; the step has two targets
    s = Segments(("",), (1,), Counts(1, 2), torch.device("cpu"))
    student, teacher = torch.tensor([[0.25, 0.25]]).log(), torch.tensor([[0.5, 0.3]]).log()
    forward = 0.5 * math.log(2) + 0.3 * math.log(1.2) + 0.2 * math.log(0.4)
    reverse = -0.25 * math.log(2) - 0.25 * math.log(1.2) - 0.5 * math.log(0.4)
    for beta, want in ((0.0, forward), (1.0, reverse)):
        loss, _ = Distil(distil_beta=beta).loss(student, teacher, s)
        assert float(loss) == pytest.approx(want / 2, abs=1e-6)


def config(folder: Path, variants: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    content = run_file(folder, {n: dict(v) for n, v in variants.items()}, max_tokens=200, evaluate={"generate": False})
    content["data"]["a"]["valid"] = "a-test.jsonl"
    content["defaults"] |= {"max_steps": 4, "eval_every": 2, "schedule": "constant", "warmup_steps": 0}
    return RunConfig.from_dict(content, root=folder)


def losses(report: Any, name: str) -> list[float]:
    return [line["loss"] for line in metrics(report)[name] if "event" not in line]


def test_teachers_of_every_kind_beside_others_as_alone_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = list[str]()
    monkeypatch.setattr(teachers, "load_base", lambda name, **options: loaded.append(name) or load_base(name, **options))
    stirred(tiny_base(), LoraConfig(r=4, target_modules=("q_proj", "v_proj"))).save(tmp_path / "joint" / "teacher")
    stirred(tiny_base(), LoraConfig(r=4, target_modules=("q_proj", "v_proj"))).save(tmp_path / "alone" / "teacher")
    other = tiny_folder(tmp_path / "other", seed=7)
    variants = {
        "adapter": LORA | {"teacher": "teacher", "teacher_tokens": 16, "distil_temperature": 2.0},
        "model": LORA | {"teacher": str(other), "distil_beta": 0.5},
        "itself": METHODS["full"] | {"data": "a", "objective": "distil"},
        "sft": METHODS["lora"] | {"data": "a"},
    }
    joint = train(config(tmp_path / "joint", variants), base=tiny_base())
    assert loaded == [str(other)], "once for all splits"
    alone = train(config(tmp_path / "alone", {"adapter": variants["adapter"]}), base=tiny_base())
    assert losses(joint, "adapter") == pytest.approx(losses(alone, "adapter"), rel=1e-5)
    assert losses(joint, "itself")[0] == pytest.approx(0.0, abs=1e-6), "a copy of the base says what the base says"
    for name in ("adapter", "model"):
        told = [line for line in metrics(joint)[name] if "event" in line]
        assert told[-1]["valid_loss"] < told[0]["base_valid_loss"], name
    stop = Stop()

    class Stopping(Silent):
        def step(self, line: Mapping[str, Any]) -> None:
            if line["step"] == 2:
                stop.ask(signal.SIGTERM)

    run = config(tmp_path / "joint", variants).model_copy(update={"out": tmp_path / "stopped"})
    with pytest.raises(Interrupted):
        train(run, base=tiny_base(), listener=Stopping(), stop=stop)
    resumed = train(run, base=tiny_base(), resume=True)
    for name, adapter in joint.adapters.items():
        assert all(torch.equal(adapter.params[k], p) for k, p in resumed.adapters[name].params.items()), name


def test_what_is_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher = 'nobody' cannot be used") as refused:
        train(config(tmp_path, {"v": LORA | {"teacher": "nobody"}}), base=tiny_base())
    assert "as an adapter" in str(refused.value) and "as a base" in str(refused.value)
    folder = tiny_folder(tmp_path / "other")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace('"<|im_end|>"', '"<|stop|>"'))
    with pytest.raises(ConfigError, match="has another tokenizer than the base"):
        train(config(tmp_path / "b", {"v": LORA | {"teacher": str(folder)}}), base=tiny_base())
