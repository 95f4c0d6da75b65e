"""A running request: its tokens, its state, and what it holds. Everything that one answer needs between `submit` and its last delta."""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Literal

from trimtab.decode.text import TextStream
from trimtab.errors import TrimtabError
from trimtab.serve.blocks import VIRTUAL, chain_activated, chain_next
from trimtab.serve.drafts import Drafts
from trimtab.serve.grammars import Matcher
from trimtab.serve.prompt_rows import PromptRows
from trimtab.serve.request import FinishReason, Request, Sink, Token, Usage
from trimtab.serve.residency import Resident
from trimtab.serve.sampling import Draw
from trimtab.serve.watch import Watch

Where = Literal["new", "waiting", "loading", "running", "returning", "ended"]
"""new: not yet seen by the step loop. waiting: for a place. loading: for its adapter. running: holds KV blocks. returning: had to give them
up, and comes back first."""


NEVER = 1 << 62
"""The token from which an aLoRA is on that a prompt does not invoke."""


class ServingError(TrimtabError):
    """A failure that is ours, not the request's."""

    http_status = 500


@dataclass(eq=False, slots=True)
class Live:
    """serial: order of arrival. tokens: the prompt and the new tokens. virtual: virtual tokens before them. past: tokens (virtual ones
    included) whose keys and values the blocks hold. on_from: the first token for which its adapter is on. chain: the hash before its first
    block; base_chain: the same for the base's sequences; keys: those of its full blocks; published: how many of them the pool has been
    told. unwritten: the virtual tokens must be written into the blocks. cached: prompt tokens found in the cache. ran: number of the last
    step that it was in. unsaid: its newest token, as long as its grammar has not said what may follow; it does not run meanwhile. watch:
    for what a lazy grammar begins with, until that has come. rows: reads what is asked of its prompt's rows."""

    request: Request
    sink: Sink
    text: TextStream
    draw: Draw
    matcher: Matcher | None
    serial: int
    arrived: float
    chain: bytes
    base_chain: bytes
    tokens: list[int]
    where: Where = "new"
    resident: Resident | None = None
    virtual: int = 0
    on_from: int = 0
    past: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    published: int = 0
    unwritten: bool = False
    cached: int = 0
    ran: int = 0
    unsaid: Token | None = None
    watch: Watch | None = None
    drafts: Drafts | None = None
    rows: PromptRows | None = None
    admitted: float | None = None
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)

    @property
    def digest(self) -> str | None:
        return None if self.request.adapter is None else self.request.adapter.digest

    def begin_with(self, resident: Resident) -> None:
        """Its adapter is in memory, and held for it."""
        self.resident, self.virtual = resident, resident.packed.virtual_tokens
        if self.rows is not None:
            self.rows.head = resident.packed.head
        self.on_from = resident.packed.on_from(self.request.prompt)
        if self.on_from == len(self.request.prompt):  # an aLoRA that nothing calls: what the answer says does not, either
            self.on_from = NEVER

    @property
    def off(self) -> bool:
        """Whether its next rows are the base's."""
        return self.past < self.on_from

    @property
    def alike(self) -> int:
        """How many of its next rows are all its adapter's or all the base's."""
        return min(self.remaining, self.on_from - self.past) if self.off else self.remaining

    @property
    def total(self) -> int:
        """Tokens so far, virtual ones included."""
        return self.virtual + len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens that have not entered a forward: one while it decodes."""
        return self.virtual + len(self.tokens) - self.past

    @property
    def shareable(self) -> int:
        """Tokens, virtual ones included, whose rows need not be computed if their keys and values are known: all but the last, unless
        something is asked of those of the prompt."""
        if self.rows is not None and self.rows.needs_all:
            return min(self.total - 1, self.virtual + self.rows.read)
        return self.total - 1

    @property
    def new(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt), self.new, self.cached)

    def released(self) -> None:
        """It goes on without its grammar."""
        if self.matcher is not None:
            self.matcher.close()
        self.matcher = self.watch = None
        self.draw.follow(None)

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
        text = "" if ended and p.all_shown and not p.with_stop else self.text.push(token)
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
            self.keys.append(chain_next(self._before(len(self.keys), size), tokens))
        return self.keys[block]

    def owner(self, block: int, size: int) -> str | None:
        """The digest of the adapter that a block's keys and values depend on."""
        return self.digest if self.on_from < (block + 1) * size else None

    def _before(self, block: int, size: int) -> bytes:
        """The hash before a block: a block in which an aLoRA is on for the first time follows those of the base."""
        before = self.keys[-1] if self.keys else self.base_chain if self.on_from else self.chain
        if self.digest is not None and 0 <= self.on_from - block * size < size and self.on_from:
            return chain_activated(before, self.digest, self.on_from)
        return before


def adapters_of(requests: Iterable[Live]) -> tuple[str, ...]:
    """Names of the adapters of these requests, each once; the digest where one has no name."""
    adapters = (live.request.adapter for live in requests)
    return tuple(dict.fromkeys(str(getattr(a, "ref", "") or a.digest) for a in adapters if a is not None))
