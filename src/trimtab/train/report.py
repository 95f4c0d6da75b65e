"""What a run leaves beside its adapters: run.json at its start, metrics.jsonl while it goes, summary.json at the end."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from trimtab.atomic import atomic_write
from trimtab.memory import peak_resident_bytes
from trimtab.train.clone import described
from trimtab.train.prepare import Prepared
from trimtab.train.variant import Variant


@dataclass(frozen=True)
class Mark:
    """How far metrics.jsonl is: its bytes, and their sha256."""

    size: int = 0
    sha256: str = hashlib.sha256().hexdigest()


class Metrics:
    """metrics.jsonl: a line per variant per logged step, handed to the system line by line so that a killed run keeps what it had.

    keep: bytes that stay of a file that is there already; what follows them, and a line that they cut, goes. warn: hears, once, that the
    disk takes no more lines: the run goes on, and they are written as soon as there is room.
    """

    def __init__(self, path: Path, keep: int = 0, warn: Callable[[str], None] = lambda text: None):
        self.path, self._warn, self._pending, self._warned = path, warn, bytearray(), False
        kept = _taken_over(path, keep) if path.exists() else b""
        self._file = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._file.seek(len(kept))
        self._size, self._sha = len(kept), hashlib.sha256(kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._flush()
        except OSError:
            pass  # `warn` has heard of it
        self._file.close()

    def write(self, line: dict[str, Any]) -> None:
        data = (json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}) + "\n").encode()
        self._pending += data
        self._sha.update(data)
        self._size += len(data)
        try:
            self._flush()
        except OSError as error:
            if not self._warned:
                self._warn(f"{self.path} cannot be written ({error.strerror}): its lines are kept until there is room")
            self._warned = True

    @property
    def position(self) -> Mark:
        """How far the file is with all that was written to it."""
        return Mark(self._size, self._sha.hexdigest())

    def secure(self) -> Mark:
        """The position, everything before it being safe on disk. OSError where that cannot be had."""
        self._flush()
        os.fsync(self._file.fileno())
        return self.position

    def _flush(self) -> None:
        while self._pending:
            del self._pending[: self._file.write(self._pending)]


def _taken_over(path: Path, keep: int) -> bytes:
    """Cut a file to its whole lines among the first `keep` bytes, and return these. It becomes a new file: a process that was cut off, and
    whose run was taken over, may still write to the old one."""
    with path.open("rb") as file:
        kept = file.read(keep)
    kept = kept[: kept.rfind(b"\n") + 1]
    try:
        with atomic_write(path) as file:
            file.write(kept)
    except OSError:  # there is no room for both
        os.truncate(path, len(kept))
    return kept


class Unwritten:
    """The metrics of a rank that is not the first: that one writes them, until it dies. recent: how many of the last lines may then be
    missing."""

    def __init__(self, path: Path, recent: int):
        self.path, self._lines = path, deque[dict[str, Any]](maxlen=recent)

    def remember(self, recent: int) -> None:
        """Keep so many of the last lines from now on."""
        self._lines = deque(self._lines, maxlen=recent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def write(self, line: dict[str, Any]) -> None:
        self._lines.append(line)

    def secure(self) -> Mark:
        """The position in the file of the first rank, which has died, with the lines that it lacks."""

        def name(line: Mapping[str, Any]) -> tuple[Any, ...]:
            return line["variant"], line["step"], line.get("event")

        data = self.path.read_bytes() if self.path.exists() else b""
        with Metrics(self.path, len(data)) as metrics:
            there = {name(json.loads(line)) for line in data[: metrics.position.size].splitlines()}
            for line in self._lines:
                if name(line) not in there:
                    metrics.write(line)
            return metrics.secure()


def peak_memory_gb(device: torch.device) -> float:
    """The process's peak resident memory, or on CUDA the device's peak allocation, in GB (10⁹ bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_resident_bytes() / 1e9


def plan(prepared: Prepared) -> dict[str, Any]:
    """run.json, with the run's settings beside it: what is known before the first step. root: where the paths of its sources start. steps:
    of each variant, if nothing ends it early. variants: what a clone of one is made from."""
    base = prepared.base
    return {
        "base": base.name or prepared.run.base,
        "root": str(prepared.run.root.resolve()),
        "base_parameters": base.spec.num_parameters,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "steps": {v.name: v.total_steps for v in prepared.variants},
        "variants": {v.name: described(v) for v in prepared.run.variants},
    }


def variant_summary(variant: Variant, scores: dict[str, Any], adapter_bytes: int) -> dict[str, Any]:
    """One variant's entry in summary.json. Losses are means over the first and last tenth of the steps; seconds are its share of the
    steps' time."""
    p = variant.progress
    tenth = max(1, len(p.losses) // 10)
    return {
        "method": variant.method.name,
        "fields": variant.method.to_dict() | variant.config.aim,
        "data": variant.config.data,
        "lr": variant.config.lr,
        "steps": p.step,
        "trainable": sum(t.numel() for t in variant.trained_params.values()),
        "adapter_bytes": adapter_bytes,
        "tokens": p.tokens,
        "supervised_tokens": p.supervised_tokens,
        "seconds": round(p.seconds, 3),
        "tokens_per_s": round(p.tokens / p.seconds, 1) if p.seconds else None,
        "losses": {"first": _mean(p.losses[:tenth]), "last": _mean(p.losses[-tenth:])},
        "stopped": p.stopped or None,
        "finished_early": p.finished_early or None,
        "scores": scores,
    }


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())
