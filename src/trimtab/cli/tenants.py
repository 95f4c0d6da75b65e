"""`trimtab tenants`"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from trimtab.cli import show
from trimtab.cli.options import DatabasePlace, Group, json_option, store_option
from trimtab.cli.terminal import say
from trimtab.errors import ConfigError, TrimtabError

if TYPE_CHECKING:
    from trimtab.serve.audit import Audit
    from trimtab.serve.tenants import Key, Tenant, Tenants

DAY = 24 * 3600.0
ONCE = "This key is shown this once and kept nowhere."


@click.group(cls=Group)
def tenants() -> None:
    """Who may use a server: tenants, their API keys, what they have used.

    \b
    Example:
      trimtab tenants add acme --namespace acme --tokens-per-minute 100000
      trimtab tenants key-rotate 5f0c31a09b7e --grace-hours 1
      trimtab tenants usage --since 2026-11-01

    A running server sees every change at the next request. What is done here goes into the audit log beside the database.
    """


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """--db, --json."""
    command = json_option("Print JSON.")(command)
    where = "${XDG_DATA_HOME:-~/.local/share}/trimtab/tenants.db"
    told = f"The database: a file, or postgresql://USER@HOST/NAME; by default {where}."
    return click.option("--db", type=DatabasePlace(), help=told)(command)


def settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a tenant may do; 0 takes a limit away."""
    for option in (
        click.option("--admin/--no-admin", default=None, help="Whether its keys may use the admin routes."),
        click.option("--weight", type=float, help="Its share of the machine beside others' (1)."),
        click.option("--tokens-per-minute", type=click.IntRange(0), help="Prompt and completion tokens; 0: no limit (the default)."),
        click.option("--max-concurrent", type=click.IntRange(0), help="Answers at a time; 0: no limit. By default 32."),
        click.option("--namespace", "namespaces", multiple=True, help="Of the store, in the order in which short names are looked up."),
    ):
        command = option(command)
    return command


@tenants.command()
@click.argument("name")
@settings
@common
def add(name: str, db: Path | str | None, as_json: bool, **settings: Any) -> None:
    """Add the tenant NAME and print its first key. It sees the namespace of its own name unless told otherwise.

    \b
    Example:
      trimtab tenants add acme --tokens-per-minute 100000
      trimtab tenants add operations --admin
    """
    from trimtab.serve.tenants import Tenant, check

    wanted = _changed(Tenant(name, name, (name,)), **settings)
    check(wanted)  # before the log and the database hear of it
    with opened(db, create=True) as (store, act), act("tenant.add", name, _told(wanted)) as learnt:
        store.add(
            name,
            namespaces=wanted.namespaces,
            max_concurrent=wanted.max_concurrent,
            tokens_per_minute=wanted.tokens_per_minute,
            weight=wanted.weight,
            admin=wanted.admin,
        )
        key, text = store.create_key(name)
        learnt["key"] = key.id
        _print_key(key, text, as_json, _told(store.get(name)))


@tenants.command()
@click.argument("name")
@settings
@common
def update(name: str, db: Path | str | None, as_json: bool, **settings: Any) -> None:
    """Change what the tenant NAME may do; what is not named stays. Counts from its next request on.

    \b
    Example:
      trimtab tenants update acme --max-concurrent 8
    """
    with opened(db) as (store, act):
        wanted = _changed(store.get(name), **settings)
        with act("tenant.update", name, _told(wanted)):
            store.update(wanted)
        _print(_told(wanted), as_json, f"changed {name}: {_limits(wanted)}")


@tenants.command("list")
@common
def list_(db: Path | str | None, as_json: bool) -> None:
    """Every tenant, what it may do, and its keys' public ids.

    \b
    Example:
      trimtab tenants list
    """
    with opened(db) as (store, _):
        found = [(t, store.keys(t.name)) for t in store.list()]
    if as_json:
        click.echo(json.dumps([_told(t) | {"keys": [_told_key(k) for k in keys]} for t, keys in found], indent=1))
        return
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for column in ("tenant", "namespaces", "limits", "keys"):
        table.add_column(column, overflow="fold")
    for tenant, keys in found:
        shown = [f"{k.id} ({k.state(time.time())})" for k in keys]
        table.add_row(tenant.name, ", ".join(tenant.namespaces), _limits(tenant), "\n".join(shown) or "none")
    show.console().print(table)


@tenants.command()
@click.argument("name")
@common
def remove(name: str, db: Path | str | None, as_json: bool) -> None:
    """Remove the tenant NAME: none of its keys is valid any more. Its usage stays in the reports.

    \b
    Example:
      trimtab tenants remove acme
    """
    with opened(db) as (store, act), act("tenant.remove", name):
        _print(_told(store.remove(name)), as_json, f"removed {name}")


@tenants.command("key-create")
@click.argument("name")
@click.option("--expires-days", type=click.FloatRange(0, 36500, min_open=True), help="Days until it ends; by default never.")
@common
def key_create(name: str, expires_days: float | None, db: Path | str | None, as_json: bool) -> None:
    """Print a new key of the tenant NAME.

    \b
    Example:
      trimtab tenants key-create acme --expires-days 90
    """
    with opened(db) as (store, act), act("key.create", name) as learnt:
        key, text = store.create_key(name, lifetime=None if expires_days is None else expires_days * DAY)
        learnt["key"] = key.id
        _print_key(key, text, as_json)


@tenants.command("key-rotate")
@click.argument("key_id")
@click.option("--grace-hours", type=click.FloatRange(0, 24 * 366), default=24, show_default=True, help="How long the old one stays valid.")
@common
def key_rotate(key_id: str, grace_hours: float, db: Path | str | None, as_json: bool) -> None:
    """Print a new key for the tenant of the key KEY_ID (the part before the dot), which then ends after a while.

    \b
    Example:
      trimtab tenants key-rotate 5f0c31a09b7e --grace-hours 1
    """
    _refuse_whole(key_id)
    with opened(db) as (store, act), act("key.rotate", key_id) as learnt:
        key, text = store.rotate_key(key_id, grace=grace_hours * 3600)
        learnt["key"] = key.id
        _print_key(key, text, as_json)


@tenants.command("key-revoke")
@click.argument("key_id")
@common
def key_revoke(key_id: str, db: Path | str | None, as_json: bool) -> None:
    """Make the key KEY_ID (the part before the dot) invalid, at once and for good.

    \b
    Example:
      trimtab tenants key-revoke 5f0c31a09b7e
    """
    _refuse_whole(key_id)
    with opened(db) as (store, act), act("key.revoke", key_id):
        _print(_told_key(store.revoke_key(key_id)), as_json, f"revoked {key_id}")


@tenants.command()
@click.option("--tenant", default="", help="One tenant's only.")
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), help="From this day on (UTC).")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="To this day, included.")
@store_option
@common
def usage(tenant: str, since: datetime | None, until: datetime | None, root: Path | None, db: Path | str | None, as_json: bool) -> None:
    """Requests and tokens per tenant, day (UTC) and adapter. Adapters are counted by digest; the store tells what they are called. The
    base's have no digest.

    \b
    Example:
      trimtab tenants usage --tenant acme --since 2026-11-01
    """
    with opened(db) as (store, _):
        rows = store.usage.report(tenant, f"{since:%Y-%m-%d}" if since else "", f"{until:%Y-%m-%d}" if until else "")
    names = _names({r.adapter for r in rows} - {""}, root)
    if as_json:
        click.echo(json.dumps([asdict(r) | {"names": names.get(r.adapter, [])} for r in rows], indent=1))
        return
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for column in ("tenant", "day", "adapter", "digest", "requests", "prompt tokens", "completion tokens"):
        table.add_column(column, justify="right" if column.endswith("s") else "left")
    for r in rows:
        called = ", ".join(names.get(r.adapter, ())) or ("not in the store" if r.adapter else "base")
        table.add_row(r.tenant, r.day, called, r.adapter[:19], *(f"{n:,}" for n in (r.requests, r.prompt_tokens, r.completion_tokens)))
    show.console().print(table)


def _names(digests: set[str], root: Path | None) -> dict[str, list[str]]:
    """digest -> names of its versions in the store: the one that was named, or the default one where there is one."""
    from trimtab.store.names import default_root
    from trimtab.store.registry import Store

    if not digests or (root is None and not (default_root() / "index.json").is_file()):
        return {}
    found: dict[str, list[str]] = {}
    try:
        for name in Store(root).names():
            for number, entry in name.versions.items():
                if entry.digest in digests:
                    found.setdefault(entry.digest, []).append(f"{name.path}@{number}")
    except TrimtabError:
        if root is not None:  # the default store need not be the one that served
            raise
    return found


Act = Callable[..., Any]


@contextmanager
def opened(db: Path | str | None, *, create: bool = False) -> Iterator[tuple[Tenants, Act]]:
    """The database, and what puts a block of code into its audit log as an administrator's act."""
    from trimtab.serve.audit import Audit, audit_path
    from trimtab.serve.tenants import Tenants, default_path

    path = db or default_path()
    with Tenants(path, create=create) as store, Audit(audit_path(path)) as audit:
        yield store, _acting(audit)


def _acting(audit: Audit) -> Act:
    return lambda what, target, details=None: audit.act(what, f"cli:uid={os.getuid()}", target, details)


def _changed(
    tenant: Tenant,
    *,
    namespaces: tuple[str, ...],
    max_concurrent: int | None,
    tokens_per_minute: int | None,
    weight: float | None,
    admin: bool | None,
) -> Tenant:
    """The tenant with what was named on the command line."""
    return replace(
        tenant,
        namespaces=namespaces or tenant.namespaces,
        max_concurrent=tenant.max_concurrent if max_concurrent is None else max_concurrent or None,
        tokens_per_minute=tenant.tokens_per_minute if tokens_per_minute is None else tokens_per_minute or None,
        weight=tenant.weight if weight is None else weight,
        admin=tenant.admin if admin is None else admin,
    )


def _refuse_whole(key_id: str) -> None:
    """Before anything is opened: a secret that was given by mistake is to be written nowhere."""
    if "." in key_id:
        raise ConfigError("a whole key was given, with its secret", fix="give its id only, the part before the dot")


def _told(tenant: Tenant) -> dict[str, Any]:
    return asdict(tenant) | {"namespaces": list(tenant.namespaces)}


def _told_key(key: Key) -> dict[str, Any]:
    def iso(at: float | None) -> str | None:
        return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")

    times = {"created": iso(key.created), "expires": iso(key.expires), "revoked": iso(key.revoked)}
    return {"id": key.id, "tenant": key.tenant, "state": key.state(time.time())} | times


def _limits(tenant: Tenant) -> str:
    concurrent = "any number of" if tenant.max_concurrent is None else str(tenant.max_concurrent)
    tokens = "" if tenant.tokens_per_minute is None else f", {tenant.tokens_per_minute:,} tokens a minute"
    return f"{concurrent} answers at a time{tokens}, weight {tenant.weight:g}{', admin' if tenant.admin else ''}"


def _print(told: dict[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(told, indent=1) if as_json else text)


def _print_key(key: Key, text: str, as_json: bool, tenant: dict[str, Any] | None = None) -> None:
    """The key alone on standard output, so that a script can take it."""
    if as_json:
        click.echo(json.dumps(_told_key(key) | {"key": text} | ({"settings": tenant} if tenant else {}), indent=1))
        return
    say(f"{ONCE} Its id is {key.id}, its tenant {key.tenant}.", err=True)
    say(text)
