"""Forwards and backwards that overlap, on one base and on two, give what each gives alone, bit for bit.

Hooks on a layer's attention hold each of two threads until the other has come as far, so every layer runs while the other thread is inside
one of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Barrier, get_ident

import pytest
import torch
from torch import Tensor

from tests.laws.common import CASES, cached_logits, method_of, noisy, one_thread, tokens, with_dropout
from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.forward.batch import BASE, Piece
from trimtab.model import Base

__all__ = ["one_thread"]

FIRST, SECOND = ("lora-0", "bottleneck-0", "lora-head"), ("lora-1", "lora-saved", "prompt-0", "ia3-0")
"""Two mixes of different methods, ranks and places. The base's rows stand beside them in both."""


def made(family: str, checkpointing: bool = False) -> Base:
    base = Base(tiny_model(family), tiny_tokenizer())
    base.attached.activation_checkpointing = checkpointing
    return base


def gradients(base: Base, cases: tuple[str, ...]) -> list[Tensor]:
    """Logits and all gradients of a mixed batch, dropout on."""
    adapters = [noisy(base, with_dropout(method_of(c, base.spec), 0.4), seed=CASES.index(c)) for c in cases]
    for a in adapters:
        a.params = {k: t.requires_grad_() for k, t in a.params.items()}
    mix, members = base.mix(adapters, packed=lambda a: base.attached.pack(a.method, a.params, a.sites))
    pieces = [Piece(torch.tensor(tokens(5 + 3 * m % 11, 7 * m + k)), m, seed=20 + m + k) for m in [BASE, *members] for k in range(2)]
    batch = base.batch(pieces, mix)
    logits = base.attached.head(base.attached.forward(batch), batch, range(batch.total))
    logits.float().logsumexp(-1).sum().backward()
    return [logits.detach(), *(t.grad for a in adapters for t in a.params.values() if t.grad is not None)]


def decoded(base: Base, cases: tuple[str, ...]) -> list[Tensor]:
    """Logits of a prompt and four tokens a sequence, through the cache."""
    adapters = [None, *(noisy(base, method_of(c, base.spec), seed=CASES.index(c)) for c in cases)]
    sequences = [tokens(9, i) for i in range(len(adapters))]
    return cached_logits(base, sequences, adapters, [[5, 1, 1, 1, 1]] * len(adapters))


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@contextmanager
def before_attention(bases: list[Base], do: Callable[..., None]) -> Iterator[None]:
    """do: called as each layer's attention is entered, in the forward and when a layer runs again in the backward."""
    with ExitStack() as hooks:
        for layer in [layer for base in bases for layer in base.attached.body.layers]:
            hooks.callback(layer.self_attn.register_forward_pre_hook(do).remove)
        yield


def at_once(*runs: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    def on_its_own(run: Callable[[], list[Tensor]]) -> list[Tensor]:
        torch.set_num_threads(1)  # a thread has a number of its own
        return run()

    with ThreadPoolExecutor(len(runs)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(on_its_own, run) for run in runs]]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("families", [("llama",), ("llama", "gemma2")], ids=["one base", "two bases"])
def test_two_threads_train_at_once(families: tuple[str, ...], checkpointing: bool) -> None:
    bases = [made(f, checkpointing) for f in families]
    first, second = bases[0], bases[-1]
    alone = gradients(first, FIRST), gradients(second, SECOND)
    rounds = min(base.spec.num_layers for base in bases) * (2 if checkpointing else 1)  # the deeper base then goes on alone
    barrier, met = Barrier(2), Counter[int]()

    def meet(*_: object) -> None:
        if met[get_ident()] < rounds:
            met[get_ident()] += 1
            barrier.wait(timeout=30)

    with before_attention(bases, meet):
        both = at_once(lambda: gradients(first, FIRST), lambda: gradients(second, SECOND))
    assert list(met.values()) == [rounds, rounds]
    assert same(both[0], alone[0]) and same(both[1], alone[1])


@pytest.mark.parametrize("families", [("llama",), ("llama", "qwen2")], ids=["one base", "two bases"])
def test_two_threads_decode_at_once(families: tuple[str, ...]) -> None:
    """The first forwards too, in which a base gets its hosts and its decode path."""
    alone = decoded(made(families[0]), FIRST), decoded(made(families[-1]), SECOND)
    bases = [made(f) for f in families]
    both = at_once(lambda: decoded(bases[0], FIRST), lambda: decoded(bases[-1], SECOND))
    assert same(both[0], alone[0]) and same(both[1], alone[1])


@pytest.mark.parametrize("families", [("llama",), ("llama", "gemma2")], ids=["one base", "two bases"])
def test_a_forward_inside_a_hook_of_another(families: tuple[str, ...]) -> None:
    bases = [made(f) for f in families]
    outer, inner = bases[0], bases[-1]
    alone, found = (gradients(outer, FIRST), gradients(inner, SECOND)), list[list[Tensor]]()

    def inside(*_: object) -> None:
        if not found:
            found.append([])
            found[0] = gradients(inner, SECOND)

    with before_attention([outer], inside):
        got = gradients(outer, FIRST)
    assert same(got, alone[0]) and same(found[0], alone[1])


def test_a_backward_on_another_thread_finds_its_own_batch() -> None:
    """Layers run again on a thread that has run no forward, while the thread that did is inside a forward of another mix."""
    base = made("llama", checkpointing=True)
    alone = gradients(base, FIRST), gradients(base, SECOND)
    backward, results = Tensor.backward, list[list[Tensor]]()

    def elsewhere(loss: Tensor) -> None:
        def run() -> list[Tensor]:
            backward(loss)
            return []

        def beside(*_: object) -> None:
            if not results:
                results.append([])
                at_once(run)

        with before_attention([base], beside):
            results.append([base.logits([tokens(4, 1)], [noisy(base, method_of(SECOND[0], base.spec))])[0]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", elsewhere)
        got = gradients(base, FIRST)
    assert same(got, alone[0]) and len(results) == 2
    assert same(gradients(base, SECOND), alone[1])
