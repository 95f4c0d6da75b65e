"""Checkpoints and resume, in one process: exactness, damage, changes, signals, a full disk. Kills are in test_kills."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from tests.tiny import tiny_model, tiny_tokenizer
from tests.train.common import METHODS, locked, run_file, tiny_base, write_rows
from tests.train.kill_harness import differences, results, write_run
from trimtab.cli import main
from trimtab.errors import ConfigError, TrimtabError
from trimtab.model import Base
from trimtab.train import RunConfig, train
from trimtab.train.checkpoint import steps_of
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent
from trimtab.train.report import Mark, Metrics
from trimtab.train.resume import refuse_changes, settings

ONE = {"v": METHODS["lora"] | {"data": "a", "max_steps": 6}}
ALL = {n: f | {"data": "ab"[i % 2], "max_steps": 3 + i % 4, "seed": i} for i, (n, f) in enumerate(METHODS.items())}


class Heard(Silent):
    """Remembers what a run says; asks it to stop after a joint step of the variant that is first in metrics.jsonl."""

    def __init__(self, stop: Stop | None = None, after: int = 0):
        self.warnings: list[str] = []
        self.said: list[str] = []
        self._stop, self._after = stop, after

    def status(self, text: str) -> None:
        self.said.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, line: Mapping[str, Any]) -> None:
        if self._stop is not None and line["step"] == self._after:
            self._stop.ask(signal.SIGTERM)


def config(folder: Path, variants: dict[str, dict[str, Any]], **keys: Any) -> RunConfig:
    return RunConfig.from_dict(run_file(folder, variants, **({"checkpoint_every": 2} | keys)), root=folder)


def interrupt(run: RunConfig, after: int) -> None:
    stop = Stop()
    with pytest.raises(Interrupted) as caught:
        train(run, base=tiny_base(), listener=Heard(stop, after), stop=stop)
    assert caught.value.exit_code == 143


def resume(run: RunConfig, heard: Heard | None = None) -> dict[str, Any]:
    train(run, base=tiny_base(), resume=True, listener=heard)
    return results(run.out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ONE leaves when nothing happens to it."""
    run = config(tmp_path_factory.mktemp("whole"), ONE)
    train(run, base=tiny_base())
    return results(run.out)


@pytest.fixture
def interrupted(tmp_path: Path) -> RunConfig:
    """ONE, stopped after 5 of 6 steps: checkpoints of step 4 and 5."""
    run = config(tmp_path, ONE)
    interrupt(run, after=5)
    assert [p.name for p in steps_of(run.out)] == ["step-00000005", "step-00000004"]
    return run


# ---- exactness ----


def test_every_method_goes_on_bit_exactly_after_any_step(tmp_path: Path) -> None:
    """From a checkpoint that was due or from one that a stop asked for."""
    expected = config(tmp_path / "whole", ALL, checkpoint_every=None)
    train(expected, base=tiny_base())
    for after, every in ((1, None), (2, 1), (3, None), (4, 1), (5, None)):
        run = config(tmp_path / str(after), ALL, checkpoint_every=every)
        interrupt(run, after)
        assert differences(results(expected.out), resume(run)) == "", after


@pytest.mark.slow
def test_validation_goes_on_bit_exactly(tmp_path: Path) -> None:
    """Best tensors, best metric and patience are part of a checkpoint; that both matter in this run is seen first."""
    expected = RunConfig.load(write_run(tmp_path / "whole", short=False))
    variants = train(expected, base=tiny_base()).summary["variants"].values()
    assert any(0 < v["valid"]["best_step"] < v["steps"] for v in variants) and any(v["valid"]["finished_early"] for v in variants)
    for after in (1, 4, 8):  # before the best step; while patience counts; after an early end
        run = RunConfig.load(write_run(tmp_path / str(after), short=False))
        interrupt(run, after)
        assert differences(results(expected.out), resume(run)) == "", after


def test_training_draws_nothing_from_global_generators(tmp_path: Path) -> None:
    """What a checkpoint need not hold: the state of torch's, NumPy's and Python's generators."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        run = config(tmp_path / str(seed), {n: f for n, f in ALL.items() if n != "full"})
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        train(run, base=tiny_base())
        assert torch.equal(before[0], torch.get_rng_state()) and before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
        found.append(results(run.out))
    assert differences(*found) == ""


def test_lines_after_the_checkpoint_and_a_torn_one_are_cut(interrupted: RunConfig, whole: dict[str, Any]) -> None:
    with (interrupted.out / "metrics.jsonl").open("a") as file:
        file.write('{"variant": "v", "step": 6, "loss": 9.0}\n{"variant": "v", "st')
    heard = Heard()
    assert differences(whole, resume(interrupted, heard)) == ""
    assert heard.warnings == []


def test_metrics_that_are_not_what_they_were_are_said(interrupted: RunConfig, whole: dict[str, Any]) -> None:
    metrics = interrupted.out / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-30])
    heard = Heard()
    assert differences(whole, resume(interrupted, heard)) == "metrics"
    assert "may have gaps" in heard.warnings[0]
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4, 6]


def test_only_the_newest_stay(tmp_path: Path) -> None:
    run = config(tmp_path, ONE, checkpoint_every=1, keep_checkpoints=3)
    train(run, base=tiny_base())
    assert sorted(p.name for p in (run.out / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in (4, 5, 6)]
    without = config(tmp_path / "none", ONE, checkpoint_every=None)
    train(without, base=tiny_base())
    assert not (without.out / "checkpoints").exists()


# ---- damage ----


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b"\n")
    else:
        data[{"first": 0, "middle": len(data) // 2, "last": -1}[how]] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "longer", "first", "middle", "last"])
@pytest.mark.parametrize("name", ["v.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_found_out(interrupted: RunConfig, whole: dict[str, Any], name: str, how: str) -> None:
    damage(interrupted.out / "checkpoints" / "step-00000005" / name, how)
    heard = Heard()
    assert differences(whole, resume(interrupted, heard)) == ""
    (warning,) = heard.warnings
    assert "step-00000005 does not verify" in warning and "going on from step-00000004" in warning and name in warning
    kept = [p.name for p in (interrupted.out / "checkpoints").iterdir() if p.name.startswith("damaged-step-00000005")]
    assert len(kept) == 1


def test_every_byte_of_the_manifest_counts(interrupted: RunConfig) -> None:
    from trimtab.train.checkpoint import newest_checkpoint

    manifest = interrupted.out / "checkpoints" / "step-00000005" / "manifest.json"
    data = manifest.read_bytes()
    for i in range(len(data)):
        for flip in (1, 32):
            manifest.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
            found = newest_checkpoint(interrupted.out)
            assert found is not None and found.path.name == "step-00000004", (i, flip)


def test_where_none_verifies_each_is_listed(interrupted: RunConfig) -> None:
    for path in steps_of(interrupted.out):
        damage(path / "v.safetensors", "middle")
    before = sorted(str(p) for p in interrupted.out.rglob("*"))
    with pytest.raises(ConfigError, match=r"no checkpoint in .* verifies") as caught:
        resume(interrupted)
    assert [p[:13] for p in caught.value.problems] == ["step-00000005", "step-00000004"]
    assert all("sha256" in p or "bytes" in p for p in caught.value.problems)
    assert sorted(str(p) for p in interrupted.out.rglob("*")) == before


def test_a_checkpoint_of_another_format_is_not_read(interrupted: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.train.checkpoint.VERSION", 2)
    with pytest.raises(ConfigError, match="of format 1; this version of trimtab reads 2"):
        resume(interrupted)


# ---- changes ----


@pytest.mark.parametrize(
    ("variants", "keys", "problems"),
    [
        ({"v": ONE["v"] | {"lr": 0.5}}, {}, ["variants.v.lr: was 0.01, is 0.5"]),
        ({"v": ONE["v"] | {"max_steps": 60}}, {}, ["variants.v.max_steps: was 6, is 60"]),
        ({"v": ONE["v"] | {"r": 8}}, {"seed": 3}, ["seed: was 0, is 3", "variants.v.r: was 4, is 8"]),
        ({"v": METHODS["prompt"] | {"data": "a"}}, {}, ["variants.v.method: was 'lora', is 'prompt'", "variants.v.r: was 4"]),
        (ONE | {"w": ONE["v"]}, {}, ["order of variants: was ['v'], is ['v', 'w']"]),
        (
            ONE,
            {"max_tokens": 64, "evaluate": {"max_new_tokens": 9}},
            ["max_tokens: was 4096, is 64", "evaluate.max_new_tokens: was 4, is 9"],
        ),
    ],
)
def test_a_changed_run_file_is_refused_key_by_key(
    interrupted: RunConfig, variants: dict[str, dict[str, Any]], keys: dict[str, Any], problems: list[str]
) -> None:
    before = {str(p): p.read_bytes() for p in interrupted.out.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="the run file has changed") as caught:
        resume(config(interrupted.root, variants, **keys))
    assert set(problems) <= set(caught.value.problems)
    if len(variants) == 1 and variants["v"]["method"] == "lora":
        assert len(caught.value.problems) == len(problems)
    assert before == {str(p): p.read_bytes() for p in interrupted.out.rglob("*") if p.is_file()}


def test_what_older_checkpoints_could_not_say_is_its_default() -> None:
    older = {"lr": 1.0}
    refuse_changes(older, {"lr": 1.0, "compile": False}, "changed")
    with pytest.raises(ConfigError, match="changed") as caught:
        refuse_changes(older, {"lr": 1.0, "compile": True}, "changed")
    assert list(caught.value.problems) == ["compile: was False, is True"]


OLDER = """
adam_beta1 adam_beta2 adam_epsilon alpha_pattern batch_size data epochs eval_every exclude_modules gradient_accumulation_steps keep_best
last_turn_only layers_to_transform lora_alpha lora_dropout loraplus_lr_ratio lr max_grad_norm max_length max_steps method modules_to_save
patience r rank_pattern schedule seed target_modules use_dora use_rslora valid_metric warmup_steps weight_decay
"""
"""Settings of a LoRA when run files had no others."""


def test_settings_that_are_as_ever_are_named_as_ever(tmp_path: Path) -> None:
    """A run that was begun before there were aLoRA, starts, experts, optimizers and NEFTune can go on."""
    keys = {k.removeprefix("variants.v.") for k in settings(config(tmp_path, ONE)) if k.startswith("variants.v.")}
    assert keys == set(OLDER.split())


def test_what_a_data_set_may_lose_reaches_its_sources_and_is_no_reason_not_to_go_on(tmp_path: Path) -> None:
    content = run_file(tmp_path, ONE)
    data = {"train": [{"path": "a.jsonl"}, {"path": "a.jsonl", "max_dropped": 0.2}], "test": "a-test.jsonl"}
    runs = [RunConfig.from_dict(content | {"data": {"a": data | more}}, root=tmp_path) for more in ({}, {"max_dropped": 0.3})]
    assert [[s.max_dropped for s in (*run.data["a"].train, *run.data["a"].test)] for run in runs] == [[None, 0.2, None], [0.3, 0.2, 0.3]]
    assert settings(runs[0]) == settings(runs[1])


def test_the_order_of_variants_counts(tmp_path: Path) -> None:
    two = {"v": ONE["v"], "w": ONE["v"]}
    interrupt(config(tmp_path, two), after=1)
    with pytest.raises(ConfigError, match="order of variants"):
        resume(config(tmp_path, {"w": two["w"], "v": two["v"]}))


def test_where_and_how_often_may_change(interrupted: RunConfig, whole: dict[str, Any], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    interrupted.out.rename(moved)
    run = config(interrupted.root, ONE, checkpoint_every=None, keep_checkpoints=1, out=str(moved))
    assert settings(run) == settings(interrupted)
    assert differences(whole, resume(run)) == ""


@pytest.mark.parametrize("split", ["", "-test"])
def test_changed_rows_are_refused_by_name(interrupted: RunConfig, split: str) -> None:
    run = config(interrupted.root, ONE)
    write_rows(interrupted.root / f"a{split}.jsonl", 5, "changed")
    with pytest.raises(ConfigError, match="the base or the data have changed") as caught:
        resume(run)
    assert [p.partition(":")[0] for p in caught.value.problems] == [f"data.a.{'test' if split else 'train'}"]


def test_another_base_is_refused_by_name(interrupted: RunConfig) -> None:
    for base, names in (
        (Base(tiny_model("llama", seed=1), tiny_tokenizer()), ["base"]),
        (Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer()), ["base", "dtype"]),
    ):
        with pytest.raises(ConfigError, match="the base or the data have changed") as caught:
            train(interrupted, base=base, resume=True)
        assert [p.partition(":")[0] for p in caught.value.problems] == names


# ---- what a run starts from ----


def test_a_finished_run_says_so_and_is_returned(interrupted: RunConfig) -> None:
    first = train(interrupted, base=tiny_base(), resume=True)
    before = {str(p): p.read_bytes() for p in interrupted.out.rglob("*") if p.is_file()}
    heard = Heard()
    again = train(interrupted, base=tiny_base(), resume=True, listener=heard)
    assert "is finished" in heard.said[0]
    assert again.summary == first.summary
    assert all(torch.equal(t, again.adapters["v"].params[k]) for k, t in first.adapters["v"].params.items())
    assert before == {str(p): p.read_bytes() for p in interrupted.out.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="is finished, and its run file has changed since"):
        resume(config(interrupted.root, {"v": ONE["v"] | {"max_steps": 60}}))


def test_no_two_settings_share_a_key(tmp_path: Path) -> None:
    """Names hold dots: a change of one of two settings that were written alike would go unseen."""
    lora = {"data": "a", "method": "lora"}

    def told(pattern: int, rank: int) -> dict[str, Any]:
        variants = {"v": lora | {"rank_pattern": {"r": pattern}}, "v.rank_pattern": lora | {"r": rank}}
        return settings(config(tmp_path, variants))

    assert len({json.dumps(told(*x)) for x in ((4, 8), (4, 9), (5, 8))}) == 3


def test_a_finished_run_notices_other_data_and_another_base(tmp_path: Path) -> None:
    run = config(tmp_path, ONE)
    train(run, base=tiny_base())
    before = {str(p): p.read_bytes() for p in run.out.rglob("*") if p.is_file()}
    rows = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(rows.replace("a 3", "a 4"))
    with pytest.raises(ConfigError, match="is finished, and its base or its data have changed since") as caught:
        resume(run)
    assert [p.partition(":")[0] for p in caught.value.problems] == ["data.a.train"] and caught.value.exit_code == 2
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(ConfigError, match="its base or its data") as caught:
        train(run, base=Base(tiny_model("llama", seed=3), tiny_tokenizer(), name="tiny-llama"), resume=True)
    assert [p.partition(":")[0] for p in caught.value.problems] == ["base"]
    # rows that are gone cannot be compared, and what they taught can still be published
    (tmp_path / "a.jsonl").rename(tmp_path / "elsewhere.jsonl")
    heard = Heard()
    train(run, base=tiny_base(), resume=True, listener=heard)
    assert len(heard.warnings) == 1 and "data.a is still what was trained on cannot be told" in heard.warnings[0]
    assert before == {str(p): p.read_bytes() for p in run.out.rglob("*") if p.is_file()}


def test_without_a_checkpoint_a_run_starts_anew(tmp_path: Path, whole: dict[str, Any]) -> None:
    run = config(tmp_path, ONE)
    (run.out / "checkpoints" / ".step-00000002.0123456789ab.new").mkdir(parents=True)
    (run.out / "adapters" / ".v.0123456789ab.new").mkdir(parents=True)
    (run.out / "metrics.jsonl").write_text('{"variant": "v", "step": 1}\n')
    heard = Heard()
    assert differences(whole, resume(run, heard)) == ""
    assert "holds no checkpoint, so the run starts anew" in heard.said[0]


@pytest.mark.parametrize("name", ["thesis.txt", "adapters/v"])
def test_nothing_of_anybody_else_is_overwritten(tmp_path: Path, name: str) -> None:
    run = config(tmp_path, ONE)
    (run.out / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"no checkpoint in .* to resume from, and it holds {name}"):
        resume(run)
    assert not (run.out / "metrics.jsonl").exists()


def test_without_resume_a_run_says_that_it_could(interrupted: RunConfig) -> None:
    with pytest.raises(ConfigError, match="--resume"):
        train(interrupted, base=tiny_base())


def test_two_processes_never_share_a_folder(interrupted: RunConfig) -> None:
    with locked(interrupted.out), pytest.raises(ConfigError, match="another process is training into"):
        resume(interrupted)
    resume(interrupted)


# ---- a full disk ----


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_checkpoint_that_finds_no_room_does_not_end_the_run(tmp_path: Path, whole: dict[str, Any]) -> None:
    """None can be written after the second step's."""
    run, heard, calls = config(tmp_path, ONE), Heard(), []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        target = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if "step-00000004" in target or "step-00000006" in target:
            calls.append(target)
            raise full()
        original(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        train(run, base=tiny_base(), listener=heard)
    assert differences(whole, results(run.out)) == ""
    assert len(heard.warnings) == len(calls) == 2
    assert "no checkpoint after step 4, the run goes on (the newest is step-00000002)" in heard.warnings[0]
    assert "No space left on device" in heard.warnings[0]
    assert [p.name for p in (run.out / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_results_that_find_no_room_say_what_is_saved(tmp_path: Path, name: str) -> None:
    run = config(tmp_path, {"v": METHODS[name] | {"data": "a", "max_steps": 2}})
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if "/adapters" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise full()
        original(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(TrimtabError, match="No space left on device") as caught:
            train(run, base=tiny_base())
    assert "what was trained is safe in" in caught.value.message and "step-00000002" in caught.value.message
    assert "--resume" in caught.value.fix
    assert list((run.out / "adapters").iterdir()) == []
    resume(run)
    assert list((run.out / "adapters" / "v").glob("*.safetensors")) != []


def test_lines_that_find_no_room_are_written_later(tmp_path: Path) -> None:
    class Disk:
        """A raw file with so many bytes of room."""

        def __init__(self, file: Any, room: int):
            self.file, self.room = file, room

        def write(self, data: bytes) -> int:
            if not self.room:
                raise full()
            n = self.file.write(bytes(data[: self.room]))
            self.room -= n
            return n

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    warnings: list[str] = []
    with Metrics(tmp_path / "m.jsonl", warn=warnings.append) as metrics:
        disk = metrics._file = Disk(metrics._file, 15)  # type: ignore[assignment]
        for n in range(4):
            metrics.write({"step": n})
        assert len(warnings) == 1 and "No space left" in warnings[0]
        with pytest.raises(OSError):
            metrics.secure()
        disk.room = 1000
        metrics.write({"step": 4})
        mark = metrics.secure()
    data = (tmp_path / "m.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in data.splitlines()] == [0, 1, 2, 3, 4]
    with Metrics(tmp_path / "m.jsonl", keep=len(data)) as again:
        assert again.position == mark == Mark(len(data), mark.sha256)


# ---- signals ----


@pytest.fixture
def command(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    """A run file of some hundred steps."""
    content = run_file(tmp_path, {"v": METHODS["ia3"] | {"data": "a", "max_steps": 400}}) | {
        "base": str(tiny_llama_folder),
        "dtype": "float32",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_with_a_checkpoint(command: Path, sent: signal.Signals, code: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", "train", str(command)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    metrics = command.parent / "out" / "metrics.jsonl"
    while not metrics.exists() or not metrics.stat().st_size:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert f"go on with: trimtab train {command} --resume" in said
    assert "Traceback" not in said
    (saved,) = steps_of(command.parent / "out")[:1]
    assert f"saved in {saved}" in said
    assert int(saved.name[5:]) == len(metrics.read_text().splitlines())


def test_a_second_signal_ends_it_at_once_and_handlers_are_put_back(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    seen: list[Any] = []
    original = Stop.ask

    def ask(self: Stop, signum: int) -> None:
        seen.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))
        original(self, signum)

    def step(self: Any, line: Mapping[str, Any]) -> None:
        if line["step"] == 3 and not seen:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Stop, "ask", ask)
    monkeypatch.setattr("trimtab.cli.show.Lines.step", step)
    result = CliRunner().invoke(main, ["train", str(command)])
    assert result.exit_code == 130, result.output
    assert seen == [(signal.SIG_DFL, signal.SIG_DFL)]  # the system's own: no Python stands between a second signal and the end
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert [p.name for p in steps_of(command.parent / "out")] == ["step-00000003"]


def test_a_signal_is_no_error_of_the_library_that_it_interrupts(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the base loads: what catches the loader's errors must not take a signal for one, and nothing is left."""
    run, stop = config(tmp_path, ONE, base=str(tiny_llama_folder)), Stop()

    def slow(*_: Any, **__: Any) -> None:
        try:
            stop.ask(signal.SIGTERM)
        except Exception as error:
            raise ValueError("taken for an error of the model") from error

    monkeypatch.setattr("trimtab.train.before.load_base", slow)
    with pytest.raises(Interrupted) as caught:
        train(run, stop=stop)
    assert caught.value.exit_code == 143 and not run.out.exists()


@pytest.mark.slow
def test_a_signal_while_the_base_loads(command: Path) -> None:
    """The loader is held for long inside transformers, in real processes that get real signals. They are forked: one import for both."""
    script = (
        "import os, sys, time, torch, transformers, trimtab.train.loop\n"
        "def slow(*a, **k):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "transformers.AutoModelForCausalLM.from_pretrained = slow\n"
        "from trimtab.cli import main\n"
        "for _ in range(2):\n"
        "    if not (child := os.fork()):\n"
        f"        main(['train', {str(command)!r}])\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for sent, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        os.kill(int(process.stdout.readline()), sent)
        assert int(process.stdout.readline()) == code
    _, said = process.communicate(timeout=60)
    assert "cannot read the model" not in said and "Traceback" not in said and said.count("interrupted") == 2
    assert not (command.parent / "out").exists()


def test_a_signal_outside_of_the_steps_ends_the_run_there(tmp_path: Path, whole: dict[str, Any]) -> None:
    """While scoring: everything trained is in the last checkpoint already."""
    run, stop = config(tmp_path, ONE), Stop()

    class Impatient(Heard):
        def status(self, text: str) -> None:
            if text.startswith("scoring"):
                stop.ask(signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        train(run, base=tiny_base(), listener=Impatient(), stop=stop)
    assert caught.value.exit_code == 130
    assert not (run.out / "summary.json").exists()
    assert differences(whole, resume(run)) == ""
    shutil.rmtree(run.out)
