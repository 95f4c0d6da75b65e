"""Orders to a run in progress. What stops is as if it had been shorter; what pauses or is cloned, as if it had never met the others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.common import METHODS, metrics, run_file, tiny_base
from trimtab.errors import ConfigError
from trimtab.store import Adapter
from trimtab.train import Report, RunConfig, ordering, train
from trimtab.train.apart import run_file_of
from trimtab.train.clone import described
from trimtab.train.control import CONTROL, Clone, Orders, change_orders
from trimtab.train.halving import Halving
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent
from trimtab.train.resume import settings

LORA = METHODS["lora"] | {"data": "a", "seed": 3, "max_steps": 6}
IA3 = METHODS["ia3"] | {"data": "b", "seed": 4, "max_steps": 6}
PLAIN = {"schedule": "constant", "warmup_steps": 0}
"""Under which fewer steps are the first ones of more."""


class Hand(Silent):
    """Gives orders at steps of variants, and when it is told that all are paused. said: warnings and notes."""

    def __init__(self, out: Path, at: Mapping[tuple[str, int], Callable[[Orders], Orders]], waiting: Callable[[], None] = lambda: None):
        self.out, self.at, self.waiting, self.said = out, dict(at), waiting, list[str]()

    def step(self, line: Mapping[str, Any]) -> None:
        if (order := self.at.pop((line["variant"], line["step"]), None)) is not None:
            change_orders(self.out, order)

    def note(self, text: str) -> None:
        self.said.append(text)
        if text.startswith("all variants are paused"):
            self.waiting()

    def stopped(self, variant: str, reason: str) -> None:
        self.said.append(f"{variant} {reason}")

    def warning(self, text: str) -> None:
        self.said.append(text)


def tell(*names: str, to: str | None) -> Callable[[Orders], Orders]:
    return lambda orders: orders.with_order(names, to)  # type: ignore[arg-type]


def cloned(name: str, of: str, **changes: Any) -> Callable[[Orders], Orders]:
    return lambda o: Orders(o.end, o.variants, {**o.clones, name: Clone(of, changes)})


def config(folder: Path, variants: dict[str, dict[str, Any]], valid: bool = False, **keys: Any) -> RunConfig:
    content = run_file(folder, variants, **keys)
    if valid:
        for name in "ab":
            content["data"][name]["valid"] = f"{name}-test.jsonl"
    return RunConfig.from_dict(content, root=folder)


def trained(run: RunConfig, hand: Hand | None = None, **how: Any) -> Report:
    return train(run, base=tiny_base(), listener=hand, **how)


def same(one: Adapter, other: Adapter, rtol: float = 0.0, atol: float = 0.0) -> None:
    """With the defaults, bit for bit."""
    assert one.params.keys() == other.params.keys()
    for key, tensor in one.params.items():
        torch.testing.assert_close(tensor, other.params[key], rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


def as_alone(one: Adapter, other: Adapter) -> None:
    """As near as law 6 has it of a variant among others and alone: forwards of other rows round otherwise."""
    same(one, other, rtol=1e-3, atol=1e-5)


def test_a_paused_variant_goes_on_as_if_it_had_not_been(tmp_path: Path):
    """Among others, and for longer than they train."""
    free = trained(config(tmp_path / "free", {"lora": LORA, "ia3": IA3}))
    run = config(tmp_path / "paused", {"lora": LORA, "ia3": IA3})
    hand = Hand(run.out, {("lora", 2): tell("lora", to="pause"), ("ia3", 5): tell("lora", to=None)})
    paused = trained(run, hand)
    assert hand.said == ["lora is paused after step 2", "lora goes on after step 2"]
    order = [json.loads(line)["variant"] for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert order == ["lora", "ia3"] * 2 + ["ia3"] * 3 + ["lora", "ia3"] + ["lora"] * 3
    for name in ("lora", "ia3"):
        as_alone(paused.adapters[name], free.adapters[name])
        assert [x["lr"] for x in metrics(paused)[name]] == [x["lr"] for x in metrics(free)[name]]


def test_alone_it_is_equal_to_the_bit(tmp_path: Path):
    free = trained(config(tmp_path / "free", {"lora": LORA}))
    run = config(tmp_path / "paused", {"lora": LORA})
    told = list[bool]()

    def go_on() -> None:
        told.append(json.loads((run.out / "run.json").read_text())["control"]["waits"])
        change_orders(run.out, tell("lora", to=None))

    hand = Hand(run.out, {("lora", 3): tell("lora", to="pause")}, go_on)
    same(trained(run, hand).adapters["lora"], free.adapters["lora"])
    assert len(hand.said) == 3 and hand.said[1].endswith(f"`trimtab runs resume {run.out}`")
    assert not (run.out / "checkpoints" / "step-00000000").exists()
    assert [*told, json.loads((run.out / "run.json").read_text())["control"]["waits"]] == [True, False]


def test_a_stopped_variant_is_as_one_that_was_to_make_fewer_steps(tmp_path: Path):
    short = trained(config(tmp_path / "short", {"lora": LORA | PLAIN | {"max_steps": 4}, "ia3": IA3}))
    run = config(tmp_path / "run", {"lora": LORA | PLAIN, "ia3": IA3})
    report = trained(run, hand := Hand(run.out, {("lora", 4): tell("lora", to="stop")}))
    assert hand.said == ["lora by hand at step 4"]
    same(report.adapters["lora"], short.adapters["lora"])
    as_alone(report.adapters["ia3"], short.adapters["ia3"])
    entry = report.summary["variants"]["lora"]
    assert entry["finished_early"] == "stopped by hand at step 4" and entry["stopped"] is None
    assert (entry["steps"], entry["saved_step"]) == (4, 4) and entry["scores"]["loss"] > 0
    assert report.summary["variants"]["ia3"]["steps"] == 6 and report.summary["variants"]["ia3"]["finished_early"] is None
    assert json.loads((run.out / "run.json").read_text())["control"]["ended"] == {"lora": "stopped by hand at step 4"}


def test_a_stopped_variant_is_validated_and_keeps_its_best_step(tmp_path: Path):
    """A rate that ruins it after the first validations: what is saved is what a run to the best step ends with."""
    ruin = LORA | PLAIN | {"lr": 0.5, "eval_every": 2, "lora_dropout": 0.0}
    run = config(tmp_path / "run", {"lora": ruin}, valid=True)
    report = trained(run, Hand(run.out, {("lora", 5): tell("lora", to="stop")}))
    entry = report.summary["variants"]["lora"]
    history = entry["valid"]["history"]
    assert [x["step"] for x in history] == [2, 4, 5], "where it stopped it was validated too"
    best = min(history, key=lambda x: x["loss"])["step"]
    assert entry["saved_step"] == best < 5 and entry["valid"]["finished_early"] == "stopped by hand at step 5"
    short = trained(config(tmp_path / "short", {"lora": ruin | {"max_steps": best, "keep_best": False}}, valid=True))
    same(report.adapters["lora"], short.adapters["lora"])


def test_stopped_before_its_first_step_it_is_saved_as_it_began(tmp_path: Path):
    run = config(tmp_path, {"lora": LORA, "ia3": IA3})
    run.out.mkdir()
    (run.out / "adapters").mkdir()
    change_orders(run.out, tell("ia3", to="stop"))
    report = trained(run, resume=True)
    assert report.summary["variants"]["ia3"]["finished_early"] == "stopped by hand at step 0"
    fresh = Adapter.create(tiny_base(), run.variants[1].method, seed=4)
    for key, tensor in fresh.params.items():
        torch.testing.assert_close(report.adapters["ia3"].params[key], tensor.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"lr": 2e-3, "seed": 9}, {"method": "ia3", "lr": 1e-2, "max_steps": 4}, {"r": 8, "data": "b"}])
def test_a_clone_is_as_a_run_of_its_own(tmp_path: Path, changes: dict[str, Any]):
    variants = {"lora": LORA, "ia3": IA3}
    run = config(tmp_path / "run", variants)
    report = trained(run, hand := Hand(run.out, {("lora", 3): cloned("v2", "lora", **changes)}))
    assert hand.said == []
    own = {k: v for k, v in LORA.items() if changes.get("method", "lora") == "lora" or k in ("data", "seed", "max_steps")} | changes
    solo = trained(config(tmp_path / "solo", {"v2": own}))
    as_alone(report.adapters["v2"], solo.adapters["v2"])
    for key in ("loss", "grad_norm", "lr"):
        torch.testing.assert_close([x[key] for x in metrics(report)["v2"]], [x[key] for x in metrics(solo)["v2"]], rtol=1e-4, atol=1e-6)
    told = report.summary["variants"]
    assert told["v2"]["steps"] == own["max_steps"] and told["v2"]["scores"]["loss"] == pytest.approx(
        solo.summary["variants"]["v2"]["scores"]["loss"], rel=1e-4
    )
    assert report.summary["clones"] == {"v2": {"of": "lora", "set": changes}}
    undisturbed = trained(config(tmp_path / "two", variants))
    as_alone(report.adapters["lora"], undisturbed.adapters["lora"])


def test_a_clone_begins_from_its_own_seed(tmp_path: Path):
    """From the one that is set for it, else from that of the variant, not of the run: as an adapter begins that no run has made."""
    run = config(tmp_path, {"lora": LORA, "ia3": IA3}, seed=1)
    orders = Orders(variants={"own": "stop", "same": "stop"}, clones={"own": Clone("lora", {"seed": 9}), "same": Clone("lora")})
    report = trained(run, Hand(run.out, {("lora", 2): lambda o: orders}))
    for name, seed in (("own", 9), ("same", 3)):
        assert report.summary["variants"][name]["finished_early"] == "stopped by hand at step 0"
        same(report.adapters[name], Adapter.create(tiny_base(), run.variants[0].method, seed=seed))


WRONG = {
    "lora": ({}, "is a variant of this run already"),
    "base": ({}, "stands for the base"),
    "../v": ({}, "is not a name"),
    "a": ({"lrr": 1}, "unknown key"),
    "b": ({"lr": "much"}, "lr: Input should be a valid number"),
    "c": ({"max_length": 64}, "were read for other values of max_length"),
    "d": ({"objective": "dpo"}, "were read for other values of max_length, last_turn_only or objective"),
    "e": ({"objective": "distil", "teacher": "base"}, "which this run has not computed"),
    "f": ({"data": "b"}, "was not read, since no variant uses it"),
    "g": ({"data": "nothing"}, "one of a, b"),
    "h": ({"target_modules": ["nothing"]}, "nothing"),
    "i": ({"patience": 2}, "has no valid rows"),
    "k": ({"epochs": float("inf"), "max_steps": None}, "finite number"),
    "n": ({"neftune_noise_alpha": float("inf")}, "finite number"),
    "o": ({"weight_decay": float("inf")}, "finite number"),
    "l": ({"eval_every": float("inf")}, "a whole number of steps"),
    "m": ({"warmup_steps": float("inf")}, "a whole number of steps"),
}


def test_a_clone_that_cannot_be_is_refused_and_nothing_ends(tmp_path: Path):
    run = config(tmp_path, {"lora": LORA})
    clones = {name: Clone("lora", changes) for name, (changes, _) in WRONG.items()} | {"j": Clone("lara")}
    hand = Hand(run.out, {("lora", 2): lambda o: Orders(clones=clones), ("lora", 4): tell("nobody", to="pause")})
    report = trained(run, hand)
    assert [*report.adapters] == ["lora"] and report.summary["variants"]["lora"]["steps"] == 6
    refused = json.loads((run.out / "run.json").read_text())["control"]["refused"]
    assert refused.keys() == clones.keys()
    for name, (_, words) in WRONG.items():
        assert words in refused[name], name
    assert "did you mean 'lora'" in refused["j"]
    assert len(hand.said) == len(clones) + 1, "each once, though the file has changed since"
    assert hand.said[-1] == "control.json names no variants of this run: nobody"


@pytest.mark.parametrize("error", [KeyError("odd"), RuntimeError("odd"), OverflowError("odd")])
def test_a_clone_that_fails_in_whatever_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    run = config(tmp_path, {"lora": LORA})

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("trimtab.train.steering.refuse_uninvoked", fails)
    hand = Hand(run.out, {("lora", 2): cloned("c", "lora", lr=1e-3)})
    assert trained(run, hand).summary["variants"]["lora"]["steps"] == 6
    assert f"{type(error).__name__}: {error}" in hand.said[0] and len(hand.said) == 1


def test_much_that_is_wrong_is_told_in_short(tmp_path: Path):
    """And what is no more in the file is forgotten."""
    run = config(tmp_path, {"lora": LORA})
    clones = {f"c{i}": Clone("x" * 2_000, {"lr": i}) for i in range(300)} | {"n" * 5000: Clone("lora")}
    variants: dict[str, Any] = {f"v{i}": "stop" for i in range(5000)}
    sizes = list[int]()

    def last(orders: Orders) -> Orders:
        sizes.append((run.out / "run.json").stat().st_size)
        return Orders(clones={"c1": Clone("nobody")})

    hand = Hand(run.out, {("lora", 2): lambda o: Orders(variants=variants, clones=clones), ("lora", 4): last})
    trained(run, hand)
    assert max(map(len, hand.said)) < 3000 and len(hand.said) < 80
    assert any("of which the first 64 count" in s for s in hand.said) and any("… and 4990 more" in s for s in hand.said)
    assert sizes[0] < 150_000
    assert json.loads((run.out / "run.json").read_text())["control"]["refused"].keys() == {"c1"}


def test_a_run_takes_so_many_clones():
    """Those that were refused make room."""
    full = Orders(clones={f"c{i}": Clone("a") for i in range(64)})
    with pytest.raises(ConfigError, match="64 clones; at most 64"):
        full.with_clone("new", Clone("a"))
    assert len(full.with_clone("c3", Clone("a")).clones) == 64
    assert [*full.with_clone("new", Clone("a"), {f"c{i}" for i in range(60)}).clones] == ["c60", "c61", "c62", "c63", "new"]


@pytest.mark.parametrize(
    ("of", "changes", "own"),
    [
        ("lora", {"max_length": 64, "lr": 2e-3}, LORA | {"max_length": 64, "lr": 2e-3}),
        ("lora", {"data": "c", "target_modules": ["q_proj"]}, LORA | {"data": "c", "target_modules": ["q_proj"]}),
        ("lora", {"method": "ia3", "lr": None}, {"method": "ia3", "data": "a", "seed": 3, "max_steps": 6}),
        ("pairs", {"beta": 0.3}, {"method": "lora", "data": "pairs", "objective": "dpo", "beta": 0.3, "r": 2, "patience": 2}),
    ],
)
def test_a_clone_that_cannot_join_is_a_run_file(tmp_path: Path, of: str, changes: dict[str, Any], own: dict[str, Any]):
    """The file, read, is the run that one would write by hand."""
    content = run_file(
        tmp_path, {"lora": LORA, "pairs": {"method": "lora", "r": 2, "data": "pairs", "objective": "dpo", "patience": 2}}, max_tokens=777
    )
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "pairs.jsonl").write_text((json.dumps(row) + "\n") * 6)
    content["data"] |= {"c": {"train": [{"path": "b.jsonl", "weight": 2}, "a.jsonl"]}, "pairs": {"train": "pairs.jsonl", "split": 2}}
    run = RunConfig.from_dict(content, root=tmp_path)
    run.out.mkdir()
    plan = {"base": run.base, "root": str(tmp_path), "steps": {}, "variants": {v.name: described(v) for v in run.variants}}
    (run.out / "run.json").write_text(json.dumps(plan | {"settings": settings(run)}))
    (run.out / "metrics.jsonl").write_text("")
    file = tmp_path / "own.yaml"
    file.write_text(run_file_of(run.out, of, "v2", changes, file))
    hand = content | {"out": "out-v2", "variants": {"v2": own}, "data": {own["data"]: content["data"][own["data"]]}}
    expected, found = settings(RunConfig.from_dict(hand, root=tmp_path)), RunConfig.load(file)
    assert settings(found) == expected and found.out == tmp_path / "out-v2"
    with pytest.raises(ConfigError, match="start at"):
        run_file_of(run.out, of, "v2", changes, tmp_path / "elsewhere" / "own.yaml")


def interrupted(run: RunConfig, hand: Hand, **how: Any) -> None:
    with pytest.raises(Interrupted):
        trained(run, hand, **how)


class Cut(Hand):
    """Ends the run after a step, as Ctrl-C does, or as a kill: nothing is saved."""

    def __init__(self, out: Path, at: Any, after: tuple[str, int], kill: bool = False):
        super().__init__(out, at)
        self.after, self.kill, self.stop = after, kill, Stop()

    def step(self, line: Mapping[str, Any]) -> None:
        super().step(line)
        if (line["variant"], line["step"]) == self.after:
            if self.kill:
                raise KeyboardInterrupt
            self.stop.ask(2)


@pytest.mark.parametrize("kill", [False, True])
def test_orders_outlive_the_process(tmp_path: Path, kill: bool):
    """Stopped stays stopped at the same step, paused stays paused, and a clone goes on."""
    variants = {"lora": LORA | PLAIN, "ia3": IA3, "dora": METHODS["dora"] | {"data": "b", "max_steps": 6}}
    orders = {("lora", 2): tell("lora", to="stop"), ("ia3", 3): tell("ia3", to="pause"), ("dora", 3): cloned("v2", "ia3", seed=8)}
    whole = config(tmp_path / "whole", variants, checkpoint_every=4)
    free = Hand(whole.out, orders | {("v2", 5): tell("ia3", to=None)})
    expected = trained(whole, free)
    run = config(tmp_path / "cut", variants, checkpoint_every=4)
    hand = Cut(run.out, orders, ("v2", 2), kill)
    with pytest.raises(KeyboardInterrupt if kill else Interrupted):
        trained(run, hand, stop=hand.stop)
    again = Hand(run.out, {("v2", 5): tell("ia3", to=None)})
    report = trained(run, again, resume=True)
    assert again.said[0] == "ia3 is paused after step 3" and len(again.said) == 2
    assert report.summary["variants"]["lora"]["finished_early"] == "stopped by hand at step 2"
    for name in expected.adapters:
        same(report.adapters[name], expected.adapters[name])
    finished = trained(run, resume=True)
    assert finished.adapters.keys() == expected.adapters.keys(), "one that has finished knows its clones too"


def test_a_kill_does_not_change_the_step_at_which_a_variant_was_stopped(tmp_path: Path):
    run = config(tmp_path, {"lora": LORA, "ia3": IA3})
    hand = Cut(run.out, {("lora", 3): tell("lora", to="stop")}, ("ia3", 5), kill=True)
    with pytest.raises(KeyboardInterrupt):
        trained(run, hand)
    assert trained(run, resume=True).summary["variants"]["lora"]["finished_early"] == "stopped by hand at step 3"


def test_the_run_is_ended_as_by_ctrl_c(tmp_path: Path):
    free = trained(config(tmp_path / "free", {"lora": LORA}))
    run = config(tmp_path / "run", {"lora": LORA}, checkpoint_every=None)
    hand = Hand(run.out, {("lora", 3): lambda o: Orders(end=True)})
    with pytest.raises(Interrupted) as raised:
        trained(run, hand)
    assert raised.value.exit_code == 130 and [p.name for p in (run.out / "checkpoints").iterdir()] == ["step-00000003"]
    same(trained(run, resume=True).adapters["lora"], free.adapters["lora"])
    assert json.loads((run.out / CONTROL).read_text())["end"] is False


def test_ended_while_all_are_paused(tmp_path: Path):
    run = config(tmp_path, {"lora": LORA})
    run.out.mkdir()
    change_orders(run.out, tell("lora", to="pause"))
    stop = Stop()
    interrupted(run, Hand(run.out, {}, lambda: stop.ask(15)), stop=stop, resume=True)
    again = Hand(run.out, {}, lambda: (change_orders(run.out, tell("lora", to=None)), None)[1])
    assert trained(run, again, resume=True).summary["variants"]["lora"]["steps"] == 6


def test_trials_that_are_halved_stay_in_step(tmp_path: Path):
    """A variant may be stopped, but none paused or cloned: they would be compared at other steps."""
    run = config(tmp_path, {"lora": LORA, "ia3": IA3}, valid=True)

    class Asks(Hand):
        def step(self, line: Mapping[str, Any]) -> None:
            super().step(line)
            if (line["variant"], line["step"]) == ("lora", 1):
                for ask in (lambda: ordering.order(self.out, ["lora"], "pause"), lambda: ordering.clone(self.out, "lora", "v2", {})):
                    with pytest.raises(ConfigError, match="are compared at the same step"):
                        ask()
                ordering.order(self.out, ["ia3"], "stop")

    orders = {("lora", 2): tell("lora", to="pause"), ("lora", 4): cloned("v2", "lora")}
    report = trained(run, hand := Asks(run.out, orders), halving=Halving(every=6))
    assert {n: v["steps"] for n, v in report.summary["variants"].items()} == {"lora": 6, "ia3": 1}
    assert sum("are compared at the same step" in text for text in hand.said) == 3, "each time that the file is read"


BROKEN = {
    "no JSON": (b'{"format": 1, "variants": {"lora": "st', "is not JSON"),
    "another format": (b'{"format": 7}', "format 1"),
    "a list": (b"[]", "format 1"),
    "too long": (b'{"format": 1, "x": "' + b"x" * (1 << 20) + b'"}', "has more than"),
    "nested": (b'{"format": 1, "variants": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not JSON"),
    "bytes": (b"\xff\xfe\x00", "is not JSON"),
    "wrong orders": (b'{"format": 1, "end": "yes", "variants": {"lora": "kill"}, "clones": {"c": 3}}', "neither 'stop' nor 'pause'"),
    "wrong kinds": (b'{"format": 1, "variants": 3, "clones": [1]}', "expected a mapping"),
}


@pytest.mark.parametrize("name", [*BROKEN])
def test_a_broken_file_ends_nothing_and_is_named(tmp_path: Path, name: str):
    data, words = BROKEN[name]
    run = config(tmp_path, {"lora": LORA, "ia3": IA3 | {"max_steps": 8}})

    class Breaks(Hand):
        def step(self, line: Mapping[str, Any]) -> None:
            super().step(line)
            if (line["variant"], line["step"]) == ("ia3", 4):
                (self.out / CONTROL).write_bytes(data)
            if (line["variant"], line["step"]) == ("ia3", 7):
                (self.out / CONTROL).unlink()

    hand = Breaks(run.out, {("lora", 2): tell("lora", to="pause")})
    report = trained(run, hand)
    assert {n: v["steps"] for n, v in report.summary["variants"].items()} == {"lora": 6, "ia3": 8}
    assert any(words in text and "control.json" in text for text in hand.said)
    order = [json.loads(line)["variant"] for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    stays = not name.startswith("wrong")  # a file that can be read counts, but for what is wrong in it
    assert order[4:9] == (["ia3"] * 5 if stays else ["ia3", "ia3", "lora", "ia3", "lora"])


def test_neither_a_pipe_nor_a_folder_holds_the_run_up(tmp_path: Path):
    run = config(tmp_path, {"lora": LORA})
    run.out.mkdir()
    os.mkfifo(run.out / CONTROL)
    report = trained(run, hand := Hand(run.out, {}), resume=True)
    assert report.summary["variants"]["lora"]["steps"] == 6
    assert any("is not a regular file" in text for text in hand.said)
