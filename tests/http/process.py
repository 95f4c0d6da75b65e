"""`trimtab serve` as a process of its own, on a tiny base."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.http.namespaces import Namespace


@dataclass
class Served:
    """A running server. told: what its first line said. log: its standard error, a file."""

    process: subprocess.Popen[str]
    url: str
    told: dict
    log: Path

    def stop(self, how: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(seconds)

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@contextmanager
def serving(base: Path, folder: Path, *options: str | Path, inside: Namespace | None = None) -> Iterator[Served]:
    """A server on a free port of 127.0.0.1, or inside a network namespace of its own; ended at the end, whatever has happened. folder: for
    its log."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    command = [
        *(["ip", "netns", "exec", inside.name] if inside else []),
        sys.executable,
        "-m",
        "trimtab",
        "serve",
        "--base",
        base,
        "--base-name",
        "tiny",
        "--dtype",
        "float32",
        "--port",
        "0",
        "--json",
        *(["--host", inside.address] if inside else []),
    ]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(x) for x in (*command, "--kv-gb", "0.02", "--adapters-gb", "0.05", *options)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            told = first_line(process, log)
            yield Served(process, told["url"], told, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()


def first_line(process: subprocess.Popen[str], log: Path, seconds: float = 90) -> dict:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    line = process.stdout.readline() if ready else ""
    assert line, f"no server came up: exit code {process.poll()}\n{log.read_text()}"
    told: dict = json.loads(line)
    return told


def idle(url: str, headers: dict[str, str] | None = None, seconds: float = 10) -> None:
    """AssertionError unless the server says, within so long, that it holds nothing."""
    end = time.monotonic() + seconds
    while True:
        text = httpx.get(f"{url}/metrics", headers=headers).raise_for_status().text
        held = [x for x in text.splitlines() if not x.startswith("#") and x.split("{")[0].removeprefix("trimtab_") in HELD]
        assert len(held) == len(HELD), held
        busy = [x for x in held if float(x.rpartition(" ")[2])]
        if not busy:
            return
        assert time.monotonic() < end, busy
        time.sleep(0.05)


HELD: Sequence[str] = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_loading",
    "kv_cache_usage_perc",
    "adapter_leases",
    "open_answers",
)
