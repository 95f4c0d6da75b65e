"""A new run, guided: what can be chosen, a first run file for data, its text as it forms, what it would cost, and where it is saved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field, field_validator
from starlette.concurrency import run_in_threadpool

from trimtab.atomic import write_new
from trimtab.errors import ConfigError, printable
from trimtab.http.errors import Fault
from trimtab.http.fields import Strict
from trimtab.http.own_page import body_of, from_this_page
from trimtab.http.rows import begun, shown_path
from trimtab.http.studio_auth import Studio, allowed, may_change
from trimtab.store.names import RULE, is_word

router = APIRouter(prefix="/studio/new", include_in_schema=False, dependencies=[Depends(allowed)])
changes = APIRouter(dependencies=[Depends(from_this_page)])
MAX_TEXT = 200_000
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
HUB = "hf:"


class GuessBody(Strict):
    """POST /studio/new/guess."""

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    base: Annotated[str, Field(max_length=4096)] = ""


ORDERED = ("data", "variants")
"""Parts of a run file whose names are a user's own. They travel as pairs of name and fields: in JavaScript an object has a name like "10"
before all others, wherever it stood."""


class FormBody(Strict):
    """POST /studio/new/form. content: a run file as a mapping; its data and variants may be pairs. said: comments above it."""

    content: dict[str, Any]
    said: list[Annotated[str, Field(max_length=2000)]] = Field([], max_length=50)

    @field_validator("content")
    @classmethod
    def _of_mappings(cls, content: dict[str, Any]) -> dict[str, Any]:
        return {key: _mapping(key, part) if key in ORDERED and isinstance(part, list) else part for key, part in content.items()}


class CheckBody(Strict):
    """POST /studio/new/check. text: a run file."""

    text: Text


class SaveBody(Strict):
    """POST /studio/new/save. name: of the file, without its suffix."""

    name: str
    text: Text


@router.get("/choices")
async def choices(studio: Studio) -> dict[str, Any]:
    """Bases, methods, objectives, training options, with their fields."""
    found: dict[str, Any] = await run_in_threadpool(studio.helper.at_once, {"do": "choices"})
    return found | {"base": studio.base, "root": printable(str(studio.runs.root))}


@changes.post("/guess")
async def guess(studio: Studio, request: Request) -> dict[str, Any]:
    """A run file for data, as `trimtab init` would write it."""
    body = await body_of(request, GuessBody)
    root = studio.runs.root

    def found() -> dict[str, Any]:
        path = body.path if body.path.startswith(HUB) else os.path.relpath(shown_path(studio, body.path), root)
        told: dict[str, Any] = studio.helper.at_once(_at(studio, {"do": "guess", "path": path, "base": body.base or studio.base}))
        content = told["content"]
        return told | {"content": content | {key: list(content[key].items()) for key in ORDERED}}

    return await run_in_threadpool(found)


@changes.post("/form")
async def form(studio: Studio, request: Request) -> dict[str, Any]:
    """The run file's text, and what is wrong with it."""
    body = await body_of(request, FormBody)
    return await run_in_threadpool(studio.helper.at_once, _at(studio, {"do": "form", **body.model_dump()}))


@changes.post("/check")
async def check(studio: Studio, request: Request) -> dict[str, Any]:
    """Begin to read what it names, and to estimate its cost; /studio/rows/state tells how far that is."""
    body = await body_of(request, CheckBody)
    return begun(studio, _at(studio, {"do": "check", "text": body.text}))


@changes.post("/save", status_code=201, dependencies=[Depends(may_change)])
async def save(studio: Studio, request: Request) -> dict[str, Any]:
    """Write it beside the runs. A file that is there is never written over."""
    body = await body_of(request, SaveBody)
    if not is_word(body.name):
        raise Fault(f"{body.name[:80]!r} is no name for a run file: {RULE}", code="invalid_value", param="name")
    path = studio.runs.root / f"{body.name}.yaml"
    await run_in_threadpool(_write_new, path, body.text)
    return {"path": printable(str(path)), "file": path.name}


router.include_router(changes)


def _mapping(key: str, pairs: list[Any]) -> dict[str, Any]:
    """ValueError if these are no pairs, or if a name comes twice: a run file could hold only one of the two."""
    if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ValueError(f"{key}: give pairs of a name and its fields")
    found: dict[str, Any] = {}
    for name, fields in pairs:
        if name in found:
            raise ValueError(f"{key}: there are two called {name[:80]!r}")
        found[name] = fields
    return found


def _at(studio: Studio, message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "root": str(studio.runs.root), "allowed": list(map(str, studio.folders)), "own": studio.base}


def _write_new(path: Path, text: str) -> None:
    try:
        write_new(path, text)
    except FileExistsError:
        raise ConfigError(f"{path.name} exists", fix="give the run another name") from None
    except (OSError, UnicodeEncodeError) as error:
        raise ConfigError(f"{path.name} cannot be written: {error}", fix="download the file, and save it yourself") from None
