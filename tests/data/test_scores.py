"""Scores against values worked out by hand from the formulas."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab.data import SCORES, Row, answer_of, bleu, exact_match, find_labels, perplexity, rouge_l, scores, token_f1, valid_json
from trimtab.data.scores import _lcs
from trimtab.errors import DataError


def test_exact_match():
    assert exact_match(["a", " a\n", "A", "a."], ["a", "a", "a", "a"]) == 50


def test_token_f1():
    assert token_f1(["The cat, sat!"], ["a cat sat"]) == 100
    # predicted {cat, cat, ran}, reference {cat, sat}: common 1, P = 1/3, R = 1/2, F1 = 0.4
    assert token_f1(["cat cat ran"], ["cat sat"]) == pytest.approx(40)
    assert token_f1(["", "", "x"], ["", "x", "y"]) == pytest.approx(100 / 3)


def test_token_f1_sees_the_keys_and_values_of_json():
    compact, spaced = '{"HT Media":"positive","Gold":"neutral"}', '{\n "Gold": "neutral", "HT Media": "positive"}'
    assert token_f1([spaced, compact], [compact, spaced]) == 100
    # {ht, media, positive, gold, neutral} in the reference; one value is another: 4 common of 5 and 5
    assert token_f1(['{"HT Media":"positive","Gold":"negative"}'], [compact]) == pytest.approx(80)
    # {gold, neutral}: P = 1, R = 2/5; whole, cut off, or said in words
    assert token_f1(['{"Gold":"neutral"}', '{"Gold":"neutral"', "gold: neutral"], [compact] * 3) == pytest.approx(100 * 4 / 7)
    # numbers, true and null are words: {x, 1.5, true, null, 2} and {x, 15, true, null, 2}
    assert token_f1(['[{"x":1.5},true,null,2.0]'], ['[{"x":15},true,null,2]']) == pytest.approx(80)
    assert token_f1(["{}", "[]", "x"], ["{}", "{}", "[]"]) == pytest.approx(100 * 2 / 3)


def test_token_f1_reads_other_text_as_squad_does():
    """What is no object and no list of JSON: Rajpurkar's own, in which "a-b" is one word."""
    assert token_f1(['"a-b"', "{not json}", "3"], ["ab", "not json", "3."]) == 100
    assert token_f1(['{"cat":"sat"}'], ["cat sat"]) == 0
    assert token_f1(["[" * 100_000], ["[" * 100_000]) == 100


def test_rouge_l():
    # Lin 2004: "police kill the gunman" against "police killed the gunman": LCS 3 of 4 and 4
    assert rouge_l(["police kill the gunman"], ["Police killed the gunman."]) == pytest.approx(75)
    assert rouge_l(["a b c d e"], ["c a"]) == pytest.approx(100 * 2 * 1 / 7)
    assert rouge_l(["", "東京 は"], ["x", "東京 は"]) == 50


def test_valid_json():
    assert valid_json(['{"a": 1}', "[1", " 3 ", "NaN", '{"a": 1} x', "[" * 100_000], [""] * 6) == pytest.approx(100 * 2 / 6)


def test_bleu():
    assert bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    # 1- to 4-grams matched: 5 of 6, 4 of 5, 3 of 4, 2 of 3; lengths are equal: (5/6 · 4/5 · 3/4 · 2/3) ** (1/4)
    assert bleu(["the cat sat on the rug"], ["the cat sat on the mat"]) == pytest.approx(100 * (1 / 3) ** 0.25)
    # of the corpus as a whole, not a mean over rows; half the length: exp(1 - 12/6)
    assert bleu(["the cat sat on the mat", ""], ["the cat sat on the mat"] * 2) == pytest.approx(100 * math.exp(-1))


def test_bleu_without_sacrebleu_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(scores, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'trimtab\[eval\]'"):
        bleu(["a"], ["a"])


def test_perplexity():
    assert perplexity(math.log(2)) == pytest.approx(2)
    assert [perplexity(x) for x in (math.nan, math.inf, 1e6)] == [None] * 3


def test_labels_are_the_distinct_answers():
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": " b"}, {"role": "user", "content": "thanks"})
    rows = [
        Row("f:1", messages=turns),
        Row("f:2", prompt="p", completion="a "),
        Row("f:3", text="t"),
        Row("f:4", prompt="p", completion="a"),
    ]
    assert [answer_of(r) for r in rows] == [" b", "a ", None, "a"]
    assert find_labels(rows, "f") == ["a", "b"]


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_lists_must_match(score):
    for predictions, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(DataError):
            score(predictions, references)


WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(WORDS, WORDS)
def test_lcs_equals_the_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert _lcs(a, b) == table[-1][-1]
