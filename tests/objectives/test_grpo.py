"""GRPO and its relatives: loss, metrics and gradients of every adapter tensor are TRL's on shared samples and rewards; a case by hand; ten
steps beside TRL's loss under torch's AdamW."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.objectives.common import check_run, take_on, trained
from tests.objectives.test_trl_parity import peft_model
from tests.tiny import tiny_tokenizer
from tests.train.common import run_file, tiny_base
from trimtab.data import Example
from trimtab.data.examples import one_row
from trimtab.forward.packs import Mix
from trimtab.model import Base
from trimtab.objectives import Counts, Segments
from trimtab.objectives.base import SAMPLE, Samples
from trimtab.objectives.grpo import Grpo
from trimtab.store import Adapter
from trimtab.train import RunConfig, train
from trimtab.train.losses import Part, forward_loss
from trimtab.train.measure import log_probabilities_of
from trimtab.train.rewarding import Rewarding
from trimtab.train.rollouts import Answer, Rollouts
from trimtab.train.samples import Sample

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and peft explain themselves at length
PROMPTS, GROUP, LONGEST = 3, 4, 9


def zero(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


class Side:
    """One adapter on both sides, and TRL's trainers of a loss each."""

    def __init__(self, folder: Path):
        self.folder = folder
        peft_model().save_pretrained(folder / "adapter")
        self.base: Base = tiny_base()
        self.adapter = Adapter.load(folder / "adapter", self.base)
        self.trainers = {"grpo": self._trainer(trl.GRPOTrainer, trl.GRPOConfig), "rloo": self._trainer(trl.RLOOTrainer, trl.RLOOConfig)}

    def _trainer(self, cls: Any, config: Any) -> Any:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        common = {"output_dir": str(self.folder), "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
        args = config(
            **common, temperature=0.7, num_generations=GROUP, per_device_train_batch_size=PROMPTS * GROUP, max_completion_length=LONGEST
        )
        rows = datasets.Dataset.from_list([{"prompt": "a"}] * 12)
        made = cls(peft_model(), reward_funcs=zero, args=args, train_dataset=rows, processing_class=tokenizer)
        made.model.train()
        made.current_gradient_accumulation_steps = 1
        return made


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    yield Side(tmp_path_factory.mktemp("grpo"))


def samples_like(seed: int = 0, truncated: Sequence[int] = ()) -> list[list[Sample]]:
    """Random prompts, each with a group of random answers; some end with the end token."""
    rng, found = np.random.default_rng(seed), []
    for p in range(PROMPTS):
        prompt = rng.integers(0, 250, 4 + p)
        group = []
        for g in range(GROUP):
            n = LONGEST if p * GROUP + g in truncated else int(rng.integers(2, LONGEST))
            ids = np.concatenate([prompt, rng.integers(0, 250, n)]).astype(np.int32)
            group.append(Sample(ids, np.arange(len(ids)) >= len(prompt), "sample", (0, p), SAMPLE))
        found.append(group)
    return found


def told(side: Side, objective: Grpo, groups: list[list[Sample]], rewards: np.ndarray, old: bool) -> list[list[Sample]]:
    """The samples with their advantages, and log-probabilities: of the base, and of another adapter, which drew them."""
    advantages = objective.advantages(rewards)
    flat = [s for group in groups for s in group]
    with torch.no_grad():
        base = log_probabilities_of(side.base.attached, Mix([]), [(-1, s) for s in flat], objective.temperature)
        shaken = {k: p + 0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) for k, p in side.adapter.params.items()}
        mix = Mix([side.base.attached.pack(side.adapter.method, shaken, side.adapter.sites)])
        before = log_probabilities_of(side.base.attached, mix, [(0, s) for s in flat], objective.temperature)
    sizes = [s.targets for s in flat]
    known = iter(zip(flat, base.split(sizes), before.split(sizes), advantages.reshape(-1), strict=True))
    return [
        [
            replace(s, advantage=float(a), old_R=o.numpy() if old else None, base_R=b.numpy() if objective.beta else None)
            for s, b, o, a in [next(known) for _ in group]
        ]
        for group in groups
    ]


def ours(
    side: Side, objective: Grpo, groups: list[list[Sample]], masked: Sequence[int]
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """(loss, metrics, gradients), in a forward for each prompt; masked samples are left out but counted."""
    attached, adapter = side.base.attached, side.adapter
    params = {k: p.clone().requires_grad_() for k, p in adapter.params.items()}
    kept = [[s for g, s in enumerate(group) if p * GROUP + g not in masked] for p, group in enumerate(groups)]
    targets = sum(s.targets for group in kept for s in group)
    counts = Counts(PROMPTS, targets, {SAMPLE: PROMPTS * GROUP}, {SAMPLE: targets})
    loss, metrics = 0.0, dict[str, float]()
    for group in kept:
        mix = Mix([attached.pack(adapter.method, params, adapter.sites)])
        total, unread = forward_loss(attached, mix, [Part(0, [one_row(group)], objective, counts)])
        total.backward()
        (outcome,) = unread.read()
        loss += outcome.loss
        metrics = {k: metrics.get(k, 0.0) + v for k, v in outcome.metrics.items()}
    return loss, metrics, {k: p.grad for k, p in params.items() if p.grad is not None}


def padded(rows: Sequence[Any], left: bool = False, value: float = 0) -> Tensor:
    tensors = [torch.as_tensor(np.asarray(r)) for r in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side="left" if left else "right")


def theirs(side: Side, objective: Grpo, groups: list[list[Sample]], masked: Sequence[int]) -> tuple[Tensor, dict[str, float], Any]:
    """What TRL computes of these samples as one batch."""
    trainer = side.trainers["rloo" if objective.loss_type == "rloo" else "grpo"]
    flat = [s for group in groups for s in group]
    cut = [int(s.supervised.argmax()) for s in flat]
    mask = padded([np.ones(len(s.ids) - n, dtype=np.int64) for s, n in zip(flat, cut, strict=True)])
    mask[list(masked)] = 0
    inputs = {
        "prompt_ids": padded([s.ids[:n].astype(np.int64) for s, n in zip(flat, cut, strict=True)], left=True),
        "prompt_mask": padded([np.ones(n, dtype=np.int64) for n in cut], left=True),
        "completion_ids": padded([s.ids[n:].astype(np.int64) for s, n in zip(flat, cut, strict=True)]),
        "completion_mask": mask,
        "advantages": torch.tensor([s.advantage for s in flat]),
        "num_items_in_batch": mask.sum(),
    }
    if flat[0].old_R is not None:
        inputs["old_per_token_logps"] = padded([s.old_R for s in flat])
        inputs["old_logps"] = (inputs["old_per_token_logps"] * mask).sum(1)
    if objective.beta:
        inputs["ref_per_token_logps"] = padded([s.base_R for s in flat])
    trainer.loss_type, trainer.beta = objective.loss_type, objective.beta
    trainer.epsilon_low = objective.epsilon
    trainer.epsilon_high = objective.epsilon if objective.epsilon_high is None else objective.epsilon_high
    trainer.importance_sampling_level, trainer.args.delta = objective.importance_sampling_level, objective.delta
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, {k: v[-1] for k, v in trainer._metrics["train"].items()}, trainer.model


def rewards_like(seed: int = 1) -> np.ndarray:
    rewards = np.random.default_rng(seed).integers(0, 3, (PROMPTS, GROUP)).astype(np.float64)
    rewards[1] = 1.0
    return rewards


CASES: list[dict[str, Any]] = [
    {"loss_type": "dapo"},
    {"loss_type": "grpo", "beta": 0.3},
    {"loss_type": "bnpo", "delta": 1.1, "epsilon_high": 0.05, "epsilon": 0.02},
    {"loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": LONGEST, "beta": 0.1},
    {"loss_type": "cispo", "epsilon_high": 1.02, "scale_rewards": "batch"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.05},
    {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.03},
    {"loss_type": "rloo", "epsilon": 0.05},
]


def named(case: dict[str, Any]) -> str:
    return "-".join(f"{v}" for v in case.values())


@pytest.mark.parametrize("old", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("case", CASES, ids=named)
def test_losses_metrics_and_gradients(case: dict[str, Any], old: bool, side: Side) -> None:
    objective = Grpo(rewards="exact_match", temperature=0.7, **case)
    masked = (2, 5) if old and objective.loss_type != "rloo" else ()
    old = old or objective.loss_type == "rloo"  # TRL's always has them
    groups = told(side, objective, samples_like(), rewards_like(), old)
    want, want_metrics, model = theirs(side, objective, groups, masked)
    want.backward()
    loss, metrics, gradients = ours(side, objective, groups, masked)
    assert loss == pytest.approx(want.item(), rel=1e-5, abs=1e-6)  # advantages add up to 0
    for name, value in metrics.items():
        assert value == pytest.approx(want_metrics[name], rel=1e-5, abs=1e-7), name
    if old and objective.loss_type != "cispo":
        assert 0 < metrics["clip_ratio/region_mean"] < 1, "a case that clips nothing shows nothing"
    assert ("kl" in metrics) == bool(objective.beta)
    found = {n: p.grad for n, p in trained(model).items()}
    assert found.keys() == gradients.keys() and len(found) == 12
    for name, gradient in found.items():
        apart = float((gradients[name] - gradient).norm() / gradient.norm())
        assert apart < 1e-5, (name, apart, float(gradient.norm()))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale: str) -> None:
    """TRL's formulas on torch, with rewards that are missing."""
    from trl.trainer.utils import nanstd

    rewards = rewards_like()
    rewards[0, 1] = rewards[2, 0] = np.nan
    tensor = torch.tensor(rewards)
    spread = nanstd(tensor, dim=1)[:, None] if scale == "group" else nanstd(tensor)
    want = tensor - torch.nanmean(tensor, dim=1)[:, None]
    want = want if scale == "none" else want / (spread + 1e-4)
    found = Grpo(rewards="exact_match", scale_rewards=scale).advantages(rewards)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, torch.nan_to_num(want, nan=0.0).numpy(), rtol=1e-6, atol=1e-9)
    rloo = Grpo(rewards="exact_match", loss_type="rloo").advantages(rewards)
    for row, mine in zip(rewards, rloo, strict=True):
        for i, (reward, advantage) in enumerate(zip(row, mine, strict=True)):
            others = [r for j, r in enumerate(row) if j != i and not math.isnan(r)]
            assert advantage == pytest.approx(0.0 if math.isnan(reward) else reward - sum(others) / len(others))


def test_by_hand() -> None:
    """Two answers of 2 and 1 tokens, rewards 1 and 0: A = ±(0.5 / (std + 1e-4)), std = √0.5."""
    objective = Grpo(rewards="exact_match", loss_type="grpo", beta=0.5, epsilon=0.1)
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    np.testing.assert_allclose(objective.advantages(np.array([[1.0, 0.0]])), [[advantage, -advantage]])
    logp, old, base = [math.log(0.6), math.log(0.5), math.log(0.2)], [math.log(0.5), math.log(0.5), math.log(0.4)], [math.log(0.3)] * 3
    samples = Samples(torch.tensor([advantage, -advantage]), torch.tensor(old), torch.tensor(base))
    counts = Counts(1, 3, {SAMPLE: 2}, {SAMPLE: 3})
    loss, metrics = objective.loss(torch.tensor(logp), None, Segments((SAMPLE,) * 2, (2, 1), counts, torch.device("cpu"), samples=samples))
    ratio = [0.6 / 0.5, 1.0, 0.2 / 0.4]
    kl = [r * (0.3 / math.exp(p) - math.log(0.3 / math.exp(p)) - 1) for r, p in zip(ratio, logp, strict=True)]
    first = (-1.1 * advantage + 0.5 * kl[0] - advantage + 0.5 * kl[1]) / 2  # 1.2 is clipped to 1.1
    second = 0.9 * advantage + 0.5 * kl[2]  # 0.5 is clipped to 0.9, as the advantage is below 0
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-7)
    assert metrics["kl"].item() == pytest.approx(sum(kl) / 3, rel=1e-6)
    shares = [metrics[f"clip_ratio/{n}_mean"].item() for n in ("low", "high", "region")]
    assert shares == pytest.approx([1 / 3, 1 / 3, 2 / 3])


def test_segments_of_others_are_refused() -> None:
    row = Example(np.arange(3, dtype=np.int32), np.array([False, True, True]), "x", (0, 0))
    part = Part(0, [row], Grpo(rewards="exact_match"), Counts.of([row]))
    with pytest.raises(AssertionError, match="samples"):
        part.described(torch.device("cpu"))


def test_ten_steps(side: Side, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose draws and rewards are given, against TRL's loss on peft's model under torch's AdamW; two steps on the same answers."""
    drawn: list[tuple[list[list[Sample]], np.ndarray]] = []

    def draw(_: Any, attached: Any, prompts: Any) -> Any:
        ((v, examples),) = prompts.items()
        groups = samples_like(seed=len(drawn))
        told = [[replace(s, ids=np.concatenate([e.ids, s.ids[s.supervised]])) for s in g] for e, g in zip(examples, groups, strict=True)]
        mine = [[replace(s, supervised=np.arange(len(s.ids)) >= len(e.ids)) for s in g] for e, g in zip(examples, told, strict=True)]
        drawn.append((mine, rewards_like(len(drawn))))
        flat = [s for g in mine for s in g]
        return {v: [Answer(s.ids[s.supervised].tolist(), [0.0] * s.targets, [0.0] * s.targets) for s in flat]}

    monkeypatch.setattr(Rollouts, "_draw", draw)
    monkeypatch.setattr(Rewarding, "ask", lambda *_: drawn[-1][1].reshape(1, -1))
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": f"n {i}"}) + "\n" for i in range(PROMPTS)))
    aim = {"num_generations": GROUP, "max_completion_length": LONGEST, "temperature": 0.7, "beta": 0.1, "num_iterations": 2}
    fields = {
        "method": "lora",
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "lr": 5e-3,
    }
    content = run_file(tmp_path, {"v": fields | aim | {"data": "asked", "objective": "grpo", "rewards": "exact_match"}})
    content["data"] = {"asked": {"train": "asked.jsonl"}}
    content["defaults"] = {"max_steps": 10, "batch_size": PROMPTS, "schedule": "constant", "max_grad_norm": 9.9, "weight_decay": 0.1}
    run = RunConfig.from_dict(content, root=tmp_path)
    report = train(run, base=tiny_base())
    objective = run.variants[0].objective
    assert isinstance(objective, Grpo)
    trainer = side.trainers["grpo"]
    params, begin = trained(trainer.model), Adapter.create(tiny_base(), run.variants[0].method, seed=0).params
    before = {k: p.detach().clone() for k, p in params.items()}
    take_on(trainer.model, begin)
    optimizer, losses = torch.optim.AdamW(params.values(), lr=5e-3, weight_decay=0.1), []
    for groups, rewards in drawn:
        advantages = iter(objective.advantages(rewards).reshape(-1).tolist())
        known = [[replace(s, advantage=next(advantages)) for s in g] for g in groups]
        with torch.no_grad():
            old = values(trainer, known)
            with trainer.model.disable_adapter():
                base = iter(values(trainer, known))
        each = iter(old)
        known = [[replace(s, old_R=next(each), base_R=next(base)) for s in g] for g in known]
        for _ in range(2):
            loss, _, _ = theirs(side, objective, known, ())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(drawn) == 5
    check_run(report, losses, trainer.model, abs=1e-6)
    take_on(trainer.model, before)


def values(trainer: Any, groups: list[list[Sample]]) -> list[np.ndarray]:
    """TRL's log-probabilities of the answers' tokens."""
    found = []
    for s in (s for group in groups for s in group):
        ids = torch.tensor(s.ids.astype(np.int64))[None]
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), s.targets)
        found.append(logps[0].numpy())
    return found
