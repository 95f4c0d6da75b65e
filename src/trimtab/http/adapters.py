"""vLLM's routes that give adapters a name while the server runs. A name that a tenant loads is seen by that tenant alone."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import PlainTextResponse, Response

from trimtab.http.auth import Caller, S, caller
from trimtab.http.errors import Fault, documented
from trimtab.http.limits import read_body
from trimtab.http.schema import LoadBody, UnloadBody, takes

router = APIRouter(prefix="/v1", dependencies=[Depends(caller)])
TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
ERRORS = documented(400, 401, 403, 404, 408, 413, 415, 500, 503)


@router.post("/load_lora_adapter", response_class=Response, responses=ERRORS | TEXT, openapi_extra=takes(LoadBody))
async def load_lora_adapter(request: Request, tenant: Caller, s: S) -> Response:
    """Read and check an adapter of any method, a folder on the server or one of its store, and give it a name, which the next request may
    use."""
    body = await read_body(request, LoadBody, s)
    if body.base_model_name not in (None, *s.catalog.base_names):
        text = f"base_model_name: the base of this server is {s.base_name}"
        raise Fault(text, param="base_model_name", code="invalid_value")
    inplace = bool(body.load_inplace)
    await s.load_work.run(tenant.name, lambda: s.catalog.load(body.lora_name, body.lora_path, tenant, inplace=inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", response_class=Response, responses=ERRORS | TEXT, openapi_extra=takes(UnloadBody))
async def unload_lora_adapter(request: Request, tenant: Caller, s: S) -> Response:
    """Remove the name. Running requests go on to their end; then the adapter's memory is freed."""
    body = await read_body(request, UnloadBody, s)
    await s.load_work.run(tenant.name, lambda: s.catalog.unload(body.lora_name, tenant))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
