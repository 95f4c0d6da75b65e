"""What a request asks of its prompt beside the answer: how likely each token is, or one vector of all. It is read off the rows of each
chunk while they are there, so that a long prompt takes no more memory than a short one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from trimtab.decode.cached import Fed
from trimtab.decode.scoring import scores
from trimtab.forward import heads
from trimtab.methods.base import Params
from trimtab.serve.request import Request, Token


@dataclass(eq=False, slots=True)
class PromptRows:
    """Reads the rows of one request's prompt, in order, each once. read: how many it has read. finite: whether all that it was asked for is
    numbers. head: the adapter's own, once it is loaded; its tensors."""

    request: Request
    read: int = 0
    finite: bool = True
    head: Params | None = None
    _tokens: list[Token] = field(default_factory=list)
    _sum_H: Tensor | None = None

    @property
    def needs_all(self) -> bool:
        """Whether every row is needed, those too whose keys and values are known."""
        return self.request.sampling.prompt_logprobs is not None or self.request.pooling == "mean"

    def take(self, fed: Fed, piece: int, at: int) -> None:
        """Read a piece of the prompt whose first token is number `at`; of rows that come again, those that are new."""
        prompt, most = self.request.prompt, self.request.sampling.prompt_logprobs
        begin, end = fed.batch.where[piece]
        skipped, rows = max(0, self.read - at), min(end - begin, len(prompt) - at)
        if skipped >= rows:
            return
        self.read = at + rows
        if most is not None:
            if not at + skipped:
                self._tokens.append(Token(prompt[0]))
            targets = prompt[at + skipped + 1 : at + rows + 1]
            told = scores(fed, range(begin + skipped, begin + skipped + len(targets)), targets, most)
            self._tokens += [Token(i, s.logprob, s.top, s.rank) for i, s in zip(targets, told, strict=True)]
            self.finite &= not any(math.isnan(s.logprob) for s in told)
        if self.request.pooling == "mean":
            added_H = fed.attached.normed(fed.hidden_TH[begin + skipped : begin + rows]).sum(0)
            self._sum_H = added_H if self._sum_H is None else self._sum_H + added_H
        elif self.request.pooling == "last" and self.read == len(prompt):
            self._sum_H = fed.attached.normed(fed.hidden_TH[begin + rows - 1])
        elif self.request.pooling == "head" and self.read == len(prompt):
            assert self.head is not None, "an adapter without a head is refused before"
            self._sum_H = heads.read(fed.attached, fed.hidden_TH[begin + rows - 1], self.head)

    def tokens(self) -> tuple[Token, ...]:
        """The tokens that have been scored since the last call."""
        found, self._tokens = tuple(self._tokens), []
        return found

    def vector(self) -> bytes:
        """The pooled hidden state, or a head's scores, fp32, once all rows have been read; nothing where none was asked for."""
        if self._sum_H is None or self.read < len(self.request.prompt):
            return b""
        mean_H = self._sum_H / len(self.request.prompt) if self.request.pooling == "mean" else self._sum_H
        vector = mean_H.cpu().numpy()
        self.finite &= bool(np.isfinite(vector).all())
        return vector.astype("<f4").tobytes()


def prompt_rows(request: Request) -> PromptRows | None:
    """Who reads the rows of this request's prompt; None where nothing is asked of them."""
    return PromptRows(request) if request.pooling or request.sampling.prompt_logprobs is not None else None
