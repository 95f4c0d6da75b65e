"""A base's chat template and tokenizer, as training and serving need them: render, find the assistant's turns, and make sure that no
content is read as a turn.

The spans are found by rendering, without markers. For an assistant turn j of messages m:

    prompt_j = render(m[:j], with the generation prompt)      what a server feeds the model
    upto_j   = render(m[:j+1])                                the same and the answer
    whole    = render(m)

If prompt_j begins upto_j and upto_j begins whole (except for a closing token), the turn is exactly the characters between. Otherwise the
template rewrites earlier turns, or its generation prompt opens the answer with text that a finished answer does not have (<think>). Then
only the last turn can be trained on, as it will be served: prompt_j, followed by the answer and its end as upto_j has them. The turn ends
with the first special token after its content. What a template writes after that (a footer, the prompt for the next answer) belongs to no
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trimtab.bases.control_tokens import ControlTokens, Ids
from trimtab.bases.dialect import (
    KNOWN_SHAPES,
    LOST,
    NONE,
    REASONING,
    BadRow,
    Dialect,
    Finished,
    Message,
    common_start,
    dialect_of,
    is_whole,
    text_of,
)
from trimtab.bases.plain import PlainContent
from trimtab.bases.whole import Whole, ends_of, marked
from trimtab.errors import DataError

__all__ = [
    "BadRow",
    "Ids",
    "Message",
    "Template",
    "Turn",
    "encode_prompt",
    "end_of_turn_id",
    "text_of",
]

TALK: tuple[Message, Message] = ({"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"})
"""A plain question and answer, from which it is seen how a template ends a turn."""
_NO_TEMPLATE_FIX = "use an instruction-tuned base, or give prompt and completion (they are joined as they are)."


@dataclass(frozen=True)
class Turn:
    """A last turn as text. prompt: what is served. answer: what follows it, through the turn's end token. rest: what the template writes
    after that, never trained on. end: that token, if there is one."""

    prompt: str
    answer: str
    rest: str
    end: str | None


class Template(ControlTokens):
    """A tokenizer and its chat template. Built once for many rows; keeps nothing of them."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self.exists = bool(getattr(tokenizer, "chat_template", None))

    @cached_property
    def _dialect(self) -> Dialect:
        if not self.exists:
            raise DataError("the base has no chat template, and conversations need one", fix=_NO_TEMPLATE_FIX)
        return dialect_of(self.tokenizer)

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The texts of the tokens that end an answer: the template's end of turn, and the tokenizer's end token."""
        found = [self.turn_end, self.tokenizer.eos_token]
        return tuple(dict.fromkeys(end for end in found if end))

    @cached_property
    def turn_end(self) -> str | None:
        """The text of the token with which the template ends an assistant turn."""
        try:
            return self.last_turn(TALK).end if self.exists else None
        except BadRow:
            return None

    @property
    def reads(self) -> frozenset[str]:
        """The variables that a caller of `question` may set and the template looks at (enable_thinking); none without a template."""
        return self._dialect.reads if self.exists else frozenset()

    def render(self, messages: Sequence[Message], *, generate: bool) -> str:
        """The conversation as text; generate: with the prompt for an assistant turn. BadRow if the template refuses it."""
        return self._dialect.render(messages, generate=generate)

    def prompt(self, messages: Sequence[Message], variables: Mapping[str, Any] = NONE) -> str:
        """The text that asks for the next assistant turn, with every message's content in it; else BadRow."""
        text = self._dialect.render(messages, generate=True, variables=variables)
        self._dialect.check(messages, text, generate=True)
        return text

    def whole(self, messages: Sequence[Message], answers: Sequence[int]) -> Whole:
        """A finished conversation, with every message's content in it; else BadRow. answers: the assistant turns that will be asked for."""
        whole = self.finished(messages, answers)
        self._dialect.check(messages, whole.text, generate=False)
        return whole

    def finished(self, messages: Sequence[Message], answers: Sequence[int]) -> Whole:
        """`whole`, whether or not its contents are all there."""
        wanted: dict[int, list[bool]] = {}
        for index in filter(None, answers):
            wanted.setdefault(index, []).append(True)
            if index + 1 < len(messages):
                wanted.setdefault(index + 1, []).append(False)
        finished = self._dialect.finished(messages, wanted)
        return Whole(self._dialect, messages, finished or Finished(self.render(messages, generate=False), {}))

    def last_turn(self, messages: Sequence[Message]) -> Turn:
        """Messages that end with an assistant turn: what is served, and what follows it. BadRow if the template does not write the
        answer whole, or what is to be answered is not certain."""
        prompt, text = self._asked_and_answered(messages)
        stop, end = self._end(messages[-1]["content"], text, lambda: self.frame(messages)[0])
        self._check_answer(messages[-1]["content"], text[:stop], len(messages) - 1)
        return Turn(prompt, text[:stop], text[stop:], end)

    def turn(self, whole: Whole, index: int) -> tuple[int, int, str | None]:
        """The characters of the text that are the answer of assistant turn `index`, with its end-of-turn token and without blanks after it;
        and that token.

        BadRow if the template rewrites earlier turns, so that what is trained would not be what is served.
        """
        if index == 0:
            raise BadRow("starts with an assistant turn: there is no prompt to answer")
        text, content = whole.text, whole.messages[index]["content"]
        begin, prompt, upto = whole.around(index)
        start = begin + len(prompt)
        if not upto.startswith(prompt) or not text.startswith(prompt, begin):
            raise BadRow(f"the chat template rewrites earlier turns: what stands before messages[{index}] changes once it is answered")

        def opening() -> str:
            if whole.openings is None:
                whole.openings = self._openings(whole.messages)
            return whole.openings[index]

        stop, end = self._end(content, upto[len(prompt) :], opening)
        if end is None or not text.startswith(upto[: len(prompt) + stop], begin):
            if (shared := self._shared(upto, text, begin)) is None:
                raise BadRow(f"the chat template rewrites earlier turns: messages[{index}] changes once more turns follow")
            ends_alone, (stop, end) = end is not None, self._end(content, text[start : begin + shared], opening)
            if end is None and ends_alone:
                raise BadRow(f"the chat template rewrites earlier turns: messages[{index}] ends otherwise once more turns follow")
        self._check_answer(content, text[start : start + stop], index)
        return start, start + stop, end

    def _openings(self, messages: Sequence[Message]) -> dict[int, str]:
        """`frame(messages[: i + 1])[0]` of every assistant turn i. It depends on the roles alone."""
        roles, known = tuple(m["role"] for m in messages), self._dialect.openings
        if roles not in known:
            if len(known) >= KNOWN_SHAPES:
                known.clear()
            known[roles] = self._openings_of(roles)
        return known[roles]

    def _openings_of(self, roles: tuple[str, ...]) -> dict[int, str]:
        """Found on marks, as `_frame` does it for one turn, in one run of the template."""
        talk, answers = marked(roles), [i for i, role in enumerate(roles) if role == "assistant" and i]
        try:
            whole = self.finished(talk, answers)
        except BadRow:
            return {i: self.frame(talk[: i + 1])[0] for i in answers}
        ends = ends_of([m["content"] for m in talk], whole.text)
        found: dict[int, str] = {}
        for index in answers:
            try:
                begin, prompt, upto = whole.around(index)
                opening, mark, _ = upto[len(prompt) :].partition(talk[index]["content"])
                plain = ends[index - 1] <= begin and upto.startswith(prompt) and mark  # the prompt has all contents
            except BadRow:
                plain = ""
            found[index] = opening if plain else self.frame(talk[: index + 1])[0]
        return found

    def frame(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What the template writes between the prompt and the content of a last turn, and between the content and the turn's end: both by
        the roles alone, whatever the contents. Nothing where that cannot be found out."""
        return self._frame(messages) or ("", "")

    def _frame(self, messages: Sequence[Message]) -> tuple[str, str] | None:
        """`frame`, found with marks for contents; None if the template refuses them or does not write them."""
        roles, known = tuple(m["role"] for m in messages), self._dialect.frames
        if roles not in known:
            talk = marked(roles)
            try:
                opening, mark, rest = self._asked_and_answered(talk)[1].partition(talk[-1]["content"])
            except BadRow:
                opening, mark, rest = "", "", ""
            if len(known) >= KNOWN_SHAPES:
                known.clear()
            found = self.specials.search(rest)
            known[roles] = (opening, rest[: found.start()] if found else rest.rstrip()) if mark else None
        return known[roles]

    def _asked_and_answered(self, messages: Sequence[Message]) -> tuple[str, str]:
        """(prompt, all that follows it) of messages that end with an assistant turn."""
        if len(messages) == 1:
            raise BadRow("starts with an assistant turn: there is no prompt to answer")
        last = len(messages) - 1
        if (finished := self._dialect.finished(messages, {last: (True,)})) is not None and (last, True) in finished.beginnings:
            upto, (begin, rest) = finished.text, finished.beginnings[last, True]
            prompt = upto[:begin] + rest
            self._dialect.check(messages[:-1], prompt, generate=True)
        else:
            prompt, upto = self.prompt(messages[:-1]), self.render(messages, generate=False)
        return prompt, upto[len(prompt) :] if upto.startswith(prompt) else self._after_opening(messages, prompt, upto)

    def _after_opening(self, messages: Sequence[Message], prompt: str, upto: str) -> str:
        """The answer and its end as they follow a prompt that opens the answer (<think>), or that holds what the finished text does not.

        Where the two part in blanks alone, the answer is what follows there: "<think>\\n" is asked, "<think></think>Yes." is finished. Else
        it is the content, if it stands where the prompt opens the answer.
        """
        parted = common_start(prompt, upto)
        if not prompt[parted:].strip():
            return upto[parted:]
        content = next((c for c in (messages[-1]["content"], messages[-1]["content"].strip()) if c.strip() and c in upto), None)
        if content is None:
            self._check_answer(messages[-1]["content"], "", len(messages) - 1)
            raise BadRow("empty: the chat template opens the answer, and an empty one cannot be told from its end")
        at = upto.rfind(content)
        before, after = upto[:at], upto[at:]
        asked = messages[-2]["content"].strip()
        header, opening = (text[text.rfind(asked) + len(asked) :] for text in (before, prompt))
        opened = asked in before and asked in prompt and opening.startswith(header.rstrip())
        if not opened or self.specials.sub("", after[len(content) :]).strip():
            raise BadRow(
                f"the chat template rewrites earlier turns: what stands before messages[{len(messages) - 1}] changes once answered"
            )
        blank = before[len(before.rstrip()) :]
        return after if prompt[-1:].isspace() else blank + after

    def _check_answer(self, content: str, text: str, index: int) -> None:
        """BadRow if the supervised text is not the whole answer."""
        if is_whole(content, text):
            return
        if REASONING.search(content):
            raise BadRow(f"the chat template takes the reasoning out of the answer: messages[{index}] is not rendered whole")
        raise BadRow(f"{LOST}: messages[{index}] (assistant)")

    def _end(self, content: str, text: str, opening: Callable[[], str]) -> tuple[int, str | None]:
        """(where a last turn of this content ends in `text`, all that follows its prompt; its end-of-turn token): after the first special
        token behind its content, else where the text ends. Text behind that token is the template's, not the answer's. opening: gives
        what the template writes before the content."""
        specials = list(self.specials.finditer(text))
        behind = specials[len(self.specials.findall(opening())) :] if specials else []
        end = next((found for found in behind if is_whole(content, text[: found.start()])), None)
        if end is None and specials and not content.strip():
            end = specials[-1]  # the template writes an empty answer otherwise; the last token ends it for sure
        return (len(text.rstrip()), None) if end is None else (end.end(), end[0])

    def _shared(self, upto: str, whole: str, begin: int) -> int | None:
        """How much of `upto` stands in `whole` from `begin` on, if all but a closing token does (Phi-3 ends conversations with one, not
        turns); else None."""
        if whole.startswith(upto, begin):
            return len(upto)
        same = common_start(upto, whole[begin : begin + len(upto)])
        same = min([same, *(m.start() for m in self.specials.finditer(upto) if m.start() < same < m.end())])
        return None if self.specials.sub("", upto[same:]).strip() else same

    def without_end(self, text: str) -> str:
        """An answer without the one end token that it may have been written with."""
        if self.specials.search(text) is None:
            return text
        bare = text.rstrip()
        end = next((end for end in self.ends if bare.endswith(end)), "")
        without = bare.removesuffix(end)
        return without if end and without.strip() else text

    def ends_itself(self, text: str) -> bool:
        """Whether a text spells out a token that ends an answer, with nothing but blanks behind it."""
        return text.rstrip().endswith(self.ends) if self.ends else False

    def conversation(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their contents as text, answers without an end token of their own.

        BadRow if the content of a message holds a special token's text, or is no text.
        """
        found = self._as_text(messages)
        for i, message in enumerate(found):
            self.refuse_specials(message["content"], f"messages[{i}] ({message['role']})")
        return found

    def _as_text(self, messages: Sequence[Message]) -> list[Message]:
        texts = [text_of(m["content"]) for m in messages]
        return [
            {**m, "content": self.without_end(text) if m["role"] == "assistant" else text} for m, text in zip(messages, texts, strict=True)
        ]

    def question(self, messages: Sequence[Message], variables: Mapping[str, Any] = NONE) -> tuple[str, Callable[[str], Ids]]:
        """The text that asks for the next assistant turn, and what gives its ids. variables: those of `reads` that are set. What a message
        or a variable spells out is text: none of it becomes a control token. BadRow if the template refuses the messages, or leaves the
        content of one out."""
        told, plain = self._as_text(messages), self._plain
        if not any(self.specials.search(text) for m in told for text in m.values()) and not variables:
            return self.prompt(told), self._unforged
        told, variables = plain.hidden_in(told), plain.hidden_in(variables)
        return plain.shown(self.prompt(told, variables)), plain.ids

    @cached_property
    def _plain(self) -> PlainContent:
        return PlainContent(self.tokenizer, self.specials, self.special_texts)

    def _unforged(self, text: str) -> Ids:
        ids = self.ids_of([text])[0]
        return self._plain.ids(self._plain.shown(text)) if self.is_forged(text, ids) else ids

    def prompt_ids(self, messages: Sequence[Message]) -> Ids:
        """The ids of the `question`."""
        text, ids_of = self.question(messages)
        return ids_of(text)


def encode_prompt(messages: Sequence[Message], tokenizer: Any) -> Ids:
    """The ids that ask for the next assistant turn: what evaluation and serving feed the model, and what training saw before the answer.

    Raises DataError if the template refuses the conversation, or there is no template.
    """
    try:
        return Template(tokenizer).prompt_ids(messages)
    except BadRow as bad:
        raise DataError(f"the conversation cannot be used: {bad}") from None


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The token that ends an assistant turn, on which generation must stop: the template's, else the tokenizer's end token, else None."""
    template = Template(tokenizer)
    end = template.turn_end
    return template.eos if end is None else int(tokenizer.convert_tokens_to_ids(end))
