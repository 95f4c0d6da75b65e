"""Small runs on a tiny base: data on disk, a run file as a mapping, a trained run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.tiny import tiny_model, tiny_tokenizer
from trimtab.model import Base
from trimtab.train import Report, RunConfig, train

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4, "lora_dropout": 0.2, "lr": 1e-2},
    "dora": {"method": "lora", "r": 2, "use_dora": True, "lora_dropout": 0.1, "lr": 5e-3},
    "ia3": {"method": "ia3", "lr": 2e-2},
    "bottleneck": {"method": "bottleneck", "reduction_factor": 4, "dropout": 0.1, "lr": 5e-3},
    "prompt": {"method": "prompt", "num_virtual_tokens": 3, "lr": 2e-2},
    "prefix": {"method": "prefix", "num_virtual_tokens": 4, "lr": 2e-2},
    "projected": {"method": "prefix", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8, "lr": 5e-3},
    "full": {"method": "full", "lr": 1e-3},
}


def tiny_base() -> Base:
    return Base(tiny_model("llama"), tiny_tokenizer(), name="tiny-llama")


def write_rows(path: Path, count: int, word: str) -> Path:
    """Chat rows of differing length whose answer is their question's number and a word."""
    rows = [
        {"messages": [{"role": "user", "content": f"n {i} " + "x" * (i * 7 % 23)}, {"role": "assistant", "content": f"{word} {i}"}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def run_file(folder: Path, variants: dict[str, dict[str, Any]], **keys: Any) -> dict[str, Any]:
    """A run file's content; data sets a (11 rows) and b (7 rows) with test rows are written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("a", 11), ("b", 7)):
        write_rows(folder / f"{name}.jsonl", count, name)
        write_rows(folder / f"{name}-test.jsonl", 3, name)
    data = {n: {"train": f"{n}.jsonl", "test": f"{n}-test.jsonl"} for n in "ab"}
    defaults = {"max_steps": 5, "batch_size": 3, "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5, "max_length": 128}
    return {
        "base": "tiny-llama",
        "out": "out",
        "data": data,
        "defaults": defaults,
        "evaluate": {"max_new_tokens": 4},
        "variants": variants,
    } | keys


def run(folder: Path, variants: dict[str, dict[str, Any]], **keys: Any) -> Report:
    return train(RunConfig.from_dict(run_file(folder, variants, **keys), root=folder), base=tiny_base())


def metrics(report: Report) -> dict[str, list[dict[str, Any]]]:
    """metrics.jsonl by variant."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in (report.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        found.setdefault((entry := json.loads(line))["variant"], []).append(entry)
    return found


LOCKING = """
import fcntl, os, struct, sys
file = os.open(sys.argv[1] + "/.lock", os.O_RDWR | os.O_CREAT)
try:
    fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
except BlockingIOError:
    print("held by another", flush=True)
else:
    print("held", flush=True)
    sys.stdin.read()
"""
"""A process that takes a run folder's lock, or says that another one has it."""


@contextmanager
def locked(folder: Path) -> Iterator[str]:
    """While another process tries to hold a run folder; what it says of that."""
    command = [sys.executable, "-S", "-c", LOCKING, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
