"""Packed matrices equal what bitsandbytes and the gguf package dequantise, or a loop over their entries; products equal dense ones, also
where a matrix takes several tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.ops import quantized
from trimtab.ops.quantized import PackedMatrix, dense, product, product_t


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def code4(kind: str, nested: bool, shape: tuple[int, int]) -> tuple[PackedMatrix, Tensor]:
    from bitsandbytes import functional as bnb

    O, I = shape
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile for half a minute
        codes, state = bnb.quantize_4bit(random(*shape), blocksize=64, compress_statistics=nested, quant_type=kind)
    absmax = state.absmax.view(O, -1) if I % 64 == 0 else state.absmax
    parts = {"codes": codes.view(O, -1) if I % 2 == 0 else codes.view(-1), "table": state.code, "absmax": absmax}
    if nested:
        parts |= {"nested_table": state.state2.code, "nested_absmax": state.state2.absmax, "nested_offset": state.offset.view(1)}
        parts["nested_block"] = torch.tensor([state.state2.blocksize])
    return PackedMatrix("code4", shape, torch.float32, parts, 64), bnb.dequantize_4bit(codes, state)


def gguf(name: str, block: int, size: int, halves: tuple[int, ...]) -> tuple[PackedMatrix, Tensor]:
    from gguf import GGMLQuantizationType, quants

    blocks = np.random.default_rng(0).integers(0, 256, (6, 512 // block, size), dtype=np.uint8)
    for at in halves:  # whole numbers at random are not always finite as fp16
        blocks[..., at : at + 2] = np.random.default_rng(at).normal(size=(6, 512 // block, 1)).astype(np.float16).view(np.uint8)
    codes = blocks.reshape(6, -1)
    m = PackedMatrix(name.lower(), (6, 512), torch.float32, {"codes": torch.from_numpy(codes)}, block)
    return m, torch.from_numpy(quants.dequantize(codes, GGMLQuantizationType[name]))


def by_loop(kind: str) -> tuple[PackedMatrix, Tensor]:
    """W of 6 x 64 entry by entry, as the kind's formula has it."""
    generator, W = torch.Generator().manual_seed(0), torch.empty(6, 64)
    code = torch.randint(16, W.shape, generator=generator)
    high, low = (code[:, ::2] << 4 | code[:, 1::2]).to(torch.uint8), (code[:, 1::2] << 4 | code[:, ::2]).to(torch.uint8)
    table, scale, block, rows = random(16), random(6, 2, seed=1).abs(), 32, 1
    zero, group = torch.randint(16, (6, 2), generator=generator), torch.randint(2, (64,), generator=generator)
    whole, power = torch.randint(-127, 128, W.shape, generator=generator), torch.randint(120, 135, (6, 2), generator=generator)
    float8 = random(6, 64).to(torch.float8_e4m3fn)
    parts: dict[str, Tensor] = {
        "int8": {"codes": whole.to(torch.int8), "scale": scale[:, 0]},
        "fp8": {"codes": float8, "scale": scale[:2]},
        "int4": {"codes": high, "scale": scale, "zero": zero.to(torch.uint8)},
        "int4 in groups": {"codes": high, "scale": scale, "zero": zero.to(torch.uint8), "group": group},
        "int8_groups": {"codes": whole.to(torch.int8), "scale": scale, "zero": zero.to(torch.int8) - 8},
        "int8_groups in groups": {"codes": whole.to(torch.int8), "scale": scale, "zero": zero.to(torch.int8) - 8, "group": group},
        "mxfp4": {"codes": low, "table": table, "scale": power.to(torch.uint8)},
    }[kind.removesuffix(" in an order")]
    if kind == "fp8":
        block, rows = 48, 4
    for o in range(6):
        for i in range(64):
            g = int(group[i]) if "in groups" in kind else i // 32
            W[o, i] = {
                "int8": float(whole[o, i]) * scale[o, 0],
                "fp8": float(float8[o, i]) * scale[o // 4, i // 48],
                "int8_groups": float(whole[o, i] - zero[o, g] + 8) * scale[o, g],
                "mxfp4": table[code[o, i]] * 2.0 ** float(power[o, i // 32] - 127),
            }.get(kind.split()[0], float(code[o, i] - zero[o, g]) * scale[o, g])
    if "in an order" in kind:
        order = torch.randperm(64, generator=generator)
        parts, kept, W = parts | {"order": order}, W, torch.empty_like(W)
        for k in range(64):
            W[:, order[k]] = kept[:, k]
    return PackedMatrix(kind.split()[0], (6, 64), torch.float32, parts, block, rows), W


CASES = {
    f"{kind}{'-nested' if nested else ''}-{O}x{I}": (code4, kind, nested, (O, I))
    for kind in ("nf4", "fp4")
    for nested in (False, True)
    for O, I in ((7, 13), (40, 24), (48, 128))
}
CASES |= {"q4_0": (gguf, "Q4_0", 32, 18, (0,)), "q8_0": (gguf, "Q8_0", 32, 34, (0,))}
CASES |= {"q4_k": (gguf, "Q4_K", 256, 144, (0, 2)), "q6_k": (gguf, "Q6_K", 256, 210, (208,))}
CASES |= {kind: (by_loop, kind) for kind in ("int8", "fp8", "int4", "int4 in groups", "int8_groups", "int8_groups in groups", "mxfp4")}
CASES |= {kind: (by_loop, kind) for kind in ("int4 in an order", "int8_groups in an order")}


@pytest.mark.parametrize("case", CASES)
def test_dequantised_and_multiplied(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, *given = CASES[case]
    m, W = make(*given)
    O, I = m.shape
    assert torch.equal(dense(m), W) or torch.allclose(dense(m), W, rtol=1e-6, atol=0)
    for rows in (torch.tensor([3, 0, 3]), torch.tensor([[1], [2]]), slice(2, 5), [4]):
        assert torch.equal(dense(m, rows), dense(m)[rows])
    for tile in (quantized.TILE, 2 * I):
        monkeypatch.setattr(quantized, "TILE", tile)
        x, theirs = (random(2, 5, I, seed=2).requires_grad_() for _ in range(2))
        bias, their_bias = (random(O, seed=3).requires_grad_() for _ in range(2))
        dy = random(2, 5, O, seed=4)
        y, want = product(m, x, bias), theirs @ W.T + their_bias
        y.backward(dy)
        want.backward(dy)
        for got, wanted in ((y, want), (x.grad, theirs.grad), (bias.grad, their_bias.grad), (product_t(m, dy), theirs.grad)):
            assert float((got - wanted).detach().norm() / wanted.detach().norm()) < 1e-5
        wide = torch.full((2, 5, O + 3), torch.nan)
        with torch.no_grad():
            product(m, x, bias, wide[..., 2 : O + 2])
        assert torch.equal(wide[..., 2 : O + 2], y) and wide[..., [0, 1, -1]].isnan().all()
