"""The optimizers of a variant: AdamW in 8 bits against bitsandbytes', bytes of states, joint runs, resume, what is refused.

(That each follows its paper is law 11.)
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.backends.cpu import ops as theirs
from safetensors.torch import load_file
from torch import Tensor

from tests.train.common import METHODS, metrics, run, run_file, tiny_base
from tests.train.kill_harness import differences, results
from tests.train.test_checkpoint import config, interrupt, resume
from trimtab.bases.shapes import Architecture, read_architecture
from trimtab.cost.plan import plan
from trimtab.errors import ConfigError
from trimtab.methods import FullConfig, Head, LoraConfig
from trimtab.ops.adam8 import AdamW8, Table
from trimtab.store import Adapter
from trimtab.train import RunConfig, train
from trimtab.train.checkpoint import steps_of
from trimtab.train.optimizers import Optimizers, state_bytes, stepped_by
from trimtab.train.options import OptimizerName, TrainOptions

SAVED = {"method": "lora", "r": 4, "modules_to_save": ["embed_tokens"], "lr": 1e-2}
BOTTLENECK = METHODS["bottleneck"] | {"reduction_factor": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "eight": SAVED | {"data": "a", "optimizer": "adamw8bit"},
    "eight-dropout": BOTTLENECK | {"data": "b", "optimizer": "adamw8bit"},
    "factored": METHODS["dora"] | {"data": "a", "optimizer": "adafactor"},
    "muon": METHODS["lora"] | {"data": "b", "optimizer": "muon"},
    "plain": METHODS["prefix"] | {"data": "a", "optimizer": "sgd"},
    "full-eight": METHODS["full"] | {"data": "b", "optimizer": "adamw8bit"},
}
QUIET = {"generate": False}
SHAPES = [(3, 4096), (4096,), (70, 64), (1, 5000)]
"""Whole blocks of 256, and a last one that is not full."""


def nearest(A: Tensor, code: Tensor, absmax: Tensor, out: Tensor, blocksize: int) -> None:
    """bitsandbytes' rounding as it documents it and as its CUDA kernels round. Its CPU library finds the place in the table only roughly
    where numbers are small, so what its Python computes for other dtypes is taken."""
    found, scales = torch.ops.bitsandbytes.quantize_blockwise(A.double(), code, blocksize)
    out.copy_(found)
    absmax.copy_(scales)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_bitsandbytes(signed: bool) -> None:
    """Over many decades; each number of the table, and both sides of each middle."""
    code = bitsandbytes.functional.create_dynamic_map(signed)
    table = Table.of(signed, torch.device("cpu"))
    assert torch.equal(table.numbers, code)
    wide = torch.randn(100, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 3, 100)[:, None]
    wide = wide * torch.logspace(-7, 0, 256)
    at = (code[1:] + code[:-1]) / 2
    edges = torch.stack([code, *(torch.cat([f(at), torch.ones(1)]) for f in (lambda t: t * (1 - 1e-6), lambda t: t * (1 + 1e-6)))])
    x = torch.cat([wide if signed else wide.abs(), edges])
    got, want = table.write(x), torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, 256)
    assert torch.equal(got.codes, want[0]) and torch.equal(got.scales, want[1])
    assert torch.equal(table.read(got), torch.ops.bitsandbytes.dequantize_blockwise(want[0], want[1], code, 256, torch.float32))
    zeros = table.write(torch.zeros(1, 256))
    assert not table.read(zeros).any()


def test_steps_are_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its AdamW8bit on a CPU, twenty steps: codes equal, tensors to rounding. And close to AdamW's in fp32."""
    monkeypatch.setattr(theirs, "_quant_blockwise_fp32_direct", nearest)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    ours, other, plain = ([p.clone().requires_grad_() for p in start] for _ in range(3))
    steppers = [AdamW8(ours, **options), bitsandbytes.optim.AdamW8bit(other, **options), torch.optim.AdamW(plain, **options)]
    mean = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for _ in range(20):
        for i, m in enumerate(mean):
            g = m + torch.randn(m.shape, generator=generator)
            for params in (ours, other, plain):
                params[i].grad = g.clone()
        for stepper in steppers:
            stepper.step()
    for a, b, c, p in zip(ours, other, plain, start, strict=True):
        mine, its = steppers[0].state[a], steppers[1].state[b]
        for kind, n in (("exp_avg", "1"), ("exp_avg_sq", "2")):
            assert torch.equal(mine[kind].view(-1)[: p.numel()], its[f"state{n}"].view(-1))
            assert torch.equal(mine[f"{kind}_scale"], its[f"absmax{n}"])
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert (a - c).norm() < 0.02 * (c - p).norm()


def test_large_tensors_are_stepped_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work space does not grow with the tensors, and where they are cut changes nothing."""
    found = []
    for chunk in (2, 10**6):
        monkeypatch.setattr("trimtab.ops.adam8.CHUNK", chunk)
        generator = torch.Generator().manual_seed(2)
        params = [torch.randn(n, generator=generator).requires_grad_() for n in (100, 1300, 256)]
        stepper = AdamW8(params, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            stepper.step()
        found.append([t for p in params for t in (p.detach(), *(s for s in stepper.state[p].values() if isinstance(s, Tensor)))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("joint"), VARIANTS, checkpoint_every=2, evaluate=QUIET)


def test_joint_equals_solo(joint: Any, tmp_path: Path) -> None:
    together = metrics(joint)
    for name in ("eight", "factored", "muon"):
        solo = run(tmp_path / name, {name: VARIANTS[name]}, evaluate=QUIET)
        alone = metrics(solo)[name]
        rough = 1e-2 if name == "muon" else 1e-4  # Newton and Schulz run in bfloat16, which makes much of a last bit
        for key in ("loss", "grad_norm", "lr"):
            assert [e[key] for e in together[name]] == pytest.approx([e[key] for e in alone], rel=rough, abs=1e-6), (name, key)
        assert together[name][-1]["loss"] != pytest.approx(together[name][0]["loss"], rel=1e-3), name
        for key, tensor in solo.adapters[name].params.items():
            assert (joint.adapters[name].params[key] - tensor).norm() <= rough * tensor.norm() + 1e-4, (name, key)


def test_each_goes_on_bit_exactly(joint: Any, tmp_path: Path) -> None:
    cut = config(tmp_path, VARIANTS, checkpoint_every=None, evaluate=QUIET)
    interrupt(cut, after=3)
    assert differences(results(joint.out), resume(cut)) == ""


def test_checkpoints_hold_eight_bits(joint: Any) -> None:
    held = load_file(steps_of(joint.out)[0] / "eight.safetensors")
    codes = [t for name, t in held.items() if name.startswith(("exp_avg/", "exp_avg_sq/")) and t.dtype == torch.uint8]
    assert sum(t.numel() for t in codes) == 2 * 57 * 256  # the embedding's 300 × 48 numbers in blocks of 256
    assert all(t.dtype == torch.float32 for name, t in held.items() if "lora_" in name and t.dim())  # of fewer than 4,096 numbers


@pytest.mark.parametrize("optimizer", OptimizerName.__args__)
@pytest.mark.parametrize("method", [LoraConfig(r=96, modules_to_save=("lm_head",)), LoraConfig(r=4, use_dora=True), FullConfig()])
def test_bytes_of_states_are_what_a_plan_counts(optimizer: str, method: Any) -> None:
    base = tiny_base()
    if isinstance(method, FullConfig):
        params = {k: p.detach().clone() for k, p in base.model.named_parameters()}
    else:
        params = {s.key(n): torch.zeros(shape) for s in method.sites(base.spec) for n, shape in s.shapes.items()}
    made = Optimizers(TrainOptions(optimizer=optimizer), [(params, 1.0)], base.spec)
    for p in params.values():
        p.grad = torch.randn(p.shape)
    made.step(1e-3)
    counts = ("step", "RMS")  # a number each
    held = sum(t.numel() * t.element_size() for kind, _, t in made.state() if kind not in counts)
    assert held == state_bytes(optimizer, {k: tuple(p.shape) for k, p in params.items()}, base.spec)
    shape = Architecture("tiny", base.spec, base.spec.num_parameters, torch.float32)
    if method != LoraConfig(r=96, modules_to_save=("lm_head",)):  # whose rank is above the smaller side
        assert plan(shape, method, dtype="float32", optimizer=optimizer).optimizer_bytes == held


def test_muon_leaves_heads_to_adamw() -> None:
    base = tiny_base()
    adapter = Adapter.create(base, LoraConfig(r=4, modules_to_save=("lm_head",)), head=Head(("a", "b", "c")))
    shapes = {k: tuple(t.shape) for k, t in adapter.params.items()}
    by = {k: stepped_by("muon", k, shape, base.spec) for k, shape in shapes.items()}
    assert {k for k, name in by.items() if name == "adamw"} == {"score.weight", "lm_head.weight"} and len(by) > 2


def test_a_plan_of_a_larger_base() -> None:
    """2 bytes and a scale of 4 for each 256 numbers, twice."""
    shape = read_architecture("llama-2-7b")
    full, eight = (plan(shape, LoraConfig(r=16), optimizer=name) for name in ("adamw", "adamw8bit"))
    assert eight.optimizer_bytes == full.optimizer_bytes * (2 + 8 / 256) / 8
    assert full.train_peak_bytes - eight.train_peak_bytes == full.optimizer_bytes - eight.optimizer_bytes
    with pytest.raises(ConfigError, match="did you mean 'adamw8bit'"):
        plan(shape, LoraConfig(), optimizer="adam8bit")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (METHODS["lora"] | {"optimizer": "lion"}, "optimizer"),
        (METHODS["ia3"] | {"optimizer": "muon"}, "ia3 has no matrices"),
        ({"method": "lora", "optimizer": "muon", "target_parameters": ["mlp.experts.down_proj"]}, "of all experts in one tensor"),
        ({"method": "lora", "optimizer": "sgd"}, "write lr"),
        (METHODS["lora"] | {"optimizer": "adafactor", "adam_beta1": 0.8}, "adam_beta1: adafactor has no such"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(run_file(tmp_path, {"v": fields | {"data": "a"}}), root=tmp_path)
    assert says in str(caught.value)


def test_a_resumed_run_keeps_its_optimizer(tmp_path: Path) -> None:
    cut = config(tmp_path, {"v": VARIANTS["eight"]})
    interrupt(cut, 2)
    changed = RunConfig.from_dict(run_file(tmp_path, {"v": SAVED | {"data": "a"}}), root=tmp_path)
    with pytest.raises(ConfigError, match="optimizer: was 'adamw8bit'"):
        train(changed, base=tiny_base(), resume=True)


# ---- NEFTune ----

NOISY = {"method": "lora", "r": 4, "lr": 1e-2, "data": "a", "neftune_noise_alpha": 5.0}


def test_noise_depends_on_nothing_else(tmp_path: Path) -> None:
    """Not on other variants, nor on how steps are cut; without it, and with another seed, the losses are others. Law 11 has its values."""
    plain = NOISY | {"neftune_noise_alpha": None}
    joint = metrics(run(tmp_path / "joint", {"n": NOISY, "p": plain, "s": NOISY | {"seed": 9}}, evaluate=QUIET))
    cut = metrics(run(tmp_path / "cut", {"n": NOISY}, max_tokens=64, evaluate=QUIET))
    losses = {name: [e["loss"] for e in lines] for name, lines in joint.items()}
    assert [e["loss"] for e in cut["n"]] == pytest.approx(losses["n"], rel=1e-5)
    assert all(a != pytest.approx(b, rel=1e-5) for other in "ps" for a, b in zip(losses["n"], losses[other], strict=True))


def test_pairs_get_noise_of_their_own_lengths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each answer's sequence has its own; rows that a pair shares have the first one's."""
    seen: list[tuple[int, int, int, float]] = []
    monkeypatch.setattr("trimtab.forward.hosted.add_noise", lambda x, noise: seen.extend(noise) or x)
    pairs = [{"prompt": f"q{i}", "chosen": "yes " * (i + 1), "rejected": "no"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs), encoding="utf-8")
    variant = NOISY | {"data": "p", "objective": "dpo", "max_steps": 1, "batch_size": 3}
    content = {"base": "tiny", "out": "out", "data": {"p": {"train": "pairs.jsonl"}}, "variants": {"v": variant}, "evaluate": QUIET}
    train(RunConfig.from_dict(content, root=tmp_path), base=tiny_base())
    assert len(seen) == 6 and len({seed for _, _, seed, _ in seen}) == 6
    rows = sorted(seen)
    for (a, b, _, whole), (c, d, _, part) in zip(rows[::2], rows[1::2], strict=True):
        assert b == c and d > c
        assert whole == pytest.approx(5 / math.sqrt((b - a) * 48)) and part > 5 / math.sqrt((d - c + b - a) * 48)
