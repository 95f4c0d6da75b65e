"""The native kernels of packed matrices against torch: dequantised entries are the same to the last bit, products are near an exact one,
and a row's result does not depend on the rows beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trimtab.ops import native, native_quantized, quantized
from trimtab.ops.quantized import PackedMatrix

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason=f"no native kernels: {native.load()[1]}")
ROWS, COLUMNS = 37, (64, 576, 1536)
"""The second fills no whole number of runs of 128."""
BLOCKS = {"q4_0": (32, 18, (0,)), "q8_0": (32, 34, (0,)), "q4_k": (256, 144, (0, 2)), "q6_k": (256, 210, (208,))}
CASES = [
    *[("code4", block, nested) for block, nested in ((64, False), (64, True), (32, False), (128, False), (192, True))],
    *[(kind, block, False) for kind in ("int4", "int8_groups") for block in (32, 64, 192, 16)],
    *[(kind, block, False) for kind, block in (("int8", 64), ("fp8", 128), ("fp8", 24), ("mxfp4", 32))],
    *[(kind, block, False) for kind, (block, *_) in BLOCKS.items()],
]


def matrix(kind: str, I: int, block: int, nested: bool) -> PackedMatrix:
    """Random codes and scales."""
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    def scales(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) + 0.1

    table = torch.randn(16, generator=generator)
    if kind == "code4":
        parts = {"codes": codes(ROWS, I // 2), "table": table, "absmax": scales(ROWS, I // block)}
        if nested:
            parts |= {"absmax": codes(ROWS, I // block), "nested_table": torch.randn(256, generator=generator)}
            parts |= {"nested_absmax": scales(-(-ROWS * I // block // 10)), "nested_block": torch.tensor([10])}
            parts["nested_offset"] = torch.tensor([0.3])
    elif kind == "int8":
        parts = {"codes": codes(ROWS, I).view(torch.int8), "scale": scales(ROWS)}
    elif kind == "fp8":
        parts = {"codes": codes(ROWS, I).view(torch.float8_e4m3fn), "scale": scales(-(-ROWS // 16), -(-I // block))}
    elif kind == "int4":
        parts = {"codes": codes(ROWS, I // 2), "scale": scales(ROWS, I // block), "zero": codes(ROWS, I // block) % 16}
    elif kind == "int8_groups":
        parts = {
            "codes": codes(ROWS, I).view(torch.int8),
            "scale": scales(ROWS, I // block),
            "zero": codes(ROWS, I // block).view(torch.int8),
        }
    elif kind == "mxfp4":
        parts = {"codes": codes(ROWS, I // 2), "table": table, "scale": 120 + codes(ROWS, I // 32) % 12}
    else:
        _, size, halves = BLOCKS[kind]
        blocks = codes(ROWS, I // block, size)
        for at in halves:
            blocks[..., at : at + 2] = scales(ROWS, I // block, 1).half().view(torch.uint8)
        parts = {"codes": blocks.flatten(1)}
    return PackedMatrix(kind, (ROWS, I), torch.bfloat16, parts, block, 16)


@pytest.mark.parametrize("kind, block, nested", CASES)
@torch.no_grad()
def test_equal_torch(kind: str, block: int, nested: bool) -> None:
    for I in COLUMNS:
        if I % block and kind != "fp8":
            continue
        for dtype in native.DTYPES:
            m = replace(matrix(kind, I, block, nested), dtype=dtype)
            W = quantized._decode(m, slice(None)).to(dtype)
            got = native_quantized.dense(m, slice(0, ROWS), slice(0, I))
            assert torch.equal(got.isnan(), W.isnan()) and torch.equal(got.nan_to_num(), W.nan_to_num())
            if I > 256:
                assert torch.equal(native_quantized.dense(m, slice(3, 20), slice(256, I - 1)).nan_to_num(), W[3:20, 256:-1].nan_to_num())
            if kind == "fp8":  # any code but those that are no number
                codes = m.parts["codes"].view(torch.uint8)
                codes[codes & 127 == 127] = 5
                W = quantized._decode(m, slice(None)).to(dtype)
            check_products(m, W)


def check_products(m: PackedMatrix, W: Tensor) -> None:
    O, I = W.shape
    bias, bound = torch.randn(O).to(W.dtype), {torch.float32: 1e-6, torch.bfloat16: 3e-3}[W.dtype]
    x_TI = torch.randn(41, I).to(W.dtype)
    for T in (1, 2, 3, 7, 41):
        wide = torch.full((T, O + 3), torch.nan, dtype=W.dtype)
        y = native_quantized.product(m, x_TI[:T], bias, wide[:, 1 : O + 1])
        wanted = x_TI[:T].double() @ W.double().T + bias.double()
        assert float((y - wanted).norm() / wanted.norm()) < bound
        assert wide[:, [0, -1, -2]].isnan().all()
        assert torch.equal(y[-1:], native_quantized.product(m, x_TI[T - 1 : T], bias, torch.empty_like(y[:1])))


@pytest.mark.parametrize("dtype, rows, bound", [(torch.bfloat16, 200, 3e-3), (torch.float32, 9, 1e-6)])
@torch.no_grad()
def test_many_rows_take_tiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, bound: float) -> None:
    """Never the whole matrix at once, forward and backward, with the result of the dense one. In float32 many rows are fewer."""
    m, seen = replace(matrix("code4", 1536, 64, True), dtype=dtype), []
    W, make = quantized.dense(m), native_quantized.dense
    monkeypatch.setattr(quantized, "TILE", 2**13)
    monkeypatch.setattr(native_quantized, "dense", lambda *args: seen.append(args[-1].numel()) or make(*args))
    x, dy = torch.randn(rows, 1536).to(dtype), torch.randn(rows, ROWS).to(dtype)
    for got, wanted in ((quantized.product(m, x), x.double() @ W.double().T), (quantized.product_t(m, dy), dy.double() @ W.double())):
        assert float((got - wanted).norm() / wanted.norm()) < bound
    assert len(seen) > 10 and max(seen) <= ROWS * 256


@torch.no_grad()
def test_no_rows() -> None:
    for kind, block, nested in CASES:
        m = matrix(kind, 1536, block, nested)
        assert quantized.product(m, torch.empty(0, 1536, dtype=torch.bfloat16)).shape == (0, ROWS)
    if native.attends_flat():
        assert native_quantized.Projection([native_quantized.rows_of(torch.randn(ROWS, 96).bfloat16())])(
            torch.empty(0, 96).bfloat16()
        ).shape == (0, ROWS)
