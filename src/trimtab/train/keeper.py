"""The keeper of a run in progress: its clock, its metrics.jsonl, and when a checkpoint is due."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trimtab.bases.shapes import Architecture
from trimtab.cost.estimate import fitting_tokens
from trimtab.errors import AdapterError, TrimtabError
from trimtab.memory import explained
from trimtab.places.place import RankLost
from trimtab.train.checkpoint import Checkpoint, Moment, folder_of, named, restore_variants, write_checkpoint
from trimtab.train.hold import Hold
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Listener
from trimtab.train.mirror import Mirror
from trimtab.train.options import steps_of
from trimtab.train.past import PLAN
from trimtab.train.prepare import Prepared
from trimtab.train.report import Metrics, Unwritten, plan, write_json


class Keeper:
    """Takes on what a checkpoint holds, and writes new ones. hold: of the run folder. mirror: its copy in a bucket, if it has one. step:
    joint steps done. seconds: their time. saved: the newest checkpoint."""

    def __init__(
        self,
        prepared: Prepared,
        identity: dict[str, Any],
        start: Checkpoint | None,
        listener: Listener,
        hold: Hold,
        mirror: Mirror | None = None,
    ):
        self.prepared, self.identity, self.listener, self.hold, self.mirror = prepared, identity, listener, hold, mirror
        self.step, self.seconds = (start.moment.step, start.moment.seconds) if start else (0, 0.0)
        self.saved: Path | None = start.path if start else None
        path = prepared.run.out / "metrics.jsonl"
        keep = start.moment.metrics.size if start else 0
        self.metrics = Metrics(path, keep, listener.warning) if prepared.place.first else Unwritten(path, _recent(prepared))
        self._stood: list[Callable[[], bool]] = []
        if start is None:
            return
        restore_variants(start, prepared.variants)
        for rejected, reason in start.rejected.items():
            listener.warning(f"{rejected.name} does not verify and was set aside: {reason}; going on from {start.path.name}")
        if isinstance(self.metrics, Metrics) and self.metrics.position != start.moment.metrics:
            listener.warning(f"{path} is not what it was when {start.path.name} was written: its lines may have gaps")

    def after_step(self, seconds: float, stop: Stop) -> None:
        """Count a joint step; write a checkpoint where one is due: every so many steps, at the end, and before Interrupted."""
        self._stood = []
        self.step, self.seconds = self.step + 1, self.seconds + seconds
        every = self.prepared.run.checkpoint_every
        every = every and steps_of(every, max(v.total_steps for v in self.prepared.variants))
        ended = not any(v.live for v in self.prepared.variants)
        signum = self.prepared.place.most(stop.signum)
        if signum or (every is not None and (ended or self.step % every == 0)):
            self._save()
        if signum:
            raise Interrupted(signum, f" after step {self.step}")

    def leave(self, signum: int) -> None:
        """End the run where it stands, between two steps, with a checkpoint."""
        self.secure()
        raise Interrupted(signum, f" after step {self.step}")

    def secure(self) -> None:
        """Write a checkpoint, unless there is one of this step. What has been ordered since then stands in control.json."""
        if not (folder_of(self.prepared.run.out) / named(self.step)).exists():
            self._save()

    def joined(self, identity: dict[str, Any]) -> None:
        """There is a variant more. identity: of the run with it."""
        self.identity = identity
        if isinstance(self.metrics, Unwritten):
            self.metrics.remember(_recent(self.prepared))

    def before_step(self) -> None:
        """Remember where the variants stand, so that a step which is not completed can be taken back."""
        self._stood = [v.standing() for v in self.prepared.variants]

    def describe(self, control: Mapping[str, Any]) -> None:
        """Write run.json, on the first rank. It is for those who look at the run, so a disk that is full does not end it. control: what
        became of orders."""
        path = self.prepared.run.out / PLAN
        try:
            write_json(path, plan(self.prepared) | self.identity | {"control": control})
        except OSError as error:
            self.listener.warning(f"{path} cannot be written ({error.strerror}): pages do not show this run's settings until it ends")

    @contextmanager
    def rescued(self) -> Iterator[None]:
        """While steps run: if a rank is lost, the first of the others saves what all had before the step that cannot be completed, or
        after one that was. RankLost says where."""
        try:
            yield
        except RankLost as lost:
            taken_back = [back() for back in self._stood]
            if not all(taken_back):
                self.step += 1
            there_already = folder_of(self.prepared.run.out) / named(self.step)
            if there_already.exists():
                self.saved = there_already
            else:
                self._save()
            there = f"what was trained is safe in {self.saved}" if self.saved else "nothing was saved yet"
            ended = RankLost(f"{lost.message}; {there}", fix=lost.fix)
            ended.trained = True
            raise ended from lost

    def _save(self) -> None:
        """Write a checkpoint, on the first rank that lives. A disk that is full does not end the run: the next one may find room, and the
        last one is still there. Occupied where another process has taken the run folder over."""
        run = self.prepared.run
        if not self.prepared.place.leads:
            return
        try:
            self.hold.check()
            moment = Moment(self.step, self.seconds, self.metrics.secure())
            self.saved = write_checkpoint(run.out, moment, self.identity, self.prepared.variants, run.keep_checkpoints, self.hold.check)
        except (OSError, AdapterError) as error:
            newest = f"the newest is {self.saved.name}" if self.saved else "there is none yet"
            reason = error.message if isinstance(error, AdapterError) else str(error)
            self.listener.warning(f"no checkpoint after step {self.step}, the run goes on ({newest}): {reason}")
        else:
            self.listener.saved(self.step, self.saved)
            if self.mirror is not None:
                self.mirror.saved()

    @contextmanager
    def within_memory(self, doing: str) -> Iterator[None]:
        """While the run computes: where memory runs out, OutOfMemory says what was done, what would fit, and what is saved."""
        with explained(f"{doing}, after step {self.step}", self._what_fits):
            yield

    def _what_fits(self) -> str:
        prepared, run = self.prepared, self.prepared.run
        longest = max(int(d.examples.tokens.max()) for splits in prepared.data.values() for d in splits.read.values())
        base = prepared.base
        shape = Architecture(base.name, base.spec, base.spec.num_parameters, base.dtype)
        tokens = fitting_tokens(run, shape, [v.config for v in prepared.variants], base.dtype, longest)
        fits = [f"a run with max_tokens: {tokens}"] if tokens else [f"rows shorter than the longest, of {longest} tokens (max_length)"]
        fits += ["fewer variants"] if len(prepared.variants) > 1 else []
        saved = f" (which {self.saved} goes on with: --resume)" if self.saved else ""
        fits += [] if run.activation_checkpointing else [f"activation_checkpointing: true{saved}"]
        return f"max_tokens is {run.max_tokens}; what takes less: {', or '.join(fits)}"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """While results are written: what goes wrong then says what is saved, and how to go on."""
        try:
            yield
        except (OSError, SafetensorError, AdapterError) as error:
            there = f"what was trained is safe in {self.saved}" if self.saved else "nothing is saved, because checkpoint_every is off"
            raise TrimtabError(
                f"the results of the run cannot be written: {error.message if isinstance(error, AdapterError) else error}; {there}",
                problems=error.problems if isinstance(error, AdapterError) else (),
                fix="make room, then `trimtab train RUN.yaml --resume`",
            ) from error


def _recent(prepared: Prepared) -> int:
    """Lines of a step and a validation of two joint steps: no rank is further ahead of another."""
    return 4 * len(prepared.variants)
