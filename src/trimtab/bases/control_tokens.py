"""A tokenizer's control tokens: no content forges one. Texts become ids with nothing added."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress, count
from typing import Any

from trimtab.bases.marks import Edges, Ids, Marks
from trimtab.bases.remembered import remembered
from trimtab.bases.tool_turns import BadRow
from trimtab.bases.written import common_start

LONGEST_HEADER = 64
"""Characters that a template may write between an added token and an answer."""


SPELT = "special token in the content"
"""How it begins why a row is left out whose content spells out a control token."""


@dataclass(frozen=True)
class Cut:
    """A text without its beginning, which it shares with the text before it. rest: from the last added token that both have on; all of it
    where they have none in common. shared: how many they have in common. added: the ids of all that the text before spells out."""

    rest: str
    shared: int = 0
    added: Ids = field(default_factory=list)


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
            raise BadRow(f"{SPELT}: {where} holds {found[0]!r}, which this tokenizer reads as a control token")

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

    @property
    def shared(self) -> bool:
        """Whether several threads may tokenise at the same time."""
        return self._backend is not None

    def marks(self, text: str, cuts: Sequence[int]) -> Marks | None:
        """By what the ids of the first n characters of a text are found among its ids, for each n of `cuts`, in order; None where it is not
        known."""
        if self._added is None:
            return None
        matching, known = self._added
        marks, found, k = list(matching.finditer(text)), list[tuple[int, Ids]](), 0
        for n in cuts:
            while k < len(marks) and marks[k].end() <= n:
                k += 1
            if not k or (k < len(marks) and marks[k].start() < n):
                return None
            between: Ids | None = []
            if rest := text[marks[k - 1].end() : n]:
                between = None if len(rest) > LONGEST_HEADER else self._behind(marks[k - 1][0], rest)
            if between is None:
                return None
            found.append((k, between))
        return Marks([known[m[0]] for m in marks], tuple(found))

    @cached_property
    def special_edges(self) -> Edges:
        return Edges(self.special_texts)

    @cached_property
    def added_edges(self) -> Edges:
        return Edges(self._added[1] if self._added else ())

    def spells(self, text: str, added: Ids) -> bool:
        """Whether ids that hold these added tokens, and no others, hold the control tokens that the text spells out."""
        return self._control_ids <= self._added_ids and not self.is_forged(text, added)

    def holds_added(self, text: str) -> bool:
        """Whether a text that spells out no control token spells out an added token."""
        return self._beside is not None and self._beside.search(text) is not None

    @cached_property
    def _beside(self) -> re.Pattern[str] | None:
        """Matches added tokens; None where there are none but the special ones."""
        return self._added[0] if self._added and self._added[1].keys() != set(self.special_texts) else None

    def added_in(self, ids: Ids) -> list[int]:
        """Where added tokens stand."""
        return list(compress(count(), map(self._added_ids.__contains__, ids)))

    def parted(self, before: str, text: str) -> Cut:
        """Where `text`, which begins as the text before it does, can be cut for `continued`: at the last added token that both have."""
        if self._added is None:
            return Cut(text)
        matching, known = self._added
        marks, same = list(matching.finditer(before)), common_start(before, text)
        shared = [m.start() for m in marks if m.end() <= same]
        return Cut(text[shared[-1] :], len(shared), [known[m[0]] for m in marks]) if shared else Cut(text)

    def continued(self, ids: Ids, cut: Cut, rest: Ids) -> Ids | None:
        """The ids of a text that was cut, from those of the text before it and those of the cut's rest. None where they are not known: a
        normaliser made an added token of the text before out of look-alike characters."""
        if not cut.shared:
            return rest
        places = self.added_in(ids)
        return [*ids[: places[cut.shared - 1]], *rest] if [ids[i] for i in places] == cut.added else None

    def _behind(self, mark: str, rest: str) -> Ids | None:
        """The ids of `rest` at the end of a text, behind an added token."""

        def find() -> Ids | None:
            first, *ids = self.ids_of([mark + rest])[0]
            return ids if first in self._added_ids and self._added_ids.isdisjoint(ids) else None

        return remembered(self._headers, (mark, rest), find)

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
