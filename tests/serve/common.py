"""What tests of serving share: adapters as servables, a clock and a loader in the test's hand, a sink that remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

from tests.laws.common import adapter_of, base_of, tokens
from trimtab.errors import TrimtabError
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.request import Delta, Request, SamplingParams, Token
from trimtab.serve.runner import Runner
from trimtab.store import Adapter


@dataclass(frozen=True)
class Held:
    """A servable that has its adapter at hand. error: what load raises instead."""

    digest: str
    adapter: Adapter | None = None
    error: Exception | None = None

    def load(self) -> Adapter:
        if self.error is not None:
            raise self.error
        assert self.adapter is not None
        return self.adapter


def held(case: str, family: str = "llama") -> Held:
    return Held(f"sha256:{case}", adapter_of(family, case))


class Clock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class AtOnce(Executor):
    """Runs what it is given before it returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class ByHand(AtOnce):
    """Keeps what it is given until the test runs it."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs.append(lambda: fn(*args, **kwargs))
        return Future()

    def run(self, which: int = 0) -> None:
        self.jobs.pop(which)()


@dataclass
class Heard:
    """A sink that remembers."""

    deltas: list[Delta] = field(default_factory=list)

    def __call__(self, delta: Delta) -> None:
        assert not self.deltas or self.deltas[-1].finish is None, "a delta came after the last one"
        self.deltas.append(delta)

    @property
    def finish(self) -> str | None:
        return self.deltas[-1].finish if self.deltas else None

    @property
    def error(self) -> TrimtabError | None:
        return self.deltas[-1].error if self.deltas else None

    @property
    def text(self) -> str:
        return "".join(d.text for d in self.deltas)

    @property
    def tokens(self) -> list[Token]:
        return [t for d in self.deltas for t in d.tokens]

    @property
    def ids(self) -> list[int]:
        return [t.id for t in self.tokens]


def engine_of(
    family: str = "llama", *, blocks: int = 200, loader: Executor | None = None, clock: Clock | None = None, **config: Any
) -> Engine:
    """An engine on a tiny base, driven by the test. blocks: KV blocks of 16 tokens (or of config's block_size)."""
    base = base_of(family)
    config = {"adapter_bytes": 64 << 20, **config}
    kv_bytes = blocks * Runner.bytes_per_block(base, config.get("block_size", 16))
    return Engine(base, EngineConfig(kv_bytes=kv_bytes, **config), clock=clock or Clock(), loader=loader or AtOnce())


def ask(
    engine: Engine,
    name: str,
    prompt: int | Iterable[int] = 8,
    adapter: Held | None = None,
    *,
    tenant: str = "",
    weight: float = 1.0,
    **params: Any,
) -> Heard:
    """Submit a request; prompt: its tokens, or how many random ones. Others are Request's and SamplingParams'."""
    heard = Heard()
    ids = tokens(prompt, sum(map(ord, name))) if isinstance(prompt, int) else list(prompt)
    of_request = {k: params.pop(k) for k in ("deadline", "cache_salt", "like", "pooling") if k in params}
    engine.submit(Request(name, tuple(ids), SamplingParams(**params), adapter, tenant, weight, **of_request), heard)
    return heard


def finish(engine: Engine, limit: int = 2000) -> int:
    """Step until nothing runs; how many steps it took. Nothing may be left."""
    for n in range(limit):
        if not engine.step():
            engine.idle_check()
            return n
    raise AssertionError(f"still running after {limit} steps: {engine.stats()}")


def solo(family: str, prompt: Iterable[int], adapter: Held | None, max_tokens: int) -> list[int]:
    """What the base generates without an engine, end token excluded."""
    from trimtab.decode.generate import Sampling

    return base_of(family).generate_ids([list(prompt)], [adapter and adapter.adapter], Sampling(max_tokens))[0]


def without_end(engine: Engine, ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in engine.base.stop_ids else ids
