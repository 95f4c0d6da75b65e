"""Loaded by schemathesis (SCHEMATHESIS_HOOKS): most of its requests name a model that there is and ask for few tokens, so that they get
past the first check; without this nearly all end in a 404. What is wrong in a request stays wrong."""

from __future__ import annotations

from typing import Any

import schemathesis

MODELS = ("tiny", "lora", "ia3", "tiny")
HEADS = {"/classify": "judge", "/v1/score": "judge", "/v1/rerank": "judge"}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    body = case.body
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or not 1 <= len(body["model"]) <= 256:
        return
    body["model"] = HEADS.get(case.path, MODELS[len(body["model"]) % 4])
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        given = body.get(field)
        if given is None or (type(given) is int and 8 < given < 2**31):
            body[field] = 8
    if type(body.get("min_tokens")) is int and 8 < body["min_tokens"] < 2**31:
        body["min_tokens"] = 8
    for field in ("prompt", "input"):
        if isinstance(body.get(field), list):
            body[field] = [_small(p) for p in body[field]]
    if "prompt" in body:
        body.pop("max_completion_tokens", None)


def _small(part: Any) -> Any:
    """Ids that the base has."""
    if isinstance(part, list):
        return [_small(p) for p in part]
    return part % 300 if type(part) is int and 0 <= part < 2**31 else part
