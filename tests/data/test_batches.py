"""Rows that are prepared in batches, beside the tokenizer, are what transformers makes of each; what a template writes is found once."""

import random
from threading import Event

import pytest
from tokenizers import normalizers

from tests.data.common import END
from tests.data.templates import STYLES
from tests.tiny import tiny_tokenizer
from trimtab.bases.marks import Edges
from trimtab.bases.template import Template
from trimtab.data import Dropped, Example, Row, encode, encode_rows
from trimtab.data.encode import encode_batches
from trimtab.data.scored import read_ids
from trimtab.errors import DataError

CHATML = STYLES["chatml"].tokenizer
TALKS = (["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"] * 2, ["user", "assistant", "user", "assistant"] * 2)
CONTENTS = ("hi", " b ", "", "\n\na", "12", "assistant\n", "é", "a longer text of several words", END, f"x{END}", "<|im_", "end|>")


def rows_of(seed, count):
    rng = random.Random(seed)
    shapes = [rng.choice(TALKS) for _ in range(count)]
    return [
        Row(f"row {i}", messages=tuple({"role": role, "content": rng.choice(CONTENTS)} for role in shape)) for i, shape in enumerate(shapes)
    ]


def as_transformers(tokenizer, row):
    """(ids, supervised) where each prompt, and each text up to a turn's end token, is rendered and tokenised by transformers."""

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(n, ask):
        return tokenizer.apply_chat_template(list(row.messages[:n]), tokenize=False, add_generation_prompt=ask)

    whole = ids_of(text(len(row.messages), False))
    supervised = [False] * len(whole)
    for i in row.answers:
        begin, end = len(ids_of(text(i, True))), len(ids_of(text(i + 1, False).rstrip()))
        supervised[begin:end] = [True] * (end - begin)
    return whole, supervised


def plain(results):
    return [r.reason if isinstance(r, Dropped) else (r.ids.tolist(), r.supervised.tolist()) for r in results]


def test_each_row_is_what_transformers_makes_of_it_in_order():
    tokenizer, rows = CHATML(), rows_of(0, 60)
    batches = [rows[a : a + 7] for a in range(0, 60, 7)]
    found = list(encode_batches(batches, tokenizer, 1000))
    assert [batch for batch, _ in found] == batches
    results = plain([r for _, several in found for r in several])
    assert results == plain([encode_rows([row], tokenizer, 1000)[0] for row in rows])
    compared = 0
    for row, result in zip(rows, results, strict=True):
        if isinstance(result, str):
            assert any(END in m["content"] for m in row.messages)
        elif not any(END in m["content"] for m in row.messages):
            assert result == as_transformers(tokenizer, row)
            compared += 1
    assert compared > 15


def test_a_batch_is_rendered_while_the_one_before_is_tokenised(monkeypatch):
    asked, ids_of = Event(), encode._ids_of
    monkeypatch.setattr(encode, "_ids_of", lambda *args: asked.wait(30) and ids_of(*args))

    def batches():
        yield rows_of(1, 3)
        asked.set()  # the second is asked for, though nothing of the first is tokenised
        yield rows_of(2, 3)

    assert len(list(encode_batches(batches(), CHATML(), 1000))) == 2


def test_an_error_comes_behind_the_batches_before_it():
    def batches():
        yield rows_of(1, 3)
        yield rows_of(2, 3)
        raise DataError("the file ends here")

    found = encode_batches(batches(), CHATML(), 1000)
    assert [len(results) for _, results in (next(found), next(found))] == [3, 3]
    with pytest.raises(DataError, match="ends here"):
        next(found)
    without = tiny_tokenizer()
    without.chat_template = None
    pairs, talk = (
        [Row("", prompt="a", completion="b")],
        [Row("", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))],
    )
    found = encode_batches([pairs, talk, pairs], without, 1000)
    assert len(next(found)[1]) == 1
    with pytest.raises(DataError, match="no chat template"):
        next(found)


def test_what_a_template_writes_for_known_roles_is_found_once(monkeypatch):
    calls, last_turn = [], Template.last_turn
    monkeypatch.setattr(Template, "last_turn", lambda *args: calls.append(args) or last_turn(*args))
    asked = [Row("", prompt=f"question {i}", completion=f"answer {i}") for i in range(50)]
    encode_rows(asked, CHATML(), 1000)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("text", "joins"),
    [("<|im_end|>\n", False), ("a<|im_", True), ("end|>\n", True), ("_", True), ("<|im_end|>", False), ("\n", False), ("|>", True)],
)
def test_a_text_that_may_be_part_of_a_token_is_known(text, joins):
    assert Edges(["<|im_start|>", "<|im_end|>"]).may_join(text) is joins


def test_a_token_that_arises_between_template_and_content_is_seen():
    """The template's "<|im_" and a content that begins with "end|>" make an end of turn that neither of them holds."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_' }}{% endif %}"
    )
    good, forged = encode_rows([Row("", prompt="a", completion=text) for text in ("b", "end|>b")], tokenizer, 1000)
    assert not isinstance(good, Dropped) and (
        isinstance(forged, Dropped) or forged.ids.tolist().count(tokenizer.convert_tokens_to_ids(END)) != 2
    )


@pytest.mark.parametrize("system", ["x<|im_", "x<|im", "x"])
def test_contents_that_stand_side_by_side_spell_no_control_token(system):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role != 'system' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    )
    said = [{"role": "system", "content": system}, {"role": "user", "content": "end|>b"}, {"role": "assistant", "content": "c"}]
    found = encode_rows([Row("", messages=tuple(said))], tokenizer, 1000)[0]
    if system == "x<|im_":
        assert isinstance(found, Dropped) and "special token in the content" in found.reason
    else:
        assert tokenizer.decode(found.ids) == f"{system}end|>b{END}c{END}"


def test_texts_without_tokens_are_dropped():
    """Empty ones, and such as a tokenizer leaves nothing of."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    rows = [Row("", text=""), Row("", text="", read=()), Row("", text=" ", read=()), Row("", text="a", read=("b",))]
    empty = encode_rows(rows, tokenizer, 1000)
    assert all(isinstance(e, Dropped) and e.reason.startswith("empty") for e in empty[:3]) and isinstance(empty[3], Example)
    with pytest.raises(DataError, match="cannot be scored: empty"):
        read_ids(tokenizer, "")


@pytest.mark.parametrize("text", ["caf\udce9", "<|im_end|>\ud83d"])
def test_texts_that_are_not_unicode_are_not_scored(text: str):
    """As the command line gives bytes that are not UTF-8, in every place."""
    tokenizer, said = tiny_tokenizer(), [{"role": "user", "content": [{"type": "text", "text": text}]}]
    rows = (
        {"text": text},
        {"text": "a", "prompt": text},
        {"text": text, "prompt": "a"},
        {"text": "a", "steps": ["a", text]},
        {"messages": said},
    )
    for row in rows:
        with pytest.raises(DataError, match=r"cannot be scored: not U(TF-8: byte 0xe9|nicode: lone surrogate U\+D83D)"):
            read_ids(tokenizer, **row)
    assert len(read_ids(tokenizer, "caf\x1b")[0]) == 4, "a terminal's codes are text here"
