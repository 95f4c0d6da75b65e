"""Run folders made by hand: what `trimtab train` leaves, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'text'"


def variant(data: str = "a", **keys: Any) -> dict[str, Any]:
    """A variant's entry in summary.json."""
    scores = {"loss": 0.5, "rows": 3, "exact_match": 50.0, "token_f1": 60.0, "samples": [{"prompt": "q", "reference": "r", "answer": "s"}]}
    return {
        "method": "lora",
        "fields": {"r": 4, "rank_pattern": {}, "exclude_modules": None},
        "data": data,
        "lr": 1e-3,
        "steps": 60,
        "trainable": 1000,
        "adapter_bytes": 4000,
        "tokens": 600,
        "supervised_tokens": 60,
        "seconds": 12.5,
        "tokens_per_s": 48.0,
        "losses": {"first": 4.0, "last": 0.5},
        "stopped": None,
        "scores": scores,
    } | keys


def run_folder(folder: Path, variants: dict[str, dict[str, Any]], *, steps: int = 60, summary: bool = True, **keys: Any) -> Path:
    """Write summary.json (unless the run is to be unfinished) and metrics.jsonl, with two validations a variant; returns the folder."""
    folder.mkdir(parents=True)
    lines = []
    for name in variants:
        for step in range(1, steps + 1):
            numbers = {"loss": 4 * math.exp(-step / 20) + 0.2, "grad_norm": 1.0, "lr": 1e-3, "tokens": 10, "tokens_per_s": 50.0}
            lines.append({"variant": name, "step": step, "epoch": 0, **numbers})
        for step in (steps // 2, steps):
            lines.append({"event": "valid", "variant": name, "step": step, "valid_loss": 0.7, "metric": "loss", "best": True})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    base_scores = {
        v["data"]: {"loss": 3.0, "rows": 3, "exact_match": 10.0, "token_f1": 20.0, "samples": [{"reference": "r", "answer": "base says"}]}
        for v in variants.values()
        if v["scores"]
    }
    content = {
        "base": "tiny",
        "base_parameters": 70_000,
        "base_bytes": 280_000,
        "base_fingerprint": {"before": "sha256:aa", "after": "sha256:aa"},
        "dtype": "float32",
        "device": "cpu",
        "seconds": 12.5,
        "tokens": 600,
        "tokens_per_s": 48.0,
        "peak_memory_gb": 0.4,
        "base_scores": base_scores,
        "variants": variants,
    } | keys
    if summary:
        (folder / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def predictions(folder: Path, data: str, **said: list[dict[str, Any]]) -> None:
    """Write files of answers of base and variants, and where summary.json names them; said: name -> its lines."""
    (folder / "predictions").mkdir(exist_ok=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for n, (name, lines) in enumerate(said.items()):
        path = folder / "predictions" / f"{n}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        scores = summary["base_scores"][data] if name == "base" else summary["variants"][name]["scores"]
        scores["predictions"] = f"predictions/{n}.jsonl"
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
