"""Who uses a run's base and variants between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.train.prepare import Prepared

Beside = Callable[["Prepared"], AbstractContextManager[Callable[[], None]]]
"""What goes on beside a run: entered before the first step and left after the last one, however it ends; what it gives is called after each
joint step, on the thread that trains. It may read the variants and run forwards of the base, and changes neither."""


@contextmanager
def alone(prepared: Prepared) -> Iterator[Callable[[], None]]:
    """Nothing goes on beside the run."""
    yield lambda: None
