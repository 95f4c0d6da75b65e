"""Tools of a chat: what the template gets of them, which grammar holds an answer to them, and who reads the calls.

auto: a lazy grammar, which binds once the answer has begun a call; where a schema cannot be followed and no tool is strict, the answer goes
on without it. required, or a function by name: a grammar over the whole answer. none: the template gets no tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trimtab.bases.call_grammar import CallGrammar, TooLarge
from trimtab.bases.calls import AnswerFormat
from trimtab.decode.answers import Reader, reader_of
from trimtab.errors import nearest
from trimtab.http.errors import Fault
from trimtab.http.messages import AllowedTools, NamedTool
from trimtab.http.prompts import shown_tools
from trimtab.http.schema import ChatBody
from trimtab.http.services import Words
from trimtab.serve.grammar import MAX_CALL_CHARS
from trimtab.serve.request import Grammar, SamplingParams, Trigger

TAIL = 256
"""Tokens at the end of a prompt in which it is seen what the template has begun of the answer."""


@dataclass(frozen=True)
class Tools:
    """shown: as the template takes them. schemas: of the arguments, by the names of those that may be called. forced: the answer makes a
    call. many: it may make several. strict: arguments must follow their schema, or the request fails."""

    shown: list[dict[str, Any]]
    schemas: Mapping[str, dict[str, Any]]
    forced: bool
    many: bool
    strict: bool


def tools_in(body: ChatBody, words: Words) -> Tools | None:
    """The tools of a chat; None if there are none, or none may be called. Fault (400) if they contradict the choice, or if the base's
    template knows none."""
    choice = body.tool_choice
    given = {} if body.tools is None else {tool.function.name: tool.function for tool in body.tools}
    if choice == "none" or (not given and choice in (None, "auto")):
        return None
    if not given:
        raise Fault("tool_choice: there are no tools", param="tool_choice", code="invalid_value")
    if body.tools is not None and len(given) < len(body.tools):
        raise Fault("tools: two functions have one name", param="tools", code="invalid_value")
    shown = shown_tools(body, words)
    assert shown is not None
    names = _chosen(choice, given)
    forced = choice == "required" or isinstance(choice, NamedTool) or (isinstance(choice, AllowedTools) and choice.told.mode == "required")
    unknown = "how this base writes calls is not known from its chat template"
    if forced and words.answers.calls is None:
        raise Fault(f"tool_choice: {unknown}, so none can be forced; auto and none are taken", param="tool_choice", code="not_supported")
    if (strict := any(given[name].strict for name in names)) and words.answers.calls is None:
        raise Fault(f"tools: {unknown}, so none can be strict; leave strict out", param="tools", code="not_supported")
    return Tools(
        shown,
        {name: given[name].parameters or {} for name in names},
        forced,
        body.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
        strict,
    )


def _chosen(choice: Any, given: Mapping[str, Any]) -> list[str]:
    """Names of the tools that may be called."""
    if isinstance(choice, NamedTool):
        names = [choice.named]
    elif isinstance(choice, AllowedTools):
        names = [tool.named for tool in choice.told.tools]
    else:
        return list(given)
    if unknown := [name for name in names if name not in given]:
        raise Fault(f"tool_choice: no tool is called {unknown[0]!r}{nearest(unknown[0], given)}", param="tool_choice", code="invalid_value")
    return names


def sampled(sampling: SamplingParams, tools: Tools | None, words: Words, prompt: list[int]) -> SamplingParams:
    """The sampling of a chat's answer: control tokens that readers need are text, and a grammar holds it to the tools. Fault (400) if the
    body asks for another grammar beside."""
    form = words.answers
    ends = tuple(i for i in words.call_ends if i not in sampling.stop_token_ids)
    sampling = replace(sampling, shown=words.shown, stop_token_ids=(*sampling.stop_token_ids, *ends) if tools else sampling.stop_token_ids)
    if tools is None or form.calls is None:
        return sampling
    own = sampling.grammar
    if own is not None and own.kind not in ("json_schema", "json_object"):
        text = (
            "tools: an answer that is a call does not follow a regex, choice or grammar; give tool_choice: none, or leave one of them out"
        )
        raise Fault(text, param="tools", code="invalid_value")
    try:
        return replace(sampling, grammar=_grammar(tools, own, form, words, tail(prompt, words).rstrip()))
    except TooLarge as error:
        if tools.forced or tools.strict or own is not None:
            raise Fault(f"tools: {error.message}; give fewer of them, or tool_choice: auto", param="tools", code="invalid_value") from None
        return sampling


def _grammar(tools: Tools, own: Grammar | None, form: AnswerFormat, words: Words, begun: str) -> Grammar:
    """Of an answer that may call tools, or has to. own: of its content. begun: the end of its prompt."""
    assert form.calls is not None
    made = CallGrammar(form.calls, words.added, tools.schemas, tools.many, MAX_CALL_CHARS)
    reasoning = None if form.reasoning is not None and begun.endswith(form.reasoning[1]) else form.reasoning
    opened = reasoning is not None and begun.endswith(reasoning[0])
    if tools.forced:
        return Grammar("calls", made.whole(reasoning, opened))
    if own is not None:
        return Grammar("calls", made.whole(reasoning, opened, json.loads(own.text) if own.text else {"type": "object"}))
    trigger = Trigger(form.calls.opening, words.added.get(form.calls.opening), not form.calls.anywhere)
    return Grammar("calls", made.lazy(), trigger, loose=not tools.strict)


def tail(prompt: list[int], words: Words) -> str:
    """The end of a prompt as text, control tokens spelt out."""
    return b"".join(map(words.piece, prompt[-TAIL:])).decode("utf-8", "replace")


def reader(tools: Tools | None, constrained: bool, words: Words, prompt: list[int], *, eager: bool) -> Reader | None:
    """Who takes one answer apart; None if all of it is content. constrained: a grammar of the body's own holds all of it."""
    form = words.answers
    if constrained and tools is None:
        return None
    return reader_of(form, {} if tools is None else tools.schemas, prompt=tail(prompt, words), eager=eager)
