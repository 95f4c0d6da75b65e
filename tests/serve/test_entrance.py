"""Who enters next: the order of a plain loop over all tenants and requests, in time that grows as what waits does."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace

import pytest

from trimtab.serve.entrance import MIN_CHUNK, Entrance


class Live(SimpleNamespace):
    """Known by identity, as the scheduler's are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def made(serial, tenant, tokens, loaded=True):
    return Live(serial=serial, request=SimpleNamespace(tenant=tenant), remaining=tokens, loaded=loaded, unsaid=None)


def plain(waiting, returning, counters, share, claimed, budget, left):
    """The rule, looked up anew for each: the tenant with the smallest counter that may, its preempted before its new ones."""

    def may(tenant):
        mine = sum(min(c.remaining, MIN_CHUNK) for c in claimed if c.request.tenant == tenant)
        all_rows = sum(min(c.remaining, MIN_CHUNK) for c in claimed)
        return mine < left.get(tenant, mine + 1) and (all_rows < budget or mine < budget * share(tenant))

    for tenant in sorted({*waiting, *(r.request.tenant for r in returning)}, key=lambda t: (counters[t], t)):
        mine = [r for r in returning if r.request.tenant == tenant] + [w for w in waiting.get(tenant, ()) if w.loaded]
        if may(tenant) and mine:
            return mine[0]
    return None


@pytest.mark.parametrize("seed", range(40))
def test_the_order_is_that_of_a_plain_loop(seed):
    """With preemptions on the way, tenants that hold back, and requests whose adapters are not loaded."""
    rng = random.Random(seed)
    tenants = [f"t{i}" for i in range(rng.randrange(1, 6))]
    counters = {t: float(rng.randrange(50)) for t in tenants}
    one = lambda serial, loaded=True: made(serial, rng.choice(tenants), rng.randrange(1, 300), loaded)  # noqa: E731
    running = [one(i) for i in range(rng.randrange(4))]
    returning = sorted((one(10 + i) for i in range(rng.randrange(4))), key=lambda r: r.serial)
    waiting: dict[str, deque] = {}
    for i in range(rng.randrange(40)):
        new = one(20 + i, loaded=rng.random() < 0.7)
        waiting.setdefault(new.request.tenant, deque()).append(new)
    before = {t: list(q) for t, q in waiting.items()}
    shares = SimpleNamespace(of=lambda tenant: 1 / len(tenants))
    budget, left = rng.choice([100, 600, 3000]), {t: rng.randrange(1, 400) for t in tenants if rng.random() < 0.3}
    entrance, claimed, entered = Entrance(waiting, returning, lambda r: r.loaded, counters, shares, budget, left), [], set()
    for r in running:
        entrance.claim(r)
        claimed.append(r)
    rest, back = {t: list(q) for t, q in waiting.items()}, list(returning)
    for _ in range(100):
        want = plain(rest, back, counters, shares.of, claimed, budget, left)
        assert entrance.next() is want
        if want is None:
            break
        if claimed and rng.random() < 0.2:
            gone = rng.choice(claimed)
            claimed.remove(gone)
            back = sorted([*back, gone], key=lambda r: r.serial)
            entrance.preempted(gone)
            continue
        tenant = want.request.tenant
        if want in back:
            back.remove(want)
        else:
            waiting[tenant].remove(want)
            rest[tenant].remove(want)
            counters[tenant] += want.remaining
        entered.add(want)
        claimed.append(want)
        entrance.entered(want)
    assert {t: list(q) for t, q in waiting.items()} == {t: [r for r in q if r not in entered] for t, q in before.items()}


def test_requests_whose_adapters_are_not_loaded_are_looked_at_once_a_step():
    asked = []
    queue = deque(made(i, "a", 1, loaded=i >= 100) for i in range(200))
    entrance = Entrance({"a": queue}, [], lambda r: asked.append(r) or r.loaded, {"a": 0.0}, SimpleNamespace(of=lambda t: 1.0), 10**6, {})
    for _ in range(100):
        queue.remove(found := entrance.next())
        entrance.entered(found)
    assert entrance.next() is None
    assert len(asked) == 200
    assert [r.serial for r in queue] == list(range(100))
