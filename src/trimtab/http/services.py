"""What routes use: an engine, room for a request, what a model's name means, who calls, words for tokens, limits.

`cli/serve.py` puts the real ones together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimtab.errors import TrimtabError
from trimtab.http.work import Work
from trimtab.serve.admission import Admission
from trimtab.serve.audit import Audit
from trimtab.serve.catalog import Catalog
from trimtab.serve.metrics import Metrics
from trimtab.serve.request import Request, Sink
from trimtab.serve.tenants import Tenants


class Engine(Protocol):
    """See serve/request.py. submit and cancel may be called from any thread and do not block."""

    def submit(self, request: Request, sink: Sink) -> None: ...
    def cancel(self, request_id: str) -> None: ...


@dataclass(frozen=True)
class Words:
    """A base's tokenizer and template, as far as routes need them. encode_chat, encode_text: to token ids; TrimtabError where the template
    refuses, TooLong where the base has no positions for so many. piece: the bytes of a token, which joined over tokens are the text's.
    vocab_size, max_positions, max_chars: what ids and prompts are measured against; a text with more characters than max_chars has more
    tokens than there are positions, whatever it says."""

    encode_chat: Callable[[list[dict[str, Any]]], list[int]]
    encode_text: Callable[[str], list[int]]
    piece: Callable[[int], bytes]
    vocab_size: int
    max_positions: int
    max_chars: int


class TooLong(TrimtabError):
    """A text that has more tokens than the base has positions."""


@dataclass(frozen=True)
class Limits:
    """What a request may be, whoever sends it. Times in seconds.

    body_bytes: of a request's body. held_bytes: of all bodies of a tenant whose requests are not answered yet, and of answers that it has
    not read. json_depth: of lists and objects in each other. choices: n times the prompts of one request. logprobs: log-probabilities that
    all its answers may bring, which are kept until it is answered. body_s: until the body is there. write_s: until a client has read what
    was sent. request_s: from a request's arrival to its last token; None: no end.
    """

    body_bytes: int = 4 << 20
    held_bytes: int = 32 << 20
    json_depth: int = 32
    choices: int = 64
    logprobs: int = 1 << 18
    body_s: float = 30.0
    write_s: float = 30.0
    request_s: float | None = None


@dataclass
class Life:
    """Whether the server takes requests (draining: no new ones), how many it is answering, and what their bodies hold and the answers
    that are not read yet, by tenant's name."""

    draining: bool = False
    open: int = 0
    held: Counter[str] = field(default_factory=Counter)

    def hold(self, owner: str, more: int) -> None:
        """Count bytes that are held for a tenant, or with a minus no more; who holds none is not kept."""
        self.held[owner] += more
        if not self.held[owner]:
            del self.held[owner]


@dataclass(frozen=True)
class Services:
    """Everything that routes use. tenants, audit: None in local mode, where whoever reaches the server may do everything. alive: whether
    the engine still runs. hosts: values of the Host header that are answered; None: all. fingerprint: the base's. words_work, load_work,
    store_work: threads for bodies and prompts, for adapters that are read, and for names that are looked up: none waits for another."""

    base_name: str
    fingerprint: str
    words: Words
    engine: Engine
    admission: Admission
    catalog: Catalog
    metrics: Metrics
    alive: Callable[[], bool]
    tenants: Tenants | None = None
    audit: Audit | None = None
    hosts: frozenset[str] | None = None
    limits: Limits = field(default_factory=Limits)
    life: Life = field(default_factory=Life)
    words_work: Work = field(default_factory=lambda: Work("trimtab-words"))
    load_work: Work = field(default_factory=lambda: Work("trimtab-folders"))
    store_work: Work = field(default_factory=lambda: Work("trimtab-store"))
    created: int = field(default_factory=lambda: int(time.time()))
