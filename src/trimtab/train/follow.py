"""Run folders as the page shows them, finished or being written: which there are, what they hold, new lines of their metrics, answers.

Everything is read from files at each call, and nothing is written. A folder is named by an id that the page can send whatever the folder
is called; only folders that `found` lists can be read.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.data.opened import open_file
from trimtab.errors import ConfigError, DataError, NotFoundError, printable
from trimtab.objectives import aimed_at
from trimtab.train.answers import answered, answers, confusion
from trimtab.train.beginning import log_of, read_log
from trimtab.train.control import CONTROL, NOTHING, read_orders
from trimtab.train.past import (
    PLAN,
    PastRun,
    PastVariant,
    doubts,
    load,
    meanings,
    numbers,
    plan_of,
    read_without_metrics,
)
from trimtab.train.run_folders import FILES, is_file, is_run, state, walk
from trimtab.train.sendable import UNLIKE, clean, number, word

WALK_S = 3.0
"""For how long what was found is taken to be all."""
CHUNK = 1 << 20
"""Bytes of metrics.jsonl that one call reads."""
MARKED = 4096
"""Bytes before a position by which it is seen that the file is still the one that was read so far."""
MAX_FIELDS, MAX_CELLS = 256, 1_000_000
"""Fields of metrics that are shown, and numbers of one table of them: each line may name a field of its own."""


class RunFolders:
    """The run folders at and below `root`. ConfigError if that is no folder. Safe for any number of threads."""

    def __init__(self, root: Path):
        if not root.is_dir():
            raise ConfigError(
                f"{root}: {'a file' if root.exists() else 'there is no such folder'}", fix="name a folder that holds run folders"
            )
        self.root = root.resolve()
        self._known: dict[str, Path] = {}
        self._until = 0.0
        self._lines: dict[Path, tuple[str, dict[str, Any]]] = {}
        self.cut = False
        """Whether there may be more runs than were found: more folders or runs than are looked at."""

    def found(self) -> dict[str, Path]:
        """id -> run folder, as of WALK_S ago at most."""
        if time.monotonic() >= self._until:
            paths, self.cut = walk(self.root)
            self._known = {hashlib.sha256(os.fsencode(path)).hexdigest()[:16]: path for path in paths}
            self._until = time.monotonic() + WALK_S
        return self._known

    def list(self) -> list[dict[str, Any]]:
        """A line of each run, the one that was written last first."""
        found = [(key, path, _written(path)) for key, path in self.found().items()]
        known, self._lines = self._lines, {}
        lines = []
        for key, path, written in found:
            facts = known[path][1] if path in known and known[path][0] == written else _facts_or_error(path)
            self._lines[path] = written, facts
            now = state(path)
            now = "paused" if now == "running" and facts["waits"] else now
            own = {"id": key, "name": self._name(path), "path": printable(str(path)), "state": now, "changed": _changed(path)}
            lines.append(own | {k: v for k, v in facts.items() if k != "waits"})
        return sorted(lines, key=lambda line: (line["state"] not in ("running", "paused"), -line["changed"]))

    def folder(self, key: str) -> Path:
        """The folder of an id. NotFoundError if no run has it."""
        path = self._known.get(key)
        if path is None or not is_run(path):
            path = self.found().get(key)
        if path is None:
            raise NotFoundError("there is no such run folder any more", fix="go back to the list of runs")
        return path

    def show(self, key: str) -> dict[str, Any]:
        """What a run is: settings, variants, scores, costs."""
        folder = self.folder(key)
        with _as_written(folder):
            more = {"control": _control(folder, clean(plan_of(folder))), "logged": is_file(log_of(folder))}
        return facts_of(folder, key, self._name(folder)) | more

    def metrics(self, key: str, start: int, mark: str) -> dict[str, Any]:
        """The lines from byte `start` on, as columns; at most CHUNK bytes (`more`: there are more). mark: what the call before gave as
        `mark`; if the file is another one by now, as after a resume, everything is read from the start (`restart`).
        `written`: another text once `show` has something new to tell."""
        path = self.folder(key) / "metrics.jsonl"
        with open_file(path, printable(str(path))) if os.path.lexists(path) else io.BytesIO() as file:
            size = file.seek(0, os.SEEK_END)
            restart = start > size or (start > 0 and _mark(file, start) != mark)
            start = 0 if restart else start
            file.seek(start)
            data = file.read(CHUNK)
            end = data.rfind(b"\n") + 1
            if not end and len(data) == CHUNK:
                raise ConfigError(
                    f"{path.name} has a line of more than {CHUNK:,} bytes at byte {start}", fix="no run of trimtab writes such a line"
                )
            following = start + end
            return {
                "variants": _columns(data[:end]),
                "next": following,
                "mark": _mark(file, following),
                "more": following < size and end > 0 and len(data) == CHUNK,
                "restart": restart,
                "state": state(path.parent),
                "written": _written(path.parent),
            }

    def answers(self, key: str, data: str, who: str, start: int, count: int) -> dict[str, Any]:
        """Held-out rows of a data set with what base and variants answered, those first that most got wrong. who: of this one alone.
        NotFoundError if nobody has answered them."""
        folder = self.folder(key)
        with _as_written(folder):
            return answers(read(folder), data, who, start, count)

    def confusion(self, key: str, data: str) -> dict[str, Any] | None:
        """Which labels of a data set are taken for which (`train/answers.py`); None where its answers are no labels."""
        folder = self.folder(key)
        with _as_written(folder):
            return confusion(read(folder), data)

    def log(self, key: str) -> dict[str, Any]:
        """The end of what the run has printed, if it was begun from the page. NotFoundError where it was not."""
        return read_log(log_of(self.folder(key)))

    def doubts(self, keys: Iterable[str]) -> Sequence[str]:
        """What to know before the scores of these runs are compared: other rows, other bases. Empty where they can be."""
        runs = [replace(read(folder), name=self._name(folder)) for folder in map(self.folder, dict.fromkeys(keys))]
        for run in runs:
            run.variants[:] = [replace(v, run=run) for v in run.variants]
        try:
            return [printable(text) for text in doubts([run for run in runs if run.finished])]
        except (*UNLIKE, OSError):
            return ["what the runs stand on cannot be told, as their files are not as trimtab writes them: their scores may not compare"]

    def _name(self, path: Path) -> str:
        """As people know it: from `root`, or the folder's own name."""
        return printable(str(path.relative_to(self.root)) if path != self.root else path.name)


def facts_of(folder: Path, key: str, name: str) -> dict[str, Any]:
    """What a run is: settings, variants, scores, costs. key, name: what it is asked for by, and known as."""
    with _as_written(folder):
        run = read(folder)
        plan = clean(plan_of(folder))
        told = run.summary or plan
        settings, own = _settings(told.get("settings") or {}, [v.name for v in run.variants] or list(plan.get("steps") or {}))
        facts = ("base", "base_parameters", "dtype", "device", "seconds", "tokens", "tokens_per_s", "peak_memory_gb")
        variants = _variants(run, plan, own)
        base_scores = {data: numbers(scores) for data, scores in (run.summary.get("base_scores") or {}).items()}
        scores = dict.fromkeys(name for found in (*(v["scores"] for v in variants), *base_scores.values()) for name in found)
        return {
            "id": key,
            "name": name,
            "path": printable(str(folder)),
            "state": state(folder),
            "settings": settings,
            "base_fingerprint": run.summary.get("base_fingerprint") or {},
            "base_scores": base_scores,
            "scores": meanings(scores),
            "variants": variants,
            "answers": answered(run),
            **{k: value if isinstance(value := told.get(k), str | int | float) else None for k in facts},
        }


@contextmanager
def _as_written(folder: Path) -> Iterator[None]:
    """ConfigError where a run's files hold other things than trimtab writes."""
    try:
        yield
    except UNLIKE as error:
        raise ConfigError(
            f"{printable(str(folder))} cannot be shown: its files are not as trimtab writes them ({type(error).__name__}: {error})",
            fix="restore summary.json and run.json, or delete the folder",
        ) from error


def read(folder: Path) -> PastRun:
    """A run without its metrics, its texts and numbers such as a browser can be sent."""
    raw = read_without_metrics(folder)
    run = PastRun(folder, raw.name, clean(raw.summary))
    run.variants.extend(PastVariant(run, word(v.name), clean(v.facts), (), ()) for v in raw.variants)
    return run


def _facts_or_error(folder: Path) -> dict[str, Any]:
    """What the list says of a run's files. `error`: that they cannot be read, and nothing else is known then."""
    try:
        return _facts(folder) | {"error": None}
    except (*UNLIKE, OSError, DataError):
        return {"base": None, "variants": 0, "methods": [], "seconds": None, "tokens": None, "waits": False, "error": "cannot be read"}


def _written(folder: Path) -> str:
    """Another text whenever what `show` tells was written anew."""
    times = []
    for name in (PLAN, CONTROL, "summary.json"):
        try:
            status = (folder / name).stat()
            times.append(f"{status.st_mtime_ns}-{status.st_size}")
        except OSError:
            times.append("none")
    return " ".join(times)


def _control(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What is asked of a run, and what became of it. takes: whether it is of a trimtab that takes orders."""
    told = plan.get("control") or {}
    try:
        asked = read_orders(folder)[0]
    except (DataError, OSError):
        asked = NOTHING
    return {
        "takes": isinstance(plan.get("variants"), dict),
        "paused": list(told.get("paused") or ()),
        "ended": dict(told.get("ended") or {}),
        "refused": dict(told.get("refused") or {}),
        "asked": clean(dict(asked.variants)),
        "clones": [word(name) for name in asked.clones],
    }


def _changed(folder: Path) -> float:
    times = [0.0]
    for name in FILES:
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            pass  # a run has one of them, or the folder has gone since it was found
    return max(times)


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    summary = load(path) if os.path.lexists(path) else {}
    told = summary or plan_of(folder)
    variants = summary.get("variants") or told.get("steps") or {}
    methods = {v["method"] for v in variants.values() if isinstance(v, dict) and isinstance(v.get("method"), str)}
    settings = (told.get("settings") or {}).items()
    methods |= {v for k, v in settings if isinstance(v, str) and k.startswith("variants.") and k.endswith(".method")}
    base = told.get("base")
    return {
        "base": word(base) if isinstance(base, str) else None,
        "variants": len(variants),
        "methods": sorted(map(word, methods)),
        "seconds": number(summary.get("seconds")),
        "tokens": number(summary.get("tokens")),
        "waits": (told.get("control") or {}).get("waits") is True,
    }


def _variants(run: PastRun, plan: Mapping[str, Any], own: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The variants of a run, those too that have made no step yet."""
    entries: dict[str, Mapping[str, Any]] = {name: {"steps": 0} for name in plan.get("steps") or {}}
    entries |= {v.name: v.facts for v in run.variants}
    taken = ("steps", "stopped", "finished_early", "trainable", "adapter_bytes", "seconds", "tokens", "tokens_per_s", "saved_step")
    found = []
    for name, facts in entries.items():
        settings = own.get(name) or {
            "method": facts.get("method"),
            "data": facts.get("data"),
            "lr": facts.get("lr"),
            **(facts.get("fields") or {}),
        }
        valid = facts.get("valid") or {}
        found.append(
            {
                "name": name,
                "data": facts.get("data") or settings.get("data"),
                "method": facts.get("method") or settings.get("method"),
                "objective": _objective(facts.get("fields") or settings),
                "settings": {k: v for k, v in settings.items() if v is not None and v != {}},
                "total_steps": (plan.get("steps") or {}).get(name) or (facts.get("steps") if run.finished else None),
                "scores": numbers(facts.get("scores")),
                "valid": {k: valid.get(k) for k in ("metric", "best", "best_step", "finished_early", "base")},
                **{k: facts.get(k) for k in taken},
                "unsaved": facts.get("saved_step", 0) is None,
            }
        )
    return found


def _objective(fields: Mapping[str, Any]) -> str:
    """Another text for each objective whose losses do not compare with another's."""
    try:
        return word(repr(aimed_at(fields)))
    except (*UNLIKE, ConfigError):
        return word(str(fields.get("objective")))


def _settings(flat: Mapping[str, Any], names: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(settings of the run, of each variant). flat: dotted key -> value; a name may hold dots, so the longest that fits is meant."""
    longest = sorted(names, key=len, reverse=True)
    run: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {n: {} for n in names}
    for key, value in flat.items():
        name = next((n for n in longest if key.startswith(f"variants.{n}.")), None)
        if name is None:
            run[key] = value
        else:
            own[name][key.removeprefix(f"variants.{name}.")] = value
    return run, own


def _columns(data: bytes) -> dict[str, dict[str, dict[str, list[float | None]]]]:
    """variant -> "steps" and "valid" -> field -> its numbers, None where a line has none. Lines that are no JSON are left out."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for text in data.splitlines():
        try:
            line = json.loads(text)
            kind = {None: "steps", "valid": "valid"}[line.get("event")]
            found.setdefault(word(str(line["variant"])), {"steps": [], "valid": []})[kind].append(line)
        except UNLIKE:
            continue
    return {name: {kind: table(lines) for kind, lines in kinds.items()} for name, kinds in found.items()}


def table(lines: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Lines of metrics as columns: field -> its numbers, None where a line has none."""
    most = min(MAX_FIELDS, max(16, MAX_CELLS // max(1, len(lines))))
    fields = dict.fromkeys(k for line in lines for k, v in line.items() if isinstance(v, int | float))
    return {word(f): [number(line.get(f)) for line in lines] for f in itertools.islice(fields, most)}


def _mark(file: Any, end: int) -> str:
    file.seek(max(0, end - MARKED))
    return hashlib.sha256(file.read(min(end, MARKED))).hexdigest()[:16]
