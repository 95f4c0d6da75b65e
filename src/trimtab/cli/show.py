"""What commands share in showing a run: rich bars on a terminal, plain lines elsewhere, and the table of scores."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from trimtab.cli.terminal import Terminal
from trimtab.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.train.ahead import Ahead

PLAIN_EVERY_S = 5.0
FORWARDS = 3.0


def listener(quiet: bool = False) -> Bars | Lines:
    """Bars where standard error is a terminal, a line every few seconds elsewhere, nothing but warnings where `quiet`."""
    return Bars() if sys.stderr.isatty() and not quiet else Lines(quiet)


class Pace:
    """How far a run is, and how long it will still take: of each variant the steps to go, at the time that its own part of the last joint
    steps took, and the validations to go; and the scores at the end. What judging costs is told from the validations so far; before the
    first one, from the steps, whose forward and backward cost as much as `FORWARDS` forwards."""

    def __init__(self, steps: Mapping[str, int], ahead: Ahead | None = None):
        self.total, self.done, self.share_s = dict(steps), dict.fromkeys(steps, 0), dict.fromkeys(steps, 0.0)
        self.ahead, self.judged_s, self.judged, self.token_s = ahead, 0.0, 0.0, 0.0
        self._in_pass = False

    def step(self, line: Mapping[str, Any]) -> None:
        name, rate = line["variant"], line["tokens_per_s"]
        share_s = line["tokens"] / rate if rate else line["seconds"] / len(self.done)  # of a step that learns nothing
        self.done[name] = line["step"]
        self.share_s[name] = 0.8 * self.share_s[name] + 0.2 * share_s if self.share_s[name] else share_s
        self.token_s, self._in_pass = 1 / rate if rate else self.token_s, False

    def valid(self, line: Mapping[str, Any]) -> None:
        """A variant has been validated, in a pass that took line["seconds"] for all of its variants, whose lines come one after another."""
        if self.ahead is None or line["variant"] not in self.ahead.valid:
            return
        if not self._in_pass:
            self.judged_s += line["seconds"]
            self.judged += 0.0 if self.judged else self.ahead.first
            self._in_pass = True
        self.judged += self.ahead.valid[line["variant"]]

    def join(self, variant: str, steps: int, ahead: Ahead | None) -> None:
        """There is a variant more."""
        self.total[variant], self.done[variant], self.share_s[variant], self.ahead = steps, 0, 0.0, ahead

    def end(self, variant: str) -> None:
        """A variant goes no further: stopped, or finished early."""
        self.total[variant] = self.done[variant]

    @property
    def joint(self) -> tuple[int, int]:
        """(steps done, steps in all) of the run: all variants that still train make each of them, so that it has as many as the longest."""
        return max(self.done.values(), default=0), max(self.total.values(), default=0)

    @property
    def left(self) -> str:
        """Time to go, as 3 min 21 s; "" while a variant has not stepped yet."""
        to_go = {n: self.total[n] - self.done[n] for n in self.total}
        if any(steps and not self.share_s[n] for n, steps in to_go.items()):
            return ""
        return clock(sum(steps * self.share_s[n] for n, steps in to_go.items()) + self._judging_left())

    def _judging_left(self) -> float:
        if self.ahead is None:
            return 0.0
        rate = self.judged_s / self.judged if self.judged else self.token_s / FORWARDS
        passes = sum(self.ahead.to_go(n, self.done[n], self.total[n]) * work for n, work in self.ahead.valid.items())
        first = self.ahead.first if not self.judged and passes else 0.0
        return rate * (passes + first + self.ahead.scoring)

    @property
    def over(self) -> bool:
        return self.done == self.total


def clock(seconds: float) -> str:
    """Seconds as 21 s, 3 min 21 s or 1 h 3 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Lines:
    """A run as plain lines on standard error."""

    def __init__(self, quiet: bool = False):
        self.quiet, self.last_status, self.at, self.pace = quiet, "", time.monotonic(), Pace({})
        self.losses: dict[str, float] = {}

    def _print(self, text: str) -> None:
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        stage = text.partition(":")[0]
        if stage != self.last_status:
            self.last_status = stage
            self._print(stage)

    def begin(self, steps: Mapping[str, int], ahead: Ahead | None = None) -> None:
        self.pace = Pace(steps, ahead)
        self._print("training " + ", ".join(f"{name} ({n} steps)" for name, n in steps.items()))

    def step(self, line: Mapping[str, Any]) -> None:
        self.pace.step(line)
        self.losses[line["variant"]] = line["loss"]
        if time.monotonic() - self.at >= PLAIN_EVERY_S or self.pace.over:
            self.at = time.monotonic()
            done, total = self.pace.joint
            left = f"  about {self.pace.left} to go" if self.pace.left and not self.pace.over else ""
            losses = "  ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
            self._print(f"step {done}/{total}  {line['tokens_per_s']:.0f} tokens/s{left}  loss: {losses}")

    def stopped(self, variant: str, reason: str) -> None:
        self.pace.end(variant)
        self.warning(f"{variant} has stopped: {reason}")

    def joined(self, variant: str, steps: int, ahead: Ahead) -> None:
        self.pace.join(variant, steps, ahead)
        self._print(f"training {variant} ({steps} steps) too")

    def saved(self, step: int, folder: Path) -> None:
        """Not shown."""

    def warning(self, text: str) -> None:
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)

    def valid(self, line: Mapping[str, Any]) -> None:
        self.pace.valid(line)
        if line.get("finished_early"):
            self.pace.end(line["variant"])
        self._print(validation(line))

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class Bars:
    """A run as one bar a variant with its loss, and one for the whole with tokens per second and the time to go."""

    def __init__(self) -> None:
        console = Terminal(stderr=True)
        bar = BarColumn(bar_width=32 if console.width >= 100 else 14)
        columns = [TextColumn("{task.description}"), bar, TextColumn("{task.fields[count]}"), TextColumn("{task.fields[note]}")]
        self.progress = Progress(*columns, console=console)
        self.pace, self.started = Pace({}), time.monotonic()
        self.stage = self._row("starting", None)
        self.whole: TaskID | None = None
        self.tasks: dict[str, TaskID] = {}

    def _row(self, name: str, total: int | None) -> TaskID:
        return self.progress.add_task(escape(name), total=total, count="" if total is None else f"0/{total}", note="")

    def status(self, text: str) -> None:
        self.progress.update(self.stage, description=escape(text), visible=True)

    def begin(self, steps: Mapping[str, int], ahead: Ahead | None = None) -> None:
        self.progress.remove_task(self.stage)
        self.pace, self.started = Pace(steps, ahead), time.monotonic()
        self.tasks = {name: self._row(name, n) for name, n in steps.items()}
        self.whole = self._row("all", self.pace.joint[1])
        self.stage = self._row("", None)  # the last line from now on: what comes after training
        self.progress.update(self.stage, visible=False)

    def step(self, line: Mapping[str, Any]) -> None:
        name = line["variant"]
        self.pace.step(line)
        shown = "reward" if "reward" in line else "loss"  # of drawn answers, whose loss is about 0
        self._show(self.tasks[name], line["step"], self.pace.total[name], f"{shown} {line[shown]:.3f}")
        going = self.pace.left and not self.pace.over
        left = f"about {self.pace.left} to go" if going else f"took {clock(time.monotonic() - self.started)}"
        self._show(self.whole, *self.pace.joint, f"{line['tokens_per_s']:.0f} tokens/s  {left}")

    def _show(self, task: TaskID | None, done: int, total: int, note: str) -> None:
        if task is not None:
            self.progress.update(task, completed=done, total=total, count=f"{done}/{total}", note=note)

    def stopped(self, variant: str, reason: str) -> None:
        self.pace.end(variant)
        self._end(variant, "[yellow]stopped[/]")
        self.warning(f"{variant} has stopped: {reason}")

    def joined(self, variant: str, steps: int, ahead: Ahead) -> None:
        self.pace.join(variant, steps, ahead)
        self.tasks[variant] = self._row(variant, steps)

    def saved(self, step: int, folder: Path) -> None:
        """Not shown."""

    def warning(self, text: str) -> None:
        self.progress.console.print("[yellow]warning:[/]", Text(text), highlight=False)

    def note(self, text: str) -> None:
        self.progress.console.print("[cyan]note:[/]", Text(text), highlight=False)

    def valid(self, line: Mapping[str, Any]) -> None:
        self.pace.valid(line)
        if line.get("finished_early"):
            self.pace.end(line["variant"])
            self._end(line["variant"], "finished early")
        self.progress.console.print(validation(line), highlight=False, markup=False)

    def _end(self, variant: str, note: str) -> None:
        done = self.pace.done[variant]
        self._show(self.tasks[variant], done, done, note)

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def validation(line: Mapping[str, Any]) -> str:
    """A validation's line of metrics.jsonl as text."""
    metric, loss, base = line["metric"], *(f"{x:.3f}" if x is not None else "–" for x in (line["valid_loss"], line["base_valid_loss"]))
    value, before = (f"{x:.6g}" if x is not None else "–" for x in (line[f"valid_{metric}"], line[f"base_valid_{metric}"]))
    judged = "" if metric == "loss" else f"  {metric} {value} (base {before})"
    early = f"; finished early: {line['finished_early']}" if line.get("finished_early") else ""
    tied = f", as at step {', '.join(map(str, line['ties_with']))}" if line.get("ties_with") else ""
    best = f"  best{tied and f'{tied}, with a lower loss'}" if line["best"] else f"  ties with step {line['ties_with'][0]}" if tied else ""
    return f"{line['variant']} step {line['step']}: valid loss {loss} (base {base}){judged}{best}{early}"


def console() -> Terminal:
    """Standard output: as wide as the terminal, and wide enough for a table where there is none."""
    return Terminal() if sys.stdout.isatty() else Terminal(width=110)


def score_table(summary: Mapping[str, Any]) -> Table:
    """A finished run's table for a terminal."""
    from trimtab.train.score_table import score_table as scores_of

    return scores_of(summary).rich()
