"""Base and adapters scored on rows of one's own, all in one pass: `trimtab eval` and `trimtab.evaluate`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from trimtab.atomic import atomic_write
from trimtab.data import Source, peek_source
from trimtab.errors import ConfigError, DataError, writing_into
from trimtab.objectives import OBJECTIVES, Objective, Sft, aimed_at
from trimtab.tables import Cell, Table

if TYPE_CHECKING:
    from trimtab.model import Base
    from trimtab.store import Adapter
    from trimtab.train.evaluate import HeldOut, Result
    from trimtab.train.listen import Listener

COLUMNS = {
    "loss": ("loss", 3),
    "perplexity": ("ppl", 2),
    "exact_match": ("exact match, %", 1),
    "token_f1": ("F1, %", 1),
    "rouge_l": ("ROUGE-L, %", 1),
    "bleu": ("BLEU", 1),
    "valid_json": ("valid JSON, %", 1),
    "label_accuracy": ("label accuracy, %", 1),
    "tool_calls": ("tool calls, %", 1),
    "rewards/accuracies": ("reward accuracy", 3),
    "rewards/margins": ("reward margin", 3),
    "accuracy": ("accuracy", 3),
    "macro_f1": ("macro F1", 3),
    "margin": ("margin", 3),
}
Labels: TypeAlias = Sequence[str] | Literal["auto"]


@dataclass(frozen=True)
class Evaluation:
    """Scores of a base and of adapters on the same rows. scores: "base" or an adapter's name -> its scores. delta: the adapters' distance
    to the base. predictions: every answer, where answers were generated."""

    base: str
    data: str
    rows: int
    scores: Mapping[str, Mapping[str, Any]]
    delta: Mapping[str, Mapping[str, float]]
    predictions: Mapping[str, Sequence[Mapping[str, Any]]]

    def to_dict(self) -> dict[str, Any]:
        """As scores.json has it."""
        return {"base": self.base, "data": self.data, "rows": self.rows, "scores": dict(self.scores), "delta": dict(self.delta)}

    def table(self) -> Table:
        """A row for the base and for each adapter, the distance to the base in brackets."""
        shown = [k for k in COLUMNS if any(k in scores for scores in self.scores.values())]
        rows: list[list[Cell]] = []
        for name, scores in self.scores.items():
            delta = self.delta.get(name, {})
            rows.append([name, *(_cell(scores.get(k), delta.get(k), COLUMNS[k][1]) for k in shown)])
        return Table(f"{self.data}: {self.rows} rows", ["", *(COLUMNS[k][0] for k in shown)], rows, frozenset([""]))

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()


def _cell(value: float | None, delta: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if delta is None else f" ({delta:+.{digits}f})")


@dataclass(frozen=True)
class Asked:
    """What is scored, and how. source: the rows. written: how a caller writes a limit, for messages."""

    source: Source
    labels: Labels = ()
    max_rows: int | None = None
    max_new_tokens: int = 96
    max_tokens: int = 4096
    generate: bool = True
    written: Callable[[str, Any], str] = lambda name, value: f"{name}={value}"


def evaluate(base: Base, named: Mapping[str, Adapter], asked: Asked, listener: Listener, *, called: str, out: Path | None) -> Evaluation:
    """Score the base and adapters in one pass of mixed batches. called: the base's name. out: the new folder for the results. ConfigError
    where it cannot be made, before anything is scored, or be written."""
    from trimtab.forward.batch import BASE
    from trimtab.train.evaluate import Contestant, Judge, read_held_out, write_predictions

    if out is not None:
        with writing_into(out):
            out.mkdir(parents=True, exist_ok=True)
    aims = _aims(asked.source, list(named.values()))
    held = read_held_out(base, asked.source, asked.labels, asked.max_rows, listener, aims, asked.max_tokens)
    mix, members = base.mix(list(named.values()))
    alike = all(aim == aims[0] for aim in aims) and not aims[0].reads_head
    of_base = aims[0] if alike else None  # losses of different objectives do not compare, and the base has no head
    judged = zip(["base", *named], [BASE, *members], [of_base, *(aims if named else ())], strict=True)
    field = [Contestant(name, member, asked.generate, objective=aim) for name, member, aim in judged]
    _refuse_without_room(base, list(named.values()), held, asked)
    listener.status("scoring")
    judge = Judge(base.tokenizer, base.stop_ids, asked.max_new_tokens, asked.max_tokens, lambda n: listener.status(f"scoring: {n} tokens"))
    stem = re.sub(r"[^\w.-]+", "-", Path(asked.source.path).stem)
    results = judge.judge(base.attached, mix, {stem: field}, {stem: held})
    found = _evaluation(called, asked.source.path, results[stem])
    if out is not None:
        with writing_into(out):
            try:
                write_predictions(out / "predictions", results)
                with atomic_write(out / "scores.json") as file:
                    file.write((json.dumps(found.to_dict(), indent=1) + "\n").encode())
            except BaseException:
                shutil.rmtree(out / "predictions", ignore_errors=True)  # the next try wants an empty folder
                raise
    return found


def _evaluation(base: str, data: str, results: Mapping[str, Result]) -> Evaluation:
    scores = {name: r.scores for name, r in results.items()}
    before = scores["base"]
    delta = {
        name: {k: round(s[k] - before[k], 6) for k in COLUMNS if s.get(k) is not None and before.get(k) is not None}
        for name, s in scores.items()
        if name != "base"
    }
    predictions = {name: r.predictions for name, r in results.items()}
    return Evaluation(base, data, before["rows"], scores, delta, predictions)


def reader(source: Source, own: Sequence[Objective] = ()) -> Objective:
    """The first objective that reads such rows: one of `own`, imitation, any other. DataError, why the first does not, where none does."""
    errors: list[DataError] = []
    for way in [*own, Sft(), *_others()]:
        try:
            peek_source(source, Path(), way.parts)
            return way
        except DataError as error:
            errors.append(error)
    raise errors[0]


def _others() -> Iterator[Objective]:
    """Each objective that can measure the base: it reads no head, and has no field without a default, as rewards have none."""
    for cls in OBJECTIVES.values():
        if not cls.reads_head:
            with suppress(ConfigError):
                yield cls()


def _aims(source: Source, adapters: Sequence[Adapter]) -> list[Objective]:
    """By which objective each adapter is measured on such rows: its own where that reads them. One objective where there is no adapter."""
    own = [_judged_by(a) for a in adapters]
    own = [Sft() if aim.taught_by or aim.sampled_at else aim for aim in own]  # whose teacher may be gone; whose rewards may be code
    if len({aim.reads_head for aim in own}) > 1:
        raise ConfigError("adapters with a head are measured by it, and others by their answers", fix="measure them in two commands")
    reads = reader(source, own)
    return [aim if aim.parts is reads.parts else reads for aim in own] or [reads]


def _judged_by(adapter: Adapter) -> Objective:
    """The objective of its run; of a head from elsewhere the one that reads it."""
    from trimtab.objectives.classify import Classify
    from trimtab.objectives.reward import Reward

    aim = aimed_at((adapter.info.get("run") or {}).get("options") or {})
    if adapter.head is None or aim.reads_head or adapter.head.every_token:
        return aim
    return Reward() if len(adapter.head.labels) == 1 else Classify(classes=adapter.head.labels)


def _refuse_without_room(base: Base, adapters: Sequence[Adapter], held: HeldOut, asked: Asked) -> None:
    """OutOfMemory, with what would fit, where scoring cannot have the memory that it needs."""
    from trimtab.bases.fits import most_bytes
    from trimtab.cost.activations import packed_sizes
    from trimtab.cost.room import Pass, halves
    from trimtab.memory import OutOfMemory

    max_tokens, answer = asked.max_tokens, asked.max_new_tokens if asked.generate else 0
    who, virtual = 1 + len(adapters), max((int(getattr(a.method, "num_virtual_tokens", 0)) for a in adapters), default=0)
    tokens, longest = sum(e.tokens for e in held.examples), max(e.tokens for e in held.examples)
    packed = sum(packed_sizes(base.spec, base.dtype)) if base.device.type == "cpu" else 0

    def needed(max_tokens: int, answer: int) -> int:
        questions = who * len(held.questions) if answer or held.labels else 0
        one = Pass(who * tokens, longest, questions, answer, midway=False)
        return one.bytes(base.spec, base.dtype, max_tokens, virtual, base.device) + packed * bool(questions)

    free = most_bytes(base.device)
    if (need := needed(max_tokens, answer)) <= free:
        return
    fits = [asked.written("max_tokens", n) for n in halves(max_tokens) if n >= max(64, longest) and needed(n, answer) <= free][:1]
    fits += [asked.written("max_new_tokens", n) for n in halves(answer) if needed(max_tokens, n) <= free][:1]
    fits += [asked.written("generate", False)] if answer and needed(max_tokens, 0) <= free else []
    raise OutOfMemory(
        f"scoring does not fit: it needs {need / 1e9:.3g} GB beside the base, and {free / 1e9:.3g} GB are free on {base.device}",
        fix=f"give {' or '.join(fits)}; or make memory free." if fits else "make memory free.",
    )


def refuse_occupied(out: Path | None) -> None:
    """ConfigError where results would be written over what is there, or nothing can be."""
    from trimtab.train.resume import refuse_no_folder

    if out is not None:
        refuse_no_folder(out)
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"out = {str(out)!r} is not empty", fix="name another folder, or remove this one")


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """A short name of each adapter: its folder's own where that is unique, else the path, in characters that a file name takes."""
    twice = sorted({f for f in folders if folders.count(f) > 1})
    if twice:
        raise ConfigError(f"the adapter {twice[0]} is given twice", fix="name each adapter once; the base is always judged")
    own = [Path(f).name for f in folders]
    named: dict[str, str] = {}
    for name, folder in zip(own, folders, strict=True):
        if own.count(name) > 1 or name == "base":
            name = re.sub(r"[^\w.@-]+", "-", folder)
        while name in named or name == "base":
            name += "~"
        named[name] = folder
    return named
