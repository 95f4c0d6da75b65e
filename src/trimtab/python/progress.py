"""How far a run is, where people look: in a notebook, or on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.cli.show import Bars, Pace, validation
from trimtab.train.listen import Listener, Silent

if TYPE_CHECKING:
    from trimtab.train.ahead import Ahead

EVERY_S = 0.2
"""Between two pictures: a notebook keeps each of them until it is drawn."""
LINES = 12
"""Validations, notes and warnings that stay in sight."""


@contextmanager
def of(progress: bool | None, listener: Listener | None) -> Iterator[Listener]:
    """The listener of a call from Python. progress: whether it shows; None: in notebooks and on terminals, unless there is a listener."""
    notebook = in_notebook()
    if listener is not None or progress is False or (progress is None and not notebook and not sys.stderr.isatty()):
        yield listener or Silent()
    elif notebook:
        shown = Notebook()
        try:
            yield shown
        except BaseException:
            shown.end("ended")
            raise
        shown.end("finished")
    else:
        with Bars() as bars:
            yield bars


def in_notebook() -> bool:
    """Whether this is the process of a notebook. A program that has not loaded IPython is none."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and getattr(shell, "kernel", None) is not None


class Notebook:
    """A run as one output of a notebook's cell, which is drawn anew as it goes: a bar a variant, and what was said last. It needs IPython
    alone, and stays in the saved notebook."""

    def __init__(self) -> None:
        self.pace, self.stage, self.said = Pace({}), "", list[str]()
        self.notes, self.speed = dict[str, str](), ""
        self._drawn: float = 0.0
        self._handle: Any = None

    def _draw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if self._handle is None:
            self._handle = import_module("IPython.display").display(self, display_id=True)
        elif not at_once and now - self._drawn < EVERY_S:
            return
        else:
            self._handle.update(self)
        self._drawn = now

    def end(self, text: str) -> None:
        """The last picture, of a call that has shown anything."""
        if self._handle is not None:
            self.stage, self.speed = text, ""
            self._draw(at_once=True)

    def _repr_html_(self) -> str:
        rows = []
        for name, total in self.pace.total.items():
            done = self.pace.done[name]
            bar = f"<progress value='{done}' max='{total or 1}'></progress>"
            rows.append(f"<tr><td>{escape(name)}</td><td>{bar}</td><td>{done}/{total}</td><td>{escape(self.notes.get(name, ''))}</td></tr>")
        said = "".join(f"<div>{escape(line)}</div>" for line in self.said[-LINES:])
        state = "  ".join(x for x in (self.stage, self.speed) if x)
        return f"<div>{escape(state)}</div><table>{''.join(rows)}</table>{said}"

    def __repr__(self) -> str:
        steps = ", ".join(f"{n} {self.pace.done[n]}/{total}" for n, total in self.pace.total.items())
        return f"{self.stage} {steps}".strip()

    def status(self, text: str) -> None:
        self.stage, self.speed = text, ""
        self._draw()

    def begin(self, steps: Mapping[str, int], ahead: Ahead | None = None) -> None:
        self.pace, self.stage = Pace(steps, ahead), "training"
        self._draw(at_once=True)

    def step(self, line: Mapping[str, Any]) -> None:
        self.pace.step(line)
        shown = "reward" if "reward" in line else "loss"
        self.notes[line["variant"]] = f"{shown} {line[shown]:.3f}"
        left = f", {self.pace.left} left" if self.pace.left and not self.pace.over else ""
        self.speed = f"{line['tokens_per_s']:.0f} tokens/s{left}"
        self._draw()

    def valid(self, line: Mapping[str, Any]) -> None:
        self.pace.valid(line)
        if line.get("finished_early"):
            self.pace.end(line["variant"])
        self._say(validation(line))

    def stopped(self, variant: str, reason: str) -> None:
        self.pace.end(variant)
        self._say(f"{variant} has stopped: {reason}")

    def joined(self, variant: str, steps: int, ahead: Ahead) -> None:
        self.pace.join(variant, steps, ahead)
        self._draw(at_once=True)

    def saved(self, step: int, folder: Path) -> None:
        """Not shown."""

    def warning(self, text: str) -> None:
        self._say(f"warning: {text}")

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def _say(self, text: str) -> None:
        self.said.append(text)
        self._draw()
