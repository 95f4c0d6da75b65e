"""Repeated rows: inside one split, or in train and in a held-out split, where scores would measure what was memorised."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from trimtab.data import Row
from trimtab.train.findings import Finding

NGRAM, NEAR_SHARE, BOILERPLATE_ROWS = 13, 0.5, 10
"""Brown et al. 2020 (GPT-3), appendix C: overlap is counted in 13-grams, of which those in more than ten training rows are boilerplate.
A held-out row is named where half of its others stand in train."""

_LONE = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])")
_EDGES = ".,;:!?\"'`()[]{}«»“”‘’…。、！？"


def words(text: str) -> tuple[str, ...]:
    """`text` as compared: NFKC, case folded, cut at blanks, punctuation around words left out; each CJK character is a word."""
    folded = _LONE.sub(r" \1 ", unicodedata.normalize("NFKC", text).casefold())
    return tuple(w for word in folded.split() if (w := word.strip(_EDGES)))


def turns(row: Row) -> list[tuple[str, str]]:
    """(prompt, answer) of each assistant turn, the prompt being all turns before it; a plain text is a prompt without an answer."""
    messages = row.conversation
    if messages is None:
        return [(row.text or "", "")]
    return [("\n".join(m["content"] for m in messages[:i]), messages[i]["content"]) for i in row.answers]


def duplicates(where: str, rows: Sequence[Row]) -> list[Finding]:
    """Rows of one split that repeat an earlier one, word for word or in all but case, blanks and punctuation."""
    first: dict[Any, str] = {}
    same, alike = [], []
    for row in rows:
        exact, folded = row.content_key(), tuple((words(p), words(a)) for p, a in turns(row))
        if exact in first:
            same.append(f"{row.origin}: as {first[exact]}")
        elif folded in first and any(any(pair) for pair in folded):
            alike.append(f"{row.origin}: as {first[folded]}")
        first.setdefault(exact, row.origin)
        first.setdefault(folded, row.origin)
    found = [(same, "repeat another row"), (alike, "repeat another row but for case, blanks or punctuation")]
    fix = "take them out, or give the source a weight if they are meant to count more."
    return [Finding.of("warning", where, f"{len(items)} rows {what}", items, fix) for items, what in found if items]


def contamination(train_where: str, train: Sequence[Row], held_where: str, held: Sequence[Row]) -> list[Finding]:
    """Held-out rows that train holds, each under the strongest of five kinds: prompt and answer, the same but for case, blanks and
    punctuation, the prompt, the same but for those, half of its n-grams. A prompt shorter than `NGRAM` words is compared whole only."""
    index: dict[Any, str] = {}
    for row in train:
        for prompt, answer in turns(row):
            for key in _keys(prompt, answer).values():
                index.setdefault(key, row.origin)
    kinds: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    rest = []
    for row in held:
        prompt, answer = turns(row)[-1]
        hit = next((kind for kind, key in _keys(prompt, answer).items() if key in index), None)
        if hit is None:
            rest.append((row, words(prompt)))
        else:
            kinds[hit].append(f"{row.origin}: as {index[_keys(prompt, answer)[hit]]}")
    near, longest = _near(train, rest)
    kinds["ngrams"] = near
    found = [
        Finding.of("warning", held_where, f"{len(items)} of {len(held)} rows {_KINDS[kind]} {train_where}", items, _FIX)
        for kind, items in kinds.items()
        if items
    ]
    if longest:
        compared = sum(len(w) >= NGRAM for _, w in rest)
        text = f"{NGRAM}-word overlap with {train_where}: at most {longest:.0%} of a row's, over the {compared} rows that are long enough"
        found.append(Finding("note", held_where, text))
    return found


_KINDS = {
    "exact": "stand with their answers in",
    "words": "stand with their answers, but for case, blanks or punctuation, in",
    "prompt": "ask what is asked, with another answer, in",
    "prompt words": "ask, but for case, blanks or punctuation, what is asked, with another answer, in",
    "ngrams": f"share at least {NEAR_SHARE:.0%} of their {NGRAM}-word runs with",
}
_FIX = "take them out of one of the two: scores on them measure memory."


def _keys(prompt: str, answer: str) -> dict[str, Any]:
    """What two rows share where they are the same, by kind, the strongest first. Without words there is only the text to compare."""
    asked, said = words(prompt), words(answer)
    keys = {"exact": (prompt, answer), "words": (asked, said), "prompt": prompt, "prompt words": asked}
    return {kind: (kind, key) for kind, key in keys.items() if asked or "words" not in kind}


def _near(train: Sequence[Row], held: Sequence[tuple[Row, tuple[str, ...]]]) -> tuple[list[str], float]:
    """(rows whose n-grams stand in train to `NEAR_SHARE` or more, the largest share of the others). Train is streamed: memory grows with
    the held-out rows alone."""
    grams = [(row, set(_ngrams(w))) for row, w in held]
    wanted = set().union(*(g for _, g in grams))
    seen: Counter[tuple[str, ...]] = Counter()
    where: dict[tuple[str, ...], str] = {}
    for row in train if wanted else ():
        for gram in {g for prompt, _ in turns(row)[-1:] for g in _ngrams(words(prompt))} & wanted:
            seen[gram] += 1
            where.setdefault(gram, row.origin)
    near, most = [], 0.0
    for row, mine in grams:
        telling = [g for g in mine if seen[g] <= BOILERPLATE_ROWS]
        hits = [g for g in telling if seen[g]]
        share = len(hits) / len(telling) if telling else 0.0
        if share >= NEAR_SHARE:
            origin, _ = Counter(where[g] for g in hits).most_common(1)[0]
            near.append(f"{row.origin}: {share:.0%}, most of it in {origin}")
        else:
            most = max(most, share)
    return near, most


def _ngrams(text: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    return (text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1))
