"""An estimate of how long a new request would wait, from the times at which the running answers began and how long an answer takes.

Answers that began together end together. So places do not become free evenly: a wait may be close to zero, or as long as a whole answer.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

FIRST_GUESS = 1.0
"""Seconds that an answer is assumed to take before any has ended."""
MEMORY = 0.1
"""Weight of the newest in a running mean."""


@dataclass(eq=False)
class Answer:
    """An admitted answer. began: when its computation began; None while it waits."""

    began: float | None = None


class Places:
    """`count` answers are computed at a time; more wait, in order of arrival. Times are the caller's clock's; one thread at a time."""

    def __init__(self, count: int):
        self.count = count
        self.seconds = FIRST_GUESS  # that an answer is computed
        self._computed: list[Answer] = []  # who began first, first
        self._waiting: deque[Answer] = deque()

    def wait(self, now: float, n: int = 1) -> float:
        """Seconds until the last of n more answers would begin. Answers that should have ended by now are assumed to end at once."""
        before = len(self._computed) + len(self._waiting) + n - 1 - self.count
        if before < 0:
            return 0.0
        rounds, place = divmod(before, self.count)
        began = [now if a.began is None else a.began for a in self._computed] + [now] * (self.count - len(self._computed))
        return max(0.0, began[place] + self.seconds - now) + rounds * self.seconds

    def enter(self, now: float, n: int) -> tuple[Answer, ...]:
        answers = tuple(Answer() for _ in range(n))
        self._waiting += answers
        self._fill(now)
        return answers

    def leave(self, now: float, answers: tuple[Answer, ...]) -> None:
        """They are over, whether they were computed or not."""
        for answer in answers:
            if answer.began is None:
                self._waiting.remove(answer)
            else:
                self._computed.remove(answer)
                self.seconds += MEMORY * (now - answer.began - self.seconds)
        self._fill(now)

    def _fill(self, now: float) -> None:
        while self._waiting and len(self._computed) < self.count:
            self._computed.append(self._waiting.popleft())
            self._computed[-1].began = now
