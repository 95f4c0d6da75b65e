"""Law 6, over whole runs: a variant trained among others follows the trajectory that it follows alone.

Dropout, accumulation, clipping, decay, different lengths of run, data sets and methods, and a token budget that splits and shares forwards.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.train.common import METHODS, metrics, run

VARIANTS = {
    name: fields | {"data": "ab"[i % 2], "seed": 10 + i, "max_steps": 4 + i % 3, "gradient_accumulation_steps": 1 + i % 2}
    for i, (name, fields) in enumerate(METHODS.items())
}


@pytest.mark.parametrize("max_tokens", [pytest.param(64, marks=pytest.mark.slow), 4096])
def test_joint_equals_solo(tmp_path: Path, max_tokens: int) -> None:
    joint = run(tmp_path / "joint", VARIANTS, max_tokens=max_tokens)
    together = metrics(joint)
    for name, fields in VARIANTS.items():
        solo = run(tmp_path / name, {name: fields}, max_tokens=max_tokens)
        alone = metrics(solo)[name]
        assert [e["step"] for e in alone] == [e["step"] for e in together[name]]
        for key in ("loss", "grad_norm", "lr"):
            torch.testing.assert_close(
                [e[key] for e in together[name]],
                [e[key] for e in alone],
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, n=name, k=key: f"{n} {k}: {m}",
            )
        if name in joint.adapters:
            for key, tensor in solo.adapters[name].params.items():
                torch.testing.assert_close(
                    joint.adapters[name].params[key], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
                )


def test_every_variant_moves_and_clips(tmp_path: Path) -> None:
    """The law above would hold of a trainer that does nothing."""
    report = run(tmp_path, {n: f | {"data": "a", "max_steps": 12, "warmup_steps": 0, "weight_decay": 0.0} for n, f in METHODS.items()})
    for name, lines in metrics(report).items():
        assert lines[-1]["loss"] < lines[0]["loss"], name
    assert any(line["grad_norm"] > 0.5 for lines in metrics(report).values() for line in lines), "clipping was never at work"
