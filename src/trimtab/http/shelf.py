"""What the page reads of the store: names, versions, what differs. Under /studio in both apps: of `trimtab serve`, where a tenant sees its
own namespaces alone, and of `trimtab studio`, where whoever may read sees all."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool

from trimtab.errors import AdapterError, NotFoundError
from trimtab.http.auth import Caller, S, caller
from trimtab.http.studio_auth import Studio, allowed
from trimtab.serve.tenant import EVERYTHING, LOCAL, Tenant
from trimtab.store.name import Name
from trimtab.store.names import NoSuchAdapter, Ref
from trimtab.store.registry import Store
from trimtab.store.told import files_of, note_of, told_of
from trimtab.store.version import Version
from trimtab.train.past import meanings
from trimtab.version import __version__

log = logging.getLogger(__name__)
router = APIRouter(prefix="/studio", include_in_schema=False)
own = APIRouter(dependencies=[Depends(caller)])
studio_router = APIRouter(prefix="/studio", include_in_schema=False, dependencies=[Depends(allowed)])
T = TypeVar("T")
MAX_LISTED = 200
Given = Annotated[str, Query(min_length=1, max_length=300)]
After = Annotated[str, Query(max_length=300)]


@router.get("/about")
async def about(request: Request, s: S) -> dict[str, Any]:
    """Which of its screens the page can fill here; needs no key, as it tells nothing of models or tenants."""
    runs = hasattr(request.app.state, "studio")
    there = {"runs": runs, "changes": False, "rows": False, "store": s.catalog.store is not None, "serves": True}
    return {"version": __version__, "keyed": s.tenants is not None, **there}


@own.get("/adapters")
async def adapters(tenant: Caller, s: S, after: After = "") -> dict[str, Any]:
    """The newest version of each name that the caller may see."""
    return await s.store_work.run(tenant.name, lambda: listed(s.catalog.store, tenant, after))


@own.get("/adapter")
async def adapter(tenant: Caller, s: S, name: Given) -> dict[str, Any]:
    """All versions of a name."""
    return await s.store_work.run(tenant.name, lambda: versions(s.catalog.store, tenant, name))


@own.get("/version")
async def version(tenant: Caller, s: S, ref: Given) -> dict[str, Any]:
    """One version with its files, trimtab.json, and what the names of its scores mean."""
    return await s.store_work.run(tenant.name, lambda: shown(s.catalog.store, tenant, ref))


@own.get("/diff")
async def diff(tenant: Caller, s: S, a: Given, b: Given) -> dict[str, Any]:
    """What differs between two versions: settings and files, and for an administrator the tensors, for which both are read."""
    return await s.store_work.run(tenant.name, lambda: compared(s.catalog.store, tenant, a, b, weights=tenant.admin))


router.include_router(own)


@studio_router.get("/adapters")
async def all_adapters(studio: Studio, after: After = "") -> dict[str, Any]:
    if studio.shelf is None and studio.new_store is not None:
        return {"adapters": [], "more": False, "after": ""}
    return await run_in_threadpool(listed, studio.shelf, LOCAL, after)


@studio_router.get("/adapter")
async def any_adapter(studio: Studio, name: Given) -> dict[str, Any]:
    return await run_in_threadpool(versions, studio.shelf, LOCAL, name)


@studio_router.get("/version")
async def any_version(studio: Studio, ref: Given) -> dict[str, Any]:
    return await run_in_threadpool(shown, studio.shelf, LOCAL, ref)


@studio_router.get("/diff")
async def any_diff(studio: Studio, a: Given, b: Given) -> dict[str, Any]:
    return await run_in_threadpool(lambda: compared(studio.shelf, LOCAL, a, b, weights=True))


def listed(store: Store | None, tenant: Tenant, after: str) -> dict[str, Any]:
    """At most MAX_LISTED names behind the path `after`, and whether there are more."""
    store = _there(store)
    spaces: list[str | None] = [None] if EVERYTHING in tenant.namespaces else [*sorted(tenant.namespaces, key=lambda n: f"{n}/")]
    names = (name for space in spaces for name in store.names(space, after) if name.path > after)
    found = list(islice(names, MAX_LISTED + 1))
    adapters = [told_of(v) for n in found[:MAX_LISTED] if (v := _readable(store, n))]
    return {"adapters": adapters, "more": len(found) > MAX_LISTED, "after": found[:MAX_LISTED][-1].path if found else ""}


def _readable(store: Store, name: Name) -> Version | None:
    """Its newest version; None, and a line in the log, where that is damaged: the others are shown all the same."""
    try:
        return store.version(name, name.newest)
    except AdapterError as error:
        log.error("an adapter of the store cannot be read", extra={"told": {"adapter": name.path, "error": error.message}})
        return None


def versions(store: Store | None, tenant: Tenant, name: str) -> dict[str, Any]:
    return {"versions": [told_of(v) for v in _seen(store, tenant, name, lambda s, ref: s.versions(ref.path))]}


def shown(store: Store | None, tenant: Tenant, ref: str) -> dict[str, Any]:
    def read(store: Store, ref: Ref) -> dict[str, Any]:
        found = store.resolve(ref)
        note = note_of(store, found)
        run = (note or {}).get("run")
        scores = run.get("metrics") if isinstance(run, dict) else None
        meant = meanings(scores if isinstance(scores, dict) else ())
        return told_of(found) | {"files": files_of(found), "note": note, "scores": meant}

    return _seen(store, tenant, ref, read)


def compared(store: Store | None, tenant: Tenant, a: str, b: str, *, weights: bool) -> dict[str, Any]:
    _seen(store, tenant, a, lambda s, ref: s.resolve(ref))
    found = asdict(_seen(store, tenant, b, lambda s, ref: s.diff(a, ref, weights=weights)))
    return found | {"tensors": {n: d if math.isfinite(d) else None for n, d in found["tensors"].items()}}


def _seen(store: Store | None, tenant: Tenant, ref: str, read: Callable[[Store, Ref], T]) -> T:
    """What `read` gives of a reference; NotFoundError, the same one, where there is none and where it is another tenant's."""
    store = _there(store)
    try:
        parsed = Ref.parse(ref)
        if not tenant.sees(parsed.namespace):
            raise NotFoundError("")
        return read(store, parsed)
    except (NotFoundError, NoSuchAdapter):
        raise NotFoundError(f"there is no adapter {ref[:100]!r} that you may see", fix="go back to the list of adapters") from None


def _there(store: Store | None) -> Store:
    if store is None:
        raise NotFoundError("there is no store of adapters here", fix="name its folder: --store")
    return store
