"""`activation_checkpointing`: the same numbers to the bit, in less memory, and `plan` knows how much less."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.common import CASES, base_of, method_of, noisy, tokens, with_dropout
from tests.tiny import FAMILIES, tiny_model, tiny_tokenizer
from tests.train.common import METHODS, metrics, run, run_file, tiny_base
from trimtab.bases.shapes import Architecture
from trimtab.cost.activations import activation_bytes, kept_bytes
from trimtab.cost.plan import plan
from trimtab.forward.batch import BASE, Piece
from trimtab.methods import LoraConfig, Method
from trimtab.methods.base import Site
from trimtab.model import Base
from trimtab.store import Adapter
from trimtab.train import RunConfig, loop, train
from trimtab.train.heap import Heap
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent


def mixed_gradients(base: Base, activation_checkpointing: bool) -> list[Tensor]:
    """The loss and every gradient of one batch with base rows and adapters of all methods, dropout on."""
    base.attached.activation_checkpointing = activation_checkpointing
    try:
        adapters = [noisy(base, with_dropout(method_of(c, base.spec), 0.4), seed=i) for i, c in enumerate(CASES)]
        for a in adapters:
            a.params = {k: t.requires_grad_() for k, t in a.params.items()}
        mix, members = base.mix(adapters, packed=lambda a: base.attached.pack(a.method, a.params, a.sites))
        pieces = [Piece(torch.tensor(tokens(5 + 3 * m % 11, 7 * m + k)), m, seed=20 + m + k) for m in [BASE, *members] for k in range(2)]
        batch = base.batch(pieces, mix)
        hidden_TH = base.attached.forward(batch)
        loss = base.attached.head(hidden_TH, batch, range(batch.total)).float().logsumexp(-1).sum()
        loss.backward()
        assert base.attached._at_hand.batch is None
        return [loss.detach(), *(t.grad for a in adapters for t in a.params.values() if t.grad is not None)]
    finally:
        base.attached.activation_checkpointing = False


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_mixed_batch_are_equal_to_the_bit(family: str) -> None:
    base = base_of(family)
    plain, again = mixed_gradients(base, False), mixed_gradients(base, True)
    assert len(plain) > 3 * len(CASES) and all(g.abs().max() > 0 for g in plain)
    assert len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_run_is_equal_to_the_bit(tmp_path: Path) -> None:
    variants = {n: f | {"data": "ab"[i % 2], "gradient_accumulation_steps": 1 + i % 2} for i, (n, f) in enumerate(METHODS.items())}
    runs = [run(tmp_path / str(on), variants, activation_checkpointing=on) for on in (False, True)]
    plain, again = (metrics(r) for r in runs)
    for name in variants:
        assert [e["loss"] for e in plain[name]] == [e["loss"] for e in again[name]]
        assert [e["grad_norm"] for e in plain[name]] == [e["grad_norm"] for e in again[name]]
    for name, adapter in runs[0].adapters.items():
        assert all(torch.equal(t, runs[1].adapters[name].params[k]) for k, t in adapter.params.items())


def test_layers_run_twice_where_it_is_on(tmp_path: Path) -> None:
    """The equalities above would hold of an option that does nothing."""
    calls: dict[bool, int] = {}
    for on in (False, True):
        base = tiny_base()
        mlp, calls[on] = base.model.model.layers[0].mlp, 0
        original = mlp.forward

        def counted(x: Tensor, on: bool = on, original: Any = original) -> Tensor:
            calls[on] += torch.is_grad_enabled()
            return original(x)

        mlp.forward = counted
        content = run_file(tmp_path / str(on), {"v": {"data": "a", "method": "lora"}}, activation_checkpointing=on)
        train(RunConfig.from_dict(content, root=tmp_path / str(on)), base=base)
    assert calls == {False: 5, True: 10}


def test_a_resumed_run_may_change_it(tmp_path: Path) -> None:
    class After(Silent):
        def step(self, line: Any) -> None:
            if line["step"] == 2:
                stop.ask(signal.SIGTERM)

    stop = Stop()
    variants = {"v": {"data": "a", "method": "lora", "lora_dropout": 0.3}}
    whole = run(tmp_path / "whole", variants)
    content = run_file(tmp_path / "cut", variants)
    with pytest.raises(Interrupted):
        train(RunConfig.from_dict(content, root=tmp_path / "cut"), base=tiny_base(), listener=After(), stop=stop)
    changed = RunConfig.from_dict(content | {"activation_checkpointing": True}, root=tmp_path / "cut")
    resumed = train(changed, base=tiny_base(), resume=True)
    assert all(torch.equal(t, resumed.adapters["v"].params[k]) for k, t in whole.adapters["v"].params.items())


# ---- memory


def deep(layers: int = 12) -> Base:
    """Wide and deep enough that layers weigh more than the rest."""
    import transformers

    config = tiny_model("llama").config.to_dict() | {"num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 160}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "layer_types"}))
    return Base(model.to(torch.bfloat16).eval(), tiny_tokenizer())


def peak_bytes(base: Base, method: Method, sequences: int, length: int) -> int:
    """Bytes that torch's allocator holds at most during a forward and backward, beyond what it held before."""
    adapter = Adapter.create(base, method)
    for t in adapter.params.values():
        t.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        mix, members = base.mix([adapter], packed=lambda a: base.attached.pack(a.method, a.params, a.sites))
        batch = base.batch([Piece(torch.arange(length), members[0])] * sequences, mix)
        base.attached.forward(batch).float().sum().backward()
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("method", [LoraConfig(r=4), LoraConfig(r=4, use_dora=True)], ids=["lora", "dora"])
def test_the_peak_falls_as_the_estimate_says(method: Method) -> None:
    base, sequences, length = deep(), 8, 64
    base.attached.activation_checkpointing = False
    plain = peak_bytes(base, method, sequences, length)
    base.attached.activation_checkpointing = True
    again = peak_bytes(base, method, sequences, length)
    sites = method.sites(base.spec)
    estimates = [
        activation_bytes(base.spec, sites, torch.bfloat16, sequences * length, length, activation_checkpointing=on) for on in (False, True)
    ]
    assert again < 0.5 * plain
    assert estimates[0] / plain == pytest.approx(1.0, abs=0.3)
    assert estimates[1] / again == pytest.approx(1.0, abs=0.3)


def test_the_heap_is_told_to_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Watched(Heap):
        def __init__(self, sparing: bool = False) -> None:
            asked.append(sparing)
            super().__init__(sparing)

    monkeypatch.setattr(loop, "Heap", Watched)
    for on in (True, False):
        run(tmp_path / str(on), {"v": {"data": "a", "method": "lora"}}, activation_checkpointing=on)
    assert asked == [True, False]


RESIDENT = """
import os, psutil, torch
from trimtab.train.heap import Heap
for sparing in (True, False):
    if (child := os.fork()):
        os.waitpid(child, 0)
        continue
    heap, held = Heap(sparing=sparing), []
    for _ in range(40):  # a layer: much that is freed at once, around an input that stays
        passing = [torch.ones(3_000_000) for _ in range(6)]
        held.append(torch.ones(1_500_000))
        del passing
    print(psutil.Process().memory_info().rss, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_a_sparing_heap_holds_what_is_in_use() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a forked process has no team of threads
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, check=True, env=environment)
    resident = [int(line) for line in done.stdout.split()]
    if not Path("/proc/self/maps").exists() or "libc.so.6" not in Path("/proc/self/maps").read_text():
        pytest.skip("no glibc here")
    assert len(resident) == 2 and resident[1] - resident[0] > 50e6  # the freed blocks of a layer are 72 MB


def test_what_is_kept_is_each_live_layers_input_and_one_layer() -> None:
    spec = deep().spec
    sites = LoraConfig(r=4).sites(spec)

    def kept(on: bool, sites: list[Site] = sites) -> int:
        return kept_bytes(spec, sites, torch.bfloat16, 512, 64, activation_checkpointing=on)

    assert kept(True) == 12 * 512 * 64 * 2 + kept(False) // 12
    late = LoraConfig(r=4, layers_to_transform=[10]).sites(spec)
    assert kept(True, late) == 2 * 512 * 64 * 2 + max(kept(False, late) - kept(False, []) // 12, kept(False, []) // 12)


def test_plan_knows_of_it() -> None:
    spec = deep().spec
    shape = Architecture("deep", spec, spec.num_parameters, torch.bfloat16)
    plain, again = (plan(shape, LoraConfig(r=4), activation_checkpointing=on) for on in (False, True))
    assert again.activation_bytes < plain.activation_bytes / 2
    assert (again.activation_checkpointing, plain.activation_checkpointing) == (True, False)
    assert again.train_peak_bytes - plain.train_peak_bytes == again.activation_bytes - plain.activation_bytes
    assert again.full is not None and plain.full is not None and again.full.activation_bytes < plain.full.activation_bytes
