"""Runs that learn from their own answers: what is drawn, joint equals solo, resume, rewards that fail, validation by reward."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.common import metrics, run_file, tiny_base
from trimtab.errors import ConfigError
from trimtab.objectives import Segments
from trimtab.objectives.grpo import Grpo
from trimtab.train import Report, RunConfig, train
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent

LORA = {"method": "lora", "r": 4, "lora_dropout": 0.0, "lr": 2e-2, "data": "asked"}
GRPO = LORA | {
    "objective": "grpo",
    "num_generations": 4,
    "max_completion_length": 6,
    "rewards": [{"reward": "rewards.py:many", "trusted": True}],
}
CODE = '''
import time

def many(completions, wanted, **_):
    """The share of characters that are wanted."""
    texts = [c[0]["content"] for c in completions]
    return [sum(x in w for x in t) / (1 + len(t)) for t, w in zip(texts, wanted, strict=True)]

def hangs(completions, **_):
    while True:
        time.sleep(1)

def crashes(completions, **_):
    import os
    os._exit(7)

def once(completions, trainer_state, **_):
    return [float(i) if trainer_state.global_step == 0 else 1.0 for i in range(len(completions))]

def nonsense(completions, **_):
    return [float("nan")] + [None] * (len(completions) - 1)
'''


def config(folder: Path, variants: dict[str, dict[str, Any]], **keys: Any) -> RunConfig:
    content = run_file(folder, variants, **keys)
    (folder / "rewards.py").write_text(CODE)
    for split, count in (("train", 6), ("valid", 3)):
        rows = [{"prompt": [{"role": "user", "content": f"n {i} {split}"}], "wanted": "abcdefgh"} for i in range(count)]
        (folder / f"asked-{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    content["data"]["asked"] = {"train": "asked-train.jsonl", "valid": "asked-valid.jsonl", "test": "asked-valid.jsonl"}
    content["defaults"] = {"max_steps": 4, "batch_size": 2, "max_length": 128, "eval_every": 2}
    return RunConfig.from_dict(content, root=folder)


def run(folder: Path, variants: dict[str, dict[str, Any]], **keys: Any) -> Report:
    """keys: of the run file, where they are its own, and of `train`."""
    own = {k: keys.pop(k) for k in ("max_tokens",) if k in keys}
    return train(config(folder, variants, **own), base=tiny_base(), **keys)


def steps(report: Report, name: str) -> list[dict[str, Any]]:
    return [line for line in metrics(report)[name] if "event" not in line]


def equal(a: Report, b: Report, name: str, *, tolerance: float = 0.0) -> None:
    mine, theirs = a.adapters[name].params, b.adapters[name].params
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert float((value - theirs[key]).norm()) <= tolerance * float(value.norm()), key


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Two steps on the same answers, with a distance from the base."""
    return run(tmp_path_factory.mktemp("twice"), {"v": GRPO | TWICE})


TWICE = {"num_iterations": 2, "beta": 0.1, "loss_type": "grpo", "num_generations": 6}


def test_what_is_logged(twice: Report) -> None:
    lines = steps(twice, "v")
    assert ["reward" in line for line in lines] == [True, False, True, False], "answers are drawn before every other step"
    assert all(line["kl"] > -1e-3 and 0 <= line["clip_ratio/region_mean"] <= 1 for line in lines)
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6), "a fresh adapter is the base"
    first = lines[0]
    assert first["reward"] == first["rewards/many/mean"] and 0 < first["entropy"] < 6
    assert 1 <= first["completions/min_length"] <= first["completions/mean_length"] <= first["completions/max_length"] <= 6
    valid = [line for line in metrics(twice)["v"] if line.get("event") == "valid"]
    assert [line["metric"] for line in valid] == ["reward"] * 2 and all(line["valid_loss"] is None for line in valid)
    scores = twice.summary["variants"]["v"]["scores"]
    assert (scores["loss"] is None and scores["reward"] == valid[1]["valid_reward"]) or not valid[1]["best"]
    predictions = [json.loads(line) for line in (twice.out / scores["predictions"]).read_text().splitlines()]
    assert sum(p["reward"] for p in predictions) / 3 == pytest.approx(scores["reward"])


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_ends_bit_equal(step: int, twice: Report, tmp_path: Path) -> None:
    """Between two steps on the same answers, and before new ones."""

    class Interrupting(Silent):
        def step(self, line: dict[str, Any]) -> None:
            if line["step"] == step:
                stop.signum = 15

    stop = Stop()
    with pytest.raises(Interrupted):
        run(tmp_path, {"v": GRPO | TWICE}, listener=Interrupting(), stop=stop)
    report = run(tmp_path, {"v": GRPO | TWICE}, resume=True)
    equal(report, twice, "v")
    plain = [{k: x for k, x in line.items() if k not in ("seconds", "tokens_per_s")} for line in steps(report, "v")]
    assert plain == [{k: x for k, x in line.items() if k not in ("seconds", "tokens_per_s")} for line in steps(twice, "v")]


def test_the_second_step_compares_with_what_the_first_one_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, also where a step is several forwards: so the ratio of the first step is 1."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    loss = Grpo.loss

    def heard(self: Grpo, logp_R: Tensor, ref_R: Tensor | None, segments: Segments) -> Any:
        assert segments.samples is not None
        seen.append((logp_R.detach().clone(), segments.samples.old_R))
        return loss(self, logp_R, ref_R, segments)

    monkeypatch.setattr(Grpo, "loss", heard)
    aims = {"grpo": {}, "rloo": {"loss_type": "rloo"}}
    report = run(tmp_path, {n: GRPO | TWICE | a | {"max_steps": 2} for n, a in aims.items()}, max_tokens=64)
    firsts, seconds = [x for x, old in seen if old is None], [old for _, old in seen if old is not None]
    assert len(firsts) == len(seconds) > 2 * len(aims)
    assert all(any(torch.equal(a, b) for b in firsts) for a in seconds)
    for name in aims:
        first, second = steps(report, name)
        assert first["clip_ratio/region_mean"] == 0 and 0 < first["sampling/sampling_logp_difference/mean"] < 1e-5
        assert "sampling/sampling_logp_difference/mean" not in second


def test_joint_equals_solo(twice: Report, tmp_path: Path) -> None:
    """Beside imitation, preferences and another one that draws; the answers are the same."""
    others = {
        "cool": GRPO | {"temperature": 0.5, "loss_type": "rloo", "seed": 5, "rewards": {"reward": "length", "max_words": 1}},
        "imitates": LORA | {"data": "a"},
        "v": GRPO | TWICE,
    }
    report = run(tmp_path, others)
    equal(report, twice, "v", tolerance=1e-4)
    keys = ("loss", "reward", "entropy", "completions/mean_length")
    for mine, theirs in zip(steps(report, "v"), steps(twice, "v"), strict=True):
        assert [mine.get(k, 0) for k in keys] == pytest.approx([theirs.get(k, 0) for k in keys], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_rewards_that_fail_are_told_and_left_out(tmp_path: Path) -> None:
    told: list[str] = []

    class Hears(Silent):
        def warning(self, text: str) -> None:
            told.append(text)

    bad = [{"reward": f"rewards.py:{n}", "trusted": True, "time_limit": 2.0} for n in ("hangs", "crashes", "nonsense")]
    report = run(tmp_path, {"v": GRPO | {"max_steps": 2, "rewards": [*GRPO["rewards"], *bad]}}, listener=Hears())
    said = "\n".join(told)
    assert (
        "reward hangs, step 0: it has not answered in 2 s" in said and "reward crashes, step 0: its process has ended with code 7" in said
    )
    first = steps(report, "v")[0]
    assert first["reward"] == first["rewards/many/mean"] and "rewards/nonsense/mean" not in first
    assert len(steps(report, "v")) == 2


def test_code_must_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trusted: true"):
        config(tmp_path, {"v": GRPO | {"rewards": ["rewards.py:many"]}})


def test_answers_without_an_end_do_not_count(tmp_path: Path) -> None:
    """A random base hardly ever ends an answer: nothing is learnt, and the run goes on."""
    report = run(tmp_path, {"v": GRPO | TWICE | {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 2}})
    lines = steps(report, "v")
    assert [line["completions/clipped_ratio"] for line in lines[:1]] == [1.0]
    assert all(line["loss"] == 0 and line["grad_norm"] == 0 and line["supervised_tokens"] == 0 for line in lines)


def test_where_all_are_equal_the_optimizer_goes_on(tmp_path: Path) -> None:
    """As TRL's does: AdamW's second step, on a gradient of 0, is its first one times (β₁ / (1 + β₁)) / √(β₂ / (1 + β₂))."""
    fields = GRPO | {"rewards": {"reward": "rewards.py:once", "trusted": True}, "schedule": "constant", "keep_best": False}
    one, two = (run(tmp_path / str(n), {"v": fields | {"max_steps": n}}) for n in (1, 2))
    assert [line["grad_norm"] > 0 for line in steps(two, "v")] == [True, False]
    again = 1 + (0.9 / 1.9) / math.sqrt(0.999 / 1.999)
    for key, first in one.adapters["v"].params.items():
        if "lora_B" in key:  # A has no gradient while B is 0
            torch.testing.assert_close(two.adapters["v"].params[key], again * first, rtol=1e-2, atol=1e-3)
            assert first.abs().max() > 1e-2
