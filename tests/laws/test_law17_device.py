"""Law 17: on a device with CUDA's rules everything runs, results are the CPU's, and a step's launches and waits do not grow.

The device is the stand-in of `standin.py`. What it counts is an estimate of kernels and an exact count of the points at which the host
waits. BUDGETS are upper bounds: whoever lowers a count lowers its bound. Where there is a GPU, the tests run on it and count nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from transformers import modeling_utils

from tests.laws.common import adapters_of, base_of, difference, noisy, tokens
from tests.laws.standin import Costs, OnDevice, Standin, Violation, standin
from tests.laws.standin import on_device as on_standin
from tests.ops.test_varlen import plain_varlen
from tests.serve.common import AtOnce, Clock, Held, ask
from tests.tiny import FAMILIES, tiny_folder, tiny_model, tiny_tokenizer
from tests.train.common import METHODS, metrics, run_file
from trimtab.bases import fingerprint_model
from trimtab.decode.generate import Sampling
from trimtab.methods import LoraConfig
from trimtab.model import Base, load_base
from trimtab.ops import paged, varlen
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.runner import Runner
from trimtab.store import Adapter
from trimtab.train import Report, RunConfig, train
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent

CLOSE = 1e-5
QUICK = ("llama",)
REAL = torch.cuda.is_available()
ALL = [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in FAMILIES]


@pytest.fixture
def imitated() -> Iterator[Standin]:
    with standin() as found:
        yield found


class Counting(Protocol):
    """A device that says what it has been asked for."""

    costs: Costs

    def counted(self) -> AbstractContextManager[Costs]: ...


class Real:
    """A GPU, of which nothing is counted."""

    costs = Costs()

    def counted(self) -> AbstractContextManager[Costs]:
        return nullcontext(Costs())


@pytest.fixture
def device() -> Iterator[Counting]:
    if REAL:
        yield Real()
    else:
        with standin() as found:
            yield found


def on_device(model: Any) -> Any:
    return model.to("cuda") if REAL else on_standin(model)


@cache
def base_there(family: str) -> Base:
    return Base(on_device(tiny_model(family)), tiny_tokenizer())


@cache
def adapters_there(family: str) -> dict[str, Adapter]:
    """The laws' adapters, every method, on the device."""
    return {case: Adapter(base_there(family), a.method, a.params) for case, a in adapters_of(family).items()}


# ---- the device itself ----

REFUSED = {
    "an operand on the CPU": lambda x: x + torch.ones(4, 3),
    "an index on the CPU": lambda x: x.index_select(0, torch.tensor([1])),
    "a generator of the CPU": lambda x: x.bernoulli_(0.5, generator=torch.Generator()),
    "a product of integers": lambda x: x.long() @ x.long().T,
    "numpy": lambda x: x.numpy(),
    "pinned memory of the device": lambda x: x.pin_memory(),
}
WAITS = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x.sum().item(),
    "a condition": lambda x: bool(x.sum() > 0),
    "a mask": lambda x: x[x > 0],
    "a list as an index": lambda x: x[[0, 2]],
    "a copy to the host": lambda x: x.cpu(),
    "pageable memory": lambda x: torch.ones(3).to("cuda"),
}
GOES_ON = {
    "pinned memory": lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "an index on the device": lambda x: x[torch.zeros(2, dtype=torch.int64, device="cuda")],
    "a number": lambda x: x * 2.0,
    "a slice": lambda x: x[1:, :2],
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_device_refuses_what_cuda_refuses(imitated: Standin, what: str) -> None:
    with pytest.raises(Violation):
        REFUSED[what](torch.ones(4, 3, device="cuda"))


@pytest.mark.parametrize("what", [*WAITS, *GOES_ON])
def test_the_device_counts_what_the_host_waits_for(imitated: Standin, what: str) -> None:
    x = torch.ones(4, 3, device="cuda")
    with imitated.counted() as costs:
        (WAITS | GOES_ON)[what](x)
    assert costs.syncs == (what in WAITS), costs.causes


def test_unwritten_memory_is_seen(imitated: Standin) -> None:
    assert torch.empty(3, device="cuda").isnan().all().cpu()


# ---- budgets ----


@dataclass(frozen=True)
class Budget:
    """launches: of the quick family. waits: of every family."""

    launches: int
    waits: int


BUDGETS = {
    "forward": Budget(470, 2),  # whether base and adapters are as they were packed
    "generation": Budget(2067, 7),  # of 4 tokens: one each, and the same looks
    "training step": Budget(2476, 1),
    "training step of 5 LoRAs": Budget(465, 1),
    "engine's step": Budget(626, 2),
    "decode step of 7 LoRAs": Budget(185, 1),
}


def within(what: str, family: str, costs: Costs) -> None:
    budget = BUDGETS[what]
    assert costs.syncs <= budget.waits, (what, costs.syncs, costs.causes.most_common())
    assert family not in QUICK or costs.launches <= budget.launches, (what, costs.launches, costs.kernels.most_common(12))


# ---- forward, generation ----


@pytest.mark.parametrize("family", ALL)
def test_a_mixed_forward_of_every_method(device: Counting, family: str) -> None:
    sequences = [tokens(9, i) for i in range(len(adapters_of(family)) + 1)]
    want = base_of(family).logits(sequences, [None, *adapters_of(family).values()])
    base, everyone = base_there(family), [None, *adapters_there(family).values()]
    base.logits(sequences, everyone)  # packed, so that the forward alone is counted
    with device.counted() as costs:
        got = base.logits(sequences, everyone)
    within("forward", family, costs)
    assert max(difference(g.cpu(), w) for g, w in zip(got, want, strict=True)) <= CLOSE


@pytest.mark.parametrize("family", ALL)
def test_generation(device: Counting, family: str) -> None:
    """Greedy and drawn, with more prompts than one kind of row."""
    sequences = [tokens(5 + i % 3, i) for i in range(len(adapters_of(family)) + 1)]
    base, everyone = base_there(family), [None, *adapters_there(family).values()]
    for sampling in (Sampling(6), Sampling(4, temperature=1.0, top_p=0.9, top_k=50, seed=3)):
        with device.counted() as costs:
            got = base.generate_ids(sequences, everyone, sampling)
        assert got == base_of(family).generate_ids(sequences, [None, *adapters_of(family).values()], sampling)
    within("generation", family, costs)


# ---- training ----


class PerStep(Silent):
    """What the device has been asked for in each joint step of a run, preparation and ending apart."""

    def __init__(self, device: Counting):
        self.device, self.each, self._at = device, list[Costs](), 0

    def begin(self, *args: Any) -> None:
        self._start()

    def step(self, line: Mapping[str, Any]) -> None:
        if line["step"] > self._at:  # the first variant's line of this step
            self._at = line["step"]
            self.each.append(self.device.costs)
            self._start()

    def _start(self) -> None:
        self.device.costs = Costs()


EDITS = {n: f | {"data": "a"} for n, f in METHODS.items() if n != "full"}


def run_there(device: Counting, folder: Path, family: str, variants: dict[str, dict[str, Any]], **keys: Any) -> tuple[Report, PerStep]:
    base = base_there(family)
    heard = PerStep(device)
    return train(RunConfig.from_dict(run_file(folder, variants, **keys), root=folder), base=base, listener=heard), heard


def run_here(folder: Path, family: str, variants: dict[str, dict[str, Any]], **keys: Any) -> Report:
    base = base_of(family)
    return train(RunConfig.from_dict(run_file(folder, variants, **keys), root=folder), base=base)


def same(got: Report, want: Report, tolerance: float = 1e-4) -> None:
    lines, expected = metrics(got), metrics(want)
    assert lines.keys() == expected.keys()
    for name in expected:
        for key in ("loss", "grad_norm"):
            assert [x[key] for x in lines[name]] == pytest.approx([x[key] for x in expected[name]], rel=tolerance), (name, key)
    for name, adapter in want.adapters.items():
        for key, p in adapter.params.items():
            assert difference(got.adapters[name].params[key].cpu(), p) <= tolerance, (name, key)


@pytest.mark.parametrize("family", ALL)
def test_training_of_every_method(tmp_path: Path, device: Counting, family: str) -> None:
    """Jointly, with dropout, clipping, weight decay; scored at the end."""
    want = run_here(tmp_path / "here", family, EDITS, defaults=SHORT)
    got, heard = run_there(device, tmp_path / "there", family, EDITS, defaults=SHORT)
    same(got, want)
    within("training step", family, heard.each[-1])


@pytest.mark.slow
def test_layers_that_run_again_in_the_backward(tmp_path: Path, device: Counting) -> None:
    keys = {"defaults": SHORT, "activation_checkpointing": True}
    same(run_there(device, tmp_path / "there", "llama", EDITS, **keys)[0], run_here(tmp_path / "here", "llama", EDITS, **keys))


@pytest.mark.slow
def test_micro_batches(tmp_path: Path, device: Counting) -> None:
    keys = {"defaults": SHORT, "max_tokens": 150}
    same(run_there(device, tmp_path / "there", "llama", EDITS, **keys)[0], run_here(tmp_path / "here", "llama", EDITS, **keys))


@pytest.mark.slow
def test_full_fine_tuning(tmp_path: Path, device: Counting) -> None:
    variants = {"full": METHODS["full"] | {"data": "a", "adam_epsilon": 1e-4}, "lora": EDITS["lora"] | {"adam_epsilon": 1e-4}}
    same(run_there(device, tmp_path / "there", "llama", variants)[0], run_here(tmp_path / "here", "llama", variants))


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, device: Counting) -> None:
    """Bit for bit, as on the CPU."""
    whole, _ = run_there(device, tmp_path / "whole", "llama", EDITS, defaults=LONG)
    run = RunConfig.from_dict(run_file(tmp_path / "cut", EDITS, defaults=LONG, checkpoint_every=1), root=tmp_path / "cut")
    stop = Stop()
    with pytest.raises(Interrupted):
        train(run, base=base_there("llama"), listener=StopAfter(stop, 2), stop=stop)
    resumed = train(run, base=base_there("llama"), resume=True)
    for name, adapter in whole.adapters.items():
        for key, p in adapter.params.items():
            assert torch.equal(resumed.adapters[name].params[key].cpu(), p.cpu()), (name, key)


class StopAfter(Silent):
    def __init__(self, stop: Stop, after: int):
        self.stop, self.after = stop, after

    def step(self, line: Mapping[str, Any]) -> None:
        if line["step"] == self.after:
            self.stop.ask(signal.SIGTERM)


SHORT = {
    "max_steps": 2,
    "batch_size": 3,
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "max_length": 128,
    "adam_epsilon": 1e-4,
}
"""Adam's first steps are the signs of gradients: with its usual epsilon, rounding alone decides those of entries near zero."""
LONG = SHORT | {"max_steps": 4}


@pytest.mark.slow
def test_loras_of_many_ranks_share_their_launches(tmp_path: Path, device: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, as a GPU trains, with attention by a kernel for flat rows."""
    use_varlen(monkeypatch)
    models = [tiny_model("llama", dtype=torch.bfloat16) for _ in range(2)]
    bases = Base(models[0], tiny_tokenizer(), name="tiny-llama"), Base(on_device(models[1]), tiny_tokenizer(), name="tiny-llama")
    variants = {f"v{i}": {"method": "lora", "r": r, "lr": 1e-3, "data": "a", "seed": i} for i, r in enumerate((8, 8, 16, 8, 24))}
    heard, lines = PerStep(device), []
    for base, listener in zip(bases, (Silent(), heard), strict=True):
        run = RunConfig.from_dict(run_file(tmp_path / base.device.type, variants, defaults=SHORT), root=tmp_path / base.device.type)
        lines.append(metrics(train(run, base=base, listener=listener)))
    for name, want in lines[0].items():
        for got, expected in zip(lines[1][name], want, strict=True):
            assert got["loss"] == pytest.approx(expected["loss"], rel=0.005)
            assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.03)
    within("training step of 5 LoRAs", "llama", heard.each[-1])
    assert heard.each[-1].kernels["_grouped_mm"] <= 2 * 7 * 6, "six products a site, whatever the ranks"


def use_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by torch's kernel for flat rows, over a cache too; no verdict of this test reaches another."""
    if not REAL:
        monkeypatch.setattr(varlen, "find", lambda: varlen_there)
        for module in (varlen, paged):
            monkeypatch.setattr(module, "_trusted", cache(module._trusted.__wrapped__))


def varlen_there(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    """torch's kernel for flat rows on the device: a launch each way."""
    return _Varlen.apply(q, k, v, rest, options)


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rest: Any, options: Any) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        held = {name: o.held if isinstance(o, OnDevice) else o for name, o in options.items()}
        ctx.rest = [r.held if isinstance(r, OnDevice) else r for r in rest], held
        return OnDevice(plain_varlen(q.held, k.held, v.held, *ctx.rest[0], **held))

    @staticmethod
    def backward(ctx: Any, d_out: Any) -> tuple:
        with torch.enable_grad():
            leaves = [t.held.detach().requires_grad_() for t in ctx.saved_tensors]
            out = plain_varlen(*leaves, *ctx.rest[0], **ctx.rest[1])
        return *(OnDevice(g) for g in torch.autograd.grad(out, leaves, d_out.held)), None, None


# ---- serving ----


def serve(base: Base, adapters: Mapping[str, Adapter], device: Counting | None = None) -> tuple[dict[str, Any], list[Costs]]:
    """What each adapter's request gets, sampled ones among them, and each step's costs."""
    config = EngineConfig(kv_bytes=60 * Runner.bytes_per_block(base, 16), adapter_bytes=64 << 20)
    engine = Engine(base, config, clock=Clock(), loader=AtOnce())
    heard = {c: ask(engine, c, 6, Held(f"sha256:{c}", a), max_tokens=5, ignore_eos=True, logprobs=2) for c, a in adapters.items()}
    heard["drawn"] = ask(engine, "drawn", 20, max_tokens=5, ignore_eos=True, temperature=1.0, seed=1, frequency_penalty=0.5)
    costs = []
    while True:
        if device is not None:
            device.costs = Costs()
        if not engine.step():
            break
        costs += [] if device is None else [device.costs]
    engine.idle_check()
    return heard, costs


@pytest.mark.parametrize("family", ALL)
def test_the_engine(device: Counting, family: str) -> None:
    want, _ = serve(base_of(family), adapters_of(family))
    got, costs = serve(base_there(family), adapters_there(family), device)
    for name, heard in want.items():
        assert heard.finish == "length" and got[name].ids == heard.ids and got[name].text == heard.text, name
        for ours, theirs in zip(got[name].tokens, heard.tokens, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4), name
    within("engine's step", family, max(costs[1:], key=lambda c: (c.syncs, c.launches)))


MANY_RANKS = (4, 8, 6, 3, 16, 8, 12, 5)
"""With ranks padded to powers of two: six of 8, two of 16."""


def test_many_ranks_decode_together(device: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, as a GPU serves: two products a site and padded rank, however many adapters there are, about as near to fp32 as bf16 on the
    CPU is. One that comes costs what it takes to pack it; nothing is stacked anew."""
    use_varlen(monkeypatch)
    models = [tiny_model("llama", dtype=torch.bfloat16) for _ in range(2)]
    here, there = Base(models[0], tiny_tokenizer()), Base(on_device(models[1]), tiny_tokenizer())
    made = [noisy(base_of("llama"), LoraConfig(r=r, target_modules="all-linear"), seed=i) for i, r in enumerate(MANY_RANKS)]
    sequences = [tokens(2, i) for i in range(len(made))]
    exact, (near, got) = (
        base_of("llama").logits(sequences, made),
        (b.logits(sequences, [Adapter(b, a.method, a.params) for a in made]) for b in (here, there)),
    )
    off = [max(difference(x.cpu().float(), e) for x, e in zip(found, exact, strict=True)) for found in (got, near)]
    assert off[0] <= 2 * off[1], off
    config = EngineConfig(kv_bytes=60 * Runner.bytes_per_block(there, 16), adapter_bytes=1 << 20)
    engine = Engine(there, config, clock=Clock(), loader=AtOnce())

    def step() -> Costs:
        with device.counted() as costs:
            assert engine.step()
        return costs

    held = [Held(f"sha256:{i}", Adapter(there, a.method, a.params)) for i, a in enumerate(made)]
    for i, h in enumerate(held[:-1]):
        ask(engine, f"{i}", 6, h, max_tokens=30, ignore_eos=True)
    while len(engine.scheduler.running) < len(held) - 1:
        step()
    step()
    steady = step()
    within("decode step of 7 LoRAs", "llama", steady)
    ask(engine, "new", 6, held[-1], max_tokens=30, ignore_eos=True)
    comes = [step() for _ in range(4)]
    assert len(engine.scheduler.running) == len(held)
    assert REAL or steady.kernels["_grouped_mm"] == comes[-1].kernels["_grouped_mm"] == 2 * 2 * 7 * 2, steady.kernels
    packing = 2 * 7 * 3 + 2 * 7 * 2  # casts and a scaling for each pair of factors; copies where a rank is padded
    assert sum(c.launches for c in comes) <= 4 * (steady.launches + 2 * 7 * 3) + packing + 40, [c.launches for c in comes]


# ---- loading, other dtypes ----


@pytest.mark.slow
def test_a_base_is_loaded_onto_the_device(tmp_path: Path, device: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its folder, straight to the device; fingerprints, logits, an adapter's round over the disk."""
    if not REAL:  # what transformers asks the driver, and threads, which the stand-in does not reach
        monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", lambda *args: None)
        monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    monkeypatch.setattr(torch.nn.Module, "to", None)  # nothing is moved afterwards
    folder = tiny_folder(tmp_path / "tiny-llama")
    here, there = load_base(str(folder), dtype="float32", device="cpu"), load_base(str(folder), dtype="float32")
    assert there.device.type == "cuda" and there.fingerprint == here.fingerprint
    assert fingerprint_model(there.model) == fingerprint_model(here.model)
    Adapter(there, adapters_of("llama")["lora-0"].method, adapters_of("llama")["lora-0"].params).save(tmp_path / "adapter")
    ids = tokens(12, 1)
    got, want = (b.logits([ids, ids], [None, Adapter.load(tmp_path / "adapter", b)]) for b in (there, here))
    assert max(difference(g.cpu(), w) for g, w in zip(got, want, strict=True)) <= CLOSE


@pytest.mark.slow
def test_bfloat16(device: Counting) -> None:
    """About as near to fp32 as bf16 on the CPU is."""
    models = [tiny_model("llama", dtype=torch.bfloat16) for _ in range(2)]
    here, there = Base(models[0], tiny_tokenizer()), Base(on_device(models[1]), tiny_tokenizer())
    sequences, cases = [tokens(9, i) for i in range(6)], [*adapters_of("llama").values()][:6]
    got, want = (b.logits(sequences, [Adapter(b, a.method, a.params) for a in cases]) for b in (there, here))
    exact = base_of("llama").logits(sequences, cases)
    off = [max(difference(x.cpu().float(), e) for x, e in zip(found, exact, strict=True)) for found in (got, want)]
    assert off[0] <= 2 * off[1], off
