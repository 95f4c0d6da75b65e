"""`trimtab doctor` runs a forward and a step on tiny random bases, and says where they fail: faults are planted, the doctor finds them."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from trimtab import tryout
from trimtab.bases import Check, doctor
from trimtab.cli import main
from trimtab.errors import BaseError
from trimtab.forward import attention, rowwise

pytestmark = pytest.mark.usefixtures("compared_anew")


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the doctor went to the network"))


def found() -> dict[str, Check]:
    return {c.name: c for c in tryout.try_out()}


def test_forward_and_training_are_tried_and_told(own_cache: Path) -> None:
    ran = CliRunner().invoke(main, ["doctor", "--json"])
    checks = {c["name"]: c for c in json.loads(ran.stdout)}
    assert checks["forward"]["ok"] and "llama and gpt2" in checks["forward"]["value"], checks
    assert checks["training"]["ok"] and "lora" in checks["training"]["value"], checks
    assert not (own_cache / "bases").exists()


def test_a_library_that_asks_for_more_fails_both_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(arguments: object) -> None:
        raise BaseError("this model's attention asks for sinks='x', which trimtab's attention does not compute")

    monkeypatch.setattr(rowwise, "refuse_changes", refuse)
    ran = CliRunner().invoke(main, ["doctor"])
    assert ran.exit_code == 1
    said = " ".join(ran.output.split())
    assert said.count("sinks='x'") == 2 and "do not fit together" in said


@pytest.mark.parametrize(
    ("where", "words"),
    [(rowwise, "llama in float32 is off by"), (attention, "trimtab does not compute this llama base as transformers does")],
)
def test_wrong_results_are_found_on_either_way(monkeypatch: pytest.MonkeyPatch, where: object, words: str) -> None:
    attend = attention.attend
    monkeypatch.setattr(where, "attend", lambda q, k, v, plan, layer, scaling, *rest: attend(q, k, v, plan, layer, 1.5 * scaling, *rest))
    monkeypatch.setattr(rowwise, "_agrees", lambda module: True)
    check = found()["forward"]
    assert not check.ok and words in check.value


def test_a_step_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    check = found()["training"]
    assert not check.ok and "lora: the step has changed nothing" in check.value and "prefix: the step" in check.value


def test_a_wrong_loss_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tryout.run_step
    monkeypatch.setattr(
        tryout, "run_step", lambda *args, **kwargs: {v: replace(f, loss=2 * f.loss) for v, f in run(*args, **kwargs).items()}
    )
    check = found()["training"]
    assert not check.ok and "lora: a loss of" in check.value and "prompt" not in check.value


@pytest.mark.parametrize(("version", "ok"), [("4.57.6", False), ("5.24.0", True), ("5.99.0", False), ("6.0.0", False)])
def test_versions_are_judged_by_the_package_s_own_bounds(monkeypatch: pytest.MonkeyPatch, version: str, ok: bool) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch>=2.6", "transformers<5.25,>=5.0", 'peft>=0.21; extra == "dev"'])
    monkeypatch.setattr(doctor.metadata, "version", lambda name: version)
    check = next(c for c in doctor.examine() if c.name == "transformers")
    assert check.ok is ok
    assert ("tested with <5.25,>=5.0" in check.value, check.advice) == (not ok, "" if ok else "pip install 'transformers<5.25,>=5.0'")
