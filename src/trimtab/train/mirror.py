"""A run folder's copy in a bucket, where `out` is a URL: from it the run goes on on another machine, and others read it.

The run has its folder on this machine, the working copy, and trains as in any folder. After each checkpoint the copy gets metrics.jsonl,
then the checkpoint's files, then the snapshot that names them (`store.remotes.snapshot`). At the end it gets the results. If the bucket is
out of reach, the run goes on, and all is sent after the next checkpoint. Nothing is lost: it is in the working copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from trimtab.atomic import is_unfinished
from trimtab.errors import AdapterError, ConfigError, TrimtabError
from trimtab.places.place import ONE_PROCESS, Place
from trimtab.store.remotes.fetch import ATTEMPTS
from trimtab.store.remotes.snapshot import ROOM, Copy, Snapshot, TakenOver, mark_of, working_copy
from trimtab.train.checkpoint import MANIFEST, NAME, Damaged, newest_checkpoint, steps_of
from trimtab.train.config import RunConfig
from trimtab.train.control import CONTROL
from trimtab.train.hold import LOCK, Occupied, held
from trimtab.train.listen import Listener
from trimtab.train.past import PLAN

ENDS = ("summary.json", "leaderboard.json")
"""Written last, by a run and by a sweep."""
EARLY = ("metrics.jsonl", PLAN, CONTROL, "sweep.json")
"""What is there before the end, beside checkpoints."""


class Mirror:
    """The copy at `url`. folder: the working copy of this machine."""

    def __init__(self, url: str, listener: Listener):
        self.url, self._listener = url, listener
        self._behind = False
        with self._named():
            self._copy, self.folder = Copy(url), working_copy(url)

    def fetch(self, resume: bool) -> None:
        """Bring the working copy to where the copy is, if that is further. ConfigError where something is there and the run is to be a new
        one; AdapterError where the bucket cannot be read. Occupied where a process of this machine trains into the working copy."""
        with self._named():
            there = self._copy.read()
            found = [p for p in self._copy.files() if not is_unfinished(p)] if there is None else []
            others = [p for p in found if not (resume and p in EARLY)]
            if others or (there is not None and not resume):
                going = ", or go on with it: --resume (from Python resume=True)" if there is not None else ""
                fix = f"name another folder in `out`, or remove this one{going}"
                raise ConfigError(f"out = {self.url!r} is not empty: a run never overwrites another", fix=fix)
            if there is None or _far(there.files) <= self._far_here():
                return
            self._listener.status(f"fetching the run from {self.url}")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise AdapterError(f"its working copy {self.folder} cannot be made: {error.strerror}", fix=ROOM) from error
            with held(self.folder, self._listener.warning):
                for path in self.folder.iterdir():
                    if path.name != LOCK and not (path / LOCK).exists():
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                self._copy.fetch(there, self.folder, sorted(there.files, key=_turn))

    def _far_here(self) -> tuple[int, bool]:
        """As `_far`, but a checkpoint that is damaged does not count, unless the run has ended: then its results are here, and may be
        nowhere else."""
        step, ended = _far(_paths(self.folder))
        if step < 0 or ended:
            return step, ended
        try:
            found = newest_checkpoint(self.folder)
            rejected = found.rejected if found else {}
            step = int(found.path.name.removeprefix("step-")) if found else -1
        except Damaged as reasons:
            rejected, step = dict.fromkeys([self.folder], str(reasons)), -1
        for path, reason in rejected.items():
            self._listener.warning(f"{path.name} does not verify: {reason}; what {self.url} has counts, if that is further")
        return step, ended

    def begin(self, place: Place = ONE_PROCESS) -> None:
        """Say at the bucket that this run goes on here; whoever trained it before sends nothing more. The results of a run that is extended
        go: it has not finished any more. Checkpoints go that a killed sender has left there without a name. Occupied where a newer
        checkpoint has come there since `fetch`, the one of here is damaged, or another process takes the run over meanwhile."""
        self._copy.sender = place.once(lambda: self._copy.sender)
        if place.first:
            with self._named():
                there, here = (_far(paths)[0] for paths in ((self._copy.read() or Snapshot()).files, _paths(self.folder)))
                if there > max(here, -1):
                    text = f"out = {self.url!r} has a checkpoint of step {there}, which is newer than what {self.folder} goes on from"
                    raise Occupied(text, fix="if no other process trains there, resume once more: it is fetched")
                self._copy.send(self.folder, _in_order(self.folder, ended=False), claim=True)
                with self._ours():
                    self._copy.remove_unnamed(
                        lambda path: path.startswith("checkpoints/") and NAME.fullmatch(path.split("/")[1]) is not None
                    )

    def saved(self) -> None:
        """Send the newest checkpoint. Occupied where another process has taken the run over. If the bucket is out of reach, a warning."""
        self._copy.attempts = 1 if self._behind else ATTEMPTS  # a step must not wait long again and again
        try:
            self._send(ended=False)
        except (AdapterError, OSError) as error:
            text = error.message if isinstance(error, AdapterError) else str(error)
            self._listener.warning(f"not sent to {self.url}, the run goes on and is kept in {self.folder}: {text}")
            self._behind = True
        else:
            if self._behind:
                self._listener.note(f"{self.url} is in reach again and has all that was kept")
            self._behind = False

    def finish(self, claim: bool = False) -> None:
        """Send the results. claim: whoever trained there before sends nothing more. TrimtabError, which says where they are, if that cannot
        be done."""
        self._copy.attempts = ATTEMPTS
        try:
            self._send(ended=True, claim=claim)
        except (AdapterError, OSError) as error:
            text = error.message if isinstance(error, AdapterError) else str(error)
            what = f"the run is finished and kept in {self.folder}, but could not be sent to {self.url}: {text}"
            raise TrimtabError(
                what, fix="once it is in reach, run the same command with --resume on this machine: it sends the rest"
            ) from error

    def claim_and_finish(self) -> None:
        """`finish` of a run that ended in another process, if something of it is not there. It has a token of its own: with that of
        whoever sent last, who may still train there, none of both would hear of the other."""
        with self._named():
            there = self._copy.read() or Snapshot()
        here = _in_order(self.folder, ended=True)
        if _far(there.files) <= _far(_paths(self.folder)) and there.files != {path: mark_of(self.folder / path) for path in here}:
            self.finish(claim=True)

    def newest(self) -> str:
        """The name of the newest checkpoint there, "" where there is none. ConfigError where that cannot be read."""
        with self._named():
            there = self._copy.read() or Snapshot()
        return max((p.split("/")[1] for p in there.files if p.startswith("checkpoints/")), default="")

    def _send(self, ended: bool, claim: bool = False) -> None:
        with self._ours():
            self._copy.send(self.folder, _in_order(self.folder, ended), claim=claim)

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """Occupied where another process has taken the run over."""
        try:
            yield
        except TakenOver as other:
            text = f"{other} has taken over out = {self.url!r}, so this run ends, and sends nothing more there; it is kept in {self.folder}"
            raise Occupied(text, fix="leave the run to it; if nothing runs there any more, go on with --resume") from None

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the bucket, which say that `out` names it."""
        try:
            yield
        except AdapterError as error:
            raise ConfigError(f"out = {self.url!r}: {error.message}", problems=error.problems, fix=error.fix) from error


def mirror_of(run: RunConfig, listener: Listener, place: Place = ONE_PROCESS) -> Mirror | None:
    """The run's mirror, None where `out` is a folder of this machine. ConfigError where it cannot have one."""
    if run.url is None:
        return None
    if place.here != place.ranks:
        fix = "name a folder that all machines share, or start all ranks on one machine"
        raise ConfigError(f"out = {run.url!r}: ranks of several machines need one run folder", fix=fix)
    return Mirror(run.url, listener)


def _far(paths: Iterable[str]) -> tuple[int, bool]:
    """How far a run is, by its files: its newest whole checkpoint, and whether it has ended."""
    names = set(paths)
    whole = [step for p in names if p.endswith(f"/{MANIFEST}") and NAME.fullmatch(step := PurePosixPath(p).parent.name)]
    return max((int(step.removeprefix("step-")) for step in whole), default=-1 if names else -2), any(name in names for name in ENDS)


def _paths(folder: Path) -> Iterator[str]:
    """The files of a run folder, relative to it, but hidden ones and those of run folders in it."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or is_unfinished(path.name) or path.is_symlink():
            continue
        if path.is_file():
            yield path.name
        elif not (path / LOCK).exists():
            yield from (f"{path.name}/{inner}" for inner in _paths(path))


def _in_order(folder: Path, ended: bool) -> list[str]:
    """What is sent, in order: the newest checkpoint after metrics.jsonl, and its manifest last. ended: the results too."""
    newest = next((f"checkpoints/{p.name}/" for p in steps_of(folder)), "-")
    paths = [p for p in _paths(folder) if (p in EARLY) or p.startswith(newest) or (ended and not p.startswith("checkpoints/"))]
    return sorted(paths, key=_turn)


def _turn(path: str) -> tuple[bool, bool, bool, str]:
    """By which files are moved: a checkpoint's manifest and a summary say how far a run is, so they come when all else is there."""
    return path in ENDS, path.endswith(f"/{MANIFEST}"), path.startswith("checkpoints/"), path
