"""A running request: its tokens, its state, and what it holds. Everything that one answer needs between `submit` and its last delta."""

from __future__ import annotations

from array import array
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

from trimtab.decode.text import TextStream
from trimtab.errors import TrimtabError
from trimtab.serve.blocks import VIRTUAL, chain_next
from trimtab.serve.grammars import Matcher
from trimtab.serve.request import FinishReason, Request, Sink, Token, Usage
from trimtab.serve.residency import Resident
from trimtab.serve.sampling import Draw

Where = Literal["new", "waiting", "loading", "running", "returning", "ended"]
"""new: not yet seen by the step loop. waiting: for a place. loading: for its adapter. running: holds KV blocks. returning: had to give them
up, and comes back first."""


class ServingError(TrimtabError):
    """A failure that is ours, not the request's."""

    http_status = 500


@dataclass(eq=False, slots=True)
class Live:
    """serial: order of arrival. tokens: the prompt and the new tokens. virtual: virtual tokens before them. past: tokens (virtual ones
    included) whose keys and values the blocks hold. chain: the hash before its first block; keys: those of its full blocks;
    published: how many of them the pool has been told. unwritten: the virtual tokens must be written into the blocks. cached: prompt tokens
    found in the cache. ran: number of the last step that it was in. unsaid: its newest token, as long as its
    grammar has not said what may follow; it does not run meanwhile."""

    request: Request
    sink: Sink
    text: TextStream
    draw: Draw
    matcher: Matcher | None
    serial: int
    arrived: float
    chain: bytes
    tokens: list[int]
    where: Where = "new"
    resident: Resident | None = None
    virtual: int = 0
    past: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    unwritten: bool = False
    cached: int = 0
    ran: int = 0
    unsaid: Token | None = None
    admitted: float | None = None
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)

    @property
    def digest(self) -> str | None:
        return None if self.request.adapter is None else self.request.adapter.digest

    @property
    def total(self) -> int:
        """Tokens so far, virtual ones included."""
        return self.virtual + len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens that have not entered a forward: one while it decodes."""
        return self.virtual + len(self.tokens) - self.past

    @property
    def new(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt), self.new, self.cached)

    def take(self, token: int, now: float) -> None:
        """A new token has been chosen for it at this time."""
        self.tokens.append(token)
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now

    def say(self, stop_ids: Container[int], longest: int) -> tuple[str, FinishReason | None]:
        """What its newest token adds to the text, and why the answer ends with it, if it does. stop_ids: the base's end tokens. longest:
        tokens of a sequence. A matcher must be ready."""
        token, p = self.tokens[-1], self.request.sampling
        ended = self.new >= p.min_tokens and ((token in stop_ids and not p.ignore_eos) or token in p.stop_token_ids)
        text = self.text.push(token)
        if ended or self.text.stopped or (self.matcher is not None and self.matcher.done):
            return text, "stop"
        if self.new >= p.max_tokens or self.past >= longest:
            return text, "length"
        return text, None

    def key(self, block: int, size: int) -> bytes:
        """The key of its block number `block`, which all of its tokens so far must fill."""
        while len(self.keys) <= block:
            start = len(self.keys) * size - self.virtual
            tokens = [VIRTUAL] * min(size, -start) + self.tokens[: max(0, start + size)] if start < 0 else self.tokens[start : start + size]
            assert len(tokens) == size
            self.keys.append(chain_next(self.keys[-1] if self.keys else self.chain, tokens))
        return self.keys[block]
