"""How a base's chat template writes conversations.

Training, generation, evaluation and serving all render through `Dialect.render`, so a message is treated alike in all of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.bases.beginnings import Beginnings
from trimtab.bases.remembered import remembered
from trimtab.bases.sandbox import COPIES, MAX_WORK
from trimtab.bases.shaping import NONE, Shaper
from trimtab.bases.skeleton import LONGEST, Content, Skeleton, Skeletons, beginning_of
from trimtab.bases.tool_turns import PROBE_TOOLS, BadRow, Message, Shape, called, marked, shape_of, size_of
from trimtab.bases.watched import Beginning, Wanted
from trimtab.bases.written import LOST, common_start, first_missing, text_of

Kind = tuple[Shape | bytes, str]
LONG = 64
"""Messages of a conversation that is remembered by a digest of its shape: there may be any number of different ones, of 100 bytes a
message."""


def sketched(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Variables with tools that stand for any others: what a template writes around contents depends on whether there are tools, not on
    what they are."""
    return {**variables, "tools": PROBE_TOOLS} if variables.get("tools") else variables


def kind_of(shape: Shape, variables: Mapping[str, Any]) -> Kind:
    """By what it is remembered what a template writes around the contents of such messages, with these variables."""
    short: Shape | bytes = shape if len(shape) <= LONG else hashlib.sha256(repr(shape).encode()).digest()
    return short, json.dumps(sketched(variables), default=str, sort_keys=True) if variables else ""


def dialect_of(tokenizer: Any) -> Dialect:
    """The dialect of a tokenizer's chat template, kept by what decides it. BadRow or DataError if the template cannot be compiled."""
    try:
        text = tokenizer.get_chat_template()
    except ValueError as error:  # several named templates, none of them for plain conversations
        raise BadRow(f"the chat template refuses it: {error}") from None
    return _kept(text, json.dumps(tokenizer.special_tokens_map, default=str), str(tokenizer.name_or_path or ""))


@functools.lru_cache(maxsize=32)
def _kept(text: str, specials: str, name: str) -> Dialect:
    return Dialect(text, json.loads(specials), name)


@dataclass(frozen=True)
class Finished:
    """A rendered conversation m. beginnings: (j, generate) -> render(m[:j], generate), as far as they were found."""

    text: str
    beginnings: Mapping[tuple[int, bool], Beginning]


class Dialect(Shaper):
    """One compiled template. frames, openings: what `Template` remembers of it."""

    def __init__(self, text: str, variables: Mapping[str, Any], name: str = ""):
        super().__init__(text, variables, name)
        self._lost: dict[tuple[bool, Kind], frozenset[int]] = {}
        self._skeleton_of: dict[Any, Skeleton | None] = {}
        self.frames: dict[Kind, tuple[str, str]] = {}
        self.openings: dict[Kind, dict[int, str]] = {}

    def render(self, messages: Sequence[Message], *, generate: bool, variables: Mapping[str, Any] = NONE) -> str:
        """The conversation as text; generate: with the prompt for an assistant turn. variables: those of `reads` that are set, and `tools`.

        BadRow if the template refuses it, or would leave out tools or calls; DataError that names the template where it loops or grows
        without end.
        """
        return self._render(self._shaped_all(messages, variables), generate, sum(map(size_of, messages)), variables)

    def finished(self, messages: Sequence[Message], wanted: Wanted, variables: Mapping[str, Any] = NONE) -> Finished | None:
        """The conversation as text, and the beginnings of it; None if the template refuses it, or cannot be followed."""
        if not variables and is_plain(messages) and (skeleton := self.skeleton([m["role"] for m in messages], wanted)) is not None:
            return Finished(*skeleton.filled([m["content"] for m in messages]))
        if self._beginnings is None:
            return None
        try:
            shaped = self._shaped_all(messages, variables)
        except BadRow:
            return None
        budget = MAX_WORK + 3 * COPIES * sum(map(size_of, messages))
        try:
            if not self._beginnings.flagged:
                return Finished(*self._beginnings.run(self._given(shaped, False, variables), wanted, budget))
            text, found = self._beginnings.run(self._given(shaped, False, variables), _of(wanted, False), budget)
            if asked := _of(wanted, True):
                other, more = self._beginnings.run(self._given(shaped, True, variables), asked, budget)
                found |= _moved(more, other, text)
            return Finished(text, found)
        except Exception:  # what is wrong is said by those who render it plainly
            return None

    def skeleton(self, roles: Sequence[str], wanted: Wanted) -> Skeleton | None:
        """What is written for these roles whatever the contents; None where that is not known."""
        if len(roles) > LONGEST or self._skeletons is None:
            return None
        wanted = {j: tuple(flags) for j, flags in wanted.items()}
        return remembered(self._skeleton_of, (tuple(roles), *wanted.items()), lambda: self._skeleton_for(roles, wanted))

    def _skeleton_for(self, roles: Sequence[str], wanted: Wanted) -> Skeleton | None:
        assert self._skeletons is not None
        told = [self._shaped({"role": role, "content": ""}) for role in roles]
        for i, m in enumerate(told):
            content = Content(((i, False),))
            m["content"] = [{"type": "text", "text": content}] if isinstance(m["content"], list) else content
        try:
            whole = self._skeletons.pieces(self._given(told, False, NONE))
            begun = {
                (j, flag): beginning_of(whole, self._skeletons.pieces(self._given(told[:j], flag, NONE)))
                for j, flags in wanted.items()
                for flag in flags
            }
        except Exception:  # it looks at a content, or what is wrong is said by those who render it plainly
            return None
        return Skeleton(whole, begun)

    @functools.cached_property
    def _skeletons(self) -> Skeletons | None:
        try:
            return Skeletons(self._text)
        except Exception:
            return None

    @functools.cached_property
    def _beginnings(self) -> Beginnings | None:
        try:
            return Beginnings(self._text)
        except Exception:
            return None

    def check(self, messages: Sequence[Message], text: str, *, generate: bool, variables: Mapping[str, Any] = NONE) -> None:
        """BadRow that names the first message whose content or call is missing in `text`, its rendering."""
        contents = [text_of(m["content"]).strip() for m in messages]
        lost = self._lost_by_role(messages, generate, variables)
        if (missing := next((i for i, c in enumerate(contents) if c and i in lost), None)) is None:
            owners, roles = list(range(len(messages))), [m["role"] for m in messages]
            for i, message in enumerate(messages):
                if said := called(message):
                    contents, owners, roles = [*contents, *said], [*owners, *[i] * len(said)], [*roles, *["call"] * len(said)]
            found = first_missing(contents, roles, text)
            missing = None if found is None else owners[found]
        if missing is not None:
            raise BadRow(f"{LOST}: messages[{missing}] ({messages[missing]['role']})")

    def _lost_by_role(self, messages: Sequence[Message], generate: bool, variables: Mapping[str, Any]) -> frozenset[int]:
        """Which messages of such roles are not written at all, whatever their content. Marker texts are searched for, since a short content
        may occur by chance."""
        shape = shape_of(messages)

        def find() -> frozenset[int]:
            talk = [m | mark for m, mark in zip(messages, marked(shape), strict=True)]
            try:
                text = self.render(talk, generate=generate, variables=sketched(variables))
            except BadRow:  # a template that looks into the contents; they are looked for themselves
                return frozenset()
            return frozenset(i for i, m in enumerate(talk) if m["content"] not in text)

        return remembered(self._lost, (generate, kind_of(shape, variables)), find)


def is_plain(messages: Sequence[Message]) -> bool:
    """Whether messages have a role and a text, and nothing else."""
    return all(len(m) == 2 and type(m["content"]) is str for m in messages)


def _of(wanted: Wanted, generate: bool) -> Wanted:
    return {j: (generate,) for j, flags in wanted.items() if generate in flags}


def _moved(found: Mapping[tuple[int, bool], Beginning], of: str, text: str) -> dict[tuple[int, bool], Beginning]:
    """Beginnings of one text as those of another."""
    same = common_start(of, text)
    return {key: (min(n, same), of[same:n] + tail) for key, (n, tail) in found.items()}
