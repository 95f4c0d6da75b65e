"""What the page reads of run folders (`train/follow.py`), for `trimtab studio`. A run is named by an id from the list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from trimtab.errors import printable
from trimtab.http.studio_auth import Studio, allowed

router = APIRouter(prefix="/studio", include_in_schema=False, dependencies=[Depends(allowed)])
Id = Annotated[str, Query(max_length=64)]
Name = Annotated[str, Query(max_length=4096)]
From = Annotated[int, Query(ge=0, le=2**60)]


async def sent(read: Callable[..., Any], *given: Any) -> JSONResponse:
    """What a reading gives. It is written as JSON on the reading's thread too: a long one would hold up all other answers."""
    return await run_in_threadpool(lambda: JSONResponse(read(*given)))


@router.get("/runs")
async def runs(studio: Studio) -> JSONResponse:
    """All runs, newest first."""
    return await sent(lambda: {"root": printable(str(studio.runs.root)), "runs": studio.runs.list(), "cut": studio.runs.cut})


@router.get("/run")
async def run(studio: Studio, id: Id) -> JSONResponse:
    """One run: settings, variants, scores."""
    return await sent(studio.runs.show, id)


@router.get("/doubts")
async def doubts(studio: Studio, ids: Name) -> JSONResponse:
    """What to know before several runs are compared. ids: theirs, with + between."""
    return await sent(lambda: {"doubts": studio.runs.doubts(ids.split("+"))})


@router.get("/metrics")
async def metrics(studio: Studio, id: Id, start: From = 0, mark: Id = "") -> JSONResponse:
    """The lines of its metrics from a byte on, as columns."""
    return await sent(studio.runs.metrics, id, start, mark)


@router.get("/answers")
async def answers(
    studio: Studio, id: Id, data: Name, who: Name = "", start: From = 0, count: Annotated[int, Query(ge=1, le=200)] = 20
) -> JSONResponse:
    """Its answers to held-out rows, wrong ones first."""
    return await sent(studio.runs.answers, id, data, who, start, count)


@router.get("/confusion")
async def confusion(studio: Studio, id: Id, data: Name) -> JSONResponse:
    """Which labels its answers take for which; null where they are no labels."""
    return await sent(lambda: {"confusion": studio.runs.confusion(id, data)})
