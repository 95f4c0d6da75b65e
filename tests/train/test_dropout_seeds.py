"""Dropout while training: on in every step, another mask in each step and row, and no part of validation."""

from __future__ import annotations

from pathlib import Path

from tests.train.common import METHODS, metrics, run, run_file, tiny_base
from trimtab.train import RunConfig
from trimtab.train.prepare import prepare

FIELDS = METHODS["lora"] | {"data": "a", "gradient_accumulation_steps": 2, "lora_dropout": 0.5}


def test_every_row_of_every_step_and_seed_has_a_mask_of_its_own(tmp_path: Path) -> None:
    variants = {"u": FIELDS | {"seed": 1}, "v": FIELDS | {"seed": 2}}
    run_ = RunConfig.from_dict(run_file(tmp_path, variants, max_tokens=128), root=tmp_path)
    seeds: list[list[int]] = []
    for _ in range(2):  # the second time is a run that is made again
        seen = []
        for v in prepare(run_, tiny_base()).variants:
            for step in range(4):
                v.progress.step = step
                micro_batches = v.next_batch().micro_batches
                assert len(micro_batches) > 1
                seen += [seed for m in micro_batches for seed in m.seeds]
        seeds.append(seen)
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == len(seeds[0])


def test_dropout_is_on_in_training(tmp_path: Path) -> None:
    """The B matrices are zero at first, so the first loss is the base's; their gradients see what is dropped."""
    found = []
    for p in (0.0, 0.5):
        lines = metrics(run(tmp_path / str(p), {"v": FIELDS | {"lora_dropout": p, "max_steps": 2, "warmup_steps": 0}}))["v"]
        found.append([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line])
    (plain, _), (dropped, _) = found
    assert abs(plain[0] - dropped[0]) < 1e-6 and abs(plain[1] - dropped[1]) > 1e-3 * plain[1]
    assert abs(found[0][1][0] - found[1][1][0]) > 1e-5


def test_a_row_is_dropped_alike_however_a_step_is_cut(tmp_path: Path) -> None:
    """One forward of a whole step, and many small ones: the same losses and gradients."""
    whole, cut = (
        metrics(run(tmp_path / str(n), {"v": FIELDS | {"max_steps": 3, "warmup_steps": 0}}, max_tokens=n))["v"] for n in (4096, 64)
    )
    for a, b in zip(whole, cut, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 * a["loss"] and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 * a["grad_norm"]
