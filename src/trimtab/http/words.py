"""What routes need of a base's tokenizer: prompts to ids, and the bytes of a token."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trimtab.bases.calls import AnswerFormat, answer_format
from trimtab.bases.template import BadRow, End, Template
from trimtab.bases.told_tools import CALLS, ToldTools
from trimtab.data.scored import read_ids
from trimtab.errors import DataError
from trimtab.http.services import TooLong, Words

if TYPE_CHECKING:
    from trimtab.model import Base

SURE = 16
"""Tokens, and as many in a hundred, by which the beginning of a text may have more than the whole, at the place where it was cut off."""
CHARS = 4
"""Characters of a token, typically."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def words_of(base: Base) -> Words:
    """The words of a base. Prompts become what they were in training: conversations through the template, texts with the start token if
    there is one."""
    template, positions = Template(base.tokenizer), base.spec.max_positions
    form = answer_format(template)
    told = ToldTools(template) if template.exists and not form.tools else None
    if told is not None:
        form = replace(form, tools=True, calls=CALLS)
    longest = max(map(len, base.tokenizer.get_vocab()), default=1)  # a vocabulary spells no token with fewer letters than it has characters

    def ids_of_text(text: str, ids_of: Callable[[str], list[int]], last: int | None) -> list[int]:
        return ids_within(text, positions, ids_of) if last is None else ids_of(text)[-last:]

    def encode_chat(messages: list[dict[str, Any]], variables: Mapping[str, Any], end: End = "asked", last: int | None = None) -> list[int]:
        try:
            if told is not None:
                messages, variables = told(messages, variables)
            text, ids_of = template.question(messages, variables, end)
            return ids_of_text(text, ids_of, last)
        except BadRow as bad:
            raise DataError(f"the conversation cannot be used: {bad}") from None

    def encode_text(text: str, start: bool = True, last: int | None = None) -> list[int]:
        ids = [*(template.bos if start else ()), *ids_of_text(text, lambda part: template.ids_of([part])[0], last)]
        return ids if last is None else ids[-last:]

    def encode_answer(question: str, answer: str, last: int | None = None) -> list[int]:
        if last is None:
            encode_text(question + answer)  # what is far too long shows before all of it is rendered
        return read_ids(base.tokenizer, answer, prompt=question, where="the pair")[0][-(last or 0) :]

    added = {token.content: i for i, token in base.tokenizer.added_tokens_decoder.items() if token.content}
    return Words(
        encode_chat,
        encode_text,
        pieces(base.tokenizer),
        template.reads,
        base.spec.vocab_size,
        positions,
        positions * longest,
        form,
        added,
        tuple(added[text] for text in template.special_texts if text in added and told_by(form, text) and added[text] not in base.stop_ids),
        tuple(added[end] for end in [form.calls.end if form.calls else None] if end in added and added[end] not in base.stop_ids),
        encode_answer,
        told_of(base.tokenizer, positions),
    )


def told_of(tokenizer: Any, positions: int) -> dict[str, Any]:
    """What clients need to write prompts as the base reads them: the texts of its control tokens, and its chat template."""
    texts = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: None if text is None else str(text) for name, text in texts.items()},
        "model_max_length": positions,
        "chat_template": template.get("default") if isinstance(template, dict) else template,
    }


def told_by(form: AnswerFormat, special: str) -> bool:
    """Whether a reader of answers looks for this control token."""
    if form.response is not None or (form.calls is not None and form.calls.harmony):
        return True
    texts = list(form.reasoning or ())
    if (c := form.calls) is not None:
        texts += [c.before, c.middle, c.after, c.between or "", *((c.tagged.key, c.tagged.value, c.tagged.close) if c.tagged else ())]
    return any(special in text for text in texts)


def ids_within(text: str, most: int, ids_of: Callable[[str], list[int]]) -> list[int]:
    """A text's ids. TooLong if there are clearly more than `most`. The beginning of a text is tokenized first to find that out, so no text
    takes much longer than the longest one that fits."""
    part = max(1024, CHARS * most)
    while part < len(text):
        found = len(ids_of(text[:part]))
        if found > most + SURE + most // 100:
            raise TooLong(f"more than {most} tokens (its first {part} characters have {found})")
        part *= 2
    return ids_of(text)


def pieces(tokenizer: Any) -> Callable[[int], bytes]:
    """id -> the token's bytes, such that those of a text's tokens, joined, are the text's in UTF-8 (half characters are in no other form).

    Byte-level vocabularies spell bytes as letters, others have tokens <0x0A> for bytes and ▁ for blanks. An id without a token is empty.
    """
    of_letter = {letter: byte for byte, letter in _letters().items()}
    byte_level = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else False
    special = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
    kept: dict[int, bytes] = {}

    def spell(token_id: int) -> bytes:
        if token_id in special:
            return special[token_id].encode()
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if byte_level and all(letter in of_letter for letter in token):
            return bytes(of_letter[letter] for letter in token)
        if (byte := BYTE.fullmatch(token)) is not None:
            return bytes([int(byte[1], 16)])
        return str(token).replace("▁", " ").encode()

    def piece(token_id: int) -> bytes:
        if token_id not in kept:
            kept[token_id] = spell(token_id)
        return kept[token_id]

    return piece


def _letters() -> dict[int, str]:
    """byte -> the letter that stands for it in byte-level vocabularies (GPT-2's): printable bytes are themselves, others follow 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
