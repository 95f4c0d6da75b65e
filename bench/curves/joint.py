"""A step of 8 variants trained together, and the sum of the steps of each trained alone."""

from __future__ import annotations

from typing import Any

from curves.curve import Curve, Point, cpu_seconds, random_llama, training_step

LAYERS = 6
ROW = 256
"""Tokens of a row, half of them supervised; a shorter step has one shorter row."""
FORWARD = 4096
"""Tokens of one forward, as of a run that sets nothing."""


def methods() -> list[Any]:
    from trimtab.methods import BottleneckConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

    parallel = BottleneckConfig(variant="parallel", scaling=4.0)
    adapters = [LoraConfig(r=16), LoraConfig(r=64), LoraConfig(r=8, use_dora=True), IA3Config(), BottleneckConfig(), parallel]
    return [*adapters, PromptTuningConfig(num_virtual_tokens=20), PrefixTuningConfig(num_virtual_tokens=30, prefix_init="RANDOM")]


def rows(tokens: int) -> list[Any]:
    import numpy as np

    from trimtab.data import Example

    length = min(tokens, ROW)
    draw = np.random.default_rng(0)
    supervised = np.arange(length) >= length // 2
    return [Example(draw.integers(5, 8000, length, dtype=np.int32), supervised, f"row {i}", (0, i)) for i in range(tokens // length)]


def ours(tokens: int) -> list[float | str]:
    """CPU ms: the least of several steps, and of as many sums of steps of each alone. Rounds take turns; in each a step follows others of
    its kind, as in a run: a step of another kind before it leaves memory that does not fit, and what the heap then gives back costs this
    one a fault a page."""
    from trimtab.model import Base

    base, together, batch = Base(random_llama(LAYERS, vocab_size=8192), None), methods(), rows(tokens)
    steps = [training_step(base, chosen, batch, FORWARD) for chosen in [*([m] for m in together), together]]
    alone, joint = list[float](), list[float]()
    for _ in range(3):
        *solos, ours = [[cpu_seconds(step) for _ in range(3)] for step in steps]
        # a sum of the least of each would be less than any sum that was seen, and the joint step has no such parts
        alone += map(sum, zip(*solos, strict=True))
        joint += ours
    return [1000 * min(alone), 1000 * min(joint), min(joint) / min(alone)]


CURVE = Curve(
    what=f"a step of 8 variants of mixed methods, {LAYERS} layers of the bundled base's shapes in bf16",
    grows="tokens of a variant",
    points=[Point(f"{n:,}", n, long=n > 1024) for n in (64, 256, 1024, 4096)],
    columns=["CPU ms, sum of 8 alone", "CPU ms, joint", "joint / sum"],
    ours=ours,
    limit=lambda point: "joint / sum at most 1",
    timeout_s=1200,
)
