"""What the page changes in the store: publish a run's adapter, move and take away aliases, export, push, and an adapter's folder to take
along. In `trimtab studio` for whoever has its key; of these, aliases on a server too, for administrators.

Whatever reads weights is a command of its own (`commands.py`), the one that the page shows.
"""

from __future__ import annotations

import tempfile
import zipfile
from contextlib import ExitStack
from typing import IO, Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from trimtab.errors import AdapterError, ConfigError, NotFoundError, OverloadedError
from trimtab.http.admin import audited
from trimtab.http.auth import Admin, S
from trimtab.http.errors import Fault
from trimtab.http.fields import Strict
from trimtab.http.limits import read_body
from trimtab.http.own_page import body_of, from_this_page
from trimtab.http.runs import Id
from trimtab.http.send import PIECE, SentFile
from trimtab.http.studio_auth import Studio, allowed, may_change
from trimtab.store.files import Refusal, read_exactly
from trimtab.store.names import RULE, Ref, check_aliases, is_word, parse_name
from trimtab.store.registry import Store
from trimtab.store.told import told_of

router = APIRouter(prefix="/studio", include_in_schema=False)
reads = APIRouter(dependencies=[Depends(allowed)])
changes = APIRouter(dependencies=[Depends(from_this_page), Depends(may_change)])
server_router = APIRouter(prefix="/studio", include_in_schema=False, dependencies=[Depends(from_this_page)])
Name = Annotated[str, Field(min_length=1, max_length=300)]
MAX_ZIP = 1 << 30
"""Bytes of an adapter that is sent as a file."""
WRITE_S = 60.0
"""For how long a browser may read nothing of it."""
ADAPTERS = "adapters"
MAX_LISTED = 1000


class PublishBody(Strict):
    """POST /studio/publish. run: by its id. variant: of it. name: namespace/name."""

    run: str = Field(max_length=64)
    variant: str = Field(min_length=1, max_length=255)
    name: Name
    aliases: list[Name] = Field([], max_length=20)


class AliasBody(Strict):
    """POST /studio/alias: let it stand for a version; take: take it away instead."""

    ref: Name
    alias: Name
    take: bool = False


class ExportBody(Strict):
    """POST /studio/export. folder: its name, beside the runs. base: on which it is loaded."""

    ref: Name
    format: Literal["peft", "vllm", "merged", "gguf"]
    folder: str
    base: str = Field("", max_length=4096)


class PushBody(Strict):
    """POST /studio/push."""

    ref: Name
    url: str = Field(min_length=1, max_length=2000)


class TakeBody(Strict):
    """POST /studio/adapter.zip."""

    ref: Name


@reads.get("/run-adapters")
async def run_adapters(studio: Studio, id: Id) -> dict[str, Any]:
    """The variants of a run that have an adapter."""

    def names() -> list[str]:
        folder = studio.runs.folder(id) / ADAPTERS
        try:
            return sorted(p.name for p in folder.iterdir() if (p / "adapter_config.json").is_file())[:MAX_LISTED]
        except OSError:
            return []

    return {"adapters": await run_in_threadpool(names)}


@reads.get("/command")
async def command(studio: Studio, key: Annotated[str, Query(max_length=64)]) -> dict[str, Any]:
    """How far a command is."""
    return studio.commands.told(key)


@changes.post("/publish")
async def publish(studio: Studio, request: Request) -> dict[str, Any]:
    """Put a run's adapter into the store as the next version of a name."""
    body = await body_of(request, PublishBody)
    root = studio.new_store if studio.shelf is None and studio.new_store is not None else _store(studio.shelf).root
    parse_name(body.name)
    aliases = [word for alias in check_aliases(body.aliases) for word in ("--alias", alias)]
    names = (await run_adapters(studio, body.run))["adapters"]
    if body.variant not in names:
        raise NotFoundError(f"the run has no adapter {body.variant[:100]!r}", fix=f"one of: {', '.join(names) or 'none yet'}")
    folder = studio.runs.folder(body.run) / ADAPTERS / body.variant
    return studio.commands.begin(["adapters", "publish", *aliases, "--store", str(root), "--json"], [str(folder), body.name])


@changes.post("/alias")
async def alias(studio: Studio, request: Request) -> dict[str, Any]:
    """Let an alias stand for a version, or take it away."""
    body = await body_of(request, AliasBody)
    return await run_in_threadpool(_moved, _store(studio.shelf), body)


@changes.post("/export")
async def export(studio: Studio, request: Request) -> dict[str, Any]:
    """Write an adapter into a folder beside the runs as another program wants it."""
    body = await body_of(request, ExportBody)
    store = _store(studio.shelf)
    version = await run_in_threadpool(store.resolve, body.ref)
    if not is_word(body.folder):
        raise Fault(f"{body.folder[:80]!r} is no name for a folder: {RULE}", code="invalid_value", param="folder")
    target = studio.runs.root / body.folder
    if target.exists():
        raise ConfigError(f"{body.folder} exists", fix="name another folder")
    base = body.base or version.base or studio.base
    options = ["export", "--format", body.format, "--base", base, "--store", str(store.root), "--json"]
    return studio.commands.begin(options, [version.ref, str(target)])


@changes.post("/push")
async def push(studio: Studio, request: Request) -> dict[str, Any]:
    """Copy a version elsewhere."""
    body = await body_of(request, PushBody)
    store = _store(studio.shelf)
    version = await run_in_threadpool(store.resolve, body.ref)
    return studio.commands.begin(["adapters", "push", "--store", str(store.root), "--json"], [version.ref, body.url])


@changes.post("/adapter.zip")
async def take(studio: Studio, request: Request) -> Response:
    """An adapter's folder as one file, its bytes compared with their digests."""
    body = await body_of(request, TakeBody)
    store = _store(studio.shelf)
    if not studio.downloads.acquire(blocking=False):
        raise OverloadedError("other adapters are being sent", fix="wait until they have been", retry_after=5.0)
    try:
        file = await run_in_threadpool(_zipped, store, body.ref)
        headers = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
        return SentFile(file, studio.downloads.release, media_type="application/zip", write_s=WRITE_S, headers=headers)
    except BaseException:
        studio.downloads.release()
        raise


@server_router.post("/alias")
async def server_alias(request: Request, admin: Admin, s: S) -> dict[str, Any]:
    """The same on a server, for administrators."""
    body = await read_body(request, AliasBody, s)
    store = _store(s.catalog.store)
    return await audited(s, admin, "store.alias", body.ref, {"alias": body.alias, "take": body.take}, lambda: _moved(store, body))


def _store(store: Store | None) -> Store:
    if store is None:
        raise NotFoundError("there is no store of adapters here", fix="name its folder: --store")
    return store


def _moved(store: Store, body: AliasBody) -> dict[str, Any]:
    if body.take:
        store.unalias(Ref.parse(body.ref).path, body.alias)
    else:
        store.alias(body.ref, body.alias)
    return told_of(store.resolve(body.ref))


def _zipped(store: Store, ref: str) -> IO[bytes]:
    """A file without a name, which goes when it is closed. Not in memory: adapters may have as many bytes as that."""
    version = store.resolve(ref)
    if version.size > MAX_ZIP:
        fix = f"copy it with the command: trimtab export {version.ref} FOLDER"
        raise ConfigError(f"{version.ref} has {version.size:,} bytes; at most {MAX_ZIP:,} are sent as a file", fix=fix)
    try:
        with ExitStack() as opened:
            out = opened.enter_context(tempfile.TemporaryFile())
            with store.open(version) as folder, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as zipped:
                for name in version.files:
                    entry = zipfile.ZipInfo(name)
                    with folder.open(name) as (file, entry.file_size), zipped.open(entry, "w") as target:
                        _copy(file, entry.file_size, target, name)
            opened.pop_all()
            return out
    except Refusal as error:
        raise AdapterError(f"{version.ref} is refused: {error}", fix="`trimtab store verify` lists all that is wrong") from error
    except OSError as error:
        fix = f"make room for {version.size:,} bytes in {tempfile.gettempdir()}, or copy it: trimtab export {version.ref} FOLDER"
        raise ConfigError(f"{version.ref} cannot be packed: {error.strerror or error}", fix=fix) from error


def _copy(file: int, size: int, target: IO[bytes], name: str) -> None:
    for begin in range(0, size, PIECE):
        target.write(read_exactly(file, min(PIECE, size - begin), name))


for part in (reads, changes):
    router.include_router(part)
