"""Several run files on a Ray cluster: each is one joint group, which one node trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.cluster.board import Board
from trimtab.cluster.drive import drive
from trimtab.cluster.job import Job, asks, need_of
from trimtab.cluster.nodes import Cluster
from trimtab.errors import ConfigError, Mistakes
from trimtab.train.before import note_mistakes
from trimtab.train.config import RunConfig
from trimtab.train.interrupt import Stop
from trimtab.train.listen import Silent
from trimtab.train.mirror import mirror_of
from trimtab.train.resume import find_start


def train_all(
    runs: Mapping[str, RunConfig],
    cluster: Cluster,
    board: Board,
    *,
    stop: Stop | None = None,
    resume: bool = False,
    extend: bool = False,
    store: Path | None = None,
    cpus: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Train all runs, each on one node, and return their summaries by name. The arguments are those of `train`; cpus: see `job.asks`.

    TrimtabError as `drive` says, and before anything has begun where a run file, its base or its rows are at fault.
    """
    outs: dict[Path, str] = {}
    for name, run in runs.items():
        other = outs.setdefault(run.out.absolute(), name)
        if other != name:
            raise ConfigError(f"{name} and {other} both write to {run.out}", fix="give each run file an `out` of its own")
    mistakes, jobs, nodes = Mistakes(), list[Job](), cluster.nodes()
    for name, run in runs.items():
        with mistakes.noted():
            own = Mistakes()
            shape = note_mistakes(run, None, own)
            if (mirror := mirror_of(run, Silent())) is not None:
                with own.noted():
                    mirror.fetch(resume)
            if not (run.out / "summary.json").exists() or not resume:
                with own.noted():
                    find_start(run, resume, extend)
            own.refuse(f"{name} cannot start")
            jobs.append(Job(name, run, asks(need_of(run, shape), nodes, cpus), resume=resume, store=store, extend=extend))
    mistakes.refuse("these runs cannot start")
    found = {job.name: summary for job, summary in drive(cluster, jobs, board, stop or Stop())}
    return {name: found[name] for name in runs}
