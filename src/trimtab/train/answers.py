"""Answers to held-out rows, as a run folder has them: page by page, wrong ones first, and which labels are taken for which.

Everything is read from files at each call. They may be anybody's: only files within the run folder are read, up to a size.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimtab.data.opened import open_file
from trimtab.errors import NotFoundError, printable
from trimtab.train.past import PastRun
from trimtab.train.run_folders import is_file
from trimtab.train.sendable import number, shown_text

MAX_ANSWERS = 10_000
"""Rows of a file of answers that are read."""
ANSWER_LINE, ANSWER_BYTES = 1 << 20, 256 << 20
"""Bytes of a row of answers, and of all files of answers that one call reads."""
MAX_LABELS, LABEL_LENGTH = 500, 100
"""Answers are labels if there are no more different ones, and none is longer, in characters."""
ROWS_A_LABEL = 2
"""Nor are answers labels if they do not come again: rows for each different one, in the mean."""


def answers(run: PastRun, data: str, who: str, start: int, count: int) -> dict[str, Any]:
    """Held-out rows of a data set with what base and variants answered, those first that most got wrong. who: of this one alone.
    NotFoundError if nobody has answered them."""
    files = {name: path for name, path in _files(run).get(data, {}).items() if who in ("", name)}
    if not files:
        raise NotFoundError("there are no answers to these rows", fix="they are written at the end of a run that has test rows")
    rows: list[dict[str, Any]] = []
    left = ANSWER_BYTES
    for name, path in files.items():
        for n, (line, size) in enumerate(_lines(path, left)):
            left -= size
            if n == len(rows):
                rows.append(
                    {"row": n, "prompt": shown_text(line.get("prompt")), "reference": shown_text(line.get("reference")), "answers": {}}
                )
            told: dict[str, Any] = {"text": shown_text(line.get("answer")), "right": _right(line)}
            rows[n]["answers"][name] = told | ({} if (reward := number(line.get("reward"))) is None else {"reward": reward})
    rows.sort(key=lambda row: (-_share_wrong(row["answers"]), row["row"]))
    wrong = {name: sum(r["answers"][name]["right"] is False for r in rows if name in r["answers"]) for name in files}
    return {"rows": rows[start : start + count], "total": len(rows), "wrong": wrong}


def confusion(run: PastRun, data: str) -> dict[str, Any] | None:
    """How often the rows of one label were given another: {labels, of: {contestant: [[right, given, rows] ...]}}, by places in `labels`;
    given is None for answers that are no label. None where the answers are no labels.

    A label is what a contestant held for the likeliest, where the run asked for that, else its answer. Labels are those that rows have,
    and then those that were chosen."""
    counts: dict[str, Counter[tuple[str, str]]] = {}
    left = ANSWER_BYTES
    asked = False
    for name, path in _files(run).get(data, {}).items():
        counts[name] = Counter()
        for line, size in _lines(path, left):
            left -= size
            reference, given = line.get("reference"), line.get("label", line.get("answer"))
            if isinstance(reference, str) and isinstance(given, str):
                asked = asked or "label" in line
                counts[name][shown_text(reference.strip()), shown_text(given.strip())] += 1
    pairs = [pair for found in counts.values() for pair in found]
    labels = sorted({reference for reference, _ in pairs} | ({given for _, given in pairs} if asked else set()))
    rows = max((sum(found.values()) for found in counts.values()), default=0)
    short = all(len(label) <= LABEL_LENGTH and "\n" not in label for label in labels)
    if not 1 < len(labels) <= MAX_LABELS or not (asked or (short and rows >= ROWS_A_LABEL * len(labels))):
        return None
    place = {label: n for n, label in enumerate(labels)}
    return {"labels": labels, "of": {name: _placed(found, place) for name, found in counts.items()}}


def _placed(found: Counter[tuple[str, str]], place: Mapping[str, int]) -> list[list[int | None]]:
    merged: Counter[tuple[int, int | None]] = Counter()
    for (reference, given), rows in found.items():
        merged[place[reference], place.get(given)] += rows
    return [[right, given, rows] for (right, given), rows in merged.items()]


def answered(run: PastRun) -> dict[str, list[str]]:
    """data set -> who answered its rows."""
    return {data: list(files) for data, files in _files(run).items()}


def _files(run: PastRun) -> dict[str, dict[str, Path]]:
    """data set -> "base" and variants -> the file of their answers. A path that leads out of the run folder is not followed."""
    inside = run.folder.resolve() / "predictions"
    entries = [(data, "base", scores) for data, scores in (run.summary.get("base_scores") or {}).items()]
    entries += [(v.data, v.name, v.facts.get("scores") or {}) for v in run.variants]
    found: dict[str, dict[str, Path]] = {}
    for data, name, scores in entries:
        if (
            isinstance(path := scores.get("predictions"), str)
            and (file := (run.folder / path).resolve()).parent == inside
            and is_file(file)
        ):
            found.setdefault(data, {})[name] = file
    return found


def _lines(path: Path, most: int) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, its bytes), up to a line that is no row for its length, and while they are no more than `most` bytes together."""
    with open_file(path, printable(str(path))) as file:
        for _ in range(MAX_ANSWERS):
            text = file.readline(ANSWER_LINE + 1)
            if not text or len(text) > ANSWER_LINE or file.tell() > most:
                return
            try:
                line = json.loads(text.decode("utf-8", errors="replace"))
            except (ValueError, RecursionError):
                line = {}
            yield line if isinstance(line, dict) else {}, len(text)


def _right(line: Mapping[str, Any]) -> bool | None:
    """Whether an answer is right; None where that is no question of right and wrong, as with rewards."""
    told = line.get("label_correct", line.get("correct"))
    return told if isinstance(told, bool) else None


def _share_wrong(answers: Mapping[str, Mapping[str, Any]]) -> float:
    """Among the variants, or of the base where it is alone."""
    judged = [a["right"] for name, a in answers.items() if name != "base"] or [a["right"] for a in answers.values()]
    return sum(right is False for right in judged) / max(1, len(judged))
