"""The ranks of torch.distributed as a place: gloo between CPUs and for what the hosts say, NCCL for the gradients of GPUs."""

from __future__ import annotations

import heapq
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trimtab.errors import ConfigError, TrimtabError
from trimtab.memory import ran_out
from trimtab.places.place import ONE_PROCESS, Place, RankLost
from trimtab.places.shards import Shards, gather

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process."""
BUCKET = 1 << 26
"""Numbers of one all-reduce: gradients of adapters are one, those of a whole model some, so that their copy is bounded (256 MB)."""
TOLD_S = 2.0
"""How long a rank that has failed waits whether the first one says the same."""
SIGN_S = 5.0
"""How long a rank that has lost another waits for signs of life from other machines."""
TALKS = ("add", "add_gradients", "most", "once", "gather")
"""What ranks do together: each begins with a word of every rank, the number of what it has come for."""
RESUME = "start it again with --resume, with any number of ranks"


@contextmanager
def joined() -> Iterator[Place]:
    """The ranks that torchrun has started this process among; one process where it has not. ConfigError where its variables are
    not whole."""
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        yield ONE_PROCESS
        return
    numbers = _numbers()
    if numbers["WORLD_SIZE"] == 1:
        yield ONE_PROCESS
        return
    backend = "gloo"
    if torch.cuda.is_available() and numbers["LOCAL_RANK"] < torch.cuda.device_count():
        torch.cuda.set_device(numbers["LOCAL_RANK"])
        backend = "cpu:gloo,cuda:nccl"
    store, rank, ranks = next(iter(rendezvous("env://")))
    dist.init_process_group(backend, store=PrefixStore("trimtab", store), rank=rank, world_size=ranks)
    place = Ranks(store, numbers)
    yield place
    place.leave()
    dist.destroy_process_group()  # after an error the others may be gone, and the process ends anyway


def _numbers() -> dict[str, int]:
    """The numbers among `VARIABLES`."""
    missing = [k for k in VARIABLES if not os.environ.get(k)]
    wrong = [f"{k} is {v!r}" for k in VARIABLES if k != "MASTER_ADDR" and (v := os.environ.get(k)) and not v.isdigit()]
    if missing or wrong:
        problems = [*(f"{k} is not set" for k in missing), *wrong]
        fix = "start ranks with `trimtab train --ranks N RUN.yaml` or torchrun; for a run in one process unset RANK and WORLD_SIZE"
        raise ConfigError("the environment names ranks, but not as torchrun does", problems=problems, fix=fix)
    return {k: int(os.environ[k]) for k in VARIABLES if k != "MASTER_ADDR"}


class Ranks(Place):
    """A rank of torchrun's. store: what all ranks can write to and read, in a process that outlives them where torchrun hosts it."""

    def __init__(self, store: Store, numbers: Mapping[str, int]):
        self.rank, self.ranks = numbers["RANK"], numbers["WORLD_SIZE"]
        self._local, self.here = numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"]
        self._shards: Shards | None = None
        self.lost: list[int] = []
        self._interrupted = False
        self._said: str | None = None
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._restarts, self._store = restarts, PrefixStore(f"trimtab/{restarts}", store)
        self._processes = {self.rank: (socket.gethostname(), os.getpid())}
        told = self._gathered((*self._processes[self.rank], restarts))
        self._processes = {rank: (host, pid) for rank, (host, pid, _) in enumerate(told)}
        self._restarts = max(n for *_, n in told)  # torchrun counts on the machine where a rank has failed, and not on the others
        self._store = PrefixStore(f"trimtab/{self._restarts}", store)

    def shards(self) -> Shards:
        if self._shards is None:
            self._shards = Shards(self.rank, self.ranks, self.here, self._noticing)
        return self._shards

    def leave(self) -> None:
        """Before the process ends: hand out what others still want, unless they are interrupted too."""
        if self._shards is None:
            return
        if not self._interrupted:
            with suppress(RuntimeError):  # the others may be gone
                self._shards.meet()
        self._shards.close()

    @property
    def leads(self) -> bool:
        return self.rank == min(r for r in range(self.ranks) if r not in self.lost)

    @property
    def restarted(self) -> bool:
        return self._restarts > 0

    def share(self, costs: Sequence[float]) -> Sequence[int]:
        """The dearest items first, each to the rank that has least to do."""
        mine, loads = [], [(0.0, rank) for rank in range(self.ranks)]
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + costs[i], rank))
            if rank == self.rank:
                mine.append(i)
        return sorted(mine)

    def each(self, costs: Sequence[float], work: Callable[[Sequence[int]], Sequence[T]]) -> Sequence[T]:
        mine = self.share(costs)
        found = {i: x for part in self._gathered(dict(zip(mine, work(mine), strict=True))) for i, x in part.items()}
        return [found[i] for i in range(len(costs))]

    def added(self, values: Sequence[T]) -> Sequence[T]:
        return [reduce(add, of_each) for of_each in zip(*self._gathered(list(values)), strict=True)]  # in the order of ranks, everywhere

    def add(self, tensor: Tensor) -> None:
        with self._together("add"):
            dist.all_reduce(tensor)

    def add_gradients(self, leaves: Iterable[Iterable[Tensor]]) -> None:
        every = [p for own in leaves for p in own]
        if not every:
            return
        if every[0].is_cuda:  # whoever dies while it computes is missed here: NCCL would wait for it without an end
            torch.cuda.synchronize(every[0].device)
        has = torch.tensor([p.grad is not None for p in every], dtype=torch.uint8)
        with self._together("add_gradients", len(every)):
            dist.all_reduce(has, dist.ReduceOp.MAX)
            for part in _buckets([p for p, some in zip(every, has.tolist(), strict=True) if some]):
                flat = torch.cat([(p.new_zeros(p.shape) if p.grad is None else p.grad).reshape(-1) for p in part])
                dist.all_reduce(flat)
                for p, g in zip(part, flat.split([p.numel() for p in part]), strict=True):
                    p.grad = g.view_as(p)

    def most(self, number: int) -> int:
        with self._together("most", number, same=False) as told:
            return max(told)

    def once(self, work: Callable[[], T]) -> T:
        held: list[Any] = [work() if self.first else None]
        with self._together("once"):
            dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        result: T = held[0]
        return result

    def agree(self, what: Mapping[str, Any]) -> None:
        first, *others = self._gathered(dict(what))
        problems = [
            f"{k}: {other.get(k)!r} on rank {rank} ({self._name(rank)}), {first.get(k)!r} on rank 0"
            for rank, other in enumerate(others, 1)
            for k in dict.fromkeys([*first, *other])
            if first.get(k) != other.get(k)
        ]
        if problems:
            fix = "give all machines the same run file, rows, base and version of trimtab, and an `out` that they share"
            raise ConfigError("the ranks of this run do not compute the same", problems=problems[:20], fix=fix)

    def device(self, asked: str | torch.device | None) -> str | torch.device | None:
        """A GPU for each rank of a machine. ConfigError where there are too few, or where a single one is asked for."""
        kind = torch.device(asked) if asked is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if kind.type != "cuda":
            return asked
        if ":" in str(asked):
            fix = "leave `device` out, or say device: cuda; CUDA_VISIBLE_DEVICES chooses which GPUs there are"
            raise ConfigError(f"device = {str(asked)!r}: {self.ranks} ranks cannot share one GPU", fix=fix)
        if self.here > (count := torch.cuda.device_count()):
            fix = f"start {count} ranks on this machine (--ranks {count}, --nproc-per-node {count}), or say device: cpu"
            raise ConfigError(f"{self.here} ranks on {socket.gethostname()}, which has {count} GPUs: NCCL wants one each", fix=fix)
        return f"cuda:{self._local}"

    def _gathered(self, value: T) -> list[T]:
        """The value of each rank."""
        found: list[Any] = [None] * self.ranks
        with self._together("gather"):
            dist.all_gather_object(found, value)
        return found

    @contextmanager
    def _together(self, what: str, number: int = 0, same: bool = True) -> Iterator[list[int]]:
        """While ranks talk, after all have computed what they have to. Gives the number of each rank. RankLost where they have come for
        different things, or where `same` and their numbers differ: each would wait for the others without an end."""
        with self._noticing():
            if self._shards is not None:
                self._shards.meet()
            words = torch.empty(self.ranks, 2, dtype=torch.int64)
            gather(words.view(-1), torch.tensor([TALKS.index(what), number]))
            told = [(TALKS[kind], n) for kind, n in words.tolist()]
            if any(kind != what or (same and n != number) for kind, n in told):
                raise self._apart(told)
            yield [n for _, n in told]

    def _apart(self, told: Sequence[tuple[str, int]]) -> RankLost:
        """What each of them has come for."""
        each = [f"rank {rank} ({self._name(rank)}) at {kind!r} of {n}" for rank, (kind, n) in enumerate(told)]
        return RankLost(f"the ranks do not do the same any more: {', '.join(each)}", fix=RESUME)

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        """Whatever fails while ranks talk becomes a RankLost that names who has ended, or what was wrong here. Nobody goes on after it: the
        others would wait for what this rank has not sent."""
        try:
            yield
        except RankLost:
            raise
        except Exception as error:
            raise self._missed(error) from error

    def _missed(self, error: Exception) -> RankLost:
        """Who does not answer: of this machine, whose process has ended; of others, those who leave no sign within `SIGN_S`. Where all do,
        the error is this rank's own."""
        # where the other end of a connection is gone, torch.distributed raises a plain RuntimeError or one of its own
        if (type(error) is not RuntimeError and not isinstance(error, dist.DistError)) or ran_out(error):
            return self._failed(error)
        try:
            self._store.set(f"alive/{self.rank}", "")
            until, missing = time.monotonic() + SIGN_S, list(range(self.ranks))
            while (missing := [r for r in missing if not self._store.check([f"alive/{r}"])]) and time.monotonic() < until:
                if all(self._has_ended(r) for r in missing):
                    break
                time.sleep(0.05)
            missing = [r for r in missing if self._has_ended(r) is not False]
            said = {r: self._store.get(f"error/{r}").decode() for r in missing if self._store.check([f"error/{r}"])}
        except RuntimeError:  # the store is gone too, with the process that held it
            missing, said = [0], {}
        self.lost = missing
        seen = {r: "has ended" if r in said or self._has_ended(r) else "gives no sign" for r in missing}
        who = [f"rank {r} of {self.ranks} ({self._name(r)}) {what}" + (f": {said[r]}" if r in said else "") for r, what in seen.items()]
        return RankLost("; ".join(who), fix=RESUME) if who else self._failed(error)

    def _failed(self, error: Exception) -> RankLost:
        """What was wrong here, which the others are told too."""
        text = f"{type(error).__name__}: {error}"
        self._tell(text)
        return RankLost(f"rank {self.rank} of {self.ranks} ({self._name(self.rank)}) cannot go on with the others: {text}", fix=RESUME)

    @contextmanager
    def told(self) -> Iterator[None]:
        try:
            yield
        except RankLost as lost:
            if self._speaks(lost):
                raise
            raise SystemExit(lost.exit_code) from None
        except TrimtabError as error:
            text = str(error).split("\n")[0]
            same = not self.first and self._said is None and self._has_told(0, wait_s=TOLD_S) == text
            self._tell(text)
            if same:
                raise SystemExit(error.exit_code) from None
            raise
        except KeyboardInterrupt:  # SIGTERM, as torchrun ends the others where one has failed
            if self.first:
                raise
            raise SystemExit(143) from None
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}")
            raise
        except SystemExit:
            raise
        except BaseException as error:  # it is interrupted: the others hear of it where they still have something to do
            self._interrupted = True
            self._tell(str(error))
            raise

    def _speaks(self, lost: RankLost) -> bool:
        """Whether this rank says that others are lost: one of each machine does. Where the first rank was on this machine and has ended
        before anything was trained, it has said all there is to say."""
        if self._said is not None:  # the error is its own
            return True
        if any(self._host(r) == self._host(self.rank) and r not in self.lost for r in range(self.rank)):
            return False
        return lost.trained or self._host(0) != self._host(self.rank) or not self._has_told(0)

    def _host(self, rank: int) -> str:
        return self._processes[rank][0] if rank in self._processes else ""

    def _name(self, rank: int) -> str:
        return "{}, process {}".format(*self._processes[rank]) if rank in self._processes else "which has not said where it runs"

    def _has_ended(self, rank: int) -> bool | None:
        """Whether the process of a rank has; None where it is another machine's."""
        if self._host(rank) != socket.gethostname():
            return None
        try:
            return Path(f"/proc/{self._processes[rank][1]}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    def _tell(self, text: str) -> None:
        """What this rank ends with; the first that is told counts."""
        if self._said is None:
            self._said = text
            with suppress(RuntimeError):  # the store's host is gone
                self._store.set(f"error/{self.rank}", text)

    def _has_told(self, rank: int, wait_s: float = 0.0) -> str | None:
        """What a rank has ended with, if it has said so."""
        until = time.monotonic() + wait_s
        try:
            while not (told := self._store.check([f"error/{rank}"])) and time.monotonic() < until:
                time.sleep(0.05)
            return self._store.get(f"error/{rank}").decode() if told else None
        except RuntimeError:  # its host is gone
            return None


def _buckets(leaves: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Leaves in order, as many together as have at most `BUCKET` numbers."""
    part, size = list[Tensor](), 0
    for p in leaves:
        if part and size + p.numel() > BUCKET:
            yield part
            part, size = [], 0
        part.append(p)
        size += p.numel()
    if part:
        yield part
