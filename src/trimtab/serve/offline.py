"""A file of prompts through the engine: many adapters in mixed batches, with answers in the order of the prompts.

A line is a JSON object with `prompt` (a user's turn), `messages` or `ids`, and optionally `adapter`, `id`, `json_schema` and settings of
sampling. Every line is checked before the first token is computed. The file of answers appears whole, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from trimtab.atomic import atomic_write
from trimtab.data.json_files import read_jsonl
from trimtab.data.rows import Dropped
from trimtab.errors import DataError, TrimtabError, nearest
from trimtab.model import Base
from trimtab.serve.composed import served_sum
from trimtab.serve.engine import Engine
from trimtab.serve.request import Grammar, Request, SamplingParams, Servable
from trimtab.serve.results import Result

BASE = "base"
"""The name of the base itself, where an adapter is asked for."""


class TextPart(BaseModel, frozen=True, strict=True, extra="forbid"):
    """A part of a content, as OpenAI writes it."""

    type: Literal["text"]
    text: str


class Message(BaseModel, frozen=True, strict=True, extra="forbid"):
    """A turn of a conversation."""

    role: str
    content: str | Annotated[list[TextPart], Field(min_length=1)]


class Line(BaseModel, frozen=True, strict=True, extra="forbid"):
    """One prompt. adapter: a folder, a name in the store, a sum (name+0.5*other), or "base". What is None is as the caller's defaults have
    it."""

    prompt: str | None = None
    messages: list[Message] | None = None
    ids: list[int] | None = None
    system: str | None = None
    adapter: str | None = None
    id: str | None = None
    json_schema: dict[str, Any] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    logprobs: int | None = None


_KEYS = list(Line.model_fields)
_SAMPLING = [f.name for f in dataclasses.fields(SamplingParams) if f.name in _KEYS]


@dataclass(frozen=True)
class Summary:
    """What came of a file: how many lines, how many of them failed, tokens."""

    answers: int
    failed: int
    prompt_tokens: int
    new_tokens: int


def answer_file(
    path: Path,
    out: Path,
    engine: Engine,
    *,
    defaults: SamplingParams,
    adapter: str = BASE,
    system: str | None = None,
    store: Path | None = None,
) -> Summary:
    """Answer every line of `path` into `out`. defaults, adapter, system: of lines that name none; defaults' seed is counted up by lines.

    DataError if lines cannot be used, all listed; AdapterError if an adapter is not there. A line that fails later has its error in
    `out`.
    """
    lines = read_lines(path)
    names = dict.fromkeys(line.adapter or adapter for _, line in lines)
    named = {name: None if name == BASE else served_sum(name, engine.base, store) for name in names}
    requests, problems = [], []
    for n, (origin, line) in enumerate(lines):
        try:
            requests.append(_request(n, line, engine.base, named[line.adapter or adapter], defaults, system))
        except TrimtabError as error:
            problems.append(f"{origin}: {'; '.join((error.message, *error.problems))}")
    if problems:
        raise DataError(f"{path} cannot be answered", problems=problems)
    results = engine.run(requests)
    written = [_answer(line, line.adapter or adapter, r) for (_, line), r in zip(lines, results, strict=True)]
    _write(out, (json.dumps(a, ensure_ascii=False) for a in written))
    usages = [r.usage for r in results]
    return Summary(
        len(results), sum(r.finish == "error" for r in results), sum(u.prompt for u in usages), sum(u.completion for u in usages)
    )


def read_lines(path: Path) -> list[tuple[str, Line]]:
    """(origin, line) of a JSONL file; DataError that lists every line that cannot be used, and why."""
    lines, problems = [], []
    for record in read_jsonl(path, str(path)):
        if isinstance(record, Dropped):
            problems.append(f"{record.origin}: {record.reason}")
            continue
        origin, content = record
        found = _problems(content)
        problems += [f"{origin}: {p}" for p in found]
        if not found:
            lines.append((origin, Line.model_validate(content)))
    if problems:
        fix = f"a line is an object with prompt, messages or ids, and any of {', '.join(_KEYS[3:])}"
        raise DataError(f"{path} cannot be answered", problems=problems, fix=fix)
    return lines


def _problems(content: Any) -> list[str]:
    if not isinstance(content, dict):
        return [f"{type(content).__name__} is not an object"]
    unknown = [f"unknown key {k!r}{nearest(k, _KEYS)}" for k in content if k not in _KEYS]
    if unknown:
        return unknown
    try:
        line = Line.model_validate(content)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    if sum(x is not None for x in (line.prompt, line.messages, line.ids)) != 1:
        return ["exactly one of prompt, messages and ids says what is asked"]
    return []


def _request(n: int, line: Line, base: Base, adapter: Servable | None, defaults: SamplingParams, system: str | None) -> Request:
    if line.ids is not None:
        ids: Sequence[int] = line.ids
    elif line.messages is not None:
        ids = base.encode_messages([m.model_dump() for m in line.messages])
    else:
        ids = base.encode_prompt(line.prompt or "", line.system or system)
    special = {name: value for name in _SAMPLING if (value := getattr(line, name)) is not None}
    special["stop"] = tuple(line.stop) if line.stop is not None else defaults.stop
    special.setdefault("seed", None if defaults.seed is None else defaults.seed + n)
    grammar = None if line.json_schema is None else Grammar("json_schema", json.dumps(line.json_schema))
    return Request(f"line-{n}", tuple(ids), dataclasses.replace(defaults, **special, grammar=grammar), adapter)


def _answer(line: Line, adapter: str, result: Result) -> Mapping[str, Any]:
    answer: dict[str, Any] = {} if line.id is None else {"id": line.id}
    answer |= {"adapter": adapter, "text": result.text, "finish": result.finish}
    answer["usage"] = dataclasses.asdict(result.usage)
    if result.error is not None:
        answer["error"] = result.error.render()
    if result.logprobs:
        answer["logprobs"] = [{"id": t.id, "logprob": t.logprob, "top": t.top} for t in result.logprobs]
    return answer


def _write(out: Path, lines: Iterable[str]) -> None:
    """Under another name first, so that `out` is never half of the answers."""
    try:
        with atomic_write(out) as file:
            file.writelines(f"{line}\n".encode() for line in lines)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}", fix="make room, or name another file with --out") from error
