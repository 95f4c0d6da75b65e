"""Validation within a run: when it happens, what it decides, what is saved; alone as among others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.common import METHODS, run_file, tiny_base, write_rows
from trimtab.cli.show import Lines, validation
from trimtab.data import encode_rows, read_source, scores
from trimtab.data.sources import Source
from trimtab.errors import ConfigError, DataError
from trimtab.store import Adapter
from trimtab.train import Report, RunConfig, evaluate, train
from trimtab.train.finish import _validation
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent
from trimtab.train.validate import record
from trimtab.train.variant import Progress, Variant

STEADY = {"schedule": "constant", "warmup_steps": 0}
"""With it, a run of n steps is the start of a longer one."""


def with_valid(folder: Path, variants: dict[str, dict[str, Any]], **keys: Any) -> dict[str, Any]:
    """A run file whose data sets a and b have 4 valid rows each."""
    content = run_file(folder, variants, **keys)
    for name in "ab":
        write_rows(folder / f"{name}-valid.jsonl", 4, name)
        content["data"][name]["valid"] = f"{name}-valid.jsonl"
    return content


def run(folder: Path, variants: dict[str, dict[str, Any]], **keys: Any) -> Report:
    return train(RunConfig.from_dict(with_valid(folder, variants, **keys), root=folder), base=tiny_base())


def lines(report: Report, name: str, event: str | None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (report.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in found if line["variant"] == name and line.get("event") == event]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 10}, [4, 8, 10]),  # 11 rows in batches of 3: an epoch is 4 steps
        ({"max_steps": 4, "gradient_accumulation_steps": 2}, [2, 4]),
        ({"max_steps": 5, "eval_every": 3}, [3, 5]),
    ],
)
def test_validation_comes_with_each_epoch_or_as_asked_and_at_the_end(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    report = run(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "keep_best": False} | options})
    found = lines(report, "v", "valid")
    assert [line["step"] for line in found] == steps
    base = tiny_base()
    rows, _ = read_source(Source("a-valid.jsonl"), tmp_path)
    nll: dict[str, list[float]] = {"base": [], "v": []}
    for e in encode_rows(rows, base.tokenizer, 128):
        for who, adapter in (("base", None), ("v", Adapter.load(report.out / "adapters" / "v", base))):
            log_TV = torch.log_softmax(base.logits([e.ids.tolist()], [adapter])[0].double(), -1)
            nll[who] += [-log_TV[t - 1, int(e.ids[t])].item() for t in range(1, len(e.ids)) if e.supervised[t]]
    for key, who in (("valid_loss", "v"), ("base_valid_loss", "base")):
        assert found[-1][key] == pytest.approx(sum(nll[who]) / len(nll[who]), rel=1e-4)
    assert found[-1]["valid_perplexity"] == pytest.approx(math.exp(found[-1]["valid_loss"]))
    assert len({line["base_valid_loss"] for line in found}) == 1


EARLY = {
    # rates at which validation worsens soon, but not at once
    "lora": METHODS["lora"] | {"data": "a", "lr": 0.1, "patience": 1, "eval_every": 2},
    "ia3": METHODS["ia3"] | {"data": "b", "lr": 0.2, "patience": 2, "eval_every": 1, "valid_metric": "token_f1"},
    "prompt": METHODS["prompt"] | {"data": "a", "eval_every": 2, "patience": 3},
    "full": METHODS["full"] | {"data": "b", "lr": 0.06, "patience": 1, "eval_every": 1},
}


def test_a_variant_that_ends_early_does_so_alone_as_among_others(tmp_path: Path) -> None:
    """Law 6 with early stopping: the same validations, the same end, the same tensors."""
    keys: dict[str, Any] = {"max_tokens": 256}
    early = {n: f | STEADY | {"max_steps": 12, "seed": i, "adam_epsilon": 1e-5} for i, (n, f) in enumerate(EARLY.items())}
    joint = run(tmp_path / "joint", early, **keys)
    entries = joint.summary["variants"]
    assert [n for n in early if entries[n]["valid"]["finished_early"]] == ["lora", "ia3", "full"], entries
    assert all(entries[n]["steps"] < 12 and entries[n]["stopped"] is None for n in ("lora", "ia3", "full"))
    assert entries["prompt"]["steps"] == 12
    for name, fields in early.items():
        solo = run(tmp_path / name, {name: fields}, **keys)
        mine, alone = entries[name], solo.summary["variants"][name]
        assert (mine["steps"], mine["saved_step"]) == (alone["steps"], alone["saved_step"])
        assert [v["step"] for v in mine["valid"]["history"]] == [v["step"] for v in alone["valid"]["history"]]
        for event, key in ((None, "loss"), ("valid", "valid_loss")):
            values = [[line[key] for line in lines(r, name, event)] for r in (joint, solo)]
            torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)
        if name in joint.adapters:
            for key, tensor in solo.adapters[name].params.items():
                torch.testing.assert_close(joint.adapters[name].params[key], tensor, rtol=1e-3, atol=1e-5)


class _StopAfter(Silent):
    """Asks a run to end after so many steps of its variants."""

    def __init__(self, stop: Stop, steps: int):
        self.stop, self.left = stop, steps

    def step(self, line: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop.ask(15)


@pytest.mark.parametrize("steps", [3, 7, 11])
def test_a_resumed_run_judges_as_the_uninterrupted(tmp_path: Path, steps: int) -> None:
    """What decides is in the checkpoint: the base's figures, the best tensors, the count of validations without improvement."""
    early = {n: f | STEADY | {"max_steps": 6, "seed": i} for i, (n, f) in enumerate(EARLY.items()) if n != "ia3"}
    whole = run(tmp_path / "whole", early)
    config = RunConfig.from_dict(with_valid(tmp_path / "cut", early), root=tmp_path / "cut")
    stop = Stop()
    with pytest.raises(Interrupted):
        train(config, base=tiny_base(), listener=_StopAfter(stop, steps), stop=stop)
    resumed = train(config, base=tiny_base(), resume=True)
    for name in early:
        mine, theirs = ([line | {"seconds": 0} for line in lines(r, name, "valid")] for r in (resumed, whole))
        assert mine == theirs
        a, b = (saved(r, name) for r in (resumed, whole))
        assert all(torch.equal(t, b[k]) for k, t in a.items()), name


def saved(report: Report, name: str) -> dict[str, torch.Tensor]:
    if name in report.adapters:
        return dict(Adapter.load(report.out / "adapters" / name, report.base).params)
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(report.out / "adapters" / name).named_parameters())


@pytest.mark.parametrize(
    ("name", "options"), [("lora", {"lr": 0.1, "max_steps": 4}), ("projected", {"lr": 3.0, "seed": 3}), ("full", {"lr": 0.06, "seed": 3})]
)
def test_the_best_step_is_what_is_saved(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """At rates so high that the last step is worse than one before it; back at the best, also where it is not the one before."""
    fields = METHODS[name] | STEADY | {"data": "ab"[name == "full"], "eval_every": 1, "max_steps": 5} | options
    entry = (best := run(tmp_path / "best", {name: fields})).summary["variants"][name]
    steps, losses = fields["max_steps"], [v["loss"] for v in entry["valid"]["history"]]
    step = 1 + losses.index(min(losses))
    assert (entry["steps"], entry["saved_step"], entry["valid"]["best_step"]) == (steps, step, step)
    assert step < steps, losses
    shorter = run(tmp_path / "shorter", {name: fields | {"max_steps": step, "keep_best": False}})
    last = run(tmp_path / "last", {name: fields | {"keep_best": False}})
    assert last.summary["variants"][name]["saved_step"] == steps
    tensors = saved(best, name)
    assert tensors.keys() == saved(shorter, name).keys()
    assert all(torch.equal(t, saved(shorter, name)[k]) for k, t in tensors.items())
    assert not all(torch.equal(t, saved(last, name)[k]) for k, t in tensors.items())


def test_all_that_are_due_share_a_pass_and_the_base_is_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[int]] = []
    original = evaluate.mean_losses
    monkeypatch.setattr(evaluate, "mean_losses", lambda *a: passes.append([p.member for p in a[2]]) or original(*a))
    run(
        tmp_path,
        {n: METHODS[n] | {"data": d, "max_steps": 4, "eval_every": e} for n, d, e in (("lora", "a", 2), ("ia3", "b", 2), ("dora", "a", 1))},
    )
    # dora at 1 with the base on a; all three at 2, with the base on b; dora at 3; all at 4; then the test rows
    assert [sorted(p) for p in passes] == [[-1, 0], [-1, 0, 1, 2], [0], [0, 1, 2], [-1, -1, 0, 1, 2]]


def test_answers_are_generated_only_for_whom_they_decide(tmp_path: Path) -> None:
    variants = {n: METHODS[n] | {"data": "a", "max_steps": 2, "eval_every": 2} for n in ("lora", "ia3")}
    variants["ia3"]["valid_metric"] = "rouge_l"
    report = run(tmp_path, variants)
    (answered,), (plain,) = lines(report, "ia3", "valid"), lines(report, "lora", "valid")
    assert {"valid_exact_match", "valid_rouge_l", "base_valid_rouge_l", "valid_bleu"} <= answered.keys()
    assert "valid_exact_match" not in plain and "base_valid_exact_match" not in plain


def test_labels_decide_by_their_likelihood(tmp_path: Path) -> None:
    content = with_valid(tmp_path, {"v": METHODS["lora"] | {"data": "a", "max_steps": 2, "valid_metric": "label_accuracy"}})
    content["data"]["a"]["labels"] = "auto"
    report = train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    (line,) = lines(report, "v", "valid")
    assert 0 <= line["valid_label_accuracy"] <= 100 and line["metric"] == "label_accuracy"
    assert report.summary["variants"]["v"]["scores"].keys() >= {"label_accuracy", "exact_match"}


class _Fake:
    """As much of a variant as `record` sees."""

    def __init__(self, config: Any):
        self.config, self.name, self.progress, self.best, self.kept = config, config.name, Progress(), None, 0
        self.rows = type("Rows", (), {"epoch": 0})

    @property
    def live(self) -> bool:
        return not self.progress.finished_early

    def keep(self) -> None:
        self.kept += 1


def fake(folder: Path, **options: Any) -> Any:
    return _Fake(RunConfig.from_dict(with_valid(folder, {"v": {"data": "a", "method": "ia3"} | options}), root=folder).variants[0])


def test_what_is_not_finite_is_never_the_best_and_counts_against_patience(tmp_path: Path) -> None:
    v = fake(tmp_path, patience=2)
    for step, loss in enumerate([None, 2.0, None, 3.0]):
        v.progress.step = step
        record(v, {"loss": loss})
        assert v.progress.finished_early == "" or step == 3
    assert (v.progress.best_metric, v.progress.best_step, v.kept) == (2.0, 1, 1)
    assert "step 3: valid loss has not improved in 2 validations, the best was 2 at step 1" in v.progress.finished_early
    json.dumps(v.progress.valid)


def test_scores_improve_upwards(tmp_path: Path) -> None:
    v = fake(tmp_path, valid_metric="exact_match")
    better = [record(v, {"loss": 1.0, "exact_match": x})["best"] for x in (10.0, 10.0, 5.0, 20.0)]
    assert better == [True, False, False, True]


@pytest.mark.parametrize(
    ("seen", "best", "kept", "ties"),
    [
        # (exact match, loss) at steps 1, 2, …
        ([(0.0, 3.0), (0.0, 2.0), (0.0, 1.0), (0.0, 1.5)], 3, 3, [1, 2, 4]),  # nothing is right yet: the last steps are better all the same
        ([(50.0, 1.0), (50.0, 2.0)], 1, 1, [2]),
        ([(50.0, 1.0), (50.0, 1.0)], 1, 1, [2]),  # the earlier one
        ([(50.0, 1.0), (60.0, 9.0), (50.0, 0.1)], 2, 2, []),  # the metric comes first
        ([(50.0, None), (50.0, 2.0), (50.0, None)], 2, 2, [1, 3]),
    ],
)
def test_ties_are_broken_by_the_loss(tmp_path: Path, seen: list[tuple[float, float | None]], best: int, kept: int, ties: list[int]) -> None:
    v = fake(tmp_path, valid_metric="exact_match", patience=9)
    v.total_steps = 10
    said = []
    for step, (value, loss) in enumerate(seen, 1):
        v.progress.step = step
        said.append(record(v, {"loss": loss, "exact_match": value}))
    assert v.progress.best_step == best
    assert [line["step"] for line in said if line["best"]][-1] == kept
    assert _validation(v)["valid"].get("tied_steps", []) == ties and _validation(v)["saved_step"] == best
    later = {line["step"]: line.get("ties_with") for line in said}
    assert later[best] == ([t for t in ties if t < best] or None)


def test_a_tie_won_is_said_and_is_no_improvement_for_patience(tmp_path: Path) -> None:
    v = fake(tmp_path, valid_metric="exact_match", patience=2)
    for step, loss in enumerate([3.0, 2.0, 1.0], 1):
        v.progress.step = step
        line = record(v, {"loss": loss, "exact_match": 0.0})
    assert v.progress.finished_early.startswith("step 3: valid exact_match has not improved in 2 validations, the best was 0 at step 3")
    assert line["best"] and line["ties_with"] == [1, 2]
    assert "best, as at step 1, 2, with a lower loss" in validation(line | {"base_valid_loss": 1.0, "base_valid_exact_match": 0.0})


def test_divergence_keeps_the_best_and_is_called_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Variant.step

    def poisoned(self: Variant, loss: float, *rest: Any) -> dict[str, float]:
        return original(self, math.nan if self.progress.step == 3 else loss, *rest)

    monkeypatch.setattr(Variant, "step", poisoned)
    fields = METHODS["lora"] | STEADY | {"data": "a", "eval_every": 2}
    entry = (report := run(tmp_path / "nan", {"v": fields})).summary["variants"]["v"]
    assert entry["stopped"] and entry["valid"]["finished_early"] is None
    assert (entry["steps"], entry["saved_step"]) == (3, 2)
    shorter = run(tmp_path / "two", {"v": fields | {"max_steps": 2}})
    assert all(torch.equal(t, shorter.adapters["v"].params[k]) for k, t in report.adapters["v"].params.items())


def test_loraplus_moves_b_by_its_own_rate(tmp_path: Path) -> None:
    """AdamW's steps have the size of the rate: B moves `ratio` times as far; A, embeddings and whole modules move as far as without.

    A has no gradient until B has moved: its first step is the second, of the rate times what AdamW's bias corrections make of it.
    """
    fields = METHODS["lora"] | STEADY | {"data": "a", "max_steps": 1, "lr": 1e-3, "weight_decay": 0.0, "lora_dropout": 0.0}
    fields |= {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}

    def trained(steps: int, **more: float) -> dict[str, torch.Tensor]:
        return dict(run(tmp_path / f"{steps}{len(more)}", {"v": fields | more | {"max_steps": steps}}).adapters["v"].params)

    plain, plus, later = trained(1), trained(1, loraplus_lr_ratio=16.0), trained(2, loraplus_lr_ratio=16.0)
    moved = 0
    for key, tensor in plain.items():
        if "q_proj.lora_B" in key:
            moved += 1
            assert tensor.abs().max() == pytest.approx(1e-3, rel=1e-3)
            torch.testing.assert_close(plus[key], 16.0 * tensor, rtol=1e-4, atol=1e-9)
        else:
            assert torch.equal(plus[key], tensor), key
        if "q_proj.lora_A" in key:
            moved += 1
            rate = 1e-3 * (0.1 / (1 - 0.9**2)) / (0.001 / (1 - 0.999**2)) ** 0.5
            assert (later[key] - tensor).abs().max() == pytest.approx(rate, rel=1e-2)
    assert moved == 4


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"method": "ia3", "loraplus_lr_ratio": 4}, "variants.v.loraplus_lr_ratio = 4.0: LoRA+ needs method lora, this is ia3"),
        ({"patience": 2, "data": "b"}, "variants.v.patience: data.b has no valid rows"),
        ({"valid_metric": "label_accuracy"}, "valid_metric = 'label_accuracy': data.a has no labels"),
        ({"valid_metric": "accuracy"}, "variants.v.valid_metric"),
        ({"valid_metric": "bleu"}, "pip install 'trimtab[eval]'"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: dict[str, Any], words: str
) -> None:
    content = with_valid(tmp_path, {"v": {"data": "a", "method": "lora"} | variant})
    del content["data"]["b"]["valid"]
    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(content, root=tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize("labels", [["a"], ["a", "a "], ["a", ""], "automatic"])
def test_labels_are_distinct(tmp_path: Path, labels: Any) -> None:
    content = with_valid(tmp_path, {"v": {"data": "a", "method": "lora"}})
    content["data"]["a"]["labels"] = labels
    with pytest.raises(ConfigError, match=r"data\.a\.labels"):
        RunConfig.from_dict(content, root=tmp_path)


def test_a_variant_cannot_be_called_base(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stands for the base"):
        RunConfig.from_dict(with_valid(tmp_path, {"base": {"data": "a", "method": "lora"}}), root=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"valid_metric": "valid_json"}, "has answers that are not JSON"),
        ({"labels": ["x", "y"]}, "data.a.valid: no row's answer is one of the labels 'x', 'y'"),
        ({"text": True, "valid_metric": "exact_match"}, "holds plain text"),
    ],
)
def test_what_cannot_be_judged_is_said_before_training(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    labels, text = change.pop("labels", None), change.pop("text", False)
    content = with_valid(tmp_path, {"v": {"data": "a", "method": "lora"} | change})
    content["data"]["a"]["labels"] = labels
    if text:
        (tmp_path / "a-valid.jsonl").write_text('{"text": "words"}\n')
    with pytest.raises(DataError) as caught:
        train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_listener_hears_validations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = with_valid(tmp_path, {"v": EARLY["ia3"] | STEADY | {"max_steps": 12}})
    train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base(), listener=Lines())
    said = capsys.readouterr().err
    assert "v step 1: valid loss" in said and "(base " in said and "token_f1" in said and "finished early: step" in said
