"""torch's attention for sequences of varying length, which needs a GPU: here a plain stand-in with its signature takes its place, so that
what is tested is how it is called, when it is chosen, and that a wrong one is never used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.common import EXAMPLES, difference, gradient_difference, noisy, tokens
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab import ops
from trimtab.bases import doctor
from trimtab.forward.batch import BASE, Piece
from trimtab.model import Base
from trimtab.ops import varlen


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    top_left: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` as its documentation and Flash Attention's have it, in fp32: windows count the keys before
    and after a query's own, which is at the end of the keys (top_left: at the start, as in older kernels)."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and enable_gqa == (query.shape[1] != key.shape[-2])
    assert cu_seq_q.diff().max() == max_q and cu_seq_k.diff().max() == max_k and query.dtype in varlen.DTYPES
    out, (left, right), repeat = [], window_size, query.shape[1] // key.shape[-2]
    for i in range(len(cu_seq_q) - 1):
        if block_table is None:
            k, v = (x[cu_seq_k[i] : cu_seq_k[i + 1]] for x in (key, value))
        else:
            assert seqused_k is not None and block_table.dtype == seqused_k.dtype == torch.int32
            k, v = (torch.cat([x[page] for page in block_table[i].tolist()])[: seqused_k[i]] for x in (key, value))
        q, k, v = query[cu_seq_q[i] : cu_seq_q[i + 1]].float(), k.float(), v.float()
        k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        place_Q = torch.arange(len(q)) + (0 if top_left else len(k) - len(q))
        ahead_QK = torch.arange(len(k)) - place_Q[:, None]
        allowed = (ahead_QK <= right if right >= 0 else True) & (ahead_QK >= -left if left >= 0 else torch.tensor(True))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out).to(query.dtype)


def detached_values(*args: Any, **options: Any) -> Tensor:
    """Right forwards, but no gradient reaches the values."""
    q, k, v, *rest = args
    return plain_varlen(q, k, v.detach(), *rest, **options) + 0 * v.sum()


def raising(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


def not_finite(*args: Any, **options: Any) -> Tensor:
    return plain_varlen(*args, **options) * torch.nan


WRONG: dict[str, tuple[Callable[..., Tensor], str]] = {
    "causal from the start": (lambda *a, **o: plain_varlen(*a, **o, top_left=True), "the output is off"),
    "not causal": (lambda *a, **o: plain_varlen(*a, **{**o, "window_size": (o["window_size"][0], -1)}), "the output is off"),
    "window one too wide": (
        lambda *a, **o: plain_varlen(*a, **{**o, "window_size": (o["window_size"][0] + (o["window_size"][0] >= 0), 0)}),
        "with a window",
    ),
    "scale forgotten": (lambda *a, **o: plain_varlen(*a, **{**o, "scale": 1.0}), "the output is off"),
    "no gradient of values": (detached_values, "dV is off"),
    "not a number": (not_finite, "the output is off by nan"),
    "raises": (raising, "RuntimeError: FlashAttention only supports Ampere"),
}


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU taken for a GPU; no verdict of one test reaches another."""
    monkeypatch.setenv("TRIMTAB_NATIVE", "0")
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    varlen._trusted.cache_clear()
    yield
    varlen._trusted.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]) -> list[int]:
    """Put a kernel in the place of torch's; returns a list that grows by one for each call."""
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(len(args[0]))
        return kernel(*args, **options)

    monkeypatch.setattr(varlen, "find", lambda: counted)
    return calls


def rows(dtype: torch.dtype = torch.bfloat16, heads: int = 4, keys: int = 2, width: int = 16) -> tuple[Tensor, Tensor]:
    return torch.zeros(3, heads, width, dtype=dtype), torch.zeros(3, keys, width, dtype=dtype)


def test_a_right_kernel_is_used_and_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = use(monkeypatch, plain_varlen)
    for _ in range(3):
        assert ops.varlen_kernel(*rows()) is not None
    assert len(calls) == 2  # with a window and without
    for other in (rows(torch.float16), rows(keys=4), rows(width=32)):
        assert ops.varlen_kernel(*other) is not None
    assert len(calls) == 8
    assert (
        varlen.verdict(torch.device("cpu"), torch.bfloat16, 16, 2)
        == "attention on cpu in bfloat16, heads of 16, 2 to a key: torch's varlen kernel"
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_first_use_without_gradients_compares_them_too(mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, plain_varlen)
    with mode():
        assert ops.varlen_kernel(*rows()) is not None, varlen.verdict(torch.device("cpu"), torch.bfloat16, 16, 2)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_refused_and_the_log_says_why(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel, why = WRONG[name]
    use(monkeypatch, kernel)
    with caplog.at_level(logging.WARNING, logger=varlen.__name__):
        assert ops.varlen_kernel(*rows()) is None and ops.varlen_kernel(*rows()) is None
    (line,) = caplog.messages
    assert "batched matmuls" in line and why in line
    assert varlen.verdict(torch.device("cpu"), torch.bfloat16, 16, 2) == line


def test_a_torch_without_it_goes_the_old_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("No module named 'torch.nn.attention.varlen'")

    monkeypatch.setattr(varlen, "find", missing)
    assert ops.varlen_kernel(*rows()) is None


def test_the_installed_torch_has_the_signature_that_is_called() -> None:
    """The real kernel gets as far as asking for a GPU, so its arguments are right."""
    assert "varlen_attn" in str(varlen.find())
    assert ops.varlen_kernel(*rows()) is None
    assert "NotImplementedError" in varlen.verdict(torch.device("cpu"), torch.bfloat16, 16, 2)


def test_other_devices_and_dtypes_try_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = use(monkeypatch, plain_varlen)
    assert ops.varlen_kernel(*rows(torch.float32)) is None
    monkeypatch.setattr(varlen, "DEVICES", ("cuda",))
    assert ops.varlen_kernel(*rows()) is None
    assert not calls


def test_the_doctor_tells_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that turns out not to work: the comparison fails, nothing else does."""
    if torch.cuda.is_available():
        pytest.skip("there is one that works")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    check = doctor._attention()
    assert check.ok and check.value.startswith("attention on cuda:0 in bfloat16, heads of 64, 3 to a key: batched matmuls (AssertionError")


# ---- whole forwards


def mixed(base: Base) -> list[Tensor]:
    """Hidden states and gradients of one batch of base rows and adapters of all methods."""
    adapters = [noisy(base, m, seed=i) for i, m in enumerate(EXAMPLES.values())]
    for a in adapters:
        a.params = {k: t.requires_grad_() for k, t in a.params.items()}
    mix, members = base.mix(adapters, packed=lambda a: base.attached.pack(a.method, a.params, a.sites))
    pieces = [Piece(torch.tensor(tokens(3 + 5 * m % 13, 9 * m + k)), m) for m in [BASE, *members] for k in range(2)]
    hidden_TH = base.attached.forward(base.batch(pieces, mix))
    hidden_TH.float().square().sum().backward()
    return [hidden_TH.detach(), *(t.grad for a in adapters for t in a.params.values() if t.grad is not None)]


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])  # windows of 8, of some layers; as many keys as queries
def test_a_mixed_forward_and_backward_agree(family: str, activation_checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes, prompts, windows, grouped heads; and where the comparison itself falls into a layer that is computed twice."""
    base = Base(tiny_model(family, dtype=torch.float16), tiny_tokenizer())
    monkeypatch.setattr(varlen, "DEVICES", ())
    want = mixed(base)
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    calls = use(monkeypatch, plain_varlen)
    varlen._trusted.cache_clear()
    base.attached.activation_checkpointing = activation_checkpointing
    got = mixed(base)
    assert len(calls) == 2 + base.spec.num_layers * (1 + activation_checkpointing)
    assert difference(got[0].float(), want[0].float()) <= 1e-2
    assert len(got) == len(want) > len(EXAMPLES)
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert gradient_difference(ours.float(), theirs.float()) <= 5e-2


def test_soft_caps_go_the_old_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = use(monkeypatch, plain_varlen)
    capped = Base(tiny_model("gemma2", dtype=torch.bfloat16), tiny_tokenizer())
    capped.generate_ids([[1, 2, 3]])
    calls.clear()  # of the comparisons
    capped.logits([[1, 2, 3]])
    capped.generate_ids([[1, 2, 3]])
    assert not calls
    base = Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer())
    base.logits([[1, 2, 3]])
    calls.clear()
    base.logits([[1, 2, 3]])
    assert len(calls) == base.spec.num_layers
