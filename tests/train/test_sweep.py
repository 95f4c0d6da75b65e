"""Sweeps: what a file expands to, who is halved, what a resumed one repeats, how trials are grouped and ranked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.train.common import METHODS, run_file, tiny_base, write_rows
from trimtab.errors import ConfigError
from trimtab.store import Adapter
from trimtab.train import RunConfig, evaluate, train
from trimtab.train.comparison import compare
from trimtab.train.groups import plan_groups
from trimtab.train.halving import Halving, end_worst
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.leaderboard import rank, table_of
from trimtab.train.listen import Silent
from trimtab.train.sweep import SweepReport, sweep
from trimtab.train.trials import Sweep
from trimtab.train.variant import Progress, Variant

TEMPLATE = {"data": "a", "method": "lora", "r": 4, "lora_dropout": 0.2, "target_modules": "all-linear", "schedule": "constant"}
FOUR = {"variant": TEMPLATE, "search": {"lr": [1.0e-2, 1.0e-8, 3.0e-3, 1.0e-7]}, "halving": {"keep": 0.5, "every": 2}}
"""At rung 2 the two that hardly move must go, at rung 4 the worse of the other two."""


def content(folder: Path, options: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    """A sweep file's content: a run file whose data set a has 4 valid rows."""
    found = run_file(folder, {}, **keys)
    del found["variants"]
    found["defaults"] = {"max_steps": 6, "batch_size": 3, "max_length": 128} | keys.get("defaults", {})
    found["data"]["a"]["valid"] = write_rows(folder / "a-valid.jsonl", 4, "a").name
    return found | {"sweep": dict(options)}


def expand(folder: Path, options: Mapping[str, Any], **keys: Any) -> Sweep:
    return Sweep.from_dict(content(folder, options, **keys), root=folder)


def run(folder: Path, options: Mapping[str, Any], **keys: Any) -> SweepReport:
    return sweep(expand(folder, options, **keys), base=tiny_base())


def grid(**search: Any) -> dict[str, Any]:
    return {"variant": TEMPLATE, "search": search}


def drawn(trials: int, **search: Any) -> dict[str, Any]:
    return {"variant": TEMPLATE, "search": search, "kind": "random", "trials": trials, "seed": 1}


# ---- what a file expands to ----


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    found = expand(tmp_path, grid(lr=[1e-3, 3e-2], r=[2, 4]))
    assert [t.name for t in found.trials] == ["lr0.001-r2", "lr0.001-r4", "lr0.03-r2", "lr0.03-r4"]
    assert found.trials[1].values == {"lr": 1e-3, "r": 4}
    assert [(v.name, v.lr, v.method.to_dict()["r"]) for v in found.run.variants] == [
        (t.name, t.values["lr"], t.values["r"]) for t in found.trials
    ]
    assert all(v.options.valid_metric == "loss" and v.method.to_dict()["lora_dropout"] == 0.2 for v in found.run.variants)


def test_names_are_short_valid_and_distinct(tmp_path: Path) -> None:
    fields = {"target_modules": [["q_proj", "V_proj"], "all-linear"], "gradient_accumulation_steps": [1, 2], "use_rslora": [False, True]}
    names = [t.name for t in expand(tmp_path, grid(**fields)).trials]
    assert names[:2] == ["target_modulesq_proj-v_proj-gas1-use_rslorafalse", "target_modulesq_proj-v_proj-gas1-use_rsloratrue"]
    close = expand(tmp_path / "close", grid(lr=[1.0e-3, 1.00000001e-3]))
    assert [t.name for t in close.trials] == ["lr0.001", "lr0.001-2"]


def test_a_random_search_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    search = {"lr": {"min": 1e-4, "max": 1e-2, "log": True}, "r": {"min": 2, "max": 9}, "lora_dropout": {"min": 0, "max": 1}}
    first, again = (expand(tmp_path / str(i), drawn(12, **search)).trials for i in range(2))
    assert first == again and len({t.name for t in first}) == 12
    assert expand(tmp_path / "few", drawn(5, **search)).trials == first[:5]
    assert expand(tmp_path / "other", drawn(12, **search) | {"seed": 2}).trials != first
    rates, ranks, dropouts = ([t.values[k] for t in first] for k in search)
    assert all(1e-4 <= x <= 1e-2 and float(f"{x:.3g}") == x for x in rates)
    assert sum(x < 1e-3 for x in rates) > 2, "half of a logarithmic range is below its middle"
    assert all(isinstance(r, int) and 2 <= r <= 9 for r in ranks)
    assert any(0 < d < 1 for d in dropouts), "a field of fractions takes fractions, though its ends are whole"


def test_trials_that_would_train_the_same_are_tried_once(tmp_path: Path) -> None:
    preset = expand(tmp_path / "preset", grid(lr=[1e-3, None, 1]))  # None: the preset, which is 1e-3
    assert ([t.name for t in preset.trials], preset.left_out) == (["lr0.001", "lr1"], 1)
    few = expand(tmp_path / "few", drawn(9, r=[2, 4]))
    assert sorted(t.name for t in few.trials) == ["r2", "r4"]


def test_methods_take_the_fields_that_they_have(tmp_path: Path) -> None:
    template = {"data": "a", "r": 4, "num_virtual_tokens": 3, "lr": 1e-2}
    found = expand(tmp_path, {"variant": template, "search": {"method": ["lora", "ia3", "prefix"], "lora_dropout": [0.0, 0.1]}})
    assert [t.name for t in found.trials] == ["lora-lora_dropout0", "lora-lora_dropout0.1", "ia3", "prefix"]
    assert found.trials[3].fields == {"data": "a", "num_virtual_tokens": 3, "lr": 1e-2, "method": "prefix", "valid_metric": "loss"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"search": {"lrr": [1]}}, "sweep.search.lrr: unknown key (did you mean 'lr'?)"),
    ({"search": {"num_virtual_tokens": [1]}}, "sweep.search.num_virtual_tokens: unknown key"),
    ({"variant": TEMPLATE | {"rank": 4}}, "sweep.variant.rank: unknown key"),
    ({"variant": {"data": "a"}}, "'method' is missing, and it is not searched"),
    ({"variant": TEMPLATE | {"method": "lorra"}}, "there is no method 'lorra' (did you mean 'lora'?)"),
    ({"search": {"method": ["ia"]}}, "there is no method 'ia' (did you mean 'ia3'?)"),
    ({"search": {"method": {"min": 1, "max": 2}}, "kind": "random", "trials": 2}, "expected a list of methods"),
    ({"variant": TEMPLATE | {"data": "c"}}, "sweep.variant.data = 'c'"),
    ({"variant": TEMPLATE | {"data": "b"}}, "data.b has no valid rows, by which trials are ranked"),
    ({"search": {"data": ["a", "b"]}}, "sweep.search.data: cannot be searched"),
    ({"search": {"max_length": [64, 128]}}, "sweep.search.max_length: cannot be searched: it decides which rows are held out"),
    ({"search": {"last_turn_only": [True, False]}}, "sweep.search.last_turn_only: cannot be searched"),
    ({"search": {"valid_metric": ["loss"]}}, "name it in sweep.metric"),
    ({"variant": TEMPLATE | {"valid_metric": "loss"}}, "sweep.variant.valid_metric: trials are compared by one metric"),
    ({"variant": TEMPLATE | {"eval_every": 3}, "halving": {"every": 2}}, "sweep.variant.eval_every: with halving"),
    ({"search": {}}, "sweep.search"),
    ({"search": {"lr": 1e-3}}, "sweep.search.lr: expected a list of values, found 0.001"),
    ({"search": {"lr": []}}, "expected a list of values"),
    ({"search": {"lr": {"min": 1e-3, "max": 1e-2}}}, "a grid needs a list"),
    ({"search": {"lr": {"min": 1e-2, "max": 1e-3}}, "kind": "random", "trials": 2}, "min below max, found 0.01 and 0.001"),
    ({"search": {"lr": {"min": 1e-2}}, "kind": "random", "trials": 2}, "min and max must be numbers"),
    ({"search": {"lr": {"min": 0, "max": 1, "log": True}}, "kind": "random", "trials": 2}, "log needs a min above 0, found 0"),
    ({"search": {"lr": {"min": 1, "max": 2, "log": "yes"}}, "kind": "random", "trials": 2}, "log = 'yes': true or false"),
    ({"search": {"lr": {"min": 1, "max": 2, "lgo": True}}, "kind": "random", "trials": 2}, "lgo: unknown key (did you mean 'log'?)"),
    ({"kind": "random"}, "sweep.trials is missing"),
    ({"trials": 4}, "sweep.trials: a grid tries all combinations"),
    ({"seed": 4}, "sweep.seed: a grid draws nothing"),
    ({"kind": "bayes"}, "sweep.kind"),
    ({"search": {"lr": [i / 1000 for i in range(1, 40)], "r": list(range(1, 40))}}, "1,521 combinations, a sweep takes 512"),
    ({"metric": "acuracy"}, "sweep.metric"),
    ({"metric": "label_accuracy"}, "every trial: valid_metric = 'label_accuracy': data.a has no labels"),
    ({"halving": {"keep": 1.0, "every": 2}}, "sweep.halving.keep"),
    ({"halving": {"keep": 0.5}}, "sweep.halving.every"),
    ({"memory_gb": 0}, "sweep.memory_gb"),
    ({"halvign": {"every": 2}}, "sweep.halvign: unknown key (did you mean 'halving'?)"),
    ({"search": {"lr": [1e-3, -1.0, 11.0]}}, "trial lr-1: lr: Input should be greater than 0"),
    ({"search": {"r": [2, 0]}}, "trial r0: r = 0: a rank is at least 1"),
    ({"search": {"r": ["two"]}}, "every trial: r = 'two'"),
    ({"variant": TEMPLATE | {"loraplus_lr_ratio": 4}, "search": {"method": ["lora", "ia3"]}}, "trial ia3: loraplus_lr_ratio = 4.0"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[w for _, w in REFUSED])
def test_what_cannot_be_swept_is_said(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(tmp_path, grid(lr=[1e-3, 1e-2]) | options)
    assert words in str(caught.value)


def test_what_is_no_sweep_file_is_said(tmp_path: Path) -> None:
    good = content(tmp_path, grid(lr=[1e-3]))
    for bad, words in (
        ([], "has no `sweep`"),
        ({k: v for k, v in good.items() if k != "sweep"}, "trained with `trimtab train`"),
        (good | {"variants": {"x": TEMPLATE}}, "has `variants` beside `sweep`"),
        (good | {"sweep": 3}, "expected a mapping with variant and search"),
        (good | {"defaults": {"valid_metric": "loss"}}, "defaults.valid_metric"),
        (good | {"defaluts": {}}, "defaluts: unknown key (did you mean 'defaults'?)"),
    ):
        with pytest.raises(ConfigError) as caught:
            Sweep.from_dict(bad, root=tmp_path)
        assert words in str(caught.value)
    for text, words in (("sweep: {", "is not YAML"), ("sweep: {a: 1, a: 2}", "stands twice")):
        (tmp_path / "sweep.yaml").write_text(text)
        with pytest.raises(ConfigError, match=words):
            Sweep.load(tmp_path / "sweep.yaml")
    with pytest.raises(ConfigError, match="there is no sweep file"):
        Sweep.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("options", "keys", "words"),
    [
        (grid(r=[4, 64, 48, 99]), {}, ["trial r64: LoRA cannot attach", "rank 64 is above its smaller side", "trial r48", "trial r99"]),
        (grid(target_modules=["all-linear", ["q_prj"]]), {}, ["trial target_modulesq_prj: ", "q_prj"]),
        (grid(lr=[1e-3]) | {"halving": {"every": 6}}, {}, ["sweep.halving.every = 6: no trial has more than 6 steps"]),
        (grid(r=[2, 24]) | {"memory_gb": 0.0015}, {"max_tokens": 128}, ["memory_gb = 0.0015", "trial r24 needs", "GB alone"]),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], keys: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, options, **keys)
    assert all(w in str(caught.value) for w in words), caught.value
    assert "trial r4:" not in str(caught.value) and "trial r2 " not in str(caught.value)
    assert not (tmp_path / "out").exists()


# ---- halving ----


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> SweepReport:
    return run(tmp_path_factory.mktemp("four"), FOUR)


def summary(report: SweepReport, group: int = 1) -> dict[str, Any]:
    return json.loads((report.out / f"group-{group}" / "summary.json").read_text(encoding="utf-8"))


def history(report: SweepReport, name: str, group: int = 1) -> dict[int, float]:
    return {x["step"]: x["loss"] for x in summary(report, group)["variants"][name]["valid"]["history"]}


def test_at_every_rung_the_worst_are_stopped(four: SweepReport) -> None:
    steps = {t["trial"]: t["steps"] for t in four.leaderboard["trials"]}
    assert steps["lr1e-08"] == steps["lr1e-07"] == 2, "the planted trials hardly move, and lose at once"
    assert sorted(steps[n] for n in ("lr0.01", "lr0.003")) == [4, 6]
    at = {n: history(four, n) for n in steps}
    assert max(at[n][2] for n in ("lr0.01", "lr0.003")) < min(at[n][2] for n in ("lr1e-08", "lr1e-07"))
    first, second = (t["trial"] for t in four.leaderboard["trials"][:2])
    assert at[first][4] < at[second][4] and steps[first] == 6
    why = {t["trial"]: t["why"] for t in four.leaderboard["trials"]}
    assert why[first] is None and why[second] == f"halved at step 4: loss {at[second][4]:.6g}, rank 2 of 2"
    assert {why[n].rpartition(", ")[2] for n in ("lr1e-08", "lr1e-07")} == {"rank 3 of 4", "rank 4 of 4"}


def test_the_log_says_who_was_halved(four: SweepReport) -> None:
    lines = [json.loads(x) for x in (four.out / "group-1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    said = [(x["variant"], x["step"]) for x in lines if "halved" in x.get("finished_early", "")]
    assert sorted(said) == sorted((t["trial"], t["steps"]) for t in four.leaderboard["trials"] if t["state"] == "halved")


def test_a_rung_is_one_mixed_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    original = evaluate.mean_losses
    monkeypatch.setattr(evaluate, "mean_losses", lambda *a: passes.append(len(a[2])) or original(*a))
    run(tmp_path, FOUR)
    assert [n for n in passes if n] == [4 + 1, 2, 1, 2]  # the base with the first; then the winner and the base on the test rows


@pytest.mark.parametrize("name", ["lr0.01", "lr0.003", "lr1e-07"])
def test_a_trial_is_what_it_would_be_alone(four: SweepReport, tmp_path: Path, name: str) -> None:
    """Law 6, up to the step at which it was halved."""
    (trial,) = (t for t in four.leaderboard["trials"] if t["trial"] == name)
    what = expand(tmp_path, FOUR)
    (variant,) = (v for v in what.run.variants if v.name == name)
    variant = variant.model_copy(update={"options": variant.options.model_copy(update={"max_steps": trial["steps"]})})
    alone = train(what.run.model_copy(update={"variants": [variant]}), base=tiny_base())
    entry = alone.summary["variants"][name]
    assert (entry["steps"], entry["saved_step"]) == (trial["steps"], trial["step"])
    assert [x["loss"] for x in entry["valid"]["history"]] == pytest.approx(list(history(four, name).values()), rel=1e-4)
    together = Adapter.load(four.out / trial["adapter"], alone.base).params
    for key, tensor in alone.adapters[name].params.items():
        torch.testing.assert_close(together[key], tensor, rtol=1e-3, atol=1e-5)


class _Fake:
    """As much of a variant as `end_worst` sees."""

    def __init__(self, name: str, value: float | None, step: int = 4, metric: str = "loss", live: bool = True, loss: float | None = 1.0):
        options = type("O", (), {"valid_metric": metric})
        self.name, self.live, self.config = name, live, type("C", (), {"options": options})
        self.progress = Progress(step=step, valid=[{"step": step, "loss": loss, metric: value}])


@pytest.mark.parametrize(
    ("keep", "values", "metric", "ended"),
    [
        (0.5, {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, "loss", "ad"),
        (0.5, {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, "exact_match", "cb"),
        (0.5, {"a": 1.0, "b": 1.0, "c": 1.0}, "loss", "bc"),  # half of three is one; of equals the first goes on
        (0.29, {f"{i:02}": float(i) for i in range(100)}, "loss", "".join(f"{i:02}" for i in range(29, 100))),
        (0.1, {"a": 1.0}, "loss", ""),
        (0.7, {"a": 1.0, "b": None, "c": 9.0}, "loss", "b"),
        (0.7, {"a": 1.0, "b": None, "c": 0.0}, "exact_match", "b"),
    ],
)
def test_who_ends_at_a_rung(keep: float, values: dict[str, float | None], metric: str, ended: str) -> None:
    variants: Any = [_Fake(n, v, metric=metric) for n, v in values.items()]
    found = end_worst(Halving(keep=keep, every=2), variants)
    assert "".join(v.name for v in found) == ended
    assert [v.name for v in variants if v.progress.finished_early] == sorted(v.name for v in found)


def test_of_equals_at_a_rung_the_one_with_the_lower_loss_goes_on() -> None:
    variants: Any = [_Fake(n, 0.0, metric="exact_match", loss=x) for n, x in {"a": 3.0, "b": 1.0, "c": None, "d": 2.0}.items()]
    assert [v.name for v in end_worst(Halving(keep=0.5, every=2), variants)] == ["a", "c"]


def test_only_live_variants_at_a_rung_are_compared() -> None:
    other: Any = [_Fake("a", 1.0, step=3), _Fake("b", 2.0, step=3)]
    assert end_worst(Halving(keep=0.5, every=2), other) == []
    mixed: Any = [_Fake("a", 1.0, live=False), _Fake("b", 3.0), _Fake("c", 2.0)]
    assert [v.name for v in end_worst(Halving(keep=0.5, every=2), mixed)] == ["b"]
    assert mixed[1].progress.finished_early == "halved at step 4: loss 3, rank 2 of 2"


def test_a_rung_judges_where_variants_stand_not_where_they_once_were() -> None:
    once, now = _Fake("once", 3.0), _Fake("now", 2.0)
    once.progress.valid.insert(0, {"step": 2, "loss": 1.0})
    variants: Any = [once, now]
    assert [v.name for v in end_worst(Halving(keep=0.5, every=2), variants)] == ["once"]


# ---- the leaderboard ----


def entry(value: float | None, steps: int = 6, early: str | None = None, stopped: str | None = None) -> tuple[str, dict[str, Any]]:
    valid = {"finished_early": early, "history": [{"step": steps, "loss": value, "exact_match": value}], "base": {"loss": 9.0}}
    fields = {"method": "lora", "saved_step": steps, "steps": steps, "seconds": 1.0, "trainable": 10, "stopped": stopped}
    return "group-1", fields | {"valid": valid}


@pytest.mark.parametrize(
    ("metric", "expected"), [("loss", ["a", "c", "b", "f", "e", "d"]), ("exact_match", ["b", "c", "a", "f", "d", "e"])]
)
def test_trials_are_ranked_by_how_far_they_came_then_by_their_figure(tmp_path: Path, metric: str, expected: list[str]) -> None:
    what = expand(tmp_path, grid(r=[1, 2, 3, 4, 5, 6]) | {"metric": metric})
    early = {"b": "step 6: valid loss has not improved in 2 validations"}  # patience is no halving
    halved = {"d": (0.9, 2), "e": (0.8, 2), "f": (1.5, 4)}
    found = {"a": entry(0.5), "b": entry(1.0, early=early["b"]), "c": entry(0.7)}
    found |= {n: entry(x, s, early=f"halved at step {s}: …") for n, (x, s) in halved.items()}
    names = dict(zip((t.name for t in what.trials), "abcdef", strict=True))
    board = rank(what, {long: found[short] for long, short in names.items()})
    assert [names[t["trial"]] for t in board["trials"]] == expected
    assert [t["rank"] for t in board["trials"]] == [1, 2, 3, 4, 5, 6] and names[board["best"]["trial"]] == expected[0]


def test_a_trial_is_ranked_by_the_tensors_that_are_saved(tmp_path: Path) -> None:
    what = expand(tmp_path, grid(r=[1, 2]))
    folder, kept = entry(2.0)
    kept = kept | {"saved_step": 4, "valid": kept["valid"] | {"history": [{"step": 4, "loss": 0.5}, {"step": 6, "loss": 2.0}]}}
    board = rank(what, {"r1": entry(1.0), "r2": (folder, kept)})
    assert [(t["trial"], t["valid"], t["step"], t["steps"]) for t in board["trials"]] == [("r2", 0.5, 4, 6), ("r1", 1.0, 6, 6)]
    assert board["base_valid"] == 9.0


def test_nobody_is_the_best_where_nobody_finished(tmp_path: Path) -> None:
    what = expand(tmp_path, grid(r=[1, 2]))
    board = rank(what, {"r1": entry(0.1, stopped="step 3: nan"), "r2": entry(None)})
    assert [(t["trial"], t["state"]) for t in board["trials"]] == [("r2", "finished"), ("r1", "diverged")]
    assert board["best"] is None


def test_a_trial_that_diverges_is_last_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Variant.step

    def poisoned(self: Variant, loss: float, *rest: Any) -> dict[str, float]:
        return original(self, math.nan if self.name == "lr0.01" and self.progress.step == 3 else loss, *rest)

    monkeypatch.setattr(Variant, "step", poisoned)
    board = run(tmp_path, FOUR).leaderboard
    assert [(t["trial"], t["state"], t["steps"]) for t in board["trials"]][::3] == [("lr0.003", "finished", 6), ("lr0.01", "diverged", 3)]
    assert "the loss is nan" in board["trials"][3]["why"] and board["best"]["trial"] == "lr0.003"


def test_a_trial_that_cannot_be_saved_is_last_and_names_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found at the end alone, when it is better than all others by the valid rows."""
    original = Variant.trained
    best = "lr0.003"

    def broken(self: Variant) -> dict[str, torch.Tensor]:
        return {k: t * math.nan if self.name == best else t for k, t in original(self).items()}

    monkeypatch.setattr(Variant, "trained", broken)
    report = run(tmp_path, {"variant": TEMPLATE, "search": {"lr": [3.0e-3, 1.0e-8]}})
    *others, last = report.leaderboard["trials"]
    assert (last["trial"], last["state"], last["step"], last["adapter"], last["valid"]) == (best, "diverged", None, None, None)
    assert "cannot be saved" in last["why"] and report.leaderboard["best"]["trial"] == others[0]["trial"]
    assert all((report.out / t["adapter"] / "adapter_model.safetensors").is_file() for t in others)
    text = "\n".join(["|".join(row) for row in table_of(report.leaderboard).rows])
    assert f"{best}|" in text and "None" not in text
    assert best in (report.out / "report.html").read_text(encoding="utf-8")
    folder = report.out / others[0]["adapter"].partition("/adapters/")[0]
    rows = {v["variant"]: v for v in compare([report.out / folder.name]).variants}
    assert "cannot be saved" in rows[best]["stopped"] and rows[best]["adapter_mb"] is None
    assert rows[others[0]["trial"]]["stopped"] is None and rows[others[0]["trial"]]["adapter_mb"] > 0


def test_the_winner_alone_is_scored_on_test_rows_and_its_run_file_makes_it_again(four: SweepReport, tmp_path: Path) -> None:
    board = four.leaderboard
    best = board["best"]
    assert all(v["scores"] == {} for v in summary(four)["variants"].values()) and summary(four)["base_scores"] == {}
    assert list(best["test"]) == ["base", best["trial"]]
    assert sorted(p.name for p in (four.out / "predictions").iterdir()) == ["a-base.jsonl", f"a-{best['trial']}.jsonl"]
    content(tmp_path, FOUR)  # its rows
    alone = train(RunConfig.from_dict(yaml.safe_load(best["run_file"]), root=tmp_path), base=tiny_base())
    assert alone.out.name == f"out-{best['trial']}"
    found = alone.summary["variants"][best["trial"]]
    assert found["valid"]["best"] == pytest.approx(best["valid"], rel=1e-4)
    for who, scores in ((best["trial"], found["scores"]), ("base", alone.summary["base_scores"]["a"])):
        assert {k: v for k, v in scores.items() if k in best["test"][who]} == pytest.approx(best["test"][who], rel=1e-3)
    assert (four.out / "report.html").stat().st_size > 10_000


def test_a_sweep_over_methods_with_full_fine_tuning_and_a_score(tmp_path: Path) -> None:
    """The winner may be a model folder; without test rows there is nothing to score."""
    template = {"data": "a", "eval_every": 3, "max_steps": 3, "lr": 1e-2}
    board = run(tmp_path, {"variant": template, "search": {"method": ["full", "ia3"]}, "metric": "token_f1"}).leaderboard
    assert {t["method"] for t in board["trials"]} == {"full", "ia3"} and board["metric"] == "token_f1"
    losing = {"variant": template | {"lr": 1e-3}, "search": {"method": ["full"]}}
    full = run(tmp_path / "full", losing).leaderboard
    assert full["best"]["test"]["full"]["loss"] < full["best"]["test"]["base"]["loss"]
    without = content(tmp_path / "without", grid(r=[2]))
    del without["data"]["a"]["test"]
    assert sweep(Sweep.from_dict(without, root=tmp_path / "without"), base=tiny_base()).leaderboard["best"]["test"] is None


# ---- groups and resume ----


def test_groups_fit_the_memory_and_are_even(tmp_path: Path) -> None:
    run_config, base = expand(tmp_path, grid(lr=[i / 100 for i in range(1, 8)]), max_tokens=128).run, tiny_base()
    (one,) = plan_groups(run_config, base, 64, None)
    assert len(one.trials) == 7
    alone = plan_groups(run_config.model_copy(update={"variants": run_config.variants[:1]}), base, 64, None)[0].estimated_bytes
    own = (one.estimated_bytes - alone) / 6
    trainable = sum(t.numel() for t in Adapter.create(base, run_config.variants[0].method, seed=0).params.values())
    assert own == trainable * (4 + 4 + 4 + 8 + 4)  # fp32 base: weights, packed, gradients, moments, best
    groups = plan_groups(run_config, base, 64, (alone + 5.5 * own) / 1e9)  # six would fit: 4 + 3 is fairer than 6 + 1
    assert [len(g.trials) for g in groups] == [4, 3] and [g.folder for g in groups] == ["group-1", "group-2"]
    assert [n for g in groups for n in g.trials] == one.trials
    assert all(g.estimated_bytes <= alone + 5.5 * own for g in groups)
    assert [len(g.trials) for g in plan_groups(run_config, base, 64, (alone + own / 2) / 1e9)] == [1] * 7


def two_groups(folder: Path) -> Sweep:
    """FOUR, two trials at a time."""
    what = expand(folder, FOUR, max_tokens=128, checkpoint_every=1)
    both = plan_groups(what.run.model_copy(update={"variants": what.run.variants[:2]}), tiny_base(), 40, None)[0].estimated_bytes
    return expand(folder, FOUR | {"memory_gb": both * 1.01 / 1e9}, max_tokens=128, checkpoint_every=1)


class _Ask(Silent):
    """Asks a sweep to end after so many steps of its trials."""

    def __init__(self, stop: Stop, steps: int):
        self.stop, self.left = stop, steps

    def step(self, line: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.stop.ask(15)


def timeless(board: Any) -> Any:
    """Without what a clock or an allocator says."""
    drop = {"seconds", "tokens_per_s", "peak_memory_gb"}
    if isinstance(board, dict):
        return {k: timeless(v) for k, v in board.items() if k not in drop}
    return [timeless(x) for x in board] if isinstance(board, list) else board


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> SweepReport:
    return sweep(two_groups(tmp_path_factory.mktemp("grouped")), base=tiny_base())


def test_each_group_is_a_run_and_is_halved_by_itself(grouped: SweepReport) -> None:
    board = grouped.leaderboard
    assert [g["trials"] for g in board["groups"]] == [["lr0.01", "lr1e-08"], ["lr0.003", "lr1e-07"]]
    assert [(t["steps"], t["state"]) for t in board["trials"]] == [(6, "finished")] * 2 + [(2, "halved")] * 2
    assert any("among those of their group" in n for n in board["notes"])
    assert all((grouped.out / t["adapter"] / "adapter_model.safetensors").exists() for t in board["trials"])


@pytest.mark.parametrize("steps", [4, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7, 15))])
def test_a_resumed_sweep_ends_as_the_uninterrupted(grouped: SweepReport, tmp_path: Path, steps: int) -> None:
    """Interrupted before and after a rung of either group: 8 steps are the first group's."""
    what, stop = two_groups(tmp_path), Stop()
    with pytest.raises(Interrupted):
        sweep(what, base=tiny_base(), listener=_Ask(stop, steps), stop=stop)
    assert not (what.run.out / "leaderboard.json").exists()
    done = what.run.out / "group-1" / "summary.json"
    assert done.exists() == (steps > 8)
    before = done.stat().st_mtime_ns if done.exists() else None
    resumed = sweep(what, base=tiny_base(), resume=True)
    assert timeless(resumed.leaderboard) == timeless(grouped.leaderboard)
    assert before in (None, done.stat().st_mtime_ns), "a finished group was trained again"
    for t in resumed.leaderboard["trials"]:
        ours, theirs = (Path(r.out, t["adapter"], "adapter_model.safetensors").read_bytes() for r in (resumed, grouped))
        assert ours == theirs


def test_a_finished_sweep_is_returned_as_it_is(grouped: SweepReport, monkeypatch: pytest.MonkeyPatch) -> None:
    what = two_groups(grouped.out.parent)
    monkeypatch.setattr("trimtab.train.spread.train", None)
    assert sweep(what, base=tiny_base(), resume=True).leaderboard == json.loads(json.dumps(grouped.leaderboard))
    rows = grouped.out.parent / "a-valid.jsonl"
    before = rows.read_bytes()
    rows.write_bytes(before.replace(b"a 1", b"a 2"))
    with pytest.raises(ConfigError, match=r"is finished, and its base or its data have changed since\n  - data\.a\.valid: was"):
        sweep(what, base=tiny_base(), resume=True)
    rows.write_bytes(before)
    with pytest.raises(ConfigError, match=r"is not empty: a sweep never overwrites anything\nfix: .*--resume"):
        sweep(what, base=tiny_base())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"halving": {"keep": 0.4, "every": 2}}, "sweep.halving: was {'keep': 0.5, 'every': 2}, is {'keep': 0.4"),
        ({"variant": TEMPLATE | {"r": 2}}, "variants.lr0.01.r: was 4, is 2"),
        ({"metric": "token_f1"}, "sweep.metric: was 'loss', is 'token_f1'"),
        ({"memory_gb": 1.0}, "sweep.memory_gb"),
    ],
)
def test_another_sweep_does_not_go_on_in_its_folder(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    what, stop = two_groups(tmp_path), Stop()
    with pytest.raises(Interrupted):
        sweep(what, base=tiny_base(), listener=_Ask(stop, 3), stop=stop)
    options = FOUR | {"memory_gb": what.options.memory_gb} | change
    with pytest.raises(ConfigError) as caught:
        sweep(expand(tmp_path, options, max_tokens=128, checkpoint_every=1), base=tiny_base(), resume=True)
    assert words in str(caught.value)


def test_changed_rows_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    what, stop = two_groups(tmp_path), Stop()
    with pytest.raises(Interrupted):
        sweep(what, base=tiny_base(), listener=_Ask(stop, 10), stop=stop)  # the first group is done
    write_rows(tmp_path / "a-test.jsonl", 5, "a")
    with pytest.raises(ConfigError, match=r"data have changed since this sweep began\n.*data\.a\.test"):
        sweep(what, base=tiny_base(), resume=True)
    (tmp_path / "other" / "out").mkdir(parents=True)
    (tmp_path / "other" / "out" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        sweep(expand(tmp_path / "other", FOUR), base=tiny_base(), resume=True)


def test_what_makes_trials_hard_to_compare_is_noted(tmp_path: Path) -> None:
    options = {"variant": TEMPLATE | METHODS["ia3"], "search": {"lr": [1e-2, None]}, "halving": {"every": 1}}
    options["variant"] = {"data": "a", "method": "ia3"}
    noted = {"variant": options["variant"], "search": {"batch_size": [2, 5], "lr": [5e-3, None]}, "halving": {"every": 1}}
    notes = run(tmp_path, noted, defaults={"max_steps": None, "epochs": 1, "batch_size": 3}).leaderboard["notes"]
    for words in ("3 to 6 steps", "different numbers of rows", "2 combinations mean the same"):
        assert any(words in n for n in notes), notes
    few = drawn(9, lr=[1e-3, 1e-2]) | {"variant": options["variant"]}
    (note,) = run(tmp_path / "few", few).leaderboard["notes"]
    assert "no more than 2 distinct trials, fewer than trials = 9" in note
    apart = {"variant": options["variant"] | {"objective": "distil"}, "search": {"distil_beta": [0.0, 1.0]}}
    (note,) = run(tmp_path / "apart", apart, defaults={"max_steps": 1}).leaderboard["notes"]
    assert "losses of different objectives do not compare" in note
