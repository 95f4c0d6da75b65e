"""Law 15: every loss of pairs and marked answers is TRL's: value, logged metrics, gradients of every adapter tensor, ten training steps.

Both sides get the same tokens and the same LoRA: TRL's own trainers compute on peft's model, trimtab in one mixed forward. Tensors are
random, never fresh, since a fresh adapter's margins are all 0.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
from torch import Tensor

from tests.objectives.common import check_run, take_on, ten_steps, trained
from tests.objectives.test_new_objective import write_pairs
from tests.store.common import stir_trained_
from tests.tiny import tiny_model, tiny_tokenizer
from tests.train.common import run_file, tiny_base
from trimtab.data import Example, Source, load_examples, order
from trimtab.forward.packs import Mix
from trimtab.model import Base
from trimtab.objectives import OBJECTIVES, Counts, Objective
from trimtab.store import Adapter
from trimtab.train import RunConfig, train
from trimtab.train.losses import Part, forward_loss
from trimtab.train.measure import base_log_probabilities, probe

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = pytest.importorskip("trl")
from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and peft explain themselves at length
LABEL = -100


@dataclasses.dataclass
class Side:
    """One adapter on both sides, its rows, and TRL's trainers, each with peft's model of it, whose head the trainer has made its own."""

    base: Base
    adapter: Adapter
    pairs: Any
    marked: Any
    trainers: dict[str, Any]


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Side:
    folder = tmp_path_factory.mktemp("parity")
    peft_model().save_pretrained(folder / "adapter")
    base = tiny_base()
    write_pairs(folder / "pairs.jsonl", 5)
    rows = [{"prompt": f"q {i}", "completion": "ab " * (i + 1), "label": i % 3 != 1} for i in range(5)]
    (folder / "marked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs, marked = (
        load_examples([Source(f"{n}.jsonl")], base.tokenizer, root=folder, max_length=128, parts=OBJECTIVES[o].parts).examples
        for n, o in (("pairs", "dpo"), ("marked", "kto"))
    )
    return Side(base, Adapter.load(folder / "adapter", base), pairs, marked, trainers(folder))


def peft_model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
        model = peft.get_peft_model(tiny_model("llama"), config)
    stir_trained_(model, torch.Generator().manual_seed(4))
    return model


def trainers(folder: Path) -> dict[str, Any]:
    """Made once; a test sets what a configuration would."""
    common = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    pairs = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    marked = datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "label": i == 0} for i in range(2)])
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    kto = trl.KTOConfig(**common, train_sampling_strategy="sequential", per_device_train_batch_size=2)
    made: dict[str, tuple[Any, Any, Any]] = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig(**common), pairs),
        "kto": (trl.KTOTrainer, kto, marked),
        "cpo": (CPOTrainer, CPOConfig(**common), pairs),
        "orpo": (ORPOTrainer, ORPOConfig(**common), pairs),
    }
    found = {}
    for name, (trainer, args, rows) in made.items():
        model = peft_model()
        found[name] = trainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        if "ref" in model.peft_config:  # a copy of the adapter, to measure from; we measure from the base
            model.delete_adapter("ref")
        model.train()
    return found


def padded(rows: Sequence[Any], value: int) -> Tensor:
    tensors = [torch.tensor(np.asarray(r).astype(np.int64)) for r in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def inputs_of(segments: Sequence[Example], prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}input_ids": padded([s.ids for s in segments], 0),
        f"{prefix}attention_mask": padded([np.ones(len(s.ids)) for s in segments], 0),
        f"{prefix}completion_mask": padded([s.supervised for s in segments], 0),
    }


def theirs(trainer: Any, objective: Objective, rows: Sequence[Example]) -> tuple[Tensor, dict[str, float]]:
    """(loss, metrics) as TRL computes them of these rows as one batch."""
    fields = {f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)}
    if objective.name in ("dpo", "kto"):
        if objective.name == "dpo":
            types, weights = zip(*objective.terms, strict=True)  # type: ignore[attr-defined]
            changes: dict[str, Any] = {"loss_types": list(types), "loss_weights": list(weights)}
            trainer.args.discopop_tau = fields["discopop_tau"]
            inputs = inputs_of([e.segments[i] for i in (0, 1) for e in rows])
        else:
            changes = {"calculate_KL": fields["loss_type"] == "kto"}
            each = [s for e in rows for s in e.segments]
            # as the collator does: prompts with the completions of the row before
            mixed = [
                SimpleNamespace(ids=np.concatenate([a.ids[:i], b.ids[j:]]), supervised=np.concatenate([a.supervised[:i], b.supervised[j:]]))
                for a, b in zip(each, [each[-1], *each[:-1]], strict=True)
                for i, j in [(int(a.supervised.argmax()), int(b.supervised.argmax()))]
            ]
            labels = torch.tensor([s.role == "desirable" for s in each])
            inputs = inputs_of(each) | inputs_of(mixed, "KL_") | {"label": labels}  # type: ignore[arg-type]
        set_all(trainer, fields | changes)
        trainer._metrics["train"].clear()
        loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
        return loss, {k: v[-1] for k, v in trainer._metrics["train"].items()}
    changes = {"loss_type": "simpo"} if objective.name == "simpo" else {}
    set_all(trainer, fields | changes)
    batch = {}
    for i, side_of in enumerate(("chosen", "rejected")):
        segments = [e.segments[i] for e in rows]
        found = inputs_of(segments, f"{side_of}_")
        del found[f"{side_of}_completion_mask"]
        batch |= found | {f"{side_of}_labels": padded([np.where(s.supervised, s.ids, LABEL) for s in segments], LABEL)}
    return trainer.get_batch_loss_metrics(trainer.model, batch)


def set_all(trainer: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        setattr(trainer, name, value)


def ours(side: Side, objective: Objective, rows: Any) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """(loss, metrics, gradients); in two parts, since a step may take several forwards."""
    attached, adapter = side.base.attached, side.adapter
    params = {k: p.clone().requires_grad_() for k, p in adapter.params.items()}
    counts, loss, told = Counts.of(rows), 0.0, dict[str, float]()
    reference = base_log_probabilities(attached, rows, 4096) if objective.needs_reference else None

    def mix() -> Mix:
        return Mix([attached.pack(adapter.method, params, adapter.sites)])

    probes = objective.probes(rows)
    with torch.no_grad():
        probes_P = probe(attached, attached, mix(), [(0, probes)], 100)[0] if probes else None
    for part in (rows[:2], rows[2:]):
        total, unread = forward_loss(attached, mix(), [Part(0, part, objective, counts, reference, probes_P)])
        total.backward()
        (outcome,) = unread.read()
        loss += outcome.loss
        told = {k: told.get(k, 0.0) + v for k, v in outcome.metrics.items()}
    return loss, told, {k: p.grad for k, p in params.items() if p.grad is not None}


DPO = ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sigmoid_norm")
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("dpo", {"loss_type": kind, "beta": 0.3}) for kind in DPO),
    ("dpo", {"loss_type": "robust", "label_smoothing": 0.2}),
    ("dpo", {"loss_type": "exo_pair", "label_smoothing": 0.1}),
    ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    ("kto", {"desirable_weight": 1.3}),
    ("kto", {"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.7}),
    ("cpo", {"label_smoothing": 0.1}),
    ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.5}),
    ("cpo", {"loss_type": "ipo", "beta": 0.4}),
    ("simpo", {}),
    ("simpo", {"cpo_alpha": 0.5, "label_smoothing": 0.1, "simpo_gamma": 0.3}),
    ("orpo", {"beta": 0.25}),
]


def named(case: tuple[str, dict[str, Any]]) -> str:
    kind = case[1].get("loss_type", "")
    return f"{case[0]}-{kind if isinstance(kind, str) else '+'.join(kind)}"


@pytest.mark.parametrize("case", CASES, ids=named)
def test_losses_metrics_and_gradients(case: tuple[str, dict[str, Any]], side: Side) -> None:
    objective = OBJECTIVES[case[0]](**case[1])
    rows = side.marked if objective.name == "kto" else side.pairs
    if objective.name == "orpo":
        rows = OfOneToken(rows)  # TRL's imitates the prompt too; of one token there is nothing to imitate
    trainer = side.trainers["cpo" if objective.name == "simpo" else objective.name]
    trainer.model.zero_grad()
    want, want_metrics = theirs(trainer, objective, list(rows))
    want.backward()
    loss, told, gradients = ours(side, objective, rows)
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert {n for n in want_metrics if n.startswith(("rewards/", "logps/"))} <= told.keys()
    for name, value in told.items():
        assert value == pytest.approx(want_metrics[name], rel=1e-5, abs=2e-6), name
    found = {n: p.grad for n, p in trained(trainer.model).items()}
    assert found.keys() == gradients.keys() and len(found) == 12
    for name, gradient in found.items():
        apart = float((gradients[name] - gradient).norm() / gradient.norm())
        assert apart < 1e-5, (name, apart, float(gradient.norm()))


class OfOneToken:
    """Pairs whose prompts are their first tokens, and all else answers."""

    def __init__(self, rows: Any):
        self.rows = [self._longer(e) for e in rows]

    def _longer(self, e: Example) -> Example:
        all_but_first = np.arange(len(e.ids)) > 0
        return dataclasses.replace(e, supervised=all_but_first, shared=0, others=tuple(self._longer(o) for o in e.others))

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __getitem__(self, at: slice) -> Any:
        return self.rows[at]


@pytest.mark.parametrize("name", ["dpo", "kto", "simpo"])
def test_ten_steps(name: str, side: Side, tmp_path: Path) -> None:
    """A run against peft's model under torch's AdamW with TRL's loss. An epoch is one step; KTO's neighbours follow the order of rows."""
    rows = list(side.marked if name == "kto" else side.pairs)
    fields = {"method": "lora", "r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    content = run_file(tmp_path, {"v": fields | {"data": "rows", "objective": name, "lr": 5e-3}}, evaluate={"generate": False})
    if name == "kto":
        written = [{"prompt": f"q {i}", "completion": "ab " * (i + 1), "label": i % 3 != 1} for i in range(5)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in written))
    else:
        write_pairs(tmp_path / "rows.jsonl", 5)
    content["data"] = {"rows": {"train": "rows.jsonl"}}
    content["defaults"] = {"max_steps": 10, "batch_size": 5, "schedule": "constant", "max_grad_norm": 9.9, "weight_decay": 0.1}
    run = RunConfig.from_dict(content, root=tmp_path)
    report = train(run, base=tiny_base())
    begin = Adapter.create(tiny_base(), run.variants[0].method, seed=0).params
    trainer, objective = side.trainers["cpo" if name == "simpo" else name], OBJECTIVES[name]()
    before = {k: p.detach().clone() for k, p in trained(trainer.model).items()}
    take_on(trainer.model, begin)
    losses = ten_steps(trainer.model, lambda epoch: theirs(trainer, objective, [rows[i] for i in order(5, 0, epoch)])[0])
    check_run(report, losses, trainer.model)
    take_on(trainer.model, before)
