"""The server on Ray Serve: replicas of `trimtab serve` behind an ingress that sends a request to a replica that holds its adapter.

    serve run trimtab.cluster.serve:app base=smollm2-135m-instruct store=/shared/store tenants=postgresql://host/db replicas=4

`app` is the application's builder: `serve run` and Serve's config files give it the arguments of `Args`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trimtab.cluster.arguments import Args, read
from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve import Application

PACKAGES = ("ray", "fastapi", "uvicorn", "prometheus_client", "httptools", "llguidance")
INSTALL = "pip install 'trimtab[ray-serve]', on every node"
SLACK = 16
"""Requests that a replica is sent beyond those that it lets wait: it refuses them itself, with the answer that clients know."""


def app(args: Args | Mapping[str, Any]) -> Application:
    """The application: `Ingress` in front of `Replica`, by whose names a Serve config may set autoscaling and other options.

    args: Serve gives a mapping, of texts where they come from a command line. ConfigError where one is wrong, where they do not go
    together, or where packages are missing.
    """
    args = args if isinstance(args, Args) else read(args)
    _refuse(args)
    try:
        from ray import serve
    except ImportError as error:  # Ray without the packages of its extra
        raise ConfigError(f"Ray Serve cannot be loaded: {error}", fix=INSTALL) from error

    from trimtab.cluster.ingress import Ingress
    from trimtab.cluster.replica import Replica

    replica = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=args.replicas,
        max_ongoing_requests=args.max_running + args.max_queued + SLACK,
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        graceful_shutdown_timeout_s=args.drain_seconds + 10,
        health_check_period_s=5,
    ).bind(args.model_dump(mode="json"))
    ingress = serve.deployment(
        Ingress,
        name="Ingress",
        num_replicas=args.ingresses,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=args.drain_seconds + 10,
    )
    found: Application = ingress.bind(replica, args.name if args.multiplex else None)
    return found


def _refuse(args: Args) -> None:
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"Ray Serve needs {', '.join(missing)}", fix=INSTALL)
    problems = []
    if args.local == bool(args.tenants):
        problems.append("give either tenants (a database of keys) or local: true (no keys: whoever reaches the port may ask)")
    if args.store is not None and not (args.store / "index.json").is_file():
        problems.append(f"store = {str(args.store)!r}: there is no store on this machine; it must have the same path on all nodes")
    if problems:
        raise ConfigError("the application cannot be made like this", problems=problems)
