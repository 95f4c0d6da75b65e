"""What routes use: an engine, room for a request, adapters by name, callers, text to tokens, limits.

`http/assemble.py` makes the real ones.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trimtab.bases.calls import AnswerFormat
from trimtab.errors import TrimtabError
from trimtab.http.work import Turns, Work
from trimtab.serve.admission import Admission
from trimtab.serve.audit import Audit
from trimtab.serve.catalog import Catalog
from trimtab.serve.metrics import Metrics
from trimtab.serve.request import Request, Sink
from trimtab.serve.tenants import Tenants

if TYPE_CHECKING:
    from trimtab.bases.template import End


class Engine(Protocol):
    """See serve/request.py. submit and cancel may be called from any thread and do not block."""

    def submit(self, request: Request, sink: Sink) -> None: ...
    def cancel(self, request_id: str) -> None: ...


@dataclass(frozen=True)
class Words:
    """A base's tokenizer and template, as far as routes need them.

    encode_chat (messages, the template's variables, how the prompt ends), encode_text (the text, whether a start token comes first),
    encode_answer (a question, its answer: as a reward's training reads them): to token ids, at the end so many as the last argument says,
    or all; TrimtabError if the template refuses, TooLong if all are wanted and the base has too few positions. piece: the bytes of a token;
    joined over tokens they are the bytes of the text. variables: names of those that the template reads and a request may set. vocab_size,
    max_positions, max_chars: limits of ids and prompts. A text with more than max_chars characters always has more tokens than there are
    positions. answers: how the base writes calls and reasoning. added: ids of added tokens by their texts. shown: control tokens that are
    part of an answer's text, since calls or reasoning are told by them. call_ends: tokens that end an answer with calls alone. told: what
    /tokenizer_info tells."""

    encode_chat: Callable[[list[dict[str, Any]], Mapping[str, Any], End, int | None], list[int]]
    encode_text: Callable[[str, bool, int | None], list[int]]
    piece: Callable[[int], bytes]
    variables: frozenset[str]
    vocab_size: int
    max_positions: int
    max_chars: int
    answers: AnswerFormat = field(default_factory=AnswerFormat)
    added: Mapping[str, int] = field(default_factory=dict)
    shown: tuple[int, ...] = ()
    call_ends: tuple[int, ...] = ()
    encode_answer: Callable[[str, str, int | None], list[int]] = lambda question, answer, last: []
    told: Mapping[str, Any] = field(default_factory=dict)


class TooLong(TrimtabError):
    """A text that has more tokens than the base has positions."""


@dataclass(frozen=True)
class Limits:
    """Limits of any request. Times in seconds.

    body_bytes: of a request's body. held_bytes: of all bodies of a tenant whose requests are not answered yet, and of answers that it has
    not read. json_depth: of lists and objects inside each other. choices: n times the prompts of one request. logprobs: log-probabilities
    in all its answers, which are kept until it is answered. body_s: until the body is there. write_s: until a client has read what was
    sent. request_s: from a request's arrival to its last token; None: no limit.
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
    """The server's state: whether it takes requests (draining: no new ones), how many it is answering, and how many bytes of bodies and
    unread answers each tenant holds."""

    draining: bool = False
    open: int = 0
    held: Counter[str] = field(default_factory=Counter)

    def hold(self, owner: str, more: int) -> None:
        """Count bytes that are held for a tenant; a negative number releases them. Tenants that hold none are removed."""
        self.held[owner] += more
        if not self.held[owner]:
            del self.held[owner]


@dataclass(frozen=True)
class Services:
    """Everything that routes use. tenants, audit: None in local mode, where every client may do everything. alive: whether the engine still
    runs. hosts: values of the Host header that are answered; None: all. fingerprint, hidden_size: the base's. turns: when a tenant's
    requests begin. words_work, load_work, store_work: threads for bodies and prompts, for adapters that are read, and for names that are
    looked up, so that none waits for another."""

    base_name: str
    fingerprint: str
    hidden_size: int
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
    turns: Turns = field(default_factory=Turns)
    words_work: Work = field(default_factory=lambda: Work("trimtab-words"))
    load_work: Work = field(default_factory=lambda: Work("trimtab-folders"))
    store_work: Work = field(default_factory=lambda: Work("trimtab-store"))
    created: int = field(default_factory=lambda: int(time.time()))
