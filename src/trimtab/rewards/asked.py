"""Rewards, asked in processes of their own: what hangs, crashes or answers with nonsense ends neither the run nor its step.

Every reward has one process, started when it is first asked. All rewards of a call work at the same time. One that does not answer in its
time is ended, and its numbers are missing; after three such calls in a row it is no longer asked. A missing number is NaN, as in TRL.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError
from trimtab.paths import user_path
from trimtab.rewards.spec import Reward

MOST_BYTES = 64 << 20
"""Of an answer."""
PATIENCE = 3
"""Calls in a row that a reward may let run out."""


@dataclass(frozen=True)
class Call:
    """What rewards are told of n answers. prompts: text or messages, as the rows have them. texts: the answers. ids: their tokens. columns:
    of the rows, a list of n under each name. references: the rows' own answers. calls: what the answers call, as `canonical`. step: the
    optimizer step."""

    prompts: Sequence[Any]
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    columns: dict[str, list[Any]]
    references: Sequence[Any]
    calls: Sequence[Sequence[str]]
    step: int

    def line(self, reward: Reward) -> bytes:
        """What the process of a reward gets."""
        told: dict[str, Any] = {"texts": list(self.texts), "step": self.step, "calls": list(self.calls)}
        if reward.file is None:
            empty = [None] * len(self.texts)
            told["references"] = self.references if reward.column is None else self.columns.get(reward.column, empty)
        else:
            talks = [
                [{"role": "assistant", "content": t}] if isinstance(p, list) else t for p, t in zip(self.prompts, self.texts, strict=True)
            ]
            told |= {"prompts": self.prompts, "completions": talks, "completion_ids": self.ids, "columns": self.columns}
        return json.dumps(told, default=str).encode() + b"\n"


@dataclass
class Process:
    """The process of one reward. limit: seconds for a call."""

    reward: Reward
    root: Path
    limit: float
    late: int = 0
    told: set[str] = field(default_factory=set)
    _running: subprocess.Popen[bytes] | None = None
    _socket: socket.socket | None = None

    def begin(self, line: bytes, deadline: float) -> str | None:
        """Send a call. Returns what went wrong."""
        try:
            if self._running is None or self._running.poll() is not None:
                self._start(deadline)
            assert self._socket is not None
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            self._socket.sendall(line)
        except TimeoutError:
            return self._too_late()
        except OSError as error:
            self.end()
            return f"its process cannot be asked: {error}"
        return None

    def finish(self, count: int, deadline: float) -> list[float] | str:
        """The numbers of the call that was sent, NaN where there is none; or what went wrong."""
        assert self._socket is not None and self._running is not None
        found = bytearray()
        try:
            while not found.endswith(b"\n"):
                self._socket.settimeout(max(0.01, deadline - time.monotonic()))
                piece = self._socket.recv(1 << 16)
                found += piece
                if not piece or len(found) > MOST_BYTES:
                    code = self._running.poll() if piece else self._running.wait(5)
                    self.end()
                    return "its answer is too long" if piece else f"its process has ended with code {code}"
        except TimeoutError:
            return self._too_late()
        except (OSError, subprocess.TimeoutExpired) as error:
            self.end()
            return f"its process cannot be asked: {error}"
        self.late = 0
        return _numbers(bytes(found), count)

    def end(self) -> None:
        """End the process, and what it has started in its session."""
        if self._running is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
        if self._socket is not None:
            self._socket.close()
        self._running = self._socket = None

    def _start(self, deadline: float) -> None:
        self.end()
        ours, its = socket.socketpair()
        with its:
            command = [sys.executable, "-m", "trimtab.rewards.worker", str(its.fileno())]
            paths = os.pathsep.join(p for p in sys.path if p)
            self._running = subprocess.Popen(
                command,
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": paths},
            )
        self._socket = ours
        ours.settimeout(max(0.01, deadline - time.monotonic()))
        file = file_of(self.reward, self.root)
        said = {"file": file and str(file), "function": self.reward.function, "options": self.reward.options}
        ours.sendall(json.dumps(said).encode() + b"\n")

    def _too_late(self) -> str:
        self.end()
        self.late += 1
        return f"it has not answered in {self.limit:g} s" + (
            ", the third time in a row: it is no longer asked" if self.late == PATIENCE else ""
        )


class Rewarded:
    """Asks rewards. root: where relative paths start. warning: hears, once for each message, what has failed."""

    def __init__(self, root: Path, warning: Callable[[str], None]):
        self._root, self._warning = root, warning
        self._processes: dict[tuple[str, float], Process] = {}

    def __enter__(self) -> Rewarded:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.end()

    def ask(self, rewards: Sequence[Reward], call: Call, limit: float) -> list[list[float]]:
        """The numbers of each reward. limit: seconds, for rewards without a limit of their own."""
        asked = [self._process(r, r.time_limit or limit) for r in rewards]
        missing = [math.nan] * len(call.texts)
        deadlines, found = list[float](), list[list[float] | str | None]()
        for process in asked:
            deadlines.append(time.monotonic() + process.limit)
            given_up = process.late >= PATIENCE
            found.append(missing if given_up else process.begin(call.line(process.reward), deadlines[-1]))
        for n, process in enumerate(asked):
            if found[n] is None:
                found[n] = process.finish(len(call.texts), deadlines[n])
            if isinstance(problem := found[n], str) and problem not in process.told:
                process.told.add(problem)
                self._warning(f"reward {process.reward.label}, step {call.step}: {problem}")
        return [f if isinstance(f, list) else missing for f in found]

    def _process(self, reward: Reward, limit: float) -> Process:
        key = (repr(reward), limit)
        if key not in self._processes:
            self._processes[key] = Process(reward, self._root, limit)
        return self._processes[key]


def file_of(reward: Reward, root: Path) -> Path | None:
    """The Python file of a reward, None for a built-in. ConfigError where it is none."""
    if reward.file is None:
        return None
    path = user_path(reward.file, ConfigError, "reward", root)
    if not path.is_file():
        raise ConfigError(f"reward = {reward.reward!r}: {path} is not there", fix="name a Python file, relative to the run file's folder")
    return path.absolute()


def _numbers(line: bytes, count: int) -> list[float] | str:
    try:
        reply = json.loads(line)
    except ValueError:
        return "its answer cannot be read"
    if "error" in reply:
        return str(reply["error"])
    scores = [math.nan if s is None else s for s in reply["scores"]]
    if len(scores) != count:
        return f"it gave {len(scores)} numbers for {count} answers"
    return [s if math.isfinite(s) else math.nan for s in scores]
