"""`trimtab serve`"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trimtab.cli.options import DatabasePlace, OnBase, base_option, device_option, dtype_option, json_option, on_base, store_option
from trimtab.cli.terminal import say
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.serve.engine import Engine
    from trimtab.serve.tenants import Tenants
    from trimtab.store.registry import Store

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "httptools": "httptools", "prometheus_client": "prometheus-client"}
GB = 1e9


@click.command()
@base_option
@click.option("--base-name", "shown", help="The base's name for clients; by default its own, of a folder or file the last part.")
@store_option
@click.option(
    "--adapter", "named", multiple=True, metavar="NAME=SOURCE", help="Serve a folder, or one of the store, as NAME. With --local."
)
@click.option(
    "--adapters-from",
    "folders",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder below which /v1/load_lora_adapter may read; below it, a tenant has the folders of its namespaces.",
)
@click.option("--local", is_flag=True, help="For this machine only: 127.0.0.1, no keys, no tenants, no limits.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--cors", "origins", multiple=True, metavar="ORIGIN", help="Web pages of this origin (https://example.com) may call; *: all.")
@click.option("--metrics", type=click.Choice(["trimtab", "vllm"]), default="trimtab", show_default=True, help="Whose names /metrics has.")
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65535),
    help="Serve /metrics there too, without a key, for scrapers in a network that only they reach; by default only with an admin's key.",
)
@click.option(
    "--tenants",
    "database",
    type=DatabasePlace(),
    help="Their database, as `trimtab tenants add --db` has it. Servers with the same database share the tenants' limits.",
)
@click.option("--kv-gb", type=click.FloatRange(0, min_open=True), help="Memory for keys and values; by default a share of what is free.")
@click.option("--adapters-gb", type=click.FloatRange(0, min_open=True), help="Memory for adapters; by default a share of what is free.")
@click.option("--max-running", default=64, show_default=True, type=click.IntRange(1), help="Answers that are computed at a time.")
@click.option("--max-queued", default=256, show_default=True, type=click.IntRange(1), help="Answers that wait at most; more get 503.")
@click.option(
    "--max-wait",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="An answer that would wait longer for a place gets 503 too, as far as can be told when it comes; by default any may wait.",
)
@click.option(
    "--speculate/--no-speculate",
    default=True,
    help="Verify several tokens in a step that an answer or its prompt has had before, where that pays (the default). Answers stay equal.",
)
@click.option(
    "--request-seconds", type=click.FloatRange(0, min_open=True), help="An answer's time at most; by default as long as it takes."
)
@click.option("--drain-seconds", default=60.0, show_default=True, type=click.FloatRange(0), help="After SIGTERM, for running answers.")
@dtype_option
@device_option
@json_option("Print the line that says it is ready as JSON.")
@on_base
def serve(on: OnBase, **options: Any) -> None:
    """Serve the base and any number of adapters over OpenAI's HTTP API. `model` chooses: support, acme/support@3, or the base's name.

    \b
    Example:
      trimtab serve --local --adapter support=examples/runs/desks/adapters/support-lora
      curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"model": "support", "temperature": 0, "messages": [{"role": "user", "content": "How do I cancel?"}]}'

    Without --local every request needs a key (`trimtab tenants add`), and a tenant sees the adapters of its namespaces in the store. One
    line on standard output says that it is ready; the log goes to standard error, a JSON line a request, without prompts or keys. SIGTERM
    or Ctrl-C lets running answers finish.
    """
    check_packages()
    asked = ServeOptions(**options)
    adapters = _pairs(asked.named)
    _check(asked, adapters)
    with ExitStack() as open_parts:
        _run(on, asked, adapters, open_parts)


@dataclass(frozen=True)
class ServeOptions:
    """The options of `trimtab serve`, beside those of the base."""

    shown: str | None
    named: tuple[str, ...]
    folders: tuple[Path, ...]
    local: bool
    host: str
    port: int
    origins: tuple[str, ...]
    metrics: str
    metrics_port: int | None
    database: Path | str | None
    kv_gb: float | None
    adapters_gb: float | None
    max_running: int
    max_queued: int
    max_wait: float | None
    speculate: bool
    request_seconds: float | None
    drain_seconds: float
    as_json: bool

    @property
    def max_open(self) -> int:
        """Answers that run or wait."""
        return self.max_running + self.max_queued


def _run(on: OnBase, asked: ServeOptions, adapters: dict[str, str], open_parts: ExitStack) -> None:
    """Check what can be checked before the base is loaded, load it, serve until a signal ends it."""
    from trimtab.bases.fits import available_bytes
    from trimtab.http import logs, server
    from trimtab.http.app import create_app
    from trimtab.http.assemble import Asked, name_for_clients, services_of
    from trimtab.http.services import Limits
    from trimtab.serve.audit import Audit, audit_path

    tenants = None
    with on.before_loading(adapters.values()) as mistakes:
        with mistakes.noted():
            store_at(on.root)
        with mistakes.noted():
            sock = open_parts.enter_context(server.bind(asked.host, asked.port))
        if not asked.local:
            with mistakes.noted():
                tenants = open_parts.enter_context(_tenants(asked.database))
    audit = None if tenants is None else open_parts.enter_context(Audit(audit_path(tenants.where)))
    store = store_at(on.root)
    port = sock.getsockname()[1]
    engine = _engine(on, asked)
    open_parts.callback(engine.close)
    if tenants is not None:
        tenants.share_limits()
    services = services_of(
        engine,
        Asked(
            store=store,
            folders=asked.folders,
            adapters=adapters,
            base_names=(asked.shown or name_for_clients(on.base_name),),
            tenants=tenants,
            audit=audit,
            hosts=server.local_hosts(port) if asked.local else None,
            max_open=asked.max_open,
            places=asked.max_running,
            max_wait=asked.max_wait,
            limits=Limits(request_s=asked.request_seconds),
            vllm_metrics=asked.metrics == "vllm",
        ),
    )
    logs.configure()
    memory = engine.memory()
    logs.log.info(
        "memory", extra={"told": vars(memory) | {"total_bytes": memory.total_bytes, "free_bytes": available_bytes(engine.base.device)}}
    )
    engine.start()
    if asked.metrics_port is not None:
        open_parts.callback(server.scraped(asked.host, asked.metrics_port, services.metrics.registry))
    text = _ready(asked, services.base_name, port, sorted(adapters))
    app = create_app(services, asked.origins)
    made = server.make(app, services, drain_s=asked.drain_seconds, ready=lambda: say(text), stop=engine.close)
    made.run([sock])


def _engine(on: OnBase, asked: ServeOptions) -> Engine:
    from trimtab.serve.engine import Engine, EngineConfig

    config = EngineConfig(
        kv_bytes=None if asked.kv_gb is None else int(asked.kv_gb * GB),
        adapter_bytes=None if asked.adapters_gb is None else int(asked.adapters_gb * GB),
        max_running=asked.max_running,
        speculate=asked.speculate,
        max_queued=asked.max_open,  # admission counts them all; the engine's bound is not to be met before
    )
    return Engine(on.open(), config)


def _ready(asked: ServeOptions, base_name: str, port: int, adapters: list[str]) -> str:
    """What is printed when the server is ready."""
    where = f"http://{f'[{asked.host}]' if ':' in asked.host else asked.host}:{port}"
    if asked.as_json:
        return json.dumps({"url": where, "base": base_name, "local": asked.local, "adapters": adapters})
    return f"serving {base_name} at {where}{' for this machine only' * asked.local}"


def check_packages() -> None:
    if missing := [shown for name, shown in PACKAGES.items() if find_spec(name) is None]:
        raise ConfigError(f"serving needs {', '.join(missing)}", fix="pip install 'trimtab[serve]'")


def _pairs(named: tuple[str, ...]) -> dict[str, str]:
    """NAME=SOURCE options. ConfigError with all that are not."""
    pairs = [n.partition("=") for n in named]
    problems = [f"--adapter {a}{e}{b}: must be NAME=FOLDER or NAME=NAMESPACE/NAME" for a, e, b in pairs if not (a and e and b)]
    names = [a for a, _, _ in pairs]
    problems += [f"--adapter {n}: is given twice" for n in dict.fromkeys(names) if names.count(n) > 1]
    if problems:
        raise ConfigError("these adapters cannot be named", problems=problems)
    return {a: b for a, _, b in pairs}


def _check(asked: ServeOptions, adapters: dict[str, str]) -> None:
    problems = []
    if asked.local and asked.host not in ("127.0.0.1", "localhost", "::1"):
        problems.append(f"--local listens on this machine only, not on --host {asked.host}")
    if asked.local and asked.database is not None:
        problems.append("--local knows no tenants: leave out --tenants")
    if adapters and not asked.local:
        problems.append("--adapter is for --local: with tenants, publish to the store, in a tenant's namespace")
    if problems:
        raise ConfigError("these options do not go together", problems=problems)


def _tenants(database: Path | str | None) -> Tenants:
    from trimtab.serve.tenants import Tenants, default_path

    path = database or default_path()
    if isinstance(path, Path) and not path.exists():
        raise ConfigError(
            f"there is no tenants database {path}", fix="make one with `trimtab tenants add`, or serve this machine alone: --local"
        )
    return Tenants(path, create=isinstance(path, str))  # an empty database that somebody names is meant to become ours


def store_at(root: Path | None) -> Store | None:
    """The store at `root`, or the default one where there is one."""
    from trimtab.store.names import default_root
    from trimtab.store.registry import Store

    if root is None and not (default_root() / "index.json").is_file():
        return None
    store = Store(root)
    store.namespaces()  # what is wrong with its index is said before a base is loaded
    return store
