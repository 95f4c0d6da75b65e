"""What the page of `trimtab studio` asks of runs: stop, pause, resume, clone (`train/ordering.py`), begin (`train/beginning.py`).

Only the page itself may send these (`own_page.py`), and only with the key that `trimtab studio` has printed: reading tells others on this
machine little, but whoever may begin a run may run code as this user.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool

from trimtab.http.fields import Strict
from trimtab.http.own_page import body_of, from_this_page
from trimtab.http.runs import Id, sent
from trimtab.http.studio_auth import Studio, allowed, may_change
from trimtab.train import ordering
from trimtab.train.clone import changes_of

router = APIRouter(prefix="/studio", include_in_schema=False)
reads = APIRouter(dependencies=[Depends(allowed)])
changes = APIRouter(dependencies=[Depends(from_this_page), Depends(may_change)])
VariantName = Annotated[str, Field(max_length=200)]


class OrderBody(Strict):
    """POST /studio/order: `end` is for the whole run, the others for the variants that are named."""

    id: str = Field(max_length=64)
    do: Literal["stop", "pause", "resume", "end"]
    variants: list[VariantName] = Field([], max_length=1000)


class CloneBody(Strict):
    """POST /studio/clone. changes: each KEY=VALUE, as `--set` has them."""

    id: str = Field(max_length=64)
    of: VariantName
    name: VariantName
    changes: list[Annotated[str, Field(max_length=10_000)]] = Field([], max_length=100)


class BeginBody(Strict):
    """POST /studio/begin. file: a run file, as /studio/run-files lists it."""

    file: str = Field(max_length=4096)
    resume: bool = False


@changes.post("/order")
async def order(studio: Studio, request: Request) -> dict[str, Any]:
    """Written, not yet obeyed; `/studio/run` tells when it is."""
    body = await body_of(request, OrderBody)

    def give() -> bool:
        folder = studio.runs.folder(body.id)
        if body.do == "end":
            return ordering.end(folder).runs
        return ordering.order(folder, body.variants, None if body.do == "resume" else body.do).runs

    return {"runs": await run_in_threadpool(give)}


@changes.post("/clone")
async def clone(studio: Studio, request: Request) -> dict[str, Any]:
    """Checked and written; `/studio/run` has the clone once it has joined, or why it does not."""
    body = await body_of(request, CloneBody)
    asked = await run_in_threadpool(lambda: ordering.clone(studio.runs.folder(body.id), body.of, body.name, changes_of(body.changes)))
    return {"runs": asked.runs}


@changes.post("/begin")
async def begin(studio: Studio, request: Request) -> dict[str, Any]:
    """A process that trains, which goes on when this one ends."""
    body = await body_of(request, BeginBody)
    return await run_in_threadpool(studio.beginner.begin, body.file, body.resume)


@reads.get("/run-files")
async def run_files(studio: Studio) -> JSONResponse:
    """Run files below the folder that is shown."""
    return await sent(lambda: {"files": studio.beginner.files()})


@reads.get("/log")
async def log(
    studio: Studio,
    out: Annotated[str, Query(max_length=4096)] = "",
    id: Id = "",
    start: Annotated[int, Query(ge=0, le=2**60)] = 0,
) -> JSONResponse:
    """The end of what a run has printed that was begun here: by its folder, or by its id once it is listed."""
    return await sent(lambda: studio.runs.log(id) if id else studio.beginner.log(out, start))


for part in (reads, changes):
    router.include_router(part)
