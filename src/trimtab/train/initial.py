"""A first run file for given data: form, columns, splits and labels are guessed from the rows, and each guess is said in a comment."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trimtab.bases.template import BadRow
from trimtab.data import Source
from trimtab.data.documents import TEXT_SUFFIXES
from trimtab.data.formats import SUFFIXES
from trimtab.data.forms import FORMS, form_of
from trimtab.data.labels import MAX_LABELS
from trimtab.data.pairs import marked
from trimtab.data.rows import Dropped, to_segments
from trimtab.data.source_rows import records_of
from trimtab.data.sources import HUB
from trimtab.data.turns import kind_of
from trimtab.errors import DataError
from trimtab.objectives import OBJECTIVES, Objective, Sft

LOOKED_AT = 2000
"""Rows that are read to guess from."""
READ = 50
"""Rows by which is told which objectives read them."""
SHORT = 60
"""Characters of a label at most."""
SPLIT, ENOUGH = 0.1, 20
"""The part of the rows that is held out to validate on, where there are enough rows."""

NAMES: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("prompt", "question", "query", "input", "source", "user", "request", "instruction", "q", "title", "problem"),
    "completion": ("completion", "answer", "response", "output", "target", "reply", "assistant", "summary", "solution", "a"),
    "text": ("text", "content", "body", "document", "article", "sentence", "message", "ticket", "review", "utterance"),
    "label": ("label", "labels", "category", "class", "intent", "sentiment", "topic", "tag", "target"),
}
"""Our column -> names that others give it, the likeliest first."""
SPLITS: Mapping[str, tuple[str, ...]] = {"train": ("train",), "valid": ("valid", "validation", "val", "dev", "eval"), "test": ("test",)}
AIMS: Mapping[str, str] = {
    "dpo": "rows with a better and a worse answer: objective dpo",
    "kto": "rows with an answer and a mark whether it is wanted: objective kto",
    "stepwise": "solutions in steps, each marked right or wrong: objective stepwise",
    "grpo": "prompts without answers: objective grpo. Its reward is a placeholder: docs/objectives.md#reinforcement has others",
}
PLACEHOLDER: Mapping[str, Any] = {"reward": "length", "max_words": 100}
"""The reward of prompts without answers, until somebody says what is wanted."""
CONTROL = re.compile(r"<\|[a-z_]+\|>|<start_of_turn>|\[INST\]|</s>")
"""Texts of control tokens of common bases."""

SHOWN_BAD = 3
"""Where no row can be read, so many are shown with the reason."""


@dataclass
class Guess:
    """What a run file says of the data, and why. form: of the rows, or the objective that reads them. columns: our name -> the file's.
    objectives: those that read most of the rows. answered: the rows have answers of their own."""

    splits: dict[str, str]
    form: str
    columns: dict[str, str] = field(default_factory=dict)
    labels: bool = False
    trusted: bool = False
    rows: int = 0
    longest: int = 0
    objectives: tuple[str, ...] = ()
    answered: bool = False
    said: list[str] = field(default_factory=list)


def guess(data: str, root: Path) -> Guess:
    """Look at the data. root: where its relative path starts. DataError where there is none, or no columns that rows could be made of."""
    splits, said = _splits(data, root)
    looked = list(itertools.islice(records_of(Source(splits["train"]), root), LOOKED_AT))
    records = [r for r in looked if not isinstance(r, Dropped)]
    rows = [record for _, record in records if isinstance(record, dict)]
    if not rows:
        dropped = [f"{r.origin}: {r.reason}" for r in looked if isinstance(r, Dropped)]
        shapeless = [f"{origin}: not an object: the row is {kind_of(record)}" for origin, record in records]
        raise DataError(
            f"{data} holds no rows", problems=(dropped + shapeless)[:SHOWN_BAD], fix="name a file that has rows, or a folder of texts."
        )
    names = list(dict.fromkeys(str(k) for row in rows for k in row))
    objective = _objective(rows[0])
    form, columns = (objective, {}) if objective else _form(rows[0], names)
    if form is None:
        form, columns = _prompts(rows[0], names)
        objective = form
    if form is None:
        raise DataError(
            f"{data}: no training form found in its columns: {', '.join(names)}",
            fix="write the run file yourself, with `columns` for what the rows are made of: docs/run-file.md#forms-of-a-row",
        )
    for split, path in [(s, p) for s, p in splits.items() if s != "train"]:
        if strange := _strange(path, root, objective, columns):
            del splits[split]
            said[:] = [s for s in said if not s.startswith(f"{split} rows in {path},")] + [f"{path} is left out: {strange}"]
    found = Guess(splits, form, columns, rows=len(rows), said=said)
    mapped = f", from the columns {', '.join(f'{v!r} as {k}' for k, v in columns.items())}" if columns else ""
    found.objectives = tuple(name for name, cls in OBJECTIVES.items() if _reads(cls, rows, columns))
    found.answered = _reads(Sft, rows, columns)
    said.append(AIMS[form] if objective else f"rows of the form {form} ({' + '.join(FORMS[form])}){mapped}")
    _look(found, rows)
    return found


def _strange(path: str, root: Path, objective: str | None, columns: Mapping[str, str]) -> str | None:
    """Why rows of another split cannot be read as those of training are; None where they can, by the first of them."""
    row = next((r[1] for r in records_of(Source(path), root) if not isinstance(r, Dropped) and isinstance(r[1], dict)), None)
    if row is None:
        return "it has no rows"
    reads = _objective(row) == objective if objective else form_of(row, columns) is not None
    return None if reads else f"its columns are {', '.join(map(str, row))}"


def _reads(objective: type[Objective], rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> bool:
    """Whether an objective can read most of the rows."""
    some = rows[:READ]
    return sum(not isinstance(to_segments(row, "", columns, None, objective.parts), Dropped) for row in some) * 2 > len(some)


def _look(found: Guess, rows: Sequence[Mapping[str, Any]]) -> None:
    """Labels, lengths, texts of control tokens."""
    answer = {"label": "label", "prompt": "completion", "instruction": "output"}.get(found.form)
    column = found.columns.get(answer, answer) if answer else None
    answers = Counter(str(r.get(column)).strip() for r in rows if r.get(column) is not None) if column else Counter[str]()
    if 2 <= len(answers) <= MAX_LABELS and len(answers) * 4 <= answers.total() and max(map(len, answers)) <= SHORT:
        found.labels = True
        found.said.append(
            f"{len(answers)} distinct answers in {len(rows)} rows: they look like labels, and are judged by their likelihoods"
        )
    texts = [str(list(r.values())) for r in rows]
    found.longest = max(map(len, texts))
    if found.form == "text" and any(CONTROL.search(t) for t in texts):
        found.trusted = True
        found.said.append("texts with control tokens: they are read as such (trusted)")


def _objective(row: Mapping[str, Any]) -> str | None:
    """The objective of a row with a better and a worse answer, with a mark, or with marked steps; None of others. Texts alone have no
    certain prompt."""
    if isinstance(row.get("completions"), list) and not isinstance(to_segments(row, "", {}, None, OBJECTIVES["stepwise"].parts), Dropped):
        return "stepwise"
    if {"prompt", "messages", "conversations", "instruction", "input"}.isdisjoint(row) and isinstance(row.get("chosen"), str):
        return None
    try:
        answers = marked(row)
    except BadRow:
        return None
    if {form_of(answer, {}) for answer in answers.values()} & {None, "text", "label"}:
        return None
    return "dpo" if len(answers) == 2 else "kto"


def _prompts(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """("grpo", the column of the prompt) where rows only ask. No column is named where the objective reads the rows as they are."""
    plain = _plain(names)
    asked = next((plain[n] for n in NAMES["prompt"] if n in plain), None)
    for columns in ({}, {} if asked is None else {"prompt": asked}):
        if not isinstance(to_segments(row, "", columns, None, OBJECTIVES["grpo"].parts), Dropped):
            return "grpo", columns
    return None, {}


def _plain(names: Sequence[str]) -> dict[str, str]:
    """Each column by its letters alone; of two with the same letters the first."""
    return {re.sub(r"[^a-z]", "", n.lower()): n for n in reversed(names)}


def _form(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The form of the rows, by their columns or by what others call these."""
    plain = _plain(names)

    def named(ours: str, taken: Sequence[str] = ()) -> str | None:
        return next((plain[n] for n in NAMES[ours] if n in plain and plain[n] not in taken), None)

    text, label = named("text"), named("label")
    form = form_of(row, {})
    if form not in (None, "text"):
        return form, {}
    if text and label and text != label and named("completion", [text, label]) is None:
        return "label", {"text": text, "label": label}
    if form == "text":
        return form, {}
    talk = named("messages")
    if talk and isinstance(row.get(talk), list):
        return "messages", {"messages": talk}
    asked = named("prompt")
    answered = named("completion", [asked] if asked else [])
    if asked and answered:
        return "prompt", {k: v for k, v in (("prompt", asked), ("completion", answered)) if k != v}
    return ("text", {"text": text}) if text else (None, {})


def _splits(data: str, root: Path) -> tuple[dict[str, str], list[str]]:
    """split -> path, with what was found by names."""
    path = root / data
    if data.startswith(HUB):
        return {"train": data}, ["the hub's split train"]
    if not path.exists():
        raise DataError(f"{data} does not exist", fix=f"looked for {path.absolute()}")
    beside = [p for p in sorted((path if path.is_dir() else path.parent).iterdir()) if p.suffix.lower() in SUFFIXES]
    if path.is_dir():
        files = [p for p in beside if p.suffix.lower() not in TEXT_SUFFIXES]
        found = {split: p for split in SPLITS for p in files if _is(split, p.stem)}
        if not files:
            inside = sorted(
                {p.parent.name for p in path.glob("*/*") if p.suffix.lower() in SUFFIXES and p.suffix.lower() not in TEXT_SUFFIXES}
            )
            if inside:
                raise DataError(f"{data} holds folders with rows: {', '.join(inside)}", fix=f"name one of them: {data}/{inside[0]}")
            return {"train": data}, ["a folder of texts"]
        if "train" not in found:
            files = [p for p in files if p not in found.values()]
            if len(files) != 1:
                raise DataError(
                    f"{data} holds several files, and none is called train: {', '.join(p.name for p in files)}",
                    fix="name one of them.",
                )
            found["train"] = files[0]
    else:
        stem = _without("train", path.stem)
        others = {
            s: p for s in ("valid", "test") for p in beside if p.suffix == path.suffix and _is(s, p.stem) and _without(s, p.stem) == stem
        }
        found = {"train": path, **others}
    shown = {split: str(p.relative_to(root)) if p.is_relative_to(root) else str(p) for split, p in found.items()}
    held = [f"{split} rows in {shown[split]}, by its name" for split in ("valid", "test") if split in shown]
    return {split: shown[split] for split in SPLITS if split in shown}, held


def _is(split: str, stem: str) -> bool:
    return not set(re.split(r"[^a-z]+", stem.lower())).isdisjoint(SPLITS[split])


def _without(split: str, stem: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", stem.lower()) if word and word not in SPLITS[split]]


def run_text(found: Guess, base: str) -> str:
    """The run file, every guess said above it."""
    path = Path(found.splits["train"].removeprefix(HUB))
    words = _without("train", path.stem) or _without("train", path.parent.name) or ["rows"]
    name = "-".join(words)[:50]
    source: dict[str, Any] = {"path": found.splits["train"]}
    source |= {"columns": found.columns} if found.columns else {}
    source |= {"trusted": True} if found.trusted else {}

    def also(path: str) -> Any:
        return {**source, "path": path} if len(source) > 1 else path

    data: dict[str, Any] = {split: also(path) for split, path in found.splits.items()}
    if "valid" not in data and found.rows >= ENOUGH:
        data["split"] = SPLIT
        found.said.append(f"no valid rows: {SPLIT:.0%} of the training rows are held out (split)")
    if found.labels:
        data["labels"] = "auto"
    length = next((n for n in (256, 512, 1024, 2048, 4096) if n * 3 >= found.longest), 8192)
    found.said.append(f"the longest of {found.rows} rows that were looked at has {found.longest:,} characters: max_length {length}")
    defaults = {"epochs": 2, "batch_size": 16, "warmup_steps": 0.03, "max_length": length}
    content = {"base": base, "out": f"runs/{name}", "data": {name: data}, "defaults": defaults}
    variant: dict[str, Any] = {"data": name, "method": "lora", "r": 16}
    variant |= {"objective": found.form} if found.form in AIMS else {}
    variant |= {"rewards": [dict(PLACEHOLDER)]} if found.form == "grpo" else {}
    variant |= {"valid_metric": "label_accuracy"} if found.labels and not data.keys().isdisjoint(("valid", "split")) else {}
    content["variants"] = {f"{name}-lora": variant}
    plain = json.loads(json.dumps(content))  # no two uses of one mapping
    lines = ["# Made by `trimtab init`. What was guessed:", *(f"# - {text}" for text in found.said)]
    lines += ["# `trimtab check` says what this file would do, `trimtab train` does it."]
    return "\n".join(lines) + "\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=140, default_flow_style=None)
