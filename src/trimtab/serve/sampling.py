"""What a request asks of sampling besides the draw itself. A row's token depends on its logits, its own settings, its own past and its own
generator.

The order is as in vLLM: log-probabilities of the unchanged distribution; logit_bias; no end tokens before min_tokens; grammar; penalties;
then `decode.sampling`, as everywhere. A grammar decides where its answer may end, and min_tokens has no effect beside one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trimtab import ops
from trimtab.decode.sampling import choose, greedy
from trimtab.decode.scoring import likelihoods
from trimtab.serve.grammars import Matcher
from trimtab.serve.request import SamplingParams, Token


@dataclass(eq=False, slots=True)
class Draw:
    """What one sequence's sampling remembers. slot: its row in the penalties' tables, once it has one."""

    params: SamplingParams
    prompt: Sequence[int]
    generator: random.Random
    matcher: Matcher | None = None
    new: int = 0
    slot: int = -1
    plain: bool = field(init=False)
    penalised: bool = field(init=False)
    biased: np.ndarray = field(init=False)
    bias: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        self.penalised = p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1
        self.biased = np.array([i for i, _ in p.logit_bias], dtype=np.int64)
        self.bias = np.array([b for _, b in p.logit_bias], dtype=np.float32)
        self.follow(self.matcher)

    def follow(self, matcher: Matcher | None) -> None:
        """From now on its tokens are those that this matcher allows."""
        p, self.matcher = self.params, matcher
        self.plain = greedy(p) and not (self.penalised or self.matcher or p.min_tokens or p.logit_bias) and p.logprobs is None


def make_draw(params: SamplingParams, prompt: Sequence[int], matcher: Matcher | None = None) -> Draw:
    """Sampling state of a new sequence. Without a seed the draws cannot be repeated."""
    return Draw(params, prompt, random.Random(params.seed), matcher)


class Sampler:
    """Samples for many sequences. stop_ids: end tokens, which min_tokens keeps away."""

    def __init__(self, vocab_size: int, stop_ids: Collection[int], device: torch.device):
        self.vocab_size, self.stop_ids, self.device = vocab_size, sorted(i for i in stop_ids if i < vocab_size), device
        self._penalties = _Penalties(vocab_size, device)

    @torch.inference_mode()
    def __call__(self, logits_NV: Tensor, draws: Sequence[Draw]) -> list[Token | None]:
        """One token for each row; None if a row holds a number that is not finite, or a grammar leaves no token."""
        best_N, id_N = ops.largest(logits_NV)
        special = [i for i, d in enumerate(draws) if not d.plain]
        asked = [r for r, i in enumerate(special) if draws[i].params.logprobs is not None]
        found = self._special(logits_NV, draws, special, asked) if special else []
        best, ids, *rest = ops.to_host([best_N, id_N, *found])
        tokens: list[Token | None] = [Token(i) if math.isfinite(b) else None for i, b in zip(ids, best, strict=True)]
        if special:
            chosen, fine, *logprobs = rest
            made = [Token(i) for i in chosen]
            for r, own, values, index in zip(asked, *logprobs, strict=True):
                k = draws[special[r]].params.logprobs or 0
                made[r] = Token(chosen[r], own, tuple(zip(index[:k], values[:k], strict=True)))
            for i, token, good in zip(special, made, fine, strict=True):
                tokens[i] = token if good and tokens[i] is not None else None
        for draw in draws:
            draw.new += 1
        return tokens

    @torch.inference_mode()
    def likeliest(self, logits_NV: Tensor) -> list[Token | None]:
        """What `__call__` gives for rows of plain draws, whatever these are; None if a row holds a number that is not finite."""
        best, ids = ops.to_host(list(ops.largest(logits_NV)))
        return [Token(i) if math.isfinite(b) else None for i, b in zip(ids, best, strict=True)]

    def release(self, draw: Draw) -> None:
        """The sequence has ended."""
        self._penalties.release(draw)

    def _special(self, logits_NV: Tensor, draws: Sequence[Draw], special: Sequence[int], asked: Sequence[int]) -> list[Tensor]:
        """For the rows `special`: each one's token, whether its logits are finite; of those of them that are asked for log-probabilities,
        the token's, the likeliest and their ids. A row that is not finite gives a token that means nothing."""
        whole = len(special) == len(draws)
        raw_RV = (logits_NV if whole else logits_NV[ops.index(special, logits_NV.device)]).float()
        mine = [draws[i] for i in special]
        logits_RV = self._shaped(raw_RV, mine)
        id_R = choose(logits_RV, [d.params for d in mine], [d.generator for d in mine])
        self._penalties.count(mine, id_R)
        found = [id_R, torch.isfinite(logits_RV.amax(-1))]
        if asked:
            row_A = ops.index(asked, raw_RV.device)
            most = max(mine[r].params.logprobs or 0 for r in asked)
            found += likelihoods(raw_RV[row_A], id_R[row_A], min(most, self.vocab_size))
        return found

    def _shaped(self, raw_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Logits after biases, bans, grammars and penalties; `raw_RV` stays as it is."""
        logits_RV = raw_RV
        if biased := [r for r, d in enumerate(draws) if len(d.biased)]:
            rows = np.repeat(biased, [len(draws[r].biased) for r in biased])
            ids, bias = (np.concatenate([getattr(draws[r], name) for r in biased]) for name in ("biased", "bias"))
            row_B, id_B, bias_B = ops.upload([rows, ids, bias], raw_RV.device)
            logits_RV = logits_RV.index_put((row_B, id_B), bias_B, accumulate=True)
        early = [r for r, d in enumerate(draws) if d.new < d.params.min_tokens and d.matcher is None]
        if early:
            banned = [{*self.stop_ids, *(i for i in draws[r].params.stop_token_ids if i < self.vocab_size)} for r in early]
            row_E, id_E = ops.upload([np.repeat(early, [len(b) for b in banned]), np.array([i for b in banned for i in b])], raw_RV.device)
            logits_RV = logits_RV.index_put((row_E, id_E), raw_RV.new_full((), -torch.inf)) if len(id_E) else logits_RV
        bound = [(r, d.matcher) for r, d in enumerate(draws) if d.matcher is not None]
        if bound:
            rows, allowed = np.array([r for r, _ in bound]), masks([m for _, m in bound], self.vocab_size)
            row_B, allowed_BV = ops.upload([rows, allowed], raw_RV.device)
            logits_RV = logits_RV.index_copy(0, row_B, logits_RV[row_B].masked_fill(~allowed_BV, -torch.inf))
        return self._penalties.apply(logits_RV, draws)


def masks(matchers: Sequence[Matcher], vocab_size: int) -> np.ndarray:
    """Which tokens may come next [n, V] bool."""
    words = (vocab_size + 31) // 32
    rows = [np.frombuffer(m.mask or bytes(4 * words), dtype=np.uint8) for m in matchers]
    return np.unpackbits(np.stack(rows), axis=1, bitorder="little")[:, :vocab_size].astype(bool)


class _Penalties:
    """Tables of how often each sequence has had each token: a row for each sequence that has penalties."""

    def __init__(self, vocab_size: int, device: torch.device):
        self.new_SV = torch.zeros(0, vocab_size, dtype=torch.float32, device=device)
        self.seen_SV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._free: list[int] = []

    def apply(self, logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
        rows = [r for r, d in enumerate(draws) if d.penalised]
        if not rows:
            return logits_RV
        chosen = [draws[r] for r in rows]
        slots = [self._slot(d) for d in chosen]
        row_P, slot_P = ops.upload([np.array(rows), np.array(slots)], logits_RV.device)
        new_PV, seen_PV, x_PV = self.new_SV[slot_P], self.seen_SV[slot_P], logits_RV[row_P]
        penalties = [getattr(d.params, f"{name}_penalty") for name in ("repetition", "presence", "frequency") for d in chosen]
        repetition_P1, presence_P1, frequency_P1 = ops.floats(penalties, x_PV).view(3, len(rows), 1)
        x_PV = torch.where(seen_PV, torch.where(x_PV > 0, x_PV / repetition_P1, x_PV * repetition_P1), x_PV)
        x_PV = x_PV - frequency_P1 * new_PV - presence_P1 * (new_PV > 0)
        return logits_RV.index_copy(0, row_P, x_PV)

    def count(self, draws: Sequence[Draw], id_R: Tensor) -> None:
        rows = [r for r, d in enumerate(draws) if d.penalised]
        if rows:
            row_P, slot_P = ops.upload([np.array(rows), np.array([draws[r].slot for r in rows])], id_R.device)
            id_P = id_R[row_P]
            self.new_SV[slot_P, id_P] += 1
            self.seen_SV[slot_P, id_P] = True

    def release(self, draw: Draw) -> None:
        if draw.slot >= 0:
            self._free.append(draw.slot)
            draw.slot = -1

    def _slot(self, draw: Draw) -> int:
        if draw.slot < 0:
            if not self._free:
                size = len(self.new_SV)
                grown = max(4, 2 * size)
                self.new_SV = torch.cat([self.new_SV, self.new_SV.new_zeros(grown - size, self.new_SV.shape[1])])
                self.seen_SV = torch.cat([self.seen_SV, self.seen_SV.new_zeros(grown - size, self.seen_SV.shape[1])])
                self._free = list(range(grown - 1, size - 1, -1))
            draw.slot = self._free.pop()
            self.new_SV[draw.slot], self.seen_SV[draw.slot] = 0, False
            self.seen_SV[draw.slot].index_fill_(0, ops.index(draw.prompt, self.seen_SV.device), True)
        return draw.slot
