"""AdamW with moments in 8 bits (Dettmers et al. 2022, arXiv:2110.02861), as bitsandbytes' AdamW8bit computes it.

A moment is kept as codes of one byte and one fp32 scale for each `BLOCK` numbers: x ≈ table[code] · scale, scale = max |x| of the block.
The table is the paper's dynamic one (`dynamic`), with signs for the first moment, without for the second. A step reads both moments, takes
AdamW's step in fp32, and writes them again, rounded to the nearest number of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale."""
CHUNK = 4096
"""Blocks that are in fp32 at a time: a step's work space is some 50 MB, however large the tensors are."""


class AdamW8(torch.optim.Optimizer):
    """`adamw8` as an optimizer of torch: fp32 tensors, each group with its lr, betas, eps and weight_decay."""

    def __init__(self, params: Any, **defaults: Any):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            at: dict[int, list[torch.Tensor]] = {}  # tensors without a gradient stay behind
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        first, second = Moment8.zeros(p), Moment8.zeros(p)
                        state |= {"step": 0, "exp_avg": first.codes, "exp_avg_scale": first.scales}
                        state |= {"exp_avg_sq": second.codes, "exp_avg_sq_scale": second.scales}
                    state["step"] += 1
                    at.setdefault(state["step"], []).append(p)
            options = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")}
            for step, params in at.items():
                moments = [tuple(Moment8(self.state[p][k], self.state[p][f"{k}_scale"]) for k in ("exp_avg", "exp_avg_sq")) for p in params]
                adamw8(params, [p.grad for p in params], moments, step=step, **options)  # type: ignore[arg-type, misc]


@dataclass(frozen=True)
class Moment8:
    """A moment of one tensor of n numbers in row-major order, the last block filled up: codes uint8 [⌈n / BLOCK⌉, BLOCK], scales fp32
    [⌈n / BLOCK⌉]."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def zeros(cls, like: Tensor) -> Moment8:
        blocks = -(-like.numel() // BLOCK)
        codes = torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=like.device)
        return cls(codes, torch.zeros(blocks, dtype=torch.float32, device=like.device))


def adamw8(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[tuple[Moment8, Moment8]],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place, of fp32 tensors on one device. step: its number, from 1."""
    signed, unsigned = (Table.of(signed, params[0].device) for signed in (True, False))
    root = (1 - betas[1] ** step) ** 0.5
    flat = [(p.view(-1), g.reshape(-1)) for p, g in zip(params, grads, strict=True)]
    for part in _chunks([len(m.scales) for m, _ in moments]):
        first, second = (
            Moment8(torch.cat([moments[i][k].codes[a:b] for i, a, b in part]), torch.cat([moments[i][k].scales[a:b] for i, a, b in part]))
            for k in (0, 1)
        )
        g_NB = torch.cat([_blocks(flat[i][1][a * BLOCK : b * BLOCK]) for i, a, b in part])
        m_NB = signed.read(first).mul_(betas[0]).add_(g_NB, alpha=1 - betas[0])
        v_NB = unsigned.read(second).mul_(betas[1]).addcmul_(g_NB, g_NB, value=1 - betas[1])
        change_NB = m_NB / (v_NB.sqrt() / root).add_(eps)
        sizes = [b - a for _, a, b in part]
        for k, table, x_NB in ((0, signed, m_NB), (1, unsigned, v_NB)):
            written = table.write(x_NB)
            torch._foreach_copy_([moments[i][k].codes[a:b] for i, a, b in part], written.codes.split(sizes))
            torch._foreach_copy_([moments[i][k].scales[a:b] for i, a, b in part], written.scales.split(sizes))
        mine = [flat[i][0][a * BLOCK : b * BLOCK] for i, a, b in part]
        if weight_decay:
            torch._foreach_mul_(mine, 1 - lr * weight_decay)
        changes = [c.reshape(-1)[: len(p)] for c, p in zip(change_NB.split(sizes), mine, strict=True)]
        torch._foreach_add_(mine, changes, alpha=-lr / (1 - betas[0] ** step))


@dataclass(frozen=True)
class Table:
    """The numbers that a code may stand for, and what finds the nearest.

    numbers: 256, ascending. middles: between each and the next. A number's upper 16 bits name a bucket that holds one middle at most.
    nearest: for each bucket, the code of its lower end; then one comparison decides.
    """

    numbers: Tensor
    middles: Tensor
    nearest: Tensor

    @classmethod
    @lru_cache
    def of(cls, signed: bool, device: torch.device) -> Table:
        numbers = torch.tensor(dynamic(signed), dtype=torch.float32)
        middles = torch.cat([(numbers[1:] + numbers[:-1]) / 2, torch.tensor([torch.inf], dtype=torch.float32)])
        bits = torch.arange(2**16, dtype=torch.int32) << 16
        low = bits.view(torch.float32).nan_to_num(0.0)
        # of a negative number the bits behind the sixteenth lead away from 0: the lower end of its bucket is the next one's
        below = torch.where(bits < 0, (bits + 0xFFFF).view(torch.float32).nan_to_num(0.0), low)
        nearest = torch.searchsorted(middles, below).to(torch.uint8)
        return cls(numbers.to(device), middles.to(device), nearest.to(device))

    def read(self, moment: Moment8) -> Tensor:
        """fp32 [N, BLOCK]"""
        return self.numbers[moment.codes.int()].mul_(moment.scales[:, None])

    def write(self, x_NB: Tensor) -> Moment8:
        """Scale each block and round to the nearest number."""
        scales_N = x_NB.abs().amax(1)
        y_NB = x_NB / scales_N.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        codes = self.nearest[(y_NB.view(torch.int32) >> 16).bitwise_and_(0xFFFF)]
        return Moment8(codes + (y_NB > self.middles[codes.int()]), scales_N)


def dynamic(signed: bool) -> list[float]:
    """The paper's dynamic table: decade i of seven, from 1e-7 to 1, is cut into 2^i intervals (without signs: 2^(i+1)), whose middles are
    its numbers; 0 and 1 are two more."""
    found = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        found += (10.0 ** (i - 6) * means).tolist()
        found += (-(10.0 ** (i - 6)) * means).tolist() if signed else []
    return sorted(found)


def _blocks(x_M: Tensor) -> Tensor:
    """[⌈M / BLOCK⌉, BLOCK], the last filled up with zeros."""
    missing = -len(x_M) % BLOCK
    return (torch.nn.functional.pad(x_M, (0, missing)) if missing else x_M).view(-1, BLOCK)


def _chunks(blocks: Sequence[int]) -> Iterator[list[tuple[int, int, int]]]:
    """(tensor, its blocks a to b) of so many tensors, at most CHUNK blocks at a time."""
    part: list[tuple[int, int, int]] = []
    room = CHUNK
    for i, n in enumerate(blocks):
        a = 0
        while a < n:
            b = min(n, a + room)
            part.append((i, a, b))
            room, a = room - (b - a), b
            if not room:
                yield part
                part, room = [], CHUNK
    if part:
        yield part
