"""A run from its run file to its run folder: prepare, train all variants together, score them beside the base, save.

The order of this file is the order of a run. Nothing here prints; a `Listener` is told what happens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from trimtab.atomic import clear_unfinished
from trimtab.bases.unchanged import Watch
from trimtab.errors import BaseError, Mistakes
from trimtab.memory import explained
from trimtab.methods import FullConfig
from trimtab.model import Base
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.rewards.asked import Rewarded
from trimtab.store import Adapter
from trimtab.store.registry import Store
from trimtab.tables import Table
from trimtab.train.before import base_of, note_mistakes, refuse_sharded, refuse_too_much
from trimtab.train.beside import Beside, alone
from trimtab.train.clone import with_clones
from trimtab.train.config import RunConfig, refuse_idle_ranks
from trimtab.train.control import forget_end
from trimtab.train.evaluate import HeldOut
from trimtab.train.finish import adapter_of, evaluate, note_scores, save, summarise, test_rows
from trimtab.train.full import FullVariant
from trimtab.train.halving import Halving
from trimtab.train.heap import Heap
from trimtab.train.interrupt import Stop
from trimtab.train.keeper import Keeper
from trimtab.train.listen import Deaf, Listener, Silent
from trimtab.train.mirror import Mirror, mirror_of
from trimtab.train.page import write_page
from trimtab.train.prepare import prepare, set_up, warn_of_rows
from trimtab.train.publish import open_store, publish_variants, refuse_unpublished
from trimtab.train.report import write_json
from trimtab.train.resume import (
    find_start,
    identity,
    is_longer,
    occupied,
    refuse_changes,
    refuse_other_content,
    refuse_shorter,
    settings,
)
from trimtab.train.rollouts import Rollouts
from trimtab.train.score_table import fitting_measure, gain, score_table
from trimtab.train.sinks import tracking
from trimtab.train.steering import Steering
from trimtab.train.step import run_step
from trimtab.train.validate import Validator, ahead, is_owed
from trimtab.train.variant import StepBatch, Variant
from trimtab.version import __version__


@dataclass
class Report:
    """A finished run. summary: what summary.json holds. adapters: the trained adapters by variant (full fine-tuning is a model folder
    instead). url: where the run is, if `out` is only its working copy."""

    out: Path
    summary: dict[str, Any]
    adapters: dict[str, Adapter]
    base: Base
    url: str | None = None

    @property
    def where(self) -> str:
        """Where it is, for people."""
        return f"{self.url} (working copy: {self.out})" if self.url else str(self.out)

    def table(self) -> Table:
        """What each variant costs beside the base, and its scores."""
        return score_table(self.summary)

    def __str__(self) -> str:
        return "\n".join(line for line in (str(self.table()), gain(self.summary), f"saved in {self.where}") if line)

    def _repr_html_(self) -> str:
        lines = [line for line in (gain(self.summary), f"saved in {self.where}") if line]
        return self.table().html() + "".join(f"<p>{escape(line)}</p>" for line in lines)


def train(
    run: RunConfig | Mapping[str, Any] | str | Path,
    *,
    base: Base | None = None,
    listener: Listener | None = None,
    resume: bool = False,
    extend: bool = False,
    stop: Stop | None = None,
    halving: Halving | None = None,
    store: str | Path | None = None,
    beside: Beside = alone,
    place: Place = ONE_PROCESS,
) -> Report:
    """Train every variant of a run together on one frozen base, score it, save it under the run's `out`.

    run: a RunConfig, a run file's path, or a mapping of its shape. base: one that is loaded already. resume: go on from the newest good
    checkpoint in `out`; a run that was interrupted before its first one starts anew, one that has finished is returned as it is. extend:
    with resume, more epochs or steps than before may be asked for, of a finished run too. stop: asks a run to end early, which it does with
    a checkpoint and Interrupted. halving: ends the worst variants at its rungs; what it is, is no part of the run file, so one that resumes
    must be given the same. store: the folder of the store that a run with `store` publishes to, `default_root()` where None; one that fails
    at the end costs nothing but the publishing, which a resumed run makes good. beside: what uses base and variants between steps. place:
    where it runs; every rank calls `train` with the same arguments, and only the first one writes and is heard.
    TrimtabError where the run file, the data, the base, the store or the disk is at fault; nothing is written into `out` before all of the
    former have been read and checked.
    """
    run = RunConfig.of(run)
    listener, stop = (listener or Silent()) if place.first else Deaf(), stop or Stop()
    mirror = mirror_of(run, listener, place)
    if mirror is not None and run.url is not None:
        run, own_mirror = run.writing_to(run.url), mirror  # on another machine than the run file was read
        place.once(lambda: own_mirror.fetch(resume))
    has_ended = (run.out / "summary.json").exists()
    place.agree({"resume": resume, "extend": extend, "whether `out` has a summary.json": has_ended})  # before their ways part
    if resume and has_ended and not (extend and is_longer(run)):
        return finished(run, base, listener, store, place, mirror)
    start, mistakes = None, Mistakes()
    with mistakes.noted():
        start = find_start(run, resume, extend)
        run = with_clones(run, start.identity.get("clones", {})) if start else run
    shape = note_mistakes(run, base, mistakes)
    with mistakes.noted():
        refuse_sharded(run, place)
    with mistakes.noted():
        refuse_idle_ranks(run, place.ranks)
    mistakes.refuse("this run cannot start")
    target = open_store(run, store)
    refuse_too_much(run, shape, listener.warning, loaded=base is not None, place=place)
    if resume:
        listener.status(f"going on after step {start.moment.step}" if start else f"{run.out} holds no checkpoint, so the run starts anew")
    listener.status(f"loading {run.base}" if base is None else f"using {base.name or run.base}")
    base = base_of(run, base, place, run.dtype, listener)
    watch = Watch(base.model)
    set_up(run, base, listener)
    with explained("reading rows and making the variants", "train fewer variants together, on fewer rows, or make memory free"):
        prepared = prepare(run, base, place)
        prepared.clones |= start.identity.get("clones", {}) if start else {}
        warn_of_rows(prepared, listener)
        rewarded = Rewarded(run.root, listener.warning)
        validator, tests = Validator(prepared, rewarded, halving), test_rows(prepared)
    what = identity(prepared, watch.before)
    if start is not None:
        refuse_changes(start.identity["content"], what["content"], "the base or the data have changed since the checkpoint")
        refuse_shorter(start, prepared)
    refuse_idle_ranks(run, place.ranks, {v.name: len(v.rows.examples) for v in prepared.variants})
    place.agree(what["settings"] | what["content"] | {"checkpoint": start and start.path.name, "version": __version__})
    with occupied(run.out, start, listener.warning) if place.first else nullcontext() as own, rewarded:
        hold = place.once(lambda: own)
        assert hold is not None, "the first rank's, on every rank"
        place.once(lambda: (run.out / "summary.json").unlink(missing_ok=True))  # of one that is extended: it has not finished any more
        keeper = Keeper(prepared, what, start, listener, hold, mirror)
        place.once(lambda: keeper.describe({"in_step": halving is not None}))
        if not place.restarted:  # ranks that are started again after an end that was asked for end again
            place.once(lambda: forget_end(run.out, listener.warning))
        with keeper.metrics:
            if mirror is not None:
                mirror.begin(place)
            _steps(keeper, validator, tests, rewarded, listener, stop, beside)
        return _conclude(keeper, watch, tests, rewarded, target, listener)


def _conclude(
    keeper: Keeper,
    watch: Watch,
    tests: dict[str, HeldOut],
    rewarded: Rewarded,
    target: Store | None,
    listener: Listener,
) -> Report:
    """Save what was trained, score it, publish it. watch: the base before the first step."""
    prepared = keeper.prepared
    run, base = prepared.run, prepared.base
    adapters = {v.name: adapter_of(prepared, v) for v in prepared.variants if not isinstance(v, FullVariant)}

    def write_adapters() -> tuple[dict[str, int], dict[str, str]]:
        keeper.hold.check()
        return save(prepared, adapters)

    with keeper.explained():
        sizes, lost = prepared.place.once(write_adapters)
    for v in prepared.variants:
        if v.name in lost:
            v.progress.stopped = v.progress.stopped or lost[v.name]
            listener.warning(f"{v.name} {lost[v.name]}")
            adapters.pop(v.name, None)
    before, after = watch.before, watch.now(base.model)
    if after != before:
        raise _changed(run, before, after)
    with keeper.explained():
        listener.status("scoring on held-out rows" if tests else "no `test` rows, so nothing is scored")
        with keeper.within_memory("scoring on held-out rows"):
            scored = evaluate(prepared, adapters, lost, tests, rewarded, listener)

        def write() -> dict[str, Any]:
            keeper.hold.check()
            note_scores(prepared, adapters, scored)
            fingerprints = {"before": before, "after": after}
            fitting = {name: fitting_measure([q.reference for q in held.questions]) for name, held in tests.items() if held.questions}
            summary = summarise(prepared, scored, sizes, keeper.seconds, fingerprints) | {"measures": fitting} | keeper.identity
            write_json(run.out / "summary.json", summary)
            write_page([run.out], run.out / "report.html")
            try:
                _publish(run, target, base, summary, listener)
            finally:
                if keeper.mirror is not None:
                    listener.status(f"sending the results to {keeper.mirror.url}")
                    keeper.mirror.finish()
            return summary

        summary = prepared.place.once(write)
    return Report(run.out, summary, adapters, base, run.url)


def _changed(run: RunConfig, before: str, after: str) -> BaseError:
    return BaseError(
        f"the base {run.base!r} has changed during training: {before} before the first step, {after} after the last. What was trained is"
        f" saved in {run.out / 'adapters'}, but not scored: it may not fit the base as it is stored",
        fix="find what writes to the base's weights in this process (trimtab does not), load the base anew and train again;"
        " `trimtab eval` shows what the saved adapters do on it",
    )


def finished(
    run: RunConfig,
    base: Base | None,
    listener: Listener,
    store: str | Path | None = None,
    place: Place = ONE_PROCESS,
    mirror: Mirror | None = None,
) -> Report:
    """The report of a run that has nothing left to do but to publish, and to send to its bucket, what is not there yet. ConfigError where
    the run file, the data or the base have changed since."""
    summary = json.loads((run.out / "summary.json").read_text(encoding="utf-8"))
    run = with_clones(run, summary.get("clones", {}))
    refuse_changes(summary.get("settings", {}), settings(run), f"the run in {run.out} is finished, and its run file has changed since")
    base = base_of(run, base, place, run.dtype or summary.get("dtype"), listener)
    if "content" in summary:
        what = f"the run in {run.out} is finished, and its base or its data have changed since"
        refuse_other_content(run, base, summary["content"], what, listener)

    def complete() -> None:
        clear_unfinished(run.out)
        if not (run.out / "report.html").exists():  # killed, or out of disk, after the summary
            write_page([run.out], run.out / "report.html")
        listener.status(f"the run in {run.out} is finished, there is nothing left to do")
        try:
            _publish(run, open_store(run, store), base, summary, listener)
        finally:
            if mirror is not None:
                mirror.claim_and_finish()

    place.once(complete)
    saved = {name for name, entry in summary["variants"].items() if entry["saved_step"] is not None}
    names = [v.name for v in run.variants if v.name in saved and not isinstance(v.method, FullConfig)]
    return Report(run.out, summary, {n: Adapter.load(run.out / "adapters" / n, base) for n in names}, base, run.url)


def _publish(run: RunConfig, store: Store | None, base: Base, summary: dict[str, Any], listener: Listener) -> None:
    """Publish what is in the run folder, and say so in summary.json. TrimtabError, with the commands that do it, where that fails."""
    if store is not None:
        listener.status(f"publishing to {store.root}")
        problems = publish_variants(run, store, base, summary, listener)
        write_json(run.out / "summary.json", summary)
        refuse_unpublished(run, store, problems)


def _steps(
    keeper: Keeper,
    validator: Validator,
    tests: dict[str, HeldOut],
    rewarded: Rewarded,
    listener: Listener,
    stop: Stop,
    beside: Beside,
) -> None:
    """Step all live variants together until each has finished or stopped, keeping checkpoints; those that are told to pause or stop make no
    step. Interrupted where `stop` or an order asks for it."""
    run, variants, place = keeper.prepared.run, keeper.prepared.variants, keeper.prepared.place
    listener.begin({v.name: v.total_steps for v in variants}, ahead(validator, tests))
    steering = Steering(keeper, validator, tests, listener)
    heap = Heap(sparing=run.activation_checkpointing)
    tracked = tracking(run.track if place.first else (), run.out, keeper.identity["settings"], keeper.metrics, listener.warning)
    rollouts = Rollouts(keeper.prepared, rewarded)
    with tracked as metrics, stop.held(), beside(keeper.prepared) as between, keeper.rescued():
        if owing := [v for v in variants if is_owed(v)]:
            validator.after_step(owing, metrics, listener)
        while going := steering.going(metrics, stop, between):
            start = time.perf_counter()
            with keeper.within_memory("training"):
                keeper.before_step()
                batches = {v: v.next_batch() for v in going}
                batches = rollouts.filled(batches)
                found = run_step(batches, run.max_tokens, place)
                tokens, elapsed = sum(b.tokens for b in batches.values()), time.perf_counter() - start
                shares = {v: elapsed * (b.tokens / tokens if tokens else 1 / len(batches)) for v, b in batches.items()}
                logged = {
                    v: v.step(f.loss, f.grad_norm, batches[v], shares[v]) | f.metrics | dict(batches[v].metrics) for v, f in found.items()
                }
            heap.after_step()
            seconds = time.perf_counter() - start
            for v, b in batches.items():
                line = _line(v, b, logged[v]) | {"seconds": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 1)}
                if v.progress.step % run.log_every == 0 or not v.live:
                    metrics.write(line)
                listener.step(line)
                if v.progress.stopped:
                    listener.stopped(v.name, v.progress.stopped)
            with keeper.within_memory("validating"):
                validator.after_step(going, metrics, listener)
            keeper.after_step(seconds, stop)
            between()


def _line(v: Variant, b: StepBatch, logged: dict[str, float]) -> dict[str, Any]:
    """A variant's line in metrics.jsonl; seconds and tokens_per_s of the joint step are added to it."""
    counts = {"tokens": b.tokens, "supervised_tokens": b.counts.targets}
    return {"variant": v.name, "step": v.progress.step, "epoch": v.rows.epoch, **logged, **counts}
