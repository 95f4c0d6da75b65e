"""The messages and loops of a conversation as a template sees them that is followed by `beginnings`: they note what is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.utils import Namespace as AnyNamespace

from trimtab.bases.sandbox_names import Namespace
from trimtab.bases.template_loops import Unproved, unproved

END = 1 << 60
"""Seen: that no further item follows, or how many there are."""
Beginning = tuple[int, str]
"""render(m[:j]) as (how many characters of render(m) begin it, what follows them)."""
Wanted = Mapping[int, Sequence[bool]]
"""j -> whether with the generation prompt, or both."""
Tail = Callable[["Talk", int, int, bool, "Rest"], str | None]


class Talk:
    """One run. tail: gives what the template writes where the messages end. seen: the furthest item that the template has looked at.
    visible: where the messages end for whoever looks now."""

    def __init__(self, tail: Tail, items: list[Any], wanted: Wanted):
        self.tail, self.items, self.wanted = tail, items, wanted
        self.visible, self.seen, self.written, self.peeking = len(items), -1, 0, False
        self.found: dict[tuple[int, bool], Beginning] = {}
        self.given: dict[str, Any] = {}
        self.context: Any = None
        self.begun: dict[int, int] = {}
        self.first: dict[int, int] = {}

    def end(self, loop: int, end: int, rest: Rest) -> None:
        """The messages could end here: nothing behind `end` has been seen."""
        for generate in self.wanted[end]:
            if (text := self.tail(self, loop, end, generate, rest)) is not None:
                self.found[end, generate] = (self.written, text)

    def begins(self, loop: int) -> None:
        """The body of the loop begins."""
        count = self.begun[loop] = self.begun.get(loop, -1) + 1
        item = self.first[loop] + count
        if self.seen <= item and item + 1 in self.wanted:
            self.end(loop, item + 1, Rest((self.items[item],), count, self.items[item - 1] if count else None))


class View:
    """The messages from one on, as a template sees them: it notes what is looked at, and refuses what it does not know."""

    __slots__ = ("first", "loop", "talk")

    def __init__(self, talk: Talk, first: int, loop: int | None = None):
        self.talk, self.first, self.loop = talk, first, loop

    def __iter__(self) -> Iterator[Any]:
        talk, i = self.talk, self.first
        while i < talk.visible:
            if talk.seen < i:
                if self.loop is not None and i in talk.wanted and not talk.peeking:
                    talk.end(self.loop, i, _NOTHING)
                talk.seen = i
            yield talk.items[i]
            i += 1
        talk.seen = END

    def __getitem__(self, key: Any) -> Any:
        talk = self.talk
        if isinstance(key, slice) and key.stop is None and key.step is None and (key.start is None or key.start >= 0):
            return View(talk, self.first + (key.start or 0))
        if isinstance(key, int) and key >= 0:
            if self.first + key >= talk.visible:
                talk.seen = END
                raise IndexError(key)
            talk.seen = max(talk.seen, self.first + key)
            return talk.items[self.first + key]
        if isinstance(key, slice | int):
            talk.seen = END
            return talk.items[self.first : talk.visible][key]
        raise Unproved(f"messages[{key!r}]")

    def __len__(self) -> int:
        self.talk.seen = END
        return max(self.talk.visible - self.first, 0)

    def __bool__(self) -> bool:
        talk, there = self.talk, self.first < self.talk.visible
        talk.seen = max(talk.seen, self.first) if there else END
        return there

    def __reversed__(self) -> Iterator[Any]:
        self.talk.seen = END
        return reversed(self.talk.items[self.first : self.talk.visible])

    def __eq__(self, other: object) -> bool:
        raise Unproved("messages are compared")

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        raise Unproved("messages are written out")

    __repr__ = __str__


class Rest(tuple[Any, ...]):
    """Items that a loop has left, `begun` of which it has had, the last one `before`."""

    begun: int
    before: Any

    def __new__(cls, items: Sequence[Any], begun: int, before: Any) -> Rest:
        self = super().__new__(cls, items)
        self.begun, self.before = begun, before
        return self


_NOTHING = Rest((), 0, None)


class Loop(LoopContext):
    """`loop`; it says when it looks ahead, and goes on where another stopped."""

    def __init__(self, iterable: Any, undefined: Any, recurse: Any = None, depth0: int = 0):
        super().__init__(iterable, undefined, recurse, depth0)
        self.talk = iterable.talk if type(iterable) is View else None
        if type(iterable) is Rest:
            self.index0, self._length, self._current = iterable.begun - 1, iterable.begun + len(iterable), iterable.before

    def _peek_next(self) -> Any:
        if self.talk is None:
            return super()._peek_next()
        self.talk.peeking = True
        try:
            return super()._peek_next()
        finally:
            self.talk.peeking = False


_FIXED = (str, int, float, bool, type(None), list, tuple, dict, View, Undefined)


def copied(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The template's variables, namespaces copied. Macros are left out: the tail has its own, which see its variables."""
    copies: dict[int, Namespace] = {}
    found: dict[str, Any] = {}
    for name, value in variables.items():
        if isinstance(value, AnyNamespace):
            if id(value) not in copies:
                attributes = object.__getattribute__(value, "_Namespace__attrs")
                if not all(isinstance(v, _FIXED) for v in attributes.values()):
                    unproved("a namespace holds what cannot be copied")
                copies[id(value)] = Namespace(attributes)
            found[name] = copies[id(value)]
        elif isinstance(value, _FIXED):
            found[name] = value
        elif not isinstance(value, Macro):
            unproved(f"{name} is a {type(value).__name__}")
    return found
