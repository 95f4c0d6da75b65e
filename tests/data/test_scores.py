"""Scores against values worked out by hand from the formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data import SCORES, exact_match, rouge_l, token_f1, valid_json
from trimtab.data.scores import _lcs
from trimtab.errors import DataError


def test_exact_match():
    assert exact_match(["a", " a\n", "A", "a."], ["a", "a", "a", "a"]) == 50


def test_token_f1():
    assert token_f1(["The cat, sat!"], ["a cat sat"]) == 100
    # predicted {cat, cat, ran}, reference {cat, sat}: common 1, P = 1/3, R = 1/2, F1 = 0.4
    assert token_f1(["cat cat ran"], ["cat sat"]) == pytest.approx(40)
    assert token_f1(["", "", "x"], ["", "x", "y"]) == pytest.approx(100 / 3)


def test_rouge_l():
    # Lin 2004: "police kill the gunman" against "police killed the gunman": LCS 3 of 4 and 4
    assert rouge_l(["police kill the gunman"], ["Police killed the gunman."]) == pytest.approx(75)
    assert rouge_l(["a b c d e"], ["c a"]) == pytest.approx(100 * 2 * 1 / 7)
    assert rouge_l(["", "東京 は"], ["x", "東京 は"]) == 50


def test_valid_json():
    assert valid_json(['{"a": 1}', "[1", " 3 ", "NaN", '{"a": 1} x', "[" * 100_000], [""] * 6) == pytest.approx(100 * 2 / 6)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_lists_must_match(score):
    for predictions, references in (([], []), (["a"], ["a", "b"])):
        with pytest.raises(DataError):
            score(predictions, references)


WORDS = st.lists(st.sampled_from("abcd"), max_size=12)


@given(WORDS, WORDS)
def test_lcs_equals_the_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert _lcs(a, b) == table[-1][-1]
