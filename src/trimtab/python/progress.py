"""How far a run is, where people look: in a notebook, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from trimtab.cli.show import Bars
from trimtab.train.listen import Listener, Silent


@contextmanager
def of(progress: bool | None, listener: Listener | None) -> Iterator[Listener]:
    """The listener of a call from Python. progress: whether it shows; None: in notebooks and on terminals, unless there is a listener."""
    if listener is not None or progress is False or (progress is None and not sys.stderr.isatty()):
        yield listener or Silent()
        return
    with Bars() as bars:
        yield bars
