"""report.html: one run, or several side by side, in one file, made from run folders alone.

It is what the page of `trimtab studio` shows of runs (`web/src/runs`), with the data in the file instead of a server: `make page` builds
script and style into `trimtab/web/report`. The file loads nothing from the network. Its content security policy allows this script and
style alone, by hash, and forbids to turn text into markup. Data are JSON in the file, in which no `<` stands.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from trimtab.atomic import atomic_write
from trimtab.errors import writing
from trimtab.train.answers import answers, confusion
from trimtab.train.follow import facts_of, read, table
from trimtab.train.past import Line, PastRun, doubts, read_runs
from trimtab.train.sendable import word
from trimtab.version import __version__

ROWS = 60
"""Rows with answers that a report holds of a data set, those first that most got wrong."""
POINTS, ALL_POINTS = 1200, 12_000
"""Lines of metrics that a report holds of a variant, and about how many of all variants; at least a 32nd of the latter of each."""
DIGITS = 6
"""Of a number of the metrics."""

SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title} · trimtab</title>
<style>{style}</style>
</head>
<body>
<div id="app"></div>
<noscript>This report needs JavaScript, which is in this file. `trimtab compare` shows runs on the command line.</noscript>
<script id="data" type="application/json">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def write_page(folders: Sequence[Path], target: Path) -> None:
    """Write the report of one or several run folders, whole or not at all. ConfigError where a folder is not a run's."""
    text = render(read_runs(folders))
    with atomic_write(target) as file:
        file.write(text.encode())


def write_named(folders: Sequence[Path], target: Path) -> None:
    """The same, into a file that a user has named. ConfigError where that cannot be written."""
    with writing(f"{target} cannot be written", fix="name a file in a folder that is there"):
        write_page(folders, target)


def render(runs: Sequence[PastRun]) -> str:
    """The report's HTML."""
    style, script = _built("report.css"), _built("report.js")
    own = "require-trusted-types-for 'script'; trusted-types 'none'; base-uri 'none'; form-action 'none'"
    return SHELL.format(
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; {own}",
        title=escape(" · ".join(word(run.name) for run in runs)),
        style=style,
        script=script,
        data=json.dumps(told(runs), ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


def told(runs: Sequence[PastRun]) -> dict[str, Any]:
    """The report's data: see web/src/report.tsx."""
    limit = max(ALL_POINTS // 32, min(POINTS, ALL_POINTS // max(1, sum(len(run.variants) for run in runs))))
    found: dict[str, Any] = {"version": __version__, "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "runs": []}
    found |= {"metrics": {}, "answers": {}, "confusion": {}, "thinned": any(len(v.steps) > limit for r in runs for v in r.variants)}
    found["doubts"] = [word(text) for text in doubts([run for run in runs if run.finished])]
    for n, run in enumerate(runs):
        key = str(n)
        shown = read(run.folder)
        facts = facts_of(run.folder, key, word(run.name))
        found["runs"].append(facts | {"state": "finished" if run.finished else "stopped"})
        found["metrics"][key] = {
            word(v.name): {"steps": _numbers(thinned(v.steps, limit)), "valid": _numbers(thinned(v.valid, limit))} for v in run.variants
        }
        found["answers"][key] = {data: _answers(shown, data) for data in facts["answers"]}
        found["confusion"][key] = {data: confusion(shown, data) for data in facts["answers"]}
    return found


def thinned(lines: Sequence[Line], limit: int) -> Sequence[Line]:
    """At most about `limit` lines: of each stretch those with the lowest and the highest loss, and the last one. A line's tokens and
    seconds become the mean of the steps that it then stands for, so that their sums stay."""
    if len(lines) <= limit:
        return lines
    size = math.ceil(3 * len(lines) / limit)
    kept: list[int] = []
    for a in range(0, len(lines), size):
        stretch = range(a, min(a + size, len(lines)))
        kept += sorted({min(stretch, key=lambda i: _loss(lines[i])), max(stretch, key=lambda i: _loss(lines[i])), stretch[-1]})
    ends = [0, *(i + 1 for i in kept)]
    return [_standing(lines[a:b]) for a, b in pairwise(ends)]


def _loss(line: Line) -> float:
    return float(line.get("loss", line.get("valid_loss")) or 0.0)


def _standing(lines: Sequence[Line]) -> Line:
    means = {}
    for field in ("tokens", "supervised_tokens", "seconds"):
        if known := [line[field] for line in lines if isinstance(line.get(field), int | float)]:
            means[field] = sum(known) / len(lines)
    return lines[-1] | means


def _numbers(lines: Iterable[Line]) -> dict[str, list[float | None]]:
    columns = table(list(lines))
    return {f: [float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for v in values] for f, values in columns.items()}


def _answers(run: PastRun, data: str) -> dict[str, Any]:
    found = answers(run, data, "", 0, ROWS)
    return found if found["total"] <= ROWS else found | {"total": ROWS, "answered": found["total"]}


def _built(name: str) -> str:
    return files("trimtab").joinpath("web", "report", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
