"""Threads for work: tenants take turns, and none holds more than one thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from trimtab.errors import OverloadedError
from trimtab.http import work as work_module
from trimtab.http.work import Turns, Work


def test_a_tenant_with_much_work_does_not_hold_up_another():
    work, gate, ran = Work("test", threads=2), threading.Event(), []

    async def both() -> None:
        slow = [asyncio.create_task(work.run("a", lambda i=i: (gate.wait(10), ran.append(f"a{i}")))) for i in range(20)]
        await asyncio.sleep(0.01)
        for i in range(3):
            await asyncio.wait_for(work.run("b", lambda i=i: ran.append(f"b{i}")), 5)
        assert ran == ["b0", "b1", "b2"]
        gate.set()
        await asyncio.wait_for(asyncio.gather(*slow), 5)

    asyncio.run(both())
    assert ran[3:] == [f"a{i}" for i in range(20)], "one after the other, in order"


def test_those_who_wait_take_turns():
    work, gate, ran = Work("test", threads=1), threading.Event(), []

    async def all_of_them() -> None:
        first = asyncio.create_task(work.run("z", lambda: gate.wait(10)))
        await asyncio.sleep(0.01)
        rest = [asyncio.create_task(work.run(t, lambda t=t: ran.append(t))) for t in "aaabbc"]
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(first, *rest)

    asyncio.run(all_of_them())
    assert "".join(ran) == "abcaba"


def test_errors_and_cancellations_leave_the_threads_free():
    work, gate, ran = Work("test", threads=1), threading.Event(), []

    async def use() -> None:
        with pytest.raises(ZeroDivisionError):
            await work.run("a", lambda: 1 // 0)
        busy = asyncio.create_task(work.run("a", lambda: gate.wait(10)))
        dropped = asyncio.create_task(work.run("a", lambda: ran.append("dropped")))
        await asyncio.sleep(0.01)
        dropped.cancel()
        await asyncio.sleep(0.01)
        gate.set()
        await busy
        assert await work.run("a", lambda: 7) == 7

    asyncio.run(use())
    assert ran == []


def test_a_tenant_whose_job_no_thread_could_take_is_not_shut_out(monkeypatch):
    work = Work("test", threads=1)

    def no_thread(job):
        raise RuntimeError("can't start new thread")

    async def use() -> None:
        with monkeypatch.context() as m:
            m.setattr(work._pool, "submit", no_thread)
            for tenant in ("a", "b"):
                with pytest.raises(OverloadedError, match="can't start new thread"):
                    await work.run(tenant, lambda: 1 // 0)
        assert await asyncio.wait_for(work.run("a", lambda: 7), 5) == 7
        assert await asyncio.wait_for(work.run("b", lambda: 8), 5) == 8

    asyncio.run(use())
    work.close()  # the thread puts its things away after its result
    assert not work._waiting and not work._busy


def test_many_requests_at_once_begin_one_at_a_time_beside_those_of_others():
    turns, began = Turns(), []

    async def one(tenant: str) -> None:
        await turns.take(tenant)
        began.append(tenant)

    async def all_of_them() -> None:
        many = [asyncio.create_task(one("a")) for _ in range(50)]
        await asyncio.sleep(0)
        for _ in range(3):
            before = len(began)
            await asyncio.create_task(one("b"))
            assert began[before:].count("b") == 1 and began[before:].count("a") <= 2
        many[30].cancel()
        await asyncio.gather(*many, return_exceptions=True)
        assert began.count("a") == 49

    for _ in range(2):  # on another loop too, where those of the first are gone
        began.clear()
        asyncio.run(all_of_them())

    async def with_a_pause() -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        for t in "ba":
            await one(t)
        await asyncio.gather(one("a"), one("a"))
        assert loop.time() - start >= 1.8 * work_module.PAUSE_S, "another tenant was there just now"

    asyncio.run(with_a_pause())

    async def left_behind() -> None:
        for _ in range(5):
            asyncio.create_task(one("a"))  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(left_behind())
    began.clear()
    asyncio.run(asyncio.wait_for(one("a"), 5))
    assert began == ["a"]
