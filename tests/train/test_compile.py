"""`compile: true`: the same numbers up to rounding, one graph for all layers and all sizes, and a clear word where it cannot be.

Compiling takes some ten seconds, so all that compiles is marked slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.common import base_of, difference, gradient_difference
from tests.train.common import METHODS, metrics, run, run_file, tiny_base
from trimtab.errors import ConfigError
from trimtab.forward import rowwise
from trimtab.ops import compiled, native
from trimtab.train import RunConfig, train
from trimtab.train.listen import Silent

ONE = {"v": {"data": "a", "method": "lora", "r": 4}}


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a device that has no native kernels."""
    monkeypatch.setattr(native, "load", lambda: (None, "not in this test"))
    yield
    compiled._compiled.cache_clear()


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def status(self, text: str) -> None:
        self.lines.append(text)


def test_where_native_kernels_run_nothing_is_compiled_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if native.load()[0] is None:
        pytest.skip("no native kernels here")
    monkeypatch.setattr(compiled, "_compiled", lambda formula: pytest.fail("was compiled"))
    heard = Heard()
    train(RunConfig.from_dict(run_file(tmp_path, ONE, compile=True), root=tmp_path), base=tiny_base(), listener=heard)
    assert "nothing is compiled: the native kernels of this CPU do what would be" in heard.lines


def test_where_torch_compile_does_not_work(tmp_path: Path, no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends before anything is read or written."""

    def broken(formula: Any, **options: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, ONE, compile=True)
    for word in ("compile = true: torch.compile does not work on cpu", "No working C++ compiler found", "remove `compile`"):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rotate"])
def test_other_results_are_refused(name: str, no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile taken for the identity, and one kernel's backward for one with a fault."""
    monkeypatch.setattr(torch, "compile", lambda formula, **options: formula)
    assert rowwise.compile_row_wise(torch.float32, torch.device("cpu"))[0] is rowwise.COMPILED
    compiled._compiled.cache_clear()
    backward = getattr(compiled, f"_{name}_backward")

    def off(*arguments: Any) -> Any:
        found = backward(*arguments)
        return tuple(1.01 * d for d in found) if isinstance(found, tuple) else 1.01 * found

    monkeypatch.setattr(compiled, f"_{name}_backward", off)
    with pytest.raises(ConfigError, match=f"what torch.compile makes of {name} gives other results"):
        rowwise.compile_row_wise(torch.float32, torch.device("cpu"))


def test_it_is_turned_off_by_the_next_run(no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda formula, **options: formula)
    attached = tiny_base().attached
    assert attached.compile(True) == "norms, gates and rotations are compiled"
    assert attached.row_wise == rowwise.COMPILED
    assert attached.compile(False) == "" and attached.row_wise == rowwise.RowWise()
    assert attached.compile(True) and rowwise.RowWise() != rowwise.COMPILED  # the shared ones were not written


def test_families_without_fast_forwards_say_that_nothing_is_compiled(no_native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda formula, **options: formula)
    attached = base_of("gpt2").attached
    assert attached.compile(True) == "nothing is compiled: layers of gpt2 run as transformers wrote them"
    attached.compile(False)


# ---- what really compiles


def inputs(name: str, rows: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """(what wants gradients, what does not)"""
    generator = torch.Generator().manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if name == "rotate":
        return [random(rows, 3, 16)], [random(rows, 16), random(rows, 16)]
    wide = [random(1, rows, 48), random(1, rows, 48)]
    return (wide, []) if name == "swiglu" else (wide[:1], [random(48), 1e-5])


def both_ways(kernel: Callable[..., Tensor], leaves: list[Tensor], rest: list[Any]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    y = kernel(*leaves, *rest)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y) * leaves[0].detach())]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_agree_and_all_sizes_share_a_graph(dtype: torch.dtype, no_native: None) -> None:
    from torch._dynamo.utils import counters

    assert rowwise.compile_row_wise(dtype, torch.device("cpu"))[0] is rowwise.COMPILED
    before = counters["stats"]["unique_graphs"]
    for name in ("rms_norm", "swiglu", "rotate"):
        for rows in (5, 64, 301):
            leaves, rest = inputs(name, rows, dtype)
            found = both_ways(getattr(rowwise.COMPILED, name), leaves, rest)
            for i, (got, want) in enumerate(zip(found, both_ways(getattr(rowwise.RowWise(), name), leaves, rest), strict=True)):
                assert (gradient_difference if i else difference)(got, want) <= (1e-5 if dtype == torch.float32 else 2e-2), (name, rows, i)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_run_is_equal_up_to_rounding(tmp_path: Path, no_native: None, activation_checkpointing: bool) -> None:
    variants = {n: f | {"data": "ab"[i % 2], "adam_epsilon": 1e-4} for i, (n, f) in enumerate(METHODS.items())}
    options = {"activation_checkpointing": activation_checkpointing}
    plain, fused = (run(tmp_path / str(on), variants, compile=on, **options) for on in (False, True))
    for name, lines in metrics(plain).items():
        for want, got in zip(lines, metrics(fused)[name], strict=True):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-4) and got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)
    assert any(a["loss"] != b["loss"] for n, ls in metrics(plain).items() for a, b in zip(ls, metrics(fused)[n], strict=True))
    for name, adapter in plain.adapters.items():
        for key, tensor in adapter.params.items():
            torch.testing.assert_close(fused.adapters[name].params[key], tensor, rtol=1e-2, atol=1e-4)
