"""What an adapter, a forward, an answer and a run are does not depend on torch's default dtype, which another thread may have changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.laws.common import CASES, base_of, method_of, tokens
from tests.tiny import tiny_folder
from tests.train.common import METHODS, metrics, run_file, tiny_base
from tests.train.kill_harness import TIMING
from trimtab.bases.weights.four_bit import FourBit, Fp4Double, Nf4Double
from trimtab.decode.generate import Sampling
from trimtab.methods import PrefixTuningConfig
from trimtab.model import load_base
from trimtab.store import Adapter
from trimtab.train import RunConfig, train


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("case", CASES)
def test_new_adapters_and_their_forwards(case: str) -> None:
    base, ids = base_of("llama"), tokens(11, 3)
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        with default(dtype):
            adapter = Adapter.create(base, method_of(case, base.spec), seed=5)
            made.append((adapter.params, base.logits([ids], [adapter])[0]))
    (params, logits), (others, again) = made
    assert {k: v.dtype for k, v in others.items()} == dict.fromkeys(params, torch.float32)
    assert all(torch.equal(params[k], others[k]) for k in params) and torch.equal(logits, again)


def test_bases_and_answers(tmp_path: Path) -> None:
    """A base that is read under another default, too; the default stays the program's."""
    folder, said = tiny_folder(tmp_path / "base"), []
    for dtype in (torch.float32, torch.bfloat16):
        with default(dtype):
            base = load_base(str(folder), dtype="float32")
            adapter = Adapter.create(base, PrefixTuningConfig(num_virtual_tokens=3, prefix_init="RANDOM"), seed=1)
            said.append(base.generate_ids([tokens(7, 1), tokens(5, 2)], [adapter, None], Sampling(12, temperature=1.0, seed=3)))
            assert torch.get_default_dtype() == dtype
    assert repr(said[0]) == repr(said[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_runs(method: str, tmp_path: Path) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        run = RunConfig.from_dict(run_file(folder, {"v": METHODS[method] | {"data": "a"}}), root=folder)
        base = tiny_base()
        with default(dtype):
            report = train(run, base=base)
        weights = {f.relative_to(report.out): f.read_bytes() for f in report.out.rglob("*.safetensors")}
        losses = [{k: v for k, v in line.items() if k not in TIMING} for line in metrics(report)["v"]]
        found.append((weights, losses))
    assert found[0][0] and found[0] == found[1]


@pytest.mark.parametrize("cls", [Nf4Double, Fp4Double])
def test_four_bits(cls: type[FourBit]) -> None:
    """Kernels read its tables as fp32."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with default(dtype):
            found.append(dict(cls.of_matrix(weight, None, torch.float32).state_dict()))
    expected, others = found
    assert expected.keys() == others.keys() and len(expected) > 3
    for name, tensor in expected.items():
        assert others[name].dtype == tensor.dtype and torch.equal(others[name], tensor), name
