"""Rows as questions for evaluation by generation: the prompt, the reference answer, and how the template writes that answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.bases.marks import Ids
from trimtab.bases.template import BadRow, Template
from trimtab.bases.tool_turns import REASONED, calls_of
from trimtab.data.render import render_plain, variables_of
from trimtab.data.rows import Row
from trimtab.errors import DataError


@dataclass(frozen=True)
class Written:
    """How a base writes an answer, which is what training taught. whole: the reference as it is written, without its end token. opening and
    closing: what the chat template writes around any answer's content (an empty reasoning block, a channel, a header)."""

    whole: str = ""
    opening: str = ""
    closing: str = ""

    def said(self, ids: Ids, tokenizer: Any) -> str:
        """What was generated, for people. Special tokens are left out, unless the answer is to be written with more than its content."""
        return str(tokenizer.decode(ids, skip_special_tokens=not self._around)).strip()

    def content(self, ids: Ids, reference: str, tokenizer: Any) -> str:
        """What was generated as an answer's content: without opening and closing where they are there; the reference where it is written
        just as the template writes that."""
        said = self.said(ids, tokenizer)
        if said == self.whole.strip():
            return reference.strip()
        if not self._around:
            return said
        text = str(tokenizer.decode(ids, skip_special_tokens=False)).lstrip()
        text = text.removeprefix(self.opening.lstrip()).rstrip().removesuffix(self.closing.rstrip())
        return Template(tokenizer).specials.sub("", text).strip()

    @property
    def _around(self) -> bool:
        """Whether the template writes more than the content: blanks around it are not compared."""
        return bool(self.opening.strip() or self.closing.strip())


def prompt_and_reference(row: Row, tokenizer: Any) -> tuple[Ids, str]:
    """(prompt ids, reference text) for evaluation by generation: the last turn to learn from is the reference, all before it the prompt.

    The ids are those that stood before the answer in training. Raises DataError if the row has no answer to compare with, or cannot be
    rendered.
    """
    return asked(row, tokenizer)[:2]


def asked(row: Row, tokenizer: Any) -> tuple[Ids, str, Written]:
    """`prompt_and_reference`, and how the base writes the reference."""
    template = Template(tokenizer)
    try:
        if row.prompt is not None and row.completion is not None and not template.exists:
            bos, completion = render_plain(row, template).bos, template.without_end(row.completion)
            return [*bos, *template.ids_of([row.prompt + row.separator])[0]], completion, Written(completion)
        last = max(row.answers, default=None)
        if row.conversation is None or last is None:
            raise BadRow("nothing to compare with: the row has no assistant turn")
        messages, variables = template.conversation(row.conversation[: last + 1]), variables_of(row, template)
        turn = template.last_turn(messages, variables)
        whole = turn.answer if turn.end is None else turn.answer.removesuffix(turn.end)
        reference = whole.strip() if calls_of(messages[-1]) else messages[-1]["content"]
        plain = [*messages[:-1], {k: v for k, v in messages[-1].items() if k != REASONED}]  # an answer may come without it
        return template.ids_of([turn.prompt])[0], reference, Written(whole, *template.frame(plain, variables))
    except BadRow as bad:
        raise DataError(f"{row.origin}: {bad}") from None
