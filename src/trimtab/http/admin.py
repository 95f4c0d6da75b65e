"""Tenants, keys and usage over HTTP, for administrators. All routes of this router need an admin key.

Every change is written to the audit log before it is made. A new key's text is in the answer that made it and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from trimtab.http.auth import Admin, S, admin_caller
from trimtab.http.errors import documented
from trimtab.http.fields import Strict
from trimtab.http.limits import read_body
from trimtab.http.schema import takes
from trimtab.http.services import Services
from trimtab.serve.keys import Key
from trimtab.serve.tenants import DEFAULT_CONCURRENT, DEFAULT_GRACE_SECONDS, Tenant, Tenants

router = APIRouter(prefix="/admin", dependencies=[Depends(admin_caller)])
READ, CHANGE = documented(400, 401, 403, 404, 500, 503), documented(400, 401, 403, 404, 408, 413, 415, 500, 503)
T = TypeVar("T")
Count = Annotated[int, Field(ge=1, le=2**53)] | None
Name = Annotated[str, Field(min_length=1, max_length=63)]


class TenantBody(Strict):
    """POST /admin/tenants. namespaces: by default the one of the tenant's name. null for a limit: none."""

    name: Name
    namespaces: list[Name] = Field(default_factory=list, max_length=256)
    max_concurrent: Count = DEFAULT_CONCURRENT
    tokens_per_minute: Count = None
    weight: float = Field(1.0, ge=0.001, le=1000)
    admin: bool = False


class TenantChange(Strict):
    """PATCH /admin/tenants/{name}: what is not given stays."""

    namespaces: list[Name] | None = Field(None, min_length=1, max_length=256)
    max_concurrent: Count = None
    tokens_per_minute: Count = None
    weight: float | None = Field(None, ge=0.001, le=1000)
    admin: bool | None = None


class KeyBody(Strict):
    """POST /admin/tenants/{name}/keys. lifetime: seconds; null: no end."""

    lifetime: float | None = Field(None, gt=0, le=1e10)


class RotateBody(Strict):
    """POST /admin/keys/{key_id}/rotate. grace: seconds for which the old key is still valid."""

    grace: float = Field(DEFAULT_GRACE_SECONDS, ge=0, le=1e10)


BODIES = (TenantBody, TenantChange, KeyBody, RotateBody)


class TenantReply(BaseModel):
    id: str
    name: str
    namespaces: list[str]
    max_concurrent: int | None
    tokens_per_minute: int | None
    weight: float
    admin: bool


class KeyReply(BaseModel):
    """created, expires, revoked: seconds since 1970. key: the key itself, told once, when it is made."""

    id: str
    created: float
    expires: float | None
    revoked: float | None
    key: str | None = None


class UsageRowReply(BaseModel):
    """day: YYYY-MM-DD in UTC. adapter: a digest, "" for the base."""

    tenant: str
    day: str
    adapter: str
    requests: int
    prompt_tokens: int
    completion_tokens: int


@router.get("/tenants", responses=READ)
async def tenants(s: S) -> list[TenantReply]:
    return [_told(t) for t in await run_in_threadpool(_of(s).list)]


@router.post("/tenants", status_code=201, responses=CHANGE, openapi_extra=takes(TenantBody))
async def add_tenant(request: Request, admin: Admin, s: S) -> TenantReply:
    b = await read_body(request, TenantBody, s)
    settings = b.model_dump(exclude={"name"})
    return _told(await audited(s, admin, "tenant.add", b.name, settings, lambda: _of(s).add(b.name, **settings)))


@router.get("/tenants/{name}", responses=READ)
async def tenant(name: str, s: S) -> TenantReply:
    return _told(await run_in_threadpool(_of(s).get, name))


@router.patch("/tenants/{name}", responses=CHANGE, openapi_extra=takes(TenantChange))
async def change_tenant(name: str, request: Request, admin: Admin, s: S) -> TenantReply:
    b = await read_body(request, TenantChange, s)
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in b.model_dump(exclude_unset=True).items()}
    given = {k: v for k, v in given.items() if v is not None or k in ("max_concurrent", "tokens_per_minute")}
    changed = await audited(s, admin, "tenant.update", name, given, lambda: _of(s).update(replace(_of(s).get(name), **given)))
    return _told(changed)


@router.delete("/tenants/{name}", responses=READ)
async def remove_tenant(name: str, admin: Admin, s: S) -> TenantReply:
    """None of its keys is valid from the next request on."""
    return _told(await audited(s, admin, "tenant.remove", name, {}, lambda: _of(s).remove(name)))


@router.get("/tenants/{name}/keys", responses=READ)
async def keys(name: str, s: S) -> list[KeyReply]:
    return [_key(k) for k in await run_in_threadpool(_of(s).keys, name)]


@router.post("/tenants/{name}/keys", status_code=201, responses=CHANGE, openapi_extra=takes(KeyBody))
async def create_key(name: str, request: Request, admin: Admin, s: S) -> KeyReply:
    b = await read_body(request, KeyBody, s)
    made = await audited(s, admin, "key.create", name, b.model_dump(), lambda: _of(s).create_key(name, lifetime=b.lifetime))
    return _key(*made)


@router.post("/keys/{key_id}/rotate", status_code=201, responses=CHANGE, openapi_extra=takes(RotateBody))
async def rotate_key(key_id: str, request: Request, admin: Admin, s: S) -> KeyReply:
    b = await read_body(request, RotateBody, s)
    made = await audited(s, admin, "key.rotate", _id(key_id), b.model_dump(), lambda: _of(s).rotate_key(key_id, grace=b.grace))
    return _key(*made)


@router.delete("/keys/{key_id}", responses=READ)
async def revoke_key(key_id: str, admin: Admin, s: S) -> KeyReply:
    return _key(await audited(s, admin, "key.revoke", _id(key_id), {}, lambda: _of(s).revoke_key(key_id)))


Day = Annotated[str, Query(pattern=r"^(\d{4}-\d{2}-\d{2})?$")]


@router.get("/usage", responses=READ)
async def usage(s: S, tenant: Annotated[str, Query(max_length=63)] = "", since: Day = "", until: Day = "") -> list[UsageRowReply]:
    """Tokens by tenant, day and adapter, what is still in memory included; since and until: days, both included."""
    rows = await run_in_threadpool(_of(s).usage.report, tenant, since, until)
    return [UsageRowReply(**vars(r)) for r in rows]


async def audited(s: Services, admin: Tenant, what: str, target: str, details: dict[str, Any], do: Callable[[], T]) -> T:
    """Do it in a thread, between its two lines in the audit log."""

    def act() -> T:
        line = nullcontext() if s.audit is None else s.audit.act(what, f"tenant:{admin.name}", target, details)
        with line:
            return do()

    return await run_in_threadpool(act)


def _of(s: Services) -> Tenants:
    assert s.tenants is not None, "admin routes are there only where tenants are"
    return s.tenants


def _id(key_id: str) -> str:
    """The part that may be shown, where somebody gave a whole key."""
    return key_id.partition(".")[0]


def _told(t: Tenant) -> TenantReply:
    return TenantReply(**(vars(t) | {"namespaces": list(t.namespaces)}))


def _key(key: Key, text: str | None = None) -> KeyReply:
    return KeyReply(id=key.id, created=key.created, expires=key.expires, revoked=key.revoked, key=text)
