"""vLLM's /tokenize, /detokenize and /tokenizer_info: the ids that a prompt would have, the text of ids, and what the tokenizer is."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from trimtab.http.auth import Caller, S, caller
from trimtab.http.errors import Fault, documented
from trimtab.http.limits import read_body
from trimtab.http.prompts import chat_ids, text_ids
from trimtab.http.schema import DetokenizeBody, TokenizeBody, takes
from trimtab.http.services import Services
from trimtab.serve.tenant import Tenant

router = APIRouter(dependencies=[Depends(caller)])
ERRORS = documented(400, 401, 403, 408, 413, 415, 429, 500, 503)


class TokenizeReply(BaseModel):
    """token_strs: each token's text, where it was asked for; halves of characters are replaced."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(BaseModel):
    prompt: str


class TokenizerReply(BaseModel):
    """The texts of control tokens, and the chat template; null where there is none."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    model_max_length: int
    chat_template: str | None


@router.get("/tokenizer_info", responses=documented(401, 403, 429, 500, 503))
async def tokenizer_info(s: S) -> TokenizerReply:
    """What a client needs to write prompts of its own, as lm-eval does: with /tokenize it needs no tokenizer."""
    return TokenizerReply(**s.words.told)


@router.post("/tokenize", responses=ERRORS, openapi_extra=takes(TokenizeBody))
async def tokenize(request: Request, tenant: Caller, s: S) -> TokenizeReply:
    """The ids of a text or of a conversation, as the same request to the other routes would have them."""
    body = await read_body(request, TokenizeBody, s)
    ids = await _ids(body, tenant, s)
    spelt = None
    if body.return_token_strs:
        spelt = await s.words_work.run(tenant.name, lambda: [s.words.piece(i).decode("utf-8", "replace") for i in ids])
    return TokenizeReply(count=len(ids), max_model_len=s.words.max_positions, tokens=ids, token_strs=spelt)


async def _ids(body: TokenizeBody, tenant: Tenant, s: Services) -> list[int]:
    if body.prompt is None:
        return await chat_ids(body, tenant, s)
    return (await text_ids([body.prompt], tenant, s, start=body.add_special_tokens is not False))[0]


@router.post("/detokenize", responses=ERRORS, openapi_extra=takes(DetokenizeBody))
async def detokenize(request: Request, tenant: Caller, s: S) -> DetokenizeReply:
    """The text of ids, control tokens spelt out."""
    body = await read_body(request, DetokenizeBody, s)
    if (large := max(body.tokens, default=0)) >= s.words.vocab_size:
        raise Fault(f"tokens: token id {large} is not in 0..{s.words.vocab_size - 1}", param="tokens", code="invalid_value")
    joined = await s.words_work.run(tenant.name, lambda: b"".join(map(s.words.piece, body.tokens)))
    return DetokenizeReply(prompt=joined.decode("utf-8", "replace"))
