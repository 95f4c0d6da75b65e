"""Repeated rows: inside one split, or in train and in a held-out split, where scores would measure what was memorised.

Training rows are looked at one by one, as they are read; of each, two digests are kept. What they are compared with are the held-out rows.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trimtab.data import Row
from trimtab.data.calls import said_by
from trimtab.tables import counted
from trimtab.train.findings import SHOWN, Finding

NGRAM, NEAR_SHARE, BOILERPLATE_ROWS = 13, 0.5, 10
"""Brown et al. 2020 (GPT-3), appendix C: overlap is counted in 13-grams, of which those in more than ten training rows are boilerplate.
A held-out row is named where half of its others stand in train."""

_LONE = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_EDGES = ".,;:!?\"'`()[]{}«»“”‘’…。、！？"
Gram = tuple[str, ...]


def words(text: str) -> tuple[str, ...]:
    """`text` as compared: NFKC, case folded, cut at blanks, punctuation around words left out; each CJK character is a word."""
    if text.isascii():
        folded = text.lower()
    else:
        folded = _LONE.sub(r" \1 ", unicodedata.normalize("NFKC", text).casefold())
    if len(_STRIPPED) > KEPT_WORDS:
        _STRIPPED.clear()
    return tuple(filter(None, map(_STRIPPED.__getitem__, folded.split())))


class _Stripped(dict[str, str]):
    """Words without the punctuation around them. Short ones are kept: a text is made of few words, again and again."""

    def __missing__(self, word: str) -> str:
        found = word if word.isalnum() else word.strip(_EDGES)
        if len(word) <= KEPT_LENGTH:
            self[word] = found
        return found


_STRIPPED = _Stripped()
KEPT_WORDS, KEPT_LENGTH = 20_000, 32
"""How many are kept before they are forgotten, and of how many characters at most."""


class Turn(NamedTuple):
    """An assistant turn and all that stands before it. keys: digests of what two turns share where they are the same, by kind, the
    strongest first; without words in the prompt there is only the text to compare. folded: of the words of both; worded: whether there
    are any. words, asked: the prompt's are the first `asked` of these."""

    keys: Mapping[str, bytes]
    folded: bytes
    worded: bool
    words: Sequence[str]
    asked: int


def turns(row: Row) -> list[Turn]:
    """Each assistant turn, its prompt being all turns before it. A prompt without an answer is one turn: so is a plain text, and a row that
    is a prompt alone or that a head reads. The prompt's digests go on from one turn to the next, so that long conversations cost what their
    length costs."""
    messages = row.conversation
    read = _Prompt()
    if messages is None:
        read.go_on(row.text or "", words(row.text or ""))
        return [read.turn("", ())]
    answers = frozenset(row.answers if row.asked is None and row.read is None else ())
    found, last = list[Turn](), max(answers, default=None)
    for i, message in enumerate(messages):
        text = said_by(message)
        said = words(text)
        if i in answers:
            found.append(read.turn(text, said))
            if i == last:  # nothing is asked after it
                break
        read.go_on(text, said)
    return found or [read.turn("", ())]


class _Prompt:
    """Texts, joined with line breaks, as digests of the text and of its words."""

    def __init__(self) -> None:
        self._text, self._asked, self._words, self._joint = _digest(), _digest(), list[str](), ""

    def go_on(self, text: str, said: Sequence[str]) -> None:
        self._text.update((self._joint + text).encode("utf-8", "surrogatepass"))
        if said:
            self._asked.update(("\n".join(said) + "\n").encode("utf-8", "surrogatepass"))
        self._words += said
        self._joint = "\n"

    def turn(self, answer: str, said: Sequence[str]) -> Turn:
        prompt, asked = self._text.digest(), self._asked.digest()
        folded = asked + _of("\n".join(said))
        keys = {"exact": prompt + _of(answer), "words": folded, "prompt": prompt, "prompt words": asked}
        if not self._words:
            del keys["words"], keys["prompt words"]
        return Turn(keys, folded, bool(self._words or said), self._words, len(self._words))


def _digest() -> Any:
    return hashlib.blake2b(digest_size=8)


def _of(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _number(content: bytes) -> int:
    """A digest that is compared within this process."""
    return hash(content) & 0xFFFFFFFFFFFFFFFF


class Repeats:
    """Rows of one split that repeat an earlier one, word for word or in all but case, blanks and punctuation."""

    def __init__(self) -> None:
        self._exact, self._folded, self._worded = array("Q"), array("Q"), bytearray()

    def add(self, row: Row, said: Sequence[Turn]) -> None:
        """said: the turns of the row's first segment."""
        every = [*said, *[turn for other in row.others for turn in turns(other)]]
        self._exact.append(_number(b"\n".join([s.content_key for s in row.segments])))
        self._folded.append(_number(b"".join([turn.folded for turn in every])))
        self._worded.append(any(turn.worded for turn in every))

    def findings(self, where: str, origin: Callable[[int], str]) -> list[Finding]:
        """origin: of the row that was added as number n."""
        exact, folded = _firsts(self._exact), _firsts(self._folded)
        here = np.arange(len(exact))
        same = exact < here
        alike = ~same & (folded < here) & np.array(self._worded, dtype=bool)
        fix = "take them out, or give the source a weight if they are meant to count more."
        found = []
        for repeating, first, what in (
            (same, exact, ""),
            (alike, folded, f" {_LOOSELY}"),
        ):
            if count := int(repeating.sum()):
                items = tuple(f"{origin(i)}: as {origin(first[i])}" for i in np.flatnonzero(repeating)[:SHOWN].tolist())
                said = "1 row repeats" if count == 1 else f"{count} rows repeat"
                found.append(Finding("warning", where, f"{said} another row{what}", items, count, fix))
        return found


def _firsts(digests: Sequence[int]) -> np.ndarray:
    """For each digest, where it stands first."""
    _, first, which = np.unique(np.array(digests, dtype=np.uint64), return_index=True, return_inverse=True)
    found: np.ndarray = first[which]
    return found


class Contamination:
    """Held-out rows of one split that train holds, each under the strongest of five kinds: prompt and answer, the same but for case, blanks
    and punctuation, the prompt, the same but for those, half of its n-grams. A prompt shorter than `NGRAM` words is compared whole only.

    Training rows are added one by one; memory grows with the held-out rows alone.
    """

    def __init__(self, rows: Sequence[Row]):
        self._held = [(row, turns(row)[-1]) for row in rows]
        self._first: dict[tuple[str, bytes], str] = dict.fromkeys((item for _, t in self._held for item in t.keys.items()), "")
        self._near = Near([(row, t.words[: t.asked]) for row, t in self._held])

    def add(self, row: Row, said: Sequence[Turn]) -> None:
        """said: the row's turns, of which each is compared."""
        for turn in said:
            for item in turn.keys.items():
                if self._first.get(item) == "":
                    self._first[item] = row.origin
        if said:
            self._near.add(row, said[-1].words[: said[-1].asked])

    def findings(self, train_where: str, held_where: str) -> list[Finding]:
        kinds: dict[str, list[str]] = {kind: [] for kind in _KINDS}
        rest = []
        for i, (row, turn) in enumerate(self._held):
            hit = next((item for item in turn.keys.items() if self._first[item]), None)
            if hit is None:
                rest.append(i)
            else:
                kinds[hit[0]].append(f"{row.origin}: as {self._first[hit]}")
        kinds["ngrams"], longest = self._near.found(rest)
        found = [
            Finding.of(
                "warning",
                held_where,
                f"{len(items)} of {counted(len(self._held), 'row')} {_KINDS[kind][len(items) > 1]} {train_where}",
                items,
                _FIX,
            )
            for kind, items in kinds.items()
            if items
        ]
        if longest:
            compared = sum(self._held[i][1].asked >= NGRAM for i in rest)
            text = (
                f"{NGRAM}-word overlap with {train_where}: at most {longest:.0%} of a row's, over the {compared} rows that are long enough"
            )
            found.append(Finding("note", held_where, text))
        return found


_LOOSELY = "but for case, blanks or punctuation"
_KINDS = {
    "exact": ("stands with its answer in", "stand with their answers in"),
    "words": (f"stands with its answer, {_LOOSELY}, in", f"stand with their answers, {_LOOSELY}, in"),
    "prompt": ("asks what is asked, with another answer, in", "ask what is asked, with another answer, in"),
    "prompt words": (
        f"asks, {_LOOSELY}, what is asked, with another answer, in",
        f"ask, {_LOOSELY}, what is asked, with another answer, in",
    ),
    "ngrams": (
        f"shares at least {NEAR_SHARE:.0%} of its {NGRAM}-word runs with",
        f"share at least {NEAR_SHARE:.0%} of their {NGRAM}-word runs with",
    ),
}
"""What one held-out row does, and what several do."""
_FIX = "take them out of one of the two: scores on them measure memory."


class Near:
    """Held-out rows, given with the words of their prompts, whose n-grams stand in the training rows that are added."""

    def __init__(self, held: Sequence[tuple[Row, Sequence[str]]]):
        self._held = [(row, set(_ngrams(asked))) for row, asked in held]
        self._wanted: set[Gram] = set().union(*(grams for _, grams in self._held))
        self._marks = {(gram[0], gram[NGRAM // 2], gram[-1]) for gram in self._wanted}
        self._seen: Counter[Gram] = Counter()
        self._where: dict[Gram, str] = {}

    def add(self, row: Row, asked: Sequence[str]) -> None:
        """asked: the words of a training row's prompt. A run is made only where its first, middle and last word are those of one that is
        wanted."""
        marks, middle, last = self._marks, asked[NGRAM // 2 :], asked[NGRAM - 1 :]
        if marks.isdisjoint(zip(asked, middle, last, strict=False)):
            return
        places = [i for i, three in enumerate(zip(asked, middle, last, strict=False)) if three in marks]
        for gram in {tuple(asked[i : i + NGRAM]) for i in places} & self._wanted:
            self._seen[gram] += 1
            self._where.setdefault(gram, row.origin)

    def found(self, among: Iterable[int]) -> tuple[list[str], float]:
        """Of the held-out rows with these numbers: (those whose n-grams stand in train to `NEAR_SHARE` or more, the largest share of the
        others)."""
        near, most = [], 0.0
        for row, mine in (self._held[i] for i in among):
            telling = [g for g in mine if self._seen[g] <= BOILERPLATE_ROWS]
            hits = [g for g in telling if self._seen[g]]
            share = len(hits) / len(telling) if telling else 0.0
            if share >= NEAR_SHARE:
                origin, _ = Counter(self._where[g] for g in hits).most_common(1)[0]
                near.append(f"{row.origin}: {share:.0%}, most of it in {origin}")
            else:
                most = max(most, share)
        return near, most


def _ngrams(text: Sequence[str]) -> Iterable[Gram]:
    return (tuple(text[i : i + NGRAM]) for i in range(len(text) - NGRAM + 1))
