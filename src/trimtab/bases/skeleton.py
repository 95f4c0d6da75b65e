"""What a chat template writes for messages of given roles, with places for their contents: found once, then filled in for every row.

Most templates write contents and never look at them. Such a template is run once on contents that can be written, joined with other text
and stripped. Whatever else a template does with one (a test, a comparison, a filter, a method) raises `Looked`, and the template is run on
every row as before. If the run ends, it has not seen the contents. So it would have done the same with any others, and its text is the one
that was found, with those in their places.

Text that is collected before it is written (by a macro, a block that is set) could be looked at: `Looked` too, if it holds a content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes

from trimtab.bases.sandbox import COPIES, MAX_WORK, Bounds, Environment
from trimtab.bases.watched import Beginning

LONGEST = 8
"""Messages of a conversation at most: every beginning costs a run, so that longer ones are left to `beginnings`."""
VARYING = frozenset({"strftime_now", "random"})
TRUE_OF_TEXT = {"defined": True, "string": True, "sequence": True, "iterable": True}
FALSE_OF_TEXT = dict.fromkeys(("undefined", "none", "mapping", "number", "integer", "float", "boolean", "callable"), False)
OF_TEXT = TRUE_OF_TEXT | FALSE_OF_TEXT
"""Tests whose answer is the same for every text."""

Place = tuple[int, bool]
"""The content of a message by its number; whether it is stripped."""
Piece = str | Place


class Looked(Exception):
    """A template looks at a content, or may."""


def _looked(*_: Any, **__: Any) -> NoReturn:
    raise Looked


class Content:
    """Text around places. All that is done with it but joining and stripping raises `Looked`; a method that is missing would be taken for a
    value that is not there."""

    __slots__ = ("pieces",)
    pieces: tuple[Piece, ...]

    def __init__(self, pieces: tuple[Piece, ...]):
        self.pieces = pieces

    def __add__(self, other: Any) -> Content:
        return Content((*self.pieces, *_pieces(other)))

    def __radd__(self, other: Any) -> Content:
        return Content((*_pieces(other), *self.pieces))

    def strip(self, *chars: Any) -> Content:
        if chars or len(self.pieces) != 1 or isinstance(self.pieces[0], str):
            raise Looked
        return Content(((self.pieces[0][0], True),))

    __getattr__ = __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __str__ = __repr__ = __format__ = _looked
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __index__ = __int__ = __float__ = _looked


def _pieces(value: Any) -> tuple[Piece, ...]:
    if type(value) is Content:
        return value.pieces
    if type(value) is str:
        return (value,)
    raise Looked


class _Written(str):
    """What stands for a content in the pieces that a run writes."""

    content: Content

    def __str__(self) -> str:
        return self


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> Any:
    if type(value) is not Content:
        context.environment.spend(context.environment._weight(value))
        return value
    written = _Written()
    written.content = value
    return written


def _collected(written: Iterable[str]) -> str:
    """The text of a macro, a block that is set, `self.block()`, …: jinja2 joins what they write."""
    pieces = list(written)
    if any(type(piece) is _Written for piece in pieces):
        raise Looked
    return "".join(pieces)


class _Blind(Environment):
    """The sandbox, for contents that nobody may look at."""

    concat = staticmethod(_collected)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.finalize = _finalize
        self.tests = {name: _guarded(test, OF_TEXT.get(name)) for name, test in self.tests.items()}
        self.filters = {name: _guarded(function) for name, function in self.filters.items()}
        self.filters["trim"] = lambda value, *chars: value.strip(*chars) if type(value) is Content else str(value).strip(*chars)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is Content and attribute != "strip":
            raise Looked
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) is Content:  # of what cannot be indexed, jinja2 takes the attribute of this name
            raise Looked
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and (type(left) is Content or type(right) is Content):
            raise Looked
        return super().call_binop(context, operator, left, right)


def _guarded(function: Any, of_text: bool | None = None) -> Any:
    """A filter or test that raises `Looked` if it gets a content, or answers what is true of every text."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        given = [*args[skipped:], *kwargs.values()]
        if not any(type(value) is Content for value in given):
            return function(*args, **kwargs)
        if of_text is None or len(given) > 1:
            raise Looked
        return of_text

    mark = "jinja_pass_arg"
    skipped = int(hasattr(function, mark))
    if skipped:
        setattr(guarded, mark, getattr(function, mark))
    return guarded


@dataclass(frozen=True)
class Skeleton:
    """pieces: of a rendered conversation. beginnings: of each of its beginnings that is wanted, (how many whole pieces of it begin it, how
    many characters of the next, the pieces that follow)."""

    pieces: tuple[Piece, ...]
    beginnings: Mapping[tuple[int, bool], tuple[int, int, tuple[Piece, ...]]]

    @property
    def begins_itself(self) -> bool:
        """Whether each beginning that is wanted begins the whole, whatever the contents."""
        return not any("".join(map(str, rest)) for _, _, rest in self.beginnings.values())

    def filled(self, contents: Sequence[str]) -> tuple[str, dict[tuple[int, bool], Beginning]]:
        """(the text, its beginnings) with these contents."""
        texts = fill(self.pieces, contents)
        ends = [0, *accumulate(map(len, texts))]
        found = {key: (ends[k] + more, "".join(fill(rest, contents))) for key, (k, more, rest) in self.beginnings.items()}
        return "".join(texts), found


def fill(pieces: Sequence[Piece], contents: Sequence[str]) -> list[str]:
    """Pieces as texts."""
    return [p if isinstance(p, str) else contents[p[0]].strip() if p[1] else contents[p[0]] for p in pieces]


class Skeletons:
    """A template, ready to be run so. Looked where it cannot be followed."""

    def __init__(self, text: str):
        self._environment = environment = _Blind()
        tree = environment.parse(text)
        names = {n.name for n in tree.find_all(nodes.Name)} | {f.name for f in tree.find_all(nodes.Filter)}
        if not names.isdisjoint(VARYING):
            raise Looked
        code = environment.compile(Bounds().visit(tree))
        self._template = environment.template_class.from_code(environment, code, environment.make_globals(None))

    def pieces(self, variables: Mapping[str, Any]) -> tuple[Piece, ...]:
        """What is written, texts joined. variables: what the template gets; the messages have `Content`s. Raises what the template raises,
        TooMuch, or Looked."""
        with self._environment.budget(MAX_WORK):
            context = self._template.new_context(dict(variables))
            written = [_pieces(getattr(piece, "content", piece)) for piece in self._template.root_render_func(context)]
        runs = groupby((p for several in written for p in several), key=lambda p: isinstance(p, str))
        found: list[Piece] = []
        for is_text, run in runs:
            found += ["".join(str(p) for p in run)] if is_text else list(run)
        if sum(not isinstance(p, str) for p in found) > COPIES * len(variables["messages"]):
            raise Looked  # a rendering that copies contents so often is left to the sandbox's budget
        return tuple(found)


def beginning_of(pieces: Sequence[Piece], wanted: Sequence[Piece]) -> tuple[int, int, tuple[Piece, ...]]:
    """What a `Skeleton` says of the beginning `wanted` of `pieces`."""
    k = next((k for k, (a, b) in enumerate(zip(pieces, wanted, strict=False)) if a != b), min(len(pieces), len(wanted)))
    if k == len(wanted):
        return k, 0, ()
    mine, other = (pieces[k] if k < len(pieces) else ""), wanted[k]
    if not isinstance(mine, str) or not isinstance(other, str):
        return k, 0, tuple(wanted[k:])
    more = next((n for n, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), min(len(mine), len(other)))
    return k, more, (other[more:], *wanted[k + 1 :])
