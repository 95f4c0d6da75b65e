"""torch's attention over pages of a KV cache, which needs a GPU: here a plain stand-in with its signature takes its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.common import EXAMPLES, noisy, tokens
from tests.ops.test_varlen import not_finite, plain_varlen, raising
from tests.serve.common import AtOnce, Clock, Held, ask
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab import ops
from trimtab.decode.cached import Pages
from trimtab.decode.generate import Sampling
from trimtab.model import Base
from trimtab.ops import paged, varlen
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.runner import Runner


def unwritten_rows(*args: Any, num_splits: int | None = None, **options: Any) -> Tensor:
    """As torch's kernel with several splits (pytorch issue 194167): only the first sequence is written."""
    out = plain_varlen(*args, **options)
    if num_splits != 1:
        out[args[3][1] :] = torch.nan
    return out


def flash_2(*args: Any, **options: Any) -> Tensor:
    if args[1].shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    return unwritten_rows(*args, **options)


WRONG: dict[str, Callable[..., Tensor]] = {
    "causal from the start": lambda *a, **o: plain_varlen(*a, **o, top_left=True),
    "pages in order": lambda *a, **o: plain_varlen(*a, **{**o, "block_table": o["block_table"].sort(0)[0]}),
    "the last page whole": lambda *a, **o: plain_varlen(*a, **{**o, "seqused_k": o["seqused_k"] + 1}),
    "windows ignored": lambda *a, **o: plain_varlen(*a, **{**o, "window_size": (-1, 0)}),
    "not a number": not_finite,
    "raises": raising,
}


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU taken for a GPU; no verdict of one test reaches another."""
    monkeypatch.setenv("TRIMTAB_NATIVE", "0")
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    for cached in (varlen._trusted, paged._trusted):
        cached.cache_clear()
    yield
    for cached in (varlen._trusted, paged._trusted):
        cached.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]) -> list[int]:
    """Put a kernel in the place of torch's; returns the page sizes of its calls."""
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args[1].shape[1] if options.get("block_table") is not None else 0)
        return kernel(*args, **options)

    monkeypatch.setattr(varlen, "find", lambda: counted)
    return calls


HERE = (torch.device("cpu"), torch.bfloat16, 16, 2)


@pytest.mark.parametrize(("kernel", "page"), [(unwritten_rows, 16), (flash_2, 256)])
def test_the_smallest_page_with_which_it_is_right(kernel: Callable[..., Tensor], page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, kernel)
    assert ops.page_size(*HERE) == page
    assert f"pages of {page} on cpu in bfloat16, heads of 16, 2 to a key: torch's varlen kernel" in paged.verdict(*HERE)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, WRONG[name])
    assert ops.page_size(*HERE) == 16
    assert paged.verdict(*HERE).count("batched matmuls") == 2, paged.verdict(*HERE)


def test_the_installed_torch_has_the_signature_that_is_called() -> None:
    """The real kernel gets as far as asking for a GPU, so its arguments are right."""
    ops.page_size(*HERE)
    assert paged.verdict(*HERE).count("NotImplementedError") == 2, paged.verdict(*HERE)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_generation_and_engine_agree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the way by buckets, in fp16: prompts in chunks, prefixes, windows, sequences of several pages."""
    model = tiny_model(family, dtype=torch.float16)
    base = Base(model, tiny_tokenizer())
    adapters = [noisy(base, m, seed=i) for i, m in enumerate(EXAMPLES.values())][:6]
    prompts = [tokens(3 + 11 * i, i) for i in range(len(adapters) + 1)]
    monkeypatch.setattr(varlen, "DEVICES", ())
    want = [base.generate_ids([p], [a], Sampling(8)) for p, a in zip(prompts, [None, *adapters], strict=True)]
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    calls = use(monkeypatch, unwritten_rows)
    base.attached._decode_path.drop()
    config = EngineConfig(kv_bytes=60 * Runner.bytes_per_block(base), adapter_bytes=64 << 20, max_step_rows=64)
    engine = Engine(base, config, clock=Clock(), loader=AtOnce())
    calls.clear()
    heard = [
        ask(engine, f"{i}", prompts[i], a and Held(f"sha256:{i}", a), max_tokens=8, ignore_eos=True)
        for i, a in enumerate([None, *adapters])
    ]
    while engine.step():
        pass
    assert set(calls) == {16} and len(calls) % base.spec.num_layers == 0
    same = sum(got.ids[: len(w[0])] == w[0] for got, w in zip(heard, want, strict=True))
    assert same >= len(want) - 1, "one may differ by rounding"


def test_generation_has_pages_for_what_each_sequence_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base(tiny_model("llama", dtype=torch.bfloat16), tiny_tokenizer())
    needs = [3, 40, 17, 16, 90]
    on_cpu = Pages(base.attached, needs, 2)
    assert on_cpu.kv.capacity == 90 and on_cpu.kv.blocks == 2
    monkeypatch.setattr(base.attached, "device", torch.device("meta"))
    pages = Pages(base.attached, needs, 2)
    assert pages.kv.capacity == 16 and pages.kv.blocks == 6 + 3, "as many as the two longest fill"
    first, second = pages.take(4), pages.take(1)
    assert len(first) == 6 and len(second) == 3 and len({*first, *second}) == 9
    pages.give_back(first)
    assert len(pages.take(2)) == 2
