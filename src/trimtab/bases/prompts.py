"""Conversations as a base's chat template renders them: the prompt of each answer, what follows it, and what stands around its content."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from trimtab.bases.control_tokens import ControlTokens
from trimtab.bases.dialect import Dialect, Finished, dialect_of, kind_of, sketched
from trimtab.bases.remembered import remembered
from trimtab.bases.shaping import NONE
from trimtab.bases.skeleton import Skeleton
from trimtab.bases.tool_turns import REASONED, BadRow, CallWay, Message, Shape, calls_of, marked, shape_of
from trimtab.bases.watched import Wanted
from trimtab.bases.whole import Whole, ends_of
from trimtab.bases.written import LOST, REASONING, common_start, forms_of, is_whole, opened
from trimtab.errors import DataError

_NO_TEMPLATE_FIX = "use an instruction-tuned base, or give prompt and completion (they are joined as they are)."


class TakenOut(BadRow):
    """The template writes an answer without its reasoning."""


class Rewrites(BadRow):
    """The finished conversation is not what was served turn by turn: each turn is to be rendered by itself (`Template.last_turn`)."""


class Prompts(ControlTokens):
    """What a tokenizer's chat template writes. exists: whether there is one. sheets: what `data.sheets` remembers of it."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self.exists = bool(getattr(tokenizer, "chat_template", None))
        self.sheets: dict[tuple[tuple[str, ...], tuple[int, ...]], Any] = {}

    @cached_property
    def _dialect(self) -> Dialect:
        if not self.exists:
            raise DataError("the base has no chat template, and conversations need one", fix=_NO_TEMPLATE_FIX)
        return dialect_of(self.tokenizer)

    @property
    def reads(self) -> frozenset[str]:
        """The variables that a caller of `question` may set and the template looks at (enable_thinking); none without a template."""
        return self._dialect.reads if self.exists else frozenset()

    @property
    def knows_tools(self) -> bool:
        """Whether the template writes the tools that a conversation may use."""
        return self.exists and self._dialect.knows_tools

    @property
    def knows_calls(self) -> bool:
        """Whether the template writes the calls of an assistant's turn."""
        return self.exists and isinstance(self._dialect.call_way, CallWay)

    def render(self, messages: Sequence[Message], *, generate: bool, variables: Mapping[str, Any] = NONE) -> str:
        """The conversation as text; generate: with the prompt for an assistant turn. variables, here and below: those of `reads` that are
        set, and `tools`, a list as `tool_turns.tools_of` gives it. BadRow if the template refuses it."""
        return self._dialect.render(messages, generate=generate, variables=variables)

    def prompt(self, messages: Sequence[Message], variables: Mapping[str, Any] = NONE) -> str:
        """The text that asks for the next assistant turn, with every message's content in it; else BadRow."""
        text = self._dialect.render(messages, generate=True, variables=variables)
        self._dialect.check(messages, text, generate=True, variables=variables)
        return text

    def whole(self, messages: Sequence[Message], answers: Sequence[int], variables: Mapping[str, Any] = NONE) -> Whole:
        """A finished conversation, with every message's content and calls in it; else BadRow. answers: the assistant turns that will be
        asked for."""
        whole = self.finished(messages, answers, variables)
        self._dialect.check(messages, whole.text, generate=False, variables=variables)
        return whole

    def finished(self, messages: Sequence[Message], answers: Sequence[int], variables: Mapping[str, Any] = NONE) -> Whole:
        """`whole`, whether or not its contents are all there."""
        finished = self._dialect.finished(messages, _beginnings_of(answers, len(messages)), variables)
        found = finished or Finished(self.render(messages, generate=False, variables=variables), {})
        return Whole(self._dialect, messages, found, variables)

    def skeleton(self, roles: Sequence[str], answers: Sequence[int]) -> Skeleton | None:
        """What is written for messages of these roles whatever their contents, and what is served for each answer; None where it is not
        known."""
        return self._dialect.skeleton(roles, _beginnings_of(answers, len(roles)))

    def _openings(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> dict[int, str]:
        """`frame(messages[: i + 1])[0]` of every assistant turn i. It depends on the shape alone."""
        shape = shape_of(messages)
        return remembered(self._dialect.openings, kind_of(shape, variables), lambda: self._openings_of(shape, sketched(variables)))

    def _openings_of(self, shape: Shape, variables: Mapping[str, Any]) -> dict[int, str]:
        """Found on marks, as `_frame_of` does it for one turn, in one run of the template."""
        talk, answers = marked(shape), [i for i, (role, *_) in enumerate(shape) if role == "assistant" and i]
        try:
            whole = self.finished(talk, answers, variables)
        except BadRow:
            return {i: self.frame(talk[: i + 1], variables)[0] for i in answers}
        ends = ends_of([m["content"] for m in talk], whole.text)
        found: dict[int, str] = {}
        for index in answers:
            try:
                begin, prompt, upto = whole.around(index)
                opening, mark, _ = upto[len(prompt) :].partition(talk[index]["content"])
                plain = ends[index - 1] <= begin and upto.startswith(prompt) and mark  # the prompt has all contents
            except BadRow:
                plain = ""
            found[index] = opening if plain else self.frame(talk[: index + 1], variables)[0]
        return found

    def frame(self, messages: Sequence[Message], variables: Mapping[str, Any] = NONE) -> tuple[str, str]:
        """What the template writes between the prompt and the content of a last turn, and between the content and the turn's end: both by
        the shape alone, whatever the contents. Nothing where that cannot be found out."""
        shape = shape_of(messages)
        return remembered(self._dialect.frames, kind_of(shape, variables), lambda: self._frame_of(shape, sketched(variables)))

    def _frame_of(self, shape: Shape, variables: Mapping[str, Any]) -> tuple[str, str]:
        """Found with marks for contents."""
        talk = marked(shape)
        try:
            opening, mark, rest = self._asked_and_answered(talk, variables)[1].partition(talk[-1]["content"])
        except BadRow:
            return "", ""
        if not mark:
            return "", ""
        found = self.specials.search(rest)
        return opening, rest[: found.start()] if found else rest.rstrip()

    def _asked_and_answered(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> tuple[str, str]:
        """(prompt, all that follows it) of messages that end with an assistant turn."""
        if len(messages) == 1:
            raise BadRow("starts with an assistant turn: there is no prompt to answer")
        last = len(messages) - 1
        finished = self._dialect.finished(messages, {last: (True,)}, variables)
        if finished is not None and (last, True) in finished.beginnings:
            upto, (begin, rest) = finished.text, finished.beginnings[last, True]
            prompt = upto[:begin] + rest
            self._dialect.check(messages[:-1], prompt, generate=True, variables=variables)
        else:
            prompt, upto = self.prompt(messages[:-1], variables), self.render(messages, generate=False, variables=variables)
        return prompt, upto[len(prompt) :] if upto.startswith(prompt) else self._after_opening(messages, prompt, upto, variables)

    def _after_opening(self, messages: Sequence[Message], prompt: str, upto: str, variables: Mapping[str, Any]) -> str:
        """The answer and its end as they follow a prompt that opens the answer (<think>), or that holds what the finished text does not.

        Where the two part in blanks alone, the answer is what follows there: "<think>\\n" is asked, "<think></think>Yes." is finished.
        Where it is certain where the turn begins in the finished text, it is what stands there. Else it is the content, if it stands where
        the prompt opens the answer.
        """
        parted = common_start(prompt, upto)
        if not prompt[parted:].strip():
            return upto[parted:]
        talk = self.render(messages[:-1], generate=False, variables=variables).rstrip()
        if (begin := self._begin_of_turn(messages[-2], prompt, upto, talk)) is not None:
            return upto[begin:].lstrip() if prompt[-1:].isspace() else upto[begin:]
        body = self._without_control_tokens(upto)
        content = next((c for c in (messages[-1]["content"], messages[-1]["content"].strip()) if c.strip() and c in body), None)
        rewritten = Rewrites(
            f"the chat template rewrites earlier turns: what stands before messages[{len(messages) - 1}] changes once answered"
        )
        if content is None and calls_of(messages[-1]):
            raise rewritten
        if content is None:
            self._check_answer(messages[-1], "", len(messages) - 1)
            raise BadRow("empty: the chat template opens the answer, and an empty one cannot be told from its end")
        at = body.rfind(content)
        before, after = upto[:at], upto[at:]
        asked = messages[-2]["content"].strip()
        begun = before[before.rfind(asked) :].rstrip()  # the question, and what stands between it and the answer
        found = asked in before and begun in prompt and prompt.rfind(begun) + len(begun) >= common_start(prompt, talk)
        if not found or self.specials.sub("", after[len(content) :]).strip():
            raise rewritten
        blank = before[len(before.rstrip()) :]
        return after if prompt[-1:].isspace() else blank + after

    def _begin_of_turn(self, asked: Message, prompt: str, upto: str, talk: str) -> int | None:
        """Where the last turn begins in a finished text, behind what opens it; None where that is not certain. talk: the prompt without
        what asks for the answer.

        Two cases are: the turn opens as in the prompt, which opens or closes reasoning besides ("<think>" is asked, "</think>Yes." is
        finished); or something before the last message is written otherwise, and what asks for the answer follows that message in both.
        """
        if not prompt.startswith(talk):
            return None
        parted, parts = common_start(prompt, upto), [m for text in (prompt, upto) for m in self._parts_of(text)]
        parted = min([parted, *(m.start() for m in parts if m.start() < parted < m.end())])
        if tag := opened(prompt[:parted]):  # both open the reasoning, and the prompt closes it
            parted = prompt.rindex(tag, 0, parted)
        ahead = len(prompt) - len(prompt[parted:].lstrip())
        if parted > len(talk) and any(m.start() == ahead for m in self._parts_of(prompt)):
            return parted
        asks = prompt[len(talk) :].lstrip()
        said = next((form for form in forms_of(asked["content"].strip(), asked["role"]) if form and form in prompt), None)
        tails = [prompt[prompt.rindex(said) :]] if said and asks else []
        tails += [asks] if self.specials.search(asks) else []
        tail = next((tail for tail in tails if 0 < upto.count(tail) == prompt.count(tail)), None)
        return None if tail is None else upto.rindex(tail) + len(tail)

    def _parts_of(self, text: str) -> list[re.Match[str]]:
        """The control tokens and the tags of reasoning in a text."""
        return [*self.specials.finditer(text), *REASONING.finditer(text)]

    def _without_control_tokens(self, text: str) -> str:
        """A text up to the control tokens at its end."""
        for found in reversed(list(self.specials.finditer(text))):
            if text[found.end() :].strip():
                break
            text = text[: found.start()]
        return text

    def _check_answer(self, answer: Message, text: str, index: int) -> None:
        """BadRow if the supervised text is not the whole answer. text: with the tag that the prompt has opened for it."""
        if is_whole(answer, text) and answer.get(REASONED, "").strip() in text:
            return
        if calls_of(answer) and answer["content"].strip() and is_whole({**answer, "content": ""}, text):
            raise BadRow(f"tool calls: the chat template does not render what is said beside them (messages[{index}])")
        if REASONED in answer and self._dialect.reasoned_name is None and not REASONING.search(answer["content"]):
            raise TakenOut(f"reasoning: the chat template renders none beside the content (messages[{index}]); this base has no reasoning")
        if REASONING.search(answer["content"]) or REASONED in answer:
            raise TakenOut(f"the chat template takes the reasoning out of the answer: messages[{index}] is not rendered whole")
        raise BadRow(f"{LOST}: messages[{index}] (assistant)")


def _beginnings_of(answers: Sequence[int], messages: int) -> Wanted:
    """What is looked at to find answers in a finished conversation: what is served before each, and what is finished with it."""
    wanted: dict[int, list[bool]] = {}
    for index in filter(None, answers):
        wanted.setdefault(index, []).append(True)
        if index + 1 < messages:
            wanted.setdefault(index + 1, []).append(False)
    return wanted
