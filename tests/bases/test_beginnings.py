"""What one run says about the beginnings of a conversation is what `apply_chat_template` writes for each of them."""

import random

import pytest

from tests.data.common import PUBLISHED, REWRITING
from tests.data.templates import STYLES, shaped
from tests.tiny import tiny_tokenizer
from trimtab.bases import dialect as dialects
from trimtab.bases import skeleton
from trimtab.bases.beginnings import Beginnings
from trimtab.bases.dialect import Dialect, dialect_of
from trimtab.data import Row, encode_row

CONTENTS = ("hi", "<think>\na\n</think>\n\nyes", "  blank ", "", "a</think>b", "x\ny", "Zq1qZ")
# Styles that look at all messages before they write the first: their beginnings are rendered one by one.
SCANNING = {"qwen-3"}


def tokenizer_of(name):
    if name in STYLES:
        return STYLES[name].tokenizer()
    template, specials, _ = PUBLISHED[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": specials, "bos_token": specials[0], "eos_token": specials[-1]})
    tokenizer.chat_template = template
    return tokenizer


def talks(seed):
    rng = random.Random(seed)
    shapes = [
        ["user", "assistant"] * 4,
        ["system", *["user", "assistant"] * 3],
        ["user", "assistant", "assistant", "tool", "user", "assistant"],
    ]
    return [[{"role": role, "content": rng.choice(CONTENTS)} for role in shape] for shape in shapes * 3]


@pytest.mark.parametrize("longest", [0, skeleton.LONGEST])
@pytest.mark.parametrize("name", [*STYLES, *PUBLISHED])
def test_every_beginning_is_as_transformers_renders_it(name, longest, monkeypatch):
    monkeypatch.setattr(dialects, "LONGEST", longest)
    tokenizer, found = tokenizer_of(name), 0
    for messages in talks(name):
        finished = dialect_of(tokenizer).finished(messages, dict.fromkeys(range(1, len(messages)), (False, True)))
        if finished is None and name not in SCANNING:
            with pytest.raises(Exception):  # noqa: B017 - whatever the template raises
                tokenizer.apply_chat_template(shaped(messages, name), tokenize=False)
        if finished is None:
            continue
        assert finished.text == tokenizer.apply_chat_template(shaped(messages, name), tokenize=False)
        for (j, generate), (n, rest) in finished.beginnings.items():
            expected = tokenizer.apply_chat_template(shaped(messages[:j], name), tokenize=False, add_generation_prompt=generate)
            assert finished.text[:n] + rest == expected
        found += len(finished.beginnings)
        assert name in SCANNING or len(finished.beginnings) == 2 * (len(messages) - 1)
    assert found or name in SCANNING


# Each looks at what follows in another way, or keeps what cannot be copied.
AHEAD = {
    "how many there are": "{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}",
    "the last one": "{% for m in messages %}{{ m.content }}{{ messages[-1].content }}{% endfor %}",
    "the one after the next": "{% for m in messages %}{{ m.content }}{{ messages[loop.index0 + 2].content }}{% endfor %}",
    "a scan": "{% set n = namespace(i=0) %}{% for m in messages %}{% set n.i = n.i + 1 %}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{{ n.i }}{% endfor %}",
    "a filter": "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ loop.last }}{% endfor %}",
    "the flag": "{% for m in messages %}{{ m.content }}{{ add_generation_prompt }}{% endfor %}",
    "the next": "{% for m in messages %}{{ loop.index }}{{ m.content }}{{ loop.nextitem.role }}{{ loop.previtem.role }}{% endfor %}|",
    "the next, by its number": "{% for m in messages %}{{ m.content }}{% if messages[loop.index] is defined %},{% endif %}{% endfor %}",
    "a sum": "{% set n = namespace(t='') %}{% for m in messages %}{{ n.t }}{% set n.t = n.t ~ m.role[0] %}{% if loop.last %}!{% endif %}"
    "{% endfor %}{{ n.t }}{% set n.t = '' %}{{ n.t }}",
    "a generator": "{% set u = messages | selectattr('role', 'equalto', 'user') %}{% for m in messages %}{{ m.content }}{% endfor %}"
    "{{ u | map(attribute='content') | join }}",
    "changes": "{% for m in messages %}{{ m.content }}{{ loop.changed(m.role) }}{% endfor %}",
    "macros": "{% set n = namespace(i=0) %}{% macro say(m) %}{{ m.content }}{{ n.i }}{% endmacro %}{% for m in messages %}"
    "{% set n.i = n.i + 1 %}{{ say(m) }}{% endfor %}{{ say(messages[0]) }}{% if add_generation_prompt %}?{% endif %}",
    "an end of its own": "{% for m in messages %}{{ m.content }}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}"
    "{{ messages[1:] | length }}",
    "rewriting": REWRITING,
}


@pytest.mark.parametrize("text", AHEAD.values(), ids=list(AHEAD))
def test_templates_that_look_ahead_are_not_misread(text):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text
    dialect = Dialect(text, {"bos_token": "<s>", "eos_token": tokenizer.eos_token})
    for messages in talks(text):
        finished = dialect.finished(messages, dict.fromkeys(range(1, len(messages)), (False, True)))
        for (j, generate), (n, rest) in (finished.beginnings if finished else {}).items():
            expected = tokenizer.apply_chat_template(messages[:j], tokenize=False, add_generation_prompt=generate)
            assert finished.text[:n] + rest == expected, (j, generate)


def test_a_long_conversation_is_run_twice_at_most(monkeypatch):
    """Once for its contents and once with marks in their place, whatever the number of its turns; 80 plain renderings are none."""
    plain = []
    render = Dialect._render
    monkeypatch.setattr(Dialect, "_render", lambda self, messages, *rest: plain.append(len(messages)) or render(self, messages, *rest))
    tokenizer = STYLES["chatml"].tokenizer()
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(80)]
    assert encode_row(Row("r:1", messages=tuple(turns)), tokenizer, 100_000).supervised.any()
    assert sum(plain) < 3 * 80


def test_a_template_in_which_nothing_is_found_is_soon_rendered_plainly(monkeypatch):
    """It costs one plain run a conversation, and the search for beginnings now and then, in case of other conversations."""
    monkeypatch.setattr(dialects, "LONGEST", 0)
    tries, run = [], Beginnings._run
    monkeypatch.setattr(Beginnings, "_run", lambda self, *rest: tries.append(0) or run(self, *rest))
    dialect = Dialect(AHEAD["a scan"], {})
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = [dialect.finished(talk, {1: (False,)}) for _ in range(200)]
    assert not any(f.beginnings for f in found if f)
    assert len(tries) < 30
