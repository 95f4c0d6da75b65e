"""What a run leaves beside its adapters: metrics.jsonl while it goes, summary.json at the end."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from trimtab.train.variant import Variant


class Metrics:
    """metrics.jsonl: a line per variant per logged step, flushed line by line so that a killed run keeps what it had."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def peak_memory_gb(device: torch.device) -> float:
    """The process's peak resident memory, or on CUDA the device's peak allocation, in GB (10⁹ bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def variant_summary(variant: Variant, scores: dict[str, Any], adapter_bytes: int) -> dict[str, Any]:
    """One variant's entry in summary.json. Losses are means over the first and last tenth of the steps; seconds are its share of the
    steps' time."""
    p = variant.progress
    tenth = max(1, len(p.losses) // 10)
    return {
        "method": variant.method.name,
        "fields": variant.method.to_dict(),
        "data": variant.config.data,
        "lr": variant.config.lr,
        "steps": p.step,
        "trainable": sum(t.numel() for t in variant.params.values()),
        "adapter_bytes": adapter_bytes,
        "tokens": p.tokens,
        "supervised_tokens": p.supervised_tokens,
        "seconds": round(p.seconds, 3),
        "tokens_per_s": round(p.tokens / p.seconds, 1) if p.seconds else None,
        "losses": {"first": _mean(p.losses[:tenth]), "last": _mean(p.losses[-tenth:])},
        "stopped": p.stopped or None,
        "scores": scores,
    }


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(content, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
