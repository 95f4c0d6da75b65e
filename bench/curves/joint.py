"""A step of 8 variants trained together, and the sum of the steps of each trained alone."""

from __future__ import annotations

import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from curves.curve import Curve, Point

STEPS = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "lora-r16": {"method": "lora", "r": 16},
    "lora-r64": {"method": "lora", "r": 64},
    "dora-r8": {"method": "lora", "r": 8, "use_dora": True},
    "ia3": {"method": "ia3"},
    "houlsby": {"method": "bottleneck"},
    "parallel": {"method": "bottleneck", "variant": "parallel", "scaling": 4.0},
    "prompt": {"method": "prompt", "num_virtual_tokens": 20},
    "prefix": {"method": "prefix", "num_virtual_tokens": 30},
}
TEXT = "the quick brown fox jumps over the lazy dog and then it sleeps for a while under the old oak tree"
ROW = 256
"""Tokens of a row, about; a shorter step has one shorter row."""


def ours(tokens: int) -> list[float | str]:
    from trimtab import load_base

    base = load_base("smollm2-135m-instruct")
    alone = sum(_seconds(base, [name], tokens) for name in VARIANTS)
    joint = _seconds(base, list(VARIANTS), tokens)
    return [1000 * alone, 1000 * joint, joint / alone]


def _seconds(base: Any, names: list[str], tokens: int) -> float:
    """CPU seconds of one step of these variants together: the least but for the first, which also warms up."""
    import trimtab
    from trimtab.train.listen import Silent

    marks: list[float] = []

    class Clock(Silent):
        def step(self, line: Any) -> None:
            if line["variant"] == names[-1]:
                marks.append(time.process_time())

    length = min(tokens, ROW)
    common = {"data": "rows", "max_steps": STEPS, "batch_size": tokens // length, "max_length": 2 * ROW, "lr": 1e-4}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(_row(i, length // 2)) + "\n" for i in range(64)), encoding="utf-8")
        content = {
            "base": "smollm2-135m-instruct",
            "out": "out",
            "data": {"rows": {"train": str(rows)}},
            "variants": {n: VARIANTS[n] | common for n in names},
            "checkpoint_every": None,
        }
        trimtab.train(trimtab.RunConfig.from_dict(content, root=Path(folder)), base=base, listener=Clock())
    return min(b - a for a, b in pairwise(marks))


def _row(i: int, half: int) -> dict[str, str]:
    """A prompt and an answer of about so many tokens each."""
    words = TEXT.split()
    prompt, answer = (" ".join(words[(i * k + j) % len(words)] for j in range(half - less)) for k, less in ((1, 12), (7, 4)))
    return {"prompt": f"{i} {prompt}", "completion": f" {answer}"}


CURVE = Curve(
    what="a step of 8 variants of mixed methods, the bundled base",
    grows="tokens of a variant",
    points=[Point(f"{n:,}", n, long=n > 256) for n in (64, 256, 1024, 4096)],
    columns=["CPU ms, sum of 8 alone", "CPU ms, joint", "joint / sum"],
    ours=ours,
    limit=lambda point: "joint / sum at most 1",
    timeout_s=1200,
)
