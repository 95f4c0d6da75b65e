"""A request and its answer on their way between an ingress and a replica, as ASGI has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_MODEL = 256
"""Longer names are no adapter's (`serve.catalog.MAX_NAME`)."""
KEPT = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client", "server")


@dataclass(frozen=True)
class Relayed:
    """A request, read to its end. scope: what of ASGI's scope goes from process to process."""

    scope: dict[str, Any] = field(repr=False)
    body: bytes = field(repr=False)

    @classmethod
    def of(cls, scope: Mapping[str, Any], body: bytes) -> Relayed:
        kept = {key: scope[key] for key in KEPT if key in scope}
        return cls(
            kept | {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "headers": [tuple(h) for h in scope["headers"]]},
            body,
        )


def model_of(body: bytes) -> str:
    """The `model` that a body names, "" where it names none that could be an adapter."""
    if b'"model"' not in body:
        return ""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    model = found.get("model") if isinstance(found, dict) else None
    return model if isinstance(model, str) and len(model) <= MAX_MODEL else ""
