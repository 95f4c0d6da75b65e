"""Chat templates are rendered as transformers renders them, and none can loop or grow without end."""

import threading
import time

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from tests.data.common import PUBLISHED, TALK
from tests.data.templates import STYLES, shaped
from tests.tiny import tiny_tokenizer
from trimtab.bases import sandbox
from trimtab.bases.sandbox import Program, TooMuch
from trimtab.bases.template import Template
from trimtab.data import Row, encode_rows
from trimtab.errors import DataError

# Each is an expression, a statement or a block that real templates use, and a value that shows whether it is computed alike.
FEATURES = [
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages[0] | tojson(sort_keys=true) }}{{ 'é<>&' | tojson }}",
    (
        "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m['content'] | trim }}{{ m.content.split('.')[0] }}"
        "{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
    ),
    (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.last }}{% endfor %}"
    ),
    (
        "{% set ns = namespace(a=0, b='') %}{% for m in messages %}{% set ns.a = ns.a + 1 %}"
        "{% set ns.b = ns.b ~ m.role ~ ns.a %}{% endfor %}{{ ns.b }}"
    ),
    (
        "{% macro say(m, end='!') %}{{ '<' ~ m.role ~ '>' + m.content }}{{ end }}{% endmacro %}{{ say(messages[0]) }}"
        "{{ say(messages[1], end='?') }}"
    ),
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{% set x %}a{{ 1 }}b{% endset %}{{ x | upper | replace('A', 'zz') }}",
    "{{ messages | map(attribute='role') | unique | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages | map(attribute='content') | join(', ') }}{{ ', '.join(['a', 'b']) }}{{ ['a', 1, none] | join('-') }}",
    (
        "{{ 'a' * 3 }}{{ [1] * 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ '%s is %05d' % ('a', 3) }}"
        "{{ '{:>5}|{}'.format('a', 'b') }}{{ 'a%sb' | format('c') }}"
    ),
    (
        "{{ dict(a=1, b=2).items() | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ range(3) | list }}"
        "{{ undefined_name is defined }}{{ x | default('d') }}"
    ),
    (
        "{{ 'abc'[1:] }}{{ 'abc'[::-1] }}{{ messages[1:][0].role }}{{ 'a\\nb' | indent(4) }}"
        "{{ 'a\\nb' | indent(2, first=true) }}{{ 'Ab'.lower().capitalize() }}"
    ),
    (
        "{{ messages is iterable }}{{ messages[0] is mapping }}{{ 'a' in 'abc' }}{{ 3.5 | int }}{{ '4' | int + 1 }}"
        "{{ [3, 1] | sort | first }}{{ none }}"
    ),
    (
        "{%- set a = 'x' -%}  {{- a }}\n{% if a %}\n  b\n{% endif %}\n{# gone #}{{ bos_token }}{{ eos_token }}"
        "{{ '<b>' | e }}{{ '<b>' | safe ~ '<i>' }}"
    ),
    (
        "{{ messages | groupby('role') | map('first') | list }}{{ [1, 2, 3] | batch(2) | list }}"
        "{{ 'ab cd' | title | wordcount }}{{ [[1, 2], [3]] | sum(start=[]) }}"
    ),
    "{% filter upper %}a{{ 'b' }}{% endfilter %}",
    "{% for k, v in {'a': {'b': [1, 2]}}.items() recursive %}{{ k }}{{ v }}{% endfor %}{{ cycler('a', 'b').next() }}",
]


def rendered(text, **more):
    variables = {"messages": [dict(m) for m in TALK], "tools": None, "documents": None, "add_generation_prompt": False, **more}
    return variables | {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("text", FEATURES)
def test_as_transformers_renders(text):
    variables = rendered(text)
    assert Program(text).render(variables) == _compile_jinja_template(text).render(**variables)


@pytest.mark.parametrize("name", [*STYLES, *PUBLISHED])
@pytest.mark.parametrize("generate", [False, True])
def test_templates_as_apply_chat_template_renders_them(name, generate):
    tokenizer = STYLES[name].tokenizer() if name in STYLES else tiny_tokenizer()
    if name not in STYLES:
        template, specials, _ = PUBLISHED[name]
        tokenizer.add_special_tokens({"additional_special_tokens": specials, "bos_token": specials[0], "eos_token": specials[-1]})
        tokenizer.chat_template = template
    for messages in (TALK[1:2], TALK[1:3], TALK[1:], TALK):
        try:
            expected = tokenizer.apply_chat_template(shaped(messages, name), tokenize=False, add_generation_prompt=generate)
        except Exception as error:
            with pytest.raises(Exception, match=str(error).partition("/")[0]):
                Template(tokenizer).render(messages, generate=generate)
        else:
            assert Template(tokenizer).render(messages, generate=generate) == expected


def test_the_environment_has_what_transformers_has():
    theirs, ours = _compile_jinja_template("").environment, Program("")._environment
    assert set(ours.filters) == set(theirs.filters) and set(ours.tests) == set(theirs.tests)
    assert set(ours.globals) == set(theirs.globals) - {"lipsum"}
    for option in ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "autoescape", "undefined", "block_start_string"):
        assert getattr(ours, option) == getattr(theirs, option)


BIG = "{% set a = 'a' * 10**6 %}"
GROWING = "{% set ns = namespace(s='aaaaaaaaaa', l=['a']) %}{% for i in range(100) %}"
HOSTILE = {
    "a range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "loops whose bodies never run": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "a text multiplied": "{{ 'a' * 10**10 }}",
    "a text multiplied, the other way": "{% set x = 10**10 * 'a' %}",
    "a list multiplied": "{{ [1] * 10**10 }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "texts doubled by ~": GROWING + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "texts doubled by +": GROWING + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "texts doubled by a block": GROWING + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    "lists in lists": GROWING + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "lists in lists as JSON": GROWING + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    "a macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros that double": "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "%d": "{{ '%10000000000d' % 1 }}",
    "%*d": "{{ '%*d' | format(10**10, 1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format, computed": "{{ '{:{}}'.format(1, 10**10) }}",
    "replace": BIG + "{{ a.replace('a', a) }}",
    "the filter replace": BIG + "{{ a | replace('a', a) }}",
    "join": BIG + "{{ a.join(range(100000) | map('string')) }}",
    "the filter join": BIG + "{{ range(100000) | join(a) }}",
    "to_bytes": "{{ (1).to_bytes(10**10) }}",
    "a filter in a loop": "{% for i in range(100000) %}{% set x = range(100000) | sum %}{% endfor %}",
    "a block": BIG + "{% set x %}{% for i in range(100000) %}{{ a }}{% endfor %}{% endset %}",
    "long literals": "{% set x %}{% for i in range(100000) %}" + "y" * 100_000 + "{% endfor %}{% endset %}",
    "comparisons": "{% set a = 'a' * 10**7 %}{% set b = 'a' * 10**7 %}{% for i in range(100000) %}{% if a == b %}{% endif %}{% endfor %}",
    "slices": "{% set a = 'a' * 10**7 %}{% set ns = namespace(l=[]) %}{% for i in range(100000) %}"
    "{% set ns.l = ns.l + [a[i:]] %}{% endfor %}",
    "indent": "{{ ('a\n' * 10**6) | indent(9999) }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if true %}" * 300 + "{% endif %}" * 300,
    "a generation block": "{% generation %}{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
    "{% endgeneration %}",
    "a call block": "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{% for i in range(100000) %}"
    "{% for j in range(100000) %}{% endfor %}"
    "{% endfor %}{% endcall %}",
    "a long template": "a" * (2**20 + 1),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_template_loops_or_grows_without_end(text, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    start = time.thread_time()
    with pytest.raises(TooMuch):
        Program(text).render({})
    assert time.thread_time() - start < 3  # minutes or for ever without bounds


def test_a_stopped_template_is_named_and_stops_the_run():
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "evil/base"
    tokenizer.chat_template = "{{ 'a' * 10**10 }}"
    with pytest.raises(DataError, match="the chat template of 'evil/base' was stopped: it makes more than"):
        encode_rows([Row("r:1", messages=tuple(TALK))], tokenizer, 512)


def test_a_long_conversation_is_far_below_the_bounds():
    """4,096 messages of 1,000 characters, twice: the budget is a rendering's own."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "x" * 1000} for i in range(4096)]
    for style in ("chatml", "llama-3", "qwen-3", "parts-or-text"):
        template = Template(STYLES[style].tokenizer())
        assert len(template.render(messages, generate=True)) == len(template.render(messages, generate=True)) > 4_096_000


def test_threads_have_budgets_of_their_own():
    program, seen = Program("{% for m in messages %}{{ m }}{% endfor %}"), []
    threads = [threading.Thread(target=lambda: seen.append(len(program.render({"messages": ["x" * 10**6] * 30})))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [30 * 10**6] * 6
