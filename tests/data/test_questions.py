"""What evaluation compares: a generated answer without what the template writes around it, whatever the template."""

from __future__ import annotations

import pytest

from tests.data.common import chat
from tests.data.templates import STYLES
from tests.laws.test_law13_rendering import CONVERSATIONS
from trimtab.bases.dialect import dialect_of
from trimtab.data import Example, Row, asked, encode_row, end_of_turn_id


def generated(example, tokenizer):
    """What a model that learnt the row by heart generates: the supervised tokens up to the first that generation stops on."""
    stops, ids = {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}, example.ids[example.supervised].tolist()
    return ids[: next(i for i, token in enumerate(ids) if token in stops)]


@pytest.mark.parametrize("style", STYLES)
def test_what_was_learnt_by_heart_is_right_and_anything_else_is_not(style):
    tokenizer, rows = STYLES[style].tokenizer(), 0
    for name, messages in CONVERSATIONS.items():
        row = Row("r:1", messages=tuple(messages))
        example = encode_row(row, tokenizer, 10_000, last_turn_only=True)
        if not isinstance(example, Example):
            continue
        rows += 1
        prompt, reference, written = asked(row, tokenizer)
        assert prompt == example.ids[: len(prompt)].tolist() and reference == messages[-1]["content"]
        ids = generated(example, tokenizer)
        assert written.content(ids, reference, tokenizer).strip() == reference.strip(), name
        bare = tokenizer.encode(reference, add_special_tokens=False)
        assert written.content(bare, reference, tokenizer).strip() == reference.strip(), name
        wrong = tokenizer.encode("else" + reference, add_special_tokens=False)
        assert written.content(wrong, reference, tokenizer).strip() != reference.strip(), name
    assert rows >= 8


AROUND = {
    "qwen-3": "<think>\n\n</think>\n\n",
    "harmony": "<|channel|>final<|message|>",
    "headless": "<|im_start|>assistant\n",
    "nemotron": "</think>",
    "quoting": "<<",
}


@pytest.mark.parametrize("style", AROUND)
@pytest.mark.parametrize("said", ["no", "s", "final", "think", "assistant", ""])
def test_an_answer_to_another_question_loses_what_is_written_around_it(style, said):
    """Answers that the template's own text holds, too."""
    tokenizer = STYLES[style].tokenizer()
    _, reference, written = asked(chat("Hi", "Yo"), tokenizer)
    other = encode_row(chat("Hi", said), tokenizer, 512)
    if said or isinstance(other, Example):
        ids = generated(other, tokenizer)
        assert written.content(ids, reference, tokenizer) == said
        assert written.said(ids, tokenizer).startswith(AROUND[style].strip())
    assert written.content(tokenizer.encode("finally", add_special_tokens=False), reference, tokenizer) == "finally"


@pytest.mark.parametrize("style", ["chatml", "llama-3", "mistral-first", "gemma", "always-asks", "footer", "no-end"])
def test_where_nothing_is_written_around_it_an_answer_is_decoded_as_ever(style):
    tokenizer = STYLES[style].tokenizer()
    _, reference, written = asked(chat("Hi", "Yo"), tokenizer)
    for text in ("Yo", " a <think>b</think> ", "<|im_start|>x", "\n\n", "### END ###"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert written.content(ids, reference, tokenizer) == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert written.said(ids, tokenizer) == tokenizer.decode(ids, skip_special_tokens=True).strip()


def learnt(style, *turns, **asked_for):
    tokenizer = STYLES[style].tokenizer()
    example = encode_row(chat(*turns), tokenizer, 512, **asked_for)
    return tokenizer.decode(example.ids[example.supervised].tolist())


@pytest.mark.parametrize("style", ["always-asks", "footer"])
@pytest.mark.parametrize("last_turn_only", [False, True])
def test_what_stands_behind_the_end_of_an_answer_is_not_learnt(style, last_turn_only):
    end = "<|im_end|>"
    assert learnt(style, "Hi", "Yo", last_turn_only=last_turn_only) == f"Yo{end}"
    assert learnt(style, "Hi", "", last_turn_only=last_turn_only) == end
    assert learnt(style, "Hi", "assistant", last_turn_only=last_turn_only) == f"assistant{end}"
    both = learnt(style, "Hi", "Yo", "?", "Aha", last_turn_only=last_turn_only)
    assert both == (f"Aha{end}" if last_turn_only else f"Yo{end}Aha{end}")


HEAD, TAIL = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}", "{{ '<|im_end|>\n' }}{% endfor %}"
LOOP = "{% for part in m.content %}{{ part.text }}{% endfor %}"
FORMS = {
    "parts, user": ("{% if m.role == 'user' %}" + LOOP + "{% else %}{{ m.content }}{% endif %}", {"user"}),
    "parts, all but the assistant": (
        "{% if m.role != 'assistant' %}" + LOOP + "{% else %}{{ m.content }}{% endif %}",
        {"system", "user", "tool"},
    ),
    "parts, system": ("{% if m.role == 'system' %}" + LOOP + "{% else %}{{ m.content }}{% endif %}", {"system"}),
    "parts": (LOOP, {"system", "user", "assistant", "tool"}),
    "text": ("{{ m.content }}", set()),
    "cut": ("{{ m.content[:3] }}", set()),
    "capitals": ("{{ m.content | upper }}", set()),
    "JSON of parts": ("{% if m.content is string %}{{ raise_exception('no') }}{% endif %}{{ m.content | tojson }}", set()),
    "a part as code": ("{{ m.content[0] if m.content is not string }}", set()),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_role_gets_the_form_that_writes_its_text(name):
    template, roles = FORMS[name]
    tokenizer = STYLES["chatml"].tokenizer()
    tokenizer.chat_template = HEAD + template + TAIL
    dialect = dialect_of(tokenizer)
    assert {role for role in ("system", "user", "assistant", "tool") if dialect.takes_parts(role)} == roles
