"""How commands that train are ended by a signal, and what they say of how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.cli.terminal import say

if TYPE_CHECKING:
    from trimtab.train.interrupt import Stop

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"  # rich hides it; a second signal leaves no time to bring it back


def cluster_words(address: str | None, cpus: int | None) -> list[str]:
    """The arguments that name the cluster."""
    return [*(["--ray", address] if address is not None else []), *(["--cpus", str(cpus)] if cpus is not None else [])]


def tell_how_to_resume(
    command: str,
    files: Sequence[Path],
    out: str | Path | None,
    root: Path | None = None,
    changes: Sequence[str] = (),
    more: Sequence[str] = (),
) -> None:
    """Print the command that goes on where an interrupted one has stopped. changes: of --set. more: other options."""
    again = ["trimtab", command, *words(files, out, root, changes), *more, "--resume"]
    say(f"go on with: {shlex.join(again)}", err=True)


def words(files: Sequence[Path], out: str | Path | None, root: Path | None, changes: Sequence[str]) -> list[str]:
    """The arguments that say what is trained, and where to."""
    found = [*map(str, files), *(["--out", str(out)] if out is not None else [])]
    found += [word for change in changes for word in ("--set", change)]
    return [*found, *(["--store", str(root)] if root is not None else [])]


@contextmanager
def stopping(stop: Stop, quiet: bool = False, signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the run to stop; a second one is handled as before. What stood before is put back at the end. quiet: without a
    word to the user."""
    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread handle signals
        yield
        return

    def handle(signum: int, frame: object) -> None:
        for s in signals:
            signal.signal(s, signal.SIG_DFL if signals == SIGNALS else before[s])
        text = "\nending after this step, with a checkpoint; once more ends at once\n" if stop.stepping else "\n"
        if not quiet:
            os.write(2, (SHOW_CURSOR * sys.stderr.isatty() + text).encode())  # print may be what the signal has interrupted
        stop.ask(signum)

    before = {s: signal.getsignal(s) for s in signals}
    for s in signals:
        signal.signal(s, handle)
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
