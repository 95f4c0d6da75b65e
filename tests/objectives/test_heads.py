"""Law 15 for objectives of a head: loss, metrics and gradients of every tensor are those of TRL's RewardTrainer and of transformers' own
classifiers under peft; ten steps; cases by hand; joint runs, resuming, what is refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from tests.objectives.common import check_run, take_on, ten_steps, trained
from tests.objectives.test_new_objective import write_pairs
from tests.tiny import PAD_ID, tiny_model, tiny_tokenizer
from tests.train.common import METHODS, run_file, tiny_base
from trimtab.cli import main
from trimtab.data import Source, load_examples, order
from trimtab.errors import ConfigError, DataError
from trimtab.forward.packs import Mix
from trimtab.methods import LoraConfig
from trimtab.objectives import OBJECTIVES, Counts, Objective, Segments
from trimtab.objectives.classify import Classify
from trimtab.objectives.reward import Reward
from trimtab.objectives.stepwise import Stepwise
from trimtab.store import Adapter
from trimtab.train import RunConfig, train
from trimtab.train.check import check
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.losses import Part, forward_loss

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and peft explain themselves at length
CLASSES = ("a", "b", "c")
TARGETS = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, Objective] = {
    "classify": Classify(classes=CLASSES),
    "reward": Reward(),
    "reward-centred": Reward(center_rewards_coefficient=0.3),
    "stepwise": Stepwise(),
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def write_rows(folder: Path) -> None:
    write(folder / "classify.jsonl", [{"text": f"word {i} " + "x" * (5 * i % 7), "label": "abcab"[i]} for i in range(5)])
    write(folder / "classify-valid.jsonl", [{"text": f"some {i}", "label": "abcb"[i]} for i in range(4)])
    write_pairs(folder / "reward.jsonl", 5)
    pairs = [json.loads(line) for line in (folder / "reward.jsonl").read_text().splitlines()]
    write(folder / "margins.jsonl", [r | {"margin": 0.5 * i} for i, r in enumerate(pairs)])
    steps = [
        {"prompt": f"sum {i}", "completions": ["one", "two", "three"][: 1 + i % 3], "labels": [True, False, True][: 1 + i % 3]}
        for i in range(5)
    ]
    write(folder / "stepwise.jsonl", steps)


def classifier(objective: Objective) -> Any:
    """transformers' model with peft's adapter."""
    plain, head = tiny_model("llama"), objective.head
    assert head is not None
    plain.config.num_labels, plain.config.pad_token_id, plain.config.classifier_dropout = len(head.labels), PAD_ID, 0.0
    auto = AutoModelForTokenClassification if head.every_token else AutoModelForSequenceClassification
    model = auto._model_mapping[type(plain.config)](plain.config)
    model.load_state_dict(plain.state_dict(), strict=False)
    return peft.get_peft_model(model, peft.LoraConfig(task_type=head.task, r=4, lora_alpha=6, target_modules=TARGETS))


@pytest.fixture(scope="module")
def reward_trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = tiny_tokenizer()
    args = trl.RewardConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    pairs = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    return trl.RewardTrainer(classifier(Reward()), args=args, train_dataset=pairs, processing_class=tokenizer)


def theirs(objective: Objective, rows: Any, model: Any, trainer: Any) -> tuple[Tensor, dict[str, float]]:
    """(loss, metrics) of rows as one batch, by TRL or transformers."""
    segments = [s for i in range(2 if objective.name == "reward" else 1) for e in rows for s in e.segments[i : i + 1]]
    inputs = {
        "input_ids": pad_sequence([torch.tensor(s.ids.astype(np.int64)) for s in segments], batch_first=True, padding_value=PAD_ID),
        "attention_mask": pad_sequence([torch.ones(len(s.ids), dtype=torch.int64) for s in segments], batch_first=True),
    }
    if isinstance(objective, Reward):
        trainer.args.center_rewards_coefficient = objective.center_rewards_coefficient
        margins = [float(e.segments[0].role.partition(" by ")[2] or 0) for e in rows]
        trainer._metrics["train"].clear()
        loss = trainer.compute_loss(model, inputs | ({"margin": torch.tensor(margins)} if any(margins) else {}))
        return loss, {k: v[-1] for k, v in trainer._metrics["train"].items()}
    if isinstance(objective, Stepwise):
        labels = torch.full(inputs["input_ids"].shape, -100)
        for line, s in zip(labels, segments, strict=True):
            line[torch.from_numpy(np.flatnonzero(s.supervised))] = torch.tensor([int(mark) for mark in s.role])
    else:
        labels = torch.tensor([CLASSES.index(s.role) for s in segments])
    out = model(**inputs, labels=labels)
    right = (out.logits.argmax(-1) == labels)[labels != -100].float().mean()
    return out.loss, {"accuracy": float(right)}


def ours(objective: Objective, rows: Any, adapter: Adapter) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """(loss, metrics, gradients); in two parts, since a step may take several forwards."""
    attached, counts, loss, told = adapter.base.attached, Counts.of(rows), 0.0, dict[str, float]()
    params = {k: p.clone().requires_grad_() for k, p in adapter.params.items()}
    for part in (rows[:2], rows[2:]):
        mix = Mix([attached.pack(adapter.method, params, adapter.sites)])
        total, unread = forward_loss(attached, mix, [Part(0, part, objective, counts)])
        total.backward()
        (outcome,) = unread.read()
        loss += outcome.loss
        told = {k: told.get(k, 0.0) + v for k, v in outcome.metrics.items()}
    return loss, told, {k: p.grad for k, p in params.items() if p.grad is not None}


@pytest.mark.parametrize(("case", "file"), [(c, OBJECTIVES[c.partition("-")[0]].name) for c in CASES] + [("reward-centred", "margins")])
def test_losses_metrics_and_gradients(case: str, file: str, reward_trainer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path)
    base, objective = tiny_base(), CASES[case]
    rows = load_examples([Source(f"{file}.jsonl")], base.tokenizer, root=tmp_path, max_length=128, parts=objective.parts).examples
    adapter = Adapter.create(base, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS), head=objective.head)
    generator = torch.Generator().manual_seed(4)
    for p in adapter.params.values():
        p += 0.2 * torch.randn(p.shape, generator=generator)
    model = reward_trainer.model if objective.name == "reward" else classifier(objective)
    model.train().zero_grad()
    take_on(model, adapter.params)
    want, want_metrics = theirs(objective, list(rows), model, reward_trainer)
    want.backward()
    loss, told, gradients = ours(objective, rows, adapter)
    assert loss == pytest.approx(want.item(), rel=1e-5)
    assert told.keys() == {"accuracy", "margin", "mean_reward"} if objective.name == "reward" else {"accuracy"}
    for name, value in told.items():
        assert value == pytest.approx(want_metrics[name], rel=1e-5, abs=2e-6), name
    found = {n: p.grad for n, p in trained(model).items()}
    assert found.keys() == gradients.keys() and "score.weight" in found
    for name, gradient in found.items():
        if float(gradient.norm()):
            assert float((gradients[name] - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.parametrize("name", ["classify", "reward", "stepwise"])
def test_ten_steps(name: str, reward_trainer: Any, tmp_path: Path) -> None:
    """A run against peft's model under torch's AdamW with the loss of TRL or transformers. An epoch is one step."""
    write_rows(tmp_path)
    fields = {"method": "lora", "r": 4, "lora_alpha": 6, "target_modules": TARGETS, "data": "rows", "objective": name, "lr": 5e-3}
    content = run_file(tmp_path, {"v": fields}) | {"data": {"rows": {"train": f"{name}.jsonl"}}}
    content["defaults"] = {"max_steps": 10, "batch_size": 5, "schedule": "constant", "max_grad_norm": 1e3, "weight_decay": 0.1}
    run = RunConfig.from_dict(content, root=tmp_path)
    report, objective = train(run, base=tiny_base()), CASES[name]
    base = tiny_base()
    begin = Adapter.create(base, run.variants[0].method, seed=0, head=objective.head).params
    rows = list(load_examples([Source(f"{name}.jsonl")], base.tokenizer, root=tmp_path, max_length=128, parts=objective.parts).examples)
    model = reward_trainer.model if name == "reward" else classifier(objective)
    model.train()
    take_on(model, begin)
    losses = ten_steps(model, lambda epoch: theirs(objective, [rows[i] for i in order(5, 0, epoch)], model, reward_trainer)[0])
    check_run(report, losses, model)


def test_by_hand() -> None:
    def segments(*roles: str, targets: int = 1) -> Segments:
        """Half of the rows of an optimizer step."""
        rows = len(roles) // (2 if "rejected" in roles else 1)
        return Segments(roles, (targets,) * len(roles), Counts(2 * rows, 2 * targets * len(roles)), torch.device("cpu"))

    # softmax of (0, log 3) is (1/4, 3/4): −log of 3/4 and of 1/4, over four rows of which these are two
    scores = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    two = Classify(classes=("x", "y"))
    loss, told = two.loss(scores, None, segments("y", "x"))
    assert (float(loss), float(told["accuracy"])) == (pytest.approx((0.287682 + 1.386294) / 4), 0.25)
    # "y" given twice and right once: 2 · 1 / (1 + 2); "x" never given: 0
    sums = {k: float(v) for k, v in two.sums(scores, segments("y", "x")).items()}
    assert two.report(0.5, sums) == {"loss": 0.5, "accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 0) / 2)}
    # 2 − 0.5 − 0.5 = 1: −log σ(1), and 0.1 · 2.5²; over two pairs
    pair = torch.tensor([[2.0], [0.5]])
    loss, told = Reward(center_rewards_coefficient=0.1).loss(pair, None, segments("chosen by 0.5", "rejected"))
    assert float(loss) == pytest.approx((0.313262 + 0.625) / 2, abs=1e-6)
    assert {k: float(v) for k, v in told.items()} == {"accuracy": 0.5, "margin": 0.75, "mean_reward": 0.625}
    loss, told = Stepwise().loss(scores, None, segments("10", targets=2))
    assert (float(loss), float(told["accuracy"])) == (pytest.approx((0.287682 + 1.386294) / 4), 0.25)


def test_joint_equals_solo_and_a_resumed_run_ends_bit_equal(tmp_path: Path) -> None:
    """Every method with a head, beside imitation and dpo."""
    methods = {n: m for n, m in METHODS.items() if n != "full"}
    own = {
        f"{n}-{o}": m | {"data": o, "objective": o}
        for (n, m), o in zip(methods.items(), ["classify", "reward", "stepwise"] * 3, strict=False)
    }
    own |= {"sft": {"method": "lora", "r": 4, "data": "a"}, "dpo": {"method": "ia3", "data": "dpo", "objective": "dpo", "lr": 1e-2}}

    def content(folder: Path, names: list[str]) -> RunConfig:
        run_of = run_file(folder, {n: own[n] for n in names}, checkpoint_every=2, evaluate={"generate": False})
        run_of["defaults"]["max_steps"] = 3
        write_rows(folder)
        files = {"classify": "classify", "reward": "margins", "stepwise": "stepwise", "dpo": "reward"}
        run_of["data"] |= {n: {"train": f"{f}.jsonl", "valid": f"{f}.jsonl", "test": f"{f}.jsonl"} for n, f in files.items()}
        return RunConfig.from_dict(run_of, root=folder)

    joint = train(content(tmp_path / "joint", list(own)), base=tiny_base())
    for name in ("lora-classify", "dora-reward"):
        alone = train(content(tmp_path / name, [name]), base=tiny_base())
        for key, tensor in alone.adapters[name].params.items():
            torch.testing.assert_close(joint.adapters[name].params[key], tensor, rtol=1e-3, atol=1e-5)
    half, stop = content(tmp_path / "half", list(own)), Stop()
    stop.signum = 15  # after the first step
    with pytest.raises(Interrupted):
        train(half, base=tiny_base(), stop=stop)
    resumed = train(half, base=tiny_base(), resume=True)
    for name, adapter in joint.adapters.items():
        assert all(torch.equal(adapter.params[k], t) for k, t in resumed.adapters[name].params.items()), name
    scores = joint.summary["variants"]["lora-classify"]["scores"]
    assert {"loss", "accuracy", "macro_f1"} <= scores.keys() and "exact_match" not in scores


@pytest.mark.parametrize(
    ("rows", "listed", "wanted"),
    [
        ([("x", 10), ("y", 2), ("z", 10)], None, ("2", "10")),
        ([("x", "no"), ("y", "yes")], ["yes", "no", "maybe"], ("yes", "no", "maybe")),
        ([("x", "b"), ("y", "a")], "auto", ("a", "b")),
        ([("x", 3), ("y", -1), ("z", "--1")], None, ("--1", "-1", "3")),
    ],
)
def test_labels_of_a_head(rows: Any, listed: Any, wanted: tuple[str, ...], tmp_path: Path, tiny_llama_folder: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"text": t, "label": label} for t, label in rows])
    content = run_file(tmp_path, {"v": {"method": "ia3", "data": "rows", "objective": "classify"}})
    content["data"] = {"rows": {"train": "rows.jsonl", "test": "rows.jsonl", "labels": listed}}
    run = RunConfig.from_dict(content | {"base": str(tiny_llama_folder)}, root=tmp_path)
    (estimate,) = check(run).variants
    report = train(run, base=tiny_base())
    adapter = Adapter.load(report.out / "adapters" / "v", report.base)
    assert adapter.head is not None and adapter.head.labels == wanted
    saved = report.out / "adapters" / "v" / "adapter_model.safetensors"
    assert (estimate.trainable, estimate.adapter_bytes) == (adapter.num_parameters, saved.stat().st_size)


def test_what_is_refused_with_the_fix(tmp_path: Path) -> None:
    write_rows(tmp_path)
    write(tmp_path / "other.jsonl", [{"text": "x", "label": "zebra"}, {"text": "y", "label": "a"}])
    content = run_file(tmp_path, {"v": {"method": "ia3", "data": "rows", "objective": "classify"}})
    content["data"] = {"rows": {"train": "classify.jsonl", "valid": "other.jsonl"}}
    with pytest.raises(DataError, match="labels that its head lacks") as error:
        train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    assert list(error.value.problems) == ["data.rows.valid: 'zebra'"]
    content["variants"]["v"] = {"method": "full", "data": "rows", "objective": "classify"}
    with pytest.raises(ConfigError, match="cannot be run") as wrong:
        RunConfig.from_dict(content, root=tmp_path)
    assert "a head is a part of an adapter" in wrong.value.problems[0]


def test_labels_are_imitated_too_where_columns_name_them(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"utterance": f"word {i}", "intent": "ab"[i % 2]} for i in range(6)])
    source = [{"path": "rows.jsonl", "columns": {"text": "utterance", "label": "intent"}}]
    content = run_file(tmp_path, {"v": {"method": "ia3", "data": "rows"}}, evaluate={"generate": False})
    content["data"] = {"rows": {"train": source, "valid": source, "labels": "auto"}}
    content["variants"]["v"]["valid_metric"] = "label_accuracy"
    report = train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    assert report.summary["variants"]["v"]["valid"]["best"] is not None


def test_eval_and_score_of_the_command_line(tmp_path: Path, tiny_llama_folder: Path) -> None:
    write_rows(tmp_path)
    of_head = {"method": "ia3", "data": "rows", "objective": "classify"}
    content = run_file(tmp_path, {"intents": of_head, "judge": of_head | {"data": "pairs", "objective": "reward"}})
    content["data"] = {"rows": {"train": "classify.jsonl", "test": "classify-valid.jsonl"}, "pairs": {"train": "margins.jsonl"}}
    report = train(RunConfig.from_dict(content | {"base": str(tiny_llama_folder), "dtype": "float32"}, root=tmp_path))
    on = ["--base", str(tiny_llama_folder), "--dtype", "float32", "--json"]
    intents, judge = ("--adapter", str(report.out / "adapters" / "intents")), ("--adapter", str(report.out / "adapters" / "judge"))
    told = CliRunner().invoke(main, ["eval", str(tmp_path / "classify-valid.jsonl"), *intents, *on])
    assert told.exit_code == 0, told.output
    scores, wanted = json.loads(told.stdout)["scores"], report.summary["variants"]["intents"]["scores"]
    assert scores["intents"]["accuracy"] == wanted["accuracy"] and scores["intents"]["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
    assert "loss" not in scores["base"]
    told = CliRunner().invoke(main, ["score", "some 0", "word", *intents, *on])
    assert told.exit_code == 0, told.output
    ids = report.base.tokenizer("some 0")["input_ids"]
    values = report.base.scores([ids], [report.adapters["intents"]])[0].tolist()
    assert list(json.loads(told.stdout)[0]["scores"].values()) == pytest.approx(values, rel=1e-4)
    told = CliRunner().invoke(main, ["score", "--prompt", "q 1", "ab", "cd", *judge, *on])
    assert told.exit_code == 0, told.output
    assert len({line["scores"][0] for line in json.loads(told.stdout)}) == 2
