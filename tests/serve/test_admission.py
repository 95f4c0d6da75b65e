"""Who comes in: bounds that hold whatever happens, waits that are true, and refusals that cost nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from trimtab.errors import LimitError, OverloadedError, TrimtabError
from trimtab.serve.admission import FIRST_GUESS, FIRST_TOKENS, Admission, Ticket
from trimtab.serve.tenant import LOCAL, Tenant


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


FREE = Tenant("free", "free", max_concurrent=None)


def test_a_tenants_answers_at_a_time_are_bounded_alone() -> None:
    admission = Admission(10, Clock())
    two = Tenant("two", "two", max_concurrent=2)
    first, _ = admission.admit(two), admission.admit(two)
    with pytest.raises(LimitError, match="limit of 2") as caught:
        admission.admit(two)
    assert caught.value.http_status == 429 and not isinstance(caught.value, OverloadedError)
    admission.admit(FREE)
    first.close()
    admission.admit(two)
    assert admission.open == 3 and +admission.rejects == {"concurrency": 1}


def test_n_answers_count_n_and_what_can_never_fit_is_no_wait() -> None:
    admission = Admission(4, Clock())
    admission.admit(FREE, 3)
    with pytest.raises(OverloadedError, match="full") as caught:
        admission.admit(FREE, 2)
    assert caught.value.http_status == 503 and caught.value.retry_after > 0
    for n, tenant in ((5, FREE), (0, FREE), (-1, FREE), (3, Tenant("x", "x", max_concurrent=2))):
        with pytest.raises(TrimtabError, match=f"n = {n}") as never:
            admission.admit(tenant, n)
        assert never.value.http_status == 400
    assert admission.open == 3


def test_a_tenant_over_its_own_limit_hears_that_also_when_the_server_is_full() -> None:
    admission = Admission(1, Clock())
    one = Tenant("one", "one", max_concurrent=1)
    admission.admit(one)
    with pytest.raises(LimitError) as caught:
        admission.admit(one)
    assert caught.value.http_status == 429


def test_tokens_are_charged_at_the_start_and_corrected_at_the_end() -> None:
    clock = Clock()
    admission, tenant = Admission(10, clock), Tenant("t", "t", tokens_per_minute=600)
    assert admission.tokens_left(tenant) == 600 and admission.tokens_left(FREE) is None
    ticket = admission.admit(tenant, estimate=500)
    assert admission.tokens_left(tenant) == 100
    ticket.close(200)
    assert admission.tokens_left(tenant) == 400
    admission.admit(tenant, estimate=100).close(150)
    assert admission.tokens_left(tenant) == 250
    clock.now += 10
    assert admission.tokens_left(tenant) == 350
    clock.now += 1000
    assert admission.tokens_left(tenant) == 600, "no more than a minute's worth is saved up"


@pytest.mark.parametrize("overdrawn", [600, 601, 1234, 100_000])
def test_the_wait_for_tokens_is_exact(overdrawn: int) -> None:
    clock = Clock()
    admission, tenant = Admission(10, clock), Tenant("t", "t", tokens_per_minute=600)
    admission.admit(tenant, estimate=overdrawn)
    with pytest.raises(LimitError, match="600 tokens a minute") as caught:
        admission.admit(tenant)
    wait = caught.value.retry_after
    clock.now += wait - 0.02
    with pytest.raises(LimitError):
        admission.admit(tenant)
    clock.now += 0.03
    admission.admit(tenant)


def test_without_an_estimate_the_tenants_own_mean_is_charged() -> None:
    clock = Clock()
    admission, tenant = Admission(10, clock), Tenant("t", "t", tokens_per_minute=100_000)
    admission.admit(tenant, 2).close(2 * 1000)
    assert admission.tokens_left(tenant) == 98_000
    clock.now += 60
    for _ in range(200):
        admission.admit(tenant).close(50)
    clock.now += 60
    ticket = admission.admit(tenant, 3)
    assert ticket.estimate == pytest.approx(150, rel=1e-3) and admission.tokens_left(tenant) == pytest.approx(100_000 - 150, rel=1e-4)
    assert admission.admit(Tenant("new", "new", tokens_per_minute=10)).estimate == FIRST_TOKENS


def test_the_wait_for_a_place_follows_how_long_answers_take() -> None:
    clock = Clock()
    admission, tenant = Admission(100, clock), Tenant("t", "t", max_concurrent=4)

    def wait() -> float:
        held = [admission.admit(tenant) for _ in range(4)]
        with pytest.raises(LimitError) as caught:
            admission.admit(tenant)
        for ticket in held:
            ticket.close()
        return caught.value.retry_after

    assert wait() == FIRST_GUESS / 4
    for _ in range(100):
        ticket = admission.admit(tenant)
        clock.now += 20
        ticket.close()
    assert wait() == pytest.approx(20 / 4, rel=0.01)


def test_a_changed_limit_counts_at_once() -> None:
    clock = Clock()
    admission, tenant = Admission(10, clock), Tenant("t", "t", max_concurrent=5, tokens_per_minute=600)
    open_before = admission.admit(tenant, 2, estimate=0)
    with pytest.raises(LimitError):
        admission.admit(replace(tenant, max_concurrent=2))
    assert admission.tokens_left(replace(tenant, tokens_per_minute=60)) == 60
    unlimited = replace(tenant, tokens_per_minute=None)
    admission.admit(unlimited)
    open_before.close(10_000)
    admission.admit(unlimited)


def test_closing_twice_changes_nothing() -> None:
    admission, tenant = Admission(10, Clock()), Tenant("t", "t", tokens_per_minute=600)
    kept = admission.admit(tenant, estimate=0)
    with admission.admit(tenant, estimate=100) as ticket:
        ticket.close(40)
    ticket.close(40)
    ticket.close(0)
    assert admission.open == 1 and admission.tokens_left(tenant) == 560
    kept.close()
    assert admission.open == 0


def test_a_ticket_of_a_request_that_failed_gives_everything_back() -> None:
    admission, tenant = Admission(10, Clock()), Tenant("t", "t", tokens_per_minute=600)
    with pytest.raises(ZeroDivisionError), admission.admit(tenant, 2, estimate=300):
        raise ZeroDivisionError
    assert admission.open == 0 and admission.tokens_left(tenant) == 600


def test_a_draining_server_lets_nobody_in() -> None:
    admission = Admission(10, Clock())
    ticket = admission.admit(LOCAL)
    admission.drain()
    with pytest.raises(OverloadedError, match="shutting down") as caught:
        admission.admit(LOCAL)
    assert caught.value.retry_after > 0
    ticket.close()
    assert admission.open == 0 and +admission.rejects == {"draining": 1}


def test_a_server_that_holds_nothing_is_refused() -> None:
    with pytest.raises(TrimtabError, match="max_open = 0"):
        Admission(0)


def test_refusals_cost_microseconds() -> None:
    admission, tenant = Admission(1), Tenant("t", "t", tokens_per_minute=1000)
    admission.admit(FREE)
    began = time.perf_counter()
    for _ in range(2000):
        with pytest.raises(OverloadedError):
            admission.admit(tenant)
    assert (time.perf_counter() - began) / 2000 < 0.001  # some 10 µs with pytest's part; three orders below the 50 ms that are promised


def test_many_threads_never_exceed_the_bound_and_leave_nothing() -> None:
    admission, tenant = Admission(5), Tenant("t", "t", max_concurrent=3)
    inside, most, lock = [0, 0], [0, 0], threading.Lock()

    def use(who: int) -> None:
        mine = (tenant, FREE)[who]
        for i in range(300):
            try:
                ticket = admission.admit(mine, 1 + i % 2)
            except LimitError:
                continue
            with lock:
                inside[who] += ticket.n
                most[who] = max(most[who], inside[who])
                assert sum(inside) <= 5 and inside[0] <= 3
            with lock:
                inside[who] -= ticket.n
            ticket.close(1)
            ticket.close(1)

    threads = [threading.Thread(target=use, args=(i % 2,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert admission.open == 0 and most[0] >= 1 and inside == [0, 0]
    for _ in range(3):
        admission.admit(tenant)  # all three places are free again


class Life(RuleBasedStateMachine):
    """Requests of four tenants come and go at random times; estimates are true upper bounds."""

    tickets = Bundle("tickets")
    MAX_OPEN = 6
    TENANTS = (
        Tenant("a", "a", max_concurrent=2, tokens_per_minute=60),
        Tenant("b", "b", max_concurrent=None, tokens_per_minute=600),
        Tenant("c", "c", max_concurrent=3),
        FREE,
    )

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.admission = Admission(self.MAX_OPEN, self.clock)
        self.open: list[Ticket] = []
        self.largest = dict.fromkeys((t.id for t in self.TENANTS), 0)

    @rule(target=tickets, who=st.sampled_from(TENANTS), n=st.integers(1, 3), estimate=st.integers(0, 200))
    def come(self, who: Tenant, n: int, estimate: int) -> Ticket | None:
        held = sum(t.n for t in self.open if t.tenant == who)
        left = self.admission.tokens_left(who)
        try:
            ticket = self.admission.admit(who, n, estimate)
        except LimitError as error:
            full = sum(t.n for t in self.open) + n > self.MAX_OPEN
            over = who.max_concurrent is not None and held + n > who.max_concurrent
            kept = held > 0 and held + n > max(1, 4 * (self.MAX_OPEN - sum(t.n for t in self.open) - n))
            assert error.retry_after > 0 and (full or over or kept or (left is not None and left < 1)), "refused without a reason"
            return None
        except TrimtabError:
            assert who.max_concurrent is not None and n > who.max_concurrent
            return None
        self.open.append(ticket)
        self.largest[who.id] = max(self.largest[who.id], estimate)
        return ticket

    @rule(ticket=consumes(tickets), share=st.floats(0, 1), again=st.booleans())
    def go(self, ticket: Ticket | None, share: float, again: bool) -> None:
        if ticket is not None:
            ticket.close(int(share * ticket.estimate))
            if again:
                ticket.close(1000)
            self.open.remove(ticket)

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def bounds_hold(self) -> None:
        assert self.admission.open == sum(t.n for t in self.open) <= self.MAX_OPEN
        for tenant in self.TENANTS:
            assert tenant.max_concurrent is None or sum(t.n for t in self.open if t.tenant == tenant) <= tenant.max_concurrent
            left = self.admission.tokens_left(tenant)
            assert left is None or -self.largest[tenant.id] < left <= (tenant.tokens_per_minute or 0)

    def teardown(self) -> None:
        for ticket in self.open:
            ticket.close(0)
        assert self.admission.open == 0
        self.clock.now += 3600
        assert all(self.admission.tokens_left(t) == t.tokens_per_minute for t in self.TENANTS)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_one_tenants_backlog_leaves_room_for_others() -> None:
    """Tenants without limits of their own that take all they get: there is always room for one more that comes."""
    admission, tenants = Admission(320, Clock()), [Tenant(f"t{i}", f"t{i}", max_concurrent=None) for i in range(6)]

    def flood(tenant: Tenant) -> int:
        for count in range(400):
            try:
                admission.admit(tenant)
            except LimitError as error:
                assert error.http_status == 429 and "kept for other tenants" in error.message
                return count
        raise AssertionError("it took everything")

    assert flood(tenants[0]) == 256, "four fifths"
    assert flood(tenants[1]) == 51 and flood(tenants[2]) == 10, "of what is left"
    assert admission.open < 320 and not admission.full


def test_a_local_server_has_nobody_to_keep_room_for() -> None:
    admission = Admission(4, Clock())
    for _ in range(4):
        admission.admit(LOCAL)
    with pytest.raises(OverloadedError):
        admission.admit(LOCAL)


def test_a_long_queue_of_one_is_no_long_wait_for_another() -> None:
    """The scheduler makes way for a tenant below its share, so --max-wait is not for it."""
    admission = Admission(100, Clock(), places=4, max_wait=0.1)
    greedy, modest = Tenant("greedy", "greedy", max_concurrent=None), Tenant("modest", "modest")
    for _ in range(4):
        admission.admit(greedy)
    with pytest.raises(OverloadedError):
        admission.admit(greedy)
    assert admission.full
    for _ in range(2):
        admission.admit(modest)
    with pytest.raises(OverloadedError):
        admission.admit(modest)
