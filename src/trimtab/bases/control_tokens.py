"""A tokenizer's control tokens: no content forges one. Texts become ids with nothing added."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import compress, count
from typing import Any

from trimtab.bases.dialect import BadRow

Ids = list[int]
LONGEST_HEADER, KNOWN_HEADERS = 64, 4096
"""Characters that a template may write between an added token and an answer, and how many such texts are remembered."""


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
        self._headers: dict[tuple[str, str], Ids | None] = {}
        self._control_ids = frozenset(self._special.values()) - {tokenizer.unk_token_id}

    def refuse_specials(self, text: str, where: str) -> None:
        """BadRow if content holds the text of a special token: the tokenizer would read it as one, and a user could forge a turn."""
        if (found := self.specials.search(text)) is not None:
            raise BadRow(f"special token in the content: {where} holds {found[0]!r}, which this tokenizer reads as a control token")

    def is_forged(self, text: str, ids: Ids) -> bool:
        """Whether `ids` hold more or fewer control tokens than `text` spells out: a normaliser made one out of look-alike characters."""
        spelt = sum(self._special[found[0]] in self._control_ids for found in self.specials.finditer(text))
        return sum(map(self._control_ids.__contains__, ids)) != spelt

    def ids_of(self, texts: Sequence[str]) -> list[Ids]:
        """Each text's ids, with nothing added."""
        if not texts:
            return []
        if self._backend is not None:
            if self._backend.truncation is not None:  # setting it waits until no thread tokenizes, and keeps all others waiting
                self._backend.no_truncation()
            if self._backend.padding is not None:
                self._backend.no_padding()
            return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer without transformers around it, which adds offsets, tokens' texts and masks: a third of the time. None where the
        tokenizer's class has a way of its own."""
        own = type(self.tokenizer)
        ways = [getattr(getattr(own, name, None), "__module__", "") for name in ("__call__", "_encode_plus")]
        plain = ways == ["transformers.tokenization_utils_base", "transformers.tokenization_utils_tokenizers"]
        return self.tokenizer.backend_tokenizer if plain and not self.tokenizer.split_special_tokens else None

    def ends_in(self, text: str, cuts: Sequence[int], ids: Ids) -> list[int] | None:
        """How many of the `ids` of a text are the ids of its first n characters, for each n of `cuts`, in order; None where these do not
        begin with them, or it is not known.

        The text before an added token, and what it becomes, do not depend on what stands behind it. So the ids of text[:n] are those up to
        the last added token in it, and those of the few characters from there to n, which templates write ("assistant\\n").
        """
        if self._added is None:
            return None
        matching, known = self._added
        marks, places = list(matching.finditer(text)), list(compress(count(), map(self._added_ids.__contains__, ids)))
        if [known[m[0]] for m in marks] != [ids[i] for i in places]:
            return None
        found, k = list[int](), 0
        for n in cuts:
            while k < len(marks) and marks[k].end() <= n:
                k += 1
            if not k or (k < len(marks) and marks[k].start() < n):
                return None
            end, rest = places[k - 1] + 1, text[marks[k - 1].end() : n]
            if rest:
                if len(rest) > LONGEST_HEADER or (between := self._behind(marks[k - 1][0], rest)) is None:
                    return None
                if ids[end : end + len(between)] != between:
                    return None
                end += len(between)
            found.append(end)
        return found

    def _behind(self, mark: str, rest: str) -> Ids | None:
        """The ids of `rest` at the end of a text, behind an added token."""
        if (mark, rest) not in self._headers:
            if len(self._headers) >= KNOWN_HEADERS:
                self._headers.clear()
            first, *ids = self.ids_of([mark + rest])[0]
            self._headers[mark, rest] = ids if first in self._added_ids and self._added_ids.isdisjoint(ids) else None
        return self._headers[mark, rest]

    @cached_property
    def _added(self) -> tuple[re.Pattern[str], Mapping[str, int]] | None:
        """What matches added tokens in a text, and their ids; None where the text around decides whether one is read as such."""
        added = self.tokenizer.added_tokens_decoder
        if not added or any(token.single_word or not token.content for token in added.values()):
            return None
        known = {token.content: i for i, token in added.items()}
        return re.compile("|".join(map(re.escape, sorted(known, key=lambda text: (-len(text), text))))), known

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._added[1].values()) if self._added else frozenset()

    def text_of(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def begins(self, text: str) -> bool:
        """Whether a text spells out the start token that the tokenizer would put before it."""
        return bool(self.bos) and text.startswith(str(self.tokenizer.bos_token))
