"""What the page shows of rows before and after training: which data there is, rows with their mask, what is dropped, lengths, overlap.

All of it is read by a process of its own (`reader.py`), and only from folders that the studio was told to show.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from trimtab.errors import NotFoundError, printable
from trimtab.http.errors import Fault
from trimtab.http.fields import Strict
from trimtab.http.own_page import body_of, from_this_page
from trimtab.http.runs import sent
from trimtab.http.studio_auth import Shown, Studio, allowed
from trimtab.train.data_files import data_files

router = APIRouter(prefix="/studio", include_in_schema=False, dependencies=[Depends(allowed)])
changes = APIRouter(dependencies=[Depends(from_this_page)])
Key = Annotated[str, Query(min_length=1, max_length=64)]
Word = Annotated[str, Query(max_length=200)]
From = Annotated[int, Query(ge=0, le=2**40)]
MAX_NAME = 4096


class OpenBody(Strict):
    """POST /studio/rows/open: a run by its id, or the path of a file or folder of rows, read on `base`."""

    run: str = ""
    path: str = ""
    base: str = ""


@router.get("/files")
async def files(studio: Studio) -> JSONResponse:
    """Files of rows below the folders that are shown."""
    return await sent(lambda: listed(studio))


@changes.post("/rows/open")
async def open_rows(studio: Studio, request: Request) -> dict[str, Any]:
    """Begin to read; gives the key by which the rest is asked for."""
    body = await body_of(request, OpenBody)
    subject = await run_in_threadpool(subject_of, studio, body)
    message = {"do": "open", "subject": str(subject), "base": body.base or studio.base, "allowed": list(map(str, studio.folders))}
    return begun(studio, message | {"own": studio.base}) | {"subject": printable(str(subject))}


@router.get("/rows/state")
async def state(studio: Studio, key: Key) -> JSONResponse:
    """How far a reading is, and its report once it is there."""
    return await sent(studio.reader.told, key)


@router.get("/rows")
async def rows(
    studio: Studio, key: Key, data: Word, split: Word, start: From = 0, count: Annotated[int, Query(ge=1, le=50)] = 10, order: Word = "file"
) -> JSONResponse:
    """Rows with their mask."""
    return await sent(studio.reader.ask, key, {"do": "rows", "data": data, "split": split, "start": start, "count": count, "order": order})


@router.get("/rows/dropped")
async def dropped(
    studio: Studio, key: Key, data: Word, split: Word, kind: Word = "", start: From = 0, count: Annotated[int, Query(ge=1, le=200)] = 50
) -> JSONResponse:
    """Rows that are dropped, with file, line and reason."""
    return await sent(studio.reader.ask, key, {"do": "dropped", "data": data, "split": split, "kind": kind, "start": start, "count": count})


router.include_router(changes)


def begun(studio: Shown, message: dict[str, Any]) -> dict[str, Any]:
    """A reading that has been begun, with its key."""
    key = hashlib.sha256(json.dumps(message, sort_keys=True).encode()).hexdigest()[:32]
    return {"key": key, **studio.reader.begin(key, message)}


def subject_of(studio: Shown, body: OpenBody) -> Path:
    """The folder or file that is meant. Fault where none is, NotFoundError where it is not among what is shown."""
    if bool(body.run) == bool(body.path):
        raise Fault("give either a run or a path", code="invalid_value", param="path")
    return studio.runs.folder(body.run) if body.run else shown_path(studio, body.path)


def shown_path(studio: Shown, text: str) -> Path:
    """A path that is given from outside: from the first folder where it is relative. The same answer where it is not there and where it may
    not be shown."""
    try:
        path = (studio.folders[0] / Path(text).expanduser()).resolve() if len(text) <= MAX_NAME else Path()
        found = path.exists() and any(path.is_relative_to(folder) for folder in studio.folders)
    except (OSError, ValueError, RuntimeError):
        found = False
    if not found:
        raise NotFoundError(
            f"{printable(text[:200])!r} is not in a folder that this page may show",
            fix="start the page with the folder in which it is: trimtab studio RUNS --data FOLDER",
        )
    return path


def listed(studio: Shown) -> dict[str, Any]:
    found, cut = data_files(studio.folders)
    first = studio.folders[0]

    def name(path: Path) -> str:
        return str(path.relative_to(first)) if path.is_relative_to(first) else str(path)

    lines = [{"path": printable(name(p)), "bytes": size, "changed": changed} for p, size, changed in found]
    return {"folders": [printable(str(f)) for f in studio.folders], "files": lines, "cut": cut, "base": studio.base}
