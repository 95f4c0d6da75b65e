"""The run file: what it takes, and what it says of mistakes."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.train.common import run_file
from trimtab.bases.locate import locate, refuse_hopeless
from trimtab.bases.shapes import read_architecture
from trimtab.data import Source
from trimtab.data.source_rows import peek_source
from trimtab.errors import BaseError, ConfigError, DataError
from trimtab.methods import LoraConfig
from trimtab.train import RunConfig
from trimtab.train.beginning import Beginner
from trimtab.train.changes import with_changes
from trimtab.train.clone import changes_of
from trimtab.train.options import TrainOptions
from trimtab.train.resume import refuse_no_folder
from trimtab.train.runfile import read_yaml

ONE = {"v": {"data": "a", "method": "lora", "r": 4}}


def refused(folder: Path, content: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(content, root=folder)
    return str(caught.value)


def test_a_variant_takes_defaults_and_its_own(tmp_path: Path) -> None:
    run = RunConfig.from_dict(run_file(tmp_path, {"v": {"data": "a", "method": "lora", "r": 4, "batch_size": 5}}), root=tmp_path)
    (variant,) = run.variants
    assert variant.method == LoraConfig(r=4)
    assert (variant.options.batch_size, variant.options.weight_decay, variant.lr) == (5, 0.1, 1e-3)
    assert run.out == tmp_path / "out"


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    run_file(tmp_path, ONE)
    path = tmp_path / "run.yaml"
    path.write_text("base: b\nout: o\ndata: {a: {train: a.jsonl}}\nvariants: {v: {data: a, method: ia3, lr: 5e-3}}\n")
    assert RunConfig.load(path).variants[0].lr == 5e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sweep": {}}, ["is a sweep file", "trimtab sweep"]),
        ({"variant": {}}, ["variant: unknown key (did you mean 'variants'?)"]),
        ({"defaults": {"epoch": 2}}, ["defaults.epoch: unknown key (did you mean 'epochs'?)"]),
        ({"variants": {"v": {"data": "a", "method": "lroa"}}}, ["variants.v.method = 'lroa' (did you mean 'lora'?)"]),
        ({"variants": {"v": {"data": "aa", "method": "lora"}}}, ["variants.v.data = 'aa' (did you mean 'a'?)"]),
        (
            {"variants": {"v": {"data": "a", "method": "lora", "rr": 3, "r": 0}}},
            ["variants.v.rr: unknown key (did you mean 'r'?)", "variants.v.r = 0"],
        ),
        ({"variants": {"v": {"data": "a", "method": "lora", "batch_size": 0}}}, ["variants.v.batch_size", "greater than or equal to 1"]),
        ({"variants": {"Bad Name": {"data": "a", "method": "lora"}}}, ["'Bad Name' is not a name"]),
        ({"variants": {}}, ["variants: expected a mapping with at least one entry"]),
        ({"data": {"a": {"trian": "a.jsonl"}}}, ["data.a.trian: unknown key (did you mean 'train'?)", "data.a: 'train' is missing"]),
        ({"data": {"a": {"train": {"pth": "a.jsonl"}}}}, ["data.a.train"]),
        ({"seed": -1}, ["seed", "greater than or equal to 0"]),
        ({"out": "hf://me/run"}, ["out = 'hf://me/run' is no folder of a file system"]),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    message = refused(tmp_path, run_file(tmp_path, ONE) | change)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lr": 9.0, "weight_decay": 1e38}, "weight_decay"),
        ({"lr": 0.5, "weight_decay": 4.1}, "weight_decay"),
        ({"lr": 0.1, "loraplus_lr_ratio": 10, "weight_decay": 2.1}, "weight_decay"),
        ({"lr": 0.5, "loraplus_lr_ratio": 20}, "loraplus_lr_ratio"),
        ({"loraplus_lr_ratio": math.inf}, "loraplus_lr_ratio"),
        ({"lr": 0.5, "weight_decay": 4.0}, None),
        ({"lr": 0.5, "loraplus_lr_ratio": 19}, None),
    ],
)
def test_rates_at_which_tensors_only_grow(tmp_path: Path, change: dict[str, Any], key: str | None) -> None:
    """Decoupled decay leaves 1 − lr · decay of a tensor each step: below −1 it grows."""
    content = run_file(tmp_path, {"v": {"data": "a", "method": "lora", **change}})
    if key is None:
        RunConfig.from_dict(content, root=tmp_path)
    else:
        assert f"variants.v.{key}" in refused(tmp_path, content)


HOPELESS = ["~nouser/x", "n" * 5000, "a/" * 3000, "o\0", "o\ud800"]
"""Paths that no machine has: without a home folder, too long a name, too long a path, characters that no name has."""


@pytest.mark.parametrize("path", HOPELESS)
def test_paths_that_cannot_be_are_mistakes_with_their_keys(tmp_path: Path, path: str) -> None:
    data = {"a": {"train": path}}
    message = refused(tmp_path, run_file(tmp_path, ONE) | {"out": path, "data": data, "sede": 1})
    assert "sede: unknown key" in message and "out = " in message and "data.a.train: path = " in message
    assert len(message) < 2000
    with pytest.raises(DataError, match="path = "):
        peek_source(Source(path), tmp_path)


@pytest.mark.parametrize("path", HOPELESS)
def test_a_base_that_cannot_be(tmp_path: Path, path: str) -> None:
    for look in (refuse_hopeless, read_architecture, lambda name: locate(name, lambda text: None)):
        with pytest.raises(BaseError, match="base = "):
            look(path)
    with pytest.raises(ConfigError, match="out = "):
        refuse_no_folder(Path(path))


SWITCHED = ("max_steps", "epochs", "batch_size", "lr", "max_length", "seed", "r", "lora_alpha", "lora_dropout")


def test_true_is_no_number(tmp_path: Path) -> None:
    """All at once; a switch is still one."""
    variant = {"data": "a", "method": "lora", "use_rslora": True, "rank_pattern": {"q_proj": True}}
    what = run_file(tmp_path, {"v": variant | dict.fromkeys(SWITCHED, True)}) | {"seed": False, "evaluate": {"max_rows": True}}
    message = refused(tmp_path, what)
    for key in (*(f"variants.v.{k}" for k in SWITCHED), "variants.v.rank_pattern", "seed", "evaluate.max_rows"):
        assert any(line.startswith(f"  - {key}") and "not true or false" in line for line in message.splitlines()), (key, message)
    assert "use_rslora" not in message


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    message = refused(
        tmp_path, run_file(tmp_path, {"v": {"data": "a", "method": "ia4"}, "w": {"data": "c", "method": "lora"}}) | {"sede": 1}
    )
    assert all(w in message for w in ("'ia4'", "'c'", "sede: unknown key (did you mean 'seed'?)"))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "expected a mapping"),
        ("variants: {v: {}, v: {}}", "'v' stands twice"),
        ("d: &d {r: 4}\nvariants: {v: {<<: *d}}", r"merge keys \(<<\) are not read; options that variants share stand under `defaults`"),
        ("\ud800".encode("utf-8", "surrogatepass"), "is not UTF-8: byte 0xed at 0"),
    ],
)
def test_unreadable_run_files(tmp_path: Path, text: str | bytes, word: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=word):
        RunConfig.load(path)


def test_what_the_kernel_makes_up_is_read_as_empty() -> None:
    """Such a file calls itself regular and empty; /proc/kmsg, say, has no end."""
    with pytest.raises(ConfigError, match="found NoneType"):
        RunConfig.load(Path("/proc/self/status"))


def test_many_keys_are_read_in_time(tmp_path: Path) -> None:
    """A file of some hundred kB: 400 million comparisons if each key is looked for among all."""
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"k{i}: 1\n" for i in range(20_000)))
    begun = time.process_time()
    assert len(read_yaml(path, "run file")) == 20_000
    reading = time.process_time() - begun
    path.write_text("".join(f"- k{i}\n" for i in range(40_000)))  # as many scalars
    begun = time.process_time()
    read_yaml(path, "run file")
    assert reading < 2 * (time.process_time() - begun)


def test_a_run_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(tmp_path / "gone.yaml")
    assert str(caught.value).count("gone.yaml") == 1 and "there is no run file" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("!!bool abc", "'abc' is no bool"),
        ("!!timestamp zz", "'zz' is no timestamp"),
        ("2026-99-99", "is no timestamp"),
        ("!!int x", "'x' is no int"),
        ("!!float [1]", "is no float"),
        ("!!str {a: 1}", "is no str"),
        ("!!map x", "'x' is no map"),
        ("!!set {a}", "the tag"),
        ("!!binary aGk=", "the tag"),
        ("!!python/name:os.system x", "the tag"),
        ("!mine x", "the tag '!mine' is not read"),
        ("0x" + "f" * 9000, "a number of 9,002 characters"),
        ("9" * 9000, "a number of 9,000 characters"),
        ("[" * 9000, "nested too deeply"),
        ("{a: " * 9000, "nested too deeply"),
        ("- " * 9000, "nested too deeply"),
        ('"\\U00110000"', "0x110000"),
        ('"\\UFFFFFFFF"', "too large"),
    ],
)
def test_what_is_no_value_is_an_error_with_its_line(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"base: x\nr: {text}" if not text.startswith("- ") else f"\n{text}")
    with pytest.raises(ConfigError) as e:
        read_yaml(path, "run file")
    assert word in str(e.value) and "line 2" in str(e.value)
    with pytest.raises(ConfigError, match="r="):
        changes_of([f"r={text}"])
    with pytest.raises(ConfigError, match="--set"):
        with_changes({"r": 1}, [f"r={text}"], "run.yaml")


def test_a_step_of_more_rows_than_anybody_has_is_refused() -> None:
    with pytest.raises(ValidationError, match="gradient_accumulation_steps"):
        TrainOptions(gradient_accumulation_steps=10**30)


@pytest.mark.parametrize("part", [math.inf, -math.inf, math.nan, 0, 1.5])
def test_a_part_to_hold_out_that_is_none_is_said(part: float) -> None:
    for data in ({"train": "a.jsonl", "split": part}, {"train": {"path": "a.jsonl", "split": part}}):
        content = {"base": "x", "out": "o", "data": {"d": data}, "variants": {"v": {"data": "d", "method": "lora"}}}
        with pytest.raises(ConfigError, match="not a part of the rows between 0 and 1, nor a number of them"):
            RunConfig.from_dict(content)


@pytest.mark.parametrize("text", ['base: "\\U00110000"', 'base: "\\UFFFFFFFF"', f"%YAML 1.{'1' * 5000}\n--- a"])
def test_what_yaml_cannot_scan_hides_no_run_file(text: str, tmp_path: Path) -> None:
    """The scanner's error is Python's own, and the page looks into each YAML file below its folder."""
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("{base: x, out: o, data: {}, variants: {}}")
    assert Beginner(tmp_path).files() == ["b.yaml"]
    with pytest.raises(ConfigError, match=r"a\.yaml is not YAML"):
        read_yaml(tmp_path / "a.yaml", "run file")
