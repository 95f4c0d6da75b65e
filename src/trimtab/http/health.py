"""/livez, /readyz, /metrics for monitoring; /health, /ping and /version, as clients of vLLM and of SageMaker ask for them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from trimtab.http.auth import S, admin_caller
from trimtab.http.errors import documented
from trimtab.serve.metrics import CONTENT_TYPE
from trimtab.version import __version__

public = APIRouter()
router = APIRouter(dependencies=[Depends(admin_caller)])
STATUS: dict[str, Any] = {
    "application/json": {"schema": {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}}
}
STOPPED = "the engine has stopped"
PROBES = frozenset({"/livez", "/readyz", "/health", "/ping", "/metrics"})
"""Routes that machines ask every few seconds: answered while the server shuts down, logged only where the answer is an error."""
NOT: dict[int | str, dict[str, Any]] = {200: {"content": STATUS}, 503: {"description": "It is not.", "content": STATUS}}


@public.get("/livez", responses=NOT)
async def livez(s: S) -> Response:
    """Whether the process works. If not, restart it."""
    return _status("ok", s.alive() or s.life.draining)


@public.get("/readyz", responses=NOT)
@public.get("/health", responses=NOT)
@public.get("/ping", responses=NOT)
@public.post("/ping", responses=NOT)
async def readyz(s: S) -> Response:
    """Whether the server takes requests now."""
    return _status("ready", s.alive() and not s.life.draining, "draining" if s.life.draining else STOPPED)


@public.get("/version")
async def version() -> dict[str, str]:
    """trimtab's."""
    return {"version": __version__}


@router.get(
    "/metrics", response_class=Response, responses=documented(401, 403) | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(s: S) -> Response:
    """What Prometheus reads. It tells of all tenants, so it needs an admin key (none in local mode)."""
    return Response(await run_in_threadpool(s.metrics.text), headers={"content-type": CONTENT_TYPE})


def _status(yes: str, good: bool, no: str = STOPPED) -> JSONResponse:
    return JSONResponse({"status": yes}) if good else JSONResponse({"status": no}, 503, {"Retry-After": "5"})
