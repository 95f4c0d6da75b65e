"""What to know about a base's chat template before it is trained with."""

from __future__ import annotations

from typing import Any

from trimtab.bases.prompts import Rewrites
from trimtab.bases.template import TALK, BadRow, Template


def template_warnings(tokenizer: Any) -> list[str]:
    """What about this tokenizer's template may spoil training, one sentence each; those that start with "note:" need no action."""
    template = Template(tokenizer)
    found = []
    if template.eos is None:
        found.append("the tokenizer has no end token: nothing teaches an adapter to stop")
    elif template.eos == tokenizer.pad_token_id:
        found.append("note: the padding token is the end token; rows are never padded here and the end token is always learnt")
    if not template.exists:
        return ["there is no chat template: prompt and completion are joined as they are, and conversations cannot be used", *found]
    try:
        turn = template.last_turn(TALK)
        prompted, end = turn.prompt != template.render(TALK[:1], generate=False), turn.end
    except BadRow as bad:
        return [f"a plain question and answer cannot be rendered: {bad}", *found]
    if not prompted:
        found.append("the template has no generation prompt: the assistant's header is supervised as part of each answer")
    if end is None:
        found.append(
            "the template writes no end-of-turn token after an assistant turn: the end token is added after the last turn of each row"
        )
    elif tokenizer.convert_tokens_to_ids(end) != template.eos:
        found.append(
            f"the template ends turns with {end!r}, which is not the end token {tokenizer.eos_token!r}: generation must stop on both"
        )
    twice = [*TALK, *TALK]
    try:
        whole = template.finished(twice, (1, 3))
        for index in (1, 3):
            template.turn(whole, index)
    except Rewrites:
        found.append("note: the template rewrites earlier turns: each answer is trained as a segment of its own, as it will be served")
    except BadRow as bad:
        found.append(f"conversations of several turns cannot be supervised turn by turn ({bad}): supervise the last turn only")
    try:
        template.prompt([{"role": "system", "content": "x"}, TALK[0]])
    except BadRow as bad:
        found.append(f"system turns cannot be used: {bad}")
    if writes_the_date(tokenizer):
        found.append("the template writes the current date into the prompt: what is trained today differs from what is served tomorrow")
    return found


def writes_the_date(tokenizer: Any) -> bool:
    """Whether the template reads the clock, so that the same row renders differently another day."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))
