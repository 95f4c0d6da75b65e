"""The run file: what it takes, and what it says of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.common import run_file
from trimtab.errors import ConfigError
from trimtab.methods import LoraConfig
from trimtab.train import RunConfig

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
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    message = refused(tmp_path, run_file(tmp_path, ONE) | change)
    for word in words:
        assert word in message


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
        ("\ud800".encode("utf-8", "surrogatepass"), "cannot read"),
    ],
)
def test_unreadable_run_files(tmp_path: Path, text: str | bytes, word: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=word):
        RunConfig.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        RunConfig.load(tmp_path / "absent.yaml")
