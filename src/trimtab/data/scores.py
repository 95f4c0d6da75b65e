"""Scores of generated answers against references. Each takes two lists of equal length and returns percent, 0 to 100: a mean over
rows (BLEU: of the corpus as a whole).

Raises DataError if the lists are empty or differ in length.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from trimtab.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WORD = re.compile(r"[^\W_]+")
_JSON_MARKS = re.compile(r'[{}\[\]:,"]')


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """100 · mean[prediction = reference], blanks around either ignored; case and punctuation count (labels and JSON differ by them)."""
    return _mean([float(p.strip() == r.strip()) for p, r in _pairs(predictions, references)])


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """100 · mean F1 of words as bags, SQuAD's (Rajpurkar et al. 2016): F1 = 2PR / (P + R), P = common / predicted, R = common / reference.

    Words are what is left after lower-casing and removing ASCII punctuation and the articles a, an, the. Two empty answers score 1. Where
    the reference is a JSON object or list, the words are those of its keys and values, however it is spaced.
    """
    return _mean([_f1_of_bags(*_bags(p, r)) for p, r in _pairs(predictions, references)])


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> float:
    """100 · mean F1 of the longest common subsequence of words (Lin 2004, β = 1): P = LCS / predicted, R = LCS / reference.

    Words are runs of letters and digits, lower-cased, in any script (the `rouge_score` package knows ASCII only); no stemming. Without
    words on one side the score is 0.
    """
    return _mean([_rouge_l(_WORD.findall(p.lower()), _WORD.findall(r.lower())) for p, r in _pairs(predictions, references)])


def valid_json(predictions: Sequence[str], references: Sequence[str]) -> float:
    """100 · mean[the prediction is one JSON value], blanks around it ignored; NaN and Infinity are not JSON. References only count."""
    return _mean([float(_is_json(p)) for p, _ in _pairs(predictions, references)])


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU as `sacrebleu` computes it by default (Post 2018; 13a tokens, up to 4-grams, exponential smoothing), 0 to 100.

    DataError if sacrebleu is not installed.
    """
    pairs = _pairs(predictions, references)
    if not has_bleu():
        raise DataError("BLEU needs the package sacrebleu", fix="pip install 'trimtab[eval]'")
    from sacrebleu import corpus_bleu

    return float(corpus_bleu([p for p, _ in pairs], [[r for _, r in pairs]], force=True).score)  # force: no advice on standard error


def has_bleu() -> bool:
    """Whether sacrebleu is installed."""
    return find_spec("sacrebleu") is not None


def perplexity(loss: float) -> float | None:
    """exp(mean nats a target); None if that is no finite number."""
    return math.exp(loss) if loss < 700 else None


SCORES: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
    "bleu": bleu,
    "valid_json": valid_json,
}


def _pairs(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    if not predictions or len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions cannot be scored against {len(references)} references")
    return list(zip(predictions, references, strict=True))


def _mean(scores: list[float]) -> float:
    return 100 * sum(scores) / len(scores)


def _bags(predicted: str, reference: str) -> tuple[list[str], list[str]]:
    """The words of both. A prediction that should be JSON and is none is read as text in which JSON's marks stand between words."""
    wanted = _container(reference)
    if wanted is None:
        return _squad_words(predicted), _squad_words(reference)
    said = _container(predicted)
    return _json_words(said) if said is not None else _squad_words(_JSON_MARKS.sub(" ", predicted)), _json_words(wanted)


def _container(text: str) -> Any:
    """The object or list that a text is as JSON; None where it is none."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return _parsed(text)
    except (ValueError, RecursionError):
        return None


def _json_words(value: Any) -> list[str]:
    """Of all keys and values. A number, true, false and null are a word each; 1 and 1.0 are the same."""
    words, rest = list[str](), [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list):
            rest += item
        elif isinstance(item, str):
            words += _squad_words(item)
        else:
            words.append(json.dumps(int(item) if isinstance(item, float) and item.is_integer() else item))
    return words


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1_of_bags(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    common = (Counter(predicted) & Counter(reference)).total()
    return 2 * common / (len(predicted) + len(reference))  # = 2PR / (P + R)


def _rouge_l(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return 0.0
    return 2 * _lcs(predicted, reference) / (len(predicted) + len(reference))


def _lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, a bit for each word of `a` (Hyyrö 2004): zeros of `row` count matched words."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()


def _is_json(text: str) -> bool:
    try:
        _parsed(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str) -> Any:
    """A JSON value; ValueError or RecursionError where it is none."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)
