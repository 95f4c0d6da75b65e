"""The driver: gives each group an actor on a node, hears how far they are, and begins a group anew whose node is lost.

Ray places the actors, by what each group asks for. A group goes on from its newest checkpoint, so a lost node costs the steps since then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.cluster.board import Board
from trimtab.cluster.job import Job, offered, refuse_unplaceable
from trimtab.cluster.marker import Marker
from trimtab.cluster.nodes import Cluster
from trimtab.cluster.worker import Ended, Told, Worker
from trimtab.errors import ConfigError, TrimtabError
from trimtab.train.checkpoint import steps_of
from trimtab.train.interrupt import Interrupted, Stop
from trimtab.train.listen import Silent
from trimtab.train.mirror import mirror_of
from trimtab.version import __version__

POLL_S = 0.5
"""A worker that has nothing to tell answers after so long."""
NODES_EVERY_S = 2.0
PATIENCE_S = 60.0
"""How long a group may wait for a node that could take it, where none is alive: a cluster that grows by itself starts one."""
LOSSES = 3
"""A group whose node is lost so often without a new checkpoint is given up: its own work ends the process, or there is none to save."""
END_S = 600.0
"""For the step that runs and its checkpoint, after Ctrl-C."""


class Lost(Exception):
    """The worker of a group is gone."""


@dataclass
class Placed:
    """A group on its way. asked: the answer that is awaited, to `question`. saved: its newest checkpoint when it was begun."""

    job: Job
    actor: Any = None
    asked: Any = None
    question: str = "where"
    node: str = ""
    losses: int = 0
    saved: str = ""
    marker: Marker | None = None
    ended: Ended | None = None


def drive(cluster: Cluster, jobs: Sequence[Job], board: Board, stop: Stop) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Train all jobs on the cluster: each with its summary, as it finishes. Nothing of them runs any more when this ends.

    ConfigError where no node can take a job, or where a node cannot read what a job needs: then all others end with a checkpoint. A job
    that fails later does not end the others: TrimtabError at the end. Interrupted where `stop` asks for it, after a checkpoint of each.
    """
    refuse_unplaceable({job.name: job.asks for job in jobs}, cluster.nodes())
    board.begin({job.name: [v.name for v in job.run.variants] for job in jobs})
    driver = _Driver(cluster, board, [Placed(job) for job in jobs])
    with driver.ending(), stop.held():
        yield from driver.run(stop)
    driver.refuse_failed()


class _Driver:
    def __init__(self, cluster: Cluster, board: Board, placed: list[Placed]):
        self.cluster, self.board, self.placed = cluster, board, placed
        self._looked, self._hopeless_since = time.monotonic(), dict[str, float]()

    @property
    def open(self) -> list[Placed]:
        return [p for p in self.placed if p.ended is None]

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Whatever ends the driver, nothing goes on without it. (Where it is killed, Ray ends its actors.)"""
        try:
            yield
        finally:
            for p in self.placed:
                self._leave(p)

    def run(self, stop: Stop) -> Iterator[tuple[Job, dict[str, Any]]]:
        import ray

        for p in self.placed:
            self._begin(p)
        while waiting := self.open:
            ready, _ = ray.wait([p.asked for p in waiting], num_returns=1, timeout=POLL_S)
            for p in [p for p in waiting if p.asked in ready]:
                self._answered(p)
                if p.ended is not None:
                    self._leave(p)
                    self.board.note(p.job.name, "ended", p.ended.how)
                    if p.ended.how == "finished" and p.ended.summary is not None:
                        yield p.job, p.ended.summary
            refused = next((p for p in self.placed if p.ended and p.ended.how == "refused"), None)
            if stop.signum or refused:
                self._stop(stop.signum or 15)
            if stop.signum:
                raise Interrupted(stop.signum)
            if refused:
                raise _error(refused)
            self._look_for_hopeless()

    def refuse_failed(self) -> None:
        """TrimtabError where groups have failed."""
        failed = [p for p in self.placed if p.ended and p.ended.how == "failed"]
        if len(failed) == 1:
            raise _error(failed[0])
        if failed:
            raise TrimtabError(f"{len(failed)} groups have failed", problems=[line for p in failed for line in _error(p).among_others()])

    # ---- a group ----

    def _begin(self, p: Placed) -> None:
        """Ask for a worker, which waits until a node has room."""
        import ray

        p.saved = _newest(p.job)
        options = {"num_cpus": p.job.asks.cpus, "num_gpus": p.job.asks.gpus, "memory": p.job.asks.memory}
        actor = ray.remote(Worker).options(**options, scheduling_strategy="SPREAD", max_restarts=0, name=None)
        p.actor = actor.remote(str(Path.cwd()))
        self._ask(p, "where", p.actor.where.remote())

    def _ask(self, p: Placed, question: str, asked: Any) -> None:
        p.question, p.asked = question, asked

    def _answered(self, p: Placed) -> None:
        """Take the answer to what the worker was asked last, and ask on."""
        try:
            self._take(p, _got(p.asked))
        except Lost as lost:
            self._lost(p, str(lost))
        except TrimtabError as error:
            p.ended = Ended("refused", text=error.message, problems=error.problems, fix=error.fix)

    def _take(self, p: Placed, answer: Any) -> None:
        if p.question == "where":
            nodes = {n.id: str(n) for n in self.cluster.nodes()}
            p.node = nodes.get(answer["node"], answer["host"])
            if answer["version"] != __version__:
                raise ConfigError(f"it has trimtab {answer['version']}, and the driver {__version__}", fix="install the same on all nodes")
            self.board.note(p.job.name, "placed", p.node)
            p.marker = Marker(p.job.run)
            self._ask(p, "problems", p.actor.problems.remote(p.job.run, p.marker.where, p.job.dtype))
        elif p.question == "problems":
            self._unmark(p)
            if answer:
                raise ConfigError("it cannot train this", problems=answer, fix="make these the same on all nodes (a shared folder)")
            p.actor.start.remote(p.job)
            self._ask(p, "told", p.actor.told.remote(POLL_S))
        else:
            assert isinstance(answer, Told)
            for kind, values in answer.events:
                self.board.note(p.job.name, kind, *values)
            p.ended = answer.ended
            self._ask(p, "told", p.actor.told.remote(POLL_S))

    def _lost(self, p: Placed, reason: str) -> None:
        """Begin a group anew whose worker is gone, unless that does not help."""
        self._leave(p)
        where = f"the node {p.node}" if p.node else "a node"
        try:
            newest = _newest(p.job)
        except TrimtabError as error:  # what it has saved is not known, so it can neither go on nor count as having saved nothing
            text = f"its process has ended on {where} ({reason}), and its checkpoints cannot be looked up: {error.message}"
            p.ended = Ended("failed", text=text, problems=error.problems, fix="once they are in reach, go on with --resume")
            return
        p.losses = p.losses + 1 if newest == p.saved else 1
        if p.losses >= LOSSES:
            text = f"its process has ended {p.losses} times without a new checkpoint, at last on {where}: {reason}"
            fix = "look at the node's memory and Ray's log there; a smaller checkpoint_every saves more often"
            p.ended = Ended("failed", text=text, fix=fix)  # told by `run`, as of every group that has ended
            return
        self.board.note(p.job.name, "lost", p.node, reason)
        p.job, p.node = p.job.again(), ""
        self._begin(p)

    def _leave(self, p: Placed) -> None:
        """End the worker, if there is one."""
        import ray

        self._unmark(p)
        if p.actor is not None:
            ray.kill(p.actor, no_restart=True)
            p.actor = None

    def _unmark(self, p: Placed) -> None:
        if p.marker is not None:
            p.marker.remove()
            p.marker = None

    # ---- all of them ----

    def _stop(self, signum: int) -> None:
        """Let every worker write a checkpoint, and end it."""
        deadline = time.monotonic() + END_S
        stepping = [p for p in self.open if p.question == "told"]
        for p in stepping:
            p.actor.stop.remote(signum)
        while (left := [p for p in stepping if p.ended is None]) and time.monotonic() < deadline:
            for p in left:
                try:
                    self._take(p, _got(p.asked))
                except Lost as lost:
                    p.ended = Ended("interrupted", text=str(lost))
                except TrimtabError as error:  # of this group: the others still have a checkpoint to write
                    p.ended = Ended("failed", text=error.message, problems=error.problems, fix=error.fix)
                    self.board.note(p.job.name, "ended", "failed")

    def _look_for_hopeless(self) -> None:
        """ConfigError where a group has waited for long, and no node that is alive could take it."""
        now = time.monotonic()
        if now - self._looked < NODES_EVERY_S:
            return
        self._looked, nodes = now, self.cluster.nodes()
        for p in self.open:
            if p.question != "where" or any(p.job.asks.fits(n) for n in nodes):
                self._hopeless_since.pop(p.job.name, None)
            elif now - self._hopeless_since.setdefault(p.job.name, now) > PATIENCE_S:
                self._stop(15)
                fix = "start such a node and go on with --resume; what was trained is in the checkpoints"
                raise ConfigError(f"no node is left for {p.job.name}, which asks for {p.job.asks}; {offered(nodes)}", fix=fix)


def _got(asked: Any) -> Any:
    """A worker's answer. Lost where there is none any more; ConfigError where the node cannot run a worker."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(asked)
    except RayTaskError as error:
        raise TrimtabError(f"the worker has failed, which is a bug: {error}") from error
    except RayError as error:
        text = " ".join(str(error).split())
        if "No module named" in text:
            missing = text[text.index("No module named") :].split()[3].strip("'\".")
            raise ConfigError(
                f"it cannot run trimtab: there is no module {missing}", fix="pip install 'trimtab[ray]', on every node"
            ) from error
        raise Lost(text[:300]) from error


def _error(p: Placed) -> TrimtabError:
    """Why a group was refused or has failed."""
    assert p.ended is not None
    kind = ConfigError if p.ended.how == "refused" else TrimtabError
    where = f" on node {p.node}" if p.node else ""
    return kind(f"{p.job.name}{where}: {p.ended.text}", problems=p.ended.problems, fix=p.ended.fix)


def _newest(job: Job) -> str:
    """The name of a group's newest checkpoint, "" where it has none. ConfigError where its bucket cannot be read, after some attempts."""
    mirror = mirror_of(job.run, Silent())
    return mirror.newest() if mirror is not None else next((path.name for path in steps_of(job.run.out)), "")
