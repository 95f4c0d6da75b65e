"""Past runs (finished, killed, or still running), as their folders describe them. Reads summary.json, metrics.jsonl and run.json, never
weights.

`report.html` and `trimtab compare` use this; neither knows a file name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.data import SCORES
from trimtab.data.opened import open_file
from trimtab.errors import ConfigError, DataError
from trimtab.objectives import directions
from trimtab.paths import is_url
from trimtab.train.options import CHOICE

Line = dict[str, Any]

TITLES = {"token_f1": "F1", "rouge_l": "ROUGE-L", "bleu": "BLEU", "valid_json": "valid JSON"}
LOWER_IS_BETTER = {name for name, higher in directions().items() if not higher}
HIGHER_IS_BETTER = {name for name, higher in directions().items() if higher} | {*SCORES, CHOICE, "tool_calls"}
PERCENT = {*SCORES, CHOICE, "tool_calls"}
_NOT_SCORES = {"rows", "samples"}
PLAN = "run.json"
"""What a run writes at its start: its settings, and how many steps each variant is to make."""
MAX_JSON = 64 << 20
"""Bytes of a JSON file, of a line of metrics, and of all of its metrics where a run is to be shown without them."""


@dataclass(frozen=True, eq=False)
class PastVariant:
    """One variant of a run. facts: its entry in summary.json, or what metrics.jsonl says of it where there is none yet. steps and
    valid: its lines of metrics.jsonl, one a step, ascending, losses finite."""

    run: PastRun = field(repr=False)
    name: str
    facts: Mapping[str, Any]
    steps: Sequence[Line]
    valid: Sequence[Line]

    @property
    def data(self) -> str:
        return str(self.facts.get("data") or "data")

    @property
    def scores(self) -> dict[str, float]:
        return numbers(self.facts.get("scores"))


@dataclass(frozen=True, eq=False)
class PastRun:
    """A run folder. name: unique among the runs that were read together. summary: empty where the run has not finished."""

    folder: Path
    name: str
    summary: Mapping[str, Any]
    variants: list[PastVariant] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def fingerprint(self) -> str | None:
        return (self.summary.get("base_fingerprint") or {}).get("before")

    def base_scores(self, data: str) -> dict[str, float]:
        return numbers(self.summary.get("base_scores", {}).get(data))


def title(score: str) -> str:
    """A score's name as people write it."""
    return TITLES.get(score, score.replace("_", " "))


def meanings(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of each score: its title, whether it is a percentage, and which way is better ("higher", "lower", None: neither)."""
    better = {**dict.fromkeys(LOWER_IS_BETTER, "lower"), **dict.fromkeys(HIGHER_IS_BETTER, "higher")}
    return {n: {"title": title(n), "percent": n in PERCENT, "better": better.get(n)} for n in names}


def numbers(scores: Mapping[str, Any] | None) -> dict[str, float]:
    """The finite numbers of a `scores` entry: the loss and every score."""
    found = {k: v for k, v in (scores or {}).items() if k not in _NOT_SCORES and isinstance(v, int | float)}
    return {k: float(v) for k, v in found.items() if is_finite(v)}


def is_finite(value: float) -> bool:
    """Whether it is a number that a float can hold; an int of 400 digits is none."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def load(path: Path) -> Any:
    """What a JSON file holds. DataError or ValueError where it is not a regular file, too large, no JSON, or nested too deeply."""
    with open_file(path, str(path)) as file:
        text = file.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise ValueError(f"it has more than {MAX_JSON >> 20} MiB")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def run_folder(run: str | Path) -> Path:
    """A run's folder; of one in a bucket ("s3://bucket/run") a copy in the cache, without checkpoints. TrimtabError where there is none."""
    if not is_url(run):
        return Path(run)
    from trimtab.store.remotes.snapshot import brought

    return brought(str(run))


def read_runs(folders: Sequence[Path]) -> list[PastRun]:
    """Read run folders; one that is named twice is read once. ConfigError that lists every folder that is not a run's."""
    unique = list({f.resolve(): f for f in folders}.values())
    problems = [p for f in unique if (p := _problem(f))]
    if problems:
        fix = "name folders that `trimtab train` has written (a run file's `out`)"
        raise ConfigError("not a run folder" if len(problems) == 1 else "not run folders", problems=problems, fix=fix)
    return [_read(f, name) for f, name in zip(unique, _names(unique), strict=True)]


def read_without_metrics(folder: Path) -> PastRun:
    """One run without the lines of its metrics, which may be many; only where nothing else tells of its variants are they read. ConfigError
    where the folder is not a run's."""
    if problem := _problem(folder):
        raise ConfigError("not a run folder", problems=[problem], fix="name a folder that `trimtab train` has written (a run file's `out`)")
    summary = _summary(folder / "summary.json")
    entries = summary.get("variants") or {name: {"steps": 0} for name in plan_of(folder).get("steps") or {}}
    if not entries:
        return _read(folder, folder.name, MAX_JSON)
    run = PastRun(folder, folder.name, summary)
    run.variants.extend(PastVariant(run, name, facts, (), ()) for name, facts in entries.items())
    return run


def plan_of(folder: Path) -> dict[str, Any]:
    """What the run wrote at its start; empty for a run of before trimtab did so."""
    try:
        content = load(folder / PLAN)
    except (DataError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("steps"), dict) else {}


def doubts(runs: Sequence[PastRun]) -> list[str]:
    """What to know before comparing: unfinished runs, and scores that do not compare because the base or the rows differ."""
    found = [f"{r.name} has not finished: no summary.json yet, so it shows what metrics.jsonl holds" for r in runs if not r.finished]
    finished = [r for r in runs if r.finished]
    if len(bases := _groups({r.name: str(r.fingerprint) for r in finished})) > 1:  # one base may have several names, and two bases one
        called = {str(r.fingerprint): r.summary.get("base") for r in reversed(finished)}
        which = "; ".join(f"{called[fingerprint]} {fingerprint[:15]}: {names}" for fingerprint, names in bases.items())
        found.append(f"the runs stand on different bases ({which}): their scores compare models, not methods")
    for data in dict.fromkeys(v.data for r in finished for v in r.variants):
        for what, digest in (("training", _train_rows), ("test", _test_rows)):
            groups = _groups({r.name: d for r in finished if (d := digest(r, data))})
            if len(groups) > 1:
                found.append(f"{data!r} has different {what} rows ({' / '.join(groups.values())}): scores on it are not comparable")
    return found


def _groups(values: Mapping[str, str]) -> dict[str, str]:
    """value -> the names that have it."""
    return {value: ", ".join(n for n, v in values.items() if v == value) for value in dict.fromkeys(values.values())}


def _problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return f"{folder}: {'a file' if folder.exists() else 'there is no such folder'}"
    if not any(os.path.isfile(folder / n) for n in ("summary.json", "metrics.jsonl")):  # noqa: PTH113 (it never raises)
        return f"{folder}: neither summary.json nor metrics.jsonl is in it"
    return None


def _names(folders: Sequence[Path]) -> list[str]:
    """Each folder's last part, or where two are alike the path as it was given."""
    last = [f.resolve().name for f in folders]
    return [n if last.count(n) == 1 else str(f) for n, f in zip(last, folders, strict=True)]


def _read(folder: Path, name: str, most: int | None = None) -> PastRun:
    """most: bytes of the metrics that are read, all where it is None."""
    summary = _summary(folder / "summary.json")
    run = PastRun(folder, name, summary)
    steps, valid, failed = _metrics(folder / "metrics.jsonl", most)
    entries = summary.get("variants") or {v: _so_far(steps.get(v, []), failed.get(v)) for v in dict.fromkeys([*steps, *failed])}
    run.variants.extend(PastVariant(run, v, facts, steps.get(v, []), valid.get(v, [])) for v, facts in entries.items())
    return run


def _summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = load(path)
    except (DataError, ValueError) as e:
        raise ConfigError(
            f"cannot read {path}: {e}", fix="trimtab writes it whole or not at all: restore it, or name another run"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("variants"), dict):
        raise ConfigError(f"{path} is not a run's summary: no 'variants' in it", fix="name folders that `trimtab train` has written")
    return content


def _metrics(path: Path, most: int | None) -> tuple[dict[str, list[Line]], dict[str, list[Line]], dict[str, str]]:
    """(steps, validations, reasons to stop) by variant. A resumed run repeats steps: the later line counts. A line torn by a kill is
    left out."""
    steps: dict[str, dict[int, Line]] = {}
    valid: dict[str, dict[int, Line]] = {}
    failed: dict[str, str] = {}
    for text in _lines(path, most) if path.is_file() else ():
        try:
            line = json.loads(text)
            name, step, event = str(line["variant"]), int(line["step"]), line.get("event")
            told = line["valid_loss" if event == "valid" else "loss"]
            loss = 0.0 if told is None and "valid_reward" in line else float(told)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
        ):  # torn, another event, or a validation without a finite loss
            continue
        if not math.isfinite(loss):
            failed[name] = f"after step {step}: the loss is {loss}"
        elif event in (None, "valid"):
            (valid if event else steps).setdefault(name, {})[step] = line
    ordered = [{v: [by_step[s] for s in sorted(by_step)] for v, by_step in found.items()} for found in (steps, valid)]
    return ordered[0], ordered[1], failed


def _lines(path: Path, most: int | None) -> Iterator[str]:
    """Lines, up to one that is no line of metrics for its length."""
    with open_file(path, str(path)) as file:
        while (most is None or file.tell() < most) and 0 < len(text := file.readline(MAX_JSON)) < MAX_JSON:
            yield text.decode("utf-8", errors="replace")


def _so_far(steps: Sequence[Line], failed: str | None) -> dict[str, Any]:
    """A summary's entry as far as metrics.jsonl tells; where not every step is logged, sums are scaled up to all steps."""
    if not steps:
        return {"steps": 0, "stopped": failed}
    last, tenth = steps[-1]["step"], max(1, len(steps) // 10)
    per_line = last / len(steps)
    tokens = per_line * sum(s.get("tokens", 0) for s in steps)
    seconds = per_line * sum(s.get("tokens", 0) / s["tokens_per_s"] for s in steps if s.get("tokens_per_s"))
    losses = [s["loss"] for s in steps]
    return {
        "steps": last,
        "tokens": round(tokens),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "losses": {"first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth},
        "stopped": failed,
    }


def _train_rows(run: PastRun, data: str) -> str | None:
    """The digest of a data set's training rows, as the summary or the adapters' provenance has it."""
    if digest := (run.summary.get("content") or {}).get(f"data.{data}.train"):
        return str(digest)
    for v in run.variants:
        path = run.folder / "adapters" / v.name / "trimtab.json"
        if v.data == data and path.is_file():
            try:
                return str(load(path)["run"]["data_digest"])
            except (DataError, ValueError, KeyError, TypeError):
                continue
    return None


def _test_rows(run: PastRun, data: str) -> str | None:
    """What tells a data set's scored rows from others: how many of them, and their digest (a file may be scored in part); in summaries
    without digests the first references."""
    scores = run.summary.get("base_scores", {}).get(data)
    if not scores:
        return None
    digest = (run.summary.get("content") or {}).get(f"data.{data}.test")
    return json.dumps([scores.get("rows"), digest or [s.get("reference") for s in scores.get("samples") or []]])
