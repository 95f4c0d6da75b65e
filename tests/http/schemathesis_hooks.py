"""Loaded by schemathesis (SCHEMATHESIS_HOOKS): most of its requests name a model that there is and ask for few tokens, so that they get
past the first check; without this nearly all end in a 404."""

from __future__ import annotations

from typing import Any

import schemathesis

MODELS = ("tiny", "lora", "ia3", "tiny")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        if len(body["model"]) % 5:
            body["model"] = MODELS[len(body["model"]) % 4]
        for field in ("max_tokens", "max_completion_tokens"):
            if not isinstance(body.get(field), bool | str) and (body.get(field) or 9) > 8:
                body[field] = 8
    return body
