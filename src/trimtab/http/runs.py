"""What the page reads of run folders (`train/follow.py`), for `trimtab studio`. A run is named by an id from the list."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from starlette.concurrency import run_in_threadpool

from trimtab.http.studio_auth import Studio, allowed

router = APIRouter(prefix="/studio", include_in_schema=False, dependencies=[Depends(allowed)])
Id = Annotated[str, Query(max_length=64)]
Name = Annotated[str, Query(max_length=4096)]
From = Annotated[int, Query(ge=0, le=2**60)]


@router.get("/runs")
async def runs(studio: Studio) -> dict[str, Any]:
    """All runs, newest first."""
    return {"root": str(studio.runs.root), "runs": await run_in_threadpool(studio.runs.list)}


@router.get("/run")
async def run(studio: Studio, id: Id) -> dict[str, Any]:
    """One run: settings, variants, scores."""
    return await run_in_threadpool(studio.runs.show, id)


@router.get("/metrics")
async def metrics(studio: Studio, id: Id, start: From = 0, mark: Id = "") -> dict[str, Any]:
    """The lines of its metrics from a byte on, as columns."""
    return await run_in_threadpool(studio.runs.metrics, id, start, mark)


@router.get("/answers")
async def answers(
    studio: Studio, id: Id, data: Name, who: Name = "", start: From = 0, count: Annotated[int, Query(ge=1, le=200)] = 20
) -> dict[str, Any]:
    """Its answers to held-out rows, wrong ones first."""
    return await run_in_threadpool(studio.runs.answers, id, data, who, start, count)
