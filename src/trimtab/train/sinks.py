"""Where a run can be watched besides metrics.jsonl: TensorBoard and Weights & Biases, with the same lines.

If a sink fails, this is reported once, the sink is left out, and training goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""The names of `track`, and the package that each needs."""
_NOT_VALUES = {"step", "variant", "event"}


class Sink(Protocol):
    """Takes the lines of metrics.jsonl: a variant's step, or its validation ("event": "valid")."""

    def write(self, line: dict[str, Any]) -> None: ...


class Closing(Sink, Protocol):
    """A sink that is told when no more lines come."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files under out/tensorboard/<variant>, so that TensorBoard draws the variants over one another: train/loss, valid/loss, …"""

    def __init__(self, out: Path):
        self.folder, self.writer_class = out / "tensorboard", import_module("torch.utils.tensorboard").SummaryWriter
        self.writers: dict[str, Any] = {}

    def write(self, line: dict[str, Any]) -> None:
        name, step = line["variant"], line["step"]
        if name not in self.writers:  # a resumed run repeats steps after its checkpoint: earlier events of those are to go
            self.writers[name] = self.writer_class(str(self.folder / name), purge_step=step)
        for key, value in values(line).items():
            self.writers[name].add_scalar(key, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class WandB:
    """One run of Weights & Biases, project trimtab: <variant>/train/loss over <variant>/step. WANDB_MODE, WANDB_PROJECT and the rest of
    its own settings apply; WANDB_MODE=offline writes under out/wandb and sends nothing."""

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        wandb = import_module("wandb")
        project = wandb.setup().settings.project or "trimtab"
        self.run = wandb.init(project=project, name=out.resolve().name, dir=str(out), config=dict(settings))
        self.known: set[str] = set()

    def write(self, line: dict[str, Any]) -> None:
        name = line["variant"]
        if name not in self.known:  # variants step at their own pace, so each has its own axis
            self.known.add(name)
            self.run.define_metric(f"{name}/step")
            self.run.define_metric(f"{name}/*", step_metric=f"{name}/step")
        self.run.log({f"{name}/{key}": value for key, value in values(line).items()} | {f"{name}/step": line["step"]})

    def close(self) -> None:
        self.run.finish()


def values(line: Mapping[str, Any]) -> dict[str, float]:
    """What a line measures, as train/loss, train/lr, … or, of a validation, valid/loss, base_valid/loss, …; finite numbers only."""
    found = {k: v for k, v in line.items() if k not in _NOT_VALUES and isinstance(v, int | float) and not isinstance(v, bool)}
    finite = {k: float(v) for k, v in found.items() if math.isfinite(v)}
    if line.get("event") != "valid":
        return {f"train/{k}": v for k, v in finite.items()}
    return {k.replace("valid_", "valid/", 1) if "valid_" in k else f"valid/{k}": v for k, v in finite.items()}


def missing(track: str) -> str | None:
    """What is wrong with asking for this sink here: its package is not installed."""
    package = PACKAGES[track]
    return None if find_spec(package) else f"track = {track!r} needs the package {package}: pip install {package}"


@contextmanager
def tracking(track: Sequence[str], out: Path, settings: Mapping[str, Any], metrics: Sink, warn: Callable[[str], None]) -> Iterator[Sink]:
    """A sink that writes to `metrics` and to everything in `track`. settings: of the run, shown beside it. warn: hears, once a sink, that
    it has failed and is left out."""
    fan = _Fan(metrics, warn)
    for name in track:
        with fan.spared(name):
            fan.sinks[name] = TensorBoard(out) if name == "tensorboard" else WandB(out, settings)
    try:
        yield fan
    finally:
        for name, sink in list(fan.sinks.items()):
            with fan.spared(name):
                sink.close()


class _Fan:
    """metrics.jsonl first: what fails after it has lost nothing."""

    def __init__(self, metrics: Sink, warn: Callable[[str], None]):
        self.metrics, self.warn = metrics, warn
        self.sinks: dict[str, Closing] = {}

    def write(self, line: dict[str, Any]) -> None:
        self.metrics.write(line)
        for name, sink in list(self.sinks.items()):
            with self.spared(name):
                sink.write(line)

    @contextmanager
    def spared(self, name: str) -> Iterator[None]:
        """An exception of other people's code (a network error, a full disk) removes its sink and has no other effect."""
        try:
            yield
        except Exception as error:
            self.sinks.pop(name, None)
            self.warn(f"{name} is left out from here on, the run goes on: {type(error).__name__}: {error}")
