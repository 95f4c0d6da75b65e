"""A run from its run file to its run folder: load, train all variants together, score them beside the base, save.

File order is the run's order: prepare, train, evaluate, save. Nothing here prints; a `Listener` hears what happens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trimtab import bases
from trimtab.batch import BASE
from trimtab.data import Dataset, Example, Source, load_examples, prompt_and_reference, read_source
from trimtab.errors import ConfigError
from trimtab.methods import FullConfig
from trimtab.model import Base, load_base
from trimtab.store import Adapter
from trimtab.train.config import DataConfig, RunConfig
from trimtab.train.evaluate import Contestant, Question, compare
from trimtab.train.full import FullVariant
from trimtab.train.report import Metrics, peak_memory_gb, variant_summary, write_json
from trimtab.train.step import run_windows
from trimtab.train.variant import Variant


class Listener(Protocol):
    """Hears a run. status: a stage begins. step: a variant has stepped (the line of metrics.jsonl). stopped: a variant has given up, and
    why."""

    def status(self, text: str) -> None: ...
    def begin(self, steps: Mapping[str, int]) -> None: ...
    def step(self, line: Mapping[str, Any]) -> None: ...
    def stopped(self, variant: str, reason: str) -> None: ...


class Silent:
    """The listener of a library call."""

    def status(self, text: str) -> None:
        """Not shown."""

    def begin(self, steps: Mapping[str, int]) -> None:
        """Not shown."""

    def step(self, line: Mapping[str, Any]) -> None:
        """Not shown; metrics.jsonl has it."""

    def stopped(self, variant: str, reason: str) -> None:
        """Not shown; summary.json has it."""


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
    fault; nothing
    is written before all of these have been read and checked.
    """
    run = run if isinstance(run, RunConfig) else RunConfig.load(run)
    listener = listener or Silent()
    if run.out.exists() and any(run.out.iterdir()):
        raise ConfigError(
            f"out = {str(run.out)!r} is not empty: a run never overwrites another", fix="name another folder in `out`, or remove this one"
        )
    listener.status(f"loading {run.base}")
    base = base or load_base(run.base, dtype=run.dtype, device=run.device)
    before = bases.fingerprint_model(base.model)
    data = {name: _load(run, name, config, base) for name, config in run.data.items() if any(v.data == name for v in run.variants)}
    variants = [_variant(run, base, config, data[config.data].train.examples) for config in run.variants]
    (run.out / "adapters").mkdir(parents=True, exist_ok=True)
    with Metrics(run.out / "metrics.jsonl") as metrics:
        seconds = _train(variants, run, metrics, listener)
    after = bases.fingerprint_model(base.model)
    if after != before:
        raise AssertionError("the frozen base has changed during training")
    adapters = {v.name: _adapter(base, v) for v in variants if not isinstance(v, FullVariant)}
    listener.status("scoring on held-out rows")
    scored = _evaluate(base, variants, adapters, data, run, listener)
    sizes = _save(run, base, variants, adapters, data, scored)
    summary = {
        "base": run.base,
        "base_parameters": base.spec.num_parameters,
        "base_bytes": sum(p.numel() * p.element_size() for p in base.model.parameters()),
        "base_fingerprint": {"before": before, "after": after},
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "seconds": round(seconds, 3),
        "tokens": (tokens := sum(v.progress.tokens for v in variants)),
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_gb": round(peak_memory_gb(base.device), 3),
        "base_scores": {d: by_name["base"] for d, by_name in scored.items() if "base" in by_name},
        "variants": {v.name: variant_summary(v, scored.get(v.config.data, {}).get(v.name, {}), sizes[v.name]) for v in variants},
    }
    write_json(run.out / "summary.json", summary)
    return Report(run.out, summary, adapters, base)


@dataclass
class _Data:
    train: Dataset
    valid: Dataset | None
    test: Dataset | None


def _load(run: RunConfig, name: str, config: DataConfig, base: Base) -> _Data:
    """Read and encode a data set's splits. Its options are those of the variants that train on it, which must agree."""
    options = {(v.options.max_length, v.options.last_turn_only) for v in run.variants if v.data == name}
    if len(options) > 1:
        raise ConfigError(
            f"data.{name}: its variants differ in max_length or last_turn_only", fix="give both the same, or name the data twice"
        )
    max_length, last_turn_only = options.pop()

    def read(split: str, sources: list[Source]) -> Dataset:
        turn = last_turn_only or split != "train"  # held-out rows ask for their last answer
        return load_examples(sources, base.tokenizer, root=run.root, max_length=max_length, seed=run.seed, last_turn_only=turn)

    valid, test = (read(name, sources) if sources else None for name, sources in (("valid", config.valid), ("test", config.test)))
    return _Data(read("train", config.train), valid, test)


def _variant(run: RunConfig, base: Base, config: Any, examples: Any) -> Variant:
    seed = config.options.seed if config.options.seed is not None else run.seed
    if isinstance(config.method, FullConfig):
        return FullVariant(config, base, examples, run.seed, run.max_tokens)
    fresh = Adapter.create(base, config.method, seed=seed)
    return Variant(config, base.attached, fresh.sites, fresh.params, examples, run.seed, run.max_tokens)


def _train(variants: list[Variant], run: RunConfig, metrics: Metrics, listener: Listener) -> float:
    """Step all live variants together until each has finished or stopped. Returns the steps' time in seconds."""
    listener.begin({v.name: v.total_steps for v in variants})
    total = 0.0
    while live := [v for v in variants if v.live]:
        start = time.perf_counter()
        windows = {v: v.window() for v in live}
        losses = run_windows(windows, run.max_tokens)
        tokens = sum(w.tokens for w in windows.values())
        elapsed = time.perf_counter() - start
        lines = {v: v.step(losses[v], w, elapsed * w.tokens / tokens) for v, w in windows.items()}
        step_seconds = time.perf_counter() - start
        total += step_seconds
        for v, w in windows.items():
            p = v.progress
            line = {
                "variant": v.name,
                "step": p.step,
                "epoch": v.rows.epoch,
                **lines[v],
                "tokens": w.tokens,
                "supervised_tokens": w.supervised,
                "seconds": round(step_seconds, 4),
                "tokens_per_s": round(tokens / step_seconds, 1),
            }
            if p.step % run.log_every == 0 or not v.live:
                metrics.write(line)
            listener.step(line)
            if p.stopped:
                listener.stopped(v.name, p.stopped)
    return total


def _adapter(base: Base, variant: Variant) -> Adapter:
    method, params = variant.method.export(variant.trained())
    return Adapter(base, method, dict(params))


def _evaluate(
    base: Base, variants: list[Variant], adapters: dict[str, Adapter], data: dict[str, _Data], run: RunConfig, listener: Listener
) -> dict[str, dict[str, Any]]:
    """data set -> contestant -> scores, for the data sets that have test rows."""
    held_out = {d: _held_out(s.test, run.data[d], base, run) for d, s in data.items() if s.test}
    names = list(adapters)
    mix, numbers = base.mix([adapters[n] for n in names])
    member = dict(zip(names, numbers, strict=True))
    fields = {
        d: [Contestant("base", BASE)] + [Contestant(v.name, member[v.name]) for v in variants if v.name in member and v.config.data == d]
        for d in held_out
    }

    def decode(ids: list[int]) -> str:
        return base.tokenizer.decode(ids, skip_special_tokens=True)

    def on_answer(n: int) -> None:
        listener.status(f"scoring on held-out rows: {n} tokens")

    scored = compare(
        base.attached,
        mix,
        fields,
        held_out,
        base.stop_ids,
        decode,
        max_tokens=run.max_tokens,
        max_new_tokens=run.evaluate.max_new_tokens,
        on_answer=on_answer,
    )
    for v in variants:
        if isinstance(v, FullVariant) and v.config.data in held_out:
            own = compare(
                v.attached,
                mix,
                {v.config.data: [Contestant(v.name, BASE)]},
                held_out,
                base.stop_ids,
                decode,
                max_tokens=run.max_tokens,
                max_new_tokens=run.evaluate.max_new_tokens,
            )
            scored[v.config.data] |= own[v.config.data]
    return scored


def _held_out(test: Dataset, config: DataConfig, base: Base, run: RunConfig) -> tuple[list[Example], list[Question]]:
    keep = slice(run.evaluate.max_rows)
    examples = test.examples[keep]
    if not run.evaluate.generate:
        return examples, []
    rows = {row.origin: row for source in config.test for row in read_source(source, run.root)[0]}
    return examples, [Question(*prompt_and_reference(rows[e.origin], base.tokenizer)) for e in examples]


def _save(
    run: RunConfig,
    base: Base,
    variants: list[Variant],
    adapters: dict[str, Adapter],
    data: dict[str, _Data],
    scored: dict[str, dict[str, Any]],
) -> dict[str, int]:
    """Save every variant; returns the bytes of each one's tensors on disk."""
    sizes = {}
    for v in variants:
        folder = run.out / "adapters" / v.name
        if isinstance(v, FullVariant):
            v.save(folder, base.tokenizer)
        else:
            metrics = {k: x for k, x in scored.get(v.config.data, {}).get(v.name, {}).items() if k != "samples"}
            info = {
                "variant": v.name,
                "seed": v.seed,
                "options": v.config.options.model_dump(),
                "lr": v.config.lr,
                "steps": v.progress.step,
                "metrics": metrics,
            }
            adapters[v.name].save(folder, run=info | {"data_digest": data[v.config.data].train.digest})
        sizes[v.name] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return sizes
