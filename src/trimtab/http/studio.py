"""The app of `trimtab studio`: the page, run folders and what can be asked of runs, rows and the store. No base is loaded here."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab.http import control, new_run, page, rows, runs, shelf, shelf_changes
from trimtab.http.errors import Fault, install, reply
from trimtab.http.studio_auth import Shown, Studio
from trimtab.version import __version__

router = APIRouter(prefix="/studio", include_in_schema=False)


def create_studio(shown: Shown) -> FastAPI:
    """The ASGI app."""
    app = FastAPI(title="trimtab studio", version=__version__, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.studio = shown
    for part in (page.router, router, runs.router, control.router, rows.router, new_run.router, shelf.studio_router, shelf_changes.router):
        app.include_router(part)
    install(app)
    app.add_middleware(OwnName, hosts=shown.hosts)
    return app


@router.get("/about")
async def about(studio: Studio) -> dict[str, Any]:
    """Which of its screens the page can fill here; needs no token, as it tells nothing of runs."""
    changes = studio.key is not None
    stored = studio.shelf is not None or (changes and studio.new_store is not None)
    there = {"runs": True, "changes": changes, "rows": True, "store": stored, "serves": False}
    return {"version": __version__, "keyed": changes or studio.token is not None, **there}


class OwnName:
    """ASGI middleware: refuses a Host header that is not this machine's. A web page elsewhere, whose name was pointed to this machine,
    sends its own name."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.hosts is not None:
            named = [v.decode("latin-1").lower() for k, v in scope["headers"] if k == b"host"]
            if len(named) != 1 or named[0] not in self.hosts:
                fault = Fault("this page answers only to its own name (the Host header is another)", status=403, code="wrong_host")
                return await reply(fault)(scope, receive, send)
        await self.app(scope, receive, send)
        return None
