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
from typing import Any, Literal

from trimtab.bases.marks import Ids
from trimtab.bases.plain import PlainContent
from trimtab.bases.prompts import Prompts, Rewrites, TakenOut
from trimtab.bases.shaping import NONE
from trimtab.bases.tool_turns import REASONED, BadRow, Message, arguments_of, calls_of, texts_in
from trimtab.bases.whole import Whole
from trimtab.bases.written import REASONING, common_start, is_whole, opened, text_of
from trimtab.errors import DataError

__all__ = [
    "BadRow",
    "End",
    "Message",
    "Template",
    "Turn",
    "encode_prompt",
    "end_of_turn_id",
]

OPEN_END = "THE-ANSWER-GOES-ON-HERE "
"""Put behind the content that an answer goes on with."""
End = Literal["asked", "finished", "open"]
TALK: tuple[Message, Message] = ({"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"})
"""A plain question and answer, from which it is seen how a template ends a turn."""


@dataclass(frozen=True)
class Turn:
    """A last turn as text. prompt: what is served. answer: what follows it, through the turn's end token. rest: what the template writes
    after that, never trained on. end: that token, if there is one."""

    prompt: str
    answer: str
    rest: str
    end: str | None


class Template(Prompts):
    """A tokenizer and its chat template. Built once for many rows; keeps nothing of them."""

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

    def last_turn(self, messages: Sequence[Message], variables: Mapping[str, Any] = NONE) -> Turn:
        """Messages that end with an assistant turn: what is served, and what follows it. BadRow if the template does not write the
        answer whole, or what is to be answered is not certain."""
        try:
            return self._last_turn(messages, variables)
        except TakenOut:
            if (turn := self._opened_turn(messages, variables)) is None:
                raise
            return turn

    def _last_turn(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> Turn:
        prompt, text = self._asked_and_answered(messages, variables)
        tag = opened(prompt)
        stop, end = self._end(messages[-1], text, lambda: self.frame(messages, variables)[0], tag)
        self._check_answer(messages[-1], tag + text[:stop], len(messages) - 1)
        return Turn(prompt, text[:stop], text[stop:], end)

    def _opened_turn(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> Turn | None:
        """A last turn with reasoning, of a template that opens the reasoning for the answer and takes it out of what is finished: served is
        the prompt, and the model goes on with the reasoning, closes it and answers. None where the template does not open it."""
        before, tag, rest = _reasoned(messages[-1])
        closed = REASONING.split(rest)
        if before.strip() or len(closed) < 3:
            return None
        turn = self._last_turn(
            [*messages[:-1], {k: v for k, v in messages[-1].items() if k != REASONED} | {"content": closed[-1]}], variables
        )
        said, written = closed[-1].strip(), turn.answer.lstrip()
        written = written.removeprefix(closed[-2]).lstrip()  # a template may close what it has opened
        if opened(turn.prompt) != tag or not written.startswith(said):
            return None
        answer = rest.removeprefix(turn.prompt[len(turn.prompt.rstrip()) :])
        return Turn(turn.prompt, answer.rstrip() + written.removeprefix(said), turn.rest, turn.end)

    def turn(self, whole: Whole, index: int) -> tuple[int, int, str | None]:
        """The characters of the text that are the answer of assistant turn `index`, with its end-of-turn token and without blanks after it;
        and that token.

        BadRow if the template rewrites earlier turns, so that what is trained would not be what is served.
        """
        if index == 0:
            raise BadRow("starts with an assistant turn: there is no prompt to answer")
        text, answer = whole.text, whole.messages[index]
        begin, prompt, upto = whole.around(index)
        start = begin + len(prompt)
        if not upto.startswith(prompt) or not text.startswith(prompt, begin):
            raise Rewrites(f"the chat template rewrites earlier turns: what stands before messages[{index}] changes once it is answered")

        def opening() -> str:
            if whole.openings is None:
                whole.openings = self._openings(whole.messages, whole.variables)
            return whole.openings[index]

        tag = opened(prompt)
        stop, end = self._end(answer, upto[len(prompt) :], opening, tag)
        if end is None or not text.startswith(upto[: len(prompt) + stop], begin):
            if (shared := self._shared(upto, text, begin)) is None:
                raise Rewrites(f"the chat template rewrites earlier turns: messages[{index}] changes once more turns follow")
            ends_alone, (stop, end) = end is not None, self._end(answer, text[start : begin + shared], opening, tag)
            if end is None and ends_alone:
                raise Rewrites(f"the chat template rewrites earlier turns: messages[{index}] ends otherwise once more turns follow")
        self._check_answer(answer, tag + text[start : start + stop], index)
        return start, start + stop, end

    def _end(self, answer: Message, text: str, opening: Callable[[], str], tag: str) -> tuple[int, str | None]:
        """(where a last turn of this content ends in `text`, all that follows its prompt; its end-of-turn token): after the first special
        token behind its content and calls, else where the text ends. Text behind that token is the template's, not the answer's. opening:
        gives what the template writes before the content. tag: the one of a reasoning block that the prompt ends with."""
        specials, thought = list(self.specials.finditer(text)), answer.get(REASONED, "").strip()
        begin = text.find(thought) + len(thought) if thought in text else 0  # the content may occur in the reasoning, too
        behind = specials[len(self.specials.findall(opening())) :] if specials else []
        ends = [found for found in behind if found.start() >= begin and is_whole(answer, tag + text[begin : found.start()])]
        end = ends[0] if ends else None
        if ends and calls_of(answer):  # the first ones may close the calls
            end = next((found for found in ends if found[0] == self.turn_end), ends[-1])
        if end is None and specials and not answer["content"].strip():
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
            for text in (*texts_in(calls_of(message)), message.get(REASONED, "")) if len(message) > 2 else ():
                self.refuse_specials(text, f"messages[{i}] ({message['role']})")
        return found

    def _as_text(self, messages: Sequence[Message]) -> list[Message]:
        texts = [text_of(m["content"]) for m in messages]
        return [
            {**m, "content": self.without_end(text) if m["role"] == "assistant" else text} for m, text in zip(messages, texts, strict=True)
        ]

    def question(
        self, messages: Sequence[Message], variables: Mapping[str, Any] = NONE, end: End = "asked"
    ) -> tuple[str, Callable[[str], Ids]]:
        """The text that asks for the next assistant turn, and what gives its ids. variables: those of `reads` that are set. What a message
        or a variable spells out is text: none of it becomes a control token. end: asked; finished, the conversation as it stands; open, up
        to the content of its last message, which the answer goes on with. BadRow if the template refuses the messages, or leaves the
        content of one out."""
        told, plain = list(map(self._unescaped, self._as_text(messages))), self.plain
        if end != "asked":
            told, variables = plain.hidden_in(told), plain.hidden_in(variables)
            return plain.shown(self._unasked(told, variables, end == "open")), plain.ids
        if not any(map(self.specials.search, texts_in(told))) and not variables:
            return self.prompt(told), self._unforged
        told, variables = plain.hidden_in(told), plain.hidden_in(variables)
        return plain.shown(self.prompt(told, variables)), plain.ids

    def _unasked(self, messages: Sequence[Message], variables: Mapping[str, Any], is_open: bool) -> str:
        """A conversation without a prompt for an answer. The end of an open one is found by a mark behind its last content, as
        transformers finds it: a template that takes the blank behind the mark takes those of the content."""
        if is_open:
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + OPEN_END}]
        text = self.render(messages, generate=False, variables=variables)
        self._dialect.check(messages, text, generate=False, variables=variables)
        if not is_open:
            return text
        at = text.rindex(OPEN_END.strip())
        return text[:at] if text.startswith(OPEN_END, at) else text[:at].rstrip()

    def _unescaped(self, message: Message) -> Message:
        """A message whose calls have their arguments as objects, where these are JSON text whose escapes spell out a control token: a
        template that writes arguments decodes them."""
        calls = calls_of(message)
        given = [call for call in calls if isinstance(call["function"].get("arguments"), str) and "\\" in call["function"]["arguments"]]
        if not any(self.specials.search(text) for call in given for text in texts_in(arguments_of(call))):
            return message
        return {**message, "tool_calls": [{**c, "function": {**c["function"], "arguments": arguments_of(c)}} for c in calls]}

    @cached_property
    def plain(self) -> PlainContent:
        """What encodes contents as the characters that they have."""
        return PlainContent(self.tokenizer, self.specials, self.special_texts)

    def _unforged(self, text: str) -> Ids:
        ids = self.ids_of([text])[0]
        return self.plain.ids(self.plain.shown(text)) if self.is_forged(text, ids) else ids

    def prompt_ids(self, messages: Sequence[Message]) -> Ids:
        """The ids of the `question`."""
        text, ids_of = self.question(messages)
        return ids_of(text)


def _reasoned(answer: Message) -> tuple[str, str, str]:
    """(what stands before the reasoning of an answer, the tag that opens it, all behind that)."""
    if thought := answer.get(REASONED, "").strip():
        return "", "<think>", f"\n{thought}\n</think>\n\n{answer['content'].strip()}"
    before, *rest = REASONING.split(answer["content"], maxsplit=1)
    return (before, rest[0], rest[1]) if rest else (before, "", "")


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
