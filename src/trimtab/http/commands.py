"""Commands that the page gives: `trimtab …` as a process of its own, by the words that the page shows. Few at a time, each with an end."""

from __future__ import annotations

import json
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import NotFoundError, OverloadedError, printable

AT_ONCE, KEPT = 2, 32
LIMIT_S = 1800.0
MAX_SAID = 16 << 10
"""Bytes of what a command prints that are read."""


@dataclass
class Job:
    """state: "running", "done" or "failed". result: what it printed as JSON. said: what it says is wrong."""

    command: str
    state: str = "running"
    result: Any = None
    said: str = ""
    began: float = field(default_factory=time.monotonic)

    def told(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        return {"command": self.command, "state": self.state, "result": self.result, "said": self.said, "seconds": seconds}


class Commands:
    """Safe for any number of threads. `close` ends those that run."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._running: set[subprocess.Popen[bytes]] = set()

    def begin(self, options: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
        """Run `trimtab`. options: the command and its options. words: what stands for names and paths, none of which is an option, whatever
        it begins with. OverloadedError where others are running."""
        shown = shlex.join(["trimtab", *(option for option in options if option != "--json"), *words])
        job = Job(printable(shown))
        with self._guard:
            if sum(other.state == "running" for other in self._jobs.values()) >= AT_ONCE:
                raise OverloadedError("other commands are running", fix="wait until they have ended")
            key = secrets.token_hex(16)
            self._jobs[key] = job
            while len(self._jobs) > KEPT:
                self._jobs.popitem(last=False)
        threading.Thread(target=self._run, args=(job, [*options, "--", *words]), daemon=True).start()
        return {"key": key, **job.told()}

    def told(self, key: str) -> dict[str, Any]:
        with self._guard:
            if key not in self._jobs:
                raise NotFoundError("there is no such command", fix="give it again")
            return self._jobs[key].told()

    def close(self) -> None:
        with self._guard:
            running = list(self._running)
        for process in running:
            process.kill()

    def _run(self, job: Job, words: Sequence[str]) -> None:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                code = self._waited(
                    subprocess.Popen([sys.executable, "-m", "trimtab", *words], stdout=out, stderr=err, stdin=subprocess.DEVNULL)
                )
            except (OSError, ValueError) as error:  # too long, or a NUL in a word: no process can be given it
                job.said, job.state = str(error), "failed"
                return
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read(MAX_SAID).decode("utf-8", "replace"))
        if code != 0:
            job.said = printable(texts[1].strip().removeprefix("error: ") or f"it has ended ({code})")
            job.state = "failed"
            return
        try:
            job.result = json.loads(texts[0])
        except ValueError:
            job.result = printable(texts[0])
        job.state = "done"

    def _waited(self, process: subprocess.Popen[bytes]) -> int:
        with self._guard:
            self._running.add(process)
        try:
            return process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:
            with self._guard:
                self._running.discard(process)
