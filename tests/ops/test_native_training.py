"""Training's native kernels inside their autograd Functions, forward and backward, against the same formulas in float64 and in torch.

Tolerances: float32 within 1e-6 of the largest value; bfloat16 within half a unit in the last place (2⁻⁸ of the value) for each rounding
that the formula has, and never worse than torch's own operations in bfloat16.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trimtab import ops
from trimtab.methods.base import Rows, Span
from trimtab.ops import compiled, edit, native, native_training

pytestmark = pytest.mark.skipif(native.load()[0] is None, reason=f"no native kernels: {native.load()[1]}")
ROUNDING = 2.0**-8
EPS = 1e-5


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.fixture
def called(monkeypatch):
    """The names of the kernels that were called, in order."""
    names = []

    def recorded(name, f):
        def wrapper(*args, **kwargs):
            names.append(name)
            return f(*args, **kwargs)

        return wrapper

    for name in ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "rotate", "lora", "lora_backward"):
        monkeypatch.setattr(native_training, name, recorded(name, getattr(native_training, name)))
    return names


def grads_of(f, inputs, dy):
    """[f(inputs), and the gradient of each input for dy]."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = f(*leaves)
    y.backward(dy.to(y.dtype).expand(y.shape))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def three_ways(f, inputs, dy, monkeypatch, called, names):
    """Results of f natively, in torch's own operations of the same dtype, and in float64."""
    got = grads_of(f, inputs, dy)
    assert called == names, "the native kernels ran"
    with monkeypatch.context() as without:
        without.setattr(native, "available", lambda *_: False)
        plain = grads_of(f, inputs, dy)
    exact = grads_of(f, [x.double() for x in inputs], dy.double())
    assert called == names
    return got, plain, exact


def check(got, plain, exact, roundings=1):
    for ours, theirs, want in zip(got, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if not want.numel():
            continue
        error, largest = (ours.double() - want).abs(), want.abs().max()
        if ours.dtype == torch.float32:
            assert error.max() <= 1e-6 * largest
        else:
            assert (error <= roundings * ROUNDING * 1.01 * want.abs() + 1e-6 * largest).all()
            assert error.max() <= 1.01 * (theirs.double() - want).abs().max() + 1e-6 * largest


def norm(weight):
    return lambda x: ops.rms_norm(x, weight.to(x.dtype), EPS)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (5, 576), (3, 33), (4, 7), (3, 2, 16)])
def test_rms_norm(dtype, shape, monkeypatch, called):
    x, w, dy = randn(*shape, dtype=dtype, scale=3), randn(shape[-1], seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    ways = three_ways(norm(w), [x], dy, monkeypatch, called, ["rms_norm", "rms_norm_backward"])
    check(*ways, roundings=2)
    if dtype == torch.bfloat16 and x.numel():
        assert (ways[0][0] == ways[1][0]).float().mean() > 0.95, "rounded twice, as Llama does"


@pytest.mark.parametrize("way", ["native", "torch", "compiled"])
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("shape", [(5, 48), (3, 2, 16)])
def test_rms_norm_gives_its_weight_a_gradient(shape, dtype, way, monkeypatch):
    """Where it trains: full fine-tuning, modules_to_save."""
    if way != "native":
        monkeypatch.setattr(native, "available", lambda *tensors: False)
    if way == "compiled":
        monkeypatch.setattr(compiled, "_compiled", lambda formula: formula)
    x, w, dy = randn(*shape, dtype=dtype), randn(shape[-1], seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    run = compiled.rms_norm if way == "compiled" else ops.rms_norm
    dx, dw = torch.autograd.grad(run(x.requires_grad_(), w.requires_grad_(), EPS), [x, w], dy)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = torch.autograd.grad(w64 * x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + EPS), [x64, w64], dy.double())
    for ours, want in zip((dx, dw), exact, strict=True):
        assert ours.dtype == dtype and ours.shape == want.shape
        assert (ours.double() - want).norm() <= (1e-6 if dtype == torch.float32 else 2**-7) * want.norm()


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_rms_norm_of_rows_apart(dtype, monkeypatch, called):
    """A view whose rows do not touch, and a gradient that is one number for all."""
    x, w = randn(6, 64, dtype=dtype), randn(24, seed=1, dtype=dtype)
    f = norm(w)
    ways = three_ways(lambda v: f(v[::2, 8:32]), [x], torch.tensor(0.5), monkeypatch, called, ["rms_norm", "rms_norm_backward"])
    check(*ways, roundings=2)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("shape", [(0, 32), (1, 1), (3, 50), (1, 5, 96)])
def test_swiglu(dtype, shape, monkeypatch, called):
    gate, up, dy = (randn(*shape, seed=i, dtype=dtype, scale=s) for i, s in enumerate((4, 2, 1)))
    ways = three_ways(ops.swiglu, [gate, up], dy, monkeypatch, called, ["swiglu", "swiglu_backward"])
    check(*ways)


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_swiglu_of_halves_and_far_out(dtype, monkeypatch, called):
    """Gate and up as views of one tensor; gates where e^-x is nothing or everything."""
    x, dy = randn(1, 3, 100, dtype=dtype), randn(1, 3, 50, seed=1, dtype=dtype)
    x[0, 0, :6] = torch.tensor([-200.0, 200.0, -89.0, 88.5, 0.0, -1e30])
    names = ["swiglu", "swiglu_backward"]
    check(*three_ways(lambda v: ops.swiglu(*v.chunk(2, dim=-1)), [x], dy, monkeypatch, called, names))


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("layout", ["rows", "heads first", "turned"])
@pytest.mark.parametrize("T, H, D", [(0, 3, 16), (1, 1, 2), (5, 3, 64), (4, 9, 20)])
def test_rotate(dtype, layout, T, H, D, monkeypatch, called):
    angle = randn(T, D, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)  # halves that differ: the backward is the transpose, not the inverse
    shape, view = {
        "rows": ((T, H, D), lambda x: x),
        "heads first": ((H, T, D), lambda x: x.transpose(0, 1)),
        "turned": ((T, D, H), lambda x: x.transpose(1, 2)),
    }[layout]
    ways = three_ways(
        lambda x: ops.rotate(view(x), cos.to(x.dtype), sin.to(x.dtype)),
        [randn(*shape, dtype=dtype)], randn(T, H, D, seed=2, dtype=dtype), monkeypatch, called, ["rotate", "rotate"],
    )  # fmt: skip
    check(*ways)


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(dtype, bad, monkeypatch, called):
    """In the same places as in float64, in no row beside it."""
    x, other, w = randn(3, 40, dtype=dtype), randn(3, 40, seed=1, dtype=dtype), randn(40, seed=2, dtype=dtype)
    x[1, 7] = x[1, 39] = bad
    cos, sin = randn(3, 20, seed=3, dtype=dtype), randn(3, 20, seed=4, dtype=dtype)
    for f, inputs in (
        (norm(w), [x]),
        (ops.swiglu, [x, other]),
        (ops.swiglu, [other, x]),
        (lambda v: ops.rotate(v.view(3, 2, 20), cos.to(v.dtype), sin.to(v.dtype)).flatten(1), [x]),
    ):
        for dy in (randn(3, 40, seed=5, dtype=dtype), x):
            called.clear()
            got = grads_of(f, inputs, dy)
            assert len(called) == 2
            for ours, want in zip(got, grads_of(f, [v.double() for v in inputs], dy.double()), strict=True):
                assert torch.equal(ours.isfinite(), want.isfinite()) and torch.equal(ours.isnan(), want.isnan())


# ---- LoRA ----


def lora_way(dtype, spans, x, weight, pairs, dy, *, p=0.0, plain=True, trains=True):
    """[y, dx, and dA, dB of each adapter] of `ops.lora`; not plain: the module's result comes from an edit before."""
    x, dy, weight = (t.to(dtype).clone() for t in (x, dy, weight))
    x.requires_grad_()
    factors = [{n: t.to(dtype).requires_grad_(trains) for n, t in pair.items()} for pair in pairs]

    class Base:
        site = 3

        def __init__(self):
            self.plain, self.matrix = plain, SimpleNamespace(matmul_t=lambda dy: dy @ weight)

        def __call__(self, rows):
            return rows @ weight.T

    packs = SimpleNamespace(items=[SimpleNamespace(tensors=t, dropout=p) for t in factors])
    rows = Rows(tuple(Span(a, b, s) for s, a, b in spans), len(x), x.device, torch.from_numpy(ops.row_keys(11, len(x))))
    y = ops.lora(x, Base(), packs, rows)
    y.backward(dy)
    return [y.detach(), x.grad, *(t.grad for pair in factors for t in pair.values() if trains)]


def lora_inputs(T, inputs, outputs, ranks):
    pairs = [{"A": randn(r, inputs, seed=9 + i), "B": randn(outputs, r, seed=20 + i)} for i, r in enumerate(ranks)]
    pairs = [{n: t.bfloat16().float() for n, t in pair.items()} for pair in pairs]
    return (
        [t.bfloat16().float() for t in (randn(T, inputs), 0.1 * randn(outputs, inputs, seed=1))],
        pairs,
        randn(T, outputs, seed=2).bfloat16(),
    )


def check_lora(spans, T, inputs, outputs, ranks, monkeypatch, called, kernels=True, **options):
    (x, weight), pairs, dy = lora_inputs(T, inputs, outputs, ranks)
    got = lora_way(torch.bfloat16, spans, x, weight, pairs, dy, **options)
    ran = [*["lora"] * len(spans), *["lora_backward"] * len(spans)] if kernels and native.has_tiles() else []
    assert called == ran
    assert all(torch.equal(a, b) for a, b in zip(got, lora_way(torch.bfloat16, spans, x, weight, pairs, dy, **options), strict=True))
    with monkeypatch.context() as without:
        without.setattr(native, "available", lambda *_: False)
        plain = lora_way(torch.bfloat16, spans, x, weight, pairs, dy, **options)
        keep = edit.dropout

        def masked(v, p, seed, site):  # float64 would draw other masks
            return v * keep(torch.ones(v.shape, dtype=torch.bfloat16), p, seed, site).double() if p else v

        without.setattr(edit, "dropout", masked)
        exact = lora_way(torch.float64, spans, x, weight, pairs, dy, **options)
    for ours, theirs, want in zip(got, plain, exact, strict=True):
        error, own = ((t.double() - want).norm() / want.norm() for t in (ours, theirs))
        assert error <= 1.1 * own and error <= 2 * ROUNDING, (float(error), float(own))


@pytest.mark.parametrize("T", [1, 2, 15, 17, 33, 129, 300])
@pytest.mark.parametrize("inputs, outputs, rank", [(32, 64, 16), (96, 32, 8), (64, 96, 1), (64, 64, 17), (32, 32, 40)])
def test_lora(T, inputs, outputs, rank, monkeypatch, called):
    check_lora([(0, 0, T)], T, inputs, outputs, [rank], monkeypatch, called)


@pytest.mark.parametrize("options", [{}, {"plain": False}, {"p": 0.3}, {"p": 0.3, "plain": False}, {"trains": False}])
def test_lora_of_several_spans(options, monkeypatch, called):
    """Rows of no adapter, an adapter with two spans, ranks that differ; in one buffer, after another edit, with dropout, frozen."""
    check_lora([(0, 3, 40), (1, 40, 190), (0, 200, 221)], 230, 64, 96, [16, 5], monkeypatch, called, **options)


@pytest.mark.parametrize("inputs, outputs", [(40, 64), (64, 33)])
def test_lora_of_odd_widths(inputs, outputs, monkeypatch, called):
    check_lora([(0, 0, 21)], 21, inputs, outputs, [4], monkeypatch, called, kernels=False)


@pytest.mark.skipif(not native.has_tiles(), reason="no matrix tiles")
@torch.no_grad()
def test_lora_backward_in_views():
    """Rows that lie apart, a gradient that is one row for all, and dx within a larger tensor: nothing beside it is touched."""
    T, inputs, outputs, R = 37, 64, 32, 8
    wide, x = torch.full((T, 128), 7.0).bfloat16(), randn(T, 3 * inputs, dtype=torch.bfloat16)[:, inputs : 2 * inputs]
    A, B = randn(R, inputs, seed=1, dtype=torch.bfloat16), randn(R, outputs, seed=2, dtype=torch.bfloat16).T
    dy = randn(1, outputs, seed=3, dtype=torch.bfloat16).expand(T, outputs)
    t, dx = (x @ A.T), wide[:, 32:96]
    dA, dB = native_training.lora_backward(dy, x, t, A, B, dx, factors=True)
    dt = (dy.float() @ B.float()).bfloat16().float()
    for got, want in ((dA, dt.T @ x.float()), (dB, dy.float().T @ t.float()), (dx, 7 + dt @ A.float())):
        assert ((got.float() - want).abs() <= ROUNDING * 1.01 * want.abs() + 1e-5 * want.abs().max()).all()
    assert (wide[:, :32] == 7).all() and (wide[:, 96:] == 7).all()
    whole = torch.full((T, inputs), 7.0).bfloat16()
    assert native_training.lora_backward(dy, x, t, A, B, whole, factors=False) is None
    assert torch.equal(whole, dx), "the same without the factors' gradients"
