"""A tokenizer's control tokens: no content forges one. Texts become ids with nothing added."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from trimtab.bases.dialect import BadRow

Ids = list[int]


class ControlTokens:
    """What a tokenizer reads as control tokens.

    specials: matches the text of any special token; special_texts: those texts. bos: ids that the tokenizer puts before plain text. eos:
    its end token, if any.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.eos: int | None = tokenizer.eos_token_id
        empty = list(tokenizer("", add_special_tokens=True)["input_ids"])
        self.bos: Ids = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
        self._special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special |= {text: tokenizer.convert_tokens_to_ids(text) for text in tokenizer.all_special_tokens}
        self.special_texts = sorted((text for text in self._special if text.strip()), key=lambda text: (-len(text), text))
        self.specials = re.compile("|".join(map(re.escape, self.special_texts)) if self.special_texts else r"(?!)")
        # An unknown character becomes the unknown token without any special text, so that one id says nothing about forgery.
        self._control_ids = frozenset(self._special.values()) - {tokenizer.unk_token_id}

    def refuse_specials(self, text: str, where: str) -> None:
        """BadRow if content holds the text of a special token: the tokenizer would read it as one, and a user could forge a turn."""
        if (found := self.specials.search(text)) is not None:
            raise BadRow(f"special token in the content: {where} holds {found[0]!r}, which this tokenizer reads as a control token")

    def is_forged(self, text: str, ids: Ids) -> bool:
        """Whether `ids` hold more or fewer control tokens than `text` spells out: a normaliser made one out of look-alike characters."""
        spelt = sum(self._special[found[0]] in self._control_ids for found in self.specials.finditer(text))
        return sum(i in self._control_ids for i in ids) != spelt

    def ids_of(self, texts: Sequence[str]) -> list[Ids]:
        """Each text's ids, with nothing added."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def text_of(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def begins(self, text: str) -> bool:
        """Whether a text spells out the start token that the tokenizer would put before it."""
        return bool(self.bos) and text.startswith(str(self.tokenizer.bos_token))
