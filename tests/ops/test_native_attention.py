"""Attention on flat rows against the formula in fp64 and against the buckets, whose errors in bfloat16 it must not exceed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.laws.common import noisy, tokens
from tests.tiny import tiny_tokenizer
from trimtab import ops
from trimtab.forward import attention
from trimtab.forward.attention import LONG, AttentionPlan, attend
from trimtab.forward.buckets import lay_out, over_buckets
from trimtab.forward.kv_cache import KVCache, Run
from trimtab.methods import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from trimtab.model import Base
from trimtab.ops import native, native_attention, native_training

flat_runs = pytest.mark.skipif(
    not native.attends_flat(), reason="this processor does not multiply bfloat16, or there are no native kernels"
)
LENGTHS = [1, 15, 33, 16, 17, 31, 300, 32, 94]
CASES = [  # H, G, D, tokens of a stored prefix (two of them, shared in turn), window
    (3, 3, 64, 0, None),
    (9, 3, 64, 5, None),
    (9, 3, 64, 33, 40),
    (8, 2, 32, 0, 7),
    (8, 2, 128, 20, 33),
    (2, 1, 96, 31, None),
    (4, 1, 128, 0, 1),
]


def flat(runs: list[Run], scaling: float, window: int | None):
    index = ops.flat_index([(r.start, r.stop, r.keys) for r in runs])
    return lambda q, k, v: ops.flat_attention(q, k, v, index, scaling, window)


def buckets(runs: list[Run], scaling: float, window: int | None):
    layout = lay_out(runs, torch.device("cpu"))
    return lambda q, k, v: over_buckets(q, k, v, layout, scaling, None, window)


def formula(runs: list[Run], scaling: float, window: int | None):
    def one(r: Run, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = torch.cat([torch.arange(a, b) for a, b in r.keys])
        k, v = (x[rows].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        distance = torch.arange(r.length - r.queries, r.length)[:, None] - torch.arange(r.length)
        seen = (distance >= 0) & (distance < (window or r.length))
        scores = torch.einsum("qhd,shd->hqs", q[r.start : r.stop], k) * scaling
        return torch.einsum("hqs,shd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    return lambda q, k, v: torch.cat([one(r, q, k, v) for r in runs])


def batch(lengths: list[int], prefix: int = 0) -> list[Run]:
    runs, at, total = [], 0, sum(lengths)
    for i, n in enumerate(lengths):
        first = total + i % 2 * prefix
        runs.append(Run(at, at + n, (*([(first, first + prefix)] if prefix else []), (at, at + n))))
        at += n
    return runs


def values(runs: list[Run], H: int, G: int, D: int, seed: int = 0) -> list[Tensor]:
    """q, k, v and a gradient of the result; large enough scores that the softmax is far from flat."""
    generator = torch.Generator().manual_seed(seed)
    T, N = runs[-1].stop, max(b for r in runs for _, b in r.keys)
    return [torch.randn(*shape, generator=generator).mul(1.5).bfloat16() for shape in ((T, H, D), (N, G, D), (N, G, D), (T, H, D))]


def differentiated(f, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-9))


@flat_runs
@pytest.mark.parametrize("H, G, D, prefix, window", CASES)
def test_no_less_exact_than_the_buckets(H, G, D, prefix, window):
    runs = batch(LENGTHS, prefix)
    tensors = values(runs, H, G, D)
    exact = differentiated(formula(runs, D**-0.5, window), *(x.double() for x in tensors))
    ours, theirs = (differentiated(make(runs, D**-0.5, window), *tensors) for make in (flat, buckets))
    for a, b, want in zip(ours, theirs, exact, strict=True):
        assert error(a, want) <= 1.1 * error(b, want) and error(a, want) < 0.005


@pytest.fixture
def bfloat16_by_default():
    """What a program may have set, and what another thread has while transformers builds a model there."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@flat_runs
def test_whatever_the_default_dtype(bfloat16_by_default):
    """What a kernel writes in fp32 has room for it: half as much had been there, and the process ended."""
    runs = batch(LENGTHS)
    tensors = values(runs, 4, 2, 64)
    exact = differentiated(formula(runs, 0.125, None), *(x.double() for x in tensors))
    for a, want in zip(differentiated(flat(runs, 0.125, None), *tensors), exact, strict=True):
        assert error(a, want) < 0.005
    rows = torch.randn(300, 64, dtype=torch.float32).bfloat16()
    _, rstd = native_training.rms_norm(rows, torch.ones(64), 1e-6)
    torch.testing.assert_close(rstd, (rows.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt())


@flat_runs
def test_random_batches():
    """Lengths around the sizes of tiles and blocks, each row of each gradient by itself."""
    generator = torch.Generator().manual_seed(1)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for seed in range(20):
        H, G = pick((3, 1), (4, 4), (6, 2))
        prefix, window, D = pick(0, 1, 30, 70), pick(None, 1, 16, 50), pick(32, 64)
        runs = batch([pick(1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 64, 65, 100) for _ in range(pick(1, 2, 5))], prefix)
        tensors = values(runs, H, G, D, seed)
        got = differentiated(flat(runs, 0.1, window), *tensors)
        want = differentiated(formula(runs, 0.1, window), *(x.float() for x in tensors))
        for a, b in zip(got, want, strict=True):
            bad = (a.float() - b).norm(dim=-1) - 0.02 * b.norm(dim=-1) - 0.004 * b.norm(dim=-1).max()
            assert bad.max() <= 0, (seed, H, G, D, prefix, window, [r.queries for r in runs])


@flat_runs
def test_rows_that_are_read_twice_or_never():
    """A prompt's rows are queries of their own and keys of several sequences; some rows of the pool belong to nobody."""
    runs = [Run(0, 20, ((0, 20),)), *(Run(a, b, ((0, 20), (a, b))) for a, b in ((20, 60), (60, 61), (61, 150)))]
    tensors = values([*runs, Run(150, 150, ((150, 157),))], 6, 2, 64)
    ours, want = (differentiated(make(runs, 0.125, None), *tensors) for make in (flat, formula))
    exact = differentiated(formula(runs, 0.125, None), *(x.double() for x in tensors))
    assert not ours[2][150:].any() and not ours[3][150:].any()
    for a, b, c in zip(ours, want, exact, strict=True):
        assert error(a, c) <= max(0.005, error(b, c))
        assert error(a[:20], c[:20]) < 0.005


@flat_runs
@pytest.mark.parametrize("window", [None, 20])
def test_a_sequence_knows_nothing_of_its_neighbours(window):
    """Bit for bit what it is alone, though the rows beside it, and its own later ones, hold NaN."""
    runs = batch([33, 50, 16], 5)
    q, k, v, d_out = values(runs, 6, 2, 64)
    alone = differentiated(flat([Run(0, 50, ((100, 105), (0, 50)))], 0.125, window), q[33:83], *(
        torch.cat([x[33:83], x[:50], x[104:109]]) for x in (k, v)), d_out[33:83])  # fmt: skip
    for x in (q, k, v, d_out):
        x[:33], x[83:99] = torch.nan, torch.nan
    for x in (k, v):
        x[99:104] = torch.nan  # the prefix of the others
    together = differentiated(flat(runs, 0.125, window), q, k, v, d_out)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a[:50], b[33:83])
    assert torch.equal(alone[2][100:], together[2][104:]) and not alone[2].isnan().any()
    k[82] = torch.nan
    later = flat(runs, 0.125, window)(q, k, v)
    assert torch.equal(later[33:82], together[0][33:82]) and later[82].isnan().all()


@flat_runs
def test_the_same_at_every_run_and_number_of_threads():
    runs = batch([*LENGTHS, 5, 70], 9)
    tensors, threads = values(runs, 9, 3, 64), torch.get_num_threads()
    try:
        results = []
        for n in (threads, threads, 1, 5):
            torch.set_num_threads(n)
            results.append(differentiated(flat(runs, 0.125, None), *tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@flat_runs
def test_rows_may_lie_apart_and_scores_may_be_large():
    """Views of fused projections, a transposed gradient; scores of thousands neither overflow nor lose their largest."""
    runs = batch([40, 30])
    q, k, v, d_out = values(runs, 6, 2, 64)
    fused = torch.cat([x.flatten(1) for x in (q, k, v)], 1)
    parts = (x.unflatten(1, (-1, 64)) for x in fused.split([6 * 64, 2 * 64, 2 * 64], 1))
    turned = d_out.transpose(0, 1).contiguous().transpose(0, 1)
    index = ops.flat_index([(r.start, r.stop, r.keys) for r in runs])
    leaves = [x.detach().requires_grad_() for x in parts]
    out = ops.flat_attention(*leaves, index, 0.125, None)
    got = [out, *torch.autograd.grad(out, leaves, turned)]
    assert all(torch.equal(a, b) for a, b in zip(got, differentiated(flat(runs, 0.125, None), q, k, v, d_out), strict=True))
    large = flat(runs, 100.0, None)(q, k, v)
    assert error(large, formula(runs, 100.0, None)(q.double(), k.double(), v.double())) < 0.02


@flat_runs
def test_where_it_runs(monkeypatch):
    called: list[str] = []
    monkeypatch.setattr(attention.ops, "flat_attention", lambda q, *rest: called.append("flat") or q)
    monkeypatch.setattr(attention, "over_buckets", lambda q, *rest: called.append("buckets") or q)

    def went(dtype=torch.bfloat16, D=64, softcap=None, cache=False, rows=4):
        plan = AttentionPlan([Run(0, rows, ((0, rows),))], torch.device("cpu"))
        if cache:
            plan.cache, plan.write_T = KVCache(1, 1, rows, 1, D, dtype, plan.device), torch.arange(rows)
        q, k = torch.zeros(rows, 2, D, dtype=dtype), torch.zeros(rows, 1, D, dtype=dtype)
        attend(q, k, k, plan, 0, 0.1, softcap, None)
        return called.pop()

    assert [went(D=D) for D in (32, 64, 96, 128)] == ["flat"] * 4 and went(cache=True, rows=LONG) == "flat"
    assert [went(D=16), went(D=48), went(D=160), went(torch.float32), went(softcap=2.0), went(cache=True)] == ["buckets"] * 6
    monkeypatch.setattr(native, "attends_flat", lambda: False)
    assert went() == "buckets"


@flat_runs
def test_a_model_of_every_kind_of_prefix(monkeypatch):
    """A mixed batch of a LoRA, a stored prefix, a prompt and the base: logits and gradients as with buckets, up to rounding."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, eos_token_id=258, bos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Base(LlamaForCausalLM(config).bfloat16().eval(), tiny_tokenizer())
    methods = (
        LoraConfig(r=4, target_modules="all-linear"),
        PrefixTuningConfig(num_virtual_tokens=7),
        PromptTuningConfig(num_virtual_tokens=5),
    )
    adapters = [None, *(noisy(base, m, seed=i) for i, m in enumerate(methods))]
    entries = [(a, tokens(n, 10 * i + n)) for i, a in enumerate(adapters) for n in (40, 3, 65)]

    def run(flat: bool) -> tuple[list[Tensor], list[Tensor]]:
        calls = SimpleNamespace(count=0)
        function = native_attention.flat_attention

        def counted(*arguments):
            calls.count += 1
            return function(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(attention.ops, "takes_flat", native_attention.takes_flat if flat else lambda *tensors: False)
            patched.setattr(attention.ops, "flat_attention", counted)
            leaves = [p.requires_grad_() for a in adapters[1:] for p in a.params.values()]
            logits = base.logits([s for _, s in entries], [a for a, _ in entries], grad=True)
            gradients = torch.autograd.grad(sum(x.float().square().mean() for x in logits), leaves)
        assert calls.count == (2 if flat else 0)
        return [x.detach() for x in logits], list(gradients)

    (logits, gradients), (want_logits, want_gradients) = run(True), run(False)
    for got, want in zip([*logits, *gradients], [*want_logits, *want_gradients], strict=True):
        assert error(got, want.double()) < 0.04
