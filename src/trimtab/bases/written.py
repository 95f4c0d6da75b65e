"""Whether a rendered text has all that messages say.

Content counts as written if the text has it, except for white space around it (and around the tags of a reasoning block), or has it as a
JSON string, as some templates write results of tools. An assistant turn that is only context may lack its reasoning block, because
templates of reasoning models remove it from earlier turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from trimtab.bases.tool_turns import BadRow, Message, called

LOST = "the chat template does not render it"
REASONING = re.compile(r"(</?(?:seed:)?(?:think|thinking|thought|reasoning)>|\[/?THINK\]|◁/?think▷)")


def text_of(content: Any) -> str:
    """A message's content as text; parts of text are joined with line breaks, null is none. BadRow on anything else."""
    if content is None:
        return ""
    if isinstance(content, list) and content and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRow(f"not text: the content is {type(content).__name__}, neither text nor a list of parts with text")
    return content


def is_whole(message: Message, text: str) -> bool:
    """Whether `text` holds a turn's content and calls, but for white space around them and around the tags of a reasoning block."""
    if not _holds_content(message["content"], text):
        return False
    return not message.get("tool_calls") or all(any(form in text for form in forms_of(part, "call")) for part in called(message))


def _holds_content(content: str, text: str) -> bool:
    if content.strip() in text:
        return True
    parts, position = [p.strip() for p in REASONING.split(content)], 0
    for part in parts if len(parts) > 1 else [content.strip()]:
        if (found := text.find(part, position)) < 0:
            return False
        position = found + len(part)
    return True


def first_missing(contents: Sequence[str], roles: Sequence[str], text: str) -> int | None:
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
        found = next((form for form in forms_of(contents[i], roles[i]) if form in text), None)
        if found is None:
            return i
        text = text.replace(found, "\0", 1) if found else text
    return None


def forms_of(content: str, role: str) -> list[str]:
    """How a template may write a content: as it is, as a JSON string, without its reasoning."""
    forms = [content, *(json.dumps(content, ensure_ascii=a)[1:-1] for a in (False, True))]
    if role == "assistant" and (parts := REASONING.split(content))[1:]:
        forms.append(parts[-1].strip())
    if role == "call":
        forms.append(repr(content)[1:-1])
    return forms


def opened(prompt: str) -> str:
    """The tag of a reasoning block that a prompt ends with; "" where there is none."""
    tags = list(REASONING.finditer(prompt))
    bare = prompt.rstrip()
    return tags[-1][0] if tags and tags[-1].end() == len(bare) and "/" not in tags[-1][0] else ""


def common_start(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    if a == b or a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    low, high = 0, min(len(a), len(b))  # alike up to low, not up to high + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
