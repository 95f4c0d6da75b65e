"""Shows progress of slow work: a spinner on a terminal, plain lines elsewhere, or the caller's own function."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

Progress = Callable[[str], None]
_alone = threading.RLock()


@contextmanager
def reporting(progress: Progress | None) -> Iterator[Progress]:
    """Yield the function that takes one message a step of work; nothing is shown until it is first called.

    progress: the caller's function, used as it is. None: a rich spinner on stderr where stderr is a terminal, one plain line a message
    where it is not.
    """
    if progress is not None:
        yield progress
        return
    console = Console(file=sys.stderr)  # held, so that the spinner outlives a redirected stderr
    if not console.is_terminal:
        yield lambda message: print(f"trimtab: {message}", file=sys.stderr, flush=True)
        return
    status = console.status("")

    def show(message: str) -> None:
        status.update(message)
        status.start()

    try:
        yield show
    finally:
        status.stop()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and warnings while we read a base; our own errors say what matters. Restores both afterwards.

    One thread at a time: these settings are the process's, as are those under which transformers builds models. Of these torch's default
    dtype is fp32 inside: a program may have set another one, and the buffers that models compute when they are built would have it."""
    from logging import ERROR, getLogger

    import torch
    from transformers.utils import logging

    getLogger("bitsandbytes.backends.cpu.ops").setLevel(ERROR)  # it warns on import of a kernel that it only tries to find
    with _alone:
        level, bars, dtype = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()
