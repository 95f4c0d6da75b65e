"""How a base's chat template writes messages, found by rendering some; and whether a rendered text has all that it should have.

Training, generation, evaluation and serving all render through `Dialect.render`, so a message is treated alike in all of them:

- Content is text. Parts of text ({type: text, text}) are joined with line breaks. Some templates write nothing for a text but the text of a
  list of parts; for such a role each content is passed as one part. Some write a list as code or JSON; that does not count as its text.
- `developer` is rendered as the system turn, unless the template treats that role otherwise than a role that it cannot know.

Content counts as written if the text has it, except for white space around it (and around the tags of a reasoning block), or has it as a
JSON string, as some templates write results of tools. An assistant turn that is only context may lack its reasoning block, because
templates of reasoning models remove it from earlier turns.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.bases.beginnings import Beginnings
from trimtab.bases.sandbox import COPIES, MAX_WORK, Program, TooMuch
from trimtab.bases.watched import Beginning, Wanted
from trimtab.errors import DataError

Message = dict[str, str]

LOST = "the chat template does not render it"
REASONING = re.compile(r"(</?(?:seed:)?(?:think|thinking|thought|reasoning)>|\[/?THINK\]|◁/?think▷)")
NONE: Mapping[str, Any] = {}
OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Those that a rendering sets itself."""
KNOWN_SHAPES = 4096
"""Sequences of roles of which a dialect remembers what is lost."""


class BadRow(Exception):
    """This conversation or row cannot be used; the text is the reason ("kind: particulars"). Becomes a DataError or a dropped row."""


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


class Dialect:
    """One compiled template. variables: what it sees beside the messages. name: of its base, for errors. frames, openings: `Template`'s."""

    def __init__(self, text: str, variables: Mapping[str, Any], name: str = ""):
        self._text, self._variables, self._name = text, variables, name
        self._lost: dict[tuple[bool, tuple[str, ...]], frozenset[int]] = {}
        self._parts: dict[str, bool] = {}
        self.frames: dict[tuple[str, ...], tuple[str, str] | None] = {}
        self.openings: dict[tuple[str, ...], dict[int, str]] = {}
        try:
            self._program = Program(text)
        except TooMuch as error:
            raise self._stopped(error) from None
        except Exception as error:  # not jinja, or blocks that transformers has not
            raise BadRow(f"the chat template cannot be read: {error}") from None

    @property
    def reads(self) -> frozenset[str]:
        """The variables that a caller may set and the template looks at (enable_thinking)."""
        return self._program.names - OWN_VARIABLES - set(self._variables)

    def render(self, messages: Sequence[Message], *, generate: bool, variables: Mapping[str, Any] = NONE) -> str:
        """The conversation as text; generate: with the prompt for an assistant turn. variables: those of `reads` that are set.

        BadRow if the template refuses it; DataError that names the template where it loops or grows without end.
        """
        size = sum(len(m["content"]) for m in messages)
        return self._render([self._shaped(m) for m in messages], generate, size, variables)

    def finished(self, messages: Sequence[Message], wanted: Wanted) -> Finished | None:
        """The conversation as text, and the beginnings of it; None if the template refuses it, or cannot be followed."""
        if self._beginnings is None:
            return None
        shaped, size = [self._shaped(m) for m in messages], sum(len(m["content"]) for m in messages)
        budget = MAX_WORK + 3 * COPIES * size
        try:
            if not self._beginnings.flagged:
                return Finished(*self._beginnings.run(self._given(shaped, False), wanted, budget))
            text, found = self._beginnings.run(self._given(shaped, False), _of(wanted, False), budget)
            if asked := _of(wanted, True):
                other, more = self._beginnings.run(self._given(shaped, True), asked, budget)
                found |= _moved(more, other, text)
            return Finished(text, found)
        except Exception:  # what is wrong is said by those who render it plainly
            return None

    @functools.cached_property
    def _beginnings(self) -> Beginnings | None:
        try:
            return Beginnings(self._text)
        except Exception:
            return None

    def check(self, messages: Sequence[Message], text: str, *, generate: bool) -> None:
        """BadRow that names the first message whose content is missing in `text`, its rendering."""
        contents = [text_of(m["content"]).strip() for m in messages]
        lost = self._lost_by_role(messages, generate)
        if (missing := next((i for i, c in enumerate(contents) if c and i in lost), None)) is None:
            missing = _first_missing(contents, [m["role"] for m in messages], text)
        if missing is not None:
            raise BadRow(f"{LOST}: messages[{missing}] ({messages[missing]['role']})")

    def takes_parts(self, role: str) -> bool:
        """Whether a role's contents must be lists of parts: as texts they vanish, or are refused."""
        user, assistant = self._talk
        if role in ("user", "assistant"):
            return user if role == "user" else assistant
        if (known := self._parts.get(role)) is None:
            talk = [("user", user), ("assistant", assistant)]
            as_text, as_parts = (
                any(self._holds([*talk[:i], (role, parts), *talk[j:]]) for i, j in ((0, 0), (1, 1), (2, 1))) for parts in (False, True)
            )
            known = as_parts and not as_text
            if len(self._parts) >= KNOWN_SHAPES:
                self._parts.clear()
            self._parts[role] = known
        return known

    @functools.cached_property
    def _talk(self) -> tuple[bool, bool]:
        """Whether the user's and the assistant's contents must be parts; texts where no way holds both."""
        ways = ((False, False), (True, True), (True, False), (False, True))
        return next((way for way in ways if self._holds([*zip(("user", "assistant"), way, strict=True)])), (False, False))

    @functools.cached_property
    def knows_developer(self) -> bool:
        """Whether `developer` is a role of its own: it is written, and a role that no template knows is not."""
        known, unknown = ([(role, self.takes_parts(role)) for role in (first, "user")] for first in ("developer", "no such role"))
        return self._holds(known) and not self._holds(unknown)

    def _holds(self, turns: Sequence[tuple[str, bool]]) -> bool:
        """Whether turns of (role, whether its content is a list of parts) are written as their texts: a part's other values are not."""
        marks = [f"Zq{i}qZ" for i in range(len(turns))]
        shown = [[{"a": "Zp0pZ", "type": "text", "text": mark}] if parts else mark for mark, (_, parts) in zip(marks, turns, strict=True)]
        try:
            text = self._render([{"role": role, "content": c} for (role, _), c in zip(turns, shown, strict=True)], generate=False)
        except BadRow:
            return False
        return all(mark in text for mark in marks) and "Zp0pZ" not in text

    def _lost_by_role(self, messages: Sequence[Message], generate: bool) -> frozenset[int]:
        """Which messages of such roles are not written at all, whatever their content. Marker texts are searched for, since a short content
        may occur by chance."""
        key = (generate, tuple(m["role"] for m in messages))
        if (known := self._lost.get(key)) is None:
            marks = [f"Zq{i}qZ" for i in range(len(messages))]
            try:
                text = self.render([{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)], generate=generate)
                known = frozenset(i for i, mark in enumerate(marks) if mark not in text)
            except BadRow:  # a template that looks into the contents; they are looked for themselves
                known = frozenset()
            if len(self._lost) >= KNOWN_SHAPES:
                self._lost.clear()
            self._lost[key] = known
        return known

    def _shaped(self, message: Message) -> dict[str, Any]:
        role = "system" if message["role"] == "developer" and not self.knows_developer else message["role"]
        return {**message, "role": role, "content": _content(text_of(message["content"]), self.takes_parts(role))}

    def _render(self, messages: list[dict[str, Any]], generate: bool, size: int = 0, variables: Mapping[str, Any] = NONE) -> str:
        try:
            return self._program.render({**self._given(messages, generate), **variables}, size)
        except TooMuch as error:
            raise self._stopped(error) from None
        except Exception as error:  # what a template does to a conversation can go wrong in any way
            raise BadRow(f"the chat template refuses it: {error}") from None

    def _given(self, messages: list[dict[str, Any]], generate: bool) -> dict[str, Any]:
        return {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generate, **self._variables}

    def _stopped(self, error: TooMuch) -> DataError:
        of = f" of {self._name!r}" if self._name else ""
        return DataError(f"the chat template{of} was stopped: {error}", fix="use another base, or mend its chat template.")


def _of(wanted: Wanted, generate: bool) -> Wanted:
    return {j: (generate,) for j, flags in wanted.items() if generate in flags}


def _moved(found: Mapping[tuple[int, bool], Beginning], of: str, text: str) -> dict[tuple[int, bool], Beginning]:
    """Beginnings of one text as those of another."""
    same = common_start(of, text)
    return {key: (min(n, same), of[same:n] + tail) for key, (n, tail) in found.items()}


def common_start(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    if a == b or a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    low, high = 0, min(len(a), len(b))  # alike up to low, not up to high + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def text_of(content: Any) -> str:
    """A message's content as text; parts of text are joined with line breaks. BadRow on anything else."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(f"not text: the content is {type(content).__name__}, neither text nor a list of parts with text")
    return content


def is_whole(content: str, text: str) -> bool:
    """Whether `text` holds `content`, but for white space around it and around the tags of a reasoning block."""
    if content.strip() in text:
        return True
    parts, position = [p.strip() for p in REASONING.split(content)], 0
    for part in parts if len(parts) > 1 else [content.strip()]:
        if (found := text.find(part, position)) < 0:
            return False
        position = found + len(part)
    return True


def _content(text: str, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text


def _first_missing(contents: Sequence[str], roles: Sequence[str], text: str) -> int | None:
    """The first content that `text` does not hold, each in a place of its own; templates may move the system's turn."""
    position = 0
    for content in contents:  # nearly always they stand in order, and this is all
        position = text.find(content, position)
        if position < 0:
            break
        position += len(content)
    else:
        return None
    for i in sorted(range(len(contents)), key=lambda i: -len(contents[i])):
        found = next((form for form in _forms(contents[i], roles[i]) if form in text), None)
        if found is None:
            return i
        text = text.replace(found, "\0", 1) if found else text
    return None


def _forms(content: str, role: str) -> list[str]:
    """How a template may write a content: as it is, as a JSON string, without its reasoning."""
    forms = [content, *(json.dumps(content, ensure_ascii=a)[1:-1] for a in (False, True))]
    if role == "assistant" and (parts := REASONING.split(content))[1:]:
        forms.append(parts[-1].strip())
    return forms
