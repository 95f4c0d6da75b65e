"""The app: routes, limits, errors and the log put together. Order from outside in: CORS where it is asked for, log, gate, routes: what
is added last is outermost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware

from trimtab.http import adapters, admin, embeddings, health, openai, page, people, responses, scores, shelf, shelf_changes, tokens
from trimtab.http import runs as run_folders
from trimtab.http.embeddings import EmbeddingsBody
from trimtab.http.errors import install
from trimtab.http.limits import Gate
from trimtab.http.logs import Record, RequestLog
from trimtab.http.responses_schema import ResponsesBody
from trimtab.http.schema import ChatBody, CompletionBody, DetokenizeBody, LoadBody, TokenizeBody, UnloadBody
from trimtab.http.services import Services
from trimtab.http.studio_auth import Shown
from trimtab.train.follow import RunFolders
from trimtab.version import __version__

BODIES = (
    ChatBody,
    CompletionBody,
    ResponsesBody,
    EmbeddingsBody,
    *scores.BODIES,
    TokenizeBody,
    DetokenizeBody,
    LoadBody,
    UnloadBody,
    *admin.BODIES,
)
REFUSED = {401: "auth", 403: "forbidden", 404: "not_found", 413: "too_large", 429: "limit", 503: "full"}
"""A refusal's reason in metrics and audit log, by its status; all other 4xx are "invalid"."""


def create_app(services: Services, origins: Sequence[str] = (), runs: RunFolders | None = None) -> FastAPI:
    """The server's ASGI app. Admin routes are there where there are tenants; local mode has none. origins: of web pages that may call it,
    or "*". runs: run folders that its page shows, in local mode alone, where every client may see everything."""
    app = FastAPI(title="trimtab", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    always = (
        page.router,
        shelf.router,
        shelf_changes.server_router,
        people.router,
        health.public,
        health.router,
        openai.router,
        responses.router,
        embeddings.router,
        scores.router,
        tokens.router,
        adapters.router,
    )
    for router in (*always, *([admin.router] if services.tenants is not None else [])):
        app.include_router(router)
    if runs is not None:
        assert services.tenants is None, "run folders are nobody's in particular"
        app.state.studio = Shown(runs)
        app.include_router(run_folders.router)
    install(app)
    app.add_middleware(Gate, services=services)
    app.add_middleware(RequestLog, on_end=lambda record: _tell(record, services))
    if origins:
        told = ["x-request-id", "retry-after", "x-trimtab-adapter", "x-trimtab-base", "x-trimtab-ignored"]
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=told)
    app.openapi = lambda: _openapi(app, services.tenants is None)  # type: ignore[method-assign]
    return app


def _tell(record: Record, s: Services) -> None:
    """Refusals, for the metrics and the audit log. Those for lack of room are in the metrics already: admission counts them."""
    if record.status is None or not 400 <= record.status < 504 or record.status in (499, 500):
        return
    reason = "draining" if record.error == "shutting_down" else REFUSED.get(record.status, "invalid")
    if reason not in ("limit", "full"):
        s.metrics.rejected(reason)
    if s.audit is not None and reason in ("auth", "forbidden", "limit", "full"):
        s.audit.refused(reason, tenant=record.tenant or "", route=record.path, request_id=record.id, client=record.client)


def _openapi(app: FastAPI, local: bool) -> dict[str, Any]:
    """The document, with the bodies that routes read by themselves; made once. local: there are no keys, so none is asked for."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, schemas = models_json_schema([(m, "validation") for m in BODIES], ref_template="#/components/schemas/{model}")
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas.get("$defs", {}))
        for operation in (o for path in document["paths"].values() for o in path.values()):
            operation["responses"].pop("422", None)  # FastAPI's; here a wrong parameter is a 400
            if local:
                operation.pop("security", None)
        if local:
            document["components"].pop("securitySchemes", None)
        app.openapi_schema = document
    return app.openapi_schema
