"""A frozen base that ranks hold a part each of: who holds what, and how a whole unit of it comes to the rank that computes with it.

A unit is a decoder layer, the embedding, or the output head: what is used together. Its tensors lie one after the other in one piece of
memory, `Unit.whole`, of which rank r keeps the r-th of N equal parts, `Unit.own`. The whole has memory only while it is in use: its storage
grows, is filled by the ranks, and shrinks again, as FSDP2 does it. So the model's tensors are always the same objects, and what autograd
has saved of one (`weight.t()`) is right again when the backward has the unit brought back.

Ranks need not compute the same. One has longer answers to generate, or a forward more. So each exchange begins with a word of each rank:
the number of the unit that it wants, or `MEET` where it has nothing to compute. Every unit that somebody wants is then sent to those who
want it. A rank that comes to a sum over ranks meets the others first: it hands out its parts until all of them have come.

torch's collectives do the work: the words go by gloo, the parts by the group's backend for their device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trimtab.ops.native import compute_alone

MEET = -1
ALIGNED = 64
"""Tensors begin at multiples of so many bytes, as torch's own do."""
gather: Callable[[Tensor, Tensor], Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
NAME = "of_shards"
"""Under this name a module knows the unit that its tensors are in, and a model its `Shards`."""


class Unit:
    """Tensors that come and go together. owner: the module that they were added for. holders: how many use it now; without any the tensors
    have no memory and must not be read."""

    def __init__(self, shards: Shards, number: int, owner: nn.Module, tensors: Sequence[Tensor], device: torch.device):
        """Take this rank's part of these tensors, which must be whole, and let their memory go. They are on `device` afterwards."""
        self.shards, self.number, self.owner, self.holders, self.tensors = shards, number, owner, 0, list(tensors)
        places, end = list[int](), 0
        for t in tensors:
            places.append(end)
            end = -(-(end + t.nbytes) // ALIGNED) * ALIGNED
        part = -(-end // (shards.ranks * ALIGNED)) * ALIGNED
        self.nbytes, first = part * shards.ranks, shards.rank * part
        self.own = torch.zeros(part, dtype=torch.uint8, device=device)
        for t, at in zip(tensors, places, strict=True):
            a, b = max(at, first), min(at + t.nbytes, first + part)
            if a < b:
                self.own[a - first : b - first] = t.detach().contiguous().view(-1).view(torch.uint8)[a - at : b - at]
        self.whole = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        for t, at in zip(tensors, places, strict=True):
            t.data = self.whole.data[at : at + t.nbytes].view(t.dtype).view(t.shape)
        self.ready: torch.cuda.Event | None = None
        self.free()

    def make_room(self) -> None:
        self.whole.untyped_storage().resize_(self.nbytes)
        if self.whole.is_cuda:  # what has used this memory before may still run
            self.ready = torch.cuda.current_stream(self.whole.device).record_event()

    def free(self) -> None:
        self.whole.untyped_storage().resize_(0)

    @property
    def is_there(self) -> bool:
        return self.whole.untyped_storage().nbytes() > 0


class Shards:
    """The units of one rank's models. rank, ranks, here: as of the place. noticing: entered around what ranks do together; it says who is
    lost where that fails.

    A unit is in memory while a module that it hooks runs (`add`), while it is held (`held`), or as a guest: the units of one module that
    were visited last. The backward of a module visits its units. While one is used, the one that followed it last time comes beside it.
    """

    def __init__(self, rank: int, ranks: int, here: int, noticing: Callable[[], AbstractContextManager[None]] = nullcontext):
        self.rank, self.ranks, self.here, self._noticing = rank, ranks, here, noticing
        self.units: list[Unit] = []
        self._unit_of: dict[Tensor, Unit] = {}
        self._hooked: set[tuple[nn.Module, Unit]] = set()
        self._guests: list[Unit] = []
        self._ahead: tuple[Unit, Future[bool]] | None = None
        self._follows: dict[tuple[int, int], int] = {}
        self._last = MEET, MEET
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="trimtab-shards", initializer=compute_alone)
        self._streams: dict[torch.device, Any] = {}

    @property
    def own_bytes(self) -> int:
        """Of the base, what this rank keeps."""
        return sum(u.own.nbytes for u in self.units)

    @property
    def whole_bytes(self) -> int:
        """What all ranks keep together."""
        return sum(u.nbytes for u in self.units)

    def add(self, module: nn.Module, matrices: Mapping[nn.Module, Sequence[Tensor]], device: torch.device) -> None:
        """Make a unit of the matrices in a module, but for those that are in one already. What is in a unit is brought when the module
        runs, and when its backward does. matrices: of the module and of all modules in it. Ranks add the same ones in the same order."""
        fresh = list(dict.fromkeys(t for own in matrices.values() for t in own if t not in self._unit_of))
        if fresh:
            unit = Unit(self, len(self.units), module, fresh, device)
            self.units.append(unit)
            self._unit_of |= dict.fromkeys(fresh, unit)
        for inside, own in matrices.items():
            for t in own:
                vars(inside)[NAME] = self._unit_of[t]
        for unit in dict.fromkeys(self._unit_of[t] for own in matrices.values() for t in own):
            if (module, unit) not in self._hooked:
                self._hooked.add((module, unit))
                module.register_forward_pre_hook(_ours(partial(self._before, unit)))
                module.register_forward_hook(_ours(partial(self._after, unit)), always_call=True)

    def kept(self, model: nn.Module) -> list[Tensor]:
        """What this rank has of a model at any time: the tensors that are in no unit, and its parts of the units."""
        tensors = dict.fromkeys(
            t for m in model.modules() for table in (m._parameters, m._buffers) for t in table.values() if t is not None
        )
        return [*(t for t in tensors if t not in self._unit_of), *(u.own for u in self.units)]

    @contextmanager
    def held(self, *modules: nn.Module) -> Iterator[None]:
        """The tensors of these modules, and of all that is in them, are whole."""
        inside = (vars(m).get(NAME) for module in modules for m in module.modules())
        units = list(dict.fromkeys(u for u in inside if isinstance(u, Unit)))
        for unit in units:
            self._hold(unit)
        try:
            yield
        finally:
            for unit in units:
                self._let_go(unit)

    def visit(self, unit: Unit) -> None:
        """Bring a unit, if it is not there. It stays until one of another module is visited, or another one is held."""
        if unit.holders:
            return
        if any(guest.owner is not unit.owner for guest in self._guests):
            self._dismiss()
        self._guests.append(unit)
        unit.holders = 1
        self._bring(unit)

    def meet(self) -> None:
        """Hand out parts until every rank has nothing to compute. Called before all that ranks do together."""
        self._dismiss()
        self._expect(MEET)
        if self._ahead is not None:
            (early, done), self._ahead = self._ahead, None
            done.result()
            self._join(early)
            early.free()
        while not self._exchange(MEET):
            pass

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _hold(self, unit: Unit) -> None:
        if unit not in self._guests:
            self._dismiss()
        unit.holders += 1
        if unit.holders == 1:
            self._bring(unit)

    def _let_go(self, unit: Unit) -> None:
        unit.holders -= 1
        if not unit.holders:
            unit.free()

    def _dismiss(self) -> None:
        """Let the guests go."""
        guests, self._guests = self._guests, []
        for guest in guests:
            self._let_go(guest)

    def _before(self, unit: Unit, module: nn.Module, args: Any) -> None:
        self._hold(unit)

    def _after(self, unit: Unit, module: nn.Module, args: Any, result: Any) -> None:
        """A module has run: its unit goes, and comes again before the backward reads it."""
        self._let_go(unit)
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(lambda _: self.visit(unit))

    def _bring(self, unit: Unit) -> None:
        self._expect(unit.number)
        if self._ahead is not None:
            (early, done), self._ahead = self._ahead, None
            with self._noticing():
                done.result()
            self._join(early)
            if early is not unit and not early.holders:
                early.free()
        if not unit.is_there:
            unit.make_room()
            with self._noticing():
                self._exchange(unit.number)
            self._join(unit)
        following = self._follows.get(self._last, MEET)
        if following != MEET and not (early := self.units[following]).is_there:
            early.make_room()
            self._ahead = early, self._worker.submit(self._exchange, following)

    def _join(self, unit: Unit) -> None:
        """What is computed from now on comes after the unit's arrival."""
        if unit.whole.is_cuda:
            torch.cuda.current_stream(unit.whole.device).wait_stream(self._stream(unit.whole.device))

    def _expect(self, number: int) -> None:
        """Remember what followed the last two. Two tell a forward from a backward."""
        self._follows[self._last] = number
        self._last = self._last[1], number

    def _exchange(self, wanted: int) -> bool:
        """Say what this rank wants, and give every rank what it wants. True where all ranks meet."""
        words = torch.empty(self.ranks, dtype=torch.int64)
        gather(words, torch.tensor([wanted]))
        told = words.tolist()
        for number in sorted({*told} - {MEET}):
            self._send(self.units[number], [rank for rank, said in enumerate(told) if said == number])
        return all(said == MEET for said in told)

    def _send(self, unit: Unit, to: Sequence[int]) -> None:
        with torch.cuda.stream(self._stream(unit.own.device)) if unit.own.is_cuda else nullcontext():
            if unit.own.is_cuda and self.rank in to and unit.ready is not None:
                self._stream(unit.own.device).wait_event(unit.ready)
            if unit.own.is_cuda and len(to) == self.ranks:
                gather(unit.whole, unit.own)
                return
            # gloo's all-gather passes small pieces on in turn: it takes three to five times as long as this, and as much CPU time
            parts = unit.whole.chunk(self.ranks) if self.rank in to else ()
            sent = [dist.P2POp(dist.isend, unit.own, rank) for rank in to if rank != self.rank]
            found = [dist.P2POp(dist.irecv, part, rank) for rank, part in enumerate(parts) if rank != self.rank]
            for work in dist.batch_isend_irecv([*sent, *found]):
                work.wait()
            if parts:
                parts[self.rank].copy_(unit.own)

    def _stream(self, device: torch.device) -> Any:
        """Parts of a device's units travel beside what is computed there."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def visited(module: nn.Module) -> None:
    """Bring the unit that a module's tensors are in, where they are in one: called by whoever reads them beside the module's forward."""
    if (unit := vars(module).get(NAME)) is not None:
        unit.shards.visit(unit)


def shards_of(model: Any) -> Shards | None:
    """Those that a model is in; None where this process holds all of it."""
    return vars(model).get(NAME)


def _ours(hook: Callable[..., Any]) -> Callable[..., Any]:
    vars(hook)[NAME] = True
    return hook


def without_hooks(fields: dict[str, Any]) -> None:
    """Take the hooks of `Shards` out of a copy of a module's `__dict__`: a copy has tensors of its own."""
    fields.pop(NAME, None)
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        fields[name] = OrderedDict((key, hook) for key, hook in fields[name].items() if NAME not in getattr(hook, "__dict__", ()))
