"""A rendering that is found once for all contents is what transformers renders for each of them, or is not found."""

import random

import pytest

from tests.data.common import PUBLISHED
from tests.data.templates import STYLES, shaped
from tests.tiny import tiny_tokenizer
from trimtab.bases.beginnings import Beginnings
from trimtab.bases.dialect import Dialect, dialect_of

CONTENTS = ("hi", "7", "  blank\n", "", "<think>\na\n</think>\n\nyes", "x\ny", "assistant", "<|im_end|>", "{{ x }}", "None", "append")

# Each does otherwise with some content, in a way that a stand-in for contents may miss.
LOOKING = {
    "a test": "{% for m in messages %}{{ 'a' if m.content is lower else 'b' }}{{ m.content }}{% endfor %}",
    "its truth": "{% for m in messages %}{% if m.content %}{{ m.content }}{% else %}none{% endif %}{% endfor %}",
    "a comparison": "{% for m in messages %}{{ m.content == 'hi' }}{{ 'hi' != m.content }}{% endfor %}",
    "another's content": "{% for m in messages %}{{ m.content == messages[0].content }}{% endfor %}",
    "a filter that swallows errors": "{% for m in messages %}{{ m.content | int }}|{{ [m.content] | map('int') | first }}{% endfor %}",
    "its length": "{% for m in messages %}{{ m.content | length }}{% endfor %}",
    "a method": "{% for m in messages %}{{ m.content.upper() }}{{ m.content.startswith('h') }}{% endfor %}",
    "a method that may be missing": "{% for m in messages %}{% if m.content.hi is defined %}a{% else %}b{% endif %}{% endfor %}",
    "an index": "{% for m in messages %}{{ m.content[:1] }}{{ {'hi': 'a'}[m.content] }}{% endfor %}",
    "as an index": "{% for m in messages %}{{ messages[m.content] is defined }}{% endfor %}",
    "what holds it": "{% for m in messages %}{{ m.content in ['hi'] }}{{ 'h' in m.content }}{% endfor %}",
    "a text that was made of it": "{% for m in messages %}{% set x = 'a' + m.content %}{{ x | length }}{% endfor %}",
    "a block": "{% for m in messages %}{% set x %}{{ m.content }}{% endset %}{{ x | length }}{% endfor %}",
    "a macro": "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m.content) | length }}{% endfor %}",
    "a filter block": "{% for m in messages %}{% filter upper %}{{ m.content }}{% endfilter %}{% endfor %}",
    "all that a message holds": "{% for m in messages %}{{ m | tojson }}{{ m }}{% endfor %}",
    "changes": "{% for m in messages %}{% if loop.changed(m.content) %}{{ m.content }}{% endif %}{% endfor %}",
    "an order": "{% for m in messages | sort(attribute='content') %}{{ m.content }}{% endfor %}",
    "characters": "{% for m in messages %}{% for c in m.content %}{{ c }}.{% endfor %}{% endfor %}",
    "an attribute of something": "{% set n = namespace(hi=1) %}{% for m in messages %}{{ n[m.content] }}{{ loop[m.content] }}{% endfor %}",
    "a name that a stand-in may have": "{% for m in messages %}{{ m.content.pieces is defined }}{% endfor %}",
    "a format without a place for it": "{% for m in messages %}{{ 'hi' % m.content }}{% endfor %}",
    "a block that is written twice": "{% block b %}{{ messages[0].content }}{% endblock %}{{ self.b() }}",
    "a block that is called": "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}{{ messages[0].content }}{% endcall %}",
    "a loop within itself": "{% for m in messages recursive %}{{ m.content }}{{ loop([m]) if loop.depth < 2 }}{% endfor %}",
    "escapes": "{% autoescape true %}{% for m in messages %}{{ m.content }}{% endfor %}{% endautoescape %}",
    "a format": "{% for m in messages %}{{ '%5s' | format(m.content) }}{{ '%s' % m.content }}{{ m.content * 2 }}{% endfor %}",
}
WRITING = {
    "stripped": "{% for m in messages %}{{ m.role + ':' + m.content.strip() + m['content'] | trim }}{% endfor %}{{ messages[0].content }}",
    "tests of any text": "{% for m in messages if m.content is string and m.content is not none %}{{ m.content }}{% endfor %}",
    "a macro for something else": "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m.role) }}{{ m.content }}{% endfor %}",
    "a namespace": "{% set n = namespace(x='') %}{% for m in messages %}{% set n.x = n.x + m.content %}{% endfor %}{{ n.x }}{{ n.x }}",
}


def talks(seed):
    rng = random.Random(seed)
    shapes = [["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"] * 3, ["user", "user", "assistant"]]
    return [[{"role": role, "content": rng.choice(CONTENTS)} for role in shape] for shape in shapes * 12]


def as_transformers(tokenizer, messages, name="", **options):
    return tokenizer.apply_chat_template(shaped(messages, name), tokenize=False, **options)


def compare(tokenizer, name=""):
    """How many rows were compared; what the template refuses is none."""
    compared = 0
    for messages in talks(name):
        last = len(messages) - 1
        finished = dialect_of(tokenizer).finished(messages, {last: (True,)})
        if finished is None:
            continue
        assert finished.text == as_transformers(tokenizer, messages, name)
        for (j, generate), (n, rest) in finished.beginnings.items():
            assert finished.text[:n] + rest == as_transformers(tokenizer, messages[:j], name, add_generation_prompt=generate)
        compared += 1
    return compared


@pytest.fixture
def runs(monkeypatch):
    """The conversations over which templates were run."""
    seen, run = [], Beginnings.run
    monkeypatch.setattr(Beginnings, "run", lambda self, *args: seen.append(args) or run(self, *args))
    return seen


@pytest.mark.parametrize("name", LOOKING)
def test_a_template_that_looks_at_contents_is_run_on_them(name, runs):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LOOKING[name]
    compare(tokenizer)
    assert all(found is None for found in dialect_of(tokenizer)._skeleton_of.values())
    assert runs or dialect_of(tokenizer)._beginnings is None


@pytest.mark.parametrize("name", WRITING)
def test_a_template_that_only_writes_contents_is_run_once_for_some_roles(name, runs):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WRITING[name]
    assert compare(tokenizer) == len(talks("")) and not runs


@pytest.mark.parametrize("name", ["chatml", "llama-3"])
def test_rows_of_common_templates_are_filled_in(name, runs):
    assert compare(STYLES[name].tokenizer(), name) and not runs


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_are_as_transformers_renders_them(name):
    template, specials, _ = PUBLISHED[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": specials, "bos_token": specials[0], "eos_token": specials[-1]})
    tokenizer.chat_template = template
    assert compare(tokenizer, name)


def test_contents_are_not_found_where_a_template_writes_the_date():
    assert Dialect("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", {})._skeletons is None
