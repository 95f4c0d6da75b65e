"""A run from its run file to its run folder: prepare, train all variants together, score them beside the base, save.

File order is the run's order. Nothing here prints; a `Listener` hears what happens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import bases
from trimtab.errors import ConfigError
from trimtab.model import Base, load_base
from trimtab.store import Adapter
from trimtab.train.config import RunConfig
from trimtab.train.finish import adapter_of, evaluate, save, summarise
from trimtab.train.full import FullVariant
from trimtab.train.listen import Listener, Silent
from trimtab.train.prepare import prepare
from trimtab.train.report import Metrics, write_json
from trimtab.train.step import run_windows
from trimtab.train.variant import Variant, Window


@dataclass
class Report:
    """A finished run. summary: what summary.json holds. adapters: the trained adapters by variant (full fine-tuning is a model folder
    instead)."""

    out: Path
    summary: dict[str, Any]
    adapters: dict[str, Adapter]
    base: Base


def train(run: RunConfig | str | Path, *, base: Base | None = None, listener: Listener | None = None) -> Report:
    """Train every variant of a run together on one frozen base, score it, save it under the run's `out`.

    run: a RunConfig, or a run file's path. base: one that is loaded already. TrimtabError where the run file, the data or the base is at
    fault; nothing is written before all of these have been read and checked.
    """
    run = run if isinstance(run, RunConfig) else RunConfig.load(run)
    listener = listener or Silent()
    if run.out.exists() and any(run.out.iterdir()):
        fix = "name another folder in `out`, or remove this one"
        raise ConfigError(f"out = {str(run.out)!r} is not empty: a run never overwrites another", fix=fix)
    listener.status(f"loading {run.base}")
    base = base or load_base(run.base, dtype=run.dtype, device=run.device)
    before = bases.fingerprint_model(base.model)
    prepared = prepare(run, base)
    (run.out / "adapters").mkdir(parents=True, exist_ok=True)
    with Metrics(run.out / "metrics.jsonl") as metrics:
        seconds = _steps(prepared.variants, run, metrics, listener)
    after = bases.fingerprint_model(base.model)
    assert after == before, "the frozen base has changed during training"
    adapters = {v.name: adapter_of(prepared, v) for v in prepared.variants if not isinstance(v, FullVariant)}
    listener.status("scoring on held-out rows")
    scored = evaluate(prepared, adapters, listener)
    sizes = save(prepared, adapters, scored)
    summary = summarise(prepared, scored, sizes, seconds, {"before": before, "after": after})
    write_json(run.out / "summary.json", summary)
    return Report(run.out, summary, adapters, base)


def _steps(variants: list[Variant], run: RunConfig, metrics: Metrics, listener: Listener) -> float:
    """Step all live variants together until each has finished or stopped. Returns the steps' time in seconds."""
    listener.begin({v.name: v.total_steps for v in variants})
    total = 0.0
    while live := [v for v in variants if v.live]:
        start = time.perf_counter()
        windows = {v: v.window() for v in live}
        losses = run_windows(windows, run.max_tokens)
        tokens, elapsed = sum(w.tokens for w in windows.values()), time.perf_counter() - start
        logged = {v: v.step(losses[v], w, elapsed * w.tokens / tokens) for v, w in windows.items()}
        seconds = time.perf_counter() - start
        total += seconds
        for v, w in windows.items():
            line = _line(v, w, logged[v]) | {"seconds": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 1)}
            if v.progress.step % run.log_every == 0 or not v.live:
                metrics.write(line)
            listener.step(line)
            if v.progress.stopped:
                listener.stopped(v.name, v.progress.stopped)
    return total


def _line(v: Variant, w: Window, logged: dict[str, float]) -> dict[str, Any]:
    """A variant's line in metrics.jsonl; seconds and tokens_per_s of the joint step are added to it."""
    counts = {"tokens": w.tokens, "supervised_tokens": w.supervised}
    return {"variant": v.name, "step": v.progress.step, "epoch": v.rows.epoch, **logged, **counts}
