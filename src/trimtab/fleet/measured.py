"""The speed of a base's own engine on this machine, from some seconds of its steps: decoding with few and many streams of few
and many adapters, prompts of several lengths, and adapters that are read meanwhile.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from trimtab.fleet.replica import Shape
from trimtab.fleet.speed import Speed, Step, fit
from trimtab.methods import LoraConfig, Method
from trimtab.model import Base
from trimtab.serve.engine import Engine, EngineConfig
from trimtab.serve.request import Delta, Request, SamplingParams, Servable
from trimtab.serve.residency import packed_bytes
from trimtab.serve.runner import Runner
from trimtab.serve.served import served
from trimtab.serve.stats import StepFacts
from trimtab.store import Adapter
from trimtab.tables import counted

STREAMS = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (16, 64, 256, 1024)
DECODES, PROMPT_STEPS = 24, 4
"""Steps of each kind that are timed. Their mean counts: beside other programs some steps take many times the median, and an answer is made
of all of them."""
SHORT, LONG, LONG_STREAMS = 16, 256, (1, 4, 8)
"""Tokens of the prompts of streams whose decoding is timed, and how many streams have long ones."""
MIXES = 64
"""Mixes of adapters whose making is timed, as the difference of two steps. The median counts: it is small beside what other programs do to
a single step."""
LOADED, MOST_BESIDE = 6, 512
"""Adapters whose reading is timed beside decoding, and how many steps that may take."""


@dataclass
class _Driven:
    """An engine whose steps are timed. adapters: packed and in memory, as many as there are streams."""

    engine: Engine
    adapters: Sequence[Servable]
    facts: list[StepFacts] = field(default_factory=list)
    asked: int = 0

    def __post_init__(self) -> None:
        self.engine.on_step = self.facts.append

    def begin(self, streams: int, prompt: int, answer: int, own: int) -> None:
        """So many requests, for so many different adapters."""
        vocabulary = self.engine.base.spec.vocab_size
        for i in range(streams):
            self.asked += 1
            limits = SamplingParams(max_tokens=answer, ignore_eos=True)
            ids = tuple((self.asked * 31 + 7 * j) % min(200, vocabulary) for j in range(prompt))
            self.engine.submit(Request(f"{self.asked}", ids, limits, self.adapters[i % own]), _heard)

    def finish(self) -> list[StepFacts]:
        """All steps until nothing is open."""
        del self.facts[:]
        while self.engine.requests:
            if not self.engine.step():
                self.engine.requests.wake.wait(0.01)
                self.engine.requests.wake.clear()
        return list(self.facts)


def _heard(delta: Delta) -> None:
    if delta.error is not None:
        raise delta.error


def measure(
    base: Base,
    shape: Shape,
    *,
    method: Method | None = None,
) -> tuple[Speed, int]:
    """(speed, bytes of a packed adapter) of an engine of this shape with fresh adapters of `method`, by default LoRA of rank 16. Takes some
    seconds to a minute, and as much memory as the engine needs for the largest kind of step."""
    longest = base.spec.max_positions
    streams = [n for n in STREAMS if n <= shape.max_running]
    kinds = method or LoraConfig(r=16, target_modules="all-linear")
    with tempfile.TemporaryDirectory(prefix="trimtab-measure-") as folder:
        paths = [_written(base, kinds, Path(folder) / str(i), i) for i in range(max(streams) + LOADED)]
        found = [served(str(path), base) for path in paths]
        size = packed_bytes(base.pack(found[0].load()))
        tokens = max(streams) * (SHORT + 4 * DECODES) + 8 * (LONG + MOST_BESIDE) + 4096
        config = EngineConfig(
            kv_bytes=tokens * Runner.bytes_per_block(base, 1),
            adapter_bytes=size * (len(found) + 2),
            block_size=shape.block_size,
            max_running=shape.max_running,
            max_step_rows=shape.max_step_rows,
            prefix_cache=False,
        )
        engine = Engine(base, config)
        try:
            driven = _Driven(engine, found[: max(streams)])
            load_s = _read(driven, found[: max(streams)])
            mix_s = _mixing(driven, min(SHORT, longest - 1, shape.max_step_rows)) if len(driven.adapters) > 1 else 0.0
            steps = list(_steps(driven, streams, longest, shape))
            slowed, busy_load_s = _beside(driven, min(8, max(streams)), found[max(streams) :])
        finally:
            engine.close()
    threads = counted(torch.get_num_threads(), "thread")
    source = f"measured on {base.name or 'the base'} here, {threads}, adapters of {size / 1e6:.3g} MB in memory, beside what else runs"
    return fit(steps, source, mix_s=mix_s, load_s=load_s, busy_load_s=busy_load_s, slowed=slowed), size


def _written(base: Base, method: Method, path: Path, seed: int) -> Path:
    Adapter.create(base, method, seed=seed).save(path)
    return path


def _read(driven: _Driven, adapters: Sequence[Servable]) -> float:
    """Seconds of a load, one after the other, while nothing else runs; the first one makes what is made once."""
    took = []
    for adapter in adapters:
        before = driven.engine.residency.load_seconds
        driven.engine.prefetch(adapter)
        driven.engine.step()
        while driven.engine.residency.busy:
            driven.engine.requests.wake.wait(0.01)
            driven.engine.requests.wake.clear()
            driven.engine.step()
        took.append(driven.engine.residency.load_seconds - before)
    return statistics.fmean(took[1:] or took)


def _steps(driven: _Driven, streams: Sequence[int], longest: int, shape: Shape) -> list[tuple[Step, float]]:
    """Steps of many kinds, each with its mean time."""
    found: list[tuple[Step, float]] = []
    warm = streams[-1]
    driven.begin(warm, 8, 3, warm)
    driven.finish()
    kinds = [(SHORT, n, own) for n in streams for own in sorted({1, (n + 1) // 2, n})]  # a step of the base alone costs less than any
    kinds += [(LONG, n, n) for n in LONG_STREAMS if n in streams and longest > LONG + DECODES]
    for prompt, n, own in kinds:
        driven.begin(n, prompt, DECODES + 1, own)
        decodes = [f.seconds for f in driven.finish() if not f.prefill_rows and f.decode_rows == n]
        if decodes:
            found.append((Step(n, n, own, n * (prompt + DECODES // 2)), statistics.fmean(decodes)))
    for prompt in (p for p in PROMPTS if p < min(longest, shape.max_step_rows + 1)):
        for n in (1, 4):
            if n * prompt > shape.max_step_rows:
                continue
            took = list[float]()
            for _ in range(PROMPT_STEPS):
                driven.begin(n, prompt, 1, n)
                took += [f.seconds for f in driven.finish() if f.prefill_rows == n * prompt]
            if took:
                found.append((Step(n * prompt, n, n, 0), statistics.fmean(took)))
    return found


def _mixing(driven: _Driven, prompt: int) -> float:
    """Seconds that a step takes longer in which the engine puts a mix of adapters together: one for another adapter, less the next for the
    same. Before steps of several adapters, whose mix holds them all and would be kept."""
    more, adapters = list[float](), driven.adapters
    try:
        for i in range(len(adapters) + MIXES):
            driven.adapters = [adapters[i % len(adapters)]]
            took = list[float]()
            for _ in range(2):
                driven.begin(1, prompt, 1, 1)
                took += [f.seconds for f in driven.finish() if f.prefill_rows == prompt]
            if i >= len(adapters) and len(took) == 2:  # before that, an adapter is used for the first time
                more.append(took[0] - took[1])
    finally:
        driven.adapters = adapters
    return max(0.0, statistics.median(more)) if more else 0.0


def _beside(driven: _Driven, streams: int, adapters: Sequence[Servable]) -> tuple[float, float]:
    """While so many streams decode and one adapter after the other is read: (by how much longer steps take, as a part of what they take
    otherwise; seconds of a load)."""
    engine = driven.engine
    driven.begin(streams, 8, 2 * DECODES, streams)
    alone = statistics.fmean(f.seconds for f in driven.finish() if not f.prefill_rows)
    driven.begin(streams, 8, MOST_BESIDE, streams)
    while any(live.new < 2 for live in engine.requests):
        engine.step()
    before, beside = engine.residency.load_seconds, list[float]()
    for adapter in adapters:
        engine.prefetch(adapter)
        loads = engine.residency.loads
        while engine.residency.loads == loads and engine.requests:
            del driven.facts[:]
            engine.step()
            beside += [f.seconds for f in driven.facts]
    took = (engine.residency.load_seconds - before) / len(adapters)
    for live in list(engine.requests):
        engine.cancel(live.request.id)
    driven.finish()
    return max(0.0, statistics.fmean(beside) / alone - 1), took
