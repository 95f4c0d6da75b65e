"""The native kernels against the same formulas in torch, in both dtypes, at sizes that do and do not fit their registers."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trimtab import ops
from trimtab.forward.decode_path import Paging
from trimtab.forward.packs import PackList
from trimtab.methods.base import Packed
from trimtab.ops import native, native_quantized
from trimtab.ops import native_inference as kernels

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason=f"no native kernels: {native.load()[1]}")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.015}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, want, dtype):
    return float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp_min(1e-9)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("T, width", [(1, 48), (5, 576), (3, 33)])
def test_add_rms_norm(dtype, T, width):
    x, y, w = randn(T, width, dtype=dtype), randn(T, width, dtype=dtype, seed=1), randn(width, dtype=dtype, seed=2)
    total = (x.float() + y.float()).to(dtype)
    want = total.float() * torch.rsqrt(total.float().square().mean(-1, keepdim=True) + 1e-5) * w.float()
    plain = kernels.add_rms_norm(x.clone(), None, w, 1e-5)
    assert close(kernels.add_rms_norm(x, y, w, 1e-5), want, dtype)
    assert torch.equal(x, total), "the sum stays in place"
    assert not close(plain, want, dtype)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_rotate_and_write(dtype, normed):
    T, H, G, D = 3, 4, 2, 16
    qkv = randn(T, (H + 2 * G) * D, dtype=dtype)
    q, k, v = (t.view(T, -1, D).float() for t in qkv.split([H * D, G * D, G * D], dim=1))
    angle = randn(T, D // 2, seed=1).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    norms = (randn(D, dtype=dtype, seed=2), randn(D, dtype=dtype, seed=3)) if normed else None
    if norms:
        q, k = ((t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6)) * w.float() for t, w in zip((q, k), norms, strict=True))
    turned = [t * cos.float()[:, None] + torch.cat([-t[..., D // 2 :], t[..., : D // 2]], -1) * sin.float()[:, None] for t in (q, k)]
    pools = torch.zeros(9, G, D, dtype=dtype), torch.zeros(9, G, D, dtype=dtype)
    write = torch.tensor([7, 0, 4])
    kernels.rotate_and_write(qkv, (H, G, D), cos, sin, norms, 1e-6, pools, write)
    assert close(qkv[:, : H * D], turned[0].flatten(1), dtype) and close(pools[0][write], turned[1], dtype)
    assert torch.equal(pools[1][write], v.to(dtype)) and not pools[1][[1, 2, 3, 5, 6, 8]].any()


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("D", [16, 64, 128])
def test_attend(dtype, window, D):
    H, G, block, lengths = 6, 2, 16, [1, 2, 15, 16, 17, 0, 64, 83]
    T = len(lengths)
    k, v, q = (randn(64 * block, G, D, dtype=dtype, seed=i) for i in range(2)), None, randn(T, (H + 2 * G) * D, dtype=dtype, seed=2)
    k, v = k
    table = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i))[:6] for i in range(T)]).int()
    paging = Paging(torch.arange(T, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32), table, block)
    out = kernels.attend(q, (H, G, D), (k, v), paging, D**-0.5, window)
    for t, n in enumerate(lengths):
        rows = [int(table[t, j // block]) * block + j % block for j in range(n)][-window if window else 0 :]
        if not rows:
            continue  # run elsewhere, so not written
        queries = q[t, : H * D].view(G, H // G, D).float()
        p = torch.softmax(torch.einsum("grd,jgd->grj", queries, k[rows].float()) * D**-0.5, -1)
        assert close(out[t], torch.einsum("grj,jgd->grd", p, v[rows].float()).flatten(), dtype), (t, n)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("heads", [(3, 3, 64), (6, 2, 32), (7, 1, 96), (4, 2, 80), (2, 2, 72), (4, 2, 20)])
@pytest.mark.parametrize("window", [None, 700])
def test_attend_over_long_sequences(dtype, heads, window):
    """Rows whose tokens are cut into chunks, beside others and rows of one sequence together; alone they give the same bits."""
    (H, G, D), block = heads, 16
    pieces = [(1300, 1), (5, 3), (1024, 1), (0, 0), (513, 12), (512, 1)]  # the last row's length, rows
    blocks = 6 * 82
    k, v = (randn(blocks * block, G, D, dtype=dtype, seed=i) for i in range(2))
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).view(6, 82).int()
    rows = [(s, last - n + 1 + i) for s, (last, n) in enumerate(pieces) for i in range(n)]
    q = randn(len(rows), H * D, dtype=dtype, seed=2)

    def attend(which):
        sequence, length = (torch.tensor(x, dtype=torch.int32) for x in zip(*(rows[t] for t in which), strict=True))
        return kernels.attend(q[which], heads, (k, v), Paging(sequence, length, table, block), D**-0.5, window)

    together = attend(list(range(len(rows))))
    for t, (s, n) in enumerate(rows):
        seen = [int(table[s, j // block]) * block + j % block for j in range(n)][-window if window else 0 :]
        p = torch.softmax(torch.einsum("grd,jgd->grj", q[t].view(G, H // G, D).float(), k[seen].float()) * D**-0.5, -1)
        assert close(together[t], torch.einsum("grj,jgd->grd", p, v[seen].float()).flatten(), dtype), (s, n)
        assert torch.equal(attend([t])[0], together[t]), (s, n)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_swiglu(dtype):
    x = 4 * randn(3, 2 * 50, dtype=dtype)
    x[0, :4] = torch.tensor([-200.0, 200.0, -90.0, 0.0])
    assert close(kernels.swiglu(x), torch.nn.functional.silu(x[:, :50].float()) * x[:, 50:].float(), dtype)


def parts_of(packs, places, starts, widths):
    """The tables of three slots; a pack's adapters are at `places`."""
    A, B, rank = (np.zeros((len(packs), 3), kind) for kind in (np.int64, np.int64, np.int32))
    for part, (pack, mine) in enumerate(zip(packs, places, strict=True)):
        A[part, list(mine)], rank[part, list(mine)] = pack.addresses("A")
        B[part, list(mine)] = pack.addresses("B")[0]
    return kernels.LoraParts(np.array(starts), np.array(widths), A, B, rank, packs)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("inputs, widths", [(64, (96,)), (33, (7, 40)), (576, (576, 192, 192))])
def test_lora(dtype, inputs, widths):
    """Different ranks, odd sizes, rows without an adapter, several modules side by side."""
    ranks = [16, 3, 1]
    sites = [
        [{"A": randn(r, inputs, dtype=dtype, seed=10 * p + s), "B": randn(r, w, dtype=dtype, seed=50 + s).T} for s, r in enumerate(ranks)]
        for p, w in enumerate(widths)
    ]
    packs = [PackList([Packed(None, t) for t in site]) for site in sites]  # type: ignore[arg-type]
    slots = torch.tensor([1, -1, 0, 0, 2, 1], dtype=torch.int32)
    x, y = randn(len(slots), inputs, dtype=dtype, seed=3), randn(len(slots), sum(widths) + 5, dtype=dtype, seed=4)
    before = y.clone()
    kernels.lora(x, y, slots, parts_of(packs, [range(3)] * len(packs), np.cumsum([0, *widths[:-1]]), widths))
    assert torch.equal(y[:, sum(widths) :], before[:, sum(widths) :]) and torch.equal(y[1], before[1])
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            added = torch.cat([x[t].float() @ s[slot]["A"].float().T @ s[slot]["B"].float().T for s in sites])
            assert close(y[t, : sum(widths)], before[t, : sum(widths)].float() + added, dtype), t


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("inputs", [64, 33])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_bottleneck_and_scale(dtype, inputs, activation):
    shapes = [{"D": (r, inputs), "d": (r,), "U": (inputs, r), "u": (inputs,), "g": (inputs,)} for r in (16, 3, 1)]
    tensors = [{n: randn(*shape, seed=7 * i + ord(n)) for n, shape in site.items()} for i, site in enumerate(shapes)]
    packs = PackList([Packed(None, {n: t if n == "g" else t.to(dtype) for n, t in site.items()}) for site in tensors])  # type: ignore[arg-type]
    slots = torch.tensor([1, -1, 0, 2, 0], dtype=torch.int32)
    h, y = randn(5, inputs, dtype=dtype, seed=3), randn(5, inputs, dtype=dtype, seed=4)
    got, scaled = y.clone(), h.clone()
    kernels.bottleneck(h, got, slots, packs, list(ops.ACTIVATIONS).index(activation))
    kernels.scale(scaled, slots, packs)
    assert torch.equal(got[1], y[1]) and torch.equal(scaled[1], h[1])
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            w = {n: x.float() for n, x in packs.items[slot].tensors.items()}
            inside = ops.ACTIVATIONS[activation](w["D"] @ h[t].float() + w["d"])
            assert close(got[t], y[t].float() + w["U"] @ inside + w["u"], dtype), t
            assert close(scaled[t], h[t].float() * (1 + w["g"]), dtype), t


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("inputs, outputs", [(96, 70), (160, 96)])
def test_runs_of_rows_equal_rows_alone(dtype, inputs, outputs):
    """Runs of every length, on tiles or not, give each row what it gets alone, to the last bit; ranks below, at and beyond a tile's."""
    runs, ranks = [1, 2, 3, 4, 15, 16, 17, 40], [1, 7, 16, 24, 32, 40, 16, 3]
    tensors = [
        {"A": (r, inputs), "B": (r, outputs), "D": (r, inputs), "d": (r,), "U": (r, outputs), "u": (outputs,), "g": (inputs,)}
        for r in ranks
    ]
    made = [{n: randn(*shape, seed=9 * i + ord(n)) for n, shape in site.items()} for i, site in enumerate(tensors)]
    made = [{n: t if n == "g" else (t.T if n in "BU" else t).to(dtype) for n, t in site.items()} for site in made]
    pack = PackList([Packed(None, site) for site in made])  # type: ignore[arg-type]
    slots = torch.tensor([s for s, n in enumerate(runs) for _ in range(n)], dtype=torch.int32)
    x, y = randn(len(slots), inputs, dtype=dtype), randn(len(slots), outputs, dtype=dtype, seed=1)
    for kernel, target in (
        (lambda a, b, s: kernels.lora(a, b, s, pack.lora_parts), y),
        (lambda a, b, s: kernels.bottleneck(a, b, s, pack, 2), y),
        (lambda a, b, s: kernels.scale(b, s, pack), x),
    ):
        together = target.clone()
        kernel(x, together, slots)
        alone = target.clone()
        for t in range(len(slots)):
            kernel(x[t : t + 1], alone[t : t + 1], slots[t : t + 1])
        assert torch.equal(together, alone)
    for t, s in enumerate(slots.tolist()):
        got = y[t : t + 1].clone()
        kernels.lora(x[t : t + 1], got, slots[t : t + 1], pack.lora_parts)
        want = y[t].float() + x[t].float() @ made[s]["A"].float().T @ made[s]["B"].float().T
        assert close(got[0], want, dtype), (t, ranks[s])


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_lora_where_a_part_has_no_adapter(dtype):
    """Slots that one part knows and another does not: nothing is added there."""
    site = [{"A": randn(4, 64, dtype=dtype, seed=s), "B": randn(4, 32, dtype=dtype, seed=5 + s).T} for s in range(2)]
    packs = [PackList([Packed(None, t)]) for t in site]  # type: ignore[arg-type]
    x, y = randn(3, 64, dtype=dtype), randn(3, 100, dtype=dtype, seed=9)
    got = y.clone()
    kernels.lora(x, got, torch.tensor([1, 0, 2], dtype=torch.int32), parts_of(packs, [[0], [1]], [0, 60], [32, 32]))
    for t, (start, t_site) in enumerate([(60, site[1]), (0, site[0])]):
        want = y[t].float().clone()
        want[start : start + 32] += x[t].float() @ t_site["A"].float().T @ t_site["B"].float().T
        assert close(got[t], want, dtype)
        kept = [i for i in range(100) if not start <= i < start + 32]
        assert torch.equal(got[t, kept], y[t, kept])
    assert torch.equal(got[2], y[2])


@pytest.mark.skipif(not native.has_tiles(), reason="this processor has no matrix tiles")
@pytest.mark.parametrize("T", [1, 15, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("outputs", [32, 40, 192])
def test_tiles(T, outputs):
    w, b, x = (randn(*s, dtype=torch.bfloat16, seed=i) for i, s in enumerate([(outputs, 96), (outputs,), (70, 96)]))
    packed = native_quantized.Projection([native_quantized.tiles_of(w)], b)
    assert close(packed(x[:T]), torch.nn.functional.linear(x[:T].float(), w.float(), b.float()), torch.bfloat16)
    assert torch.equal(packed(x[:T])[-1:], packed(x[T - 1 : T])), "a row's result must not depend on the rows beside it"


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_largest_is_the_first_of_equals_and_shows_nan(dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    x = randn(5, 1000, dtype=dtype)
    x[1], x[2, 999], x[3, [30, 700]], x[4, 3] = 2.0, 50.0, 9.0, torch.nan
    values, places = ops.largest(x)
    assert places[:4].tolist() == [int(x[0].float().argmax()), 0, 999, 30]
    assert values[1:4].tolist() == [2.0, 50.0, 9.0] and bool(values[4].isnan())


def test_without_a_compiler_the_reason_is_said(monkeypatch):
    for name, value, said in (("TRIMTAB_NATIVE", "0", "TRIMTAB_NATIVE"), ("CXX", "/nowhere/c++", "/nowhere/c++")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            library, why = native.load.__wrapped__()
            assert library is None and said in why


def test_a_library_that_others_may_write_is_not_loaded(tmp_path, monkeypatch):
    """A copy of the one that is loaded: building it again takes 13 s."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    (tmp_path / "native").mkdir(mode=0o700)
    built = Path(shutil.copy(native.load()[0]._name, tmp_path / "native"))
    library, why = native.load.__wrapped__()
    assert library is not None and library._name == str(built), why
    built.chmod(0o777)
    library, why = native.load.__wrapped__()
    assert library is None and "others may write it" in why


def test_gradients_and_other_dtypes_do_not_come_here():
    assert native.available(torch.zeros(1)) and not native.available(torch.zeros(1, dtype=torch.float64))
    assert not native.available(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
    with torch.enable_grad():
        assert not native.available(torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_of_one_input_side_by_side(dtype):
    x, weights = torch.randn(7, 24).to(dtype), [torch.randn(n, 24).to(dtype) for n in (5, 16, 1)]
    biases = [torch.randn(5).to(dtype), None, torch.randn(1).to(dtype)]
    each = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
    matrices = [SimpleNamespace(shape=w.shape, matmul=partial(_matmul, w)) for w in weights]
    assert close(ops.linears(x, matrices, biases), torch.cat(each, dim=1).float(), dtype)


def _matmul(weight_OI, x_TI, bias_O, out):
    assert ops.linear_into(out, x_TI, weight_OI, bias_O) is out
