"""What routes get with each request: the services (`S`) and the caller. Every route but the public ones depends on `caller` or
`admin_caller`; a test tries every route.

Authentication belongs to routes, not to paths, so no spelling of a path avoids it.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from trimtab.http.services import Services
from trimtab.serve.tenants import LOCAL, Tenant

bearer = HTTPBearer(auto_error=False, scheme_name="key", description="An API key: Authorization: Bearer <id>.<secret>.")
Given = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


async def services(request: Request) -> Services:
    """Those that the app was made with."""
    s: Services = request.app.state.services
    return s


S = Annotated[Services, Depends(services)]


def tenant_of(s: Services, key: str | None) -> Tenant:
    """The tenant whose key this is; AuthError (401) without a valid one. In local mode: LOCAL."""
    return LOCAL if s.tenants is None else s.tenants.authenticate(key)


async def caller(request: Request, given: Given, s: S) -> Tenant:
    """`tenant_of` this request. Reads memory, so it needs no thread."""
    tenant = tenant_of(s, given.credentials if given is not None else None)
    request.scope["trimtab.record"].tenant = tenant.name
    return tenant


async def admin_caller(tenant: Annotated[Tenant, Depends(caller)]) -> Tenant:
    """The tenant, if its key may administer; Forbidden (403) otherwise."""
    tenant.require_admin()
    return tenant


Caller = Annotated[Tenant, Depends(caller)]
Admin = Annotated[Tenant, Depends(admin_caller)]
