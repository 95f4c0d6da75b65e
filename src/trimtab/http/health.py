"""/livez, /readyz, /metrics for monitoring; /health, /ping and /version, as clients of vLLM and of SageMaker ask for them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from trimtab.http.auth import admin_caller
from trimtab.http.errors import documented
from trimtab.http.services import Services
from trimtab.serve.metrics import CONTENT_TYPE
from trimtab.version import __version__

public = APIRouter()
router = APIRouter(dependencies=[Depends(admin_caller)])
STATUS: dict[str, Any] = {
    "application/json": {"schema": {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}}
}
NOT: dict[int | str, dict[str, Any]] = {200: {"content": STATUS}, 503: {"description": "It is not.", "content": STATUS}}


@public.get("/livez", responses=NOT)
async def livez(request: Request) -> Response:
    """Whether the process works. If not, restart it."""
    s: Services = request.app.state.services
    return _status("ok" if s.alive() or s.life.draining else "the engine has stopped", s.alive() or s.life.draining)


@public.get("/readyz", responses=NOT)
async def readyz(request: Request) -> Response:
    """Whether the server takes requests now."""
    s: Services = request.app.state.services
    if s.life.draining:
        return _status("draining", False)
    return _status("ready" if s.alive() else "the engine has stopped", s.alive())


@public.get("/health", responses=NOT)
@public.get("/ping", responses=NOT)
async def health(request: Request) -> Response:
    """As /readyz."""
    return await readyz(request)


@public.get("/version")
async def version() -> dict[str, str]:
    """trimtab's."""
    return {"version": __version__}


@router.get(
    "/metrics", response_class=Response, responses=documented(401, 403) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(request: Request) -> Response:
    """What Prometheus reads. It tells of all tenants, so it needs an admin key (none in local mode)."""
    s: Services = request.app.state.services
    return Response(await run_in_threadpool(s.metrics.text), headers={"content-type": CONTENT_TYPE})


def _status(text: str, good: bool) -> JSONResponse:
    return JSONResponse({"status": text}, 200 if good else 503, {} if good else {"Retry-After": "5"})
