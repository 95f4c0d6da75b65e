"""How long an answer would wait: exact where answers take the same time, whatever came and went before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import OverloadedError
from trimtab.serve.admission import Admission, Ticket
from trimtab.serve.places import FIRST_GUESS, Places
from trimtab.serve.tenant import LOCAL


def test_answers_that_began_together_end_together() -> None:
    places = Places(3)
    first = places.enter(0.0, 3)
    assert places.wait(0.1) == pytest.approx(FIRST_GUESS - 0.1), "no place comes free in between"
    second = places.enter(0.2, 2)
    assert places.wait(0.9) == pytest.approx(0.1), "the third place of the same round"
    places.enter(0.9, 1)
    assert places.wait(0.9) == pytest.approx(0.1 + FIRST_GUESS), "one round more"
    places.leave(1.5, first)
    assert [a.began for a in second] == [1.5, 1.5], "late, as those before were"
    assert places.seconds == pytest.approx(FIRST_GUESS + 0.5 * (1 - 0.9**3))


def test_of_several_answers_the_last_one_counts() -> None:
    places = Places(3)
    places.enter(0.0, 1)
    assert places.wait(0.4, 2) == 0.0 and places.wait(0.4, 3) == pytest.approx(FIRST_GUESS - 0.4)
    assert places.wait(0.4, 4) == pytest.approx(FIRST_GUESS), "behind those two that would begin now"
    admission = Admission(10, lambda: 0.0, places=2, max_wait=0.25)
    with pytest.raises(OverloadedError):
        admission.admit(LOCAL, 3)
    admission.admit(LOCAL, 2)


def test_who_should_have_ended_may_do_so_at_any_moment() -> None:
    places = Places(1)
    places.enter(0.0, 1)
    assert places.wait(50.0) == 0.0


@given(st.lists(st.tuples(st.floats(0.01, 5.0), st.integers(1, 3), st.booleans()), max_size=60))
def test_waits_come_true_where_all_take_as_long(steps: list[tuple[float, int, bool]]) -> None:
    """Against a simulation: each place is busy until a time, who comes takes the one that is free first."""
    places, now = Places(4), 0.0
    inside: list[tuple[float, object]] = []  # when each ends, in order
    for pause, n, gives_up in steps:
        now += pause
        for end, answers in [e for e in inside if e[0] <= now]:
            places.leave(end, answers)  # type: ignore[arg-type]
        inside = [e for e in inside if e[0] > now]
        busy = sorted(end for end, _ in inside)
        expected = 0.0 if len(busy) < 4 else busy[-4] - now
        assert places.wait(now) == pytest.approx(expected, abs=1e-6)
        for _ in range(n):
            wait = places.wait(now)
            inside.append((now + wait + FIRST_GUESS, places.enter(now, 1)))
        if gives_up and places._waiting:
            end, answers = inside.pop()
            places.leave(now, answers)  # type: ignore[arg-type]
    assert places.seconds == pytest.approx(FIRST_GUESS)


def test_no_one_comes_in_who_would_wait_too_long() -> None:
    now = 100.0
    admission = Admission(10, lambda: now, places=2, max_wait=0.25)
    inside: list[Ticket] = [admission.admit(LOCAL) for _ in range(2)]
    assert admission.full
    with pytest.raises(OverloadedError, match="full") as caught:
        admission.admit(LOCAL)
    assert caught.value.retry_after == pytest.approx(FIRST_GUESS)
    now += 0.8
    inside.append(admission.admit(LOCAL))
    assert not admission.full
    inside[0].close()
    now += 0.25
    inside[1].close()
    assert not admission.full, "a place is free"
    admission.admit(LOCAL)
    assert admission.full, "one was let in 0 s ago, one 0.25 s ago"
    assert +admission.rejects == {"full": 1}
