"""Whole answers, collected from deltas, for callers that do not stream."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.errors import TrimtabError
from trimtab.serve.request import Delta, FinishReason, Token, Usage


@dataclass(frozen=True)
class Result:
    """A whole answer. token_ids: all new ones, the end token included where one ended it. logprobs: where they were asked for."""

    text: str
    token_ids: list[int]
    logprobs: list[Token]
    finish: FinishReason
    usage: Usage
    error: TrimtabError | None = None


class Collector:
    """A sink that gathers an answer into results[place]."""

    def __init__(self, results: list[Result | None], place: int):
        self._results, self._place = results, place
        self._texts: list[str] = []
        self._tokens: list[Token] = []

    def __call__(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._tokens += delta.tokens
        if delta.finish is not None:
            ids, logprobs = [t.id for t in self._tokens], [t for t in self._tokens if t.logprob is not None]
            self._results[self._place] = Result("".join(self._texts), ids, logprobs, delta.finish, delta.usage, delta.error)
