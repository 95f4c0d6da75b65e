"""The page at /: its built files, with headers that let a browser run nothing else, and what it may show here.

The files are in trimtab/web/page; `make page` builds them from web/. They need no key, as they tell nothing of models, runs or tenants.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from trimtab.http.errors import Fault

router = APIRouter(include_in_schema=False)
KINDS = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""No inline script or style, nothing from elsewhere, and no text becomes markup: browsers refuse innerHTML altogether."""
HEADERS = {
    "content-security-policy": POLICY,
    "cache-control": "no-cache",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    return answer(request, "index.html")


@router.get("/page/{name}")
async def file(name: str, request: Request) -> Response:
    """One of its files."""
    return answer(request, name)


def answer(request: Request, name: str) -> Response:
    """A built file; 304 where the browser has it already."""
    if (found := _built().get(name)) is None:
        raise Fault(f"the page has no file {name[:100]!r}", status=404, code="unknown_route")
    content, tag = found
    headers = HEADERS | {"etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers | {"content-type": KINDS[name.rpartition(".")[2]]})


@cache
def _built() -> dict[str, tuple[bytes, str]]:
    """name -> content and tag of every file, read once."""
    folder = files("trimtab").joinpath("web", "page")
    names = {p.name: p for f in (folder, folder.joinpath("page")) for p in f.iterdir() if p.name.rpartition(".")[2] in KINDS}
    found = {name: p.read_bytes() for name, p in names.items()}
    return {name: (content, f'"{sha256(content).hexdigest()[:32]}"') for name, content in found.items()}
