"""How a base's answers write calls of tools, and reasoning: found by rendering a call that stands out, not by the model's name.

A call is `before` NAME `middle` ARGUMENTS, the next one `between` NAME `middle` ARGUMENTS, and `after` ends them. Arguments stand as

    JSON     Hermes, Qwen 2.5 and 3, SmolLM3, Llama 3, Mistral, DeepSeek; gpt-oss ("harmony"), whose headers vary
    tagged   `key` NAME `value` TEXT `close` for each; texts as they are, all else as JSON: Qwen 3.5, GLM, Nemotron

Where a template writes calls otherwise, nothing is found, and calls are read only if the tokenizer has a response template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.bases.template import Template
from trimtab.bases.tool_turns import PROBE_NUMBER, PROBE_TOOLS, PROBE_VALUE, BadRow, Message, probe_call, probe_name
from trimtab.bases.written import REASONING, common_start
from trimtab.errors import DataError

HARMONY = ("<|channel|>", "<|message|>")
"""Control tokens of gpt-oss, whose answers are messages with headers; a call's header names its recipient."""
TAG = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
REASONS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"))
PROBE_KEYS = ("zqkeya", "zqkeyb")


@dataclass(frozen=True)
class Tagged:
    """`key` NAME `value` TEXT `close`"""

    key: str
    value: str
    close: str


@dataclass(frozen=True)
class CallFormat:
    """opening: the text with which calls begin. anywhere: it may stand behind other text; else it begins the answer. between: None where
    an answer has one call at most. end: the control token behind calls, if it is not the one behind plain answers. tagged: None for JSON.
    """

    before: str
    middle: str
    after: str
    between: str | None
    opening: str
    anywhere: bool
    tagged: Tagged | None = None
    end: str | None = None
    harmony: bool = False


@dataclass(frozen=True)
class AnswerFormat:
    """tools: whether the template writes tools into the prompt. calls: None if it does not show how they are written. reasoning: the tags
    around it, if answers have any. response: the tokenizer's own response template."""

    tools: bool = False
    calls: CallFormat | None = None
    reasoning: tuple[str, str] | None = None
    response: Mapping[str, Any] | None = None


def answer_format(template: Template) -> AnswerFormat:
    """What a base's answers look like."""
    response = getattr(template.tokenizer, "response_template", None)
    response = response if isinstance(response, Mapping) and _is_read(response) else None
    try:
        text = str(template.tokenizer.get_chat_template()) if template.exists else ""
        reasoning = next((tags for tags in REASONS if tags[1] in text), None)
        return AnswerFormat(template.knows_tools, call_format(template), reasoning, response)
    except (BadRow, DataError, ValueError):  # a template that cannot be used says so when a conversation is to be rendered
        return AnswerFormat()


def _is_read(response: Mapping[str, Any]) -> bool:
    """Whether transformers takes this response template."""
    from transformers.utils.chat_parsing import ResponseParser

    try:
        ResponseParser(dict(response), prefix="", tools=[])
    except Exception:  # it has no error of its own
        return False
    return True


def call_format(template: Template) -> CallFormat | None:
    """How the template writes calls; None if it writes none, or in a way that is not known here."""
    one = _written(template, [0]) if template.knows_tools else None
    if one is None:
        return None
    two = _written(template, [0, 1])
    before, middle, tagged, rest = one
    between = None if two is None else two[3].partition(probe_name(1))[0]
    after, end = _ended(template, rest, between or "")
    opening, told = _opening(template, before)
    harmony = all(mark in template.special_texts for mark in HARMONY)
    return CallFormat(before, middle, after, between, opening, told or harmony, tagged, end, harmony)


def _written(template: Template, numbers: list[int]) -> tuple[str, str, Tagged | None, str] | None:
    """An answer that makes these calls, in parts: what stands before the first one's name, between that and its arguments, how they are
    tagged, and what stands behind them. None if the template does not write it so."""
    calls = [probe_call(n) for n in numbers]
    messages: list[Message] = [{"role": "user", "content": "Zq0qZ"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    variables, name = {"tools": PROBE_TOOLS}, probe_name(0)
    try:
        prompt = template.prompt(messages[:1], variables)
        whole = template.render(messages, generate=False, variables=variables)
    except BadRow:
        return None
    before, found, rest = whole[common_start(prompt, whole) :].partition(name)
    if not found or name in rest:
        return None
    before = REASONING.split(before)[-1].lstrip("\n")  # not blanks: gpt-oss writes one behind the role
    for brace in re.finditer(r"\{", rest):
        try:
            value, end = json.JSONDecoder().raw_decode(rest, brace.start())
        except ValueError:
            continue
        if value == calls[0]["function"]["arguments"]:
            return before, rest[: brace.start()], None, rest[end:]
    return _tagged(before, rest)


def _tagged(before: str, rest: str) -> tuple[str, str, Tagged, str] | None:
    """The same of arguments that are no JSON."""
    marks = (PROBE_KEYS[0], f"{PROBE_VALUE}0z", PROBE_KEYS[1], str(PROBE_NUMBER))
    found = re.fullmatch("(.*?)" + "(.*?)".join(map(re.escape, marks)) + "(.*)", rest, re.DOTALL)
    if found is None:
        return None
    head, value, turn, other, tail = found.groups()
    if value != other:  # texts are quoted, which is another way
        return None
    for i in sorted(range(len(turn)), key=lambda i: (turn[i] != "<", i)):  # the next key begins with its tag
        close, key = turn[:i], turn[i:]
        if head.endswith(key) and tail.startswith(close) and close:
            return before, head.removesuffix(key), Tagged(key, value, close), tail.removeprefix(close)
    return None


def _ended(template: Template, rest: str, between: str) -> tuple[str, str | None]:
    """(what ends the calls, the control token behind them if it is not that of plain answers), of all that follows the last call."""
    shared = common_start(rest, between)
    specials = [found for found in template.specials.finditer(rest) if found.end() > shared]
    end = next((found for found in specials if found[0] in template.ends), specials[-1] if specials else None)
    if end is None:
        return rest.rstrip(), None
    return rest[: end.start()].rstrip(), None if end[0] in template.ends else end[0]


def _opening(template: Template, before: str) -> tuple[str, bool]:
    """What calls are told by: the first tag or added token (then True), or else all that stands before the first name."""
    bare = before.strip()
    added = max((text for text in template.tokenizer.get_added_vocab() if bare.startswith(text)), key=len, default="")
    tag = TAG.match(bare)
    found = added or (tag[0] if tag else "")
    return found or bare, bool(found)
