"""The contract of a place: which ranks a run has, which rows each of them takes, and what travels between them.

Every rank does the same in the same order: it reads all rows, draws the same batches, steps the same optimizers. So all of them hold the
same variants, and what a variant decides (its best step, its end) it decides alike everywhere. Three things differ. Rows that go through a
model are shared out. What is computed of them is added up, or put together again, so that every rank has all of it. And what leaves the
processes (files, messages, rewards that are asked) is done by the first rank alone.

`Place` itself is the place of one process: it shares nothing out and waits for nobody. `Ranks` overrides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trimtab.places.shards import Shards

T = TypeVar("T")


class RankLost(TrimtabError):
    """Ranks cannot go on together: one does not answer any more, or has come to something else. trained: whether steps had been made."""

    trained = False


class Place:
    """One process. rank: its number among `ranks`, from 0. here: how many of them are on this machine."""

    rank: int = 0
    ranks: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and tells the user."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Whether this is the first of the ranks that have not been lost."""
        return True

    @property
    def restarted(self) -> bool:
        """Whether these ranks stand in for others that have ended early."""
        return False

    def share(self, costs: Sequence[float]) -> Sequence[int]:
        """The numbers, ascending, of those items that this rank takes. costs: of each item, in any unit; every rank is given the same."""
        return range(len(costs))

    def each(self, costs: Sequence[float], work: Callable[[Sequence[int]], Sequence[T]]) -> Sequence[T]:
        """A result for each item, on every rank. work: computes those of the items with the numbers that it is given."""
        return work(range(len(costs)))

    def added(self, values: Sequence[T]) -> Sequence[T]:
        """The sum over ranks of each value, by its own `+`."""
        return values

    def add(self, tensor: Tensor) -> None:
        """Put the sum over ranks into a tensor."""

    def add_gradients(self, leaves: Iterable[Iterable[Tensor]]) -> None:
        """Put the sum over ranks into the gradients of these leaves. A leaf that has one on some rank has one on all of them afterwards."""

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return number

    def once(self, work: Callable[[], T]) -> T:
        """What `work` gives on the first rank, on every rank; the others wait for it."""
        return work()

    def agree(self, what: Mapping[str, Any]) -> None:
        """ConfigError that names the keys whose values differ from those of the first rank."""

    def shards(self) -> Shards | None:
        """What shares a base out over the ranks, the same at each call; None where this process holds all of it."""
        return None

    def device(self, asked: str | torch.device | None) -> str | torch.device | None:
        """The device of this rank, where the run file asks for `asked` (None: the best that there is)."""
        return asked

    def told(self) -> AbstractContextManager[None]:
        """While a command runs: a TrimtabError that several ranks raise is raised once, by the first of them; the others exit without a
        word."""
        return nullcontext()


ONE_PROCESS = Place()
