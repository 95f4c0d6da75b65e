"""Ranks as forks of the test's process: all that they import is imported already, so that a rank costs nothing to start."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from torch.distributed import TCPStore

from trimtab.places.place import Place
from trimtab.places.ranks import joined

LONGEST_S = 120.0
"""Ranks that take longer are killed, so that one that hangs costs a test and not the suite."""


def in_ranks(ranks: int, work: Callable[[Place], None], log: Path) -> list[int]:
    """The exit code of each rank: 0, or 1 where `work` has raised, which its log tells. log: a folder. Their store is here, as that of
    torchrun is in its own process. TimeoutError where they have not ended within `LONGEST_S`."""
    log.mkdir(parents=True, exist_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pids = []
    for rank in range(ranks):
        if (pid := os.fork()) == 0:
            _be(rank, ranks, store.port, work, log / f"{rank}.txt")
        pids.append(pid)
    late = threading.Event()

    def end() -> None:
        late.set()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    limit = threading.Timer(LONGEST_S, end)
    limit.start()
    for pid in pids:  # an ended rank keeps its number until all have ended, so that no other process is killed
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    limit.cancel()
    limit.join()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if late.is_set():
        raise TimeoutError(f"ranks that had not ended after {LONGEST_S:g} s; exit codes {codes}")
    return codes


def _be(rank: int, ranks: int, port: int, work: Callable[[Place], None], log: Path) -> None:
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {k: str(n) for k, n in numbers.items()} | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        with joined() as place:
            work(place)
        code = 0
    except BaseException as error:
        print(error)
        traceback.print_exc()
    finally:
        os._exit(code)
