"""Where an answer begins and ends among the ids of a whole text, without tokenising its pieces: as the tokenizer says of each beginning."""

import random

import pytest

from tests.data.common import END
from tests.data.templates import STYLES
from tests.tiny import tiny_tokenizer
from trimtab.bases.control_tokens import ControlTokens

CONTENTS = ("hi", "\n\na", " b ", "\n", "", "x\n\n\n", "12", "assistant\n", "a\u0301")


def ends_in(control, text, cuts, ids):
    marks = control.marks(text, cuts)
    return None if marks is None else marks.ends_in(ids, control.added_in(ids))


def plainly(tokenizer, text):
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", STYLES)
def test_boundaries_are_where_the_tokens_of_each_beginning_end(name):
    tokenizer, rng, found = STYLES[name].tokenizer(), random.Random(name), 0
    control = ControlTokens(tokenizer)
    marks = [token.content for token in tokenizer.added_tokens_decoder.values()] or [END]
    for _ in range(40):
        text, cuts = "", []
        for _ in range(4):
            text += rng.choice(marks)
            content = rng.choice(CONTENTS)
            cuts.append(len(text) + rng.randint(0, len(content)))
            text += content
        ids = plainly(tokenizer, text)
        assert control.ids_of([text]) == [ids]
        if (ends := ends_in(control, text, cuts, ids)) is None:
            continue
        assert [ids[:end] for end in ends] == [plainly(tokenizer, text[:n]) for n in cuts]
        found += 1
    assert found


def test_merged_boundaries_are_not_known():
    """Behind the header stands "\\n", which this tokenizer reads together with the breaks that the answer begins with."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "a": 1, "\n": 2, "\n\n": 3, "\n\n\n": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("a", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", additional_special_tokens=["<|im_start|>"])
    control, header = ControlTokens(tokenizer), "<|im_start|>a\n"
    for answer, known in (("a", True), ("\na", False), ("\n\na", False)):
        ids = plainly(tokenizer, header + answer)
        assert ends_in(control, header + answer, [len(header)], ids) == ([3] if known else None)
    assert ends_in(control, header, [len(header)], [0, 1, 2]) is None  # not the ids of this text


def test_words_that_only_stand_alone_are_left_to_the_tokenizer():
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("word", single_word=True)])
    text = "word" + END
    assert ends_in(ControlTokens(tokenizer), text, [4], plainly(tokenizer, text)) is None


def test_tokenizing_changes_nothing_of_a_tokenizer_that_threads_share(monkeypatch):
    """Setting a tokenizer's truncation waits until no thread tokenizes: a short text would wait for the longest of all."""
    control, calls = ControlTokens(tiny_tokenizer()), list[str]()

    class Shared:
        truncation = padding = None
        no_truncation = no_padding = lambda self: calls.append("set")

        def encode_batch_fast(self, texts, add_special_tokens):
            return control.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    want = control.ids_of(["some text"])
    monkeypatch.setitem(control.__dict__, "_backend", Shared())
    assert control.ids_of(["some text"]) == want and calls == []
