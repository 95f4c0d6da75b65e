"""Which adapters are in memory: packed once at load, within a budget of bytes, the least recently used one removed first.

Everything is identified by digest. A lease keeps an adapter while a request uses it. Reading and packing run on threads beside the step
loop; the loop's thread calls everything else here. Requests are not known here: the loop says for which loads requests wait.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Lock

from trimtab.errors import AdapterError, OverloadedError, TrimtabError
from trimtab.forward.arena import Arena
from trimtab.forward.packs import PackedAdapter
from trimtab.methods import Head
from trimtab.model import Base
from trimtab.serve.request import Servable
from trimtab.store import Adapter

LOADERS = 2
"""Loads at once. So many adapters at most stand beside the budget, read and waiting for room."""
RETRY_S = 2.0
"""When a request may come again whose adapter could not be read for want of threads."""
GUESS_PART = 0.125
"""Of the budget: what an adapter is taken for before any has been loaded."""


@dataclass(eq=False)
class Resident:
    """An adapter in memory. bytes: of its packed tensors. head: what its own head scores. leases: how many requests use it. leaving: it
    gets no new ones, and goes with the last. purge: what else is kept of its digest goes too."""

    digest: str
    packed: PackedAdapter
    bytes: int
    head: Head | None = None
    leases: int = 0
    leaving: bool = False
    purge: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """Of what its head scores; none without one."""
        return () if self.head is None else self.head.labels


@dataclass(frozen=True)
class Loaded:
    """How a load ended, after so many seconds: an adapter that is resident now, or an error."""

    digest: str
    resident: Resident | None = None
    error: TrimtabError | None = None
    seconds: float = 0.0


class Residency:
    """The resident adapters of one base.

    loader: runs loads. forward_lock: held by whoever runs a forward (packing a prompt runs one). wake: called when a load has ended.
    on_free: called with each adapter that leaves memory.
    """

    def __init__(
        self,
        base: Base,
        budget_bytes: int,
        loader: Executor,
        forward_lock: Lock,
        wake: Callable[[], None] = lambda: None,
        on_free: Callable[[Resident], None] = lambda resident: None,
    ):
        self.base, self.budget_bytes, self.loader, self.wake, self.on_free = base, budget_bytes, loader, wake, on_free
        self.loads = self.failures = self.evictions = 0
        self.load_seconds = 0.0
        self._largest: int | None = None  # bytes of the largest adapter that was loaded
        self._forward_lock, self._pack_lock = forward_lock, Lock()
        self._arena = None if base.device.type == "cpu" else Arena(budget_bytes, base.device)
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # least recently leased first
        self._leaving: list[Resident] = []
        self._wanted: OrderedDict[str, Servable] = OrderedDict()  # loads that have not begun
        self._loading: set[str] = set()
        self._handed: dict[str, Servable] = {}  # of these, those that no thread has taken; who removes one answers for it
        self._ended: SimpleQueue[Loaded] = SimpleQueue()
        self._parked: deque[Loaded] = deque()  # read, but there is no room yet
        self._leave_at_once: set[str] = set()
        self._fresh: list[Resident] = []  # placed, and not yet leased by those who wait

    @property
    def count(self) -> int:
        return len(self._resident) + len(self._leaving)

    @property
    def bytes(self) -> int:
        """What the resident adapters take, those that leave included."""
        return sum(r.bytes for r in [*self._resident.values(), *self._leaving])

    def bytes_of(self, digests: Iterable[str]) -> float:
        """What these adapters take. One that is not resident counts as the largest so far; before the first load as a guess."""
        unknown = self._largest if self._largest is not None else GUESS_PART * self.budget_bytes
        return sum(r.bytes if (r := self._resident.get(d)) is not None else unknown for d in digests)

    @property
    def leases(self) -> int:
        return sum(r.leases for r in [*self._resident.values(), *self._leaving])

    @property
    def digests(self) -> list[str]:
        """The adapters that are there, or on their way."""
        return [*self._resident, *(r.digest for r in self._leaving), *self._wanted, *self._loading, *(p.digest for p in self._parked)]

    @property
    def busy(self) -> bool:
        """Whether a load has not ended, or waits for room."""
        return bool(self._wanted or self._loading or self._parked)

    def holds(self, digest: str) -> bool:
        return digest in self._resident

    def lease(self, digest: str) -> Resident | None:
        """One more user of a resident adapter; None if it is not there."""
        resident = self._resident.get(digest)
        if resident is not None:
            resident.leases += 1
            self._resident.move_to_end(digest)
        return resident

    def release(self, resident: Resident) -> None:
        """One user less."""
        assert resident.leases > 0, f"{resident.digest}: a lease is released twice"
        resident.leases -= 1
        if resident.leaving and not resident.leases:
            self._leaving.remove(resident)
            self.on_free(resident)

    def load(self, adapter: Servable) -> None:
        """Have it read and packed, unless it is there or on its way; `collect` says when."""
        digest = adapter.digest
        if digest not in self._resident and digest not in self._loading and all(p.digest != digest for p in self._parked):
            self._wanted.setdefault(digest, adapter)
            self._begin()

    def evict(self, digest: str) -> None:
        """No new leases; it is freed when the last one ends, and all that is kept of its digest with it."""
        for leaving in self._leaving:
            leaving.purge |= leaving.digest == digest
        resident = self._resident.get(digest)
        if resident is not None:
            resident.purge = True
            self._leave(resident)
        elif digest in self._wanted or digest in self._loading or any(p.digest == digest for p in self._parked):
            self._leave_at_once.add(digest)  # whoever waits for it still gets it

    def collect(self, waited_for: Container[str]) -> list[Loaded]:
        """Loads that have ended since the last call, as far as there is room. waited_for: digests for which requests wait: for them room is
        made by letting the adapter leave that was leased the longest ago. The caller leases what it wants, then calls `settle`."""
        while True:
            try:
                ended = self._ended.get_nowait()
            except Empty:
                break
            self.loads += 1  # here, and not where they run: several threads would lose some
            self.load_seconds += ended.seconds
            self._loading.discard(ended.digest)
            self._parked.append(ended)
            if ended.resident is not None:
                self._largest = ended.resident.bytes if self._largest is None else max(self._largest, ended.resident.bytes)
        done = []
        while self._parked and self._place(self._parked[0], self._parked[0].digest in waited_for):
            done.append(self._failed_if_too_large(self._parked.popleft()))
        self._begin()
        return done

    def settle(self) -> None:
        """After leases on what was collected: adapters that were to be evicted while they were loading leave."""
        self._fresh.clear()
        for digest in [d for d in self._leave_at_once if d in self._resident]:
            self._leave_at_once.discard(digest)
            self.evict(digest)

    # ---- room ----

    def _place(self, ended: Loaded, wanted: bool) -> bool:
        """Whether this load is settled: resident, failed, or dropped because no request waits for it and there is no room."""
        new = ended.resident
        if new is None or new.bytes > self.budget_bytes:
            self.failures += 1
            self._leave_at_once.discard(ended.digest)
            return True
        for resident in list(self._resident.values()):
            if self.bytes + new.bytes <= self.budget_bytes:
                break
            if not resident.leases and resident not in self._fresh:
                self._leave(resident)
        if self.bytes + new.bytes > self.budget_bytes:
            if not wanted:
                self._leave_at_once.discard(ended.digest)
                return True
            self._let_leave(self.bytes + new.bytes - self.budget_bytes)
            return False
        if self._arena is not None:  # it was read into memory of its own, since there may have been no room before
            new.packed = new.packed.moved_to(self._arena)
        self._resident[new.digest] = new
        self._fresh.append(new)
        return True

    def _failed_if_too_large(self, ended: Loaded) -> Loaded:
        new = ended.resident
        if new is None or new.bytes <= self.budget_bytes:
            return ended
        return Loaded(
            ended.digest,
            error=AdapterError(
                f"the adapter {ended.digest} takes {new.bytes} bytes in memory, all adapters together may take {self.budget_bytes}",
                fix="a larger budget (adapter_bytes), or a smaller adapter",
            ),
        )

    def _let_leave(self, missing: int) -> None:
        """Adapters in use get no new leases until the ones that leave free `missing` bytes: an adapter that is always busy must not keep
        others out."""
        missing -= sum(r.bytes for r in self._leaving)
        for resident in list(self._resident.values()):
            if missing <= 0:
                break
            if resident not in self._fresh:
                missing -= resident.bytes
                self._leave(resident)

    def _leave(self, resident: Resident) -> None:
        del self._resident[resident.digest]
        resident.leaving = True
        self.evictions += 1
        if resident.leases:
            self._leaving.append(resident)
        else:
            self.on_free(resident)

    # ---- loads ----

    def _begin(self) -> None:
        """Hand loads to the threads, none while one that is read finds no room."""
        while self._wanted and not self._parked and len(self._loading) < LOADERS:
            digest, adapter = self._wanted.popitem(last=False)
            self._loading.add(digest)
            self._handed[digest] = adapter
            try:
                self.loader.submit(self._run, digest)
            except RuntimeError as error:  # no more threads; one that is there may have taken it, or takes it later
                if self._handed.pop(digest, None) is not None:
                    full = OverloadedError(f"adapters cannot be read now: {error}", fix="try again later", retry_after=RETRY_S)
                    self._ended.put(Loaded(digest, error=full))
                    self.wake()

    def _run(self, digest: str) -> None:
        """On a loader's thread."""
        if (adapter := self._handed.pop(digest, None)) is None:
            return
        began = time.perf_counter()
        try:
            loaded = adapter.load()
            packed = self._pack(loaded)
            ended = Loaded(digest, Resident(digest, packed, packed_bytes(packed), loaded.head))
        except TrimtabError as error:
            ended = Loaded(digest, error=error)
        except Exception as error:  # whatever a file or a store does: it fails this adapter alone
            ended = Loaded(digest, error=AdapterError(f"the adapter {digest} could not be loaded: {type(error).__name__}: {error}"))
        self._ended.put(replace(ended, seconds=time.perf_counter() - began))
        self.wake()

    def _pack(self, adapter: Adapter) -> PackedAdapter:
        """Packed; residency alone keeps it. One at a time, since the first adapter at a module puts a host there; a prefix under the
        forward's lock, since the base may compute its keys and values."""
        if adapter.base is not self.base and adapter.base.fingerprint != self.base.fingerprint:
            raise AdapterError(
                f"this adapter was loaded for the base {adapter.base.name or adapter.base.fingerprint}, not for {self.base.name}"
            )
        with self._pack_lock:
            if any(not site.name for site in adapter.sites):
                with self._forward_lock:
                    return self.base.pack(adapter)
            return self.base.pack(adapter)


def packed_bytes(packed: PackedAdapter) -> int:
    """Memory of an adapter's packed tensors; a tensor that several places share counts once, a row of an arena with its padding."""
    tensors = [t for edit in packed.edits.values() for t in edit.tensors.values()]
    if packed.placed is not None:
        tensors = [packed.placed.arena.row(packed.placed.layout, packed.placed.row)]
    tensors += packed.stored_prefix() or ()
    tensors += (packed.head or {}).values()
    if packed.prefix is not None and packed.prefix.embeds_NH is not None:
        tensors.append(packed.prefix.embeds_NH)
    return sum({(t.data_ptr(), t.numel()): t.nbytes for t in tensors}.values())
