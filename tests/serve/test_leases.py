"""Limits that several servers share: never exceeded, whoever asks where and whenever; nothing is lost with a dead server."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from trimtab.errors import LimitError
from trimtab.serve.admission import Admission, Ticket
from trimtab.serve.exchange import IDLE_SECONDS, LEASE_SECONDS
from trimtab.serve.leases import SAFETY_SECONDS, Leases, Unshared
from trimtab.serve.opening import open_database
from trimtab.serve.tenant import Tenant
from trimtab.serve.tenants import Tenants


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Server:
    """One of those that share, without a thread: parts are exchanged when a test says so."""

    def __init__(self, where: str | Path, clock: Clock | None = None):
        self.clock = clock or Clock()
        self.leases = Leases(open_database(where), self.clock)
        self.leases.sync()
        self.admission = Admission(1000, self.clock, leases=self.leases)

    def ask(self, tenant: Tenant, n: int = 1, tokens: int | None = None, *, rounds: int = 2) -> Ticket | None:
        """As a request is admitted: exchanges while its part is too small."""
        for _ in range(rounds):
            if not self.leases.short(tenant, n):
                break
            self.leases.sync()
        try:
            return self.admission.admit(tenant, n, tokens)
        except LimitError:
            return None


Make = Callable[[], Server]


@pytest.fixture
def server(where: str | Path) -> Iterator[Make]:
    """Makes servers that share one database."""
    Tenants(where, create=True).close()
    made: list[Server] = []

    def make() -> Server:
        made.append(Server(where))
        return made[-1]

    yield make
    for s in made:
        s.leases.close()


def two(server: Make) -> tuple[Server, Server]:
    a, b = server(), server()
    a.leases.sync()  # it hears of b
    return a, b


def test_two_servers_never_have_more_answers_under_way_than_one_may(server: Make) -> None:
    a, b = two(server)
    eight = Tenant("eight", "eight", max_concurrent=8)
    held = [t for i in range(40) if (t := (a, b)[i % 2].ask(eight)) is not None]
    assert len(held) == 8
    held.pop().close()
    a.leases.sync()
    b.leases.sync()
    assert sum(s.ask(eight) is not None for s in (a, b)) == 1


@pytest.mark.parametrize("most", [1, 2, 3, 7, 32])
def test_one_server_may_have_all_of_it(server: Make, most: int) -> None:
    """Whoever routes by adapter sends a tenant to one server."""
    a, b = two(server)
    tenant = Tenant("t", "t", max_concurrent=most)
    first = b.ask(tenant)
    assert first is not None
    first.close()
    held = list[Ticket | None]()
    for _ in range(5):  # a second; it keeps a few spare ones, and those only while many are free
        held += [a.ask(tenant) for _ in range(most + 5)]
        b.leases.sync()
    assert sum(t is not None for t in held) == most
    assert b.ask(tenant) is None


def test_a_part_that_is_held_costs_no_look_at_the_database(server: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = two(server)
    tenant = Tenant("t", "t", max_concurrent=64, tokens_per_minute=100_000)
    first = a.ask(tenant, 1, 10)
    assert first is not None
    a.leases.sync()
    monkeypatch.setattr(a.leases, "_database", None)
    tickets = [a.ask(tenant, 1, 10) for _ in range(4)]
    assert all(tickets)
    for t in (first, *tickets):
        assert t is not None
        t.close(12)


def test_tokens_are_overdrawn_by_one_request_for_each_server_at_most(server: Make) -> None:
    servers = [server() for _ in range(3)]
    minute, charge = 6000, 50
    tenant, began, used, draw = Tenant("t", "t", max_concurrent=None, tokens_per_minute=minute), time.time(), 0, random.Random(0)
    refused = 0
    while refused < 20:
        for s in servers:
            s.leases.sync()
        ticket = draw.choice(servers).ask(tenant, 1, charge)
        if ticket is None:
            refused += 1
        else:
            ticket.close(charge)
            used += charge
    refilled = (time.time() - began) * minute / 60
    assert used <= minute + refilled + len(servers) * charge
    assert used >= minute - len(servers) * charge, "and all of them can be used"


def test_tokens_do_not_pile_up_where_they_are_held(server: Make) -> None:
    """A server that holds all of a tenant's tokens lets no others come into being beside them."""
    a = server()
    tenant = Tenant("t", "t", max_concurrent=None, tokens_per_minute=600)
    for _ in range(3):
        a.leases.short(tenant, 1)
        with a.leases._database.writing(a.leases._handle) as db:
            db.execute("UPDATE buckets SET filled = filled - 3600")  # an hour later
        a.leases.sync()
    assert a.leases.tokens_left(tenant) == pytest.approx(600, abs=1)


def test_what_was_charged_too_much_comes_back_and_debts_are_everybodys(server: Make) -> None:
    a, b = two(server)
    tenant = Tenant("t", "t", max_concurrent=None, tokens_per_minute=600)
    large = a.ask(tenant, 1, 300)
    assert large is not None
    large.close(5000)
    a.leases.sync()
    assert a.ask(tenant) is None and b.ask(tenant) is None
    with pytest.raises(LimitError) as caught:
        b.admission.admit(tenant)
    assert caught.value.retry_after == pytest.approx(4400 * 60 / 600, rel=0.05)


def test_a_dead_servers_answers_are_given_back_when_its_lease_ends(server: Make) -> None:
    a, b = two(server)
    four = Tenant("four", "four", max_concurrent=4)
    assert [a.ask(four) is not None for _ in range(4)] == [True] * 4
    assert b.ask(four) is None
    with b.leases._database.writing(b.leases._handle) as db:
        db.execute("UPDATE replicas SET seen = seen - ? WHERE id = ?", (LEASE_SECONDS + 1, a.leases.exchange.replica))
    b.leases.sync()
    assert [b.ask(four) is not None for _ in range(5)] == [True] * 4 + [False]
    assert b.leases.servers == 1

    a.clock.now += LEASE_SECONDS - SAFETY_SECONDS + 0.1
    with pytest.raises(Unshared) as caught:  # it was only cut off: by now it admits nobody
        a.admission.admit(four)
    assert caught.value.http_status == 503
    a.leases.sync()
    assert a.ask(four) is None and b.ask(four) is None, "both hold what they have until it ends, and get no more"


def test_a_server_that_ends_gives_all_back_at_once(server: Make) -> None:
    a, b = two(server)
    tenant = Tenant("t", "t", max_concurrent=4, tokens_per_minute=600)
    assert a.ask(tenant, 4, 100) is not None
    a.leases.give_back()
    b.leases.sync()
    assert b.leases.servers == 1
    assert b.ask(tenant, 4, 100) is not None
    assert b.leases.tokens_left(tenant) == pytest.approx(400, abs=5)


def test_a_tenant_that_stays_away_leaves_nothing_behind(server: Make) -> None:
    a = server()
    tenant = Tenant("t", "t", max_concurrent=4, tokens_per_minute=600)
    ticket = a.ask(tenant)
    assert ticket is not None
    ticket.close()
    a.clock.now += IDLE_SECONDS + 1
    a.leases.sync()
    assert not a.leases._parts
    with a.leases._database.reading(a.leases._handle) as db:
        assert db.execute("SELECT count(*) FROM leases").fetchone()[0] == 0


def test_a_failed_exchange_loses_nothing(server: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = two(server)
    tenant = Tenant("t", "t", max_concurrent=8, tokens_per_minute=600)
    assert a.ask(tenant, 1, 10) is not None
    before = a.leases.tokens_left(tenant)
    a.leases._parts["t"].share = 0.0  # the next exchange would give all back
    monkeypatch.setattr(a.leases.exchange, "run", lambda *_: 1 / 0)
    waits = a.leases.exchanged()
    with pytest.raises(ZeroDivisionError):
        a.leases.sync()
    assert waits.done() and a.leases.tokens_left(tenant) == before


class Sharing(RuleBasedStateMachine):
    """Three servers, exchanges at any time, servers that die: beside plain counters."""

    MOST = 5

    @initialize(folder=st.just(None))
    def begin(self, folder: None) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "t.db"
        Tenants(self.path, create=True).close()
        self.servers = [Server(self.path) for _ in range(3)]
        self.tenant = Tenant("t", "t", max_concurrent=self.MOST)
        self.held: list[list[Ticket]] = [[], [], []]

    @rule(i=st.integers(0, 2), n=st.integers(1, 3), rounds=st.integers(0, 2))
    def ask(self, i: int, n: int, rounds: int) -> None:
        if (ticket := self.servers[i].ask(self.tenant, n, rounds=rounds)) is not None:
            self.held[i].append(ticket)

    @rule(i=st.integers(0, 2), which=st.integers(0, 100))
    def end(self, i: int, which: int) -> None:
        if self.held[i]:
            self.held[i].pop(which % len(self.held[i])).close(10)

    @rule(i=st.integers(0, 2))
    def exchange(self, i: int) -> None:
        self.servers[i].leases.sync()

    @rule(i=st.integers(0, 2))
    def replace(self, i: int) -> None:
        """A server ends, and another one comes."""
        self.servers[i].leases.close()
        self.held[i] = []
        self.servers[i] = Server(self.path)

    @invariant()
    def within_the_limit(self) -> None:
        if hasattr(self, "held"):
            assert sum(t.n for tickets in self.held for t in tickets) <= self.MOST

    def teardown(self) -> None:
        if hasattr(self, "servers"):
            for s in self.servers:
                s.leases.close()
            self.folder.cleanup()


Sharing.TestCase.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
TestSharing = Sharing.TestCase
