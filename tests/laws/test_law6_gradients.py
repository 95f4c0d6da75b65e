"""Law 6, gradients: co-trained equals solo, dropout included; and both equal autograd through the plain form of each method.

(Trajectories, with optimizers, clipping and accumulation, are law 6's other half: tests/laws/test_law6_trajectories.py.)
"""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.laws.common import CASES, base_of, difference, gradient_difference, method_of, noisy, plain_of, tokens, with_dropout
from tests.laws.plain import plain_logits
from tests.tiny import FAMILIES
from trimtab import ops
from trimtab.bases.weights import weight_of
from trimtab.forward.batch import Piece
from trimtab.forward.hosts import Around
from trimtab.forward.packs import PackList
from trimtab.methods import LoraConfig
from trimtab.methods.base import Packed, Rows, Span


def _trained(base, case, p):
    """An adapter whose tensors want gradients; two of the same case would share nothing."""
    adapter = noisy(base, with_dropout(method_of(case, base.spec), p), seed=CASES.index(case))
    adapter.params = {k: t.requires_grad_() for k, t in adapter.params.items()}
    return adapter


def _losses(base, adapters, data, seeds):
    """One loss an adapter, from one mixed forward: its own mean over its own tokens."""
    mix, members = base.mix(adapters, packed=lambda a: base.attached.pack(a.method, a.params, a.sites))
    flat = [(i, rows[k]) for k in range(max(map(len, data))) for i, rows in enumerate(data) if k < len(rows)]  # members interleave
    batch = base.batch([Piece(torch.tensor(ids), members[i], seed=(seeds or {}).get(members[i])) for i, ids in flat], mix)
    logits_TV = base.attached.head(base.attached.forward(batch), batch, range(batch.total))
    sums, counts = [0.0] * len(adapters), [0] * len(adapters)
    for (i, ids), (a, b) in zip(flat, batch.where, strict=True):
        sums[i] = sums[i] + F.cross_entropy(logits_TV[a : b - 1].float(), torch.tensor(ids[1:]), reduction="sum")
        counts[i] += len(ids) - 1
    return [s / n for s, n in zip(sums, counts, strict=True)]


def _gradients(adapter):
    found = {k: t.grad for k, t in adapter.params.items()}
    assert all(g is not None for g in found.values()), [k for k, g in found.items() if g is None]
    for t in adapter.params.values():
        t.grad = None
    return found


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("family", FAMILIES)
def test_co_trained_gradients_equal_solo_ones(family, p):
    base = base_of(family)
    adapters = [_trained(base, c, p) for c in CASES]
    data = [[tokens(4 + (5 * i + 3 * k) % 17, 30 * i + k) for k in range(2)] for i in range(len(CASES))]
    seeds = {i: 11 + i for i in range(len(CASES))}
    losses = _losses(base, adapters, data, seeds)
    sum(losses).backward()
    mixed = [_gradients(a) for a in adapters]
    for i, (case, adapter) in enumerate(zip(CASES, adapters, strict=True)):
        alone = _losses(base, [adapter], [data[i]], {0: seeds[i]})[0]
        alone.backward()
        assert difference(losses[i].detach(), alone.detach()) <= 1e-5, case
        for name, want in _gradients(adapter).items():
            assert want.abs().max() > 1e-6, f"{case} {name} gets no gradient to speak of"
            assert gradient_difference(mixed[i][name], want) <= 1e-4, (case, name)


@pytest.mark.parametrize("case", CASES)
def test_a_seed_fixes_the_dropout_and_another_changes_it(case):
    base, adapter = base_of("llama"), _trained(base_of("llama"), case, 0.4)
    losses = [_losses(base, [adapter], [[tokens(20, 1)]], {0: s} if s else None)[0].item() for s in (1, 1, 2, None)]
    assert losses[0] == losses[1]
    if with_dropout(adapter.method, 0.0) != adapter.method and not case.startswith("lora-head"):
        assert losses[0] != losses[2] and losses[0] != losses[3]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_autograd_through_the_plain_form(family, case):
    base, adapter, ids = base_of(family), _trained(base_of(family), case, 0.0), tokens(19, 3)
    results = []
    for logits in (base.logits([ids], [adapter], grad=True)[0], plain_logits(plain_of(family), adapter, ids)):
        F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).backward()
        results.append(_gradients(adapter))
    for name, want in results[1].items():
        assert gradient_difference(results[0][name], want) <= 1e-4, name


def test_a_gradient_is_the_slope_of_the_loss():
    """Finite differences of the whole forward, in the direction of the gradient of each adapter; with dropout on."""
    base = base_of("llama")
    for case in CASES:
        adapter = _trained(base, case, 0.3)
        data, seeds = [[tokens(16, 4), tokens(9, 5)]], {0: 7}
        _losses(base, [adapter], data, seeds)[0].backward()
        gradients = _gradients(adapter)
        if adapter.method.peft_type == "LORA" and adapter.method.use_dora:
            gradients = {
                k: g if "magnitude" in k else 0 * g for k, g in gradients.items()
            }  # its norm is a constant in the backward, by definition
        size = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        ends = []
        for step in (1e-2, -1e-2):
            moved = noisy(base, adapter.method, seed=CASES.index(case))
            moved.params = {k: (t + step * gradients[k] / size).detach() for k, t in adapter.params.items()}
            ends.append(_losses(base, [moved], data, seeds)[0].item())
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(size, rel=2e-2, abs=1e-3), case


# ---- dropout -----------------------------------------------------------------------------------------------------------------------------


def test_dropout_is_inverted_and_seeded_by_adapter_and_site():
    x = torch.ones(400, 50)
    keys = torch.from_numpy(ops.row_keys(3, 400))
    y = ops.dropout(x, 0.25, keys, 9)
    assert y.unique().tolist() == pytest.approx([0.0, 1.0 / 0.75])
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(y, ops.dropout(x, 0.25, keys, 9))
    others = torch.from_numpy(ops.row_keys(4, 400))
    assert not torch.equal(y, ops.dropout(x, 0.25, keys, 10)) and not torch.equal(y, ops.dropout(x, 0.25, others, 9))
    assert ops.dropout(x, 0.25, None, 9) is x and ops.dropout(x, 0.0, keys, 9) is x
    beside = ops.dropout(x, 0.25, torch.cat([others[:100], keys[:300]]), 9)
    assert torch.equal(beside[100:], y[:300]) and not torch.equal(beside[:100], y[:100])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_are_random_over_rows_columns_sites_and_seeds(p):
    """Mean and correlations of neighbours in every direction, within five standard deviations of independent draws."""
    x, n = torch.ones(256, 512), 256 * 512

    def mask(seed, site):
        return (ops.dropout(x, p, torch.from_numpy(ops.row_keys(seed, 256)), site) != 0).double()

    m, sigma = mask(7, 3), math.sqrt(p * (1 - p))
    assert abs(float(m.mean()) - (1 - p)) < 5 * sigma / math.sqrt(n)
    centred = lambda m: m - (1 - p)  # noqa: E731
    for a, b in [(m[1:], m[:-1]), (m[:, 1:], m[:, :-1]), (m[2:], m[:-2]), (m, mask(8, 3)), (m, mask(7, 4)), (m, m.flip(0)), (m, m.flip(1))]:
        assert abs(float((centred(a) * centred(b)).mean())) < 5 * sigma**2 / math.sqrt(a.numel() / 2)
    assert float(m.mean(0).std()) == pytest.approx(sigma / math.sqrt(256), rel=0.2)
    assert float(m.mean(1).std()) == pytest.approx(sigma / math.sqrt(512), rel=0.2)


# ---- kernels in double precision ---------------------------------------------------------------------------------------------------------


def _double(*shape, seed, requires_grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_(requires_grad)


def _slow_attention(q, k, v, offset, mask, scaling, softcap, window):
    """One query and one head at a time, as the docstring of ops.attention says it."""
    out = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                readable = [j for j in range(k.shape[1]) if j <= i + offset and (window is None or i + offset - j < window)]
                readable = [j for j in range(k.shape[1]) if mask[b, i, j]] if mask is not None else readable
                scores = torch.stack([scaling * q[b, i, h] @ k[b, j, g] for j in readable])
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out.append(torch.softmax(scores, 0) @ torch.stack([v[b, j, g] for j in readable]))
    return torch.stack(out).view(*q.shape[:3], v.shape[-1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("Q", "offset"), [(7, 0), (5, 2), (1, 4)])
def test_attention_equals_a_loop_in_both_directions(Q, offset, softcap, window, masked, monkeypatch):
    monkeypatch.setattr(ops.attend, "QUERY_BLOCK", 3)
    q, k, v = _double(2, Q, 4, 3, seed=1), _double(2, Q + offset, 2, 3, seed=2), _double(2, Q + offset, 2, 3, seed=3)
    mask = None
    if masked:  # the window is in the mask, as attention.py gives it
        distance = torch.arange(Q)[:, None] + offset - torch.arange(Q + offset)
        mask = ((distance >= 0) & (distance < (window or 99))).expand(2, -1, -1).clone()
        mask[1, :, 0] &= distance[:, 0] == 0  # a key that only its own query may read
    arguments = (offset, mask, 0.6, softcap, None if masked else window)
    assert torch.allclose(ops.attention(q, k, v, *arguments), _slow_attention(q, k, v, *arguments), atol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: ops.attention(*t, *arguments), (q, k, v), fast_mode=True)
    for got, want in zip(
        _grads(ops.attention(q, k, v, *arguments), q, k, v), _grads(_slow_attention(q, k, v, *arguments), q, k, v), strict=True
    ):
        assert torch.allclose(got, want, atol=1e-12)


def _grads(out, *inputs):
    return torch.autograd.grad((out * torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()).sum(), inputs, retain_graph=True)


def test_padding_queries_stay_finite_and_pass_nothing_back():
    """What a query that may read nothing computes is never looked at: nothing comes back to it, and nothing must go on from it."""
    q, k, v = _double(1, 2, 2, 3, seed=1), _double(1, 4, 2, 3, seed=2), _double(1, 4, 2, 3, seed=3)
    mask = torch.tensor([[[True, True, False, False], [False] * 4]])
    out = ops.attention(q, k, v, 2, mask, 1.0, None, None)
    assert out.isfinite().all()
    dq, dk, dv = torch.autograd.grad(out[0, 0].sum(), (q, k, v))
    assert (dq[0, 1] == 0).all() and all(g.isfinite().all() for g in (dq, dk, dv)) and (dk[0, 2:] == 0).all() and (dv[0, 2:] == 0).all()


ROWS = Rows((Span(1, 4, 1), Span(5, 7, 0), Span(7, 8, 1)), 9, torch.device("cpu"), torch.from_numpy(ops.row_keys(5, 9)))
"""Two adapters, one of them with two spans, rows of nobody before, between and after."""


def _around(W, b):
    linear = torch.nn.Linear(W.shape[1], W.shape[0], dtype=torch.float64)
    call = lambda x: F.linear(x, W, b)  # noqa: E731
    linear.weight.data, linear.bias.data = W.detach().clone(), b.detach().clone()
    return Around(linear, weight_of(linear), 3, call, call)


KERNELS = {
    "lora": (ops.lora, {"A": (2, 4), "B": (3, 2)}),
    "dora": (ops.dora, {"A": (2, 4), "B": (3, 2), "g": (3,)}),
    "scale_input": (ops.scale_input, {"g": (4,)}),
    "scale_output": (ops.scale_output, {"g": (3,)}),
    "bottleneck": (ops.Bottleneck("gelu", False), {"D": (2, 3), "d": (2,), "U": (3, 2), "u": (3,)}),
    "parallel": (ops.Bottleneck("tanh", True), {"D": (2, 4), "d": (2,), "U": (3, 2), "u": (3,)}),
    "replace": (ops.replace, {"weight": (3, 4), "bias": (3,)}),
}


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_pass_gradcheck(name, p):
    kernel, shapes = KERNELS[name]
    x, W, b = _double(9, 4, seed=1), _double(3, 4, seed=2, requires_grad=False), _double(3, seed=3, requires_grad=False)
    tensors = [_double(*shape, seed=10 * slot + i) for slot in range(2) for i, shape in enumerate(shapes.values())]

    def run(x, *flat):
        halves = flat[: len(shapes)], flat[len(shapes) :]
        packs = PackList([Packed(kernel, dict(zip(shapes, half, strict=True)), p) for half in halves])
        return kernel(x, base=_around(W, b), packs=packs, rows=ROWS)

    assert torch.autograd.gradcheck(run, (x, *tensors))
    assert torch.autograd.gradcheck(lambda *t: run(x.detach(), *t), tensors), "nothing below the site wants a gradient"
    outside = [0, 4, 8]
    assert torch.allclose(run(x, *tensors)[outside], F.linear(x, W, b)[outside], atol=0)


def test_lora_with_dropout_equals_autograd():
    """The hand-written backward against the formula, masks as ops.dropout draws them."""
    x, W, b = _double(9, 4, seed=1), _double(3, 4, seed=2, requires_grad=False), _double(3, seed=3, requires_grad=False)
    factors = [_double(2, 4, seed=4), _double(3, 2, seed=5), _double(1, 4, seed=6), _double(3, 1, seed=7)]
    packs = PackList([Packed(ops.lora, {"A": factors[2 * i], "B": factors[2 * i + 1]}, 0.5) for i in range(2)])
    want = F.linear(x, W, b)
    for s in ROWS.spans:
        A, B = factors[2 * s.slot], factors[2 * s.slot + 1]
        inside = F.pad(ops.dropout(x[s.start : s.stop], 0.5, ROWS.keys(s), 3) @ (B @ A).T, (0, 0, s.start, 9 - s.stop))
        want = want + inside
    got = ops.lora(x, base=_around(W, b), packs=packs, rows=ROWS)
    assert torch.allclose(got, want, atol=1e-12)
    for a, c in zip(_grads(got, x, *factors), _grads(want, x, *factors), strict=True):
        assert torch.allclose(a, c, atol=1e-12)


def test_doras_norm_is_a_constant_in_the_backward():
    base, ids = base_of("llama"), tokens(8, 1)
    adapter = noisy(base, LoraConfig(r=2, use_dora=True, target_modules=("q_proj",)))
    site = adapter.sites[0]
    mine = {t: adapter.params[site.key(t)].clone().requires_grad_() for t in site.shapes}
    W, x = base.model.get_submodule(site.name).weight, torch.randn(len(ids), 48, generator=torch.Generator().manual_seed(2))
    packed = adapter.method.pack(site, mine, torch.float32, base.matrix(site.name))
    call = lambda x: x @ W.T  # noqa: E731
    rows = Rows((Span(0, len(ids), 0),), len(ids), torch.device("cpu"))
    got = ops.dora(x, Around(base.model.get_submodule(site.name), base.matrix(site.name), 0, call, call), PackList([packed]), rows)
    V = W + site.scaling * mine["lora_B.weight"] @ mine["lora_A.weight"]
    norms = [V.norm(dim=1, keepdim=True).detach(), V.norm(dim=1, keepdim=True)]
    constant, moving = (x @ (mine["lora_magnitude_vector"][:, None] * V / n).T for n in norms)
    leaves = list(mine.values())
    ours, want, other = (_grads(y, *leaves) for y in (got, constant, moving))
    assert all(gradient_difference(a, b) <= 1e-4 for a, b in zip(ours, want, strict=True))
    assert gradient_difference(other[0], want[0]) > 1e-2, "here the two must differ, or this test says nothing"
