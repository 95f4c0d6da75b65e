"""The tests' own footing: every tiny family runs, differs by seed, and the tokenizer round-trips."""

import pytest
import torch

from tests.tiny import EOS_ID, FAMILIES, PAD_ID, VOCAB, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_family_runs_and_depends_on_seed(family):
    ids = torch.arange(24)[None] % 256
    with torch.no_grad():
        logits, again, other = (tiny_model(family, seed=s)(input_ids=ids).logits for s in (0, 0, 1))
    assert logits.shape == (1, 24, VOCAB)
    assert torch.equal(logits, again)
    assert logits.std() > 0.1 and (logits - other).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_right_by_being_zero_or_one(family):
    for name, parameter in tiny_model(family).named_parameters():
        assert parameter.std() > 0.01, name


def test_tokenizer_round_trips():
    tokenizer = tiny_tokenizer()
    text = "".join(map(chr, range(32, 127))) + "\n\t é 東京 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) <= VOCAB and max(tokenizer.get_vocab().values()) < VOCAB
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_ID, PAD_ID)
    assert tokenizer.decode([VOCAB - 1, 0]) == tokenizer.decode([0])


def test_tokenizer_has_a_chat_template():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
