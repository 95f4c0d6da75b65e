"""What a request asks of sampling besides the draw itself. A row's token depends on its logits, its own settings, its own past and its own
generator.

The order is as in vLLM: log-probabilities of the unchanged distribution; no end tokens before min_tokens; grammar; penalties; then
`decode.sampling`, as everywhere. A grammar decides where its answer may end, and min_tokens has no effect beside one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimtab import ops
from trimtab.decode.sampling import choose, greedy
from trimtab.serve.grammars import Matcher, masks
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

    def __post_init__(self) -> None:
        p = self.params
        self.penalised = p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1
        self.plain = greedy(p) and not (self.penalised or self.matcher or p.min_tokens) and p.logprobs is None


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
        best_N, ids_N = ops.largest(logits_NV)
        best, ids = best_N.tolist(), ids_N.tolist()
        tokens: list[Token | None] = [Token(i) if math.isfinite(b) else None for i, b in zip(ids, best, strict=True)]
        special = [i for i, (d, t) in enumerate(zip(draws, tokens, strict=True)) if t is not None and not d.plain]
        if special:
            rows_RV = logits_NV[special].float() if len(special) < len(draws) else logits_NV.float()
            for i, token in zip(special, self._special(rows_RV, [draws[i] for i in special]), strict=True):
                tokens[i] = token
        for draw in draws:
            draw.new += 1
        return tokens

    def release(self, draw: Draw) -> None:
        """The sequence has ended."""
        self._penalties.release(draw)

    def _special(self, raw_RV: Tensor, draws: Sequence[Draw]) -> list[Token | None]:
        logits_RV = self._shaped(raw_RV, draws)
        ids = choose(logits_RV, [d.params for d in draws], [d.generator for d in draws])
        fine = torch.isfinite(logits_RV.amax(-1)).tolist()
        self._penalties.count(draws, ids)
        tokens = [Token(i) for i in ids]
        asked = [r for r, d in enumerate(draws) if d.params.logprobs is not None]
        if asked:
            for r, token in zip(asked, _with_logprobs(raw_RV[asked], [draws[r] for r in asked], [ids[r] for r in asked]), strict=True):
                tokens[r] = token
        return [t if good else None for t, good in zip(tokens, fine, strict=True)]

    def _shaped(self, raw_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Logits after bans, grammars and penalties; `raw_RV` stays as it is."""
        logits_RV = raw_RV
        early = [r for r, d in enumerate(draws) if d.new < d.params.min_tokens and d.matcher is None]
        if early:
            logits_RV = logits_RV.clone()
            for r in early:
                logits_RV[r, sorted({*self.stop_ids, *(i for i in draws[r].params.stop_token_ids if i < self.vocab_size)})] = -torch.inf
        bound = [(r, d.matcher) for r, d in enumerate(draws) if d.matcher is not None]
        if bound:
            allowed_BV = masks([m for _, m in bound], self.vocab_size).to(raw_RV.device)
            rows = [r for r, _ in bound]
            logits_RV = logits_RV.clone() if logits_RV is raw_RV else logits_RV
            logits_RV[rows] = logits_RV[rows].masked_fill(~allowed_BV, -torch.inf)
        return self._penalties.apply(logits_RV, draws)


def _with_logprobs(raw_RV: Tensor, draws: Sequence[Draw], ids: Sequence[int]) -> list[Token]:
    """Tokens with log-probabilities under the untouched distribution, and the likeliest alternatives."""
    lse_R1 = raw_RV.logsumexp(-1, keepdim=True)
    own = (raw_RV.gather(1, torch.tensor(ids, device=raw_RV.device)[:, None]) - lse_R1)[:, 0].tolist()
    counts = [d.params.logprobs or 0 for d in draws]
    most = min(max(counts), raw_RV.shape[-1])
    values_RK, index_RK = raw_RV.topk(most)
    values, index = (values_RK - lse_R1).tolist(), index_RK.tolist()
    return [
        Token(i, logprob, tuple(zip(index[r][:k], values[r][:k], strict=True)))
        for r, (i, logprob, k) in enumerate(zip(ids, own, counts, strict=True))
    ]


class _Penalties:
    """Tables of how often each sequence has had each token: a row for each sequence that has penalties."""

    def __init__(self, vocab_size: int, device: torch.device):
        self.new_SV = torch.zeros(0, vocab_size, device=device)
        self.seen_SV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._free: list[int] = []

    def apply(self, logits_RV: Tensor, draws: Sequence[Draw]) -> Tensor:
        rows = [r for r, d in enumerate(draws) if d.penalised]
        if not rows:
            return logits_RV
        chosen = [draws[r] for r in rows]
        slots = [self._slot(d) for d in chosen]
        new_PV, seen_PV, x_PV = self.new_SV[slots], self.seen_SV[slots], logits_RV[rows]
        repetition_P1, presence_P1, frequency_P1 = (
            x_PV.new_tensor([getattr(d.params, f"{name}_penalty") for d in chosen])[:, None]
            for name in ("repetition", "presence", "frequency")
        )
        x_PV = torch.where(seen_PV, torch.where(x_PV > 0, x_PV / repetition_P1, x_PV * repetition_P1), x_PV)
        x_PV = x_PV - frequency_P1 * new_PV - presence_P1 * (new_PV > 0)
        out_RV = logits_RV.clone()
        out_RV[rows] = x_PV
        return out_RV

    def count(self, draws: Sequence[Draw], ids: Sequence[int]) -> None:
        mine = [(d.slot, i) for d, i in zip(draws, ids, strict=True) if d.penalised]
        if mine:
            slots, tokens = zip(*mine, strict=True)
            self.new_SV[list(slots), list(tokens)] += 1
            self.seen_SV[list(slots), list(tokens)] = True

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
            self.seen_SV[draw.slot, list(draw.prompt)] = True
        return draw.slot
