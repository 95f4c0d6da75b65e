"""/docs: a page for people who want to call the server. It says how to call it, and lists the routes as /openapi.json has
them. It loads nothing from elsewhere, and needs no key, as it tells nothing of models or tenants."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from trimtab.version import __version__

router = APIRouter()
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>trimtab {version}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color-scheme: light dark }}
td, th {{ text-align: left; padding: .3em 1em .3em 0; vertical-align: top }} code, pre {{ font: 14px/1.4 ui-monospace, monospace }}
pre {{ overflow-x: auto }}</style>
<h1>trimtab {version}</h1>
<p>This server answers as OpenAI's API does. Give clients its address with <code>/v1</code> behind it.{key}</p>
<pre>curl {url}v1/models{header}
curl {url}v1/chat/completions{header} \\
    -H 'content-type: application/json' \\
    -d '{{"model": "MODEL", "messages": [{{"role": "user", "content": "Hello"}}]}}'</pre>
<table><tr><th>route<th></tr>
{rows}
</table>
<p>All fields are described in <a href="openapi.json">openapi.json</a>.</p>
</html>
"""


@router.get("/docs", include_in_schema=False)
async def page(request: Request) -> HTMLResponse:
    """How to call this server."""
    document, keyed = request.app.openapi(), request.app.state.services.tenants is not None
    rows = "\n".join(
        f"<tr><td><code>{method.upper()} {escape(path)}</code><td>{escape(_said(operation))}</tr>"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    told = {"key": " Requests need a key.", "header": " -H 'Authorization: Bearer KEY'"} if keyed else {"key": "", "header": ""}
    return HTMLResponse(PAGE.format(version=escape(__version__), url=escape(str(request.base_url)), rows=rows, **told))


def _said(operation: dict[str, Any]) -> str:
    return " ".join(operation.get("description", "").split())
