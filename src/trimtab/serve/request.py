"""The contract of serving: what is asked of the engine, and what it returns. Callers of the engine need this file alone.

A request has token ids, settings for sampling, an adapter (None: the base) and a tenant. The engine sends a stream of `Delta`s to a sink
that the caller gives. The last one says why the answer ended. The engine knows nothing of HTTP, keys, chat templates or names of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from trimtab.decode.settings import cut_problems
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.methods import Head
    from trimtab.store import Adapter

MAX_TOP_LOGPROBS = 20
MAX_STOPS, MAX_STOP_CHARS = 16, 256
MAX_BIASES, MAX_BIAS = 1024, 100.0

Pooling = Literal["mean", "last", "head"]
FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
"""stop: an end token, a stop text or a finished grammar. length: max_tokens, or the base has no positions left."""


@dataclass(frozen=True)
class Trigger:
    """Where a grammar begins to bind. text: what an answer must say before. token: the token that says it alone, if there is one. at_start:
    only where the answer begins with it, white space apart."""

    text: str
    token: int | None = None
    at_start: bool = False


@dataclass(frozen=True)
class Grammar:
    """A constraint on an answer. kind: json_schema (text: the schema as JSON), json_object (text: ""), regex, choice (text: a JSON list of
    strings), grammar (text: Lark's form or GBNF), calls (text: as `bases.call_grammar` gives it).

    trigger: None if it binds from the first token on; else free text may come before, and the grammar is one of the trigger's token and
    what follows, or of a text that has the trigger somewhere. loose: where it cannot be followed the answer goes on without it.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "grammar", "calls"]
    text: str = ""
    trigger: Trigger | None = None
    loose: bool = False


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy. A request's random draws depend on its seed and its own tokens only, not on other
    requests.

    max_tokens: new tokens at most. top_k 0 is off; min_p: least probability relative to the likeliest token. presence and frequency
    penalties are OpenAI's (over new tokens), repetition_penalty is Keskar et al. 2019's (arXiv:1909.05858, over prompt and new tokens).
    stop: texts that end the answer and are not part of it. logprobs: None, or how many of the likeliest alternatives come with each token.
    ignore_eos: end tokens do not end the answer (for measurements). min_tokens: the answer has at least so many tokens. shown: control
    tokens that are part of the answer's text. max_tokens 0: the prompt is computed, and the answer is empty. prompt_logprobs: as logprobs,
    for the tokens of the prompt. logit_bias: (token, what is added to its logit). with_stop: the stop text or token that ends the answer
    is part of it. all_shown: all control tokens are.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: Grammar | None = None
    shown: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    with_stop: bool = False
    all_shown: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)}: {rule}"
            for name, rule, good in (
                ("max_tokens", "must be at least 0", self.max_tokens >= 0),
                ("min_tokens", "must be between 0 and max_tokens", 0 <= self.min_tokens <= self.max_tokens),
                ("temperature", "must be in [0, 100]", 0.0 <= self.temperature <= 100.0),
                ("presence_penalty", "must be in [-2, 2]", -2.0 <= self.presence_penalty <= 2.0),
                ("frequency_penalty", "must be in [-2, 2]", -2.0 <= self.frequency_penalty <= 2.0),
                ("repetition_penalty", "must be a finite number above 0", 0.0 < self.repetition_penalty < math.inf),
                ("seed", "must be in [0, 2**63)", self.seed is None or 0 <= self.seed < 2**63),
                ("logprobs", f"must be in [0, {MAX_TOP_LOGPROBS}]", 0 <= (self.logprobs or 0) <= MAX_TOP_LOGPROBS),
                ("prompt_logprobs", f"must be in [0, {MAX_TOP_LOGPROBS}]", 0 <= (self.prompt_logprobs or 0) <= MAX_TOP_LOGPROBS),
                ("logit_bias", f"at most {MAX_BIASES} tokens", len(self.logit_bias) <= MAX_BIASES),
                ("stop", f"at most {MAX_STOPS} texts", len(self.stop) <= MAX_STOPS),
                ("stop", f"texts have 1 to {MAX_STOP_CHARS} characters", all(1 <= len(s) <= MAX_STOP_CHARS for s in self.stop)),
            )
            if not good
        ]
        problems += cut_problems(self)
        if problems:
            raise TrimtabError("cannot sample like this", problems=problems)


class Servable(Protocol):
    """An adapter that can be loaded. digest: "sha256:…" of its content. The same digest always means the same tensors, so everything that
    the engine keeps (packed parameters, KV blocks) has the digest as its key, never a name."""

    @property
    def digest(self) -> str: ...
    def load(self) -> Adapter:
        """Read and check it, outside of the step loop. If it is refused with a TrimtabError, only the requests that wait for it fail."""
        ...


def head_problem(head: Head | None, pooling: Pooling | None) -> TrimtabError | None:
    """Why an adapter's head, or that it has none, does not allow what is asked; None where it does."""
    if pooling == "head":
        if head is None:
            return TrimtabError("this adapter has no head that could score texts", fix="name one of objective classify or reward")
        if head.every_token:
            return TrimtabError("this adapter's head scores the steps of a text, not texts", fix="score them with `trimtab score`")
    elif head is not None and pooling is None:
        return TrimtabError(
            "this adapter has a head: it scores texts and gives no answers",
            fix="`trimtab score`, or the server's /classify, /v1/score and /v1/rerank, score texts",
        )
    return None


@dataclass(frozen=True)
class Request:
    """One answer.

    id: unique among running requests. tenant, weight: the tenant to which it counts, and that tenant's weight. deadline: time.monotonic()
    after which it ends with "deadline"; None: never. cache_salt: separates prefix-cache entries further ("": by tenant only). like: the id
    of a request with the same prompt and adapter that was submitted before: this one waits until that one's prompt is computed, and shares
    it. pooling: what comes of the prompt's hidden states, after the final norm: their mean over its tokens, that of its last token,
    or the scores that the adapter's own head gives of it.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapter: Servable | None = None
    tenant: str = ""
    weight: float = 1.0
    deadline: float | None = None
    cache_salt: str = ""
    like: str = ""
    pooling: Pooling | None = None

    def check(self, vocab_size: int, longest: int) -> None:
        """TrimtabError if it can never run. longest: the longest possible sequence, in tokens."""
        problems = []
        if not self.prompt:
            problems.append("the prompt is empty")
        elif not 0 <= min(self.prompt) <= max(self.prompt) < vocab_size:
            problems.append(f"the prompt has token ids outside 0..{vocab_size - 1}")
        if not all(0 <= i < vocab_size for i, _ in self.sampling.logit_bias):
            problems.append(f"logit_bias has token ids outside 0..{vocab_size - 1}")
        if len(self.prompt) > longest:
            problems.append(f"the prompt has {len(self.prompt)} tokens; at most {longest} fit: positions of the base, or its KV blocks")
        if self.pooling == "head" and self.adapter is None:
            problems.append("the base has no head that could score texts")
        if not 0.0 < self.weight < math.inf:
            problems.append(f"weight = {self.weight}: must be a finite number above 0")
        if problems:
            raise TrimtabError("this request cannot be run", problems=problems)


@dataclass(frozen=True)
class Token:
    """A new token, or one of the prompt. logprob (natural log, of the model's distribution before temperature and cuts) and top, the
    likeliest alternatives [(id, logprob), …], are there where they were asked for; the first token of a prompt has none. rank: of a
    prompt's token, 1 for the likeliest."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. cached: prompt tokens whose keys and values were there already."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass(frozen=True)
class Delta:
    """The new part of an answer. text: what the new tokens add; text that may be the start of a stop text, or half a character, is held
    back. tokens: the new tokens, end tokens included. finish: set on the last delta, with usage, and with error if finish is "error".
    prompt: the next tokens of the prompt, where their log-probabilities were asked for; all of them come before the first new one. vector:
    where pooling was asked for, once: fp32, little endian. labels: of a head's scores, beside them."""

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: FinishReason | None = None
    usage: Usage = field(default_factory=Usage)
    error: TrimtabError | None = None
    prompt: tuple[Token, ...] = ()
    vector: bytes = b""
    labels: tuple[str, ...] = ()


Sink = Callable[[Delta], None]
"""Called on the engine's thread, in order, once with `finish`; it must not block or raise."""
