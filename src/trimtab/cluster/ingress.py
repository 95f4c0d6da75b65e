"""What Serve's proxy calls: reads which adapter a request asks for, and hands the request to a replica by that name.

Serve sends requests of one multiplexed model id to replicas that say they hold it, and to others where those are busy. It knows the id from
the handle's options; here it is the body's `model`. The base is everywhere, so requests to it have no id.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from trimtab.cluster.relayed import Relayed, model_of
from trimtab.http.errors import CLIENT_GONE, RETRY_S, Fault
from trimtab.http.services import Limits

OF_ONE_REPLICA = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""What they load, one replica would have and the others would not."""


class Ingress:
    """replicas: Serve's handle of them. base_name: the base's name for clients; None: all requests go where Serve likes."""

    def __init__(self, replicas: Any, base_name: str | None):
        self.base_name = base_name
        self.replicas = replicas.options(method_name="answer", stream=True)
        self.body_bytes = Limits().body_bytes

    async def __call__(self, request: Request) -> Response:
        """The answer of a replica, as it comes."""
        if request.url.path.rstrip("/").endswith(OF_ONE_REPLICA):
            return _fault(
                Fault("adapters are loaded by name from the store here: publish it, and ask for NAMESPACE/NAME", code="not_supported")
            )
        try:
            asked = Relayed.of(request.scope, await self._body(request))
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        model = model_of(asked.body) if self.base_name is not None and request.method == "POST" else ""
        named = self.replicas.options(multiplexed_model_id=model) if model and model != self.base_name else self.replicas
        answer = named.remote(asked)
        try:
            head = await anext(answer)
            # an answer of known length is sent when it is there: behind its headers nothing could be told of a replica that dies
            whole = [m async for m in answer] if b"content-length" in dict(head["headers"]) else None
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except Exception as error:  # of Ray, in as many ways as an actor can end
            return _fault(_gone(error))
        response: Response = (
            StreamingResponse(_rest(answer), head["status"])
            if whole is None
            else Response(b"".join(m.get("body", b"") for m in whole), head["status"])
        )
        by_serve = b"x-request-id" in dict(asked.scope["headers"])  # its proxy numbers requests, and answers with the number itself
        response.raw_headers = [h for h in head["headers"] if not (by_serve and h[0] == b"x-request-id")]
        return response

    async def _body(self, request: Request) -> bytes:
        """The body; of one that is too large only the beginning, which is enough for the replica to refuse it."""
        found = bytearray()
        async for chunk in request.stream():
            found += chunk
            if len(found) > self.body_bytes:
                break
        return bytes(found)


async def _rest(answer: Any) -> AsyncIterator[bytes]:
    try:
        async for message in answer:
            if message.get("body"):
                yield message["body"]
    finally:
        answer.cancel()  # of a client that went away; of one that has ended it does nothing


def _gone(error: Exception) -> Fault:
    text = f"the replica that had the request is gone ({type(error).__name__}); it has not been answered"
    return Fault(text, status=503, code="replica_lost", headers={"Retry-After": str(RETRY_S)})


def _fault(fault: Fault) -> Response:
    return JSONResponse(fault.body, fault.http_status, headers=fault.headers)
